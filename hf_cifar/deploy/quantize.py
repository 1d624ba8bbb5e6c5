"""Quantise a run to 8-bit integers, and write the result if it is as good as the run and faster."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hf_cifar.config.deployment import ExportConfig, QuantizeConfig
from hf_cifar.data.splits import Splits
from hf_cifar.deploy.export import export_classifier
from hf_cifar.deploy.formats import require_format
from hf_cifar.deploy.inputs import inputs_of
from hf_cifar.deploy.latency import processor
from hf_cifar.deploy.preflight import check_quantize
from hf_cifar.deploy.schemes import Quantised, quantize
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.models.exported import METADATA, read_onnx
from hf_cifar.models.rejection import forget_rejection, rejection_of
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder, scratch_beside, write_bytes, write_json
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)
REPORT = "quantization.json"  # beside the model: FILE.quantization.json


def quantize_run(run: str | Path, config: QuantizeConfig) -> dict[str, Any]:
    """Quantise the model of a run, and write it to `config.output` if its answers are not worse than the
    run's and it is faster on this machine; write a report of all schemes beside it, and return it.

    Raises: UserError for an existing output, a missing package, multi-label data, or data that cannot be
    opened or have changed.
    """
    run, output = Path(run), Path(config.output)
    check_quantize(run, config)
    require_format("onnx")
    splits = used_splits(RunFolder(run), open_data(RunFolder(run), config.dataset_name))
    check_data(splits)
    with scratch_beside(output) as folder:
        exported = folder / "float.onnx"
        model, image_processor = load_classifier(
            str(run), trust_remote_code=config.trust_remote_code
        )
        if (rejection := rejection_of(model)) is not None:
            logger.info(
                "the 8-bit model does not answer %r: its features are not those that --reject was fitted to",
                rejection.answer,
            )
            forget_rejection(model)
        to_file = ExportConfig(output=str(exported), parity_images=0)
        export_classifier(model, image_processor, run, to_file)
        return quantize_file(exported, splits, config)


def check_data(splits: Splits) -> None:
    """Raises: UserError for data on which answers cannot be compared."""
    if splits.multi_label:
        raise UserError(
            "the run is multi-label, and top-1 accuracy needs one label per image; pass another run"
        )


def quantize_file(exported: Path, splits: Splits, config: QuantizeConfig) -> dict[str, Any]:
    """Quantise an exported file with the images of its data, see `quantize_run`.

    Raises: UserError for a network that ONNX Runtime cannot quantise.
    """
    content, notes = read_onnx(str(exported))
    preprocessor, output = Preprocessor.from_dict(notes["preprocessor"]), Path(config.output)
    calibration = inputs_of(splits.train, config.calibration_images, preprocessor).pixel_values
    judging = inputs_of(splits.validation, config.judging_images, preprocessor)
    try:
        chosen, report = quantize(content, calibration, judging)
    except UserError:
        raise
    except Exception as error:  # the quantiser raises many kinds
        raise UserError(
            f"the network cannot be quantised ({one_line(error, 300)}); use it as it is"
        ) from error
    report = {"processor": processor(), **report}
    output.unlink(missing_ok=True)  # an earlier model, which this report is not about
    if chosen is not None:
        write_bytes(output, _with_notes(chosen, notes))
    write_json(output.with_name(f"{output.name}.{REPORT}"), report)
    text, good = verdict(report)
    logger.log(logging.INFO if good else logging.WARNING, "%s: %s", output.name, text)
    return report


def _with_notes(model: Quantised, notes: dict[str, Any]) -> bytes:
    """Return a quantised model with the metadata of the exported one, and its scheme."""
    import onnx

    program = onnx.load_model_from_string(model.content)
    notes = {**notes, "quantization": str(model.scheme)}
    onnx.helper.set_model_props(program, {METADATA: json.dumps(notes, ensure_ascii=False)})
    return program.SerializeToString()


def verdict(report: dict[str, Any]) -> tuple[str, bool]:
    """Say in a line what a report found, and whether an 8-bit model was written."""
    before, count = report["float"], f"{report['num_images']:,} validation images"
    if report["chosen"] is None:
        best = max(report["tried"], key=lambda each: each["accuracy"])
        return (
            "not written, because no scheme is both as accurate as the float model and faster here; accuracy "
            f"of the best {best['accuracy']:.4f}, of the float model {before['accuracy']:.4f}, on {count}; "
            "keep the original",
            False,
        )
    after = next(each for each in report["tried"] if each["scheme"] == report["chosen"])
    sizes = before["milliseconds"]
    speeds = [
        before["milliseconds"][size]["median"] / after["milliseconds"][size]["median"]
        for size in sizes
    ]
    times = " and ".join(f"{speed:.1f}" for speed in speeds)
    return (
        f"{report['chosen']}: accuracy {after['accuracy']:.4f} instead of {before['accuracy']:.4f} on "
        f"{count} (McNemar's p = {after['p_value']:.2g}), {before['bytes'] / after['bytes']:.1f} times "
        f"smaller, {times} times as fast in batches of {' and '.join(sizes)} on {report['processor']}",
        True,
    )
