"""`hf-cifar explain`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cifar.commands.command import Command, require_model
from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.explanation import DEFAULT_IMAGES, ExplainConfig
from hf_cifar.config.model import is_exported
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import EXPLANATION_FILES, RunFolder, refuse_other_files

if TYPE_CHECKING:
    from hf_cifar.data.split import Split
    from hf_cifar.explain.explainer import Explainer
    from hf_cifar.report.explanations import Subject


def explain(config: ExplainConfig, arguments: Sequence[str]) -> int:
    """Write a page that explains predictions; exit status 1 if an image could not be read."""
    if not arguments:
        raise UserError("no run to explain; pass the folder of a run, and image files")
    run, *paths = arguments
    model = PredictConfig(
        model_name_or_path=run, model_revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    require_model(model)
    if is_exported(run):
        raise UserError(
            f"{run} has no gradients or layers; pass the folder of the run that was exported"
        )
    output = _output_folder(config, run)
    refuse_other_files(output, EXPLANATION_FILES)
    _check_sources(config, run, paths)

    import torch

    from hf_cifar.explain.explainer import Explainer
    from hf_cifar.models.build import load_classifier
    from hf_cifar.progress import progress
    from hf_cifar.report.explanations import PAGE, render_summary, write_explanations

    quieten(True)
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    classifier = load_classifier(
        run, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )
    explainer = Explainer(
        classifier, config.methods, target=config.target, check=config.sanity,
        device=torch.device("cuda" if on_gpu else "cpu"),
    )  # fmt: skip
    count, subjects = _files(config, explainer, paths) if paths else _rows(config, run, explainer)
    title = Path(run).resolve().name if Path(run).is_dir() else run
    facts = write_explanations(output, title, explainer, progress(subjects, "explaining", count))
    if summary := render_summary(facts):
        print(summary)
    print(output / PAGE)
    if facts["unreadable"]:
        print(f"hf-cifar: {len(facts['unreadable'])} image(s) could not be read", file=sys.stderr)
    return 1 if facts["unreadable"] else 0


def _output_folder(config: ExplainConfig, run: str) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir)
    if not Path(run).is_dir():
        raise UserError(
            f"{run} is not a folder that explanations can be written to; pass --output_dir"
        )
    return Path(run) / "explanations"


def _check_sources(config: ExplainConfig, run: str, paths: Sequence[str]) -> None:
    """Raises: UserError for options without effect, missing files, or nothing to explain."""
    if paths:
        for name in ("split", "num_images", "dataset_name"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"--{name} has no effect with image files; leave out --{name} or the files"
                )
        missing = [path for path in paths if not Path(path).expanduser().exists()]
        if len(missing) == len(paths):
            raise UserError(
                f"no such file or folder: {missing[0]}; pass image files or folders that exist"
            )
    elif config.dataset_name is None and not RunFolder(run).has_run:
        raise UserError(f"{run} has no record of its data; pass image files, or --dataset_name")


def _files(
    config: ExplainConfig, explainer: Explainer, paths: Sequence[str]
) -> tuple[int, Iterator[Subject]]:
    """Return the number of image files, and the images, decoded when they are needed."""
    from hf_cifar.data.images import decode_image
    from hf_cifar.models.value_range import value_range_of
    from hf_cifar.predict import expand_paths
    from hf_cifar.report.explanations import Subject

    files, value_range = expand_paths(paths), value_range_of(explainer.model)

    def subjects() -> Iterator[Subject]:
        for file in files:
            name = "/".join(file.parts[-2:])
            try:
                yield Subject(name, decode_image(file, config.max_image_pixels, value_range))
            except UserError as error:
                yield Subject(name, error)

    return len(files), subjects()


def _rows(config: ExplainConfig, run: str, explainer: Explainer) -> tuple[int, Iterator[Subject]]:
    """Return the number of images from a data set, and the images with their labels."""
    import numpy as np

    from hf_cifar.report.explanations import Subject
    from hf_cifar.report.facts import label_names

    split = _split(config, run, list(explainer.id2label.values()))
    count = min(config.num_images or DEFAULT_IMAGES, len(split))
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:count])

    def subjects() -> Iterator[Subject]:
        for position in chosen:
            path = split.path_of(position)
            name = f"{split.source_split} row {split.row_ids[position]}"
            if path:
                name += f" ({'/'.join(Path(path).parts[-2:])})"
            truth = label_names(split.labels[position], split.id2label)
            try:
                yield Subject(name, split.decode(position), truth)
            except UserError as error:
                yield Subject(name, error, truth)

    return count, subjects()


def _split(config: ExplainConfig, run: str, class_names: list[str]) -> Split:
    """Open the split to take images from."""
    from hf_cifar.data.splits import DataSource, load_other_split

    name = config.split or "validation"
    if config.dataset_name is not None:
        data = DataConfig(
            dataset_name=config.dataset_name, max_image_pixels=config.max_image_pixels
        )
        return load_other_split(data, name, class_names)
    data = dataclasses.replace(RunFolder(run).data(), max_image_pixels=config.max_image_pixels)
    source = DataSource(data)
    return source.test_split if name == "test" else source.splits.validation


COMMAND = Command(
    "show which pixels support a prediction, and whether that can be trusted",
    explain,
    (ExplainConfig,),
    "RUN [FILE_OR_FOLDER ...]",
)
