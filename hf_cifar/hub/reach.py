"""Decide whether a name is local or on the Hub, and check that the Hub can be reached."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from hf_cifar.errors import UserError


def looks_like_path(name: str) -> bool:
    """True if a data set or model name is a local file or folder rather than a Hub id."""
    return (
        Path(name).expanduser().exists()
        or name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name  # on Windows
    )


def url_advice(name: str) -> str:
    """What to pass instead of a URL, which is not the name of a data set or model; empty for other names."""
    if not re.match(r"[a-z0-9]+://", name):
        return ""
    url = urlsplit(name)
    if url.scheme == "file":
        return f"; pass {url.path}"
    if url.hostname in ("huggingface.co", "hf.co", "www.huggingface.co"):
        parts = url.path.strip("/").removeprefix("datasets/").split("/")
        return f"; pass the id, {'/'.join(parts[:2])}"
    return "; it is a URL: download it, and pass the file or folder"


OFFLINE = (
    "set HF_HUB_OFFLINE=1 to use the cache, or pass a local folder (offline: --model_name_or_path "
    "bundled/efficientnet_lite0 --dataset_name bundled/digits)"
)


def require_network(what: str, advice: str = OFFLINE, timeout_s: float = 3.0) -> None:
    """Fail at once if the Hub cannot be reached, not after minutes of retries by the client.

    Does nothing under HF_HUB_OFFLINE=1, when the cache is used. advice: what to do then.
    Raises: UserError with the advice.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    reached = threading.Event()

    def connect() -> None:
        # Name resolution has no timeout of its own, hence the thread.
        with contextlib.suppress(OSError):
            socket.create_connection(_first_hop(constants.ENDPOINT), timeout=timeout_s).close()
            reached.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not reached.is_set():
        raise UserError(f"{what} needs {constants.ENDPOINT}, which cannot be reached; {advice}")


def _first_hop(endpoint: str) -> tuple[str, int]:
    """Host and port of the first hop of a connection to `endpoint`: its proxy, if one is set."""
    url = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or {"http": 80, "https": 443}.get(url.scheme, 1080)
