import pickle

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_cifar.config.data import DataConfig
from hf_cifar.data import pixels as pixels_module
from hf_cifar.data import store as store_module
from hf_cifar.data.splits import load_splits
from hf_cifar.data.store import ResidentStore, StreamedStore, build_store, take_batch, to_batch
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
PREPROCESSING = Preprocessing.from_image_processor(
    ViTImageProcessor(size={"height": 12, "width": 12}, resample=3)
)
CROPPING = Preprocessing(14, (12, 12), "bicubic", (0.5,) * 3, (0.5,) * 3)
MIXED = ((8, 8), (20, 13), (9, 30))


@pytest.fixture
def train(save, make_rows):
    """Return a function (sizes) -> train split of 22 images, two of which are used for validation."""

    def load(sizes=((8, 8),)):
        folder = save(train=make_rows([0, 1] * 11, sizes=sizes))
        return load_splits(DataConfig(dataset_name=str(folder))).train

    return load


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


def test_resident_store_holds_the_pixels(train):
    split = train()
    store = build_store(split, PREPROCESSING, augmented=True)
    assert isinstance(store, ResidentStore)
    assert len(store) == len(split) == 20
    found = read(store)
    assert (found["pixel_values"].permute(0, 2, 3, 1).numpy() == np.asarray(split.images)).all()
    assert (found["labels"].numpy() == split.labels).all()


@pytest.mark.parametrize(
    ("kind", "store_class"), [("auto", ResidentStore), ("streamed", StreamedStore)]
)
def test_mixed_sizes_are_resized_to_one(train, kind, store_class):
    split = train(MIXED)
    store = build_store(split, PREPROCESSING, augmented=False, kind=kind)
    assert isinstance(store, store_class)
    found = read(store)
    assert found["pixel_values"].shape == (20, 3, 12, 12)
    assert (found["labels"].numpy() == split.labels).all()
    for position in range(20):
        expected = PREPROCESSING.view(to_batch(split.decode(position)))
        assert torch.equal(found["pixel_values"][position], expected[0].round().to(torch.uint8))


@pytest.mark.parametrize("sizes", [((8, 8),), MIXED], ids=["one size", "mixed"])
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_pixels_do_not_depend_on_workers(train, sizes, kind):
    store = build_store(train(sizes), PREPROCESSING, augmented=True, kind=kind)
    alone, shared = read(store), read(store, num_workers=2)
    assert torch.equal(alone["pixel_values"], shared["pixel_values"])
    assert torch.equal(alone["labels"], shared["labels"])


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, CROPPING], ids=["whole", "crop"])
def test_streamed_and_resident_stores_agree(train, preprocessing):
    split = train()
    resident, streamed = (
        read(build_store(split, preprocessing, augmented=False, kind=kind))
        for kind in ("resident", "streamed")
    )
    assert torch.equal(streamed["labels"], resident["labels"])
    views = [preprocessing.view(batch["pixel_values"]) for batch in (streamed, resident)]
    assert (views[0] - views[1]).abs().max() <= 1


def test_crop_is_applied_once(train):
    """A batch of stored views passes through `view` like any other."""
    split = train(((16, 16), (20, 10), (8, 24)))
    store = build_store(split, CROPPING, augmented=False, kind="streamed")
    found = CROPPING.view(read(store)["pixel_values"])
    for position in range(len(split)):
        expected = CROPPING.view(to_batch(split.decode(position)))
        assert (found[position] - expected[0]).abs().max() <= 1


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_training_images_of_mixed_sizes_keep_a_margin(train, kind):
    found = read(build_store(train(MIXED), PREPROCESSING, augmented=True, kind=kind))
    assert found["pixel_values"].shape == (20, 3, 14, 14)


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_single_item_is_a_batch_of_one(train, kind):
    split = train(MIXED)
    store = build_store(split, PREPROCESSING, augmented=False, kind=kind)
    item = store[3]
    assert item["pixel_values"].shape[:2] == (1, 3)
    assert torch.equal(item["pixel_values"], store.__getitems__([2, 3])["pixel_values"][1:])
    assert item["labels"].tolist() == [split.labels[3]]


def test_shuffled_order_keeps_images_and_labels_together(train):
    split = train(MIXED)
    store = build_store(split, PREPROCESSING, augmented=False)
    order = np.random.default_rng(0).permutation(20).tolist()
    found = store.__getitems__(order)
    assert found["labels"].tolist() == split.labels[order].tolist()
    plain = store.__getitems__(range(20))["pixel_values"]
    assert torch.equal(found["pixel_values"], plain[order])


def test_broken_image_in_a_stream_names_its_row_in_one_line(save, make_rows):
    rows = make_rows([0, 1] * 10, sizes=MIXED)
    rows = rows.cast_column("img", type(rows.features["img"])(decode=False))
    cells = rows["img"][:]
    cells[12] = {"bytes": cells[12]["bytes"][:60], "path": None}
    rows = type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)
    folder = save(train=rows, validation=make_rows([0, 1]))
    split = load_splits(DataConfig(dataset_name=str(folder))).train
    with pytest.raises(UserError, match=r"^train row 12: cannot read image"):
        build_store(split, PREPROCESSING, augmented=True, kind="streamed")
    with pytest.raises(UserError) as raised:  # one that has broken since
        read(StreamedStore(split, PREPROCESSING))
    assert str(raised.value).startswith("train row 12: cannot read image: ")
    assert "\n" not in str(raised.value)
    # A loader re-raises an error of its worker process like this.
    with pytest.raises(UserError) as passed_on:
        ExceptionWrapper((UserError, raised.value, raised.tb), "in worker process 0").reraise()
    assert str(passed_on.value) == str(raised.value)


def test_broken_image_in_a_resident_split_is_found_at_once(save, make_rows):
    rows = make_rows([0, 1] * 5)
    rows = rows.cast_column("img", type(rows.features["img"])(decode=False))
    cells = rows["img"][:]
    cells[4] = {"bytes": b"GIF89a", "path": None}
    rows = type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)
    split = load_splits(
        DataConfig(dataset_name=str(save(train=rows, validation=make_rows([0, 1]))))
    ).train
    with pytest.raises(UserError, match=r"^train row 4: cannot read image"):
        build_store(split, PREPROCESSING, augmented=True)


def test_stores_can_be_sent_to_spawned_workers(train):
    store = build_store(train(MIXED), PREPROCESSING, augmented=False, kind="streamed")
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy[0]["pixel_values"], store[0]["pixel_values"])


@pytest.mark.parametrize("sizes", [((8, 8),), MIXED], ids=["one size", "mixed"])
def test_two_stores_of_a_split_share_their_tensor(train, sizes):
    split = train(sizes)
    first, second = (build_store(split, PREPROCESSING, augmented=False) for _ in range(2))
    assert first.pixels is second.pixels
    if sizes is MIXED:  # training keeps a margin
        assert build_store(split, PREPROCESSING, augmented=True).pixels is not first.pixels


def test_size_and_free_memory_determine_the_store(train, monkeypatch):
    """22 images of 8 x 8 px: in memory at that size, as views of 2 x 2 px, or not at all."""
    small = Preprocessing((2, 2), None, "bicubic", (0.5,) * 3, (0.5,) * 3)
    shapes = []
    for spare in (10**6, 20 * 2 * 2 * 3 + 1, 100):
        monkeypatch.setattr(pixels_module, "memory_to_spare", lambda spare=spare: spare)
        monkeypatch.setattr(store_module, "memory_to_spare", lambda spare=spare: spare)
        store = build_store(train(), small, augmented=False)
        shapes.append(store.pixels.shape[1:3] if store.resident else None)
    assert shapes == [(8, 8), (2, 2), None]
    assert build_store(train(), small, augmented=False, kind="resident").pixels.shape[1:3] == (2, 2)


def test_choice_of_store_is_logged_in_one_line(train, caplog):
    caplog.set_level("INFO", logger="hf_cifar.data.store")
    build_store(train(), PREPROCESSING, augmented=False)
    build_store(train(), PREPROCESSING, augmented=False, kind="streamed")
    assert caplog.messages == [
        "train: 20 images of 8 x 8 px in memory",
        "train: 20 images, decoded on demand",
    ]
