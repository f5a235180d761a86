"""`moediag demo` keeps its contract, and the pair it trains shows the published phenomenon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import N_PROMPTS, run_here
from test_report_html import ISSUE_LIMIT, open_lines

from moediag.frames import declared_frames
from moediag.results import load_frames
from moediag.run.reader import open_run
from moediag.run.writer import RunWriter

pytestmark = pytest.mark.engines

DRAWN = ("figure1", "agreement_by_depth", "margins", "position_drift")


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_it_leaves_what_it_promises_and_ends_with_where_the_report_is(demo: Path) -> None:
    for name in ("moe", "dense"):
        assert (demo / "checkpoints" / name / "model.safetensors").exists()
        assert (demo / name / "summary.json").exists()
        assert (demo / name / "report.md").exists()
    for figure in DRAWN:
        for suffix in ("png", "svg"):
            assert (demo / "compare" / "figures" / f"{figure}.{suffix}").stat().st_size > 5000
            assert (demo / "moe" / "figures" / f"{figure}.{suffix}").exists()
    assert (demo / "stdout.txt").read_text().strip().splitlines()[-1].endswith("compare/report.md")


def test_the_summary_holds_the_contract(demo: Path) -> None:
    for name in ("moe", "dense"):
        summary = summary_of(demo / name)
        assert summary["schema_version"] == 2
        assert summary["model"]["architecture"]
        pair = summary["pairs"]["infer~train"]
        logp = pair["logp"]
        assert pair["n_sequences"] == N_PROMPTS
        assert pair["n_tokens"] > 160 * N_PROMPTS
        assert {"mean", "p50", "p90", "p99", "p999", "max"} <= logp["abs_logp_diff"].keys()
        assert {"mean", "max"} <= logp["abs_prob_diff"].keys()
        for key in ("kl_infer_train_k1", "kl_infer_train_k2", "kl_infer_train_k3", "mean_ratio", "extreme_share_2"):
            low, high = logp[f"{key}_ci"]
            assert low <= logp[key] <= high
        assert (pair["routing"] is None) == (name == "dense")
    layers = summary_of(demo / "moe")["pairs"]["infer~train"]["routing"]["by_layer"]
    assert [layer["layer"] for layer in layers] == list(range(6))
    for layer in layers:
        assert {"decoder_layer", "same_set_rate", "cumulative_same_set_rate", "overlap"} <= layer.keys()


def test_the_trained_pair_shows_the_phenomenon(demo: Path) -> None:
    """MoE differs more than dense, most of all in the tail; agreement falls with depth; flips sit at near ties.

    Ratios are bounded well below what was measured (README; of the quick demo 1.5, 2.5 and 4.2), so that other
    machines' rounding passes too.
    """
    moe, dense = (summary_of(demo / name)["pairs"]["infer~train"] for name in ("moe", "dense"))
    for metric, ratio in (("mean", 1.3), ("p99", 1.3)):
        assert moe["logp"]["abs_logp_diff"][metric] > ratio * dense["logp"]["abs_logp_diff"][metric]
    assert moe["logp"]["kl_infer_train_k3"] > 2 * dense["logp"]["kl_infer_train_k3"]
    assert moe["logp"]["kl_infer_train_k3_ci"][0] > dense["logp"]["kl_infer_train_k3_ci"][1]
    layers = moe["routing"]["by_layer"]
    assert layers[0]["same_set_rate_ci"][0] > layers[-1]["same_set_rate_ci"][1]
    cumulative = [layer["cumulative_same_set_rate"] for layer in layers]
    assert cumulative == sorted(cumulative, reverse=True)
    assert moe["margins"]["median_logit_margin_flipped"] < 0.1 * moe["margins"]["median_logit_margin_all"]


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_the_engines_compute_the_same_function_and_it_is_said_first(demo: Path, name: str) -> None:
    """Of a perfectly healthy pair the first screen said "above floor"."""
    summary, ladder = summary_of(demo / name), load_frames(open_run(demo / name))["ladder"]
    assert summary["verdict"]["word"] == "same function, rounding only"
    function = summary["function"]
    assert function["n_agreeing"] == function["n_sequences"] > 16
    assert 0.2 < function["times"] < 5
    assert function["mean"] < 1e-4 * summary["pairs"]["infer~train"]["logp"]["abs_logp_diff"]["mean"]
    assert 0.7 < summary["distances"]["ratio"]["value"] < 1.4
    found = dict(zip(ladder["compared"], ladder["finding"], strict=True))
    assert found["both engines in float32"] == "same"
    assert found["infer decoding, against train"] == "within rounding"
    printed = (demo / "stdout.txt").read_text()
    assert f"{name}: same function, rounding only" in printed
    assert (
        (demo / name / "report.md").read_text().splitlines()[2].startswith("**Verdict: same function, rounding only**")
    )


def test_prompt_and_response_stay_inside_the_training_window(demo: Path) -> None:
    """Beyond the window the mismatch jumps: an artefact of the tiny model, not the drift of the source."""
    from moediag.demo.train import MOE

    run = open_run(demo / "moe")
    assert max(int(run.tokens(shard).position_T.max()) for shard in run.shards) < MOE.window


def test_honest_sampling_has_a_mean_ratio_of_one(demo: Path) -> None:
    """exp(logp_diff) is 1 in expectation for tokens sampled at temperature 1: the cheapest check of semantics."""
    for name in ("moe", "dense"):
        logp = summary_of(demo / name)["pairs"]["infer~train"]["logp"]
        low, high = logp["mean_ratio_ci"]
        assert low - (high - low) < 1 < high + (high - low)


def test_every_frame_on_disk_matches_its_declaration(demo: Path) -> None:
    """Simulations, audits and trends keep theirs in folders of their own; every other declared frame is there."""
    elsewhere = {"correction_statistics", "masked_by_stratum", "overlap", "recommended_band",
                 "sweep_by_band", "ratio_counts", "masked_entropy", "gradient_audit", "gradient_references",
                 "trend_by_step", "module_checks"}  # fmt: skip
    frames = load_frames(open_run(demo / "moe"))
    assert frames.keys() == {spec.name for spec in declared_frames()} - elsewhere


def test_analyze_prints_the_same_numbers_and_a_report_is_made_again_to_the_byte(demo: Path) -> None:
    moe = demo / "moe"
    before = {path: path.read_bytes() for path in [moe / "report.md", *moe.glob("figures/*")]}
    done = run_here("analyze", moe, "--json")
    assert json.loads(done.stdout) == summary_of(moe)
    assert run_here("report", moe, "--training-window", 512).returncode == 0
    assert {path: path.read_bytes() for path in before} == before


def test_compare_refuses_a_run_that_changed_after_its_analysis(demo: Path, tmp_path: Path) -> None:
    import shutil

    stale = Path(shutil.copytree(demo / "dense", tmp_path / "dense"))
    run = open_run(stale)
    shard = run.shards[0]
    capture = run.capture("train", shard)
    writer = RunWriter(run)
    writer.write_capture("train", shard, run.tokens(shard), capture, {"seconds": 0.0}, {})
    moved = type(capture)(**{**capture.arrays(), "logp_T": capture.logp_T - 1})
    writer.write_capture("train", shard, run.tokens(shard), moved, {}, {})
    done = run_here("compare", demo / "moe", stale, "-o", tmp_path / "compare")
    assert done.returncode == 1
    assert "have changed since the analysis" in done.stderr
    assert not (tmp_path / "compare").exists()


def test_given_completions_are_scored_by_both_engines_and_nothing_is_sampled(demo: Path, tmp_path: Path) -> None:
    """The demo's own responses given back as completions: vLLM's prefill must score them as its decode did."""
    source = open_run(demo / "moe")
    shard = source.shards[0]
    tokens = source.tokens(shard)
    records = []
    for start, end in tokens.sequence_bounds()[:6]:
        ids, is_response = tokens.token_id_T[start:end], tokens.is_response_T[start:end]
        records.append({
            "prompt_token_ids": ids[~is_response].tolist(),
            "completion_token_ids": ids[is_response].tolist(),
        })  # fmt: skip
    prompts = tmp_path / "given.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run_here("profile", demo / "checkpoints" / "moe", "--prompts", prompts, "-o", tmp_path / "run",
                       "--no-floors", "--dtype", "bfloat16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "run")
    given = run.tokens(run.shards[0])
    assert given.token_id_T.tolist() == tokens.token_id_T[: len(given)].tolist()
    for arm in ("infer", "train"):
        found, sampled = run.capture(arm, run.shards[0]), source.capture(arm, shard)
        is_response = given.is_response_T
        assert (found.logp_T[is_response] == sampled.logp_T[: len(given)][is_response]).all()
    assert summary_of(tmp_path / "run")["sampling"]["given_completions"] is True


def test_every_markdown_page_is_short_and_the_simulation_says_what_to_paste(demo: Path) -> None:
    (simulated,) = (demo / "moe" / "simulate").iterdir()
    for folder in (demo / "moe", demo / "dense", demo / "compare", simulated):
        text = (folder / "report.md").read_text()
        assert open_lines(text) < 60, folder.name
        assert len(text) < ISSUE_LIMIT
    band = pd.read_parquet(simulated / "recommended_band.parquet").iloc[0]
    for page in ("report.md", "report.html"):
        text = (simulated / page).read_text().replace("\\[", "[")
        is_there = not pd.isna(band["alpha"])  # the quick demo's few tokens cannot tell
        words = f"Band to start from: [{band['alpha']:g}, {band['beta']:g}" if is_there else "No band is recommended"
        assert words in text
        for option in ("rollout_is_threshold", "icepop_function", "vllm_importance_sampling_clip_min",
                       "is_correction_type icepop", "rejection_sampling:", "icepop_loss.icepop"):  # fmt: skip
            assert option in text or not is_there, (page, option)
