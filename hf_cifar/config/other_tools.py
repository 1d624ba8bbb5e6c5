"""Options of other tools, and what to pass here instead of them.

Covers run_image_classification.py of any age, older versions of transformers, timm's train.py, torchvision's
references, Ultralytics, Keras, fastai and Lightning. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# What to pass here, and the names that other tools have for it. A command uses an entry if it has all options
# that the entry names; finetune has them all, those of TrainingArguments included.
INSTEAD = {
    "--learning_rate": "lr lr0 base_lr blr max_lr learn_rate init_lr lr_base eta",
    "--dataset_name": "data dataset data_path dataset_path dataset_id data_name data_set ds dset",
    "--dataset_name with the folder that holds the splits or classes":
        "data_dir dataset_dir datadir data_root data_folder image_dir image_folder img_dir images "
        "input_dir root imagefolder directory dataset_root",
    "--dataset_name with the folder above, which holds train/, validation/ and test/":
        "train_dir train_data train_path train_folder traindir train_data_dir validation_dir "
        "val_dir valid_dir eval_dir test_dir val_data val_path validation_data "
        "validation_data_dir valdir eval_data test_data test_path valid_data",
    "--dataset_name with a folder of class folders, or of images beside one table of file "
    "names and labels":
        "train_file validation_file test_file train_csv val_csv csv labels_csv csv_file "
        "annotations metadata_file",
    "--dataset_config_name": "dataset_config data_config subset config_id",
    "--image_column_name": "image_column image_key input_key image_col input_column",
    "--label_column_name":
        "label_column label_key target_key label_col target_column class_column labels_column",
    "--train_val_split":
        "validation_split val_split valid_pct val_size val_fraction val_ratio valid_size "
        "test_size split_ratio val_percent",
    "--max_train_samples": "train_num_samples num_train_samples train_subset limit_train_batches",
    "--max_eval_samples":
        "val_num_samples max_val_samples max_predict_samples max_test_samples limit_val_batches",
    "--model_name_or_path":
        "model model_name arch architecture backbone model_id model_path weights pretrained_model "
        "pretrained_model_name_or_path base_model net network pretrained_path model_arch encoder "
        "a model_type model_dir",
    "--model_name_or_path to train from these weights, or --resume_from_checkpoint to "
    "continue a run":
        "checkpoint ckpt checkpoint_path ckpt_path initial_checkpoint init_checkpoint load "
        "load_checkpoint load_from pretrained_weights finetune resume_weights",
    "--model_revision": "revision",
    "--image_size":
        "img_size imgsz imsize im_size size image_resolution resolution input_resolution img "
        "train_crop_size crop_size img_height img_width train_size resize crop",
    "--image_size with one number; images are square": "input_size target_size input_shape",
    "--resume_from_checkpoint":
        "resume resume_from resume_path resume_training continue continue_from c",
    "--num_train_epochs":
        "epochs num_epochs n_epochs nb_epochs max_epochs epoch nepochs ep num_epoch e max_epoch "
        "train_epochs",
    "--max_steps":
        "max_train_steps num_steps num_train_steps total_steps steps iterations max_iter "
        "max_iters num_iterations",
    "--per_device_train_batch_size":
        "batch_size bs batch b train_batch_size per_gpu_train_batch_size per_device_batch_size "
        "batch_per_gpu batchsize train_bs mini_batch_size micro_batch_size",
    "--per_device_eval_batch_size":
        "eval_batch_size val_batch_size validation_batch_size test_batch_size "
        "per_gpu_eval_batch_size batch_size bs batch b vb eval_bs",
    "--gradient_accumulation_steps":
        "grad_accum_steps accum_iter accumulate accumulate_grad_batches grad_accum "
        "gradient_accumulation accumulation_steps update_freq",
    "--gradient_checkpointing": "grad_checkpointing use_checkpoint checkpointing",
    "--optim": "opt optimizer optimiser optim_name",
    "--optim adafactor": "adafactor",
    "--optim_args, for example momentum=0.9":
        "momentum opt_kwargs optimizer_kwargs sgd_momentum nesterov",
    "--adam_epsilon": "opt_eps eps epsilon",
    "--adam_beta1 and --adam_beta2": "opt_betas betas",
    "--weight_decay": "wd decay l2",
    "--lr_scheduler_type": "sched scheduler lr_scheduler lr_schedule schedule lr_policy lr_sched",
    "--lr_scheduler_type cosine": "cos_lr cosine",
    '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs \'{"min_lr": X}\'':
        "min_lr lr_min eta_min lrf final_lr",
    "--warmup_steps with a share of all steps, for example 0.1":
        "warmup_ratio warmup_epochs lr_warmup_epochs warmup warmup_proportion pct_start "
        "warmup_fraction",
    "--warmup_steps":
        "num_warmup_steps lr_warmup_steps warmup_updates warmup_iters warmup_iterations",
    "--max_grad_norm":
        "clip_grad clip_grad_norm grad_clip gradient_clip_val gradient_clip_norm clipnorm "
        "clip_norm max_norm",
    "--label_smoothing_factor": "smoothing label_smoothing",
    "--ema_decay, for example 0.999": "ema model_ema model_ema_decay use_ema",
    "--early_stopping_patience": "patience early_stopping early_stop early_stop_patience",
    "--backbone_learning_rate": "backbone_lr lr_backbone encoder_lr",
    "--sam_rho, for example 0.05": "sam rho use_sam",
    "--dropout": "drop drop_rate",
    "--drop_path": "drop_path_rate stochastic_depth drop_connect",
    "--precision bf16 (auto picks the fastest)":
        "amp use_amp amp_dtype mixed_precision half half_precision model_dtype dtype torch_dtype "
        "use_fp16 autocast",
    "--precision fp16": "fp16_backend half_precision_backend fp16_opt_level apex",
    "--precision fp32": "no_amp fp32 full_precision",
    "--memory_format channels_last": "channels_last",
    "--attention": "attn_implementation attn",
    "--torch_compile": "compile torchdynamo",
    "--use_cpu": "no_cuda cpu cpu_only",
    "--use_cpu for the CPU, or set CUDA_VISIBLE_DEVICES for a GPU":
        "device gpu gpus gpu_id gpu_ids accelerator devices cuda use_cuda use_gpu use_mps_device "
        "num_gpus n_gpu",
    "--dataloader_num_workers":
        "workers num_workers nworkers j n_workers preprocessing_num_workers num_proc nthreads "
        "n_cpu loader_workers",
    "--dataloader_pin_memory": "pin_mem pin_memory",
    "--freeze": "freeze_layers unfreeze",
    "--freeze backbone":
        "freeze_backbone freeze_encoder linear_probe freeze_base freeze_feature_extractor "
        "freeze_base_model linear_probing feature_extract",
    "--lora_rank": "lora_r lora use_lora use_peft lora_alpha",
    "--eval_strategy":
        "evaluation_strategy eval_freq eval_interval val_interval evaluate_during_training "
        "check_val_every_n_epoch eval_every val_freq",
    "--logging_steps":
        "log_interval print_freq log_freq log_every_n_steps logging_interval log_every "
        "verbose_step log_steps",
    "--save_steps":
        "checkpointing_steps save_freq save_period save_interval save_every checkpoint_interval "
        "recovery_interval checkpoint_freq",
    "--save_total_limit": "checkpoint_hist save_top_k max_checkpoints keep_checkpoints",
    "--metric_for_best_model": "eval_metric monitor metric best_metric metrics",
    "--do_predict": "do_test test evaluate_test eval_test",
    "--output_dir":
        "output out out_dir outdir save_dir save_path log_dir logdir work_dir result_dir "
        "results_dir experiment_dir exp_dir default_root_dir output_path output_folder "
        "checkpoint_dir model_save_path o",
    "--output_dir with another folder; a run never overwrites a finished one "
    "(--resume_from_checkpoint last continues it)":
        "overwrite_output_dir overwrite exist_ok force",
    "--report_to tensorboard, and set TENSORBOARD_LOGGING_DIR for another folder":
        "logging_dir tensorboard_dir",
    "--report_to":
        "with_tracking tracker logger log_wandb use_wandb wandb tensorboard use_tensorboard",
    "--run_name": "experiment name exp_name experiment_name wandb_name run",
    "--project": "wandb_project project_name",
    "--disable_tqdm": "no_progress_bar silent quiet no_progress",
    "--hub_model_id":
        "push_to_hub_model_id push_to_hub_organization repo_id hub_name repo_name repo",
    "--hub_token, or run: hf auth login":
        "push_to_hub_token use_auth_token token auth_token hf_token api_key",
    "--trust_remote_code": "dataset_trust_remote_code",
    "--seed": "random_seed manual_seed random_state rng_seed s",
    "--flip": "hflip fliplr horizontal_flip random_flip",
    "--rotation": "degrees rotation_range rotate random_rotation max_rotate",
    "--zoom": "zoom_range max_zoom",
    "--crop_scale with the smallest share of the area": "scale random_resized_crop",
    "--crop_ratio with the largest aspect ratio": "ratio",
    "--crop_padding": "padding translate width_shift_range height_shift_range random_crop",
    "--hue": "hsv_h",
    "--color_jitter": "hsv_s hsv_v jitter brightness contrast saturation brightness_range",
    "--grayscale": "grayscale_prob gray",
    "--auto_augment": "aa augment augmentation aug randaugment",
    "--auto_augment rand_augment": "rand_augment ra",
    "--rand_augment_magnitude": "ra_magnitude",
    "--auto_augment trivial_augment": "trivial_augment",
    "--random_erasing": "reprob random_erase erasing cutout random_erasing_prob",
    "--mixup_alpha": "mixup mix_up",
    "--cutmix_alpha": "cutmix",
    "--max_image_pixels": "max_pixels",
    "--train_sampling_strategy": "group_by_length",
    "--accelerator_config": "split_batches dispatch_batches",
    "--recipe or --config": "cfg config_file conf yaml hyp",
    "--top_k": "topk k",
    "--split": "eval_split",
    "leave it out: the number of classes comes from the data":
        "num_classes num_labels nb_classes n_classes nc classes num_class",
    "leave it out: weights are pretrained unless the model is scratch/NAME":
        "pretrained use_pretrained pretrain from_pretrained imagenet",
    "leave it out: a new head for the classes of the data is made automatically":
        "ignore_mismatched_sizes",
    "leave it out: the configuration and the image processor come from the model":
        "config_name image_processor_name feature_extractor_name tokenizer_name mean std "
        "interpolation crop_pct image_mean image_std processor_name normalize train_interpolation",
    "leave it out: splits are found in the data":
        "train_split train_split_name validation_split_name val_split_name valid_split",
    "leave it out: the loss follows from the labels, one or multiple per image":
        "criterion bce_loss loss_fn problem_type multi_label multilabel task",
    "leave it out: weights are always saved as safetensors": "save_safetensors save_format",
    "leave it out: decoded images are cached automatically":
        "cache overwrite_cache use_multi_epochs_loader cache_images",
    "leave it out: a distributed run is started with torchrun or accelerate launch":
        "world_size dist_url dist_backend distributed rank multiprocessing_distributed strategy "
        "num_nodes nproc_per_node ddp",
    "leave it out, and set HF_HOME to keep the Hub's files in another folder":
        "cache_dir cache_path hf_home",
    "leave it out, and run: hf-cifar evaluate": "evaluate eval_only test_only do_evaluate",
    "leave it out: runs are always deterministic for a seed":
        "deterministic worker_seeding cudnn_benchmark benchmark",
    "leave it out: it has no counterpart here":
        "use_ipex jit_mode_eval past_index sharded_ddp tpu_num_cores include_inputs_for_metrics "
        "include_tokens_per_second mp_parameters ray_scope xpu_backend sync_bn dist_bn "
        "in_chans channels vflip flipud vertical_flip "
        "mosaic close_mosaic lr_step_size lr_gamma step_size gamma decay_rate decay_epochs "
        "decay_milestones milestones start_epoch steps_per_epoch layer_wise_lr shuffle verbose "
        "drop_last",
}  # fmt: skip


def instead(name: str, options: Collection[str] | None = None) -> str | None:
    """Advise what to pass instead of another tool's option; None if the name is not one of those.

    name: without dashes in front. options: those of the command; None for all of finetune's.
    """
    key = _squeezed(name)
    for advice, names in INSTEAD.items():
        if key in map(_squeezed, names.split()) and (
            options is None or {*re.findall(r"--(\w+)", advice)} <= {*options}
        ):
            return advice if advice.startswith("leave") else f"pass {advice}"
    return None


def _squeezed(name: str) -> str:
    """Spell a name without case, dashes and underscores."""
    return re.sub(r"[-_.]", "", name).lower()
