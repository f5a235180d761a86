"""Declared frames with realistic numbers, made from a seed: what the figure and report tests draw."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from moediag.analysis import declarations as declared
from moediag.analysis.attribution import flip_excess, flip_shares
from moediag.analysis.declarations import EXPLAINED_FLIPS, FLIP_CALIBRATION, FORECAST_FLIPS
from moediag.analysis.metrics import METRICS
from moediag.analysis.routing import independent_flips
from moediag.analysis.sequences import drift_by_length, sequence_frame
from moediag.analysis.strata import metrics_by_stratum

MARGIN_EDGES = np.concatenate([[0.0], 10.0 ** np.arange(-5, 0.01, 0.25)])


def make_run(
    n_tokens=16384, n_layers=6, scale=1.0, seed=0, n_prompts=64, first_decoder_layer=1, n_bins=16, n_experts=16
):
    """One run's frames; ``n_layers=0`` is a dense run, ``scale=0`` a self comparison.

    Frames that exist only as tables of counts are made of counts here; those of tokens by their own analyses.
    """
    rng = np.random.default_rng(seed)
    diff = _differences(rng, n_tokens, dense=n_layers == 0) * scale
    last = 0.968 if n_layers <= 8 else 0.95
    rates = np.where(scale > 0, 0.99 - (0.99 - last) * (1 - np.exp(-0.5 * np.arange(n_layers))), 1.0)
    # Flips come together, as they do in engines: some tokens have noisier router inputs than others.
    noisy = np.minimum(np.random.default_rng(seed + 1).lognormal(-0.5, 1.0, (n_tokens, 1)), 10.0)
    flips = rng.random((n_tokens, n_layers)) > 1 - (1 - rates) * noisy if n_layers else np.zeros((n_tokens, 0), bool)
    tokens = _tokens(rng, diff, flips, n_prompts)
    tokens = declared.TOKENS.validate(tokens)
    return {
        "tokens": tokens,
        "logp_metrics": declared.LOGP_METRICS.validate(_metrics(diff, n_prompts)),
        "tail_curve": declared.TAIL_CURVE.validate(_tail(diff)),
        "agreement_by_layer": declared.AGREEMENT_BY_LAYER.validate(_agreement(flips, first_decoder_layer)),
        "flips_per_token": declared.FLIPS_PER_TOKEN.validate(_flips_per_token(flips, diff)),
        "margin_curve": declared.MARGIN_CURVE.validate(_margin_curve(rng, n_tokens, n_layers, scale)),
        "margin_quantiles": declared.MARGIN_QUANTILES.validate(_margin_quantiles(n_tokens * n_layers)),
        "drift_by_position": declared.DRIFT_BY_POSITION.validate(_drift(diff, flips, tokens, n_bins)),
        "margin_noise": declared.MARGIN_NOISE.validate(_margin_noise(n_tokens, n_layers, scale)),
        "flips_by_layer_position": declared.FLIPS_BY_LAYER_POSITION.validate(_flip_map(flips, tokens, n_bins)),
        "expert_swaps": declared.EXPERT_SWAPS.validate(_swaps(rng, flips, n_experts)),
        **_predicted(flips, first_decoder_layer),
        "flip_excess": flip_excess(tokens),
        "flip_shares": flip_shares(tokens),
        "sequences": sequence_frame(tokens, n_layers),
        "drift_by_length": drift_by_length(sequence_frame(tokens, n_layers)),
        "metrics_by_stratum": metrics_by_stratum(tokens, n_layers),
        "corrections": declared.CORRECTIONS.validate(_corrections(diff)),
    }


def empty_frame(spec):
    return spec.validate(pd.DataFrame({c.name: pd.Series(dtype=c.dtype) for c in spec.columns}))


def blank_run(frames):
    """Every measured value absent: an engine that scored nothing."""
    keep = {"threshold", "bin_low", "bin_high"}
    blank = {
        name: frame.assign(**{c: np.nan for c in frame.columns if frame[c].dtype.kind == "f" and c not in keep})
        for name, frame in frames.items()
    }
    blank["tail_curve"] = blank["tail_curve"].assign(n_above=0, n_tokens=0)
    for name in ("flip_excess", "metrics_by_stratum", "drift_by_length"):
        blank[name] = frames[name].iloc[:0]
    blank["sequences"] = blank["sequences"].assign(n_tokens=0, worst_position=-1)
    return blank


def _differences(rng, n, dense):
    """abs about 0.015 (MoE) or 0.007 (dense) on average, many exact zeros, a tail to 0.6 or 0.11."""
    size = rng.lognormal(np.log(0.004 if not dense else 0.0042), 1.5 if not dense else 1.15, n)
    size = np.minimum(size, 0.6 if not dense else 0.11)
    size[rng.random(n) < 0.12] = 0.0
    return size * rng.choice([-1.0, 1.0], n)


def _tokens(rng, diff, flips, n_prompts):
    n = len(diff)
    length = max(n // n_prompts, 1)
    infer = -rng.exponential(0.7, n)
    dense = flips.shape[1] == 0
    return pd.DataFrame(
        {
            "seq_id": np.arange(n) // length,
            "prompt_id": (np.arange(n) // length) % n_prompts,
            "sample_index": np.zeros(n),
            "position": np.arange(n) % length,
            "token_id": rng.integers(0, 1000, n),
            "logp_train": infer.astype("float32").astype("float64") + diff,
            "logp_infer": infer,
            "entropy_train": rng.random(n),
            "entropy_infer": rng.random(n),
            "n_flipped_layers": np.full(n, -1) if dense else flips.sum(1),
            "first_flipped_layer": np.full(n, -1) if dense else np.where(flips.any(1), flips.argmax(1), -1),
            "misrouted_mass": np.full(n, np.nan) if dense else 0.1 * flips.sum(1),
        }
    )


def _metrics(diff, n_prompts):
    size, ratio = np.abs(diff), np.exp(diff)
    rows = {
        "abs_logp_diff.mean": (size.mean(), 1.0),
        **{f"abs_logp_diff.p{k}": (np.quantile(size, float(f"0.{k}")), 1.0) for k in ("50", "90", "99", "999")},
        "abs_logp_diff.max": (size.max(), np.nan),
        "abs_prob_diff.mean": (0.4 * size.mean(), 1.0),
        "kl_infer_train_k1": (-diff.mean(), 1.0),
        "kl_infer_train_k3": ((ratio - 1 - diff).mean(), 1.0),
        "mean_ratio": (ratio.mean(), 1.0),
        "extreme_share_2": (np.mean(size > np.log(2)), 1.0),
    }
    return pd.DataFrame(
        [
            {"metric": k, "value": v, "ci_low": v * 0.93 * c, "ci_high": v * 1.07 * c, "n_tokens": len(diff),
             "largest_prompt_share": 0.05 * c, "n_prompts": n_prompts, "unit": "nat", "direction": "lower is better",
             "note": "" if c == 1 else "no interval for a maximum"}
            for k, (v, c) in rows.items()
        ]
    )  # fmt: skip


def _tail(diff):
    thresholds = 10 ** np.linspace(-4, 1, 101)
    above = np.array([(np.abs(diff) > x).sum() for x in thresholds])
    return pd.DataFrame(
        {"threshold": thresholds, "n_above": above, "share_above": above / len(diff), "n_tokens": len(diff),
         "share_above_ci_low": 0.9 * above / len(diff), "share_above_ci_high": 1.1 * above / len(diff)}
    )  # fmt: skip


def _band(frame, name, half):
    frame[f"{name}_ci_low"] = (frame[name] - half).clip(lower=0)
    frame[f"{name}_ci_high"] = (frame[name] + half).clip(upper=1)


def _agreement(flips, first_decoder_layer):
    n, n_layers = flips.shape
    if not n_layers:
        return pd.DataFrame({c.name: pd.Series(dtype=c.dtype) for c in declared.AGREEMENT_BY_LAYER.columns})
    frame = pd.DataFrame({"layer": np.arange(n_layers), "n_tokens": n})
    frame["decoder_layer"] = frame["layer"] + first_decoder_layer
    frame["same_set_rate"] = 1 - flips.mean(0)
    frame["cumulative_same_set_rate"] = (~np.logical_or.accumulate(flips, 1)).mean(0)
    frame["overlap"] = 1 - flips.mean(0) / 4
    frame["jaccard"] = 1 - flips.mean(0) / 3
    frame["top1_rate"] = 1 - flips.mean(0) / 10
    frame["misrouted_mass"] = flips.mean(0) / 20
    for name in ("same_set_rate", "cumulative_same_set_rate", "overlap", "jaccard", "top1_rate", "misrouted_mass"):
        _band(frame, name, 2.5 * np.sqrt(frame[name] * (1 - frame[name]) / n))
    frame["reorder_rate"] = 0.004
    return frame


def _flips_per_token(flips, diff):
    counts = np.bincount(flips.sum(1), minlength=flips.shape[1] + 1) if flips.shape[1] else np.zeros(0)
    share = counts / max(counts.sum(), 1)
    alone = independent_flips(flips.mean(0)) if len(counts) else share
    return pd.DataFrame(
        {"n_flipped_layers": np.arange(len(counts)), "n_tokens": counts, "share": share, "independent_share": alone,
         "abs_logp_diff_mean": np.abs(diff).mean(), "abs_logp_diff_p99": np.abs(diff).max()}
    )  # fmt: skip


def _margin_curve(rng, n_tokens, n_layers, scale):
    rows = []
    for space, factor in (("choice", 0.05), ("logit", 0.5)):
        per_layer = [_layer_bins(rng, n_tokens, factor, 0.05 * factor * scale * (1 + i)) for i in range(n_layers)]
        for layer in range(-1, n_layers):
            if not n_layers:
                break
            n, flipped = np.sum(per_layer, 0) if layer < 0 else per_layer[layer]
            rate = np.where(n > 0, flipped / np.maximum(n, 1), np.nan)
            half = np.where(layer < 0, 2 * np.sqrt(rate * (1 - rate) / np.maximum(n, 1)), np.nan)
            rows.append(
                pd.DataFrame(
                    {"space": space, "layer": layer, "side": "infer",
                     "bin_low": np.concatenate([[0.0], MARGIN_EDGES[:-1]]),
                     "bin_high": np.concatenate([[0.0], MARGIN_EDGES[1:-1], [np.inf]]), "n_choices": n,
                     "n_flipped": flipped, "flip_rate": rate, "flip_rate_ci_low": np.clip(rate - half, 0, 1),
                     "flip_rate_ci_high": np.clip(rate + half, 0, 1)}
                )
            )  # fmt: skip
    if not rows:
        return pd.DataFrame({c.name: pd.Series(dtype=c.dtype) for c in declared.MARGIN_CURVE.columns})
    return pd.concat(rows)


def _layer_bins(rng, n_tokens, factor, noise):
    margin = rng.exponential(factor, n_tokens)
    margin[rng.random(n_tokens) < 0.002] = 0.0
    flipped = np.abs(rng.normal(0, noise, n_tokens)) * rng.lognormal(0, 0.7, n_tokens) > margin * 1.5
    tie = margin == 0
    n = np.histogram(margin[~tie], np.append(MARGIN_EDGES[:-1], np.inf))[0]
    k = np.histogram(margin[~tie & flipped], np.append(MARGIN_EDGES[:-1], np.inf))[0]
    return np.concatenate([[tie.sum()], n]), np.concatenate([[(tie & flipped).sum()], k])


def _margin_noise(n_tokens, n_layers, scale):
    rows = [
        {"space": space, "layer": layer, "side": "infer", "n_choices": n_tokens, "n_flipped": n_tokens // 30,
         "n_exact_ties": n_tokens // 500, "sigma": 0.002 * factor * (2 + layer) if scale else np.nan}
        for space, factor in (("choice", 1.0), ("logit", 10.0)) for layer in range(-1, n_layers) if n_layers
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[c.name for c in declared.MARGIN_NOISE.columns])


def _flip_map(flips, tokens, n_bins):
    n_layers = flips.shape[1]
    position = tokens["position"].to_numpy()
    width = -(-(int(position.max()) + 1) // n_bins)
    rows = []
    for low in range(0, int(position.max()) + 1 if n_layers else 0, width):
        here = (position >= low) & (position < low + width)
        for layer in range(n_layers):
            n, flipped = int(here.sum()), int(flips[here, layer].sum())
            rows.append({"layer": layer, "decoder_layer": layer + 1, "position_low": low, "n_choices": n,
                         "position_high": low + width - 1, "n_flipped": flipped, "flip_rate": flipped / n})  # fmt: skip
    return pd.DataFrame(rows, columns=[c.name for c in declared.FLIPS_BY_LAYER_POSITION.columns])


def _swaps(rng, flips, n_experts, top=500):
    """Neighbours in load swap: a few favourite pairs per layer and a wide rest, both ways about equally often."""
    rows = []
    for layer, n_flips in enumerate(flips.sum(0)):
        first = np.minimum(rng.geometric(4 / n_experts, n_flips) - 1, n_experts - 1)
        pair = rng.permutation(n_experts)
        other = (first + rng.geometric(0.3, n_flips)) % n_experts
        train, infer = pair[first], pair[other]
        turn = rng.random(n_flips) < 0.5
        counts = np.zeros((n_experts, n_experts), int)
        np.add.at(counts, (np.where(turn, train, infer), np.where(turn, infer, train)), train != infer)
        rows += [
            {"layer": layer, "decoder_layer": layer + 1, "expert_train": a, "expert_infer": b, "n_swaps": counts[a, b],
             "n_reverse": counts[b, a], "share_of_flips": counts[a, b] / n_flips, "n_flips": n_flips,
             "n_single_flips": counts.sum()}
            for a, b in np.argwhere(counts)
        ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=[c.name for c in declared.EXPERT_SWAPS.columns])
    return frame.sort_values("n_swaps", ascending=False, kind="stable").head(top)


def _predicted(flips, first_decoder_layer):
    """Explained and forecast flips: the explanation a little too low, an fp8 router flipping twice as much."""
    n, n_layers = flips.shape
    rates = [(layer, flips[:, layer].mean(), n) for layer in range(n_layers)]
    rates = [(-1, flips.mean(), n * n_layers), *rates] if n_layers else []
    explained, forecasts, curve = [], [], []
    for layer, rate, choices in rates:
        half = 2 * np.sqrt(rate * (1 - rate) / choices)
        where = {"layer": layer, "decoder_layer": layer + first_decoder_layer if layer >= 0 else -1,
                 "n_choices": choices, "observed": rate, "observed_ci_low": max(rate - half, 0),
                 "observed_ci_high": rate + half, "calibration_error": 0.03 * rate,
                 "calibration_error_expected": 0.02 * rate, "calibration_slope": 0.99}  # fmt: skip
        for method, factor in (("all_pairs", 0.95), ("margin_change", 0.9)):
            value = factor * rate
            explained.append({**where, "method": method, "side": "infer", "explained": value, "note": "",
                              "gap": rate - value,
                              "gap_ci_low": rate - value - half, "gap_ci_high": rate - value + half})  # fmt: skip
            curve += [{"method": method, "layer": layer, "bin_low": low, "bin_high": high, "n_choices": choices // 6,
                       "predicted": (low + high) / 2, "observed": min(2.0 * low, 1) if rate else 0.0,
                       "observed_ci_low": low, "observed_ci_high": min(3 * high, 1)}
                      for low, high in pairwise([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0])]  # fmt: skip
        for source, factor in (("infer~infer-repeat", 0.0), ("train~train-perturbed", 1.5)):
            value = min(factor * rate, 1.0)
            forecasts.append({**where, "pair": "infer~train", "side": "infer", "noise_from": source,
                              "method": "all_pairs", "forecast": value, "noise_observed": value,
                              "noise_observed_ci_low": 0.9 * value, "noise_observed_ci_high": min(1.1 * value, 1.0),
                              "assumption": f"{source} as is"})  # fmt: skip
    made = {"explained_flips": explained, "flip_calibration": curve, "forecast_flips": forecasts}
    specs = (EXPLAINED_FLIPS, FLIP_CALIBRATION, FORECAST_FLIPS)
    return {
        spec.name: spec.validate(pd.DataFrame(made[spec.name], columns=[c.name for c in spec.columns]))
        for spec in specs
    }


def _margin_quantiles(n):
    rows = [
        {"space": s, "group": g, "side": "infer",
         "n_choices": n, "n_exact_ties": 12, "p01": m / 50, "p10": m / 8, "p50": m,
         "p90": m * 3, "p99": m * 6}
        for s in ("choice", "logit") for g, m in (("all", 0.034), ("flipped", 0.0021), ("kept", 0.035))
    ] if n else []  # fmt: skip
    columns = [c.name for c in declared.MARGIN_QUANTILES.columns]
    return pd.DataFrame(rows, columns=columns).astype({c.name: c.dtype for c in declared.MARGIN_QUANTILES.columns})


def _drift(diff, flips, tokens, n_bins):
    position = tokens["position"].to_numpy()
    edges = np.unique(np.linspace(0, position.max() + 1, n_bins + 1).astype(int))
    rows = []
    for low, high in pairwise(edges):
        here = (position >= low) & (position < high)
        size = np.abs(diff[here])
        mean, half = size.mean(), 2 * size.std() / np.sqrt(here.sum())
        rows.append(
            {"position_low": low, "position_high": high - 1, "n_tokens": here.sum(),
             "n_sequences": tokens["seq_id"][here].nunique(), "abs_logp_diff_mean": mean,
             "abs_logp_diff_mean_ci_low": mean - half, "abs_logp_diff_mean_ci_high": mean + half,
             "abs_logp_diff_p50": np.quantile(size, 0.5), "abs_logp_diff_p90": np.quantile(size, 0.9),
             "abs_logp_diff_p99": np.quantile(size, 0.99), "extreme_share_2": np.mean(size > np.log(2)),
             "flip_rate": flips[here].mean() if flips.shape[1] else np.nan}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _corrections(diff):
    below, above = np.mean(diff < np.log(0.5)), np.mean(diff > np.log(5))
    return pd.DataFrame(
        [{"method": "icepop_0.5_5.0", "source": "Ring-1T (arXiv 2510.18855)", "n_tokens": len(diff),
          "masked_share": below + above, "masked_share_ci_low": 0.0, "masked_share_ci_high": 2 * below + 1e-3,
          "below_share": below, "above_share": above}]
    )  # fmt: skip


def _flip_shares(frames):
    if not len(frames["agreement_by_layer"]):
        return {}
    metrics = ((METRICS[row["metric"]], row) for row in frames["flip_shares"].to_dict("records"))
    group = {"n_tokens": len(frames["tokens"])}
    for metric, row in metrics:
        group |= metric.entry(row["value"], row["ci_low"], row["ci_high"])
    return {"flip_shares": group}


def make_summary(frames, path="models/tiny-moe", **model):
    """A run summary in the shape of summary.json, with the numbers of ``frames``."""
    metrics = frames["logp_metrics"].set_index("metric")
    layers, tokens = frames["agreement_by_layer"], frames["tokens"]
    logp = {"abs_logp_diff": {}, "abs_prob_diff": {}}
    for name, row in metrics.iterrows():
        group, _, leaf = name.rpartition(".")
        home = logp[group] if group else logp
        home[leaf or name] = float(row["value"])
        home[f"{leaf or name}_ci"] = None if np.isnan(row["ci_low"]) else [row["ci_low"], row["ci_high"]]
        home[f"{leaf or name}_largest_prompt_share"] = row["largest_prompt_share"]
    routing = None
    if len(layers):
        any_share = float((tokens["n_flipped_layers"] > 0).mean())
        flip = float(1 - layers["same_set_rate"].mean())
        routing = {"flip_rate": flip, "flip_rate_ci": [0.9 * flip, 1.1 * flip], "any_layer_share": any_share,
                   "any_layer_share_ci": [0.95 * any_share, 1.05 * any_share], "by_layer": [],
                   "n_choices": len(layers) * len(tokens), "n_tokens": len(tokens)}  # fmt: skip
    pair = {"n_sequences": 64, "n_prompts": 64, "n_tokens": len(tokens), "n_unscored": 0, "logp": logp,
            "routing": routing, "margins": None, "position": None, "corrections": None,
            **_flip_shares(frames)}  # fmt: skip
    return {
        "schema_version": 2,
        "main_pair": "infer~train",
        "observed_pair": "infer~train",
        "replay_pair": None,
        "weights": None,
        "model": {"path": path, "architecture": "Qwen3MoeForCausalLM", "model_type": "qwen3_moe",
                  "n_moe_layers": len(layers), "n_experts": 16 if len(layers) else None,
                  "top_k": 4 if len(layers) else None, **model},
        "n_prompts": 64,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 7},
        "arms": {"infer": {"engine": "vllm", "version": "0.30.0", "dtype": "bfloat16"},
                 "train": {"engine": "transformers", "version": "5.1.0", "dtype": "bfloat16"}},
        "provenance": {"digests": {"tokens": "sha256:1f2e", "weights": "sha256:77aa"}, "moediag": "0.1.0"},
        "pairs": {"infer~train": pair},
    }  # fmt: skip
