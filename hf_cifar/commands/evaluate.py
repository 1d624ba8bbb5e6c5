"""`hf-cifar evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, require_model
from hf_cifar.config.command_line import parse, refuse_options, unexpected_argument
from hf_cifar.config.data import DataConfig, is_same_source
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.fields import field_names
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import is_main_process

DESCRIPTION = (
    "A run's folder is evaluated on the run's own data by default; other data needs --output_dir."
)
PROG, CONFIGS = "hf-cifar evaluate", (EvaluateConfig, DataConfig)


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a saved model, by default on the data of its run."""
    config, *_ = parse([EvaluateConfig], [t for t in argv if t not in ("-h", "--help")], PROG)
    config, data, rest = parse(
        CONFIGS, [*_data_tokens_of_run(config, argv), *argv], PROG, description=DESCRIPTION
    )
    refuse_options(rest, CONFIGS)
    if rest:
        raise unexpected_argument(rest[0])
    require_model(config)

    from hf_cifar.evaluate import evaluate_saved
    from hf_cifar.evaluation.tables import render_metrics

    quieten(is_main_process())
    evaluation = evaluate_saved(config, data)
    if is_main_process():
        print(render_metrics({evaluation.split: evaluation.metrics}))
    return 0


COMMAND = Command("evaluate a saved model on validation or test", evaluate, description=DESCRIPTION)


def _data_tokens_of_run(config: EvaluateConfig, argv: Sequence[str]) -> list[str]:
    """Return the data options of a run's own config as tokens; none for other data, or without a config.

    Raises: UserError if metrics of other data would replace the run's own.
    """
    folder = RunFolder(config.model_name_or_path)
    if not config.model_name_or_path or not folder.has_run:
        return []
    names = field_names(DataConfig)
    given = [t.partition("=")[0] for t in argv if t.startswith("--")]
    other = [flag for flag in given if flag[2:].replace("-", "_") in names]
    if other and config.writes_to_model:
        raise UserError(
            f"{other[0]} requests data other than the run's; pass --output_dir too, so that the "
            "run keeps its own metrics"
        )
    if "--dataset_name" in other:
        _, data, _ = parse(CONFIGS, [t for t in argv if t not in ("-h", "--help")], PROG)
        if not is_same_source(folder.data(), data):
            return []
    return folder.data_tokens()
