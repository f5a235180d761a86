"""Explained and forecast flips as tables: one method, one row per layer or per source, each with what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from moediag.analysis.predicted import POOLED, best_method, forecast_rows
from moediag.figures.explained import source_words
from moediag.figures.numbers import count, is_number, percent, sig
from moediag.notation import INFER
from moediag.report.blocks import Block, Table, interval, number, table
from moediag.report.measures import Summary
from moediag.report.tables import rate, records
from moediag.report.text import Markdown, plain

_N_MARKDOWN: Final = 30
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
        f"{count(explained.get('n_choices'), 'choice')})."
    )


def explained_table(frame: pd.DataFrame) -> Table:
    """Observed and explained flip rates: all layers by every method, best first, then the best layer by layer."""
    by_layer = frame[(frame["method"] == best_method(frame)) & (frame["layer"] != POOLED)]
    rows = [
        [
            _layer_words(row),
            _said_method(row),
            *rate(row, "observed"),
            *rate(row, "explained"),
            *rate(row, "gap"),
            number(row["calibration_error"], "share"),
            number(row["calibration_error_expected"], "share"),
            count(row["n_choices"]),
        ]
        for row in records(pd.concat([_pooled(frame), by_layer]))
    ]
    header = ["layer (decoder)", "from", "observed", "95 %", "explained", "95 %", "gap", "95 %", "error", "by chance"]
    caption = "Flips observed and explained [share of n]; a gap and an error of 0 are best"
    return table([*header, "n choices"], rows, range(2, 11), caption, n_markdown=_N_MARKDOWN)


def _said_method(row: Mapping[str, Any]) -> str:
    """The method, and why it could not predict where it could not."""
    words = _METHOD_WORDS.get(str(row["method"]), str(row["method"]))
    return f"{words}: {row['note']}" if row["note"] else words


def _layer_words(row: Mapping[str, Any]) -> str:
    return "all" if row["layer"] == POOLED else f"{row['layer']:.0f} ({row['decoder_layer']:.0f})"


def forecast_table(frame: pd.DataFrame) -> Table:
    """Flips that infer's scores would show under noise from elsewhere, all layers together, with the assumption."""
    rows = [
        [
            source_words(row["noise_from"]),
            *rate(row, "forecast"),
            *rate(row, "observed"),
            count(row["n_choices"]),
            row["assumption"],
        ]
        for row in records(_pooled(forecast_rows(frame)))
    ]
    header = ["noise from", "forecast for infer", "95 %", "that pair's own flips", "95 %", "n choices", "holds if"]
    return table(header, rows, range(1, 6), "Flips forecast under other noise [share of n]; lower is better")


def multiplier_table(frame: pd.DataFrame) -> Block:
    """Flips forecast for infer's scores under louder and softer noise of the same source; empty without a curve."""
    rows = _pooled(frame[(frame["target"] == INFER) & frame["forecast"].notna()])
    rows = rows[rows.groupby("noise_from")["multiplier"].transform("nunique") > 1]
    if rows.empty:
        return Markdown("")
    factors = sorted(set(rows["multiplier"]))
    # At a multiplier of 1 a source may stand twice: once in the thinned curve, once for every choice.
    rows = rows.sort_values("n_choices", kind="stable").drop_duplicates(["noise_from", "multiplier"])
    by_source = rows.pivot(index="noise_from", columns="multiplier", values="forecast")
    cells = [
        [source_words(source), *(number(value, "share") for value in line)] for source, line in by_source.iterrows()
    ]
    n = count(rows["n_choices"].min(), "choice")
    caption = f"The same at multiples of the noise [share of n], {n}; lower is better; no interval here"
    return table(["noise from", *(f"× {sig(x, 2)}" for x in factors)], cells, range(1, 1 + len(factors)), caption)


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
