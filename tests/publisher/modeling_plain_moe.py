"""Qwen3-MoE and Phi-MoE in plain PyTorch, as a publisher ships modelling code beside weights: one token table, no
kernels, no cache, every expert on its own. Written from what the models are defined as, for the tests of the reference
arm; it shares no code with transformers' own classes, nor with vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)).to(hidden.dtype)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.n_heads * self.width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv * self.width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv * self.width, bias=bias)
        self.o_proj = nn.Linear(self.n_heads * self.width, config.hidden_size, bias=bias)
        self.has_norms = config.model_type == "qwen3_moe"
        if self.has_norms:
            self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps)
        self.theta = float(config.rope_parameters["rope_theta"])

    def rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary positions, halves of a head turned against each other; (B, heads, T, width)."""
        half = self.width // 2
        frequency = self.theta ** (-torch.arange(half, device=heads.device, dtype=torch.float32) / half)
        angle = torch.arange(heads.shape[2], device=heads.device, dtype=torch.float32)[:, None] * frequency
        cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        n, length, _ = hidden.shape
        query = self.q_proj(hidden).view(n, length, self.n_heads, self.width)
        key = self.k_proj(hidden).view(n, length, self.n_kv, self.width)
        value = self.v_proj(hidden).view(n, length, self.n_kv, self.width).transpose(1, 2)
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self.rotated(query.transpose(1, 2)), self.rotated(key.transpose(1, 2))
        key, value = (one.repeat_interleave(self.n_heads // self.n_kv, 1) for one in (key, value))
        scores = (query @ key.transpose(2, 3)) / self.width**0.5
        future = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).float().softmax(-1).to(value.dtype)
        return self.o_proj((weights @ value).transpose(1, 2).reshape(n, length, -1))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); Phi-MoE calls them w1, w3 and w2."""

    def __init__(self, hidden: int, inner: int, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        for name, (wide, narrow) in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            setattr(self, name, nn.Linear(wide, narrow, bias=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(nn.functional.silu(gate(hidden)) * up(hidden))


class MoE(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.is_phi, self.top_k = config.model_type == "phimoe", config.num_experts_per_tok
        n_experts = config.num_local_experts
        inner = config.intermediate_size if self.is_phi else config.moe_intermediate_size
        names = ("w1", "w3", "w2") if self.is_phi else ("gate_proj", "up_proj", "down_proj")
        self.gate = nn.Linear(config.hidden_size, n_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(config.hidden_size, inner, names) for _ in range(n_experts))
        self.renormalise = getattr(config, "norm_topk_prob", False)
        self.jitter = getattr(config, "router_jitter_noise", 0.0)

    def chosen(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, experts) of every row."""
        if not self.is_phi:
            weights, ids = logits.float().softmax(-1).topk(self.top_k, -1)
            return (weights / weights.sum(-1, keepdim=True) if self.renormalise else weights).to(logits.dtype), ids
        open_, weights, ids = logits, [], []
        for _ in range(2):  # the best, its weight among those near it; then the same of the others
            best, index = open_.max(-1, keepdim=True)
            is_far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            near = open_.masked_fill(is_far, float("-inf")).softmax(-1)
            weights.append(near.gather(-1, index))
            ids.append(index)
            open_ = open_.scatter(-1, index, float("-inf"))
        return torch.cat(weights, -1), torch.cat(ids, -1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = self.chosen(self.gate(rows))
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            row, slot = (ids == i).nonzero(as_tuple=True)
            if len(row):
                out.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return out.view_as(hidden)


class Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        is_phi = config.model_type == "phimoe"
        norm = nn.LayerNorm if is_phi else RMSNorm
        self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        if is_phi:
            self.block_sparse_moe = MoE(config)
        elif index in config.mlp_only_layers:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, ("gate_proj", "up_proj", "down_proj"))
        else:
            self.mlp = MoE(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        block = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        return hidden + block(self.post_attention_layernorm(hidden))


class Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        norm = nn.LayerNorm if config.model_type == "phimoe" else RMSNorm
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


class PlainMoEForCausalLM(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=getattr(config, "lm_head_bias", False))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))
