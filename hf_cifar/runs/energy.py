"""Electricity of a computation, measured by codecarbon where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def measured_energy(wanted: bool = True) -> Iterator[dict[str, float | str]]:
    """Gives a dict that holds, once the block is left, what this whole machine took meanwhile: `kwh`, and of
    that `cpu_kwh`, `gpu_kwh` and `ram_kwh`; `tracker` names what measured it.

    The dict stays empty without codecarbon, or if that finds nothing to measure. No network is used, no file
    is written.
    """
    energy: dict[str, float | str] = {}
    if not wanted or importlib.util.find_spec("codecarbon") is None:
        yield energy
        return
    from codecarbon import OfflineEmissionsTracker

    # At lower levels it logs about countries and other instances, before it reads its own log level.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        output_methods=[], allow_multiple_runs=True, log_level="critical"
    )
    tracker.start()
    try:
        yield energy
    finally:
        measured = tracker.stop() is not None  # None: it failed without an error
    if measured:
        data = tracker.final_emissions_data
        energy |= {
            "kwh": data.energy_consumed,
            "cpu_kwh": data.cpu_energy,
            "gpu_kwh": data.gpu_energy,
            "ram_kwh": data.ram_energy,
            "tracker": f"codecarbon {data.codecarbon_version}",
        }
