"""The tensors of a checkpoint: a digest however they are split into files, and how those of two checkpoints differ.

A broken file is refused in one line.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from moediag.engines import weights as module
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.weights import (
    compare_facts,
    compare_weights,
    read_header,
    scale_block,
    tensor_facts,
)
from moediag.errors import CheckpointError, CorruptRunError
from moediag.run.files import digest_of as digest_of_value
from moediag.run.records import WeightsComparison, as_record


def weights_digest(files: list[Path]) -> str:
    """``weights_sha256`` of a checkpoint with these files."""
    return digest_of_value(tensor_facts(files))


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


# -- comparison of two checkpoints -------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
ROUTER, EXPERT = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.3.up_proj.weight"


def saved(folder: Path, name: str, tensors: Tensors) -> Path:
    path = folder / f"{name}.safetensors"
    save_torch({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


def compared(folder: Path, a: Tensors, b: Tensors, **options: object) -> WeightsComparison:
    result = compare_weights([saved(folder, "a", a)], [saved(folder, "b", b)], **options)  # type: ignore[arg-type]
    assert as_record(json.loads(json.dumps(result.content(), allow_nan=False)), WeightsComparison, "here") == result
    return result


@pytest.fixture(scope="module")
def moe(random_moe: Path) -> Tensors:
    return load_file(random_moe / "model.safetensors")


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2), ("F8_E8M0", torch.float8_e8m0fnu)],
)
def test_all_256_codes_decode_as_torch_does(dtype: str, torch_dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(torch_dtype).float().numpy()
    got = module._decoded(memoryview(codes.numpy().tobytes()), dtype)
    np.testing.assert_array_equal(got, want)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


NARROW = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def check_rounding(values: np.ndarray, dtype: str) -> None:
    if dtype == "F8_E4M3":
        values = values[~(np.abs(values) > 464)]  # beyond the largest, torch gave NaN before it saturated
    got = torch.from_numpy(module._rounded(values, dtype)).double().numpy()
    want = torch.from_numpy(values).to(NARROW[dtype]).double().numpy()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_torchs_for_all_kinds_of_float32(dtype: str) -> None:
    """Every pattern of the upper 16 bits with halves, just below and just above: ties, subnormals, overflow, NaN."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        check_rounding((upper | np.uint32(lower)).view(np.float32), dtype)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from(sorted(NARROW)))
def test_rounding_is_torchs_for_any_float32(values: list[float], dtype: str) -> None:
    check_rounding(np.array(values, np.float32), dtype)


def test_what_is_too_large_for_e4m3_saturates() -> None:
    values = np.array([448, 464, 465, -1e9, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(module._rounded(values, "F8_E4M3"), [448, 448, 448, -448, 448, np.nan])


def test_float64_is_rounded_once() -> None:
    """Rounding over float32 first would make a tie of what is above it."""
    value = np.array([1 + 2**-8 + 2**-40])
    assert module._rounded(value, "BF16")[0] == 1 + 2**-7
    assert module._rounded(value.astype(np.float32), "BF16")[0] == 1


def test_facts_are_what_the_digest_is_of(random_moe: Path) -> None:
    files = [random_moe / "model.safetensors"]
    told: list[tuple[int, int]] = []
    facts = tensor_facts(files, lambda done, total: told.append((done, total)))
    assert digest_of_value(facts) == weights_digest(files)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == sum(tensor.n_bytes for tensor in read_header(files[0]))


def test_equal_weights_are_equal_in_any_shards(moe: Tensors, tmp_path: Path) -> None:
    names = sorted(moe)
    shards = [saved(tmp_path, f"s{i}", {name: moe[name] for name in names[i::3]}) for i in range(3)]
    told: list[tuple[int, int]] = []
    result = compare_weights([saved(tmp_path, "a", moe)], shards, progress=lambda *done: told.append(done))
    assert result.is_equal
    assert result.summary == f"all {len(moe)} tensors equal"
    assert result.overall.n_parameters == {"equal": sum(tensor.numel() for tensor in moe.values())}
    assert told[-1][0] == told[-1][1]


def test_float32_rounded_is_the_bf16_it_became(moe: Tensors, tmp_path: Path) -> None:
    torch.manual_seed(1)
    wide = {name: tensor.float() * (1 + 1e-4 * torch.randn(tensor.shape)) for name, tensor in moe.items()}
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    for result in (compared(tmp_path, wide, narrow), compared(tmp_path, narrow, wide)):
        assert result.overall.n_tensors == {"equal_after_rounding": len(moe)}
        assert 0 < (result.overall.relative_error or 0) < 2**-8
        assert result.overall.share_differing == 0
        assert "after rounding" in result.summary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_changed_router_is_found_with_its_error(moe: Tensors, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    a = {name: tensor.to(dtype) for name, tensor in moe.items()}
    b = {**a, ROUTER: a[ROUTER] + (0.01 * torch.randn(a[ROUTER].shape)).to(dtype)}
    result = compared(tmp_path, a, b)
    x, y = a[ROUTER].double(), b[ROUTER].double()
    (worst,) = result.worst
    assert (worst.name, worst.kind, worst.group) == (ROUTER, "differs", "router")
    assert worst.relative_error == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-12)
    assert worst.largest == float((x - y).abs().max())
    assert worst.n_differing == int((x != y).sum())
    norm = sum(float(tensor.double().square().sum()) for tensor in a.values()) ** 0.5
    assert result.overall.relative_error == pytest.approx(float((x - y).norm()) / norm, rel=1e-12)
    assert result.summary.startswith(f"1 of {len(moe)} tensors differ, relative error ")
    assert {group.group: set(group.n_tensors) for group in result.groups}["routed experts"] == {"equal"}


def test_a_flipped_bit_is_found(moe: Tensors, tmp_path: Path) -> None:
    path, other = saved(tmp_path, "a", moe), tmp_path / "b.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    result = compare_weights([path], [other])
    assert result.overall.n_tensors == {"equal": len(moe) - 1, "differs": 1}
    assert result.worst[0].n_differing == 1


def test_minus_zero_and_not_finite_elements_differ(tmp_path: Path) -> None:
    a = {"x": torch.tensor([0.0, 1.0, torch.inf, torch.nan, 2.0])}
    b = {"x": torch.tensor([-0.0, torch.nan, torch.inf, torch.nan, 1.0])}
    (worst,) = compared(tmp_path, a, b).worst
    assert (worst.n_differing, worst.n_not_finite, worst.relative_error, worst.largest) == (3, 1, 0.5, 1.0)


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    a, b = {"x": torch.randn(37, 11)}, {"x": torch.randn(37, 11)}
    q = {"x": b["x"].to(torch.float8_e4m3fn), "x_scale": torch.rand(37, 1)}
    whole = [compared(tmp_path, a, other).worst[0] for other in (b, q)]
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 16)
    for want, other in zip(whole, (b, q), strict=True):
        got = compared(tmp_path, a, other).worst[0]
        assert got.relative_error == pytest.approx(want.relative_error, rel=1e-12)
        assert (got.largest, got.n_differing) == (want.largest, want.n_differing)


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def dequantise_by_loop(q: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = torch.empty(q.shape)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            out[i, j] = q[i, j].float() * scale[i // rows, j // columns].float()
    return out


def test_int8_with_a_scale_per_channel(moe: Tensors, tmp_path: Path) -> None:
    b: Tensors = {}
    for name, tensor in moe.items():
        b[name] = tensor
        if ".experts." in name:
            b[name], b[f"{name}_scale"] = quantise_int8(tensor)
    result = compared(tmp_path, moe, b)
    n_experts = sum(".experts." in name for name in moe)
    assert result.overall.n_tensors == {"equal": len(moe) - n_experts, "dequantised": n_experts}
    assert result.n_scales == (0, n_experts)
    assert "(routers: equal)" in result.summary
    (experts,) = (group for group in result.groups if group.group == "routed experts")
    want = got = 0.0
    for name in (name for name in moe if ".experts." in name):
        restored = dequantise_by_loop(b[name], b[f"{name}_scale"], 1, 10**6)
        got += float((moe[name].double() - restored.double()).square().sum())
        want += float(moe[name].double().square().sum())
    assert experts.relative_error == pytest.approx((got / want) ** 0.5, rel=1e-9)
    assert compared(tmp_path, b, b).is_equal


def test_zero_points_are_subtracted(tmp_path: Path) -> None:
    q = torch.tensor([[3, -5], [7, 1]], dtype=torch.int8)
    zero = torch.tensor([[1], [-1]], dtype=torch.int8)
    a = (q.float() - zero) * torch.tensor([[0.5], [2.0]])
    b = {"m.weight": q, "m.weight_scale": torch.tensor([[0.5], [2.0]]), "m.weight_zero_point": zero}
    result = compared(tmp_path, {"m.weight": a}, b)
    assert result.overall.n_tensors == {"dequantised": 1}
    assert result.overall.relative_error == 0


@pytest.mark.parametrize("scale_name", ["weight_scale_inv", "weight_scale"])
def test_block_fp8_with_ragged_edges(tmp_path: Path, scale_name: str) -> None:
    torch.manual_seed(4)
    a = torch.randn(300, 200)  # 3 x 2 blocks: 300 is divisible by 3, and yet the blocks are of 128
    scale = torch.rand(3, 2) + 0.5
    q = (a / scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]).to(torch.float8_e4m3fn)
    b = {"m.weight": q, f"m.{scale_name}": scale, "m.input_scale": torch.ones(1)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    result = compared(tmp_path, {"m.weight": a}, b, b_block=scale_block(config))
    restored = dequantise_by_loop(q, scale, 128, 128).double()
    want = float((a.double() - restored).norm() / a.double().norm())
    assert result.overall.relative_error == pytest.approx(want, rel=1e-9)
    assert want < 0.05
    assert result.n_scales == (0, 2)


def test_blocks_of_compressed_tensors_are_read_from_its_config() -> None:
    weights = {"strategy": "block", "block_structure": [64, 32]}
    assert scale_block({"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}) == (64, 32)
    assert scale_block({"hidden_size": 3}) is None


def test_dequantising_is_compressed_tensors_own(tmp_path: Path) -> None:
    from compressed_tensors.quantization.lifecycle import forward

    torch.manual_seed(5)
    q = torch.randn(8, 16).to(torch.float8_e4m3fn)
    for shape in ((1,), (8, 1), (8, 4), (2, 4)):
        scale = torch.rand(shape) + 0.5
        a = {"m.weight": forward.dequantize(q, scale)}
        result = compared(tmp_path, a, {"m.weight": q, "m.weight_scale": scale})
        assert result.overall.relative_error == 0, shape


def test_powers_of_two_stored_as_bytes_are_scales(tmp_path: Path) -> None:
    q = torch.randn(4, 64).to(torch.float8_e4m3fn)
    exponent = torch.tensor([[127, 128], [120, 126], [127, 127], [130, 129]], dtype=torch.uint8)
    a = q.float() * torch.exp2(exponent.float() - 127).repeat_interleave(32, 1)
    result = compared(tmp_path, {"m.weight": a}, {"m.weight": q, "m.weight_scale": exponent})
    assert result.overall.relative_error == 0


@pytest.mark.parametrize(
    ("b", "kind", "reason"),
    [
        ({"m.qweight": torch.ones(2, 1, dtype=torch.int32), "m.qzeros": torch.ones(1, dtype=torch.int32),
          "m.scales": torch.ones(1)}, "not_comparable", "b packed (AWQ or GPTQ)"),
        ({"m.weight_packed": torch.ones(2, 1, dtype=torch.int32), "m.weight_scale": torch.ones(1),
          "m.weight_shape": torch.tensor([2, 4])}, "not_comparable", "b packed (compressed-tensors)"),
        ({"m.weight_blocks": torch.ones(2, 2, dtype=torch.uint8), "m.weight_scales": torch.ones(1)},
         "not_comparable", "b packed (MXFP4)"),
        ({"m.weight": torch.ones(2, 2, dtype=torch.uint8), "m.weight_scale": torch.ones(1),
          "m.weight_scale_2": torch.ones(1)}, "not_comparable", "b packed (NVFP4 or another of 4 bits)"),
        ({"m.weight": torch.ones(4, 2)}, "not_comparable", "other shape"),
        ({"m.weight": torch.ones(2, 4, dtype=torch.int8)}, "not_comparable", "F32 against I8 without scales"),
        ({"m.weight": torch.ones(2, 4)}, "equal", ""),
        ({"m.weight": torch.ones(2, 4).half()}, "equal_after_rounding", ""),
        ({"m.weight": torch.ones(2, 4).to(torch.float8_e5m2)}, "equal_after_rounding", ""),
        ({"m.weight": 2 * torch.ones(2, 4)}, "differs", ""),
    ],
)  # fmt: skip
def test_one_of_each_kind(tmp_path: Path, b: Tensors, kind: str, reason: str) -> None:
    result = compared(tmp_path, {"m.weight": torch.ones(2, 4)}, b)
    assert result.overall.n_tensors == {kind: 1}
    assert result.overall.n_parameters == {kind: 8}
    assert [r.reason for r in result.not_comparable] == [reason] * bool(reason)
    assert compared(tmp_path, b, b).is_equal


def test_renamed_and_missing_tensors_are_told_apart(moe: Tensors, tmp_path: Path) -> None:
    b = {name: tensor for name, tensor in moe.items() if name != EXPERT}
    b["router.renamed"] = b.pop(ROUTER)
    b["extra"] = torch.ones(3)
    result = compared(tmp_path, moe, b)
    assert {(r.reason, r.n_tensors, r.example) for r in result.not_comparable} == {
        ("renamed, with equal bytes", 1, ROUTER), ("only in a", 1, EXPERT), ("only in b", 1, "extra"),
    }  # fmt: skip
    assert result.overall.n_tensors == {"equal": len(moe) - 2, "not_comparable": 3}
    assert not result.is_equal


def test_fused_experts_are_those_of_transformers(random_moe: Path, moe: Tensors, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fused = {**AutoModelForCausalLM.from_pretrained(random_moe, dtype="bfloat16").state_dict()}
    fused.pop("lm_head.weight")  # tied
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    assert compared(tmp_path, moe, fused).is_equal
    assert compared(tmp_path, fused, moe).is_equal
    changed = {**moe, EXPERT: 2 * moe[EXPERT]}
    assert [tensor.name for tensor in compared(tmp_path, changed, fused).worst] == [EXPERT]


EXPERTS = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")


def test_experts_drawn_anew_are_told_from_noise_by_norm_and_angle(moe: Tensors, tmp_path: Path) -> None:
    """A converter that drops every expert (Megatron-LM pull request 5845) leaves weights of the right size and of no
    direction; a relative error of 1.4 did not say so."""
    torch.manual_seed(5)
    is_expert = {name: EXPERTS.fullmatch(name) is not None for name in moe}
    drawn = {name: torch.randn(t.shape) * t.float().std() if is_expert[name] else t for name, t in moe.items()}
    result = compared(tmp_path, moe, {name: t.to(moe[name].dtype) for name, t in drawn.items()})
    (group,) = [one for one in result.groups if one.group == "routed experts"]
    x, y = (torch.cat([t[name].double().ravel() for name in moe if is_expert[name]]) for t in (moe, drawn))
    assert group.norm_ratio == pytest.approx(float(y.norm() / x.norm()), rel=1e-3)
    assert group.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-3)
    words = "routed experts that differ have a norm ratio of 1.00 and a cosine of 0.00: other weights altogether"
    assert words in result.summary
    assert "(routers: equal)" in result.summary
    noisy = {name: (t + torch.randn(t.shape) * 0.5 * t.float().std()).to(t.dtype) for name, t in moe.items()}
    assert "norm ratio" not in compared(tmp_path, moe, noisy).summary


@pytest.mark.parametrize("is_fused", [False, True])
def test_experts_in_other_slots_are_permuted_and_not_other_weights(
    moe: Tensors, tmp_path: Path, is_fused: bool
) -> None:
    """Weights in remapped slots under logical ids (sglang issue 36861): every tensor differed, and that the experts are
    the same multiset was not looked at."""
    names = sorted({found[1] for name in moe if (found := EXPERTS.fullmatch(name))})
    layer, n = names[-1], 1 + max(int(found[2]) for name in moe if (found := EXPERTS.fullmatch(name)))
    order = [1, 0, *range(2, n)]
    moved = {
        f"{layer}.{order[int(found[2])]}.{found[3]}" if (found := EXPERTS.fullmatch(name)) and found[1] == layer
        else name: tensor
        for name, tensor in moe.items()
    }  # fmt: skip

    def kept(tensors: Tensors) -> Tensors:
        if not is_fused:
            return tensors
        rest = {name: tensor for name, tensor in tensors.items() if not EXPERTS.fullmatch(name)}
        stacks = {f"{one}.down_proj": torch.stack([tensors[f"{one}.{i}.down_proj.weight"] for i in range(n)])
                  for one in names}  # fmt: skip
        return {**rest, **stacks}

    a, b = kept(moe), kept(moved)
    result = compared(tmp_path, a, b)
    assert [(one.layer, one.n_slots, one.n_experts) for one in result.permuted] == [(layer, 2, n)]
    assert f"expert slots permuted, the experts themselves the same: 2 of {n} in {layer}" in result.summary
    assert "other weights altogether" not in result.summary
    if not is_fused:
        facts = [tensor_facts([saved(tmp_path, f"f{i}", one)]) for i, one in enumerate((a, b))]
        assert compare_facts(*facts).permuted == result.permuted
    name = next(name for name in b if layer in name)
    changed = {**b, name: b[name] + 1}
    assert not compared(tmp_path, a, changed).permuted, "an expert that is another one is no permutation"
    assert not compared(tmp_path, a, a).permuted


def test_facts_alone_say_what_is_equal(moe: Tensors, tmp_path: Path) -> None:
    b = {**moe, ROUTER: 2 * moe[ROUTER]}
    b["renamed"] = b.pop(EXPERT)
    facts = [tensor_facts([saved(tmp_path, name, tensors)]) for name, tensors in (("a", moe), ("b", b))]
    from_json = json.loads(json.dumps(facts[1]))
    result = compare_facts(facts[0], from_json)
    assert result.overall.n_tensors == {"equal": len(moe) - 2, "not_comparable": 1, "not_measured": 1}
    assert compare_facts(facts[0], facts[0]).is_equal
    assert "1 of" in result.summary
    assert as_record(json.loads(json.dumps(result.content())), WeightsComparison, "here") == result


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.router.layer.weight", "router"),
        ("model.layers.0.feed_forward.router.weight", "router"),
        ("model.layers.0.mlp.router.bias", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", "routed experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "routed experts"),
        ("model.layers.0.mlp.gate_proj.weight", "dense mlp"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.rotary.inv_freq", "other"),
    ],
)
def test_groups_by_name(name: str, group: str) -> None:
    assert module._group(name) == group


def refused(folder: Path, b: Tensors, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as error:
        compared(folder, {"m.weight": torch.ones(6, 4)}, b)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(5, 1), (4, 3), (2, 2, 2), (0,), (7,)])
def test_scales_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    q = torch.ones(6, 4).to(torch.float8_e4m3fn)
    refused(tmp_path, {"m.weight": q, "m.weight_scale": torch.ones(shape)}, "m.weight_scale of shape .* does not fit")


def test_zero_points_of_another_shape_are_refused(tmp_path: Path) -> None:
    b = {"m.weight": torch.ones(6, 4).to(torch.int8), "m.weight_scale": torch.ones(6, 1),
         "m.weight_zero_point": torch.ones(3, 1).to(torch.int8)}  # fmt: skip
    refused(tmp_path, b, "m.weight_zero_point of shape .* does not fit")


def test_a_file_that_ends_early_or_repeats_a_name_or_has_another_dtype_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path, "a", {"x": torch.ones(3)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1])
    made_up = written(tmp_path / "made_up.safetensors", {"x": entry([3], 0, 12, dtype="F9")}, b"123456789012")
    cases: list[tuple[list[Path], str]] = [
        ([cut], "not a whole"), ([whole, whole], "both hold tensor x"), ([made_up], "dtype F9"),
    ]  # fmt: skip
    for files, complaint in cases:
        with pytest.raises(CheckpointError, match=complaint):
            compare_weights([whole], files)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "a", {"x": torch.ones(3)})
    real: Callable[[Path], object] = module.read_header

    def then_cut(file: Path) -> object:
        header = real(file)
        file.write_bytes(file.read_bytes()[:-4])
        return header

    other = saved(tmp_path, "b", {"x": torch.ones(3)})
    monkeypatch.setattr(module, "read_header", then_cut)
    with pytest.raises(CheckpointError, match="ends inside tensor x"):
        compare_weights([path], [other])


def test_a_record_of_something_else_is_refused() -> None:
    with pytest.raises(CorruptRunError, match="lacks 'summary'"):
        as_record({"overall": {}}, WeightsComparison, "here")
