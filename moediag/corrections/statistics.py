"""All corrections on the same logged tokens: what each masks, what it leaves, and what masks have in common.

Invariants:
    - one pass over the batch, chunk by chunk of whole sequences; the chunk's terms are shared by all corrections;
    - only scored tokens count, and every share has its n; a share of nothing is NaN;
    - intervals resample prompts. They say how far a number would move with other prompts of the same kind, and nothing
      about training: no offline number shows that training will be stable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.corrections.batch import CHUNK_TOKENS, Batch
from moediag.corrections.correction import Correction
from moediag.corrections.declarations import CORRECTION_STATISTICS, MASKED_BY_STRATUM, OVERLAP
from moediag.corrections.strata import Stratifier, stratifiers
from moediag.corrections.sums import MAX_CLUSTERS, Chunk, Sums, add_all, add_correction, add_strata, cells
from moediag.errors import MoediagError
from moediag.statistics.intervals import Kind, ratio_mean_interval

Float64 = NDArray[np.float64]
OnProgress = Callable[[int, int, str], None]
"""Called with what is done, of how much, and its unit."""

EPS_CLIP: Final = 0.2
"""PPO's and GRPO's usual clip."""


@dataclass
class CorrectionPass:
    """Sums of several corrections, grown part by part of a batch.

    Args:
        corrections: name -> correction.
        kinds: stratifiers of the whole batch.
        n_clusters: clusters of prompts.
        eps_clip: PPO's clip.
    """

    corrections: Mapping[str, Correction]
    kinds: list[Stratifier]
    n_clusters: int
    eps_clip: float
    all: Sums = field(init=False)
    by_correction: list[Sums] = field(init=False)
    n_both: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.all = Sums(self.n_clusters)
        self.by_correction = [Sums(self.n_clusters) for _ in self.corrections]
        self.n_both = np.zeros((len(self.corrections),) * 2, np.int64)

    def add(self, part: Batch) -> None:
        """Collect one part."""
        chunk = Chunk(part, self.eps_clip, self.n_clusters)
        cells_T = cells(self.kinds, chunk)
        add_all(self.all, chunk)
        add_strata(self.all, self.kinds, cells_T, slice(None))
        masks = []
        for correction, sums in zip(self.corrections.values(), self.by_correction, strict=True):
            weight_T = correction.of_terms(chunk.x)
            is_masked_T = weight_T == 0
            masked = np.flatnonzero(is_masked_T)
            add_correction(sums, chunk, correction, weight_T, masked)
            if len(masked):
                add_strata(sums, self.kinds, cells_T, masked)
            masks.append(is_masked_T)
        self._add_overlap(np.array(masks, dtype=bool).reshape(len(masks), len(chunk.x)))

    def _add_overlap(self, masked: NDArray[np.bool_]) -> None:
        # float32 counts exactly up to 2^24, and a chunk holds fewer tokens unless one sequence is longer
        dtype = np.float32 if masked.shape[1] < 1 << 24 else np.float64
        some: NDArray[Any] = masked[:, masked.any(axis=0)].astype(dtype)
        self.n_both += np.rint(some @ some.T).astype(np.int64)


def compare_corrections(
    batch: Batch,
    corrections: Mapping[str, Correction],
    on_progress: OnProgress | None = None,
    *,
    eps_clip: float = EPS_CLIP,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, pd.DataFrame]:
    """Statistics of several corrections on the same tokens.

    Args:
        batch: response tokens of whole sequences.
        corrections: name -> correction; the names label the rows.
        on_progress: called after every chunk.
        eps_clip: PPO's clip, for ``clip_share`` and ``objective``.
        chunk_tokens: tokens at once.

    Returns:
        Frames ``correction_statistics``, ``masked_by_stratum`` and ``overlap``.

    Raises:
        MoediagError: a correction looks at advantages and the batch has none; an advantage that is not a number.

    Source: reports/corrections.md for weights and objective; verl for ESS of token and sequence weights; IcePop
    Figures 10 and 11 for masked shares and entropies.
    """
    _refuse_without_advantages(batch, corrections)
    n_clusters = min(int(batch.prompt_row_S.max(initial=0)) + 1, MAX_CLUSTERS)
    totals, done = CorrectionPass(corrections, stratifiers(batch), n_clusters, eps_clip), 0
    for part in batch.chunks(chunk_tokens):
        totals.add(part)
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(batch), "tokens")
    return {
        "correction_statistics": _statistics(totals, batch),
        "masked_by_stratum": _by_stratum(totals),
        "overlap": _overlap(totals),
    }


def _refuse_without_advantages(batch: Batch, corrections: Mapping[str, Correction]) -> None:
    wanting = [name for name, correction in corrections.items() if correction.needs_advantage]
    if wanting and batch.advantage_T is None:
        raise MoediagError(
            f"{', '.join(wanting)} looks at the sign of the advantage, and these tokens have none: give rewards or "
            "advantages, or leave it out"
        )


# column, numerator, denominator, kind of interval, added afterwards
_RATIOS: Final[tuple[tuple[str, str, str, Kind, float], ...]] = (
    ("masked_share", "n_masked", "n_tokens", "rate", 0.0),
    ("masked_sequence_share", "n_masked_sequences", "n_sequences", "rate", 0.0),
    ("truncated_share", "n_truncated", "n_tokens", "rate", 0.0),
    # less what is lost: the small part is the one whose spread matters
    ("kept_probability_mass", "p_infer_lost", "p_infer", "signed", 1.0),
    ("weight_mean", "excess", "n_tokens", "signed", 1.0),
    ("kept_k3", "kept_k3", "n_kept", "positive", 0.0),
    ("clip_share", "n_clipped_kept", "n_kept", "rate", 0.0),
    ("objective", "objective", "n_sequences", "signed", 0.0),
    ("entropy_masked", "entropy_masked", "n_entropy_masked", "positive", 0.0),
    ("entropy_kept", "entropy_kept", "n_entropy_kept", "positive", 0.0),
    ("flipped_share", "n_flipped", "n_routed", "rate", 0.0),
    ("precision", "n_flipped_masked", "n_routed_masked", "rate", 0.0),
    ("recall", "n_flipped_masked", "n_flipped", "rate", 0.0),
)
_COUNTS: Final = {
    "n_tokens": "n_tokens",
    "n_sequences": "n_sequences",
    "n_entropy_masked": "n_entropy_masked",
    "n_entropy_kept": "n_entropy_kept",
    "n_routed": "n_routed",
    "n_flipped": "n_flipped",
    "n_masked_routed": "n_routed_masked",
}
_OF_TOKENS: Final = ("masked_share", "truncated_share", "clip_share", "precision", "recall")
"""Shares of tokens whose events come a sequence at a time where a correction decides by the sequence."""
_OF_MASKS: Final = ("masked_share", "masked_sequence_share", "recall")
_ENDS: Final = ("", "_ci_low", "_ci_high")


def _statistics(totals: CorrectionPass, batch: Batch) -> pd.DataFrame:
    sums = [_completed(totals.all, one) for one in totals.by_correction]
    corrections = list(totals.corrections.values())
    columns: dict[str, Any] = {"correction": list(totals.corrections), "words": list(map(str, corrections))}
    columns |= {column: [int(one[name].sum()) for one in sums] for column, name in _COUNTS.items()}
    columns["n_prompts"] = np.full(len(sums), batch.n_scored_prompts)
    n_decided = [_tokens_per_decision(one, correction) for one, correction in zip(sums, corrections, strict=True)]
    for name, over, under, kind, offset in _RATIOS:
        n_per_event = n_decided if name in _OF_TOKENS else 1.0
        columns |= _intervals(
            name, [one[over] for one in sums], [one[under] for one in sums], kind, offset, n_per_event
        )
    columns["weight_variance"] = [one.token_weights.variance_G[0] for one in totals.by_correction]
    columns["ess_token"] = [one.token_weights.effective_share_G[0] for one in totals.by_correction]
    columns["ess_sequence"] = [one.sequence_weights.effective_share_G[0] for one in totals.by_correction]
    for name in ("below", "above"):
        columns[f"{name}_share"] = [_share(one[f"n_{name}"], one["n_tokens"]) for one in sums]
    is_sided = np.array([correction.side != "none" for correction in corrections], dtype=bool)
    is_capped = np.array([correction.truncation is not None for correction in corrections], dtype=bool)
    frame = pd.DataFrame(columns)
    mass = [f"kept_probability_mass{end}" for end in _ENDS]
    frame[mass] = frame[mass].clip(0.0, 1.0)
    # an interval cut off where no mean of weights can be loses no coverage
    largest = np.array([correction.largest_weight for correction in corrections], dtype=np.float64)
    frame["weight_mean_ci_low"] = frame["weight_mean_ci_low"].clip(lower=0.0)
    frame["weight_mean_ci_high"] = np.minimum(frame["weight_mean_ci_high"], largest)
    frame.loc[~is_sided, ["below_share", "above_share"]] = np.nan
    frame.loc[~is_capped, [f"truncated_share{end}" for end in _ENDS]] = np.nan
    # what masks nothing by definition masks nothing on other prompts, too
    cannot_mask = np.array([not correction.can_mask for correction in corrections], dtype=bool)
    frame.loc[cannot_mask, [f"{name}{end}" for name in _OF_MASKS for end in _ENDS[1:]]] = np.nan
    # the mean of weights that are 1 or 0 is the share kept: a rate has bounds in [0, 1] where a bootstrap has none
    is_mask = np.array([correction.is_mask for correction in corrections], dtype=bool)
    kept = 1 - frame.loc[is_mask, ["masked_share", "masked_share_ci_high", "masked_share_ci_low"]]
    frame.loc[is_mask, [f"weight_mean{end}" for end in _ENDS]] = kept.to_numpy()
    absent = _absent(batch)
    frame[[f"{name}{end}" for name in absent for end in _ENDS]] = np.nan
    frame["note"] = "; ".join(dict.fromkeys(absent.values()))
    return CORRECTION_STATISTICS.validate(frame)


def _completed(everything: Sums, one: Sums) -> Sums:
    """A correction's sums with those of the kept tokens, and with what does not depend on the correction."""
    sums = Sums(one.n_clusters, {**everything.by_name, **one.by_name})
    kept = {
        "n_kept": everything["n_tokens"] - one["n_masked"],
        "p_infer_lost": -one["p_infer_masked"],
        "n_clipped_kept": everything["n_clipped"] - one["n_clipped_masked"],
        "n_entropy_kept": everything["n_entropy"] - one["n_entropy_masked"],
    }
    # where all tokens are masked the difference of two sums would be rounding error
    kept["entropy_kept"] = np.where(kept["n_entropy_kept"] > 0, everything["entropy"] - one["entropy_masked"], 0.0)
    sums.by_name.update(kept)
    return sums


def _tokens_per_decision(one: Sums, correction: Correction) -> float:
    """Tokens masked or truncated together: those of a sequence where the correction decides by the sequence."""
    truncation = correction.truncation
    by_sequence = correction.drops_sequences or (truncation and truncation.declared.bounded.unit == "sequence")
    return float(one["n_tokens"].sum() / max(one["n_sequences"].sum(), 1.0)) if by_sequence else 1.0


def _intervals(
    name: str, over: list[Float64], under: list[Float64], kind: Kind, offset: float, n_per_event: ArrayLike
) -> dict[str, Float64]:
    """Quotient of sums over clusters with its interval, one per correction."""
    if not over:
        return {f"{name}{end}": np.zeros(0) for end in _ENDS}
    found = ratio_mean_interval(np.stack(over, axis=1), np.stack(under, axis=1), kind, n_per_event=n_per_event)
    arrays = (found.value_M, found.low_M, found.high_M)
    return {f"{name}{end}": array + offset for end, array in zip(_ENDS, arrays, strict=True)}


def _share(some_C: Float64, all_C: Float64) -> float:
    total = float(all_C.sum())
    return float(some_C.sum()) / total if total else np.nan


def _absent(batch: Batch) -> dict[str, str]:
    """Columns that the batch gives no values for, with the reason."""
    absent = {}
    if batch.logp_train_new_T is None:
        absent["clip_share"] = (
            "no clip share: the log-probabilities of the trained policy (logp_train_new) are not known"
        )
    if batch.advantage_T is None:
        absent["objective"] = absent["clip_share"] = "no objective and no clip share: advantages are not known"
    if batch.entropy_T is None:
        absent["entropy_masked"] = absent["entropy_kept"] = "no entropies"
    if batch.n_flipped_layers_T is None or not (batch.n_flipped_layers_T >= 0).any():
        absent["flipped_share"] = absent["precision"] = absent["recall"] = "routing is not known"
    return absent


def _by_stratum(totals: CorrectionPass) -> pd.DataFrame:
    names = [column.name for column in MASKED_BY_STRATUM.columns]
    n_strata = sum(map(len, totals.kinds))
    zero_CB = np.zeros((totals.n_clusters, n_strata))
    n_CB = zero_CB if totals.all.n_CB is None else totals.all.n_CB
    n_B, prompts_B = n_CB.sum(axis=0).astype(np.int64), (n_CB > 0).sum(axis=0)
    labels = [(kind.name, *ends) for kind in totals.kinds for ends in zip(kind.low_B, kind.high_B, strict=True)]
    held = np.flatnonzero(n_B).tolist()
    records = []
    for (name, correction), one in zip(totals.corrections.items(), totals.by_correction, strict=True):
        # a dropped sequence takes along at most what its prompt has in the stratum
        n_per_event = n_B / np.maximum(prompts_B, 1) if correction.drops_sequences else 1.0
        masked_CB = zero_CB if one.n_CB is None else one.n_CB
        found = ratio_mean_interval(masked_CB, n_CB, "rate", n_per_event=n_per_event)
        for b in held:
            records.append((name, *labels[b], n_B[b], prompts_B[b], found.value_M[b], found.low_M[b], found.high_M[b]))
    return MASKED_BY_STRATUM.validate(pd.DataFrame.from_records(records, columns=names))


def _overlap(totals: CorrectionPass) -> pd.DataFrame:
    names, n_both = list(totals.corrections), totals.n_both
    columns = [column.name for column in OVERLAP.columns]
    records = []
    for a, name in enumerate(names):
        for b, other in enumerate(names):
            masked, both = int(n_both[a, a]), int(n_both[a, b])
            either = masked + int(n_both[b, b]) - both
            records.append(
                (name, other, masked, both, both / masked if masked else np.nan, both / either if either else np.nan)
            )
    return OVERLAP.validate(pd.DataFrame.from_records(records, columns=columns))
