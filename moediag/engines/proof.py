"""The proof of a router's rule: seeded probes, what a router did with them, and the rule that explains every row.

A rule is never taken from a name. One set of logits goes through the loaded router's own code in each engine; the
engines' rows are held against each other directly, and against the rules of one space (:mod:`.routers`), in one order
of preference. Three things are shown apart, and each can fail alone: which experts are chosen, with what gate weight,
and that forced experts are taken with the gate weight that the rule gives them.

Invariants:
    - a row whose K-th and (K+1)-th compared scores (or whose groups) are closer than 4 units in the last place of their
      dtype may be chosen either way: such rows are left apart and counted;
    - where a router's TopK is seen, a rule must give the very scores that it compares: of rules that choose alike, the
      one whose space the router works in;
    - nothing is guessed: groups and factors are tried only where config.json names them, and shown by the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from moediag.engines.arms import ROUTER_RULES
from moediag.engines.routers import (
    BEST,
    LOGIT,
    SCORES,
    SIGMOID,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    SQRTSOFTPLUS,
    TWO_BEST,
    UNKNOWN,
    ModelRouting,
    choice_scores,
    gate_weights,
    group_scores,
)
from moediag.errors import CaptureError, CheckpointError
from moediag.notation import INFER, TRAIN
from moediag.run.reader import Run
from moediag.run.records import OTHER_LOGITS

REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
"""What a router or its block raises that is given nothing but hidden states or logits and needs more."""
_ULPS = 4
_PLAIN = 8.0
"""Logits below this are what models have; the proof's larger ones only tell formulas apart."""
_EPSILONS = (0.0, 1e-20, 1e-12, 1e-9, 1e-6)
_BIAS_FIRST = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Probes:
    """Seeded logits and hidden states for every kind of router.

    Args:
        dtype: of the model: logits are rounded to it, so that both engines receive the same numbers.
        n_groups: group counts that config.json names; rows are made on which single groups matter.
        n_own: hidden states whose own logits are compared.
    """

    dtype: str = "float32"
    n_groups: tuple[int, ...] = ()
    seed: int = 0
    n_own: int = 32

    @cache  # noqa: B019  # frozen, and as few as there are checkpoints
    def logits(self, n_experts: int) -> torch.Tensor:
        """(N, E), float32: plain, wide, near ties, all negative, all positive, saturated, group against group."""
        g = torch.Generator().manual_seed(self.seed + n_experts)

        def draw(n: int) -> torch.Tensor:
            return torch.randn(n, n_experts, generator=g)

        rows = [draw(96), 4 * draw(64), 0.02 * draw(32), -2 * draw(48).abs() - 0.5, 2 * draw(32).abs() + 0.5]
        rows += [1 + 1e-3 * draw(16), 20 * draw(32).sign() * draw(32).abs().sqrt(), 12 * draw(24) - 30, draw(8) - 60]
        for n_group in self.n_groups:
            if n_group > 1 and n_experts % n_group == 0:
                lone, pair = draw(32), draw(32)
                for i in range(32):  # one expert far above in a weak group; two good ones in another
                    weak = (i % n_group) * (n_experts // n_group)
                    lone[i, weak : weak + n_experts // n_group] -= 2
                    lone[i, weak] = 4
                    other = ((i + 1) % n_group) * (n_experts // n_group)
                    pair[i, other : other + 2] += 2
                rows += [lone, pair, lone - 4]
        return torch.cat(rows).to(getattr(torch, self.dtype)).float()

    @cache  # noqa: B019
    def hidden(self, n_rows: int, n_hidden: int) -> torch.Tensor:
        """(N, H), float32."""
        g = torch.Generator().manual_seed(self.seed)
        return torch.randn(n_rows, n_hidden, generator=g).to(getattr(torch, self.dtype)).float()

    @cache  # noqa: B019
    def forced_ids(self, n_experts: int, top_k: int) -> torch.Tensor:
        """(N, K): sets that no router would choose."""
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(len(self.logits(n_experts)), n_experts, generator=g).argsort(dim=-1)[:, :top_k]


@dataclass
class Rows:
    """What one router did with the probes; effective gate weights, on the host, in float32.

    Args:
        logits_NE: what its rule was given; ``logits_dtype``: in which dtype.
        ids_NK, gates_NK: what the experts were given; None where they were given no such thing.
        compared_NE: what its TopK compares, where that is seen.
        vectors: one number per expert that the router or its block holds, by name.
        factor: what the block multiplies the experts' sum by; None where it does something else with it.
        logits_output: which of the router's outputs are its logits as they are; None where none is.
        scales_input: the gate weight multiplies an expert's input and not its output.
        answer_NK: ids that its TopK was answered with.
        reason: why nothing could be shown.
    """

    logits_NE: torch.Tensor | None = None
    logits_dtype: str = "float32"
    ids_NK: torch.Tensor | None = None
    gates_NK: torch.Tensor | None = None
    gate_dtype: str = "float32"
    compared_NE: torch.Tensor | None = None
    compared_dtype: str = ""
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    factor: float | None = 1.0
    logits_output: int | None = 0
    scales_input: bool = False
    answer_NK: torch.Tensor | None = None
    reason: str = ""

    @property
    def n_experts(self) -> int:
        """E."""
        return 0 if self.logits_NE is None else self.logits_NE.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return 0 if self.ids_NK is None else self.ids_NK.shape[-1]


@dataclass
class Shown:
    """A router on the probes.

    Args:
        rows: with its own vectors; ``drawn``: with others, where its own are constant and show nothing.
        forced: with its TopK answered by other ids.
        own_logits_ME: its logits of the first hidden states.
    """

    decoder_layer: int
    n_experts: int
    rows: Rows
    drawn: Rows | None = None
    forced: Rows | None = None
    own_logits_ME: torch.Tensor | None = None
    weight_dtype: str = ""

    @property
    def stage_dtypes(self) -> dict[str, str | None]:
        """Dtypes of the router's four stages: weight, matmul (logits), score (TopK's input), gate; None = not seen."""
        rows = self.rows
        stages = {"weight": self.weight_dtype, "matmul": rows.logits_dtype, "score": rows.compared_dtype}
        seen = {**stages, "gate": rows.gate_dtype} if rows.ids_NK is not None else {"weight": self.weight_dtype}
        return {name: seen.get(name) or None for name in (*stages, "gate")}

    @property
    def every(self) -> list[Rows]:
        """All rows that a rule has to explain."""
        return [self.rows, *([self.drawn] if self.drawn else [])]


@dataclass(frozen=True)
class Hints:
    """What config.json names and a rule may use, once the rows show it."""

    family: str
    groups: tuple[tuple[int, int], ...] = ()
    factors: tuple[float, ...] = ()
    n_shared_experts: int = 0


_GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"), ("num_expert_groups", "num_limited_groups"))
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_FACTOR = re.compile("scal|multiplier|factor")


def hints_of(text: dict[str, Any], has_shared: bool) -> Hints:
    """From the language model's part of config.json.

    Args:
        has_shared: the blocks hold a shared expert, whether or not config.json counts them.
    """
    groups = [(text.get(n) or 1, text.get(kept) or 1) for n, kept in _GROUPS]
    factors = [float(value) for key, value in text.items() if _FACTOR.search(key) and type(value) in (int, float)]
    counted = next((int(text[key]) for key in _SHARED if text.get(key)), 0)
    return Hints(
        str(text.get("model_type")),
        tuple(dict.fromkeys((int(n), int(kept)) for n, kept in groups if n > kept >= 1)),
        tuple(dict.fromkeys(factor for factor in factors if factor not in (0.0, 1.0))),
        counted or int(has_shared),
    )


@dataclass(frozen=True)
class Fit:
    """The rule that explains a side's rows, and what of it is shown.

    Args:
        rule: None where no choice of the space explains the rows; its gate is ``unknown`` where no formula does.
        choice, gate, replay: empty where shown, else why not.
        n_rows, n_apart: of all layers; those left apart because two scores nearly tie.
    """

    rule: ModelRouting | None
    choice: str = ""
    gate: str = ""
    replay: str = ""
    n_rows: int = 0
    n_apart: int = 0


def fit(shown: Sequence[Shown], hints: Hints, first: ModelRouting | None = None) -> Fit:
    """The first rule of the space, in the order of :func:`candidates`, that explains every row of every layer.

    Args:
        first: tried before all others: the other engine's rule, so that both arms' margins lie in one space.
    """
    reason = next((f"decoder layer {one.decoder_layer}: {one.rows.reason}" for one in shown if one.rows.reason), "")
    if not reason and any(one.rows.ids_NK is None for one in shown):
        reason = "its experts are given no ids and weights per token"
    if reason:
        return Fit(None, reason, reason, reason)
    sizes = {(one.n_experts, one.rows.top_k) for one in shown}
    if len(sizes) > 1:
        reason = f"layers differ in (E, K): {sorted(sizes)}"
        return Fit(None, reason, reason, reason)
    is_seen = any(rows.compared_NE is not None for one in shown for rows in one.every)
    chosen: ModelRouting | None = None
    for rule in candidates(shown, hints, first):
        if all(explains_choice(rows, rule) for one in shown for rows in one.every):
            if chosen is None or (rule.score_function == LOGIT and not is_seen and _is_plainer(rule, chosen)):
                chosen = rule
            gate = _fit_gate(shown, rule, hints)
            if gate is not None:
                return _fitted(shown, gate)
    if chosen is None:
        words = "no rule of softmax, sigmoid, sqrtsoftplus or plain logits with bias and groups explains its choices"
        return Fit(None, words, words, words)
    why = "no gate formula explains its weights"
    if any(rows.factor is None for one in shown for rows in one.every):
        why = "its block does more with the experts' sum than multiply it"
    return replace(_fitted(shown, replace(chosen, gate=UNKNOWN)), gate=why)


def _is_plainer(rule: ModelRouting, chosen: ModelRouting) -> bool:
    """The same steps on plain logits: all that a choice can tell where neither TopK nor gate is understood."""
    steps = [(one.bias_name, one.n_group, one.group_score, one.masked_value) for one in (rule, chosen)]
    return steps[0] == steps[1]


def candidates(shown: Sequence[Shown], hints: Hints, first: ModelRouting | None = None) -> Iterator[ModelRouting]:
    """Choices in order of preference: fewer steps before more (no bias, no groups), then softmax, sigmoid,
    sqrtsoftplus, plain logits; of groups the sum of their two best before their best, -inf for losers before 0.
    """
    rows = shown[0].rows
    if first is not None:
        yield replace(first, top_k=rows.top_k)
    plain = ModelRouting(
        family=hints.family, n_experts=rows.n_experts, top_k=rows.top_k, score_function=LOGIT,
        has_correction_bias=False, n_group=1, topk_group=1, gate=UNKNOWN, renormalize=False, scaling_factor=1.0,
        n_shared_experts=hints.n_shared_experts, decoder_layers=tuple(one.decoder_layer for one in shown),
        scales_input=rows.scales_input, scores_in_float32=rows.logits_dtype == "float32",
        logits_output=rows.logits_output, factor_after_experts=rows.factor or 1.0,
    )  # fmt: skip
    groupings: list[dict[str, Any]] = [{}]
    for n_group, topk_group in hints.groups:
        if rows.n_experts % n_group == 0:
            for masked_value, group_score in product(("-inf", "0"), (TWO_BEST, BEST)):
                groupings.append({"n_group": n_group, "topk_group": topk_group, "group_score": group_score,
                                  "masked_value": masked_value})  # fmt: skip
    for bias, grouping in product(["", *_by_preference(rows)], groupings):
        for score_function in (SOFTMAX, SIGMOID, SQRTSOFTPLUS, LOGIT):
            yield replace(
                plain, score_function=score_function, has_correction_bias=bool(bias), bias_name=bias, **grouping
            )


def _by_preference(rows: Rows) -> list[str]:
    return sorted(rows.vectors, key=lambda name: name.rpartition(".")[2] not in _BIAS_FIRST)


def _ulp(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).eps)


def _least(dtype: str) -> float:
    """What values near 0 may be off by: as many units of the smallest number as others of their last place. float16's
    is 6e-8, so that a gate weight below 6e-5 has fewer digits than its dtype."""
    finfo = torch.finfo(getattr(torch, dtype))
    return 2 * _ULPS * max(float(finfo.smallest_normal) * float(finfo.eps), 1e-36)


def _dtypes(own: str, rows: Rows) -> list[str]:
    """Dtypes that scores or weights may have been computed in; a narrow one is seldom told by its result."""
    return list(dict.fromkeys([own or "float32", rows.logits_dtype]))


def explains_choice(rows: Rows, rule: ModelRouting) -> bool:
    """Every row that is not left apart has the rule's experts, and its TopK (where seen) the rule's scores."""
    return any(_choice_is(rows, rule, dtype) for dtype in _dtypes(rows.compared_dtype, rows))


def _choice_is(rows: Rows, rule: ModelRouting, dtype: str) -> bool:
    scores_NE, apart_N = compared_scores(rows, rule, dtype)
    used_N = ~apart_N
    if int(used_N.sum()) < max(16, len(used_N) // 4):
        return False
    if rows.compared_NE is not None and not _same_scores(rows, rule, scores_NE, dtype, used_N):
        return False
    assert rows.ids_NK is not None
    chosen_NK = torch.topk(scores_NE, rule.top_k, dim=-1).indices.sort(-1).values
    return bool((chosen_NK == rows.ids_NK.long().sort(-1).values).all(-1)[used_N].all())


def compared_scores(rows: Rows, rule: ModelRouting, dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """What TopK compares by the rule (N, E), and which rows have a near tie of experts or of groups (N,)."""
    assert rows.logits_NE is not None
    bias = rows.vectors.get(rule.bias_name)
    scores_NE = choice_scores(rows.logits_NE, rule, bias)
    room_N = torch.zeros(len(scores_NE)) if bias is None else bias.abs().max().expand(len(scores_NE))
    apart_N = _near(scores_NE, rule.top_k, room_N, dtype)
    if rule.topk_group < rule.n_group:
        ungrouped = replace(rule, n_group=1, topk_group=1)
        groups = group_scores(choice_scores(rows.logits_NE, ungrouped, bias), rule)
        apart_N |= _near(groups, rule.topk_group, 2 * room_N, dtype)
    return scores_NE, apart_N


def _near(scores_NE: torch.Tensor, k: int, room_N: torch.Tensor, dtype: str) -> torch.Tensor:
    if k >= scores_NE.shape[-1]:
        return torch.zeros(len(scores_NE), dtype=torch.bool)
    best = torch.topk(scores_NE, k + 1, dim=-1).values
    last, next_ = best[:, -2], best[:, -1]
    scale_N = torch.maximum(torch.maximum(last.abs(), next_.nan_to_num(neginf=0.0).abs()), room_N)
    return ~(last - next_ >= _ULPS * _ulp(dtype) * scale_N) | ~last.isfinite() | (last == next_)


def _same_scores(rows: Rows, rule: ModelRouting, scores_NE: torch.Tensor, dtype: str, used_N: torch.Tensor) -> bool:
    assert rows.compared_NE is not None
    assert rows.logits_NE is not None
    seen, ours = rows.compared_NE[used_N], scores_NE[used_N]
    bias = rows.vectors.get(rule.bias_name)
    scale = ours.nan_to_num(neginf=0.0).abs() + (0 if bias is None else bias.abs())
    spread = rows.logits_NE[used_N].abs().amax(-1, keepdim=True)
    room = _ulp(dtype) * (2 * _ULPS + spread) * scale + _least(dtype)
    return bool((seen.isfinite() == ours.isfinite()).all()) and bool(
        ((seen - ours).nan_to_num(0.0, 0.0, 0.0).abs() <= room).all()
    )


def _fit_gate(shown: Sequence[Shown], rule: ModelRouting, hints: Hints) -> ModelRouting | None:
    """The rule with the first gate formula that explains every weight: scores of the chosen, their softmax, their
    sigmoid; plain before renormalised; no factor before one of config.json; no factor per expert before one."""
    if rule.gate != UNKNOWN and all(explains_gate(rows, rule) for one in shown for rows in one.every):
        return rule
    formulas = (SOFTMAX_OF_CHOSEN, SIGMOID) if rule.score_function == LOGIT else (SCORES,)
    every = [rows for one in shown for rows in one.every]
    if any(rows.factor is None for rows in every):
        return None
    factors = tuple(dict.fromkeys((1.0, *hints.factors, every[0].factor or 1.0)))
    for scale, formula, renormalize in product(["", *every[0].vectors], formulas, (False, True)):
        if renormalize and formula == SOFTMAX_OF_CHOSEN:
            continue
        for epsilon, factor in product(_EPSILONS if renormalize else (0.0,), factors):
            gate = replace(
                rule, gate=formula, renormalize=renormalize, epsilon=epsilon, scaling_factor=factor,
                has_expert_scale=bool(scale), expert_scale_name=scale,
            )  # fmt: skip
            if all(explains_gate(rows, gate) for rows in every):
                return gate
    return None


def explains_gate(rows: Rows, rule: ModelRouting, which_N: torch.Tensor | None = None) -> bool:
    """Every gate weight (of some rows) is the rule's, in units in the last place of its dtype."""
    which = slice(None) if which_N is None else which_N
    return any(not bool(gate_differs(rows, rule, dtype)[which].any()) for dtype in _dtypes(rows.gate_dtype, rows))


def gate_differs(rows: Rows, rule: ModelRouting, dtype: str) -> torch.Tensor:
    """Weights that are not the rule's, (N, K): more than 8 units off, and one for each unit of the logit
    (exp passes on what its argument was rounded by).
    """
    assert rows.logits_NE is not None
    assert rows.ids_NK is not None
    assert rows.gates_NK is not None
    ours = gate_weights(rows.logits_NE, rows.ids_NK, rule, rows.vectors.get(rule.expert_scale_name))
    seen = rows.gates_NK * (rows.factor or 1.0)
    spread = rows.logits_NE.abs().amax(-1, keepdim=True)
    room = _ulp(dtype) * (2 * _ULPS + spread) * torch.maximum(ours.abs(), seen.abs()) + _least(dtype)
    return ~((seen - ours).abs() <= room) & ~(seen.isnan() & ours.isnan())


def _fitted(shown: Sequence[Shown], rule: ModelRouting) -> Fit:
    apart = [compared_scores(one.rows, rule)[1] for one in shown]
    n_rows, n_apart = sum(map(len, apart)), sum(int(one.sum()) for one in apart)
    return Fit(rule, "", "", _replay(shown, rule), n_rows, n_apart)


def _replay(shown: Sequence[Shown], rule: ModelRouting) -> str:
    """Empty where forced experts are taken, with the gate weights that the rule gives them; else why not."""
    for one in shown:
        forced = one.forced
        if forced is None or forced.ids_NK is None or forced.answer_NK is None:
            return "not tried"
        if not torch.equal(forced.ids_NK.long().sort(-1).values, forced.answer_NK.sort(-1).values):
            return "its router does not take its experts from one TopK over all of them"
        # beyond, forced experts may weigh less than an epsilon that no chosen ones come near
        plain_N = one.rows.logits_NE.abs().amax(-1) < _PLAIN if one.rows.logits_NE is not None else None
        if rule.gate != UNKNOWN and not explains_gate(forced, rule, plain_N):
            return "forced experts do not get the rule's gate weights"
    return ""


@dataclass(frozen=True)
class Proof:
    """What was shown of a model's routers in transformers; ``routing`` is what its captures are made by."""

    fit: Fit
    shown: Sequence[Shown]
    probes: Probes
    hints: Hints
    routing: ModelRouting
    n_hidden: int = 0


_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "moe_k")


def routing_of(fitted: Fit, shown: Sequence[Shown], hints: Hints, text: dict[str, Any], where: str) -> ModelRouting:
    """The rule that was fitted; where none was, E, K and the layers, so that ids and logits can be captured.

    Raises:
        CheckpointError: layers differ in E or K, or K is shown nowhere.
    """
    n_experts = {one.n_experts for one in shown}
    top_k = {one.rows.top_k for one in shown} - {0} or {int(text[key]) for key in _TOP_K if text.get(key)}
    if len(n_experts) != 1 or len(top_k) != 1 or max(top_k) > max(n_experts):
        raise CheckpointError(f"{where}: its routing cannot be captured: {fitted.choice or 'K is not known'}")
    proof = proof_words(fitted)
    if fitted.rule is not None:
        return replace(fitted.rule, proof=proof)
    return ModelRouting(
        family=hints.family, n_experts=n_experts.pop(), top_k=top_k.pop(), score_function=UNKNOWN,
        has_correction_bias=False, n_group=1, topk_group=1, gate=UNKNOWN, renormalize=False, scaling_factor=1.0,
        n_shared_experts=hints.n_shared_experts, decoder_layers=tuple(one.decoder_layer for one in shown),
        scales_input=shown[0].rows.scales_input, logits_output=shown[0].rows.logits_output,
        factor_after_experts=shown[0].rows.factor or 1.0, proof=proof,
    )  # fmt: skip


def proof_words(fitted: Fit, is_forced: bool = True) -> str:
    """What arm.json says of how a rule is known.

    Args:
        is_forced: routes can be forced in the engine.
    """
    if fitted.rule is None:
        return f"not shown: {fitted.choice}"
    apart = f", {fitted.n_apart} near ties apart" if fitted.n_apart else ""
    verdicts = (("gate", fitted.gate), *((("replay", fitted.replay),) if is_forced else ()))
    failed = [f"{name} not: {why}" for name, why in verdicts if why]
    proven = ["choice", *(name for name, why in verdicts if not why)]
    return "; ".join([f"{', '.join(proven)} shown on the loaded router ({fitted.n_rows} rows{apart})", *failed])


# Engine against engine


def shown_there(proof: Proof, layer: int, fact: dict[str, Any], seen: dict[str, torch.Tensor]) -> Shown:
    """A layer's router as another engine ran it on the proof's probes, beside the vectors of transformers' router.

    Args:
        layer: MoE layer.
        fact: dtypes, or the reason why nothing is shown.
        seen: ``ids_<decoder layer>``, ``weights_<decoder layer>`` (effective), ``own_<decoder layer>`` (logits).
    """
    mine = proof.shown[layer]
    name = mine.decoder_layer
    if fact["reason"]:
        return Shown(mine.decoder_layer, mine.n_experts, Rows(reason=fact["reason"]))
    rows = Rows(
        logits_NE=proof.probes.logits(mine.n_experts),
        logits_dtype=fact["logits_dtype"],
        ids_NK=seen[f"ids_{name}"],
        gates_NK=seen[f"weights_{name}"],
        gate_dtype=fact["gate_dtype"],
        vectors=mine.rows.vectors,
    )
    return Shown(mine.decoder_layer, mine.n_experts, rows, own_logits_ME=seen.get(f"own_{name}"))


@dataclass(frozen=True)
class Agreement:
    """Transformers' routers and another engine's on the same logits.

    Args:
        routing: what the other engine's arms are captured by.
        differences: where the two route otherwise, in words; what a run must not begin with unasked.
        remarks: what could not be shown, or differs only where no model's logits are.
        line: the result in one line.
    """

    routing: ModelRouting
    differences: tuple[str, ...]
    remarks: tuple[str, ...]
    line: str


def agreement(proof: Proof, other: Sequence[Shown], engine: str = "vLLM") -> Agreement:
    """Hold another engine's rows against transformers', and fit its rule, transformers' own first."""
    own = proof.fit.rule
    silent = next((one.rows.reason for one in other if one.rows.reason), "")
    if silent:
        routing = replace(
            proof.routing, proof=f"not shown in {engine}: {silent}; in transformers: {proof.routing.proof}"
        )
        line = f"router rule: {rule_words(proof.routing)}: {_how(proof.fit)} in transformers; not in {engine}: {silent}"
        return Agreement(routing, (), (silent,), line)
    fitted = fit(other, proof.hints, own)
    choice = [_choices_differ(a, b, own) for a, b in zip(proof.shown, other, strict=True)]
    gates = [_gates_differ(a, b) for a, b in zip(proof.shown, other, strict=True)]
    logits = [_logits_differ(a, b) for a, b in zip(proof.shown, other, strict=True)]
    rules = f"transformers: {_rule_or_reason(proof.fit)}; {engine}: {_rule_or_reason(fitted)}"
    differences = [
        f"{words} in {sum(map(bool, found))} of {len(found)} MoE layers (first {next(filter(None, found))}); {rules}"
        for words, found in (
            ("the engines choose other experts for the same logits", choice),
            ("the engines give the same experts other gate weights", [plain for plain, _ in gates]),
            (OTHER_LOGITS, logits),
        )
        if any(found)
    ]
    remarks = [f"{engine}'s own logits were not compared: no gate that runs alone was found"] if any(
        b.own_logits_ME is None for b in other
    ) else []  # fmt: skip
    if any(far for _, far in gates) and not differences:
        first = next(far for _, far in gates if far)
        remarks.append(f"gate weights differ only for logits beyond {_PLAIN:g} (first {first})")
    routing = _routing_there(proof, fitted, other, engine, has_differences=bool(differences))
    n_layers = len(other)
    where = f"on {n_layers} MoE layers in transformers and {engine}"
    shown = f"{rule_words(routing)}: {_how(fitted)} {where}" if routing.has_rule else f"not shown: {fitted.choice}"
    return Agreement(routing, tuple(differences), tuple(remarks), f"router rule: {shown}")


def refuse_stored_rules(run: Run, role: str, shown: Sequence[Shown], accept: str) -> None:
    """Hold the loaded routers against the rule that the other role's arm had, wherever and whenever it was captured.

    Args:
        role: of the arm that is about to be captured; ``shown``: what its routers do with the probes.
        accept: :data:`~.arms.ROUTER_RULES` goes on all the same.

    Raises:
        CaptureError: the recorded rule does not explain what the loaded routers do.
    """
    other = run.reference(TRAIN if role == INFER else INFER)
    if accept == ROUTER_RULES or other not in run.arms():
        return
    record, bias_LE = run.arm(other), run.correction_bias(other)
    recorded = {router.decoder_layer: (router, layer) for layer, router in enumerate(record.routers)}
    found = []
    for one in shown:
        router, layer = recorded.get(one.decoder_layer, (None, 0))
        if router is None or router.spec is None or one.rows.ids_NK is None:
            continue
        rule = replace(ModelRouting.of_routers([router]), bias_name="recorded")
        if rule.has_correction_bias and bias_LE is None:
            continue
        vectors = {"recorded": torch.from_numpy(bias_LE[layer])} if bias_LE is not None else {}
        if what := _unexplained(replace(one.rows, compared_NE=None, vectors=vectors), rule):
            found.append(f"{what} in decoder layer {one.decoder_layer}; arm {other} had {rule_words(rule)}")
    if found:
        raise CaptureError(
            f"{run.path}: for the same logits the loaded routers of {len(found)} of {len(shown)} MoE layers do not do "
            f"what arm {other}'s did: {found[0]}. Nothing was captured; --accept {ROUTER_RULES} captures all the same"
        )


def _unexplained(rows: Rows, rule: ModelRouting) -> str:
    """What of a router's rows a rule does not explain; empty where it explains all that it speaks of."""
    if rows.top_k != rule.top_k:
        return f"{rows.top_k} experts a token against {rule.top_k}"
    if not explains_choice(rows, rule):
        return "other experts"
    assert rows.logits_NE is not None
    if rule.gate == UNKNOWN or rule.has_expert_scale or rows.gates_NK is None:
        return ""
    return "" if explains_gate(rows, rule, rows.logits_NE.abs().amax(-1) < _PLAIN) else "other gate weights"


def _routing_there(
    proof: Proof, fitted: Fit, other: Sequence[Shown], engine: str, has_differences: bool
) -> ModelRouting:
    if fitted.rule is None or proof.fit.rule is None:
        why = fitted.choice or proof.fit.choice
        unknown = replace(proof.routing, score_function=UNKNOWN, gate=UNKNOWN, has_correction_bias=False, proof=why)
        return replace(unknown, top_k=other[0].rows.top_k)
    gate, words = fitted.rule.gate, proof_words(fitted, is_forced=False)
    if proof.fit.gate:  # one side alone claims nothing of gate weights
        gate, words = UNKNOWN, f"{words}; in transformers gate not: {proof.fit.gate}"
    kept = {name: getattr(proof.routing, name) for name in ("logits_output", "scales_input", "scores_in_float32")}
    same = "" if has_differences else ", equal to transformers' row by row"
    return replace(fitted.rule, **kept, gate=gate, proof=f"{engine}: {words}{same}")


def _rule_or_reason(fitted: Fit) -> str:
    return rule_words(fitted.rule) if fitted.rule is not None else fitted.choice


def _how(fitted: Fit) -> str:
    names = (("choice", fitted.choice), ("gate", fitted.gate))
    proven = " and ".join(name for name, why in names if not why) or "nothing"
    failed = "".join(f" (its {name} not: {why})" for name, why in names if why)
    return f"{proven} proven{failed}"


def _apart(a: Shown, b: Shown, rule: ModelRouting | None) -> torch.Tensor:
    """Rows that either engine may choose either way."""
    assert a.rows.logits_NE is not None
    if rule is None:
        return _near(a.rows.logits_NE, a.rows.top_k, torch.zeros(len(a.rows.logits_NE)), b.rows.logits_dtype)
    dtypes = {*_dtypes(a.rows.compared_dtype, a.rows), b.rows.logits_dtype}
    return torch.stack([compared_scores(a.rows, rule, dtype)[1] for dtype in dtypes]).any(0)


def _choices_differ(a: Shown, b: Shown, rule: ModelRouting | None) -> str:
    if a.rows.ids_NK is None or b.rows.ids_NK is None:
        return ""
    if a.rows.top_k != b.rows.top_k:
        return f"decoder layer {a.decoder_layer}: {a.rows.top_k} experts a token against {b.rows.top_k}"
    mine, theirs = (one.rows.ids_NK.long().sort(-1).values for one in (a, b))  # type: ignore[union-attr]
    differ_N = (mine != theirs).any(-1) & ~_apart(a, b, rule)
    if not differ_N.any():
        return ""
    row = int(differ_N.nonzero()[0])
    return (
        f"decoder layer {a.decoder_layer}: {int(differ_N.sum())} of {len(differ_N)} rows, "
        f"e.g. {mine[row].tolist()} against {theirs[row].tolist()}"
    )


def _gates_differ(a: Shown, b: Shown) -> tuple[str, str]:
    """Where gate weights of the same experts differ: for logits that models have, and beyond."""
    if a.rows.top_k != b.rows.top_k or a.rows.gates_NK is None or b.rows.gates_NK is None:
        return "", ""
    assert a.rows.ids_NK is not None
    assert b.rows.ids_NK is not None
    assert a.rows.logits_NE is not None
    (mine, order), (theirs, other) = (one.rows.ids_NK.long().sort(-1) for one in (a, b))  # type: ignore[union-attr]
    factor = 1.0 if a.rows.factor is None else a.rows.factor
    seen, there = a.rows.gates_NK.gather(1, order) * factor, b.rows.gates_NK.gather(1, other)
    dtypes = {a.rows.gate_dtype, b.rows.gate_dtype, a.rows.logits_dtype, b.rows.logits_dtype}
    spread = a.rows.logits_NE.abs().amax(-1, keepdim=True)
    room = max(map(_ulp, dtypes)) * (2 * _ULPS + spread) * torch.maximum(seen.abs(), there.abs()) + 1e-36
    differ_N = ((seen - there).abs() > room).any(-1) & (mine == theirs).all(-1)
    words = []
    for rows_N in (differ_N & (spread[:, 0] < _PLAIN), differ_N & (spread[:, 0] >= _PLAIN)):
        row = int(rows_N.nonzero()[0]) if rows_N.any() else 0
        one, two = ([float(f"{value:.4g}") for value in gates[row].tolist()] for gates in (seen, there))
        words.append(
            f"decoder layer {a.decoder_layer}: {int(rows_N.sum())} of {len(rows_N)} rows, e.g. {one} against {two}"
            if rows_N.any()
            else ""
        )
    return words[0], words[1]


def _logits_differ(a: Shown, b: Shown) -> str:
    """Logits of the same hidden states: apart by more than a sum of products may be rounded by."""
    if a.own_logits_ME is None or b.own_logits_ME is None:
        return ""
    eps = max(_ulp(a.rows.logits_dtype), _ulp(b.rows.logits_dtype))
    room = (8 if eps > 1e-4 else 64) * eps * a.own_logits_ME.abs().amax(-1, keepdim=True)
    off_ME = (a.own_logits_ME - b.own_logits_ME).abs() > room
    if not off_ME.any():
        return ""
    row, expert = (int(index[0]) for index in off_ME.nonzero(as_tuple=True))
    one, two = float(a.own_logits_ME[row, expert]), float(b.own_logits_ME[row, expert])
    return f"decoder layer {a.decoder_layer}: {int(off_ME.sum())} of {off_ME.numel()}, e.g. {one:.4g} against {two:.4g}"


# In words and as an equation


def rule_words(rule: ModelRouting) -> str:
    """The rule in one line of words."""
    score = {LOGIT: "logits"}.get(rule.score_function, f"{rule.score_function} of the logits")
    bias = " + bias" if rule.has_correction_bias else ""
    groups = ""
    if rule.topk_group < rule.n_group:
        how = "best expert" if rule.group_score == BEST else "sum of their two best"
        losers = "" if rule.masked_value == "-inf" else f", losers at {rule.masked_value}"
        groups = f" within the {rule.topk_group} of {rule.n_group} groups with the largest {how}{losers}"
    gate = {SCORES: "their scores", SOFTMAX_OF_CHOSEN: "softmax of the chosen logits", SIGMOID: "sigmoid of the logits"}
    words = gate.get(rule.gate, "not explained")
    if rule.renormalize:
        words += f" over their sum{f' + {rule.epsilon:g}' if rule.epsilon else ''}"
    words += f", times {rule.scaling_factor:g}" if rule.scaling_factor != 1 else ""
    words += ", times a factor per expert" if rule.has_expert_scale else ""
    words += ", on the expert's input" if rule.scales_input else ""
    return f"top-{rule.top_k} of {rule.n_experts} by {score}{bias}{groups}; gate weights: {words}"


def rule_equation(rule: ModelRouting) -> str:
    """The rule as an equation: z logits, s scores, b bias, C the chosen experts, g gate weights."""
    score = {LOGIT: "z", SQRTSOFTPLUS: "sqrt(softplus(z))"}.get(rule.score_function, f"{rule.score_function}(z)")
    compared = "s + b" if rule.has_correction_bias else "s"
    lines = [f"s = {score}"]
    if rule.topk_group < rule.n_group:
        best = "max" if rule.group_score == BEST else "sum of the two largest"
        lines.append(f"G = top{rule.topk_group}({best} of {compared} per group of {rule.n_group})")
        lines.append(f"C = top{rule.top_k}({compared} in G, {rule.masked_value} elsewhere)")
    else:
        lines.append(f"C = top{rule.top_k}({compared})")
    gate = {SCORES: "s_i", SOFTMAX_OF_CHOSEN: "exp(z_i) / sum_C exp(z_j)", SIGMOID: "sigmoid(z_i)"}.get(rule.gate, "?")
    if rule.renormalize:
        total = gate.replace("_i", "_j")
        gate = f"{gate} / (sum_C {total} + {rule.epsilon:g})" if rule.epsilon else f"{gate} / sum_C {total}"
    gate = f"{rule.scaling_factor:g} * {gate}" if rule.scaling_factor != 1 else gate
    lines.append(f"g_i = {gate}{' * e_i' if rule.has_expert_scale else ''}")
    return "; ".join(lines)


# Between processes


def write_proof(path: Path, proof: Proof) -> None:
    """For an engine's process: plain data and tensors."""
    content = {"shown": [asdict(one) for one in proof.shown], "fit": _plain(proof.fit), "probes": asdict(proof.probes)}
    torch.save(
        {**content, "routing": proof.routing.record(), "n_hidden": proof.n_hidden, "hints": asdict(proof.hints)}, path
    )


def read_proof(path: Path) -> Proof:
    """What :func:`write_proof` wrote."""
    content = torch.load(path, weights_only=True)
    hints, fitted = content["hints"], content["fit"]
    return Proof(
        Fit(**{**fitted, "rule": ModelRouting.from_record(fitted["rule"]) if fitted["rule"] else None}),
        [_as_shown(one) for one in content["shown"]],
        Probes(**{**content["probes"], "n_groups": tuple(content["probes"]["n_groups"])}),
        Hints(**{**hints, "groups": tuple(map(tuple, hints["groups"])), "factors": tuple(hints["factors"])}),
        ModelRouting.from_record(content["routing"]),
        content["n_hidden"],
    )


def _plain(fitted: Fit) -> dict[str, Any]:
    return {**asdict(fitted), "rule": fitted.rule.record() if fitted.rule else None}


def _as_shown(content: dict[str, Any]) -> Shown:
    rows = {name: Rows(**content[name]) if content[name] else None for name in ("rows", "drawn", "forced")}
    return Shown(**{**content, **rows})
