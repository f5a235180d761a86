"""The frames that analyses return: `moediag schema` prints this page, and reports take labels and captions from it.

Every interval is 95 %, clustered by prompt; NaN bounds mean that no honest interval can be given (the
frame or the caller says why). Rates and shares lie in [0, 1].
"""

from __future__ import annotations

from moediag.frames import Column, declare, measured, share, with_ci

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
    Column("metric", "str", "1", "name, as declared; dotted as in summary.json"),
    measured("value", "see unit", "the metric over all scored response tokens"),
    measured("ci_low", "see unit", "lower bound of the 95 % interval"),
    measured("ci_high", "see unit", "upper bound of the 95 % interval"),
    share(
        "largest_prompt_share",
        "share of the mean's sum, signs aside, that its largest prompt carries; NaN for rates and for what is no mean",
    ),
    Column("n_tokens", "int64", "token", "tokens behind the value"),
    Column("n_prompts", "int64", "prompt", "clusters behind the interval"),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good"),
    Column("note", "str", "1", "why there is no interval or no value; empty otherwise"),
    is_metrics=True,
)

_ABOVE = with_ci(share("share_above", "F(tau) = P(max(ratio, 1/ratio) > tau)", "F(tau)"))
TAIL_CURVE = declare(
    "tail_curve",
    "threshold of abs(logp_diff)",
    Column(
        "threshold", "float64", "nat", "abs(logp_diff) threshold; tau = exp(threshold)", label="abs(logp_diff) above"
    ),
    Column("n_above", "int64", "token", "tokens with abs(logp_diff) > threshold", label="tokens above"),
    *_ABOVE[:1],
    Column("n_tokens", "int64", "token", "tokens scored by both arms"),
    *_ABOVE[1:],
    section="tail",
    caption="Tail: share of tokens whose ratio or its inverse exceeds tau; lower is better",
)

AGREEMENT_BY_LAYER = declare(
    "agreement_by_layer",
    "MoE layer",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("n_tokens", "int64", "token", "routing rows compared (rows routed in both arms)", label="n rows"),
    *with_ci(share("same_set_rate", "share of rows whose expert set is the same", "same set")),
    *with_ci(share("cumulative_same_set_rate", "share of rows same in all layers 0..layer", "same in all so far")),
    *with_ci(share("overlap", "mean abs(A & B) / K of the two expert sets")),
    share("reorder_rate", "share of rows with the same set in another order", "reordered (harmless)"),
    *with_ci(share("jaccard", "mean abs(A & B) / abs(A | B) of the two expert sets")),
    *with_ci(share("top1_rate", "share of rows whose heaviest expert agrees; NaN = no gate weights")),
    *with_ci(
        measured(
            "misrouted_mass",
            "gate weight",
            "mean gate weight of train on experts infer did not choose; NaN = no train weights",
        )
    ),
    section="depth",
    caption="Agreement of expert sets by MoE layer [share of n]; higher is better",
)

FLIPS_PER_TOKEN = declare(
    "flips_per_token",
    "number of flipped layers",
    Column("n_flipped_layers", "int64", "layer", "MoE layers whose set differs for a token", label="flipped layers"),
    Column("n_tokens", "int64", "token", "tokens with exactly that many"),
    share("share", "their share of the routed tokens", "tokens"),
    share("independent_share", "share expected if layers flipped independently", "if independent"),
    measured("abs_logp_diff_mean", "nat", "mean abs(logp_diff) of those tokens", "mean"),
    measured("abs_logp_diff_p99", "nat", "p99 of abs(logp_diff) of those tokens", "p99"),
    section="depth",
    caption="Tokens by flipped layers [share], and their abs(logp_diff); no interval",
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
    Column("n_flipped", "int64", "choice", "those whose expert set flipped", label="flipped"),
    *with_ci(share("flip_rate", "P(flip | margin bin)", "P(flip)"), "; given for the pooled rows"),
    section="margins",
    caption="P(flip) by margin, all layers [share of n]",
)

MARGIN_QUANTILES = declare(
    "margin_quantiles",
    "score space and group of choices",
    Column("space", "str", "1", "choice or logit", label="score"),
    Column("group", "str", "1", "all, flipped or kept", label="choices"),
    Column("side", "str", "1", "whose margin: infer's, or train's where infer has none"),
    Column("n_choices", "int64", "choice", "(token, layer) choices in the group", label="n"),
    Column("n_exact_ties", "int64", "choice", "choices with a margin of exactly 0", label="exact ties"),
    measured("p01", "score", "1 % quantile of the margin", "p1"),
    measured("p10", "score", "10 % quantile"),
    measured("p50", "score", "median", "median"),
    measured("p90", "score", "90 % quantile"),
    measured("p99", "score", "99 % quantile"),
    section="margins",
    caption="Margins by score space and group of choices; larger is safer",
)

MARGIN_NOISE = declare(
    "margin_noise",
    "score space and MoE layer (-1 = all layers)",
    Column("space", "str", "1", "choice or logit", label="score"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled", label="MoE layer"),
    Column("side", "str", "1", "whose margin: infer's, or train's where infer has none"),
    Column("n_choices", "int64", "choice", "(token, layer) choices with a margin"),
    Column("n_flipped", "int64", "choice", "those whose expert set flipped", label="flipped"),
    Column("n_exact_ties", "int64", "choice", "choices with a margin of exactly 0", label="exact ties"),
    measured("sigma", "score", "noise of the score difference that P(flip | m) = Phi(-m / sigma) needs"),
    section="margins",
    caption="Noise sigma [score] that P(flip | margin) = Phi(-margin / sigma) needs; lower is better; no interval",
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
    share("flip_rate", "their share"),
)

EXPERT_SWAPS = declare(
    "expert_swaps",
    "MoE layer and pair of experts that stood in for each other, most frequent first",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("expert_train", "int64", "1", "the one expert that only train chose"),
    Column("expert_infer", "int64", "1", "the one expert that only infer chose"),
    Column("n_swaps", "int64", "choice", "choices where exactly these two were exchanged", label="swaps"),
    Column(
        "n_reverse",
        "int64",
        "choice",
        "choices where the same two were exchanged the other way round",
        label="the other way",
    ),
    share("share_of_flips", "n_swaps over the layer's flips", "of the layer's flips"),
    Column("n_flips", "int64", "choice", "flips of the layer"),
    Column("n_single_flips", "int64", "choice", "flips of the layer that exchange exactly one expert"),
    section="depth",
    caption="Experts that stand in for each other, the most frequent",
)

DRIFT_BY_POSITION = declare(
    "drift_by_position",
    "bin of positions in the response",
    Column("position_low", "int64", "token", "first position of the bin"),
    Column("position_high", "int64", "token", "last position of the bin, inclusive"),
    Column("n_tokens", "int64", "token", "tokens scored by both arms"),
    Column("n_sequences", "int64", "sequence", "sequences that reach the bin (late bins hold survivors)"),
    *with_ci(measured("abs_logp_diff_mean", "nat", "mean abs(logp_diff)", "mean")),
    measured("abs_logp_diff_p50", "nat", "median", "p50"),
    measured("abs_logp_diff_p90", "nat", "90 % quantile", "p90"),
    measured("abs_logp_diff_p99", "nat", "99 % quantile", "p99"),
    share("extreme_share_2", "share with max(ratio, 1/ratio) > 2", "F(2)"),
    share("flip_rate", "share of (token, layer) whose set differs; NaN = dense"),
    section="drift",
    caption="abs(logp_diff) by position in the response; lower is better, flat is good",
)

RATIO_QUANTILES = declare(
    "ratio_quantiles",
    "level (token, sequence_product, sequence_geometric) and probability",
    Column(
        "level",
        "str",
        "1",
        "token: ratio; sequence_product: exp(sum d); sequence_geometric: exp(mean d)",
        label="ratio of",
    ),
    Column("q", "float64", "1", "probability of the quantile", label="quantile"),
    *with_ci(measured("log_ratio", "nat", "quantile of the log-ratio; NaN = tail too thin", "log-ratio")),
    Column("n", "int64", "token or sequence", "tokens or sequences behind the quantile", label="n"),
    section="tail",
    caption="Quantiles of pi_train / pi_infer; 0 nat is best",
)

METRICS_BY_STRATUM = declare(
    "metrics_by_stratum",
    "stratum (by position, p_infer, entropy or n_flipped_layers) and metric",
    Column("stratifier", "str", "1", "position, p_infer, entropy or n_flipped_layers", label="by"),
    Column("stratum_low", "float64", "stratifier's", "lower end of the stratum, inclusive"),
    Column("stratum_high", "float64", "stratifier's", "upper end; exclusive for p_infer and entropy, else inclusive"),
    Column("metric", "str", "1", "dotted name as in logp_metrics, or flip_rate"),
    measured("value", "see unit", "the metric over the stratum's scored tokens", "mean"),
    measured("ci_low", "see unit", "lower bound of the 95 % interval"),
    measured("ci_high", "see unit", "upper bound of the 95 % interval"),
    Column("n_tokens", "int64", "token", "tokens of the stratum"),
    Column("n_prompts", "int64", "prompt", "prompts with a token in the stratum"),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good", label="good end"),
    section="kinds",
    caption="Mean abs(logp_diff) by kind of token",
)

SEQUENCES = declare(
    "sequences",
    "sequence with a response token",
    Column("seq_id", "int64", "1", "sequence", label="seq"),
    Column("prompt_id", "int64", "1", "its prompt", label="prompt"),
    Column("sample_index", "int32", "1", "which sample of the prompt", label="sample"),
    Column("n_tokens", "int64", "token", "response tokens scored by both arms"),
    Column("n_unscored", "int64", "token", "response tokens that an arm did not score"),
    measured("abs_logp_diff_mean", "nat", "mean abs(logp_diff)", "mean"),
    measured("abs_logp_diff_max", "nat", "largest abs(logp_diff)", "max"),
    Column("worst_position", "int64", "token", "position of that token; -1 = none scored", label="worst at"),
    measured("k3", "nat", "mean of ratio - 1 - logp_diff"),
    measured("log_ratio_sum", "nat", "log of the product ratio: sum of logp_diff", "log-ratio"),
    measured("log_ratio_mean", "nat", "log of the geometric ratio: minus the log ppl gap"),
    measured("ppl_train", "1", "perplexity of the response under train"),
    measured("ppl_infer", "1", "perplexity of the response under infer"),
    share("extreme_share_2", "share of tokens with max(ratio, 1/ratio) > 2", "F(2)"),
    share("flip_rate", "share of (token, layer) whose set differs; NaN = dense"),
    Column("first_flip_position", "int64", "token", "first position with a flip; -1 = none", label="first flip at"),
    Column("first_flip_layer", "int64", "1", "first flipped MoE layer there; -1 = none"),
    section="worst-sequences",
    caption="Responses with the largest mean abs(logp_diff); log-ratio: of the whole response, 0 is best",
)

WORST_TOKENS = declare(
    "worst_tokens",
    "response token, largest abs(logp_diff) first",
    Column("rank", "int64", "1", "0 = largest abs(logp_diff)"),
    Column("seq_id", "int64", "1", "sequence the token belongs to", label="seq"),
    Column("prompt_id", "int64", "1", "prompt of the sequence", label="prompt"),
    Column("sample_index", "int32", "1", "which sample of the prompt"),
    Column("position", "int32", "token", "position in the response", label="pos"),
    Column("token_id", "int64", "1", "the token scored"),
    Column("logp_train", "float32", "nat", "log-probability given by the train arm"),
    Column("logp_infer", "float32", "nat", "log-probability given by the infer arm"),
    Column("logp_diff", "float64", "nat", "logp_train - logp_infer"),
    Column(
        "n_flipped_layers",
        "int16",
        "layer",
        "MoE layers whose expert set differs; -1 = dense or not known",
        label="flips",
    ),
    Column("first_flipped_layer", "int16", "1", "first such layer; -1 = none", label="first layer", kind="id"),
    section="worst-tokens",
    caption="Response tokens with the largest abs(logp_diff); logp_diff = train − infer, 0 is best; single tokens "
    "have no interval",
)

FIRST_DIVERGENCE = declare(
    "first_divergence",
    "MoE layer in which sequences flip for the first time",
    Column("layer", "int64", "1", "MoE layer; -1 = sequences without a flip"),
    Column("n_sequences", "int64", "sequence", "sequences whose first flip is in this layer"),
    measured("share", "1", "their share of the routed sequences"),
    measured("position_p10", "token", "10 % quantile of the position of that flip"),
    measured("position_p50", "token", "its median"),
    measured("position_p90", "token", "its 90 % quantile"),
)

DRIFT_BY_LENGTH = declare(
    "drift_by_length",
    "bin of response lengths",
    Column("length_low", "int64", "token", "shortest response of the bin"),
    Column("length_high", "int64", "token", "longest response of the bin, inclusive"),
    Column("n_sequences", "int64", "sequence", "sequences of the bin"),
    *with_ci(measured("log_ratio_mean", "nat", "mean over sequences of log(pi_train / pi_infer)", "log-ratio, mean")),
    *with_ci(measured("abs_log_ratio_mean", "nat", "mean over sequences of its absolute value", "size, mean")),
    measured("abs_log_ratio_p50", "nat", "median", "size, p50"),
    measured("abs_log_ratio_p90", "nat", "90 % quantile", "size, p90"),
    section="drift",
    caption="log(pi_train / pi_infer) of whole responses by length; 0 is best",
)

FLIP_EXCESS = declare(
    "flip_excess",
    "group of flipped tokens compared with unflipped tokens of the same strata",
    Column("grouping", "str", "1", "any_flip, n_flipped_layers, first_flipped_layer or misrouted_mass"),
    Column("group_low", "float64", "grouping's", "lower end of the group, inclusive"),
    Column("group_high", "float64", "grouping's", "upper end, inclusive (exclusive for misrouted_mass)"),
    Column("matched_on", "str", "1", "what the strata hold equal; unseen difficulty is not controlled"),
    Column("n_tokens", "int64", "token", "tokens of the group in strata that hold two unflipped tokens or more"),
    Column(
        "n_unmatched",
        "int64",
        "token",
        "tokens of the group left out: fewer unflipped tokens in their stratum",
        label="left out",
    ),
    measured("flipped_mean", "nat", "mean abs(logp_diff) of the group", "flipped"),
    measured(
        "unflipped_mean", "nat", "mean of unflipped tokens, strata weighted as the group's", "like them, unflipped"
    ),
    *with_ci(measured("excess", "nat", "flipped_mean - unflipped_mean: an association, no effect")),
    *with_ci(measured("ratio", "1", "flipped_mean / unflipped_mean", kind="times")),
    measured(
        "raw_ratio",
        "1",
        "the same without matching strata: what a bare comparison says",
        "ratio, unmatched",
        kind="times",
    ),
    section="excess",
    caption="Mean abs(logp_diff) of flipped tokens and of unflipped ones of the same strata; an excess of 0 (ratio "
    "1) is best; unseen difficulty is not controlled",
)

ENTROPY_QUANTILES = declare(
    "entropy_quantiles",
    "side and group of tokens",
    Column("side", "str", "1", "train or infer: whose next-token distribution"),
    Column("group", "str", "1", "all, kept (ratio inside the band) or masked (outside)", label="tokens"),
    Column("alpha", "float64", "1", "lower end of the band of ratio"),
    Column("beta", "float64", "1", "upper end"),
    Column("n_tokens", "int64", "token", "tokens with a ratio and an entropy"),
    *with_ci(measured("mean", "nat", "mean entropy")),
    measured("p10", "nat", "10 % quantile"),
    measured("p50", "nat", "median", "median"),
    measured("p90", "nat", "90 % quantile"),
    section="corrections",
    caption="Entropy of kept and masked tokens",
)

CORRECTIONS = declare(
    "corrections",
    "off-policy correction applied offline",
    Column("method", "str", "1", "name and parameters", label="correction"),
    Column("source", "str", "1", "where method and preset come from", label="preset from"),
    Column("n_tokens", "int64", "token", "tokens scored by both arms"),
    *with_ci(share("masked_share", "share of tokens whose weight is 0", "masked")),
    share("below_share", "share with ratio < alpha", "below the band"),
    share("above_share", "share with ratio > beta", "above the band"),
    section="corrections",
    caption="Tokens that a correction would mask [share of n]; fewer masked tokens lose less data",
)

SCORE_NOISE = declare(
    "score_noise",
    "MoE layer and way to measure the noise of scores",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("measure", "str", "1", "logits: sigma of each token from all E logits; margins: abs change of its margin"),
    Column("space", "str", "1", "logit, or choice where a bias or group rule decides (sigma then still in logits)"),
    Column("n_choices", "int64", "choice", "choices with a measured noise"),
    measured("sigma_p10", "score", "10 % quantile over tokens of the border pair's noise"),
    measured("sigma_p50", "score", "median"),
    measured("sigma_p90", "score", "90 % quantile"),
    measured("sigma_p99", "score", "99 % quantile"),
    measured("sigma_mean", "score", "mean: near ties the flip rate grows with it"),
    measured("sigma_rms", "score", "root mean square; far above p50 = a mixture of scales"),
    measured("growth", "1", "sigma_p50 over that of the first MoE layer"),
    share("no_noise_share", "share of choices without any noise, bit for bit"),
    share("tie_share", "share of exact ties at the border of the side that predicts"),
    section="margins",
    caption="Noise of router scores by layer; lower is better; no interval",
)

EXPLAINED_FLIPS = declare(
    "explained_flips",
    "method and MoE layer (-1 = all layers)",
    Column(
        "method",
        "str",
        "1",
        "all_pairs, border_pair, simulated (from logits) or margin_change (margins alone)",
        label="from",
    ),
    Column("side", "str", "1", "whose scores predict: infer or train"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers; -1 for the pooled row"),
    Column("n_choices", "int64", "choice", "choices with a prediction"),
    *with_ci(share("observed", "their flip rate")),
    share("explained", "mean P(flip) from one side's scores, other prompts' noise"),
    *with_ci(share("gap", "observed - explained; 0 is perfect")),
    share("calibration_error", "mean abs(observed - predicted) over bins, by choices", "error"),
    share("calibration_error_expected", "what chance gives a perfect prediction", "by chance"),
    measured("calibration_slope", "1", "slope of flips on predictions; 1 is perfect"),
    measured("sigma_p50", "score", "median noise of the border pair"),
    measured("sigma_p90", "score", "90 % quantile"),
    Column("note", "str", "1", "why there is no prediction, or what it leaves out; empty otherwise"),
    section="margins",
    caption="Flips observed and explained [share of n]; a gap and an error of 0 are best; explained has no interval "
    "of its own, the noise it takes is an estimate, too",
)

FLIP_CALIBRATION = declare(
    "flip_calibration",
    "method, MoE layer (-1 = all layers) and bin of the predicted probability",
    Column("method", "str", "1", "as in explained_flips"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("bin_low", "float64", "1", "lower edge of P(flip), inclusive"),
    Column("bin_high", "float64", "1", "upper edge, exclusive"),
    Column("n_choices", "int64", "choice", "choices with a prediction in the bin"),
    Column("predicted", "float64", "1", "their mean P(flip)", kind="share"),
    *with_ci(Column("observed", "float64", "1", "their flip rate", label="flipped", kind="share")),
    section="margins",
    caption="Explanation held against what happened, by predicted P(flip) [share of n]; equal is best",
)

FORECAST_FLIPS = declare(
    "forecast_flips",
    "pair, source of noise and MoE layer (-1 = all layers)",
    Column("pair", "str", "1", "pair of arms that the forecast is of"),
    Column("side", "str", "1", "whose scores of that pair predict: infer or train"),
    Column("noise_from", "str", "1", "pair of arms that the noise was measured on"),
    Column("method", "str", "1", "as in explained_flips"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers; -1 for the pooled row"),
    Column("n_choices", "int64", "choice", "choices with a forecast"),
    share("forecast", "flip rate of the pair if it had that noise; no interval, since the noise is an estimate, too"),
    *with_ci(share("observed", "flip rate that the pair shows under its own noise", "it shows")),
    *with_ci(share("noise_observed", "flip rate of the pair that the noise is from", "the noise's own pair shows")),
    Column("assumption", "str", "1", "what must hold for the forecast, or why there is none", label="holds if"),
    section="margins",
    caption="Flips forecast for the pair under the noise of another [share of n]; lower is better; no interval, the "
    "noise is an estimate, too",
)

MODULE_CHECKS = declare(
    "module_checks",
    "module of a decoder layer, in the order of computation",
    Column("module", "str", "1", "what is compared: embeddings, a norm, attention, router, routed experts, ..., head"),
    Column("decoder_layer", "int64", "1", "its decoder layer; -1 = none", label="decoder layer", kind="id"),
    Column("n_rows", "int64", "token", "token rows given to both engines' modules"),
    measured("float32_p50", "1", "median over rows of the relative difference of the outputs, both in float32"),
    measured("float32_max", "1", "largest over rows of the relative difference of the outputs, both in float32"),
    measured("bound", "1", "relative difference in float32 up to which it is rounding, for this module"),
    measured(
        "n_beyond",
        "token",
        "rows whose float32 outputs differ by more than the bound; NaN = vLLM has none",
        "n beyond",
        kind="count",
    ),
    measured("train_p50", "1", "median relative distance of transformers' low-precision output to its float32 one"),
    measured("train_p99", "1", "its p99 over rows"),
    measured("infer_p50", "1", "median relative distance of vLLM's low-precision output to transformers' float32 one"),
    measured("infer_p99", "1", "its p99 over rows"),
    measured("ratio", "1", "infer_p50 / train_p50: above 1, vLLM is farther from float32", kind="times"),
    measured(
        "free_p50",
        "1",
        "residual streams only: median relative difference of the engines' ordinary runs in the low precision, where "
        "nothing is given: it grows with depth and is not judged",
    ),
    measured(
        "n_bit_equal", "token", "rows equal bit for bit in the low precision; NaN = none", "n bit-equal", kind="count"
    ),
    Column(
        "verdict",
        "str",
        "1",
        "same function, another function, rounds more, no rounding, beyond rounding, follows, not judged",
    ),
    Column("note", "str", "1", "whose rounding, what it follows from, or why it is not judged; empty otherwise"),
    section="ladder",
    caption="Every module of both engines on the same inputs: relative differences of its outputs; lower is better",
)
