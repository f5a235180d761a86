"""Exact divergences between two arms' next-token distributions, where a run keeps them whole; no estimate.

Invariants:
    - shards are read one at a time and their distributions dropped: what stays is a handful of numbers per token;
    - a divergence is a sum over the whole vocabulary in float64, of rows normalised again in float64: float32
      log-softmax rows sum to 1 within 1e-6 or so, which two engines in float32 would not rise above;
    - k1 and k3 stand beside the exact values *of the same tokens*; on text not sampled from infer at temperature 1 they
      estimate no KL, the exact values remain what they are: means over these prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.metrics import LOWER, ZERO, Metric, declare_metrics
from moediag.errors import AlignmentError
from moediag.frames import Column, declare
from moediag.notation import INFER, TRAIN
from moediag.run.capture import TokenRows
from moediag.run.reader import Run
from moediag.run.records import MANIFEST
from moediag.run.vocabulary import VocabLogps, response_rows
from moediag.statistics.intervals import Kind, mean_interval

Float64 = NDArray[np.float64]

_CELLS: Final = 4_000_000
"""Numbers of a distribution block held in float64 at a time: 32 MB per temporary."""

VOCAB_DIVERGENCES = declare(
    "vocab_divergences",
    "response token whose whole next-token distributions both arms keep",
    Column("seq_id", "int64", "1", "sequence the token belongs to"),
    Column("prompt_id", "int64", "1", "prompt of the sequence; the unit of resampling"),
    Column("position", "int32", "token", "position in the response, 0 = first response token"),
    Column("kl_infer_train_exact", "float64", "nat", "KL(infer || train) of the distributions given the prefix"),
    Column("kl_train_infer_exact", "float64", "nat", "KL(train || infer) of the same"),
    Column("total_variation_exact", "float64", "1", "half the sum of abs(p_train - p_infer), in [0, 1]"),
    Column("logp_train", "float32", "nat", "log-probability of the token itself, train arm"),
    Column("logp_infer", "float32", "nat", "log-probability of the token itself, infer arm"),
)

EXACT_DIVERGENCES = declare(
    "exact_divergences",
    "divergence, exact or estimated, over the tokens whose whole distributions are kept",
    Column("measure", "str", "1", "name; *_exact over the vocabulary, k1 and k3 from the sampled tokens alone"),
    Column("value", "float64", "see unit", "mean over the tokens", nullable=True),
    Column("ci_low", "float64", "see unit", "lower bound of the 95 % interval", nullable=True),
    Column("ci_high", "float64", "see unit", "upper bound of the 95 % interval", nullable=True),
    Column("n_tokens", "int64", "token", "tokens, hence prefixes, behind the value"),
    Column("n_prompts", "int64", "prompt", "clusters behind the interval"),
    Column("n_vocabulary", "int64", "token", "V, tokens that every distribution is over"),
    Column("unit", "str", "1", "unit of value"),
    Column("direction", "str", "1", "which end is good"),
    Column("note", "str", "1", "why there is no interval; empty otherwise"),
    section="numbers",
    caption="Over the whole vocabulary, where both arms kept it",
)

EXACT_METRICS: Final = declare_metrics(
    Metric("kl_infer_train_exact", "nat", LOWER, "KL(infer‖train), exact", on_terminal=True),
    Metric("kl_train_infer_exact", "nat", LOWER, "KL(train‖infer), exact"),
    Metric("total_variation_exact", "1", LOWER, "total variation, exact"),
)  # fmt: skip
EXACT: Final = tuple(metric.name for metric in EXACT_METRICS)
"""What summary.json says of the pair infer~train."""

_MEASURES: Final[tuple[tuple[str, str, str, Kind], ...]] = (
    ("kl_infer_train_exact", "nat", LOWER, "positive"),
    ("kl_train_infer_exact", "nat", LOWER, "positive"),
    ("total_variation_exact", "1", LOWER, "positive"),
    ("kl_infer_train_k1", "nat", ZERO, "signed"),
    ("kl_infer_train_k3", "nat", LOWER, "positive"),
)


@dataclass(frozen=True)
class ExactDivergences:
    """What whole distributions say of the pair infer~train.

    Args:
        prefixes: frame ``vocab_divergences``; measures: frame ``exact_divergences``.
    """

    prefixes: pd.DataFrame
    measures: pd.DataFrame

    def frames(self) -> dict[str, pd.DataFrame]:
        """Both frames by name."""
        return {"vocab_divergences": self.prefixes, "exact_divergences": self.measures}

    def summary(self) -> dict[str, Any]:
        """For summary.json, under the pair's ``logp``: each value, its interval, and how much lies behind them."""
        summary: dict[str, Any] = {}
        for row in self.measures.to_dict("records"):
            if row["measure"] in EXACT:
                bounds = [row["ci_low"], row["ci_high"]]
                summary[row["measure"]] = row["value"] if math.isfinite(row["value"]) else None
                summary[f"{row['measure']}_ci"] = bounds if all(map(math.isfinite, bounds)) else None
        first = self.measures.iloc[0]
        return {**summary, "exact": {name: int(first[name]) for name in ("n_tokens", "n_prompts", "n_vocabulary")}}


def exact_divergences(run: Run) -> ExactDivergences | None:
    """Exact KL in both directions and total variation of infer~train, with prompt-clustered intervals.

    The KL is the number that k1 and k3 estimate from one token per prefix: it has no sampling noise of the token, and
    what is left in its interval is which prefixes were drawn.

    Args:
        run: a run with complete arms infer and train.

    Returns:
        None where the run keeps no whole distributions (``--full-vocab``).

    Raises:
        AlignmentError: the two arms' distributions are not over the same tokens.
        CorruptRunError: damaged.

    Source: the definitions of Kullback-Leibler divergence and total variation; k1 and k3 are Schulman's estimators.
    """
    parts = list(_shard_divergences(run))
    if not parts:
        return None
    prefixes = VOCAB_DIVERGENCES.validate(pd.concat([frame for frame, _ in parts], ignore_index=True))
    return ExactDivergences(prefixes, _measure(prefixes, parts[0][1]))


def divergences(logps_infer_NV: NDArray[Any], logps_train_NV: NDArray[Any]) -> tuple[Float64, Float64, Float64]:
    """KL(infer || train) [nat], KL(train || infer) [nat] and total variation [1] of every row, in float64.

    Summed as p (ratio - 1 - log ratio), the k3 form: over a whole vocabulary it is the KL itself, and no term is below
    0, so that a KL of 1e-9 is not lost among terms of 1e-2 that cancel.

    Args:
        logps_infer_NV, logps_train_NV: log-probabilities of the same N prefixes; -inf = ruled out. Infinite KL where
            one side rules out what the other does not.

    Example:
        >>> [part.round(4).tolist() for part in divergences(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]))]
        [[0.1438], [0.1308], [0.25]]
    """
    step = max(1, _CELLS // max(1, logps_infer_NV.shape[1]))
    parts = [
        _divergences(logps_infer_NV[first : first + step], logps_train_NV[first : first + step])
        for first in range(0, len(logps_infer_NV), step)
    ]
    none = np.zeros(0)
    return tuple(np.concatenate([none, *(part[i] for part in parts)]) for i in range(3))


def _divergences(infer_NV: NDArray[Any], train_NV: NDArray[Any]) -> tuple[Float64, Float64, Float64]:
    infer, train = _normalised(infer_NV), _normalised(train_NV)
    with np.errstate(invalid="ignore", over="ignore"):
        diff = train - infer
        p_infer, p_train = np.exp(infer), np.exp(train)
        forward = _terms(p_infer, p_train, diff)
        backward = _terms(p_train, p_infer, -diff)
    return forward, backward, np.abs(p_train - p_infer).sum(axis=1) / 2


def _terms(p: Float64, q: Float64, log_ratio: Float64) -> Float64:
    """Sum of p (q/p - 1 - log q/p) over each row; q where p is 0, infinite where q is 0 and p is not."""
    terms = np.where(log_ratio < 1, p * (np.expm1(log_ratio) - log_ratio), q - p - p * log_ratio)
    terms = np.where(p > 0, terms, q)
    return np.asarray(terms.sum(axis=1), dtype=np.float64)


def _normalised(logps_NV: NDArray[Any]) -> Float64:
    wide = np.asarray(logps_NV, dtype=np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def _shard_divergences(run: Run) -> Iterator[tuple[pd.DataFrame, int]]:
    """Rows of frame ``vocab_divergences`` of one shard, and V."""
    arms = run.reference(INFER), run.reference(TRAIN)
    for shard in run.shards:
        infer, train = (run.load_vocab(arm, shard) for arm in arms)
        if infer is None or train is None:
            continue
        tokens = run.tokens(shard)
        expected_N = response_rows(tokens, run.vocab_sequences(arms[0], shard))
        is_same = infer.logps_NV.shape == train.logps_NV.shape
        n_vocabulary = infer.logps_NV.shape[1]
        is_of_these = all(np.array_equal(vocab.row_N, expected_N) for vocab in (infer, train))
        if not (is_same and is_of_these) or tokens.token_id_T[expected_N].max(initial=0) >= n_vocabulary:
            raise AlignmentError(
                f"{run.path} {shard.stem}: infer's distributions are {infer.logps_NV.shape}, train's "
                f"{train.logps_NV.shape}, or of other tokens than {MANIFEST} says; capture that shard again"
            )
        yield _frame(tokens, infer, train), n_vocabulary


def _frame(tokens: TokenRows, infer: VocabLogps, train: VocabLogps) -> pd.DataFrame:
    row_N = infer.row_N
    start_T = np.maximum.accumulate(np.where(tokens.is_response_T, 0, np.arange(1, len(tokens) + 1)))
    forward_N, backward_N, variation_N = divergences(infer.logps_NV, train.logps_NV)
    own_N = np.arange(len(row_N)), tokens.token_id_T[row_N]
    return pd.DataFrame(
        {
            "seq_id": tokens.seq_id_T[row_N],
            "prompt_id": tokens.prompt_id_T[row_N],
            "position": (row_N - start_T[row_N]).astype(np.int32),
            "kl_infer_train_exact": forward_N,
            "kl_train_infer_exact": backward_N,
            "total_variation_exact": variation_N,
            "logp_train": train.logps_NV[own_N],
            "logp_infer": infer.logps_NV[own_N],
        }
    )


def _measure(prefixes: pd.DataFrame, n_vocabulary: int) -> pd.DataFrame:
    diff_N = prefixes["logp_train"].to_numpy(np.float64) - prefixes["logp_infer"].to_numpy(np.float64)
    values = {name: prefixes[name].to_numpy() for name in EXACT}
    values |= {"kl_infer_train_k1": -diff_N, "kl_infer_train_k3": np.expm1(diff_N) - diff_N}
    prompt_N = prefixes["prompt_id"].to_numpy()
    records = []
    for name, unit, direction, kind in _MEASURES:
        found = mean_interval(values[name], prompt_N, kind)
        records.append(
            {
                "measure": name, "value": found.value, "ci_low": found.low, "ci_high": found.high,
                "n_tokens": len(prefixes), "n_prompts": found.n_clusters, "n_vocabulary": n_vocabulary,
                "unit": unit, "direction": direction, "note": found.note,
            }
        )  # fmt: skip
    return EXACT_DIVERGENCES.validate(pd.DataFrame.from_records(records))
