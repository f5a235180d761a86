"""Counts behind two pictures: tokens by ratio, and the entropy of the tokens that a correction masks.

Invariant: every scored token is in exactly one bin; the outermost bins are open, so that nothing far out is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.corrections.batch import Batch
from moediag.corrections.correction import Correction
from moediag.frames import Column, declare

RATIO_COUNTS: Final = declare(
    "ratio_counts",
    "bin of the log-ratio",
    Column("bin_low", "float64", "nat", "lower edge of logp_train - logp_infer; -inf = open"),
    Column("bin_high", "float64", "nat", "upper edge, exclusive; inf = open"),
    Column("n_tokens", "int64", "token", "scored tokens in the bin"),
)
MASKED_ENTROPY: Final = declare(
    "masked_entropy",
    "correction and bin of entropy",
    Column("correction", "str", "1", "name of the correction"),
    Column("bin_low", "float64", "nat", "lower edge of the infer side's next-token entropy"),
    Column("bin_high", "float64", "nat", "upper edge, exclusive; inf = open"),
    Column("n_tokens", "int64", "token", "scored tokens with that entropy"),
    Column("n_masked", "int64", "token", "those of them that get no update (weight 0)"),
)

RATIO_STEP: Final = float(np.log(2)) / 32
"""Width of a ratio's bin [nat]: 32 bins per doubling, so 0.5, 1, 2 and 4 are edges."""
_RATIO_BINS_PER_SIDE: Final = 640
"""20 doublings each side, a ratio of a million; beyond stands in the open bins."""
_ENTROPY_STEP: Final = 0.1
_ENTROPY_TOP: Final = 8.0


def ratio_counts(batch: Batch) -> pd.DataFrame:
    """Scored tokens by log-ratio.

    Returns:
        Frame ``ratio_counts``; bins of ln(2) / 32 nat from 2^-20 to 2^20, the outermost open.
    """
    inner = RATIO_STEP * np.arange(-_RATIO_BINS_PER_SIDE, _RATIO_BINS_PER_SIDE + 1)
    n_N = np.zeros(len(inner) + 1, dtype=np.int64)
    for part in batch.chunks():
        x, _ = part.scored()
        n_N += np.bincount(np.searchsorted(inner, x.diff_T, side="right"), minlength=len(n_N))
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    return RATIO_COUNTS.validate(pd.DataFrame({"bin_low": edges[:-1], "bin_high": edges[1:], "n_tokens": n_N}))


def masked_entropy(batch: Batch, corrections: Mapping[str, Correction]) -> pd.DataFrame:
    """Scored tokens by entropy, and how many of them each correction masks.

    Returns:
        Frame ``masked_entropy``; bins of 0.1 nat, the last open; no rows without a correction or
        without any known entropy.

    Source: IcePop post, figure 11 (entropy of masked tokens against all).
    """
    if not corrections or batch.entropy_T is None or not np.isfinite(batch.entropy_T).any():
        return MASKED_ENTROPY.validate(pd.DataFrame(columns=[column.name for column in MASKED_ENTROPY.columns]))
    low_N = np.asarray(_ENTROPY_STEP * np.arange(round(_ENTROPY_TOP / _ENTROPY_STEP) + 1), np.float64)
    all_N = np.zeros(len(low_N), dtype=np.int64)
    masked_N = {name: np.zeros(len(low_N), dtype=np.int64) for name in corrections}
    for part in batch.chunks():
        x, is_scored_T = part.scored()
        assert part.entropy_T is not None
        entropy_T = np.asarray(part.entropy_T[is_scored_T], np.float64)
        known_T = np.isfinite(entropy_T)
        bin_T = _bins(entropy_T, low_N)
        all_N += np.bincount(bin_T[known_T], minlength=len(low_N))
        for name, correction in corrections.items():
            is_masked_T = correction.of_terms(x) == 0
            masked_N[name] += np.bincount(bin_T[known_T & is_masked_T], minlength=len(low_N))
    high_N = np.append(low_N[1:], np.inf)
    parts = [
        pd.DataFrame({"correction": name, "bin_low": low_N, "bin_high": high_N, "n_tokens": all_N, "n_masked": n_N})
        for name, n_N in masked_N.items()
    ]
    return MASKED_ENTROPY.validate(pd.concat(parts, ignore_index=True))


def _bins(entropy_T: NDArray[np.float64], low_N: NDArray[np.float64]) -> NDArray[np.intp]:
    """Bin of every entropy; rounding below 0 belongs to the first."""
    return np.clip(np.searchsorted(low_N, entropy_T, side="right") - 1, 0, len(low_N) - 1)
