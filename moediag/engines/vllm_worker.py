"""The part of moediag that runs inside vLLM's workers: taps on routers, steps and the sampler.

vLLM mixes :class:`MoediagWorkerExtension` into its worker class (``worker_extension_cls``), in-process,
multi-process and tensor-parallel alike; ``collective_rpc`` calls its methods by name. Only plain data
crosses that border: rows leave through a safetensors file.

Invariants:
    - taps only copy; they never change what a router, the model or the sampler receives or returns;
    - rank 0 records and writes; every other tensor-parallel rank records expert ids only, and the digest of what it
      saw is held against that of rank 0: ranks that route differently are an error, not a choice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from moediag.engines.provenance import process_facts
from moediag.engines.routers import ModelRouting
from moediag.engines.routing_rows import IDS
from moediag.engines.selected import vllm_dtypes, vllm_kernels
from moediag.engines.vllm_rows import StepRecorder
from moediag.engines.vllm_runners import Undo, is_v2, tap_runner

_RULE_ATTRIBUTES = ("scoring_func", "renormalize", "num_expert_group", "topk_group", "routed_scaling_factor")
_DECODER_LAYER = re.compile(r"\.layers\.(\d+)\.")


class MoediagWorkerExtension:
    """Methods that vLLM's worker gains; every name is prefixed, vLLM refuses clashes."""

    rank: int
    model_runner: Any

    def moediag_install(self, spec: dict[str, Any] | None, level: str) -> dict[str, Any]:
        """Set the taps on this worker, in place of those of an earlier arm.

        Args:
            spec: fields of :class:`ModelRouting`, or None for a dense model.
            level: ``ids``, ``margins`` or ``full``; see :mod:`moediag.engines.routing_rows`.

        Returns:
            What the loaded model is: MoE layers, E, K, dtypes, kernels, attention backend.
        """
        self.moediag_remove()
        routers = find_routers(self.model_runner.model)
        router_spec = ModelRouting.from_record(spec) if spec else None
        bias_LE = correction_bias([router for _, _, router in routers])
        recorder = StepRecorder(router_spec, level if self.rank == 0 else IDS, bias_LE, scales_after_experts(routers))
        self._moediag_recorder = recorder
        self._moediag_undo: list[Undo] = [
            *tap_runner(self.model_runner, recorder),
            *(_tap_router(router, layer, recorder) for layer, (_, _, router) in enumerate(routers)),
        ]
        return self.moediag_describe()

    def moediag_describe(self) -> dict[str, Any]:
        """What was really loaded and selected in this worker."""
        runner = self.model_runner
        return {**describe_worker(runner, find_routers(runner.model)), "is_v2_runner": is_v2(runner)}

    def moediag_remove(self) -> None:
        """Take the taps off: the worker is as vLLM made it."""
        for undo in getattr(self, "_moediag_undo", []):
            undo()
        self._moediag_undo = []

    def moediag_begin(self, seed: int | None, wanted: dict[str, int] | None = None) -> None:
        """Start a shard: forget rows; with a seed, reseed this worker's default generator.

        Args:
            wanted: requests whose whole next-token distributions rank 0 keeps, each from a position on.
        """
        if seed is not None:
            torch.manual_seed(seed)
        if hasattr(self, "_moediag_recorder"):
            self._moediag_recorder.begin()
            self._moediag_recorder.want_distributions((wanted or {}) if self.rank == 0 else {})

    def moediag_bias(self) -> list[list[float]] | None:
        """The routers' correction bias by MoE layer and expert; None where the rule has none."""
        bias_LE = correction_bias([router for _, _, router in find_routers(self.model_runner.model)])
        return None if bias_LE is None else [[float(bias) for bias in row] for row in bias_LE.tolist()]

    def moediag_flush(self, path: str) -> dict[str, Any]:
        """Rank 0 writes its rows to ``path``; every rank tells what it saw."""
        return {"rank": self.rank, **self._moediag_recorder.flush(Path(path) if self.rank == 0 else None)}


def find_routers(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module, Any]]:
    """(decoder layer, module, router) of every MoE layer in order, found by what they do, not by class.

    Raises:
        ValueError: a router sits outside the numbered decoder layers.
    """
    found: dict[int, tuple[int, torch.nn.Module, Any]] = {}
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if not hasattr(router, "select_experts") or id(router) in found:
            continue
        match = _DECODER_LAYER.search(f".{name}.")
        if match is None:
            raise ValueError(f"router of module {name} belongs to no numbered decoder layer")
        found[id(router)] = (int(match.group(1)), module, router)
    return sorted(found.values(), key=lambda entry: entry[0])


def correction_bias(routers: list[Any]) -> torch.Tensor | None:
    """Bias per MoE layer and expert, (L, E), that enters the choice only; None where the routers have none."""
    biases = [getattr(router, "e_score_correction_bias", None) for router in routers]
    found = [bias for bias in biases if bias is not None]
    return torch.stack([bias.detach().float() for bias in found]) if found and len(found) == len(routers) else None


def scales_after_experts(routers: list[tuple[int, torch.nn.Module, Any]]) -> list[float]:
    """By MoE layer, what vLLM multiplies the sum of the experts' weighted outputs by.

    vLLM hands ``routed_scaling_factor`` to one of two: to the router, whose weights then contain it, or to the module
    that holds the router and runs the experts, which scales their sum (``apply_routed_scale_to_output``). Which of the
    two depends on model, kernel and platform; the other one is told 1. Same in vLLM 0.30 to 0.32.
    """
    return [float(getattr(module, "routed_scaling_factor", 1.0)) for _, module, _ in routers]


def describe_worker(runner: Any, routers: list[tuple[int, torch.nn.Module, Any]]) -> dict[str, Any]:
    """What was really loaded and selected in this worker."""
    parameters = {str(parameter.dtype).removeprefix("torch.") for parameter in runner.model.parameters()}
    backends = {group.backend.get_name() for groups in getattr(runner, "attn_groups", []) for group in groups}
    quant_methods = [getattr(_experts(module), "quant_method", None) for _, module, _ in routers]
    return {
        "decoder_layers": [layer for layer, _, _ in routers],
        "n_experts": sorted({int(getattr(r, "global_num_experts", 0)) for _, _, r in routers}),
        "top_k": sorted({int(getattr(r, "top_k", 0)) for _, _, r in routers}),
        "router_rule": {
            name: value
            for name in _RULE_ATTRIBUTES
            if (value := getattr(routers[0][2], name, None) if routers else None) is not None
        },
        "scale_after_experts": sorted(set(scales_after_experts(routers))),
        "weights_on_input": any(
            bool(getattr(_experts(m), "apply_router_weight_on_input", False)) for _, m, _ in routers
        ),
        "router_classes": sorted({type(r).__name__ for _, _, r in routers}),
        "experts_kernel": sorted({type(method).__name__ for method in quant_methods if method is not None}),
        "is_monolithic": any(bool(getattr(method, "is_monolithic", False)) for method in quant_methods),
        "has_correction_bias": correction_bias([router for _, _, router in routers]) is not None,
        "eplb": any(getattr(r, "eplb_state", None) is not None for _, _, r in routers),
        "parameter_dtypes": sorted(parameters),
        "model_class": type(runner.model).__name__,
        "runner_class": type(runner).__name__,
        "attention_backends": sorted(backends),
        "device": str(runner.device),
        "n_threads": torch.get_num_threads(),
        "kernels": vllm_kernels(runner),
        "dtypes": vllm_dtypes(runner),
        "process": process_facts(),
    }


def _experts(module: torch.nn.Module) -> Any:
    return getattr(module, "routed_experts", module)


def _tap_router(router: Any, layer: int, recorder: StepRecorder) -> Undo:
    original = router.select_experts

    def select_experts(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = original(*args, **kwargs)
        recorder.on_route(layer, kwargs["router_logits"] if "router_logits" in kwargs else args[1], weights, ids)
        return weights, ids

    router.select_experts = select_experts
    return lambda: delattr(router, "select_experts")
