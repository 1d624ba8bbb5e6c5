"""The server under open-loop load: goodput at p99 <= 100 ms, compared with LitServe and plain FastAPI.

python -m benchmarks.serving [--run RUN --images FOLDER] [--rounds 3] [--seconds 5] [--no-peers]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil

from benchmarks.evaluation import given_or_trained, parse_run_options
from benchmarks.exported import bare
from benchmarks.load import closed_loop, form, open_loop, post, quantile, run
from benchmarks.measure import ROOT, compare
from benchmarks.turns import CONTEXT
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.data.listing import list_images
from hf_cifar.deploy.export import export_run
from hf_cifar.models.exported import read_onnx

LIMIT = 0.1  # seconds, of p99
CLIENTS, STEP = 32, 1.1  # of the load that finds the capacity; between the rates that are tried
NUM_IMAGES = 500
BARE = "bare ONNX Runtime"
START_SECONDS = 180  # allowed until the first answer


def free_port() -> int:
    """Return a port that no program uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def ours(model: str, *flags: str) -> Callable[[int], list[str]]:
    """Return the command line of our server, given a port."""
    start = [
        sys.executable,
        "-c",
        "from hf_cifar.cli import run; run()",
        "serve",
        model,
        "--use_cpu",
    ]
    return lambda port: [*start, "--port", str(port), *flags]


def peer(name: str, model: str) -> Callable[[int], list[str]]:
    """Return the command line of another server, given a port."""
    start = [sys.executable, "-m", f"benchmarks.serving_{name}", model]
    return lambda port: [*start, str(port)]


@contextlib.contextmanager
def started(command: Callable[[int], list[str]], request: bytes) -> Iterator[int]:
    """Start a server, wait for its first answer, yield its port, and end it with all its processes."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(port),
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        reply, end = None, time.monotonic() + START_SECONDS
        try:
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"no answer: {reply}\n{log.read().decode()[-2000:]}")
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    (reply,) = run(lambda: closed_loop(port, [request], 1))
                    if reply.status == 200:
                        break
                time.sleep(0.2)
            yield port
        finally:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(process.pid).children(recursive=True)
                for each in children:
                    each.kill()
            process.kill()
            process.wait()


def goodput(
    port: int, requests: Sequence[bytes], seconds: float, limit: float
) -> tuple[float, float]:
    """Return the answers per second within `limit` seconds, at the highest rate at which 99% of requests
    meet it; and the closed-loop throughput, without a limit.

    The search starts at the closed-loop throughput, and steps up while the limit holds, or down until it
    does.
    """
    closed = run(lambda: closed_loop(port, requests, CLIENTS, seconds=seconds))
    throughput = sum(reply.status == 200 for reply in closed) / seconds
    rate, found, direction = throughput, 0.0, 0
    while rate > 1:
        replies = run(partial(open_loop, port, requests, rate, seconds))
        good = [r.seconds for r in replies if r.status == 200 and r.seconds <= limit]
        holds = len(good) >= 0.99 * len(replies)
        print(
            f"  {rate:.0f} requests/s: {len(good) / seconds:.0f} answers/s within {1000 * limit:.0f} ms, p99 "
            f"{1000 * quantile([r.seconds for r in replies], 0.99):.0f} ms",
            flush=True,
        )
        if holds:
            found = max(found, len(good) / seconds)
        if direction == 0:
            direction = 1 if holds else -1
        elif holds != (direction == 1):
            break
        rate = rate * STEP if direction == 1 else rate / STEP
    return found, throughput


def measured(
    command: Callable[[int], list[str]],
    images: Sequence[bytes],
    seconds: float,
    limit: float,
    throughputs: list[float],
) -> float:
    """Start a server, and measure its goodput with forms of one image, as browsers and curl send them.

    Its closed-loop throughput is added to `throughputs`.
    """
    requests = [post(body, content_type=kind) for body, kind in map(form, images)]
    with started(command, requests[0]) as port:
        run(lambda: closed_loop(port, requests, CLIENTS, seconds=2))  # warm up
        found, throughput = goodput(port, requests, seconds, limit)
        throughputs.append(throughput)
        return found


def compare_servers(
    model: str,
    images: str,
    *,
    rounds: int = 3,
    seconds: float = 5,
    limit: float = LIMIT,
    peers: bool = True,
    folder: Path | None = None,
) -> dict[str, list[float]]:
    """Compare servers of a run with each other, and with the network alone, which no server exceeds.

    peers: also with the servers of others.
    """
    files = [Path(path).read_bytes() for path in list_images(images)[0][:NUM_IMAGES]]
    with tempfile.TemporaryDirectory() as temporary, CONTEXT.Pool(1) as process:
        file = str(Path(temporary, "model.onnx"))
        export_run(model, ExportConfig(output=file, parity_images=0))
        servers = {
            "hf-cifar serve, ONNX": ours(file),
            "hf-cifar serve, run": ours(model),
        }
        if peers:
            servers["FastAPI, pipeline"] = peer("plain", model)
            if importlib.util.find_spec("litserve") is None:
                print("LitServe is left out; it needs: pip install litserve")
            else:
                servers["LitServe"] = peer("litserve", model)
        throughputs: dict[str, list[float]] = {name: [] for name in servers}
        variants: dict[str, Callable[[], float]] = {
            name: partial(measured, command, files, seconds, limit, throughputs[name])
            for name, command in servers.items()
        }
        variants[BARE] = lambda: process.apply(bare, (True, 2000, file))[0]
        size = "x".join(map(str, read_onnx(file)[1]["input_size"]))
        facts = {"seconds": seconds, "bytes_per_image": len(files[0])}
        rates = compare(
            f"serving, {size} px", variants, "answers/s", rounds, folder,
            loop="open", p99_limit_ms=1000 * limit, **facts,
        )  # fmt: skip
        found = throughputs | {BARE: rates[BARE]}
        again = {name: iter(values).__next__ for name, values in found.items()}
        compare(
            f"serving, {size} px, closed loop", again, "answers/s", rounds, folder,
            loop="closed", clients=CLIENTS, **facts,
        )  # fmt: skip
        return rates


def main() -> None:
    """Compare on a run's own images, or on small generated pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="for each rate")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with others' servers",
    )
    options = parse_run_options(parser)
    CONTEXT.set_forkserver_preload(["benchmarks.serving"])
    with tempfile.TemporaryDirectory() as folder:
        model, images = given_or_trained(options, NUM_IMAGES, Path(folder))
        compare_servers(
            model, images, rounds=options.rounds, seconds=options.seconds, peers=options.peers
        )


if __name__ == "__main__":
    main()
