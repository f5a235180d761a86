"""Every supported router family in both engines, in both dtypes: the tables of reports/families.md, and their claims.

``make test`` measures one family per kind of router (tests/test_engines_families.py); this measures all. Ends with exit
code 1 and names the claims that do not hold; the tables are written all the same, to be looked at.

Usage: python benchmarks/router_families.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from committed_tables import commit_table, markdown
from family_measures import AGREEMENT, KEPT, NAMES, broken_claims, measure


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        measured = measure({torch.bfloat16: NAMES, torch.float32: NAMES}, Path(folder))
    broken = []
    for dtype, measures in measured.items():
        name = str(dtype).removeprefix("torch.")
        for title, columns in ((name, AGREEMENT), (f"{name}, what is kept", KEPT)):
            rows = ([family, *(cell(found) for cell in columns.values())] for family, found in measures.items())
            commit_table("families.md", title, markdown(["checkpoint", *columns], rows))
        broken += [line for family, found in measures.items() for line in broken_claims(family, found)]
    print("\n".join(broken) or "every claim holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
