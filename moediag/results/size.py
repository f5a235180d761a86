"""How much an analysis and a report will write at most, before anything is captured.

Invariant: a bound, not a guess: tests/test_size.py holds it against what commands wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from moediag.frames import declared_frames

_PAIRS_PER_ARM: Final = 1.5
"""Pairs that are analysed, per arm: 11 of the demo's 9 arms, 3 of 3 where rollouts were unobserved."""
_PAIR: Final = 320_000
"""Frames of a pair that do not grow with its tokens, and its part of summary.json [byte]; seen: 100 kB to 260 kB."""
_LAYER: Final = 8_000
"""What a MoE layer adds to a pair's frames [byte]."""
_SEQUENCE: Final = 400
_PICTURE: Final = 300_000
"""A figure as PNG and SVG [byte]; seen: 170 kB on average, the largest 420 kB."""
_PNG: Final = 0.75
"""The PNG's part of it at most; a page holds it in base64."""
_PAGES: Final = 2_500_000
"""Both pages without figures and single tokens [byte]: words, tables, scripts."""
_SHOWN: Final = 8_000
"""Tokens that a page shows one by one at most."""
_PER_TOKEN: Final = ("tokens", "vocab_divergences")
"""Frames with a row per token."""


def results_bytes(n_tokens: int, n_sequences: int, n_arms: int, n_layers: int, has_vocabulary: bool) -> int:
    """Largest number of bytes that analysis and report of a run write.

    Args:
        n_tokens: response tokens of the run at most.
        n_layers: MoE layers; 0 = dense.
        has_vocabulary: arms keep whole next-token distributions.
    """
    from moediag.figures import FIGURES

    n_pairs = math.ceil(_PAIRS_PER_ARM * n_arms)
    token, exact = (_row_bytes(name) for name in _PER_TOKEN)
    per_pair = _PAIR + _LAYER * n_layers + token * n_tokens + _SEQUENCE * n_sequences
    figures = _PICTURE * (len(FIGURES) if n_layers else len(FIGURES) // 2)  # half of them are of routing
    pages = _PAGES + min(n_tokens, _SHOWN) * (250 + 12 * n_layers) + figures * _PNG * 4 / 3
    return round(n_pairs * per_pair + has_vocabulary * exact * n_tokens + figures + pages)


def records_bytes(n_tensors: Sequence[int], n_arms: int, n_shards: int, n_layers: int) -> int:
    """Largest number of bytes of a run's records, logs and headers.

    Args:
        n_tensors: of each checkpoint that is loaded.
    """
    return 400 * sum(n_tensors) + n_arms * (120_000 + 4_000 * n_layers + 10_000 * n_shards)


def _row_bytes(frame: str) -> int:
    """A row of a frame as its columns declare it, uncompressed."""
    columns = next(spec.columns for spec in declared_frames() if spec.name == frame)
    return sum(np.dtype(column.dtype).itemsize for column in columns if column.dtype != "str")
