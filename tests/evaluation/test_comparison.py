"""hf_cifar.evaluation.comparison: two models on the same images."""

import dataclasses

import numpy as np
import pytest

from hf_cifar.cli import main
from hf_cifar.errors import UserError
from hf_cifar.evaluation.comparison import compare_predictions, compare_runs, render_comparison
from hf_cifar.evaluation.predictions import Predictions

NAMES = {0: "cat", 1: "dog", 2: "frog"}


def predictions(hits, split="test", seed=0):
    """Predictions for 100 images that are correct where `hits` [100] is True."""
    labels = np.random.default_rng(0).integers(0, 3, 100)
    predicted = np.where(hits, labels, (labels + 1) % 3)
    logits = np.random.default_rng(seed).random((100, 3)) + 3 * np.eye(3)[predicted]
    return Predictions(split, np.arange(100) * 7, labels, logits.astype(np.float32), NAMES)


def correct_in(*parts):
    return np.isin(np.arange(100) // 10, parts)


def test_images_that_only_one_model_gets_right_decide():
    first, second = predictions(correct_in(0, 1, 2, 3)), predictions(correct_in(2, 3, 4, 5, 6, 7))
    found = compare_predictions(first, second)
    assert (found["both_correct"], found["both_wrong"]) == (20, 20)
    assert (found["only_first_correct"], found["only_second_correct"]) == (20, 40)
    assert found["accuracy_difference"] == pytest.approx(0.2)
    low, high = found["accuracy_difference_interval"]
    assert 0 < low < 0.2 < high < 0.4
    assert found["mcnemar_p"] == pytest.approx(0.0135, abs=1e-4)  # binomtest(20, 60)
    assert render_comparison(found, ["a", "b"]).endswith("p = 0.013: b is better")
    swapped = compare_predictions(second, first)
    assert swapped["accuracy_difference"] == -found["accuracy_difference"]
    assert "p = 0.013: b is better" in render_comparison(swapped, ["b", "a"])


def test_equal_models_are_not_distinguished():
    found = compare_predictions(
        predictions(correct_in(0, 1)), predictions(correct_in(1, 2), seed=1)
    )
    assert found["mcnemar_p"] == 1.0 and found["accuracy_difference"] == 0
    assert "may be due to chance" in render_comparison(found, ["a", "b"])


def test_classes_of_different_sizes_are_compared_by_balanced_accuracy():
    """b loses 5 images of the large class and wins 6 of the two small ones."""
    labels = np.repeat([0, 1, 2], [90, 5, 5])
    predicted = labels.copy()
    predicted[90:] = 0
    better = labels.copy()
    better[:5] = 1
    better[[90, 91, 95, 96]] = 0

    def saved(chosen):
        logits = np.eye(3, dtype=np.float32)[chosen]
        return Predictions("test", np.arange(100), labels, logits, NAMES)

    found = compare_predictions(saved(predicted), saved(better))
    assert found["accuracy_difference"] == pytest.approx(0.01)
    assert found["balanced_accuracy_difference"] == pytest.approx((-5 / 90 + 3 / 5 + 3 / 5) / 3)
    low, high = found["balanced_accuracy_difference_interval"]
    assert 0 < low < 0.38 < high < 0.7
    text = render_comparison(found, ["a", "b"])
    assert "may be due to chance\nbalanced accuracy of b minus a: +0.3815 [" in text
    assert text.endswith("b is better")


def test_the_order_of_rows_does_not_matter():
    first, second = predictions(correct_in(0, 1, 2, 3)), predictions(correct_in(2, 3, 4))
    order = np.random.default_rng(1).permutation(100)
    shuffled = dataclasses.replace(
        second,
        row_ids=second.row_ids[order],
        labels=second.labels[order],
        logits=second.logits[order],
    )
    straight, mixed = compare_predictions(first, second), compare_predictions(first, shuffled)
    assert mixed["only_second_correct"] == straight["only_second_correct"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"id2label": {0: "a", 1: "b", 2: "c"}},
            "have different classes: cat, dog, frog and a, b, c",
        ),
        (
            {"row_ids": np.arange(100)},
            "different test images: 100 and 100, with 15 in common",
        ),
        ({"labels": np.zeros(100, int)}, "of 100 test images have different labels"),
    ],
)
def test_runs_on_other_images_are_refused(change, message):
    first = predictions(correct_in(0))
    with pytest.raises(UserError, match=message):
        compare_predictions(first, dataclasses.replace(first, **change))


def test_runs_are_compared_on_test_if_both_have_it(tmp_path, capsys):
    for name, splits in (("a", ("validation", "test")), ("b", ("validation",)), ("c", ("test",))):
        for split in splits:
            predictions(correct_in(0, 1), split).save(tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert compare_runs([a, c])["split"] == "test"
    assert compare_runs([a, b])["split"] == "validation"
    with pytest.raises(
        UserError, match=r"has predictions for validation, .* for test; run hf-cifar"
    ):
        compare_runs([b, c])
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert (
        "validation, 95% interval" in out
        and "in both: 20" in out
        and "0.2000 [0.1334, 0.2888]" in out
    )
    assert main(["compare", "--split", "test", a, b]) == 2
    assert "no predictions in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "takes the folders of two runs, not 1"),
        (["no-such-run", "."], "no folder no-such-run"),
        ([".", "."], ". and . are the same run; pass two different folders"),
        (["--spilt", "test", "a", "b"], "unknown option --spilt (nearest: --split)"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
