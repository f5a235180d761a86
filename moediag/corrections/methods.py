"""Every correction, declared once: its rule, what it bounds, its parameters with their defaults, and where it is from.

A correction is one function here: its parameters' defaults are those of its source, and the decorator says what a
reader and the statistics have to know of it. Whatever lists corrections (``METHODS``, ``--all``, the tables of
reports/corrections.md, figures) reads them from this module.

Invariants:
    - 0 = no update; bounds are closed (a token or sequence exactly on a bound is kept, in float32 where its
      log-probabilities are float32) and tested in log space;
    - *weights* carry a ratio, truncated or masked; *masks* keep or drop tokens, *filters* keep or drop whole sequences.
      Weights multiply with any masks and filters, never with each other: ratio squared is nobody's method;
    - a name says the level: ``_token`` or nothing acts on the token's own ratio, ``sequence`` on the product of the
      sequence's ratios, ``geometric`` on their geometric mean: three different things;
    - weights take no part in gradients (detached), as in every source named here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.measures import ICEPOP_BAND
from moediag.corrections.terms import LOG_RATIO_CLAMP, Float64, Terms, clamped_exp, on_bounds
from moediag.errors import MoediagError

Kept = NDArray[np.bool_]
Kind = Literal["weight", "mask", "filter"]
Rule = Callable[..., NDArray[Any]]

_LARGEST_RATIO: Final = float(np.exp(LOG_RATIO_CLAMP))


class Bounded(NamedTuple):
    """What a correction compares with its bounds.

    Args:
        words: in words.
        unit: whether tokens are judged one by one, or whole sequences; empty = nothing is bounded.
        ratio: which of the three ratios it is; empty = something else.
    """

    words: str
    unit: Literal["token", "sequence", ""]
    ratio: Literal["token", "product", "geometric", ""] = ""


@dataclass(frozen=True)
class Method:
    """A correction.

    Args:
        parameters: name -> default.
        bounded: what its bounds are compared with.
        between: the parameters between which a ratio is left as it is (lower, upper); empty = that side is open.
        truncates: ratios beyond are cut down (or raised) to the bound, not masked.
        formula: the weight, in the notation of reports/corrections.md.
        beyond: what happens to tokens beyond the bounds.
        needs_advantage: the rule looks at the sign of the advantage.
    """

    name: str
    kind: Kind
    parameters: dict[str, float]
    bounded: Bounded
    between: tuple[str, str]
    truncates: bool
    formula: str
    beyond: str
    needs_advantage: bool
    source: str
    rule: Rule

    @property
    def masks(self) -> Literal["token", "sequence", ""]:
        """What gets no update at once: single tokens, or all tokens of a sequence; empty = every token gets one."""
        return "" if self.truncates else self.bounded.unit

    def is_truncated_T(self, x: Terms, low: float, high: float) -> NDArray[np.bool_]:  # noqa: N802 - the legend suffix
        """Which tokens have a ratio beyond the bounds [low, high] of a method that truncates."""
        if self.bounded.unit == "token":
            return ~_is_inside(x.diff_T, x.is_float32_T, low, high)
        log_ratio_S = x.log_product_S if self.bounded.ratio == "product" else x.log_geometric_mean_S
        return x.of_sequence(~_is_inside(log_ratio_S, x.is_float32_S, low, high))

    @property
    def side(self) -> str:
        """Whose log-ratio tells on which side of the bounds a masked token is; none = they have no two sides."""
        return self.masks if self.masks != "sequence" or self.bounded.ratio else "none"

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
        for name, value in values.items():
            if math.isnan(value) or value < 0:
                raise MoediagError(f"{self.name} needs {name} >= 0, found {name}={value}")
        low, high = self.between
        if low and high and not (values[low] <= values[high] and values[high] > 0):
            raise MoediagError(
                f"{self.name} needs 0 <= {low} <= {high} and {high} > 0, "
                f"found {low}={values[low]} {high}={values[high]}"
            )
        if high and values[high] <= 0:
            raise MoediagError(f"{self.name} needs {high} > 0, found {high}={values[high]}")
        return values


METHODS: Final[dict[str, Method]] = {}
"""Every method by its name. A sequence without a scored token is kept by every filter: it has no token to update."""

_NOTHING: Final = Bounded("nothing", "")
_RATIO: Final = Bounded("token ratio r", "token", "token")
_PRODUCT: Final = Bounded("product ratio of the sequence, R = exp(sum d)", "sequence", "product")
_GEOMETRIC: Final = Bounded("geometric mean ratio of the sequence, G = exp(mean d)", "sequence", "geometric")
_MEAN_K3: Final = Bounded("mean k3 of the sequence", "sequence")

_BEYOND: Final = {"token": "no update", "sequence": "no update for any token of the sequence", "": "nothing is bounded"}


def _method(
    kind: Kind,
    bounded: Bounded,
    formula: str,
    source: str,
    *,
    between: tuple[str, str] = ("", ""),
    truncates: bool = False,
    beyond: str = "",
    needs_advantage: bool = False,
) -> Callable[[Rule], Rule]:
    def declare(rule: Rule) -> Rule:
        name = rule.__name__
        _, *parameters = inspect.signature(rule).parameters.values()
        defaults = {parameter.name: float(parameter.default) for parameter in parameters}
        METHODS[name] = Method(
            name, kind, defaults, bounded, between, truncates, formula, beyond or _BEYOND[bounded.unit],
            needs_advantage, source, rule,
        )  # fmt: skip
        return rule

    return declare


def log_bound(bound: float) -> float:
    """A ratio's bound as a log-ratio; 0 leaves the side below open, infinity the side above."""
    # numpy's log, not math's: callers build values with np.log, and the two may differ in the last bit
    return float(np.log(bound)) if bound > 0 else -math.inf


@_method("weight", _NOTHING, "1", "GRPO without correction")
def none(x: Terms) -> Float64:
    """1 for every token."""
    return np.ones(len(x))


@_method(
    "weight", _RATIO, "r if alpha <= r <= beta else 0", "IcePop post; Ring-1T, arXiv 2510.18855",
    between=("alpha", "beta"),
)  # fmt: skip
def icepop(x: Terms, alpha: float = ICEPOP_BAND[0], beta: float = ICEPOP_BAND[1]) -> Float64:
    """Ratio inside [alpha, beta], else 0; the defaults are Ring-1T's."""
    return _masked(x, icepop_hard(x, alpha, beta))


@_method("mask", _RATIO, "1 if alpha <= r <= beta else 0", "Online IcePop variants", between=("alpha", "beta"))
def icepop_hard(x: Terms, alpha: float = ICEPOP_BAND[0], beta: float = ICEPOP_BAND[1]) -> Kept:
    """Ratio inside [alpha, beta]."""
    return _is_inside(x.diff_T, x.is_float32_T, alpha, beta)


_GOES_ON: Final = "the update goes on with weight cap"


@_method(
    "weight", _RATIO, "min(r, cap)", "Yao et al. 2025, TIS; verl, slime",
    between=("", "cap"), truncates=True, beyond=_GOES_ON,
)  # fmt: skip
def tis_token(x: Terms, cap: float = 2.0) -> Float64:
    """min(ratio, cap)."""
    return _truncated(x.diff_T, x.is_float32_T, cap)


@_method(
    "weight", _PRODUCT, "min(R, cap)", "verl, sequence level", between=("", "cap"), truncates=True, beyond=_GOES_ON
)
def tis_sequence(x: Terms, cap: float = 2.0) -> Float64:
    """min(product ratio, cap) for every token."""
    return x.of_sequence(_truncated(x.log_product_S, x.is_float32_S, cap))


@_method(
    "weight", _GEOMETRIC, "min(G, cap)", "ms-swift, sequence_truncate; slime, AReaL and ROLL, with other caps",
    between=("", "cap"), truncates=True, beyond=_GOES_ON,
)  # fmt: skip
def tis_geometric(x: Terms, cap: float = 2.0) -> Float64:
    """min(geometric mean ratio, cap) for every token; the default is ms-swift's."""
    return x.of_sequence(_truncated(x.log_geometric_mean_S, x.is_float32_S, cap))


@_method(
    "weight", _RATIO, "min(max(r, low), high)", "OpenRLHF, type tis; slime, NeMo-RL and AReaL with a lower bound",
    between=("low", "high"), truncates=True, beyond="the update goes on with the bound as weight",
)  # fmt: skip
def clamp_token(x: Terms, low: float = 0.5, high: float = 5.0) -> Float64:
    """min(max(ratio, low), high): small ratios are raised, which no truncation does; the defaults are OpenRLHF's."""
    at_least = max(low, 1 / _LARGEST_RATIO)  # no weight is below exp(-20), whose like a masked token would be
    held = on_bounds(x.diff_T, [log_bound(at_least)], x.is_float32_T)
    return np.where(held <= log_bound(at_least), at_least, _truncated(x.diff_T, x.is_float32_T, high))


@_method("weight", _RATIO, "r if r <= cap else 0", "Liu et al. 2025, MIS", between=("", "cap"))
def mis_token(x: Terms, cap: float = 2.0) -> Float64:
    """Ratio up to cap, else 0."""
    return _masked(x, _at_most(x.diff_T, x.is_float32_T, log_bound(cap)))


@_method("weight", _PRODUCT, "R if R <= cap else 0", "Liu et al. 2025, Seq-MIS; verl", between=("", "cap"))
def mis_sequence(x: Terms, cap: float = 2.0) -> Float64:
    """Product ratio up to cap for every token, else 0."""
    is_kept_S = _at_most(x.log_product_S, x.is_float32_S, log_bound(cap))
    return x.of_sequence(np.where(is_kept_S, clamped_exp(x.log_product_S), 0.0))


@_method("filter", _PRODUCT, "1 if low <= R <= high else 0", "verl, slime, SkyRL", between=("low", "high"))
def sequence_band(x: Terms, low: float = 0.5, high: float = 2.0) -> Kept:
    """Product ratio of the sequence inside [low, high]."""
    return x.of_sequence(_is_inside(x.log_product_S, x.is_float32_S, low, high))


@_method("filter", _GEOMETRIC, "1 if low <= G <= high else 0", "verl, Geo-RS", between=("low", "high"))
def geometric_band(x: Terms, low: float = 0.999, high: float = 1.001) -> Kept:
    """Geometric mean ratio of the sequence inside [low, high]."""
    return x.of_sequence(_is_inside(x.log_geometric_mean_S, x.is_float32_S, low, high))


@_method("filter", Bounded("least token ratio of the sequence", "sequence"), "1 if min r >= floor else 0", "slime")
def veto(x: Terms, floor: float = 1e-4) -> Kept:
    """No ratio of the sequence below floor."""
    return x.of_sequence(_at_most(-x.least_S(x.diff_T), x.is_float32_S, -log_bound(floor)))


@_method(
    "weight", Bounded("binary KL of the token, D(p, q)", "token"),
    "r if D(train, infer) <= phi and D(infer, train) <= phi else 0", "KPop post; prime-rl",
)  # fmt: skip
def kpop(x: Terms, phi: float = 0.1) -> Float64:
    """Ratio where the binary KL is at most phi in both directions, else 0."""
    largest_T = np.maximum(x.binary_kl_train_infer_T, x.binary_kl_infer_train_T)
    return _masked(x, _at_most(largest_T, x.is_float32_T, phi))


@_method(
    "weight", Bounded("difference of the token's probabilities, p_train - p_infer", "token"),
    "r if abs(p_train - p_infer) <= eps else 0", "prime-rl",
)  # fmt: skip
def ipo(x: Terms, eps: float = 0.1) -> Float64:
    """Ratio where the token's probabilities differ by at most eps, else 0."""
    return _masked(x, _at_most(np.abs(x.prob_diff_T), x.is_float32_T, eps))


_NOT_AWAY: Final = "no update that moves further away"


@_method(
    "weight", Bounded("p_train - p_infer, signed, with the sign of A", "token"),
    "0 if A > 0 and p_train - p_infer > eps_high, or A < 0 and p_train - p_infer < -eps_low; else r",
    "DPPO, arXiv 2602.04879, binary TV; prime-rl", beyond=_NOT_AWAY, needs_advantage=True,
)  # fmt: skip
def dppo_tv(x: Terms, eps_low: float = 0.2, eps_high: float = 0.2) -> Float64:
    """Ratio, but 0 where the update would move the token's probability further than eps away from infer's."""
    sign_T = np.sign(_advantages(x))
    is_kept_T = np.where(
        sign_T > 0,
        _at_most(x.prob_diff_T, x.is_float32_T, eps_high),
        (sign_T == 0) | _at_most(-x.prob_diff_T, x.is_float32_T, eps_low),
    )
    return _masked(x, is_kept_T)


@_method(
    "weight", Bounded("binary KL of the token, with the signs of A and p_train - p_infer", "token"),
    "0 if D(infer, train) > eps and A (p_train - p_infer) > 0; else r",
    "DPPO, arXiv 2602.04879, binary KL", beyond=_NOT_AWAY, needs_advantage=True,
)  # fmt: skip
def dppo_kl(x: Terms, eps: float = 0.05) -> Float64:
    """Ratio, but 0 where binary KL(infer, train) exceeds eps and the update would move further away."""
    moves_away_T = np.sign(_advantages(x)) * x.prob_diff_T > 0
    return _masked(x, ~moves_away_T | _at_most(x.binary_kl_infer_train_T, x.is_float32_T, eps))


@_method(
    "filter", Bounded("largest d^2 / 2 of the sequence", "sequence"), "1 if max d^2 / 2 <= delta else 0",
    "TRM, arXiv 2512.23075, max form",
)  # fmt: skip
def trm_max(x: Terms, delta: float = 0.05) -> Kept:
    """No d^2 / 2 of the sequence above delta."""
    return x.of_sequence(_at_most(-x.least_S(-np.square(x.diff_T) / 2), x.is_float32_S, delta))


@_method("filter", _MEAN_K3, "1 if mean k3 <= delta else 0", "TRM, arXiv 2512.23075, mean form")
def trm_mean(x: Terms, delta: float = 0.001) -> Kept:
    """Mean k3 of the sequence at most delta."""
    return k3_mean(x, delta)


@_method("filter", _MEAN_K3, "1 if mean k3 <= limit else 0", "verl")
def k3_mean(x: Terms, limit: float = 0.01) -> Kept:
    """Mean k3 of the sequence at most limit."""
    return x.of_sequence(_at_most(x.mean_k3_S, x.is_float32_S, limit))


@_method(
    "filter", Bounded("mean exp(abs(d)) of the sequence", "sequence"), "1 if mean exp(abs(d)) <= limit else 0",
    "NeMo-RL, seq_logprob_error_threshold",
)  # fmt: skip
def prob_mult_error(x: Terms, limit: float = 2.0) -> Kept:
    """Mean multiplicative error of the sequence's probabilities at most limit; the default is that of the recipes."""
    mean_S = x.exact_sums(clamped_exp(np.abs(x.diff_T))) / x.n_S
    return x.of_sequence(_at_most(mean_S, x.is_float32_S, limit))


def _at_most(values: Float64, is_float32: Kept, bound: float) -> Kept:
    return np.asarray(on_bounds(values, [bound], is_float32) <= bound)


def _is_inside(log_ratio: Float64, is_float32: Kept, low: float, high: float) -> Kept:
    low_log, high_log = log_bound(low), log_bound(high)
    held = on_bounds(log_ratio, [low_log, high_log], is_float32)
    return np.asarray((held >= low_log) & (held <= high_log))


def _masked(x: Terms, is_kept_T: Kept) -> Float64:
    return np.where(is_kept_T, x.ratio_T, 0.0)


def _truncated(log_ratio: Float64, is_float32: Kept, cap: float) -> Float64:
    """min(ratio, cap), exactly cap from the bound on."""
    at_most = min(cap, _LARGEST_RATIO)
    held = on_bounds(log_ratio, [log_bound(cap)], is_float32)
    return np.where(held >= log_bound(cap), at_most, np.minimum(clamped_exp(log_ratio), at_most))


def _advantages(x: Terms) -> Float64:
    if x.advantage_T is None:
        raise MoediagError("dppo looks at the sign of the advantage; none is given: pass advantage_T, or rewards")
    return x.advantage_T
