"""Two yardsticks beside the mismatch: what each engine does against itself, and what rounding does to this model.

**Floor**: an engine against itself. It says whether repeating is exact. **Rounding scale**: the smallest change of
arithmetic there is, one unit in the last place, carried through the model. It says what is ordinary.

Invariants:
    - the floor of a mean (or of a rate of differing sets) is the sum of both sides' floors: the triangle bound. Tails
      and divergences obey no such bound, so the larger side is shown and named so;
    - a floor of exactly 0 is *bit-exact*; a side that was not measured makes no floor of 0;
    - a multiple of a floor is shown only where the side that makes it differs from itself on most of its tokens: else
      the multiple counts how often two batches happen to be bit-equal, which moves with the number of threads.

Source: ours, from the triangle inequality of mean distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moediag.analysis.metrics import METRICS, Metric
from moediag.notation import INFER, TRAIN
from moediag.run.reader import Run
from moediag.run.recipes import ENGINE_WORDS, RECIPES

NOISE_CHANGES: Final = ("perturbation", "dtype", "router-dtype")
"""Changes of one engine on purpose; of those, a perturbation is the rounding scale."""
OWN_CHANGES: Final = ("repeat", "path", "observation", "checkpoint", "engine", "batching", *NOISE_CHANGES)
"""Changes that are compared with the arm they are made of; forced routes (``replay``) are compared across engines."""

MOSTLY: Final = 0.5
"""A floor that is exactly 0 on more than this share of its tokens gives no multiple ("most tokens")."""
FAR: Final = 2.0
"""Rounding scales from which on a mismatch, or a floor, is no longer put down to rounding. Ours: the scale is of one
change, at the routers, while two engines round on their own in every module; the demo's healthy MoE pair differs by
1.1 scales, and floors of healthy engines on CPU are 0 to 0.1."""

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """An arm beside the arm of its own side that it repeats or changes.

    Args:
        arm, of: both arms' names.
        role, change: as in :class:`~moediag.run.records.ArmRecord`.
        engine: as words say it.
        words: what is different.
        is_beside_main: it is of the engine of the main pair's arm of its role, whose floor it can be.
    """

    arm: str
    of: str
    role: str
    change: str
    engine: str
    words: str
    is_beside_main: bool = True

    @property
    def pair(self) -> str:
        """Name of the pair of the two, the arm changed as subtrahend."""
        return f"{self.arm}~{self.of}"


def variants(run: Run, arms: Sequence[str]) -> list[Variant]:
    """The variants among the arms whose own arm is among them, in the order of the recipes, then by name."""
    listed, found = list(RECIPES), []
    compared = {run.arm(arm).role: run.arm(arm).engine for arm in run.main_arms if arm in arms}
    for arm in arms:
        record = run.arm(arm)
        if record.variant_of in arms and record.change in OWN_CHANGES:
            recipe = record.captured.recipe if record.captured else ""
            rank = listed.index(recipe) if recipe in listed else len(listed)
            engine = ENGINE_WORDS.get(record.engine, record.engine)
            words = f"{engine}: {record.change} of {record.variant_of}"
            if record.change == "checkpoint":
                source = run.checkpoint_of(arm)
                words = f"{engine} with other weights ({source.source if source else 'not recorded'})"
            elif recipe in RECIPES:
                words = RECIPES[recipe].words
            is_beside_main = compared.get(record.role, record.engine) == record.engine
            variant = Variant(
                arm, str(record.variant_of), record.role, str(record.change), engine, words, is_beside_main
            )
            found.append(((rank, arm), variant))
    return [variant for _, variant in sorted(found, key=lambda entry: entry[0])]


def floors(pairs: Mapping[str, Summary], main: str, own: Sequence[Variant]) -> dict[str, Any] | None:
    """Floors and rounding scale of every headline metric of a run's main pair.

    Args:
        pairs: summaries by pair name, as :func:`~moediag.results.pair_summary.pair_summary` gives them.
        main: name of the pair that they stand beside.
        own: arms compared with the arm of their own side, of which floors and scales are made.

    Returns:
        ``train`` and ``infer`` (the arm that gives each side's floor, or None), ``rounding`` (the arm that gives the
        rounding scale, or None), ``metrics`` (floor and its interval, each side's part, rule, ratio of the value to
        the floor, rounding scale), ``decode_vs_prefill``, ``forced_settings`` (rollouts with their own settings
        against the same tokens decoded under those that capture forces) and ``noise``; None when nothing was measured.
    """

    varied = {variant.arm for variant in own}  # a variant of one of these is no yardstick of the main pair

    def lines(role: str, *changes: str) -> list[dict[str, Any]]:
        near = [one for one in own if one.role == role and one.is_beside_main and one.of not in varied]
        some = (variant for change in changes for variant in near if variant.change == change)
        return [line for variant in some if (line := _line(pairs, variant))]

    sides = {side: next(iter(lines(side, "repeat")), None) for side in (TRAIN, INFER)}
    rescored, forced = (next(iter(lines(INFER, change)), None) for change in ("path", "observation"))
    noise = lines(TRAIN, *NOISE_CHANGES)
    if not any((*sides.values(), rescored, noise, forced)):
        return None
    rounding = next(iter(lines(TRAIN, "perturbation")), None)
    floored = (metric for metric in METRICS.values() if metric.floor)
    metrics = {metric.name: _metric_floor(metric, pairs[main], pairs, sides, rounding) for metric in floored}
    return {
        **sides,
        "rounding": rounding,
        "metrics": metrics,
        "decode_vs_prefill": rescored,
        "forced_settings": forced,
        "noise": noise,
    }


def metric_value(pair: Summary, name: str) -> float | None:
    """A metric of a pair's summary by its name; None where there is none."""
    return METRICS[name].value(pair)


def _line(pairs: Mapping[str, Summary], variant: Variant) -> dict[str, Any] | None:
    """One A/A pair in a line; None when it was not captured or shares no scored token."""
    pair = pairs.get(variant.pair)
    if pair is None or not pair["n_tokens"]:
        return None
    largest, flip_rate = metric_value(pair, "abs_logp_diff.max"), metric_value(pair, "flip_rate")
    return {
        "arm": variant.arm,
        "pair": variant.pair,
        "engine": variant.engine,
        "what": variant.words,
        "is_bit_exact": largest == 0 and not flip_rate,
        "bit_exact_share": metric_value(pair, "bit_exact_share"),
        "n_tokens": pair["n_tokens"],
        **{key: metric_value(pair, f"abs_logp_diff.{key}") for key in ("mean", "p99", "max")},
        "mean_ci": METRICS["abs_logp_diff.mean"].bounds(pair),
        "flip_rate": flip_rate,
        "any_layer_share": metric_value(pair, "any_layer_share"),
    }


def _metric_floor(
    metric: Metric,
    main: Summary,
    pairs: Mapping[str, Summary],
    sides: Mapping[str, Summary | None],
    rounding: Summary | None,
) -> dict[str, Any]:
    measured = {side: pairs[line["pair"]] for side, line in sides.items() if line is not None}
    parts = {side: value for side, pair in measured.items() if (value := metric.value(pair)) is not None}
    floor, bounds, above = None, None, None
    if parts:
        intervals = {side: _interval(measured[side], metric, value) for side, value in parts.items()}
        largest = max(parts, key=lambda side: parts[side])
        floor, bounds = parts[largest], intervals[largest]
        if metric.floor == "sum":
            known = [ends for ends in intervals.values() if ends]
            floor = sum(parts.values())
            bounds = [sum(ends) for ends in zip(*known, strict=True)] if len(known) == len(parts) else None
        value = metric.value(main)
        if floor != metric.best and value is not None and not is_mostly_exact(sides[largest]):
            above = (value - metric.best) / (floor - metric.best)
    missing = [side for side in sides if side not in parts]
    return {
        "floor": floor,
        "floor_ci": bounds,
        **{side: parts.get(side) for side in sides},
        "rule": metric.floor,
        "is_bit_exact": all(line is not None and line["is_bit_exact"] for line in sides.values()),
        "ratio": above,
        "rounding": None if rounding is None else metric.value(pairs[rounding["pair"]]),
        "note": f"{' and '.join(missing)} side not measured" if missing else "",
    }


def _interval(pair: Summary, metric: Metric, value: float) -> list[float] | None:
    """Interval of a side's part; a side that repeats itself bit for bit adds exactly 0."""
    is_exact = metric_value(pair, "abs_logp_diff.max") == 0 and value == metric.best
    return [value, value] if is_exact else metric.bounds(pair)


def is_mostly_exact(line: Summary | None) -> bool:
    """Whether an engine repeated itself bit for bit on most tokens."""
    share = None if line is None else line.get("bit_exact_share")
    return share is not None and share > MOSTLY


def replay_words(replay: Summary | None) -> list[str]:
    """What forcing infer's experts on train removes, in one line; nothing without a replay arm.

    No share is called routing's part, and none is a bound: forcing also removes what flips set off later, and of two
    independent parts of equal size the mean loses 29 % with one of them, the variance 50 %.
    """
    removed = {name: part["share"] for name, part in (replay or {}).get("removed", {}).items()}
    mean = removed.get("abs_logp_diff.mean")
    if replay is None or mean is None:
        return []
    if replay["is_broken"]:
        return [
            f"the replay is broken: with infer's experts forced the mean is {1 - mean:.3g} times as large, which no "
            "routing does; look for shifted rows or layers, or gate weights of another scale (moediag validate RUN)"
        ]
    ends = replay["layers"]
    where = "all MoE layers" if ends is None else f"MoE layers {ends[0]} to {ends[1]} only"
    words = [f"{100 * share:.3g} % of {_REMOVED[name]}" for name, share in removed.items() if share is not None]
    return [f"forcing infer's experts on train in {where} removes {', '.join(words)}"]


_REMOVED: Final = {
    "abs_logp_diff.mean": "the mean abs logp diff",
    "abs_logp_diff.p99": "its p99",
    "kl_infer_train_k3": "k3",
}
"""Metrics whose reduction by replay is shown."""
