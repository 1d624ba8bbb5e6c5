"""The methods find what is known to matter, and agree with captum and with slow loops."""

import sys

import pytest
import torch
from networks import load

from hf_cifar.errors import UserError
from hf_cifar.explain.methods import (
    METHODS,
    Example,
    attention_rollout,
    check_methods,
    grad_cam,
    integrated_gradients,
    lime,
    superpixels,
)
from hf_cifar.explain.target_layer import find_target_layer

captum = pytest.importorskip("captum.attr")


def example_for(model, size=64, class_id=1):
    pixel_values = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    view = torch.zeros(size, size, 3, dtype=torch.uint8)
    return Example(pixel_values, view, class_id, find_target_layer(model, pixel_values))


# Roll-out follows attention, which need not be on the class: it is compared with a slow loop below.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "attention_rollout"])
def test_maps_are_higher_where_the_class_is(name, planted):
    if name == "grad_cam" and planted.model.config.model_type == "vit":
        pytest.skip("Grad-CAM does not find the class in a tiny ViT, see docs/explain.md")
    inside, outside = [], []
    for example, square in zip(planted.examples, planted.squares, strict=True):
        attribution = METHODS[name](planted.model, example)
        assert attribution.shape == square.shape
        assert bool(attribution.isfinite().all())
        inside.append(attribution[square].mean().item())
        outside.append(attribution[~square].mean().item())
    assert sum(inside) > 2 * sum(outside), (inside, outside)
    assert sum(a > b for a, b in zip(inside, outside, strict=True)) >= 6, (inside, outside)


@pytest.mark.parametrize("name", ["scratch/test_resnet", "resnet", "scratch/test_convnext"])
def test_grad_cam_equals_captum_on_convolutional_networks(name):
    model = load(name)
    example = example_for(model)
    layer = model.get_submodule(example.layer.name)
    reference = captum.LayerGradCam(lambda x: model(pixel_values=x).logits, layer)
    expected = reference.attribute(example.pixel_values, target=1, relu_attributions=True)
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear")[0, 0]
    torch.testing.assert_close(grad_cam(model, example), expected.detach())


def test_grad_cam_of_tokens_equals_that_of_maps():
    """Computed token by token, with the weights of Selvaraju et al."""
    model = load("vit")
    example = example_for(model)
    kept = {}
    layer = model.vit.layers[2].layernorm_before
    hook = layer.register_forward_hook(lambda *call: kept.update(tokens=call[2]))
    logit = model(pixel_values=example.pixel_values).logits[0, 1]
    hook.remove()
    (gradient,) = torch.autograd.grad(logit, kept["tokens"])
    tokens, gradient = kept["tokens"][0, 1:], gradient[0, 1:]
    weights = [sum(gradient[t, d] for t in range(16)) / 16 for d in range(32)]
    cam = [sum(weights[d] * tokens[t, d] for d in range(32)).clamp_min(0) for t in range(16)]
    expected = torch.nn.functional.interpolate(
        torch.stack(cam).view(1, 1, 4, 4), (64, 64), mode="bilinear"
    )[0, 0]
    torch.testing.assert_close(grad_cam(model, example), expected.detach())


@pytest.mark.parametrize("name", ["vit", "scratch/test_vit"])
def test_rollout_equals_a_slow_one_and_restores_the_model(name):
    model = load(name)
    example = example_for(model)
    found = attention_rollout(model, example)
    if name == "vit":
        assert model.config._attn_implementation == "sdpa"
        eager = load(name)
        eager.set_attn_implementation("eager")
        attentions = eager(pixel_values=example.pixel_values, output_attentions=True).attentions
    else:
        layers = [block.attn for block in model.timm_model.blocks]
        assert all(layer.fused_attn for layer in layers)
        assert not any(layer.attn_drop._forward_hooks for layer in layers)
        attentions = []
        for layer in layers:
            layer.fused_attn = False
            layer.attn_drop.register_forward_hook(lambda *call: attentions.append(call[2]))
        model(pixel_values=example.pixel_values)
    row = torch.zeros(17)
    row[0] = 1  # the class token, followed back from the output
    for attention in reversed(attentions):
        row = 0.5 * row + 0.5 * row @ attention[0].mean(dim=0)
    assert row.sum().item() == pytest.approx(1, abs=1e-5)
    grid = row[1:].view(1, 1, 4, 4)
    expected = torch.nn.functional.interpolate(grid, (64, 64), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("name", ["swin", "scratch/swin_tiny_patch4_window7_224", "resnet"])
def test_rollout_is_refused_without_attention_between_all_patches(name):
    model = load(name)
    with pytest.raises(UserError, match="attention_rollout does not apply; use grad_cam"):
        attention_rollout(model, example_for(model))


def test_integrated_gradients_sum_to_the_difference_of_logits(planted):
    example = planted.examples[0]
    both = torch.cat([example.pixel_values, torch.zeros_like(example.pixel_values)])
    with torch.no_grad():
        image, grey = planted.model(pixel_values=both).logits[:, example.class_id]
    total = integrated_gradients(planted.model, example).sum()
    assert total.item() == pytest.approx((image - grey).item(), rel=0.05, abs=0.05)


def test_sampling_is_repeatable_and_leaves_the_generator_alone(planted):
    state = torch.get_rng_state()
    first, second = (lime(planted.model, planted.examples[0]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["noise", "flat", "stripes"])
def test_any_image_has_many_superpixels(kind):
    view = {
        "noise": torch.randint(0, 256, (64, 64, 3)),
        "flat": torch.full((64, 64, 3), 7),
        "stripes": (torch.arange(64) // 4 % 2 * 200)[None, :, None].expand(64, 64, 3),
    }[kind].to(torch.uint8)
    segments = superpixels(view)
    assert segments.shape == (64, 64)
    assert 30 <= segments.max() + 1 <= 80
    assert segments.unique().tolist() == list(range(int(segments.max()) + 1))


def test_missing_packages_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.delitem(sys.modules, "captum.attr", raising=False)
    check_methods(["grad_cam", "attention_rollout", "feature_maps", "filters"])
    with pytest.raises(UserError, match=r"captum is not installed; run: pip install '.*explain"):
        check_methods(["occlusion"])
