"""hf_cifar.runs.energy: measured if codecarbon is installed, otherwise absent."""

import importlib.util
import time

import pytest

from hf_cifar.runs.energy import measured_energy


def test_no_energy_if_nothing_measures_it():
    with measured_energy(wanted=False) as energy:
        pass
    assert energy == {}


@pytest.mark.skipif(importlib.util.find_spec("codecarbon") is not None, reason="it is installed")
def test_no_energy_without_codecarbon():
    with measured_energy() as energy:
        pass
    assert energy == {}


def test_codecarbon_measures_a_computation_and_writes_no_file(tmp_path, monkeypatch, capfd):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    with measured_energy() as energy:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            sum(range(10_000))
    parts = [energy[f"{part}_kwh"] for part in ("cpu", "gpu", "ram")]
    assert energy["kwh"] == pytest.approx(sum(parts)) and 0 < energy["kwh"] < 0.01
    assert energy["tracker"].startswith("codecarbon ")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_error_in_the_block_is_not_hidden():
    with pytest.raises(ZeroDivisionError), measured_energy():
        _ = 1 / 0
