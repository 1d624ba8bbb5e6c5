"""Compare a run with smaller versions of it: pruned, in 8-bit integers, in 16 bits, and other runs.

All versions are ONNX files that ONNX Runtime runs on the CPU, so that the clock compares like with like. The
verdict is decided on validation; test is only shown.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_cifar.config.deployment import CompressConfig, ExportConfig, PruneConfig, QuantizeConfig
from hf_cifar.config.objects import require_object
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource, Splits
from hf_cifar.deploy.channels import count_parameters
from hf_cifar.deploy.export import export_run
from hf_cifar.deploy.formats import require_format
from hf_cifar.deploy.latency import Network, latencies, processor
from hf_cifar.deploy.prune import prune_run
from hf_cifar.deploy.quantize import check_data, quantize_file
from hf_cifar.deploy.quantize import verdict as quantisation_verdict
from hf_cifar.deploy.schemes import runner
from hf_cifar.errors import UserError
from hf_cifar.evaluation.comparison import compare_predictions, compare_runs
from hf_cifar.evaluation.intervals import LEVEL
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.extras import require
from hf_cifar.models.build import load_classifier
from hf_cifar.models.exported import PIXEL_VALUES, read_onnx
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.progress import progress
from hf_cifar.report import charts
from hf_cifar.report.page import render_template
from hf_cifar.runs.folder import RunFolder, new_folder, write_json, write_text
from hf_cifar.text import render_table

logger = logging.getLogger(__name__)
ORIGINAL = "original"
TARGET_SIZES = (0.5,)  # of pruning
BATCH = 50
FACTS_FILE, PAGE_FILE = "compress.json", "compress.html"
# Measured in a process of its own, which does nothing else. On Linux, ru_maxrss would start with the memory
# of the process that started it.
PEAK_MEMORY = f"""
import resource, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shape = [32, 3, int(sys.argv[2]), int(sys.argv[3])]
session.run(None, {{"{PIXEL_VALUES}": np.zeros(shape, np.float32)}})
if sys.platform == "linux":
    lines = open("/proc/self/status").read().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@dataclass(frozen=True)
class Version:
    """A version of a model. made: how, in words. parameters: their number in the network."""

    name: str
    file: Path
    made: str
    parameters: int

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor.from_dict(read_onnx(str(self.file))[1]["preprocessor"])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input, in pixels."""
        return self.preprocessor.preprocessing.size

    @cached_property
    def run(self) -> Network:
        """Computes logits [N, K] from inputs [N, 3, h, w]."""
        return runner(read_onnx(str(self.file))[0])


def compress_run(run: str | Path, config: CompressConfig) -> dict[str, Any]:
    """Make smaller versions of a run in `config.output_dir`, and compare them with it and with other runs.

    Returns the facts of the comparison, which are also in compress.json. A version that cannot be made is
    left out, with the reason. The folder appears when all is done.
    Raises: UserError for a folder that is in use, runs that are not finished, or runs of other data.
    """
    run, folder = Path(run), Path(config.output_dir)
    candidates = [Path(each) for each in config.candidates or ()]
    for each in (run, *candidates):
        RunFolder(each).require_finished()
    check_candidates(run, candidates)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} is not empty; pass another folder")
    require_format("onnx")
    require("torch_pruning", extra="deploy")
    data = RunFolder(run).data()
    require_object(data.dataset_name, "data set")
    source = DataSource(data)
    check_data(source.splits)
    with new_folder(folder) as unfinished:
        return _compare(run, unfinished, source, config)


def _compare(run: Path, folder: Path, source: DataSource, config: CompressConfig) -> dict[str, Any]:
    """Make the versions, measure them, and write the facts and the page into a folder."""
    versions, left_out = make_versions(run, folder, source.splits, config)
    splits: dict[str, Split] = {"validation": source.splits.validation}
    try:
        splits["test"] = source.test_split
    except UserError as error:
        logger.info("no test split to show: %s", error)
    predicted = {name: predict_all(versions, split) for name, split in splits.items()}
    versions_found = measured(versions, predicted)
    text, chosen = verdict(versions_found)
    facts: dict[str, Any] = {
        "processor": processor(), "run": run.name, "left_out": left_out,
        "versions": versions_found, "verdict": text, "chosen": chosen,
    }  # fmt: skip
    write_json(folder / FACTS_FILE, facts)
    write_text(folder / PAGE_FILE, render_page(facts))
    return facts


def check_candidates(run: Path, candidates: Sequence[Path]) -> None:
    """Raises: UserError for two runs of one name, which could not be told apart, or runs of other data."""
    names = [each.resolve().name for each in candidates]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"--candidates has two runs named {repeated[0]}; rename the folder of one")
    for each in candidates:
        compare_runs((run, each), "validation")


def make_versions(
    run: Path, folder: Path, splits: Splits, config: CompressConfig
) -> tuple[list[Version], dict[str, str]]:
    """Make every version; return them, the original first, and the reasons for those that cannot be made."""
    original = exported(run, folder / "original.onnx", ORIGINAL, "the run itself")
    versions, left_out = [original], {}
    for share in config.target_sizes or TARGET_SIZES:
        name = f"pruned to {share:g}"
        target = PruneConfig(
            str(folder / f"pruned-{share:g}"), target_size=share,
            num_train_epochs=config.num_train_epochs,
        )  # fmt: skip
        try:
            made = prune_run(run, target)
        except UserError as error:
            left_out[name] = str(error)
            continue
        pruned = RunFolder(target.output_dir)
        final = str(Path(config.output_dir, pruned.path.name))
        pruned.save_config(pruned.load_config().with_training(output_dir=final))
        versions.append(_pruned(made, folder / f"pruned-{share:g}.onnx", name, share))
    for source in [*versions]:
        name = "int8" if source is original else f"{source.name}, int8"
        file = folder / f"{source.file.stem}-int8.onnx"
        report = quantize_file(source.file, splits, QuantizeConfig(str(file)))
        if report["chosen"] is None:
            left_out[name] = quantisation_verdict(report)[0]
            continue
        versions.append(Version(name, file, report["chosen"], source.parameters))
    file = folder / "original-float16.onnx"
    file.write_bytes(float16(original.file))
    versions.append(Version("float16", file, "numbers of 16 bits", original.parameters))
    for number, each in enumerate(config.candidates or (), 1):
        name, file = Path(each).resolve().name, folder / f"candidate-{number}.onnx"
        versions.append(exported(Path(each), file, f"run {name}", "another run"))
    return versions, left_out


def exported(run: Path, file: Path, name: str, made: str) -> Version:
    """Export a run as a version."""
    export_run(run, ExportConfig(output=str(file), parity_images=0))
    model, _ = load_classifier(str(run))
    return Version(name, file, made, count_parameters(model))


def _pruned(made: Path, file: Path, name: str, share: float) -> Version:
    words = f"at most {share:.0%} of the parameters, fine-tuned"
    if made.is_dir():
        return exported(made, file, name, words)
    shutil.copyfile(made, file)
    weights = require("onnx", extra="deploy").load(str(file)).graph.initializer
    return Version(name, file, words, sum(int(np.prod(each.dims)) for each in weights))


def float16(file: Path) -> bytes:
    """Return an exported model with weights and activations of 16 bits; its input and outputs keep 32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
    return model.SerializeToString()


def predict_all(versions: Sequence[Version], split: Split) -> dict[str, Predictions]:
    """Predict every image of a split with every version; images are decoded once."""
    logits: dict[str, list[np.ndarray]] = {version.name: [] for version in versions}
    starts = range(0, len(split), BATCH)
    for start in progress(starts, f"evaluating {len(versions)} versions on {split.name}"):
        positions = split.positions[start : start + BATCH].tolist()
        images = [split.pixels.decode(position) for position in positions]
        inputs: dict[Preprocessor, np.ndarray] = {}
        for version in versions:
            view = version.preprocessor
            if view not in inputs:
                inputs[view] = view(images).numpy()
            logits[version.name].append(version.run(inputs[view]))
    return {
        name: Predictions(
            split=split.name, row_ids=split.row_ids, labels=split.labels,
            logits=np.concatenate(each).astype(np.float32), id2label=split.id2label,
        )
        for name, each in logits.items()
    }  # fmt: skip


def measured(
    versions: Sequence[Version], predicted: dict[str, dict[str, Predictions]]
) -> list[dict[str, Any]]:
    """Return accuracy, calibration, size, latency and memory of each version, as plain values."""
    times: dict[str, Any] = {}
    by_size: dict[tuple[int, int], list[Version]] = {}
    for version in versions:
        by_size.setdefault(version.size, []).append(version)
    for size, each in by_size.items():  # all of one size take turns
        networks = {version.name: version.run for version in each}
        times |= latencies(networks, np.zeros((1, 3, *size), np.float32))
    found = []
    for version in versions:
        row: dict[str, Any] = {
            "name": version.name, "made": version.made, "file": version.file.name,
            "bytes": version.file.stat().st_size, "parameters": version.parameters,
            "milliseconds": times[version.name], "peak_megabytes": peak_megabytes(version.file, version.size),
        }  # fmt: skip
        for split, predictions in predicted.items():
            mine, original = predictions[version.name], predictions[ORIGINAL]
            row[split] = {
                name: mine.metrics[name] for name in ("accuracy", "ece", "cross_entropy")
            } | {"interval": mine.metrics["intervals"]["accuracy"]}
            if version.name != ORIGINAL:
                compared = compare_predictions(original, mine)
                row[split] |= {
                    "difference": compared["accuracy_difference"],
                    "difference_interval": compared["accuracy_difference_interval"],
                    "mcnemar_p": compared["mcnemar_p"],
                }
        found.append(row)
    return found


def peak_megabytes(file: Path, size: tuple[int, int]) -> float | None:
    """Return the peak memory of a process that runs a batch of 32 images; None on Windows."""
    if sys.platform == "win32":
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PEAK_MEMORY, str(file.resolve()), *map(str, size)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    units = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return int(done.stdout) / units


def pareto_front(versions: Sequence[dict[str, Any]], batch_size: str = "1") -> list[str]:
    """Return the names of the versions that no other one beats in both accuracy and time of a batch."""

    def place(version: dict[str, Any]) -> tuple[float, float]:
        return version["validation"]["accuracy"], -version["milliseconds"][batch_size]["median"]

    return [
        each["name"]
        for each in versions
        if not any(
            other is not each
            and all(a >= b for a, b in zip(place(other), place(each), strict=True))
            and place(other) != place(each)
            for other in versions
        )
    ]


def verdict(versions: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Say in words which version to use, and return its name: the fastest one that validation does not find
    worse than the original, or the original."""
    original = versions[0]
    good = [each for each in versions[1:] if not _is_worse(each)]
    faster = [each for each in good if _time(each) < _time(original)]
    if not faster:
        return (
            "Keep the original: every faster version is significantly less accurate on validation.",
            ORIGINAL,
        )
    best = min(faster, key=_time)
    speed, size = _time(original) / _time(best), original["bytes"] / best["bytes"]
    after, before = best["validation"], original["validation"]
    return (
        f"Use {best['name']} ({best['made']}): {speed:.1f} times as fast for one image, {size:.1f} times "
        f"smaller, accuracy on validation {after['accuracy']:.4f} instead of {before['accuracy']:.4f} "
        f"(McNemar's p = {after['mcnemar_p']:.2g}).",
        best["name"],
    )


def _time(version: dict[str, Any]) -> float:
    return version["milliseconds"]["1"]["median"]


def _is_worse(version: dict[str, Any]) -> bool:
    found = version["validation"]
    return found["difference"] < 0 and found["mcnemar_p"] < 1 - LEVEL


def render_page(facts: dict[str, Any]) -> str:
    """Render the comparison as a self-contained page; every number names its place in compress.json."""
    versions, front = facts["versions"], pareto_front(facts["versions"])
    plots = []
    for size in ("1", "32"):
        points = {
            each["name"]: (
                each["milliseconds"][size]["median"],
                each["validation"]["accuracy"],
                each["validation"]["interval"],
            )
            for each in versions
        }
        title = f"Accuracy and time of a batch of {size}"
        labels = (f"milliseconds for a batch of {size}", "accuracy on validation")
        chosen = front if size == "1" else pareto_front(versions, size)
        plots.append(Markup(charts.trade_off(title, points, chosen, *labels)))
    return render_template(
        "compress.html",
        facts,
        plots=plots,
        front=front,
        splits=[name for name in ("validation", "test") if name in versions[0]],
    )


def render_comparison(facts: dict[str, Any]) -> str:
    """Render the comparison as a text table with the verdict below."""
    splits = [name for name in ("validation", "test") if name in facts["versions"][0]]
    rows = []
    for each in facts["versions"]:
        times = [each["milliseconds"][size] for size in ("1", "32")]
        rows.append(
            [
                each["name"],
                *(f"{each[split]['accuracy']:.4f}" for split in splits),
                f"{each[splits[0]]['mcnemar_p']:.2g}" if "mcnemar_p" in each[splits[0]] else "-",
                f"{each['bytes'] / 1e6:.2f}", f"{each['parameters'] / 1e6:.2f}",
                *(f"{t['median']:.2f} [{t['low']:.2f}, {t['high']:.2f}]" for t in times),
                "-" if each["peak_megabytes"] is None else f"{each['peak_megabytes']:.0f}",
            ]
        )  # fmt: skip
    heads = [
        "version",
        *splits,
        "p",
        "MB",
        "M parameters",
        "ms, batch 1",
        "ms, batch 32",
        "peak MB",
    ]
    left_out = [f"left out: {name}: {reason}" for name, reason in facts["left_out"].items()]
    return "\n".join([render_table(heads, rows), "", *left_out, facts["verdict"]])
