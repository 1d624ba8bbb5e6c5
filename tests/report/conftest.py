"""A browser for the pages."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    with playwright.sync_playwright() as api:
        path = next(filter(None, [os.environ.get("CHROMIUM"), *found]), None)
        if path is None and not Path(api.chromium.executable_path).exists():
            pytest.skip("no Chromium; install it, or run: playwright install chromium")
        chromium = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
