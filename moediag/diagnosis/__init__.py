"""Where a mismatch comes from: the same function or another, the ladder, and the verdict."""

from moediag.diagnosis.causes import Seen
from moediag.diagnosis.function import Distances, FirstLayers, FunctionTest, distances, first_layers, same_function
from moediag.diagnosis.ladder import LADDER, REMEDIES, ladder, remedies
from moediag.diagnosis.layers import LAYERS_APART, layers_apart
from moediag.diagnosis.reference import Whose, whose
from moediag.diagnosis.verdict import verdict

__all__ = [
    "LADDER",
    "LAYERS_APART",
    "REMEDIES",
    "Distances",
    "FirstLayers",
    "FunctionTest",
    "Seen",
    "Whose",
    "distances",
    "first_layers",
    "ladder",
    "layers_apart",
    "remedies",
    "same_function",
    "verdict",
    "whose",
]
