"""Classify a data set of any size, in any number of processes that may come and go."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import BatchPredictionConfig, PredictConfig
from hf_cifar.data.unlabelled import UnlabelledImages, load_images
from hf_cifar.predict import Predictor
from hf_cifar.progress import Progress
from hf_cifar.runs.parts import Parts
from hf_cifar.runs.processes import share_of_launcher
from hf_cifar.threads import map_in_threads

logger = logging.getLogger(__name__)
WAIT_SECONDS = 1.0  # for parts that other processes work on

RANKED = pyarrow.list_(pyarrow.struct({"label": pyarrow.string(), "score": pyarrow.float32()}))


def predict_dataset(config: PredictConfig, batch: BatchPredictionConfig) -> dict[str, Any] | None:
    """Classify the images of a data set into a folder of Parquet files, see docs/scale.md.

    Returns the manifest once the table is complete, None while other shards are still missing.
    Raises: UserError for data or a model that cannot be used, or that differs from that of the existing
    parts.
    """
    assert batch.dataset_name is not None and batch.output is not None  # checked by the config
    images = load_images(_data(config, batch), batch.split)
    predictor = Predictor(config)
    settings = {
        "model": predictor.model_hash, "data": images.hash, "top_k": config.top_k,
        "precision": str(predictor.dtype).removeprefix("torch."),
        "max_image_pixels": config.max_image_pixels,
    }  # fmt: skip
    parts = Parts(Path(batch.output), len(images), settings)
    parts.begin()
    (index, count), (rank, processes) = batch.share, share_of_launcher()
    shard, num_shards = index * processes + rank, count * processes
    _write_shard(parts, shard, num_shards, images, predictor, config.batch_size)
    missing = parts.missing()
    if missing:
        logger.info(
            "shard %d/%d is complete; the other shards still have to write %s of %s parts",
            shard, num_shards, f"{len(missing):,}", f"{parts.count:,}",
        )  # fmt: skip
        return None
    names = {"model_name_or_path": config.model_name_or_path, "dataset_name": batch.dataset_name}
    return parts.finish({**names, "split": batch.split})


def _data(config: PredictConfig, batch: BatchPredictionConfig) -> DataConfig:
    assert batch.dataset_name is not None
    return DataConfig(
        dataset_name=batch.dataset_name,
        dataset_config_name=batch.dataset_config_name,
        image_column_name=batch.image_column_name,
        max_image_pixels=config.max_image_pixels,
    )


def _write_shard(
    parts: Parts,
    shard: int,
    num_shards: int,
    images: UnlabelledImages,
    predictor: Predictor,
    batch_size: int,
) -> None:
    """Write the missing parts of a shard; wait for those that other processes work on, in case they end."""
    todo, waiting = parts.missing(shard, num_shards), False
    logger.info(
        "%s images in %s parts; %s parts to classify here%s",
        f"{len(images):,}", f"{parts.count:,}", f"{len(todo):,}",
        f", of shard {shard}/{num_shards}" if num_shards > 1 else "",
    )  # fmt: skip
    shown = Progress("classifying", sum(len(parts.rows(number)) for number in todo))
    try:
        while todo:
            before = shown.count
            for number, table in _tables(parts, todo, images, predictor, batch_size):
                parts.write(number, table)
                shown.update(len(table))
            todo = parts.missing(shard, num_shards)
            if todo and shown.count == before:
                if not waiting:
                    logger.info(
                        "waiting for %s parts that other processes are writing", f"{len(todo):,}"
                    )
                waiting = True
                time.sleep(WAIT_SECONDS)
    finally:
        parts.release()
        shown.close()


def _tables(
    parts: Parts,
    numbers: list[int],
    images: UnlabelledImages,
    predictor: Predictor,
    batch_size: int,
) -> Iterator[tuple[int, pyarrow.Table]]:
    """Yield the tables of the parts that are free to claim.

    Batches of the next part are computed while the last ones of a part are: no thread waits for the others.
    """

    def batches() -> Iterator[tuple[int, range]]:
        for number in parts.claim(numbers):
            rows = parts.rows(number)
            for start in range(rows.start, rows.stop, batch_size):
                yield number, range(start, min(start + batch_size, rows.stop))

    def records(item: tuple[int, range]) -> tuple[int, list[dict[str, Any]]]:
        number, rows = item
        cells = images.cells(rows)
        found = zip(rows, cells, predictor.records(cells), strict=True)
        return number, [
            {"row_id": row, "path": images.name(cell), **record} for row, cell, record in found
        ]

    collected: dict[int, list[dict[str, Any]]] = defaultdict(list)
    schema = schema_of(multi_label=predictor.multi_label)
    for number, found in map_in_threads(records, batches(), predictor.num_threads):
        collected[number] += found
        if len(collected[number]) == len(parts.rows(number)):
            yield number, pyarrow.Table.from_pylist(collected.pop(number), schema)


def schema_of(*, multi_label: bool) -> pyarrow.Schema:
    """Return the columns of the predictions: either error, or the others, is null."""
    answer = (
        {"labels": RANKED}
        if multi_label
        else {"label": pyarrow.string(), "score": pyarrow.float32()}
    )
    return pyarrow.schema(
        {
            "row_id": pyarrow.int64(), "path": pyarrow.string(), **answer, "top_k": RANKED,
            "error": pyarrow.string(),
        }
    )  # fmt: skip
