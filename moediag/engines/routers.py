"""How a family's router chooses: what TopK compares, how many it keeps, in which decoder layers.

Derived from config.json, then held against the loaded model by each engine. A family that is not listed
here is refused: a router read by the wrong rule gives numbers that look right and are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moediag.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RouterSpec:
    """A softmax router: choice scores are softmax(logits) over all E experts, TopK takes the K largest.

    Args:
        family: ``model_type`` of config.json.
        n_experts, top_k: E and K.
        score_function: ``softmax``; what TopK compares.
        renormalize: gate weights are divided by their sum.
        decoder_layers: decoder layer of every MoE layer, in order.
    """

    family: str
    n_experts: int
    top_k: int
    score_function: str
    renormalize: bool
    decoder_layers: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.decoder_layers)


@dataclass(frozen=True)
class _Family:
    renormalize: Callable[[dict[str, Any]], bool]
    is_sparse: Callable[[dict[str, Any], int], bool]


def _qwen_sparse(config: dict[str, Any], layer: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0


def _always(config: dict[str, Any], layer: int) -> bool:
    return True


_FAMILIES = {
    "qwen3_moe": _Family(lambda c: bool(c.get("norm_topk_prob", False)), _qwen_sparse),
    "qwen2_moe": _Family(lambda c: bool(c.get("norm_topk_prob", False)), _qwen_sparse),
    "olmoe": _Family(lambda c: bool(c.get("norm_topk_prob", False)), _always),
    "mixtral": _Family(lambda c: True, _always),
}
# Published checkpoints and transformers 5 write E under different names for the same family.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def supported_families() -> tuple[str, ...]:
    """MoE families whose routing this version captures."""
    return tuple(sorted(_FAMILIES))


def router_spec(config: dict[str, Any], where: str) -> RouterSpec | None:
    """The routing that config.json describes; None for a dense model.

    Raises:
        CheckpointError: the model has experts and its family is not supported, or E and K make no sense.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    family = str(text.get("model_type"))
    n_experts = next((int(text[key]) for key in _EXPERT_KEYS if text.get(key)), 0)
    if family not in _FAMILIES:
        if n_experts > 1:
            raise CheckpointError(
                f"{where}: the routing of MoE family {family} is not known to this version "
                f"(known: {', '.join(supported_families())}); refusing rather than recording margins by a wrong rule"
            )
        return None
    known = _FAMILIES[family]
    top_k = int(text.get("num_experts_per_tok") or 0)
    layers = tuple(i for i in range(int(text["num_hidden_layers"])) if known.is_sparse(text, i))
    if not layers or n_experts < 2:
        return None
    if not 1 <= top_k <= n_experts:
        raise CheckpointError(f"{where}: num_experts_per_tok = {top_k} with {n_experts} experts; fix config.json")
    return RouterSpec(family, n_experts, top_k, "softmax", known.renormalize(text), layers)


def choice_scores(logits_NE: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """What TopK compares, in float32: (N, E) -> (N, E)."""
    import torch

    if spec.score_function != "softmax":
        raise ValueError(f"score function {spec.score_function} is not implemented")
    return torch.softmax(logits_NE, dim=-1, dtype=torch.float32)


def margins(logits_NE: torch.Tensor, ids_NK: torch.Tensor, spec: RouterSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Choice-score margin and logit margin of each row, float32.

    Args:
        logits_NE: raw router logits as the router gave them.
        ids_NK: the experts really used.

    Returns:
        ``(margin_N, logit_margin_N)``: the K-th minus the (K+1)-th choice score (>= 0), and the smallest used
        minus the largest unused raw logit. Infinite when K = E: nothing competes.
    """
    import torch

    logits_NE = logits_NE.float()
    if spec.top_k == spec.n_experts:
        unrivalled = torch.full(logits_NE.shape[:1], torch.inf, device=logits_NE.device)
        return unrivalled, unrivalled.clone()
    best = torch.topk(choice_scores(logits_NE, spec), spec.top_k + 1, dim=-1).values
    used_N = logits_NE.gather(1, ids_NK.long()).amin(dim=1)
    unused_N = logits_NE.scatter(1, ids_NK.long(), -torch.inf).amax(dim=1)
    return best[:, -2] - best[:, -1], used_N - unused_N


def apply_rule(logits_NE: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """The family's own rule on given router logits: expert ids (N, K), best first."""
    import torch

    return torch.topk(choice_scores(logits_NE, spec), spec.top_k, dim=-1).indices
