"""The command line: bad input is one line and exit code 1, nothing is half-written, nothing heavy is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MOEDIAG, REPOSITORY, run_moediag, write_jsonl
from scripted_engine import make_scripted_run

import moediag
from moediag.cli import jobs
from moediag.cli import main as entry
from moediag.cli.main import app, main
from moediag.cli.options import NOT_SO
from moediag.corrections import METHODS, PRESETS
from moediag.engines import versions
from moediag.engines.arms import BOTH, HOOKS, NATIVE, UNOBSERVED
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.vllm.options import REFUSED, infer_options, observable
from moediag.errors import CheckpointError, DependencyError, EngineError
from moediag.run.files import TOKENIZER_FILES


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The for statement"}, {"prompt": "An import"}])


@pytest.fixture
def checkpoint(random_moe: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(random_moe, tmp_path / "checkpoint"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command in this process; it must fail with one line on stderr and exit code 1."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert status == 1, captured.err
    assert lines[-1].startswith("moediag: ")
    assert "Traceback" not in captured.err
    return lines[-1]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl:2: not a JSON object"),
        (json.dumps({"prompt": "x" * 500}) + "\n", "p.jsonl:1: prompt of 500 tokens, the model allows 128"),
        ('{"prompt_token_ids": [99999]}\n', "p.jsonl:1: token id 99999 is outside the vocabulary of 257"),
        (json.dumps({"prompt": "a", "completion_token_ids": [1] * 127}) + "\n", "prompt and completion of 128 tokens"),
    ],
)
def test_unusable_prompts_are_refused(
    capsys: pytest.CaptureFixture[str], random_moe: Path, tmp_path: Path, content: str | None, complaint: str
) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    assert complaint in refused(capsys, "profile", random_moe, "--prompts", path, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda c: (c / "model.safetensors").unlink(), "has no weights"),
        (lambda c: (c / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda c: (c / "tokenizer.json").write_text("{"), "tokenizer does not load"),
        (lambda c: (c / "config.json").unlink(), "has no config.json"),
        (lambda c: (c / "config.json").write_text("{"), "not readable JSON"),
        (
            lambda c: _edit_config(c, model_type="llama9", num_local_experts=0),
            "does not know the architecture 'llama9'",
        ),
        (lambda c: _edit_config(c, model_type="jamba"), "no stored tensor is the router's"),
        (lambda c: _edit_config(c, num_experts_per_tok=99), "its routing cannot be captured: decoder layer 0"),
        (lambda c: _edit_config(c, architectures=5), "of another kind than expected"),
        (lambda c: _edit_config(c, num_local_experts="x"), "of another kind than expected"),
        (lambda c: _edit_config(c, mlp_only_layers=3), "of another kind than expected"),
        (lambda c: (c / "model.safetensors").rename(c / "weights.safetensors"), "has no weights"),
        (lambda c: _edit_config(c, model_type="mine", num_local_experts=0, auto_map={}), "--trust-remote-code"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_an_unusable_checkpoint_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, prompts: Path, tmp_path: Path, spoil: object, complaint: str
) -> None:
    spoil(checkpoint)  # type: ignore[operator]
    assert complaint in refused(capsys, "profile", checkpoint, "--prompts", prompts, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


SPOILING = {
    "enforce_eager": ("false", "CUDA graphs"),
    "enable_prefix_caching": ("true", "never routed again"),
    "async_scheduling": ("true", "overlapping steps"),
    "generation_config": ("auto", "what was requested"),
    "logprobs_mode": ("processed_logprobs", "log_softmax of the raw logits"),
    "worker_extension_cls": ("mine.Extension", "taps are this option's user"),
    "speculative_config": ("{}", "drafted tokens"),
    "spec_method": ("ngram", "drafted tokens"),
    "pipeline_parallel_size": ("2", "give --observer hooks"),
    "data_parallel_size": ("2", "give --ray or --shard-index"),
    "prefill_context_parallel_size": ("2", "only its part of a sequence's rows"),
    "enable_eplb": ("true", "physical"),
    "enable_return_routed_experts": ("true", "give --observer native or both"),
    "enable_dbo": ("true", "two half batches"),
    "trust_remote_code": ("true", "give --trust-remote-code"),
    "model": ("other", "as the command's argument"),
    "dtype": ("float32", "give --dtype"),
    "seed": ("1", "give --seed"),
}
"""A value of every refused vLLM option that would spoil a capture, and what is said of it."""


@pytest.mark.parametrize("name", REFUSED)
def test_engine_options_that_would_spoil_the_capture_are_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], random_moe: Path, prompts: Path, tmp_path: Path, name: str
) -> None:
    value, reason = SPOILING[name]
    observer = "native" if name == "pipeline_parallel_size" else "hooks"
    line = refused(
        capsys, "profile", random_moe, "--prompts", prompts, "-o", tmp_path / "run", "--observer", observer,
        "--vllm-option", f"{name.replace('_', '-')}={value}",
    )  # fmt: skip
    assert line.startswith(f"moediag: vLLM option {name}=")
    assert reason in line
    assert line.endswith("; leave it out")
    assert not (tmp_path / "run").exists()


def test_options_at_the_value_that_turns_them_off_are_taken() -> None:
    """Bug: pipeline_parallel_size=1 and enable_eplb=false, vLLM's own defaults, were refused."""
    off = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "prefill_context_parallel_size": 1,
           "enable_expert_parallel": False, "enable_eplb": False, "enable_dbo": False, "trust_remote_code": False,
           "enable_return_routed_experts": False, "speculative_config": None}  # fmt: skip
    assert infer_options(off) == off
    for observer in (NATIVE, BOTH):  # which needs it
        with pytest.raises(EngineError, match="enable_return_routed_experts=False is refused"):
            infer_options(off, observer)


def test_parallel_engines_that_the_taps_can_follow_are_taken() -> None:
    parallel = {"pipeline_parallel_size": 2, "enable_expert_parallel": True}
    assert infer_options(parallel, HOOKS) == infer_options(parallel, UNOBSERVED) == observable(parallel) == parallel


def test_a_vllm_option_has_a_value(
    capsys: pytest.CaptureFixture[str], random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("profile", random_moe, "--prompts", prompts, "-o", tmp_path / "run", "--vllm-option", "nonsense")
    assert "expected KEY=VALUE" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--top-p=0", "top_p = 0.0: expected in (0, 1]"),
        ("--top-k=-7", "top_k = -7"),
        ("--temperature=inf", "temperature = inf"),
        ("--seed=-1", "seed = -1"),
    ],
)
def test_sampling_values_that_vllm_would_not_take_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], random_moe: Path, prompts: Path, tmp_path: Path, option: str, complaint: str
) -> None:
    """They used to make a run directory and start the engine first."""
    arguments = ("profile", random_moe, "--prompts", prompts, "-o", tmp_path / "run", option)
    assert complaint in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_remote_code_of_a_hub_checkpoint_needs_a_pinned_revision(
    capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path
) -> None:
    arguments = ("profile", "owner/name", "--prompts", prompts, "-o", tmp_path / "run", "--trust-remote-code")
    assert "pin it with --revision" in refused(capsys, *arguments, "--revision", "main")


def test_options_that_have_no_effect_on_joining_a_run_are_usage_errors(
    capsys: pytest.CaptureFixture[str], random_moe: Path, tmp_path: Path
) -> None:
    """Without --prompts, sampling options used to be ignored without a word."""
    assert main(["capture", "train", str(random_moe), "-o", str(tmp_path), "--max-tokens", "5"]) == 2
    assert "--max-tokens begins a run" in capsys.readouterr().err


def test_commands_on_a_folder_that_is_no_run_say_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("analyze", "report", "validate"):
        assert "is not a moediag run directory" in refused(capsys, command, tmp_path)
    (tmp_path / "b").mkdir()
    words = ("compare", tmp_path, tmp_path / "b", "-o", tmp_path / "c")
    assert "is not a moediag run directory" in refused(capsys, *words)


def test_an_output_that_holds_something_else_is_not_touched(
    capsys: pytest.CaptureFixture[str], random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    thesis = tmp_path / "run" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for force in ([], ["--force"]):
        arguments = ("profile", random_moe, "--prompts", prompts, "-o", thesis.parent, *force)
        assert "holds no run.json" in refused(capsys, *arguments)
    assert thesis.read_text() == "years of work"


def test_force_brings_the_old_run_back_when_the_new_one_does_not_start(
    capsys: pytest.CaptureFixture[str], random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    """Bug: a command that could not start had removed the finished run by then. The message names the logs."""
    run = make_scripted_run(tmp_path / "run").path
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    given = write_jsonl(tmp_path / "given.jsonl", [{"prompt": "An import", "completion_token_ids": [1, 2]}])
    for begun_with, option, complaint in (
        (given, ("--attn-implementation", "no-such-attention"), "see"),  # transformers fails to load
        (prompts, (), "has no tokens yet"),  # nothing to score
    ):
        arguments = ("capture", "train", random_moe, "--prompts", begun_with, "-o", run, "--force", *option)
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 1
        assert complaint in captured.err.splitlines()[-1]
        assert f"{run} is again the run that was there" in captured.out + captured.err
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        if complaint == "see":
            logs = Path(captured.err.split("; see ")[-1].strip())
            assert (logs / "train.log").exists()
    assert not (tmp_path / ".run.replaced").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("infer", "--vllm-option", "enforce_eager=false"), "enforce_eager=False is refused"),
        (("train-replay", "--replay-layers", "5:2"), "--replay-layers"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_the_run_is_replaced(
    capsys: pytest.CaptureFixture[str], random_moe: Path, tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    """Bug: capture made, and with --force replaced, the run before it looked at the arm's own options."""
    run = make_scripted_run(tmp_path / "run").path
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    given = write_jsonl(tmp_path / "given.jsonl", [{"prompt": "An import", "completion_token_ids": [1, 2]}])
    arm, *options = arguments
    command = ["capture", arm, random_moe, "--prompts", given, "-o", run, "--force", *options]
    assert main([str(word) for word in command]) in (1, 2)
    assert complaint in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def of_vllm(folder: Path, version: str) -> Path:
    """A folder whose vLLM, by its metadata, is found before the installed one."""
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder


def test_a_vllm_that_is_too_old_is_named_with_what_works_and_why(tmp_path: Path) -> None:
    paths = [str(of_vllm(tmp_path, "0.9.1")), os.environ.get("PYTHONPATH", "")]
    done = run_moediag("env", PYTHONPATH=os.pathsep.join(filter(None, paths)))
    assert f"vllm 0.9.1 is installed, moediag needs >=0.26: {versions.VLLM.why}" in done.stdout


def test_a_vllm_newer_than_any_that_was_tried_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: vLLM 0.33, the newest there was, was refused for its number alone."""
    monkeypatch.syspath_prepend(str(of_vllm(tmp_path, "0.99.0+cu130")))
    remark = "vllm 0.99.0+cu130 is newer than 0.32, the newest that moediag was tried with; `moediag selftest` shows"
    assert versions.require_infer_engine() == "0.99.0+cu130"
    jobs.require("infer", "train", "infer-repeat")
    assert capsys.readouterr().err.count(remark) == 1
    assert main(["env"]) == 0
    assert f"ok; {remark}" in capsys.readouterr().out


def test_a_missing_engine_is_named_with_what_to_install() -> None:
    absent = versions.Supported("an-engine-nobody-has", (0, 30), (0, 33), "none is there", "vllm")
    with pytest.raises(DependencyError, match=r"not installed; pip install 'moediag\[vllm\]'"):
        versions.require(absent)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_every_kind_of_tokenizer_file_is_found_and_digested(checkpoint: Path, name: str) -> None:
    """Two lists of tokenizer files: a checkpoint with one that the other lacked opened, and its digest saw no file."""
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_checkpoint(str(checkpoint))
    digests = set()
    for content in ("one", "other"):
        (checkpoint / name).write_text(content)
        digests.add(open_checkpoint(str(checkpoint)).digests["tokenizer_sha256"])
    assert len(digests) == 2


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile"]) == 2
    assert main(["nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_exit_code_is_listed_where_the_command_line_begins() -> None:
    """``diff-env --fail-on-difference`` and ``--strict`` ended with 3, which the list left out."""
    listed = (entry.__doc__ or "").partition("Exit codes:")[2]
    used = {0, 1, 2, NOT_SO, *(128 + number for number in (signal.SIGINT, signal.SIGTERM))}
    assert {int(number) for number in re.findall(r"\b\d+\b", listed)} == used


def test_help_imports_nothing_heavy() -> None:
    """`moediag --help` must answer in under half a second of CPU time: no pandas, torch, transformers or vllm."""
    code = (
        "import sys; from moediag.cli.main import main; main(['--help']); "
        "print([m for m in ('torch', 'transformers', 'vllm', 'pandas', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_help_takes_less_than_half_a_second_of_cpu_time() -> None:
    before = os.times()
    subprocess.run([str(MOEDIAG), "--help"], capture_output=True, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu < 0.5


def test_analysis_and_figures_import_no_engine() -> None:
    """Capture may happen elsewhere: everything below the run directory works without torch."""
    code = (
        "import sys, moediag.results, moediag.figures, moediag.report, moediag.analysis, moediag.corrections; "
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_runs_as_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "moediag", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moediag ")


_ROOMS = (
    ("notation",), ("errors",), ("numbers",), ("frames",), ("prompts",), ("statistics",),
    ("run", "folder"),  # a run is made as every result folder is, and both write files alike
    ("importers",), ("analysis",), ("hygiene",), ("corrections",), ("diagnosis",), ("figures",), ("report",),
    ("watch",), ("results",), ("shown",), ("headlines",), ("library",),
)  # fmt: skip
"""Lowest first: each imports only from what stands before it."""
_BELOW_THE_ENGINES = {"notation", "errors", "prompts", "run", "folder"}


def test_imports_only_point_downwards() -> None:
    """Every room and every module beside the rooms has a place, and imports downwards, in functions and strings too.

    Bug: analysis and corrections imported each other, and the engines named the audit in a string.
    """
    level = {name: i for i, names in enumerate(_ROOMS) for name in names}
    allowed = {room: {name for name in level if level[name] <= level[room]} for room in level}
    allowed["engines"] = {*_BELOW_THE_ENGINES, "engines"}
    allowed["audit"] = {*allowed["diagnosis"], "engines", "audit"}
    allowed["selftest"] = {*allowed["hygiene"], "engines", "demo", "selftest"}
    allowed["faults"] = {*_BELOW_THE_ENGINES, "engines", "faults"}
    allowed["demo"] = {*_BELOW_THE_ENGINES, "demo"}
    allowed["cli"] = {*level, "engines", "audit", "selftest", "demo", "cli"}
    package = REPOSITORY / "moediag"
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):  # names by which a person reaches the rooms
            continue
        assert room in allowed, f"{path} stands in no room"
        for target in _imported_rooms(path):
            assert target in allowed[room], f"{path} imports moediag.{target}"


def test_an_import_in_a_string_is_seen(tmp_path: Path) -> None:
    """Bug: a process's task named a function of moediag.audit, above its room, and no test saw it."""
    module = tmp_path / "module.py"
    module.write_text(
        '"""Not moediag.report: prose."""\n'
        'from moediag import audit\nimport moediag.run.files\nX = "moediag.engines.child:main"\n'
        'Y = f"moediag.demo.{X}"\nfrom moediag import __version__\nZ = "moediag demo"\n'
    )
    assert sorted(_imported_rooms(module)) == ["audit", "demo", "engines", "run"]


def _imported_rooms(path: Path) -> Iterator[str]:
    import ast

    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^moediag\.\w+(?=[.:]|$)", node.value)
        for name in names:
            package, _, room = name.partition(".")
            room = room.partition(".")[0]
            if package == "moediag" and room and not room.startswith("__"):
                yield room


def test_schema_names_every_column_with_unit_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--json"]) == 0
    frames = json.loads(capsys.readouterr().out)
    assert {"tokens", "agreement_by_layer", "margin_curve", "drift_by_position"} <= {frame["name"] for frame in frames}
    for frame in frames:
        for column in frame["columns"]:
            assert column["dtype"]
            assert column["unit"]
            assert column["meaning"]
    assert main(["schema"]) == 0
    text = capsys.readouterr().out
    assert all(column["name"] in text for frame in frames for column in frame["columns"])


@contextmanager
def full_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """A file system of ``n_bytes`` mounted at ``folder``; needs root, which CI has."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_too_little_space_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with full_disk(disk, 8192):
        arguments = ("profile", random_moe, "--prompts", prompts, "-o", disk / "run")
        assert "MB free" in refused(capsys, *arguments)
        assert not (disk / "run").exists()


def test_json_of_a_missing_run_is_still_one_line(tmp_path: Path) -> None:
    done = run_moediag("analyze", tmp_path / "absent", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_help_is_short_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: neither -h nor --version existed, and short helps ended in dots at 80 columns."""
    assert main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert "..." not in shown.replace("[ARGS]...", "")
    assert [command.name for command in app.registered_commands if f"\n  {command.name} " not in shown] == []
    assert main(["profile", "-h"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"moediag {moediag.__version__}"


def test_simulate_lists_what_it_can_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--list"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in (*METHODS, *PRESETS) if not re.search(rf"^  {re.escape(name)}\b", shown, re.M)] == []
