"""The tables of reports/corrections.md, written from the declarations of methods and presets; a test holds them to it.

Usage: python tests/correction_tables.py
"""

from __future__ import annotations

from committed_tables import commit_table, markdown

from moediag.corrections import METHODS, PRESETS, Method


def correction_tables() -> dict[str, str]:
    """Every method in one notation, and every preset with its source and what is different there."""
    methods = markdown(
        ("method (defaults)", "kind", "bound on", "weight", "beyond the bound", "source"),
        (
            (_name(method), method.kind, method.bounded.words, f"`{method.formula}`", method.beyond, method.source)
            for method in METHODS.values()
        ),
    )
    presets = markdown(
        ("preset", "framework or paper", "correction", "source", "what is different there"),
        ((f"`{p.name}`", p.group, f"`{p.words}`", p.source, p.note or "-") for p in PRESETS.values()),
    )
    return {"methods": methods, "presets": presets}


def _name(method: Method) -> str:
    defaults = ", ".join(f"{name} = {value:g}" for name, value in method.parameters.items())
    return f"`{method.name}`" + (f" ({defaults})" if defaults else "")


if __name__ == "__main__":
    for name, table in correction_tables().items():
        commit_table("corrections.md", name, table)
