"""A model too large for float32, cut to its first decoder layers: embeddings, these, the final norm and the head.

What is cut loads in both engines as any checkpoint, so that its own log-probabilities hold every module that it has
against the other engine's: a test of these layers, and of no more.

Invariants:
    - every kind of layer is among those kept, and one layer more: kinds differ in the names of their tensors, or in an
      entry that config.json has per layer;
    - tensors are copied byte for byte, under their names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.routers import text_config
from moediag.engines.weights import StoredTensor, read_header
from moediag.errors import CheckpointError
from moediag.run.files import TOKENIZER_FILES

_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_PERIODS: Final = ("pattern", "interval", "step")
"""Parts of the names of entries that say after how many layers the kinds of layers repeat."""
_CHUNK: Final = 1 << 24


def n_first_layers(checkpoint: Checkpoint) -> int:
    """The fewest first layers with every kind of layer among them, and one more.

    Raises:
        CheckpointError: tensors are not called after their decoder layers.
    """
    text, kinds = text_config(checkpoint.config), _layer_kinds(checkpoint)
    n_layers = int(text["num_hidden_layers"])
    if set(kinds) < set(range(n_layers)):
        raise CheckpointError(f"{checkpoint.path}: its tensors are not called layers.N. for all {n_layers} layers")
    first: dict[Any, int] = {}
    for layer in range(n_layers):
        first.setdefault(kinds[layer], layer)
    periods = [
        value for name, value in text.items()
        if type(value) is int and value <= n_layers and any(part in name for part in _PERIODS)
    ]  # fmt: skip
    return min(n_layers, max(max(first.values()) + 2, *periods, 2))


def n_parameters_of_first(checkpoint: Checkpoint, n_layers: int) -> int:
    """Parameters that are left."""
    kept = (tensor for tensor in _stored(checkpoint) if _is_kept(tensor.name, n_layers))
    return sum(_size(tensor.shape) for tensor in kept)


def cut_to_first(checkpoint: Checkpoint, n_layers: int, folder: Path) -> Checkpoint:
    """The checkpoint with its first layers only, written into ``folder``; its record says what it is.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    folder.mkdir(parents=True)
    n_all = int(text_config(checkpoint.config)["num_hidden_layers"])
    _write_tensors([one for one in _stored(checkpoint) if _is_kept(one.name, n_layers)], folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_cut_config(checkpoint.config, n_layers)))
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json"):
        if (checkpoint.path / name).exists():
            shutil.copy(checkpoint.path / name, folder / name)
    for code in checkpoint.path.glob("*.py"):
        shutil.copy(code, folder / code.name)
    found = open_checkpoint(str(folder), trust_remote_code=checkpoint.trust_remote_code)
    return replace(found, name=f"{checkpoint.name} (first {n_layers} of {n_all} decoder layers)")


def _stored(checkpoint: Checkpoint) -> list[StoredTensor]:
    return [tensor for file in checkpoint.weight_files for tensor in read_header(file)]


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for width in shape:
        n *= width
    return n


def _is_kept(name: str, n_layers: int) -> bool:
    found = _LAYER.search(name)
    return found is None or int(found[1]) < n_layers


def _layer_kinds(checkpoint: Checkpoint) -> dict[int, tuple[Any, ...]]:
    """What tells the kinds of layers apart, by decoder layer."""
    text = text_config(checkpoint.config)
    n_layers = int(text["num_hidden_layers"])
    names: dict[int, set[str]] = {}
    for tensor in _stored(checkpoint):
        if found := _LAYER.search(tensor.name):
            names.setdefault(int(found[1]), set()).add(re.sub(r"\.\d+\.", ".#.", found[2]))
    lists = [value for value in text.values() if _is_per_layer(value, n_layers)]
    return {
        layer: (frozenset(own), *(str(value[layer]) for value in lists))
        for layer, own in names.items() if layer < n_layers
    }  # fmt: skip


def _is_per_layer(value: Any, n_layers: int) -> bool:
    return isinstance(value, list) and len(value) == n_layers


def _cut_config(config: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """config.json of the first layers: lists with an entry per layer are cut, and no layer predicts further tokens."""
    new: dict[str, Any] = json.loads(json.dumps(config))
    text = new["text_config"] if isinstance(new.get("text_config"), dict) else new
    n_all = int(text["num_hidden_layers"])
    for name, value in text.items():
        if _is_per_layer(value, n_all):
            text[name] = value[:n_layers]
        elif name in ("num_nextn_predict_layers", "num_mtp_modules"):
            text[name] = 0
    if text.get("mlp_only_layers"):
        text["mlp_only_layers"] = [layer for layer in config["mlp_only_layers"] if layer < n_layers]
    text["num_hidden_layers"] = n_layers
    return new


def _write_tensors(tensors: list[StoredTensor], path: Path) -> None:
    """One safetensors file of tensors that lie in others, a piece at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.n_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            with tensor.path.open("rb") as file:
                file.seek(tensor.begin)
                left = tensor.n_bytes
                while left:
                    piece = file.read(min(left, _CHUNK))
                    if not piece:
                        raise CheckpointError(f"{tensor.path} ended within tensor {tensor.name}; download it again")
                    out.write(piece)
                    left -= len(piece)
