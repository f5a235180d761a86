"""Speed and memory of the simulated corrections: all methods side by side on ten million tokens, statistics included.

Compared in the same run, on the same arrays, with a plain pandas version (columns, ``groupby``) and a plain vectorised
numpy version of the same arithmetic (whole arrays, one method after the other, nothing shared): weights, masked tokens
and sequences, mean and variance of weights, remaining k3, entropies, precision and recall, all as sums by prompt. Both
plain versions stop there, without intervals, strata and overlap; the fast one is timed with them and without. Plain
versions run on a part of the tokens (``--plain-tokens``) and are scaled by tokens. The sweep of 400 bands is compared
with one ``np.sort`` of the same log-ratios. CPU time, because others may share the machine.

Usage: python benchmarks/corrections.py [--tokens N] [--plain-tokens N] [--length N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moediag.corrections import METHODS, Terms, compare_corrections, parse_correction, sweep_by_band
from moediag.corrections.sums import CorrectionPass

SAMPLES = 8


def make_tokens(n_tokens: int, length: int, seed: int = 0) -> Terms:
    """Sequences of about ``length`` tokens, eight per prompt; log-ratios like those of a bfloat16 pair."""
    rng = np.random.default_rng(seed)
    length_S = rng.integers(length // 2, length * 3 // 2, -(-n_tokens // length))
    row_T = np.repeat(np.arange(len(length_S)), length_S)
    infer_T = -rng.exponential(0.5, len(row_T)).astype(np.float32)
    diff_T = 0.02 * rng.standard_t(3, len(row_T)).astype(np.float32)
    columns = {
        "logp_train": np.minimum(infer_T + diff_T, 0).astype(np.float64),
        "logp_infer": infer_T.astype(np.float64),
        "seq_id": row_T,
        "prompt_id": row_T // SAMPLES,
        "position": np.arange(len(row_T)) - np.repeat(np.cumsum(length_S) - length_S, length_S),
        "advantage": rng.normal(size=len(length_S))[row_T],
        "entropy_infer": rng.exponential(0.5, len(row_T)),
        "n_flipped_layers": rng.integers(0, 3, len(row_T)),
    }
    return Terms(pd.DataFrame(columns, copy=False))


def first(tokens: Terms, n_tokens: int) -> Terms:
    """The first sequences."""
    return next(tokens.chunks(n_tokens))


def plain_numpy(tokens: Terms) -> dict[str, float]:
    """Whole arrays, method by method."""
    train, infer, row, prompt = tokens.logp_train_T, tokens.logp_infer_T, tokens.row_T, tokens.prompt_row_T
    n_by_row, n_prompts = np.bincount(row), tokens.n_prompts
    found = {}
    for name in METHODS:
        diff = train - infer
        ratio, k3 = np.exp(np.clip(diff, -20, 20)), np.expm1(np.clip(diff, -20, 20)) - np.clip(diff, -20, 20)
        weight = _plain_weight(
            name, tokens, diff, ratio, k3, lambda values: np.bincount(row, weights=values), np.exp, row
        )
        masked = weight == 0
        columns = (
            masked, weight, weight**2, np.where(masked, 0, k3), np.where(masked, 0, np.exp(infer)),
            np.where(masked, tokens.column("entropy_infer"), 0), np.where(masked, 0, tokens.column("entropy_infer")),
            masked & (tokens.column("n_flipped_layers") > 0), weight * tokens.advantage_T / n_by_row[row],
        )  # fmt: skip
        sums = [np.bincount(prompt, weights=column, minlength=n_prompts) for column in columns]
        gone = np.bincount(row, weights=masked) == n_by_row
        found[name] = float(sums[0].sum() + gone.sum())
    return found


def plain_pandas(tokens: Terms) -> dict[str, float]:
    """A table, a groupby for every sum."""
    found = {}
    for name in METHODS:
        table = tokens.rows.rename(
            columns={
                "seq_id": "seq",
                "prompt_id": "prompt",
                "logp_train": "train",
                "logp_infer": "infer",
                "entropy_infer": "entropy",
                "n_flipped_layers": "flips",
            }
        ).copy()
        diff = table["train"] - table["infer"]
        clipped = diff.clip(-20, 20)
        table["diff"], table["ratio"], table["k3"] = diff, np.exp(clipped), np.expm1(clipped) - clipped
        by = table.groupby("seq")
        total = lambda values, by=by, table=table: values.groupby(table["seq"]).sum().to_numpy()  # noqa: E731
        weight = _plain_weight(name, tokens, table["diff"], table["ratio"], table["k3"], total, np.exp, tokens.row_T)
        table["weight"] = np.asarray(weight)
        table["masked"] = table["weight"] == 0
        table["square"] = table["weight"] ** 2
        table["kept_k3"] = table["k3"].where(~table["masked"], 0)
        table["kept_p"] = np.exp(table["infer"]).where(~table["masked"], 0)
        table["entropy_masked"] = table["entropy"].where(table["masked"], 0)
        table["entropy_kept"] = table["entropy"].where(~table["masked"], 0)
        table["hit"] = table["masked"] & (table["flips"] > 0)
        table["objective"] = table["weight"] * table["advantage"] / by["seq"].transform("size")
        columns = [
            "masked",
            "weight",
            "square",
            "kept_k3",
            "kept_p",
            "entropy_masked",
            "entropy_kept",
            "hit",
            "objective",
        ]
        sums = table.groupby("prompt")[columns].sum()
        gone = table.groupby("seq")["masked"].all()
        found[name] = float(sums["masked"].sum() + gone.sum())
    return found


def _plain_weight(
    name: str,
    tokens: Terms,
    diff: Any,
    ratio: Any,
    k3: Any,
    total: Callable[[Any], Any],
    exp: Callable[[Any], Any],
    row: Any,
) -> Any:
    p = METHODS[name].parameters
    gap = exp(tokens.logp_train_T) - exp(tokens.logp_infer_T)
    n = np.bincount(row)
    if name in ("kpop", "dppo_kl"):
        forward, back = (_plain_binary_kl(a, b) for a, b in (
            (tokens.logp_infer_T, tokens.logp_train_T), (tokens.logp_train_T, tokens.logp_infer_T)))  # fmt: skip
    rules: dict[str, Callable[[], Any]] = {
        "none": lambda: np.ones(len(row)),
        "icepop": lambda: np.where((ratio >= p["alpha"]) & (ratio <= p["beta"]), ratio, 0),
        "icepop_hard": lambda: np.where((ratio >= p["alpha"]) & (ratio <= p["beta"]), 1, 0),
        "tis_token": lambda: np.minimum(ratio, p["cap"]),
        "tis_sequence": lambda: np.minimum(np.exp(np.clip(total(diff), -20, 20)), p["cap"])[row],
        "tis_geometric": lambda: np.minimum(np.exp(np.clip(total(diff) / n, -20, 20)), p["cap"])[row],
        "clamp_token": lambda: np.clip(ratio, p["low"], p["high"]),
        "mis_token": lambda: np.where(ratio <= p["cap"], ratio, 0),
        "mis_sequence": lambda: _plain_mis(np.exp(np.clip(total(diff), -20, 20)), p["cap"])[row],
        "sequence_band": lambda: _plain_band(total(diff), p)[row],
        "geometric_band": lambda: _plain_band(total(diff) / n, p)[row],
        "veto": lambda: 1.0 - (total(1.0 * (diff < np.log(p["floor"]))) > 0)[row],
        "kpop": lambda: np.where((forward <= p["phi"]) & (back <= p["phi"]), ratio, 0),
        "ipo": lambda: np.where(np.abs(gap) <= p["eps"], ratio, 0),
        "dppo_tv": lambda: np.where(
            ((tokens.advantage_T > 0) & (gap > p["eps_high"])) | ((tokens.advantage_T < 0) & (gap < -p["eps_low"])),
            0, ratio),
        "dppo_kl": lambda: np.where((tokens.advantage_T * gap > 0) & (forward > p["eps"]), 0, ratio),
        "trm_max": lambda: 1.0 - (total(1.0 * (diff**2 / 2 > p["delta"])) > 0)[row],
        "trm_mean": lambda: 1.0 * (total(k3) / n <= p["delta"])[row],
        "prob_mult_error": lambda: 1.0 * (total(exp(np.minimum(np.abs(diff), 20))) / n <= p["limit"])[row],
        "k3_mean": lambda: 1.0 * (total(k3) / n <= p["limit"])[row],
    }  # fmt: skip
    return rules[name]()


def _plain_mis(product: Any, cap: float) -> Any:
    return np.where(product <= cap, product, 0)


def _plain_band(log_ratio: Any, p: dict[str, float]) -> Any:
    return 1.0 * ((log_ratio >= np.log(p["low"])) & (log_ratio <= np.log(p["high"])))


def _plain_binary_kl(log_p: Any, log_q: Any) -> Any:
    p, q = np.clip(np.exp(log_p), 0, 1 - 2**-25), np.clip(np.exp(log_q), 0, 1 - 2**-25)
    return p * (np.log(p) - np.log(q)) + (1 - p) * (np.log1p(-p) - np.log1p(-q))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what it gave."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def memory_gib(name: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def forget_peak() -> None:
    """Let the peak start anew: making the tokens takes more than holding them."""
    Path("/proc/self/clear_refs").write_text("5")


def weights_only(tokens: Terms) -> None:
    """All weights, chunk by chunk, terms shared."""
    for part in tokens.chunks():
        for name in METHODS:
            parse_correction(name).of_terms(part)


def sums_only(tokens: Terms) -> dict[str, float]:
    """What the plain versions compute: sums by cluster, without strata, and without intervals."""
    corrections = {name: parse_correction(name) for name in METHODS}
    totals = CorrectionPass(corrections, [], 512, 0.2)
    for part in tokens.chunks():
        totals.add(part)
    pairs = zip(METHODS, totals.by_correction, strict=True)
    return {name: float(one["n_masked"].sum() + one["n_masked_sequences"].sum()) for name, one in pairs}


def main() -> int:
    """Print times per token, ratios and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--plain-tokens", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    tokens = make_tokens(args.tokens, args.length)
    forget_peak()
    n, held = len(tokens), memory_gib("VmRSS")
    print(
        f"{n} tokens, {tokens.n_sequences} sequences, {tokens.n_prompts} prompts, {len(METHODS)} methods; "
        f"holds {held:.2f} GiB"
    )
    corrections = {name: parse_correction(name) for name in METHODS}
    each: dict[str, float] = {}
    each["weights of all methods"] = timed(lambda: weights_only(tokens))[0] / n
    seconds, _ = timed(lambda: sums_only(tokens))
    each["weights and sums by prompt"] = seconds / n
    each["compare_corrections, everything"] = timed(lambda: compare_corrections(tokens, corrections))[0] / n
    peak = memory_gib("VmHWM")
    sweep, sort = (
        timed(lambda: sweep_by_band(tokens))[0],
        timed(lambda: np.sort(tokens.logp_train_T - tokens.logp_infer_T))[0],
    )
    part = first(tokens, args.plain_tokens)
    for name, plain in (("plain numpy", plain_numpy), ("plain pandas", plain_pandas)):
        seconds, found = timed(lambda plain=plain: plain(part))
        each[name] = seconds / len(part)
        same = sums_only(part)
        assert all(abs(found[k] - same[k]) <= 2 for k in found), (name, found, same)
    for name, seconds in each.items():
        print(f"{name:<34}{1e9 * seconds:10.0f} ns per token{seconds * n:10.1f} s for all")
    for name in ("plain numpy", "plain pandas"):
        same_work, everything = (
            each[name] / each[key] for key in ("weights and sums by prompt", "compare_corrections, everything")
        )
        print(
            f"{name} / fast: {same_work:.1f} for the same sums (aim 3 for pandas), {everything:.1f} with all statistics"
        )
    print(f"sweep of 400 bands {sweep:.2f} s, one np.sort {sort:.2f} s: {sweep / sort:.1f}")
    print(f"peak memory {peak:.2f} GiB, {1024 * (peak - held):.0f} MiB above what was held before")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
