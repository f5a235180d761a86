"""Frames: result tables declared as data, so that one declaration validates, documents and renders.

Invariant: every public analysis returns a frame that passed :meth:`FrameSpec.validate`; a column that
is not declared, or has another dtype, is an error and not a surprise for a later reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moediag.errors import FrameError

_REGISTRY: dict[str, FrameSpec] = {}


@dataclass(frozen=True)
class Column:
    """One column: name, numpy dtype (``str`` for text), unit (``1`` = dimensionless), meaning."""

    name: str
    dtype: str
    unit: str
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class FrameSpec:
    """A declared table: one row per what, and its columns in order."""

    name: str
    one_row_per: str
    columns: tuple[Column, ...]

    def validate(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return ``frame`` with the declared columns in order and in the declared dtypes.

        Raises:
            FrameError: a column is missing or undeclared, or NaN stands where none is allowed.
        """
        declared = [column.name for column in self.columns]
        missing = [name for name in declared if name not in frame.columns]
        extra = [name for name in frame.columns if name not in declared]
        if missing or extra:
            raise FrameError(f"frame {self.name}: missing columns {missing}, undeclared columns {extra}")
        frame = frame[declared].astype({c.name: c.dtype for c in self.columns})
        for column in self.columns:
            if not column.nullable and frame[column.name].isna().any():
                raise FrameError(f"frame {self.name}: column {column.name} may not be empty, found NaN")
        return frame.reset_index(drop=True)


def declare(name: str, one_row_per: str, *columns: Column) -> FrameSpec:
    """Register a frame's declaration; names are unique."""
    if name in _REGISTRY:
        raise FrameError(f"frame {name} is declared twice")
    spec = FrameSpec(name, one_row_per, columns)
    _REGISTRY[name] = spec
    return spec


def declared_frames() -> tuple[FrameSpec, ...]:
    """Every declared frame, by name; ``moediag.analysis`` and ``moediag.corrections`` declare theirs when imported."""
    return tuple(_REGISTRY[name] for name in sorted(_REGISTRY))


def ci_columns(name: str, unit: str, of: str) -> tuple[Column, Column]:
    """The pair ``<name>_ci_low``, ``<name>_ci_high``: bounds of the 95 % interval of ``of``."""
    return (
        Column(f"{name}_ci_low", "float64", unit, f"lower bound of the 95 % interval of {of}", nullable=True),
        Column(f"{name}_ci_high", "float64", unit, f"upper bound of the 95 % interval of {of}", nullable=True),
    )
