"""What every module of a transformers model was given, and what it makes of given inputs: a task of an engine process.

The first pass is an ordinary forward of each sequence, unpadded, and keeps inputs and outputs. The reference pass, in
float32, gives every module the inputs of the first. Experts are given their arguments as a whole, with expert ids and
gate weights: no other choice of experts can pass for another function of the experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moediag.engines.assemble import FULL
from moediag.engines.hf.engine import held_model
from moediag.engines.hf.routing import prove_model, route
from moediag.engines.hf.taps import Block, ForcedRoutes, RoutingTaps, find_blocks
from moediag.engines.modules import ModuleTaps, arguments_of, float32_error, layer_list, storable
from moediag.engines.process import Held, Reporter
from moediag.engines.routers import ModelRouting
from moediag.errors import EngineError
from moediag.run.writer import RunWriter


def record_modules(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Run the passes and write ``<pass>-<sequence>.safetensors`` and ``<pass>.json`` to a folder.

    Args:
        options: ``folder`` (of the checkpoint), ``options`` (of transformers), ``passes`` (name, dtype, and the pass
            whose inputs are given, or None), ``sequences`` (token ids and the rows whose logits are kept), ``output``.

    Raises:
        EngineError: the model has no list of decoder layers.
    """
    output = Path(options["output"])
    for one in options["passes"]:
        model = held_model(held, options["folder"], {**options["options"], "dtype": one["dtype"]}, reporter)
        spec = _spec(model)
        facts: dict[str, Any] = {"float32_error": float32_error(model.device), "dtype": one["dtype"]}
        for i, (token_ids, head_rows) in enumerate(options["sequences"]):
            given = load_file(output / f"{one['given']}-{i}.safetensors") if one["given"] else None
            tensors, order = run_modules(model, spec, token_ids, head_rows, given)
            facts.setdefault("order", order)
            save_file(tensors, output / f"{one['name']}-{i}.safetensors")
            reporter.progress(i + 1, len(options["sequences"]), f"sequences ({one['name']})")
        facts["factor"] = spec.factor_after_experts if spec else 1.0
        facts["decoder_layers"] = list(spec.decoder_layers) if spec else []
        facts["shared"] = _has_shared(model)
        (output / f"{one['name']}.json").write_text(json.dumps(facts))


def run_modules(
    model: Any,
    spec: ModelRouting | None,
    token_ids: Sequence[int],
    head_rows: Sequence[int],
    given: dict[str, torch.Tensor] | None,
) -> tuple[dict[str, torch.Tensor], list[tuple[int, str, str]]]:
    """One forward of a sequence; what was kept by name, rows first, and the modules in the order in which they ran."""
    config = model.config.get_text_config()
    found = layer_list(model, config.num_hidden_layers)
    if found is None:
        raise EngineError(f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers")
    blocks, n_rows = find_blocks(model) if spec else [], len(token_ids)
    taps = ModuleTaps(*found, config.hidden_size, given)
    taps.begin(0, n_rows)
    ids = torch.tensor([list(token_ids)], device=model.device)
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(taps)
        for block in blocks:
            _tap_experts(stack, taps, block, spec)
        routing = stack.enter_context(RoutingTaps(model, spec, FULL, _forced(spec, given))) if spec else None
        _tap_head(stack, taps, model.get_output_embeddings())
        columns = torch.tensor(list(head_rows), device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        taps.seen["out:head"] = logits[0].float().to("cpu", copy=True)
        if routing is not None and spec is not None:
            _keep_routes(taps, routing.take(torch.arange(n_rows)), spec)
    for block in blocks:
        rule = _rule(block, (given or taps.seen).get(f"router:{block.decoder_layer}"))
        if rule is not None:
            taps.seen[f"rule:{block.decoder_layer}"] = rule
    return storable(taps.seen), taps.order


def _spec(model: Any) -> ModelRouting | None:
    if not find_blocks(model):
        return None
    config = model.config.get_text_config().to_dict()
    return prove_model(model, config, str(model.dtype).removeprefix("torch."), "the loaded model").routing


def _forced(spec: ModelRouting, given: dict[str, torch.Tensor] | None) -> ForcedRoutes | None:
    """Given routes for experts that see scaled inputs in place of ids and weights; the others get theirs directly."""
    if given is None or not spec.scales_input:
        return None
    ids, weights = (
        torch.stack([given[f"{name}:{layer}"] for layer in spec.decoder_layers], dim=1) for name in ("ids", "weights")
    )
    return ForcedRoutes(ids.long(), weights, range(spec.n_layers))


def _has_shared(model: Any) -> list[int]:
    """Decoder layers whose MoE block holds more than a router and routed experts."""
    return [
        block.decoder_layer
        for block in find_blocks(model)
        if block.decoder_layer >= 0
        and any(any(True for _ in child.parameters()) for child in _others(block))
        and not hasattr(block.module, "self_attn")  # the layer itself: nothing else is summed there
    ]


def _others(block: Block) -> list[torch.nn.Module]:
    return [child for child in block.module.children() if child is not block.gate and child is not block.experts]


def _tap_experts(stack: ExitStack, taps: ModuleTaps, block: Block, spec: ModelRouting | None) -> None:
    layer, factor = block.decoder_layer, 1.0 if spec is None else spec.factor_after_experts

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = arguments_of(args, kwargs)
        for place, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            name = f"arg:{layer}.{place}"
            if taps.given is None:
                taps.seen[name] = value.detach().to("cpu", copy=True)
            elif name in taps.given and not (spec is not None and spec.scales_input):
                rows = taps.given[name].to(value.device)
                arguments[place] = rows.to(value.dtype) if value.is_floating_point() else rows
        return tuple(arguments[i] for i in range(len(args))), {name: arguments[name] for name in kwargs}

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        routed = output[0] if isinstance(output, tuple) else output
        if routed.numel() == taps.n_rows * taps.n_hidden:
            taps.keep(f"routed:{layer}", routed * factor)

    for handle in (
        block.experts.register_forward_pre_hook(before, with_kwargs=True),
        block.experts.register_forward_hook(after),
    ):
        stack.callback(handle.remove)


def _tap_head(stack: ExitStack, taps: ModuleTaps, head: torch.nn.Module) -> None:
    def before(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        if taps.given is None:
            taps.keep("in:head", args[0])
            return None
        return (taps.given["in:head"].to(args[0].device, args[0].dtype).reshape(args[0].shape), *args[1:])

    stack.callback(head.register_forward_pre_hook(before).remove)


def _keep_routes(taps: ModuleTaps, rows: dict[str, torch.Tensor], spec: ModelRouting) -> None:
    names: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "router": lambda layer: rows["router_logits_TLE"][:, layer],
        "ids": lambda layer: rows["expert_ids_TLK"][:, layer].int(),
        "weights": lambda layer: rows["gate_weights_TLK"][:, layer],
    }
    for layer, decoder_layer in enumerate(spec.decoder_layers):
        for name, of_layer in names.items():
            taps.seen[f"{name}:{decoder_layer}"] = of_layer(layer).clone()  # type: ignore[arg-type]


def _rule(block: Block, logits_TE: torch.Tensor | None) -> torch.Tensor | None:
    """The gate weight of every expert that the block's own code makes of router logits, 0 where it is not chosen; None
    where it does not run on logits alone."""
    if logits_TE is None:
        return None
    rows = route(block, logits_TE)
    if rows.ids_NK is None or rows.gates_NK is None:
        return None
    gates_NK = rows.gates_NK * (1.0 if rows.factor is None else rows.factor)
    return torch.zeros(len(logits_TE), block.n_experts).scatter_add(1, rows.ids_NK.long(), gates_NK.float())
