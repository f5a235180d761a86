"""What vLLM loaded, held against config.json: refused where taps would see wrongly, told where rules differ."""

from __future__ import annotations

from typing import Any

from moediag.engines.arms import HOOKS
from moediag.errors import CaptureError, CheckpointError


def refuse_unseen_routing(facts: dict[str, Any], routing: dict[str, Any] | None, observer: str) -> None:
    """Refuse what the taps cannot see, and a model that is not the one config.json describes.

    Args:
        facts: what the worker says of itself.
        routing: the run's ModelRouting as a record; None for a dense model.

    Raises:
        CheckpointError: layers, E, K or bias differ from config.json.
        CaptureError: a kernel or mode that hides which experts were used.
    """
    wanted = list(routing["decoder_layers"]) if routing else []
    if facts["decoder_layers"] != wanted:
        raise CheckpointError(
            f"vLLM's model has MoE routers in decoder layers {facts['decoder_layers']}, config.json says {wanted}"
        )
    if not routing:
        return
    found = (facts["n_experts"], facts["top_k"])
    if found != ([routing["n_experts"]], [routing["top_k"]]):
        raise CheckpointError(
            f"vLLM's routers have (E, K) = {found}, config.json {routing['n_experts'], routing['top_k']}"
        )
    if facts["has_correction_bias"] != routing["has_correction_bias"]:
        raise CheckpointError(
            f"vLLM's routers have {'a' if facts['has_correction_bias'] else 'no'} correction bias, "
            f"the family {routing['family']} {'has one' if routing['has_correction_bias'] else 'has none'}; "
            "check config.json"
        )
    if facts["is_monolithic"] and observer == HOOKS:
        raise CaptureError(
            f"vLLM selected a monolithic MoE kernel ({', '.join(facts['experts_kernel'])}) that never shows "
            "which experts it used; choose a modular one with --vllm-option moe_backend=triton, or --observer native"
        )
    if facts["eplb"]:
        raise CaptureError("expert-parallel load balancing renames experts (physical ids); turn enable_eplb off")


def disagreements(facts: dict[str, Any], routing: dict[str, Any] | None) -> list[str]:
    """Where vLLM's routers follow another rule than config.json: told, not refused, since that is a finding (D14)."""
    rule = facts["router_rule"]
    if not routing or routing["gate"] != "scores":
        return []
    wanted = {"renormalize": routing["renormalize"], "scoring_func": routing["score_function"]}
    if routing["n_group"] > 1:
        wanted |= {"num_expert_group": routing["n_group"], "topk_group": routing["topk_group"]}
    told = [
        f"vLLM's routers have {name} = {rule[name]!r}, config.json says {value!r}"
        for name, value in wanted.items()
        if name in rule and rule[name] != value
    ]
    factors = [rule.get("routed_scaling_factor", 1.0) * scale for scale in facts["scale_after_experts"]]
    if factors != [routing["scaling_factor"]]:
        told.append(f"vLLM scales gate weights by {factors}, config.json says {routing['scaling_factor']!r}")
    return told


def agreed(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 told, once every rank is known to have routed the same rows the same way.

    Raises:
        CaptureError: a step was irregular, or ranks saw different experts.
    """
    told: dict[str, Any] = next(rank for rank in ranks if rank["rank"] == 0)
    for rank in ranks:
        if rank["n_problems"]:
            raise CaptureError(
                f"the taps saw {rank['n_problems']} irregular steps, first: {rank['problems'][0]}; nothing was stored"
            )
        if rank["rows_sha256"] != told["rows_sha256"]:
            raise CaptureError(
                f"tensor-parallel rank {rank['rank']} routed other rows, or to other experts, than rank 0; "
                "nothing was stored"
            )
    return told
