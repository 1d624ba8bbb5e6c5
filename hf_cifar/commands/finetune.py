"""`hf-cifar finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_cifar.commands.command import Command, open_source
from hf_cifar.config.command_line import inherited_parser, parse, wants_help
from hf_cifar.config.jobs import JobConfig
from hf_cifar.config.run import CONFIGS as RUN_CONFIGS
from hf_cifar.config.run import RunConfig, split_options
from hf_cifar.hub.reach import looks_like_path
from hf_cifar.logs import quieten
from hf_cifar.models.names import check_models
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import is_main_process
from hf_cifar.runs.resume import check_folder, with_restarts

if TYPE_CHECKING:
    from hf_cifar.finetune import RunResult

CONFIGS = (*RUN_CONFIGS, JobConfig)
USAGE = "hf-cifar finetune [--recipe NAME] [--config FILE.yaml] [options]"
DESCRIPTION = (
    "A recipe's options come first, then those of the config file, then the flags; the last one wins. "
    "A BOOL option without a value is true. Every option of transformers' TrainingArguments works too: "
    "--help_all lists those. See also: hf-cifar recipes"
)


def finetune(argv: Sequence[str]) -> int:
    """Fine-tune with one seed, or with multiple ones. Mistakes in options, paths and images are found before
    torch is imported, in a second or two."""
    if wants_help(argv) or "--help_all" in argv:
        print_help(everything="--help_all" in argv)
        return 0
    job, argv = split_options([JobConfig], argv, "hf-cifar finetune")
    config = with_restarts(RunConfig.parse(argv))
    if job.job != "hf_jobs":
        check_folder(config)
    check_models(config)
    if job.job is not None:
        return submit(job, config, argv)
    source = open_source(config.data, ["train", "validation"])

    from hf_cifar.finetune import finetune_classifier

    quieten(is_main_process())
    if config.train.seeds > 1:
        from hf_cifar.studies.seeds import finetune_seeds, render_seeds

        summary = render_seeds(finetune_seeds(config, source))
    else:
        summary = render_summary(finetune_classifier(config, source))
    if is_main_process():
        print(summary)
    return 0


def submit(job: JobConfig, config: RunConfig, argv: Sequence[str]) -> int:
    """Submit the command instead of running it here, after checking what can be checked here."""
    from hf_cifar.jobs.job import check_job

    check_job(config)
    if looks_like_path(config.data.dataset_name):
        open_source(config.data, ["train", "validation"])
    if job.job == "hf_jobs":
        from hf_cifar.jobs.hf_jobs import submit_hf_jobs

        return submit_hf_jobs(config, job)
    from hf_cifar.jobs.slurm import submit_slurm

    runs = [config]
    if config.train.seeds > 1:
        from hf_cifar.studies.seeds import runs_of_seeds

        runs = runs_of_seeds(config)
    collect = ["finetune", *argv, "--resume_from_checkpoint", "last"]
    return submit_slurm(config, argv, runs, collect, job)


def print_help(*, everything: bool) -> None:
    """Print our options, or also those of TrainingArguments, which needs torch."""
    if everything:
        quieten(True)
        print(inherited_parser(RUN_CONFIGS).format_help())
    parse(CONFIGS, ["--help"], "hf-cifar finetune", usage=USAGE, description=DESCRIPTION)


def render_summary(result: RunResult) -> str:
    """Render the summary of a run: metrics, folder, and the code that loads the model."""
    from hf_cifar.config.metrics import METRICS, shown
    from hf_cifar.evaluation.tables import render_chosen

    names = ["num_images", *shown("headline", result.metrics["validation"])]
    options = RunFolder(result.output_dir).options()
    chosen = str(options["metric_for_best_model"]).removeprefix("eval_")
    if chosen in METRICS and chosen not in names:
        names.insert(2, chosen)
    return f"""{render_chosen(result.metrics, names)}

model: {result.output_dir}
report: hf-cifar report {result.output_dir}

from transformers import pipeline
classify = pipeline("image-classification", model="{result.output_dir.as_posix()}"{_custom_code(result)})
print(classify("image.png"))"""


def _custom_code(result: RunResult) -> str:
    return ", trust_remote_code=True" if any(result.output_dir.glob("*.py")) else ""


COMMAND = Command("fine-tune a pretrained classifier", finetune)
