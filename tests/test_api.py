"""The public names: what `dir` shows, docs/api.md, and its examples."""

import doctest
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_cifar

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def api_page():
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "scripts" / "api_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dir_shows_the_public_names_alone():
    code = "import hf_cifar; print(*dir(hf_cifar)); hf_cifar.UserError; print(*dir(hf_cifar))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before.split() == after.split() == list(hf_cifar.__all__)
    assert all(name.isidentifier() and not name.startswith("_") for name in hf_cifar.__all__)


def test_every_public_name_has_an_example(api_page):
    names = [name for examples in api_page.EXAMPLES.values() for name in examples]
    assert sorted(names) == list(hf_cifar.__all__)
    for examples in api_page.EXAMPLES.values():
        for name, example in examples.items():
            assert f"hf_cifar.{name}" in example


def test_the_page_is_what_the_script_writes(api_page):
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.render_page()


@pytest.mark.slow
def test_the_examples_run_as_the_page_shows_them(api_page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = api_page.PAGE.read_text(encoding="utf-8").replace("```", "\n")
    session = doctest.DocTestParser().get_doctest(page, {}, "docs/api.md", None, 0)
    told = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(session, out=told.append)
    assert len(session.examples) > len(hf_cifar.__all__)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
    assert "digits" in os.listdir(tmp_path)
