"""Tiny networks of transformers, and any of timm, with random weights."""

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_cifar.config.model import ModelConfig
from hf_cifar.models.build import build_model

LABELS = {0: "cat", 1: "dog", 2: "owl"}
MODELS = {
    "dinov2": lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16,
    )),
    "vit": lambda: ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=64,
        patch_size=16,
    )),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic",
    )),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
    )),
    "swin": lambda: SwinForImageClassification(SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 2], num_heads=[1, 1, 2], window_size=4,
    )),
}  # fmt: skip


def load(name, size=64):
    """A model in eval mode; the same weights each time."""
    torch.manual_seed(0)
    if name in MODELS:
        return MODELS[name]().eval()
    config = ModelConfig(model_name_or_path=name, image_size=size)
    return build_model(config, LABELS).model.eval()
