"""The pair summary: its contract, strict JSON, degenerate pairs, and what must not change it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_pair, self_block, swapped, take

from moediag.frames import declared_frames
from moediag.results.pair_analysis import PairAnalysis, analyze_pair
from moediag.results.pair_summary import pair_summary
from moediag.run.align import Pair, PairBlock

pytestmark = pytest.mark.filterwarnings("error")

LOGP_KEYS = {
    "abs_logp_diff": ("mean", "p50", "p90", "p99", "p999", "max"),
    "abs_prob_diff": ("mean", "max"),
}
LOGP_SCALARS = ("kl_infer_train_k1", "kl_infer_train_k2", "kl_infer_train_k3", "mean_ratio", "extreme_share_2")
LAYER_KEYS = ("same_set_rate", "cumulative_same_set_rate", "overlap")


def _summary(*blocks: PairBlock) -> dict[str, Any]:
    summary = pair_summary(analyze_pair(make_pair(*blocks)))
    return dict(json.loads(json.dumps(summary, allow_nan=False)))


def _numbers(value: Any) -> Iterator[float]:
    """Every number of a nested summary."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif value is not None and not isinstance(value, str):
        yield value


def test_summary_keeps_the_contracts_keys() -> None:
    summary = _summary(make_block())
    assert {"n_sequences", "n_prompts", "n_tokens", "n_unscored", "logp", "routing", "margins"} <= set(summary)
    for group, names in LOGP_KEYS.items():
        assert set(summary["logp"][group]) >= {key for name in names for key in (name, f"{name}_ci")}
    assert set(summary["logp"]) >= {*LOGP_KEYS, *LOGP_SCALARS, *(f"{name}_ci" for name in LOGP_SCALARS)}
    assert {"flip_rate", "flip_rate_ci", "any_layer_share", "any_layer_share_ci"} <= set(summary["routing"])
    layers = summary["routing"]["by_layer"]
    assert [(row["layer"], row["decoder_layer"]) for row in layers] == [(0, 1), (1, 2), (2, 3)]
    assert all({*LAYER_KEYS, *(f"{name}_ci" for name in LAYER_KEYS)} <= set(row) for row in layers)
    low, high = summary["logp"]["abs_logp_diff"]["mean_ci"]
    assert low < summary["logp"]["abs_logp_diff"]["mean"] < high


def test_counts_are_of_the_pair() -> None:
    block = make_block(n_prompts=9, samples=3)
    block.logp_train_T[:4] = np.nan
    summary = _summary(block)
    assert (summary["n_prompts"], summary["n_sequences"]) == (9, 27)
    assert (summary["n_unscored"], summary["n_tokens"]) == (4, len(block) - 4)


def test_what_is_not_scored_is_counted_and_belongs_to_no_count_of_scored_ones() -> None:
    """Bug: sequences and prompts without a scored token counted, and an infinite logp was left out without a word."""
    block = make_block(n_prompts=9, samples=3)
    block.logp_infer_T[block.prompt_id_T == block.prompt_id_T[0]] = np.nan
    block.logp_train_T[-2:], block.logp_infer_T[-1] = -np.inf, -np.inf
    summary = _summary(block)
    assert (summary["n_prompts"], summary["n_sequences"]) == (8, 24)
    assert summary["n_impossible"] == 2
    assert summary["n_tokens"] + summary["n_unscored"] == len(block)


def test_dense_has_no_routing() -> None:
    summary = _summary(make_block(dense=True))
    assert summary["routing"] is None
    assert summary["margins"] is None
    assert "agreement_by_layer" not in analyze_pair(make_pair(make_block(dense=True))).frames()


def test_frames_are_all_declared() -> None:
    declared = {spec.name: spec for spec in declared_frames()}
    for name, frame in analyze_pair(make_pair(make_block())).frames().items():
        pd.testing.assert_frame_equal(declared[name].validate(frame), frame)


def test_a_pair_is_read_once() -> None:
    """Blocks may be hundreds of megabytes: every analysis feeds on the same pass."""
    reads = []
    block = make_block()

    def read() -> Iterator[PairBlock]:
        reads.append(1)
        return iter([block])

    analyze_pair(replace(make_pair(block), read_blocks=read))
    assert len(reads) == 1


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5, 8]))
def test_self_comparison_is_exactly_perfect(seed: int, top_k: int) -> None:
    summary = _summary(self_block(make_block(seed=seed, top_k=top_k)))
    logp, routing = summary["logp"], summary["routing"]
    zeros = [logp["abs_logp_diff"][name] for name in ("mean", "p50", "p90", "p99", "max")]
    zeros += [logp[f"kl_infer_train_k{i}"] for i in (1, 2, 3)] + [logp["extreme_share_2"]]
    zeros += [routing["flip_rate"], routing["any_layer_share"], routing["misrouted_mass"]]
    assert zeros == [0.0] * len(zeros)
    assert logp["mean_ratio"] == 1.0
    assert all(row[name] == 1.0 for row in routing["by_layer"] for name in LAYER_KEYS)
    assert logp["abs_logp_diff"]["mean_ci"] is None
    assert routing["flip_rate_ci"][1] > 0


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10_000))
def test_swapping_sides_negates_signed_values_and_keeps_agreement(seed: int) -> None:
    block = make_block(seed=seed, flip_noise=0.3)
    summary, other = _summary(block), _summary(swapped(block))
    assert other["logp"]["kl_infer_train_k1"] == -summary["logp"]["kl_infer_train_k1"]
    for key in ("abs_logp_diff", "abs_prob_diff", "kl_infer_train_k2", "extreme_share_2"):
        assert other["logp"][key] == summary["logp"][key]
    for rows in (other["routing"]["by_layer"], summary["routing"]["by_layer"]):
        for row in rows:
            del row["misrouted_mass"], row["misrouted_mass_ci"]  # of train's weights, on both sides of the swap
    assert other["routing"]["by_layer"] == summary["routing"]["by_layer"]
    assert other["logp"]["binary_kl_train_infer"] == summary["logp"]["binary_kl_infer_train"]
    assert other["routing"]["any_layer_share"] == summary["routing"]["any_layer_share"]


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_tokens_and_names_of_experts_do_not_matter(seed: int) -> None:
    """Permuted tokens, permuted experts, permuted order inside K (which is a reorder, not a flip)."""
    rng = np.random.default_rng(seed)
    block = make_block(seed=seed, flip_noise=0.3)
    relabel = rng.permutation(8).astype(np.int16)
    changed = replace(
        block,
        expert_ids_train_TLK=relabel[block.expert_ids_train_TLK][:, :, ::-1],
        expert_ids_infer_TLK=relabel[block.expert_ids_infer_TLK],
        gate_weights_train_TLK=block.gate_weights_train_TLK[:, :, ::-1],
    )
    changed = take(changed, rng.permutation(len(block)))
    one, other = _summary(changed), _summary(block)
    for routing in (one["routing"], other["routing"]):
        for row in (routing, *routing["by_layer"]):
            row.pop("reorder_rate", None)  # of the order inside K
            row.pop("reorder_rate_ci", None)
    assert list(_numbers(one)) == pytest.approx(list(_numbers(other)), rel=1e-9, abs=1e-12)


def test_blocks_do_not_matter() -> None:
    block = make_block(flip_noise=0.3)
    cut = int(np.searchsorted(block.seq_id_T, 7))
    halves = take(block, slice(0, cut)), take(block, slice(cut, None))
    assert list(_numbers(_summary(*halves))) == pytest.approx(list(_numbers(_summary(block))), rel=1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_more_blocks_than_one_are_deterministic(dense: bool) -> None:
    blocks = [make_block(dense=dense, seed=i, first_prompt=12 * i) for i in range(3)]
    assert _summary(*blocks) == _summary(*blocks)
    assert _summary(*blocks)["n_prompts"] == 36


def _all_unscored(block: PairBlock) -> PairBlock:
    return replace(block, logp_train_T=np.full(len(block), np.nan, np.float32))


def _all_equal(block: PairBlock) -> PairBlock:
    half = np.full(len(block), -0.5, np.float32)
    return replace(block, logp_train_T=half, logp_infer_T=half)


def _bare(block: PairBlock) -> PairBlock:
    """Expert ids and nothing else of the routing, as a capture at level ids."""
    names = [f.name for f in fields(block) if f.name.startswith(("gate_weights", "margin", "logit_margin"))]
    return replace(block, **dict.fromkeys(names))


def _unrouted(block: PairBlock) -> PairBlock:
    return replace(block, expert_ids_infer_TLK=np.full_like(block.expert_ids_infer_TLK, -1))


DEGENERATE = {
    "one token": make_block(n_prompts=1, samples=1, length=1),
    "one sequence": make_block(n_prompts=1, samples=1),
    "eight sequences of one token": make_block(n_prompts=8, samples=1, length=1),
    "no rows": take(make_block(), slice(0, 0)),
    "all unscored": _all_unscored(make_block()),
    "one token unscored": _all_unscored(make_block(n_prompts=1, samples=1, length=1)),
    "unrouted": _unrouted(make_block()),
    "K = E": make_block(n_experts=4, top_k=4),
    "K = 1": make_block(top_k=1),
    "one layer": make_block(n_layers=1),
    "one prompt": make_block(n_prompts=1, samples=40),
    "all logps equal": _all_equal(make_block()),
    "all logps equal to 0": replace(
        make_block(), logp_train_T=np.zeros(366, np.float32), logp_infer_T=np.zeros(366, np.float32)
    ),
    "ids only": _bare(make_block()),
    "ids only, unrouted": _unrouted(_bare(make_block())),
    "ids only, K = E = 1": _bare(make_block(n_experts=1, top_k=1)),
    "one arm all NaN margins": replace(make_block(), margin_infer_TL=np.full((366, 3), np.nan, np.float32)),
    "K = E = 1": make_block(n_experts=1, top_k=1),
    "dense, no rows": take(make_block(dense=True), slice(0, 0)),
    "dense, one token": make_block(n_prompts=1, samples=1, length=1, dense=True),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_pairs_give_values_or_null_and_never_a_traceback(name: str) -> None:
    summary = _summary(DEGENERATE[name])
    assert summary["n_tokens"] + summary["n_unscored"] == len(DEGENERATE[name])
    if not summary["n_tokens"]:
        assert not list(_numbers(summary["logp"]))
        assert summary["corrections"]["icepop_0.5_5.0"]["masked_share"] is None
        assert summary["position"]["slope_per_1k_tokens"] is None
    else:
        assert (summary["logp"]["abs_logp_diff"]["mean"] > 0) == ("equal" not in name)
        assert summary["logp"]["abs_logp_diff"]["p999"] is None


def test_unrouted_rows_give_null_rates_not_zero() -> None:
    routing = _summary(DEGENERATE["unrouted"])["routing"]
    assert (routing["flip_rate"], routing["any_layer_share"], routing["n_choices"]) == (None, None, 0)
    assert all(row[name] is None for row in routing["by_layer"] for name in LAYER_KEYS)


def test_every_expert_chosen_never_flips() -> None:
    assert _summary(DEGENERATE["K = E"])["routing"]["flip_rate"] == 0.0


def test_a_pair_without_blocks() -> None:
    nothing = Pair("infer~train", "train", "infer", (1, 2), 8, 2, lambda: iter(()))
    analysis = analyze_pair(nothing)
    assert isinstance(analysis, PairAnalysis)
    assert pair_summary(analysis)["n_tokens"] == 0
    assert len(analysis.agreement_by_layer) == 2


@pytest.mark.parametrize("module", ["moediag.analysis", "moediag.corrections"])
def test_analysis_imports_alone_and_without_torch(module: str) -> None:
    """Bug: analysis imported corrections, which imported analysis, so that one of them had to be first."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
