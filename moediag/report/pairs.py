"""Names of the pairs that a page speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moediag.notation import INFER, TRAIN, TRAIN_REPLAY, pair_name

OBSERVED_PAIR: Final = pair_name(TRAIN, INFER)
"""Both engines under observation."""

REPLAY_PAIR: Final = pair_name(TRAIN_REPLAY, INFER)
"""The same tokens with infer's experts forced on train."""


def main_pair_name(summary: Mapping[str, Any]) -> str:
    """The pair that a run is about: train and the arm that sampled the tokens, ``infer~train`` for most runs."""
    return str(summary.get("main_pair") or OBSERVED_PAIR)
