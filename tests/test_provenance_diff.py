"""`moediag diff-env`: names what differs between two runs or two arms, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import arm_of, made_otherwise
from scripted_engine import create_scripted_run, write_scripted_shard

from moediag.cli.diff_env import differences_table, excerpts
from moediag.cli.main import main
from moediag.run.environment import (
    DIFFERENT,
    NOT_INSTALLED,
    NOT_RECORDED,
    NOT_SET,
    SAME,
    UNKNOWN,
    Difference,
    compare_arms,
    compare_content,
    compare_runs,
)
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run
from moediag.run.records import ArmRecord
from moediag.run.writer import RunWriter

RECORD: dict[str, Any] = {
    "configuration": {"dtype": "bfloat16"},
    "engine": "vllm",
    "versions": {"moediag": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0"},
    "loaded": {"device": "cpu", "n_threads": 1},
    "kernels": {"attention": [{"backend": "CPU_ATTN", "isa": "amx"}], "linear": {"Linear": "onednn_mm x3"}},
    "dtypes": {"model": "bfloat16", "kv_cache": None, "parameters": ["bfloat16", "float32"]},
    "threads": {"intra_op": 1},
    "determinism": {"cudnn_benchmark": False},
    "environment": {"OMP_NUM_THREADS": "1"},
    "hardware": {"machine": "x86_64", "accelerator": None},
    "sampling": {"temperature": 1.0},
    "observer": "hooks",
}
OLD = {
    "configuration": {"dtype": "bfloat16"},
    "engine": "vllm",
    "versions": {"torch": "2.13.0", "vllm": "0.32.0"},
    "loaded": {"device": "cpu", "n_threads": 1},
    "environment": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": ""},
}


def arm_record(run: Run, name: str, told: dict[str, Any]) -> ArmRecord:
    """The scripted arm with what an engine told of itself."""
    facts = {**told}
    configuration, versions, environment = (facts.pop(key, {}) for key in ("configuration", "versions", "environment"))
    return made_otherwise(
        arm_of(run, name, engine=facts.pop("engine"), dtype=facts.pop("dtype", None)),
        configuration=configuration,
        versions=versions,
        environment=environment,
        facts=facts,
    )


def make_run(path: Path, arms: dict[str, dict[str, Any]], seed: int = 0, with_tokens: bool = True) -> Run:
    run = create_scripted_run(path, n_prompts=2, seed=seed)
    for name, told in arms.items():
        RunWriter(run).begin_arm(arm_record(run, name, told))
    if with_tokens:
        for shard in run.shards:
            write_scripted_shard(RunWriter(run), "infer", shard)
    return run


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    record = deepcopy(RECORD)
    change(record)
    return record


def differences(tmp_path: Path, record: dict[str, Any], other: dict[str, Any] = RECORD) -> list[tuple[str, ...]]:
    a = make_run(tmp_path / "a", {"infer": other}, with_tokens=False)
    b = make_run(tmp_path / "b", {"infer": record}, with_tokens=False)
    asked, infer = compare_runs(a, b)
    assert not asked.differences
    return [(d.section, d.name, d.a, d.b) for d in infer.differences]


def test_a_run_differs_from_itself_in_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", {"infer": RECORD, "train": OLD})
    assert all(not comparison.differences for comparison in compare_runs(run, run))
    assert all(comparison.n_facts > 5 for comparison in compare_runs(run, run))
    assert set(compare_content(run, run).values()) == {SAME, UNKNOWN}  # a scripted run has no tokenizer digest
    assert not compare_arms(run, "infer", "infer").differences


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda r: r["versions"].update(torch="2.14"), ("versions", "torch", "2.13.0", "2.14")),
        (lambda r: r["versions"].update(kernels="1.0"), ("versions", "kernels", NOT_INSTALLED, "1.0")),
        (lambda r: r["kernels"]["attention"][0].update(isa="vec"), ("kernels", "attention.0.isa", "amx", "vec")),
        (lambda r: r["dtypes"].update(kv_cache="fp8"), ("dtypes", "kv_cache", "none", "fp8")),
        (lambda r: r["environment"].pop("OMP_NUM_THREADS"), ("environment", "OMP_NUM_THREADS", "1", NOT_SET)),
        (lambda r: r["configuration"].update(seed=0), ("configuration", "seed", NOT_SET, "0")),
        (lambda r: r["sampling"].update(top_p=0.9), ("sampling", "top_p", NOT_RECORDED, "0.9")),
        (lambda r: r.update(router_dtypes={"gate": "float32"}), ("dtypes", "router.gate", NOT_RECORDED, "float32")),
        (lambda r: r.update(observer="native"), ("observation", "observer", "hooks", "native")),
        (
            lambda r: r["dtypes"].update(parameters=["bfloat16"]),
            ("dtypes", "parameters", '["bfloat16", "float32"]', '["bfloat16"]'),
        ),
    ],
)
def test_one_change_is_named_and_nothing_else(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], wanted: tuple[str, ...]
) -> None:
    assert differences(tmp_path, changed(change)) == [wanted]


def test_what_changes_numbers_comes_first(tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["configuration"]["dtype"] = record["environment"]["OMP_NUM_THREADS"] = "2"
        record["kernels"]["linear"]["Linear"] = record["versions"]["torch"] = "3"
        record["threads"]["intra_op"] = 2

    sections = [section for section, *_ in differences(tmp_path, changed(change))]
    assert sections == ["versions", "kernels", "threads", "environment", "configuration"]


def test_an_older_record_says_not_recorded_once_per_section(tmp_path: Path) -> None:
    told = differences(tmp_path, RECORD, OLD)
    assert ("kernels", "all 3 facts", NOT_RECORDED, "recorded") in told
    assert ("versions", "moediag", NOT_RECORDED, "0.1.0") in told
    assert not [d for d in told if d[0] == "environment"]  # "" was what older records said of an unset variable
    assert {a for _, _, a, _ in told} == {NOT_RECORDED}
    assert not [d for d in told if d[0] == "loaded"]


def test_a_weights_digest_of_files_is_not_compared_with_one_of_tensors(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", {"infer": OLD})
    b = make_run(tmp_path / "b", {"infer": RECORD})
    record = b.path / "checkpoints" / f"{b.record.checkpoint}.json"
    write_sealed(record, {**read_sealed(record), "weights_sha256": "of tensors"})
    assert compare_content(a, b)["weights"] == UNKNOWN
    a = make_run(tmp_path / "c", {"infer": RECORD})
    assert compare_content(a, b)["weights"] == DIFFERENT


def test_of_two_engines_only_shared_facts_are_compared(tmp_path: Path) -> None:
    train = {
        "configuration": {"dtype": "bfloat16", "attn_implementation": "sdpa"},
        "engine": "transformers",
        "versions": {"moediag": "0.1.0", "torch": "2.13.0", "transformers": "5.0", "accelerate": "1.0"},
        "loaded": {"device": "cpu", "n_threads": 2},
        "kernels": {"attn_implementation": "sdpa"},
        "dtypes": {"model": "float32"},
        "threads": {"intra_op": 2},
        "environment": {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        "hardware": {"machine": "x86_64"},
        "observer": "forward hooks",
    }
    told = compare_arms(make_run(tmp_path / "a", {"infer": RECORD, "train": train}), "infer", "train")
    assert [(d.section, d.name, d.a, d.b) for d in told.differences] == [
        ("versions", "accelerate", NOT_INSTALLED, "1.0"),
        ("dtypes", "model", "bfloat16", "float32"),
        ("threads", "intra_op", "1", "2"),
        ("environment", "TOKENIZERS_PARALLELISM", NOT_SET, "false"),
    ]
    assert told.n_one_sided > 5


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["diff-env", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_the_command_prints_a_table_of_at_most_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(record: dict[str, Any]) -> None:
        record["environment"]["LD_PRELOAD"] = "/opt/" + "x" * 500 + "/a.so"
        record["threads"]["intra_op"] = 2

    make_run(tmp_path / "a", {"infer": RECORD, "train": OLD})
    make_run(tmp_path / "b", {"infer": changed(change)}, seed=1)
    status, out = printed(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100 + len(str(tmp_path))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "tokens different" in lines
    assert "weights identical" in lines
    assert "threads intra_op 1 2" in lines
    assert "arm train: B has no such arm" in lines
    assert any(line.startswith("environment LD_PRELOAD not set /opt/xxx") for line in lines)
    assert printed(capsys, tmp_path / "a", tmp_path / "b", "--fail-on-difference")[0] == 3


def test_the_command_says_identical_with_the_number_of_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", {"infer": RECORD})
    status, out = printed(capsys, tmp_path / "a", tmp_path / "a", "--fail-on-difference")
    assert status == 0
    assert "arm infer: identical (" in out
    assert out.strip().splitlines()[-1].startswith("identical: ")


def test_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", {"infer": RECORD})
    make_run(tmp_path / "b", {"infer": changed(lambda r: r["threads"].update(intra_op=2))})
    told = json.loads(printed(capsys, tmp_path / "a", tmp_path / "b", "--json")[1])
    assert told["n_differences"] == 1
    assert told["content"]["tokens"] == SAME
    [difference] = told["comparisons"][1]["differences"]
    assert difference == {"section": "threads", "name": "intra_op", "a": "1", "b": "2"}


def test_two_arms_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", {"infer": RECORD, "train": OLD, "infer-repeat": changed(lambda r: None)})
    assert "arm infer against train" in printed(capsys, tmp_path / "a")[1]
    assert "infer against infer-repeat: identical" in printed(capsys, tmp_path / "a", "--arms", "infer,infer-repeat")[1]


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--arms", "infer"], 1, "expected two names of arms"),
        (["--arms", "infer,absent"], 1, "has no arm absent"),
        (["absent"], 1, "absent does not exist"),
        (["again", "--arms", "infer,train"], 2, "--arms compares two arms of one run"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, complaint: str
) -> None:
    run = make_run(tmp_path / "a", {"infer": RECORD})
    words = [str(run.path) if word == "again" else word for word in arguments]
    assert main(["diff-env", str(run.path), *words]) == status
    assert complaint in capsys.readouterr().err


def test_a_changed_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", {"infer": RECORD})
    path = run.path / "arms" / "infer" / "arm.json"
    path.write_bytes(path.read_bytes().replace(b"CPU_ATTN", b"GPU_ATTN"))
    assert main(["diff-env", str(run.path), str(run.path)]) == 1
    assert "was changed after it was written" in capsys.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["kernels", "threads", "mine", "hardware", "sampling", "dtypes"]), JSON))
def test_any_record_can_be_compared(tmp_path_factory: pytest.TempPathFactory, extra: dict[str, Any]) -> None:
    """Users add arms of their own, and later versions add sections."""
    folder = tmp_path_factory.mktemp("runs")
    a = make_run(folder / "a", {"infer": RECORD}, with_tokens=False)
    b = make_run(folder / "b", {"infer": RECORD}, with_tokens=False)
    path = b.path / "arms" / "infer" / "arm.json"
    content = read_sealed(path)
    content["origin"]["facts"] |= extra
    write_sealed(path, content)
    there, back = compare_runs(a, b)[1], compare_runs(b, a)[1]
    swapped = [Difference(d.section, d.name, d.b, d.a) for d in back.differences]
    assert list(there.differences) == swapped
    assert all(len(line) <= 100 for line in differences_table(there.differences).splitlines())


@given(st.text(max_size=300), st.text(max_size=300), st.integers(12, 120))
def test_shortened_values_still_differ(a: str, b: str, longest: int) -> None:
    short_a, short_b = excerpts(a, b, longest)
    assert (short_a != short_b) == (a != b)
    assert max(len(short_a), len(short_b)) <= longest
