"""Where a process's time goes: seconds by stage; a stage inside another counts for itself alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

IMPORTING: Final = "importing"
LOADING: Final = "loading"
PROVING: Final = "proving routers"
PASSES: Final = "passes"
WRITING: Final = "writing"

_seconds: defaultdict[str, float] = defaultdict(float)
_open: list[tuple[str, float]] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time of the body for a stage."""
    _pause()
    _open.append((name, time.perf_counter()))
    try:
        yield
    finally:
        _pause()
        _, now = _open.pop()
        if _open:
            _open[-1] = _open[-1][0], now


def taken() -> dict[str, float]:
    """Seconds by stage since this was called last."""
    _pause()
    found = {name: round(seconds, 3) for name, seconds in _seconds.items()}
    _seconds.clear()
    return found


def _pause() -> None:
    if _open:
        name, since = _open[-1]
        now = time.perf_counter()
        _seconds[name] += now - since
        _open[-1] = name, now
