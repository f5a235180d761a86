"""Rewards and group-relative advantages for logged text: the data's own, or a stated synthetic one.

Invariants:
    - the synthetic reward depends on the text and on nothing else: no tokenizer, no random state, the same on every
      machine. A reward that does not look at the text would have an expected policy gradient of exactly zero (any
      baseline does: sum_y pi(y) grad log pi(y) = 0), so whatever is then measured of a gradient is noise;
    - an advantage is finite: where a group has no spread it is 0, no signal, and not a division by 0.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.errors import MoediagError

Float64 = NDArray[np.float64]

REWARD_WORDS: Final = "synthetic: share of response tokens whose splitmix64(token id) has its lowest bit set"
"""How the synthetic reward is named wherever a number depends on it."""

ADVANTAGE_WORDS: Final = (
    "group-normalised within the prompt, (r - mean) / std with ddof 1; a prompt with one sample takes the mean of all "
    "other prompts' sequences and the std of all sequences"
)

_GAMMA, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(values: ArrayLike) -> NDArray[np.uint64]:
    """The splitmix64 hash of integers, taken modulo 2^64.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    Example:
        >>> int(splitmix64(0)[()])
        16294208416658607535
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the definition
        z = np.asarray(values).astype(np.int64).astype(np.uint64) + _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)))


def token_rewards(token_id_T: ArrayLike) -> Float64:
    """Reward of every token: 1 where its hash has the lowest bit set, else 0.

    About half of any vocabulary has it, frequent and rare tokens alike, so the reward is neither a length nor a
    confidence in disguise.

    Args:
        token_id_T: token ids.

    Returns:
        (T,) float64, 0 or 1 [reward].

    Source: ours.

    Example:
        >>> token_rewards([0, 1, 2, 3, 4, 5, 6, 7]).tolist()
        [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """
    return (splitmix64(token_id_T) & np.uint64(1)).astype(np.float64)


def sequence_rewards(token_id_T: ArrayLike, row_T: ArrayLike, n_sequences: int) -> Float64:
    """Reward of every sequence: the mean reward of its response tokens.

    Args:
        token_id_T: ids of response tokens, rows in any order.
        row_T: 0 .. S-1, the sequence of every token.
        n_sequences: S.

    Returns:
        (S,) rewards in [0, 1]; NaN for a sequence without a token.
    """
    row_T = np.asarray(row_T, dtype=np.intp)
    n_S = np.bincount(row_T, minlength=n_sequences)
    sum_S = np.bincount(row_T, weights=token_rewards(token_id_T), minlength=n_sequences)
    return np.asarray(sum_S / np.where(n_S, n_S, np.nan))


def grpo_advantages(reward_S: ArrayLike, prompt_id_S: NDArray[Any]) -> Float64:
    """Group-relative advantage of every sequence.

    With two samples or more of a prompt: (r - mean) / std over the prompt's samples, std with ddof = 1 (torch.std, as
    TRL and verl take it) and nothing added to it. A prompt with a single sample has no group: its baseline is the mean
    reward of all other prompts' sequences, its scale the std (ddof = 1) of all sequences.

    Args:
        reward_S: reward of every sequence; NaN = no reward, advantage 0.
        prompt_id_S: its prompt.

    Returns:
        (S,) advantages [1]; 0 where the group (or the batch) has no spread.

    Raises:
        MoediagError: the arrays differ in length.

    Source: GRPO (arXiv 2402.03300), equation for outcome supervision; the single-sample baseline is RLOO's.

    Example:
        >>> grpo_advantages([0.0, 1.0, 3.0, 3.0], np.array([7, 7, 8, 8])).round(4).tolist()
        [-0.7071, 0.7071, 0.0, 0.0]
    """
    reward_S, prompt_id_S = np.asarray(reward_S, dtype=np.float64), np.asarray(prompt_id_S)
    if reward_S.shape != prompt_id_S.shape or reward_S.ndim != 1:
        raise MoediagError(f"grpo_advantages needs one prompt per reward, found {reward_S.shape}, {prompt_id_S.shape}")
    has_S = np.isfinite(reward_S)
    advantage_S = np.zeros(len(reward_S))
    if has_S.any():
        _, row_S = np.unique(prompt_id_S[has_S], return_inverse=True)
        advantage_S[has_S] = _advantages(reward_S[has_S], row_S)
    return advantage_S


def _advantages(reward_S: Float64, row_S: NDArray[np.intp]) -> Float64:
    n_C, sum_C = np.bincount(row_S), np.bincount(row_S, weights=reward_S)
    centred_S = reward_S - (sum_C / n_C)[row_S]
    variance_C = np.bincount(row_S, weights=np.square(centred_S)) / np.maximum(n_C - 1, 1)
    is_single_S = n_C[row_S] == 1
    n_others = len(reward_S) - 1
    if n_others:
        others_S = (reward_S.sum() - reward_S) / n_others
        centred_S = np.where(is_single_S, reward_S - others_S, centred_S)
    scale_S = np.where(is_single_S, reward_S.std(ddof=1) if n_others else 0.0, np.sqrt(variance_C)[row_S])
    # rewards that are equal leave a std of rounding size: that is no spread
    is_spread_S = scale_S > 1e-12 * max(1.0, float(np.abs(reward_S).max()))
    return np.asarray(np.where(is_spread_S, centred_S / np.where(is_spread_S, scale_S, 1.0), 0.0))
