"""Captures and token tables as bytes: safetensors with legend names, parquet for tokens.

Invariants:
    - expert ids are uint8 up to E = 255, else uint16; the type's maximum stands for -1 (not routed);
    - margins, logp and entropy are float32; gate weights and router logits keep the engine's own dtype,
      and narrowing to it is checked to be exact;
    - reading needs neither torch nor pickle.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
from numpy.typing import NDArray

from moediag.errors import CorruptRunError
from moediag.notation import NOT_ROUTED
from moediag.run.capture import Capture, TokenRows

_NUMPY_DTYPE = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "U16": np.uint16}
_CAPTURE_DIMENSIONS = {
    "logp_T": 1,
    "entropy_T": 1,
    "expert_ids_TLK": 3,
    "gate_weights_TLK": 3,
    "margin_TL": 2,
    "logit_margin_TL": 2,
    "router_logits_TLE": 3,
}
TOKEN_COLUMNS = {
    "seq_id": "int64",
    "prompt_id": "int64",
    "sample_index": "int32",
    "position": "int32",
    "token_id": "int64",
    "is_response": "bool",
}


def encode_capture(capture: Capture, n_experts: int, score_dtypes: Mapping[str, str]) -> bytes:
    """Serialise a capture.

    Args:
        n_experts: E, decides the width of the ids; 0 for a dense model.
        score_dtypes: dtype per array name (``float32``, ``float16``, ``bfloat16``) where the engine's own
            dtype is narrower than float32.
    """
    keep: list[NDArray[Any]] = []  # TensorSpec holds bare pointers: the arrays must outlive it
    specs = {}
    for name, array in capture.arrays().items():
        if name == "expert_ids_TLK":
            data, dtype = _ids_to_storage(array, n_experts)
        else:
            data, dtype = _scores_to_storage(array, score_dtypes.get(name, "float32"), name)
        data = np.ascontiguousarray(data)
        keep.append(data)
        specs[name] = safetensors.TensorSpec(
            dtype=dtype, shape=data.shape, data_ptr=data.ctypes.data, data_len=data.nbytes
        )
    return bytes(safetensors.serialize(specs, metadata={"format": "moediag capture"}))


def decode_capture(data: bytes, where: str) -> Capture:
    """Read a capture written by :func:`encode_capture`; everything float becomes float32.

    Raises:
        CorruptRunError: not a capture, or arrays of unexpected type or shape.
    """
    try:
        tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptRunError(f"{where} is not a safetensors file ({error}); capture that shard again") from None
    arrays = {name: _from_storage(name, tensor, where) for name, tensor in tensors.items()}
    for name in ("logp_T", "entropy_T"):
        if name not in arrays:
            raise CorruptRunError(f"{where} holds no {name}; capture that shard again")
    n_rows = {len(array) for array in arrays.values()}
    if len(n_rows) > 1:
        raise CorruptRunError(f"{where}: arrays have different row counts {sorted(n_rows)}; capture that shard again")
    return Capture(**arrays)


def encode_tokens(tokens: TokenRows) -> bytes:
    """Serialise a token table as parquet."""
    table = pa.table({name: getattr(tokens, f"{name}_T") for name in TOKEN_COLUMNS})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def decode_tokens(data: bytes, where: str) -> TokenRows:
    """Read a token table.

    Raises:
        CorruptRunError: not parquet, or not the declared columns, or not whole sequences in order.
    """
    try:
        frame: pd.DataFrame = pq.read_table(io.BytesIO(data)).to_pandas()
        arrays = {f"{name}_T": frame[name].to_numpy(dtype=dtype) for name, dtype in TOKEN_COLUMNS.items()}
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        raise CorruptRunError(f"{where} is not a moediag token table ({error}); capture that shard again") from None
    return TokenRows(**arrays).check(where)


def bytes_per_token(
    n_layers: int, top_k: int, n_experts: int, weight_bytes: int = 4, logits_bytes: int = 0
) -> dict[str, int]:
    """Stored bytes per token row, by array; ``logits_bytes`` per logit, 0 when logits are not kept.

    Example:
        >>> bytes_per_token(n_layers=48, top_k=8, n_experts=128, weight_bytes=2)["expert_ids_TLK"]
        384
    """
    sizes = {"logp_T": 4, "entropy_T": 4}
    if n_layers:
        sizes["expert_ids_TLK"] = n_layers * top_k * _id_dtype(n_experts)().itemsize
        sizes["gate_weights_TLK"] = n_layers * top_k * weight_bytes
        sizes["margin_TL"] = sizes["logit_margin_TL"] = n_layers * 4
        if logits_bytes:
            sizes["router_logits_TLE"] = n_layers * n_experts * logits_bytes
    return sizes


def _id_dtype(n_experts: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if n_experts <= np.iinfo(np.uint8).max else np.uint16


def _ids_to_storage(ids_TLK: NDArray[Any], n_experts: int) -> tuple[NDArray[Any], str]:
    dtype = _id_dtype(n_experts)
    if ids_TLK.size and (ids_TLK.max() >= n_experts or ids_TLK.min() < NOT_ROUTED):
        raise ValueError(f"expert ids must lie in [-1, {n_experts}), found {ids_TLK.min()}..{ids_TLK.max()}")
    stored = np.where(ids_TLK == NOT_ROUTED, np.iinfo(dtype).max, ids_TLK).astype(dtype)
    return stored, stored.dtype.name


def _scores_to_storage(array: NDArray[Any], dtype: str, name: str) -> tuple[NDArray[Any], str]:
    single = np.asarray(array, dtype=np.float32)
    if dtype == "float32":
        return single, dtype
    if dtype == "float16":
        half = single.astype(np.float16)
        exact = np.array_equal(half.astype(np.float32), single, equal_nan=True)
        narrow: NDArray[Any] = half
    elif dtype == "bfloat16":
        bits = np.ascontiguousarray(single).view(np.uint32)
        exact = not np.any(bits & 0xFFFF)
        narrow = (bits >> 16).astype(np.uint16)
    else:
        raise ValueError(f"{name}: dtype {dtype} is not stored; wanted float32, float16 or bfloat16")
    if not exact:
        raise ValueError(f"{name}: values are not exact in {dtype}; store them as float32")
    return narrow, dtype


def _from_storage(name: str, tensor: Mapping[str, Any], where: str) -> NDArray[Any]:
    dtype, shape = tensor["dtype"], tuple(tensor["shape"])
    if _CAPTURE_DIMENSIONS.get(name) != len(shape):
        raise CorruptRunError(f"{where}: unexpected array {name} of shape {shape}; capture that shard again")
    if dtype == "BF16":
        bits = np.frombuffer(tensor["data"], dtype=np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if dtype not in _NUMPY_DTYPE:
        raise CorruptRunError(f"{where}: array {name} has dtype {dtype}, which captures never have")
    array: NDArray[Any] = np.frombuffer(tensor["data"], dtype=_NUMPY_DTYPE[dtype]).reshape(shape)
    if name == "expert_ids_TLK":
        wide = array.astype(np.int32)
        return np.where(wide == np.iinfo(array.dtype).max, NOT_ROUTED, wide).astype(np.int16)
    return array.astype(np.float32)
