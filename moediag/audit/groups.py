"""Gradients of routers, experts and attention by autograd: one backward per direction and sequence.

Parameters are taken in pieces that fit the memory given; every piece costs one pass over the sequences (a forward,
and a backward per direction of :class:`~moediag.audit.batch.SequenceBasis`), nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from moediag.audit.batch import SequenceBasis
from moediag.engines.hf.taps import find_blocks

Float64 = NDArray[np.float64]
LogpOf = Callable[[int], torch.Tensor]

ROUTERS, EXPERTS, ATTENTION = "routers", "experts", "attention"
AUTOGRAD_GROUPS: Final = (ROUTERS, ATTENTION, EXPERTS)
"""In the order of their sizes."""

_ATTENTION_NAMES: Final = ("self_attn", "attention", "attn")


def parameters_of(model: Any, group: str) -> list[torch.nn.Parameter]:
    """The parameters of a group; none where the model has no such part.

    Routers are the gates' matrices, experts the routed ones (a shared expert is none of them), attention the
    projections and norms inside attention modules.
    """
    if group == ATTENTION:
        modules = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in _ATTENTION_NAMES]
    else:
        modules = [block.gate if group == ROUTERS else block.experts for block in find_blocks(model)]
    found = {id(p): p for module in modules for p in module.parameters() if p.is_floating_point()}
    return list(found.values())


def pieces(
    parameters: dict[str, list[torch.nn.Parameter]], n_vectors: int, max_bytes: int
) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """(group, parameter) in runs whose gradients in ``n_vectors`` directions fit into ``max_bytes``; at least one each.

    Groups share a run: what a forward and its backwards cost does not depend on how many parameters are requested.
    """
    runs: list[list[tuple[str, torch.nn.Parameter]]] = []
    room = 0
    for group, parameter in ((group, one) for group, own in parameters.items() for one in own):
        n_bytes = 4 * n_vectors * parameter.numel()
        if not runs or n_bytes > room:
            runs.append([])
            room = max_bytes
        runs[-1].append((group, parameter))
        room -= n_bytes
    return runs


def affordable(
    parameters: dict[str, list[torch.nn.Parameter]], n_vectors: int, max_bytes: int, max_passes: int
) -> tuple[dict[str, list[torch.nn.Parameter]], dict[str, str]]:
    """The groups that can be had within some passes over the sequences, and why the others cannot."""
    taken: dict[str, list[torch.nn.Parameter]] = {}
    left_out = {}
    for group, own in parameters.items():
        n_passes = len(pieces({**taken, group: own}, n_vectors, max_bytes))
        if n_passes <= max_passes:
            taken[group] = own
        else:
            left_out[group] = (
                f"would take {n_passes} passes over the sequences, {max_passes} are allowed: ask for fewer sequences "
                "(n_sequences), more memory (max_bytes) or more passes (max_passes)"
            )
    return taken, left_out


def autograd_grams(
    logp_of: LogpOf,
    bases: list[SequenceBasis],
    parameters: dict[str, list[torch.nn.Parameter]],
    max_bytes: int,
    on_done: Callable[[], None],
) -> dict[str, Float64]:
    """Inner products of the gradients with respect to each group of parameters in all directions of all sequences.

    Args:
        logp_of: gives the log-probabilities of a sequence's scored tokens, with their graph.
        bases: directions of every sequence.
        parameters: group -> what to differentiate.
        max_bytes: memory for the gradients of one piece of the parameters.
        on_done: called after every sequence of every piece.

    Returns:
        Group -> (B, B) float64; B = ranks of all sequences, one after the other.
    """
    n_vectors = sum(len(basis.basis_RT) for basis in bases)
    grams = {group: np.zeros((n_vectors, n_vectors)) for group in parameters}
    for piece in pieces(parameters, n_vectors, max_bytes):
        own = [parameter for _, parameter in piece]
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            vectors_BX = _gradients(logp_of, bases, own, on_done)
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
        first = 0
        for group, parameter in piece:
            grams[group] += _products(vectors_BX[:, first : first + parameter.numel()])
            first += parameter.numel()
    return grams


def _gradients(
    logp_of: LogpOf, bases: list[SequenceBasis], parameters: list[torch.nn.Parameter], on_done: Callable[[], None]
) -> torch.Tensor:
    """(B, X) gradients in all directions of all sequences, float32."""
    n_vectors, n_numbers = sum(len(basis.basis_RT) for basis in bases), sum(p.numel() for p in parameters)
    vectors_BX = torch.empty(n_vectors, n_numbers, device=parameters[0].device)
    row = 0
    for sequence, basis in enumerate(bases):
        logp_T = logp_of(sequence) if len(basis.basis_RT) else None
        for nth, direction_T in enumerate(basis.basis_RT):
            assert logp_T is not None
            found = torch.autograd.grad(
                logp_T,
                parameters,
                torch.from_numpy(direction_T).to(logp_T),
                retain_graph=nth + 1 < len(basis.basis_RT),
                allow_unused=True,  # an expert that no token chose may have no gradient at all
            )
            filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
            torch.cat([gradient.float().flatten().to(vectors_BX.device) for gradient in filled], out=vectors_BX[row])
            row += 1
        on_done()
    return vectors_BX


def _products(vectors_BX: torch.Tensor, step: int = 1 << 18) -> Float64:
    """Inner products in float64, a range of the columns at a time: a float64 copy of all would triple the memory."""
    n_vectors, n_columns = vectors_BX.shape
    total = torch.zeros(n_vectors, n_vectors, dtype=torch.float64, device=vectors_BX.device)
    for first in range(0, n_columns, step):
        part = vectors_BX[:, first : first + step].double()
        total += part @ part.T
    products: Float64 = total.cpu().numpy()
    return products
