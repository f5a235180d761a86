"""Two engines whose routers differ by a known noise: a scale mixture over tokens that grows with depth.

Per token one log-normal scale, ten times larger for some; per layer a growth; and where a layer above flipped, louder
again, as in real engines. Experts are popular by Zipf's law, in another order in every layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moediag.analysis.choice_scores import RoutingRule, border_gap, choice_scores, chosen_experts
from moediag.run.align import Pair, PairBlock

RULES = {
    "softmax": RoutingRule(16, 4, "softmax"),
    "logit": RoutingRule(8, 2, "logit"),
    "sigmoid": RoutingRule(16, 4, "sigmoid"),
    "sigmoid + bias": RoutingRule(16, 4, "sigmoid", has_correction_bias=True),
    "groups": RoutingRule(16, 4, "sigmoid", has_correction_bias=True, n_group=4, topk_group=2),
}


@dataclass(frozen=True)
class Truth:
    """What the synthetic engines are; ``scale`` is the median noise of a logit in the first layer."""

    rule: RoutingRule = RULES["softmax"]
    n_prompts: int = 24
    tokens: int = 150
    n_layers: int = 4
    scale: float = 0.02
    spread: float = 0.7
    loud_share: float = 0.1
    loud: float = 8.0
    growth: float = 1.3
    after_flip: float = 4.0
    step: float = 0.0
    """Logits are multiples of this; 0 = continuous. Steps make exact ties."""

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self.rule)

    @property
    def bias_LE(self) -> np.ndarray | None:  # noqa: N802 - the legend suffix
        if not self.rule.has_correction_bias:
            return None
        return 0.2 * np.random.default_rng(5).normal(size=(self.n_layers, self.rule.n_experts))


def make_flips(truth: Truth, seed: int = 0, first_prompt: int = 0, keep_logits: bool = True) -> Pair:
    """A pair: infer has the logits, train the same with noise."""
    rng = np.random.default_rng(seed)
    n_tokens = truth.n_prompts * truth.tokens
    rule = truth.rule
    shape = n_tokens, truth.n_layers, rule.n_experts
    popularity_LE = np.stack([rng.permutation(-0.7 * np.log(np.arange(1, shape[2] + 1))) for _ in range(shape[1])])
    infer_TLE = _on_grid(popularity_LE + rng.normal(size=shape), truth.step)
    scale_T = truth.scale * np.exp(truth.spread * rng.normal(size=n_tokens))
    scale_T *= np.where(rng.random(n_tokens) < truth.loud_share, truth.loud, 1.0)
    train_TLE = np.empty_like(infer_TLE)
    flipped_T = np.zeros(n_tokens, bool)
    for layer in range(shape[1]):
        bias_E = None if truth.bias_LE is None else truth.bias_LE[layer]
        layer_scale_T = scale_T * truth.growth**layer * np.where(flipped_T, truth.after_flip, 1.0)
        noise_TE = layer_scale_T[:, None] * rng.normal(size=(n_tokens, shape[2]))
        train_TLE[:, layer] = _on_grid(infer_TLE[:, layer] + noise_TE, truth.step)
        before, after = (np.sort(chosen_experts(x[:, layer], rule, bias_E)) for x in (infer_TLE, train_TLE))
        flipped_T |= (before != after).any(axis=1)
    block = PairBlock(
        seq_id_T=np.arange(n_tokens) // truth.tokens,
        prompt_id_T=np.arange(n_tokens) // truth.tokens + first_prompt,
        sample_index_T=np.zeros(n_tokens, np.int32),
        position_T=(np.arange(n_tokens) % truth.tokens).astype(np.int32),
        token_id_T=np.zeros(n_tokens, np.int64),
        logp_train_T=np.zeros(n_tokens, np.float32), logp_infer_T=np.zeros(n_tokens, np.float32),
        entropy_train_T=np.zeros(n_tokens, np.float32), entropy_infer_T=np.zeros(n_tokens, np.float32),
        **_routing("train", train_TLE, truth), **_routing("infer", infer_TLE, truth),
    )  # fmt: skip
    if not keep_logits:
        block = without_logits(block)
    return pair_of(block, rule=rule)


def pair_of(*blocks: PairBlock, rule: RoutingRule, name: str = "infer~train") -> Pair:
    infer, train = name.split("~")
    n_layers = blocks[0].expert_ids_infer_TLK.shape[1]
    return Pair(name, train, infer, tuple(range(n_layers)), rule.n_experts, rule.top_k, lambda: iter(blocks))


def without_logits(block: PairBlock) -> PairBlock:
    return replace(block, router_logits_train_TLE=None, router_logits_infer_TLE=None)


def block_of(pair: Pair) -> PairBlock:
    (block,) = pair.blocks()
    return block


def _on_grid(logits: np.ndarray, step: float) -> np.ndarray:
    return (np.round(logits / step) * step if step else logits).astype(np.float32)


def _routing(side: str, logits_TLE: np.ndarray, truth: Truth) -> dict[str, Any]:
    rule, bias = truth.rule, truth.bias_LE
    ids = chosen_experts(logits_TLE, rule, bias)
    chosen = np.take_along_axis(logits_TLE, ids, axis=-1).min(axis=-1)
    others = logits_TLE.copy()
    np.put_along_axis(others, ids, -np.inf, axis=-1)
    return {
        f"expert_ids_{side}_TLK": ids.astype(np.int16),
        f"margin_{side}_TL": border_gap(choice_scores(logits_TLE, rule, bias), rule.top_k).astype(np.float32),
        f"logit_margin_{side}_TL": (chosen - others.max(axis=-1)).astype(np.float32),
        f"router_logits_{side}_TLE": logits_TLE,
    }
