"""Lets vLLM's CPU build run experts in parallel: what its kernels lack, an expert map, is applied before them.

A plugin that vLLM loads in every process where this folder is on PYTHONPATH; only tests put it there. Everything else
of expert parallelism is vLLM's own: who holds which experts, how weights are loaded, routing, the sum over ranks.
"""

from __future__ import annotations

from typing import Any


class OfThisRank:
    """Takes the model's expert ids, hands on those of this rank; another rank's expert is run there."""

    def apply(self, *args: Any, topk_weights: Any, topk_ids: Any, expert_map: Any, **kwargs: Any) -> None:
        if expert_map is not None:
            own = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(own < 0, 0.0)
            topk_ids = own.clamp(min=0).to(topk_ids.dtype)
        super().apply(*args, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **kwargs)  # type: ignore[misc]


def register() -> None:
    """Put it before the kernels that this suite's models get."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in ("CPUUnquantizedExperts", "X86CPUUnquantizedExperts"):
        kernel = getattr(cpu_moe, name)
        if not issubclass(kernel, OfThisRank):
            setattr(cpu_moe, name, type(name, (OfThisRank, kernel), {"__module__": __name__}))
