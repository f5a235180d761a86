"""What the capturing commands share: say what will happen, run the engines, show the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moediag.cli.console import bar, note, wrote
from moediag.cli.table import show_table
from moediag.engines.arms import HOOKS, PREFILL, UNOBSERVED, ArmRequest, arm_request
from moediag.engines.channel import Engines
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import fill_arm, infer_options, observable, train_options
from moediag.engines.plan import Plan, Sampling, make_plan, needed_length
from moediag.engines.versions import require_infer_engine, require_train_engine
from moediag.errors import CheckpointError, CorruptRunError, DiskFullError, IncompleteRunError
from moediag.notation import INFER, INFER_PRODUCTION, TRAIN, TRAIN_REPLAY, engine_side
from moediag.results import analyze_run, report_run
from moediag.run.create import bring_back
from moediag.run.directory import MANIFEST, Run, open_run, refuse_other_configuration
from moediag.run.replace import drop_replaced, replaced

__all__ = [
    "UNOBSERVED",
    "ArmRequest",
    "Arms",
    "Plan",
    "Sampling",
    "announce",
    "arm_request",
    "capture",
    "finish",
    "infer_options",
    "join",
    "make_plan",
    "observable",
    "open_checkpoint",
    "profile_requests",
    "require",
    "train_options",
    "wrote",
]


def require(arms: Iterable[str]) -> None:
    """Refuse before anything else when an engine is missing or of an unsupported version.

    Raises:
        DependencyError: says which and what to install.
    """
    for arm in arms:
        (require_infer_engine if engine_side(arm) == INFER else require_train_engine)()


def profile_requests(
    plan: Plan,
    infer: dict[str, Any],
    train: dict[str, Any],
    replay: bool,
    with_floors: bool,
    observer: str = HOOKS,
    scoring: str = PREFILL,
    batching: dict[str, Any] | None = None,
    production: dict[str, Any] | None = None,
) -> list[ArmRequest]:
    """The arms of the main job, in the order in which they are captured.

    Args:
        with_floors: each engine against itself as well, and the scale of one-ulp noise.
        production: vLLM's options where unobserved rollouts sample the tokens.
    """
    given = plan.completion_ids is not None
    floors = ["infer-repeat", "train-repeat", "train-perturbed"]
    engines = {INFER_PRODUCTION: production, INFER: infer, TRAIN: train}
    sampler = [INFER_PRODUCTION] if production is not None else []
    arms = [*sampler, INFER, TRAIN, *([TRAIN_REPLAY] if replay else []), *(floors if with_floors else [])]
    return [
        arm_request(
            arm,
            engines.get(arm) or engines[engine_side(arm)] or {},
            given,
            sampler=plan.sampled_by,
            observer=observer,
            scoring=scoring,
            batching=batching,
        )
        for arm in arms
    ]


def announce(plan: Plan, output: Path, arms: Sequence[str], dtype: str, is_anew: bool = False) -> None:
    """Print what will be done and how much will be written.

    Args:
        is_anew: the run that is there is kept until the new one is complete, and none of it is used again.

    Raises:
        DiskFullError: there is less space than the run may need.
    """
    routing, sampling = plan.checkpoint.routing, plan.sampling
    model = f"{plan.checkpoint.architecture}, {plan.checkpoint.stored_dtype}"
    layers = f"{routing.n_layers} MoE layers, top-{routing.top_k} of {routing.n_experts}" if routing else "dense"
    how = (
        "scoring the given completions" if plan.completion_ids else f"sampling up to {sampling.max_tokens} tokens each"
    )
    n_bytes = plan.max_bytes(arms, dtype)
    note(f"Model    {plan.checkpoint.name} ({model}; {layers})")
    note(f"Tokens   {len(plan.prompt_ids)} prompts, {plan.n_sequences} sequences, {how}")
    note(f"Arms     {', '.join(arms)}; hooks force eager execution and no prefix cache in vLLM")
    if plan.full_vocab:
        n_vocab = plan.vocabulary_bytes(plan.full_vocab)
        note(
            f"Vocab    whole next-token distributions of {plan.full_vocab} of {plan.n_sequences} sequences, "
            f"at most {n_vocab / 1e6:,.1f} MB per arm of infer and train (--full-vocab 0: none)"
        )
    per_token = replace(plan, full_vocab=0).max_bytes(arms, dtype) / plan.max_token_rows
    beside = " beside whole distributions" if plan.full_vocab else ""
    note(f"Writes   at most {n_bytes / 1e6:,.1f} MB under {output} ({per_token:,.0f} B per token{beside})")
    if not plan.completion_ids and not sampling.is_neutral:
        note("Note     sampling is not neutral (temperature 1, no truncation): k1 and k3 are then no KL estimates")
    if plan.ignored_keys:
        note(f"Note     keys of the prompts file that are not used: {', '.join(plan.ignored_keys)}")
    _refuse_full_disk(output, n_bytes, is_anew)


def _refuse_full_disk(output: Path, n_bytes: int, is_anew: bool) -> None:
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    written = 0 if is_anew else sum(path.stat().st_size for path in output.glob("arms/*/shard-*"))
    needed, free = max(0, n_bytes - written), shutil.disk_usage(existing).free
    if free < needed:
        raise DiskFullError(
            f"{output} may need {needed / 1e6:,.1f} MB more, {existing} has {free / 1e6:,.1f} MB free; "
            "free some space, or lower --limit, --max-tokens, --full-vocab or --router-logits"
        )


def join(
    output: Path, ckpt: str, revision: str | None, max_model_len: int | None, trust_remote_code: bool
) -> tuple[Run, Checkpoint, int]:
    """An arm for a run that exists: the same weights, wherever they lie on this machine.

    Returns:
        The run, the checkpoint, and the longest sequence vLLM must have room for [tokens].

    Raises:
        RunConflictError: the checkpoint is not the one the run was made with.
        CorruptRunError: run.json does not say how sequences are sampled.
    """
    run, checkpoint = open_run(output), open_checkpoint(ckpt, revision, trust_remote_code)
    lacking = [key for key in ("max_tokens", "n", "seed") if key not in run.manifest["sampling"]]
    if lacking:
        raise CorruptRunError(f"{output / MANIFEST} does not say sampling {lacking}, so no arm can join it; restore it")
    there = {key: run.configuration.get(key) for key in checkpoint.digests}
    refuse_other_configuration(there, checkpoint.digests, str(output))
    return run, checkpoint, max_model_len or needed_length(run, checkpoint)


@dataclass(frozen=True)
class Arms:
    """Arms of a run to be filled from one checkpoint."""

    run: Run
    checkpoint: Checkpoint
    requests: Sequence[ArmRequest]

    def refuse_replay_without_routes(self) -> None:
        """Refuse what a dense model does not have.

        Raises:
            CheckpointError: replay is asked of it.
        """
        if any(request.replay for request in self.requests) and not self.run.decoder_layers:
            raise CheckpointError(
                f"{self.checkpoint.name} is dense: it has no routes to replay; leave the replay arm out"
            )


def capture(*captures: Arms, is_shared: bool = False) -> None:
    """Fill the worker's slice of the arms asked for, with as few engine processes and loads as there can be.

    Args:
        is_shared: shards may be left to other workers; else every arm must be complete before the next begins.

    Raises:
        CheckpointError: replay was asked of a dense model, which has no routes.
        IncompleteRunError: other workers still hold shards, and the arm is not ``is_shared``.
    """
    with ExitStack() as stack:
        for one in captures:
            stack.enter_context(_replacing(one.run))
            stack.enter_context(one.run.in_use())
            one.refuse_replay_without_routes()
        engines = stack.enter_context(Engines())
        for one, request in _by_engine(captures):
            named = title(request.arm) if len(captures) == 1 else f"{one.run.path.name}: {title(request.arm)}"
            if one.run.own_missing_shards(request.arm):
                with bar(named) as progress:
                    fill_arm(engines, one.run, one.checkpoint, request, progress.on_event)
            else:
                _check_captured(one.run, request, named)
            _tell_what_remains(one.run, request.arm, named, is_shared)
    for one in captures:
        if all(one.run.is_complete(request.arm) for request in one.requests):
            drop_replaced(one.run.path)


def _by_engine(captures: Sequence[Arms]) -> list[tuple[Arms, ArmRequest]]:
    """Arms of one environment beside each other, and of these those of one checkpoint: unobserved vLLM, vLLM, train."""
    pairs = [(one, request) for one in captures for request in one.requests]
    return sorted(pairs, key=lambda pair: (pair[1].side == TRAIN, pair[1].observer != UNOBSERVED))


@contextmanager
def _replacing(run: Run) -> Iterator[None]:
    """The run that --force set aside comes back when the new one ends before its first shard; say what is where."""
    kept = replaced(run.path)
    where = f"the run that was in {run.path} is kept in {kept}"
    if kept.exists():
        note(f"Note     {where} until the new one is complete")
    try:
        yield
    except BaseException as error:
        failed = bring_back(run.path)
        if failed is not None:
            logs = str(run.path / "logs")
            error.args = tuple(str(part).replace(logs, str(failed / "logs")) for part in error.args)
            note(f"Note     {run.path} is again the run that was there; what did not start lies in {failed}")
        elif kept.exists():
            note(f"Note     {where}; the same command without --force goes on with the new one")
        raise


def title(arm: str) -> str:
    """The arm as progress calls it."""
    return f"{'vLLM' if engine_side(arm) == INFER else 'transformers'} ({arm})"


def _check_captured(run: Run, request: ArmRequest, named: str) -> None:
    """Nothing to do, if what is there was made as asked."""
    arm = request.arm
    if arm in run.arms():
        run.begin_arm(arm, {"configuration": request.configuration()})  # refuses other options
    elif run.is_complete(arm):
        raise IncompleteRunError(
            f"{run.path / 'arms' / arm} holds every shard but no arm.json, which says how they were made; "
            f"restore it, or delete the folder and capture {arm} again"
        )
    slice_ = "" if run.is_complete(arm) else f"slice {run.worker} is "
    note(f"{named}: {slice_}complete, nothing to capture")


def _tell_what_remains(run: Run, arm: str, named: str, is_shared: bool) -> None:
    """Shards of other workers: a remark where the arm is shared, else the end of the command."""
    missing = run.missing_shards(arm)
    if not missing:
        return
    n_held = sum(run.is_claimed(arm, shard) for shard in missing)
    remain = f"{len(missing)} of {len(run.shards)} shards of arm {arm} remain ({n_held} being captured by others now)"
    if not is_shared:
        raise IncompleteRunError(f"{run.path}: {remain}; run the same command again when the other workers are done")
    is_done = not run.own_missing_shards(arm)
    note(f"{named}: {f'slice {run.worker} is complete; ' if is_done else ''}{remain}")


def finish(run: Run, training_window: int | None = None, no_text: bool = False) -> None:
    """Analyse, draw, report; a short table and where things are."""
    with bar("analysis") as progress:
        progress.on_event({"stage": "metrics"})
        summary = analyze_run(run, no_text=no_text)
        progress.on_event({"stage": "figures and report"})
        report = report_run(run, training_window, no_text=no_text)
    show_table({run.path.resolve().name: summary})
    wrote(run.path / "summary.json")
    wrote(report.with_suffix(".html"))
    wrote(report)
