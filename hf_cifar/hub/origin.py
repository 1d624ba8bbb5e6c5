"""The origin of a model or data set: a name without local folders, a licence, citations."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from hf_cifar.config.model import SCRATCH, ModelConfig
from hf_cifar.config.objects import MEMORY, InMemory
from hf_cifar.hub.fetch import fetch
from hf_cifar.hub.reach import looks_like_path

HUB = "https://huggingface.co"
# Licence ids that the Hub accepts; any other licence is `other` there, with a `license_name`.
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc0-1.0", "creativeml-openrail-m", "epl-2.0", "eupl-1.2", "gemma", "gpl", "gpl-2.0",
    "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by",
    "openrail", "openrail++", "other", "pddl", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
MAX_CITATIONS = 3
BIBTEX = re.compile(r"^```\w*[ \t]*\n\s*(@\w+\s*\{.*?)\s*^```", re.DOTALL | re.MULTILINE)

CIFAR = """@techreport{krizhevsky2009learning,
  author = {Krizhevsky, Alex},
  title = {Learning Multiple Layers of Features from Tiny Images},
  institution = {University of Toronto},
  year = {2009}
}"""
DIGITS = """@misc{alpaydin1998optical,
  author = {Alpaydin, Ethem and Kaynak, Cenk},
  title = {Optical Recognition of Handwritten Digits},
  howpublished = {UCI Machine Learning Repository},
  year = {1998},
  doi = {10.24432/C50P49}
}"""
EFFICIENTNET = """@inproceedings{tan2019efficientnet,
  author = {Tan, Mingxing and Le, Quoc V.},
  title = {EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks},
  booktitle = {International Conference on Machine Learning},
  year = {2019}
}"""
# For data sets whose own card is not available.
CITATIONS = {"uoft-cs/cifar10": (CIFAR,), "uoft-cs/cifar100": (CIFAR,)}


@dataclass(frozen=True)
class Origin:
    """The origin of a model or data set.

    name: for display, without local folders. hub_id: None if it is not on the Hub. license: the Hub's id,
    None if unknown; "other" has a license_name. citations: BibTeX entries.
    """

    name: str
    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    citations: tuple[str, ...] = ()


BUNDLED_ORIGINS = {
    "bundled/digits": Origin("bundled/digits", license="cc-by-4.0", citations=(DIGITS,)),
    **{
        f"bundled/efficientnet_lite{number}": Origin(
            f"bundled/efficientnet_lite{number}",
            hub_id=f"timm/tf_efficientnet_lite{number}.in1k",
            license="apache-2.0",
            citations=(EFFICIENTNET,),
        )
        for number in range(3)
    },
}


def public_name(name: str) -> str:
    """Strip local folders from the name of a data set or model."""
    return Path(name).expanduser().resolve().name if looks_like_path(name) else name


@functools.lru_cache
def find_origin(name: str, kind: str, revision: str | None = None) -> Origin:
    """Find the origin of a `--model_name_or_path` or `--dataset_name` by its card.

    kind: "model" or "dataset". Cached, so that the answers before a run are still available at its end.
    """
    if name in BUNDLED_ORIGINS:
        return BUNDLED_ORIGINS[name]
    if name.startswith((SCRATCH, MEMORY)):
        return Origin(name)
    hub_id = None if looks_like_path(name) else name
    card = _find_file(name, "README.md", kind, revision)
    metadata = _metadata(card) if card else {}
    found = metadata.get("license")
    if found is None and kind == "model":
        found = _timm_license(_find_file(name, "config.json", kind, revision))
    text = card.read_text(errors="replace") if card else ""
    citations = tuple(dict.fromkeys(BIBTEX.findall(text)))[:MAX_CITATIONS]
    return Origin(
        name=public_name(name),
        hub_id=hub_id,
        citations=citations or CITATIONS.get(name, ()),
        **_license(found, metadata, hub_id),
    )


def origin_of_model(config: ModelConfig) -> Origin:
    """Return the origin of a run's model; for one in memory, that of the checkpoint it was loaded from."""
    name = config.model_name_or_path
    if not isinstance(name, InMemory):
        return find_origin(name, "model", config.model_revision)
    model = name.value[0] if isinstance(name.value, tuple) else name.value
    base = getattr(model, "name_or_path", "")
    return replace(find_origin(base, "model"), name=str(name)) if base else Origin(str(name))


def _find_file(name: str, file: str, kind: str, revision: str | None) -> Path | None:
    """Find a file of a local folder or a Hub repository; None if it is missing or the Hub does not answer."""
    if looks_like_path(name):
        path = Path(name).expanduser() / file
        return path if path.is_file() else None
    try:
        return fetch(name, file, kind=kind, revision=revision or "main")
    except (OSError, ValueError):  # base classes of the client's errors and of ours
        return None


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # a README that is not a model or data set card
        return {}


def _timm_license(config: Path | None) -> str | None:
    """Read the licence from a timm checkpoint's config."""
    try:
        return (
            json.loads(config.read_text(encoding="utf-8")).get("pretrained_cfg", {}).get("license")
            if config
            else None
        )
    except ValueError:
        return None


def _license(found: Any, metadata: dict[str, Any], hub_id: str | None) -> dict[str, str]:
    """Express a licence in the Hub's fields: `license`, and for an unlisted one its name and link."""
    names = [str(name).lower() for name in (found if isinstance(found, list) else [found])]
    if found in (None, []) or names == ["unknown"]:
        return {}
    if len(names) == 1 and names[0] in LICENSES - {"other"}:
        return {"license": names[0]}
    named = metadata.get("license_name") or "-".join(names)
    license_ = {"license": "other"}
    if named != "other":
        license_["license_name"] = re.sub(r"[^\w.-]+", "-", str(named).lower())
    link = metadata.get("license_link")
    if link and "://" not in str(link):
        link = f"{HUB}/{hub_id}/blob/main/{link}" if hub_id else None
    return license_ | ({"license_link": str(link)} if link else {})
