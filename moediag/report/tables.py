"""Markdown that is safe by construction: user text is neutralised, tables are built, never pasted.

Invariant: only :class:`Markdown` is trusted as markup. Any other text, whatever its origin (a model path, a
prompt's name, an engine's version string), goes through :func:`plain` or :func:`code` first.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pandas as pd

from moediag.figures.numbers import NONE, count, is_number, percent, sig

MAX_TEXT: Final = 300
"""User text longer than this is cut: a report is no place for a pasted prompt."""

_UNSEEN: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that can make a page lie, or cannot be written: control, direction, half characters."""

_ACTIVE: Final = re.compile(r"([\\`*_\[\]#|~$!@{}])")


class Markdown(str):
    """Text that is markup on purpose; whoever makes one vouches for what went into it."""

    __slots__ = ()


def one_line(text: object) -> str:
    """Text as one line without control and direction characters (they can make a page lie), cut if long."""
    kept = (" " if unicodedata.category(c) in _UNSEEN else c for c in str(text))
    line = " ".join("".join(kept).split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def plain(text: object) -> Markdown:
    r"""User text as literal text: no markup, no HTML, no automatic link.

    Example:
        >>> plain("<b>*x*</b> | [a](https://e.org)")
        '&lt;b&gt;\\*x\\*&lt;/b&gt; \\| \\[a\\](https\\://e.org)'
    """
    line = _ACTIVE.sub(r"\\\1", one_line(text))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(line.replace("://", r"\://").replace("www.", r"www\."))


def code(text: object) -> Markdown:
    r"""User text as a code span, whatever backticks and pipes it holds.

    Example:
        >>> code("a`b|c")
        '``a`b\\|c``'
    """
    line = one_line(text)
    if not line:
        return Markdown(NONE)
    fence = _fence(line)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    # A pipe ends a table cell even inside a code span; GitHub takes the backslash off again.
    return Markdown(f"{fence}{pad}{line}{pad}{fence}".replace("|", r"\|"))


def shell_block(commands: Iterable[str]) -> Markdown:
    """Commands to copy, whole: one that is cut or re-spaced would be another command."""
    kept = ("".join("?" if unicodedata.category(c) in _UNSEEN else c for c in line) for line in commands)
    body = "\n".join(kept)
    fence = _fence(body, 3)
    return Markdown(f"{fence}sh\n{body}\n{fence}")


def _fence(text: str, least: int = 1) -> str:
    """Backticks that no run of them in ``text`` can close."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> Markdown:
    """A GitHub table; columns in ``right`` are right-aligned; cells that are not Markdown are neutralised.

    Example:
        >>> print(table(["what", "n"], [["a|b", "3"]], right=[1]))
        | what | n |
        |:--|--:|
        | a\\|b | 3 |
    """
    aligned = set(right)
    rule = "|".join("--:" if i in aligned else ":--" for i in range(len(header)))
    lines = [f"| {' | '.join(map(_cell, header))} |", f"|{rule}|"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return Markdown("\n".join(lines))


def _cell(value: object) -> str:
    return value if isinstance(value, Markdown) else plain(value)


def folded(title: str, body: str) -> Markdown:
    """A block that GitHub shows folded under its title."""
    return Markdown(f"<details><summary>{title}</summary>\n\n{body}\n\n</details>")


def number(value: Any, unit: str = "nat") -> Markdown:
    """A value in its unit's habit: shares as per cent, anything else with three significant digits."""
    if not is_number(value):
        return Markdown(NONE)
    return Markdown(percent(value) if unit == "share" else sig(value))


def interval(low: Any, high: Any, unit: str = "nat", note: str = "") -> Markdown:
    """``low to high``, or the en dash with the reason."""
    if is_number(low) and is_number(high):
        if unit != "share" and abs(low - 1) < 0.01 and abs(high - 1) < 0.01:
            return Markdown(f"{sig(low, 5)} to {sig(high, 5)}")  # a ratio near 1: three digits would say 1.00
        return Markdown(f"{number(low, unit)} to {number(high, unit)}")
    return Markdown(f"{NONE} ({plain(note)})" if note else NONE)


def agreement_table(frame: pd.DataFrame) -> Markdown:
    """Per layer: same-set rate, cumulative rate, overlap, reorder rate, each with its interval."""
    rows = [
        [
            f"{row['layer']:.0f} ({row['decoder_layer']:.0f})",
            *_rate(row, "same_set_rate"),
            *_rate(row, "cumulative_same_set_rate"),
            number(row["overlap"], "share"),
            number(row["reorder_rate"], "share"),
            count(row["n_tokens"]),
        ]
        for row in _records(frame)
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
    return table(header, rows, right=range(1, len(header)))


def _rate(row: Mapping[str, Any], name: str) -> list[Markdown]:
    return [number(row[name], "share"), interval(row[f"{name}_ci_low"], row[f"{name}_ci_high"], "share")]


def margin_quantile_table(frame: pd.DataFrame) -> Markdown:
    """Margins of all, flipped and kept choices, in both score spaces."""
    rows = [
        [row["space"], row["group"], count(row["n_choices"]), count(row["n_exact_ties"])]
        + [number(row[q]) for q in ("p01", "p10", "p50", "p90", "p99")]
        for row in _records(frame)
    ]
    header = ["score", "choices", "n", "exact ties", "p1", "p10", "median", "p90", "p99"]
    return table(header, rows, right=range(2, 9))


def flip_bin_table(curve: pd.DataFrame, n_lowest: int = 6) -> Markdown:
    """P(flip) of exact ties and of the lowest margin bins that hold choices, pooled, and of the highest."""
    pooled = curve[(curve["layer"] == -1) & (curve["space"] == "choice") & (curve["n_choices"] > 0)]
    pooled = pooled.sort_values(["bin_low", "bin_high"])
    shown = pooled if len(pooled) <= n_lowest + 1 else pd.concat([pooled.head(n_lowest), pooled.tail(1)])
    rows = [
        [_margin_words(row), *_rate(row, "flip_rate"), count(row["n_flipped"]), count(row["n_choices"])]
        for row in _records(shown)
    ]
    return table(["margin (choice score)", "P(flip)", "95 %", "flipped", "n choices"], rows, right=range(1, 5))


def _margin_words(row: Mapping[str, Any]) -> str:
    if row["bin_high"] == 0:
        return "exactly 0 (tie)"
    if row["bin_low"] < 0:
        return "below 0"
    if math.isinf(row["bin_high"]):
        return f"{sig(row['bin_low'], 2)} and more"
    return f"{sig(row['bin_low'], 2)} to {sig(row['bin_high'], 2)}"


def drift_table(frame: pd.DataFrame, n_rows: int = 12) -> Markdown:
    """abs(logp_diff) by position; of many bins, an even choice with the first and the last."""
    if len(frame) > n_rows:
        frame = frame.iloc[[round(i * (len(frame) - 1) / (n_rows - 1)) for i in range(n_rows)]]
    name = "abs_logp_diff_mean"
    rows = [
        [f"{row['position_low']:.0f}–{row['position_high']:.0f}", number(row[name])]
        + [interval(row[f"{name}_ci_low"], row[f"{name}_ci_high"])]
        + [number(row[f"abs_logp_diff_{q}"]) for q in ("p50", "p90", "p99")]
        + [number(row["flip_rate"], "share"), count(row["n_tokens"]), count(row["n_sequences"])]
        for row in _records(frame)
    ]
    header = ["position", "mean [nat]", "95 %", "p50", "p90", "p99", "flip rate", "n tokens", "n sequences"]
    return table(header, rows, right=range(1, 9))


def correction_table(frame: pd.DataFrame) -> Markdown:
    """What each band would mask, below and above, with the source of its preset."""
    rows = [
        [
            code(row["method"]),
            *_rate(row, "masked_share"),
            number(row["below_share"], "share"),
            number(row["above_share"], "share"),
            count(row["n_tokens"]),
            row["source"],
        ]
        for row in _records(frame)
    ]
    header = ["correction", "masked", "95 %", "below the band", "above the band", "n tokens", "preset from"]
    return table(header, rows, right=range(1, 6))


def facts_table(facts: Mapping[str, Any]) -> Markdown:
    """Nested facts as dotted names and values; empty branches are left out."""
    return table(["what", "value"], [[code(name), code(value)] for name, value in _flat(facts)])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
