"""The loop both engines share: capture the shards that are missing, tell how far it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from moediag.engines.channel import Reporter
from moediag.run.directory import Run, Shard

OnDone = Callable[[float], None]
"""Told how many of the shard's sequences are done; fractions while one is being sampled."""


def fill_missing_shards(run: Run, arm: str, reporter: Reporter, capture_shard: Callable[[Shard, OnDone], None]) -> None:
    """Call ``capture_shard`` for every shard of the arm that is not committed yet, in order."""
    n_all = sum(shard.n_sequences for shard in run.shards)
    n_done = n_all - sum(shard.n_sequences for shard in run.missing_shards(arm))
    for shard in run.missing_shards(arm):
        _tell(reporter, n_done, n_all, 0.0)
        capture_shard(shard, partial(_tell, reporter, n_done, n_all))
        n_done += shard.n_sequences
    _tell(reporter, n_done, n_all, 0.0)


def _tell(reporter: Reporter, n_before: int, n_all: int, n_in_shard: float) -> None:
    reporter.progress(n_before + n_in_shard, n_all, "sequences")
