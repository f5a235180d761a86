"""Hygiene of a run or of plain arrays: everything found at once, not an exception at the first.

Invariants: one pass over the shards of every arm in bounded memory (two arms' arrays of one shard, and counts), infer's
once for every further arm; groups of shards are read by any process, and what is counted in them merges; findings
depend neither on the order of sequences nor on where shards or groups end. A second, cheap pass over the token tables
is made only where rows are missing at the beginning of sequences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from moediag.errors import RunError
from moediag.hygiene.buffers import Completeness, Filler, Stale, count_prefixes
from moediag.hygiene.expert_ids import Identifiers, LayerAtChance, LayerLag, RowLag, TwinLayers
from moediag.hygiene.findings import Finding, Tally, by_level, finding
from moediag.hygiene.levels import ConstantOffset, MixedVersions, RegimeChange, StaleSegments
from moediag.hygiene.logps import (
    ContradictedZeros,
    Logps,
    MeanRatio,
    OtherSequence,
    SameBits,
    SequenceLag,
    StoredBits,
    Temperature,
    TokenLag,
)
from moediag.hygiene.router_scores import GateFactor, RouterScores
from moediag.hygiene.rows import Rows, Shape
from moediag.hygiene.rules import (
    BOTH_GATES,
    BOTH_IDS,
    BOTH_LOGPS,
    BOTH_VERSIONS,
    DISTRIBUTIONS,
    ENTROPIES,
    ERROR,
    FILES,
    FOREIGN,
    GATES,
    IDS,
    LOGITS,
    LOGPS,
    MARGINS,
    N_EXPERTS,
    RULES,
    VERSIONS,
    WARNING,
    left_out,
)
from moediag.notation import INFER
from moediag.run.capture import Capture, Shard, TokenRows
from moediag.run.derived import derived_damage
from moediag.run.pieces import Pool, Work, in_pieces
from moediag.run.reader import Run

_DENSE = Shape(0, 0, 0)
_NEUTRAL_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
                     "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
"""What leaves the distribution as the model has it, by vLLM's own names; top_k is 0 or -1 there, and it gives 0."""


@dataclass(frozen=True)
class Inspection:
    """What was found, and by which rules on how much.

    Args:
        findings: errors first.
        has: what was there for the rules (:mod:`moediag.hygiene.rules`).
        n_rows: token rows read, over all arms.
    """

    findings: list[Finding]
    has: frozenset[str]
    n_rows: int

    @property
    def left_out(self) -> dict[str, list[str]]:
        """What was not there -> rules that could not be applied."""
        return left_out(self.has)

    @property
    def n_applied(self) -> int:
        """Rules that were applied; those of the diagnosis never are here."""
        return sum(rule.needs in self.has for rule in RULES.values())

    @property
    def n_rules(self) -> int:
        """Rules that could be applied where everything is there."""
        return self.n_applied + sum(map(len, self.left_out.values()))

    @property
    def n_errors(self) -> int:
        """Findings of level error."""
        return sum(found.level == ERROR for found in self.findings)

    @property
    def n_warnings(self) -> int:
        """Findings of level warning."""
        return sum(found.level == WARNING for found in self.findings)


class _ArmRule(Protocol):
    def add(self, rows: Rows) -> None: ...

    def findings(self, where: str) -> list[Finding]: ...


class _PairRule(Protocol):
    def add(self, train: Rows, infer: Rows) -> None: ...

    def findings(self, where: str) -> list[Finding]: ...


_DAMAGED_NUMBERS = np.errstate(invalid="ignore", over="ignore")
"""A flipped bit makes NaNs that signal and floats that overflow: rules count them, numpy need not warn of them."""


class ArmHygiene(Tally):
    """Every rule about one arm, fed shard by shard; those fed with other shards merge with it."""

    def __init__(self, shape: Shape, is_sampled: bool) -> None:
        rules: list[_ArmRule] = [Logps(), StoredBits(), *([MixedVersions()] if is_sampled else [])]
        if shape.n_layers:
            rules += [Identifiers(shape), Filler(shape), TwinLayers(shape), Stale(shape), RouterScores(shape)]
        self._completeness, self._rules = Completeness(is_sampled), tuple(rules)
        self.n_rows = 0

    @_DAMAGED_NUMBERS
    def add(self, rows: Rows) -> None:
        """Feed a shard's whole sequences."""
        self.n_rows += len(rows)
        if not len(rows):
            return
        if rows.shape.n_layers:
            self._completeness.add(rows)
        for rule in self._rules:
            rule.add(rows)

    @property
    def gap_lengths(self) -> set[int]:
        """Prefix lengths that :meth:`findings` needs counted over all sequences."""
        return self._completeness.gap_lengths

    def findings(self, where: str, prefixes: dict[tuple[int, int], int]) -> list[Finding]:
        """All findings of the arm."""
        found = self._completeness.findings(where, prefixes)
        return found + [item for rule in self._rules for item in rule.findings(where)]


class PairHygiene(Tally):
    """Every rule about two arms of the same tokens, fed shard by shard; those fed with other shards merge with it.

    Args:
        arms: names of train and infer.
        shape: of the routing that *both* have; without layers only log-probabilities are compared.
        is_foreign: whether another tool made the data: then one side may be a copy of the other, and how infer sampled
            is not known.
        has_places: whether sequences and positions are known; without them no rule about them is applied.
    """

    def __init__(self, arms: tuple[str, str], shape: Shape, is_foreign: bool = False, has_places: bool = True) -> None:
        self._shifts: tuple[_PairRule, ...] = (TokenLag(),) if has_places else ()
        of_places: tuple[_PairRule, ...] = (SequenceLag(), OtherSequence()) if has_places else ()
        self._rules: tuple[_PairRule, ...] = (*of_places, Temperature(), ConstantOffset())
        self._zeros = tuple(ContradictedZeros(arm) for arm in arms)
        last_rules: list[_PairRule] = [StaleSegments()] if has_places else []
        last_rules += [SameBits(), MeanRatio()] if is_foreign else []
        last_rules += [RegimeChange()] if is_foreign and has_places else []
        self._last_rules = tuple(last_rules)
        self._routed_rules: tuple[_PairRule, ...] = ()
        if shape.n_layers:
            self._routed_rules = RowLag(shape), LayerLag(shape), LayerAtChance(shape), GateFactor(shape)

    @_DAMAGED_NUMBERS
    def add(self, train: Rows, infer: Rows) -> None:
        """Feed a shard of both arms."""
        self._zeros[0].add(train, infer)
        self._zeros[1].add(infer, train)
        for rule in (*self._shifts, *self._rules, *self._last_rules, *self._routed_rules):
            rule.add(train, infer)

    def findings(self, where: str) -> list[Finding]:
        """All findings of the pair; what a fault already named brings with it is not named again."""
        found = [item for rule in self._shifts for item in rule.findings(where)]
        found = found or [item for rule in self._rules for item in rule.findings(where)]
        found += [item for side in self._zeros for item in side.findings(where)]
        found = found or [item for rule in self._last_rules for item in rule.findings(where)]
        return found + [item for rule in self._routed_rules for item in rule.findings(where)]


def check_run(run: Run, arms: Sequence[str] | None = None) -> list[Finding]:
    """Check every committed shard of the arms; an empty list means nothing to say. See :func:`inspect_run`."""
    return inspect_run(run, arms).findings


def inspect_run(run: Run, arms: Sequence[str] | None = None, workers: int | Pool = 1) -> Inspection:
    """Check files, token tables and every committed shard of the arms, each further arm beside infer as well.

    Missing shards are errors: a partial arm is not analysed.

    Args:
        arms: the arms to check; None = all, and every derived file and log as well: an analysis of some arms is not
            kept from being made by a damaged figure, which it replaces.
        workers: processes that read the shards, here or elsewhere; what is found does not depend on it.
    """
    checks = checks_of(run, run.arms() if arms is None else arms)
    works = [Work(partial(read_check, check=check), partial(join_check, check=check)) for check in checks]
    results: dict[int, Inspection] = dict(in_pieces(run, works, workers))
    parts = [results[at] for at in range(len(checks))]
    found = check_prompts(run) if arms is not None else _check_beside_arms(run)
    if not run.arms():
        found += [item for shard in run.shards for item in _read_tokens(run, shard)[1]]
        found.append(finding("no-arm", str(run.path), "no arm has been captured"))
    found += [item for part in parts for item in part.findings]
    # a token table that is damaged is found with every arm
    found = by_level(list(dict.fromkeys(found)))
    has = frozenset({FILES, N_EXPERTS}.union(*(part.has for part in parts)))
    return Inspection(found, has, sum(part.n_rows for part in parts))


@dataclass(frozen=True)
class Check:
    """What is checked in one reading of the shards.

    Args:
        alone: arms that are checked each by itself.
        beside: an arm that is checked beside the reference arm; None = none is.
        reference: the reference arm.
    """

    alone: tuple[str, ...]
    beside: str | None
    reference: str

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that are read."""
        return self.alone if self.beside is None else tuple(dict.fromkeys([*self.alone, self.beside, self.reference]))

    @property
    def name(self) -> str:
        """What is checked, in words."""
        words = f" beside {self.reference}" if self.beside is not None and self.reference not in self.alone else ""
        return f"{' and '.join(self.alone)} checked{words}"


def checks_of(run: Run, arms: Sequence[str]) -> list[Check]:
    """Every arm alone, and every further arm beside infer: infer is read together with the first of them."""
    reference = run.reference(INFER)
    others = [arm for arm in arms if arm != reference]
    if reference not in arms:
        return [Check((arm,), None, reference) for arm in others]
    if not others:
        return [Check((reference,), None, reference)]
    first, *more = others
    return [Check((reference, first), first, reference), *(Check((arm,), arm, reference) for arm in more)]


class _Seen(Tally):
    """What a check saw of some shards.

    Args:
        alone: by arm, the rules on it by itself; pair: those on two arms beside each other.
        found: by arm, what is wrong with its files.
        has: by arm, what was there for the rules.
    """

    def __init__(self, run: Run, check: Check) -> None:
        self.shapes = {arm: _shape_of_arm(run, arm) for arm in check.arms}
        self.alone = {arm: ArmHygiene(self.shapes[arm], _is_sampled(run, arm)) for arm in check.alone}
        self.found: dict[str, list[Finding]] = {arm: [] for arm in check.alone}
        self.has: dict[str, set[str]] = {arm: set() for arm in check.arms}
        self.pair: PairHygiene | None = None
        if check.beside is not None:
            arms = (check.beside, check.reference)
            shape = _common_shape(*(self.shapes[arm] for arm in arms))
            self.pair = PairHygiene(arms, shape, _is_foreign(run, *arms))


def read_check(run: Run, shards: Sequence[Shard], folder: Path, check: Check) -> _Seen:
    """Check some shards of a run; what is seen of others merges with it."""
    seen = _Seen(run, check)
    for shard in shards:
        _add_shard(seen, run, shard, check)
    return seen


def _add_shard(seen: _Seen, run: Run, shard: Shard, check: Check) -> None:
    """A function of its own, so that no array of a shard is held while the next is read."""
    tokens, missing = _read_tokens(run, shard)
    rows: dict[str, Rows] = {}
    for arm in check.arms:
        is_covered = shard in run.shards_of(arm)
        read, wrong = _read_rows(run, arm, shard, tokens, seen.shapes[arm]) if is_covered else (None, [])
        if arm in check.alone:
            seen.found[arm] += [*missing, *wrong]
        if read is not None:
            rows[arm] = read
            seen.has[arm] |= _has(read)
            if arm in check.alone:
                seen.alone[arm].add(read)
    if seen.pair is not None and check.beside in rows and check.reference in rows:
        seen.pair.add(rows[check.beside], rows[check.reference])


def join_check(run: Run, pieces: Iterator[_Seen], check: Check) -> Inspection:
    """What a check found in all shards.

    Returns:
        Findings in no order of levels.
    """
    seen = next(pieces)
    for later in pieces:
        seen.merge(later)
    found: list[Finding] = []
    has: set[str] = set()
    for arm, rules in seen.alone.items():
        # a side without any log-probability was dumped without them
        is_bare = LOGPS not in seen.has[arm] and _is_foreign(run, arm)
        own = rules.findings(arm, _prefixes_of(run, rules.gap_lengths))
        found += [*_check_record(run, arm), *seen.found[arm]]
        found += [item for item in own if not (is_bare and item.rule == "D31-nan-logp")]
        has |= seen.has[arm] | ({DISTRIBUTIONS} if _has_distributions(run, arm) else set())
    if seen.pair is not None and check.beside is not None:
        arms = check.beside, check.reference
        found += seen.pair.findings("~".join(reversed(arms)))
        has |= both_have(*(seen.has[arm] for arm in arms)) | ({FOREIGN} if _is_foreign(run, *arms) else set())
    return Inspection(found, frozenset(has), sum(rules.n_rows for rules in seen.alone.values()))


def inspect_runs(runs: Sequence[Run], workers: int | Pool = 1) -> Inspection:
    """Check the runs of a series, or the one run of a step; findings name their step."""
    parts = [inspect_run(run, workers=workers) for run in runs]
    if len(parts) == 1:
        return parts[0]
    found = [
        replace(item, where=f"step {run.record.step} {item.where}")
        for run, part in zip(runs, parts, strict=True)
        for item in part.findings
    ]
    return Inspection(
        by_level(found), frozenset().union(*(part.has for part in parts)), sum(part.n_rows for part in parts)
    )


def check_capture(
    tokens: TokenRows,
    capture: Capture,
    *,
    n_experts: int = 0,
    arm: str = INFER,
    is_sampled: bool = True,
    renormalize: bool | None = None,
    n_zero_experts: int = 0,
) -> list[Finding]:
    """Check one arm's arrays against its tokens.

    Args:
        tokens: whole sequences, T rows.
        capture: the arm's arrays, T rows.
        n_experts: E; 0 = the largest id + 1.
        arm: its name, which findings give.
        is_sampled: it decoded token by token, so that the last rows of sequences may lack routing.
        renormalize: whether gate weights are divided by their sum; None = unknown.
        n_zero_experts: how many of the experts, the last, compute nothing.
    """
    shape = replace(_shape_of_arrays(capture, n_experts, renormalize), n_zero_experts=n_zero_experts)
    wrong = _misfits(tokens, capture, shape, arm)
    if wrong:
        return wrong
    hygiene = ArmHygiene(shape, is_sampled)
    hygiene.add(Rows(tokens, capture, shape))
    prefixes: dict[tuple[int, int], int] = {}
    if hygiene.gap_lengths:
        count_prefixes(tokens, hygiene.gap_lengths, prefixes)
    return by_level(hygiene.findings(arm, prefixes))


def check_pair(
    tokens: TokenRows,
    train: Capture,
    infer: Capture,
    *,
    n_experts: int = 0,
    where: str = "infer~train",
    is_foreign: bool = False,
    has_places: bool = True,
) -> list[Finding]:
    """Check two arms of the same tokens beside each other; each alone is :func:`check_capture`'s business.

    Routing is compared where both sides have it, log-probabilities in any case.

    Args:
        n_experts: E; 0 = infer's largest id + 1.
        is_foreign, has_places: as for :class:`PairHygiene`.
    """
    wrong = _misfits(tokens, train.unrouted(), _DENSE, where) or _misfits(tokens, infer.unrouted(), _DENSE, where)
    if wrong:
        return wrong
    shape = _shape_of_arrays(infer, n_experts, None) if train.is_routed and infer.is_routed else _DENSE
    if shape.n_layers:
        wrong = _misfits(tokens, infer, shape, where) or _misfits(tokens, train, shape, where)
    if wrong or not shape.n_layers:
        shape, train, infer = _DENSE, train.unrouted(), infer.unrouted()
    hygiene = PairHygiene((where.partition("~")[2], where.partition("~")[0]), shape, is_foreign, has_places)
    hygiene.add(Rows(tokens, train, shape), Rows(tokens, infer, shape))
    return by_level(wrong + hygiene.findings(where))


def what_is_there(capture: Capture) -> set[str]:
    """What one side has for the rules; a side without any finite log-probability was dumped without them."""
    of_array = {
        IDS: capture.expert_ids_TLK,
        GATES: capture.gate_weights_TLK,
        MARGINS: capture.margin_TL,
        LOGITS: capture.router_logits_TLE,
        LOGPS: capture.logp_T if np.isfinite(capture.logp_T).any() else None,
        ENTROPIES: None if capture.entropy_T is None or not np.isfinite(capture.entropy_T).any() else capture.entropy_T,
    }
    return {name for name, array in of_array.items() if array is not None}


def _has(rows: Rows) -> set[str]:
    versions = {VERSIONS} if rows.tokens.weight_version_T is not None else set()
    return what_is_there(rows.capture) | versions if len(rows) else set()


def both_have(train: Collection[str], infer: Collection[str]) -> set[str]:
    """What two sides have for the rules about both."""
    both = {LOGPS: BOTH_LOGPS, IDS: BOTH_IDS, GATES: BOTH_GATES}
    found = {both[what] for what in both if what in train and what in infer}
    return found | ({BOTH_VERSIONS} if BOTH_LOGPS in found and VERSIONS in infer else set())


def _has_distributions(run: Run, arm: str) -> bool:
    try:
        return any(run.keeps_vocab(arm, shard) for shard in run.shards)
    except RunError:
        return False


def _is_sampled(run: Run, arm: str) -> bool:
    try:
        return run.arm(arm).role == INFER
    except RunError:
        return True


def _is_foreign(run: Run, *arms: str) -> bool:
    """Whether another tool made all of some arms."""
    try:
        return all(run.arm(arm).captured is None for arm in arms)
    except RunError:
        return False


def _shape_of_arm(run: Run, arm: str) -> Shape:
    """The arm's shape, or a dense one's where its routing was not observed; damage is found elsewhere."""
    try:
        record = run.arm(arm)
    except RunError:
        return _DENSE
    if not record.is_routed:
        return _DENSE
    routers = [record.routers[i] for i in record.comparable_layers]
    specs = {router.spec for router in routers}
    spec = specs.pop() if len(specs) == 1 else None
    n_experts = max(router.n_experts for router in routers)
    sums_to_factor = spec.renormalize and not spec.has_expert_scale if spec else None
    return Shape(len(routers), n_experts, routers[0].top_k, sums_to_factor, routers[0].n_zero_experts)


def _common_shape(shape: Shape, other: Shape) -> Shape:
    """The shape that both arms have; routing of two shapes is not compared row by row."""
    both = [(one.n_layers, one.n_experts, one.top_k) for one in (shape, other)]
    return shape if both[0] == both[1] else _DENSE


def _check_beside_arms(run: Run) -> list[Finding]:
    return [finding("damaged", where, message) for where, message in derived_damage(run.path)]


def check_prompts(run: Run) -> list[Finding]:
    """The table of prompts, where the run has one."""
    if run.record.prompts is None:
        return []
    try:
        run.prompts()
    except RunError as error:
        return [finding("damaged", "prompts", str(error))]
    return []


def _check_record(run: Run, arm: str) -> list[Finding]:
    try:
        disagreements = run.arm(arm).disagreements
        run.correction_bias(arm)
    except RunError as error:
        return [finding("damaged", f"{arm} arm.json", str(error))]
    found = [finding("D14-other-rule", f"{arm} arm.json", disagreement) for disagreement in disagreements]
    return found + _check_sampling(run, arm)


def _check_sampling(run: Run, arm: str) -> list[Finding]:
    """D11: what the scheduler of the engine that sampled got, where that was recorded."""
    record = run.arm(arm)
    effective = record.facts.get("sampling")
    if record.path != "sampled" or not isinstance(effective, dict):
        return []
    requested = _NEUTRAL_SAMPLING | (run.record.sampling.content() if run.record.sampling is not None else {})
    other = [
        f"{name} = {got} ({requested[name]} requested)"
        for name in _NEUTRAL_SAMPLING
        if (got := effective.get(name)) is not None and not _is_same_setting(name, got, requested[name])
    ]
    return [finding("D11-sampling-parameters", f"{arm} arm.json", f"sampled with {', '.join(other)}")] if other else []


def _is_same_setting(name: str, one: float, other: float) -> bool:
    return one == other or (name == "top_k" and max(one, other) <= 0)


def _read_tokens(run: Run, shard: Shard) -> tuple[TokenRows | None, list[Finding]]:
    if not run.has_tokens(shard):
        return None, [finding("missing-shard", f"tokens {shard.stem}", "token table not written yet")]
    try:
        return run.tokens(shard), []
    except RunError as error:
        return None, [finding("damaged", f"tokens {shard.stem}", str(error))]


def _read_rows(
    run: Run, arm: str, shard: Shard, tokens: TokenRows | None, shape: Shape
) -> tuple[Rows | None, list[Finding]]:
    """A shard of an arm, where it can be read, and what is wrong with it."""
    where = f"{arm} {shard.stem}"
    if not run.has_capture(arm, shard):
        return None, [finding("missing-shard", where, "not captured yet; run the capture again")]
    try:
        is_of_these = run.capture_sidecar(arm, shard).tokens_sha256 == run.tokens_digest(shard)
        capture = run.capture(arm, shard)
    except RunError as error:
        return None, [finding("damaged", where, str(error))]
    found: list[Finding] = []
    if not is_of_these:
        found.append(finding("token-identity", where, "scored other tokens than the token table"))
    if tokens is None:
        return None, found
    capture = _of_shape(run, arm, capture, shape)
    wrong = _misfits(tokens, capture, shape, where)
    found += wrong or _check_distributions(run, arm, shard, tokens, capture)
    return None if wrong else Rows(tokens, capture, shape), found


def _of_shape(run: Run, arm: str, capture: Capture, shape: Shape) -> Capture:
    """The layers that the rules are about, where an arm's layers differ in K."""
    layers = run.arm(arm).comparable_layers
    if not shape.n_layers or len(layers) == len(run.arm(arm).routers):
        return capture
    return capture.of_layers(layers, shape.top_k, shape.n_experts)


def _check_distributions(run: Run, arm: str, shard: Shard, tokens: TokenRows, capture: Capture) -> list[Finding]:
    where = f"{arm} {shard.stem} vocabulary"
    try:
        vocab = run.load_vocab(arm, shard)
    except RunError as error:
        return [finding("damaged", where, str(error))]
    flaw = "" if vocab is None else vocab.flaw(tokens, capture.logp_T, run.vocab_sequences(arm, shard))
    return [finding("D31-distribution", where, flaw)] if flaw else []


def _misfits(tokens: TokenRows, capture: Capture, shape: Shape, where: str) -> list[Finding]:
    """Arrays that are not of the model's shape; the rules cannot be applied to them."""
    if len(capture.logp_T) != len(tokens):
        return [finding("completeness", where, f"{len(capture.logp_T)} rows for {len(tokens)} tokens")]
    if capture.is_routed != bool(shape.n_layers):
        return [finding("completeness", where, "expert ids and the model's routing do not belong together")]
    sizes = {"T": len(tokens), "L": shape.n_layers, "K": shape.top_k, "E": shape.n_experts}
    for name, array in capture.arrays().items():
        letters = name.rpartition("_")[2]
        expected = tuple(sizes[letter] for letter in letters)
        if array.shape != expected:
            return [
                finding("completeness", where, f"{name} is ({', '.join(letters)}) = {array.shape}, expected {expected}")
            ]
    return []


def _prefixes_of(run: Run, lengths: set[int]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for shard in run.shards if lengths else ():
        tokens, _ = _read_tokens(run, shard)
        if tokens is not None:
            count_prefixes(tokens, lengths, counts)
    return counts


def _shape_of_arrays(capture: Capture, n_experts: int, renormalize: bool | None) -> Shape:
    if capture.expert_ids_TLK is None:
        return _DENSE
    n_layers, top_k = np.shape(capture.expert_ids_TLK)[1:]
    n_experts = n_experts or max(int(np.max(capture.expert_ids_TLK, initial=-1)) + 1, top_k)
    return replace(_DENSE, n_layers=n_layers, n_experts=n_experts, top_k=top_k, renormalize=renormalize)
