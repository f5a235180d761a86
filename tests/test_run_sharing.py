"""Several workers, one run: nothing captured twice or lost, whoever dies when, and merging is a plain copy."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import HUNT, SEED
from records import arm_of, made_otherwise
from scripted_engine import (
    Death,
    create_scripted_run,
    fill_scripted_run,
    make_scripted_run,
    start_worker,
    write_scripted_shard,
)

from moediag.errors import RunConflictError
from moediag.hygiene import check_run
from moediag.run import claims
from moediag.run.capture import Shard, Slice
from moediag.run.create import replaced
from moediag.run.derived import derived_damage
from moediag.run.reader import open_run
from moediag.run.records import write_record
from moediag.run.writer import RunWriter

LAYOUT: dict[str, Any] = {"n_prompts": 12, "shard_size": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted_run(tmp_path_factory.mktemp("undisturbed") / "run", **LAYOUT).path


def captured(run: Path) -> dict[str, bytes]:
    """Content of every captured array and token table."""
    files = [*run.glob("arms/*/*.safetensors"), *run.glob("tokens/*.parquet"), run / "prompts.parquet"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def assert_whole(run: Path, undisturbed: Path) -> None:
    """Complete, clean, and byte for byte what an undisturbed worker captures; no temporary file is left.

    A claim may be: of a worker that died between committing its last shard and saying so.
    """
    assert check_run(open_run(run)) == []
    assert derived_damage(run) == []
    assert captured(run) == captured(undisturbed)
    assert {path.name for path in run.rglob(".*")} <= {".claims"}


def finish(processes: list[Any], exitcode: int | None = 0) -> None:
    for process in processes:
        process.join(60)
        assert exitcode is None or process.exitcode == exitcode


@pytest.mark.parametrize(
    "workers",
    [(Slice(),), (Slice(), Slice(), Slice()), (Slice(0, 3), Slice(1, 3), Slice(2, 3)), (Slice(), Slice(1, 2))],
)
def test_workers_that_start_together_fill_one_run_and_capture_nothing_twice(
    tmp_path: Path, undisturbed: Path, workers: tuple[Slice, ...]
) -> None:
    run, journal = tmp_path / "run", tmp_path / "journal"
    options = {"pause": 0.01, "journal": journal, "arms": ("infer",)}
    finish([start_worker(run, LAYOUT, worker, **options) for worker in workers])
    finish([start_worker(run, LAYOUT, worker, **{**options, "arms": ("train",)}) for worker in workers])
    assert_whole(run, undisturbed)
    assert not (run / ".claims").exists()
    events = Counter(line.rsplit(" ", 1)[0] for line in journal.read_text().splitlines())
    assert len(events) == 2 * 2 * 6
    assert set(events.values()) == {1}


def test_every_shard_says_which_worker_made_it(tmp_path: Path) -> None:
    fill_scripted_run(tmp_path / "run", LAYOUT, Slice(1, 2), ("infer",))
    run = open_run(tmp_path / "run")
    done = [shard for shard in run.shards if run.has_capture("infer", shard)]
    assert [shard.index for shard in done] == [1, 3, 5]
    facts = run.capture_sidecar("infer", done[0])
    assert facts.worker == "1/2"
    assert len(facts.host or "") == 12
    assert facts.seconds is not None


def test_a_shard_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    with RunWriter(run).claim("infer", run.shards[2]) as is_mine:
        assert is_mine
        assert RunWriter(run).is_claimed("infer", run.shards[2])
        finish([start_worker(run.path, LAYOUT, arms=("infer",))])
    assert [shard.index for shard in run.missing_shards("infer")] == [2]
    assert not RunWriter(run).is_claimed("infer", run.shards[2])


def test_what_a_worker_that_died_had_held_is_captured_by_one_that_is_still_there(tmp_path: Path) -> None:
    """A worker that passes a held shard comes back to it: its holder may have died meanwhile."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    doomed = start_worker(run.path, LAYOUT, Slice(0, 6), ("infer",), pause=60)
    while not RunWriter(run).is_claimed("infer", run.shards[0]):
        time.sleep(0.005)
    other = start_worker(run.path, LAYOUT, arms=("infer",), pause=0.05)
    while not run.has_capture("infer", run.shards[1]):
        time.sleep(0.005)
    doomed.kill()
    finish([doomed], -signal.SIGKILL)
    finish([other])
    assert run.is_complete("infer")


def test_a_worker_looks_again_once_it_holds_a_shard(tmp_path: Path) -> None:
    """Between listing the missing shards and claiming one, another worker may have committed it."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    writer = RunWriter(run)
    writer.begin_arm(arm_of(run, "infer"))
    taken: list[int] = []

    def capture_shard(shard: Shard, on_done: object) -> None:
        taken.append(shard.index)
        write_scripted_shard(writer, "infer", shard)
        if shard.index == 0:  # another worker commits the next two while this one is busy
            for other in run.shards[1:3]:
                write_scripted_shard(writer, "infer", other)

    from moediag.engines.process import fill_missing_shards

    class Silent:
        def progress(self, done: float, total: int, unit: str) -> None:
            assert done <= total

    fill_missing_shards(writer, "infer", Silent(), capture_shard)  # type: ignore[arg-type]
    assert taken == [0, 3, 4, 5]


def test_only_leftovers_of_the_shard_that_is_claimed_are_removed(tmp_path: Path) -> None:
    """Another worker's temporary files used to be swept away by whoever began the arm next."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    writer = RunWriter(run)
    writer.begin_arm(arm_of(run, "infer"))
    names = [f".{shard.stem}.safetensors.host-1.tmp" for shard in run.shards[:2]]
    for name in names:
        (run.path / "arms/infer" / name).write_bytes(b"half")
    with RunWriter(run).claim("infer", run.shards[0]):
        assert [(run.path / "arms/infer" / name).exists() for name in names] == [False, True]


def test_a_claim_is_never_held_twice_while_files_come_and_go(tmp_path: Path) -> None:
    """Removing a lock file that others may have open lets two in, unless the name is looked at again."""
    inside, worst = [0], [0]

    def work() -> None:
        for _ in range(300):
            with claims.claim(tmp_path / ".claims" / "x", wait=True) as is_mine:
                assert is_mine
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
                inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert worst == [1]
    assert not (tmp_path / ".claims").exists()


def test_of_workers_that_begin_an_arm_differently_at_the_same_instant_one_kind_gets_it(tmp_path: Path) -> None:
    """An arm that holds nothing may be begun anew: shards of who had begun it before passed for the other's."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    refused: list[str] = []
    filled: list[str] = []
    barrier = threading.Barrier(4)

    def begin(version: str, shard: Shard) -> None:
        writer = RunWriter(open_run(run.path))
        barrier.wait()
        try:
            writer.begin_arm(made_otherwise(arm_of(run, "infer"), versions={"scripted": version}))
            with writer.claim("infer", shard):
                write_scripted_shard(writer, "infer", shard)
            filled.append(version)
        except RunConflictError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, "1122", run.shards[:4]))
    record = run.arm("infer")
    assert record.captured is not None
    assert set(filled) == {record.captured.versions["scripted"]}
    assert len(filled) + len(refused) == 4
    assert len(refused) >= 2
    assert all("versions.scripted" in line or "begun anew by another process" in line for line in refused)
    assert derived_damage(run.path) == []


def test_a_shard_claimed_while_its_arm_is_begun_anew_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for claims and the new arm.json a shard of the old arm was claimed, filled and kept."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    early, late = RunWriter(run), RunWriter(run)
    early.begin_arm(made_otherwise(arm_of(run, "infer"), versions={"scripted": "1"}))
    refused: list[str] = []

    def fill() -> None:
        try:
            with early.claim("infer", run.shards[0]):
                write_scripted_shard(early, "infer", run.shards[0])
        except RunConflictError as error:
            refused.append(str(error))

    filler = threading.Thread(target=fill)

    def write_late(path: Path, record: Any) -> None:
        monkeypatch.undo()
        filler.start()
        filler.join(0.5)  # as long as a small shard takes and longer
        write_record(path, record)

    monkeypatch.setattr("moediag.run.writer.write_record", write_late)
    late.begin_arm(made_otherwise(arm_of(run, "infer"), versions={"scripted": "2"}))
    filler.join()
    assert len(refused) == 1
    assert "begun anew by another process" in refused[0]
    assert run.missing_shards("infer") == list(run.shards)


def test_a_worker_whose_arm_was_begun_anew_writes_nothing_into_it(tmp_path: Path) -> None:
    """Its shard used to be sealed as made by the other's version."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    early, late = RunWriter(run), RunWriter(run)
    for writer, version in ((early, "1"), (late, "2")):
        writer.begin_arm(made_otherwise(arm_of(run, "infer"), versions={"scripted": version}))
    with pytest.raises(RunConflictError, match="begun anew by another process"):
        write_scripted_shard(early, "infer", run.shards[0])
    assert run.missing_shards("infer") == list(run.shards)
    write_scripted_shard(late, "infer", run.shards[0])
    with pytest.raises(RunConflictError, match=r"versions.scripted: '2' there, '1' given"):
        early.begin_arm(made_otherwise(arm_of(run, "infer"), versions={"scripted": "1"}))


def test_workers_that_make_the_run_at_the_same_instant_both_find_it_made(tmp_path: Path) -> None:
    """The second of two used to remove the first one's run folder, with what it had captured."""
    for attempt in range(5):
        path = tmp_path / f"run-{attempt}"
        finish([start_worker(path, LAYOUT, arms=()) for _ in range(3)])
        assert open_run(path).record.prompts.n == 12  # type: ignore[union-attr]
    assert {folder.name for folder in tmp_path.iterdir()} == {f"run-{attempt}" for attempt in range(5)}


def test_force_never_removes_a_run_that_another_worker_fills(tmp_path: Path) -> None:
    """--force used to remove a run under a living writer, which then wrote into the run that took its place."""
    run = create_scripted_run(tmp_path / "run", **LAYOUT)
    worker = start_worker(run.path, LAYOUT, arms=("infer",), pause=0.1)
    while not run.missing_shards("infer") or run.has_capture("infer", run.shards[0]) is False:
        time.sleep(0.005)
    with pytest.raises(RunConflictError, match="being filled by another process"):
        create_scripted_run(run.path, **LAYOUT, force=True)
    finish([worker])
    assert run.is_complete("infer")
    assert create_scripted_run(run.path, **LAYOUT, force=True).arms() == []


@pytest.mark.timeout(900 * HUNT)
def test_killed_at_random_moments_force_never_loses_the_run_that_it_replaces(tmp_path: Path, undisturbed: Path) -> None:
    """Bug: between removing the finished run and the first shard of the new one, a kill lost both."""
    rng = random.Random(SEED)
    places = set()
    for attempt in range(25 * HUNT):
        run = tmp_path / str(attempt) / "run"
        shutil.copytree(undisturbed, run)
        layout = {**LAYOUT, "seed": 1, "force": True}
        worker = start_worker(run, layout, arms=("infer",), death=Death(at_event=rng.randint(1, 120)))
        worker.join(60)
        assert worker.exitcode in (0, *SUDDEN)
        whole = [path for path in (run, replaced(run)) if path.exists() and captured(path) == captured(undisturbed)]
        assert len(whole) == 1
        places.add(whole[0].name)
        if not any(run.glob("arms/*/shard-*.json")) or whole == [run]:
            fill_scripted_run(run, LAYOUT)  # the old command: as if the other had never been
            assert_whole(run, undisturbed)
    assert places == {"run", ".run.replaced"}


def test_a_run_that_was_started_anew_is_not_written_to(tmp_path: Path) -> None:
    """A worker that had opened the run before --force used to capture into the new one."""
    early = create_scripted_run(tmp_path / "run", **LAYOUT)
    create_scripted_run(tmp_path / "run", **{**LAYOUT, "seed": 1}, force=True)
    with pytest.raises(RunConflictError, match="started anew"), RunWriter(early).in_use():
        pass
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunConflictError, match="has gone"), RunWriter(early).in_use():
        pass


def test_given_tokens_written_again_do_not_disturb_a_reader(tmp_path: Path) -> None:
    """A second worker of given completions used to take the committed tokens away for a moment."""
    run = make_scripted_run(tmp_path / "run", **LAYOUT)
    path = run.path / "tokens" / "shard-00000.parquet"
    before = path.stat()
    RunWriter(run).write_tokens(run.shards[0], run.tokens(run.shards[0]))
    assert path.stat().st_ino == before.st_ino


def copy_missing(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-rn", f"{source}/.", f"{target}/"], check=True)


def test_merging_two_machines_runs_is_a_plain_copy(tmp_path: Path, undisturbed: Path) -> None:
    for name, worker in (("a", Slice(0, 2)), ("b", Slice(1, 2))):
        fill_scripted_run(tmp_path / name, LAYOUT, worker)
        assert not open_run(tmp_path / name).is_complete("infer")
    copy_missing(tmp_path / "b", tmp_path / "a")
    assert_whole(tmp_path / "a", undisturbed)


def test_shards_merged_from_another_version_are_found(tmp_path: Path) -> None:
    """A plain copy keeps one arm.json: shards that another version made used to pass under its name."""
    for name, worker, version in (("a", Slice(0, 2), "1"), ("b", Slice(1, 2), "2")):
        run = create_scripted_run(tmp_path / name, **LAYOUT)
        writer = RunWriter(run, worker)
        writer.begin_arm(made_otherwise(arm_of(run, "infer"), versions={"scripted": version}))
        for shard in writer.own_missing_shards("infer"):
            write_scripted_shard(writer, "infer", shard)
    copy_missing(tmp_path / "b", tmp_path / "a")
    assert [where for where, _ in derived_damage(tmp_path / "a")] == [f"arms/infer/shard-0000{i}" for i in (1, 3, 5)]


SUDDEN = (-signal.SIGKILL, -signal.SIGXFSZ)


def deaths(seed: int) -> Iterator[tuple[tuple[Slice, ...], tuple[str, ...], Death | None, float | None]]:
    """Who works on what, and how they die: at a file operation, in the middle of a write, after so many seconds."""
    rng = random.Random(seed)
    while True:
        slices = rng.choice([(Slice(),), (Slice(), Slice()), (Slice(0, 2), Slice(1, 2))])
        arms = rng.choice([("infer",), ("infer", "train"), ("infer", "train")])
        yield slices, arms, Death(at_event=rng.randint(1, 250)), None
        yield slices, arms, Death(at_byte=rng.choice([rng.randint(1, 400), rng.randint(1, 2200)])), None
        yield slices, arms, None, rng.uniform(0.0, 0.25)


@pytest.mark.timeout(900 * HUNT)
def test_killed_at_random_moments_a_sharded_capture_resumes_to_the_same_arrays(
    tmp_path: Path, undisturbed: Path
) -> None:
    """40 sudden deaths of workers, alone and two at a time, in the middle of anything; a whole run is begun anew."""
    n_kills, n_runs = 0, 0
    for slices, arms, death, seconds in deaths(SEED):
        run, journal = tmp_path / f"run-{n_runs}", tmp_path / f"{n_runs}.journal"
        workers = [start_worker(run, LAYOUT, slice_, arms, 0.02, death, journal) for slice_ in slices]
        if seconds is not None:
            time.sleep(seconds)
            for worker in workers:
                worker.kill()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode in (0, *SUDDEN)
        n_kills += sum(worker.exitcode in SUDDEN for worker in workers)
        if n_kills >= 40 * HUNT:
            break
        if run.exists() and "train" in open_run(run).arms() and open_run(run).is_complete("train"):
            assert_whole(run, undisturbed)
            n_runs += 1
    fill_scripted_run(run, LAYOUT)
    assert_whole(run, undisturbed)
    for journal in tmp_path.glob("*.journal"):
        assert_nothing_done_twice(journal)


def assert_nothing_done_twice(journal: Path) -> None:
    lines = [line.rsplit(" ", 1)[0] for line in journal.read_text().splitlines()]
    assert set(Counter(line for line in lines if line.startswith("done")).values()) <= {1}
