"""Race learning rates in short runs from the same weights, by successive halving.

Each rung of the race drops the worse half of the learning rates, by the loss on validation images. Each short
run has the schedule of the complete run, compressed.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, 2016.
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Subset
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_cifar.config.model import SCRATCH, ModelConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import Splits
from hf_cifar.data.stratify import representative_rows
from hf_cifar.errors import UserError
from hf_cifar.progress import Progress
from hf_cifar.runs.processes import is_sharded
from hf_cifar.text import listed
from hf_cifar.training.build import balanced_cross_entropy, build_trainer
from hf_cifar.training.features import accepting_features
from hf_cifar.training.guards import FiniteLoss
from hf_cifar.training.progress import EvaluationProgress, StopAtNaN, TrainingLines
from hf_cifar.training.schedules import FOLLOWS_A_METRIC, build_schedule
from hf_cifar.training.trainer import ImageClassificationTrainer

if TYPE_CHECKING:  # hf_cifar.plan imports this module
    from hf_cifar.plan import Plan

logger = logging.getLogger(__name__)
# Budget of the race, as a share of the run's training images. An image that is only evaluated, without a
# backward pass, counts as a third.
BUDGET, FORWARD = 0.1, 1 / 3
# Numbers of learning rates that may race, and the factor between neighbours, around the default of
# optimiser and model family. Fewer rates are further apart, because results differ little within a factor of
# 3 of the best rate.
FACTORS = {9: 2.5, 7: 3.0, 5: 4.0, 3: 4.0}
# Without a default, this many learning rates race around a guess.
WIDE_FACTORS, GUESS = {9: 5.0}, 3e-3
# Fewest steps of the first rung. In 20 steps, two of five networks here learned nothing, and one preferred a
# learning rate that is much too low for the run. Without a default, an uncertain choice is better than none.
MIN_STEPS, MIN_STEPS_WITHOUT_DEFAULT = 40, 10
# For new weights, the best learning rate falls with the length of a run, by this power of the number of
# steps, so a short run uses a higher one than the run that it imitates. Bjorck et al., Scaling Optimal LR
# Across Token Horizons, 2024, find 0.32 for language models; 0.2 fitted two small runs here. It misled a race
# of EfficientNet-Lite0 with a fitted head, where the best rate of 100 steps is not above that of 800.
HORIZON = 0.2
# Validation images that rank the rates: as many as this share of the budget pays for, within these bounds.
JUDGING_SHARE, JUDGING_IMAGES = 0.2, (50, 500)


class Rung(NamedTuple):
    """A round of the race: the number of learning rates, and the steps of each."""

    num_rates: int
    steps: int


@dataclass(frozen=True)
class RungResult:
    """A finished rung: the validation loss of each learning rate, infinite if training diverged."""

    steps: int
    losses: dict[float, float]

    def __str__(self) -> str:
        losses = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in self.losses.items())
        return f"validation loss after {self.steps} steps ({losses})"

    def ranking(self, center: float) -> list[float]:
        """Return the learning rates, best first. If losses differ by less than about 1%, the rate nearest to
        `center` comes first."""

        def key(rate: float) -> tuple[float, float]:
            loss = self.losses[rate]
            percent = round(100 * math.log(max(loss, 1e-9))) if math.isfinite(loss) else math.inf
            return percent, abs(math.log(rate / center))

        return sorted(self.losses, key=key)


@dataclass(frozen=True)
class Race:
    """A finished race. center: the middle learning rate. share: the cost, as a share of the run's training.
    num_images: number of validation images that ranked the rates."""

    rungs: list[RungResult]
    center: float
    share: float
    num_images: int

    @property
    def winner(self) -> float:
        """The best learning rate of the last rung."""
        return self.rungs[-1].ranking(self.center)[0]

    @property
    def facts(self) -> dict[str, Any]:
        """The race as plain values; the loss is None if training diverged."""
        rungs = [
            {
                "steps": rung.steps,
                "rates": list(rung.losses),
                "losses": [x if math.isfinite(x) else None for x in rung.losses.values()],
            }
            for rung in self.rungs
        ]
        return {
            "learning_rate": self.winner, "rungs": rungs, "num_images": self.num_images,
            "share": round(self.share, 4),
        }  # fmt: skip


def check_race(config: RunConfig) -> None:
    """Raises: UserError for options that rule out a race."""
    if config.train.learning_rate != "auto":
        return
    reasons = {
        "--streaming, because each short run would read the stream again": config.data.streaming,
        "FSDP or DeepSpeed": is_sharded(),
        "--unfreeze_epochs, because short runs end before most blocks train": (
            config.train.unfreeze_epochs > 0
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"--learning_rate auto cannot be combined with {reason}; pass a number")


def rungs_of(num_rates: int, steps: int) -> list[Rung]:
    """Return the rungs of a race: after each, half of the learning rates, rounded down, stay for twice as
    many steps, until one is left."""
    rungs = []
    while num_rates > 1:
        rungs.append(Rung(num_rates, steps))
        num_rates, steps = num_rates // 2, 2 * steps
    return rungs


def cost(rungs: list[Rung], batch: int, num_images: int) -> float:
    """Return the cost of a race in training images. batch: images per step; num_images: per evaluation."""
    return sum(each.num_rates * (each.steps * batch + FORWARD * num_images) for each in rungs)


def affordable_race(
    run_steps: int,
    batch: int,
    num_validation: int,
    fields: Iterable[int] = FACTORS,
    min_steps: int = MIN_STEPS,
) -> tuple[list[Rung], int]:
    """Return the rungs of the largest of `fields` that costs at most a tenth of the run, with as many steps
    as that allows, and the number of validation images per evaluation; no rungs if all are too expensive.
    min_steps: of the first rung."""
    budget = BUDGET * run_steps * batch
    for field in sorted(fields, reverse=True):
        image = cost(rungs_of(field, 0), batch, 1)  # in all evaluations
        step = cost(rungs_of(field, 1), batch, 0)  # one in the first rung, more in the others
        fewest, most = JUDGING_IMAGES
        num_images = min(num_validation, most, max(fewest, int(JUDGING_SHARE * budget / image)))
        steps = math.floor((budget - num_images * image) / step)
        if steps >= min_steps:
            return rungs_of(field, steps), num_images
    return [], 0


def rates_around(center: float, count: int, factor: float) -> list[float]:
    """Return `count` learning rates in ascending order, each `factor` times the previous, to three digits."""
    exponents = range(-(count // 2), count - count // 2)
    return [float(f"{center * factor**exponent:.3g}") for exponent in exponents]


def race_rates(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    splits: Splits,
    plan: Plan,
    default: float | None,
) -> Race | None:
    """Race learning rates, and leave the model unchanged; return None if the run is too short for a race.

    plan: with everything settled but the learning rate. default: of the optimiser and model family, or None.
    All processes take part, and the first one decides.

    Raises: UserError if the run is too short and there is no default; Stopped.
    """
    check_race(plan.config)
    center, factors, min_steps = default or GUESS, FACTORS, MIN_STEPS
    if default is None:
        factors, min_steps = WIDE_FACTORS, MIN_STEPS_WITHOUT_DEFAULT
    with tempfile.TemporaryDirectory(prefix="hf_cifar-race-") as folder, unchanged(model):
        short = replace(plan, config=short_run(plan.config, folder, center))
        trainer = build_trainer(model, image_processor, splits, short, Sprinter)
        assert isinstance(trainer, Sprinter)
        trainer.evaluation_loss = balanced_cross_entropy(model, splits.train, plan.config.train)
        trainer.horizon = horizon_of(plan.config.model)
        batch = trainer.get_total_train_batch_size(trainer.args)
        labels = splits.validation.labels
        rungs, num_images = affordable_race(
            trainer.run_steps, batch, len(labels), factors, min_steps
        )
        if not rungs:
            explain_no_race(trainer.run_steps, min(factors), min_steps, default)
            return None
        trainer.judged_by(representative_rows(labels, num_images, plan.config.train.seed).tolist())
        share = cost(rungs, batch, num_images) / (trainer.run_steps * batch)
        count = rungs[0].num_rates
        rates = rates_around(center, count, factors[count])
        announce(rates, rungs, share, num_images, trainer.boost(rungs[0].steps))
        results: list[RungResult] = []
        for rung in rungs:
            if results:
                rates = sorted(results[-1].ranking(center)[: rung.num_rates])
            results.append(RungResult(rung.steps, trainer.losses_of(rates, rung.steps)))
            logger.info("learning rate: %s", results[-1])
    race = Race(results, center, share, num_images)
    if not any(map(math.isfinite, results[-1].losses.values())):
        raise UserError(
            f"--learning_rate auto: training diverged at {listed(f'{r:g}' for r in results[0].losses)}; pass "
            "a lower learning rate as a number"
        )
    logger.info("learning rate: %g won the race", race.winner)
    return race


def explain_no_race(run_steps: int, few: int, min_steps: int, default: float | None) -> None:
    """Log why the default learning rate is used. Raises: UserError if there is none."""
    reason = f"a tenth of {run_steps:,} steps is too short to race {few} rates for {min_steps} steps each"
    if default is None:
        raise UserError(
            f"--learning_rate auto: {reason}, and there is no default learning rate; pass a number"
        )
    logger.info("learning rate: the default %g, because %s", default, reason)


def horizon_of(model: ModelConfig) -> float:
    """Return the power of the length of a run with which its best learning rate falls, see HORIZON."""
    new = model.model_name_or_path.startswith(SCRATCH) or model.freeze == "backbone"
    return HORIZON if new else 0.0


def announce(
    rates: list[float], rungs: list[Rung], share: float, num_images: int, factor: float
) -> None:
    """Log learning rates, rungs and cost before the race. factor: of the first rung, see `Sprinter.boost`."""
    shown = ", then ".join(f"{each.num_rates} for {each.steps} steps" for each in rungs)
    fewer = "" if len(rates) == max(FACTORS) else f" (a longer run would race {max(FACTORS)})"
    logger.info(
        "learning rate: racing %d rates from %g to %g%s: %s, ranked by the loss on %d validation images; the "
        "race costs %.1f%% of the training%s",
        len(rates), rates[0], rates[-1], fewer, shown, num_images, 100 * share,
        f"; short runs use higher rates, {factor:.1f} times in the first rung" if factor > 1 else "",
    )  # fmt: skip


def short_run(config: RunConfig, folder: str, rate: float) -> RunConfig:
    """Return the options of the short runs: those of the run, without evaluation, saving and reporting.

    A schedule that follows a metric stays at its peak after the warm-up.
    """
    follows = config.train.lr_scheduler_type in FOLLOWS_A_METRIC
    peak = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None} if follows else {}
    return config.as_trial(folder).with_training(
        **peak, learning_rate=rate, torch_compile=False, disable_tqdm=True
    )


class Sprinter(ImageClassificationTrainer):
    """A Trainer of short runs that start from the same weights and save nothing.

    run_steps: steps of the complete run, whose schedule each short run compresses. horizon: see HORIZON.
    """

    eval_dataset: Any
    horizon = HORIZON

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A loss that is not finite is handled at the evaluation, in all processes alike: the rate is out.
        self.compute_metrics = None
        self.finite_loss = Unwatched(self.args.learning_rate)
        for callback in [*self.callback_handler.callbacks]:
            if isinstance(callback, (StopAtNaN, FiniteLoss, TrainingLines, EvaluationProgress)):
                self.remove_callback(callback)
        *_, self.run_steps = self.set_initial_training_values(
            self.args, self.get_train_dataloader()
        )

    def boost(self, steps: int) -> float:
        """Return the factor by which a short run of `steps` steps raises the learning rate."""
        return (self.run_steps / steps) ** self.horizon

    def judged_by(self, rows: list[int]) -> None:
        """Evaluate only on these rows of the validation images."""
        self.eval_dataset = Subset(self.eval_dataset, rows)

    def losses_of(self, rates: list[float], steps: int) -> dict[float, float]:
        """Train with each learning rate for `steps` steps; return the validation losses."""
        found = {}
        with Progress(f"racing {len(rates)} learning rates", len(rates) * steps, "steps") as shown:
            progress = StepProgress(shown)
            self.add_callback(progress)
            for rate in rates:
                found[rate] = self.loss_of(rate, steps)
            self.remove_callback(progress)
        return found

    def loss_of(self, rate: float, steps: int) -> float:
        """Train for `steps` steps to imitate the run at a learning rate; return the validation loss, or
        infinity."""
        self.args.max_steps = steps
        self.args.learning_rate = rate * self.boost(steps)
        model = self.classifier
        with unchanged(model):
            set_seed(self.args.seed)  # the same batches, augmentation and dropout for each rate
            self.train()
            with accepting_features(model, self.train_dataset):
                loss = [self.evaluate()["eval_loss"]]
            self.optimizer = self.lr_scheduler = None
            self.model = self.model_wrapped = model
            self.accelerator.free_memory()
            gc.collect()  # or hooks of the old DistributedDataParallel stay on the model
        if self.args.world_size > 1:
            broadcast_object_list(loss)
        return loss[0] if math.isfinite(loss[0]) else math.inf

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = compressed_schedule(
                self.args, optimizer or self.optimizer, num_training_steps, self.run_steps
            )
        return self.lr_scheduler

    def merge_adapters(self) -> None:
        """Do nothing: the next short run trains the adapters again."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Do nothing: a signal ends the race without a checkpoint."""


class Unwatched(FiniteLoss):
    """Lets training continue with a loss that is not finite."""

    def watch(self, *args: Any) -> None:
        """Do nothing."""


class StepProgress(TrainerCallback):
    """Counts the steps of all short runs together."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.shown.update()


def compressed_schedule(
    args: TrainingArguments, optimizer: Optimizer, num_steps: int, run_steps: int
) -> LRScheduler:
    """Return the schedule of `args` for `run_steps` steps, warm-up included, compressed to `num_steps` steps.

    Each step has the learning rate of the middle of the steps that it replaces.
    """
    peak = args.learning_rate
    imitated = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule, shares = build_schedule(args, imitated, run_steps), []
    for _ in range(run_steps):
        shares.append(imitated.param_groups[0]["lr"] / peak)
        imitated.step()
        schedule.step()
    return LambdaLR(
        optimizer,
        lambda step: shares[min(run_steps - 1, int((step + 0.5) * run_steps / num_steps))],
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the weights, buffers and mode of a model at the end of the block, bit for bit."""
    tensors = [*model.parameters(), *model.buffers()]
    before, training = [each.detach().clone() for each in tensors], model.training
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        model.zero_grad(set_to_none=True)
        model.train(training)
