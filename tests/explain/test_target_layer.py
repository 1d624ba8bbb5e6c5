import pytest
import torch
from networks import load

from hf_cifar.errors import UserError
from hf_cifar.explain.target_layer import find_target_layer, trace

# Layer, order of its output, grid at 64 px, tokens without a place.
EXPECTED = {
    "vit": ("vit.layers.2.layernorm_before", "tokens", (4, 4), 1),
    "resnet": ("resnet.encoder.stages.2", "channels_first", (4, 4), 0),
    "convnext": ("convnext.encoder.stages.3", "channels_first", (2, 2), 0),
    "swin": ("swin.encoder.layers.2.blocks.1.layernorm_after", "tokens", (4, 4), 0),
    "scratch/test_vit": ("timm_model.blocks.5.norm1", "tokens", (4, 4), 1),
    "dinov2": ("dinov2_with_registers.encoder.layer.2.norm2", "tokens", (4, 4), 5),
    "scratch/deit_tiny_distilled_patch16_224": ("timm_model.blocks.11.norm1", "tokens", (4, 4), 2),
    "scratch/test_resnet": ("timm_model.layer4", "channels_first", (2, 2), 0),
    "scratch/test_efficientnet": ("timm_model.bn2", "channels_first", (2, 2), 0),
    "scratch/test_convnext": ("timm_model.norm_pre", "channels_first", (2, 2), 0),
    "scratch/article_cnn": ("backbone.7", "channels_first", (12, 12), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_layer_is_found_without_its_name(name):
    torch.manual_seed(0)
    layer = find_target_layer(load(name), torch.randn(1, 3, 64, 64))
    layout = layer.layout
    assert (layer.name, layout.order, layout.grid, layout.prefix) == EXPECTED[name]


def test_tokens_become_maps_at_the_places_of_their_patches():
    """A change of one patch changes the first norm's map at that place only."""
    model = load("scratch/test_vit")
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., 16:32, 48:64] += 1

    def first(pixel_values):
        calls, _ = trace(model, pixel_values)
        call = next(each for each in calls if each.name == "timm_model.blocks.0.norm1")
        return call.layout.maps(call.output)

    difference = (first(images) - first(changed)).abs().amax(dim=(0, 1))
    assert difference[1, 3] > 0.01
    difference[1, 3] = 0
    assert difference.max() == 0


def test_a_map_of_one_place_is_passed_over():
    layer = find_target_layer(load("scratch/test_resnet", 32), torch.randn(1, 3, 32, 32))
    assert (layer.name, layer.layout.grid) == ("timm_model.layer3", (2, 2))


def test_a_network_without_maps_is_refused_in_one_line():
    model = load("scratch/article_mlp", 32)
    with pytest.raises(UserError, match=r"ArticleMLP\w+ has no layer with feature maps") as caught:
        find_target_layer(model, torch.randn(1, 3, 32, 32))
    assert "use integrated_gradients" in str(caught.value) and "\n" not in str(caught.value)


def test_tracing_leaves_no_hooks():
    model = load("vit")
    trace(model, torch.randn(1, 3, 64, 64))
    assert not any(module._forward_hooks for module in model.modules())
