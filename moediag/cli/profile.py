"""``moediag profile``: the main job."""

from __future__ import annotations

from moediag.cli import options as o
from moediag.cli.settings import Settings, with_settings

NAME = "profile"


@with_settings
def command(
    ckpt: o.Ckpt,
    prompts: o.Prompts,
    output: o.Output,
    settings: Settings,
    infer_checkpoint: o.InferCheckpoint = None,
    replay: o.Replay = False,
    floors: o.Floors = True,
    production_rollouts: o.ProductionRollouts = False,
    training_window: o.TrainingWindow = None,
    no_text: o.NoText = False,
    force: o.Force = False,
) -> None:
    """Sample in vLLM, score in transformers, analyse, draw and report: both arms of one checkpoint, or of two."""
    from moediag.cli import jobs
    from moediag.notation import INFER, TRAIN
    from moediag.run.writer import RunWriter

    jobs.require(INFER, TRAIN)
    plan = settings.plan(ckpt, prompts, jobs.INFER_PRODUCTION if production_rollouts else INFER)
    checkpoints = {TRAIN: plan.checkpoint, INFER: plan.checkpoint}
    if infer_checkpoint is not None:
        checkpoints[INFER] = jobs.open_other(infer_checkpoint, plan, settings.trust_remote_code)
    needed, extra = (plan.max_model_len, settings.seed), settings.vllm_options
    production = settings.infer_options(extra, jobs.UNOBSERVED, *needed) if production_rollouts else None
    # What only rollouts may do is left out where the same tokens are decoded again, observed.
    observable = jobs.observable(extra) if production_rollouts else extra
    requests = jobs.profile_requests(
        plan,
        settings.infer_options(observable, settings.observer.value, *needed),
        settings.train_options(),
        replay,
        floors,
        settings.observer.value,
        settings.scoring.value,
        settings.train_batching,
        production,
    )
    jobs.announce(plan, output, requests, settings.dtype.value, is_anew=force)
    run = plan.create(output, force)
    jobs.capture(jobs.Arms(RunWriter(run), requests, checkpoints))
    jobs.finish(run, training_window, no_text)
