"""The weights digest: of tensors, however they are split into files; a broken file is refused in one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.weights import read_header, weights_digest
from moediag.errors import CheckpointError

TENSORS = {
    "layers.0.gate.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "layers.0.bias": np.arange(4, dtype=np.int64),
    "layers.1.gate.weight": np.linspace(0, 1, 24, dtype=np.float16).reshape(6, 4),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.0, np.float64),
}


def digest_of(folder: Path, **files: dict[str, np.ndarray]) -> str:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.safetensors" for name in files]
    for path, tensors in zip(paths, files.values(), strict=True):
        save_file(tensors, path)
    return weights_digest(paths)


@given(st.permutations(list(TENSORS)), st.integers(0, len(TENSORS)))
def test_neither_shards_nor_order_nor_metadata_enter(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    whole = digest_of(folder, whole=TENSORS)
    parts = [{name: TENSORS[name] for name in part} for part in (names[:cut], names[cut:]) if part]
    assert digest_of(folder, **{f"part{i}": part for i, part in enumerate(parts)}) == whole
    save_file(TENSORS, folder / "told.safetensors", metadata={"format": "pt", "from": "elsewhere"})
    assert weights_digest([folder / "told.safetensors"]) == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda name, array: {name + "x": array},
        lambda name, array: {name: array.reshape(6, 4)},
        lambda name, array: {name: array.view(np.int32)},
        lambda name, array: {name: np.where(array == 23, np.float32(23.000002), array)},
        lambda name, array: {},
    ],
    ids=["name", "shape", "dtype", "one value", "one fewer"],
)
def test_any_change_of_a_tensor_is_another_digest(tmp_path: Path, change: object) -> None:
    name = "layers.0.gate.weight"
    others = {key: value for key, value in TENSORS.items() if key != name}
    changed = {**others, **change(name, TENSORS[name])}  # type: ignore[operator]
    assert digest_of(tmp_path, changed=changed) != digest_of(tmp_path, whole=TENSORS)


def test_two_equal_tensors_are_not_one(tmp_path: Path) -> None:
    """Digests are sorted by name: exchanging the content of two tensors of one shape must show."""
    a, b = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert digest_of(tmp_path, one={"a": a, "b": b}) != digest_of(tmp_path, two={"a": b, "b": a})


def test_resharding_a_checkpoint_keeps_its_digest(random_moe: Path, tmp_path: Path) -> None:
    """weights_sha256 used to be of files: the same weights saved in other shards were another model, and refused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(random_moe, dtype="bfloat16")
    AutoTokenizer.from_pretrained(random_moe).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    whole, resharded = open_checkpoint(str(random_moe)), open_checkpoint(str(tmp_path))
    assert len(whole.weight_files) == 1
    assert len(resharded.weight_files) > 2
    assert whole.digests["weights_sha256"] == resharded.digests["weights_sha256"]


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[object], begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        ({"a": entry([2], 0, 8)}, b"1234567", "its tensors end at byte"),
        ({"a": entry([2], 0, 8)}, b"123456789", "its tensors end at byte"),
        ({"a": entry([3], 0, 8)}, b"12345678", "of F32 [3] has 8 bytes"),
        ({"a": entry([1], 4, 8)}, b"12345678", "begins at byte"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678", "begins at byte"),
        ({"a": entry([1], 8, 4)}, b"12345678", "has -4 bytes"),
        ({"a": entry([-2, -1], 0, 8)}, b"12345678", "shape [-2, -1]"),
        ({"a": entry([True, 2], 0, 8)}, b"12345678", "shape [True, 2]"),
        ({"a": entry([1.0], 0, 4)}, b"1234", "shape [1.0]"),
        ({"a": entry([1], 0, 4, dtype=7)}, b"1234", "dtype 7"),
        ({"a": {"dtype": "F32"}}, b"", "KeyError"),
        ({"a": 3}, b"", "TypeError"),
        ([1, 2], b"", "no JSON object"),
        (b'{"a": ', b"", "JSONDecodeError"),
        (b"\xff\xfe\xff", b"", "UnicodeDecodeError"),
        (b"[" * 100_000, b"", "RecursionError"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
            "twice",
        ),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(
    tmp_path: Path, header: object, data: bytes, complaint: str
) -> None:
    path = written(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        weights_digest([path])
    assert complaint in str(error.value)
    assert str(error.value).startswith(f"{path} is not a whole safetensors file")


@pytest.mark.parametrize("length", [2**63, 10**9, 100_000_001, 0, 1])
def test_a_header_length_of_nonsense_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = written(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match=r"a header of [\d,]+ bytes"):
        read_header(path)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    digest_of(tmp_path, whole=TENSORS)
    data = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in (0, 5, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            weights_digest([path])


@given(st.binary(max_size=60), st.integers(0, 60))
def test_no_header_at_all_ends_in_anything_but_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, length: int
) -> None:
    path = written(tmp_path_factory.mktemp("garbage") / "model.safetensors", garbage, length=length)
    with contextlib.suppress(CheckpointError):
        weights_digest([path])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights_digest([tmp_path / "absent.safetensors"])
