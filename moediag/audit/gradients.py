"""The gradient audit: which off-policy correction points the update the right way on this run's mismatch.

An engine process of its own gives inner products of gradients (``grams.safetensors``); frames are made of these, and
can be made again, without an engine. Unlike the other engines this one sees :mod:`moediag.corrections`: the weights of
tokens decide which directions are differentiated at all.

Definitions (entry ``words`` of audit.json):
    - gradient of a method: mean over sequences of (1 / len) sum_t w_t A grad log pi_train(y_t), the policy-gradient
      term of IcePop's objective at theta = theta_old, in the train arm's dtype and options;
    - reference ``sequence_is``: w = the full product ratio of the sequence. Right in expectation; in a batch it answers
      nothing unless its effective sample size and its signal to noise, which stand beside it, can carry an answer;
      ``sequence_is_normalised`` divides by its mean;
    - reference ``exact`` (lm_head, where infer's full distributions were captured): the expected one-token gradient
      over infer's prefixes, summed: at every prefix that of train's own expected reward of the next token, without any
      sampling of the token. Not the gradient of the sequence's expected reward: prefixes stay as infer visits them.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from moediag.analysis.gradients import LM_HEAD, captures_digest, is_audited, write_audit
from moediag.corrections.rewards import ADVANTAGE_WORDS, REWARD_WORDS
from moediag.engines import channel
from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.fill import Held
from moediag.engines.launch import TRAIN_ENVIRONMENT
from moediag.engines.versions import require_train_engine
from moediag.errors import CheckpointError, EngineError, RunConflictError
from moediag.notation import INFER, TRAIN
from moediag.run import claims
from moediag.run.reader import Run
from moediag.run.shards import WHOLE
from moediag.run.writer import CLAIMS, RunWriter

GROUPS: Final = (LM_HEAD, "routers", "experts", "attention")
METHODS: Final = (
    "none",
    "tis_token:cap=2",
    "tis_sequence:cap=2",
    "icepop:alpha=0.5,beta=5",
    "icepop:alpha=0.5,beta=2",
    "icepop_hard:alpha=0.5,beta=5",
    "mis_token:cap=2",
    "mis_sequence:cap=2",
    "kpop:phi=0.1",
    "ipo:eps=0.1",
    "dppo_tv",
    "dppo_kl",
    "sequence_band:low=0.5,high=2",
)
"""Corrections audited unless others are asked for: every family once, with the preset of its source."""

WORDS: Final = {
    "reward": REWARD_WORDS,
    "advantage": ADVANTAGE_WORDS,
    "gradient": "mean over sequences of (1 / len) sum_t w_t A grad log pi_train(y_t), len = scored response tokens",
    "sequence_is": "w = product of ratios over the sequence (log clamped to +-20); right in expectation, see its ess",
    "exact": (
        "expected one-token gradient over infer's prefixes, summed: grad of train's expected reward of the next token; "
        "methods in expectation over infer's distribution, baseline infer's expected reward; prefixes as infer visits "
        "them, so not the gradient of the sequence's expected reward"
    ),
    "lm_head": "the head's part only, where the matrix is tied to the embeddings",
    "why_text": "advantages that do not depend on the text have no expected gradient: they would show noise only",
}
"""What the numbers mean, kept with them."""

OnEvent = channel.OnEvent


@dataclass(frozen=True)
class GradientRequest:
    """What to audit.

    Args:
        methods: corrections in words, see :func:`~moediag.corrections.parse_correction`.
        groups: parameter groups, of :data:`GROUPS`; those that the model does not have are left out and named.
        train, infer: the pair of arms.
        n_sequences: audit the first so many sequences only; None = all.
        max_bytes: memory for gradients held at a time; less costs more passes over the sequences. A pass is a forward
            of every sequence and two or three backwards (one per direction that its methods differ in).
        max_passes: groups that would take more are left out and named.
        engine: transformers options over those of the train arm, by their own names.
    """

    methods: tuple[str, ...] = METHODS
    groups: tuple[str, ...] = GROUPS
    train: str = TRAIN
    infer: str = INFER
    n_sequences: int | None = None
    max_bytes: int = 1 << 31
    max_passes: int = 8
    engine: dict[str, Any] = field(default_factory=dict)

    def check(self) -> GradientRequest:
        """Return self when it can be asked for.

        Raises:
            EngineError: an unknown group, or no method.
            MoediagError: an unknown correction.
        """
        from moediag.corrections import parse_correction

        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown or not self.groups or not self.methods:
            raise EngineError(f"a gradient audit wants methods, and groups of {', '.join(GROUPS)}; found {unknown}")
        methods = ("none", *(str(parse_correction(method)) for method in self.methods))
        return GradientRequest(**{**asdict(self), "methods": tuple(dict.fromkeys(methods)), "groups": self.groups})


def run_gradient_audit(run: Run, checkpoint: Checkpoint, request: GradientRequest, on_event: OnEvent) -> None:
    """Audit the run's corrections in an engine process of its own; frames and audit.json land in RUN/gradients.

    An audit that is there already, of the same request and arms, is left as it is.

    Args:
        checkpoint: the weights that the train arm scored with.
        on_event: told the progress.

    Raises:
        CheckpointError: other weights than the run's.
        IncompleteRunError: an arm or shard is missing.
        RunConflictError: another process audits this run.
        MoediagError: what the engine process raised.
    """
    require_train_engine()
    request = request.check()
    run.pair(request.train, request.infer)
    scored = run.checkpoint_of(request.train)
    wanted, found = scored and scored.weights_sha256, checkpoint.digests["weights_sha256"]
    if wanted and wanted != found:
        raise CheckpointError(
            f"{checkpoint.path} holds other weights (sha256 {found[:12]}) than {run.path} was captured with "
            f"({str(wanted)[:12]}); give the checkpoint of the run"
        )
    told = {"request": asdict(request), "captures": captures_digest(run, request.train, request.infer)}
    with claims.claim(run.path / CLAIMS / "gradients") as is_mine:
        if not is_mine:
            raise RunConflictError(f"{run.path} is being audited by another process; wait for it")
        if is_audited(run, told):
            on_event({"stage": "the audit of these arms is there already"})
            return
        options = {**told, "checkpoint": str(checkpoint.path)}
        log = run.path / "logs" / "gradients.log"
        job = channel.Job("gradients", "moediag.audit.gradients:audit", str(run.path), asdict(WHOLE), options, str(log))
        with channel.Engines() as engines:
            engines.do(job, TRAIN_ENVIRONMENT, on_event)
        write_audit(run)


def audit(writer: RunWriter, options: dict[str, Any], reporter: channel.Reporter, held: Held) -> None:
    """The engine process: inner products of gradients of every group, and what was done, to RUN/gradients."""
    from moediag.audit.engine import GradientEngine

    given = {**options["request"]}
    request = GradientRequest(**{**given, "methods": tuple(given["methods"]), "groups": tuple(given["groups"])})
    started = time.monotonic()
    engine = GradientEngine(writer.run, options["checkpoint"], request, reporter, held)
    engine.measure()
    engine.write(options, round(time.monotonic() - started, 1))


def train_arm_options(run: Run, request: GradientRequest) -> dict[str, Any]:
    """transformers options that the train arm was captured with, and those of the request over them.

    Raises:
        EngineError: the arm was imported, replayed or perturbed, so its log-probabilities are not the plain model's.
    """
    captured = run.arm(request.train).captured
    if captured is None:
        raise EngineError(f"arm {request.train} was imported: no engine here can take its gradients")
    configuration = captured.configuration
    own = {f.name for f in fields(ArmRequest)}
    unusual = {name: value for name, value in configuration.items() if name in own and name != "batching"}
    if any(unusual.values()):
        raise EngineError(
            f"arm {request.train} was captured with {', '.join(unusual)}: its gradients are not those of the plain "
            "model; audit the pair of another train arm"
        )
    return {**{name: value for name, value in configuration.items() if name not in own}, **request.engine}
