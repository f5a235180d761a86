"""Every fault planted in a healthy capture is found, named, and nothing else is called an error."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hygiene_captures import FAULTS, SHAPES, Healthy, all_findings, bf16, make, plant, write_run
from records import arm_of, made_otherwise
from scripted_engine import make_scripted_run

from moediag.hygiene import Finding, check_run
from moediag.hygiene.buffers import _Blocks
from moediag.hygiene.rows import Rows, Shape
from moediag.hygiene.rules import RULES, Rule
from moediag.run.capture import Capture
from moediag.run.reader import Run, open_run
from moediag.run.records import write_record
from moediag.run.writer import RunWriter

ONE_LAYER = "needs two layers"
NO_CHOICE = "every expert is always chosen"
K_ONE = "with one expert per token there is no second id"
FEW_SLOTS = "so few slots count on by chance"
POPULAR = "two of three experts, or one of two: chance gives two thirds, or a half, and leaves little room"
ALL_FILLER = "one of two experts in two equal layers: every row is the first or the last set throughout"
FEW_TOKENS = "six sequences of 18 tokens: no stream of log-probabilities can be distinguished from another"
COIN = "one layer, two experts: half of all rows are {0}, half of all neighbours agree"


def why_not(fault: str, shape: tuple[int, int, int]) -> str:
    """Why a shape cannot show a fault, by its nature."""
    n_experts, top_k, n_layers = shape
    if fault in ("D02-layer-lag", "D02-layer-at-chance", "D02-twin-layers", "D03-zero-layer") and n_layers == 1:
        return ONE_LAYER
    if fault == "D02-layer-at-chance" and shape in ((3, 2, 4), (2, 1, 2)):
        return POPULAR
    if fault in ("D02-layer-lag", "D01-row-lag", "D02-layer-at-chance", "D02-twin-layers") and n_experts == top_k:
        return NO_CHOICE
    zeros = ("D03-all-zero", "D03-never-bound", "D03-zero-layer")
    if fault in ("D03-duplicate-ids", "D03-partial-row", *zeros) and top_k == 1:
        return K_ONE
    if fault == "D04-filler-rows counting" and (
        n_experts == top_k or (n_layers * top_k - 1) * np.log(n_experts) < np.log(1e6)
    ):
        return FEW_SLOTS
    if fault.startswith("D04") and shape == (2, 1, 1):
        return COIN
    if fault == "D02-twin-layers" and shape == (2, 1, 2):
        return ALL_FILLER
    if fault in ("D01-other-sequence", "D10-temperature") and n_experts * n_layers > 1000:
        return FEW_TOKENS
    if fault.startswith("D05") and shape == (2, 1, 1):
        return COIN
    return ""


def healthy(fault: str, shape: tuple[int, int, int], **changes: object) -> Healthy:
    """A healthy pair in which the fault can be planted: few tokens where the shape is large."""
    return Healthy(
        shape=shape,
        n_prompts=6 if shape[0] * shape[2] > 1000 else 12,
        samples=2 if fault.startswith("D08") else 1,
        prompt_length=40 if fault.startswith("D08") else 12,
        certain_share=0.05,
        has_logits=True,
        **changes,  # type: ignore[arg-type]
    )


def is_named(fault: str, found: list[Finding]) -> None:
    """The fault's rule has fired above a note, and no error but it and its declared companions."""
    rule = RULES[fault.split()[0]]
    fired = {finding.rule for finding in found if finding.level != "note"}
    errors = {finding.rule for finding in found if finding.level == "error"}
    assert rule.name in fired, f"{rule.name} not found; found {sorted(fired)}"
    assert errors <= {rule.name, *rule.companions}, f"also called errors: {sorted(errors - {rule.name})}"


CASES = [(fault, shape) for fault in FAULTS for shape in SHAPES if not why_not(fault, shape)]


@pytest.mark.parametrize(("fault", "shape"), CASES, ids=[f"{f}-E{s[0]}-K{s[1]}-L{s[2]}" for f, s in CASES])
def test_a_planted_fault_is_named_in_every_shape_that_can_show_it(fault: str, shape: tuple[int, int, int]) -> None:
    h = healthy(fault, shape)
    is_named(fault, all_findings(h, *plant(fault, h, *make(h))))


def test_of_two_layers_the_first_is_the_odd_one_out_where_the_second_agrees() -> None:
    """Of a model of two MoE layers no layer was held against the other: a first layer of another router was called a
    router that computes something else. A second layer at chance may be what the first brought about."""
    h = healthy("D02-layer-at-chance", (16, 4, 2))
    tokens, train, infer = make(h)

    def rules(layers: tuple[int, ...]) -> set[str]:
        changed = {name: array.copy() for name, array in infer.arrays().items()}
        rows = np.flatnonzero(~np.r_[tokens.seq_id_T[1:] != tokens.seq_id_T[:-1], True])
        for layer in layers:
            others = np.random.default_rng(layer).permutation(rows)
            for name, array in changed.items():
                if array.ndim > 1:
                    array[rows, layer] = infer.arrays()[name][others, layer]
        return {one.rule for one in all_findings(h, tokens, train, Capture(**changed)) if one.level != "note"}

    assert rules(()) == set()
    assert rules((0,)) == {"D02-layer-at-chance"}
    assert rules((1,)) == set()
    assert rules((0, 1)) == set()


# 1 of 1,820 sets may be popular by chance in one of six layers: a flat layer is then not below 1e-6 by its ids alone
TOO_FEW_SETS = ("D34-flat-router", (16, 4, 6))
IDS_ALONE = [
    (fault, shape)
    for fault in FAULTS
    for shape in ((16, 4, 6), (64, 8, 12), (128, 8, 48))
    if fault != "softmaxed-logits" and (fault, shape) != TOO_FEW_SETS and not why_not(fault, shape)
]


@pytest.mark.parametrize(("fault", "shape"), IDS_ALONE, ids=str)
def test_ids_and_logps_alone_are_enough_at_real_sizes(fault: str, shape: tuple[int, int, int]) -> None:
    """A dump has no gate weights and no margins; a flat layer is then known by its ids if sets are many."""
    h = replace(healthy(fault, shape), has_scores=False)
    is_named(fault, all_findings(h, *plant(fault, h, *make(h))))


CANNOT_BE_STORED = ("D03-id-range", "D03-partial-row", "D03-sentinel")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in CANNOT_BE_STORED])
def test_a_fault_in_a_run_on_disk_is_named(fault: str, tmp_path: Path) -> None:
    h = healthy(fault, (16, 4, 6))
    is_named(fault, check_run(write_run(tmp_path / "run", h, *plant(fault, h, *make(h)))))


TOO_LONG_FOR_SCRIPTED = (
    "D01-other",
    "D03-id",
    "D03-partial",
    "D03-sentinel",
    "D08",
    "softmaxed",
    "D05-stale-rows block",
    "D07-rank-local block",
)
SCRIPTED = [fault for fault in FAULTS if not fault.startswith(TOO_LONG_FOR_SCRIPTED)]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A healthy run; sequences of a handful of tokens, L = 4: the statistics have little to go by."""
    run = make_scripted_run(tmp_path_factory.mktemp("scripted") / "run", n_prompts=60, n_layers=4, shard_size=7)
    assert [finding for finding in check_run(run) if finding.level != "note"] == []
    return run


@pytest.mark.parametrize("fault", SCRIPTED)
def test_a_fault_in_a_scripted_run_is_named(fault: str, scripted: Run, tmp_path: Path) -> None:
    h = Healthy(shape=(8, 2, 4), renormalize=False)
    planted = {}
    for shard in scripted.shards:
        captures = scripted.capture("train", shard), scripted.capture("infer", shard)
        _, train, infer = plant(fault, h, scripted.tokens(shard), *captures)
        planted[shard] = {"train": train, "infer": infer}
    shutil.copytree(scripted.path, tmp_path / "run", ignore=shutil.ignore_patterns("arms"))
    run = open_run(tmp_path / "run")
    writer = RunWriter(run)
    for arm in ("train", "infer"):
        writer.begin_arm(arm_of(run, arm, arrays=tuple(planted[run.shards[0]][arm].arrays())))
        for shard, captures in planted.items():
            writer.write_capture(arm, shard, run.tokens(shard), captures[arm], {}, {})
    is_named(fault, check_run(run))


def test_a_missing_last_row_is_normal_in_infer_and_a_note_in_train() -> None:
    h = Healthy()
    tokens, train, infer = make(h)
    ends = np.array([end - 1 for _, end in tokens.sequence_bounds()])
    cut = Capture(**{name: array.copy() for name, array in train.arrays().items()})
    for name, array in cut.arrays().items():
        if array.ndim > 1:
            array[ends] = -1 if name == "expert_ids_TLK" else np.nan
    assert [(f.level, f.rule) for f in all_findings(h, tokens, cut, infer) if f.rule.startswith("D06")] == [
        ("note", "D06-last-row")
    ]
    cut.expert_ids_TLK[ends[0] - 1] = -1  # type: ignore[index]
    found = [f for f in all_findings(h, tokens, cut, infer) if f.level == "error"]
    assert [f.rule for f in found] == ["completeness"]
    assert found[0].n == 3
    assert found[0].places[0][:2] == (0, int(tokens.position_T[ends[0] - 1]))


def test_a_cached_prefix_is_named_with_its_block_size() -> None:
    h = healthy("D08-cached-prefix", (16, 4, 6))
    found = all_findings(h, *plant("D08-cached-prefix", h, *make(h)))
    (named,) = [f for f in found if f.rule == "D08-cached-prefix"]
    assert named.level == "warning"
    assert "multiples of 16 (block size)" in named.message
    assert (named.n, named.n_of) == (12, 24)


def stale_message(start: int, end: int, *, length: int, shape: tuple[int, int, int] = (16, 4, 6), n: int = 1) -> str:
    """What D05 says where infer's row 10 stands in rows start..end-1 of every sequence, routing and scores."""
    h = Healthy(shape=shape, n_prompts=n, prompt_length=6, response_length=length, certain_share=0.05)
    tokens, train, infer = make(h)
    for array in infer.arrays().values():
        for first, last in tokens.sequence_bounds() if array.ndim > 1 else []:
            array[first + start : min(first + end, last - 1)] = array[first + 10]
    (found,) = [f for f in all_findings(h, tokens, train, infer) if f.rule == "D05-stale-rows"]
    return found.message


def test_stale_rows_name_the_block_and_the_size_that_it_touches() -> None:
    """67 rows from 4,039 on, chunks of 4,096 (sglang issue 36404): the finding gave no position but the first."""
    message = stale_message(4039, 4039 + 67, length=9000)
    assert "longest block: 66 rows from position 4,040 of sequence 0" in message
    assert "1 of 1 blocks touch multiples of 4,096 (by chance 0.017)" in message
    message = stale_message(150, 217, length=500)
    assert "longest block: 66 rows from position 151 of sequence 0" in message
    assert "multiples" not in message, "67 rows touch a multiple of 64 wherever they lie"


def test_stale_blocks_of_many_sequences_name_their_common_size() -> None:
    message = stale_message(64, 70, length=200, n=12)
    # rows 65..69 and what touches them are seven positions of 64
    assert f"12 of 12 blocks touch multiples of 64 (by chance {(7 / 64) ** 12:.2g})" in message
    assert "multiples" not in stale_message(70, 76, length=200, n=12)


@pytest.mark.parametrize("size", [24, 40, 72])
def test_stale_blocks_name_the_size_of_a_cuda_graph_that_is_no_power_of_two(size: int) -> None:
    """Only powers of two were tried, while engines capture graphs for 1, 2, 4, 8, 16, 24, ..., 272, 288, ..."""
    h = Healthy(shape=(16, 4, 6), n_prompts=8, prompt_length=6, response_length=1200, certain_share=0.05)
    tokens, train, infer = make(h)
    for array in infer.arrays().values():
        for nth, (first, _) in enumerate(tokens.sequence_bounds() if array.ndim > 1 else []):
            start = first + size * (nth + 1)
            array[start : start + 6] = array[first + 10]
    (found,) = [f for f in all_findings(h, tokens, train, infer) if f.rule == "D05-stale-rows"]
    assert f"8 of 8 places of blocks touch multiples of {size} (by chance {41 * (7 / size) ** 8:.2g})" in found.message
    assert found.message.endswith("or CUDA graph, which vLLM and SGLang capture?")


def test_stale_blocks_at_one_place_are_one_piece_of_evidence_for_a_graph_s_size() -> None:
    message = stale_message(40, 46, length=400, n=12)
    assert "multiples" not in message
    assert "from position 41 of sequence 0, at 40: vLLM and SGLang capture CUDA graphs of that size" in message
    assert "CUDA graphs" not in stale_message(42, 47, length=400, n=12)


@pytest.mark.parametrize("size", [16, 64, 512])
def test_a_size_is_named_no_more_often_than_its_chance(size: int) -> None:
    """Blocks that begin anywhere: a size in at most 5 % of findings, within what 400 of them show."""
    rng = np.random.default_rng(size)
    h = Healthy(n_prompts=1, prompt_length=6, response_length=3000)
    tokens, _, infer = make(h)
    rows = Rows(tokens, infer, Shape(3, 8, 2, True))
    n_named = 0
    for _ in range(400):
        blocks, late_T = _Blocks(), np.zeros(len(tokens), bool)
        start, length = int(rng.integers(20, len(tokens) - size)), int(rng.integers(3, size))
        late_T[start : start + length] = True
        blocks.add(rows, late_T, late_T, before=1)
        n_named += "multiples" in blocks.text()
    assert n_named / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_missing_layers_are_named_as_layers() -> None:
    h = Healthy(shape=(16, 4, 6))
    tokens, train, infer = make(h)
    infer.expert_ids_TLK[:, 3:] = -1  # type: ignore[index]
    found = [f for f in all_findings(h, tokens, train, infer) if f.rule == "completeness"]
    assert "only in layers 3-5 of 0-5" in found[0].message


def test_random_gaps_are_no_rank_and_no_prefix() -> None:
    h = Healthy(shape=(16, 4, 6), n_prompts=30)
    tokens, train, infer = make(h)
    lost = np.random.default_rng(0).random(len(tokens)) < 0.5
    infer.expert_ids_TLK[lost] = -1  # type: ignore[index]
    rules = {f.rule for f in all_findings(h, tokens, train, infer) if f.level != "note"}
    assert rules == {"completeness"}


@pytest.mark.parametrize("name", ["gate_weights_TLK", "margin_TL", "logit_margin_TL", "router_logits_TLE"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_impossible_scores_are_named(name: str, value: float) -> None:
    h = Healthy(shape=(16, 4, 6), has_logits=True)
    tokens, train, infer = make(h)
    infer.arrays()[name][3, 2, ...] = value
    errors = {f.rule for f in all_findings(h, tokens, train, infer) if f.level == "error"}
    wanted = {
        "gate_weights_TLK": "gate-not-finite", "margin_TL": "margin-not-finite",
        "logit_margin_TL": "margin-logits" if value == -1 else "margin-not-finite",
        "router_logits_TLE": "margin-logits" if value == -1 else "logits-not-finite",
    }[name]  # fmt: skip
    assert errors == {wanted}


def test_margins_of_other_rows_are_named() -> None:
    h = Healthy(shape=(16, 4, 6), has_logits=True)
    tokens, train, infer = make(h)
    moved = replace(infer, logit_margin_TL=np.roll(infer.logit_margin_TL, 1, axis=1))  # type: ignore[arg-type]
    assert "margin-logits" in {f.rule for f in all_findings(h, tokens, train, moved)}


def test_weights_that_one_side_does_not_normalise_are_named() -> None:
    h = Healthy(shape=(16, 4, 6), noise=0.01)
    tokens, _, infer = make(h)
    _, bare, _ = make(replace(h, renormalize=False))
    rules = {f.rule for f in all_findings(replace(h, renormalize=True), tokens, bare, infer)}
    assert {"D14-gate-factor", "gate-sum"} <= rules


def test_a_scaling_factor_on_one_side_is_named() -> None:
    h = Healthy(shape=(16, 4, 6), noise=0.01)
    tokens, train, infer = make(h)
    scaled = replace(train, gate_weights_TLK=bf16(train.gate_weights_TLK * 2.5))  # type: ignore[operator]
    found = [f for f in all_findings(h, tokens, scaled, infer) if f.level != "note"]
    assert [f.rule for f in found] == ["D14-gate-factor"]
    assert "2.5 times" in found[0].message


def test_zeros_of_near_certain_tokens_are_a_note_with_their_count() -> None:
    h = Healthy(certain_share=0.9)
    tokens, train, infer = make(h)
    (note,) = [f for f in all_findings(h, tokens, train, infer) if f.where == "infer" and f.rule.startswith("D31")]
    assert (note.level, note.rule) == ("note", "D31-certain-tokens")
    assert note.n == int((infer.logp_T == 0).sum())


def test_arrays_of_another_shape_are_one_finding_and_no_traceback() -> None:
    h = Healthy()
    tokens, train, infer = make(h)
    for name in ("margin_TL", "gate_weights_TLK", "entropy_T"):
        cut = replace(infer, **{name: infer.arrays()[name][..., :-1]})
        found = [f for f in all_findings(h, tokens, train, cut) if f.level == "error"]
        assert {f.rule for f in found} == {"completeness"}
        assert name in found[0].message


def test_every_rule_is_described() -> None:
    assert all(isinstance(rule, Rule) for rule in RULES.values())
    assert all(all((r.symptom, r.threshold, r.cause, r.next_check)) for r in RULES.values())
    # the statistic, then its limit with its source
    assert [rule.name for rule in RULES.values() if not all(map(str.strip, rule.threshold.partition(";")))] == []
    assert {companion for rule in RULES.values() for companion in rule.companions} <= set(RULES)
    assert {rule.level for rule in RULES.values()} == {"error", "warning", "note"}


def test_a_file_that_does_not_belong_is_damage_of_the_run_but_keeps_no_analysis_waiting(tmp_path: Path) -> None:
    run = make_scripted_run(tmp_path / "run")
    (run.path / "arms" / "train" / "shard-00099.safetensors").write_bytes(b"stray")
    assert [f.rule for f in check_run(run)] == ["damaged"]
    assert check_run(run, arms=["infer", "train"]) == []


def test_a_last_token_without_log_probability_is_named_where_it_was_scored_again() -> None:
    """A prefill that was evicted between chunks skipped the last prompt log-probability (vLLM pull request 41411): of
    given text that is the last token's."""
    h = Healthy(shape=(16, 4, 6), certain_share=0)
    tokens, train, infer = make(h)
    ends = [end - 1 for _, end in tokens.sequence_bounds()][::3]
    infer.logp_T[ends] = np.nan
    found = [one for one in all_findings(h, tokens, train, infer) if one.level != "note"]
    assert [(one.rule, one.n) for one in found] == [("D31-nan-logp", len(ends))]
    assert [(place.seq_id, place.position) for place in found[0].places] == [
        (int(tokens.seq_id_T[end]), int(tokens.position_T[end])) for end in ends
    ]


def test_parameters_that_the_engine_sampled_with_unasked_are_named(tmp_path: Path) -> None:
    """generation_config.json silently set temperature and penalties: the facts of the arm said so, and no rule did."""
    h = Healthy(n_prompts=4)
    run = write_run(tmp_path / "run", h, *make(h))
    record, path = run.arm("infer"), run.arm_folder("infer") / "arm.json"
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 7}
    for changes, words in (
        ({}, None),
        ({"top_k": 0}, None),
        ({"temperature": 0.6, "top_k": 20}, "temperature = 0.6 (1.0 requested), top_k = 20 (0 requested)"),
        ({"presence_penalty": -0.5}, "presence_penalty = -0.5 (0.0 requested)"),
    ):
        write_record(path, made_otherwise(record, facts={**record.facts, "sampling": neutral | changes}))
        found = [one for one in check_run(open_run(run.path)) if one.level != "note"]
        assert [one.rule for one in found] == (["D11-sampling-parameters"] if words else [])
        assert words is None or words in found[0].message
    write_record(path, made_otherwise(record, facts=record.facts))
    assert not [one for one in check_run(open_run(run.path)) if one.level != "note"]


def test_an_arm_of_other_tokens_is_named(tmp_path: Path) -> None:
    run: Run = make_scripted_run(tmp_path / "run")
    shard = run.shards[0]
    tokens = run.tokens(shard)
    other = replace(tokens, token_id_T=tokens.token_id_T + 1)
    RunWriter(run).write_capture("train", shard, other, run.capture("train", shard), {}, {})
    assert [f.rule for f in check_run(run) if f.level == "error"] == ["token-identity"]
