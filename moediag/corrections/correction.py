"""Corrections, alone or composed, and the weights that they give to logged tokens.

Invariants:
    - the same arrays give the same weights, bit for bit, in any order of rows and through any route;
    - a row without two finite log-probabilities gets 0: no update, and nothing that would poison a product. Whether a
      0 means "masked" or "not scored" is told by the log-probabilities, not by the weight.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from moediag.corrections.methods import METHODS, Method
from moediag.corrections.terms import LOG_RATIO_CLAMP, Float64, Terms
from moediag.errors import MoediagError

_STEP: Final = re.compile(r"\s*([a-z_0-9]+)\s*(?::(.*))?", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One method with its parameters."""

    method: str
    parameters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MoediagError(f"no correction is named {self.method!r}; there are {', '.join(METHODS)}")
        object.__setattr__(self, "parameters", METHODS[self.method].with_defaults(self.parameters))

    @property
    def declared(self) -> Method:
        """The method's declaration."""
        return METHODS[self.method]

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which values the ratio is left as it is; 0 and infinity = that side is open."""
        low, high = self.declared.between
        return self.parameters.get(low, 0.0), self.parameters.get(high, math.inf)

    def __str__(self) -> str:
        parameters = ",".join(f"{name}={repr(value).removesuffix('.0')}" for name, value in self.parameters.items())
        return f"{self.method}:{parameters}" if parameters else self.method


@dataclass(frozen=True)
class Correction:
    """One or more methods multiplied: at most one weight, any number of masks and filters.

    Raises:
        MoediagError: two weights; their product would carry the ratio squared.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise MoediagError("a correction needs at least one method; for no correction say 'none'")
        weighted = [step.method for step in self.steps if step.declared.kind == "weight" and step.method != "none"]
        if len(weighted) > 1:
            others = ", ".join(name for name, method in METHODS.items() if method.kind != "weight")
            raise MoediagError(
                f"{' and '.join(weighted)} both carry the ratio, their product its square; combine one of them with "
                f"masks or filters ({others})"
            )

    @property
    def needs_advantage(self) -> bool:
        """Whether a step looks at advantages."""
        return any(step.declared.needs_advantage for step in self.steps)

    @property
    def can_mask(self) -> bool:
        """Whether a step gives any token no update; truncation and ``none`` do not."""
        return any(step.declared.masks for step in self.steps)

    @property
    def is_mask(self) -> bool:
        """Every weight is 1 or 0: no step carries a ratio."""
        return all(step.declared.kind != "weight" or step.method == "none" for step in self.steps)

    @property
    def drops_sequences(self) -> bool:
        """Whether a step masks all tokens of a sequence at once."""
        return any(step.declared.masks == "sequence" for step in self.steps)

    @property
    def largest_weight(self) -> float:
        """No weight is larger: what is beyond a cap or the upper end of a band is cut down or masked."""
        highest = (step.bounds[1] for step in self.steps if step.declared.kind != "filter")
        return min([float(np.exp(LOG_RATIO_CLAMP)), *highest])

    @property
    def side(self) -> str:
        """Whose log-ratio tells on which side a masked token is: token, sequence, or none where steps disagree."""
        sides = {step.declared.side for step in self.steps if step.declared.masks}
        return sides.pop() if len(sides) == 1 else "none"

    @property
    def truncation(self) -> Step | None:
        """The step that truncates ratios; None = the correction truncates nothing."""
        return next((step for step in self.steps if step.declared.truncates), None)

    def of_terms(self, x: Terms) -> Float64:
        """Weights of the scored tokens."""
        ratio_T, is_kept_T = np.ones(len(x)), np.ones(len(x), dtype=bool)
        for step in self.steps:
            factor_T = step.declared.rule(x, **step.parameters)
            if step.declared.kind == "weight":
                ratio_T = ratio_T * factor_T
            else:
                is_kept_T &= factor_T
        return np.where(is_kept_T, ratio_T, 0.0)

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))


def parse_correction(text: str) -> Correction:
    """A correction from words: ``method[:name=value,...]``, composed with ``+``.

    Raises:
        MoediagError: an unknown method or parameter, a value that is no number.

    Example:
        >>> str(parse_correction("icepop:alpha=0.5,beta=2+veto"))
        'icepop:alpha=0.5,beta=2+veto:floor=0.0001'
    """
    # a plus sign inside a number (1e+4) joins nothing
    return Correction(tuple(_parse_step(part) for part in re.split(r"(?<![eE])\+", text)))


def _parse_step(text: str) -> Step:
    found = _STEP.fullmatch(text)
    if not found:
        raise MoediagError(f"a correction reads method[:name=value,...], found {text!r}")
    parameters = {}
    for part in filter(None, (found[2] or "").split(",")):
        name, _, value = part.partition("=")
        try:
            parameters[name.strip()] = float(value)
        except ValueError:
            raise MoediagError(f"{found[1]} needs {name.strip()}=number, found {part!r}") from None
    return Step(found[1], parameters)


def correction_weights(
    correction: Correction,
    logp_train_T: ArrayLike,
    logp_infer_T: ArrayLike,
    seq_id_T: ArrayLike,
    advantage_T: ArrayLike | None = None,
) -> Float64:
    """(T,) weights of the rows, 0 = no update; arguments as of :meth:`~moediag.corrections.terms.Terms.of_arrays`."""
    x = Terms.of_arrays(logp_train_T, logp_infer_T, seq_id_T, advantage_T)
    return x.at_rows(correction.of_terms(x))


def compose(*corrections: Correction | str) -> Correction:
    """One correction that multiplies several.

    Example:
        >>> str(compose("tis_token", "geometric_band:low=0.99,high=1.01"))
        'tis_token:cap=2+geometric_band:low=0.99,high=1.01'
    """
    parts = [parse_correction(part) if isinstance(part, str) else part for part in corrections]
    return Correction(tuple(step for part in parts for step in part.steps))
