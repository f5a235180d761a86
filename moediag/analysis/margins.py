"""Margins against flips: P(flip | margin), margin quantiles, and the noise that the flips imply.

Invariants:
    - everything is computed from :class:`~moediag.analysis.margin_counts.MarginTotals`, integer counts of one side's
      margins; every frame says which side (``side``);
    - quantiles are the order statistic of rank ceil(q n) to a relative error of 2^-12;
    - without margins on either side there is no row, never a row of zeros.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize, special

from moediag.analysis.declarations import MARGIN_CURVE, MARGIN_NOISE, MARGIN_QUANTILES
from moediag.analysis.intervals import ratio_mean_interval
from moediag.analysis.margin_counts import BIN_HIGH, BIN_LOW, N_BINS, TIE_BIN, MarginTotals, key_value

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

POOLED: Final = -1
MIN_CHOICES: Final = 20
"""A rate of choices is drawn and printed from that many on; one choice would be 0 or 100 %."""
_QUANTILES: Final = {"p01": 0.01, "p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99}
_NO_SIDE: Final = "none"


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

    Source: ours; ties counted apart because bf16 router logits make many (rule D16).
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
