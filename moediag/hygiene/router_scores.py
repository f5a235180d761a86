"""Gate weights, margins and router logits: finite, possible, and of the rows they belong to; exact ties (D16).

Beside each other (D14), :class:`GateFactor`: sums of gate weights where both sides chose the same experts.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.findings import Count, Finding, Tally, counted, finding
from moediag.hygiene.rows import MIN_ROWS, Rows, Shape, over_slots, same_sets

_BF16 = 2.0**-8
"""Relative rounding of one bfloat16 number: half of its ulp, 2^-7, at worst."""

_MANY_TIES = 0.02
"""Share of exact ties worth a note: bf16 storage gave 5.9 % on synthetic logits (E = 128, K = 8), a router
that computes in bf16 0.3-1.0 % per layer on the trained demo pair."""

_CHUNK = 2048

_SUM_ROUNDING = 2.0**-6
"""Weight sums of one row in bf16 agree to 2^-8 relative on each side; twice that each, both sides."""


class RouterScores(Tally):
    """Counts wrong scores of one arm's routed rows."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._gate, self._margin, self._ties = Count(), Count(), Count()
        self._logits, self._softmaxed, self._inconsistent = Count(), Count(), Count()
        self._softmaxed_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._routed_L = np.zeros(shape.n_layers, dtype=np.int64)
        self._sums: dict[int, Count] = {}  # by log of the row's sum in steps of its rounding

    @property
    def _step(self) -> float:
        return math.log1p(_BF16 * (self._shape.top_k + 1))  # K roundings of a weight each, and those of the sum

    def add(self, rows: Rows) -> None:
        """Count a shard."""
        routed_TL = rows.routed
        n = int(routed_TL.sum())
        self._routed_L += routed_TL.sum(axis=0)
        self._add_gates(rows, routed_TL, n)
        self._add_margins(rows, routed_TL, n)
        if rows.capture.router_logits_TLE is not None:
            for start in range(0, len(rows), _CHUNK):  # logits are the largest array by far: no copies of the whole
                self._add_logits(rows, slice(start, start + _CHUNK))

    def _add_gates(self, rows: Rows, routed_TL: NDArray[np.bool_], n: int) -> None:
        gates_TLK = rows.capture.gate_weights_TLK
        if gates_TLK is None:
            return
        total_TL = rows.gate_totals
        assert total_TL is not None
        good_TL = np.isfinite(total_TL)
        if not gates_TLK.min(initial=0) >= 0:  # looked at closer only where one is negative or NaN
            good_TL &= over_slots(np.minimum, gates_TLK) >= 0
        wrong_TL = routed_TL & ~good_TL
        self._gate.add(rows.tokens, wrong_TL, n)
        if self._shape.renormalize:
            self._add_sums(rows, total_TL, routed_TL & ~wrong_TL)

    def _add_sums(self, rows: Rows, total_TL: NDArray[np.float32], good_TL: NDArray[np.bool_]) -> None:
        least = np.finfo(np.float32).tiny  # all weights 0: as far from any constant as can be
        bin_TL = np.rint(np.log(np.maximum(np.where(good_TL, total_TL, 1), least)) / self._step).astype(np.int64)
        for number in np.unique(bin_TL[good_TL]).tolist():
            self._sums.setdefault(number, Count()).add(rows.tokens, good_TL & (bin_TL == number), 0)

    def _sum_finding(self, where: str) -> list[Finding]:
        """Sums beside the most common one; its neighbours belong to it, since it may be at a step's edge."""
        if not self._sums:
            return []
        usual = max(sorted(self._sums), key=lambda number: self._sums[number].n)
        off = [count for number, count in self._sums.items() if abs(number - usual) > 1]
        if not off:
            return []
        total = Count.merged(off, sum(count.n for count in self._sums.values()))
        text = f"{total.text()} (token, layer) have weights that do not sum to {math.exp(usual * self._step):.3g}"
        return [counted("gate-sum", where, text, total)]

    def _add_margins(self, rows: Rows, routed_TL: NDArray[np.bool_], n: int) -> None:
        margin_TL, logit_margin_TL = rows.capture.margin_TL, rows.capture.logit_margin_TL
        if not self._shape.is_choice:  # nothing competes: margins have no meaning
            return
        wrong_TL = np.zeros_like(routed_TL)
        if margin_TL is not None:
            wrong_TL |= ~(np.isfinite(margin_TL) & (margin_TL >= 0))
            self._ties.add(rows.tokens, routed_TL & (margin_TL == 0), n)
        if logit_margin_TL is not None:
            wrong_TL |= ~np.isfinite(logit_margin_TL)
        self._margin.add(rows.tokens, routed_TL & wrong_TL, n)

    def _add_logits(self, rows: Rows, part: slice) -> None:
        assert rows.capture.router_logits_TLE is not None
        logits_TLE, routed_TL = rows.capture.router_logits_TLE[part], rows.routed[part]
        n = int(routed_TL.sum())
        total_TL, least_TL = logits_TLE.sum(axis=2, dtype=np.float32), logits_TLE.min(axis=2)
        finite_TL = np.isfinite(total_TL)
        tokens = rows.take_tokens(part)
        self._logits.add(tokens, routed_TL & ~finite_TL, n)
        if self._shape.n_experts > 1:
            # E roundings of at most 2^-9 of a share each add up to no more than 2^-8 of the whole
            softmaxed_TL = routed_TL & (least_TL >= 0) & (np.abs(total_TL - 1) <= 2 * _BF16)
            self._softmaxed.add(tokens, softmaxed_TL, n)
            self._softmaxed_L += softmaxed_TL.sum(axis=0)
        margin_TL = rows.capture.logit_margin_TL
        if margin_TL is not None and self._shape.is_choice:
            good_TL = routed_TL & finite_TL & np.isfinite(margin_TL[part])
            found_TL = _logit_margins(logits_TLE, rows.ids[part], good_TL)
            # stored logits may be rounded to bf16 after the margin was taken: two roundings of the largest logit
            room_TL = 2 * _BF16 * np.abs(logits_TLE).max(axis=2) + 1e-6
            with np.errstate(invalid="ignore"):
                off_TL = good_TL & (np.abs(found_TL - margin_TL[part]) > room_TL)
            self._inconsistent.add(tokens, off_TL, n)

    def findings(self, where: str) -> list[Finding]:
        """One finding per kind."""
        softmaxed_L = (self._softmaxed_L == self._routed_L) & (self._routed_L > 0)
        is_softmaxed = bool(softmaxed_L.any()) and self._softmaxed.n >= MIN_ROWS
        kinds = (
            ("gate-not-finite", self._gate, "(token, layer) have gate weights that are NaN, infinite or negative"),
            ("margin-not-finite", self._margin, "(token, layer) have NaN, infinite or negative margins"),
            ("logits-not-finite", self._logits, "(token, layer) have NaN or infinite router logits"),
            ("margin-logits", self._inconsistent, "(token, layer) have a logit margin other than their logits give"),
        )
        found = [counted(rule, where, f"{count.text()} {text}", count) for rule, count, text in kinds if count.n]
        found += self._sum_finding(where)
        if is_softmaxed:
            layers = np.flatnonzero(softmaxed_L).tolist()
            message = f"layers {layers}: {self._softmaxed.text()} rows of router logits are none negative and sum to 1"
            found.append(counted("softmaxed-logits", where, message, self._softmaxed))
        if self._ties.share > _MANY_TIES and self._ties.n < self._ties.n_of:
            message = f"{self._ties.text()} (token, layer) are exact ties at the TopK border ({self._ties.share:.1%})"
            found.append(counted("D16-exact-ties", where, message, self._ties))
        return found


def _logit_margins(
    logits_TLE: NDArray[np.float32], ids_TLK: NDArray[np.int16], good_TL: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Smallest chosen minus largest other logit; rows that are not good hold nonsense."""
    ids = np.where(good_TL[:, :, None], ids_TLK, 0).astype(np.intp)
    chosen_TL = np.take_along_axis(logits_TLE, ids, axis=2).min(axis=2)
    others_TLE = logits_TLE.copy()
    np.put_along_axis(others_TLE, ids, -np.inf, axis=2)
    with np.errstate(invalid="ignore"):
        return np.asarray(chosen_TL - others_TLE.max(axis=2))


class GateFactor(Tally):
    """Sums of gate weights of the two sides, where both chose the same experts."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._n = 0
        self._ratio = np.zeros(2)  # sum and square sum of log(train / infer)
        self._sums = np.zeros((2, 2))  # per side the same of the row sum

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        train_TL, infer_TL = train.gate_totals, infer.gate_totals
        if train_TL is None or infer_TL is None:
            return
        same_TL = train.routed & infer.routed & same_sets(train.sets, infer.sets)
        train_N, infer_N = (totals_TL[same_TL].astype(np.float64) for totals_TL in (train_TL, infer_TL))
        good_N = np.isfinite(train_N) & np.isfinite(infer_N) & (train_N > 0) & (infer_N > 0)
        train_N, infer_N = train_N[good_N], infer_N[good_N]
        self._n += len(train_N)
        self._ratio += _moments(np.log(train_N / infer_N))
        self._sums += np.array([_moments(train_N), _moments(infer_N)])

    def findings(self, where: str) -> list[Finding]:
        """A constant factor, or one side normalised and the other not."""
        if self._n < MIN_ROWS:
            return []
        mean, spread = _mean_and_spread(self._ratio, self._n)
        (train, train_spread), (infer, infer_spread) = (_mean_and_spread(sums, self._n) for sums in self._sums)
        if abs(mean) > _SUM_ROUNDING and spread < abs(mean) / 4:
            message = f"train's weights sum to {math.exp(mean):.4g} times infer's (spread {spread:.1g})"
        elif abs(mean) > _SUM_ROUNDING and _one_is_normalised((train_spread / train, infer_spread / infer)):
            message = (
                f"weights sum to {train:.3g} +- {train_spread:.2g} in train, {infer:.3g} +- {infer_spread:.2g} in infer"
            )
        else:
            return []
        text = f"{message}, {self._n:,} (token, layer) with the same experts"
        return [finding("D14-gate-factor", where, text, n_of=self._n)]


def _one_is_normalised(spreads: tuple[float, float]) -> bool:
    """One side's sums are constant to bf16 rounding (2^-8), the other's are far from it."""
    return min(spreads) < _SUM_ROUNDING / 4 and max(spreads) > 2 * _SUM_ROUNDING


def _moments(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([values_N.sum(), (values_N**2).sum()])


def _mean_and_spread(moments: NDArray[np.float64], n: int) -> tuple[float, float]:
    mean = float(moments[0]) / n
    return mean, math.sqrt(max(float(moments[1]) / n - mean**2, 0.0))
