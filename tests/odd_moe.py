"""A model class of no list in both engines: Qwen3-MoE with another router; vLLM finds it through a plugin.

Its gate weights are 1.7 times the sigmoids of the chosen logits. It chooses the largest logits, or, where config.json
has ``odd_choice``, the largest sines of them, which no rule of moediag's explains.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

FACTOR = 1.7


def odd_routes(logits: torch.Tensor, top_k: int, is_odd: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights and expert ids."""
    scores = logits.float().sigmoid()
    ids = torch.topk(torch.sin(3 * logits.float()) if is_odd else scores, top_k, dim=-1).indices
    return scores.gather(-1, ids) * FACTOR, ids


class OddMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's."""

    model_type = "odd_moe"


class OddRouter(modeling_qwen3_moe.Qwen3MoeTopKRouter):  # type: ignore[misc]
    """transformers' side."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.is_odd = getattr(config, "odd_choice", False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        weights, ids = odd_routes(logits, self.top_k, self.is_odd)
        return logits, weights.to(logits.dtype), ids


class OddMoeForCausalLM(modeling_qwen3_moe.Qwen3MoeForCausalLM):  # type: ignore[misc]
    """transformers' model."""

    config_class = OddMoeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = OddRouter(config)


def register() -> None:
    """In transformers."""
    AutoConfig.register("odd_moe", OddMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddMoeConfig, OddMoeForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("odd_moe", mapping, overwrite=True)


def register_in_vllm() -> None:
    """In each of vLLM's processes, by the plugin of :func:`write_plugin`."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    from vllm.model_executor.models import qwen3_moe

    def routes(is_odd: bool, gating_output: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return odd_routes(gating_output, topk, is_odd)

    class OddMoeOfVllm(qwen3_moe.Qwen3MoeForCausalLM):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            is_odd = getattr(vllm_config.model_config.hf_config, "odd_choice", False)
            factory = partial(FusedMoEFactory, custom_routing_function=partial(routes, is_odd))
            with patch.object(qwen3_moe, "FusedMoEFactory", factory):
                super().__init__(vllm_config=vllm_config, prefix=prefix)

    register()
    ModelRegistry.register_model("OddMoeForCausalLM", OddMoeOfVllm)


def write_plugin(folder: Path) -> Path:
    """What an installed package would leave for vLLM to find, for the path of its process."""
    about = folder / "odd_moe-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: odd_moe\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nodd_moe = odd_moe:register_in_vllm\n")
    return folder
