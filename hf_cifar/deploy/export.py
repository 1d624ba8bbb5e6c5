"""Export a fine-tuned model: write it in another format, prove that it agrees, and put it in its place."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.config.deployment import ExportConfig
from hf_cifar.deploy.formats import FORMATS, require_format
from hf_cifar.deploy.graph import ClassifierGraph
from hf_cifar.deploy.model_repository import MODEL_FILE, VERSION, write_server_files
from hf_cifar.deploy.parity import compare, parity_images, verdict
from hf_cifar.deploy.preflight import check_export
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.models.distance import load_distance, rejecting
from hf_cifar.models.exported import IMAGES, PIXEL_VALUES
from hf_cifar.models.problem_type import thresholds_of
from hf_cifar.models.rejection import rejection_of
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.runs.folder import RunFolder, scratch_beside, write_json
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)
PARITY_FILE = "parity.json"
PACKAGES = ("hf-cifar", "torch", "transformers", "pillow")


def export_run(run: str | Path, config: ExportConfig) -> dict[str, Any] | None:
    """Write the model of a run to `config.output`, and beside it a report of how it agrees with the model.

    Returns the report, see `parity.compare`; None without images to compare on. The output appears when it is
    complete.
    Raises: UserError for an existing output, a missing package, or a model that is missing or cannot be
    exported.
    """
    check_export(Path(run), config)
    require_format(config.format)
    model, image_processor = load_classifier(str(run), trust_remote_code=config.trust_remote_code)
    return export_classifier(model, image_processor, Path(run), config)


def export_classifier(
    model: PreTrainedModel, image_processor: BaseImageProcessor, run: Path, config: ExportConfig
) -> dict[str, Any] | None:
    """Write the model of a run that is already loaded, see `export_run`."""
    output = Path(config.output)
    model = model.eval().float()
    rejection = rejection_of(model)
    if rejection is not None:
        model = rejecting(model, load_distance(run), rejection.head)
    preprocessor = Preprocessor.of(model, image_processor)
    preprocessing = preprocessor.preprocessing if config.with_preprocessing else None
    graph = ClassifierGraph(model, preprocessing).eval()
    images = None
    if config.parity_images:
        images = parity_images(run, config.dataset_name, config.parity_images, preprocessor)
    metadata = _metadata(run, model, preprocessor, config)
    with scratch_beside(output) as scratch:
        made = file = scratch / output.name
        if config.format == "server":
            file = made / VERSION / MODEL_FILE
            file.parent.mkdir(parents=True)
            size = None if config.with_preprocessing else preprocessor.preprocessing.size
            write_server_files(
                made, output.name, metadata["labels"], size, rejects=rejection is not None
            )
        try:
            FORMATS[config.format].write(graph, metadata, file)
        except (UserError, OSError):
            raise
        except Exception as error:  # the exporters raise many kinds
            raise UserError(
                f"{run} cannot be exported as {config.format} ({one_line(error, 300)}); pass another --format"
            ) from error
        report = None
        if images is not None:
            report = compare(
                FORMATS[config.format].open(file), model, preprocessor, images,
                takes_images=config.with_preprocessing,
            )  # fmt: skip
            report = {"sha256": _sha256(file), "versions": metadata["versions"], **report}
            text, agrees = verdict(report)
            logger.log(logging.INFO if agrees else logging.WARNING, "%s %s", output, text)
        if output.is_dir():
            shutil.rmtree(output)
        for path in sorted(scratch.iterdir()):  # an .xml after its .bin
            os.replace(path, output.with_name(path.name))
    report_path = parity_path(output)
    report_path.unlink(missing_ok=True)  # of an earlier export
    if report is not None:
        write_json(report_path, report)
    return report


def parity_path(output: Path) -> Path:
    """Return the file of the report: beside an exported file, or in a folder for a server."""
    return (
        output / PARITY_FILE
        if output.is_dir()
        else output.with_name(f"{output.name}.{PARITY_FILE}")
    )


def _metadata(
    run: Path, model: PreTrainedModel, preprocessor: Preprocessor, config: ExportConfig
) -> dict[str, Any]:
    """What a file says about itself, as plain JSON values; without paths of this machine."""
    thresholds = thresholds_of(model)
    return {
        "labels": [model.config.id2label[i] for i in range(model.config.num_labels)],
        "thresholds": None if thresholds is None else thresholds.tolist(),
        **({"reject": model.config.reject} if rejection_of(model) else {}),
        "input": IMAGES if config.with_preprocessing else PIXEL_VALUES,
        "input_size": list(preprocessor.preprocessing.size),
        "preprocessor": preprocessor.to_dict(),
        "run": _identity(RunFolder(run)),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _identity(run: RunFolder) -> dict[str, Any]:
    """Identify a run: its name, data, split, code and weights, as far as its folder has them."""
    facts = run.facts()
    identity = {
        "name": facts.get("repo_id", run.path.resolve().name),
        "dataset": facts.get("dataset", {}).get("name"),
        "split_hash": facts.get("split_hash"),
        "finished": facts.get("finished"),
        "commit": facts.get("environment", {}).get("commit"),
        "weights_sha256": _sha256(run.weights_path) if run.weights_path.is_file() else None,
    }
    return {name: value for name, value in identity.items() if value is not None}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
