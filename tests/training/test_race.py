"""hf_cifar.training.race: which rates stay, what it costs, who wins, and that nothing else changes."""

import dataclasses
import itertools
import json
import math
import signal

import pytest
import torch
import yaml
from tiny import tiny_config, tiny_run
from transformers import TrainingArguments

from hf_cifar import ModelConfig, build_model, load_splits, plan_run
from hf_cifar.errors import UserError
from hf_cifar.runs.signals import Stopped
from hf_cifar.training import race
from hf_cifar.training.build import balanced_cross_entropy, build_trainer
from hf_cifar.training.race import (
    FACTORS,
    Race,
    RungResult,
    Sprinter,
    affordable_race,
    compressed_schedule,
    cost,
    horizon_of,
    rates_around,
    rungs_of,
    short_run,
)
from hf_cifar.training.schedules import build_schedule

LONG = ["--max_steps", "400", "--learning_rate", "auto", "--precision", "fp32"]
QUIET = ["--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false"]


@pytest.fixture(autouse=True)
def _short_races(monkeypatch):
    """Let runs of 400 steps race."""
    monkeypatch.setattr(race, "MIN_STEPS", 10)


def built(config):
    """The data, model, image processor of a run; the same weights each time."""
    splits = load_splits(config.data)
    torch.manual_seed(0)
    found = build_model(config.model, splits.id2label, multi_label=splits.multi_label)
    return (*found, splits)


def sprinter(folder, data, model, *flags):
    """A Trainer of short runs."""
    config = tiny_config(folder, data, model, *flags)
    network, processor, splits = built(config)
    plan = plan_run(config, network, processor, splits)
    short = dataclasses.replace(plan, config=short_run(plan.config, str(folder), 1e-3))
    return build_trainer(network, processor, splits, short, Sprinter)


@pytest.mark.parametrize(
    ("num_rates", "expected"),
    [(9, [(9, 5), (4, 10), (2, 20)]), (7, [(7, 5), (3, 10)]), (5, [(5, 5), (2, 10)]), (3, [(3, 5)])],
)  # fmt: skip
def test_the_worse_half_is_dropped_and_the_others_run_twice_as_long(num_rates, expected):
    assert rungs_of(num_rates, 5) == expected


def test_the_first_rung_has_forty_steps_or_there_is_no_race():
    """A tenth of 1,630 steps of 8 images is 1,304; 3 evaluations of 144 images leave 48 steps for 3 rates."""
    assert affordable_race(1630, 8, 144) == ([(3, 48)], 144)
    assert affordable_race(1300, 8, 144) == ([], 0)


def test_a_race_is_as_long_as_a_tenth_of_the_run_allows():
    """By hand: 6,250 steps of 64 images have a tenth of 40,000. Fifteen evaluations of 500 images, of which
    each counts a third, leave 37,500, and 25 times the first rung's steps of 64 images fit 23 times."""
    assert affordable_race(6250, 64, 5000, min_steps=10) == ([(9, 23), (4, 46), (2, 92)], 500)
    assert cost(rungs_of(9, 23), 64, 500) == pytest.approx(25 * 23 * 64 + 15 * 500 / 3)
    # A tenth of 1,304 steps of 8 images: 1,043.2. A fifth pays for 89 images in 7 evaluations, and the rest,
    # 835.5, for 11 times 9 steps.
    assert affordable_race(1304, 8, 144, min_steps=10) == ([(5, 11), (2, 22)], 89)


@pytest.mark.parametrize("batch", [1, 8, 64, 512])
@pytest.mark.parametrize("num_validation", [2, 144, 5000])
def test_a_race_never_costs_more_than_a_tenth(batch, num_validation):
    fewest = min(num_validation, race.JUDGING_IMAGES[0])
    raced = set()
    for run_steps in [*range(1, 9000, 37), 10**5]:
        rungs, num_images = affordable_race(
            run_steps, batch, num_validation, min_steps=race.MIN_STEPS
        )
        budget = run_steps * batch / 10
        shortest = {
            field: cost(rungs_of(field, race.MIN_STEPS), batch, fewest) for field in FACTORS
        }
        if not rungs:
            assert shortest[3] > (1 - race.JUDGING_SHARE) * budget
            continue
        (count, steps), *_ = rungs
        raced.add(count)
        assert steps >= race.MIN_STEPS and fewest <= num_images <= num_validation
        assert cost(rungs, batch, num_images) <= budget
        assert cost(rungs_of(count, steps + 1), batch, num_images) > budget  # none is left over
    assert raced == FACTORS.keys()


def test_rates_are_a_grid_around_the_default():
    rates = rates_around(2e-3, 9, 2.5)
    assert len(rates) == 9 and rates[4] == 2e-3 and rates == sorted(rates)
    for low, high in itertools.pairwise(rates):
        assert high / low == pytest.approx(2.5, rel=1e-2)
    assert rates_around(1.0, 3, 10.0) == [0.1, 1, 10]


def test_the_best_rate_of_the_last_rung_wins():
    first = RungResult(5, {1e-3: 2.0, 1e-2: 1.0, 1e-1: math.inf})
    last = RungResult(10, {1e-3: 0.7, 1e-2: 0.8})
    assert first.ranking(1e-2) == [1e-2, 1e-3, 1e-1]
    found = Race([first, last], 1e-2, 0.0923456, 144)
    assert found.winner == 1e-3
    assert json.loads(json.dumps(found.facts)) == {
        "learning_rate": 1e-3, "num_images": 144, "share": 0.0923,
        "rungs": [
            {"steps": 5, "rates": [1e-3, 1e-2, 1e-1], "losses": [2.0, 1.0, None]},
            {"steps": 10, "rates": [1e-3, 1e-2], "losses": [0.7, 0.8]},
        ],
    }  # fmt: skip


def test_of_rates_that_are_equally_good_the_one_nearest_to_the_default_wins():
    tied = RungResult(5, {1e-4: 0.7100, 1e-3: 0.7104, 1e-2: 0.7108, 1e-1: 0.75, 1.0: 0.0})
    assert tied.ranking(1e-3)[:2] == [1.0, 1e-3]
    assert tied.ranking(0.02)[1:3] == [1e-2, 1e-3]


@pytest.mark.parametrize(
    ("name", "options", "warmup"),
    [
        ("linear", None, 0.1), ("linear", None, 30), ("cosine", None, 0.0),
        ("step", {"decay_steps": 100}, 0.1), ("cosine_with_min_lr", {"min_lr": 1e-4}, 0.1),
    ],
)  # fmt: skip
def test_a_short_run_has_the_schedule_of_the_whole_one(name, options, warmup, tmp_path):
    """Every rate is that of the whole schedule at the middle of the ten steps that it stands for."""
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, warmup_steps=warmup)
    args.lr_scheduler_type, args.lr_scheduler_kwargs = name, options

    def rates(build, count):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
        schedule, found = build(optimizer), []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    whole = rates(lambda optimizer: build_schedule(args, optimizer, 300), 300)
    short = rates(lambda optimizer: compressed_schedule(args, optimizer, 30, 300), 30)
    assert short == pytest.approx(whole[5::10])
    assert rates(lambda optimizer: compressed_schedule(args, optimizer, 300, 300), 300) == whole


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_stays_at_its_peak(name, tmp_path, stripes, tiny_vit):
    schedule = ["--lr_scheduler_type", name, "--lr_scheduler_kwargs", '{"patience": 0}']
    config = tiny_config(tmp_path / "run", stripes, tiny_vit, *LONG, *schedule)
    plan = plan_run(config, *built(config))
    assert plan.race["learning_rate"] == plan.config.train.learning_rate
    assert plan.config.train.lr_scheduler_type == name
    trainer = sprinter(tmp_path / "run", stripes, tiny_vit, *schedule)
    trainer.loss_of(1e-3, 10)
    rates = compressed_schedule(trainer.args, torch.optim.SGD([torch.zeros(1)], lr=1e-3), 10, 100)
    assert [rates.lr_lambdas[0](step) for step in (0, 1, 9)] == [0.5, 1, 1]


def test_a_far_too_small_and_a_far_too_large_rate_lose(tmp_path, stripes, monkeypatch, caplog):
    """The default is good for stripes; a millionth of it learns nothing, a million times destroys."""
    monkeypatch.setattr(race, "FACTORS", {3: 1e6})
    caplog.set_level("INFO")
    config = tiny_config(
        tmp_path / "run", stripes, "scratch/article_cnn", "--image_size", "18", *LONG
    )
    model, processor, splits = built(config)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_run(config, model, processor, splits)
    (rung,) = plan.race["rungs"]
    low, middle, high = rung["rates"]
    assert plan.config.train.learning_rate == plan.race["learning_rate"] == middle
    assert high == pytest.approx(1e6 * middle) and low == pytest.approx(1e-6 * middle)
    assert plan.race["share"] <= 0.1
    # The request is kept, and so is the model, bit for bit.
    assert plan.requested.train.learning_rate == "auto"
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not (tmp_path / "run").exists()
    announced, losses, won = [m for m in caplog.messages if m.startswith("learning rate")]
    assert f"racing 3 rates from {low:g} to {high:g}: 3 for" in announced
    assert "8 validation images" in announced and "of the training" in announced
    assert f"{middle:g}: " in losses and won == f"learning rate: {middle:g} won the race"


def test_a_rate_that_diverges_loses_and_leaves_no_trace(tmp_path, stripes):
    flags = ["--optim", "sgd", "--max_grad_norm", "0", "--image_size", "18", "--precision", "fp32"]
    trainer = sprinter(tmp_path / "run", stripes, "scratch/article_cnn", *flags)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first = trainer.losses_of([0.05], 10)
    assert trainer.losses_of([1e30, 0.05], 10) == {1e30: math.inf, **first}
    assert first[0.05] < math.inf
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_short_runs_use_higher_rates_than_the_run_that_they_imitate(tmp_path, stripes, tiny_vit):
    trainer = sprinter(tmp_path / "run", stripes, tiny_vit, "--max_steps", "320")
    for steps, factor in ((10, 2.0), (320, 1.0)):  # 32 to the power of 0.2
        trainer.loss_of(1e-3, steps)
        assert trainer.args.learning_rate == pytest.approx(1e-3 * factor)
    trainer.horizon = 0.0
    assert trainer.boost(10) == 1.0


def test_only_new_weights_have_a_horizon():
    assert horizon_of(ModelConfig("scratch/article_cnn")) == race.HORIZON
    assert horizon_of(ModelConfig("bundled/efficientnet_lite0", freeze="backbone")) == race.HORIZON
    assert horizon_of(ModelConfig("bundled/efficientnet_lite0")) == 0.0


def test_all_rates_diverge(tmp_path, stripes, monkeypatch):
    monkeypatch.setattr(race, "FACTORS", {3: 1.1})
    monkeypatch.setattr("hf_cifar.plan.default_rate", lambda *_, **__: 900.0)
    flags = ["--optim", "sgd", "--max_grad_norm", "0", "--image_size", "18", *LONG]
    config = tiny_config(tmp_path / "run", stripes, "scratch/article_cnn", *flags)
    with pytest.raises(UserError, match=r"diverged at .*, 900, .*; pass a lower"):
        plan_run(config, *built(config))


def test_balanced_classes_count_the_same(tmp_path, stripes, tiny_vit):
    """Cross-entropy weighted by 1 / images, as a mean over images that have the shares of train."""
    flags = ["--imbalance_factor", "4", "--class_balance", "logit_adjustment"]
    config = tiny_config(tmp_path / "run", stripes, tiny_vit, *flags)
    model, _, splits = built(config)
    labels = torch.from_numpy(splits.train.labels)
    logits = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = torch.stack([losses[labels == label].mean() for label in (0, 1)]).mean()
    found = balanced_cross_entropy(model, splits.train, config.train)(logits, labels)
    torch.testing.assert_close(found, expected)


def test_the_race_is_ranked_by_that_loss(tmp_path, stripes, tiny_vit, monkeypatch):
    monkeypatch.setattr(
        race, "balanced_cross_entropy", lambda *_: lambda logits, labels: logits.sum() * 0 + 7
    )
    config = tiny_config(tmp_path / "run", stripes, tiny_vit, *LONG)
    rungs = plan_run(config, *built(config)).race["rungs"]
    assert {loss for rung in rungs for loss in rung["losses"]} == {7}


def test_labels_of_any_number(tmp_path, lights, tiny_vit):
    config = tiny_config(tmp_path / "run", lights, tiny_vit, *LONG)
    plan = plan_run(config, *built(config))
    (rung,) = plan.race["rungs"]
    best = min(rung["losses"])
    assert plan.config.train.learning_rate == rung["rates"][rung["losses"].index(best)]
    assert best < math.log(2)  # of a model that says 0.5 everywhere


def test_heads_race_on_features(tmp_path, stripes, tiny_vit):
    config = tiny_config(tmp_path / "run", stripes, tiny_vit, *LONG, "--freeze", "backbone")
    model, processor, splits = built(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_run(config, model, processor, splits)
    (rung,) = plan.race["rungs"]
    assert len(set(rung["losses"])) == len(rung["rates"]) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_the_run_equals_one_with_the_rate_by_hand(tmp_path, stripes, tiny_vit):
    raced, by_hand = tmp_path / "raced", tmp_path / "by_hand"
    tiny_run(raced, stripes, tiny_vit, *LONG, *QUIET)
    rate = yaml.safe_load((raced / "config.yaml").read_text())["learning_rate"]
    assert isinstance(rate, float)
    tiny_run(by_hand, stripes, tiny_vit, *LONG, *QUIET, "--learning_rate", str(rate))
    weights = [(each / "model.safetensors").read_bytes() for each in (raced, by_hand)]
    assert weights[0] == weights[1]
    facts = [json.loads((each / "run.json").read_text()) for each in (raced, by_hand)]
    assert facts[0]["race"]["learning_rate"] == rate and facts[1]["race"] is None
    assert facts[0]["history"][0]["loss"] == facts[1]["history"][0]["loss"]
    assert json.loads((raced / "race.json").read_text()) == facts[0]["race"]
    assert not (by_hand / "race.json").exists()
    card = (raced / "README.md").read_text()
    assert f"The learning rate {rate:g} won a race of 3 rates" in card
    assert "used to choose the learning rate and the temperature" in card


@pytest.mark.slow
def test_a_resumed_run_keeps_the_rate(tmp_path, stripes, tiny_vit, caplog):
    caplog.set_level("INFO")
    steps = ["--save_strategy", "steps", "--save_steps", "200"]
    tiny_run(tmp_path / "run", stripes, tiny_vit, *LONG, *steps)
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").unlink()
    assert "racing" in caplog.text
    caplog.clear()
    tiny_run(
        tmp_path / "run", stripes, tiny_vit, *LONG, *steps, "--max_steps", "402",
        "--resume_from_checkpoint", "last",
    )  # fmt: skip
    assert "racing" not in caplog.text
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert again == {**options, "max_steps": 402}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["race"] == facts["race"]


def test_a_run_that_is_too_short_says_what_it_does(tmp_path, stripes, tiny_vit, caplog):
    caplog.set_level("INFO")
    config = tiny_config(tmp_path / "run", stripes, tiny_vit, "--learning_rate", "auto")
    plan = plan_run(config, *built(config))
    default = plan.config.train.learning_rate
    assert plan.race is None
    line = (
        f"the default {default:g}, because a tenth of 18 steps is too short to race 3 rates for 10"
    )
    assert line in caplog.text


def test_a_run_too_short_for_an_optimiser_without_a_default_is_refused(tmp_path, stripes, tiny_vit):
    flags = ["--learning_rate", "auto", "--optim", "adadelta", "--max_steps", "400"]
    config = tiny_config(tmp_path / "run", stripes, tiny_vit, *flags)
    with pytest.raises(UserError, match=r"400 steps is too short to race 9 rates .* pass a number"):
        plan_run(config, *built(config))


def test_what_cannot_race_is_refused_at_once(tmp_path, shards, stripes, tiny_vit):
    with pytest.raises(UserError, match="lbfgs has no learning rate"):
        tiny_config(
            tmp_path / "run", stripes, tiny_vit, "--learning_rate", "auto", "--freeze", "backbone",
            "--head_solver", "lbfgs",
        )  # fmt: skip
    stream = ["--streaming", "--max_eval_samples", "8", "--learning_rate", "auto"]
    with pytest.raises(UserError, match="auto cannot be combined with --streaming"):
        tiny_run(tmp_path / "run", shards, tiny_vit, *stream)
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_the_race_and_saves_nothing(tmp_path, stripes, tiny_vit, monkeypatch):
    """The signal arrives in a step; the run ends after it, and the next attempt starts anew."""
    trainer = sprinter(tmp_path / "run", stripes, tiny_vit, "--precision", "fp32")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    loss = trainer.loss

    def interrupted(logits, labels):
        if trainer.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(logits, labels)

    monkeypatch.setattr(trainer, "loss", interrupted)
    with pytest.raises(Stopped):
        trainer.losses_of([1e-3], 10)
    assert trainer.state.global_step == 4
    assert not list(tmp_path.rglob("checkpoint-*"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
