"""Prediction speed of an exported file: `predict` with ONNX and with torch, `pipeline`, and the bare runtime.

python -m benchmarks.exported [--run RUN --images FOLDER] [--rounds 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.evaluation import (
    IMAGE_SIZE,
    MODEL,
    NUM_IMAGES,
    Found,
    compare_peers,
    ours,
    run_on_files,
    theirs,
)
from benchmarks.peers import small_pictures
from benchmarks.turns import CONTEXT
from hf_cifar import PredictConfig
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.data.listing import list_images
from hf_cifar.deploy.export import export_run
from hf_cifar.models.exported import PIXEL_VALUES, read_onnx, session_of
from hf_cifar.runs.folder import RunFolder
from hf_cifar.threads import map_in_threads

PIPELINE_BATCH = 16  # its best in benchmarks.evaluation


def bare(in_threads: bool, num_images: int, file: str) -> Found:
    """Run ready tensors through ONNX Runtime: an upper bound. in_threads: a batch on each core, as `predict`
    does; else the runtime divides each batch among all cores."""
    content, notes = read_onnx(file)
    num_threads, size = torch.get_num_threads(), PredictConfig.batch_size
    session = session_of(content, 1 if in_threads else num_threads)
    generator = np.random.default_rng(0)
    pixel_values = generator.normal(size=(size, 3, *notes["input_size"])).astype(np.float32)

    def computed(num_batches: int) -> int:
        batches = [pixel_values] * num_batches
        work = partial(session.run, None)
        found = map_in_threads(
            lambda batch: work({PIXEL_VALUES: batch}), batches, num_threads if in_threads else 1
        )
        return size * len(list(found))

    computed(num_threads)
    start = time.perf_counter()
    done = computed(max(1, num_images // size))
    return done / (time.perf_counter() - start), []


def compare_served(
    run: str, images: str, *, rounds: int = 3, folder: Path | None = None
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Export a run, and classify a folder of images with both, see `evaluation.compare_peers`."""
    count = len(list_images(images)[0])
    with tempfile.TemporaryDirectory() as temporary:
        file = str(Path(temporary, "model.onnx"))
        export_run(run, ExportConfig(output=file, parity_images=0))
        peers = {
            "predict, ONNX": partial(ours, file, images),
            "predict, torch": partial(ours, run, images),
            "pipeline": partial(theirs, PIPELINE_BATCH, run, images),
            "bare ONNX Runtime, a batch on each core": partial(bare, True, count, file),
            "bare ONNX Runtime, all cores for a batch": partial(bare, False, count, file),
        }
        name = RunFolder(run).options()["model_name_or_path"].split("/")[-1].removeprefix("tf_")
        return compare_peers(f"prediction, exported {name}", peers, count, rounds, folder)


def main() -> None:
    """Compare on a run's own images, or on small generated pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a run; default: train one")
    parser.add_argument("--images", help="folder of images for the run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if (options.run is None) != (options.images is None):
        parser.error("--run and --images belong together")
    CONTEXT.set_forkserver_preload(["benchmarks.exported"])
    with tempfile.TemporaryDirectory() as folder:
        run, images = options.run, options.images
        if run is None:
            pictures = str(small_pictures(Path(folder, "data"), NUM_IMAGES))
            run, images, _ = run_on_files(pictures, MODEL, IMAGE_SIZE, 80, Path(folder))
        compare_served(run, images, rounds=options.rounds)


if __name__ == "__main__":
    main()
