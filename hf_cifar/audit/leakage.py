"""Find test images that are also in train or validation, by their pixels, before training."""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

import numpy as np

from hf_cifar.audit.duplicates import find_duplicates
from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits
from hf_cifar.errors import UserError

logger = logging.getLogger(__name__)
NUM_LOGGED = 10  # pairs in the log; the result has all


def find_leakage(splits: Splits, test: Split) -> dict[str, Any]:
    """Find and log the test images that are also in train or validation, exactly or nearly.

    Returns {"num_test", "num_leaked", "pairs": [{"test_row", "split", "row", "exact", "difference"}, ...]},
    exact pairs first; `split` and the rows are the data set's own. Labels are not compared.
    Raises: UserError for a stream.
    """
    if not isinstance(splits.train, Split):
        raise UserError(
            "--check_leakage compares every image of train with test, and a stream is not read in advance; "
            "leave out one of --check_leakage and --streaming"
        )
    seen = (splits.train, splits.validation)
    pairs = find_duplicates(
        test.pictures("comparing test"),
        chain.from_iterable(split.pictures(f"comparing {split.name}") for split in seen),
    )
    sources = np.repeat([split.source_split for split in seen], [len(split) for split in seen])
    rows = np.concatenate([split.row_ids for split in seen])
    found = [
        {
            "test_row": int(test.row_ids[pair.first]),
            "split": str(sources[pair.second]),
            "row": int(rows[pair.second]),
            "exact": pair.exact,
            "difference": pair.difference,
        }
        for pair in pairs
    ]
    leaked = len({pair["test_row"] for pair in found})
    if found:
        named = [f"test row {p['test_row']} is {p['split']} row {p['row']}" for p in found]
        more = f" and {len(found) - NUM_LOGGED:,} more pairs" if len(found) > NUM_LOGGED else ""
        logger.warning(
            "--check_leakage: %s of %s test images are also in train or validation: %s%s",
            f"{leaked:,}", f"{len(test):,}", ", ".join(named[:NUM_LOGGED]), more,
        )  # fmt: skip
    else:
        logger.info("--check_leakage: no test image is in train or validation")
    return {"num_test": len(test), "num_leaked": leaked, "pairs": found}
