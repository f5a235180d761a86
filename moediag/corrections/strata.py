"""Kinds of tokens by which masked shares are distinguished: fixed edges, found once for a whole batch.

Invariant: edges depend on the batch's largest position, length and number of flipped layers only, so the parts of a
batch share them; a token whose stratifier is not known is in no stratum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.strata import CONFIDENCE_EDGES, ENTROPY_EDGES, doubling_strata, position_strata
from moediag.corrections.batch import Batch

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Stratifier:
    """A way to sort tokens into B strata.

    Args:
        low_B, high_B: ends of the strata, ascending.
        of: values of a part's tokens; NaN and values below the first stratum are in none.
    """

    name: str
    low_B: Float64
    high_B: Float64
    of: Callable[[Batch], NDArray[Any]]

    def __len__(self) -> int:
        return len(self.low_B)

    def index_T(self, part: Batch) -> NDArray[np.intp]:  # noqa: N802 - the legend suffix
        """Stratum of every token; -1 = in none."""
        values_T = np.asarray(self.of(part), dtype=np.float64)
        index_T = np.searchsorted(self.low_B, values_T, side="right") - 1
        return np.where(np.isnan(values_T), -1, index_T)


def stratifiers(batch: Batch) -> list[Stratifier]:
    """The stratifiers that a batch has values for."""
    longest = np.array([int(batch.position_T.max(initial=0))])
    position = position_strata(longest)
    length_S = np.diff(np.append(batch.start_S, len(batch)))
    length = doubling_strata("response_length", length_S)
    found = [
        Stratifier("p_infer", CONFIDENCE_EDGES[:-1], CONFIDENCE_EDGES[1:], lambda part: np.exp(part.logp_infer_T)),
        Stratifier("position", position.low_B, position.high_B, lambda part: part.position_T),
        Stratifier("response_length", length.low_B, length.high_B, _length_of_tokens),
    ]
    if batch.entropy_T is not None:
        entropy = Stratifier("entropy", ENTROPY_EDGES[:-1], ENTROPY_EDGES[1:], lambda part: _given(part.entropy_T))
        found.insert(0, entropy)
    if batch.advantage_T is not None:
        signs = np.array([-1.0, 0.0, 1.0])
        found.append(Stratifier("advantage_sign", signs, signs, lambda part: np.sign(_given(part.advantage_T))))
    if batch.n_flipped_layers_T is not None and (batch.n_flipped_layers_T >= 0).any():
        flips = doubling_strata("n_flipped_layers", batch.n_flipped_layers_T)
        found.append(
            Stratifier("n_flipped_layers", flips.low_B, flips.high_B, lambda part: _given(part.n_flipped_layers_T))
        )
    return found


def _length_of_tokens(part: Batch) -> NDArray[np.intp]:
    return np.diff(np.append(part.start_S, len(part)))[part.row_T]


def _given(values_T: NDArray[Any] | None) -> NDArray[Any]:
    """Values that the whole batch has, and so every part of it."""
    return np.empty(0) if values_T is None else values_T
