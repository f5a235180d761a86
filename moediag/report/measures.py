"""Numbers with all that must stand beside them: n, unit, the end that is good, an interval, a floor.

Invariant: what is missing is said (no interval and why, no floor measured, bit-exact); nothing missing reads as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pandas as pd

from moediag.figures.numbers import NONE, count, is_number, percent, sig
from moediag.report.blocks import Table, interval, number, table
from moediag.report.text import Markdown, plain
from moediag.statistics.intervals import LARGE_SHARE

Summary = Mapping[str, Any]
Frames = Mapping[str, pd.DataFrame]

LOWER: Final = "lower is better"
NOT_MEASURED: Final = "not measured"
BIT_EXACT: Final = "bit-exact"

LOGP_ROWS: Final[tuple[tuple[str, str, str], ...]] = (
    ("abs_logp_diff.mean", "abs logp diff, mean", "nat"),
    ("abs_logp_diff.p50", "abs logp diff, p50", "nat"),
    ("abs_logp_diff.p90", "abs logp diff, p90", "nat"),
    ("abs_logp_diff.p99", "abs logp diff, p99", "nat"),
    ("abs_logp_diff.p999", "abs logp diff, p99.9", "nat"),
    ("abs_logp_diff.max", "abs logp diff, max", "nat"),
    ("kl_infer_train_k1", "KL(infer‖train), k1", "nat"),
    ("kl_infer_train_k2", "KL(infer‖train), k2", "nat"),
    ("kl_infer_train_k3", "KL(infer‖train), k3", "nat"),
    ("mean_ratio", "mean ratio train / infer", "1"),
    ("bit_exact_share", "tokens with the same log-probability, bit for bit", "share"),
    ("extreme_share_2", "F(2): tokens whose ratio or its inverse is above 2", "share"),
    ("abs_prob_diff.mean", "abs prob diff, mean", "1"),
    ("abs_prob_diff.max", "abs prob diff, max", "1"),
)
"""Metric, its words and its unit, in the order of the table."""

FURTHER_ROWS: Final[tuple[tuple[str, str, str], ...]] = (
    ("prob_mult_error", "prob mult error: mean exp(abs(logp_diff))", "1"),
    ("binary_kl_infer_train", "binary KL(infer‖train)", "nat"),
    ("binary_kl_train_infer", "binary KL(train‖infer)", "nat"),
    ("pearson_p", "Pearson r of the two probabilities", "1"),
    ("ess_token", "effective sample size, token weights", "share"),
    ("ess_sequence", "effective sample size, sequence weights", "share"),
    ("chi2_token", "chi2, token ratios", "1"),
    ("chi2_sequence", "chi2, sequence ratios", "1"),
    ("ppl_train", "perplexity under train", "1"),
    ("ppl_infer", "perplexity under infer", "1"),
    ("log_ppl_gap", "log perplexity gap per sequence, mean", "nat"),
    ("log_ppl_abs_gap", "log perplexity gap per sequence, mean size", "nat"),
)
"""Numbers that other frameworks print: shown on request, not first."""

FLIP_RATE: Final = "flip rate: expert set differs"
ANY_LAYER: Final = "tokens with a flip in any layer"
FORCED: Final = "forced text"
BENT: Final = "sampling not neutral"

_NEUTRAL: Final = {"temperature": (None, 1), "top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0)}
"""Values that leave infer's distribution as it is; vLLM takes top_k 0 and -1 for off."""


@dataclass(frozen=True)
class Floor:
    """Both yardsticks of one metric, as summary.json has them.

    Args:
        value: None = not measured.
        ratio: of the metric to its floor; None where a multiple would say nothing.
        rounding: the same metric of one unit in the last place against none; None = not measured.
        is_defined: False where a number has no floor (it is signed, computed, or no engine pair bounds it).
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    rounding: float | None = None
    is_bit_exact: bool = False
    note: str = ""
    is_defined: bool = True

    def cells(self, unit: str) -> list[Markdown]:
        """Floor with its interval and multiple, and rounding scale."""
        missing = Markdown(NOT_MEASURED if self.is_defined else NONE)
        rounding = missing if self.rounding is None else number(self.rounding, unit)
        if self.value is None:
            return [missing, rounding]
        is_spread = is_number(self.low) and is_number(self.high) and self.low != self.high
        bounds = f" ({interval(self.low, self.high, unit)})" if is_spread and not self.is_bit_exact else ""
        ratio = f", {sig(self.ratio, 2)}× that" if is_number(self.ratio) and not self.is_bit_exact else ""
        note = f" ({plain(self.note)})" if self.note else ""
        return [
            Markdown(f"{BIT_EXACT if self.is_bit_exact else number(self.value, unit)}{bounds}{ratio}{note}"),
            rounding,
        ]


@dataclass(frozen=True)
class Measured:
    """One number with all that must stand beside it; ``unit`` is ``share`` for rates."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: str
    unit: str
    direction: str = LOWER
    note: str = ""
    floor: Floor = Floor()
    largest_share: float | None = None

    def cells(self) -> list[Markdown | str]:
        """name, value, interval, floor, rounding scale, unit, n, direction."""
        unit = "share of n" if self.unit == "share" else self.unit
        bounds = interval(self.low, self.high, self.unit, self.note)
        if words := carried_words(self.largest_share):
            bounds = Markdown(f"{bounds} ({words})")
        return [self.name, self.shown, bounds, *self.floor.cells(self.unit), unit, self.n, self.direction]

    @property
    def shown(self) -> Markdown:
        """The value as it is printed."""
        return number(self.value, self.unit)


def carried_words(largest_share: float | None) -> str:
    """What stands beside the interval of a mean that hangs on one prompt; empty where it does not.

    Example:
        >>> carried_words(0.41), carried_words(0.08), carried_words(None)
        ('one prompt carries 41.00 %', '', '')
    """
    is_large = is_number(largest_share) and largest_share >= LARGE_SHARE
    return f"one prompt carries {percent(largest_share)}" if is_large else ""


MEASURED_HEADER: Final = ("number", "value", "95 % interval", "floor", "rounding scale", "unit", "n", "good end")


def measured_table(rows: Sequence[Measured], caption: str) -> Table:
    """Numbers with everything beside them."""
    return table(MEASURED_HEADER, [row.cells() for row in rows], right=(1, 2, 3, 4, 6), caption=caption)


def floor_of(summary: Summary, metric: str) -> Floor:
    """The floor and the rounding scale of a metric of the main pair."""
    metrics = (summary.get("floors") or {}).get("metrics") or {}
    line = metrics.get(metric)
    if not line:
        return Floor(is_defined=not metrics)
    low, high = line.get("floor_ci") or (None, None)
    is_exact, note = bool(line.get("is_bit_exact")), str(line.get("note") or "")
    return Floor(line.get("floor"), low, high, line.get("ratio"), line.get("rounding"), is_exact, note)


def with_floors(rows: Sequence[tuple[str, Measured]], summary: Summary) -> list[Measured]:
    """(metric, number) pairs with the floors of the summary beside them."""
    return [replace(row, floor=floor_of(summary, metric)) for metric, row in rows]


def lookup(nested: Any, dotted: str) -> Any:
    """A value under a dotted name; None where a part is missing."""
    for part in dotted.split("."):
        nested = nested.get(part) if isinstance(nested, Mapping) else None
    return nested


def logp_measure(metric: str, words: str, unit: str, pair: Summary, frames: Frames) -> Measured:
    """A metric of the mismatch: from the metrics frame, else, without a good end, from the summary."""
    frame = frames.get("logp_metrics")
    rows = frame[frame["metric"] == metric] if frame is not None else None
    if rows is not None and len(rows):
        row = rows.iloc[0]
        n, direction, note = _n(metric, int(row["n_tokens"]), pair), str(row["direction"]), str(row["note"])
        largest = row["largest_prompt_share"]
        return Measured(
            words, row["value"], row["ci_low"], row["ci_high"], n, unit, direction, note, largest_share=largest
        )
    bounds = lookup(pair.get("logp"), f"{metric}_ci") or (None, None)
    n = _n(metric, pair.get("n_tokens"), pair)
    largest = lookup(pair.get("logp"), f"{metric}_largest_prompt_share")
    return Measured(words, lookup(pair.get("logp"), metric), bounds[0], bounds[1], n, unit, NONE, largest_share=largest)


def _n(metric: str, n_tokens: int | None, pair: Summary) -> str:
    """What a metric is a mean over: tokens, or whole responses."""
    is_of_sequences = metric.endswith("_sequence") or metric.startswith("log_ppl")
    return count(pair.get("n_sequences"), "sequence") if is_of_sequences else count(n_tokens, "token")


def text_origin(summary: Summary) -> str:
    """Why the tokens are no honest sample of infer's distribution; empty when they are.

    Example:
        >>> text_origin({"sampling": {"given_completions": True}})
        'forced text'
        >>> text_origin({"sampling": {"temperature": 0.7}}), text_origin({"sampling": {"top_k": -1}})
        ('sampling not neutral', '')
    """
    sampling = summary.get("sampling") or {}
    if sampling.get("given_completions"):
        return FORCED
    return BENT if bent_parameters(sampling) else ""


def bent_parameters(sampling: Mapping[str, Any]) -> list[str]:
    """Sampling parameters that change infer's distribution, with their values."""
    return [f"{key} {sampling[key]}" for key, fine in _NEUTRAL.items() if sampling.get(key) not in fine]


def logp_rows(origin: str = "") -> tuple[tuple[str, str, str], ...]:
    """:data:`LOGP_ROWS`, with k1, k2 and k3 called statistics where ``origin`` says that they are no KL."""
    if not origin:
        return LOGP_ROWS
    return tuple(
        (metric, f"{metric[-2:]} statistic ({origin}: no KL)" if metric.startswith("kl_") else words, unit)
        for metric, words, unit in LOGP_ROWS
    )


def logp_measures(summary: Summary, pair: Summary, frames: Frames, origin: str = "") -> list[Measured]:
    """Every row of the mismatch table; ``origin`` as :func:`text_origin` gives it."""
    rows = [(metric, logp_measure(metric, words, unit, pair, frames)) for metric, words, unit in logp_rows(origin)]
    return with_floors(rows, summary)


def further_measures(summary: Summary, pair: Summary, frames: Frames) -> list[Measured]:
    """The numbers of :data:`FURTHER_ROWS` that the analysis has."""
    rows = [(metric, logp_measure(metric, words, unit, pair, frames)) for metric, words, unit in FURTHER_ROWS]
    return with_floors([row for row in rows if is_number(row[1].value)], summary)


def routing_measures(summary: Summary, pair: Summary, frames: Frames) -> list[Measured]:
    """Flip rate and any-layer share; none for a dense run."""
    routing = pair.get("routing")
    if not routing:
        return []
    layers, flips = frames.get("agreement_by_layer"), frames.get("flips_per_token")
    choices = count(_sum(layers, "n_tokens", routing.get("n_choices")), "(token, layer) pair")
    tokens = count(_sum(flips, "n_tokens", routing.get("n_tokens")), "token")
    rows = []
    for key, words, n in (("flip_rate", FLIP_RATE, choices), ("any_layer_share", ANY_LAYER, tokens)):
        low, high = routing.get(f"{key}_ci") or (None, None)
        rows.append((key, Measured(words, routing.get(key), low, high, n, "share")))
    measures = with_floors(rows, summary)
    independent = routing.get("independent_any_layer_share")
    if is_number(independent):
        name, note = "the same, were layers to flip independently", "computed, not measured"
        floor = Floor(is_defined=False)
        measures.append(Measured(name, independent, None, None, tokens, "share", "for comparison", note, floor))
    return measures


def _sum(frame: pd.DataFrame | None, column: str, otherwise: Any) -> Any:
    return int(frame[column].sum()) if frame is not None and len(frame) else otherwise


def headline(summary: Summary, pair: Summary, frames: Frames, origin: str = "") -> list[Measured]:
    """The five numbers of the first screen; ``origin`` as :func:`text_origin` gives it."""
    by_metric = {row[0]: row for row in logp_rows(origin)}
    routing = routing_measures(summary, pair, frames)
    chosen = ["abs_logp_diff.mean", "abs_logp_diff.p99", "kl_infer_train_k3"]
    chosen += [] if routing else ["extreme_share_2", "mean_ratio"]
    rows = [(metric, logp_measure(*by_metric[metric], pair, frames)) for metric in chosen]
    return with_floors(rows, summary) + routing[:2]
