"""Floors: sums for means, the larger side for tails, bit-exact floors without a ratio; and the verdict's words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import arm_of, checkpoint_of, new_run
from synthetic import make_block, make_pair, self_block

from moediag.analysis.floors import (
    FAR,
    OWN_CHANGES,
    Variant,
    floors,
    metric_value,
    replay_words,
    variants,
)
from moediag.diagnosis import Seen, verdict
from moediag.hygiene.findings import finding
from moediag.results.pair_analysis import analyze_pair
from moediag.results.pair_summary import pair_summary
from moediag.run.capture import encode_prompts
from moediag.run.recipes import ENGINE_WORDS, RECIPES, TRANSFORMERS, VLLM, change_of
from moediag.run.records import TokensFrom
from moediag.run.writer import RunWriter

MAIN, TRAIN_FLOOR, INFER_FLOOR = "infer~train", "train-repeat~train", "infer-repeat~infer"
ROUNDED = "train-perturbed~train"
SUMMED = {"abs_logp_diff.mean", "abs_prob_diff.mean", "flip_rate", "any_layer_share", "abs_log_ratio_mean"}
LARGER = {
    "abs_logp_diff.p50", "abs_logp_diff.p90", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k2",
    "kl_infer_train_k3", "extreme_share_2", "prob_mult_error", "masked_share",
}  # fmt: skip


def summary_of(scale: float, noise: float, dense: bool = False) -> dict[str, Any]:
    block = make_block(n_prompts=24, diff_scale=scale, flip_noise=noise, dense=dense)
    return pair_summary(analyze_pair(make_pair(block)))


@pytest.fixture(scope="module")
def pairs() -> dict[str, dict[str, Any]]:
    exact = pair_summary(analyze_pair(make_pair(self_block(make_block(n_prompts=24)))))
    return {MAIN: summary_of(0.05, 0.1), TRAIN_FLOOR: summary_of(0.004, 0.01), INFER_FLOOR: exact,
            "infer-redecode~infer": summary_of(0.001, 0.0), "infer-rescore~infer": summary_of(0.002, 0.001),
            "train-perturbed~train": summary_of(0.03, 0.05)}  # fmt: skip


def test_means_are_summed_and_tails_take_the_larger_side(pairs: dict[str, Any]) -> None:
    found = floors(pairs, MAIN, own_of())
    assert found is not None
    for metric, line in found["metrics"].items():
        parts = [metric_value(pairs[name], metric) for name in (TRAIN_FLOOR, INFER_FLOOR)]
        assert line["rule"] == ("sum" if metric in SUMMED else "larger")
        assert line["floor"] == (sum(parts) if metric in SUMMED else max(parts))
        assert (line["train"], line["infer"], line["note"]) == (*parts, "")
        best = 1.0 if metric == "prob_mult_error" else 0.0
        if line["floor"] != best:
            value = metric_value(pairs[MAIN], metric)
            assert line["ratio"] == pytest.approx((value - best) / (line["floor"] - best))
    assert found["infer"]["arm"] == "infer-repeat"  # other batches say more than the same again
    assert found["infer"]["is_bit_exact"]
    assert not found["train"]["is_bit_exact"]
    assert found["decode_vs_prefill"]["pair"] == "infer-rescore~infer"
    assert [line["arm"] for line in found["noise"]] == ["train-perturbed"]
    assert set(found["metrics"]) == SUMMED | LARGER


def test_a_floor_of_zero_is_bit_exact_and_gives_no_ratio(pairs: dict[str, Any]) -> None:
    exact = {MAIN: pairs[MAIN], TRAIN_FLOOR: pairs[INFER_FLOOR], INFER_FLOOR: pairs[INFER_FLOOR]}
    found = floors(exact, MAIN, own_of())
    assert found is not None
    for line in found["metrics"].values():
        assert line["is_bit_exact"]
        assert line["ratio"] is None
    assert verdict(Seen(pairs[MAIN], found))["word"] == "above repeating"


def test_a_side_that_was_not_measured_makes_no_floor_of_zero(pairs: dict[str, Any]) -> None:
    half = {MAIN: pairs[MAIN], INFER_FLOOR: pairs[INFER_FLOOR]}
    found = floors(half, MAIN, own_of())
    assert found is not None
    line = found["metrics"]["abs_logp_diff.mean"]
    assert line["note"] == "train side not measured"
    assert not line["is_bit_exact"]
    assert verdict(Seen(pairs[MAIN], found))["word"] == "cannot tell"
    assert floors({MAIN: pairs[MAIN]}, MAIN, own_of()) is None
    assert "neither floor nor rounding scale" in verdict(Seen(pairs[MAIN]))["reason"]


def test_prefilling_again_is_the_floor_of_a_prefilled_arm(pairs: dict[str, Any]) -> None:
    given = {name: pairs[name] for name in (MAIN, TRAIN_FLOOR, "infer-rescore~infer")}
    found = floors(given, MAIN, own_of(is_prefilled=True))
    assert found is not None
    assert found["infer"]["arm"] == "infer-rescore"
    assert found["decode_vs_prefill"] is None


def test_the_verdict_says_what_the_intervals_can_tell(pairs: dict[str, Any]) -> None:
    """A mismatch smaller than the rounding scale was headed "above floor", as if something were wrong."""
    main, small = pairs[MAIN], pairs[TRAIN_FLOOR]
    unscaled = {name: pair for name, pair in pairs.items() if name != ROUNDED}
    assert word_of({**pairs, MAIN: summary_of(0.12, 0.1)}) == "above rounding"  # 0.12 against 0.03
    assert word_of({**pairs, ROUNDED: main}) == "no larger than rounding"
    assert word_of(pairs) == "no larger than rounding", "two engines round in more places than the scale has"
    assert word_of(unscaled) == "above repeating"
    assert word_of({**unscaled, MAIN: small, TRAIN_FLOOR: main}) == "no larger than repeating"
    found = floors(unscaled, MAIN, own_of())
    errors = [finding("D01-token-lag", "infer~train", "one"), finding("D05-stale-rows", "infer", "two")]
    of_faults = verdict(Seen(main, found, findings=errors))
    assert (of_faults["word"], of_faults["tone"]) == ("capture or pipeline fault", "bad")
    assert "2 errors in the capture, first: error: D01-token-lag: infer~train: one" in of_faults["reason"]
    inside = replace_floor(found, main["logp"]["abs_logp_diff"]["mean"])
    assert "contains the floor" in verdict(Seen(main, inside))["reason"]
    few = pair_summary(analyze_pair(make_pair(make_block(n_prompts=4, diff_scale=0.05))))
    assert "too few prompts" in verdict(Seen(few, found))["reason"]


def test_an_engine_that_does_not_repeat_itself_is_the_finding(pairs: dict[str, Any]) -> None:
    """vLLM differed from itself by .124 nat and the verdict read "1.26 times its floor"."""
    noisy = {**pairs, MAIN: summary_of(0.16, 0.3), INFER_FLOOR: summary_of(0.12, 0.3)}
    words = verdict(Seen(noisy[MAIN], floors(noisy, MAIN, own_of())))
    assert words["word"] == "does not repeat itself"
    assert words["reason"].startswith("vLLM scores the same tokens")
    calm = {**noisy, ROUNDED: summary_of(0.12 / FAR * 1.2, 0.05)}
    assert word_of(calm) != "does not repeat itself", "within the stated factor of the rounding scale"


def test_no_multiple_is_shown_of_a_floor_that_is_mostly_zeros(pairs: dict[str, Any]) -> None:
    """The demo read "93.2 times its floor": the floor was exactly 0 on 98.5 % of tokens."""
    block = make_block(n_prompts=24, diff_scale=0.004)
    is_exact_T = np.arange(len(block)) % 50 > 0
    mostly = replace(block, logp_train_T=np.where(is_exact_T, block.logp_infer_T, block.logp_train_T))
    floored = {**pairs, TRAIN_FLOOR: pair_summary(analyze_pair(make_pair(mostly)))}
    found = floors(floored, MAIN, own_of())
    assert found is not None
    assert found["train"]["bit_exact_share"] == pytest.approx(0.98, abs=0.005)
    line = found["metrics"]["abs_logp_diff.mean"]
    assert line["floor"] > 0
    assert line["ratio"] is None
    evidence = " | ".join(verdict(Seen(pairs[MAIN], found))["evidence"])
    assert "bit-exact on 97.9 % of tokens, so no multiple of it is shown" in evidence
    assert "times the sum" not in evidence
    assert "rounding scale: one unit in the last place on router inputs makes mean abs logp diff" in evidence
    low, high = line["floor_ci"]
    assert low < line["floor"] < high


def test_replay_of_some_layers_gives_no_verdict_on_routing(pairs: dict[str, Any]) -> None:
    """Forcing layers 0 to 2 of 6 printed "at most this much is routing" and "not routing"."""
    removed = {name: {"share": share, "share_ci": None, "note": ""}
               for name, share in (("abs_logp_diff.mean", 0.1867), ("abs_logp_diff.p99", 0.3))}  # fmt: skip
    words = " ".join(replay_words({"layers": [0, 2], "removed": removed, "is_broken": False}))
    assert words == (
        "forcing infer's experts on train in MoE layers 0 to 2 only removes 18.7 % of the mean abs logp diff, "
        "30 % of its p99"
    )
    worse = {"abs_logp_diff.mean": {"share": -4.92e5, "share_ci": None, "note": ""}}
    broken = " ".join(replay_words({"layers": None, "removed": worse, "is_broken": True}))
    assert "the replay is broken" in broken
    assert "4.92e+05 times as large" in broken


def word_of(pairs: dict[str, Any]) -> str:
    return str(verdict(Seen(pairs[MAIN], floors(pairs, MAIN, own_of())))["word"])


def replace_floor(found: Any, floor: float) -> Any:
    metrics = {**found["metrics"], "abs_logp_diff.mean": {**found["metrics"]["abs_logp_diff.mean"], "floor": floor}}
    return {**found, "metrics": metrics}


def test_dense_and_empty_pairs_have_floors_without_flips() -> None:
    dense = summary_of(0.05, 0.0, dense=True)
    found = floors({MAIN: dense, TRAIN_FLOOR: dense, INFER_FLOOR: dense}, MAIN, own_of())
    assert found is not None
    assert found["metrics"]["flip_rate"]["floor"] is None
    block = make_block(n_prompts=2)
    unscored = replace(block, logp_train_T=block.logp_train_T * float("nan"))
    empty = pair_summary(analyze_pair(make_pair(unscored)))
    assert floors({MAIN: empty, TRAIN_FLOOR: empty}, MAIN, own_of()) is None
    assert verdict(Seen(empty))["reason"] == "no token was scored by both engines"


@given(st.sets(st.sampled_from(["infer", "train", "train-repeat", "infer-repeat", "train-fp32", "train-replay"])))
def test_every_further_arm_is_paired_with_its_own_engine(
    tmp_path_factory: pytest.TempPathFactory, arms: set[str]
) -> None:
    run = new_run(tmp_path_factory.mktemp("arms") / "run", encode_prompts([[1]], None), 1, 1, checkpoint_of((0,)))
    for arm in arms:
        RunWriter(run).begin_arm(arm_of(run, arm))
    found = {variant.arm: variant.of for variant in variants(run, sorted(arms))}
    wanted = {arm: arm.split("-")[0] for arm in arms - {"infer", "train", "train-replay"}}
    # another routing is not the engine against itself, and a variant of an arm that is not there is one of nothing
    assert found == {arm: of for arm, of in wanted.items() if of in arms}


def test_a_repetition_of_another_engine_is_no_floor_of_the_main_pair(tmp_path: Path, pairs: dict[str, Any]) -> None:
    """vLLM joined to a run that generate had sampled, and vLLM's repetition gave the floor of generate's side."""
    run = new_run(
        tmp_path / "run", encode_prompts([[1]], None), 1, 1, checkpoint_of((0,)),
        tokens=TokensFrom(origin="sampled", arm="infer-generate"),
    )  # fmt: skip
    for arm, changes in {
        "infer-generate": {"engine": TRANSFORMERS},
        "train": {"engine": TRANSFORMERS},
        "train-repeat": {"engine": TRANSFORMERS},
        "infer": {"engine": VLLM, "variant_of": "infer-generate", "change": "engine"},
        "infer-repeat": {"engine": VLLM},
    }.items():
        RunWriter(run).begin_arm(arm_of(run, arm, **changes))
    own = variants(run, run.arms())
    assert {variant.arm: variant.is_beside_main for variant in own} == {
        "infer": False, "infer-repeat": False, "train-repeat": True,
    }  # fmt: skip
    found = floors({**pairs, "infer-generate~train": pairs[MAIN]}, "infer-generate~train", own)
    assert found is not None
    assert found["train"]["arm"] == "train-repeat"
    assert found["infer"] is None
    assert {line["note"] for line in found["metrics"].values()} == {"infer side not measured"}


def own_of(is_prefilled: bool = False) -> list[Variant]:
    """The arms of ``pairs`` beside the arm that they repeat or change."""
    found = []
    for arm, made in RECIPES.items():
        change = change_of(arm, made.path or "", "prefill" if is_prefilled else "sampled")
        if change in OWN_CHANGES:
            found.append(Variant(arm, made.role, made.role, str(change), ENGINE_WORDS[made.engine], made.words))
    return found
