"""Off-policy corrections simulated on logged tokens: weights by method, presets, what gets masked."""

from moediag.corrections.arrays import weights
from moediag.corrections.bands import masked_shares, recommend_band, sweep_by_band
from moediag.corrections.correction import Correction, Step, compose, correction_weights, parse_correction
from moediag.corrections.methods import METHODS, Method
from moediag.corrections.presets import PRESETS, Preset, choose, distinct_corrections, find_presets
from moediag.corrections.statistics import compare_corrections
from moediag.corrections.terms import Terms

__all__ = [
    "METHODS",
    "PRESETS",
    "Correction",
    "Method",
    "Preset",
    "Step",
    "Terms",
    "choose",
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
