"""What a metric is: one row, which summary, floors, pages, comparison and terminal follow from.

A metric is declared where it is computed and registers itself under its name. Adding one is its row, and its value in
the summary of a pair under :attr:`Metric.path`.

Names that other frameworks give to the same number are part of its row, so that a logged number can be compared with
ours; an :class:`Alias` has a remark wherever the same word stands for another number elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal, TypeVar

from moediag.errors import FrameError

LOWER: Final = "lower is better"
ZERO: Final = "0 is best"
ONE: Final = "1 is best"
HARMLESS: Final = "harmless"

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Definition:
    """What a reader is told of a metric, or of several that are one idea: term, formula, what to know."""

    term: str
    formula: str
    about: str = ""


TRAIN_MINUS_INFER: Final = "train against infer, tokens sampled from infer"
SYMMETRIC: Final = "symmetric in the two sides"
VERL_DEBUG: Final = "verl, debug metrics of the rollout"
VERL_CORRECTION: Final = "verl, metrics of its rollout correction"


@dataclass(frozen=True)
class Alias:
    """A metric by the name that a framework, paper or post gives it.

    Args:
        framework: who uses the name.
        name: the metric's name there, or the words it is known by.
        formula: with d = logp_train - logp_infer and ratio = exp(d).
        direction: which side against which.
        source: where to look it up: framework, paper or post, and the place in it where that is known.
        remark: where the same name means another number, or an alarm that is in use.
        is_metric_name: the framework logs it under exactly this name.
    """

    framework: str
    name: str
    formula: str
    direction: str
    source: str
    remark: str = ""
    is_metric_name: bool = True


@dataclass(frozen=True)
class Metric:
    """A number of a pair, and all that stands beside it.

    Args:
        name: dotted, as frames have it.
        unit: ``nat`` or ``1``.
        direction: which end is good.
        label: its words on pages and on the terminal.
        path: where it stands in the summary of a pair; by default by its name under ``logp``. Its interval stands
            beside it under ``<leaf>_ci``.
        section: anchor of the section of a run's page that lists it; empty = none.
        is_share: a share in [0, 1], printed as per cent.
        share_of: of what.
        counts: what its n is of.
        is_headline: on the first screen of a page, in the first table of a comparison and on the terminal.
        on_terminal: on the terminal, though on no first screen.
        floor: how the floors of both sides make its floor: ``sum`` for the mean of a distance or a rate of differing
            sets (triangle bound), ``larger`` for tails and divergences, which obey none; empty = it has none.
        best: the value of perfect agreement.
        is_scale: whether the ratio of two runs' values says how much larger one is: not of what is
            signed, or 1 at best.
        note: why it has no interval, where that is so on all data.
        definition: what readers are told of it, once for metrics that are one idea.
        elsewhere: its names in other frameworks.
    """

    name: str
    unit: str
    direction: str
    label: str = ""
    _: KW_ONLY
    path: tuple[str, ...] = ()
    section: str = ""
    is_share: bool = False
    share_of: str = "n"
    counts: Literal["token", "sequence", "choice"] = "token"
    is_headline: bool = False
    on_terminal: bool = False
    floor: Literal["sum", "larger", ""] = ""
    best: float = 0.0
    is_scale: bool = True
    note: str = ""
    definition: Definition | None = None
    elsewhere: tuple[Alias, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path or ("logp", *self.name.split(".")))

    @property
    def shown_unit(self) -> str:
        """The unit that its values are printed in."""
        return "share" if self.is_share else self.unit

    @property
    def unit_words(self) -> str:
        """The unit as pages name it."""
        return f"share of {self.share_of}" if self.is_share else self.unit

    def value(self, pair: Summary) -> float | None:
        """Its value in the summary of a pair; None where there is none."""
        value = self._beside(pair, "")
        return None if value is None else float(value)

    def bounds(self, pair: Summary) -> list[float] | None:
        """Its interval there."""
        found: list[float] | None = self._beside(pair, "_ci")
        return found

    def largest_share(self, pair: Summary) -> float | None:
        """Share of its sum, signs aside, that the largest prompt carries, where it is a mean."""
        found: float | None = self._beside(pair, "_largest_prompt_share")
        return found

    def is_measured(self, pair: Summary) -> bool:
        """Whether the pair has what it is of: routing, for most; a value may be missing nevertheless."""
        return self._group(pair) is not None

    def n(self, pair: Summary) -> int | None:
        """Tokens, sequences or choices behind it: those of its own group, else the pair's."""
        name = f"n_{self.counts}s"
        found: int | None = (self._group(pair) or {}).get(name, pair.get(name))
        return found

    def entry(self, value: float, low: float = math.nan, high: float = math.nan) -> dict[str, Any]:
        """What the summary of a pair holds of it: null for what JSON cannot hold."""
        leaf, is_known = self.path[-1], math.isfinite(low) and math.isfinite(high)
        ends = [float(low), float(high)] if is_known else None
        return {leaf: float(value) if math.isfinite(value) else None, f"{leaf}_ci": ends}

    def _group(self, pair: Summary) -> Summary | None:
        group: Any = pair
        for key in self.path[:-1]:
            group = None if group is None else group.get(key)
        found: Summary | None = group
        return found

    def _beside(self, pair: Summary, suffix: str) -> Any:
        group = self._group(pair)
        return None if group is None else group.get(f"{self.path[-1]}{suffix}")


_M = TypeVar("_M", bound=Metric)

_GROUPS: Final = {"logp": 0, "routing": 1}
"""The groups of a pair's summary that tables begin with, whichever module was imported first."""

METRICS: Final[dict[str, Metric]] = {}
"""Every metric by name, in the order of the tables; importing ``moediag.analysis`` declares them all."""


def declare_metrics(*metrics: _M) -> tuple[_M, ...]:
    """Register metrics; names are unique."""
    for metric in metrics:
        if metric.name in METRICS:
            raise FrameError(f"metric {metric.name} is declared twice")
        METRICS[metric.name] = metric
    in_order = sorted(METRICS.items(), key=lambda item: _GROUPS.get(item[1].path[0], len(_GROUPS)))
    METRICS.clear()
    METRICS.update(in_order)
    return metrics
