import numpy as np
import pytest
import torch

from hf_cifar.explain.methods import grad_cam
from hf_cifar.explain.sanity import (
    STEPS,
    Check,
    Curves,
    curves_of_chance,
    curves_of_map,
    doubts,
    randomized,
    rank_correlation,
    summarize,
)


def probability(model, pixel_values, class_id):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits.softmax(dim=1)[0, class_id].item()


def test_curves_begin_and_end_at_the_image_and_the_mean_colour(planted):
    model, example = planted.model, planted.examples[0]
    curves = curves_of_map(model, example, planted.squares[0].float())
    whole = probability(model, example.pixel_values, example.class_id)
    grey = probability(model, torch.zeros_like(example.pixel_values), example.class_id)
    assert len(curves.deletion) == len(curves.insertion) == STEPS + 1
    assert curves.deletion[[0, -1]] == pytest.approx([whole, grey], abs=1e-5)
    assert curves.insertion[-1] == pytest.approx(whole, abs=1e-5)


def test_the_right_place_beats_chance_and_the_wrong_one_does_not(planted):
    right, wrong, chances = [], [], []
    for example, square in zip(planted.examples, planted.squares, strict=True):
        chances.append(curves_of_chance(planted.model, example))
        for checks, sign in ((right, 1), (wrong, -1)):
            curves = curves_of_map(planted.model, example, sign * square.float())
            checks.append(Check(curves, 0.0, False))
    best, worst = summarize(right, chances), summarize(wrong, chances)
    assert best["passed"] and not worst["passed"]
    assert best["verdict"] == (
        "beats a random order in deletion and insertion; changes with randomised weights"
    )
    assert worst["verdict"].startswith(
        "is not shown to beat a random order in deletion and insertion"
    )
    assert best["deletion"]["area"] < best["deletion"]["random_area"] < worst["deletion"]["area"]
    assert best["insertion"]["area"] > best["insertion"]["random_area"]
    low, high = best["deletion"]["interval"]
    assert 0 < low < best["deletion"]["gain"] < high


def test_maps_change_with_randomised_weights(planted):
    before = {name: value.clone() for name, value in planted.model.state_dict().items()}
    other = randomized(planted.model, planted.examples[0].pixel_values)
    found = [
        rank_correlation(grad_cam(planted.model, each), grad_cam(other, each))
        for each in planted.examples
    ]
    found = [each for each in found if each is not None]
    assert np.median(found) < 0.5
    for name, value in planted.model.state_dict().items():
        assert torch.equal(value, before[name])
    for old, new in zip(planted.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


def test_batch_norms_learn_the_statistics_of_randomised_weights():
    from networks import load

    other = randomized(load("scratch/test_resnet"), torch.randn(1, 3, 64, 64))
    logits = other(pixel_values=torch.randn(2, 3, 64, 64)).logits
    assert not other.training and bool(logits.isfinite().all())
    assert not torch.equal(logits[0], logits[1])


def test_rank_correlation_is_spearmans():
    ramp = torch.arange(12.0).view(3, 4)
    assert rank_correlation(ramp, ramp.exp()) == pytest.approx(1)
    assert rank_correlation(ramp, -ramp) == pytest.approx(-1)
    assert rank_correlation(ramp, torch.ones(3, 4)) is None


def test_doubts_are_in_words():
    low, high = np.linspace(0, 0.2, STEPS + 1), np.linspace(0.5, 0.9, STEPS + 1)
    chance = Curves(np.full(STEPS + 1, 0.4), np.full(STEPS + 1, 0.4))
    assert doubts(Check(Curves(low, high), 0.1, False), chance) == []
    assert doubts(Check(Curves(high, high), 0.1, False), chance) == [
        "no better than a random order in deletion"
    ]
    assert doubts(Check(Curves(low, high), 0.5, False), chance) == [
        "similar with randomised weights"
    ]
    assert doubts(Check(Curves(low, high), None, True), chance) == [
        "empty: no pixel supports the class"
    ]


def test_one_image_has_no_interval():
    curves = Curves(np.full(STEPS + 1, 0.2), np.full(STEPS + 1, 0.6))
    chance = Curves(np.full(STEPS + 1, 0.4), np.full(STEPS + 1, 0.4))
    facts = summarize([Check(curves, 0.7, False)], [chance])
    assert facts["deletion"]["interval"] is None
    assert facts["deletion"]["area"] == pytest.approx(0.2)
    assert "hardly changes with randomised weights" in facts["verdict"] and not facts["passed"]
