"""hf_cifar.serve.worker: batches of the images that wait."""

import io
import time

import pytest
import torch

from hf_cifar import PredictConfig
from hf_cifar.predict import Predictor
from hf_cifar.serve import frames
from hf_cifar.serve.worker import Worker, measured_batch_size

BATCH_SIZE, NUM_IMAGES = 8, 40


def test_sizes_that_do_not_fit_into_memory_are_left_out(finished_vit, monkeypatch):
    compute = Predictor.scores_of_views

    def limited(self, views):
        if len(views) > 4:
            raise torch.OutOfMemoryError("too many images")
        return compute(self, views)

    monkeypatch.setattr(Predictor, "scores_of_views", limited)
    predictor = Predictor(PredictConfig(str(finished_vit), use_cpu=True))
    assert measured_batch_size(predictor, BATCH_SIZE) == 4


@pytest.mark.parametrize(("image_seconds", "expected"), [(0, BATCH_SIZE), (0.015, 2), (0.1, 2)])
def test_batches_of_a_slow_model_are_small(
    finished_vit, stripes, monkeypatch, image_seconds, expected
):
    output = io.BytesIO()
    config = PredictConfig(str(finished_vit), use_cpu=True, batch_size=BATCH_SIZE)
    compute = Predictor.scores_of_views

    def delayed(self, views):
        time.sleep(image_seconds * len(views))
        return compute(self, views)

    monkeypatch.setattr(Predictor, "scores_of_views", delayed)
    worker = Worker(config, 1, output)
    image = next((stripes / "test").rglob("*.png")).read_bytes()
    end = time.monotonic() + 60
    worker.submit({"id": 1, "deadline": end, "task": "predict"}, [image] * NUM_IMAGES)
    while not output.getvalue():
        assert time.monotonic() < end
        time.sleep(0.01)
    output.seek(0)
    values, answers = frames.read(output)
    assert values["outcome"] == "done" and len(answers) == NUM_IMAGES
    assert max(values["batches"]) == expected
