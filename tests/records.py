"""Records of runs that tests make by hand, through the real writer; no checkpoint and no engine stand behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moediag.run.capture import arrays_of, split_into_shards
from moediag.run.create import create_run
from moediag.run.files import digest_of, sha256_bytes
from moediag.run.reader import Run
from moediag.run.recipes import RECIPES
from moediag.run.records import (
    ArmRecord,
    Captured,
    CheckpointRecord,
    Prompts,
    Router,
    RouterSpec,
    RunRecord,
    Sampling,
    TokensFrom,
)


def checkpoint_of(
    layers: Sequence[int] = (), n_experts: int = 8, top_k: int = 2, spec: RouterSpec | None = None, **changes: Any
) -> CheckpointRecord:
    """A checkpoint with MoE layers at the decoder layers given; dense without any."""
    record: dict[str, Any] = {
        "source": "models/tiny",
        "weights_sha256": digest_of([*layers, n_experts, top_k]),
        "config_sha256": "c",
        "routers": tuple(Router(decoder_layer=layer, n_experts=n_experts, top_k=top_k, spec=spec) for layer in layers),
    }
    return CheckpointRecord(**{**record, **changes})


def run_record(
    prompts: bytes, n_prompts: int, shard_size: int, checkpoint: CheckpointRecord, sampler: str | None = "infer",
    **changes: Any,
) -> RunRecord:  # fmt: skip
    """run.json of sampled tokens, or of given ones without a sampler."""
    record: dict[str, Any] = {
        "moediag_version": "0",
        "configuration": {},
        "checkpoint": checkpoint.digest,
        "tokens": TokensFrom(origin="sampled" if sampler else "given", arm=sampler),
        "prompts": Prompts(
            n=n_prompts, data_sha256=sha256_bytes(prompts), source="prompts.jsonl", source_sha256=f"{n_prompts} prompts"
        ),
        "sampling": Sampling(),
        "shards": tuple(split_into_shards(n_prompts, shard_size)),
    }
    return RunRecord(**{**record, **changes})


def new_run(
    path: Path, prompts: bytes, n_prompts: int, shard_size: int, checkpoint: CheckpointRecord, force: bool = False,
    **changes: Any,
) -> Run:  # fmt: skip
    """A run directory in which nothing was captured."""
    return create_run(
        path, run_record(prompts, n_prompts, shard_size, checkpoint, **changes), prompts, checkpoint, force
    )


def arm_of(run: Run, recipe: str, **changes: Any) -> ArmRecord:
    """arm.json of an arm of a recipe, of the run's checkpoint."""
    made, routers = RECIPES[recipe], run.checkpoint(str(run.record.checkpoint)).routers
    is_reference = made.change is None
    record: dict[str, Any] = {
        "name": recipe,
        "role": made.role,
        "engine": "scripted",
        "path": "teacher-forced" if made.role == "train" else "sampled",
        "variant_of": None if is_reference else made.of or made.role,
        "change": made.change,
        "checkpoint": run.record.checkpoint,
        "origin": Captured(
            recipe=recipe,
            configuration={"dtype": "bfloat16"},
            versions={"scripted": "1"},
            facts={"loaded": {"device": "none"}},
        ),
        "dtype": "bfloat16",
        "arrays": arrays_of(
            "margins",
            bool(routers) and made.is_observed,
            has_entropy=made.is_observed,
            has_distributions=bool(run.record.full_vocab) and is_reference,
        ),
        "routers": routers if made.is_observed else (),
    }
    return ArmRecord(**{**record, **changes})


def made_otherwise(record: ArmRecord, **changes: Any) -> ArmRecord:
    """The record with its configuration, versions or facts changed."""
    assert record.captured is not None
    return record.model_copy(update={"origin": record.captured.model_copy(update=changes)})
