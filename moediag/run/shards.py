"""Shards and slices: the unit of capture, and which of them a worker takes.

Invariant: every arm of a run has the same shards, so a slice means the same sequences in every arm.
"""

from __future__ import annotations

from dataclasses import dataclass

from moediag.errors import RunError


@dataclass(frozen=True)
class Shard:
    """A range of whole sequences; every arm has the same shards."""

    index: int
    first_sequence: int
    n_sequences: int

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"shard-{self.index:05d}"

    @property
    def seq_ids(self) -> range:
        """Sequence ids of the shard."""
        return range(self.first_sequence, self.first_sequence + self.n_sequences)


@dataclass(frozen=True)
class Slice:
    """The shards that one worker takes: those whose index leaves ``index`` when divided by ``count``.

    Strided and not in blocks, so that workers that start together finish together however many shards are
    already there.

    Args:
        index: which worker, 0-based.
        count: how many workers fill the run.

    Example:
        >>> [Slice(1, 3).has(Shard(i, i, 1)) for i in range(5)]
        [False, True, False, False, True]
    """

    index: int = 0
    count: int = 1

    def has(self, shard: Shard) -> bool:
        """True when the shard is this worker's to take."""
        return shard.index % self.count == self.index

    def check(self) -> Slice:
        """Return self when there is such a worker.

        Raises:
            RunError: there is not.
        """
        if not 0 <= self.index < self.count:
            raise RunError(
                f"--shard-index {self.index} with --num-shards {self.count}: wanted an index from 0 to "
                f"{max(self.count - 1, 0)} (0-based), one for every worker"
            )
        return self

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Slice()
"""The slice of a worker that takes every shard it can get."""


def split_into_shards(n_sequences: int, shard_size: int) -> list[Shard]:
    """Shards of ``shard_size`` whole sequences; the last may be smaller."""
    starts = range(0, n_sequences, shard_size)
    return [Shard(i, start, min(shard_size, n_sequences - start)) for i, start in enumerate(starts)]
