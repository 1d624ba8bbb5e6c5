"""hf_cifar.hub.origin: the origin of a run's model and data, from their cards."""

import json

import pytest

from hf_cifar.hub.origin import Origin, find_origin, public_name

CARD = """---
license: {license}
{more}---
# A model

```bibtex
@article{{one, title={{One}}}}
```

```python
@decorator
def f(): pass
```
"""


def model_folder(folder, license_="apache-2.0", more=""):
    folder.mkdir()
    (folder / "README.md").write_text(CARD.format(license=license_, more=more))
    return find_origin(str(folder), "model")


def test_public_name_keeps_ids_and_strips_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "uoft-cs/cifar10",
        "bundled/digits",
        "scratch/article_cnn",
        "timm/resnet50.a1_in1k",
    ):
        assert public_name(name) == name
    (tmp_path / "a/birds").mkdir(parents=True)
    for path in (
        f"{tmp_path}/a/birds",
        f"{tmp_path}/a/birds/",
        "./a/birds",
        "a/birds",
        "~/x/birds",
    ):
        assert public_name(path) == "birds"
    assert public_name(".") == tmp_path.name


def test_origin_of_a_local_model_comes_from_its_card(tmp_path):
    assert model_folder(tmp_path / "vit") == Origin(
        "vit", license="apache-2.0", citations=("@article{one, title={One}}",)
    )


@pytest.mark.parametrize(
    ("license_", "more", "expected"),
    [
        ("MIT", "", {"license": "mit"}),
        ("[cc-by-4.0]", "", {"license": "cc-by-4.0"}),
        ("unknown", "", {}),
        ("dinov3-license", "", {"license": "other", "license_name": "dinov3-license"}),
        ("[mit, apache-2.0]", "", {"license": "other", "license_name": "mit-apache-2.0"}),
        (
            "other",
            "license_name: Ours v1\nlicense_link: https://example.org/l\n",
            {
                "license": "other",
                "license_name": "ours-v1",
                "license_link": "https://example.org/l",
            },
        ),
        ("other", "license_link: LICENSE\n", {"license": "other"}),
    ],
)
def test_licences_use_the_hubs_ids(tmp_path, license_, more, expected):
    origin = model_folder(tmp_path / "m", license_, more)
    found = {
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
    }
    assert {key: value for key, value in found.items() if value is not None} == expected


def test_licence_of_a_timm_checkpoint_without_card_comes_from_its_config(tmp_path):
    for name, content in {
        "named": {"pretrained_cfg": {"license": "apache-2.0"}},
        "silent": {"pretrained_cfg": {}},
        "plain": {},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    licences = [
        find_origin(str(tmp_path / n), "model").license for n in ("named", "silent", "plain")
    ]
    assert licences == ["apache-2.0", None, None]


@pytest.mark.parametrize("text", ["# Photos", "---\n- a list\n---\n", "---\na: [\n---\n", ""])
def test_any_readme_next_to_the_data_is_accepted(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert find_origin(str(tmp_path), "dataset") == Origin(tmp_path.name)


def test_bundled_origins_are_known_and_scratch_has_none():
    digits = find_origin("bundled/digits", "dataset")
    assert digits.hub_id is None and "Alpaydin" in digits.citations[0]
    model = find_origin("bundled/efficientnet_lite0", "model")
    assert (model.hub_id, model.license) == ("timm/tf_efficientnet_lite0.in1k", "apache-2.0")
    assert find_origin("scratch/article_cnn", "model") == Origin("scratch/article_cnn")


def test_unavailable_hub_data_set_is_still_named_and_cited():
    origin = find_origin("uoft-cs/cifar10", "dataset")
    assert origin.hub_id == origin.name == "uoft-cs/cifar10"
    assert "Krizhevsky" in origin.citations[0] and origin.license is None
