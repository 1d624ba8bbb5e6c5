"""Row 35: mistakes in command lines and configs."""

import json
import subprocess
import sys
import time

from command_lines import run_commands
from hub_server import hub_environment

FILES = {
    "list.yaml": "- a\n- b\n",
    "text.yaml": "just words",
    "number.yaml": "7",
    "open.yaml": "flip: [",
    "tabs.yaml": "flip:\n\t- 1\n",
    "typo.yaml": "flp: 1\n",
    "bad_value.yaml": "flip: often\n",
    "range.yaml": "learning_rate: -1\n",
    "nested.yaml": "train:\n  learning_rate: 1\n",
    "list_value.yaml": "flip: [0.1, 0.2]\n",
    "number_key.yaml": "7: 8\n",
    "empty_key.yaml": '"": 8\n',
    "tag.yaml": "flip: !!python/object/apply:os.system ['touch ran']\n",
    "twice.yaml": "config: other.yaml\n",
    "date.yaml": "seed: 2026-01-01\n",
    "binary.yaml": b"\xff\xfe\x00\x01\x80",
    "latin.yaml": "output_dir: caf\u00e9\n".encode("latin-1"),
    "anchors.yaml": "seed: &a [*a]\n",
    "empty/keep": "",
    "note.txt": "no image",
    "run/config.yaml": "dataset_name: bundled/digits\n",
    "model/config.json": "{broken",
    "run2/config.yaml": b"flip: \x80\x81",
    "run2/config.json": "{}",
    "run2/run.json": "[]",
    "checkpoint-1/trainer_state.json": "",
}
DIGITS = ["--dataset_name", "bundled/digits"]
MLP = ["--model_name_or_path", "scratch/article_mlp"]
NEW = [*DIGITS, *MLP]
# Command lines, each with a text that its error must contain.
LIGHT = """
tune | tune
finetun | finetun
--option | --option
predict | --model_name_or_path
evaluate | --model_name_or_path
push | --repo_id
report | report
compare | compare
reproduce | reproduce
runs | runs
compare run | not 1
compare run run run | not 3
report run run | not 2
report nowhere | nowhere
push nowhere --repo_id x | nowhere
push run | --repo_id
reproduce nowhere | nowhere
compare nowhere run | nowhere
compare run run --split train | --split
report run --gallery_size -1 | --gallery_size
report run --gallery_size many | gallery_size
report run --galery_size 3 | nearest: --gallery_size
runs --jsn run | nearest: --json
runs nowhere | nowhere
recipes nope | nope
recipes quickstart article_cnn | one
finetune --learning_rat 1 | nearest: --learning_rate
finetune --learning_rate fast | --learning_rate
finetune --learning_rate | --learning_rate
finetune --learning_rate nan | --learning_rate
finetune --learning_rate -1 | --learning_rate
finetune --num_train_epochs 0 | --num_train_epochs
finetune --num_train_epochs inf | --num_train_epochs
finetune --per_device_train_batch_size 0 | --per_device_train_batch_size
finetune --per_device_train_batch_size 1.5 | --per_device_train_batch_size
finetune --gradient_accumulation_steps -1 | --gradient_accumulation_steps
finetune --weight_decay -1 | --weight_decay
finetune --label_smoothing_factor 1 | --label_smoothing_factor
finetune --seed -1 | --seed
finetune --seed 1e3 | --seed
finetune --seeds 0 | --seeds
finetune --optim adams | --optim
finetune --eval_strategy never | --eval_strategy
finetune --save_strategy sometimes | --save_strategy
finetune --lr_scheduler_type cosinus | cosine
finetune --metric_for_best_model f1 | --metric_for_best_model
finetune --do_train false | --do_train
finetune --hub_strategy end | --hub_strategy
finetune --precision fp8 | precision
finetune --memory_format nhwc | memory_format
finetune --attention flash | attention
finetune --flip 2 | --flip
finetune --flip nan | --flip
finetune --flip | flip
finetune --crop_scale 0 | --crop_scale
finetune --rotation 270 | --rotation
finetune --auto_augment randaugment | auto_augment
finetune --rand_augment_ops 99 | --rand_augment_ops
finetune --mixup_alpha -0.1 | --mixup_alpha
finetune --train_val_split 1 | --train_val_split
finetune --train_val_split 0 | --train_val_split
finetune --train_val_split nan | --train_val_split
finetune --max_train_samples 0 | --max_train_samples
finetune --max_eval_samples -5 | --max_eval_samples
finetune --max_train_samples 1e2 | max_train_samples
finetune --image_size 0 | --image_size
finetune --image_size big | image_size
finetune --freeze half | --freeze
finetune --freeze -1 | freeze
finetune --layer_decay 0 | --layer_decay
finetune --backbone_learning_rate 1e-3 --freeze backbone | --freeze backbone
finetune --backbone_learning_rate 1e-3 --freeze 0 | --freeze 0
finetune --backbone_learning_rate 1e-3 --optim lomo | --optim lomo
finetune --unfreeze_epochs -1 | --unfreeze_epochs
finetune --unfreeze_epochs 1 --freeze 2 | --freeze 2
finetune --unfreeze_epochs 1 --torch_compile | --torch_compile
finetune --sam_rho -0.1 | --sam_rho
finetune --sam_rho 0.05 --freeze backbone --head_solver lbfgs | --head_solver lbfgs
finetune --sam_rho 0.05 --optim galore_adamw_layerwise | galore_adamw_layerwise
finetune --dropout 1 | --dropout
finetune --dropout 0.1 --freeze backbone | --feature_views 0
finetune --drop_path 0.1 --freeze backbone | --feature_views 0
finetune --streaming --pixel_store resident | --pixel_store
finetune --streaming --shots 5 | --shots
finetune --streaming --imbalance_factor 10 | --imbalance_factor
finetune --streaming maybe | maybe
finetune --calibrate perhaps | calibrate
finetune stray | stray
finetune --recipe | --recipe
finetune --recipe quikstart | nearest: quickstart
finetune --config | --config
finetune --config nowhere.yaml | nowhere.yaml
finetune --config empty | empty
finetune --config list.yaml | list.yaml
finetune --config text.yaml | text.yaml
finetune --config number.yaml | number.yaml
finetune --config open.yaml | open.yaml
finetune --config tabs.yaml | tabs.yaml
finetune --config tag.yaml | tag.yaml
finetune --config binary.yaml | binary.yaml
finetune --config latin.yaml | latin.yaml
finetune --config anchors.yaml | --seed
finetune --config typo.yaml | --flp
finetune --config bad_value.yaml | flip
finetune --config range.yaml | --learning_rate
finetune --config list_value.yaml | 0.2
finetune --config number_key.yaml | 7
finetune --config empty_key.yaml | option
finetune --config date.yaml | --seed
finetune --model_name_or_path scratch/article_mlp --dataset_name ./nowhere | ./nowhere
finetune --model_name_or_path scratch/article_mlp --dataset_name note.txt | note.txt
finetune --model_name_or_path scratch/article_mlp --dataset_name bundled/letters | bundled/digits
finetune --model_name_or_path ./nowhere | ./nowhere
finetune --model_name_or_path scratch/resnt18 | nearest: resnet18
finetune --model_name_or_path bundled/vit | bundled/efficientnet_lite0
finetune --output_dir run | run holds another run
finetune --output_dir note.txt | note.txt
finetune --trust_remote_code --model_name_or_path a/b | --model_revision
predict --model_name_or_path model | no image
predict --model_name_or_path model nowhere.png | nowhere.png
predict --model_name_or_path model --top_k 0 note.txt | --top_k
predict --model_name_or_path model --batch_size x note.txt | batch_size
predict --model_name_or_path model --bf16 --fp16 note.txt | --fp16
predict --model_name_or_path a/b --trust_remote_code --model_revision main note.txt | --model_revision
evaluate --model_name_or_path run2 | config.yaml
evaluate --model_name_or_path model --split train | split
evaluate --model_name_or_path model --corruptions -1 | --corruptions
evaluate --model_name_or_path bundled/efficientnet_lite0 | not fine-tuned
"""
# These mistakes are found only with torch, the model or the data loaded.
HEAVY = [
    (["--config", "nested.yaml"], "--train"),
    (["--config", "twice.yaml"], "--config"),
    ([*NEW, "--lr_scheduler_kwargs", "{broken"], "lr_scheduler_kwargs"),
    ([*NEW, "--lr_scheduler_kwargs", '{"foo": 1}'], "lr_scheduler_kwargs"),
    ([*NEW, "--optim_args", "momentum"], "optim_args"),
    ([*NEW, "--accelerator_config", '{"foo": 1}'], "AcceleratorConfig"),
    ([*NEW, "--report_to", "nobody"], "nobody"),
    ([*NEW, "--deepspeed", "nowhere.json"], "deepspeed"),
    ([*NEW, "--warmup_steps", "-3"], "warmup_steps"),
    ([*NEW, "--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint"),
    ([*NEW, "--torch_compile_backend", "foo"], "--torch_compile_backend"),
    (
        [*NEW, "--eval_strategy", "steps", "--save_strategy", "epoch", "--load_best_model_at_end", "true"],
        "save_strategy",
    ),
    ([*NEW, "--head_solver", "lbfgs"], "--head_solver"),
    ([*NEW, "--freeze", "3"], "ArticleMLPForImageClassification"),
    ([*NEW, "--layer_decay", "0.5"], "ArticleMLPForImageClassification"),
    ([*NEW, "--unfreeze_epochs", "1"], "ArticleMLPForImageClassification"),
    (
        [*NEW, "--unfreeze_epochs", "1", "--ddp_find_unused_parameters", "false"],
        "--ddp_find_unused_parameters",
    ),
    ([*NEW, "--dropout", "0.1"], "--dropout: article_mlp has no dropout"),
    ([*NEW, "--max_train_samples", "5"], "--max_train_samples"),
]  # fmt: skip


def test_each_mistake_is_a_one_line_error(record_result, tmp_path):
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {str(path) for path in tmp_path.rglob("*")}
    environment = hub_environment(tmp_path.parent / "home", "http://127.0.0.1:9") | {
        "HF_HUB_OFFLINE": "1"
    }
    light = [line.split(" | ") for line in LIGHT.strip().splitlines()]
    cases = [(line.split(), words, True) for line, words in light]
    for i, (argv, words) in enumerate(HEAVY):
        cases.append((["finetune", *argv, "--output_dir", f"new{i}"], words, False))
    commands = [(None, argv) for argv, _, _ in cases]
    done, good = run_commands(commands, environment, cwd=tmp_path), 0
    for (argv, words, is_light), command in zip(cases, done, strict=True):
        lines = command.stderr.splitlines()
        right = command.status == 2 and not command.stdout and "Traceback" not in command.stderr
        right &= bool(lines) and lines[-1].startswith("hf-cifar: error: ") and words in lines[-1]
        if is_light:
            right &= len(lines) == 1 and not command.loaded_torch
            right &= command.seconds < 2 or "./nowhere" in argv  # which imports `datasets`
        good += right
        if not right:
            shown = f"{command.status} {command.seconds:.1f} s torch={command.loaded_torch}"
            print(
                "WRONG",
                " ".join(argv),
                "|",
                shown,
                "|",
                command.stderr[-300:],
                command.stdout[-100:],
            )
    written = {str(path) for path in tmp_path.rglob("*")} - before
    assert not written
    print(len(light), "without torch")
    requirement = (
        "exit status 2, one line that names the mistake, under 2 s where no model is needed"
    )
    record_result(35, "mistakes in command lines and configs", requirement, good, len(cases))


def test_a_mistake_is_found_without_importing_torch(tmp_path):
    """Times a complete process, start-up included."""
    for argv in (["tune"], ["finetune", "--learning_rat", "1"], ["finetune", "--flip", "2"]):
        start = time.perf_counter()
        code = f"import sys; from hf_cifar.cli import main; sys.exit(main({json.dumps(argv)}))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        print(argv, f"{time.perf_counter() - start:.1f} s")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
