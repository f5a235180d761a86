"""Whole next-token distributions of some sequences: which sequences, and their rows as bytes and in memory.

Invariants:
    - the sequences are a function of the run's configuration alone, spread evenly over them, so that every arm, every
      worker and every resumed capture keeps the same ones, of as many prompts as there can be;
    - a row holds float32 log-probabilities [nat] of the whole vocabulary behind one scored response token: the
      distribution that the token's ``logp_T`` is read from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import safetensors
from numpy.typing import NDArray

from moediag.errors import CaptureError, CorruptRunError
from moediag.run.capture import Float32, Int64, Shard, TokenRows

ROUNDING: Final = 1e-4
"""How far [nat] a float32 log-softmax may be from normalised: over 2^18 tokens its own rounding is about 2e-5."""

_DTYPES: Final = {"row_N": ("I64", np.int64, 1), "logps_NV": ("F32", np.float32, 2)}


@dataclass(frozen=True)
class VocabLogps:
    """Next-token distributions behind N response tokens of a shard.

    Args:
        row_N: row of the token scored in the shard's token table, ascending; the distribution is the one given the
            tokens before it.
        logps_NV: log-probability of every token of the vocabulary [nat]; -inf where the model rules a token out.
    """

    row_N: Int64
    logps_NV: Float32

    def __len__(self) -> int:
        return len(self.row_N)

    def flaw(self, tokens: TokenRows, logp_T: Float32, sequences: Int64) -> str:
        """What keeps the rows from being the distributions that ``logp_T`` comes from; empty when nothing does.

        Args:
            tokens: the shard's token table.
            logp_T: the arm's log-probabilities of its tokens.
            sequences: sequence ids whose responses should be there.
        """
        expected_N = response_rows(tokens, sequences)
        if not np.array_equal(self.row_N, expected_N):
            return (
                f"distributions of {len(self)} tokens, expected those of the {len(expected_N)} chosen response tokens"
            )
        token_N = tokens.token_id_T[self.row_N]
        if self.logps_NV.ndim != 2 or token_N.max(initial=-1) >= self.logps_NV.shape[1]:
            return f"distributions of shape {self.logps_NV.shape} do not reach token id {token_N.max(initial=-1)}"
        # NaN compares false: what is not a number is not within rounding either
        is_normal_N = np.abs(log_normaliser(self.logps_NV)) <= ROUNDING
        if not is_normal_N.all():
            return f"{np.sum(~is_normal_N)} of {len(self)} distributions do not sum to 1"
        off_N = np.abs(self.logps_NV[np.arange(len(self)), token_N].astype(np.float64) - logp_T[self.row_N])
        is_same_N = off_N <= ROUNDING
        if not is_same_N.all():
            return f"{np.sum(~is_same_N)} of {len(self)} distributions give their token another logp than is stored"
        return ""


class VocabRows:
    """Distributions of a shard while an engine gives them, row by row and in any order."""

    def __init__(self, tokens: TokenRows, sequences: Int64, n_vocabulary: int) -> None:
        self.row_N = response_rows(tokens, sequences)
        self.logps_NV = np.full((len(self.row_N), n_vocabulary), np.nan, dtype=np.float32)
        self._is_there_N = np.zeros(len(self.row_N), dtype=bool)

    def __len__(self) -> int:
        return len(self.row_N)

    def wants(self, row_M: Int64) -> NDArray[np.bool_]:
        """Which of these token rows are kept."""
        return np.isin(row_M, self.row_N)

    def add(self, row_M: Int64, logps_MV: NDArray[Any]) -> None:
        """Take the distributions behind token rows that :meth:`wants` them; of a row given twice the first stays.

        Raises:
            CaptureError: they are not as wide as the vocabulary that config.json names.
        """
        if logps_MV.shape[1:] != self.logps_NV.shape[1:]:
            raise CaptureError(
                f"the engine gives distributions over {logps_MV.shape[1]} tokens, config.json's vocab_size is "
                f"{self.logps_NV.shape[1]}; capture with --full-vocab 0"
            )
        place_M = np.searchsorted(self.row_N, row_M)
        # reversed, so that of a row that is there twice the first is written last
        is_new_M = ~self._is_there_N[place_M]
        new_M = place_M[is_new_M][::-1]
        self.logps_NV[new_M] = logps_MV[is_new_M][::-1]
        self._is_there_N[new_M] = True

    def whole(self, tokens: TokenRows, logp_T: Float32, sequences: Int64) -> VocabLogps:
        """All of them.

        Raises:
            CaptureError: a row is missing, or is not the distribution that the token's logp comes from.
        """
        vocab = VocabLogps(self.row_N, self.logps_NV)
        flaw = vocab.flaw(tokens, logp_T, sequences)
        if not self._is_there_N.all() or flaw:
            n_missing = int(np.sum(~self._is_there_N))
            what = f"{n_missing} of {len(vocab)} distributions were never seen" if n_missing else flaw
            raise CaptureError(f"full vocabulary: {what}; nothing was stored; capture with --full-vocab 0")
        return vocab


def chosen_in(shard: Shard, n_chosen: int, n_sequences: int) -> range:
    """Which of the chosen sequences, counted from 0, lie in a shard.

    The i-th chosen sequence is number ``i * n_sequences // n_chosen``: evenly spread, hence of different prompts while
    there are enough. Worked out without listing them: a damaged shard table may claim more than any memory holds.

    Example:
        >>> [list(chosen_in(Shard(i, 4 * i, 4), 3, 12)) for i in range(3)]
        [[0], [1], [2]]
    """
    ends = shard.first_sequence, shard.first_sequence + shard.n_sequences
    first, end = (-(-sequence * n_chosen // n_sequences) if n_sequences else 0 for sequence in ends)
    return range(first, end)


def response_rows(tokens: TokenRows, sequences: Int64) -> Int64:
    """Rows of the response tokens of some sequences."""
    return np.flatnonzero(tokens.is_response_T & np.isin(tokens.seq_id_T, sequences)).astype(np.int64)


def log_normaliser(logps_NV: NDArray[Any]) -> NDArray[np.float64]:
    """log sum exp of every row in float64 [nat]; 0 = normalised. Row by row: float64 of all would not fit."""
    return np.array([np.log(np.exp(row_V.astype(np.float64)).sum()) for row_V in logps_NV], dtype=np.float64)


def encode_vocab(vocab: VocabLogps) -> bytes:
    """Serialise as safetensors."""
    arrays = {name: np.ascontiguousarray(getattr(vocab, name), dtype) for name, (_, dtype, _) in _DTYPES.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    return bytes(safetensors.serialize(specs, metadata={"format": "moediag vocabulary"}))


def decode_vocab(data: bytes, where: str) -> VocabLogps:
    """Read what :func:`encode_vocab` wrote.

    Raises:
        CorruptRunError: not such a file.
    """
    try:
        tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptRunError(f"{where} is not a safetensors file ({error}); capture that shard again") from None
    found = {name: (tensor["dtype"], len(tensor["shape"])) for name, tensor in tensors.items()}
    if found != {name: (dtype, n) for name, (dtype, _, n) in _DTYPES.items()}:
        raise CorruptRunError(f"{where} does not hold row_N and logps_NV ({found}); capture that shard again")
    arrays = {
        name: np.frombuffer(tensors[name]["data"], dtype=dtype).reshape(tensors[name]["shape"])
        for name, (_, dtype, _) in _DTYPES.items()
    }
    vocab = VocabLogps(**arrays)
    if len(vocab.row_N) != len(vocab.logps_NV):
        raise CorruptRunError(f"{where} has {len(vocab.logps_NV)} distributions for {len(vocab.row_N)} rows")
    return vocab
