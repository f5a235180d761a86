"""Both yardsticks on the page: where floors and rounding scale come from, and what else an engine's own pairs tell.

Invariant: a side that was not measured is said; a floor of exactly 0 is called bit-exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from moediag.figures.style import NO_FLOOR
from moediag.numbers import count, is_number
from moediag.report.blocks import Block, Table, number, table
from moediag.report.measures import BIT_EXACT, NOT_MEASURED, Summary
from moediag.report.text import Markdown, code, plain

NO_FLOOR_WORDS: Final = Markdown(
    f"{NO_FLOOR[:1].upper()}{NO_FLOOR[1:]} in this run: how much of this each engine would show against itself is "
    "not known, see [What these numbers cannot show](#limits)."
)

RULE_WORDS: Final = Markdown(
    "Floor of a mean or of a rate: train's plus infer's (triangle bound); of a tail or a divergence, which obey no "
    "such bound: the larger of the two. A multiple is given only of a floor whose engine differs from itself on most "
    "tokens: else it counts how often two batches happen to be bit-equal. The rounding scale is the same number for "
    "the smallest change of arithmetic there is, one unit in the last place: it says what is ordinary for this model."
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
    rounding = floors.get("rounding")
    scale = f"mean {number(rounding.get('mean'))} nat" if rounding else NOT_MEASURED
    return Markdown(
        f"Floors: {'; '.join(_side_words(side, floors.get(side)) for side in _SIDES)}. Rounding scale: {scale}."
    )


def _side_words(side: str, line: Mapping[str, Any] | None) -> str:
    if not line:
        return f"{side}'s was not measured"
    share = line.get("bit_exact_share")
    exact = f", bit-exact on {number(share, 'share')} of tokens" if is_number(share) else ""
    size = BIT_EXACT if line.get("is_bit_exact") else f"mean {number(line.get('mean'))} nat{exact}"
    return f"{side}'s from {code(line.get('pair'))} ({plain(line.get('what') or '')}): {size}"


def floor_blocks(summary: Summary) -> list[Block]:
    """Every A/A pair in a line, then the rule; a statement where there is none."""
    floors: Mapping[str, Any] = summary.get("floors") or {}
    rows = [_row(f"floor of {side}", floors.get(side)) for side in _SIDES]
    rows += [_row("decode against prefill", floors["decode_vs_prefill"])] if floors.get("decode_vs_prefill") else []
    forced = floors.get("forced_settings")
    rows += [_row("settings that capture forces", forced)] if forced else []
    rounded = (floors.get("rounding") or {}).get("arm")
    rows += [
        _row("rounding scale" if line.get("arm") == rounded else "noise scale", line)
        for line in floors.get("noise") or ()
    ]
    if not rows[2:] and not any(floors.get(side) for side in _SIDES):
        return [NO_FLOOR_WORDS]
    words = (
        "Each pair compares one engine with itself. Noise scales perturb one engine on purpose: they say how far "
        "harmless arithmetic moves the numbers, and are no floor."
    )
    return [_table(rows), RULE_WORDS, Markdown(words)]


def _table(rows: Sequence[Sequence[object]]) -> Table:
    header = ["what", "pair", "what changes", "mean [nat]", "p99 [nat]", "max [nat]", "bit-exact tokens", "flip rate",
              "n tokens"]  # fmt: skip
    return table(header, rows, range(3, 9), "Each engine against itself: abs(logp_diff) and flips; lower is better")


def _row(what: str, line: Mapping[str, Any] | None) -> list[object]:
    if not line:
        return [what, Markdown(NOT_MEASURED), *[number(None)] * 7]
    values = [number(line.get(name)) for name in ("mean", "p99", "max")]
    if line.get("is_bit_exact"):
        values[0] = Markdown(f"0 ({BIT_EXACT})")
    n = line.get("n_tokens")
    return [
        what,
        code(line.get("pair")),
        line.get("what") or "",
        *values,
        number(line.get("bit_exact_share"), "share"),
        number(line.get("flip_rate"), "share"),
        count(n if is_number(n) else None),
    ]
