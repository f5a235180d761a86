"""Flips predicted from one side's scores and a noise that was measured. In order of use:

1. :mod:`~moediag.analysis.flips.noise`: how far the scores of one token move between two arms;
2. :mod:`~moediag.analysis.flips.predictor`: the probability that a choice flips under that noise;
3. :mod:`~moediag.analysis.flips.calibration`: predicted against observed flips, summed over choices;
4. :mod:`~moediag.analysis.flips.explained`: all three for a run's pairs, explained and forecast; the entrance.
"""
