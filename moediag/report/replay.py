"""Routing replay: what is left of the mismatch when infer's experts are forced on train.

Invariant: what forcing removes is named for what it is, and for the layers that were forced. It is neither routing's
part of the mismatch nor a bound of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moediag.analysis.floors import replay_words
from moediag.numbers import count
from moediag.report.blocks import Block, interval, table
from moediag.report.measures import FORCED, Measured, Summary, logp_measure, logp_rows, routing_measures
from moediag.report.pairs import main_pair_name, observed_pair_name, replay_pair_name
from moediag.report.text import Markdown, plain

_METRICS: Final = (
    "abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3", "extreme_share_2"
)  # fmt: skip

NO_PART_WORDS: Final = Markdown(
    "This is no bound of routing's part: forcing also removes what flips set off later, and of two independent causes "
    "of equal size the mean loses 29 % with one of them, the variance 50 %."
)

LIMIT_WORDS: Final = Markdown(
    "Forcing fixes which experts run, not how anything is computed: what is left (kernels, attention, head) is not "
    "routing. A flip rate above 0 with all layers forced would say that the replay was not obeyed."
)


def replay_blocks(summary: Summary, origin: str) -> list[Block]:
    """Table and words of the pair infer~train-replay beside infer~train; nothing without that pair.

    Args:
        origin: as :func:`moediag.report.measures.text_origin` gives it.
    """
    pairs: Mapping[str, Summary] = summary.get("pairs") or {}
    observed, replayed = observed_pair_name(summary), replay_pair_name(summary)
    if observed is None or replayed is None or not {observed, replayed} <= {*pairs}:
        return []
    if main_pair_name(summary) != observed:  # infer was given the tokens that another arm sampled
        origin = FORCED
    columns = [_measures(pairs[name], origin) for name in (observed, replayed)]
    rows: list[list[object]] = []
    for without, with_routes in zip(*columns, strict=True):
        unit, n = without.cells()[5:7]
        rows.append([without.name, unit, *without.cells()[1:3], *with_routes.cells()[1:3], n])
    header = ["number", "unit", observed, "95 %", replayed, "95 %", "n"]
    words = " ".join(filter(None, [_forced_words(summary), _removed_words(summary.get("routing_replay") or {})]))
    return [
        table(
            header, rows, range(2, 7), "The pair as it is, and with infer's experts forced on train; lower is better"
        ),
        Markdown(f"No honest interval exists for a maximum. {words}"),
        LIMIT_WORDS,
    ]


def _measures(pair: Summary, origin: str) -> list[Measured]:
    by_metric = {row[0]: row for row in logp_rows(origin)}
    return [*(logp_measure(*by_metric[metric], pair, {}) for metric in _METRICS), *routing_measures({}, pair, {})[:1]]


def _forced_words(summary: Summary) -> str:
    """What was forced."""
    arm = (replay_pair_name(summary) or "").partition("~")[2]
    replay: Mapping[str, Any] = ((summary.get("arms") or {}).get(arm) or {}).get("replay") or {}
    if not replay:
        return "The arm's record does not say which layers were forced."
    ends = (summary.get("routing_replay") or {}).get("layers")
    layers = "all MoE layers" if ends is None else f"MoE layers {ends[0]} to {ends[1]} only"
    what = "experts and gate weights" if replay.get("weights") else "experts"
    return f"Infer's {plain(what)} were forced on train in {plain(layers)}."


def _removed_words(replay: Summary) -> str:
    """What forcing removes, and what that does not say."""
    said = [f"**{plain(words[:1].upper() + words[1:])}.**" for words in replay_words(replay)]
    mean = (replay.get("removed") or {}).get("abs_logp_diff.mean") or {}
    if not said:
        return "There is no mismatch whose part could be named."
    if replay.get("is_broken"):
        return said[0]
    low, high = mean.get("share_ci") or (None, None)
    known = f"of the mean, 95 %: {interval(low, high, 'share', str(mean.get('note') or ''))}"
    n = f"{count(replay.get('n_tokens'), 'token')} of {count(replay.get('n_prompts'), 'prompt')}"
    worse = " A negative share: with infer's experts the arms differ more." if mean["share"] < 0 else ""
    return f"{said[0]} ({known}; {n}; the same tokens with and without.){worse} {NO_PART_WORDS}"
