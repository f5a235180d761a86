"""The parent's side: which options and environment an engine process gets, and what is refused.

Imports no engine. Option names are vLLM's and transformers' own.
"""

from __future__ import annotations

import os
from typing import Any

from moediag.engines import channel
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.versions import require_infer_engine, require_train_engine
from moediag.errors import EngineError
from moediag.notation import engine_side
from moediag.run.directory import Run

# Set for the engine's process where the user has not set them; recorded in arm.json.
INFER_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: requests are scheduled in submission order
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the taps have been verified on the V1 runner only
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads collapse beside any other load
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # eager anyway; saves compiling the logprob kernel
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
    "HF_HUB_OFFLINE": "1",  # the checkpoint is a local folder by now
}
TRAIN_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# What observation forces, and what vLLM would otherwise default to another way.
FORCED = {
    "enforce_eager": True,  # taps do not fire inside CUDA graphs or compiled code
    "enable_prefix_caching": False,  # cached prefixes have no rows
    "async_scheduling": False,  # keeps the sampler's rows those of the step before it
    "generation_config": "vllm",  # the checkpoint's generation_config.json must not change sampling
    "logprobs_mode": "raw_logprobs",  # before temperature and penalties: what HF's log_softmax gives
}

_REFUSED = {
    "enforce_eager": "taps do not fire inside CUDA graphs or compiled code, capture needs eager execution",
    "enable_prefix_caching": "positions read from the prefix cache are never routed again, so their rows would lack",
    "async_scheduling": "entropies could not be told apart between overlapping steps",
    "generation_config": "sampling must be what was asked for, not what the checkpoint's file says",
    "logprobs_mode": "log-probabilities must be comparable with log_softmax of the raw logits",
    "worker_extension_cls": "the taps are this option's user",
    "speculative_config": "drafted tokens give routing rows that belong to no sampled token",
    "spec_method": "drafted tokens give routing rows that belong to no sampled token",
    "pipeline_parallel_size": "each stage sees only its own layers; not implemented in this version",
    "data_parallel_size": "ranks would sample different sequences; not implemented in this version",
    "enable_expert_parallel": "ranks would see different tokens; not implemented in this version",
    "enable_eplb": "expert ids would be physical, not the model's own",
    "enable_dbo": "two half batches are in flight at once, rows could not be told apart",
    "trust_remote_code": "give --trust-remote-code, which asks for a pinned revision",
    "model": "give the checkpoint as the command's argument",
    "dtype": "give --dtype",
    "seed": "give --seed",
}


def infer_options(extra: dict[str, Any], **named: Any) -> dict[str, Any]:
    """vLLM options, by their own names; None means vLLM's own default.

    Raises:
        EngineError: an option that would make the capture wrong, with the reason.
    """
    for name, value in extra.items():
        if name in _REFUSED and not (name in FORCED and value == FORCED[name]):
            raise EngineError(f"vLLM option {name}={value!r} is refused: {_REFUSED[name]}; leave it out")
    return {**{name: value for name, value in named.items() if value is not None}, **extra}


def train_options(**named: Any) -> dict[str, Any]:
    """transformers options, by their own names; None means transformers' own default."""
    return {name: value for name, value in named.items() if value is not None}


def run_infer(run: Run, checkpoint: Checkpoint, options: dict[str, Any], on_event: channel.OnEvent) -> None:
    """Fill the infer arm in a vLLM process of its own."""
    require_infer_engine()
    _run("infer", run, checkpoint, {"engine": options}, on_event, INFER_ENVIRONMENT)


def run_train(
    run: Run,
    checkpoint: Checkpoint,
    options: dict[str, Any],
    on_event: channel.OnEvent,
    replay: dict[str, Any] | None = None,
) -> None:
    """Fill the train arm, or with ``replay`` the train-replay arm, in a transformers process of its own."""
    require_train_engine()
    arm = "train-replay" if replay else "train"
    _run(arm, run, checkpoint, {"engine": options, "replay": replay}, on_event, TRAIN_ENVIRONMENT)


def arm_configuration(engine_options: dict[str, Any], replay: dict[str, Any] | None = None) -> dict[str, Any]:
    """What makes two captures of an arm the same."""
    return {**engine_options, **({"replay": replay} if replay else {})}


def _run(
    arm: str,
    run: Run,
    checkpoint: Checkpoint,
    options: dict[str, Any],
    on_event: channel.OnEvent,
    environment: dict[str, str],
) -> None:
    # "auto" means another dtype to each engine where a checkpoint is stored in float32: say it in words.
    engine = dict(options["engine"])
    if engine.get("dtype") == "auto":
        engine["dtype"] = checkpoint.stored_dtype
    request = {
        "run": str(run.path),
        "checkpoint": str(checkpoint.path),
        "arm": arm,
        **options,
        "engine": engine,
        "configuration": arm_configuration(options["engine"], options.get("replay")),
    }
    log = run.path / "logs" / f"{arm}.log"
    channel.run_child(engine_side(arm), request, log, on_event, environment)
