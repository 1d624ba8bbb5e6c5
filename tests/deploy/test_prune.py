"""hf_cifar.deploy.prune: pruned runs are runs, or an ONNX file that answers like the network."""

import shutil

import numpy as np
import pytest
from tiny import tiny_run
from transformers import pipeline

from hf_cifar.config.deployment import PruneConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.deploy.channels import count_parameters
from hf_cifar.deploy.prune import _fine_tuning, prune_run
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


def test_a_network_without_a_config_becomes_onnx(tmp_path, stripes, caplog):
    pytest.importorskip("onnxruntime")
    flags = ["--image_size", "32", "--learning_rate", "2e-3", "--do_predict"]
    tiny_run(tmp_path / "run", stripes, "scratch/test_efficientnet", *flags)
    config = PruneConfig(str(tmp_path / "small"), target_size=0.5)
    caplog.set_level("INFO")
    file = prune_run(tmp_path / "run", config)
    assert file == tmp_path / "small" / "model.onnx"
    assert "timm's test_efficientnet, pruned: all" in caplog.text
    for words in ("torch.nn.Module", "model.safetensors", "memory/", "Logits"):
        assert words not in caplog.text
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
    with pytest.raises(
        UserError,
        match=r"--target_size is 0.01, and pruning leaves at least 0\.\d+ of the parameters",
    ):
        prune_run(tmp_path / "run", PruneConfig(str(tmp_path / "small"), target_size=0.01))
    assert not (tmp_path / "small").exists()
    with pytest.raises(UserError, match="holds another run"):
        prune_run(tmp_path / "run", PruneConfig(str(tmp_path / "run"), target_size=0.5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"holds other files, such as notes.txt"):
        prune_run(tmp_path / "run", PruneConfig(str(tmp_path / "mine"), target_size=0.5))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    with pytest.raises(UserError, match="no finished run"):
        prune_run(tmp_path, PruneConfig(str(tmp_path / "small"), target_size=0.5))


def test_data_that_has_moved_is_read_from_its_new_place(tmp_path, stripes, tiny_vit):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(stripes, old)
    tiny_run(tmp_path / "run", old, tiny_vit, "--max_steps", "2")
    old.rename(new)

    def prune(**options):
        config = PruneConfig(str(tmp_path / "small"), target_size=0.8, **options)
        return prune_run(tmp_path / "run", config)

    with pytest.raises(
        UserError, match=r"old.*; if the data has moved, pass its location as --dataset_name"
    ):
        prune()
    prune(dataset_name=str(new))
    assert RunFolder(tmp_path / "small").data().dataset_name == str(new)
    shutil.rmtree(tmp_path / "small")
    next((new / "train").rglob("*.png")).unlink()
    with pytest.raises(
        UserError, match=r"does not hold the data of .*run, or the data has changed"
    ):
        prune(dataset_name=str(new))
    assert not (tmp_path / "small").exists()


def test_options_of_the_run_that_do_not_fit_are_dropped(tmp_path):
    """What is pruned trains all its layers, for the epochs that were asked for."""
    words = (
        "--dataset_name data --model_name_or_path timm/any --output_dir run --max_steps 1000 "
        "--layer_decay 0.75 --learning_rate 1e-3 --drop_path 0.1 --attention eager "
        "--hub_model_id me/whole"
    )
    options = RunConfig.parse(words.split())
    config = PruneConfig("small", target_size=0.5, num_train_epochs=2)
    for described, decay, rate in ((True, 0.75, 1e-3), (False, 1.0, None)):
        tuned = _fine_tuning(options, config, described=described)
        assert (tuned.train.layer_decay, tuned.train.learning_rate) == (decay, rate)
        assert (tuned.train.max_steps, tuned.train.num_train_epochs) == (-1, 2)
        assert (tuned.model.drop_path, tuned.train.attention) == (None, "auto")
        assert tuned.train.hub_model_id is None
    as_long = _fine_tuning(options, PruneConfig("small", target_size=0.5), described=True)
    assert as_long.train.max_steps == 1000
    plain = options.with_options(layer_decay=1.0)
    assert _fine_tuning(plain, config, described=False).train.learning_rate == 1e-3
    head = plain.with_options(freeze="backbone", drop_path=None)
    assert _fine_tuning(head, config, described=True).train.learning_rate is None


def test_a_multi_label_run_is_pruned(tmp_path, lights):
    flags = ["--image_size", "32", "--max_steps", "2", "--learning_rate", "1e-3"]
    tiny_run(tmp_path / "run", lights, "scratch/article_cnn", *flags)
    config = PruneConfig(str(tmp_path / "small"), target_size=0.5)
    assert prune_run(tmp_path / "run", config).is_file()
    facts = RunFolder(tmp_path / "small").facts()
    whole, _ = load_classifier(str(tmp_path / "run"))
    assert 0 < facts["parameters"] <= 0.5 * count_parameters(whole)
    assert facts["repo_id"] == "small"
    options = RunFolder(tmp_path / "small").load_config()
    assert options.train.output_dir == str(tmp_path / "small")


@pytest.mark.parametrize("flags", [("--freeze", "backbone"), ("--lora_rank", "2")])
def test_a_run_that_trained_a_part_is_pruned(flags, tmp_path, stripes, tiny_vit):
    if flags[0] == "--lora_rank":
        pytest.importorskip("peft")
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--max_steps", "2", *flags)
    config = PruneConfig(str(tmp_path / "small"), target_size=0.8)
    assert prune_run(tmp_path / "run", config) == tmp_path / "small"
    tuned = RunFolder(tmp_path / "small").load_config()
    assert (tuned.model.freeze, tuned.model.lora_rank) == ("none", 0)
    assert tuned.train.learning_rate != 5e-3
