"""Counts that merge: what a pass over blocks keeps, so that parts made anywhere add up to the whole.

The legend's suffix of a field says how it merges: ``_C...`` has a row per prompt and is added prompt by prompt, any
other array is added element by element, and what is no array must be the same in all parts (None = not known yet).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moediag.errors import MoediagError

Int64 = NDArray[np.int64]

PROMPTS = "prompt_id_C"


class Totals:
    """Base of the dataclasses of counts; those with a row per prompt have ``prompt_id_C``, ascending."""

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Totals of all parts together, in any order; a prompt may appear in several.

        Counts add exactly, float sums to float64 rounding.

        Raises:
            MoediagError: there is no part, or parts are of different kinds.
        """
        some = list(parts)
        if not some:
            raise MoediagError(f"nothing to merge: pass at least one {cls.__name__}")
        columns = {field.name: [getattr(part, field.name) for part in some] for field in fields(cls)}  # type: ignore[arg-type]
        merged: dict[str, Any] = {}
        if PROMPTS in columns:
            by_prompt = [name for name in columns if name.rpartition("_")[2].startswith("C") and name != PROMPTS]
            merged[PROMPTS], sums = merged_by_prompt(columns.pop(PROMPTS), [columns.pop(name) for name in by_prompt])
            merged |= dict(zip(by_prompt, sums, strict=True))
        for name, values in columns.items():
            is_array = isinstance(values[0], np.ndarray)
            merged[name] = np.sum(values, axis=0, dtype=np.result_type(*values)) if is_array else _common(name, values)
        return cls(**merged)


def merged_by_prompt(
    prompt_ids: Sequence[Int64], columns: Sequence[Sequence[NDArray[Any]]]
) -> tuple[Int64, list[NDArray[Any]]]:
    """All prompts, ascending, and every column added up by prompt.

    Args:
        prompt_ids: of every part.
        columns: for every column its part of each, a row per prompt of that part.
    """
    prompts, row_P = np.unique(np.concatenate(prompt_ids), return_inverse=True)
    sums = []
    for parts in columns:
        stacked = np.concatenate(parts)
        sums.append(np.zeros((len(prompts), *stacked.shape[1:]), stacked.dtype))
        np.add.at(sums[-1], row_P, stacked)
    return prompts, sums


def _common(name: str, values: list[Any]) -> Any:
    known = {value for value in values if value is not None}
    if len(known) > 1:
        raise MoediagError(f"counts of different {name} do not add up: {' and '.join(map(str, sorted(known)))}")
    return next(iter(known), None)


def counted(shape: tuple[int, ...], *index_N: NDArray[Any], weights_N: NDArray[Any] | None = None) -> NDArray[Any]:
    """Sums over rows by their cell of an array of ``shape``: whole numbers, or float64 with weights."""
    flat_N = np.ravel_multi_index(index_N, shape) if len(index_N) > 1 else index_N[0]
    sums = np.bincount(flat_N, weights_N, minlength=int(np.prod(shape))).reshape(shape)
    return sums if weights_N is None else sums.astype(np.float64)  # numpy counts no rows at all in whole numbers
