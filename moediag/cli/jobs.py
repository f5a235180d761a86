"""What the capturing commands share: say what will happen, run the engines, show the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moediag.cli.console import bar, note, wrote
from moediag.cli.table import show_table
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import arm_configuration, infer_options, run_infer, run_train, train_options
from moediag.engines.plan import Plan, Sampling, make_plan, needed_length
from moediag.engines.versions import require_infer_engine, require_train_engine
from moediag.errors import CheckpointError, DiskFullError
from moediag.notation import INFER, TRAIN_REPLAY, engine_side
from moediag.results import analyze_run, report_run
from moediag.run.directory import Run, open_run, refuse_other_configuration

__all__ = [
    "Plan",
    "Sampling",
    "announce",
    "capture",
    "finish",
    "infer_options",
    "join",
    "plan",
    "require",
    "train_options",
    "wrote",
]

_TITLES = {"infer": "vLLM (infer)", "train": "transformers (train)", "train-replay": "transformers (train-replay)"}


def require(arms: Iterable[str]) -> None:
    """Refuse before anything else when an engine is missing or of an unsupported version.

    Raises:
        DependencyError: says which and what to install.
    """
    for arm in arms:
        (require_infer_engine if engine_side(arm) == INFER else require_train_engine)()


def plan(
    ckpt: str,
    revision: str | None,
    prompts: Path,
    limit: int | None,
    sampling: Sampling,
    router_logits: str,
    shard_size: int,
    max_model_len: int | None,
    trust_remote_code: bool = False,
) -> Plan:
    """Look at the checkpoint and the prompts; refuses what cannot be done before anything starts."""
    return make_plan(
        open_checkpoint(ckpt, revision, trust_remote_code),
        prompts,
        sampling,
        limit=limit,
        router_logits=router_logits,
        shard_size=shard_size,
        max_model_len=max_model_len,
        trust_remote_code=trust_remote_code,
    )


def announce(plan: Plan, output: Path, arms: tuple[str, ...], dtype: str) -> None:
    """Print what will be done and how much will be written.

    Raises:
        DiskFullError: there is less space than the run may need.
    """
    routing, sampling = plan.checkpoint.routing, plan.sampling
    model = f"{plan.checkpoint.architecture}, {plan.checkpoint.stored_dtype}"
    layers = f"{routing.n_layers} MoE layers, top-{routing.top_k} of {routing.n_experts}" if routing else "dense"
    how = (
        "scoring the given completions" if plan.completion_ids else f"sampling up to {sampling.max_tokens} tokens each"
    )
    n_bytes = plan.max_bytes(len(arms), dtype)
    note(f"Model    {plan.checkpoint.name} ({model}; {layers})")
    note(f"Tokens   {len(plan.prompt_ids)} prompts, {plan.n_sequences} sequences, {how}")
    note(f"Arms     {', '.join(arms)}; hooks force eager execution and no prefix cache in vLLM")
    note(f"Writes   at most {n_bytes / 1e6:,.1f} MB under {output} ({n_bytes / plan.max_token_rows:,.0f} B per token)")
    if not plan.completion_ids and not sampling.is_neutral:
        note("Note     sampling is not neutral (temperature 1, no truncation): k1 and k3 are then no KL estimates")
    if plan.ignored_keys:
        note(f"Note     keys of the prompts file that are not used: {', '.join(plan.ignored_keys)}")
    _refuse_full_disk(output, n_bytes)


def _refuse_full_disk(output: Path, n_bytes: int) -> None:
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    written = sum(path.stat().st_size for path in output.glob("arms/*/shard-*"))
    needed, free = max(0, n_bytes - written), shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFullError(
            f"{output} may need {needed / 1e6:,.1f} MB more, {existing} has {free / 1e6:,.1f} MB free; "
            "free some space, or lower --limit, --max-tokens or --router-logits"
        )


def join(
    output: Path, ckpt: str, revision: str | None, max_model_len: int | None, trust_remote_code: bool
) -> tuple[Run, Checkpoint, int]:
    """An arm for a run that exists: the same weights, wherever they lie on this machine.

    Returns:
        The run, the checkpoint, and the longest sequence vLLM must have room for [tokens].

    Raises:
        RunConflictError: the checkpoint is not the one the run was made with.
    """
    run, checkpoint = open_run(output), open_checkpoint(ckpt, revision, trust_remote_code)
    there = {key: run.configuration.get(key) for key in checkpoint.digests}
    refuse_other_configuration(there, checkpoint.digests, str(output))
    return run, checkpoint, max_model_len or needed_length(run, checkpoint)


def capture(
    run: Run, checkpoint: Checkpoint, options: dict[str, dict[str, Any]], replay: dict[str, Any] | None = None
) -> None:
    """Fill the arms that are named in ``options``, each in an engine process of its own.

    Raises:
        CheckpointError: replay was asked of a dense model, which has no routes.
    """
    if replay and not run.decoder_layers:
        raise CheckpointError(f"{checkpoint.name} is dense: it has no routes to replay; leave the replay arm out")
    for arm, engine_options in options.items():
        forced = replay if arm == TRAIN_REPLAY else None
        if arm in run.arms() and run.is_complete(arm):
            run.begin_arm(arm, {"configuration": arm_configuration(engine_options, forced)})  # refuses other options
            note(f"{_TITLES[arm]}: complete, nothing to capture")
            continue
        with bar(_TITLES[arm]) as progress:
            if arm == INFER:
                run_infer(run, checkpoint, engine_options, progress.on_event)
            else:
                run_train(run, checkpoint, engine_options, progress.on_event, forced)


def finish(run: Run, training_window: int | None = None) -> None:
    """Analyse, draw, report; a short table and where things are."""
    with bar("analysis") as progress:
        progress.on_event({"stage": "metrics"})
        summary = analyze_run(run)
        progress.on_event({"stage": "figures and report"})
        report = report_run(run, training_window)
    show_table({run.path.resolve().name: summary})
    wrote(run.path / "summary.json")
    wrote(report)
