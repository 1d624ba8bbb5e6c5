"""README and its Chinese edition have the same content."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"^```.*?^```$", id="code blocks"),
        pytest.param(r"\]\((?!README)([^)]+)\)", id="links"),
        pytest.param(r"^#+ ", id="headings"),
        pytest.param(r"^\| `", id="rows"),
    ],
)
def test_both_languages_have_the_same_code_blocks_and_links(pattern):
    english, chinese = (
        re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)
        for page in (ENGLISH, CHINESE)
    )
    assert english and chinese == english


def test_readme_is_short():
    assert len(ENGLISH.read_text().splitlines()) <= 125
