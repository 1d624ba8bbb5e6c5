"""The Trainer, for image classification: transforms in the step, a plain mean loss, honest weight decay."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.memory import should_reduce_batch_size
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_cifar.data.store import ShardStore, take_batch
from hf_cifar.errors import UserError
from hf_cifar.evaluation.evaluate_metrics import compute_training_metrics
from hf_cifar.models.blocks import block_depths, frozen_norms
from hf_cifar.runs.signals import Stopped, StopRequest, noted_signals
from hf_cifar.text import listed, one_line
from hf_cifar.training.checkpoints import load_state, save_state
from hf_cifar.training.features import draw_view
from hf_cifar.training.losses import binary_cross_entropy
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.training.optimizers import decay_learning_rates, decay_parameter_names
from hf_cifar.training.progress import AfterStep, StopAtNaN, TrainingLines, TrainingProgress
from hf_cifar.training.resumable import ResumableTrainer
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

# The weights that train, where a checkpoint's own are their average.
TRAINED_FILE = "trained_weights.safetensors"
# An average forgets its beginning as it grows (timm.utils.ModelEmaV3, for runs of few steps).
AVERAGE_WARMUP = 0.75


class BatchTooLarge(Exception):
    """A training step ran out of memory."""


class WatchedLoss(NamedTuple):
    """The loss of a micro-batch, its step (from 1), and what tells its rows: logits [B, K], row ids [B] or
    None."""

    step: int
    loss: Tensor
    logits: Tensor
    row_ids: Tensor | None


class ImageClassificationTrainer(ResumableTrainer):
    """Trains on uint8 batches: each is transformed on the device, inside the step.

    preprocessing: what the saved image processor does; evaluation applies just that. memory_format: of the
    batches. augmentation: what happens to a training batch instead; it draws from a generator seeded by
    (seed, step, micro-batch, rank), so that a resumed run sees the images that an undisturbed one would.
    ema_decay: of the average of the weights that is evaluated and saved in their place; 0 for none.
    shrink_batch: whether a step that runs out of memory begins the training again with smaller steps,
    accumulated to the same batch.
    """

    def __init__(
        self,
        *args: Any,
        preprocessing: Preprocessing,
        memory_format: torch.memory_format = torch.channels_last,
        augmentation: Augmentation | None = None,
        ema_decay: float = 0.0,
        shrink_batch: bool = False,
        **kwargs: Any,
    ) -> None:
        # Compiled for the sizes that come: symbolic ones take minutes on some networks.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
        with warnings.catch_warnings():
            # The parent would smooth no multi-label data, and says so; `compute_loss` does.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible")
            super().__init__(
                *args, data_collator=take_batch, compute_metrics=compute_training_metrics, **kwargs
            )
        # A model whose forward takes **kwargs but ignores num_items_in_batch inflates its gradients under
        # accumulation and several processes (huggingface/transformers#48207); a mean loss never does.
        self.model_accepts_loss_kwargs = False
        self.preprocessing = preprocessing
        self.memory_format = memory_format
        self.augmentation = augmentation
        self.ema_decay = ema_decay
        self.ema: ModelEmaV3 | None = None
        self.shrink_batch = shrink_batch
        self.stop_request = StopRequest()
        if self.args.device.type == "cpu":
            keep_freed_memory()
        self._frozen_norms = frozen_norms(self.model)
        self._micro_batch = (-1, -1)
        self._row_ids: Tensor | None = None
        self._watched: WatchedLoss | None = None
        shown = TrainingLines if self.args.disable_tqdm else TrainingProgress
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(shown)
        self.add_callback(StopAtNaN)
        self.add_callback(AfterStep(self._after_step))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The parent's. A signal ends it after the step at hand, with a checkpoint of that step.

        Raises: Stopped. UserError if the loss is no number, or one image a step is too much for memory.
        """
        with noted_signals() as self.stop_request:
            try:
                output = self._train_in_memory(*args, **kwargs)
            except Stopped:
                if self.state.global_step not in (0, self.saved_step):
                    self._save_checkpoint(self.model, trial=None)
                raise
            finally:
                self.finish_checkpoint()
            if self._watched is not None:
                self._require_finite(self._watched)  # the last one, on a GPU
            self.stop_request.obey()  # one that came after the last step, which has its checkpoint
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        if self.ema is not None and not best:
            self._classifier.load_state_dict(self.ema.module.state_dict())
        return output

    def _train_in_memory(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train in steps that fit into memory, the batch being the same."""
        if not self.shrink_batch:
            return super().train(*args, **kwargs)
        begin = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        random_state = torch.get_rng_state()
        while True:
            try:
                return super().train(*args, **kwargs)
            except BatchTooLarge as error:
                size = self.args.per_device_train_batch_size
                if size == 1:
                    raise UserError(f"out of memory with one image a step: {error}") from None
            parts = next(n for n in range(2, size + 1) if size % n == 0)
            self.args.per_device_train_batch_size = self._train_batch_size = size // parts
            self.args.gradient_accumulation_steps *= parts
            logger.warning(
                "out of memory with %d images at a time: again from the start with %d, %d times a step",
                size, size // parts, self.args.gradient_accumulation_steps,
            )  # fmt: skip
            self.model = self.model_wrapped = self._classifier
            self.model.zero_grad()
            self.model.load_state_dict(begin)
            torch.set_rng_state(random_state)
            self.optimizer = self._watched = None
            self._micro_batch = (-1, -1)

    @property
    def _classifier(self) -> nn.Module:
        """The model itself, without what distributes or compiles it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def get_train_dataloader(self) -> DataLoader:
        """The parent's; of a stream, the part that the store has for this process, not shared out again."""
        if not isinstance(self.train_dataset, ShardStore):
            return super().get_train_dataloader()
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=None,  # the store's items are batches
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,  # else the first process would read for all
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Images of an epoch; the parent would count the batches of a stream."""
        if isinstance(dataloader.dataset, ShardStore):
            return len(dataloader.dataset.stream)
        return super().num_examples(dataloader)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if self.ema_decay:
            # A checkpoint's model, which is loaded by now, is the average.
            self.ema = ModelEmaV3(
                self._classifier,
                decay=self.ema_decay,
                use_warmup=True,
                warmup_power=AVERAGE_WARMUP,
            )
            if resume_from_checkpoint is not None:
                trained = load_state(Path(resume_from_checkpoint) / TRAINED_FILE)
                self._classifier.load_state_dict(trained)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _after_step(self) -> None:
        self.finish_checkpoint(wait=False)  # an error, no later than this
        if self.ema is not None:
            self.ema.update(self._classifier, step=self.state.global_step)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Raises: Stopped, in all processes after the same step, if a signal came to one of them."""
        if self.args.world_size > 1:
            number = torch.tensor(self.stop_request.number)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._cpu_group)
            self.stop_request.number = int(number)
        self.stop_request.obey()

    @functools.cached_property
    def _cpu_group(self) -> dist.ProcessGroup:
        """All processes, talking past the GPUs, which need not wait for it."""
        return dist.new_group(backend="gloo")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        with _dead_workers_told():
            return super().get_batch_samples(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with _dead_workers_told():
            return super().evaluation_loop(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the parent takes each pixel for a token, and lists all parameters in every step."""
        return 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)
        except Exception as error:
            if self.shrink_batch and should_reduce_batch_size(error):
                raise BatchTooLarge(one_line(error)) from None
            raise

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        if self.is_in_train:
            self._stop_if_asked()
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.ema is None or not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        trained = {name: value.clone() for name, value in self._classifier.state_dict().items()}
        self._classifier.load_state_dict(self.ema.module.state_dict())
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._classifier.load_state_dict(trained)

    def _watch(self, watched: WatchedLoss) -> None:
        """Check a loss: on a CPU this one; on a GPU the one before, so that it need not be waited for."""
        before, self._watched = self._watched, watched
        checked = watched if watched.loss.device.type == "cpu" else before
        if checked is not None:
            self._require_finite(checked)

    def _require_finite(self, watched: WatchedLoss) -> None:
        """Raises: UserError that names step and rows, if a loss is no number."""
        if math.isfinite(watched.loss):
            return
        rows = ""
        if watched.row_ids is not None:
            bad = ~torch.isfinite(watched.logits).all(dim=1)
            bad = bad.to(watched.row_ids.device) if bad.any() else ...
            rows = f" in rows {listed(watched.row_ids[bad].tolist(), 10)} of train"
        raise UserError(
            f"training diverged: the loss is {watched.loss.item()} at step {watched.step}{rows}; look at "
            f"them, or start again with a lower --learning_rate than {self.args.learning_rate:g}"
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        self._row_ids = inputs.pop("row_ids", None)
        if inputs["pixel_values"].ndim == 3:  # features, see features.py: no norm is run
            generator = self._step_generator() if self.model.training else None
            inputs["pixel_values"] = draw_view(inputs["pixel_values"], generator)
            return inputs
        if self.model.training:
            for norm in self._frozen_norms:  # the parent puts all in training mode, in every step
                norm.eval()
        if self.model.training and self.augmentation is not None:
            pixel_values, inputs["targets"] = self.augmentation(
                inputs["pixel_values"],
                inputs["labels"],
                self.preprocessing,
                self.model.config.num_labels,
                self._step_generator(),
                self.memory_format,
            )
        else:
            pixel_values = self.preprocessing(inputs["pixel_values"], self.memory_format)
        inputs["pixel_values"] = pixel_values.contiguous(memory_format=self.memory_format)
        return inputs

    def _step_generator(self) -> torch.Generator:
        """A generator that depends on nothing but the seed, the step, the micro-batch and the rank."""
        step, micro = self._micro_batch
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, micro)
        key = (self.args.seed, *self._micro_batch, self.args.process_index)
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        return torch.Generator().manual_seed(seed % 2**63)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the batch, with soft targets if it was mixed; smoothed in training alone."""
        logits = model(pixel_values=inputs["pixel_values"]).logits
        targets = inputs.get("targets", inputs["labels"])
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        cross_entropy = binary_cross_entropy if inputs["labels"].ndim == 2 else F.cross_entropy
        loss = cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if self.model.training:
            step = self.state.global_step + 1
            self._watch(WatchedLoss(step, loss.detach(), logits.detach(), self._row_ids))
        return (loss, {"logits": logits}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, with its learning rate made smaller block by block towards the input."""
        if self.optimizer is None:
            super().create_optimizer(model)
            if self.args.layer_decay != 1:
                classifier = self.accelerator.unwrap_model(
                    self.model if model is None else model, keep_torch_compile=False
                )
                names = block_depths(classifier)
                depths = {p: names[name] for name, p in classifier.named_parameters()}
                decay_learning_rates(self.optimizer, depths, self.args.layer_decay)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """A checkpoint's weights, under the names that they have in memory.

        The parent writes those of a ViT under their old names, then reads them back with strict=False:
        a resumed run, or the best checkpoint at the end, would silently lack them (transformers 5.23).
        """
        if self.args.should_save:
            if self.ema is not None:
                save_state(
                    Path(output_dir or self.args.output_dir) / TRAINED_FILE,
                    self._classifier.state_dict(),
                )
                state_dict = self.ema.module.state_dict()
            self._classifier.save_pretrained(
                output_dir or self.args.output_dir,
                state_dict=state_dict,
                save_original_format=False,
            )
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)


@contextlib.contextmanager
def _dead_workers_told() -> Iterator[None]:
    """Say what torch does not: that a loader process died between putting up a batch and handing it over."""
    try:
        yield
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"DataLoader worker died: {error}") from error
