"""Frames of the simulated corrections: columns, units, meaning. Shares are in [0, 1]; NaN = nothing to compute from."""

from __future__ import annotations

from moediag.frames import Column, declare, measured, share, with_ci

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

SWEEP_BY_BAND = declare(
    "sweep_by_band",
    "IcePop band (alpha, beta)",
    Column("alpha", "float64", "1", "lower end of the closed band of ratio"),
    Column("beta", "float64", "1", "upper end"),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_prompts", "int64", "prompt", "their prompts"),
    *with_ci(share("masked_share", "share of tokens outside the band; lower loses less data", "masked")),
    Column("n_masked_prompts", "int64", "prompt", "prompts (pooled into 512) with a token outside the band"),
    share("below_share", "share with ratio < alpha"),
    share("above_share", "share with ratio > beta"),
    *with_ci(
        measured("kept_k3", "nat", "mean k3 of kept tokens; lower is better", "k3 left"),
        "; for some bands of the k3 frontier",
    ),
    measured("weight_mean", "1", "mean weight, masked tokens as 0"),
    measured("weight_variance", "1", "variance of the weights; lower is better", "variance of w"),
    share("ess_token", "(sum w)^2 / (n sum w^2); 1 is best", "ESS"),
    Column("is_on_k3_frontier", "bool", "1", "no other band masks no more and leaves no more k3, one of them less"),
    Column("is_on_variance_frontier", "bool", "1", "the same with the variance of the weights"),
)

RECOMMENDED_BAND = declare(
    "recommended_band",
    "recommendation (one)",
    measured("alpha", "1", "lower end of the closed band of ratio; NaN = cannot tell"),
    measured("beta", "1", "upper end; NaN = cannot tell"),
    Column(
        "rule",
        "str",
        "1",
        "floor: widest band that leaves the A/A floor's k3; budget: least k3 within the budget; least masked: every "
        "band is beyond the budget; cannot tell: too few tokens lie beyond the band",
    ),
    Column("n_tokens", "int64", "token", "scored response tokens"),
    Column("n_prompts", "int64", "prompt", "their prompts"),
    *with_ci(share("masked_share", "share of tokens outside the band")),
    *with_ci(measured("kept_k3", "nat", "mean k3 of kept tokens")),
    measured("all_k3", "nat", "mean k3 of all tokens, nothing masked"),
    measured("floor_k3", "nat", "k3 of the engines against themselves; NaN = not measured"),
    Column("budget", "float64", "1", "most tokens that may be masked"),
    Column("reason", "str", "1", "why this band, in words"),
    Column("caveat", "str", "1", "what the recommendation does not say"),
)
