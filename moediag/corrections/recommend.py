"""One band recommended from a sweep, by a rule that is said together with the band.

Invariants:
    - a recommendation is a frame row with its rule, reason, intervals and caveat; never a bare pair of numbers;
    - no band is recommended from a handful of masked tokens: then the row says why, without a band;
    - only bands on the frontier of masked share and remaining k3 are considered, so no band of the grid is better in
      both;
    - a band chosen among hundreds on the same tokens looks better than it is: its intervals do not know of the choice,
      and the caveat says so.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import pandas as pd

from moediag.corrections.batch import Batch
from moediag.corrections.declarations import RECOMMENDED_BAND
from moediag.corrections.sweep import sweep_by_band
from moediag.errors import MoediagError
from moediag.statistics.quantiles import TAIL_MIN_CLUSTERS, TAIL_MIN_EXCEEDANCES

BUDGET: Final = 0.002
"""IcePop post and Ring-1T: 1-2 per mille of tokens are masked at first, and the share rises when training degrades."""

CAVEAT: Final = (
    "Chosen on these tokens, so its intervals are too narrow by the choice. Bands are not portable: another model, "
    "another pair of engines or a later step of training wants its own sweep (Ring-1T trains with [0.5, 5] and reports "
    "that [0.5, 2] destabilises; GLM-5 uses [0.5, 2]). No offline number shows that training will be stable."
)
FLOOR: Final = "floor"
CANNOT_TELL: Final = "cannot tell"
_ENDS: Final = ("", "_ci_low", "_ci_high")


def recommend_band(
    sweep: pd.DataFrame,
    floor_k3: float | None = None,
    all_k3: float | None = None,
    budget: float = BUDGET,
    *,
    batch: Batch | None = None,
) -> pd.DataFrame:
    """The band to start from, with its rule and reason.

    With an A/A floor: the band that masks least among those that leave no more k3 than the engines have against
    themselves. What is left then is noise of the stacks that no mask of ratios can tell from mismatch, and masking more
    would throw tokens away for it. Without a floor, or where no band within the budget comes down to it: the band that
    leaves least k3 among those that mask at most ``budget`` of the tokens. Least k3 alone would always choose the
    narrowest band, least masked share the widest: one of the two must be bounded from outside, and the share that
    IcePop reports for healthy training is the one published number there is.

    The bounds of such a band are quantiles of the ratio at the edge of the sample, and the choice hangs on the tokens
    beyond them. Where these are fewer than any quantile beyond p99 wants (20 tokens of 10 prompts), no band is
    recommended: from one masked token, the share of masked tokens may be anything from 0.03 to 5.6 times what was seen
    (95 %, Poisson), from 20 between 0.6 and 1.5 times.

    Args:
        sweep: frame ``sweep_by_band``.
        floor_k3: k3 of an engine against itself [nat], the larger of both sides; None = not measured.
        all_k3: mean k3 without any mask [nat]; None = that of the sweep's widest band where it masks nothing.
        budget: most tokens that may be masked [share].
        batch: the tokens of the sweep, from which the k3 interval is taken if the sweep has none for the band.

    Returns:
        Frame ``recommended_band`` with one row, without a band where the tokens cannot tell, or no row where nothing
        was scored.

    Raises:
        MoediagError: a budget outside [0, 1], or a floor below 0.

    Source: ours; budget from the IcePop post; least number of masked tokens from :mod:`moediag.statistics.quantiles`.
    """
    if not 0 <= budget <= 1:
        raise MoediagError(f"the budget of masked tokens is a share in [0, 1], found {budget}")
    if floor_k3 is not None and not floor_k3 >= 0:
        raise MoediagError(f"the floor's k3 is at least 0 nat, found {floor_k3}")
    some = sweep[sweep["is_on_k3_frontier"]]
    if some.empty:
        return RECOMMENDED_BAND.validate(pd.DataFrame(columns=[column.name for column in RECOMMENDED_BAND.columns]))
    whole = _unmasked_k3(sweep) if all_k3 is None else all_k3
    row, _, _ = _choose(some, floor_k3, budget, whole)
    if batch is not None and math.isnan(row["kept_k3_ci_low"]):
        bounds = sweep_by_band(batch, [row["alpha"]], [row["beta"]]).iloc[0][["kept_k3_ci_low", "kept_k3_ci_high"]]
        some = some.copy()
        some.loc[row.name, ["kept_k3_ci_low", "kept_k3_ci_high"]] = bounds.to_numpy(dtype=np.float64)
    row, rule, reason = _choose(some, floor_k3, budget, whole)
    record: dict[str, Any] = {name: row[name] for name in ("alpha", "beta", "n_tokens", "n_prompts")}
    record |= {f"{name}{end}": row[f"{name}{end}"] for name in ("masked_share", "kept_k3") for end in _ENDS}
    if not (rule == FLOOR and row["masked_share"] == 0) and (unsure := _why_unsure(row, budget)):
        rule, reason = CANNOT_TELL, unsure
        record |= dict.fromkeys(("alpha", "beta"), math.nan)
        record |= {f"{name}{end}": math.nan for name in ("masked_share", "kept_k3") for end in _ENDS}
    record |= {"rule": rule, "all_k3": whole, "floor_k3": math.nan if floor_k3 is None else floor_k3, "budget": budget}
    record |= {"reason": reason, "caveat": CAVEAT}
    return RECOMMENDED_BAND.validate(pd.DataFrame([record]))


def _choose(some: pd.DataFrame, floor_k3: float | None, budget: float, whole: float) -> tuple[pd.Series[Any], str, str]:
    affordable = some[some["masked_share"] <= budget]
    if floor_k3 is not None:
        low = affordable[affordable["kept_k3"] <= floor_k3]
        if not low.empty:
            row = _first(low, ["masked_share", "kept_k3"])
            if row["masked_share"] == 0:
                reason = f"No mask is wanted: all tokens together have no more k3 ({_nat(row)}) than the A/A floor."
                return row, FLOOR, reason
            reason = (
                f"It masks least among the bands that leave no more k3 ({_nat(row)}) than the engines have against "
                f"themselves ({floor_k3:.3g} nat): masking more would throw tokens away for noise."
            )
            return row, FLOOR, reason
    if affordable.empty:
        row = _first(some, ["masked_share", "kept_k3"])
        reason = (
            f"Every band of the grid masks more than {100 * budget:.2g} % of the tokens; this one masks least "
            f"({_percent(row)}). A mismatch of this size is to be found and mended, not masked."
        )
        return row, "least masked", reason
    row = _first(affordable, ["kept_k3", "masked_share"])
    floor = "" if floor_k3 is None else f" No band within it comes down to the A/A floor of {floor_k3:.3g} nat."
    reason = (
        f"It leaves least k3 ({_nat(row)}) among the bands that mask at most {100 * budget:.2g} % of the tokens, the "
        f"share that IcePop reports for healthy training; it masks {_percent(row)}.{floor}{_removed(row, whole)}"
    )
    return row, "budget", reason


def _why_unsure(row: pd.Series[Any], budget: float) -> str:
    """Why the tokens beyond a band are too few to choose it by; empty where they are not."""
    n_masked, n_prompts = round(row["masked_share"] * row["n_tokens"]), int(row["n_masked_prompts"])
    if n_masked >= TAIL_MIN_EXCEEDANCES and n_prompts >= TAIL_MIN_CLUSTERS:
        return ""
    share = f"{n_masked or 'none'} of {row['n_tokens']:,} tokens, of {n_prompts} of {row['n_prompts']:,} prompts"
    least = TAIL_MIN_EXCEEDANCES / budget if budget else math.inf
    size = f" (at {100 * budget:.2g} % that is {least:,.0f} tokens)" if row["n_tokens"] < least < math.inf else ""
    return (
        f"The tokens cannot tell: the rule's band, [{row['alpha']:g}, {row['beta']:g}], masks {share}. A bound that "
        f"far out is a quantile of the ratio, and quantiles beyond p99 want {TAIL_MIN_EXCEEDANCES} tokens of "
        f"{TAIL_MIN_CLUSTERS} prompts beyond them{size}. Log more, or take a band in use and look at what it masks."
    )


def _removed(row: pd.Series[Any], whole: float) -> str:
    """How little or much the mask helps: the least k3 within a budget may be nearly all of it."""
    if not whole > 0:
        return ""
    share = _per_cent(1 - row["kept_k3"] / whole)
    return f" That removes {share} of the k3 of all tokens; the rest is to be found and mended, not masked."


def _first(rows: pd.DataFrame, by: list[str]) -> pd.Series[Any]:
    """Least by the columns; among bands with the same tokens the widest, which promises least."""
    width = np.log(rows["beta"]) - np.log(np.maximum(rows["alpha"], 1e-300))
    order = rows.assign(_width=-width).sort_values([*by, "_width"], kind="stable")
    first: pd.Series[Any] = rows.loc[order.index[0]]
    return first


def _unmasked_k3(sweep: pd.DataFrame) -> float:
    whole = sweep[sweep["masked_share"] == 0]
    return float(whole["kept_k3"].iloc[0]) if len(whole) else math.nan


def _nat(row: pd.Series[Any]) -> str:
    low, high = row["kept_k3_ci_low"], row["kept_k3_ci_high"]
    bounds = f", 95 %: {low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{row['kept_k3']:.3g} nat{bounds}"


def _percent(row: pd.Series[Any]) -> str:
    share, low, high = (row[f"masked_share{end}"] for end in _ENDS)
    bounds = f", 95 %: {_per_cent(low)} to {_per_cent(high)}" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{_per_cent(share)} of them{bounds}"


def _per_cent(share: float) -> str:
    """Two digits, but nearly all is not all."""
    return "more than 99 %" if 0.995 <= share < 1 else f"{100 * share:.{3 if share == 1 else 2}g} %"
