"""All corrections on the same logged tokens: what each masks, what it leaves, and what masks have in common.

Invariants:
    - one pass over the tokens, chunk by chunk of whole sequences; the chunk's terms are shared by all corrections;
    - only scored tokens count, and every share has its n; a share is in [0, 1], one of nothing is NaN;
    - intervals resample prompts. They say how far a number would move with other prompts of the same kind, and nothing
      about training: no offline number shows that training will be stable;
    - every scored token is in exactly one bin of a histogram; the outermost bins are open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd

from moediag.analysis.tokens import CHUNK_TOKENS, AnyTokens
from moediag.corrections.correction import Correction
from moediag.corrections.sums import EPS_CLIP, CorrectionPass, Sums, knows_routing, n_clusters_of, stratifiers
from moediag.corrections.terms import Float64, Terms
from moediag.errors import MoediagError
from moediag.frames import Column, declare, measured, share, with_ci
from moediag.statistics.intervals import Kind, ratio_mean_interval

OnProgress = Callable[[int, int, str], None]
"""Called with what is done, of how much, and its unit."""

CORRECTION_STATISTICS = declare(
    "correction_statistics",
    "correction simulated on the same tokens",
    Column("correction", "str", "1", "name given by the caller"),
    Column("words", "str", "1", "methods and parameters, as parse_correction reads them"),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_sequences", "int64", "sequence", "sequences with a scored token"),
    Column("n_prompts", "int64", "prompt", "their prompts: units of resampling, pooled into 512 where there are more"),
    *with_ci(share("masked_share", "share of tokens with weight 0 (no update); lower loses less data", "masked")),
    *with_ci(
        share(
            "masked_sequence_share",
            "share of sequences whose tokens all have weight 0; lower loses less data",
            "sequences",
        )
    ),
    share("below_share", "share of tokens masked with a ratio < 1 (sequences: R)", "below"),
    share("above_share", "share of tokens masked with a ratio > 1 (sequences: R)", "above"),
    *with_ci(share("truncated_share", "share of tokens kept with a ratio cut down (or raised) to a bound")),
    *with_ci(share("kept_probability_mass", "sum of p_infer over kept tokens / over all tokens; higher keeps more")),
    *with_ci(measured("weight_mean", "1", "mean weight, masked tokens as 0; 1 changes no step size", "mean w")),
    measured("weight_variance", "1", "variance of the weights over tokens; lower is better"),
    share("ess_token", "(sum w)^2 / (n sum w^2) over tokens; 1 is best; no interval was found to cover", "ESS token"),
    share(
        "ess_sequence", "the same over sequences, each with its mean weight; no interval was found to cover", "ESS seq"
    ),
    *with_ci(
        measured(
            "kept_k3",
            "nat",
            "mean over kept tokens, each counted once, of ratio - 1 - log-ratio (clamped to +-20); lower is better",
            "k3 left",
        )
    ),
    *with_ci(share("clip_share", "share of kept tokens whose PPO term is clipped and has no gradient")),
    *with_ci(
        measured(
            "objective",
            "advantage",
            "mean over responses of (1/len) sum_t w_t min(r_t A, clip(r_t) A) over their len scored tokens; "
            "r = 1 where the trained policy is not known",
        )
    ),
    Column("n_entropy_masked", "int64", "token", "masked tokens with a known entropy", label="n masked"),
    *with_ci(measured("entropy_masked", "nat", "mean infer-side entropy of masked tokens", "masked")),
    Column("n_entropy_kept", "int64", "token", "kept tokens with a known entropy", label="n kept"),
    *with_ci(measured("entropy_kept", "nat", "mean infer-side entropy of kept tokens", "kept")),
    Column("n_routed", "int64", "token", "tokens whose routing is known on both sides, in every layer"),
    Column("n_flipped", "int64", "token", "of these, tokens with at least one flipped layer behind them"),
    Column("n_masked_routed", "int64", "token", "of these, masked tokens", label="n masked"),
    *with_ci(
        share("flipped_share", "n_flipped / n_routed: what precision would be if masks ignored routing", "base rate")
    ),
    *with_ci(share("precision", "share of masked tokens that are flipped; above flipped_share = masks find flips")),
    *with_ci(share("recall", "share of flipped tokens that are masked; higher catches more")),
    Column("note", "str", "1", "what could not be computed, and why; empty otherwise"),
)

MASKED_BY_STRATUM = declare(
    "masked_by_stratum",
    "correction and stratum of tokens",
    Column("correction", "str", "1", "name given by the caller"),
    Column(
        "stratifier",
        "str",
        "1",
        "entropy, p_infer, position, response_length, advantage_sign or n_flipped_layers",
    ),
    Column("stratum_low", "float64", "stratifier's", "lower end of the stratum, inclusive"),
    Column("stratum_high", "float64", "stratifier's", "upper end; exclusive for p_infer and entropy, else inclusive"),
    Column("n_tokens", "int64", "token", "scored tokens of the stratum"),
    Column("n_prompts", "int64", "prompt", "prompts (pooled into 512) with a token in the stratum"),
    *with_ci(share("masked_share", "share of them with weight 0")),
)

OVERLAP = declare(
    "overlap",
    "ordered pair of corrections",
    Column("correction", "str", "1", "a"),
    Column("other", "str", "1", "b"),
    Column("n_masked", "int64", "token", "tokens that a masks"),
    Column("n_both", "int64", "token", "tokens that both mask"),
    share("share_masked_by_other", "n_both / n_masked; NaN = a masks nothing"),
    share("jaccard", "n_both / tokens masked by a or b; NaN = none"),
)

RATIO_COUNTS: Final = declare(
    "ratio_counts",
    "bin of the log-ratio",
    Column("bin_low", "float64", "nat", "lower edge of logp_train - logp_infer; -inf = open"),
    Column("bin_high", "float64", "nat", "upper edge, exclusive; inf = open"),
    Column("n_tokens", "int64", "token", "scored tokens in the bin"),
)
MASKED_ENTROPY: Final = declare(
    "masked_entropy",
    "correction and bin of entropy",
    Column("correction", "str", "1", "name of the correction"),
    Column("bin_low", "float64", "nat", "lower edge of the infer side's next-token entropy"),
    Column("bin_high", "float64", "nat", "upper edge, exclusive; inf = open"),
    Column("n_tokens", "int64", "token", "scored tokens with that entropy"),
    Column("n_masked", "int64", "token", "those of them that get no update (weight 0)"),
)


def compare_corrections(
    tokens: AnyTokens,
    corrections: Mapping[str, Correction],
    on_progress: OnProgress | None = None,
    *,
    eps_clip: float = EPS_CLIP,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, pd.DataFrame]:
    """Statistics of several corrections on the same tokens.

    Args:
        tokens: response tokens of whole sequences, ascending; sequences and prompts counted from 0.
        corrections: name -> correction; the names label the rows.
        on_progress: called after every chunk.
        eps_clip: PPO's clip, for ``clip_share`` and ``objective``.
        chunk_tokens: tokens at once.

    Returns:
        Frames ``correction_statistics``, ``masked_by_stratum`` and ``overlap``.

    Raises:
        MoediagError: a correction looks at advantages and the tokens have none; an advantage that is not a number.

    Source: reports/corrections.md for weights and objective; verl for ESS of token and sequence weights; IcePop
    Figures 10 and 11 for masked shares and entropies.
    """
    x = Terms.of(tokens)
    wanting = [name for name, correction in corrections.items() if correction.needs_advantage]
    if wanting and "advantage" not in x.frame:
        raise MoediagError(
            f"{', '.join(wanting)} looks at the sign of the advantage, and these tokens have none: give rewards or "
            "advantages, or leave it out"
        )
    totals, done = CorrectionPass(corrections, stratifiers(x), n_clusters_of(x), eps_clip), 0
    for part in x.chunks(chunk_tokens):
        totals.add(part)
        done += len(part.frame)
        if on_progress is not None:
            on_progress(done, len(x.frame), "tokens")
    return {
        "correction_statistics": _statistics(totals, x),
        "masked_by_stratum": _by_stratum(totals),
        "overlap": _overlap(totals),
    }


# column, numerator, denominator, kind of interval, added afterwards
_RATIOS: Final[tuple[tuple[str, str, str, Kind, float], ...]] = (
    ("masked_share", "n_masked", "n_tokens", "rate", 0.0),
    ("masked_sequence_share", "n_masked_sequences", "n_sequences", "rate", 0.0),
    ("truncated_share", "n_truncated", "n_tokens", "rate", 0.0),
    # less what is lost: the small part is the one whose spread matters
    ("kept_probability_mass", "p_infer_lost", "p_infer", "signed", 1.0),
    ("weight_mean", "excess", "n_tokens", "signed", 1.0),
    ("kept_k3", "kept_k3", "n_kept", "positive", 0.0),
    ("clip_share", "n_clipped_kept", "n_kept", "rate", 0.0),
    ("objective", "objective", "n_sequences", "signed", 0.0),
    ("entropy_masked", "entropy_masked", "n_entropy_masked", "positive", 0.0),
    ("entropy_kept", "entropy_kept", "n_entropy_kept", "positive", 0.0),
    ("flipped_share", "n_flipped", "n_routed", "rate", 0.0),
    ("precision", "n_flipped_masked", "n_routed_masked", "rate", 0.0),
    ("recall", "n_flipped_masked", "n_flipped", "rate", 0.0),
)
_COUNTS: Final = {
    "n_tokens": "n_tokens",
    "n_sequences": "n_sequences",
    "n_entropy_masked": "n_entropy_masked",
    "n_entropy_kept": "n_entropy_kept",
    "n_routed": "n_routed",
    "n_flipped": "n_flipped",
    "n_masked_routed": "n_routed_masked",
}
_OF_TOKENS: Final = ("masked_share", "truncated_share", "clip_share", "precision", "recall")
"""Shares of tokens whose events come a sequence at a time where a correction decides by the sequence."""
_OF_MASKS: Final = ("masked_share", "masked_sequence_share", "recall")
_ENDS: Final = ("", "_ci_low", "_ci_high")


def _statistics(totals: CorrectionPass, x: Terms) -> pd.DataFrame:
    sums = [_completed(totals.all, one) for one in totals.by_correction]
    corrections = list(totals.corrections.values())
    columns: dict[str, Any] = {"correction": list(totals.corrections), "words": list(map(str, corrections))}
    columns |= {column: [int(one[name].sum()) for one in sums] for column, name in _COUNTS.items()}
    columns["n_prompts"] = np.full(len(sums), x.n_prompts)

    def stacked(name: str) -> Float64:
        return np.stack([one[name] for one in sums], axis=1) if sums else np.zeros((totals.n_clusters, 0))

    n_decided = [_tokens_per_decision(one, correction) for one, correction in zip(sums, corrections, strict=True)]
    for name, over, under, kind, offset in _RATIOS:
        n_per_event = n_decided if name in _OF_TOKENS else 1.0
        found = ratio_mean_interval(stacked(over), stacked(under), kind, n_per_event=n_per_event)
        ends = zip(_ENDS, (found.value_M, found.low_M, found.high_M), strict=True)
        columns |= {f"{name}{end}": array + offset for end, array in ends}
    columns["weight_variance"] = [one.token_weights.variance_G[0] for one in sums]
    columns["ess_token"] = [one.token_weights.effective_share_G[0] for one in sums]
    columns["ess_sequence"] = [one.sequence_weights.effective_share_G[0] for one in sums]
    for name in ("below", "above"):
        columns[f"{name}_share"] = [_share(one[f"n_{name}"], one["n_tokens"]) for one in sums]
    is_sided = np.array([correction.side != "none" for correction in corrections], dtype=bool)
    is_capped = np.array([correction.truncation is not None for correction in corrections], dtype=bool)
    frame = pd.DataFrame(columns)
    mass = [f"kept_probability_mass{end}" for end in _ENDS]
    frame[mass] = frame[mass].clip(0.0, 1.0)
    # an interval cut off where no mean of weights can be loses no coverage
    largest = np.array([correction.largest_weight for correction in corrections], dtype=np.float64)
    frame["weight_mean_ci_low"] = frame["weight_mean_ci_low"].clip(lower=0.0)
    frame["weight_mean_ci_high"] = np.minimum(frame["weight_mean_ci_high"], largest)
    frame.loc[~is_sided, ["below_share", "above_share"]] = np.nan
    frame.loc[~is_capped, [f"truncated_share{end}" for end in _ENDS]] = np.nan
    # what masks nothing by definition masks nothing on other prompts, too
    cannot_mask = np.array([not correction.can_mask for correction in corrections], dtype=bool)
    frame.loc[cannot_mask, [f"{name}{end}" for name in _OF_MASKS for end in _ENDS[1:]]] = np.nan
    # the mean of weights that are 1 or 0 is the share kept: a rate has bounds in [0, 1] where a bootstrap has none
    is_mask = np.array([correction.is_mask for correction in corrections], dtype=bool)
    kept = 1 - frame.loc[is_mask, ["masked_share", "masked_share_ci_high", "masked_share_ci_low"]]
    frame.loc[is_mask, [f"weight_mean{end}" for end in _ENDS]] = kept.to_numpy()
    absent = _absent(x)
    frame[[f"{name}{end}" for name in absent for end in _ENDS]] = np.nan
    frame["note"] = "; ".join(dict.fromkeys(absent.values()))
    return CORRECTION_STATISTICS.validate(frame)


def _completed(everything: Sums, one: Sums) -> Sums:
    """A correction's sums with those of the kept tokens, and with what does not depend on the correction."""
    kept = {
        "n_kept": everything["n_tokens"] - one["n_masked"],
        "p_infer_lost": -one["p_infer_masked"],
        "n_clipped_kept": everything["n_clipped"] - one["n_clipped_masked"],
        "n_entropy_kept": everything["n_entropy"] - one["n_entropy_masked"],
    }
    # where all tokens are masked the difference of two sums would be rounding error
    kept["entropy_kept"] = np.where(kept["n_entropy_kept"] > 0, everything["entropy"] - one["entropy_masked"], 0.0)
    return replace(one, by_name={**everything.by_name, **one.by_name, **kept})


def _tokens_per_decision(one: Sums, correction: Correction) -> float:
    """Tokens masked or truncated together: those of a sequence where the correction decides by the sequence."""
    truncation = correction.truncation
    by_sequence = correction.drops_sequences or (truncation and truncation.declared.bounded.unit == "sequence")
    return float(one["n_tokens"].sum() / max(one["n_sequences"].sum(), 1.0)) if by_sequence else 1.0


def _share(some_C: Float64, all_C: Float64) -> float:
    total = float(all_C.sum())
    return float(some_C.sum()) / total if total else np.nan


def _absent(x: Terms) -> dict[str, str]:
    """Columns that the tokens give no values for, with the reason."""
    absent = {}
    if "logp_train_new" not in x.frame:
        absent["clip_share"] = (
            "no clip share: the log-probabilities of the trained policy (logp_train_new) are not known"
        )
    if "advantage" not in x.frame:
        absent["objective"] = absent["clip_share"] = "no objective and no clip share: advantages are not known"
    if "entropy_infer" not in x.frame:
        absent["entropy_masked"] = absent["entropy_kept"] = "no entropies"
    if not knows_routing(x):
        absent["flipped_share"] = absent["precision"] = absent["recall"] = "routing is not known"
    return absent


def _by_stratum(totals: CorrectionPass) -> pd.DataFrame:
    names = [column.name for column in MASKED_BY_STRATUM.columns]
    n_CB = totals.all.n_CB
    n_B, prompts_B = n_CB.sum(axis=0).astype(np.int64), (n_CB > 0).sum(axis=0)
    labels = [(kind.name, *ends) for kind in totals.kinds for ends in zip(kind.low_B, kind.high_B, strict=True)]
    held = np.flatnonzero(n_B).tolist()
    records = []
    for (name, correction), one in zip(totals.corrections.items(), totals.by_correction, strict=True):
        # a dropped sequence takes along at most what its prompt has in the stratum
        n_per_event = n_B / np.maximum(prompts_B, 1) if correction.drops_sequences else 1.0
        found = ratio_mean_interval(one.n_CB, n_CB, "rate", n_per_event=n_per_event)
        for b in held:
            records.append((name, *labels[b], n_B[b], prompts_B[b], found.value_M[b], found.low_M[b], found.high_M[b]))
    return MASKED_BY_STRATUM.validate(pd.DataFrame.from_records(records, columns=names))


def _overlap(totals: CorrectionPass) -> pd.DataFrame:
    names, n_both = list(totals.corrections), totals.n_both
    columns = [column.name for column in OVERLAP.columns]
    records = []
    for a, name in enumerate(names):
        for b, other in enumerate(names):
            masked, both = int(n_both[a, a]), int(n_both[a, b])
            either = masked + int(n_both[b, b]) - both
            records.append(
                (name, other, masked, both, both / masked if masked else np.nan, both / either if either else np.nan)
            )
    return OVERLAP.validate(pd.DataFrame.from_records(records, columns=columns))


RATIO_STEP: Final = float(np.log(2)) / 32
"""Width of a ratio's bin [nat]: 32 bins per doubling, so 0.5, 1, 2 and 4 are edges."""
_RATIO_BINS_PER_SIDE: Final = 640
"""20 doublings each side, a ratio of a million; beyond stands in the open bins."""
_ENTROPY_STEP: Final = 0.1
_ENTROPY_TOP: Final = 8.0


def ratio_counts(tokens: AnyTokens) -> pd.DataFrame:
    """Scored tokens by log-ratio.

    Returns:
        Frame ``ratio_counts``; bins of ln(2) / 32 nat from 2^-20 to 2^20, the outermost open.
    """
    inner = RATIO_STEP * np.arange(-_RATIO_BINS_PER_SIDE, _RATIO_BINS_PER_SIDE + 1)
    n_N = np.zeros(len(inner) + 1, dtype=np.int64)
    for part in Terms.of(tokens).chunks():
        n_N += np.bincount(np.searchsorted(inner, part.diff_T, side="right"), minlength=len(n_N))
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    return RATIO_COUNTS.validate(pd.DataFrame({"bin_low": edges[:-1], "bin_high": edges[1:], "n_tokens": n_N}))


def masked_entropy(tokens: AnyTokens, corrections: Mapping[str, Correction]) -> pd.DataFrame:
    """Scored tokens by entropy, and how many of them each correction masks.

    Returns:
        Frame ``masked_entropy``; bins of 0.1 nat, the last open; no rows without a correction or
        without any known entropy.

    Source: IcePop post, figure 11 (entropy of masked tokens against all).
    """
    x = Terms.of(tokens)
    if not corrections or "entropy_infer" not in x.frame or not np.isfinite(x.frame["entropy_infer"]).any():
        return MASKED_ENTROPY.validate(pd.DataFrame(columns=[column.name for column in MASKED_ENTROPY.columns]))
    low_N = np.asarray(_ENTROPY_STEP * np.arange(round(_ENTROPY_TOP / _ENTROPY_STEP) + 1), np.float64)
    n_N = {name: np.zeros(len(low_N), np.int64) for name in ("", *corrections)}
    for part in x.chunks():
        entropy_T = part.column("entropy_infer").astype(np.float64)
        known_T = np.isfinite(entropy_T)
        # rounding below 0 belongs to the first bin
        bin_T = np.clip(np.searchsorted(low_N, entropy_T, side="right") - 1, 0, len(low_N) - 1)
        masks = {name: correction.of_terms(part) == 0 for name, correction in corrections.items()}
        for name, is_here_T in {"": known_T, **masks}.items():
            n_N[name] += np.bincount(bin_T[known_T & is_here_T], minlength=len(low_N))
    ends = {"bin_low": low_N, "bin_high": np.append(low_N[1:], np.inf), "n_tokens": n_N[""]}
    parts = [pd.DataFrame({"correction": name, **ends, "n_masked": n_N[name]}) for name in corrections]
    return MASKED_ENTROPY.validate(pd.concat(parts, ignore_index=True))
