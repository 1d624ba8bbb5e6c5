"""A Trainer for image classification: transforms inside the step; loss, setting and averaging as values."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput

from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.config.data import DataConfig
from hf_cifar.data.store import ShardStore, take_batch
from hf_cifar.errors import UserError
from hf_cifar.evaluation.evaluate_metrics import compute_training_metrics
from hf_cifar.models.blocks import batch_norms, describe_trainable, has_statistics, is_frozen
from hf_cifar.models.lora import Adapter, merge_adapters
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.runs.signals import Stopped
from hf_cifar.training.arguments import own_arguments
from hf_cifar.training.augmenting import augmentation as build_augmentation
from hf_cifar.training.autotune import MEMORY_FORMATS, Setting, computing_as
from hf_cifar.training.averaging import WeightAverage
from hf_cifar.training.card import write_card
from hf_cifar.training.checkpoints import STAGING, newest_checkpoint
from hf_cifar.training.dataset import (
    lacks_labels,
    prepare_evaluation,
    prepare_inputs,
    with_placeholders,
)
from hf_cifar.training.distillation import Distillation
from hf_cifar.training.features import accepting_features, draw_view
from hf_cifar.training.guards import FiniteLoss, FittingBatch, StopSignals, worker_errors
from hf_cifar.training.losses import Loss, evaluation_loss, training_loss
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.training.optimizers import build_optimizer
from hf_cifar.training.progress import EvaluationProgress, StopAtNaN, training_progress
from hf_cifar.training.resumable import ResumableTrainer
from hf_cifar.training.sampling import shard_loader
from hf_cifar.training.saving import save_classifier
from hf_cifar.training.schedules import build_schedule
from hf_cifar.training.sharpness import SharpnessAware
from hf_cifar.training.unfreezing import GradualUnfreezing
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing


class ImageClassificationTrainer(ResumableTrainer):
    """Trains on images that are prepared once, and transformed on the device, inside the step.

    Used like a transformers Trainer. model: a transformers model, trained in place; or a timm model or
    torch.nn.Module that returns logits, which is copied to `trainer.model`. train_dataset, eval_dataset,
    and those of `evaluate` and `predict`: a datasets.Dataset, a torch data set or list of (image, label),
    (images, labels), a pandas.DataFrame, a dict of columns, or a `Split`; their classes are matched to the
    model's by name. An IterableDataset is read into memory. processing_class: the image processor; default:
    the checkpoint's. data: options for columns, unreadable images and storage.

    preprocessing: default: the image processor's, applied to evaluation batches. loss: of training; default:
    cross-entropy, smoothed as `args` say. distillation: what a teacher adds to it; default: nothing.
    augmentation: the random transform applied to training batches instead, or its options; default:
    `AugmentConfig()`. It is drawn from a generator seeded by (seed, step, batch in the step), so that a
    resumed run sees the images that an uninterrupted one would. setting: how the model computes while it
    trains; default: float32, with the model's own attention kernel. averaging: of the weights that are
    evaluated and saved. layer_decay, l1_decay, backbone_learning_rate: see
    `build_optimizer`. freeze_batch_norm: normalise with the model's own statistics, also in training;
    default: if it has any. unfreezing: gradual unfreezing of the blocks; default: all train from the start.
    sharpness: sharpness-aware minimisation; default: off. sampler: of the training images; default: each
    once per epoch, at random. shrink_batch: restart training that runs out of memory with smaller steps,
    accumulated to the same batch.
    Raises: UserError for data that do not fit the model.
    """

    optimizer: torch.optim.Optimizer | None
    compute_metrics: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        data: DataConfig | None = None,
        preprocessing: Preprocessing | None = None,
        loss: Loss | None = None,
        distillation: Distillation | None = None,
        augmentation: Augmentation | AugmentConfig | None = None,
        setting: Setting | None = None,
        averaging: WeightAverage | None = None,
        layer_decay: float = 1.0,
        l1_decay: float = 0.0,
        backbone_learning_rate: float | None = None,
        freeze_batch_norm: bool | None = None,
        unfreezing: GradualUnfreezing | None = None,
        sharpness: SharpnessAware | None = None,
        sampler: Sampler[int] | None = None,
        compute_metrics: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        shrink_batch: bool = False,
        identity: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model is a {type(model).__name__}; pass a transformers model, a timm model or a "
                "torch.nn.Module"
            )
        if data_collator is not None:
            raise UserError(
                "data_collator would not be used: images are batched already; leave it out"
            )
        args = own_arguments(args)
        shrink_batch, args.auto_find_batch_size = shrink_batch or args.auto_find_batch_size, False
        set_seed(args.seed)  # of a new head
        self.data = data or DataConfig()
        inputs = prepare_inputs(
            model, processing_class, train_dataset, eval_dataset, args, self.data, preprocessing,
        )  # fmt: skip
        self.averaging = averaging or WeightAverage(0.0)
        self.unfreezing = unfreezing or GradualUnfreezing(0.0)
        self.sharpness = sharpness or SharpnessAware(0.0)
        if self.unfreezing.epochs:  # frozen parameters get no gradients
            args.ddp_find_unused_parameters = True
        # Compile for the actual sizes: symbolic ones take minutes on some networks.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
        with warnings.catch_warnings():
            # The parent does not smooth multi-label data, and warns about it; `loss` does smooth.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible")
            super().__init__(
                inputs.model,
                args,
                take_batch,
                inputs.train,
                inputs.evaluation,
                inputs.image_processor,
                compute_metrics=compute_metrics or compute_training_metrics,
                callbacks=[self.averaging, self.unfreezing, *(callbacks or ())],
                identity=identity or inputs.identity,
                **kwargs,
            )
        # A model whose forward takes **kwargs but ignores num_items_in_batch inflates its gradients under
        # accumulation and multiple processes (huggingface/transformers#48207); a mean loss never does.
        self.model_accepts_loss_kwargs = False
        multi_label, smoothing = is_multi_label(self.model), self.args.label_smoothing_factor
        self.loss = loss or training_loss(smoothing, multi_label=multi_label)
        self.evaluation_loss = evaluation_loss(multi_label=multi_label)
        self.distillation = distillation or Distillation()
        self.preprocessing = inputs.preprocessing
        if not isinstance(augmentation, Augmentation):
            augmentation = build_augmentation(augmentation or AugmentConfig())
        self.augmentation = augmentation
        self.setting = setting or Setting()
        self.memory_format = MEMORY_FORMATS[self.setting.memory_format]
        self.layer_decay, self.l1_decay = layer_decay, l1_decay
        self.backbone_learning_rate = backbone_learning_rate
        if freeze_batch_norm is None:
            freeze_batch_norm = has_statistics(self.model)
        self.freeze_batch_norm = freeze_batch_norm
        self.sampler = sampler
        if self.args.device.type == "cpu":
            keep_freed_memory()
        self._norms = batch_norms(self.model)
        self.trainable = describe_trainable(self.model)
        self.adapter: Adapter | None = None  # after training with LoRA, once it is merged
        self._micro_batch = (-1, -1)
        self._measured: dict[str, float] | None = None  # of the model as it is
        self._row_ids: Tensor | None = None
        self.remove_callback(
            PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
        )
        self.add_callback(training_progress(bars=not self.args.disable_tqdm))
        self.add_callback(EvaluationProgress)
        self.add_callback(StopAtNaN)
        self.finite_loss = FiniteLoss(self.args.learning_rate)
        self.add_callback(self.finite_loss)
        self.fitting_batch = FittingBatch() if shrink_batch else None
        if self.fitting_batch:
            self.add_callback(self.fitting_batch)
        self.stop_signals = StopSignals()
        self.add_callback(self.stop_signals)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint folder if one is given; True selects the newest one in `args.output_dir`.

        A signal ends it after the current step, with a checkpoint of that step.

        Raises: Stopped. UserError if the loss is not finite, one image at a time does not fit into memory, or
        there is no checkpoint.
        """
        if isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = self._newest_checkpoint() if resume_from_checkpoint else None
        self._measured = None
        self.resuming.checkpoint = self.averaging.checkpoint = resume_from_checkpoint

        def train() -> TrainOutput:
            self._micro_batch, self.lr_scheduler = (-1, -1), None
            self.unfreezing.start(self.classifier)
            return super(ImageClassificationTrainer, self).train(resume_from_checkpoint, **kwargs)

        with (
            computing_as(self.setting, self.classifier),
            accepting_features(self.classifier, self.train_dataset),
            self.stop_signals.deferred(),
            worker_errors(),
        ):
            try:
                output = self.fitting_batch.train(self, train) if self.fitting_batch else train()
            except Stopped:
                if self.state.global_step not in (0, self.saved_step):
                    self._save_checkpoint(self.model, trial=None)
                raise
            finally:
                self.finish_checkpoint()
            # A signal after the last step, which already has a checkpoint.
            self.stop_signals.request.raise_if_requested()
        # The best or averaged weights are loaded by now, and the model's own kernels are restored.
        self.merge_adapters()
        return output

    def merge_adapters(self) -> None:
        """Merge LoRA adapters, if there are any, into the weights."""
        self.adapter = merge_adapters(self.classifier)

    def _newest_checkpoint(self) -> str:
        folder = self.args.output_dir
        found = newest_checkpoint(folder) if folder else None
        if found is None:
            raise UserError(
                f"no checkpoint in {folder} to resume from; leave out resume_from_checkpoint"
            )
        return str(found)

    @property
    def classifier(self) -> nn.Module:
        """The model itself, without the wrappers of distribution and compilation."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.sampler is not None:
            return self.sampler
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, ShardStore):
            return shard_loader(self.train_dataset, self.args)
        return super().get_train_dataloader()

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the number of images per epoch; the parent would count the batches of a stream."""
        if isinstance(dataloader.dataset, ShardStore):
            return len(dataloader.dataset.stream)
        return super().num_examples(dataloader)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the parent would count each pixel as a token, and list all parameters in every step."""
        return 0

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on a data set of any kind; during training, with the averaged weights."""
        if not isinstance(eval_dataset, str):  # the name of one of multiple data sets
            eval_dataset = self._stores(eval_dataset, "validation")
        with self.averaging.applied(self.classifier):
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None and not self.is_in_train:
            self._measured = metrics
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict the images of a data set of any kind; a datasets.Dataset may lack labels."""
        if not lacks_labels(test_dataset, self.data):
            return super().predict(self._stores(test_dataset, "test"), *args, **kwargs)
        unlabelled = with_placeholders(test_dataset, self.classifier, self.data)
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            output = super().predict(self._stores(unlabelled, "test"), *args, **kwargs)
        finally:
            self.compute_metrics = compute_metrics
        times = {n: v for n, v in (output.metrics or {}).items() if not n.endswith("_loss")}
        return PredictionOutput(output.predictions, None, times)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a card of what is known, see `card.py`, with the parent's arguments."""
        if self.is_world_process_zero():
            given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            write_card(self, self._measured, **given)

    def _stores(self, given: Any, name: str) -> Any:
        return prepare_evaluation(
            self.classifier, given, name, self.args, self.data, self.preprocessing
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with worker_errors():
            return super().evaluation_loop(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        self._row_ids = inputs.pop("row_ids", None)
        if inputs["pixel_values"].ndim == 3:  # features, see features.py: no norm layer runs
            generator = self._step_generator() if self.model.training else None
            inputs["pixel_values"] = draw_view(inputs["pixel_values"], generator)
            return inputs
        if self.model.training:
            # The Trainer sets all norms to training mode in every step.
            for norm in self._norms:
                if self.freeze_batch_norm or is_frozen(norm):
                    norm.eval()
            # Mixed labels are probabilities.
            pixel_values, inputs["labels"] = self.augmentation(
                inputs["pixel_values"],
                inputs["labels"],
                self.preprocessing,
                self.model.config.num_labels,
                self._step_generator(),
                self.memory_format,
            )
            inputs["teacher"] = self.distillation.outputs(
                pixel_values, self._row_ids, self.preprocessing
            )
        else:
            pixel_values = self.preprocessing(inputs["pixel_values"], self.memory_format)
        inputs["pixel_values"] = pixel_values.contiguous(memory_format=self.memory_format)
        return inputs

    def _step_generator(self) -> torch.Generator:
        """Return a generator that depends only on the seed, the step, and the number of the batch in it.

        Batches are dealt to the processes in turn. A batch has the same number, and the same images, on any
        number of processes.
        """
        step, micro = self._micro_batch
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, micro)
        batch = micro * self.args.world_size + self.args.process_index
        key = (self.args.seed, self.state.global_step, batch, 0)
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        return torch.Generator().manual_seed(seed % 2**63)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        with self.sharpness.step():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of the batch, with soft targets if it was mixed."""
        scaler = self.accelerator.scaler

        def scaled(model: nn.Module) -> Tensor:
            loss, _ = self._loss_and_logits(model, inputs, num_items_in_batch)
            return loss if scaler is None else scaler.scale(loss)

        self.sharpness.climb(self.classifier, scaled)
        loss, logits = self._loss_and_logits(model, inputs, num_items_in_batch)
        if self.model.training:
            self.finite_loss.watch(self.state.global_step + 1, loss, logits, self._row_ids)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _loss_and_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        with self.distillation.features_of(self.classifier) as features:
            outputs = model(pixel_values=inputs["pixel_values"])
        labels = inputs["labels"]
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = (self.loss if self.model.training else self.evaluation_loss)(
                outputs.logits.float(), labels
            )
        loss = self.distillation(loss, outputs.logits.float(), features, inputs.get("teacher"))
        return loss, outputs.logits

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                self.args,
                self.layer_decay,
                self.l1_decay,
                self.backbone_learning_rate,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(
                self.args, optimizer or self.optimizer, num_training_steps
            )
        return self.lr_scheduler

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Save the model; in a checkpoint, with its weights under their names in memory.

        The parent writes those of a ViT under their old names, then reads them back with strict=False:
        a resumed run, or the best checkpoint at the end, would silently lack them (transformers 5.23).
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if folder.name != STAGING:
            save_classifier(self, folder, state_dict)
            return
        self.averaging.save_trained(self.classifier, folder)
        with self.averaging.applied(self.classifier):
            self.classifier.save_pretrained(
                folder, state_dict=state_dict, save_original_format=False
            )
        self.processing_class.save_pretrained(folder)
