"""What lies behind a mismatch: every rule on the main pair that fired, likeliest first, and what was ruled out.

Each rule looks at what was measured and says nothing, or what it found with its numbers; cause, next check and limit
stand in its row of :mod:`moediag.hygiene.rules`. Findings of the capture come first, since no number means what it
says beside them, then findings of the pair, in the order of the rules' table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pandas as pd

from moediag.analysis.floors import FAR
from moediag.diagnosis.function import Distances, FirstLayers, FunctionTest
from moediag.diagnosis.layers import (
    FROM_A_POSITION,
    GATES,
    GROWS,
    NOT_THE_FIRST,
    SOME_EXPERTS,
    SOME_SEQUENCES,
    LayersApart,
)
from moediag.diagnosis.modules import ModuleChecks
from moediag.diagnosis.recorded import (
    OTHER_TOKENS,
    OTHER_WEIGHTS,
    ROUNDED,
    SHIFTED,
    TEMPERATURE,
    TRUNCATED,
    Explanation,
)
from moediag.diagnosis.reference import Whose
from moediag.hygiene.findings import LEVELS, Finding, by_level, finding
from moediag.hygiene.rules import ERROR, RULES, WARNING
from moediag.notation import INFER, TRAIN
from moediag.numbers import percent, sig
from moediag.run.records import OTHER_LOGITS

WORSE: Final = 1.5
"""Times that one engine's typical token, or a router's typical margin, is farther from the function than the other's,
with the whole interval, from which on it rounds worse.
Ours: healthy pairs were measured at 0.8 to 1.25 (reports/diagnosis.md). Not of the mean, which a few flips carry: it
blamed an engine of a healthy pair in float16."""
ODD: Final = 30.0
"""Times that a sequence's mean is above the median sequence's, from which on it is one of few.
Ours: of healthy pairs no sequence was beyond 12 (reports/diagnosis.md)."""
_FEW: Final = 0.05
"""Share of sequences that may be odd: more are no few."""

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a verdict is made of; the words for the engines are of the arms compared.

    Args:
        pair: summary of the main pair.
        floor: ``floors`` of the summary.
        replay: ``routing_replay`` of the summary.
        weights: how the weights that the two arms loaded differ, in words; empty where both loaded the same.
        findings: of the rules on the capture; errors among them were overridden.
        function, distances, layers: the float32 arms' part.
        modules: a check of the engines' modules on the same inputs.
        recorded: what is wrong with imported rollouts.
        sequences: frame ``sequences`` of the main pair.
        engines: words for the engine of each side, by role.
        is_on_accelerator: float32 may be something else there.
        whose: what a third party says.
        first_layers: float32 of a part, where the whole was too large.
    """

    pair: Summary
    floor: Summary | None = None
    replay: Summary | None = None
    weights: str = ""
    findings: Sequence[Finding] = ()
    function: FunctionTest | None = None
    distances: Distances | None = None
    layers: LayersApart | None = None
    modules: ModuleChecks | None = None
    recorded: Explanation | None = None
    sequences: pd.DataFrame | None = None
    engines: Mapping[str, str] | None = None
    is_on_accelerator: bool = False
    whose: Whose | None = None
    first_layers: FirstLayers | None = None

    def engine(self, role: str) -> str:
        """Words for the engine of a side."""
        return (self.engines or {}).get(role, role)

    @property
    def both(self) -> str:
        """Words for both engines."""
        return f"{self.engine(INFER)} and {self.engine(TRAIN)}"

    @property
    def errors(self) -> list[Finding]:
        """Findings of error grade."""
        return [found for found in self.findings if found.level == ERROR]

    @property
    def rounding(self) -> Summary | None:
        """The rounding scale's line of the floors."""
        return (self.floor or {}).get("rounding")

    @property
    def is_routed(self) -> bool:
        """Whether experts were compared."""
        return bool(self.pair["routing"])

    @property
    def flip_words(self) -> str:
        """Share of tokens with a flip; empty without routing."""
        share = (self.pair["routing"] or {}).get("any_layer_share")
        return "" if share is None else f"{percent(share)} of tokens have a flip in some layer"

    @property
    def is_other(self) -> bool:
        """The engines compute different functions: most sequences differ in float32, or some rows by far."""
        is_far = self.layers is not None and self.layers.first is not None
        return self.function is not None and (self.function.is_same is False or is_far)

    @property
    def is_same(self) -> bool:
        """They compute the same function."""
        return self.function is not None and bool(self.function.is_same) and not self.is_other

    @property
    def worse(self) -> str:
        """Role of the engine that rounds worse; empty where neither does, or it was not measured."""
        if self.distances is None or not self.is_same:
            return ""
        ratio = self.distances.ratio  # comparisons with NaN, no interval, are false
        if ratio.low > WORSE or ratio.high < 1 / WORSE:
            return INFER if ratio.low > WORSE else TRAIN
        sides = [role for role in (INFER, TRAIN) if self.layers and self.layers.first_worse(role, WORSE) is not None]
        return sides[0] if len(sides) == 1 else ""


def causes(seen: Seen) -> list[Finding]:
    """Every rule that fired, likeliest first; what another fault brings with it by its nature stands behind that."""
    order = list(RULES)
    of_pair = sorted(_of_pair(seen), key=lambda found: order.index(found.rule))
    errors = [found for found in seen.findings if found.level == ERROR]
    # a warning about the capture may be the sign of a difference of functions: that one stands first
    others = [found for found in seen.findings if found.level != ERROR]
    found = _once(by_level([*errors, *of_pair, *others]))
    fired = {one.rule for one in found}

    def brought_by(rule: str) -> set[str]:
        return {one for one in fired if rule in RULES[one].companions and one not in RULES[rule].companions}

    first = [one for one in found if not brought_by(one.rule)]
    brought = [one for one in found if brought_by(one.rule)]
    for one in brought:
        behind = max((nth for nth, other in enumerate(first) if other.rule in brought_by(one.rule)), default=-1)
        first.insert(behind + 1, one)
    # an origin of a lower level stands where the first of what it brings would
    return sorted(first, key=lambda one: min(_rank(other.level) for other in (one, *brought)
                                             if other is one or one.rule in brought_by(other.rule)))  # fmt: skip


def _once(found: Sequence[Finding]) -> list[Finding]:
    """Each rule once, with how many more arms, pairs or layers it fired in."""
    by_rule: dict[str, list[Finding]] = {}
    for one in found:
        by_rule.setdefault(one.rule, []).append(one)
    return [
        some[0]
        if len(some) == 1
        else replace(some[0], message=f"{some[0].message}; {len(some) - 1} more such findings")
        for some in by_rule.values()
    ]


def _rank(level: str) -> int:
    return LEVELS.index(level)


def _of_pair(seen: Seen) -> Iterator[Finding]:
    if not seen.pair["logp"]["abs_logp_diff"]["max"]:  # nothing to explain
        return
    for rule in (_recorded, _repeating, _function, _rounding, _settings, _sequences, _weights, _replay, _near_ties):
        yield from rule(seen)


_RECORDED: Final = {
    SHIFTED: "D01-token-lag",
    OTHER_TOKENS: "D01-other-sequence",
    ROUNDED: "rounded-logp",
    TEMPERATURE: "D10-temperature",
    TRUNCATED: "D09-mean-ratio",
    OTHER_WEIGHTS: "D28-other-weights",
}
"""What is found of recorded rollouts -> the rule of that kind."""


def _recorded(seen: Seen) -> Iterator[Finding]:
    known = {found.rule for found in seen.findings}
    for fault in seen.recorded.faults if seen.recorded is not None else ():
        if (rule := _RECORDED[fault.name]) not in known:
            yield finding(rule, "recorded log-probabilities", fault.words)


def _repeating(seen: Seen) -> Iterator[Finding]:
    rounding = seen.rounding
    for side in (INFER, TRAIN):
        line = (seen.floor or {}).get(side)
        if line and rounding and low_of(line) > FAR * high_of(rounding):
            yield finding(
                "not-repeating", line["engine"],
                f"{line['engine']} scores the same tokens {sig(line['mean'])} nat away from its own first pass, "
                f"{sig(line['mean'] / rounding['mean'])} times what one unit in the last place does to this model",
                n_of=line["n_tokens"],
            )  # fmt: skip
    own = (seen.floor or {}).get("metrics", {}).get("abs_logp_diff.mean", {}).get("floor")
    bounds = seen.pair["logp"]["abs_logp_diff"]["mean_ci"]
    if own and bounds and bounds[1] <= own:
        yield finding(
            "D30-floor", seen.both, f"the mismatch is at most {sig(bounds[1])} nat, the floors {sig(own)} nat"
        )


def _function(seen: Seen) -> Iterator[Finding]:
    """Where two functions part: the first router that differs, and the rows in which it does."""
    function, layers, cut = seen.function, seen.layers, seen.first_layers
    if function is None and cut is not None and cut.function.is_same is False and not seen.weights:
        words = f"in float32, cut to {cut.part}, {seen.both} differ by {sig(cut.function.mean)} nat on average"
        yield finding("other-function", cut.part, words, n=cut.function.n_sequences - cut.function.n_agreeing,
                      n_of=cut.function.n_sequences)  # fmt: skip
    if function is None or not seen.is_other or seen.weights or is_doubtful_float32(seen):
        return
    routers = next((one for one in seen.findings if one.message.startswith(OTHER_LOGITS)), None)
    if routers is not None and (layers is None or layers.first is None or len(layers.frame) == 1):
        yield finding("D12-router", routers.where, routers.message)
        return
    if layers is None or layers.first is None:
        yield finding("other-function", function.pair, f"in float32 {seen.both} differ by {sig(function.mean)} nat "
                      f"on average, {sig(function.times)} times rounding; routers do not say where",
                      n=function.n_sequences - function.n_agreeing, n_of=function.n_sequences)  # fmt: skip
        return
    counted = {"n": layers.n_differing, "n_of": layers.n_rows}
    of = f"{layers.n_differing:,} of {layers.n_rows:,} rows"
    here = layers.place
    before = f"; {layers.before}" if layers.before else ""
    if layers.pattern == GATES:
        words = f"gate weights of the same experts differ in {of} of {here}, whose router logits agree{before}"
        yield finding("gate-formula", here, f"{words}; {layers.formula}", **counted)
    elif layers.pattern == SOME_EXPERTS:
        plural = "s" if len(layers.experts) > 1 else ""
        experts = f"expert{plural} {', '.join(map(str, layers.experts))} of {layers.below}"
        words = f"{of} differ at {here}: those since {experts} was chosen; all others agree"
        yield finding("expert-weights", layers.below, words, **counted)
    elif layers.pattern == SOME_SEQUENCES:
        names = ", ".join(map(str, layers.sequences[:5])) + (" and others" if len(layers.sequences) > 5 else "")
        words = f"{here} of sequences {names} differ ({of} in all), those of all other sequences agree{before}"
        yield replace(finding("D21-few-sequences", here, words, **counted), level=ERROR)
    elif layers.pattern == FROM_A_POSITION and layers.position is not None:
        words = f"rows agree at {here} up to position {layers.position - 1} and differ from there on ({of}){before}"
        yield finding("D19-change-point", here, words, **counted)
    elif layers.pattern == NOT_THE_FIRST:
        grows = layers.slope is not None and layers.slope >= GROWS
        how = f"more with every position (its power {sig(layers.slope)})" if grows else "from the second row on alike"
        words = (
            f"the first row of every sequence agrees at {here}, {of} differ {how}: it comes through attention{before}"
        )
        yield finding("D18-grows-with-position" if grows else "D17-attention-scale", here, words, **counted)
    elif not layers.is_behind_routers:
        words = f"router logits of {here} differ in {of}, also in first rows, which no attention moves{before}"
        yield finding("D12-router", here, words, **counted)
    elif len(layers.frame) > 1:
        yield finding("D29-head", here, f"every router agrees in float32, {here} of {of} do not", **counted)
    else:
        words = f"{here} of {of} differ in float32, and no router is there to say where"
        yield finding("other-function", here, words, **counted)


def is_doubtful_float32(seen: Seen) -> bool:
    """On an accelerator float32 may be TF32: a difference far below the one in use may be of that."""
    function, mean = seen.function, seen.pair["logp"]["abs_logp_diff"]["mean"]
    is_small = function is not None and function.mean is not None and bool(mean) and function.mean < mean / 4
    return seen.is_on_accelerator and is_small


def _rounding(seen: Seen) -> Iterator[Finding]:
    if not (side := seen.worse) or seen.distances is None:
        return
    own = seen.distances.infer if side == INFER else seen.distances.train
    other = seen.distances.train if side == INFER else seen.distances.infer
    engine, of_other = seen.engine(side), seen.engine(TRAIN if side == INFER else INFER)
    words = f"{engine} is {sig(own.value)} nat from the common function on average, {of_other} {sig(other.value)} nat"
    layer = seen.layers.first_worse(side, WORSE) if seen.layers is not None else None
    is_head = layer is not None and seen.layers is not None and layer == len(seen.layers.frame) - 1 > 0
    if layer is not None and seen.layers is not None:
        words += f"; it is farther first at {seen.layers.place_of(layer)}"
    found = finding("D29-head" if is_head else "rounds-worse", engine, words, n_of=seen.distances.n_tokens)
    yield replace(found, level=WARNING)  # rounding is no bug for certain


def _settings(seen: Seen) -> Iterator[Finding]:
    apart, bounds = seen.distances, seen.pair["logp"]["abs_logp_diff"]["mean_ci"]
    if apart is None or not seen.is_same or seen.worse or not bounds:
        return
    allowed = apart.infer.value + apart.train.value
    if seen.rounding and bounds[0] > FAR * allowed:
        yield finding("rollout-settings", seen.engine(INFER), f"the rollouts are {sig(bounds[0])} nat and more from "
                      f"train, the two engines {sig(allowed)} nat from the common function together")  # fmt: skip


def _sequences(seen: Seen) -> Iterator[Finding]:
    frame = seen.sequences
    if frame is None or len(frame) < 8:
        return
    mean_S = frame["abs_logp_diff_mean"]
    median = float(mean_S.median())
    odd = frame[mean_S > ODD * median] if median > 0 else frame[:0]
    if 0 < len(odd) <= max(1, _FEW * len(frame)):
        names = ", ".join(f"{row['seq_id']:.0f}" for _, row in odd.head(5).iterrows())
        yield finding("D21-few-sequences", seen.both, f"sequence{'s' if len(odd) > 1 else ''} {names} differ by "
                      f"{sig(float(odd['abs_logp_diff_mean'].max()))} nat on average, the median sequence by "
                      f"{sig(median)} nat", n=len(odd), n_of=len(frame))  # fmt: skip


def _weights(seen: Seen) -> Iterator[Finding]:
    if seen.weights:
        yield finding("D28-other-weights", seen.both, seen.weights)


def _replay(seen: Seen) -> Iterator[Finding]:
    replay = seen.replay
    if replay is None:
        return
    removed = replay["removed"]["abs_logp_diff.mean"]
    share, bounds = removed["share"], removed["share_ci"]
    if replay["is_broken"]:
        yield finding("D35-replay-without-effect", seen.engine(TRAIN), f"with infer's experts forced the mismatch is "
                      f"{sig(1 - share)} times as large", n_of=replay["n_tokens"])  # fmt: skip
    elif bounds and replay["layers"] is None and (bounds[0] > 0.5 or bounds[1] < 0.2):
        rule = "D23-routing" if bounds[0] > 0.5 else "D24-not-routing"
        yield finding(rule, seen.both, f"forcing infer's experts removes {percent(share)} of the mean mismatch "
                      f"[{percent(bounds[0])}, {percent(bounds[1])}]", n_of=replay["n_tokens"])  # fmt: skip


def _near_ties(seen: Seen) -> Iterator[Finding]:
    share = (seen.pair["routing"] or {}).get("any_layer_share")
    if share and seen.is_same and not seen.weights:
        yield finding("D13-near-ties", seen.both, f"{seen.flip_words}, all of them where both engines compute the same "
                      "function", n_of=seen.pair["routing"]["n_tokens"])  # fmt: skip


def ruled_out(seen: Seen, found: Sequence[Finding]) -> list[str]:
    """What was looked at and is not the cause, with the number that says so."""
    fired, lines = {one.rule for one in found}, []
    if not seen.errors:
        lines.append("a fault of the capture or the pipeline: the rules on rows, ids, gates and log-probabilities that "
                     "had what they need found no error")  # fmt: skip
    if seen.function is not None and seen.is_same:
        lines.append(f"another function: in float32 the engines differ by {sig(seen.function.times)} times rounding")
    if seen.layers is not None and seen.layers.before:
        lines.append(seen.layers.before)
    if seen.distances is not None and seen.is_same and not seen.worse:
        lines.append(f"one engine that rounds worse: {seen.engine(INFER)}'s distance from the function is "
                     f"{sig(seen.distances.ratio.value)} times {seen.engine(TRAIN)}'s")  # fmt: skip
    sides = [line for side in (INFER, TRAIN) if (line := (seen.floor or {}).get(side))]
    if seen.rounding and len(sides) == 2 and "not-repeating" not in fired:
        floors = " and ".join(f"{line['engine']} {sig(line['mean'])} nat" for line in sides)
        lines.append(f"an engine that does not repeat itself: {floors} from its own first pass")
    if not seen.is_routed and not (seen.pair.get("left_out") or {}).get("routing"):
        lines.append("routing: the model is dense")
    return lines


def untold(seen: Seen) -> list[dict[str, str]]:
    """What could not be looked at, with the command that would: ``words``, ``command``."""
    lines = []
    if seen.function is None and not seen.weights:
        lines.append(("whether both engines compute the same function", "moediag diagnose CKPT -o RUN"))
    elif seen.is_other and seen.modules is None:
        lines.append(("which module it is", "moediag diagnose CKPT -o RUN --modules"))
    if seen.rounding is None:
        lines.append(("what rounding alone does to this model", "moediag capture train-perturbed CKPT -o RUN"))
    for side in (INFER, TRAIN):
        if not (seen.floor or {}).get(side):
            lines.append((f"whether {seen.engine(side)} repeats itself", f"moediag capture {side}-repeat CKPT -o RUN"))
    if seen.is_routed and seen.replay is None:
        lines.append(("routing's share of the mismatch", "moediag capture train-replay CKPT -o RUN"))
    return [{"words": words, "command": command} for words, command in lines]


def low_of(line: Summary) -> float:
    """Low end of a floor's interval, or its mean."""
    return float(line["mean_ci"][0] if line.get("mean_ci") else line["mean"])


def high_of(line: Summary) -> float:
    """High end of a floor's interval, or its mean."""
    return float(line["mean_ci"][1] if line.get("mean_ci") else line["mean"])
