"""The rules of routers, as data, and what they give for logits: choice scores, expert ids, gate weights, margins.

No family is listed: which rule a router follows is shown on the loaded router (:mod:`.proof`).

A router chooses in this order (any step may be absent): score = f(logit); choice score = score + correction bias; keep
the best groups (by their best choice score, or the sum of their two best); take the K best. The gate weight comes from
the *score*, never from the bias.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moediag.errors import CheckpointError
from moediag.run.records import Router, RouterSpec

if TYPE_CHECKING:
    import torch

SOFTMAX, SIGMOID, LOGIT, SQRTSOFTPLUS = "softmax", "sigmoid", "logit", "sqrtsoftplus"
SCORES, SOFTMAX_OF_CHOSEN, UNKNOWN = "scores", "softmax_of_chosen", "unknown"
TWO_BEST, BEST = "two_best", "best"


@dataclass(frozen=True)
class ModelRouting:
    """The rule by which every MoE layer of a model chooses its experts.

    Args:
        decoder_layers: of every MoE layer, in order; the other fields are E, K and those of
            :class:`~moediag.run.records.RouterSpec`; ``unknown`` where no rule is shown.
        scales_input: the gate weight multiplies an expert's input and not its output.
        scores_in_float32: the router's logits are float32 whatever the model's dtype.
        bias_name, expert_scale_name: which of a block's vectors (:attr:`~.hf.taps.Block.vectors`) they are.
        logits_output: which of the router's outputs are its logits; None where it returns none.
        factor_after_experts: what transformers' block multiplies the experts' sum by.
        proof: how the rule is known, or why not.
    """

    family: str
    n_experts: int
    top_k: int
    score_function: str
    has_correction_bias: bool
    n_group: int
    topk_group: int
    gate: str
    renormalize: bool
    scaling_factor: float
    n_shared_experts: int
    decoder_layers: tuple[int, ...]
    scales_input: bool = False
    scores_in_float32: bool = False
    group_score: str = TWO_BEST
    masked_value: str = "-inf"
    epsilon: float = 0.0
    has_expert_scale: bool = False
    bias_name: str = ""
    expert_scale_name: str = ""
    logits_output: int | None = 0
    factor_after_experts: float = 1.0
    proof: str = ""

    @property
    def n_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.decoder_layers)

    @property
    def has_rule(self) -> bool:
        """How experts are chosen is known: margins can be told."""
        return self.score_function != UNKNOWN

    def routers(self) -> tuple[Router, ...]:
        """One record per MoE layer."""
        rule = {key: value for key, value in asdict(self).items() if key in RouterSpec.model_fields}
        spec = RouterSpec(**rule) if self.has_rule else None
        return tuple(
            Router(decoder_layer=layer, n_experts=self.n_experts, top_k=self.top_k, spec=spec, proof=self.proof)
            for layer in self.decoder_layers
        )

    @classmethod
    def of_routers(cls, routers: Sequence[Router]) -> ModelRouting:
        """From records that all have the same known rule.

        Raises:
            CheckpointError: they do not.
        """
        rules = {(router.n_experts, router.top_k, router.spec) for router in routers}
        n_experts, top_k, spec = next(iter(rules), (0, 0, None))
        if len(rules) != 1 or spec is None:
            raise CheckpointError(f"{len(rules)} rules of {len(routers)} routers, expected one known rule for all")
        layers = tuple(router.decoder_layer for router in routers)
        return cls(**spec.content(), n_experts=n_experts, top_k=top_k, decoder_layers=layers)

    def record(self) -> dict[str, Any]:
        """In plain types, as an engine process receives it."""
        return {**asdict(self), "decoder_layers": list(self.decoder_layers)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ModelRouting:
        """From plain types."""
        return cls(**{**record, "decoder_layers": tuple(record["decoder_layers"])})


# transformers 5 does not write these; without them vLLM builds another model than the family's, or none. None: whatever
# the model has, by another name or not at all in transformers' configuration.
_NEEDED_BY_VLLM: dict[str, dict[str, Any]] = {
    "afmoe": {"route_norm": True, "score_func": "sigmoid", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "hy_v3": {"route_norm": True, "qk_norm": True, "expert_hidden_dim": None, "first_k_dense_replace": None},
    "mimo_v2_flash": {
        "add_swa_attention_sink_bias": True,
        **dict.fromkeys(
            ("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "sliding_window_size", "rope_theta",
             "swa_rope_theta", "partial_rotary_factor", "swa_num_attention_heads", "swa_num_key_value_heads",
             "swa_head_dim", "swa_v_head_dim")
        ),
    },
}  # fmt: skip


def refuse_ambiguous_rule(config: dict[str, Any], where: str) -> None:
    """Refuse a config.json that the two engines would read as two different models.

    Raises:
        CheckpointError: names the entries to add.
    """
    text = text_config(config)
    needed = _NEEDED_BY_VLLM.get(str(text.get("model_type")), {})
    lacking = [
        key if value is None else f"{key}: {value!r}"
        for key, value in needed.items()
        if key not in text or (value is not None and text[key] != value)
    ]
    if lacking:
        raise CheckpointError(
            f"{where}/config.json lacks {', '.join(lacking)}, which vLLM needs to build this family's model "
            "(transformers does not write it); add it there"
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


_NO_COUNT = re.compile("per_tok|shared|top_?k|group")
"""Keys that name experts without counting the routed ones: how many a token uses, those that every token passes."""


def has_experts(config: Any) -> bool:
    """True where config.json, or any part of it however deep, counts more than one routed expert.

    Configs nest (dbrx: ``ffn_config``; qwen3_omni_moe: ``thinker_config.text_config``) and some count by layer.

    Raises:
        ValueError: a count is no number.
    """
    if isinstance(config, list):
        return any(map(has_experts, config))
    if not isinstance(config, dict):
        return False
    counts = [value for key, value in config.items() if "experts" in key and not _NO_COUNT.search(key)]
    numbers = [value for key, value in config.items() if re.match("(moe_)?n(um)?_.*experts$", key)]
    if any(isinstance(value, str) for value in numbers):
        raise ValueError(f"a count of experts that is no number: {numbers}")
    return any(_is_several(value) for value in counts) or any(map(has_experts, config.values()))


def _is_several(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return any(isinstance(number, int | float) and number > 1 for number in numbers)


def choice_scores(logits: torch.Tensor, spec: ModelRouting, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What TopK compares, in float32: (..., E) -> (..., E); experts of groups that lost are -inf.

    Args:
        logits: raw router logits.
        bias: correction bias, broadcastable to ``logits``; needed where the family has one.
    """
    import torch

    scores = scores_of(logits, spec.score_function)
    if spec.has_correction_bias:
        if bias is None:
            raise ValueError(f"{spec.family}: the choice needs the correction bias")
        scores = scores + bias.float()
    if spec.topk_group == spec.n_group:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], spec.n_group, -1)
    kept = torch.topk(group_scores(scores, spec), spec.topk_group, dim=-1).indices
    lost = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, kept, False)
    return grouped.masked_fill(lost[..., None], float(spec.masked_value)).flatten(-2)


def scores_of(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores before any bias, float32: (..., E) -> (..., E)."""
    import torch

    logits = logits.float()
    if score_function == SOFTMAX:
        return torch.softmax(logits, dim=-1)
    if score_function == SIGMOID:
        return logits.sigmoid()
    return torch.nn.functional.softplus(logits).sqrt() if score_function == SQRTSOFTPLUS else logits


def group_scores(scores: torch.Tensor, spec: ModelRouting) -> torch.Tensor:
    """Score of each group, its best or the sum of its two best: (..., E) -> (..., n_group)."""
    import torch

    grouped = scores.reshape(*scores.shape[:-1], spec.n_group, -1)
    n_best = 1 if spec.group_score == BEST else min(2, grouped.shape[-1])
    best: torch.Tensor = torch.topk(grouped, n_best, dim=-1).values
    return best.sum(-1)


def gate_weights(
    logits: torch.Tensor, ids: torch.Tensor, spec: ModelRouting, expert_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The coefficients of chosen experts, float32: logits (..., E), ids (..., K) -> (..., K).

    Args:
        expert_scale: learned factor per expert, (E,); needed where the rule has one.
    """
    import torch

    ids = ids.long()
    if spec.gate == SCORES:
        weights = scores_of(logits, spec.score_function).gather(-1, ids)
    else:
        chosen = logits.float().gather(-1, ids)
        weights = chosen.sigmoid() if spec.gate == SIGMOID else torch.softmax(chosen, dim=-1)
    if spec.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.epsilon)
    weights = weights * spec.scaling_factor
    if spec.has_expert_scale:
        if expert_scale is None:
            raise ValueError(f"{spec.family}: the gate needs the factors of the experts")
        weights = weights * expert_scale.float()[ids]
    return weights


def margins(
    logits: torch.Tensor, ids: torch.Tensor, spec: ModelRouting, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choice-score margin and logit margin of each choice, float32.

    Args:
        logits: raw router logits as the router gave them, (..., E).
        ids: the experts really used, (..., K).
        bias: correction bias, broadcastable to ``logits``.

    Returns:
        ``(margin, logit_margin)``, each (...): the K-th minus the (K+1)-th choice score (>= 0), within the groups
        that were kept; and the smallest used minus the largest unused raw logit, negative where a bias or a group
        rule overruled the logits. Infinite where nothing competes (K experts in all).
    """
    import torch

    logits = logits.float()
    if spec.top_k == spec.n_experts:
        unrivalled = torch.full(logits.shape[:-1], torch.inf, device=logits.device)
        return unrivalled, unrivalled.clone()
    best = torch.topk(choice_scores(logits, spec, bias), spec.top_k + 1, dim=-1).values
    used = logits.gather(-1, ids.long()).amin(dim=-1)
    unused = logits.scatter(-1, ids.long(), -torch.inf).amax(dim=-1)
    return best[..., -2] - best[..., -1], used - unused


def apply_rule(logits: torch.Tensor, spec: ModelRouting, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The family's own rule on given router logits: expert ids (..., K), best first."""
    import torch

    return torch.topk(choice_scores(logits, spec, bias), spec.top_k, dim=-1).indices
