"""What the diagnosis names of planted faults and of healthy pairs. The tables of reports/diagnosis.md.

``python benchmarks/faults.py make --folder KEPT`` makes a run for every healthy pair and for every fault of
:mod:`moediag.faults` planted on one side, about an hour of two cores; what is there is not made again.
``python benchmarks/faults.py read --folder KEPT`` asks the diagnosis of every run, without an engine, prints what was
named, and writes the tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from committed_tables import commit_table
from conftest import KeptEngines
from fault_measures import make, read, tables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("make", "read"))
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints and runs are kept")
    parser.add_argument("names", nargs="*", help="parts of names of cells (model~dtype~seed~fault~side); then no table "
                        "is written")  # fmt: skip
    parser.add_argument("--kept", action="store_true", help="read: what an earlier analysis said, where there was one; "
                        "right while no rule has changed")  # fmt: skip
    given = parser.parse_intermixed_args()
    if given.stage == "make":
        engines = KeptEngines()
        try:
            make(given.folder, engines, given.names)
        finally:
            engines.close()
        return 0
    for title, table in tables(read(given.folder, given.names, given.kept)).items():
        if given.names:
            print(f"\n{title}\n{table}")
        else:
            commit_table("diagnosis.md", title, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
