"""The legend: letters, signs and words, defined once.

Letters (array suffixes, in this order):
    T token rows, S sequences, L **MoE** layers (0 = first MoE layer; the decoder index is kept beside
    it), E experts, K experts per token, V vocabulary. Frames and scalars carry no suffix.

    Local letters: N any rows, B blocks or bootstrap draws, C clusters (prompts), M metrics, Q quantiles.

Signs:
    logp_diff = logp_train - logp_infer        [nat]
    ratio     = exp(logp_diff) = pi_train / pi_infer at theta_old        [1]

Rows:
    ``logp_T[t]`` scores token t given its prefix; ``expert_ids_TLK[t]`` is the routing while
    *consuming* token t, so the routing behind ``logp_T[t]`` is row t - 1. A response token's
    **routing row** is therefore the row of the token before it: from the last prompt token to the
    last but one response token.

Words:
    flip      the top-K *set* differs between two captures at one (token, layer)
    reorder   same set, other order (harmless)
    margin    gap between the K-th and (K+1)-th *choice score*, what TopK really compares (float32)
    mismatch  of log-probabilities only
    floor     the same comparison of an engine with itself

Absent values: NaN = not scored; expert id -1 = not routed; a mean over nothing is NaN with n = 0.
"""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 2
"""Version of the run directory's layout and of summary.json; runs of version 1 are read, never continued."""

NOT_ROUTED: Final = -1
"""Expert id in memory of a (token, layer) that has no routing row."""

POOLED: Final = -1
"""MoE layer of a frame's row that is of all layers together."""

NO_TOKEN: Final = -1
"""Token id in memory of a token whose id is not known (a dump without ids)."""

TRAIN: Final = "train"
INFER: Final = "infer"
"""The two sides of a pair by *role*; an arm's name says nothing."""

REFERENCE: Final = "reference"
"""The role of a third implementation, neither side's."""
