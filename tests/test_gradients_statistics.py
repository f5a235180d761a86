"""Norms, cosines, biases and intervals of gradients known by their inner products, against the gradients themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moediag.analysis.gradient_statistics import PromptGradients, bias_floor, compare, norm_interval

N_PROMPTS, N_NUMBERS = 24, 6
RNG = np.random.default_rng(5)


def gradients_of(vectors: dict[str, np.ndarray], prompt_S: np.ndarray) -> PromptGradients:
    """One vector per method and sequence, of (S, X) gradients of sequences."""
    stacked = np.concatenate(list(vectors.values()))
    n = len(prompt_S)
    coefficients = np.kron(np.eye(len(vectors)), np.ones(n))
    return PromptGradients(stacked @ stacked.T, coefficients, np.tile(prompt_S, len(vectors)), n, tuple(vectors))


def noisy(mean: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.asarray(mean + noise)


def batch() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three methods on 40 sequences of 24 prompts; they share their noise, as methods on the same tokens do."""
    prompt_S = np.sort(np.r_[np.arange(N_PROMPTS), RNG.integers(0, N_PROMPTS, 16)])
    noise = RNG.normal(size=(len(prompt_S), N_NUMBERS))
    true = np.array([3.0, 1, 0, 0, 0, 0])
    bias = np.array([0.0, 0, 1, 0, 0, 0])
    return {
        "none": noisy(true + bias, noise),
        "half": noisy(0.5 * true, 0.5 * noise),
        "sequence_is": noisy(true, 1.2 * noise),
    }, prompt_S


def by_prompt(vectors_SX: np.ndarray, prompt_S: np.ndarray) -> np.ndarray:
    """(C, X) whose mean over prompts is the mean over sequences."""
    sums = np.stack([vectors_SX[prompt_S == c].sum(axis=0) for c in range(N_PROMPTS)])
    return np.asarray(sums * N_PROMPTS / len(prompt_S))


def crossed(left: np.ndarray, right: np.ndarray) -> float:
    """Mean inner product over pairs of different prompts, one pair at a time."""
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i != j]
    return float(np.mean([left[i] @ right[j] for i, j in pairs]))


def test_values_equal_those_of_the_gradients_themselves() -> None:
    vectors, prompt_S = batch()
    gradients = gradients_of(vectors, prompt_S)
    reference = by_prompt(vectors["sequence_is"], prompt_S)
    for name in ("none", "half"):
        own = by_prompt(vectors[name], prompt_S)
        found = {key: interval.value for key, interval in compare(gradients, name, "sequence_is").values.items()}
        mm, mr, rr = crossed(own, own), crossed(own, reference), crossed(reference, reference)
        dd = crossed(own - reference, own - reference)
        mean, mean_reference = own.mean(axis=0), reference.mean(axis=0)
        assert found["norm"] == pytest.approx(np.sqrt(mm))
        assert found["cosine"] == pytest.approx(min(1, mr / np.sqrt(mm * rr)))
        assert found["gain"] == pytest.approx(mr / rr)
        assert found["relative_bias"] == pytest.approx(np.sqrt(max(dd, 0) / rr))
        variance = np.square(own - mean).sum() / (N_PROMPTS - 1)
        assert found["variance"] == pytest.approx(variance)
        wanted = variance / (np.square(reference - mean_reference).sum() / (N_PROMPTS - 1))
        assert found["variance_ratio"] == pytest.approx(wanted)
        cosine = mean @ mean_reference / np.linalg.norm(mean) / np.linalg.norm(mean_reference)
        assert found["batch_cosine"] == pytest.approx(cosine)
        gap = np.linalg.norm(mean - mean_reference) / np.linalg.norm(mean_reference)
        assert found["batch_relative_bias"] == pytest.approx(gap)


def test_a_method_that_is_the_reference_has_no_bias_and_a_scaled_one_only_another_length() -> None:
    vectors, prompt_S = batch()
    vectors["none"] = vectors["sequence_is"].copy()
    vectors["twice"] = 2 * vectors["sequence_is"]
    gradients = gradients_of(vectors, prompt_S)
    same = compare(gradients, "none", "sequence_is")
    assert same.values["cosine"].value == pytest.approx(1)
    assert same.values["batch_relative_bias"].value == pytest.approx(0, abs=1e-9)
    twice = compare(gradients, "twice", "sequence_is").values
    assert twice["cosine"].value == pytest.approx(1)
    assert twice["gain"].value == pytest.approx(2)
    assert twice["relative_bias"].value == pytest.approx(1)
    assert twice["variance_ratio"].value == pytest.approx(4)
    assert "no variation" in twice["gain"].note


def test_order_of_prompts_changes_nothing_and_the_same_input_gives_the_same_interval() -> None:
    vectors, prompt_S = batch()
    order = RNG.permutation(len(prompt_S))
    first = compare(gradients_of(vectors, prompt_S), "none", "sequence_is")
    again = compare(gradients_of(vectors, prompt_S), "none", "sequence_is")
    shuffled = gradients_of({name: v[order] for name, v in vectors.items()}, prompt_S[order])
    assert repr(first) == repr(again)  # NaN bounds included
    other = compare(shuffled, "none", "sequence_is")
    for name, interval in first.values.items():
        assert other.values[name].low == pytest.approx(interval.low, nan_ok=True), name
        assert np.isnan(interval.low) or interval.low <= interval.value <= interval.high, name


@settings(max_examples=5)
@given(st.integers(0, 99))
def test_rotating_the_parameters_changes_nothing(seed: int) -> None:
    vectors, prompt_S = batch()
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(N_NUMBERS, N_NUMBERS)))
    plain = compare(gradients_of(vectors, prompt_S), "none", "sequence_is")
    turned = compare(gradients_of({n: v @ rotation for n, v in vectors.items()}, prompt_S), "none", "sequence_is")
    for name, interval in plain.values.items():
        assert turned.values[name].value == pytest.approx(interval.value, nan_ok=True)


def test_an_expectation_below_its_noise_is_not_given() -> None:
    _, prompt_S = batch()
    noise = RNG.normal(size=(len(prompt_S), 500))
    gradients = gradients_of({"none": 1.1 * noise, "sequence_is": noise}, prompt_S)
    found = compare(gradients, "none", "sequence_is").values
    assert np.isnan(found["cosine"].value)
    assert "noise" in found["cosine"].note
    assert found["batch_cosine"].value == pytest.approx(1)
    assert "noise" in norm_interval(gradients, "sequence_is")[0].note


def test_few_prompts_give_no_interval() -> None:
    vectors, prompt_S = batch()
    taken = prompt_S < 5
    few = gradients_of({name: v[taken] for name, v in vectors.items()}, prompt_S[taken])
    found = compare(few, "none", "sequence_is")
    assert np.isnan(found.values["batch_cosine"].low)
    assert found.values["batch_cosine"].note == "5 prompts; an interval needs 8"
    assert np.isnan(found.bias_floor)


def test_unbiased_methods_stay_below_the_floor_and_biased_ones_rise_above_it() -> None:
    """95 % of the time by definition: of 200 batches, 190 +- 3 (standard error)."""
    rng = np.random.default_rng(0)
    true, bias = np.full(8, 0.5), np.full(8, 0.3)
    below = above = 0
    for _ in range(200):
        reference, difference = true + rng.normal(size=(32, 8)), 0.4 * rng.normal(size=(32, 8))
        below += is_below_floor(difference, reference)
        above += not is_below_floor(difference + bias, reference)
    assert 180 <= below <= 198
    assert above >= 195


def is_below_floor(difference: np.ndarray, reference: np.ndarray) -> bool:
    size = np.linalg.norm(difference.mean(axis=0)) / np.linalg.norm(reference.mean(axis=0))
    return bool(size <= bias_floor(difference @ difference.T, reference @ reference.T))
