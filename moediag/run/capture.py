"""A capture in memory: one arm's rows for whole sequences, beside the token rows they score.

Invariants:
    - rows are sorted by (seq_id, position) and each sequence is whole, positions 0 .. n-1;
    - float arrays are float32 in memory whatever the engine's dtype was (float32 holds bf16 and fp16
      exactly); expert ids are int16 with -1 = not routed;
    - an array that an arm does not have is absent (``None``), never zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.errors import CorruptRunError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

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
            array = array[:, list(layers)] if "L" in letters else array
            width = {"K": top_k, "E": n_experts}.get(letters[-1])
            taken[name] = array if width is None else array[..., :width]
        return Capture(**taken)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays present, by legend name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def arrays_of(
    level: str, is_routed: bool, *, has_entropy: bool = True, has_distributions: bool = False
) -> tuple[str, ...]:
    """Names of the arrays that an arm keeps.

    Args:
        level: how much of routing: ``ids``, ``margins`` or ``full``.
        has_distributions: whole next-token distributions of some sequences, too.
    """
    arrays = ["logp_T", *(["entropy_T"] if has_entropy else [])]
    if is_routed:
        arrays.append("expert_ids_TLK")
        if level != "ids":
            arrays += ["gate_weights_TLK", "margin_TL", "logit_margin_TL"]
        if level == "full":
            arrays.append("router_logits_TLE")
    return (*arrays, *(["distributions"] if has_distributions else []))
