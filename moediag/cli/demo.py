"""``moediag demo``: the whole story on a pair made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "demo"


def command(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for everything.")] = Path(
        "moediag-demo"
    ),
    no_text: o.NoText = False,
    force: o.Force = False,
) -> None:
    """Train a tiny MoE and a dense model, profile both in both engines, compare: no download, no GPU."""
    from moediag.cli.story import tell

    tell(output, force, no_text)
