"""ImageClassificationTrainer with nothing but a model, stock TrainingArguments and data sets in memory."""

import subprocess
import sys

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, load_from_disk
from hub_server import Hub, hub_environment
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DefaultDataCollator,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_cifar import AugmentConfig, DataConfig, ImageClassificationTrainer, UserError, load_splits

NAMES = ["across", "down"]


def rows_of(folder, names=NAMES, size=None):
    """The images of a folder of classes as a `datasets.Dataset`, of mixed sizes on request."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    pictures = [Image.open(path) for path in paths]
    if size is not None:
        pictures = [p.resize((16 + i % 5, 16 + i % 3)) for i, p in enumerate(pictures)]
    labels = [names.index(path.parent.name) for path in paths]
    features = datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


@pytest.fixture(scope="module")
def ds(stripes):
    train = rows_of(stripes / "train")
    return datasets.DatasetDict(
        train=train.select(range(64)),
        validation=train.select(range(64, 80)),
        test=rows_of(stripes / "test"),
    )


def vit(folder, names=NAMES):
    labels = dict(enumerate(names))
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(
        folder, num_labels=len(names), id2label=labels, label2id={n: i for i, n in labels.items()},
        ignore_mismatched_sizes=True,
    )  # fmt: skip


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, learning_rate=5e-3, disable_tqdm=True, **options
    )


class StopAt(TrainerCallback):
    """Ends the training after a step, with a checkpoint, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def test_a_model_stock_arguments_and_data_sets_are_enough(ds, tiny_vit, tmp_path):
    model, args = vit(tiny_vit), arguments(tmp_path, eval_strategy="epoch", num_train_epochs=8)
    before = args.to_dict()
    trainer = ImageClassificationTrainer(
        model=model, args=args, train_dataset=ds["train"], eval_dataset=ds["validation"]
    )
    trainer.train()
    assert trainer.model is model
    assert args.to_dict() == before
    assert trainer.train_dataset.pixels.dtype == torch.uint8  # prepared once
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] >= 0.9
    assert trainer.evaluate(ds["validation"])["eval_loss"] == metrics["eval_loss"]
    output = trainer.predict(ds["test"])
    assert output.predictions.shape == (22, 2)
    assert output.label_ids.tolist() == ds["test"]["label"]
    assert output.metrics["test_accuracy"] >= 0.9
    trainer.save_model(tmp_path / "final")
    classify = pipeline("image-classification", model=str(tmp_path / "final"))
    found = [classify(image)[0]["label"] for image in ds["test"]["image"]]
    assert found == [NAMES[i] for i in output.predictions.argmax(axis=1)]


def test_the_image_processor_is_the_checkpoints_or_the_one_given(ds, tiny_vit, tmp_path, caplog):
    own = AutoImageProcessor.from_pretrained(tiny_vit)
    trainer = ImageClassificationTrainer(vit(tiny_vit), arguments(tmp_path))
    assert trainer.processing_class.to_dict() == own.to_dict()
    other = type(own)(size={"height": 16, "width": 16}, image_mean=[0.1] * 3)
    trainer = ImageClassificationTrainer(vit(tiny_vit), arguments(tmp_path), processing_class=other)
    assert trainer.preprocessing.mean == (0.1, 0.1, 0.1)
    plain = ViTForImageClassification(ViTConfig.from_pretrained(tiny_vit, num_labels=2))
    trainer = ImageClassificationTrainer(plain, arguments(tmp_path), train_dataset=ds["train"])
    assert trainer.preprocessing.mean == (0, 0, 0)
    assert "no image processor: pixels are scaled to 0..1" in caplog.text


def test_the_default_augmentation_is_that_of_the_options(ds, tiny_vit, tmp_path):
    sets = {"train_dataset": ds["train"]}
    trainer = ImageClassificationTrainer(vit(tiny_vit), arguments(tmp_path), **sets)
    assert trainer.augmentation.view.flip == 0.5
    none = AugmentConfig(flip=0, crop_padding=0)
    plain = ImageClassificationTrainer(
        vit(tiny_vit), arguments(tmp_path), augmentation=none, **sets
    )
    batch = next(iter(plain.get_train_dataloader()))
    plain.model.train()
    wanted = plain.preprocessing(batch["pixel_values"])
    assert torch.allclose(plain._prepare_inputs(batch)["pixel_values"], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "module"])
def test_other_networks_are_wrapped(kind, ds, tmp_path):
    torch.manual_seed(0)
    options = {}
    if kind == "timm":
        network = timm.create_model("test_resnet", num_classes=2)
        network.conv1[0].requires_grad_(False)
    else:
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveMaxPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, 2),
        )  # fmt: skip
    sets = {"train_dataset": ds["train"], "eval_dataset": ds["validation"]}
    if kind == "module":
        with pytest.raises(UserError, match="does not say the size of its input; pass image_size"):
            ImageClassificationTrainer(network, arguments(tmp_path), **sets)
        options["processing_class"] = ViTImageProcessor(size={"height": 16, "width": 16})
    trainer = ImageClassificationTrainer(network, arguments(tmp_path), **sets, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert changed == set(before) - frozen
    assert len(frozen) == (1 if kind == "timm" else 0)
    assert trainer.evaluate()["eval_accuracy"] >= 0.5
    assert list(trainer.model.config.id2label.values()) == NAMES
    trainer.save_model(tmp_path / "final")
    if kind == "timm":
        assert pipeline("image-classification", model=str(tmp_path / "final"))(
            ds["test"][0]["image"]
        )
        network.load_state_dict(load_file(tmp_path / "final/model.safetensors"))
    with pytest.raises(UserError, match="has no class names; pass train_dataset"):
        ImageClassificationTrainer(network, arguments(tmp_path), **options)


def test_a_resumed_training_has_the_same_bits(ds, tiny_vit, tmp_path):
    weights = []
    sets = {"train_dataset": ds["train"], "eval_dataset": ds["validation"]}
    for name, stops in (("whole", ()), ("parts", (10,))):
        folder = tmp_path / name
        for steps in (*stops, 24):
            args = arguments(folder, save_steps=5, eval_strategy="steps", eval_steps=5)
            trainer = ImageClassificationTrainer(vit(tiny_vit), args, **sets)
            trainer.add_callback(StopAt(steps))
            trainer.train(resume_from_checkpoint=bool(stops) and steps == 24)
        weights.append({name: p.clone() for name, p in trainer.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    few = ds["train"].select(range(40))
    fewer = ImageClassificationTrainer(vit(tiny_vit), args, **{**sets, "train_dataset": few})
    with pytest.raises(UserError, match="belongs to a run with different labels of train"):
        fewer.train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"no checkpoint in .* to resume from"):
        fewer.args.output_dir = str(tmp_path / "empty")
        fewer.train(resume_from_checkpoint=True)


def test_classes_are_matched_by_name_in_any_order(ds, stripes, tiny_vit, tmp_path):
    trainer = ImageClassificationTrainer(
        vit(tiny_vit, NAMES[::-1]), arguments(tmp_path), train_dataset=ds["train"]
    )
    wanted = 1 - np.array(ds["train"]["label"])
    assert trainer.train_dataset.labels.tolist() == wanted.tolist()
    texts = Dataset.from_dict(
        {"image": ds["test"]["image"], "label": [NAMES[i] for i in ds["test"]["label"]]}
    )
    assert trainer.predict(texts).label_ids.tolist() == [1 - i for i in ds["test"]["label"]]
    other = rows_of(stripes / "test").cast_column("label", ClassLabel(names=["across", "dog"]))
    with pytest.raises(UserError, match=r"1 of the 2 classes of test: 'dog' \(11 images\)"):
        trainer.predict(other)
    numbers = ds["test"].cast_column("label", datasets.Value("int64"))
    with pytest.raises(
        UserError, match=r"does not know 2 .*: 0 \(11 images\), 1 .*ClassLabel\(names"
    ):
        trainer.evaluate(numbers)


def test_a_model_without_names_takes_those_of_the_data(ds, tiny_vit, tmp_path, caplog):
    caplog.set_level("INFO")
    plain = ViTForImageClassification.from_pretrained(
        tiny_vit, num_labels=2, ignore_mismatched_sizes=True
    )
    plain.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    trainer = ImageClassificationTrainer(plain, arguments(tmp_path), train_dataset=ds["train"])
    assert plain.config.label2id == {"across": 0, "down": 1}
    assert "the model's classes had no names and are now across, down" in caplog.text
    assert trainer.train_dataset.labels.tolist() == ds["train"]["label"]
    three = ViTForImageClassification.from_pretrained(tiny_vit)
    numbers = ds["train"].cast_column("label", datasets.Value("int64"))
    trainer = ImageClassificationTrainer(three, arguments(tmp_path), train_dataset=numbers)
    assert list(three.config.id2label.values()) == ["0", "1", "2"]
    many = ds["train"].cast_column("label", ClassLabel(names=[*NAMES, "cat", "dog"]))
    with pytest.raises(
        UserError, match=r"4 classes, .* the model has 3 without names; load it with num_l"
    ):
        ImageClassificationTrainer(
            ViTForImageClassification.from_pretrained(tiny_vit),
            arguments(tmp_path),
            train_dataset=many,
        )


def test_images_of_mixed_sizes_and_other_kinds_of_data(stripes, tiny_vit, tmp_path):
    mixed = rows_of(stripes / "train", size="mixed")
    trainer = ImageClassificationTrainer(
        vit(tiny_vit), arguments(tmp_path, num_train_epochs=1), train_dataset=mixed,
        eval_dataset={"all": mixed, "half": mixed.select(range(0, 80, 2))},
    )  # fmt: skip
    assert trainer.train_dataset.pixels.shape[1:] == (18, 18, 3)  # 8/7 of 16, for crops
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_all_accuracy", "eval_half_accuracy"} <= metrics.keys()
    whole = trainer.evaluate(mixed)["eval_loss"]
    assert whole == metrics["eval_all_loss"]
    pairs = [
        (image, NAMES[label]) for image, label in zip(mixed["image"], mixed["label"], strict=True)
    ]
    columns = {"image": mixed["image"], "label": [name for _, name in pairs]}
    images = [np.asarray(image) for image, _ in pairs]
    for given in (pairs, columns, (images, columns["label"]), mixed.to_iterable_dataset()):
        assert trainer.evaluate(given)["eval_loss"] == whole
    split = load_splits(DataConfig(dataset_name=str(stripes))).validation
    assert (
        trainer.evaluate(split)["eval_accuracy"]
        == trainer.evaluate(
            [(Image.fromarray(split.decode(i)), NAMES[split.labels[i]]) for i in range(len(split))]
        )["eval_accuracy"]
    )


def test_multiple_labels(lights, tiny_vit, tmp_path):
    ds = load_from_disk(str(lights))
    model = vit(tiny_vit, ["b", "g", "r"])
    trainer = ImageClassificationTrainer(
        model, arguments(tmp_path, num_train_epochs=8), train_dataset=ds["train"]
    )
    trainer.train()
    assert model.config.problem_type == "multi_label_classification"
    output = trainer.predict(ds["test"])
    assert output.label_ids.shape == (24, 3)
    assert output.label_ids[:, ::-1].sum(axis=0).tolist() == [
        sum(i in row for row in ds["test"]["lights"]) for i in range(3)
    ]
    assert output.metrics["test_average_precision_macro"] > 0.9
    single = ds["test"].map(lambda row: {"lights": "r"}, features=datasets.Features(
        {"photo": datasets.Image(), "lights": datasets.Value("string")}
    ))  # fmt: skip
    with pytest.raises(UserError, match="one label per image, but the model assigns multiple"):
        trainer.evaluate(single.rename_column("lights", "label"))


def test_compute_loss_can_be_overridden_or_given(ds, tiny_vit, tmp_path):
    class Focal(ImageClassificationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            each = F.cross_entropy(outputs.logits, labels, reduction="none")
            loss = ((1 - (-each).exp()) ** 2 * each).mean()
            return (loss, outputs) if return_outputs else loss

    def focal(outputs, labels, num_items_in_batch=None):
        each = F.cross_entropy(outputs.logits, labels, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()

    sets = {"train_dataset": ds["train"], "eval_dataset": ds["validation"]}
    losses = []
    for trainer in (
        Focal(vit(tiny_vit), arguments(tmp_path, num_train_epochs=1), **sets),
        ImageClassificationTrainer(
            vit(tiny_vit), arguments(tmp_path, num_train_epochs=1), compute_loss_func=focal, **sets
        ),
    ):
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    plain = ImageClassificationTrainer(
        vit(tiny_vit), arguments(tmp_path, num_train_epochs=1), **sets
    )
    plain.train()
    assert losses[0] == losses[1] != plain.evaluate()["eval_loss"]


def test_own_metrics(ds, tiny_vit, tmp_path):
    trainer = ImageClassificationTrainer(
        vit(tiny_vit), arguments(tmp_path), eval_dataset=ds["validation"],
        compute_metrics=lambda output: {"hits": (output.predictions.argmax(1) == output.label_ids).sum()},
    )  # fmt: skip
    assert 0 <= trainer.evaluate()["eval_hits"] <= 16


def test_a_setting_that_cannot_be_used_is_refused(ds, tiny_vit, tmp_path):
    args = arguments(tmp_path)
    for options, words in (
        ({"data_collator": DefaultDataCollator()}, "data_collator would not be used"),
        (
            {"train_dataset": ds},
            r"train is a DatasetDict of train, validation, test; pass one of them",
        ),
        ({"train_dataset": "beans"}, "train is the string 'beans'; pass a datasets.Dataset"),
        ({"processing_class": object()}, "processing_class is a object; pass the model's image"),
    ):
        with pytest.raises(UserError, match=words):
            ImageClassificationTrainer(vit(tiny_vit), args, **options)
    with pytest.raises(UserError, match="model is a str; pass a transformers model"):
        ImageClassificationTrainer("vit", args)
    two = ds["train"].add_column("other", [0] * 64, feature=ClassLabel(names=NAMES))
    two = two.rename_column("label", "kind")
    with pytest.raises(UserError, match="--label_column_name"):
        ImageClassificationTrainer(vit(tiny_vit), args, train_dataset=two)
    trainer = ImageClassificationTrainer(
        vit(tiny_vit), args, train_dataset=two, data=DataConfig(label_column_name="kind")
    )
    assert trainer.train_dataset.labels.tolist() == two["kind"]


@pytest.mark.parametrize("hidden", ["no column", "minus one", "None"])
def test_images_without_labels_are_predicted(hidden, ds, tiny_vit, tmp_path):
    trainer = ImageClassificationTrainer(vit(tiny_vit), arguments(tmp_path))
    wanted = trainer.predict(ds["test"]).predictions
    rows = ds["test"].remove_columns("label")
    if hidden != "no column":
        value = -1 if hidden == "minus one" else None
        rows = rows.add_column("label", [value] * 22, feature=ClassLabel(names=NAMES))
    output = trainer.predict(rows)
    assert np.array_equal(output.predictions, wanted)
    assert output.label_ids is None
    assert not [name for name in output.metrics if "accuracy" in name or "loss" in name]
    assert trainer.predict(ds["test"]).metrics["test_accuracy"] >= 0  # computed again
    with pytest.raises(UserError, match="label"):
        trainer.evaluate(rows)


def test_half_precision_weights_train_as_float32(ds, tiny_vit, tmp_path, caplog):
    caplog.set_level("INFO")
    model = vit(tiny_vit).half()
    trainer = ImageClassificationTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=ds["train"]
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "the model's weights are float16, and are trained as float32" in caplog.text
    trainer.train()


def test_loader_workers_are_set_for_prepared_images(ds, tiny_vit, tmp_path, caplog):
    caplog.set_level("INFO")
    args = arguments(
        tmp_path, dataloader_num_workers=2, dataloader_persistent_workers=True, num_train_epochs=1,
        auto_find_batch_size=True,
    )  # fmt: skip
    trainer = ImageClassificationTrainer(vit(tiny_vit), args, train_dataset=ds["train"])
    assert (trainer.args.dataloader_num_workers, args.dataloader_num_workers) == (0, 2)
    assert "dataloader_num_workers is 0 instead of 2: images are prepared" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 8


PUSH = """
import sys
from datasets import load_from_disk
from transformers import TrainingArguments, ViTForImageClassification
from hf_cifar import ImageClassificationTrainer
data, model, folder = sys.argv[1:]
ds = load_from_disk(data)
args = TrainingArguments(output_dir=folder, use_cpu=True, max_steps=4, eval_strategy="steps", eval_steps=2,
    save_steps=2, push_to_hub=True, hub_model_id="me/lines", hub_strategy="end")
model = ViTForImageClassification.from_pretrained(model, num_labels=2,
    id2label={0: "across", 1: "down"}, label2id={"across": 0, "down": 1}, ignore_mismatched_sizes=True)
trainer = ImageClassificationTrainer(model, args, train_dataset=ds["train"], eval_dataset=ds["validation"])
trainer.train()
trainer.push_to_hub()
print(trainer.evaluate()["eval_accuracy"])
"""


@pytest.mark.slow
def test_a_trained_model_is_pushed_with_a_card(ds, tiny_vit, tmp_path):
    ds.save_to_disk(str(tmp_path / "ds"))
    with Hub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "ds"), str(tiny_vit), str(tmp_path / "out")],
            env=hub_environment(tmp_path / "home", hub.endpoint) | {"PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "nothing is pushed while training; call trainer.push_to_hub()" in done.stderr
        files = hub.repos["models", "me/lines"].files
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    } <= files.keys()
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    card = files["README.md"].decode()
    assert str(tmp_path) not in card
    accuracy = float(done.stdout.splitlines()[-1])
    assert f"| accuracy | {accuracy:.4f} |" in card
    assert "64 images, 4 steps of 8 images" in card
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / "pulled").mkdir(exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(files[name])
    assert pipeline("image-classification", model=str(tmp_path / "pulled"))(ds["test"][0]["image"])
