"""Explained and forecast flips as tables: one method, one row per layer or per source, each with what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from moediag.analysis.flips.explained import best_method
from moediag.figures.explained import source_words
from moediag.figures.numbers import count, is_number, percent, sig
from moediag.notation import POOLED
from moediag.report.blocks import Block, Table, interval, number, table
from moediag.report.measures import Summary
from moediag.report.pairs import observed_pair_name
from moediag.report.tables import rate, records
from moediag.report.text import Markdown, code, plain
from moediag.run.recipes import RECIPES

_N_MARKDOWN: Final = 30
"""Arms that run the routers alone in another precision."""
_METHOD_WORDS: Final = {
    "all_pairs": "all pairs",
    "border_pair": "border pair",
    "simulated": "simulated",
    "margin_change": "margins",
}


def prediction_words(summary: Summary) -> Markdown:
    """How much of the flips near ties explain, in a sentence; empty where nothing could be predicted."""
    explained = (summary.get("predicted_flips") or {}).get("explained")
    if not explained or not is_number(explained.get("explained")):
        return Markdown("")
    low, high = explained.get("gap_ci") or (None, None)
    error, chance = (percent(explained.get(name)) for name in ("calibration_error", "calibration_error_expected"))
    return Markdown(
        f"Near ties under the pair's own noise explain **{percent(explained['explained'])}** of choices flipping, "
        f"{percent(explained.get('observed'))} did (gap {number(explained.get('gap'), 'share')}, 95 %: "
        f"{interval(low, high, 'share')}); choice by choice the prediction is off by {error}, by chance alone {chance} "
        f"(from {plain(_METHOD_WORDS.get(str(explained.get('method')), explained.get('method')))}, "
        f"{count(explained.get('n_choices'), 'choice')}).{plain(_note_words(explained.get('note')))}"
    )


def _note_words(note: object) -> str:
    """What the method leaves out, as a sentence of its own beside the gap."""
    return f" {str(note)[:1].upper()}{str(note)[1:]}." if note else ""


def explained_table(frame: pd.DataFrame) -> Table:
    """Observed and explained flip rates: all layers by every method, best first, then the best layer by layer."""
    by_layer = frame[(frame["method"] == best_method(frame)) & (frame["layer"] != POOLED)]
    rows = [
        [
            _layer_words(row),
            _said_method(row),
            *rate(row, "observed"),
            number(row["explained"], "share"),
            *rate(row, "gap"),
            number(row["calibration_error"], "share"),
            number(row["calibration_error_expected"], "share"),
            count(row["n_choices"]),
        ]
        for row in records(pd.concat([_pooled(frame), by_layer]))
    ]
    header = ["layer (decoder)", "from", "observed", "95 %", "explained", "gap", "95 %", "error", "by chance"]
    caption = (
        "Flips observed and explained [share of n]; a gap and an error of 0 are best; explained has no interval of its "
        "own, the noise it takes is an estimate, too"
    )
    return table([*header, "n choices"], rows, range(2, 10), caption, n_markdown=_N_MARKDOWN)


def _said_method(row: Mapping[str, Any]) -> str:
    """The method and, once for all layers, why it could not predict or what it leaves out."""
    words = _METHOD_WORDS.get(str(row["method"]), str(row["method"]))
    return f"{words}: {row['note']}" if row["note"] and row["layer"] == POOLED else words


def _layer_words(row: Mapping[str, Any]) -> str:
    return "all" if row["layer"] == POOLED else f"{row['layer']:.0f} ({row['decoder_layer']:.0f})"


def forecast_table(frame: pd.DataFrame) -> Table:
    """Flips that the pair would show under noise measured elsewhere, all layers together, with the assumption."""
    rows = [
        [
            row["pair"],
            source_words(row["noise_from"]),
            number(row["forecast"], "share"),
            *rate(row, "observed"),
            *rate(row, "noise_observed"),
            count(row["n_choices"]),
            row["assumption"],
        ]
        for row in records(_pooled(frame))
    ]
    header = ["pair", "if it had the", "forecast", "it shows", "95 %", "the noise's own pair shows", "95 %"]
    caption = (
        "Flips forecast for the pair under the noise of another [share of n]; lower is better; no interval, the noise "
        "is an estimate, too"
    )
    return table([*header, "n choices", "holds if"], rows, range(2, 8), caption)


def router_table(summary: Summary) -> Block:
    """Flip rates of infer against train with another router arithmetic, measured; empty without such an arm."""
    pairs: Mapping[str, Any] = summary["pairs"]
    rows = []
    infer = (observed_pair_name(summary) or "").partition("~")[0]
    for arm, facts in (summary.get("arms") or {}).items():
        if facts.get("change") != "router-dtype":
            continue
        words = RECIPES[facts["recipe"]].words if facts.get("recipe") in RECIPES else facts["change"]
        for name in (f"{infer}~{arm}", f"{arm}~{facts.get('variant_of')}"):
            found = (pairs.get(name) or {}).get("routing") or {}
            if is_number(found.get("flip_rate")):
                low, high = found.get("flip_rate_ci") or (None, None)
                cells = number(found["flip_rate"], "share"), interval(low, high, "share"), count(found.get("n_choices"))
                rows.append([code(name), words, *cells])
    if not rows:
        return Markdown("")
    caption = "Flip rate with another router arithmetic on the train side, measured [share of n]; lower is better"
    return table(["pair", "what differs", "flip rate", "95 %", "n choices"], rows, range(2, 5), caption)


def calibration_table(frame: pd.DataFrame) -> Table:
    """Predicted against observed shares by bin of the prediction, all layers, of the first method listed."""
    pooled = _pooled(frame)
    rows = [
        [
            f"{sig(row['bin_low'], 2)} to {sig(row['bin_high'], 2)}",
            number(row["predicted"], "share"),
            *rate(row, "observed"),
            count(row["n_choices"]),
        ]
        for row in records(pooled[pooled["method"] == pooled["method"].iloc[0]] if len(pooled) else pooled)
    ]
    caption = "Explanation held against what happened, by predicted P(flip) [share of n]; equal is best"
    return table(["P(flip)", "predicted", "flipped", "95 %", "n choices"], rows, range(1, 5), caption)


def _pooled(frame: pd.DataFrame) -> pd.DataFrame:
    rows: pd.DataFrame = frame[frame["layer"] == POOLED]
    return rows
