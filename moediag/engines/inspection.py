"""The static rung (R0): what a checkpoint's files show of its routing before anything runs.

Router tensors are read from the safetensors files one by one; the dtypes of the router's four stages come from
running transformers' router module alone on a few made-up rows, with the checkpoint's dtype.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.hf.taps import find_blocks, stage_dtypes

_ROUTER_TENSOR = re.compile(
    r"layers\.(\d+)\..*\b(?:gate|router)(?:\.layer)?\.(weight|bias|e_score_correction_bias|expert_bias)$"
)
_BIASES = ("e_score_correction_bias", "expert_bias")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def inspect_checkpoint(name: str, revision: str | None = None) -> dict[str, Any]:
    """Facts about a checkpoint's routing, JSON-ready.

    Returns:
        ``model``, ``routing`` (ModelRouting, None when dense), ``router_dtypes`` (weight, matmul, score, gate in
        transformers), ``router_tensors`` (one entry per tensor: layer, dtype, shape, unique values of a bias),
        ``generation_config`` (sampling values) and ``warnings``.

    Raises:
        CheckpointError: as :func:`~moediag.engines.checkpoint.open_checkpoint`.
    """
    checkpoint = open_checkpoint(name, revision)
    tensors, warnings = _router_tensors(checkpoint)
    routing = checkpoint.routing.record() if checkpoint.routing else None
    generation = _generation_config(checkpoint.path)
    if generation.get("temperature") not in (None, 1, 1.0) or generation.get("top_p") not in (None, 1, 1.0):
        warnings.append("generation_config.json changes sampling; moediag makes vLLM ignore it")
    return {
        "model": checkpoint.described(),
        "routing": routing,
        "router_dtypes": _router_dtypes(checkpoint) if checkpoint.routing else None,
        "router_tensors": tensors,
        "generation_config": generation,
        "warnings": warnings,
    }


def _router_tensors(checkpoint: Checkpoint) -> tuple[list[dict[str, Any]], list[str]]:
    tensors, warnings = [], []
    layers = checkpoint.routing.decoder_layers if checkpoint.routing else ()
    for file in checkpoint.weight_files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                match = _ROUTER_TENSOR.search(key)
                if match is None or int(match.group(1)) not in layers:
                    continue
                tensor = opened.get_tensor(key)
                tensors.append(_tensor_facts(int(match.group(1)), match.group(2), tensor))
                warnings += _tensor_warnings(key, match.group(2), tensor)
    return sorted(tensors, key=lambda entry: (entry["decoder_layer"], entry["tensor"])), warnings


def _tensor_facts(layer: int, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    facts = {
        "decoder_layer": layer,
        "tensor": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    if name in _BIASES:
        facts["n_unique_values"] = int(torch.unique(tensor).numel())
    return facts


def _tensor_warnings(key: str, name: str, tensor: torch.Tensor) -> list[str]:
    values = tensor.float()
    if not bool(values.isfinite().all()):
        return [f"{key} holds values that are not finite"]
    if name == "weight" and not bool(values.any()):
        return [f"{key} is all zero: every token gets the same experts"]
    if name in _BIASES and values.numel() > 1 and tensor.dtype == torch.bfloat16:
        return [f"{key} is stored in bfloat16: near 7 its steps are 0.03, which decides choices (store float32)"]
    return []


def _generation_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "generation_config.json").read_text())
        return {name: config[name] for name in _SAMPLING if name in config}
    except (OSError, ValueError, TypeError):
        return {}


def _router_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """Stage dtypes of transformers' router, from a model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moediag.engines.hf import bailing

    assert checkpoint.routing is not None
    bailing.register()
    dtype = getattr(torch, checkpoint.stored_dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path), dtype=dtype)
    return stage_dtypes(find_blocks(model)[0], checkpoint.routing, dtype)
