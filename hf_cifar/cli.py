"""`hf-cifar SUBCOMMAND`: a table from name to function. What needs torch is imported in the chosen branch."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from hf_cifar.config.command_line import (
    check_option_names,
    check_values,
    check_words,
    parse_dataclasses,
    trainer_options,
)
from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig, PushConfig
from hf_cifar.config.evaluation import CompareConfig, EvaluateConfig, ReportConfig
from hf_cifar.config.fields import BOUNDS, check_bounds, field_names
from hf_cifar.config.model import BUNDLED, SCRATCH
from hf_cifar.config.recipes import expand_tokens, read_recipe, recipe_names
from hf_cifar.config.studies import ReproduceConfig
from hf_cifar.config.training import LIGHT_CONFIGS, FinetuneOptions
from hf_cifar.errors import UserError
from hf_cifar.models.names import check_model_name
from hf_cifar.runs.folder import CONFIG_FILE, refuse_occupied, require_finished, run_data_tokens
from hf_cifar.runs.listing import list_runs, render_runs
from hf_cifar.runs.lock import refuse_in_use
from hf_cifar.runs.resume import check_same_run, run_to_resume
from hf_cifar.runs.signals import Stopped, handled_signals, stop_at_once
from hf_cifar.text import one_line

USER_ERROR = 2


def finetune(argv: Sequence[str]) -> int:
    """fine-tune a pretrained classifier"""
    tokens = expand_tokens(argv)
    if _wants_help(tokens):
        from hf_cifar.config.run import FinetuneConfig

        parse_dataclasses(
            [*LIGHT_CONFIGS, FinetuneConfig],
            tokens,
            "hf-cifar finetune",
            usage="hf-cifar finetune [--recipe NAME] [--config FILE.yaml] [options]",
            description="A recipe's options come first, then those of the config file, then the flags; "
            "the last one wins. See also: hf-cifar recipes",
        )
    # Options and data are checked before torch is imported: a mistake shows in a second or two.
    light_classes = [*LIGHT_CONFIGS, FinetuneOptions]
    kinds = trainer_options() | {
        n: str(k) for c in light_classes for n, k in c.__annotations__.items()
    }
    check_option_names(tokens, kinds)
    check_words(tokens, kinds)
    check_values(tokens, trainer_options())
    data, augment, model, options, *_ = parse_dataclasses(
        light_classes, tokens, "hf-cifar finetune"
    )
    for name in BOUNDS.keys() & set(field_names(FinetuneOptions)):
        check_bounds(name, getattr(options, name))
    resumed = run_to_resume(options.output_dir, options.resume_from_checkpoint)
    if resumed is not None:
        check_same_run(resumed, {**asdict(data), **asdict(augment), **asdict(model)})
    if is_main_process():
        refuse_in_use(Path(options.output_dir))
        if resumed is None:
            refuse_occupied(Path(options.output_dir))
    check_model_name(
        model.model_name_or_path, model.model_revision, trust_remote_code=model.trust_remote_code
    )
    check_images(data, ["train", "validation"])

    from hf_cifar.config.run import RunConfig
    from hf_cifar.finetune import finetune_classifier, render_summary

    config = RunConfig.parse(argv)
    quieten(config.train.process_index == 0)
    if config.train.seeds > 1:
        from hf_cifar.studies.seeds import finetune_seeds, render_seeds

        summary = render_seeds(finetune_seeds(config))
    else:
        summary = render_summary(finetune_classifier(config))
    if config.train.process_index == 0:
        print(summary)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """evaluate a saved model on validation or test"""
    classes = (EvaluateConfig, DataConfig)
    if not _wants_help(argv):
        check_option_names(argv, {name for c in classes for name in field_names(c)})
    config, *_ = parse_dataclasses([EvaluateConfig], argv, "hf-cifar evaluate", add_help=False)
    tokens = [*_data_tokens_of_run(config, argv), *argv]
    config, data, unused = parse_dataclasses(classes, tokens, "hf-cifar evaluate")
    _refuse(unused)
    _require_model(config)
    check_images(data, [config.split])

    from hf_cifar.evaluate import evaluate_saved
    from hf_cifar.evaluation.tables import render_metrics

    quieten(is_main_process())
    evaluation = evaluate_saved(config, data)
    if is_main_process():
        print(render_metrics({evaluation.split: evaluation.metrics}))
    return 0


def reproduce(argv: Sequence[str]) -> int:
    """make a run again from what it left, and say what differs"""
    if not _wants_help(argv):
        check_option_names(argv, field_names(ReproduceConfig))
    config, folders = parse_dataclasses(
        [ReproduceConfig],
        argv,
        "hf-cifar reproduce",
        usage="hf-cifar reproduce [options] RUN",
        description="The exit status is 0 if the weights are bit-identical, and 1 if they differ.",
    )
    folder = _one_run("reproduce", folders)
    require_finished(folder)
    output_dir = Path(
        config.output_dir or f"{folder if folder.name else folder.resolve()}-reproduced"
    )
    if is_main_process():
        refuse_occupied(output_dir)

    from hf_cifar.studies.reproduce import render_reproduction, reproduce_run

    quieten(is_main_process())
    comparison = reproduce_run(folder, output_dir, other_data=config.other_data)
    if is_main_process():
        print(render_reproduction(comparison))
    return 0 if comparison["weights"]["identical"] else 1


def compare(argv: Sequence[str]) -> int:
    """compare two runs' predictions of the same images"""
    if not _wants_help(argv):
        check_option_names(argv, field_names(CompareConfig))
    config, folders = parse_dataclasses(
        [CompareConfig], argv, "hf-cifar compare", usage="hf-cifar compare [options] RUN RUN"
    )
    if len(folders) != 2:
        raise UserError(f"compare takes the folders of two runs, not {len(folders)}")
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise UserError(f"no folder {missing[0]}; pass the output folders of two runs")

    from hf_cifar.evaluation.comparison import compare_runs, render_comparison

    print(render_comparison(compare_runs(folders, config.split), folders))
    return 0


def report(argv: Sequence[str]) -> int:
    """write a run's report.html and report.json"""
    if not _wants_help(argv):
        check_option_names(argv, field_names(ReportConfig))
    config, folders = parse_dataclasses(
        [ReportConfig], argv, "hf-cifar report", usage="hf-cifar report [options] RUN"
    )
    folder = _one_run("report", folders)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; pass the output folder of a run")

    from hf_cifar.report.page import write_report

    print(write_report(folder, config))
    return 0


def runs(argv: Sequence[str]) -> int:
    """list the runs in folders"""
    if _wants_help(argv):
        print(
            "usage: hf-cifar runs [--json] FOLDER ...\n\nList the runs in and below the folders: by "
            "data, the best on validation first.\nAccuracies come with their 95% interval; dates are UTC.\n\n"
            "  --json  one JSON record a line instead of a table"
        )
        return 0
    check_option_names(argv, ["json"])
    folders = [token for token in argv if not token.startswith("--")]
    if not folders:
        raise UserError("runs takes folders with runs in them, for example: hf-cifar runs outputs")

    records = list_runs(folders)
    if "--json" in argv:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    elif records:
        print(render_runs(records))
    else:
        print(f"no runs in {', '.join(folders)}", file=sys.stderr)
    return 0


def predict(argv: Sequence[str]) -> int:
    """classify image files with a saved model, as JSON lines"""
    if not _wants_help(argv):
        check_option_names(argv, field_names(PredictConfig))
    config, paths = parse_dataclasses(
        [PredictConfig],
        argv,
        "hf-cifar predict",
        usage="hf-cifar predict [options] FILE_OR_FOLDER ...",
    )
    _require_model(config)
    missing = [path for path in paths if not Path(path).exists()]
    if not paths or len(missing) == len(paths):
        raise UserError(
            f"no such file or folder: {missing[0]}"
            if missing
            else "no image to predict; pass files or folders"
        )

    from hf_cifar.predict import predict_files

    quieten(True)
    failed = 0
    for record in predict_files(config, paths):
        try:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        except (
            BrokenPipeError
        ):  # who reads has seen enough, as `head`; what is left must not go there at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        failed += "error" in record
    if failed:
        print(f"hf-cifar: {failed} image(s) could not be read", file=sys.stderr)
    return 1 if failed else 0


def push(argv: Sequence[str]) -> int:
    """upload a finished run to the Hub, or see what that would do"""
    if not _wants_help(argv):
        check_option_names(argv, field_names(PushConfig))
    config, folders = parse_dataclasses(
        [PushConfig], argv, "hf-cifar push", usage="hf-cifar push RUN --repo_id NAME [options]"
    )
    folder = _one_run("push", folders)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; pass the --output_dir of a run")

    from hf_cifar.hub.push import Target, plan_push, push_planned, render_plan
    from hf_cifar.report.card import card_for

    target = Target(config.repo_id, config.private, config.revision)
    plan = plan_push(folder, target, card_for)
    print(render_plan(plan), flush=True)
    if config.dry_run:
        print("nothing was uploaded: leave out --dry_run to push")
    else:
        print(f"pushed to {push_planned(plan)}")
    return 0


def recipes(argv: Sequence[str]) -> int:
    """list the packaged recipes, or show one"""
    if _wants_help(argv):
        print("usage: hf-cifar recipes [NAME]\n\nList the packaged recipes, or show one.")
        return 0
    if len(argv) > 1:
        raise UserError(f"recipes takes the name of one recipe, not {len(argv)}")
    if argv:
        print(read_recipe(argv[0]), end="")
        return 0
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:<{width}}  {read_recipe(name).splitlines()[0].removeprefix('# ')}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "finetune": finetune,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "compare": compare,
    "report": report,
    "runs": runs,
    "predict": predict,
    "push": push,
    "recipes": recipes,
}


@handled_signals(stop_at_once, signal.SIGTERM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's mistake is one line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # Read when torch is loaded: DDP warns of parameters that a model might not use.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What matters of an image file, images.py says.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return _dispatch(argv)
    except UserError as error:
        return _complain(error)
    except Exception as error:
        try:
            return _complain_of_machine(error)
        except RuntimeError as late:  # torch tells of a dead loader process when its signal arrives
            return _complain_of_machine(late)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if is_main_process():
            print(f"hf-cifar: stopped by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hf-cifar COMMAND [options]\n")
        for name, function in COMMANDS.items():
            print(f"  {name:<11}{function.__doc__}")
        print("\nhf-cifar COMMAND --help lists the options of a command.")
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("hf-cifar"))
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


def _complain(error: Exception | str) -> int:
    if is_main_process():
        print(f"hf-cifar: error: {one_line(error)}", file=sys.stderr)
    return USER_ERROR


def _complain_of_machine(error: Exception) -> int:
    """Say in a line that disk or memory gave out, or that a process was killed. Raises: any other error."""
    # safetensors and torch wrap the system's error in their own.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return _complain(
            "no space left on the disk; free some, and start again or resume from the last checkpoint"
        )
    if "DataLoader worker" in str(error):
        return _complain(
            "a loader process was killed, which the system does when memory runs out; pass fewer "
            "--dataloader_num_workers, and --resume_from_checkpoint last to go on"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return _complain(
            f"{str(error).splitlines()[0]} Pass a smaller --per_device_train_batch_size (or "
            "--auto_find_batch_size true) or --per_device_eval_batch_size"
        )
    raise error


def _wants_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def _one_run(command: str, folders: Sequence[str]) -> Path:
    if len(folders) != 1:
        raise UserError(f"{command} takes the folder of one run, not {len(folders)}")
    return Path(folders[0])


def _refuse(unused: Sequence[str]) -> None:
    if unused:
        raise UserError(f"unexpected argument {unused[0]!r}; options start with --, see --help")


def _require_model(config: EvaluateConfig | PredictConfig) -> None:
    name = config.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing; pass the folder of a run, or a Hub id")
    if name.startswith((SCRATCH, BUNDLED)):
        raise UserError(f"{name} is not fine-tuned yet; pass the folder of a run, or a Hub id")
    check_model_name(
        name,
        config.model_revision,
        trust_remote_code=config.trust_remote_code,
        purpose="the folder of a run",
    )


def check_images(data: DataConfig, splits: Sequence[str]) -> None:
    """Load and decode now what the command will ask for; it gets the same splits back, at no cost."""
    from hf_cifar.data.split import require_readable
    from hf_cifar.data.splits import load_splits, load_test_split

    parts = [
        load_test_split(data) if name == "test" else getattr(load_splits(data), name)
        for name in splits
    ]
    require_readable(*parts, pixel_store=data.pixel_store)


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


def is_main_process() -> bool:
    """Whether this is the first of all processes, by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def quieten(main_process: bool) -> None:
    """Let the libraries report errors alone, and this package its one-line notes on the main process."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its search for CUDA
    logging.getLogger("hf_cifar").setLevel(logging.INFO if main_process else logging.ERROR)


def run() -> NoReturn:
    """Console entry point."""
    sys.exit(main())
