"""What each section of a run's page found, in one line: what a reader sees of it while it is folded.

Invariant: every number is one that stands in the section; where there is none, the line is empty or says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from moediag.analysis.floors import replay_words
from moediag.analysis.metrics import METRICS
from moediag.hygiene.rules import NOTE
from moediag.numbers import NONE, count, is_number, percent, sig
from moediag.report.blocks import interval, number
from moediag.report.definitions import PUBLISHED, published_for
from moediag.report.measures import BIT_EXACT, NOT_MEASURED, Frames, Summary
from moediag.report.sections import engines_compared, has_floor
from moediag.report.tables import worst_sequences

STABLE: Final = "no offline number shows that training will be stable"

SectionWords = Callable[[Summary, Summary, Frames], str]
"""(summary, pair, frames) -> a line."""


def metric_words(name: str, pair: Summary, label: str = "") -> str:
    """A metric with its interval and n; empty where it was not measured.

    Args:
        label: what it is called; by default the metric's own words.
    """
    metric = METRICS[name]
    value = metric.value(pair)
    if not is_number(value):
        return ""
    unit = "" if metric.is_share or metric.unit == "1" else f" {metric.unit}"
    low, high = metric.bounds(pair) or (None, None)
    bounds = interval(low, high, metric.shown_unit)
    known = f"95 %: {bounds}; " if bounds != NONE else ""
    n = count(metric.n(pair), {"choice": "(token, layer) pair"}.get(metric.counts, metric.counts))
    return f"{label or metric.label}: {number(value, metric.shown_unit)}{unit} ({known}{n})"


def _ladder(summary: Summary, pair: Summary, frames: Frames) -> str:
    given = summary.get("verdict") or {}
    causes = given.get("causes") or ()
    n_notes = sum(one.get("level") == NOTE for one in causes)
    parts = (
        (len(causes) - n_notes, "rule", " fired"),
        (n_notes, "note", ""),
        (len(given.get("ruled_out") or ()), "cause", " ruled out"),
        (len(given.get("untold") or ()), "question", " open"),
    )
    return "; ".join(f"{count(n, noun)}{end}" for n, noun, end in parts if n)


def _compared(summary: Summary, pair: Summary, frames: Frames) -> str:
    model = summary.get("model") or {}
    if not model.get("n_moe_layers"):
        return engines_compared(summary)
    experts = f"top-{model.get('top_k')} of {model.get('n_experts')} experts"
    return f"{engines_compared(summary)}; {experts} in {count(model['n_moe_layers'], 'layer')}"


def _floors(summary: Summary, pair: Summary, frames: Frames) -> str:
    if not has_floor(summary):
        return "no engine was compared with itself"
    floors: Mapping[str, Summary | None] = summary["floors"]
    parts = []
    for side in ("train", "infer"):
        line = floors.get(side)
        size = NOT_MEASURED if not line else BIT_EXACT if line.get("is_bit_exact") else f"{sig(line.get('mean'))} nat"
        parts.append(f"{side} against itself {size}")
    rounding = floors.get("rounding")
    parts += [f"one unit in the last place makes {sig(rounding.get('mean'))} nat"] if rounding else []
    return "; ".join(parts)


def _tail(summary: Summary, pair: Summary, frames: Frames) -> str:
    parts = [metric_words("extreme_share_2", pair, "beyond a factor of 2")]
    largest = METRICS["abs_logp_diff.max"].value(pair)
    return "; ".join(filter(None, [*parts, f"largest {sig(largest)} nat" if is_number(largest) else ""]))


def _depth(summary: Summary, pair: Summary, frames: Frames) -> str:
    layers = frames.get("agreement_by_layer")
    if not pair.get("routing"):
        return "no routing to compare"
    words = metric_words("flip_rate", pair, "flip rate")
    if layers is None or len(layers) < 2:
        return words
    first, last = (percent(layers.iloc[end]["same_set_rate"]) for end in (0, -1))
    return f"{words}; same sets {first} in the first MoE layer, {last} in the last"


def _margins(summary: Summary, pair: Summary, frames: Frames) -> str:
    groups = (pair.get("margins") or {}).get("choice") or {}
    flipped, kept = ((groups.get(name) or {}).get("p50") for name in ("flipped", "kept"))
    if not is_number(flipped):
        return "no choice flipped" if groups else ""
    explained = (summary.get("predicted_flips") or {}).get("explained") or {}
    words = f"median margin of flipped choices {sig(flipped)}, of kept ones {sig(kept)}"
    if not is_number(explained.get("explained")):
        return words
    return (
        f"{words}; near ties explain {percent(explained['explained'])} flipping, {percent(explained['observed'])} did"
    )


def _excess(summary: Summary, pair: Summary, frames: Frames) -> str:
    found = pair.get("flip_excess") or {}
    if not is_number(found.get("excess")):
        return ""
    bounds = interval(*(found.get("excess_ci") or (None, None)))
    n = count(found.get("n_tokens"), "flipped token")
    return f"{number(found['excess'])} nat more than unflipped tokens like them (95 %: {bounds}; {n})"


def _replay(summary: Summary, pair: Summary, frames: Frames) -> str:
    words, tried = replay_words(summary.get("routing_replay")), frames.get("remedies")
    if words or tried is None or tried.empty:
        return "; ".join(words)
    best = tried.sort_values("mean_times", kind="stable").iloc[0]
    return f"of {count(len(tried), 'change')} tried, {best['change']} leaves {sig(best['mean_to'])} nat of the mean"


def _drift(summary: Summary, pair: Summary, frames: Frames) -> str:
    found = pair.get("position") or {}
    slope, bounds = found.get("slope_per_1k_tokens"), found.get("slope_per_1k_tokens_ci")
    if not is_number(slope):
        return ""
    known = f" (95 %: {interval(*bounds)})" if bounds else ""
    flat = "; 0 is inside" if bounds and bounds[0] <= 0 <= bounds[1] else ""
    return f"{number(slope)} nat per 1,000 tokens{known}{flat}"


def _kinds(summary: Summary, pair: Summary, frames: Frames) -> str:
    frame = frames.get("metrics_by_stratum")
    if frame is None:
        return ""
    is_mean = (frame["metric"] == "abs_logp_diff.mean") & (frame["stratifier"] == "p_infer")
    rows = frame[is_mean & (frame["n_tokens"] > 0) & frame["value"].notna()]
    if len(rows) < 2:
        return ""
    low, high = (
        f"{sig(row['value'])} nat ({count(row['n_tokens'], 'token')})" for _, row in rows.iloc[[0, -1]].iterrows()
    )
    return f"mean of the tokens that infer held unlikeliest: {low}; of the likeliest: {high}"


def _worst_token(summary: Summary, pair: Summary, frames: Frames) -> str:
    frame = frames.get("worst_tokens")
    if frame is None or frame.empty:
        return ""
    row = frame.iloc[0]
    place = f"sequence {row['seq_id']:.0f}, position {row['position']:.0f}"
    return f"the worst differs by {sig(row['logp_diff'])} nat: {place}"


def _worst_response(summary: Summary, pair: Summary, frames: Frames) -> str:
    frame = frames.get("sequences")
    rows = worst_sequences(frame) if frame is not None else None
    if rows is None or rows.empty:
        return ""
    row, n = rows.iloc[0], count(rows.iloc[0]["n_tokens"], "token")
    return f"the worst, sequence {row['seq_id']:.0f}, differs by {sig(row['abs_logp_diff_mean'])} nat on average ({n})"


def _corrections(summary: Summary, pair: Summary, frames: Frames) -> str:
    found = (pair.get("corrections") or {}).get("icepop_0.5_5.0") or {}
    share = found.get("masked_share")
    if not is_number(share):
        return ""
    low, high = found.get("masked_share_ci") or (None, None)
    bounds = interval(low, high, "share")
    return f"the band 0.5 to 5 would mask {percent(share)} of tokens (95 %: {bounds})"


def _published(summary: Summary, pair: Summary, frames: Frames) -> str:
    one = published_for("abs_logp_diff.mean", bool(pair.get("routing")))
    return f"{count(len(PUBLISHED), 'number')}, e.g. a mean of {one.words}" if one else ""


SECTION_WORDS: Final[Mapping[str, SectionWords]] = {
    "ladder": _ladder,
    "compared": _compared,
    "numbers": lambda _, pair, __: metric_words("abs_logp_diff.mean", pair, "mean"),
    "further": lambda _, pair, __: metric_words("ess_token", pair, "effective sample size"),
    "floors": _floors,
    "tail": _tail,
    "depth": _depth,
    "margins": _margins,
    "excess": _excess,
    "replay": _replay,
    "drift": _drift,
    "kinds": _kinds,
    "tokens": lambda _, __, ___: "the responses that differ most: colours, flips, what corrections would do",
    "worst-tokens": _worst_token,
    "worst-sequences": _worst_response,
    "corrections": _corrections,
    "further-figures": lambda _, __, ___: "what no section names",
    "definitions": lambda _, __, ___: "formula, unit and good end of every number",
    "limits": lambda _, __, ___: STABLE,
    "published": _published,
    "provenance": lambda _, __, ___: "versions, dtypes, digests, and the commands",
}
"""Anchor of a section -> what it found."""
