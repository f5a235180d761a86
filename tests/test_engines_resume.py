"""Killed, interrupted, out of space: the same command resumes, and the arrays equal an undisturbed run's."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MOEDIAG, KeptEngines, run_here, write_jsonl
from test_command_line import full_disk

from moediag.hygiene import check_run
from moediag.run.claims import lock
from moediag.run.reader import open_run

pytestmark = pytest.mark.engines

WORDS = ("for", "while", "assert", "import", "return", "yield", "with", "try")
OPTIONS = ("--max-tokens", "12", "--shard-size", "1")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, object]] = [
        {"prompt": f"The {word} statement is" + " so" * i} for i, word in enumerate(WORDS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def undisturbed(random_moe: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_here("profile", random_moe, "--prompts", prompts, "-o", run, "--no-floors", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return run


def captured(run: Path) -> dict[str, bytes]:
    """Content of every captured array and token table."""
    files = [*run.glob("arms/*/*.safetensors"), *run.glob("tokens/*.parquet"), run / "prompts.parquet"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def kill_when(command: list[str], ready: object, how: signal.Signals) -> tuple[int, str]:
    """Start the command, send it the signal once ``ready`` says so; its exit status and standard error."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not ready() and process.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, "the command ended before it could be killed"
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def wait_until_engines_are_gone(run: Path) -> None:
    """The engine process ends by its lifeline; until then it keeps others from removing the run."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not is_in_use(run):
            return
        time.sleep(0.1)
    pytest.fail("an engine process outlived its parent")


def is_in_use(run: Path) -> bool:
    with (run / "run.json").open("r+b") as manifest:
        return not lock(manifest, run / "run.json")


def test_killed_at_random_moments_it_resumes_to_the_same_arrays(
    random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """kill -9 in each arm at a random moment, SIGTERM in between, then the same command to the end."""
    run = tmp_path / "run"
    command = list(map(str, [MOEDIAG, "profile", random_moe, "--prompts", prompts, "-o", run, "--no-floors", *OPTIONS]))
    rng = random.Random(0)

    def n_done(arm: str) -> int:
        return len(list(run.glob(f"arms/{arm}/shard-?????.json")))

    def kill_after_a_shard(arm: str, how: signal.Signals) -> tuple[int, str]:
        n_before = n_done(arm)
        return kill_when(command, lambda: n_done(arm) > n_before and not time.sleep(rng.uniform(0, 0.05)), how)

    assert kill_after_a_shard("infer", signal.SIGKILL)[0] == -signal.SIGKILL
    wait_until_engines_are_gone(run)
    assert open_run(run).missing_shards("infer")
    status, err = kill_after_a_shard("infer", signal.SIGTERM)
    assert not is_in_use(run), "the engine must be gone when the command returns"
    assert status == 143
    assert err.strip().splitlines()[-1].startswith("moediag: ended by SIGTERM; what was captured is kept")
    assert "Traceback" not in err
    assert run_here("capture", "infer", random_moe, "-o", run).returncode == 0  # else the next starts vLLM again
    assert kill_after_a_shard("train", signal.SIGKILL)[0] == -signal.SIGKILL
    wait_until_engines_are_gone(run)
    assert open_run(run).is_complete("infer")
    done = run_here(*command[1:])
    assert done.returncode == 0, done.stderr
    assert captured(run) == captured(undisturbed)
    assert (run / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()
    assert check_run(open_run(run)) == []


def together(*commands: tuple[object, ...]) -> None:
    """Run the commands at the same time, each in a process of its own."""
    processes = [
        subprocess.Popen(
            list(map(str, (MOEDIAG, *command))), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for command in commands
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), errors


def test_workers_share_a_run_and_two_machines_runs_are_merged_by_copying(
    random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two slices in two folders, copied into one; then two workers who know nothing of each other in that one.

    The two engines may live in different environments: one command per arm gives the run that ``profile`` gives.
    """
    a, b = tmp_path / "a", tmp_path / "b"
    early = run_here("capture", "train", random_moe, "--prompts", prompts, "-o", a, *OPTIONS)
    assert early.returncode == 1
    assert "has no tokens yet" in early.stderr.strip().splitlines()[-1]
    begin = ("capture", "infer", random_moe, "--prompts", prompts, *OPTIONS, "--num-shards", 2)
    slices = [run_here(*begin, "--shard-index", i, "-o", folder) for i, folder in enumerate((a, b))]
    assert [done.returncode for done in slices] == [0, 0]
    remain = "slice 0/2 is complete; 4 of 8 shards of arm infer remain (0 being captured by others now)"
    assert remain in slices[0].stderr
    train = ("capture", "train", random_moe, "-o")
    early = run_here(*train, b)
    assert early.returncode == 1
    assert (
        "no tokens yet for 4 of 8 shards (shard-00000, shard-00002, shard-00004, ...)"
        in early.stderr.strip().splitlines()[-1]
    )
    subprocess.run(["cp", "-rn", f"{b}/.", f"{a}/"], check=True)
    together((*train, a), (*train, a))
    assert captured(a) == captured(undisturbed)
    assert check_run(open_run(a)) == []
    analyzed = run_here("analyze", a, "--json")
    assert analyzed.returncode == 0, analyzed.stderr
    assert analyzed.stdout == (a / "summary.json").read_text() == (undisturbed / "summary.json").read_text()


def test_a_complete_run_is_reported_as_complete(random_moe: Path, prompts: Path, undisturbed: Path) -> None:
    before = captured(undisturbed)
    done = run_here("profile", random_moe, "--prompts", prompts, "-o", undisturbed, "--no-floors", *OPTIONS)
    assert done.returncode == 0
    assert done.stderr.count("complete, nothing to capture") == 2
    assert captured(undisturbed) == before


def test_another_configuration_is_refused(random_moe: Path, prompts: Path, undisturbed: Path) -> None:
    before = captured(undisturbed)
    for option, complaint in (("--max-tokens=13", "max_tokens: 12 there, 13 given"), ("--dtype=float32", "dtype")):
        done = run_here("profile", random_moe, "--prompts", prompts, "-o", undisturbed, "--no-floors", *OPTIONS, option)
        assert done.returncode == 1
        assert complaint in done.stderr.strip().splitlines()[-1]
    assert captured(undisturbed) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_loses_nothing(undisturbed: Path, random_moe: Path, tmp_path: Path) -> None:
    """Out of space while an arm is written: one line, what was committed stays, and the same command resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with full_disk(disk, 32 << 20), closing(KeptEngines()) as engines:  # their log lies on that disk
        run = disk / "run"
        subprocess.run(["cp", "-r", str(undisturbed), str(run)], check=True)
        for path in [*run.glob("arms/train/shard-*"), run / "arms/train/arm.json"]:
            path.unlink()
        filler = disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 20_000))
        failed = run_here("capture", "train", random_moe, "-o", run, engines=engines)
        assert failed.returncode == 1
        assert "no space to write" in failed.stderr.strip().splitlines()[-1]
        assert not list(run.rglob("*.tmp"))
        filler.unlink()
        assert run_here("capture", "train", random_moe, "-o", run, engines=engines).returncode == 0
        assert captured(run) == captured(undisturbed)
