"""Since which layer two engines differ in float32: every pattern found where it was made, and plain loops beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moediag.diagnosis.layers import (
    ALL_ROWS,
    FROM_A_POSITION,
    LAYERS_APART,
    LOGP,
    NOT_THE_FIRST,
    SOME_EXPERTS,
    SOME_SEQUENCES,
    LayersApart,
    _differs,
    _experts,
    _gate_difference,
    _moved_by_flips,
    _pattern,
    _Rows,
    _since,
)
from moediag.run.capture import Capture, TokenRows

E, K, L = 8, 2, 3


def tokens_of(lengths: list[int]) -> TokenRows:
    seq_T = np.repeat(np.arange(len(lengths)), lengths)
    position_T = np.concatenate([np.arange(n) for n in lengths])
    return TokenRows(
        seq_id_T=seq_T.astype(np.int64),
        prompt_id_T=seq_T.astype(np.int64),
        sample_index_T=np.zeros(len(seq_T), np.int32),
        position_T=position_T.astype(np.int32),
        token_id_T=np.arange(len(seq_T)).astype(np.int64),
        is_response_T=position_T > 0,
    )


def routed(ids_TLK: NDArray[Any], gates_TLK: NDArray[Any] | None = None) -> Capture:
    n = len(ids_TLK)
    return Capture(np.zeros(n, np.float32), expert_ids_TLK=ids_TLK.astype(np.int16),
                   gate_weights_TLK=None if gates_TLK is None else gates_TLK.astype(np.float32))  # fmt: skip


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_what_flips_may_have_moved_is_what_plain_loops_say(lengths: list[int], seed: int) -> None:
    rng, tokens = np.random.default_rng(seed), tokens_of(lengths)
    ids_TLK = np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(len(tokens))])
    others_TLK = ids_TLK.copy()
    flipped_TL = rng.random((len(tokens), L)) < 0.2
    others_TLK[flipped_TL] = (others_TLK[flipped_TL] + 1) % E
    is_flipped_TL = (np.sort(ids_TLK, -1) != np.sort(others_TLK, -1)).any(-1)
    moved_TQ = _moved_by_flips(tokens, routed(ids_TLK), routed(others_TLK), L)
    for row in range(len(tokens)):
        before = [r for r in range(row + 1) if tokens.seq_id_T[r] == tokens.seq_id_T[row]]
        for layer in range(L):
            assert moved_TQ[row, layer] == any(is_flipped_TL[r, below] for r in before for below in range(layer))
        assert moved_TQ[row, L] == any(is_flipped_TL[r].any() for r in before if r < row)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_rows_since_a_choice_are_what_plain_loops_say(lengths: list[int], seed: int) -> None:
    seq_T = np.repeat(np.arange(len(lengths)), lengths)
    chosen_T = np.random.default_rng(seed).random(len(seq_T)) < 0.3
    expected = [any(chosen_T[r] for r in range(row + 1) if seq_T[r] == seq_T[row]) for row in range(len(seq_T))]
    assert _since(chosen_T, seq_T).tolist() == expected


def test_gate_weights_are_compared_by_expert_and_not_by_slot() -> None:
    ids_TLK = np.array([[[3, 5]], [[3, 5]], [[3, 5]]])
    gates_TLK = np.array([[[0.75, 0.25]], [[0.75, 0.25]], [[0.75, 0.25]]])
    others = routed(np.array([[[5, 3]], [[3, 5]], [[3, 6]]]), np.array([[[0.25, 0.75]], [[0.75, 0.5]], [[0.75, 0.25]]]))
    apart_TL = _gate_difference(routed(ids_TLK, gates_TLK), others, 1)
    assert apart_TL[:2, 0].tolist() == [0, pytest.approx(1 / 3)]
    assert np.isnan(apart_TL[2, 0])  # other experts have no weights to compare
    assert np.isnan(_gate_difference(routed(ids_TLK), others, 1)).all()


def test_one_far_sequence_is_not_enough_and_two_are() -> None:
    seq_T = np.repeat([0, 1, 2], 4)
    times_T = np.ones(12)
    assert not _differs(times_T, seq_T)
    times_T[1] = 1000
    assert not _differs(times_T, seq_T)
    times_T[5] = 1000
    assert _differs(times_T, seq_T)
    assert _differs(np.full(12, 20.0), seq_T)  # a typical row beyond what one function makes


def pattern_of(times_T: NDArray[Any], ids_TLK: NDArray[Any], column: int, lengths: list[int]) -> LayersApart:
    n, tokens = len(times_T), tokens_of(lengths)
    nothing_TQ, nothing_TL = np.zeros((n, L + 1)), np.zeros((n, L))
    rows = _Rows(nothing_TQ, nothing_TQ, nothing_TL, nothing_TL, ids_TLK.astype(np.int16), tokens.seq_id_T,
                 tokens.position_T, "margin of router logits")  # fmt: skip
    what = ["margin of router logits"] * L + [LOGP]
    frame = pd.DataFrame({"layer": range(L + 1), "decoder_layer": [1, 2, 3, -1], "what": what, "n_rows": n})
    frame = LAYERS_APART.validate(frame.reindex(columns=LAYERS_APART.names))
    return _pattern(LayersApart(frame), column, times_T, rows, L)


@pytest.fixture
def many() -> tuple[list[int], TokenRows, NDArray[Any]]:
    lengths = [24] * 10
    rng = np.random.default_rng(0)
    ids_TLK = np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(240)])
    return lengths, tokens_of(lengths), ids_TLK


def test_rows_that_all_differ_are_called_so(many: Any) -> None:
    lengths, _, ids_TLK = many
    found = pattern_of(np.full(240, 5000.0), ids_TLK, 1, lengths)
    assert (found.pattern, found.n_differing, found.n_rows) == (ALL_ROWS, 240, 240)
    assert found.place == "the router of decoder layer 2"
    assert found.before == "the router of decoder layer 1 agrees, and with it all that lies before"


@pytest.mark.parametrize("power", [0.0, 0.9])
def test_attention_leaves_first_rows_alone_and_rope_grows(many: Any, power: float) -> None:
    lengths, tokens, ids_TLK = many
    times_T = np.where(tokens.position_T > 0, 1000.0 * np.maximum(tokens.position_T, 1) ** power, 1.0)
    found = pattern_of(times_T, ids_TLK, 1, lengths)
    assert found.pattern == NOT_THE_FIRST
    assert found.slope == pytest.approx(power, abs=0.01)


def test_a_window_is_named_by_its_first_position(many: Any) -> None:
    lengths, tokens, ids_TLK = many
    found = pattern_of(np.where(tokens.position_T >= 16, 1000.0, 1.0), ids_TLK, 1, lengths)
    assert (found.pattern, found.position) == (FROM_A_POSITION, 16)


@pytest.mark.parametrize("column", [2, L])
def test_one_expert_is_named(many: Any, column: int) -> None:
    """Rows of log-probabilities are of the row before; attention carries a difference along, the head does not."""
    lengths, tokens, ids_TLK = many
    ids_TLK[tokens.position_T < 2] = [1, 2]
    has_T = (ids_TLK[:, column - 1] == 5).any(1)
    if column == L:
        differs_T = np.roll(has_T, 1)
        times_T = np.where(tokens.position_T == 0, np.nan, np.where(differs_T, 5000.0, 1.0))
    else:
        times_T = np.where(_since(has_T, tokens.seq_id_T), 5000.0, 1.0)
        times_T[tokens.position_T == 0] = np.where(np.arange(10) == 3, 5000.0, 1.0)  # not attention's pattern
        ids_TLK[(tokens.position_T == 0) & (tokens.seq_id_T == 3), column - 1] = [5, 1]
        times_T[tokens.seq_id_T == 3] = 5000.0
    found = pattern_of(times_T, ids_TLK, column, lengths)
    assert (found.pattern, found.experts) == (SOME_EXPERTS, (5,))


def test_attention_is_not_taken_for_experts(many: Any) -> None:
    """All rows but the first ones differed, in which three experts happened not to stand: those were blamed."""
    lengths, tokens, ids_TLK = many
    ids_TLK[tokens.position_T == 0] = [0, 1]
    found = pattern_of(np.where(tokens.position_T > 0, 5000.0, 1.0), ids_TLK, 1, lengths)
    assert found.pattern == NOT_THE_FIRST


def test_no_expert_is_blamed_for_rows_at_random(many: Any) -> None:
    lengths, _, ids_TLK = many
    differs_T = np.random.default_rng(1).random(240) < 0.5
    assert _experts(ids_TLK[:, 0], None, differs_T, ~differs_T) == ()
    assert pattern_of(np.where(differs_T, 5000.0, 1.0), ids_TLK, L, lengths).pattern == ALL_ROWS


def test_a_few_sequences_are_named_and_not_attention(many: Any) -> None:
    """Bug: three prompts with a wrong token were called attention, as no first row differed."""
    lengths, tokens, ids_TLK = many
    is_wrong_T = np.isin(tokens.seq_id_T, [2, 5, 7]) & (tokens.position_T > 3)
    found = pattern_of(np.where(is_wrong_T, 5000.0, 1.0), ids_TLK, 0, lengths)
    assert (found.pattern, found.sequences) == (SOME_SEQUENCES, (2, 5, 7))


def test_what_leaves_most_rows_alone_is_not_attention(many: Any) -> None:
    """Bug: a bias that moves one row in five, and by chance no first row, was called the softmax scale."""
    lengths, tokens, ids_TLK = many
    is_moved_T = (np.arange(240) % 5 == 3) & (tokens.position_T > 0)
    found = pattern_of(np.where(is_moved_T, 5000.0, 1.0), ids_TLK, 1, lengths)
    assert found.pattern == ALL_ROWS
