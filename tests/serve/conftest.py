"""Fixtures of the pages: a picture, and a tab of the browser that notes problems."""

import pytest


@pytest.fixture(scope="session")
def picture(stripes):
    return next((stripes / "test" / "down").glob("*.png"))


@pytest.fixture
def tab(browser):
    """An empty page of the browser, and the list of errors that it will report."""
    problems = []
    page = browser.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda each: problems.append(each.text) if each.type == "error" else None)
    yield page, problems
    page.close()
