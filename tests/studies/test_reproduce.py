"""hf_cifar.studies.reproduce: rerun from the files of a run, and differences."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_options

from hf_cifar import UserError, reproduce_run
from hf_cifar.cli import main
from hf_cifar.studies.reproduce import compare_weights, render_reproduction


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stripes, tiny_vit):
    """A run with multiple sources of randomness and a measured precision, evaluated on test afterwards."""
    folder = tmp_path_factory.mktemp("reproduce") / "run"
    argv = ["finetune", *tiny_options(
        folder, stripes, tiny_vit, "--rotation", "10", "--color_jitter", "0.2",
        "--auto_augment", "rand_augment", "--random_erasing", "0.2", "--mixup_alpha", "0.2",
    )]  # fmt: skip
    assert main(argv) == 0
    argv = ["evaluate", "--model_name_or_path", str(folder), "--split", "test", "--use_cpu"]
    assert main(argv) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run's folder that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def record(folder, name="run.json"):
    return json.loads((folder / name).read_text())


def test_a_run_is_reproduced_bit_for_bit(finished, tmp_path, capsys):
    capsys.readouterr()
    again = tmp_path / "again"
    assert main(["reproduce", str(finished), "--output_dir", str(again)]) == 0
    out = capsys.readouterr().out
    assert "versions, commit, device, threads and data: the same" in out
    assert "weights: bit-identical, 40 tensors, SHA-256" in out
    assert "validation predictions: bit-identical, 8 images" in out
    assert (again / "model.safetensors").read_bytes() == (
        finished / "model.safetensors"
    ).read_bytes()
    found = record(again, "reproduction.json")
    assert found["changed"] == {} and found["weights"]["identical"]
    assert list(found["metrics"]) == ["validation", "test"]
    assert found["predictions"]["test"]["changed_labels"] == 0
    for then, now in found["metrics"]["validation"].values():
        assert then == now
    settings = [(folder / "config.yaml").read_text() for folder in (finished, again)]
    assert all("precision: fp32" in text for text in settings)


def test_another_seed_gives_other_weights_and_exit_status_1(copied, capsys):
    edit(copied / "config.yaml", "\nseed: 42", "\nseed: 43")
    assert main(["reproduce", str(copied)]) == 1
    out = capsys.readouterr().out
    again = copied.with_name("run-reproduced")
    found = record(again, "reproduction.json")["weights"]
    assert (
        found["differing"] > 30 and found["unmatched"] == 0 and found["largest_difference"] > 1e-3
    )
    assert (
        f"weights: {found['differing']} of {found['num_tensors']} tensors differ, by up to" in out
    )
    assert "validation predictions: logits differ by up to" in out
    then, now = record(copied, "metrics.json"), record(again, "metrics.json")
    for metrics in (then, now):
        assert f"{metrics['validation']['cross_entropy']:.4f}" in out


@pytest.mark.slow
def test_changed_versions_threads_and_commit_are_listed(copied, tmp_path):
    facts = record(copied)
    facts["environment"] |= {"torch": "1.0", "commit": "0" * 40}
    facts["num_threads"] = torch.get_num_threads() + 1
    del facts["environment"]["numpy"]
    (copied / "run.json").write_text(json.dumps(facts))
    before = torch.get_num_threads()
    found = reproduce_run(copied, tmp_path / "again")
    assert found["changed"]["torch"] == ["1.0", record(tmp_path / "again")["environment"]["torch"]]
    assert found["changed"]["numpy"][0] is None
    assert "commit" in found["changed"] and "num_threads" not in found["changed"]
    assert record(tmp_path / "again")["num_threads"] == before + 1
    assert torch.get_num_threads() == before
    assert "torch" in render_reproduction(found)


@pytest.fixture(scope="module")
def other_pixels(stripes, tmp_path_factory):
    data = shutil.copytree(stripes, tmp_path_factory.mktemp("pixels") / "data")
    for path in sorted((data / "train" / "down").glob("*.png")):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    return data


@pytest.fixture(scope="module")
def fewer_rows(stripes, tmp_path_factory):
    data = shutil.copytree(stripes, tmp_path_factory.mktemp("rows") / "data")
    (data / "train" / "down" / "007.png").unlink()
    return data


@pytest.mark.parametrize(
    ("fixture", "message"),
    [
        ("other_pixels", "the train images of .* have changed: pixel hash .*--other_data"),
        ("fewer_rows", "rows or labels of .* have changed: split hash .*--other_data"),
    ],
)
def test_other_data_is_refused_before_training(copied, stripes, fixture, message, request):
    edit(copied / "config.yaml", str(stripes), str(request.getfixturevalue(fixture)))
    with pytest.raises(UserError, match=message):
        reproduce_run(copied, copied.with_name("again"))
    assert not copied.with_name("again").exists()


def test_other_data_is_accepted_if_requested(copied, stripes, other_pixels, capsys):
    edit(copied / "config.yaml", str(stripes), str(other_pixels))
    assert main(["reproduce", str(copied), "--other_data"]) == 1
    assert "pixel_hashes" in capsys.readouterr().out
    found = record(copied.with_name("run-reproduced"), "reproduction.json")
    assert list(found["changed"]) == ["pixel_hashes"]


def test_another_number_of_processes_is_refused(copied):
    edit(copied / "run.json", '"processes": 1', '"processes": 2')
    with pytest.raises(UserError, match=r"trained by 2 process\(es\), and 1 are running"):
        reproduce_run(copied, copied.with_name("again"))


def test_weights_are_compared_tensor_by_tensor(tmp_path):
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, 2), "n": torch.tensor(5)}
    others = {"a": torch.tensor([0.0, 0.5, 0.0]), "b": torch.ones(4), "c": torch.ones(1)}
    files = [tmp_path / name for name in ("then", "other", "same")]
    save_file(tensors, files[0])
    save_file(others, files[1])
    save_file(tensors, files[2], {"written": "later"})
    found = compare_weights(files[0], files[1])
    assert not found["identical"]
    assert (found["num_tensors"], found["differing"], found["unmatched"]) == (4, 1, 3)
    assert found["largest_difference"] == 0.5
    found = compare_weights(files[0], files[2])  # only the header differs
    assert found["identical"] and found["sha256"][0] != found["sha256"][1]
    save_file({"a": -torch.zeros(3)}, files[1])
    save_file({"a": torch.zeros(3)}, files[2])
    assert compare_weights(files[1], files[2])["differing"] == 1  # equal, but not bit-identical
    files[1].write_bytes(b"half a file")
    with pytest.raises(UserError, match="is damaged"):
        compare_weights(files[0], files[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes the folder of one run, not 0"),
        (["nowhere"], "no folder nowhere"),
        (["--outptu_dir", "x", "."], "unknown option --outptu_dir (nearest: --output_dir)"),
        (["{run}", "--output_dir", "{run}"], "holds another run"),
    ],
)
def test_command_line_errors(arguments, message, finished, capsys):
    assert main(["reproduce", *(part.replace("{run}", str(finished)) for part in arguments)]) == 2
    assert message in capsys.readouterr().err
