"""Awkward ways of running vLLM against the plain one: the table of reports/execution.md, and its claims.

``make test`` captures under one setting per kind (tests/test_engines_execution.py); this under all. Ends with exit code
1 and names the claims that do not hold; the table is written all the same, to be looked at.

Usage: python benchmarks/execution.py moediag-demo/checkpoints/moe
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from committed_tables import commit_table, markdown
from execution_measures import COLUMNS, broken_claims, measure
from execution_settings import SETTINGS


def main(checkpoint: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(checkpoint), Path(folder), tuple(SETTINGS))
    rows = ([cell(name, found) for cell in COLUMNS.values()] for name, found in measured.items())
    commit_table("execution.md", "settings", markdown(list(COLUMNS), rows))
    broken = [line for name, found in measured.items() for line in broken_claims(name, found, measured["plain"])]
    print("\n".join(broken) or "every claim holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
