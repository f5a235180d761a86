"""Runs of schema 1 are read and analysed as before, and never continued.

The fixture is a real run of moediag at commit 5dcb9a0: vLLM 0.32 and transformers on a tiny Qwen3-MoE, router logits
and whole distributions kept. Its ``summary.json`` gave the numbers below.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from test_run_directory import contents

from moediag.analysis.flips.explained import predict_flips
from moediag.cli.main import main
from moediag.engines.hf.engine import _refuse_other_weights
from moediag.errors import CorruptRunError, IncompleteRunError, RunError, SchemaVersionError
from moediag.hygiene import check_run
from moediag.results import analyze_run, load_frames, report_run
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "ring-tiny"
FOUND_THEN = {  # pair: mean abs logp diff [nat], k3 [nat], flip rate
    "infer~train": (0.048523402151962124, 0.007747049483912273, 0.024305555555555556),
    "infer~train-replay": (0.03432798996153805, 0.0012216413935327883, 0.0),
    "infer-repeat~infer": (0.0, 0.0, 0.0),
    "train-repeat~train": (1.088612609439426e-06, 8.532111538987988e-11, 0.0),
    "train-perturbed~train": (0.03078997911264499, 0.0013065656261277577, 0.017361111111111112),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(shutil.copytree(FIXTURES / "schema1", tmp_path / "run"))


def test_it_opens_and_validates_clean(run: Run) -> None:
    assert run.schema_version == 1
    assert check_run(run) == []
    assert (run.n_sequences, [shard.n_sequences for shard in run.shards]) == (6, [3, 3])
    assert [(r.decoder_layer, r.n_experts, r.top_k) for r in run.routers] == [(0, 8, 2), (2, 8, 2)]
    assert run.main_arms == ("train", "infer")
    assert (run.record.tokens.origin, run.record.tokens.arm) == ("sampled", "infer")
    assert run.record.sampling is not None
    assert (run.record.sampling.max_tokens, run.record.sampling.n) == (24, 1)
    checkpoint = run.checkpoint_of("train")
    assert checkpoint is not None
    assert (checkpoint.source, checkpoint.architecture, checkpoint.tensors) == ("tiny-moe", "Qwen3MoeForCausalLM", None)


def test_its_arms_are_what_their_names_said(run: Run) -> None:
    found = {name: run.arm(name) for name in run.arms()}
    assert {name: (arm.role, arm.engine, arm.path, arm.variant_of, arm.change) for name, arm in found.items()} == {
        "infer": ("infer", "vllm", "sampled", None, None),
        "infer-repeat": ("infer", "vllm", "decode", "infer", "repeat"),
        "train": ("train", "transformers", "teacher-forced", None, None),
        "train-perturbed": ("train", "transformers", "teacher-forced", "train", "perturbation"),
        "train-repeat": ("train", "transformers", "teacher-forced", "train", "repeat"),
        "train-replay": ("train", "transformers", "teacher-forced", "train", "replay"),
    }
    assert all("router_logits_TLE" in arm.arrays for arm in found.values())
    assert {name for name, arm in found.items() if "distributions" in arm.arrays} == {"infer", "train"}
    assert {arm.checkpoint for arm in found.values()} == {run.record.checkpoint}
    for name, arm in found.items():
        assert {*run.capture(name, run.shards[0]).arrays()} == {*arm.arrays} - {"distributions"}


def test_a_mistyped_arm_is_no_train_arm(run: Run) -> None:
    """Every arm whose name did not begin with infer was taken for one of transformers, silently."""
    record = read_sealed(run.arm_folder("infer") / "arm.json")
    for name, role in (("infer-other", "infer"), ("train-mine", "train"), ("infre", None), ("sglang", None)):
        folder = run.arm_folder(name)
        folder.mkdir()
        write_sealed(folder / "arm.json", {**record, "arm": name})
        if role:
            assert run.arm(name).role == role
        else:
            with pytest.raises(CorruptRunError, match="expected a name that begins with infer or train"):
                run.arm(name)


def test_it_is_analysed_as_it_was_then(run: Run) -> None:
    summary = analyze_run(run)
    assert summary["main_pair"] == summary["observed_pair"] == "infer~train"
    assert summary["replay_pair"] == "infer~train-replay"
    assert summary["provenance"]["run_schema"] == 1
    assert summary["pairs"].keys() == FOUND_THEN.keys()
    for name, then in FOUND_THEN.items():
        pair = summary["pairs"][name]
        assert (pair["n_tokens"], pair["n_sequences"], pair["n_unscored"]) == (144, 6, 0)
        now = (pair["logp"]["abs_logp_diff"]["mean"], pair["logp"]["kl_infer_train_k3"], pair["routing"]["flip_rate"])
        assert now == pytest.approx(then, rel=1e-14)  # the last bit of expm1 is the processor's
    floors = summary["floors"]
    assert [floors[side]["arm"] for side in ("infer", "train", "rounding")] == [
        "infer-repeat",
        "train-repeat",
        "train-perturbed",
    ]
    removed = summary["routing_replay"]["removed"]["abs_logp_diff.mean"]["share"]
    assert removed == pytest.approx(0.2925477514121515, rel=1e-6)
    assert predict_flips(run).keys() <= load_frames(run).keys()
    assert report_run(run).is_file()
    assert check_run(run) == []


def test_columns_that_it_has_not_are_not_known(run: Run) -> None:
    tokens = run.tokens(run.shards[0])
    assert (tokens.is_trained_T, tokens.turn_T, tokens.reward_T) == (None, None, None)
    np.testing.assert_array_equal(tokens.is_scored_T, tokens.is_response_T)


def test_gate_weights_of_an_undefined_scale_are_not_forced(run: Run) -> None:
    """vLLM's lacked a factor that it applies after the experts, and the arm did not say so."""
    assert {run.arm(name).gate_weights for name in run.arms()} == {None}
    assert run.capture("infer", run.shards[0]).gate_weights_TLK is not None
    with pytest.raises(IncompleteRunError, match="does not say on what scale .* --replay-weights cannot force them"):
        _refuse_other_weights(run, "infer", run.shards[0])


@pytest.mark.parametrize(
    "more", [("train-fp32",), ("infer-rescore",), ("train",), ("train-replay", "--replay-weights", "--name", "forced")]
)
def test_no_arm_is_added_to_it(run: Run, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    before = contents(run.path)
    assert main(["capture", more[0], str(CHECKPOINT), "-o", str(run.path), *more[1:]]) == 1
    *progress, err = capsys.readouterr().err.splitlines()  # a slow machine says what it is doing, as it should
    assert all(line.startswith("reading ") for line in progress)
    assert "made by an earlier moediag (schema_version 1)" in err
    assert "no arm can be added to it" in err
    assert contents(run.path) == before


def test_it_is_not_begun_again_either(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = contents(run.path)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt_token_ids": [1, 2]}])
    assert main(["capture", "infer", str(CHECKPOINT), "--prompts", str(prompts), "-o", str(run.path)]) == 1
    assert "schema_version: 1 there, 2 given" in capsys.readouterr().err.splitlines()[-1]
    assert contents(run.path) == before


def test_its_writer_refuses(run: Run) -> None:
    with pytest.raises(SchemaVersionError, match="no arm can be added to it"):
        RunWriter(run).begin_arm(run.arm("train").model_copy(update={"name": "another"}))
    assert "another" not in run.arms()


def test_an_analysis_by_an_earlier_version_is_stale_and_no_damage(run: Run) -> None:
    analyze_run(run)
    path = run.path / "summary.json"
    write_sealed(path, {**read_sealed(path), "schema_version": 1})
    assert check_run(run) == []


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


@pytest.mark.parametrize("lacking", ["configuration", "completions", "model", "sampling", "prompts", "shards"])
def test_a_sealed_manifest_that_lacks_a_value_is_one_line(run: Run, lacking: str) -> None:
    path = run.path / "run.json"
    write_sealed(path, {key: value for key, value in read_sealed(path).items() if key != lacking})
    with pytest.raises(Exception, match=f"lacks '{lacking}'") as error:
        open_run(run.path)
    assert "\n" not in str(error.value)


def test_a_newer_schema_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.path / "run.json"
    write_sealed(path, {**read_sealed(path), "schema_version": 3})
    with pytest.raises(SchemaVersionError, match="schema_version 3, this moediag reads 1 and 2; upgrade moediag"):
        open_run(run.path)
    assert main(["analyze", str(run.path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
