"""The tensors of a checkpoint, read without torch: their digests, and how those of two checkpoints differ.

The same weights are saved in one file or in forty, in this order or that, with another metadata header; a digest
of files calls them different. Here every tensor's bytes are digested by themselves, then the sorted list of
(name, dtype, shape, sha256).

A comparison is of a (what transformers scores or trains) with b (what vLLM samples from), tensor by tensor. b may be
of another dtype, stored with scales, packed, or hold its experts fused; what can be decoded is measured as
||a - b|| / ||a|| (Frobenius, float64), what cannot is counted with its reason.

Invariants:
    - nothing but the header is trusted, and the header only once every byte of the file belongs to exactly one
      tensor of the right size, as the safetensors format demands;
    - memory is bounded by the number of threads and the largest tensor of scales, whatever the sizes of tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moediag.errors import CheckpointError
from moediag.run.records import GroupDifference, NotComparable, PermutedExperts, TensorDifference, WeightsComparison

Progress = Callable[[int, int], None]
"""Called with (done, total) [bytes], from several threads but never at once."""

Facts = tuple[str, str, tuple[int, ...], str]
"""(name, dtype, shape, sha256) of a tensor."""

_CHUNK = 1 << 20  # bytes read at a time: stays in the cache between the read and the digest
_CHUNK_ELEMENTS = 1 << 18  # elements decoded at a time: 2 MiB as float64
_MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library
_N_WORST = 8
_N_LAYERS = 3  # named in a sentence
_UNRELATED = 0.5
"""Cosine below which tensors are other weights altogether. Ours: noise as large as the weights leaves 0.7, weights
drawn anew 0, and the weights of another training step 1."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NUMPY = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_MANTISSA_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}

EQUAL, ROUNDED, DIFFERS = "equal", "equal_after_rounding", "differs"
DEQUANTISED, NOT_COMPARABLE, NOT_MEASURED = "dequantised", "not_comparable", "not_measured"
KINDS = (EQUAL, ROUNDED, DIFFERS, DEQUANTISED, NOT_COMPARABLE, NOT_MEASURED)

_ROUTED = "routed experts"
# First match wins: the norms inside attention are norms, the gate of a shared expert is no router.
GROUPS: dict[str, re.Pattern[str]] = {
    "router": re.compile(r"\.gate\.(weight|bias|wg\.|e_score_correction_bias|expert_bias)|\.router\.|"
                         r"e_score_correction_bias|expert_bias"),
    "norms": re.compile(r"norm|(^|\.)ln_"),
    "shared experts": re.compile(r"shared_(expert|mlp)"),
    _ROUTED: re.compile(r"\.experts\.|block_sparse_moe\.(input|output)_linear"),
    "embedding": re.compile(r"embed_tokens|word_embeddings|tok_embeddings|(^|\.)(wte|embed)\."),
    "head": re.compile(r"(^|\.)(lm_head|embed_out)\.|^(output|head)\."),
    "attention": re.compile(r"attn|attention"),
    "dense mlp": re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe)\."),
    "other": re.compile(""),
}  # fmt: skip

_SCALES = ("_scale_inv", "_scale")  # after the name of what they scale, mostly `weight`
# Scales of activations and of the key-value cache say nothing about weights.
_ACTIVATION_SCALE = re.compile(r"(^|[._])(input|output|activation|[qkv])_(scale|scale_inv|zero_point|global_scale)$")
# suffix of what is packed -> (suffix of the name it replaces, suffixes of what belongs to it, format)
_PACKED = {
    ".qweight": (".weight", (".qzeros", ".scales", ".g_idx"), "AWQ or GPTQ"),
    ".weight_packed": (
        ".weight",
        (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_global_scale", ".weight_g_idx"),
        "compressed-tensors",
    ),
    "_blocks": ("", ("_scales",), "MXFP4"),
}
# As transformers 5 converts on loading: experts along dim 0, gate above up along dim 1 (its conversion_mapping.py).
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")
_SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
_SPLIT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: [begin, end) of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


def tensor_facts(files: Iterable[Path], progress: Progress | None = None) -> list[Facts]:
    """(name, dtype, shape, sha256) of all tensors, sorted, however they are split into files.

    The digest of this list is ``weights_sha256``: names, order and metadata of the files do not enter.

    Raises:
        CheckpointError: a file is not a whole safetensors file.
    """
    tensors = [tensor for file in files for tensor in read_header(file)]
    done = _Done(sum(tensor.n_bytes for tensor in tensors), progress)
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL; file order, so that disks read ahead
        digests = list(pool.map(lambda tensor: tensor_digest(tensor, done), tensors))
    return sorted({(t.name, t.dtype, t.shape, digest) for t, digest in zip(tensors, digests, strict=True)})


def tensor_digest(tensor: StoredTensor, done: _Done | None = None) -> str:
    """sha256 of one tensor's bytes.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(tensor, _CHUNK):
        digest.update(chunk)
        if done is not None:
            done.add(len(chunk))
    return digest.hexdigest()


def compare_weights(
    a_files: Iterable[Path],
    b_files: Iterable[Path],
    *,
    a_block: tuple[int, int] | None = None,
    b_block: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> WeightsComparison:
    """Compare the weights of two checkpoints tensor by tensor.

    Args:
        a_files: safetensors files of the checkpoint that transformers scores or trains; errors are relative to it.
        b_files: those of the other.
        a_block: rows and columns that share a scale, as ``scale_block`` reads it from a's config.json.
        b_block: the same of b.

    Raises:
        CheckpointError: a file is not a whole safetensors file or cannot be read, two files hold a tensor of one
            name, a dtype is unknown, or scales are not of a shape that fits what they scale.
    """
    a, n_scales_a = _weights(_by_name(a_files), a_block)
    b, n_scales_b = _weights(_by_name(b_files), b_block)
    a, b = _split_like(a, b), _split_like(b, a)
    common = [name for name in a if name in b]
    a_only, b_only = [w for n, w in a.items() if n not in b], [w for n, w in b.items() if n not in a]
    a_twins, b_twins = _possible_twins(a_only, b_only), _possible_twins(b_only, a_only)
    pairs = [(a[name], b[name]) for name in common]
    done = _Done(
        sum(w.stored.n_bytes for pair in pairs for w in pair) + sum(w.stored.n_bytes for w in (*a_twins, *b_twins)),
        progress,
    )
    with ThreadPoolExecutor() as pool:  # numpy and hashlib release the GIL
        measured = list(pool.map(lambda pair: _compared(pair[0], pair[1], done), pairs))
        digests = dict(pool.map(lambda w: (w.stored, tensor_digest(w.stored, done)), (*a_twins, *b_twins)))
    rest = _one_sided(a_only, b_only, digests)
    permuted = _permuted_experts(pairs, measured, tensor_digest)
    return _comparison([*measured, *rest], (n_scales_a, n_scales_b), permuted)


def compare_facts(a_facts: Iterable[Facts], b_facts: Iterable[Facts]) -> WeightsComparison:
    """The same from ``tensor_facts`` alone: what has other bytes is ``not_measured``, and fused experts stay fused.

    Raises:
        CheckpointError: a list names a tensor twice or holds an unknown dtype, or scales do not fit.
    """
    stored_a, digests_a = _stored_facts(a_facts)
    stored_b, digests_b = _stored_facts(b_facts)
    (a, n_scales_a), (b, n_scales_b) = _weights(stored_a, None), _weights(stored_b, None)
    judged = []
    pairs = [(a[name], b[name]) for name in a if name in b]
    for name in (ours.name for ours, _ in pairs):
        same = len(a[name].parts) == len(b[name].parts) and all(
            (p.dtype, p.shape, digests_a[p]) == (q.dtype, q.shape, digests_b[q])
            for p, q in zip(a[name].parts, b[name].parts, strict=True)
        )
        reason = "" if same else _obstacle(a[name], b[name])
        judged.append(_Measured(a[name], EQUAL if same else NOT_COMPARABLE if reason else NOT_MEASURED, reason))
    a_only, b_only = [w for n, w in a.items() if n not in b], [w for n, w in b.items() if n not in a]
    digests = {**digests_a, **digests_b}
    rest = _one_sided(a_only, b_only, digests)
    single = [pair for pair in pairs if _SINGLE.fullmatch(pair[0].name)]  # of a part of a tensor there is no digest
    permuted = _permuted_experts(single, judged, digests.__getitem__)
    return _comparison([*judged, *rest], (n_scales_a, n_scales_b), permuted)


def scale_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if config.json has them (block FP8); for ``compare_weights``."""
    for holder in (config, config.get("text_config") or {}):
        quantization = holder.get("quantization_config") or holder.get("compression_config") or {}
        blocks = [quantization.get("weight_block_size")] + [
            (group.get("weights") or {}).get("block_structure")
            for group in (quantization.get("config_groups") or {}).values()
            if isinstance(group, dict)
        ]
        for block in blocks:
            if isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
                return block[0], block[1]
    return None


def read_header(path: Path) -> list[StoredTensor]:
    """Tensors of a safetensors file in the order of their bytes.

    Raises:
        CheckpointError: the header is not one, or does not describe its file.
    """
    try:
        with path.open("rb") as file:
            n_header, text = _header_text(file, path)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        start = 8 + n_header
        tensors = [_tensor(path, name, e, start) for name, e in header.items() if name != "__metadata__"]
        return _checked_layout(tensors, start, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}"[:200]) from None


def _header_text(file: BinaryIO, path: Path) -> tuple[int, bytes]:
    prefix = file.read(8)
    n_header = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= n_header <= _MAX_HEADER:
        raise _broken(path, f"a header of {n_header:,} bytes in a file that begins with {len(prefix)} of 8 bytes")
    text = file.read(n_header)
    if len(text) < n_header:
        raise _broken(path, f"a header of {n_header:,} bytes, of which {len(text):,} are there")
    return n_header, text


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has dtype {dtype!r}, shape {shape!r}, offsets {begin!r}, {end!r}")
    n_bits = math.prod(shape) * _BITS.get(dtype, 0)
    if dtype in _BITS and n_bits != 8 * (end - begin):  # a dtype made since is left to the engines to judge
        raise ValueError(f"tensor {name} of {dtype} {shape} has {end - begin} bytes")
    return StoredTensor(path, name, dtype, tuple(shape), start + begin, start + end)


def _checked_layout(tensors: list[StoredTensor], start: int, size: int) -> list[StoredTensor]:
    """Tensors lie one after the other: no gap, no overlap, and the last ends with the file."""
    position = start
    ordered = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
    for tensor in ordered:
        if tensor.begin != position:
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.begin}, expected {position}")
        position = max(position, tensor.end)
    if position != size:
        raise ValueError(f"its tensors end at byte {position:,}, the file at {size:,}")
    return ordered


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("it has a name twice")
    return dict(pairs)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file ({reason}); download or save it again")


class _Done:
    """Bytes done of a total, reported to ``progress`` under a lock."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def add(self, n_bytes: int) -> None:
        """Count bytes; exceptions of ``progress`` reach the caller of the comparison."""
        if self._progress is not None:
            with self._lock:
                self._done += n_bytes
                self._progress(self._done, self._total)


def _chunks(tensor: StoredTensor, n_bytes: int) -> Iterator[memoryview]:
    """The tensor's bytes, ``n_bytes`` at a time; each chunk is overwritten by the next."""
    left = tensor.n_bytes
    buffer = memoryview(bytearray(min(n_bytes, left)))
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.begin)
            while left:
                n_next = min(left, n_bytes)
                n_read = 0
                while n_read < n_next:
                    n_new = file.readinto(buffer[n_read:n_next]) or 0
                    if not n_new:
                        raise CheckpointError(f"{tensor.path} ends inside tensor {tensor.name}; copy it again")
                    n_read += n_new
                yield buffer[:n_next]
                left -= n_next
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class _Weight:
    """A weight as a model has it, under the name it has there, and everything that its values depend on.

    Args:
        stored: its elements, plain, quantised or packed.
        scales: what they are multiplied with; None if they are plain or packed.
        packed: the format, if this module does not decode it.
        others: what else a packed weight consists of.
    """

    name: str
    stored: StoredTensor
    scales: _Scales | None = None
    packed: str = ""
    others: tuple[StoredTensor, ...] = ()

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All tensors that its values depend on."""
        scales = () if self.scales is None else self.scales.parts
        return (self.stored, *scales, *self.others)


@dataclass(frozen=True)
class _Scales:
    """Scales of a weight seen as a matrix, all dimensions but the last as rows.

    Args:
        stored: shape (matrices, row blocks, column blocks) when its dimensions are put so.
        zero_point: of the same shape, or None.
        rows: rows of one matrix.
        block: rows and columns that share a scale.
        shape: (matrices, row blocks, column blocks).
    """

    stored: StoredTensor
    zero_point: StoredTensor | None
    rows: int
    block: tuple[int, int]
    shape: tuple[int, int, int]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors it consists of."""
        return (self.stored,) if self.zero_point is None else (self.stored, self.zero_point)

    def read(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Scales and zero points, float32, shape (matrices * row blocks, column blocks)."""
        shape = (self.shape[0] * self.shape[1], self.shape[2])
        # microscaling formats store the power of two as a byte
        dtype = "F8_E8M0" if self.stored.dtype == "U8" else self.stored.dtype
        scale = _whole(self.stored, dtype).astype(np.float32).reshape(shape)
        zero = None if self.zero_point is None else _whole(self.zero_point, self.zero_point.dtype)
        return scale, None if zero is None else zero.astype(np.float32).reshape(shape)


def _whole(tensor: StoredTensor, dtype: str) -> npt.NDArray[Any]:
    for chunk in _chunks(tensor, max(tensor.n_bytes, 1)):
        return _decoded(chunk, dtype)
    return np.zeros(0, np.float32)


def _by_name(files: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(f"{tensors[tensor.name].path} and {file} both hold tensor {tensor.name}")
            tensors[tensor.name] = tensor
    return tensors


def _stored_facts(facts: Iterable[Facts]) -> tuple[dict[str, StoredTensor], dict[StoredTensor, str]]:
    tensors: dict[str, StoredTensor] = {}
    digests = {}
    for name, dtype, shape, digest in facts:
        if name in tensors:
            raise CheckpointError(f"a list of tensors names {name} twice")
        tensors[name] = StoredTensor(Path(digest), name, dtype, tuple(shape), 0, 0)
        digests[tensors[name]] = digest
    return tensors, digests


def _weights(tensors: dict[str, StoredTensor], block: tuple[int, int] | None) -> tuple[dict[str, _Weight], int]:
    """Weights by the name a model has for them, and the number of tensors that only describe how others are stored."""
    for tensor in tensors.values():
        if tensor.dtype not in _BITS:
            raise CheckpointError(f"tensor {tensor.name} has dtype {tensor.dtype}, which moediag does not know")
    weights = {}
    consumed = {name for name in tensors if _ACTIVATION_SCALE.search(name)}
    for tensor in tensors.values():
        if tensor.name not in consumed and (weight := _packed_weight(tensor, tensors)) is not None:
            weights[tensor.name] = weight
            consumed.update(other.name for other in weight.others)
    for tensor in tensors.values():
        if tensor.name not in consumed and tensor.name not in weights:
            weights[tensor.name] = weight = _scaled_weight(tensor, tensors, block)
            consumed.update(part.name for part in (*weight.parts[1:],))
    kept = (weight for stored_name, weight in weights.items() if stored_name not in consumed)
    return {weight.name: weight for weight in kept}, len(consumed)


def _packed_weight(tensor: StoredTensor, tensors: dict[str, StoredTensor]) -> _Weight | None:
    """The weight that the tensor holds several values an element of, if it does."""
    for suffix, (replaced, belongs, packed) in _PACKED.items():
        stem = tensor.name.removesuffix(suffix)
        others = tuple(tensors[stem + end] for end in belongs if stem + end in tensors)
        if stem != tensor.name and others:
            return _Weight(stem + replaced, tensor, None, packed, others)
    if tensor.dtype in ("U8", "F4") and tensor.name + "_scale" in tensors:
        ends = ("_scale", "_scale_2", "_zero_point")
        others = tuple(tensors[tensor.name + end] for end in ends if tensor.name + end in tensors)
        return _Weight(tensor.name, tensor, None, "NVFP4 or another of 4 bits", others)
    if tensor.dtype.startswith(("F8", "I8")) and tensor.name + "_g_idx" in tensors:
        ends = ("_scale", "_zero_point", "_g_idx")
        others = tuple(tensors[tensor.name + end] for end in ends if tensor.name + end in tensors)
        return _Weight(tensor.name, tensor, None, "groups in the order of activations", others)
    return None


def _scaled_weight(tensor: StoredTensor, tensors: dict[str, StoredTensor], block: tuple[int, int] | None) -> _Weight:
    """The weight with its scales, if there are any."""
    if not tensor.dtype.startswith(("F8_E4M3", "F8_E5M2", "I8")):
        return _Weight(tensor.name, tensor)
    names = [tensor.name + end for end in _SCALES]
    if tensor.name.endswith(".weight"):
        names.append(tensor.name.removesuffix("weight") + "scale")
    scale = next((tensors[name] for name in names if name in tensors), None)
    if scale is None:
        return _Weight(tensor.name, tensor)
    if block is None and scale.name.endswith("_inv"):
        block = (128, 128)  # what this format has wherever config.json is silent
    return _Weight(tensor.name, tensor, _fitted(scale, tensors.get(tensor.name + "_zero_point"), tensor, block))


def _fitted(
    scale: StoredTensor, zero_point: StoredTensor | None, tensor: StoredTensor, block: tuple[int, int] | None
) -> _Scales:
    """How the scales spread over the tensor: one for all, one a row, one a block, or one a group of columns."""
    *leading, rows, columns = (1, 1, *tensor.shape)[-max(2, len(tensor.shape)) :]
    shape = list(scale.shape)
    if math.prod(shape) == 1:
        leading, rows, shape = [1], math.prod(leading) * rows, [1, 1, 1]
    elif len(shape) == 1:
        # one a row of a matrix, or one a matrix of several
        shape = [*shape, *[1] * (len(leading) + 1)]
    blocks = [_block(n, s, b) for n, s, b in zip((rows, columns), shape[-2:], block or (0, 0), strict=True)]
    zero_fits = zero_point is None or zero_point.shape == scale.shape
    if (*shape[:-2],) not in ((*leading,), (math.prod(leading),)) or not all(blocks) or not zero_fits:
        which = scale if zero_fits or zero_point is None else zero_point
        raise CheckpointError(
            f"{which.name} of shape {list(which.shape)} does not fit {tensor.name} of shape {list(tensor.shape)}"
            + ("" if block is None else f" in blocks of {block[0]}x{block[1]}")
        )
    for part in (scale, zero_point):
        if part is not None and part.dtype not in _DECODED:
            raise CheckpointError(f"{part.name} has dtype {part.dtype}, in which moediag reads no scales")
    return _Scales(scale, zero_point, rows, (blocks[0], blocks[1]), (math.prod(leading), shape[-2], shape[-1]))


def _block(n: int, n_scales: int, block: int) -> int:
    """Elements that share a scale where ``n_scales`` are for ``n``; 0 where that is not known."""
    if n_scales == 1:
        return max(n, 1)
    if block and n_scales == -(-n // block):
        return block
    return n // n_scales if n_scales and n % n_scales == 0 else 0


def _split_like(fused: dict[str, _Weight], other: dict[str, _Weight]) -> dict[str, _Weight]:
    """Fused experts as views of single ones, where ``other`` has them single and of the fitting shape."""
    result = {}
    for name, weight in fused.items():
        result.update({name: weight} if name in other else _experts(weight, other) or {name: weight})
    return result


def _experts(weight: _Weight, other: dict[str, _Weight]) -> dict[str, _Weight] | None:
    """Contiguous views of a (experts, rows, columns) tensor, by the names that ``other`` has for them."""
    match, stored = _FUSED.fullmatch(weight.name), weight.stored
    if match is None or len(stored.shape) != 3 or len(weight.parts) > 1 or 0 in stored.shape or weight.packed:
        return None
    n_experts, rows, columns = stored.shape
    for gate, up, down in _SPLIT_NAMES:
        halves = (down,) if match[2] == "down_proj" else (gate, up)
        shape = (rows // len(halves), columns)
        names = [f"{match[1]}.{expert}.{half}.weight" for expert in range(n_experts) for half in halves]
        fits = all(name in other and (other[name].packed or other[name].stored.shape == shape) for name in names)
        if fits and rows % len(halves) == 0:
            size = stored.n_bytes // len(names)
            begins = [stored.begin + i * size for i in range(len(names))]
            return {
                name: _Weight(name, StoredTensor(stored.path, name, stored.dtype, shape, begin, begin + size))
                for name, begin in zip(names, begins, strict=True)
            }
    return None


@dataclass
class _Measured:
    """A tensor's kind and the sums that errors are made of; filled chunk by chunk by one thread."""

    weight: _Weight
    kind: str
    reason: str = ""
    square_a: float = 0.0
    square_b: float = 0.0
    square_difference: float = 0.0
    largest: float = 0.0
    n_differing: int = 0
    n_not_finite: int = 0
    n_parameters: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_parameters = math.prod(self.weight.stored.shape)

    @property
    def measured(self) -> bool:
        """Its values were compared, or need not be."""
        return self.kind not in (NOT_COMPARABLE, NOT_MEASURED)

    def add(self, a: npt.NDArray[Any], b: npt.NDArray[Any], differs: npt.NDArray[np.bool_]) -> None:
        """Add a chunk of values; ``differs`` marks which elements are not the same."""
        self.n_differing += int(np.count_nonzero(differs))
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(all="ignore"):
            difference = a - b
            square_a, square_b, square_difference = (float(x @ x) for x in (a, b, difference))
            if not math.isfinite(square_a + square_difference):
                finite = np.isfinite(a) & np.isfinite(b)
                self.n_not_finite += int(np.count_nonzero(differs & ~finite))
                a, b, difference = a[finite], b[finite], difference[finite]
                square_a, square_b, square_difference = (float(x @ x) for x in (a, b, difference))
        self.square_a += square_a
        self.square_b += square_b
        self.square_difference += square_difference
        self.largest = max(self.largest, float(np.max(np.abs(difference), initial=0.0)))

    def record(self) -> TensorDifference:
        """As it is reported."""
        return TensorDifference(
            name=self.weight.name,
            group=_group(self.weight.name),
            kind=self.kind,
            n_parameters=self.n_parameters,
            relative_error=_relative(self.square_difference, self.square_a) if self.measured else None,
            largest=self.largest if self.measured and math.isfinite(self.largest) else None,
            n_differing=self.n_differing,
            n_not_finite=self.n_not_finite,
            reason=self.reason,
        )


def _relative(square_difference: float, square_a: float) -> float | None:
    if square_difference == 0:
        return 0.0
    ratio = square_difference / square_a if square_a else math.inf
    return math.sqrt(ratio) if math.isfinite(ratio) else None


def _compared(a: _Weight, b: _Weight, done: _Done) -> _Measured:
    """Compare one weight."""
    alike = [(p.dtype, p.shape) for p in a.parts] == [(p.dtype, p.shape) for p in b.parts]
    obstacle = _obstacle(a, b)
    if obstacle:
        same = alike and all(_same_bytes(p, q) for p, q in zip(a.parts, b.parts, strict=True))
        done.add(a.stored.n_bytes + b.stored.n_bytes)
        return _Measured(a, EQUAL if same else NOT_COMPARABLE, "" if same else obstacle)
    scaled = a.scales is not None or b.scales is not None
    same = alike and all(_same_bytes(p, q) for p, q in zip(a.parts[1:], b.parts[1:], strict=True))
    result = _Measured(a, EQUAL)
    step = _CHUNK_ELEMENTS
    if scaled:  # whole rows
        columns = max(1, (1, *a.stored.shape)[-1])
        step = max(1, step // columns) * columns
    values_a, values_b = _values(a), _values(b)
    chunks_a = _chunks(a.stored, step * _BITS[a.stored.dtype] // 8)
    chunks_b = _chunks(b.stored, step * _BITS[b.stored.dtype] // 8)
    for i, (chunk_a, chunk_b) in enumerate(zip(chunks_a, chunks_b, strict=True)):
        x, y = values_a(chunk_a, i * step), values_b(chunk_b, i * step)
        if scaled:
            same = same and _same(chunk_a, chunk_b)
            differs = (x != y) & ~(np.isnan(x) & np.isnan(y))
        elif a.stored.dtype == b.stored.dtype:
            bits = f"u{_BITS[a.stored.dtype] // 8}"
            differs = np.frombuffer(chunk_a, bits) != np.frombuffer(chunk_b, bits)
        else:
            differs = _differ_after_rounding(x, a.stored.dtype, y, b.stored.dtype)
        result.add(x, y, differs)
        done.add(len(chunk_a) + len(chunk_b))
    if scaled:
        result.kind = EQUAL if same else DEQUANTISED
    elif result.n_differing:
        result.kind = DIFFERS
    elif not alike:
        result.kind = ROUNDED
    return result


def _obstacle(a: _Weight, b: _Weight) -> str:
    """Why the values of two weights cannot be compared, or nothing."""
    packed = [f"{side} packed ({w.packed})" for side, w in (("a", a), ("b", b)) if w.packed]
    if packed:
        return " and ".join(packed)
    if a.stored.shape != b.stored.shape:
        return "other shape"
    unread = sorted({w.stored.dtype for w in (a, b)} - _DECODED)
    if unread:
        return f"{' and '.join(unread)} not decoded"
    plain = [w.stored.dtype for w in (a, b) if w.scales is None]
    if a.stored.dtype != b.stored.dtype and not set(plain) <= set(_MANTISSA_BITS):
        return f"{a.stored.dtype} against {b.stored.dtype} without scales"
    return ""


def _same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    return all(_same(x, y) for x, y in zip(_chunks(a, _CHUNK), _chunks(b, _CHUNK), strict=True))


def _same(a: memoryview, b: memoryview) -> bool:
    # memoryviews compare element by element under the GIL
    return np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))


def _values(weight: _Weight) -> Callable[[memoryview, int], npt.NDArray[Any]]:
    """A function from a chunk that begins at an element to its values."""
    dtype, scales = weight.stored.dtype, weight.scales
    if scales is None:
        return lambda chunk, begin: _decoded(chunk, dtype)
    scale, zero_point = scales.read()
    columns = max(1, (1, *weight.stored.shape)[-1])
    column_block = np.arange(columns) // scales.block[1]

    def dequantised(chunk: memoryview, begin: int) -> npt.NDArray[Any]:
        values = _decoded(chunk, dtype).reshape(-1, columns)
        row = np.arange(begin // columns, begin // columns + len(values))
        row_block = row // scales.rows * scales.shape[1] + row % scales.rows // scales.block[0]
        with np.errstate(all="ignore"):
            if zero_point is not None:
                values = values - zero_point[row_block][:, column_block]
            return np.ravel(values * scale[row_block][:, column_block])

    return dequantised


def _decoded(chunk: memoryview, dtype: str) -> npt.NDArray[Any]:
    """Values, exactly, as float32 or (for what does not fit) float64; 64-bit integers are rounded."""
    if dtype == "BF16":
        bits = np.frombuffer(chunk, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32)
    if dtype in _TABLES:
        values: npt.NDArray[Any] = _TABLES[dtype][np.frombuffer(chunk, np.uint8)]
        return values
    stored = np.frombuffer(chunk, _NUMPY[dtype])
    return stored.astype(np.float32 if stored.itemsize < 4 or dtype == "F32" else np.float64)


def _float8_table(mantissa_bits: int, bias: int, not_finite: Mapping[int, float]) -> npt.NDArray[np.float32]:
    """Values of the 256 codes: sign, exponent, mantissa; exponent 0 is subnormal."""
    code = np.arange(128)
    mantissa, exponent = code % (1 << mantissa_bits), code >> mantissa_bits
    fraction = np.where(exponent > 0, 1, 0) + mantissa / (1 << mantissa_bits)
    positive = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    for at, value in not_finite.items():
        positive[at] = value
    table: npt.NDArray[np.float32] = np.concatenate([positive, -positive]).astype(np.float32)
    return table


_TABLES = {
    "F8_E4M3": _float8_table(3, 7, {0x7F: math.nan}),  # OCP's: no infinities
    "F8_E5M2": _float8_table(2, 15, {0x7C: math.inf, 0x7D: math.nan, 0x7E: math.nan, 0x7F: math.nan}),
    "F8_E8M0": np.concatenate([np.ldexp(1.0, np.arange(255) - 127), [math.nan]]).astype(np.float32),
}
_DECODED = {*_NUMPY, *_TABLES, "BF16"}
# mantissa bits, smallest normal exponent, largest finite value, what is beyond it
_FORMATS = {
    "BF16": (7, -126, float.fromhex("0x1.fep127"), math.inf),
    "F8_E4M3": (3, -6, 448.0, 448.0),  # has no infinity; quantisers and torch since 2.13 saturate
    "F8_E5M2": (2, -14, 57344.0, math.inf),
}


def _differ_after_rounding(
    a: npt.NDArray[Any], a_dtype: str, b: npt.NDArray[Any], b_dtype: str
) -> npt.NDArray[np.bool_]:
    """Which elements differ after those of more mantissa bits are rounded to the other's dtype."""
    if _MANTISSA_BITS[a_dtype] < _MANTISSA_BITS[b_dtype]:
        a, a_dtype, b, b_dtype = b, b_dtype, a, a_dtype
    rounded = _rounded(a, b_dtype)
    same: npt.NDArray[np.bool_] = (rounded == b) & (np.signbit(rounded) == np.signbit(b))
    differs: npt.NDArray[np.bool_] = ~(same | (np.isnan(rounded) & np.isnan(b)))
    return differs


def _rounded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Values of ``dtype`` nearest to the given, ties to even; too large is infinite, or the largest of F8_E4M3."""
    with np.errstate(all="ignore"):
        if dtype in ("F16", "F32"):
            return values.astype(_NUMPY[dtype])
        if dtype == "BF16" and values.dtype == np.float32:  # the common case, by bits because that is faster
            bits = values.view(np.uint32)
            even = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return np.where(np.isnan(values), values, even.view(np.float32))
        mantissa_bits, smallest, largest, beyond = _FORMATS[dtype]
        exact = values.astype(np.float64)
        exponent = np.maximum(np.frexp(exact)[1] - 1, smallest) - mantissa_bits
        nearest = np.ldexp(np.rint(np.ldexp(exact, -exponent)), exponent)
        return np.where(np.abs(nearest) > largest, np.copysign(beyond, nearest), nearest)


def _possible_twins(weights: list[_Weight], others: list[_Weight]) -> list[_Weight]:
    """Plain weights of a dtype and shape that also occurs among the others: they may be the same, renamed."""
    kinds = {(w.stored.dtype, w.stored.shape) for w in others if len(w.parts) == 1}
    return [w for w in weights if len(w.parts) == 1 and (w.stored.dtype, w.stored.shape) in kinds]


def _one_sided(a_only: list[_Weight], b_only: list[_Weight], digests: Mapping[StoredTensor, str]) -> list[_Measured]:
    """Weights whose name the other checkpoint lacks; with the same bytes under another name they are renamed."""
    twins: dict[tuple[str, tuple[int, ...], str], list[_Weight]] = defaultdict(list)
    for weight in _possible_twins(b_only, a_only):
        twins[weight.stored.dtype, weight.stored.shape, digests[weight.stored]].append(weight)
    result, found = [], set()
    possible = {weight.name for weight in _possible_twins(a_only, b_only)}
    for weight in a_only:
        stored, reason = weight.stored, "only in a"
        candidates = twins[stored.dtype, stored.shape, digests[stored]] if weight.name in possible else []
        if candidates:
            found.add(candidates.pop(0).name)
            reason = "renamed, with equal bytes"
        result.append(_Measured(weight, NOT_COMPARABLE, reason))
    result += [_Measured(weight, NOT_COMPARABLE, "only in b") for weight in b_only if weight.name not in found]
    return result


def _permuted_experts(
    pairs: list[tuple[_Weight, _Weight]], measured: list[_Measured], digest: Callable[[StoredTensor], str]
) -> tuple[PermutedExperts, ...]:
    """Layers whose experts are the same multiset, bit for bit, in another order: stored one by one, or fused."""
    differing = {one.weight.name for one in measured if one.kind in (DIFFERS, NOT_MEASURED)}
    of_layer: dict[str, list[tuple[_Weight, _Weight]]] = defaultdict(list)
    for pair in pairs:
        if (match := _SINGLE.fullmatch(pair[0].name) or _FUSED.fullmatch(pair[0].name)) is not None:
            of_layer[match[1]].append(pair)
    found = []
    for layer, some in of_layer.items():
        plain = all(len(w.parts) == 1 and not w.packed for pair in some for w in pair)
        if not plain or not any(ours.name in differing for ours, _ in some):
            continue
        a, b = (_experts_digests([pair[side] for pair in some], digest) for side in (0, 1))
        n_slots = sum(a[slot] != b.get(slot) for slot in a)
        if n_slots and Counter(a.values()) == Counter(b.values()):
            found.append(PermutedExperts(layer=layer, n_slots=n_slots, n_experts=len(a)))
    return tuple(found)


def _experts_digests(
    weights: list[_Weight], digest: Callable[[StoredTensor], str]
) -> dict[int, tuple[tuple[str, str], ...]]:
    """By slot: the digests of an expert's tensors, by the end of their names."""
    of_slot: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for weight in weights:
        stored = weight.stored
        if (match := _SINGLE.fullmatch(weight.name)) is not None:
            of_slot[int(match[2])].append((match[3], digest(stored)))
            continue
        n_experts = stored.shape[0]
        size = stored.n_bytes // n_experts
        for slot in range(n_experts):
            begin = stored.begin + slot * size
            part = StoredTensor(stored.path, weight.name, stored.dtype, stored.shape[1:], begin, begin + size)
            of_slot[slot].append((weight.name, digest(part)))
    return {slot: tuple(sorted(some)) for slot, some in of_slot.items()}


def _comparison(
    tensors: list[_Measured], n_scales: tuple[int, int], permuted: tuple[PermutedExperts, ...]
) -> WeightsComparison:
    by_group: dict[str, list[_Measured]] = {group: [] for group in GROUPS}
    by_reason: dict[str, list[_Measured]] = defaultdict(list)
    for tensor in tensors:
        by_group[_group(tensor.weight.name)].append(tensor)
        if tensor.reason:
            by_reason[tensor.reason].append(tensor)
    reasons = [
        NotComparable(
            reason=reason,
            n_tensors=len(some),
            n_parameters=sum(t.n_parameters for t in some),
            example=min(t.weight.name for t in some),
        )
        for reason, some in by_reason.items()
    ]
    differing = [tensor.record() for tensor in tensors if tensor.n_differing]
    overall, groups = _together("all", tensors), [_together(group, some) for group, some in by_group.items() if some]
    reasons.sort(key=lambda reason: (-reason.n_tensors, reason.reason))
    return WeightsComparison(
        summary=_sentence(overall, {group.group: group for group in groups}, reasons, permuted),
        is_equal=set(overall.n_tensors) <= {EQUAL},
        overall=overall,
        groups=tuple(groups),
        worst=tuple(sorted(differing, key=_badness)[:_N_WORST]),
        not_comparable=tuple(reasons),
        permuted=permuted,
        n_scales=n_scales,
    )


def _badness(tensor: TensorDifference) -> tuple[bool, float, str]:
    error = math.inf if tensor.relative_error is None else tensor.relative_error
    return not tensor.n_not_finite, -error, tensor.name


def _group(name: str) -> str:
    return next(group for group, pattern in GROUPS.items() if pattern.search(name))


def _together(group: str, tensors: list[_Measured]) -> GroupDifference:
    n_tensors, n_parameters = Counter(t.kind for t in tensors), Counter[str]()
    for tensor in tensors:
        n_parameters[tensor.kind] += tensor.n_parameters
    measured = [tensor for tensor in tensors if tensor.measured]
    n_elements = sum(tensor.n_parameters for tensor in measured)
    largest = max((tensor.largest for tensor in measured), default=math.inf)
    square_difference = math.fsum(tensor.square_difference for tensor in measured)
    square_a = math.fsum(tensor.square_a for tensor in measured)
    norm_ratio, cosine = _angle([tensor for tensor in measured if tensor.n_differing])
    return GroupDifference(
        group=group,
        n_tensors={kind: n_tensors[kind] for kind in KINDS if n_tensors[kind]},
        n_parameters={kind: n_parameters[kind] for kind in KINDS if n_tensors[kind]},
        relative_error=_relative(square_difference, square_a) if measured else None,
        largest=largest if math.isfinite(largest) else None,
        share_differing=sum(t.n_differing for t in measured) / n_elements if n_elements else None,
        n_not_finite=sum(t.n_not_finite for t in measured),
        norm_ratio=norm_ratio,
        cosine=cosine,
    )


def _angle(tensors: list[_Measured]) -> tuple[float | None, float | None]:
    """Ratio of norms, b's over a's, and cosine of the angle between the two; None where one is zero."""
    a, b, apart = (
        math.fsum(getattr(t, name) for t in tensors) for name in ("square_a", "square_b", "square_difference")
    )
    if not (a and b):
        return None, None
    return math.sqrt(b / a), max(-1.0, min(1.0, (a + b - apart) / (2 * math.sqrt(a * b))))


def _sentence(
    overall: GroupDifference,
    groups: dict[str, GroupDifference],
    reasons: Sequence[NotComparable],
    permuted: Sequence[PermutedExperts],
) -> str:
    counts = Counter(overall.n_tensors)
    n_all, n_differ = counts.total(), counts[DIFFERS] + counts[DEQUANTISED]
    if counts[EQUAL] == n_all:
        return f"all {n_all:,} tensors equal"
    if counts[EQUAL] + counts[ROUNDED] == n_all:
        return f"all {n_all:,} tensors equal, {counts[ROUNDED]:,} of them after rounding to the narrower dtype"
    parts = []
    if n_differ:
        how = f" ({counts[DEQUANTISED]:,} after dequantising)" if counts[DEQUANTISED] else ""
        router = f" (routers: {_in_words(groups['router'])})" if "router" in groups else ""
        parts.append(f"{n_differ:,} of {n_all:,} tensors differ{how}, {_error(overall)} over all{router}")
        parts += [
            f"{name} that differ have a norm ratio of {group.norm_ratio:.2f} and a cosine of "
            f"{round(group.cosine, 2) + 0.0:.2f}: other weights altogether (drawn anew, never loaded, or moved)"
            for name, group in groups.items()
            if group.cosine is not None and group.cosine < _UNRELATED and not (permuted and name == _ROUTED)
        ]
    elif counts[EQUAL] + counts[ROUNDED]:
        parts.append(f"{counts[EQUAL] + counts[ROUNDED]:,} of {n_all:,} tensors equal")
    if counts[NOT_MEASURED]:
        parts.append(f"{counts[NOT_MEASURED]:,} of {n_all:,} tensors have other bytes, by how much was not measured")
    if permuted:
        where = ", ".join(f"{one.n_slots:,} of {one.n_experts:,} in {one.layer}" for one in permuted[:_N_LAYERS])
        more = f" and {len(permuted) - _N_LAYERS:,} more layers" if len(permuted) > _N_LAYERS else ""
        parts.append(f"expert slots permuted, the experts themselves the same: {where}{more}")
    if counts[NOT_COMPARABLE]:
        why = ", ".join(f"{reason.n_tensors:,} {reason.reason}" for reason in reasons)
        parts.append(f"{counts[NOT_COMPARABLE]:,} of {n_all:,} tensors cannot be compared ({why})")
    return "; ".join(parts)


def _in_words(group: GroupDifference) -> str:
    kinds = set(group.n_tensors)
    if kinds <= {EQUAL}:
        return "equal"
    if kinds <= {EQUAL, ROUNDED}:
        return "equal after rounding"
    if kinds & {DIFFERS, DEQUANTISED}:
        return _error(group)
    return "not compared"


def _error(group: GroupDifference) -> str:
    error = "undefined" if group.relative_error is None else f"{group.relative_error:.1e}".replace("e-0", "e-")
    beside = f" and {group.n_not_finite:,} elements not finite" if group.n_not_finite else ""
    return f"relative error {error}{beside}"
