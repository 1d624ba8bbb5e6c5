"""The order in which a stream is read; other data are sampled by the Trainer."""

from __future__ import annotations

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_cifar.data.store import ShardStore


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
