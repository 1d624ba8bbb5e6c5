"""Start a server, let it end without losing a request, and reload its model on SIGHUP."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import signal
import socket
import sys
from types import FrameType

import uvicorn

from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.serving import ServeConfig
from hf_cifar.errors import UserError
from hf_cifar.platform import allow_open_files, on_hangup
from hf_cifar.serve.app import Service, create_app
from hf_cifar.serve.gate import Gate
from hf_cifar.serve.listener import listening, url_of
from hf_cifar.serve.protocol import limited_protocol
from hf_cifar.serve.workers import GRACE_SECONDS, Workers

logger = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 75  # longer than common load balancers, which then close the connection first


def serve(predict: PredictConfig, config: ServeConfig) -> None:
    """Serve a model until a signal ends it.

    Raises: UserError if the model cannot be loaded, or the address cannot be used.
    """
    log = logging.getLogger("hf_cifar.requests")
    log.propagate, log.handlers = False, [logging.StreamHandler(sys.stdout)]
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # requests that are not HTTP
    allow_open_files()
    factory = None
    if importlib.util.find_spec("uvloop") is not None:  # not on Windows
        import uvloop

        factory = uvloop.new_event_loop
    with listening(config) as listener, asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(predict, config, listener))


async def _serve(predict: PredictConfig, config: ServeConfig, listener: socket.socket) -> None:
    workers = Workers(predict, config)
    await workers.start()
    service = Service(workers, config)
    app = create_app(service)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    server = Server(service, Gate(app, service, paths))
    on_hangup(asyncio.get_running_loop(), lambda: workers.background(_reload(workers)))
    logger.info(
        "serving %s at %s; API documentation at /docs; Ctrl-C stops the server",
        workers.about["version"], url_of(listener),
    )  # fmt: skip
    await server.serve(sockets=[listener])
    forced = server.force_exit
    await workers.close(at_once=forced)
    logger.info(
        "stopped%s",
        " without waiting for answers" if forced else "; all accepted requests were answered",
    )


async def _reload(workers: Workers) -> None:
    with contextlib.suppress(UserError):  # which is logged
        await workers.reload()


class Server(uvicorn.Server):
    """A server that drains on SIGTERM. While it drains, another signal ends the drain; after that, the next
    one ends the server without waiting for answers."""

    def __init__(self, service: Service, app: Gate) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                proxy_headers=False,
                ws="none",
                server_header=False,
                http=limited_protocol(config.timeout),
                # Clients that do not read their answers do not keep the server.
                timeout_graceful_shutdown=math.ceil(2 * config.timeout + GRACE_SECONDS),
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        seconds, was_draining = self._service.config.drain_seconds, self._service.draining
        self._service.draining = True
        if sig == signal.SIGTERM and seconds and not was_draining:
            logger.info("draining for %g s", seconds)
            asyncio.get_event_loop().call_later(seconds, self._exit)
        elif not self.should_exit:
            self.should_exit = True
        else:
            self.force_exit = True

    def _exit(self) -> None:
        self.should_exit = True
