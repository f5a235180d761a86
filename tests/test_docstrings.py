"""The examples in the package's docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
from conftest import REPOSITORY


def modules_with_examples() -> list[str]:
    """Names of the modules that show an example."""
    paths = [path for path in sorted((REPOSITORY / "moediag").rglob("*.py")) if ">>> " in path.read_text()]
    return [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    """Bug: the option that collects examples was set, but only for the folder of the tests, which has none."""
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
