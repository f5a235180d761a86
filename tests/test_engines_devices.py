"""Models that are spread: vLLM's pipeline stages, layers that a device map puts away, ranks of a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moediag.engines.assemble import FULL
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.engine import load_model, score_sequence
from moediag.engines.hf.routing import prove_model
from moediag.engines.hf.taps import RoutingTaps, find_blocks
from moediag.engines.routers import ModelRouting
from moediag.engines.vllm.rows import StepRecorder, rows_of_all_stages
from moediag.errors import CaptureError
from moediag.selftest.families import make_checkpoint

pytestmark = pytest.mark.engines

LAYERS = (1, 2, 5)
SPEC = ModelRouting("x", 8, 2, "softmax", False, 1, 1, "scores", True, 1.0, 0, LAYERS)


def seen_by(layers: tuple[int, ...], path: Path, *, samples: bool, has_ids: bool = True, last_position: int = 4) -> Any:
    """Facts and rows of a stage with these decoder layers: two steps of two requests, of one row each in the second."""
    recorder = StepRecorder(replace(SPEC, decoder_layers=layers) if layers else None, FULL)
    generator = torch.Generator().manual_seed(0)
    for counts, position_T in (((3, 2), [0, 1, 2, 0, 1]), ((1, 1), [3, last_position])):
        logits_LTE = torch.randn(len(LAYERS), sum(counts), 8, generator=generator)
        logits_TV = torch.randn(len(counts), 11, generator=generator)
        ids = torch.tensor(position_T) + 100 if has_ids else None
        recorder.on_forward(("a", "b"), counts, torch.tensor(position_T), ids)
        for layer, decoder_layer in enumerate(layers):
            logits_TE = logits_LTE[LAYERS.index(decoder_layer)]
            weights_TK, ids_TK = logits_TE.softmax(-1).topk(2)
            recorder.on_route(layer, logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK)
        if samples:
            recorder.on_sample(logits_TV)
        recorder.end_step()
    facts = recorder.flush(path)
    assert not facts["problems"]
    return facts, load_file(path)


@pytest.mark.parametrize("split", [((1,), (2, 5)), ((), LAYERS), ((1, 2), (5,), ())])
def test_the_rows_of_pipeline_stages_are_those_of_one_stage(split: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    """A stage may have no MoE layer, and on vLLM's V2 runner only the first is given token ids."""
    stages = [
        seen_by(layers, tmp_path / str(i), samples=i == len(split) - 1, has_ids=i == 0)
        for i, layers in enumerate(split)
    ]
    facts, rows = rows_of_all_stages(stages)
    expected_facts, expected = seen_by(LAYERS, tmp_path / "whole", samples=True)
    assert set(rows) == set(expected)
    assert all(torch.equal(rows[name], array) for name, array in expected.items())
    assert all(facts[name] == expected_facts[name] for name in ("requests", "router_dtypes"))


def test_a_pipeline_stage_that_saw_other_rows_is_refused(tmp_path: Path) -> None:
    first = seen_by((1,), tmp_path / "0", samples=False)
    other = seen_by((2, 5), tmp_path / "1", samples=True, last_position=5)
    with pytest.raises(CaptureError, match="pipeline stage 1 saw other rows than stage 0; nothing was stored"):
        rows_of_all_stages([first, other])


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
