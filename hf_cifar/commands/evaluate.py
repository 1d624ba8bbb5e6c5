"""`hf-cifar evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import (
    check_images,
    is_main_process,
    quieten,
    require_model,
    wants_help,
)
from hf_cifar.config.command_line import check_option_names, parse_dataclasses
from hf_cifar.config.data import DataConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.fields import field_names
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import CONFIG_FILE, run_data_tokens


def evaluate(argv: Sequence[str]) -> int:
    """evaluate a saved model on validation or test"""
    classes = (EvaluateConfig, DataConfig)
    if not wants_help(argv):
        check_option_names(argv, {name for c in classes for name in field_names(c)})
    config, *_ = parse_dataclasses([EvaluateConfig], argv, "hf-cifar evaluate", add_help=False)
    tokens = [*_data_tokens_of_run(config, argv), *argv]
    config, data, unused = parse_dataclasses(classes, tokens, "hf-cifar evaluate")
    _refuse(unused)
    require_model(config)
    source = check_images(data, [config.split])

    from hf_cifar.evaluate import evaluate_saved
    from hf_cifar.evaluation.tables import render_metrics

    quieten(is_main_process())
    evaluation = evaluate_saved(config, data, source)
    if is_main_process():
        print(render_metrics({evaluation.split: evaluation.metrics}))
    return 0


def _refuse(unused: Sequence[str]) -> None:
    if unused:
        raise UserError(f"unexpected argument {unused[0]!r}; options start with --, see --help")


def _data_tokens_of_run(config: EvaluateConfig, argv: Sequence[str]) -> list[str]:
    """The data options of a run's own config, as tokens; none for other data, or without a config.

    Raises: UserError if figures of other data would replace the run's own.
    """
    path = Path(config.model_name_or_path) / CONFIG_FILE
    if not config.model_name_or_path or not path.is_file():
        return []
    names = field_names(DataConfig)
    given = [t.partition("=")[0] for t in argv if t.startswith("--")]
    other = [flag for flag in given if flag[2:].replace("-", "_") in names]
    if other and config.output_dir is None:
        raise UserError(
            f"{other[0]} asks for other data than the run's own; pass --output_dir too, so that the run's "
            "figures stay true"
        )
    if "--dataset_name" in other:
        return []
    return run_data_tokens(path.parent)
