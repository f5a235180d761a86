"""The report kept in reports/demo: whole, of relative paths, and the one that its command makes."""

from __future__ import annotations

import json
import re

from conftest import REPOSITORY

from moediag.figures import FIGURES
from moediag.numbers import sig

KEPT = REPOSITORY / "reports" / "demo"


def test_the_kept_report_shows_every_figure_it_holds() -> None:
    page = (KEPT / "report.md").read_text()
    linked = re.findall(r"\]\(figures/(\w+)\.png\)", page)
    held = {path.stem for path in (KEPT / "figures").iterdir()}
    assert sorted(linked) == sorted(held)
    assert held == {*FIGURES} - {"module_depth"}  # the demo's engines are not compared module by module
    sizes = {folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
             for folder in (KEPT, KEPT / "simulate")}  # fmt: skip
    assert sizes[KEPT] - sizes[KEPT / "simulate"] < 3_000_000
    assert sizes[KEPT / "simulate"] < 1_500_000


def test_the_kept_report_was_made_from_a_relative_path_by_the_command_it_names() -> None:
    page, text = ((KEPT / name).read_text() for name in ("report.md", "summary.json"))
    assert "moediag compare moediag-demo/moe moediag-demo/dense -o moediag-demo/compare --training-window 512" in page
    for content in (page, text):
        assert not re.search(r"(?<![\w.:/])/(?:tmp|home|root|work|mnt|Users)/", content)
    runs = json.loads(text)["runs"]
    assert {run["model"]["path"] for run in runs.values()} == {f"moediag-demo/checkpoints/{name}" for name in runs}


def test_the_kept_page_and_the_kept_summary_are_of_one_run() -> None:
    page = (KEPT / "report.md").read_text()
    for label, run in json.loads((KEPT / "summary.json").read_text())["runs"].items():
        mean = run["pairs"]["infer~train"]["logp"]["abs_logp_diff"]["mean"]
        assert f"| abs logp diff, mean | {label} | {sig(mean)} |" in page
        assert run["verdict"]["word"] in page
