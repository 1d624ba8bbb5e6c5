"""Interpret a model's name and check that the model exists. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from hf_cifar.config.model import BUNDLED, SCRATCH, is_exported
from hf_cifar.config.objects import InMemory, require_object
from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.hub.fetch import fetch
from hf_cifar.hub.reach import looks_like_path, require_network, url_advice
from hf_cifar.text import listed, nearest_hint, one_line

ARTICLE_NAMES = ("article_cnn", "article_mlp")
BUNDLED_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
ANY_MODEL = f"a local folder or {BUNDLED}{BUNDLED_NAMES[0]}"
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHT_SUFFIXES = {
    ".bin", ".ckpt", ".gguf", ".h5", ".keras", ".msgpack", ".onnx", ".pb", ".pt", ".pth", ".safetensors",
}  # fmt: skip


def check_models(config: RunConfig) -> None:
    """Check that the model and the teacher of a run exist, as `check_model_name` does."""
    model, teacher = config.model, config.train.teacher
    trust = model.trust_remote_code
    check_model_name(model.model_name_or_path, model.model_revision, trust_remote_code=trust)
    if teacher is not None:
        check_teacher_name(teacher, trust_remote_code=trust)


def check_teacher_name(teacher: str, *, trust_remote_code: bool = False) -> None:
    """Check that a teacher exists, as `check_model_name` does.

    Raises: UserError also for a model that is not fine-tuned.
    """
    if teacher.startswith((SCRATCH, BUNDLED)) or is_exported(teacher):
        raise UserError(
            f"--teacher {teacher} is not a fine-tuned model; pass the folder of a run, or the Hub id of one"
        )
    try:
        check_model_name(
            teacher, trust_remote_code=trust_remote_code, purpose="the folder of a run"
        )
    except UserError as error:
        raise UserError(f"--teacher: {error}") from None


def check_model_name(
    name: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    purpose: str = ANY_MODEL,
) -> None:
    """Check that a model exists, reading at most one small file.

    purpose: what to pass instead, in the error for an unreachable Hub, or for a folder without a model.
    Raises: UserError if the model does not exist, the Hub is needed and cannot be reached, or its code is not
    pinned to a commit.
    """
    require_object(name, "model")
    if isinstance(name, InMemory):
        return
    check_code_is_pinned(name, revision, trust_remote_code)
    if name.startswith(SCRATCH):
        _check_architecture(name.removeprefix(SCRATCH))
    elif name.startswith(BUNDLED):
        if name.removeprefix(BUNDLED) not in BUNDLED_NAMES:
            raise UserError(
                f"unknown bundled model {name.removeprefix(BUNDLED)!r}; pass "
                f"one of {listed([BUNDLED + each for each in BUNDLED_NAMES])}"
            )
    elif looks_like_path(name):
        if not (Path(name).expanduser() / "config.json").is_file():
            raise UserError(_no_model(name, purpose))
    else:
        require_network(f"model {name}")
        with hub_errors(name, revision or "main", purpose):
            fetch(name, "config.json", revision=revision or "main")


def _no_model(name: str, purpose: str) -> str:
    """Say why a path is not a model, and what is there instead."""
    folder = Path(name).expanduser()
    problem = f"no model in {name}: "
    if advice := url_advice(name):
        return f"no model {name}{advice}"
    if folder.is_file() and is_exported(name):
        return f"{name} is an exported model, for predict and evaluate only; pass the folder of its run"
    if folder.is_file():
        return f"{name} is a file; pass the folder of a model, with its config.json"
    if not folder.is_dir():
        hint = ""
        if folder.parent.is_dir():
            hint = nearest_hint(folder.name, (each.name for each in folder.parent.iterdir()))
        return f"{problem}{Path(name) / 'config.json'} does not exist{hint}"
    if (folder / "adapter_config.json").is_file():
        return (
            f"{problem}it is a PEFT adapter; load it onto its model, and save that with "
            "merge_and_unload().save_pretrained(FOLDER)"
        )
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
        return f"{problem}models are in its folders {listed(inside, 3)}; pass one of them"
    others = sorted(each.name for each in folder.iterdir() if each.suffix in WEIGHT_SUFFIXES)
    if "model.safetensors" in others:
        return (
            f"{problem}config.json does not exist beside model.safetensors; add that of the model"
        )
    found = f"; found {listed(others, 3)}, which is not read" if others else ""
    advice = "save the model with save_pretrained" if purpose == ANY_MODEL else f"pass {purpose}"
    return f"{problem}{Path(name) / 'config.json'} does not exist{found}; {advice}"


def check_code_is_pinned(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises: UserError if code from the Hub may run and is not pinned to one commit."""
    local = name.startswith((SCRATCH, BUNDLED)) or looks_like_path(name)
    if trust_remote_code and not local and not COMMIT.fullmatch(revision or ""):
        raise UserError(
            f"--trust_remote_code runs code from {name}, and that of {revision or 'main'} may change; review "
            "it, and pass its full 40-digit commit hash as --model_revision"
        )


def _check_architecture(name: str) -> None:
    """Raises: UserError for a name that is neither an article model nor a timm architecture."""
    if name in ARTICLE_NAMES:
        return
    source, registered = _timm_models()
    architecture = name.partition(".")[0]
    if architecture in registered or re.search(rf"""['"]{re.escape(architecture)}['"]:""", source):
        return  # the second test finds former names that timm still accepts
    hint = nearest_hint(architecture, [*ARTICLE_NAMES, *sorted(registered)])
    raise UserError(
        f"unknown architecture {name!r}{hint}; scratch/ takes {', '.join(ARTICLE_NAMES)} or a timm name"
    )


@functools.lru_cache(maxsize=1)
def _timm_models() -> tuple[str, frozenset[str]]:
    """Read timm's source and the architectures it registers; its own registry would import torch."""
    timm = importlib.util.find_spec("timm")
    assert timm is not None and timm.origin is not None  # a dependency
    folder = Path(timm.origin).parent / "models"
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    names = re.findall(r"^@register_model\s+def (\w+)\(", source, flags=re.MULTILINE)
    return source, frozenset(names)


def _other_name(name: str) -> str:
    """Suggest the full name that a bare name may stand for."""
    if name in ARTICLE_NAMES:
        return f", or {SCRATCH}{name}"
    return f", or {BUNDLED}{name}" if name in BUNDLED_NAMES else ""


@contextlib.contextmanager
def hub_errors(name: str, revision: str, purpose: str = ANY_MODEL) -> Iterator[None]:
    """Turn an error about a model on the Hub into a UserError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except UserError:
        raise
    except HFValidationError:
        raise UserError(f"no model {name!r}: it is neither a local folder nor a Hub id") from None
    except LocalEntryNotFoundError:
        if not constants.HF_HUB_OFFLINE:
            raise UserError(
                f"model {name}: {constants.ENDPOINT} did not answer; try again"
            ) from None
        raise UserError(
            f"{name} is neither a folder nor in the cache, and HF_HUB_OFFLINE=1 forbids the network; unset "
            f"it, or pass {purpose}{_other_name(name)}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"model {name} has no revision {revision!r}; see its page on the Hub"
        ) from None
    except EntryNotFoundError as error:
        raise UserError(
            f"{name} on the Hub is not a transformers or timm model, or is incomplete: "
            f"{one_line(error, 200)}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"no model {name} on the Hub, or it is private or gated; check the name, or run: hf auth login"
        ) from None
    except Exception as error:  # the client raises its own, httpx's and OS errors
        raise UserError(
            f"model {name}: cannot be fetched ({one_line(error, 200)}); try again"
        ) from None
