"""Options of the server and of the demo."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from dataclasses import dataclass

from hf_cifar.config.deployment import MOVED_DATA
from hf_cifar.config.fields import check_fields, option
from hf_cifar.errors import UserError

API_KEY = "HF_CIFAR_API_KEY"  # an environment variable; a command line can be read by other users
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class ListenConfig:
    """Where a server listens, who may use it, and the largest request."""

    host: str = option(
        "127.0.0.1",
        "Address to listen on. An address other than loopback needs an API key or --no_auth.",
    )
    port: int = option(8000, "Port to listen on; 0: any free port.", low=0, high=65535)
    api_key: str | None = option(
        None,
        f"Key that clients send as 'Authorization: Bearer KEY'. Other users of this machine can read it from "
        f"the command line; the environment variable {API_KEY} hides it.",
    )
    no_auth: bool = option(False, "Serve other machines without a key.")
    max_bytes: int = option(
        10 * 2**20, "Largest request, in bytes; more is answered with 413.", low=1024, high=2**30
    )

    def __post_init__(self) -> None:
        if self.api_key is None and os.environ.get(API_KEY):
            object.__setattr__(self, "api_key", os.environ[API_KEY])
        check_fields(self)
        if self.api_key is not None and self.no_auth:
            raise UserError(
                f"an API key and --no_auth cannot be combined; leave one out (see {API_KEY})"
            )
        if self.api_key is not None and (
            len(self.api_key) < MIN_KEY_LENGTH
            or not all("!" <= each <= "~" for each in self.api_key)
        ):
            raise UserError(
                f"the API key must have at least {MIN_KEY_LENGTH} letters, digits or signs, without spaces "
                "and line ends; pass another, such as the output of: openssl rand -hex 32"
            )
        if self.api_key is None and not self.no_auth and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host} can be reached from other machines; set a key in {API_KEY}, or pass "
                "--no_auth to serve anyone"
            )


@dataclass(frozen=True)
class ServeConfig(ListenConfig):
    """Where the server listens, and how much it takes."""

    _argument_group_name = "server"

    workers: int = option(
        1,
        "Processes that run the model, each with a copy of it; they share the cores.",
        low=1,
        high=64,
    )
    max_images: int = option(16, "Largest number of images in a request.", low=1, high=10**4)
    max_frames: int = option(
        256,
        "Largest number of frames in an animation; only the first is classified.",
        low=1,
        high=10**6,
    )
    max_queue: int = option(
        64,
        "Largest number of images waiting or being computed; a request that would exceed it is answered "
        "with 503.",
        low=1, high=10**6,
    )  # fmt: skip
    timeout: float = option(
        10.0,
        "Seconds allowed for the headers, for the body, and for the images to leave the queue; images that "
        "wait longer are not computed.",
        low=0.01, high=3600,
    )  # fmt: skip
    drain_seconds: float = option(
        0.0,
        "Seconds after SIGTERM in which new requests are still answered while /readyz says 503, so that a "
        "load balancer can turn to other servers.",
        low=0, high=3600,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_images > self.max_queue:
            raise UserError(
                f"--max_images {self.max_images} is more than --max_queue {self.max_queue}; change one"
            )


@dataclass(frozen=True)
class DemoConfig(ListenConfig):
    """Where the demo listens, its examples, and the Space that is written instead."""

    _argument_group_name = "demo"

    api_key: str | None = option(
        None,
        "Password that the page asks for, with any name. Other users of this machine can read it from the "
        f"command line; the environment variable {API_KEY} hides it.",
    )
    num_examples: int = option(
        6, "Validation images of the run that are offered as examples; 0: none.", low=0, high=100
    )
    dataset_name: str | None = option(None, MOVED_DATA)
    space: str | None = option(
        None, "New folder for a Hugging Face Space with the demo, which is then not started here."
    )
    push: str | None = option(
        None, "Push the Space to the Hub, as NAME or NAMESPACE/NAME; its examples go with it."
    )
    private: bool = option(True, "Make a new Space private; an existing one stays as it is.")

    def __post_init__(self) -> None:
        if self.space is not None:
            for each in dataclasses.fields(ListenConfig):
                if getattr(self, each.name) != each.default:
                    raise UserError(
                        f"--{each.name} has no effect with --space, which starts no server; leave one out"
                    )
        elif self.push is not None or not self.private:
            name = "push" if self.push is not None else "private"
            raise UserError(f"--{name} needs --space FOLDER, where the Space is written first")
        super().__post_init__()


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
