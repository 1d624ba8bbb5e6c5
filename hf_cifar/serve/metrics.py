"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hf_cifar.serve.workers import Workers

PREFIX = "hf_cifar"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of requests; the state of the workers is read when it is requested."""

    def __init__(self, workers: Workers) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_State(workers))
        self._requests = Counter(
            "requests", "Requests answered.", ("path", "status"), PREFIX, registry=self._registry
        )
        self._images = Counter(
            "images", "Images answered: predicted, or unreadable.", ("outcome",), PREFIX,
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "request_seconds", "Time from the headers of a request to its answer.", ("path",), PREFIX,
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._batches = Histogram(
            "batch_images", "Size of the batch that each image was computed in.", (), PREFIX,
            buckets=BATCHES, registry=self._registry,
        )  # fmt: skip

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request. path: of a route; of a small set, because each makes a time series."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_images(self, predicted: int, unreadable: int, batches: Iterable[int]) -> None:
        """Count the images of a request. batches: the sizes of the batches that they were in."""
        if predicted:
            self._images.labels("predicted").inc(predicted)
        if unreadable:
            self._images.labels("unreadable").inc(unreadable)
        for size in batches:
            self._batches.observe(size)

    def render(self) -> bytes:
        """Render all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _State(Collector):
    """The state of the workers at the time of a request."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        workers = self._workers
        for name, text, value in (
            ("queue_images", "Images waiting or being computed.", workers.images),
            ("workers", "Worker processes.", len(workers.alive)),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        yield GaugeMetricFamily(
            f"{PREFIX}_worker_restarts",
            "Worker processes that died and were replaced since the server started.",
            workers.restarts,
        )
        memory = GaugeMetricFamily(
            f"{PREFIX}_worker_memory_bytes", "Resident memory of a worker process.", labels=("pid",)
        )
        for worker in workers.alive:
            memory.add_metric((str(worker.process.pid),), worker.memory())
        yield memory
        if workers.about:
            about = {"hash": workers.about["model"], "version": workers.about["version"]}
            yield InfoMetricFamily(f"{PREFIX}_model", "The model that answers.", about)
