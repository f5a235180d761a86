"""Rules planted wrong in vLLM's loaded routers: each is named before anything is sampled, or changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import odd_moe
import pytest
import torch
from family_measures import BOUND, broken_claims, measure
from planted import PLANTED
from probes import TESTS, engines_under
from safetensors.torch import load_file, save_file

from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.engine import TrainEngine, load_model
from moediag.engines.launch import Job, arm_options, proof_beside
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.vllm.options import INFER_ENVIRONMENT
from moediag.run.capture import WHOLE
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter
from moediag.selftest.families import FAMILIES, Family, make_checkpoint

pytestmark = pytest.mark.engines

GROUPED = [name for name in PLANTED if name not in ("sigmoid for softmax", "losers at 0")]
CASES = {
    "glm4_moe": ("glm4_moe", None, GROUPED, {"nothing"}),
    # every choice score is below 0: losing groups at 0 win
    "negative bias": ("glm4_moe", -1.2, ["losers at 0"], set()),
    # every bias above 0, so that no choice score is below it: losing groups at 0 or -inf are one function
    "positive bias": ("glm4_moe", 0.2, ["losers at 0"], {"losers at 0"}),
    "qwen3_moe": ("qwen3_moe", None, ["sigmoid for softmax", "renormalisation off", "K off by one",
                                      "logits clamped at 0", "nothing"], {"nothing"}),
}  # fmt: skip


def begin_arm_of_another_rule(run: Run, checkpoint: Path, folder: Path) -> None:
    """A train arm captured elsewhere, of the same weights without renormalisation."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_topk_prob": not config["norm_topk_prob"]}))
    other, writer = open_checkpoint(str(folder)), RunWriter(run)
    assert other.routing is not None
    writer.add_checkpoint(other.record)
    request = ArmRequest("train", "train", {"dtype": "float32"})
    engine = TrainEngine(writer, load_model(str(folder), request.options), request, other.routing.record())
    writer.begin_arm(engine.arm_record(other.record.digest, {}), engine.correction_bias())


def test_each_rule_planted_in_vllm_is_named_before_sampling(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("The for statement")
    with engines_under(TESTS) as engines:
        for case, (family, bias, planted, equivalent) in CASES.items():
            checkpoint = make_checkpoint(family, tmp_path / case.replace(" ", "-"), torch.float32)
            if bias is not None:
                tensors = load_file(checkpoint / "model.safetensors")
                for name in tensors:
                    if name.endswith("e_score_correction_bias"):
                        tensors[name] = tensors[name].clamp(-0.15, 0.15) + bias
                save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
            opened = open_checkpoint(str(checkpoint))
            run = make_plan(opened, prompts, SamplingOptions(max_tokens=2)).create(tmp_path / f"run-{case}", False)
            request = ArmRequest("infer", "infer", {"dtype": "float32", "max_model_len": 64})
            output = tmp_path / f"{case}.json"
            options = {**arm_options(opened, request), "output": str(output), "planted": planted}
            log = str(run.path / "logs" / "probe.log")
            job = Job("vLLM", "planted:probe_planted", str(run.path), asdict(WHOLE), options, log)
            with proof_beside(job, opened, request) as proven:
                engines.do(replace(proven), INFER_ENVIRONMENT, lambda event: None)
            said = json.loads(output.read_text())
            assert {name for name, words in said.items() if not words} == equivalent, (case, said)
            if case == "qwen3_moe":  # vLLM agrees with transformers, and not with an arm of another rule in the run
                begin_arm_of_another_rule(run, checkpoint, tmp_path / "other")
                options["planted"] = ["nothing"]
                with proof_beside(replace(job, options=options), opened, request) as proven:
                    engines.do(replace(proven), INFER_ENVIRONMENT, lambda event: None)
                words = json.loads(output.read_text())["nothing"]
                assert "2 of 2 MoE layers do not do what arm train's did: other gate weights" in words, words
            named = [words for words in said.values() if words]
            assert all("transformers: top-" in words and "vLLM: " in words for words in named)
            assert all("Nothing was sampled" in words for words in named)


def test_a_model_class_of_no_list_is_captured_in_both_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A combination of no family is captured right; a choice that no rule explains without margins, with the reason."""
    odd_moe.register()
    settings = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": False,
                "routed_scaling_factor": odd_moe.FACTOR}  # fmt: skip
    monkeypatch.setitem(FAMILIES, "odd_moe", Family("odd_moe", settings))
    monkeypatch.setitem(FAMILIES, "odd_moe_outside", Family("odd_moe", {**settings, "odd_choice": True}))
    with engines_under(TESTS, odd_moe.write_plugin(tmp_path / "plugin")) as engines:
        names = ("odd_moe", "odd_moe_outside")
        (tmp_path / str(torch.float32)).mkdir()
        found = measure({torch.float32: names}, tmp_path, engines)[torch.float32]
    for one in found.values():
        assert not one.refused + one.not_captured + one.not_replayed, one
        assert one.vllm_class == "OddMoeOfVllm"
        assert one.is_complete
        assert one.is_bit_equal_under_observation
        assert one.is_self_replay_bit_identical
        assert one.is_replayed
        assert one.same_set_rate == 1.0
        assert one.ratio <= BOUND
    assert broken_claims(found["odd_moe"]) == []
    outside = found["odd_moe_outside"]
    assert all("explains its choices" in proof for proof in outside.proofs.values()), outside.proofs
    run = open_run(tmp_path / str(torch.float32) / "odd_moe_outside" / "run")
    for arm in ("infer", "train"):
        capture = run.capture(arm, run.shards[0])
        assert capture.margin_TL is None
        assert capture.router_logits_TLE is not None
        routed = capture.expert_ids_TLK[:, 0, 0] >= 0  # type: ignore[index]
        _, ids = odd_moe.odd_routes(torch.from_numpy(capture.router_logits_TLE[routed]), 2, is_odd=True)
        kept = torch.from_numpy(capture.expert_ids_TLK[routed]).long()  # type: ignore[index]
        assert torch.equal(kept.sort(-1).values, ids.sort(-1).values)
