"""hf_cifar.predict: parallel batches have the results of sequential ones and no side effects."""

import pytest
import torch

from hf_cifar import PredictConfig, build_model, predict_files
from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.predict import expand_paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network with norms that can be folded."""
    folder = str(tmp_path_factory.mktemp("resnet"))
    torch.manual_seed(0)
    options = ModelConfig(model_name_or_path="scratch/resnet10t", image_size=32)
    model, processor = build_model(options, {0: "cat", 1: "dog", 2: "owl"})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_records_do_not_depend_on_the_number_of_threads(saved, stripes, num_threads):
    images = [str(stripes / "test")]
    state = torch.get_rng_state()

    def records(batch_size):
        config = PredictConfig(model_name_or_path=saved, batch_size=batch_size, use_cpu=True)
        return list(predict_files(config, images))

    found, one_by_one = records(5), records(1)
    assert [r["path"] for r in found] == sorted(map(str, (stripes / "test").rglob("*.png")))
    assert [r["label"] for r in found] == [r["label"] for r in one_by_one]
    scores = [[r["score"] for r in each] for each in (found, one_by_one)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.get_rng_state(), state)


def test_folders_are_listed_as_in_training(stripes, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    monkeypatch.chdir(tmp_path)
    picture = next((stripes / "test").rglob("*.png")).read_bytes()
    for name in ("a/[1] x.png", "a/b/2", "a/.hidden.png", "a/.ipynb_checkpoints/1.png", "3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "a/notes.md").write_text("text")
    found = [
        path.as_posix() for path in expand_paths(["a", "a/.hidden.png", "a/notes.md", "3.txt"])
    ]
    assert found == ["a/[1] x.png", "a/b/2", "a/.hidden.png", "a/notes.md", "3.txt"]
    assert caplog.messages == ["left out: 3 files (2 hidden, 1 .md)"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image files in empty; pass another folder"):
        expand_paths(["empty"])
