"""Frames: result tables declared as data; the one declaration validates, documents and prints.

Invariant: every public analysis returns a frame that passed :meth:`FrameSpec.validate`; a column that
is not declared, or has another dtype, is an error and not a surprise for a later reader.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from moediag.errors import FrameError
from moediag.numbers import NONE, count, in_unit, is_number, times

Kind = Literal["text", "flag", "id", "layer", "count", "share", "times", "number"]
"""How values are printed: ``id`` is a number that only names, ``layer`` one of which -1 means all."""

_REGISTRY: dict[str, FrameSpec] = {}


@dataclass(frozen=True)
class Column:
    """One column, and how it is printed.

    Args:
        name: ``n_...`` for counts, ``..._share`` or ``..._rate`` for shares in [0, 1].
        dtype: numpy's; ``str`` for text.
        unit: ``1`` = dimensionless.
        meaning: what a value says.
        nullable: whether a value may be missing.
        label: the words over it on a page; by default its name in words.
        kind: by default as name and dtype say.
    """

    name: str
    dtype: str
    unit: str
    meaning: str
    nullable: bool = False
    label: str = ""
    kind: Kind | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name.replace("_", " "))
        object.__setattr__(self, "kind", self.kind or self._kind())

    def _kind(self) -> Kind:
        if self.name in ("layer", "decoder_layer"):
            return "layer"
        if self.name.endswith(("_share", "_rate")):
            return "share"
        if self.dtype in ("str", "bool"):
            return "text" if self.dtype == "str" else "flag"
        if self.dtype.startswith("int"):
            return "count" if self.name == "n" or self.name.startswith("n_") else "id"
        return "number"

    @property
    def header(self) -> str:
        """Label and unit."""
        is_plain = self.unit == "1" or self.kind in ("share", "count", "id", "layer")
        return self.label if is_plain else f"{self.label} [{self.unit}]"

    def text(self, value: Any) -> str:
        """A value as every page and terminal prints it; the en dash where there is none.

        Example:
            >>> Column("n_tokens", "int64", "token", "").text(4096), share("flip_rate", "").text(0.0312)
            ('4,096', '3.12 %')
        """
        if self.kind == "text":
            return str(value)
        if self.kind == "flag":
            return "yes" if value else "no"
        if not is_number(value):
            return NONE
        if self.kind == "layer":
            return "all" if value < 0 else f"{value:.0f}"
        if self.kind == "id":
            return NONE if value < 0 else f"{value:.0f}"
        if self.kind == "count":
            return count(value)
        if self.kind == "times":
            return times(value, 1.0)
        return in_unit(value, "share" if self.kind == "share" else self.unit)


@dataclass(frozen=True)
class FrameSpec:
    """A declared table: one row per what, and its columns in order.

    Args:
        section: anchor of the section of a run's page that shows it; empty = none.
        caption: what its table shows there, and which end is good.
        is_metrics: a row is a declared metric of the whole pair, which the pair's summary holds, too.
    """

    name: str
    one_row_per: str
    columns: tuple[Column, ...]
    section: str = ""
    caption: str = ""
    is_metrics: bool = False

    def __getitem__(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    @property
    def names(self) -> list[str]:
        """Names of the columns, in order."""
        return [column.name for column in self.columns]

    def validate(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return ``frame`` with the declared columns in order and in the declared dtypes.

        Raises:
            FrameError: a column is missing or undeclared, or NaN stands where none is allowed.
        """
        missing = [name for name in self.names if name not in frame.columns]
        extra = [name for name in frame.columns if name not in self.names]
        if missing or extra:
            raise FrameError(f"frame {self.name}: missing columns {missing}, undeclared columns {extra}")
        frame = frame[self.names]
        # most columns are what they should be: what they are is seen faster than made so
        frame = frame.astype({c.name: c.dtype for c in self.columns if frame[c.name].dtype.name != c.dtype})
        for column in self.columns:
            if not column.nullable and frame[column.name].dtype.kind not in "iub" and frame[column.name].isna().any():
                raise FrameError(f"frame {self.name}: column {column.name} may not be empty, found NaN")
        return frame.reset_index(drop=True)


def declare(
    name: str, one_row_per: str, *columns: Column, section: str = "", caption: str = "", is_metrics: bool = False
) -> FrameSpec:
    """Register a frame's declaration; names are unique."""
    if name in _REGISTRY:
        raise FrameError(f"frame {name} is declared twice")
    spec = FrameSpec(name, one_row_per, columns, section, caption, is_metrics)
    _REGISTRY[name] = spec
    return spec


def declared_frames() -> tuple[FrameSpec, ...]:
    """Every declared frame, by name; ``moediag.analysis`` and ``moediag.corrections`` declare theirs when imported."""
    return tuple(_REGISTRY[name] for name in sorted(_REGISTRY))


def declared(name: str) -> FrameSpec:
    """The declaration of a frame."""
    return _REGISTRY[name]


def frames_of(section: str) -> list[FrameSpec]:
    """The frames that a section of a run's page shows, in the order of their declarations."""
    return [spec for spec in _REGISTRY.values() if spec.section == section]


def share(name: str, meaning: str, label: str = "") -> Column:
    """A column of shares in [0, 1], printed as per cent; it may be empty."""
    return Column(name, "float64", "1", meaning, nullable=True, label=label, kind="share")


def measured(name: str, unit: str, meaning: str, label: str = "", kind: Kind | None = None) -> Column:
    """A column of float64 that may be empty."""
    return Column(name, "float64", unit, meaning, nullable=True, label=label, kind=kind)


def with_ci(column: Column, when: str = "") -> tuple[Column, Column, Column]:
    """A column, and ``<name>_ci_low`` and ``<name>_ci_high``: the bounds of its 95 % interval."""
    low, high = (
        replace(
            column,
            name=f"{column.name}_ci_{end}",
            meaning=f"{bound} bound of the 95 % interval of {column.name}{when}",
            nullable=True,
            label=f"{column.label}, {bound} bound",
        )
        for end, bound in (("low", "lower"), ("high", "upper"))
    )
    return column, low, high
