"""The static rung (R0): what a checkpoint's files show of its routing before anything runs.

Router tensors are read from the safetensors files one by one; the rule and the dtypes of the router's four stages come
from running transformers' routers alone on seeded rows, in the checkpoint's dtype.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.proof import Proof, rule_equation, rule_words

_ROUTER_TENSOR = re.compile(
    r"layers\.(\d+)\..*\b(?:gate|router)(?:\.layer)?\.(weight|bias|e_score_correction_bias|expert_bias)$"
)
_BIASES = ("e_score_correction_bias", "expert_bias")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def inspect_checkpoint(name: str, revision: str | None = None) -> dict[str, Any]:
    """Facts about a checkpoint's routing, JSON-ready.

    Returns:
        ``model``, ``routing`` (ModelRouting, None when dense), ``router_rule`` (as shown on transformers' router: in
        words, as an equation, and how it is known), ``router_dtypes`` (weight, matmul, score, gate in transformers),
        ``router_tensors`` (one entry per tensor: layer, dtype, shape, unique values of a bias), ``generation_config``
        (sampling values) and ``warnings``.

    Raises:
        CheckpointError: as :func:`~moediag.engines.checkpoint.open_checkpoint`.
    """
    checkpoint = open_checkpoint(name, revision)
    tensors, warnings = _router_tensors(checkpoint)
    proof = checkpoint.proof(checkpoint.stored_dtype) if checkpoint.routing else None
    routing = checkpoint.routing.record() if checkpoint.routing else None
    generation = _generation_config(checkpoint.path)
    if generation.get("temperature") not in (None, 1, 1.0) or generation.get("top_p") not in (None, 1, 1.0):
        warnings.append("generation_config.json changes sampling; moediag makes vLLM ignore it")
    return {
        "model": checkpoint.described(),
        "routing": routing,
        "router_dtypes": proof.shown[0].stage_dtypes if proof else None,
        "router_rule": _rule(proof) if proof else None,
        "router_tensors": tensors,
        "generation_config": generation,
        "warnings": warnings,
    }


def _rule(proof: Proof) -> dict[str, str]:
    routing = proof.routing
    shown = {"shown": routing.proof}
    if not routing.has_rule:
        return shown
    return {"words": rule_words(routing), "equation": rule_equation(routing), **shown}


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
