"""Corrections and their statistics once more, as plain loops over Python floats: what the fast ones are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_COMPLEMENT = 2.0**-25


def clamped_exp(log_ratio: float) -> float:
    return math.exp(max(-20.0, min(20.0, log_ratio)))


def binary_kl(p_log: float, q_log: float) -> float:
    p = math.exp(p_log)
    not_p, not_q = (max(-math.expm1(logp), LEAST_COMPLEMENT) for logp in (p_log, q_log))
    first = 0.0 if p == 0 else (math.inf if q_log == -math.inf else p * (p_log - q_log))
    return max(first + not_p * (math.log(not_p) - math.log(not_q)), 0.0)


def k3(diff: float) -> float:
    diff = max(-20.0, min(20.0, diff))
    return math.expm1(diff) - diff


def inside(log_ratio: float, low: float, high: float) -> bool:
    low_log = math.log(low) if low > 0 else -math.inf
    return not math.isnan(log_ratio) and low_log <= log_ratio <= math.log(high)


def exact_sum(values: Sequence[float]) -> float:
    if math.inf in values and -math.inf in values:
        return math.nan
    return math.fsum(values)


def plain_weights(method, train, infer, sequences, advantages=None, **p):
    """Weight of every token of one correction, token by token."""
    diffs = [a - b for a, b in zip(train, infer, strict=True)]  # -inf - -inf = NaN: no ratio
    scored = [not math.isnan(diff) for diff in diffs]
    of = {seq: [t for t, s in enumerate(sequences) if s == seq and scored[t]] for seq in dict.fromkeys(sequences)}
    weights = []
    for t, seq in enumerate(sequences):
        if not scored[t]:
            weights.append(0.0)
            continue
        mine = [diffs[i] for i in of[seq]]
        weights.append(
            _weight(method, train[t], infer[t], diffs[t], mine, None if advantages is None else advantages[t], p)
        )
    return weights


def _weight(method, train, infer, diff, mine, advantage, p):
    ratio, gap = clamped_exp(diff), math.exp(train) - math.exp(infer)
    product = exact_sum(mine)
    token = {
        "none": lambda: 1.0,
        "icepop": lambda: ratio if inside(diff, p["alpha"], p["beta"]) else 0.0,
        "icepop_hard": lambda: float(inside(diff, p["alpha"], p["beta"])),
        "tis_token": lambda: min(ratio, p["cap"]),
        "mis_token": lambda: ratio if diff <= math.log(p["cap"]) else 0.0,
        "kpop": lambda: ratio if max(binary_kl(train, infer), binary_kl(infer, train)) <= p["phi"] else 0.0,
        "ipo": lambda: ratio if abs(gap) <= p["eps"] else 0.0,
        "dppo_tv": lambda: (
            0.0 if (advantage > 0 and gap > p["eps_high"]) or (advantage < 0 and gap < -p["eps_low"]) else ratio
        ),
        "dppo_kl": lambda: (
            0.0 if (advantage > 0 < gap or advantage < 0 > gap) and binary_kl(infer, train) > p["eps"] else ratio
        ),
        "tis_sequence": lambda: 0.0 if math.isnan(product) else min(clamped_exp(product), p["cap"]),
        "mis_sequence": lambda: clamped_exp(product) if product <= math.log(p["cap"]) else 0.0,
        "sequence_band": lambda: float(inside(product, p["low"], p["high"])),
        "geometric_band": lambda: float(inside(product / len(mine), p["low"], p["high"])),
        "veto": lambda: float(min(mine) >= (math.log(p["floor"]) if p["floor"] > 0 else -math.inf)),
        "trm_max": lambda: float(max(d * d / 2 for d in mine) <= p["delta"]),
        "trm_mean": lambda: float(math.fsum(map(k3, mine)) / len(mine) <= p["delta"]),
        "k3_mean": lambda: float(math.fsum(map(k3, mine)) / len(mine) <= p["limit"]),
    }
    return token[method]()
