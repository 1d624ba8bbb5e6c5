"""Describe the facts of a run in sentences."""

from __future__ import annotations

from typing import Any

from hf_cifar.config.metrics import is_multi_label
from hf_cifar.config.model import SCRATCH
from hf_cifar.text import enumerated, render_numbers


def role_of(
    split: str, metrics: dict[str, Any], options: dict[str, Any], run: dict[str, Any]
) -> str:
    """Describe how a run used a split, since that determines how far its metrics can be trusted."""
    if split == "out_of_fold":
        return "Each image was predicted by a model that was not trained on it."
    if split == "test":
        return "Not read before the end of training; no choice depends on it."
    chosen = ["the checkpoint"] if options.get("load_best_model_at_end") else []
    chosen = ["the head's penalty"] if options.get("head_solver") == "lbfgs" else chosen
    chosen += ["whether to correct the biases"] * (options.get("class_balance") == "post_hoc")
    chosen += ["the learning rate"] if run.get("race") else []
    chosen += ["the temperature"] if "temperature" in metrics else []
    chosen += ["the thresholds of rejection"] if "kept" in metrics else []
    if is_multi_label(metrics) and options.get("calibrate"):
        chosen += ["each label's threshold"]
    combined = run.get("combined") or {}
    chosen += ["the runs of the soup"] if combined.get("method") == "greedy_soup" else []
    chosen += ["the views"] if combined.get("views_chosen") else []
    reasons = [f"it was used to choose {enumerated(chosen)}"] if chosen else []
    if (run.get("teacher") or {}).get("has_seen_validation"):
        reasons.append("the teacher may have been trained on it")
    if not reasons:
        return "Held out from training."
    biased = ", and ".join(reasons)
    return (
        f"Held out from training. {biased[0].upper()}{biased[1:]}, so its metrics are optimistic."
    )


def validation_source(run: dict[str, Any], options: dict[str, Any]) -> str:
    """Describe the origin of the validation images."""
    if run["source_splits"]["validation"] != run["source_splits"]["train"]:
        return "the data set's own validation split"
    seed = options["split_seed"]
    if options["streaming"]:
        return f"the first images held out by a hash of their bytes, split seed {seed}"
    return f"stratified, split seed {seed}"


def hashed(options: dict[str, Any]) -> str:
    """Describe the content of the split hash."""
    if options["streaming"]:
        return "SHA-256 of the row ids and labels of validation, and of the selection of train"
    return "SHA-256 of row ids and labels"


def render_skipped(run: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> str:
    """List the rows that were left out because their images cannot be read."""
    rows = dict(run.get("skipped_rows", {}))
    rows |= {name: own["skipped_rows"] for name, own in metrics.items() if "skipped_rows" in own}
    return "; ".join(
        f"{len(ids):,} of {name} (row{'s' if len(ids) > 1 else ''} {render_numbers(ids)})"
        for name, ids in rows.items()
    )


def render_doubted(run: dict[str, Any]) -> str:
    """Describe the rows left out by --clean_labels; empty without it."""
    found = run.get("doubted_rows")
    if not found:
        return ""
    total = found["num_rows"] + run["num_train"]
    return (
        f"{found['num_rows']:,} of {total:,} training images ({found['share']:.1%}), whose labels are "
        "probably wrong, by confident learning on out-of-fold predictions"
    )


def render_leakage(run: dict[str, Any]) -> str:
    """Describe the result of --check_leakage."""
    found = run.get("leakage")
    if not found:
        return ""
    return (
        f"Of {found['num_test']:,} test images, {found['num_leaked']:,} are also in train or validation, as "
        "exact or near duplicates (`--check_leakage`)."
    )


def render_procedure(run: dict[str, Any], options: dict[str, Any]) -> str:
    """Describe the steps, time and machine of a finished training."""
    if "combined" in run:
        return f"{describe_combined(run['combined'])} Options of the first run:"
    if "steps" not in run:
        return ""
    processes = f"{run['processes']} process{'es' if run['processes'] > 1 else ''}"
    race = f"{render_race(run)} " if run.get("race") else ""
    stored = (run.get("source") or {}).get("stored")
    if stored:
        race += (
            f"Continues the run {stored['run']}; {stored['num_train']:,} of its training images were stored "
            "and trained on again. "
        )
        if num_copies := sum(stored.get("copies", {}).values()):
            race += f"Left out of the new data: {num_copies:,} images that this run already has. "
    work = f"{run['steps']:,} steps" if run["steps"] else "Solved for"
    return (
        f"{run['trainable']}. {work} in {run['train_seconds']:,.0f} s on {run['device']}, {processes}. "
        f"{race}{render_teacher(run, options)}Seed {options['seed']}. Options:"
    )


def render_stored(run: dict[str, Any]) -> str:
    """Say which of the training images an update has from its run; empty for other runs."""
    stored = (run.get("source") or {}).get("stored")
    if not stored:
        return ""
    return (
        f" ({stored['num_train']:,} of them from the run {stored['run']}, whose validation images are "
        "included too)"
    )


def render_teacher(run: dict[str, Any], options: dict[str, Any]) -> str:
    """Describe the teacher of a distillation; empty without one."""
    teacher = run.get("teacher")
    if not teacher:
        return ""
    kind = "the run " if teacher["has_seen_validation"] is not None else ""
    return (
        f"Distilled from {kind}`{teacher['name']}`, whose probabilities at temperature "
        f"{options['distillation_temperature']:g} have a weight of {options['distillation_weight']:.0%} in "
        "the loss. "
    )


def describe_combined(combined: dict[str, Any]) -> str:
    """Describe how runs were combined into one."""
    runs, views = combined["runs"], combined["views"]
    named = f"{len(runs)} runs ({enumerated(runs)})" if len(runs) > 1 else f"the run {runs[0]}"
    seen = (
        f", over {len(views)} views of each image ({enumerated(views)})" if len(views) > 1 else ""
    )
    if combined["method"] == "ensemble":
        return f"Mean of the probabilities of {named}{seen}."
    what = f"One network with the mean of the weights of {named}"
    return f"{what}; mean of its probabilities{seen}." if seen else f"{what}."


def render_race(run: dict[str, Any]) -> str:
    """Describe the race that chose the learning rate; empty without one."""
    race = run.get("race")
    if not race:
        return ""
    steps = enumerated([str(rung["steps"]) for rung in race["rungs"]])
    return (
        f"The learning rate {race['learning_rate']:g} won a race of {len(race['rungs'][0]['rates'])} rates "
        f"({steps} steps, ranked by the loss on {race['num_images']:,} validation images), which cost "
        f"{race['share']:.1%} of the training."
    )


def render_prior(options: dict[str, Any], run: dict[str, Any], temperature: str) -> str:
    """Describe the class frequencies that the probabilities assume, if --class_balance changes them.

    temperature: as shown in the card; empty for none.
    """
    balance = options.get("class_balance", "none")
    if balance == "none":
        return ""
    if balance == "post_hoc" and not run.get("post_hoc", True):
        return (
            "The biases of the head are not corrected for class frequencies (`--class_balance post_hoc`), "
            "because that would lower the balanced accuracy on validation."
        )
    assumed = "that all classes are equally frequent, unlike in the training images"
    if balance == "effective":  # equalises only classes with fewer than about 1 / (1 - beta) images
        assumed = "class frequencies between equal ones and those of the training images"
    fitted = "; the temperature, fitted on validation without reweighting, does not change that"
    return f"Probabilities assume {assumed} (`--class_balance {balance}`){fitted if temperature else ''}."


def render_energy(energy: dict[str, Any] | None) -> str:
    """Describe the electricity used by the training; empty if it was not measured."""
    if not energy:
        return ""
    parts = ", ".join(
        f"{part.upper()} {energy[f'{part}_kwh']:.3g}"
        for part in ("cpu", "gpu", "ram")
        if energy[f"{part}_kwh"]
    )
    return (
        f"Training used about {energy['kwh']:.3g} kWh of electricity ({parts}), estimated by "
        f"{energy['tracker']} for the whole machine (of multiple machines, the first)."
    )


def license_note(model: dict[str, Any]) -> str:
    """Describe the licence of the weights."""
    name = model["license_name"] or model["license"]
    if name:
        return (
            f"The original weights are licensed under {name}, which also applies to these weights."
        )
    if model["name"].startswith(SCRATCH):
        return "No licence was chosen for these weights; the terms of the data set apply."
    return "The licence of the original weights is unknown: look it up before you use this model."
