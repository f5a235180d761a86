"""From what the taps kept to the arrays of a capture: one place for both engines.

Levels say how much is kept: ``ids`` (expert ids only), ``margins`` (ids, gate weights and both margins, the
default), ``full`` (router logits as well). Margins are computed from the unrounded logits before those are dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moediag.engines.routers import ModelRouting, margins

if TYPE_CHECKING:
    import torch

IDS, MARGINS, FULL = "ids", "margins", "full"

EFFECTIVE, EFFECTIVE_ON_INPUT = "effective", "effective, on the expert's input"
"""What arm.json says of gate weights: the coefficient with which an expert's output enters the block's output, after
normalisation and scaling, wherever the engine applies them; or the factor of its input (llama4). Arms of earlier
versions say nothing: there vLLM's lack a factor that is applied after the experts."""

_CHUNK = 1024  # rows whose margins are computed at a time: 1024 x 48 layers x 128 experts x 4 B = 25 MB per temporary


def kept_by(level: str) -> tuple[str, ...]:
    """What the taps have to copy at a level: ``ids``, ``weights``, ``logits``."""
    return ("ids",) if level == IDS else ("ids", "weights", "logits")


def gate_weights_words(level: str, on_input: bool) -> str | None:
    """What arm.json says of an arm's gate weights; None where none are kept."""
    if level == IDS:
        return None
    return EFFECTIVE_ON_INPUT if on_input else EFFECTIVE


def routing_arrays(
    kept: dict[str, torch.Tensor], spec: ModelRouting, bias_LE: torch.Tensor | None, level: str
) -> dict[str, torch.Tensor]:
    """Arrays of a capture, on the host.

    Args:
        kept: ``ids`` (L, N, K) and, above level ``ids``, ``weights`` (L, N, K) and ``logits`` (L, N, E), layers first.
        bias_LE: correction bias per MoE layer; needed where the family has one.
        level: ``ids``, ``margins`` or ``full``.

    Returns:
        Arrays by legend name, rows first.
    """
    import torch

    rows = {"expert_ids_TLK": kept["ids"].to(torch.int16)}
    if level != IDS:
        rows["gate_weights_TLK"] = kept["weights"]
        rows["margin_TL"], rows["logit_margin_TL"] = _margins(kept["logits"], kept["ids"], spec, bias_LE)
    if level == FULL:
        rows["router_logits_TLE"] = kept["logits"]
    return {name: row.transpose(0, 1).to("cpu", copy=True).contiguous() for name, row in rows.items()}


def _margins(
    logits_LNE: torch.Tensor, ids_LNK: torch.Tensor, spec: ModelRouting, bias_LE: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    bias = None if bias_LE is None else bias_LE[:, None].to(logits_LNE.device)
    chunks = [slice(first, first + _CHUNK) for first in range(0, logits_LNE.shape[1], _CHUNK)]
    parts = [margins(logits_LNE[:, chunk], ids_LNK[:, chunk], spec, bias) for chunk in chunks]
    return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)
