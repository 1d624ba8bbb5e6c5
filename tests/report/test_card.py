"""hf_cifar.report.card: the model card, from the files of a run."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, card_errors
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_cifar.errors import UserError
from hf_cifar.hub.push import CARD_FILE, check_card
from hf_cifar.report.card import (
    MAX_CLASSES,
    CardFacts,
    card_for,
    is_untouched,
    load_card,
    render_card,
    render_eval_results,
    save_card,
)

OPTIONS = {
    "dataset_name": "uoft-cs/cifar10", "dataset_config_name": None, "model_name_or_path": "google/vit",
    "split_seed": 7, "streaming": False, "max_eval_samples": None, "flip": 0.5, "freeze": "backbone",
    "output_dir": "outputs/vit", "hub_model_id": "me/vit", "seed": 11, "learning_rate": 0.00123,
    "load_best_model_at_end": True,
}  # fmt: skip
MODEL = {
    "name": "google/vit", "hub_id": "google/vit", "license": "apache-2.0", "license_name": None,
    "license_link": None, "citations": ["@article{vit}"],
}  # fmt: skip
DATASET = {
    "name": "uoft-cs/cifar10", "hub_id": "uoft-cs/cifar10", "license": None, "license_name": None,
    "license_link": None, "citations": ["@techreport{cifar}"],
}  # fmt: skip
KNOWN = {
    "repo_id": "me/vit", "model": MODEL, "dataset": DATASET,
    "split_hash": "5f" * 32, "num_train": 45000, "num_validation": 5000,
    "source_splits": {"train": "train", "validation": "train"},
    "environment": {"torch": "9.9.9", "hf-cifar": "0.1.0", "commit": "abc123"},
}  # fmt: skip
RUN = KNOWN | {
    "train_seconds": 12.4, "steps": 1500, "trainable": "330 of 9,876 parameters are trainable",
    "device": "CPU (3 cores)", "processes": 2, "energy": None,
}  # fmt: skip
NAMES = ["cat", "dog", "ship"]
PER_CLASS = {
    "cat": {"num_images": 600, "precision": 0.6, "recall": 0.5, "f1": 0.5455, "roc_auc": 0.9},
    "dog": {"num_images": 600, "precision": 0.7, "recall": 0.8, "f1": 0.7467, "roc_auc": 0.9},
    "ship": {"num_images": 34, "precision": 1.0, "recall": 1.0, "f1": 1.0, "roc_auc": None},
}
METRICS = {
    "validation": {"num_images": 10, "accuracy": 0.8, "f1_macro": 0.75, "roc_auc_macro": None,
                   "cross_entropy": 0.61, "ece": 0.05, "intervals": {"accuracy": [0.49, 0.943]}},
    "test": {"num_images": 1234, "accuracy": 0.7654321, "f1_macro": 0.5, "roc_auc_macro": 0.875,
             "cross_entropy": 0.9, "ece": 0.02, "ece_uncalibrated": 0.07, "cross_entropy_uncalibrated": 1.1,
             "temperature": 1.2345, "per_class": PER_CLASS,
             "intervals": {"accuracy": [0.741, 0.788], "per_class": {"cat": {"recall": [0.46, 0.54]}}},
             "confusion_matrix": [[300, 290, 10], [120, 480, 0], [0, 0, 34]]},
}  # fmt: skip
FACTS = CardFacts("me/vit", OPTIONS, RUN, METRICS, NAMES)


def changed(**changes):
    """FACTS with other options, run facts or fields, by name."""
    fields = {name: changes.pop(name) for name in list(changes) if name in FACTS.__dict__}
    options = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
    options, run = OPTIONS | options, RUN | changes
    return dataclasses.replace(FACTS, **{"options": options, "run": run, **fields})


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with the files that the card needs."""
    folder = tmp_path / "run 7"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(OPTIONS))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    labels = {"10": "x", "2": "ship", "0": "cat", "1": "dog"}
    (folder / "config.json").write_text(json.dumps({"id2label": labels}))
    save_card(folder)
    return folder


def section(text, title):
    return re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)[1]


def test_card_has_every_section_and_no_gaps():
    text = render_card(FACTS)
    assert card_errors(text) == []
    check_card(text)
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert titles == [
        "How to use", "Results", "Calibration", "Per class", "Known weaknesses", "Data", "Training",
        "Intended use and limits", "Environment", "Citation",
    ]  # fmt: skip
    assert all(section(text, title).strip() for title in titles if title != "Results")
    assert not re.search(r"None|Undefined|\n\n\n|\{\{|more information", text, re.IGNORECASE)


def test_results_of_validation_and_test_are_separate_with_intervals():
    text = render_card(FACTS)
    assert "0.7654 [0.7410, 0.7880], on 1,234 images**" in text
    test, validation = section(text, "Test"), section(text, "Validation")
    assert test.startswith("\n1,234 images. ")
    assert "| accuracy | 0.7654 | 0.7410 to 0.7880 |" in test
    assert "| f1_macro | 0.5000 | - |" in test and "0.8000" not in test
    assert validation.startswith("\n10 images. ") and "the checkpoint" in validation
    assert "| accuracy | 0.8000 | 0.4900 to 0.9430 |" in validation
    assert "| roc_auc_macro | - | - |" in validation


def test_calibration_shows_before_and_after():
    text = section(render_card(FACTS), "Calibration")
    assert "divided by 1.234" in text and "| test | ece | 0.0700 | 0.0200 |" in text
    assert "| test | cross_entropy | 1.1000 | 0.9000 |" in text
    plain = {"validation": METRICS["validation"]}
    assert "## Calibration" not in render_card(changed(metrics=plain))


@pytest.mark.parametrize(
    "balance", ["oversample", "undersample", "weights", "effective", "logit_adjustment"]
)
def test_the_card_says_which_class_shares_the_probabilities_assume(balance):
    options = OPTIONS | {"class_balance": balance}
    limits = section(render_card(changed(options=options)), "Intended use and limits")
    (line,) = [line for line in limits.splitlines() if line.startswith("- Probabilities assume")]
    assert (
        f"(`--class_balance {balance}`); the temperature, fitted on validation without reweighting, does not"
        in line
    )
    assert ("equally frequent" in line) == (balance != "effective")
    uncalibrated = changed(options=options, metrics={"validation": METRICS["validation"]})
    assert f"(`--class_balance {balance}`)." in render_card(uncalibrated)
    none = changed(options=OPTIONS | {"class_balance": "none"})
    assert "Probabilities assume" not in render_card(none) + render_card(FACTS)


def test_the_card_says_whether_the_biases_were_corrected():
    options = OPTIONS | {"class_balance": "post_hoc"}
    for applied in (True, False):
        card = render_card(changed(options=options, post_hoc=applied))
        limits = section(card, "Intended use and limits")
        assert ("Probabilities assume that all classes are equally frequent" in limits) == applied
        assert ("The biases of the head are not corrected" in limits) != applied
        assert "whether to correct the biases" in card


def test_the_card_counts_doubted_rows():
    doubted = {"num_rows": 1200, "share": 0.2, "row_ids": [], "labels": [], "suggested": []}
    text = section(render_card(changed(doubted_rows=doubted, num_train=4800)), "Data")
    assert "4,800 training images" in text
    assert (
        "Left out of training (`--clean_labels`): 1,200 of 6,000 training images (20.0%), " in text
    )
    assert "clean_labels" not in section(render_card(changed(doubted_rows=None)), "Data")


def test_classes_and_weaknesses_are_from_the_last_split():
    text = render_card(FACTS)
    assert "| cat | 600 | 0.6000 | 0.5000 [0.4600, 0.5400] | 0.5455 |" in section(text, "Per class")
    weak = section(text, "Known weaknesses")
    assert "On test, the classes with the lowest F1 are cat (0.5455), dog (0.7467)." in weak
    assert weak.index("| cat | dog | 290 | 48.3% |") < weak.index("| dog | cat | 120 | 20.0% |")


def test_only_the_weakest_of_many_classes_are_listed():
    names = [f"class {i}" for i in range(200)]
    per_class = {
        name: {"num_images": 5, "precision": 0.5, "recall": 0.5, "f1": i / 200}
        for i, name in enumerate(names)
    }
    metrics = {"num_images": 1000, "accuracy": 0.5, "per_class": per_class}
    text = render_card(changed(metrics={"test": metrics}, class_names=names))
    table = section(text, "Per class")
    assert table.count("\n| class ") == MAX_CLASSES + 1 and f"{MAX_CLASSES} of 200 classes" in table
    assert "| class 49 |" in table and "| class 50 |" not in table
    assert "class 19 and 180 more." in text and "class 20," not in text


def test_data_and_procedure_are_from_the_run():
    text = render_card(FACTS)
    data = section(text, "Data")
    assert (
        "[uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10): 45,000 training"
        in data
    )
    assert "5,000 validation" in data and "stratified, split seed 7" in data and "5f" * 32 in data
    training = section(text, "Training")
    assert (
        "330 of 9,876 parameters are trainable. 1,500 steps in 12 s on CPU (3 cores), 2 processes. Seed 11"
        in training
    )
    for name in ("learning_rate", "freeze", "flip"):
        assert f"| `{name}` | `{OPTIONS[name]}` |" in training
    assert "| torch | 9.9.9 |" in text and "| commit | abc123 |" in text
    assert all(
        entry in section(text, "Citation")
        for entry in ("@article{vit}", "@techreport{cifar}", "version = {0.1.0}")
    )


def test_solved_head_has_no_steps_and_a_chosen_penalty():
    text = render_card(
        dataclasses.replace(changed(steps=0), options=OPTIONS | {"head_solver": "lbfgs"})
    )
    assert "trainable. Solved for in 12 s on CPU" in text
    assert "the head's penalty" in section(text, "Validation")


def test_validation_source_may_be_the_data_set_or_a_stream():
    own = {"train": "train", "validation": "validation"}
    text = section(render_card(changed(source_splits=own)), "Data")
    assert "the data set's own validation split" in text and "split seed" not in text
    text = section(render_card(changed(streaming=True)), "Data")
    assert "hash of their bytes" in text and "split seed 7" in text and "of train" in text


def test_energy_is_shown_only_if_measured():
    assert "## Energy" not in render_card(FACTS)
    energy = {
        "kwh": 0.01234,
        "cpu_kwh": 0.01,
        "gpu_kwh": 0.0,
        "ram_kwh": 0.00234,
        "tracker": "codecarbon 3.3",
    }
    text = section(render_card(changed(energy=energy)), "Energy")
    assert "0.0123 kWh" in text and "(CPU 0.01, RAM 0.00234)" in text and "codecarbon 3.3" in text


def test_metadata_link_only_to_the_hub():
    data = ModelCard(render_card(FACTS)).data
    assert (data.base_model, data.base_model_relation) == ("google/vit", "finetune")
    assert (data.license, data.pipeline_tag, data.library_name) == (
        "apache-2.0",
        "image-classification",
        "transformers",
    )
    assert data.datasets == ["uoft-cs/cifar10"]
    assert {r.dataset_split: r.metric_value for r in data.eval_results} == {
        "validation": 0.8,
        "test": 0.765432,
    }
    here = {"hub_id": None, "license": None}
    local = changed(
        model=MODEL | here | {"name": "my_model"}, dataset=DATASET | here | {"name": "my_birds"}
    )
    text = render_card(local)
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None and data.license is None
    assert "`my_model`, fine-tuned for the 3 classes of `my_birds`: cat, dog, ship." in text
    assert "unknown" in section(text, "Intended use and limits")


def test_custom_licence_keeps_its_name():
    model = MODEL | {
        "license": "other",
        "license_name": "dinov3-license",
        "license_link": "https://example.org/l",
    }
    text = render_card(changed(model=model))
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "dinov3-license",
        "https://example.org/l",
    )
    assert "dinov3-license" in section(text, "Intended use and limits") and card_errors(text) == []


def test_random_weights_and_custom_code_are_mentioned():
    model = MODEL | {"name": "scratch/article_cnn", "hub_id": None, "license": None}
    text = render_card(changed(model=model, custom_code=True))
    assert "`scratch/article_cnn`, trained from random weights for the" in text
    assert 'model="me/vit", trust_remote_code=True)' in text and "review it first" in text
    assert "import hf_cifar.models.article" not in text


def test_the_card_of_an_article_model_names_the_import_that_registers_it(run_folder):
    config = json.loads((run_folder / "config.json").read_text()) | {"model_type": "article_cnn"}
    (run_folder / "config.json").write_text(json.dumps(config))
    (run_folder / "article.py").touch()
    save_card(run_folder)
    text = (run_folder / "README.md").read_text()
    assert "trust_remote_code=True)" in text and "import hf_cifar.models.article" in text


def test_before_training_the_card_is_complete_except_for_its_metrics():
    text = render_card(
        changed(run=KNOWN, metrics={"validation": {"num_images": 0, "accuracy": 0.0}})
    )
    assert card_errors(text) == []
    assert "## Training" in text and "steps in" not in text


NASTY = {
    "deepspeed": "/home/ann/secret_lab/ds.json",
    "run_name": "/home/ann/secret_lab/run",
    "fsdp_config": {"path": "/home/ann/secret_lab/f.json", "deeper": ["~/secret_lab/x", 3]},
    "accelerator_config": '{"file": "/home/ann/secret_lab/a.json"}',
    "optim_args": "C:\\Users\\ann\\secret_lab\\adam.txt",
    "ddp_backend": f"file:///home/ann/secret_lab/{TOKEN}",
    "trackio_space_id": "https://ann:secret_lab@example.org",
    "log_level": f"see {TOKEN} | and\n`more`",
    "lr_scheduler_type": "../secret_lab/linear",
    "hub_revision": "secret_lab",
    "output_dir": "/home/ann/secret_lab/out",
}


def test_options_with_paths_or_tokens_are_not_in_the_card():
    text = render_card(dataclasses.replace(FACTS, options=OPTIONS | NASTY))
    assert (
        TOKEN not in text
        and "secret_lab" not in text
        and "ann" not in re.sub("cannot|channel", "", text)
    )
    assert "| `deepspeed` | `ds.json` |" in text
    assert "| `lr_scheduler_type` | `linear` |" in text
    options = section(text, "Training")
    assert all(line.count(" | ") == 1 for line in options.splitlines() if line.startswith("| `"))


def test_name_that_looks_like_a_token_is_kept():
    text = render_card(changed(repo_id="me/hf_flowers102_vit"))
    assert 'model="me/hf_flowers102_vit"' in text and "hf_..." not in text


def test_no_class_name_breaks_table_or_metadata():
    names = ["cat | dog", "a\nb", f"x {TOKEN}"]
    per_class = dict(zip(names, PER_CLASS.values(), strict=True))
    metrics = METRICS["test"] | {"per_class": per_class}
    text = render_card(changed(class_names=names, metrics={"test": metrics}))
    assert TOKEN not in text and card_errors(text) == []
    assert "| cat \\| dog | a b | 290 | 48.3% |" in text


def test_eval_results_have_the_test_accuracy_of_a_hub_data_set():
    (entry,) = parse_eval_result_entries(yaml.safe_load(render_eval_results(FACTS)))
    assert (entry.dataset_id, entry.task_id, entry.value) == (
        "uoft-cs/cifar10",
        "default",
        0.765432,
    )
    assert entry.notes == "accuracy, 0 to 1, of 1,234 images, 95% interval 0.7410 to 0.7880"
    named = parse_eval_result_entries(
        yaml.safe_load(render_eval_results(changed(dataset_config_name="plain")))
    )
    assert named[0].task_id == "plain"


@pytest.mark.parametrize(
    "facts",
    [
        changed(metrics={"validation": METRICS["validation"]}),
        changed(dataset=DATASET | {"hub_id": None}),
        changed(max_eval_samples=100),
    ],
    ids=["no test", "not on the Hub", "a part of test"],
)
def test_no_eval_result_for_other_data(facts):
    assert render_eval_results(facts) is None


def test_card_and_eval_results_are_written_from_a_folder(run_folder):
    text = (run_folder / CARD_FILE).read_text()
    assert load_card(run_folder)[0].class_names == ["cat", "dog", "ship", "x"]
    assert "4 classes of `uoft-cs/cifar10`: cat, dog, ship, x." in text
    parse_eval_result_entries(
        yaml.safe_load((run_folder / ".eval_results/cifar10.yaml").read_text())
    )
    (run_folder / "config.json").write_text(json.dumps({"label_names": NAMES}))  # as timm's
    assert load_card(run_folder)[0].class_names == NAMES


def test_folder_may_be_renamed(run_folder):
    renamed = run_folder.rename(run_folder.with_name("best"))
    assert is_untouched(renamed) and load_card(renamed)[0].repo_id == "me/vit"


def test_pushed_card_names_its_repository(run_folder):
    text = card_for(run_folder, "team/better")
    assert 'model="team/better")' in text and "# better\n" in text and "me/vit" not in text
    assert ModelCard(text).data.model_name == "better"
    (run_folder / CARD_FILE).unlink()
    assert card_for(run_folder, "team/better") == text


def test_edits_of_the_card_are_kept(run_folder):
    assert is_untouched(run_folder)
    card = run_folder / CARD_FILE
    card.write_text(card.read_text() + "\nThanks to Ann.\n")
    assert not is_untouched(run_folder)
    pushed = card_for(run_folder, "team/better")
    assert pushed.endswith("Thanks to Ann.\n") and 'model="team/better")' in pushed


@pytest.mark.parametrize("damage", ["run.json", "metrics.json", "config.yaml", "config.json"])
def test_incomplete_run_is_a_one_line_error(run_folder, damage):
    (run_folder / damage).write_text("{")
    with pytest.raises(UserError, match="no finished run"):
        load_card(run_folder)
    (run_folder / damage).unlink()
    with pytest.raises(UserError, match="pass the --output_dir of one"):
        load_card(run_folder)
    assert not is_untouched(run_folder)


@pytest.mark.parametrize(
    "head", ["- a list", "base_model: a b", "datasets: [../x]", "a: [", "model-index:\n- name: x"]
)
def test_invalid_metadata_is_found_before_the_hub(head):
    with pytest.raises(UserError, match="metadata is not valid"):
        check_card(f"---\n{head}\n---\n# A card\n")


def test_skipped_rows_and_leakage_are_in_the_card():
    assert "Left out" not in render_card(FACTS) and "--check_leakage" not in render_card(FACTS)
    metrics = {**METRICS, "test": METRICS["test"] | {"skipped_rows": [4]}}
    leakage = {"num_test": 1234, "num_leaked": 3, "pairs": []}
    card = render_card(
        changed(metrics=metrics, skipped_rows={"train": [3, 17, 18]}, leakage=leakage)
    )
    assert "`--on_bad_image skip`): 3 of train (rows 3, 17-18); 1 of test (row 4)." in card
    assert "1,234 test images, 3 are" in card
    assert render_eval_results(changed(metrics=metrics)) is None


def test_card_equals_the_golden_card():
    """The wording of a whole card. After an intended change, write `render_card(FACTS)` to the file."""
    assert render_card(FACTS) == Path(__file__).with_name("golden_card.md").read_text()
