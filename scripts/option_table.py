"""Write README's option table from the dataclass fields: run after a change of an option."""

import dataclasses
import re
from pathlib import Path

from hf_cifar.config.command_line import render_default
from hf_cifar.config.run import CONFIGS

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- options -->\n).*(<!-- /options -->)", re.DOTALL)


def render_option_table() -> str:
    """Return a Markdown row for each option of `hf-cifar finetune` that is declared here."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for config_class in CONFIGS:
        for field in dataclasses.fields(config_class):
            default = render_default(field.default)
            default = f"`{default}`" if default else ""
            lines.append(f"| `--{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README text with its table renewed."""
    return BLOCK.sub(lambda match: match[1] + render_option_table() + match[2], readme)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
