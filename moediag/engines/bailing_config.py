"""The configuration of BailingMoeV2 (Ling 2.0, Ring-mini-2.0): vLLM and transformers then load it without remote code.

vLLM imports this module in every one of its processes (entry point ``vllm.general_plugins``), also where moediag is not
at work: it must import nothing but transformers' configuration base, and must not change what other checkpoints mean.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

MODEL_TYPE = "bailing_moe"
ARCHITECTURE = "BailingMoeV2ForCausalLM"

# What the second generation does where config.json is silent. The first one (Ling-lite) shares the model type but
# not these, and vLLM asks for them with defaults of its own: for it they stay None, which vLLM reads as absent.
_V2_ONLY = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "use_qk_norm": True,
    "use_rmsnorm": True,
}

# Entries of which the model in bailing.py knows one value only; other members of the family use others.
_REQUIRED = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_rmsnorm": True,
    "use_bias": False,
    "norm_head": False,
    "norm_softmax": False,
    "embedding_dropout": 0,
    "output_dropout": 0,
}
_ROUTER_DTYPES = (None, "fp32", "bf16")
_ROPE_TYPES = ("default", "linear", "yarn")  # the others change their frequencies with the sequence's length


class BailingMoeV2Config(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """Configuration of BailingMoeV2: the entries of the published config.json, by default in Ring-mini-2.0's sizes.

    ``n_group`` or ``topk_group`` of None: experts are not grouped. ``rotary_dim`` counts the rotated dimensions of a
    head, as ``partial_rotary_factor`` does by share; the two must agree where both are given.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = None  # type: ignore[assignment]  # None becomes hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # filled from rope_theta and rope_scaling
    rotary_dim: int | None = None
    use_bias: bool = False
    use_qkv_bias: bool = False
    use_qk_norm: bool | None = None
    use_rmsnorm: bool | None = None
    norm_head: bool = False
    norm_softmax: bool = False
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    moe_shared_expert_intermediate_size: int = None  # type: ignore[assignment]  # None: as moe_intermediate_size
    first_k_dense_replace: int = 1
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    score_function: str | None = None
    router_dtype: str | None = None
    moe_router_enable_expert_bias: bool | None = None
    num_nextn_predict_layers: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what follows from other entries; rotary settings go to ``rope_parameters``, where both engines look."""
        if self.architectures is None or ARCHITECTURE in self.architectures:
            for name, value in _V2_ONLY.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_shared_expert_intermediate_size is None:
            self.moe_shared_expert_intermediate_size = self.moe_intermediate_size
        if self.rotary_dim is not None:
            kwargs.setdefault("partial_rotary_factor", self.rotary_dim / self.head_dim)
        super().__post_init__(**kwargs)
        share = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if self.rotary_dim is not None and int(self.head_dim * share) != self.rotary_dim:
            raise ValueError(
                f"rotary_dim = {self.rotary_dim} and partial_rotary_factor = {share} of head_dim = {self.head_dim} "
                "disagree; fix config.json"
            )


def register() -> None:
    """Let AutoConfig know the class; also an entry point of vLLM's plugins.

    Keeps a class that is already known under the model type: transformers' own, once it has one.
    """
    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, BailingMoeV2Config)


def check_supported(config: BailingMoeV2Config) -> None:
    """Refuse what the model in bailing.py would compute wrongly.

    Not done by the configuration itself: vLLM's own model may run what ours does not.

    Raises:
        ValueError: names every entry, what it is and what was expected.
    """
    rope_type = config.rope_parameters["rope_type"]
    wrong = [
        f"{name} = {getattr(config, name)!r} (expected {expected!r})"
        for name, expected in _REQUIRED.items()
        if getattr(config, name) != expected
    ]
    if config.router_dtype not in _ROUTER_DTYPES:
        wrong.append(f"router_dtype = {config.router_dtype!r} (expected one of {_ROUTER_DTYPES})")
    if rope_type not in _ROPE_TYPES:
        wrong.append(f"rope_type = {rope_type!r} (expected one of {_ROPE_TYPES})")
    if wrong:
        raise ValueError(f"this is not a BailingMoeV2 that moediag can run: {'; '.join(wrong)}")
