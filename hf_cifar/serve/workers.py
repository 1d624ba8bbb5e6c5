"""The worker processes: started, given requests, replaced when they die, and exchanged for a new model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import psutil

from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.serving import ServeConfig
from hf_cifar.errors import UserError
from hf_cifar.platform import num_cores
from hf_cifar.serve import frames

logger = logging.getLogger(__name__)
# At least, without any answer although images wait, after which a worker is stopped.
GRACE_SECONDS = 60.0
# What libraries print must not get between the frames.
START = "import os; output = os.dup(1); os.dup2(2, 1); from hf_cifar.serve.worker import main; main(output)"
RESTART_SECONDS = 1.0  # between attempts to start a worker

Answer = frames.Frame


class Overloaded(Exception):
    """No worker can take the request now."""


class Late(Exception):
    """The images waited for too long."""


class Failed(Exception):
    """The model could not compute the images."""


class Worker:
    """A process that runs the model. number: from 0; of its GPU. about: what `worker.describe` returned; {}
    before it is ready."""

    def __init__(self, process: asyncio.subprocess.Process, number: int, timeout: float) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self.number, self.about = number, dict[str, Any]()
        # Images that are late are answered at once, so this is enough for any request.
        self.grace = max(GRACE_SECONDS, 2 * timeout)
        self.images = 0  # that it has not answered
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._last_answer = time.monotonic()
        self.ended = asyncio.Event()

    @classmethod
    async def start(cls, predict: PredictConfig, serve: ServeConfig, number: int) -> Worker:
        """Start a process, and wait until it has loaded the model. Raises: UserError if it cannot."""
        settings = {
            "predict": dataclasses.asdict(predict),
            "max_frames": serve.max_frames,
            "threads": max(1, num_cores() // serve.workers) if serve.workers > 1 else None,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", START, limit=2**20, env={**os.environ, "LOCAL_RANK": str(number)},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        worker = cls(process, number, serve.timeout)
        try:
            worker._stdin.write(frames.pack(settings))
            about, _ = await frames.read_async(worker._stdout)
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await process.wait()
            raise UserError(f"the process that runs the model ended with status {status}") from None
        except asyncio.CancelledError:
            worker.kill()
            raise
        if "error" in about:
            await process.wait()
            raise UserError(about["error"])
        worker.about = about
        return worker

    async def read_answers(self) -> None:
        """Pass on answers until the process ends; then its requests fail with Overloaded."""
        try:
            while True:
                values, blobs = await frames.read_async(self._stdout)
                self._last_answer = time.monotonic()
                future = self._pending.pop(values["id"], None)
                if future is not None and not future.done():
                    future.set_result((values, blobs))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.kill()  # if its answers are damaged
            self.ended.set()
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(Overloaded("a worker process died; try again"))
            self._pending.clear()

    async def ask(self, number: int, task: str, images: Sequence[bytes], deadline: float) -> Answer:
        """Send images, and wait for the answer. Raises: Overloaded if the process dies."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if not self._pending:
            self._last_answer = time.monotonic()
        self._pending[number] = future
        self.images += len(images)
        try:
            self._stdin.write(
                frames.pack({"id": number, "task": task, "deadline": deadline}, images)
            )
            return await future
        finally:
            self.images -= len(images)

    @property
    def stuck(self) -> bool:
        """True if nothing was answered for long, although images wait."""
        return bool(self._pending) and time.monotonic() - self._last_answer > self.grace

    async def finish(self) -> None:
        """Let the process answer what it has, and end it."""
        while self._pending and not self.ended.is_set():
            await asyncio.sleep(0.01)
            if self.stuck:
                self.kill()
        self._stdin.close()
        await self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def memory(self) -> int:
        """Return its resident memory in bytes; 0 once it has ended."""
        try:
            return psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return 0


class Workers:
    """All workers of a server. They run the same model, except while it is being replaced."""

    def __init__(self, predict: PredictConfig, serve: ServeConfig) -> None:
        self._predict, self._serve = predict, serve
        self.running: list[Worker] = []
        self.about: dict[str, Any] = {}  # facts about the model, see `worker.describe`
        self.restarts = 0
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self._closing = False

    @property
    def alive(self) -> list[Worker]:
        """The workers that take requests."""
        return [worker for worker in self.running if not worker.ended.is_set()]

    @property
    def images(self) -> int:
        """The number of images that wait or are computed."""
        return sum(worker.images for worker in self.running)

    async def start(self) -> None:
        """Start all workers. Raises: UserError if the model cannot be loaded."""
        self.running = await self._started()
        self.background(self._watch())

    async def _started(self) -> list[Worker]:
        tasks = [
            asyncio.create_task(Worker.start(self._predict, self._serve, number))
            for number in range(self._serve.workers)
        ]
        try:
            workers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(found, Worker):
                    found.kill()
            raise
        for worker in workers:
            self._tend(worker)
        self.about = workers[0].about
        return workers

    def _tend(self, worker: Worker) -> None:
        logger.info(
            "worker process %d serves %s in batches of up to %d image%s, and uses %.0f MB",
            worker.process.pid,
            worker.about["version"],
            worker.about["batch_size"],
            "" if worker.about["batch_size"] == 1 else "s",
            worker.memory() / 1e6,
        )
        self.background(worker.read_answers())

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine while the server goes on."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Replace workers that died, and stop those that are stuck."""
        while not self._closing:
            await asyncio.sleep(0.05)
            for worker in list(self.running):
                if worker.stuck:
                    logger.error(
                        "worker process %d has not answered for %.0f s; stopping it",
                        worker.process.pid,
                        worker.grace,
                    )
                    worker.kill()
                if not worker.ended.is_set() or self._reloading.locked():
                    continue
                self.running.remove(worker)
                status = await worker.process.wait()
                logger.error(
                    "worker process %d ended with status %d; starting another",
                    worker.process.pid,
                    status,
                )
                self.background(self._replace(worker.number))

    async def _replace(self, number: int) -> None:
        """Start a worker in place of a dead one, as often as it takes, unless a reload has replaced all."""
        while not self._closing:
            async with self._reloading:
                if len(self.running) >= self._serve.workers:
                    return
                try:
                    worker = await Worker.start(self._predict, self._serve, number)
                except (UserError, OSError) as error:
                    logger.error("cannot start a worker process: %s; trying again", error)
                else:
                    self.restarts += 1
                    self._tend(worker)
                    self.about = worker.about
                    self.running.append(worker)
                    return
            await asyncio.sleep(RESTART_SECONDS)

    def refuse_above_capacity(self, count: int = 1) -> None:
        """Raises: Overloaded if `count` more images cannot be taken now."""
        if not self.alive:
            raise Overloaded("no worker is running at the moment; try again")
        if self.images + count > self._serve.max_queue:
            raise Overloaded(
                f"{self.images} images wait already, and the limit is {self._serve.max_queue}; try again"
            )

    async def ask(
        self, images: Sequence[bytes], task: str = "predict"
    ) -> tuple[dict[str, Any], Answer]:
        """Let one worker answer images; return the facts about its model, and the answer.

        Raises: Overloaded above capacity, or if the worker dies; Late if the images waited for too long;
        Failed if the model does.
        """
        self.refuse_above_capacity(len(images))
        worker = min(self.alive, key=lambda each: each.images)
        deadline = time.monotonic() + self._serve.timeout
        answer = await worker.ask(next(self._numbers), task, images, deadline)
        outcome = answer[0]["outcome"]
        if outcome == "late":
            raise Late(
                f"the images waited for more than {self._serve.timeout:g} s, and were not computed"
            )
        if outcome == "failed":
            raise Failed("the model failed on these images; the log of the server says why")
        return worker.about, answer

    async def reload(self) -> dict[str, Any]:
        """Load the model again, and exchange all workers at once; return the facts about it.

        No request is lost: the old workers answer what they have. Meanwhile, there are twice as many.
        Raises: UserError if the model cannot be loaded; the old workers go on.
        """
        async with self._reloading:
            try:
                new = await self._started()
            except UserError as error:
                logger.error("the model was not reloaded, and the old one stays in use: %s", error)
                raise
            old, self.running = self.running, new
        logger.info("serving %s", self.about["version"])
        for worker in old:
            self.background(worker.finish())
        return self.about

    async def close(self, *, at_once: bool = False) -> None:
        """End all workers after their last answer. at_once: without waiting for it."""
        self._closing = True
        if at_once:
            for worker in self.running:
                worker.kill()
        await asyncio.gather(*(worker.finish() for worker in self.running))
