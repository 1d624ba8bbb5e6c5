"""GitHub's workflows: the names in them exist, and their versions are those of setup.cfg."""

import configparser
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
ACTIONS = sorted(GITHUB.glob("actions/*/action.yml"))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def load(path):
    return yaml.safe_load(path.read_text())


def jobs():
    return {name: job for path in WORKFLOWS for name, job in load(path)["jobs"].items()}


def commands():
    """Return the shell commands of all workflows and actions."""
    steps = [step for job in jobs().values() for step in job["steps"]]
    steps += [step for path in ACTIONS for step in load(path)["runs"]["steps"]]
    return [step["run"] for step in steps if "run" in step]


def minimums():
    """Return the lowest version of each requirement of the package, and of the extras that the tests need."""
    lists = [SETUP["options"]["install_requires"]]
    lists += [SETUP["options.extras_require"][extra] for extra in ("bundled", "dev")]
    for line in "\n".join(lists).split("\n"):
        if line.strip():
            requirement = Requirement(line)
            (lowest,) = (s.version for s in requirement.specifier if s.operator == ">=")
            yield requirement.name, lowest


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {name for command in commands() for name in re.findall(r"\bmake ([\w-]+)", command)}
    assert {"quality", "test", "test-all"} <= used <= targets


def test_excluded_tests_exist():
    names = re.findall(r"--(?:ignore|deselect)=(\S+)", "\n".join(commands()))
    for path, _, function in (name.partition("::") for name in names):
        assert f"def {function}" in (ROOT / path).read_text(), path


def test_actions_are_pinned_or_local():
    steps = [step for job in jobs().values() for step in job["steps"]]
    steps += [step for path in ACTIONS for step in load(path)["runs"]["steps"]]
    for used in (step["uses"] for step in steps if "uses" in step):
        if used.startswith("./"):
            assert (ROOT / used / "action.yml").exists(), used
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", used), used


def test_quick_tests_run_on_every_python_that_the_package_declares():
    declared = re.findall(r":: Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
    assert jobs()["quick"]["strategy"]["matrix"]["python"] == declared
    assert SETUP["options"]["python_requires"] == f">={min(declared, key=Version)}"


def test_the_lowest_job_installs_the_lowest_versions_of_setup_cfg():
    lowest = jobs()["lowest"]
    (install,) = (step["with"] for step in lowest["steps"] if step.get("uses", "")[:2] == "./")
    assert install["resolution"] == "lowest-direct"
    assert install["python"] == SETUP["options"]["python_requires"].removeprefix(">=")
    (command,) = (command for command in commands() if "uv pip install --torch" in command)
    assert re.search(r"--resolution .*inputs\.resolution.* --editable '\.\[bundled,dev\]'", command)
    assert not re.search(r"[\w\]]\s*[<>=]=", command)


@pytest.mark.skipif("EXPECT_LOWEST_VERSIONS" not in os.environ, reason="for the job 'lowest'")
def test_the_lowest_versions_are_installed():
    installed = {name: Version(metadata.version(name)).public for name, _ in minimums()}
    lowest = dict(minimums())
    assert {n: v for n, v in installed.items() if Version(v) != Version(lowest[n])} == {}
