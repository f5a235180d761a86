"""Off-policy corrections simulated on logged tokens: weights by method, presets, what gets masked."""

from moediag.corrections.batch import Batch
from moediag.corrections.correction import Correction, Step, compose, correction_weights, parse_correction, weights
from moediag.corrections.masked_shares import masked_shares
from moediag.corrections.methods import METHODS, Method
from moediag.corrections.presets import PRESETS, Preset, distinct_corrections, find_presets
from moediag.corrections.recommend import recommend_band
from moediag.corrections.statistics import compare_corrections
from moediag.corrections.sweep import sweep_by_band

__all__ = [
    "METHODS",
    "PRESETS",
    "Batch",
    "Correction",
    "Method",
    "Preset",
    "Step",
    "compare_corrections",
    "compose",
    "correction_weights",
    "distinct_corrections",
    "find_presets",
    "masked_shares",
    "parse_correction",
    "recommend_band",
    "sweep_by_band",
    "weights",
]
