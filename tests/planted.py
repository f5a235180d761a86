"""Faults planted in a loaded vLLM: wrong rules in its routers, taps that see wrongly; and the tasks that meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moediag.engines.arms import ArmRequest
from moediag.engines.process import Held, Reporter
from moediag.engines.vllm.worker import MoediagWorkerExtension, find_routers
from moediag.errors import CaptureError
from moediag.run.writer import RunWriter

Undo = Callable[[], None]


def _attribute(name: str, value: Callable[[Any], Any]) -> Callable[[Any, Any], Undo]:
    def plant(module: Any, router: Any) -> Undo:
        owner = router if name != "routed_scaling_factor" or router.routed_scaling_factor != 1 else module
        kept = getattr(owner, name)
        setattr(owner, name, value(kept))
        return lambda: setattr(owner, name, kept)

    return plant


def _routing(change: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Callable[[Any, Any], Undo]:
    def plant(module: Any, router: Any) -> Undo:
        router._compute_routing = lambda hidden, logits, *_, **__: change(router, logits)
        return lambda: delattr(router, "_compute_routing")

    return plant


def _grouped(router: Any, logits: torch.Tensor, n_best: int, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float().sigmoid()
    compared = scores + router.e_score_correction_bias
    groups = compared.view(len(logits), router.num_expert_group, -1)
    kept = groups.topk(n_best, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
    is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    ids = groups.masked_fill(~is_kept[..., None], fill).flatten(1).topk(router.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor, ids.int()


def _clamped(router: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return type(router)._compute_routing(router, None, logits.clamp(min=0), None)  # type: ignore[no-any-return]


def _sigmoid(router: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.float().sigmoid().topk(router.top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids.int()


PLANTED: dict[str, Callable[[Any, Any], Undo]] = {
    "renormalisation off": _attribute("renormalize", lambda kept: False),
    "bias dropped": _attribute("e_score_correction_bias", torch.zeros_like),
    "losers at 0": _routing(lambda router, logits: _grouped(router, logits, 2, 0.0)),
    "K off by one": _attribute("top_k", lambda kept: kept - 1),
    "scaling dropped": _attribute("routed_scaling_factor", lambda kept: 1.0),
    "sigmoid for softmax": _routing(_sigmoid),
    "groups by their best": _routing(lambda router, logits: _grouped(router, logits, 1, -torch.inf)),
    "logits clamped at 0": _routing(_clamped),
    "nothing": lambda module, router: lambda: None,
}


def probe_planted(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """What is said before anything is sampled of each rule planted in the loaded routers; empty where nothing is."""
    from moediag.engines.vllm.engine import InferEngine, held_llm
    from moediag.engines.vllm.worker import find_routers

    request = ArmRequest(**options["request"])
    llm = held_llm(held, options["folder"], request, reporter)
    found: list[tuple[int, Any, Any]] = llm.apply_model(find_routers)[0]
    said = {}
    for name in options["planted"]:
        undo = [PLANTED[name](module, router) for _, module, router in found]
        try:
            InferEngine(writer, llm, request, options["routing"], options["proof"])
            said[name] = ""
        except CaptureError as error:
            said[name] = str(error)
        finally:
            for one in undo:
                one()
    Path(options["output"]).write_text(json.dumps(said))


# Taps that see wrongly, planted where vLLM's worker sets them


class _Shifted:
    """A recorder that takes every layer for the next."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder

    def on_route(self, layer: int, *rows: torch.Tensor) -> None:
        self.recorder.on_route((layer + 1) % self.recorder.spec.n_layers, *rows)


class _Stale:
    """A recorder whose expert ids are those that the layer's buffer held before."""

    def __init__(self, recorder: Any) -> None:
        self.recorder, self.held = recorder, torch.zeros(0)

    def on_route(self, layer: int, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        stale = self.held if layer == 1 and self.held.shape == ids.shape else ids
        if layer == 1:
            self.held = ids.clone()
        self.recorder.on_route(layer, logits, weights, stale)


class _Deaf:
    """No recorder for one layer: its tap was patched out."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder

    def on_route(self, layer: int, *rows: torch.Tensor) -> None:
        if layer != 1:
            self.recorder.on_route(layer, *rows)


BROKEN_TAPS: dict[str, Any] = {"off by one layer": _Shifted, "stale buffer": _Stale, "patched out": _Deaf}


def capture_broken(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Captures an infer arm with broken taps on the routers."""
    from moediag.engines.vllm import engine, worker

    set_tap, broken = worker._tap_router, BROKEN_TAPS[options.pop("broken")]
    worker._tap_router = lambda router, layer, recorder: set_tap(router, layer, broken(recorder))
    try:
        engine.capture_infer(writer, options, reporter, held)
    finally:
        worker._tap_router = set_tap


class SilentRank(MoediagWorkerExtension):
    """A worker whose taps on the routers are gone again on rank 1."""

    def moediag_install(self, *args: Any) -> dict[str, Any]:
        facts = super().moediag_install(*args)
        if self.rank == 1:
            for _, _, router in find_routers(self.model_runner.model):
                del router.select_experts
        return facts


def capture_with_silent_rank(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Captures an infer arm on ranks of which one sees nothing."""
    from moediag.engines.vllm import engine

    engine._WORKER = "planted.SilentRank"
    engine.capture_infer(writer, options, reporter, held)
