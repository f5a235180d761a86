"""Frames of the simulated corrections: columns, units, meaning. Shares are in [0, 1]; NaN = nothing to compute from."""

from __future__ import annotations

from moediag.frames import Column, ci_columns, declare


def _share(name: str, meaning: str) -> tuple[Column, ...]:
    return (Column(name, "float64", "1", meaning, nullable=True), *ci_columns(name, "1", name))


CORRECTION_STATISTICS = declare(
    "correction_statistics",
    "correction simulated on the same tokens",
    Column("correction", "str", "1", "name given by the caller"),
    Column("words", "str", "1", "methods and parameters, as parse_correction reads them"),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_sequences", "int64", "sequence", "sequences with a scored token"),
    Column("n_prompts", "int64", "prompt", "their prompts: units of resampling, pooled into 512 where there are more"),
    *_share("masked_share", "share of tokens with weight 0 (no update); lower loses less data"),
    *_share("masked_sequence_share", "share of sequences whose tokens all have weight 0; lower loses less data"),
    Column("below_share", "float64", "1", "share of tokens masked with a ratio < 1 (sequences: R)", nullable=True),
    Column("above_share", "float64", "1", "share of tokens masked with a ratio > 1 (sequences: R)", nullable=True),
    *_share("truncated_share", "share of tokens kept with a ratio cut down (or raised) to a bound"),
    *_share("kept_probability_mass", "sum of p_infer over kept tokens / over all tokens; higher keeps more"),
    Column("weight_mean", "float64", "1", "mean weight, masked tokens as 0; 1 changes no step size", nullable=True),
    *ci_columns("weight_mean", "1", "weight_mean"),
    Column("weight_variance", "float64", "1", "variance of the weights over tokens; lower is better", nullable=True),
    Column(
        "ess_token", "float64", "1",
        "(sum w)^2 / (n sum w^2) over tokens; 1 is best; no interval was found to cover", nullable=True,
    ),
    Column(
        "ess_sequence", "float64", "1",
        "the same over sequences, each with its mean weight; no interval was found to cover", nullable=True,
    ),
    Column(
        "kept_k3", "float64", "nat",
        "mean over kept tokens, each counted once, of ratio - 1 - log-ratio (clamped to +-20); lower is better",
        nullable=True,
    ),
    *ci_columns("kept_k3", "nat", "kept_k3"),
    *_share("clip_share", "share of kept tokens whose PPO term is clipped and has no gradient"),
    Column(
        "objective", "float64", "advantage",
        "mean over responses of (1/len) sum_t w_t min(r_t A, clip(r_t) A) over their len scored tokens; "
        "r = 1 where the trained policy is not known",
        nullable=True,
    ),
    *ci_columns("objective", "advantage", "objective"),
    Column("n_entropy_masked", "int64", "token", "masked tokens with a known entropy"),
    Column("entropy_masked", "float64", "nat", "mean infer-side entropy of masked tokens", nullable=True),
    *ci_columns("entropy_masked", "nat", "entropy_masked"),
    Column("n_entropy_kept", "int64", "token", "kept tokens with a known entropy"),
    Column("entropy_kept", "float64", "nat", "mean infer-side entropy of kept tokens", nullable=True),
    *ci_columns("entropy_kept", "nat", "entropy_kept"),
    Column("n_routed", "int64", "token", "tokens whose routing is known on both sides, in every layer"),
    Column("n_flipped", "int64", "token", "of these, tokens with at least one flipped layer behind them"),
    Column("n_masked_routed", "int64", "token", "of these, masked tokens"),
    *_share("flipped_share", "n_flipped / n_routed: what precision would be if masks ignored routing"),
    *_share("precision", "share of masked tokens that are flipped; above flipped_share = masks find flips"),
    *_share("recall", "share of flipped tokens that are masked; higher catches more"),
    Column("note", "str", "1", "what could not be computed, and why; empty otherwise"),
)  # fmt: skip

MASKED_BY_STRATUM = declare(
    "masked_by_stratum",
    "correction and stratum of tokens",
    Column("correction", "str", "1", "name given by the caller"),
    Column(
        "stratifier", "str", "1",
        "entropy, p_infer, position, response_length, advantage_sign or n_flipped_layers",
    ),
    Column("stratum_low", "float64", "stratifier's", "lower end of the stratum, inclusive"),
    Column("stratum_high", "float64", "stratifier's", "upper end; exclusive for p_infer and entropy, else inclusive"),
    Column("n_tokens", "int64", "token", "scored tokens of the stratum"),
    Column("n_prompts", "int64", "prompt", "prompts (pooled into 512) with a token in the stratum"),
    Column("masked_share", "float64", "1", "share of them with weight 0", nullable=True),
    *ci_columns("masked_share", "1", "masked_share"),
)  # fmt: skip

OVERLAP = declare(
    "overlap",
    "ordered pair of corrections",
    Column("correction", "str", "1", "a"),
    Column("other", "str", "1", "b"),
    Column("n_masked", "int64", "token", "tokens that a masks"),
    Column("n_both", "int64", "token", "tokens that both mask"),
    Column("share_masked_by_other", "float64", "1", "n_both / n_masked; NaN = a masks nothing", nullable=True),
    Column("jaccard", "float64", "1", "n_both / tokens masked by a or b; NaN = none", nullable=True),
)

SWEEP_BY_BAND = declare(
    "sweep_by_band",
    "IcePop band (alpha, beta)",
    Column("alpha", "float64", "1", "lower end of the closed band of ratio"),
    Column("beta", "float64", "1", "upper end"),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_prompts", "int64", "prompt", "their prompts"),
    *_share("masked_share", "share of tokens outside the band; lower loses less data"),
    Column("n_masked_prompts", "int64", "prompt", "prompts (pooled into 512) with a token outside the band"),
    Column("below_share", "float64", "1", "share with ratio < alpha", nullable=True),
    Column("above_share", "float64", "1", "share with ratio > beta", nullable=True),
    Column("kept_k3", "float64", "nat", "mean k3 of kept tokens; lower is better", nullable=True),
    *ci_columns("kept_k3", "nat", "kept_k3; for some bands of the k3 frontier"),
    Column("weight_mean", "float64", "1", "mean weight, masked tokens as 0", nullable=True),
    Column("weight_variance", "float64", "1", "variance of the weights; lower is better", nullable=True),
    Column("ess_token", "float64", "1", "(sum w)^2 / (n sum w^2); 1 is best", nullable=True),
    Column("is_on_k3_frontier", "bool", "1", "no other band masks no more and leaves no more k3, one of them less"),
    Column("is_on_variance_frontier", "bool", "1", "the same with the variance of the weights"),
)

RECOMMENDED_BAND = declare(
    "recommended_band",
    "recommendation (one)",
    Column("alpha", "float64", "1", "lower end of the closed band of ratio; NaN = cannot tell", nullable=True),
    Column("beta", "float64", "1", "upper end; NaN = cannot tell", nullable=True),
    Column(
        "rule", "str", "1",
        "floor: widest band that leaves the A/A floor's k3; budget: least k3 within the budget; least masked: every "
        "band is beyond the budget; cannot tell: too few tokens lie beyond the band",
    ),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_prompts", "int64", "prompt", "their prompts"),
    *_share("masked_share", "share of tokens outside the band"),
    Column("kept_k3", "float64", "nat", "mean k3 of kept tokens", nullable=True),
    *ci_columns("kept_k3", "nat", "kept_k3"),
    Column("all_k3", "float64", "nat", "mean k3 of all tokens, nothing masked", nullable=True),
    Column("floor_k3", "float64", "nat", "k3 of the engines against themselves; NaN = not measured", nullable=True),
    Column("budget", "float64", "1", "most tokens that may be masked"),
    Column("reason", "str", "1", "why this band, in words"),
    Column("caveat", "str", "1", "what the recommendation does not say"),
)  # fmt: skip
