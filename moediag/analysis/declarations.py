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
)

LOGP_METRICS = declare(
    "logp_metrics",
    "metric of the log-probability mismatch",
    Column("metric", "str", "1", "dotted name, as in summary.json under pairs[...].logp"),
    Column("value", "float64", "see unit", "the metric over all scored response tokens", nullable=True),
    Column("ci_low", "float64", "see unit", "lower bound of the 95 % interval", nullable=True),
    Column("ci_high", "float64", "see unit", "upper bound of the 95 % interval", nullable=True),
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
    Column("bin_low", "float64", "score", "lower edge of the infer arm's margin; 0 to 0 = exact ties, -inf = negative"),
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
    Column("n_choices", "int64", "choice", "(token, layer) choices in the group"),
    Column("n_exact_ties", "int64", "choice", "choices with a margin of exactly 0"),
    Column("p01", "float64", "score", "1 % quantile of the margin", nullable=True),
    Column("p10", "float64", "score", "10 % quantile", nullable=True),
    Column("p50", "float64", "score", "median", nullable=True),
    Column("p90", "float64", "score", "90 % quantile", nullable=True),
    Column("p99", "float64", "score", "99 % quantile", nullable=True),
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
