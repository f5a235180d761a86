"""One transformers model whose gradients are taken: hidden states, closed-form head, autograd groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from moediag.analysis.gradients import LM_HEAD
from moediag.audit.batch import AuditTokens, SequenceBasis, audit_tokens, is_token_level
from moediag.audit.gradients import RECORD, WORDS, GradientRequest, train_arm_options
from moediag.audit.groups import AUTOGRAD_GROUPS, affordable, autograd_grams, parameters_of, pieces
from moediag.audit.head import Head, Prefixes, expected_gram, head_of, is_plain, sampled_gram
from moediag.engines.hf.engine import held_model
from moediag.engines.process import Held, Reporter
from moediag.engines.versions import numeric_versions
from moediag.run.derived import GRAMS
from moediag.run.files import sha256_bytes, write_atomic, write_sealed
from moediag.run.reader import Run

NO_VOCABULARY: Final = (
    "infer's full next-token distributions were not captured: no exact reference (capture with --full-vocab)"
)

Float64 = NDArray[np.float64]


class GradientEngine:
    """The train arm's model, and inner products of its gradients."""

    def __init__(self, run: Run, checkpoint: str, request: GradientRequest, reporter: Reporter, held: Held) -> None:
        self.run, self.request, self.reporter = run, request, reporter
        self.options = train_arm_options(run, request)
        self.tokens = audit_tokens(run, (request.train, request.infer), request.methods, request.n_sequences)
        self.bases = [self.tokens.basis(s) for s in range(len(self.tokens.seq_id_S))]
        self.model = held_model(held, checkpoint, self.options, reporter).requires_grad_(False)
        self.rows = _sequence_rows(run, self.tokens)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.left_out: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    def measure(self) -> None:
        """Fill the arrays, group by group."""
        self.arrays |= _combinations(self.tokens, self.bases)
        head = self._head() if LM_HEAD in self.request.groups else None
        if head is not None:
            self._sampled(head)
            self._expected(head)
        self._autograd()

    def write(self, options: dict[str, Any], seconds: float) -> None:
        """Commit the arrays, then the record that names them."""
        folder, data = Path(options["folder"]), safetensors.numpy.save(self.arrays)
        write_atomic(folder / GRAMS, data)
        record = {
            "kind": "moediag gradient audit, raw",
            "request": options["request"],
            "methods": list(self.tokens.names),
            "token_methods": [name for name in self.request.methods if is_token_level(name)],
            "prompt_ids": np.unique(self.tokens.prompt_id_S).tolist(),
            "n_sequences": len(self.tokens.seq_id_S),
            "n_tokens": len(self.tokens.token_id_T),
            "words": WORDS,
            "left_out": self.left_out,
            "engine": {**numeric_versions(), "options": self.options, "device": str(self.model.device)},
            "facts": {**self.facts, "seconds": seconds},
            "grams_sha256": sha256_bytes(data),
        }
        write_sealed(folder / RECORD, record)

    def _logits(self, sequence: int) -> torch.Tensor:
        """(T, V) logits behind the scored tokens of a sequence, as the model gives them."""
        token_id_N, row_T = self.rows[sequence]
        # a token is scored by the row before it
        keep_T = torch.from_numpy(row_T - 1).to(self.model.device)
        inputs = torch.from_numpy(token_id_N)[None].to(self.model.device)
        logits: torch.Tensor = self.model(input_ids=inputs, use_cache=False, logits_to_keep=keep_T).logits[0]
        return logits

    def _targets(self, sequence: int) -> torch.Tensor:
        start, end = self.tokens.bounds_S[sequence]
        return torch.from_numpy(self.tokens.token_id_T[start:end])

    def _logp(self, sequence: int) -> torch.Tensor:
        log_probs = torch.log_softmax(self._logits(sequence).float(), dim=-1)
        return log_probs.gather(1, self._targets(sequence).to(log_probs.device)[:, None])[:, 0]

    @torch.no_grad()
    def _head(self) -> Head | None:
        """Hidden states behind all scored tokens; holds the log-probabilities against the train arm's."""
        weight_VH, bias_V = head_of(self.model)
        kept: list[torch.Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
        norms, gap, n_sequences = [], 0.0, len(self.rows)
        try:
            for sequence in range(n_sequences):
                logits = self._logits(sequence)
                if not is_plain(self.model, kept[-1], logits):
                    self.left_out[LM_HEAD] = "the logits are not a linear map of the head's inputs (scaled or capped)"
                    return None
                norms.append(torch.logsumexp(logits.float(), dim=-1))
                logp_T = logits.float().gather(1, self._targets(sequence).to(logits.device)[:, None])[:, 0] - norms[-1]
                start, end = self.tokens.bounds_S[sequence]
                gap = max(gap, float(np.abs(logp_T.cpu().numpy() - self.tokens.logp_train_T[start:end]).max()))
                self.reporter.progress(sequence + 1, n_sequences, "sequence (hidden states)")
        finally:
            handle.remove()
        self.facts["logp_gap"] = gap
        return Head(weight_VH, bias_V, torch.cat(kept), torch.cat(norms))

    @torch.no_grad()
    def _sampled(self, head: Head) -> None:
        token_id_T = torch.from_numpy(self.tokens.token_id_T).to(head.hidden_TH.device)
        self.arrays[f"gram_{LM_HEAD}_BB"] = sampled_gram(
            head,
            token_id_T,
            self.tokens.bounds_S,
            self.bases,
            self.request.max_bytes,
            self._progress_of("token of the vocabulary"),
        )

    @torch.no_grad()
    def _expected(self, head: Head) -> None:
        prefixes = _prefixes(self.run, self.request.infer, self.tokens, len(head.weight_VH))
        if not prefixes:
            self.left_out["exact"] = NO_VOCABULARY
            return
        methods = tuple(name for name in self.request.methods if is_token_level(name))
        on_done = self._progress_of("token of the vocabulary (exact reference)")
        self.reporter.stage("exact reference: every token of the vocabulary at every prefix")
        _, row = np.unique([one.prompt for one in prefixes], return_inverse=True)  # prompts without any are left out
        prefixes = [replace(one, prompt=int(prompt)) for one, prompt in zip(prefixes, row, strict=True)]
        self.arrays["gram_exact"] = expected_gram(head, prefixes, methods, self.request.max_bytes, on_done)
        self.facts["n_prefixes"] = sum(len(one.token_N) for one in prefixes)
        self.facts["n_prefix_sequences"] = len(prefixes)

    def _autograd(self) -> None:
        groups = [group for group in AUTOGRAD_GROUPS if group in self.request.groups]
        parameters = {group: parameters_of(self.model, group) for group in groups}
        self.left_out |= {g: f"{type(self.model).__name__} has no {g}" for g, found in parameters.items() if not found}
        n_vectors = sum(len(basis.basis_RT) for basis in self.bases)
        parameters, too_large = affordable(
            {group: found for group, found in parameters.items() if found},
            n_vectors,
            self.request.max_bytes,
            self.request.max_passes,
        )
        self.left_out |= too_large
        n_passes = len(pieces(parameters, n_vectors, self.request.max_bytes))
        done = iter(range(1, 1 + n_passes * len(self.bases)))
        unit = f"sequence ({', '.join(parameters)})"
        grams = autograd_grams(
            self._logp,
            self.bases,
            parameters,
            self.request.max_bytes,
            lambda: self.reporter.progress(next(done), n_passes * len(self.bases), unit),
        )
        self.arrays |= {f"gram_{group}_BB": gram_BB for group, gram_BB in grams.items()}
        self.facts |= {"n_passes": n_passes, "n_backwards": n_passes * n_vectors}

    def _progress_of(self, unit: str) -> Any:
        return lambda done, total: self.reporter.progress(done, total, unit)


def _combinations(tokens: AuditTokens, bases: list[SequenceBasis]) -> dict[str, NDArray[Any]]:
    """How methods combine directions, whose directions they are, and what each sequence weighs."""
    _, prompt_S = np.unique(tokens.prompt_id_S, return_inverse=True)
    lengths = [len(basis.basis_RT) for basis in bases]
    return {
        "coefficient_MB": np.ascontiguousarray(np.concatenate([basis.coefficient_MR for basis in bases], axis=1)),
        "prompt_B": np.repeat(prompt_S, lengths).astype(np.int64),
        "prompt_S": prompt_S.astype(np.int64),
        "n_tokens_S": np.array([end - start for start, end in tokens.bounds_S], dtype=np.int64),
        "sequence_weight_S": tokens.sequence_weight_S.copy(),
        "reward_S": tokens.reward_S,
        "advantage_S": tokens.advantage_S,
        "kept_MS": np.stack([(tokens.weights_MT[:, a:b] != 0).sum(axis=1) for a, b in tokens.bounds_S], axis=1),
    }


def _sequence_rows(run: Run, tokens: AuditTokens) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Token ids of every audited sequence, prompt included, and the rows of its scored tokens."""
    found: dict[int, tuple[NDArray[np.int64], int]] = {}
    for shard in run.shards:
        table = run.tokens(shard)
        for start, end in table.sequence_bounds():
            first = int(np.argmax(table.is_response_T[start:end]))
            found[int(table.seq_id_T[start])] = (table.token_id_T[start:end].copy(), first)
    rows = []
    for seq, (start, end) in zip(tokens.seq_id_S.tolist(), tokens.bounds_S, strict=True):
        token_id_N, first = found[seq]
        rows.append((token_id_N, first + tokens.position_T[start:end]))
    return rows


def _prefixes(run: Run, arm: str, tokens: AuditTokens, n_vocabulary: int) -> list[Prefixes]:
    """Infer's full distributions behind scored tokens of the audited sequences; none where none was captured."""
    sequence_of = {seq: s for s, seq in enumerate(tokens.seq_id_S.tolist())}
    _, prompt_S = np.unique(tokens.prompt_id_S, return_inverse=True)
    prefixes = []
    for shard in run.shards:
        vocab = run.load_vocab(arm, shard)
        if vocab is None:
            continue
        table = run.tokens(shard)
        seq_N, position_N = table.seq_id_T[vocab.row_N], table.position_T[vocab.row_N]
        for seq in np.unique(seq_N).tolist():
            if (s := sequence_of.get(int(seq))) is None:
                continue
            start, end = tokens.bounds_S[s]
            own_N = np.flatnonzero(seq_N == seq)
            first = int(np.argmax(table.is_response_T[table.seq_id_T == seq]))
            place_N = {int(position) - first: n for position, n in zip(position_N[own_N], own_N, strict=True)}
            token_N = np.array([t for t in range(start, end) if int(tokens.position_T[t]) in place_N], dtype=np.intp)
            rows = vocab.logps_NV[[place_N[int(tokens.position_T[t])] for t in token_N]]
            prefixes.append(Prefixes(int(prompt_S[s]), token_N, _of_width(rows, n_vocabulary), 1 / (end - start)))
    return prefixes


def _of_width(logps_NV: NDArray[np.float32], n_vocabulary: int) -> NDArray[np.float32]:
    """The distributions over the head's rows: engines pad vocabularies differently, padding has probability 0."""
    if logps_NV.shape[1] >= n_vocabulary:
        return logps_NV[:, :n_vocabulary]
    padding = np.full((len(logps_NV), n_vocabulary - logps_NV.shape[1]), -np.inf, dtype=np.float32)
    return np.concatenate([logps_NV, padding], axis=1)
