"""hf_cifar.training.distillation and teacher: the loss, what the teacher sees, and whole runs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_run, tiny_trainer

from hf_cifar import UserError, finetune_classifier
from hf_cifar.models.build import load_classifier
from hf_cifar.training.distillation import Distillation, divergence, similarity_distance
from hf_cifar.training.features import head_inputs
from hf_cifar.training.teacher import Outputs, Teacher
from hf_cifar.transforms.preprocessing import Preprocessing

CNN = "scratch/article_cnn"
FIXED = ["--flip", "0", "--crop_padding", "0"]
TWO_HEADS = "scratch/deit_tiny_distilled_patch16_224"
ID2LABEL = {0: "across", 1: "down"}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(6, 4, generator=generator) for _ in range(2)]


def facts(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_equals_timms(temperature, weight):
    task_module = pytest.importorskip("timm.task")
    torch.manual_seed(0)
    student, teacher = (timm.create_model("test_resnet", num_classes=4).eval() for _ in range(2))
    images, labels = torch.randn(5, 3, 160, 160), torch.tensor([0, 3, 1, 2, 2])
    task = task_module.LogitDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(),
        task_loss_weight=1 - weight, temperature=temperature, verbose=False,
    )  # fmt: skip
    wanted = task(images, labels)
    logits, others = student(images), teacher(images)
    found = (1 - weight) * F.cross_entropy(logits, labels)
    found = found + weight * divergence(logits, others, temperature)
    torch.testing.assert_close(found, wanted["loss"])


def test_the_divergence_of_several_labels_by_hand(pair):
    logits, others = pair
    p, q = (others / 2).sigmoid(), (logits / 2).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = divergence(logits, others, 2.0, multi_label=True)
    torch.testing.assert_close(found, 4 * each.mean())
    assert divergence(others, others, 2.0, multi_label=True).abs() < 1e-6


def test_the_distance_of_similarities_by_hand(pair):
    features, others = pair[0], torch.cat(pair, dim=1)
    rows = []
    for each in (features, others):
        similar = each @ each.T
        rows.append(similar / similar.square().sum(dim=1, keepdim=True).sqrt())
    wanted = ((rows[0] - rows[1]) ** 2).sum() / 36
    torch.testing.assert_close(similarity_distance(features, others), wanted)
    turned = features @ torch.linalg.qr(torch.randn(4, 4))[0]
    assert similarity_distance(features, 7 * turned) < 1e-8


def test_the_teacher_sees_what_its_own_preprocessing_gives(finished_vit):
    teacher = Teacher(load_classifier(str(finished_vit)), ID2LABEL)
    own = teacher.preprocessing
    images = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    for size, mean, std in ((12, 0.0, 1.0), (12, 0.4, 0.3), (16, 0.2, 0.1)):
        student = dataclasses.replace(
            own, resize=(size, size), crop=None, mean=(mean,) * 3, std=(std,) * 3
        )
        view = teacher.view(student(images), student)
        seen = own.normalize(own.view(student.view(images).round().to(torch.uint8)))
        # The teacher's own view is rounded to whole levels, once for rows and once for columns.
        assert (view - seen).abs().max() <= 1.01 * own.rescale_factor / min(own.std)


def test_the_teacher_answers_as_in_evaluation(finished_vit):
    classifier = load_classifier(str(finished_vit))
    own = Preprocessing.from_image_processor(classifier.image_processor)
    pixel_values = own(torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8))
    head = classifier.model.classifier
    with torch.inference_mode(), head_inputs(head) as features:
        wanted = classifier.model.eval()(pixel_values=pixel_values).logits
    found = Teacher(classifier, ID2LABEL, gives_features=True)(pixel_values, own)
    torch.testing.assert_close(found.logits, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.features, features[0], atol=1e-5, rtol=1e-4)


def test_a_teacher_of_some_classes_says_nothing_of_the_others(finished_vit):
    teacher = Teacher(load_classifier(str(finished_vit)), {0: "dots", 1: "down", 2: "across"})
    assert teacher.columns == [2, 1]
    distillation = Distillation(teacher, weight=1.0, temperature=1.0)
    logits = torch.tensor([[5.0, 2.0, 1.0]], requires_grad=True)
    outputs = Outputs(torch.tensor([[-3.0, 3.0]]), torch.empty(1, 0))
    distillation(torch.tensor(0.0), logits, [], outputs).backward()
    assert logits.grad[0, 0] == 0
    wanted = logits[0, [2, 1]].softmax(dim=0) - outputs.logits[0].softmax(dim=0)
    torch.testing.assert_close(logits.grad[0, [2, 1]], wanted)


def test_a_student_learns_from_the_teacher_alone(finished_vit, tmp_path, stripes):
    """At a weight of 1 the labels of training do not matter."""
    from PIL import Image

    names = sorted((stripes / "train").rglob("*.png"))
    images = [Image.open(path).convert("RGB") for path in names]
    labels = np.array([path.parent.name for path in names])
    swapped = np.random.default_rng(0).permutation(labels)
    weights = []
    for number, given in enumerate((labels, swapped)):
        result = finetune_classifier(
            CNN, {"train": {"image": images, "label": given.tolist()},
                  "validation": {"image": images[::8], "label": labels[::8].tolist()}},
            output_dir=tmp_path / str(number), teacher=str(finished_vit), distillation_weight=1.0,
            num_train_epochs=10, use_cpu=True, load_best_model_at_end=False, calibrate=False,
            save_strategy="no", precision="fp32", learning_rate=5e-3, per_device_train_batch_size=8,
        )  # fmt: skip
        weights.append({n: value.clone() for n, value in result.model.state_dict().items()})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    teacher = Teacher(load_classifier(str(finished_vit)), ID2LABEL)
    view = Preprocessing.from_image_processor(result.image_processor)
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        own = result.model.eval()(pixel_values=view(batch)).logits.argmax(dim=1)
    agreed = own == teacher(view(batch), view).logits.argmax(dim=1)
    assert agreed.float().mean() > 0.9


@pytest.mark.parametrize(
    "flags", [FIXED, [], ["--feature_hint", "2", *FIXED], ["--sam_rho", "0.05"]]
)
def test_a_resumed_distillation_has_the_same_bits(flags, finished_vit, tmp_path, stripes, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    model = "scratch/test_resnet" if "--feature_hint" in flags else CNN
    options = [
        "--teacher",
        str(finished_vit),
        "--save_strategy",
        "epoch",
        "--image_size",
        "32",
        *flags,
    ]
    tiny_run(tmp_path / "whole", stripes, model, *options)
    fixed = flags[-len(FIXED) :] == FIXED
    assert ("computed once" in caplog.text) == fixed
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    shutil.copytree(first, tmp_path / "half" / first.name)
    for file in ("config.yaml", "batch.json"):
        shutil.copy(tmp_path / "whole" / file, tmp_path / "half")
    tiny_run(tmp_path / "half", stripes, model, *options, "--resume_from_checkpoint", "last")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fixed_views_have_the_outputs_of_each_step(finished_vit, tmp_path, stripes):
    trainer = tiny_trainer(
        tmp_path, stripes, CNN, "--teacher", str(finished_vit), *FIXED, "--precision", "fp32"
    )
    distillation = trainer.distillation
    assert distillation.fixed is not None
    batch = trainer.train_dataset.__getitems__([5, 0, 17])
    trainer.model.train()
    inputs = trainer._prepare_inputs(dict(batch))
    in_step = distillation.teacher(inputs["pixel_values"], trainer.preprocessing)
    torch.testing.assert_close(inputs["teacher"].logits, in_step.logits, atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_step_has_both_parts(finished_vit, tmp_path, stripes):
    flags = ["--teacher", str(finished_vit), "--distillation_weight", "0.7"]
    trainer = tiny_trainer(tmp_path, stripes, CNN, *flags, "--distillation_temperature", "2")
    trainer.model.train()
    inputs = trainer._prepare_inputs(dict(trainer.train_dataset.__getitems__([1, 2, 3, 4])))
    found, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    logits = outputs["logits"]
    labels = 0.3 * F.cross_entropy(logits, inputs["labels"], label_smoothing=0.1)
    others = inputs["teacher"].logits
    p, q = (others / 2).softmax(dim=1), (logits / 2).softmax(dim=1)
    wanted = labels + 0.7 * 4 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(found, wanted)
    trainer.model.eval()  # validation is measured on the labels alone
    batch = trainer._prepare_inputs(dict(trainer.eval_dataset.__getitems__([0, 1])))
    found, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(found, F.cross_entropy(outputs["logits"], batch["labels"]))


def test_a_run_records_its_teacher(finished_vit, tmp_path, stripes):
    tiny_run(tmp_path / "same", stripes, CNN, "--teacher", str(finished_vit))
    assert facts(tmp_path / "same")["teacher"] == {"name": "run", "has_seen_validation": False}
    text = (tmp_path / "same" / "README.md").read_text()
    assert "the run `run`" in text and str(finished_vit) not in text
    other = ["--split_seed", "7"]
    tiny_run(tmp_path / "other", stripes, CNN, "--teacher", str(finished_vit), *other)
    assert facts(tmp_path / "other")["teacher"]["has_seen_validation"]
    assert (
        "the teacher may have been trained on it" in (tmp_path / "other" / "README.md").read_text()
    )


def test_a_resumed_run_needs_the_same_teacher(finished_vit, tmp_path, stripes):
    teacher = tmp_path / "teacher"
    shutil.copytree(finished_vit, teacher)
    flags = ["--teacher", str(teacher), *FIXED]
    tiny_run(tmp_path / "run", stripes, CNN, *flags)
    weights = load_file(teacher / "model.safetensors")
    save_file({n: value + 1 for n, value in weights.items()}, teacher / "model.safetensors")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match="belongs to a run with different teacher"):
        tiny_run(tmp_path / "run", stripes, CNN, *flags, "--resume_from_checkpoint", "last")


def test_a_student_passes_on_what_its_teacher_has_seen(finished_vit, tmp_path, stripes):
    tiny_run(tmp_path / "first", stripes, CNN, "--teacher", str(finished_vit), "--split_seed", "7")
    flags = ["--teacher", str(tmp_path / "first"), "--split_seed", "7"]
    tiny_run(tmp_path / "second", stripes, CNN, *flags)
    assert facts(tmp_path / "second")["teacher"] == {"name": "first", "has_seen_validation": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feature_hint", "1"], "--feature_hint needs a --teacher"),
        (["--distillation_weight", "0.5"], "--distillation_weight needs a --teacher"),
        (["--distillation_temperature", "2"], "--distillation_temperature needs a --teacher"),
        (["--teacher", "VIT", "--freeze", "backbone", "--head_solver", "lbfgs"], "--teacher has no effect"),
        (["--teacher", "nothing/here"], "--teacher: nothing/here .* pass the folder of a run"),
        (["--teacher", "model.onnx"], "--teacher model.onnx is not a fine-tuned model"),
        (["--teacher", "bundled/efficientnet_lite0"], "is not a fine-tuned model"),
        (["--teacher", "THREE"], "has the classes LABEL_0, LABEL_1, LABEL_2, which are not in the data"),
        (["--teacher", "VIT", "--feature_hint", "1", "--model_name_or_path", TWO_HEADS], "one linear layer"),
        (["--teacher", "VIT", "--distillation_weight", "2"], "it must be in 0..1"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_training(
    flags, message, tmp_path, stripes, finished_vit, tiny_vit
):
    places = {"VIT": str(finished_vit), "THREE": str(tiny_vit)}
    flags = [places.get(flag, flag) for flag in flags]
    model = tiny_vit if "lbfgs" in flags else CNN
    with pytest.raises(UserError, match=message):
        finetune_classifier(tiny_config(tmp_path / "out", stripes, model, *flags))
    assert not (tmp_path / "out").exists()


def test_a_frozen_backbone_sees_the_images_again(finished_vit, tmp_path, stripes, tiny_vit, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    flags = ["--teacher", str(finished_vit), "--freeze", "backbone"]
    tiny_run(tmp_path / "run", stripes, tiny_vit, *flags)
    assert "features of" not in caplog.text and "computed in each step" in caplog.text
