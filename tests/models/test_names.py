"""hf_cifar.models.names: whether there is such a model, before torch is imported."""

import pytest
import timm

from hf_cifar.config.model import BUNDLED, SCRATCH
from hf_cifar.errors import UserError
from hf_cifar.models.names import ARTICLE_NAMES, BUNDLED_NAMES, check_model_name


def test_every_architecture_of_timm_is_known():
    unknown = []
    for name in [*timm.list_models(), *timm.list_models(pretrained=True)[::50]]:
        try:
            check_model_name(SCRATCH + name)
        except UserError:
            unknown.append(name)
    assert unknown == []


def test_every_own_name_is_known():
    for name in ARTICLE_NAMES:
        check_model_name(SCRATCH + name)
    for name in BUNDLED_NAMES:
        check_model_name(BUNDLED + name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scratch/resnt18", "nearest: resnet18"),
        ("scratch/article_cn", "nearest: article_cnn"),
        ("bundled/vit", "there is bundled/efficientnet_lite0"),
        ("./nowhere", "there is no config.json"),
        ("someone/nothing", "no folder someone/nothing, nor such a model in the cache"),
        ("two words", "neither a local folder nor a Hub id"),
    ],
)
def test_an_unknown_name_says_what_there_is(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        check_model_name(name)


@pytest.mark.parametrize("revision", [None, "main", "0123456789ab", "g" * 40])
def test_code_from_the_hub_runs_at_a_full_commit_alone(revision):
    with pytest.raises(UserError, match=r"40 digits of its commit as --model_revision"):
        check_model_name("them/model", revision, trust_remote_code=True)
