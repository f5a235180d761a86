"""BailingMoeV2 (Ling 2.0, Ring-mini-2.0) for transformers 5, which does not ship it.

Written from the architecture and the published tensors' names, in transformers' own building blocks, so that
attention kernels, expert kernels, device maps and output recording work as for a model of the library.
Held against numbers of the publisher's code and against vLLM's built-in model in tests/test_bailing.py.

Shapes: B sequences, T tokens of each, N = B T rows, H hidden size, D head size, E experts, K per token, G groups.

Invariants:
    - the router works in float32 from the logits on (vLLM rounds its logits to the model's dtype first: in bf16 the
      two may choose differently at near ties); bias and groups decide who is chosen, never with what weight;
    - ``gate`` returns ``(logits_NE, weights_NK, ids_NK)`` and ``experts`` receives ``(hidden_NH, ids_NK, weights_NK)``;
    - the last TopK of a router is ``torch.topk`` over all E, and weights are gathered afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as everyone calls it
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moediag.engines import bailing_config
from moediag.engines.bailing_config import BailingMoeV2Config, check_supported

_ROUTER_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


class BailingMoeV2RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm each row; scaled after the cast back, as every family of the library does."""
        exact = hidden.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(hidden.dtype)


def rotary_tables(config: BailingMoeV2Config, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, float32, (B, 1, T, rotary / 2); computed anew, kept nowhere."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        rotary = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, rotary, 2, dtype=torch.float32, device=position_BT.device) / rotary
        frequency, scale = rope["rope_theta"] ** -exponent, 1.0
    else:
        frequency, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, position_BT.device)
    angle = position_BT[:, None, :, None].float() * frequency
    return angle.cos() * scale, angle.sin() * scale


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of every head, the i-th with the (i + rotary / 2)-th; the rest passes through."""
    half = cos.shape[-1]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Plain attention with a float32 softmax; states are (B, heads, T, D), the result (B, T, heads, D)."""
    n_shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n_shared, dim=1), value.repeat_interleave(n_shared, dim=1)
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=kwargs["dropout"], training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class BailingMoeV2Attention(nn.Module):
    """Grouped-query attention: one fused projection, queries and keys normed per head, part of each head rotated."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.scaling = config.head_dim**-0.5
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width = sum(self.heads) * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.use_qkv_bias)
        self.dense = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.query_layernorm = BailingMoeV2RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_layernorm = BailingMoeV2RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) -> (B, T, H) and, from the eager kernel only, the attention weights."""
        fused = self.query_key_value(hidden).unflatten(-1, (-1, self.config.head_dim))
        query, key, value = fused.split(self.heads, dim=2)
        if self.config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = rotate(query, *tables), rotate(key, *tables)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.dense(attended.flatten(2)), weights


class BailingMoeV2MLP(nn.Module):
    """Gated feed-forward network: dense layers and the shared expert."""

    def __init__(self, config: BailingMoeV2Config, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class BailingMoeV2Gate(nn.Module):
    """Sigmoid router: K experts of the best groups by biased score, weighted by their unbiased scores."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = _ROUTER_DTYPES[config.router_dtype]
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(logits_NE, weights_NK, ids_NK)``; logits in the router's dtype, before the sigmoid."""
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        dtype = self.dtype or hidden.dtype
        logits_NE = F.linear(hidden_NH.to(dtype), self.weight.to(dtype))
        scores_NE = logits_NE.float().sigmoid()
        choice_NE = self._within_best_groups(scores_NE + self.expert_bias)
        ids_NK = torch.topk(choice_NE, k=self.config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(1, ids_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_NE, weights_NK * self.config.routed_scaling_factor, ids_NK

    def _within_best_groups(self, choice_NE: Tensor) -> Tensor:
        """-inf outside the best groups; a group counts as much as its two best experts together."""
        n_groups, n_kept = self.config.n_group, self.config.topk_group
        if not n_groups or not n_kept or n_groups == n_kept:
            return choice_NE
        choice_NGe = choice_NE.view(len(choice_NE), n_groups, -1)
        group_NG = choice_NGe.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.topk(group_NG, k=n_kept, dim=-1, sorted=False).indices
        is_out_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(1, kept, False)
        return choice_NGe.masked_fill(is_out_NG[:, :, None], -torch.inf).view_as(choice_NE)


@use_experts_implementation
class BailingMoeV2Experts(nn.Module):
    """All experts of a layer in two tensors, so that the library's grouped kernels can take over from this loop."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of each row's experts, one expert after the other: (N, H) -> (N, H)."""
        sum_NH = torch.zeros_like(hidden_NH)
        for expert in torch.unique(ids_NK).tolist():
            row, slot = torch.where(ids_NK == expert)
            gate, up = F.linear(hidden_NH[row], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights_NK[row, slot, None]
            sum_NH.index_add_(0, row, output.to(sum_NH.dtype))
        return sum_NH


class BailingMoeV2SparseMoeBlock(nn.Module):
    """Router, routed experts and the shared expert that every token takes."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.gate = BailingMoeV2Gate(config)
        self.experts = BailingMoeV2Experts(config)
        shared_width = config.moe_shared_expert_intermediate_size * config.num_shared_experts
        self.shared_experts = BailingMoeV2MLP(config, shared_width) if shared_width else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        _, weights_NK, ids_NK = self.gate(hidden)
        routed: Tensor = self.experts(hidden.flatten(0, 1), ids_NK, weights_NK).view_as(hidden)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden)


class BailingMoeV2DecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and feed-forward, each normed before and added after; the first layers are dense."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        is_dense = layer_idx < config.first_k_dense_replace
        self.input_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = BailingMoeV2Attention(config, layer_idx)
        self.post_attention_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BailingMoeV2MLP(config, config.intermediate_size) if is_dense else BailingMoeV2SparseMoeBlock(config)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, H) -> (B, T, H); everything else goes to the attention."""
        attended, _ = self.attention(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + attended
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class BailingMoeV2PreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What loading, saving, device placement and output recording need to know."""

    config: BailingMoeV2Config
    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ("BailingMoeV2DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # vLLM keeps both in float32 too; a bf16 copy of the bias would move borders between experts.
    _keep_in_fp32_modules_strict = ("mlp.gate.weight", "mlp.gate.expert_bias")
    _can_record_outputs = {  # noqa: RUF012  # the library reads a plain dict off the class
        "hidden_states": BailingMoeV2DecoderLayer,
        "attentions": BailingMoeV2Attention,
        "router_logits": OutputRecorder(BailingMoeV2Gate, index=0),
    }

    def __init__(self, config: BailingMoeV2Config, *args: Any, **kwargs: Any) -> None:
        check_supported(config)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BailingMoeV2Gate):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.expert_bias)
        elif isinstance(module, BailingMoeV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BailingMoeV2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states after the last norm, (B, T, H)."""
        hidden = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            n_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(n_past, n_past + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        cos, sin = rotary_tables(self.config, position_ids)
        tables = cos.to(hidden.dtype), sin.to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(
                hidden, tables=tables, mask=mask, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the rows to keep: the last so many (0: all), or those an index tensor names."""
        outputs = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        passed_on = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MoeCausalLMOutputWithPast(logits=logits, **passed_on)


def register() -> None:
    """Let the Auto classes load BailingMoeV2 with the classes of this module; does nothing the second time.

    Nor does it where transformers has a class of its own for the model type.
    """
    bailing_config.register()
    if CONFIG_MAPPING[bailing_config.MODEL_TYPE] is not BailingMoeV2Config:
        return
    AutoModelForCausalLM.register(BailingMoeV2Config, BailingMoeV2ForCausalLM, exist_ok=True)
    # Checkpoints hold each expert's matrices by themselves; the library fuses those of this family as ours need it.
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(bailing_config.MODEL_TYPE, mapping, overwrite=True)
