"""The short table that ``moediag simulate`` ends with, and what was found in words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moediag.results.simulation import Simulation

_HEADER: Final = (
    "correction", "masked [95 %]", "seqs", "below/above", "ESS", "mean w [95 %]", "k3 left", "entropy masked/kept",
    "precision/recall",
)  # fmt: skip
_UNITS: Final = ("", "of tokens", "of seqs", "of tokens", "tok/seq", "1", "nat", "nat", "of masked/of flipped")
_WIDTH: Final = 110


def show_simulation(simulation: Simulation) -> None:
    """Print what is wrong with the tokens, a row per correction, then sentences."""
    from moediag.cli.console import say
    from moediag.hygiene.findings import headline
    from moediag.report.tables import records

    for line in headline(simulation.source.findings):
        say(line)
    rows = [_HEADER, _UNITS, *(_cells(row) for row in records(simulation.frames["correction_statistics"]))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    for row in rows:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())
    say()
    show_sentences(simulation)


def show_sentences(simulation: Simulation) -> None:
    """Print what was found in words."""
    from moediag.report.simulation_page import sentences

    summary = simulation.summary()
    for line in [*sentences(summary, simulation.frames), *(f"Note: {note}." for note in summary["notes"])]:
        _say_filled(line)


def _say_filled(line: str) -> None:
    from moediag.cli.console import say

    say(textwrap.fill(line, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    from moediag.figures.numbers import percent, sig

    return (
        str(row["correction"]),
        percent(row["masked_share"]) + _interval(row, "masked_share", percent),
        percent(row["masked_sequence_share"]),
        f"{percent(row['below_share'])} / {percent(row['above_share'])}",
        f"{sig(row['ess_token'])} / {sig(row['ess_sequence'])}",
        sig(row["weight_mean"], 4) + _interval(row, "weight_mean", lambda value: sig(value, 4)),
        sig(row["kept_k3"]),
        f"{sig(row['entropy_masked'])} / {sig(row['entropy_kept'])}",
        f"{percent(row['precision'])} / {percent(row['recall'])}",
    )


def _interval(row: Mapping[str, Any], name: str, words: Any) -> str:
    from moediag.figures.numbers import is_number

    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    if not (is_number(low) and is_number(high)):
        return ""
    return f" [{words(low)}, {words(high)}]"
