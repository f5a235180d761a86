"""A pair analysed: every frame of it, in one pass over its blocks.

Invariants:
    - the blocks of a pair are read exactly once, the two arms' experts compared once per block, and nothing of the
      routing arrays survives it; a token keeps :data:`~moediag.analysis.tokens.BYTES_PER_TOKEN` bytes, everything else
      is counts whose size depends on layers, experts, prompts and the longest response only;
    - ``merge(parts)`` equals the whole: integers exactly, gate mass and Jaccard sums to float64 rounding. Parts may be
      made by other processes, in any order; blocks of a part are whole sequences;
    - arrays that an arm did not capture (None) leave out what needs them and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moediag.analysis.attribution import flip_excess, flip_shares
from moediag.analysis.expert_sets import compare_block
from moediag.analysis.flip_maps import FlipMap, SwapTotals, expert_swaps, flips_by_layer_position
from moediag.analysis.logprobs import entropy_quantiles, logp_metrics, ratio_quantiles, tail_curve
from moediag.analysis.margins import SPACES, MarginTotals, margin_curve, margin_noise, margin_quantiles
from moediag.analysis.positions import PositionSlope, drift_by_position, position_slope
from moediag.analysis.routing import RoutingRates, agreement_by_layer, flips_per_token, routing_rates
from moediag.analysis.routing_counts import RoutingTotals, misrouted_mass
from moediag.analysis.sequences import (
    LengthSlope,
    drift_by_length,
    first_divergence,
    length_slope,
    sequence_frame,
    worst_tokens,
)
from moediag.analysis.strata import metrics_by_stratum
from moediag.analysis.tokens import TokenParts, Tokens, TokenSource, concatenate_tokens, token_columns, whole_prompts
from moediag.corrections import masked_shares
from moediag.run.align import Pair, PairBlock
from moediag.run.capture import is_impossible


@dataclass
class RoutingPass:
    """Partial results of a pair's routing, grown block by block.

    Args:
        n_layers, n_experts, top_k: L, E and K; 0 for a dense model, whose blocks add nothing here.
        totals: agreement by prompt and layer.
        margins: choices and flips by margin, per score space.
        flips: flips by layer and position.
        swaps: experts exchanged, by layer.
    """

    n_layers: int
    n_experts: int
    top_k: int
    parts: list[RoutingTotals] = field(default_factory=list)
    margins: dict[str, MarginTotals] = field(default_factory=dict)
    flips: FlipMap | None = None
    swaps: SwapTotals | None = None

    def add(self, block: PairBlock) -> dict[str, NDArray[Any]]:
        """Count one block; returns its columns of the token frame."""
        seen = compare_block(block) if self.n_layers else None
        if seen is None:
            return token_columns(block, None)
        mass = misrouted_mass(block, seen)
        self.parts.append(RoutingTotals.of_block(block, seen, self.top_k, mass))
        if len(self.parts) > 64:  # merged now and then: shards are many, prompts are what should count
            self.parts = [RoutingTotals.merge(self.parts)]
        for space in SPACES:
            self.margins.setdefault(space, MarginTotals.empty(self.n_layers)).add_block(block, seen, space)
        self.flips = FlipMap.merge([self.flips or FlipMap.empty(self.n_layers), FlipMap.of_block(block, seen)])
        self.swaps = self.swaps or SwapTotals.empty(self.n_layers, self.n_experts)
        self.swaps.add_block(block, seen)
        return token_columns(block, seen, mass)

    @property
    def totals(self) -> RoutingTotals:
        """Agreement by prompt and layer of all blocks so far."""
        return RoutingTotals.merge([RoutingTotals.empty(self.n_layers, self.top_k), *self.parts])

    @property
    def known_margins(self) -> dict[str, MarginTotals]:
        """Margins by score space, of the spaces that an arm captured."""
        return {space: totals for space, totals in self.margins.items() if totals.side is not None}

    @staticmethod
    def merge(some: Iterable[RoutingPass]) -> RoutingPass:
        """All parts together (at least one), of the same model."""
        passes = list(some)
        margins = {}
        for space in SPACES:
            if totals := [one.margins[space] for one in passes if space in one.margins]:
                margins[space] = MarginTotals.merge(totals)
        flips = [one.flips for one in passes if one.flips is not None]
        swaps = [one.swaps for one in passes if one.swaps is not None]
        return RoutingPass(
            passes[0].n_layers,
            passes[0].n_experts,
            passes[0].top_k,
            [part for one in passes for part in one.parts],
            margins,
            FlipMap.merge(flips) if flips else None,
            SwapTotals.merge(swaps) if swaps else None,
        )


def read_pair(pair: Pair) -> tuple[pd.DataFrame, RoutingPass]:
    """The token frame and the routing counts of a pair, in one pass over its blocks.

    Args:
        pair: two aligned arms; also an engine against itself, which makes these the floor's numbers.

    Returns:
        Frame ``tokens`` and the routing counts; for a dense model the counts are empty.
    """
    routing = RoutingPass(pair.n_layers, pair.n_experts, pair.top_k)
    tokens = concatenate_tokens([routing.add(block) for block in pair.blocks()])
    return tokens, routing


@dataclass(frozen=True)
class PairPiece:
    """What some shards of a pair gave, small enough to be handed from process to process.

    Args:
        folder: holds their routing counts, and their rows of frame ``tokens``; not kept when the analysis is made.
        prompts: ids of the first and last prompt of each batch of rows.
        in_order: rows are in ascending order of prompts within each batch.
    """

    folder: Path
    prompts: tuple[int, ...]
    in_order: bool

    def routing(self) -> RoutingPass:
        """The routing counts."""
        with (self.folder / _ROUTING).open("rb") as file:
            counts: RoutingPass = pickle.load(file)  # written by this program a moment ago
        return counts

    def tokens(self) -> Iterator[pd.DataFrame]:
        """The rows, batch by batch; mapped: of a column that nobody looks at, nothing is read."""
        with pa.memory_map(str(self.folder / _TOKENS)) as source, pa.ipc.open_file(source) as file:
            for nth in range(file.num_record_batches):
                yield file.get_batch(nth).to_pandas(split_blocks=True)


_ROUTING: Final = "routing.pickle"
_TOKENS: Final = "tokens.arrow"
_BATCH_ROWS: Final = 1 << 18
"""Rows that are kept, and that statistics read, at a time, about, however large a piece is: a dozen columns of numbers
derived from them are held beside each other."""


def read_piece(pair: Pair, folder: Path) -> Generator[None, None, PairPiece]:
    """Read a pair, or the shards of it that ``pair`` is of, block by block; leaves what they gave in a folder."""
    routing = RoutingPass(pair.n_layers, pair.n_experts, pair.top_k)
    prompts: list[int] = []
    in_order = True
    waiting: list[dict[str, NDArray[Any]]] = []
    schema = pa.Schema.from_pandas(concatenate_tokens([]), preserve_index=False)
    with pa.ipc.new_file(str(folder / _TOKENS), schema) as file:

        def write() -> None:
            nonlocal in_order
            frame = concatenate_tokens(waiting)
            waiting.clear()
            ids_N = frame["prompt_id"].to_numpy()
            in_order &= bool((ids_N[1:] >= ids_N[:-1]).all())
            prompts.extend(ids_N[[0, -1]].tolist() if len(ids_N) else ())
            file.write_batch(pa.RecordBatch.from_pandas(frame, schema, preserve_index=False))

        for columns in map(routing.add, pair.blocks()):  # no block is held while others read the shard
            waiting.append(columns)
            if sum(len(one["prompt_id"]) for one in waiting) >= _BATCH_ROWS:
                write()
            yield
        write()
    with (folder / _ROUTING).open("wb") as routes:
        pickle.dump(routing, routes, pickle.HIGHEST_PROTOCOL)
    return PairPiece(folder, tuple(prompts), in_order)


def tokens_of(pieces: Sequence[PairPiece]) -> TokenSource:
    """The tokens of a pair from the pieces that all its shards gave, in their order.

    They are read part by part where there are several pieces and the prompts of a run follow each other; else they are
    read into memory together.
    """

    def read() -> Iterator[pd.DataFrame]:
        return (frame for piece in pieces for frame in piece.tokens())

    ids = [one for piece in pieces for one in piece.prompts]
    if len(pieces) > 1 and all(piece.in_order for piece in pieces) and ids == sorted(ids):
        return TokenParts(lambda: whole_prompts(read()))
    return Tokens(pd.concat(list(read()), ignore_index=True))


def routing_of(pair: Pair, pieces: Iterable[PairPiece]) -> RoutingPass:
    """The routing counts of a pair from all its pieces."""
    routing = RoutingPass(pair.n_layers, pair.n_experts, pair.top_k)
    for piece in pieces:
        routing = RoutingPass.merge([routing, piece.routing()])
    return routing


@dataclass(frozen=True)
class PairAnalysis:
    """Everything moediag says about a pair; routing parts are None for a dense model.

    Margin frames are None, too, where neither arm captured margins.

    Args:
        pair_name, minuend, subtrahend: as in :class:`~moediag.run.align.Pair`.
        n_sequences, n_prompts: with a token that both arms scored.
        n_tokens, n_unscored: response tokens scored by both arms, and not.
        n_impossible: of those not scored, tokens with an infinite log-probability (D31-impossible-logp).
        left_out: what could not be compared (``routing``) -> why.
        tokens: in memory, or to be read part by part.
    """

    pair_name: str
    minuend: str
    subtrahend: str
    n_sequences: int
    n_prompts: int
    n_tokens: int
    n_unscored: int
    n_impossible: int
    left_out: dict[str, str]
    tokens: TokenSource
    logp_metrics: pd.DataFrame
    tail_curve: pd.DataFrame
    ratio_quantiles: pd.DataFrame
    metrics_by_stratum: pd.DataFrame
    entropy_quantiles: pd.DataFrame
    drift_by_position: pd.DataFrame
    position_slope: PositionSlope
    sequences: pd.DataFrame
    worst_tokens: pd.DataFrame
    drift_by_length: pd.DataFrame
    length_slope: LengthSlope
    corrections: pd.DataFrame
    routing_rates: RoutingRates | None = None
    agreement_by_layer: pd.DataFrame | None = None
    flips_per_token: pd.DataFrame | None = None
    flips_by_layer_position: pd.DataFrame | None = None
    expert_swaps: pd.DataFrame | None = None
    first_divergence: pd.DataFrame | None = None
    flip_excess: pd.DataFrame | None = None
    flip_shares: pd.DataFrame | None = None
    margin_curve: pd.DataFrame | None = None
    margin_quantiles: pd.DataFrame | None = None
    margin_noise: pd.DataFrame | None = None

    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames present, by declared name; ``tokens`` only where they are in memory."""
        tokens = {"tokens": self.tokens.frame} if isinstance(self.tokens, Tokens) else {}
        return tokens | {name: value for name, value in vars(self).items() if isinstance(value, pd.DataFrame)}


def analyze_pair(pair: Pair) -> PairAnalysis:
    """Run every analysis of a pair in one pass over its blocks.

    Args:
        pair: two aligned arms of one run.

    Returns:
        Declared frames and scalars; a pair without tokens gives NaN values with n = 0.
    """
    frame, routing = read_pair(pair)
    return analyze_tokens(pair, Tokens(frame), routing)


def analyze_tokens(pair: Pair, tokens: TokenSource, routing: RoutingPass) -> PairAnalysis:
    """:func:`analyze_pair` of a pair whose blocks were read before.

    Args:
        pair: two aligned arms; no block is read.
        tokens, routing: all that its blocks gave.
    """
    sections = (section(pair, tokens, lambda: routing) for section in SECTIONS)
    return joined_sections(pair, tokens, sections)


def joined_sections(pair: Pair, tokens: TokenSource, sections: Iterable[Section]) -> PairAnalysis:
    """The analysis of a pair from what each of :data:`SECTIONS` gave."""
    found = {name: value for section in sections for name, value in section.items()}
    return PairAnalysis(pair.name, pair.minuend, pair.subtrahend, left_out=pair.left_out, tokens=tokens, **found)


Section = dict[str, Any]
"""Some fields of :class:`PairAnalysis`."""


def _differences(pair: Pair, tokens: TokenSource, routing: Callable[[], RoutingPass]) -> Section:
    sequences = sequence_frame(tokens, pair.n_layers)
    return {
        "n_sequences": tokens.n_sequences,
        "n_prompts": tokens.n_prompts,
        "n_tokens": len(tokens),
        "n_unscored": tokens.total(lambda part: len(part.frame)) - len(tokens),
        "n_impossible": tokens.total(lambda part: int(is_impossible(*part.logps_N).sum())),
        "logp_metrics": logp_metrics(tokens),
        "tail_curve": tail_curve(tokens),
        "ratio_quantiles": ratio_quantiles(tokens),
        "entropy_quantiles": entropy_quantiles(tokens),
        "drift_by_position": drift_by_position(tokens, pair.n_layers),
        "position_slope": position_slope(tokens),
        "sequences": sequences,
        "worst_tokens": worst_tokens(tokens),
        "drift_by_length": drift_by_length(sequences),
        "length_slope": length_slope(sequences),
        "corrections": masked_shares(tokens),
        "first_divergence": first_divergence(sequences) if pair.is_routed else None,
    }


def _strata(pair: Pair, tokens: TokenSource, routing: Callable[[], RoutingPass]) -> Section:
    return {"metrics_by_stratum": metrics_by_stratum(tokens, pair.n_layers)}


def _routing(pair: Pair, tokens: TokenSource, routing: Callable[[], RoutingPass]) -> Section:
    if not pair.is_routed:
        return {}
    counts, layers = routing(), pair.decoder_layer_L
    totals = counts.totals
    swaps = counts.swaps or SwapTotals.empty(pair.n_layers, pair.n_experts)
    found: Section = {
        "routing_rates": routing_rates(totals),
        "agreement_by_layer": agreement_by_layer(totals, layers),
        "flips_per_token": flips_per_token(tokens, totals),
        "flips_by_layer_position": flips_by_layer_position(counts.flips or FlipMap.empty(pair.n_layers), layers),
        "expert_swaps": expert_swaps(swaps, layers),
        "flip_excess": flip_excess(tokens),
        "flip_shares": flip_shares(tokens),
    }
    if margins := counts.known_margins:
        found["margin_curve"] = margin_curve(margins)
        found["margin_quantiles"] = margin_quantiles(margins)
        found["margin_noise"] = margin_noise(margins)
    return found


SECTIONS: Final[tuple[Callable[[Pair, TokenSource, Callable[[], RoutingPass]], Section], ...]] = (
    _strata,
    _differences,
    _routing,
)
"""What an analysis consists of: parts of about the same work that know nothing of each other, the longest first."""
