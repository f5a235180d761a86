"""Weights of a trainer's own arrays: every layout and kind against the flat numpy call, token by token."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moediag.corrections import METHODS, PRESETS, compose, parse_correction, weights
from moediag.errors import MoediagError

SCHEMES = [*METHODS, "verl-seq-tis", "slime-mis", "tis_token:cap=3+geometric_band:low=0.9,high=1.1"]


def batch(seed: int = 0, shape: tuple[int, int] = (5, 9)) -> dict[str, np.ndarray]:
    """Padded rows as a trainer has them: filler outside the mask, NaN and +inf among it."""
    rng = np.random.default_rng(seed)
    infer = -rng.exponential(1.0, shape)
    train = np.minimum(infer + 0.3 * rng.standard_t(2, shape), 0.0)
    length_B = rng.integers(0, shape[1] + 1, shape[0])
    mask = np.arange(shape[1]) < length_B[:, None]
    mask &= rng.random(shape) > 0.2  # tool tokens inside a response
    for array, filler in ((train, np.inf), (infer, np.nan)):
        array[~mask] = filler
    advantage = rng.normal(size=shape[0])
    return {"train": train, "infer": infer, "mask": mask, "advantage": advantage}


def flat(method: str, train: np.ndarray, infer: np.ndarray, mask: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """The flat call on the tokens that count, put back to their places."""
    row = np.nonzero(mask)[0]
    found = np.zeros(mask.shape)
    found[mask] = weights(method, train[mask], infer[mask], row, advantage=advantage[row])
    return found


@pytest.mark.parametrize("method", SCHEMES)
@given(seed=st.integers(0, 2**32 - 1))
def test_padded_rows_equal_the_flat_call(method: str, seed: int) -> None:
    one = batch(seed)
    expected = flat(method, **one)
    for advantage in (one["advantage"], one["advantage"][:, None], np.repeat(one["advantage"][:, None], 9, axis=1)):
        found = weights(method, one["train"], one["infer"], mask=one["mask"], advantage=advantage)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, expected)
    lists = weights(
        method, one["train"].tolist(), one["infer"].tolist(), mask=one["mask"].astype(int).tolist(),
        advantage=one["advantage"].tolist(),
    )  # fmt: skip
    np.testing.assert_array_equal(lists, expected)


def test_a_mask_of_flat_arrays_and_packed_rows_of_several_sequences() -> None:
    one = batch(3)
    train, infer, mask = one["train"], one["infer"], one["mask"]
    row = np.repeat(np.arange(5), 9)
    expected = flat("tis_sequence", **one)
    found = weights("tis_sequence", train.ravel(), infer.ravel(), row, mask=mask.ravel())
    np.testing.assert_array_equal(found, expected.ravel())
    packed = weights(
        "tis_sequence", train.reshape(3, 15), infer.reshape(3, 15), row.reshape(3, 15), mask=mask.reshape(3, 15)
    )
    np.testing.assert_array_equal(packed, expected.reshape(3, 15))


@pytest.mark.parametrize("method", SCHEMES)
def test_every_preset_by_its_name_and_compositions_as_objects(method: str) -> None:
    one = batch(1)
    given = {"mask": one["mask"], "advantage": one["advantage"]}
    for preset in PRESETS.values():
        found = weights(preset.name, one["train"], one["infer"], **given)
        np.testing.assert_array_equal(found, weights(preset.correction, one["train"], one["infer"], **given))
    if method not in PRESETS:
        found = weights(compose(method), one["train"], one["infer"], **given)
        np.testing.assert_array_equal(found, weights(method, one["train"], one["infer"], **given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", SCHEMES)
def test_tensors_with_grad_give_detached_tensors_of_their_kind(method: str, dtype: torch.dtype) -> None:
    one = batch(2)
    train = torch.tensor(one["train"]).to(dtype).requires_grad_()
    infer, mask = torch.tensor(one["infer"]).to(dtype), torch.tensor(one["mask"])
    advantage = torch.tensor(one["advantage"])
    found = weights(method, train, infer, mask=mask, advantage=advantage)
    assert isinstance(found, torch.Tensor)
    assert (found.device, found.shape) == (train.device, train.shape)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.requires_grad
    (found.detach() * train.masked_fill(~mask, 0.0)).sum().backward()  # as a loss uses them
    exact = {"train": train.detach().double().numpy(), "infer": infer.double().numpy()}
    expected = flat(method, **exact, mask=one["mask"], advantage=one["advantage"])
    assert torch.equal(found, torch.tensor(expected).to(found.dtype))


def test_tensors_stay_on_their_device() -> None:
    """On an accelerator where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = {name: torch.tensor(array, device=device) for name, array in batch(2).items()}
    found = weights("icepop", one["train"], one["infer"], mask=one["mask"])
    assert found.device == one["train"].device
    assert torch.equal(found.cpu(), weights("icepop", one["train"].cpu(), one["infer"].cpu(), mask=one["mask"].cpu()))


def test_flat_tensors_take_sequences_of_any_kind_and_mixed_kinds_follow_the_first() -> None:
    train, infer = torch.log(torch.tensor([0.4, 0.5, 1.0])), np.log([1.0, 1.0, 1.0])
    for seq_id in (torch.tensor([0, 0, 1]), ["a", "a", "b"], np.array([0, 0, 1])):
        found = weights("icepop", train, infer, seq_id)
        assert torch.equal(found, torch.tensor([0.0, 0.5, 1.0]))
    assert isinstance(weights("icepop", infer, train, [0, 0, 1]), np.ndarray)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights("icepop", [[0.0]], [[0.0]]), r"\(B, T\) arrays need mask"),
        (lambda: weights("icepop", [0.0], [0.0]), "flat arrays need seq_id"),
        (lambda: weights("icepop", [[[0.0]]], [[[0.0]]]), r"\(T,\) or \(B, T\), found logp_train of \(1, 1, 1\)"),
        (lambda: weights("icepop", [[0.0]], [[0.0, 0.0]], mask=[[1]]), r"logp_train is \(1, 1\), logp_infer \(1, 2\)"),
        (lambda: weights("icepop", [[0.0]], [[0.0]], mask=[1]), r"logp_train is \(1, 1\), mask \(1,\)"),
        (lambda: weights("icepop", [[0.0]], [[0.0]], mask=[[2]]), "mask needs true/false or 1/0, found 2"),
        (lambda: weights("dppo_tv", [[0.0]], [[0.0]], mask=[[1]], advantage=[1, 2]), r"advantage \(2,\)"),
        (lambda: weights("icepop", [[0.0], [0.0, 1.0]], [[0.0]], mask=[[1]]), "all rows of one length"),
        (lambda: weights("verl-geo-ts", [0.0], [0.0], [0]), "presets are ring-1t, .*verl-geo-rs"),
        (lambda: weights("verl-geo-rs", [0.0], [0.0], [0], low=0.9), "verl-geo-rs is no method and takes no low"),
        (lambda: weights(parse_correction("veto"), [0.0], [0.0], [0], floor=0.9), "is no method and takes no floor"),
    ],
)
def test_what_does_not_fit_is_one_line(call, message: str) -> None:
    with pytest.raises(MoediagError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_torch_is_not_imported_for_arrays() -> None:
    code = (
        "import sys, numpy as np; from moediag.corrections import weights\n"
        "weights('icepop', np.zeros((1, 2)), np.zeros((1, 2)), mask=np.ones((1, 2)))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
