"""The commands of the README and of its recipes run, in order, on the demo's output; what is not is on a list."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import REPOSITORY, KeptEngines, run_here

NOT_RUN = {
    "make demo": "the set-up itself; the demo fixture runs `moediag demo`",
    "needs GPUs and the hub": "Qwen3-30B-A3B against Qwen3-4B",
    "tests/test_selftest.py runs it": "engines are started for it alone",
    "needs a second checkpoint": "tests/test_engines_checkpoints.py makes one",
    "needs a running server": "tests/test_engines_server.py starts one",
    "needs a Ray cluster": "tests/test_engines_ray.py runs it on clusters of its own",
    "needs an object store": "tests/test_store.py serves one",
    "needs runs from before and after an upgrade": "tests/test_gate.py makes two",
}

_BLOCK = re.compile(r"(?:<!-- not run in tests: (?P<reason>.*?) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.DOTALL)


def readme_blocks() -> list[tuple[str, str, str | None]]:
    text = "\n".join((REPOSITORY / page).read_text() for page in ("README.md", "reports/recipes.md"))
    return [(match["kind"], match["body"], match["reason"]) for match in _BLOCK.finditer(text)]


def test_everything_that_is_not_run_is_on_the_list() -> None:
    reasons = {reason for _, _, reason in readme_blocks() if reason}
    commands = {body.strip() for _, body, _ in readme_blocks() if body.startswith("make ")}
    assert reasons | commands == NOT_RUN.keys()


@pytest.mark.engines
@pytest.mark.timeout(1800)  # some thirty commands, half of them starting engines
def test_every_command_of_the_readme_runs(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands share engine processes, started in the folder that their paths are relative to; Python has its own."""
    (tmp_path / "moediag-demo").symlink_to(demo)
    (tmp_path / "tests").symlink_to(REPOSITORY / "tests")  # the sample of a dump
    monkeypatch.chdir(tmp_path)
    n_run = 0
    with closing(KeptEngines()) as engines:
        for kind, body, reason in readme_blocks():
            if reason or kind not in ("sh", "python") or body.strip() in NOT_RUN:
                continue
            for command in [shlex.split(line) for line in body.splitlines()] if kind == "sh" else [["python", body]]:
                if command[0] == "moediag":
                    done = run_here(*command[1:], engines=engines)
                else:
                    assert command[0] == "python"
                    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
                n_run += 1
    assert n_run >= 12


def test_the_numbers_of_the_readme_are_those_of_the_committed_demo_report() -> None:
    """The README's table and the report beside its picture come from one run."""
    report = (REPOSITORY / "reports" / "demo" / "report.md").read_text()
    table = (REPOSITORY / "README.md").read_text().split("What is normal?")[1].split("## More")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| MoE |", "| dense |"))]
    cells = [cell.strip() for row in rows for cell in row.split("|")[2:6]]
    assert len(cells) == 8
    for cell in cells:
        assert cell in report, f"{cell} stands in the README but not in reports/demo/report.md"


def test_the_replay_row_of_the_readme_is_that_of_the_committed_summary() -> None:
    text = (REPOSITORY / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| MoE, vLLM's experts forced"))
    summary = json.loads((REPOSITORY / "reports" / "demo" / "summary.json").read_text())
    logp = summary["runs"]["moe"]["pairs"]["infer~train-replay"]["logp"]
    found = [logp["abs_logp_diff"][key] for key in ("mean", "p99", "max")] + [logp["kl_infer_train_k3"]]
    assert [float(cell) for cell in row.split("|")[2:6]] == pytest.approx(found, rel=0.005)
