"""``moediag capture infer|train``: one arm at a time, for engines that live in different environments."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moediag.cli import options as o
from moediag.notation import ARMS, INFER, INFER_PRODUCTION, engine_side

NAME = "capture"


Arm = StrEnum("Arm", [(name.replace("-", "_"), name) for name in ARMS])  # type: ignore[misc]


_BEGIN_ONLY = ("limit", "temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "ignore_eos",
               "router_logits", "ids_only", "stop_token_ids", "shard_size", "force")  # fmt: skip


def command(
    context: typer.Context,
    arm: Annotated[
        Arm,
        typer.Argument(
            metavar="ARM",
            help="; ".join(f"{name}: {words}" for name, words in ARMS.items()),
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
    stop_token_ids: o.StopTokenIds = None,
    router_logits: o.Logits = o.RouterLogits.none,
    ids_only: o.IdsOnly = False,
    shard_size: o.ShardSize = 32,
    max_model_len: o.MaxModelLen = None,
    tensor_parallel_size: o.TensorParallel = 1,
    gpu_memory_utilization: o.GpuMemory = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxBatched = None,
    vllm_option: o.VllmOption = None,
    observer: o.ObserverOption = o.Observer.hooks,
    scoring: o.ScoringOption = o.Scoring.prefill,
    attn_implementation: o.AttnImplementation = None,
    experts_implementation: o.ExpertsImplementation = None,
    device_map: o.DeviceMap = None,
    batch_size: o.BatchSize = 1,
    batching: o.LayoutOption = o.Layout.padded,
    replay_weights: o.ReplayWeights = False,
    replay_layers: o.ReplayLayers = None,
    shard_index: o.ShardIndex = None,
    num_shards: o.NumShards = None,
    force: o.Force = False,
) -> None:
    """Capture one arm. With --prompts the run is begun (or resumed); without, the arm joins the run at RUN.

    Several workers may fill one arm at the same time: each takes shards that no other holds. With --shard-index
    and --num-shards they also share the work across machines; merging is then a plain copy (cp -rn B/. A/).
    """
    from moediag.cli import jobs
    from moediag.engines.arms import UNOBSERVED

    worker = o.parse_slice(shard_index, num_shards)

    jobs.require((arm.value,))
    if prompts is not None:
        stops = tuple(stop_token_ids or ())
        sampling = jobs.Sampling(temperature, top_p, top_k, min_p, max_tokens, n, seed, ignore_eos, stops)
        plan = jobs.make_plan(
            jobs.open_checkpoint(ckpt, revision, trust_remote_code),
            prompts,
            sampling,
            limit=limit,
            router_logits=router_logits.value,
            shard_size=shard_size,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
            ids_only=ids_only,
            sampled_by=INFER_PRODUCTION if arm.value == INFER_PRODUCTION else INFER,
        )
        jobs.announce(plan, output, (arm.value,), dtype.value)
        run, checkpoint, needed_length = plan.create(output, force), plan.checkpoint, plan.max_model_len
    else:
        _refuse_without_effect(context)
        run, checkpoint, needed_length = jobs.join(output, ckpt, revision, max_model_len, trust_remote_code)
        seed = int(run.manifest["sampling"]["seed"])
    if engine_side(arm.value) == INFER:
        options = jobs.infer_options(
            o.parse_vllm_options(vllm_option),
            UNOBSERVED if arm.value == INFER_PRODUCTION else observer.value,
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
    run.worker = worker
    request = jobs.arm_request(
        arm.value,
        options,
        run.manifest["completions"],
        sampler=run.sampler,
        observer=observer.value,
        scoring=scoring.value,
        batching=o.parse_batching(batch_size, batching),
        replay={"source": INFER, "weights": replay_weights, **o.parse_layers(replay_layers)},
    )
    jobs.capture(run, checkpoint, [request], is_shared=True)
    jobs.wrote(run.path / "arms" / arm.value)


def _refuse_without_effect(context: typer.Context) -> None:
    """Options that describe a run say nothing about an arm that joins one: better an error than no effect."""
    given = [
        name for name in _BEGIN_ONLY if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise typer.BadParameter(f"{option} begins a run and needs --prompts; without, the arm joins the run at RUN")
