"""Margins against flips: exact counts by margin in one pass, and the frames made from them.

Invariants:
    - margins are one arm's, ``side``: infer's where infer has them, else train's (a native observer gives ids alone);
      every frame says which;
    - a margin is known by its key: a float32's sign, exponent and top 11 mantissa bits. Bin edges are values where
      keys begin, so a bin is an exact function of the key and one table look-up replaces a search; quantiles are the
      order statistic of rank ceil(q n) to a relative error of 2^-12;
    - exact ties (0) are a bin of their own, and so are negative logit margins (a bias or group rule overruled them);
    - without margins on either side there is no row, never a row of zeros;
    - 8 MB per group of counts by key, however many choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, special

from moediag.analysis.declarations import MARGIN_CURVE, MARGIN_NOISE, MARGIN_QUANTILES
from moediag.analysis.expert_sets import ExpertComparison
from moediag.analysis.totals import Totals, counted, merged_by_prompt
from moediag.notation import POOLED
from moediag.run.align import PairBlock
from moediag.statistics.intervals import ratio_mean_interval

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Side = Literal["infer", "train"]

MIN_CHOICES: Final = 20
"""A rate of choices is drawn and printed from that many on; one choice would be 0 or 100 %."""
SPACES: Final = ("choice", "logit")
_KEY_SHIFT: Final = 12  # 32 - 12 = 20 bits: sign, 8 exponent, 11 mantissa
N_KEYS: Final = 1 << (32 - _KEY_SHIFT)
_ZERO_KEY: Final = 1 << (31 - _KEY_SHIFT)
_CHOICES_PER_CHUNK: Final = 1 << 18
_QUANTILES: Final = {"p01": 0.01, "p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99}
_NO_SIDE: Final = "none"


def _key_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values rounded up to where a key begins: to a relative 2^-11 at most."""
    bits = values.astype(np.float32).view(np.uint32)
    step = np.uint32(1 << _KEY_SHIFT)
    return np.asarray(((bits + step - 1) // step * step).astype(np.uint32).view(np.float32), dtype=np.float64)


_EDGES: Final = _key_edges(10.0 ** (np.arange(-24, 9) / 4))  # 1e-6 .. 100, four bins per decade
BIN_LOW: Final = np.r_[-np.inf, 0.0, 0.0, _EDGES]
BIN_HIGH: Final = np.r_[0.0, 0.0, _EDGES, np.inf]
TIE_BIN: Final = 1
N_BINS: Final = len(BIN_LOW)


@dataclass
class MarginTotals(Totals):
    """Counts of choices and flips by margin, in one score space.

    Args:
        side: whose margins; None until a block had some.
        prompt_id_C: the prompts seen, ascending.
        n_CB, flips_CB: choices, and those that flipped, by prompt and margin bin.
        n_LB, flips_LB: the same by MoE layer and margin bin.
        n_Q, flips_Q: the same by key, for quantiles.
    """

    side: Side | None
    prompt_id_C: Int64
    n_CB: Int64
    flips_CB: Int64
    n_LB: Int64
    flips_LB: Int64
    n_Q: Int64
    flips_Q: Int64

    @staticmethod
    def empty(n_layers: int) -> MarginTotals:
        """Totals of nothing."""
        shapes = (0, N_BINS), (0, N_BINS), (n_layers, N_BINS), (n_layers, N_BINS), N_KEYS, N_KEYS
        return MarginTotals(None, np.zeros(0, np.int64), *(np.zeros(shape, np.int64) for shape in shapes))

    def add_block(self, block: PairBlock, seen: ExpertComparison, space: str) -> None:
        """Count one block, in place, given its expert comparison; without this side's margins it adds nothing."""
        side = self.side or margin_side(block, space)
        margin_TL = None if side is None else margins_of(block, space, side)
        if margin_TL is None or not len(block):
            return
        self.side = side
        prompts, row_T = np.unique(block.prompt_id_T, return_inverse=True)
        shape = len(prompts), seen.shape[1], N_BINS
        n_CLB, flips_CLB = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for index_N, first_N, is_flips in _choices(seen, row_T.astype(np.int64)):
            key_N, kept_N = _keys(margin_TL.reshape(-1)[index_N])
            cell_N = (first_N if kept_N is None else first_N[kept_N]) + _bin_of_key()[key_N]
            count_CLB, count_Q = (flips_CLB, self.flips_Q) if is_flips else (n_CLB, self.n_Q)
            count_CLB += counted(shape, cell_N)
            _add_keys(count_Q, key_N)
        self.n_LB += n_CLB.sum(axis=0)
        self.flips_LB += flips_CLB.sum(axis=0)
        self.prompt_id_C, (self.n_CB, self.flips_CB) = merged_by_prompt(
            [self.prompt_id_C, prompts.astype(np.int64)],
            [(self.n_CB, n_CLB.sum(axis=1)), (self.flips_CB, flips_CLB.sum(axis=1))],
        )


def margin_side(block: PairBlock, space: str) -> Side | None:
    """Whose margins to use: infer's, else train's, else nobody's."""
    sides: tuple[Side, ...] = ("infer", "train")
    return next((side for side in sides if margins_of(block, space, side) is not None), None)


def margins_of(block: PairBlock, space: str, side: Side) -> Float32 | None:
    """The margins of one side in one score space, if captured."""
    margin_TL: Float32 | None = getattr(block, f"{'margin' if space == 'choice' else 'logit_margin'}_{side}_TL")
    return margin_TL


def key_value(key: int) -> float:
    """The middle of a key's interval; the key of 0 (and of subnormals near it) gives 0."""
    if key in (_ZERO_KEY, _ZERO_KEY - 1):
        return 0.0
    ordered = (key << _KEY_SHIFT) | (1 << (_KEY_SHIFT - 1))
    bits = ordered ^ (1 << 31) if ordered >> 31 else ~ordered & 0xFFFFFFFF
    value = float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
    if np.isnan(value):  # no NaN is ever counted: an exponent of all ones is an infinite margin (K = E)
        return float("inf") if ordered >> 31 else float("-inf")
    return value


def _choices(seen: ExpertComparison, row_T: Int64) -> Iterator[tuple[Any, Int64, bool]]:
    """(flat choices, first bin of the prompt and layer of each, whether they are the flips or all), chunk by chunk.

    Chunks of all choices are slices where everything was compared: no index is made for what needs none.
    """
    n_tokens, n_layers = seen.shape
    step = max(1, _CHOICES_PER_CHUNK // max(1, n_layers))
    layer_L = np.arange(n_layers) * N_BINS
    for first in range(0, n_tokens, step):
        rows = slice(first, min(first + step, n_tokens))
        first_bin_N = (row_T[rows, None] * (n_layers * N_BINS) + layer_L).reshape(-1)
        if seen.is_all_compared:
            yield slice(rows.start * n_layers, rows.stop * n_layers), first_bin_N, False
        else:
            kept = np.flatnonzero(seen.is_compared_TL[rows])
            yield kept + rows.start * n_layers, first_bin_N[kept], False
    for first in range(0, len(seen.flip_N), _CHOICES_PER_CHUNK):
        flip_N = seen.flip_N[first : first + _CHOICES_PER_CHUNK]
        yield flip_N, (row_T[flip_N // n_layers] * n_layers + flip_N % n_layers) * N_BINS, True


def _keys(margin_N: Float32) -> tuple[NDArray[np.uint32], NDArray[np.bool_] | None]:
    """Order-preserving integer keys of float32 margins without their 12 lowest mantissa bits; NaN is left out.

    Returns:
        Keys, and which margins they are of; None = all.
    """
    kept_N = None
    lowest = margin_N.min(initial=np.inf)
    if np.isnan(lowest):
        kept_N = ~np.isnan(margin_N)
        margin_N = margin_N[kept_N]
        lowest = margin_N.min(initial=np.inf)
    bits_N = (margin_N + np.float32(0)).view(np.uint32)  # -0.0 is a tie like any other
    if lowest >= 0:
        ordered_N = bits_N | np.uint32(1 << 31)
    else:
        ordered_N = np.where(bits_N >> 31, ~bits_N, bits_N | np.uint32(1 << 31))
    return ordered_N >> np.uint32(_KEY_SHIFT), kept_N


@cache
def _bin_of_key() -> NDArray[np.int8]:
    """Margin bin of every key: 0 negative, 1 exact tie, 2.. positive by edges."""
    keys = np.arange(N_KEYS, dtype=np.int64)
    bits = (keys << _KEY_SHIFT).astype(np.uint32) & np.uint32(0x7FFFFFFF)
    with np.errstate(invalid="ignore"):  # keys beyond infinity are NaN patterns, which no margin has
        lowest = bits.view(np.float32).astype(np.float64)
        bin_Q = np.searchsorted(_EDGES, lowest, side="right") + 2
    bin_Q[keys < _ZERO_KEY] = 0
    # positive subnormals share the key of 0: below 2^-126 a float32 margin is 0 for every purpose
    bin_Q[_ZERO_KEY] = TIE_BIN
    return bin_Q.astype(np.int8)  # a megabyte: it stays in cache


def _add_keys(count_Q: Int64, key_N: NDArray[np.uint32]) -> None:
    """Count keys in place, over the range that they span: a few tens of thousands of the million."""
    if len(key_N):
        lowest, highest = int(key_N.min()), int(key_N.max())
        count_Q[lowest : highest + 1] += np.bincount(key_N - np.uint32(lowest), minlength=highest - lowest + 1)


def margin_curve(totals: dict[str, MarginTotals]) -> pd.DataFrame:
    """P(flip | margin), pooled over layers (with an interval) and per layer; empty bins are left out.

    Args:
        totals: counts by score space.

    Returns:
        Frame ``margin_curve``; a healthy pair flips near ties only, so the curve falls to 0 with the margin.

    Source: TRM: a flip needs a margin below the perturbation; the binning is ours.
    """
    parts = []
    for space, total in totals.items():
        interval = ratio_mean_interval(total.flips_CB, total.n_CB, "rate")
        pooled = _curve_rows(space, POOLED, total, total.n_CB.sum(axis=0), total.flips_CB.sum(axis=0))
        pooled["flip_rate_ci_low"], pooled["flip_rate_ci_high"] = interval.low_M, interval.high_M
        parts.append(pooled)
        parts.extend(
            _curve_rows(space, layer, total, n_B, flips_B)
            for layer, (n_B, flips_B) in enumerate(zip(total.n_LB, total.flips_LB, strict=True))
        )
    names = [column.name for column in MARGIN_CURVE.columns]
    rows = {name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0) for name in names}
    frame = pd.DataFrame(rows)
    return MARGIN_CURVE.validate(frame[frame["n_choices"] > 0])


def margin_quantiles(totals: dict[str, MarginTotals]) -> pd.DataFrame:
    """Quantiles of the margin for all, flipped and kept choices, and how many are exact ties.

    Args:
        totals: counts by score space.

    Returns:
        Frame ``margin_quantiles``: order statistics to a relative 2^-12; a small margin means an easy flip.

    Source: ours; ties counted apart because bf16 router logits make many (rule D16-exact-ties).
    """
    records = []
    for space, total in totals.items():
        kept_Q, kept_B = total.n_Q - total.flips_Q, (total.n_LB - total.flips_LB).sum(axis=0)
        groups = {
            "all": (total.n_Q, total.n_LB.sum(axis=0)),
            "flipped": (total.flips_Q, total.flips_LB.sum(axis=0)),
            "kept": (kept_Q, kept_B),
        }
        for group, (count_Q, count_B) in groups.items():
            record: dict[str, Any] = {"space": space, "group": group, "side": total.side or _NO_SIDE}
            record |= {"n_choices": int(count_B.sum()), "n_exact_ties": int(count_B[TIE_BIN])}
            records.append({**record, **_key_quantiles(count_Q)})
    names = [column.name for column in MARGIN_QUANTILES.columns]
    return MARGIN_QUANTILES.validate(pd.DataFrame.from_records(records, columns=names))


def margin_noise(totals: dict[str, MarginTotals]) -> pd.DataFrame:
    """The noise of the choice-score difference that would make as many flips at these margins, per layer.

    Maximum likelihood of P(flip | m) = Phi(-m / sigma), one sigma per layer, from the binned counts: what a
    single Gaussian on the border pair would need. Real noise is a scale mixture (tokens differ), so this is a
    summary of the curve and no forecast; pairs beyond the border are not modelled.

    Args:
        totals: counts by score space.

    Returns:
        Frame ``margin_noise``: sigma in the unit of the margin, lower is better; NaN without a flip.

    Source: ours, from TRM's argument that a flip needs a margin below the perturbation.
    """
    records = []
    for space, total in totals.items():
        rows = [(POOLED, total.n_LB.sum(axis=0), total.flips_LB.sum(axis=0))]
        rows += [(layer, n_B, f_B) for layer, (n_B, f_B) in enumerate(zip(total.n_LB, total.flips_LB, strict=True))]
        for layer, n_B, flips_B in rows:
            record = {"space": space, "layer": layer, "side": total.side or _NO_SIDE, "n_choices": int(n_B.sum())}
            record |= {"n_flipped": int(flips_B.sum()), "n_exact_ties": int(n_B[TIE_BIN])}
            records.append({**record, "sigma": _implied_sigma(n_B, flips_B)})
    names = [column.name for column in MARGIN_NOISE.columns]
    frame = pd.DataFrame.from_records(records, columns=names)
    return MARGIN_NOISE.validate(frame[frame["n_choices"] > 0])


def _implied_sigma(n_B: Int64, flips_B: Int64) -> float:
    """Maximum-likelihood sigma over bins of positive margin; NaN without a flip or without a choice that held."""
    inner = slice(TIE_BIN + 1, N_BINS - 1)  # neither ties nor the two open ends have a margin to divide by
    margin_B = np.sqrt(np.maximum(BIN_LOW[inner], BIN_HIGH[inner] / 10) * BIN_HIGH[inner])
    n, flips = n_B[inner].astype(np.float64), flips_B[inner].astype(np.float64)
    if not flips.sum() or flips.sum() == n.sum():
        return float("nan")

    def loss(log_sigma: float) -> float:
        z_B = margin_B / np.exp(log_sigma)
        return float(-(flips * special.log_ndtr(-z_B) + (n - flips) * special.log_ndtr(z_B)).sum())

    found = optimize.minimize_scalar(loss, bounds=(np.log(1e-8), np.log(1e3)), method="bounded")
    return float(np.exp(found.x))


def _key_quantiles(count_Q: Int64) -> dict[str, float]:
    present = np.flatnonzero(count_Q)  # a few thousand of a million keys
    if not len(present):
        return dict.fromkeys(_QUANTILES, float("nan"))
    cumulative = np.cumsum(count_Q[present])
    n_choices = int(cumulative[-1])
    ranks = [max(1, int(np.ceil(q * n_choices))) for q in _QUANTILES.values()]
    keys = present[np.searchsorted(cumulative, ranks, side="left")]
    return {name: key_value(int(key)) for name, key in zip(_QUANTILES, keys, strict=True)}


def _curve_rows(space: str, layer: int, total: MarginTotals, n_B: Int64, flips_B: Int64) -> dict[str, NDArray[Any]]:
    """Columns of the curve for one space and layer, every bin, bounds NaN."""
    return {
        "space": np.full(N_BINS, space),
        "layer": np.full(N_BINS, layer),
        "side": np.full(N_BINS, total.side or _NO_SIDE),
        "bin_low": BIN_LOW,
        "bin_high": BIN_HIGH,
        "n_choices": n_B,
        "n_flipped": flips_B,
        "flip_rate": flips_B / np.where(n_B == 0, np.nan, n_B),
        "flip_rate_ci_low": np.full(N_BINS, np.nan),
        "flip_rate_ci_high": np.full(N_BINS, np.nan),
    }
