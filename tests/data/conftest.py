"""Shared by the data tests: an empty `datasets` cache."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(datasets_cache):
    """Keeps what `datasets` prepares inside the test's folder."""
