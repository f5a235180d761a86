"""Norms, cosines, biases and intervals of gradients known by their inner products, against the gradients themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moediag.statistics.gradients import PromptGradients, bias_floor, compare, norm_interval

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


def noiseless_cosine(left: np.ndarray, right: np.ndarray) -> float:
    return crossed(left, right) / float(np.sqrt(crossed(left, left) * crossed(right, right)))


def test_values_equal_those_of_the_gradients_themselves() -> None:
    vectors, prompt_S = batch()
    gradients = gradients_of(vectors, prompt_S)
    reference = by_prompt(vectors["sequence_is"], prompt_S)
    for name in ("none", "half"):
        own = by_prompt(vectors[name], prompt_S)
        compared = compare(gradients, name, "sequence_is")
        found = {key: interval.value for key, interval in compared.expected.items()}
        mm, mr, rr = crossed(own, own), crossed(own, reference), crossed(reference, reference)
        dd = crossed(own - reference, own - reference)
        mean, mean_reference = own.mean(axis=0), reference.mean(axis=0)
        assert found["norm"] == pytest.approx(np.sqrt(mm))
        cosine = mr / np.sqrt(mm * rr)
        left_out = [noiseless_cosine(np.delete(own, c, 0), np.delete(reference, c, 0)) for c in range(N_PROMPTS)]
        unbiased = N_PROMPTS * cosine - (N_PROMPTS - 1) * np.mean(left_out)
        assert found["cosine"] == pytest.approx(min(1, unbiased))
        assert found["gain"] == pytest.approx(mr / rr)
        assert found["relative_bias"] == pytest.approx(np.sqrt(max(dd, 0) / rr))
        variance = np.square(own - mean).sum() / (N_PROMPTS - 1)
        assert found["variance"] == pytest.approx(variance)
        wanted = variance / (np.square(reference - mean_reference).sum() / (N_PROMPTS - 1))
        assert found["variance_ratio"] == pytest.approx(wanted)
        cosine = mean @ mean_reference / np.linalg.norm(mean) / np.linalg.norm(mean_reference)
        assert compared.batch_cosine == pytest.approx(cosine)
        gap = np.linalg.norm(mean - mean_reference) / np.linalg.norm(mean_reference)
        assert compared.batch_relative_bias == pytest.approx(gap)
        noise, noise_reference = (x - x.mean(axis=0) for x in (own, reference))
        alone = (noise * noise_reference).sum() / np.linalg.norm(noise) / np.linalg.norm(noise_reference)
        assert compared.noise_cosine == pytest.approx(alone)


def test_a_method_that_is_the_reference_has_no_bias_and_a_scaled_one_only_another_length() -> None:
    vectors, prompt_S = batch()
    vectors["none"] = vectors["sequence_is"].copy()
    vectors["twice"] = 2 * vectors["sequence_is"]
    gradients = gradients_of(vectors, prompt_S)
    same = compare(gradients, "none", "sequence_is")
    assert same.expected["cosine"].value == pytest.approx(1)
    assert same.batch_relative_bias == pytest.approx(0, abs=1e-9)
    twice = compare(gradients, "twice", "sequence_is").expected
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
    for name, interval in first.expected.items():
        assert other.expected[name].low == pytest.approx(interval.low, nan_ok=True), name
        assert np.isnan(interval.low) or interval.low <= interval.value <= interval.high, name


@settings(max_examples=5)
@given(st.integers(0, 99))
def test_rotating_the_parameters_changes_nothing(seed: int) -> None:
    vectors, prompt_S = batch()
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(N_NUMBERS, N_NUMBERS)))
    plain = compare(gradients_of(vectors, prompt_S), "none", "sequence_is")
    turned = compare(gradients_of({n: v @ rotation for n, v in vectors.items()}, prompt_S), "none", "sequence_is")
    for name, interval in plain.expected.items():
        assert turned.expected[name].value == pytest.approx(interval.value, nan_ok=True)


def test_an_expectation_below_its_noise_is_not_given() -> None:
    _, prompt_S = batch()
    noise = RNG.normal(size=(len(prompt_S), 500))
    gradients = gradients_of({"none": 1.1 * noise, "sequence_is": noise}, prompt_S)
    found = compare(gradients, "none", "sequence_is")
    assert np.isnan(found.expected["cosine"].value)
    assert "noise" in found.expected["cosine"].note
    assert (found.batch_cosine, found.noise_cosine) == (pytest.approx(1), pytest.approx(1))
    assert "noise" in norm_interval(gradients, "sequence_is")[0].note


def test_few_prompts_give_no_interval() -> None:
    vectors, prompt_S = batch()
    taken = prompt_S < 5
    few = gradients_of({name: v[taken] for name, v in vectors.items()}, prompt_S[taken])
    found = compare(few, "none", "sequence_is")
    assert np.isnan(found.expected["gain"].low)
    assert found.expected["gain"].note == "5 prompts; an interval needs 8"
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


def test_one_prompt_has_no_batch_cosine() -> None:
    """One prompt's gradients are its noise: a cosine of theirs was given without a word."""
    vectors, prompt_S = batch()
    taken = prompt_S == prompt_S[0]
    one = compare(gradients_of({n: v[taken] for n, v in vectors.items()}, prompt_S[taken]), "none", "sequence_is")
    assert np.isnan(one.batch_cosine)
    assert np.isnan(one.noise_cosine)
    assert one.expected["cosine"].note == "1 prompt: its gradients cannot be told from their noise"


def sequence_weighted(rng: np.random.Generator, n_prompts: int, signal_to_noise: float, turn: float) -> PromptGradients:
    """A sequence per prompt with a log-normal weight w; weighting turns the expected gradient by atan(turn).

    With ``turn`` 0 the weights tell nothing of the gradients, as if they had been shuffled among the sequences.
    """
    size = np.sqrt(signal_to_noise / n_prompts)
    log_weight = rng.normal(size=n_prompts)
    vectors = rng.normal(size=(n_prompts, 60)) / np.sqrt(60)
    vectors[:, 0] += size
    vectors[:, 1] += turn * size * log_weight  # E[log_weight] = 0, E[weight * log_weight] = 1
    weight = np.exp(log_weight - 0.5)
    rows = {"none": np.ones(n_prompts), "tis_sequence": np.minimum(weight, 2), "sequence_is": weight}
    own = {name: row[:, None] * vectors for name, row in rows.items()}
    return gradients_of(own, np.arange(n_prompts))


@pytest.mark.parametrize("signal_to_noise", [0.0, 4.0, 50.0])
def test_weights_that_tell_nothing_are_not_taken_for_a_better_direction(signal_to_noise: float) -> None:
    """A batch's cosine called truncated weights nearer in 60 of 60 sets with shuffled weights: both share their noise.

    Nominal: nearer in 2.5 %, farther in 2.5 %. 60 sets: at most 4 of either has a probability of 0.98.
    """
    rng, n_sets, nearer, farther, by_batch, above_noise = np.random.default_rng(11), 60, 0, 0, 0, []
    for _ in range(n_sets):
        gradients = sequence_weighted(rng, 32, signal_to_noise, turn=0.0)
        found = compare(gradients, "tis_sequence", "sequence_is")
        change = found.expected["cosine_change"]
        nearer, farther = nearer + (change.low > 0), farther + (change.high < 0)
        own, _, full = (gradients.of(name) for name in ("none", "tis_sequence", "sequence_is"))
        products = [gradients.products(*pair).sum() for pair in ((own, full), (own, own), (full, full))]
        by_batch += found.batch_cosine > products[0] / np.sqrt(products[1] * products[2])
        above_noise.append(found.batch_cosine - found.noise_cosine)
    assert by_batch >= 0.95 * n_sets
    if signal_to_noise == 0:
        assert np.mean(above_noise) == pytest.approx(0, abs=0.03)
    assert nearer <= 4
    assert farther <= 4


def test_a_direction_that_weights_do_correct_is_told() -> None:
    """Known truth: weighting turns the gradient by 45 degrees, truncated at 2 by 37."""
    rng, n_sets, told, covered = np.random.default_rng(3), 60, 0, 0
    log_weight = np.random.default_rng(0).normal(size=400_000)
    truncated = np.minimum(np.exp(log_weight - 0.5), 2)
    turned = np.array([truncated.mean(), (truncated * log_weight).mean()])
    true_change = turned.sum() / np.linalg.norm(turned) / np.sqrt(2) - 1 / np.sqrt(2)
    for _ in range(n_sets):
        change = compare(sequence_weighted(rng, 64, 20.0, turn=1.0), "tis_sequence", "sequence_is").expected[
            "cosine_change"
        ]
        told += change.low > 0
        covered += change.low <= true_change <= change.high
    assert told >= 0.8 * n_sets
    assert covered >= 0.85 * n_sets


def one_token(rng: np.random.Generator, bias: float) -> PromptGradients:
    """Expected gradients that differ from the reference by some thousandths, the corrected one by less."""
    reference = rng.normal(size=(32, 40)) / np.sqrt(40)
    reference[:, 0] += 1
    difference = 0.4 * rng.normal(size=(32, 40)) / np.sqrt(40)
    difference[:, 1] += bias
    vectors = {"none": reference + 5e-3 * difference, "icepop": reference + 2e-3 * difference, "exact": reference}
    return gradients_of(vectors, np.arange(32))


def test_corrections_are_told_apart_against_the_one_token_reference() -> None:
    """Every change against that reference had no interval, for cosines were cut off at 1 in the draws too."""
    rng, n_sets = np.random.default_rng(7), 40
    changes = [compare(one_token(rng, 1.0), "icepop", "exact").expected["cosine_change"] for _ in range(n_sets)]
    true_change = 1 / np.sqrt(1 + (2e-3) ** 2) - 1 / np.sqrt(1 + (5e-3) ** 2)
    assert sum(change.low > 0 for change in changes) >= 0.95 * n_sets
    assert sum(change.low <= true_change <= change.high for change in changes) >= 0.85 * n_sets
    unbiased = [compare(one_token(rng, 0.0), "icepop", "exact").expected["cosine_change"] for _ in range(n_sets)]
    assert sum(change.low > 0 for change in unbiased) <= 3
    assert all(np.isfinite(change.low) for change in unbiased)
