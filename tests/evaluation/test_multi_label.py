"""hf_cifar.evaluation.multi_label: every metric against scikit-learn, thresholds against a search."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from hf_cifar.cli import main
from hf_cifar.errors import UserError
from hf_cifar.evaluation.comparison import compare_predictions, render_comparison
from hf_cifar.evaluation.multi_label import MultiLabel, binary_log_losses, fit_thresholds
from hf_cifar.evaluation.predictions import Predictions, compute_metrics, metric_intervals
from hf_cifar.evaluation.tables import render_metrics

NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "bee"}
THRESHOLDS = np.array([0.5, 0.3, 0.7, 0.4])


def expit(logits):
    return special.expit(np.float64(logits))


def draw(count=300, seed=0, ties=False):
    """Logits and labels [N, 4] of classes from rare to common; some images have none."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((count, 4)) < (0.05, 0.2, 0.4, 0.6)).astype(np.uint8)
    logits = generator.normal(size=(count, 4)) + 2.0 * labels - 1
    return (np.round(logits) if ties else logits).astype(np.float32), labels


def predictions(seed=0, split="test", **changes):
    logits, labels = draw()
    logits = logits + np.random.default_rng(seed).normal(size=logits.shape).astype(np.float32)
    made = Predictions(split, np.arange(300) * 3, labels, logits, NAMES, thresholds=THRESHOLDS)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_agree_with_scikit_learn(ties):
    logits, labels = draw(ties=ties)
    found = compute_metrics(logits, labels, NAMES, THRESHOLDS)
    scores = expit(logits)
    given = scores >= THRESHOLDS
    wanted = {
        "accuracy": sk.accuracy_score(labels, given),
        "roc_auc_macro": sk.roc_auc_score(labels, scores),
        "average_precision_macro": sk.average_precision_score(labels, scores),
        "cross_entropy": np.mean(
            [sk.log_loss(labels[:, k], scores[:, k]) for k in range(4)]  # one class at a time
        ),
    }
    for how in ("micro", "macro", "weighted"):
        wanted[f"precision_{how}"] = sk.precision_score(labels, given, average=how)
        wanted[f"recall_{how}"] = sk.recall_score(labels, given, average=how)
        wanted[f"f1_{how}"] = sk.f1_score(labels, given, average=how)
    assert set(found) == {"num_images", "per_class", *wanted}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    for k, name in NAMES.items():
        one = found["per_class"][name]
        assert (one["num_images"], one["threshold"]) == (labels[:, k].sum(), THRESHOLDS[k])
        assert one["f1"] == pytest.approx(sk.f1_score(labels[:, k], given[:, k]), abs=1e-9)
        area = sk.average_precision_score(labels[:, k], scores[:, k])
        assert one["average_precision"] == pytest.approx(area, abs=1e-9)


def test_cross_entropy_stays_finite_for_certain_and_wrong_scores():
    losses = binary_log_losses(np.array([[900.0, -900.0]]), np.array([[0, 1]]))
    np.testing.assert_allclose(losses, [900])


def test_calibration_fits_the_thresholds():
    logits, labels = draw()
    fitted = MultiLabel(logits, labels).calibrate()["thresholds"]
    np.testing.assert_array_equal(fitted, fit_thresholds(expit(logits), labels))
    before, after = (MultiLabel(logits, labels, thresholds=t) for t in (None, fitted))
    assert after.metric("f1_macro") > before.metric("f1_macro")


def test_class_without_images_has_no_area_and_is_not_in_the_mean():
    logits, labels = draw()
    labels[:, 0], logits[:, 0] = 0, -9
    found = compute_metrics(logits, labels, NAMES, THRESHOLDS)
    assert found["per_class"]["cat"]["average_precision"] is None
    rest = sk.average_precision_score(labels[:, 1:], expit(logits)[:, 1:])
    assert found["average_precision_macro"] == pytest.approx(rest, abs=1e-9)
    given = expit(logits)[:, 1:] >= THRESHOLDS[1:]
    assert found["f1_macro"] == pytest.approx(sk.f1_score(labels[:, 1:], given, average="macro"))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_maximise_f1(ties, seed):
    logits, labels = draw(60, seed, ties)
    labels[0] = 1
    scores = expit(logits)
    thresholds = fit_thresholds(scores, labels)
    for k in range(4):
        given = scores[:, k, None] >= np.append(thresholds[k], scores[:, k])
        truth = labels[:, k, None]
        f1 = 2 * (given & truth).sum(axis=0) / (given.sum(axis=0) + truth.sum())
        assert f1[0] == pytest.approx(f1.max())
        assert not np.isin(thresholds[k], scores[:, k])  # so that rounding does not matter


def test_threshold_is_halfway_between_scores_and_one_half_without_images():
    scores = np.array([[0.9, 0.2], [0.7, 0.1], [0.1, 0.3]])
    np.testing.assert_allclose(
        fit_thresholds(scores, np.array([[1, 0], [1, 0], [0, 0]])), [0.4, 0.5]
    )
    # Every image has the class, whatever its score.
    np.testing.assert_allclose(fit_thresholds(scores, np.ones((3, 2), int)), [0.05, 0.05])


def test_every_metric_is_in_its_interval():
    found = predictions().metrics
    intervals = found["intervals"]
    single = {k for k, v in found.items() if not isinstance(v, dict)} - {"num_images"}
    assert set(intervals) == {*single, "per_class"}
    for name in single:
        low, high = intervals[name]
        assert low <= found[name] <= high and high - low < 0.2, name
    for name, own in found["per_class"].items():
        assert set(intervals["per_class"][name]) == set(own) - {"num_images", "threshold"}
        for key, (low, high) in intervals["per_class"][name].items():
            assert low <= own[key] <= high, (name, key)


def test_intervals_are_deterministic_and_none_if_undefined():
    logits, labels = draw()
    labels[:, 0] = 0
    first, second = (
        metric_intervals(logits, labels, NAMES, THRESHOLDS, draws=200) for _ in range(2)
    )
    assert first == second
    assert first["per_class"]["cat"]["roc_auc"] is None
    assert metric_intervals(logits, labels, NAMES, THRESHOLDS, 200, seed=1) != first


def test_intervals_have_their_nominal_coverage():
    """F1, mAP and cross-entropy of many samples of one population."""
    wide, wide_labels = draw(100_000, seed=99)
    truth = compute_metrics(wide, wide_labels, NAMES, THRESHOLDS)
    names = ("accuracy", "f1_micro", "f1_macro", "average_precision_macro", "cross_entropy")
    held = dict.fromkeys(names, 0)
    for seed in range(60):
        found = metric_intervals(*draw(200, seed), NAMES, THRESHOLDS, draws=100)
        for name in names:
            held[name] += found[name][0] <= truth[name] <= found[name][1]
    # 95% minus three standard deviations for 60 samples, and the bias of an area of ten images.
    assert all(count >= 50 for count in held.values()), held


def test_a_saved_file_gives_the_same_metrics_and_is_a_data_set(tmp_path):
    made = predictions()
    made.save(tmp_path)
    loaded = Predictions.load(tmp_path, "test")
    for name in ("row_ids", "labels", "logits", "thresholds"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))
        assert getattr(loaded, name).dtype == getattr(made, name).dtype
    assert loaded.metrics == made.metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test": made.metrics}
    rows = datasets.Dataset.from_parquet(
        str(tmp_path / "predictions" / "test.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert rows.features["label"] == datasets.List(datasets.ClassLabel(names=list(NAMES.values())))
    assert rows[5]["label"] == np.flatnonzero(made.labels[5]).tolist()


def test_default_threshold_is_one_half():
    plain = predictions(thresholds=None)
    assert plain.metrics == predictions(thresholds=np.full(4, 0.5)).metrics
    given = plain.logits >= 0
    np.testing.assert_array_equal(plain.correct, (given == plain.labels).all(axis=1))


def test_tables_show_thresholds_and_averages():
    table = render_metrics({"test": predictions().metrics})
    assert "f1_micro" in table and "average_precision_macro" in table
    assert (
        next(line for line in table.splitlines() if line.startswith("dog")).split()[2] == "0.3000"
    )


def test_runs_are_compared_by_images_with_all_labels_correct(tmp_path, capsys):
    first, second = predictions(seed=1), predictions(seed=2)
    found = compare_predictions(first, second)
    assert found["only_first_correct"] == (first.correct & ~second.correct).sum()
    assert found["first"]["accuracy"] == first.correct.mean()
    text = render_comparison(found, ["a", "b"])
    assert "average_precision_macro" in text and "brier" not in text
    for folder, made in (("a", first), ("b", second)):
        made.save(tmp_path / folder)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "in neither" in capsys.readouterr().out


def test_single_label_run_is_not_compared_with_a_multi_label_run():
    several = predictions()
    one = dataclasses.replace(several, labels=several.labels.argmax(axis=1), thresholds=None)
    with pytest.raises(UserError, match="have different labels"):
        compare_predictions(several, one)
