"""What TopK compares, from recorded router logits and the rule in arm.json; in numpy, without an engine.

Invariants:
    - the arithmetic is float32 and in the order of :func:`moediag.engines.routers.choice_scores`, so the two agree to
      rounding for every family's rule (a test holds them side by side);
    - a rule whose choice depends on the *order* of the logits alone (no bias, no group limit) is read in logit space:
      softmax squeezes a logit gap by the size of the probabilities, so no single scale holds there;
    - a learned bias stands beside an arm (``Run.correction_bias``): a rule that has one needs it given, and nothing is
      guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moediag.errors import MoediagError
from moediag.run.records import Router

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Space = Literal["logit", "choice"]

SOFTMAX: Final = "softmax"
SIGMOID: Final = "sigmoid"
SQRTSOFTPLUS: Final = "sqrtsoftplus"
LOGIT: Final = "logit"


@dataclass(frozen=True)
class RoutingRule:
    """The part of a router's rule that decides which experts are chosen.

    Args:
        n_experts, top_k: E and K.
        score_function: ``softmax``, ``sigmoid``, ``sqrtsoftplus`` or ``logit``.
        has_correction_bias: a learned bias per expert enters the choice.
        n_group, topk_group, group_score, masked_value: group limit, see :class:`~moediag.run.records.RouterSpec`;
            equal numbers = off.
    """

    n_experts: int
    top_k: int
    score_function: str
    has_correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "two_best"
    masked_value: str = "-inf"

    @classmethod
    def of_routers(cls, routers: Sequence[Router]) -> RoutingRule | None:
        """The rule that all routers of a model share; None where it is not known or not one.

        Raises:
            MoediagError: a score function that this version does not know.
        """
        fields = [name for name in cls.__dataclass_fields__ if name not in ("n_experts", "top_k")]
        rules = {
            cls(router.n_experts, router.top_k, *(getattr(router.spec, name) for name in fields))
            for router in routers
            if router.spec is not None
        }
        if len(rules) != 1 or any(router.spec is None for router in routers):
            return None
        rule = rules.pop()
        if rule.score_function not in (SOFTMAX, SIGMOID, SQRTSOFTPLUS, LOGIT):
            raise MoediagError(
                f"unknown score function {rule.score_function!r}; expected softmax, sigmoid, sqrtsoftplus or logit"
            )
        return rule

    @property
    def is_grouped(self) -> bool:
        """Some groups of experts lose before TopK compares single experts."""
        return self.topk_group != self.n_group

    @property
    def space(self) -> Space:
        """Where gaps and noise are measured: ``logit`` where the order of the logits decides, else ``choice``."""
        return "choice" if self.has_correction_bias or self.is_grouped else "logit"

    @property
    def is_shift_invariant(self) -> bool:
        """Adding one number to all logits changes no choice, so that much of a difference is no noise."""
        return self.score_function in (SOFTMAX, LOGIT) or self.space == "logit"

    @property
    def is_unrivalled(self) -> bool:
        """K = E: every expert is always chosen."""
        return self.top_k >= self.n_experts


def choice_scores(logits: NDArray[Any], rule: RoutingRule, bias: NDArray[Any] | None = None) -> Float32:
    """What TopK compares: (..., E) -> (..., E) in float32; experts of groups that lost have the masked value.

    Args:
        logits: raw router logits.
        bias: correction bias, broadcastable to ``logits``; needed where the rule has one.

    Raises:
        MoediagError: the rule has a correction bias and none is given.

    Example:
        >>> rule = RoutingRule(n_experts=2, top_k=1, score_function="softmax")
        >>> choice_scores(np.log([[3.0, 1.0]]), rule).round(2).tolist()
        [[0.75, 0.25]]
    """
    scores = _ungrouped_scores(logits, rule, bias)
    if not rule.is_grouped:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], rule.n_group, -1)
    n_best = 1 if rule.group_score == "best" else 2
    best = -np.sort(-grouped, axis=-1)[..., :n_best].sum(axis=-1, dtype=np.float32)
    order = np.argsort(-best, axis=-1, kind="stable")
    is_lost = np.ones(best.shape, bool)
    np.put_along_axis(is_lost, order[..., : rule.topk_group], False, axis=-1)
    return np.where(is_lost[..., None], np.float32(rule.masked_value), grouped).reshape(scores.shape)


def chosen_experts(logits: NDArray[Any], rule: RoutingRule, bias: NDArray[Any] | None = None) -> Int64:
    """The rule's K experts, best first; of equal scores the lower id, where engines are free to differ."""
    scores = choice_scores(logits, rule, bias)
    return np.asarray(np.argsort(-scores, axis=-1, kind="stable")[..., : rule.top_k], dtype=np.int64)


def compared_scores(logits: NDArray[Any], rule: RoutingRule, bias: NDArray[Any] | None = None) -> Float64:
    """Scores in the rule's working space, float64: raw logits, or score plus bias without the group mask."""
    if rule.space == "logit":
        return np.asarray(logits, dtype=np.float64)
    return _ungrouped_scores(logits, rule, bias).astype(np.float64)


def score_slopes(logits: NDArray[Any], rule: RoutingRule) -> Float64:
    """Change of a compared score per change of its own logit [1]: how logit noise reaches the choice.

    A saturated sigmoid passes hardly any noise on, so noise is measured in logits and mapped.

    Source: delta method; the noise of a router is small against the width of the sigmoid.
    """
    values = np.asarray(logits, dtype=np.float64)
    if rule.space == "logit" or rule.score_function == LOGIT:
        return np.ones_like(values)
    if rule.score_function == SQRTSOFTPLUS:
        return np.asarray(special.expit(values) / (2 * np.sqrt(np.logaddexp(0, values))), dtype=np.float64)
    scores = special.expit(values) if rule.score_function == SIGMOID else special.softmax(values, axis=-1)
    return np.asarray(scores * (1 - scores), dtype=np.float64)


def border_gap(scores: Float64, top_k: int) -> Float64:
    """K-th minus (K+1)-th largest score: (..., E) -> (...), >= 0; infinite where nothing competes."""
    if top_k >= scores.shape[-1]:
        return np.full(scores.shape[:-1], np.inf)
    best = -np.partition(-scores, [top_k - 1, top_k], axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(best[..., top_k - 1] - best[..., top_k], dtype=np.float64)


def _ungrouped_scores(logits: NDArray[Any], rule: RoutingRule, bias: NDArray[Any] | None) -> Float32:
    values = np.asarray(logits, dtype=np.float32)
    scores = values
    if rule.score_function == SOFTMAX:
        scores = special.softmax(values, axis=-1)
    elif rule.score_function == SIGMOID:
        scores = special.expit(values)
    elif rule.score_function == SQRTSOFTPLUS:
        scores = np.sqrt(np.logaddexp(np.float32(0), values))
    if rule.has_correction_bias:
        if bias is None:
            raise MoediagError("this router adds a learned correction bias, and none is known; capture the arm again")
        scores = scores + np.asarray(bias, dtype=np.float32)
    return np.asarray(scores, dtype=np.float32)
