"""Ctrl-C and SIGTERM: one line, the shell's exit code, no traceback, whatever is going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MOEDIAG


def registered() -> list[str]:
    """The names of all commands."""
    from moediag.cli.main import app

    return [str(command.name) for command in app.registered_commands]


CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"
LINES = {signal.SIGINT: "moediag: interrupted; ", signal.SIGTERM: "moediag: ended by SIGTERM; "}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_one_line(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C used to print nothing (typer swallows KeyboardInterrupt), SIGTERM left without a word."""
    pipe = tmp_path / "prompts.jsonl"
    os.mkfifo(pipe)  # a prompts file that takes its time: reading blocks for as long as it is held open
    command = [str(MOEDIAG), "profile", str(CHECKPOINT), "--prompts", str(pipe), "-o", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pipe.open("wb"):  # opens once the command reads
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + how, "")
    assert err.count("\n") == 1
    assert err.startswith(LINES[how])
    assert not (tmp_path / "run").exists()


CLEANING_UP = """
import sys, time
from moediag.cli.signals import Interrupted, interruptible
try:
    with interruptible():
        try:
            print("working", flush=True)
            time.sleep(60)
        finally:
            print("cleaning up", flush=True)
            time.sleep(60)
except Interrupted as signal:
    sys.exit(signal.exit_code)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_another_signal_during_clean_up_ends_it_at_once(second: signal.Signals) -> None:
    """A second Ctrl-C while an engine was being ended used to print a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLEANING_UP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    process.send_signal(second)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + second
    assert err.count("\n") == 1
    assert err.startswith(LINES[second])


def test_main_leaves_the_handlers_of_its_caller_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    """Library users call main() in a process of theirs."""
    from moediag.cli.main import main

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main(["--help"]) == 0
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


RESUMING = {"demo", "profile", "capture", "diagnose", "selftest -o folder"}


@pytest.mark.parametrize("command", [*sorted(registered()), "selftest -o folder"])
def test_a_resume_is_promised_only_where_the_same_command_resumes(monkeypatch, capsys, command: str) -> None:
    """Bug: SIGTERM during trend, and any other command that captures nothing, promised a resume."""
    from moediag.cli import main as entry

    monkeypatch.setattr(entry, "_run", lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert entry.main([*command.split(), "x"]) == 128 + signal.SIGTERM
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    said = capsys.readouterr().err
    assert ("to resume" in said) == (command in RESUMING)
    assert ("starts over" in said) == (command not in RESUMING)
