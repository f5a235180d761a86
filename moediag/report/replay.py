"""Routing replay: what is left of the mismatch when infer's experts are forced on train (rule R9).

Invariant: the share removed is named for what it is, an upper bound of routing's part. Forcing also removes
what the flips set off later, so it is never said that routing *is* that much of the mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moediag.figures.numbers import count, is_number, percent
from moediag.notation import TRAIN_REPLAY
from moediag.report.blocks import Block, interval, table
from moediag.report.measures import Measured, Summary, logp_measure, logp_rows, routing_measures
from moediag.report.pairs import MAIN_PAIR, REPLAY_PAIR
from moediag.report.text import Markdown, plain

_METRICS: Final = (
    "abs_logp_diff.mean", "abs_logp_diff.p99", "abs_logp_diff.max", "kl_infer_train_k3", "extreme_share_2"
)  # fmt: skip

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
    if MAIN_PAIR not in pairs or REPLAY_PAIR not in pairs:
        return []
    columns = [_measures(pairs[name], origin) for name in (MAIN_PAIR, REPLAY_PAIR)]
    rows: list[list[object]] = []
    for without, replayed in zip(*columns, strict=True):
        unit, n = without.cells()[5:7]
        rows.append([without.name, unit, *without.cells()[1:3], *replayed.cells()[1:3], n])
    header = ["number", "unit", MAIN_PAIR, "95 %", REPLAY_PAIR, "95 %", "n"]
    words = " ".join(filter(None, [_forced_words(summary), _share_words(summary.get("routing_replay") or {})]))
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
    """What was forced; replay of some layers bounds the part of those layers only."""
    replay: Mapping[str, Any] = ((summary.get("arms") or {}).get(TRAIN_REPLAY) or {}).get("replay") or {}
    if not replay:
        return "The arm's record does not say which layers were forced."
    ends = [replay.get(key) for key in ("first_layer", "last_layer")]
    layers = "all MoE layers"
    if any(end is not None for end in ends):
        first, last = ("the first" if ends[0] is None else ends[0]), ("the last" if ends[1] is None else ends[1])
        layers = f"MoE layers {first} to {last} only"
    what = "experts and gate weights" if replay.get("weights") else "experts"
    return f"Infer's {plain(what)} were forced on train in {plain(layers)}."


def _share_words(replay: Summary) -> str:
    share = replay.get("removed_share")
    if not is_number(share):
        return "There is no mismatch whose part could be named."
    low, high = replay.get("removed_share_ci") or (None, None)
    known = f"95 %: {interval(low, high, 'share', str(replay.get('note') or ''))}"
    n = f"{count(replay.get('n_tokens'), 'token')} of {count(replay.get('n_prompts'), 'prompt')}"
    words = (
        f"**At most this much of the mismatch is routing (R9): {percent(share)}** of the mean abs logp diff "
        f"({known}; {n}), that is 1 − mean with replay / mean without, over the same tokens."
    )
    return words + (" It is negative: with infer's experts the arms differ more." if share < 0 else "")
