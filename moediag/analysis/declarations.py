"""The frames that analyses return, declared in one place: `moediag schema` prints this page.

Every interval is 95 %, clustered by prompt; NaN bounds mean that no honest interval can be given (the
frame or the caller says why). Rates and shares lie in [0, 1].
"""

from __future__ import annotations

from moediag.frames import Column, ci_columns, declare

TOKENS = declare(
    "tokens",
    "response token of the pair",
    Column("seq_id", "int64", "1", "sequence the token belongs to"),
    Column("prompt_id", "int64", "1", "prompt of the sequence; the unit of resampling"),
    Column("sample_index", "int32", "1", "which sample of the prompt"),
    Column("position", "int32", "token", "position in the response, 0 = first response token"),
    Column("token_id", "int64", "1", "the token scored"),
    Column("logp_train", "float32", "nat", "log-probability given by the train arm", nullable=True),
    Column("logp_infer", "float32", "nat", "log-probability given by the infer arm", nullable=True),
    Column("entropy_train", "float32", "nat", "entropy of the train arm's next-token distribution", nullable=True),
    Column("entropy_infer", "float32", "nat", "entropy of the infer arm's next-token distribution", nullable=True),
    Column("n_flipped_layers", "int16", "layer", "MoE layers whose expert set differs; -1 = dense or not fully routed"),
    Column("first_flipped_layer", "int16", "1", "first such MoE layer; -1 = none, dense or not fully routed"),
    Column(
        "misrouted_mass",
        "float32",
        "gate weight",
        "train's gate weight on experts infer did not choose, summed over layers; NaN = no train weights",
        nullable=True,
    ),
)

LOGP_METRICS = declare(
    "logp_metrics",
    "metric of the log-probability mismatch",
    Column("metric", "str", "1", "dotted name, as in summary.json under pairs[...].logp"),
    Column("value", "float64", "see unit", "the metric over all scored response tokens", nullable=True),
    Column("ci_low", "float64", "see unit", "lower bound of the 95 % interval", nullable=True),
    Column("ci_high", "float64", "see unit", "upper bound of the 95 % interval", nullable=True),
    Column(
        "largest_prompt_share",
        "float64",
        "1",
        "share of the mean's sum, signs aside, that its largest prompt carries; NaN for rates and for what is no mean",
        nullable=True,
    ),
    Column("n_tokens", "int64", "token", "tokens behind the value"),
    Column("n_prompts", "int64", "prompt", "clusters behind the interval"),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good"),
    Column("note", "str", "1", "why there is no interval or no value; empty otherwise"),
)

TAIL_CURVE = declare(
    "tail_curve",
    "threshold of abs(logp_diff)",
    Column("threshold", "float64", "nat", "abs(logp_diff) threshold; tau = exp(threshold)"),
    Column("n_above", "int64", "token", "tokens with abs(logp_diff) > threshold"),
    Column("share_above", "float64", "1", "F(tau) = P(max(ratio, 1/ratio) > tau)", nullable=True),
    Column("n_tokens", "int64", "token", "tokens scored by both arms"),
    *ci_columns("share_above", "1", "share_above"),
)

AGREEMENT_BY_LAYER = declare(
    "agreement_by_layer",
    "MoE layer",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("n_tokens", "int64", "token", "routing rows compared (rows routed in both arms)"),
    Column("same_set_rate", "float64", "1", "share of rows whose expert set is the same", nullable=True),
    *ci_columns("same_set_rate", "1", "same_set_rate"),
    Column("cumulative_same_set_rate", "float64", "1", "share of rows same in all layers 0..layer", nullable=True),
    *ci_columns("cumulative_same_set_rate", "1", "cumulative_same_set_rate"),
    Column("overlap", "float64", "1", "mean abs(A & B) / K of the two expert sets", nullable=True),
    *ci_columns("overlap", "1", "overlap"),
    Column("reorder_rate", "float64", "1", "share of rows with the same set in another order", nullable=True),
    Column("jaccard", "float64", "1", "mean abs(A & B) / abs(A | B) of the two expert sets", nullable=True),
    *ci_columns("jaccard", "1", "jaccard"),
    Column(
        "top1_rate", "float64", "1", "share of rows whose heaviest expert agrees; NaN = no gate weights", nullable=True
    ),
    *ci_columns("top1_rate", "1", "top1_rate"),
    Column(
        "misrouted_mass",
        "float64",
        "gate weight",
        "mean gate weight of train on experts infer did not choose; NaN = no train weights",
        nullable=True,
    ),
    *ci_columns("misrouted_mass", "gate weight", "misrouted_mass"),
)

FLIPS_PER_TOKEN = declare(
    "flips_per_token",
    "number of flipped layers",
    Column("n_flipped_layers", "int64", "layer", "MoE layers whose set differs for a token"),
    Column("n_tokens", "int64", "token", "tokens with exactly that many"),
    Column("share", "float64", "1", "their share of the routed tokens", nullable=True),
    Column("independent_share", "float64", "1", "share expected if layers flipped independently", nullable=True),
    Column("abs_logp_diff_mean", "float64", "nat", "mean abs(logp_diff) of those tokens", nullable=True),
    Column("abs_logp_diff_p99", "float64", "nat", "p99 of abs(logp_diff) of those tokens", nullable=True),
)

MARGIN_CURVE = declare(
    "margin_curve",
    "score space, MoE layer (-1 = all layers) and margin bin",
    Column("space", "str", "1", "choice = what TopK compares (dimensionless); logit = raw router logits"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("side", "str", "1", "whose margin: infer's, or train's where infer has none"),
    Column("bin_low", "float64", "score", "lower edge of the margin; 0 to 0 = exact ties, -inf = negative"),
    Column("bin_high", "float64", "score", "upper edge, exclusive"),
    Column("n_choices", "int64", "choice", "(token, layer) choices whose margin falls in the bin"),
    Column("n_flipped", "int64", "choice", "those whose expert set flipped"),
    Column("flip_rate", "float64", "1", "P(flip | margin bin)", nullable=True),
    *ci_columns("flip_rate", "1", "flip_rate; given for the pooled rows"),
)

MARGIN_QUANTILES = declare(
    "margin_quantiles",
    "score space and group of choices",
    Column("space", "str", "1", "choice or logit"),
    Column("group", "str", "1", "all, flipped or kept"),
    Column("side", "str", "1", "whose margin: infer's, or train's where infer has none"),
    Column("n_choices", "int64", "choice", "(token, layer) choices in the group"),
    Column("n_exact_ties", "int64", "choice", "choices with a margin of exactly 0"),
    Column("p01", "float64", "score", "1 % quantile of the margin", nullable=True),
    Column("p10", "float64", "score", "10 % quantile", nullable=True),
    Column("p50", "float64", "score", "median", nullable=True),
    Column("p90", "float64", "score", "90 % quantile", nullable=True),
    Column("p99", "float64", "score", "99 % quantile", nullable=True),
)

MARGIN_NOISE = declare(
    "margin_noise",
    "score space and MoE layer (-1 = all layers)",
    Column("space", "str", "1", "choice or logit"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("side", "str", "1", "whose margin: infer's, or train's where infer has none"),
    Column("n_choices", "int64", "choice", "(token, layer) choices with a margin"),
    Column("n_flipped", "int64", "choice", "those whose expert set flipped"),
    Column("n_exact_ties", "int64", "choice", "choices with a margin of exactly 0"),
    Column("sigma", "float64", "score", "noise of the score difference that P(flip | m) = Phi(-m / sigma) needs", True),
)

FLIPS_BY_LAYER_POSITION = declare(
    "flips_by_layer_position",
    "MoE layer and bin of positions in the response",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("position_low", "int64", "token", "first position of the bin"),
    Column("position_high", "int64", "token", "last position of the bin, inclusive"),
    Column("n_choices", "int64", "choice", "(token, layer) choices compared"),
    Column("n_flipped", "int64", "choice", "those whose expert set flipped"),
    Column("flip_rate", "float64", "1", "their share", nullable=True),
)

EXPERT_SWAPS = declare(
    "expert_swaps",
    "MoE layer and pair of experts that stood in for each other, most frequent first",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("expert_train", "int64", "1", "the one expert that only train chose"),
    Column("expert_infer", "int64", "1", "the one expert that only infer chose"),
    Column("n_swaps", "int64", "choice", "choices where exactly these two were exchanged"),
    Column("n_reverse", "int64", "choice", "choices where the same two were exchanged the other way round"),
    Column("share_of_flips", "float64", "1", "n_swaps over the layer's flips", nullable=True),
    Column("n_flips", "int64", "choice", "flips of the layer"),
    Column("n_single_flips", "int64", "choice", "flips of the layer that exchange exactly one expert"),
)

DRIFT_BY_POSITION = declare(
    "drift_by_position",
    "bin of positions in the response",
    Column("position_low", "int64", "token", "first position of the bin"),
    Column("position_high", "int64", "token", "last position of the bin, inclusive"),
    Column("n_tokens", "int64", "token", "tokens scored by both arms"),
    Column("n_sequences", "int64", "sequence", "sequences that reach the bin (late bins hold survivors)"),
    Column("abs_logp_diff_mean", "float64", "nat", "mean abs(logp_diff)", nullable=True),
    *ci_columns("abs_logp_diff_mean", "nat", "abs_logp_diff_mean"),
    Column("abs_logp_diff_p50", "float64", "nat", "median", nullable=True),
    Column("abs_logp_diff_p90", "float64", "nat", "90 % quantile", nullable=True),
    Column("abs_logp_diff_p99", "float64", "nat", "99 % quantile", nullable=True),
    Column("extreme_share_2", "float64", "1", "share with max(ratio, 1/ratio) > 2", nullable=True),
    Column("flip_rate", "float64", "1", "share of (token, layer) whose set differs; NaN = dense", nullable=True),
)

RATIO_QUANTILES = declare(
    "ratio_quantiles",
    "level (token, sequence_product, sequence_geometric) and probability",
    Column("level", "str", "1", "token: ratio; sequence_product: exp(sum d); sequence_geometric: exp(mean d)"),
    Column("q", "float64", "1", "probability of the quantile"),
    Column("log_ratio", "float64", "nat", "quantile of the log-ratio; NaN = tail too thin", nullable=True),
    *ci_columns("log_ratio", "nat", "log_ratio"),
    Column("n", "int64", "token or sequence", "tokens or sequences behind the quantile"),
)

METRICS_BY_STRATUM = declare(
    "metrics_by_stratum",
    "stratum (by position, p_infer, entropy or n_flipped_layers) and metric",
    Column("stratifier", "str", "1", "position, p_infer, entropy or n_flipped_layers"),
    Column("stratum_low", "float64", "stratifier's", "lower end of the stratum, inclusive"),
    Column("stratum_high", "float64", "stratifier's", "upper end; exclusive for p_infer and entropy, else inclusive"),
    Column("metric", "str", "1", "dotted name as in logp_metrics, or flip_rate"),
    Column("value", "float64", "see unit", "the metric over the stratum's scored tokens", nullable=True),
    Column("ci_low", "float64", "see unit", "lower bound of the 95 % interval", nullable=True),
    Column("ci_high", "float64", "see unit", "upper bound of the 95 % interval", nullable=True),
    Column("n_tokens", "int64", "token", "tokens of the stratum"),
    Column("n_prompts", "int64", "prompt", "prompts with a token in the stratum"),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good"),
)

SEQUENCES = declare(
    "sequences",
    "sequence with a response token",
    Column("seq_id", "int64", "1", "sequence"),
    Column("prompt_id", "int64", "1", "its prompt"),
    Column("sample_index", "int32", "1", "which sample of the prompt"),
    Column("n_tokens", "int64", "token", "response tokens scored by both arms"),
    Column("n_unscored", "int64", "token", "response tokens that an arm did not score"),
    Column("abs_logp_diff_mean", "float64", "nat", "mean abs(logp_diff)", nullable=True),
    Column("abs_logp_diff_max", "float64", "nat", "largest abs(logp_diff)", nullable=True),
    Column("worst_position", "int64", "token", "position of that token; -1 = none scored"),
    Column("k3", "float64", "nat", "mean of ratio - 1 - logp_diff", nullable=True),
    Column("log_ratio_sum", "float64", "nat", "log of the product ratio: sum of logp_diff", nullable=True),
    Column("log_ratio_mean", "float64", "nat", "log of the geometric ratio: minus the log ppl gap", nullable=True),
    Column("ppl_train", "float64", "1", "perplexity of the response under train", nullable=True),
    Column("ppl_infer", "float64", "1", "perplexity of the response under infer", nullable=True),
    Column("extreme_share_2", "float64", "1", "share of tokens with max(ratio, 1/ratio) > 2", nullable=True),
    Column("flip_rate", "float64", "1", "share of (token, layer) whose set differs; NaN = dense", nullable=True),
    Column("first_flip_position", "int64", "token", "first position with a flip; -1 = none"),
    Column("first_flip_layer", "int64", "1", "first flipped MoE layer there; -1 = none"),
)

WORST_TOKENS = declare(
    "worst_tokens",
    "response token, largest abs(logp_diff) first",
    Column("rank", "int64", "1", "0 = largest abs(logp_diff)"),
    Column("seq_id", "int64", "1", "sequence the token belongs to"),
    Column("prompt_id", "int64", "1", "prompt of the sequence"),
    Column("sample_index", "int32", "1", "which sample of the prompt"),
    Column("position", "int32", "token", "position in the response"),
    Column("token_id", "int64", "1", "the token scored"),
    Column("logp_train", "float32", "nat", "log-probability given by the train arm"),
    Column("logp_infer", "float32", "nat", "log-probability given by the infer arm"),
    Column("logp_diff", "float64", "nat", "logp_train - logp_infer"),
    Column("n_flipped_layers", "int16", "layer", "MoE layers whose expert set differs; -1 = dense or not known"),
    Column("first_flipped_layer", "int16", "1", "first such layer; -1 = none"),
)

FIRST_DIVERGENCE = declare(
    "first_divergence",
    "MoE layer in which sequences flip for the first time",
    Column("layer", "int64", "1", "MoE layer; -1 = sequences without a flip"),
    Column("n_sequences", "int64", "sequence", "sequences whose first flip is in this layer"),
    Column("share", "float64", "1", "their share of the routed sequences", nullable=True),
    Column("position_p10", "float64", "token", "10 % quantile of the position of that flip", nullable=True),
    Column("position_p50", "float64", "token", "its median", nullable=True),
    Column("position_p90", "float64", "token", "its 90 % quantile", nullable=True),
)

DRIFT_BY_LENGTH = declare(
    "drift_by_length",
    "bin of response lengths",
    Column("length_low", "int64", "token", "shortest response of the bin"),
    Column("length_high", "int64", "token", "longest response of the bin, inclusive"),
    Column("n_sequences", "int64", "sequence", "sequences of the bin"),
    Column("log_ratio_mean", "float64", "nat", "mean over sequences of log(pi_train / pi_infer)", nullable=True),
    *ci_columns("log_ratio_mean", "nat", "log_ratio_mean"),
    Column("abs_log_ratio_mean", "float64", "nat", "mean over sequences of its absolute value", nullable=True),
    *ci_columns("abs_log_ratio_mean", "nat", "abs_log_ratio_mean"),
    Column("abs_log_ratio_p50", "float64", "nat", "median", nullable=True),
    Column("abs_log_ratio_p90", "float64", "nat", "90 % quantile", nullable=True),
)

FLIP_EXCESS = declare(
    "flip_excess",
    "group of flipped tokens compared with unflipped tokens of the same strata",
    Column("grouping", "str", "1", "any_flip, n_flipped_layers, first_flipped_layer or misrouted_mass"),
    Column("group_low", "float64", "grouping's", "lower end of the group, inclusive"),
    Column("group_high", "float64", "grouping's", "upper end, inclusive (exclusive for misrouted_mass)"),
    Column("matched_on", "str", "1", "what the strata hold equal; unseen difficulty is not controlled"),
    Column("n_tokens", "int64", "token", "tokens of the group in strata that hold two unflipped tokens or more"),
    Column("n_unmatched", "int64", "token", "tokens of the group left out: fewer unflipped tokens in their stratum"),
    Column("flipped_mean", "float64", "nat", "mean abs(logp_diff) of the group", nullable=True),
    Column(
        "unflipped_mean", "float64", "nat", "mean of unflipped tokens, strata weighted as the group's", nullable=True
    ),
    Column("excess", "float64", "nat", "flipped_mean - unflipped_mean: an association, no effect", nullable=True),
    *ci_columns("excess", "nat", "excess"),
    Column("ratio", "float64", "1", "flipped_mean / unflipped_mean", nullable=True),
    *ci_columns("ratio", "1", "ratio"),
    Column("raw_ratio", "float64", "1", "the same without matching strata: what a bare comparison says", nullable=True),
)

ENTROPY_QUANTILES = declare(
    "entropy_quantiles",
    "side and group of tokens",
    Column("side", "str", "1", "train or infer: whose next-token distribution"),
    Column("group", "str", "1", "all, kept (ratio inside the band) or masked (outside)"),
    Column("alpha", "float64", "1", "lower end of the band of ratio"),
    Column("beta", "float64", "1", "upper end"),
    Column("n_tokens", "int64", "token", "tokens with a ratio and an entropy"),
    Column("mean", "float64", "nat", "mean entropy", nullable=True),
    *ci_columns("mean", "nat", "mean"),
    Column("p10", "float64", "nat", "10 % quantile", nullable=True),
    Column("p50", "float64", "nat", "median", nullable=True),
    Column("p90", "float64", "nat", "90 % quantile", nullable=True),
)

CORRECTIONS = declare(
    "corrections",
    "off-policy correction applied offline",
    Column("method", "str", "1", "name and parameters"),
    Column("source", "str", "1", "where method and preset come from"),
    Column("n_tokens", "int64", "token", "tokens scored by both arms"),
    Column("masked_share", "float64", "1", "share of tokens whose weight is 0", nullable=True),
    *ci_columns("masked_share", "1", "masked_share"),
    Column("below_share", "float64", "1", "share with ratio < alpha", nullable=True),
    Column("above_share", "float64", "1", "share with ratio > beta", nullable=True),
)
