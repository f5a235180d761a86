"""``moediag profile``: the main job."""

from __future__ import annotations

from moediag.cli import options as o

NAME = "profile"


def command(
    ckpt: o.Ckpt,
    prompts: o.Prompts,
    output: o.Output,
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
    replay: o.Replay = False,
    floors: o.Floors = True,
    production_rollouts: o.ProductionRollouts = False,
    training_window: o.TrainingWindow = None,
    force: o.Force = False,
) -> None:
    """Sample in vLLM, score in transformers, analyse, draw and report: both arms of one checkpoint."""
    from moediag.cli import jobs
    from moediag.notation import INFER, INFER_PRODUCTION

    jobs.require(("infer", "train"))
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
        sampled_by=INFER_PRODUCTION if production_rollouts else INFER,
    )
    vllm_options = o.parse_vllm_options(vllm_option)
    vllm_named = {
        "dtype": dtype.value,
        "trust_remote_code": trust_remote_code or None,
        "max_model_len": plan.max_model_len,
        "seed": seed,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    production = jobs.infer_options(vllm_options, jobs.UNOBSERVED, **vllm_named) if production_rollouts else None
    # What only rollouts may do is left out where the same tokens are decoded again, observed.
    observable = jobs.observable(vllm_options) if production_rollouts else vllm_options
    infer = jobs.infer_options(observable, observer.value, **vllm_named)
    train = jobs.train_options(
        dtype=dtype.value,
        trust_remote_code=trust_remote_code or None,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        device_map=device_map,
    )
    requests = jobs.profile_requests(
        plan,
        infer,
        train,
        replay,
        floors,
        observer.value,
        scoring.value,
        o.parse_batching(batch_size, batching),
        production,
    )
    jobs.announce(plan, output, [request.arm for request in requests], dtype.value)
    run = plan.create(output, force)
    jobs.capture(run, plan.checkpoint, requests)
    jobs.finish(run, training_window)
