"""Is a name local or on the Hub, and can the Hub be reached?"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from hf_cifar.errors import UserError


def looks_like_path(name: str) -> bool:
    """Whether a data set or model name means a local file or folder rather than a Hub id."""
    return (
        Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1
    )


def require_network(what: str, timeout_s: float = 3.0) -> None:
    """Fail at once where the Hub cannot be reached, instead of after the client's minutes of retries.

    Does nothing under HF_HUB_OFFLINE=1: then the cache answers.
    Raises: UserError that says how to go offline.
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
        raise UserError(
            f"{what} needs {constants.ENDPOINT}, which cannot be reached; set HF_HUB_OFFLINE=1 to use what "
            "is cached, or pass a local folder (offline: --model_name_or_path bundled/efficientnet_lite0 "
            "--dataset_name bundled/digits)"
        )


def _first_hop(endpoint: str) -> tuple[str, int]:
    """Host and port that a connection to `endpoint` goes to first: a proxy, where one is set."""
    url = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme, 1080)
