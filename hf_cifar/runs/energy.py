"""Electricity of a computation, measured by codecarbon where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def measured_energy(wanted: bool = True) -> Iterator[dict[str, float | str]]:
    """Yield a dict that after the block has the energy used by the machine: `kwh`, of that `cpu_kwh`,
    `gpu_kwh` and `ram_kwh`, and the `tracker` that measured it.

    The dict stays empty without codecarbon, or if it finds nothing to measure. Uses no network and writes no
    file.
    """
    energy: dict[str, float | str] = {}
    if not wanted or importlib.util.find_spec("codecarbon") is None:
        yield energy
        return
    from codecarbon import OfflineEmissionsTracker

    # At lower levels it logs about countries and parallel instances, before it reads its own log level.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        output_methods=[], allow_multiple_runs=True, log_level="critical"
    )
    tracker.start()
    try:
        yield energy
    finally:
        measured = tracker.stop() is not None  # None if it failed without an error
    if measured:
        data = tracker.final_emissions_data
        energy |= {
            "kwh": data.energy_consumed,
            "cpu_kwh": data.cpu_energy,
            "gpu_kwh": data.gpu_energy,
            "ram_kwh": data.ram_energy,
            "tracker": f"codecarbon {data.codecarbon_version}",
        }
