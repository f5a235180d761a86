"""Faults of a loaded model, of either engine: hooks on the numbers that its modules receive and give."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from moediag.engines.hf.perturbation import rounded_to_fp8

Values = Callable[[torch.Tensor], torch.Tensor]
Undo = Callable[[], None]

TOP_P = 0.9


def in_float8(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float8 (e4m3), with one scale per call."""
    return rounded_to_fp8(values)


def in_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16, in their own dtype again."""
    return values.to(torch.bfloat16).to(values.dtype)


def of_the_nucleus(logits: torch.Tensor) -> torch.Tensor:
    """Logits of the likeliest tokens that hold TOP_P of the probability; the others' are -inf."""
    ranked, order = logits.float().softmax(-1).sort(dim=-1, descending=True)
    is_out = ranked.cumsum(-1) - ranked >= TOP_P
    return logits.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), -torch.inf)


def with_input(module: torch.nn.Module, change: Values) -> Undo:
    """Changes the hidden states that a module receives: the first floating-point tensor (vLLM's head comes before)."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = tuple(args), dict(kwargs)
        for i, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return (*args[:i], change(value), *args[i + 1 :]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return args, {**kwargs, key: change(value)}
        return args, kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def with_output(module: torch.nn.Module, change: Values) -> Undo:
    """Changes what a module gives; of queries, keys and values in one tensor (vLLM), keys and values alone."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        n_query = int(module.num_heads * module.head_size) if hasattr(module, "num_kv_heads") else 0
        n_key = (values.shape[-1] - n_query) // 2 if n_query else values.shape[-1]
        parts = values.split([n_query, *([n_key] * ((values.shape[-1] - n_query) // n_key))], dim=-1)
        changed = torch.cat([parts[0], *(change(part) for part in parts[1:])], dim=-1) if n_query else change(values)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook).remove


def with_weights(module: Any, change: Values) -> Undo:
    """Changes a module's weights."""
    kept = module.weight.data
    module.weight.data = change(kept)

    def undo() -> None:
        module.weight.data = kept

    return undo


def both(*undos: Undo) -> Undo:
    """Several changes at once."""

    def undo() -> None:
        for one in undos:
            one()

    return undo


def in_float32(module: torch.nn.Module) -> Undo:
    """Has a linear map computed in float32, and its output kept in it."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        bias = None if getattr(module, "bias", None) is None else module.bias.float()
        return torch.nn.functional.linear(args[0].float(), module.weight.float(), bias)

    return module.register_forward_hook(hook).remove


def with_a_wrong_token(module: torch.nn.Module) -> Undo:
    """Has one token of some sequences embedded as its neighbour in the vocabulary: by what its 15 tokens before say."""

    def hook(module: Any, args: Any) -> Any:
        ids_BT = args[0].clone()
        if ids_BT.dim() == 2 and ids_BT.shape[1] > 21:
            is_wrong_B = ids_BT[:, 5:20].sum(-1) % 5 == 0
            ids_BT[is_wrong_B, 20] = (ids_BT[is_wrong_B, 20] + 1) % 256
        return (ids_BT, *args[1:])

    return module.register_forward_pre_hook(hook).remove


def with_biased_gates(module: Any) -> Undo:
    """Has a router of vLLM weigh its experts by the scores that it chose by: bias and all."""
    router, own = module, module._compute_routing

    def compute(hidden: Any, logits: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = own(hidden, logits, *rest, **more)
        biased = logits.float().sigmoid() + router.e_score_correction_bias.float()
        chosen = biased.gather(-1, ids.long())
        chosen = chosen / chosen.sum(-1, keepdim=True) * weights.float().sum(-1, keepdim=True)
        return chosen.to(weights.dtype), ids

    router._compute_routing = compute

    def undo() -> None:
        del router._compute_routing

    return undo


def matches(pattern: str, path: str, layers: tuple[int, ...]) -> bool:
    """Whether a module is one of a pattern: by what follows ``layers.N.``, in those layers; else by its own name.

    Args:
        layers: decoder layers of which modules count; empty = all.
    """
    found = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", path)
    if found is None:
        return re.fullmatch(pattern, path.rpartition(".")[2]) is not None
    return (not layers or int(found[1]) in layers) and re.fullmatch(pattern, found[2]) is not None
