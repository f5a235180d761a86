"""Engine processes on a Ray cluster: a shard is a task, and actors that each hold one engine process take the tasks.

:class:`Cluster` is to a cluster what :class:`~moediag.engines.launch.Engines` is to one machine, and its actors hold
just that: a capture reaches its engine in one way. Actors outlive shards and arms, so a model is loaded once by each.

Invariants:
    - what is committed in the run decides what remains to be done, whoever did it: a worker, a node or the driver may
      go at any moment, and the same command goes on;
    - a shard is captured under its claim: the worker's own where it sees the run's files, else the driver's.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from os import environ
from pathlib import Path
from typing import Any

from moediag import errors
from moediag.engines.cluster import N_TRIES, ClusterOptions, connect, first_line, variables_for_workers
from moediag.engines.launch import Engines, Job, OnEvent, appended
from moediag.engines.provenance import software
from moediag.errors import CheckpointError, EngineDiedError, EngineError
from moediag.run import claims
from moediag.run.capture import Shard, Slice
from moediag.run.files import sha256_file, write_atomic
from moediag.run.reader import BIAS, Run, open_run
from moediag.run.records import MANIFEST, PROMPTS
from moediag.run.store import MARK, mark_of, store_of
from moediag.run.writer import CLAIMS, RunWriter

_HELD_SECONDS = 30.0  # a lost worker's claim goes with its process, within seconds: then it is a living one's
_POLL_SECONDS = 1.0
_QUIET_SECONDS = 20.0
_CHECKPOINT_FILES = (".safetensors", ".json", ".model", ".jinja", ".py", ".txt")
_LOG_BYTES = 1 << 20  # of a log that comes over from another machine, its end

Files = dict[str, bytes]
"""Content by path below the run's folder."""


class Worker:
    """The actor, with an engine process beside it.

    Args:
        variables: of the driver's environment, those that may change a number.
    """

    def __init__(self, variables: dict[str, str]) -> None:
        if "OMP_NUM_THREADS" not in variables:
            environ.pop("OMP_NUM_THREADS", None)  # Ray sets it; a command without Ray would not
        environ.update(variables)
        self._engines = Engines()

    def greet(self, token: str, checkpoint: str) -> dict[str, Any]:
        """What the driver must know before it gives a task.

        Args:
            token: file of the run that exists as long as the driver's job; here too, where the file system is shared.
            checkpoint: folder that the engine will load.
        """
        return {
            "host": socket.gethostname(),
            "software": software(),
            "is_shared": Path(token).exists(),
            "checkpoint": stamps(Path(checkpoint)),
        }

    def digests(self, checkpoint: str) -> dict[str, str]:
        """sha256 of the files of a checkpoint's folder."""
        return {path.name: sha256_file(path) for path in _checkpoint_files(Path(checkpoint))}

    def capture(self, job: Job, env: dict[str, str], files: Files | None, stem: str) -> Iterator[dict[str, Any]]:
        """Do a job; gives the engine's events, at last ``{"end": ...}`` or ``{"error": ..., "message": ...}``.

        Args:
            files: what the job needs of a run whose folder is not here; what it wrote then comes with the last event,
                under ``files``. None = the run's folder is here.
            stem: of the shard's files.
        """
        here = job if files is None else _placed(job, files)
        events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        thread = threading.Thread(target=self._do, args=(here, env, events.put), daemon=True)
        thread.start()
        while True:
            event = events.get()
            is_last = "end" in event or "error" in event
            if is_last and files is not None:
                event["message"] = event.get("message", "").replace(here.run, job.run)
                event["files"] = _taken(here, job, stem)
                shutil.rmtree(Path(here.run).parent, ignore_errors=True)
            yield event
            if is_last:
                return

    def _do(self, job: Job, env: dict[str, str], put: OnEvent) -> None:
        try:
            self._engines.do(job, env, put)
            put({"end": True})
        except Exception as error:  # by its type's name, as from an engine process: not every error can be pickled
            put({"error": type(error).__name__, "message": str(error)})


def _placed(job: Job, files: Files) -> Job:
    """The job on a copy of its run, as far as it needs one."""
    folder = Path(tempfile.mkdtemp(prefix="moediag-ray-"))
    run = str(folder / Path(job.run).name)
    for name, data in files.items():
        write_atomic(folder / name if name == MARK else Path(run) / name, data)
    options = dict(job.options)
    if "proof" in options:
        options["proof"] = options["proof"].replace(job.run, run)
    return replace(job, run=run, log=job.log.replace(job.run, run), options=options)


def _taken(here: Job, job: Job, stem: str) -> Files:
    """What the job wrote: the arm's records, the shard's files (empty where the store has them), the log's end."""
    run, arm = Path(here.run), job.options["request"]["arm"]
    found = read_files(run, f"arms/{arm}/arm.json", f"arms/{arm}/{BIAS}", f"arms/{arm}/{stem}.*", f"tokens/{stem}.*")
    if store_of(run) is not None:
        found = {name: data if name.endswith(".json") else b"" for name, data in found.items()}
    with contextlib.suppress(OSError):
        found[str(Path(here.log).relative_to(run))] = Path(here.log).read_bytes()[-_LOG_BYTES:]
    return found


@dataclass
class _Part:
    """A shard to be captured."""

    shard: Shard
    n_lost: int = 0
    not_before: float = 0.0
    held_since: float | None = None


@dataclass
class _Seat:
    """The place of one worker: its actor, which is made anew when it is lost, and what it is doing."""

    index: int
    group: Any = None
    actor: Any = None
    pending: Any = None
    """What it answers to: a greeting's reference, or a generator of events; None = it waits for a shard."""
    host: str = ""
    is_shared: bool = False
    part: _Part | None = None
    n_done: float = 0.0
    n_failed: int = 0
    since: float = 0.0
    """When its shard was given to it."""
    busy: float = 0.0
    """What its shards of this arm took [s]."""
    seconds: dict[str, float] = field(default_factory=dict)
    claim: ExitStack = field(default_factory=ExitStack)


class Cluster(Engines):
    """The engine processes of a command, on a cluster.

    Raises:
        EngineError: no cluster at the address, or not enough GPUs on its nodes.
    """

    def __init__(self, options: ClusterOptions) -> None:
        super().__init__()
        self.ray, self._gpus, n_workers, self.line = connect(options)
        self.source = software()["moediag_source_sha256"]
        self.seats = [_Seat(index, self._group()) for index in range(n_workers)]

    def _group(self) -> Any:
        """Where a tensor-parallel engine's GPUs are kept together; without GPUs, workers go where there is room."""
        if not self._gpus:
            return None
        return self.ray.util.placement_group([{"CPU": 1, "GPU": self._gpus}], strategy="STRICT_PACK")

    def close(self) -> None:
        """Let go of the workers, which end their engines, and of the cluster."""
        for seat in self.seats:
            self._leave(seat)
        self.ray.shutdown()

    def _leave(self, seat: _Seat) -> None:
        seat.claim.close()
        seat.pending = None
        if seat.actor is not None:
            with contextlib.suppress(Exception):  # it may have gone by itself, with all of the cluster
                self.ray.kill(seat.actor)
        seat.actor = None

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        """Capture the shards that remain of the job's arm and slice.

        Raises:
            MoediagError: what a job raised, by its own type.
            EngineError: shards or workers were lost again and again.
        """
        _Capture(self, job, env, on_event).run_to_end()

    def summon(self, seat: _Seat, token: Path, checkpoint: str) -> None:
        """Have the seat's actor, or a new one, say whether it can do the job."""
        if seat.actor is None:
            options: dict[str, Any] = {"num_cpus": 1, "num_gpus": self._gpus, "scheduling_strategy": "SPREAD"}
            if seat.group is not None:
                kept_together = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
                options["scheduling_strategy"] = kept_together(placement_group=seat.group)
            seat.actor = self.ray.remote(Worker).options(**options).remote(variables_for_workers())
        seat.pending = seat.actor.greet.remote(str(token), checkpoint)


class _Capture:
    """One arm on its way: shards that wait, and what each worker does."""

    def __init__(self, cluster: Cluster, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        self.cluster, self.ray, self.job, self.env, self.on_event = cluster, cluster.ray, job, env, on_event
        self.writer = RunWriter(open_run(job.run), Slice(**job.worker))
        self.run = self.writer.run
        request = job.options["request"]
        self.arm: str = request["arm"]
        self.routes = (request["replay"] or {}).get("source")
        covered = self.run.shards_of(self.arm)
        if self.arm not in self.run.arms():
            covered = covered[: request["n_shards"]]
        covered = tuple(shard for shard in covered if self.writer.worker.has(shard))
        self.n_all = sum(shard.n_sequences for shard in covered)
        self.waiting = deque(_Part(shard) for shard in covered if not self.run.has_capture(self.arm, shard))
        self.noted: set[str] = set()
        self.reason = ""
        self.heard = time.monotonic()

    def run_to_end(self) -> None:
        """Give out shards until none waits."""
        seats, started = self.cluster.seats, time.monotonic()
        for seat in seats:
            seat.busy = 0.0
        token = self.run.path / CLAIMS / f"{self.arm}.ray-{uuid.uuid4().hex}"
        with ExitStack() as stack:
            stack.enter_context(claims.claim(token))
            stack.callback(self._abandon)
            for seat in seats:
                self.cluster.summon(seat, token, self.job.options["folder"])
            while self.waiting or any(seat.part for seat in seats):
                for seat in seats:
                    if seat.actor is not None and seat.pending is None and not self._give(seat):
                        break
                self._listen(token)
        for seat in seats:
            self._tell(seat, {"waiting": time.monotonic() - started - seat.busy})

    def _tell(self, seat: _Seat, seconds: dict[str, float]) -> None:
        self.on_event({"seconds": seconds, "worker": f"worker {seat.index}"})

    def _took(self, seat: _Seat, rest: str) -> None:
        """Tell what the seat's shard took: what no stage of its engine did is called ``rest``."""
        took = time.monotonic() - seat.since
        seat.busy += took
        self._tell(seat, {**seat.seconds, rest: took - sum(seat.seconds.values())})
        seat.seconds = {}

    def _abandon(self) -> None:
        """Workers that still do something end when the job does: what they would do next is not known to them."""
        for seat in self.cluster.seats:
            if seat.part is not None:
                self.cluster._leave(seat)
            seat.part, seat.n_done, seat.pending = None, 0.0, None

    def _listen(self, token: Path) -> None:
        busy = {id(seat.pending): seat for seat in self.cluster.seats if seat.pending is not None}
        if not busy:
            if not any(seat.actor is not None for seat in self.cluster.seats):
                raise EngineError(f"no worker could be started on the Ray cluster: {self.reason}")
            time.sleep(_POLL_SECONDS)  # every shard that waits is held by another process
            return
        if not any(seat.part for seat in busy.values()) and time.monotonic() > self.heard + _QUIET_SECONDS:
            self.heard = float("inf")
            self.on_event({"note": "Note     waiting for the Ray cluster to have room for a worker"})
        ready, _ = self.ray.wait([seat.pending for seat in busy.values()], num_returns=1, timeout=_POLL_SECONDS)
        for pending in ready:
            seat = busy[id(pending)]
            self.heard = time.monotonic()
            try:
                answer = self.ray.get(pending if seat.part is None else next(pending))
                self._welcome(seat, answer) if seat.part is None else self._hear(seat, answer)
            except self.ray.exceptions.RayTaskError as error:
                raise EngineError(f"the worker on {seat.host or 'a node'} failed: {first_line(error)}") from None
            except self.ray.exceptions.RayError as error:
                self._lost(seat, first_line(error), token)

    def _welcome(self, seat: _Seat, answer: dict[str, Any]) -> None:
        """The worker is there: refuse it where it would compute something else."""
        seat.host, seat.is_shared, seat.pending, seat.n_failed = answer["host"], answer["is_shared"], None, 0
        if answer["software"]["moediag_source_sha256"] != self.cluster.source:
            raise EngineError(
                f"the worker on {seat.host} runs another moediag ({answer['software']['moediag']}) than this command; "
                "install the same one on every node"
            )
        folder = Path(self.job.options["folder"])
        if answer["checkpoint"] == stamps(folder):
            return
        theirs = self.ray.get(seat.actor.digests.remote(str(folder)))
        ours = {path.name: sha256_file(path) for path in _checkpoint_files(folder)}
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if differing:
            is_there = "holds another" if theirs else "has no"
            raise CheckpointError(
                f"{seat.host} {is_there} {folder} ({', '.join(differing[:3])} differ); put the checkpoint at the same "
                "place on every node"
            )

    def _give(self, seat: _Seat) -> bool:
        """Give the worker a shard; False when there is none to give now."""
        now = time.monotonic()
        for part in list(self.waiting):
            if part.not_before > now:
                continue
            if is_there(self.run, self.arm, part.shard):
                self.waiting.remove(part)
                continue
            files = None
            if not seat.is_shared:
                if not seat.claim.enter_context(self.writer.claim(self.arm, part.shard)):
                    seat.claim.close()
                    self._set_aside(part)
                    continue
                files = self._needed(part.shard)
            log = Path(self.job.log)
            job = replace(
                self.job,
                worker=asdict(Slice(part.shard.index, len(self.run.shards))),
                log=str(log.with_name(f"{log.stem}-ray-{seat.index}.log")),
            )
            self.waiting.remove(part)
            seat.part, seat.since = part, now
            generator = seat.actor.capture.options(num_returns="streaming")
            seat.pending = generator.remote(job, self.env, files, part.shard.stem)
            return True
        return False

    def _needed(self, shard: Shard) -> Files:
        """What an engine reads of the run to capture a shard."""
        shards = (shard, self.run.shards[0])  # packed batches are tried on the first shard's tokens
        patterns = [MANIFEST, PROMPTS, "checkpoints/*.json", "arms/*/arm.json", f"arms/*/{BIAS}"]
        patterns += [f"tokens/{one.stem}.*" for one in shards]
        if self.routes is not None:
            patterns += [f"arms/{self.routes}/{one.stem}.*" for one in shards]
        if "proof" in self.job.options:
            patterns.append(str(Path(self.job.options["proof"]).relative_to(self.run.path)))
        files = read_files(self.run.path, *patterns)
        if (store := store_of(self.run.path)) is not None:
            store.push([MANIFEST])  # the worker, which has no index, would refuse a run that this one replaces
            files[MARK] = mark_of(store.url)
        return files

    def _hear(self, seat: _Seat, event: dict[str, Any]) -> None:
        assert seat.part is not None
        if "done" in event:
            seat.n_done = event["done"]
            self._show()
        elif "seconds" in event:
            seat.seconds = event["seconds"]
        elif "end" in event:
            part = self._received(seat, event)
            self._took(seat, "carrying")
            if not is_there(self.run, self.arm, part.shard):  # another process holds it, on the shared file system
                self.waiting.append(part)
                self._set_aside(part)
            self._show()
        elif "error" in event:
            part = self._received(seat, event)
            kind = getattr(errors, event["error"], EngineError)
            if kind is not EngineDiedError:
                raise kind(event["message"])
            self._try_again(part, event["message"])
        elif (words := event.get("note") or event["stage"]) not in self.noted:  # every worker says it of the same model
            self.noted.add(words)
            self.on_event(event)

    def _received(self, seat: _Seat, event: dict[str, Any]) -> _Part:
        """The worker has ended its shard: commit what came with the last event."""
        part, seat.part, seat.pending, seat.n_done = seat.part, None, None, 0.0
        assert part is not None
        files = event.get("files", {})
        if (store := store_of(self.run.path)) is not None:
            files |= store.read(name for name, data in files.items() if not data)
        with seat.claim, tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                if name.startswith("logs/"):
                    with appended(self.run.path / name) as log:
                        log.write(data)
                else:
                    write_atomic(Path(folder) / name, data)
            if files and "end" in event:
                manifest = (self.run.path / MANIFEST).read_bytes()
                write_atomic(Path(folder) / MANIFEST, manifest)
                self.writer.adopt(open_run(Path(folder)), self.arm, part.shard)
        return part

    def _lost(self, seat: _Seat, reason: str, token: Path) -> None:
        """The worker went, or never came: another takes its place, its shard waits again."""
        part, seat.part, seat.n_done, self.reason = seat.part, None, 0.0, reason
        self.cluster._leave(seat)
        seat.n_failed += part is None
        if part is not None:
            self._took(seat, "lost")
            self.on_event({"note": f"Note     the worker on {seat.host} was lost ({reason}); its shard is done again"})
            self._try_again(part, reason)
        if seat.n_failed < N_TRIES:
            self.cluster.summon(seat, token, self.job.options["folder"])

    def _try_again(self, part: _Part, reason: str) -> None:
        part.n_lost += 1
        if part.n_lost >= N_TRIES:
            raise EngineError(f"{part.shard.stem} of arm {self.arm} lost its worker {N_TRIES} times: {reason}")
        self.waiting.appendleft(part)

    def _set_aside(self, part: _Part) -> None:
        """A shard that another process holds: a lost worker's for a moment, or a living one's."""
        now = time.monotonic()
        part.held_since = part.held_since or now
        part.not_before = now + _POLL_SECONDS
        if now - part.held_since > _HELD_SECONDS:
            self.waiting.remove(part)

    def _show(self) -> None:
        seats = [seat for seat in self.cluster.seats if seat.part is not None]
        missing = sum(part.shard.n_sequences for part in (*self.waiting, *(seat.part for seat in seats)) if part)
        done = self.n_all - missing + sum(seat.n_done for seat in seats)
        self.on_event({"done": done, "total": self.n_all, "unit": "sequences"})


def is_there(run: Run, arm: str, shard: Shard) -> bool:
    """Whether a shard is committed; listing a folder has a network file system look it up anew."""
    for folder in (run.arm_folder(arm), run.path / "tokens"):
        with contextlib.suppress(OSError):
            any(folder.iterdir())
    return run.has_capture(arm, shard)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of a checkpoint's files: the same where they are, or were copied by rsync."""
    found = ((path.name, path.stat()) for path in _checkpoint_files(folder))
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found}


def _checkpoint_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in _CHECKPOINT_FILES and path.is_file())


def read_files(folder: Path, *patterns: str) -> Files:
    """The files below a folder that a pattern names."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}
