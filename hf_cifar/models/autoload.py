"""Makes the article models known to transformers after a bare `import hf_cifar`.

That import loads no torch, but registering a model takes its class, and so torch. It waits until
transformers' own table of auto models is imported, before any `AutoModel...` or `pipeline` is used.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_MODELS = "transformers.models.auto.modeling_auto"
ARTICLE_MODELS = "hf_cifar.models.article"  # registers its classes when it is imported


class _AutoModelsFinder(MetaPathFinder):
    """Finds `AUTO_MODELS` where it always is, and has the article models imported after it."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name != AUTO_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(ARTICLE_MODELS)

        spec.loader.exec_module = execute_then_register
        return spec


def register_article_models() -> None:
    """Register the article models once transformers' auto models are loaded: perhaps now."""
    if AUTO_MODELS in sys.modules:
        importlib.import_module(ARTICLE_MODELS)
    else:
        sys.meta_path.insert(0, _AutoModelsFinder())
