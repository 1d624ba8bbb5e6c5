"""No cache of a module outlives a run with its data."""

import functools
import importlib
import pkgutil

import hf_cifar

# The caches there are, and the light values that they hold.
LIGHT = {
    "hf_cifar.hub.origin.find_origin",  # ids and commits
    "hf_cifar.models.names._timm_models",  # names
    "hf_cifar.training.memory.keep_freed_memory",  # None
}


def caches(owner):
    """Qualified names of the functions of a module or class that keep their results."""
    for value in vars(owner).values():
        function = getattr(value, "__func__", value)
        if isinstance(function, functools._lru_cache_wrapper):
            yield f"{function.__module__}.{function.__qualname__}"
        elif isinstance(value, type) and value.__module__ == getattr(owner, "__name__", None):
            yield from caches(value)


def test_caches_of_modules_hold_no_data_set():
    modules = [
        importlib.import_module(each.name)
        for each in pkgutil.walk_packages(hf_cifar.__path__, "hf_cifar.")
    ]
    found = {name for module in modules for name in caches(module)}
    assert {name for name in found if name.startswith("hf_cifar.")} <= LIGHT
