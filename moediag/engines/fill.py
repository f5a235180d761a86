"""What every engine process does: hold a model, capture the shards that are missing beside other workers, report.

Invariant: a shard is captured only under its claim and only while it is not committed, so that workers who
know nothing of each other never capture one twice.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from typing import Any

from moediag.engines.channel import Reporter
from moediag.run.capture import Shard
from moediag.run.writer import RunWriter

OnDone = Callable[[float], None]
"""Told how many of the shard's sequences are done; fractions while one is being sampled."""


class Held:
    """At most one model at a time: an accelerator has no room for two."""

    def __init__(self) -> None:
        self._wanted: Any = None
        self._model: Any = None
        self._let_go: Callable[[Any], None] | None = None

    def get(self, wanted: Any, load: Callable[[], Any], let_go: Callable[[Any], None]) -> Any:
        """The model that is requested; loaded, after the one that is held was let go, unless that is it.

        Args:
            wanted: all that makes two loads the same.
            let_go: ends what the model holds beside memory.
        """
        if self._let_go is not None and wanted == self._wanted:
            return self._model
        self._release()
        self._model = load()
        self._wanted, self._let_go = wanted, let_go
        return self._model

    def _release(self) -> None:
        import torch

        if self._let_go is not None:
            self._let_go(self._model)
        self._model = self._let_go = None
        gc.collect()  # models are full of cycles
        torch.cuda.empty_cache()  # vLLM takes its share of what the device says is free


def seed_of(name: str) -> int:
    """A seed from a name, the same everywhere: what is drawn does not depend on what was drawn before."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def fill_missing_shards(
    writer: RunWriter, arm: str, reporter: Reporter, capture_shard: Callable[[Shard, OnDone], None]
) -> None:
    """Call ``capture_shard`` for every shard of the worker's slice that is neither committed nor held by another.

    Passes are repeated until one finds nothing to do: what a worker that was killed meanwhile had held is free
    again. Shards that living workers still hold are left to them.
    """
    n_filled = 1
    while n_filled:
        n_filled = 0
        for shard in writer.own_missing_shards(arm):
            n_filled += _fill_shard(writer, arm, shard, reporter, capture_shard)
    writer.remove_dead_claims(arm)
    _tell(reporter, writer, _n_done(writer, arm))


def _fill_shard(
    writer: RunWriter, arm: str, shard: Shard, reporter: Reporter, capture_shard: Callable[[Shard, OnDone], None]
) -> bool:
    """Capture one shard; False when another worker holds it or has committed it meanwhile."""
    with writer.claim(arm, shard) as is_mine:
        if not is_mine or writer.run.has_capture(arm, shard):
            return False
        n_done = _n_done(writer, arm)
        _tell(reporter, writer, n_done)
        capture_shard(shard, lambda n_in_shard: _tell(reporter, writer, n_done + n_in_shard))
    return True


def _n_done(writer: RunWriter, arm: str) -> int:
    """Sequences of this worker's slice that are committed, whoever captured them."""
    return _n_all(writer) - sum(shard.n_sequences for shard in writer.own_missing_shards(arm))


def _n_all(writer: RunWriter) -> int:
    return sum(shard.n_sequences for shard in writer.run.shards if writer.worker.has(shard))


def _tell(reporter: Reporter, writer: RunWriter, n_done: float) -> None:
    reporter.progress(n_done, _n_all(writer), "sequences")
