"""The Trainer, for image classification: transforms in the step, a plain mean loss, honest weight decay."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer

from hf_cifar.callbacks import StopAtNaN, TrainingLines, TrainingProgress
from hf_cifar.data.augmentation import Augmentation
from hf_cifar.data.preprocessing import Preprocessing
from hf_cifar.data.store import ShardStore, take_batch
from hf_cifar.errors import UserError
from hf_cifar.evaluation.metrics import compute_training_metrics
from hf_cifar.features import draw_view
from hf_cifar.models.layers import block_depths, eval_frozen_norms
from hf_cifar.optim import decay_learning_rates, decay_parameter_names


def binary_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy, mean over images and classes. logits, targets [N, K].

    label_smoothing: share of an image's labels that is spread evenly over all classes, as `F.cross_entropy`
    does with its one: their number stays, and an image without any stays so.
    """
    targets = targets.to(logits.dtype)
    targets = targets.lerp(targets.mean(dim=1, keepdim=True), label_smoothing)
    return F.binary_cross_entropy_with_logits(logits, targets)


class ImageClassificationTrainer(Trainer):
    """Trains on uint8 batches: each is transformed on the device, inside the step.

    preprocessing: what the saved image processor does; evaluation applies just that. memory_format:
    of the batches. augmentation:
    what happens to a training batch instead; it draws from a generator seeded by (seed, step, micro-batch,
    rank), so that a resumed run sees the images that an undisturbed one would.
    """

    def __init__(
        self,
        *args: Any,
        preprocessing: Preprocessing,
        memory_format: torch.memory_format = torch.channels_last,
        augmentation: Augmentation | None = None,
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
        self._micro_batch = (-1, -1)
        shown = TrainingLines if self.args.disable_tqdm else TrainingProgress
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(shown)
        self.add_callback(StopAtNaN)

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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        if self.model.training:
            eval_frozen_norms(self.model)
        if inputs["pixel_values"].ndim == 3:  # features, see features.py
            generator = self._step_generator() if self.model.training else None
            inputs["pixel_values"] = draw_view(inputs["pixel_values"], generator)
            return inputs
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
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(
                output_dir or self.args.output_dir,
                state_dict=state_dict,
                save_original_format=False,
            )
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that lacks weights of the model, or has others, is no checkpoint of this run."""
        wrong = [*load_result.missing_keys, *load_result.unexpected_keys]
        if wrong:
            raise UserError(
                f"the checkpoint is of another model: {len(wrong)} weights differ, first {wrong[0]}"
            )
