"""Pickles and torch files: what is read equals what torch reads, and nothing that they name runs."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import operator
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moediag.cli.main import main
from moediag.errors import DumpError
from moediag.importers.pickles import read_pickle, read_torch

DUMPS = Path(__file__).parent / "data" / "dumps"


def same(theirs: Any, ours: Any) -> bool:
    """Whether what torch read is what we read, to the last bit and in the same type (bfloat16: as float32)."""
    if isinstance(theirs, torch.Tensor) and theirs.is_nested:
        return len(theirs.unbind()) == len(ours) and all(map(same, theirs.unbind(), ours))
    if isinstance(theirs, torch.Tensor):
        array = (theirs.float() if theirs.dtype == torch.bfloat16 else theirs).detach().numpy()
        return array.dtype == ours.dtype and array.shape == ours.shape and array.tobytes() == ours.tobytes()
    if isinstance(theirs, np.ndarray):
        return bool(theirs.dtype == ours.dtype and theirs.shape == ours.shape and (theirs == ours).all())
    if isinstance(theirs, dict):
        return list(theirs) == list(ours) and all(same(theirs[name], ours[name]) for name in theirs)
    if isinstance(theirs, list | tuple):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    return bool(theirs == ours)


def contents() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 5, 4, generator=generator)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool]  # fmt: skip
    jagged = [torch.arange(n) for n in (3, 0, 5)]
    shared = [1, 2, 3]
    return {
        **{str(dtype): (10 * numbers).abs().to(dtype) for dtype in dtypes},
        "views of one storage": [numbers, numbers[2:4, :, 1], numbers.permute(2, 0, 1), numbers[0, 0, 0]],
        "expanded": torch.tensor([1.5]).expand(3, 7),
        "empty": torch.zeros(0, 4),
        "with gradient": torch.nn.Parameter(torch.ones(3)),
        "jagged": torch.nested.nested_tensor(jagged, layout=torch.jagged),
        "shared list": [shared, {"again": shared}],
        "ordered": collections.OrderedDict(b=torch.ones(2), a=None),
        "numpy": [np.arange(6).reshape(2, 3), np.arange(6.0).reshape(3, 2).T, np.array(["ab"]), np.array([{"x": 1}])],
        "numpy numbers": [np.float64(0.25), np.int32(7), np.bool_(True)],
        "plain": {"text": "é\x85", "bytes": b"\xff\x00", "none": None, "long": 2**70, "tuple": (1, (2.5,)), 3: "a"},
        "size": torch.Size([2, 3]),
    }  # fmt: skip


@pytest.mark.parametrize("name", contents())
def test_what_torch_wrote_is_read_as_torch_reads_it(tmp_path: Path, name: str) -> None:
    torch.save({"it": contents()[name]}, tmp_path / "it.pt")
    theirs = torch.load(tmp_path / "it.pt", weights_only=False)
    assert same(theirs, read_torch(tmp_path / "it.pt"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_arrays_are_read_whatever_the_protocol(tmp_path: Path, protocol: int) -> None:
    content = {name: contents()[name] for name in ("numpy", "numpy numbers", "plain")}
    (tmp_path / "it.pkl").write_bytes(pickle.dumps(content, protocol))
    assert same(content, read_pickle(tmp_path / "it.pkl"))


@pytest.mark.parametrize("path", sorted([*DUMPS.glob("slime/*/*.pt"), *DUMPS.glob("miles/*/*.pt")]), ids=str)
def test_frameworks_files_are_read_as_torch_reads_them(path: Path) -> None:
    assert same(torch.load(path, weights_only=False), read_torch(path))


def test_reading_imports_neither_torch_nor_what_a_file_names() -> None:
    """A laptop without torch reads the same: torch is made impossible to import."""
    code = f"""
import sys
from pathlib import Path
for name in ("torch", "tensordict", "verl", "skyrl"):
    sys.modules[name] = None
from moediag.importers.pickles import read_pickle, read_torch
for path in sorted(Path({str(DUMPS)!r}).rglob("*")):
    if path.suffix in (".pt", ".pkl", ".dp"):
        (read_torch if path.suffix == ".pt" else read_pickle)(path)
        print(path.name)
assert all(sys.modules.get(name) is None for name in ("torch", "tensordict", "verl", "skyrl"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 22


class Call:
    """What a pickle makes of it: a call of anything with anything."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def touch(canary: Path) -> str:
    return f"touch {canary}"


def hostile_torch_file(canary: Path) -> bytes:
    content = io.BytesIO()
    torch.save(Call(os.system, touch(canary)), content)
    return content.getvalue()


def load_without_weights_only(canary: Path) -> bytes:
    nested = canary.with_suffix(".pt")
    nested.write_bytes(hostile_torch_file(canary))
    return pickle.dumps(Call(functools.partial(torch.load, weights_only=False), str(nested)))


RUN: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda canary: pickle.dumps(Call(os.system, touch(canary))),
    "opcodes by hand": lambda canary: f"cposix\nsystem\n(S'{touch(canary)}'\ntR.".encode(),
    "opcode INST": lambda canary: f"(S'{touch(canary)}'\niposix\nsystem\n.".encode(),
    "opcode OBJ": lambda canary: f"(cposix\nsystem\nS'{touch(canary)}'\no.".encode(),
    "eval": lambda canary: pickle.dumps(Call(eval, f"open({str(canary)!r}, 'w').close()")),
    "exec": lambda canary: pickle.dumps(Call(exec, f"open({str(canary)!r}, 'w').close()")),
    "subprocess": lambda canary: pickle.dumps(Call(subprocess.check_call, ["touch", str(canary)])),
    "a method by its name": lambda canary: pickle.dumps(Call(operator.methodcaller("write_text", ""), canary)),
    "torch.load without weights_only": load_without_weights_only,
    "beside a numpy array": lambda canary: pickle.dumps([np.arange(3), {"x": Call(os.system, touch(canary))}]),
    "an argument of an array": lambda canary: pickle.dumps(Call(np.ndarray, Call(os.system, touch(canary)))),
    "state of an array": lambda canary: pickle.dumps(Call(np.ndarray, (0,), state=Call(os.system, touch(canary)))),
}
"""Pickles that make a file where ``pickle`` loads them."""

INERT: dict[str, Callable[[Path], bytes]] = {
    "a tensor that another function builds": lambda canary: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\n"
        b"cposix\nsystem\n(S'" + touch(canary).encode() + b"'\nt}tR."
    ),
    "state of a class": lambda canary: b"cnumpy\nndarray\n(}S'__setstate__'\ncposix\nsystem\nstb.",
    "a file in SkyRL's batch": lambda canary: _skyrl(hostile_torch_file(canary)),
    "a file in verl's batch": lambda canary: _verl(hostile_torch_file(canary)),
}
"""Pickles that would need this reader, or the framework, to do so."""


def _skyrl(content: bytes) -> bytes:
    """A batch of SkyRL whose bfloat16 tensor is a hostile torch file."""
    module = "skyrl.backends.skyrl_train.training_batch"
    state = pickle.dumps({"batch_dict": {"x": {"format": "torch", "data": content}}}, 2)[2:-1]
    names = f"c{module}\n_rebuild_tensor_batch\n(c{module}\nTrainingInputBatch\n".encode()
    return b"\x80\x02" + names + state + b"tR."


def _verl(content: bytes) -> bytes:
    """A batch of verl whose tensors are a hostile torch file."""
    state = pickle.dumps((content, {}, {}), 2)[2:-1]
    return b"\x80\x02cverl.protocol\nDataProto\n)\x81" + state + b"b."


@pytest.mark.parametrize("name", RUN | INERT)
def test_a_hostile_pickle_does_not_run(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    content = (RUN | INERT)[name](canary)
    (tmp_path / "it.pkl").write_bytes(content)
    with pytest.raises(DumpError, match=r"nothing was run|cannot be unpickled|has a tensor|has an array"):
        read_pickle(tmp_path / "it.pkl")
    assert not canary.exists()
    with zipfile.ZipFile(tmp_path / "it.pt", "w") as archive:
        archive.writestr("it/data.pkl", content)
    with pytest.raises(DumpError, match=r"nothing was run|cannot be unpickled|has a tensor|has an array"):
        read_torch(tmp_path / "it.pt")
    assert not canary.exists()


@pytest.mark.parametrize("name", RUN)
def test_the_hostile_pickles_are_hostile(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    content = RUN[name](canary)
    with contextlib.suppress(Exception):  # what it does with the result does not matter: it has run
        pickle.loads(content)
    assert canary.exists()


def test_a_pickle_changes_nothing_that_outlives_it(tmp_path: Path) -> None:
    """State given to a class, or to a function, that is admitted: it stays with that reading."""
    attack = b"\x80\x02cnumpy\nndarray\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb."
    (tmp_path / "it.pkl").write_bytes(attack)
    with pytest.raises(DumpError):
        read_pickle(tmp_path / "it.pkl")
    content = {"numpy": np.arange(3)}
    (tmp_path / "it.pkl").write_bytes(pickle.dumps(content))
    assert same(content, read_pickle(tmp_path / "it.pkl"))


@pytest.mark.parametrize("n", [1 << 12, 60])
def test_values_within_values_end(tmp_path: Path, n: int) -> None:
    """A list of the same list twice, sixty deep, would be 2^60 lists; one in itself has no end."""
    value: Any = [0.5, "x"]
    for _ in range(n):
        value = [value, value]
    if n > 100:
        itself: list[Any] = []
        itself.append(itself)
        value = itself
    (tmp_path / "it.pkl").write_bytes(pickle.dumps(value))
    if n > 100:
        with pytest.raises(DumpError, match="in themselves"):
            read_pickle(tmp_path / "it.pkl")
    else:
        read = read_pickle(tmp_path / "it.pkl")
        for _ in range(n):
            read = read[1]
        assert read == [0.5, "x"]


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("slime/train_data/0.pt", read_torch),
        ("miles/routing_replay_step0/rank0_routing_replay.pt", read_torch),
        ("skyrl/dumped_data/global_step_1_training_input.pkl", read_pickle),
        ("verl/rollout_skip_v0/tiny_moe/GBS6_N2_in20_out40/1/gen_batch.dp", read_pickle),
    ],
)
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, file: str, read: Callable[[Path], Any]) -> None:
    content = (DUMPS / file).read_bytes()
    cut = tmp_path / Path(file).name
    for length in [0, 1, 10, *range(100, len(content) - 1, len(content) // 23), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(DumpError, match=str(cut)):
            read(cut)


def test_a_changed_byte_of_a_torch_file_is_found(tmp_path: Path) -> None:
    """Storages have checksums: torch checks them, and so does this. Bytes of the padding may change."""
    path = DUMPS / "miles/routing_replay_step0/rank0_routing_replay.pt"
    content = path.read_bytes()
    whole = torch.load(path)
    changed = tmp_path / "it.pt"
    n_refused = 0
    for place in range(0, len(content), 97):
        changed.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            read = read_torch(changed)
        except DumpError:
            n_refused += 1
        else:
            assert same(whole, read), place
    assert n_refused > 300


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(torch.arange(10), tmp_path / "it.pt")
    with zipfile.ZipFile(tmp_path / "it.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickled] = parts[pickled].replace(b"K\n\x85", b"K\x0b\x85")
    with zipfile.ZipFile(tmp_path / "it.pt", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(DumpError, match="11 elements in a storage of 10; it was cut short"):
        read_torch(tmp_path / "it.pt")


def test_what_is_no_torch_file_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DumpError, match=r"old.pt is no file of torch.save since torch 1.6"):
        read_torch(tmp_path / "old.pt")
    with pytest.raises(DumpError, match=r"none.pt cannot be read: No such file"):
        read_torch(tmp_path / "none.pt")
    torch.save(torch.ones(2).to(torch.float8_e4m3fn), tmp_path / "it.pt")
    with pytest.raises(DumpError, match=r"names torch.float8_e4m3fn|Float8"):
        read_torch(tmp_path / "it.pt")


def test_a_hostile_dump_is_refused_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trusted or not, it is one line and exit code 1, and nothing was run or made."""
    canary, dump = tmp_path / "canary", tmp_path / "global_step_1_training_input.pkl"
    dump.write_bytes(_skyrl(hostile_torch_file(canary)))
    for trust in ([], ["--trust-pickle"]):
        assert main(["import", "skyrl", str(dump), "-o", str(tmp_path / "out"), *trust]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [dump.name]
