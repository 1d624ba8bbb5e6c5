"""No module-level cache keeps the data of a run."""

import functools
import importlib
import pkgutil

import hf_cifar

# All caches, with the small values that they contain.
LIGHT = {
    "hf_cifar.data.images._note_full_range",  # None
    "hf_cifar.data.images._register_heic",  # None
    "hf_cifar.data.listing.image_suffixes",
    "hf_cifar.hub.fetch._warn_of",  # None
    "hf_cifar.hub.origin.find_origin",  # ids and commits
    "hf_cifar.models.names._timm_models",  # names
    "hf_cifar.training.memory.keep_freed_memory",  # None
}


def caches(owner):
    """Qualified names of the cached functions of a module or class."""
    for value in vars(owner).values():
        function = getattr(value, "__func__", value)
        if isinstance(function, functools._lru_cache_wrapper):
            yield f"{function.__module__}.{function.__qualname__}"
        elif isinstance(value, type) and value.__module__ == getattr(owner, "__name__", None):
            yield from caches(value)


def test_module_caches_contain_no_data_sets():
    modules = [
        importlib.import_module(each.name)
        for each in pkgutil.walk_packages(hf_cifar.__path__, "hf_cifar.")
    ]
    found = {name for module in modules for name in caches(module)}
    assert {name for name in found if name.startswith("hf_cifar.")} <= LIGHT
