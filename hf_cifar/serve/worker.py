"""A process that runs the model: it reads frames from its input, and writes answers to its output.

Each core has a thread that decodes the images that wait, up to the size of a batch, and computes them. So a
single image is not delayed, and batches grow with the load. An image that cannot be decoded is answered at
once, and never gets into a batch.

Started by `workers` only.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image

from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.model import is_exported
from hf_cifar.data.images import HEAD_BYTES, check_webp
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.models.exported import read_onnx
from hf_cifar.models.files import model_folder
from hf_cifar.models.problem_type import thresholds_of
from hf_cifar.platform import ignore_signals
from hf_cifar.predict import Predictor
from hf_cifar.runs.folder import RunFolder
from hf_cifar.serve import frames
from hf_cifar.serve.heatmap import Heatmap
from hf_cifar.text import listed, one_line

logger = logging.getLogger(__name__)
# A batch is not filled up for longer than this: its images wait while another one, which may be large, is
# decoded.
GATHER_SECONDS = 0.02
# Images that arrive while a batch is computed wait for it: it takes no longer than this, or than twice the
# time of one image.
BATCH_SECONDS = 0.05
SWITCH_SECONDS = 0.0005  # after which a thread that runs Python lets another one run


@dataclass(eq=False)
class Job:
    """A request. deadline: of `time.monotonic`, which all processes share; later, it is not computed."""

    number: int
    deadline: float
    answers: list[bytes]
    missing: int
    outcome: str = "done"  # or "late", or "failed"
    # The sizes of the batches that its images were in.
    batches: list[int] = field(default_factory=list)


Item = tuple[Job, int, bytes]  # an image of a job, with its place there
Result = TypeVar("Result")


class Worker:
    """Answers frames with a model. output: the stream for the answers; all threads write to it."""

    def __init__(self, config: PredictConfig, max_frames: int, output: BinaryIO) -> None:
        self.predictor = Predictor(config)
        for tensor in chain(self.predictor.model.parameters(), self.predictor.model.buffers()):
            # Loaded weights are mapped from their file; the process would die if it were overwritten.
            tensor.data = tensor.data.clone()
        self.heatmap = Heatmap(self.predictor)
        self.max_frames = max_frames
        self.batch_size = measured_batch_size(self.predictor, config.batch_size)
        self._output, self._output_lock = output, threading.Lock()
        self._lock = threading.Lock()  # of jobs
        self._waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._to_explain: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for _ in range(self.predictor.num_threads):
            threading.Thread(target=self._predict_batches, daemon=True).start()
        threading.Thread(target=self._explain_images, daemon=True).start()

    def write(self, values: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Write a frame."""
        content = frames.pack(values, blobs)
        with self._output_lock:
            self._output.write(content)
            self._output.flush()

    def submit(self, values: dict[str, Any], images: list[bytes]) -> None:
        """Take a request: its id, its deadline, and the task that its images are for."""
        job = Job(values["id"], values["deadline"], [b""] * len(images), len(images))
        waiting = self._to_explain if values["task"] == "explain" else self._waiting
        for index, image in enumerate(images):
            waiting.put((job, index, image))

    def _predict_batches(self) -> None:
        """Decode the images that wait, and compute them as a batch, on one core.

        A batch on its own core takes less core time than one that is divided among all cores.
        """
        torch.set_num_threads(1)
        while True:
            item: Item | None = self._waiting.get()
            batch: list[tuple[Job, int, np.ndarray]] = []
            end = time.monotonic() + GATHER_SECONDS
            while item is not None:
                job, index, image = item
                view = self._guarded(self._view, job, index, image)
                if view is not None:
                    batch.append((job, index, view))
                if len(batch) == self.batch_size or time.monotonic() > end:
                    break
                item = self._next()
            if batch:
                self._compute(batch)

    def _next(self) -> Item | None:
        try:
            return self._waiting.get_nowait()
        except queue.Empty:
            return None

    def _explain_images(self) -> None:
        while True:
            job, index, image = self._to_explain.get()
            picture = self._guarded(self._heat, job, index, image)
            if picture is not None:
                self._answer(job, index, picture)

    def _view(self, image: bytes) -> np.ndarray:
        self._check(image)
        return self.predictor.view(image)

    def _check(self, image: bytes) -> None:
        check_webp(image[:HEAD_BYTES], self.predictor.preprocessor.max_pixels)
        check_frames(image, self.max_frames)

    def _heat(self, image: bytes) -> bytes:
        self._check(image)
        return self.heatmap(self.predictor.preprocessor.decode(image))

    def _guarded(
        self, work: Callable[[bytes], Result], job: Job, index: int, image: bytes
    ) -> Result | None:
        """Do some work with an image, or answer why it cannot be done, and return None."""
        if time.monotonic() > job.deadline:
            self._answer(job, index, b"", outcome="late")
            return None
        try:
            return work(image)
        except UserError as error:
            self._answer(job, index, _json({"error": str(error)}))
        except Exception as error:
            logger.error("an image failed: %s", one_line(error, 300))
            self._answer(job, index, b"", outcome="failed")
        return None

    def _compute(self, batch: list[tuple[Job, int, np.ndarray]]) -> None:
        try:
            scores = self.predictor.scores_of_views([view for *_, view in batch])
            answers = [_json(self.predictor.record(row)) for row in scores]
        except Exception as error:  # out of memory, for example
            logger.error("a batch of %d images failed: %s", len(batch), one_line(error, 300))
            for job, index, _ in batch:
                self._answer(job, index, b"", outcome="failed")
            return
        for (job, index, _), answer in zip(batch, answers, strict=True):
            self._answer(job, index, answer, batch_size=len(batch))

    def _answer(
        self, job: Job, index: int, answer: bytes, *, outcome: str = "done", batch_size: int = 0
    ) -> None:
        """Note the answer of an image, and write those of its job once they are complete."""
        with self._lock:
            job.answers[index] = answer
            if outcome != "done":
                job.outcome = outcome
            job.missing -= 1
            if batch_size:
                job.batches.append(batch_size)
            complete = not job.missing
        if complete:
            self.write(
                {"id": job.number, "outcome": job.outcome, "batches": job.batches}, job.answers
            )


def measured_batch_size(predictor: Predictor, largest: int) -> int:
    """Return the size of a batch, up to `largest`, that is computed within `BATCH_SECONDS` or, if one image
    takes long, within twice the time of one.

    Measured on one core, as batches are computed; this warms the model up, too.
    """
    view = np.zeros((*predictor.preprocessor.preprocessing.size, 3), np.uint8)

    def seconds(size: int) -> float:
        times = []
        for _ in range(
            4
        ):  # the first may prepare something, and others compete with other processes
            start = time.perf_counter()
            predictor.scores_of_views([view] * size)
            times.append(time.perf_counter() - start)
        return min(times)

    def measure() -> int:
        torch.set_num_threads(1)
        found, size, limit = 1, 2, max(BATCH_SECONDS, 2 * seconds(1))
        with contextlib.suppress(torch.OutOfMemoryError):
            while size <= largest and seconds(size) <= limit:
                found, size = size, 2 * size
        return found

    with ThreadPoolExecutor(1) as pool:  # the number of threads is that of a thread
        return pool.submit(measure).result()


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


def check_frames(image: bytes, max_frames: int) -> None:
    """Raises: UserError if an animation, or a document of pages, has more frames than allowed."""
    if image[:4] == b"GIF8":
        count = gif_frames(image, max_frames + 1)
    elif image[:4] in (b"RIFF", b"\x89PNG", b"II*\0", b"MM\0*"):
        count = _frames(image, max_frames)
    else:
        return
    if count > max_frames:
        raise UserError(f"cannot read image: it has more than {max_frames:,} frames")


def _frames(image: bytes, max_frames: int) -> int:
    """Return the number of frames in the header of an image; of a TIFF file, count up to one too many."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            if opened.format != "TIFF":
                return getattr(opened, "n_frames", 1)
            opened.seek(max_frames)  # reads the directories of pages only
            return max_frames + 1
    except Exception:  # it ends before that page, or is damaged, which decoding will report
        return 1


def gif_frames(content: bytes, most: int) -> int:
    """Count the frames of a GIF file up to `most`, from its blocks. Pillow would decode them.

    Source: GIF89a specification, CompuServe, 1990.
    """
    count, at = 0, 13 + _colour_table(content, 10)
    while at < len(content) and count < most:
        kind, at = content[at], at + 1
        if kind == 0x2C:  # an image: place and size, flags, colours, and the code size of its data
            count += 1
            at += 9 + _colour_table(content, at + 8) + 1
        elif kind == 0x21:  # an extension: its label
            at += 1
        else:
            break
        while at < len(content) and content[at]:  # data in blocks, each after its length
            at += 1 + content[at]
        at += 1
    return count


def _colour_table(content: bytes, flags_at: int) -> int:
    """Return the bytes of a colour table, from the flags before it."""
    flags = content[flags_at] if flags_at < len(content) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def describe(config: PredictConfig, worker: Worker) -> dict[str, Any]:
    """Return what GET /model shows: identity, labels, preprocessing, and metrics of the run."""
    name, predictor = config.model_name_or_path, worker.predictor
    metrics: dict[str, Any] = {}
    if is_exported(name):
        facts = read_onnx(name)[1].get("run", {})
    else:
        run = RunFolder(model_folder(name, config.model_revision, config.trust_remote_code))
        facts, metrics = run.facts(), run.metrics()
    short_name = Path(name).name
    thresholds, labels = thresholds_of(predictor.model), predictor.model.config.id2label
    return {
        "model": predictor.model_hash,
        "name": short_name,
        "version": listed(each for each in (short_name, facts.get("finished")) if each),
        "labels": [labels[i] for i in range(len(labels))],
        "thresholds": None if thresholds is None else thresholds.tolist(),
        "reject": None if predictor.rejection is None else predictor.rejection.to_dict(),
        "preprocessing": predictor.preprocessor.to_dict(),
        "metrics": {
            split: {key: value for key, value in found.items() if isinstance(value, (int, float))}
            for split, found in metrics.items()
        },
        "device": str(predictor.device),
        "batch_size": worker.batch_size,
        "heat_map": worker.heatmap.available,
    }


def main(descriptor: int) -> None:
    """Answer frames until the input ends, which it does when the server ends in any way. descriptor: of the
    output."""
    # The server decides when a worker ends; a terminal sends its signals to all processes.
    ignore_signals()
    output = os.fdopen(descriptor, "wb")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    quieten(True)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a line for each odd file of a client
    sys.setswitchinterval(SWITCH_SECONDS)
    stream = sys.stdin.buffer
    first = frames.read(stream)
    if first is None:
        return
    settings, _ = first
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    config = PredictConfig(**settings["predict"])
    try:
        worker = Worker(config, settings["max_frames"], output)
        about = describe(config, worker)
    except UserError as error:
        output.write(frames.pack({"error": str(error)}))
        output.flush()
        return
    worker.write(about)
    while (frame := frames.read(stream)) is not None:
        worker.submit(*frame)
    os._exit(0)  # without waiting for images that nobody waits for
