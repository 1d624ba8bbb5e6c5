"""Tiny classifiers that have learned something whose place is known."""

from typing import NamedTuple

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_cifar.config.model import ModelConfig
from hf_cifar.explain.methods import Example
from hf_cifar.explain.target_layer import find_target_layer
from hf_cifar.models.build import build_model

LABELS = {0: "across", 1: "down", 2: "none"}
SIZE, SQUARE = 32, 8


class Planted(NamedTuple):
    """A trained model, and images of noise with a striped square, whose direction is the class, at a place
    [N, H, W]. Noise alone is a class too."""

    model: torch.nn.Module
    examples: list[Example]
    squares: torch.Tensor


def images(count, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, SIZE, SIZE, generator=generator).repeat(1, 3, 1, 1) * 0.3
    labels = torch.randint(0, classes, (count,), generator=generator)
    places = torch.randint(0, SIZE // SQUARE, (count, 2), generator=generator) * SQUARE
    stripes = torch.tensor([2.0, 2.0, -2.0, -2.0]).repeat(SQUARE // 4)
    squares = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for i, (top, left) in enumerate(places.tolist()):
        squares[i, top : top + SQUARE, left : left + SQUARE] = True
        part = pixels[i, :, top : top + SQUARE, left : left + SQUARE]
        if labels[i] < 2:
            part += stripes[:, None] if labels[i] == 0 else stripes
    return pixels, labels, squares


def build(name):
    torch.manual_seed(0)
    if name == "vit":
        config = ViTConfig(
            image_size=SIZE, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, id2label=LABELS, hidden_dropout_prob=0.0,
        )  # fmt: skip
        return ViTForImageClassification(config)
    return build_model(ModelConfig(model_name_or_path=name, image_size=SIZE), LABELS).model


@pytest.fixture(scope="session", params=["scratch/article_cnn", "vit"])
def planted(request):
    model = build(request.param).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(300):
        pixels, labels, _ = images(32, seed=step)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.1
    model.eval()
    pixels, labels, squares = images(8, seed=1000, classes=2)
    layer = find_target_layer(model, pixels[:1])
    views = ((pixels * 0.2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return Planted(
        model,
        [Example(pixels[i : i + 1], views[i], int(labels[i]), layer) for i in range(len(pixels))],
        squares,
    )
