"""The suite itself: what may be skipped is on a ledger, and the list of long files names files."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import LONGEST_FIRST

TESTS = Path(__file__).parent
NEEDS_ROOT = "mounting a small file system needs root"
MAY_BE_SKIPPED = {
    "test_command_line.py::test_too_little_space_is_refused_before_anything_starts": NEEDS_ROOT,
    "test_engines_ray.py": NEEDS_ROOT,
    "test_engines_resume.py::test_a_disk_that_fills_up_loses_nothing": NEEDS_ROOT,
    "test_folder.py::test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed": NEEDS_ROOT,
    "test_pages_browser.py": "a browser is a program and no package: CI installs one where it can",
}


def ways_out(path: Path) -> set[str]:
    """Functions of the file, or the file itself, that name a way to leave a test out or to let it fail."""
    tree = ast.parse(path.read_text())
    places = dict.fromkeys(tree.body, path.name)
    places |= {node: f"{path.name}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
    ways = ("skip", "skipif", "importorskip", "xfail")
    return {
        place
        for top, place in places.items()
        for node in ast.walk(top)
        if isinstance(node, ast.Attribute) and node.attr in ways
    }


def test_no_test_is_skipped_but_those_on_the_ledger() -> None:
    """Packages are never a reason: ``make test`` installs all of them, and one that is missing is a failure."""
    found = set().union(*(ways_out(path) for path in TESTS.glob("*.py")))
    assert found == MAY_BE_SKIPPED.keys()


def test_the_long_files_exist() -> None:
    assert {f"test_{name}.py" for name in LONGEST_FIRST} <= {path.name for path in TESTS.glob("test_*.py")}
