"""The catalogue of faults: each changes what it says and nothing else, in the checkpoint or in a loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.errors import CheckpointError
from moediag.faults import FAULTS, FUNCTION, ROUNDING, planted_checkpoint
from moediag.faults.catalogue import plant
from moediag.selftest.families import make_checkpoint

OF_FUNCTION = [name for name, fault in FAULTS.items() if fault.kind == FUNCTION]
OF_ROUNDING = [name for name, fault in FAULTS.items() if fault.kind == ROUNDING]
CHANGED = {
    "attention-scale": {"model.layers.2.self_attn.q_norm.weight"},
    "rope-theta": set(),
    "expert-redrawn": {"model.layers.2.mlp.experts.0.down_proj.weight"},
    "norm-weight": {"model.layers.2.post_attention_layernorm.weight"},
    "shared-expert": {"model.layers.2.mlp.shared_experts.down_proj.weight"},
    "head": {"lm_head.weight"},
    "router-weight": {"model.layers.2.mlp.gate.weight"},
    "renormalisation": set(),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random GLM-4 MoE: shared expert, norms of queries and keys, renormalised sigmoid."""
    return open_checkpoint(str(make_checkpoint("glm4_moe", tmp_path_factory.mktemp("faults") / "clean")))


@pytest.mark.parametrize("name", OF_FUNCTION)
def test_a_fault_of_the_function_changes_what_it_says_and_keeps_the_name(
    name: str, clean: Checkpoint, tmp_path: Path
) -> None:
    planted = planted_checkpoint(clean, FAULTS[name], 2, tmp_path / "planted", ("float32",))
    before, after = load_file(clean.weight_files[0]), load_file(planted.weight_files[0])
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == CHANGED[name]
    entries = {key for key in clean.config if clean.config[key] != planted.config[key]}
    assert entries == {"rope-theta": {"rope_parameters"}, "renormalisation": {"norm_topk_prob"}}.get(name, set())
    assert planted.record == clean.record
    assert planted.routing == clean.routing
    assert open_checkpoint(str(planted.path)).record.digest != clean.record.digest
    assert planted.proof("float32") is clean.proof("float32")


def test_a_fault_that_a_model_cannot_have_is_refused(clean: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to change: one layer's shared expert"):
        planted_checkpoint(clean, FAULTS["shared-expert"], 0, tmp_path / "dense-layer", ())


@pytest.mark.parametrize("name", OF_ROUNDING)
def test_a_fault_of_rounding_changes_the_model_a_little_and_is_taken_out_again(name: str, clean: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(clean.path, dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 60)[None]
    assert clean.routing is not None

    def logps() -> torch.Tensor:
        with torch.inference_mode():
            return model(ids).logits.float().log_softmax(-1)  # type: ignore[no-any-return]

    before = logps()
    undo = plant(model, name, clean.routing.decoder_layers)
    rounded = logps()
    undo()
    assert torch.equal(logps(), before)
    off = float((rounded - before).abs().mean())
    assert 1e-4 < off < 1.0


def test_a_model_without_the_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no module for this"):
        plant(torch.nn.Linear(2, 2), "kv-fp8", ())
