"""Whose a difference of functions is: a third implementation names the engine that is off, and only that."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENGINES, run_here, write_jsonl

from moediag.cli.jobs import requests_of
from moediag.engines.arms import arm_request
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import fill_arm
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.faults import FAULTS, planted_checkpoint
from moediag.results import analyze_run
from moediag.run.reader import Run, open_run
from moediag.run.recipes import RECIPES, VLLM
from moediag.run.writer import RunWriter
from moediag.selftest.families import make_checkpoint

PUBLISHER = Path(__file__).parent / "publisher" / "modeling_plain_moe.py"
ARMS = ("infer", "train", "infer-fp32", "train-fp32", "train-fp32-perturbed")
N_SEQUENCES = 6


def published(checkpoint: Path, folder: Path, code: str = "") -> Path:
    """A copy of the checkpoint as a publisher ships it: with modelling code of its own, named in config.json."""
    shutil.copytree(checkpoint, folder)
    (folder / PUBLISHER.name).write_text(code or PUBLISHER.read_text())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{PUBLISHER.stem}.PlainMoEForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def captured(family: str, folder: Path) -> tuple[Run, Checkpoint]:
    """Both engines on given tokens, in bfloat16 and in float32."""
    checkpoint = open_checkpoint(str(make_checkpoint(family, folder / "clean")))
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randint(0, 256, (60,), generator=generator).tolist() for _ in range(N_SEQUENCES)]
    prompts = write_jsonl(
        folder / "p.jsonl", [{"prompt_token_ids": ids[:20], "completion_token_ids": ids[20:]} for ids in draws]
    )
    plan = make_plan(checkpoint, prompts, SamplingOptions())
    run = plan.create(folder / "run", force=False)

    def request(name: str, given: bool, **more: object) -> object:
        own = {"max_model_len": plan.max_model_len, "seed": 0, "enforce_eager": True, "enable_prefix_caching": False}
        options = {"dtype": "bfloat16", **(own if RECIPES[name].engine == VLLM else {})}
        return arm_request(name, options, given, **more)  # type: ignore[arg-type]

    for one in requests_of(ARMS, plan, request):  # type: ignore[arg-type]
        fill_arm(ENGINES, RunWriter(run), checkpoint, one, lambda event: None)
    return open_run(run.path), checkpoint


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Checkpoint]:
    """A run of a healthy pair with a reference arm."""
    folder = tmp_path_factory.mktemp("reference")
    run, checkpoint = captured("qwen3_moe", folder)
    third = published(checkpoint.path, folder / "published")
    made = run_here("capture", "reference", third, "-o", run.path, "--trust-remote-code")
    assert made.returncode == 0, made.stderr
    return open_run(run.path), checkpoint


def with_fault(run: Run, checkpoint: Checkpoint, side: str, fault: str, folder: Path) -> Run:
    """A copy of the run in which one engine computes something else in float32."""
    planted = planted_checkpoint(checkpoint, FAULTS[fault], 2, folder / "planted", ("float32",))
    shutil.copytree(run.path, folder / "run")
    copy = open_run(folder / "run")
    for arm in (one for one in ARMS if one.startswith(f"{side}-fp32")):
        record = run.arm(arm)
        assert record.captured is not None
        shutil.rmtree(copy.arm_folder(arm))
        options = {key: value for key, value in record.captured.configuration.items() if key not in _NOT_OPTIONS}
        request = replace(arm_request(arm, options, given=True), variant_of=record.variant_of, n_shards=record.n_shards)
        fill_arm(ENGINES, RunWriter(copy), planted, request, lambda event: None)
    return open_run(copy.path)


_NOT_OPTIONS = ("path", "perturbation")


def test_a_reference_agrees_with_two_healthy_engines(qwen: tuple[Run, Checkpoint]) -> None:
    run, _ = qwen
    record = run.arm("reference")
    assert (record.role, record.dtype, record.is_routed) == ("reference", "float32", False)
    assert str(record.facts["model_code"]).startswith("PlainMoEForCausalLM of modeling_plain_moe.py (sha256 ")
    summary = analyze_run(run)
    assert summary["verdict"]["word"] == "same function, rounding only"
    found = summary["whose"]
    assert [found[side]["n_agreeing"] for side in ("infer", "train")] == [found["infer"]["n_sequences"]] * 2
    assert found["infer"]["n_sequences"] == N_SEQUENCES
    assert (found["side"], found["words"]) == (None, "")
    assert any(line.startswith("reference arm reference, PlainMoE") for line in summary["verdict"]["evidence"])
    assert "reference" in summary["arms"]


@pytest.mark.parametrize("fault", ["attention-scale", "expert-redrawn", "head"])
@pytest.mark.parametrize(("side", "owner"), [("infer", "vLLM's"), ("train", "transformers'")])
def test_the_engine_that_has_the_fault_is_named(
    qwen: tuple[Run, Checkpoint], side: str, owner: str, fault: str, tmp_path: Path
) -> None:
    run = with_fault(*qwen, side, fault, tmp_path)
    verdict = analyze_run(run)["verdict"]
    assert verdict["word"] == "different function"
    assert f"It is {owner}: the reference (PlainMoEForCausalLM" in verdict["where"]
    shutil.rmtree(run.arm_folder("reference"))
    assert "Which engine is wrong two engines cannot tell" in analyze_run(open_run(run.path))["verdict"]["where"]


def test_a_reference_that_agrees_with_neither_names_nobody(qwen: tuple[Run, Checkpoint], tmp_path: Path) -> None:
    run, checkpoint = qwen
    faulty = with_fault(run, checkpoint, "infer", "attention-scale", tmp_path)
    code = PUBLISHER.read_text().replace("/ self.width**0.5", "/ (1.1 * self.width**0.5)")
    assert code != PUBLISHER.read_text()
    third = published(checkpoint.path, tmp_path / "published", code)
    shutil.rmtree(faulty.arm_folder("reference"))
    made = run_here("capture", "reference", third, "-o", faulty.path, "--trust-remote-code")
    assert made.returncode == 0, made.stderr
    verdict = analyze_run(open_run(faulty.path))["verdict"]
    assert "Whose it is the reference does not say: PlainMoEForCausalLM" in verdict["where"]
    assert "agrees with neither (vLLM 0 of " in verdict["where"]
    assert "is a third function" in verdict["where"]


def test_transformers_once_more_is_no_third_party(qwen: tuple[Run, Checkpoint]) -> None:
    run, checkpoint = qwen
    refused = run_here("capture", "reference", checkpoint.path, "-o", run.path, "--name", "again")
    assert refused.returncode == 1
    assert "Qwen3MoeForCausalLM of transformers" in refused.stderr
    assert "that is no third party" in refused.stderr
    assert "again" not in open_run(run.path).arms()


def test_code_that_does_not_find_its_weights_is_refused(qwen: tuple[Run, Checkpoint], tmp_path: Path) -> None:
    """Hazard: transformers loads such a class with random weights and a warning; it would be a third function."""
    run, checkpoint = qwen
    code = PUBLISHER.read_text().replace("self.o_proj", "self.out_proj")
    third = published(checkpoint.path, tmp_path / "published", code)
    refused = run_here("capture", "reference", third, "-o", run.path, "--trust-remote-code", "--name", "again")
    assert refused.returncode == 1
    assert "found no weights in" in refused.stderr
    assert "for 3 of its tensors, first model.layers.0.self_attn.out_proj.weight" in refused.stderr


def test_code_beside_the_weights_runs_only_where_it_is_trusted(qwen: tuple[Run, Checkpoint], tmp_path: Path) -> None:
    run, checkpoint = qwen
    third = published(checkpoint.path, tmp_path / "published", "raise SystemExit('it ran')")
    refused = run_here("capture", "reference", third, "-o", run.path, "--name", "again")
    assert refused.returncode == 1
    assert "that is no third party" in refused.stderr


def test_a_disagreement_that_nobody_planted_is_vllms(tmp_path: Path) -> None:
    """vLLM never adds the bias of Phi-MoE's head (reports/families.md): the publisher's code does."""
    folder = tmp_path
    run, checkpoint = captured("phimoe", folder)
    third = published(checkpoint.path, folder / "published")
    said = run_here("diagnose", checkpoint.path, "-o", run.path, "--reference", third, "--trust-reference-code",
                    "--no-modules")  # fmt: skip
    assert said.returncode == 0, said.stderr
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["verdict"]["word"] == "different function"
    assert "It is vLLM's: the reference (PlainMoEForCausalLM" in summary["verdict"]["where"]
    assert (summary["whose"]["side"], summary["whose"]["infer"]["n_agreeing"]) == ("infer", 0)
    assert "It is vLLM's" in " ".join(said.stdout.split())
