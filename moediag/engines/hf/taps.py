"""Taps on a transformers model: what its routers chose, and, for replay, what they are made to choose.

Invariants:
    - without forced routes the hooks only copy; hooked and unhooked outputs are equal bit for bit;
    - hooks and forced routes go in ``__enter__`` and come off in ``__exit__``, also when the body raises;
    - every MoE layer fires exactly once in a forward, and a forced layer uses its TopK exactly once, or an
      error names the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moediag.engines.assemble import kept_by, routing_arrays
from moediag.engines.routers import ModelRouting
from moediag.errors import CaptureError

# What the result's width is that of: where in its arguments, and on which dimension.
_LINEAR_MAPS = {
    torch.nn.functional.linear: (1, 0),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm), (1, -1)),
    torch.addmm: (2, -1),
}


@dataclass(frozen=True)
class Block:
    """One MoE block of the model: its decoder layer, what holds router and experts, and these two; E."""

    decoder_layer: int
    module: torch.nn.Module
    gate: torch.nn.Module
    experts: torch.nn.Module
    n_experts: int

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """One number per expert: parameters and buffers of that size in the router, or in the block itself."""
        own = (*self.module._parameters.items(), *self.module._buffers.items())
        inner = (*self.gate.named_parameters(), *self.gate.named_buffers())
        named = [*((name, tensor) for name, tensor in own), *((f"router.{name}", tensor) for name, tensor in inner)]
        return {name: one for name, one in named if one is not None and one.numel() == self.n_experts}

    def correction_bias(self, spec: ModelRouting) -> torch.Tensor | None:
        """Bias per expert that enters the choice only, (E,); None where the rule has none."""
        with self.in_place():
            return self.vectors[spec.bias_name].reshape(-1) if spec.has_correction_bias else None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The router's tensors are where it computes, also those that a device map keeps on the host or on disk.

        The hooks of such modules stand aside meanwhile: they would load them anew in every call.
        """
        with ExitStack() as stack:
            for module in (self.module, *self.gate.modules()):
                if getattr(getattr(module, "_hf_hook", None), "offload", False):
                    stack.enter_context(_brought(module))
            yield


@contextmanager
def _brought(module: Any) -> Iterator[None]:
    """One module without accelerate's hook, which brings its tensors and takes them away again."""
    hooked, hook = module.forward, module._hf_hook
    hook.pre_forward(module)
    module.forward = module._old_forward
    try:
        yield
    finally:
        module.forward = hooked
        hook.post_forward(module, None)


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
        self._handles: list[Any] = []
        self._replaced: list[tuple[torch.nn.Module, Any]] = []
        self._rows: dict[int, dict[str, torch.Tensor]] = {}

    def __enter__(self) -> RoutingTaps:
        for layer, block in enumerate(self.blocks):
            if self.forced is not None and layer in self.forced.layers:
                self._force(layer, block)
            if self.spec.logits_output is None and "logits" in self.kept:
                self._watch(layer, block)
            self._handles.append(block.gate.register_forward_hook(self._after_gate(layer, block)))
            self._handles.append(
                block.experts.register_forward_pre_hook(self._before_experts(layer, block), with_kwargs=True)
            )
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for gate, forward in reversed(self._replaced):
            del gate.forward
            if forward is not None:  # hooks of a device map lie there
                gate.forward = forward
        self._replaced.clear()

    def _replace(self, gate: torch.nn.Module, forward: Any) -> None:
        self._replaced.append((gate, gate.__dict__.get("forward")))
        gate.forward = forward

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
        biases = [block.correction_bias(self.spec) for block in self.blocks]
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
            with ForcedTopK(ids_TK, self.spec.n_experts, self.spec.top_k) as mode:
                output = original(*args, **kwargs)
            if mode.n_hits != 1:
                raise CaptureError(
                    f"MoE layer {layer}: the forced routes were used {mode.n_hits} times, expected once; "
                    "nothing was stored"
                )
            return output if weights is None else (_scores_of(ids_TK, weights[:, layer], output[0]), *output[1:])

        self._replace(block.gate, forward)

    def _watch(self, layer: int, block: Block) -> None:
        """Keep the logits of a router that does not return them: what its linear map over the experts gives."""
        original = block.gate.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with RouterMatmul(self.spec.n_experts) as mode:
                output = original(*args, **kwargs)
            if mode.logits is not None:
                self._keep_logits(layer, mode.logits)
            return output

        self._replace(block.gate, forward)

    def _after_gate(self, layer: int, block: Block) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else (output,)
            tensors = [part for part in parts if isinstance(part, torch.Tensor)]
            if self.spec.logits_output is not None:
                logits = tensors[self.spec.logits_output].detach()
                self._keep_logits(layer, logits.reshape(-1, logits.shape[-1]))
            if self.spec.scales_input:  # the experts get scaled inputs: ids and weights end here
                weights, ids = torch.topk(tensors[0], self.spec.top_k, dim=-1)
                self._store(layer, ids, weights)

        return hook

    def _before_experts(self, layer: int, block: Block) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            if self.spec.scales_input:
                return None
            ids, weights = _routes_among((*args, *kwargs.values()), layer)
            factor = self.spec.factor_after_experts
            forced = None if self.forced is None else self.forced.weights_TLK
            if forced is not None and self.forced is not None and layer in self.forced.layers:
                is_forced = self.forced.ids_TLK[:, layer] >= 0
                new = torch.where(is_forced, (forced[:, layer] / factor).to(weights), weights)
                args = tuple(new if one is weights else one for one in args)
                kwargs = {name: new if one is weights else one for name, one in kwargs.items()}
                weights = new
            effective = weights if factor == 1 else weights * factor
            self._store(layer, ids.reshape(-1, self.spec.top_k), effective.reshape(-1, self.spec.top_k))
            return None if forced is None else (args, kwargs)

        return hook

    def _store(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        rows = self._rows.setdefault(layer, {})
        if "ids" in rows:
            raise CaptureError(f"MoE layer {layer} fired twice in one forward; nothing was stored")
        rows["ids"] = ids.detach().clone()
        if "weights" in self.kept:
            rows["weights"] = weights.detach().clone()

    def _keep_logits(self, layer: int, logits: torch.Tensor) -> None:
        self._check_logits(layer, logits)
        if "logits" in self.kept:
            self._rows.setdefault(layer, {})["logits"] = logits

    def _check_logits(self, layer: int, logits: torch.Tensor) -> None:
        if not logits.is_floating_point() or logits.shape[-1] != self.spec.n_experts:
            raise CaptureError(
                f"MoE layer {layer}: the router's output {self.spec.logits_output} is {logits.dtype} of width "
                f"{logits.shape[-1]}, expected logits over E = {self.spec.n_experts}"
            )
        if looks_like_probabilities(logits):
            raise CaptureError(f"MoE layer {layer}: the router gives probabilities under the name of logits")


def _routes_among(given: tuple[Any, ...], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = find_routes(given)
    if found is None:
        raise CaptureError(f"MoE layer {layer}: its experts were given no ids and weights; nothing was stored")
    return found


def find_routes(given: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Expert ids and weights among what a module was given or gave: integers, and floats of the same shape."""
    tensors = [part for part in given if isinstance(part, torch.Tensor) and part.numel()]
    for ids in tensors:
        if ids.dtype in (torch.int64, torch.int32):
            weights = [one for one in tensors if one.is_floating_point() and one.shape == ids.shape]
            if weights:
                return ids, weights[0]
    return None


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


class ForcedTopK(TorchFunctionMode):
    """Answers the one TopK over E inside a router with given ids; values come from the router's own scores.

    Group-limited routers call TopK on groups first: only the call on a (T, E) tensor with k = K is the choice.
    """

    def __init__(self, ids_TK: torch.Tensor, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.ids_TK = ids_TK
        self.n_experts, self.top_k = n_experts, top_k
        self.n_hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        scores = args[0] if args else kwargs["input"]
        if scores.dim() != 2 or scores.shape[-1] != self.n_experts or result[1].shape[-1] != self.top_k:
            return result
        self.n_hits += 1
        forced = self.ids_TK.to(result[1])
        ids = torch.where(forced >= 0, forced, result[1])
        return torch.return_types.topk((scores.gather(1, ids), ids))


class RouterMatmul(TorchFunctionMode):
    """Notes the first linear map that is E wide: the logits. With others given, answers it with those."""

    def __init__(self, n_experts: int, answer_NE: torch.Tensor | None = None) -> None:
        super().__init__()
        self.n_experts, self.answer_NE = n_experts, answer_NE
        self.logits: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.logits is not None or func not in _LINEAR_MAPS:
            return func(*args, **(kwargs or {}))
        place, dimension = _LINEAR_MAPS[func]
        given = (*args, *(kwargs or {}).values())
        if given[place].dim() < 2 or given[place].shape[dimension] != self.n_experts:
            return func(*args, **(kwargs or {}))
        if self.answer_NE is None:
            result = func(*args, **(kwargs or {}))
        else:  # the map itself is spared: on a CPU it costs more than all else
            rows = given[place - 1]
            result = self.answer_NE.to(rows).reshape(*rows.shape[:-1], self.n_experts)
        self.logits = result.detach().reshape(-1, self.n_experts)
        return result


def find_blocks(model: torch.nn.Module) -> list[Block]:
    """Every MoE block of the model in order, by structure: ``experts``, and beside them what scores each of them.

    A router is the module whose matrices have one row per expert; of two, the one with the fewest others (a shared
    expert may happen to be E wide).
    """
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, torch.nn.Module):
            continue
        n_experts = count_experts(experts)
        gate = router_beside(module, experts, n_experts)
        if gate is not None:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found.append(Block(numbers[0] if numbers else -1, module, gate, experts, n_experts))
    return sorted(found, key=lambda block: block.decoder_layer)


def count_experts(experts: torch.nn.Module) -> int:
    """E: the first dimension of the stacked weights, or the length of the list; 0 where neither shows it."""
    if isinstance(experts, torch.nn.ModuleList):
        return len(experts)
    counts = Counter(tensor.shape[0] for tensor in experts.parameters() if tensor.dim() >= 3)
    return counts.most_common(1)[0][0] if counts else int(getattr(experts, "num_experts", 0))


def router_beside(module: torch.nn.Module, experts: torch.nn.Module, n_experts: int) -> torch.nn.Module | None:
    """The child of a block that scores every expert; None where there is none."""
    candidates: list[tuple[int, int, torch.nn.Module]] = []
    for child in module.children():
        rows = [tensor.shape[0] for tensor in child.parameters() if tensor.dim() == 2]
        is_stacked = any(tensor.dim() > 2 for tensor in child.parameters())
        if child is not experts and not is_stacked and n_experts and n_experts in rows:
            candidates.append((sum(n != n_experts for n in rows), len(candidates), child))
    return min(candidates, key=lambda entry: entry[:2])[2] if candidates else None


def looks_like_probabilities(logits: torch.Tensor) -> bool:
    """True when the first rows are all non-negative and sum to 1: softmaxed under the name of logits."""
    sample = logits[:8].float()
    ones = torch.ones(len(sample), device=sample.device)
    return bool((sample >= 0).all()) and torch.allclose(sample.sum(-1), ones, atol=1e-2)
