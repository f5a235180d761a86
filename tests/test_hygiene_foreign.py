"""``moediag validate`` on runs and on dumps of other tools: findings on stdout, exit codes, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hygiene_captures import FAULTS, Healthy, make, plant, records_of, write_dump, write_run

from moediag.cli.main import main
from moediag.errors import DumpError
from moediag.hygiene.foreign import check_file
from moediag.hygiene.rules import DIAGNOSIS, RULES
from moediag.importers.sequences import read_sequences

SHAPE = (16, 4, 6)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("first_row", [0, 1])
def test_a_dump_comes_back_as_the_arrays_it_was_made_of(tmp_path: Path, suffix: str, first_row: int) -> None:
    tokens, train, infer = make(Healthy(shape=SHAPE, n_prompts=4, samples=2, prompt_length=6))
    path = write_dump(tmp_path / f"dump{suffix}", records_of(tokens, train, infer, first_row))
    dump = read_sequences(path, 16, first_row)
    for name, array in vars(tokens).items():
        np.testing.assert_array_equal(getattr(dump.tokens, name), array)
    np.testing.assert_array_equal(dump.captures["infer"].logp_T, infer.logp_T)
    has_row = np.array([t - s >= first_row for s, e in tokens.sequence_bounds() for t in range(s, e)])
    wanted = np.where(has_row[:, None, None], infer.expert_ids_TLK, -1)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dump.captures["infer"].expert_ids_TLK, wanted)  # type: ignore[arg-type]


def test_a_healthy_dump_is_quiet(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "dump.jsonl", records_of(*make(Healthy(shape=SHAPE, certain_share=0))))
    inspection = check_file(path, 16)
    assert [(f.level, f.rule) for f in inspection.findings] == [("note", "D06-last-row")]
    assert main(["validate", str(path)]) == 0


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if not f.startswith(("D34", "softmaxed", "D08", "D03-partial", "D31-zero-logp"))]
)
def test_a_fault_in_a_dump_is_named(fault: str, tmp_path: Path) -> None:
    """D31's entropy and D34 of one small layer need what a dump does not hold."""
    h = Healthy(shape=SHAPE, certain_share=0, has_scores=False, n_prompts=40)
    path = write_dump(tmp_path / "dump.jsonl", records_of(*plant(fault, h, *make(h))))
    rule = RULES[fault.split()[0]]
    found = check_file(path, 16).findings
    assert rule.name in {f.rule for f in found}
    assert {f.rule for f in found if f.level == "error"} <= {rule.name, *rule.companions}
    assert main(["validate", str(path), "--num-experts", "16"]) == (3 if rule.level == "error" else 0)


def test_other_tokens_on_the_train_side_are_shown_with_their_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = records_of(*make(Healthy(shape=SHAPE, n_prompts=3)))
    for record in records:
        record["train_token_ids"] = list(record["token_ids"])
    records[1]["train_token_ids"][2] = 999
    assert main(["validate", str(write_dump(tmp_path / "dump.jsonl", records)), "--json"]) == 3
    content = json.loads(capsys.readouterr().out)
    (found,) = [f for f in content["findings"] if f["level"] == "error"]
    assert found["rule"] == "D32-token-ids"
    at = len(records[1]["prompt_token_ids"]) + 2
    assert (found["n"], found["n_of"], found["places"][0]["seq_id"], found["places"][0]["position"]) == (1, 3, 1, at)
    assert "999" in found["message"]
    assert content["n_errors"] == 1


def test_ids_alone_or_logprobs_alone_are_enough(tmp_path: Path) -> None:
    records = records_of(*make(Healthy(shape=SHAPE)))
    for names in (("routed_experts",), ("logprobs",), ("train_logprobs",), ("train_routed_experts", "logprobs")):
        kept = [{k: v for k, v in r.items() if k in ("prompt_token_ids", "token_ids", *names)} for r in records]
        inspection = check_file(write_dump(tmp_path / "dump.jsonl", kept), 16)
        assert inspection.n_errors == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no sequence"),
        ("{", "line 1: no JSON"),
        ("[1]\n", "expected a JSON object"),
        ('{"prompt_token_ids": [1]}', "sequence 0: token_ids should be"),
        ('{"prompt_token_ids": [1], "token_ids": ["a"]}', "token_ids should be a list of token ids"),
        ('{"prompt_token_ids": [1], "token_ids": [true]}', "token_ids should be a list of token ids"),
        ('{"prompt_token_ids": [1], "token_ids": [99999999999999999999]}', "no regular list of numbers"),
        ('{"prompt_token_ids": [1], "token_ids": [2]}', "neither logprobs nor routed_experts"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [0, 0]}', "one number per response token (1)"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": ["x"]}', "no regular list of numbers"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [1]}', "[rows][layers][K]"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [[[1], [1, 2]]]}', "no regular list"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [[[1]], [[1]], [[1]]]}', "3 rows from row 0"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "routed_experts": [[[70000]]]}', "no expert id"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [0], "prompt_id": [1]}', "prompt_id should be"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [0], "train_token_ids": "x"}', "no regular list"),
    ],
)
def test_bad_dumps_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text(text)
    assert main(["validate", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_other_files_are_one_line(tmp_path: Path) -> None:
    for name, data in (("dump.parquet", b"no parquet"), ("dump.jsonl", b"\xff\xfe"), ("run.json", b'{"a": 1}')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DumpError):
            check_file(tmp_path / name)


def test_validate_prints_errors_first_with_places_cause_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = Healthy(shape=SHAPE, certain_share=0.2, n_prompts=6)
    run = write_run(tmp_path / "run", h, *plant("D03-all-zero", h, *make(h)))
    assert main(["validate", str(run.path)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: D03-all-zero: infer: ")
    assert lines[1].startswith("    first: sequence 0 position ")
    assert "zero-filled buffer" in lines[2]
    levels = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert levels[:-1] == sorted(levels[:-1], key=["error", "warning", "note"].index)
    assert lines[-1].startswith(f"{run.path}: 1 errors, 0 warnings, ")
    n_rows = 2 * sum(len(run.tokens(shard)) for shard in run.shards)
    n_rules = sum(rule.needs != DIAGNOSIS for rule in RULES.values())
    assert f" of {n_rules} rules applied to {n_rows:,} token rows; left out: " in lines[-1]


def test_the_table_of_rules_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--list-rules"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for rule in RULES.values():
        assert f"{rule.name} [{rule.level}]" in words
        assert all(text in words for text in (rule.symptom, rule.threshold, rule.cause, rule.next_check))
    assert main(["validate", "--list-rules", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(rule["name"], rule["threshold"]) for rule in listed] == [(r.name, r.threshold) for r in RULES.values()]


def test_validate_without_anything_to_check_is_a_usage_error() -> None:
    assert main(["validate"]) == 2


def errors_of(path: Path, n_experts: int | None = 16) -> dict[str, str]:
    """Rule -> message of what is above a note."""
    return {f.rule: f.message for f in check_file(path, n_experts).findings if f.level != "note"}


def in_infer(records: list[dict[str, Any]], change: Any) -> list[dict[str, Any]]:
    """Records whose infer routing is ``change(array)``, and that have none of train."""
    return [
        {
            **{name: value for name, value in record.items() if name != "train_routed_experts"},
            "routed_experts": change(np.array(record["routed_experts"])).tolist(),
        }
        for record in records
    ]


def test_a_bug_found_logprobs_are_compared_although_one_side_alone_has_routing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair rule used to be left out of the usual dump: shifted log-probabilities were called clean."""
    h = Healthy(shape=SHAPE, certain_share=0, n_prompts=24)
    records = in_infer(records_of(*plant("D01-token-lag", h, *make(h))), lambda ids: ids)
    assert main(["validate", str(write_dump(tmp_path / "dump.jsonl", records))]) == 3
    out = capsys.readouterr().out
    assert out.startswith("error: D01-token-lag: infer~train: train's logps correlate with infer's at lag -1") or (
        "at lag +1" in out
    )
    summary = out.splitlines()[-1]
    inspection = check_file(tmp_path / "dump.jsonl")
    n_applied = sum(rule.needs in inspection.has for rule in RULES.values())
    n_rules = sum(rule.needs != DIAGNOSIS for rule in RULES.values())
    assert n_applied + sum(map(len, inspection.left_out.values())) == n_rules < len(RULES)
    assert f"{n_applied} of {n_rules} rules applied" in summary, "rules of the diagnosis used to count as applied"
    assert "D01-row-lag, D02-layer-lag, D02-layer-at-chance because no expert ids of both sides" in summary


def test_sides_of_other_depth_are_named_and_their_logprobs_compared(tmp_path: Path) -> None:
    h = Healthy(shape=SHAPE, certain_share=0, n_prompts=24)
    records = records_of(*plant("D01-token-lag", h, *make(h)))
    for record in records:
        record["train_routed_experts"] = np.array(record["train_routed_experts"])[:, 1:].tolist()
    assert set(errors_of(write_dump(tmp_path / "dump.jsonl", records))) == {"completeness", "D01-token-lag"}


def with_zero_layers(ids: np.ndarray, layers: list[int]) -> np.ndarray:
    """The rows with layers of nothing but expert 0 put in at these places."""
    deep = np.zeros((len(ids), ids.shape[1] + len(layers), ids.shape[2]), dtype=ids.dtype)
    deep[:, [i for i in range(deep.shape[1]) if i not in layers]] = ids
    return deep


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [1, 3, 5], [6]])
@pytest.mark.parametrize("is_on_both", [True, False])
def test_a_bug_found_slots_of_dense_layers_are_no_error(
    tmp_path: Path, layers: list[int], is_on_both: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slot of zeros of a healthy dense layer used to be D03-duplicate-ids, and kept row rules from every row."""
    h = Healthy(shape=SHAPE, certain_share=0)
    for fault in (None, "D02-layer-lag"):
        pair = make(h) if fault is None else plant(fault, h, *make(h))
        records = records_of(*pair)
        for record in records:
            for name in ["routed_experts", "train_routed_experts"][: 1 + is_on_both]:
                record[name] = with_zero_layers(np.array(record[name]), layers).tolist()
        path = write_dump(tmp_path / "dump.jsonl", records)
        assert set(errors_of(path)) == ({fault} if fault else set())
        notes = [f for f in check_file(path, 16).findings if f.rule == "D03-dense-slot"]
        assert [f.where for f in notes] == ["infer", "train"][: 1 + is_on_both]
        assert f"layers {layers} of {6 + len(layers)} are expert 0 in every row" in notes[0].message
        assert main(["validate", str(path), "--strict"]) == (3 if fault else 0)
    assert "D03-dense-slot" in capsys.readouterr().out


def test_layers_that_were_never_captured_are_no_dense_slots(tmp_path: Path) -> None:
    """Every layer zero = never bound; a long block = another rank's; zero on one of two equally deep sides = lost."""
    records = records_of(*make(Healthy(shape=(16, 4, 12), certain_share=0)))
    for change, rule in (
        (lambda ids: ids * 0, "D03-never-bound"),
        (lambda ids: np.where(np.arange(12)[:, None] < 6, 0, ids), "D03-zero-layer"),
    ):
        messages = errors_of(write_dump(tmp_path / "dump.jsonl", in_infer(records, change)))
        assert set(messages) == {rule}
    assert "layers [0, 1, 2, 3, 4, 5] of 12" in messages["D03-zero-layer"]
    lost = [
        {**r, "routed_experts": np.where(np.arange(12)[:, None] == 0, 0, r["routed_experts"]).tolist()} for r in records
    ]
    assert set(errors_of(write_dump(tmp_path / "dump.jsonl", lost))) == {"D03-zero-layer"}
    empty = {
        "prompt_token_ids": [1] * 40,
        "token_ids": [2] * 507,
        "routed_experts": np.zeros((546, 40, 8), int).tolist(),
    }
    assert set(errors_of(write_dump(tmp_path / "dump.jsonl", [empty]), None)) == {"D03-never-bound"}


def test_one_layer_of_another_router_is_named_with_chance_and_the_other_layers(tmp_path: Path) -> None:
    """A draft head that overwrote layer 0 was called clean: no rule looked at a single layer."""
    h = Healthy(shape=SHAPE, certain_share=0)
    path = write_dump(tmp_path / "dump.jsonl", records_of(*plant("D02-layer-at-chance", h, *make(h))))
    message = errors_of(path)["D02-layer-at-chance"]
    assert message.startswith("layers [0] of 6: 2")
    assert ", chance 2" in message
    assert message.endswith("in the other layers")


def test_a_resumed_generation_that_was_stored_per_segment_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """148 rows for 90 tokens used to be refused without the cause: rows 59.. repeat rows 0.."""
    rows = np.argsort(np.random.default_rng(0).random((89, 6, 16)), axis=2)[:, :, :4]
    record = {"prompt_token_ids": [1] * 40, "token_ids": [2] * 50}
    joined = {**record, "routed_experts": np.concatenate([rows[:59], rows]).tolist()}
    assert main(["validate", str(write_dump(tmp_path / "dump.jsonl", [joined]))]) == 1
    error = capsys.readouterr().err
    assert "148 rows from row 0 for 90 tokens; rows 59..117 repeat rows 0..58" in error
    assert "keep the last 89 rows" in error
    other = {**record, "routed_experts": np.concatenate([rows[::-1][:59], rows]).tolist()}
    assert main(["validate", str(write_dump(tmp_path / "dump.jsonl", [other]))]) == 1
    assert "expected prompt + response - 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("held", "read", "said"),
    [
        (np.uint8, np.int32, "bytes [55, 1, 61, 63], as 4 uint8 ids read as one int32"),
        (np.uint16, np.int32, "2 uint16 ids read as one int32"),
        (np.int32, np.int64, "2 int32 ids read as one int64"),
        (None, np.uint16, "65535, which is -1 (not routed) in an unsigned type"),
    ],
)
def test_ids_read_in_another_width_are_named_by_their_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held: Any, read: Any, said: str
) -> None:
    rows = np.argsort(np.random.default_rng(0).random((8, 6, 64)), axis=2)[:, :, :4]
    rows[0, 0] = [55, 1, 61, 63]
    wide = np.full((8, 6, 4), -1).astype(read) if held is None else rows.astype(held).view(read)
    record = {"prompt_token_ids": [1] * 4, "token_ids": [2] * 5, "routed_experts": wide.tolist()}
    assert main(["validate", str(write_dump(tmp_path / "dump.jsonl", [record]))]) == 1
    if held is np.uint8:
        wide[...] = wide[0, 0, 0]
        write_dump(tmp_path / "dump.jsonl", [{**record, "routed_experts": wide.tolist()}])
        capsys.readouterr()
        assert main(["validate", str(tmp_path / "dump.jsonl")]) == 1
    assert said in capsys.readouterr().err


def test_not_routed_in_an_unsigned_byte_and_ids_in_a_signed_one_are_named(tmp_path: Path) -> None:
    """-1 stored in uint8 was "rows overwritten"; 200 stored in int8 was a physical id."""
    records = records_of(*make(Healthy(shape=SHAPE, certain_share=0)))

    def not_routed(ids: np.ndarray) -> np.ndarray:
        ids[-3:] = -1
        return ids.astype(np.int8).view(np.uint8)

    path = write_dump(tmp_path / "dump.jsonl", in_infer(records, not_routed))
    for n_experts in (16, None):
        assert list(errors_of(path, n_experts)) == ["D03-sentinel"]
    high = in_infer(records, lambda ids: (ids + 190).astype(np.uint8).view(np.int8))
    messages = errors_of(write_dump(tmp_path / "dump.jsonl", high), 256)
    assert "as 190 in a signed byte" in messages["D03-id-range"]


def test_zero_experts_are_offered_as_a_cause(tmp_path: Path) -> None:
    records = records_of(*make(Healthy(shape=SHAPE, certain_share=0)))
    path = write_dump(tmp_path / "dump.jsonl", in_infer(records, lambda ids: ids + 4))
    (found,) = [f for f in check_file(path, 16).findings if f.level == "error"]
    assert (found.rule, "zero experts" in found.message, "zero_expert_num" in found.cause) == (
        "D03-id-range",
        True,
        True,
    )

    def named_twice(ids: np.ndarray) -> np.ndarray:
        ids[5, 2] = [0, 0, *ids[5, 2][ids[5, 2] > 0][:2]]
        return ids

    messages = errors_of(write_dump(tmp_path / "dump.jsonl", in_infer(records, named_twice)))
    assert "always expert 0 (a zero expert written as 0, as LongCat's" in messages["D03-duplicate-ids"]


def test_zero_experts_that_are_known_are_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LongCat's ids behind the experts', or expert 0 named more than once in their place (sglang issue 30387), are
    healthy where zero_expert_num is given; a wrong id beside them is still found, and zeros in every row are."""
    records = records_of(*make(Healthy(shape=SHAPE, certain_share=0)))
    behind = in_infer(records, lambda ids: ids + 4)

    def as_expert_0(ids: np.ndarray) -> np.ndarray:
        return np.where(ids > 11, 0, ids)

    as_zero = in_infer(records, as_expert_0)
    of = {"behind": (behind, "16", "4"), "as expert 0": (as_zero, "12", "4")}
    for name, (some, n, n_zero) in of.items():
        path = write_dump(tmp_path / "dump.jsonl", some)
        assert main(["validate", str(path), "--num-experts", n]) == 3, name
        assert main(["validate", str(path), "--num-experts", n, "--zero-experts", n_zero]) == 0, name
        assert main(["import", "sequences", str(path), "-o", str(tmp_path / name), "--num-experts", n,
                     "--zero-experts", n_zero]) == 0  # fmt: skip
        assert main(["validate", str(tmp_path / name)]) == 0, name
    capsys.readouterr()
    assert main(["validate", str(path), "--zero-experts", "4"]) == 1
    assert "--zero-experts needs --num-experts" in capsys.readouterr().err

    def five_twice(ids: np.ndarray) -> np.ndarray:
        ids = as_expert_0(ids)
        ids[5, 2] = [5, 5, 0, 1]
        return ids

    def errors(change: Any) -> set[str]:
        path = write_dump(tmp_path / "dump.jsonl", in_infer(records, change))
        return {one.rule for one in check_file(path, 12, n_zero_experts=4).findings if one.level == "error"}

    assert errors(five_twice) == {"D03-duplicate-ids"}
    assert errors(lambda ids: ids + 4) == {"D03-id-range"}
    assert errors(np.zeros_like) == {"D03-never-bound"}


def test_the_trainers_own_fillers_are_named_as_such(tmp_path: Path) -> None:
    """slime's rows of ids that count on used to be stale rows of a CUDA graph."""
    records = records_of(*make(Healthy(shape=SHAPE, certain_share=0, response_length=60)))

    def slime(ids: np.ndarray) -> np.ndarray:
        ids[-15:] = (np.arange(15 * 6 * 4) % 16).reshape(15, 6, 4)
        return ids

    def nemo_rl(ids: np.ndarray) -> np.ndarray:
        ids[-15:] = np.arange(4)
        return ids

    for change, said in (
        (slime, "count on from slot to slot (arange modulo E"),
        (nemo_rl, "rows are experts 0..3 in all"),
    ):
        path = write_dump(tmp_path / "dump.jsonl", in_infer(records, change))
        messages = errors_of(path)
        assert list(messages) == ["D04-filler-rows"]
        assert said in messages["D04-filler-rows"]
    assert "NeMo-RL, SkyRL" in RULES["D04-filler-rows"].cause


def test_a_copy_of_the_other_side_is_a_warning_and_strict_ends_with_3(tmp_path: Path) -> None:
    """Logprobs that are the same on both sides bit for bit were called clean."""
    records = records_of(*make(Healthy(shape=SHAPE, certain_share=0)))
    for record in records:
        record["train_logprobs"] = record["logprobs"]
    path = write_dump(tmp_path / "dump.jsonl", records)
    assert list(errors_of(path)) == ["D28-same-bits"]
    assert main(["validate", str(path)]) == 0
    assert main(["validate", str(path), "--strict"]) == 3


def test_logprobs_of_another_sequence_are_named_by_sequence(tmp_path: Path) -> None:
    """All sequences, or one of many, with another sequence's log-probabilities were called clean."""
    h = Healthy(shape=SHAPE, certain_share=0, n_prompts=30, response_length=80)
    records = records_of(*make(h))
    n = len(records[11]["token_ids"])
    records[11]["train_logprobs"] = np.resize(records[12]["train_logprobs"], n).tolist()
    path = write_dump(tmp_path / "dump.jsonl", records)
    (found,) = [f for f in check_file(path, 16).findings if f.level == "error"]
    assert (found.rule, found.n, found.n_of, found.places[0].seq_id) == ("D01-other-sequence", 1, 30, 11)
