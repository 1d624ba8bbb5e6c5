"""hf_cifar.models.names: check that a model exists, before torch is imported."""

import pytest
import timm

from hf_cifar.config.model import BUNDLED, SCRATCH
from hf_cifar.errors import UserError
from hf_cifar.models.names import ARTICLE_NAMES, BUNDLED_NAMES, check_model_name


def test_every_timm_architecture_is_known():
    unknown = []
    for name in [*timm.list_models(), *timm.list_models(pretrained=True)[::50]]:
        try:
            check_model_name(SCRATCH + name)
        except UserError:
            unknown.append(name)
    assert unknown == []


def test_bundled_and_article_models_are_known():
    for name in ARTICLE_NAMES:
        check_model_name(SCRATCH + name)
    for name in BUNDLED_NAMES:
        check_model_name(BUNDLED + name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scratch/resnt18", "nearest: resnet18"),
        ("scratch/article_cn", "nearest: article_cnn"),
        ("bundled/vit", "bundled/efficientnet_lite0"),
        ("./nowhere", "config.json does not exist"),
        ("someone/nothing", "someone/nothing is neither a folder nor in the cache"),
        ("two words", "neither a local folder nor a Hub id"),
    ],
)
def test_unknown_name_error_lists_alternatives(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        check_model_name(name)


@pytest.mark.parametrize("revision", [None, "main", "0123456789ab", "g" * 40])
def test_hub_code_requires_a_full_commit_hash(revision):
    with pytest.raises(UserError, match=r"40-digit commit hash as --model_revision"):
        check_model_name("them/model", revision, trust_remote_code=True)
