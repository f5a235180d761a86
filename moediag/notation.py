"""The legend: letters, signs and words, said once and used everywhere.

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
    mismatch  said of log-probabilities only
    floor     the same comparison of an engine with itself

Absent values: NaN = not scored; expert id -1 = not routed; a mean over nothing is NaN with n = 0.
"""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 1
"""Version of the run directory's layout and of summary.json; a reader refuses any other."""

NOT_ROUTED: Final = -1
"""Expert id in memory of a (token, layer) that has no routing row."""

TRAIN: Final = "train"
INFER: Final = "infer"
TRAIN_REPLAY: Final = "train-replay"
INFER_PRODUCTION: Final = "infer-production"
ARMS: Final = {
    INFER: "vLLM: samples the responses, or scores given ones",
    TRAIN: "transformers: scores the same tokens, teacher-forced",
    TRAIN_REPLAY: "transformers with vLLM's experts forced",
    "infer-rescore": "vLLM again, prefill of the same tokens",
    "infer-redecode": "vLLM again, decode path with the same tokens forced, same batches",
    "infer-repeat": "vLLM again, by the path of the infer arm, in other batches",
    "infer-production": "vLLM as rollouts run it (graphs, prefix cache, own options); log-probabilities only",
    "train-repeat": "transformers again, in padded batches of 4",
    "train-fp32": "transformers in float32",
    "train-perturbed": "transformers with router inputs (dense: every layer's) moved by one unit in the last place",
    "train-router-fp32": "transformers with the routers' matmul in float32",
    "train-router-fp8": "transformers with the routers' weights and inputs rounded to float8",
}
"""Arms this version captures, and what each is."""


PREFILLED: Final = "prefill (given tokens)"
"""``path`` of an infer arm that scored given tokens in one go and not one by one."""


def pair_name(arm_a: str, arm_b: str) -> str:
    """Name of the pair of two arms; infer~train whatever the order asked for.

    Example:
        >>> pair_name("train", "infer"), pair_name("infer", "train")
        ('infer~train', 'infer~train')
    """
    minuend, subtrahend = minuend_first(arm_a, arm_b)
    return f"{subtrahend}~{minuend}"


def minuend_first(arm_a: str, arm_b: str) -> tuple[str, str]:
    """(minuend, subtrahend) of ``logp_diff``: a train arm minus an infer arm, else a minus b.

    Example:
        >>> minuend_first("infer", "train")
        ('train', 'infer')
        >>> minuend_first("infer", "infer-rescore")
        ('infer', 'infer-rescore')
    """
    if engine_side(arm_b) == TRAIN and engine_side(arm_a) == INFER:
        return arm_b, arm_a
    return arm_a, arm_b


def engine_side(arm: str) -> str:
    """``train`` or ``infer``: the side an arm belongs to, by the first word of its name."""
    side = arm.split("-", 1)[0]
    return side if side in (TRAIN, INFER) else TRAIN
