"""IcePop: a weighted mask of tokens by ratio, and how much it masks on logged tokens.

Invariants:
    - the band [alpha, beta] is closed and tested in log space: no overflow, exact at the bounds;
    - a token that an arm did not score has no ratio, so its weight is NaN (never a silent 0: a 0 would be
      counted as masked); shares are over scored tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.declarations import CORRECTIONS
from moediag.analysis.intervals import mean_interval
from moediag.analysis.tokens import logp_diff, scored_tokens
from moediag.errors import MoediagError

Float64 = NDArray[np.float64]

LOG_RATIO_CLAMP: Final = 20.0
"""Log-ratios are clamped to +-20 before exp, as every trainer that implements IcePop does."""


@dataclass(frozen=True)
class IcepopPreset:
    """A band in use: ratio below ``alpha`` or above ``beta`` gets no update."""

    alpha: float
    beta: float
    source: str

    @property
    def name(self) -> str:
        """Method name in tables, e.g. ``icepop_0.5_5.0``."""
        return f"icepop_{self.alpha}_{self.beta}"


ICEPOP_PRESETS: Final = (
    IcepopPreset(0.5, 5.0, "Ring-1T (arXiv 2510.18855); verl 0.5_5.0, OpenRLHF, AReaL, INTELLECT-3"),
    IcepopPreset(0.5, 2.0, "GLM-5"),
    IcepopPreset(0.2, 5.0, "prime-rl"),
)
"""Bands are not portable between stacks: sweep before trusting one."""


def icepop_weights(logp_train_T: ArrayLike, logp_infer_T: ArrayLike, alpha: float = 0.5, beta: float = 5.0) -> Float64:
    """Weight of every token's policy-gradient term: the ratio inside [alpha, beta], 0 outside.

    A weighted mask, not a truncation: above beta TIS would go on updating with the bound as weight.

    Args:
        logp_train_T, logp_infer_T: log-probabilities of the same tokens [nat]; NaN = not scored.
        alpha, beta: closed band of ratio = pi_train / pi_infer; 0 <= alpha <= beta.

    Returns:
        (T,) float64 weights [1]; NaN where an arm's log-probability is not finite (not scored).

    Raises:
        MoediagError: the arrays differ in shape, or the band is empty.

    Source: IcePop post and Ring-1T (arXiv 2510.18855).

    Example:
        >>> import numpy as np
        >>> icepop_weights(np.log([0.4, 0.5, 1.0, 5.0, 6.0]), np.zeros(5)).round(6).tolist()
        [0.0, 0.5, 1.0, 5.0, 0.0]
    """
    train_T, infer_T = np.asarray(logp_train_T, dtype=np.float64), np.asarray(logp_infer_T, dtype=np.float64)
    if train_T.shape != infer_T.shape:
        raise MoediagError(f"icepop_weights wants two arrays of one shape, found {train_T.shape} and {infer_T.shape}")
    log_low, log_high = _log_band(alpha, beta)
    scored_T = np.isfinite(train_T) & np.isfinite(infer_T)
    diff_T = np.where(scored_T, train_T, 0.0) - np.where(scored_T, infer_T, 0.0)
    inside_T = (diff_T >= log_low) & (diff_T <= log_high)
    weights_T = np.where(inside_T, np.exp(np.clip(diff_T, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)), 0.0)
    return np.where(scored_T, weights_T, np.nan)


def corrections_table(tokens: pd.DataFrame, presets: tuple[IcepopPreset, ...] = ICEPOP_PRESETS) -> pd.DataFrame:
    """How many tokens each IcePop band would mask on the logged tokens.

    Args:
        tokens: token frame of a pair.
        presets: bands to try.

    Returns:
        Frame ``corrections``; shares in [0, 1] of the scored tokens. A small share is not a verdict: it says
        what the correction would do, not that training is stable.

    Source: IcePop post: 1-2 per mille of tokens at first, rising sharply later.
    """
    rows = scored_tokens(tokens)
    diff_T, prompt_T = logp_diff(rows), rows["prompt_id"].to_numpy()
    records = []
    for preset in presets:
        log_low, log_high = _log_band(preset.alpha, preset.beta)
        below_T, above_T = diff_T < log_low, diff_T > log_high
        masked = mean_interval(below_T | above_T, prompt_T, "rate")
        records.append(
            {
                "method": preset.name,
                "source": preset.source,
                "n_tokens": len(rows),
                "masked_share": masked.value,
                "masked_share_ci_low": masked.low,
                "masked_share_ci_high": masked.high,
                "below_share": float(below_T.mean()) if len(rows) else np.nan,
                "above_share": float(above_T.mean()) if len(rows) else np.nan,
            }
        )
    columns = [column.name for column in CORRECTIONS.columns]
    return CORRECTIONS.validate(pd.DataFrame.from_records(records, columns=columns))


def _log_band(alpha: float, beta: float) -> tuple[float, float]:
    """The band's bounds as log-ratios; alpha = 0 and beta = inf leave a side open."""
    if not (0 <= alpha <= beta and beta > 0):
        raise MoediagError(f"an IcePop band wants 0 <= alpha <= beta and beta > 0, found alpha={alpha} beta={beta}")
    # numpy's log, not math's: callers build bounds with np.log, and the two may differ in the last bit
    return (float(np.log(alpha)) if alpha > 0 else -math.inf), float(np.log(beta))
