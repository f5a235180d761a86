"""Arms decoded by transformers' own ``generate``, with a KV cache: it samples responses, or decodes given ones again.

Which engine samples is not what makes an arm infer: beside the train arm of the same engine this one shows what
decoding with a cache does to the numbers, without another engine's kernels, and it needs no vLLM.

Invariants:
    - one unpadded sequence at a time, each with a seed of its own: no sequence enters another's arithmetic, and a
      resumed capture equals an undisturbed one;
    - log-probabilities are the log-softmax of the raw logits, before temperature and truncation, as the train arm's;
    - given tokens run through the same code as sampled ones, with the choice forced;
    - the checkpoint's generation_config.json says which tokens end a response, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moediag.engines.arms import ArmRequest
from moediag.engines.assemble import capture_of, order_rows, token_rows
from moediag.engines.hf.engine import TrainEngine, fill_arm, float_dtypes, refuse_missing_input, to_numpy
from moediag.engines.hf.taps import RoutingTaps
from moediag.engines.plan import known_sampling, load_prompt_tokens
from moediag.engines.process import Held, OnDone, Reporter, seed_of
from moediag.run.capture import Shard, TokenRows
from moediag.run.recipes import SAMPLED
from moediag.run.vocabulary import VocabRows
from moediag.run.writer import RunWriter


def capture_generate(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Fill the missing shards of an arm that transformers decodes.

    Args:
        options: as for :func:`moediag.engines.vllm.engine.capture_infer`.

    Raises:
        IncompleteRunError: the tokens to decode again are not there yet.
        CaptureError: a layer never fired; nothing of that shard is stored.
    """
    request = ArmRequest(**options["request"])
    missing = writer.own_missing_shards(request.arm)
    if request.path != SAMPLED:
        refuse_missing_input(writer.run, missing)
    if missing:
        fill_arm(GenerateEngine, writer, options, reporter, held)


class GenerateEngine(TrainEngine):
    """One decoded arm on a transformers model, with its taps."""

    has_cache = True

    def __init__(self, writer: RunWriter, model: Any, request: ArmRequest, routing: dict[str, Any] | None) -> None:
        super().__init__(writer, model, request, routing)
        self.prompts = load_prompt_tokens(self.run)
        self.sampling = known_sampling(self.run)
        self.n_vocabulary: int = model.config.get_text_config().vocab_size

    def facts(self) -> dict[str, Any]:
        """How this arm's scores come about."""
        config = self._config(len(self.prompts[0][2]), None if self.request.path == SAMPLED else [0])
        return {
            "batching": "one unpadded sequence at a time, with a KV cache",
            "sampling": {**config.to_diff_dict(), "max_new_tokens": self.sampling.get("max_tokens")},
            "seeding": "per sequence",
        }

    def capture_shard(self, shard: Shard, on_done: OnDone) -> None:
        """Sample or decode one shard's sequences and commit the arrays, and the tokens where they were sampled."""
        started = time.monotonic()
        is_sampled = self.request.path == SAMPLED
        given = None if is_sampled else self.run.tokens(shard)
        chosen = self.run.vocab_sequences(self.request.arm, shard)
        bounds = given.sequence_bounds() if given is not None else [(0, 0)] * shard.n_sequences
        decoded = []
        for seq_id, (start, end) in zip(shard.seq_ids, bounds, strict=True):
            prompt, response = self.prompts[seq_id][2], None
            if given is not None:
                ids, is_response = given.token_id_T[start:end], given.is_response_T[start:end]
                prompt, response = ids[~is_response].tolist(), ids[is_response].tolist()
            decoded.append(self.decode(seq_id, prompt, response, keeps_distributions=seq_id in chosen))
            on_done(len(decoded))
        sampled = [(*self.prompts[i][:3], one.response) for i, one in zip(shard.seq_ids, decoded, strict=True)]
        tokens = token_rows(shard.seq_ids, sampled) if given is None else given
        self._store(shard, tokens, decoded, chosen, round(time.monotonic() - started, 3))
        if is_sampled:  # tokens last: other arms take a shard up once its tokens are committed
            self.writer.write_tokens(shard, tokens)

    def decode(self, seq_id: int, prompt: list[int], response: list[int] | None, keeps_distributions: bool) -> Decoded:
        """Decode one sequence.

        Args:
            response: its tokens; None to sample them.
        """
        decoded = Decoded(len(prompt), keeps_distributions)
        processors = LogitsProcessorList([] if response is None else [_Forced(len(prompt), response)])
        prompt_1T = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(seed_of(f"{self.sampling.get('seed')}:sequence:{seq_id}"))
        taps = RoutingTaps(self.model, self.spec, self.level) if self.spec else None
        with torch.inference_mode(), _no_other_defaults(self.model), taps or nullcontext():
            handle = self.model.register_forward_hook(decoded.after_forward(taps), with_kwargs=True)
            try:
                ids_1T = self.model.generate(
                    prompt_1T,
                    attention_mask=torch.ones_like(prompt_1T),
                    generation_config=self._config(len(prompt), response),
                    logits_processor=processors,
                )
            finally:
                handle.remove()
        decoded.end(ids_1T[0].tolist())
        return decoded

    def _config(self, n_prompt: int, response: list[int] | None) -> GenerationConfig:
        if response is not None:
            return GenerationConfig(do_sample=False, max_new_tokens=len(response), use_cache=True)
        sampling = self.sampling
        ends = [] if sampling["ignore_eos"] else _listed(self.model.generation_config.eos_token_id)
        ends = sorted({*ends, *sampling.get("stop_token_ids", ())})
        longest = self.model.config.get_text_config().max_position_embeddings
        max_new_tokens = min(sampling["max_tokens"], longest - n_prompt)
        common = {"max_new_tokens": max_new_tokens, "use_cache": True, "eos_token_id": ends or None}
        if not sampling["temperature"]:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=max(sampling["top_k"], 0),
            min_p=sampling["min_p"] or None,
            **common,
        )

    def _store(
        self, shard: Shard, tokens: TokenRows, decoded: list[Decoded], chosen: NDArray[np.int64], seconds: float
    ) -> None:
        logp_T, entropy_T = np.full((2, len(tokens)), np.nan, dtype=np.float32)
        logp_T[tokens.is_response_T] = [logp for one in decoded for logp in one.logp]
        entropy_T[tokens.is_response_T] = [entropy for one in decoded for entropy in one.entropy]
        routing, dtypes = {}, {}
        if self.spec:
            rows = {name: torch.cat([one.rows(name) for one in decoded]) for name in decoded[0].routing[0]}
            lengths = [len(one.consumed) for one in decoded]
            whose = {
                "request_T": np.repeat(np.arange(len(decoded)), lengths),
                "position_T": np.concatenate([one.position for one in decoded]),
                "token_id_T": np.concatenate([one.consumed for one in decoded]),
            }
            arrays = {name: to_numpy(tensor) for name, tensor in rows.items()}
            routing = order_rows(tokens, {**whose, **arrays}, list(shard.seq_ids), needs_last_row=False)
            dtypes = float_dtypes(rows)
        vocab = VocabRows(tokens, chosen, self.n_vocabulary)
        if len(chosen):
            vocab.add(vocab.row_N, np.concatenate([row for one in decoded for row in one.distributions]))
        capture = capture_of(logp_T, entropy_T, routing)
        whole = vocab.whole(tokens, capture.logp_T, chosen) if len(chosen) else None
        self.writer.write_capture(self.request.arm, shard, tokens, capture, {"seconds": seconds}, dtypes, whole)


class Decoded:
    """What the forwards of one sequence's decoding gave.

    Args:
        n_prompt: tokens of its prompt.
        keeps_distributions: keep the whole distribution behind every response token.

    Attributes:
        response: token ids; ``logp`` and ``entropy`` [nat] of each.
        consumed, position: token ids and positions that the model received: all but the last token's.
        routing: the taps' arrays, a part per forward.
        distributions: (1, V) log-probabilities behind each response token.
    """

    def __init__(self, n_prompt: int, keeps_distributions: bool) -> None:
        self.n_prompt, self.keeps_distributions = n_prompt, keeps_distributions
        self.response: list[int] = []
        self.logp: list[float] = []
        self.entropy: list[float] = []
        self.consumed: list[int] = []
        self.position: list[int] = []
        self.routing: list[dict[str, torch.Tensor]] = []
        self.distributions: list[NDArray[np.generic]] = []
        self._log_probs_V: torch.Tensor | None = None

    def after_forward(self, taps: RoutingTaps | None) -> Any:
        """A forward hook of the model that takes its rows."""

        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ids = kwargs["input_ids"][0].tolist()
            if self._log_probs_V is not None:
                self._score(ids[0])
            positions = kwargs.get("position_ids")
            first = len(self.consumed)
            self.position += list(range(first, first + len(ids))) if positions is None else positions[0].tolist()
            self.consumed += ids
            if taps is not None:
                self.routing.append(taps.take(torch.arange(len(ids))))
            self._log_probs_V = torch.log_softmax(output.logits[0, -1].float(), dim=-1)

        return hook

    def end(self, ids: list[int]) -> None:
        """Take the whole sequence, as ``generate`` returned it."""
        self._score(ids[-1])
        self.response = ids[self.n_prompt :]

    def rows(self, name: str) -> torch.Tensor:
        """One of the taps' arrays, a row for each token consumed."""
        return torch.cat([part[name] for part in self.routing])

    def _score(self, token: int) -> None:
        log_probs_V = self._log_probs_V
        assert log_probs_V is not None
        self.logp.append(float(log_probs_V[token]))
        self.entropy.append(float(torch.special.entr(log_probs_V.exp()).sum()))
        if self.keeps_distributions:
            self.distributions.append(to_numpy(log_probs_V[None].cpu()))


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Leaves generate no choice but the next of the given tokens."""

    def __init__(self, n_prompt: int, response: list[int]) -> None:
        self.n_prompt, self.response = n_prompt, response

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.response[input_ids.shape[1] - self.n_prompt]] = 0
        return forced


@contextmanager
def _no_other_defaults(model: Any) -> Iterator[None]:
    """Without the checkpoint's generation_config: ``generate`` fills up from it what it is not given."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _listed(token: int | list[int] | None) -> list[int]:
    return [] if token is None else token if isinstance(token, list) else [token]
