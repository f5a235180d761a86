"""What an arm of a recipe is asked to be; no engine runs here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import make_scripted_run

from moediag.engines.arms import BOTH, HOOKS, NATIVE, UNOBSERVED, Reference, arm_request, strongest
from moediag.engines.hf.engine import Replay, capture_train
from moediag.engines.process import Held, Reporter
from moediag.engines.vllm.options import infer_environment, infer_options, observable
from moediag.errors import CaptureError, EngineError
from moediag.run.capture import Capture
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.recipes import DECODE, PREFILL, RECIPES, SAMPLED
from moediag.run.writer import RunWriter

INFER_PRODUCTION = "infer-production"


def test_every_recipe_can_be_asked_for() -> None:
    for arm in RECIPES:
        sampler = arm if arm == INFER_PRODUCTION else "infer"
        request = arm_request(arm, {"dtype": "bfloat16"}, given=False, sampler=sampler)
        assert request.arm == arm
        is_float32 = arm == "reference" or ("-fp32" in arm and "router" not in arm)
        assert request.configuration()["dtype"] == ("float32" if is_float32 else "bfloat16")


@pytest.mark.parametrize(
    ("arm", "given", "sampler", "path"),
    [
        ("infer", False, "infer", SAMPLED),
        ("infer", True, "infer", PREFILL),
        ("infer", False, INFER_PRODUCTION, DECODE),  # the rollouts' tokens again, observed
        (INFER_PRODUCTION, False, INFER_PRODUCTION, SAMPLED),
        ("infer-rescore", False, "infer", PREFILL),
        ("infer-redecode", True, "infer", DECODE),
        ("infer-repeat", False, "infer", DECODE),
        ("infer-repeat", True, "infer", PREFILL),
    ],
)
def test_the_path_follows_from_who_sampled(arm: str, given: bool, sampler: str, path: str) -> None:
    request = arm_request(arm, {}, given, sampler=sampler)
    assert request.path == path
    assert request.reversed_order == (arm == "infer-repeat")
    assert request.observer == (UNOBSERVED if arm == INFER_PRODUCTION else HOOKS)


@pytest.mark.parametrize("given", [True, False])
def test_rollouts_cannot_join_a_run_that_has_its_tokens(given: bool) -> None:
    with pytest.raises(EngineError, match="begin a run with it"):
        arm_request(INFER_PRODUCTION, {}, given)


def test_only_what_departs_from_the_default_is_part_of_a_configuration() -> None:
    assert arm_request("infer", {"seed": 1}, False).configuration() == {"seed": 1}
    assert arm_request("train-repeat", {}, False).configuration() == {"batching": {"batch_size": 4, "layout": "padded"}}
    assert arm_request("train-perturbed", {}, False).configuration() == {"perturbation": "ulp"}


def test_the_strongest_observer_is_the_one_that_can_be_checked() -> None:
    """By why hooks and vLLM's own record are not to be had: monolithic kernels hide from hooks, CPUs have no Triton."""
    chosen = {(hooks, native): strongest({HOOKS: hooks, NATIVE: native}) for hooks in ("", "monolithic")
              for native in ("", "no Triton") if not (hooks and native)}  # fmt: skip
    assert {given: observer for given, (observer, _) in chosen.items()} == {
        ("", ""): BOTH, ("", "no Triton"): HOOKS, ("monolithic", ""): NATIVE,
    }  # fmt: skip
    assert all(reason in why for given, (_, why) in chosen.items() for reason in given)
    with pytest.raises(CaptureError, match="hooks: monolithic; native: no Triton"):
        strongest({HOOKS: "monolithic", NATIVE: "no Triton"})


def test_unobserved_rollouts_may_have_what_hooks_may_not() -> None:
    options = {"enable_prefix_caching": True, "block_size": 32}
    with pytest.raises(EngineError, match="prefix cache"):
        infer_options(options)
    assert infer_options(options, UNOBSERVED) == options
    assert observable(options) == {"block_size": 32}
    assert "TORCHDYNAMO_DISABLE" in infer_environment(HOOKS)
    assert "TORCHDYNAMO_DISABLE" not in infer_environment(UNOBSERVED)


def test_one_ulp_noise_moves_every_value_to_a_neighbour_and_the_same_seed_moves_it_alike() -> None:
    import torch

    from moediag.engines.hf.perturbation import neighbour, rounded_to_fp8
    from moediag.engines.process import seed_of

    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    moved, again = (neighbour(values, torch.Generator().manual_seed(seed_of("a"))) for _ in range(2))
    assert torch.equal(moved, again)
    assert bool((moved != values).all())
    for towards in (torch.inf, -torch.inf):
        back = torch.nextafter(moved, torch.full_like(moved, towards))
        assert bool((back == values).any())
    assert float((moved - values).abs().max() / values.abs().max()) <= torch.finfo(torch.bfloat16).eps
    rounded = rounded_to_fp8(values)
    assert 0 < float((rounded - values).abs().max()) <= float(values.abs().max()) / 16  # e4m3: 3 bits of mantissa


@pytest.mark.parametrize(
    ("recipe", "path", "reference", "wanted"),
    [
        ("infer-repeat", SAMPLED, Reference("infer", SAMPLED), ("infer", "repeat")),
        ("infer-rescore", SAMPLED, Reference("infer", SAMPLED), ("infer", "path")),
        ("infer-rescore", PREFILL, Reference("infer", PREFILL), ("infer", "repeat")),  # the same path once more
        ("infer-redecode", PREFILL, Reference("infer", PREFILL), ("infer", "path")),
        ("infer-redecode", SAMPLED, Reference("infer", SAMPLED), ("infer", "repeat")),
        ("train-fp32", SAMPLED, Reference("mine"), ("mine", "dtype")),
        ("train", SAMPLED, Reference("train"), (None, None)),
    ],
)
def test_an_arm_says_what_it_changes_and_of_which(
    recipe: str, path: str, reference: Reference, wanted: tuple[str | None, str | None]
) -> None:
    request = arm_request(recipe, {}, given=path == PREFILL, reference=reference)
    assert (request.variant_of, request.change) == wanted
    named = arm_request(recipe, {}, given=path == PREFILL, reference=reference, arm="of my own")
    assert (named.arm, named.recipe, named.configuration()) == ("of my own", recipe, request.configuration())


def test_an_arm_of_other_weights_is_a_variant_of_the_reference_arm() -> None:
    request = arm_request(
        "infer", {}, given=False, arm="quantised", reference=Reference("infer"), is_other_checkpoint=True
    )
    assert (request.variant_of, request.change, request.path) == ("infer", "checkpoint", DECODE)


def _replayed(run: Run) -> str:
    """What a train-replay arm that forces gate weights is told, before any model is loaded."""
    request = asdict(arm_request("train-replay", {}, given=False, replay={"source": "infer", "weights": True}))
    told = {
        "folder": str(run.path / "logs"),
        "checkpoint": "",
        "routing": None,
        "request": request,
        "configuration": {},
    }
    with pytest.raises(Exception, match=".") as raised:
        capture_train(RunWriter(open_run(run.path)), told, Silent(), Held())
    return str(raised.value)


class Silent(Reporter):
    """The reporter of a process without a parent."""

    def __init__(self) -> None:
        self._last = 0.0

    def _send(self, event: dict[str, Any]) -> None: ...


def test_gate_weights_that_are_no_coefficients_are_not_forced(tmp_path: Path) -> None:
    """Arms of earlier versions lack vLLM's factor of the experts' sum; arms of ids only have no gate weights."""
    run = make_scripted_run(tmp_path / "run")
    (run.path / "logs").mkdir()  # a folder without a checkpoint
    assert "does not say on what scale its gate weights are" in _replayed(run)
    path = run.path / "arms/infer/arm.json"
    write_sealed(path, {**read_sealed(path), "gate_weights": "effective"})
    assert str(run.path / "logs") in _replayed(run)  # nothing to object to: on to the model
    write_sealed(path, {**read_sealed(path), "arrays": ["logp_T", "entropy_T", "expert_ids_TLK"]})
    for shard in run.shards:
        whole = run.capture("infer", shard)
        ids_only = Capture(whole.logp_T, whole.entropy_T, whole.expert_ids_TLK)
        RunWriter(run).write_capture("infer", shard, run.tokens(shard), ids_only, {}, {})
    assert "kept expert ids only" in _replayed(run)


def test_routes_of_an_arm_of_ids_only_are_forced_without_weights(tmp_path: Path) -> None:
    """Bug: replay of an --ids-only run ended in an assertion about the gate weights that nobody had requested."""
    run = make_scripted_run(tmp_path / "run")
    whole = run.capture("infer", run.shards[0])
    routes = Replay("infer").routes(Capture(whole.logp_T, whole.entropy_T, whole.expert_ids_TLK), 0, 3)
    assert routes.weights_TLK is None
    assert routes.ids_TLK.tolist() == whole.expert_ids_TLK[:3].tolist()  # type: ignore[index]
