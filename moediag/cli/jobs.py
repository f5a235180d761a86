"""What the capturing commands share: announce what will happen, run the engines, show the result."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from moediag.cli import options as o
from moediag.cli.console import Bar, bar, doing, note, wrote
from moediag.cli.table import show_table
from moediag.engines.arms import AUTO, HOOKS, UNOBSERVED, ArmRequest, Reference
from moediag.engines.checkpoint import Checkpoint, compare_checkpoints, compare_records, open_checkpoint
from moediag.engines.launch import ENGINES, Engines, OnEvent, appended, choose_observer, fill_arm
from moediag.engines.plan import Plan, check_loadable, known_sampling, why_no_float32
from moediag.engines.tokenised import refuse_other_tokenizer
from moediag.engines.versions import remarks
from moediag.errors import CheckpointError, DiskFullError, EngineError, IncompleteRunError, RunConflictError
from moediag.notation import INFER, TRAIN
from moediag.results import analyze_run, report_run
from moediag.results.size import records_bytes, results_bytes
from moediag.run.create import bring_back, drop_replaced, replaced
from moediag.run.reader import Run, open_run
from moediag.run.recipes import ENGINE_WORDS, TRANSFORMERS, VLLM, recipe
from moediag.run.records import CheckpointRecord, Tokenizer
from moediag.run.store import store_of
from moediag.run.writer import RunWriter

if TYPE_CHECKING:
    from moediag.cli.settings import Settings
    from moediag.engines.cluster import ClusterOptions

INFER_PRODUCTION, INFER_SERVER = "infer-production", "infer-server"
FLOAT32 = ("infer-fp32", "train-fp32", "train-fp32-perturbed")

Requesting = Callable[..., ArmRequest]
"""Gives the request of a recipe's arm: recipe, whether completions are given, and what ``arm_request`` takes."""


def require(*recipes: str, is_slice: bool = False) -> None:
    """Refuse before anything else when the engine of a recipe is missing or too old; note what is newer than tried.

    Args:
        is_slice: the command was given which part of the work is its own.

    Raises:
        DependencyError: says which and what to install.
        EngineError: a launcher (torchrun) started the command on several ranks.
    """
    n_ranks = os.environ.get("WORLD_SIZE", "")
    if not is_slice and n_ranks.isdecimal() and int(n_ranks) > 1:
        raise EngineError(
            f"a launcher started {n_ranks} ranks of this command (WORLD_SIZE={n_ranks}), and each would make the whole "
            "run; start it once: it starts the engines' processes itself (--tensor-parallel-size, --device-map), and "
            "several workers with --ray, or capture with --shard-index and --num-shards; where no launcher is meant, "
            "unset WORLD_SIZE"
        )
    engines = [ENGINES[name] for name in dict.fromkeys(recipe(name).engine for name in recipes)]
    with doing("looking at the installed engines"):
        for engine in engines:
            engine.require()
    for remark in remarks(*dict.fromkeys(package for engine in engines for package in engine.packages)):
        note(f"Note     {remark}")


def profile_recipes(replay: bool, floors: bool, production: bool = False, has_server: bool = False) -> list[str]:
    """The arms of the main job, in the order in which they are captured.

    Args:
        floors: each engine against itself as well, and the scale of one-ulp noise.
        production: unobserved rollouts sample the tokens.
        has_server: a running server samples them, as the arm ``infer``.
    """
    first = [INFER_PRODUCTION] if production else []
    again = "infer-server-rescore" if has_server else "infer-repeat"
    own = [again, "train-repeat", "train-perturbed"] if floors else []
    return [*first, INFER_SERVER if has_server else INFER, TRAIN, *(["train-replay"] if replay else []), *own]


def float32_recipes(plan: Plan, settings: Settings, has_other_checkpoint: bool = False) -> list[str]:
    """The arms that tell whether both engines compute the same function; none, with a note, where they cannot be made.

    Args:
        has_other_checkpoint: the engines load two checkpoints.
    """
    why = why_no_float32(plan.checkpoint, settings.dtype.value, settings.tensor_parallel_size)
    if settings.server is not None:
        why = "the server's weights cannot be loaded in float32 from here"
    if has_other_checkpoint:
        why = "the engines load two checkpoints: one checkpoint in both tells the engines' part"
    if why:
        note(f"Float32  not run: {why}")
        return []
    n_covered = min(plan.n_sequences, plan.shard_size)
    note(
        f"Float32  both engines once more in float32 on {n_covered} of {plan.n_sequences} sequences: do they compute "
        "the same function? (--no-fp32 leaves it out)"
    )
    return list(FLOAT32)


def why_no_replay(checkpoint: Checkpoint, dtype: str) -> str:
    """Why experts cannot be forced on transformers' model; empty where nothing its routers showed speaks against it."""
    if checkpoint.routing is None:
        return "a dense model has no routes"
    fitted = checkpoint.proof(dtype).fit
    return "" if fitted.rule is None else fitted.replay


def requests_of(recipes: Sequence[str], plan: Plan, request_of: Requesting) -> list[ArmRequest]:
    """The requests of a planned run's arms, each beside the reference arm of its role among those before it."""
    requests: list[ArmRequest] = []
    for name in recipes:
        made, there = recipe(name), {request.arm: request for request in requests}
        of = made.of or made.role
        reference = Reference(of, there[of].path, there[of].engine) if of in there else Reference(of)
        arm = INFER if name == INFER_SERVER else name
        given = plan.completion_ids is not None
        more = {"sampler": plan.sampled_by, "reference": reference, "n_shards": made.first_shards}
        requests.append(request_of(name, given, arm=arm, **more))
    return requests


def announce(
    plan: Plan,
    output: Path,
    requests: Sequence[ArmRequest],
    dtype: str,
    is_anew: bool = False,
    has_results: bool = True,
    n_tensors: Sequence[int] = (),
) -> None:
    """Print what will be done and how much will be written.

    Args:
        is_anew: the run that is there is kept until the new one is complete, and none of it is used again.
        has_results: the arms are analysed and reported, too.
        n_tensors: of each further checkpoint that is loaded.

    Raises:
        DiskFullError: there is less space than the run may need.
    """
    routing, sampling = plan.checkpoint.routing, plan.sampling
    model = f"{plan.checkpoint.architecture}, {plan.checkpoint.stored_dtype}"
    layers = f"{routing.n_layers} MoE layers, top-{routing.top_k} of {routing.n_experts}" if routing else "dense"
    how = (
        "scoring the given completions" if plan.completion_ids else f"sampling up to {sampling.max_tokens} tokens each"
    )
    n_arms, n_layers = len(requests), routing.n_layers if routing else 0
    n_shards = -(-plan.n_sequences // plan.shard_size)
    n_bytes = plan.max_bytes(requests, dtype)
    n_bytes += records_bytes([len(plan.checkpoint.tensors), *n_tensors], n_arms, n_shards, n_layers)
    n_results = 0
    if has_results:
        n_prompt = sum(map(len, plan.prompt_ids)) * (plan.n_sequences // len(plan.prompt_ids))
        n_tokens = plan.max_token_rows - n_prompt
        n_results = results_bytes(n_tokens, plan.n_sequences, n_arms, n_layers, plan.full_vocab > 0)
    note(f"Model    {plan.checkpoint.name} ({model}; {layers})")
    note(f"Tokens   {len(plan.prompt_ids)} prompts, {plan.n_sequences} sequences, {how}")
    forced = {request.observer for request in requests if request.engine == VLLM} - {UNOBSERVED}
    note(
        f"Arms     {', '.join(request.arm for request in requests)}"
        f"{'; hooks force eager execution and no prefix cache in vLLM' if forced else ''}"
    )
    if plan.full_vocab:
        n_vocab = plan.vocabulary_bytes(plan.full_vocab)
        note(
            f"Vocab    whole next-token distributions of {plan.full_vocab} of {plan.n_sequences} sequences, "
            f"at most {n_vocab / 1e6:,.1f} MB per arm of infer and train (--full-vocab 0: none)"
        )
    per_token = replace(plan, full_vocab=0).max_bytes(requests, dtype) / plan.max_token_rows
    beside = " beside whole distributions" if plan.full_vocab else ""
    results = f" and tables, figures and pages at most {n_results / 1e6:,.1f} MB" if has_results else ""
    note(
        f"Writes   at most {(n_bytes + n_results) / 1e6:,.1f} MB under {output}: arms at most {n_bytes / 1e6:,.1f} MB "
        f"({per_token:,.0f} B per token{beside}){results}"
    )
    if not plan.completion_ids and not sampling.is_neutral:
        note("Note     sampling is not neutral (temperature 1, no truncation): k1 and k3 are then no KL estimates")
    if plan.ignored_keys:
        note(f"Note     keys of the prompts file that are not used: {', '.join(plan.ignored_keys)}")
    _refuse_full_disk(output, n_bytes + n_results, is_anew)


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
    output: Path,
    ckpt: str,
    revision: str | None,
    trust_remote_code: bool,
    is_other_checkpoint: bool,
    is_observed: bool = True,
) -> tuple[Run, Checkpoint]:
    """An arm for a run that exists: the run's checkpoint, wherever it lies on this machine, or another one.

    Args:
        is_observed: the arm records routing.

    Raises:
        RunConflictError: the checkpoint is not the one the run was made with, or it is and was called another.
        CheckpointError: the other checkpoint's tokenizer gives tokens other ids.
        CorruptRunError: run.json does not say how sequences are sampled.
        SchemaVersionError: the run was made by an earlier version.
    """
    with doing(f"reading {ckpt} and hashing its weights"):
        run, checkpoint = open_run(output), open_checkpoint(ckpt, revision, trust_remote_code)
        _ = checkpoint.record
    checkpoint = replace(checkpoint, is_observed=is_observed)
    RunWriter(run).refuse_earlier_schema()
    known_sampling(run)
    there = None if run.record.checkpoint is None else run.checkpoint(run.record.checkpoint)
    if there is not None and there.digest != checkpoint.record.digest and not is_other_checkpoint:
        raise RunConflictError(
            f"{output} was made with another checkpoint: {there.words} there, {checkpoint.record.words} given; use "
            "another -o, or --other-checkpoint to compare the two"
        )
    if run.record.tokenizer is not None:
        refuse_other_tokenizer(run.record.tokenizer, checkpoint, trust_remote_code)
    return run, checkpoint


def reference_for(run: Run, name: str, arm: str, checkpoint: Checkpoint) -> tuple[Reference, bool]:
    """The arm that a recipe's arm repeats or changes, and whether what it changes are the weights.

    Args:
        name: of the recipe.
        arm: what the arm is to be called.

    Raises:
        RunConflictError: an arm of that name is there, of other weights.
    """
    made, digest = recipe(name), checkpoint.record.digest
    records = [run.arm(one) for one in run.arms()]
    if made.of:
        found = next((one for one in records if one.captured and one.captured.recipe == made.of), None)
        return Reference(found.name, found.path, found.engine) if found else Reference(made.of), False
    there = next((one for one in records if one.name == run.reference(made.role)), None)
    if made.change is not None:
        own = [one for one in records if (one.role, one.engine) == (made.role, made.engine)]
        own = [one for one in own if one.change in (None, "checkpoint", "engine") and one.checkpoint == digest]
        found = next(iter(own), there)
        return Reference(found.name, found.path, found.engine) if found else Reference(made.role), False
    if there is None or there.name == arm:
        if there is not None and there.checkpoint != digest:
            source = run.checkpoint_of(arm)
            raise RunConflictError(
                f"{run.path} has an arm {arm} of another checkpoint ({source.words if source else 'not recorded'}); "
                f"give the one of {checkpoint.record.words} a name of its own with --name"
            )
        return Reference(made.role, there.path if there else None), False
    return Reference(there.name, there.path, there.engine), there.checkpoint not in (None, digest)


def end_dry(words: str) -> NoReturn:
    """The end of a command under --dry-run, which has said what it would do."""
    note(f"Dry run  {words}; nothing was started or written")
    raise typer.Exit


def open_other(name: str, plan: Plan, trust_remote_code: bool) -> Checkpoint:
    """A second checkpoint for a run that is planned.

    Raises:
        CheckpointError: it cannot be loaded, or its tokenizer gives tokens other ids.
    """
    with doing(f"reading {name} and hashing its weights"):
        checkpoint = open_checkpoint(name, None, trust_remote_code)
        check_loadable(checkpoint, trust_remote_code)
        _ = checkpoint.record
    ours = plan.checkpoint.digests["tokenizer_sha256"]
    refuse_other_tokenizer(Tokenizer(files_sha256=ours, map_sha256=plan.map_sha256), checkpoint, trust_remote_code)
    return checkpoint


@dataclass(frozen=True)
class Arms:
    """Arms of a run to be filled.

    Args:
        checkpoints: what the arms of each role load.
    """

    writer: RunWriter
    requests: Sequence[ArmRequest]
    checkpoints: Mapping[str, Checkpoint]

    def checkpoint(self, request: ArmRequest) -> Checkpoint:
        """What an arm loads."""
        return self.checkpoints[recipe(request.recipe).role]

    def observed(self, engines: Engines) -> Arms:
        """The same, with the observer chosen that ``--observer auto`` leaves open; one for all arms of vLLM."""
        waiting = [request for request in self.requests if request.observer == AUTO and request.engine == VLLM]
        observer = HOOKS  # transformers has no other
        if waiting:
            with bar("observer") as progress:
                checkpoint = self.checkpoint(waiting[0])
                observer, why = choose_observer(engines, self.writer, checkpoint, waiting[0], progress.on_event)
            note(f"Observer {observer}: {why}")
        chosen = [
            one if one.observer != AUTO else replace(one, observer=observer if one in waiting else HOOKS)
            for one in self.requests
        ]
        return replace(self, requests=chosen)

    def refuse(self) -> None:
        """Refuse what cannot be captured, before any engine is started.

        Raises:
            CheckpointError: replay of a dense model, which has no routes.
            RunConflictError: an arm is there that was made another way.
            IncompleteRunError: an arm has every shard, but nothing says how they were made.
        """
        run = self.writer.run
        for request in self.requests:
            checkpoint = self.checkpoint(request)
            if request.replay and checkpoint.routing is None:
                raise CheckpointError(
                    f"{checkpoint.name} is dense: it has no routes to replay; leave the replay arm out"
                )
            if request.arm not in run.arms():
                if run.is_complete(request.arm):
                    raise IncompleteRunError(
                        f"{run.arm_folder(request.arm)} holds every shard but no arm.json, which says how they were "
                        f"made; restore it, or delete the folder and capture {request.arm} again"
                    )
                continue
            self.writer.refuse_other_request(
                request.arm, request.recipe, request.variant_of, checkpoint.record, request.configuration()
            )
            self.writer.widen_arm(request.arm, request.n_shards)

    def compare_weights(self) -> None:
        """Keep how every other checkpoint differs from the run's, once."""
        run = self.writer.run
        if run.record.checkpoint is None:  # imported: no dump names one
            for one in self.checkpoints.values():
                self.writer.add_checkpoint(one.record)
            return
        there = run.checkpoint(run.record.checkpoint)
        for other in self.checkpoints.values():
            record = other.record
            if record.digest == there.digest or run.has_comparison(there.digest, record.digest):
                continue
            with bar("comparing the weights") as progress:
                own = self._at_hand(there)
                if own is not None:
                    comparison = compare_checkpoints(own, other, lambda done, n: progress.show(done, n, "bytes"))
                else:
                    found = compare_records(there, record)
                    if found is None:
                        continue
                    comparison = found
            self.writer.add_checkpoint(record)
            self.writer.add_comparison(comparison)
            note(f"Weights  {record.source} against {there.source}: {comparison.summary}")

    def _at_hand(self, record: CheckpointRecord) -> Checkpoint | None:
        """The run's checkpoint, where it is one of these or still lies where it lay."""
        given = next((one for one in self.checkpoints.values() if one.record.digest == record.digest), None)
        if given is not None:
            return given
        try:
            found = open_checkpoint(record.source, record.revision, is_at_hand=True)
            return found if found.record.digest == record.digest else None
        except CheckpointError:
            return None


def capture(*captures: Arms, is_shared: bool = False, cluster: ClusterOptions | None = None) -> None:
    """Fill the worker's slice of the requested arms, with as few engine processes and loads as there can be.

    Args:
        cluster: the Ray cluster whose workers do so; None = this machine does.
        is_shared: shards may be left to other workers; else every arm must be complete before the next begins.

    Raises:
        MoediagError: as :meth:`Arms.refuse`, and what an engine raised.
        IncompleteRunError: other workers still hold shards, and the arm is not ``is_shared``.
    """
    with ExitStack() as stack:
        for one in captures:
            stack.enter_context(_replacing(one.writer.run))
            stack.enter_context(one.writer.in_use())
            if (store := store_of(one.writer.run.path)) is not None:
                store.refuse_unwritable()
        engines = stack.enter_context(Engines() if cluster is None else _on_ray(cluster))
        captures = tuple(one.observed(engines) for one in captures)
        for one in captures:
            one.refuse()
            one.compare_weights()
        work = _by_engine(captures)
        spent = Spent()
        pace = Pace([(request.engine, _n_waiting(one.writer, request)) for one, request in work])
        for nth, (one, request) in enumerate(work):
            writer, run = one.writer, one.writer.run
            named = title(request) if len(captures) == 1 else f"{run.path.name}: {title(request)}"
            named = named if len(work) == 1 else f"arm {nth + 1} of {len(work)}: {named}"
            if writer.own_missing_shards(request.arm):
                with bar(named, request.arm) as progress, pace.of(nth, progress, one.checkpoint(request)) as on_event:
                    fill_arm(
                        engines, writer, one.checkpoint(request), request, spent.beside(run, request.arm, on_event)
                    )
            else:
                slice_ = "" if run.is_complete(request.arm) else f"slice {writer.worker} is "
                note(f"{named}: {slice_}complete, nothing to capture")
            _note_what_remains(writer, request.arm, named, is_shared)
    spent.note()
    for one in captures:
        if all(one.writer.run.is_complete(request.arm) for request in one.requests):
            drop_replaced(one.writer.run.path)


def _on_ray(options: ClusterOptions) -> Engines:
    from moediag.engines.ray_workers import Cluster

    cluster = Cluster(options)
    note(f"Ray      {cluster.line}")
    return cluster


class Spent:
    """Where the time of a capture goes, by worker and stage [s].

    Stages: starting the engine process, loading the model, proving what its routers do, computing (forwards, and
    taking out what they gave), writing; of a worker on Ray carrying (events, and a shard's files where they travel),
    waiting for a shard to do, and what it lost. Kept in ``logs/seconds.jsonl``, beside the engines' own output, since
    no two captures take the same time.
    """

    def __init__(self) -> None:
        self._by_worker: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def beside(self, run: Run, arm: str, on_event: OnEvent) -> OnEvent:
        """What an arm's engine reports to; gives on what is not about time."""

        def hear(event: dict[str, Any]) -> None:
            if "seconds" not in event:
                on_event(event)
                return
            worker = event.get("worker", "engine")
            for stage, took in event["seconds"].items():
                self._by_worker[worker][stage] += took
            seconds = {stage: round(took, 3) for stage, took in event["seconds"].items()}
            with appended(run.path / "logs" / "seconds.jsonl") as log:
                log.write(json.dumps({"arm": arm, "worker": worker, "seconds": seconds}).encode() + b"\n")

        return hear

    def note(self) -> None:
        """A line of each worker that took any time."""
        for worker, seconds in sorted(self._by_worker.items()):
            if sum(seconds.values()) < 0.05:
                continue
            note(f"Seconds  {worker}: {', '.join(f'{stage} {took:,.1f}' for stage, took in seconds.items())}")


class Pace:
    """How long all arms together will take, from what those before took.

    Args:
        work: engine and sequences of every arm, in their order.
    """

    def __init__(self, work: Sequence[tuple[str, int]]) -> None:
        self._work = work
        self._seconds = [0.0] * len(work)
        self._n_done = [0.0] * len(work)
        self._noted: set[tuple[str, str]] = set()

    def left(self) -> float | None:
        """Seconds that the rest will take, loading the engines included; None = not known yet."""
        n_left = [n - done for (_, n), done in zip(self._work, self._n_done, strict=True)]
        known = {engine: self._rate({engine}) for engine, _ in self._work}
        overall = self._rate(set(known))
        if overall is None:
            return None
        rates = [known[engine] or overall for engine, _ in self._work]
        return sum(max(n, 0) * rate for n, rate in zip(n_left, rates, strict=True))

    def _rate(self, engines: set[str]) -> float | None:
        """Seconds of a sequence."""
        arms = [nth for nth, (engine, _) in enumerate(self._work) if engine in engines]
        n_done = sum(self._n_done[nth] for nth in arms)
        return sum(self._seconds[nth] for nth in arms) / n_done if n_done else None

    @contextmanager
    def of(self, nth: int, progress: Bar, checkpoint: Checkpoint) -> Iterator[Callable[[dict[str, Any]], None]]:
        """What an arm's engine reports to, while it is captured; shows how long everything will take beside it."""
        started = time.monotonic()

        def on_event(event: dict[str, Any]) -> None:
            if event.get("unit") == "sequences":
                self._seconds[nth], self._n_done[nth] = time.monotonic() - started, event["done"]
            left = self.left()
            if left is not None and len(self._work) > 1:
                progress.overall(f"all in {_about(left)}" if left >= 1 else "")
            key = str(checkpoint.path), event.get("note", "")  # arms of one engine say the same of one checkpoint
            if not key[1] or key not in self._noted:
                progress.on_event(event)
            self._noted.add(key)

        yield on_event
        self._seconds[nth], self._n_done[nth] = time.monotonic() - started, self._work[nth][1]


def _about(seconds: float) -> str:
    """A time to wait for, no more exact than it is known.

    Example:
        >>> _about(42), _about(400), _about(9000)
        ('50 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{10 * math.ceil(seconds / 10)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _n_waiting(writer: RunWriter, request: ArmRequest) -> int:
    """Sequences of an arm that are to be captured."""
    return sum(shard.n_sequences for shard in writer.own_missing_shards(request.arm)[: request.n_shards])


def _by_engine(captures: Sequence[Arms]) -> list[tuple[Arms, ArmRequest]]:
    """Arms of one environment beside each other, and of these those of one checkpoint: unobserved vLLM, vLLM, train."""
    pairs = [(one, request) for one in captures for request in one.requests]
    return sorted(pairs, key=lambda pair: (pair[1].engine == TRANSFORMERS, pair[1].observer != UNOBSERVED))


@contextmanager
def _replacing(run: Run) -> Iterator[None]:
    """The run that --force set aside comes back when the new one ends before its first shard, with a note."""
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


def title(request: ArmRequest) -> str:
    """The arm as progress calls it."""
    return f"{ENGINE_WORDS[request.engine]} ({request.arm})"


def _note_what_remains(writer: RunWriter, arm: str, named: str, is_shared: bool) -> None:
    """Shards of other workers: a remark where the arm is shared, else the end of the command."""
    run = writer.run
    missing = run.missing_shards(arm)
    if not missing:
        return
    n_held = sum(writer.is_claimed(arm, shard) for shard in missing)
    remain = f"{len(missing)} of {len(run.shards)} shards of arm {arm} remain ({n_held} being captured by others now)"
    if not is_shared:
        raise IncompleteRunError(f"{run.path}: {remain}; run the same command again when the other workers are done")
    is_done = not writer.own_missing_shards(arm)
    note(f"{named}: {f'slice {writer.worker} is complete; ' if is_done else ''}{remain}")


def finish(run: Run, training_window: int | None = None, no_text: bool = False) -> None:
    """Analyse, draw, report; a short table and where things are."""
    with bar("analysis") as progress:
        summary = analyze_run(run, no_text=no_text, workers=o.n_workers(), on_event=progress.on_event)
        progress.on_event({"stage": "figures and report"})
        report = report_run(run, training_window, no_text=no_text)
    show_table({run.path.resolve().name: summary}, [run.path])
    wrote(run.path / "summary.json")
    wrote(report.with_suffix(".html"))
    wrote(report)
