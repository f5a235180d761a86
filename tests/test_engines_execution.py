"""Awkward ways of running vLLM on the trained demo model: complete, clean, and the plain run's experts.

What each setting is stands in execution_settings.py; reports/execution.md has all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from committed_tables import committed_table
from conftest import ENGINES, keeping, run_here, run_moediag
from execution_measures import COLUMNS, ExecutionMeasures, broken_claims, measure, write_prompts
from execution_settings import SETTINGS

from moediag.cli import jobs
from moediag.engines.arms import Reference, arm_request
from moediag.engines.checkpoint import open_checkpoint
from moediag.run.reader import open_run
from moediag.run.recipes import RECIPES
from moediag.run.writer import RunWriter

pytestmark = pytest.mark.engines

IN_SUITE = tuple(name for name, setting in SETTINGS.items() if setting.in_suite)


@pytest.fixture(scope="module")
def measured(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExecutionMeasures]:
    return measure(demo / "checkpoints" / "moe", tmp_path_factory.mktemp("execution"), IN_SUITE, ENGINES)


@pytest.mark.parametrize("name", IN_SUITE)
def test_a_capture_is_clean_and_has_the_plain_runs_experts(measured: dict[str, ExecutionMeasures], name: str) -> None:
    """Requests were preempted and recomputed; stop tokens ended some early; flips elsewhere are near ties."""
    assert broken_claims(name, measured[name], measured["plain"]) == []


def test_the_committed_table_is_of_every_setting() -> None:
    """What ``make test`` does not capture was captured by the command, in the form of today, and held."""
    table = committed_table("execution.md", "settings")
    assert list(table.columns) == list(COLUMNS)
    assert list(table["setting"]) == [setting.title for setting in SETTINGS.values()]
    assert (table["validate errors"] == "0").all()
    same = [setting.is_same_arithmetic for setting in SETTINGS.values()]
    assert (table.loc[same, ["same tokens", "flips"]] == ["yes", "0"]).all(axis=None)
    assert (table.loc[same, "max abs logp diff [nat]"].astype(float) < 1e-6).all()


def test_the_native_observer_says_why_it_is_not_to_be_had(random_moe: Path, tmp_path: Path) -> None:
    """vLLM's CPU build has no Triton: one line, before the model is loaded."""
    write_prompts(tmp_path)
    done = run_moediag(
        "capture", "infer", random_moe, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "run",
        "--max-tokens", "4", "--observer", "native",
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs vLLM's V2 model runner, which needs Triton" in done.stderr.strip().splitlines()[-1]


def test_the_cpu_build_cannot_run_experts_in_parallel_and_that_is_said(random_moe: Path, tmp_path: Path) -> None:
    """Bug: enable_expert_parallel was refused because "ranks would see different tokens", which they do not; what fails
    is vLLM's CPU kernels, whose workers died of a segmentation fault."""
    write_prompts(tmp_path)
    done = run_here(
        "capture", "infer", random_moe, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "run",
        "--max-tokens", "4", "--tensor-parallel-size", "2", "--vllm-option", "enable_expert_parallel=true",
    )  # fmt: skip
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "take no expert map" in line
    assert line.endswith("leave enable_expert_parallel out, or run on GPUs")


def test_every_arm_scores_the_same_tokens(random_moe: Path, tmp_path: Path) -> None:
    """All arms of one run, given completions scored on the decode path among them; forced decoding is bit-exact."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "the cat", "one two three")))
    run = tmp_path / "run"
    begun = ("--prompts", prompts, "-o", run, "--max-tokens", "16", "--shard-size", "2")
    assert run_here("capture", "infer", random_moe, *begun).returncode == 0
    arms = ("infer-redecode", "infer-repeat", "infer-rescore", "train-repeat", "train")  # a repeat may come first
    opened, engine = open_run(run), {"dtype": "auto"}  # as the commands above
    captured = opened.arm("infer").captured
    assert captured is not None
    options = {"infer": captured.configuration, "train": engine}
    infer = Reference("infer", opened.arm("infer").path)
    requests = [
        arm_request(arm, options[role], given=False, reference=infer if role == "infer" else None)
        for arm in arms
        for role in (RECIPES[arm].role,)
    ]
    checkpoints = dict.fromkeys(("infer", "train"), open_checkpoint(str(random_moe)))
    with keeping():
        jobs.capture(jobs.Arms(RunWriter(opened), requests, checkpoints))
    logps = {arm: response_logps(run, arm) for arm in ("infer", *arms)}
    assert all(np.isfinite(values).all() for values in logps.values())
    for arm in ("infer-redecode", "infer-repeat", "infer-rescore"):
        np.testing.assert_array_equal(logps[arm], logps["infer"])
    assert np.abs(logps["train-repeat"] - logps["train"]).mean() < 0.1
    assert run_here("validate", run).returncode == 0
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(record) + "\n" for record in completions(run)))
    decoded = tmp_path / "decoded"
    done = run_here("capture", "infer", random_moe, "--prompts", given, "-o", decoded, "--scoring", "decode")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(response_logps(decoded, "infer"), logps["infer"])
    assert np.isfinite(response_entropies(decoded)).all()  # the decode path shows whole distributions


def response_logps(path: Path, arm: str) -> np.ndarray:
    run = open_run(path)
    return np.concatenate([run.capture(arm, s).logp_T[run.tokens(s).is_response_T] for s in run.shards])


def response_entropies(path: Path) -> np.ndarray:
    run = open_run(path)
    return np.concatenate([run.capture("infer", s).entropy_T[run.tokens(s).is_response_T] for s in run.shards])


def completions(path: Path) -> list[dict[str, list[int]]]:
    run, records = open_run(path), []
    for tokens in map(run.tokens, run.shards):
        for start, end in tokens.sequence_bounds():
            ids, is_response = tokens.token_id_T[start:end], tokens.is_response_T[start:end]
            records.append(
                {"prompt_token_ids": ids[~is_response].tolist(), "completion_token_ids": ids[is_response].tolist()}
            )
    return records


def test_unobserved_rollouts_decoded_again_show_what_observation_changed(random_moe: Path, tmp_path: Path) -> None:
    """Sampled with the prefix cache on and without taps; the same tokens, decoded again observed, score the same here
    (both eager: the same arithmetic)."""
    prompts = tmp_path / "prompts.jsonl"
    shared = "one prefix that is longer than a block of the cache, " * 2
    prompts.write_text("".join(json.dumps({"prompt": shared + text}) + "\n" for text in ("a", "b", "c", "d")))
    run = tmp_path / "run"
    done = run_here(
        "profile", random_moe, "--prompts", prompts, "-o", run, "--max-tokens", "8", "--no-floors",
        "--production-rollouts", "--vllm-option", "enable_prefix_caching=true", "--vllm-option", "enforce_eager=true",
        "--vllm-option", "block_size=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    opened = open_run(run)
    assert not opened.is_routed("infer-production")
    assert opened.arm("infer").path == "decode"
    np.testing.assert_array_equal(response_logps(run, "infer-production"), response_logps(run, "infer"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["floors"]["forced_settings"]["is_bit_exact"]
    assert summary["main_pair"] == "infer-production~train"
    observed, main = (summary["pairs"][pair] for pair in ("infer~train", "infer-production~train"))
    assert main["routing"] == observed["routing"]
    assert summary["pairs"]["infer-production~infer"]["routing"] is None
    assert "what the settings that capture forces on vLLM changed: nothing" in done.stdout
    assert run_here("validate", run).returncode == 0
