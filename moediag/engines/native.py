"""vLLM's own record of routed experts (``enable_return_routed_experts``): ids only, without hooks.

It needs vLLM's V2 model runner, hence Triton, and wants prefix caching on (each request is then told not to read the
cache, else its cached rows would be another request's). It works inside CUDA graphs, which hooks cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.errors import CaptureError, EngineError
from moediag.run.capture import TokenRows


def require_native_observer() -> None:
    """Refuse where vLLM has no V2 model runner to record the experts.

    Raises:
        EngineError: says why.
    """
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise EngineError(
            "--observer native needs vLLM's V2 model runner, which needs Triton; vLLM finds no Triton backend for this "
            "device (the CPU build ships none); use --observer hooks"
        )


def native_rows(
    routed: list[NDArray[Any] | None], tokens: list[list[int]], decoder_layers: list[int]
) -> dict[str, NDArray[Any]]:
    """The engine's rows in the form that :func:`~moediag.engines.assemble.order_rows` takes.

    Args:
        routed: what vLLM gave for each request, (rows, decoder layers, K); its dense layers hold zeros.
        tokens: token ids that each request consumed or sampled, at least as many as it has rows.
        decoder_layers: decoder layer of every MoE layer.

    Raises:
        CaptureError: a request came back without experts, or with more rows than tokens.
    """
    parts = []
    for request, (ids, consumed) in enumerate(zip(routed, tokens, strict=True)):
        if ids is None or len(ids) > len(consumed):
            found = "none" if ids is None else f"{len(ids)} rows for {len(consumed)} tokens"
            raise CaptureError(f"vLLM's routed experts of request {request}: {found}; nothing was stored")
        parts.append((np.full(len(ids), request), np.arange(len(ids)), np.array(consumed[: len(ids)]), ids))
    return {
        "request_T": np.concatenate([part[0] for part in parts]),
        "position_T": np.concatenate([part[1] for part in parts]),
        "token_id_T": np.concatenate([part[2] for part in parts]),
        "expert_ids_TLK": np.concatenate([part[3][:, decoder_layers] for part in parts]).astype(np.int16),
    }


def cross_check(tokens: TokenRows, hooked_TLK: NDArray[Any], native_TLK: NDArray[Any]) -> None:
    """Hold vLLM's own record against the hooks': the same experts in every row.

    Raises:
        CaptureError: they differ; names how often and where first.
    """
    differ_TL = (np.sort(hooked_TLK, axis=2) != np.sort(native_TLK, axis=2)).any(axis=2)
    if differ_TL.any():
        row, layer = (int(index[0]) for index in np.nonzero(differ_TL))
        raise CaptureError(
            f"vLLM's own record and the hooks differ in {int(differ_TL.sum())} of {differ_TL.size} (token, layer), "
            f"first in sequence {tokens.seq_id_T[row]} at position {tokens.position_T[row]}, MoE layer {layer}: "
            f"{native_TLK[row, layer].tolist()} against {hooked_TLK[row, layer].tolist()}; nothing was stored"
        )
