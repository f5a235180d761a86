"""The train arm: transformers scores the run's tokens teacher-forced, one unpadded sequence per forward.

Runs in an engine process of its own. One sequence per forward is the reference: batching and padding are
numerics knobs of their own. The hooks only copy what routers and experts were given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moediag.engines.assemble import capture_of
from moediag.engines.channel import Reporter
from moediag.engines.fill import OnDone, fill_missing_shards
from moediag.engines.launch import TRAIN_ENVIRONMENT
from moediag.engines.routers import RouterSpec, margins
from moediag.engines.versions import installed, require_train_engine
from moediag.errors import CaptureError, CheckpointError, IncompleteRunError
from moediag.run.capture import TokenRows
from moediag.run.directory import Run, Shard

_LOGIT_ROWS = 512  # rows of vocabulary-wide float32 held at a time: 512 x 152k x 4 B = 0.3 GB
_GATE_NAMES = ("gate", "router")


def capture_train(run: Run, options: dict[str, Any], reporter: Reporter) -> None:
    """Fill the missing shards of the run's train arm.

    Args:
        options: ``checkpoint`` (folder), ``engine`` (transformers options by their own names).

    Raises:
        IncompleteRunError: the run's tokens are not there yet.
        CaptureError: a layer never fired; nothing of that shard is stored.
    """
    with run.writing("train"):
        missing = run.missing_shards("train")
        waiting = [shard for shard in missing if not run.has_tokens(shard)]
        if waiting:
            raise IncompleteRunError(
                f"{run.path} has no tokens yet for {len(waiting)} of {len(run.shards)} shards; "
                f"run first: moediag capture infer CKPT -o {run.path}"
            )
        if not missing:
            return
        reporter.stage("loading transformers")
        engine = TrainEngine(run, options["checkpoint"], options["engine"])
        run.begin_arm("train", engine.arm_record(options["configuration"]))
        fill_missing_shards(run, "train", reporter, engine.capture_shard)


class RoutingTaps:
    """Hooks on every MoE block: router logits as the router gave them, ids and weights as the experts used them.

    Use as a context manager; the hooks come off also when the body raises.
    """

    def __init__(self, model: torch.nn.Module, spec: RouterSpec, keep_logits: bool) -> None:
        self.spec = spec
        self.keep_logits = keep_logits
        self.blocks = find_blocks(model)
        self._logits_index = _declared_logits_index(model)
        self._handles: list[Any] = []
        self._rows: dict[int, dict[str, torch.Tensor]] = {}

    def __enter__(self) -> RoutingTaps:
        for layer, (_, gate, experts) in enumerate(self.blocks):
            self._handles.append(gate.register_forward_hook(self._after_gate(layer)))
            self._handles.append(experts.register_forward_pre_hook(self._before_experts(layer)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self, n_rows: int) -> dict[str, torch.Tensor]:
        """The forward's rows on the host, (T, L, ...), and forget them.

        Raises:
            CaptureError: a layer did not fire, or gave another number of rows.
        """
        rows, self._rows = self._rows, {}
        for layer in range(self.spec.n_layers):
            found = rows.get(layer, {})
            if "expert_ids_TLK" not in found or "margin_TL" not in found:
                raise CaptureError(f"MoE layer {layer} never fired in transformers; nothing was stored")
            if len(found["expert_ids_TLK"]) != n_rows:
                raise CaptureError(
                    f"MoE layer {layer} gave {len(found['expert_ids_TLK'])} rows for {n_rows} tokens; "
                    "nothing was stored"
                )
        return {name: torch.stack([rows[i][name] for i in range(self.spec.n_layers)], dim=1).cpu() for name in rows[0]}

    def _after_gate(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            logits = output[self._logits_index] if isinstance(output, tuple) else output
            logits = logits.reshape(-1, logits.shape[-1])
            self._check_logits(layer, logits)
            self._rows.setdefault(layer, {})["router_logits_TLE"] = logits.detach()

        return hook

    def _before_experts(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            _, ids, weights = args[:3]
            rows = self._rows.setdefault(layer, {})
            if "expert_ids_TLK" in rows:
                raise CaptureError(f"MoE layer {layer} fired twice in one forward; nothing was stored")
            rows["expert_ids_TLK"] = ids.reshape(-1, self.spec.top_k).detach().clone()
            rows["gate_weights_TLK"] = weights.reshape(-1, self.spec.top_k).detach().clone()
            logits = rows["router_logits_TLE"] if self.keep_logits else rows.pop("router_logits_TLE")
            rows["margin_TL"], rows["logit_margin_TL"] = margins(logits, rows["expert_ids_TLK"], self.spec)

        return hook

    def _check_logits(self, layer: int, logits: torch.Tensor) -> None:
        if not logits.is_floating_point() or logits.shape[-1] != self.spec.n_experts:
            raise CaptureError(
                f"MoE layer {layer}: the router's output {self._logits_index} is {logits.dtype} of width "
                f"{logits.shape[-1]}, wanted logits over E = {self.spec.n_experts}"
            )
        sample = logits[:8].float()
        if bool((sample >= 0).all()) and torch.allclose(
            sample.sum(-1), torch.ones(len(sample), device=sample.device), atol=1e-2
        ):
            raise CaptureError(f"MoE layer {layer}: the router gives probabilities under the name of logits")


class TrainEngine:
    """One transformers model with its taps."""

    def __init__(self, run: Run, checkpoint: str, engine_options: dict[str, Any]) -> None:
        self.version = require_train_engine()
        self.run = run
        self.options = engine_options
        self.model = load_model(checkpoint, engine_options)
        routing = run.model["routing"]
        self.spec = RouterSpec(**{**routing, "decoder_layers": tuple(routing["decoder_layers"])}) if routing else None
        self.keep_logits = run.configuration["router_logits"] == "full"
        if self.spec:
            _check_loaded(self.model, self.spec)

    def arm_record(self, configuration: dict[str, Any]) -> dict[str, Any]:
        """What arm.json says of this arm."""
        config = self.model.config
        parameters = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters()}
        return {
            "configuration": configuration,
            "engine": "transformers",
            "versions": {
                "transformers": self.version,
                "torch": torch.__version__,
                "accelerate": installed("accelerate"),
            },
            "path": "teacher-forced, one unpadded sequence per forward",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "loaded": {
                "model_class": type(self.model).__name__,
                "parameter_dtypes": sorted(parameters),
                "attn_implementation": config._attn_implementation,
                "experts_implementation": getattr(config, "_experts_implementation", None),
                "device": str(self.model.device),
                "n_threads": torch.get_num_threads(),
                "tf32": torch.backends.cuda.matmul.allow_tf32,
            },
            "observer": "forward hooks on routers and experts" if self.spec else "none needed",
            "environment": {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", *TRAIN_ENVIRONMENT)},
        }

    def capture_shard(self, shard: Shard, on_done: OnDone) -> None:
        """Score one shard's sequences and commit the arrays."""
        started = time.monotonic()
        tokens = self.run.tokens(shard)
        parts = []
        for n_done, (start, end) in enumerate(tokens.sequence_bounds(), 1):
            parts.append(self.score(tokens, start, end))
            on_done(n_done)
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in rows.items() if t.is_floating_point()}
        arrays = {name: _to_numpy(tensor) for name, tensor in rows.items()}
        capture = capture_of(arrays.pop("logp_T"), arrays.pop("entropy_T"), arrays)
        facts = {"seconds": round(time.monotonic() - started, 3)}
        self.run.write_capture("train", shard, tokens, capture, facts, dtypes)

    def score(self, tokens: TokenRows, start: int, end: int) -> dict[str, torch.Tensor]:
        """Arrays of one sequence, rows [start, end) of the token table."""
        token_id_T = torch.from_numpy(tokens.token_id_T[start:end])
        is_response_T = torch.from_numpy(tokens.is_response_T[start:end].copy())
        with torch.inference_mode(), _taps(self.model, self.spec, self.keep_logits) as taps:
            logp_T, entropy_T = score_sequence(self.model, token_id_T, is_response_T)
            routing = taps.take(end - start) if taps else {}
        return {"logp_T": logp_T, "entropy_T": entropy_T, **routing}


def load_model(checkpoint: str, options: dict[str, Any]) -> Any:
    """Load a causal language model for scoring, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    options = dict(options)
    if "device_map" not in options and torch.cuda.is_available():
        options["device_map"] = "cuda"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True, **options)
    return model.eval()


def score_sequence(
    model: Any, token_id_T: torch.Tensor, is_response_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [nat] of every response token of one sequence; NaN on prompt rows.

    The vocabulary-wide rows are taken a few hundred at a time: float32 log-softmax of all of them would not fit.
    """
    n_rows = len(token_id_T)
    logp_T = torch.full((n_rows,), torch.nan)
    entropy_T = torch.full((n_rows,), torch.nan)
    row_N = torch.nonzero(is_response_T).flatten()
    ids = token_id_T.to(model.device)
    logits_NV = model(input_ids=ids[None], use_cache=False, logits_to_keep=(row_N - 1).to(model.device)).logits[0]
    for first in range(0, len(row_N), _LOGIT_ROWS):
        chunk = row_N[first : first + _LOGIT_ROWS]
        log_probs = torch.log_softmax(logits_NV[first : first + _LOGIT_ROWS].float(), dim=-1)
        target = token_id_T[chunk].to(log_probs.device)
        logp_T[chunk] = log_probs.gather(1, target[:, None])[:, 0].cpu()
        entropy_T[chunk] = torch.special.entr(log_probs.exp()).sum(-1).cpu()
    return logp_T, entropy_T


def find_blocks(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module, torch.nn.Module]]:
    """(decoder layer, router, experts) of every MoE block, in order."""
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        gate = next(
            (getattr(module, n) for n in _GATE_NAMES if isinstance(getattr(module, n, None), torch.nn.Module)), None
        )
        if isinstance(experts, torch.nn.Module) and gate is not None:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found.append((numbers[0] if numbers else -1, gate, experts))
    return sorted(found, key=lambda block: block[0])


@contextmanager
def _taps(model: Any, spec: RouterSpec | None, keep_logits: bool) -> Iterator[RoutingTaps | None]:
    if spec is None:
        yield None
        return
    with RoutingTaps(model, spec, keep_logits) as taps:
        yield taps


def _check_loaded(model: Any, spec: RouterSpec) -> None:
    found = [layer for layer, _, _ in find_blocks(model)]
    if found != list(spec.decoder_layers):
        raise CheckpointError(
            f"transformers' model has MoE blocks in decoder layers {found}, "
            f"config.json says {list(spec.decoder_layers)}"
        )


def _declared_logits_index(model: Any) -> int:
    """Which of the router's outputs the model itself declares to be its logits; the first by custom."""
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        recorder = recorder[0] if isinstance(recorder, list | tuple) else recorder
        if recorder is not None and hasattr(recorder, "index"):
            return int(recorder.index)
    return 0


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array
