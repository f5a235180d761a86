"""Calibration of explained and forecast flips: on synthetic engines whose noise is known, and on captured runs.

Synthetic (see tests/synthetic_flips.py): the noise of a token is a log-normal mixture with a loud tenth, grows with
depth and with flips above; experts are popular by Zipf's law. *Explained* is cross-fit on one pair; *forecast* takes
the noise of one pair to the scores of another with other tokens and other popular experts, then counts its flips.

On a run with router logits on both sides, simpler variants beside them: one Gaussian sigma, a robust sigma,
each token's own sigma (which has seen the token's flip), border noise shuffled between tokens.

Usage: python benchmarks/flip_calibration.py [--prompts 64] [--tokens 300] [--run RUN ...] [--runs-only]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from synthetic_flips import RULES, Truth, make_flips, pair_of

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.flips.explained import explain_flips, forecast_flips, predict_flips
from moediag.analysis.flips.noise import measure_noise, noise_of_logits, view_block
from moediag.analysis.flips.predictor import border_flip_probability, set_flip_probability
from moediag.run.reader import Run, open_run

Array = NDArray[np.float64]

CASES = {
    **{f"{name}": Truth(rule=rule) for name, rule in RULES.items()},
    "one sigma": Truth(spread=0.0, loud_share=0.0, after_flip=1.0),
    "coarse logits (ties)": Truth(step=2.0**-5),
    "E 4, K 1": Truth(rule=RoutingRule(4, 1, "softmax")),
    "E 64, K 8": Truth(rule=RoutingRule(64, 8, "softmax"), n_layers=2),
}


def synthetic_rows(name: str, truth: Truth) -> list[dict[str, object]]:
    """Explained by every method, then forecast by the best one, pooled over layers."""
    pair = make_flips(truth, seed=1)
    measured = measure_noise(pair, truth.rule)
    frame = explain_flips(measured, truth.bias_LE)["explained_flips"]
    rows = [_row(name, record) for record in frame[frame["layer"] == -1].to_dict("records")]
    other = make_flips(truth, seed=2, first_prompt=1)
    noise = pair_of(*other.blocks(), rule=truth.rule, name="train~train-perturbed")
    forecast = forecast_flips(measured, [measure_noise(noise, truth.rule)], truth.bias_LE)
    record = forecast[forecast["layer"] == -1].iloc[0]
    rows.append(
        {
            "engines": name,
            "method": f"forecast by {record['method']}",
            "observed": rows[0]["observed"],
            "predicted": record["forecast"],
        }
    )
    return rows


def _row(name: str, record: dict[str, object]) -> dict[str, object]:
    kept = ("method", "observed", "calibration_error", "calibration_error_expected", "calibration_slope")
    return {"engines": name, **{key: record[key] for key in kept}, "predicted": record["explained"]}


def variant_rates(run: Run) -> pd.DataFrame:
    """Flip rates by layer as simpler descriptions of the same noise give them; in sample, all of one pair."""
    routers = run.arm("infer").routers
    rule = RoutingRule.of_routers(routers)
    assert rule is not None
    views = [view_block(block, rule) for block in run.pair("train", "infer", with_logits=True).blocks()]
    rows = []
    for layer in range(len(routers)):
        columns = [
            (view.logits_TLE[used, layer], view.other_TLE[used, layer], view.is_flip_TL[used, layer])
            for view in views
            if view is not None and len(used := np.flatnonzero(view.usable_rows(layer)))
        ]
        ours, theirs, flips = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        rows.append({"layer": layer, "observed": flips.mean(), **_variants(ours, theirs, rule)})
    return pd.DataFrame(rows)


def _variants(ours: Array, theirs: Array, rule: RoutingRule) -> dict[str, float]:
    noise, scale = noise_of_logits(ours, theirs, rule)
    order = np.argsort(-ours, axis=1, kind="stable")
    score, noise = (np.take_along_axis(array.astype(float), order, axis=1) for array in (ours, noise))
    k = rule.top_k
    gap, border = score[:, k - 1] - score[:, k], noise[:, k - 1] - noise[:, k]
    draws = (np.random.default_rng(seed).permutation(border) for seed in range(8))
    own_sigma = np.repeat(np.maximum(scale, 1e-300)[:, None], rule.n_experts, axis=1)
    return {
        "gaussian border": border_flip_probability(gap, np.sqrt(2 * np.square(scale).mean())).mean(),
        "MAD border": border_flip_probability(gap, 1.4826 * np.median(np.abs(border))).mean(),
        "own sigma border": border_flip_probability(gap, np.sqrt(2) * scale).mean(),
        "own sigma pairs": set_flip_probability(score, own_sigma, k).mean(),
        "shuffled border": float(np.mean([(d < -gap).mean() + (d == -gap).mean() / 2 for d in draws])),
    }


def print_run(path: Path) -> None:
    """Variants, then explained and forecast flips by layer."""
    run = open_run(path)
    print(f"\n{path}")
    start = time.perf_counter()
    frames = predict_flips(run)
    explained = frames["explained_flips"]
    if "all_pairs" in set(explained["method"]):
        print(variant_rates(run).round(4).to_string(index=False))
    columns = ["method", "layer", "observed", "explained", "gap_ci_low", "gap_ci_high", "calibration_error"]
    columns += ["calibration_error_expected", "calibration_slope"]
    print(explained[columns].round(4).to_string(index=False))
    forecast = frames["forecast_flips"]
    columns = ["pair", "noise_from", "method", "layer", "forecast", "observed", "noise_observed"]
    print(forecast[columns].round(4).to_string(index=False))
    print(f"{time.perf_counter() - start:.0f} s")


def main() -> int:
    """Print one row per synthetic pair and method, then the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300, help="per prompt")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a captured run; may be repeated")
    parser.add_argument("--runs-only", action="store_true", help="leave the synthetic engines out")
    args = parser.parse_args()
    rows = []
    for name, truth in () if args.runs_only else CASES.items():
        rows += synthetic_rows(name, replace(truth, n_prompts=args.prompts, tokens=args.tokens))
    columns = ["engines", "method", "observed", "predicted", "calibration_error", "calibration_error_expected"]
    if rows:
        print(pd.DataFrame(rows)[[*columns, "calibration_slope"]].round(4).to_string(index=False))
    for path in args.run:
        print_run(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
