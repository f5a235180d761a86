"""Gradients of the output head in closed form: sum_t c_t (e_{y_t} - pi_t) h_t^T, for any vocabulary.

Invariants:
    - the vocabulary is taken in pieces, so V x H matrices of many prompts never exist; inner products of gradients are
      sums over the pieces, in float64;
    - pi_t comes from the same linear map in the model's own dtype, as the arm's log-probabilities do.

With tied embeddings only the head's part of the matrix's gradient is meant: what reaches it through the
embeddings is not in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moediag.audit.batch import SequenceBasis
from moediag.corrections import weights
from moediag.corrections.sources import token_rewards
from moediag.errors import CheckpointError

Float64 = NDArray[np.float64]
Progress = Callable[[int, int], None]

_PREFIXES = 64
"""Prefixes whose distributions are held at a time in float64."""


@dataclass(frozen=True)
class Head:
    """The output head and what goes into it.

    Args:
        weight_VH: its matrix.
        bias_V: its bias, or None.
        hidden_TH: its inputs behind every scored token, in the model's dtype.
        log_norm_T: logsumexp of their logits [nat].
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    hidden_TH: torch.Tensor
    log_norm_T: torch.Tensor

    def pieces(self, n_vectors: int, max_bytes: int) -> Iterator[slice]:
        """Ranges of the vocabulary such that ``n_vectors`` gradients of a piece fit into ``max_bytes``."""
        n_vocabulary, n_hidden = self.weight_VH.shape
        bytes_per_token = 12 * n_vectors * n_hidden + 8 * len(self.hidden_TH)  # float32, and float64 for the products
        step = max(1, min(n_vocabulary, max_bytes // max(bytes_per_token, 1)))
        return (slice(first, min(first + step, n_vocabulary)) for first in range(0, n_vocabulary, step))

    def probabilities(self, rows: slice, piece: slice) -> torch.Tensor:
        """pi of a piece of the vocabulary behind the scored tokens ``rows``, float32."""
        bias = None if self.bias_V is None else self.bias_V[piece]
        logits = torch.nn.functional.linear(self.hidden_TH[rows], self.weight_VH[piece], bias).float()
        return (logits - self.log_norm_T[rows, None]).exp()


def head_of(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output head's matrix and bias.

    Raises:
        CheckpointError: the model has none.
    """
    module = model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise CheckpointError(f"{type(model).__name__} has no output head with a weight; leave lm_head out")
    return module.weight, getattr(module, "bias", None)


def is_plain(model: Any, hidden_TH: torch.Tensor, logits_TV: torch.Tensor) -> bool:
    """True when the logits are what the head's linear map gives: not scaled, not soft-capped afterwards."""
    weight_VH, bias_V = head_of(model)
    linear_TV = torch.nn.functional.linear(hidden_TH, weight_VH, bias_V).float()
    far = 4 * torch.finfo(hidden_TH.dtype).eps * float(linear_TV.abs().max())  # other shapes round otherwise
    return linear_TV.shape == logits_TV.shape and float((linear_TV - logits_TV.float()).abs().max()) <= far


def sampled_gram(
    head: Head,
    token_id_T: torch.Tensor,
    bounds_S: tuple[tuple[int, int], ...],
    bases: list[SequenceBasis],
    max_bytes: int,
    on_done: Progress,
) -> Float64:
    """Inner products of the head's gradients in all directions of all sequences.

    Args:
        token_id_T: the sampled tokens.
        bounds_S, bases: tokens and directions of every sequence.
        max_bytes: memory for the gradients of one piece of the vocabulary.
        on_done: told tokens of the vocabulary done, of how many.

    Returns:
        (B, B) float64; B = ranks of all sequences, one after the other.
    """
    n_vectors = sum(len(basis.basis_RT) for basis in bases)
    gram_BB = np.zeros((n_vectors, n_vectors))
    for piece in head.pieces(n_vectors, max_bytes):
        parts = []
        for (start, end), basis in zip(bounds_S, bases, strict=True):
            hidden_TH = head.hidden_TH[start:end].float()
            error_TC = -head.probabilities(slice(start, end), piece)
            token_T = token_id_T[start:end] - piece.start
            (row,) = torch.nonzero((token_T >= 0) & (token_T < error_TC.shape[1]), as_tuple=True)
            error_TC[row, token_T[row]] += 1
            basis_RT = torch.from_numpy(basis.basis_RT).to(error_TC)
            parts.append(torch.einsum("rt,tc,th->rch", basis_RT, error_TC, hidden_TH).flatten(1))
        gram_BB += _products(torch.cat(parts))
        on_done(piece.stop, len(head.weight_VH))
    return gram_BB


@dataclass(frozen=True)
class Prefixes:
    """Both full next-token distributions behind N of the scored tokens of one sequence.

    Args:
        prompt: row of the prompt, 0 .. C-1.
        token_N: places of the tokens among all scored ones.
        logp_infer_NV: infer's log-probabilities of the vocabulary [nat].
        factor: what every prefix counts, 1 / length of the response.
    """

    prompt: int
    token_N: NDArray[np.intp]
    logp_infer_NV: NDArray[np.float32]
    factor: float


def expected_gram(
    head: Head, prefixes: list[Prefixes], methods: tuple[str, ...], max_bytes: int, on_done: Progress
) -> Float64:
    """Inner products of every method's *expected* head gradient by prompt: no sampling noise is left in it.

    Args:
        methods: corrections that look at one token at a time; the exact gradient stands behind them.

    Returns:
        (C * (M + 1), same) float64, prompts outside, methods inside, the exact gradient last of every prompt.
    """
    n_prompts, n_methods = 1 + max(one.prompt for one in prefixes), len(methods) + 1
    n_vocabulary, n_hidden = head.weight_VH.shape
    gram = np.zeros((n_prompts * n_methods, n_prompts * n_methods))
    for piece in head.pieces(n_prompts * n_methods, max_bytes):
        total = torch.zeros(
            n_prompts, n_methods, piece.stop - piece.start, n_hidden, device=head.hidden_TH.device, dtype=torch.float32
        )
        for one in prefixes:
            for first in range(0, len(one.token_N), _PREFIXES):
                part = slice(first, first + _PREFIXES)
                token_N = torch.from_numpy(one.token_N[part])
                train_NV = head_log_probs(head, token_N)[:, :n_vocabulary]
                update_MNV = expected_updates(methods, train_NV, one.logp_infer_NV[part]) * one.factor
                update_MNC = torch.from_numpy(update_MNV[:, :, piece]).to(total)
                total[one.prompt] += torch.einsum("mnc,nh->mch", update_MNC, head.hidden_TH[token_N].float())
        gram += _products(total.flatten(0, 1).flatten(1))
        on_done(piece.stop, n_vocabulary)
    return gram


def head_log_probs(head: Head, token_N: torch.Tensor) -> NDArray[np.float32]:
    """Train's full log-probabilities [nat] behind some of the scored tokens."""
    logits_NV = torch.nn.functional.linear(head.hidden_TH[token_N], head.weight_VH, head.bias_V).float()
    return torch.log_softmax(logits_NV, dim=-1).cpu().numpy()


def expected_updates(methods: tuple[str, ...], logp_train_NV: Any, logp_infer_NV: Any) -> Float64:
    """Expected gradient with respect to the logits at every prefix, under infer's sampling: of each method, then exact.

    A correction's is E_infer[w(a) (r(a) - b) (e_a - pi_train)], w(a) taken for every token a of the vocabulary, with
    b = E_infer[r], what a group's mean estimates; the exact one is E_train[(r(a) - V) e_a], V = E_train[r].

    Args:
        logp_train_NV, logp_infer_NV: both distributions at N prefixes [nat].

    Returns:
        (M + 1, N, V) [reward]; the exact gradient last. Rows of each sum to 0 over the vocabulary.

    Source: ours; the policy gradient theorem for one step (Sutton et al. 2000) with token-level rewards.
    """
    logp_train_NV, logp_infer_NV = (np.asarray(x, dtype=np.float64) for x in (logp_train_NV, logp_infer_NV))
    n_prefixes, n_vocabulary = logp_train_NV.shape
    p_train_NV, p_infer_NV = np.exp(logp_train_NV), np.exp(logp_infer_NV)
    reward_V = token_rewards(np.arange(n_vocabulary))
    gain_NV = reward_V - (p_infer_NV @ reward_V / p_infer_NV.sum(1))[:, None]
    place = np.arange(n_prefixes * n_vocabulary)  # a token is a sequence of its own: nothing is summed over sequences
    flat = logp_train_NV.ravel(), logp_infer_NV.ravel(), place
    parts = []
    for method in methods:
        weight_NV = weights(method, *flat, advantage=gain_NV.ravel()).reshape(n_prefixes, n_vocabulary)
        push_NV = p_infer_NV * weight_NV * gain_NV
        parts.append(push_NV - p_train_NV * push_NV.sum(1, keepdims=True))
    value_N = p_train_NV @ reward_V / p_train_NV.sum(1)
    return np.stack([*parts, p_train_NV * (reward_V - value_N[:, None])])


def _products(vectors_BX: torch.Tensor) -> Float64:
    """Inner products in float64: differences between methods are small against the gradients themselves."""
    exact_BX = vectors_BX.double()
    products: Float64 = (exact_BX @ exact_BX.T).cpu().numpy()
    return products
