"""hf_cifar.doctor: planted faults are named, refusals are those of finetune, and the page opens."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_options

from hf_cifar import finetune_classifier
from hf_cifar.cli import main
from hf_cifar.commands.doctor import read_options
from hf_cifar.doctor.examine import examine
from hf_cifar.errors import UserError


@pytest.fixture(scope="module")
def faulty(stripes, tmp_path_factory):
    """The stripes with faults."""
    root = tmp_path_factory.mktemp("faulty") / "data"
    shutil.copytree(stripes, root)
    across, down = root / "train" / "across", root / "train" / "down"
    (across / "000.png").write_bytes((across / "000.png").read_bytes()[:60])
    (across / "001.png").write_bytes(b"")
    shutil.copyfile(across / "002.png", down / "copy.png")
    shutil.copyfile(down / "003.png", root / "test" / "down" / "copy.png")
    Image.new("RGB", (16, 16), (9, 9, 9)).save(across / "blank.png")
    Image.fromarray(np.arange(0, 25600, 100, dtype=np.uint16).reshape(16, 16)).save(down / "x.png")
    noise = np.random.default_rng(1).integers(0, 255, (1100, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(down / "huge.png")
    Image.fromarray(noise[:16, :160]).save(down / "long.png")
    for column, name in enumerate(("waves", "Wave"), 20):
        (root / "train" / name).mkdir()
        for number in range(6):
            Image.fromarray(noise[16 * number :, 16 * column :][:16, :16]).save(
                root / "train" / name / f"{name}{number}.png"
            )
    return root


@pytest.fixture(scope="module")
def found(faulty, tiny_vit, tmp_path_factory):
    """The exit status, the output folder and the facts of doctor on the faulty stripes."""
    folder = tmp_path_factory.mktemp("found")
    options = tiny_options(folder / "run", faulty, tiny_vit)
    files = ["--json", str(folder / "f.json"), "--output", str(folder / "pages" / "f.html")]
    status = main(["doctor", *options, *files])
    return status, folder, json.loads((folder / "f.json").read_text())


def named(facts, name):
    return [each for each in facts["findings"] if each["name"] == name]


def test_planted_faults_are_named(found, faulty):
    status, folder, facts = found
    assert status == 1 and facts["refused"] and not (folder / "run").exists()
    (unreadable,) = named(facts, "unreadable images")
    assert unreadable["level"] == "error" and len(unreadable["images"]) == 2
    assert "--on_bad_image skip" in unreadable["text"]
    expected = {
        "huge images": "1200 x 1100", "elongated images": "160 x 16", "blank images": "a single colour",
        "more than 8 bits": "scaled by one common range", "similar class names": "'waves'",
        "few images": "Wave (", "imbalance": "--class_balance",
        "duplicates with different labels": "different labels",
        "exact duplicates, test and train": "equals an image of train",
    }  # fmt: skip
    for name, text in expected.items():
        assert any(text in each["text"] for each in named(facts, name)), name
        assert all(each["level"] == "warning" for each in named(facts, name))
    rows = named(facts, "duplicates with different labels")[0]["images"][0]["rows"]
    assert {row["label"] for row in rows} == {"across", "down"}
    assert {row["path"].removeprefix(str(faulty)) for row in rows} == {
        "/train/across/002.png", "/train/down/copy.png",
    }  # fmt: skip
    tested = named(facts, "exact duplicates, test and train")[0]["images"][0]["rows"]
    assert tested[0]["used_as"] == "test" and tested[0]["label"] is None
    assert (
        set(facts["splits"]) == {"train", "validation", "test"} and "test" not in facts["classes"]
    )
    assert facts["labels"]["checked"] > 50 and facts["labels"]["features"]
    assert facts["cost"]["steps"] == 2 * -(-facts["splits"]["train"]["num_images"] // 8)


def test_clean_data_has_no_warning_and_would_start(stripes, tiny_vit, tmp_path, capsys):
    options = tiny_options(tmp_path / "run", stripes, tiny_vit, "--do_predict")
    data = options.index(str(stripes))
    assert main(["doctor", str(stripes), *options[: data - 1], *options[data + 1 :]]) == 0
    printed = capsys.readouterr().out
    assert "training would start: 0 errors, 0 warnings" in printed
    assert "time: about" in printed and "disk: " in printed and "only its pixels" in printed
    assert not any(tmp_path.iterdir())


def test_refusals_are_all_listed_in_the_words_of_finetune(stripes, tiny_vit, tmp_path):
    occupied = tmp_path / "run"
    occupied.mkdir()
    (occupied / "model.safetensors").write_bytes(b"x")
    (occupied / "config.yaml").write_text("dataset_name: x\noutput_dir: y\n")
    flags = ["--fp16", "--freeze_batch_norm", "true"]
    _, config = read_options(tiny_options(occupied, stripes, tiny_vit, *flags))
    examined = examine(config)
    refusals = [each.text for each in examined.findings if each.level == "error"]
    assert examined.refused and len(refusals) == 3
    with pytest.raises(UserError) as error:
        finetune_classifier(config)
    assert str(error.value) == refusals[0]
    assert any("fp16 needs a GPU" in each for each in refusals)
    assert any("has no BatchNorm statistics" in each for each in refusals)
    assert "train" in examined.surveys and "cost" not in examined.facts


def test_data_that_cannot_be_opened_is_a_refusal(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    assert main(["doctor", missing, "--model_name_or_path", "scratch/nonsense_net"]) == 1
    printed = capsys.readouterr().out
    assert "error: no data set" in printed and "nonsense_net" in printed
    assert "training would be refused: 2 errors" in printed
    assert "time, memory and disk: unknown, because training would be refused" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--dataset_name", "b"], "both name the data"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--json", "found.txt"], "ends with .json"),
        (["a", "--output", "page"], "ends with .html"),
        (["a", "--num_train_epoch", "3"], "--num_train_epochs"),
    ],
)
def test_a_mistake_in_the_command_has_status_2(argv, message, capsys):
    assert main(["doctor", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_data_may_stand_anywhere(tmp_path):
    for argv in (["d", "--use_cpu", "--seed", "3"], ["--seed", "3", "--use_cpu", "d"]):
        _, config = read_options([*argv, "--json", str(tmp_path / "f.json")])
        assert (config.data.dataset_name, config.train.seed) == ("d", 3)
        assert config.train.use_cpu


def test_multi_label_data_is_examined(lights, tiny_vit, tmp_path):
    _, config = read_options(tiny_options(tmp_path / "run", lights, tiny_vit))
    examined = examine(config)
    assert not examined.refused
    assert "multiple labels" in examined.facts["labels"]["reason"]
    assert set(examined.facts["classes"]["train"]) == set("rgb")


def test_a_class_that_is_told_by_its_files_is_named(stripes, tiny_vit, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(stripes, root)
    generator = np.random.default_rng(2)
    for number in range(40):
        tint = generator.integers(60, 255, 3) * [1, 0, 0]
        path = root / "train" / "across" / f"{number:03}.png"
        pixels = np.asarray(Image.open(path)).astype(int)
        Image.fromarray((pixels + tint).clip(0, 255).astype(np.uint8)).save(path)
        path = root / "train" / "down" / f"{number:03}.png"
        Image.open(path).convert("L").save(path)
    _, config = read_options(tiny_options(tmp_path / "run", root, tiny_vit))
    (told,) = named(examine(config).facts, "class given away by its files")
    assert "100% of class 'down' are grey" in told["text"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_page_opens_from_disk_and_fits_its_width(browser, found, width, scheme):
    _, folder, _ = found
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, errors_shown = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors_shown.append(message.text))
    page.goto(f"file://{folder / 'pages' / 'f.html'}")
    assert [url for url in requests if not url.startswith("data:")] == [page.url]
    assert errors_shown == [] and page.inner_text("#error").lower() == "errors"
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.images.length") >= 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize(
    "flags",
    [
        ["--freeze", "backbone", "--head_solver", "lbfgs"],
        ["--freeze", "backbone", "--feature_views", "2"],
        ["--learning_rate", "auto", "--seeds", "3", "--streaming", "false"],
    ],
)
def test_the_cost_covers_other_ways_to_train(stripes, tiny_vit, tmp_path, flags):
    _, config = read_options(tiny_options(tmp_path / "run", stripes, tiny_vit, *flags))
    examined = examine(config)
    assert not examined.refused, [each.text for each in examined.findings]
    parts = examined.facts["cost"]["parts"]
    if "lbfgs" in flags:
        assert examined.facts["cost"]["steps"] == 0 and "compute features" in parts
    if "auto" in flags:
        assert "race learning rates" in parts and examined.facts["cost"]["runs"] == 3
    assert not (tmp_path / "run").exists()


def test_a_stream_is_not_examined_but_checked(shards, tiny_vit, tmp_path, datasets_cache):
    flags = ["--streaming", "--max_eval_samples", "8", "--max_steps", "4"]
    _, config = read_options(tiny_options(tmp_path / "run", shards, tiny_vit, *flags))
    examined = examine(config)
    assert not examined.refused and examined.surveys == {}
    assert any(each.name == "stream" for each in examined.findings)
