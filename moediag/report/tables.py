"""Frames as tables of a page: captions, headers and cells follow from the declarations of the frames' columns.

A frame whose declaration names a section is shown there with all its columns; :data:`VIEWS` says of which frames a
page shows some rows or columns only. An interval joins the value it is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from moediag.analysis.flips.explained import METHOD_WORDS, best_method, source_words
from moediag.analysis.margins import MIN_CHOICES
from moediag.frames import Column, FrameSpec, declared
from moediag.notation import POOLED
from moediag.numbers import NONE, count, in_unit, percent, sig
from moediag.report.blocks import Table, interval, number, table
from moediag.report.decode import TokenTexts
from moediag.report.text import Markdown, code, plain, visible

Row = Mapping[str, Any]

N_WORST: Final = 100
_TAUS: Final = (1.01, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Ratios at which the tail is read off the curve, as far as its thresholds allow."""
_LONGEST_TOKEN: Final = 40
_LONGEST_CONTEXT: Final = 80


@dataclass(frozen=True)
class Cell:
    """A cell that is no declared column: its header, and what it shows of a row."""

    header: str
    of: Callable[[Row], object]
    is_text: bool = False


@dataclass(frozen=True)
class View:
    """What a page shows of a frame.

    Args:
        cells: declared columns by name, or cells of their own; empty = every column.
        rows: which rows.
        note: said after the caption, from the whole frame.
        n_markdown: rows shown in markdown; None = all.
        is_list: a long list that readers sort and filter.
    """

    cells: tuple[str | Cell, ...] = ()
    rows: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame
    note: Callable[[pd.DataFrame], str] = lambda _: ""
    n_markdown: int | None = None
    is_list: bool = False


def frame_table(name: str, frame: pd.DataFrame, view: View | None = None, caption: str = "") -> Table:
    """A declared frame as a table.

    Args:
        name: the frame's, which its declaration is found by.
        view: what to show; by default as :data:`VIEWS` has it, else every column that ``frame`` has.
        caption: by default the declaration's.
    """
    spec = declared(name)
    view = view or VIEWS.get(name) or View(n_markdown=12, is_list=len(frame) > 12)
    shown = view.cells or [c for c in map(str, frame.columns) if not c.endswith(("_ci_low", "_ci_high"))]
    cells = [cell for one in shown for cell in _cells(spec, one, frame)]
    rows = [[cell.of(row) for cell in cells] for row in records(view.rows(frame))]
    right = [nth for nth, cell in enumerate(cells) if not cell.is_text]
    caption = (caption or spec.caption or f"one row per {spec.one_row_per}") + view.note(frame)
    headers = [cell.header for cell in cells]
    return table(headers, rows, right, caption, is_list=view.is_list, n_markdown=view.n_markdown)


def _cells(spec: FrameSpec, shown: str | Cell, frame: pd.DataFrame) -> list[Cell]:
    """A cell of its own, or a declared column with its interval."""
    if isinstance(shown, Cell):
        return [shown]
    column = spec[shown]
    value = Cell(column.header, lambda row: _text(column, row[shown]), column.kind == "text")
    if f"{shown}_ci_low" not in frame.columns:
        return [value]
    return [value, Cell("95 %", lambda row: _bounds(column, row))]


def _text(column: Column, value: Any) -> str | Markdown:
    return str(value) if column.kind == "text" else Markdown(column.text(value))


def _bounds(column: Column, row: Row) -> Markdown:
    low, high = (column.text(row[f"{column.name}_ci_{end}"]) for end in ("low", "high"))
    return Markdown(NONE if NONE in (low, high) else f"{low} to {high}")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def even_choice(frame: pd.DataFrame, n_rows: int) -> pd.DataFrame:
    """At most that many rows, evenly spread, the first and the last among them."""
    if len(frame) <= n_rows:
        return frame
    return frame.iloc[[round(i * (len(frame) - 1) / (n_rows - 1)) for i in range(n_rows)]]


def _layer(header: str = "layer (decoder)") -> Cell:
    return Cell(header, lambda row: _layer_words(row), is_text=True)


def _layer_words(row: Row) -> str:
    return "all" if row["layer"] == POOLED else f"{row['layer']:.0f} ({row['decoder_layer']:.0f})"


def _nearest_taus(curve: pd.DataFrame) -> pd.DataFrame:
    """Thresholds of the curve nearest to ratios that are easy to read."""
    nearest = {int((curve["threshold"] - math.log(tau)).abs().argmin()) for tau in _TAUS}
    return curve.iloc[sorted(nearest)]


def _pooled(frame: pd.DataFrame) -> pd.DataFrame:
    rows: pd.DataFrame = frame[frame["layer"] == POOLED]
    return rows


def _pooled_bins(curve: pd.DataFrame) -> pd.DataFrame:
    rows = _pooled(curve)
    return rows[rows["space"] == "choice"].sort_values(["bin_low", "bin_high"])


def _held_bins(curve: pd.DataFrame) -> pd.DataFrame:
    """Exact ties and an even choice of the margin bins that hold enough choices for a rate."""
    pooled = _pooled_bins(curve)
    return even_choice(pooled[pooled["n_choices"] >= MIN_CHOICES], 9)


def _thin_bins(curve: pd.DataFrame) -> str:
    pooled = _pooled_bins(curve)
    n_left = int(pooled.loc[pooled["n_choices"] < MIN_CHOICES, "n_choices"].sum())
    left = f"; bins of fewer than {MIN_CHOICES} are left out ({count(n_left, 'choice')})" if n_left else ""
    return f", an even choice of bins{left}"


def _margin_words(row: Row) -> str:
    if row["bin_high"] == 0:
        return "exactly 0 (tie)"
    if row["bin_low"] < 0:
        return "below 0"
    if math.isinf(row["bin_high"]):
        return f"{sig(row['bin_low'], 2)} and more"
    return f"{sig(row['bin_low'], 2)} to {sig(row['bin_high'], 2)}"


def _all_methods_then_best(frame: pd.DataFrame) -> pd.DataFrame:
    """All layers by every method, best first, then the best layer by layer."""
    return pd.concat([_pooled(frame), frame[(frame["method"] == best_method(frame)) & (frame["layer"] != POOLED)]])


def _method_words(row: Row) -> str:
    """The method and, once for all layers, why it could not predict or what it leaves out."""
    words = METHOD_WORDS.get(str(row["method"]), str(row["method"]))
    return f"{words}: {row['note']}" if row["note"] and row["layer"] == POOLED else words


def _first_method(frame: pd.DataFrame) -> pd.DataFrame:
    pooled = _pooled(frame)
    return pooled[pooled["method"] == pooled["method"].iloc[0]] if len(pooled) else pooled


def _span(name: str, header: str) -> Cell:
    return Cell(header, lambda row: f"{row[f'{name}_low']:.0f}–{row[f'{name}_high']:.0f}", is_text=True)


def _range(low: str, high: str, header: str) -> Cell:
    def words(row: Row) -> str:
        ends = [f"{row[end]:g}".replace("-inf", "−∞").replace("inf", "∞") for end in (low, high)]
        return " – ".join(dict.fromkeys(ends))

    return Cell(header, words)


def _of_row(header: str = "95 %") -> Cell:
    """The interval of a row whose unit is its own."""
    return Cell(header, lambda row: interval(row["ci_low"], row["ci_high"], str(row["unit"]), str(row.get("note", ""))))


def _ratio(log_ratio: float) -> Markdown:
    return Markdown(sig(math.exp(max(min(log_ratio, 700.0), -700.0)), 4))  # a long response may leave a float's range


def worst_token_view(texts: TokenTexts) -> View:
    """The tokens that differ most, with some text before them where it is at hand and allowed."""
    shown: tuple[str | Cell, ...] = (
        Cell("rank", lambda row: f"{row['rank'] + 1:.0f}"),
        "logp_diff",
        Cell("ratio", lambda row: _ratio(row["logp_diff"])),
        Cell("p infer", lambda row: Markdown(percent(math.exp(row["logp_infer"])))),
        Cell("p train", lambda row: Markdown(percent(math.exp(row["logp_train"])))),
        Cell("flips", lambda row: Markdown(NONE if row["n_flipped_layers"] < 0 else f"{row['n_flipped_layers']:.0f}")),
        *("first_flipped_layer", "seq_id", "position", "prompt_id"),
    )
    if not texts.is_withheld:
        before = Cell("before it", lambda row: _before(row, texts), is_text=True)
        shown = (*shown, before, Cell("token", lambda row: _token(row, texts), is_text=True))
    return View(
        shown,
        lambda frame: frame.head(N_WORST),
        lambda frame: f"; the first {min(len(frame), N_WORST)}",
        n_markdown=10,
        is_list=True,
    )


def _before(row: Row, texts: TokenTexts) -> Markdown:
    found = texts.of(int(row["seq_id"]), int(row["position"]))
    return Markdown(NONE) if found is None else code(visible(found.before, _LONGEST_CONTEXT, keep_end=True))


def _token(row: Row, texts: TokenTexts) -> Markdown:
    found = texts.of(int(row["seq_id"]), int(row["position"]))
    return code(f"id {row['token_id']}" if found is None else visible(found.token, _LONGEST_TOKEN))


def worst_sequences(frame: pd.DataFrame) -> pd.DataFrame:
    """The responses that differ most on average, the worst first."""
    scored = frame[frame["n_tokens"] > 0]
    order = ["abs_logp_diff_mean", "seq_id"]
    return scored.sort_values(order, ascending=[False, True], kind="stable").head(20)


_EXACT_WORDS: Final = {
    "kl_infer_train_exact": "KL(infer‖train), exact",
    "kl_train_infer_exact": "KL(train‖infer), exact",
    "total_variation_exact": "total variation, exact",
    "kl_infer_train_k1": "k1 of the same tokens",
    "kl_infer_train_k3": "k3 of the same tokens",
}

VIEWS: Final[dict[str, View]] = {
    "exact_divergences": View(
        (
            Cell("number", lambda row: _EXACT_WORDS.get(str(row["measure"]), str(row["measure"])), is_text=True),
            Cell("value", lambda row: number(row["value"], str(row["unit"]))),
            _of_row(),
            *("unit", "n_tokens", "direction"),
        ),
        note=lambda frame: f" ({count(frame['n_vocabulary'].iloc[0])} tokens)",
    ),
    "ladder": View(
        (Cell("rung", lambda row: plain(f"{row['rung']}: {row['compared']}"), is_text=True), "mean", "yardstick",
         "finding", "says", "n_tokens", "rules_out"),
    ),
    "layers_apart": View(
        (Cell("since", lambda row: plain(f"decoder layer {row['decoder_layer']:.0f}, {row['what']}"
                                         if row["decoder_layer"] >= 0 else str(row["what"])), is_text=True),
         "times_p50", "times_max", "beyond_share", "gates_p50", "gates_beyond_share", "infer_over_train", "n_rows"),
        n_markdown=12,
    ),
    "tail_curve": View(
        ("threshold", Cell("tau", lambda row: Markdown(sig(math.exp(row["threshold"])))), "share_above", "n_above",
         "n_tokens"),
        _nearest_taus,
    ),
    "ratio_quantiles": View(
        (Cell("ratio of", lambda row: str(row["level"]).replace("_", " "), is_text=True),
         Cell("quantile", lambda row: f"{100 * row['q']:g} %"), "log_ratio",
         Cell("ratio", lambda row: _ratio(row["log_ratio"]) if math.isfinite(row["log_ratio"]) else Markdown(NONE)),
         "n"),
        n_markdown=9,
    ),
    "agreement_by_layer": View(
        (_layer(), "same_set_rate", "cumulative_same_set_rate",
         Cell("overlap", lambda row: number(row["overlap"], "share")), "reorder_rate", "n_tokens"),
        n_markdown=48,
    ),
    "flips_per_token": View(
        ("n_flipped_layers", "share", "independent_share", "abs_logp_diff_mean", "abs_logp_diff_p99", "n_tokens"),
        lambda frame: frame[frame["n_tokens"] > 0],
    ),
    "expert_swaps": View(
        (_layer(), Cell("infer's → train's", lambda row: f"{row['expert_infer']:.0f} → {row['expert_train']:.0f}"),
         "n_swaps", "n_reverse", "share_of_flips", "n_flips"),
        lambda frame: frame.head(12),
    ),
    "margin_curve": View(
        (Cell("margin (choice score)", _margin_words, is_text=True), "flip_rate", "n_flipped", "n_choices"),
        _held_bins,
        _thin_bins,
    ),
    "margin_quantiles": View(("space", "group", "n_choices", "n_exact_ties", "p01", "p10", "p50", "p90", "p99")),
    "margin_noise": View(("space", "layer", "sigma", "n_flipped", "n_exact_ties", "n_choices")),
    "explained_flips": View(
        (_layer(), Cell("from", _method_words, is_text=True), "observed",
         Cell("explained", lambda row: number(row["explained"], "share")), "gap", "calibration_error",
         "calibration_error_expected", "n_choices"),
        _all_methods_then_best,
        n_markdown=20,
    ),
    "flip_calibration": View(
        (Cell("P(flip)", lambda row: f"{sig(row['bin_low'], 2)} to {sig(row['bin_high'], 2)}", is_text=True),
         "predicted", "observed", "n_choices"),
        _first_method,
    ),
    "forecast_flips": View(
        ("pair", Cell("if it had the", lambda row: source_words(row["noise_from"]), is_text=True), "forecast",
         "observed", "noise_observed", "n_choices", "assumption"),
        _pooled,
    ),
    "flip_excess": View(
        (
            Cell("flipped tokens by", lambda row: row["grouping"].replace("_", " "), is_text=True),
            _range("group_low", "group_high", "group"),
            *("flipped_mean", "unflipped_mean", "excess", "ratio", "raw_ratio", "n_tokens", "n_unmatched"),
        )
    ),
    "drift_by_position": View(
        (_span("position", "position"), "abs_logp_diff_mean", "abs_logp_diff_p50", "abs_logp_diff_p90",
         "abs_logp_diff_p99", "flip_rate", "n_tokens", "n_sequences"),
        lambda frame: even_choice(frame, 12),
    ),
    "drift_by_length": View(
        (_span("length", "tokens"), "log_ratio_mean", "abs_log_ratio_mean", "abs_log_ratio_p50", "abs_log_ratio_p90",
         "n_sequences"),
    ),
    "metrics_by_stratum": View(
        ("stratifier", _range("stratum_low", "stratum_high", "from – to"),
         Cell("mean [nat]", lambda row: Markdown(in_unit(row["value"], row["unit"]))), _of_row(), "n_tokens",
         "n_prompts", "direction"),
        lambda frame: frame[(frame["metric"] == "abs_logp_diff.mean") & (frame["n_tokens"] > 0)],
        n_markdown=24,
    ),
    "sequences": View(
        ("seq_id", "prompt_id", "sample_index", "abs_logp_diff_mean", "abs_logp_diff_max", "k3", "log_ratio_sum",
         "extreme_share_2", "flip_rate", "worst_position", "first_flip_position", "n_tokens"),
        worst_sequences,
        n_markdown=10,
        is_list=True,
    ),
    "corrections": View(
        (Cell("correction", lambda row: code(row["method"]), is_text=True), "masked_share", "below_share",
         "above_share", "n_tokens", "source"),
    ),
    "entropy_quantiles": View(
        ("side", "group", "mean", "p10", "p50", "p90", "n_tokens"),
        note=lambda frame: "; band of the ratio " + " and ".join(sig(frame[e].iloc[0], 2) for e in ("alpha", "beta")),
    ),
}  # fmt: skip
"""Frame -> what a page shows of it."""


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
