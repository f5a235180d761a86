"""Numbers with all that must stand beside them: n, unit, the end that is good, an interval, a floor.

Invariant: what is missing is said (no interval and why, no floor measured, bit-exact); nothing missing reads as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from moediag.analysis.metrics import METRICS, Metric
from moediag.frames import declared
from moediag.numbers import NONE, count, is_number, percent, sig
from moediag.report.blocks import Table, interval, number, table
from moediag.report.text import Markdown, plain
from moediag.statistics.intervals import LARGE_SHARE

Summary = Mapping[str, Any]
Frames = Mapping[str, pd.DataFrame]

NOT_MEASURED: Final = "not measured"
BIT_EXACT: Final = "bit-exact"

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
    direction: str
    note: str = ""
    floor: Floor = Floor()
    largest_share: float | None = None
    share_of: str = "n"

    def cells(self) -> list[Markdown | str]:
        """name, value, interval, floor, rounding scale, unit, n, direction."""
        unit = f"share of {self.share_of}" if self.unit == "share" else self.unit
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


def floor_of(summary: Summary, metric: Metric) -> Floor:
    """The floor and the rounding scale of a metric of the main pair."""
    line = ((summary.get("floors") or {}).get("metrics") or {}).get(metric.name)
    if not line:
        return Floor(is_defined=bool(metric.floor))
    low, high = line.get("floor_ci") or (None, None)
    is_exact, note = bool(line.get("is_bit_exact")), str(line.get("note") or "")
    return Floor(line.get("floor"), low, high, line.get("ratio"), line.get("rounding"), is_exact, note)


def lookup(nested: Any, dotted: str) -> Any:
    """A value under a dotted name; None where a part is missing."""
    for part in dotted.split("."):
        nested = nested.get(part) if isinstance(nested, Mapping) else None
    return nested


def measure(
    metric: Metric, pair: Summary, *, origin: str = "", floors: Summary | None = None, frames: Frames | None = None
) -> Measured:
    """A metric of a pair with all that stands beside it.

    Args:
        pair: a pair of a summary.
        origin: as :func:`text_origin` gives it: k1, k2 and k3 are then called statistics.
        floors: the summary whose floors stand beside its main pair; None = another pair, which has none.
        frames: of the pair; say why an interval could not be given.
    """
    low, high = metric.bounds(pair) or (None, None)
    noun = {"choice": "(token, layer) pair"}.get(metric.counts, metric.counts)
    return Measured(
        label_of(metric, origin),
        metric.value(pair),
        low,
        high,
        count(metric.n(pair), noun),
        metric.shown_unit,
        metric.direction,
        _note(metric, frames or {}) if low is None else "",
        Floor() if floors is None else floor_of(floors, metric),
        metric.largest_share(pair),
        metric.share_of,
    )


def _note(metric: Metric, frames: Frames) -> str:
    tables = [frame for name, frame in frames.items() if declared(name).is_metrics]
    notes = (note for frame in tables for note in frame.loc[frame["metric"] == metric.name, "note"])
    return next(map(str, notes), metric.note)


def label_of(metric: Metric, origin: str = "") -> str:
    """A metric in words; k1, k2 and k3 are no KL where ``origin`` says why.

    Example:
        >>> label_of(METRICS["kl_infer_train_k3"]), label_of(METRICS["kl_infer_train_k3"], "forced text")
        ('KL(infer‖train), k3', 'k3 statistic (forced text: no KL)')
    """
    is_estimate = metric.name.startswith("kl_") and not metric.name.endswith("exact")
    return f"{metric.name[-2:]} statistic ({origin}: no KL)" if origin and is_estimate else metric.label


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


def section_measures(section: str, summary: Summary, pair: Summary, frames: Frames, origin: str = "") -> list[Measured]:
    """The metrics of a section of the page that the pair has."""
    metrics = [metric for metric in METRICS.values() if metric.section == section]
    rows = [measure(metric, pair, origin=origin, floors=summary, frames=frames) for metric in metrics]
    if section == "depth" and is_number((pair.get("routing") or {}).get("independent_any_layer_share")):
        rows.append(_independent(pair))
    return rows if section == "numbers" else [row for row in rows if is_number(row.value)]


def _independent(pair: Summary) -> Measured:
    routing = pair["routing"]
    return Measured(
        "the same, were layers to flip independently", routing["independent_any_layer_share"], None, None,
        count(routing.get("n_tokens"), "token"), "share", "for comparison", "computed, not measured",
        Floor(is_defined=False),
    )  # fmt: skip


def headlines(pair: Summary) -> list[Metric]:
    """The metrics of the first screen that the pair has; those of routing are left out of a dense run."""
    return [metric for metric in METRICS.values() if metric.is_headline and metric.is_measured(pair)]
