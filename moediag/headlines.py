"""What an analysis found, in sentences: the same words that the reports print, by topic, as plain text.

Invariant: a sentence is left out where its numbers are missing; no word here says that a number is too large for
training.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd

from moediag.figures import first_of_each_kind
from moediag.figures.numbers import is_number, percent, sig, times
from moediag.report.headline import length_words, margin_words, sampling_words, seen_words, slope_words
from moediag.report.measures import text_origin
from moediag.report.prediction_tables import prediction_words
from moediag.report.simulation_page import sentences
from moediag.report.text import Markdown, to_html
from moediag.shown import Headlines

Frames = Mapping[str, pd.DataFrame]
Summary = Mapping[str, Any]


def run_headlines(summary: Summary, frames: Frames) -> Headlines:
    """What was found in a run's main pair.

    Args:
        summary: content of summary.json.
        frames: of the main pair, by name.
    """
    pair = summary["pairs"][summary["main_pair"]]
    verdict = summary["verdict"]
    found = {
        "verdict": f"{verdict['word']}: {verdict['reason']}",
        "mismatch": seen_words(pair, frames, text_origin(summary)),
        "sampling": sampling_words(summary),
        "position": " ".join(filter(None, [slope_words(pair), _least_slope_words(pair, frames)])),
        "length": length_words(pair),
        "layers": _layer_words(summary, frames),
        "margins": margin_words(frames),
        "near ties": prediction_words(summary),
        "worst tokens": _worst_words(pair, frames),
    }
    return _headlines(found)


def comparison_headlines(summaries: Mapping[str, Summary], frames: Mapping[str, Frames]) -> Headlines:
    """How runs differ: the first MoE run against the first dense run, body and tail, then each run for itself."""
    pairs = {label: summary["pairs"][summary["main_pair"]] for label, summary in summaries.items()}
    moe, dense = first_of_each_kind({label: bool(pair["routing"]) for label, pair in pairs.items()})
    found = {}
    if moe is not None and dense is not None:
        found["body and tail"] = body_and_tail_words(frames[moe]["logp_metrics"], frames[dense]["logp_metrics"])
    for label, pair in pairs.items():
        found[label] = seen_words(pair, frames[label], text_origin(summaries[label]))
        found[f"{label}, position"] = " ".join(
            filter(None, [slope_words(pair), _least_slope_words(pair, frames[label])])
        )
    return _headlines(found)


def simulation_headlines(summary: Summary, frames: Frames) -> Headlines:
    """What was found in a simulation, numbered: the sentences of its page."""
    return _headlines({str(nth): words for nth, words in enumerate(sentences(summary, frames), 1)})


def _headlines(found: Mapping[str, str]) -> Headlines:
    return Headlines({topic: plain_text(words) for topic, words in found.items() if words})


def plain_text(words: str) -> str:
    r"""Text of a page's inline markdown without its marks; other text as it is.

    Example:
        >>> plain_text(Markdown(r"**0.5 nat** of abs(logp\_diff)"))
        '0.5 nat of abs(logp_diff)'
    """
    if not isinstance(words, Markdown):
        return words
    return html.unescape(to_html(words).striptags()).replace("\u00a0", " ")


def body_and_tail_words(moe: pd.DataFrame, dense: pd.DataFrame) -> str:
    """Whether the MoE run's differences are wider than the dense run's, at the median and at p99.

    A quantile counts as wider only where the two 95 % intervals do not touch.
    """
    metrics = ("abs_logp_diff.p50", "abs_logp_diff.mean", "abs_logp_diff.p99")
    rows = [{row["metric"]: row for row in frame.to_dict("records")} for frame in (moe, dense)]
    if not all(metric in by_metric for metric in metrics for by_metric in rows):
        return ""
    (p50, mean, p99), (p50_dense, mean_dense, p99_dense) = ([found[metric] for metric in metrics] for found in rows)
    where = {
        (True, True): "Body and tail are both wider in the MoE run",
        (False, True): "The tail is wider in the MoE run; the bodies cannot be told apart",
        (True, False): "The body is wider in the MoE run; the tails cannot be told apart",
        (False, False): "Neither the bodies nor the tails of the two runs can be told apart",
    }[p50["ci_low"] > p50_dense["ci_high"], p99["ci_low"] > p99_dense["ci_high"]]
    pairs = (p50, p50_dense), (mean, mean_dense), (p99, p99_dense)
    by_p50, by_mean, by_p99 = (times(ours["value"], theirs["value"]) for ours, theirs in pairs)
    return (
        f"{where}: its median difference is {by_p50} the dense run's, its mean {by_mean}, its p99 {by_p99} "
        f"({sig(p99['value'])} against {sig(p99_dense['value'])} nat; {p99['n_tokens']:,} and "
        f"{p99_dense['n_tokens']:,} tokens of {p99['n_prompts']} prompts)."
    )


def _least_slope_words(pair: Summary, frames: Frames) -> str:
    """Whether the difference grows along the response, and the smallest growth that these data could show."""
    bounds, mean = (pair.get("position") or {}).get("slope_per_1k_tokens_ci"), pair["logp"]["abs_logp_diff"]["mean"]
    drift = frames.get("drift_by_position")
    if not bounds or drift is None or drift.empty or not is_number(mean) or mean == 0:
        return ""
    low, high = bounds
    word = "grows" if low > 0 else "falls" if high < 0 else "cannot be told from constant"
    n_positions = int(frames["tokens"]["position"].max()) + 1
    least = (high - low) / 2 * n_positions / 1000
    return (
        f"The difference {word} along the response; over {n_positions:,} tokens a growth below {sig(least, 2)} nat, "
        f"{sig(100 * least / mean, 2)} % of the mean, could not be seen."
    )


def _layer_words(summary: Summary, frames: Frames) -> str:
    """The first MoE layer whose flip rate is above the floor; empty without routing."""
    layers = frames.get("agreement_by_layer")
    routing = summary["pairs"][summary["main_pair"]]["routing"]
    if layers is None or layers.empty or not routing or not is_number(routing.get("flip_rate")):
        return ""
    floor = (((summary.get("floors") or {}).get("metrics") or {}).get("flip_rate") or {}).get("floor")
    if floor is None:
        return f"{percent(routing['flip_rate'])} of choices flip; no floor was measured."
    above = layers.loc[1 - layers["same_set_rate_ci_high"] > floor, "layer"]
    first = f"from MoE layer {int(above.iloc[0])} on" if len(above) else "in no layer"
    return f"{percent(routing['flip_rate'])} of choices flip; the flip rate is above the floor {first}."


def _worst_words(pair: Summary, frames: Frames) -> str:
    """Share of the summed difference that the tokens listed as worst hold."""
    worst, mean = frames.get("worst_tokens"), pair["logp"]["abs_logp_diff"]["mean"]
    if worst is None or worst.empty or not is_number(mean) or mean == 0:
        return ""
    share = worst["logp_diff"].abs().sum() / (mean * pair["n_tokens"])
    return f"The {len(worst)} worst tokens hold {percent(share)} of the summed abs(logp_diff)."
