"""What an arm is asked to be: the engine's options, the path its scores take, how it is observed or perturbed.

Imports no engine. A request is all that makes two captures of an arm the same, and all that an engine process is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from moediag.engines.redaction import redact
from moediag.errors import EngineError
from moediag.notation import INFER, INFER_PRODUCTION, PREFILLED, TRAIN, TRAIN_REPLAY, engine_side

HOOKS, NATIVE, BOTH, UNOBSERVED = "hooks", "native", "both", "none"
OBSERVERS = {
    HOOKS: "hooks on router.select_experts, the model's inputs and the sampler",
    NATIVE: "vLLM's enable_return_routed_experts",
    BOTH: "hooks, and vLLM's enable_return_routed_experts held against them row by row",
    UNOBSERVED: "none: log-probabilities only, as the user's rollouts run",
}

SAMPLED, PREFILL, DECODE = "sampled", "prefill", "decode"
PATHS = {
    SAMPLED: "decode (sampled)",
    PREFILL: PREFILLED,
    DECODE: "decode (given tokens, forced one by one)",
}


@dataclass(frozen=True)
class ArmRequest:
    """One arm to capture.

    Args:
        arm: its name; the first word says the engine.
        engine: options of vLLM or transformers, by their own names.
        observer: how vLLM's routing is seen, a key of :data:`OBSERVERS`.
        path: how vLLM gets its scores, a key of :data:`PATHS`; ignored by train arms.
        reversed_order: vLLM gets the sequences last to first and at most half of them at a time: other batches.
        replay: routes to force in transformers, see :class:`~moediag.engines.hf_engine.Replay`.
        batching: sequences per forward in transformers, see :class:`~moediag.engines.batching.Batching`.
        perturbation: what is done to transformers' router inputs, see :mod:`moediag.engines.perturbation`.
    """

    arm: str
    engine: dict[str, Any] = field(default_factory=dict)
    observer: str = HOOKS
    path: str = SAMPLED
    reversed_order: bool = False
    replay: dict[str, Any] | None = None
    batching: dict[str, Any] | None = None
    perturbation: str = ""

    @property
    def side(self) -> str:
        """``infer`` or ``train``."""
        return engine_side(self.arm)

    def unusual(self) -> dict[str, Any]:
        """What departs from the default, engine options aside."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("arm", "engine") and getattr(self, f.name) != f.default
        }

    def configuration(self) -> dict[str, Any]:
        """What makes two captures of an arm the same; secrets and home paths are hidden."""
        return dict(redact({**self.engine, **self.unusual()}))


_REPEAT_BATCHING = {"batch_size": 4, "layout": "padded"}
_PERTURBATIONS = {"train-perturbed": "ulp", "train-router-fp32": "router-fp32", "train-router-fp8": "router-fp8"}
_FIXED_PATHS = {"infer-rescore": PREFILL, "infer-redecode": DECODE}


def arm_request(
    arm: str,
    engine: dict[str, Any],
    given: bool,
    *,
    sampler: str = INFER,
    observer: str = HOOKS,
    scoring: str = PREFILL,
    batching: dict[str, Any] | None = None,
    replay: dict[str, Any] | None = None,
) -> ArmRequest:
    """What an arm of this name is, on a run whose tokens are sampled or given.

    Args:
        engine: options of vLLM or transformers, by their own names.
        given: the run's completions were given with its prompts.
        sampler: else, the arm that samples them; every other arm scores what it sampled.
        scoring: how vLLM scores given completions, ``prefill`` or ``decode``.
        batching, replay: for the arms that have one; ``train-repeat`` defaults to padded batches of 4.
    """
    if engine_side(arm) == TRAIN:
        return ArmRequest(
            arm,
            {**engine, "dtype": "float32"} if arm == "train-fp32" else engine,
            replay=(replay or {"source": INFER}) if arm == TRAIN_REPLAY else None,
            batching=batching or (_REPEAT_BATCHING if arm == "train-repeat" else None),
            perturbation=_PERTURBATIONS.get(arm, ""),
        )
    if arm == sampler and not given:
        path = SAMPLED
    elif arm == INFER_PRODUCTION:
        how = "given" if given else f"sampled by {sampler}"
        raise EngineError(
            f"{arm} samples, and this run's tokens were {how}; begin a run with it: "
            "moediag capture infer-production CKPT --prompts FILE -o RUN"
        )
    else:
        path = _FIXED_PATHS.get(arm, scoring if given else DECODE)
    return ArmRequest(
        arm,
        engine,
        observer=UNOBSERVED if arm == INFER_PRODUCTION else observer,
        path=path,
        reversed_order=arm == "infer-repeat",
    )
