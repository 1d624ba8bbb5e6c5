import json
import sys

import pytest

from hf_cifar.errors import UserError
from hf_cifar.extras import require


def test_require_returns_the_module():
    assert require("json", extra="bundled") is json


def test_missing_module_names_the_extra():
    with pytest.raises(
        UserError, match=r"no_such_module is not installed; run: pip install"
    ) as caught:
        require("no_such_module.part", extra="bundled")
    assert "'hf-cifar[bundled]'" in str(caught.value)


def test_error_inside_the_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        require("needs_more", extra="bundled")
    assert "needs_more" not in sys.modules
