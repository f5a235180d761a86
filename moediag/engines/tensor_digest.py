"""A digest of a checkpoint's tensors, and not of its files.

The same weights are saved in one file or in forty, in this order or that, with another metadata header; a digest
of files calls them different. Here every tensor's bytes are digested by themselves, then the sorted list of
(name, dtype, shape, sha256).

Invariants:
    - nothing but the header is trusted, and the header only once every byte of the file belongs to exactly one
      tensor of the right size, as the safetensors format demands;
    - memory is bounded by the number of threads, whatever the sizes of tensors; no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moediag.errors import CheckpointError
from moediag.run.files import digest_of

_CHUNK = 1 << 20  # bytes read at a time: stays in the cache between the read and the digest
_MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: [begin, end) of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weights_digest(files: Iterable[Path]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, however they are split into files.

    Args:
        files: safetensors files; their names, order and metadata do not enter.

    Raises:
        CheckpointError: a file is not a whole safetensors file.
    """
    tensors = [tensor for file in files for tensor in read_header(file)]
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL; file order, so that disks read ahead
        digests = list(pool.map(tensor_digest, tensors))
    entries = {(t.name, t.dtype, t.shape, digest) for t, digest in zip(tensors, digests, strict=True)}
    return digest_of(sorted(entries))


def tensor_digest(tensor: StoredTensor) -> str:
    """sha256 of one tensor's bytes.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter.
    """
    digest, left, buffer = (
        hashlib.sha256(),
        tensor.end - tensor.begin,
        memoryview(bytearray(min(_CHUNK, tensor.end - tensor.begin))),
    )
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.begin)
            while left:
                n_read = file.readinto(buffer[: min(left, _CHUNK)]) or 0
                if not n_read:
                    raise CheckpointError(f"{tensor.path} ends inside tensor {tensor.name}; copy it again")
                digest.update(buffer[:n_read])
                left -= n_read
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def read_header(path: Path) -> list[StoredTensor]:
    """Tensors of a safetensors file in the order of their bytes.

    Raises:
        CheckpointError: the header is not one, or does not describe the file that it stands in.
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
            raise ValueError(f"tensor {tensor.name} begins at byte {tensor.begin}, wanted {position}")
        position = max(position, tensor.end)
    if position != size:
        raise ValueError(f"its tensors end at byte {position:,}, the file at {size:,}")
    return ordered


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file ({reason}); download or save it again")
