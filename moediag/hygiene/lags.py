"""D01 and D02: one side's rows or layers stand beside the wrong ones of the other side.

Evidence is a *difference* between the agreement at an offset and at 0, each row its own control, with its error over
groups of rows (:mod:`moediag.hygiene.chance`): noisy engines agree little anywhere, and then nothing is said. Layers
are compared after subtracting what their expert popularity alone gives, since a hot expert is shared by rows that
have nothing else in common.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moediag.hygiene.chance import N_GROUPS, correlation, correlation_excess, group_of, mean_is_positive
from moediag.hygiene.findings import Finding, finding
from moediag.hygiene.rows import Rows, Shape

TOKEN_LAGS = (-3, -2, -1, 1, 2, 3)
MAX_LAYER_LAG = 8
"""Largest layer offset tried: models have at most 3 leading dense layers; 8 leaves room for a stage's offset."""


class TokenLag:
    """Correlation of two logp streams by lag, within sequences."""

    def __init__(self) -> None:
        self._sums = {lag: np.zeros((N_GROUPS, 6)) for lag in (0, *TOKEN_LAGS)}
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        response_T = tokens.is_scored_T
        x_T, y_T = (np.where(response_T, rows.capture.logp_T, np.nan).astype(np.float64) for rows in (infer, train))
        group_T = group_of(tokens.prompt_id_T, tokens.position_T)
        for lag, sums in self._sums.items():
            here, there = _aligned(len(tokens), lag)
            good_T = train.follows(abs(lag)) & np.isfinite(x_T[here]) & np.isfinite(y_T[there])
            x, y, group = x_T[here][good_T], y_T[there][good_T], group_T[here][good_T]
            for i, value in enumerate((np.ones_like(x), x, y, x * x, y * y, x * y)):
                sums[:, i] += np.bincount(group, value, minlength=N_GROUPS)

    def findings(self, where: str) -> list[Finding]:
        """The lag of the largest correlation, where it is not 0 by more than chance."""
        r = {lag: float(correlation(sums.sum(axis=0))) for lag, sums in self._sums.items()}
        lags = [lag for lag in TOKEN_LAGS if np.isfinite(r[lag])]
        if not lags or not np.isfinite(r[0]):
            return []
        best = max(lags, key=lambda lag: r[lag])
        if not correlation_excess(self._sums[best], self._sums[0], self._n_copies, len(TOKEN_LAGS)):
            return []
        message = f"train's logps correlate with infer's at lag {best:+d} (r = {r[best]:.3f}), not at 0 ({r[0]:.3f})"
        n = int(self._sums[best][:, 0].sum())
        return [finding("D01-token-lag", where, f"{message}, {n:,} tokens", n_of=n)]


class RowLag:
    """Overlap of the two sides' expert sets by row offset, within sequences."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._n_G = {lag: np.zeros(N_GROUPS) for lag in TOKEN_LAGS}
        self._gain_G = {lag: np.zeros(N_GROUPS) for lag in TOKEN_LAGS}
        self._squares = dict.fromkeys(TOKEN_LAGS, 0.0)
        self._at = dict.fromkeys(TOKEN_LAGS, 0.0)
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        group_T = group_of(tokens.prompt_id_T, tokens.position_T)
        size = self._shape.n_layers * self._shape.top_k
        both_T = train.routed_throughout & infer.routed_throughout
        at0_T = _overlap(train, infer, slice(None), slice(None)) / size
        for lag in TOKEN_LAGS:
            here, there = _aligned(len(tokens), lag)
            good_T = train.follows(abs(lag)) & both_T[here] & train.routed_throughout[there]
            at_T = _overlap(train, infer, there, here)[good_T] / size
            gain_T, group = at_T - at0_T[here][good_T], group_T[here][good_T]
            self._n_G[lag] += np.bincount(group, minlength=N_GROUPS)
            self._gain_G[lag] += np.bincount(group, gain_T, minlength=N_GROUPS)
            self._squares[lag] += float((gain_T**2).sum())
            self._at[lag] += float(at_T.sum())

    def findings(self, where: str) -> list[Finding]:
        """The offset of the largest overlap, where it is not 0 by more than chance."""
        n = {lag: float(self._n_G[lag].sum()) for lag in TOKEN_LAGS}
        lags = [lag for lag in TOKEN_LAGS if n[lag]]
        if not lags or not self._shape.is_choice:
            return []
        best = max(lags, key=lambda lag: float(self._gain_G[lag].sum()) / n[lag])
        if not mean_is_positive(
            self._n_G[best], self._gain_G[best], self._squares[best], self._n_copies, len(TOKEN_LAGS)
        ):
            return []
        at = self._at[best] / n[best]
        at0 = at - float(self._gain_G[best].sum()) / n[best]
        message = f"train's experts agree with infer's at row offset {best:+d} ({at:.1%} shared), not at 0 ({at0:.1%})"
        return [finding("D01-row-lag", where, f"{message}, {int(n[best]):,} rows", n_of=int(n[best]))]


class LayerLag:
    """Overlap of infer's layer l and train's layer l + o, beyond what expert popularity gives."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        most = min(MAX_LAYER_LAG, shape.n_layers - 1)
        self._lags = [lag for lag in range(-most, most + 1) if lag]
        self._n_G = np.zeros(N_GROUPS)
        self._gain_G = {lag: np.zeros(N_GROUPS) for lag in self._lags}
        self._squares = dict.fromkeys(self._lags, 0.0)
        self._at = dict.fromkeys([0, *self._lags], 0.0)
        self._chosen_LE = np.zeros((2, shape.n_layers, shape.n_experts))
        self._n_copies = 1

    def add(self, train: Rows, infer: Rows) -> None:
        """Add a shard of both sides, same tokens."""
        if not self._lags:
            return
        tokens = train.tokens
        self._n_copies = max(self._n_copies, int(tokens.sample_index_T.max(initial=0)) + 1)
        good_T = train.routed_throughout & infer.routed_throughout
        group_T = group_of(tokens.prompt_id_T[good_T], tokens.position_T[good_T])
        sets = [rows.sets[good_T] for rows in (train, infer)]
        self._n_G += np.bincount(group_T, minlength=N_GROUPS)
        for side, rows in enumerate((train, infer)):
            self._chosen_LE[side] += popularity(rows.ids[good_T], self._shape.n_experts)
        at0_T = self._overlap(sets, 0)
        self._at[0] += float(at0_T.sum())
        for lag in self._lags:
            at_T = self._overlap(sets, lag)
            gain_T = at_T - at0_T
            self._at[lag] += float(at_T.sum())
            self._gain_G[lag] += np.bincount(group_T, gain_T, minlength=N_GROUPS)
            self._squares[lag] += float((gain_T**2).sum())

    def _overlap(self, sets: list[NDArray[np.uint64]], lag: int) -> NDArray[np.float64]:
        """(T,) mean share of experts that infer's layer l and train's layer l + lag have in common."""
        here, there = _aligned(self._shape.n_layers, lag)
        train_TLW, infer_TLW = sets
        shared_T = _n_shared(train_TLW[:, there] & infer_TLW[:, here])
        return np.asarray(shared_T / ((self._shape.n_layers - abs(lag)) * self._shape.top_k))

    def _chance(self, lag: int, n: float) -> float:
        here, there = _aligned(self._shape.n_layers, lag)
        train_LE, infer_LE = self._chosen_LE / n
        return float((train_LE[there] * infer_LE[here]).sum(axis=1).mean()) / self._shape.top_k

    def findings(self, where: str) -> list[Finding]:
        """The layer offset that wins while the diagonal is near chance."""
        n = float(self._n_G.sum())
        if not self._lags or not n or not self._shape.is_choice:
            return []
        beyond = {lag: self._at[lag] / n - self._chance(lag, n) for lag in self._at}
        best = max(self._lags, key=lambda lag: beyond[lag])
        if beyond[0] > beyond[best] / 2:  # the diagonal is not near chance
            return []
        shift = self._chance(best, n) - self._chance(0, n)  # gains are taken beyond popularity
        total = float(self._gain_G[best].sum())
        squares = self._squares[best] - 2 * shift * total + n * shift**2
        if not mean_is_positive(
            self._n_G, self._gain_G[best] - shift * self._n_G, squares, self._n_copies, len(self._lags)
        ):
            return []
        message = (
            f"train's layer l{best:+d} agrees with infer's layer l ({self._at[best] / n:.1%} shared, chance "
            f"{self._chance(best, n):.1%}); the same layer does not ({self._at[0] / n:.1%}, chance "
            f"{self._chance(0, n):.1%})"
        )
        return [finding("D02-layer-lag", where, message, n_of=int(n), base_rate=self._chance(0, n))]


def _aligned(n: int, lag: int) -> tuple[slice, slice]:
    """Slices of t and t + lag."""
    return (slice(0, n - lag), slice(lag, n)) if lag >= 0 else (slice(-lag, n), slice(0, n + lag))


def _overlap(train: Rows, infer: Rows, train_rows: slice, infer_rows: slice) -> NDArray[np.int64]:
    """(T,) experts in common, summed over layers."""
    return _n_shared(train.sets[train_rows] & infer.sets[infer_rows])


def _n_shared(shared_TLW: NDArray[np.uint64]) -> NDArray[np.int64]:
    n_rows, n_layers, n_words = shared_TLW.shape
    return np.asarray(np.bitwise_count(shared_TLW).reshape(n_rows, n_layers * n_words).sum(axis=1, dtype=np.int64))


def popularity(ids_TLK: NDArray[np.int16], n_experts: int) -> NDArray[np.int64]:
    """(L, E) how often each expert was chosen."""
    counts = [np.bincount(ids_TLK[:, layer].ravel(), minlength=n_experts) for layer in range(ids_TLK.shape[1])]
    return np.array(counts).reshape(ids_TLK.shape[1], n_experts)
