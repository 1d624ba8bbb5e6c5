import os
import pickle

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_cifar.config.data import DataConfig
from hf_cifar.data import preparation
from hf_cifar.data.images import decode_cell
from hf_cifar.data.pixel_file import MISSING
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.preparation import memory_to_spare
from hf_cifar.data.split import prepare_split, with_images
from hf_cifar.data.splits import load_splits
from hf_cifar.data.store import (
    PreparedStore,
    ResidentStore,
    build_store,
    default_num_workers,
    take_batch,
    to_batch,
)
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

pytestmark = [
    pytest.mark.usefixtures("pixel_cache"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
PREPROCESSING = Preprocessing.from_image_processor(
    ViTImageProcessor(size={"height": 12, "width": 12}, resample=3)
)
CROPPING = Preprocessing(14, (12, 12), "bicubic", (0.5,) * 3, (0.5,) * 3)
MIXED = ((8, 8), (20, 13), (9, 30))
KINDS = ["resident", "disk", "streamed"]


@pytest.fixture
def train(save, make_rows):
    """Return a function (sizes) -> train split of 22 images, two of which are used for validation."""

    def load(sizes=((8, 8),)):
        folder = save(train=make_rows([0, 1] * 11, sizes=sizes))
        return load_splits(DataConfig(dataset_name=str(folder))).train

    return load


def store_of(split, preprocessing=PREPROCESSING, **options):
    if options.pop("lazy", False):
        return build_store(with_images(split, preprocessing, lazy=True, **options))
    return build_store(prepare_split(split, preprocessing, **options))


def read(store, num_workers=0, batch_size=6):
    loader = DataLoader(
        store, batch_size=batch_size, num_workers=num_workers, collate_fn=take_batch
    )
    batches = list(loader)
    for batch in batches:
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["labels"].dtype == torch.int64
        assert len(batch["labels"]) == len(batch["pixel_values"]) <= batch_size
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def damaged(rows, *broken):
    rows = rows.cast_column("img", type(rows.features["img"])(decode=False))
    cells = rows["img"][:]
    for row in broken:
        cells[row] = {"bytes": cells[row]["bytes"][:60], "path": None}
    return type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)


@pytest.mark.parametrize("kind", KINDS)
def test_small_images_of_one_size_are_kept_as_they_are(train, kind):
    split = train()
    store = store_of(split, augmented=True, kind=kind)
    assert isinstance(store, ResidentStore if kind == "resident" else PreparedStore)
    assert len(store) == len(split) == 20
    found = read(store)
    expected = np.stack([split.decode(position) for position in range(20)])
    assert (found["pixel_values"].permute(0, 2, 3, 1).numpy() == expected).all()
    assert (found["labels"].numpy() == split.labels).all()
    assert (found["row_ids"].numpy() == split.row_ids).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preprocessing", [PREPROCESSING, CROPPING], ids=["whole", "crop"])
def test_evaluation_sees_mixed_sizes_as_the_processor_does(train, kind, preprocessing):
    split = train(MIXED)
    found = read(store_of(split, preprocessing, kind=kind))
    assert (found["labels"].numpy() == split.labels).all()
    seen = preprocessing.view(found["pixel_values"])
    for position in range(20):
        assert torch.equal(seen[position], preprocessing.view(to_batch(split.decode(position)))[0])


@pytest.mark.parametrize("sizes", [((8, 8),), MIXED], ids=["one size", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", [False, True])
def test_pixels_do_not_depend_on_workers(train, sizes, kind, lazy):
    store = store_of(train(sizes), augmented=True, kind=kind, lazy=lazy)
    shared, alone = read(store, num_workers=2), read(store)
    assert torch.equal(alone["pixel_values"], shared["pixel_values"])
    assert torch.equal(alone["labels"], shared["labels"])


@pytest.mark.parametrize("kind", KINDS)
def test_training_images_of_mixed_sizes_keep_a_margin(train, kind):
    found = read(store_of(train(MIXED), augmented=True, kind=kind))
    assert found["pixel_values"].shape == (20, 3, 14, 14)


@pytest.mark.parametrize("kind", KINDS)
def test_single_item_is_a_batch_of_one(train, kind):
    split = train(MIXED)
    store = store_of(split, kind=kind)
    item = store[3]
    assert item["pixel_values"].shape[:2] == (1, 3)
    assert torch.equal(item["pixel_values"], store.__getitems__([2, 3])["pixel_values"][1:])
    assert item["labels"].tolist() == [split.labels[3]]


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_order_keeps_images_and_labels_together(train, kind):
    split = train(MIXED)
    store = store_of(split, kind=kind)
    order = np.random.default_rng(0).permutation(20).tolist()
    found = store.__getitems__(order)
    assert found["labels"].tolist() == split.labels[order].tolist()
    plain = store.__getitems__(range(20))["pixel_values"]
    assert torch.equal(found["pixel_values"], plain[order])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_image_that_is_met_in_training_names_its_row(save, make_rows, num_workers):
    rows = damaged(make_rows([0, 1] * 10, sizes=MIXED), 12)
    folder = save(train=rows, validation=make_rows([0, 1]))
    split = load_splits(DataConfig(dataset_name=str(folder))).train
    with pytest.raises(UserError, match=r"^train row 12: cannot read image"):
        store_of(split, augmented=True, kind="streamed")
    store = store_of(split, augmented=True, lazy=True)
    with pytest.raises(UserError) as raised:
        read(store, num_workers)
    assert str(raised.value).startswith("train row 12: cannot read image: ")
    assert "--on_bad_image skip" in str(raised.value) and "\n" not in str(raised.value)
    # A loader re-raises an error of its worker process like this.
    with pytest.raises(UserError) as passed_on:
        ExceptionWrapper((UserError, raised.value, raised.tb), "in worker process 0").reraise()
    assert str(passed_on.value) == str(raised.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_left_out_of_their_batches(save, make_rows, num_workers):
    rows = damaged(make_rows([0, 1] * 10, sizes=MIXED), 3, 12)
    folder = save(train=rows, validation=make_rows([0, 1]))
    split = load_splits(DataConfig(dataset_name=str(folder))).train
    store = build_store(with_images(split, PREPROCESSING, augmented=True, lazy=True), skips=True)
    found = read(store, num_workers)
    assert found["row_ids"].tolist() == [row for row in range(20) if row not in (3, 12)]
    assert sorted(store.images.faults) == [3, 12]
    with pytest.raises(UserError, match="train row 3"):
        store.__getitems__([3])


def test_stores_can_be_sent_to_spawned_workers(train):
    for kind in ("disk", "streamed"):
        store = store_of(train(MIXED), kind=kind)
        copy = pickle.loads(pickle.dumps(store))
        assert torch.equal(copy[0]["pixel_values"], store[0]["pixel_values"])


def test_an_image_that_is_lost_after_preparation_is_no_black_one(train, monkeypatch):
    split = prepare_split(train(MIXED), PREPROCESSING, kind="resident")
    split.images.prepared._file.mark(int(split.positions[3]), MISSING)
    monkeypatch.setattr(Pixels, "decode_cell", lambda self, cell: decode_cell(None))
    with pytest.raises(UserError, match=r"an image can no longer be read: .*the cell is empty"):
        build_store(split)


@pytest.mark.parametrize("sizes", [((8, 8),), MIXED], ids=["one size", "mixed"])
def test_two_stores_of_a_split_share_their_tensor(train, sizes):
    split = prepare_split(train(sizes), PREPROCESSING)
    first, second = (build_store(split) for _ in range(2))
    assert first.pixels is second.pixels


def test_size_and_free_memory_and_disk_determine_the_store(train, monkeypatch):
    """20 images of 8 x 8 px are 3,840 bytes."""
    kinds = []
    for memory, disk in ((10**6, 10**6), (100, 10**6), (100, 100)):
        monkeypatch.setattr(preparation, "memory_to_spare", lambda spare=memory: spare)
        monkeypatch.setattr(preparation, "free_bytes", lambda folder, free=disk: free)
        monkeypatch.setenv("HF_CIFAR_CACHE", str(preparation.cache_folder() / str(memory + disk)))
        kinds.append(prepare_split(train(), PREPROCESSING).images.kind)
    assert kinds == ["resident", "disk", "streamed"]


def test_workers_share_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    for processes, count in ((1, 6), (2, 3), (9, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_num_workers(decodes=True) == count
    assert default_num_workers(decodes=False) == 0


def test_memory_budget_is_divided_among_processes(monkeypatch):
    monkeypatch.setattr(preparation, "MEMORY_LIMIT", 10**15)
    alone = memory_to_spare()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone > 2**20
    assert memory_to_spare() == pytest.approx(alone / 4, rel=0.2)


def test_choice_of_store_is_logged_in_one_line(train, caplog):
    caplog.set_level("INFO", logger="hf_cifar.data.store")
    for kind in KINDS:
        store_of(train(), kind=kind)
    assert caplog.messages == [
        "train: 20 images of 8 x 8 px in memory",
        "train: 20 images of 8 x 8 px, read from disk",
        "train: 20 images of 8 x 8 px, decoded at each use",
    ]
