"""The pairs that the pages speak about, by name."""

from __future__ import annotations

from typing import Final

from moediag.notation import INFER, TRAIN, TRAIN_REPLAY, pair_name

MAIN_PAIR: Final = pair_name(TRAIN, INFER)
"""What every page is about."""

REPLAY_PAIR: Final = pair_name(TRAIN_REPLAY, INFER)
"""The same with infer's experts forced on train."""
