"""What a reader meets: rules by their names, the words of the glossary, no private dialect."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from moediag.hygiene.rules import RULES

REFERENCE = REPOSITORY / "reports" / "reference.md"
PAGES = [REPOSITORY / "README.md", REFERENCE, *(REPOSITORY / "notebooks").glob("*.ipynb")]
MODULES = sorted((REPOSITORY / "moediag").rglob("*.py"))
_RULE = re.compile(r"\bD\d\d\b(?:-[a-z0-9]+(?:-[a-z0-9]+)*)?|\bR[0124-9]\b")  # R3 is a paper
_DIALECT = re.compile(r"\b(wanted|wants|told|as asked)\b", re.IGNORECASE)


def messages(path: Path) -> Iterator[str]:
    """Every string of a module that is no docstring: what may reach a user."""
    tree = ast.parse(path.read_text())
    shown_by_nobody = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in shown_by_nobody:
            yield node.value


def unnamed(text: str) -> list[str]:
    """Ids of rules in a text that stand without their name, and names that no rule has."""
    return [found for found in _RULE.findall(text) if found not in RULES]


def test_an_id_without_its_name_is_seen() -> None:
    assert unnamed("score the same tokens (D32, D01-token-lag)") == ["D32"]
    assert unnamed("D01-no-such-rule") == ["D01-no-such-rule"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_message_names_a_rule_by_its_number_alone(path: Path) -> None:
    """Bug: pages cited D22, D23, D24 and R9, which nothing explains."""
    for text in messages(path):
        assert not unnamed(text), text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_page_names_a_rule_by_its_number_alone(path: Path) -> None:
    assert not unnamed(path.read_text())


def test_the_glossary_is_short_sorted_and_says_each_word_once() -> None:
    table = REFERENCE.read_text().split("## Glossary")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:3]] for line in table.splitlines() if "|" in line]
    words = [word.lower() for word, _ in rows[2:]]
    assert 15 <= len(words) <= 25
    assert words == sorted(set(words))
    assert all(len(meaning) > 20 for _, meaning in rows[2:])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_messages_speak_the_fields_words(path: Path) -> None:
    """Bug: errors said ``wanted`` for expected, ``told apart`` for distinguished, ``as asked`` for requested."""
    for text in messages(path):
        assert not _DIALECT.search(text), text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_names_speak_the_fields_words(path: Path) -> None:
    """Bug: a list of sentences was called said, a requested configuration asked, an expected shape wanted."""
    names = {
        getattr(node, key)
        for node in ast.walk(ast.parse(path.read_text()))
        for key in ("id", "arg", "attr", "name")
        if isinstance(getattr(node, key, None), str)
    }
    assert not [name for name in names if {"told", "asked", "wanted", "said"} & set(name.split("_"))]
