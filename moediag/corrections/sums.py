"""Sums by prompt of everything that statistics of corrections need, in one pass over a batch, chunk by chunk.

Invariants:
    - every correction of a chunk shares the chunk's terms; what stays of a chunk is sums by cluster of prompts, so
      memory depends on clusters, strata and corrections and not on tokens;
    - kept = all - masked for counts and for bounded values (probabilities, entropies); k3 is summed over the kept
      tokens themselves, because one masked token can outweigh all others by nine orders of magnitude;
    - means of weights are kept as sums of w - 1 by cluster (weights are near 1), their spread as moments about the mean
      (weights may be near anything, see :mod:`moediag.corrections.moments`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag.corrections.batch import Batch
from moediag.corrections.correction import Correction
from moediag.corrections.moments import Moments
from moediag.corrections.strata import Stratifier
from moediag.corrections.terms import LOG_RATIO_CLAMP, Float64, Terms
from moediag.errors import MoediagError

MAX_CLUSTERS: Final = 512
"""More prompts than this are pooled, prompt by prompt in turn: intervals cover from 64 clusters on, and a bootstrap
over ten thousand would cost more than everything else."""


@dataclass
class Sums:
    """Sums by cluster of one correction (or of all tokens, under the name of what they are).

    Args:
        n_clusters: C.
        by_name: name -> (C,) sums.
        n_CB: tokens by cluster and stratum.
        token_weights, sequence_weights: moments of the weights of tokens, and of the mean weights of sequences.
    """

    n_clusters: int
    by_name: dict[str, Float64] = field(default_factory=dict)
    n_CB: Float64 | None = None
    token_weights: Moments = field(default_factory=Moments.none)
    sequence_weights: Moments = field(default_factory=Moments.none)

    def add(self, name: str, cluster_N: NDArray[np.intp], values_N: NDArray[Any] | None = None) -> None:
        """Add values (or counts) to the sums of their clusters."""
        part_C = np.bincount(cluster_N, weights=values_N, minlength=self.n_clusters).astype(np.float64)
        self.by_name[name] = self.by_name[name] + part_C if name in self.by_name else part_C

    def __getitem__(self, name: str) -> Float64:
        return self.by_name.get(name, np.zeros(self.n_clusters))


@dataclass(frozen=True)
class Chunk:
    """Scored tokens of a part of a batch, with what several corrections need computed once.

    Args:
        part: whole sequences.
        eps_clip: PPO's clip.
    """

    part: Batch
    eps_clip: float
    n_clusters: int

    @cached_property
    def _scored(self) -> tuple[Terms, NDArray[np.bool_]]:
        return self.part.scored()

    @property
    def x(self) -> Terms:
        """Terms of the scored tokens."""
        return self._scored[0]

    def of_scored(self, values_T: NDArray[Any]) -> NDArray[Any]:
        """Values of the scored tokens."""
        is_scored_T = self._scored[1]
        return values_T if len(self.x) == len(is_scored_T) else values_T[is_scored_T]

    @cached_property
    def first_N(self) -> NDArray[np.intp]:  # noqa: N802 - the legend suffix
        """First scored token of every sequence that has one."""
        return np.flatnonzero(np.diff(self.x.row_T, prepend=-1))

    @cached_property
    def cluster_S(self) -> NDArray[np.intp]:  # noqa: N802
        """Cluster of every sequence."""
        return self.part.prompt_row_S % self.n_clusters

    @cached_property
    def cluster_N(self) -> NDArray[np.intp]:  # noqa: N802
        """Cluster of every sequence with a scored token."""
        return self.cluster_S[self.x.row_T[self.first_N]]

    @cached_property
    def n_N(self) -> Float64:  # noqa: N802
        """Scored tokens of these sequences."""
        return np.diff(np.append(self.first_N, len(self.x))).astype(np.float64)

    @cached_property
    def cluster_T(self) -> NDArray[np.intp]:  # noqa: N802
        """Cluster of every scored token."""
        return self.cluster_S[self.x.row_T]

    def by_sequence(self, values_T: NDArray[Any]) -> Float64:
        """Sums over the tokens of every sequence with a scored token."""
        return np.add.reduceat(values_T, self.first_N) if len(self.first_N) else np.zeros(0)

    @cached_property
    def p_infer_T(self) -> Float64:  # noqa: N802
        """Probability that infer gave."""
        return np.asarray(np.exp(self.x.logp_infer_T))

    @cached_property
    def entropy_T(self) -> tuple[Float64, NDArray[np.bool_]] | None:  # noqa: N802
        """Entropies with 0 where unknown, and where they are known."""
        if self.part.entropy_T is None:
            return None
        entropy_T = self.of_scored(self.part.entropy_T)
        is_known_T = np.isfinite(entropy_T)
        return np.where(is_known_T, entropy_T, 0.0), is_known_T

    @cached_property
    def flips_T(self) -> NDArray[Any] | None:  # noqa: N802
        """Flipped layers; -1 = not known."""
        flips_T = self.part.n_flipped_layers_T
        return None if flips_T is None else self.of_scored(flips_T)

    @cached_property
    def new_ratio_T(self) -> Float64 | None:  # noqa: N802
        """pi_train(theta) / pi_train(theta_old), clamped; None = the trained policy is not known."""
        if self.part.logp_train_new_T is None:
            return None
        with np.errstate(invalid="ignore"):
            diff_T = self.of_scored(self.part.logp_train_new_T) - self.x.logp_train_T
        if n_missing := int(np.isnan(diff_T).sum()):
            raise MoediagError(f"logp_train_new wants a number for every scored token; {n_missing} of a part have none")
        return np.asarray(np.exp(np.clip(diff_T, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)))

    @cached_property
    def surrogate_T(self) -> Float64 | None:  # noqa: N802
        """PPO's term without the correction, min(r A, clip(r) A); None = no advantages."""
        advantage_T, ratio_T = self.x.advantage_T, self.new_ratio_T
        if advantage_T is None or ratio_T is None:
            return advantage_T
        clipped_T = np.clip(ratio_T, 1 - self.eps_clip, 1 + self.eps_clip)
        return np.minimum(ratio_T * advantage_T, clipped_T * advantage_T)

    @cached_property
    def is_clipped_T(self) -> NDArray[np.bool_] | None:  # noqa: N802
        """PPO's term is a constant there: no gradient, whatever the weight."""
        advantage_T, ratio_T = self.x.advantage_T, self.new_ratio_T
        if advantage_T is None or ratio_T is None:
            return None
        above_T, below_T = ratio_T > 1 + self.eps_clip, ratio_T < 1 - self.eps_clip
        return ((advantage_T > 0) & above_T) | ((advantage_T < 0) & below_T)


def add_all(sums: Sums, chunk: Chunk) -> None:
    """Sums over all scored tokens of the chunk."""
    sums.add("n_sequences", chunk.cluster_N)
    by_sequence = {"n_tokens": chunk.n_N, "p_infer": chunk.by_sequence(chunk.p_infer_T)}
    if chunk.entropy_T is not None:
        by_sequence["entropy"] = chunk.by_sequence(chunk.entropy_T[0])
        by_sequence["n_entropy"] = chunk.by_sequence(chunk.entropy_T[1].astype(np.float64))
    if chunk.flips_T is not None:
        by_sequence["n_routed"] = chunk.by_sequence((chunk.flips_T >= 0).astype(np.float64))
        by_sequence["n_flipped"] = chunk.by_sequence((chunk.flips_T > 0).astype(np.float64))
    if chunk.is_clipped_T is not None:
        by_sequence["n_clipped"] = chunk.by_sequence(chunk.is_clipped_T.astype(np.float64))
    for name, values_N in by_sequence.items():
        sums.add(name, chunk.cluster_N, values_N)


def add_correction(
    sums: Sums, chunk: Chunk, correction: Correction, weight_T: Float64, masked: NDArray[np.intp]
) -> None:
    """Sums of one correction over the chunk.

    Args:
        weight_T: its weights of the scored tokens.
        masked: indices of the tokens with weight 0.
    """
    _add_weights(sums, chunk, weight_T)
    _add_masked(sums, chunk, masked)
    _add_sides(sums, chunk, correction, masked)
    _add_truncated(sums, chunk, correction, weight_T)
    k3_T = chunk.x.k3_T
    if len(masked):
        k3_T = k3_T.copy()
        k3_T[masked] = 0.0
    sums.add("kept_k3", chunk.cluster_N, chunk.by_sequence(k3_T))


def _add_weights(sums: Sums, chunk: Chunk, weight_T: Float64) -> None:
    sums.add("excess", chunk.cluster_N, chunk.by_sequence(weight_T - 1.0))
    sums.token_weights += Moments.of(weight_T)
    sums.sequence_weights += Moments.of(chunk.by_sequence(weight_T) / chunk.n_N)
    if chunk.surrogate_T is not None:
        sums.add("objective", chunk.cluster_N, chunk.by_sequence(weight_T * chunk.surrogate_T) / chunk.n_N)


def _add_masked(sums: Sums, chunk: Chunk, masked: NDArray[np.intp]) -> None:
    if not len(masked):
        return
    cluster = chunk.cluster_T[masked]
    n_masked_S = np.bincount(chunk.x.row_T[masked], minlength=chunk.x.n_sequences)
    is_gone_N = n_masked_S[chunk.x.row_T[chunk.first_N]] == chunk.n_N
    sums.add("n_masked_sequences", chunk.cluster_N[is_gone_N])
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


def _add_sides(sums: Sums, chunk: Chunk, correction: Correction, masked: NDArray[np.intp]) -> None:
    if correction.side == "none" or not len(masked):
        return
    x = chunk.x
    log_ratio = x.diff_T[masked] if correction.side == "token" else x.log_product_S[x.row_T[masked]]
    cluster = chunk.cluster_T[masked]
    sums.add("n_below", cluster[log_ratio < 0])
    sums.add("n_above", cluster[log_ratio > 0])


def _add_truncated(sums: Sums, chunk: Chunk, correction: Correction, weight_T: Float64) -> None:
    step = correction.truncation
    if step is not None:
        is_truncated_T = step.declared.is_truncated_T(chunk.x, *step.bounds) & (weight_T > 0)
        sums.add("n_truncated", chunk.cluster_T[np.flatnonzero(is_truncated_T)])


def cells(kinds: list[Stratifier], chunk: Chunk) -> list[NDArray[np.intp]]:
    """Cell of every scored token by stratifier: its cluster and stratum; one stratum more for those in none."""
    found = []
    for kind in kinds:
        index_T = chunk.of_scored(kind.index_T(chunk.part))
        found.append(chunk.cluster_T * (len(kind) + 1) + np.where(index_T < 0, len(kind), index_T))
    return found


def add_strata(sums: Sums, kinds: list[Stratifier], cells_T: list[NDArray[np.intp]], some: Any) -> None:
    """Count tokens (``some`` of the scored ones) by cluster and stratum; strata of all stratifiers side by side."""
    if sums.n_CB is None:
        sums.n_CB = np.zeros((sums.n_clusters, sum(map(len, kinds))))
    offset = 0
    for kind, cell_T in zip(kinds, cells_T, strict=True):
        shape = sums.n_clusters, len(kind) + 1
        counts = np.bincount(cell_T[some], minlength=shape[0] * shape[1]).reshape(shape)
        sums.n_CB[:, offset : offset + len(kind)] += counts[:, :-1]
        offset += len(kind)
