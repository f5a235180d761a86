"""Off-policy corrections simulated on logged tokens: weights by method, presets, what gets masked."""

from moediag.corrections.icepop import ICEPOP_PRESETS, IcepopPreset, corrections_table, icepop_weights

__all__ = ["ICEPOP_PRESETS", "IcepopPreset", "corrections_table", "icepop_weights"]
