"""``moediag profile``: the main job."""

from __future__ import annotations

from functools import partial

import typer

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
    fp32: o.Float32 = None,
    production_rollouts: o.ProductionRollouts = False,
    training_window: o.TrainingWindow = None,
    no_text: o.NoText = False,
    dry_run: o.DryRun = False,
    force: o.Force = False,
) -> None:
    """Sample in vLLM, score in transformers, analyse, draw and report: both arms of one checkpoint, or of two."""
    from moediag.cli import jobs
    from moediag.notation import INFER, TRAIN
    from moediag.run.writer import RunWriter

    if settings.server is not None and (production_rollouts or infer_checkpoint is not None):
        raise typer.BadParameter(
            "--server samples itself, as it runs: leave --production-rollouts and --infer-checkpoint out"
        )
    jobs.require(INFER if settings.server is None else jobs.INFER_SERVER, TRAIN)
    settings.check_server()
    cluster = settings.cluster()
    plan = settings.plan(ckpt, prompts, jobs.INFER_PRODUCTION if production_rollouts else INFER)
    checkpoints = {TRAIN: plan.checkpoint, INFER: plan.checkpoint}
    if infer_checkpoint is not None:
        checkpoints[INFER] = jobs.open_other(infer_checkpoint, plan, settings.trust_remote_code)
    request = partial(
        settings.request,
        max_model_len=plan.max_model_len,
        seed=settings.seed,
        # what only rollouts may do is left out where the same tokens are decoded again, observed
        is_beside_rollouts=production_rollouts,
    )
    recipes = jobs.profile_recipes(replay, floors, production_rollouts, settings.server is not None)
    if fp32 or (fp32 is None and floors):
        recipes += jobs.float32_recipes(plan, settings, has_other_checkpoint=infer_checkpoint is not None)
    requests = jobs.requests_of(recipes, plan, request)
    other = [len(one.tensors) for one in checkpoints.values() if one is not plan.checkpoint]
    jobs.announce(plan, output, requests, settings.dtype.value, is_anew=force, n_tensors=other)
    if dry_run:
        jobs.end_dry("would capture these arms, then analyse and report")
    run = plan.create(output, force)
    jobs.capture(jobs.Arms(RunWriter(run), requests, checkpoints), cluster=cluster)
    jobs.finish(run, training_window, no_text)
