"""Options of training, evaluation, checkpoints and output.

Options of transformers' TrainingArguments keep their names and meanings. Declared here are those with another
default, with bounds, or settled by the plan; all others also work, see `RunConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_cifar.config.fields import check_fields, option, refuse_both_formats
from hf_cifar.config.metrics import BEST_METRICS
from hf_cifar.errors import UserError

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad",
    "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw",
    "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam",
    "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    # Those of timm. Its other names are these with caution=true or corrected_weight_decay=true.
    "adabelief", "adadelta", "adam", "adamax", "adamp", "adamuon", "adamw", "adan", "adanw",
    "adopt", "adoptw", "kron", "kronw", "lamb", "lambw", "laprop", "larc", "lars", "lion", "madgrad",
    "madgradw", "mars", "momentum", "muon", "nadam", "nadamuon", "nadamw", "nesterov", "nesterovw",
    "nlarc", "nlars", "nmuon", "novograd", "radabelief", "radam", "radamw", "rmsproptf",
    "sgdp", "sgdw",
]  # fmt: skip
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy", "exponential", "step", "multistep", "inverse_time", "one_cycle",
]  # fmt: skip
# Options of a run without distillation.
WITHOUT_TEACHER = {
    "teacher": None, "distillation_weight": 0.9, "distillation_temperature": 8.0, "feature_hint": 0.0,
}  # fmt: skip
SAME_FOLDER = ("true", "last", "latest")  # of --resume_from_checkpoint


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, when to evaluate and save, and where everything goes. None: chosen by `plan_run`."""

    _argument_group_name = "training"

    num_train_epochs: float | None = option(
        None,
        "Passes over the training images; default: 3, or up to 30 for few images, to reach 500 steps, or "
        "100 if only the head trains.",
        low=1e-6, high=1e6, may_change=True,
    )  # fmt: skip
    max_steps: int = option(-1, "Total steps instead of epochs; -1 for epochs.", may_change=True)
    per_device_train_batch_size: int = option(32, "Training images per batch and process.", low=1)
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients are accumulated into one step.", low=1
    )
    auto_find_batch_size: bool = option(
        False, "If memory runs out, restart with the same batch in smaller parts."
    )
    learning_rate: float | Literal["auto"] | None = option(
        None,
        "Peak learning rate; default: by optimiser and model family, scaled to the batch; auto: "
        "chosen in a race of short runs, which costs at most a tenth of the training.",
        low=1e-12, high=1e3,
    )  # fmt: skip
    lr_scheduler_type: Schedule = option("linear", "Learning rate schedule after the warm-up.")  # noqa: RUF009
    lr_scheduler_kwargs: dict[str, Any] | None = option(  # noqa: RUF009
        None, "Arguments of the schedule."
    )
    warmup_steps: float = option(
        0.1, "Warm-up, in steps, or as a share of all steps if below 1.", low=0
    )
    optim: Optimizer = option(  # noqa: RUF009
        "adamw_torch_fused", "Optimiser, by its name in transformers or timm."
    )
    optim_args: str | None = option(
        None, "Arguments of the optimiser, for example momentum=0.9,nesterov=true."
    )
    weight_decay: float | None = option(
        None,
        "Weight decay, applied to weight matrices and kernels only; default: 0.05, or 0.0005 for SGD and "
        "other optimisers that add it to the gradient.",
        low=0, high=1e3,
    )  # fmt: skip
    l1_decay: float = option(
        0.0,
        "L1 decay, applied to weight matrices and kernels only: each step moves them this times the rate "
        "towards 0.",
        low=0, high=1e3,
    )  # fmt: skip
    layer_decay: float = option(
        1.0,
        "Layer-wise decay: each block's rate is this factor times that of the next one towards the head; 1 "
        "turns it off.",
        low=0.01, high=1,
    )  # fmt: skip
    backbone_learning_rate: float | None = option(
        None,
        "Peak learning rate of all layers but the head; default: --learning_rate. --layer_decay scales it.",
        low=1e-12, high=1e3,
    )  # fmt: skip
    unfreeze_epochs: float = option(
        0.0,
        "Gradual unfreezing: epochs until the next stage or block starts to train. The head trains alone "
        "first, and the layers before the blocks start last; 0 turns it off.",
        low=0, high=1e6,
    )  # fmt: skip
    sam_rho: float = option(
        0.0,
        "Sharpness-aware minimisation: compute gradients at this L2 distance uphill from the weights, for "
        "example 0.05; each step takes twice as long; 0 turns it off.",
        low=0, high=100,
    )  # fmt: skip
    max_grad_norm: float | None = option(
        None, "Norm to which gradients are clipped, 0 for none; default: 1.", low=0, high=1e6
    )
    loss: Literal["cross_entropy", "focal"] = option(
        "cross_entropy",
        "Training loss; focal: images that are already right count little (gamma 2).",
    )
    class_balance: Literal[
        "none", "oversample", "undersample", "weights", "effective", "logit_adjustment", "post_hoc"
    ] = option(
        "none",
        "For classes of very different sizes. oversample, undersample: draw each as often as the largest or "
        "smallest one; weights, effective: weight them in the loss, by their size or effective number; "
        "logit_adjustment: add the log of their shares to the logits in the loss; post_hoc: subtract it from "
        "the biases of the trained head, unless that lowers the balanced accuracy on validation.",
    )
    clean_labels: Literal["none", "drop"] = option(
        "none",
        "drop: before training, leave out training images whose labels are probably wrong, by confident "
        "learning on out-of-fold predictions; validation and test keep all images.",
    )
    teacher: str | None = option(
        None,
        "Teacher for distillation: folder or Hub id of a model fine-tuned on these classes, or on some of "
        "them. The model also learns its probabilities for each training image.",
        public=False,
    )
    distillation_weight: float = option(
        WITHOUT_TEACHER["distillation_weight"],
        "With --teacher: weight of the distillation loss; the loss of the labels has the rest.",
        low=0,
        high=1,
    )
    distillation_temperature: float = option(
        WITHOUT_TEACHER["distillation_temperature"],
        "With --teacher: temperature of both models' probabilities.",
        low=0.1,
        high=100,
    )
    feature_hint: float = option(
        0.0,
        "With --teacher: weight of a loss that matches the similarities between the images of a batch, by "
        "the features before the head, to those of the teacher; 0 turns it off.",
        low=0,
        high=1e6,
    )
    label_smoothing_factor: float = option(
        0.1, "Label smoothing, in the training loss only.", low=0, high=0.999
    )
    ema_decay: float = option(
        0.0,
        "Evaluate and save an exponential moving average of the weights, for example 0.999; 0 turns it off.",
        low=0, high=0.999999,
    )  # fmt: skip
    early_stopping_patience: int | None = option(
        None,
        "Stop after this many evaluations without a better metric.",
        low=1, high=10**6, may_change=True,
    )  # fmt: skip
    seed: int = option(
        42, "Seed of training: new weights, order, augmentation.", low=0, high=2**32 - 1
    )
    seeds: int = option(
        1,
        "Number of runs, with seeds SEED, SEED + 1, ..., in OUTPUT_DIR/seed-SEED; mean and spread go to "
        "OUTPUT_DIR/seeds.json.",
        low=1, high=1000, saved=False,
    )  # fmt: skip
    feature_views: int = option(
        1,
        "With --freeze backbone: compute the head's inputs once, for this many views of each image; "
        "0: recompute them in each step.",
        low=0, high=1000,
    )  # fmt: skip
    head_solver: Literal["optimizer", "lbfgs"] = option(
        "optimizer",
        "With --freeze backbone: train the head in epochs, or solve for it directly, with the L2 penalty "
        "that is best on validation.",
    )

    probe_images: int = option(
        5000,
        "Before a pretrained model trains, fit its new head to the features of up to this many training "
        "images; 0: start with a random head.",
        low=0, high=10**6,
    )  # fmt: skip
    freeze_batch_norm: bool | None = option(
        None,
        "Normalise with the checkpoint's statistics, also in training, instead of the batch's; default: true "
        "for a pretrained model.",
    )

    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Number format of training; auto times a few steps of each, and keeps the fastest correct one.",
        group="computing",
        may_change=True,
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = option(
        "auto",
        "Memory format of weights and images; auto: chosen by --precision auto.",
        may_change=True,
    )
    attention: Literal["auto", "fused", "eager"] = option(
        "auto",
        "fused: the model's own attention kernel; eager: plain matrix products; auto: chosen by "
        "--precision auto.",
        may_change=True,
    )
    bf16: bool = option(False, "Shorthand for --precision bf16.", may_change=True, saved=False)
    fp16: bool = option(False, "Shorthand for --precision fp16.", may_change=True, saved=False)
    torch_compile: bool = option(
        False, "Compile the model; --precision auto tries it in long runs.", may_change=True
    )
    use_cpu: bool = option(False, "Compute on the CPU even if there is a GPU.", may_change=True)
    dataloader_num_workers: int | None = option(
        None,
        "Loader processes; default: 0 for images in memory, else one per core.",
        low=0, high=1024, may_change=True,
    )  # fmt: skip

    eval_strategy: Literal["no", "steps", "epoch"] | None = option(
        None,
        "When to evaluate on validation; default: with each checkpoint, or each epoch.",
        group="evaluation and checkpoints",
        may_change=True,
    )
    eval_steps: float | None = option(
        None, "Steps between evaluations; default: --save_steps.", low=0, may_change=True
    )
    per_device_eval_batch_size: int = option(
        64, "Evaluation images per step and process.", low=1, may_change=True
    )
    do_predict: bool = option(False, "At the end, evaluate on test too.", may_change=True)
    calibrate: bool = option(
        True,
        "At the end, fit a temperature on validation and fold it into the head; for multi-label data, fit a "
        "threshold for each class.",
    )
    reject: float | None = option(
        None,
        "Share of validation images to keep: fit thresholds on confidence and on distance from the training "
        "images, so that hf-cifar predict and serve answer 'unknown' for images of none of the classes; 0.95 "
        "if no value is given.",
        low=0.5, high=0.999, bare="0.95",
    )  # fmt: skip
    check_leakage: bool = option(
        False,
        "Before training, list test images with an exact or near duplicate in train or validation.",
        may_change=True,
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = option(
        None,
        "When to save a checkpoint; default: with each evaluation, or each epoch.",
        may_change=True,
    )
    save_steps: float | None = option(
        None, "Steps between checkpoints; default: --eval_steps, or 500.", low=0, may_change=True
    )
    save_total_limit: int | None = option(
        2, "Checkpoints kept; the best one is always among them.", low=1, may_change=True
    )
    load_best_model_at_end: bool | None = option(
        None,
        "End with the checkpoint that performed best on validation; default: true if each evaluation "
        "has one.",
        may_change=True,
    )
    metric_for_best_model: str | None = option(
        None,
        "Validation metric that chooses the best checkpoint; default: accuracy, balanced_accuracy with "
        "--class_balance, or average_precision_macro (mAP) for multi-label data.",
        may_change=True,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Resume from a checkpoint: last, or a checkpoint's folder.",
        may_change=True, saved=False,
    )  # fmt: skip

    output_dir: str = option(
        "outputs/finetuned",
        "Folder of the run: model, metrics, checkpoints.",
        group="output",
        may_change=True,
        public=False,
    )
    logging_steps: float = option(
        50, "Steps between log lines of the training loss.", low=0, may_change=True
    )
    report_to: list[str] | None = option(  # noqa: RUF009
        None, "Trackers, for example tensorboard or trackio.", may_change=True
    )
    run_name: str | None = option(
        None, "Name in the trackers; default: --output_dir.", may_change=True, public=False
    )
    disable_tqdm: bool | None = option(
        None,
        "Log lines instead of progress bars; default: true unless on a terminal.",
        may_change=True,
        saved=False,
    )
    push_to_hub: bool = option(
        False, "Push the finished run to the Hub.", may_change=True, public=False
    )
    hub_model_id: str | None = option(
        None, "Repository; default: named after --output_dir.", may_change=True, public=False
    )
    hub_private_repo: bool = option(
        True, "Make a new repository private.", may_change=True, public=False
    )
    hub_revision: str | None = option(
        None, "Branch to push to; default: main.", may_change=True, public=False
    )
    hub_token: str | None = option(
        None,
        "Token; default: the stored one. HF_TOKEN is safer: other users of the machine can see command "
        "lines.",
        may_change=True, saved=False, public=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        refuse_both_formats(self)
        for name in ("bf16", "fp16"):
            if getattr(self, name) and self.precision not in ("auto", name):
                raise UserError(
                    f"--{name} and --precision {self.precision} differ; pass one of them"
                )
        if self.learning_rate == "auto" and self.head_solver == "lbfgs":
            raise UserError(
                "--head_solver lbfgs has no learning rate; leave out --learning_rate auto"
            )
        for name, default in WITHOUT_TEACHER.items():
            if self.teacher is None and getattr(self, name) != default:
                raise UserError(f"--{name} needs a --teacher; pass one, or leave it out")
        metric = (self.metric_for_best_model or "accuracy").removeprefix("eval_")
        if metric not in BEST_METRICS:
            raise UserError(
                f"--metric_for_best_model is {metric}; it must be one of {', '.join(BEST_METRICS)}"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise UserError(
                "--early_stopping_patience needs evaluations; leave out --eval_strategy no"
            )

    @property
    def resumes(self) -> bool:
        """Return True if the options resume a run."""
        return (self.resume_from_checkpoint or "no").lower() not in ("false", "no")

    @property
    def resumes_last(self) -> bool:
        """Return True if the run resumes from the last checkpoint in its own folder."""
        return (self.resume_from_checkpoint or "").lower() in SAME_FOLDER

    @property
    def requested_checkpoint(self) -> Path | None:
        """Return the checkpoint folder that the options name, None for the last one or a new run."""
        if self.resume_from_checkpoint is None or self.resumes_last or not self.resumes:
            return None
        return Path(self.resume_from_checkpoint)
