"""Run docs/how-to/notebook.ipynb in an empty folder and write its outputs into it: `make notebook`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "how-to" / "notebook.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"  # a bar, gone once its work is done


def run(notebook: Any, folder: str) -> Any:
    """Execute the cells of a notebook in a kernel whose working folder is `folder`."""
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    return notebook


def clean(notebook: Any) -> None:
    """Remove what differs between machines, and what a reader does not need."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if WIDGET not in o.get("data", {})])
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # the PNG is enough


def joined(outputs: list[Any]) -> list[Any]:
    """Join what was written to one stream in a row."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, folder)
    clean(notebook)
    text = nbformat.writes(notebook)
    for place in (folder, str(Path.home()), sys.prefix):
        if place in text:
            raise SystemExit(f"an output holds the path {place}")
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
