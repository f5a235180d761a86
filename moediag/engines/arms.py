"""The request of an arm: the engine's options, the path its scores take, how it is observed or perturbed.

Imports no engine. A request is all that makes two captures of an arm the same, and all that an engine process receives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moediag.engines.redaction import redact
from moediag.errors import CaptureError, EngineError
from moediag.run.recipes import DECODE, PREFILL, RECIPES, SAMPLED, SERVER, TEACHER_FORCED, VLLM, change_of, recipe
from moediag.run.records import ArmRecord, Captured, Change, Score

HOOKS, NATIVE, BOTH, UNOBSERVED = "hooks", "native", "both", "none"
AUTO = "auto"
"""The strongest observer that works where the engine runs; replaced by it before an arm is begun."""
OBSERVERS = {
    HOOKS: "hooks on router.select_experts, the model's inputs and the sampler",
    NATIVE: "vLLM's enable_return_routed_experts",
    BOTH: "hooks, and vLLM's enable_return_routed_experts held against them row by row",
    UNOBSERVED: "none: log-probabilities only, as the user's rollouts run",
}


ROUTER_RULES = "router-rules"
ACCEPTABLE = {ROUTER_RULES: "the engines' routers follow different rules"}
"""Findings before anything is sampled that end a capture unless they are accepted."""


def strongest(absent: Mapping[str, str]) -> tuple[str, str]:
    """The strongest observer and why it is that one.

    Args:
        absent: of HOOKS and NATIVE, why it is not to be had here; empty where it is.

    Raises:
        CaptureError: neither is.

    Example:
        >>> strongest({"hooks": "", "native": "no Triton"})
        ('hooks', 'no cross-check against native: no Triton')
    """
    if not absent[HOOKS] and not absent[NATIVE]:
        return BOTH, "hooks and vLLM's own record are here: each row of one is held against the other"
    if not absent[HOOKS]:
        return HOOKS, f"no cross-check against native: {absent[NATIVE]}"
    if not absent[NATIVE]:
        return NATIVE, f"ids only, no hooks: {absent[HOOKS]}"
    raise CaptureError(f"no observer sees vLLM's routing here: hooks: {absent[HOOKS]}; native: {absent[NATIVE]}")


_ASIDE = ("arm", "recipe", "options", "variant_of", "change", "accept", "server", "n_shards")
"""Fields of a request that do not depart from a default, or say nothing of how the arm is made."""


@dataclass(frozen=True)
class Reference:
    """The arm that a recipe's arm repeats or changes: its name, its engine and how it got its scores, if known."""

    name: str
    path: str | None = None
    engine: str | None = None


@dataclass(frozen=True)
class ArmRequest:
    """One arm to capture.

    Args:
        arm: its name.
        recipe: what it is, a key of :data:`~moediag.run.recipes.RECIPES`.
        options: of vLLM or transformers, by their own names.
        observer: how vLLM's routing is seen, a key of :data:`OBSERVERS`, or AUTO until it is chosen.
        path: how the arm gets its scores.
        variant_of, change: as in :class:`~moediag.run.records.ArmRecord`.
        reversed_order: vLLM gets the sequences last to first and at most half of them at a time: other batches.
        replay: routes to force in transformers, see :class:`~moediag.engines.hf.engine.Replay`.
        batching: sequences per forward in transformers, see :class:`~moediag.engines.hf.batching.Batching`.
        perturbation: what is done to transformers' router inputs, see :mod:`moediag.engines.hf.perturbation`.
        accept: a finding that does not end the capture, of :data:`ACCEPTABLE`; not part of what the arm is.
        server: URL of the server that is the engine; not part of what the arm is.
        n_shards: shards of the run that it covers, from the first on; None = all; not part of what the arm is.
    """

    arm: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    observer: str = HOOKS
    path: str = SAMPLED
    variant_of: str | None = None
    change: Change | None = None
    reversed_order: bool = False
    replay: dict[str, Any] | None = None
    batching: dict[str, Any] | None = None
    perturbation: str = ""
    accept: str = ""
    server: str = ""
    n_shards: int | None = None

    @property
    def engine(self) -> str:
        """``vllm``, ``transformers`` or ``server``."""
        return RECIPES[self.recipe].engine

    def unusual(self) -> dict[str, Any]:
        """What departs from the default, engine options aside."""
        default = {"path": TEACHER_FORCED} if RECIPES[self.recipe].path == TEACHER_FORCED else {}
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in _ASIDE and getattr(self, f.name) != default.get(f.name, f.default)
        }

    def configuration(self) -> dict[str, Any]:
        """What makes two captures of an arm the same; secrets and home paths are hidden."""
        return dict(redact({**self.options, **self.unusual()}))

    def record(
        self,
        checkpoint: str,
        configuration: dict[str, Any],
        facts: dict[str, Any],
        versions: dict[str, str | None],
        **more: Any,
    ) -> ArmRecord:
        """The arm's record.

        Args:
            checkpoint: digest of what its engine loaded.
            configuration: what was requested (:meth:`configuration` before ``auto`` was replaced).
            facts: what the engine reports of itself, by section.
            more: the record's further fields.
        """
        known = dict(redact(facts))
        environment = known.pop("environment", {})
        origin = Captured(
            recipe=self.recipe,
            configuration=configuration,
            versions=versions,
            environment=environment,
            facts={name: value for name, value in known.items() if value is not None},
        )
        return ArmRecord(
            name=self.arm,
            role=RECIPES[self.recipe].role,
            engine=self.engine,
            path=self.path,  # type: ignore[arg-type]  # pydantic holds it against the literals
            variant_of=self.variant_of,
            change=self.change,
            checkpoint=checkpoint,
            origin=origin,
            # Both engines give the log-softmax of the raw logits in float32, before temperature and truncation.
            score=Score(temperature=1.0, processed=False, dtype="float32"),
            n_shards=self.n_shards,
            **more,
        )


def arm_request(
    name: str,
    options: dict[str, Any],
    given: bool,
    *,
    arm: str | None = None,
    sampler: str = "infer",
    reference: Reference | None = None,
    is_other_checkpoint: bool = False,
    routes: str = "infer",
    observer: str = HOOKS,
    scoring: str = PREFILL,
    batching: dict[str, Any] | None = None,
    replay: dict[str, Any] | None = None,
    accept: str = "",
    server: str = "",
    n_shards: int | None = None,
) -> ArmRequest:
    """What an arm of a recipe is, on a run whose tokens are sampled or given.

    Args:
        name: of the recipe.
        options: of vLLM or transformers, by their own names.
        given: the run's completions were given with its prompts.
        arm: what the arm is called; None = after its recipe.
        sampler: else, the arm that samples them; every other arm scores what it sampled.
        reference: the reference arm of the recipe's role; None = called after its role, of unknown path.
        is_other_checkpoint: the arm loads other weights than the reference arm of its role, which is there already.
        routes: the arm whose experts ``train-replay`` forces.
        scoring: how vLLM scores given completions, ``prefill`` or ``decode``.
        accept: a finding that does not end a capture.
        server: URL of the server that is the engine.
        batching, replay: for the arms that have one; ``train-repeat`` defaults to padded batches of 4.

    Raises:
        RunError: no such recipe.
        EngineError: the recipe samples, and the run has its tokens.
    """
    made, arm = recipe(name), arm or name
    reference = reference or Reference(made.role)
    if made.path is not None:
        path = made.path
    elif arm == sampler and not given and made.samples:
        path = SAMPLED
    elif not made.is_observed:
        how = "given" if given else f"sampled by {sampler}"
        raise EngineError(
            f"{name} samples, and this run's tokens were {how}; begin a run with it, of prompts without completions: "
            f"moediag capture {name} CKPT --prompts FILE -o RUN"
        )
    else:
        path = PREFILL if made.engine == SERVER else scoring if given and made.engine == VLLM else DECODE
    change = "checkpoint" if is_other_checkpoint else change_of(name, path, reference.path, reference.engine)
    return ArmRequest(
        arm,
        name,
        {**options, **made.options},
        observer=NATIVE if made.engine == SERVER else observer if made.is_observed else UNOBSERVED,
        path=path,
        variant_of=reference.name if change else None,
        change=change,
        reversed_order=made.reversed_order,
        replay=(replay or {"source": routes}) if made.change == "replay" else None,
        batching=batching or made.batching if path == TEACHER_FORCED else None,
        perturbation=made.perturbation,
        accept=accept,
        server=server if made.engine == SERVER else "",
        n_shards=n_shards,
    )
