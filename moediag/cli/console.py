"""What every command shares: results on stdout, remarks and progress on stderr, both as wide as the terminal.

Invariants:
    - on a terminal a line breaks between words, never inside a name, a number or an interval; elsewhere no line is
      broken and no control character is written;
    - a terminal is never silent for more than two seconds: what no bar shows, a status line does; elsewhere a plain
      line says what goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

import typer

_SILENCE: Final = 1.0
"""After how long the status line shows [s]; elsewhere than on a terminal a plain line comes after twice of it."""
_PROSE: Final = 120
"""Longest line of sentences, however wide the terminal [character]."""
_GLUE: Final = "\N{NO-BREAK SPACE}"
_TOGETHER: Final = re.compile(r"\[[^\[\]]{1,24}\]|(?<=\d) (?=%|nat\b|MB\b|s\b)")


URLS: Final[dict[str, str]] = {}
"""What a folder is called: of runs on an object store, their URL in place of the mirror's; logs are here only."""


def width(stream: TextIO | None = None) -> int | None:
    """Characters of a line of the terminal; None = not a terminal."""
    stream = stream or sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else None


def glued(text: str) -> str:
    """Intervals, and numbers with their units, as one word."""
    return _TOGETHER.sub(lambda match: match[0].replace(" ", _GLUE), text)


def unglued(text: str) -> str:
    """The same for printing."""
    return text.replace(_GLUE, " ")


def wrapped(text: str, longest: int, hanging: int = 4) -> str:
    """Text in lines that are no longer, broken between words; what goes on is set in by ``hanging``."""
    lines = []
    for line in text.split("\n"):
        if len(line) <= longest:
            lines.append(line)
            continue
        start = len(line) - len(line.lstrip())
        lines.append(
            textwrap.fill(
                glued(line), longest, subsequent_indent=" " * min(start + hanging, longest // 2),
                break_long_words=False, break_on_hyphens=False, replace_whitespace=False,
            )
        )  # fmt: skip
    return unglued("\n".join(lines))


def _write(text: str, stream: TextIO) -> None:
    """Write whole lines; where the reader of a pipe (head, less) has gone, the command ends as if it had read all."""
    for folder, url in URLS.items():
        text = re.sub(rf"{re.escape(folder)}(?!/logs/)", url, text)
    with _STATUS.hidden():
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered goes nowhere
            raise typer.Exit from None


def _fitted(text: str, stream: TextIO, hanging: int) -> str:
    columns = width(stream)
    return text if columns is None else wrapped(text, min(columns, _PROSE), hanging)


def say(text: str = "", hanging: int = 4) -> None:
    """A result, on stdout; a line that is too long goes on set in by ``hanging``."""
    _write(_fitted(text, sys.stdout, hanging), sys.stdout)


def say_table(text: str) -> None:
    """A result that has been laid out for the terminal."""
    _write(text, sys.stdout)


def say_json(content: Any) -> None:
    """A result as JSON, on stdout."""
    _write(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False), sys.stdout)


def note(text: str, hanging: int = 9) -> None:
    """A remark about what goes on, on stderr; a word in nine characters may stand before it."""
    _write(_fitted(text, sys.stderr, hanging), sys.stderr)


def wrote(path: Path) -> None:
    """Say where a result is."""
    say(f"Wrote {path}")


class _Status:
    """What goes on, in one line on stderr's terminal while nothing else is shown there."""

    def __init__(self) -> None:
        self.words = ""
        self._lock = threading.RLock()
        self._n_bars, self._is_shown = 0, False
        self._since = time.monotonic()

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Watch over a command."""
        if not sys.stderr.isatty():
            yield
            return
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        self._since = time.monotonic()
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join(1.0)
            with self.hidden():
                self.words = ""

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.2):
            with self._lock:
                silent = time.monotonic() - self._since
                if self._n_bars == 0 and silent > _SILENCE:
                    line = f"{self.words or 'working'} ... {int(silent)} s"
                    sys.stderr.write(f"\r\x1b[2K{line[: (width(sys.stderr) or 80) - 1]}")
                    sys.stderr.flush()
                    self._is_shown = True

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Something else is written."""
        with self._lock:
            if self._is_shown:
                sys.stderr.write("\r\x1b[2K")
                sys.stderr.flush()
                self._is_shown = False
            yield
            self._since = time.monotonic()

    @contextmanager
    def beside_bar(self) -> Iterator[None]:
        """A bar is there."""
        with self.hidden():
            self._n_bars += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_bars -= 1
                self._since = time.monotonic()


_STATUS: Final = _Status()
attending = _STATUS.attending


@contextmanager
def doing(words: str) -> Iterator[None]:
    """Say what goes on, where it takes more than a moment."""
    before, _STATUS.words = _STATUS.words, words
    plain = threading.Timer(2 * _SILENCE, note, [f"{words} ..."])
    if not sys.stderr.isatty():
        plain.daemon = True
        plain.start()
    try:
        yield
    finally:
        plain.cancel()
        _STATUS.words = before


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
        elif "done" in event:
            self.show(event["done"], event["total"], event["unit"])

    def show(self, done: float, total: int, unit: str) -> None:
        """Show how far it is."""
        description = f"{self._title}: {int(done)}/{total} {unit}"
        self._progress.update(self._task, completed=done, total=total, description=description)

    def overall(self, words: str) -> None:
        """Show how far everything is, of which this is a part."""
        self._progress.update(self._task, overall=words)


@contextmanager
def bar(title: str, short: str = "") -> Iterator[Bar]:
    """A progress bar with remaining time on stderr; plain lines where stderr is not a terminal.

    Args:
        short: what stands before the bar, where the title is too long for it and comes on a line of its own.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title)
        return
    if short:
        note(title)
    words, overall = (
        TextColumn(text, table_column=Column(no_wrap=True)) for text in ("{task.description}", "{task.fields[overall]}")
    )
    columns = (words, BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn(), overall)
    with _STATUS.beside_bar(), Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(short or title, total=None, overall=""), short or title)


class _Lines(Bar):
    """Progress for logs: a line per stage and per quarter done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._quarter, self._unit = -1, ""
        self._overall = ""

    def on_event(self, event: dict[str, Any]) -> None:
        if "note" in event:
            note(event["note"])
        elif "stage" in event:
            note(f"{self._title}: {event['stage']}")
        elif "done" in event:
            self.show(event["done"], event["total"], event["unit"])

    def show(self, done: float, total: int, unit: str) -> None:
        quarter = int(4 * done / total) if total else 4
        if quarter > self._quarter or unit != self._unit:
            self._quarter, self._unit = quarter, unit
            note(f"{self._title}: {int(done)}/{total} {unit}{self._overall and f'; {self._overall}'}")

    def overall(self, words: str) -> None:
        self._overall = words
