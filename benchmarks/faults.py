"""What the diagnosis names of planted faults and of healthy pairs. The tables of reports/diagnosis.md.

``python benchmarks/faults.py make --folder KEPT`` makes a run for every healthy pair and for every fault of
:mod:`moediag.faults` planted on one side, about an hour of two cores; what is there is not made again.
``python benchmarks/faults.py read --folder KEPT`` asks the diagnosis of every run, without an engine, prints what was
named, and writes the tables. With --ray both share their cells among the tasks of a cluster.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from committed_tables import commit_table
from conftest import ENGINES
from fault_measures import make, read, tables
from over_cluster import add_options, pool_of

from moediag.run.pieces import Processes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("make", "read"))
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints and runs are kept")
    parser.add_argument("names", nargs="*", help="parts of names of cells (model~dtype~seed~fault~side); then no table "
                        "is written")  # fmt: skip
    parser.add_argument("--kept", action="store_true", help="read: what an earlier analysis said, where there was one; "
                        "right while no rule has changed")  # fmt: skip
    add_options(parser)
    given = parser.parse_intermixed_args()
    folder = given.folder.resolve()
    if given.stage == "make":
        with closing(ENGINES), pool_of(given) as pool:
            make(folder, given.names, pool)
        return 0
    with pool_of(given, Processes(os.cpu_count() or 1)) as pool:
        readings = read(folder, given.names, pool, given.kept)
    for title, table in tables(readings).items():
        if given.names:
            print(f"\n{title}\n{table}")
        else:
            commit_table("diagnosis.md", title, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
