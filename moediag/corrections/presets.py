"""Corrections in use, by framework and by paper: which method, which bounds, from where, and what is different there;
and which of them a simulation compares.

Invariants:
    - a preset is a correction in words and nothing else: no preset has a rule of its own;
    - where a framework's code means something else by the same name, the note says so; the preset keeps the meaning
      of the method;
    - bands are not portable between stacks: a preset is a place to start a sweep from;
    - a correction is in a simulation once, however many presets and words name it.

Replaying routes (R3) and the sequence ratio of GSPO are no presets: the first changes the log-probabilities and not the
weight, the second compares theta with theta_old and not train with infer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from moediag.corrections.correction import Correction, Step, parse_correction
from moediag.corrections.methods import METHODS
from moediag.errors import MoediagError

_LONGEST_LABEL: Final = 32
"""Longer words are shown by the name of a preset that has them [character]."""
_NOT_SEEN: Final = "bounds as quoted elsewhere; the source itself was not read"


@dataclass(frozen=True)
class Setting:
    """Where a framework takes a band on the token ratio, in its own words.

    Args:
        framework: its name, as it spells it.
        where: the file or command line that takes it.
        language: what it is written in.
        body: the lines, ``{low}`` and ``{high}`` for the band.
        source: repository, commit, file and line that read it.
        open_low, open_high: what leaves that side open there.
    """

    framework: str
    where: str
    language: str
    body: str
    source: str
    open_low: str = "0"
    open_high: str = "inf"

    def lines(self, low: float, high: float) -> str:
        """The lines for a band; 0 and infinity leave a side open.

        Example:
            >>> Setting("mine", "a command line", "sh", "--clip {low} {high}", "here").lines(0.5, float("inf"))
            '--clip 0.5 inf'
        """
        ends = {
            "low": self.open_low if low == 0 else repr(float(low)),
            "high": self.open_high if math.isinf(high) else repr(float(high)),
        }
        return re.sub(r"\{(low|high)\}", lambda match: ends[match[1]], self.body)


@dataclass(frozen=True)
class Preset:
    """A correction in use.

    Args:
        name: what ``--preset`` takes.
        group: framework, model report or paper it belongs to; ``--preset`` takes it, too.
        words: the correction, as :func:`~moediag.corrections.correction.parse_correction` reads it.
        source: paper, or repository and file.
        note: what the source does differently from the method of that name here; empty = nothing known.
        of_overflow: what becomes of loss and gradient there where a masked token's ratio is beyond float32; empty =
            nothing known.
        settings: how its framework is given this correction with another band; of a band on the token ratio only.
    """

    name: str
    group: str
    words: str
    source: str
    note: str = ""
    of_overflow: str = ""
    settings: tuple[Setting, ...] = ()

    @cached_property
    def correction(self) -> Correction:
        """The correction."""
        return parse_correction(self.words)


_VERL: Final = "verl, verl/trainer/ppo/rollout_corr_helper.py"
_VERL_LOSS: Final = "rejected tokens leave the loss mask and its denominator, while weights of 0 stay in it"
_VERL_K1: Final = (
    "rollout_rs *_k1 compares -log r with the logs of the bounds, so they bound 1 / r: the same for reciprocal bounds, "
    "another band otherwise; token log-ratios are clamped to +-20 before they are summed; " + _VERL_LOSS
)
_SLIME: Final = "slime, examples/train_infer_mismatch_helper"
_SLIME_MASK: Final = "masked tokens leave the loss mask and its denominator, and keep their unclipped weight"
_SWIFT: Final = "ms-swift at 3602360 (2026-08), swift/rlhf_trainers/grpo_trainer.py, _apply_rollout_importance_sampling"
_AREAL: Final = "AReaL at 4aef98d (2026-05), areal/utils/functional/functional.py, apply_rejection_sampling"
_PRIME_KL: Final = (
    "the ratio is that of the policy being trained, pi_train(theta) / pi_infer; a squared-log-ratio penalty comes on "
    "top (kl_tau 1e-3) and sees masked tokens, too"
)
_OPENRLHF: Final = "OpenRLHF at 3c3be62 (2026-08), openrlhf/models/loss.py, PolicyLoss"
_VERL_BAND: Final = Setting(
    "verl",
    "the trainer's YAML",
    "yaml",
    """algorithm:
  rollout_correction:
    rollout_is: token
    rollout_is_threshold: "{low}_{high}"
actor_rollout_ref:
  rollout:
    calculate_log_probs: true""",
    "verl at 1dda039 (2026-08), verl/trainer/ppo/rollout_corr_helper.py:93, _parse_rollout_is_threshold; defaults in "
    "verl/trainer/config/algorithm/rollout_correction.yaml",
    open_low="1e-09",  # below exp(-20), to which the ratio is clamped there; 0 is refused
)
_SLIME_BAND: Final = Setting(
    "slime",
    "the training command",
    "sh",
    """--use-tis \\
--custom-tis-function-path slime.backends.megatron_utils.loss.icepop_function \\
--tis-clip-low {low} \\
--tis-clip {high}""",
    "slime at 624b824 (2026-08), slime/backends/megatron_utils/loss.py:908, icepop_function; options in "
    "slime/utils/arguments.py:1061",
)
_TRL_BAND: Final = Setting(
    "TRL",
    "the arguments of GRPOConfig",
    "python",
    """GRPOConfig(
    use_vllm=True,
    vllm_importance_sampling_correction=True,
    vllm_importance_sampling_mode="token_mask",
    vllm_importance_sampling_clip_min={low},
    vllm_importance_sampling_clip_max={high},
)""",
    "TRL at f2cd577 (2026-07), trl/trainer/grpo_trainer.py:2602; options in trl/trainer/grpo_config.py:915",
    open_low="None",
    open_high="None",
)
_OPENRLHF_BAND: Final = Setting(
    "OpenRLHF",
    "the training command",
    "sh",
    """--algo.advantage.is_correction_enable \\
--algo.advantage.is_correction_type icepop \\
--algo.advantage.is_correction_threshold {low} {high}""",
    "OpenRLHF at 3c3be62 (2026-08), openrlhf/models/loss.py:200; options in openrlhf/cli/train_ppo_ray.py:257",
)
_AREAL_BAND: Final = Setting(
    "AReaL",
    "the experiment's YAML",
    "yaml",
    """actor:
  use_decoupled_loss: true
  rejection_sampling:
    level: token
    action: mask
    metric: ratio
    lower: {low}
    upper: {high}""",
    "AReaL at 4aef98d (2026-05), areal/api/cli_args.py:1224, RejectionSamplingConfig; applied in "
    "areal/utils/functional/functional.py:185",
    open_low="null",
    open_high=".inf",
)
_PRIME: Final = "prime-rl at 559b447 (2026-08), "
_PRIME_BAND: Final = (
    Setting(
        "prime-rl",
        "the trainer's TOML; no loss of its own has a band on the ratio any more",
        "toml",
        """[trainer.loss]
type = "custom"
import_path = "icepop_loss.icepop"

[trainer.loss.kwargs]
low = {low}
high = {high}""",
        _PRIME + "packages/prime-rl-configs/src/prime_rl/configs/trainer.py:522, CustomLossConfig",
        open_low="0.0",
    ),
    Setting(
        "prime-rl",
        "icepop_loss.py, where the trainer can import it",
        "python",
        """import torch
from prime_rl.trainer.rl.loss import LossInputs, LossOutputs


def icepop(inputs: LossInputs, low: float, high: float) -> LossOutputs:
    ratio = torch.exp(inputs.trainer_logprobs - inputs.inference_logprobs)
    is_inside = (ratio >= low) & (ratio <= high)
    terms = torch.where(inputs.loss_mask & is_inside, -ratio * inputs.advantages, 0.0)
    if inputs.loss_weights is not None:
        terms = terms * inputs.loss_weights
    masked = (~is_inside)[inputs.loss_mask].float()
    return LossOutputs(loss=terms.sum(), metrics={"is_masked": masked.sum() / max(len(masked), 1)})""",
        _PRIME + "src/prime_rl/trainer/rl/loss.py:14, LossInputs, and :262, setup_rl_loss_fn",
    ),
)
_NEMO: Final = "NeMo-RL at 7ea279a (2026-08), nemo_rl/algorithms/loss/loss_functions.py, ClippedPGLossFn"

PRESETS: Final[dict[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            "ring-1t", "ring-1t", "icepop:alpha=0.5,beta=5", "Ring-1T, arXiv 2510.18855",
            "Ring-1T reports that [0.5, 2] destabilises its training",
        ),
        Preset("glm-5", "glm-5", "icepop:alpha=0.5,beta=2", "GLM-5, arXiv 2602.15763", _NOT_SEEN),
        Preset(
            "intellect-3", "intellect-3", "icepop:alpha=0.5,beta=5+veto:floor=1e-05", "INTELLECT-3, arXiv 2512.16144",
            "the ratio is that of the policy being trained, pi_train(theta) / pi_infer(theta_old); mean over all "
            "tokens of the batch and not per response",
        ),
        Preset(
            "online-icepop", "icepop", "icepop_hard:alpha=0.5,beta=5", "Online IcePop variants, with Ring-1T's bounds",
            "one update per rollout, so no PPO clip; a public restatement weighs kept tokens by the ratio, like icepop",
        ),
        Preset("tis", "tis", "tis_token:cap=2", "Yao et al. 2025, fengyao.notion.site/off-policy-rl"),
        Preset("minirl", "minirl", "tis_token:cap=5", "Qwen MiniRL", _NOT_SEEN),
        Preset("token-mis", "mis", "mis_token:cap=2", "Liu et al. 2025, richardli.xyz/rl-collapse"),
        Preset(
            "seq-mis", "mis", "mis_sequence:cap=2", "Liu et al. 2025, richardli.xyz/rl-collapse",
            "verl's preset decoupled_seq_is_rs, documented as Seq-MIS, is verl-seq-mis here and has a lower bound, too",
        ),
        Preset("kpop-0.5", "kpop", "kpop:phi=0.5", "KPop post, ringtech.notion.site/kpop", _NOT_SEEN),
        Preset("kpop-0.75", "kpop", "kpop:phi=0.75", "KPop post, ringtech.notion.site/kpop", _NOT_SEEN),
        Preset(
            "dppo-tv", "dppo", "dppo_tv:eps_low=0.15,eps_high=0.15", "DPPO, arXiv 2602.04879",
            "0.15 to 0.2 in the paper; there p_train is that of the policy being trained (theta), here theta_old's",
        ),
        Preset(
            "dppo-kl", "dppo", "dppo_kl:eps=0.05", "DPPO, arXiv 2602.04879",
            "there p_train is that of the policy being trained (theta), here theta_old's",
        ),
        Preset(
            "trm-max", "trm", "trm_max:delta=0.05", "TRM, arXiv 2512.23075",
            "the paper bounds the KL of whole next-token distributions; d^2 / 2 of the sampled token is its estimate",
        ),
        Preset(
            "trm-mean", "trm", "trm_mean:delta=0.001", "TRM, arXiv 2512.23075",
            "the paper bounds the KL of whole next-token distributions; k3 of the sampled tokens is its estimate",
        ),
        Preset(
            "verl-token-tis", "verl", "tis_token:cap=2", _VERL,
            "weights may be divided by their batch mean (rollout_is_batch_normalize, off by default)",
        ),
        Preset(
            "verl-seq-tis", "verl", "tis_sequence:cap=2", _VERL,
            "the default level; weights may be divided by their batch mean (off by default)",
        ),
        Preset(
            "verl-icepop", "verl", "icepop:alpha=0.5,beta=5", _VERL + ' (rollout_is_threshold "0.5_5.0")',
            "the band is tested on the ratio after exp, not in log space; with rollout_is sequence the same words mean "
            "a band on the product ratio",
            settings=(_VERL_BAND,),
        ),
        Preset("verl-seq-mis", "verl", "tis_sequence:cap=2+sequence_band:low=0.5,high=2", _VERL, _VERL_K1),
        Preset("verl-geo-rs", "verl", "geometric_band:low=0.999,high=1.001", _VERL, _VERL_K1),
        Preset(
            "verl-k3-rs", "verl", "k3_mean:limit=0.01", _VERL + " (seq_mean_k3)",
            "k3 of log-ratios clamped to +-20; " + _VERL_LOSS,
        ),
        Preset(
            "slime-tis", "slime", "tis_token:cap=2+veto:floor=0.0001", _SLIME + "/mis.yaml",
            "as mis.yaml was in 2025-10 (46e2cd4); since 2025-11 it also rejects tokens outside the bounds: slime-mis",
        ),
        Preset(
            "slime-mis", "slime", "icepop:alpha=0.5,beta=2+veto:floor=0.0001",
            "slime at 624b824 (2026-08), examples/train_infer_mismatch_helper/mis.yaml",
            "written there as tis_token with a mask of the same bounds; weights are divided by their batch mean; "
            + _SLIME_MASK,
        ),
        Preset(
            "slime-icepop", "slime", "icepop:alpha=0.5,beta=2",
            "slime at 624b824 (2026-08), slime/backends/megatron_utils/loss.py, icepop_function",
            "its own loss, without the helper: the bounds are tis_clip_low, 0 unless set, and tis_clip, 2; 0.5 and 2 "
            "are those of its test of GLM; masked tokens stay in the denominator; no clamp to +-20",
            settings=(_SLIME_BAND,),
        ),
        Preset(
            "slime-clamp", "slime", "clamp_token:low=0,high=2",
            "slime at 624b824 (2026-08), slime/backends/megatron_utils/loss.py, vanilla_tis_function",
            "its own loss, without the helper: the bounds are tis_clip_low, 0, and tis_clip, 2; its tests set 0.5; the "
            "helper's mode clip does the same with 0.5 and 2; no clamp to +-20",
        ),
        Preset(
            "slime-seq-mis", "slime", "tis_sequence:cap=2+sequence_band:low=0.5,high=2+veto:floor=0.0001",
            _SLIME + "/configs/5_seq_is_rs.yaml", _SLIME_MASK,
        ),
        Preset(
            "slime-geo-rs", "slime", "geometric_band:low=0.9999,high=1.0001+veto:floor=0.0001",
            _SLIME + "/configs/6_geo_rs.yaml", _SLIME_MASK,
        ),
        Preset(
            "slime-geo-tis", "slime", "tis_geometric:cap=1.0001",
            "slime at 624b824 (2026-08), examples/train_infer_mismatch_helper/mis.py, compute_mis_weights (tis_level "
            "geometric, tis_mode truncate)",
            "1.0001 is what mis.yaml advises for this level, use_rs off; the code refuses to divide weights by their "
            "batch mean at this level",
        ),
        Preset(
            "swift-token-tis", "ms-swift", "tis_token:cap=2", _SWIFT + " (token_truncate)",
            "the threshold is rollout_importance_sampling_threshold, 2, in every mode",
        ),
        Preset(
            "swift-token-mis", "ms-swift", "mis_token:cap=2", _SWIFT + " (token_mask)",
            "the band is tested on the ratio after exp; masked tokens stay in the denominator",
        ),
        Preset(
            "swift-seq-tis", "ms-swift", "tis_geometric:cap=2", _SWIFT + " (sequence_truncate)",
            "token log-ratios are clamped to +-20 before their mean is taken",
        ),
        Preset(
            "swift-seq-mask", "ms-swift", "tis_token:cap=inf+geometric_band:low=0,high=2", _SWIFT + " (sequence_mask)",
            "token ratios as they are, in sequences kept by their geometric mean, of log-ratios clamped to +-20; "
            "masked tokens stay in the denominator",
        ),
        Preset(
            "roll-geo-tis", "roll", "tis_geometric:cap=1.2",
            "ROLL at 8eb27cc (2026-08), roll/utils/train_infer_corrections.py, compute_train_infer_correction "
            "(weight_type geometric)",
            "1.2 is the default upper_bound of every weight_type (token by default); no clamp to +-20; filters on "
            "ratios or probabilities can be added, which take tokens out of the denominator",
        ),
        Preset(
            "trl-token-tis", "trl", "tis_token:cap=3", "TRL, trl/trainer/grpo_trainer.py (token_truncate)",
            "the cap is vllm_importance_sampling_clip_max, 3; the default mode is sequence_mask (trl-seq-mis); an "
            "optional lower bound (clip_min) raises small ratios to it; no clamp to +-20",
        ),
        Preset(
            "trl-seq-mis", "trl", "mis_sequence:cap=3", "TRL, trl/trainer/grpo_trainer.py (sequence_mask)",
            "the default of TRL; an optional lower bound (clip_min) turns it into a band; no clamp to +-20",
        ),
        Preset(
            "trl-icepop", "trl", "icepop:alpha=0.5,beta=5", "TRL, trl/trainer/grpo_trainer.py (token_mask)",
            "not a default: the mode's bounds are clip_min, not set, and clip_max, 3; 0.5 and 5 are Ring-1T's; masked "
            "tokens stay in the denominator; no clamp to +-20",
            settings=(_TRL_BAND,),
        ),
        Preset(
            "openrlhf-tis", "openrlhf", "clamp_token:low=0.5,high=5", _OPENRLHF + " (tis)",
            "the default type and bounds (is_correction_threshold); named TIS; no clamp to +-20; not applied with the "
            "GSPO loss",
        ),
        Preset(
            "openrlhf-icepop", "openrlhf", "icepop:alpha=0.5,beta=5", _OPENRLHF + " (icepop)",
            "no clamp to +-20; masked tokens stay in the denominator; not applied with the GSPO loss",
            "NaN before its pull request 1314 (2026-08): the mask was a factor, and infinity times 0 is no number",
            settings=(_OPENRLHF_BAND,),
        ),
        Preset(
            "openrlhf-seq-mask-tis", "openrlhf", "tis_token:cap=inf+geometric_band:low=0.5,high=5",
            _OPENRLHF + " (seq-mask-tis)",
            "named TIS, but nothing is truncated: token ratios as they are, in sequences kept by their geometric mean",
        ),
        Preset(
            "nemo-rl-tis", "nemo-rl", "clamp_token:low=0.2,high=5", _NEMO + " (tis)",
            "the framework sets no bounds of its own (a lower one that is not set is 0); 0.2 and 5 are those of a "
            "recipe (grpo-nanov3-30ba3b-3n8g-megatron-dynamo-swe1.yaml), 0 and 2 of most; infinite ratios count as 0",
        ),
        Preset(
            "nemo-rl-icepop", "nemo-rl", "icepop:alpha=0.5,beta=2", "NeMo-RL, nemo_rl/algorithms/loss_functions.py",
            "the framework sets no bounds of its own; 0.5 and 2 are those of its tests of seq-mask-tis; a fork with "
            "the same bounds masks hard, without the ratio as weight",
        ),
        Preset(
            "nemo-rl-seq-mask-tis", "nemo-rl", "tis_token:cap=inf+geometric_band:low=0.5,high=2",
            "NeMo-RL, nemo_rl/algorithms/loss_functions.py",
            "the framework sets no bounds of its own; 0.5 and 2 are those of its tests; token ratios are not truncated",
        ),
        Preset(
            "nemo-rl-seq-error", "nemo-rl", "prob_mult_error:limit=2",
            "NeMo-RL at 7ea279a (2026-08), nemo_rl/algorithms/grpo.py, compute_and_apply_seq_logprob_error_masking",
            "off unless seq_logprob_error_threshold is set; 2 is that of its Nemotron recipes; the sequence leaves the "
            "sample mask before advantages and loss are computed, and so their denominator; no clamp to +-20",
        ),
        Preset(
            "areal-icepop", "areal", "icepop:alpha=0.5,beta=5", "AReaL, areal/utils/functional/functional.py",
            "infinite log-ratios count as 0, so that a token of probability 0 passes with weight 1; on sequence level "
            "a ratio is the geometric mean, not the product",
            settings=(_AREAL_BAND,),
        ),
        Preset(
            "areal-geo-tis", "areal", "tis_geometric:cap=5", _AREAL + " (level sequence, action clamp, metric ratio)",
            "5 is the default upper; a lower raises small G to it; infinite log-ratios count as 0; no clamp to +-20",
        ),
        Preset(
            "areal-geo-mask", "areal", "tis_geometric:cap=inf+geometric_band:low=0,high=5",
            _AREAL + " (level sequence, action mask, metric ratio)",
            "G is both the weight and what is tested; a masked sequence stays in the denominator; infinite log-ratios "
            "count as 0; no clamp to +-20",
        ),
        Preset(
            "areal-kpop", "areal", "kpop:phi=2", "AReaL, areal/utils/functional/functional.py (binary_kl)",
            "one bound on the larger of the two directions, which is the same",
        ),
        Preset(
            "prime-rl-icepop", "prime-rl", "icepop:alpha=0.2,beta=5", "prime-rl, src/prime_rl/trainer/rl/loss.py",
            "the ratio is that of the policy being trained, pi_train(theta) / pi_infer; no PPO clip; as the file was "
            "until 2026-03: since then a band needs a custom loss",
            settings=_PRIME_BAND,
        ),
        Preset(
            "prime-rl-kpop", "prime-rl", "kpop:phi=0.1", "prime-rl, pull request 3283",
            "probabilities clamped to [1e-6, 1 - 1e-6] before the binary KL; " + _PRIME_KL,
        ),
        Preset(
            "prime-rl-ipo", "prime-rl", "ipo:eps=0.1", "prime-rl, src/prime_rl/trainer/rl/loss.py (ipo_threshold)",
            "0.2 as the default loss of early 2026, 0.1 to 0.3 in its configurations; " + _PRIME_KL,
            "NaN where the mask is a factor, as its pull request 2085 (2026-03, closed) reports: infinity times 0",
        ),
        Preset(
            "prime-rl-dppo", "prime-rl", "dppo_tv:eps_low=0.2,eps_high=0.2",
            "prime-rl, src/prime_rl/trainer/rl/loss.py", _PRIME_KL,
        ),
        Preset(
            "skyrl-product-mask", "skyrl", "sequence_band:low=0.5,high=2",
            "SkyRL, skyrl_train/utils/off_policy_correction_utils.py",
            "bounds are set by the user; further filters are one on the geometric mean (0.99 to 1.01 in its search "
            "example) and one that drops a sequence with any ratio outside two bounds (1e-4 and 100 in its tests)",
        ),
    )
}  # fmt: skip
"""Every preset by its name."""


def find_presets(name: str) -> tuple[Preset, ...]:
    """The preset of that name, or all presets of that framework or paper.

    Raises:
        MoediagError: neither a preset nor a group is named so.

    Example:
        >>> [preset.name for preset in find_presets("trl")]
        ['trl-token-tis', 'trl-seq-mis', 'trl-icepop']
    """
    if name in PRESETS:
        return (PRESETS[name],)
    if found := tuple(preset for preset in PRESETS.values() if preset.group == name):
        return found
    groups = list(dict.fromkeys(preset.group for preset in PRESETS.values()))
    raise MoediagError(
        f"no preset is named {name!r}; there are {', '.join(PRESETS)}; by framework or paper {', '.join(groups)}"
    )


def presets_of(correction: Correction) -> tuple[Preset, ...]:
    """The presets that are this correction."""
    return tuple(preset for preset in PRESETS.values() if preset.correction == correction)


def distinct_corrections() -> dict[str, Correction]:
    """Every different correction of the presets once, by its words; ``none`` first."""
    every = [parse_correction("none"), *(preset.correction for preset in PRESETS.values())]
    return {str(correction): correction for correction in every}


def choose(methods: Sequence[str] = (), presets: Sequence[str] = (), everything: bool = False) -> dict[str, Correction]:
    """The corrections named, in the order named; all presets and methods where none is, or all are requested.

    Args:
        methods: corrections in words, see :func:`~moediag.corrections.parse_correction`.
        presets: presets, or frameworks and papers for all of theirs.
        everything: add every different correction of the presets, and every method with its defaults.

    Returns:
        Label -> correction; ``none`` is first wherever something is compared.

    Raises:
        MoediagError: an unknown method, parameter or preset.

    Example:
        >>> list(choose(["icepop:beta=2"], ["glm-5"]))
        ['none', 'icepop:alpha=0.5,beta=2']
    """
    label_of = {"none": "none"}  # words -> label
    for words in map(str, map(parse_correction, methods)):
        label_of.setdefault(words, words)
    for name in presets:
        for preset in find_presets(name):
            label_of.setdefault(str(preset.correction), preset.name)
    if everything or not (methods or presets):
        defaults = {str(step): Correction((step,)) for step in map(Step, METHODS)}
        for words, correction in {**distinct_corrections(), **defaults}.items():
            names = [preset.name for preset in presets_of(correction)]
            label_of.setdefault(words, names[0] if len(words) > _LONGEST_LABEL and names else words)
    return {label: parse_correction(words) for words, label in label_of.items()}
