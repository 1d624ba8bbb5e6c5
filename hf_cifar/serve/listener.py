"""The port of a server."""

from __future__ import annotations

import socket

from hf_cifar.config.serving import ListenConfig
from hf_cifar.errors import UserError
from hf_cifar.text import one_line

BACKLOG = 2048  # connections that the system accepts before the server does


def listening(config: ListenConfig) -> socket.socket:
    """Open the port. Raises: UserError if another program has it, or this machine has no such address."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host}:{config.port}: {one_line(error.strerror or error)}; pass "
            "another --port or --host"
        ) from None


def url_of(listener: socket.socket) -> str:
    """Return the address of an open port, for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
