"""Fixtures of the data tests: an empty `datasets` cache."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(datasets_cache):
    """Keep the cache of `datasets` inside the test's folder."""
