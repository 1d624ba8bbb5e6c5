"""The folder of a run: every file in it by name, read and written in one place."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hf_cifar.config.command_line import parse
from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import field_names
from hf_cifar.config.recipes import yaml_tokens
from hf_cifar.config.run import CONFIG_FILE, RunConfig
from hf_cifar.errors import UserError
from hf_cifar.text import one_line

# Files about the model in a folder; out of date once another model replaces it.
RESULT_FILES = (
    "metrics.json", "corruptions.json", "predictions/*.parquet", ".eval_results/*.yaml", "report.html",
    "report.json",
)  # fmt: skip
NEXT_STEP = "restore it from a copy, or remove it"
# Files of `hf-cifar explain`: the page, its facts and its pictures.
EXPLANATION_FILES = ("explanations.html", "explanations.json", "images")
UPDATE_FILES = ("update.json", "update.html")  # of `hf-cifar update`: the facts, and the page
DRIFT_FILES = ("drift.json", "drift.html")  # of `hf-cifar drift`: the facts, and the page


class RunFolder:
    """The folder of a run, which need not exist yet.

    Reading a file that is missing gives {}. Raises: UserError for a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / CONFIG_FILE  # the settled options
        self.facts_path = self.path / "run.json"  # what happened; written last, with the card
        self.batch_path = self.path / "batch.json"  # images per step, on any number of processes
        self.race_path = self.path / "race.json"  # the race of learning rates, see training/race.py
        self.metrics_path = self.path / "metrics.json"  # by split
        self.corruptions_path = self.path / "corruptions.json"  # by split
        self.weights_path = self.path / "model.safetensors"
        self.reject_path = self.path / "reject.safetensors"  # see models/distance.py
        self.model_config_path = self.path / "config.json"
        self.card_path = self.path / "README.md"
        self.page_path = self.path / "report.html"
        self.page_facts_path = self.path / "report.json"
        self.folds_path = self.path / "folds.json"  # of a cross-validation, see studies/kfold.py
        self.study_path = self.path / "study.json"  # of a search, see studies/search.py
        self.journal_path = self.path / "journal.log"  # of a search without a database
        self.search_path = self.path / "search.json"  # its result
        self.search_page_path = self.path / "search.html"
        self.recipe_path = self.path / "best.yaml"  # of its winner
        self.winner_path = self.path / "best"  # the run of its winner
        self.trial_path = self.path / "trial.json"  # of one of its trials, see studies/trials.py
        # Rows of earlier data, see data/stored.py.
        self.stored_path = self.path / "stored.parquet"
        self.update_path = self.path / UPDATE_FILES[0]
        self.update_page_path = self.path / UPDATE_FILES[1]
        self.reproduction_path = self.path / "reproduction.json"

    def predictions_path(self, split: str) -> Path:
        """Return the file of a split's predictions."""
        return self.path / "predictions" / f"{split}.parquet"

    def eval_results_path(self, dataset_name: str) -> Path:
        """Return the file of results on a data set, in the form that the Hub reads."""
        return self.path / ".eval_results" / f"{dataset_name}.yaml"

    def checkpoints(self) -> list[Path]:
        """List the checkpoint folders, complete or damaged, newest first."""
        steps = {
            int(match[1]): path
            for path in self.path.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
        }
        return [steps[step] for step in sorted(steps, reverse=True)]

    @property
    def has_run(self) -> bool:
        """Return True once a run has started, finished or not."""
        return self.config_path.is_file() and not self.folds_path.is_file()

    def refuse_occupied(self) -> None:
        """Raises: UserError if the folder holds a run, finished or not, or is a file."""
        if self.path.is_file():
            raise UserError(f"--output_dir {self.path} is a file; pass a folder")
        if self.model_config_path.exists() or self.checkpoints():
            raise UserError(
                f"{self.path} holds another run; pass another --output_dir, or --resume_from_checkpoint last"
            )
        if self.has_run:
            raise UserError(
                f"{self.path} holds another run, which saved no checkpoint; pass another --output_dir, "
                "--resume_from_checkpoint last, or remove it"
            )
        if any(RunFolder(below).has_run for below in self.path.glob("seed-*")):
            raise UserError(
                f"{self.path} holds runs with --seeds; pass another --output_dir, or resume with the same "
                "--seeds and --resume_from_checkpoint last"
            )
        if any(RunFolder(below).has_run for below in self.path.glob("fold-*")):
            raise UserError(f"{self.path} holds runs of hf-cifar kfold; pass another --output_dir")
        if self.study_path.is_file():
            raise UserError(f"{self.path} holds runs of hf-cifar search; pass another --output_dir")

    def require_finished(self) -> None:
        """Raises: UserError if the folder does not hold a finished run."""
        needed = (self.config_path, self.facts_path, self.metrics_path, self.weights_path)
        missing = [path.name for path in needed if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.path} holds no finished run: no {missing[0]}; pass the output folder of one, see "
                "hf-cifar runs"
            )

    def options(self) -> dict[str, Any]:
        """Return the settled options by name."""
        return _read(self.config_path)

    def save_config(self, config: RunConfig) -> None:
        """Write the settled options."""
        write_text(self.config_path, config.to_yaml())

    def load_config(self) -> RunConfig:
        """Return the settled options. Raises: UserError also if there are none."""
        config = RunConfig.load(self.config_path)
        return dataclasses.replace(config, data=self._with_own_rows(config.data))

    def _with_own_rows(self, data: DataConfig) -> DataConfig:
        """Return the data options with the stored rows of this folder, which may have been moved."""
        if data.stored_rows is None or not self.stored_path.is_file():
            return data
        return dataclasses.replace(data, stored_rows=str(self.stored_path))

    def model_config(self) -> dict[str, Any]:
        """Return the saved model's config.json."""
        return _read(self.model_config_path)

    def data_tokens(self) -> list[str]:
        """Return the data options as command line tokens; none without config.yaml."""
        if not self.config_path.is_file():
            return []
        names, tokens, kept = field_names(DataConfig), [], False
        for token in yaml_tokens(self.config_path.read_bytes(), str(self.config_path)):
            if token.startswith("--"):  # its values follow
                kept = token[2:] in names
            if kept:
                tokens.append(token)
        return tokens

    def data(self) -> DataConfig:
        """Return the data options. Raises: UserError without config.yaml."""
        if not self.config_path.is_file():
            raise UserError(f"{self.path} has no {self.config_path.name} that names its data")
        data, *_ = parse([DataConfig], self.data_tokens(), "hf-cifar")
        return self._with_own_rows(data)

    def facts(self) -> dict[str, Any]:
        """Return the facts in run.json."""
        return _read(self.facts_path)

    def images_per_step(self) -> int | None:
        """Return the number of training images per optimiser step; None if it is not known."""
        return _read(self.batch_path).get("images_per_step")

    def race(self) -> dict[str, Any]:
        """Return the race that chose the learning rate; {} without one."""
        return _read(self.race_path)

    def folds(self) -> dict[str, Any]:
        """Return the metrics of each fold of a cross-validation; {} for anything else."""
        return _read(self.folds_path)

    def study(self) -> dict[str, Any]:
        """Return what all trials of a search share; {} for anything else."""
        return _read(self.study_path)

    def trial(self) -> dict[str, Any]:
        """Return the number, parameters and state of a trial of a search; {} for anything else."""
        return _read(self.trial_path)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics by split."""
        return _read(self.metrics_path)

    def corruptions(self) -> dict[str, Any]:
        """Return the accuracy under corruptions by split."""
        return _read(self.corruptions_path)

    def save_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Replace the metrics of a split."""
        write_json(self.metrics_path, self.metrics() | {split: metrics})

    def save_corruptions(self, split: str, result: dict[str, Any]) -> None:
        """Replace the accuracy under corruptions of a split."""
        write_json(self.corruptions_path, self.corruptions() | {split: result})

    def remove_results(self) -> None:
        """Remove the results of a model that another one replaces."""
        for pattern in RESULT_FILES:
            for path in self.path.glob(pattern):
                path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file. Raises: UserError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({one_line(error, 200)}); {NEXT_STEP}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a mapping); {NEXT_STEP}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def require_writable(folder: Path, flag: str) -> None:
    """Raises: UserError if a folder, or the existing one that it would be made in, cannot be written.

    flag: the option that names it.
    """
    folder = folder.absolute()
    place = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write {folder}: {place} is not a folder that can be written; pass another {flag}"
        )


def refuse_other_files(
    folder: Path, ours: Collection[str] = (), flag: str = "--output_dir"
) -> None:
    """Raises: UserError for an output folder that is a file, has other files than `ours`, or cannot be
    written. flag: the option that names it."""
    if folder.is_file():
        raise UserError(f"{flag} {folder} is a file; pass a folder")
    require_writable(folder, flag)
    if others := {each.name for each in folder.glob("*")} - set(ours):
        raise UserError(
            f"{flag} {folder} holds other files, such as {min(others)}; pass a new folder"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `path` once the block has ended, and is removed if it raises.

    Raises: UserError for a place that cannot be written, or a path that cannot be replaced.
    """
    path = path.resolve()  # a link keeps its target, and '.' has no name
    if path.is_mount() or (path.exists() and not path.is_dir()):
        kind = "the root of a file system" if path.is_mount() else "a file"
        raise UserError(f"--output_dir {path} is {kind}; pass a new folder")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {one_line(error)}; pass another --output_dir"
        ) from None
    try:
        yield unfinished
        replaced = unfinished.with_suffix(".old")
        if path.exists():
            path.rename(replaced)
        try:
            unfinished.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a file to write. Raises: UserError if the place cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".hf_cifar-", dir=output.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {one_line(error)}; pass another --output"
        ) from None
    with folder as path:
        yield Path(path)
