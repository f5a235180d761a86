"""Entropy of the tokens that a band of ratios masks, beside those it keeps.

Invariant: only tokens with a ratio and with that side's entropy count; without entropies there is a row with n = 0.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moediag.analysis.declarations import ENTROPY_QUANTILES
from moediag.analysis.measures import ICEPOP_BAND
from moediag.analysis.tokens import AnyTokens, Tokens
from moediag.statistics.intervals import mean_interval


def entropy_quantiles(tokens: AnyTokens, alpha: float = ICEPOP_BAND[0], beta: float = ICEPOP_BAND[1]) -> pd.DataFrame:
    """Next-token entropy of masked and of kept tokens, on each side.

    Masked tokens with high entropy are noise at forks of the text; with low entropy they are places where the two
    engines disagree about something one of them is sure of.

    Args:
        tokens: token frame of a pair.
        alpha: lower end of the band of ratio that is kept.
        beta: upper end.

    Returns:
        Frame ``entropy_quantiles`` [nat]: groups all, kept and masked, for train and infer.

    Source: IcePop Fig. 11; the default band is Ring-1T's (arXiv 2510.18855).
    """
    x = Tokens.of(tokens)
    kept_T = (x.diff_T >= np.log(alpha)) & (x.diff_T <= np.log(beta))
    records = []
    for side in ("train", "infer"):
        entropy_T = x.column(f"entropy_{side}").astype(np.float64)
        known_T = np.isfinite(entropy_T)
        for group, inside_T in (("all", known_T), ("kept", known_T & kept_T), ("masked", known_T & ~kept_T)):
            values = entropy_T[inside_T]
            mean = mean_interval(values, x.prompt_row_T[inside_T], "positive")
            points = np.quantile(values, [0.1, 0.5, 0.9]) if len(values) else [np.nan] * 3
            records.append((side, group, alpha, beta, len(values), mean.value, mean.low, mean.high, *points))
    names = [column.name for column in ENTROPY_QUANTILES.columns]
    return ENTROPY_QUANTILES.validate(pd.DataFrame.from_records(records, columns=names))
