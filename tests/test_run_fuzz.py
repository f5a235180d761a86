"""Spoilt inputs: whatever the bytes, and whatever sense sealed files make, an error line and no traceback.

``make hunt`` tries other cases, and more of them; the seed that is shown when a case fails repeats it.
"""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from conftest import HUNT, SEED
from scripted_engine import make_scripted_run

from moediag.cli.main import main
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.errors import MoediagError
from moediag.prompts import read_prompts
from moediag.run.files import canonical_json, read_sealed, sha256_bytes, write_sealed

CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"
N_PROMPTS_FILES, N_RUNS = (400, 100) if HUNT == 1 else (1000 * HUNT, 250 * HUNT)
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**53 + 1, 2**70, 1.5, -0.0, 1e308, "", "x", "\u2028", "\U0001f600",
    "../../etc", "nan", [], {}, [None], [[]], [1, 2], {"": 1}, {"a": {"b": []}}, [-5], ["x"] * 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted_run(tmp_path_factory.mktemp("fuzz") / "run", n_prompts=2, n_layers=2).path


def refusal(work: Callable[[], object]) -> str | None:
    """The error line of bad input; None when it was taken. Anything but a moediag error is a bug and goes through."""
    try:
        work()
    except MoediagError as error:
        line = str(error)
    else:
        return None
    assert line
    assert "\n" not in line
    return line


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or overwrite."""
    spoilt, at = bytearray(data), rng.randrange(max(len(data), 1))
    kind = rng.randrange(5)
    if kind == 0 and data:
        spoilt[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del spoilt[at:]
    elif kind == 2:
        spoilt[at:at] = spoilt[at : at + rng.randrange(1, 40)]
    elif kind == 3:
        spoilt[at:at] = rng.randbytes(rng.randrange(1, 20))
    else:
        spoilt[at : at + rng.randrange(1, 8)] = rng.choice(
            [b"\x00", b"\xff\xff", b"{", b"]", b'"', b"9" * 30, b"\n", b"\\u0000"]
        )
    return bytes(spoilt)


def spoil_json(rng: random.Random, content: Any) -> Any:
    """Another value, type, key or length somewhere in the tree."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
    elif kind == 2 and type(node[key]) in (int, float):
        node[key] = rng.choice([node[key] + 1, -node[key], node[key] * 10**6, float(node[key]), str(node[key])])
    else:
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


PROMPT_RECORDS = [
    {"prompt": "The for statement"},
    {"prompt": "A", "completion_token_ids": [3, 4]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"prompt_token_ids": [1, 2, 3], "note": {"a": 1}},
    {"prompt_token_ids": [5], "completion_token_ids": [6, 7]},
]


def spoilt_prompts(rng: random.Random) -> bytes:
    records: list[Any] = rng.choices(PROMPT_RECORDS, k=rng.randrange(1, 5))
    if rng.random() < 0.6:
        records = spoil_json(rng, records)
    text = "".join(json.dumps(record, ensure_ascii=rng.random() < 0.5) + "\n" for record in records)
    data = text.encode()
    return spoil_bytes(rng, data) if rng.random() < 0.5 else data


def test_spoilt_prompts_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(CHECKPOINT))
    n_refused = 0
    for case in range(N_PROMPTS_FILES):
        rng = random.Random(f"{SEED} prompts {case}")
        path = tmp_path / rng.choice(["p.jsonl", "p.jsonl", "p.txt"])
        path.write_bytes(spoilt_prompts(rng))
        try:
            line = refusal(lambda path=path: make_plan(checkpoint, path, SamplingOptions(max_tokens=4), shard_size=2))
        except BaseException:
            print(f"MOEDIAG_SEED={SEED} case {case}: {path.read_bytes()!r}")
            raise
        n_refused += line is not None
        if line is None:
            assert read_prompts(path)
    assert N_PROMPTS_FILES / 5 < n_refused < N_PROMPTS_FILES


def redigest(path: Path, data: bytes) -> None:
    """Put other data under a sidecar that vouches for it."""
    path.write_bytes(data)
    sidecar = path.with_suffix(".json")
    write_sealed(sidecar, {**read_sealed(sidecar), "data_sha256": sha256_bytes(data), "n_bytes": len(data)})


def spoil_arrays(rng: random.Random, data: bytes) -> bytes:
    """Valid safetensors of other dtypes, shapes, names and values."""
    arrays = dict(safetensors.numpy.load(_without_bfloat16(data)))
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    kind = rng.randrange(8)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(["", "extra", "router_logits_TLE", "logp", name + "_TL"])] = array
    elif kind == 2:
        dtype = rng.choice(["float64", "int64", "bool", "int8", "float16", "uint16", "uint8", "int32", "uint64"])
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(dtype)
    elif kind == 3:
        arrays[name] = rng.choice([array[None], array.reshape(-1), array[..., :0], array[:0], array[:-1], array[1:]])
    elif kind == 4:
        arrays[name] = np.concatenate([array, array[: rng.randrange(1, 3)]], axis=rng.randrange(array.ndim) * 0)
    elif kind == 5 and array.ndim > 1:
        arrays[name] = np.concatenate([array, array], axis=array.ndim - 1)
    elif kind == 6:
        arrays = {each: values[: len(values) - 1] for each, values in arrays.items()}
    else:
        value = (
            rng.choice([0, 7, 8, 200, 254, 255])
            if array.dtype.kind in "ui"
            else rng.choice([np.nan, np.inf, -np.inf, 5.0, 1e30])
        )
        arrays[name] = array.copy()
        arrays[name].reshape(-1)[rng.randrange(max(array.size, 1)) :: rng.choice([1, 3, 1000])] = value
    return bytes(safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in arrays.items()}))


def _without_bfloat16(data: bytes) -> bytes:
    """numpy has no bfloat16: the gate weights as float16-sized integers of another name are as good a start."""
    from moediag.run.capture import decode_capture

    return bytes(safetensors.numpy.save(_as_stored(decode_capture(data, "here").arrays())))


def _as_stored(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = arrays.get("expert_ids_TLK")
    return arrays if ids is None else {**arrays, "expert_ids_TLK": np.where(ids < 0, 255, ids).astype(np.uint8)}


def spoil_table(rng: random.Random, data: bytes) -> bytes:
    """Valid parquet of other columns, types, rows and values."""
    table = pq.read_table(io.BytesIO(data))
    at = rng.randrange(table.num_columns)
    name, column = table.column_names[at], table.column(at)
    kind = rng.randrange(7)
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.rename_columns([f"{each}x" if each == name else each for each in table.column_names])
    elif kind == 2:
        values = [
            rng.choice([None, str(value), value]) if rng.random() < 0.5 else str(value) for value in column.to_pylist()
        ]
        table = table.set_column(at, name, pa.array([None if value is None else str(value) for value in values]))
    elif kind == 3:
        odd = rng.choice([[None], [1.5], [-1], [2**40], [True], [[1]], [[]], [{"a": 1}], ["x"], [b"x"]])
        table = table.set_column(at, name, pa.array(odd * table.num_rows))
    elif kind == 4:
        table = rng.choice([table[:0], table[:-1], table[1:], pa.concat_tables([table, table]), table[::-1]])
    elif kind == 5 and not pa.types.is_nested(column.type) and not pa.types.is_null(column.type):
        values = column.to_pylist()
        values[rng.randrange(len(values))] = None if rng.random() < 0.3 else values[0]
        table = table.set_column(at, name, pa.array(values, column.type))
    else:
        order = list(range(table.num_rows))
        rng.shuffle(order)
        table = table.take(order)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def spoil_run(rng: random.Random, run: Path) -> str:
    """Spoil one file of a run in one way; returns which."""
    kind = rng.randrange(10)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    if kind < 2:  # bytes of any file
        path = rng.choice(files)
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))
    elif kind < 6:  # a valid seal on nonsense
        path = rng.choice([file for file in files if file.suffix == ".json"] + [run / "run.json"] * 6)
        content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
        spoilt = spoil_json(rng, content)
        if refusal(lambda: canonical_json(spoilt)) is None:
            write_sealed(path, spoilt)
    elif kind == 6:  # the prompts table, vouched for by run.json
        path = run / "prompts.parquet"
        data = spoil_table(rng, path.read_bytes()) if rng.random() < 0.6 else spoil_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        manifest = read_sealed(run / "run.json")
        write_sealed(
            run / "run.json", {**manifest, "prompts": {**manifest["prompts"], "data_sha256": sha256_bytes(data)}}
        )
    elif kind == 7:
        path = rng.choice([file for file in files if file.suffix == ".parquet" and file.parent.name == "tokens"])
        redigest(path, spoil_table(rng, path.read_bytes()))
    elif kind == 8:
        path = rng.choice([file for file in files if file.suffix == ".safetensors"])
        redigest(path, spoil_arrays(rng, path.read_bytes()))
    else:
        path = rng.choice([file for file in files if file.with_suffix(".json").exists() and file.suffix != ".json"])
        redigest(path, spoil_bytes(rng, path.read_bytes()))
    return str(path.relative_to(run))


def check_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> int:
    """Run a command in this process: done; one line on stderr and exit code 1; or, of validate, findings and 3."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    # a slow machine says what it is doing, as it should
    lines = [line for line in err.splitlines() if "findfont" not in line and not line.startswith("analysing ")]
    if status == 0:
        assert lines == []
    elif arguments[0] == "validate" and not lines:
        assert status == 3
        assert "error: " in out
    else:
        assert status == 1, err
        assert len(lines) == 1, err
        assert lines[0].startswith("moediag: ")
    return status


@pytest.mark.timeout(900 * HUNT)
def test_spoilt_runs(tmp_path: Path, healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n_found = 0
    for case in range(N_RUNS):
        rng, run = random.Random(f"{SEED} run {case}"), tmp_path / "run"
        shutil.copytree(healthy, run)
        where = spoil_run(rng, run)
        try:
            status = check_command(capsys, "validate", run)
            if case % 50 == 0 or (status == 0 and case % 5 == 0):
                with warnings.catch_warnings():  # numbers that validation refuses may overflow: --force asks for it
                    warnings.simplefilter("ignore", RuntimeWarning)
                    check_command(capsys, "analyze", run, *(["--force"] if rng.random() < 0.7 else []))
        except BaseException:
            print(f"MOEDIAG_SEED={SEED} case {case}: {where}")
            raise
        n_found += status in (1, 3)
        shutil.rmtree(run)
    assert n_found > N_RUNS / 2
