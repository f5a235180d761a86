"""One pass, in parts: what is merged equals the whole, what an arm lacks leaves out itself only, nothing else grows."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from synthetic import make_block, make_pair, self_block, swapped, take

from moediag.analysis.expert_sets import any_in_row, compare_block, compare_experts
from moediag.analysis.flip_maps import FlipMap, SwapTotals, expert_swaps, flips_by_layer_position
from moediag.analysis.measures import abs_diff, k3_other
from moediag.analysis.tokens import BYTES_PER_TOKEN, TokenParts, Tokens, beside, token_frame, whole_prompts
from moediag.frames import declared_frames
from moediag.results.pair_analysis import RoutingPass, analyze_pair, analyze_tokens, read_pair
from moediag.results.pair_summary import pair_summary
from moediag.run.align import PairBlock
from moediag.statistics import quantiles
from moediag.statistics.quantiles import Values

pytestmark = pytest.mark.filterwarnings("error")

WEIGHTS = ("gate_weights_train_TLK", "gate_weights_infer_TLK")
MARGINS = tuple(f"{kind}_{side}_TL" for kind in ("margin", "logit_margin") for side in ("train", "infer"))
IDS = ("expert_ids_train_TLK", "expert_ids_infer_TLK")


def _without(block: PairBlock, *names: str) -> PairBlock:
    return replace(block, **dict.fromkeys(names))


def _passed(*blocks: PairBlock) -> RoutingPass:
    return read_pair(make_pair(*blocks))[1]


def _flips(block: PairBlock) -> list[tuple[int, int, set[int], set[int]]]:
    """(token, layer, only in train, only in infer) by plain loops."""
    found = []
    for t, (x, y) in enumerate(
        zip(block.expert_ids_train_TLK.tolist(), block.expert_ids_infer_TLK.tolist(), strict=True)
    ):
        for layer, (a, b) in enumerate(zip(x, y, strict=True)):
            if min(a + b) >= 0 and set(a) != set(b):
                found.append((t, layer, set(a) - set(b), set(b) - set(a)))
    return found


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 400), max_size=5), st.sampled_from([0, 40]))
def test_tokens_read_part_by_part_give_what_they_give_at_once(seed: int, cuts: list[int], gathered: int) -> None:
    """Cut anywhere, also inside prompts; with order statistics found by counting bits, or gathered."""
    rng = np.random.default_rng(seed)
    block = make_block(n_prompts=12, seed=seed, flip_noise=0.4, diff_scale=0.3)
    pair = make_pair(replace(block, logp_infer_T=np.where(rng.random(len(block)) < 0.1, np.nan, block.logp_infer_T)))
    frame, routing = read_pair(pair)
    bounds = [0, *sorted(min(cut, len(frame)) for cut in cuts), len(frame)]
    parts = TokenParts(lambda: whole_prompts(frame.iloc[low:high] for low, high in pairwise(bounds)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiles, "GATHERED", gathered)
        found = analyze_tokens(pair, parts, routing)
    expected = analyze_pair(pair)
    frames = expected.frames()
    assert {*found.frames()} == {*frames} - {"tokens"}
    for name, each in found.frames().items():
        pd.testing.assert_frame_equal(each, frames[name], rtol=1e-12, atol=1e-15, obj=name)
    assert pair_summary(found).keys() == pair_summary(expected).keys()
    for name in ("n_sequences", "n_prompts", "n_tokens", "n_unscored", "n_impossible"):
        assert getattr(found, name) == getattr(expected, name)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 60), elements=st.one_of(st.sampled_from([0.0, -0.0, 1.0]), st.floats(-9, 9))),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.integers(0, 10_000),
    st.sampled_from([0, 3, 1000]),
)
def test_order_statistics_of_parts_are_numpys(values: NDArray, qs: list[float], seed: int, gathered: int) -> None:
    rng = np.random.default_rng(seed)
    group_T = rng.integers(-1, 3, len(values))
    cuts = [0, *sorted(rng.integers(0, len(values) + 1, 3)), len(values)]
    parts = [Values(values[a:b], group_T[a:b], np.zeros(b - a, int), 1) for a, b in pairwise(cuts)]
    n_G = np.bincount(group_T + 1, minlength=4)[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiles, "GATHERED", gathered)
        found = quantiles.quantiles_of_groups(lambda: iter(parts), n_G, np.repeat(np.c_[qs], 3, axis=1))
    for g in range(3):
        some = values[group_T == g]
        expected = np.quantile(some, qs) if len(some) else np.full(len(qs), np.nan)
        np.testing.assert_array_equal(found[:, g], expected)


def test_pairs_are_laid_side_by_side_part_by_part() -> None:
    """Also where a part has no scored token, and where the two pairs were read in other parts.

    Bug: a part without a scored token used up all that the other pair had.
    """
    frame = token_frame(make_pair(make_block(n_prompts=12, seed=3, diff_scale=0.3)))
    other = frame.assign(logp_train=frame["logp_infer"])
    frame.loc[frame["prompt_id"].isin([4, 5]), "logp_train"] = np.nan
    other.loc[other["prompt_id"].isin([0, 1, 7]), "logp_train"] = np.nan

    def cut(rows: pd.DataFrame, *prompts: int) -> TokenParts:
        at = [0, *np.searchsorted(rows["prompt_id"], prompts).tolist(), len(rows)]
        return TokenParts(lambda: (rows.iloc[low:high] for low, high in pairwise(at)))

    whole = beside(Tokens(frame), Tokens(other))
    assert 0 < len(whole) < len(Tokens(frame))
    for ours, theirs in (((4, 6), (2, 7, 8)), ((2, 4, 6, 9), ()), ((), (1, 6)), ((1, 2, 3), (1, 2, 3))):
        found = beside(cut(frame, *ours), cut(other, *theirs))
        np.testing.assert_array_equal(found.sums(abs_diff, k3_other), whole.sums(abs_diff, k3_other))
        assert found.quantile(abs_diff, 0.9) == whole.quantile(abs_diff, 0.9)


def test_a_token_keeps_at_most_64_bytes() -> None:
    frame = token_frame(make_pair(make_block()))
    assert frame.memory_usage(index=False).sum() == BYTES_PER_TOKEN * len(frame)
    assert BYTES_PER_TOKEN <= 64


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_merged_passes_equal_the_whole(seed: int, top_k: int, has_holes: bool) -> None:
    block = make_block(n_prompts=9, seed=seed, top_k=top_k, flip_noise=0.4)
    if has_holes:
        rng = np.random.default_rng(seed)
        block.expert_ids_infer_TLK[rng.random(block.expert_ids_infer_TLK.shape[:2]) < 0.1] = -1
        block.margin_infer_TL[rng.random(block.margin_infer_TL.shape) < 0.1] = np.nan
    cuts = np.searchsorted(block.seq_id_T, [0, 5, 6, 18])
    parts = [take(block, slice(low, high)) for low, high in pairwise(cuts.tolist())]
    whole = _passed(block)
    for merged in (RoutingPass.merge(_passed(part) for part in parts[::-1]), _passed(*parts)):
        for field in fields(whole.totals):
            found, wanted = getattr(merged.totals, field.name), getattr(whole.totals, field.name)
            if field.name in ("mass_CL", "jaccard_CL"):
                np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
            else:
                np.testing.assert_array_equal(found, wanted, err_msg=field.name)
        for space, totals in whole.margins.items():
            for name, value in vars(totals).items():
                np.testing.assert_array_equal(getattr(merged.margins[space], name), value)
        for name in ("flips", "swaps"):
            for field, value in vars(getattr(whole, name)).items():
                np.testing.assert_array_equal(getattr(getattr(merged, name), field), value)


def test_many_shards_are_merged_on_the_way() -> None:
    blocks = [make_block(n_prompts=1, first_prompt=i, seed=i) for i in range(70)]
    routing = _passed(*blocks)
    assert len(routing.parts) < 10
    assert len(routing.totals.prompt_id_C) == 70


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 3), (2, 8), (3, 9), (6, 12), (8, 128), (8, 300), (5, 5)]))
def test_comparison_equals_python_sets_duplicates_included(seed: int, shape: tuple[int, int]) -> None:
    """Ids with duplicates (a defect, rule D03) are compared as sets; swaps of neighbours take the short way."""
    top_k, n_experts = shape
    rng = np.random.default_rng(seed)
    a = np.argsort(rng.random((40, 3, n_experts)), axis=2)[:, :, :top_k].astype(np.int16)
    b = a.copy()
    b[:10] = b[:10, :, ::-1]
    if top_k > 1:
        b[10:20, :, [0, 1]] = b[10:20, :, [1, 0]]
        b[20:25, :, 0] = b[20:25, :, 1]  # a duplicate on one side
        a[23:26, :, 0] = a[23:26, :, 1]
    b[30:] = rng.integers(0, n_experts, b[30:].shape)
    seen = compare_experts(a, b)
    for t in range(40):
        for layer in range(3):
            x, y = a[t, layer].tolist(), b[t, layer].tolist()
            assert seen.is_same_TL[t, layer] == (set(x) == set(y)), (x, y)
            assert seen.is_reorder_TL[t, layer] == (set(x) == set(y) and x != y)
    flips = [(t, m, [i not in set(b[t, m].tolist()) for i in a[t, m].tolist()]) for t, m, _, _ in _flips_of(a, b)]
    np.testing.assert_array_equal(seen.flip_N, [t * 3 + m for t, m, _ in flips])
    np.testing.assert_array_equal(seen.only_train_NK, np.array([f[2] for f in flips], bool).reshape(-1, top_k))
    np.testing.assert_array_equal(seen.n_only_train_N, seen.only_train_NK.sum(axis=1))
    np.testing.assert_array_equal(seen.n_only_infer_N, seen.only_infer_NK.sum(axis=1))


def _flips_of(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int, set[int], set[int]]]:
    return _flips(replace(make_block(dense=True), expert_ids_train_TLK=a, expert_ids_infer_TLK=b))


def test_the_heaviest_expert_does_not_hang_on_the_order_of_the_list() -> None:
    """vLLM's CPU router lists experts in another order than torch: the first ids agreed for 0.5 % of the choices."""
    block = make_block(top_k=3, flip_noise=0.3)
    top = []
    for side in ("train", "infer"):
        ids, weights = (getattr(block, f"{name}_{side}_TLK").reshape(-1, 3) for name in ("expert_ids", "gate_weights"))
        top.append([row[weight.argmax()] for row, weight in zip(ids, weights, strict=True)])
    order = np.random.default_rng(0).permuted(np.tile(np.arange(3), (*block.margin_infer_TL.shape, 1)), axis=2)
    names = ("expert_ids_infer_TLK", "gate_weights_infer_TLK")
    shuffled = replace(block, **{name: np.take_along_axis(getattr(block, name), order, axis=2) for name in names})
    for one in (block, shuffled):
        rates = analyze_pair(make_pair(one)).routing_rates
        assert rates.top1_rate.value == pytest.approx(np.mean(np.equal(*top)))
    assert np.isnan(analyze_pair(make_pair(_without(block, WEIGHTS[1]))).routing_rates.top1_rate.value)


@pytest.mark.parametrize("n_columns", [1, 2, 3, 6, 8, 12, 16])
def test_any_in_row_equals_numpy(n_columns: int) -> None:
    mask = np.random.default_rng(n_columns).random((50, n_columns)) < 0.1
    np.testing.assert_array_equal(any_in_row(mask), mask.any(axis=1))


def test_ids_alone_are_enough_for_agreement() -> None:
    """Captures at level ids, and a native vLLM observer, give expert ids and nothing else."""
    block = make_block(n_prompts=20, flip_noise=0.3)
    full, bare = (analyze_pair(make_pair(one)) for one in (block, _without(block, *WEIGHTS, *MARGINS)))
    assert repr(bare.routing_rates.flip_rate) == repr(full.routing_rates.flip_rate)  # NaN is not itself
    assert bare.routing_rates.misrouted_mass.note == "no data"
    assert np.isnan(bare.routing_rates.misrouted_mass.value)
    assert bare.frames()["tokens"]["misrouted_mass"].isna().all()
    assert (bare.margin_curve, bare.margin_quantiles, bare.margin_noise) == (None, None, None)
    assert bare.expert_swaps.equals(full.expert_swaps)
    assert "misrouted_mass" not in set(bare.flip_excess["grouping"])
    assert "misrouted_mass" in set(full.flip_excess["grouping"])


def test_margins_of_the_train_side_stand_in_and_say_so() -> None:
    block = make_block(flip_noise=0.3)
    one_sided = _without(block, "margin_infer_TL", "logit_margin_infer_TL", "gate_weights_infer_TLK")
    found, swap = analyze_pair(make_pair(one_sided)), analyze_pair(make_pair(swapped(block)))
    assert set(found.margin_curve["side"]) == {"train"}
    assert found.margin_curve["n_choices"].equals(swap.margin_curve["n_choices"])
    assert found.margin_quantiles["p50"].equals(swap.margin_quantiles["p50"])
    assert found.routing_rates.misrouted_mass.value > 0


def test_one_score_space_alone_has_its_rows_alone() -> None:
    frame = analyze_pair(make_pair(_without(make_block(), "margin_infer_TL", "margin_train_TL"))).margin_quantiles
    assert set(frame["space"]) == {"logit"}


@pytest.mark.parametrize("absent", [IDS, IDS[:1], IDS[1:]])
def test_a_routed_model_without_ids_has_rates_of_nothing(absent: tuple[str, ...]) -> None:
    pair = make_pair(make_block())
    block = _without(make_block(), *absent)
    analysis = analyze_pair(replace(pair, read_blocks=lambda: iter([block])))
    assert np.isnan(analysis.routing_rates.flip_rate.value)
    assert (analysis.routing_rates.n_choices, len(analysis.agreement_by_layer)) == (0, 3)
    assert (analysis.agreement_by_layer["n_tokens"] == 0).all()
    assert analysis.margin_curve is None
    assert analysis.logp_metrics["n_tokens"].iloc[0] == len(block)
    declared = {spec.name: spec for spec in declared_frames()}
    for name, frame in analysis.frames().items():
        pd.testing.assert_frame_equal(declared[name].validate(frame), frame)


def test_heat_map_equals_a_plain_loop() -> None:
    block = make_block(length=40, flip_noise=0.4)
    block.expert_ids_infer_TLK[7, 1] = -1
    frame = flips_by_layer_position(_passed(block).flips, (1, 2, 3))
    flips = _flips(block)
    for _, row in frame.iterrows():
        at = [t for t, p in enumerate(block.position_T) if row["position_low"] <= p <= row["position_high"]]
        compared = [t for t in at if not (t == 7 and row["layer"] == 1)]
        assert row["n_choices"] == len(compared)
        assert row["n_flipped"] == sum(t in set(at) and layer == row["layer"] for t, layer, _, _ in flips)
    assert frame["n_flipped"].sum() == len(flips)


def test_heat_map_widens_with_the_longest_response() -> None:
    short, long = make_block(length=20), make_block(n_prompts=1, samples=1, length=3000, n_layers=3)
    merged = FlipMap.merge([FlipMap.of_block(block, compare_block(block)) for block in (short, long)])
    assert (merged.width, len(merged.n_BL) <= 1024) == (4, True)
    assert merged.n_BL.sum() == 3 * (len(short) + len(long))
    assert len(flips_by_layer_position(merged, (1, 2, 3))["position_low"].unique()) <= 16


def test_swaps_equal_a_plain_loop_and_reverse_with_the_sides() -> None:
    block = make_block(n_prompts=30, top_k=3, flip_noise=0.4)
    frame = expert_swaps(_passed(block).swaps, (1, 2, 3))
    flips = _flips(block)
    singles = [(layer, min(a), min(b)) for _, layer, a, b in flips if len(a) == 1]
    counts = {key: singles.count(key) for key in set(singles)}
    found = {(r["layer"], r["expert_train"], r["expert_infer"]): r["n_swaps"] for _, r in frame.iterrows()}
    assert found == counts
    assert frame["n_swaps"].is_monotonic_decreasing
    for _, row in frame.iterrows():
        assert row["n_reverse"] == counts.get((row["layer"], row["expert_infer"], row["expert_train"]), 0)
        assert row["n_flips"] == sum(layer == row["layer"] for _, layer, _, _ in flips)
    other = expert_swaps(_passed(swapped(block)).swaps, (1, 2, 3))
    assert {(r["layer"], r["expert_infer"], r["expert_train"]): r["n_swaps"] for _, r in other.iterrows()} == counts
    assert len(expert_swaps(_passed(block).swaps, (1, 2, 3), top=4)) == 4
    assert expert_swaps(SwapTotals.empty(3, 8), (1, 2, 3)).empty


def test_an_arm_against_itself_never_swaps() -> None:
    routing = _passed(self_block(make_block()))
    assert routing.flips.flips_BL.sum() == 0
    assert routing.swaps.n_swaps_LEE.sum() == 0
    rates = analyze_pair(make_pair(self_block(make_block()))).routing_rates
    assert (rates.overlap.value, rates.jaccard.value, rates.top1_rate.value) == (1.0, 1.0, 1.0)
