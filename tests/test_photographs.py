"""Photographs of many sizes: however they are prepared and kept, a run learns the same weights."""

import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_options

from hf_cifar.cli import main

FLAGS = ["--precision", "fp32", "--num_train_epochs", "1", "--image_size", "16"]


@pytest.fixture(autouse=True)
def cache(pixel_cache):
    return pixel_cache


@pytest.fixture
def photos(tmp_path):
    """Two classes of 20 JPEG files from 70 to 110 px a side."""
    generator = np.random.default_rng(0)
    for name, colour in (("day", (200, 180, 90)), ("night", (20, 30, 90))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            height, width = generator.integers(70, 111, 2)
            pixels = generator.normal(colour, 30, (height, width, 3)).clip(0, 255)
            path = tmp_path / "photos" / name / f"{i:02d}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def run(photos, output, model, *flags):
    return main(["finetune", *tiny_options(output, photos, model, *FLAGS, *flags)])


def weights(output):
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def facts(output):
    return json.loads((output / "run.json").read_text())


WAYS = {
    "prepared before": ["--check_images", "all"],
    "prepared in its turn": ["--check_images", "used", "--dataloader_num_workers", "0"],
    "prepared by workers": ["--check_images", "used", "--dataloader_num_workers", "2"],
    "read from disk": ["--pixel_store", "disk"],
    "decoded at each use": ["--pixel_store", "streamed", "--dataloader_num_workers", "2"],
}


def test_every_way_gives_the_same_weights(tmp_path, photos, tiny_vit, cache):
    found = {}
    for number, (name, flags) in enumerate(WAYS.items()):
        for path in cache.glob("*"):
            path.unlink()
        output = tmp_path / str(number)
        assert run(photos, output, tiny_vit, *flags) == 0
        found[name] = weights(output)
    assert len(set(found.values())) == 1, found


def test_later_runs_decode_nothing(tmp_path, photos, tiny_vit, monkeypatch):
    assert run(photos, tmp_path / "a", tiny_vit, "--check_images", "used") == 0
    for path in photos.rglob("*.jpg"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))  # no image any more, but the same size and time
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    monkeypatch.setattr("hf_cifar.data.pixels.NUM_SURVEYED", 0)
    assert run(photos, tmp_path / "b", tiny_vit, "--train_val_split", "0.1") == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_auto_is_settled_by_the_time_that_it_takes(tmp_path, photos, tiny_vit, monkeypatch, caplog):
    assert run(photos, tmp_path / "a", tiny_vit) == 0
    assert "check_images: all\n" in (tmp_path / "a" / "config.yaml").read_text()
    for path in (tmp_path / "pixels").iterdir():
        path.unlink()
    monkeypatch.setattr("hf_cifar.plan.CHECK_SECONDS", 0)
    assert run(photos, tmp_path / "b", tiny_vit) == 0
    assert "check_images: used\n" in (tmp_path / "b" / "config.yaml").read_text()
    assert "train: each image is prepared in the first epoch (--check_images used)" in caplog.text
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def damage(photos, *names):
    for name in names:
        path = photos / name
        path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_image_that_training_meets_lists_all(
    tmp_path, photos, tiny_vit, workers, capsys
):
    damage(photos, *(f"day/{i:02d}.jpg" for i in range(4, 16)))
    flags = ["--check_images", "used", "--dataloader_num_workers", workers]
    assert run(photos, tmp_path / "run", tiny_vit, *flags, "--train_val_split", "0.05") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "12 images cannot be read, train rows 4-15; " in last
    assert "--on_bad_image skip" in last and "day/04.jpg" in last
    assert "; the others: " in last and "day/12.jpg and 3 more; fix" in last
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_another_error_of_a_run_that_skips_stays(tmp_path, photos, tiny_vit, capsys):
    damage(photos, *(f"day/{i:02d}.jpg" for i in range(10)))  # each batch meets some
    flags = ["--check_images", "used", "--on_bad_image", "skip", "--optim", "sgd"]
    flags += ["--learning_rate", "1e3", "--max_grad_norm", "0", "--num_train_epochs", "9"]
    assert run(photos, tmp_path / "run", tiny_vit, *flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "training diverged" in last and "cannot be read" not in last


def test_skipped_images_are_recorded_however_they_are_found(tmp_path, photos, tiny_vit):
    damage(photos, "day/03.jpg", "night/07.jpg", "night/08.jpg")
    for check in ("all", "used"):
        output = tmp_path / check
        flags = ["--check_images", check, "--on_bad_image", "skip"]
        assert run(photos, output, tiny_vit, *flags) == 0
        rows = [row for part in facts(output)["skipped_rows"].values() for row in part]
        assert sorted(rows) == [3, 27, 28]
        card = (output / "README.md").read_text()
        assert "2 of train (rows 3, 27)" in card and "1 of validation (row 28)" in card
        assert main(["report", str(output)]) == 0
    assert facts(tmp_path / "all")["split_hash"] == facts(tmp_path / "used")["split_hash"]


def test_resume_while_images_are_prepared(tmp_path, photos, tiny_vit, cache):
    flags = [
        "--check_images", "used", "--dataloader_num_workers", "2", "--max_steps", "8",
        "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no",
    ]  # fmt: skip
    assert run(photos, tmp_path / "whole", tiny_vit, *flags) == 0
    for path in cache.iterdir():
        path.unlink()
    short = [*flags[:5], "2", *flags[6:]]
    assert run(photos, tmp_path / "parts", tiny_vit, *short) == 0
    more = [*flags, "--resume_from_checkpoint", "last"]
    assert run(photos, tmp_path / "parts", tiny_vit, *more) == 0
    assert facts(tmp_path / "parts")["steps"] == 8
