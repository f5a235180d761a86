"""Routers that vLLM built, run on given logits inside its worker.

A router object is called as its block calls it (``select_experts``), with hidden states of zeros. The gate linear that
stands beside it is called by itself, on the hidden states that transformers' router was given. Where the router is not
on the path (a monolithic kernel), or is not vLLM's own (the experts-only form of its Transformers backend), nothing is
shown, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moediag.engines.proof import REFUSALS


def run_routers(
    model: torch.nn.Module,
    routers: Sequence[tuple[int, torch.nn.Module, Any]],
    scales: Sequence[float],
    dtype: torch.dtype,
    given: Path,
    output: Path | None,
) -> list[dict[str, Any]]:
    """Run every router on the probes of a file: ``logits_NE`` and ``hidden_MH``.

    Args:
        dtype: of hidden states.
        scales: what vLLM multiplies the experts' sum by, by MoE layer; part of the effective gate weight.
        output: receives ids, weights and own logits, by decoder layer; None on ranks that only look.

    Returns:
        Per layer: decoder layer, dtypes, and why nothing is shown (empty where it is).
    """
    probes = load_file(given)
    facts: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for layer, (decoder_layer, module, router) in enumerate(routers):
            fact: dict[str, Any] = {"decoder_layer": decoder_layer, "reason": not_on_path(module, router)}
            facts.append(fact)
            if fact["reason"]:
                continue
            device = next(module.parameters()).device
            hidden_MH = probes["hidden_MH"].to(device, dtype)
            own = _own_logits(model, module, hidden_MH, int(getattr(router, "global_num_experts", 0)))
            logits_NE = probes["logits_NE"].to(device, dtype if own is None else own.dtype)
            hidden_NH = torch.zeros(len(logits_NE), hidden_MH.shape[1], dtype=dtype, device=device)
            method = getattr(getattr(module, "routed_experts", module), "quant_method", None)
            try:
                weights, ids = router.select_experts(
                    hidden_states=hidden_NH,
                    router_logits=logits_NE,
                    topk_indices_dtype=getattr(method, "topk_indices_dtype", None),
                )
            except REFUSALS as error:
                lines = str(error).strip().splitlines()
                fact["reason"] = f"its router does not run on logits alone ({lines[0] if lines else error!r})"
                continue
            fact["logits_dtype"] = str(logits_NE.dtype).removeprefix("torch.")
            fact["gate_dtype"] = str(weights.dtype).removeprefix("torch.")
            tensors[f"ids_{decoder_layer}"] = ids.to("cpu", torch.int32, copy=True)
            tensors[f"weights_{decoder_layer}"] = weights.to("cpu", torch.float32, copy=True) * scales[layer]
            if own is not None:
                tensors[f"own_{decoder_layer}"] = own.to("cpu", torch.float32, copy=True)
    if output is not None:
        save_file({name: one.contiguous() for name, one in tensors.items()}, output)
    return facts


def not_on_path(module: torch.nn.Module, router: Any) -> str:
    """Why the router's choices are not what the experts run on, or not vLLM's; empty where they are both."""
    method = getattr(getattr(module, "routed_experts", module), "quant_method", None)
    if getattr(method, "is_monolithic", False):
        return f"the monolithic kernel {type(method).__name__} routes by itself: vLLM's router is not on the path"
    if "moe_state" in getattr(getattr(router, "custom_routing_function", None), "keywords", {}):
        return (
            "vLLM's Transformers backend runs transformers' own router here: the same code on both sides shows nothing"
        )
    return ""


def _own_logits(
    model: torch.nn.Module, module: torch.nn.Module, hidden_MH: torch.Tensor, n_experts: int
) -> torch.Tensor | None:
    """What the gate beside the experts makes of hidden states; None where it is not found or cannot run alone."""
    name = next(name for name, one in model.named_modules() if one is module)
    while name and not name.rpartition(".")[2].isdigit():  # up to the decoder layer: beyond are other routers
        gates = [child for child in model.get_submodule(name).children() if _scores_experts(child, module, n_experts)]
        name = name.rpartition(".")[0]
        if not gates:
            continue
        try:
            output = gates[0](hidden_MH)
        except REFUSALS:
            return None
        logits = output[0] if isinstance(output, tuple) else output
        return logits if isinstance(logits, torch.Tensor) and logits.shape[-1] == n_experts else None
    return None


def _scores_experts(child: torch.nn.Module, module: torch.nn.Module, n_experts: int) -> bool:
    """A linear map to E, or one that holds nothing else; kernels may have taken its weight, so its size is read."""
    if any(one is module for one in child.modules()):
        return False
    sizes = [one.output_size for one in child.modules() if hasattr(one, "output_size")]
    return bool(sizes) and all(size == n_experts for size in sizes)
