"""A Ray cluster: which one, what it has room for, and functions as tasks on it.

What is done by tasks lies in a folder that every node sees: the run of an analysis, the folder of a self-test. A task
whose worker or node is lost is done anew by Ray.

Invariants:
    - only this module imports ray, and only where a command was given ``--ray``;
    - a node that would compute something else, or elsewhere, is refused in one line, also one that joins later.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from moediag.engines.provenance import numeric_variables, software
from moediag.engines.versions import NUMERIC_PACKAGES, RAY, installed, require
from moediag.errors import EngineError
from moediag.folder import being_made
from moediag.run.files import write_error
from moediag.run.pieces import Pool

N_TRIES = 3
"""What loses its worker so often is taken to be what kills it; a place whose workers do not even start is given up."""
_ANSWER_SECONDS = 10.0
_COUNTING = ("numpy", "pandas", "pyarrow", "scipy")
"""Libraries that an analysis counts with."""
_GIVEN_BY_RAY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster, and what of it.

    Args:
        address: of a running cluster; None = ``RAY_ADDRESS``, else the one that runs here, else one of this machine.
        num_workers: at a time; None = engines: as many as the cluster's GPUs hold, without GPUs one per node; without
            engines one per CPU.
        gpus_per_worker: of one node each; None = ``tensor_parallel_size``, or 0 where the cluster has none.
        tensor_parallel_size: GPUs that an engine uses; 0 = workers hold no engine.
    """

    address: str | None = None
    num_workers: int | None = None
    gpus_per_worker: int | None = None
    tensor_parallel_size: int = 1

    def check(self) -> ClusterOptions:
        """Return self where ray is installed and something answers at the address.

        Ray itself tries for minutes, in the words of its own libraries.

        Raises:
            DependencyError: ray is not installed, or too old.
            EngineError: nothing answers, or the address is that of Ray's client, which brings no files over.
        """
        require(RAY)
        if self.address is not None and not self.address.strip():
            raise EngineError(
                "--ray-address is empty: give HOST:PORT, or leave it out for RAY_ADDRESS or the cluster that runs here"
            )
        address = self.address or os.environ.get("RAY_ADDRESS") or ""
        if "://" in address:
            raise EngineError(f"--ray-address {address}: give HOST:PORT, on a machine that is a node of the cluster")
        host, colon, port = address.rpartition(":")
        if colon:
            try:
                socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
            except (OSError, ValueError) as error:
                raise EngineError(f"no Ray cluster at {address}: {error}; see `ray status` there") from None
        return self


def connect(options: ClusterOptions) -> tuple[Any, int, int, str]:
    """Reach the cluster, until ``ray.shutdown()``.

    Returns:
        The module ``ray``; GPUs of a worker; workers; and what there is, in words.

    Raises:
        EngineError: no cluster at the address, or not enough GPUs on its nodes.
    """
    import ray
    import ray.util.scheduling_strategies

    before = signal.getsignal(signal.SIGTERM)
    ray._private.worker._worker_logs_enabled = False  # it tells of lost workers on stdout, among a command's results
    try:
        ray.init(address=options.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"no Ray cluster at {options.address or 'RAY_ADDRESS'}: {first_line(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # ray's ends the process without a word
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    try:
        gpus, n_workers = room(nodes, options)
    except EngineError:
        ray.shutdown()
        raise
    each = f" of {gpus} GPUs" if gpus else ""
    return ray, gpus, n_workers, f"{n_workers} workers{each}; the cluster has {len(nodes)} nodes"


def room(nodes: list[dict[str, float]], options: ClusterOptions) -> tuple[int, int]:
    """GPUs of a worker, and workers, that a cluster has room for.

    Args:
        nodes: resources of each, by Ray's names.

    Raises:
        EngineError: it has not as many as were requested.

    Example:
        >>> room([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 3}], ClusterOptions(tensor_parallel_size=2))
        (2, 3)
        >>> room([{"CPU": 8}, {"CPU": 8}], ClusterOptions())
        (0, 2)
        >>> room([{"CPU": 8}, {"CPU": 8}], ClusterOptions(tensor_parallel_size=0))
        (0, 16)
    """
    has_gpus = any(node.get("GPU") for node in nodes)
    given, size = options.gpus_per_worker, options.tensor_parallel_size
    gpus = given if given is not None else size if has_gpus else 0
    if gpus and gpus < size:
        raise EngineError(f"--gpus-per-worker {gpus} with --tensor-parallel-size {size}: an engine needs {size} GPUs")
    n_room = sum(
        int(min(node.get("GPU", 0) // gpus, node.get("CPU", 0)) if gpus else node.get("CPU", 0)) for node in nodes
    )
    n_workers = options.num_workers or (n_room if gpus or not size else min(n_room, len(nodes)))
    if not 0 < n_workers <= n_room:
        each = f"{gpus} GPUs of one node and a CPU" if gpus else "a CPU"
        lower = "--num-workers or --gpus-per-worker" if gpus else "--num-workers"
        raise EngineError(
            f"--num-workers {max(n_workers, 1)} of {each} each: the Ray cluster's {len(nodes)} nodes have room for "
            f"{n_room}; lower {lower}, or add nodes"
        )
    return gpus, n_workers


def first_line(error: Exception) -> str:
    """The last line of a remote traceback, or the first of any other error of Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Traceback" in str(error) else lines[0]


class Tasks(Pool):
    """Tasks on a cluster, which is reached when the first is to be done.

    Args:
        options: which cluster; where workers hold engines a task has the CPU and the GPUs of one.
        folder: that all tasks read and write.
        on_line: is called with what the cluster has, once it is reached.
    """

    def __init__(self, options: ClusterOptions, folder: Path, on_line: Callable[[str], None]) -> None:
        self._options, self._on_line = options, on_line
        self._folder = being_made(folder.resolve() / "ray")
        self._ray: Any = None
        self._n_workers = 0
        self._running: dict[Future[Any], Any] = {}

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the cluster."""
        if self._ray is not None:
            self.stop()
            self._ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """In the one that all tasks share, made for this process: a node that sees it shares that."""
        self._reach()
        return self._folder

    @property
    def n_workers(self) -> int:
        """Tasks at a time."""
        self._reach()
        return self._n_workers

    def _reach(self) -> None:
        if self._ray is not None:
            return
        self._ray, gpus, self._n_workers, line = connect(self._options)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, self._folder) from None
        options = {"num_gpus": gpus, "max_retries": N_TRIES - 1, "scheduling_strategy": "SPREAD"}
        self._task = self._ray.remote(**options)(_task_by_value())  # on a GPU each gets a process of its own
        self._on_line(line)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a function called by a task.

        Raises from the future:
            MoediagError: what the function raised.
            EngineError: its node was refused, or it lost its worker again and again.
        """
        self._reach()
        ours = expected(has_engines=self._options.tensor_parallel_size > 0)
        call = pickle.dumps(partial(function, *arguments))
        reference = self._task.remote(sys.path, variables_for_workers(), str(self._folder), ours, call)
        future: Future[Any] = Future()
        self._running[future] = reference
        reference.future().add_done_callback(partial(self._hand_over, future))
        return future

    def _hand_over(self, future: Future[Any], done: Future[Any]) -> None:
        self._running.pop(future, None)
        try:
            refused, result = done.result()
        except self._ray.exceptions.RayTaskError as error:
            error.cause.__cause__ = error  # with the traceback of the worker
            future.set_exception(error.cause)
        except Exception as error:
            lost = self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError
            words = f"the Ray cluster failed ({first_line(error)}); run the same command again"
            if isinstance(error, lost):
                words = (
                    f"a task on the Ray cluster lost its worker {N_TRIES} times ({first_line(error)}), most often for "
                    "want of memory; run it again with a smaller --num-workers"
                )
            future.set_exception(EngineError(words))
        else:
            future.set_exception(EngineError(refused)) if refused else future.set_result(result)

    def stop(self) -> None:
        """End the tasks that are still being done, with their processes."""
        references = list(self._running.values())
        for reference in references:
            self._ray.cancel(reference, force=True)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=_ANSWER_SECONDS)


def _task_by_value() -> Callable[..., tuple[str, Any]]:
    """What a node is sent as it stands here, so that one without moediag can say so."""

    def task(path: list[str], variables: dict[str, str], *given: Any) -> tuple[str, Any]:
        import os
        import socket
        import sys

        if "OMP_NUM_THREADS" not in variables:
            os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it; a command without Ray would not
        os.environ.update(variables)  # before anything that looks at them is imported
        sys.path += [one for one in path if one not in sys.path]
        try:
            from moediag.engines.cluster import do_there
        except ImportError as error:
            words = f"{socket.gethostname()} lacks moediag, or this version of it ({error})"
            return f"{words}; install the same one on every node of the Ray cluster", None
        return do_there(*given)

    return task


def do_there(folder: str, ours: dict[str, str], call: bytes) -> tuple[str, Any]:
    """What a task does on its node: why the node is refused, or nothing and what the call gives.

    Args:
        folder: :attr:`Tasks.folder`.
        ours: :func:`expected` of the process that hands out tasks.
        call: pickled.
    """
    host, theirs = socket.gethostname(), expected(has_engines=True)
    for name, version in ours.items():
        if theirs[name] != version:
            words = f"{host} has another {name} ({theirs[name][:12]}) than this command ({version[:12]})"
            return f"{words}; install the same one on every node of the Ray cluster", None
    if not Path(folder).is_dir():
        where = Path(folder).parent
        words = f"{host} does not see {where}; put it on a file system that all nodes of the Ray cluster share"
        return f"{words} (MOEDIAG_CACHE for a run on an object store)", None
    return "", pickle.loads(call)()  # of the process that hands out tasks


def variables_for_workers() -> dict[str, str]:
    """What may change a number in the environment of this process, but for the devices that Ray gives out."""
    return {name: value for name, value in numeric_variables().items() if name not in _GIVEN_BY_RAY}


@cache
def expected(has_engines: bool) -> dict[str, str]:
    """What a node has to have the same of: moediag's source, the libraries that count, and what engines count with."""
    packages = (*_COUNTING, *(NUMERIC_PACKAGES if has_engines else ()))
    versions = {package: installed(package) or "none" for package in packages}
    return {"moediag": software()["moediag_source_sha256"], **versions}
