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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_cifar.config.deployment import CompressConfig, ExportConfig, PruneConfig, QuantizeConfig
from hf_cifar.data.split import Split, without_rows
from hf_cifar.data.splits import Splits
from hf_cifar.deploy.channels import count_parameters
from hf_cifar.deploy.export import export_classifier
from hf_cifar.deploy.formats import require_format
from hf_cifar.deploy.latency import Network, is_faster, latencies, processor
from hf_cifar.deploy.preflight import UNFINISHED, call_of, check_compress
from hf_cifar.deploy.prune import EXPORTED, prune_run
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
from hf_cifar.models.rejection import forget_rejection, rejection_of
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.progress import progress
from hf_cifar.report import charts
from hf_cifar.report.page import render_template
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder, write_json, write_text
from hf_cifar.runs.lock import sole_run
from hf_cifar.text import one_line, render_table

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

    Returns the facts of the comparison, which are also in compress.json. Pruned, 8-bit and 16-bit versions
    that cannot be made are left out, with the reason. If it is interrupted, the same call continues with the
    pruned versions that are complete.
    Raises: UserError for a folder that is in use, runs that are not finished, runs of other data, or data
    that are missing or have changed.
    """
    run, folder = Path(run).resolve(), Path(config.output_dir)
    check_compress(run, config)
    for each in config.candidates or ():
        compare_runs((run, Path(each)), "validation")  # which raises for other data
    require_format("onnx")
    require("torch_pruning", extra="deploy")
    source = open_data(RunFolder(run), config.dataset_name)
    splits = used_splits(RunFolder(run), source)
    check_data(splits)
    with _claimed(folder, run, config):
        versions, left_out = make_versions(run, folder, splits, config)
        evaluated: dict[str, Split] = {"validation": splits.validation}
        if RunFolder(run).predictions_path("test").is_file():  # else the run has not seen test yet
            skipped = Predictions.load(run, "test").skipped_rows
            evaluated["test"] = without_rows(source.test_split, skipped)
        predicted = {name: predict_all(versions, split) for name, split in evaluated.items()}
        for version in [each for each in versions if each.name in _overflowing(predicted)]:
            left_out[version.name] = "its logits are not finite on all images"
            version.file.unlink()
            versions.remove(version)
        versions_found = measured(versions, predicted)
        text, chosen = verdict(versions_found)
        facts: dict[str, Any] = {
            "processor": processor(), "run": run.name, "left_out": left_out,
            "versions": versions_found, "verdict": text, "chosen": chosen,
        }  # fmt: skip
        write_json(folder / FACTS_FILE, facts)
        write_text(folder / PAGE_FILE, render_page(facts))
    return facts


@contextmanager
def _claimed(folder: Path, run: Path, config: CompressConfig) -> Iterator[None]:
    """Lock a folder that is new, or holds what the same call left when it was interrupted.

    Raises: UserError for a folder that cannot be written.
    """
    note = folder / UNFINISHED
    if note.is_file():
        logger.info("continuing the comparison in %s that was interrupted", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(note, call_of(run, config))
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {one_line(error)}; pass another --output_dir"
        ) from None
    with sole_run(folder):
        try:
            yield
        except KeyboardInterrupt:
            logger.warning("interrupted: the same command continues in %s", folder)
            raise
        note.unlink()


def make_versions(
    run: Path, folder: Path, splits: Splits, config: CompressConfig
) -> tuple[list[Version], dict[str, str]]:
    """Make every version; return them, the original first, and the reasons for those that cannot be made."""
    trust = RunFolder(run).load_config().model.trust_remote_code
    original = exported(run, folder / "original.onnx", ORIGINAL, "the run itself", trust)
    versions, left_out = [original], {}
    candidates = [
        exported(
            Path(each),
            folder / f"candidate-{number}.onnx",
            f"run {_name(each)}",
            "another run",
            trust,
        )
        for number, each in enumerate(config.candidates or (), 1)
    ]
    for share in dict.fromkeys(config.target_sizes or TARGET_SIZES):
        name = f"pruned to {share:g}"
        try:
            made = _pruned_run(run, folder / f"pruned-{share:g}", share, config)
        except UserError as error:
            left_out[name] = str(error)
            continue
        words = f"at most {share:.0%} of the parameters, fine-tuned"
        versions.append(exported(made, folder / f"pruned-{share:g}.onnx", name, words, trust))
    for source in [*versions]:
        name = "int8" if source is original else f"{source.name}, int8"
        file = folder / f"{source.file.stem}-int8.onnx"
        try:
            report = quantize_file(source.file, splits, QuantizeConfig(str(file)))
        except UserError as error:
            left_out[name] = str(error)
            continue
        if report["chosen"] is None:
            left_out[name] = quantisation_verdict(report)[0]
            continue
        versions.append(Version(name, file, report["chosen"], source.parameters))
    file = folder / "original-float16.onnx"
    try:
        file.write_bytes(float16(original.file))
        versions.append(Version("float16", file, "numbers of 16 bits", original.parameters))
    except Exception as error:  # the converter raises many kinds
        left_out["float16"] = one_line(error, 300)
    return versions + candidates, left_out


def _pruned_run(run: Path, folder: Path, share: float, config: CompressConfig) -> Path:
    """Prune a run, or return the pruned run that an interrupted call completed."""
    if (folder / EXPORTED).is_file():
        return folder / EXPORTED
    if RunFolder(folder).facts().get("finished"):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    target = PruneConfig(
        str(folder), target_size=share, num_train_epochs=config.num_train_epochs,
        dataset_name=config.dataset_name,
    )  # fmt: skip
    made = prune_run(run, target)
    for checkpoint in RunFolder(folder).checkpoints():
        shutil.rmtree(checkpoint)
    return made


def _name(run: str | Path) -> str:
    return Path(run).resolve().name


def exported(run: Path, file: Path, name: str, made: str, trust_remote_code: bool) -> Version:
    """Export a run as a version; of a network that is an ONNX file already, copy it."""
    if run.suffix == ".onnx":
        shutil.copyfile(run, file)
        count = RunFolder(run.parent).facts()["parameters"]
    else:
        model, image_processor = load_classifier(str(run), trust_remote_code=trust_remote_code)
        if rejection_of(model) is not None:
            logger.info(
                "%s: the versions made here assign a class to every image, without --reject",
                run.name,
            )
            forget_rejection(model)
        to_file = ExportConfig(output=str(file), parity_images=0)
        export_classifier(model, image_processor, run, to_file)
        count = count_parameters(model)
    return Version(name, file, made, count)


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
    what = f"evaluating {len(versions)} versions on {split.name}"
    for start in progress(starts, what, unit="batches"):
        images = [split.decode(row) for row in range(start, min(start + BATCH, len(split)))]
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


def _overflowing(predicted: dict[str, dict[str, Predictions]]) -> list[str]:
    """Return the names of the versions with logits that are infinite or NaN. predicted: by split and
    version."""
    return sorted(
        {
            name
            for split in predicted.values()
            for name, each in split.items()
            if not np.isfinite(each.logits).all()
        }
    )


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
    """Return the peak memory of a process that runs a batch of 32 images; None on Windows, or if it fails."""
    if sys.platform == "win32":
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PEAK_MEMORY, str(file.resolve()), *map(str, size)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        logger.warning("the memory of %s is unknown: %s", file.name, one_line(done.stderr, 200))
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return int(done.stdout) * unit / 1e6


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
    faster = [each for each in good if is_faster(each["milliseconds"], original["milliseconds"])]
    if not faster:
        return (
            "Keep the original: no version that is as accurate on validation is faster for one image.",
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
