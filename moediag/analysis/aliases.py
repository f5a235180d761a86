"""Names that other frameworks give to what moediag measures: so that a logged number can be compared with ours.

Invariants:
    - one row per (framework, name), as the framework, paper or post in ``source`` uses it; where no metric name of its
      own is known, ``name`` is a description and ``is_metric_name`` is False;
    - ``metric`` is a metric of frame ``logp_metrics``, or empty where moediag has no such number;
    - a remark is there wherever the same word stands for another number elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_TRAIN_MINUS_INFER: Final = "train against infer, tokens sampled from infer"
_SYMMETRIC: Final = "symmetric in the two sides"
_VERL_DEBUG: Final = "verl, debug metrics of the rollout"
_VERL_CORRECTION: Final = "verl, metrics of its rollout correction"
_R3: Final = "R3, arXiv 2510.11370"


@dataclass(frozen=True)
class Alias:
    """A number by another name.

    Args:
        framework: who uses the name.
        name: the metric's name there, or the words it is known by.
        metric: moediag's name for the same number; empty = none.
        formula: with d = logp_train - logp_infer and ratio = exp(d).
        direction: which side against which.
        remark: where the same name means another number, or an alarm that is in use.
        source: where to look it up: framework, paper or post, and the place in it where that is known.
        is_metric_name: the framework logs it under exactly this name.
    """

    framework: str
    name: str
    metric: str
    formula: str
    direction: str
    remark: str
    source: str
    is_metric_name: bool = True


ALIASES: Final = (
    Alias("verl", "rollout_probs_diff_mean", "abs_prob_diff.mean", "mean abs(p_train - p_infer)", _SYMMETRIC,
          "of probabilities, not of log-probabilities; its FAQ takes a mean above 0.01 as an alarm",
          "verl, debug metrics of the rollout; its FAQ"),
    Alias("verl", "rollout_probs_diff_max", "abs_prob_diff.max", "max abs(p_train - p_infer)", _SYMMETRIC,
          "a maximum grows with the number of tokens", _VERL_DEBUG),
    Alias("verl", "rollout_probs_diff_std", "abs_prob_diff.std", "std of abs(p_train - p_infer)", _SYMMETRIC, "",
          _VERL_DEBUG),
    Alias("verl", "rollout_actor_probs_pearson_corr", "pearson_p", "corr(p_train, p_infer)", _SYMMETRIC,
          "of probabilities, not of log-probabilities", _VERL_DEBUG),
    Alias("verl", "kl", "kl_infer_train_k1", "mean(-d)", "KL(infer || train)",
          "the k1 estimator; abs(kl) > 0.1 is an alarm in use. Elsewhere 'kl' may be k3, or the KL to a reference "
          "model", _VERL_CORRECTION),
    Alias("verl", "k3_kl", "kl_infer_train_k3", "mean(ratio - 1 - d)", "KL(infer || train)", "", _VERL_CORRECTION),
    Alias("verl", "ppl, log ppl gap", "log_ppl_gap", "mean over sequences of -mean(d)", "train minus infer",
          "per sequence first, then the mean; log_ppl_abs_gap takes the absolute gap of each sequence",
          _VERL_CORRECTION, is_metric_name=False),
    Alias("verl", "chi2 token", "chi2_token", "mean(ratio^2) - 1", _TRAIN_MINUS_INFER, "", _VERL_CORRECTION,
          is_metric_name=False),
    Alias("verl", "chi2 sequence", "chi2_sequence", "mean(exp(sum d)^2) - 1 over sequences", _TRAIN_MINUS_INFER,
          "another number than chi2 token: the product over the response, squared", _VERL_CORRECTION,
          is_metric_name=False),
    Alias("verl", "effective sample size", "ess_token", "(sum w)^2 / (n sum w^2)", _TRAIN_MINUS_INFER,
          "below 0.3 is an alarm in use; of token weights here, ess_sequence is of sequence weights",
          _VERL_CORRECTION, is_metric_name=False),
    Alias("slime", "train_rollout_logprob_abs_diff", "abs_logp_diff.mean", "mean abs(d)", _SYMMETRIC,
          "0.1 is the limit in its CI", "slime, metrics of its policy loss; its CI"),
    Alias("vime", "mean abs logp diff", "abs_logp_diff.mean", "mean abs(d)", _SYMMETRIC, "", "as reported by vime",
          is_metric_name=False),
    Alias("NeMo-RL", "token_mult_prob_error", "prob_mult_error", "mean exp(abs(d))", _SYMMETRIC,
          "1 is best, not 0; above 1.05 is an alarm in use", "NeMo-RL, docs/guides/grpo.md, metrics"),
    Alias("prime-rl", "mismatch_kl", "kl_infer_train_k3", "mean(ratio - 1 - d)", "KL(infer || train)",
          "the k3 estimator: not verl's 'kl', which is k1", "prime-rl, metrics of its trainer"),
    Alias("Tinker", "kl_sample_train_v1", "kl_infer_train_k1", "mean(-d)", "KL(infer || train)",
          "its documentation calls training stable below 0.01; kl_sample_train_v2 is k2",
          "Tinker's documentation, RL hyperparameters"),
    Alias("R3", "KL", "kl_infer_train_k3", "mean(ratio - 1 - d)", "KL(infer || train)",
          "k3: 1.535e-3 on Qwen3-30B-A3B (SGLang against Megatron)", _R3, is_metric_name=False),
    Alias("Miles", "KL", "kl_infer_train_k3", "mean(ratio - 1 - d)", "KL(infer || train)",
          "dense 1e-5 to 1e-3, MoE 1e-3 to 1e-1", "as reported by Miles", is_metric_name=False),
    Alias("R3", "F(tau)", "extreme_share_2", "P(max(ratio, 1/ratio) > tau)", _SYMMETRIC,
          "a curve over tau (frame tail_curve); ours stands for tau = 2; F(2) > 0.1 at collapse",
          _R3, is_metric_name=False),
    Alias("AReaL", "abs d > ln 2", "extreme_share_2", "P(abs(d) > ln 2)", _SYMMETRIC, "the same number as F(2)",
          "as used by AReaL", is_metric_name=False),
    Alias("TIS", "abs prob diff", "abs_prob_diff.mean", "mean abs(p_train - p_infer)", _SYMMETRIC, "",
          "Yao et al. 2025, TIS", is_metric_name=False),
    Alias("DPPO", "binary TV", "abs_prob_diff.mean", "abs(p_train - p_infer) of a token", _SYMMETRIC,
          "DPPO thresholds the signed difference of each token; ours is the mean of its absolute value",
          "DPPO, arXiv 2602.04879; reports/corrections.md", is_metric_name=False),
    Alias("KPop", "D_B", "binary_kl_infer_train", "p log(p/q) + (1-p) log((1-p)/(1-q))", "both directions",
          "KPop thresholds both directions; binary_kl_train_infer is the other one",
          "KPop post; reports/corrections.md", is_metric_name=False),
    Alias("TRL", "share of ratios outside [0.9, 1.1]", "", "P(ratio < 0.9 or ratio > 1.1)", _TRAIN_MINUS_INFER,
          "issue 6789: 8.0 % between two chunkings of one trainer, 7.5 % between vLLM and trainer. No metric of "
          "ours: read frame tail_curve near 0.1", "TRL, issue 6789", is_metric_name=False),
    Alias("IcePop", "abs(log p_infer - log p_train)", "abs_logp_diff.mean", "abs(d)", _SYMMETRIC,
          "Figure 1; the post's '0.05' names no metric, most plausibly this mean", "IcePop post, Figure 1",
          is_metric_name=False),
)  # fmt: skip


def aliases_of(metric: str) -> tuple[Alias, ...]:
    """Who else measures this, by moediag's name of the metric.

    Example:
        >>> [alias.framework for alias in aliases_of("prob_mult_error")]
        ['NeMo-RL']
    """
    return tuple(alias for alias in ALIASES if alias.metric == metric)
