"""What a shard holds: token rows and captures of whole sequences, in memory and as bytes.

Invariants:
    - every arm of a run has the same shards, so a slice of them means the same sequences in every arm;
    - rows are sorted by (seq_id, position) and each sequence is whole, positions 0 .. n-1;
    - in memory float arrays are float32 whatever the engine's dtype was (float32 holds bf16 and fp16 exactly) and
      expert ids int16 with -1 = not routed; an array that an arm does not have is absent (``None``), never zeros;
    - as bytes (safetensors with legend names, parquet for tokens) expert ids are uint8 up to E = 255, else uint16, the
      type's maximum standing for -1; gate weights and router logits keep the engine's own dtype, and narrowing to it is
      checked to be exact; reading needs neither torch nor pickle.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
from numpy.typing import NDArray

from moediag.errors import CorruptRunError, RunError
from moediag.notation import NO_TOKEN, NOT_ROUTED

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


_ID_DTYPES = {"U8": np.uint8, "U16": np.uint16}
_SCORE_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
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
    "seq_id": pa.int64(),
    "prompt_id": pa.int64(),
    "sample_index": pa.int32(),
    "position": pa.int32(),
    "token_id": pa.int64(),
    "is_response": pa.bool_(),
    "is_trained": pa.bool_(),
    "turn": pa.int32(),
    "weight_version": pa.string(),
    "advantage": pa.float64(),
    "reward": pa.float64(),
}
"""Columns of a token table; runs of schema 1 have the first six."""
_ABSENT: dict[str, Any] = {
    "token_id": NO_TOKEN,
    "turn": -1,
    "weight_version": None,
    "advantage": np.nan,
    "reward": np.nan,
}
"""What stands in memory for a null of the columns that may hold one."""
_OF_SCHEMA_1 = ("seq_id", "prompt_id", "sample_index", "position", "token_id", "is_response")


@dataclass(frozen=True)
class Shard:
    """A range of whole sequences; every arm has the same shards."""

    index: int
    first_sequence: int
    n_sequences: int

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"shard-{self.index:05d}"

    @property
    def seq_ids(self) -> range:
        """Sequence ids of the shard."""
        return range(self.first_sequence, self.first_sequence + self.n_sequences)


@dataclass(frozen=True)
class Slice:
    """The shards that one worker takes: those whose index leaves ``index`` when divided by ``count``.

    Strided and not in blocks, so that workers that start together finish together however many shards are
    already there.

    Args:
        index: which worker, 0-based.
        count: how many workers fill the run.

    Example:
        >>> [Slice(1, 3).has(Shard(i, i, 1)) for i in range(5)]
        [False, True, False, False, True]
    """

    index: int = 0
    count: int = 1

    def has(self, shard: Shard) -> bool:
        """True when the shard is this worker's to take."""
        return shard.index % self.count == self.index

    def check(self) -> Slice:
        """Return self when there is such a worker.

        Raises:
            RunError: there is not.
        """
        if not 0 <= self.index < self.count:
            raise RunError(
                f"--shard-index {self.index} with --num-shards {self.count}: expected an index from 0 to "
                f"{max(self.count - 1, 0)} (0-based), one for every worker"
            )
        return self

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Slice()
"""The slice of a worker that takes every shard it can get."""


def split_into_shards(n_sequences: int, shard_size: int) -> list[Shard]:
    """Shards of ``shard_size`` whole sequences; the last may be smaller."""
    starts = range(0, n_sequences, shard_size)
    return [Shard(i, start, min(shard_size, n_sequences - start)) for i, start in enumerate(starts)]


LARGEST_ROUNDED_LOGP: Final = 1e-4
"""Log-probability [nat] up to which a value above 0 is rounding and counts as 0: a float32 logit less its logsumexp is
off by half a unit in the last place, 6.1e-5 for logits of 1,024 to 2,048. Beyond it, it is no log-probability."""


def is_scored(logp_train_T: NDArray[Any], logp_infer_T: NDArray[Any]) -> Bool:
    """Which tokens have two finite log-probabilities."""
    return np.asarray(np.isfinite(logp_train_T) & np.isfinite(logp_infer_T))


def is_impossible(logp_train_T: NDArray[Any], logp_infer_T: NDArray[Any]) -> Bool:
    """Which tokens have an infinite log-probability on a side: a probability of 0, which was yet sampled."""
    return np.asarray(np.isinf(logp_train_T) | np.isinf(logp_infer_T))


@dataclass(frozen=True)
class TokenRows:
    """The token table of whole sequences: what every arm of a run scores.

    Args:
        token_id_T: -1 = not known.
        is_response_T: not the prompt; a sequence whose prompt is not known begins with its response.
        is_trained_T: the loss mask: response rows that a tool or the environment wrote are not trained; None = every
            response row is.
        turn_T: which turn of a conversation, -1 = not known.
        weight_version_T: version of the weights that sampled the token, text, None = not known.
        advantage_T, reward_T: NaN = not known.
    """

    seq_id_T: Int64
    prompt_id_T: Int64
    sample_index_T: Int32
    position_T: Int32
    token_id_T: Int64
    is_response_T: Bool
    is_trained_T: Bool | None = None
    turn_T: Int32 | None = None
    weight_version_T: NDArray[np.object_] | None = None
    advantage_T: Float64 | None = None
    reward_T: Float64 | None = None

    def __len__(self) -> int:
        return len(self.seq_id_T)

    @property
    def is_scored_T(self) -> Bool:  # noqa: N802 - the legend suffix
        """Rows that count: response rows under the loss mask."""
        return self.is_response_T if self.is_trained_T is None else self.is_trained_T

    def sequence_bounds(self) -> list[tuple[int, int]]:
        """[start, end) of every sequence, in order; an empty table has none."""
        if not len(self):
            return []
        starts = np.flatnonzero(np.r_[True, np.diff(self.seq_id_T) != 0])
        return list(zip(starts.tolist(), [*starts[1:].tolist(), len(self)], strict=True))

    def check(self, where: str) -> TokenRows:
        """Return self when rows are whole sequences in order, each prompt before its response.

        Raises:
            CorruptRunError: they are not, or a row is trained that is no response.
        """
        for start, end in self.sequence_bounds():
            seq = int(self.seq_id_T[start])
            if not np.array_equal(self.position_T[start:end], np.arange(end - start)):
                raise CorruptRunError(f"{where}: sequence {seq} should have positions 0..{end - start - 1} in order")
            response = self.is_response_T[start:end]
            if np.any(response[:-1] & ~response[1:]):
                raise CorruptRunError(f"{where}: sequence {seq} is not a prompt followed by a response")
        if np.any(np.diff(self.seq_id_T) < 0):
            raise CorruptRunError(f"{where}: sequences are not in order")
        if self.is_trained_T is not None and np.any(self.is_trained_T & ~self.is_response_T):
            raise CorruptRunError(f"{where}: prompt rows are marked as trained")
        return self


@dataclass(frozen=True)
class Capture:
    """One arm's arrays for the rows of a :class:`TokenRows`, row by row.

    ``logp_T`` [nat] and ``entropy_T`` [nat] are NaN where nothing was scored (prompt rows). Every array but ``logp_T``
    is None where the arm does not have it. K is that of the arm's largest layer; a layer with fewer is padded with -1.
    ``margin_TL`` is in choice-score space, ``logit_margin_TL`` in raw router logits: the smallest chosen
    minus the largest not chosen logit, hence negative where a bias or a group rule overruled the logits.
    """

    logp_T: Float32
    entropy_T: Float32 | None = None
    expert_ids_TLK: Int16 | None = None
    gate_weights_TLK: Float32 | None = None
    margin_TL: Float32 | None = None
    logit_margin_TL: Float32 | None = None
    router_logits_TLE: Float32 | None = None

    @property
    def is_routed(self) -> bool:
        """True for a mixture-of-experts capture."""
        return self.expert_ids_TLK is not None

    def unrouted(self) -> Capture:
        """The capture without its routing arrays."""
        return Capture(self.logp_T, self.entropy_T)

    def of_layers(self, layers: Sequence[int], top_k: int, n_experts: int) -> Capture:
        """The capture in some MoE layers, by their index, which have K and E at most as given."""
        taken = {}
        for name, array in self.arrays().items():
            letters = name.rpartition("_")[2]
            if "L" in letters and list(layers) != list(range(array.shape[1])):  # else it would be copied whole
                array = array[:, list(layers)]
            width = {"K": top_k, "E": n_experts}.get(letters[-1])
            taken[name] = array if width is None else array[..., :width]
        return Capture(**taken)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays present, by legend name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def arrays_of(
    level: str,
    is_routed: bool,
    *,
    has_rule: bool = True,
    has_entropy: bool = True,
    has_distributions: bool = False,
) -> tuple[str, ...]:
    """Names of the arrays that an arm keeps.

    Args:
        level: how much of routing: ``ids``, ``margins`` or ``full``.
        has_rule: how experts are chosen is known; else router logits stand in the margins' place.
        has_distributions: whole next-token distributions of some sequences, too.
    """
    arrays = ["logp_T", *(["entropy_T"] if has_entropy else [])]
    if is_routed:
        arrays.append("expert_ids_TLK")
        if level != "ids":
            arrays += ["gate_weights_TLK", *(["margin_TL", "logit_margin_TL"] if has_rule else [])]
        if level == "full" or (level != "ids" and not has_rule):
            arrays.append("router_logits_TLE")
    return (*arrays, *(["distributions"] if has_distributions else []))


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
    if "logp_T" not in arrays:
        raise CorruptRunError(f"{where} holds no logp_T; capture that shard again")
    n_rows = {len(array) for array in arrays.values()}
    if len(n_rows) > 1:
        raise CorruptRunError(f"{where}: arrays have different row counts {sorted(n_rows)}; capture that shard again")
    return Capture(**arrays)


def encode_tokens(tokens: TokenRows) -> bytes:
    """Serialise a token table as parquet: a column that is not known is all null."""
    columns = {}
    for name, kind in TOKEN_COLUMNS.items():
        values_T = tokens.is_scored_T if name == "is_trained" else getattr(tokens, f"{name}_T")
        if values_T is None:
            columns[name] = pa.nulls(len(tokens), kind)
        elif name in _ABSENT:
            columns[name] = pa.array(values_T, kind, mask=_is_absent(name, values_T))
        else:
            columns[name] = pa.array(values_T, kind)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def decode_tokens(data: bytes, where: str) -> TokenRows:
    """Read a token table.

    Raises:
        CorruptRunError: not parquet, or not the declared columns, or not whole sequences in order.
    """
    table = _read_table(data, where, "a moediag token table")
    arrays = {}
    for name, kind in TOKEN_COLUMNS.items():
        column = table[name] if name in table.column_names else None
        if column is None and name not in _OF_SCHEMA_1:
            continue
        if column is None or column.type != kind or (column.null_count and name not in _ABSENT):
            found = "absent" if column is None else f"{column.type} with {column.null_count} nulls"
            raise CorruptRunError(f"{where}: column {name} should be {kind}, found {found}; capture that shard again")
        if column.null_count == len(column) and name not in _OF_SCHEMA_1 and len(column):
            continue  # not known of any token
        arrays[f"{name}_T"] = _to_memory(name, column)
    return TokenRows(**arrays).check(where)


def _is_absent(name: str, values_T: NDArray[Any]) -> NDArray[np.bool_]:
    absent = _ABSENT[name]
    if absent is None:
        return np.array([value is None for value in values_T], dtype=bool)
    return np.asarray(np.isnan(values_T) if absent != absent else values_T == absent)


def _to_memory(name: str, column: pa.ChunkedArray) -> NDArray[Any]:
    if name == "weight_version":
        return np.array(column.to_pylist(), dtype=object)
    if column.null_count:
        column = column.fill_null(_ABSENT[name])
    array: NDArray[Any] = column.to_numpy()
    return array


def encode_prompts(prompt_ids: list[list[int]], completion_ids: list[list[int]] | None) -> bytes:
    """Serialise the tokenised prompts, and the completions where they are given, as parquet."""
    kind = pa.list_(pa.int64())
    completions = completion_ids if completion_ids is not None else [None] * len(prompt_ids)
    columns = {"prompt_token_ids": pa.array(prompt_ids, kind), "completion_token_ids": pa.array(completions, kind)}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def decode_prompts(data: bytes, where: str) -> tuple[list[list[int]], list[list[int]] | None]:
    """Read the prompts table: token ids of every prompt, and of every given completion or None.

    Raises:
        CorruptRunError: not parquet, or not lists of token ids.
    """
    table = _read_table(data, where, "a table of prompts")
    prompts = _token_lists(table, "prompt_token_ids", where)
    has_completions = "completion_token_ids" in table.column_names and (
        table["completion_token_ids"].null_count < len(table)
    )
    completions = _token_lists(table, "completion_token_ids", where) if has_completions else None
    return prompts, completions


def _read_table(data: bytes, where: str, what: str) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(data))
        table.validate(full=True)
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptRunError(f"{where} is not {what} ({reason}); restore it or capture again") from None
    return table


def _token_lists(table: pa.Table, name: str, where: str) -> list[list[int]]:
    """A column of non-empty lists of token ids."""
    lists: list[Any] = table[name].to_pylist() if name in table.column_names else [None]
    is_lists = bool(lists) and all(
        isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)
        for ids in lists
    )
    if not is_lists:
        raise CorruptRunError(f"{where}: {name} should be lists of token ids; restore it or capture again")
    return lists


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
        raise ValueError(f"{name}: dtype {dtype} is not stored; expected float32, float16 or bfloat16")
    if not exact:
        raise ValueError(f"{name}: values are not exact in {dtype}; store them as float32")
    return narrow, dtype


def _from_storage(name: str, tensor: Mapping[str, Any], where: str) -> NDArray[Any]:
    dtype, shape = tensor["dtype"], tuple(tensor["shape"])
    if _CAPTURE_DIMENSIONS.get(name) != len(shape):
        raise CorruptRunError(f"{where}: unexpected array {name} of shape {shape}; capture that shard again")
    is_ids = name == "expert_ids_TLK"
    known: dict[str, Any] = _ID_DTYPES if is_ids else _SCORE_DTYPES
    if dtype not in known:
        raise CorruptRunError(f"{where}: array {name} has dtype {dtype}, which it never has; capture that shard again")
    array: NDArray[Any] = np.frombuffer(tensor["data"], dtype=known[dtype]).reshape(shape)
    if is_ids:
        return _ids_from_storage(array, where)
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    return array.astype(np.float32)


def _ids_from_storage(array: NDArray[Any], where: str) -> NDArray[np.int16]:
    none = np.iinfo(array.dtype).max
    ids = array.astype(np.int16)  # the largest of two bytes is -1 then
    if none < np.iinfo(np.int16).max:
        np.putmask(ids, array == none, NOT_ROUTED)
    if ids.min(initial=0) < NOT_ROUTED:
        largest = array[array != none].max()
        raise CorruptRunError(f"{where}: expert id {largest} is one that no model has; capture that shard again")
    return ids
