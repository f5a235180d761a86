"""Options of the long jobs whose cases lie in folders of their own: who does them, this machine or a Ray cluster."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from moediag.cli import options as o
from moediag.run.pieces import Here, Pool


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ray", action="store_true", help="each case is a task on a Ray cluster that sees --folder")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="as of moediag capture")
    parser.add_argument("--num-workers", type=int, help="tasks at a time; default: one per node")


def pool_of(given: argparse.Namespace, here: Pool | None = None) -> AbstractContextManager[Pool]:
    """What :func:`~moediag.run.pieces.each` takes: tasks that share ``given.folder``, or processes of this machine.

    Args:
        here: these; None = this process alone.
    """
    cluster = o.cluster_options(given.ray, 1, address=given.ray_address, num_workers=given.num_workers)
    return nullcontext(here or Here()) if cluster is None else o.tasks(Path(given.folder), cluster)


def show(done: int, total: int) -> None:
    """How far a job is, once for all who do it."""
    print(f"{done} of {total}", flush=True)
