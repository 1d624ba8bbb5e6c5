"""Write README's option table from the dataclass fields: run after a change of an option."""

import dataclasses
import re
from pathlib import Path

from hf_cifar.config.run import FinetuneConfig
from hf_cifar.config.training import LIGHT_CONFIGS, FinetuneOptions

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- options -->\n).*(<!-- /options -->)", re.DOTALL)


def render_option_table() -> str:
    """Markdown rows of every option of ours, and of the Trainer options whose default we change."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for config_class in (*LIGHT_CONFIGS, FinetuneOptions, FinetuneConfig):
        for field in dataclasses.fields(config_class):
            if field.init and field.name in config_class.__annotations__:
                default = render_default(field.default)
                lines.append(f"| `--{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def render_default(value: object) -> str:
    """A default as one would type it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`"


def with_table(readme: str) -> str:
    """The README text with its table renewed."""
    return BLOCK.sub(lambda match: match[1] + render_option_table() + match[2], readme)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
