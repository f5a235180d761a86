"""How a family's router chooses: what TopK compares, how many it keeps, in which decoder layers.

Derived from config.json, then held against the loaded model by each engine. A family that is not listed
here is refused: a router read by the wrong rule gives numbers that look right and are not.

A router chooses in this order (any step may be absent in a family): score = f(logit); choice score =
score + correction bias; keep the best groups (by the sum of their two best choice scores); take the K best.
The gate weight comes from the *score*, never from the bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moediag.errors import CheckpointError
from moediag.run.records import Router, RouterSpec

if TYPE_CHECKING:
    import torch

SOFTMAX, SIGMOID, LOGIT = "softmax", "sigmoid", "logit"


@dataclass(frozen=True)
class ModelRouting:
    """The rule by which every MoE layer of a model chooses its experts.

    Args:
        decoder_layers: of every MoE layer, in order; the fields before it are E, K and those of
            :class:`~moediag.run.records.RouterSpec`.
        scales_input: the gate weight multiplies an expert's input and not its output.
        scores_in_float32: the router's logits are float32 whatever the model's dtype.
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

    @property
    def n_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.decoder_layers)

    def routers(self) -> tuple[Router, ...]:
        """One record per MoE layer."""
        rule = {key: value for key, value in asdict(self).items() if key in RouterSpec.model_fields}
        spec = RouterSpec(**rule)
        return tuple(
            Router(decoder_layer=layer, n_experts=self.n_experts, top_k=self.top_k, spec=spec, proof="config.json")
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
        if len(rules) != 1 or spec is None or spec.family not in _FAMILIES:
            raise CheckpointError(f"{len(rules)} rules of {len(routers)} routers, expected one known rule for all")
        layers, family = tuple(router.decoder_layer for router in routers), _FAMILIES[spec.family]
        return cls(
            **spec.content(),
            n_experts=n_experts,
            top_k=top_k,
            decoder_layers=layers,
            scales_input=family.scales_input,
            scores_in_float32=family.scores_in_float32,
        )

    def record(self) -> dict[str, Any]:
        """In plain types, as an engine process receives it."""
        return {**asdict(self), "decoder_layers": list(self.decoder_layers)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ModelRouting:
        """From plain types."""
        return cls(**{**record, "decoder_layers": tuple(record["decoder_layers"])})


@dataclass(frozen=True)
class _Family:
    """How config.json of a family is to be read."""

    score_function: str
    is_sparse: Callable[[dict[str, Any], int], bool]
    gate: str = "scores"
    renormalize: Callable[[dict[str, Any]], bool] = lambda c: bool(c.get("norm_topk_prob", False))
    has_bias: Callable[[dict[str, Any]], bool] = lambda c: False
    is_grouped: bool = False
    shared: Callable[[dict[str, Any]], int] = lambda c: 0
    scales_input: bool = False
    scores_in_float32: bool = False


# transformers 5 does not write these; without them vLLM builds another router than the family's, or none.
_NEEDED_BY_VLLM = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}


def refuse_ambiguous_rule(config: dict[str, Any], where: str) -> None:
    """Refuse a config.json that the two engines would read as two different routers.

    Raises:
        CheckpointError: names the entries to add.
    """
    text = text_config(config)
    needed = _NEEDED_BY_VLLM.get(str(text.get("model_type")), {})
    lacking = {key: value for key, value in needed.items() if text.get(key) != value}
    if lacking:
        raise CheckpointError(
            f"{where}/config.json lacks {', '.join(f'{key}: {value!r}' for key, value in lacking.items())}, which vLLM "
            "needs to build this family's router (transformers does not write it); add it there"
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _always(config: dict[str, Any], layer: int) -> bool:
    return True


def _qwen_sparse(config: dict[str, Any], layer: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0


def _after_dense_layers(config: dict[str, Any], layer: int) -> bool:
    frequency = config.get("moe_layer_freq") or 1
    return layer >= int(config.get("first_k_dense_replace") or 0) and layer % frequency == 0


def _llama4_sparse(config: dict[str, Any], layer: int) -> bool:
    listed = config.get("moe_layers")
    step = config.get("interleave_moe_layer_step") or 1
    return layer in listed if listed is not None else (layer + 1) % step == 0


_DEEPSEEK = _Family(
    SIGMOID,
    _after_dense_layers,
    has_bias=lambda c: True,
    is_grouped=True,
    shared=lambda c: int(c.get("n_shared_experts") or 0),
    scores_in_float32=True,
)
_BAILING = _Family(
    SIGMOID,
    _after_dense_layers,
    has_bias=lambda c: bool(c.get("moe_router_enable_expert_bias", False)),
    is_grouped=True,
    shared=lambda c: int(c.get("num_shared_experts") or 0),
    scores_in_float32=True,
)
_CHOSEN_SOFTMAX = _Family(LOGIT, _always, gate="softmax_of_chosen", renormalize=lambda c: False)
_FAMILIES = {
    "bailing_moe": _BAILING,
    "deepseek_v3": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "gpt_oss": _CHOSEN_SOFTMAX,
    "granitemoe": replace(_CHOSEN_SOFTMAX, scores_in_float32=True),
    "llama4_text": _Family(
        LOGIT, _llama4_sparse, gate="sigmoid", renormalize=lambda c: False, shared=lambda c: 1, scales_input=True
    ),
    "mixtral": _Family(SOFTMAX, _always, renormalize=lambda c: True),
    "olmoe": _Family(SOFTMAX, _always),
    "qwen2_moe": _Family(SOFTMAX, _qwen_sparse, shared=lambda c: 1),
    "qwen3_moe": _Family(SOFTMAX, _qwen_sparse),
}
# Published checkpoints and transformers 5 write E under different names for the same family.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NO_COUNT = re.compile("per_tok|shared|top_?k|group")
"""Keys that name experts without counting the routed ones: how many a token uses, those that every token passes."""


def supported_families() -> tuple[str, ...]:
    """MoE families whose routing this version captures."""
    return tuple(sorted(_FAMILIES))


def router_spec(config: dict[str, Any], where: str) -> ModelRouting | None:
    """The routing that config.json describes; None for a dense model.

    Raises:
        CheckpointError: the model has experts and its family is not supported, or E, K or groups make no sense.
    """
    text = text_config(config)
    family = str(text.get("model_type"))
    is_known = family in _FAMILIES
    n_experts = next((int(text[key]) for key in _EXPERT_KEYS if text.get(key)), 0) if is_known else 0
    if n_experts < 2:
        if has_experts(config):
            raise CheckpointError(
                f"{where}: the routing of MoE family {family} is not known to this version "
                f"(known: {', '.join(supported_families())}); refusing rather than recording margins by a wrong rule"
            )
        return None
    known = _FAMILIES[family]
    layers = tuple(i for i in range(int(text["num_hidden_layers"])) if known.is_sparse(text, i))
    if not layers:
        return None
    return _checked(
        ModelRouting(
            family=family,
            n_experts=n_experts,
            top_k=int(text.get("num_experts_per_tok") or 0),
            score_function=known.score_function,
            has_correction_bias=known.has_bias(text),
            n_group=int(text.get("n_group") or 1) if known.is_grouped else 1,
            topk_group=int(text.get("topk_group") or 1) if known.is_grouped else 1,
            gate=known.gate,
            renormalize=known.renormalize(text),
            scaling_factor=float(text.get("routed_scaling_factor") or 1.0) if known.is_grouped else 1.0,
            n_shared_experts=known.shared(text),
            decoder_layers=layers,
            scales_input=known.scales_input,
            scores_in_float32=known.scores_in_float32,
        ),
        where,
    )


def has_experts(config: Any) -> bool:
    """True where config.json, or any part of it however deep, counts more than one routed expert.

    Configs nest (dbrx: ``ffn_config``; qwen3_omni_moe: ``thinker_config.text_config``) and some count by layer.
    """
    if isinstance(config, list):
        return any(map(has_experts, config))
    if not isinstance(config, dict):
        return False
    counts = (value for key, value in config.items() if "experts" in key and not _NO_COUNT.search(key))
    return any(_is_several(value) for value in counts) or any(map(has_experts, config.values()))


def _is_several(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return any(isinstance(number, int | float) and number > 1 for number in numbers)


def _checked(spec: ModelRouting, where: str) -> ModelRouting:
    if not 1 <= spec.top_k <= spec.n_experts:
        raise CheckpointError(
            f"{where}: num_experts_per_tok = {spec.top_k} with {spec.n_experts} experts; fix config.json"
        )
    if spec.n_experts % spec.n_group or not 1 <= spec.topk_group <= spec.n_group:
        raise CheckpointError(
            f"{where}: {spec.n_experts} experts in {spec.n_group} groups, {spec.topk_group} kept; fix config.json"
        )
    return spec


def choice_scores(logits: torch.Tensor, spec: ModelRouting, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What TopK compares, in float32: (..., E) -> (..., E); experts of groups that lost are -inf.

    Args:
        logits: raw router logits.
        bias: correction bias, broadcastable to ``logits``; needed where the family has one.
    """
    import torch

    logits = logits.float()
    if spec.score_function == SOFTMAX:
        scores = torch.softmax(logits, dim=-1)
    else:
        scores = logits.sigmoid() if spec.score_function == SIGMOID else logits
    if spec.has_correction_bias:
        if bias is None:
            raise ValueError(f"{spec.family}: the choice needs the correction bias")
        scores = scores + bias.float()
    if spec.topk_group == spec.n_group:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], spec.n_group, -1)
    kept = torch.topk(group_scores(scores, spec), spec.topk_group, dim=-1).indices
    lost = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, kept, False)
    return grouped.masked_fill(lost[..., None], -torch.inf).flatten(-2)


def group_scores(scores: torch.Tensor, spec: ModelRouting) -> torch.Tensor:
    """Score of each group, the sum of its two best: (..., E) -> (..., n_group)."""
    import torch

    grouped = scores.reshape(*scores.shape[:-1], spec.n_group, -1)
    best: torch.Tensor = torch.topk(grouped, min(2, grouped.shape[-1]), dim=-1).values
    return best.sum(-1)


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
