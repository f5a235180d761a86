"""The numbers a reader sees first, and the verdict in words.

Invariants: a number never stands without n, unit, the end that is good, and an interval or the reason for
none; without a measured A/A floor the words are about the mismatch of this pair and blame neither engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from moediag.figures.numbers import NONE, count, is_number, percent, sig, times
from moediag.report.tables import Markdown, interval, number, table

Summary = Mapping[str, Any]
Frames = Mapping[str, pd.DataFrame]

LOWER: Final = "lower is better"

LOGP_ROWS: Final[tuple[tuple[str, str, str], ...]] = (
    ("abs_logp_diff.mean", "abs logp diff, mean", "nat"),
    ("abs_logp_diff.p50", "abs logp diff, p50", "nat"),
    ("abs_logp_diff.p90", "abs logp diff, p90", "nat"),
    ("abs_logp_diff.p99", "abs logp diff, p99", "nat"),
    ("abs_logp_diff.p999", "abs logp diff, p99.9", "nat"),
    ("abs_logp_diff.max", "abs logp diff, max", "nat"),
    ("kl_infer_train_k1", "KL(infer‖train), k1", "nat"),
    ("kl_infer_train_k2", "KL(infer‖train), k2", "nat"),
    ("kl_infer_train_k3", "KL(infer‖train), k3", "nat"),
    ("mean_ratio", "mean ratio train / infer", "1"),
    ("extreme_share_2", "F(2): tokens whose ratio or its inverse is above 2", "share"),
    ("abs_prob_diff.mean", "abs prob diff, mean", "1"),
    ("abs_prob_diff.max", "abs prob diff, max", "1"),
)
"""Metric, its words and its unit, in the order of the table."""

FORCED: Final = "forced text"
BENT: Final = "sampling not neutral"

_NEUTRAL: Final = {"temperature": (None, 1), "top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0)}
"""Values that leave infer's distribution as it is; vLLM takes top_k 0 and -1 for off."""


@dataclass(frozen=True)
class Measured:
    """One number with all that must stand beside it; ``unit`` is ``share`` for rates."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: str
    unit: str
    direction: str = LOWER
    note: str = ""

    def cells(self) -> list[Markdown | str]:
        """name, value, interval, unit, n, direction."""
        unit = "share of n" if self.unit == "share" else self.unit
        digits = sig(self.value, 5) if self.name.startswith("mean ratio") and is_number(self.value) else None
        value = Markdown(digits) if digits else number(self.value, self.unit)
        return [self.name, value, interval(self.low, self.high, self.unit, self.note), unit, self.n, self.direction]


MEASURED_HEADER: Final = ("number", "value", "95 % interval", "unit", "n", "good end")


def measured_table(rows: list[Measured]) -> Markdown:
    """Numbers with everything beside them."""
    return table(MEASURED_HEADER, [row.cells() for row in rows], right=(1, 2, 4))


def _lookup(nested: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        nested = nested.get(part) if isinstance(nested, Mapping) else None
    return nested


def logp_measure(metric: str, words: str, unit: str, pair: Summary, frames: Frames) -> Measured:
    """A metric of the mismatch: from the metrics frame, else, without a good end, from the summary."""
    frame = frames.get("logp_metrics")
    rows = frame[frame["metric"] == metric] if frame is not None else None
    if rows is not None and len(rows):
        row = rows.iloc[0]
        n = count(int(row["n_tokens"]), "token")
        direction, note = str(row["direction"]), str(row["note"])
        return Measured(words, row["value"], row["ci_low"], row["ci_high"], n, unit, direction, note)
    bounds = _lookup(pair.get("logp"), f"{metric}_ci") or (None, None)
    n = count(pair.get("n_tokens"), "token")
    return Measured(words, _lookup(pair.get("logp"), metric), bounds[0], bounds[1], n, unit, NONE)


def text_origin(summary: Summary) -> str:
    """Why the tokens are no honest sample of infer's distribution; empty when they are.

    Example:
        >>> text_origin({"sampling": {"given_completions": True}})
        'forced text'
        >>> text_origin({"sampling": {"temperature": 0.7}}), text_origin({"sampling": {"top_k": -1}})
        ('sampling not neutral', '')
    """
    sampling = summary.get("sampling") or {}
    if sampling.get("given_completions"):
        return FORCED
    return BENT if _bent(sampling) else ""


def _bent(sampling: Mapping[str, Any]) -> list[str]:
    return [f"{key} {sampling[key]}" for key, fine in _NEUTRAL.items() if sampling.get(key) not in fine]


def logp_rows(origin: str = "") -> tuple[tuple[str, str, str], ...]:
    """:data:`LOGP_ROWS`, with k1, k2 and k3 called statistics where ``origin`` says that they are no KL."""
    if not origin:
        return LOGP_ROWS
    return tuple(
        (metric, f"{metric[-2:]} statistic ({origin}: no KL)" if metric.startswith("kl_") else words, unit)
        for metric, words, unit in LOGP_ROWS
    )


def logp_measures(pair: Summary, frames: Frames, origin: str = "") -> list[Measured]:
    """Every row of the mismatch table; ``origin`` as :func:`text_origin` gives it."""
    return [logp_measure(metric, words, unit, pair, frames) for metric, words, unit in logp_rows(origin)]


def routing_measures(pair: Summary, frames: Frames) -> list[Measured]:
    """Flip rate and any-layer share; none for a dense run."""
    routing = pair.get("routing")
    if not routing:
        return []
    layers, flips = frames.get("agreement_by_layer"), frames.get("flips_per_token")
    choices = count(
        int(layers["n_tokens"].sum()) if layers is not None and len(layers) else None, "(token, layer) pair"
    )
    tokens = count(int(flips["n_tokens"].sum()) if flips is not None and len(flips) else None, "token")
    names = (
        ("flip_rate", "flip rate: expert set differs", choices),
        ("any_layer_share", "tokens with a flip in any layer", tokens),
    )
    measures = []
    for key, words, n in names:
        low, high = routing.get(f"{key}_ci") or (None, None)
        measures.append(Measured(words, routing.get(key), low, high, n, "share"))
    independent = routing.get("independent_any_layer_share")
    if is_number(independent):
        name = "the same, were layers to flip independently"
        measures.append(
            Measured(name, independent, None, None, tokens, "share", "for comparison", "computed, not measured")
        )
    return measures


def headline(pair: Summary, frames: Frames, origin: str = "") -> list[Measured]:
    """The five numbers of the first screen; ``origin`` as :func:`text_origin` gives it."""
    by_metric = {row[0]: row for row in logp_rows(origin)}
    routing = routing_measures(pair, frames)
    chosen = ["abs_logp_diff.mean", "abs_logp_diff.p99", "kl_infer_train_k3"]
    chosen += [] if routing else ["extreme_share_2", "mean_ratio"]
    return [logp_measure(*by_metric[metric], pair, frames) for metric in chosen] + routing[:2]


def verdict(pair: Summary, frames: Frames, origin: str = "") -> Markdown:
    """What was seen, in words: the mismatch, the routing, and whether the semantics look sound.

    Only tokens honestly sampled from infer (``origin`` empty) make a mean ratio of 1 a thing to ask for.
    """
    sentences = [_mismatch_words(pair, frames), _routing_words(pair, frames), _ratio_words(pair, frames, origin)]
    return Markdown(" ".join(filter(None, sentences)))


def _mismatch_words(pair: Summary, frames: Frames) -> str:
    mean, p99, share = (
        logp_measure(metric, "", "nat", pair, frames).value
        for metric in ("abs_logp_diff.mean", "abs_logp_diff.p99", "extreme_share_2")
    )
    base = f"{count(pair.get('n_tokens'), 'response token')} of {count(pair.get('n_prompts'), 'prompt')}"
    if not is_number(mean):
        return f"**No token was scored by both arms** ({base}): there is nothing to compare."
    if mean == 0:
        return f"**Bit-exact: over {base} the two arms give the same log-probabilities.**"
    tail = f", 1 token in 100 by more than {sig(p99)} nat" if is_number(p99) else ""
    far = f", {'none' if share == 0 else percent(share)} by more than a factor of 2 in probability"
    far = far if is_number(share) else ""
    return f"**Over {base}, train and infer differ by {sig(mean)} nat on average{tail}{far}.**"


def _routing_words(pair: Summary, frames: Frames) -> str:
    measures = routing_measures(pair, frames)
    if not measures:
        return "The model is dense (no expert routing was captured), so routing plays no part in the mismatch."
    flip, anywhere = (measure.value for measure in measures[:2])
    if not is_number(flip):
        return "No (token, layer) was routed in both arms, so nothing can be said about routing."
    if flip == 0:
        return "No expert set differs in any layer."
    words = f"The expert set differs in {percent(flip)} of (token, layer) pairs"
    words += f"; {percent(anywhere)} of tokens have at least one flip" if is_number(anywhere) else ""
    return f"{words}.{_depth_words(frames.get('agreement_by_layer'))}"


def _depth_words(layers: pd.DataFrame | None) -> str:
    if layers is None or len(layers) < 2:
        return ""
    first, last = layers.iloc[0], layers.iloc[-1]
    return (
        f" By depth, sets agree for {percent(first['same_set_rate'])} of tokens in MoE layer {first['layer']:.0f} and "
        f"{percent(last['same_set_rate'])} in layer {last['layer']:.0f}."
    )


def slope_words(pair: Summary) -> str:
    """Slope of abs(logp_diff) along the response with its interval; empty when the summary has none."""
    position = pair.get("position") or {}
    slope = position.get("slope_per_1k_tokens")
    if not is_number(slope):
        return ""
    low, high = position.get("slope_per_1k_tokens_ci") or (None, None)
    where = interval(low, high)
    known = f"95 %: {where}" if where != NONE else "no interval could be given"
    n = f"{count(position.get('n_tokens'), 'token')} of {count(position.get('n_sequences'), 'sequence')}"
    return f"Slope of abs(logp_diff): {sig(slope)} nat per 1,000 tokens ({known}; {n})."


def margin_words(frames: Frames) -> str:
    """Median margins of flipped and of kept choices as a sentence; empty without routing."""
    frame = frames.get("margin_quantiles")
    if frame is None or frame.empty:
        return ""
    rows = frame[frame["space"] == "choice"].set_index("group")
    whose = f"Margins are the {next(iter(rows['side']), 'infer')} arm's. "
    medians = {group: float(rows["p50"].get(group, float("nan"))) for group in ("flipped", "kept")}
    if not is_number(medians["flipped"]):
        return f"{whose}No choice flipped."
    return (
        f"{whose}The median margin of flipped choices is {sig(medians['flipped'])}, "
        f"of kept ones {sig(medians['kept'])} ({times(medians['kept'], medians['flipped'])})."
    )


def sampling_words(summary: Summary) -> str:
    """A caution when tokens were not drawn from the distribution the log-probs are of; else empty."""
    origin = text_origin(summary)
    if not origin:
        return ""
    if origin == FORCED:
        how = "The completions were given, not sampled by infer"
    else:
        how = f"Sampled with {', '.join(_bent(summary.get('sampling') or {}))}"
    return f"{how}: k1 and k3 are not unbiased here (no KL, only statistics), and the mean ratio need not be 1."


def _ratio_words(pair: Summary, frames: Frames, origin: str) -> str:
    ratio = logp_measure("mean_ratio", "", "1", pair, frames)
    bit_exact = logp_measure("abs_logp_diff.mean", "", "nat", pair, frames).value == 0
    if not is_number(ratio.value) or bit_exact:
        return ""
    value, where = sig(ratio.value, 5), interval(ratio.low, ratio.high, "1")
    if origin:
        bounds = "no interval could be given" if where == NONE else where
        return f"The mean ratio is {value} ({bounds}); it need not be 1 here ({origin})."
    if not (is_number(ratio.low) and is_number(ratio.high)):
        return f"The mean ratio is {value} (1 is expected under honest sampling; no interval could be given)."
    if ratio.low <= 1 <= ratio.high:
        return f"The mean ratio is {value} ({where}), which contains 1, as honest sampling asks."
    return (
        f"**The mean ratio is {value} ({where}), which does not hold 1: check the semantics first** (temperature, "
        "top-p/top-k, raw or processed log-probs, tokens and positions) before reading any other number."
    )
