"""hf_cifar.runs.listing: the runs that `hf-cifar runs` finds, and their records."""

import json
import subprocess
import sys

import pytest
import yaml

from hf_cifar.cli import main
from hf_cifar.runs.listing import list_runs, render_runs

OPTIONS = {
    "dataset_name": "uoft-cs/cifar10", "model_name_or_path": "bundled/efficientnet_lite0",
    "num_train_epochs": 3.0, "seed": 42,
}  # fmt: skip


def write_run(folder, accuracy=None, test=None, **options):
    """Write the files of a run; without an accuracy, those of an unfinished one."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(OPTIONS | options))
    if accuracy is not None:
        accuracies = {"validation": accuracy} | ({"test": test} if test is not None else {})
        metrics = {
            split: {"accuracy": value, "intervals": {"accuracy": [value - 0.01, value + 0.01]}}
            for split, value in accuracies.items()
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        facts = {"epochs": 2.0, "finished": "2026-05-04T10:20:30+00:00"}
        (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_runs_are_grouped_by_data_set_with_the_best_first(tmp_path):
    write_run(tmp_path / "a", 0.8)
    write_run(tmp_path / "series" / "seed-1", 0.9, seed=1)
    write_run(tmp_path / "digits", 0.99, dataset_name="bundled/digits")
    write_run(tmp_path / "stopped")
    records = list_runs([tmp_path])
    names = [record["run"].removeprefix(f"{tmp_path}/") for record in records]
    assert names == ["digits", "series/seed-1", "a", "stopped"]
    assert list_runs([tmp_path, tmp_path / "a"]) == records  # none of them twice


def test_a_finished_run_shows_its_metrics(tmp_path, capsys):
    data = tmp_path / "folder" / "birds"
    data.mkdir(parents=True)
    run = write_run(tmp_path / "run", 0.9, test=0.88, dataset_name=str(data), seed=7)
    assert list_runs([run]) == [
        {
            "run": str(run), "model": "bundled/efficientnet_lite0", "data": str(data), "epochs": 2.0,
            "seed": 7, "validation": {"accuracy": 0.9, "interval": [0.89, 0.91]},
            "test": {"accuracy": 0.88, "interval": [0.87, 0.89]}, "state": "finished",
            "date": "2026-05-04T10:20:30+00:00",
        }
    ]  # fmt: skip
    assert main(["runs", str(run)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "run", "model", "data", "epochs", "seed", "validation", "test", "state", "date",
    ]  # fmt: skip
    assert "birds " in row and str(data) not in row
    assert "2     7  0.9000 [0.8900, 0.9100]  0.8800 [0.8700, 0.8900]  finished" in row
    assert row.endswith("2026-05-04 10:20")


def test_an_interrupted_run_shows_its_last_checkpoint(tmp_path):
    run = write_run(tmp_path / "run")
    assert list_runs([run])[0]["state"] == "unfinished, no checkpoint"
    for step in (9, 100):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "config.json").touch()
    (record,) = list_runs([run])
    assert record["state"] == "unfinished at step 100"
    assert (record["epochs"], record["validation"]) == (3.0, None)


@pytest.mark.parametrize(
    ("name", "content", "state"),
    [
        ("config.yaml", "a: [", "config.yaml is damaged (while parsing"),
        ("config.yaml", "", "config.yaml is damaged (not a mapping)"),
        ("config.yaml", "seed: 1", "damaged: KeyError 'model_name_or_path'"),
        ("run.json", '{"epochs": ', "run.json is damaged (Expecting value"),
        ("run.json", '{"epochs": null}', "damaged: TypeError"),
        ("metrics.json", b"\xff\xfe\x00", "metrics.json is damaged ('utf-8' codec"),
        ("metrics.json", '{"validation": {"accuracy": "high"}}', "damaged: ValueError"),
        ("metrics.json", '{"validation": []}', "damaged: AttributeError"),
        ("metrics.json", None, "metrics.json is missing"),
    ],
)
def test_a_damaged_run_is_shown_as_damaged(tmp_path, name, content, state):
    write_run(tmp_path / "good", 0.5)
    path = write_run(tmp_path / "bad", 0.9) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    records = {record["run"]: record["state"] for record in list_runs([tmp_path])}
    assert records.pop(str(tmp_path / "good")) == "finished"
    assert state in records[str(tmp_path / "bad")]
    assert len(render_runs(list_runs([tmp_path])).splitlines()) == 3


def test_json_prints_a_record_per_line(tmp_path, capsys):
    write_run(tmp_path / "a", 0.8)
    write_run(tmp_path / "b", 0.7)
    assert main(["runs", "--json", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == list_runs([tmp_path])


def test_an_empty_folder_is_not_an_error(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no runs in" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs takes folders"),
        (["nowhere"], "no folder nowhere"),
        (["--jsn", "."], "unknown option --jsn (nearest: --json)"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    assert main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    write_run(tmp_path / "run", 0.9)
    code = (
        "import sys; from hf_cifar.cli import main; status = main(['runs', sys.argv[1]]); "
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == 0, done.stderr
