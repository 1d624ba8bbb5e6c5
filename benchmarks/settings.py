"""Time a bare loop in each setting that the package compares, to check that the picked one is the fastest.

python -m benchmarks.settings [--only resnet50] [--turns 5] [--compiled]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.peers import chosen_setting, device, small_pictures, train_as
from benchmarks.training import compare_in_turns, tasks
from benchmarks.turns import CONTEXT
from hf_cifar import build_model, load_splits
from hf_cifar.training.autotune import candidates


def main() -> None:
    """Compare on every task, or the named one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also compile the picked setting")
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["benchmarks.peers"])
    with tempfile.TemporaryDirectory() as folder:
        data = str(small_pictures(Path(folder, "data")))
        for name, task in tasks(options.only).items():
            task = replace(task, dataset_name=data)
            config = task.config("unused")
            model, _ = build_model(config.model, load_splits(config.data).id2label)
            picked = chosen_setting(task)._replace(compiled=False)
            settings = [picked, *candidates(model, device())]
            if options.compiled:
                settings.append(picked._replace(compiled=True))
            works = {
                str(setting): functools.partial(train_as, "ceiling", replace(task, setting=setting))
                for setting in settings
            }
            compare_in_turns(f"settings {name}", works, task, options.turns)


if __name__ == "__main__":
    main()
