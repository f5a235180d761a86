"""How vLLM gets the score of a token: sampling it, prefilling it, or decoding it with the choice forced.

Forced decoding runs the decode path on recorded tokens: a logits processor leaves the sampler no other choice, and
the log-probabilities are those before it (``raw_logprobs``). Tokens and scores of a sampled run come back bit for bit
where the engine repeats itself; where they do not, that is the engine's own floor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from moediag.errors import CaptureError, EngineError
from moediag.run.capture import TokenRows
from moediag.run.recipes import PREFILL, SAMPLED
from moediag.run.vocabulary import VocabRows

_FORCED = "moediag_forced_token_ids"
DISTRIBUTIONS = ("vocab_request_N", "vocab_position_N", "vocab_logps_NV")
"""Whole next-token distributions among a worker's rows: whose, after which position, and log-probabilities."""


@dataclass
class Response:
    """What vLLM has given for one request so far: token ids and, per token, a map id -> logprob."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    routed_experts: NDArray[Any] | None = None
    is_finished: bool = False

    def add(self, output: Any) -> None:
        """Take one step's delta."""
        delta = output.outputs[0]
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = list(output.prompt_logprobs or self.prompt_logprobs)
        if getattr(delta, "routed_experts", None) is not None:
            self.routed_experts = delta.routed_experts
        self.is_finished = bool(output.finished)


@dataclass(frozen=True)
class Sequence:
    """One sequence to sample or to score; ``response`` is empty where it is to be sampled."""

    prompt: list[int]
    response: list[int]

    def submitted(self, path: str) -> list[int]:
        """The prompt that vLLM is given."""
        return [*self.prompt, *self.response] if path == PREFILL else self.prompt

    def n_to_come(self, path: str, max_tokens: int) -> int:
        """Tokens that vLLM may give back."""
        return {PREFILL: 1, SAMPLED: max_tokens}.get(path, len(self.response))


def sampling_parameters(path: str, sequence: Sequence, sampling: dict[str, Any], is_v2: bool, **extra: Any) -> Any:
    """vLLM's SamplingParams for one sequence.

    Args:
        path: how the scores come about.
        sampling: the run's sampling parameters, by vLLM's own names; only a sampled path uses them.
        extra: further parameters (seed, skip_reading_prefix_cache).

    Raises:
        EngineError: this vLLM's V2 runner cannot be given its tokens.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if path == PREFILL:
        return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, **extra)
    if is_v2 and path != SAMPLED and not _has_trace():
        raise EngineError(
            "vLLM's V2 model runner cannot decode given tokens before 0.30; set VLLM_USE_V2_MODEL_RUNNER=0, or give "
            "--observer hooks"
        )
    common = {"n": 1, "logprobs": 0, "output_kind": RequestOutputKind.DELTA, "detokenize": False, **extra}
    if path == SAMPLED:
        return SamplingParams(**common, **sampling)
    forced: dict[str, Any] = (
        {"trace_decode_token_ids": sequence.response} if is_v2 else {"extra_args": {_FORCED: sequence.response}}
    )
    return SamplingParams(**common, temperature=0.0, max_tokens=len(sequence.response), ignore_eos=True, **forced)


def forcing_options(is_v2: bool) -> dict[str, Any]:
    """vLLM options that forced decoding needs: the V2 runner has it built in, since 0.30."""
    if is_v2:
        return {"enable_trace_replay": True} if _has_trace() else {}
    return {"logits_processors": [ForcedTokens]}


def _has_trace() -> bool:
    from vllm import SamplingParams

    return "trace_decode_token_ids" in SamplingParams.__struct_fields__


class ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Leaves each request that carries recorded tokens no choice but the next of them."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """False: greedy sampling must see the change."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the runner's batch: removed, then added, then moved, as vLLM asks."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._requests.pop(index, None)
        for index, parameters, _, generated in batch_update.added:
            forced = (parameters.extra_args or {}).get(_FORCED)
            self._requests.pop(index, None)
            if forced is not None:
                self._requests[index] = (forced, generated)  # ``generated`` grows as the request does
        for source, target, direction in batch_update.moved:
            moved, displaced = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved is not None:
                self._requests[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self._requests[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Everything but the recorded next token becomes impossible."""
        for index, (forced, generated) in self._requests.items():
            if len(generated) < len(forced):  # else a step whose token is thrown away (prefill in chunks)
                token = forced[len(generated)]
                kept = logits[index, token].clone()
                logits[index] = -torch.inf
                logits[index, token] = kept
        return logits


def logps(tokens: TokenRows, responses: list[Response], path: str) -> NDArray[np.float32]:
    """Log-probability of every response token, taken by token id; NaN on prompt rows.

    Raises:
        CaptureError: vLLM gave back other tokens, or another number of them, than the table holds.
    """
    logp_T = np.full(len(tokens), np.nan, dtype=np.float32)
    for (start, end), response in zip(tokens.sequence_bounds(), responses, strict=True):
        is_response = tokens.is_response_T[start:end]
        first = start + int(np.argmax(is_response)) if is_response.any() else end
        entries = response.prompt_logprobs[first - start : end - start] if path == PREFILL else response.logprobs
        ids = tokens.token_id_T[first:end].tolist()
        if len(entries) != end - first or (path != PREFILL and response.token_ids != ids):
            raise CaptureError(
                f"vLLM gave {len(entries)} log-probabilities for the {end - first} response tokens of sequence "
                f"{tokens.seq_id_T[start]}, or for other tokens; nothing was stored"
            )
        logp_T[first:end] = [entry[token].logprob for entry, token in zip(entries, ids, strict=True)]
    return logp_T


def entropies(tokens: TokenRows, entropy: NDArray[Any], request_seq_ids: list[int]) -> NDArray[np.float32]:
    """Entropy behind every token that was decoded: the distribution after position p belongs to the token at p + 1."""
    entropy_T = np.full(len(tokens), np.nan, dtype=np.float32)
    start_of = {int(tokens.seq_id_T[start]): (start, end) for start, end in tokens.sequence_bounds()}
    for request, position, value in entropy.tolist():
        start, end = start_of[request_seq_ids[int(request)]]
        row = start + int(position) + 1
        # the first value stays: preemption samples again only what it has to recompute
        if row < end and tokens.is_response_T[row] and np.isnan(entropy_T[row]):
            entropy_T[row] = value
    return entropy_T


def distributions(
    tokens: TokenRows,
    rows: dict[str, NDArray[Any]],
    request_seq_ids: list[int],
    chosen: NDArray[np.int64],
    n_vocabulary: int,
) -> VocabRows:
    """Distributions behind the response tokens of the chosen sequences: that after position p is the token's at p + 1.

    Args:
        rows: :data:`DISTRIBUTIONS` as the worker gave them, in the order of its steps; of a row that preemption made
            compute again the first stays, the one that was sampled from.
    """
    vocab = VocabRows(tokens, chosen, n_vocabulary)
    if not rows:
        return vocab
    seq_N = np.array(request_seq_ids, dtype=np.int64)[rows["vocab_request_N"]]
    start_S = np.array([start for start, _ in tokens.sequence_bounds()], dtype=np.int64)
    row_N = start_S[np.searchsorted(tokens.seq_id_T[start_S], seq_N)] + rows["vocab_position_N"] + 1
    is_own_N = row_N < len(tokens)  # vLLM samples a token behind what it prefills
    is_own_N[is_own_N] = tokens.seq_id_T[row_N[is_own_N]] == seq_N[is_own_N]
    is_own_N[is_own_N] = vocab.wants(row_N[is_own_N])
    vocab.add(row_N[is_own_N], rows["vocab_logps_NV"][is_own_N])
    return vocab
