"""Edits of a checkpoint: tensors by name, or entries of config.json, changed in place in one decoder layer or in all.

An edit returns how many tensors or entries it changed; none means that the model has no such part.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import torch

from moediag.engines.routers import text_config

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]
"""What a tensor, in float32, is changed to."""
Edit = Callable[[Tensors, dict[str, Any], int], int]
"""Changes tensors by name, or entries of config.json, in one decoder layer (-1 = everywhere); returns how many."""

LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
MOE: Final = "(?:mlp|block_sparse_moe|feed_forward)"
ATTENTION: Final = "(?:self_attn|attention|attn)"
ROUTER: Final = rf"{MOE}\.(?:gate|router)\.(?:wg\.)?weight"
BIAS: Final = rf"{MOE}\.(?:gate\.)?(?:e_score_correction_bias|expert_bias|moe_statics\.e_score_correction_bias)"
_FUSED: Final = rf"{MOE}\.experts\.(?:gate_up_proj|down_proj|gate_up_proj_bias|down_proj_bias)(?:\.weight)?"
_NTH: Final = re.compile(rf"({MOE}\.experts)\.(\d+)\.(.+)$")


def scaled(factor: float) -> Change:
    """All numbers times a factor."""
    return lambda values: values * factor


def _coins(values: torch.Tensor) -> torch.Generator:
    """Seeded by the numbers themselves: two tensors of one shape do not get the same ones."""
    return torch.Generator().manual_seed(int(values.double().abs().sum() * 1e6) % 2**31)


def noisy(share: float) -> Change:
    """Noise as wide as a share of the numbers' own spread."""

    def change(values: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(values.shape, generator=_coins(values))
        spread = values.std() if values.numel() > 1 and values.std() > 0 else values.abs().mean()
        return values + share * noise * spread

    return change


def redrawn(values: torch.Tensor) -> torch.Tensor:
    """Drawn anew, as wide as it was."""
    return torch.randn(values.shape, generator=_coins(values)) * values.std() + values.mean()


def permuted(values: torch.Tensor) -> torch.Tensor:
    """The first axis turned by one."""
    return values.roll(1, 0)


def zeroed(values: torch.Tensor) -> torch.Tensor:
    """Nothing but 0."""
    return torch.zeros_like(values)


def near_seven_in_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Moved to near 7, which changes no choice, and kept in bfloat16 there, in steps of 0.031."""
    return (values - values.mean() + 7).to(torch.bfloat16).float()


def in_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Kept in bfloat16, whatever dtype the others have."""
    return values.to(torch.bfloat16).float()


def of_layer(tensors: Tensors, layer: int, *patterns: str) -> list[str]:
    """Names of a layer's tensors (-1 = of every layer) that match the first pattern that any does."""
    own = {name: found[2] for name in tensors if (found := LAYER.search(name)) and layer in (-1, int(found[1]))}
    for pattern in patterns:
        chosen = [name for name, rest in own.items() if re.fullmatch(pattern, rest)]
        if chosen:
            return chosen
    return []


def _change(tensors: Tensors, names: list[str], change: Change) -> int:
    for name in names:
        tensors[name] = change(tensors[name].float()).to(tensors[name].dtype).contiguous()
    return len(names)


def layers_tensors(change: Change, *patterns: str) -> Edit:
    """A change of the layer's tensors that match the first pattern that any does."""
    return lambda tensors, config, layer: _change(tensors, of_layer(tensors, layer, *patterns), change)


def models_tensors(change: Change, *patterns: str) -> Edit:
    """A change of tensors outside the decoder layers, by the end of their name: of the first pattern that any has."""

    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        for pattern in patterns:
            chosen = [name for name in tensors if not LAYER.search(name) and re.search(rf"(?:^|\.){pattern}$", name)]
            if chosen:
                return _change(tensors, chosen, change)
        return 0

    return edit


def all_tensors(change: Change) -> Edit:
    """A change of every tensor."""
    return lambda tensors, config, layer: _change(tensors, list(tensors), change)


FINAL_NORM: Final = "(?:final_|embedding_)?(?:norm|layernorm)\\.weight"
EMBEDDINGS: Final = "(?:embed_tokens|word_embeddings)\\.weight"


def head(change: Change) -> Edit:
    """The head's weights, where it has its own, else the final norm's: tied ones would change the embeddings, too."""
    return models_tensors(change, "lm_head\\.weight", FINAL_NORM)


def experts(change: Change, expert: int | None = None) -> Edit:
    """A change of one expert's matrices, stored one by one or fused; None = of every expert's, each by itself."""

    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        number = r"\d+" if expert is None else str(expert)
        names = of_layer(tensors, layer, rf"{MOE}\.experts\.{number}\..+")
        if names:
            return _change(tensors, names, change)
        fused = of_layer(tensors, layer, _FUSED)
        for name in fused:
            values = tensors[name].float()
            for nth in range(len(values)) if expert is None else (expert,):
                values[nth] = change(values[nth])
            tensors[name] = values.to(tensors[name].dtype)
        return len(fused)

    return edit


def permuted_experts(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
    """Every expert of the layer in its neighbour's slot; the router's rows stay."""
    fused = of_layer(tensors, layer, _FUSED)
    if fused:
        return _change(tensors, fused, permuted)
    names = of_layer(tensors, layer, rf"{MOE}\.experts\.\d+\..+")
    kept = {name: tensors[name] for name in names}
    n_experts = 1 + max((int(found[2]) for name in names if (found := _NTH.search(name))), default=0)
    for name in names:
        found = _NTH.search(name)
        assert found is not None
        before, slot = name[: found.start()], (int(found[2]) + 1) % n_experts
        tensors[f"{before}{found[1]}.{slot}.{found[3]}"] = kept[name]
    return len(names)


def transposed_experts(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
    """Square matrices of the layer's experts, each in the other layout: no shape tells the two apart."""
    names = of_layer(tensors, layer, rf"{MOE}\.experts\.\d+\..+weight", _FUSED)
    square = [name for name in names if tensors[name].dim() > 1 and len({*tensors[name].shape[-2:]}) == 1]
    return _change(tensors, square, lambda values: values.transpose(-1, -2))


def rope(factor: float) -> Edit:
    """The base of rotary positions."""

    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        text, changed = _text(config), 0
        for holder in (text, text.get("rope_parameters") or {}, text.get("rope_scaling") or {}):
            if isinstance(holder.get("rope_theta"), int | float):
                holder["rope_theta"] *= factor
                changed += 1
        return changed

    return edit


def entry(name: str, new: Callable[[Any], Any], kind: type | tuple[type, ...]) -> Edit:
    """An entry of config.json that is there, of its type."""

    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        text = _text(config)
        if not isinstance(text.get(name), kind) or new(text[name]) == text[name]:
            return 0
        text[name] = new(text[name])
        return 1

    return edit


def both(first: Edit, second: Edit) -> Edit:
    """Two edits at once; none where one of them finds nothing."""

    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        counts = [one(tensors, config, layer) for one in (first, second)]
        return sum(counts) if all(counts) else 0

    return edit


def _text(config: dict[str, Any]) -> dict[str, Any]:
    found = text_config(config)
    if found is config or not isinstance(config.get("text_config"), dict):
        return config
    text: dict[str, Any] = config["text_config"]
    return text
