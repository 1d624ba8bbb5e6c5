"""docs/how-to/notebook.ipynb: the committed outputs, and a run of its cells."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "notebook.ipynb"
MAX_BYTES = 150_000


def outputs(notebook, kind):
    """The outputs of one MIME type, of all cells."""
    found = [o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", [])]
    return [data[kind] for data in found if kind in data]


def printed(notebook):
    found = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in found if o.output_type == "stream")


def check(notebook):
    """Check the results that the text of the notebook promises."""
    accuracies = re.findall(r"(validation|test): accuracy ([01]\.\d+)", printed(notebook))
    assert [split for split, _ in accuracies] == ["validation", "test"]
    assert all(float(value) > 0.85 for _, value in accuracies)
    (sheet,) = outputs(notebook, "image/png")
    picture = Image.open(io.BytesIO(base64.b64decode(sheet)))
    assert picture.height == 96
    rows = re.findall(r"row \d+: \d, predicted as \d", printed(notebook))
    assert len(rows) == picture.width / 96 > 0
    tables = [html for html in outputs(notebook, "text/html") if "Validation Loss" in html]
    assert len(tables) == 3  # two trainings and an evaluation
    (last,) = re.findall(r"\(\(360, 10\), ([\d.]+)\)", " ".join(outputs(notebook, "text/plain")))
    assert float(last) > 0.9


def test_the_committed_outputs_are_those_of_a_whole_run():
    notebook = nbformat.read(PAGE, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check(notebook)
    text = PAGE.read_text()
    assert len(text) < MAX_BYTES
    assert not re.search(r"/(root|home|Users|tmp)/|[A-Z]:\\\\", text)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(PAGE, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(notebook)
    assert (tmp_path / "outputs/notebook/report.html").is_file()
