"""What every number of a page means, which end is good, and what no number here can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moediag.analysis.metrics import METRICS, Definition, Metric
from moediag.numbers import NONE
from moediag.report.blocks import Bullets, Table, table
from moediag.report.text import Markdown
from moediag.statistics.intervals import LARGE_SHARE

SIGN_WORDS: Final = Markdown(
    "Sign: **logp_diff = logp_train − logp_infer** [nat], ratio = exp(logp\\_diff) = π_train / π_infer. "
    "Intervals are 95 %, clustered by prompt."
)

REORDER_WORDS: Final = Markdown(
    "*Reordered* is the same set in another order: harmless, since gate weights go with their ids. A rate near 100 % "
    "only says that one engine does not sort its experts by score (vLLM's CPU router does not)."
)

_FURTHER: Final = (
    ("margin", "K-th minus (K+1)-th choice score", "score", "larger is safer",
     "a choice can flip only where the margin is smaller than the perturbation"),
    ("excess of flipped tokens",
     "mean abs(logp_diff) of flipped tokens − that of unflipped tokens of the same p_infer, entropy and position",
     "nat", "lower is better",
     "difficulty that these do not show is not controlled: an association, only replay shows a cause"),
    ("log-ratio of a response", "sum of logp_diff over its tokens", "nat", "0 is best",
     "what sequence-level corrections see"),
    ("masked", "tokens whose ratio leaves the closed band: weight 0, no update", "share of n", "lower loses less",
     "presets are not portable between stacks"),
    ("one prompt carries", "share of a mean's sum, signs aside, that lies in its largest prompt", "share of the sum",
     "lower is surer",
     f"said from {100 * LARGE_SHARE:.0f} % on: where samples typically show so much, 95 % intervals held the mean in "
     "65 to 90 % of them, since those that happen to lack such a prompt look calm; more prompts help"),
    ("floor", "the same number of one engine against itself", "the number's", "lower is better",
     "says whether an engine repeats itself; one that is mostly exact zeros is no scale for what two engines do"),
    ("rounding scale", "the same number with one unit in the last place added to every router input (dense model: to "
     "every block's input)", "the number's", "-", "says what harmless arithmetic does to this very model"),
)  # fmt: skip
"""What no metric of the summary is: terms of the tables and of the floors."""


def definition_table() -> Table:
    """Every number: formula, unit, direction, what it tells."""
    of: dict[Definition, list[Metric]] = {}
    for metric in METRICS.values():
        if metric.definition is not None:
            of.setdefault(metric.definition, []).append(metric)
    rows = [
        (one.term, one.formula, first.unit_words, first.direction,
         "; ".join(filter(None, [one.about, _elsewhere([first, *others])])))
        for one, (first, *others) in of.items()
    ]  # fmt: skip
    return table(["number", "formula", "unit", "good end", "what to know"], [*rows, *_FURTHER], caption="Definitions")


def _elsewhere(metrics: Sequence[Metric]) -> str:
    """Under which names other frameworks log these."""
    aliases = [alias for metric in metrics for alias in metric.elsewhere if alias.is_metric_name]
    words = ", ".join(f"{alias.name} ({alias.framework})" for alias in aliases)
    return f"elsewhere: {words}" if words else ""


DASH_WORDS: Final = Markdown(
    "**–** means there is no number, and the reason stands beside it where there is one; it never means 0. The bounds "
    "of a share that was never (or always) seen suppose that prompts differ much in it; what comes in bursts of ten "
    "tokens of one prompt, or in one prompt of thirty only, can be more frequent than they say."
)


def limits(is_floored: bool) -> Bullets:
    """What the numbers of a run cannot show."""
    engines = (
        "A floor says how far an engine is from itself, not from the truth: both may be off in the same way."
        if is_floored
        else "No A/A floor was measured: neither arm was compared with itself, so a part of the mismatch, perhaps all, "
        "may be each engine's own noise."
    )
    return Bullets(
        (
            Markdown(
                "**That training will be stable.** No offline number can show that: these are two engines at one set "
                "of weights, before any update."
            ),
            Markdown(f"**Which engine is off.** {engines}"),
            Markdown(
                "**What causes what.** Flips and mismatch standing together on a token do not show that the flip made "
                "the mismatch."
            ),
            Markdown(
                "**Other text.** The intervals cover other prompts like these, not other domains, lengths, batch "
                "sizes or checkpoints."
            ),
        )
    )


def comparison_limits() -> Bullets:
    """What a comparison of runs cannot show."""
    return Bullets(
        (
            Markdown("**That training will be stable.** No offline number can show that."),
            Markdown(
                "**That routing alone makes the difference.** The runs differ in more than their routers: weights, "
                "sizes, and the text each of them sampled."
            ),
            Markdown(
                "**What is noise.** Where a run has no floor, a ratio of two mismatches is not a ratio of two effects "
                "above a floor; intervals that overlap do not show that two runs are equal."
            ),
        )
    )


SHORT_NAMES: Final = {
    "abs_logp_diff.mean": "mean abs logp diff [nat]",
    "abs_logp_diff.p99": "p99 abs logp diff [nat]",
    "kl_infer_train_k3": "k3 [nat]",
    "extreme_share_2": "F(2): tokens beyond a factor of 2",
    "flip_rate": "flip rate",
    "any_layer_share": "tokens with a flip",
    "mean_ratio": "mean ratio",
}
"""Metric -> what it is called beside published numbers, whose words differ."""


@dataclass(frozen=True)
class Published:
    """A number that somebody published of another stack.

    Args:
        metric: its name here.
        value: as published, in the unit of the page.
        is_moe: whether the model has experts.
        stack: what was compared with what, as far as the source says.
        note: what else belongs to it.
    """

    metric: str
    value: str
    model: str
    is_moe: bool
    stack: str
    source: str
    note: str = ""

    @property
    def words(self) -> str:
        """The number with its model, stack and source, which the table names in full."""
        return f"{self.value} ({self.model}, {self.stack}; {self.source.partition(',')[0]})"


R3: Final = "R3: arXiv 2510.11370"
_R3: Final = "R3, arXiv 2510.11370"
_R3_STACK: Final = "SGLang against Megatron"
_QWEN: Final = "Qwen3-30B-A3B"
PUBLISHED: Final = (
    Published("kl_infer_train_k3", "0.001535", _QWEN, True, _R3_STACK, _R3),
    Published("kl_infer_train_k3", "0.00064", "Qwen3-8B", False, _R3_STACK, _R3, "dense"),
    Published("kl_infer_train_k3", "0.00084", _QWEN, True, "Megatron against itself", _R3, "the same text twice"),
    Published("kl_infer_train_k3", "0.00075", _QWEN, True, _R3_STACK, _R3, "infer's routing replayed"),
    Published("flip_rate", "about 10 %", _QWEN, True, _R3_STACK, _R3, "about 6 of 48 layers per token"),
    Published("any_layer_share", "94 %", _QWEN, True, _R3_STACK, _R3),
    Published("extreme_share_2", "0.0254 %", _QWEN, True, _R3_STACK, _R3, "0.00058 % with replay"),
    Published("abs_logp_diff.mean", "0.019", _QWEN, True, "vLLM against Megatron", "vime", "0.013 with replay"),
    Published("abs_logp_diff.mean", "0.018", _QWEN, True, "vLLM on GB200, trainer not named", "as posted"),
    Published("abs_logp_diff.mean", "0.028", "GLM-4.5-Air", True, "stack not named", "as posted"),
    Published("abs_logp_diff.mean", "0.011", "Qwen3-4B", False, "stack not named", "as posted", "dense"),
)
"""Of each metric the likeliest to be comparable first. Stacks differ: nothing here is a threshold."""


def published_for(metric: str, is_moe: bool) -> Published | None:
    """The first published number of a metric for a model of that kind; None where there is none."""
    return next((one for one in PUBLISHED if one.metric == metric and one.is_moe == is_moe), None)


def reference_table() -> Table:
    """Numbers published elsewhere."""
    rows = [
        (SHORT_NAMES[one.metric], one.value, f"{one.model}; {one.stack}", one.source, one.note or NONE)
        for one in PUBLISHED
    ]
    caption = "Published elsewhere; other stacks; not thresholds"
    return table(["number", "published", "model and stack", "source", "note"], rows, [1], caption)
