"""docs/data.md: every example of a folder is built and opened, and the page shows what is logged."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from hf_cifar.config.run import RunConfig
from hf_cifar.data.sources import read_source
from hf_cifar.errors import UserError
from tests.pictures import encode

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
COMMAND = "$ hf-cifar finetune "
EXAMPLES = [
    block
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    if f"\n{COMMAND}" in block
]
JPEG = encode(Image.new("RGB", (4, 4), "red"), "JPEG")
NOT_IMAGES = (".txt", ".db", ".xml", ".nef", ".xmp")


def build(root, tree):
    """Make the folders and files of a tree, such as `  cat/  001.jpg ... 030.jpg, notes.txt`."""
    above = []
    for line in tree.splitlines():
        name, _, content = line.strip().partition("  ")
        above = [*above[: (len(line) - len(line.lstrip())) // 2], name]
        path = root.joinpath(*above)
        if name.endswith("/"):
            path.mkdir()
            for part in content.split(", ") if content else ():
                for file in expand(part.strip()):
                    write(path / file)
        elif content:
            path.write_text(content.strip().replace(" | ", "\n"))
        else:
            write(path)


def expand(part):
    first, _, last = part.partition(" ... ")
    low, high = (re.match(r"\d+", each) for each in (first, last or first))
    if not last:
        return [first]
    return [f"{i:0{len(low[0])}}{first[low.end() :]}" for i in range(int(low[0]), int(high[0]) + 1)]


def write(path):
    path.write_bytes(b"text" if path.suffix in NOT_IMAGES else JPEG)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_read_as_the_page_says(example, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    tree, *commands = example.split(COMMAND)
    build(tmp_path, tree.rstrip())
    for command in commands:
        flags, *expected = command.rstrip().splitlines()
        caplog.clear()
        caplog.set_level("INFO")
        try:
            read_source(RunConfig.parse([*shlex.split(flags), "--output_dir", "out"]).data)
            found = caplog.messages
        except UserError as error:
            found = [f"hf-cifar: error: {error}".replace(str(tmp_path), "/home/me")]
        assert found == expected


def test_the_page_has_examples():
    assert len(EXAMPLES) > 12
