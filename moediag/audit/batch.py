"""What an audit differentiates: scored tokens of whole sequences, and one coefficient per token and method.

The gradient of a method is sum_s (A_s / len_s) sum_t w_t grad logp_t: methods differ by the coefficients of the same
token gradients, and per sequence these coefficients span a space of few dimensions (most methods give the plain ratio
to all but a handful of tokens, sequence-level weights are multiples of no correction at all). So each sequence is
differentiated once per dimension of that space, not once per method; every method is an exact combination.

Invariant: the combination is a singular value decomposition cut off at 1e-10, float64 rounding; nothing is sampled,
projected or dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.gradients import SEQUENCE_IS
from moediag.analysis.tokens import Tokens, concatenate_tokens, token_columns
from moediag.corrections import parse_correction, weights
from moediag.corrections.sources import grpo_advantages, sequence_rewards
from moediag.errors import EngineError
from moediag.run.reader import Run

Float64 = NDArray[np.float64]

_NO_RANK: Final = 1e-10
_TINY: Final = 1e-200


@dataclass(frozen=True)
class AuditTokens:
    """Scored response tokens, sorted by sequence; S sequences, M methods with the reference last.

    Args:
        seq_id_S, prompt_id_S: whose tokens they are.
        bounds_S: [start, end) of every sequence's tokens.
        token_id_T: the token scored.
        position_T: its position in the response.
        logp_train_T: log-probabilities at theta_old on the train side [nat].
        reward_S, advantage_S: of every sequence.
        weights_MT: weight of every method, rows as in ``names``.
        names: methods in words, then :data:`SEQUENCE_IS`.
    """

    seq_id_S: NDArray[np.int64]
    prompt_id_S: NDArray[np.int64]
    bounds_S: tuple[tuple[int, int], ...]
    token_id_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    logp_train_T: Float64
    reward_S: Float64
    advantage_S: Float64
    weights_MT: Float64
    names: tuple[str, ...]

    @property
    def sequence_weight_S(self) -> Float64:  # noqa: N802 - the legend suffix
        """Full product ratio of every sequence."""
        return self.weights_MT[-1, [start for start, _ in self.bounds_S]]

    def basis(self, sequence: int) -> SequenceBasis:
        """Directions to differentiate in one sequence; methods combine them with A / len taken in."""
        start, end = self.bounds_S[sequence]
        basis = sequence_basis(self.weights_MT[:, start:end])
        return SequenceBasis(basis.coefficient_MR * self.advantage_S[sequence] / (end - start), basis.basis_RT)


@dataclass(frozen=True)
class SequenceBasis:
    """``coefficient_MR @ basis_RT`` are the token coefficients of every method; R is the rank."""

    coefficient_MR: Float64
    basis_RT: Float64


def sequence_basis(weights_MT: Float64) -> SequenceBasis:
    """The fewest directions over tokens that give every method's weights of one sequence, exactly.

    Args:
        weights_MT: weight of every method and token.

    Returns:
        Orthonormal directions; none where all weights are 0.

    Example:
        >>> basis = sequence_basis(np.array([[1.0, 1.0, 1.0], [0.9, 1.2, 1.1], [3.0, 3.0, 3.0]]))
        >>> basis.basis_RT.shape
        (2, 3)
    """
    left_MR, size_R, basis_RT = np.linalg.svd(weights_MT, full_matrices=False)
    is_kept_R = size_R > _NO_RANK * np.max(size_R, initial=_TINY)
    return SequenceBasis((left_MR * size_R)[:, is_kept_R], basis_RT[is_kept_R])


def audit_tokens(run: Run, arms: tuple[str, str], methods: Sequence[str], n_sequences: int | None) -> AuditTokens:
    """Scored tokens of a run's pair with reward, advantage and the weights of every method.

    Args:
        arms: train and infer arm.
        methods: corrections in words (:func:`~moediag.corrections.parse_correction`).
        n_sequences: only the first so many; None = all.

    Raises:
        EngineError: no token was scored by both arms.
    """
    frame = concatenate_tokens([token_columns(block, None) for block in run.pair(*arms).blocks()])
    x = Tokens(frame.sort_values(["seq_id", "position"], kind="stable"))
    if n_sequences is not None:
        x = Tokens(x.rows[x.row_T < n_sequences])
    if not len(x):
        raise EngineError(f"{run.path}: no response token was scored by both {arms[0]} and {arms[1]}; nothing to audit")
    ends_S = np.cumsum(x.n_S.astype(np.int64))
    starts_S = np.append(0, ends_S[:-1])
    seq_id_S, prompt_id_S = (x.column(name)[starts_S].astype(np.int64) for name in ("seq_id", "prompt_id"))
    reward_S = sequence_rewards(x.column("token_id"), x.row_T, x.n_sequences)
    advantage_S = grpo_advantages(reward_S, prompt_id_S)
    logps = x.logp_train_T, x.logp_infer_T
    product_T = weights("mis_sequence", *logps, x.row_T, cap=math.inf)  # the product ratio itself, clamped
    rows = [weights(method, *logps, x.row_T, advantage=advantage_S[x.row_T]) for method in methods]
    return AuditTokens(
        seq_id_S=seq_id_S,
        prompt_id_S=prompt_id_S,
        bounds_S=tuple(zip(starts_S.tolist(), ends_S.tolist(), strict=True)),
        token_id_T=x.column("token_id").astype(np.int64),
        position_T=x.column("position").astype(np.int64),
        logp_train_T=logps[0],
        reward_S=reward_S,
        advantage_S=advantage_S,
        weights_MT=np.stack([*rows, product_T]),
        names=(*methods, SEQUENCE_IS),
    )


def is_token_level(method: str) -> bool:
    """True when a correction looks at one token at a time, so that its expectation at a prefix can be had exactly.

    Example:
        >>> is_token_level("icepop:alpha=0.5,beta=5"), is_token_level("tis_token+veto")
        (True, False)
    """
    return all(step.declared.bounded.unit != "sequence" for step in parse_correction(method).steps)
