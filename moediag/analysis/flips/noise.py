"""How much the scores of one token move between two arms: counts of noise scales, by fold, layer and upstream risk.

Invariants:
    - a scale never shows the *sign* of a token's noise, and predictions of a fold of prompts read only the counts of
      the other folds: no choice helps to predict itself;
    - what a scale is conditioned on (the *stratum*) is known from one arm alone: the smallest gap of the layers above,
      since a near tie upstream may flip, and a flip there makes the noise below ten times larger;
    - :class:`NoiseCounts` holds sums only: ``merge(parts)`` equals the whole, memory does not grow with tokens;
    - exact zeros are counted apart: an arm that repeats itself bit for bit has no noise, not a tiny one.

Two ways to measure, by what a capture kept:

``logits``   scale = rms over experts of the (centred) logit difference of a token: E numbers behind each scale. The
             *profile* says how much louder than that the noise is at a given size of logit (bf16 rounds large numbers
             more coarsely), so that the border pair gets its own sigma and not that of the extremes.
``margins``  scale = abs(change of the signed margin), minus where the set flipped: one number, the border pair's own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moediag.analysis.choice_scores import RoutingRule, border_gap, compared_scores
from moediag.analysis.expert_sets import compare_block
from moediag.analysis.flips.calibration import PredictionTotals
from moediag.analysis.margins import Side
from moediag.analysis.totals import Totals, counted
from moediag.run.align import Pair, PairBlock
from moediag.statistics.intervals import divide

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Measure = Literal["logits", "margins"]
Method = Literal["all_pairs", "border_pair", "simulated", "margin_change"]

MEASURE_OF: Final[dict[Method, Measure]] = {
    "all_pairs": "logits",
    "border_pair": "logits",
    "simulated": "logits",
    "margin_change": "margins",
}
"""What each method reads the noise from."""

N_FOLDS: Final = 8
"""Prompts go to folds by ``prompt_id % 8``: the same fold in every block, shard and arm of a run."""
CELLS_PER_OCTAVE: Final = 12
_LOWEST, _HIGHEST = -40, 12  # log2 of the scales that have cells of their own
N_CELLS: Final = (_HIGHEST - _LOWEST) * CELLS_PER_OCTAVE
CELL_SCALE: Final = 2.0 ** (_LOWEST + (np.arange(N_CELLS) + 0.5) / CELLS_PER_OCTAVE)
"""Scale in the middle of every cell."""
N_STRATA: Final = 8
_TOP_STRATUM: Final = 2.0
"""Upstream gaps of 4 and more share a stratum; below, a stratum spans two octaves."""
N_SIZES: Final = 14
_SMALLEST_SIZE: Final = -8
"""log2 of the logit size below which sizes share a bin of the profile."""
MIN_IN_STRATUM: Final = 200
"""With fewer scales than this a stratum says less than its layer does."""
_MIN_IN_SIZE: Final = 500
_QUANTILES: Final = {"sigma_p10": 0.1, "sigma_p50": 0.5, "sigma_p90": 0.9, "sigma_p99": 0.99}


@dataclass(frozen=True)
class BlockView:
    """One block as prediction sees it: what one side knew, and what then happened; NaN or False = left out.

    Args:
        gap_TL: the reference side's border gap in the rule's working space.
        logits_TLE, other_TLE: both sides' router logits, None where a side kept none.
        is_known_TL: compared, with a gap.
        is_flip_TL: the sets differ.
        change_TL: absolute change of the signed margin; NaN without the other side's margin.
    """

    prompt_id_T: Int64
    gap_TL: Float64
    logits_TLE: Any
    other_TLE: Any
    is_known_TL: Bool
    is_flip_TL: Bool
    change_TL: Float64

    @property
    def has_logits(self) -> bool:
        """Both sides kept their router logits."""
        return self.logits_TLE is not None and self.other_TLE is not None

    def every(self, stride: int) -> BlockView:
        """Every ``stride``-th token, all of its layers."""
        return replace(self, **{
            f.name: getattr(self, f.name)[::stride] for f in fields(self) if getattr(self, f.name) is not None
        })  # fmt: skip

    @property
    def fold_T(self) -> Int64:  # noqa: N802 - the legend suffix
        """Fold of every token's prompt."""
        return np.asarray(self.prompt_id_T % N_FOLDS, dtype=np.int64)

    @property
    def stratum_TL(self) -> Int64:  # noqa: N802 - the legend suffix
        """Upstream risk: bin of the smallest gap of the layers above; the first layer has the safest."""
        above_TL = np.full_like(self.gap_TL, np.inf)
        above_TL[:, 1:] = np.fmin.accumulate(np.where(np.isnan(self.gap_TL), np.inf, self.gap_TL), axis=1)[:, :-1]
        with np.errstate(divide="ignore"):
            octaves_TL = np.clip(np.floor((_TOP_STRATUM - np.log2(above_TL)) / 2), 0, N_STRATA - 1)
        return octaves_TL.astype(np.int64)

    def usable_rows(self, layer: int) -> Bool:
        """Rows of one layer that are compared and whose logits, of the sides that have any, are finite."""
        is_usable_T = self.is_known_TL[:, layer].copy()
        for logits_TLE in (self.logits_TLE, self.other_TLE):
            if logits_TLE is not None:
                is_usable_T &= np.isfinite(logits_TLE[:, layer]).all(axis=1)
        return is_usable_T


@dataclass
class NoiseCounts(Totals):
    """Counts of noise scales; F folds, L layers, R strata, H cells of the scale, Z sizes of logit.

    Args:
        n_FLRH: choices by cell of their scale.
        zero_FLR: choices whose scale is exactly 0.
        square_FLZ, n_FLZ: sum of squared noise over squared scale, and how many, by size of logit.
    """

    n_FLRH: Float64
    zero_FLR: Float64
    square_FLZ: Float64
    n_FLZ: Float64

    @staticmethod
    def empty(n_layers: int) -> NoiseCounts:
        """Counts of nothing."""
        shape = (N_FOLDS, n_layers)
        return NoiseCounts(
            np.zeros((*shape, N_STRATA, N_CELLS)),
            np.zeros((*shape, N_STRATA)),
            np.zeros((*shape, N_SIZES)),
            np.zeros((*shape, N_SIZES)),
        )

    def add_block(self, view: BlockView, rule: RoutingRule, measure: Measure) -> None:
        """Count one block, in place."""
        for layer in range(view.gap_TL.shape[1]):
            if measure == "logits":
                scale_T = self._add_profile(view, rule, layer)
            else:
                scale_T = np.where(view.is_known_TL[:, layer], view.change_TL[:, layer], np.nan)
            rows = np.flatnonzero(np.isfinite(scale_T))
            fold_N, stratum_N, cell_N = view.fold_T[rows], view.stratum_TL[rows, layer], cell_of(scale_T[rows])
            is_zero_N = scale_T[rows] == 0
            some = np.flatnonzero(~is_zero_N)
            self.zero_FLR[:, layer] += counted((N_FOLDS, N_STRATA), fold_N[is_zero_N], stratum_N[is_zero_N])
            self.n_FLRH[:, layer] += counted((N_FOLDS, N_STRATA, N_CELLS), fold_N[some], stratum_N[some], cell_N[some])

    def _add_profile(self, view: BlockView, rule: RoutingRule, layer: int) -> Float64:
        """Scales of one layer from both sides' logits; counts how noise goes with the size of the logit."""
        rows = np.flatnonzero(view.usable_rows(layer))
        ours_NE, theirs_NE = view.logits_TLE[rows, layer], view.other_TLE[rows, layer]
        noise_NE, scale_N = noise_of_logits(ours_NE, theirs_NE, rule)
        scale_T = np.full(len(view.prompt_id_T), np.nan)
        scale_T[rows] = scale_N
        some_N = scale_N > 0
        freedom = noise_freedom(rule) / rule.n_experts
        square_NE = np.square(noise_NE[some_N] / scale_N[some_N, None]) / freedom
        fold_NE = np.broadcast_to(view.fold_T[rows][some_N, None], square_NE.shape)
        cell = fold_NE.ravel(), size_of(ours_NE[some_N]).ravel()
        self.square_FLZ[:, layer] += counted((N_FOLDS, N_SIZES), *cell, weights_N=square_NE.ravel())
        self.n_FLZ[:, layer] += counted((N_FOLDS, N_SIZES), *cell)
        return scale_T

    @property
    def n_FL(self) -> Float64:  # noqa: N802 - the legend suffix
        """Scales counted, zeros included."""
        return np.asarray(self.n_FLRH.sum(axis=(2, 3)) + self.zero_FLR.sum(axis=2))

    def of_other_folds(self) -> NoiseCounts:
        """For every fold, the counts of all the others."""
        return NoiseCounts(*(getattr(self, f.name).sum(axis=0) - getattr(self, f.name) for f in fields(self)))

    def profile_FLZ(self) -> Float64:  # noqa: N802 - the legend suffix
        """Noise of a logit of each size, in units of its token's scale; 1 where too few were seen."""
        with np.errstate(invalid="ignore"):
            square_FLZ = self.square_FLZ / np.where(self.n_FLZ < _MIN_IN_SIZE, np.nan, self.n_FLZ)
        return np.asarray(np.sqrt(np.where(np.isnan(square_FLZ), 1.0, square_FLZ)))

    def shares(self) -> tuple[Float64, Float64]:
        """(share of every cell, share of exact zeros) by fold, layer and stratum; thin strata get their layer's."""
        n_FLR = self.n_FLRH.sum(axis=3) + self.zero_FLR
        is_thin_FLR = n_FLR < MIN_IN_STRATUM
        n_FLRH = np.where(is_thin_FLR[..., None], self.n_FLRH.sum(axis=2, keepdims=True), self.n_FLRH)
        zero_FLR = np.where(is_thin_FLR, self.zero_FLR.sum(axis=2, keepdims=True), self.zero_FLR)
        total_FLR = n_FLRH.sum(axis=3) + zero_FLR
        total_FLR = np.where(total_FLR == 0, np.nan, total_FLR)
        return n_FLRH / total_FLR[..., None], zero_FLR / total_FLR


def view_block(block: PairBlock, rule: RoutingRule, side: Side = "infer") -> BlockView | None:
    """The block as seen from one side; None without expert ids or without that side's margins.

    Args:
        side: the reference, whose scores predict; the other side only says what happened.
    """
    seen = compare_block(block)
    gap_TL = _gaps(block, rule, side)
    if seen is None or gap_TL is None:
        return None
    other: Side = "train" if side == "infer" else "infer"
    other_gap_TL, is_flip_TL = _gaps(block, rule, other), seen.is_flip_TL
    change_TL = np.full(gap_TL.shape, np.nan)
    if other_gap_TL is not None:
        with np.errstate(invalid="ignore"):  # two infinite margins (K = E) have no change
            change_TL = np.abs(np.where(is_flip_TL, -other_gap_TL, other_gap_TL) - gap_TL)
    logits, others = (getattr(block, f"router_logits_{s}_TLE") for s in (side, other))
    is_known_TL = seen.is_compared_TL & ~np.isnan(gap_TL)
    return BlockView(block.prompt_id_T, gap_TL, logits, others, is_known_TL, is_flip_TL, change_TL)


@dataclass(frozen=True)
class PairNoise:
    """The noise of one pair, measured in every way that its arms allow.

    Args:
        counts: by way to measure.
        flips: the choices compared and those that flipped; nothing is predicted yet.
        tie_L, gap_L: exact ties and gaps of the reference side, by layer.
        has_target_logits: the reference side kept its router logits.
    """

    pair: Pair
    rule: RoutingRule
    side: Side
    counts: dict[Measure, NoiseCounts]
    flips: PredictionTotals
    tie_L: Float64
    gap_L: Float64
    has_target_logits: bool

    def methods(self, has_bias: bool) -> list[Method]:
        """Methods that can be tried, best first."""
        by_logits: list[Method] = ["all_pairs", "border_pair"]
        if self.rule.is_grouped:
            by_logits = ["simulated"]
        if "logits" not in self.counts or (self.rule.has_correction_bias and not has_bias):
            by_logits = []
        by_margins: list[Method] = ["margin_change"] if "margins" in self.counts else []
        return by_logits + by_margins


def measure_noise(pair: Pair, rule: RoutingRule, side: Side = "infer") -> PairNoise:
    """The noise between the two arms of a pair, in one pass over its blocks."""
    counts: dict[Measure, NoiseCounts] = {}
    flips = [PredictionTotals.empty(pair.n_layers)]
    tie_L, gap_L, has_logits = np.zeros(pair.n_layers), np.zeros(pair.n_layers), False
    for block in pair.blocks():
        view = view_block(block, rule, side)
        if view is None:
            continue
        tie_L += (view.is_known_TL & (view.gap_TL == 0)).sum(axis=0)
        gap_L += view.is_known_TL.sum(axis=0)
        has_logits |= view.logits_TLE is not None
        unpredicted_TL = np.where(view.is_known_TL, 0.0, np.nan)
        flips.append(PredictionTotals.of_block(view.prompt_id_T, unpredicted_TL, view.is_flip_TL))
        for measure in _measures(view):
            counts.setdefault(measure, NoiseCounts.empty(pair.n_layers)).add_block(view, rule, measure)
    return PairNoise(pair, rule, side, counts, PredictionTotals.merge(flips), tie_L, gap_L, has_logits)


def _measures(view: BlockView) -> list[Measure]:
    measures: list[Measure] = ["logits"] if view.has_logits else []
    return [*measures, "margins"] if np.isfinite(view.change_TL).any() else measures


def noise_records(noise: PairNoise, measure: Measure) -> list[dict[str, Any]]:
    """Distribution of the noise by layer, its growth with depth, and the share of ties."""
    counts = noise.counts[measure]
    n_LH, zero_L = counts.n_FLRH.sum(axis=(0, 2)), counts.zero_FLR.sum(axis=(0, 2))
    n_L = n_LH.sum(axis=1) + zero_L
    # a difference of two scores, each with the token's scale; a margin's change is such a difference already
    sigma_H = CELL_SCALE * (np.sqrt(2) if measure == "logits" else 1.0)
    quantile_L = {name: _quantile(n_LH, zero_L, sigma_H, q) for name, q in _QUANTILES.items()}
    columns = {
        **quantile_L,
        "sigma_mean": divide((n_LH * sigma_H).sum(axis=1), n_L),
        "sigma_rms": np.sqrt(divide((n_LH * np.square(sigma_H)).sum(axis=1), n_L)),
        "growth": divide(quantile_L["sigma_p50"], np.broadcast_to(quantile_L["sigma_p50"][:1], n_L.shape)),
        "no_noise_share": divide(zero_L, n_L),
        "tie_share": divide(noise.tie_L, noise.gap_L),
    }
    return [
        {
            "layer": layer, "decoder_layer": decoder, "measure": measure, "space": noise.rule.space,
            "n_choices": int(n_L[layer]), **{name: column[layer] for name, column in columns.items()},
        }
        for layer, decoder in enumerate(noise.pair.decoder_layer_L)
    ]  # fmt: skip


def _quantile(n_LH: Float64, zero_L: Float64, sigma_H: Float64, q: float) -> Float64:
    """Quantile of a distribution given by cells and exact zeros; NaN of nothing."""
    upto_LH = np.concatenate([zero_L[:, None], n_LH], axis=1).cumsum(axis=1)
    total_L = upto_LH[:, -1]
    cell_L = (upto_LH < q * total_L[:, None]).sum(axis=1)
    value_L = np.r_[0.0, sigma_H][np.minimum(cell_L, len(sigma_H))]
    return np.where(total_L > 0, value_L, np.nan)


def noise_of_logits(ours_NE: NDArray[Any], theirs_NE: NDArray[Any], rule: RoutingRule) -> tuple[Float64, Float64]:
    """(noise of every logit, scale of every token): what two sides' logits differ by, and its rms.

    What all logits share is taken off where it changes no choice, and a degree of freedom with it.
    """
    noise_NE = theirs_NE.astype(np.float64) - ours_NE.astype(np.float64)
    if rule.is_shift_invariant:
        noise_NE -= noise_NE.mean(axis=1, keepdims=True)
    scale_N = np.sqrt(np.square(noise_NE).sum(axis=1) / noise_freedom(rule))
    return noise_NE, scale_N


def noise_freedom(rule: RoutingRule) -> int:
    """Numbers that a token's scale is made of."""
    return max(1, rule.n_experts - 1 if rule.is_shift_invariant else rule.n_experts)


def cell_of(scale_N: Float64) -> Int64:
    """Cell of positive scales; what lies beyond the grid goes to its ends."""
    with np.errstate(divide="ignore"):
        cell_N = np.floor((np.log2(scale_N) - _LOWEST) * CELLS_PER_OCTAVE)
    return np.asarray(np.clip(np.nan_to_num(cell_N, nan=0.0), 0, N_CELLS - 1), dtype=np.int64)


def size_of(logits: NDArray[Any]) -> Int64:
    """Bin of the size of a logit: its binary exponent, which is what sets the rounding of a float."""
    exponent = np.frexp(np.abs(np.asarray(logits, dtype=np.float64)))[1]
    return np.asarray(np.clip(exponent - _SMALLEST_SIZE, 0, N_SIZES - 1), dtype=np.int64)


def without_estimation_error(share_XH: Float64, n_numbers: int) -> Float64:
    """Shares of true scales from shares of measured ones, each measured from ``n_numbers`` Gaussian numbers.

    A scale made of few numbers scatters by itself; taken at face value that scatter would be noise added to noise.
    The log of the scale is pulled towards its mean so that its variance falls by the known part.

    Source: ours; log of chi^2_n / n has mean digamma(n / 2) - log(n / 2) and variance trigamma(n / 2).
    """
    position_H = np.arange(N_CELLS, dtype=np.float64)
    per_cell = np.log(2) / CELLS_PER_OCTAVE
    own_variance = float(special.polygamma(1, n_numbers / 2)) / 4 / per_cell**2
    own_shift = float(special.digamma(n_numbers / 2) - np.log(n_numbers / 2)) / 2 / per_cell
    total_X = share_XH.sum(axis=-1, keepdims=True)
    share = share_XH / np.where(total_X == 0, np.nan, total_X)
    mean_X = (share * position_H).sum(axis=-1, keepdims=True)
    variance_X = (share * np.square(position_H - mean_X)).sum(axis=-1, keepdims=True)
    keep_X = np.sqrt(np.clip(1 - own_variance / np.where(variance_X > 0, variance_X, np.nan), 0, 1))
    moved_XH = np.nan_to_num(mean_X + np.nan_to_num(keep_X) * (position_H - mean_X) - own_shift)
    return spread_on_grid(share_XH, moved_XH, N_CELLS)


def spread_on_grid(share_XH: Float64, position_XH: Float64, n_cells: int) -> Float64:
    """Put every share at a real position on an integer grid, split between the two cells beside it."""
    position_XH = np.clip(position_XH, 0, n_cells - 1)
    low_XH = np.minimum(position_XH.astype(np.int64), n_cells - 2)
    upper_XH = position_XH - low_XH
    rows = np.arange(share_XH[..., 0].size)[:, None] * n_cells
    index = (rows + low_XH.reshape(-1, low_XH.shape[-1])).ravel()
    size = share_XH[..., 0].size * n_cells
    flat = [(share_XH * part).ravel() for part in (1 - upper_XH, upper_XH)]
    spread = np.bincount(index, flat[0], size) + np.bincount(index + 1, flat[1], size)
    return np.asarray(spread.reshape(*share_XH.shape[:-1], n_cells), dtype=np.float64)


def _gaps(block: PairBlock, rule: RoutingRule, side: Side) -> Float64 | None:
    """Border gap of one side in the rule's working space, from its margins, or from its logits without them."""
    margin_TL = getattr(block, f"{'logit_margin' if rule.space == 'logit' else 'margin'}_{side}_TL")
    if margin_TL is not None:
        return np.asarray(margin_TL, dtype=np.float64)
    logits_TLE = getattr(block, f"router_logits_{side}_TLE")
    if logits_TLE is None or rule.space != "logit":
        return None
    return border_gap(compared_scores(logits_TLE, rule), rule.top_k)
