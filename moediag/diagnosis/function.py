"""Do two engines compute the same function? Both in float32 on the same tokens, sequence by sequence.

What rounding leaves of a difference in float32 is some 2**16 times smaller than in bfloat16, and so are the margins at
which an expert set can flip: engines of one function agree to a small multiple of the float32 rounding scale, engines
of two functions hardly ever do.

Invariants:
    - a sequence counts up to its first flip at a near tie, prompt included: what follows carries the other experts'
      outputs in its attention, and is not rounding any more. A flip at no near tie is a difference of functions;
    - the scale is of the same model and the same tokens: float32 against float32 moved by one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.measures import abs_diff, abs_diff_other
from moediag.analysis.tokens import Source, Tokens, beside, source_of
from moediag.notation import INFER, TRAIN
from moediag.run.capture import Capture, is_scored
from moediag.run.reader import Run, open_run
from moediag.statistics.intervals import Interval, ratio_mean_interval

FLOAT32: Final = "float32"
SAME: Final = 10.0
"""Float32 rounding scales up to which a sequence agrees. Ours, and far from both sides: healthy pairs were measured at
0.3 to 3 (reports/diagnosis.md), one part in a hundred of one router's weights at more than 1,000."""
NEAR_TIE: Final = 1e-4
"""Margin of choice scores up to which a flip in float32 is one of a near tie. Ours: float32 moves a score by about 1e-6
after some layers, one part in a hundred of the weights by about 1e-2; halfway on a logarithmic scale."""
FEW: Final = 0.05
"""Share of sequences that may differ where all the others agree, without calling it another function: then it is
something about those sequences. Ours."""


LEAST_SCALE: Final = 2.0**-22
"""Rounding of a float32 log-softmax itself [nat]: half a unit in the last place of a log-sum-exp of 4 to 8. No rounding
scale is smaller, however little a model's routers move (Llama 4 in float16, whose gates are nearly 0)."""
_LEAST: Final = 1e-7
"""Distances below this are float32's own rounding of a log-probability [nat]."""


@dataclass(frozen=True)
class FunctionTest:
    """Whether two engines compute the same function.

    Args:
        is_same: None where it cannot be told, for the reason in ``note``.
        pair: both engines in float32.
        scale_pair: float32 against float32 moved by one unit in the last place; None = not measured.
        n_sequences, n_agreeing: with a token before any near tie's flip, and those of them that agree.
        n_tokens: such tokens.
        n_near_ties: sequences cut at a flip of a near tie.
        mean: mean abs logp diff over those tokens [nat]; ``scale``: the same of the scale pair.
        differing: sequences that differ, at most five.
        first_layer: MoE layer of the first flip at no near tie, over all rows; None = no such flip.
        first_decoder_layer: its decoder layer.
        layer_share: share of rows whose set differs there.
    """

    is_same: bool | None
    pair: str
    scale_pair: str | None
    n_sequences: int
    n_agreeing: int
    n_tokens: int
    n_near_ties: int
    mean: float | None
    scale: float | None
    differing: tuple[int, ...] = ()
    first_layer: int | None = None
    first_decoder_layer: int | None = None
    layer_share: float | None = None
    note: str = ""

    @property
    def times(self) -> float | None:
        """Mean over scale."""
        return self.mean / self.scale if self.mean is not None and self.scale else None

    def content(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return {**asdict(self), "differing": list(self.differing), "times": self.times}


FIRST_LAYERS: Final = "first-layers"
"""Folder in a run of a model too large for float32: a run of its first decoder layers, on the same tokens."""


@dataclass(frozen=True)
class FirstLayers:
    """Whether both engines compute the same function in the first layers of a model too large for float32.

    Args:
        function: of the checkpoint cut to these layers, its own head behind them.
        n_layers, n_all: decoder layers kept, and of the whole model.
    """

    function: FunctionTest
    n_layers: int
    n_all: int

    @property
    def words(self) -> str:
        """A clause for the verdict; never of the whole model."""
        n = f"{self.function.n_agreeing} of {self.function.n_sequences} sequences"
        if self.function.is_same is None:
            return f"{self.part}: {self.function.note}"
        same = "compute the same function" if self.function.is_same else "do not compute the same function"
        return f"{self.part} {same} in float32 ({n} agree); the {self.n_all - self.n_layers} behind them were not run"

    @property
    def part(self) -> str:
        """Which layers."""
        return f"the first {self.n_layers} of {self.n_all} decoder layers"

    def content(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return {"n_layers": self.n_layers, "n_all": self.n_all, "words": self.words, **self.function.content()}


def first_layers(run: Run) -> FirstLayers | None:
    """What the run of the first layers shows; None where there is none, or it is not complete."""
    path = run.path / FIRST_LAYERS
    if not (path / "run.json").exists() or run.record.checkpoint is None:
        return None
    cut = open_run(path)
    function = same_function(cut, [arm for arm in cut.arms() if cut.is_complete(arm)])
    n_layers = cut.checkpoint(str(cut.record.checkpoint)).n_decoder_layers
    n_all = run.checkpoint(run.record.checkpoint).n_decoder_layers
    return None if function is None or not n_layers or not n_all else FirstLayers(function, n_layers, n_all)


def float32_arms(run: Run, arms: Sequence[str]) -> tuple[str, str] | None:
    """(train, infer) arms that ran in float32, of the reference arms' checkpoint; None where one is missing."""
    found = []
    for role in (TRAIN, INFER):
        reference = run.reference(role)
        if reference not in run.arms():
            return None
        names = [reference, *(arm for arm in arms if run.arm(arm).variant_of == reference)]
        is_own = (
            arm for arm in names
            if arm in arms and run.arm(arm).dtype == FLOAT32 and run.arm(arm).change in (None, "dtype")
        )  # fmt: skip
        found.append(next(is_own, None))
    train, infer = found
    if train is None or infer is None or run.arm(train).checkpoint != run.arm(infer).checkpoint:
        return None
    return train, infer


def perturbed_arm(run: Run, arms: Sequence[str], of: str) -> str | None:
    """The arm that repeats another with its numbers moved by one unit in the last place; None without one."""
    moved = (arm for arm in arms if run.arm(arm).variant_of == of and run.arm(arm).change == "perturbation")
    return next(moved, None)


def same_function(run: Run, arms: Sequence[str]) -> FunctionTest | None:
    """Hold both engines' float32 arms against each other; None where there are not both.

    Args:
        arms: complete arms of the run.
    """
    both = float32_arms(run, arms)
    if both is None:
        return None
    train, infer = both
    perturbed = perturbed_arm(run, arms, train)
    sequences, flips = compare_sequences(run, train, infer)
    scale, scale_pair = None, None
    if perturbed is not None:
        own, _ = compare_sequences(run, train, perturbed)
        moved_by, scale_pair = pooled_mean(own), run.pair_name(train, perturbed)
        scale = None if moved_by is None else max(moved_by, LEAST_SCALE)
    tested = tested_sequences(sequences)
    known = partial(
        FunctionTest,
        pair=run.pair_name(train, infer),
        scale_pair=scale_pair,
        n_sequences=len(tested),
        n_tokens=int(tested["n_tokens"].sum()),
        n_near_ties=int((sequences["is_flipped"] & ~sequences["is_other"]).sum()),
        mean=pooled_mean(tested),
        scale=scale,
    )
    if not len(tested):
        return known(is_same=None, n_agreeing=0, note="no token stands before a flip of a near tie")
    if not scale:
        return known(is_same=None, n_agreeing=0, note="the float32 rounding scale was not measured")
    differs = is_differing(tested, scale)
    n_differing = int(differs.sum())
    is_same = True if not n_differing else False if n_differing > FEW * len(tested) else None
    found = known(
        is_same=is_same,
        n_agreeing=len(tested) - n_differing,
        differing=tuple(int(one) for one in tested.loc[differs, "seq_id"].head(5)),
        note="" if is_same is not None else f"{n_differing} of {len(tested)} sequences differ, all the others agree",
    )
    return replace(found, **flips) if n_differing else found


def tested_sequences(sequences: pd.DataFrame) -> pd.DataFrame:
    """Those of :func:`compare_sequences` that say something: with a token before a flip, or a flip at no near tie."""
    return sequences[(sequences["n_tokens"] > 0) | sequences["is_other"]]


def is_differing(tested: pd.DataFrame, scale: float) -> pd.Series[bool]:
    """Which tested sequences differ by more than :data:`SAME` float32 rounding scales [nat]."""
    return tested["is_other"] | (tested["mean"] > SAME * scale)


def compare_sequences(
    run: Run, minuend: str, subtrahend: str, may_flip: float = 0.0
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Two arms sequence by sequence, up to the first flip of a near tie.

    Args:
        may_flip: where one arm kept no experts, margin of the other's choice scores up to which it may have flipped:
            counted as a flip of a near tie.

    Returns:
        A row per sequence: ``seq_id``, ``n_tokens`` and ``sum`` and ``mean`` of abs(logp_diff) [nat] over scored tokens
        before the first flip, ``is_flipped``, ``is_other`` (its first flip is at no near tie); and, over all rows, the
        first MoE layer with a flip at no near tie, its decoder layer and the share of its rows whose sets differ.
    """
    rows: list[dict[str, Any]] = []
    layers = run.arm(minuend).decoder_layers
    n_other_L, n_flipped_L, n_rows = (np.zeros(len(layers), np.int64) for _ in range(3))
    for shard in min(run.shards_of(minuend), run.shards_of(subtrahend), key=len):
        tokens = run.tokens(shard)
        a, b = run.readable(minuend, shard), run.readable(subtrahend, shard)
        diff_T = np.abs(a.logp_T.astype(np.float64) - b.logp_T)
        scored_T = tokens.is_scored_T & is_scored(a.logp_T, b.logp_T)
        flipped_TL, margin_TL = compared_flips(a, b, may_flip)
        other_TL = flipped_TL & (margin_TL > NEAR_TIE)
        if flipped_TL.shape[1] == len(layers):
            n_other_L += other_TL.sum(0)
            n_flipped_L += flipped_TL.sum(0)
            n_rows += len(flipped_TL)
        for start, end in tokens.sequence_bounds():
            row = np.flatnonzero(flipped_TL[start:end].any(1))
            first = int(row[0]) if len(row) else end - start
            # the row of a token routes the token behind it: token ``first`` itself is scored by the row before
            usable = slice(start, min(start + first + 1, end))
            values = diff_T[usable][scored_T[usable]]
            # in a row, layers after the first that flips carry its experts' outputs
            is_other = bool(len(row)) and bool(other_TL[start + first, np.flatnonzero(flipped_TL[start + first])[0]])
            total = float(values.sum())
            rows.append({
                "seq_id": int(tokens.seq_id_T[start]), "n_tokens": len(values), "sum": total,
                "mean": total / len(values) if len(values) else np.nan,
                "is_flipped": bool(len(row)), "is_other": is_other,
            })  # fmt: skip
    first_L = np.flatnonzero(n_other_L)
    where: dict[str, Any] = {}
    if len(first_L):
        layer = int(first_L[0])
        where = {
            "first_layer": layer,
            "first_decoder_layer": int(layers[layer]),
            "layer_share": float(n_flipped_L[layer] / n_rows[layer]),
        }
    columns = ["seq_id", "n_tokens", "sum", "mean", "is_flipped", "is_other"]
    return pd.DataFrame(rows, columns=columns), where


def compared_flips(a: Capture, b: Capture, may_flip: float = 0.0) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Rows whose expert sets differ, (T, L), and the smaller of both margins there; without margins a near tie's."""
    if a.is_routed != b.is_routed:
        known_TL = (a if a.is_routed else b).margin_TL
        if known_TL is not None:
            return np.asarray(known_TL <= may_flip), known_TL.astype(np.float64)
    if a.expert_ids_TLK is None or b.expert_ids_TLK is None or a.expert_ids_TLK.shape != b.expert_ids_TLK.shape:
        return np.zeros((len(a.logp_T), 0), bool), np.zeros((len(a.logp_T), 0))
    ids_TLK, others_TLK = np.sort(a.expert_ids_TLK, -1), np.sort(b.expert_ids_TLK, -1)
    is_routed_TL = (ids_TLK[..., 0] >= 0) & (others_TLK[..., 0] >= 0)
    flipped_TL = (ids_TLK != others_TLK).any(-1) & is_routed_TL
    margins = [one.margin_TL for one in (a, b) if one.margin_TL is not None]
    margin_TL = np.min(margins, axis=0).astype(np.float64) if margins else np.zeros(flipped_TL.shape)
    return flipped_TL, margin_TL


def pooled_mean(sequences: pd.DataFrame) -> float | None:
    """Mean abs logp diff over the sequences' tokens [nat]; None without one."""
    n = int(sequences["n_tokens"].sum())
    return float(sequences["sum"].sum() / n) if n else None


@dataclass(frozen=True)
class Distances:
    """How far each engine's low precision is from the function, on the same tokens [nat]; the lower rounds better.

    Args:
        infer, train: mean abs(logp - logp of the engine's own float32).
        ratio: infer's distance over train's of a typical token (geometric mean over tokens: flips, of which a few
            carry the means, hardly move it); 1 = neither rounds worse.
        mean_ratio: infer's mean over train's, which a few flips may carry: shown, and not judged by.
    """

    infer: Interval
    train: Interval
    ratio: Interval
    mean_ratio: Interval
    n_tokens: int

    def content(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return {
            **{name: _content(getattr(self, name)) for name in ("infer", "train", "ratio", "mean_ratio")},
            "n_tokens": self.n_tokens,
            "n_prompts": self.ratio.n_clusters,
        }


def _content(interval: Interval) -> dict[str, Any]:
    is_known = np.isfinite([interval.low, interval.high]).all()
    return {
        "value": float(interval.value) if np.isfinite(interval.value) else None,
        "ci": [float(interval.low), float(interval.high)] if is_known else None,
        "note": interval.note,
    }


def distances(infer: Source, train: Source) -> Distances | None:
    """Each engine against its own float32; None without a token that all four arms scored.

    Args:
        infer, train: tokens of each engine's pair with its float32 arm, of the same tokens.
    """
    x = beside(source_of(infer), source_of(train))

    def log_ratio(part: Tokens) -> NDArray[np.float64]:
        infer_T, train_T = (np.maximum(size, _LEAST) for size in (part.abs_diff_T, abs_diff_other(part)))
        return np.asarray(np.log(infer_T) - np.log(train_T))

    infer_C, train_C, log_C = x.sums(abs_diff, abs_diff_other, log_ratio)
    n_C = x.n_by_prompt
    if not len(n_C):
        return None
    infer_mean, train_mean, mean_ratio = (
        ratio_mean_interval(sum_C, by_C, kind="positive").one()
        for sum_C, by_C in ((infer_C, n_C), (train_C, n_C), (infer_C, train_C))
    )
    log = ratio_mean_interval(log_C, n_C).one()
    ratio = replace(log, value=math.exp(log.value), low=math.exp(log.low), high=math.exp(log.high))
    return Distances(infer_mean, train_mean, ratio, mean_ratio, len(x))
