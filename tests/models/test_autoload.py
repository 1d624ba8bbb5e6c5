import subprocess
import sys

import pytest

from hf_cifar.models.autoload import AUTO_MODELS, register_article_models


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_light_and_waits_with_one_finder():
    code = """
import sys
before = len(sys.meta_path)
import hf_cifar
print(len(sys.meta_path) - before, "torch" in sys.modules, "transformers" in sys.modules)
"""
    assert run_python(code) == ["1", "False", "False"]


@pytest.mark.slow
def test_registers_when_the_table_is_loaded_from_within_transformers():
    code = """
import sys
import hf_cifar
import transformers.modeling_layers  # imports AutoModel indirectly
from transformers import AutoConfig, AutoModelForImageClassification
config = AutoConfig.for_model("article_mlp", num_labels=3)
model = AutoModelForImageClassification.from_config(config)
names = [type(finder).__name__ for finder in sys.meta_path]
print(type(model).__name__, "_AutoModelsFinder" in names)
"""
    assert run_python(code) == ["ArticleMLPForImageClassification", "False"]


def test_registering_again_changes_nothing():
    import transformers.models.auto.modeling_auto as auto_models

    finders = list(sys.meta_path)
    register_article_models()
    assert sys.meta_path == finders
    assert sys.modules[AUTO_MODELS] is auto_models
