"""Healthy captures raise neither error nor warning; findings do not depend on order or shards."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import HUNT
from hygiene_captures import (
    FAULTS,
    Healthy,
    all_findings,
    arrays_of,
    make,
    plant,
    random_healthy,
    rows_of,
    write_run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import make_scripted_run

from moediag.hygiene import Finding, check_run, inspect_run
from moediag.hygiene.check import ArmHygiene, PairHygiene
from moediag.hygiene.rows import Rows, Shape
from moediag.run import pieces
from moediag.run.capture import Capture, TokenRows

N_CLEAN = 100 if HUNT == 1 else 500
FAULTY = [fault for fault in FAULTS if fault != "softmaxed-logits"]


@pytest.mark.parametrize("part", range(5))
def test_random_healthy_pairs_raise_no_alarm(part: int) -> None:
    """Skewed popularity, hot pair {0, 1}, zeros, repeats, copies of prompts and samples, near and far engines."""
    alarms: Counter[str] = Counter()
    for seed in range(part * N_CLEAN // 5, (part + 1) * N_CLEAN // 5):
        h = random_healthy(seed)
        for found in all_findings(h, *make(h)):
            if found.level != "note":
                alarms[f"seed {seed}: {found.line()}"] += 1
    assert alarms == Counter()


def test_a_bug_found_copies_of_a_prompt_are_no_separate_evidence() -> None:
    """Twenty copies of one sequence used to turn four chance repeats at lag 20 into D05 (69 of 96 pairs)."""
    h = random_healthy(226)
    h = replace(
        h, shape=(3, 2, 4), n_prompts=20, samples=2, prompt_length=12, response_length=16, vocabulary=3, zipf=1.0,
        hot_pair=0.0, repeated_share=0.6, same_prompts=True, memory=0.0, by_token=0.9, by_layer=0.5, noise=0.01,
        renormalize=False, has_scores=False,
    )  # fmt: skip
    assert [f.line() for f in all_findings(h, *make(h)) if f.level != "note"] == []


def test_a_bug_found_rates_of_few_pairs_are_not_zero() -> None:
    """A lag-1 rate of 0 out of a handful of pairs used to make 3 chance repeats of 13 an error (E=2, K=1, L=2)."""
    h = Healthy(
        shape=(2, 1, 2), n_prompts=1, prompt_length=40, response_length=60, vocabulary=1000, zipf=0.5, hot_pair=3.0,
        repeated_share=0.6, noise=3.0, renormalize=False,
    )  # fmt: skip
    for seed in range(40):
        assert [f.line() for f in all_findings(h, *make(replace(h, seed=seed))) if f.level != "note"] == []


def test_a_scripted_run_is_clean(tmp_path: Path) -> None:
    for dense in (False, True):
        run = make_scripted_run(tmp_path / f"run-{dense}", n_prompts=20, dense=dense)
        inspection = inspect_run(run)
        assert [f.line() for f in inspection.findings] == []
        assert inspection.n_rows == 2 * sum(len(run.tokens(shard)) for shard in run.shards)


Part = tuple[TokenRows, Capture, Capture]


def rules_of(h: Healthy, parts: list[Part]) -> tuple[dict[str, ArmHygiene], PairHygiene]:
    """The rules of both arms and of the pair, fed part by part."""
    n_experts, top_k, n_layers = h.shape
    shape = Shape(n_layers, n_experts, top_k, h.renormalize)
    arms = {name: ArmHygiene(shape, is_sampled=name == "infer") for name in ("infer", "train")}
    pair = PairHygiene(("train", "infer"), shape, is_foreign=True)
    for tokens, train, infer in parts:
        rows = {"train": Rows(tokens, train, shape), "infer": Rows(tokens, infer, shape)}
        for name, arm in arms.items():
            arm.add(rows[name])
        pair.add(rows["train"], rows["infer"])
    return arms, pair


def all_of(rules: tuple[dict[str, ArmHygiene], PairHygiene]) -> list[Finding]:
    """What the rules found."""
    arms, pair = rules
    found = [item for name, arm in arms.items() for item in arm.findings(name, {})]
    return found + pair.findings("infer~train")


def fed(h: Healthy, parts: list[Part]) -> list[Finding]:
    """Findings of arms and pair fed part by part."""
    return all_of(rules_of(h, parts))


def merged(h: Healthy, groups: list[list[Part]]) -> list[Finding]:
    """Findings of rules of which each group has its own, as another process hands them over."""
    first, *others = (pickle.loads(pickle.dumps(rules_of(h, parts))) for parts in groups)
    for arms, pair in others:
        for name, arm in arms.items():
            first[0][name].merge(arm)
        first[1].merge(pair)
    return all_of(first)


@pytest.mark.parametrize("fault", [*FAULTS, "none"])
@settings(max_examples=3 if HUNT == 1 else 10 * HUNT)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 12), max_size=4), data=st.data())
def test_findings_do_not_depend_on_which_shards_were_counted_together(
    fault: str, seed: int, cuts: list[int], data: st.DataObject
) -> None:
    """Every rule merges: groups of shards, empty ones too, give the findings of one group, word for word."""
    shape = data.draw(st.sampled_from([(8, 2, 3), (16, 4, 6), (4, 2, 1)]))
    h = Healthy(shape=shape, n_prompts=12, seed=seed, has_logits=fault == "softmaxed-logits")
    sides = make(h) if fault == "none" else plant(fault, h, *make(h))
    parts: list[Part] = [
        (rows_of(sides[0], rows), arrays_of(sides[1], rows), arrays_of(sides[2], rows))
        for rows in (np.arange(*bounds) for bounds in sides[0].sequence_bounds())
    ]
    ends = [0, *sorted(cuts), len(parts)]
    groups = [parts[start:end] for start, end in pairwise(ends)]
    assert merged(h, groups) == fed(h, parts)


@settings(max_examples=20 if HUNT == 1 else 60 * HUNT)
@given(fault=st.sampled_from(FAULTY), seed=st.integers(0, 1000), cut=st.integers(1, 11), data=st.data())
def test_findings_depend_neither_on_the_order_of_sequences_nor_on_shards(
    fault: str, seed: int, cut: int, data: st.DataObject
) -> None:
    h = Healthy(shape=data.draw(st.sampled_from([(8, 2, 3), (16, 4, 6), (4, 2, 1)])), n_prompts=12, seed=seed)
    tokens, train, infer = plant(fault, h, *make(h))
    bounds = tokens.sequence_bounds()
    order = data.draw(st.permutations(range(len(bounds))))
    rows = [np.arange(*bounds[i]) for i in order]
    whole = fed(h, [(tokens, train, infer)])
    shuffled = np.concatenate(rows)
    assert fed(h, [(rows_of(tokens, shuffled), arrays_of(train, shuffled), arrays_of(infer, shuffled))]) == whole
    pieces = [np.concatenate(part) for part in (rows[:cut], rows[cut:]) if part]
    assert fed(h, [(rows_of(tokens, p), arrays_of(train, p), arrays_of(infer, p)) for p in pieces]) == whole


def test_a_bug_found_a_pattern_counts_whole_sequences_too() -> None:
    """Sequences before the first gap used to be left out of D07's shares: three cut ones looked like a rank."""
    h = Healthy(shape=(16, 4, 6), n_prompts=12)
    tokens, train, infer = make(h)
    cut, _, holed = plant("D07-rank-local strided", h, tokens, train, infer)
    is_cut = tokens.seq_id_T < 3
    mixed = arrays_of(infer, slice(None))
    for name, array in mixed.arrays().items():
        array.setflags(write=True)
        array[is_cut] = holed.arrays()[name][is_cut]
    bounds = tokens.sequence_bounds()
    for order in (range(12), range(11, -1, -1)):
        rows = np.concatenate([np.arange(*bounds[i]) for i in order])
        parts = [rows[np.isin(tokens.seq_id_T[rows], ids)] for ids in ([0, 1, 2], list(range(3, 12)))]
        parts = parts if order[0] == 0 else parts[::-1]
        found = fed(h, [(rows_of(cut, p), arrays_of(train, p), arrays_of(mixed, p)) for p in parts])
        assert {f.rule for f in found if f.level != "note"} == {"completeness"}


def test_a_run_says_the_same_whatever_its_shard_size(tmp_path: Path) -> None:
    h = Healthy(shape=(16, 4, 6), samples=2, prompt_length=40)
    for fault in ("D05-stale-rows", "D08-cached-prefix", "D02-layer-lag", "D31-zero-logp"):
        planted = plant(fault, h, *make(h))
        found = [
            check_run(write_run(tmp_path / f"{fault}-{size}" / "run", h, *planted, shard_size=size))
            for size in (1, 5, 24)
        ]
        assert found[0] == found[1] == found[2]
        assert found[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_says_the_same_whichever_shards_are_read_together(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of shards, and processes: one group of all says the same."""
    h = Healthy(shape=(16, 4, 6), samples=2, prompt_length=40)
    runs = {
        fault: write_run(tmp_path / fault / "run", h, *plant(fault, h, *make(h)), shard_size=5)
        for fault in ("D05-stale-rows", "D08-cached-prefix", "D02-layer-lag", "D31-zero-logp")
    }
    whole = {fault: inspect_run(run) for fault, run in runs.items()}
    monkeypatch.setattr(pieces, "LEAST_ROWS", 1)
    assert all(len(pieces.groups_of(run)) == len(run.shards) > 1 for run in runs.values())
    assert {fault: inspect_run(run, workers=workers) for fault, run in runs.items()} == whole


def test_only_the_arms_asked_for_are_checked(tmp_path: Path) -> None:
    h = Healthy()
    tokens, train, infer = plant("D03-all-zero", h, *make(h))
    run = write_run(tmp_path / "run", h, tokens, train, infer)
    assert {f.level for f in check_run(run, arms=["train"])} <= {"note"}
    assert {f.where for f in check_run(run, arms=["infer"])} == {"infer"}
