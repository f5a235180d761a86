"""What the IcePop bands in use would mask in a run: the table that every analysis of a pair holds."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from moediag.analysis.declarations import CORRECTIONS
from moediag.analysis.measures import ICEPOP_BAND
from moediag.analysis.metrics import LOWER, Metric, declare_metrics
from moediag.analysis.tokens import AnyTokens, Tokens
from moediag.corrections.methods import log_bound
from moediag.corrections.presets import PRESETS, Preset
from moediag.corrections.terms import are_float32, on_bounds
from moediag.errors import MoediagError
from moediag.statistics.intervals import mean_interval


def band_name(alpha: float, beta: float) -> str:
    """How frame ``corrections`` and summary.json call an IcePop band."""
    return f"icepop_{alpha}_{beta}"


declare_metrics(
    Metric("masked_share", "1", LOWER, "masked by IcePop {:g} to {:g}".format(*ICEPOP_BAND), is_share=True,
           path=("corrections", band_name(*ICEPOP_BAND), "masked_share"), floor="larger"),
)  # fmt: skip

RUN_PRESETS: Final = (PRESETS["ring-1t"], PRESETS["glm-5"], PRESETS["prime-rl-icepop"])
"""The bands that an analysis tries; ``moediag simulate`` has all corrections."""


def masked_shares(tokens: AnyTokens, presets: tuple[Preset, ...] = RUN_PRESETS) -> pd.DataFrame:
    """How many tokens each IcePop band would mask on the logged tokens.

    Args:
        tokens: token frame of a pair.
        presets: bands to try.

    Returns:
        Frame ``corrections``; shares in [0, 1] of the tokens with two finite log-probabilities. A small share is not a
        verdict: it says what the correction would do, not that training is stable.

    Raises:
        MoediagError: a preset that is more than one IcePop band.

    Source: IcePop post: 1-2 per mille of tokens at first, rising sharply later.
    """
    x = Tokens.of(tokens)
    is_float32_T = are_float32(x.logp_train_T, x.logp_infer_T)
    records = []
    for preset in presets:
        alpha, beta = _band(preset)
        low, high = log_bound(alpha), log_bound(beta)
        diff_T = on_bounds(x.diff_T, [low, high], is_float32_T)
        below_T, above_T = diff_T < low, diff_T > high
        masked = mean_interval(below_T | above_T, x.prompt_row_T, "rate")
        records.append(
            {
                "method": band_name(alpha, beta),
                "source": _users(preset),
                "n_tokens": len(x),
                "masked_share": masked.value,
                "masked_share_ci_low": masked.low,
                "masked_share_ci_high": masked.high,
                "below_share": float(below_T.mean()) if len(x) else np.nan,
                "above_share": float(above_T.mean()) if len(x) else np.nan,
            }
        )
    columns = [column.name for column in CORRECTIONS.columns]
    return CORRECTIONS.validate(pd.DataFrame.from_records(records, columns=columns))


def _band(preset: Preset) -> tuple[float, float]:
    steps = preset.correction.steps
    if [step.method for step in steps] != ["icepop"]:
        raise MoediagError(
            f"the table of bands wants presets with one IcePop band, found {preset.name} ({preset.words})"
        )
    return steps[0].parameters["alpha"], steps[0].parameters["beta"]


def _users(preset: Preset) -> str:
    """The preset's source, and who else uses the same band."""
    band = str(preset.correction)
    others = [other.name for other in PRESETS.values() if other.name != preset.name and str(other.correction) == band]
    return "; ".join([preset.source, *([f"also {', '.join(others)}"] if others else [])])
