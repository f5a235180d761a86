"""One engine's routing rule on the other's logits: is it the logits that differ, or the rule?

Needs a run captured with ``--router-logits full`` and the transformers model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moediag.engines.hf.routing import prove_model, route
from moediag.engines.hf.taps import Block, find_blocks
from moediag.engines.routers import ModelRouting, apply_rule
from moediag.errors import CaptureError, IncompleteRunError
from moediag.run.reader import Run


@dataclass(frozen=True)
class RuleAgreement:
    """How often a rule, applied to an arm's recorded logits, gives the sets that arm used, for one MoE layer.

    Args:
        layer: MoE layer.
        n_rows: routed rows; exact ties at the TopK border are counted apart in ``n_exact_ties``.
        train_rule_rate: transformers' own router code, rows without exact ties; 1 = the engines share the rule.
        spec_rule_rate: moediag's ModelRouting, the same rows; 1 = margins are in the space TopK compares.
        plain_topk_rate: TopK of the raw logits, the contrast; below 1 where a bias or groups decide.
    """

    layer: int
    n_rows: int
    n_exact_ties: int
    train_rule_rate: float
    spec_rule_rate: float
    plain_topk_rate: float


def rule_agreement_by_layer(run: Run, model: Any, arm: str = "infer") -> list[RuleAgreement]:
    """Apply transformers' rule, moediag's and plain TopK to the logits that ``arm`` recorded.

    Args:
        model: the loaded transformers model of the run's checkpoint.

    Raises:
        IncompleteRunError: the arm holds no router logits.
    """
    named = prove_model(
        model, model.config.get_text_config().to_dict(), str(model.dtype).removeprefix("torch."), "here"
    ).routing
    spec = replace(ModelRouting.of_routers(run.arm(arm).routers), bias_name=named.bias_name)
    captures = [run.capture(arm, shard) for shard in run.shards]
    if any(capture.router_logits_TLE is None for capture in captures):
        raise IncompleteRunError(f"{run.path}: arm {arm} has no router logits; capture it with --router-logits full")
    blocks = find_blocks(model)
    ids_NLK = np.concatenate([c.expert_ids_TLK for c in captures if c.expert_ids_TLK is not None])
    logits_NLE = np.concatenate([c.router_logits_TLE for c in captures if c.router_logits_TLE is not None])
    margin_NL = np.concatenate([c.margin_TL for c in captures if c.margin_TL is not None])
    routed_N = ids_NLK[:, 0, 0] >= 0
    return [
        _layer_agreement(layer, block, spec, logits_NLE[routed_N, layer], ids_NLK[routed_N, layer],
                         margin_NL[routed_N, layer] == 0)
        for layer, block in enumerate(blocks)
    ]  # fmt: skip


def _layer_agreement(
    layer: int,
    block: Block,
    spec: ModelRouting,
    logits_NE: NDArray[np.float32],
    ids_NK: NDArray[np.int16],
    is_tie_N: NDArray[np.bool_],
) -> RuleAgreement:
    logits = torch.from_numpy(logits_NE)
    by_train = route(block, logits)
    if by_train.ids_NK is None:
        raise CaptureError(by_train.reason)
    bias = block.correction_bias(spec)
    used_NK = np.sort(ids_NK[~is_tie_N], axis=1)

    def rate(chosen: torch.Tensor) -> float:
        same_N = (np.sort(chosen.cpu().numpy()[~is_tie_N], axis=1) == used_NK).all(axis=1)
        return float(same_N.mean()) if len(same_N) else float("nan")

    return RuleAgreement(
        layer=layer,
        n_rows=len(ids_NK),
        n_exact_ties=int(is_tie_N.sum()),
        train_rule_rate=rate(by_train.ids_NK),
        spec_rule_rate=rate(apply_rule(logits, spec, None if bias is None else bias.cpu())),
        plain_topk_rate=rate(plain_topk(logits, spec)),
    )


def plain_topk(logits: torch.Tensor, spec: ModelRouting) -> torch.Tensor:
    """TopK of the raw logits, (..., K): the contrast, wrong for every router with a bias or groups."""
    return torch.topk(logits.float(), spec.top_k, dim=-1).indices
