"""The short table that capturing and reading commands end with."""

from __future__ import annotations

from typing import Any

from moediag.cli.console import say
from moediag.notation import INFER, TRAIN, pair_name
from moediag.report.headline import text_origin

_MAIN_PAIR = pair_name(TRAIN, INFER)
_K3 = "k3 of KL(infer || train)"
_HEADLINES = (
    ("response tokens compared", "token", "n_tokens"),
    ("prompts", "prompt", "n_prompts"),
    ("mean abs logp diff", "nat", "logp.abs_logp_diff.mean"),
    ("  p99", "nat", "logp.abs_logp_diff.p99"),
    ("  max", "nat", "logp.abs_logp_diff.max"),
    (_K3, "nat", "logp.kl_infer_train_k3"),
    ("share with ratio beyond 2x", "1", "logp.extreme_share_2"),
    ("flip rate (token, layer)", "1", "routing.flip_rate"),
    ("tokens with any flip", "1", "routing.any_layer_share"),
)


def show_table(summaries: dict[str, dict[str, Any]]) -> None:
    """The headline numbers, one column per run."""
    pairs = {
        label if name == _MAIN_PAIR else f"{label} ({name})": pair
        for label, summary in summaries.items()
        for name, pair in summary["pairs"].items()
    }
    origins = sorted({text_origin(summary) for summary in summaries.values()} - {""})
    names = {_K3: f"k3 statistic ({' or '.join(origins)}: no KL)"} if origins else {}
    rows = [_row(names.get(name, name), unit, path, pairs) for name, unit, path in _HEADLINES]
    header = [_MAIN_PAIR, *pairs, "unit"]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        say(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )


def _row(name: str, unit: str, dotted: str, pairs: dict[str, Any]) -> list[str]:
    return [name, *(_cell(pair, dotted) for pair in pairs.values()), unit]


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
    return f"{value:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")
