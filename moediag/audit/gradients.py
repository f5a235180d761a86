"""The gradient audit: which off-policy correction points the update the right way on this run's mismatch.

An engine process of its own gives inner products of gradients (``grams.safetensors``), of which frames are made without
an engine. Unlike the other engines this one sees :mod:`moediag.corrections`: the weights of
tokens decide which directions are differentiated at all.

Definitions (entry ``words`` of RUN/gradients/summary.json):
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
from pathlib import Path
from typing import Any, Final

import pandas as pd
import safetensors.numpy

from moediag.analysis.gradients import LM_HEAD, SPECS, audit_frames
from moediag.corrections.sources import ADVANTAGE_WORDS, REWARD_WORDS
from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.launch import TRAIN_ENVIRONMENT, Engines, Job, OnEvent
from moediag.engines.process import Held, Reporter
from moediag.engines.versions import require_train_engine
from moediag.errors import CheckpointError, CorruptRunError, EngineError, IncompleteRunError, RunConflictError
from moediag.folder import SUMMARY, made_whole, read_frames, write_frames
from moediag.notation import INFER, SCHEMA_VERSION, TRAIN
from moediag.run import claims
from moediag.run.capture import WHOLE
from moediag.run.derived import GRADIENTS, GRAMS, captures_digest, settle_derived
from moediag.run.files import digest_of, read_checked, read_sealed, write_sealed
from moediag.run.reader import Run
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
"""Corrections audited unless others are requested: every family once, with the preset of its source."""

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

KIND: Final = "moediag gradient audit"
RECORD: Final = "record.json"
"""What the engine process leaves for the parent: what it audited and how."""


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
        """Return self when it can be requested.

        Raises:
            EngineError: an unknown group, or no method.
            MoediagError: an unknown correction.
        """
        from moediag.corrections import parse_correction

        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown or not self.groups or not self.methods:
            raise EngineError(f"a gradient audit needs methods, and groups of {', '.join(GROUPS)}; found {unknown}")
        methods = ("none", *(str(parse_correction(method)) for method in self.methods))
        return GradientRequest(**{**asdict(self), "methods": tuple(dict.fromkeys(methods)), "groups": self.groups})


def run_gradient_audit(run: Run, checkpoint: Checkpoint, request: GradientRequest, on_event: OnEvent) -> None:
    """Audit the run's corrections in an engine process of its own; frames and summary.json land in RUN/gradients.

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
    expected, found = scored and scored.weights_sha256, checkpoint.digests["weights_sha256"]
    if expected and expected != found:
        raise CheckpointError(
            f"{checkpoint.path} holds other weights (sha256 {found[:12]}) than {run.path} was captured with "
            f"({str(expected)[:12]}); give the checkpoint of the run"
        )
    captures = captures_digest(run, (request.train, request.infer))
    with claims.claim(run.path / CLAIMS / "gradients") as is_mine:
        if not is_mine:
            raise RunConflictError(f"{run.path} is being audited by another process; wait for it")
        if is_audited(run, request):
            on_event({"stage": "the audit of these arms is there already"})
            return
        with made_whole(run.path / GRADIENTS) as folder:
            options = {"request": asdict(request), "checkpoint": str(checkpoint.path), "folder": str(folder)}
            log = run.path / "logs" / "gradients.log"
            task = "moediag.audit.gradients:audit"
            job = Job("gradients", task, str(run.path), asdict(WHOLE), options, str(log))
            with Engines() as engines:
                engines.do(job, TRAIN_ENVIRONMENT, on_event)
            seal_audit(folder, captures)


def seal_audit(folder: Path, captures: dict[str, str]) -> None:
    """Make frames and summary.json from what the engine process left in a folder.

    Args:
        captures: :func:`~moediag.run.derived.captures_digest` of both arms.
    """
    record = read_sealed(folder / RECORD)
    arrays = safetensors.numpy.load(read_checked(folder / GRAMS, record["grams_sha256"]))
    frames = write_frames(folder, audit_frames(record, arrays))
    content = {**record, "schema_version": SCHEMA_VERSION, "kind": KIND, "captures": captures, "frames": frames}
    write_sealed(folder / SUMMARY, content)
    (folder / RECORD).unlink()


def load_audit(run: Run) -> dict[str, pd.DataFrame]:
    """The frames of a run's gradient audit, of the arms as they are now.

    Raises:
        IncompleteRunError: never audited, or the arms have changed since.
        CorruptRunError: not what the audit wrote.
    """
    record, again = load_record(run), _again(run)
    try:
        request, frames = record["request"], {spec.name: record["frames"][spec.name] for spec in SPECS}
        arms = request["train"], request["infer"]
    except (KeyError, TypeError) as error:
        raise CorruptRunError(f"{run.path / GRADIENTS} is not what this moediag writes ({error}); {again}") from None
    if record.get("captures") != captures_digest(run, arms):
        raise IncompleteRunError(f"{run.path}: its arms have changed since the gradient audit; {again}")
    return read_frames(run.path / GRADIENTS, frames, again)


def load_record(run: Run) -> dict[str, Any]:
    """What was audited and how: request, engine, groups left out with their reasons, facts and words.

    Raises:
        IncompleteRunError: the run was never audited.
        CorruptRunError: the record was changed after it was written.
    """
    settle_derived(run.path)
    if not (run.path / GRADIENTS / SUMMARY).exists():
        raise IncompleteRunError(f"{run.path} has no gradient audit; {_again(run)}")
    return read_sealed(run.path / GRADIENTS / SUMMARY)


def is_audited(run: Run, request: GradientRequest) -> bool:
    """True when an audit of the same request and of the arms as they are now is there, whole."""
    try:
        load_audit(run)
        record = load_record(run)
        read_checked(run.path / GRADIENTS / GRAMS, str(record.get("grams_sha256")))
    except (IncompleteRunError, CorruptRunError):
        return False
    return digest_of(record["request"]) == digest_of(asdict(request))


def _again(run: Run) -> str:
    return f"run: moediag simulate {run.path} --gradient-audit"


def audit(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """The engine process: inner products of gradients of every group, and what was done, to the folder given."""
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
