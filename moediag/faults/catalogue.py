"""The catalogue of faults: what each changes, in which module, and how it is planted.

A fault of the **function** is planted in an edited copy of the checkpoint, which one engine loads while the run's
record still names the clean one: to the run it looks as if the engine computed something else. A fault of **rounding**
is planted in the loaded model, of either engine: numbers that pass a module are kept in fewer bits, on one side only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from moediag.engines.checkpoint import Checkpoint
from moediag.engines.hf.perturbation import rounded_to_fp8
from moediag.engines.routers import text_config
from moediag.errors import CheckpointError

FUNCTION, ROUNDING = "function", "rounding"

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, dict[str, Any], int], int]
"""Changes tensors by name, or entries of config.json, in place, in one decoder layer; returns how many it changed."""
Undo = Callable[[], None]

NO_MODULE: Final = "has no module for this"
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_MOE: Final = "(?:mlp|block_sparse_moe|feed_forward)"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        words: what it changes, by how much.
        kind: :data:`FUNCTION` or :data:`ROUNDING`.
        module: where it is, as a diagnosis should name it.
        of_layer: it is in one decoder layer; else in the whole model.
        edit: of the checkpoint; faults of the function have one.
        input_of, output_of: modules by name whose numbers are rounded to float8 (e4m3, one scale per call); faults of
            rounding have one of them.
    """

    words: str
    kind: str
    module: str
    of_layer: bool = True
    edit: Edit | None = None
    input_of: str = ""
    output_of: str = ""


# Edits of a checkpoint


def _some(tensors: Tensors, layer: int, *names: str) -> list[str]:
    """Names of the layer's tensors that match the first pattern that any does."""
    own = {name: found[2] for name in tensors if (found := _LAYER.search(name)) and int(found[1]) == layer}
    for pattern in names:
        chosen = [name for name, rest in own.items() if re.fullmatch(pattern, rest)]
        if chosen:
            return chosen
    return []


def _scaled(factor: float, *names: str) -> Edit:
    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        chosen = _some(tensors, layer, *names)
        for name in chosen:
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        return len(chosen)

    return edit


def _noisy(share: float, *names: str) -> Edit:
    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        chosen, generator = _some(tensors, layer, *names), torch.Generator().manual_seed(0)
        for name in chosen:
            values = tensors[name].float()
            noise = torch.randn(values.shape, generator=generator) * values.std()
            tensors[name] = (values + share * noise).to(tensors[name].dtype)
        return len(chosen)

    return edit


def _redrawn_expert(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
    """The first expert's output matrix drawn anew, as wide as it was."""
    generator = torch.Generator().manual_seed(0)
    one = _some(tensors, layer, rf"{_MOE}\.experts\.0\.(?:down_proj|w2|w2_linear)\.weight")
    for name in one:
        values = tensors[name].float()
        tensors[name] = (torch.randn(values.shape, generator=generator) * values.std()).to(tensors[name].dtype)
    fused = [] if one else _some(tensors, layer, rf"{_MOE}\.experts\.down_proj(?:\.weight)?")
    for name in fused:
        values = tensors[name].float()
        values[0] = torch.randn(values[0].shape, generator=generator) * values[0].std()
        tensors[name] = values.to(tensors[name].dtype)
    return len(one) + len(fused)


def _head(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
    """The head's weights, where it has its own, else the final norm's: tied ones would change the embeddings, too."""
    chosen = [name for name in tensors if name.endswith("lm_head.weight")]
    factor = 1.02
    if not chosen:
        chosen, factor = [name for name in tensors if re.search(r"(?<!layer)(?:^|\.)(?:final_)?norm\.weight$", name)
                          and not _LAYER.search(name)], 1.02  # fmt: skip
    for name in chosen:
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    return len(chosen)


def _rope(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
    text, changed = _text(config), 0
    for holder in (text, text.get("rope_parameters") or {}, text.get("rope_scaling") or {}):
        if isinstance(holder.get("rope_theta"), int | float):
            holder["rope_theta"] *= 1.05
            changed += 1
    return changed


def _flipped(name: str) -> Edit:
    def edit(tensors: Tensors, config: dict[str, Any], layer: int) -> int:
        text = _text(config)
        if not isinstance(text.get(name), bool):
            return 0
        text[name] = not text[name]
        return 1

    return edit


def _text(config: dict[str, Any]) -> dict[str, Any]:
    found = text_config(config)
    if found is config or not isinstance(config.get("text_config"), dict):
        return config
    text: dict[str, Any] = config["text_config"]
    return text


FAULTS: Final[Mapping[str, Fault]] = {
    "attention-scale": Fault(
        "queries of one layer 5 % longer: the softmax scale of its attention", FUNCTION, "attention",
        edit=_scaled(1.05, r"self_attn\.q_norm\.weight", r"self_attn\.q_b_proj\.weight",
                     r"self_attn\.q_proj\.(?:weight|bias)")),
    "rope-theta": Fault("rope theta 5 % larger", FUNCTION, "attention", of_layer=False, edit=_rope),
    "expert-redrawn": Fault("one expert's output matrix drawn anew", FUNCTION, "routed experts", edit=_redrawn_expert),
    "norm-weight": Fault(
        "weights of the norm before one layer's experts 5 % larger", FUNCTION, "norm",
        edit=_scaled(1.05, r"post_attention_layernorm\.weight", r"pre_mlp_layernorm\.weight", r"ffn_norm\.weight")),
    "shared-expert": Fault(
        "one layer's shared expert 5 % larger", FUNCTION, "shared expert",
        edit=_scaled(1.05, rf"{_MOE}\.shared_experts?\.down_proj\.weight")),
    "head": Fault("head 2 % larger (tied: the final norm)", FUNCTION, "head", of_layer=False, edit=_head),
    "router-weight": Fault(
        "one router's weights off by 1 % of their spread", FUNCTION, "router",
        edit=_noisy(0.01, rf"{_MOE}\.(?:gate|router)\.(?:wg\.)?weight")),
    "renormalisation": Fault("norm_topk_prob flipped", FUNCTION, "router", of_layer=False,
                             edit=_flipped("norm_topk_prob")),
    "router-fp8": Fault("every router's input in float8", ROUNDING, "router", of_layer=False,
                        input_of=rf"{_MOE}\.(?:gate|router)"),
    "activations-fp8": Fault("every MoE block's input in float8", ROUNDING, "routed experts", of_layer=False,
                             input_of=_MOE),
    "kv-fp8": Fault("keys and values in float8", ROUNDING, "attention", of_layer=False,
                    output_of=r"(?:self_attn|attn)\.(?:k_proj|v_proj|qkv_proj)"),
    "head-fp8": Fault("the head's input in float8", ROUNDING, "head", of_layer=False,
                      input_of="lm_head|logits_processor"),
}  # fmt: skip
"""Faults by name."""


def planted_checkpoint(
    clean: Checkpoint, fault: Fault, layer: int, folder: Path, dtypes: tuple[str, ...]
) -> Checkpoint:
    """An edited copy in ``folder``, which calls itself the clean checkpoint: same record, same routing, same proof.

    Args:
        layer: decoder layer that a fault of one layer is in.
        dtypes: that engines will load it in.

    Raises:
        CheckpointError: the checkpoint has nothing that the fault could change.
    """
    from safetensors.torch import load_file, save_file

    assert fault.edit is not None
    tensors: Tensors = {}
    for path in clean.weight_files:
        tensors |= load_file(path)
    config = json.loads(json.dumps(clean.config))
    if not fault.edit(tensors, config, layer):
        raise CheckpointError(f"{clean.path} has nothing to change: {fault.words}; choose another layer or fault")
    shutil.copytree(clean.path, folder, dirs_exist_ok=True)
    for name in (*(path.name for path in clean.weight_files), "model.safetensors.index.json"):
        (folder / name).unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    planted = replace(clean, path=folder, config=config, weight_files=(folder / "model.safetensors",))
    routing, record = clean.routing, clean.record
    if routing is not None:
        for dtype in dtypes:
            clean.proof(dtype)
    vars(planted).update(record=record, routing=routing, digests=clean.digests, tensors=clean.tensors,
                         _proofs=clean._proofs)  # fmt: skip
    return planted


# Rounding inside a loaded model


def plant(model: torch.nn.Module, name: str, moe_layers: tuple[int, ...]) -> Undo:
    """Round what the fault's modules receive, or give, in a loaded model of either engine; returns how to undo it.

    Args:
        name: of a fault of rounding.
        moe_layers: decoder layers that have routers.

    Raises:
        CheckpointError: the model has no such module.
    """
    fault, handles = FAULTS[name], []
    for path, module in model.named_modules():
        found = _LAYER.search(path)
        rest = found[2] if found else path.rpartition(".")[2]
        is_elsewhere = found is not None and fault.input_of.startswith(_MOE) and int(found[1]) not in moe_layers
        if is_elsewhere or (found is None) != (fault.module == "head"):
            continue
        if fault.input_of and re.fullmatch(fault.input_of, rest):
            handles.append(module.register_forward_pre_hook(_rounded_input, with_kwargs=True))
        elif fault.output_of and re.fullmatch(fault.output_of, rest):
            handles.append(module.register_forward_hook(_rounded_output))
    if not handles:
        raise CheckpointError(f"{type(model).__name__} {NO_MODULE}: {fault.words}; choose another fault")

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _rounded_input(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states: the first floating-point tensor that the module is given (vLLM's head comes before them)."""
    args, kwargs = tuple(args), dict(kwargs)
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return (*args[:i], rounded_to_fp8(value), *args[i + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return args, {**kwargs, key: rounded_to_fp8(value)}
    return args, kwargs


def _rounded_output(module: Any, args: Any, output: Any) -> Any:
    """Keys and values; queries that lie before them in one tensor (vLLM) stay as they are."""
    values = output[0] if isinstance(output, tuple) else output
    n_query = int(module.num_heads * module.head_size) if hasattr(module, "num_kv_heads") else 0
    n_key = (values.shape[-1] - n_query) // 2 if n_query else values.shape[-1]
    parts = values.split([n_query, *([n_key] * ((values.shape[-1] - n_query) // n_key))], dim=-1)
    rounded = torch.cat([parts[0], *(rounded_to_fp8(part) for part in parts[1:])], dim=-1)
    return (rounded, *output[1:]) if isinstance(output, tuple) else rounded
