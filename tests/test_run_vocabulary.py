"""Whole next-token distributions in a run: which sequences, round trip, and everything that can be wrong with them."""

from __future__ import annotations

import contextlib
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from records import arm_of
from scripted_engine import VOCABULARY, create_scripted_run, make_scripted_run, scripted_capture
from scripted_engine import scripted_tokens as tokens_of

from moediag.errors import CaptureError, CorruptRunError, IncompleteRunError, MoediagError
from moediag.hygiene import check_run
from moediag.run.capture import Shard, TokenRows, split_into_shards
from moediag.run.reader import Run, open_run
from moediag.run.vocabulary import VocabLogps, VocabRows, chosen_in, decode_vocab, encode_vocab, response_rows
from moediag.run.writer import RunWriter

N_CHOSEN = 4


def distributions(tokens: TokenRows, logp_T: np.ndarray, sequences: np.ndarray, seed: int = 0) -> VocabLogps:
    """Random rows in which every token has the logp that the arm stored."""
    row_N = response_rows(tokens, sequences)
    noise_NV = np.random.default_rng(seed).normal(size=(len(row_N), VOCABULARY))
    own_N = np.arange(len(row_N)), tokens.token_id_T[row_N]
    noise_NV[own_N] = -np.inf
    rest_N = np.log(-np.expm1(logp_T[row_N].astype(np.float64)))  # what the other tokens share
    logps_NV = noise_NV - np.log(np.exp(noise_NV).sum(axis=1, keepdims=True)) + rest_N[:, None]
    logps_NV[own_N] = logp_T[row_N]
    return VocabLogps(row_N, logps_NV.astype(np.float32))


def make_run(path: Path, n_chosen: int = N_CHOSEN, **layout: int) -> Run:
    """A complete scripted run of which some sequences keep distributions."""
    run = create_scripted_run(path, full_vocab=n_chosen, **layout)
    for arm in ("infer", "train"):
        RunWriter(run).begin_arm(arm_of(run, arm))
        for shard in run.shards:
            write_shard(run, arm, shard)
    return open_run(path)


def write_shard(run: Run, arm: str, shard: Shard, vocab: VocabLogps | None = None) -> None:
    tokens = tokens_of(run, shard) if arm == "infer" else run.tokens(shard)
    capture = scripted_capture(run, arm, tokens)
    chosen = run.vocab_sequences(arm, shard)
    if vocab is None and len(chosen):
        vocab = distributions(tokens, capture.logp_T, chosen, seed=len(arm))
    RunWriter(run).write_capture(arm, shard, tokens, capture, {}, {"gate_weights_TLK": "bfloat16"}, vocab)
    if arm == "infer":
        RunWriter(run).write_tokens(shard, tokens)


@given(n_sequences=st.integers(1, 40), n_chosen=st.integers(0, 40), size=st.integers(1, 9))
def test_the_shards_together_keep_the_chosen_sequences_evenly_spread(
    n_sequences: int, n_chosen: int, size: int
) -> None:
    n_chosen = min(n_chosen, n_sequences)
    found = []
    for shard in split_into_shards(n_sequences, size):
        which = chosen_in(shard, n_chosen, n_sequences)
        found += [i * n_sequences // n_chosen for i in which]
        assert all(i * n_sequences // n_chosen in shard.seq_ids for i in which)
    assert found == [i * n_sequences // n_chosen for i in range(n_chosen)]
    assert len(set(found)) == n_chosen


def test_the_benchmark_counts_distributions_apart_from_bytes_per_token(tmp_path: Path) -> None:
    """Bug: 564 bytes a token were written where the arithmetic of the arrays says 32."""
    benchmark = runpy.run_path(str(REPOSITORY / "benchmarks" / "capture_overhead.py"))
    plain, keeping = make_run(tmp_path / "plain", n_chosen=0), make_run(tmp_path / "keeping")
    arrays, nothing = benchmark["written"](plain, "infer")
    with_arrays, distributions = benchmark["written"](keeping, "infer")
    assert nothing == 0
    assert with_arrays == pytest.approx(arrays, rel=0.01)  # sidecars name other digests
    rows = sum(len(response_rows(keeping.tokens(s), keeping.vocab_sequences("infer", s))) for s in keeping.shards)
    assert distributions > 4 * VOCABULARY * rows > 2 * arrays


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_prompts=7, shard_size=3)
    assert check_run(run) == []
    kept = [run.vocab_sequences("infer", shard).tolist() for shard in run.shards]
    assert kept == [[0, 1], [3, 5], []]
    assert run.load_vocab("infer", run.shards[2]) is None
    for shard in run.shards[:2]:
        tokens, capture = run.tokens(shard), run.capture("train", shard)
        vocab = run.load_vocab("train", shard)
        assert vocab is not None
        again = decode_vocab(encode_vocab(vocab), "here")
        for name in ("row_N", "logps_NV"):
            np.testing.assert_array_equal(getattr(again, name), getattr(vocab, name))
        assert set(tokens.seq_id_T[vocab.row_N]) == set(run.vocab_sequences("train", shard))
        own = vocab.logps_NV[np.arange(len(vocab)), tokens.token_id_T[vocab.row_N]]
        np.testing.assert_array_equal(own, capture.logp_T[vocab.row_N])


def test_only_the_main_pair_keeps_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert [run.keeps_vocab(arm, run.shards[0]) for arm in ("infer", "train", "train-repeat", "infer-repeat")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert run.load_vocab("train-repeat", run.shards[0]) is None
    plain = make_scripted_run(tmp_path / "plain")
    assert plain.load_vocab("infer", plain.shards[0]) is None


def test_a_shard_without_its_distributions_is_captured_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run.path / "arms" / "train" / "shard-00001.vocab.json"
    path.unlink()
    assert [shard.index for shard in run.missing_shards("train")] == [1]
    assert "missing-shard" in {found.rule for found in check_run(run)}
    with pytest.raises(IncompleteRunError, match="has not been captured"):
        run.load_vocab("train", run.shards[1])
    write_shard(run, "train", run.shards[1])
    assert check_run(run) == []


def test_what_is_wrong_with_distributions_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shard = run.shards[0]
    tokens, good = run.tokens(shard), run.load_vocab("train", shard)
    assert good is not None
    one = np.zeros_like(good.logps_NV)
    one[0, :] = 0.01
    other = good.logps_NV.copy()
    other[0] = np.roll(other[0], 1)
    absent = good.logps_NV.copy()
    absent[1] = np.nan
    spoilt = {
        "do not sum to 1": replace(good, logps_NV=good.logps_NV + one),
        "another logp": replace(good, logps_NV=other),
        "1 of": replace(good, logps_NV=absent),
        "do not reach token id": replace(good, logps_NV=good.logps_NV[:, :3]),
        "chosen response tokens": VocabLogps(good.row_N[:-1], good.logps_NV[:-1]),
    }
    for words, vocab in spoilt.items():
        write_shard(run, "train", shard, vocab)
        (found,) = check_run(run)
        assert (found.rule, found.where) == ("D31-distribution", "train shard-00000 vocabulary")
        assert words in found.message
    write_shard(run, "train", shard, good)
    assert check_run(run) == []
    assert good.flaw(tokens, run.capture("train", shard).logp_T, run.vocab_sequences("train", shard)) == ""


def test_damage_is_an_error_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run.path / "arms" / "infer" / "shard-00000.vocab.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptRunError, match="is damaged"):
        run.load_vocab("infer", run.shards[0])
    assert [found.rule for found in check_run(run) if found.level == "error"] == ["damaged"]


@given(data=st.binary(max_size=80), at=st.integers(0, 200))
def test_spoilt_bytes_are_refused_or_read_never_a_traceback(data: bytes, at: int) -> None:
    good = encode_vocab(VocabLogps(np.arange(2), np.zeros((2, 3), np.float32)))
    for spoilt in (data, good[:at] + data + good[at + len(data) :]):
        with contextlib.suppress(MoediagError):
            decode_vocab(spoilt, "here")


def test_rows_may_come_in_any_order_and_the_first_of_a_row_stays() -> None:
    rng = np.random.default_rng(3)
    n_rows = 9
    tokens = TokenRows(
        np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int32),
        np.arange(n_rows, dtype=np.int32), rng.integers(0, 5, n_rows), np.arange(n_rows) >= 2,
    )  # fmt: skip
    scores_NV = rng.normal(size=(n_rows, 5))
    logps_NV = (scores_NV - np.log(np.exp(scores_NV).sum(axis=1, keepdims=True))).astype(np.float32)
    logp_T = logps_NV[np.arange(n_rows), tokens.token_id_T]
    chosen = np.zeros(1, np.int64)
    rows = VocabRows(tokens, chosen, 5)
    order = np.array([8, 3, 3, 5, 2, 4])  # 3 twice: recomputed, other numbers the second time
    given_NV = logps_NV[order]
    given_NV[2] = 0
    assert rows.wants(np.arange(n_rows)).tolist() == [False] * 2 + [True] * 7
    rows.add(order, given_NV)
    with pytest.raises(CaptureError, match="2 of 7 distributions were never seen"):
        rows.whole(tokens, logp_T, chosen)
    rows.add(np.array([6, 8, 7]), np.stack([logps_NV[6], np.zeros(5, np.float32), logps_NV[7]]))
    np.testing.assert_array_equal(rows.whole(tokens, logp_T, chosen).logps_NV, logps_NV[2:])
    with pytest.raises(CaptureError, match="another logp than is stored"):
        rows.whole(tokens, logp_T - np.float32(0.01), chosen)
    with pytest.raises(CaptureError, match="over 4 tokens, config.json's vocab_size is 5"):
        rows.add(np.array([2]), logps_NV[2:3, :4])
