"""The train arm: transformers scores the run's tokens teacher-forced, by default one unpadded sequence per forward.

Runs in an engine process of its own. One sequence per forward is the reference: batching and padding are
numerics knobs of their own (:mod:`.batching`). The hooks only copy what routers and experts were given.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moediag.engines.arms import ArmRequest
from moediag.engines.assemble import capture_of, gate_weights_words
from moediag.engines.hf.batching import PACKED, Batch, Batching, alone, refuse_leak
from moediag.engines.hf.perturbation import Perturbed
from moediag.engines.hf.routing import prove_model
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps, find_blocks
from moediag.engines.process import Held, OnDone, Reporter, fill_missing_shards, seed_of
from moediag.engines.proof import Proof, refuse_stored_rules
from moediag.engines.provenance import arm_sections, plain, process_facts, stored_dtypes
from moediag.engines.routers import ModelRouting
from moediag.engines.versions import numeric_versions, require_train_engine
from moediag.errors import CheckpointError, EngineError, IncompleteRunError
from moediag.notation import REFERENCE, TRAIN
from moediag.run.capture import Capture, Shard, TokenRows, arrays_of
from moediag.run.files import sha256_bytes
from moediag.run.reader import Run
from moediag.run.recipes import recipe
from moediag.run.records import ArmRecord
from moediag.run.vocabulary import VocabRows
from moediag.run.writer import RunWriter

_LOGIT_ROWS = 512  # rows of vocabulary-wide float32 held at a time: 512 x 152k x 4 B = 0.3 GB

OnLogProbs = Callable[[torch.Tensor, torch.Tensor], None]
"""Told, some rows at a time, token rows of the batch (M,) and their next-token log-probabilities (M, V), float32."""


def capture_train(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Fill the missing shards of one of the run's transformers arms.

    Args:
        options: as for :func:`moediag.engines.vllm.engine.capture_infer`.

    Raises:
        IncompleteRunError: the run's tokens, or the routes to replay, are not there yet.
        CaptureError: a layer never fired; nothing of that shard is stored.
    """
    run, request = writer.run, ArmRequest(**options["request"])
    missing = writer.own_missing_shards(request.arm)
    replay = Replay(**request.replay) if request.replay else None
    refuse_missing_input(run, missing, replay.source if replay else None)
    if not missing:
        return
    if replay and replay.weights:
        _refuse_other_weights(run, replay.source, missing[0])
    fill_arm(TrainEngine, writer, options, reporter, held)


def fill_arm(
    kind: type[TrainEngine], writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held
) -> None:
    """Load the model, begin the arm, fill its missing shards."""
    request = ArmRequest(**options["request"])
    model = held_model(held, options["folder"], request.options, reporter)
    if recipe(request.recipe).role == REFERENCE:
        _refuse_no_third_party(writer.run, model)
    engine = kind(writer, model, request, options["routing"])
    writer.begin_arm(engine.arm_record(options["checkpoint"], options["configuration"]), engine.correction_bias())
    fill_missing_shards(writer, request.arm, reporter, engine.capture_shard)


def refuse_missing_input(run: Run, shards: list[Shard], source: str | None = None) -> None:
    """Refuse where the tokens to score, or the routes of the arm ``source``, are not there yet.

    Raises:
        IncompleteRunError: names the shards and what to run first.
    """
    needed = source or run.sampler
    has_input = run.has_tokens if source is None else partial(run.has_capture, source)
    waiting = [shard for shard in shards if not has_input(shard)]
    if waiting:
        named = ", ".join(shard.stem for shard in waiting[:3]) + (", ..." if len(waiting) > 3 else "")
        raise IncompleteRunError(
            f"{run.path} has no {'routes' if source else 'tokens'} yet for {len(waiting)} of {len(run.shards)} shards "
            f"({named}); run first: moediag capture {needed} CKPT -o {run.path}"
        )


def _refuse_other_weights(run: Run, source: str, shard: Shard) -> None:
    """Gate weights can be forced only where they were kept, as the coefficients that they are in transformers too.

    Raises:
        IncompleteRunError: they were not.
    """
    if run.capture(source, shard).gate_weights_TLK is None:
        reason = "kept expert ids only"
    elif run.arm(source).gate_weights:
        return
    else:
        reason = "does not say on what scale its gate weights are"
    raise IncompleteRunError(
        f"{run.path}: arm {source} {reason}, so --replay-weights cannot force them; leave it out, or begin another run"
    )


def _refuse_no_third_party(run: Run, model: Any) -> None:
    """A reference that is the train arm's own code once more would always agree with it.

    Raises:
        EngineError: it is.
    """
    code = model_code(model)
    for arm in run.arms():
        if run.arm(arm).role == TRAIN and run.arm(arm).facts.get("model_code") == code:
            raise EngineError(
                f"the reference would be {code}, which arm {arm} is too: that is no third party; give a folder with "
                "modelling code of its own and let it run (--trust-remote-code, in diagnose --trust-reference-code)"
            )


@dataclass(frozen=True)
class Replay:
    """Routing replay: the expert sets that another arm recorded are forced.

    Args:
        source: the arm whose routes are forced.
        weights: force its gate weights too; else the gate comes from this engine's own scores, as in R3.
        first_layer, last_layer: MoE layers to force, inclusive; None = the first, the last.
    """

    source: str
    weights: bool = False
    first_layer: int | None = None
    last_layer: int | None = None

    def routes(self, source: Capture, start: int, end: int) -> ForcedRoutes:
        """Routes of one sequence, rows [start, end) of the source capture."""
        assert source.expert_ids_TLK is not None
        n_layers = source.expert_ids_TLK.shape[1]
        last = n_layers - 1 if self.last_layer is None else self.last_layer
        weights_TLK = source.gate_weights_TLK if self.weights else None
        return ForcedRoutes(
            ids_TLK=torch.from_numpy(source.expert_ids_TLK[start:end].astype(np.int64)),
            weights_TLK=torch.from_numpy(weights_TLK[start:end].copy()) if weights_TLK is not None else None,
            layers=range(self.first_layer or 0, min(last, n_layers - 1) + 1),
        )


class TrainEngine:
    """One arm on a transformers model, with its taps."""

    has_cache = False

    def __init__(self, writer: RunWriter, model: Any, request: ArmRequest, routing: dict[str, Any] | None) -> None:
        self.version = require_train_engine()
        self.writer, self.run = writer, writer.run
        self.request = request
        self.replay = Replay(**request.replay) if request.replay else None
        self.batching = Batching(**(request.batching or {})).check()
        self.model = model
        self.spec = ModelRouting.from_record(routing) if routing else None
        self.level = self.run.record.level
        self.proof = _shown(self.model, self.spec) if self.spec else None
        if self.proof:
            self.spec = self.proof.routing
            refuse_stored_rules(self.run, recipe(request.recipe).role, self.proof.shown, request.accept)
        if self.batching.layout == PACKED and self.batching.batch_size > 1:
            refuse_leak(self.model, torch.from_numpy(self.run.tokens(self.run.shards[0]).token_id_T.copy()))

    def arm_record(self, checkpoint: str, configuration: dict[str, Any]) -> ArmRecord:
        """What arm.json says of this arm."""
        config = self.model.config
        parameters = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters()}
        loaded = {
            "model_class": type(self.model).__name__,
            "parameter_dtypes": sorted(parameters),
            "attn_implementation": config._attn_implementation,
            "experts_implementation": getattr(config, "_experts_implementation", None),
            "device": str(self.model.device),
            "n_threads": torch.get_num_threads(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "kernels": kernels(self.model),
            "dtypes": dtypes(self.model, self.has_cache),
            "process": process_facts(),
        }
        facts = {
            **self.facts(),
            **arm_sections(loaded),
            "engine_config": engine_config(self.model, self.has_cache),
            "router_dtypes": self.proof.shown[0].stage_dtypes if self.proof else None,
            "observer": "forward hooks on routers and experts" if self.spec else "none needed",
        }
        is_reference = self.request.variant_of is None and recipe(self.request.recipe).is_observed
        return self.request.record(
            checkpoint,
            configuration,
            facts,
            {**numeric_versions(), "transformers": self.version},
            dtype=str(self.model.dtype).removeprefix("torch."),
            arrays=arrays_of(
                self.level,
                self.spec is not None,
                has_rule=self.spec is not None and self.spec.has_rule,
                has_distributions=is_reference and self.run.record.full_vocab > 0,
            ),
            routers=self.spec.routers() if self.spec else (),
            gate_weights=gate_weights_words(self.level, self.spec, self.spec.scales_input) if self.spec else None,
        )

    def facts(self) -> dict[str, Any]:
        """How this arm's scores come about."""
        return {
            "batching": self.batching.words,
            "replay": asdict(self.replay) if self.replay else None,
            "perturbation": self.request.perturbation or None,
            "model_code": model_code(self.model),
        }

    def correction_bias(self) -> list[list[float]] | None:
        """The routers' correction bias by MoE layer and expert; None where the rule has none."""
        if self.spec is None or not self.spec.has_correction_bias:
            return None
        biases = [block.correction_bias(self.spec) for block in find_blocks(self.model)]
        return [bias.detach().float().cpu().tolist() for bias in biases if bias is not None]

    def capture_shard(self, shard: Shard, on_done: OnDone) -> None:
        """Score one shard's sequences and commit the arrays."""
        started = time.monotonic()
        tokens = self.run.tokens(shard)
        chosen = self.run.vocab_sequences(self.request.arm, shard)
        vocab = VocabRows(tokens, chosen, self.model.config.get_text_config().vocab_size)
        source = self.run.capture(self.replay.source, shard) if self.replay else None
        parts, n_done = [], 0
        for batch in self.batching.split(tokens.sequence_bounds()):
            start, end = batch.bounds[0][0], batch.bounds[-1][1]
            forced = self.replay.routes(source, start, end) if self.replay and source else None
            with self._perturbed(f"{shard.index}:{start}"):
                parts.append(self.score(tokens, batch, forced, vocab))
            n_done += len(batch.bounds)
            on_done(n_done)
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        arrays = {name: to_numpy(tensor) for name, tensor in rows.items()}
        capture = capture_of(arrays.pop("logp_T"), arrays.pop("entropy_T"), arrays)
        facts = {"seconds": round(time.monotonic() - started, 3)}
        whole = vocab.whole(tokens, capture.logp_T, chosen) if len(chosen) else None
        self.writer.write_capture(self.request.arm, shard, tokens, capture, facts, float_dtypes(rows), whole)

    def _perturbed(self, name: str) -> AbstractContextManager[object]:
        if not self.request.perturbation:
            return nullcontext()
        modules = [block.gate for block in find_blocks(self.model)] if self.spec else decoder_layers(self.model)
        return Perturbed(modules, self.request.perturbation, seed_of(name))

    def score(
        self, tokens: TokenRows, batch: Batch, forced: ForcedRoutes | None = None, vocab: VocabRows | None = None
    ) -> dict[str, torch.Tensor]:
        """Arrays of the sequences of one forward, in the order of the token table.

        Args:
            forced: routes of the batch's token rows; padding routes as the model likes.
            vocab: takes the distributions that it keeps.
        """
        start, end = batch.bounds[0][0], batch.bounds[-1][1]
        token_id_T = torch.from_numpy(tokens.token_id_T[start:end].copy())
        is_response_T = torch.from_numpy(tokens.is_response_T[start:end].copy())
        keep = None if vocab is None or not len(vocab) else partial(_keep, vocab, start)
        with torch.inference_mode():
            if self.spec is None:
                logp_T, entropy_T = score_batch(self.model, batch, token_id_T, is_response_T, keep)
                return {"logp_T": logp_T, "entropy_T": entropy_T}
            spread = None if forced is None else forced.spread(batch.row_of_token, batch.n_rows)
            with RoutingTaps(self.model, self.spec, self.level, spread) as taps:
                logp_T, entropy_T = score_batch(self.model, batch, token_id_T, is_response_T, keep)
                return {"logp_T": logp_T, "entropy_T": entropy_T, **taps.take(batch.row_of_token)}


def kernels(model: Any) -> dict[str, Any]:
    """Attention and expert implementations that transformers resolved, and the classes that were built."""
    config = model.config
    return {
        "attn_implementation": config._attn_implementation,
        "experts_implementation": getattr(config, "_experts_implementation", None),
        "use_kernels": bool(getattr(model, "use_kernels", False)),
        "module_classes": dict(sorted(Counter(type(module).__name__ for module in model.modules()).items())),
    }


def dtypes(model: Any, has_cache: bool) -> dict[str, Any]:
    """Dtypes of weights, head, logits and log-probabilities in transformers."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    dtype = plain(getattr(head, "dtype", None))
    return {
        "model": plain(model.dtype),
        **stored_dtypes(model),
        "kv_cache": plain(model.dtype) if has_cache else None,
        "lm_head": dtype,
        "logits": dtype,
        "logprobs": "float32",
    }


def model_code(model: Any) -> str:
    """The class that computes, and whose code it is: that of transformers, or the checkpoint's, by file and digest."""
    kind = type(model)
    if kind.__module__.startswith("transformers."):
        return f"{kind.__name__} of transformers {version('transformers')}"
    if kind.__module__.startswith("moediag."):
        return f"{kind.__name__} of moediag"
    source = Path(str(inspect.getsourcefile(kind)))
    return f"{kind.__name__} of {source.name} (sha256 {sha256_bytes(source.read_bytes())[:12]})"


def engine_config(model: Any, has_cache: bool) -> dict[str, Any]:
    """Where transformers put the model, and how it was stored."""
    devices = set(map(str, (getattr(model, "hf_device_map", None) or {"": model.device}).values()))
    return {
        "devices": sorted(devices),
        "quantization": plain(getattr(model.config, "quantization_config", None)),
        "use_cache": has_cache,
        "training": bool(model.training),
    }


def held_model(held: Held, checkpoint: str, options: dict[str, Any], reporter: Reporter) -> Any:
    """The model that the process holds, or the requested one in its place."""

    def load() -> Any:
        reporter.stage("loading transformers")
        return load_model(checkpoint, options)

    return held.get(("transformers", checkpoint, options), load, let_go=lambda _: None)


def load_model(checkpoint: str, options: dict[str, Any]) -> Any:
    """Load a causal language model for scoring, on the GPU where there is one.

    Raises:
        CheckpointError: the checkpoint's own code does not find its weights in it.
    """
    from transformers import AutoModelForCausalLM

    from moediag.engines.hf import bailing

    bailing.register()
    options = dict(options)
    if "device_map" not in options and torch.cuda.is_available():
        options["device_map"] = "cuda"
    model, loading = AutoModelForCausalLM.from_pretrained(
        checkpoint, use_safetensors=True, output_loading_info=True, **options
    )
    left = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if left and options.get("trust_remote_code"):  # of another transformers' time: it would run on random weights
        raise CheckpointError(
            f"{model_code(model)} found no weights in {checkpoint} for {len(left)} of its tensors, first {left[0]}; "
            "run it with the transformers it was written for, in an environment of its own"
        )
    return model.eval()


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers, in order: the module list of as many entries as config.json says.

    Raises:
        CheckpointError: no such list.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    found = next((layers for layers in lists if len(layers) == n_layers), None)
    if found is None:
        raise CheckpointError(
            f"{type(model).__name__} has no list of {n_layers} decoder layers; please report this model"
        )
    return list(found)


def score_sequence(
    model: Any, token_id_T: torch.Tensor, is_response_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`score_batch`, for one sequence on its own: the reference."""
    return score_batch(model, alone(0, len(token_id_T)), token_id_T, is_response_T)


def _keep(vocab: VocabRows, first: int, row_M: torch.Tensor, log_probs_MV: torch.Tensor) -> None:
    """Hand over the rows to keep; ``first`` is the batch's first row in the token table."""
    kept_M = vocab.wants(first + row_M.numpy())
    if kept_M.any():
        rows = log_probs_MV[torch.from_numpy(kept_M).to(log_probs_MV.device)]
        vocab.add(first + row_M.numpy()[kept_M], rows.cpu().numpy())


def score_batch(
    model: Any,
    batch: Batch,
    token_id_T: torch.Tensor,
    is_response_T: torch.Tensor,
    on_log_probs: OnLogProbs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [nat] of every response token of a batch; NaN on prompt rows.

    The vocabulary-wide rows are taken a few hundred at a time: float32 log-softmax of all of them would not fit.

    Args:
        token_id_T, is_response_T: token rows of the batch's sequences, one after the other.
        on_log_probs: sees every vocabulary-wide row that the log-probabilities are read from.
    """
    logp_T = torch.full((len(token_id_T),), torch.nan)
    entropy_T = torch.full((len(token_id_T),), torch.nan)
    row_N = torch.nonzero(is_response_T).flatten()
    line_N, column_N = batch.places(row_N - 1)  # a token is scored by the row before it
    columns, column_N = torch.unique(column_N, return_inverse=True)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs(token_id_T).items()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BCV = model(**inputs, use_cache=False, logits_to_keep=columns.to(model.device)).logits
    else:  # a publisher's code of before: the whole vocabulary behind every token
        logits_BCV = model(**inputs, use_cache=False).logits
        logits_BCV = logits_BCV[:, columns.to(logits_BCV.device)]
    line_N, column_N = line_N.to(logits_BCV.device), column_N.to(logits_BCV.device)
    for first in range(0, len(row_N), _LOGIT_ROWS):
        rows = slice(first, first + _LOGIT_ROWS)
        log_probs = torch.log_softmax(logits_BCV[line_N[rows], column_N[rows]].float(), dim=-1)
        target = token_id_T[row_N[rows]].to(log_probs.device)
        logp_T[row_N[rows]] = log_probs.gather(1, target[:, None])[:, 0].cpu()
        entropy_T[row_N[rows]] = torch.special.entr(log_probs.exp()).sum(-1).cpu()
        if on_log_probs is not None:
            on_log_probs(row_N[rows], log_probs)
    return logp_T, entropy_T


def _shown(model: Any, expected: ModelRouting) -> Proof:
    """The rule as the loaded routers show it, in their dtype and on their device.

    Raises:
        CheckpointError: it is another one than the checkpoint's routers showed alone.
    """
    config = model.config.get_text_config().to_dict()
    proof = prove_model(model, config, str(model.dtype).removeprefix("torch."), "the loaded model")
    differing = [name for name in _IDENTITY if getattr(proof.routing, name) != getattr(expected, name)]
    if differing:
        found, other = ({name: getattr(one, name) for name in differing} for one in (proof.routing, expected))
        raise CheckpointError(f"transformers' loaded routers have {found}, the checkpoint's alone showed {other}")
    return proof


_IDENTITY = ("decoder_layers", "n_experts", "top_k", "score_function", "has_correction_bias", "n_group", "topk_group",
             "gate", "renormalize", "scaling_factor")  # fmt: skip


def float_dtypes(rows: dict[str, torch.Tensor]) -> dict[str, str]:
    """The engine's dtypes, in which the arrays are kept."""
    return {name: str(rows.dtype).removeprefix("torch.") for name, rows in rows.items() if rows.is_floating_point()}


def to_numpy(tensor: torch.Tensor) -> NDArray[np.generic]:
    """As numpy holds it: bfloat16 as float32."""
    array: NDArray[np.generic] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array
