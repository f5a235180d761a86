"""Tokens and whole responses as tables: drift, strata, the excess of flipped tokens, the worst of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from moediag.numbers import NONE, count, percent, sig
from moediag.report.blocks import Table, interval, number, table
from moediag.report.decode import TokenTexts
from moediag.report.tables import even_choice, rate, records
from moediag.report.text import Markdown, code, visible

N_WORST: Final = 100
_N_MARKDOWN: Final = 10
_LONGEST_TOKEN: Final = 40
_LONGEST_CONTEXT: Final = 80

_GROUPING_WORDS: Final = {
    "any_flip": "any flip",
    "n_flipped_layers": "flipped layers",
    "first_flipped_layer": "first flipped layer",
    "misrouted_mass": "misrouted mass",
}


def drift_table(frame: pd.DataFrame, n_rows: int = 12) -> Table:
    """abs(logp_diff) by position; of many bins, an even choice with the first and the last."""
    name = "abs_logp_diff_mean"
    rows = [
        [_span(row, "position"), *rate(row, name, "nat")]
        + [number(row[f"abs_logp_diff_{q}"]) for q in ("p50", "p90", "p99")]
        + [number(row["flip_rate"], "share"), count(row["n_tokens"]), count(row["n_sequences"])]
        for row in records(even_choice(frame, n_rows))
    ]
    header = ["position", "mean [nat]", "95 %", "p50", "p90", "p99", "flip rate", "n tokens", "n sequences"]
    return table(header, rows, range(1, 9), "abs(logp_diff) by position in the response; lower is better, flat is good")


def _span(row: Mapping[str, Any], name: str) -> str:
    return f"{row[f'{name}_low']:.0f}–{row[f'{name}_high']:.0f}"


def length_table(frame: pd.DataFrame) -> Table:
    """Log-ratio of whole responses by their length."""
    rows = [
        [
            _span(row, "length"),
            *rate(row, "log_ratio_mean", "nat"),
            *rate(row, "abs_log_ratio_mean", "nat"),
            number(row["abs_log_ratio_p50"]),
            number(row["abs_log_ratio_p90"]),
            count(row["n_sequences"]),
        ]
        for row in records(frame)
    ]
    header = ["tokens", "log-ratio, mean [nat]", "95 %", "size, mean [nat]", "95 %", "size, p50", "size, p90"]
    caption = "log(pi_train / pi_infer) of whole responses by length; 0 is best"
    return table([*header, "n sequences"], rows, range(1, 8), caption)


def strata_table(frame: pd.DataFrame, metric: str = "abs_logp_diff.mean") -> Table:
    """One metric by position, by infer's probability, by entropy and by flipped layers."""
    rows = [
        [
            row["stratifier"],
            _range(row["stratum_low"], row["stratum_high"]),
            number(row["value"]),
            interval(row["ci_low"], row["ci_high"]),
            count(row["n_tokens"]),
            count(row["n_prompts"]),
            row["direction"],
        ]
        for row in records(frame[(frame["metric"] == metric) & (frame["n_tokens"] > 0)])
    ]
    header = ["by", "from – to", "mean [nat]", "95 %", "n tokens", "n prompts", "good end"]
    return table(header, rows, range(1, 6), "Mean abs(logp_diff) by kind of token", n_markdown=24)


def _range(low: float, high: float) -> str:
    if low == high:
        return _end(low)
    return f"{_end(low)} – {_end(high)}"


def _end(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def excess_table(frame: pd.DataFrame) -> Table:
    """How much more flipped tokens differ, by number of flipped layers, first flipped layer and misrouted mass."""
    rows = [
        [
            _GROUPING_WORDS.get(row["grouping"], row["grouping"]),
            _range(row["group_low"], row["group_high"]),
            number(row["flipped_mean"]),
            number(row["unflipped_mean"]),
            *rate(row, "excess", "nat"),
            _times(row["ratio"]),
            _times_between(row),
            _times(row["raw_ratio"]),
            count(row["n_tokens"]),
            count(row["n_unmatched"]),
        ]
        for row in records(frame)
    ]
    header = ["flipped tokens by", "group", "flipped [nat]", "like them, unflipped [nat]", "excess [nat]", "95 %"]
    header += ["ratio", "95 %", "ratio, unmatched", "n tokens", "left out"]
    caption = (
        "Mean abs(logp_diff) of flipped tokens and of unflipped ones of the same strata; an excess of 0 (ratio 1) is "
        "best; unseen difficulty is not controlled"
    )
    return table(header, rows, range(2, 11), caption)


def _times_between(row: Mapping[str, Any]) -> str:
    low, high = row["ratio_ci_low"], row["ratio_ci_high"]
    return f"{_times(low)} to {_times(high)}" if math.isfinite(low) else NONE


def _times(ratio: float) -> str:
    return f"{sig(ratio, 2)}×" if math.isfinite(ratio) else NONE


def worst_token_table(frame: pd.DataFrame, texts: TokenTexts) -> Table:
    """The tokens that differ most, with some text before them where it is at hand and wanted."""
    rows = [[*_worst_cells(row), *_text_cells(row, texts)] for row in records(frame.head(N_WORST))]
    header = ["rank", "logp_diff [nat]", "ratio", "p infer", "p train", "flips", "first layer", "seq", "pos", "prompt"]
    header += [] if texts.is_withheld else ["before it", "token"]
    caption = (
        f"The {len(rows)} response tokens with the largest abs(logp_diff); logp_diff = train − infer, 0 is best; "
        "single tokens have no interval"
    )
    return table(header, rows, range(10), caption, is_list=True, n_markdown=_N_MARKDOWN)


def _worst_cells(row: Mapping[str, Any]) -> list[object]:
    flips, first = int(row["n_flipped_layers"]), int(row["first_flipped_layer"])
    return [
        f"{row['rank'] + 1:.0f}",
        Markdown(sig(row["logp_diff"])),
        Markdown(sig(math.exp(max(min(row["logp_diff"], 700.0), -700.0)))),
        Markdown(percent(math.exp(row["logp_infer"]))),
        Markdown(percent(math.exp(row["logp_train"]))),
        Markdown(NONE if flips < 0 else str(flips)),
        Markdown(NONE if first < 0 else str(first)),
        *(f"{row[name]:.0f}" for name in ("seq_id", "position", "prompt_id")),
    ]


def _text_cells(row: Mapping[str, Any], texts: TokenTexts) -> list[Markdown]:
    """The token and what stands before it; ids where there is no text; nothing where it is withheld."""
    if texts.is_withheld:
        return []
    found = texts.of(int(row["seq_id"]), int(row["position"]))
    if found is None:
        return [Markdown(NONE), code(f"id {row['token_id']}")]
    before = visible(found.before, _LONGEST_CONTEXT, keep_end=True)
    return [code(before), code(visible(found.token, _LONGEST_TOKEN))]


def worst_sequence_table(frame: pd.DataFrame, n_rows: int = 20) -> Table:
    """The responses with the largest mean mismatch."""
    scored = frame[frame["n_tokens"] > 0].sort_values(
        ["abs_logp_diff_mean", "seq_id"], ascending=[False, True], kind="stable"
    )
    rows = [
        [f"{row[name]:.0f}" for name in ("seq_id", "prompt_id", "sample_index")]
        + [number(row[name]) for name in ("abs_logp_diff_mean", "abs_logp_diff_max", "k3", "log_ratio_sum")]
        + [number(row["extreme_share_2"], "share"), number(row["flip_rate"], "share")]
        + [_position(row["worst_position"]), _position(row["first_flip_position"]), count(row["n_tokens"])]
        for row in records(scored.head(n_rows))
    ]
    header = ["seq", "prompt", "sample", "mean [nat]", "max [nat]", "k3 [nat]", "log-ratio [nat]", "F(2)", "flip rate"]
    header += ["worst at", "first flip at", "n tokens"]
    caption = (
        f"The {len(rows)} responses with the largest mean abs(logp_diff); log-ratio: of the whole response, 0 is best"
    )
    return table(header, rows, range(12), caption, is_list=True, n_markdown=_N_MARKDOWN)


def _position(value: float) -> Markdown:
    return Markdown(NONE if value < 0 else f"{value:.0f}")
