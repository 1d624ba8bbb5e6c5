"""hf_cifar.evaluation.evaluate_metrics: every metric equals scikit-learn's."""

from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import metrics as sk

from hf_cifar.config.metrics import metrics_of
from hf_cifar.errors import UserError
from hf_cifar.evaluation.evaluate_metrics import (
    compute_training_metrics,
    evaluate_metric,
    takes_class_ids,
)
from hf_cifar.evaluation.multi_label import MultiLabel
from hf_cifar.evaluation.predictions import compute_metrics
from hf_cifar.evaluation.single_label import SingleLabel

CLOSE = {"rel": 0, "abs": 1e-9}
SCORES = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}


def calibration_error_by_a_loop(probabilities, labels, groups):
    """Compute the ECE over groups of images, each an array of positions."""
    right, sure = probabilities.argmax(axis=1) == labels, probabilities.max(axis=1)
    gaps = [len(group) * abs(right[group].mean() - sure[group].mean()) for group in groups]
    return sum(gaps) / len(labels)


def expected_single_label(logits, labels):
    answers, scores = logits.argmax(axis=1), softmax(logits, axis=1)
    sure = scores.max(axis=1)
    of_width = [np.flatnonzero(np.ceil(sure * 15) == number) for number in range(1, 16)]
    one_versus_rest = {"multi_class": "ovr", "average": "macro"}
    return {
        "accuracy": sk.accuracy_score(labels, answers),
        "top_5_accuracy": sk.top_k_accuracy_score(labels, scores, k=5),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, answers),
        "matthews": sk.matthews_corrcoef(labels, answers),
        "roc_auc_macro": sk.roc_auc_score(labels, scores, **one_versus_rest),
        "average_precision_macro": sk.average_precision_score(labels, scores),
        "cross_entropy": sk.log_loss(labels, scores),
        "brier": 8 * sk.mean_squared_error(np.eye(8)[labels], scores),
        "ece": calibration_error_by_a_loop(scores, labels, [g for g in of_width if len(g)]),
        "ece_equal_mass": calibration_error_by_a_loop(
            scores, labels, np.split(np.argsort(sure), 15)
        ),
        **{
            f"{name}_{mean}": score(labels, answers, average=mean, zero_division=0)
            for name, score in SCORES.items()
            for mean in ("macro", "weighted")
        },
    }


def expected_multi_label(logits, labels):
    scores = expit(logits)
    answers = scores >= 0.5
    return {
        "accuracy": sk.accuracy_score(labels, answers),
        "roc_auc_macro": sk.roc_auc_score(labels, scores),
        "average_precision_macro": sk.average_precision_score(labels, scores),
        "cross_entropy": np.mean(
            [sk.log_loss(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]
        ),
        **{
            f"{name}_{mean}": score(labels, answers, average=mean, zero_division=0)
            for name, score in SCORES.items()
            for mean in ("micro", "macro", "weighted")
        },
    }


def multi_label_draw(count=300):
    generator = np.random.default_rng(0)
    labels = (generator.random((count, 4)) < (0.1, 0.2, 0.4, 0.6)).astype(int)
    return generator.normal(size=(count, 4)) + 2.0 * labels - 1, labels


@pytest.mark.parametrize("name", metrics_of(multi_label=False))
def test_single_label_metrics_equal_sklearn(name, draw):
    logits, labels = draw("plain")
    predictions = logits.argmax(axis=1) if takes_class_ids(name, multi_label=False) else logits
    metric = evaluate_metric(name)()
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    found = metric.compute(predictions=predictions, references=labels)
    assert found == {name: pytest.approx(expected_single_label(logits, labels)[name], **CLOSE)}
    names = {label: str(label) for label in range(8)}
    assert found[name] == compute_metrics(logits, labels, names)[name]


@pytest.mark.parametrize("name", metrics_of(multi_label=True))
def test_multi_label_metrics_equal_sklearn(name):
    logits, labels = multi_label_draw()
    found = evaluate_metric(name, multi_label=True)().compute(predictions=logits, references=labels)
    assert found == {name: pytest.approx(expected_multi_label(logits, labels)[name], **CLOSE)}


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "roc_auc_macro"])
def test_metrics_add_up_over_batches(name, drawn):
    predictions = drawn.predictions if takes_class_ids(name, multi_label=False) else drawn.logits
    whole = evaluate_metric(name)().compute(predictions=predictions, references=drawn.labels)
    metric = evaluate_metric(name)()
    for start in range(0, len(drawn.labels), 64):
        part = slice(start, start + 64)
        metric.add_batch(predictions=predictions[part], references=drawn.labels[part])
    assert metric.compute() == whole


def test_metrics_of_the_same_inputs_can_be_combined(drawn):
    both = evaluate.combine([evaluate_metric("accuracy")(), evaluate_metric("matthews")()])
    found = both.compute(predictions=drawn.predictions, references=drawn.labels)
    assert set(found) == {"accuracy", "matthews"}


def test_unknown_metric_is_refused():
    with pytest.raises(UserError, match=r"unknown metric 'accurcy' \(nearest: accuracy\)"):
        evaluate_metric("accurcy")
    with pytest.raises(UserError, match="unknown metric 'brier'"):
        evaluate_metric("brier", multi_label=True)


def test_single_label_training_metrics(drawn):
    logits = drawn.logits.astype(np.float32)
    found = compute_training_metrics(SimpleNamespace(predictions=logits, label_ids=drawn.labels))
    assert list(found) == ["accuracy", "balanced_accuracy", "cross_entropy"]
    outcome = SingleLabel(logits, drawn.labels)
    assert found == {name: outcome.metric(name) for name in found}


def test_multi_label_training_metrics_use_a_threshold_of_one_half():
    logits, labels = multi_label_draw()
    found = compute_training_metrics(SimpleNamespace(predictions=logits, label_ids=labels))
    assert set(found) == {"accuracy", "f1_macro", "average_precision_macro", "cross_entropy"}
    outcome = MultiLabel(logits, labels, thresholds=np.full(4, 0.5))
    assert found == {name: outcome.metric(name) for name in found}
    nothing = SimpleNamespace(predictions=logits, label_ids=0 * labels)
    assert compute_training_metrics(nothing)["average_precision_macro"] == 0
