"""The token frame: one row per response token, the base of every log-probability analysis.

Invariants:
    - routing arrays are read block by block and dropped; what stays is 56 bytes per token (``BYTES_PER_TOKEN``), in
      memory (:class:`Tokens`) or on disk, read part by part as often as a statistic needs (:class:`TokenParts`);
    - parts hold whole prompts, in ascending order: sums by prompt are the same, bit for bit, in one part or in many;
    - a token counts as *scored* when both arms gave a finite log-probability, here, in corrections and in series
      (:func:`~moediag.run.capture.is_scored`). NaN is "not scored"; an infinity is a defect to report, not a number
      (rule D31-impossible-logp): both are left out of every statistic and counted, never averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.declarations import TOKENS
from moediag.analysis.expert_sets import NOT_COMPARED, ExpertComparison, compare_block
from moediag.analysis.routing_counts import MisroutedMass, misrouted_mass
from moediag.errors import MoediagError
from moediag.run.align import Pair, PairBlock
from moediag.run.capture import is_scored
from moediag.statistics import quantiles

Float64 = NDArray[np.float64]

BYTES_PER_TOKEN: Final = sum(np.dtype(column.dtype).itemsize for column in TOKENS.columns)
"""What a token keeps once its block is gone; 64 is the most allowed."""
CHUNK_TOKENS: Final = 65_536
"""Half a megabyte per float64 array: a chunk's dozen arrays stay in the second-level cache."""


def token_frame(pair: Pair) -> pd.DataFrame:
    """One row per response token of the pair, in shard order.

    Args:
        pair: two aligned arms; blocks are read once.

    Returns:
        Frame ``tokens``; log-probabilities and entropies in nat, NaN = not scored.
    """
    return concatenate_tokens([token_columns(block, compare_block(block)) for block in pair.blocks()])


def concatenate_tokens(parts: list[dict[str, NDArray[Any]]]) -> pd.DataFrame:
    """The token frame of blocks' columns as :func:`token_columns` gives them; no block, no rows.

    The parts are emptied column by column as they are joined, so that the tokens are never held twice.
    """
    columns = {}
    for column in TOKENS.columns:
        taken = [part.pop(column.name) for part in parts]
        columns[column.name] = np.concatenate(taken) if taken else np.zeros(0, column.dtype)
    return TOKENS.validate(pd.DataFrame(columns, copy=False))


@dataclass(frozen=True)
class Extent:
    """What the edges of bins and strata hang on, of scored tokens.

    Args:
        n_positions: largest position + 1.
        most_flipped: most flipped layers of a token; -1 = no routing known.
        entropy: the first column of entropies, infer's or train's, that knows one; None = neither.
    """

    n_positions: int
    most_flipped: int
    entropy: str | None


class TokenSource(ABC):
    """The tokens of a pair that both arms scored, as statistics read them: part by part.

    S sequences and C prompts are those with a scored token, in ascending order.
    """

    @abstractmethod
    def parts(self) -> Iterator[Tokens]:
        """All tokens in ascending order of their prompts, every prompt whole; at least one part."""

    @abstractmethod
    def where(self, of: Callable[[Tokens], NDArray[np.bool_]]) -> TokenSource:
        """The scored tokens for which ``of`` is true."""

    def collect(self, of: Callable[[Tokens], NDArray[Any]]) -> NDArray[Any]:
        """Rows that every part gives, those of prompts or of sequences, one after the other."""
        return np.concatenate([of(part) for part in self.parts()])

    def total(self, of: Callable[[Tokens], Any]) -> Any:
        """Sum of what the parts give."""
        first, *rest = (of(part) for part in self.parts())
        return sum(rest, first)

    def sums(self, *of: Callable[[Tokens], ArrayLike]) -> Float64:
        """(len(of), C) sums of token values over the tokens of each prompt, in one pass."""
        return self.collect(lambda part: np.stack([part.by_prompt(one(part)) for one in of], axis=1)).T

    def values(
        self, of: Callable[[Tokens], Float64], group: Callable[[Tokens], NDArray[Any]] | None = None
    ) -> quantiles.ReadValues:
        """Token values as quantiles read them, in groups 0 .. G-1 (-1 = in none), or in one group 0."""

        def part(some: Tokens) -> quantiles.Values:
            group_T = np.zeros(len(some), np.intp) if group is None else group(some)
            return quantiles.Values(of(some), group_T, some.prompt_row_T, some.n_prompts)

        return lambda: map(part, self.parts())

    def quantile(self, of: Callable[[Tokens], Float64], q: float) -> float:
        """Linear quantile of token values; NaN without a token."""
        return float(quantiles.quantiles_of_groups(self.values(of), np.array([len(self)]), np.array([[q]]))[0, 0])

    def __len__(self) -> int:
        return int(self.n_by_prompt.sum())

    @property
    def n_prompts(self) -> int:
        """C."""
        return len(self.n_by_prompt)

    @property
    def n_sequences(self) -> int:
        """S."""
        return len(self.n_S)

    @cached_property
    def n_by_prompt(self) -> Float64:
        """(C,) tokens of each prompt."""
        return self.collect(lambda part: part.n_by_prompt)

    @cached_property
    def n_S(self) -> Float64:  # noqa: N802
        """(S,) tokens of each sequence."""
        return self.collect(lambda part: part.n_S)

    @cached_property
    def diff_S(self) -> Float64:  # noqa: N802
        """(S,) log of each sequence's product ratio: the sum of its differences [nat]."""
        return self.collect(lambda part: part.diff_S)

    @cached_property
    def prompt_row_S(self) -> NDArray[np.intp]:  # noqa: N802
        """(S,) 0 .. C-1, the prompt of each sequence."""
        rows, n_before = [], 0
        for part in self.parts():
            rows.append(part.prompt_row_S + n_before)
            n_before += part.n_prompts
        return np.concatenate(rows)

    @cached_property
    def extent(self) -> Extent:
        """What the edges of bins and strata hang on."""
        each = [
            (
                int(part.column("position").max(initial=-1)) + 1,
                int(part.column("n_flipped_layers").max(initial=-1)),
                *(bool(np.isfinite(part.column(f"entropy_{side}")).any()) for side in ("infer", "train")),
            )
            for part in self.parts()
        ]
        n_positions, most_flipped, *known = (max(column) for column in zip(*each, strict=True))
        sides = [side for side, is_known in zip(("infer", "train"), known, strict=True) if is_known]
        return Extent(n_positions, most_flipped, f"entropy_{sides[0]}" if sides else None)


@dataclass(frozen=True)
class Tokens(TokenSource):
    """The tokens of a frame in memory: filter, differences, prompts and sequences, each computed once.

    T rows are scored tokens in the order of the frame, in float64 where they are log-probabilities; N rows are the
    frame's own.

    Args:
        frame: N response tokens of a run's pair or of a table (:attr:`~moediag.importers.tokens.LoggedTokens.frame`):
            columns of frame ``tokens``, of which logp_train, logp_infer [nat] and prompt_id are always there.
    """

    frame: pd.DataFrame

    @classmethod
    def of(cls, tokens: AnyTokens) -> Self:
        """The view of a frame; a view is its own."""
        return tokens if isinstance(tokens, cls) else cls(tokens.frame if isinstance(tokens, Tokens) else tokens)

    def parts(self) -> Iterator[Self]:
        """The frame as it is, in whatever order it is."""
        yield self

    def where(self, of: Callable[[Tokens], NDArray[np.bool_]]) -> Tokens:
        """The scored tokens for which ``of`` is true."""
        return Tokens(self.rows[of(self)])

    def chunks(self, n_tokens: int = CHUNK_TOKENS) -> Iterator[Self]:
        """Parts of whole sequences with about ``n_tokens`` rows each, and at least one sequence; they copy nothing.

        Raises:
            MoediagError: the frame is not in ascending order of its sequences.
        """
        ids_N = self.frame["seq_id"].to_numpy()
        if (ids_N[1:] < ids_N[:-1]).any():
            raise MoediagError("tokens are read in parts of whole sequences: sort the frame by seq_id and position")
        bounds = np.append(_Groups.of(ids_N).first_G, len(ids_N))
        first = 0
        while first < len(bounds) - 1:
            last = max(int(np.searchsorted(bounds, bounds[first] + n_tokens, side="right")) - 1, first + 1)
            yield replace(self, frame=self.frame.iloc[bounds[first] : bounds[last]])
            first = last

    def __len__(self) -> int:
        return int(np.count_nonzero(self.is_scored_N))

    @cached_property
    def is_scored_N(self) -> NDArray[np.bool_]:  # noqa: N802 - the legend suffix
        """Which rows both arms scored."""
        return is_scored(*self.logps_N)

    @property
    def logps_N(self) -> tuple[NDArray[Any], NDArray[Any]]:  # noqa: N802
        """train's and infer's log-probabilities of every row of the frame [nat]."""
        return self.frame["logp_train"].to_numpy(), self.frame["logp_infer"].to_numpy()

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The frame's rows of scored tokens."""
        scored: pd.DataFrame = self.frame if self.is_scored_N.all() else self.frame.loc[self.is_scored_N]
        return scored

    def column(self, name: str) -> NDArray[Any]:
        """(T,) values of a column, in its own dtype."""
        values_N: NDArray[Any] = self.frame[name].to_numpy()
        return values_N if self.is_scored_N.all() else values_N[self.is_scored_N]

    def get(self, name: str) -> NDArray[Any] | None:
        """(T,) values of a column that not every frame has; None = not there."""
        return self.column(name) if name in self.frame else None

    def at_rows(self, values_T: Float64, absent: float = 0.0) -> Float64:
        """(N,) values at the tokens' rows of the frame, ``absent`` in the rows that are not scored."""
        values_N = np.full(len(self.frame), absent)
        values_N[self.is_scored_N] = values_T
        return values_N

    @cached_property
    def logp_train_T(self) -> Float64:  # noqa: N802
        """Train's log-probabilities [nat]."""
        return self.column("logp_train").astype(np.float64)

    @cached_property
    def logp_infer_T(self) -> Float64:  # noqa: N802
        """Infer's log-probabilities [nat]."""
        return self.column("logp_infer").astype(np.float64)

    @cached_property
    def diff_T(self) -> Float64:  # noqa: N802
        """logp_train - logp_infer [nat]; 0 is perfect agreement."""
        return self.logp_train_T - self.logp_infer_T

    @cached_property
    def abs_diff_T(self) -> Float64:  # noqa: N802
        """abs(logp_diff) [nat]."""
        return np.abs(self.diff_T)

    @cached_property
    def diff_N(self) -> Float64:  # noqa: N802
        """logp_train - logp_infer of every row of the frame [nat]; NaN = not scored."""
        return self.at_rows(self.diff_T, np.nan)

    @cached_property
    def _prompts(self) -> _Groups:
        return _Groups.of(self.column("prompt_id"))

    @property
    def prompt_row_T(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. C-1, the prompt of every token, ascending by prompt id."""
        return self._prompts.row_T

    @property
    def n_prompts(self) -> int:
        """C: prompts with a scored token."""
        return len(self._prompts.first_G)

    def by_prompt(self, values_T: ArrayLike) -> Float64:
        """(C,) sums over the tokens of each prompt."""
        return self._prompts.sums(values_T)

    @cached_property
    def n_by_prompt(self) -> Float64:
        """(C,) tokens of each prompt."""
        return np.bincount(self.prompt_row_T, minlength=self.n_prompts).astype(np.float64)

    @cached_property
    def _sequences(self) -> _Groups:
        return _Groups.of(self.column("seq_id"))

    @property
    def first_S(self) -> NDArray[np.intp]:  # noqa: N802
        """First token of each sequence."""
        return self._sequences.first_G

    @property
    def row_T(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. S-1, the sequence of every token, ascending by sequence id."""
        return self._sequences.row_T

    @property
    def n_sequences(self) -> int:
        """S: sequences with a scored token."""
        return len(self._sequences.first_G)

    def by_sequence(self, values_T: ArrayLike) -> Float64:
        """(S,) sums over the tokens of each sequence."""
        return self._sequences.sums(values_T)

    @cached_property
    def n_S(self) -> Float64:  # noqa: N802
        """Tokens of each sequence."""
        return np.bincount(self.row_T, minlength=self.n_sequences).astype(np.float64)

    @cached_property
    def diff_S(self) -> Float64:  # noqa: N802
        """Log of each sequence's product ratio: the sum of its differences [nat]."""
        return self.by_sequence(self.diff_T)

    @cached_property
    def prompt_row_S(self) -> NDArray[np.intp]:  # noqa: N802
        """0 .. C-1, the prompt of each sequence."""
        return self.prompt_row_T[self.first_S]


@dataclass(frozen=True)
class _Groups:
    """Tokens of the same id.

    Args:
        first_G: first token of every group, ascending by id.
        row_T: 0 .. G-1, the group of every token.
        in_order: every group's tokens follow each other, group after group.
    """

    first_G: NDArray[np.intp]
    row_T: NDArray[np.intp]
    in_order: bool

    @staticmethod
    def of(ids_T: NDArray[Any]) -> _Groups:
        """The groups of some ids."""
        if not (ids_T[1:] >= ids_T[:-1]).all():
            _, first_G, row_T = np.unique(ids_T, return_index=True, return_inverse=True)
            return _Groups(first_G, row_T, False)
        is_first_T = np.ones(len(ids_T), np.bool_)
        np.not_equal(ids_T[1:], ids_T[:-1], out=is_first_T[1:])
        return _Groups(np.flatnonzero(is_first_T), np.cumsum(is_first_T) - 1, True)

    def sums(self, values_T: ArrayLike) -> Float64:
        """(G,) sums over the tokens of each group."""
        values = np.asarray(values_T, np.float64)
        if self.in_order:  # twenty times as fast
            return np.add.reduceat(values, self.first_G)
        return np.bincount(self.row_T, weights=values, minlength=len(self.first_G)).astype(np.float64)


class TokenParts(TokenSource):
    """Tokens that are read part by part, as often as they are needed.

    Args:
        read: gives frames in ascending order of their prompts, every prompt whole; at least one frame.
    """

    def __init__(self, read: Callable[[], Iterator[pd.DataFrame]]) -> None:
        self._read = read

    def parts(self) -> Iterator[Tokens]:
        """Every frame."""
        return map(Tokens, self._read())

    def where(self, of: Callable[[Tokens], NDArray[np.bool_]]) -> TokenParts:
        """The scored tokens for which ``of`` is true."""
        return TokenParts(lambda: (part.rows[of(part)] for part in self.parts()))


def beside(x: TokenSource, other: TokenSource) -> TokenSource:
    """The tokens of a pair that another pair of the same tokens scored, too.

    Args:
        x, other: their parts in ascending order of sequences, or everything in one part.

    Returns:
        Tokens of ``x``; the frames hold the other pair's columns, too, under ``<name>_other``.
    """
    keys, columns = ["seq_id", "position"], {"logp_train", "logp_infer", "n_flipped_layers"}

    def read() -> Iterator[pd.DataFrame]:
        frames = (part.rows[[*keys, *columns.intersection(part.frame)]] for part in other.parts())
        held = next(frames)
        for part in x.parts():
            some, last = [held], part.rows["seq_id"].max() if len(part.rows) else -1
            while not held["seq_id"].max() > last and (more := next(frames, None)) is not None:
                some.append(held := more)
            yield part.rows.merge(pd.concat(some), on=keys, suffixes=("", "_other"))

    return TokenParts(read)


def whole_prompts(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """The rows of frames, in ascending order of prompts, in frames that hold every prompt whole; at least one frame."""
    held = pd.DataFrame({column.name: np.zeros(0, column.dtype) for column in TOKENS.columns})
    for frame in filter(len, frames):
        ids_N = held["prompt_id"].to_numpy()
        first = int(np.searchsorted(ids_N, frame["prompt_id"].to_numpy()[0]))  # of the prompt that goes on
        if first:
            yield held.iloc[:first]
        held = frame if first == len(held) else pd.concat([held.iloc[first:], frame], ignore_index=True)
    yield held


AnyTokens = pd.DataFrame | Tokens
"""A token frame, or its view where several statistics share it."""
Source = pd.DataFrame | TokenSource
"""Tokens in memory, or read part by part."""


def source_of(tokens: Source) -> TokenSource:
    """The view of a frame; a source is its own."""
    return Tokens(tokens) if isinstance(tokens, pd.DataFrame) else tokens


def token_columns(
    block: PairBlock, seen: ExpertComparison | None, mass: MisroutedMass | None = None
) -> dict[str, NDArray[Any]]:
    """Columns of frame ``tokens`` for one block, in their final dtypes.

    Args:
        block: aligned response tokens.
        seen: its expert comparison; None = dense, or no expert ids.
        mass: its misrouted mass, where it is at hand already.
    """
    n_flipped_T, first_T = _flipped_layers(len(block), seen)
    mass_T = np.full(len(block), np.nan, np.float32)
    if seen is not None:
        mass_T = (mass or misrouted_mass(block, seen)).by_token(seen)
    columns = {
        "seq_id": block.seq_id_T,
        "prompt_id": block.prompt_id_T,
        "sample_index": block.sample_index_T,
        "position": block.position_T,
        "token_id": block.token_id_T,
        "logp_train": block.logp_train_T,
        "logp_infer": block.logp_infer_T,
        "entropy_train": block.entropy_train_T,
        "entropy_infer": block.entropy_infer_T,
        "n_flipped_layers": n_flipped_T,
        "first_flipped_layer": first_T,
        "misrouted_mass": mass_T,
    }
    return {column.name: np.asarray(columns[column.name], column.dtype) for column in TOKENS.columns}


def _flipped_layers(n_tokens: int, seen: ExpertComparison | None) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """(number of flipped layers, first of them) per token; -1 for rows not routed in every layer."""
    absent_T = np.full(n_tokens, NOT_COMPARED, dtype=np.int16)
    if seen is None or not seen.shape[1]:
        return absent_T, absent_T
    # a row known in some layers only would count too few flips: it belongs to neither group
    complete_T, n_flipped_T = seen.is_complete_T, seen.n_flipped_T
    n_known_T = np.where(complete_T, n_flipped_T, NOT_COMPARED).astype(np.int16)
    first_T = np.where(complete_T & (n_flipped_T > 0), seen.first_flip_T, NOT_COMPARED).astype(np.int16)
    return n_known_T, first_T
