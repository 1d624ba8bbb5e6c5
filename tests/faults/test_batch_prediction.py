"""Batch prediction that is killed: the same command continues, and the table is that of one process."""

import os
import random
import signal
import time

import pytest
from faults.rig import ended, in_child, kill_at_file_operation, start
from pyarrow import parquet
from tiny import tiny_run

from hf_cifar.config.deployment import BatchPredictionConfig, PredictConfig
from hf_cifar.deploy.batch_prediction import predict_dataset
from hf_cifar.runs import parts as parts_module


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    before, parts_module.PART_ROWS = parts_module.PART_ROWS, 10
    yield
    parts_module.PART_ROWS = before


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("run")
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "2")
    return folder


@pytest.fixture(scope="module")
def predicts(run, stripes):
    """A function (output, shard) -> function that classifies 102 images in 11 parts, as a process does."""

    def into(output, shard=None):
        config = PredictConfig(model_name_or_path=str(run), batch_size=4, use_cpu=True)
        batch = BatchPredictionConfig(str(stripes), output=str(output), shard=shard)
        return lambda: predict_dataset(config, batch) and None

    return into


@pytest.fixture(scope="module")
def undisturbed(predicts, tmp_path_factory):
    """The files of a table that one process wrote, and the seconds it took."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    began = time.monotonic()
    assert in_child(predicts(output)) == 0
    assert parquet.read_table(output)["row_id"].to_pylist() == list(range(102))
    return files_of(output), time.monotonic() - began


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_kill_at_every_file_operation(predicts, undisturbed, tmp_path, record_result):
    expected, _ = undisturbed

    def count():
        operations = kill_at_file_operation(tmp_path / "count", -1)
        predicts(tmp_path / "count")()
        (tmp_path / "operations").write_text(str(operations()))

    assert in_child(count) == 0
    points, good = int((tmp_path / "operations").read_text()), 0
    for point in range(points):
        output = tmp_path / str(point)

        def killed(output=output, point=point):
            kill_at_file_operation(output, point)
            predicts(output)()

        ends = in_child(killed), in_child(predicts(output)), files_of(output) == expected
        good += ends == (-signal.SIGKILL, 0, True)
        if ends != (-signal.SIGKILL, 0, True):
            print(f"file operation {point}: {ends}")
    record_result(
        "-",
        "kill -9 of `predict --dataset_name` at every file operation",
        "the same command continues; the same bytes at the end",
        good,
        points,
    )


def test_kill_of_one_of_two_processes_at_random_times(
    predicts, undisturbed, tmp_path, record_result
):
    """The other process takes over its parts without being started again."""
    expected, seconds = undisturbed
    draw, good = random.Random(0), 0
    for number in range(10):
        output = tmp_path / str(number)
        pair = [start(predicts(output)) for _ in range(2)]
        time.sleep(draw.uniform(0.1, 1) * seconds)
        os.kill(pair[0], signal.SIGKILL)
        first, second = map(ended, pair)
        good += (first in (0, -signal.SIGKILL), second, files_of(output) == expected) == (
            True,
            0,
            True,
        )
    record_result(
        "-",
        "kill -9 of one of two processes that predict into a folder, at random times",
        "the other one completes the table; the same bytes",
        good,
        10,
    )


def test_kill_of_both_processes_again_and_again(predicts, undisturbed, tmp_path, record_result):
    """Shards and processes without a shard, killed up to three times in a row."""
    expected, seconds = undisturbed
    draw, good = random.Random(1), 0
    for number in range(6):
        output = tmp_path / str(number)
        for _ in range(3):
            pair = [
                start(predicts(output, shard))
                for shard in draw.choice([(None, None), ("0/2", "1/2")])
            ]
            time.sleep(draw.uniform(0.1, 0.8) * seconds)
            for pid in pair:
                os.kill(pid, signal.SIGKILL)
            [ended(pid) for pid in pair]
        good += (in_child(predicts(output)), files_of(output) == expected) == (0, True)
    record_result(
        "-",
        "kill -9 of both processes that predict into a folder, three times in a row",
        "the same command continues; the same bytes at the end",
        good,
        6,
    )
