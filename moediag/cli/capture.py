"""``moediag capture infer|train``: one arm at a time, for engines that live in different environments."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moediag.cli import options as o

NAME = "capture"


class Arm(StrEnum):
    """Arms this version captures."""

    infer = "infer"
    train = "train"
    train_replay = "train-replay"


def command(
    arm: Annotated[
        Arm,
        typer.Argument(
            metavar="infer|train|train-replay",
            help="infer: vLLM; train: transformers; train-replay: with vLLM's experts.",
        ),
    ],
    ckpt: o.Ckpt,
    output: o.Output,
    prompts: o.OptionalPrompts = None,
    limit: o.Limit = None,
    revision: o.Revision = None,
    dtype: o.Dtype = "auto",
    temperature: o.Temperature = 1.0,
    top_p: o.TopP = 1.0,
    top_k: o.TopK = 0,
    min_p: o.MinP = 0.0,
    max_tokens: o.MaxTokens = 256,
    n: o.Samples = 1,
    seed: o.Seed = 0,
    ignore_eos: o.IgnoreEos = False,
    router_logits: o.Logits = o.RouterLogits.none,
    shard_size: o.ShardSize = 32,
    max_model_len: o.MaxModelLen = None,
    tensor_parallel_size: o.TensorParallel = 1,
    gpu_memory_utilization: o.GpuMemory = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxBatched = None,
    vllm_option: o.VllmOption = None,
    attn_implementation: o.AttnImplementation = None,
    experts_implementation: o.ExpertsImplementation = None,
    device_map: o.DeviceMap = None,
    replay_weights: o.ReplayWeights = False,
    replay_layers: o.ReplayLayers = None,
    force: o.Force = False,
) -> None:
    """Capture one arm. With --prompts the run is begun (or resumed); without, the arm joins the run at RUN."""
    from moediag.cli import jobs

    if prompts is not None:
        sampling = jobs.Sampling(temperature, top_p, top_k, min_p, max_tokens, n, seed, ignore_eos)
        plan = jobs.plan(ckpt, revision, prompts, limit, sampling, router_logits.value, shard_size, max_model_len)
        jobs.announce(plan, output, arms=(arm.value,))
        run, checkpoint, needed_length = plan.create(output, force), plan.checkpoint, plan.max_model_len
    else:
        run, checkpoint, needed_length = jobs.join(output, ckpt, revision, max_model_len)
    if arm is Arm.infer:
        options = jobs.infer_options(
            o.parse_vllm_options(vllm_option),
            dtype=dtype,
            max_model_len=needed_length,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    else:
        options = jobs.train_options(
            dtype=dtype,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            device_map=device_map,
        )
    replay = None
    if arm is Arm.train_replay:
        replay = {"source": "infer", "weights": replay_weights, **o.parse_layers(replay_layers)}
    jobs.capture(run, checkpoint, {arm.value: options}, replay)
    jobs.wrote(run.path / "arms" / arm.value)
