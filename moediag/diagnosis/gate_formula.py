"""Which formula the gate weights of a layer follow, where two engines choose the same experts and weigh them otherwise.

Candidates are held against each side's weights of the chosen experts: the scores s of its own router logits, or s plus
the correction bias b, where logits were kept; the other side's weights w; each as it is or divided by its sum over the
K, and each with a constant factor. Without logits s + b is a w + b, with the a of every row that fits best: K weights
with a given sum decide that for K of 3 and more. A formula is named only where it leaves no more than float32 rounds:
several come near.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moediag.run.capture import Capture
from moediag.run.records import RouterSpec

Float64 = NDArray[np.float64]

_CERTAIN: Final = 0.99
"""Share of rows that a formula must explain: in single ones the scores themselves may differ."""

_SYMBOLS: Final = "s = scores, b = correction bias, w = the other side's weights, a of each row; sums over the K"


class Formula(NamedTuple):
    """One candidate.

    Args:
        words: the formula.
        residual: what it leaves of the row's largest weight [1], 99th percentile over rows; 0 = explained.
    """

    words: str
    residual: float


def formulas_of(weights_NK: Float64, bases: Mapping[str, Float64], rounding: float) -> list[Formula]:
    """What every candidate leaves of one side's weights, least first; of equal ones the simpler.

    Args:
        weights_NK: gate weights of the chosen experts, rows with a positive sum.
        bases: symbol -> (N, K) numbers in the same order of experts: scores, scores plus bias, other weights.
        rounding: relative difference of weights that is rounding: a factor within it of 1 is none.
    """
    found = []
    for name, base_NK in bases.items():
        total_N1 = base_NK.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            divided_NK = np.where(total_N1 != 0, base_NK / total_N1, np.nan)
        bare = name.strip("()")
        for words, formula_NK in ((bare, base_NK), (f"{name} / sum({bare})", divided_NK)):
            with np.errstate(divide="ignore", invalid="ignore"):
                factor_N = weights_NK.sum(axis=1) / formula_NK.sum(axis=1)
            factor = float(np.median(factor_N[np.isfinite(factor_N)])) if np.isfinite(factor_N).any() else 1.0
            if is_plain := abs(factor - 1) <= rounding:
                factor = 1.0
            apart_N = np.abs(weights_NK - factor * formula_NK).max(axis=1) / weights_NK.max(axis=1)
            residual = float(np.quantile(np.nan_to_num(apart_N, nan=np.inf), _CERTAIN, method="higher"))
            words = f"({words})" if words == bare and bare != name and not is_plain else words
            found.append(Formula(words if is_plain else f"{factor:.4g} * {words}", residual))
    # what rounds alike is equal: dividing by a sum of 1 explains no more than not dividing
    return sorted(found, key=lambda one: max(one.residual, rounding))


def formula_words(sides: Mapping[str, Sequence[Formula]], rounding: float) -> str:
    """Each side's formula, or how near the nearest candidate comes.

    Args:
        sides: side -> its candidates, least residual first.
        rounding: what a formula may leave.
    """
    named, nameless = [], []
    for side, formulas in sides.items():
        best = formulas[0]
        if best.residual <= rounding:
            named.append(f"{side}'s = {best.words} (99 % of rows to {best.residual:.1g})")
        else:
            near = f"nearest: {best.words}, off by {best.residual:.2g}"
            nameless.append(f"none of {len(formulas)} formulas explains {side}'s ({near})")
    return f"{'; '.join(named or nameless)}; {_SYMBOLS}"


def bases_of(
    own: Capture, other: Capture, spec: RouterSpec | None, bias_LE: NDArray[Any] | None, layer: int, of: str
) -> dict[str, Float64]:
    """(T, K) candidates' bases for one side's chosen experts, in the order of their numbers.

    Args:
        spec: the side's rule; None = not known: its logits say nothing.
        bias_LE: its correction bias; None = none known.
        of: name of the other side.
    """
    ids_TK, _ = _by_number(own, layer)
    bases: dict[str, Float64] = {}
    logits_TLE = own.router_logits_TLE
    score = None if spec is None else _SCORES.get(spec.score_function)
    if logits_TLE is not None and score is not None:
        scores_TE = score(logits_TLE[:, layer].astype(np.float64))
        index_TK = np.maximum(ids_TK, 0).astype(np.int64)
        bases["s"] = np.take_along_axis(scores_TE, index_TK, axis=1)
        if bias_LE is not None:
            bases["(s + b)"] = bases["s"] + bias_LE[layer].astype(np.float64)[index_TK]
    bases[f"w_{of}"] = _by_number(other, layer)[1]
    if "s" not in bases and bias_LE is not None and ids_TK.shape[1] > 2:
        bias_TK = bias_LE[layer].astype(np.float64)[np.maximum(ids_TK, 0).astype(np.int64)]
        bases[f"(a w_{of} + b)"] = _with_bias(weights_of(own, layer), bases[f"w_{of}"], bias_TK)
    return bases


def _with_bias(weights_TK: Float64, other_TK: Float64, bias_TK: Float64) -> Float64:
    """(T, K) a w + b with the a of every row, least squares, that makes it proportional to the row's own weights."""
    total_T1, bias_T1 = weights_TK.sum(axis=1, keepdims=True), bias_TK.sum(axis=1, keepdims=True)
    x_TK = weights_TK * other_TK.sum(axis=1, keepdims=True) - total_T1 * other_TK
    y_TK = total_T1 * bias_TK - weights_TK * bias_T1
    with np.errstate(divide="ignore", invalid="ignore"):
        a_T1 = (x_TK * y_TK).sum(axis=1, keepdims=True) / (x_TK**2).sum(axis=1, keepdims=True)
    return np.asarray(np.where(a_T1 > 0, a_T1, np.nan) * other_TK + bias_TK)


def weights_of(capture: Capture, layer: int) -> Float64:
    """(T, K) gate weights of a layer in the order of experts' numbers."""
    return _by_number(capture, layer)[1]


def _by_number(capture: Capture, layer: int) -> tuple[NDArray[np.int16], Float64]:
    assert capture.expert_ids_TLK is not None
    assert capture.gate_weights_TLK is not None
    ids_TK, gates_TK = capture.expert_ids_TLK[:, layer], capture.gate_weights_TLK[:, layer].astype(np.float64)
    order_TK = np.argsort(ids_TK, axis=1, kind="stable")
    return np.take_along_axis(ids_TK, order_TK, axis=1), np.take_along_axis(gates_TK, order_TK, axis=1)


def _softmax(logits_TE: Float64) -> Float64:
    exp_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return np.asarray(exp_TE / exp_TE.sum(axis=1, keepdims=True))


def _sigmoid(logits_TE: Float64) -> Float64:
    return np.asarray(np.exp(-np.logaddexp(0, -logits_TE)))


_SCORES: Final = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrtsoftplus": lambda logits_TE: np.sqrt(np.logaddexp(0, logits_TE)),
    "logit": _softmax,  # such routers weigh by the softmax of the chosen: these scores divided by their sum
}
