"""The part of moediag that runs inside vLLM's workers: taps on routers, steps and the sampler.

vLLM mixes :class:`MoediagWorkerExtension` into its worker class (``worker_extension_cls``), in-process,
multi-process and tensor-parallel alike; ``collective_rpc`` calls its methods by name. Only plain data
crosses that border: rows leave through a safetensors file.

Invariants:
    - taps only copy; they never change what a router, the model or the sampler receives or returns;
    - the positions and token ids of a row are those the model really received in that step;
    - in every step every MoE layer fires exactly once, or the flush says which did not;
    - rank 0 records; router inputs and logits are replicated over tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moediag.engines.routers import RouterSpec, margins

_RULE_ATTRIBUTES = ("scoring_func", "renormalize", "num_expert_group", "topk_group", "routed_scaling_factor")
_REQUEST_SUFFIX = re.compile(r"-[0-9a-f]{8}$")  # vLLM's worker knows a request as <external id>-<8 hex>
_DECODER_LAYER = re.compile(r"\.layers\.(\d+)\.")


class RowBuffers:
    """Device buffers for one step's routing rows, copied to the host once per step and not per layer."""

    def __init__(self, spec: RouterSpec, bias_LE: torch.Tensor | None) -> None:
        self.spec = spec
        self.bias_LE = bias_LE
        self._buffers: dict[str, torch.Tensor] = {}

    def store(self, layer: int, rows: dict[str, torch.Tensor], n_rows: int) -> None:
        """Copy one layer's first ``n_rows`` rows into place."""
        for name, row in rows.items():
            self._buffer(name, row, n_rows)[:n_rows, layer].copy_(row[:n_rows])

    def take(self, n_rows: int, keep_logits: bool) -> dict[str, torch.Tensor]:
        """The step's rows on the host, with margins computed from the unrounded logits."""
        logits_NLE, ids_NLK = self._buffers["logits"][:n_rows], self._buffers["ids"][:n_rows]
        margin_NL, logit_margin_NL = margins(logits_NLE, ids_NLK, self.spec, self.bias_LE)
        rows = {
            "expert_ids_TLK": ids_NLK.to(torch.int16),
            "gate_weights_TLK": self._buffers["weights"][:n_rows],
            "margin_TL": margin_NL,
            "logit_margin_TL": logit_margin_NL,
        }
        if keep_logits:
            rows["router_logits_TLE"] = logits_NLE
        return {name: row.to("cpu", copy=True) for name, row in rows.items()}

    def dtypes(self) -> dict[str, str]:
        """Dtypes in which the router was given its logits and gave its gate weights."""
        names = {"matmul": "logits", "gate": "weights"}
        return {
            stage: str(self._buffers[name].dtype).removeprefix("torch.")
            for stage, name in names.items()
            if name in self._buffers
        }

    def _buffer(self, name: str, row: torch.Tensor, n_rows: int) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < n_rows or buffer.dtype != row.dtype:
            size = 1 << (n_rows - 1).bit_length()
            grown = torch.empty((size, self.spec.n_layers, row.shape[-1]), dtype=row.dtype, device=row.device)
            if buffer is not None and buffer.dtype == row.dtype:
                grown[: len(buffer)] = buffer
            self._buffers[name] = buffer = grown
        return buffer


class StepRecorder:
    """Rows of every step since :meth:`begin`: which request, position and token, and what was routed."""

    def __init__(self, spec: RouterSpec | None, keep_logits: bool, bias_LE: torch.Tensor | None = None) -> None:
        self.spec = spec
        self.keep_logits = keep_logits
        self.buffers = RowBuffers(spec, bias_LE) if spec else None
        self.begin()

    def begin(self) -> None:
        """Forget all rows."""
        self.scheduler_output: Any = None
        self.fired: list[int] = []
        self.n_step_rows = 0
        self.sampled_rows: list[tuple[int, int]] = []
        self.requests: dict[str, int] = {}
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.entropies: list[tuple[int, int, float]] = []
        self.problems: list[str] = []

    def on_forward(self, runner: Any, positions: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Before the model runs: note whose rows come, in the runner's own order."""
        if positions.dim() != 1:
            raise ValueError(f"positions of {positions.dim()} dimensions (multimodal rope) are not supported")
        names = runner.input_batch.req_ids[: runner.input_batch.num_reqs]
        counts = [self.scheduler_output.num_scheduled_tokens[name] for name in names]
        n_rows = sum(counts)
        self.n_step_rows, self.fired = n_rows, []
        request_of = [self.requests.setdefault(_REQUEST_SUFFIX.sub("", name), len(self.requests)) for name in names]
        position_T = positions[:n_rows].to("cpu", torch.int64, copy=True)
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.sampled_rows = [(r, int(position_T[end - 1])) for r, end in zip(request_of, ends, strict=True)]
        self._append("request_T", torch.repeat_interleave(torch.tensor(request_of), torch.tensor(counts)))
        self._append("position_T", position_T)
        self._append("token_id_T", input_ids[:n_rows].to("cpu", torch.int64, copy=True))

    def on_route(self, layer: int, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """After a router chose: copy its rows, unless the step is vLLM's own dummy run."""
        if not self.n_step_rows:
            return
        assert self.buffers is not None
        self.fired.append(layer)
        if ids.shape[0] < self.n_step_rows or logits.shape[-1] != self.buffers.spec.n_experts:
            shapes = f"ids {tuple(ids.shape)}, logits {tuple(logits.shape)} for {self.n_step_rows} scheduled tokens"
            self.problems.append(f"MoE layer {layer} gave {shapes}")
            return
        self.buffers.store(layer, {"logits": logits, "weights": weights, "ids": ids}, self.n_step_rows)

    def on_sample(self, logits: torch.Tensor) -> None:
        """Before sampling: entropy of each next-token distribution, raw logits at temperature 1."""
        if len(logits) != len(self.sampled_rows):
            self.problems.append(f"sampler got {len(logits)} rows for {len(self.sampled_rows)} requests")
            return
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        entropy = torch.special.entr(probabilities).sum(dim=-1).tolist()
        self.entropies += [(r, p, h) for (r, p), h in zip(self.sampled_rows, entropy, strict=True)]

    def end_step(self) -> None:
        """After the model ran: take the rows off the device."""
        if self.n_step_rows and self.buffers is not None and self.spec is not None:
            if sorted(self.fired) == list(range(self.spec.n_layers)):
                for name, rows in self.buffers.take(self.n_step_rows, self.keep_logits).items():
                    self._append(name, rows)
            else:
                self.problems.append(_misfire(self.fired, self.spec))
        self.n_step_rows, self.scheduler_output = 0, None

    def flush(self, path: Path) -> dict[str, Any]:
        """Write all rows and forget them."""
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.parts.items()}
        entropy = torch.tensor(self.entropies, dtype=torch.float64).reshape(-1, 3)
        save_file({**tensors, "entropy": entropy}, path)
        told = {
            "requests": list(self.requests),
            "problems": self.problems[:5],
            "n_problems": len(self.problems),
            "router_dtypes": self.buffers.dtypes() if self.buffers else None,
        }
        self.begin()
        return told

    def _append(self, name: str, part: torch.Tensor) -> None:
        self.parts.setdefault(name, []).append(part)


class MoediagWorkerExtension:
    """Methods that vLLM's worker gains; every name is prefixed, vLLM refuses clashes."""

    rank: int
    model_runner: Any

    def moediag_install(self, spec: dict[str, Any] | None, keep_logits: bool) -> dict[str, Any]:
        """Set the taps on this worker.

        Args:
            spec: fields of :class:`RouterSpec`, or None for a dense model.
            keep_logits: record full router logits.

        Returns:
            What the loaded model is: MoE layers, E, K, dtypes, kernels, attention backend.
        """
        model = self.model_runner.model
        routers = find_routers(model)
        facts = describe_worker(self.model_runner, routers)
        if self.rank != 0:
            return facts
        router_spec = RouterSpec.from_record(spec) if spec else None
        recorder = StepRecorder(router_spec, keep_logits, correction_bias([router for _, _, router in routers]))
        self._moediag_recorder = recorder
        self._moediag_undo: list[Callable[[], None]] = [
            _tap_steps(self.model_runner, recorder),
            _tap_model(self.model_runner, recorder),
            _tap_sampler(self.model_runner, recorder),
            *(_tap_router(router, layer, recorder) for layer, (_, _, router) in enumerate(routers)),
        ]
        return facts

    def moediag_remove(self) -> None:
        """Take the taps off: the worker is as vLLM made it."""
        for undo in getattr(self, "_moediag_undo", []):
            undo()
        self._moediag_undo = []

    def moediag_begin(self, seed: int | None) -> None:
        """Start a shard: forget rows; with a seed, reseed this worker's default generator."""
        if seed is not None:
            torch.manual_seed(seed)
        if self.rank == 0:
            self._moediag_recorder.begin()

    def moediag_flush(self, path: str) -> dict[str, Any] | None:
        """Rank 0 writes its rows to ``path``; other ranks return None."""
        return self._moediag_recorder.flush(Path(path)) if self.rank == 0 else None


def find_routers(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module, Any]]:
    """(decoder layer, module, router) of every MoE layer in order, found by what they do, not by class.

    Raises:
        ValueError: a router sits outside the numbered decoder layers.
    """
    found: dict[int, tuple[int, torch.nn.Module, Any]] = {}
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if not hasattr(router, "select_experts") or id(router) in found:
            continue
        match = _DECODER_LAYER.search(f".{name}.")
        if match is None:
            raise ValueError(f"router of module {name} belongs to no numbered decoder layer")
        found[id(router)] = (int(match.group(1)), module, router)
    return sorted(found.values(), key=lambda entry: entry[0])


def correction_bias(routers: list[Any]) -> torch.Tensor | None:
    """Bias per MoE layer and expert, (L, E), that enters the choice only; None where the routers have none."""
    biases = [getattr(router, "e_score_correction_bias", None) for router in routers]
    found = [bias for bias in biases if bias is not None]
    return torch.stack([bias.detach().float() for bias in found]) if found and len(found) == len(routers) else None


def describe_worker(runner: Any, routers: list[tuple[int, torch.nn.Module, Any]]) -> dict[str, Any]:
    """What was really loaded and selected in this worker."""
    parameters = {str(parameter.dtype).removeprefix("torch.") for parameter in runner.model.parameters()}
    backends = {group.backend.get_name() for groups in getattr(runner, "attn_groups", []) for group in groups}
    quant_methods = [_quant_method(module) for _, module, _ in routers]
    return {
        "decoder_layers": [layer for layer, _, _ in routers],
        "n_experts": sorted({int(getattr(r, "global_num_experts", 0)) for _, _, r in routers}),
        "top_k": sorted({int(getattr(r, "top_k", 0)) for _, _, r in routers}),
        "router_rule": {
            name: value
            for name in _RULE_ATTRIBUTES
            if (value := getattr(routers[0][2], name, None) if routers else None) is not None
        },
        "router_classes": sorted({type(r).__name__ for _, _, r in routers}),
        "experts_kernel": sorted({type(method).__name__ for method in quant_methods if method is not None}),
        "is_monolithic": any(bool(getattr(method, "is_monolithic", False)) for method in quant_methods),
        "has_correction_bias": correction_bias([router for _, _, router in routers]) is not None,
        "eplb": any(getattr(r, "eplb_state", None) is not None for _, _, r in routers),
        "parameter_dtypes": sorted(parameters),
        "model_class": type(runner.model).__name__,
        "runner_class": type(runner).__name__,
        "attention_backends": sorted(backends),
        "device": str(runner.device),
        "n_threads": torch.get_num_threads(),
    }


def _quant_method(module: torch.nn.Module) -> Any:
    experts = getattr(module, "routed_experts", module)
    return getattr(experts, "quant_method", None)


def _tap_steps(runner: Any, recorder: StepRecorder) -> Callable[[], None]:
    original = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.scheduler_output = scheduler_output
        try:
            return original(scheduler_output, *args, **kwargs)
        finally:
            recorder.end_step()

    runner.execute_model = execute_model
    return lambda: delattr(runner, "execute_model")


def _tap_model(runner: Any, recorder: StepRecorder) -> Callable[[], None]:
    def before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recorder.scheduler_output is not None:  # None: a dummy run of vLLM's own
            recorder.on_forward(runner, kwargs["positions"], kwargs["input_ids"])

    handle = runner.model.register_forward_pre_hook(before_forward, with_kwargs=True)
    return handle.remove  # type: ignore[no-any-return]


def _tap_sampler(runner: Any, recorder: StepRecorder) -> Callable[[], None]:
    def before_sampling(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.on_sample(kwargs["logits"] if "logits" in kwargs else args[0])

    handle = runner.sampler.register_forward_pre_hook(before_sampling, with_kwargs=True)
    return handle.remove  # type: ignore[no-any-return]


def _tap_router(router: Any, layer: int, recorder: StepRecorder) -> Callable[[], None]:
    original = router.select_experts

    def select_experts(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = original(*args, **kwargs)
        recorder.on_route(layer, kwargs["router_logits"] if "router_logits" in kwargs else args[1], weights, ids)
        return weights, ids

    router.select_experts = select_experts
    return lambda: delattr(router, "select_experts")


def _misfire(fired: list[int], spec: RouterSpec) -> str:
    silent = sorted(set(range(spec.n_layers)) - set(fired))
    twice = sorted({layer for layer in fired if fired.count(layer) > 1})
    return f"in one step MoE layers {silent} never fired and {twice} fired more than once"
