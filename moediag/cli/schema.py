"""``moediag schema``: every frame's columns with dtype, unit and meaning."""

from __future__ import annotations

from dataclasses import asdict

from moediag.cli import options as o

NAME = "schema"


def command(as_json: o.Json = False) -> None:
    """Print the declared frames: what one row is, and every column's dtype, unit and meaning."""
    import moediag.analysis
    import moediag.corrections  # noqa: F401 - both declare their frames
    from moediag.cli.console import say, say_json
    from moediag.frames import declared_frames

    if as_json:
        say_json([asdict(spec) for spec in declared_frames()])
        return
    for spec in declared_frames():
        say(f"{spec.name}: one row per {spec.one_row_per}")
        for column in spec.columns:
            empty = "; may be empty" if column.nullable else ""
            say(f"    {column.name:<32} {column.dtype:<8} [{column.unit}]  {column.meaning}{empty}")
        say()
