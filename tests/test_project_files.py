"""CITATION.cff, CHANGELOG.md, LICENSE and .pre-commit-config.yaml: same facts as setup.cfg and code."""

import configparser
import re
from pathlib import Path

import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_has_the_version_and_licence_of_the_package():
    assert CITATION["version"] == SETUP["metadata"]["version"]
    assert CITATION["license"] == SETUP["metadata"]["license"]


def test_the_citation_has_the_title_that_model_cards_cite():
    (card,) = (
        text
        for text in (path.read_text() for path in (ROOT / "hf_cifar").rglob("*.py"))
        if "@software{{hf_cifar" in text
    )
    assert f"title = {{{{{CITATION['title']}}}}}" in card


def test_the_changelog_has_an_entry_for_the_version():
    assert SETUP["metadata"]["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_one_that_the_package_declares():
    assert SETUP["metadata"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_pre_commit_checks_with_the_locked_versions():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    pins = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    locked = set(
        re.findall(r"^[\w-]+==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    for tool in ("codespell", "ruff"):
        (pin,) = (pin for pin in pins if pin.startswith(f"{tool}=="))
        assert pin in locked


def test_the_picture_of_the_report_is_legible_and_small():
    with Image.open(ROOT / "docs" / "report.png") as picture:
        assert (
            picture.format == "PNG" and picture.width >= 1800
        )  # two pixels for each of a README's
    assert (ROOT / "docs" / "report.png").stat().st_size < 300_000
