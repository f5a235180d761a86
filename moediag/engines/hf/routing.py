"""Routers of a transformers model, shown on their own code: what they choose, and with what weight, for given logits.

A block is run with its experts replaced by a recorder and everything but its router by zeros, so that nothing of the
model but the routers has to be there: :func:`router_skeleton` builds it on the meta device and loads these alone. The
router's matmul (the first linear map that is E wide) is answered with the probes' logits; all else is its own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moediag.engines.hf.taps import Block, ForcedTopK, RouterMatmul, find_blocks, find_routes
from moediag.engines.proof import REFUSALS, Probes, Proof, Rows, Shown, fit, hints_of, routing_of
from moediag.engines.routers import text_config
from moediag.errors import CheckpointError


def prove(
    folder: Path, weight_files: tuple[Path, ...], config: dict[str, Any], dtype: str, trust_remote_code: bool = False
) -> Proof:
    """The rule of a checkpoint's routers, shown on transformers' code with their tensors alone.

    Raises:
        CheckpointError: no router is found, or not even its E and K; names the decoder layer and the reason.
    """
    model = router_skeleton(folder, weight_files, getattr(torch, dtype, torch.float32), trust_remote_code)
    return prove_model(model, config, dtype, str(folder))


def prove_model(model: torch.nn.Module, config: dict[str, Any], dtype: str, where: str) -> Proof:
    """The same of a model that is loaded, or of its skeleton.

    Raises:
        CheckpointError: as :func:`prove`.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise CheckpointError(
            f"{where}: config.json counts experts, and no module of {type(model).__name__} scores each of a module "
            "called experts beside it; such routing cannot be captured"
        )
    hints = hints_of(text_config(config), any("shared" in name for name, _ in blocks[0].module.named_children()))
    probes = Probes(dtype, tuple(n_group for n_group, _ in hints.groups))
    shown = show_routers(model, probes)
    fitted = fit(shown, hints)
    routing = routing_of(fitted, shown, hints, text_config(config), where)
    return Proof(fitted, shown, probes, hints, routing, _matrix(blocks[0]).shape[1])


def router_skeleton(
    folder: Path, weight_files: tuple[Path, ...], dtype: torch.dtype, trust_remote_code: bool = False
) -> torch.nn.Module:
    """The model on the meta device, with the tensors of its routers loaded and no others.

    Raises:
        CheckpointError: transformers cannot build it, or the files lack a router's tensor.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from moediag.engines.hf import bailing

    bailing.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # configuration and model classes raise anything; all mean: not this config.json
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers builds no model of it, a value may be missing or of another kind "
            f"than expected ({type(error).__name__}: {reason[:200]})"
        ) from None
    model.eval()
    places = {}
    names = {module: name for name, module in model.named_modules()}
    for block in find_blocks(model):
        for owner in (block.module, *block.gate.modules()):
            for name in (*owner._parameters, *owner._buffers):
                places[f"{names[owner]}.{name}"] = (owner, name)
    stored = _stored_names(model, weight_files, places)
    exact = re.compile("|".join(map(re.escape, getattr(model, "_keep_in_fp32_modules_strict", None) or ["$^"])))
    for name, (owner, attribute) in places.items():
        there = getattr(owner, attribute)
        if there is None or (name not in stored and attribute in owner._non_persistent_buffers_set):
            continue
        if name not in stored:
            raise CheckpointError(f"{folder}: no stored tensor is the router's {name}; the checkpoint is not complete")
        file, key = stored[name]
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(key)
        if tensor.numel() != there.numel():
            raise CheckpointError(f"{folder}: {key} is {tuple(tensor.shape)}, the router's is {tuple(there.shape)}")
        tensor = tensor.reshape(there.shape).to(torch.float32 if exact.search(name) else there.dtype)
        if attribute in owner._parameters:
            owner._parameters[attribute] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[attribute] = tensor
    return model  # type: ignore[no-any-return]


def _stored_names(model: Any, files: tuple[Path, ...], places: dict[str, Any]) -> dict[str, tuple[Path, str]]:
    """Model's name of a tensor: the file that holds it and its name there, by transformers' own renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state = model.state_dict()
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        for key in keys:
            renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            name = renamed if renamed in places else key
            if name in places:
                found[name] = (file, key)
    return found


def show_routers(model: torch.nn.Module, probes: Probes) -> list[Shown]:
    """What every router of the model does with the probes."""
    shown = []
    with torch.inference_mode():
        for block in find_blocks(model):
            with block.in_place():
                shown.append(_show(block, probes))
    return shown


def _show(block: Block, probes: Probes) -> Shown:
    weight = _matrix(block)
    logits_NE = probes.logits(block.n_experts)
    hidden_NH = probes.hidden(len(logits_NE), weight.shape[1]).to(weight.device, _hidden_dtype(block))
    shown = Shown(block.decoder_layer, block.n_experts, _run(block, hidden_NH, logits_NE))
    shown.weight_dtype = _name(weight.dtype)
    if shown.rows.reason:
        return shown
    shown.own_logits_ME = _run(block, hidden_NH[: probes.n_own], None).logits_NE
    with _constant_vectors_drawn(block) as is_drawn:
        if is_drawn:
            shown.drawn = _run(block, hidden_NH, logits_NE)
    if shown.rows.ids_NK is not None:
        shown.forced = _run(block, hidden_NH, logits_NE, probes.forced_ids(block.n_experts, shown.rows.top_k))
    return shown


def route(block: Block, logits_NE: torch.Tensor) -> Rows:
    """What a block's own routing code does with given logits.

    Run on another engine's logits it separates *logit drift* from *another routing rule*: where this reproduces the
    other engine's sets, only the logits differ.
    """
    with torch.inference_mode(), block.in_place():
        weight = _matrix(block)
        hidden_NH = torch.ones(len(logits_NE), weight.shape[1], dtype=_hidden_dtype(block), device=weight.device)
        return _run(block, hidden_NH, logits_NE)


def _run(
    block: Block, hidden_NH: torch.Tensor, logits_NE: torch.Tensor | None, forced_NK: torch.Tensor | None = None
) -> Rows:
    """One forward of a block without its experts.

    Args:
        logits_NE: what its matmul is answered with; None = its own.
        forced_NK: what its TopK is answered with.
    """
    seen: dict[str, Any] = {}
    answer = _Answer(block.n_experts, logits_NE)
    with ExitStack() as stack:
        stack.enter_context(_stubbed(block, seen, forced_NK))
        stack.enter_context(answer)
        try:
            output = block.module(hidden_NH[None])
        except REFUSALS as error:  # more than hidden states, or a part that is not there
            seen.clear()
            answer.begin()
            try:
                output = None
                block.gate(hidden_NH)
            except REFUSALS:
                lines = str(error).strip().splitlines()
                return Rows(
                    logits_output=None,
                    reason=f"its router does not run on hidden states alone ({lines[0] if lines else error!r})",
                )
    if answer.logits is None:
        return Rows(logits_output=None, reason="its logits come from no linear map that has one row per expert")
    rows = Rows(answer.logits.float().cpu(), _name(answer.logits.dtype))
    rows.vectors = {name: one.detach().float().reshape(-1).cpu().clone() for name, one in block.vectors.items()}
    rows.answer_NK = forced_NK
    is_logits = [_is_same(part, answer.logits) for part in seen["gate"]]
    rows.logits_output = is_logits.index(True) if any(is_logits) else None
    _take_routes(rows, seen, hidden_NH, output, answer.chosen if forced_NK is None else forced_NK)
    if (
        answer.compared is not None
        and rows.ids_NK is not None
        and answer.chosen is not None
        and answer.chosen.shape[-1] == rows.top_k
    ):
        rows.compared_NE, rows.compared_dtype = answer.compared.float().cpu(), _name(answer.compared.dtype)
    return rows


def _take_routes(
    rows: Rows, seen: dict[str, Any], hidden_NH: torch.Tensor, output: Any, chosen_NK: torch.Tensor | None
) -> None:
    """Ids and effective weights: what the experts were given, or what the router gave where they see none.

    Args:
        chosen_NK: what its TopK took: a weight too small for its dtype is 0 and shows no id.
    """
    n_rows, given = len(hidden_NH), seen.get("experts")
    found = find_routes(given if given is not None else seen["gate"])
    if found is not None:
        ids_NK, weights_NK = (one.reshape(n_rows, -1) for one in found)
        rows.ids_NK, rows.gates_NK, rows.gate_dtype = ids_NK.cpu(), weights_NK.float().cpu(), _name(weights_NK.dtype)
        if given is None:  # the router alone was run: what its block does with the weights is not seen
            return
        output = output[0] if isinstance(output, tuple) else output
        rows.factor = _factor(output.reshape(n_rows, -1), seen["answered"])
        return
    for part in seen["gate"]:  # one score per expert, 0 where it is not chosen, on the experts' input
        if given is None or not part.is_floating_point() or part.shape[-1] != rows.n_experts:
            continue
        chosen = _nonzero(part, chosen_NK)
        if chosen is None:
            continue
        scaled = hidden_NH[None] * part.transpose(0, 1)[..., None]
        if any(_is_same(one, scaled) for one in given):
            ids_NK, weights_NK = chosen, part.gather(1, chosen)
            rows.ids_NK, rows.gates_NK, rows.gate_dtype = ids_NK.cpu(), weights_NK.float().cpu(), _name(part.dtype)
            rows.scales_input = True
            return


def _nonzero(scores_NE: torch.Tensor, chosen_NK: torch.Tensor | None) -> torch.Tensor | None:
    """Ids of the scores that are not 0, as many in every row, by size; else what TopK took, where none lies outside."""
    is_used_NE = scores_NE != 0
    counts = set(is_used_NE.sum(-1).tolist())
    if len(counts) == 1 and 0 < (top_k := counts.pop()) < scores_NE.shape[-1]:
        return torch.topk(scores_NE, top_k, dim=-1).indices
    if chosen_NK is None or chosen_NK.shape[-1] == scores_NE.shape[-1]:
        return None
    ids_NK = chosen_NK.to(scores_NE.device).long()
    return ids_NK if not is_used_NE.scatter(1, ids_NK, False).any() else None


def _factor(output_NH: torch.Tensor, answered_NH: torch.Tensor | None) -> float | None:
    """What the block multiplies the experts' sum by; None where it does something else with it."""
    if answered_NH is None or output_NH.shape != answered_NH.shape:
        return None
    output, answered = output_NH[:8].double(), answered_NH[:8].double()  # the factor of one row is that of all
    factor = float((output * answered).sum() / answered.square().sum())
    is_scaled = torch.allclose(output, factor * answered, rtol=4 * torch.finfo(answered_NH.dtype).eps, atol=1e-6)
    return float(f"{factor:.6g}") if is_scaled and factor else None  # 0: something comes behind the experts (axk1)


def _noise(hidden: torch.Tensor) -> torch.Tensor:
    """Noise in the shape of hidden states; eight rows over and over, as llama4 gives every expert every row."""
    width = hidden.shape[-1]
    drawn = torch.randn(8, width, generator=torch.Generator().manual_seed(1)).to(hidden)
    return drawn[torch.arange(hidden.numel() // width, device=hidden.device) % 8].reshape(hidden.shape)


@contextmanager
def _stubbed(block: Block, seen: dict[str, Any], forced_NK: torch.Tensor | None) -> Iterator[None]:
    """Experts answer with noise and note what they were given, other children with zeros, the router is watched."""

    def experts(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen["experts"] = (*args, *kwargs.values())
        hidden = args[0] if args else next(iter(kwargs.values()))
        answered = seen["answered"] = _noise(hidden)
        return answered.clone()

    def zeros(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)

    gate = block.gate.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        forcing = ForcedTopK(forced_NK, block.n_experts, forced_NK.shape[1]) if forced_NK is not None else None
        with ExitStack() as stack:
            if forcing is not None:
                stack.enter_context(forcing)
            output = gate(*args, **kwargs)
        parts = output if isinstance(output, tuple | list) else (output,)
        seen["gate"] = [part for part in parts if isinstance(part, torch.Tensor)]
        return output

    stubs = {id(block.gate): watched, id(block.experts): experts}
    own = [(module, module.__dict__.get("forward")) for module in block.module.children()]
    for module, _ in own:
        module.forward = stubs.get(id(module), zeros)
    try:
        yield
    finally:
        for module, forward in own:
            del module.forward
            if forward is not None:  # hooks of a device map lie there
                module.forward = forward


@contextmanager
def _constant_vectors_drawn(block: Block) -> Iterator[bool]:
    """Vectors per expert that hold one number throughout (a bias of zeros) are drawn, so that their part is seen."""
    generator, kept = torch.Generator().manual_seed(2), []
    for tensor in block.vectors.values():
        if bool((tensor == tensor.flatten()[0]).all()):
            kept.append((tensor, tensor.clone()))
            first, drawn = float(tensor.flatten()[0]), torch.rand(tensor.shape, generator=generator)
            tensor.copy_(first * (0.5 + drawn) if first else drawn - 0.5)
    try:
        yield bool(kept)
    finally:
        for tensor, values in kept:
            tensor.copy_(values)


class _Answer(RouterMatmul):
    """Notes what the last TopK over E compares, too."""

    def begin(self) -> None:
        """Forget what was seen."""
        self.logits = None

    compared: torch.Tensor | None = None
    chosen: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else (kwargs or {})["input"]
            if scores.shape[-1] == self.n_experts:
                self.compared, self.chosen = scores.reshape(-1, self.n_experts).clone(), result[1].flatten(0, -2)
        return result


def _matrix(block: Block) -> torch.Tensor:
    return next(tensor for tensor in block.gate.parameters() if tensor.dim() == 2)


def _hidden_dtype(block: Block) -> torch.dtype:
    """Dtype of hidden states: the experts', since routers may be kept wider."""
    floats = [tensor.dtype for tensor in block.experts.parameters() if tensor.is_floating_point()]
    wide = [dtype for dtype in floats if torch.finfo(dtype).bits >= 16]
    return wide[0] if wide else torch.float32


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (one.reshape(-1, one.shape[-1]) for one in (a, b))
    if a.shape != b.shape or not a.is_floating_point():
        return False
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
