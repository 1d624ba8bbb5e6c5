"""Private names of other libraries on which the package depends.

No library promises to keep these. An upgrade that changes one fails here, by its name; so does a name that is
not listed yet.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from optuna.trial import create_trial
from torch.nn.modules import batchnorm
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

import hf_cifar

# Methods that a class of ours overrides or calls.
SIGNATURES = {
    "EvaluationModule._compute": "(self, *, predictions=None, references=None, **kwargs) -> Dict[str, Any]",
    "EvaluationModule._info": "(self) -> evaluate.info.EvaluationModuleInfo",
    "PreTrainedModel._init_weights": "(self, module)",
    "Trainer._determine_best_metric": "(self, metrics: dict[str, float], "
    "trial: 'optuna.Trial | dict[str, Any] | None') -> bool",
    "Trainer._evaluate": "(self, trial: 'optuna.Trial | dict[str, Any] | None', "
    "ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> dict[str, float]",
    "Trainer._get_train_sampler": "(self, train_dataset: torch.utils.data.dataset.Dataset | None = None)"
    " -> torch.utils.data.sampler.Sampler | None",
    "Trainer._issue_warnings_after_load": "(self, load_result: Any) -> None",
    "Trainer._load_best_model": "(self) -> None",
    "Trainer._load_optimizer_and_scheduler": "(self, checkpoint: str | None) -> None",
    "Trainer._load_rng_state": "(self, checkpoint: str | None) -> None",
    "Trainer._prepare_inputs": "(self, inputs: dict[str, torch.Tensor | typing.Any]) "
    "-> dict[str, torch.Tensor | typing.Any]",
    "Trainer._run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, "
    "num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, "
    "epochs_trained, steps_trained_in_current_epoch)",
    "Trainer._save": "(self, output_dir: str | None = None, state_dict: dict | None = None) -> None",
    "Trainer._save_checkpoint": "(self, model: torch.nn.modules.module.Module, "
    "trial: 'optuna.Trial | dict[str, Any] | None') -> None",
    "Trainer._save_optimizer_and_scheduler": "(self, output_dir: str) -> None",
}
# Attributes of a Trainer that ours sets or reads, and any of ours that the parent starts to use.
TRAINER_ATTRIBUTES = {"_train_batch_size"}
# Private classes, attributes and arguments that the package uses, each with a check that it exists.
OTHER_NAMES = {
    "_BatchNorm": lambda: issubclass(batchnorm.BatchNorm2d, batchnorm._BatchNorm),
    "_attn_implementation": lambda: PreTrainedConfig()._attn_implementation is None,
    "_internal_call": lambda: "_internal_call" in inspect.signature(Trainer.save_model).parameters,
    "_supports_sdpa": lambda: PreTrainedModel._supports_sdpa is False,
    "_trial_id": lambda: create_trial(value=0.0)._trial_id == -1,
}
NAMED_TUPLE_METHODS = {"_asdict", "_fields", "_replace"}  # which collections documents


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@pytest.fixture(scope="module")
def overridden():
    """Return the private methods of other libraries that our classes override, by CLASS.NAME."""
    modules = pkgutil.walk_packages(hf_cifar.__path__, "hf_cifar.")
    found = {}
    for module in [importlib.import_module(module.name) for module in modules]:
        for ours in vars(module).values():
            if isinstance(ours, type) and ours.__module__.startswith("hf_cifar."):
                for base in ours.__mro__:
                    if not base.__module__.startswith(("hf_cifar.", "enum")):
                        shared = vars(ours).keys() & vars(base).keys()
                        found |= {
                            f"{base.__name__}.{name}": vars(base)[name]
                            for name in shared
                            if is_private(name) and callable(vars(ours)[name])
                        }
    return found


@pytest.fixture(scope="module")
def names():
    """Return the private names that the package's source uses, and those that it defines."""
    used, defined = set(), set()
    for path in Path(hf_cifar.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=name, ctx=context):
                    used.add(name)
                    if isinstance(context, ast.Store):
                        defined.add(name)
                case ast.keyword(arg=str(name)):
                    used.add(name)
                case ast.ImportFrom(module=str(module)) if not module.startswith("hf_cifar"):
                    used |= {alias.name for alias in node.names} | set(module.split("."))
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                    | ast.arg(arg=name)
                ):
                    defined.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
    return set(filter(is_private, used)), set(filter(is_private, defined))


@pytest.fixture(scope="module")
def called(names):
    """Return the private methods of the Trainer that the package calls or defines, by CLASS.NAME."""
    used, defined = names
    return {
        f"Trainer.{name}": getattr(Trainer, name)
        for name in used | defined
        if hasattr(Trainer, name)
    }


def test_every_private_method_that_is_overridden_or_called_is_listed(overridden, called):
    assert overridden.keys() | called.keys() == SIGNATURES.keys()


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature_of_a_private_method_is_unchanged(name, overridden, called):
    assert str(inspect.signature((overridden | called)[name])) == SIGNATURES[name]


def test_no_other_attribute_of_the_trainer_is_used(names):
    used, defined = names
    of_trainer = set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(Trainer)))
    assert (used | defined) & of_trainer - set(dir(Trainer)) == TRAINER_ATTRIBUTES


def test_every_other_private_name_is_listed(names, called):
    used, defined = names
    of_trainer = {name.removeprefix("Trainer.") for name in called}
    assert used - defined - of_trainer - NAMED_TUPLE_METHODS == OTHER_NAMES.keys()


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_private_name_still_exists(name):
    assert OTHER_NAMES[name]()
