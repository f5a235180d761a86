"""One engine process for several arms, runs and checkpoints: as few loads as there can be, and the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from moediag.engines.arms import arm_request
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.launch import Engines, fill_arm
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.errors import EngineError
from moediag.run.reader import Run
from moediag.run.writer import RunWriter

pytestmark = pytest.mark.engines

RING = Path(__file__).parent / "fixtures" / "ring-tiny"
VLLM = {"dtype": "bfloat16", "max_model_len": 40}  # less than prompt and max_tokens: the length ends some


@dataclass
class Filled:
    """Runs filled by one set of engines, and the loads that it took."""

    engines: Engines
    loads: list[str] = field(default_factory=list)
    processes: set[int] = field(default_factory=set)

    def fill(self, run: Run, checkpoint: Path, *arms: str, **options: Any) -> None:
        for arm in arms:
            engine = {**(VLLM if arm.startswith("infer") else {"dtype": "bfloat16"}), **options}
            request = arm_request(arm, engine, given=False)
            fill_arm(self.engines, RunWriter(run), open_checkpoint(str(checkpoint)), request, self._on_event)

    def _on_event(self, event: dict[str, Any]) -> None:
        if "stage" in event:
            self.loads.append(event["stage"])
        assert self.engines._child is not None
        self.processes.add(self.engines._child._process.pid)


def new_run(path: Path, checkpoint: Path) -> Run:
    records: list[dict[str, object]] = [{"prompt": "The prompt says" + " so" * n} for n in range(5)]
    prompts = write_jsonl(path.with_suffix(".jsonl"), records)
    plan = make_plan(
        open_checkpoint(str(checkpoint)), prompts, SamplingOptions(max_tokens=16, ignore_eos=True), shard_size=2
    )
    return plan.create(path, force=False)


def bytes_of(run: Run, *arms: str) -> dict[str, bytes]:
    files = [path for arm in arms for path in run.path.glob(f"arms/{arm}/shard-*.safetensors")]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in [*files, *run.path.glob("tokens/*")]}


def test_one_process_serves_arms_and_checkpoints_and_changes_no_byte(random_moe: Path, tmp_path: Path) -> None:
    """Sampling after other paths, other checkpoints and other arms gives what a process of its own gives."""
    one, ring, again, alone = (
        new_run(tmp_path / name, checkpoint)
        for name, checkpoint in (("one", random_moe), ("ring", RING), ("again", random_moe), ("alone", random_moe))
    )
    infer, train = ("infer", "infer-repeat", "infer-rescore", "infer-redecode"), ("train-repeat", "train-perturbed")
    with Engines() as engines:
        shared = Filled(engines)
        shared.fill(one, random_moe, *infer)
        shared.fill(ring, RING, "infer")
        shared.fill(again, random_moe, "infer")
        assert (shared.loads, len(shared.processes)) == (["loading vLLM"] * 3, 1)
        assert max(end - start for start, end in one.tokens(one.shards[-1]).sequence_bounds()) == 40
        shared.fill(one, random_moe, *train, "train-replay", "train")
        shared.fill(one, random_moe, "train-fp32")
        assert (shared.loads[3:], len(shared.processes)) == (["loading transformers"] * 2, 2)
        shared.fill(one, random_moe, *infer, *train)  # complete: nothing is loaded
        assert len(shared.loads) == 5
    for arm in ("infer", "train"):
        with Engines() as engines:
            Filled(engines).fill(alone, random_moe, arm)
    assert bytes_of(one, "infer", "train") == bytes_of(alone, "infer", "train")
    assert bytes_of(one, "infer") == bytes_of(again, "infer")
    for arm in (*infer, *train, "train", "train-fp32"):
        assert (one.path / "logs" / f"{arm}.log").exists()


def test_after_an_error_the_next_arm_gets_a_process_of_its_own(random_moe: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "given.jsonl", [{"prompt": "An import", "completion_token_ids": [1, 2]}])
    run = make_plan(open_checkpoint(str(random_moe)), prompts, SamplingOptions()).create(tmp_path / "run", force=False)
    with Engines() as engines:
        filled = Filled(engines)
        with pytest.raises(EngineError, match="the transformers engine failed: .*no-such.*; see .*logs"):
            filled.fill(run, random_moe, "train", attn_implementation="no-such")
        assert "Traceback" in (run.path / "logs" / "train.log").read_text()
        filled.fill(run, random_moe, "train", "train-repeat")
    assert run.is_complete("train")
    assert (len(filled.loads), len(filled.processes)) == (2, 2)
