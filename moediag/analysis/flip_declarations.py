"""The frames of explained and forecast flips, declared; the others stand in :mod:`moediag.analysis.declarations`."""

from __future__ import annotations

from moediag.frames import Column, ci_columns, declare

SCORE_NOISE = declare(
    "score_noise",
    "MoE layer and way to measure the noise of scores",
    Column("layer", "int64", "1", "MoE layer, 0 = first MoE layer"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers"),
    Column("measure", "str", "1", "logits: sigma of each token from all E logits; margins: abs change of its margin"),
    Column("space", "str", "1", "logit, or choice where a bias or group rule decides (sigma then still in logits)"),
    Column("n_choices", "int64", "choice", "choices with a measured noise"),
    Column("sigma_p10", "float64", "score", "10 % quantile over tokens of the border pair's noise", nullable=True),
    Column("sigma_p50", "float64", "score", "median", nullable=True),
    Column("sigma_p90", "float64", "score", "90 % quantile", nullable=True),
    Column("sigma_p99", "float64", "score", "99 % quantile", nullable=True),
    Column("sigma_mean", "float64", "score", "mean: near ties the flip rate grows with it", nullable=True),
    Column("sigma_rms", "float64", "score", "root mean square; far above p50 = a mixture of scales", nullable=True),
    Column("growth", "float64", "1", "sigma_p50 over that of the first MoE layer", nullable=True),
    Column("no_noise_share", "float64", "1", "share of choices without any noise, bit for bit", nullable=True),
    Column("tie_share", "float64", "1", "share of exact ties at the border of the side that predicts", nullable=True),
)

EXPLAINED_FLIPS = declare(
    "explained_flips",
    "method and MoE layer (-1 = all layers)",
    Column("method", "str", "1", "all_pairs, border_pair, simulated (from logits) or margin_change (margins alone)"),
    Column("side", "str", "1", "whose scores predict: infer or train"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("decoder_layer", "int64", "1", "its index among all decoder layers; -1 for the pooled row"),
    Column("n_choices", "int64", "choice", "choices with a prediction"),
    Column("observed", "float64", "1", "their flip rate", nullable=True),
    *ci_columns("observed", "1", "observed"),
    Column("explained", "float64", "1", "mean P(flip) from one side's scores, other prompts' noise", nullable=True),
    Column("gap", "float64", "1", "observed - explained; 0 is perfect", nullable=True),
    *ci_columns("gap", "1", "gap"),
    Column("calibration_error", "float64", "1", "mean abs(observed - predicted) over bins, by choices", nullable=True),
    Column("calibration_error_expected", "float64", "1", "what chance gives a perfect prediction", nullable=True),
    Column("calibration_slope", "float64", "1", "slope of flips on predictions; 1 is perfect", nullable=True),
    Column("sigma_p50", "float64", "score", "median noise of the border pair", nullable=True),
    Column("sigma_p90", "float64", "score", "90 % quantile", nullable=True),
    Column("note", "str", "1", "why there is no prediction, or what it leaves out; empty otherwise"),
)

FLIP_CALIBRATION = declare(
    "flip_calibration",
    "method, MoE layer (-1 = all layers) and bin of the predicted probability",
    Column("method", "str", "1", "as in explained_flips"),
    Column("layer", "int64", "1", "MoE layer; -1 = all layers pooled"),
    Column("bin_low", "float64", "1", "lower edge of P(flip), inclusive"),
    Column("bin_high", "float64", "1", "upper edge, exclusive"),
    Column("n_choices", "int64", "choice", "choices with a prediction in the bin"),
    Column("predicted", "float64", "1", "their mean P(flip)"),
    Column("observed", "float64", "1", "their flip rate"),
    *ci_columns("observed", "1", "observed"),
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
    Column(
        "forecast",
        "float64",
        "1",
        "flip rate of the pair if it had that noise; no interval, since the noise is an estimate, too",
        nullable=True,
    ),
    Column("observed", "float64", "1", "flip rate that the pair shows under its own noise", nullable=True),
    *ci_columns("observed", "1", "observed"),
    Column("noise_observed", "float64", "1", "flip rate of the pair that the noise is from", nullable=True),
    *ci_columns("noise_observed", "1", "noise_observed"),
    Column("assumption", "str", "1", "what must hold for the forecast, or why there is none"),
)
