"""Noise floors on the page: where they come from, and what else was measured against the same engine.

Invariant: a side that was not measured is said; a floor of exactly 0 is called bit-exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from moediag.figures.numbers import count, is_number
from moediag.figures.style import NO_FLOOR
from moediag.report.blocks import Block, Table, number, table
from moediag.report.measures import BIT_EXACT, NOT_MEASURED, Summary
from moediag.report.text import Markdown, code, plain

NO_FLOOR_WORDS: Final = Markdown(
    f"{NO_FLOOR[:1].upper()}{NO_FLOOR[1:]} in this run: how much of this each engine would show against itself is "
    "not known, see [What these numbers cannot show](#limits)."
)

RULE_WORDS: Final = Markdown(
    "Floor of a mean or of a rate: train's plus infer's (triangle bound); of a tail or a divergence, which obey no "
    "such bound: the larger of the two. × floor is the number over its floor; a bit-exact floor gives no ratio."
)

_SIDES: Final = ("train", "infer")


def has_floor(summary: Summary) -> bool:
    """Whether at least one engine was compared with itself."""
    floors = summary.get("floors") or {}
    return any(floors.get(side) for side in _SIDES)


def floor_words(summary: Summary) -> Markdown:
    """One paragraph for the first screen: what each engine was compared with."""
    if not has_floor(summary):
        return NO_FLOOR_WORDS
    floors: Mapping[str, Any] = summary["floors"]
    return Markdown(f"Floors: {'; '.join(_side_words(side, floors.get(side)) for side in _SIDES)}.")


def _side_words(side: str, line: Mapping[str, Any] | None) -> str:
    if not line:
        return f"{side}'s was not measured"
    size = BIT_EXACT if line.get("is_bit_exact") else f"mean {number(line.get('mean'))} nat"
    return f"{side}'s from {code(line.get('pair'))} ({plain(line.get('what') or '')}): {size}"


def floor_blocks(summary: Summary) -> list[Block]:
    """Every A/A pair in a line, then the rule; a statement where there is none."""
    floors: Mapping[str, Any] = summary.get("floors") or {}
    rows = [_row(f"floor of {side}", floors.get(side)) for side in _SIDES]
    rows += [_row("decode against prefill", floors["decode_vs_prefill"])] if floors.get("decode_vs_prefill") else []
    rows += [_row("noise scale", line) for line in floors.get("noise") or ()]
    if not any(floors.get(key) for key in (*_SIDES, "decode_vs_prefill", "noise")):
        return [NO_FLOOR_WORDS]
    words = (
        "Each pair compares one engine with itself. Noise scales perturb one engine on purpose: they say how far "
        "harmless arithmetic moves the numbers, and are no floor."
    )
    return [_table(rows), RULE_WORDS, Markdown(words)]


def _table(rows: Sequence[Sequence[object]]) -> Table:
    header = ["what", "pair", "what changes", "mean [nat]", "p99 [nat]", "max [nat]", "flip rate", "n tokens"]
    return table(header, rows, range(3, 8), "Each engine against itself: abs(logp_diff) and flips; lower is better")


def _row(what: str, line: Mapping[str, Any] | None) -> list[object]:
    if not line:
        return [what, Markdown(NOT_MEASURED), *[number(None)] * 6]
    values = [number(line.get(name)) for name in ("mean", "p99", "max")]
    if line.get("is_bit_exact"):
        values[0] = Markdown(f"0 ({BIT_EXACT})")
    n = line.get("n_tokens")
    return [
        what,
        code(line.get("pair")),
        line.get("what") or "",
        *values,
        number(line.get("flip_rate"), "share"),
        count(n if is_number(n) else None),
    ]
