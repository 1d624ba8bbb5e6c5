"""`hf-cifar predict --dataset_name`: a data set of any size into a folder of Parquet files."""

import json
import shutil

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tiny import tiny_run

from hf_cifar.cli import main
from hf_cifar.runs import parts as parts_module


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("run")
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "4")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts_module, "PART_ROWS", 30)


def predict(run, data, output, *flags):
    return main(
        ["predict", "--model_name_or_path", str(run), "--dataset_name", str(data), "--output", str(output),
         "--batch_size", "8", "--use_cpu", *flags]
    )  # fmt: skip


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_rows_are_those_of_predicted_files(run, stripes, tmp_path, capsys, caplog):
    data = tmp_path / "data"
    shutil.copytree(stripes / "test", data)
    (data / "down" / "005.png").write_bytes(b"rubbish")
    caplog.set_level("INFO", logger="hf_cifar")
    assert predict(run, data, tmp_path / "out") == 0
    summary = "out: 22 rows in 1 Parquet files; 1 image could not be read\n"
    assert capsys.readouterr().out.endswith(summary)
    assert "22 images in 1 parts; 1 parts to classify here" in caplog.messages
    assert main(["predict", "--model_name_or_path", str(run), "--use_cpu", str(data)]) == 1
    by_path = {}
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        by_path[record.pop("path").removeprefix(f"{data}/")] = record
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert [row["row_id"] for row in rows] == list(range(22))
    assert [row["path"] for row in rows] == sorted(by_path)
    for row in rows:
        record = by_path[row["path"]]
        if "error" in record:
            assert row["error"] == record["error"] and row["label"] is row["top_k"] is None
        else:
            assert row["label"] == record["label"] and row["error"] is None
            assert row["score"] == pytest.approx(record["score"], abs=1e-5)
            assert [each["label"] for each in row["top_k"]] == [e["label"] for e in record["top_k"]]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["num_rows"] == 22 and manifest["num_errors"] == 1
    assert (
        manifest["dataset_name"] == str(data)
        and len(manifest["model"]) == len(manifest["data"]) == 64
    )


def test_both_libraries_read_the_folder_as_one_table(run, stripes, tmp_path, datasets_cache):
    assert predict(run, stripes, tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4
    found = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert found["row_id"][:] == list(range(102))
    pattern = str(tmp_path / "out" / "*.parquet")
    files = datasets.load_dataset("parquet", data_files=pattern, split="train")
    assert files["label"][:] == found["label"][:]
    assert pyarrow.dataset.dataset(tmp_path / "out").count_rows() == 102


def test_shards_add_up_to_the_table_of_one_process(run, stripes, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    assert predict(run, stripes, tmp_path / "one") == 0
    capsys.readouterr()
    for index in (2, 0):
        assert predict(run, stripes, tmp_path / "shards", "--shard", f"{index}/3") == 0
        assert not (tmp_path / "shards" / "_manifest.json").exists()
    assert "shard 0/3 is complete; the other shards still have to write 1 of 4 parts" in caplog.text
    assert capsys.readouterr().out == ""
    assert predict(run, stripes, tmp_path / "shards", "--shard", "1/3") == 0
    assert "102 rows in 4 Parquet files" in capsys.readouterr().out
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "one")


def test_processes_of_a_launcher_are_shards(run, stripes, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert predict(run, stripes, tmp_path / "out", "--shard", "1/2") == 0
    assert "1 parts to classify here, of shard 2/4" in caplog.text
    made = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert made == ["part-00002-of-00004.parquet", "part-00003-of-00004.parquet"]


def test_another_model_data_or_option_is_refused(run, stripes, colours, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_run(other, stripes, run, "--max_steps", "1")
    assert predict(run, stripes, tmp_path / "out", "--shard", "0/2") == 0
    changes = {
        "model": (other, stripes), "data": (run, colours), "top k": (run, stripes, "--top_k", "1"),
        "precision": (run, stripes, "--bf16"),
    }  # fmt: skip
    for what, (model, data, *flags) in changes.items():
        assert predict(model, data, tmp_path / "out", *flags) == 2
        assert f"has a different {what} (" in capsys.readouterr().err
    assert predict(run, stripes, tmp_path / "out") == 0


def test_a_multi_label_model_lists_its_labels(lights, tiny_vit, tmp_path, capsys):
    tiny_run(tmp_path / "run", lights, tiny_vit)
    assert predict(tmp_path / "run", lights, tmp_path / "out", "--split", "test") == 0
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert len(rows) == 24 and "label" not in rows[0]
    assert all({e["label"] for e in row["top_k"]} == set("rgb") for row in rows)
    assert any(len(row["labels"]) != 1 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out"], "--output is for a data set; pass --dataset_name too"),
        (["--dataset_name", "d"], "--output is missing; pass a folder for the predictions"),
        (["--dataset_name", "d", "--output", "o", "--shard", "2/2"], "i from 0 to N - 1"),
        (["--dataset_name", "d", "--output", "o", "--shard", "half"], "pass i/N"),
        (
            ["--dataset_name", "d", "--output", "o", "a.png"],
            "pass --dataset_name d or a.png, not both",
        ),
        (["--dataset_name", "./d", "--output", "o"], "no data set ./d"),
    ],
)
def test_mistakes(flags, message, run, capsys):
    assert main(["predict", "--model_name_or_path", str(run), *flags]) == 2
    assert message in capsys.readouterr().err
