"""The verdict on a run's main pair: is something wrong, where, what next; every word with the numbers behind it.

Three yardsticks, weakest first: what repeating does to each engine (floors), what one unit in the last place does to
this model (rounding scale), and whether both engines compute the same function in float32. Healthy is said only by the
last one; the second alone cannot exclude a fault smaller than rounding. *Whose* a difference of functions is, two
engines alone cannot tell; a third implementation can.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any, Final

from moediag.analysis.floors import FAR, is_mostly_exact, replay_words
from moediag.diagnosis.causes import (
    WORSE,
    Seen,
    Summary,
    high_of,
    is_doubtful_float32,
    ruled_out,
    untold,
)
from moediag.diagnosis.causes import causes as all_causes
from moediag.diagnosis.function import SAME, FunctionTest
from moediag.diagnosis.modules import unlike_words
from moediag.hygiene.findings import Finding
from moediag.hygiene.rules import DIAGNOSIS, ERROR, RULES
from moediag.notation import INFER, TRAIN
from moediag.numbers import sig

BIT_EXACT = "bit-exact"
SAME_FUNCTION = "same function, rounding only"
ROUNDS_WORSE = "same function, one engine rounds worse"
OTHER_FUNCTION = "different function"
FAULT = "capture or pipeline fault"
REPEATING, ABOVE_REPEATING = "no larger than repeating", "above repeating"
ROUNDING, ABOVE_ROUNDING = "no larger than rounding", "above rounding"
NOT_REPEATING, CANNOT_TELL = "does not repeat itself", "cannot tell"

TONES: Final = {
    **dict.fromkeys((BIT_EXACT, SAME_FUNCTION, REPEATING), "good"),
    **dict.fromkeys((ABOVE_REPEATING, ABOVE_ROUNDING, ROUNDS_WORSE), "warn"),
    **dict.fromkeys((OTHER_FUNCTION, FAULT, NOT_REPEATING), "bad"),
    **dict.fromkeys((ROUNDING, CANNOT_TELL), "calm"),
}
"""The words of a verdict: nothing to mend, something to look at, something wrong, not known."""

DIAGNOSE: Final = "moediag diagnose CKPT -o RUN"
MODULES: Final = "moediag diagnose CKPT -o RUN --modules"
THIRD_PARTY: Final = "moediag diagnose CKPT -o RUN --reference FOLDER"
VALIDATE: Final = "moediag validate RUN"
SIMULATE: Final = "moediag simulate RUN"


def verdict(seen: Seen) -> dict[str, Any]:
    """The verdict: ``word``, ``tone``, ``reason`` (is something wrong), ``where``, ``next`` (words and commands),
    ``evidence`` (lines); ``causes`` (findings, likeliest first), ``ruled_out`` (lines), ``untold`` (words and command);
    and ``weights`` where the two arms loaded other weights: then the mismatch is of these, too.

    In commands CKPT stands for the checkpoint and RUN for the run's folder.
    """
    causes = all_causes(seen)
    found = _verdict(seen, causes) | {
        "evidence": _evidence(seen),
        "causes": [one.record() for one in causes],
        "ruled_out": ruled_out(seen, causes),
        "untold": untold(seen),
    }
    found["tone"] = TONES[found["word"]]
    return {**found, "weights": seen.weights} if seen.weights else found


def _verdict(seen: Seen, causes: Sequence[Finding]) -> dict[str, Any]:
    mean = seen.pair["logp"]["abs_logp_diff"]
    if seen.errors:
        n = len(seen.errors)
        first = seen.errors[0]
        reason = f"validation found {n} error{'' if n == 1 else 's'} in the capture, first: {first.line()}"
        return _words(FAULT, reason, "in the recorded data: no number of this page means what it says",
                      "every finding with its cause and next check", VALIDATE)  # fmt: skip
    if mean["mean"] is None:
        return _words(CANNOT_TELL, "no token was scored by both engines", "", "what was captured, row by row", VALIDATE)
    if mean["max"] == 0:
        return _words(
            BIT_EXACT, "both engines give the same log-probabilities, bit for bit", "nowhere", "nothing to do"
        )
    if seen.recorded is not None and seen.recorded.faults:
        likely = "; ".join(dict.fromkeys(fault.cause for fault in seen.recorded.faults))
        return _words(FAULT, seen.recorded.words, f"in the recorded log-probabilities: {likely}",
                      seen.recorded.next_check)  # fmt: skip
    fired = {one.rule: one for one in causes}
    if (repeats := fired.get("not-repeating")) is not None:
        return _words(NOT_REPEATING, repeats.message, f"in {repeats.where}: kernels, state or memory",
                      f"find out why {repeats.where} does not repeat itself before comparing it with anything: other "
                      "batches, eager execution, no cache", VALIDATE)  # fmt: skip
    if seen.function is not None and not seen.weights:
        if seen.is_other:
            return _other_function(seen, seen.function, causes)
        if seen.is_same:
            return _same_function(seen, seen.function, causes)
    cut = seen.first_layers if seen.function is None and not seen.weights else None
    if seen.modules is not None and seen.modules.is_off and not seen.weights:
        reason = f"on the same inputs a module of {seen.both} differs by more than rounding"
        return _words(OTHER_FUNCTION, reason, f"{seen.modules.first}. {_whose(seen)}", *_third_party(seen))
    if cut is not None and cut.function.is_same is False:
        found = _other_function(seen, cut.function, causes)
        return {**found, "reason": f"cut to {cut.part}: {found['reason']}"}
    return _by_scale(seen)


def _other_function(seen: Seen, function: FunctionTest, causes: Sequence[Finding]) -> dict[str, Any]:
    mean = seen.pair["logp"]["abs_logp_diff"]["mean"]
    how = "choose other experts at no near tie" if function.mean is None else f"still differ by {_nat(function.mean)}"
    times = "" if function.times is None else f", {sig(function.times)} times that"
    reason = (
        seen.layers.words
        if function.is_same is not False and seen.layers is not None
        else (
            f"in float32, where rounding makes {sig(function.scale)} nat, {seen.both} {how}{times} "
            f"({function.n_sequences - function.n_agreeing} of {function.n_sequences} sequences differ by more than "
            f"{SAME:g} times rounding; as the engines run they differ by {sig(mean)} nat)"
        )
    )
    if is_doubtful_float32(seen):
        note = "; on an accelerator float32 may be TF32 or an attention kernel of less, which looks like this"
        then = "turn TF32 off in both engines and capture the float32 arms again"
        return _words(CANNOT_TELL, reason + note, "", then, DIAGNOSE)
    if seen.modules is not None and seen.modules.is_off:
        return _words(OTHER_FUNCTION, reason, f"{seen.modules.first}. {_whose(seen)}", *_third_party(seen))
    local = next((one for one in causes if RULES[one.rule].needs == DIAGNOSIS and one.level == ERROR), None)
    if local is None or local.rule in ("other-function", "not-repeating"):
        where = "no router tells; the modules have to be compared one by one"
    else:
        where = f"{local.message}. Likely: {local.cause}"
    if seen.modules is not None:  # and none of them is off
        where = f"in no module that could be compared ({seen.modules.first}); {where}"
        return _words(OTHER_FUNCTION, reason, f"{where}. {_whose(seen)}", *_third_party(seen))
    then = "compare module by module on the same inputs"
    return _words(OTHER_FUNCTION, reason, f"{where}. {_whose(seen)}", then, MODULES)


def _whose(seen: Seen) -> str:
    words = seen.whose.words if seen.whose is not None else ""
    return words or "Which engine is wrong two engines cannot tell (a third can: --reference FOLDER)"


def _third_party(seen: Seen) -> tuple[str, ...]:
    """What to do next about a module that differs."""
    if seen.whose is not None and seen.whose.side is not None:
        return (f"read that module in {seen.engine(seen.whose.side)} beside the config keys that it uses",)
    read = "read that module in both engines beside the config keys that it uses"
    if seen.whose is not None and seen.whose.arm is not None:
        return (read,)
    more = f"{read}; the publisher's own code, or another implementation, tells whose it is"
    return more, THIRD_PARTY


def _same_function(seen: Seen, function: FunctionTest, causes: Sequence[Finding]) -> dict[str, Any]:
    agreed = (
        f"{seen.both} compute the same function: in float32 they differ by {_nat(function.mean)} on average, "
        f"{sig(function.times)} times what one float32 unit in the last place does ({function.n_sequences} sequences, "
        f"{function.n_tokens:,} tokens)"
    )
    apart = seen.distances
    if apart is None:
        return _words(SAME_FUNCTION, agreed, "nowhere: both run in float32", "nothing to mend")
    rounding = seen.rounding
    side = seen.worse
    if side:
        other = TRAIN if side == INFER else INFER
        value = (apart.infer if side == INFER else apart.train).value
        lines = unlike_words(seen.modules.frame) if seen.modules is not None else []
        unlike = [line for line in lines if f" in {seen.engine(side)}: " in line]
        if unlike:
            return _words(
                OTHER_FUNCTION, f"{agreed}; in the precision in use {seen.engine(side)} is {_nat(value)} away from it",
                f"in {seen.engine(side)}, which does there what it does not in float32: {unlike[0]}",
                "read that module for what it does in this dtype only; another dtype is the way around it", MODULES,
            )  # fmt: skip
        scale = f", {sig(value / rounding['mean'])} times what one unit in the last place does" if rounding else ""
        return _words(
            ROUNDS_WORSE, agreed,
            f"in {seen.engine(side)}, which rounds {_nat(value)} away from it{scale}: something there is kept in fewer "
            f"bits than in {seen.engine(other)} (router, head, KV cache, quantised activations)",
            *_rounding_next(seen),
        )  # fmt: skip
    settings = next((one for one in causes if one.rule == "rollout-settings"), None)
    if settings is not None:
        return _words(
            ABOVE_ROUNDING, f"{agreed}; but {settings.message}",
            "in the settings that rollouts run with (sampling, cache, graphs), not in the model",
            "turn the rollouts' settings off one by one", VALIDATE,
        )  # fmt: skip
    where = f"nowhere: rounding, amplified by near-tie routing ({seen.flip_words})" if seen.flip_words else "nowhere"
    then = "nothing to mend in either engine; to see what a correction would do to these tokens"
    return _words(SAME_FUNCTION, agreed, where, then, SIMULATE)


def _rounding_next(seen: Seen) -> tuple[str, ...]:
    """What to do about an engine that rounds worse: its modules, or to compare them."""
    if seen.modules is None:
        return "compare the dtypes of both sides, then module by module on the same inputs", MODULES
    found = [line for line in seen.modules.further if "rounds more" in line]
    return (f"look at {'; '.join(found)}" if found else "no single module rounds more: look at the KV cache and head",)


def _by_scale(seen: Seen) -> dict[str, Any]:
    """Without a word from float32: by what repeating and rounding do."""
    mean = seen.pair["logp"]["abs_logp_diff"]
    untold = seen.function.note if seen.function is not None else "no float32 arms"
    if seen.function is None and seen.first_layers is not None:
        untold = seen.first_layers.words
    if seen.function is not None and seen.function.differing:
        untold += f" (sequences {', '.join(map(str, seen.function.differing))})"
    if mean["mean_ci"] is None:
        reason = f"the mismatch of {sig(mean['mean'])} nat has no interval (too few prompts)"
        return _words(CANNOT_TELL, reason, "", "more prompts, and both engines in float32", DIAGNOSE)
    low, high = mean["mean_ci"]
    own = (seen.floor or {}).get("metrics", {}).get("abs_logp_diff.mean", {})
    if own.get("floor") is not None and high <= own["floor"]:
        return _words(REPEATING, "each engine differs from itself by as much", "nowhere", "nothing to mend", SIMULATE)
    if (rounding := seen.rounding) is not None:
        times = f"{mean['mean'] / rounding['mean']:.3g} times what one unit in the last place does to this model"
        if low <= FAR * high_of(rounding):
            reason = (
                f"the mismatch is {times}, and two engines round in every module: up to {FAR:g} times is ordinary; "
                f"a fault below that cannot be excluded ({untold})"
            )
            return _words(ROUNDING, reason, "", "do both engines compute the same function in float32?", DIAGNOSE)
        return _words(ABOVE_ROUNDING, f"the mismatch is {times}: rounding does not make that", "",
                      "do both engines compute the same function in float32?", DIAGNOSE)  # fmt: skip
    if own.get("floor") is None:
        return _words(CANNOT_TELL, "neither floor nor rounding scale was measured", "", "measure them", DIAGNOSE)
    if own["note"]:
        return _words(CANNOT_TELL, f"half a noise floor only: {own['note']}", "", "measure the other side", DIAGNOSE)
    if low > own["floor"]:
        reason = "the engines differ by more than each from itself; whether that is ordinary rounding was not measured"
        return _words(ABOVE_REPEATING, reason, "", "measure the rounding scale and float32", DIAGNOSE)
    return _words(CANNOT_TELL, "the interval of the mean contains the floor", "", "more prompts would tell", DIAGNOSE)


def _words(word: str, reason: str, where: str, then: str, *commands: str) -> dict[str, Any]:
    return {"word": word, "reason": reason, "where": where, "next": {"words": then, "commands": list(commands)}}


def _nat(value: float | None) -> str:
    return f"{sig(value)} nat"


def _evidence(seen: Seen) -> list[str]:
    """What carries the verdict: the yardsticks, flips, and what forcing the experts removes."""
    lines, pair, floor = _distance_words(seen), seen.pair, seen.floor
    lines += seen.whose.evidence if seen.whose is not None else ()
    lines += [seen.first_layers.words] if seen.first_layers is not None else []
    mean, rounding = pair["logp"]["abs_logp_diff"]["mean"], seen.rounding
    if rounding:
        times = f": the mismatch is {mean / rounding['mean']:.3g} times that" if mean and rounding["mean"] else ""
        change = "router inputs" if seen.is_routed else "every block's hidden state"
        lines.append(f"rounding scale: one unit in the last place on {change} makes {_mean_words(rounding)}{times}")
    for side in (INFER, TRAIN):
        if line := (floor or {}).get(side):
            lines.append(f"floor of {side}, {line['engine']} against itself: {_floor_words(line)}")
    ratio = (floor or {}).get("metrics", {}).get("abs_logp_diff.mean", {}).get("ratio")
    if ratio is not None:
        lines.append(f"the mismatch is {ratio:.3g} times the sum of both floors")
    if seen.flip_words:
        lines.append(seen.flip_words)
    if not seen.is_routed:
        reason = (pair.get("left_out") or {}).get("routing")
        lines.append(f"routing left out: {reason}" if reason else "dense model: routing is no cause here")
    return lines + replay_words(seen.replay)


def _distance_words(seen: Seen) -> list[str]:
    """How far each engine rounds away from the function."""
    apart = seen.distances
    if apart is None or not seen.is_same:
        return []
    ratios = [
        f"{sig(ratio.value)}"
        + (f" [{sig(ratio.low)}, {sig(ratio.high)}]" if ratio.low < ratio.high else "")
        + f" {what}"
        for what, ratio in (("in the mean", apart.mean_ratio), ("on a typical token", apart.ratio))
    ]
    return [
        f"against its own float32 {seen.engine(INFER)} differs by {sig(apart.infer.value)} nat on average, "
        f"{seen.engine(TRAIN)} by {sig(apart.train.value)} nat: a ratio of {', '.join(ratios)} (n = {apart.n_tokens:,} "
        f"tokens; up to {WORSE:g} either way is ordinary)"
    ]


def _floor_words(line: Summary) -> str:
    if line["is_bit_exact"]:
        return f"bit-exact (n = {line['n_tokens']:,} tokens)"
    share = line["bit_exact_share"]
    exact = "" if share is None else f"; bit-exact on {100 * share:.3g} % of tokens"
    exact += ", so no multiple of it is shown" if is_mostly_exact(line) else ""
    return f"{_mean_words(line)}{exact}"


def _mean_words(line: Summary) -> str:
    bounds = f" [{line['mean_ci'][0]:.3g}, {line['mean_ci'][1]:.3g}]" if line["mean_ci"] else ""
    return f"mean abs logp diff {line['mean']:.3g} nat{bounds} (n = {line['n_tokens']:,} tokens)"


def next_commands(summary: Summary, run: str) -> list[str]:
    """The commands that a summary's verdict gives next, as a shell takes them.

    Args:
        run: the run's folder; ``RUN`` where it has none.
    """
    checkpoint = str((summary.get("model") or {}).get("path") or "CKPT")
    given = ((summary.get("verdict") or {}).get("next") or {}).get("commands") or ()
    known = {"RUN": shlex.quote(run), "CKPT": shlex.quote(checkpoint)}
    return [re.sub(r"\b(RUN|CKPT)\b", lambda match: known[match[0]], str(one)) for one in given]
