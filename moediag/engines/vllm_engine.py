"""The infer arm: vLLM samples responses (or scores given ones) while the taps record what it routed.

Runs in an engine process of its own. Shards are submitted one by one, each seeded by itself, so that a
resumed capture equals an undisturbed one. See :mod:`moediag.engines.vllm_worker` for the taps.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.engines.assemble import capture_of, order_rows, token_rows
from moediag.engines.channel import Reporter
from moediag.engines.fill import OnDone, fill_missing_shards
from moediag.engines.launch import FORCED, INFER_ENVIRONMENT
from moediag.engines.plan import load_prompt_tokens
from moediag.engines.versions import installed, require_infer_engine
from moediag.errors import CaptureError, CheckpointError
from moediag.run.capture import TokenRows
from moediag.run.directory import Run, Shard

_WORKER = "moediag.engines.vllm_worker.MoediagWorkerExtension"
_DTYPE_NAMES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}


def capture_infer(run: Run, options: dict[str, Any], reporter: Reporter) -> None:
    """Fill the missing shards of the run's infer arm.

    Args:
        options: ``checkpoint`` (folder), ``engine`` (vLLM options by their own names).

    Raises:
        CaptureError: rows are missing or were computed for other tokens; nothing of that shard is stored.
    """
    with run.writing("infer"):
        if run.is_complete("infer"):
            return
        reporter.stage("loading vLLM")
        engine = InferEngine(run, options["checkpoint"], options["engine"])
        run.begin_arm("infer", engine.arm_record(options["configuration"]))
        fill_missing_shards(run, "infer", reporter, engine.capture_shard)


@dataclass
class Response:
    """What vLLM has given for one request so far: token ids and, per token, a map id -> logprob."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    is_finished: bool = False

    def add(self, output: Any) -> None:
        """Take one step's delta."""
        delta = output.outputs[0]
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = list(output.prompt_logprobs or self.prompt_logprobs)
        self.is_finished = bool(output.finished)

    def share_done(self, max_tokens: int) -> float:
        """How far this sequence is, in [0, 1]."""
        return 1.0 if self.is_finished else len(self.token_ids) / max_tokens


class InferEngine:
    """One vLLM engine with the taps set."""

    def __init__(self, run: Run, checkpoint: str, engine_options: dict[str, Any]) -> None:
        from vllm import LLM

        self.run = run
        self.version = require_infer_engine()
        self.prompts = load_prompt_tokens(run)
        self.options = {**engine_options, **FORCED}
        self.llm = LLM(model=checkpoint, worker_extension_cls=_WORKER, **self.options)
        keep_logits = run.configuration["router_logits"] == "full"
        facts = self.llm.collective_rpc("moediag_install", args=(run.model["routing"], keep_logits))
        self.facts: dict[str, Any] = facts[0]
        self._check_loaded()

    @property
    def is_cpu(self) -> bool:
        """True on vLLM's CPU build."""
        return str(self.facts["device"]) == "cpu"

    def arm_record(self, configuration: dict[str, Any]) -> dict[str, Any]:
        """What arm.json says of this arm."""
        import torch

        config = self.llm.llm_engine.vllm_config
        return {
            "configuration": configuration,
            "engine": "vllm",
            "versions": {"vllm": self.version, "torch": torch.__version__, "transformers": installed("transformers")},
            "path": "prefill (given completions)" if self.run.manifest["completions"] else "decode (sampled)",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "loaded": self.facts,
            "disagreements": self._disagreements(),
            "observer": "hooks on router.select_experts, the model's inputs and the sampler",
            "forced_by_observation": FORCED,
            "seeding": "per shard (workers reseeded)" if self.is_cpu else "per request",
            "environment": {name: os.environ.get(name, "") for name in INFER_ENVIRONMENT},
        }

    def _disagreements(self) -> list[str]:
        """Where vLLM's routers follow another rule than config.json: told, not refused, since that is a finding."""
        routing, rule = self.run.model["routing"], self.facts["router_rule"]
        if not routing or routing["gate"] != "scores":
            return []
        wanted = {"renormalize": routing["renormalize"], "scoring_func": routing["score_function"]}
        if routing["n_group"] > 1:
            wanted |= {"num_expert_group": routing["n_group"], "topk_group": routing["topk_group"]}
        return [
            f"vLLM's routers have {name} = {rule[name]!r}, config.json says {value!r}"
            for name, value in wanted.items()
            if name in rule and rule[name] != value
        ]

    def capture_shard(self, shard: Shard, on_done: OnDone) -> None:
        """Sample or score one shard's sequences and commit tokens and arrays."""
        started = time.monotonic()
        self.llm.collective_rpc("moediag_begin", args=(self._seed("shard", shard.index) if self.is_cpu else None,))
        responses = self._generate(shard, on_done)
        told, rows = self._rows()
        given = bool(self.run.manifest["completions"])
        samples = [self._sample(seq_id, response) for seq_id, response in zip(shard.seq_ids, responses, strict=True)]
        tokens = token_rows(shard.seq_ids, samples)
        request_seq_ids = [int(request) for request in told["requests"]]
        numpy_rows = {name: _to_numpy(tensor) for name, tensor in rows.items() if name != "entropy"}
        routing = order_rows(tokens, numpy_rows, request_seq_ids, needs_last_row=given)
        logp_T = _logps(tokens, responses, given)
        entropy_T = _entropies(tokens, rows["entropy"].numpy(), request_seq_ids)
        dtypes = {n: _DTYPE_NAMES[str(t.dtype)] for n, t in rows.items() if str(t.dtype) in _DTYPE_NAMES}
        facts = {"seconds": round(time.monotonic() - started, 3), "router_dtypes": told["router_dtypes"]}
        # Arrays first, tokens last: other arms take a shard up once its tokens are committed.
        self.run.write_capture("infer", shard, tokens, capture_of(logp_T, entropy_T, routing), facts, dtypes)
        if not self.run.manifest["completions"]:
            self.run.write_tokens(shard, tokens)

    def _generate(self, shard: Shard, on_done: OnDone) -> list[Response]:
        """Submit the shard at once, step until it is done; responses in the order of sequences."""
        engine = self.llm.llm_engine
        responses = {}
        for seq_id in shard.seq_ids:
            _, _, prompt, completion = self.prompts[seq_id]
            responses[seq_id] = Response()
            prompt_tokens = {"prompt_token_ids": [*prompt, *(completion or [])]}
            engine.add_request(str(seq_id), prompt_tokens, self._sampling_params(seq_id))
        max_tokens = 1 if self.run.manifest["completions"] else self.run.manifest["sampling"]["max_tokens"]
        while engine.has_unfinished_requests():
            for output in engine.step():
                responses[int(output.request_id)].add(output)
            on_done(sum(response.share_done(max_tokens) for response in responses.values()))
        return list(responses.values())

    def _sampling_params(self, seq_id: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.run.manifest["completions"]:
            return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        sampling = {k: v for k, v in self.run.manifest["sampling"].items() if k not in ("n", "seed")}
        # The CPU runner cannot take a per-request seed together with chunked prefill.
        seed = None if self.is_cpu else self._seed("sequence", seq_id)
        return SamplingParams(
            n=1, seed=seed, logprobs=0, output_kind=RequestOutputKind.DELTA, detokenize=False, **sampling
        )

    def _seed(self, kind: str, index: int) -> int:
        digest = hashlib.sha256(f"{self.run.manifest['sampling']['seed']}:{kind}:{index}".encode()).digest()
        return int.from_bytes(digest[:6], "big")

    def _rows(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory(prefix=".rows-", dir=self.run.path / "arms" / "infer") as folder:
            path = Path(folder) / "rows.safetensors"
            told = next(t for t in self.llm.collective_rpc("moediag_flush", args=(str(path),)) if t is not None)
            rows = load_file(path)
        if told["n_problems"]:
            raise CaptureError(
                f"the taps saw {told['n_problems']} irregular steps, first: {told['problems'][0]}; nothing was stored"
            )
        return told, rows

    def _sample(self, seq_id: int, response: Response) -> tuple[int, int, list[int], list[int]]:
        prompt_id, sample_index, prompt, completion = self.prompts[seq_id]
        return prompt_id, sample_index, prompt, completion or response.token_ids

    def _check_loaded(self) -> None:
        """Hold what vLLM loaded against what config.json says; refuse what the taps cannot see."""
        routing = self.run.model["routing"]
        wanted = list(routing["decoder_layers"]) if routing else []
        if self.facts["decoder_layers"] != wanted:
            raise CheckpointError(
                f"vLLM's model has MoE routers in decoder layers {self.facts['decoder_layers']}, "
                f"config.json says {wanted}"
            )
        if not routing:
            return
        found = (self.facts["n_experts"], self.facts["top_k"])
        if found != ([routing["n_experts"]], [routing["top_k"]]):
            raise CheckpointError(
                f"vLLM's routers have (E, K) = {found}, config.json {routing['n_experts'], routing['top_k']}"
            )
        if self.facts["has_correction_bias"] != routing["has_correction_bias"]:
            raise CheckpointError(
                f"vLLM's routers have {'a' if self.facts['has_correction_bias'] else 'no'} correction bias, "
                f"the family {routing['family']} {'has one' if routing['has_correction_bias'] else 'has none'}; "
                "check config.json"
            )
        if self.facts["is_monolithic"]:
            raise CaptureError(
                f"vLLM selected a monolithic MoE kernel ({', '.join(self.facts['experts_kernel'])}) that never shows "
                "which experts it used; choose a modular one with --vllm-option moe_backend=triton"
            )
        if self.facts["eplb"]:
            raise CaptureError("expert-parallel load balancing renames experts (physical ids); turn enable_eplb off")


def _logps(tokens: TokenRows, responses: list[Response], given: bool) -> NDArray[np.float32]:
    """Log-probability of every response token, taken by token id; NaN on prompt rows."""
    logp_T = np.full(len(tokens), np.nan, dtype=np.float32)
    for (start, end), response in zip(tokens.sequence_bounds(), responses, strict=True):
        is_response = tokens.is_response_T[start:end]
        first = start + int(np.argmax(is_response)) if is_response.any() else end
        entries = response.prompt_logprobs[first - start : end - start] if given else response.logprobs
        if len(entries) != end - first:
            raise CaptureError(f"vLLM gave {len(entries)} log-probabilities for {end - first} response tokens")
        ids = tokens.token_id_T[first:end].tolist()
        logp_T[first:end] = [entry[token].logprob for entry, token in zip(entries, ids, strict=True)]
    return logp_T


def _entropies(tokens: TokenRows, entropy: NDArray[Any], request_seq_ids: list[int]) -> NDArray[np.float32]:
    """Entropy behind every sampled token: the distribution after position p belongs to the token at p + 1."""
    entropy_T = np.full(len(tokens), np.nan, dtype=np.float32)
    start_of = {int(tokens.seq_id_T[start]): (start, end) for start, end in tokens.sequence_bounds()}
    for request, position, value in entropy.tolist():
        start, end = start_of[request_seq_ids[int(request)]]
        row = start + int(position) + 1
        # the first value stays: preemption samples again only what it has to recompute
        if row < end and tokens.is_response_T[row] and np.isnan(entropy_T[row]):
            entropy_T[row] = value
    return entropy_T


def _to_numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array
