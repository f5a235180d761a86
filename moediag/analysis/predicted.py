"""The few numbers of explained and forecast flips that a reader needs first, out of their frames.

Invariants: one method only, the best that gave a prediction, so that no reader picks the one that fits; every forecast
names its pair and what must hold for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

POOLED: Final = -1
METHOD_WORDS: Final = {
    "all_pairs": "every pair of experts",
    "border_pair": "the border pair",
    "simulated": "simulated choices",
    "margin_change": "margins alone",
}
"""The methods of frame ``explained_flips`` in words, best first."""
_CALIBRATION: Final = ("calibration_error", "calibration_error_expected", "calibration_slope")


def source_words(noise_from: object) -> str:
    """A source of noise in words: the arm of an A/A pair that is not the engine's main one.

    Example:
        >>> source_words("train~train-repeat")
        'noise of train-repeat'
    """
    first, _, second = str(noise_from).partition("~")
    return f"noise of {first if len(first) > len(second) else second}"


def best_method(explained: pd.DataFrame) -> str | None:
    """The first method of frame ``explained_flips`` (its order is best first) with a prediction; None = none has."""
    given = explained.loc[explained["explained"].notna(), "method"]
    return str(given.iloc[0]) if len(given) else None


def predicted_flips(frames: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """Headlines for summary.json; None for a dense model, or where nothing could be predicted.

    Args:
        frames: ``explained_flips`` and ``forecast_flips``, as :func:`~moediag.analysis.prediction.predict_flips` gives.

    Returns:
        ``explained``: observed and explained flip rate over all layers, their gap and the calibration, by the best
        method, and what it leaves out; ``forecast``: one entry per source of noise. Rates in [0, 1]; a gap of 0 is
        best.
    """
    explained, forecasts = frames.get("explained_flips"), frames.get("forecast_flips")
    found = {
        "explained": None if explained is None else _explained(explained),
        "forecast": [] if forecasts is None else _forecasts(forecasts),
    }
    return found if any(found.values()) else None


def _explained(frame: pd.DataFrame) -> dict[str, Any] | None:
    method = best_method(frame)
    if method is None:
        return None
    row = frame[(frame["method"] == method) & (frame["layer"] == POOLED)].iloc[0]
    head = {"method": method, "side": str(row["side"]), "note": str(row["note"]), "n_choices": int(row["n_choices"])}
    plain = {name: _number(row[name]) for name in ("explained", *_CALIBRATION)}
    return {**head, **_with_bounds(row, ("observed", "gap")), **plain}


def _forecasts(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            **{name: str(row[name]) for name in ("pair", "side", "noise_from", "method")},
            "n_choices": int(row["n_choices"]),
            "forecast": _number(row["forecast"]),
            **_with_bounds(row, ("observed", "noise_observed")),
            "assumption": str(row["assumption"]),
        }
        for _, row in frame[frame["layer"] == POOLED].iterrows()
    ]


def _with_bounds(row: pd.Series[Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Each value with its interval, as everywhere in summary.json."""
    found: dict[str, Any] = {}
    for name in names:
        bounds = [_number(row[f"{name}_ci_{end}"]) for end in ("low", "high")]
        found |= {name: _number(row[name]), f"{name}_ci": None if None in bounds else bounds}
    return found


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
