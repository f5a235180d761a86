"""Weights of every correction: against plain loops, at their bounds, at the ends of the number line, in any order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_corrections import plain_weights

from moediag.corrections import (
    METHODS,
    PRESETS,
    compose,
    correction_weights,
    find_presets,
    parse_correction,
    weights,
)
from moediag.corrections.correction import Correction, Step
from moediag.corrections.terms import Terms
from moediag.errors import MoediagError

LOGP = st.one_of(
    st.floats(-30, 0), st.floats(-30, 0, width=32), st.sampled_from([0.0, -math.inf, math.nan, -1e-9, -1000.0, -700.5])
)
TOKENS = st.lists(st.tuples(LOGP, LOGP, st.integers(0, 3), st.floats(-2, 2)), max_size=25)


WIDENED = [
    ("icepop", {"alpha": 0.5, "beta": 2}, {"alpha": 0.2, "beta": 5}),
    ("icepop_hard", {"alpha": 0.9, "beta": 1.1}, {"alpha": 0, "beta": math.inf}),
    ("mis_token", {"cap": 1.5}, {"cap": 3}),
    ("mis_sequence", {"cap": 1.5}, {"cap": 3}),
    ("sequence_band", {"low": 0.5, "high": 2}, {"low": 0.1, "high": 9}),
    ("geometric_band", {"low": 0.99, "high": 1.01}, {"low": 0.9, "high": 1.1}),
    ("veto", {"floor": 0.5}, {"floor": 0.1}),
    ("kpop", {"phi": 0.01}, {"phi": 0.5}),
    ("ipo", {"eps": 0.05}, {"eps": 0.3}),
    ("dppo_tv", {"eps_low": 0.02, "eps_high": 0.1}, {"eps_low": 0.2, "eps_high": 0.3}),
    ("dppo_kl", {"eps": 0.01}, {"eps": 0.2}),
    ("trm_max", {"delta": 0.01}, {"delta": 0.5}),
    ("trm_mean", {"delta": 0.001}, {"delta": 0.1}),
    ("k3_mean", {"limit": 0.001}, {"limit": 0.1}),
    ("prob_mult_error", {"limit": 1.01}, {"limit": 3}),
]


def split(tokens):
    return [list(column) for column in zip(*tokens, strict=True)] if tokens else [[], [], [], []]


@given(tokens=TOKENS)
@settings(max_examples=100)
def test_weights_equal_a_plain_loop(tokens) -> None:
    train, infer, seq, advantage = split(tokens)
    narrow = [(name, parameters) for name, parameters, _ in WIDENED]
    for name, parameters in [*((name, method.parameters) for name, method in METHODS.items()), *narrow]:
        found = weights(name, train, infer, seq, advantage=advantage, **parameters)
        expected = plain_weights(name, train, infer, seq, advantage, **parameters)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=0, err_msg=name)


@given(tokens=TOKENS, seed=st.integers(0, 99))
@settings(max_examples=50)
def test_rows_in_any_order_and_any_company_give_the_same_bits(tokens, seed: int) -> None:
    train, infer, seq, advantage = map(np.array, split(tokens))
    order = np.random.default_rng(seed).permutation(len(seq))
    for name in METHODS:
        whole = weights(name, train, infer, seq, advantage=advantage)
        shuffled = weights(name, train[order], infer[order], seq[order], advantage=advantage[order])
        np.testing.assert_array_equal(shuffled, whole[order])
        for one in np.unique(seq):
            here = seq == one
            alone = weights(name, train[here], infer[here], seq[here], advantage=advantage[here])
            np.testing.assert_array_equal(alone, whole[here])


@pytest.mark.parametrize(
    ("method", "parameters", "low", "high"),
    [
        ("icepop", {"alpha": 0.5, "beta": 5.0}, 0.5, 5.0),
        ("icepop_hard", {"alpha": 0.2, "beta": 3.0}, 0.2, 3.0),
        ("mis_token", {"cap": 2.0}, None, 2.0),
        ("mis_sequence", {"cap": 3.0}, None, 3.0),
        ("sequence_band", {"low": 0.5, "high": 2.0}, 0.5, 2.0),
        ("geometric_band", {"low": 0.999, "high": 1.001}, 0.999, 1.001),
        ("veto", {"floor": 1e-4}, 1e-4, None),
    ],
)
def test_bounds_are_closed_to_the_last_bit(method, parameters, low, high) -> None:
    for bound, outwards in ((low, -np.inf), (high, np.inf)):
        if bound is not None:
            on = np.log(bound)
            beyond = np.nextafter(on, outwards)
            assert weights(method, [on], [0.0], [0], **parameters)[0] > 0
            assert weights(method, [beyond], [0.0], [0], **parameters)[0] == 0


def test_bounds_on_divergences_and_probabilities_are_closed() -> None:
    assert weights("ipo", np.log([0.75]), np.log([0.5]), [0], eps=0.25)[0] == pytest.approx(1.5)
    assert weights("ipo", np.log([0.75]), np.log([0.5]), [0], eps=np.nextafter(0.25, 0))[0] == 0
    for advantage, train, infer in ((1.0, 0.75, 0.5), (-1.0, 0.5, 0.75)):
        arrays = {"logp_train": np.log([train]), "logp_infer": np.log([infer]), "seq_id": [0]}
        for eps, is_kept in ((0.25, True), (np.nextafter(0.25, 0), False)):
            found = weights("dppo_tv", **arrays, advantage=[advantage], eps_low=eps, eps_high=eps)[0]
            assert (found > 0) == is_kept
        # an update that moves back towards infer is never blocked
        assert weights("dppo_tv", **arrays, advantage=[-advantage], eps_low=0, eps_high=0)[0] > 0
        assert weights("dppo_kl", **arrays, advantage=[-advantage], eps=0)[0] > 0
        assert weights("dppo_kl", **arrays, advantage=[advantage], eps=0)[0] == 0
    train, infer = np.log([0.7, 0.5, 0.7, 0.5]), np.log([0.5, 0.7, 0.5, 0.7])
    both = weights("dppo_tv", train, infer, range(4), advantage=[1, -1, -1, 1], eps_low=0.1, eps_high=0.3)
    assert (both > 0).tolist() == [True, False, True, True]  # only the second moves too far away, and below
    for diff, below in ((-0.1, np.nextafter(0.1**2 / 2, 0)), (-0.5, np.nextafter(np.float32(0.125), np.float32(0)))):
        assert weights("trm_max", [diff], [0.0], [0], delta=diff**2 / 2)[0] == 1
        assert weights("trm_max", [diff], [0.0], [0], delta=below)[0] == 0  # -0.5 and 0 are float32 numbers


@given(st.lists(st.floats(-3, 3), max_size=20), st.floats(0.1, 10))
def test_icepop_open_below_equals_truncation_up_to_the_cap(diffs: list[float], cap: float) -> None:
    icepop = weights("icepop", diffs, np.zeros(len(diffs)), np.zeros(len(diffs)), alpha=0, beta=cap)
    tis = weights("tis_token", diffs, np.zeros(len(diffs)), np.zeros(len(diffs)), cap=cap)
    mis = weights("mis_token", diffs, np.zeros(len(diffs)), np.zeros(len(diffs)), cap=cap)
    np.testing.assert_array_equal(icepop, mis)
    below = np.array(diffs) < np.log(cap)
    np.testing.assert_array_equal(icepop[below], tis[below])
    beyond = np.array(diffs) > np.log(cap)
    assert (icepop[beyond] == 0).all()
    assert (tis[beyond] == cap).all()


@given(tokens=TOKENS)
@settings(max_examples=50)
def test_a_wider_band_never_masks_more(tokens) -> None:
    train, infer, seq, advantage = split(tokens)
    for method, tight, wide in WIDENED:
        narrow, broad = (weights(method, train, infer, seq, advantage=advantage, **p) for p in (tight, wide))
        assert not ((broad == 0) & (narrow > 0)).any(), method


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_absurd_log_ratios_stay_finite(size: float) -> None:
    train, infer = [0.0, -size], [-size, 0.0]
    assert weights("none", train, infer, [0, 1]).tolist() == [1, 1]
    assert weights("icepop", train, infer, [0, 1]).tolist() == [0, 0]
    assert weights("tis_token", train, infer, [0, 1]).tolist() == [2, pytest.approx(math.exp(-20))]
    assert weights("tis_sequence", train, infer, [0, 1]).tolist() == [2, pytest.approx(math.exp(-20))]
    assert weights("tis_token", train, infer, [0, 1], cap=math.inf)[0] == pytest.approx(math.exp(20))
    assert weights("icepop", train, infer, [0, 1], alpha=0, beta=math.inf)[0] == pytest.approx(math.exp(20))


def test_an_impossible_log_probability_is_not_scored_on_whichever_side() -> None:
    """Bug: -inf on one side was a value here (weight up to exp(20)) and was left out by the analysis of runs."""
    train, infer = [-np.inf, -1.0, -np.inf, -1.0, -1.5], [-1.0, -np.inf, -np.inf, -1.0, -1.0]
    for method in METHODS:
        for seq in (range(5), [0] * 5):  # the other tokens of its sequence do not see it either
            found = weights(method, train, infer, seq, advantage=[1.0] * 5)
            assert found[:3].tolist() == [0, 0, 0]
            assert found[3:].tolist() == weights(method, train[3:], infer[3:], seq[3:], advantage=[1.0] * 2).tolist()


ON_A_BOUND_IN_FLOAT32 = [
    ("icepop", {"alpha": 0.5, "beta": 5.0}, (0.5, 5.0)),
    ("icepop_hard", {"alpha": 0.7, "beta": 3.0}, (0.7, 3.0)),
    ("mis_token", {"cap": 3.0}, (3.0,)),
    ("mis_sequence", {"cap": 3.0}, (3.0,)),
    ("sequence_band", {"low": 0.5, "high": 3.0}, (0.5, 3.0)),
    ("geometric_band", {"low": 0.7, "high": 3.0}, (0.7, 3.0)),
    ("veto", {"floor": 0.5}, (0.5,)),
]


@pytest.mark.parametrize(("method", "parameters", "bounds"), ON_A_BOUND_IN_FLOAT32)
def test_float32_log_probabilities_stand_on_a_bound_in_float32(method, parameters, bounds) -> None:
    """Bug: the float32 nearest to log 0.5 lies 1e-9 below it, and a ratio of exactly 0.5 was masked."""
    misses = 0
    for bound in bounds:
        outwards = np.float32(-np.inf if bound < 1 else np.inf)
        on = np.float32(np.log(bound))
        misses += (on < np.log(bound)) if bound < 1 else (on > np.log(bound))
        for dtype in (np.float32, np.float64):  # a table of float64 may hold float32 numbers
            assert weights(method, dtype([on]), dtype([0.0]), [0], **parameters)[0] > 0
        assert weights(method, [np.nextafter(on, outwards)], np.float32([0.0]), [0], **parameters)[0] == 0
        # two of the sequence's tokens together, and one that float32 does not hold: then the bound is float64's
        assert (weights(method, [on, 0.0], np.float32([0.0, 0.0]), [0, 1], **parameters) > 0).all()
        beyond = np.nextafter(np.log(bound), float(outwards))
        assert weights(method, [beyond], [0.0], [0], **parameters)[0] == 0
    assert misses, "no bound of this case lies on the wrong side of its float32"


def test_float32_probabilities_stand_on_a_bound_in_float32() -> None:
    """Bug: of p 0.75 and 0.5, stored as float32 logs, the difference came out beyond 0.25 by 1e-8."""
    train, infer = np.log(np.float32([0.75, 0.5, 0.9])), np.log(np.float32([0.5, 0.75, 0.5]))
    assert (weights("ipo", train, infer, range(3), eps=0.25) > 0).tolist() == [True, True, False]
    found = weights("dppo_tv", train, infer, range(3), advantage=[1, -1, 1], eps_low=0.25, eps_high=0.25)
    assert (found > 0).tolist() == [True, True, False]


def test_padding_has_no_say() -> None:
    train = [np.nan, -1.0, -1.5, np.nan, -2.0]
    infer = [-1.0, -1.2, -1.5, np.nan, -2.0]
    seq = ["a", "a", "a", "b", "b"]
    for name in METHODS:
        padded = weights(name, train, infer, seq, advantage=[np.nan, 1, 1, np.nan, 1])
        bare = weights(name, [-1.0, -1.5, -2.0], [-1.2, -1.5, -2.0], ["a", "a", "b"], advantage=[1, 1, 1])
        assert padded.tolist() == [0, *bare[:2], 0, bare[2]]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_and_nothing_scored(name: str) -> None:
    assert weights(name, [], [], [], advantage=[]).shape == (0,)
    assert weights(name, [np.nan] * 2, [-1.0] * 2, [0, 1], advantage=[np.nan] * 2).tolist() == [0, 0]


def test_one_token_is_its_own_sequence() -> None:
    diffs = np.array([-0.8, -0.1, 0.0, 0.3, 0.69, 0.7, 2.0])
    one_each = np.arange(len(diffs))
    zero = np.zeros(len(diffs))
    for token, sequence in (
        ("tis_token", "tis_sequence"),
        ("tis_token", "tis_geometric"),
        ("mis_token", "mis_sequence"),
    ):
        np.testing.assert_array_equal(weights(token, diffs, zero, one_each), weights(sequence, diffs, zero, one_each))
    hard = weights("icepop_hard", diffs, zero, one_each, alpha=0.5, beta=2)
    for band in ("sequence_band", "geometric_band"):
        np.testing.assert_array_equal(weights(band, diffs, zero, one_each, low=0.5, high=2), hard)


def test_the_geometric_weight_is_one_number_per_sequence_and_truncates_what_tokens_do_not_show() -> None:
    """ms-swift's sequence_truncate, slime's, AReaL's and ROLL's geometric level: exp(mean d), cut down to the cap."""
    train, seq = np.log([4.0, 4.0, 0.25, 9.0, 1.0]), ["a", "a", "b", "c", "c"]
    found = weights("tis_geometric", train, np.zeros(5), seq, cap=2)
    np.testing.assert_allclose(found, [2, 2, 0.25, 2, 2], rtol=1e-15)
    found = weights("tis_geometric", train, np.zeros(5), seq, cap=math.inf)
    np.testing.assert_allclose(found, [4, 4, 0.25, 3, 3], rtol=1e-15)
    # AReaL's action mask at the sequence level: the same weight, dropped beyond the bound
    areal = weights("tis_geometric:cap=inf+geometric_band:low=0,high=3.5", train, np.zeros(5), seq)
    np.testing.assert_allclose(areal, [0, 0, 0.25, 3, 3], rtol=1e-15)


def test_the_clamp_raises_small_ratios_and_cuts_large_ones_exactly_to_the_bound() -> None:
    """OpenRLHF's type tis clamps to [0.5, 5]; with an open lower bound it is truncation, bit for bit."""
    diffs = np.array([-1000.0, np.log(0.5) - 1e-9, np.log(0.5), -0.3, 0.0, np.log(5), np.log(5) + 1e-9, 1000.0])
    zero, each = np.zeros(len(diffs)), np.arange(len(diffs))
    found = weights("clamp_token", diffs, zero, each, low=0.5, high=5)
    assert found.tolist() == [0.5, 0.5, 0.5, np.exp(-0.3), 1.0, 5.0, 5.0, 5.0]
    open_below = weights("clamp_token", diffs, zero, each, low=0, high=5)
    np.testing.assert_array_equal(open_below, weights("tis_token", diffs, zero, each, cap=5))
    assert (weights("clamp_token", diffs, zero, each, low=1, high=1) == 1).all()
    assert weights("clamp_token", [0.0], [0.0], [0], low=2, high=math.inf).tolist() == [2]
    with pytest.raises(MoediagError, match="0 <= low <= high"):
        weights("clamp_token", diffs, zero, each, low=3, high=2)


def test_the_error_threshold_of_a_sequence_sees_both_directions() -> None:
    """NeMo-RL's seq_logprob_error_threshold: mean exp(abs(d)), which ratios that cancel out do not hide."""
    train, seq = np.log([4.0, 0.25, 2.0, 1.0, 3.0, 3.0]), ["a", "a", "b", "b", "c", "c"]
    assert weights("prob_mult_error", train, np.zeros(6), seq).tolist() == [0, 0, 1, 1, 0, 0]
    assert weights("geometric_band", train, np.zeros(6), seq)[:2].tolist() == [1, 1]
    on_the_bound = weights("prob_mult_error", np.float32(train), np.zeros(6), seq, limit=3)
    assert on_the_bound.tolist() == [0, 0, 1, 1, 1, 1]


def test_compositions_multiply() -> None:
    rng = np.random.default_rng(0)
    train, seq = 0.3 * rng.standard_t(2, 60), np.arange(60) // 6
    both = weights("tis_token:cap=1.5+geometric_band:low=0.8,high=1.2+veto:floor=0.3", train, np.zeros(60), seq)
    parts = [
        weights("tis_token", train, np.zeros(60), seq, cap=1.5),
        weights("geometric_band", train, np.zeros(60), seq, low=0.8, high=1.2),
        weights("veto", train, np.zeros(60), seq, floor=0.3),
    ]
    np.testing.assert_array_equal(both, np.prod(parts, axis=0))
    assert 0 < (both == 0).mean() < 1


def test_words_are_read_back_as_they_were_written() -> None:
    for text in (
        "icepop:alpha=0.123456789012345,beta=5",
        "veto:floor=1e-05",
        "tis_token:cap=inf+veto",
        "kpop:phi=1e+2",
    ):
        correction = parse_correction(text)
        assert str(parse_correction(str(correction))) == str(correction)
        assert parse_correction(str(correction)) == correction
    assert str(compose("tis_token", parse_correction("veto"))) == "tis_token:cap=2+veto:floor=0.0001"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("icepopp", "no correction is named 'icepopp'"),
        ("icepop:alfa=1", "icepop has alpha, beta; found alfa"),
        ("none:cap=1", "none has no parameters"),
        ("icepop:alpha=x", "icepop needs alpha=number"),
        ("icepop:alpha=2,beta=1", "alpha <= beta"),
        ("icepop:alpha=nan", "alpha >= 0"),
        ("tis_token:cap=0", "cap > 0"),
        ("tis_token+icepop", "its square"),
        ("", "method"),
        ("tis_token+", "method"),
    ],
)
def test_words_that_cannot_be_read(words: str, message: str) -> None:
    with pytest.raises(MoediagError, match=message):
        parse_correction(words)


def test_arrays_that_do_not_fit() -> None:
    with pytest.raises(MoediagError, match="one length"):
        correction_weights(parse_correction("none"), [0.0, 1.0], [0.0], [0, 0])
    with pytest.raises(MoediagError, match="none is given"):
        weights("dppo_tv", [0.0], [0.0], [0])
    with pytest.raises(MoediagError, match="1 scored tokens have an advantage that is not a number, first at row 0"):
        weights("dppo_tv", [0.0], [0.0], [0], advantage=[np.nan])
    with pytest.raises(MoediagError, match="logits"):
        weights("none", [np.inf], [0.0], [0])
    with pytest.raises(MoediagError, match="the sequence of every token"):
        weights("none", [0.0], [0.0], [None])
    with pytest.raises(MoediagError, match="at least one method"):
        Correction(())
    with pytest.raises(MoediagError, match="cap"):
        Step("icepop", {"cap": 1.0})


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 2)), max_size=40),
    st.integers(0, 99),
)
def test_sums_are_rounded_once_and_know_no_order(pairs: list[tuple[float, int]], seed: int) -> None:
    values, rows = np.array([value for value, _ in pairs]), np.array([row for _, row in pairs], dtype=np.intp)
    order = np.random.default_rng(seed).permutation(len(rows))
    exact = {row: float(sum(Fraction(value) for value in values[rows == row])) for row in rows.tolist()}
    for some in (slice(None), order, np.argsort(rows, kind="stable")):
        x = Terms.of_arrays(np.zeros(len(rows)), np.zeros(len(rows)), rows[some])
        found = x.exact_sums(values[some])
        assert [found[row] for row in x.row_T] == [exact[row] for row in rows[some].tolist()]


def test_sums_of_values_that_float64_hardly_holds() -> None:
    values, zeros_T = np.array([1e300, 1.0, -1e300, 1e308, 1e308, 2.0]), np.zeros(6)
    found = Terms.of_arrays(zeros_T, zeros_T, [0, 0, 0, 1, 1, 2]).exact_sums(values)
    np.testing.assert_array_equal(found, [1.0, np.inf, 2.0])


def test_every_preset_can_be_read_and_belongs_to_a_group() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert str(preset.correction)
        assert preset.source
        assert preset in find_presets(preset.group)
        assert find_presets(name) == (preset,)
    with pytest.raises(MoediagError, match="no preset is named 'icepopp'; there are ring-1t"):
        find_presets("icepopp")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ring-1t", "icepop:alpha=0.5,beta=5"),
        ("glm-5", "icepop:alpha=0.5,beta=2"),
        ("prime-rl-icepop", "icepop:alpha=0.2,beta=5"),
        ("trl-token-tis", "tis_token:cap=3"),
        ("minirl", "tis_token:cap=5"),
        ("nemo-rl-seq-error", "prob_mult_error:limit=2"),
        ("openrlhf-tis", "clamp_token:low=0.5,high=5"),
        ("swift-seq-tis", "tis_geometric:cap=2"),
        ("areal-geo-tis", "tis_geometric:cap=5"),
        ("roll-geo-tis", "tis_geometric:cap=1.2"),
        ("verl-geo-rs", "geometric_band:low=0.999,high=1.001"),
        ("areal-kpop", "kpop:phi=2"),
        ("prime-rl-dppo", "dppo_tv:eps_low=0.2,eps_high=0.2"),
        ("dppo-kl", "dppo_kl:eps=0.05"),
        ("trm-max", "trm_max:delta=0.05"),
        ("verl-k3-rs", "k3_mean:limit=0.01"),
    ],
)
def test_presets_are_those_of_the_domain_page(name: str, words: str) -> None:
    assert str(PRESETS[name].correction) == words
