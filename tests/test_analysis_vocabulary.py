"""Exact divergences: against a plain loop, their inequalities, and what a run with whole distributions is told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scripted_engine import make_scripted_run
from test_run_vocabulary import make_run, write_shard

from moediag.analysis.vocabulary import EXACT, divergences, exact_divergences
from moediag.errors import AlignmentError
from moediag.results import analyze_run, load_frames, load_summary, report_run
from moediag.run.vocabulary import VocabLogps

SCORES = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-30, 30))


def log_softmax(scores_NV: np.ndarray) -> np.ndarray:
    return scores_NV - np.log(np.exp(scores_NV).sum(axis=1, keepdims=True))


def plain_divergences(infer_V: np.ndarray, train_V: np.ndarray) -> tuple[float, float, float]:
    """By the definitions, token by token, with exact summation."""
    p, q = ([math.exp(value) for value in side] for side in (infer_V.tolist(), train_V.tolist()))
    p, q = ([value / math.fsum(side) for value in side] for side in (p, q))
    forward = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    backward = math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
    return forward, backward, math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.3, 4.0])
def test_divergences_equal_a_plain_loop(noise: float) -> None:
    rng = np.random.default_rng(1)
    scores_NV = rng.normal(0, 3, size=(40, 97))
    infer, train = (log_softmax(s).astype(np.float32) for s in (scores_NV, scores_NV + rng.normal(0, noise, (40, 97))))
    found = np.stack(divergences(infer, train))
    wanted = np.array([plain_divergences(a, b) for a, b in zip(infer, train, strict=True)]).T
    # the loop's terms cancel, so that it is exact to about 1e-16 only, not to 1e-16 of the value
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-14)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    """Second order: KL of a shift by noise n is about var(n) / 2; at 1e-7 the terms themselves are 1e10 times that."""
    rng = np.random.default_rng(2)
    scores_NV, noise_NV = rng.normal(0, 1, (3, 500)), rng.normal(0, 1e-7, (3, 500))
    infer = log_softmax(scores_NV)
    forward, backward, _ = divergences(infer, log_softmax(scores_NV + noise_NV))
    p = np.exp(infer)
    variance = (p * noise_NV**2).sum(axis=1) - (p * noise_NV).sum(axis=1) ** 2
    np.testing.assert_allclose(forward, variance / 2, rtol=1e-3)
    np.testing.assert_allclose(backward, variance / 2, rtol=1e-3)


@given(scores=SCORES, seed=st.integers(0, 2**16))
def test_inequalities_and_symmetries(scores: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    infer, train = log_softmax(scores), log_softmax(scores + rng.normal(0, rng.uniform(0, 3), scores.shape))
    forward, backward, variation = divergences(infer, train)
    assert (forward >= 0).all()
    assert (backward >= 0).all()
    assert ((variation >= 0) & (variation <= 1 + 1e-12)).all()
    assert (2 * variation**2 <= np.minimum(forward, backward) + 1e-12).all()  # Pinsker
    for found, wanted in zip(divergences(train, infer), (backward, forward, variation), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for part in divergences(infer, infer):
        assert (part == 0).all()
    order = rng.permutation(scores.shape[1])
    for found, wanted in zip(
        divergences(infer[:, order], train[:, order]), (forward, backward, variation), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-14)


def test_a_token_that_one_side_rules_out() -> None:
    half, ruled_out = np.log([[0.5, 0.5, 1e-300]]), np.array([[0.0, -np.inf, -np.inf]])
    forward, backward, variation = divergences(half, ruled_out)
    assert forward[0] == np.inf
    assert backward[0] == pytest.approx(math.log(2))
    assert variation[0] == pytest.approx(0.5)
    for part in divergences(ruled_out, ruled_out):
        assert part[0] == 0


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    infer, train = (log_softmax(rng.normal(size=(31, 11))) for _ in range(2))
    whole = divergences(infer, train)
    monkeypatch.setattr("moediag.analysis.vocabulary._CELLS", 4 * 11)
    for part, again in zip(whole, divergences(infer, train), strict=True):
        np.testing.assert_array_equal(part, again)
    assert [len(part) for part in divergences(infer[:0], train[:0])] == [0, 0, 0]


def test_a_run_is_told_exact_and_estimated_divergences_of_the_same_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_chosen=20, n_prompts=24, shard_size=5)
    exact = exact_divergences(run)
    assert exact is not None
    assert exact.prefixes["seq_id"].nunique() == 20
    assert (exact.prefixes.groupby("seq_id")["position"].min() == 0).all()
    measures = exact.measures.set_index("measure")
    diff = (exact.prefixes["logp_train"] - exact.prefixes["logp_infer"]).astype(float)
    assert measures.loc["kl_infer_train_k1", "value"] == pytest.approx(-diff.mean(), rel=1e-5)
    for name in EXACT:
        row = measures.loc[name]
        assert row["value"] == pytest.approx(exact.prefixes[name].mean(), rel=1e-12)
        assert row["ci_low"] < row["value"] < row["ci_high"]
        assert (row["n_tokens"], row["n_prompts"], row["n_vocabulary"]) == (len(exact.prefixes), 20, 200)
    first = run.shards[0]
    infer, train = run.load_vocab("infer", first), run.load_vocab("train", first)
    assert infer is not None
    assert train is not None
    wanted = plain_divergences(infer.logps_NV[0], train.logps_NV[0])
    np.testing.assert_allclose(exact.prefixes.loc[0, list(EXACT)].to_numpy(float), wanted, rtol=1e-9)


def test_the_summary_holds_them_and_a_run_without_is_told_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_chosen=12, n_prompts=12)
    logp = analyze_run(run)["pairs"]["infer~train"]["logp"]
    for name in EXACT:
        low, high = logp[f"{name}_ci"]
        assert 0 < low < logp[name] < high
    assert logp["exact"]["n_prompts"] == 12
    assert load_summary(run)["pairs"]["infer~train"]["logp"] == logp
    assert {"vocab_divergences", "exact_divergences"} <= load_frames(run).keys()
    assert report_run(run).exists()
    plain = make_scripted_run(tmp_path / "plain")
    assert exact_divergences(plain) is None
    assert not {*EXACT, "exact"} & set(analyze_run(plain)["pairs"]["infer~train"]["logp"])


def test_distributions_over_other_vocabularies_are_not_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    good = run.load_vocab("train", run.shards[0])
    assert good is not None
    wider = np.pad(good.logps_NV, ((0, 0), (0, 5)), constant_values=-np.inf)
    write_shard(run, "train", run.shards[0], VocabLogps(good.row_N, wider))
    with pytest.raises(AlignmentError, match="or of other tokens"):
        exact_divergences(run)
