"""What a capture says that it writes at most is never less than what it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import run_here, write_jsonl
from test_results import LENGTHS, make_run

from moediag.results import analyze_run, report_run
from moediag.results.size import results_bytes


def size_of(*paths: Path) -> int:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize("is_moe", [True, False])
def test_tables_figures_and_pages_are_counted(tmp_path: Path, is_moe: bool) -> None:
    arms = ("infer", "train", "train-replay") if is_moe else ("infer", "train")
    run = make_run(tmp_path / "run", arms=arms, is_moe=is_moe)
    before = size_of(run.path)
    analyze_run(run)
    report_run(run)
    written = size_of(run.path) - before
    n_layers = len(run.routers)
    bound = results_bytes(sum(n for _, n in LENGTHS), len(LENGTHS), len(arms), n_layers, has_vocabulary=False)
    assert written <= bound <= 30 * written  # a bound that is never near is no information


@pytest.mark.engines
def test_a_profile_writes_no_more_than_it_said(random_moe: Path, tmp_path: Path) -> None:
    """Bug: "Writes at most 2.4 MB" counted the arms alone, and the run became 9.7 MB."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The for statement"}, {"prompt": "An import"}])
    words = ("--max-tokens", 12, "--router-logits", "full", "--shard-size", 1, "-o", tmp_path / "run")
    done = run_here("profile", random_moe, "--prompts", prompts, *words)
    assert done.returncode == 0, done.stderr
    found = re.search(r"Writes   at most ([\d,.]+) MB", done.stderr)
    assert found is not None
    assert size_of(tmp_path / "run") <= float(found[1].replace(",", "")) * 1e6 + 1e5
    assert "arm 2 of" in done.stderr
    assert "\x1b" not in done.stderr
