"""A run of schema 1, made by vLLM 0.32 and transformers at commit 5dcb9a0: read and analysed, never continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moediag.cli.main import main
from moediag.errors import RunError, SchemaVersionError
from moediag.hygiene import check_run
from moediag.results import analyze_run, report_run
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

MEAN, K3, FLIP_RATE, ROUNDING = 0.048523402151962124, 0.007747049483912273, 0.024305555555555556, 0.03078997911264499
FIXTURE = Path(__file__).parent / "fixtures" / "schema1"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shutil.copytree(FIXTURE, tmp_path / "run")
    return open_run(tmp_path / "run")


def contents(run: Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_its_arms_are_what_they_are_called_there(run: Run) -> None:
    arms = {name: run.arm(name) for name in run.arms()}
    found = {name: (arm.role, arm.engine, arm.path, arm.variant_of, arm.change) for name, arm in arms.items()}
    assert found == {
        "infer": ("infer", "vllm", "sampled", None, None),
        "infer-repeat": ("infer", "vllm", "decode", "infer", "repeat"),
        "train": ("train", "transformers", "teacher-forced", None, None),
        "train-perturbed": ("train", "transformers", "teacher-forced", "train", "perturbation"),
        "train-repeat": ("train", "transformers", "teacher-forced", "train", "repeat"),
        "train-replay": ("train", "transformers", "teacher-forced", "train", "replay"),
    }
    assert {arm.checkpoint for arm in arms.values()} == {run.record.checkpoint}
    assert [(router.decoder_layer, router.n_experts, router.top_k) for router in arms["train"].routers] == [
        (0, 8, 2), (2, 8, 2),
    ]  # fmt: skip
    assert {arm.gate_weights for arm in arms.values()} == {None}  # nothing says on what scale they are
    assert (run.main_arms, run.record.tokens.origin) == (("train", "infer"), "sampled")


def test_it_is_clean_and_its_numbers_are_those_of_the_commit_at_which_schema_2_began(run: Run) -> None:
    assert check_run(run) == []
    summary = analyze_run(run)
    pair = summary["pairs"]["infer~train"]
    assert pair["n_tokens"] == 144
    assert pair["logp"]["abs_logp_diff"]["mean"] == MEAN
    assert pair["logp"]["kl_infer_train_k3"] == K3
    assert pair["routing"]["flip_rate"] == FLIP_RATE
    assert summary["floors"]["rounding"]["mean"] == ROUNDING
    assert summary["provenance"]["run_schema"] == 1
    assert report_run(run).exists()
    assert [finding for finding in check_run(run) if finding.level == "error"] == []


def test_an_analysis_by_an_earlier_version_is_stale_and_no_damage(run: Run) -> None:
    analyze_run(run)
    path = run.path / "summary.json"
    write_sealed(path, {**read_sealed(path), "schema_version": 1})
    assert check_run(run) == []


def test_nothing_can_be_added_to_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    checkpoint = str(FIXTURE.parent / "ring-tiny")
    assert main(["capture", "train-fp32", checkpoint, "-o", str(run.path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "was made by an earlier moediag (schema_version 1): it can be analysed, but no arm can be added" in err
    with pytest.raises(SchemaVersionError):
        RunWriter(run).begin_arm(run.arm("train"))
    assert contents(run) == before


def test_a_newer_schema_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.path / "run.json"
    write_sealed(path, {**json.loads(path.read_text()), "schema_version": 3})
    assert main(["analyze", str(run.path)]) == 1
    assert "schema_version 3, this moediag reads 1 and 2; upgrade moediag" in capsys.readouterr().err


def test_a_flipped_bit_in_any_of_its_files_is_found(run: Run) -> None:
    for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(bytes(damaged))
        assert is_found(run.path), path
        path.write_bytes(original)
    assert not is_found(run.path)


def is_found(path: Path) -> bool:
    try:
        return bool(check_run(open_run(path)))
    except RunError:  # run.json itself
        return True
