"""How objects show themselves: one description, as text on a terminal and as a table in a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from html import escape

import pandas as pd

from moediag.errors import MoediagError
from moediag.run import reader

_LINE = 118
"""Characters of a line of text."""


def _text_rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """``name  words`` with the words wrapped beside the names."""
    some = list(rows)
    width = max((len(name) for name, _ in some), default=0) + 2
    lines = []
    for name, words in some:
        wrapped = textwrap.wrap(words, _LINE - width, break_on_hyphens=False) or [""]
        lines += [f"{name:<{width}}{wrapped[0]}", *(" " * width + line for line in wrapped[1:])]
    return lines


def _html_rows(rows: Iterable[tuple[str, str]]) -> str:
    cells = (
        f'<tr><th style="text-align:left; vertical-align:top">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(words)}</td></tr>'
        for name, words in rows
    )
    return f"<table>{''.join(cells)}</table>"


class Headlines(dict[str, str]):
    """Topic -> sentence, in the order in which they are to be read."""

    def __repr__(self) -> str:
        return "\n".join(_text_rows(self.items())) or "nothing was found"

    def _repr_html_(self) -> str:
        return _html_rows(self.items())


class Shown:
    """An object that shows itself by a title, named lines of text and a table."""

    def _shown(self) -> tuple[str, list[tuple[str, str]], pd.DataFrame | None]:
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows, table = self._shown()
        lines = [title, *_text_rows(rows)]
        if table is not None:
            lines += ["", _text(table)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title, rows, table = self._shown()
        below = "" if table is None else table.to_html(border=0, float_format=_number)
        return f"<strong>{escape(title)}</strong>{_html_rows(rows)}{below}"


def _text(table: pd.DataFrame) -> str:
    return table.to_string(float_format=_number, max_colwidth=_LINE // 2)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"  # counts whole


def counted(n: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "sequence"), counted(19395, "token")
        ('1 sequence', '19,395 tokens')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def described_arms(run: reader.Run) -> pd.DataFrame:
    """One row per arm: its record's role, engine and path, what it changes, its origin, and how far it is captured."""
    rows = []
    for name in run.arms():
        covered = run.shards_of(name)
        shards = f"{len(covered) - len(run.missing_shards(name))} of {len(covered)}"
        try:
            arm = run.arm(name)
        except MoediagError as error:
            rows.append((name, "cannot be read", "", "", str(error), "", shards))
            continue
        change = f"{arm.change} of {arm.variant_of}" if arm.change else ""
        rows.append((name, arm.role, arm.engine, arm.path, change, arm.origin.kind, shards))
    columns = ["arm", "role", "engine", "path", "change", "origin", "shards"]
    return pd.DataFrame(rows, columns=columns).set_index("arm")
