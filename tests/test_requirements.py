"""requirements.lock: the tested versions, each with its hashes and allowed by setup.cfg."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
# One requirement: its lines, joined, without comments.
ENTRIES = re.sub(r" *#.*", "", LOCK.replace("\\\n", " ")).strip().splitlines()
PINNED = {
    canonicalize_name(requirement.name): requirement
    for requirement in (
        Requirement(entry.split(" --hash")[0]) for entry in ENTRIES if entry.strip()
    )
}


def wanted():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"]]
    lists += [config["options.extras_require"][extra] for extra in ("bundled", "dev")]
    return [Requirement(line) for text in lists for line in text.split("\n") if line.strip()]


def test_every_requirement_is_one_version_with_hashes():
    for entry in filter(str.strip, ENTRIES):
        requirement, *hashes = entry.split("--hash=")
        assert [s.operator for s in Requirement(requirement.strip()).specifier] == ["=="], entry
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found.strip()) for found in hashes), entry


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_setup_cfg_allows_each_locked_version(requirement):
    (pin,) = PINNED[canonicalize_name(requirement.name)].specifier
    assert requirement.specifier.contains(pin.version)


def test_the_lock_names_no_local_path_or_host():
    assert not re.search(r"://|--(extra-)?index|--find-links|(^|\s)/\w", LOCK, re.MULTILINE)
