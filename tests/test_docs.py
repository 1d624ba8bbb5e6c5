"""README and docs: facts that can become outdated are compared with the code."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cifar.cli import COMMANDS, main
from hf_cifar.config import studies

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_option_of_the_studies_is_in_the_page_of_options():
    page = (ROOT / "docs" / "options.md").read_text()
    for config in vars(studies).values():
        if dataclasses.is_dataclass(config):
            shown = (each for each in dataclasses.fields(config) if each.metadata.get("help"))
            for field in shown:
                assert f"| `--{field.name}` |" in page, f"{config.__name__}.{field.name}"


@pytest.mark.parametrize("name", ["options.md", "files.md"])
def test_a_generated_page_is_up_to_date(name):
    written = (ROOT / "docs" / name).read_text()
    assert load_script("generated_pages").PAGES[name]() == written, "run make docs"


@pytest.mark.parametrize(
    ("pages", "output"),
    [
        pytest.param(["README.md"], "digits", id="README"),
        pytest.param(
            ["docs/how-to/own-images.md", "docs/how-to/notebook.md"], "notebook",
            id="how-to", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_the_python_of_a_page_runs(pages, output, tmp_path):
    text = "".join((ROOT / page).read_text() for page in pages)
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / output / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_recipe_has_its_row():
    from hf_cifar.config.recipes import recipe_names

    text = (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"`{name}`" in text for name in recipe_names())


def options_of(command, capsys):
    """Return the names of all options of a command, from its help."""
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--([\w-]+)", capsys.readouterr().out))


def test_every_option_in_a_command_exists(capsys):
    known = {name: options_of(name, capsys) for name in COMMANDS}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for command, rest in re.findall(r"(hf-cifar [a-z]+|scripts/finetune\.py)([^`\n#|]*)", text):
            name = command.split()[-1].removeprefix("scripts/").removesuffix(".py")
            assert set(re.findall(r"--([\w-]+)", rest)) <= known[name], (page.name, command, rest)
        # Options named without a command, in prose and tables: of any command.
        named = set(re.findall(r"`--([\w-]+)", text))
        assert named <= set.union(*known.values()), page.name
