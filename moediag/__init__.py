"""moediag: routing-mismatch diagnostics for mixture-of-experts models across RL engines.

``import moediag`` loads neither torch, transformers nor vllm; only ``moediag.engines`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pair", "PairBlock", "Run", "__version__", "open_run"]

if TYPE_CHECKING:
    from moediag.run.align import Pair, PairBlock
    from moediag.run.reader import Run, open_run

_HOME = {
    "Pair": "moediag.run.align",
    "PairBlock": "moediag.run.align",
    "Run": "moediag.run.reader",
    "open_run": "moediag.run.reader",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `moediag --help` does not pay for pandas and pyarrow.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
