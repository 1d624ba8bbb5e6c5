"""hf_cifar.data.streams and ShardStore: data that is read shard by shard, in order, never whole."""

import io
import itertools

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_cifar.config.data import DataConfig
from hf_cifar.data import streams
from hf_cifar.data.images import decode_cell, decode_image
from hf_cifar.data.splits import DataSource, load_splits, load_test_split, require_test_split
from hf_cifar.data.store import ShardStore
from hf_cifar.data.streams import Stream, load_streams, unit_hash
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

PREPROCESSING = Preprocessing.from_image_processor(
    ViTImageProcessor(size={"height": 16, "width": 16})
)


def stream_of(folder, **options):
    return DataConfig(dataset_name=str(folder), streaming=True, **options)


@pytest.fixture(autouse=True)
def one_shard_at_a_time(request, monkeypatch):
    """Avoid the 5 s in which `datasets` closes interleaved shards, except in the tests about them."""
    if "interleaved" not in request.keywords:
        monkeypatch.setattr(streams, "INTERLEAVED_SHARDS", 1)


@pytest.fixture
def splits(shards):
    return load_splits(stream_of(shards, max_eval_samples=6))


def pixels_of(images):
    return sorted(image.tobytes() for image, _ in images)


def test_train_and_validation_share_no_image(splits, shards):
    assert isinstance(splits.train, Stream)
    train = set(pixels_of(splits.train.read(0)))
    validation = {decode_cell(cell).tobytes() for cell in splits.validation.rows["image"]}
    assert len(splits.validation) == 6
    assert not train & validation
    whole = load_splits(DataConfig(dataset_name=str(shards)))
    everything = {
        image.tobytes() for part in (whole.train, whole.validation) for image in part.pictures("")
    }
    assert train | validation <= everything
    assert len(everything) == 80
    assert len(splits.train) == 72  # the declared number minus a tenth


def test_row_ids_are_positions_in_train(splits, shards):
    whole = load_splits(DataConfig(dataset_name=str(shards)))
    all_rows = {}
    for part in (whole.train, whole.validation):
        all_rows |= dict(zip(part.row_ids.tolist(), part.pictures(""), strict=True))
    for position, row in enumerate(splits.validation.row_ids):
        assert (splits.validation.decode(position) == all_rows[row]).all()


def test_labels_match_their_images(splits):
    for image, label in splits.train.read(0):
        rows, columns = (image.astype(float).mean(axis=(1 - axis, 2)).std() for axis in (0, 1))
        assert label == int(columns > rows)  # 0: stripes across


def test_each_epoch_has_its_own_order_and_the_same_images(splits):
    first, again, second = (list(splits.train.read(epoch, seed=1)) for epoch in (0, 0, 1))
    assert [im.tobytes() for im, _ in first] == [im.tobytes() for im, _ in again]
    assert [im.tobytes() for im, _ in first] != [im.tobytes() for im, _ in second]
    assert pixels_of(first) == pixels_of(second)


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_processes_divide_the_images(splits, num_processes):
    """By shards if they divide evenly (2, 4), otherwise by rows (3)."""
    parts = [pixels_of(splits.train.read(0, rank, num_processes)) for rank in range(num_processes)]
    assert all(parts)
    assert sorted(itertools.chain(*parts)) == pixels_of(splits.train.read(0))


@pytest.mark.interleaved
def test_shards_sorted_by_class_are_mixed(tmp_path, make_rows):
    for number, label in enumerate((0, 0, 1, 1)):
        target = tmp_path / "data" / f"train-{number}.parquet"
        target.parent.mkdir(exist_ok=True)
        make_rows([label] * 20, image="image").to_parquet(str(target))
    stream = Stream("train", "train", load_streams(stream_of(tmp_path))["train"], 80, 0.0, 1.0, 0)
    labels = [label for _, label in stream.read(0)]
    assert sum(labels) == 40
    assert 4 <= sum(labels[:20]) <= 16


def test_unit_hash_is_uniform_and_depends_on_the_seed():
    images = [str(i).encode() for i in range(20_000)]
    found = np.array([unit_hash(image, seed=0) for image in images])
    counts, _ = np.histogram(found, bins=10, range=(0, 1))
    assert np.abs(counts / len(images) - 0.1).max() < 0.01
    other = np.array([unit_hash(image, seed=1) for image in images])
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.03


def read_store(store, num_workers):
    return list(DataLoader(store, batch_size=None, num_workers=num_workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_store_yields_full_batches_for_any_number_of_workers(splits, num_workers):
    store = ShardStore(splits.train, PREPROCESSING, batch_size=8, seed=0)
    batches = read_store(store, num_workers)
    assert len(batches) == len(store) == 9
    for batch in batches:
        assert batch["pixel_values"].shape == (8, 3, 16, 16)
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["labels"].shape == (8,)
    again = read_store(store, num_workers)
    for one, two in zip(batches, again, strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
    store.set_epoch(1)
    other = read_store(store, num_workers)
    assert not all(
        torch.equal(one["labels"], two["labels"]) for one, two in zip(batches, other, strict=True)
    )


def test_store_shows_nearly_every_image_once(splits):
    store = ShardStore(splits.train, PREPROCESSING, batch_size=8, seed=0)
    shown = [im.numpy().tobytes() for b in read_store(store, 0) for im in b["pixel_values"]]
    available = len(pixels_of(splits.train.read(0)))
    assert len(set(shown)) == min(len(shown), available)


def test_a_stream_shorter_than_the_epoch_starts_again(splits):
    stream = Stream(**{**vars(splits.train), "num_images": 200})
    store = ShardStore(stream, PREPROCESSING, batch_size=6, seed=0)
    assert len(read_store(store, 0)) == 33


def test_samples_are_a_fixed_share(shards, splits):
    few = load_splits(stream_of(shards, max_eval_samples=6, max_train_samples=36))
    assert len(few.train) == 36
    images = pixels_of(few.train.read(0))
    assert 20 < len(images) < 52
    assert images == pixels_of(few.train.read(1, seed=5))
    assert set(images) < set(pixels_of(splits.train.read(0)))
    assert few.hash != splits.hash


def test_encoded_bytes_equal_the_file(tmp_path):
    """A JPEG that is decoded and re-encoded on the way becomes another image."""
    files = []
    generator = np.random.default_rng(0)
    for _ in range(40):
        buffer = io.BytesIO()
        noise = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        PillowImage.fromarray(noise).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    cells = [{"bytes": file, "path": None} for file in files]
    rows = Dataset.from_dict({"img": cells, "label": [0, 1] * 20}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    splits = load_splits(stream_of(tmp_path, max_eval_samples=4, train_val_split=0.3))
    assert {cell["bytes"] for cell in splits.validation.rows["image"]} <= set(files)
    expected = sorted(decode_image(file).tobytes() for file in files if unit_hash(file, 42) >= 0.3)
    assert pixels_of(splits.train.read(0)) == expected


@pytest.mark.parametrize(
    ("processes", "most", "expected"), [(1, 8, 4), (1, 3, 2), (1, 1, 1), (2, 8, 2), (3, 8, 4)]
)
def test_workers_have_equal_numbers_of_shards(splits, processes, most, expected):
    assert splits.train.num_workers(processes, most) == expected


def test_test_is_collected_whole_or_its_first_rows(shards):
    assert len(load_test_split(stream_of(shards))) == 22
    few = load_test_split(stream_of(shards, max_eval_samples=5))
    assert few.row_ids.tolist() == [0, 1, 2, 3, 4]


def test_hash_differs_between_splits(shards, splits):
    same = load_splits(stream_of(shards, max_eval_samples=6))
    assert same.hash == splits.hash
    assert load_splits(stream_of(shards, max_eval_samples=6, split_seed=1)).hash != splits.hash
    assert load_splits(stream_of(shards, max_eval_samples=7)).hash != splits.hash


def test_folders_of_image_files_are_refused(stripes):
    with pytest.raises(UserError, match=r"folder of image files.*leave out --streaming"):
        load_splits(stream_of(stripes, max_eval_samples=6))


def test_hidden_test_labels_are_found_before_training(tmp_path, make_rows):
    make_rows([0, 1] * 20, image="image").to_parquet(str(tmp_path / "train.parquet"))
    make_rows([-1] * 4, image="image").to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(UserError, match="has no labelled test split"):
        require_test_split(DataSource(stream_of(tmp_path)))


def test_invalid_label_is_named(tmp_path, make_rows):
    make_rows([0, 1] * 20, image="image").to_parquet(str(tmp_path / "train.parquet"))
    make_rows([0, 1, -1], image="image").to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(UserError, match="test row 2: label -1 is not one of the 2 classes"):
        load_test_split(stream_of(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass --max_eval_samples"),
        ({"max_eval_samples": 1}, "the 1 images of validation cover 1 of 2 classes"),
        ({"max_eval_samples": 6, "label_column_name": "nothing"}, "no column 'nothing'"),
    ],
)
def test_unsupported_stream_options_are_refused(shards, options, message):
    with pytest.raises(UserError, match=message):
        load_splits(stream_of(shards, **options))


def test_sources_without_shards_are_refused(save, make_rows):
    for name in ("bundled/digits", str(save(train=make_rows([0, 1] * 4)))):
        with pytest.raises(UserError, match="cannot be streamed"):
            load_splits(DataConfig(dataset_name=name, streaming=True))


def test_columns_may_swap_names(tmp_path, make_rows):
    rows = make_rows([0, 1] * 20, image="label", label="image")
    rows.to_parquet(str(tmp_path / "train.parquet"))
    streamed = load_splits(stream_of(tmp_path, max_eval_samples=4, train_val_split=0.3))
    labels = [label for _, label in streamed.train.read(0)]
    assert sum(labels) > 0
    assert set(labels) | set(streamed.validation.labels) == {0, 1}


def test_undeclared_classes_are_refused(tmp_path, make_rows):
    rows = make_rows(["a", "b"] * 4, feature=Value("string"))
    rows.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match="does not declare its classes"):
        load_splits(stream_of(tmp_path, label_column_name="label", max_eval_samples=2))


def test_unknown_number_of_images_is_requested(tmp_path, make_rows):
    make_rows([0, 1] * 20, image="image").to_parquet(str(tmp_path / "train.parquet"))
    splits = load_splits(stream_of(tmp_path, max_eval_samples=2))
    with pytest.raises(UserError, match="pass --max_train_samples"):
        len(splits.train)


@pytest.mark.parametrize("decode", [False, True])
def test_broken_image_is_named(tmp_path, make_rows, decode):
    rows = make_rows([0, 1] * 20, image="image").cast_column("image", Image(decode=False))
    cells = rows["image"][:]
    cells[30] = {"bytes": b"no image", "path": "broken.png"}
    features = Features({"image": Image(decode=decode), "label": rows.features["label"]})
    broken = Dataset.from_dict({"image": cells, "label": rows["label"][:]}, features=features)
    broken.to_parquet(str(tmp_path / "train.parquet"))
    splits = load_splits(stream_of(tmp_path, max_eval_samples=4, train_val_split=0.2))
    assert unit_hash(b"no image", 42) >= 0.2
    with pytest.raises(UserError, match=r"train, broken\.png: cannot read image"):
        list(splits.train.read(0))
