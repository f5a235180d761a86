"""transformers models whose layers a device map spreads, and commands that a launcher starts on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moediag.engines.assemble import FULL
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.engine import load_model, score_sequence
from moediag.engines.hf.routing import prove_model
from moediag.engines.hf.taps import RoutingTaps, find_blocks
from moediag.selftest.families import make_checkpoint

pytestmark = pytest.mark.engines


def spread(model: Any) -> dict[str, str]:
    """The first decoder layer in memory, the others on disk, whatever else there is in memory."""
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(model.model.layers))}
    return {**places, **layers, "lm_head": "cpu"}


def captured(model: Any, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The rule that its routers show, and every array of one sequence."""
    routing = prove_model(model, model.config.get_text_config().to_dict(), dtype, "the model").routing
    ids = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), RoutingTaps(model, routing, FULL) as taps:
        logp_T, entropy_T = score_sequence(model, ids, torch.arange(40) >= 10)
        return routing, {"logp_T": logp_T, "entropy_T": entropy_T, **taps.take(torch.arange(40))}


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])  # the second has a correction bias
def test_layers_that_a_device_map_keeps_on_disk_are_captured_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Bug: the tensors of such a router were not there when its rule was to be shown, and the arm was refused with
    "transformers' loaded routers have ..., the checkpoint's alone showed ..."."""
    checkpoint = make_checkpoint(family, tmp_path / family, torch.bfloat16)
    whole = load_model(str(checkpoint), {"dtype": "bfloat16"})
    options = {"dtype": "bfloat16", "device_map": spread(whole), "offload_folder": str(tmp_path / "offloaded")}
    model = load_model(str(checkpoint), options)
    blocks = find_blocks(model)
    assert any(parameter.is_meta for block in blocks for parameter in block.gate.parameters())
    (routing, arrays), (expected, reference) = captured(model, "bfloat16"), captured(whole, "bfloat16")
    assert routing == expected
    assert routing.has_rule
    assert routing.decoder_layers == open_checkpoint(str(checkpoint)).routing.decoder_layers
    assert set(arrays) == set(reference) >= {"expert_ids_TLK", "gate_weights_TLK", "margin_TL", "router_logits_TLE"}
    for name, array in reference.items():
        torch.testing.assert_close(arrays[name], array, rtol=0, atol=0, equal_nan=True, msg=name)
    biases = [(one.correction_bias(routing), two.correction_bias(routing)) for one, two in zip(
        blocks, find_blocks(whole), strict=True)]  # fmt: skip
    assert all((one is None and two is None) or torch.equal(one, two) for one, two in biases)


def test_a_command_on_two_ranks_of_a_launcher_is_refused_on_both(random_moe: Path, tmp_path: Path) -> None:
    """Bug: each rank was a whole moediag, and both made the run, captured and analysed it side by side."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moediag",
        "profile", str(random_moe), "--prompts", str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ), check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("moediag: ")]
    assert lines
    assert all("2 ranks of this command (WORLD_SIZE=2)" in line and "start it once" in line for line in lines)
    assert not (tmp_path / "run").exists()
