"""Batches of the train arm against the reference, one unpadded sequence per forward: in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moediag.engines.assemble import IDS, MARGINS
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.batching import PACKED, PADDED, Batching, refuse_leak
from moediag.engines.hf.engine import load_model, score_batch
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
from moediag.errors import EngineError
from moediag.selftest.families import make_checkpoint

pytestmark = pytest.mark.engines

LENGTHS = (5, 2, 17, 9, 30)
ENDS = torch.tensor(LENGTHS).cumsum(0).tolist()
BOUNDS = list(zip([0, *ENDS[:-1]], ENDS, strict=True))
FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "glm4_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4")
LEAKING = ("gpt_oss",)  # transformers 5.19 does not hand its positions to the mask


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    folder = tmp_path_factory.mktemp("families-float32")
    models = {}
    for name in FAMILIES:
        path: Path = make_checkpoint(name, folder / name, torch.float32)
        models[name] = load_model(str(path), {"dtype": "float32"}), open_checkpoint(str(path)).routing
    return models


def scored(model: Any, spec: Any, batching: Batching, level: str = MARGINS, routes: torch.Tensor | None = None) -> Any:
    """Arrays of five sequences, batch after batch."""
    torch.manual_seed(0)
    ids = torch.randint(0, 250, (ENDS[-1],))
    is_response = torch.cat([torch.arange(length) >= max(1, length // 3) for length in LENGTHS])
    parts: list[dict[str, torch.Tensor]] = []
    with torch.inference_mode():
        for batch in batching.split(BOUNDS):
            start, end = batch.bounds[0][0], batch.bounds[-1][1]
            forced = None
            if routes is not None:
                own = ForcedRoutes(routes[start:end], None, range(spec.n_layers))
                forced = own.spread(batch.row_of_token, batch.n_rows)
            with RoutingTaps(model, spec, level, forced) as taps:
                logp, entropy = score_batch(model, batch, ids[start:end], is_response[start:end])
                parts.append({"logp_T": logp, "entropy_T": entropy, **taps.take(batch.row_of_token)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(
    ("name", "layout"), [(n, y) for n in FAMILIES for y in (PADDED, PACKED) if y == PADDED or n not in LEAKING]
)
def test_a_batch_gives_what_each_sequence_gives_alone(loaded: Any, name: str, layout: str) -> None:
    model, spec = loaded[name]
    reference, batched = (scored(model, spec, Batching(size, layout)) for size in (1, 3))
    torch.testing.assert_close(batched["logp_T"], reference["logp_T"], atol=3e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(batched["margin_TL"], reference["margin_TL"], atol=5e-5, rtol=0)
    assert torch.equal(batched["expert_ids_TLK"].sort(-1)[0], reference["expert_ids_TLK"].sort(-1)[0])


def test_routes_are_forced_on_the_right_rows_of_a_padded_batch(loaded: Any) -> None:
    model, spec = loaded["qwen3_moe"]
    torch.manual_seed(1)
    order = torch.rand(ENDS[-1], spec.n_layers, spec.n_experts).argsort(-1)
    routes = order[..., : spec.top_k]
    for batching in (Batching(), Batching(3, PADDED), Batching(2, PACKED)):
        assert torch.equal(scored(model, spec, batching, IDS, routes)["expert_ids_TLK"].long(), routes)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_model_that_leaks_between_packed_sequences_is_refused(loaded: Any, name: str) -> None:
    """gpt_oss of transformers 5.19, packed: logps off by nats, since every sequence sees those before it."""
    model, _ = loaded[name]
    ids = torch.arange(3, 60)
    if name in LEAKING:
        with pytest.raises(EngineError, match="does not keep packed sequences apart"):
            refuse_leak(model, ids)
    else:
        refuse_leak(model, ids)
