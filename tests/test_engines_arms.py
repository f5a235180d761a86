"""What an arm of a name is asked to be; no engine runs here."""

from __future__ import annotations

import pytest

from moediag.engines.arms import DECODE, HOOKS, PREFILL, SAMPLED, UNOBSERVED, arm_request
from moediag.engines.launch import infer_environment, infer_options, observable
from moediag.errors import EngineError
from moediag.notation import ARMS, INFER_PRODUCTION


def test_every_declared_arm_can_be_asked_for() -> None:
    for arm in ARMS:
        sampler = arm if arm == INFER_PRODUCTION else "infer"
        request = arm_request(arm, {"dtype": "bfloat16"}, given=False, sampler=sampler)
        assert request.arm == arm
        assert request.configuration()["dtype"] == ("float32" if arm == "train-fp32" else "bfloat16")


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

    from moediag.engines.perturbation import neighbour, rounded_to_fp8, seed_of

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
