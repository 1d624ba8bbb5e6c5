"""hf_cifar.training.autotune: measurements, the choice, and no side effects."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import tiny_config
from torch import nn
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.finetune import finetune_classifier
from hf_cifar.models.kernels import has_fused_attention
from hf_cifar.plan import num_batches
from hf_cifar.runs.processes import Processes
from hf_cifar.training.autotune import (
    Setting,
    Timing,
    candidates,
    choose,
    computing_as,
    measure,
    pick_setting,
)

FP32, BF16 = Setting("fp32"), Setting("bf16")
CPU = torch.device("cpu")


def timm_model(architecture, **model_args):
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(
            architecture=architecture,
            num_labels=3,
            pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict(),
            model_args=model_args,
        )
    )


@pytest.fixture
def convnet():
    return timm_model("resnet10t", drop_rate=0.2)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Record the batch sizes of calls to the fused attention kernel in training."""
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        calls.extend([len(query)] * query.requires_grad)
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0])


def test_candidates_on_a_cpu(convnet):
    assert [str(setting) for setting in candidates(convnet, CPU)] == [
        "fp32 channels_last", "fp32 contiguous", "bf16 channels_last", "bf16 contiguous",
    ]  # fmt: skip
    vit = ViTForImageClassification(
        ViTConfig(image_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    assert [str(setting) for setting in candidates(vit, CPU)] == [
        "fp32 channels_last", "fp32 channels_last eager",
        "bf16 channels_last", "bf16 channels_last eager",
    ]  # fmt: skip


def vits():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    yield ViTForImageClassification(ViTConfig(**small, intermediate_size=64, num_labels=3))
    yield timm_model("test_vit", img_size=32)


@pytest.mark.parametrize("vit", list(vits()), ids=["transformers", "timm"])
def test_eager_attention_gives_the_same_results(vit, batch, kernel_calls):
    """Eager attention is compared only if its matrices need little memory; then the kernel is restored."""
    losses = {}
    for name in ("fused", "eager"):
        setting = FP32._replace(attention=name)
        kernel_calls.clear()
        losses[name] = measure(vit, *batch, [setting], rounds=1)[setting].loss
        assert bool(kernel_calls) is (name == "fused")
    assert losses["eager"] == pytest.approx(losses["fused"], rel=1e-5)
    settings = candidates(vit, CPU)
    assert len(measure(vit, *batch, settings, rounds=1)) == len(settings) == 4
    assert has_fused_attention(vit)
    _, line = pick_setting(vit, *batch, num_steps=2000)
    assert "bf16 channels_last eager" in line
    assert has_fused_attention(vit)


def test_attention_stays_fused_if_eager_needs_much_memory(batch):
    """1 + 64 * 64 patches give a matrix of 16 million numbers for each image."""
    config = ViTConfig(
        image_size=128, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    vit = ViTForImageClassification(config)
    images = torch.randn(1, 3, 128, 128)
    _, line = pick_setting(vit, images, batch[1][:1], num_steps=2000)
    assert "measured images/s: fp32 channels_last " in line
    assert "eager" not in line


@pytest.mark.slow
@pytest.mark.parametrize(("size", "compared"), [(224, True), (384, False)])
def test_attention_of_vit_tiny(size, compared):
    """The matrices grow with the square of the patches: 1.18 and 1.54 times as much memory is kept."""
    vit = timm_model("vit_tiny_patch16_224", img_size=size)
    images, labels = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 0])
    _, line = pick_setting(vit, images, labels, num_steps=400)
    assert "measured images/s: fp32 channels_last " in line
    assert ("eager" in line) is compared


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["resnet10t", "mobilenetv2_035", "test_vit"])
def test_measuring_restores_the_model(batch, architecture, layout, training):
    model = timm_model(architecture, **({"img_size": 32} if "vit" in architecture else {}))
    model.to(memory_format=layout).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [parameter.stride() for parameter in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()
    timings = measure(model, *batch, candidates(model, CPU), rounds=1)
    assert len(timings) == 4
    assert all(0 < timing.seconds < math.inf for timing in timings.values())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_without_the_kernel_is_left_alone(batch):
    """timm turns the kernel off for Swin; neither a setting nor measuring it may turn it on."""
    swin = timm_model("swin_tiny_patch4_window7_224", img_size=32, depths=(1, 1), num_heads=(1, 2))
    came = [m.fused_attn for m in swin.modules() if hasattr(m, "fused_attn")]
    assert came == [False, False]
    for setting in (FP32, FP32._replace(attention="eager"), FP32):
        with computing_as(setting, swin):
            assert [m.fused_attn for m in swin.modules() if hasattr(m, "fused_attn")] == came
        measure(swin, *batch, [FP32, BF16], rounds=1)
        assert [m.fused_attn for m in swin.modules() if hasattr(m, "fused_attn")] == came


def test_every_setting_computes_the_same_loss(convnet, batch):
    """Also with dropout, which is the same in each step; up to the rounding of each format."""
    timings = measure(convnet, *batch, candidates(convnet, CPU), rounds=1)
    reference = timings[FP32].loss
    assert 0.1 < reference < 10
    for setting, timing in timings.items():
        tolerance = 1e-5 if setting.precision == "fp32" else 5e-2
        assert timing.loss == pytest.approx(reference, rel=tolerance)


@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_setting_that_fails_at_any_step_has_no_timing(convnet, batch, monkeypatch, good_steps):
    compilations = []

    def compile_without_compiler(model, **options):
        compilations.append(options)
        if len(compilations) > good_steps:
            raise OSError("no g++")
        return model

    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    compiled = FP32._replace(compiled=True)
    assert list(measure(convnet, *batch, [FP32, compiled], rounds=4)) == [FP32]
    assert len(compilations) == good_steps + 1  # not tried again


@pytest.mark.parametrize(
    ("seconds", "loss", "chosen"),
    [
        (0.5, 2.01, BF16),
        (0.94, 2.0, BF16),
        (0.97, 2.0, FP32),  # not clearly faster
        (1.5, 2.0, FP32),
        (0.5, 2.2, FP32),  # another loss
        (0.5, math.nan, FP32),
    ],
)
def test_the_fastest_sound_setting_is_chosen(seconds, loss, chosen):
    assert choose({FP32: Timing(1.0, 2.0), BF16: Timing(seconds, loss)}) == chosen


def test_a_short_run_is_not_delayed(convnet, batch):
    setting, line = pick_setting(convnet, *batch, num_steps=3)
    assert setting == FP32
    assert "is too short to compare other settings" in line


@pytest.mark.parametrize(("size", "measured"), [(1, {1}), (3, {1}), (8, {4}), (20, {4, 10})])
def test_no_more_than_half_of_a_batch_is_measured(size, measured):
    """On a CPU, where float32 keeps twice the memory of bfloat16."""
    vit = next(vits())
    seen = set()
    vit.register_forward_hook(lambda module, args, kwargs, output: seen.add(len(output.logits)),
                              with_kwargs=True)  # fmt: skip
    pick_setting(vit, torch.randn(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64), 5000)
    assert seen - {2} == measured  # 2: to measure the memory that attention keeps


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_step_that_cannot_be_measured_is_reported(convnet, num_images):
    """The statistics of a norm need more than one value per channel."""
    images, labels = torch.randn(num_images, 3, 32, 32), torch.zeros(num_images, dtype=torch.int64)
    setting, line = pick_setting(convnet, images, labels, num_steps=5000)
    assert setting == FP32
    assert line == "computing in fp32 channels_last: a step of 1 images could not be measured"


def test_a_long_run_compares_all(convnet, batch):
    setting, line = pick_setting(convnet, *batch, num_steps=400)
    assert line.startswith(f"computing in {setting}; measured images/s: fp32 channels_last ")
    for candidate in candidates(convnet, CPU):
        assert f"{candidate} " in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_train_epochs", "2"], 10),  # 72 images in 5 batches of 16, twice
        (["--max_steps", "7", "--gradient_accumulation_steps", "3"], 21),
        (["--num_train_epochs", "0.5"], 3),
        (["--num_train_epochs", "9", "--freeze", "backbone"], 2),
        (["--num_train_epochs", "2", "--freeze", "backbone", "--feature_views", "0"], 10),
    ],
)
def test_number_of_batches(tmp_path, flags, expected):
    config = RunConfig.parse(
        ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "16", *flags]
    )
    assert num_batches(config, 72, Processes(0, 1, CPU)) == expected


def run(folder, data, model, *flags):
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no")
    return tiny_config(folder / "run", data, model, "--num_train_epochs", "3", *saving, *flags)


def measured(caplog):
    return [m for m in caplog.messages if m.startswith("computing in")]


def test_a_run_reports_its_setting_and_a_resumed_one_uses_the_same(
    tmp_path, stripes, tiny_vit, caplog
):
    caplog.set_level("INFO", logger="hf_cifar.plan")
    finetune_classifier(run(tmp_path, stripes, tiny_vit, "--max_steps", "2"))
    saved = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert (saved.train.precision, saved.train.memory_format) == ("fp32", "channels_last")
    assert measured(caplog)[0].startswith("computing in fp32 channels_last")
    # As if bf16 had been faster.
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        text.replace("precision: fp32", "precision: bf16")
    )
    caplog.clear()
    resumed = run(
        tmp_path, stripes, tiny_vit, "--max_steps", "4", "--resume_from_checkpoint", "last"
    )
    finetune_classifier(resumed)
    assert not measured(caplog)
    assert RunConfig.load(tmp_path / "run" / "config.yaml").train.precision == "bf16"


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--bf16", "--use_cpu"]])
def test_a_requested_precision_is_kept(tmp_path, stripes, tiny_vit, flags, caplog):
    caplog.set_level("INFO", logger="hf_cifar.plan")
    config = run(tmp_path, stripes, tiny_vit, "--max_steps", "2", *flags)
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: (
            seen.add(output.dtype)
            if isinstance(module, torch.nn.Linear) and module.training
            else None
        )
    )
    try:
        finetune_classifier(config)
    finally:
        hook.remove()
    assert seen == {torch.bfloat16}
    assert not measured(caplog)
    assert RunConfig.load(tmp_path / "run" / "config.yaml").train.precision == "bf16"


@pytest.mark.parametrize("steps", [3, 400], ids=["short", "measured"])
def test_a_requested_memory_format_is_kept_while_the_precision_is_picked(convnet, batch, steps):
    setting, _ = pick_setting(convnet, *batch, num_steps=steps, memory_format="contiguous")
    assert setting.memory_format == "contiguous"


def test_a_run_keeps_the_requested_memory_format(tmp_path, stripes, tiny_vit):
    flags = ["--max_steps", "2", "--memory_format", "contiguous"]
    finetune_classifier(run(tmp_path, stripes, tiny_vit, *flags))
    saved = RunConfig.load(tmp_path / "run" / "config.yaml").train
    assert (saved.precision, saved.memory_format) == ("fp32", "contiguous")


@pytest.mark.parametrize("attention", ["fused", "eager"])
def test_a_run_keeps_the_requested_attention(tmp_path, stripes, tiny_vit, attention, kernel_calls):
    """In every step, also of a resumed run; the returned model has its original attention."""
    config = run(tmp_path, stripes, tiny_vit, "--max_steps", "2", "--attention", attention)
    result = finetune_classifier(config)
    layers = result.model.config.num_hidden_layers
    assert kernel_calls.count(8) == (0 if attention == "eager" else 2 * layers)  # in 2 steps
    assert has_fused_attention(result.model)
    assert RunConfig.load(tmp_path / "run" / "config.yaml").train.attention == attention
    assert "eager" not in (tmp_path / "run" / "config.json").read_text()


def test_a_resumed_run_uses_the_requested_setting(tmp_path, stripes, tiny_vit):
    """For everything not requested, it uses the setting of the original run."""
    finetune_classifier(
        run(tmp_path, stripes, tiny_vit, "--max_steps", "2", "--attention", "eager",
            "--memory_format", "contiguous", "--precision", "bf16")
    )  # fmt: skip
    more = ["--max_steps", "4", "--resume_from_checkpoint", "last", "--attention", "fused"]
    finetune_classifier(run(tmp_path, stripes, tiny_vit, *more))
    saved = RunConfig.load(tmp_path / "run" / "config.yaml").train
    found = saved.attention, saved.memory_format, saved.precision
    assert found == ("fused", "contiguous", "bf16")


def test_eager_attention_of_a_network_without_attention(tmp_path, stripes):
    config = run(tmp_path, stripes, "scratch/resnet10t", "--image_size", "32",
                 "--attention", "eager")  # fmt: skip
    with pytest.raises(UserError, match=r"--attention eager: Timm.* has no fused attention"):
        finetune_classifier(config)
    assert not (tmp_path / "run").exists()


def test_a_run_in_bfloat16_avoids_slow_kernels_and_restores_the_model(
    tmp_path, stripes, monkeypatch
):
    in_float32, convolve = set(), nn.Conv2d._conv_forward

    def note(layer, images, *weights):
        if layer.training and not torch.is_autocast_enabled("cpu"):
            in_float32.add(layer)
        return convolve(layer, images, *weights)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", note)
    config = run(tmp_path, stripes, "scratch/mobilenetv2_035", "--image_size", "32",
                 "--max_steps", "2", "--precision", "bf16", "--use_cpu")  # fmt: skip
    model = finetune_classifier(config).model
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert in_float32 == {c for c in convolutions if c.groups > 1 and c.stride == (2, 2)}
    assert len(in_float32) == 4
    assert not any("forward" in vars(module) for module in model.modules())


def test_contiguous_images_stay_contiguous(tmp_path, stripes, tiny_vit):
    from hf_cifar.data.splits import load_splits
    from hf_cifar.models.build import build_model
    from hf_cifar.plan import plan_run
    from hf_cifar.training.build import build_trainer

    for layout, expected in (("contiguous", True), ("channels_last", False)):
        config = run(tmp_path, stripes, tiny_vit, "--memory_format", layout, "--use_cpu")
        splits = load_splits(config.data)
        model, processor = build_model(config.model, splits.id2label)
        trainer = build_trainer(
            model, processor, splits, plan_run(config, model, processor, splits)
        )
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert inputs["pixel_values"].is_contiguous() is expected
