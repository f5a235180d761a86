"""Killed, interrupted, out of space: the same command resumes, and the arrays equal an undisturbed run's."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import MOEDIAG, run_moediag, write_jsonl
from test_command_line import full_disk

from moediag.run.check import check_run
from moediag.run.directory import open_run

pytestmark = pytest.mark.engines

WORDS = ("for", "while", "assert", "import", "return", "yield", "with", "try")
OPTIONS = ("--max-tokens", "12", "--shard-size", "2")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, object]] = [
        {"prompt": f"The {word} statement is" + " so" * i} for i, word in enumerate(WORDS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def undisturbed(random_moe: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_moediag("profile", random_moe, "--prompts", prompts, "-o", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return run


def captured(run: Path) -> dict[str, bytes]:
    """Content of every captured array and token table."""
    files = [*run.glob("arms/*/*.safetensors"), *run.glob("tokens/*.parquet"), run / "prompts.parquet"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def kill_when(command: list[str], ready: object, how: signal.Signals) -> int:
    """Start the command, send it the signal once ``ready`` says so, and return its exit status."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not ready() and process.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, "the command ended before it could be killed"
    process.send_signal(how)
    return process.wait(60)


def wait_until_engines_are_gone(run: Path) -> None:
    """The engine process ends by its lifeline; until then it holds the lock of the arm it writes."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if all(_is_free(lock) for lock in run.glob("arms/*/.lock")):
            return
        time.sleep(0.1)
    pytest.fail("an engine process outlived its parent")


def _is_free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_killed_at_random_moments_it_resumes_to_the_same_arrays(
    random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """kill -9 in each arm at a random moment, an interrupt in between, then the same command to the end."""
    run = tmp_path / "run"
    command = list(map(str, [MOEDIAG, "profile", random_moe, "--prompts", prompts, "-o", run, *OPTIONS]))
    delay = random.Random(os.getpid()).random()

    def some_shards(arm: str, n_shards: int) -> bool:
        return len(list(run.glob(f"arms/{arm}/shard-*.json"))) >= n_shards and not time.sleep(delay * 0.1)

    assert kill_when(command, lambda: some_shards("infer", 1), signal.SIGKILL) == -signal.SIGKILL
    wait_until_engines_are_gone(run)
    assert open_run(run).missing_shards("infer")
    assert kill_when(command, lambda: some_shards("infer", 3), signal.SIGINT) == 130
    wait_until_engines_are_gone(run)
    assert kill_when(command, lambda: some_shards("train", 1), signal.SIGKILL) == -signal.SIGKILL
    wait_until_engines_are_gone(run)
    assert open_run(run).is_complete("infer")
    done = run_moediag(*command[1:])
    assert done.returncode == 0, done.stderr
    assert captured(run) == captured(undisturbed)
    assert (run / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()
    assert check_run(open_run(run)) == []


def test_a_complete_run_is_reported_as_complete(random_moe: Path, prompts: Path, undisturbed: Path) -> None:
    before = captured(undisturbed)
    done = run_moediag("profile", random_moe, "--prompts", prompts, "-o", undisturbed, *OPTIONS)
    assert done.returncode == 0
    assert done.stderr.count("complete, nothing to capture") == 2
    assert captured(undisturbed) == before


def test_another_configuration_is_refused(random_moe: Path, prompts: Path, undisturbed: Path) -> None:
    before = captured(undisturbed)
    for option, complaint in (("--max-tokens=13", "max_tokens: 12 there, 13 asked"), ("--dtype=float32", "dtype")):
        done = run_moediag("profile", random_moe, "--prompts", prompts, "-o", undisturbed, *OPTIONS, option)
        assert done.returncode == 1
        assert complaint in done.stderr.strip().splitlines()[-1]
    assert captured(undisturbed) == before


def test_capture_arm_by_arm_equals_profile(random_moe: Path, prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The two engines may live in different environments: one command per arm gives the same run."""
    run = tmp_path / "run"
    early = run_moediag("capture", "train", random_moe, "--prompts", prompts, "-o", run, *OPTIONS)
    assert early.returncode == 1
    assert "has no tokens yet" in early.stderr.strip().splitlines()[-1]
    assert run_moediag("capture", "infer", random_moe, "--prompts", prompts, "-o", run, *OPTIONS).returncode == 0
    train = run_moediag("capture", "train", random_moe, "-o", run)
    assert train.returncode == 0, train.stderr
    assert captured(run) == captured(undisturbed)
    analyzed = run_moediag("analyze", run, "--json")
    assert analyzed.returncode == 0, analyzed.stderr
    assert analyzed.stdout == (run / "summary.json").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_loses_nothing(undisturbed: Path, random_moe: Path, tmp_path: Path) -> None:
    """Out of space while an arm is written: one line, what was committed stays, and the same command resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with full_disk(disk, 1 << 20):
        run = disk / "run"
        subprocess.run(["cp", "-r", str(undisturbed), str(run)], check=True)
        for path in [*run.glob("arms/train/shard-*"), run / "arms/train/arm.json"]:
            path.unlink()
        filler = disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 20_000))
        failed = run_moediag("capture", "train", random_moe, "-o", run)
        assert failed.returncode == 1
        assert "no space to write" in failed.stderr.strip().splitlines()[-1]
        assert not list(run.rglob("*.tmp"))
        filler.unlink()
        assert run_moediag("capture", "train", random_moe, "-o", run).returncode == 0
        assert captured(run) == captured(undisturbed)
