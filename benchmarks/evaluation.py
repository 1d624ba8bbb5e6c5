"""Prediction speed: ours, `pipeline("image-classification")` with the same labels, and the network alone.

python -m benchmarks.evaluation [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, pipeline

from benchmarks.measure import compare, conditions, summary, write
from benchmarks.peers import small_pictures
from benchmarks.turns import CONTEXT
from hf_cifar import (
    DataConfig,
    PredictConfig,
    RunConfig,
    finetune_classifier,
    load_splits,
    predict_files,
)
from hf_cifar.data.listing import list_images
from hf_cifar.models.folding import fold_norms
from hf_cifar.threads import map_in_threads
from hf_cifar.training.memory import keep_freed_memory

MODEL, NUM_IMAGES, IMAGE_SIZE = "scratch/tf_efficientnet_lite0", 4000, 96
BATCH_SIZES = (8, 16, 64)

Found = tuple[float, list[str]]  # images/s, labels


def ours(model: str, images: str) -> Found:
    """Run this package with its defaults on a folder, model loading included, modules already imported."""
    config = PredictConfig(model_name_or_path=model)
    list(predict_files(config, list_images(images)[0][:1]))
    start = time.perf_counter()
    records = list(predict_files(config, [images]))
    return len(records) / (time.perf_counter() - start), [record["label"] for record in records]


def theirs(batch_size: int, model: str, images: str) -> Found:
    """Run transformers' pipeline on the same files."""
    files, _ = list_images(images)
    pipeline("image-classification", model=model)(files[0])
    start = time.perf_counter()
    classify = pipeline("image-classification", model=model)
    with torch.inference_mode():
        results = classify(files, batch_size=batch_size, top_k=5)
    seconds = time.perf_counter() - start
    return len(files) / seconds, [result[0]["label"] for result in results]


def alone(image_size: int, num_images: int, model: str, images: str) -> Found:
    """Run ready tensors through the loaded network, computed like ours: an upper bound for any predictor."""
    layout, on_gpu = torch.channels_last, torch.cuda.is_available()
    network = AutoModelForImageClassification.from_pretrained(model).eval()
    size = PredictConfig.batch_size
    pixel_values = torch.randn(size, 3, image_size, image_size).contiguous(memory_format=layout)
    network = fold_norms(network, pixel_values).to(memory_format=layout)
    if on_gpu:
        network, pixel_values = network.cuda(), pixel_values.cuda()
    else:
        keep_freed_memory()

    def compute(pixel_values: torch.Tensor) -> None:
        with torch.inference_mode():
            network(pixel_values=pixel_values)

    def computed(num_batches: int) -> int:
        batches = [pixel_values] * num_batches
        if on_gpu:
            for batch in batches:
                compute(batch)
            torch.cuda.synchronize()
            return size * num_batches
        return size * len(list(map_in_threads(compute, batches, torch.get_num_threads())))

    computed(torch.get_num_threads())
    start = time.perf_counter()
    done = computed(max(1, num_images // size))
    return done / (time.perf_counter() - start), []


def run_on_files(
    dataset_name: str, model: str, image_size: int, steps: int, folder: Path
) -> tuple[str, str, int]:
    """Write the training images of a data set as PNG files, and train a model on them for some steps, because
    identical labels for all images would prove nothing. Returns the run, the images and their number."""
    split = load_splits(DataConfig(dataset_name=dataset_name)).train
    images, saved = folder / "images", folder / "run"
    images.mkdir()
    for row, cell in enumerate(split.rows["image"]):
        (images / f"{row:05}.png").write_bytes(cell["bytes"])
    flags = [
        "--dataset_name", dataset_name, "--model_name_or_path", model,
        "--image_size", str(image_size), "--output_dir", str(saved),
        "--max_steps", str(steps), "--eval_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip
    finetune_classifier(RunConfig.parse(flags))
    return str(saved), str(images), len(split)


def parse_run_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse a command line with the options of a run to compare on, besides those of the parser."""
    parser.add_argument("--run", help="folder of a run; default: train one")
    parser.add_argument("--images", help="folder of images for the run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if (options.run is None) != (options.images is None):
        parser.error("--run and --images belong together")
    return options


def given_or_trained(options: argparse.Namespace, num_images: int, folder: Path) -> tuple[str, str]:
    """Return the run and the images that were given, or those of a run on small generated pictures."""
    if options.run is not None:
        return options.run, options.images
    pictures = str(small_pictures(folder / "data", num_images))
    return run_on_files(pictures, MODEL, IMAGE_SIZE, 80, folder)[:2]


def compare_peers(
    benchmark: str,
    peers: dict[str, Callable[[], Found]],
    num_images: int,
    rounds: int,
    folder: Path | None = None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Run peers in turns, each in its own process, and record their speeds and labels.

    Returns images/s of each, and the share of the first one's labels that each other gives, if it gives any.
    """
    labels: dict[str, list[str]] = {}

    def timed(name: str, work: Callable[[], Found]) -> Callable[[], float]:
        process = processes.enter_context(CONTEXT.Pool(1))

        def run() -> float:
            speed, labels[name] = process.apply(work)
            return speed

        return run

    with contextlib.ExitStack() as processes:
        runs = {name: timed(name, work) for name, work in peers.items()}
        speeds = compare(benchmark, runs, rounds=rounds, folder=folder, num_images=num_images)
    first, *others = peers
    same = {
        peer: sum(a == b for a, b in zip(labels[first], labels[peer], strict=True)) / num_images
        for peer in others
        if labels[peer]
    }
    record = {
        "benchmark": f"{benchmark}, the same label as {first}", "unit": "of images",
        "n": 1, "num_images": num_images, "num_distinct": len(set(labels[first])),
        "figures": {peer: summary([share]) for peer, share in same.items()}, "ratios": {},
        **conditions(),
    }  # fmt: skip
    write(record, folder)
    print(f"same label as {first}: {same}, {record['num_distinct']} distinct ones")
    return speeds, same


def compare_predictors(
    dataset_name: str,
    model: str = MODEL,
    image_size: int = IMAGE_SIZE,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    rounds: int = 3,
    steps: int = 80,
    folder: Path | None = None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Classify the training images of a data set with one saved model, see `compare_peers`."""
    with tempfile.TemporaryDirectory() as temporary:
        run, images, count = run_on_files(dataset_name, model, image_size, steps, Path(temporary))
        peers = {
            "ours": partial(ours, run, images),
            "the network alone": partial(alone, image_size, count, run, images),
            **{f"pipeline, {n} at a time": partial(theirs, n, run, images) for n in batch_sizes},
        }
        name = f"prediction {model.split('/')[-1].removeprefix('tf_')}"
        return compare_peers(name, peers, count, rounds, folder)


def main() -> None:
    """Compare on small generated pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["benchmarks.evaluation"])
    with tempfile.TemporaryDirectory() as folder:
        pictures = small_pictures(Path(folder, "data"), NUM_IMAGES)
        compare_predictors(str(pictures), rounds=options.rounds)


if __name__ == "__main__":
    main()
