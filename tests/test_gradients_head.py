"""Gradients of the head in closed form and expected updates at a prefix, against plain loops and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moediag.audit.batch import SequenceBasis
from moediag.audit.head import Head, Prefixes, expected_gram, expected_updates, sampled_gram
from moediag.corrections.sources import token_rewards

V, H, LENGTHS = 11, 3, (4, 2, 3)
BOUNDS = ((0, 4), (4, 6), (6, 9))


def small_head(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Head:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(V, H, generator=generator).to(dtype) * scale
    hidden = torch.randn(sum(LENGTHS), H, generator=generator).to(dtype)
    bias = torch.randn(V, generator=generator).to(dtype)
    return Head(weight, bias, hidden, torch.logsumexp((hidden @ weight.T + bias).float(), dim=-1))


def directions() -> list[SequenceBasis]:
    rng = np.random.default_rng(1)
    ranks = (2, 0, 3)
    return [
        SequenceBasis(rng.normal(size=(4, rank)), rng.normal(size=(rank, length)))
        for rank, length in zip(ranks, LENGTHS, strict=True)
    ]


def quiet(done: int, total: int) -> None:
    assert done <= total


@pytest.mark.parametrize("max_bytes", [1, 300, 1 << 20])
def test_the_closed_form_equals_autograd(max_bytes: int) -> None:
    head, tokens = small_head(), torch.tensor([0, 10, 4, 4, 7, 1, 2, 3, 10])
    weight = head.weight_VH.double().requires_grad_(True)
    assert head.bias_V is not None
    rows = []
    for (start, end), basis in zip(BOUNDS, directions(), strict=True):
        logits = head.hidden_TH[start:end].double() @ weight.T + head.bias_V.double()
        logp = torch.log_softmax(logits, dim=-1).gather(1, tokens[start:end, None])[:, 0]
        for direction in basis.basis_RT:
            loss = (logp * torch.from_numpy(direction)).sum()
            rows.append(torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten())
    wanted = torch.stack(rows)
    found = sampled_gram(head, tokens, BOUNDS, directions(), max_bytes, quiet)
    np.testing.assert_allclose(found, (wanted @ wanted.T).numpy(), rtol=1e-4, atol=1e-5)


def distributions(n: int, temperature: float) -> np.ndarray:
    logits = np.random.default_rng(7).normal(size=(n, V)) * temperature
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def loop_update(train: np.ndarray, infer: np.ndarray, weight_of: object) -> np.ndarray:
    """sum_a pi_infer(a) w(a) (r(a) - b) (e_a - pi_train), one token at a time."""
    p, q, reward = np.exp(train), np.exp(infer), token_rewards(np.arange(V))
    baseline = sum(q[a] * reward[a] for a in range(V))
    total = np.zeros(V)
    for a in range(V):
        unit = np.zeros(V)
        unit[a] = 1.0
        gain = reward[a] - baseline
        total += q[a] * weight_of(p[a], q[a], gain) * gain * (unit - p)  # type: ignore[operator]
    return total


def test_expected_updates_equal_a_loop_over_the_vocabulary() -> None:
    train, infer = distributions(6, 2.0), distributions(6, 1.2)[::-1]
    methods = {
        "none": lambda p, q, gain: 1.0,
        "tis_token:cap=2": lambda p, q, gain: min(p / q, 2.0),
        "icepop:alpha=0.5,beta=2": lambda p, q, gain: p / q if 0.5 <= p / q <= 2 else 0.0,
        "ipo:eps=0.1": lambda p, q, gain: p / q if abs(p - q) <= 0.1 else 0.0,
        "dppo_tv": lambda p, q, gain: 0.0 if gain * (p - q) > 0 and abs(p - q) > 0.2 else p / q,
    }
    found = expected_updates(tuple(methods), train, infer)
    for m, weight_of in enumerate(methods.values()):
        for n in range(len(train)):
            np.testing.assert_allclose(found[m, n], loop_update(train[n], infer[n], weight_of), atol=1e-12)
    reward = token_rewards(np.arange(V))
    for n in range(len(train)):
        p = np.exp(train[n])
        value = p @ reward
        wanted = sum(p[a] * (reward[a] - value) * (np.eye(V)[a] - p) for a in range(V))
        np.testing.assert_allclose(found[-1, n], wanted, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=-1), 0, atol=1e-12)


def test_the_untruncated_ratio_is_unbiased_and_without_mismatch_every_method_is() -> None:
    train, infer = distributions(5, 2.0), distributions(5, 1.0)[::-1]
    updates = expected_updates(("tis_token:cap=1e9", "none"), train, infer)
    np.testing.assert_allclose(updates[0], updates[-1], atol=1e-12)
    assert np.abs(updates[1] - updates[-1]).max() > 1e-3
    same = expected_updates(("none", "icepop", "kpop", "dppo_kl", "ipo"), train, train)
    for update in same:
        np.testing.assert_allclose(update, same[-1], atol=1e-12)


def test_a_token_that_an_engine_rules_out_poisons_nothing() -> None:
    train, infer = distributions(2, 1.0), distributions(2, 2.0)
    infer[0, 3] = train[1, 4] = -math.inf
    assert np.isfinite(expected_updates(("none", "icepop", "tis_token", "kpop", "dppo_tv"), train, infer)).all()


@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_expected_gradients_by_prompt_equal_plain_sums(max_bytes: int) -> None:
    head, methods = small_head(), ("none", "icepop:alpha=0.5,beta=2")
    infer = distributions(sum(LENGTHS), 1.5).astype(np.float32)
    prefixes = [
        Prefixes(prompt, np.arange(start, end), infer[start:end], 1 / (end - start))
        for prompt, (start, end) in zip((0, 1, 0), BOUNDS, strict=True)
    ]
    assert head.bias_V is not None
    train = torch.log_softmax(head.hidden_TH @ head.weight_VH.T + head.bias_V, dim=-1).numpy()
    total = np.zeros((2, 3, V, H))
    for one in prefixes:
        for row, t in enumerate(one.token_N):
            updates = expected_updates(methods, train[t : t + 1], one.logp_infer_NV[row : row + 1])[:, 0]
            for m in range(3):
                total[one.prompt, m] += one.factor * np.outer(updates[m], head.hidden_TH[t].numpy())
    flat = total.reshape(6, -1)
    found = expected_gram(head, prefixes, methods, max_bytes, quiet)
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-4, atol=1e-7)
