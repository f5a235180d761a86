"""P(flip) of a set under noise, against plain loops, closed forms and limits; choice scores against the engines'."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from synthetic_flips import RULES
from test_routers import spec_of

from moediag.analysis.choice_scores import (
    RoutingRule,
    border_gap,
    choice_scores,
    chosen_experts,
    compared_scores,
    score_slopes,
)
from moediag.analysis.flips.predictor import (
    border_flip_probability,
    set_flip_probability,
    simulated_flip_probability,
)
from moediag.engines import routers
from moediag.errors import MoediagError
from moediag.run.records import Router

scores = hnp.arrays(np.float64, (3, 6), elements=st.floats(-3, 3))


def normal_cdf(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


def plain_flip_probability(score: list[float], sigma: list[float], top_k: int, steps: int = 4000) -> float:
    """Loop over where the largest unchosen score may land; some chosen one lies below it."""
    low, high = min(score) - 9 * max(sigma), max(score) + 9 * max(sigma)
    total, below = 0.0, 0.0
    for step in range(1, steps + 1):
        x = low + (high - low) * step / steps
        all_unchosen_below = 1.0
        for s, g in zip(score[top_k:], sigma[top_k:], strict=True):
            all_unchosen_below *= normal_cdf((x - s) / g)
        middle = x - (high - low) / steps / 2
        all_chosen_above = 1.0
        for s, g in zip(score[:top_k], sigma[:top_k], strict=True):
            all_chosen_above *= normal_cdf((s - middle) / g)
        total += (1 - all_chosen_above) * (all_unchosen_below - below)
        below = all_unchosen_below
    return total


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.02, 0.3, 5.0])
def test_integral_equals_the_plain_loop(top_k: int, scale: float) -> None:
    rng = np.random.default_rng(top_k)
    score = -np.sort(-rng.normal(size=(6, 6)), axis=1)
    sigma = scale * rng.uniform(0.5, 1.5, size=(6, 6))
    found = set_flip_probability(score, sigma, top_k)
    wanted = [plain_flip_probability(list(s), list(g), top_k) for s, g in zip(score, sigma, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1.5e-3)


def test_two_experts_have_a_closed_form() -> None:
    gap, sigma = np.array([0.0, 0.1, 1.0, 3.0]), np.array([0.5, 0.2, 0.7, 1.0])
    pair = np.stack([gap, np.zeros(4)], axis=1)
    found = set_flip_probability(pair, np.stack([sigma, 2 * sigma], axis=1), 1)
    np.testing.assert_allclose(found, border_flip_probability(gap, sigma * np.sqrt(5)), atol=1e-3)


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (8, 2), (16, 4), (6, 5)])
def test_huge_noise_leaves_chance(n_experts: int, top_k: int) -> None:
    score = -np.sort(-np.random.default_rng(0).normal(size=(5, n_experts)), axis=1)
    found = set_flip_probability(score, np.full((5, n_experts), 1e4), top_k)
    np.testing.assert_allclose(found, 1 - 1 / math.comb(n_experts, top_k), atol=2e-3)


def test_no_noise_flips_nothing_and_a_tie_is_a_coin() -> None:
    score = np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 1.0]])
    tiny = np.full((2, 3), 1e-300)
    np.testing.assert_allclose(set_flip_probability(score, tiny, 1), [0, 0])
    np.testing.assert_allclose(set_flip_probability(score, tiny, 2), [0, 0.5], atol=1e-2)
    np.testing.assert_allclose(set_flip_probability(score, tiny, 3), [0, 0])
    assert border_flip_probability(np.array([0.0, 1.0, np.inf]), np.array([0.0, 0.0, 2.0])).tolist() == [0, 0, 0]


@given(scores, st.integers(1, 5), st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_probability_knows_no_names_and_no_origin(score: np.ndarray, top_k: int, scale: float) -> None:
    score = -np.sort(-score, axis=1)
    sigma = np.full(score.shape, scale)
    found = set_flip_probability(score, sigma, top_k)
    np.testing.assert_allclose(set_flip_probability(score + 5, sigma, top_k), found, atol=1e-8)
    np.testing.assert_allclose(set_flip_probability(7 * score, 7 * sigma, top_k), found, atol=1e-8)
    # turned upside down, the experts left out play the chosen ones
    np.testing.assert_allclose(set_flip_probability(-score[:, ::-1], sigma, 6 - top_k), found, atol=4e-3)
    gap = score[:, top_k - 1] - score[:, top_k]
    assert (found >= border_flip_probability(gap, np.full(3, scale * np.sqrt(2))) - 2e-3).all()
    assert ((found >= 0) & (found <= 1)).all()


@given(scores, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_more_noise_flips_more(score: np.ndarray, top_k: int) -> None:
    score = -np.sort(-score, axis=1)
    found = [set_flip_probability(score, np.full(score.shape, s), top_k) for s in (0.05, 0.2, 1.0, 5.0)]
    assert (np.diff(found, axis=0) > -4e-3).all()


def test_simulation_agrees_with_the_integral() -> None:
    rng = np.random.default_rng(0)
    rule, logits = RULES["softmax"], rng.normal(size=(400, 16))
    found = simulated_flip_probability(logits, rule, None, lambda: 0.1 * rng.standard_normal(logits.shape))
    wanted = set_flip_probability(-np.sort(-logits, axis=1), np.full(logits.shape, 0.1), rule.top_k)
    assert found.mean() == pytest.approx(wanted.mean(), abs=0.01)
    assert np.corrcoef(found, wanted)[0, 1] > 0.98


RULE_KINDS = [
    {"score_function": "softmax"},
    {"score_function": "logit"},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "has_correction_bias": True},
    {"score_function": "softmax", "has_correction_bias": True},
    {"score_function": "sigmoid", "has_correction_bias": True, "n_group": 4, "topk_group": 2},
    {"score_function": "sigmoid", "n_group": 4, "topk_group": 1},
    {"score_function": "sqrtsoftplus", "has_correction_bias": True},
    {"score_function": "softmax", "n_group": 4, "topk_group": 2, "group_score": "best", "masked_value": "0"},
    {"score_function": "sigmoid", "has_correction_bias": True, "n_group": 4, "topk_group": 1, "masked_value": "0"},
]


@pytest.mark.parametrize("kind", RULE_KINDS, ids=str)
def test_choice_scores_equal_those_of_the_engines(kind: dict) -> None:
    rng = np.random.default_rng(1)
    logits, bias = rng.normal(size=(50, 3, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    spec = spec_of(top_k=2, n_experts=8, **kind)
    rule = RoutingRule.of_routers(spec.routers())
    given_bias = (bias, torch.from_numpy(bias)) if rule.has_correction_bias else (None, None)
    wanted = routers.choice_scores(torch.from_numpy(logits), spec, given_bias[1]).numpy()
    found = choice_scores(logits, rule, given_bias[0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=2**-23)  # of scores near 1, before the bias is added
    ids = routers.apply_rule(torch.from_numpy(logits), spec, given_bias[1]).numpy()
    untied = border_gap(found.astype(float), 2) > 0  # experts of lost groups are all at 0: which of them is free
    assert untied.mean() > 0.6
    np.testing.assert_array_equal(chosen_experts(logits, rule, given_bias[0])[untied], ids[untied])
    margin, _ = routers.margins(torch.from_numpy(logits), torch.from_numpy(ids), spec, given_bias[1])
    np.testing.assert_allclose(border_gap(found.astype(float), 2), margin.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", RULE_KINDS, ids=str)
def test_slopes_are_the_scores_differences(kind: dict) -> None:
    """Of each score by its own logit, where the rule compares scores and not logits."""
    rule = RoutingRule.of_routers(spec_of(top_k=2, n_experts=8, **kind).routers())
    logits = np.random.default_rng(2).normal(size=(20, 8))
    bias = np.zeros(8) if rule.has_correction_bias else None
    for expert in range(8):
        step = np.eye(8)[expert] * 1e-2
        up, down = (compared_scores(logits + sign * step, rule, bias)[:, expert] for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2e-2, score_slopes(logits, rule)[:, expert], rtol=2e-3, atol=1e-4)


def test_a_rule_that_is_not_known_or_not_one_is_none_and_an_unknown_one_is_refused() -> None:
    known = spec_of(top_k=2, n_experts=4, score_function="softmax").routers()
    bare = Router(decoder_layer=9, n_experts=4, top_k=2)
    assert RoutingRule.of_routers(known) == RoutingRule(4, 2, "softmax")
    assert RoutingRule.of_routers([*known, bare]) is None
    assert RoutingRule.of_routers([]) is None
    other = spec_of(top_k=1, n_experts=4, score_function="softmax").routers()
    assert RoutingRule.of_routers([*known, *other]) is None
    with pytest.raises(MoediagError, match="unknown score function"):
        RoutingRule.of_routers(spec_of(top_k=2, n_experts=4, score_function="guess").routers())
    with pytest.raises(MoediagError, match="bias"):
        choice_scores(np.zeros((1, 16)), RULES["sigmoid + bias"])
