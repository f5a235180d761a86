"""The catalogue of faults: each changes what it says and nothing else, and a rule is its right answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hygiene_captures import Healthy, make, write_run
from safetensors.torch import load_file
from scripted_engine import make_scripted_run
from transformers import AutoModelForCausalLM

from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.errors import CheckpointError
from moediag.faults import FAULTS, RECORD, planted_checkpoint, spoil_arm
from moediag.faults.edits import permuted_experts, transposed_experts
from moediag.faults.planting import plant
from moediag.hygiene import check_run
from moediag.hygiene.rules import RULES
from moediag.run.reader import Run, open_run
from moediag.run.recipes import TRANSFORMERS
from moediag.run.writer import RunWriter
from moediag.selftest.families import make_checkpoint

EDITED = [name for name, fault in FAULTS.items() if fault.edit is not None]
HOOKED = [name for name, fault in FAULTS.items() if fault.hook is not None and TRANSFORMERS in fault.sides]
SPOILT = [name for name, fault in FAULTS.items() if fault.kind == RECORD]
_L2 = "model.layers.2"
_EXPERT_0 = {f"{_L2}.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up", "down")}
_QUERIES, _ROUTER, _BIAS = (
    f"{_L2}.self_attn.q_norm.weight",
    f"{_L2}.mlp.gate.weight",
    f"{_L2}.mlp.gate.e_score_correction_bias",
)
_SHARED = f"{_L2}.mlp.shared_experts.down_proj.weight"
TENSORS = {
    "attention-scale": {_QUERIES}, "expert-redrawn": _EXPERT_0, "expert-perturbed": _EXPERT_0,
    "below-rounding": _EXPERT_0, "shared-expert": {_SHARED}, "shared-expert-dropped": {_SHARED},
    "norm-weight": {f"{_L2}.post_attention_layernorm.weight"}, "embeddings": {"model.embed_tokens.weight"},
    "dense-mlp": {"model.layers.0.mlp.down_proj.weight"}, "final-norm": {"model.norm.weight"},
    "head": {"lm_head.weight"}, "head-perturbed": {"lm_head.weight"}, "temperature": {"lm_head.weight"},
    "router-weight": {_ROUTER}, "router-permuted": {_ROUTER}, "router-zeroed": {_ROUTER}, "router-bias-bf16": {_BIAS},
    "router-bias-dropped": {_BIAS}, "scale-and-router": {_QUERIES, _ROUTER}, "rope-and-head": {"lm_head.weight"},
}  # fmt: skip
ENTRIES = {
    "rope-theta": {"rope_parameters"}, "rope-theta-1pc": {"rope_parameters"}, "rope-and-head": {"rope_parameters"},
    "renormalisation": {"norm_topk_prob"}, "scaling-factor": {"routed_scaling_factor"},
}  # fmt: skip
ABSENT = {"experts-transposed", "sliding-window", "attention-sink", "attention-multiplier", "residual-multiplier"}
"""Faults that a GLM-4 MoE cannot have; others without tensors above change all of a kind."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random GLM-4 MoE: shared expert, norms of queries and keys, renormalised sigmoid."""
    return open_checkpoint(str(make_checkpoint("glm4_moe", tmp_path_factory.mktemp("faults") / "clean")))


@pytest.mark.parametrize("name", [name for name in EDITED if name not in ABSENT])
def test_an_edit_changes_what_it_says_and_keeps_the_name(name: str, clean: Checkpoint, tmp_path: Path) -> None:
    planted = planted_checkpoint(clean, FAULTS[name], 2, tmp_path / "planted", ("float32",))
    before, after = load_file(clean.weight_files[0]), load_file(planted.weight_files[0])
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    everywhere = {
        "experts-redrawn": {key for key in before if ".mlp.experts." in key},
        "experts-permuted": {key for key in before if f"{_L2}.mlp.experts." in key},
        "stale-weights": set(before),
        "other-weights": set(before),
    }
    assert changed == (TENSORS | everywhere).get(name, set())
    assert all(after[key].isfinite().all() for key in changed)
    entries = {key for key in clean.config if clean.config[key] != planted.config[key]}
    assert entries == ENTRIES.get(name, set())
    assert planted.record == clean.record
    assert planted.routing == clean.routing
    assert open_checkpoint(str(planted.path)).record.digest != clean.record.digest
    assert planted.proof("float32") is clean.proof("float32")


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_a_fault_that_a_model_cannot_have_is_refused(name: str, clean: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"nothing to change: {FAULTS[name].words}"):
        planted_checkpoint(clean, FAULTS[name], 2, tmp_path / "absent", ())


def test_a_dense_layer_has_no_shared_expert(clean: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to change: one layer's shared expert"):
        planted_checkpoint(clean, FAULTS["shared-expert"], 0, tmp_path / "dense-layer", ())


def test_experts_drawn_anew_are_no_copies_of_each_other(clean: Checkpoint, tmp_path: Path) -> None:
    planted = planted_checkpoint(clean, FAULTS["experts-redrawn"], 2, tmp_path / "redrawn", ())
    after = load_file(planted.weight_files[0])
    first, second = (after[f"{_L2}.mlp.experts.{nth}.down_proj.weight"] for nth in (0, 1))
    assert not torch.equal(first, second)
    before = load_file(clean.weight_files[0])[f"{_L2}.mlp.experts.0.down_proj.weight"]
    assert float(first.float().std()) == pytest.approx(float(before.float().std()), rel=0.1)


def test_permuted_experts_are_the_same_experts_stored_one_by_one_or_fused() -> None:
    one_by_one = {f"layers.0.mlp.experts.{n}.w2.weight": torch.full((2, 3), float(n)) for n in range(4)}
    fused = {"layers.0.mlp.experts.down_proj": torch.arange(4.0)[:, None, None].expand(4, 2, 3).contiguous()}
    assert permuted_experts(one_by_one, {}, 0) == 4
    assert permuted_experts(fused, {}, 0) == 1
    slots = [float(one_by_one[f"layers.0.mlp.experts.{n}.w2.weight"][0, 0]) for n in range(4)]
    assert slots == fused["layers.0.mlp.experts.down_proj"][:, 0, 0].tolist() == [3, 0, 1, 2]


def test_square_experts_are_transposed_one_by_one_or_fused_and_no_others() -> None:
    """Where both layouts have one shape, a converter that decides by shape loads the wrong one silently (transformers
    issue 47031): this is why no checkpoint of our own has square experts."""
    square = torch.arange(9.0).view(3, 3)
    one_by_one = {"layers.0.mlp.experts.0.down_proj.weight": square, "layers.0.mlp.experts.0.up_proj.weight":
                  torch.ones(3, 4), "layers.0.mlp.gate.weight": square}  # fmt: skip
    fused = {"layers.0.mlp.experts.down_proj": square.expand(2, 3, 3).contiguous()}
    assert transposed_experts(one_by_one, {}, 0) == transposed_experts(fused, {}, 0) == 1
    assert torch.equal(one_by_one["layers.0.mlp.experts.0.down_proj.weight"], square.T)
    assert torch.equal(fused["layers.0.mlp.experts.down_proj"], square.T.expand(2, 3, 3))
    assert torch.equal(one_by_one["layers.0.mlp.gate.weight"], square)


def test_every_right_answer_is_a_rule() -> None:
    for name, fault in FAULTS.items():
        assert fault.causes, name
        assert set(fault.causes) <= {*RULES}, name
        ways = [fault.edit, fault.hook, fault.spoil]
        assert sum(way is not None for way in ways) == 1, f"{name} is planted in one way"


@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_changes_the_loaded_model_and_is_taken_out_again(name: str, clean: Checkpoint) -> None:
    dtype = getattr(torch, FAULTS[name].dtype or "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(clean.path, dtype=dtype).eval()
    ids = torch.arange(3, 60)[None]
    assert clean.routing is not None

    def logps() -> torch.Tensor:
        with torch.inference_mode():
            return model(ids).logits.float().log_softmax(-1)  # type: ignore[no-any-return]

    before = logps()
    undo = plant(model, name, clean.routing.decoder_layers)
    changed = logps()
    undo()
    assert torch.equal(logps(), before)
    off = float((changed - before).abs().mean())
    assert 1e-5 < off < 1.0


def test_a_model_without_the_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no module for this"):
        plant(torch.nn.Linear(2, 2), "kv-fp8", ())


def test_only_the_nucleus_is_left_of_the_logits() -> None:
    from moediag.faults.loaded import TOP_P, of_the_nucleus

    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    kept = of_the_nucleus(logits).isfinite()
    for row, is_kept in zip(logits.softmax(-1), kept, strict=True):
        ranked, total, n = sorted(row.tolist(), reverse=True), 0.0, 0
        while total < TOP_P:
            total, n = total + ranked[n], n + 1
        assert int(is_kept.sum()) == n
        assert float(row[is_kept].min()) == pytest.approx(ranked[n - 1])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Healthy]:
    """A healthy pair as a run, whose sequences begin alike."""
    h = Healthy(shape=(16, 4, 6), n_prompts=12, prompt_length=20, response_length=60, noise=0.01)
    path = tmp_path_factory.mktemp("recorded") / "run"
    write_run(path, h, *make(h))
    return path, h


@pytest.mark.parametrize("name", [name for name in SPOILT if name not in ("logps-bf16", "rows-of-other-sequences")])
def test_a_spoilt_record_is_named(name: str, recorded: tuple[Path, Healthy], tmp_path: Path) -> None:
    clean, run = open_run(recorded[0]), copied(recorded[0], tmp_path / "run")
    assert spoil_arm(RunWriter(run), "infer", name)
    assert not equal(clean, run, "infer")
    assert equal(clean, run, "train")
    serious = [finding.rule for finding in check_run(run) if finding.level != "note"]
    assert serious
    assert set(serious) & set(FAULTS[name].causes), serious


def test_an_arm_without_routing_has_no_rows_to_spoil(tmp_path: Path) -> None:
    run = make_scripted_run(tmp_path / "dense", dense=True)
    assert not spoil_arm(RunWriter(run), "infer", "never-bound")


def copied(clean: Path, path: Path) -> Run:
    shutil.copytree(clean, path)
    return open_run(path)


def equal(a: Run, b: Run, arm: str) -> bool:
    """An arm's arrays are the same, bit for bit."""
    for shard in a.shards:
        ours, theirs = (run.capture(arm, shard).arrays() for run in (a, b))
        if not all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in ours):
            return False
    return True
