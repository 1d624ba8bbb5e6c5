"""hf_cifar.runs.resume: the same images per step on any number of processes, and restarts by a launcher."""

import json

import pytest

from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.resume import with_batch_of, with_restarts


@pytest.mark.parametrize(
    ("asked", "images", "devices", "settled"),
    [
        ((4, 1), 8, 2, (4, 1)),
        ((4, 1), 8, 1, (4, 2)),
        ((4, 1), 8, 4, (2, 1)),
        ((8, 2), 64, 1, (8, 8)),
        ((8, 1), 24, 2, (6, 2)),
        ((5, 1), 35, 1, (5, 7)),
        ((7, 1), 21, 7, (3, 1)),
    ],
)
def test_a_step_keeps_its_images(asked, images, devices, settled, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    (tmp_path / "batch.json").write_text(json.dumps({"images_per_step": images}))
    batch, accumulated = asked
    config = RunConfig.of(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated
    )
    train = with_batch_of(tmp_path, config, devices).train
    found = train.per_device_train_batch_size, train.gradient_accumulation_steps
    assert found == settled and found[0] * found[1] * devices == images
    assert [message.startswith("resuming with") for message in caplog.messages] == [True] * (
        found != asked
    )


def test_what_cannot_be_kept_is_refused(tmp_path):
    (tmp_path / "batch.json").write_text(json.dumps({"images_per_step": 8}))
    config = RunConfig.of(per_device_train_batch_size=4)
    with pytest.raises(UserError, match="which 3 processes cannot share equally; start 2 process"):
        with_batch_of(tmp_path, config, 3)
    stream = config.with_options(streaming=True)
    with pytest.raises(UserError, match=r"has 2 process\(es\), not 1; start 2"):
        with_batch_of(tmp_path, stream, 1)
    assert with_batch_of(tmp_path, stream, 2) == stream
    assert with_batch_of(None, config, 3) == config


def test_a_launcher_that_restarts_resumes(monkeypatch):
    config = RunConfig()
    assert with_restarts(config) == config
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")  # as accelerate launch sets it
    assert with_restarts(config) == config
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert with_restarts(config).train.resume_from_checkpoint == "last"
    asked = config.with_options(resume_from_checkpoint="no")
    assert with_restarts(asked) == asked
