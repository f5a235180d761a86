"""What a person sees in a terminal: it fits, breaks nothing inside a name, is never silent, says what it would do."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import MOEDIAG, REPOSITORY, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from test_results import make_run

from moediag.cli import console, jobs
from moediag.cli.main import GROUPS, app, main
from moediag.cli.table import table_text
from moediag.corrections import PRESETS, choose
from moediag.results import analyze_run


class Terminal(io.StringIO):
    """A stream that says that it is a terminal; its width is COLUMNS, as for any terminal."""

    def isatty(self) -> bool:
        return True


def on_screen(columns: int, *words: str) -> tuple[int, str]:
    """The command in this process, its results on a terminal of some width."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(terminal):
        patch.setenv("COLUMNS", str(columns))
        return main(list(words)), terminal.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Analysed runs of one name, in folders of their own, and one without routing."""
    folder = tmp_path_factory.mktemp("runs")
    for path, is_moe in (("a/qwen3-moe", True), ("b/qwen3-moe", True), ("dense", False)):
        analyze_run(make_run(folder / path, arms=("infer", "train"), is_moe=is_moe))
    return folder


COMMANDS = {
    "analyze": ("analyze", "a/qwen3-moe"),
    "compare": ("compare", "a/qwen3-moe", "b/qwen3-moe", "dense", "-o", "c"),
    "diff-env": ("diff-env", "a/qwen3-moe", "dense"),
    "diagnose": ("diagnose", "a/qwen3-moe"),
    "export": ("export", "a/qwen3-moe", "-o", "t.parquet", "--force"),
    "formats": ("import", "--list-formats"),
    "gate": ("gate", "a/qwen3-moe", "--require", "logp.abs_logp_diff.mean < 1", "--require", "routing.flip_rate < 1"),
    "gate-names": ("gate", "--list"),
    "env": ("env",),
    "presets": ("simulate", "--list"),
    "rules": ("validate", "--list-rules"),
    "schema": ("schema",),
    "simulate": ("simulate", "a/qwen3-moe", "--force"),
    "trend": ("trend", "a/qwen3-moe", "b/qwen3-moe", "--steps", "0,100"),
    "validate": ("validate", "a/qwen3-moe"),
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_fits_its_terminal(runs: Path, monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    """Bug: tables of 80 columns broke inside names and numbers, and sentences ran over."""
    monkeypatch.chdir(runs)
    status, text = on_screen(columns, *COMMANDS[name])
    assert status == 0
    assert text
    assert [line for line in text.splitlines() if len(line) > columns] == []
    assert "\x1b" not in text
    words = set(text.split())
    if name == "simulate":
        assert set(choose()) <= words  # every correction is one word, that can be copied
    if name == "presets":
        assert set(PRESETS) <= words
    if name == "compare":
        assert {"logp", "ratio", "KL(infer‖train),"} <= words
    if name in ("analyze", "compare"):  # bug: commands of what to do next were for a run called RUN
        assert "RUN" not in words


@pytest.mark.parametrize("module", [module for modules in GROUPS.values() for module in modules])
def test_every_help_fits_and_uses_the_width(module: ModuleType) -> None:
    longest = {}
    for columns in (80, 120):
        status, text = on_screen(columns, module.NAME, "--help")
        assert status == 0
        longest[columns] = max(map(len, text.splitlines()))
        assert longest[columns] <= columns
        assert not re.search(r"\w-$", text, re.MULTILINE)  # bug: names broke at their hyphens
    assert longest[120] >= longest[80]


WORD = st.text("abcdefgh_.:=,+-0123456789", min_size=1, max_size=14)
CELL = st.lists(WORD, max_size=5).map(" ".join)


@given(
    rows=st.integers(1, 7).flatmap(lambda n: st.lists(st.tuples(*[CELL] * n), min_size=2, max_size=5)),
    columns=st.integers(40, 160),
    is_words=st.booleans(),
)
def test_no_table_is_too_wide_or_breaks_a_word(rows: list[tuple[str, ...]], columns: int, is_words: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        patch.setenv("COLUMNS", str(columns))
        text = table_text(rows[0], rows[1:], width=100 if is_words else None)
    assert max(map(len, text.splitlines()), default=0) <= columns
    empty = {"", "–"}
    shown = [row for row in rows[1:] if set(row[1:]) - empty or is_words]
    needed = [word for row in shown for cell in row for word in cell.split()]
    assert set(needed) <= set(text.split())


def test_intervals_and_units_stay_together() -> None:
    text = console.wrapped("mean abs logp diff 0.0166 nat [0.0158, 0.0174] (n = 19,772 tokens) and 2.16 % of it", 50)
    assert "[0.0158, 0.0174]" in text
    assert "2.16 %" in text
    assert max(map(len, text.splitlines())) <= 50


def test_a_pipe_gets_whole_lines(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["validate", "a/qwen3-moe"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("words", [["schema"], ["schema", "--json"], ["simulate", "--list"]])
def test_a_reader_that_goes_ends_the_command_in_peace(words: list[str]) -> None:
    """Bug: schema | head -1 ended with a traceback and another exit code."""
    with subprocess.Popen([str(MOEDIAG), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def on_terminal(*command: str, columns: int = 80) -> tuple[int, str, float]:
    """A command on a terminal of its own: exit code, all that it wrote, its longest silence [s]."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("COLUMNS", None)
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    found, last, silence = b"", time.monotonic(), 0.0
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:
            part = b""
        silence, last = max(silence, time.monotonic() - last), time.monotonic()
        if not part:
            break
        found += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), found.decode(), silence


_SLOW = """
import time
from moediag.cli.console import attending, doing, say
with attending():
    with doing("hashing the weights"):
        time.sleep(3.5)
    say("done")
"""


def test_a_terminal_is_never_silent_for_long() -> None:
    """Bug: nothing was shown while weights were hashed, engines imported, an analysis computed."""
    status, text, silence = on_terminal(sys.executable, "-c", _SLOW)
    assert status == 0
    assert "hashing the weights ... 3 s" in text
    assert silence < 3  # on a busy machine; of its own it is one second
    assert text.split("\x1b[2K")[-1].strip() == "done"


def test_elsewhere_a_plain_line_says_what_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", _SLOW], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "hashing the weights ...\n")


def test_all_arms_take_as_long_as_those_before() -> None:
    pace = jobs.Pace([("vllm", 10), ("vllm", 20), ("transformers", 10)])
    assert pace.left() is None
    pace._seconds[0], pace._n_done[0] = 30.0, 10.0
    assert pace.left() == 3 * 20 + 3 * 10  # the other engine is taken to be as fast until it has begun
    pace._seconds[2], pace._n_done[2] = 5.0, 5.0
    assert pace.left() == 3 * 20 + 1 * 5


WRONG = [
    ("profile", "/nope", "--prompts", "pyproject.toml", "-o", "x"),
    ("profile", ".", "--prompts", "/nope.jsonl", "-o", "x"),
    ("capture", "infer", "/nope", "-o", "x"),
    ("capture", "train", ".", "-o", "/nope"),
    ("diagnose", "/nope"),
    ("diagnose", "/nope", "-o", "x"),
    ("selftest", "/nope"),
    ("inspect", "/nope"),
    *((command, "/nope") for command in ("analyze", "report", "simulate", "trend", "validate", "gate", "diff-env")),
    ("compare", ".", "/nope", "-o", "x"),
    ("export", "/nope", "-o", "x.parquet"),
]


def test_wrong_paths_are_refused_before_anything_heavy_is_imported() -> None:
    """Bug: weights were hashed and engines looked for before a prompts file was found to be missing."""
    code = (
        "import sys; from moediag.cli.main import main\n"
        f"for words in {WRONG}:\n"
        "    assert main(list(words)) == 1, words\n"
        "    heavy = {'pandas', 'torch', 'transformers', 'matplotlib', 'pyarrow'} & sys.modules.keys()\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG)
    assert all("does not exist" in line for line in lines), lines


def test_inspect_without_torch_says_what_to_install(random_moe: Path, tmp_path: Path) -> None:
    """Bug: a traceback. The command runs with every package of this installation but torch and what needs it."""
    absent = ("torch", "transformers", "vllm", "functorch", "accelerate", "tokenizers", "huggingface_hub", "moediag")
    site = tmp_path / "site"
    site.mkdir()
    for package in Path(np.__file__).parents[1].iterdir():
        if not package.name.startswith((*absent, "__editable__")) and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    code = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(site)!r}]\n"
        "from moediag.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words, complaint in (
        (["inspect", random_moe], "torch is not installed; pip install 'moediag[hf]'"),
        (["selftest"], "this needs torch, which is not installed here; pip install 'moediag[hf]'"),
    ):
        command = [sys.executable, "-S", "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"moediag: {complaint}"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["profile", "capture", "diagnose", "selftest", "demo"])
def test_a_dry_run_says_what_would_run_and_writes_nothing(
    random_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "capture", lambda *_, **__: pytest.fail("an engine was started"))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The for statement"}])
    begin = [str(random_moe), "--prompts", str(prompts), "--max-tokens", "4", "-o", "run"]
    words = {
        "profile": begin,
        "capture": ["infer", *begin],
        "diagnose": begin,
        "selftest": ["--family", "qwen3_moe", "-o", "run"],
        "demo": ["-o", "run"],
    }[command]
    assert main([command, *words, "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert "Dry run" in shown
    assert ("infer" in shown) != (command == "selftest")
    if command in ("profile", "capture", "diagnose"):
        assert "Writes   at most" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_dry_run_of_a_run_that_is_there_counts_what_is_missing(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs / "a", tmp_path / "a")) / "qwen3-moe"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["diagnose", str(run), "--dry-run"]) == 0
    assert "its arms infer, train, without an engine" in " ".join(capsys.readouterr().err.split())
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_every_long_command_has_a_dry_run() -> None:
    from typer.main import get_command

    long = {"profile", "capture", "diagnose", "selftest", "demo"}
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert long == {name for name, one in commands.items() if "dry_run" in {param.name for param in one.params}}
