"""A few cells of ``benchmarks/faults.py``, with the engines: made once, read as often as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ENGINES
from fault_measures import (
    CLEAN,
    QUOTED,
    TUNING,
    Cell,
    Maker,
    Reading,
    faulty,
    healthy,
    make,
    read_cell,
    tables,
    wilson,
)
from transformers import AutoConfig, AutoModelForCausalLM

from moediag.demo.tokenizer import byte_tokenizer
from moediag.faults import FAULTS
from moediag.run.files import read_sealed
from moediag.run.pieces import Here
from moediag.run.reader import open_run
from moediag.run.recipes import TRANSFORMERS, VLLM
from moediag.selftest.families import _COMMON, FAMILIES, MAX_LENGTH, randomise

MODEL = "qwen3_moe"
PLANTED = {
    ("attention-scale", TRANSFORMERS): "another function: an edited checkpoint",
    ("activations-fp8", VLLM): "coarser arithmetic: hooks in the loaded model, which samples tokens of its own",
    ("rows-lag", TRANSFORMERS): "a spoilt record",
}


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reading]:
    """What is named of a healthy pair and of a fault of each kind."""
    folder = tmp_path_factory.mktemp("cells")
    maker = Maker(folder, ENGINES)
    cells = [Cell(MODEL, "bfloat16", 0, fault, side) for fault, side in PLANTED]
    make(folder, [cell.name for cell in cells], Here())
    made = [Cell(MODEL, "bfloat16", 0), *cells]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    make(folder, [cell.name for cell in cells], Here())  # what is there is not made again
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    clean = open_run(maker.run_path(made[0]))
    for cell in cells:
        run = open_run(maker.run_path(cell))
        assert run.arms() == clean.arms()
        if cell.side == TRANSFORMERS:  # what the fault does not touch is the clean run's
            shard = clean.shards[0]
            assert run.capture_sidecar("infer", shard) == clean.capture_sidecar("infer", shard)
    return {cell.fault: read_cell(folder, False, cell) for cell in made}


@pytest.mark.engines
def test_a_healthy_pair_raises_no_alarm_and_a_fault_of_each_kind_is_named_first(readings: dict[str, Reading]) -> None:
    for fault, one in readings.items():
        assert one.is_right(1), (fault, one.word, one.causes)
    assert readings["attention-scale"].causes[0] in FAULTS["attention-scale"].causes


@pytest.mark.engines
def test_square_experts_in_the_other_layout_are_named_as_experts_weights_behind_a_right_router(tmp_path: Path) -> None:
    """transformers issue 47031: where matrices are square, their layout was taken from their shape, and loaded
    transposed without a word."""
    cell = Cell(MODEL, "bfloat16", 0, "experts-transposed", TRANSFORMERS)
    square = {**FAMILIES[MODEL].settings, "hidden_size": 64, "moe_intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(MODEL, **{**_COMMON, **square}))
    randomise(model, square["num_experts"])
    folder = tmp_path / "checkpoints" / f"{MODEL}-bfloat16"
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)
    Maker(tmp_path, ENGINES).make(cell)
    one = read_cell(tmp_path, False, cell)
    assert one.is_right(1), (one.word, one.causes)
    (summary,) = [read_sealed(path) for path in tmp_path.glob(f"runs/*{cell.fault}*/summary.json")]
    cause = summary["verdict"]["causes"][0]
    assert cause["rule"] in FAULTS[cell.fault].causes
    assert "router" in cause["message"]


@pytest.mark.engines
def test_the_tables_count_what_was_read(readings: dict[str, Reading]) -> None:
    absent = Cell(MODEL, "bfloat16", 0, "shared-expert", TRANSFORMERS, absent="none")
    found = tables([*readings.values(), Reading(absent)])
    shares = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in found["shares"].splitlines()[2:]}
    assert shares["any fault"].startswith("3 of 3 (100 %")
    assert shares["a healthy pair"].startswith("1 of 1 (100 %")
    assert "absent" in found["matrix"]
    assert len(found["misses"].splitlines()) == 2


def test_a_fault_that_none_of_three_causes_explains_is_a_miss() -> None:
    cell = Cell(MODEL, "bfloat16", 0, "attention-scale", TRANSFORMERS)
    causes = ("D12-router", "rounds-worse", "D13-near-ties", "D17-attention-scale")
    assert not Reading(cell, causes=causes).is_right(3)
    assert Reading(cell, causes=causes[1:]).is_right(3)
    assert not Reading(cell, causes=causes[1:]).is_right(1)


def test_a_warning_about_a_healthy_pair_is_a_false_alarm() -> None:
    cell = Cell(MODEL, "bfloat16", 0)
    assert cell.fault == CLEAN
    assert Reading(cell, causes=("D13-near-ties",), tone="good").is_right(1)
    assert not Reading(cell, causes=("rounds-worse",), serious=("rounds-worse",), tone="good").is_right(1)
    assert not Reading(cell, tone="warn").is_right(1)


def test_shares_have_wilsons_interval() -> None:
    """The formula, by hand: 19 of 19 is 83 to 100 %."""
    assert wilson(19, 19) == "19 of 19 (100 %, 95 %: 83 to 100)"
    assert wilson(0, 10) == "0 of 10 (0 %, 95 %: 0 to 28)"
    assert wilson(0, 0) == "-"


def test_no_cell_is_planned_twice_and_each_half_has_its_seeds() -> None:
    cells = [*healthy(), *faulty()]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(healthy()) >= 40
    for half, is_quoted in ((TUNING, False), (QUOTED, True)):
        for model in half:
            some = [cell for cell in faulty() if cell.model == model]
            assert len({cell.fault for cell in some}) == len(FAULTS)
            assert {cell.is_quoted for cell in some} == {is_quoted}
