"""IcePop bands swept: what every (alpha, beta) of a grid would mask and leave, from one pass over the tokens.

Invariants:
    - a band's bounds are closed, exactly as in :func:`~moediag.corrections.methods.icepop`;
    - every token is put once between the sorted bounds of all bands; a band's sums are differences of prefix sums over
      these intervals, by cluster of prompts. The bounds are sorted, not the tokens: 40 bounds tell 400 bands apart, and
      the tokens are read chunk by chunk;
    - prefix sums run from small ratios to large ones, so the heavy tail above beta never enters a band's difference;
      means and variances of weights join the intervals of a band instead, because weights may be of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.corrections.batch import CHUNK_TOKENS, Batch
from moediag.corrections.declarations import SWEEP_BY_BAND
from moediag.corrections.methods import log_bound
from moediag.corrections.moments import Moments
from moediag.corrections.sums import MAX_CLUSTERS
from moediag.corrections.terms import on_bounds
from moediag.errors import MoediagError
from moediag.statistics.intervals import divide, ratio_mean_interval

Float64 = NDArray[np.float64]
OnProgress = Callable[[int, int, str], None]

DEFAULT_ALPHAS: Final = (
    0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99,
)  # fmt: skip
DEFAULT_BETAS: Final = (
    1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 100.0, math.inf,
)  # fmt: skip
"""400 bands, the presets' among them; 0 and infinity leave a side open (truncation's side without truncation)."""

_N_INTERVALS: Final = 24
"""Bands with an interval of their k3: each costs a bootstrap."""


@dataclass(frozen=True)
class _Cut:
    """Sums by cluster and interval between cuts of tokens and k3, and moments of the ratios by interval."""

    cuts: Float64
    n_CB: Float64
    k3_CB: Float64
    ratios: Moments


def sweep_by_band(
    batch: Batch,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    betas: Sequence[float] = DEFAULT_BETAS,
    on_progress: OnProgress | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> pd.DataFrame:
    """What IcePop would mask and leave, for every band [alpha, beta] with alpha <= beta.

    Args:
        batch: response tokens of whole sequences.
        alphas, betas: bounds of ratio; 0 and infinity leave a side open.
        on_progress: called after every chunk.
        chunk_tokens: tokens at once.

    Returns:
        Frame ``sweep_by_band``, ascending by alpha and beta. Intervals of the masked share everywhere, of k3 for two
        dozen bands spread over the frontier. Small masked share and small k3 pull against each other; the frontier
        holds the bands for which neither can be had cheaper.

    Raises:
        MoediagError: no band, or a bound that is negative or no number.

    Source: ours; Ring-1T for sweeping the band.
    """
    bands = _bands(alphas, betas)
    low_M = np.array([log_bound(alpha) for alpha, _ in bands])
    above_M = np.nextafter(np.array([log_bound(beta) for _, beta in bands]), np.inf)  # first log-ratio beyond the band
    bounds = np.unique([log_bound(bound) for band in bands for bound in band])
    cut = _cut_tokens(batch, np.unique(np.r_[low_M, above_M]), bounds, on_progress, chunk_tokens)
    inside = _inside_sums(cut, low_M, above_M)
    frame = _frame(bands, cut, inside, low_M, above_M)
    frame["n_prompts"] = batch.n_scored_prompts
    _add_k3_intervals(frame, inside)
    return SWEEP_BY_BAND.validate(frame)


def frontier(cost: Float64, gain: Float64) -> NDArray[np.bool_]:
    """Which of M points no other point dominates: none costs no more and leaves no more, one of them less.

    Args:
        cost, gain: both better when lower; NaN is dominated.

    Example:
        >>> frontier(np.array([0.1, 0.2, 0.2, 0.3]), np.array([5.0, 4.0, 4.5, 4.0])).tolist()
        [True, True, False, False]
    """
    is_on = np.zeros(len(cost), dtype=bool)
    least = np.inf
    order = np.lexsort((gain, cost))
    previous: tuple[float, float] | None = None
    for i in order.tolist():
        point = (float(cost[i]), float(gain[i]))
        if point == previous or gain[i] < least:
            is_on[i] = True
            least, previous = min(least, point[1]), point
    return is_on


def _bands(alphas: Sequence[float], betas: Sequence[float]) -> list[tuple[float, float]]:
    bounds = [*alphas, *betas]
    if not all(bound >= 0 for bound in bounds):  # NaN, too
        raise MoediagError(f"a sweep wants bounds of ratio of at least 0, found {[b for b in bounds if not b >= 0]}")
    bands = [(float(a), float(b)) for a in sorted(set(alphas)) for b in sorted(set(betas)) if a <= b and b > 0]
    if not bands:
        raise MoediagError(f"a sweep wants alpha <= beta, found alphas {list(alphas)} and betas {list(betas)}")
    return bands


def _cut_tokens(
    batch: Batch, cuts: Float64, bounds: Float64, on_progress: OnProgress | None, chunk_tokens: int
) -> _Cut:
    """Put every token between two cuts; interval b holds cuts[b - 1] <= log-ratio < cuts[b]."""
    n_clusters = min(int(batch.prompt_row_S.max(initial=0)) + 1, MAX_CLUSTERS)
    shape = n_clusters, len(cuts) + 1
    n_CB, k3_CB = np.zeros(shape), np.zeros(shape)
    ratios, done = Moments.none(shape[1]), 0
    for part in batch.chunks(chunk_tokens):
        x, _ = part.scored()
        between_T = np.searchsorted(cuts, on_bounds(x.diff_T, bounds, x.is_float32_T), side="right")
        cell_T = between_T + (part.prompt_row_S % n_clusters * shape[1])[x.row_T]
        n_CB += np.bincount(cell_T, minlength=n_CB.size).reshape(shape)
        k3_CB += np.bincount(cell_T, weights=x.k3_T, minlength=k3_CB.size).reshape(shape)
        ratios += Moments.of(x.ratio_T, between_T, shape[1])
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(batch), "tokens")
    return _Cut(cuts, n_CB, k3_CB, ratios)


def _inside_sums(cut: _Cut, low_M: Float64, above_M: Float64) -> dict[str, Float64]:
    """(C, M) sums inside every band."""
    first_M = np.searchsorted(cut.cuts, low_M) + 1
    last_M = np.searchsorted(cut.cuts, above_M) + 1
    inside = {}
    for name, sums_CB in (("n", cut.n_CB), ("k3", cut.k3_CB)):
        prefix_CB = np.concatenate([np.zeros((len(sums_CB), 1)), np.cumsum(sums_CB, axis=1)], axis=1)
        inside[name] = prefix_CB[:, last_M] - prefix_CB[:, first_M]
    # an empty band's difference of prefix sums is rounding error, not a sum
    inside["k3"] = np.where(inside["n"] > 0, np.maximum(inside["k3"], 0.0), 0.0)
    return inside


def _frame(
    bands: list[tuple[float, float]], cut: _Cut, inside: dict[str, Float64], low_M: Float64, above_M: Float64
) -> pd.DataFrame:
    n_C = cut.n_CB.sum(axis=1)
    n = float(n_C.sum())
    n_kept_M = inside["n"].sum(axis=0)
    n_masked_CM = n_C[:, None] - inside["n"]
    masked = ratio_mean_interval(n_masked_CM, np.broadcast_to(n_C[:, None], n_masked_CM.shape), "rate")
    prefix_B = np.concatenate([[0.0], np.cumsum(cut.n_CB.sum(axis=0))])
    below_M = prefix_B[np.searchsorted(cut.cuts, low_M) + 1]
    above_n_M = n - prefix_B[np.searchsorted(cut.cuts, above_M) + 1]
    weights = _weights(cut, low_M, above_M)
    kept_k3_M = divide(inside["k3"].sum(axis=0), n_kept_M)
    columns: dict[str, Any] = {
        "alpha": [alpha for alpha, _ in bands],
        "beta": [beta for _, beta in bands],
        "n_tokens": int(n),
        "masked_share": masked.value_M,
        "masked_share_ci_low": masked.low_M,
        "masked_share_ci_high": masked.high_M,
        "n_masked_prompts": (n_masked_CM > 0).sum(axis=0),
        "below_share": divide(below_M, np.full(len(bands), n)),
        "above_share": divide(above_n_M, np.full(len(bands), n)),
        "kept_k3": kept_k3_M,
        "weight_mean": np.where(weights.n_G > 0, weights.mean_G, np.nan),
        "weight_variance": weights.variance_G,
        "ess_token": weights.effective_share_G,
        "is_on_k3_frontier": frontier(masked.value_M, kept_k3_M),
        "is_on_variance_frontier": frontier(masked.value_M, weights.variance_G),
    }
    return pd.DataFrame(columns)


def _weights(cut: _Cut, low_M: Float64, above_M: Float64) -> Moments:
    """Moments of every band's weights: the ratios of the intervals inside it, and 0 for all other tokens."""
    between_B = np.arange(len(cut.cuts) + 1)
    first_M, last_M = (np.searchsorted(cut.cuts, bound_M) for bound_M in (low_M, above_M))
    inside = cut.ratios.joined((between_B > first_M[:, None]) & (between_B <= last_M[:, None]))
    masked_M = cut.ratios.n_G.sum() - inside.n_G
    return inside + Moments(masked_M, np.zeros_like(masked_M), np.zeros_like(masked_M))


def _add_k3_intervals(frame: pd.DataFrame, inside: dict[str, Float64]) -> None:
    """Intervals of the remaining k3 for bands spread over the k3 frontier; bands with the same tokens share one."""
    is_on = frame["is_on_k3_frontier"]
    point = frame["below_share"].astype(str) + " " + frame["above_share"].astype(str)
    ranked = point[frame[is_on].sort_values("masked_share", kind="stable").index].drop_duplicates().index.to_numpy()
    frame["kept_k3_ci_low"] = frame["kept_k3_ci_high"] = np.nan
    if len(ranked):
        some = ranked[np.unique(np.linspace(0, len(ranked) - 1, _N_INTERVALS).round().astype(np.intp))]
        found = ratio_mean_interval(inside["k3"][:, some], inside["n"][:, some], "positive")
        for end, bound_M in (("low", found.low_M), ("high", found.high_M)):
            by_point = dict(zip(point[some], bound_M, strict=True))
            frame[f"kept_k3_ci_{end}"] = point.map(by_point).where(is_on)
