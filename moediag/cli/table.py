"""The tables and sentences that commands end with; every table is laid out here and nowhere else."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moediag.analysis.metrics import METRICS, Metric
from moediag.cli.console import glued, say, say_table, unglued, wrapped
from moediag.cli.console import width as terminal_width
from moediag.diagnosis import LADDER
from moediag.diagnosis.verdict import next_commands
from moediag.hygiene.rules import NOTE
from moediag.numbers import NONE, count, in_unit, is_number
from moediag.report.measures import carried_words, label_of, text_origin
from moediag.report.sections import engines_compared

if TYPE_CHECKING:
    import pandas as pd

    from moediag.results.simulation import Simulation

Row = Mapping[str, Any]
Cell = Callable[[Metric], str]
"""What a column shows of a metric."""

_FIRST: Final = 0.34
"""Share of the terminal that the first column of numbers may take, where it must be broken."""
_GAP: Final = 2
_WORDS: Final = 110
"""Width of a table of words where there is no terminal [character]."""


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """A table for the terminal: the first column to the left, numbers to the right.

    On a terminal that is too narrow for it cells go on in the next line, broken between words and never inside a name
    or an interval; columns of numbers that find no room beside the others stand below them, with the first column
    again; a table of words becomes a list. In a pipe no cell of numbers is broken, and words of a table are only where
    they are longer than its share.

    Args:
        width: longest line elsewhere than on a terminal [character], of a table of words, all of whose columns are to
            the left; None = numbers.
    """
    cells = [[glued(cell) for cell in row] for row in (header, *rows)]
    columns = range(len(header))
    longest = [max(len(row[nth]) for row in cells) for nth in columns]
    room = terminal_width() or width
    if room is None or sum(longest) + _GAP * (len(longest) - 1) <= room:
        return unglued(_laid_out(cells, columns, dict(enumerate(longest)), width is not None))
    needed = [max(len(word) for row in cells for word in row[nth].split(" ")) for nth in columns]
    if width is not None:
        gaps = _GAP * (len(needed) - 1)
        is_list = terminal_width() is not None and sum(needed) + gaps > room
        panels = [] if is_list else [list(columns)]
        if sum(needed) + gaps > room:  # elsewhere a row stays beside its name, and only what is very long is broken
            needed = [min(one, (room - gaps) // len(needed)) for one in needed]
    else:
        longest[0] = needed[0] = min(longest[0], max(needed[0], int(_FIRST * room)))
        panels = _panels(needed, room)
    shown = [_laid_out(cells, one, _shared(one, needed, longest, room), width is not None) for one in panels]
    return unglued("\n\n".join(shown or [_listed(cells, room)]))


def _panels(needed: Sequence[int], room: int) -> list[list[int]]:
    """Columns that stand beside each other, the first in every panel."""
    panels, left = [[0]], room - needed[0]
    for nth in range(1, len(needed)):
        if left < needed[nth] + _GAP and len(panels[-1]) > 1:
            panels.append([0])
            left = room - needed[0]
        panels[-1].append(nth)
        left -= needed[nth] + _GAP
    return panels


def _shared(panel: Sequence[int], needed: Sequence[int], longest: Sequence[int], room: int) -> dict[int, int]:
    """Widths of a panel's columns: what each needs, and what is left to the narrowest that are cut."""
    widths = {nth: min(needed[nth], longest[nth]) for nth in panel}
    left = room - sum(widths.values()) - _GAP * (len(panel) - 1)
    while left > 0 and (cut := [nth for nth in panel if widths[nth] < longest[nth]]):
        widths[min(cut, key=widths.__getitem__)] += 1
        left -= 1
    return widths


def _laid_out(cells: Sequence[Sequence[str]], panel: Sequence[int], widths: Mapping[int, int], is_words: bool) -> str:
    lines = []
    for nth_row, row in enumerate(cells):
        if nth_row and not is_words and {row[nth] for nth in panel[1:]} <= {"", NONE}:
            continue
        parts = [textwrap.wrap(row[nth], max(widths[nth], 1), break_long_words=is_words, break_on_hyphens=False) or [""]
                 for nth in panel]  # fmt: skip
        for line in zip_longest(*parts, fillvalue=""):
            aligned = (
                text.ljust(widths[nth]) if is_words or nth == 0 else text.rjust(widths[nth])
                for nth, text in zip(panel, line, strict=True)
            )
            lines.append((" " * _GAP).join(aligned).rstrip())
    return "\n".join(lines)


def _listed(cells: Sequence[Sequence[str]], room: int) -> str:
    """A row as a list: its first two cells, then every other one below its header."""
    header, *rows = cells
    name = max(map(len, header[2:]), default=0)
    lines = []
    for row in rows:
        lines.append(wrapped("  ".join(filter(None, row[:2])), room))
        for title, cell in zip(header[2:], row[2:], strict=True):
            if cell:
                lines.append(wrapped(f"    {title.ljust(name)}  {cell}", room, name + 2))
    return "\n".join(lines)


def show_verdict(label: str, summary: dict[str, Any], run: Path) -> None:
    """Is something wrong, where, what next.

    Args:
        run: the run's folder, for the commands.
    """
    verdict = summary.get("verdict")
    if not verdict:
        return
    if weights := verdict.get("weights"):  # before anything else
        say(f"{label}: {weights}")
    say(f"{label}: {verdict['word']}")
    then = verdict.get("next") or {"words": "", "commands": []}
    commands = ", ".join(next_commands(summary, str(run)))
    lines = [
        ("", verdict["reason"]),
        ("where: ", verdict.get("where", "")),
        ("next: ", f"{then['words']}{': ' if commands else ''}{commands}"),
    ]
    # the first cause is what the verdict speaks of
    others = [one for one in verdict.get("causes", ()) if one["level"] != NOTE][1:]
    lines += [("also: ", f"{one['level']} {one['rule']}: {one['message']}") for one in others]
    for name, words in lines:
        if words:
            say(f"  {name}{words}")


def show_ladder(frame: pd.DataFrame, seconds: Callable[[Sequence[str]], float | None]) -> None:
    """The ladder, a row per rung.

    Args:
        seconds: engine time of some arms, None = not known.
    """
    columns = [LADDER[name] for name in ("rung", "compared", "mean", "yardstick", "finding", "says")]
    rows = []
    for row in frame.to_dict("records"):
        cost = seconds([arm for arm in row["arms"].split(", ") if arm])
        rows.append([*(column.text(row[column.name]) for column in columns), "" if cost is None else f"{cost:.3g} s"])
    say_table(table_text([*(column.header for column in columns), "cost"], rows, width=_WORDS))


def show_table(summaries: dict[str, dict[str, Any]], folders: Sequence[Path]) -> None:
    """The verdicts, then the headline numbers, one column per run with its floor and its replay beside it.

    Args:
        folders: of the runs, in their order, for the commands.
    """
    for (label, summary), run in zip(summaries.items(), folders, strict=True):
        show_verdict(label, summary, run)
    say()
    columns = {title: column for label, summary in summaries.items() for title, column in _columns(label, summary)}
    pairs = [summary["pairs"][summary["main_pair"]] for summary in summaries.values()]
    origin = " or ".join(sorted({text_origin(summary) for summary in summaries.values()} - {""}))
    rows = [
        [label_of(metric, origin) + ("" if metric.is_share else f" [{metric.unit}]"), *cells]
        for metric in _shown()
        if set(cells := [column(metric) for column in columns.values()]) != {NONE}
    ]
    for noun in ("token", "prompt"):
        of_run = dict(zip(summaries, (count(pair[f"n_{noun}s"]) for pair in pairs), strict=True))
        rows.append([f"{noun}s compared", *(of_run.get(title, "") for title in columns)])
    say_table(table_text([" or ".join(sorted({s["main_pair"] for s in summaries.values()})), *columns], rows))
    for label, summary in summaries.items():
        for line in _words(summary):
            say(f"{label}: {line}")


def _shown() -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.is_headline or metric.on_terminal]


def _columns(label: str, summary: dict[str, Any]) -> Iterator[tuple[str, Cell]]:
    pairs, floors = summary["pairs"], summary.get("floors")
    yield label, partial(_cell, pairs[summary["main_pair"]])
    if floors:
        yield f"{label}: floor", partial(_floor_cell, floors["metrics"])
    if floors and floors["rounding"]:
        yield f"{label}: rounding", partial(_cell, pairs[floors["rounding"]["pair"]])
    if (replayed := summary.get("replay_pair")) is not None:
        yield f"{label}: replay", partial(_cell, pairs[replayed])


def _words(summary: dict[str, Any]) -> Iterator[str]:
    """Engines, verdict, means that hang on one prompt, and what the further A/A pairs say."""
    yield engines_compared(summary)
    yield from (f"  {line}" for line in (summary.get("verdict") or {}).get("evidence") or ())
    for metric in _shown():
        if words := carried_words(metric.largest_share(summary["pairs"][summary["main_pair"]])):
            yield f"{metric.label}: {words} of it; other samples of such prompts may lie outside the interval"
    floors = summary.get("floors") or {}
    prefilled = floors.get("decode_vs_prefill")
    if prefilled:
        far = "bit-exact" if prefilled["is_bit_exact"] else f"mean abs logp diff {prefilled['mean']:.3g} nat"
        yield f"decode against prefill inside {prefilled['engine']}: {far} (n = {prefilled['n_tokens']:,} tokens)"
    forced = floors.get("forced_settings")
    if forced:
        far = "nothing" if forced["is_bit_exact"] else f"mean abs logp diff {forced['mean']:.3g} nat"
        what = f"what the settings that capture forces on {forced['engine']} changed"
        yield f"{what}: {far} (n = {forced['n_tokens']:,} tokens)"
    for line in floors.get("noise") or []:
        if line == floors["rounding"]:
            continue
        flips = "" if line["flip_rate"] is None else f", flip rate {line['flip_rate']:.3g}"
        yield f"noise scale, {line['what']}: mean abs logp diff {line['mean']:.3g} nat{flips}"


def _floor_cell(metrics: dict[str, Any], metric: Metric) -> str:
    """Floor, and the multiple of it where there is one; half a floor says which side it lacks."""
    line = metrics.get(metric.name)
    if line is None or line["floor"] is None:
        return NONE
    if line["is_bit_exact"]:
        return "bit-exact"
    ratio = "" if line["ratio"] is None else f" ({line['ratio']:.3g}x)"
    return f"{in_unit(line['floor'], metric.shown_unit)}{ratio}" + (f" {line['note']}" if line["note"] else "")


def _cell(pair: dict[str, Any], metric: Metric) -> str:
    return in_unit(metric.value(pair), metric.shown_unit) + _ends(metric.bounds(pair), metric.shown_unit)


def _ends(bounds: Sequence[object] | None, unit: str) -> str:
    if bounds is None or not all(map(is_number, bounds)):
        return ""
    return f" [{', '.join(in_unit(end, unit) for end in bounds)}]"


_SIMULATED: Final = (
    ("masked_share",), ("masked_sequence_share",), ("below_share", "above_share"), ("ess_token", "ess_sequence"),
    ("weight_mean",), ("kept_k3",), ("entropy_masked", "entropy_kept"), ("precision", "recall"),
)  # fmt: skip
"""Columns of frame ``correction_statistics`` that the terminal shows; two in one cell where they belong together."""


def show_simulation(simulation: Simulation) -> None:
    """Print what is wrong with the tokens, a row per correction, then sentences."""
    from moediag.corrections.statistics import CORRECTION_STATISTICS
    from moediag.hygiene.findings import headline
    from moediag.report.tables import records

    for line in headline(simulation.source.findings):
        say(line)

    def cell(row: Row, names: Sequence[str]) -> str:
        texts = [CORRECTION_STATISTICS[name].text(row[name]) for name in names]
        ends = [row.get(f"{names[0]}_ci_{end}") for end in ("low", "high")] if len(names) == 1 else None
        column = CORRECTION_STATISTICS[names[0]]
        return " / ".join(texts) + _ends(ends, "share" if column.kind == "share" else column.unit)

    frame = simulation.frames["correction_statistics"]
    header = [
        " / ".join(CORRECTION_STATISTICS[name].header for name in names)
        + (" [95 %]" if len(names) == 1 and f"{names[0]}_ci_low" in frame else "")
        for names in _SIMULATED
    ]
    rows = [[str(row["correction"]), *(cell(row, names) for names in _SIMULATED)] for row in records(frame)]
    say_table(table_text(["correction", *header], rows))
    say()
    show_sentences(simulation)


def show_sentences(simulation: Simulation) -> None:
    """Print what was found in words."""
    from moediag.report.simulation_page import sentences

    summary = simulation.summary()
    for line in [*sentences(summary, simulation.frames), *(f"Note: {note}." for note in summary["notes"])]:
        say(line)
