"""Bands of IcePop: what every (alpha, beta) of a grid would mask and leave, which one to start from, and what the bands
in use would mask in a run.

Invariants:
    - a band's bounds are closed, exactly as in :func:`~moediag.corrections.methods.icepop`;
    - every token is put once between the sorted bounds of all bands; a band's sums are differences of prefix sums over
      these intervals, by cluster of prompts. The bounds are sorted, not the tokens: 40 bounds tell 400 bands apart, and
      the tokens are read chunk by chunk;
    - prefix sums run from small ratios to large ones, so the heavy tail above beta never enters a band's difference;
      means and variances of weights join the intervals of a band instead, because weights may be of any size;
    - a recommendation is a frame row with its rule, reason, intervals and caveat; never a bare pair of numbers. No band
      is recommended from a handful of masked tokens: then the row says why, without a band;
    - only bands on the frontier of masked share and remaining k3 are recommended, so no band of the grid is better in
      both. A band chosen among hundreds on the same tokens looks better than it is: its intervals do not know of the
      choice, and the caveat says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import CORRECTIONS
from moediag.analysis.measures import ICEPOP_BAND
from moediag.analysis.metrics import LOWER, Metric, declare_metrics
from moediag.analysis.tokens import CHUNK_TOKENS, AnyTokens, Source, Tokens, source_of
from moediag.corrections.methods import log_bound
from moediag.corrections.presets import PRESETS, Preset, presets_of
from moediag.corrections.sums import Moments, n_clusters_of
from moediag.corrections.terms import Float64, Terms, are_float32, on_bounds
from moediag.errors import MoediagError
from moediag.frames import Column, declare, measured, share, with_ci
from moediag.statistics.intervals import divide, ratio_mean_interval
from moediag.statistics.quantiles import TAIL_MIN_CLUSTERS, TAIL_MIN_EXCEEDANCES

OnProgress = Callable[[int, int, str], None]

SWEEP_BY_BAND = declare(
    "sweep_by_band",
    "IcePop band (alpha, beta)",
    Column("alpha", "float64", "1", "lower end of the closed band of ratio"),
    Column("beta", "float64", "1", "upper end"),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_prompts", "int64", "prompt", "their prompts"),
    *with_ci(share("masked_share", "share of tokens outside the band; lower loses less data", "masked")),
    Column("n_masked_prompts", "int64", "prompt", "prompts (pooled into 512) with a token outside the band"),
    share("below_share", "share with ratio < alpha"),
    share("above_share", "share with ratio > beta"),
    *with_ci(
        measured("kept_k3", "nat", "mean k3 of kept tokens; lower is better", "k3 left"),
        "; for some bands of the k3 frontier",
    ),
    measured("weight_mean", "1", "mean weight, masked tokens as 0"),
    measured("weight_variance", "1", "variance of the weights; lower is better", "variance of w"),
    share("ess_token", "(sum w)^2 / (n sum w^2); 1 is best", "ESS"),
    Column("is_on_k3_frontier", "bool", "1", "no other band masks no more and leaves no more k3, one of them less"),
    Column("is_on_variance_frontier", "bool", "1", "the same with the variance of the weights"),
)

RECOMMENDED_BAND = declare(
    "recommended_band",
    "recommendation (one)",
    measured("alpha", "1", "lower end of the closed band of ratio; NaN = cannot tell"),
    measured("beta", "1", "upper end; NaN = cannot tell"),
    Column(
        "rule",
        "str",
        "1",
        "floor: widest band that leaves the A/A floor's k3; budget: least k3 within the budget; least masked: every "
        "band is beyond the budget; cannot tell: too few tokens lie beyond the band",
    ),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_prompts", "int64", "prompt", "their prompts"),
    *with_ci(share("masked_share", "share of tokens outside the band")),
    *with_ci(measured("kept_k3", "nat", "mean k3 of kept tokens")),
    measured("all_k3", "nat", "mean k3 of all tokens, nothing masked"),
    measured("floor_k3", "nat", "k3 of the engines against themselves; NaN = not measured"),
    Column("budget", "float64", "1", "most tokens that may be masked"),
    Column("reason", "str", "1", "why this band, in words"),
    Column("caveat", "str", "1", "what the recommendation does not say"),
)

DEFAULT_ALPHAS: Final = (
    0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99,
)  # fmt: skip
DEFAULT_BETAS: Final = (
    1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 100.0, math.inf,
)  # fmt: skip
"""400 bands, the presets' among them; 0 and infinity leave a side open (truncation's side without truncation)."""

_N_INTERVALS: Final = 24
"""Bands with an interval of their k3: each costs a bootstrap."""
BUDGET: Final = 0.002
"""IcePop post and Ring-1T: 1-2 per mille of tokens are masked at first, and the share rises when training degrades."""

CAVEAT: Final = (
    "Chosen on these tokens, so its intervals are too narrow by the choice. Bands are not portable: another model, "
    "another pair of engines or a later step of training needs its own sweep (Ring-1T trains with [0.5, 5] and reports "
    "that [0.5, 2] destabilises; GLM-5 uses [0.5, 2]). No offline number shows that training will be stable."
)
FLOOR: Final = "floor"
CANNOT_TELL: Final = "cannot tell"
_ENDS: Final = ("", "_ci_low", "_ci_high")


def sweep_by_band(
    tokens: AnyTokens,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    betas: Sequence[float] = DEFAULT_BETAS,
    on_progress: OnProgress | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> pd.DataFrame:
    """What IcePop would mask and leave, for every band [alpha, beta] with alpha <= beta.

    Args:
        tokens: response tokens of whole sequences, ascending; sequences and prompts counted from 0.
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
    x, bands = Terms.of(tokens), _bands(alphas, betas)
    low_M = np.array([log_bound(alpha) for alpha, _ in bands])
    above_M = np.nextafter(np.array([log_bound(beta) for _, beta in bands]), np.inf)  # first log-ratio beyond the band
    bounds = np.unique([log_bound(bound) for band in bands for bound in band])
    # interval b holds cuts[b - 1] <= log-ratio < cuts[b]; first_M is the first one of every band, last_M the one after
    cuts = np.unique(np.r_[low_M, above_M])
    first_M, last_M = (np.searchsorted(cuts, bound_M) + 1 for bound_M in (low_M, above_M))
    shape = n_clusters_of(x), len(cuts) + 1
    n_CB, k3_CB, ratios, done = np.zeros(shape), np.zeros(shape), Moments.none(shape[1]), 0
    for part in x.chunks(chunk_tokens):
        between_T = np.searchsorted(cuts, on_bounds(part.diff_T, bounds, part.is_float32_T), side="right")
        cell_T = part.column("prompt_id") % shape[0] * shape[1] + between_T
        n_CB += np.bincount(cell_T, minlength=n_CB.size).reshape(shape)
        k3_CB += np.bincount(cell_T, weights=part.k3_T, minlength=k3_CB.size).reshape(shape)
        ratios += Moments.of(part.ratio_T, between_T, shape[1])
        done += len(part.frame)
        if on_progress is not None:
            on_progress(done, len(x.frame), "tokens")

    n_CM, k3_CM = (_prefix(sums_CB)[:, last_M] - _prefix(sums_CB)[:, first_M] for sums_CB in (n_CB, k3_CB))
    # an empty band's difference of prefix sums is rounding error, not a sum
    k3_CM = np.where(n_CM > 0, np.maximum(k3_CM, 0.0), 0.0)
    n_C, n_B = n_CB.sum(axis=1), _prefix(n_CB.sum(axis=0))
    n_masked_CM = n_C[:, None] - n_CM
    masked = ratio_mean_interval(n_masked_CM, np.broadcast_to(n_C[:, None], n_masked_CM.shape), "rate")
    kept_k3_M = divide(k3_CM.sum(axis=0), n_CM.sum(axis=0))
    # weights: the ratios of the intervals inside the band, and 0 for all other tokens
    between_B = np.arange(shape[1])
    inside = ratios.joined((between_B >= first_M[:, None]) & (between_B < last_M[:, None]))
    n_out_M = ratios.n_G.sum() - inside.n_G
    weights = inside + Moments(n_out_M, np.zeros_like(n_out_M), np.zeros_like(n_out_M))
    n_M = np.full(len(bands), n_C.sum())
    columns: dict[str, Any] = {
        "alpha": [alpha for alpha, _ in bands],
        "beta": [beta for _, beta in bands],
        "n_tokens": n_M.astype(np.int64),
        "n_prompts": x.n_prompts,
        "masked_share": masked.value_M,
        "masked_share_ci_low": masked.low_M,
        "masked_share_ci_high": masked.high_M,
        "n_masked_prompts": (n_masked_CM > 0).sum(axis=0),
        "below_share": divide(n_B[first_M], n_M),
        "above_share": divide(n_M - n_B[last_M], n_M),
        "kept_k3": kept_k3_M,
        "weight_mean": np.where(weights.n_G > 0, weights.mean_G, np.nan),
        "weight_variance": weights.variance_G,
        "ess_token": weights.effective_share_G,
        "is_on_k3_frontier": frontier(masked.value_M, kept_k3_M),
        "is_on_variance_frontier": frontier(masked.value_M, weights.variance_G),
    }
    frame = pd.DataFrame(columns)
    _add_k3_intervals(frame, n_CM, k3_CM)
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
        raise MoediagError(f"a sweep needs bounds of ratio of at least 0, found {[b for b in bounds if not b >= 0]}")
    bands = [(float(a), float(b)) for a in sorted(set(alphas)) for b in sorted(set(betas)) if a <= b and b > 0]
    if not bands:
        raise MoediagError(f"a sweep needs alpha <= beta, found alphas {list(alphas)} and betas {list(betas)}")
    return bands


def _prefix(sums_B: Float64) -> Float64:
    """Sums of the intervals before each, and of all."""
    return np.concatenate([np.zeros_like(sums_B[..., :1]), np.cumsum(sums_B, axis=-1)], axis=-1)


def _add_k3_intervals(frame: pd.DataFrame, n_CM: Float64, k3_CM: Float64) -> None:
    """Intervals of the remaining k3 for bands spread over the k3 frontier; bands with the same tokens share one."""
    is_on = frame["is_on_k3_frontier"]
    point = frame["below_share"].astype(str) + " " + frame["above_share"].astype(str)
    ranked = point[frame[is_on].sort_values("masked_share", kind="stable").index].drop_duplicates().index.to_numpy()
    frame["kept_k3_ci_low"] = frame["kept_k3_ci_high"] = np.nan
    if len(ranked):
        some = ranked[np.unique(np.linspace(0, len(ranked) - 1, _N_INTERVALS).round().astype(np.intp))]
        found = ratio_mean_interval(k3_CM[:, some], n_CM[:, some], "positive")
        for end, bound_M in (("low", found.low_M), ("high", found.high_M)):
            by_point = dict(zip(point[some], bound_M, strict=True))
            frame[f"kept_k3_ci_{end}"] = point.map(by_point).where(is_on)


def recommend_band(
    sweep: pd.DataFrame,
    floor_k3: float | None = None,
    all_k3: float | None = None,
    budget: float = BUDGET,
    *,
    tokens: AnyTokens | None = None,
) -> pd.DataFrame:
    """The band to start from, with its rule and reason.

    With an A/A floor: the band that masks least among those that leave no more k3 than the engines have against
    themselves. What is left then is noise of the stacks that no mask of ratios can tell from mismatch, and masking more
    would throw tokens away for it. Without a floor, or where no band within the budget comes down to it: the band that
    leaves least k3 among those that mask at most ``budget`` of the tokens. Least k3 alone would always choose the
    narrowest band, least masked share the widest: one of the two must be bounded from outside, and the share that
    IcePop reports for healthy training is the one published number there is.

    The bounds of such a band are quantiles of the ratio at the edge of the sample, and the choice hangs on the tokens
    beyond them. Where these are fewer than any quantile beyond p99 needs (20 tokens of 10 prompts), no band is
    recommended: from one masked token, the share of masked tokens may be anything from 0.03 to 5.6 times what was seen
    (95 %, Poisson), from 20 between 0.6 and 1.5 times.

    Args:
        sweep: frame ``sweep_by_band``.
        floor_k3: k3 of an engine against itself [nat], the larger of both sides; None = not measured.
        all_k3: mean k3 without any mask [nat]; None = that of the sweep's widest band where it masks nothing.
        budget: most tokens that may be masked [share].
        tokens: those of the sweep, from which the k3 interval is taken if the sweep has none for the band.

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
    if tokens is not None and math.isnan(row["kept_k3_ci_low"]):
        bounds = sweep_by_band(tokens, [row["alpha"]], [row["beta"]]).iloc[0][["kept_k3_ci_low", "kept_k3_ci_high"]]
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
                reason = f"No mask is needed: all tokens together have no more k3 ({_nat(row)}) than the A/A floor."
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


def band_name(alpha: float, beta: float) -> str:
    """How frame ``corrections`` and summary.json call an IcePop band."""
    return f"icepop_{alpha}_{beta}"


declare_metrics(
    Metric("masked_share", "1", LOWER, "masked by IcePop {:g} to {:g}".format(*ICEPOP_BAND), is_share=True,
           path=("corrections", band_name(*ICEPOP_BAND), "masked_share"), floor="larger"),
)  # fmt: skip

RUN_PRESETS: Final = (PRESETS["ring-1t"], PRESETS["glm-5"], PRESETS["prime-rl-icepop"])
"""The bands that an analysis tries; ``moediag simulate`` has all corrections."""


def masked_shares(tokens: Source, presets: tuple[Preset, ...] = RUN_PRESETS) -> pd.DataFrame:
    """How many tokens each IcePop band would mask on the logged tokens.

    Args:
        tokens: token frame of a pair.
        presets: bands to try.

    Returns:
        Frame ``corrections``; shares in [0, 1] of the tokens with two finite log-probabilities. A small share is not a
        verdict: it says what the correction would do, not that training is stable.

    Raises:
        MoediagError: a preset that is more than one IcePop band.

    Source: IcePop post: 1-2 per mille of tokens at first, rising sharply later.
    """
    x = source_of(tokens)
    records = []
    for preset in presets:
        alpha, beta = _band(preset)
        others = [other.name for other in presets_of(preset.correction) if other.name != preset.name]
        low, high = log_bound(alpha), log_bound(beta)

        def outside(part: Tokens, low: float = low, high: float = high) -> Float64:
            is_float32_T = are_float32(part.logp_train_T, part.logp_infer_T)
            diff_T = on_bounds(part.diff_T, [low, high], is_float32_T)
            return np.stack([part.by_prompt(diff_T < low), part.by_prompt(diff_T > high)], axis=1)

        below_C, above_C = x.collect(outside).T
        masked = ratio_mean_interval(below_C + above_C, x.n_by_prompt, "rate").one()
        records.append(
            {
                "method": band_name(alpha, beta),
                "source": "; ".join([preset.source, *([f"also {', '.join(others)}"] if others else [])]),
                "n_tokens": len(x),
                "masked_share": masked.value,
                "masked_share_ci_low": masked.low,
                "masked_share_ci_high": masked.high,
                "below_share": float(below_C.sum() / len(x)) if len(x) else np.nan,
                "above_share": float(above_C.sum() / len(x)) if len(x) else np.nan,
            }
        )
    columns = [column.name for column in CORRECTIONS.columns]
    return CORRECTIONS.validate(pd.DataFrame.from_records(records, columns=columns))


def _band(preset: Preset) -> tuple[float, float]:
    steps = preset.correction.steps
    if [step.method for step in steps] != ["icepop"]:
        raise MoediagError(
            f"the table of bands needs presets with one IcePop band, found {preset.name} ({preset.words})"
        )
    return steps[0].parameters["alpha"], steps[0].parameters["beta"]
