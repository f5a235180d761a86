"""`--ray` on real clusters of this machine, and the script of a Slurm array: what is captured or analysed does not
depend on who did it.

Two nodes are two raylets here. A node without the run's files is one in a mount namespace of its own, where another
file system lies over them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import MOEDIAG, REPOSITORY, run_here, run_moediag, write_jsonl
from test_analysis_parts import analysis_of
from test_engines_resume import captured, wait_until_engines_are_gone
from test_results import make_run
from test_store import on_store

import moediag
from moediag.cli.main import main
from moediag.engines.cluster import N_TRIES, ClusterOptions, Tasks, room
from moediag.errors import EngineError
from moediag.hygiene import check_run
from moediag.results import analyze_run
from moediag.run import pieces
from moediag.run.capture import Shard
from moediag.run.files import read_sealed, write_atomic
from moediag.run.pieces import Work, in_pieces
from moediag.run.reader import Run, open_run

CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"
N_PROMPTS, N_TOKENS = 24, 60
MEMORY = 80 << 20  # bytes of a node's object store
OPTIONS = ("--shard-size", "1", "--full-vocab", "4")


class Nodes:
    """A cluster whose nodes can be killed."""

    def __init__(self, head_cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": MEMORY}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.further: list[Any] = []

    def add(self) -> None:
        self.further.append(self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY))

    def kill_last(self) -> None:
        self._cluster.remove_node(self.further.pop(), allow_graceful=False)

    def workers(self, name: str = "Worker") -> list[int]:
        """Processes that are an actor, or do a task, of a name, on all nodes."""
        raylets = {str(node.all_processes["raylet"][0].process.pid) for node in self._cluster.list_all_nodes()}
        found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in found.splitlines()]
        return [int(pid) for pid, parent, args in rows if parent in raylets and args.startswith(f"ray::{name}")]

    def wait_for(self, n_nodes: int) -> None:
        deadline = time.monotonic() + 120
        while len(self._cluster.global_state._live_node_ids()) < n_nodes:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def shut_down(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Given completions, so that transformers alone captures."""
    records: list[dict[str, object]] = [
        {"prompt_token_ids": [(7 * i + j) % 256 for j in range(5 + i % 7)],
         "completion_token_ids": [(11 * i + 3 * j) % 256 for j in range(N_TOKENS)]} for i in range(N_PROMPTS)
    ]  # fmt: skip
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    found.add()
    yield found
    found.shut_down()


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    """A cluster whose only node has no processor."""
    found = Nodes(head_cpus=0)
    yield found
    found.shut_down()


needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@contextmanager
def far_node(head: Nodes, mount: str) -> Iterator[None]:
    """A node of one processor that sees other files where something is mounted for it alone."""
    start = f"{sys.executable} -c 'from ray.scripts.scripts import main; main()' start --address {head.address}"
    start += f" --num-cpus 1 --object-store-memory {MEMORY} --block"
    far = subprocess.Popen(["unshare", "-m", "bash", "-c", f"{mount} && exec {start}"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        far.terminate()
        far.wait()


def once_there(*words: object) -> subprocess.CompletedProcess[str]:
    """The command, again until the far node has joined."""
    deadline = time.monotonic() + 120
    while True:
        done = run_moediag(*words)
        if "have room for 0" not in done.stderr or time.monotonic() > deadline:
            return done


@pytest.fixture(scope="module")
def undisturbed(random_moe: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process captures."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_here("capture", "train", random_moe, "--prompts", prompts, "-o", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return run


def described(run: Path) -> dict[str, Any]:
    """Every sidecar, but for who made it and how long that took."""
    aside = ("worker", "host", "seconds", "sha256")
    sidecars = {str(path.relative_to(run)): read_sealed(path) for path in run.rglob("shard-*.json")}
    return {name: {k: v for k, v in one.items() if k not in aside} for name, one in sidecars.items()}


def assert_same(run: Path, other: Path) -> None:
    assert captured(run) == captured(other)
    assert described(run) == described(other)
    assert check_run(open_run(run)) == []


STAGES = {"starting", "loading", "proving", "computing", "writing"}


def assert_every_second_has_a_stage(run: Path, err: str, *workers: str) -> None:
    """A line of each worker; the log holds what the lines add up, and no stage took less than no time."""
    lines = [json.loads(line) for line in (run / "logs" / "seconds.jsonl").read_text().splitlines()]
    assert {line["worker"] for line in lines} >= set(workers)
    for worker in workers:
        assert f"Seconds  {worker}: " in err
        found = [line["seconds"] for line in lines if line["worker"] == worker]
        assert {stage for one in found for stage in one} >= STAGES
        assert min(min(one.values()) for one in found) > -0.05
        assert sum(one.get("computing", 0) for one in found) > 0


def wait_for(is_so: Callable[[], object], driver: subprocess.Popen[str]) -> None:
    """Wait while the driver lives."""
    deadline = time.monotonic() + 300
    while not is_so():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.engines
def test_one_process_says_where_its_time_goes(random_moe: Path, prompts: Path, tmp_path: Path) -> None:
    """All that the command waited for its engine is in a stage, and nothing is counted twice."""
    run, started = tmp_path / "run", time.monotonic()
    done = run_here("capture", "train", random_moe, "--prompts", prompts, "-o", run, *OPTIONS)
    took = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert_every_second_has_a_stage(run, done.stderr, "engine")
    lines = (run / "logs" / "seconds.jsonl").read_text().splitlines()
    assert 0.2 * took < sum(sum(json.loads(line)["seconds"].values()) for line in lines) < took


@pytest.mark.engines
def test_the_script_of_a_slurm_array_captures_what_one_process_does(
    random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The script of the recipes, as two tasks at the same time; Slurm sets nothing else that it reads."""
    page = (REPOSITORY / "reports" / "recipes.md").read_text()
    script = tmp_path / "capture.sh"
    script.write_text(page.split("```bash\n")[1].split("```")[0])
    assert all(line.startswith("#SBATCH --") for line in script.read_text().splitlines()[1:-1])
    run = tmp_path / "run"
    words = ("train", random_moe, "--prompts", prompts, "-o", run, *OPTIONS, "--num-shards", 2)
    path = f"{MOEDIAG.parent}:{os.environ['PATH']}"
    tasks = [
        subprocess.Popen(
            ["bash", str(script), *map(str, words)],
            env={**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert_same(run, undisturbed)
    workers = {read_sealed(path)["worker"] for path in run.glob("arms/train/shard-?????.json")}
    assert workers == {"0/2", "1/2"}


@pytest.mark.engines
def test_a_worker_a_node_and_the_driver_may_be_killed(
    nodes: Nodes, random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """One after the other, each after a further shard was committed; the same command again gives the same bytes."""
    run = tmp_path / "run"
    words = ("capture", "train", random_moe, "--prompts", prompts, "-o", run, *OPTIONS)
    command = [str(word) for word in (*words, "--ray", "--ray-address", nodes.address, "--num-workers", 2)]

    def n_done() -> int:
        return len(list(run.glob("arms/train/shard-?????.json")))

    with subprocess.Popen([str(MOEDIAG), *command], stderr=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: n_done() >= 1 and len(nodes.workers()) == 2, driver)
        before, killed = n_done(), nodes.workers()[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: n_done() > before and killed not in nodes.workers(), driver)
        before = n_done()
        nodes.kill_last()
        wait_for(lambda: n_done() > before, driver)
        driver.kill()
        _, err = driver.communicate()
    assert "was lost" in err
    assert 0 < n_done() < N_PROMPTS, "everything was captured before the driver was killed"
    wait_until_engines_are_gone(run)
    nodes.add()
    again = run_moediag(*command)
    assert again.returncode == 0, again.stderr
    assert "2 workers; the cluster has" in again.stderr  # a node that has just died may be counted still
    assert_same(run, undisturbed)
    assert not (run / ".claims").exists()
    assert_every_second_has_a_stage(run, again.stderr, "worker 0", "worker 1")


@pytest.mark.engines
@needs_mounts
def test_shards_of_a_node_that_does_not_see_the_run_come_through_ray(
    head: Nodes, random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The only node with a processor sees neither the run nor its folder: the driver writes what comes over."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    run = hidden / "run"
    words = ("capture", "train", random_moe, "--prompts", prompts, "-o", run, *OPTIONS, "--ray", "--ray-address")
    with far_node(head, f"mount -t tmpfs tmpfs {hidden}"):
        done = once_there(*words, head.address)
    assert done.returncode == 0, done.stderr
    assert_same(run, undisturbed)
    assert (run / "logs" / "train-ray-0.log").stat().st_size > 0


@pytest.mark.engines
def test_a_self_test_whose_worker_is_killed_goes_on_with_what_is_on_disk(nodes: Nodes, tmp_path: Path) -> None:
    """By itself, and as the same command again: nothing is captured twice, and every property holds."""
    out = tmp_path / "out"
    words = ("selftest", "--family", "qwen3_moe", "-o", out, "--ray", "--ray-address", nodes.address, "--json")
    with subprocess.Popen([str(MOEDIAG), *map(str, words)], stdout=subprocess.PIPE, text=True) as driver:
        while not list(out.glob("*/float32/arms/infer/shard-*.json")):
            assert driver.poll() is None
            time.sleep(0.02)
        first = {path: path.stat().st_mtime_ns for path in out.glob("*/float32/arms/infer/shard-*.json")}
        for pid in nodes.workers("task"):
            os.kill(pid, signal.SIGKILL)
        said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    verdicts = {row["property"]: row["verdict"] for row in json.loads(said)["rows"]}
    names = "captured", "both engines agree in float32", "validate finds nothing"
    assert {verdicts[name] for name in names} == {"pass"}
    made = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")}
    assert first.items() <= made.items()
    again = run_moediag(*words)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == json.loads(said)["rows"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")} == made
    assert not list(out.glob(".*"))


def test_a_self_test_on_a_cluster_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--ray"]) == 1
    assert "--ray without -o: give -o a folder that all nodes" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two shards that nothing is analysed of."""
    return make_run(tmp_path / "run", ("infer", "train", "train-replay")).path


def analysed_here(run: Path) -> dict[str, bytes]:
    """What one process makes of a copy of a run."""
    other = Path(shutil.copytree(run, run.parent / "analysed here" / "run"))
    analyze_run(open_run(other))
    return analysis_of(other)


def test_a_cluster_analyses_and_validates_as_one_process_does(
    nodes: Nodes, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every shard a piece; the same bytes, from a path that is relative here and means nothing to a node."""
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    expected = analysed_here(run)
    monkeypatch.chdir(run.parent)
    words = ["run", "--ray", "--ray-address", nodes.address]
    assert main(["analyze", *words]) == 0
    assert "Ray      2 workers; the cluster has 2 nodes" in capsys.readouterr().err
    assert analysis_of(run) == expected
    assert main(["validate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["validate", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert not list(run.glob(".*"))
    assert main(["analyze", *words]) == 0  # nothing to be done: no cluster is reached
    assert "Ray " not in capsys.readouterr().err


def test_a_worker_killed_while_it_analyses_changes_no_byte(nodes: Nodes, run: Path) -> None:
    """Bug: Ray told of it on stdout, in the middle of the command's JSON."""
    expected = analysed_here(run)
    words = ("analyze", run, "--ray", "--ray-address", nodes.address, "--num-workers", 2, "--json")
    command = [str(MOEDIAG), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        killed: set[int] = set()
        while driver.poll() is None and len(killed) < 2:
            for pid in {*nodes.workers("task")} - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.02)
        out, err = driver.communicate()
    assert driver.returncode == 0, err
    assert len(killed) == 2
    assert json.loads(out) == json.loads(expected["summary.json"])
    assert analysis_of(run) == expected
    assert not list(run.glob(".*"))


def dies_once(run: Run, shards: tuple[Shard, ...], folder: Path, always: bool) -> Generator[None, None, int]:
    """A piece whose first process is killed when it has written half of it."""
    marker = folder.parent / f"{shards[0].stem}.begun"
    (folder / "half").touch(exist_ok=False)
    if always or not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield
    return shards[0].index


def dies_once_joining(run: Run, read: Iterator[int]) -> list[int]:
    first = next(read)
    marker = run.path / "joining"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [first, *read]


def test_a_piece_whose_process_is_killed_is_made_again(
    nodes: Nodes, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is killed as it joins others; one that kills every process is given up in one line."""
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    opened = open_run(run)
    options = ClusterOptions(nodes.address, tensor_parallel_size=0)
    with Tasks(options, run, print) as tasks:
        works = [Work(partial(dies_once, always=False), dies_once_joining)]
        assert dict(in_pieces(opened, works, tasks)) == {0: [shard.index for shard in opened.shards]}
        assert not list(tasks.folder.iterdir())
        with pytest.raises(EngineError, match=f"lost its worker {N_TRIES} times"):
            list(in_pieces(opened, [Work(partial(dies_once, always=True), dies_once_joining)], tasks))
        assert not list(tasks.folder.iterdir())
    assert not list(run.glob(".*"))


@needs_mounts
def test_a_node_that_would_do_something_else_is_refused_in_one_line(head: Nodes, run: Path, tmp_path: Path) -> None:
    """It does not see the run; its moediag is another; it has none."""
    package = Path(moediag.__file__).parent
    other = tmp_path / "shown.py"
    other.write_text((package / "shown.py").read_text() + "\n")
    for mount, complaint in (
        (f"mount -t tmpfs tmpfs {run}", f"does not see {run}; put it on a file system that all nodes"),
        (f"mount --bind {other} {package / 'shown.py'}", "has another moediag ("),
        (f"mount -t tmpfs tmpfs {package}", "lacks moediag, or this version of it (No module named"),
    ):
        with far_node(head, mount):
            done = once_there("analyze", run, "--ray", "--ray-address", head.address)
        assert done.returncode == 1
        assert complaint in done.stderr.splitlines()[-1], done.stderr
        assert not (run / "analysis").exists()
        assert not list(run.glob(".*"))


@pytest.mark.engines
@needs_mounts
def test_a_run_on_an_object_store_is_the_same_whoever_fills_it(
    bucket: str, random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """One node sees the driver's mirror, the other uploads by itself; a worker, a node and the driver are killed.

    The driver is started again with an empty mirror, as on another machine: it finds on the store what was captured.
    """
    url, hidden, nodes = f"{bucket}/ray/run", tmp_path / "hidden", Nodes(head_cpus=0)
    hidden.mkdir()
    words = ("capture", "train", random_moe, "--prompts", prompts, "-o", url, *OPTIONS, "--ray", "--num-workers", 2)

    def n_done() -> int:
        return sum(name.startswith("arms/train/shard-") and name.count(".") == 1 for name in on_store(url)) // 2

    with ExitStack() as stack:
        stack.callback(nodes.shut_down)
        stack.enter_context(far_node(nodes, f"mount -t tmpfs tmpfs {hidden}"))
        nodes.add()
        nodes.wait_for(3)
        command = [*map(str, words), "--ray-address", nodes.address]
        first = {**os.environ, "MOEDIAG_CACHE": str(hidden / "first")}
        with subprocess.Popen([str(MOEDIAG), *command], env=first, stderr=subprocess.PIPE, text=True) as driver:
            wait_for(lambda: n_done() >= 2 and len(nodes.workers()) == 1, driver)
            before, killed = n_done(), nodes.workers()[0]
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda: n_done() > before + 1 and nodes.workers() not in ([], [killed]), driver)
            before = n_done()
            nodes.kill_last()
            wait_for(lambda: n_done() > before + 1, driver)
            driver.kill()
            _, err = driver.communicate()
        assert "was lost" in err
        assert n_done() < N_PROMPTS, "everything was captured before the driver was killed"
        there = on_store(url)
        nodes.add()
        again = run_moediag(*command, MOEDIAG_CACHE=str(hidden / "second"))
        assert again.returncode == 0, again.stderr
    after = on_store(url)
    kept = {name for name in there if "/shard-" in name and f"{name.rpartition('.')[0]}.json" in there}
    assert {name: after[name] for name in kept} == {name: there[name] for name in kept}, "a shard was captured again"
    found = tmp_path / "found"
    for name, data in after.items():
        write_atomic(found / name, data)
    assert_same(found, undisturbed)


def test_a_missing_ray_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without_ray(package: str) -> str:
        if package == "ray":
            raise metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(metadata, "version", without_ray)
    words = ["capture", "train", str(CHECKPOINT), "--prompts", str(prompts), "-o", str(tmp_path / "run"), "--ray"]
    assert main(words) == 1
    assert capsys.readouterr().err.strip() == "moediag: ray is not installed; pip install 'moediag[ray]'"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--num-workers", "2"), "--num-workers is of no effect without --ray"),
        (("--ray", "--observer", "auto"), "--ray with --observer auto"),
        (("--ray", "--ray-address", ""), "--ray-address is empty: give HOST:PORT"),
        (("--ray", "--ray-address", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
        (("--ray", "--ray-address", "ray://127.0.0.1:1"), "give HOST:PORT"),
    ],
)
def test_what_ray_cannot_do_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: Path, options: tuple[str, ...], complaint: str
) -> None:
    """Bug: an address where nothing answers took Ray ten minutes and sixty lines of its own libraries; of an empty one
    it was said that there was no cluster at RAY_ADDRESS."""
    run = tmp_path / "run"
    assert main(["capture", "train", str(CHECKPOINT), "--prompts", str(prompts), "-o", str(run), *options]) == 1
    assert complaint in capsys.readouterr().err.strip()
    assert not run.exists()


def test_gpus_of_a_worker_are_of_one_node() -> None:
    """Three GPUs on each of two nodes hold two engines of two GPUs, not three."""
    nodes = [{"CPU": 8.0, "GPU": 3.0}] * 2
    assert room(nodes, ClusterOptions(tensor_parallel_size=2)) == (2, 2)
    with pytest.raises(EngineError, match="have room for 2"):
        room(nodes, ClusterOptions(num_workers=3, tensor_parallel_size=2))
    with pytest.raises(EngineError, match="an engine needs 4 GPUs"):
        room(nodes, ClusterOptions(gpus_per_worker=2, tensor_parallel_size=4))
    with pytest.raises(EngineError, match="have room for 0"):
        room([{"GPU": 1.0}], ClusterOptions())
