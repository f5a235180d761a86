"""Names of the pairs that a page speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def main_pair_name(summary: Mapping[str, Any]) -> str:
    """The pair that a run is about: train and the arm that sampled the tokens, ``infer~train`` for most runs."""
    return str(summary["main_pair"])


def observed_pair_name(summary: Mapping[str, Any]) -> str | None:
    """Both reference arms, under observation; None where one is missing."""
    name = summary.get("observed_pair")
    return None if name is None else str(name)


def replay_pair_name(summary: Mapping[str, Any]) -> str | None:
    """The same tokens with infer's experts forced on train; None without such an arm."""
    name = summary.get("replay_pair")
    return None if name is None else str(name)
