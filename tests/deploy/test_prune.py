"""hf_cifar.deploy.prune: pruned runs are runs, or an ONNX file that answers like the network."""

import numpy as np
import pytest
from tiny import tiny_run
from transformers import pipeline

from hf_cifar.config.deployment import PruneConfig
from hf_cifar.deploy.channels import count_parameters
from hf_cifar.deploy.prune import prune_run
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import load_classifier
from hf_cifar.runs.folder import RunFolder

pytest.importorskip("torch_pruning")


def test_a_pruned_run_is_a_run(tmp_path, stripes, tiny_vit):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--do_predict")
    config = PruneConfig(str(tmp_path / "small"), target_size=0.8, num_train_epochs=3)
    assert prune_run(tmp_path / "run", config) == tmp_path / "small"
    RunFolder(tmp_path / "small").require_finished()
    sizes = [count_parameters(load_classifier(str(tmp_path / n)).model) for n in ("run", "small")]
    assert 0.5 * sizes[0] < sizes[1] <= 0.8 * sizes[0]
    assert Predictions.load(tmp_path / "small", "test").metrics["accuracy"] > 0.8
    image = next((stripes / "test").rglob("*.png"))
    assert len(pipeline("image-classification", model=str(tmp_path / "small"))(str(image))) == 2


def test_a_network_without_a_config_becomes_onnx(tmp_path, stripes):
    pytest.importorskip("onnxruntime")
    flags = ["--image_size", "32", "--learning_rate", "2e-3", "--do_predict"]
    tiny_run(tmp_path / "run", stripes, "scratch/test_efficientnet", *flags)
    config = PruneConfig(str(tmp_path / "small"), target_size=0.5)
    file = prune_run(tmp_path / "run", config)
    assert file == tmp_path / "small" / "model.onnx"
    assert not (tmp_path / "small" / "model.safetensors").exists()
    saved = Predictions.load(tmp_path / "small", "test")
    model, processor = load_classifier(str(file))
    from hf_cifar.data.splits import DataSource
    from hf_cifar.preprocessor import Preprocessor

    split = DataSource(RunFolder(tmp_path / "run").data()).test_split
    images = [split.pixels.decode(position) for position in split.positions.tolist()]
    logits = model(Preprocessor.of(model, processor)(images)).logits.numpy()
    assert np.allclose(logits, saved.logits, atol=1e-4)


def test_what_cannot_be_pruned_is_refused(tmp_path, stripes, tiny_vit):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--max_steps", "2")
    with pytest.raises(UserError, match=r"--target_size 0.01: 0\.\d+ of the network is left"):
        prune_run(tmp_path / "run", PruneConfig(str(tmp_path / "small"), target_size=0.01))
    assert not (tmp_path / "small").exists()
    with pytest.raises(UserError, match="one of them"):
        PruneConfig(str(tmp_path / "small"))
    with pytest.raises(UserError, match="holds another run"):
        prune_run(tmp_path / "run", PruneConfig(str(tmp_path / "run"), target_size=0.5))
    with pytest.raises(UserError, match="no finished run"):
        prune_run(tmp_path, PruneConfig(str(tmp_path / "small"), target_size=0.5))
