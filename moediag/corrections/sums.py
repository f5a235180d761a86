"""Sums by prompt of everything that statistics of corrections need, in one pass over the tokens, chunk by chunk.

Invariants:
    - every correction of a chunk shares the chunk's terms; what stays of a chunk is sums by cluster of prompts, so
      memory depends on clusters, strata and corrections and not on tokens;
    - kept = all - masked for counts and for bounded values (probabilities, entropies); k3 is summed over the kept
      tokens themselves, because one masked token can outweigh all others by nine orders of magnitude;
    - means of weights are kept as sums of w - 1 by cluster (weights are near 1), their spread as :class:`Moments` about
      the mean (weights may be near anything);
    - edges of strata depend on all tokens' largest position, length and number of flipped layers only, so the chunks
      share them; a token whose stratifier is not known is in no stratum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.strata import (
    CONFIDENCE_EDGES,
    ENTROPY_EDGES,
    Strata,
    doubling_strata,
    edge_strata,
    position_strata,
)
from moediag.corrections.correction import Correction
from moediag.corrections.terms import LOG_RATIO_CLAMP, Float64, Terms
from moediag.errors import MoediagError

Bool = NDArray[np.bool_]
Indices = NDArray[np.intp]

EPS_CLIP: Final = 0.2
"""PPO's and GRPO's usual clip."""
MAX_CLUSTERS: Final = 512
"""More prompts than this are pooled, prompt by prompt in turn: intervals cover from 64 clusters on, and a bootstrap
over ten thousand would cost more than everything else."""


def n_clusters_of(tokens: Terms) -> int:
    """Clusters of the tokens' prompts, which are counted from 0."""
    return min(int(tokens.frame["prompt_id"].max()) + 1 if len(tokens.frame) else 1, MAX_CLUSTERS)


@dataclass(frozen=True)
class Moments:
    """Count, mean and spread of N values in G groups, grown part by part without cancellation.

    Deviations are taken from the part's own mean and parts are merged by the difference of their means, so no two
    large numbers are subtracted: weights of 1e-8 and weights of 1 +- 1e-8 keep their digits alike. Scaling every value
    scales mean and spread and leaves the effective share as it is.

    Args:
        n_G: values of every group.
        mean_G: their mean; 0 for an empty group.
        square_G: sum of squared deviations from that mean.
    """

    n_G: Float64
    mean_G: Float64
    square_G: Float64

    @classmethod
    def none(cls, n_groups: int = 1) -> Moments:
        """Moments of no value."""
        return cls(*np.zeros((3, n_groups)))

    @classmethod
    def of(cls, values_N: Float64, group_N: Indices | None = None, n_groups: int = 1) -> Moments:
        """Moments of values by group; all of one group where none is given."""
        if group_N is None:
            mean = values_N.mean() if len(values_N) else 0.0
            return cls(*np.array([[len(values_N)], [mean], [np.square(values_N - mean).sum()]], dtype=np.float64))
        n_G = np.bincount(group_N, minlength=n_groups).astype(np.float64)
        mean_G = np.bincount(group_N, weights=values_N, minlength=n_groups) / np.maximum(n_G, 1)
        away_N = values_N - mean_G[group_N]
        square_G = np.bincount(group_N, weights=np.square(away_N), minlength=n_groups).astype(np.float64)
        return cls(n_G, mean_G, square_G)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both parts together, group by group.

        Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", Am. Stat. 37 (1983), eq. 2.1.
        """
        n_G = self.n_G + other.n_G
        share_G = other.n_G / np.maximum(n_G, 1)
        apart_G = other.mean_G - self.mean_G
        square_G = self.square_G + other.square_G + np.square(apart_G) * self.n_G * share_G
        return Moments(n_G, self.mean_G + apart_G * share_G, square_G)

    def joined(self, is_in_MG: Bool) -> Moments:
        """Moments of the groups named in each of M rows, as one group each."""
        n_MG = np.where(is_in_MG, self.n_G, 0.0)
        n_M = n_MG.sum(axis=1)
        mean_M = (n_MG * self.mean_G).sum(axis=1) / np.maximum(n_M, 1)
        between_MG = n_MG * np.square(self.mean_G - mean_M[:, None])
        return Moments(n_M, mean_M, (np.where(is_in_MG, self.square_G, 0.0) + between_MG).sum(axis=1))

    @property
    def variance_G(self) -> Float64:  # noqa: N802 - the legend suffix
        """Mean squared deviation; NaN of nothing."""
        return np.asarray(self.square_G / np.where(self.n_G > 0, self.n_G, np.nan))

    @property
    def effective_share_G(self) -> Float64:  # noqa: N802
        """ESS / n = (sum w)^2 / (n sum w^2) = 1 / (1 + variance / mean^2), in (0, 1]; NaN where every weight is 0.

        Source: Kish (1965); verl.

        Example:
            >>> Moments.of(np.array([1e-8, 2e-8, 3e-8])).effective_share_G.round(3).tolist()
            [0.857]
        """
        mean_G: Any = np.where(self.mean_G > 0, self.mean_G, np.nan)
        return np.asarray(1 / (1 + self.variance_G / np.square(mean_G)))


@dataclass(frozen=True)
class Chunk(Terms):
    """Scored tokens of whole sequences in their order, with what several corrections' sums need computed once."""

    n_clusters: int = 1
    eps_clip: float = EPS_CLIP

    @cached_property
    def cluster_T(self) -> Indices:  # noqa: N802 - the legend suffix
        """Cluster of every token's prompt."""
        return self.column("prompt_id") % self.n_clusters

    def cell_T(self, strata: Strata) -> Indices:  # noqa: N802
        """Cell of every token: its cluster and stratum; one stratum more for tokens in none."""
        index_T = strata.index_T(self)
        return np.asarray(self.cluster_T * (len(strata) + 1) + np.where(index_T < 0, len(strata), index_T))

    @cached_property
    def cluster_S(self) -> Indices:  # noqa: N802
        """Cluster of every sequence."""
        return self.cluster_T[self.first_S]

    def by_sequence(self, values_T: ArrayLike) -> Float64:
        """(S,) sums over the tokens of each sequence, which stand together; half the time of sums by index."""
        values_T = np.asarray(values_T, np.float64)
        return np.add.reduceat(values_T, self.first_S) if len(self.first_S) else np.zeros(0)

    @cached_property
    def length_T(self) -> NDArray[np.int64]:  # noqa: N802
        """Length of every token's response, not scored tokens included [token]."""
        return self.frame.groupby("seq_id")["seq_id"].transform("size").to_numpy(np.int64)[self.is_scored_N]

    @cached_property
    def p_infer_T(self) -> Float64:  # noqa: N802
        """Probability that infer gave."""
        return np.asarray(np.exp(self.logp_infer_T))

    @cached_property
    def entropy_T(self) -> tuple[Float64, Bool] | None:  # noqa: N802
        """Entropies with 0 where unknown, and where they are known."""
        entropy_T = self.get("entropy_infer")
        if entropy_T is None:
            return None
        is_known_T = np.isfinite(entropy_T)
        return np.where(is_known_T, entropy_T, 0.0), is_known_T

    @cached_property
    def flips_T(self) -> NDArray[Any] | None:  # noqa: N802
        """Flipped layers; -1 = not known."""
        return self.get("n_flipped_layers")

    @cached_property
    def new_ratio_T(self) -> Float64 | None:  # noqa: N802
        """pi_train(theta) / pi_train(theta_old), clamped; None = the trained policy is not known."""
        new_T = self.get("logp_train_new")
        if new_T is None:
            return None
        with np.errstate(invalid="ignore"):
            diff_T = new_T - self.logp_train_T
        if n_missing := int(np.isnan(diff_T).sum()):
            raise MoediagError(f"logp_train_new needs a number for every scored token; {n_missing} of a part have none")
        return np.asarray(np.exp(np.clip(diff_T, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)))

    @cached_property
    def surrogate_T(self) -> Float64 | None:  # noqa: N802
        """PPO's term without the correction, min(r A, clip(r) A); None = no advantages."""
        advantage_T, ratio_T = self.advantage_T, self.new_ratio_T
        if advantage_T is None or ratio_T is None:
            return advantage_T
        clipped_T = np.clip(ratio_T, 1 - self.eps_clip, 1 + self.eps_clip)
        return np.minimum(ratio_T * advantage_T, clipped_T * advantage_T)

    @cached_property
    def is_clipped_T(self) -> Bool | None:  # noqa: N802
        """PPO's term is a constant there: no gradient, whatever the weight."""
        advantage_T, ratio_T = self.advantage_T, self.new_ratio_T
        if advantage_T is None or ratio_T is None:
            return None
        above_T, below_T = ratio_T > 1 + self.eps_clip, ratio_T < 1 - self.eps_clip
        return ((advantage_T > 0) & above_T) | ((advantage_T < 0) & below_T)


def stratifiers(tokens: Terms) -> list[Strata]:
    """The stratifiers that tokens have values for."""
    frame = tokens.frame
    kinds: list[Strata] = []
    if "entropy_infer" in frame:
        kinds.append(edge_strata("entropy", ENTROPY_EDGES, lambda x: x.column("entropy_infer")))
    longest = int(frame.groupby("seq_id").size().max()) if len(frame) else 0
    kinds += [
        edge_strata("p_infer", CONFIDENCE_EDGES, lambda x: x.p_infer_T),
        position_strata(int(frame["position"].max()) + 1 if len(frame) else 0),
        doubling_strata("response_length", longest, lambda x: x.length_T),
    ]
    if "advantage" in frame:
        signs = np.array([-1.0, 0.0, 1.0])
        kinds.append(Strata("advantage_sign", signs, signs, lambda x: np.sign(x.column("advantage"))))
    if knows_routing(tokens):
        kinds.append(doubling_strata("n_flipped_layers", int(frame["n_flipped_layers"].max()), lambda x: x.flips_T))
    return kinds


def knows_routing(tokens: Terms) -> bool:
    """Whether flipped layers are known of a token."""
    return "n_flipped_layers" in tokens.frame and bool((tokens.frame["n_flipped_layers"] >= 0).any())


@dataclass
class Sums:
    """Sums by cluster of one correction, or of all tokens.

    Args:
        n_clusters: C.
        by_name: name -> (C,) sums.
        n_CB: tokens by cluster and stratum.
        token_weights, sequence_weights: moments of the weights of tokens, and of the mean weights of sequences.
    """

    n_clusters: int
    n_CB: Float64
    by_name: dict[str, Float64] = field(default_factory=dict)
    token_weights: Moments = field(default_factory=Moments.none)
    sequence_weights: Moments = field(default_factory=Moments.none)

    def add(self, name: str, cluster_N: Indices, values_N: NDArray[Any] | None = None) -> None:
        """Add values (or counts) to the sums of their clusters."""
        part_C = np.bincount(cluster_N, weights=values_N, minlength=self.n_clusters).astype(np.float64)
        self.by_name[name] = self.by_name[name] + part_C if name in self.by_name else part_C

    def __getitem__(self, name: str) -> Float64:
        return self.by_name.get(name, np.zeros(self.n_clusters))


@dataclass
class CorrectionPass:
    """Sums of several corrections, grown chunk by chunk.

    Args:
        corrections: name -> correction.
        kinds: stratifiers of all tokens.
        n_clusters: clusters of prompts.
        eps_clip: PPO's clip.
    """

    corrections: Mapping[str, Correction]
    kinds: list[Strata]
    n_clusters: int
    eps_clip: float
    all: Sums = field(init=False)
    by_correction: list[Sums] = field(init=False)
    n_both: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.n_clusters, sum(map(len, self.kinds))
        self.all, *self.by_correction = (Sums(self.n_clusters, np.zeros(shape)) for _ in (None, *self.corrections))
        self.n_both = np.zeros((len(self.corrections),) * 2, np.int64)

    def add(self, part: Terms) -> None:
        """Collect one part of whole sequences."""
        chunk = Chunk(part.frame, self.n_clusters, self.eps_clip)
        cells_T = [chunk.cell_T(kind) for kind in self.kinds]
        _add_all(self.all, chunk)
        self._add_strata(self.all, cells_T, slice(None))
        is_masked_MT = np.zeros((len(self.corrections), len(chunk)), np.bool_)
        for m, (correction, sums) in enumerate(zip(self.corrections.values(), self.by_correction, strict=True)):
            weight_T = correction.of_terms(chunk)
            np.equal(weight_T, 0, out=is_masked_MT[m])
            masked = np.flatnonzero(is_masked_MT[m])
            _add_kept(sums, chunk, weight_T, masked)
            if len(masked):
                _add_masked(sums, chunk, correction, masked)
                self._add_strata(sums, cells_T, masked)
            if (step := correction.truncation) is not None:
                is_truncated_T = step.declared.is_truncated_T(chunk, *step.bounds) & (weight_T > 0)
                sums.add("n_truncated", chunk.cluster_T[np.flatnonzero(is_truncated_T)])
        # float32 counts exactly up to 2^24, and a chunk holds fewer tokens unless one sequence is longer
        dtype = np.float32 if len(chunk) < 1 << 24 else np.float64
        some: NDArray[Any] = is_masked_MT[:, is_masked_MT.any(axis=0)].astype(dtype)
        self.n_both += np.rint(some @ some.T).astype(np.int64)

    def _add_strata(self, sums: Sums, cells_T: list[Indices], some: Any) -> None:
        """Count tokens (``some`` of the scored ones) by cluster and stratum; strata of all kinds side by side."""
        offset = 0
        for kind, cell_T in zip(self.kinds, cells_T, strict=True):
            shape = sums.n_clusters, len(kind) + 1
            counts = np.bincount(cell_T[some], minlength=shape[0] * shape[1]).reshape(shape)
            sums.n_CB[:, offset : offset + len(kind)] += counts[:, :-1]
            offset += len(kind)


def _add_all(sums: Sums, chunk: Chunk) -> None:
    """Sums over all scored tokens of the chunk."""
    sums.add("n_sequences", chunk.cluster_S)
    values: dict[str, NDArray[Any]] = {"p_infer": chunk.p_infer_T}
    if chunk.entropy_T is not None:
        values |= dict(zip(("entropy", "n_entropy"), chunk.entropy_T, strict=True))
    if chunk.flips_T is not None:
        values |= {"n_routed": chunk.flips_T >= 0, "n_flipped": chunk.flips_T > 0}
    if chunk.is_clipped_T is not None:
        values["n_clipped"] = chunk.is_clipped_T
    sums.add("n_tokens", chunk.cluster_S, chunk.n_S)
    for name, values_T in values.items():
        sums.add(name, chunk.cluster_S, chunk.by_sequence(values_T))


def _add_kept(sums: Sums, chunk: Chunk, weight_T: Float64, masked: Indices) -> None:
    """Weights of one correction, and the k3 that its mask leaves."""
    sums.add("excess", chunk.cluster_S, chunk.by_sequence(weight_T - 1.0))
    sums.token_weights += Moments.of(weight_T)
    sums.sequence_weights += Moments.of(chunk.by_sequence(weight_T) / chunk.n_S)
    if chunk.surrogate_T is not None:
        sums.add("objective", chunk.cluster_S, chunk.by_sequence(weight_T * chunk.surrogate_T) / chunk.n_S)
    k3_T = chunk.k3_T
    if len(masked):
        k3_T = k3_T.copy()
        k3_T[masked] = 0.0
    sums.add("kept_k3", chunk.cluster_S, chunk.by_sequence(k3_T))


def _add_masked(sums: Sums, chunk: Chunk, correction: Correction, masked: Indices) -> None:
    """Sums over the tokens that one correction masks."""
    cluster = chunk.cluster_T[masked]
    n_masked_S = np.bincount(chunk.row_T[masked], minlength=chunk.n_sequences)
    sums.add("n_masked_sequences", chunk.cluster_S[n_masked_S == chunk.n_S])
    sums.add("n_masked", cluster)
    sums.add("p_infer_masked", cluster, chunk.p_infer_T[masked])
    if chunk.entropy_T is not None:
        sums.add("entropy_masked", cluster, chunk.entropy_T[0][masked])
        sums.add("n_entropy_masked", cluster[chunk.entropy_T[1][masked]])
    if chunk.flips_T is not None:
        flips = chunk.flips_T[masked]
        sums.add("n_routed_masked", cluster[flips >= 0])
        sums.add("n_flipped_masked", cluster[flips > 0])
    if chunk.is_clipped_T is not None:
        sums.add("n_clipped_masked", cluster[chunk.is_clipped_T[masked]])
    if correction.side != "none":
        log_ratio = chunk.diff_T[masked]
        if correction.side == "sequence":
            log_ratio = chunk.log_product_S[chunk.row_T[masked]]
        sums.add("n_below", cluster[log_ratio < 0])
        sums.add("n_above", cluster[log_ratio > 0])
