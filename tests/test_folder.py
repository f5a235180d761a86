"""Result folders: a kill at any step leaves the old result or the new one whole, and what is not ours is never lost."""

from __future__ import annotations

import ast
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.numpy
from scripted_engine import make_scripted_run
from test_command_line import full_disk
from test_gradients_figures import inner_products

import moediag.analysis
from moediag.audit.gradients import RECORD, GradientRequest, seal_audit
from moediag.corrections import choose
from moediag.corrections.sources import run_source
from moediag.errors import CorruptRunError, DiskFullError, FrameError, IncompleteRunError, RunError
from moediag.folder import made_together, made_whole, read_frames, refuse_other, result_folder, settle, write_frames
from moediag.results import analyze_run, compare_runs, load_frames, report_run
from moediag.results.simulation import simulate, write_simulation
from moediag.results.trend import measure_trend, trend_request, write_trend
from moediag.run.derived import GRAMS, captures_digest, derived_damage
from moediag.run.files import process_tag, sha256_bytes, write_atomic, write_error, write_sealed
from moediag.run.reader import open_run

KIND = "moediag test"
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def in_child(root: Path, work: Callable[[], object], before_change: Callable[[int], None]) -> int:
    """Exit code of a process that does ``work`` and calls ``before_change(n)`` before its n-th change on disk."""

    def child() -> None:
        n, is_looking = 0, False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal n, is_looking
            is_write = event == "open" and str(root) in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if is_looking or not (is_write or event in CHANGES):
                return
            is_looking, n = True, n + 1
            before_change(n)
            is_looking = False

        sys.addaudithook(hook)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def killed_at(root: Path, event: int, work: Callable[[], object]) -> bool:
    """Whether ``work`` was killed before its so-many-th change on disk; False = it ended before."""
    code = in_child(root, work, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == event else None)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def contents(*paths: Path) -> dict[str, bytes]:
    """Every file at or below some paths, by name from the first one's folder."""
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return {file.relative_to(paths[0].parent).as_posix(): file.read_bytes() for file in files}


def fill(folder: Path, version: int) -> None:
    """A result; each version has a file that the other lacks."""
    write_atomic(folder / f"only_{version}.parquet", b"x")
    write_atomic(folder / "figures" / "a.png", f"{version}".encode())
    write_sealed(folder / "summary.json", {"kind": KIND, "request": {"of": "the same"}, "version": version})


def make(path: Path, version: int) -> None:
    with result_folder(path, KIND, {"of": "the same"}) as folder:
        fill(folder, version)


def make_beside(root: Path, version: int) -> None:
    """Two names that belong together, in a folder that holds other things, too."""
    with made_together(root, "analysis") as made:
        fill(made / "analysis", version)
        write_sealed(made / "summary.json", {"version": version})


@pytest.mark.parametrize("is_there", [True, False])
def test_killed_at_every_step_the_old_folder_or_the_new_one_is_whole(tmp_path: Path, is_there: bool) -> None:
    """And the same command makes the new one, leaving nothing beside it."""
    make(tmp_path / "new" / "out", 2)
    new, places = contents(tmp_path / "new" / "out"), set()
    for event in range(1, 1000):
        root = tmp_path / str(event)
        root.mkdir()
        if is_there:
            make(root / "out", 1)
        old = contents(root / "out")
        if not killed_at(root, event, lambda out=root / "out": make(out, 2)):
            break
        now, ready = contents(root / "out"), contents(root / ".out.ready" / "out")
        assert now in (old, new) or (not now and ready == new)
        places.add("old" if now == old else "new" if now == new else "ready")
        killed_at(root, random.randint(1, 6), lambda root=root: settle(root, "out"))
        settle(root, "out")
        assert contents(root / "out") in (old, new)
        make(root / "out", 2)
        assert contents(root / "out") == new
        assert [path.name for path in root.iterdir()] == ["out"]
    assert event > 15
    assert places >= {"old", "new"}


def test_killed_at_every_step_names_that_belong_together_are_of_one_version(tmp_path: Path) -> None:
    """Bug: analyze wrote frames over frames and the summary last: a kill between left an analysis of two versions."""
    places = set()
    for event in range(1, 1000):
        root = tmp_path / str(event)
        root.mkdir()
        write_atomic(root / "run.json", b"mine")
        make_beside(root, 1)
        old = contents(root / "analysis", root / "summary.json")
        if not killed_at(root, event, lambda root=root: make_beside(root, 2)):
            break
        for _ in range(2):
            killed_at(root, random.randint(1, 6), lambda root=root: settle(root, "analysis"))
        settle(root, "analysis")
        now = contents(root / "analysis", root / "summary.json")
        make_beside(root, 2)
        new = contents(root / "analysis", root / "summary.json")
        assert now in (old, new)
        places.add(now == old)
        assert sorted(path.name for path in root.iterdir()) == ["analysis", "run.json", "summary.json"]
    assert event > 20
    assert places == {True, False}


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    before = contents(tmp_path / "out")

    def fail() -> None:
        with result_folder(tmp_path / "out", KIND, {"of": "the same"}) as folder:
            fill(folder, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_reported_by_the_name_that_the_user_gave(tmp_path: Path) -> None:
    """Bug: the message named a file in the hidden folder where the result was being made, which is gone by then."""
    make(tmp_path / "out", 1)
    before = contents(tmp_path / "out")
    with pytest.raises(DiskFullError) as error, result_folder(tmp_path / "out", KIND, {"of": "the same"}) as folder:
        raise write_error(OSError(errno.ENOSPC, "No space left on device"), folder / "tokens.parquet", 9)
    assert str(error.value).startswith(f"no space to write {tmp_path / 'out'}; what was there is unchanged:")
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    """Bug: compare, simulate and trend found it out when everything was computed, and named a hidden folder."""
    with full_disk(tmp_path, 1 << 20):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        for path in (tmp_path / "out", tmp_path / "new" / "out"):
            message = f"^cannot write {path}: {tmp_path} is not writable; give -o a folder elsewhere"
            with pytest.raises(RunError, match=message):
                refuse_other(path, KIND, {})
        with pytest.raises(RunError, match=f"^cannot write {tmp_path / 'analysis'}: Read-only file system; make it"):
            make_beside(tmp_path, 1)


def test_what_a_dead_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    dead, living = (
        tmp_path / f".out.{process_tag(pid)}.new" for pid in (4194303, os.getppid())
    )  # above all process ids
    for folder in (dead, living):
        fill(folder / "out", 1)
    make(tmp_path / "out", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"out", living.name}


@pytest.mark.parametrize(
    ("name", "found"),
    [("thesis.tex", "thesis.tex"), ("summary.json", "summary.json"), (".git/config", ".git"),
     ("run.json", "a moediag run")],
)  # fmt: skip
def test_a_folder_of_something_else_is_refused_in_one_line_with_force_too(
    tmp_path: Path, name: str, found: str
) -> None:
    write_atomic(tmp_path / "out" / name, b"years of work")
    for force in (False, True):
        with pytest.raises(RunError) as error:
            refuse_other(tmp_path / "out", KIND, {}, force)
        wanted = f"{tmp_path / 'out'}: expected a new folder or a {KIND}, found {found}; give -o another folder"
        assert str(error.value) == wanted
    assert (tmp_path / "out" / name).read_bytes() == b"years of work"


@pytest.mark.parametrize("name", ["notes.txt", "figures/mine.txt", "wide/summary.json", "old/trend.parquet"])
def test_a_file_of_the_users_in_a_result_folder_is_not_lost(tmp_path: Path, name: str) -> None:
    """Bug: what lay in a comparison or a trend was removed with it."""
    make(tmp_path / "out", 1)
    write_atomic(tmp_path / "out" / name, b"mine")
    with pytest.raises(RunError, match=f"expected a new folder or a {KIND}, found {name}; give -o another folder"):
        make(tmp_path / "out", 2)
    assert (tmp_path / "out" / name).read_bytes() == b"mine"


def test_hidden_files_of_a_notebook_or_file_system_do_not_block_the_same_command(tmp_path: Path) -> None:
    make(tmp_path / "out", 1)
    write_atomic(tmp_path / "out" / ".ipynb_checkpoints" / "report-checkpoint.md", b"x")
    make(tmp_path / "out", 2)
    assert not (tmp_path / "out" / ".ipynb_checkpoints").exists()


def test_another_request_wants_force_and_an_empty_folder_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", 1)
    with pytest.raises(RunError, match=r"another request \(the same\); give -o another folder, or --force to replace"):
        refuse_other(tmp_path / "out", KIND, {"of": "other"})
    refuse_other(tmp_path / "out", KIND, {"of": "other"}, force=True)


def test_a_result_that_a_kill_left_ready_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """Its request is refused as if it were in its place."""
    fill(tmp_path / ".out.ready" / "out", 1)
    with pytest.raises(RunError, match="another request"):
        refuse_other(tmp_path / "out", KIND, {"of": "other"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_frames_are_written_as_declared_and_read_only_whole(analysed: Path, tmp_path: Path) -> None:
    frame = load_frames(open_run(analysed / "run"))["logp_metrics"]
    digests = write_frames(tmp_path, {"logp_metrics": frame})
    assert digests == {"logp_metrics": sha256_bytes((tmp_path / "logp_metrics.parquet").read_bytes())}
    pd.testing.assert_frame_equal(read_frames(tmp_path, digests, "again")["logp_metrics"], frame)
    with pytest.raises(FrameError, match="undeclared columns"):
        write_frames(tmp_path, {"logp_metrics": frame.assign(other=1)})
    (tmp_path / "logp_metrics.parquet").write_bytes(b"x")
    with pytest.raises(CorruptRunError, match="is not the frame that was written .*; again"):
        read_frames(tmp_path, digests, "again")
    (tmp_path / "logp_metrics.parquet").unlink()
    with pytest.raises(IncompleteRunError, match=r"logp_metrics.parquet is missing; again"):
        read_frames(tmp_path, digests, "again")


@dataclass(frozen=True)
class Flow:
    """A command that writes a result below a folder.

    Args:
        work: (root, version) -> writes that version.
        names: what it writes, from root.
    """

    work: Callable[[Path, int], object]
    names: tuple[str, ...]


def simulated(root: Path, version: int) -> None:
    run = open_run(root / "run")
    chosen = choose([("none", "icepop")[version - 1]], [])
    simulation = simulate(run_source(run, ("infer", "train"), None), chosen, "run")
    write_simulation(simulation, run.path / "simulate" / "infer~train", [], {"of": str(version)}, force=True)


def compared(root: Path, version: int) -> None:
    compare_runs([root / "run", root / "other"], root / "out", training_window=version)


def trended(root: Path, version: int) -> None:
    table = root / "steps.csv"
    pd.DataFrame({"step": [0, 50, 100], "k3": [1e-3, 2e-3, version * 1e-3], "k3_se": 1e-4}).to_csv(table, index=False)
    trend = measure_trend([table], None, None)
    write_trend(trend, root / "trend", trend_request([table], None, None, root / "trend"))


def audited(root: Path, version: int) -> None:
    """The gradient audit, but for the engine: of inner products made by hand."""
    run, (record, arrays) = open_run(root / "run"), inner_products()
    data = safetensors.numpy.save(arrays)
    about = {"request": asdict(GradientRequest(n_sequences=version)), "grams_sha256": sha256_bytes(data)}
    with made_whole(run.path / "gradients") as folder:
        write_atomic(folder / GRAMS, data)
        write_sealed(folder / RECORD, {**record, **about})
        seal_audit(folder, captures_digest(run, ("train", "infer")))


FLOWS = {
    "analyze": Flow(
        lambda root, version: analyze_run(open_run(root / "run"), no_text=version == 1),
        ("run/analysis", "run/summary.json"),
    ),
    "report": Flow(
        lambda root, version: report_run(open_run(root / "run"), training_window=version),
        ("run/figures", "run/report.md", "run/report.html"),
    ),
    "compare": Flow(compared, ("out",)),
    "simulate": Flow(simulated, ("run/simulate/infer~train",)),
    "trend": Flow(trended, ("trend",)),
    "audit": Flow(audited, ("run/gradients",)),
}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two analysed dense runs."""
    root = tmp_path_factory.mktemp("flows")
    analyze_run(make_scripted_run(root / "run", n_prompts=2, dense=True))
    shutil.copytree(root / "run", root / "other")
    return root


def states(root: Path, work: Callable[[], object], to: Path) -> Iterator[Path]:
    """What is on disk before every change that ``work`` makes: what a kill there would leave."""
    assert in_child(root, work, lambda n: shutil.copytree(root, to / f"{n:04}", copy_function=os.link)) == 0
    yield from sorted(to.iterdir())


@pytest.mark.parametrize("name", FLOWS)
def test_every_command_leaves_its_old_result_or_its_new_one_at_every_step(
    name: str, analysed: Path, tmp_path: Path
) -> None:
    """Bug: analyze, report, simulate and the audit wrote into the folder that was there, file by file."""
    flow, root = FLOWS[name], shutil.copytree(analysed, tmp_path / "root")

    def written(state: Path) -> dict[str, bytes]:
        return contents(*(state / part for part in flow.names))

    flow.work(root, 1)
    old, before = written(root), contents(root)
    seen = []
    for state in states(root, lambda: flow.work(root, 2), tmp_path / "states"):
        for folder, what in ((state, "out"), (state, "trend"), (state / "run" / "simulate", "infer~train")):
            settle(folder, what)
        assert derived_damage(state / "run") == []
        load_frames(open_run(state / "run"))
        seen.append(written(state))
    new = written(root)
    assert old != new
    assert len(seen) > 10
    assert all(one in (old, new) for one in seen)
    assert old in seen
    assert new in seen
    changed = {path for path, data in contents(root).items() if before.get(path) != data}
    written_by = tuple(f"root/{part}" for part in (*flow.names, "steps.csv"))
    assert all(path.startswith(written_by) for path in changed), "something was left behind"


def test_no_analysis_writes_a_file() -> None:
    """Bug: analysis/gradients wrote frames and a summary, in a room that says it writes none."""
    for path in sorted(Path(moediag.analysis.__file__).parent.rglob("*.py")):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        assert not {name for name in names if name.startswith("moediag.folder") or ".write" in name}, path
