"""Facts of a run as sentences."""

from __future__ import annotations

from typing import Any

from hf_cifar.config.metrics import is_multi_label
from hf_cifar.config.model import SCRATCH
from hf_cifar.text import render_numbers


def role_of(split: str, metrics: dict[str, Any], options: dict[str, Any]) -> str:
    """Use of a split in a run, so that a reader knows how far to trust its metrics."""
    if split == "test":
        return "Not read before the end of the training; nothing was chosen by it."
    chosen = ["the checkpoint"] if options.get("load_best_model_at_end") else []
    chosen = ["the head's penalty"] if options.get("head_solver") == "lbfgs" else chosen
    chosen += ["the temperature"] if "temperature" in metrics else []
    if is_multi_label(metrics) and options.get("calibrate"):
        chosen += ["each label's threshold"]
    flattered = f" It chose {' and '.join(chosen)}, so its metrics flatter the model."
    return "Held out of train." + (flattered if chosen else "")


def validation_source(run: dict[str, Any], options: dict[str, Any]) -> str:
    """Origin of the validation images."""
    if run["source_splits"]["validation"] != run["source_splits"]["train"]:
        return "the data set's own validation split"
    seed = options["split_seed"]
    if options["streaming"]:
        return f"the first images that a hash of their bytes holds out, split seed {seed}"
    return f"stratified, split seed {seed}"


def hashed(options: dict[str, Any]) -> str:
    """Contents of the split hash."""
    if options["streaming"]:
        return "SHA-256 over the row ids and labels of validation, and over the choice of train"
    return "SHA-256 over row ids and labels"


def render_skipped(run: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> str:
    """The rows that were left out, because their images cannot be read."""
    rows = dict(run.get("skipped_rows", {}))
    rows |= {name: own["skipped_rows"] for name, own in metrics.items() if "skipped_rows" in own}
    return "; ".join(
        f"{len(ids):,} of {name} (row{'s' if len(ids) > 1 else ''} {render_numbers(ids)})"
        for name, ids in rows.items()
    )


def render_leakage(run: dict[str, Any]) -> str:
    """Result of --check_leakage."""
    found = run.get("leakage")
    if not found:
        return ""
    return (
        f"Of {found['num_test']:,} test images {found['num_leaked']:,} are in train or validation too, "
        "exactly or nearly (`--check_leakage`)."
    )


def render_procedure(run: dict[str, Any], options: dict[str, Any]) -> str:
    """Work, time and machine of a finished training."""
    if "steps" not in run:
        return ""
    processes = f"{run['processes']} process{'es' if run['processes'] > 1 else ''}"
    work = f"{run['steps']:,} steps" if run["steps"] else "Solved for"
    return (
        f"{run['trainable']}. {work} in {run['train_seconds']:,.0f} s on {run['device']}, {processes}. "
        f"Seed {options['seed']}. Options:"
    )


def render_energy(energy: dict[str, Any] | None) -> str:
    """Electricity used by the training; empty if it was not measured."""
    if not energy:
        return ""
    parts = ", ".join(
        f"{part.upper()} {energy[f'{part}_kwh']:.3g}"
        for part in ("cpu", "gpu", "ram")
        if energy[f"{part}_kwh"]
    )
    return (
        f"Training took about {energy['kwh']:.3g} kWh of electricity ({parts}), as {energy['tracker']} "
        "estimated it for the whole machine (the first one, if there were more) while training ran."
    )


def license_note(model: dict[str, Any]) -> str:
    """Licence of the weights, as far as it is known."""
    name = model["license_name"] or model["license"]
    if name:
        return f"The weights it started from are under the licence {name}, which applies to these as well."
    if model["name"].startswith(SCRATCH):
        return "No licence was chosen for these weights; the data set's terms apply."
    return "The licence of the weights it started from is not known here: look it up before you use these."
