"""Runs on images that are not square, in each --resize_mode."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_run, tiny_trainer
from transformers import pipeline

from hf_cifar import predict_files
from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.evaluate import evaluate_saved
from hf_cifar.evaluation.predictions import Predictions

MODES = ("crop", "squash", "pad")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Images of 12 x 36 px, and of two other sizes in `mixed`: the class is the colour of the left edge."""
    root = tmp_path_factory.mktemp("wide")
    generator = np.random.default_rng(0)
    for kind in ("same", "mixed"):
        for i in range(40):
            height, width = (12, 36) if kind == "same" else [(12, 36), (40, 20), (15, 45)][i % 3]
            pixels = generator.integers(0, 60, (height, width, 3)).astype(np.uint8)
            name = ("blue", "red")[i % 2]
            pixels[:, : width // 5, 2 if name == "blue" else 0] = 250
            path = root / kind / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("kind", ["same", "mixed"])
@pytest.mark.parametrize("model", ["vit", "timm"])
@pytest.mark.parametrize("mode", MODES)
def test_every_part_of_a_run_sees_the_same(mode, model, kind, wide, tiny_vit, tmp_path):
    base = (tiny_vit,) if model == "vit" else ("scratch/test_resnet",)
    size = () if model == "vit" else ("--image_size", "32")
    tiny_run(tmp_path, wide / kind, *base, "--resize_mode", mode, "--max_steps", "2", *size)
    before = Predictions.load(tmp_path, "validation")
    config = EvaluateConfig(model_name_or_path=str(tmp_path), use_cpu=True)
    again = evaluate_saved(config, DataConfig(dataset_name=str(wide / kind)))
    np.testing.assert_allclose(again.logits, before.logits, rtol=1e-3, atol=1e-3)
    records = list(
        predict_files(
            PredictConfig(model_name_or_path=str(tmp_path), use_cpu=True), [str(wide / kind)]
        )
    )
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    for record in records[::7]:
        (first, *_) = classify(record["path"])
        assert first["label"] == record["label"]
        assert first["score"] == pytest.approx(record["score"], abs=2e-4)


@pytest.mark.parametrize("kind", ["same", "mixed"])
def test_training_images_have_the_shape_of_evaluation(kind, wide, tiny_vit, tmp_path):
    """Without random changes, a training batch shows what evaluation shows of the same images."""
    still = ("--flip", "0", "--crop_padding", "0", "--crop_scale", "0.9999999", "--zoom", "0")
    for mode in MODES:
        trainer = tiny_trainer(
            tmp_path / mode, wide / kind, tiny_vit, "--resize_mode", mode, *still
        )
        batch = trainer.train_dataset.__getitems__(range(8))
        shown = trainer.preprocessing(batch["pixel_values"])
        trained = trainer.augmentation.sample(
            batch["pixel_values"], trainer.preprocessing, torch.Generator().manual_seed(0),
            torch.contiguous_format,
        )  # fmt: skip
        assert (trained - shown).abs().mean() < 0.05
        left = shown[:, :, shown.shape[2] // 2, 0]
        seen = (left.amax(dim=1) - left.median(dim=1).values) > 0.5
        if kind == "same":
            assert not seen.any() if mode == "crop" else seen.all()
