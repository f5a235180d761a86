"""What reports/trainers.md says to paste: it parses, calls what there is, and runs on batches laid out as theirs."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moediag import Watch
from moediag.watch import STEPS, Seen
from tests.test_watch import batch

PAGE = Path(__file__).parents[1] / "reports" / "trainers.md"
FRAMEWORKS = ("verl", "slime", "prime-rl", "NeMo-RL", "OpenRLHF", "SkyRL", "AReaL", "TRL")
CALLED = {"Watch": Watch, "step": Watch.step, "part": Watch.part, "step_of": Watch.step_of, "scalars": Seen.scalars}


def snippets(heading: str) -> list[str]:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def theirs() -> dict[str, torch.Tensor]:
    """(B, T) tensors with the padding on the right, advantages at every token, the longest without padding."""
    one = batch(11)
    width = int(one["mask"].sum(1).max())
    tensors = {name: torch.tensor(one[name][:, :width]) for name in ("logp_train", "logp_infer", "mask", "entropy")}
    tensors["advantages"] = torch.tensor(one["advantages"])[:, None].repeat(1, width)
    return {**tensors, "prompts": torch.tensor(one["prompt_ids"])}


def cut(one: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """A tensor per response, without padding."""
    return [row[:n] for row, n in zip(one[name], one["mask"].sum(1).tolist(), strict=True)]


def modules(monkeypatch: pytest.MonkeyPatch, **of: dict[str, Any]) -> None:
    """Modules of packages that are not installed here, with the names a snippet imports."""
    for name, values in of.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class Pasted:
    """The snippets of a framework, run one after the other beside what its code has there."""

    def __init__(self, heading: str) -> None:
        self.names: dict[str, Any] = {}
        self.left = [*snippets("Once"), *snippets(heading)]
        self.go()

    def go(self, /, **names: Any) -> None:
        self.names |= names
        exec(compile(self.left.pop(0), str(PAGE), "exec"), self.names)


def check(logged: dict[str, float], step: int, one: dict[str, torch.Tensor], n_prompts: int = 12) -> None:
    """The logger got what Watch says of the same tokens, and the table its row."""
    given = [one[name] for name in ("logp_train", "logp_infer", "mask")]
    expected = Watch().step(0, *given, prompt_ids=one["prompts"], advantages=one["advantages"])
    for name, value in expected.scalars("mismatch/").items():
        assert logged[name] == pytest.approx(value), name
    row = json.loads(Path("runs/mismatch", STEPS).read_text())
    assert (row["step"], row["n_tokens"], row["n_prompts"]) == (step, expected.n_tokens, n_prompts)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_framework_has_a_row_and_a_snippet() -> None:
    assert re.findall(r"^\| \[(.*?)\]", PAGE.read_text(), re.MULTILINE) == list(FRAMEWORKS)
    assert all(snippets(name) for name in FRAMEWORKS)


@pytest.mark.parametrize("heading", ["Once", *FRAMEWORKS])
def test_snippets_call_what_there_is_with_arguments_that_exist(heading: str) -> None:
    n_calls = 0
    for code in snippets(heading):
        for node in ast.walk(ast.parse(code)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLED):
                continue
            signature = inspect.signature(CALLED[node.func.attr])
            is_method = "self" in signature.parameters
            names = {word.arg: None for word in node.keywords if word.arg}
            bound = signature.bind(*[None] * (len(node.args) + is_method), **names)
            known = {*inspect.signature(Watch.part).parameters}
            assert {*bound.arguments.get("more", {})} <= known
            n_calls += 1
    assert n_calls >= 1


def test_verl() -> None:
    one = theirs()
    data = SimpleNamespace(
        batch={"old_log_probs": one["logp_train"], "rollout_log_probs": one["logp_infer"],
               "advantages": one["advantages"], "entropy": one["entropy"]},
        non_tensor_batch={"uid": [f"uid-{prompt}" for prompt in one["prompts"].tolist()]},
    )  # fmt: skip
    nested = torch.nested.nested_tensor([row.long() for row in cut(one, "mask")], layout=torch.jagged)
    pasted, metrics = Pasted("verl"), {}
    trainer = SimpleNamespace(global_steps=5)
    pasted.go(data=data, response_mask=nested, bypass_recomputing_logprobs=False, self=trainer, metrics=metrics)
    check(metrics, 5, one)


def test_slime(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> None:
    one, logged = theirs(), {}
    mpu = SimpleNamespace(
        is_pipeline_last_stage=lambda: True,
        get_tensor_model_parallel_rank=lambda: 0,
        get_context_parallel_rank=lambda: 0,
        get_data_parallel_group_gloo=lambda with_context_parallel: dist.group.WORLD,
        get_data_parallel_src_rank=lambda with_context_parallel: 0,
    )
    modules(
        monkeypatch,
        megatron={}, megatron__core={"mpu": mpu}, slime={}, slime__backends={}, slime__backends__megatron_utils={},
        slime__backends__megatron_utils__cp_utils={"all_gather_with_cp": lambda one, total, response: one},
        slime__observability={"logging_utils": SimpleNamespace(log=lambda args, got, step_key: logged.update(got))},
        slime__observability__metric_utils={"compute_rollout_step": lambda args, rollout_id: rollout_id},
    )  # fmt: skip
    lengths = one["mask"].sum(1).tolist()
    rollout_data = {
        "log_probs": cut(one, "logp_train"), "rollout_log_probs": cut(one, "logp_infer"),
        "loss_masks": [row.int() for row in cut(one, "mask")], "advantages": cut(one, "advantages"),
        "response_lengths": lengths, "total_lengths": [n + 7 for n in lengths],
        "sample_indices": list(range(24)),
    }  # fmt: skip
    pasted = Pasted("slime")
    pasted.go()
    args = SimpleNamespace(n_samples_per_prompt=2)
    pasted.names["watch_rollout"](args, 3, rollout_data)
    assert logged.pop("rollout/step") == 3
    assert not any("masked_entropy" in name for name in logged)
    check(logged, 3, one)
    rollout_data["entropy"] = cut(one, "entropy")  # --use-rollout-entropy
    pasted.names["watch_rollout"](args, 4, rollout_data)
    assert any("masked_entropy" in name for name in logged)
    del rollout_data["log_probs"]
    pasted.names["watch_rollout"](args, 5, rollout_data)
    assert len(Path("runs/mismatch", STEPS).read_text().splitlines()) == 2


def test_prime_rl(one_rank: None) -> None:
    """Two packed micro-batches with padding behind the last sequence, and nothing counted in a third."""
    one, logged = theirs(), {}
    pasted = Pasted("prime-rl")
    pasted.go()
    code = pasted.left[0]
    for some in (slice(0, 10), slice(10, 24), slice(0, 2)):
        rows = {name: cut(one, name)[some] for name in ("logp_train", "logp_infer", "mask", "advantages", "entropy")}
        lengths = [len(row) for row in rows["mask"]]
        lengths[-1] += 6
        packed = {name: torch.cat([*row, row[0].new_zeros(6)])[None] for name, row in rows.items()}
        if some == slice(0, 2):
            packed["mask"] = torch.zeros_like(packed["mask"])
        pasted.left.insert(0, code)
        pasted.go(
            out={"logprobs": packed["logp_train"].requires_grad_(), "entropy": packed["entropy"]},
            inference_logprobs=packed["logp_infer"], mismatch_mask=packed["mask"], advantages=packed["advantages"],
            sequence_lengths=lengths,
        )  # fmt: skip
    pasted.left.pop(0)

    async def log(got: dict[str, float], step: int) -> None:
        logged.update(got)

    world = SimpleNamespace(world_size=1, is_master=True)
    pasted.go(world=world, dist=dist, cp_rank=0, progress=SimpleNamespace(step=9), asyncio=asyncio,
              monitors=SimpleNamespace(log=log))  # fmt: skip
    check(logged, 9, one, n_prompts=24)


def test_nemo_rl() -> None:
    """Prompt tokens and a 0 stand in front; a sequence is left out whole."""
    one, logged = theirs(), {}
    front = torch.zeros(24, 5)
    whole = {
        name: torch.cat([front, one[name].float()], 1) for name in ("logp_train", "logp_infer", "mask", "advantages")
    }
    sample_mask = torch.ones(24)
    sample_mask[7] = 0
    train_data = {
        "prev_logprobs": whole["logp_train"], "generation_logprobs": whole["logp_infer"],
        "token_mask": whole["mask"].long(), "sample_mask": sample_mask, "advantages": whole["advantages"],
    }  # fmt: skip
    logger = SimpleNamespace(log_metrics=lambda got, step, prefix: logged.update(got))
    Pasted("NeMo-RL").go(
        skip_prev_logprobs=False, total_steps=1, train_data=train_data, logger=logger,
        repeated_batch={"idx": one["prompts"].tolist()},
    )  # fmt: skip
    one["mask"][7] = False
    check(logged, 2, {**one, "advantages": one["advantages"].float()})


def test_openrlhf() -> None:
    """Experiences of 5 samples or fewer, each as wide as its longest."""
    one, status, pasted = theirs(), {}, Pasted("OpenRLHF")
    experiences = []
    for start in range(0, 24, 5):
        width = int(one["mask"][start : start + 5].sum(1).max())
        some = {name: tensor[start : start + 5, :width] for name, tensor in one.items() if tensor.ndim == 2}
        experiences.append(
            SimpleNamespace(
                action_log_probs=some["logp_train"], rollout_log_probs=some["logp_infer"], action_mask=some["mask"],
                advantages=some["advantages"], prompts=[f"{i}?" for i in one["prompts"][start : start + 5].tolist()],
            )
        )  # fmt: skip
    pasted.go(experiences=experiences)
    pasted.go(status=status, global_step=4)
    check(status, 4, one)


def test_skyrl() -> None:
    """Padded on the left; two rows fill the batch."""
    one = theirs()
    n_B = [*one["mask"].sum(1).tolist(), 0, 0]

    def left(name: str) -> torch.Tensor:
        full = torch.zeros(26, one[name].shape[1])
        for row, values, n in zip(full, one[name], n_B[:24], strict=False):
            row[len(row) - n :] = values[:n]
        return full

    class Batch(dict[str, torch.Tensor]):
        metadata: dict[str, list[str]]

    training_input = Batch(
        action_log_probs=left("logp_train"), rollout_logprobs=left("logp_infer"), loss_mask=left("mask"),
        advantages=left("advantages"),
    )  # fmt: skip
    training_input.metadata = {"uids": [*(f"u{prompt}" for prompt in one["prompts"].tolist()), "pad0", "pad1"]}
    trainer = SimpleNamespace(global_step=2, all_metrics={})
    Pasted("SkyRL").go(training_input=training_input, self=trainer)
    check(trainer.all_metrics, 2, {**one, "advantages": one["advantages"].float()})


def test_areal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary per prompt, its samples padded together; prompt tokens in front, each value at the token before."""
    one, n_prompt = theirs(), 4
    fetched = []

    def localize(batch: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        fetched.append(len(batch))
        return batch

    modules(
        monkeypatch,
        areal={}, areal__infra={}, areal__infra__rpc={},
        areal__infra__rpc__rtensor={"RTensor": SimpleNamespace(localize=localize)},
    )  # fmt: skip

    def rolled(values: torch.Tensor, width: int) -> torch.Tensor:
        whole = torch.zeros(len(values), n_prompt + width)
        whole[:, n_prompt:] = values[:, :width].float()
        return torch.roll(whole, shifts=-1, dims=-1)

    adv_batch = []
    for prompt in range(12):
        some = one["prompts"] == prompt
        width = int(one["mask"][some].sum(1).max())
        names = {"prox_logp": "logp_train", "logprobs": "logp_infer", "loss_mask": "mask", "advantages": "advantages"}
        adv_batch.append({theirs_: rolled(one[ours][some], width) for theirs_, ours in names.items()})
    pasted, trainer, stats = Pasted("AReaL"), SimpleNamespace(), {"loss": 0.1}
    actor = SimpleNamespace(use_decoupled_loss=True, should_compute_prox_logp=lambda: True)
    pasted.go(config=SimpleNamespace(actor=actor), self=trainer, adv_batch=adv_batch, global_step=7)
    pasted.go(stats=stats)
    assert fetched == [12]
    assert stats.pop("loss") == 0.1
    check(stats, 7, {**one, "advantages": one["advantages"].float()})
    pasted = Pasted("AReaL")
    actor.use_decoupled_loss = False  # the engine's log-probabilities were overwritten: nothing to compare
    pasted.go(config=SimpleNamespace(actor=actor), self=(trainer := SimpleNamespace()), adv_batch=[], global_step=8)
    pasted.go(stats=stats)
    assert not hasattr(trainer, "mismatch")


def test_trl() -> None:
    one = theirs()
    made = {
        "old_per_token_logps": one["logp_train"], "sampling_per_token_logps": one["logp_infer"],
        "completion_mask": one["mask"].long(), "advantages": one["advantages"][:, 0],
    }  # fmt: skip

    class Base:
        model = SimpleNamespace(training=True)
        accelerator = SimpleNamespace(is_main_process=True)
        state = SimpleNamespace(global_step=6)

        def __init__(self) -> None:
            self._metrics: dict[str, Any] = {"train": defaultdict(list)}

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return made

    pasted = Pasted("TRL")
    pasted.go()
    trainer = type("Trainer", (pasted.names["WatchedGRPO"], Base), {})()
    inputs = [{"prompt": [{"role": "user", "content": f"{prompt}?"}]} for prompt in one["prompts"].tolist()]
    assert trainer._generate_and_score_completions(inputs) is made
    check({name: value for name, (value,) in trainer._metrics["train"].items()}, 6, one)
