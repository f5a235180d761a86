"""The tables of reports/corrections.md, written from the declarations of methods and presets.

Invariant: what the report says of a method or a preset is what the code does; a test compares the two.

Usage: python -m moediag.corrections.document reports/corrections.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from moediag.corrections.methods import METHODS, Method
from moediag.corrections.presets import PRESETS

_BLOCK: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def methods_table() -> str:
    """Every method in one notation."""
    header = ("method (defaults)", "kind", "bound on", "weight", "beyond the bound", "source")
    return _table(header, (_method_row(method) for method in METHODS.values()))


def presets_table() -> str:
    """Every preset with its source and what is different there."""
    rows = ((f"`{p.name}`", p.group, f"`{p.words}`", p.source, p.note or "-") for p in PRESETS.values())
    return _table(("preset", "framework or paper", "correction", "source", "what is different there"), rows)


def filled(text: str) -> str:
    """A text with its marked tables written anew."""
    tables = {"methods": methods_table, "presets": presets_table}
    return _BLOCK.sub(lambda found: f"{found[1]}\n{tables[found[2]]()}\n{found[3]}", text)


def _method_row(method: Method) -> tuple[str, ...]:
    defaults = ", ".join(f"{name} = {value:g}" for name, value in method.parameters.items())
    name = f"`{method.name}`" + (f" ({defaults})" if defaults else "")
    return name, method.kind, method.bounded.words, f"`{method.formula}`", method.beyond, method.source


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple(":--" for _ in header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    report = Path(sys.argv[1])
    report.write_text(filled(report.read_text()))
