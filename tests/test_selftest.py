"""``moediag selftest``: passes where captures are right, and fails and says where a tap sees wrongly."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ENGINES, run_here

from moediag.cli.main import main
from moediag.engines.launch import Job, OnEvent
from moediag.run.reader import open_run
from moediag.selftest.cells import FAILED, PASSED, Row
from moediag.selftest.check import Request, prepare, run_cells

FAMILY = "qwen3_moe"


class Planted:
    """The suite's engine processes, in which an arm of vLLM is captured by another task."""

    def __init__(self, task: str, **options: str) -> None:
        self.task, self.options = task, options

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        if job.task.endswith(":capture_infer"):
            job = replace(job, task=self.task, options={**job.options, **self.options})
        ENGINES.do(job, env, on_event)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a self-test with taps as they are, and what the command said."""
    folder = tmp_path_factory.mktemp("selftest") / "out"
    return folder, run_here("selftest", "--family", FAMILY, "-o", folder, "--json")


@pytest.fixture
def healthy(first: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return first[0]


def rows_by_property(rows: list[Row]) -> dict[str, Row]:
    return {row.property: row for row in rows}


@pytest.mark.engines
def test_every_property_holds_here_and_finished_arms_are_not_captured_again(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    healthy, done = first
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["property"]: row for row in json.loads(done.stdout)["rows"]}
    assert "Takes    about" in done.stderr
    assert "MB of weights" in done.stderr
    assert all(row["verdict"] != FAILED for row in rows.values())
    assert {name for name, row in rows.items() if row["verdict"] == "not run"} == {
        "hooks against vLLM's own record",
        "vLLM's own record, in graphs",
    }
    assert "Triton" in rows["vLLM's own record, in graphs"]["reason"]
    made = {path: path.stat().st_mtime_ns for path in healthy.rglob("shard-*")}
    again = run_here("selftest", "--family", FAMILY, "-o", healthy)
    assert again.returncode == 0
    assert "loading" not in again.stderr
    assert "recorded ids are the rule's" in again.stdout
    assert made == {path: path.stat().st_mtime_ns for path in healthy.rglob("shard-*")}
    assert main(["selftest", "--family", FAMILY, "--dtype", "bfloat16", "-o", str(healthy)]) == 1


@pytest.mark.engines
def test_the_observer_that_works_here_is_taken_and_why_is_said(random_moe: Path, tmp_path: Path) -> None:
    """On a CPU: hooks, without vLLM's own record beside them; the same again when the run goes on."""
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("One\nTwo or three")
    words = ("capture", "infer", random_moe, "--prompts", prompts, "--max-tokens", 4, "--observer", "auto", "-o", run)
    first, again = run_here(*words), run_here(*words)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "Observer hooks: no cross-check against native: --observer native needs vLLM's V2" in first.stderr
    assert "Observer hooks: as the arm was begun" in again.stderr
    assert run_here("capture", "train", random_moe, "--observer", "auto", "-o", run).returncode == 0
    found = open_run(run)
    assert all("observer" not in found.arm(arm).origin.configuration for arm in ("infer", "train"))


def broken(healthy: Path, folder: Path, planted: Planted, **options: int) -> dict[str, Row]:
    """The healthy test once more, vLLM's arms captured with broken taps."""
    shutil.copytree(healthy, folder)
    for arm in (folder / FAMILY / "float32" / "arms").glob("infer*"):
        shutil.rmtree(arm)
    (cell,) = prepare(Request(families=(FAMILY,)), folder)[0]
    cell.vllm.update(options)
    return rows_by_property(run_cells([cell], planted, lambda event: None, print))


def failing(rows: dict[str, Row]) -> set[str]:
    return {name for name, row in rows.items() if row.verdict == FAILED}


@pytest.mark.engines
def test_a_tap_off_by_one_layer_fails_and_is_located(healthy: Path, tmp_path: Path) -> None:
    """Ids and logits of another layer follow the rule: only the other engine tells."""
    rows = broken(healthy, tmp_path / "out", Planted("planted:capture_broken", broken="off by one layer"))
    assert rows["recorded ids are the rule's"].verdict == PASSED
    assert "both engines choose the same experts" in failing(rows)
    assert "same experts by MoE layer: 0." in rows["both engines choose the same experts"].reason


@pytest.mark.engines
def test_a_stale_buffer_fails_and_is_located(healthy: Path, tmp_path: Path) -> None:
    rows = broken(healthy, tmp_path / "out", Planted("planted:capture_broken", broken="stale buffer"))
    row = rows["recorded ids are the rule's"]
    assert row.verdict == FAILED
    assert "MoE layer 1: " in row.reason
    assert "MoE layer 0" not in row.reason
    assert "both engines choose the same experts" in failing(rows)


@pytest.mark.engines
def test_a_tap_that_was_patched_out_fails_and_is_named(healthy: Path, tmp_path: Path) -> None:
    rows = broken(healthy, tmp_path / "out", Planted("planted:capture_broken", broken="patched out"))
    assert failing(rows) == {"captured"}
    assert "MoE layers [1] never fired" in rows["captured"].reason


@pytest.mark.engines
def test_a_rank_that_sees_nothing_fails_and_is_named(healthy: Path, tmp_path: Path) -> None:
    planted = Planted("planted:capture_with_silent_rank")
    rows = broken(healthy, tmp_path / "out", planted, tensor_parallel_size=2)
    assert failing(rows) == {"captured"}
    assert "the taps of rank 1 saw" in rows["captured"].reason


def test_a_published_configuration_is_cut_and_its_widths_are_kept(tmp_path: Path) -> None:
    """Entries per layer go with the layers; widths, experts, K and groups choose kernels and stay."""
    import torch
    from transformers import AutoConfig, Glm4MoeConfig

    from moediag.demo.tokenizer import byte_tokenizer
    from moediag.engines.checkpoint import open_checkpoint
    from moediag.selftest.families import cut_checkpoint

    sizes = {"hidden_size": 96, "n_routed_experts": 16, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
             "moe_intermediate_size": 32, "intermediate_size": 64, "vocab_size": 257, "head_dim": 32}  # fmt: skip
    Glm4MoeConfig(
        **sizes, num_hidden_layers=9, first_k_dense_replace=3, num_attention_heads=3, num_key_value_heads=1
    ).save_pretrained(tmp_path / "big")
    byte_tokenizer(64).save_pretrained(tmp_path / "big")
    folder, words = cut_checkpoint(tmp_path / "big", tmp_path / "cut", torch.float32)
    config = AutoConfig.from_pretrained(folder)
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert config.num_hidden_layers == 4
    routing = open_checkpoint(str(folder)).routing
    assert routing is not None
    assert (routing.decoder_layers, routing.n_group, routing.top_k) == ((1, 2, 3), 4, 3)
    assert words == ["4 layers", "random weights"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(("--family", "nonsense"), "expected one of qwen2_moe"), (("/nowhere/to/be/found",), "does not exist")],
)
def test_what_cannot_be_tested_is_one_line(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["selftest", *words, "-o", str(tmp_path / "out")]) == 1
    assert complaint in capsys.readouterr().err
