"""The order of training images: balanced by class, or that of a stream; else the Trainer samples them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from hf_cifar.data.store import ShardStore

# Images of each class in an epoch, from the numbers of images of all classes.
SAMPLED: dict[str, Callable[[Iterable[int]], int]] = {"oversample": max, "undersample": min}


class BalancedSampler(Sampler[int]):
    """Draws every class equally often: as often as the largest one has images, or the smallest one.

    labels: class ids [N]. No image is drawn again before all others of its class. Each epoch has an order of
    its own, made from (seed, epoch), so that a resumed run sees the same one.
    """

    def __init__(self, labels: np.ndarray, balance: str, seed: int) -> None:
        self.rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.draws = SAMPLED[balance](len(rows) for rows in self.rows)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return self.draws * len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        drawn = []
        for rows in self.rows:
            passes = math.ceil(self.draws / len(rows))
            drawn += [generator.permutation(rows) for _ in range(passes - 1)]
            drawn.append(generator.permutation(rows)[: self.draws - len(rows) * (passes - 1)])
        yield from generator.permutation(np.concatenate(drawn)).tolist()


def shard_loader(store: ShardStore, args: TrainingArguments) -> DataLoader:
    """Return the loader of this process's part of a stream, which is not divided among processes again."""
    loader = DataLoader(
        store,
        batch_size=None,  # the store's items are batches
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory,
    )
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,  # otherwise the first process would read for all
        non_blocking=args.accelerator_config.non_blocking,
    )
