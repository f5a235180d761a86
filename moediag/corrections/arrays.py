"""Weights of a trainer's own arrays: lists, numpy or torch, flat or (B, T) with a mask.

Invariants:
    - every layout and kind gives what the flat float64 call gives, token by token, bit for bit before it is rounded to
      the caller's dtype;
    - what the mask leaves out takes no part: its values may be anything;
    - a weight is a constant of the loss, as in every source of :data:`~moediag.corrections.methods.METHODS`: gradients
      neither enter nor leave;
    - torch is looked up only where the caller has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.corrections.correction import Correction, Step, correction_weights, parse_correction
from moediag.corrections.methods import METHODS
from moediag.corrections.presets import PRESETS
from moediag.errors import MoediagError

_MASKS: Final = "response_mask, completion_mask, loss_mask"


def weights(
    method: str | Correction,
    logp_train: ArrayLike,
    logp_infer: ArrayLike,
    seq_id: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    advantage: ArrayLike | None = None,
    **params: float,
) -> Any:
    """What a correction multiplies every token's policy-gradient term with.

    Args:
        method: a method (``"icepop"``), a preset (``"verl-seq-tis"``), a composition in words
            (:func:`parse_correction`: ``"tis_token:cap=2+geometric_band"``) or a :class:`Correction`; of these only
            a method takes ``params``.
        logp_train, logp_infer: (T,) or (B, T) log-probabilities of the same tokens at theta_old [nat]; not scored is
            what is NaN (prompt, padding) or -inf (a sampled token has no probability of 0: a defect, see
            D31-impossible-logp).
        seq_id: (T,) sequence of every token, any hashable values, rows in any order. Of (B, T) arrays a row is a
            sequence, unless packed rows say otherwise with a (B, T) array.
        mask: of their shape, true or 1 where a token counts; needed for (B, T), whose padding would count otherwise.
        advantage: of their shape, or of (B, T) arrays (B,) or (B, 1), one per sequence [1]; only ``dppo_tv`` and
            ``dppo_kl`` look at them.
        **params: the method's parameters; defaults as its source has them.

    Returns:
        Weights in the shape of ``logp_train``; 0 = no update. Unscored tokens get 0. Tests see the log-ratio d as it
        is, weights see it clamped to +-20: d = +100 weighs the cap under truncation, 0 under every mask with a bound
        there, exp(20) where nothing bounds it. Log-probabilities that are float32 numbers (so are bfloat16's) are
        held against bounds in float32. A numpy array of float64; where ``logp_train`` is a torch tensor, a tensor on
        its device, of its dtype (float32 where that is narrower), detached: no gradient flows through a weight. Their
        values pass through the CPU.

    Raises:
        MoediagError: unknown method, preset or parameter, empty band, arrays of different shapes, (B, T) without mask,
            a mask of other values, no sequences of flat arrays, advantages missing.

    Source: every method's in :data:`~moediag.corrections.methods.METHODS`; formulas in reports/corrections.md.

    Example:
        >>> import numpy as np
        >>> logp_train_T = np.log([0.4, 0.5, 1.0, 0.1])
        >>> weights("icepop", logp_train_T, np.log([1.0, 1.0, 1.0, 0.025]), [0, 0, 1, 1]).round(6).tolist()
        [0.0, 0.5, 1.0, 4.0]
        >>> weights("veto", logp_train_T, np.zeros(4), [0, 0, 1, 1], floor=0.2).tolist()
        [1.0, 1.0, 0.0, 0.0]
        >>> weights("tis", np.log([[0.4, 0.8], [0.5, 1]]), np.log([[0.1, 0.8], [1, 1]]), mask=[[1, 1], [1, 0]]).tolist()
        [[2.0, 1.0], [0.5, 0.0]]
    """
    flat = flat_arrays(logp_train, logp_infer, seq_id, mask, advantage=advantage)
    found = correction_weights(
        named_correction(method, params), flat["logp_train"], flat["logp_infer"], flat["seq_id"], flat.get("advantage")
    )
    return _as_given(found.reshape(np.shape(logp_train)), logp_train)


def flat_arrays(
    logp_train: ArrayLike,
    logp_infer: ArrayLike,
    seq_id: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **more: ArrayLike | None,
) -> dict[str, NDArray[Any]]:
    """A trainer's arrays, row by row, as float64.

    Args:
        logp_train, logp_infer, seq_id, mask: as :func:`weights` takes them.
        **more: further values, of every token or, beside (B, T) arrays, of every sequence; None = not given.

    Returns:
        By name, (T,) or (B * T,); ``seq_id`` is always there. Log-probabilities that the mask leaves out are NaN.

    Raises:
        MoediagError: arrays of different shapes, (B, T) without mask, a mask of other values, no sequences of flat
            arrays.
    """
    given = {"logp_train": logp_train, "logp_infer": logp_infer, "seq_id": seq_id, "mask": mask, **more}
    arrays = _arrays({name: value for name, value in given.items() if value is not None})
    shape = arrays["logp_train"].shape
    if len(shape) not in (1, 2):
        raise MoediagError(f"corrections take arrays of (T,) or (B, T), found logp_train of {shape}")
    is_row = len(shape) == 2
    if is_row and mask is None:
        raise MoediagError(
            f"(B, T) arrays need mask: true where a token counts ({_MASKS}); all ones where every one does"
        )
    if seq_id is None and not is_row:
        raise MoediagError("flat arrays need seq_id, the sequence of every token; or give (B, T) arrays with a mask")
    for name in {*arrays} & {*more}:
        arrays[name] = _per_token(arrays[name], shape)
    for name, array in arrays.items():
        if array.shape != shape:
            raise MoediagError(f"corrections take arrays of one shape; logp_train is {shape}, {name} {array.shape}")
    if seq_id is None:
        arrays["seq_id"] = np.repeat(np.arange(shape[0]), shape[1])
    if mask is not None:
        is_other = ~np.isin(arrays["mask"], (0, 1))
        if is_other.any():
            raise MoediagError(f"mask needs true/false or 1/0, found {arrays['mask'][is_other][0]:g}")
        for name in ("logp_train", "logp_infer"):
            arrays[name] = np.where(arrays["mask"] == 1, arrays[name], np.nan)
    return {name: array.ravel() for name, array in arrays.items()}


def named_correction(method: str | Correction, params: Mapping[str, float] | None = None) -> Correction:
    """The correction that :func:`weights` calls by a name.

    Raises:
        MoediagError: unknown method, preset or parameter.
    """
    if isinstance(method, str) and method in METHODS:
        return Correction((Step(method, dict(params or {})),))
    if params:
        raise MoediagError(f"{method} is no method and takes no {', '.join(params)}; there are {', '.join(METHODS)}")
    if isinstance(method, Correction):
        return method
    if method in PRESETS:
        return PRESETS[method].correction
    try:
        return parse_correction(method)
    except MoediagError as error:
        hint = "" if ":" in method or "+" in method else f"; presets are {', '.join(PRESETS)}"
        raise MoediagError(f"{error}{hint}") from None


def _per_token(advantage: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Advantages of sequences at each of their tokens."""
    if len(shape) == 2 and advantage.shape == shape[:1]:
        advantage = advantage[:, None]
    return np.broadcast_to(advantage, shape) if advantage.shape == (shape[0], 1) else advantage


def _torch(value: Any) -> Any:
    """Torch where the value is a tensor of it, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(value, torch.Tensor) else None


def _arrays(given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Values as numpy has them, in float64, which holds bfloat16 and every count; words stay words.

    Tensors are copied to the CPU together, so that a device is waited for once.
    """
    tensors = {name: value.detach() for name, value in given.items() if _torch(value) is not None}
    devices = {value.device.type for value in tensors.values()}
    if len(devices) == 1 and devices != {"mps"}:  # Apple's devices have no float64
        torch = sys.modules["torch"]
        joined = torch.cat([value.reshape(-1).to(torch.float64) for value in tensors.values()]).cpu().numpy()
        parts = np.split(joined, np.cumsum([value.numel() for value in tensors.values()])[:-1])
        tensors = {name: part.reshape(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
    arrays = {}
    for name, value in {**given, **tensors}.items():
        array = value
        if _torch(value) is not None:
            array = value.cpu().double() if value.is_floating_point() else value.cpu()
        try:
            arrays[name] = np.asarray(array, None if name in ("seq_id", "prompt_id") else np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MoediagError(f"corrections take arrays of numbers, all rows of one length ({error})") from None
    return arrays


def _as_given(weights: NDArray[np.float64], like: Any) -> Any:
    if (torch := _torch(like)) is None:
        return weights
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float64
    return torch.from_numpy(weights).to(device=like.device, dtype=dtype)
