import importlib.metadata
import importlib.util
import inspect
import shutil
import subprocess
import sys

import datasets
import pytest

from hf_cifar.runs.environment import environment


def test_environment_has_the_installed_versions():
    versions = environment()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["datasets"] == datasets.__version__
    assert versions["hf-cifar"] == importlib.metadata.version("hf-cifar")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_code_s_own_checkout(tmp_path):
    """The module is copied, because this package may or may not be a checkout."""
    source = shutil.copy(inspect.getsourcefile(environment), tmp_path / "copied.py")
    spec = importlib.util.spec_from_file_location("copied", source)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)

    def git(*argv):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert "commit" not in copied.environment()
    git("init")
    git("commit", "--allow-empty", "--message", "of another program")
    assert "commit" not in copied.environment()  # installed below another project's checkout
    git("add", "copied.py")
    git("commit", "--message", "first")
    head = git("rev-parse", "HEAD")
    assert copied.environment()["commit"] == head
    with open(source, "a") as file:
        file.write("# changed\n")
    assert copied.environment()["commit"] == f"{head}-dirty"
