"""A series over training steps: what no drift of training explains, also where no fit can tell.

Two steps are enough for most of it. One finding per rule, of the metric that shows it worst; values that contradict
each other within one metric are one finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from moediag.analysis.series import KNOWN, metric_rows, published_start
from moediag.hygiene.findings import Finding, by_level, finding
from moediag.numbers import sig

Float64 = NDArray[np.float64]

NO_ROUNDING: Final = 1.0
"""Nat from which on neither rounding nor flipped experts is the cause. Ours: 35 times the highest mean abs logp diff of
a healthy stack, 20 times the one past which IcePop's run failed; the KL is smaller still."""
JUMP: Final = 10.0
"""Rise per training step that is no drift. Ours: published mismatches double within 20 steps (tinker-feedback, issue
22) or rise over 150 (IcePop post)."""
FAR_START: Final = 3.0
"""Times the highest published start from which on a start is called high. Ours: healthy stacks themselves are a factor
of 2.5 apart (mean abs logp diff 0.011 to 0.028)."""
CHI2: Final = ("chi2_token", "chi2_sequence")
CHANCE: Final = 1e-3
"""Chance of an order of steps that is no longer put down to luck. Ours, and not the millionth of the rules on tokens: a
training has some tens of steps, and its restarts are few."""


@dataclass(frozen=True)
class Schedule:
    """What is known of the training beside its numbers.

    Args:
        learning_rates: by step; empty = not known.
        restarts: steps whose rollouts are the first after the rollout engine was restarted.
    """

    learning_rates: Mapping[int, float] = field(default_factory=dict)
    restarts: frozenset[int] = frozenset()

    @property
    def is_frozen(self) -> bool:
        """Whether the weights never change: a control at learning rate 0."""
        return bool(self.learning_rates) and not any(self.learning_rates.values())


def check_series(trend: pd.DataFrame, schedule: Schedule | None = None) -> list[Finding]:
    """Findings on a series, errors first.

    Args:
        trend: frame ``trend_by_step``, ascending.
    """
    schedule, found = schedule or Schedule(), []
    for metric in dict.fromkeys(trend["metric"]):
        rows = metric_rows(trend, metric).dropna(subset=["value"])
        found += list(_of_metric(str(metric), rows, schedule)) if len(rows) else []
    return by_level(found)


def _of_metric(metric: str, rows: pd.DataFrame, schedule: Schedule) -> Iterator[Finding]:
    """The first of the rules that one metric breaks; at learning rate 0 nothing else explains it."""
    if found := _infinite(rows):
        yield finding("infinite-metric", metric, found)
    elif metric in CHI2 and _is_negative(rows).any():
        yield finding("not-estimable", metric, _negative_chi2(rows))
    elif metric not in KNOWN:
        return
    elif found := _first_update(rows):
        yield finding("D25-first-update", metric, found)
        if schedule.is_frozen:
            yield finding("D27-lr-zero", metric, f"{_ends(rows)}, with a learning rate of 0 at every step")
    elif found := _beyond_rounding(rows):
        yield finding("beyond-rounding", metric, found)
    elif schedule.restarts and (found := _resets(rows, schedule.restarts)):
        yield finding("D26-grows-resets", metric, found)
    elif schedule.is_frozen and (found := _grows(rows)):
        yield finding("D27-lr-zero", metric, found)
    elif found := _far_start(rows):
        yield finding("start-level", metric, found)


def _is_negative(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether a value is below 0, with its interval where it has one."""
    return np.asarray((rows["value"] < 0) & ~(rows["value_ci_high"] >= 0))


def _negative_chi2(rows: pd.DataFrame) -> str:
    value_N, step_N = rows["value"].to_numpy(np.float64), rows["step"].to_numpy()
    least = int(value_N.argmin())
    n_below = int(_is_negative(rows).sum())
    return (
        f"{value_N[least]:.4g} at step {step_N[least]}, below 0 at {n_below} of {len(rows)} steps: the mean of squared "
        f"ratios is {1 + value_N[least]:.3g} there, and at least 1 by definition; the ratios that would carry it are "
        "not in the batch"
    )


def _values(rows: pd.DataFrame) -> tuple[Float64, NDArray[Any]]:
    return np.abs(rows["value"].to_numpy(np.float64)), rows["step"].to_numpy()


def _shown(rows: pd.DataFrame, at: int) -> str:
    unit = " nat" if rows["unit"].iloc[0] == "nat" else ""
    value_N, step_N = _values(rows)
    return f"{value_N[at]:.3g}{unit} at step {step_N[at]}"


def _ends(rows: pd.DataFrame) -> str:
    value_N, _ = _values(rows)
    return f"{_shown(rows, 0)}, {_shown(rows, int(value_N.argmax()))}"


def _infinite(rows: pd.DataFrame) -> str:
    wrong = rows[np.isinf(rows["value"])]
    if wrong.empty:
        return ""
    return f"infinite at {len(wrong)} of {len(rows)} steps, first at step {wrong['step'].iloc[0]}"


def _beyond(rows: pd.DataFrame) -> NDArray[np.intp]:
    """Steps at which the metric is at a level, or rises at a rate, that neither rounding nor its compounding gives."""
    value_N, _ = _values(rows)
    is_level = rows["unit"].iloc[0] == "nat" and rows["metric"].iloc[0] != "abs_logp_diff.p99"
    return np.flatnonzero(((value_N >= NO_ROUNDING) & is_level) | _jumps(rows, value_N))


def _first_update(rows: pd.DataFrame) -> str:
    """Fine at the first step, beyond rounding after an update."""
    at = _beyond(rows)
    if not len(at) or at[0] == 0:
        return ""
    value_N, step_N = _values(rows)
    first, worst = int(at[0]), int(value_N.argmax())
    more = f" and {value_N[worst]:.3g} at step {step_N[worst]}" if worst != first else ""
    return f"{_shown(rows, first)}{more}, after {value_N[first - 1]:.3g} at step {step_N[first - 1]}: {_why(rows)}"


def _beyond_rounding(rows: pd.DataFrame) -> str:
    """Beyond rounding from the first step on."""
    if not len(_beyond(rows)):
        return ""
    value_N, step_N = _values(rows)
    worst = int(value_N.argmax())
    more = f" and {value_N[worst]:.3g} at step {step_N[worst]}" if worst else ""
    return f"{_shown(rows, 0)}{more}, from the first on: {_why(rows)}, and no drift either"


def _why(rows: pd.DataFrame) -> str:
    value_N, _ = _values(rows)
    is_level = value_N.max() >= NO_ROUNDING
    words = "no rounding does this" if is_level else "rounding that compounds does not rise so fast"
    is_k3 = rows["metric"].iloc[0] == "kl_infer_train_k3"
    return f"{words} (unless a few tokens carry the k3: see the mean)" if is_k3 else words


def _jumps(rows: pd.DataFrame, value_N: Float64) -> NDArray[np.bool_]:
    """(N,) whether a step stands a factor of :data:`JUMP` per training step above the one before.

    Only above the level that healthy training starts from, where that is published, and only where the intervals of the
    two, if there are any, lie apart: one token can carry a k3.
    """
    published = published_start(str(rows["metric"].iloc[0]))
    low_N, high_N = (rows[f"value_ci_{end}"].to_numpy(np.float64) for end in ("low", "high"))
    gap_N = np.diff(rows["step"].to_numpy(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        rise_N = np.log(value_N[1:] / value_N[:-1]) / gap_N
    is_apart_N = ~(low_N[1:] <= high_N[:-1])  # also where one is not known
    level = published.highest if published else math.inf
    return np.append(False, (rise_N >= math.log(JUMP)) & np.isfinite(rise_N) & is_apart_N & (value_N[1:] > level))


def _resets(rows: pd.DataFrame, restarts: frozenset[int]) -> str:
    """Grows between restarts of the engine and falls at each.

    The falls at restarts must be larger than the changes of other steps by more than chance (Mann-Whitney, one-sided,
    exact: any order of the changes is as likely where a restart does nothing), and what is lost at a restart must be at
    least half of what was gained before it, in the median: less may be a change of data.
    """
    value_N, step_N = _values(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        change_N = np.diff(np.log(value_N))
    is_restart_N = np.isin(step_N[1:], list(restarts))
    if not np.isfinite(change_N).all() or not is_restart_N.any() or is_restart_N.all():
        return ""
    chance = _smaller_by_chance(change_N[is_restart_N], change_N[~is_restart_N])
    gains = np.add.reduceat(np.where(is_restart_N, 0.0, change_N), np.r_[0, np.flatnonzero(is_restart_N)])
    lost = -change_N[is_restart_N] / np.maximum(gains[: is_restart_N.sum()], 1e-12)
    if chance >= CHANCE or np.median(gains) <= 0 or np.median(lost) < 0.5:
        return ""
    grown, fell = np.exp(np.median(gains)), np.exp(np.median(change_N[is_restart_N]))
    n = int(is_restart_N.sum())
    return (
        f"grows {sig(float(grown), 2)} times between restarts and falls to {sig(float(fell), 2)} times at a restart "
        f"(medians of {n} restarts among {len(step_N)} steps; by chance {chance:.1g})"
    )


def _smaller_by_chance(some: Float64, others: Float64) -> float:
    """How often chance alone makes ``some`` that much smaller than ``others``, one-sided."""
    return float(stats.mannwhitneyu(some, others, alternative="less", method="exact").pvalue)


def _grows(rows: pd.DataFrame) -> str:
    """Rises over the steps by more than chance (Kendall's rank correlation, one-sided)."""
    value_N, step_N = _values(rows)
    if len(value_N) < 3 or np.ptp(value_N) == 0:
        return ""
    found = stats.kendalltau(step_N, value_N, alternative="greater")
    if not found.pvalue < CHANCE:
        return ""
    return (
        f"{_shown(rows, 0)}, {_shown(rows, len(rows) - 1)}, with a learning rate of 0 at every step: grows over "
        f"{len(rows)} steps (Kendall's tau {found.statistic:.2f}, by chance {found.pvalue:.1g})"
    )


def _far_start(rows: pd.DataFrame) -> str:
    first, mark = rows.iloc[0], published_start(str(rows["metric"].iloc[0]))
    if mark is None or abs(first["value"]) < FAR_START * mark.highest or first["value_ci_low"] <= mark.highest:
        return ""
    times = abs(first["value"]) / mark.highest
    return (
        f"starts at {first['value']:.3g} (step {first['step']}), {times:.2g} times {mark.highest:g} ({mark.source}): "
        "high from the start, so no drift of training; stacks differ"
    )
