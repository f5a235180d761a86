"""A whole self-test: which checkpoints, what it will take, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moediag.engines.launch import Engines, OnEvent
from moediag.engines.versions import numeric_versions
from moediag.errors import CheckpointError, RunConflictError
from moediag.run.files import make_folder, write_atomic
from moediag.run.pieces import Pool, each

if TYPE_CHECKING:
    from moediag.selftest.cells import Cell, DoesJobs, Row

DEFAULT: Final = ("qwen3_moe", "glm4_moe", "gpt_oss")
"""Tiny families, one per kind of rule: softmax, renormalised; sigmoid with bias and groups, scaled; softmax of the
chosen logits, with biases in the router's own arithmetic."""

_START_SECONDS: Final = 40
_CELL_SECONDS: Final = {True: 22, False: 10}
_BYTES_PER_SECOND: Final = 2e8


@dataclass(frozen=True)
class Request:
    """What is tested.

    Args:
        checkpoint: a folder or hub id whose config.json is taken, with fewer layers and random weights; None = tiny
            checkpoints of ``families``.
        dtype: in which both engines run; float32 agreement is measured beside it.
        tensor_parallel_size, vllm: options of vLLM.
    """

    checkpoint: str | None = None
    families: tuple[str, ...] = DEFAULT
    dtype: str = "float32"
    tensor_parallel_size: int = 1
    vllm: Mapping[str, Any] = field(default_factory=dict)


def prepare(request: Request, folder: Path) -> tuple[list[Cell], list[str]]:
    """Make the checkpoints, or find those made before.

    Returns:
        Cells, and remarks on the checkpoints.

    Raises:
        CheckpointError: no such family, or no model can be made of the checkpoint's config.json.
        RunConflictError: the folder holds another self-test, or one of other versions.
    """
    from moediag.selftest.cells import Cell
    from moediag.selftest.families import FAMILIES, cut_checkpoint, make_checkpoint

    unknown = [name for name in request.families if name not in FAMILIES]
    if unknown and request.checkpoint is None:
        raise CheckpointError(f"--family {unknown[0]}: expected one of {', '.join(FAMILIES)}")
    make_folder(folder)
    _refuse_other(folder / "selftest.json", {**asdict(request), "versions": numeric_versions()})
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # of a config that is cut down on purpose
    dtype, remarks = getattr(torch, request.dtype), []
    made: dict[str, tuple[Path, dict[str, Any]]] = {}
    if request.checkpoint is not None:
        name = Path(request.checkpoint).name
        path, words = cut_checkpoint(_config_of(request.checkpoint), folder / name / "checkpoint", dtype)
        made[name] = (path, {})
        remarks.append(f"{name}: {', '.join(words)}")
    else:
        for name in request.families:
            path = folder / name / "checkpoint"
            if not (path / "tokenizer.json").exists():  # what is written last
                make_checkpoint(name, path, dtype)
            made[name] = (path, FAMILIES[name].engine)
    parallel = {} if request.tensor_parallel_size == 1 else {"tensor_parallel_size": request.tensor_parallel_size}
    dtypes = dict.fromkeys((request.dtype, "float32"))
    return [
        Cell(name, path, folder / name / one, one, one == request.dtype, {**options, **parallel, **request.vllm})
        for name, (path, options) in made.items()
        for one in dtypes
    ], remarks


def _config_of(checkpoint: str) -> Path:
    """The folder of config.json and tokenizer; of a hub id no weights are downloaded.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
        return Path(snapshot_download(checkpoint, allow_patterns=patterns, ignore_patterns=["*.index.json"]))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean: no such checkpoint
        raise CheckpointError(f"{checkpoint} is neither a folder nor to be had from the hub: {error}") from None


def _refuse_other(path: Path, request: dict[str, Any]) -> None:
    text = json.dumps(request, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise RunConflictError(
            f"{path.parent} holds a self-test of other checkpoints, options or versions; use another -o"
        )
    write_atomic(path, text.encode())


def estimate(cells: Sequence[Cell]) -> str:
    """Time on two processor cores, and disk."""
    weights = sum(
        {cell.path: sum(f.stat().st_size for f in cell.path.glob("*.safetensors")) for cell in cells}.values()
    )
    runs = sum(cell.plan.max_bytes([cell.request(name) for name in cell.arms], cell.dtype) for cell in cells)
    seconds = 2 * _START_SECONDS + sum(_CELL_SECONDS[cell.is_whole] for cell in cells) + 4 * weights / _BYTES_PER_SECOND
    disk = f"{weights / 1e6:,.0f} MB of weights, {runs / 1e6:,.1f} MB of runs"
    return f"about {seconds / 60:.0f} minutes on two cores; {disk}"


def run_everywhere(
    cells: Sequence[Cell], pool: Pool, on_done: Callable[[int, int], None], say: Callable[[str], None]
) -> list[Row]:
    """As :func:`run_cells`, every checkpoint by a process of the pool, with engines of its own."""
    by_checkpoint: dict[str, tuple[Cell, ...]] = {}
    for cell in cells:
        # without what was read of it here
        by_checkpoint[cell.name] = (*by_checkpoint.get(cell.name, ()), replace(cell))
    rows: dict[str, list[Row]] = {}
    for some, (found, remarks) in each(by_checkpoint.values(), _run_alone, pool, on_done):
        rows[some[0].name] = found
        for remark in remarks:
            say(remark)
    return [row for name in by_checkpoint for row in rows[name]]


def _run_alone(cells: Sequence[Cell]) -> tuple[list[Row], list[str]]:
    remarks: list[str] = []
    with Engines() as engines:
        rows = run_cells(cells, engines, lambda event: None, remarks.append)
    return rows, remarks


def run_cells(cells: Sequence[Cell], engines: DoesJobs, on_event: OnEvent, say: Callable[[str], None]) -> list[Row]:
    """Capture and check; every property of every cell."""
    from moediag.selftest.cells import capture, rows_of

    capture(cells, engines, on_event, say)
    return [row for cell in cells for row in rows_of(cell)]
