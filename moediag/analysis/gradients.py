"""The gradient audit as frames: which correction points the update the right way, and how sure that is.

Made from the inner products that an engine left in RUN/gradients; needs no engine. Definitions of gradients and
references stand in the frames' declarations below and in :mod:`moediag.audit.gradients`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.frames import Column, ci_columns, declare
from moediag.statistics.gradients import (
    NO_VARIATION,
    STATISTICS,
    Comparison,
    PromptGradients,
    compare,
    norm_interval,
)
from moediag.statistics.intervals import Interval

EXACT: Final = "exact"
SEQUENCE_IS: Final = "sequence_is"
"""Every token weighted with its sequence's full product ratio."""
NORMALISED: Final = "sequence_is_normalised"

LM_HEAD: Final = "lm_head"
_GROUPS: Final = (LM_HEAD, "routers", "attention", "experts")

ROUNDING: Final = 2e-4
"""Change of a cosine that is taken for the backward's rounding in groups differentiated by autograd.

Source: ours. The same gradients of the demo's bfloat16 model differentiated along other orthonormal directions: cosines
moved by up to 1.4e-5 with 32 sequences, a tenth of this; by 7e-4 with 8 sequences whose gradients nearly cancel, where
no noise-removed cosine can be had.
"""

VERDICTS: Final = ("nearer", "farther", "cannot tell", "rounding", "same direction", "no interval")
NEARER, FARTHER, CANNOT_TELL, IS_ROUNDING, SAME, NO_INTERVAL = VERDICTS

Arrays = dict[str, NDArray[Any]]


def _measured(name: str, unit: str, meaning: str) -> tuple[Column, ...]:
    return (Column(name, "float64", unit, meaning, nullable=True), *ci_columns(name, unit, name))


GRADIENT_AUDIT: Final = declare(
    "gradient_audit",
    "parameter group, reference and correction",
    Column("group", "str", "1", "lm_head (the head's part of a tied matrix), routers, experts or attention"),
    Column(
        "reference",
        "str",
        "1",
        "sequence_is: full product ratio of the sequence; sequence_is_normalised: the same over its mean weight; "
        "exact: expected one-token gradient over infer's prefixes, summed (not that of the sequence's reward)",
    ),
    Column("method", "str", "1", "the correction in words"),
    Column(
        "verdict",
        "str",
        "1",
        "against no correction, by cosine_change: nearer or farther where its interval leaves 0 out; cannot tell: it "
        f"does not, or noise decides; rounding: below {ROUNDING:g} in groups by autograd; same "
        "direction; no interval; empty for none",
    ),
    Column("n_prompts", "int64", "prompt", "clusters behind the intervals"),
    Column("n_sequences", "int64", "sequence", "sequences whose gradients are averaged"),
    Column("n_tokens", "int64", "token", "tokens behind them; with exact: prefixes"),
    Column("kept_share", "float64", "1", "share of tokens with a weight other than 0; NaN with exact", nullable=True),
    *_measured(
        "cosine",
        "1",
        "cosine between both expected gradients, noise removed; 1 = the right direction; an interval with exact only: "
        "rare large sequence weights that a batch does not hold leave it too near 1",
    ),
    *_measured(
        "cosine_change", "1", "cosine minus that of no correction, paired, noise removed; above 0 = nearer than none"
    ),
    *_measured("gain", "1", "length along the reference over the reference's; 1 = the right step"),
    *_measured("relative_bias", "1", "norm of the expected difference over the reference's, noise removed; 0 is best"),
    *_measured("norm", "reward/weight", "norm of the expected gradient, noise removed"),
    *_measured("variance", "(reward/weight)^2", "trace of the covariance of prompts' gradients; small is good"),
    *_measured("variance_ratio", "1", "variance over the reference's; below 1 = less noise than the reference"),
    Column(
        "batch_cosine",
        "float64",
        "1",
        "cosine between the gradients of this batch, which share their noise: compare with noise_cosine; no interval",
        nullable=True,
    ),
    Column("noise_cosine", "float64", "1", "batch_cosine if there were noise and no signal at all", nullable=True),
    Column(
        "batch_relative_bias",
        "float64",
        "1",
        "norm of this batch's difference over the reference's, noise and all; compare with bias_floor",
        nullable=True,
    ),
    Column("bias_floor", "float64", "1", "95 % of batch_relative_bias if the method had no bias at all", nullable=True),
    Column("note", "str", "1", "why there is no cosine or no interval; empty otherwise"),
)

GRADIENT_REFERENCES: Final = declare(
    "gradient_references",
    "parameter group and reference",
    Column("group", "str", "1", "lm_head, routers, experts or attention"),
    Column("reference", "str", "1", "as in gradient_audit"),
    Column("n_prompts", "int64", "prompt", "prompts"),
    Column("n_sequences", "int64", "sequence", "sequences"),
    Column("n_tokens", "int64", "token", "tokens; with exact: prefixes"),
    *_measured("norm", "reward/weight", "norm of the reference, noise removed"),
    Column("signal_to_noise", "float64", "1", "its square over what noise adds to a batch's; large is good", True),
    Column("ess", "float64", "sequence", "effective sample size of the sequence weights; NaN with exact", True),
    Column("ess_share", "float64", "1", "ess / n_sequences; near 1 is good", nullable=True),
    Column("max_weight_share", "float64", "1", "largest sequence weight over the sum of all", nullable=True),
    Column("note", "str", "1", "why there is no norm or no interval; empty otherwise"),
)

SPECS: Final = (GRADIENT_AUDIT, GRADIENT_REFERENCES)

HEADLINE: Final = (
    *("group", "reference", "method", "verdict"),
    *("cosine", "cosine_ci_low", "cosine_ci_high"),
    *("cosine_change", "cosine_change_ci_low", "cosine_change_ci_high"),
    *("batch_cosine", "noise_cosine"),
    *("batch_relative_bias", "bias_floor"),
    *("variance_ratio", "variance_ratio_ci_low", "variance_ratio_ci_high"),
    *("kept_share", "n_prompts", "n_sequences", "n_tokens", "note"),
)
"""Columns of ``gradient_audit`` that a page shows; the others are for who asks further."""


def audit_frames(record: dict[str, Any], arrays: Arrays) -> dict[str, pd.DataFrame]:
    """Frames ``gradient_audit`` and ``gradient_references`` from inner products.

    Args:
        record: what was audited: ``methods`` with the reference last, ``token_methods``.
        arrays: inner products and combinations, as the engine wrote them.
    """
    audits: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    for group, reference, gradients, n_tokens in _gradients(record, arrays):
        sampled = reference != EXACT
        counts = {"group": group, "reference": reference, "n_prompts": gradients.n_prompts}
        counts |= {"n_sequences": gradients.n_sequences, "n_tokens": n_tokens}
        norm, signal = norm_interval(gradients, reference)
        weights = _weights_facts(arrays) if sampled else dict.fromkeys(("ess", "ess_share", "max_weight_share"), np.nan)
        references.append({**counts, **_bounds("norm", norm), "signal_to_noise": signal, **weights, "note": norm.note})
        kept = _kept_shares(record, arrays) if sampled else {}
        for method in gradients.names:
            if method in (SEQUENCE_IS, NORMALISED, EXACT):
                continue
            found = compare(gradients, method, reference)
            row = {**counts, "method": method, "kept_share": kept.get(method, np.nan)}
            for name in STATISTICS:
                row |= _bounds(name, found.expected[name])
            if sampled:  # its interval covered 0.63 of the truth where weights have heavy tails
                row |= {"cosine_ci_low": np.nan, "cosine_ci_high": np.nan}
            for name in ("batch_cosine", "noise_cosine", "batch_relative_bias", "bias_floor"):
                row[name] = getattr(found, name)
            note = found.expected["cosine"].note
            audits.append({**row, "verdict": _verdict(group, method, found), "note": note})
    return {
        spec.name: spec.validate(pd.DataFrame.from_records(rows, columns=[c.name for c in spec.columns]))
        for spec, rows in ((GRADIENT_AUDIT, audits), (GRADIENT_REFERENCES, references))
    }


def _verdict(group: str, method: str, found: Comparison) -> str:
    """Whether a method points nearer to the reference than no correction does, as far as the data can tell."""
    change = found.expected["cosine_change"]
    if method == "none":
        return ""
    if change.note == NO_VARIATION:
        return SAME
    if not np.isfinite(change.value):
        return CANNOT_TELL
    if group != LM_HEAD and abs(change.value) < ROUNDING:
        return IS_ROUNDING
    if not np.isfinite(change.low):
        return NO_INTERVAL
    if change.low > 0:
        return NEARER
    return FARTHER if change.high < 0 else CANNOT_TELL


def _gradients(record: dict[str, Any], arrays: Arrays) -> Iterator[tuple[str, str, PromptGradients, int]]:
    """Every group with every reference that there is, and the tokens behind it."""
    names, combined_MB = tuple(record["methods"]), arrays["coefficient_MB"]
    weight_S = arrays["sequence_weight_S"]
    normalised_B = combined_MB[-1] / weight_S.mean()
    n_tokens = int(record["n_tokens"])
    for group in [group for group in _GROUPS if f"gram_{group}_BB" in arrays]:
        gradients = PromptGradients(
            arrays[f"gram_{group}_BB"],
            np.concatenate([combined_MB, normalised_B[None]]),
            arrays["prompt_B"],
            len(weight_S),
            (*names, NORMALISED),
        )
        yield group, SEQUENCE_IS, gradients, n_tokens
        yield group, NORMALISED, gradients, n_tokens
        if group == LM_HEAD and "gram_exact" in arrays:
            exact = (*record["token_methods"], EXACT)
            n_prompts = len(arrays["gram_exact"]) // len(exact)
            yield (
                group,
                EXACT,
                PromptGradients(
                    arrays["gram_exact"],
                    np.tile(np.eye(len(exact)), n_prompts),
                    np.repeat(np.arange(n_prompts), len(exact)),
                    int(record["facts"]["n_prefix_sequences"]),
                    exact,
                ),
                int(record["facts"]["n_prefixes"]),
            )


def _weights_facts(arrays: Arrays) -> dict[str, float]:
    weight_S = arrays["sequence_weight_S"]
    ess = float(np.square(weight_S.sum()) / np.square(weight_S).sum())
    return {
        "ess": ess,
        "ess_share": ess / len(weight_S),
        "max_weight_share": float(weight_S.max() / weight_S.sum()),
    }


def _kept_shares(record: dict[str, Any], arrays: Arrays) -> dict[str, float]:
    shares_M = arrays["kept_MS"].sum(axis=1) / arrays["n_tokens_S"].sum()
    return dict(zip(record["methods"], shares_M.tolist(), strict=True))


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_ci_low": interval.low, f"{name}_ci_high": interval.high}
