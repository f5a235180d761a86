"""The notebooks: stored without output, one question and one answer each, run from top to bottom on the demo.

What they show stands in the pages of reports/notebooks: those of the notebooks as they are now.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from executed_notebooks import NOTEBOOKS, PAGES, cells, executed, write_page

NAMES = {"choose_a_band", "figure1", "near_ties", "position_drift", "your_run"}
BORROWED = {"os", "pathlib", "pandas", "moediag"}


def test_every_notebook_is_known() -> None:
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_output_and_call_moediag_alone(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    nodes = [node for source in cells(path, "code") for node in ast.walk(ast.parse(source))]
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes) <= 3
    for node in nodes:
        assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda), "what computes belongs to moediag"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.partition(".")[0] for name in names} <= BORROWED


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_answers_and_says_what_would_overturn_it(path: Path) -> None:
    words = cells(path, "markdown")
    assert words[0].startswith("# ")
    assert any(text.startswith("## The answer") for text in words)
    assert words[-1].startswith("## What would overturn it")
    assert words[-1].count("\n- ") >= 3
    assert "print(" in cells(path, "code")[-1]


def test_without_a_setting_the_folder_is_the_one_that_make_demo_leaves() -> None:
    default = re.compile(r'os\.environ\.get\("MOEDIAG_DEMO", "(.*?)"\)')
    for path in NOTEBOOKS:
        found = default.findall("\n".join(cells(path, "code")))
        assert [(path.parent / folder).resolve() for folder in found] == [REPOSITORY / "moediag-demo"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_is_of_the_notebook_as_it_is_now(path: Path) -> None:
    """Bug: on a code host the notebooks, stored without output, were questions without a picture or an answer.

    A page that is not: ``python tests/executed_notebooks.py DEMO`` makes them anew.
    """
    check_page(PAGES, path)


def check_page(folder: Path, path: Path) -> None:
    page = (folder / f"{path.stem}.md").read_text()
    words, sources = cells(path, "markdown"), cells(path, "code")
    at = -1
    for cell in words + sources:
        assert cell in page, "python tests/executed_notebooks.py DEMO makes the pages anew"
    for cell in words:  # in the notebook's order
        assert (at := page.index(cell, at + 1)) >= 0
    pictures = re.findall(r"!\[[^]]+\]\((figures/[\w-]+\.png)\)", page)
    assert len(pictures) >= sum(".plot(" in source for source in sources) > 0
    for picture in pictures:
        data = (folder / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 300_000
    assert "<table" in page
    assert "```text" in page[page.index(sources[-1]) :], "what the last cell prints is the answer"
    assert len(page) < 65_536
    assert "<style" not in page
    assert not re.search(r"(?<![\w./])/(tmp|home|root|work|Users|builds)/", page)


def test_no_page_and_no_picture_is_left_of_a_notebook_that_is_gone() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == NAMES
    named = {name for page in PAGES.glob("*.md") for name in re.findall(r"figures/([\w-]+\.png)", page.read_text())}
    assert {path.name for path in (PAGES / "figures").iterdir()} == named


@pytest.mark.engines
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_the_demo(path: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAG_DEMO", str(demo))
    monkeypatch.delenv("MOEDIAG_RUN", raising=False)
    name, seen = path.stem, executed(path)
    write_page(name, seen, demo, tmp_path)
    check_page(tmp_path, path)
    answer = " ".join(seen[-2].printed.split())
    summary = json.loads((demo / "moe" / "summary.json").read_text())
    assert expected(name, summary) in answer
    assert not re.search(r"\bnan\b|\bNone\b", answer)


def expected(name: str, summary: dict[str, Any]) -> str:
    """A number of the answer, read from summary.json by another way."""
    pair = summary["pairs"]["infer~train"]
    return {
        "choose_a_band": f"{pair['n_tokens']:,} scored tokens",
        "figure1": f"{pair['n_tokens']:,}",
        "near_ties": f"{100 * summary['predicted_flips']['explained']['explained']:.2f} %",
        "position_drift": f"{pair['position']['n_sequences']} sequences",
        "your_run": f"{summary['verdict']['word']}: {summary['verdict']['reason']}",
    }[name]


@pytest.mark.engines
def test_your_run_reads_a_dense_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAG_RUN", str(demo / "dense"))
    (answer,) = [cell.printed for cell in executed(REPOSITORY / "notebooks" / "your_run.ipynb") if cell.printed][-1:]
    assert "choices flip" not in answer
    assert "worst tokens hold" in answer
