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


_BEGIN_ONLY = ("limit", "temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "ignore_eos",
               "router_logits", "shard_size", "force")  # fmt: skip


def command(
    context: typer.Context,
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
    trust_remote_code: o.TrustRemoteCode = False,
    dtype: o.Dtype = o.ModelDtype.auto,
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

    jobs.require((arm.value,))
    if prompts is not None:
        sampling = jobs.Sampling(temperature, top_p, top_k, min_p, max_tokens, n, seed, ignore_eos)
        plan = jobs.plan(
            ckpt, revision, prompts, limit, sampling, router_logits.value, shard_size, max_model_len, trust_remote_code
        )
        jobs.announce(plan, output, (arm.value,), dtype.value)
        run, checkpoint, needed_length = plan.create(output, force), plan.checkpoint, plan.max_model_len
    else:
        _refuse_without_effect(context)
        run, checkpoint, needed_length = jobs.join(output, ckpt, revision, max_model_len, trust_remote_code)
        seed = int(run.manifest["sampling"]["seed"])
    if arm is Arm.infer:
        options = jobs.infer_options(
            o.parse_vllm_options(vllm_option),
            dtype=dtype.value,
            trust_remote_code=trust_remote_code or None,
            max_model_len=needed_length,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    else:
        options = jobs.train_options(
            dtype=dtype.value,
            trust_remote_code=trust_remote_code or None,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            device_map=device_map,
        )
    replay = None
    if arm is Arm.train_replay:
        replay = {"source": "infer", "weights": replay_weights, **o.parse_layers(replay_layers)}
    jobs.capture(run, checkpoint, {arm.value: options}, replay)
    jobs.wrote(run.path / "arms" / arm.value)


def _refuse_without_effect(context: typer.Context) -> None:
    """Options that describe a run say nothing about an arm that joins one: better an error than no effect."""
    given = [
        name for name in _BEGIN_ONLY if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise typer.BadParameter(f"{option} begins a run and needs --prompts; without, the arm joins the run at RUN")
