"""The short table that capturing and reading commands end with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from moediag.cli.console import say
from moediag.figures.numbers import percent, sig
from moediag.report import main_pair_name, replay_pair_name
from moediag.report.facts import engines_compared
from moediag.report.headline import text_origin
from moediag.report.measures import carried_words, lookup

Column = Callable[[str], str]
"""A cell of the column by the metric's dotted name in the summary of a pair."""

_K3 = "k3 of KL(infer || train)"
_HEADLINES = (
    ("response tokens compared", "token", "n_tokens"),
    ("prompts", "prompt", "n_prompts"),
    ("mean abs logp diff", "nat", "logp.abs_logp_diff.mean"),
    ("  p99", "nat", "logp.abs_logp_diff.p99"),
    ("  max", "nat", "logp.abs_logp_diff.max"),
    (_K3, "nat", "logp.kl_infer_train_k3"),
    ("exact KL(infer || train)", "nat", "logp.kl_infer_train_exact"),
    ("share with ratio beyond 2x", "1", "logp.extreme_share_2"),
    ("flip rate (token, layer)", "1", "routing.flip_rate"),
    ("tokens with any flip", "1", "routing.any_layer_share"),
)


def show_table(summaries: dict[str, dict[str, Any]]) -> None:
    """The headline numbers, one column per run with its floor and its replay beside it, and the verdicts."""
    for label, summary in summaries.items():
        if weights := summary.get("weights"):
            say(f"{label}: {weights['words']}")
    columns = {title: column for label, summary in summaries.items() for title, column in _columns(label, summary)}
    origins = sorted({text_origin(summary) for summary in summaries.values()} - {""})
    names = {_K3: f"k3 statistic ({' or '.join(origins)}: no KL)"} if origins else {}
    header = [" or ".join(sorted({main_pair_name(summary) for summary in summaries.values()})), *columns, "unit"]
    rows = [
        [names.get(name, name), *cells, unit]
        for name, unit, dotted in _HEADLINES
        if set(cells := [column(dotted) for column in columns.values()]) != {"-"}
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        say(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    for label, summary in summaries.items():
        for line in _words(summary):
            say(f"{label}: {line}")


def _columns(label: str, summary: dict[str, Any]) -> Iterator[tuple[str, Column]]:
    pairs, floors = summary["pairs"], summary.get("floors")
    yield label, partial(_cell, pairs[main_pair_name(summary)])
    if floors:
        yield f"{label}: floor", partial(_floor_cell, floors["metrics"])
    if floors and floors["rounding"]:
        yield f"{label}: rounding", partial(_cell, pairs[floors["rounding"]["pair"]])
    if (replayed := replay_pair_name(summary)) is not None:
        yield f"{label}: replay", partial(_cell, pairs[replayed])


def _words(summary: dict[str, Any]) -> Iterator[str]:
    """Engines, verdict, means that hang on one prompt, and what the further A/A pairs say."""
    yield engines_compared(summary)
    verdict = summary.get("verdict")
    if verdict:
        yield f"{verdict['word']}: {verdict['reason']}"
        yield from (f"  {line}" for line in verdict["evidence"])
    for name, _, dotted in _HEADLINES:
        if words := carried_words(lookup(summary["pairs"][main_pair_name(summary)], f"{dotted}_largest_prompt_share")):
            yield f"{name.strip()}: {words} of it; other samples of such prompts may lie outside the interval"
    floors = summary.get("floors") or {}
    prefilled = floors.get("decode_vs_prefill")
    if prefilled:
        far = "bit-exact" if prefilled["is_bit_exact"] else f"mean abs logp diff {prefilled['mean']:.3g} nat"
        yield f"decode against prefill inside {prefilled['engine']}: {far} (n = {prefilled['n_tokens']:,} tokens)"
    forced = floors.get("forced_settings")
    if forced:
        far = "nothing" if forced["is_bit_exact"] else f"mean abs logp diff {forced['mean']:.3g} nat"
        what = f"what the settings that capture forces on {forced['engine']} changed"
        yield f"{what}: {far} (n = {forced['n_tokens']:,} tokens)"
    for line in floors.get("noise") or []:
        if line == floors["rounding"]:
            continue
        flips = "" if line["flip_rate"] is None else f", flip rate {line['flip_rate']:.3g}"
        yield f"noise scale, {line['what']}: mean abs logp diff {line['mean']:.3g} nat{flips}"


def _floor_cell(metrics: dict[str, Any], dotted: str) -> str:
    """Floor, and the multiple of it where there is one; half a floor says which side it lacks."""
    line = metrics.get(dotted.removeprefix("logp.").removeprefix("routing."))
    if line is None or line["floor"] is None:
        return "-"
    if line["is_bit_exact"]:
        return "bit-exact"
    ratio = "" if line["ratio"] is None else f" ({line['ratio']:.3g}x)"
    return f"{line['floor']:.3g}{ratio}" + (f" {line['note']}" if line["note"] else "")


def _cell(pair: dict[str, Any], dotted: str) -> str:
    group: Any = pair
    *parents, leaf = dotted.split(".")
    for key in parents:
        group = (group or {}).get(key)
    value = (group or {}).get(leaf)
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    interval = (group or {}).get(f"{leaf}_ci")
    words = percent if "share" in leaf or leaf.endswith("_rate") else sig
    return words(value) + (f" [{words(interval[0])}, {words(interval[1])}]" if interval else "")
