import numpy as np
import pytest
import torch
from networks import load

from hf_cifar.errors import UserError
from hf_cifar.explain.methods import Example
from hf_cifar.explain.pictures import CHANNELS, GAP, TILE, feature_maps, filters, overlay


def test_the_colours_of_a_map_say_for_and_against():
    view = np.full((160, 160, 3), 128, np.uint8)
    attribution = np.zeros((160, 160))
    attribution[:80, :80], attribution[80:, 80:] = 1, -0.5
    drawn = overlay(view, attribution).astype(int)
    red, _, blue = drawn[20, 20]
    assert red > blue + 100
    red, _, blue = drawn[150, 150]
    assert blue > red + 30
    assert len(set(drawn[20, 150])) == 1  # grey


def test_a_map_without_differences_leaves_the_image_grey_and_small_images_grow():
    view = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for common in (0.0, 0.5):
        drawn = overlay(view, np.full((32, 32), common))
        assert drawn.shape == (160, 160, 3)
        assert np.ptp(drawn.astype(int), axis=2).max() == 0


@pytest.mark.parametrize("name", ["scratch/test_resnet", "scratch/test_vit", "swin"])
def test_feature_maps_have_a_row_for_each_layer(name):
    example = Example(torch.randn(1, 3, 64, 64), torch.zeros(64, 64, 3, dtype=torch.uint8), 0)
    drawn, layers = feature_maps(load(name), example)
    assert len(layers) == 6
    height, width = drawn.shape[:2]
    assert (height, width) == (6 * (TILE + GAP) - GAP, CHANNELS * (TILE + GAP) - GAP)
    assert drawn.min() == 0 and drawn.max() == 255


def test_filters_are_those_of_the_first_convolution():
    model = load("scratch/article_cnn", 32)
    with torch.no_grad():
        model.backbone[0].weight[0] = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    drawn, name = filters(model)
    assert name == "backbone.0"
    assert drawn[5, 5].tolist() == [255, 128, 0]
    with pytest.raises(UserError, match="has no convolution of the image's three colours"):
        filters(load("scratch/article_mlp", 32))
