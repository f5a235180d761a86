"""Gradient audit: where each correction points the policy gradient, from a checkpoint and a run's logged tokens.

Above the engines (it loads the model through them) and above the corrections (their weights decide what is
differentiated); its results are plain frames that :mod:`moediag.analysis.gradients` reads without an engine.
"""
