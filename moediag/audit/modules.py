"""Which module is off: every module of one engine on the input that the other's really received."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from moediag.engines.launch import TRAIN_ENVIRONMENT, Job, OnEvent
from moediag.engines.vllm.options import infer_environment
from moediag.errors import EngineError
from moediag.run.capture import WHOLE
from moediag.run.files import make_folder


class DoesJobs(Protocol):
    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None: ...


LOW, FLOAT32 = "low", "float32"


def record_modules(
    engines: DoesJobs,
    run: Path,
    folder: Path,
    sequences: Sequence[tuple[list[int], list[int]]],
    train: str,
    infer: str,
    dtype: str,
    train_options: Mapping[str, Any],
    infer_options: Mapping[str, Any],
    on_event: OnEvent,
) -> None:
    make_folder(folder)
    is_exact = dtype == FLOAT32
    first = "train-float32" if is_exact else "train-low"
    passes = {
        "train": [
            {"name": first, "dtype": dtype, "given": None},
            *([] if is_exact else [{"name": "train-float32", "dtype": FLOAT32, "given": first}]),
        ],
        "infer": [
            *([] if is_exact else [{"name": "infer-low", "dtype": dtype, "given": first, "optional": False}]),
            {"name": "infer-float32", "dtype": FLOAT32, "given": first, "optional": not is_exact},
        ],
    }
    jobs = (
        ("transformers", "hf", "train", train, train_options, TRAIN_ENVIRONMENT),
        ("vLLM", "vllm", "infer", infer, infer_options, infer_environment()),
    )
    for words, room, side, checkpoint, options, environment in jobs:
        given = {
            "folder": checkpoint,
            "options": dict(options),
            "passes": passes[side],
            "sequences": [list(one) for one in sequences],
            "output": str(folder),
        }
        task, log = f"moediag.engines.{room}.modules:record_modules", run / "logs" / f"modules-{side}.log"
        engines.do(Job(words, task, str(run), asdict(WHOLE), given, str(log)), environment, on_event)
