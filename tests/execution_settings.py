"""The awkward ways of running vLLM that a capture must get right, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_MODEL_LEN = 160


@dataclass(frozen=True)
class Setting:
    """One way of running vLLM.

    Args:
        vllm: vLLM options, by their own names.
        sampling: sampling parameters that differ from 24 greedy tokens.
        group: settings of one group share a process; ``v2`` runs the V2 runner, ``mp`` the multi-process engine, ``ep``
            lets the CPU build run experts in parallel.
        is_same_arithmetic: tokens and ids must equal the plain run's.
        in_suite: ``make test`` captures it; the others are of a kind that it has already.
    """

    title: str
    vllm: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    group: str = "v1"
    observer: str = "hooks"
    ids_only: bool = False
    dtype: str = "bfloat16"
    reference: str = "plain"
    is_same_arithmetic: bool = True
    in_suite: bool = True


SETTINGS = {
    "plain": Setting("one process, default scheduler"),
    "chunked": Setting(
        "prefill in chunks of 32 tokens, at most 4 requests at a time (batch larger than the scheduler's)",
        {"max_num_batched_tokens": 32, "max_num_seqs": 4},
    ),
    "preempted": Setting("KV cache of 8 blocks of 32: requests preempted", {"num_gpu_blocks_override": 8,
                                                                           "block_size": 32}),
    "samples": Setting("n = 3 samples per prompt, temperature 1", sampling={"n": 3, "temperature": 1.0},
                       is_same_arithmetic=False, reference=""),
    "stopped": Setting("stop tokens: requests finish in different steps",
                       sampling={"stop_token_ids": (32, 101), "ignore_eos": False}),
    "ids-only": Setting("expert ids only", ids_only=True),
    "float32": Setting("float32", dtype="float32", is_same_arithmetic=False, in_suite=False),
    "tp2": Setting("tensor parallel 2, bfloat16", {"tensor_parallel_size": 2}, is_same_arithmetic=False),
    "tp2-float32": Setting("tensor parallel 2, float32", {"tensor_parallel_size": 2}, dtype="float32",
                           reference="float32", is_same_arithmetic=False, in_suite=False),
    "ep2": Setting("tensor and expert parallel 2, bfloat16",
                   {"tensor_parallel_size": 2, "enable_expert_parallel": True}, group="ep", reference="tp2",
                   is_same_arithmetic=False),
    "ep2-float32": Setting("tensor and expert parallel 2, float32",
                           {"tensor_parallel_size": 2, "enable_expert_parallel": True}, dtype="float32", group="ep",
                           reference="tp2-float32", is_same_arithmetic=False, in_suite=False),
    "pp2": Setting("pipeline parallel 2", {"pipeline_parallel_size": 2}),
    "pp2-tp2": Setting("pipeline parallel 2, each stage tensor parallel 2",
                       {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, reference="tp2", in_suite=False),
    "multiprocess": Setting("engine core in a process of its own", group="mp"),
    "v2-both": Setting("V2 runner (Triton's interpreter), hooks held against vLLM's own record", group="v2",
                       observer="both"),
    "v2-pp2": Setting("V2 runner, pipeline parallel 2", {"pipeline_parallel_size": 2}, group="v2",
                      reference="v2-both", in_suite=False),
    "v2-native": Setting("V2 runner, vLLM's own record only", {"enforce_eager": True}, group="v2", observer="native",
                         in_suite=False),
}  # fmt: skip
