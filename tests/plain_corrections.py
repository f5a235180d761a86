"""Corrections and their statistics once more, as plain loops over Python floats: what the fast ones are held to."""

from __future__ import annotations

import math
import struct

LEAST_COMPLEMENT = 2.0**-25


def clamped_exp(log_ratio: float) -> float:
    return math.exp(max(-20.0, min(20.0, log_ratio)))


def binary_kl(p_log: float, q_log: float) -> float:
    p = math.exp(p_log)
    not_p, not_q = (max(-math.expm1(logp), LEAST_COMPLEMENT) for logp in (p_log, q_log))
    first = 0.0 if p == 0 else p * (p_log - q_log)
    return max(first + not_p * (math.log(not_p) - math.log(not_q)), 0.0)


def k3(diff: float) -> float:
    diff = max(-20.0, min(20.0, diff))
    return math.expm1(diff) - diff


def float32(value: float) -> float:
    """The nearest float32."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


class Held:
    """Comparisons with bounds, in float32 where all log-probabilities behind the value are float32 numbers."""

    def __init__(self, is_float32: bool) -> None:
        self.on = float32 if is_float32 else float

    def at_most(self, value: float, bound: float) -> bool:
        return self.on(value) <= self.on(bound)

    def inside(self, log_ratio: float, low: float, high: float) -> bool:
        return self.at_most(log(low), log_ratio) and self.at_most(log_ratio, log(high))


def log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def plain_weights(method, train, infer, sequences, advantages=None, **p):
    """Weight of every token of one correction, token by token."""
    scored = [math.isfinite(a) and math.isfinite(b) for a, b in zip(train, infer, strict=True)]
    is_float32 = [float32(a) == a and float32(b) == b for a, b in zip(train, infer, strict=True)]
    of = {seq: [t for t, s in enumerate(sequences) if s == seq and scored[t]] for seq in dict.fromkeys(sequences)}
    weights = []
    for t, seq in enumerate(sequences):
        if not scored[t]:
            weights.append(0.0)
            continue
        mine = [train[i] - infer[i] for i in of[seq]]
        held = Held(is_float32[t]), Held(all(is_float32[i] for i in of[seq]))
        advantage = None if advantages is None else advantages[t]
        weights.append(_weight(method, train[t], infer[t], mine, advantage, held, p))
    return weights


def _weight(method, train, infer, mine, advantage, held, p):
    (token_held, sequence_held), diff = held, train - infer
    ratio, gap = clamped_exp(diff), token_held.on(math.exp(train)) - token_held.on(math.exp(infer))
    product = math.fsum(mine)
    to_infer, to_train = binary_kl(train, infer), binary_kl(infer, train)
    token = {
        "none": lambda: 1.0,
        "icepop": lambda: ratio if token_held.inside(diff, p["alpha"], p["beta"]) else 0.0,
        "icepop_hard": lambda: float(token_held.inside(diff, p["alpha"], p["beta"])),
        "tis_token": lambda: min(ratio, p["cap"]),
        "mis_token": lambda: ratio if token_held.at_most(diff, log(p["cap"])) else 0.0,
        "kpop": lambda: ratio if token_held.at_most(max(to_infer, to_train), p["phi"]) else 0.0,
        "ipo": lambda: ratio if token_held.at_most(abs(gap), p["eps"]) else 0.0,
        "dppo_tv": lambda: (
            0.0
            if (advantage > 0 and not token_held.at_most(gap, p["eps_high"]))
            or (advantage < 0 and not token_held.at_most(-gap, p["eps_low"]))
            else ratio
        ),
        "dppo_kl": lambda: (
            0.0
            if (advantage > 0 < gap or advantage < 0 > gap) and not token_held.at_most(to_train, p["eps"])
            else ratio
        ),
        "tis_sequence": lambda: min(clamped_exp(product), p["cap"]),
        "clamp_token": lambda: min(max(ratio, p["low"]), p["high"]),
        "tis_geometric": lambda: min(clamped_exp(product / len(mine)), p["cap"]),
        "mis_sequence": lambda: clamped_exp(product) if sequence_held.at_most(product, log(p["cap"])) else 0.0,
        "sequence_band": lambda: float(sequence_held.inside(product, p["low"], p["high"])),
        "geometric_band": lambda: float(sequence_held.inside(product / len(mine), p["low"], p["high"])),
        "veto": lambda: float(sequence_held.at_most(log(p["floor"]), min(mine))),
        "prob_mult_error": lambda: float(
            sequence_held.at_most(math.fsum(clamped_exp(abs(d)) for d in mine) / len(mine), p["limit"])
        ),
        "trm_max": lambda: float(sequence_held.at_most(max(d * d / 2 for d in mine), p["delta"])),
        "trm_mean": lambda: float(sequence_held.at_most(math.fsum(map(k3, mine)) / len(mine), p["delta"])),
        "k3_mean": lambda: float(sequence_held.at_most(math.fsum(map(k3, mine)) / len(mine), p["limit"])),
    }
    return token[method]()
