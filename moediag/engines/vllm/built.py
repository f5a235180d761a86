"""What vLLM really built and selected: kernels, dtypes, sizes, sampling; not what was requested.

Read from the built objects by what they are called there, duck-typed: an attribute that this version of an engine
lacks is left out of the record, never guessed. Plain data, so that workers can send it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from typing import Any

from moediag.engines.provenance import plain, stored_dtypes

# Name in arm.json: where vLLM's built configuration has it.
_ENGINE_CONFIG = {
    "max_model_len": "model_config.max_model_len",
    "seed": "model_config.seed",
    "quantization": "model_config.quantization",
    "enforce_eager": "model_config.enforce_eager",
    "logprobs_mode": "model_config.logprobs_mode",
    "generation_config": "model_config.generation_config",
    "model_impl": "model_config.model_impl",
    "disable_cascade_attn": "model_config.disable_cascade_attn",
    "disable_sliding_window": "model_config.disable_sliding_window",
    "use_fp64_gumbel": "model_config.use_fp64_gumbel",
    "load_format": "load_config.load_format",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "long_prefill_token_threshold": "scheduler_config.long_prefill_token_threshold",
    "scheduling_policy": "scheduler_config.policy",
    "async_scheduling": "scheduler_config.async_scheduling",
    "block_size": "cache_config.block_size",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "kv_cache_layout": "cache_config.kv_cache_layout",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "sliding_window": "cache_config.sliding_window",
    "kv_sharing_fast_prefill": "cache_config.kv_sharing_fast_prefill",
    "tensor_parallel_size": "parallel_config.tensor_parallel_size",
    "pipeline_parallel_size": "parallel_config.pipeline_parallel_size",
    "data_parallel_size": "parallel_config.data_parallel_size",
    "decode_context_parallel_size": "parallel_config.decode_context_parallel_size",
    "prefill_context_parallel_size": "parallel_config.prefill_context_parallel_size",
    "enable_expert_parallel": "parallel_config.enable_expert_parallel",
    "enable_eplb": "parallel_config.enable_eplb",
    "all2all_backend": "parallel_config.all2all_backend",
    "disable_custom_all_reduce": "parallel_config.disable_custom_all_reduce",
    "distributed_executor_backend": "parallel_config.distributed_executor_backend",
    "compilation_mode": "compilation_config.mode",
    "cudagraph_mode": "compilation_config.cudagraph_mode",
    "custom_ops": "compilation_config.custom_ops",
    "attention_backend": "attention_config.backend",
    "flash_attn_version": "attention_config.flash_attn_version",
    "moe_backend": "kernel_config.moe_backend",
    "linear_backend": "kernel_config.linear_backend",
    "op_priority": "kernel_config.ir_op_priority",
}
_SAMPLING_NOISE = ("skip_clone", "output_kind", "output_text_buffer_length", "stream_interval")


def vllm_engine_config(vllm_config: Any) -> dict[str, Any]:
    """Sizes, parallelism, caching and compilation as vLLM's built configuration has them."""
    found = {name: _attribute(vllm_config, path) for name, path in _ENGINE_CONFIG.items()}
    facts = {name: plain(value) for name, value in found.items() if value is not _ABSENT}
    is_parallel = facts.get("enable_expert_parallel")
    size = int(facts.get("tensor_parallel_size") or 1) * int(facts.get("data_parallel_size") or 1)
    return {**facts, "expert_parallel_size": size if is_parallel else 1}


def vllm_sampling(engine: Any, params: Any, prompt_token_ids: list[int]) -> dict[str, Any]:
    """The sampling parameters that vLLM's scheduler gets, after vLLM's own defaults and generation_config.

    Processes a request the way ``add_request`` does, without submitting it: ``params`` themselves stay as they are.
    """
    process = engine.input_processor.process_inputs
    parameters = inspect.signature(process).parameters
    tasks = {"supported_tasks": engine.get_supported_tasks()} if "supported_tasks" in parameters else {}
    request = process("moediag-provenance", {"prompt_token_ids": list(prompt_token_ids)}, params, **tasks)
    effective = request.sampling_params
    facts = {name.lstrip("_"): plain(getattr(effective, name)) for name in effective.__struct_fields__}
    if facts.get("seed") is not None:
        facts["seed"] = "one per request"
    return {name: value for name, value in sorted(facts.items()) if name not in _SAMPLING_NOISE}


def of_all_stages(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model's pipeline stages say of themselves, as one model's: MoE layers of all, kernels by stage.

    What has one value is that of the last stage, which has the head.
    """
    if len(stages) == 1:
        return stages[0]
    whole = dict(stages[-1])
    for name, value in whole.items():
        values = [stage[name] for stage in stages]
        if isinstance(value, list):
            whole[name] = sorted({one for part in values for one in part})
        elif isinstance(value, bool):
            whole[name] = any(values)
    whole["router_rule"] = next((stage["router_rule"] for stage in stages if stage["router_rule"]), {})
    whole["kernels"] = {f"stage {i}": stage["kernels"] for i, stage in enumerate(stages)}
    return whole


def vllm_kernels(runner: Any) -> dict[str, Any]:
    """Attention, expert, linear and other kernels that a vLLM worker selected, with how many layers use each."""
    modules = list(runner.model.modules())
    groups = [group for groups in getattr(runner, "attn_groups", []) for group in groups]
    implementations = {type(m.impl).__name__ for m in modules if hasattr(m, "impl") and hasattr(m, "attn_backend")}
    experts = [m.quant_method for m in modules if hasattr(getattr(m, "quant_method", None), "moe_kernel")]
    return {
        "attention": [_attention_group(group) for group in groups],
        "attention_implementations": sorted(implementations),
        "moe": _moe_groups(experts),
        "linear": _by_class(_linear_kernel(m) for m in modules if _is_linear(m)),
        "custom_ops": _by_class(_custom_op(m) for m in modules if hasattr(m, "_forward_method")),
    }


def vllm_dtypes(runner: Any) -> dict[str, Any]:
    """Dtypes of weights, KV cache, head, logits and log-probabilities in a vLLM worker."""
    config, model = getattr(runner, "model_config", None), runner.model
    caches = [cache for cache in getattr(runner, "kv_caches", []) if hasattr(cache, "dtype")]
    return {
        "model": plain(getattr(config, "dtype", None)),
        **stored_dtypes(model),
        "kv_cache": plain(caches[0].dtype if caches else getattr(runner, "kv_cache_dtype", None)),
        "lm_head": plain(getattr(getattr(getattr(model, "lm_head", None), "weight", None), "dtype", None)),
        "logits": plain(getattr(config, "head_dtype", None)),
        "logprobs": "float32",  # vLLM's sampler takes log_softmax in float32
    }


_ABSENT = object()


def _attribute(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name, _ABSENT)
    return root


def _attention_group(group: Any) -> dict[str, Any]:
    builder = next(iter(getattr(group, "metadata_builders", [])), None)
    spec = getattr(group, "kv_cache_spec", None)
    facts = {
        "backend": group.backend.get_name(),
        "class": group.backend.__name__,
        "n_layers": len(getattr(group, "layer_names", ())),
        "isa": getattr(builder, "isa", _ABSENT),  # of the CPU backend; follows from head and block size
        "block_size": getattr(spec, "block_size", _ABSENT),
        "kernel_block_size": getattr(group, "kernel_block_size", _ABSENT),
        "dtype": getattr(spec, "dtype", _ABSENT),
    }
    return {name: plain(value) for name, value in facts.items() if value is not _ABSENT}


def _moe_groups(methods: list[Any]) -> list[dict[str, Any]]:
    """One entry per kind of expert kernel; nearly always one."""
    kinds = [_moe_kernel(method) for method in methods]
    distinct = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return [{**kind, "n_layers": kinds.count(kind)} for kind in distinct]


def _moe_kernel(method: Any) -> dict[str, Any]:
    """What makes an expert kernel; before 0.30 vLLM had no kernel object, and some methods still have none."""
    kernel = method.moe_kernel
    experts = getattr(kernel, "fused_experts", None)
    prepare = getattr(kernel, "prepare_finalize", None)
    return {
        "method": type(method).__name__,
        "backend": next((plain(v) for k, v in sorted(vars(method).items()) if k.endswith("_backend")), None),
        "experts": None if experts is None else type(experts).__name__,
        "prepare_finalize": None if prepare is None else type(prepare).__name__,
        "activation": plain(getattr(getattr(method, "moe", None), "activation", None)),
        "is_monolithic": bool(getattr(method, "is_monolithic", False)),
    }


def _is_linear(module: Any) -> bool:
    method = getattr(module, "quant_method", None)
    return method is not None and not hasattr(method, "moe_kernel")


def _linear_kernel(module: Any) -> tuple[str, str]:
    # vLLM's CPU build hangs a lambda on the layer that calls the kernel it chose: the last name it calls
    chosen = getattr(getattr(module, "cpu_linear", None), "__code__", None)
    kernel = f" ({chosen.co_names[-1]})" if chosen and chosen.co_names else ""
    return type(module).__name__, f"{type(module.quant_method).__name__}{kernel}"


def _custom_op(module: Any) -> tuple[str, str]:
    return type(module).__name__, getattr(module._forward_method, "__name__", str(module._forward_method))


def _by_class(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Module class: what its instances use, with how many instances, e.g. ``forward_cpu x13``."""
    counts = sorted(Counter(pairs).items())
    names = sorted({name for (name, _), _ in counts})
    return {name: ", ".join(f"{what} x{n}" for (other, what), n in counts if other == name) for name in names}
