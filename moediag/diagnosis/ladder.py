"""The ladder: rungs that each change one thing, from what is static to what forced experts remove.

A rung's number means something only beside the rung below and the yardsticks: the sides' floors and the rounding scale
stand in the same row. A rung whose arms are not there says which command would make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.floors import FAR
from moediag.analysis.measures import abs_diff, abs_diff_other, k3, k3_other
from moediag.analysis.metrics import METRICS
from moediag.analysis.tokens import Tokens, TokenSource, beside
from moediag.diagnosis.recorded import HEALTHY
from moediag.frames import Column, declare, measured, with_ci
from moediag.notation import INFER, TRAIN
from moediag.numbers import sig
from moediag.run.reader import Run
from moediag.run.records import ArmRecord
from moediag.statistics.intervals import ratio_mean_interval

Summary = Mapping[str, Any]

EXACT, WITHIN, BEYOND, NOT_RUN = "bit-exact", "within rounding", "beyond rounding", "not run"
SAME, OTHER, SEEN = "same", "different", "measured"

LADDER = declare(
    "ladder",
    "rung of the ladder and pair",
    Column("rung", "str", "1", "L0 to L9: each rung changes one thing"),
    Column("rules_out", "str", "1", "what is ruled out where the rung holds", label="rules out"),
    Column("compared", "str", "1", "what was compared"),
    Column("pair", "str", "1", "name of the pair; empty where there is none"),
    *with_ci(measured("mean", "nat", "mean abs(logp_diff)")),
    measured("p99", "nat", "p99 of abs(logp_diff)"),
    measured(
        "yardstick", "nat", "mean abs(logp_diff) that rounding makes on the rung: what the number is held against"
    ),
    Column("n_tokens", "int64", "token", "tokens compared"),
    Column("finding", "str", "1", "bit-exact, within or beyond rounding, same, different, measured, or not run"),
    Column("says", "str", "1", "what the rung says; of one that was not run, the command that would"),
    Column("arms", "str", "1", "arms that only this rung needs; empty where there are none", label="own arms"),
    section="ladder",
    caption="The ladder: what each rung compares, its mean abs(logp_diff) beside rounding, and what it rules out",
)

REMEDIES = declare(
    "remedies",
    "change that an arm makes",
    Column("change", "str", "1", "what was changed"),
    Column("pair", "str", "1", "the pair with the change, beside the same tokens without it"),
    measured("mean_from", "nat", "mean abs(logp_diff) without", label="mean, from"),
    measured("mean_to", "nat", "mean abs(logp_diff) with", label="to"),
    *with_ci(measured("mean_times", "1", "mean with over mean without; below 1 is better", label="times")),
    measured("p99_from", "nat", "p99 without", label="p99, from"),
    measured("p99_to", "nat", "p99 with", label="to"),
    measured("k3_from", "nat", "k3 without", label="k3, from"),
    measured("k3_to", "nat", "k3 with", label="to"),
    *with_ci(measured("k3_times", "1", "k3 with over k3 without; below 1 is better", label="times")),
    Column(
        "flipped_from",
        "float64",
        "1",
        "tokens with a flip in any layer, without",
        nullable=True,
        label="tokens with a flip, from",
        kind="share",
    ),
    Column("flipped_to", "float64", "1", "such tokens with", nullable=True, label="to", kind="share"),
    Column("n_tokens", "int64", "token", "tokens scored with and without"),
    section="replay",
    caption="What each change that was tried would buy, on the same tokens; lower is better",
)


@dataclass(frozen=True)
class Rung:
    """One row of the ladder as it is built."""

    rung: str
    rules_out: str
    compared: str
    pair: str = ""
    finding: str = NOT_RUN
    says: str = ""
    yardstick: float | None = None
    arms: tuple[str, ...] = ()


def ladder(run: Run, pairs: Mapping[str, Summary], summary: Summary) -> pd.DataFrame:
    """The ladder of a run, as far as its arms go.

    Args:
        pairs: summaries by pair name.
        summary: ``floors``, ``function`` and ``weights`` as summary.json has them.

    Returns:
        Frame ``ladder``.
    """
    rows = []
    for rung in _rungs(run, pairs, summary):
        mean = pairs[rung.pair]["logp"]["abs_logp_diff"] if rung.pair in pairs else {}
        low, high = mean.get("mean_ci") or (None, None)
        rows.append({
            "rung": rung.rung, "rules_out": rung.rules_out, "compared": rung.compared, "pair": rung.pair,
            "mean": mean.get("mean"), "mean_ci_low": low, "mean_ci_high": high, "p99": mean.get("p99"),
            "yardstick": rung.yardstick, "n_tokens": pairs[rung.pair]["n_tokens"] if rung.pair in pairs else 0,
            "finding": rung.finding, "says": rung.says, "arms": ", ".join(rung.arms),
        })  # fmt: skip
    return LADDER.validate(pd.DataFrame(rows, columns=LADDER.names))


def _rungs(run: Run, pairs: Mapping[str, Summary], summary: Summary) -> list[Rung]:
    arms, floors, function = run.arms(), summary.get("floors") or {}, summary.get("function")
    train, infer = run.reference(TRAIN), run.reference(INFER)
    scale = (floors.get("rounding") or {}).get("mean")

    def variant(role: str, *changes: str) -> str:
        """The first complete arm that changes the reference arm of a role so; empty = none."""
        of = run.reference(role)
        found = (arm for arm in arms if run.arm(arm).variant_of == of and run.arm(arm).change in changes)
        return next(filter(run.is_complete, found), "")

    def compare(rung: Rung, arm: str, of: str, *own: str) -> Rung:
        """The rung with what two arms show; as it is where one is missing."""
        pair = run.pair_name(of, arm) if {arm, of} <= set(arms) else ""
        if pair not in pairs or not pairs[pair]["n_tokens"]:
            return rung
        finding, says = _against(pairs[pair], scale)
        return replace(rung, pair=pair, finding=finding, says=says, yardstick=scale, arms=own)

    train_again, infer_again = variant(TRAIN, "repeat", "batching"), variant(INFER, "repeat")
    rungs = [
        _static(run, summary),
        _alone(pairs.get(run.pair_name(train, infer))),
        compare(
            Rung("L2", "padding, batches (train floor)", "train against itself, in other batches",
                 says="moediag capture train-repeat CKPT -o RUN"),
            train_again, train, train_again,
        ),
        compare(
            Rung("L3", "atomics, batches (infer floor)", "infer against itself, in other batches",
                 says="moediag capture infer-repeat CKPT -o RUN"),
            infer_again, infer, infer_again,
        ),
    ]  # fmt: skip
    rungs.append(_in_float32(function, (train, infer), summary.get("first_layers")))
    is_decoded = infer in arms and run.arm(infer).path in ("sampled", "decode")
    if is_decoded:
        rescored = variant(INFER, "path")
        model = Rung("L4", "the same, in the precision in use", "infer prefilling, against train",
                     says="moediag capture infer-rescore CKPT -o RUN")  # fmt: skip
        decoding = Rung("L5", "decode kernels, KV dtype, chunked prefill", "infer decoding against infer prefilling",
                        says="moediag capture infer-rescore CKPT -o RUN")  # fmt: skip
        rungs += [compare(model, rescored, train), compare(decoding, rescored, infer, rescored)]
    way = "decoding" if is_decoded else "prefilling"
    in_use = Rung("L5" if is_decoded else "L4", "the whole, as captured", f"infer {way}, against train",
                  says="moediag capture infer CKPT -o RUN")  # fmt: skip
    rungs.append(compare(in_use, infer, train, infer, train))
    option = Rung("L6", "compile, topology, kernels", "infer with one option changed, against train",
                  says="moediag diagnose CKPT -o RUN --turn OPTION=VALUE")  # fmt: skip
    turned = [arm for arm in arms if run.arm(arm).change == "option" and run.is_complete(arm)]
    rungs += [
        compare(replace(option, compared=f"infer with {option_words(run, arm)}, against train"), arm, train, arm)
        for arm in turned
    ] or [option]
    production = next((arm for arm in arms if run.arm(arm).change == "observation"), "")
    rungs.append(compare(
        Rung("L7", "sampling parameters, logprobs mode, cache", "rollouts as they run, against observed",
             says="begin the run with moediag profile --production-rollouts"),
        production, infer, production,
    ))  # fmt: skip
    infers = [arm for arm in arms if run.arm(arm).role == INFER]
    recorded = next((arm for arm in infers if run.arm(arm).captured is None), "")
    ours = next((arm for arm in infers if run.arm(arm).captured is not None), "")
    rollouts = compare(
        Rung("L8", "alignment, staleness, weight sync", "recorded rollouts against own scores",
             says="moediag import FORMAT PATH -o RUN, then moediag capture infer CKPT -o RUN"),
        recorded, ours,
    )  # fmt: skip
    if explained := summary.get("recorded"):
        finding = OTHER if explained["faults"] else SAME if explained["name"] == HEALTHY else SEEN
        rollouts = replace(rollouts, finding=finding, says=explained["words"])
    rungs.append(rollouts)
    if run.routers:
        replayed = [arm for arm in arms if run.arm(arm).change == "replay" and run.is_complete(arm)]
        for arm in replayed or [""]:
            what = f"infer's experts forced on train{forced_layers(run, arm)}"
            rung = Rung("L9", "routing: the most that replay can buy", what,
                        says="moediag capture train-replay CKPT -o RUN")  # fmt: skip
            rungs.append(compare(rung, arm, infer, arm))
    return rungs


def _in_float32(function: Summary | None, references: tuple[str, str], first_layers: Summary | None) -> Rung:
    """L4 where rounding is smallest: do both engines compute the same function?"""
    rung = Rung("L4", "weights, rope, router, formula", "both engines in float32",
                says="moediag diagnose CKPT -o RUN")  # fmt: skip
    if not function and first_layers:
        return replace(rung, finding=OTHER if first_layers["is_same"] is False else SEEN, says=first_layers["words"])
    if not function:
        return rung
    says = f"{function['n_agreeing']} of {function['n_sequences']} sequences agree"
    says += f"; {sig(function['times'])} times one float32 unit in the last place" if function["times"] else ""
    says += f"; {function['note']}" if function["note"] else ""
    finding = {True: SAME, False: OTHER, None: SEEN}[function["is_same"]]
    own = tuple(arm for arm in function["pair"].split("~") if arm not in references)
    return replace(rung, pair=function["pair"], finding=finding, says=says, yardstick=function["scale"], arms=own)


def _against(pair: Summary, yardstick: float | None) -> tuple[str, str]:
    """The finding of a pair, and what it says."""
    mean = pair["logp"]["abs_logp_diff"]
    if mean["max"] == 0:
        return EXACT, "bit for bit the same"
    if not yardstick:
        return SEEN, "no rounding scale to hold it against: moediag capture train-perturbed CKPT -o RUN"
    low = mean["mean_ci"][0] if mean["mean_ci"] else mean["mean"]
    finding = BEYOND if low > FAR * yardstick else WITHIN
    return finding, f"{sig(mean['mean'] / yardstick)} times what one unit in the last place does"


def _static(run: Run, summary: Summary) -> Rung:
    """L0: weights, and rules of routers."""
    weights = (summary.get("weights") or {}).get("words")
    arms = [run.arm(name) for name in run.main_arms if name in run.arms()]
    rules = [line for arm in arms for line in arm.disagreements]
    differing = [*([weights] if weights else []), *rules]
    words = "; ".join(differing) if differing else "one checkpoint in both engines"
    if run.routers and not rules:
        shown = [arm for arm in arms if arm.routers and all(router.proof for router in arm.routers)]
        words += ", the routers' rules shown equal" if len(shown) == len(arms) else ""
    known = all(arm.checkpoint for arm in arms)
    finding = OTHER if differing else SAME if known else SEEN
    return Rung("L0", "wrong model, router rule", "checkpoints and router rules", "", finding,
                words if known or differing else "a dump does not say which weights it is of")  # fmt: skip


def _alone(pair: Summary | None) -> Rung:
    """L1: each engine alone."""
    compared = "each engine alone: perplexity of the tokens"
    if pair is None or not pair["n_tokens"]:
        return Rung("L1", "a broken backend", compared, says="no token was scored by both engines")
    values = {side: METRICS[f"ppl_{side}"].value(pair) for side in (INFER, TRAIN)}
    words = [f"{side} {sig(value)}" for side, value in values.items() if value is not None]
    words += [f"{pair['n_impossible']} impossible log-probabilities"] if pair["n_impossible"] else []
    return Rung("L1", "a broken backend", compared, "", SEEN, f"perplexity: {', '.join(words)}")


def option_words(run: Run, name: str) -> str:
    """The options of an engine that an arm changes, as they were given."""
    captured, reference = run.arm(name).captured, run.arm(run.reference(INFER)).captured
    ours, theirs = (one.configuration if one else {} for one in (captured, reference))
    changed = [f"{key}={ours[key]}" for key in sorted(ours) if ours[key] != theirs.get(key) and key != "path"]
    return ", ".join(changed) or "an option changed"


def forced_layers(run: Run, name: str) -> str:
    """Which MoE layers an arm forces experts in; empty where in all of them."""
    forced = (run.arm(name).facts.get("replay") or {}) if name else {}
    first, last = forced.get("first_layer"), forced.get("last_layer")
    if first is None and last is None:
        return ""
    return f" in MoE layers {first or 0} to {'the last' if last is None else last}"


def engine_seconds(run: Run, arms: Sequence[str]) -> float | None:
    """Engine time that arms took [s], loading aside; None where nothing is known of it."""
    times = [run.capture_sidecar(arm, shard).seconds for arm in arms for shard in run.shards_of(arm)]
    known = [one for one in times if one is not None]
    return float(sum(known)) if known else None


def remedies(run: Run, tokens: Mapping[str, TokenSource], pairs: Mapping[str, Summary], observed: str) -> pd.DataFrame:
    """What each change that an arm makes would buy: the mismatch without and with it, on the same tokens.

    Args:
        tokens: by pair.
        pairs: summaries by pair.
        observed: name of the pair without any change.

    Returns:
        Frame ``remedies``.
    """
    rows = []
    subtrahend, minuend = observed.split("~")
    for pair in pairs:
        ours, theirs = pair.split("~")
        changed = [run.arm(arm) for arm, own in ((theirs, minuend), (ours, subtrahend)) if arm != own]
        records = [run.arm(arm) for arm in (ours, theirs)]
        is_remedy = changed and all(one.change in _REMEDIES for one in changed)
        if observed not in tokens or pair not in tokens or not is_remedy or records[0].role == records[1].role:
            continue
        words = " and ".join(dict.fromkeys(_change_words(run, one) for one in changed))
        if (row := _bought(tokens[observed], tokens[pair])) is not None:
            rows.append({"change": words, "pair": pair, **row})
    return REMEDIES.validate(pd.DataFrame(rows, columns=REMEDIES.names))


_REMEDIES: Final = ("replay", "dtype", "router-dtype", "batching", "option")
"""Changes that somebody could make for good."""


def _change_words(run: Run, record: ArmRecord) -> str:
    side = "vLLM" if record.engine == "vllm" else record.engine
    if record.change == "replay":
        return f"routing replay: infer's experts forced in {side}{forced_layers(run, record.name)}"
    if record.change == "dtype":
        return f"{side} in {record.dtype}"
    if record.change == "option":
        return f"{side} with {option_words(run, record.name)}"
    perturbed = str(record.facts.get("perturbation") or record.change).removeprefix("router-")
    return f"routers of {side} in {perturbed}"


def _bought(without: TokenSource, with_: TokenSource) -> dict[str, Any] | None:
    """Metrics of the tokens that both pairs scored; ratios of means resampled by prompt as one statistic."""
    x = beside(without, with_)

    def flips(part: Tokens) -> NDArray[Any]:
        each = [part.column(name) for name in ("n_flipped_layers", "n_flipped_layers_other")]
        return np.array([[(n_T >= 0).sum(), (n_T > 0).sum()] for n_T in each])

    from_C, to_C, k3_from_C, k3_to_C = x.sums(abs_diff, abs_diff_other, k3, k3_other)
    n = len(x)
    if not n:
        return None
    mean = ratio_mean_interval(to_C, from_C, kind="positive").one()
    of_k3 = ratio_mean_interval(k3_to_C, k3_from_C, kind="positive").one()
    flipped_from, flipped_to = (float(some / known) if known else None for known, some in x.total(flips))
    return {
        "mean_from": float(from_C.sum() / n), "mean_to": float(to_C.sum() / n),
        "mean_times": mean.value, "mean_times_ci_low": mean.low, "mean_times_ci_high": mean.high,
        "p99_from": x.quantile(abs_diff, 0.99), "p99_to": x.quantile(abs_diff_other, 0.99),
        "k3_from": float(k3_from_C.sum() / n), "k3_to": float(k3_to_C.sum() / n),
        "k3_times": of_k3.value, "k3_times_ci_low": of_k3.low, "k3_times_ci_high": of_k3.high,
        "flipped_from": flipped_from, "flipped_to": flipped_to, "n_tokens": n,
    }  # fmt: skip
