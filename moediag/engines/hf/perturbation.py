"""Small, named changes to what transformers computes: a noise scale where an engine repeats itself exactly.

``ulp``           every number a router receives (in a dense model: every decoder layer) is moved to its neighbour in
                  the model's dtype, up or down by a coin
``router-fp32``   the router's matmul runs in float32 instead of the model's dtype
``router-fp8``    the router's weight and input are rounded to float8 (e4m3, scaled by their largest value) first

Nothing else is touched; what follows from other choices is the effect to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moediag.errors import EngineError

ULP, FP32, FP8 = "ulp", "router-fp32", "router-fp8"
PERTURBATIONS = (ULP, FP32, FP8)
_FP8_MAX = 448.0  # largest finite float8_e4m3fn


class Perturbed:
    """Modules perturbed while the context is entered.

    Args:
        modules: the model's routers, or a dense model's decoder layers: their first argument is what is perturbed.
        kind: one of :data:`PERTURBATIONS`.
        seed: of the coins; the same seed gives the same noise.

    Raises:
        EngineError: unknown kind.
    """

    def __init__(self, modules: list[torch.nn.Module], kind: str, seed: int) -> None:
        if kind not in PERTURBATIONS:
            raise EngineError(f"unknown perturbation {kind!r}; expected one of {', '.join(PERTURBATIONS)}")
        self.modules, self.kind = modules, kind
        self.generator = torch.Generator().manual_seed(seed)
        self._wrapped: list[tuple[torch.nn.Module, Any]] = []

    def __enter__(self) -> Perturbed:
        for module in self.modules:
            self._wrapped.append((module, module.__dict__.get("forward")))
            module.forward = self._forward(module.forward)
        return self

    def __exit__(self, *exc: object) -> None:
        for module, own in self._wrapped:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
        self._wrapped.clear()

    def _forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.kind == ULP:
                return original(neighbour(hidden, self.generator), *args, **kwargs)
            with _RouterLinear(torch.float32 if self.kind == FP32 else torch.float8_e4m3fn):
                return original(hidden, *args, **kwargs)

        return forward


def neighbour(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every value moved to the next representable one, up or down by a coin."""
    coin = torch.rand(values.shape, generator=generator).to(values.device) < 0.5
    towards = torch.where(coin, torch.inf, -torch.inf).to(values.dtype)
    return torch.nextafter(values, towards)


def rounded_to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Values rounded to float8 e4m3 with one scale for the tensor, in their own dtype again."""
    scale = values.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny) / _FP8_MAX
    return ((values.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


class _RouterLinear(TorchFunctionMode):
    """Runs the linear maps inside a router in another arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        hidden, weight, *rest = args
        if self.dtype == torch.float32:
            bias = [part.float() if isinstance(part, torch.Tensor) else part for part in rest]
            named = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in (kwargs or {}).items()}
            return func(hidden.float(), weight.float(), *bias, **named)
        return func(rounded_to_fp8(hidden), rounded_to_fp8(weight), *rest, **(kwargs or {}))
