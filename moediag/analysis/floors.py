"""Noise floors: what each engine does against itself, beside what the engines do against each other.

Invariants:
    - the floor of a mean (or of a rate of differing sets) is the sum of both sides' floors: the triangle bound. Tails
      and divergences obey no such bound, so the larger side is shown and named so;
    - a floor of exactly 0 is *bit-exact* and gives no ratio; a side that was not measured makes no floor of 0.

Source: ours, from the triangle inequality of mean distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moediag.notation import ARMS, INFER, INFER_PRODUCTION, TRAIN, engine_side, pair_name

SUMMED: Final = ("abs_logp_diff.mean", "abs_prob_diff.mean", "flip_rate", "any_layer_share", "abs_log_ratio_mean")
"""Means of a distance (of tokens, choices or whole responses), for which the triangle bound holds."""
LARGER: Final = (
    "abs_logp_diff.p50", "abs_logp_diff.p90", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k2",
    "kl_infer_train_k3", "extreme_share_2", "prob_mult_error", "masked_share",
)  # fmt: skip
"""Tails and divergences: the larger side, beside which the pair is to be read."""
_AT_BEST: Final = {"prob_mult_error": 1.0}  # value of perfect agreement where it is not 0
_PLACES: Final = {
    "flip_rate": ("routing", "flip_rate"),
    "any_layer_share": ("routing", "any_layer_share"),
    "abs_log_ratio_mean": ("length", "abs_log_ratio_mean"),
    "masked_share": ("corrections", "icepop_0.5_5.0", "masked_share"),
}
"""Where a metric stands in a pair's summary, if not by its dotted name under ``logp``."""

# The first that was captured: other batches say more than the same once again.
FLOOR_ARMS: Final = {TRAIN: ("train-repeat",), INFER: ("infer-repeat", "infer-redecode")}
RESCORED: Final = "infer-rescore"
NOISE_ARMS: Final = ("train-perturbed", "train-fp32", "train-router-fp32", "train-router-fp8")

Summary = Mapping[str, Any]


def own_side_pairs(arms: list[str]) -> list[tuple[str, str]]:
    """A/A pairs among the arms: each further arm with the main arm of its own engine."""
    known = {*FLOOR_ARMS[TRAIN], *FLOOR_ARMS[INFER], RESCORED, INFER_PRODUCTION, *NOISE_ARMS}
    return [(engine_side(arm), arm) for arm in arms if arm in known and engine_side(arm) in arms]


def floors(pairs: Mapping[str, Summary], is_prefilled: bool) -> dict[str, Any] | None:
    """Floors of every headline metric of infer~train.

    Args:
        pairs: summaries by pair name, as :func:`~moediag.analysis.summary.pair_summary` gives them.
        is_prefilled: the infer arm scored by prefill, so that prefilling again is its floor.

    Returns:
        ``train`` and ``infer`` (the arm that gives each side's floor, or None), ``metrics`` (floor, each side's part,
        rule, ratio of the value to the floor), ``decode_vs_prefill``, ``observation`` (unobserved rollouts against
        the same tokens decoded again, observed) and ``noise``; None when nothing was measured.
    """
    infer_arms = (*FLOOR_ARMS[INFER], *([RESCORED] if is_prefilled else []))
    sides = {TRAIN: _side(pairs, TRAIN, FLOOR_ARMS[TRAIN]), INFER: _side(pairs, INFER, infer_arms)}
    rescored = None if is_prefilled else _line(pairs, INFER, RESCORED)
    noise = [line for arm in NOISE_ARMS if (line := _line(pairs, TRAIN, arm))]
    if not any((*sides.values(), rescored, noise, _line(pairs, INFER, INFER_PRODUCTION))):
        return None
    main = pairs[pair_name(TRAIN, INFER)]
    return {
        **sides,
        "metrics": {metric: _metric_floor(metric, main, pairs, sides) for metric in (*SUMMED, *LARGER)},
        "decode_vs_prefill": rescored,
        "observation": _line(pairs, INFER, INFER_PRODUCTION),
        "noise": noise,
    }


def metric_value(pair: Summary, metric: str) -> float | None:
    """A headline metric of a pair's summary by its dotted name; None where there is none."""
    value: Any = pair
    for key in _PLACES.get(metric, ("logp", *metric.split("."))):
        value = None if value is None else value.get(key)
    return None if value is None else float(value)


def _side(pairs: Mapping[str, Summary], main: str, arms: tuple[str, ...]) -> dict[str, Any] | None:
    lines = (_line(pairs, main, arm) for arm in arms)
    return next((line for line in lines if line), None)


def _line(pairs: Mapping[str, Summary], main: str, arm: str) -> dict[str, Any] | None:
    """One A/A pair in a line; None when it was not captured or shares no scored token."""
    name = pair_name(main, arm)
    pair = pairs.get(name)
    if pair is None or not pair["n_tokens"]:
        return None
    largest, flip_rate = metric_value(pair, "abs_logp_diff.max"), metric_value(pair, "flip_rate")
    return {
        "arm": arm,
        "pair": name,
        "what": ARMS[arm],
        "is_bit_exact": largest == 0 and not flip_rate,
        "n_tokens": pair["n_tokens"],
        **{key: metric_value(pair, f"abs_logp_diff.{key}") for key in ("mean", "p99", "max")},
        "flip_rate": flip_rate,
        "any_layer_share": metric_value(pair, "any_layer_share"),
    }


def _metric_floor(
    metric: str, main: Summary, pairs: Mapping[str, Summary], sides: Mapping[str, Summary | None]
) -> dict[str, Any]:
    best = _AT_BEST.get(metric, 0.0)
    parts = {side: None if line is None else metric_value(pairs[line["pair"]], metric) for side, line in sides.items()}
    known = [part for part in parts.values() if part is not None]
    floor = None
    if known:
        floor = sum(known) if metric in SUMMED else max(known)
    value = metric_value(main, metric)
    missing = [side for side, part in parts.items() if part is None]
    above = None if floor is None or floor == best or value is None else (value - best) / (floor - best)
    return {
        "floor": floor,
        **parts,
        "rule": "sum" if metric in SUMMED else "larger",
        "is_bit_exact": all(line is not None and line["is_bit_exact"] for line in sides.values()),
        "ratio": above,
        "note": f"{' and '.join(missing)} side not measured" if missing else "",
    }


def verdict(pair: Summary, floor: Summary | None, n_errors: int, replay: Summary | None) -> dict[str, Any]:
    """The verdict on infer~train, with its evidence.

    Above the floor: the interval of the mean abs logp diff lies above the floor of both sides. At the floor (D30): it
    lies at or below. Everything else cannot be told, and the reason is given.

    Args:
        n_errors: validation errors that were overridden.
        replay: ``routing_replay`` of the summary.
    """
    mean = pair["logp"]["abs_logp_diff"]
    evidence = _evidence(pair, floor, replay)
    if n_errors:
        return _words("cannot tell", f"validation found {n_errors} errors in the capture", evidence)
    if mean["mean"] is None:
        return _words("cannot tell", "no token was scored by both engines", evidence)
    line = (floor or {}).get("metrics", {}).get("abs_logp_diff.mean")
    if line is None or line["floor"] is None:
        return _words("cannot tell", "no noise floor was measured (profile without --no-floors)", evidence)
    if line["note"]:
        return _words("cannot tell", f"half a noise floor only: {line['note']}", evidence)
    if mean["mean_ci"] is None:
        return _words("cannot tell", "the mean has no interval (too few prompts)", evidence)
    low, high = mean["mean_ci"]
    if low > line["floor"]:
        return _words("above floor", "the engines differ by more than each differs from itself", evidence)
    if high <= line["floor"]:
        return _words("at floor", "each engine differs as much from itself (D30): nothing to fix", evidence)
    return _words("cannot tell", "the interval of the mean contains the floor: more prompts would tell", evidence)


def _words(word: str, reason: str, evidence: list[str]) -> dict[str, Any]:
    return {"word": word, "reason": reason, "evidence": evidence}


def _evidence(pair: Summary, floor: Summary | None, replay: Summary | None) -> list[str]:
    routing, lines = pair["routing"], []
    ratio = (floor or {}).get("metrics", {}).get("abs_logp_diff.mean", {}).get("ratio")
    if ratio is not None:
        lines.append(f"mean abs logp diff is {ratio:.3g} times its floor")
    if routing and routing["any_layer_share"] is not None:
        lines.append(f"{100 * routing['any_layer_share']:.3g} % of tokens have a flip somewhere")
    removed = (replay or {}).get("removed_share")
    if removed is not None:
        # 50 % and 20 %: our own reading (rules D23 and D24), no published thresholds
        rule = "D23: routing" if removed > 0.5 else "D24: not routing" if removed < 0.2 else "routing in part"
        lines.append(f"replay of infer's experts removes {100 * removed:.3g} % of the mean ({rule})")
    if not routing:
        lines.append("dense model: routing is no cause here (D22)")
    return lines
