"""Validation of a run directory: every file whole, every arm complete, every row what the rules allow.

Returns findings, not an exception at the first one, so that an engineer sees all that is wrong at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moediag.errors import RunError
from moediag.notation import NOT_ROUTED, engine_side
from moediag.run.capture import Capture, TokenRows
from moediag.run.directory import Run, Shard


@dataclass(frozen=True)
class Finding:
    """One thing found: ``level`` is error or note, ``rule`` a stable name, ``where`` arm and shard."""

    level: str
    rule: str
    where: str
    message: str

    def line(self) -> str:
        """The finding as one line."""
        return f"{self.level}: {self.rule}: {self.where}: {self.message}"


def check_run(run: Run, arms: Sequence[str] | None = None) -> list[Finding]:
    """Check every committed shard of the arms; an empty list means nothing to say.

    Missing shards are errors as well: a partial arm is not analysed.

    Args:
        arms: the arms to check; None = all.
    """
    findings = _check_prompts(run)
    findings += [finding for shard in run.shards for finding in _check_tokens(run, shard)]
    for arm in run.arms() if arms is None else arms:
        findings += _check_arm(run, arm)
    if not run.arms():
        findings.append(Finding("error", "no-arm", str(run.path), "no arm has been captured"))
    return findings


def _check_prompts(run: Run) -> list[Finding]:
    try:
        run.prompts()
    except RunError as error:
        return [Finding("error", "damaged", "prompts", str(error))]
    return []


def _check_tokens(run: Run, shard: Shard) -> Iterator[Finding]:
    if not run.has_tokens(shard):
        yield Finding("error", "missing-shard", f"tokens {shard.stem}", "token table not written yet")
        return
    try:
        run.tokens(shard)
    except RunError as error:
        yield Finding("error", "damaged", f"tokens {shard.stem}", str(error))


def _check_arm(run: Run, arm: str) -> list[Finding]:
    findings: list[Finding] = []
    try:
        told = run.arm(arm).get("disagreements") or []
        findings += [Finding("note", "D14-other-rule", f"{arm} arm.json", disagreement) for disagreement in told]
    except RunError as error:
        findings.append(Finding("error", "damaged", f"{arm} arm.json", str(error)))
    for shard in run.shards:
        where = f"{arm} {shard.stem}"
        if not run.has_capture(arm, shard):
            findings.append(Finding("error", "missing-shard", where, "not captured yet; run the capture again"))
            continue
        try:
            if run.capture_sidecar(arm, shard).get("tokens_sha256") != run.tokens_digest(shard):
                findings.append(Finding("error", "token-identity", where, "scored other tokens than the token table"))
            tokens, capture = run.tokens(shard), run.capture(arm, shard)
            findings += check_capture(run, arm, tokens, capture, where)
        except RunError as error:
            findings.append(Finding("error", "damaged", where, str(error)))
    return findings


def check_capture(run: Run, arm: str, tokens: TokenRows, capture: Capture, where: str) -> list[Finding]:
    """Check one shard's arrays against its tokens and the run's routing."""
    if len(capture.logp_T) != len(tokens):
        message = f"{len(capture.logp_T)} rows for {len(tokens)} tokens"
        return [Finding("error", "completeness", where, message)]
    return [*_check_scores(tokens, capture, where), *_check_routing(run, arm, tokens, capture, where)]


def _check_scores(tokens: TokenRows, capture: Capture, where: str) -> Iterator[Finding]:
    logp_T = capture.logp_T[tokens.is_response_T]
    n_unscored = int(np.isnan(logp_T).sum())
    if n_unscored:
        yield Finding("error", "D31-nan-logp", where, f"{n_unscored} of {len(logp_T)} response tokens have no logp")
    n_impossible = int(np.isneginf(logp_T).sum() + (logp_T > 0).sum())
    if n_impossible:
        yield Finding("error", "D31-impossible-logp", where, f"{n_impossible} logps are -inf or above 0")


def _check_routing(run: Run, arm: str, tokens: TokenRows, capture: Capture, where: str) -> Iterator[Finding]:
    ids_TLK = capture.expert_ids_TLK
    if (ids_TLK is not None) != bool(run.decoder_layers):
        yield Finding("error", "completeness", where, "expert ids and the model's routing do not belong together")
        return
    if ids_TLK is None:
        return
    routing = run.model["routing"]
    wanted = (len(run.decoder_layers), routing["top_k"])
    if ids_TLK.shape[1:] != wanted:
        yield Finding("error", "completeness", where, f"expert ids are (L, K) = {ids_TLK.shape[1:]}, wanted {wanted}")
        return
    if ids_TLK.max(initial=NOT_ROUTED) >= run.n_experts:
        yield Finding("error", "D03-id-range", where, f"an expert id >= E = {run.n_experts}")
    missing_T = (ids_TLK == NOT_ROUTED).any(axis=(1, 2))
    allowed_T = _rows_without_routing(arm, tokens)
    n_missing = int((missing_T & ~allowed_T).sum())
    if n_missing:
        first = int(np.flatnonzero(missing_T & ~allowed_T)[0])
        place = f"sequence {tokens.seq_id_T[first]} position {tokens.position_T[first]}"
        yield Finding("error", "completeness", where, f"{n_missing} rows lack expert ids, first: {place}")
    sorted_TLK = np.sort(ids_TLK[~missing_T], axis=2)
    n_duplicates = int((sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(axis=2).sum())
    if n_duplicates:
        yield Finding("error", "D03-duplicate-ids", where, f"{n_duplicates} (token, layer) name an expert twice")


def _rows_without_routing(arm: str, tokens: TokenRows) -> np.ndarray:
    """Rows that may lack routing: the last token of a sequence in an infer arm is never consumed (D06)."""
    allowed_T = np.zeros(len(tokens), dtype=bool)
    if engine_side(arm) == "infer":
        allowed_T[[end - 1 for _, end in tokens.sequence_bounds()]] = True
    return allowed_T
