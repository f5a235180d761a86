"""Frames of routing and of log-probabilities as tables; every row with its n and its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pandas as pd

from moediag.figures.catalogue import MIN_CHOICES
from moediag.frames import declared_frames
from moediag.numbers import count, sig
from moediag.report.blocks import Table, interval, number, table
from moediag.report.text import Markdown, code

_HIGHEST_TAUS: Final = (1.01, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Ratios at which the tail is read off the curve, as far as its thresholds allow."""


def agreement_table(frame: pd.DataFrame) -> Table:
    """Per layer: same-set rate, cumulative rate, overlap, reorder rate, each with its interval."""
    rows = [
        [
            f"{row['layer']:.0f} ({row['decoder_layer']:.0f})",
            *rate(row, "same_set_rate"),
            *rate(row, "cumulative_same_set_rate"),
            number(row["overlap"], "share"),
            number(row["reorder_rate"], "share"),
            count(row["n_tokens"]),
        ]
        for row in records(frame)
    ]
    header = [
        "layer (decoder)",
        "same set",
        "95 %",
        "same in all so far",
        "95 %",
        "overlap",
        "reordered (harmless)",
        "n rows",
    ]
    caption = "Agreement of expert sets by MoE layer [share of n]; higher is better"
    return table(header, rows, range(1, len(header)), caption)


def rate(row: Mapping[str, Any], name: str, unit: str = "share") -> list[Markdown]:
    """A value and its interval, from the columns of that name."""
    return [number(row[name], unit), interval(row[f"{name}_ci_low"], row[f"{name}_ci_high"], unit)]


def flips_per_token_table(frame: pd.DataFrame) -> Table:
    """Tokens by number of flipped layers, beside what independent layers would give, and their mismatch."""
    rows = [
        [
            f"{row['n_flipped_layers']:.0f}",
            number(row["share"], "share"),
            number(row["independent_share"], "share"),
            number(row["abs_logp_diff_mean"]),
            number(row["abs_logp_diff_p99"]),
            count(row["n_tokens"]),
        ]
        for row in records(frame[frame["n_tokens"] > 0])
    ]
    header = ["flipped layers", "tokens", "if independent", "mean [nat]", "p99 [nat]", "n tokens"]
    return table(header, rows, range(1, 6), "Tokens by flipped layers [share], and their abs(logp_diff); no interval")


def swap_table(frame: pd.DataFrame, n_rows: int = 12) -> Table:
    """The most frequent exchanges of exactly one expert for another."""
    rows = [
        [
            f"{row['layer']:.0f} ({row['decoder_layer']:.0f})",
            f"{row['expert_infer']:.0f} → {row['expert_train']:.0f}",
            count(row["n_swaps"]),
            count(row["n_reverse"]),
            number(row["share_of_flips"], "share"),
            count(row["n_flips"]),
        ]
        for row in records(frame.head(n_rows))
    ]
    header = ["layer (decoder)", "infer's → train's", "swaps", "the other way", "of the layer's flips", "n flips"]
    return table(header, rows, range(2, 6), f"Experts that stand in for each other, the {len(rows)} most frequent")


def margin_quantile_table(frame: pd.DataFrame) -> Table:
    """Margins of all, flipped and kept choices, in both score spaces."""
    rows = [
        [row["space"], row["group"], count(row["n_choices"]), count(row["n_exact_ties"])]
        + [number(row[q]) for q in ("p01", "p10", "p50", "p90", "p99")]
        for row in records(frame)
    ]
    header = ["score", "choices", "n", "exact ties", "p1", "p10", "median", "p90", "p99"]
    return table(header, rows, range(2, 9), "Margins by score space and group of choices; larger is safer")


def noise_table(frame: pd.DataFrame) -> Table:
    """Noise of the score difference per layer, as the flips imply it."""
    rows = [
        [row["space"], "all" if row["layer"] < 0 else f"{row['layer']:.0f}", number(row["sigma"])]
        + [count(row[name]) for name in ("n_flipped", "n_exact_ties", "n_choices")]
        for row in records(frame)
    ]
    header = ["score", "MoE layer", "sigma", "flipped", "exact ties", "n choices"]
    caption = "Noise sigma [score] that P(flip | margin) = Phi(−margin / sigma) needs; lower is better; no interval"
    return table(header, rows, range(2, 6), caption)


def flip_bin_table(curve: pd.DataFrame, n_rows: int = 9) -> Table:
    """P(flip) of exact ties and of an even choice of the margin bins that hold enough choices for a rate, pooled."""
    pooled = curve[(curve["layer"] == -1) & (curve["space"] == "choice")].sort_values(["bin_low", "bin_high"])
    held = pooled[pooled["n_choices"] >= MIN_CHOICES]
    n_left = int(pooled.loc[pooled["n_choices"] < MIN_CHOICES, "n_choices"].sum())
    rows = [
        [_margin_words(row), *rate(row, "flip_rate"), count(row["n_flipped"]), count(row["n_choices"])]
        for row in records(even_choice(held, n_rows))
    ]
    header = ["margin (choice score)", "P(flip)", "95 %", "flipped", "n choices"]
    left = f"; bins of fewer than {MIN_CHOICES} are left out ({count(n_left, 'choice')})" if n_left else ""
    return table(header, rows, range(1, 5), f"P(flip) by margin, all layers [share of n], an even choice of bins{left}")


def even_choice(frame: pd.DataFrame, n_rows: int) -> pd.DataFrame:
    """At most that many rows, evenly spread, the first and the last among them."""
    if len(frame) <= n_rows:
        return frame
    return frame.iloc[[round(i * (len(frame) - 1) / (n_rows - 1)) for i in range(n_rows)]]


def _margin_words(row: Mapping[str, Any]) -> str:
    if row["bin_high"] == 0:
        return "exactly 0 (tie)"
    if row["bin_low"] < 0:
        return "below 0"
    if math.isinf(row["bin_high"]):
        return f"{sig(row['bin_low'], 2)} and more"
    return f"{sig(row['bin_low'], 2)} to {sig(row['bin_high'], 2)}"


def tail_table(frame: pd.DataFrame) -> Table:
    """F(tau) at the thresholds of the curve nearest to ratios that are easy to read."""
    wanted = [math.log(tau) for tau in _HIGHEST_TAUS]
    nearest = sorted({int((frame["threshold"] - threshold).abs().argmin()) for threshold in wanted})
    rows = [
        [
            sig(row["threshold"]),
            sig(math.exp(row["threshold"])),
            *rate(row, "share_above"),
            count(row["n_above"]),
            count(row["n_tokens"]),
        ]
        for row in records(frame.iloc[nearest])
    ]
    header = ["abs(logp_diff) above [nat]", "tau", "F(tau)", "95 %", "tokens above", "n tokens"]
    caption = "Tail: share of tokens whose ratio or its inverse exceeds tau; lower is better"
    return table(header, rows, range(6), caption)


def quantile_table(frame: pd.DataFrame) -> Table:
    """Quantiles of the log-ratio of tokens and of whole responses."""
    rows = [
        [
            str(row["level"]).replace("_", " "),
            f"{100 * row['q']:g} %",
            *rate(row, "log_ratio", "nat"),
            sig(_exp(row["log_ratio"]), 4),
            count(row["n"]),
        ]
        for row in records(frame)
    ]
    header = ["ratio of", "quantile", "log-ratio [nat]", "95 %", "ratio", "n"]
    return table(header, rows, range(1, 6), "Quantiles of pi_train / pi_infer; 0 nat is best", n_markdown=9)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a longer response may leave the range of a float


_EXACT_WORDS: Final = {
    "kl_infer_train_exact": "KL(infer‖train), exact",
    "kl_train_infer_exact": "KL(train‖infer), exact",
    "total_variation_exact": "total variation, exact",
    "kl_infer_train_k1": "k1 of the same tokens",
    "kl_infer_train_k3": "k3 of the same tokens",
}


def exact_table(frame: pd.DataFrame) -> Table:
    """Divergences over the whole vocabulary, beside k1 and k3 from the sampled tokens alone."""
    rows = [
        [
            _EXACT_WORDS.get(str(row["measure"]), str(row["measure"])),
            number(row["value"], str(row["unit"])),
            interval(row["ci_low"], row["ci_high"], str(row["unit"]), str(row["note"])),
            row["unit"],
            count(row["n_tokens"], "token"),
            row["direction"],
        ]
        for row in records(frame)
    ]
    caption = f"Over all {count(frame['n_vocabulary'].iloc[0])} tokens of the vocabulary, where both arms kept them"
    return table(["number", "value", "95 %", "unit", "n", "good end"], rows, (1, 2, 4), caption)


def correction_table(frame: pd.DataFrame) -> Table:
    """What each band would mask, below and above, with the source of its preset."""
    rows = [
        [
            code(row["method"]),
            *rate(row, "masked_share"),
            number(row["below_share"], "share"),
            number(row["above_share"], "share"),
            count(row["n_tokens"]),
            row["source"],
        ]
        for row in records(frame)
    ]
    header = ["correction", "masked", "95 %", "below the band", "above the band", "n tokens", "preset from"]
    caption = "Tokens that a correction would mask [share of n]; fewer masked tokens lose less data"
    return table(header, rows, range(1, 6), caption)


def entropy_table(frame: pd.DataFrame) -> Table:
    """Entropy of masked and of kept tokens."""
    rows = [
        [
            row["side"],
            row["group"],
            *rate(row, "mean", "nat"),
            *(number(row[q]) for q in ("p10", "p50", "p90")),
            count(row["n_tokens"]),
        ]
        for row in records(frame)
    ]
    header = ["side", "tokens", "mean [nat]", "95 %", "p10", "median", "p90", "n tokens"]
    band = " and ".join(f"{sig(frame[end].iloc[0], 2)}" for end in ("alpha", "beta"))
    return table(header, rows, range(2, 8), f"Entropy of kept and masked tokens; band of the ratio {band}")


_SHARES: Final = ("share", "rate", "observed", "explained", "forecast", "predicted")
_LAYERS: Final = ("layer", "decoder_layer")


def declared_table(name: str, frame: pd.DataFrame, n_markdown: int = 12) -> Table:
    """Any declared frame as it is: columns with their units; bounds of intervals join their value."""
    spec = next((spec for spec in declared_frames() if spec.name == name), None)
    unit_of = {column.name: column.unit for column in spec.columns} if spec else {}
    shown = [c for c in map(str, frame.columns) if not c.endswith(("_ci_low", "_ci_high"))]
    header: list[str] = []
    for column in shown:
        unit = unit_of.get(column, "1")
        words = column.replace("_", " ")
        header += [words if unit == "1" else f"{words} [{unit}]"]
        header += ["95 %"] if f"{column}_ci_low" in frame.columns else []
    rows = [[cell for column in shown for cell in _declared_cells(row, column)] for row in records(frame)]
    numeric = [i for i in range(len(header)) if any(isinstance(row[i], Markdown) for row in rows)]
    what = f"one row per {spec.one_row_per}" if spec else name
    return table(header, rows, numeric, what, is_list=len(rows) > n_markdown, n_markdown=n_markdown)


def _declared_cells(row: Mapping[str, Any], column: str) -> list[Markdown | str]:
    value = row[column]
    if isinstance(value, str):
        return [value]
    if column in _LAYERS:
        return [Markdown("all" if value < 0 else f"{value:.0f}")]
    is_share = column.endswith(("_rate", "_share")) or column in _SHARES
    is_count = isinstance(value, int) and not isinstance(value, bool)
    unit = "share" if is_share else "nat"
    cell: Markdown = Markdown(count(value) if is_count else number(value, unit))
    if f"{column}_ci_low" not in row:
        return [cell]
    return [cell, interval(row[f"{column}_ci_low"], row[f"{column}_ci_high"], unit)]


def facts_table(facts: Mapping[str, Any], caption: str, n_markdown: int | None = None) -> Table:
    """Nested facts as dotted names and values; empty branches are left out."""
    rows = [[code(name), code(value)] for name, value in _flat(facts)]
    return table(["what", "value"], rows, caption=caption, is_list=len(rows) > 12, n_markdown=n_markdown)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
