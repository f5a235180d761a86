"""What every command shares: the progress bar on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def say(text: str = "") -> None:
    """A result, on stdout."""
    print(text)


def say_json(content: Any) -> None:
    """A result as JSON, on stdout."""
    print(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """A remark about what goes on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def wrote(path: Path) -> None:
    """Say where a result is."""
    say(f"Wrote {path}")


class Bar:
    """One line of progress; follows an engine's events."""

    def __init__(self, progress: Any, task: Any, title: str) -> None:
        self._progress = progress
        self._task = task
        self._title = title

    def on_event(self, event: dict[str, Any]) -> None:
        """Show an engine's event."""
        if "note" in event:
            note(event["note"])
        elif "stage" in event:
            self._progress.update(self._task, description=f"{self._title}: {event['stage']}")
        else:
            self.show(event["done"], event["total"], event["unit"])

    def show(self, done: float, total: int, unit: str) -> None:
        """Show how far it is."""
        description = f"{self._title}: {int(done)}/{total} {unit}"
        self._progress.update(self._task, completed=done, total=total, description=description)


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A progress bar with remaining time on stderr; plain lines where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(title, total=None), title)


class _Lines(Bar):
    """Progress for logs: a line per stage and per quarter done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._quarter, self._unit = -1, ""

    def on_event(self, event: dict[str, Any]) -> None:
        if "note" in event:
            note(event["note"])
        elif "stage" in event:
            note(f"{self._title}: {event['stage']}")
        else:
            self.show(event["done"], event["total"], event["unit"])

    def show(self, done: float, total: int, unit: str) -> None:
        quarter = int(4 * done / total) if total else 4
        if quarter > self._quarter or unit != self._unit:
            self._quarter, self._unit = quarter, unit
            note(f"{self._title}: {int(done)}/{total} {unit}")
