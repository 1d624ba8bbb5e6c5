"""`hf-cifar finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cifar.commands.command import check_images, is_main_process, quieten, wants_help
from hf_cifar.config.command_line import (
    check_option_names,
    check_values,
    check_words,
    parse_dataclasses,
    trainer_options,
)
from hf_cifar.config.fields import BOUNDS, check_bounds, field_names
from hf_cifar.config.recipes import expand_tokens
from hf_cifar.config.training import LIGHT_CONFIGS, FinetuneOptions
from hf_cifar.models.names import check_model_name
from hf_cifar.runs.folder import refuse_occupied
from hf_cifar.runs.lock import refuse_in_use
from hf_cifar.runs.resume import check_same_run, run_to_resume

if TYPE_CHECKING:
    from hf_cifar.finetune import RunResult


def finetune(argv: Sequence[str]) -> int:
    """fine-tune a pretrained classifier"""
    tokens = expand_tokens(argv)
    if wants_help(tokens):
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
    source = check_images(data, ["train", "validation"])

    from hf_cifar.config.run import RunConfig
    from hf_cifar.finetune import finetune_classifier

    config = RunConfig.parse(argv)
    quieten(config.train.process_index == 0)
    if config.train.seeds > 1:
        from hf_cifar.studies.seeds import finetune_seeds, render_seeds

        summary = render_seeds(finetune_seeds(config, source))
    else:
        summary = render_summary(finetune_classifier(config, source))
    if config.train.process_index == 0:
        print(summary)
    return 0


def render_summary(result: RunResult) -> str:
    """The table at the end of a run: figures, where the model lies, and the lines that load it."""
    from hf_cifar.config.metrics import shown
    from hf_cifar.evaluation.tables import render_chosen

    names = ("num_images", *shown("headline", result.metrics["validation"]))
    return f"""{render_chosen(result.metrics, names)}

model: {result.output_dir}
report: hf-cifar report {result.output_dir}

from transformers import pipeline
classify = pipeline("image-classification", model="{result.output_dir}"{_custom_code(result)})
print(classify("image.png"))"""


def _custom_code(result: RunResult) -> str:
    return ", trust_remote_code=True" if any(result.output_dir.glob("*.py")) else ""
