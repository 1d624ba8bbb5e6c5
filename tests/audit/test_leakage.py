"""hf_cifar.audit.leakage: test images in train, by row."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image

from hf_cifar.audit.leakage import find_leakage
from hf_cifar.config.data import DataConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError

pytestmark = pytest.mark.usefixtures("datasets_cache")


def leakage(source):
    return find_leakage(source.splits, source.test_split)


@pytest.fixture
def leaking(save, photo):
    """Smooth images; train row 5 equals test row 1, validation row 2 equals test row 0."""
    pictures = [photo(32, 32, seed) for seed in range(40)]

    def rows(chosen, turned=0):
        labels = [(i + turned) % 2 for i in range(len(chosen))]
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        return Dataset.from_dict({"image": chosen, "label": labels}, features=features)

    test = pictures[:6]
    train, validation = pictures[6:30], pictures[30:]
    train[5], validation[2] = test[1], test[0]
    return save(train=rows(train), validation=rows(validation), test=rows(test, 1))


def test_pairs_have_row_numbers_of_the_data_set(leaking, caplog):
    found = leakage(DataSource(DataConfig(dataset_name=str(leaking))))
    exact = [pair for pair in found["pairs"] if pair["exact"]]
    assert exact == [
        {"test_row": 0, "split": "validation", "row": 2, "exact": True, "difference": 0.0},
        {"test_row": 1, "split": "train", "row": 5, "exact": True, "difference": 0.0},
    ]
    assert found["num_test"] == 6
    assert "test row 0 is validation row 2, test row 1 is train row 5" in caplog.text


def test_rows_of_a_subsample_refer_to_train(leaking):
    config = DataConfig(dataset_name=str(leaking), max_train_samples=20)
    source = DataSource(config)
    train = source.splits.train
    rows = {pair["row"] for pair in leakage(source)["pairs"] if pair["split"] == "train"}
    assert (5 in rows) == (5 in train.row_ids)
    assert rows <= set(train.row_ids.tolist())


def test_streams_and_data_without_test_are_refused(shards, save, make_rows):
    config = DataConfig(dataset_name=str(shards), streaming=True, max_eval_samples=6)
    with pytest.raises(UserError, match=r"--check_leakage .*--streaming"):
        leakage(DataSource(config))
    config = DataConfig(dataset_name=str(save(train=make_rows([0, 1] * 5))))
    with pytest.raises(UserError, match="leave out what reads it: --do_predict, --check_leakage"):
        leakage(DataSource(config))
