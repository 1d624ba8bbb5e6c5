import importlib.metadata
import re
import sys

import datasets

from hf_cifar.runs.environment import environment


def test_environment_is_what_runs_here():
    versions = environment()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["datasets"] == datasets.__version__
    assert versions["hf-cifar"] == importlib.metadata.version("hf-cifar")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", versions.get("commit", "0" * 40))
