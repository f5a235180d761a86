"""Where a mismatch comes from: the same function or another, the ladder, and the verdict."""

from moediag.diagnosis.function import Distances, FirstLayers, FunctionTest, distances, first_layers, same_function
from moediag.diagnosis.ladder import LADDER, REMEDIES, ladder, remedies
from moediag.diagnosis.reference import Whose, whose
from moediag.diagnosis.verdict import Seen, verdict

__all__ = [
    "LADDER",
    "REMEDIES",
    "Distances",
    "FirstLayers",
    "FunctionTest",
    "Seen",
    "Whose",
    "distances",
    "first_layers",
    "ladder",
    "remedies",
    "same_function",
    "verdict",
    "whose",
]
