"""Routing agreement against plain loops over sets, and merge(parts) == whole."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from synthetic import make_block, make_pair, take

from moediag.analysis.expert_sets import compare_block, compare_experts
from moediag.analysis.routing import agreement_by_layer, flips_per_token, routing_rates
from moediag.analysis.routing_counts import RoutingTotals
from moediag.analysis.tokens import token_frame
from moediag.errors import MoediagError
from moediag.results.pair_analysis import read_pair
from moediag.run.align import Pair


def _routing_of(pair: Pair) -> RoutingTotals:
    return read_pair(pair)[1].totals


@pytest.mark.parametrize("n_experts", [2, 8, 63, 64, 65, 128, 256, 300])
def test_set_comparison_equals_python_sets(n_experts: int) -> None:
    rng = np.random.default_rng(n_experts)
    top_k = min(8, n_experts)
    a = np.argsort(rng.random((60, 3, n_experts)), axis=2)[:, :, :top_k].astype(np.int16)
    b = a[:, :, ::-1].copy()
    b[::2] = np.argsort(rng.random((30, 3, n_experts)), axis=2)[:, :, :top_k]
    b[5, 1, 0] = -1
    a[7] = -1
    seen = compare_experts(a, b)
    for t in range(60):
        for layer in range(3):
            x, y = a[t, layer].tolist(), b[t, layer].tolist()
            compared = min(x + y) >= 0
            assert seen.is_compared_TL[t, layer] == compared
            assert seen.is_same_TL[t, layer] == (compared and set(x) == set(y))
            assert seen.is_reorder_TL[t, layer] == (compared and set(x) == set(y) and x != y)
            assert seen.n_common_TL[t, layer] == (len(set(x) & set(y)) if compared else 0)


def test_set_comparison_in_chunks_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block()
    whole = compare_block(block)
    monkeypatch.setattr("moediag.analysis.expert_sets._IDS_PER_CHUNK", 50)
    parts = compare_block(block)
    for field in fields(whole):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(parts, field.name))


def test_different_shapes_are_an_error() -> None:
    block = make_block()
    with pytest.raises(MoediagError, match="shapes"):
        compare_experts(block.expert_ids_train_TLK, block.expert_ids_infer_TLK[:, :1])


def test_agreement_equals_a_plain_loop() -> None:
    block = make_block(n_layers=3, flip_noise=0.3)
    block.expert_ids_train_TLK[4, 1] = -1
    block.expert_ids_infer_TLK[9] = -1
    frame = agreement_by_layer(_routing_of(make_pair(block)), (1, 2, 3))
    train, infer = block.expert_ids_train_TLK, block.expert_ids_infer_TLK
    for layer in range(3):
        same, prefix, overlap, reorder = [], [], [], []
        for t in range(len(block)):
            rows = [(train[t, m].tolist(), infer[t, m].tolist()) for m in range(layer + 1)]
            a, b = rows[-1]
            if min(a + b) >= 0:
                same.append(set(a) == set(b))
                reorder.append(set(a) == set(b) and a != b)
                overlap.append(len(set(a) & set(b)) / 2)
            if all(min(x + y) >= 0 for x, y in rows):
                prefix.append(all(set(x) == set(y) for x, y in rows))
        row = frame.iloc[layer]
        assert row["n_tokens"] == len(same)
        expected = [np.mean(same), np.mean(prefix), np.mean(overlap), np.mean(reorder)]
        names = ["same_set_rate", "cumulative_same_set_rate", "overlap", "reorder_rate"]
        assert row[names].tolist() == pytest.approx(expected)
        assert row["same_set_rate_ci_low"] < row["same_set_rate"] < row["same_set_rate_ci_high"]


def test_rates_equal_a_plain_loop() -> None:
    block = make_block(flip_noise=0.3)
    rates = routing_rates(_routing_of(make_pair(block)))
    train, infer, weights = block.expert_ids_train_TLK, block.expert_ids_infer_TLK, block.gate_weights_train_TLK
    flips = [[set(a) != set(b) for a, b in zip(x, y, strict=True)] for x, y in zip(train, infer, strict=True)]
    mass = [
        sum(float(w) for e, w in zip(train[t, m], weights[t, m], strict=True) if e not in infer[t, m])
        for t in range(len(block))
        for m in range(3)
    ]
    assert rates.flip_rate.value == pytest.approx(np.mean(flips))
    assert rates.any_layer_share.value == pytest.approx(np.mean([any(f) for f in flips]))
    assert rates.misrouted_mass.value == pytest.approx(np.mean(mass))
    assert rates.independent_any_layer_share == pytest.approx(1 - np.prod(1 - np.mean(flips, axis=0)))


def test_flips_per_token_counts_and_differences() -> None:
    block = make_block(flip_noise=0.5)
    pair = make_pair(block)
    tokens = token_frame(pair)
    frame = flips_per_token(tokens, _routing_of(pair))
    assert frame["n_tokens"].sum() == len(block)
    assert frame["share"].sum() == pytest.approx(1)
    assert frame["independent_share"].sum() == pytest.approx(1)
    some = tokens[tokens["n_flipped_layers"] == 1]
    diff = np.abs(some["logp_train"].astype(float) - some["logp_infer"].astype(float))
    assert frame.loc[1, "abs_logp_diff_mean"] == pytest.approx(diff.mean())
    assert frame.loc[1, "abs_logp_diff_p99"] == pytest.approx(np.quantile(diff, 0.99))


def test_merge_of_parts_equals_the_whole_even_inside_a_prompt() -> None:
    block = make_block(flip_noise=0.4)
    whole = _routing_of(make_pair(block))
    cuts = [take(block, slice(0, 31)), take(block, slice(31, 90)), take(block, slice(90, None))]
    parts = [_routing_of(make_pair(cut)) for cut in cuts]
    for merged in (RoutingTotals.merge(parts), RoutingTotals.merge(parts[::-1]), _routing_of(make_pair(*cuts))):
        for field in fields(whole):
            np.testing.assert_allclose(getattr(merged, field.name), getattr(whole, field.name), rtol=1e-12)


def test_merge_of_nothing_is_an_error() -> None:
    with pytest.raises(MoediagError, match="pass at least one RoutingTotals"):
        RoutingTotals.merge([])


def test_without_gate_weights_only_the_mass_is_missing() -> None:
    block = replace(make_block(), gate_weights_train_TLK=None)
    rates = routing_rates(_routing_of(make_pair(block)))
    assert np.isnan(rates.misrouted_mass.value)
    assert np.isfinite(rates.flip_rate.value)
