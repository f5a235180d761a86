"""Since which layer, and in which rows, two engines compute different things: router logits in float32, layer by layer.

The margin of a router's logits moves with everything that lies before it, flip or no flip. In float32 engines of one
function differ there by a few times what one unit in the last place does; another function moves it by thousands of
times that. So the first router that differs bounds the place from both sides: what lies before the router above it
agrees, bit for bit or nearly. *Which rows* differ says more: attention alone cannot move the first row of a sequence,
and one expert's weights move no row before that expert is first chosen.

Invariants:
    - a row of layer l depends on layers below l of rows up to its own: it counts as long as none of these flipped.
      Flips at near ties therefore never pose as a difference;
    - the scale is of the same layer, model and tokens: float32 against float32 moved by one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.diagnosis.function import SAME, compared_flips, float32_arms, perturbed_arm
from moediag.diagnosis.gate_formula import bases_of, formula_words, formulas_of, weights_of
from moediag.frames import Column, declare, measured, with_ci
from moediag.notation import INFER, TRAIN
from moediag.run.capture import Capture, TokenRows, is_scored
from moediag.run.reader import Run
from moediag.statistics.intervals import cluster_sums, ratio_mean_interval

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

FAR_ROW: Final = 100.0
"""Float32 rounding scales beyond which a row differs. Ours: over the healthy families no row was beyond 30
(reports/diagnosis.md), and 5 % of one norm, of one softmax scale or of rope theta moves half of the rows by 10,000."""
_CERTAIN: Final = 0.99
"""Share of rows that may be asked of a pattern: single rows of a pattern differ by too little to be seen."""
_MOSTLY: Final = 0.9
"""Share of the rows that chose an expert that must differ: in some its output hardly reaches the number compared."""
_FEW: Final = 5
"""Rows on each side of a pattern below which it may be chance."""
GROWS: Final = 0.3
"""Slope of log(difference) on log(position) from which on it grows with position; constant = 0, proportional = 1.
Ours, between rope theta 5 % off (0.67 to 0.82; 0.36 with sliding windows) and attention scale 5 % off (-0.18 to 0.22)
on the four models of the tuning half of reports/diagnosis.md."""

LAYERS_APART = declare(
    "layers_apart",
    "MoE layer, then the log-probability",
    Column("layer", "int64", "layer", "MoE layer; the number of MoE layers for the log-probability"),
    Column("decoder_layer", "int64", "layer", "its decoder layer; -1 for the log-probability"),
    Column("what", "str", "1", "what is compared: margin of router logits, or of choice scores, or log-probability"),
    Column("n_rows", "int64", "row", "rows that no flip before could have moved"),
    measured("scale", "1", "root mean square that one float32 unit in the last place makes there"),
    measured("times_p50", "1", "median difference of both engines in float32, in such scales", label="median"),
    measured("times_p99", "1", "99th percentile", label="p99"),
    measured("times_max", "1", "largest", label="largest"),
    Column("beyond_share", "float64", "1", f"rows that differ by more than {FAR_ROW:g} scales", kind="share",
           nullable=True, label=f"beyond {FAR_ROW:g}"),
    measured("gates_p50", "1", "median relative difference of gate weights of the same experts, in scales of theirs",
             label="gates, median"),
    Column("gates_beyond_share", "float64", "1", f"rows whose gate weights differ by more than {FAR_ROW:g} scales",
           kind="share", nullable=True, label=f"gates beyond {FAR_ROW:g}"),
    *with_ci(measured("infer_over_train", "1", "infer's distance from its own float32 over train's, of a typical row; "
                      "above 1: infer rounds worse before here")),
    section="ladder",
    caption="Since which layer: both engines in float32, by layer, in units of float32's own rounding",
)  # fmt: skip


@dataclass(frozen=True)
class LayersApart:
    """What router logits say of the place.

    Args:
        frame: frame ``layers_apart``.
        first: row of the frame that differs first; None = none does.
        pattern: what differs there: :data:`ALL_ROWS`, :data:`NOT_THE_FIRST`, :data:`FROM_A_POSITION`,
            :data:`SOME_EXPERTS`, :data:`SOME_SEQUENCES` or :data:`GATES`; empty where nothing differs.
        n_differing, n_rows: rows that differ there, of those compared.
        slope: of log(difference) on log(position), where the first rows agree.
        position: first position that differs, where those before it agree.
        experts: chosen in the MoE layer before exactly by the rows that differ.
        sequences: the few in which rows differ, where all others agree.
        formula: of the gate weights that differ, in words (:mod:`moediag.diagnosis.gate_formula`).
    """

    frame: pd.DataFrame
    first: int | None = None
    pattern: str = ""
    n_differing: int = 0
    n_rows: int = 0
    slope: float | None = None
    position: int | None = None
    experts: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()
    formula: str = ""

    def content(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return {
            **{name: value for name, value in vars(self).items() if name != "frame"},
            "experts": [*self.experts],
            "sequences": [*self.sequences],
        }

    @property
    def is_behind_routers(self) -> bool:
        """Nothing but the log-probability differs."""
        return self.first == len(self.frame) - 1

    def place_of(self, column: int) -> str:
        """A row of the frame in words."""
        is_logp = self.frame["what"][column] == LOGP
        return "the log-probabilities" if is_logp else f"the router of decoder layer {self._decoder_layer(column)}"

    @property
    def place(self) -> str:
        """What differs first, in words."""
        return "nowhere" if self.first is None else self.place_of(self.first)

    @property
    def words(self) -> str:
        """How far both engines are apart where they first differ."""
        what = "the engines' gate weights" if self.pattern == GATES else "the engines"
        return (
            f"in float32 {what} differ at {self.place}: "
            f"{self.n_differing:,} of {self.n_rows:,} rows by more than {FAR_ROW:g} times rounding"
        )

    @property
    def below(self) -> str:
        """The MoE layer before it, in words."""
        return f"decoder layer {self._decoder_layer(self.first - 1)}" if self.first else "no layer"

    @property
    def before(self) -> str:
        """What agrees before it, in words; empty where nothing was compared there."""
        if not self.first or self.frame["what"][0] == LOGP:
            return ""
        routers = f"the router of decoder layer {self._decoder_layer(0)} agrees"
        if self.first > 1:
            routers = (
                f"the routers of decoder layers {self._decoder_layer(0)} to {self._decoder_layer(self.first - 1)} agree"
            )
        return f"{routers}, and with {'it' if self.first == 1 else 'them'} all that lies before"

    def first_worse(self, role: str, worse: float) -> int | None:
        """First row at which the engine of a role is farther from its own float32 by that many times, surely."""
        low, high = self.frame["infer_over_train_ci_low"], self.frame["infer_over_train_ci_high"]
        is_worse = low > worse if role == INFER else high < 1 / worse
        return int(np.flatnonzero(is_worse)[0]) if is_worse.any() else None

    def _decoder_layer(self, column: int) -> int:
        return int(self.frame["decoder_layer"][column])


ALL_ROWS, NOT_THE_FIRST = "all rows", "all rows but the first of a sequence"
FROM_A_POSITION, SOME_EXPERTS = "rows from a position on", "rows since certain experts were chosen"
GATES, SOME_SEQUENCES = "gate weights, of the same experts", "some sequences"
LOGP: Final = "log-probability"


@dataclass
class _Rows:
    """Rows of the float32 shards, L margins and the log-probability as columns; what is not comparable is NaN."""

    apart_TQ: Float64
    scale_TQ: Float64
    gates_TL: Float64
    gates_scale_TL: Float64
    ids_TLK: NDArray[np.int16] | None
    seq_T: NDArray[np.int64]
    position_T: NDArray[np.int32]
    what: str

    @staticmethod
    def joined(parts: Sequence[_Rows]) -> _Rows:
        """All shards' rows."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()
            if isinstance(value, np.ndarray)
        }
        return replace(parts[0], **arrays)


def layers_apart(run: Run, arms: Sequence[str]) -> LayersApart | None:
    """Hold both engines' float32 arms against each other layer by layer; None without them or their rounding scale.

    Args:
        arms: complete arms of the run.
    """
    both = float32_arms(run, arms)
    if both is None:
        return None
    train, infer = both
    if (perturbed := perturbed_arm(run, arms, train)) is None:
        return None
    parts = [_rows(run, shard, train, infer, perturbed) for shard in run.shards_of(train)]
    rows = _Rows.joined(parts)
    times_TQ, scale_Q = _in_scales(rows.apart_TQ, rows.scale_TQ)
    gates_TL, gates_scale_L = _in_scales(rows.gates_TL, rows.gates_scale_TL)
    n_layers = gates_TL.shape[1]
    decoder_layers = [*run.arm(train).decoder_layers[:n_layers], -1]
    own = _own_rounding(run, train, infer, scale_Q)
    frame = pd.DataFrame([
        {
            "layer": q, "decoder_layer": decoder_layers[q], "what": rows.what if q < n_layers else LOGP,
            "n_rows": int(np.isfinite(times_TQ[:, q]).sum()), "scale": scale_Q[q], **_quantiles(times_TQ[:, q]),
            **({"gates_p50": (of := _quantiles(gates_TL[:, q]))["times_p50"], "gates_beyond_share": of["beyond_share"]}
               if q < n_layers else {}),
            **own.get(q, {}),
        }
        for q in range(n_layers + 1)
    ], columns=LAYERS_APART.names)  # fmt: skip
    found = LayersApart(LAYERS_APART.validate(frame))
    for q in range(n_layers + 1):
        if _differs(times_TQ[:, q], rows.seq_T):
            return _pattern(found, q, times_TQ[:, q], rows, n_layers)
        if q < n_layers and _differs(gates_TL[:, q], rows.seq_T):
            is_known_T = np.isfinite(gates_TL[:, q])
            return replace(found, first=q, pattern=GATES, n_rows=int(is_known_T.sum()),
                           n_differing=int((gates_TL[is_known_T, q] > FAR_ROW).sum()),
                           formula=_formula(run, train, infer, q, is_known_T, FAR_ROW * gates_scale_L[q]))  # fmt: skip
    return found


def _formula(run: Run, train: str, infer: str, layer: int, is_used_T: Bool, rounding: float) -> str:
    """Which formulas the two sides' gate weights of a layer follow, over the rows that were compared."""
    parts: dict[str, list[dict[str, Any]]] = {INFER: [], TRAIN: []}
    biases = {arm: run.correction_bias(arm) for arm in (train, infer)}
    for shard in run.shards_of(train):
        captures = {TRAIN: (train, run.readable(train, shard)), INFER: (infer, run.readable(infer, shard))}
        for side, other in ((INFER, TRAIN), (TRAIN, INFER)):
            arm, own = captures[side]
            router = run.arm(arm).routers[layer]
            bases = bases_of(own, captures[other][1], router.spec, biases[arm], layer, other)
            parts[side].append({"": weights_of(own, layer), **bases})
    sides = {}
    for side, of_shards in parts.items():
        names = [name for name in of_shards[0] if all(name in one for one in of_shards)]
        arrays = {name: np.concatenate([one[name] for one in of_shards])[is_used_T] for name in names}
        weights_NK = arrays.pop("")
        is_positive_N = weights_NK.sum(axis=1) > 0
        bases = {name: base_NK[is_positive_N] for name, base_NK in arrays.items()}
        if is_positive_N.any():  # weights of nothing but 0 follow no formula
            sides[side] = formulas_of(weights_NK[is_positive_N], bases, rounding)
    return formula_words(sides, rounding)


def _in_scales(apart_TQ: Float64, scaled_TQ: Float64) -> tuple[Float64, Float64]:
    """Differences in units of the root mean square of what rounding makes, and that scale, by column."""
    n_Q = np.isfinite(scaled_TQ).sum(0)
    scale_Q = np.sqrt(np.nansum(np.square(scaled_TQ), 0) / np.maximum(n_Q, 1))
    return apart_TQ / np.where(scale_Q > 0, scale_Q, np.nan), scale_Q


def _differs(times_T: Float64, seq_T: NDArray[Any]) -> bool:
    """Rows of two sequences are far, or a typical row is beyond what engines of one function differ by."""
    known_T = times_T[np.isfinite(times_T)]
    n_far = len(np.unique(seq_T[times_T > FAR_ROW]))
    return n_far >= min(2, len(np.unique(seq_T))) or bool(len(known_T) and np.median(known_T) > SAME)


def _rows(run: Run, shard: Any, train: str, infer: str, perturbed: str) -> _Rows:
    tokens = run.tokens(shard)
    a, b, c = (run.readable(arm, shard) for arm in (train, infer, perturbed))
    name = next((name for name in ("logit_margin_TL", "margin_TL")
                 if all(getattr(one, name) is not None for one in (a, b, c))), "")  # fmt: skip
    n_layers = getattr(a, name).shape[1] if name else 0
    if n_layers != (getattr(b, name).shape[1] if name else 0):
        name, n_layers = "", 0
    what = {"logit_margin_TL": "margin of router logits", "margin_TL": "margin of choice scores", "": ""}[name]

    def columns(one: Capture) -> Float64:
        margins_TL = getattr(one, name).astype(np.float64) if name else np.zeros((len(tokens), 0))
        logp_T = np.where(tokens.is_scored_T, one.logp_T.astype(np.float64), np.nan)
        return np.column_stack([margins_TL, logp_T])

    def apart(one: Capture, other: Capture) -> Float64:
        diff_TQ = np.abs(columns(one) - columns(other))
        diff_TQ[~is_scored(one.logp_T, other.logp_T), -1] = np.nan
        flipped_TL, _ = compared_flips(one, other)
        if flipped_TL.shape[1] == n_layers:  # what separated the sets on one side separates them the other way round
            sum_TL = np.abs(columns(one)[:, :-1]) + np.abs(columns(other)[:, :-1])
            diff_TQ[:, :-1][flipped_TL] = sum_TL[flipped_TL]
        diff_TQ[_moved_by_flips(tokens, one, other, n_layers)] = np.nan
        return diff_TQ

    def gates(one: Capture, other: Capture) -> Float64:
        diff_TL = _gate_difference(one, other, n_layers)
        diff_TL[_moved_by_flips(tokens, one, other, n_layers)[:, :-1]] = np.nan
        return diff_TL

    ids_TLK = a.expert_ids_TLK if n_layers else None
    return _Rows(apart(a, b), apart(a, c), gates(a, b), gates(a, c), ids_TLK, tokens.seq_id_T, tokens.position_T, what)


def _gate_difference(one: Capture, other: Capture, n_layers: int) -> Float64:
    """(T, L) largest difference of the gate weights of one expert over the row's largest; NaN where sets differ."""
    sides = [(side.expert_ids_TLK, side.gate_weights_TLK) for side in (one, other)]
    known = [(ids_TLK, gates_TLK) for ids_TLK, gates_TLK in sides if ids_TLK is not None and gates_TLK is not None]
    if len(known) < 2 or known[0][0].shape != known[1][0].shape or known[0][0].shape[1] != n_layers:
        return np.full((len(one.logp_T), n_layers), np.nan)
    order = [np.argsort(ids_TLK, -1, kind="stable") for ids_TLK, _ in known]
    ids, gates = (
        [np.take_along_axis(pair[which], by_TLK, -1) for pair, by_TLK in zip(known, order, strict=True)]
        for which in (0, 1)
    )
    one_TLK, other_TLK = (np.asarray(values_TLK, np.float64) for values_TLK in gates)
    largest_TL = np.abs(one_TLK).max(-1)
    is_same_TL = (ids[0] == ids[1]).all(-1) & (np.asarray(ids[0])[..., 0] >= 0) & (largest_TL > 0)
    apart_TL: Float64 = np.abs(one_TLK - other_TLK).max(-1) / np.where(largest_TL > 0, largest_TL, 1)
    return np.where(is_same_TL, apart_TL, np.nan)


def _moved_by_flips(tokens: TokenRows, one: Capture, other: Capture, n_layers: int) -> Bool:
    """(T, L + 1) values that a flip in a layer below, in a row up to their own, may have moved."""
    moved_TQ = np.zeros((len(tokens), n_layers + 1), np.bool_)
    flipped_TL, _ = compared_flips(one, other)
    if not n_layers or flipped_TL.shape[1] != n_layers:
        return moved_TQ
    for start, end in tokens.sequence_bounds():
        so_far_TL = np.logical_or.accumulate(flipped_TL[start:end], axis=0)
        below_TL = np.logical_or.accumulate(so_far_TL, axis=1)
        moved_TQ[start:end, 1:-1] = below_TL[:, :-1]
        moved_TQ[start + 1 : end, -1] = below_TL[:-1, -1]  # a token is scored by the row before it
    return moved_TQ


def _quantiles(times_T: Float64) -> dict[str, float]:
    known = times_T[np.isfinite(times_T)]
    if not len(known):
        return dict.fromkeys(("times_p50", "times_p99", "times_max", "beyond_share"), np.nan)
    p50, p99 = np.quantile(known, [0.5, 0.99])
    return {"times_p50": p50, "times_p99": p99, "times_max": known.max(), "beyond_share": (known > FAR_ROW).mean()}


def _own_rounding(run: Run, train: str, infer: str, scale_Q: Float64) -> dict[int, dict[str, float]]:
    """By column: infer's distance from its own float32 over train's, of a typical row, with its interval by prompt."""
    references = run.reference(TRAIN), run.reference(INFER)
    if {train, infer} & set(references) or not all(map(run.is_complete, references)):
        return {}
    parts: list[tuple[Float64, NDArray[Any]]] = []
    for shard in run.shards_of(train):
        tokens, apart = run.tokens(shard), []
        for low, high in ((references[1], infer), (references[0], train)):
            a, b = run.readable(low, shard), run.readable(high, shard)
            name = "logit_margin_TL" if a.logit_margin_TL is not None and b.logit_margin_TL is not None else "margin_TL"
            ours, theirs = getattr(a, name), getattr(b, name)
            is_known = ours is not None and theirs is not None and ours.shape == theirs.shape
            diff_TQ = np.column_stack([
                np.abs(ours.astype(np.float64) - theirs) if is_known else np.zeros((len(tokens), 0)),
                np.where(tokens.is_scored_T, np.abs(a.logp_T.astype(np.float64) - b.logp_T), np.nan),
            ])  # fmt: skip
            apart.append(diff_TQ)
        if apart[0].shape != apart[1].shape or apart[0].shape[1] != len(scale_Q) or not scale_Q.all():
            return {}
        # below float32's own rounding nothing is a distance of the low precision
        log_TQ = np.log(np.maximum(apart[0], scale_Q)) - np.log(np.maximum(apart[1], scale_Q))
        parts.append((log_TQ, tokens.prompt_id_T))
    log_TQ, prompt_T = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    found = {}
    for q in range(log_TQ.shape[1]):
        is_known_T = np.isfinite(log_TQ[:, q])
        if not is_known_T.any():
            continue
        sum_C = cluster_sums(log_TQ[is_known_T, q], prompt_T[is_known_T])
        one = ratio_mean_interval(sum_C, cluster_sums(np.ones(is_known_T.sum()), prompt_T[is_known_T])).one()
        values = {"": one.value, "_ci_low": one.low, "_ci_high": one.high}
        found[q] = {f"infer_over_train{end}": float(np.exp(value)) for end, value in values.items()}
    return found


def _pattern(found: LayersApart, column: int, times_T: Float64, rows: _Rows, n_layers: int) -> LayersApart:
    """Which rows of the first column that differs do so."""
    position_T, is_logp = rows.position_T, column == n_layers
    is_known_T = np.isfinite(times_T)
    differs_T = is_known_T & (times_T > FAR_ROW)
    agrees_T = is_known_T & ~differs_T
    found = replace(found, first=column, n_differing=int(differs_T.sum()), n_rows=int(is_known_T.sum()))
    experts: tuple[int, ...] = ()
    if column and rows.ids_TLK is not None:
        # a token is scored by the row before it; first rows are not scored
        ids_TK = np.roll(rows.ids_TLK[:, -1], 1, axis=0) if is_logp else rows.ids_TLK[:, column - 1]
        experts = _experts(ids_TK, None if is_logp else rows.seq_T, differs_T, agrees_T)
    differing_S = np.unique(rows.seq_T[differs_T])
    if 0 < len(differing_S) < 0.5 * len(np.unique(rows.seq_T)):
        if experts:
            return replace(found, pattern=SOME_EXPERTS, experts=experts)
        reached_T = is_known_T & _since(differs_T, rows.seq_T)
        if differs_T[reached_T].mean() > 0.5:
            return replace(found, pattern=SOME_SEQUENCES, sequences=tuple(differing_S.tolist()))
    first_T, later_T = is_known_T & (position_T == 0), is_known_T & (position_T > 0)
    is_of_attention = first_T.any() and agrees_T[first_T].all() and differs_T.any()
    if not is_logp and is_of_attention:
        start = int(position_T[differs_T].min())
        before_T = is_known_T & (position_T < start)
        if start > 2 and before_T.sum() >= _FEW and differs_T[is_known_T & (position_T >= start)].mean() > 0.5:
            return replace(found, pattern=FROM_A_POSITION, position=start)
        if np.median(times_T[later_T]) > SAME:  # attention leaves hardly a row alone
            x_N, y_N = np.log(position_T[differs_T]), np.log(times_T[differs_T])
            slope = float(np.polyfit(x_N, y_N, 1)[0]) if np.ptp(x_N) > 0 else None
            return replace(found, pattern=NOT_THE_FIRST, slope=slope)
    return replace(found, pattern=SOME_EXPERTS if experts else ALL_ROWS, experts=experts)


def _experts(ids_TK: NDArray[np.int16], seq_T: NDArray[Any] | None, differs_T: Bool, agrees_T: Bool) -> tuple[int, ...]:
    """Experts such that rows differ where one is chosen, and agree until one first is in the sequence; () = none.

    Args:
        seq_T: sequences, along which attention carries the difference on; None = nothing lies between but the head.
    """
    chosen_ET = {int(expert): (ids_TK == expert).any(1) for expert in np.unique(ids_TK[ids_TK >= 0])}
    suspects = {
        expert: chosen_T for expert, chosen_T in chosen_ET.items()
        if (chosen_T & differs_T).sum() >= _FEW
        and (chosen_T & differs_T).sum() > _MOSTLY * (chosen_T & (differs_T | agrees_T)).sum()
    }  # fmt: skip

    def n_clean(chosen_T: Bool) -> int:
        """Rows that the experts leave alone, where these agree; else 0."""
        reached_T = chosen_T if seq_T is None else _since(chosen_T, seq_T)
        clean_T = ~reached_T & (differs_T | agrees_T)
        return int(clean_T.sum()) if (clean_T & differs_T).sum() <= (1 - _CERTAIN) * clean_T.sum() else 0

    alone = {expert: n_clean(chosen_T) for expert, chosen_T in suspects.items()}
    best = max(alone, key=lambda expert: alone[expert], default=None)
    if best is not None and alone[best] >= _FEW:
        return (best,)
    together_T = np.logical_or.reduce([*suspects.values()]) if suspects else np.zeros(len(ids_TK), np.bool_)
    return tuple(suspects) if len(suspects) < len(chosen_ET) and n_clean(together_T) >= _FEW else ()


def _since(chosen_T: Bool, seq_T: NDArray[Any]) -> Bool:
    """Rows from the first chosen one of their sequence on; rows of a sequence stand together, in order."""
    start_T = np.r_[True, seq_T[1:] != seq_T[:-1]]
    n_T = np.cumsum(chosen_T.astype(np.int64))
    return np.asarray(n_T > np.maximum.accumulate(np.where(start_T, n_T - chosen_T, 0)))
