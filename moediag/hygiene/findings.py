"""A finding, and how hits over many shards become one: counts add, the first places are kept in order.

Invariant: a finding does not depend on the order of sequences, on where shards end, or on which shards were counted
together before they were merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.rules import ERROR, NOTE, RULES, WARNING
from moediag.run.capture import TokenRows

LEVELS = (ERROR, WARNING, NOTE)
N_PLACES = 5
"""Places shown per finding: enough to see a pattern, few enough to read."""

_N_KEYS = 1 << 16
"""Bits for distinct hits: 64 KiB per count, exact enough for the few hundred that decide any test."""


class Place(NamedTuple):
    """Where: sequence, position in it, MoE layer (None = the whole row)."""

    seq_id: int | str
    position: int
    layer: int | None = None

    def text(self) -> str:
        """The place in words."""
        layer = "" if self.layer is None else f" layer {self.layer}"
        return f"sequence {self.seq_id} position {self.position}{layer}"


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Args:
        level: error, warning or note.
        rule: its stable name, a key of :data:`moediag.hygiene.rules.RULES`.
        where: arm, pair of arms or file.
        message: what was found, in one line.
        n, n_of: how many of how many; None where nothing is counted.
        places: the first few, in order of sequence, position, layer.
        base_rate: how often [0..1] chance alone would show it, an upper bound; None where chance plays no part.
    """

    level: str
    rule: str
    where: str
    message: str
    n: int | None = None
    n_of: int | None = None
    places: tuple[Place, ...] = ()
    base_rate: float | None = None

    @property
    def cause(self) -> str:
        """The likely cause."""
        return RULES[self.rule].cause

    @property
    def next_check(self) -> str:
        """What to look at next."""
        return RULES[self.rule].next_check

    def line(self) -> str:
        """The finding as one line."""
        first = f", first: {self.places[0].text()}" if self.places else ""
        return f"{self.level}: {self.rule}: {self.where}: {self.message}{first}"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The finding of a :meth:`record`."""
        known = {one.name: record[one.name] for one in fields(cls)}
        return cls(**{**known, "places": tuple(Place(**place) for place in record["places"])})

    def record(self) -> dict[str, Any]:
        """The finding as JSON has it, cause and next check included."""
        return {
            **vars(self),
            "places": [place._asdict() for place in self.places],
            "cause": self.cause,
            "next_check": self.next_check,
        }


def finding(rule: str, where: str, message: str, **facts: Any) -> Finding:
    """A finding at its rule's own level."""
    return Finding(RULES[rule].level, rule, where, message, **facts)


def counted(rule: str, where: str, message: str, count: Count, base_rate: float | None = None) -> Finding:
    """A finding with a count's numbers and places."""
    return finding(rule, where, message, n=count.n, n_of=count.n_of, places=tuple(count.places), base_rate=base_rate)


def headline(findings: Iterable[Finding]) -> list[str]:
    """The worst finding in full, and the others above a note by name, as lines; then what the numbers below it cannot
    be read as; none where nothing is wrong."""
    some = list(findings)
    serious = by_level([found for found in some if found.level != NOTE])
    noted = [found.line() for found in some if found.rule == "not-estimable"]
    if not serious:
        return noted
    worst = serious[0]
    lines = [worst.line(), f"    likely: {worst.cause}; next: {worst.next_check}"]
    others = [f"{found.level} {found.rule} ({found.where})" for found in serious[1:]]
    return [*lines, *([f"    also: {', '.join(others)}"] if others else []), *noted]


def by_level(findings: list[Finding]) -> list[Finding]:
    """Errors first; within a level as they came."""
    return sorted(findings, key=lambda found: LEVELS.index(found.level))


class Tally:
    """What a rule keeps of the rows that it has seen; two of them, of different rows, merge.

    Every attribute merges by its type: numbers and arrays add, bits (arrays of bool) and sets unite, lists are joined,
    tuples and dictionaries merge entry by entry, None gives way; texts, truths and shapes are the same in both.
    """

    _ends: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {}
    """Attributes of which the largest or the smallest counts -> max or min."""

    def merge(self, later: Self) -> None:
        """Add what another one of the same rule saw."""
        for name, value in vars(later).items():
            mine = getattr(self, name)
            both = self._ends.get(name, _merged) if mine is not None and value is not None else _merged
            setattr(self, name, both(mine, value))


def _merged(mine: Any, theirs: Any) -> Any:
    """Two values of one attribute as one."""
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    if isinstance(mine, Tally):
        mine.merge(theirs)
        return mine
    if isinstance(mine, tuple) and type(mine) is tuple:
        return tuple(_merged(one, other) for one, other in zip(mine, theirs, strict=True))
    if isinstance(mine, dict):
        return mine | {key: _merged(mine.get(key), value) for key, value in theirs.items()}
    if isinstance(mine, set):
        return mine | theirs
    if isinstance(mine, np.ndarray | list) or (isinstance(mine, int | float) and not isinstance(mine, bool)):
        return mine + theirs
    if mine != theirs:
        raise TypeError(f"{mine!r} and {theirs!r} do not merge")
    return mine


@dataclass
class Count(Tally):
    """How many of how many, and the first places.

    Rows with the same prefix are copies of each other (samples of one prompt, prompts given twice) and no separate
    evidence: with ``keys`` the distinct ones are counted as well, in a bitmap of bounded size. It saturates, so
    :attr:`n_distinct` is never too high.
    """

    n: int = 0
    n_of: int = 0
    places: list[Place] = field(default_factory=list)
    _seen: NDArray[np.bool_] | None = None

    def merge(self, later: Self) -> None:
        """Add hits on other rows."""
        super().merge(later)
        self.places = sorted(self.places)[:N_PLACES]

    def add(self, tokens: TokenRows, hit: NDArray[np.bool_], n_of: int, keys: NDArray[np.uint64] | None = None) -> None:
        """Count hits.

        Args:
            hit: (T,) whole rows or (T, L).
            n_of: how many could have been hits.
            keys: (T,) what rows that are copies of each other have in common.
        """
        self.n_of += n_of
        n = int(np.count_nonzero(hit))
        if not n:
            return
        self.n += n
        row_N = np.flatnonzero(hit if hit.ndim == 1 else hit.any(axis=1))
        if keys is not None:
            self._seen = np.zeros(_N_KEYS, dtype=np.bool_) if self._seen is None else self._seen
            self._seen[(keys[row_N] * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(48)] = True
        order_N = np.lexsort((tokens.position_T[row_N], tokens.seq_id_T[row_N]))[:N_PLACES]
        for row in row_N[order_N].tolist():
            layers = [None] if hit.ndim == 1 else np.flatnonzero(hit[row]).tolist()
            self.places += [Place(int(tokens.seq_id_T[row]), int(tokens.position_T[row]), layer) for layer in layers]
        self.places = sorted(self.places)[:N_PLACES]

    @classmethod
    def merged(cls, counts: Iterable[Count], n_of: int) -> Count:
        """Several counts as one of ``n_of``; copies are not distinguished any more."""
        some = list(counts)
        places = sorted(place for count in some for place in count.places)
        return cls(sum(count.n for count in some), n_of, places[:N_PLACES])

    @property
    def n_distinct(self) -> int:
        """Hits that are no copies of each other, at least; all of them where no keys were given."""
        return self.n if self._seen is None else int(np.count_nonzero(self._seen))

    @property
    def share(self) -> float:
        """n / n_of; 0 of nothing."""
        return self.n / self.n_of if self.n_of else 0.0

    def text(self) -> str:
        """``n of n_of``, thousands separated."""
        return f"{self.n:,} of {self.n_of:,}"
