"""Rewards, advantages and what methods have in common over the tokens of a sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moediag.audit.batch import is_token_level, sequence_basis
from moediag.corrections.sources import grpo_advantages, sequence_rewards, splitmix64, token_rewards
from moediag.errors import MoediagError

REWARDS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 4)), min_size=1, max_size=20)


def plain_splitmix64(value: int) -> int:
    full = (1 << 64) - 1
    z = (value + 0x9E3779B97F4A7C15) & full
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
    return z ^ (z >> 31)


@given(st.lists(st.integers(0, 2**40), max_size=20))
def test_rewards_equal_a_plain_loop(token_ids: list[int]) -> None:
    assert splitmix64(np.array(token_ids, dtype=np.int64)).tolist() == [plain_splitmix64(t) for t in token_ids]
    assert token_rewards(np.array(token_ids, dtype=np.int64)).tolist() == [plain_splitmix64(t) & 1 for t in token_ids]


def test_about_half_of_a_vocabulary_is_rewarded() -> None:
    assert token_rewards(np.arange(150_000)).mean() == pytest.approx(0.5, abs=0.005)  # 4 standard errors


def test_sequence_reward_is_the_mean_over_its_tokens_in_any_order() -> None:
    tokens, rows = np.array([0, 1, 2, 3, 4, 5]), np.array([0, 0, 2, 0, 2, 2])
    wanted = [np.mean([plain_splitmix64(t) & 1 for t in group]) for group in ([0, 1, 3], [2, 4, 5])]
    found = sequence_rewards(tokens, rows, 3)
    assert [found[0], found[2]] == wanted
    assert math.isnan(found[1])
    order = np.array([5, 2, 0, 3, 1, 4])
    np.testing.assert_array_equal(sequence_rewards(tokens[order], rows[order], 3), found)


@given(REWARDS)
def test_advantages_equal_a_plain_loop(rows: list[tuple[int, int]]) -> None:
    rewards, prompts = [r for r, _ in rows], [p for _, p in rows]
    found = grpo_advantages(rewards, np.array(prompts))
    for s, (reward, prompt) in enumerate(rows):
        group = [r for r, p in rows if p == prompt]
        others = [r for i, r in enumerate(rewards) if i != s]
        single = len(group) == 1
        baseline, pool = (np.mean(others or [reward]), rewards) if single else (np.mean(group), group)
        scale = np.std(pool, ddof=1) if len(pool) > 1 else 0.0
        assert found[s] == pytest.approx((reward - baseline) / scale if scale > 1e-9 else 0.0, rel=1e-6, abs=1e-6)


@given(REWARDS, st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_level_of_rewards_do_not_matter(rows: list[tuple[int, int]], scale: float, level: float) -> None:
    rewards, prompts = np.array([r for r, _ in rows]), np.array([p for _, p in rows])
    np.testing.assert_allclose(
        grpo_advantages(scale * rewards + level, prompts), grpo_advantages(rewards, prompts), atol=1e-6
    )


def test_absent_rewards_have_no_advantage_and_do_not_enter_their_group() -> None:
    found = grpo_advantages([0.0, 1.0, np.nan], np.array([1, 1, 1]))
    np.testing.assert_allclose(found, [-math.sqrt(0.5), math.sqrt(0.5), 0.0])
    assert grpo_advantages([], np.array([], dtype=np.int64)).shape == (0,)
    with pytest.raises(MoediagError, match="one prompt per reward"):
        grpo_advantages([1.0], np.array([1, 2]))


@given(arrays.arrays(np.float64, (5, 7), elements=st.floats(0, 4)))
def test_every_method_is_an_exact_combination_of_the_directions(weights_MT: np.ndarray) -> None:
    basis = sequence_basis(weights_MT)
    np.testing.assert_allclose(basis.coefficient_MR @ basis.basis_RT, weights_MT, atol=1e-8)
    assert len(basis.basis_RT) <= np.linalg.matrix_rank(weights_MT)


def test_sequence_weights_cost_no_direction_of_their_own() -> None:
    ratio = np.array([0.9, 1.3, 7.0])
    rows = np.stack([np.ones(3), ratio, np.full(3, ratio.prod()), np.zeros(3), np.where(ratio > 5, 0, ratio)])
    assert len(sequence_basis(rows).basis_RT) == 3
    assert len(sequence_basis(rows[:4]).basis_RT) == 2
    assert len(sequence_basis(np.zeros((4, 3))).basis_RT) == 0


def test_methods_that_look_at_whole_sequences_have_no_expectation_at_a_prefix() -> None:
    token = ("none", "icepop", "icepop_hard", "tis_token", "mis_token", "kpop", "ipo", "dppo_tv", "dppo_kl")
    sequence = ("tis_sequence", "mis_sequence", "sequence_band", "geometric_band", "veto", "trm_max", "k3_mean")
    assert all(map(is_token_level, token))
    assert not any(map(is_token_level, sequence))
