"""Tiny models of the real architectures, saved as by transformers and timm."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

CHECKPOINT_LABELS = {i: name for i, name in enumerate(("ant", "bee", "cow", "elk", "fox"))}
TIMM_ARGS = {"densenet121": {"growth_rate": 8, "block_config": (1, 1, 2, 2)}}


def _save_vit(folder: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, id2label=CHECKPOINT_LABELS,
        label2id={name: i for i, name in CHECKPOINT_LABELS.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def _save_resnet(folder: Path) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic",
        id2label=CHECKPOINT_LABELS, label2id={name: i for i, name in CHECKPOINT_LABELS.items()},
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)


def _save_timm(folder: Path, architecture: str) -> None:
    model_args = TIMM_ARGS.get(architecture, {})
    model = timm.create_model(architecture, num_classes=5, **model_args)
    # `num_classes` in model_args, as stored by timm.create_model(num_classes=5) and a push.
    save_for_hf(model, folder, model_args={"num_classes": 5, **model_args}, safe_serialization=True)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a saved five-class checkpoint by name: vit, resnet, or timm/ARCHITECTURE."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder_of(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            if name.startswith("timm/"):
                _save_timm(folder, name.removeprefix("timm/"))
            else:
                {"vit": _save_vit, "resnet": _save_resnet}[name](folder)
        return folder

    return folder_of


@pytest.fixture(autouse=True)
def seeded():
    """Seed the weights of new heads."""
    torch.manual_seed(0)
