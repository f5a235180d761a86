"""Every correction by its name: kind, parameters with their defaults, formula, and where it comes from.

Invariants:
    - a name says the level: ``_token`` or nothing acts on the token's own ratio, ``sequence`` on the product of the
      sequence's ratios, ``geometric`` on their geometric mean;
    - *weights* carry a ratio, *masks* keep or drop tokens, *filters* keep or drop whole sequences. Weights multiply
      with any masks and filters, never with each other: ratio squared is nobody's method;
    - formula and bounds as printed here are what reports/corrections.md shows, and a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from numpy.typing import NDArray

from moediag.analysis.measures import ICEPOP_BAND
from moediag.corrections import rules
from moediag.errors import MoediagError

Level = Literal["weight", "mask", "filter"]
Side = Literal["token", "sequence", "none", ""]
Rule = Callable[..., NDArray[Any]]


@dataclass(frozen=True)
class Method:
    """A correction: its rule, what kind of factor it is, its parameters with the default of its source.

    Args:
        parameters: name -> default; bands come as (lower, upper).
        acts_on: what its bound is compared with, in words.
        formula: the weight, in the notation of reports/corrections.md.
        beyond: what happens to tokens beyond the bounds.
        side: whose log-ratio tells on which side of the band a masked token is; none = its bound has no two sides;
            empty = masks nothing.
        needs_advantage: the rule looks at the sign of the advantage.
        truncates: whose ratio is cut down to the parameter ``cap``; empty = cuts nothing down.
    """

    name: str
    level: Level
    parameters: dict[str, float]
    acts_on: str
    formula: str
    beyond: str
    rule: Rule
    source: str
    side: Side = ""
    needs_advantage: bool = False
    truncates: Side = ""

    def with_defaults(self, given: dict[str, float]) -> dict[str, float]:
        """The parameters, defaults where none is given.

        Raises:
            MoediagError: a parameter that the method does not have, or a value outside its domain.
        """
        for name, value in given.items():
            if name not in self.parameters:
                has = ", ".join(self.parameters) or "no parameters"
                raise MoediagError(f"{self.name} has {has}; found {name}={value}")
        values = {name: float(given.get(name, default)) for name, default in self.parameters.items()}
        _refuse_domain(self.name, values)
        return values


def _refuse_domain(method: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        if math.isnan(value) or value < 0:
            raise MoediagError(f"{method} wants {name} >= 0, found {name}={value}")
    for low, high in (("alpha", "beta"), ("low", "high")):
        if low in values and not (values[low] <= values[high] and values[high] > 0):
            raise MoediagError(
                f"{method} wants 0 <= {low} <= {high} and {high} > 0, found {low}={values[low]} {high}={values[high]}"
            )
    if values.get("cap", 1.0) <= 0:
        raise MoediagError(f"{method} wants cap > 0, found cap={values['cap']}")


_RATIO: Final = "token ratio r"
_PRODUCT: Final = "product ratio of the sequence, R = exp(sum d)"
_GEOMETRIC: Final = "geometric mean ratio of the sequence, G = exp(mean d)"
_ZERO: Final = "no update"
DROPPED: Final = "no update for any token of the sequence"
"""What happens beyond the bounds of a method that keeps or drops whole sequences."""
_ICEPOP_BAND: Final = dict(zip(("alpha", "beta"), ICEPOP_BAND, strict=True))

METHODS: Final[dict[str, Method]] = {
    method.name: method
    for method in (
        Method("none", "weight", {}, "nothing", "1", "nothing is bounded", rules.none, "GRPO without correction"),
        Method(
            "icepop", "weight", _ICEPOP_BAND, _RATIO, "r if alpha <= r <= beta else 0", _ZERO, rules.icepop,
            "IcePop post; Ring-1T, arXiv 2510.18855", "token",
        ),
        Method(
            "icepop_hard", "mask", _ICEPOP_BAND, _RATIO, "1 if alpha <= r <= beta else 0", _ZERO, rules.icepop_hard,
            "Online IcePop variants", "token",
        ),
        Method(
            "tis_token", "weight", {"cap": 2.0}, _RATIO, "min(r, cap)", "the update goes on with weight cap",
            rules.tis_token, "Yao et al. 2025, TIS; verl, slime", truncates="token",
        ),
        Method(
            "tis_sequence", "weight", {"cap": 2.0}, _PRODUCT, "min(R, cap)", "the update goes on with weight cap",
            rules.tis_sequence, "verl, sequence level", truncates="sequence",
        ),
        Method(
            "mis_token", "weight", {"cap": 2.0}, _RATIO, "r if r <= cap else 0", _ZERO, rules.mis_token,
            "Liu et al. 2025, MIS", "token",
        ),
        Method(
            "mis_sequence", "weight", {"cap": 2.0}, _PRODUCT, "R if R <= cap else 0", DROPPED, rules.mis_sequence,
            "Liu et al. 2025, Seq-MIS; verl", "sequence",
        ),
        Method(
            "sequence_band", "filter", {"low": 0.5, "high": 2.0}, _PRODUCT, "1 if low <= R <= high else 0", DROPPED,
            rules.sequence_band, "verl, slime, SkyRL", "sequence",
        ),
        Method(
            "geometric_band", "filter", {"low": 0.999, "high": 1.001}, _GEOMETRIC, "1 if low <= G <= high else 0",
            DROPPED, rules.geometric_band, "verl, Geo-RS", "sequence",
        ),
        Method(
            "veto", "filter", {"floor": 1e-4}, "least token ratio of the sequence", "1 if min r >= floor else 0",
            DROPPED, rules.veto, "slime", "none",
        ),
        Method(
            "kpop", "weight", {"phi": 0.1}, "binary KL of the token, D(p, q)",
            "r if D(train, infer) <= phi and D(infer, train) <= phi else 0", _ZERO, rules.kpop, "KPop post; prime-rl",
            "token",
        ),
        Method(
            "ipo", "weight", {"eps": 0.1}, "difference of the token's probabilities, p_train - p_infer",
            "r if abs(p_train - p_infer) <= eps else 0", _ZERO, rules.ipo, "prime-rl", "token",
        ),
        Method(
            "dppo_tv", "weight", {"eps_low": 0.2, "eps_high": 0.2}, "p_train - p_infer, signed, with the sign of A",
            "0 if A > 0 and p_train - p_infer > eps_high, or A < 0 and p_train - p_infer < -eps_low; else r",
            "no update that moves further away", rules.dppo_tv, "DPPO, arXiv 2602.04879, binary TV; prime-rl",
            "token", needs_advantage=True,
        ),
        Method(
            "dppo_kl", "weight", {"eps": 0.05}, "binary KL of the token, with the signs of A and p_train - p_infer",
            "0 if D(infer, train) > eps and A (p_train - p_infer) > 0; else r",
            "no update that moves further away", rules.dppo_kl, "DPPO, arXiv 2602.04879, binary KL",
            "token", needs_advantage=True,
        ),
        Method(
            "trm_max", "filter", {"delta": 0.05}, "largest d^2 / 2 of the sequence", "1 if max d^2 / 2 <= delta else 0",
            DROPPED, rules.trm_max, "TRM, arXiv 2512.23075, max form", "none",
        ),
        Method(
            "trm_mean", "filter", {"delta": 0.001}, "mean k3 of the sequence", "1 if mean k3 <= delta else 0",
            DROPPED, rules.trm_mean, "TRM, arXiv 2512.23075, mean form", "none",
        ),
        Method(
            "k3_mean", "filter", {"limit": 0.01}, "mean k3 of the sequence", "1 if mean k3 <= limit else 0",
            DROPPED, rules.k3_mean, "verl", "none",
        ),
    )
}  # fmt: skip
"""Every method by its name. A sequence without a scored token is kept by every filter: it has no token to update."""
