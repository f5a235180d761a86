"""Which corrections a simulation compares, how each is called, and who uses it.

Invariant: a correction stands in a simulation once, however many presets and words name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moediag.corrections.correction import Correction, Step, parse_correction
from moediag.corrections.methods import METHODS
from moediag.corrections.presets import PRESETS, distinct_corrections, find_presets

_LONGEST_LABEL: Final = 32
"""Longer words are shown by the name of a preset that has them [character]."""


@dataclass(frozen=True)
class Chosen:
    """A correction of a simulation.

    Args:
        label: what tables, figures and columns of weights call it.
        correction: what it does.
        presets: names of the presets that are this correction.
        notes: what these presets' sources do differently, with their names.
    """

    label: str
    correction: Correction
    presets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose(methods: Sequence[str] = (), presets: Sequence[str] = (), everything: bool = False) -> dict[str, Chosen]:
    """The corrections named, in the order named; all presets and methods where none is, or all are requested.

    Args:
        methods: corrections in words, see :func:`~moediag.corrections.parse_correction`.
        presets: presets, or frameworks and papers for all of theirs.
        everything: add every different correction of the presets, and every method with its defaults.

    Returns:
        Label -> correction; ``none`` is first wherever something is compared.

    Raises:
        MoediagError: an unknown method, parameter or preset.

    Example:
        >>> list(choose(["icepop:beta=2"], ["glm-5"]))
        ['none', 'icepop:alpha=0.5,beta=2']
    """
    named = {"none": "none"}  # words -> label
    for words in methods:
        correction = parse_correction(words)
        named.setdefault(str(correction), str(correction))
    for asked in presets:
        for preset in find_presets(asked):
            named.setdefault(str(preset.correction), preset.name)
    if everything or not (methods or presets):
        for words in (*distinct_corrections(), *map(str, _defaults())):
            named.setdefault(words, _label(words))
    return {label: _chosen(words, label) for words, label in named.items()}


def _defaults() -> list[Correction]:
    return [Correction((Step(method),)) for method in METHODS]


def _label(words: str) -> str:
    names = _presets_of(words)
    return words if len(words) <= _LONGEST_LABEL or not names else names[0]


def _presets_of(words: str) -> list[str]:
    return [preset.name for preset in PRESETS.values() if str(preset.correction) == words]


def _chosen(words: str, label: str) -> Chosen:
    names = _presets_of(words)
    notes = tuple(f"{name}: {PRESETS[name].note}" for name in names if PRESETS[name].note)
    return Chosen(label, parse_correction(words), tuple(names), notes)
