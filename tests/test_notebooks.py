"""The notebooks: stored without output, one question and one answer each, run from top to bottom on the demo."""

from __future__ import annotations

import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import REPOSITORY
from nbclient import NotebookClient

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = {"choose_a_band", "figure1", "near_ties", "position_drift", "your_run"}
BORROWED = {"os", "pathlib", "pandas", "moediag"}


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def run_notebook(name: str) -> list[tuple[str, object]]:
    """Printed text and the shown value (a picture's bytes, else HTML) of every code cell, run by a kernel."""
    path = REPOSITORY / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()
    return [shown(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def shown(outputs: list[Any]) -> tuple[str, object]:
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for output in (output for output in outputs if "data" in output):
        if "image/png" in output.data:
            return printed, base64.b64decode(output.data["image/png"])
        if "text/html" in output.data:
            return printed, output.data["text/html"]
    return printed, None


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


@pytest.mark.engines
@pytest.mark.parametrize("name", sorted(NAMES))
def test_notebooks_run_on_the_demo(name: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAG_DEMO", str(demo))
    monkeypatch.delenv("MOEDIAG_RUN", raising=False)
    seen = run_notebook(name)
    pictures = [value for _, value in seen if isinstance(value, bytes)]
    assert pictures
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in pictures)
    assert any(isinstance(value, str) and "<table" in value for _, value in seen)
    answer = " ".join(seen[-1][0].split())
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
    seen = run_notebook("your_run")
    assert "choices flip" not in seen[-1][0]
    assert "worst tokens hold" in seen[-1][0]
