"""moediag: routing-mismatch diagnostics for mixture-of-experts models across RL engines.

::

    import moediag

    run = moediag.open_run("runs/moe")

:mod:`moediag.library` says what can be done with it. ``import moediag`` loads neither torch, transformers nor vllm,
nor pandas: names and sub-packages are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "MoediagError",
    "Pair",
    "PairBlock",
    "Run",
    "Series",
    "Simulation",
    "Watch",
    "__version__",
    "compare",
    "open_run",
    "open_series",
    "simulate",
]

if TYPE_CHECKING:
    from moediag.errors import MoediagError
    from moediag.library import Comparison, Run, Series, Simulation, compare, open_run, open_series, simulate
    from moediag.run.align import Pair, PairBlock
    from moediag.watch import Watch

_HOME = {"MoediagError": "errors", "Pair": "run.align", "PairBlock": "run.align", "Watch": "watch"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in __all__:
        return getattr(import_module(f"moediag.{_HOME.get(name, 'library')}"), name)
    if not name.startswith("_"):
        try:
            return import_module(f"moediag.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"moediag.{name}":  # a room that is there, and lacks a package
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from pkgutil import iter_modules

    return sorted([*__all__, *(module.name for module in iter_modules(__path__))])
