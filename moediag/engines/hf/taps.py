"""Taps on a transformers model: what its routers chose, and, for replay, what they are made to choose.

Invariants:
    - without forced routes the hooks only copy; hooked and unhooked outputs are equal bit for bit;
    - hooks and forced routes go in ``__enter__`` and come off in ``__exit__``, also when the body raises;
    - every MoE layer fires exactly once in a forward, and a forced layer uses its TopK exactly once, or an
      error names the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moediag.engines.assemble import kept_by, routing_arrays
from moediag.engines.routers import ModelRouting
from moediag.errors import CaptureError

_GATE_NAMES = ("gate", "router")
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Block:
    """One MoE block of the model: its decoder layer, router and experts."""

    decoder_layer: int
    gate: torch.nn.Module
    experts: torch.nn.Module

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """Bias per expert that enters the choice only; None where the router has none."""
        found = (getattr(self.gate, name, None) for name in _BIAS_NAMES)
        return next((bias for bias in found if isinstance(bias, torch.Tensor)), None)


@dataclass(frozen=True)
class ForcedRoutes:
    """Routes of one sequence to force, rows in token order; -1 leaves the choice to the model.

    Args:
        ids_TLK: expert ids.
        weights_TLK: gate weights to force as well; None: the model's own scores of the forced experts (R3).
        layers: MoE layers to force.
    """

    ids_TLK: torch.Tensor
    weights_TLK: torch.Tensor | None
    layers: range

    def spread(self, row_T: torch.Tensor, n_rows: int) -> ForcedRoutes:
        """The routes at their rows of a forward of ``n_rows`` rows; the model routes the rest (padding) itself."""
        ids = self.ids_TLK.new_full((n_rows, *self.ids_TLK.shape[1:]), -1)
        ids[row_T] = self.ids_TLK
        weights = None
        if self.weights_TLK is not None:
            weights = self.weights_TLK.new_zeros((n_rows, *self.weights_TLK.shape[1:]))
            weights[row_T] = self.weights_TLK
        return ForcedRoutes(ids, weights, self.layers)


class RoutingTaps:
    """Hooks on every MoE block: router logits as the router gave them, ids and weights as the experts used them."""

    def __init__(
        self, model: torch.nn.Module, spec: ModelRouting, level: str, forced: ForcedRoutes | None = None
    ) -> None:
        self.spec = spec
        self.level = level
        self.kept = kept_by(level)
        self.blocks = find_blocks(model)
        self.forced = forced
        self._logits_index = _declared_logits_index(model)
        self._handles: list[Any] = []
        self._rows: dict[int, dict[str, torch.Tensor]] = {}

    def __enter__(self) -> RoutingTaps:
        for layer, block in enumerate(self.blocks):
            if self.forced is not None and layer in self.forced.layers:
                self._force(layer, block)
            self._handles.append(block.gate.register_forward_hook(self._after_gate(layer, block)))
            self._handles.append(block.experts.register_forward_pre_hook(self._before_experts(layer, block)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block in self.blocks:
            block.gate.__dict__.pop("forward", None)

    def take(self, row_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """The forward's rows on the host, (T, L, ...), and forget them.

        Args:
            row_T: rows of the forward to keep, in the order of the result: padding is left out here.

        Raises:
            CaptureError: a layer did not fire, or gave too few rows.
        """
        rows, self._rows = self._rows, {}
        n_rows = int(row_T.max()) + 1
        for layer in range(self.spec.n_layers):
            found = rows.get(layer, {})
            if "ids" not in found:
                raise CaptureError(f"MoE layer {layer} never fired in transformers; nothing was stored")
            if len(found["ids"]) < n_rows:
                raise CaptureError(
                    f"MoE layer {layer} gave {len(found['ids'])} rows for {n_rows} tokens; nothing was stored"
                )
        kept = {name: _stacked([rows[i][name] for i in range(self.spec.n_layers)], row_T) for name in self.kept}
        biases = [block.correction_bias for block in self.blocks]
        bias_LE = (
            torch.stack([bias.cpu() for bias in biases if bias is not None])
            if all(bias is not None for bias in biases)
            else None
        )
        return routing_arrays(kept, self.spec, bias_LE, self.level)

    def _force(self, layer: int, block: Block) -> None:
        """Run the router with its TopK answered by the forced ids."""
        assert self.forced is not None
        original, ids_TK = block.gate.forward, self.forced.ids_TLK[:, layer]
        weights = self.forced.weights_TLK if self.spec.scales_input else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _ForcedTopK(ids_TK, self.spec) as mode:
                output = original(*args, **kwargs)
            if mode.n_hits != 1:
                raise CaptureError(
                    f"MoE layer {layer}: the forced routes were used {mode.n_hits} times, expected once; "
                    "nothing was stored"
                )
            return output if weights is None else (_scores_of(ids_TK, weights[:, layer], output[0]), *output[1:])

        block.gate.forward = forward

    def _after_gate(self, layer: int, block: Block) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            logits = output[self._logits_index] if isinstance(output, tuple) else output
            logits = logits.detach().reshape(-1, logits.shape[-1])
            self._check_logits(layer, logits)
            if "logits" in self.kept:
                self._rows.setdefault(layer, {})["logits"] = logits
            if self.spec.scales_input:  # the experts get scaled inputs: ids and weights end here
                weights, ids = torch.topk(output[0], self.spec.top_k, dim=-1)
                self._store(layer, ids, weights)

        return hook

    def _before_experts(self, layer: int, block: Block) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> Any:
            if self.spec.scales_input:
                return None
            hidden, ids, weights, *rest = args
            forced = None if self.forced is None else self.forced.weights_TLK
            if forced is not None and self.forced is not None and layer in self.forced.layers:
                is_forced = self.forced.ids_TLK[:, layer] >= 0
                weights = torch.where(is_forced, forced[:, layer].to(weights), weights)
            self._store(layer, ids.reshape(-1, self.spec.top_k), weights.reshape(-1, self.spec.top_k))
            return None if forced is None else (hidden, ids, weights, *rest)

        return hook

    def _store(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        rows = self._rows.setdefault(layer, {})
        if "ids" in rows:
            raise CaptureError(f"MoE layer {layer} fired twice in one forward; nothing was stored")
        rows["ids"] = ids.detach().clone()
        if "weights" in self.kept:
            rows["weights"] = weights.detach().clone()

    def _check_logits(self, layer: int, logits: torch.Tensor) -> None:
        if not logits.is_floating_point() or logits.shape[-1] != self.spec.n_experts:
            raise CaptureError(
                f"MoE layer {layer}: the router's output {self._logits_index} is {logits.dtype} of width "
                f"{logits.shape[-1]}, expected logits over E = {self.spec.n_experts}"
            )
        if looks_like_probabilities(logits):
            raise CaptureError(f"MoE layer {layer}: the router gives probabilities under the name of logits")


def _scores_of(ids_TK: torch.Tensor, weights_TK: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
    """Scores that multiply every expert's input: forced gate weights at forced ids, 0 elsewhere; -1 keeps the row."""
    ids_TK = ids_TK.to(scores_TE.device)
    forced_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK.clamp(min=0), weights_TK.to(scores_TE))
    return torch.where(ids_TK[:, :1] >= 0, forced_TE, scores_TE)


def _stacked(layers: list[torch.Tensor], row_T: torch.Tensor) -> torch.Tensor:
    """(L, T, width) of the chosen rows; on the host where the layers lie on several devices."""
    is_spread = len({layer.device for layer in layers}) > 1
    rows = [layer.cpu() if is_spread else layer for layer in layers]
    stacked = torch.stack(rows)
    is_all = len(row_T) == stacked.shape[1] and bool((row_T == torch.arange(len(row_T))).all())
    return stacked if is_all else stacked[:, row_T.to(stacked.device)]


class _ForcedTopK(TorchFunctionMode):
    """Answers the one TopK over E inside a router with given ids; values come from the router's own scores.

    Group-limited routers call TopK on groups first: only the call on a (T, E) tensor with k = K is the choice.
    """

    def __init__(self, ids_TK: torch.Tensor, spec: ModelRouting) -> None:
        super().__init__()
        self.ids_TK = ids_TK
        self.spec = spec
        self.n_hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        scores = args[0] if args else kwargs["input"]
        if scores.dim() != 2 or scores.shape[-1] != self.spec.n_experts or result[1].shape[-1] != self.spec.top_k:
            return result
        self.n_hits += 1
        forced = self.ids_TK.to(result[1])
        ids = torch.where(forced >= 0, forced, result[1])
        return torch.return_types.topk((scores.gather(1, ids), ids))


class _RecordedLogits(TorchFunctionMode):
    """Answers the router's matmul, the first linear inside it, with recorded logits."""

    def __init__(self, logits_NE: torch.Tensor) -> None:
        super().__init__()
        self.logits_NE = logits_NE
        self.n_hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not self.n_hits:
            self.n_hits += 1
            return self.logits_NE
        return func(*args, **(kwargs or {}))


def route_recorded(block: Block, logits_NE: torch.Tensor, spec: ModelRouting) -> torch.Tensor:
    """Expert ids (N, K) that the model's own router code chooses on recorded logits.

    Run on another engine's logits it separates *logit drift* from *another routing rule*: where this reproduces the
    other engine's sets, only the logits differ.

    Raises:
        CaptureError: the router does not compute its logits by a linear map.
    """
    hidden = torch.zeros(len(logits_NE), _hidden_size(block.gate), dtype=_weight(block.gate).dtype)
    with torch.inference_mode(), _RecordedLogits(logits_NE) as mode:
        output = block.gate(hidden.to(_weight(block.gate).device))
    if not mode.n_hits:
        raise CaptureError(f"the router of decoder layer {block.decoder_layer} has no linear map to replace")
    ids = next((part for part in output if not part.is_floating_point()), None)
    return torch.topk(output[0], spec.top_k, dim=-1).indices if ids is None else ids


class _TopKInput(TorchFunctionMode):
    """Notes the dtype of what the last TopK over E compares."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.dtype: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, torch.Tensor.topk) and args[0].shape[-1] == self.n_experts:
            self.dtype = args[0].dtype
        return func(*args, **(kwargs or {}))


def stage_dtypes(block: Block, spec: ModelRouting, hidden_dtype: torch.dtype) -> dict[str, str]:
    """Dtypes of the router at its four stages: weight, matmul (logits), score (TopK's input), gate.

    Seen by running the router alone on a few rows of zeros.
    """
    weight = _weight(block.gate)
    hidden = torch.zeros(3, weight.shape[1], dtype=hidden_dtype, device=weight.device)
    with torch.inference_mode(), _TopKInput(spec.n_experts) as spy:
        outputs = [part for part in block.gate(hidden) if part.is_floating_point()]
    logits = next(part for part in outputs if part.shape[-1] == spec.n_experts)
    gate = next(part for part in outputs if part is not logits)
    stages = {"weight": weight.dtype, "matmul": logits.dtype, "score": spy.dtype, "gate": gate.dtype}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in stages.items()}


def _weight(gate: torch.nn.Module) -> torch.Tensor:
    weight = gate.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _hidden_size(gate: torch.nn.Module) -> int:
    return int(_weight(gate).shape[1])


def find_blocks(model: torch.nn.Module) -> list[Block]:
    """Every MoE block of the model in order: a module with ``experts`` and a router beside them."""
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        gates = (getattr(module, gate, None) for gate in _GATE_NAMES)
        gate = next((gate for gate in gates if isinstance(gate, torch.nn.Module)), None)
        if isinstance(experts, torch.nn.Module) and gate is not None:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found.append(Block(numbers[0] if numbers else -1, gate, experts))
    return sorted(found, key=lambda block: block.decoder_layer)


def looks_like_probabilities(logits: torch.Tensor) -> bool:
    """True when the first rows are all non-negative and sum to 1: softmaxed under the name of logits."""
    sample = logits[:8].float()
    ones = torch.ones(len(sample), device=sample.device)
    return bool((sample >= 0).all()) and torch.allclose(sample.sum(-1), ones, atol=1e-2)


def _declared_logits_index(model: Any) -> int:
    """Which of the router's outputs the model itself declares to be its logits; the first by custom."""
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        recorder = recorder[0] if isinstance(recorder, list | tuple) else recorder
        if recorder is not None and hasattr(recorder, "index"):
            return int(recorder.index)
    return 0
