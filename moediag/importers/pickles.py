"""Pickles and torch files, read without running or importing anything that they name.

A pickle is a program: it names functions and calls them. Here every name it may use stands for an inert record of what
was named, with what arguments and what state; records of known names are then turned into dicts, lists, numbers, text
and numpy arrays by the functions below, which are all there is to call. Torch files are zip files of one pickle and raw
storages, so that this reads them too: with the guarantees of ``weights_only=True``, and without torch.

Invariants:
    - the names admitted are those of :data:`_MEANINGS` and :data:`_INERT`; any other one ends the reading;
    - no shape, stride or offset reaches beyond the bytes that the file has, and bytes are those of its checksums;
    - bfloat16 is widened to float32, which holds it exactly; other numbers keep their type.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError

_TORCH_DTYPES: Final = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "bfloat16", "int64": "i8", "int32": "i4",
    "int16": "i2", "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?",
}  # fmt: skip
_STORAGES: Final = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
_NUMPY_KINDS: Final = "biufUS"
_DEEPEST: Final = 100
_BYTES_LOOKED_AT: Final = 1 << 16


class _Record:
    """An object of a pickle: a subclass per name, its arguments and its state; nothing is done with them."""

    __slots__ = ("arguments", "state")
    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Record:  # what a pickle calls, by whichever opcode
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Storage:
    """A storage that a pickle refers to, by its type and its key in the file."""

    __slots__ = ("key", "type")

    def __init__(self, type_: Any, key: Any) -> None:
        self.type, self.key = type_, key


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file, of a torch file's pickle where it is whole; none where it cannot be read."""
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(_BYTES_LOOKED_AT)
        if not start.startswith(b"PK"):  # a pickle may end with a zip file, of a tensor that numpy has no type for
            return start
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if name is None:
                return start
            with archive.open(name) as file:
                return file.read(_BYTES_LOOKED_AT)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return start  # what was cut still begins with its pickle


def read_pickle(path: Path) -> Any:
    """What a pickle holds, see the module's docstring.

    Raises:
        DumpError: no pickle, a damaged one, or one that names what is not admitted.
    """
    try:
        return _Reading(str(path), None).load(path.read_bytes())
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from None


def read_torch(path: Path) -> Any:
    """What a file of ``torch.save`` holds, see the module's docstring.

    Raises:
        DumpError: no such file, a damaged one, or one that names what is not admitted.
    """
    try:
        return _load_torch(str(path), path)
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from None


def _load_torch(where: str, file: Path | io.BytesIO) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return _Reading(where, archive).load(None)
    except zipfile.BadZipFile as error:
        raise DumpError(
            f"{where} is no file of torch.save since torch 1.6, or is cut short or damaged ({error}); copy or save it "
            "again"
        ) from None


class _Reading:
    """One file on its way from a pickle's records to plain values."""

    def __init__(self, where: str, archive: zipfile.ZipFile | None) -> None:
        self.where = where
        self._archive = archive
        self._plain: dict[int, Any] = {}  # by identity: what is shared in the file is shared, and walked once
        self._kept: list[Any] = []  # objects whose identity is in use
        self._depth = 0
        self._prefix, self._order = "", "<"
        if archive is not None:
            self._open(archive)

    def _open(self, archive: zipfile.ZipFile) -> None:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self.refuse(f"has {len(pickles)} pickles, a file of torch.save has 1")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}byteorder" in archive.namelist() and self._entry("byteorder") == b"big":
            self._order = ">"

    def _entry(self, name: str) -> bytes:
        assert self._archive is not None
        try:
            return self._archive.read(self._prefix + name)  # its checksum is checked
        except (KeyError, RuntimeError, NotImplementedError, EOFError) as error:
            self.refuse(f"lacks its part {name} or holds it damaged ({error}); copy or save it again")

    def load(self, content: bytes | None) -> Any:
        """The plain value of the pickle."""
        unpickler = _Unpickler(io.BytesIO(self._entry("data.pkl") if content is None else content))
        unpickler.has_storages = self._archive is not None
        try:
            return self.plain(unpickler.load())
        except DumpError:
            raise
        except zipfile.BadZipFile:
            raise
        except _NotAdmittedError as error:
            self.refuse(
                f"names {error}, which is not among the {len(_MEANINGS) + len(_INERT)} names that moediag admits; "
                "nothing was run. If the file is yours, write its arrays as a plain table in the trainer (`reports/"
                "reference.md`, exporter)"
            )
        except Exception as error:  # the opcodes of a damaged pickle fail in any way
            self.refuse(f"cannot be unpickled ({type(error).__name__}: {error}); copy or save it again")

    def refuse(self, reason: str) -> NoReturn:
        """Give the file up.

        Raises:
            DumpError: always.
        """
        raise DumpError(f"{self.where} {reason}")

    def plain(self, value: Any) -> Any:
        """A value without records: what they mean."""
        if isinstance(value, list) and not set(map(type, value)) - {int, float, str, bool, type(None)}:
            return value
        if not isinstance(value, dict | list | tuple | set | frozenset | _Record):
            return value
        if id(value) not in self._plain:
            self._depth += 1
            if self._depth > _DEEPEST:
                self.refuse(f"nests values more than {_DEEPEST} deep, or in themselves")
            self._kept.append(value)
            self._plain[id(value)] = self._meaning(value)
            self._depth -= 1
        return self._plain[id(value)]

    def _meaning(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.plain(name): self.plain(item) for name, item in value.items()}
        if isinstance(value, _Record):
            meaning = _MEANINGS.get(value.name)
            return None if meaning is None else meaning(self, value)
        items = [self.plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None = None) -> NDArray[Any]:
        """A view of a storage, in elements.

        Args:
            dtype: None = the storage's.
        """
        if not isinstance(storage, _Storage):
            self.refuse("has a tensor without a storage")
        dtype = dtype or _STORAGES.get(_name(storage.type).rpartition(".")[2])
        if dtype is None:
            self.refuse(f"has a tensor of {_name(storage.type)}; expected one of {', '.join(_STORAGES)}")
        values_N = self.numbers(self._entry(f"data/{storage.key}"), dtype)
        size, stride = tuple(self.plain(size)), tuple(self.plain(stride))
        whole = (offset, *size, *stride)
        if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in whole):
            self.refuse(f"has a tensor of shape {size} and strides {stride}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= len(values_N):
            self.refuse(f"has a tensor of {last + 1:,} elements in a storage of {len(values_N):,}; it was cut short")
        if not math.prod(size):
            return np.zeros(size, values_N.dtype)
        width = values_N.itemsize
        return np.lib.stride_tricks.as_strided(
            values_N[offset:], size, [step * width for step in stride], writeable=False
        )

    def numbers(self, content: bytes, dtype: str) -> NDArray[Any]:
        """A flat array of a file's bytes; what is left over of them is padding."""
        if dtype == "bfloat16":
            bits_N = self.numbers(content, "u2").astype(np.uint32)
            return np.asarray((bits_N << 16).view(np.float32))
        kind = np.dtype(self._order + dtype)
        return np.frombuffer(content, kind, len(content) // kind.itemsize).astype(kind.newbyteorder("="), copy=False)

    def shaped(self, content: Any, dtype: Any, shape: Any, order: str = "C") -> NDArray[Any]:
        """A numpy array of bytes, or of a list where its entries are objects."""
        shape = tuple(self.plain(shape))
        if any(type(n) is not int or n < 0 for n in shape):
            self.refuse(f"has an array of shape {shape}")
        if dtype == "O":
            items = [self.plain(item) for item in content]
            if len(items) != math.prod(shape):
                self.refuse(f"has an array of {len(items)} objects with shape {shape}")
            array = np.empty(len(items), dtype=object)
            array[:] = items
            return array.reshape(shape, order="F" if order == "F" else "C")
        content = self.plain(content)
        kind = np.dtype(dtype)
        if not isinstance(content, bytes | bytearray) or len(content) != math.prod(shape) * kind.itemsize:
            self.refuse(f"has an array of type {kind} and shape {shape} whose bytes do not fit; it was cut short")
        return np.frombuffer(bytes(content), kind).reshape(shape, order="F" if order == "F" else "C")


def _name(named: Any) -> str:
    return str(named.name) if isinstance(named, type) and issubclass(named, _Record) else type(named).__name__


class _NotAdmittedError(Exception):
    """A name that no reader knows."""


class _Unpickler(pickle.Unpickler):
    """Opcodes in, records out: no name leads to anything that could be run."""

    has_storages = False

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._records: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if whole == "collections.OrderedDict":
            return dict
        if whole not in _MEANINGS and whole not in _INERT:
            raise _NotAdmittedError(whole)
        # of this reading alone: what a pickle does to it, it does to itself
        return self._records.setdefault(whole, type("record", (_Record,), {"__slots__": (), "name": whole}))

    def persistent_load(self, pid: Any) -> _Storage:
        if not (self.has_storages and type(pid) is tuple and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("it refers to something outside itself")
        if type(pid[2]) is not str:
            raise pickle.UnpicklingError("a storage has no key")
        return _Storage(pid[1], pid[2])


def _tensor(reading: _Reading, record: _Record) -> NDArray[Any]:
    return reading.tensor(*record.arguments[:4])


def _tensor_of_dtype(reading: _Reading, record: _Record) -> NDArray[Any]:
    storage, offset, size, stride, _, _, dtype, *_ = record.arguments
    return reading.tensor(storage, offset, size, stride, _TORCH_DTYPES[_name(dtype).rpartition(".")[2]])


def _typed(reading: _Reading, record: _Record) -> Any:
    """A tensor with attributes of its own: the tensor."""
    rebuild, _, arguments, _ = record.arguments
    if not (isinstance(rebuild, type) and issubclass(rebuild, _Record)):
        reading.refuse("has a tensor that no known function builds")
    return reading.plain(rebuild(*arguments))


def _jagged(reading: _Reading, record: _Record) -> list[NDArray[Any]]:
    """A nested tensor with a ragged first dimension: its rows."""
    parts = reading.plain(
        {name: record.arguments[0].get(name) for name in ("values", "offsets", "lengths", "_ragged_idx")}
    )
    values_N, offsets_S = parts["values"], parts["offsets"]
    if parts["_ragged_idx"] != 1 or parts["lengths"] is not None:
        reading.refuse("has a nested tensor with holes or with a ragged dimension that is not the first")
    if np.any(np.diff(offsets_S) < 0) or offsets_S[0] < 0 or offsets_S[-1] > len(values_N):
        reading.refuse("has a nested tensor whose offsets do not fit its values; it was cut short")
    return [values_N[start:end] for start, end in pairwise(offsets_S)]


def _consolidated(reading: _Reading, record: _Record) -> dict[str, Any]:
    """A TensorDict in one storage of bytes: its tensors by name."""
    about, storage = reading.plain(record.arguments[0]), reading.plain(record.arguments[1])
    return {
        name: reading.shaped(storage[start:end].tobytes(), _torch_dtype(reading, dtype), shape)
        for name, (dtype, shape, start, end, _) in about["leaves"].items()
    }


def _torch_dtype(reading: _Reading, name: str) -> str:
    dtype = _TORCH_DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        reading.refuse(f"has a tensor of {name}; expected one of {', '.join(_TORCH_DTYPES)}")
    return dtype


def _array(reading: _Reading, record: _Record) -> NDArray[Any]:
    _, shape, dtype, is_fortran, content = record.state
    return reading.shaped(content, reading.plain(dtype), shape, "F" if is_fortran else "C")


def _buffer(reading: _Reading, record: _Record) -> NDArray[Any]:
    content, dtype, shape, order = record.arguments
    return reading.shaped(content, reading.plain(dtype), shape, order)


def _dtype(reading: _Reading, record: _Record) -> str:
    name, order = record.arguments[0], record.state[1] if record.state else "|"
    if name.startswith("O"):
        return "O"
    if name[:1] not in _NUMPY_KINDS or order not in "<>=|":
        reading.refuse(f"has an array of type {name}; expected numbers, text or objects")
    return f"{order}{name}"


def _scalar(reading: _Reading, record: _Record) -> Any:
    dtype, content = record.arguments
    return reading.shaped(content, reading.plain(dtype), ())[()].item()


def _skyrl_batch(reading: _Reading, record: _Record) -> Any:
    """SkyRL's batch: its state, tensors of bytes as arrays."""
    state = reading.plain(record.arguments[1])
    state["batch_dict"] = {name: _skyrl_tensor(reading, item) for name, item in state["batch_dict"].items()}
    return state


def _skyrl_tensor(reading: _Reading, item: Any) -> Any:
    if not isinstance(item, dict) or "format" not in item:
        return item
    if item["format"] == "torch":  # bfloat16, which numpy has not
        return _load_torch(f"{reading.where} (a tensor in it)", io.BytesIO(item["data"]))
    return reading.shaped(item["data"], _torch_dtype(reading, str(item["dtype"])), item["shape"])


def _verl_batch(reading: _Reading, record: _Record) -> dict[str, Any]:
    """verl's DataProto: its tensors, its columns of objects and its notes."""
    tensors, columns, notes = reading.plain(record.state)
    if isinstance(tensors, bytes):
        tensors = _load_torch(f"{reading.where} (its tensors)", io.BytesIO(tensors))
    return {"batch": tensors, "non_tensor_batch": columns, "meta_info": notes}


def _first(reading: _Reading, record: _Record) -> Any:
    return reading.plain(record.arguments[0])


_MEANINGS: Final[dict[str, Callable[[_Reading, _Record], Any]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.nested._internal.nested_tensor._rebuild_njt": _jagged,
    "torch.Size": _first,
    "torch.device": lambda reading, record: str(record.arguments[0]),
    "_codecs.encode": lambda reading, record: str(record.arguments[0]).encode("latin1"),
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _buffer,
    "tensordict._reductions._make_td": lambda reading, record: reading.plain(record.arguments[1]["_tensordict"]),
    "tensordict._reductions._rebuild_tensordict_files_consolidated": _consolidated,
    "tensordict.tensorclass.NonTensorData": lambda reading, record: reading.plain(
        record.state["non_tensordict"]["data"]
    ),
    "tensordict.tensorclass.NonTensorStack": lambda reading, record: reading.plain(record.state["tensordicts"]),
    "skyrl.backends.skyrl_train.training_batch._rebuild_tensor_batch": _skyrl_batch,
    "verl.protocol.DataProto": _verl_batch,
}
"""Name in a pickle -> what an object of it means."""

_INERT: Final = frozenset(
    {
        "__builtin__.set",
        "builtins.set",
        "numpy.ndarray",
        "skyrl.backends.skyrl_train.training_batch.TrainingInputBatch",
        "tensordict._td.TensorDict",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch._dynamo.decorators._DimRange",
        "torch.nested._internal.nested_tensor.NestedTensor",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in (*_STORAGES, *_TORCH_DTYPES)),
    }
)
"""Names that occur beside these and mean nothing by themselves."""
