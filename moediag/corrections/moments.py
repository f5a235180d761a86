"""Count, mean and spread of weights, grown part by part without cancellation, and the effective sample size.

Invariants:
    - deviations are taken from the part's own mean and parts are merged by the difference of their means, so no two
      large numbers are subtracted: weights of 1e-8 and weights of 1 +- 1e-8 keep their digits alike;
    - scaling every weight scales mean and spread and leaves the effective share as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Moments of N values in G groups.

    Args:
        n_G: values of every group.
        mean_G: their mean; 0 for an empty group.
        square_G: sum of squared deviations from that mean.
    """

    n_G: Float64
    mean_G: Float64
    square_G: Float64

    @classmethod
    def none(cls, n_groups: int = 1) -> Moments:
        """Moments of no value."""
        return cls(*np.zeros((3, n_groups)))

    @classmethod
    def of(cls, values_N: Float64, group_N: NDArray[np.intp] | None = None, n_groups: int = 1) -> Moments:
        """Moments of values by group; all of one group where none is given."""
        if group_N is None:
            mean = values_N.mean() if len(values_N) else 0.0
            return cls(*np.array([[len(values_N)], [mean], [np.square(values_N - mean).sum()]], dtype=np.float64))
        n_G = np.bincount(group_N, minlength=n_groups).astype(np.float64)
        mean_G = np.bincount(group_N, weights=values_N, minlength=n_groups) / np.maximum(n_G, 1)
        away_N = values_N - mean_G[group_N]
        square_G = np.bincount(group_N, weights=np.square(away_N), minlength=n_groups).astype(np.float64)
        return cls(n_G, mean_G, square_G)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both parts together, group by group.

        Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", Am. Stat. 37 (1983), eq. 2.1.
        """
        n_G = self.n_G + other.n_G
        share_G = other.n_G / np.maximum(n_G, 1)
        apart_G = other.mean_G - self.mean_G
        square_G = self.square_G + other.square_G + np.square(apart_G) * self.n_G * share_G
        return Moments(n_G, self.mean_G + apart_G * share_G, square_G)

    def joined(self, is_in_MG: NDArray[np.bool_]) -> Moments:
        """Moments of the groups named in each of M rows, as one group each."""
        n_MG = np.where(is_in_MG, self.n_G, 0.0)
        n_M = n_MG.sum(axis=1)
        mean_M = (n_MG * self.mean_G).sum(axis=1) / np.maximum(n_M, 1)
        between_MG = n_MG * np.square(self.mean_G - mean_M[:, None])
        return Moments(n_M, mean_M, (np.where(is_in_MG, self.square_G, 0.0) + between_MG).sum(axis=1))

    @property
    def variance_G(self) -> Float64:  # noqa: N802 - the legend suffix
        """Mean squared deviation; NaN of nothing."""
        return np.asarray(self.square_G / np.where(self.n_G > 0, self.n_G, np.nan))

    @property
    def effective_share_G(self) -> Float64:  # noqa: N802
        """ESS / n = (sum w)^2 / (n sum w^2) = 1 / (1 + variance / mean^2), in (0, 1]; NaN where every weight is 0.

        Source: Kish (1965); verl.

        Example:
            >>> Moments.of(np.array([1e-8, 2e-8, 3e-8])).effective_share_G.round(3).tolist()
            [0.857]
        """
        mean_G: Any = np.where(self.mean_G > 0, self.mean_G, np.nan)
        return np.asarray(1 / (1 + self.variance_G / np.square(mean_G)))
