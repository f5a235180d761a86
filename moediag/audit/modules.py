"""Which module of which decoder layer is off: asks the engines, and makes a frame and sentences of what they wrote.

transformers runs chosen sequences in the arms' low precision and keeps what every module was given; then transformers
in float32, vLLM in low precision and vLLM in float32 compute each module on just that. Two engine processes, two loads
in each; see :mod:`moediag.diagnosis.modules` for how the outputs are held against each other.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from moediag.diagnosis.modules import DIAGNOSIS, ModuleChecks
from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.launch import TRAIN_ENVIRONMENT, Job, OnEvent
from moediag.engines.routers import text_config
from moediag.engines.versions import require_infer_engine, require_train_engine
from moediag.engines.vllm.options import infer_environment
from moediag.errors import EngineError
from moediag.run.capture import WHOLE
from moediag.run.files import make_folder, process_tag
from moediag.run.reader import Run
from moediag.run.records import ArmRecord

FLOAT32: Final = "float32"
MAX_ROWS: Final = 512
MAX_BYTES: Final = 8 << 30
"""Scratch on disk: of larger models fewer token rows are taken."""
N_WORST: Final = 4
_LEAST_ROWS: Final = 16
_HEAD_ELEMENTS: Final = 1 << 22
"""Logits kept per sequence: 17 MB in float32."""
_NAMES = {"half": "float16", "float": FLOAT32}  # vLLM's
_BYTES_PER_ELEMENT: Final = {True: 12 + 4 * 40, False: 28 + 2 * 44}
"""Bytes per token row, decoder layer and hidden unit, with and without passes in a lower precision: six inputs of the
first pass, and ten outputs of each in float32."""
_START_SECONDS: Final = 30
_BYTES_PER_SECOND: Final = 2e8
"""Starting an engine, and how fast weights are loaded, as in the self-test's estimate."""


class DoesJobs(Protocol):
    """What has jobs done: :class:`~moediag.engines.launch.Engines`, or what tests keep."""

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        """As :meth:`moediag.engines.launch.Engines.do`."""


@dataclass(frozen=True)
class Rows:
    """A sequence whose tokens both engines are fed.

    Args:
        seq_id: its number in the run.
        token_ids: prompt and response, from the start on.
        head_rows: rows whose logits are compared: those that score a response token.
    """

    seq_id: int
    token_ids: list[int]
    head_rows: list[int]


def check_modules(
    engines: DoesJobs,
    run: Run,
    train: Checkpoint,
    infer: Checkpoint,
    on_event: OnEvent,
    *,
    arms: tuple[str, str] | None = None,
    sequences: Iterable[int] = (),
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    dtype: str | None = None,
    train_options: Mapping[str, Any] | None = None,
    infer_options: Mapping[str, Any] | None = None,
    keep: Path | None = None,
) -> ModuleChecks:
    """Compare every module of both engines on the same inputs.

    Args:
        train, infer: what transformers and vLLM load.
        on_event: told the estimate, then the progress.
        arms: names of the train and the infer arm, for their options and the worst sequences; None = the run's main
            pair.
        sequences: seq_ids; none = the four with the largest mean abs logp diff, then the first ones.
        max_rows: token rows in all; the last sequence is cut to fit.
        max_bytes: scratch on disk.
        dtype: the low precision of both engines; None = the arms', the lower of the two.
        train_options, infer_options: over those of the arms.
        keep: folder that the tensors stay in; None = they are removed.

    Raises:
        EngineError: the infer arm is tensor-parallel; an engine failed.
        DependencyError: an engine is not installed.
    """
    require_train_engine()
    require_infer_engine()
    minuend, subtrahend = arms or run.main_arms
    plan = _Plan(
        {**_options(run.arm(minuend), train), **(train_options or {})},
        {**_options(run.arm(subtrahend), infer), **(infer_options or {})},
    )
    plan.refuse_parallel(subtrahend)
    low = dtype or plan.low_precision()
    per_row = bytes_per_row(train, low)
    max_rows = min(max_rows, max_bytes // per_row)
    if max_rows < _LEAST_ROWS:
        raise EngineError(
            f"a module check needs {_LEAST_ROWS * per_row / 1e9:.1f} GB of scratch for {_LEAST_ROWS} token rows of "
            f"{train.name}, expected at most {max_bytes / 1e9:.1f}; raise max_bytes"
        )
    chosen = choose_rows(run, (minuend, subtrahend), sequences, max_rows, train.n_vocabulary)
    on_event({"stage": estimate(train, chosen, low)})
    return compare_modules(engines, run, (train, infer), chosen, low, (plan.train, plan.infer), on_event, keep)


def compare_modules(
    engines: DoesJobs,
    run: Run,
    checkpoints: tuple[Checkpoint, Checkpoint],
    chosen: Sequence[Rows],
    low: str,
    options: tuple[Mapping[str, Any], Mapping[str, Any]],
    on_event: OnEvent,
    keep: Path | None = None,
) -> ModuleChecks:
    """Compare every module on chosen rows; arguments as :func:`check_modules` finds them, train's before infer's."""
    with _scratch(run, keep) as folder:
        _record(engines, run, folder, chosen, low, checkpoints, options, on_event)
        return ModuleChecks.of(folder)


def choose_rows(
    run: Run, arms: tuple[str, str], sequences: Iterable[int], max_rows: int, n_vocabulary: int
) -> list[Rows]:
    """The sequences to feed, cut to ``max_rows`` token rows in all; see :func:`check_modules` for which they are.

    Raises:
        IncompleteRunError: an arm is not there.
        EngineError: none of them has its token ids.
    """
    candidates = list(sequences) or _worst_first(run, arms)
    n_head = max(1, _HEAD_ELEMENTS // max(n_vocabulary, 1))
    chosen: list[Rows] = []
    shard_of = {seq_id: shard for shard in run.shards for seq_id in shard.seq_ids}
    for seq_id in candidates:
        left = max_rows - sum(len(one.token_ids) for one in chosen)
        if left < min(_LEAST_ROWS, max_rows):
            break
        if seq_id not in shard_of:
            raise EngineError(f"{run.path} has no sequence {seq_id}, its sequences are 0 to {run.n_sequences - 1}")
        tokens = run.tokens(shard_of[seq_id])
        is_own_T = tokens.seq_id_T == seq_id
        token_ids = tokens.token_id_T[is_own_T][:left]
        head = np.flatnonzero(tokens.is_response_T[is_own_T])
        head = head[(head > 0) & (head <= len(token_ids))] - 1
        if len(token_ids) and (token_ids >= 0).all():
            rows = head[:n_head] if len(head) else np.arange(len(token_ids))[-1:]
            chosen.append(Rows(seq_id, token_ids.tolist(), rows.tolist()))
    if not chosen:
        raise EngineError(
            f"{run.path}: none of the sequences {candidates[:5]} has its token ids, so no engine can be fed"
        )
    return chosen


def _worst_first(run: Run, arms: tuple[str, str]) -> list[int]:
    """The sequences with the largest mean abs logp diff, then the others in order."""
    means: dict[int, float] = {}
    for block in run.pair(*arms).read_blocks():
        difference_T = np.abs(block.logp_train_T.astype(np.float64) - block.logp_infer_T)
        for seq_id in np.unique(block.seq_id_T):
            own_T = difference_T[block.seq_id_T == seq_id]
            if np.isfinite(own_T).any():
                means[int(seq_id)] = float(own_T[np.isfinite(own_T)].mean())
    worst = sorted(means, key=lambda seq_id: -means[seq_id])[:N_WORST]
    return [*worst, *(seq_id for seq_id in range(run.n_sequences) if seq_id not in worst)]


def bytes_per_row(checkpoint: Checkpoint, low: str) -> int:
    """Scratch for one token row, logits aside."""
    config = text_config(checkpoint.config)
    width = int(config.get("hidden_size") or 0) * int(config.get("num_hidden_layers") or 0)
    return max(1, width * _BYTES_PER_ELEMENT[low != FLOAT32])


def estimate(checkpoint: Checkpoint, chosen: list[Rows], low: str) -> str:
    """What a check will take, in words."""
    n_passes = 2 if low == FLOAT32 else 4
    n_rows = sum(len(one.token_ids) for one in chosen)
    n_head = sum(len(one.head_rows) for one in chosen)
    n_bytes = n_rows * bytes_per_row(checkpoint, low) + n_head * checkpoint.n_vocabulary * 4 * n_passes
    weights = sum(file.stat().st_size for file in checkpoint.weight_files)
    seconds = 2 * _START_SECONDS + 3 * n_passes / 2 * weights / _BYTES_PER_SECOND
    return (
        f"module check: {n_rows:,} token rows of {len(chosen)} sequences, {n_passes} passes; about "
        f"{max(1, round(seconds / 60))} min and {n_bytes / 1e6:,.0f} MB of scratch; float32 needs up to "
        f"{weights * (1 if low == FLOAT32 else 2) / 1e9:,.1f} GB of memory"
    )


_SPREAD = {
    "tensor_parallel_size": "what a module makes there is a partial sum before it is reduced",
    "pipeline_parallel_size": "modules lie in several processes",
}


@dataclass(frozen=True)
class _Plan:
    """Options of both engines."""

    train: dict[str, Any]
    infer: dict[str, Any]

    def refuse_parallel(self, arm: str) -> None:
        for name, why in _SPREAD.items():
            if int(self.infer.get(name) or 1) > 1:
                raise EngineError(
                    f"arm {arm} runs with {name}={self.infer[name]}: {why}, so modules are compared on one device "
                    f"only; give {name}=1"
                )

    def low_precision(self) -> str:
        """The lower of the two precisions; vLLM's where they are equally low."""
        dtypes = [_NAMES.get(str(one["dtype"]), str(one["dtype"])) for one in (self.infer, self.train)]
        return next((dtype for dtype in dtypes if dtype != FLOAT32), FLOAT32)


def _options(arm: ArmRecord, checkpoint: Checkpoint) -> dict[str, Any]:
    """Engine options that an arm was captured with; of an imported arm the dtype of the checkpoint alone."""
    own = {f.name for f in fields(ArmRequest)}
    configuration = arm.captured.configuration if arm.captured else {}
    options = {name: value for name, value in configuration.items() if name not in own}
    if options.get("dtype") in (None, "auto"):
        options["dtype"] = checkpoint.stored_dtype
    return options


@contextlib.contextmanager
def _scratch(run: Run, keep: Path | None) -> Iterator[Path]:
    folder = keep or run.path / DIAGNOSIS / f".modules-{process_tag()}"
    make_folder(folder)
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _record(
    engines: DoesJobs,
    run: Run,
    folder: Path,
    chosen: Sequence[Rows],
    low: str,
    checkpoints: tuple[Checkpoint, Checkpoint],
    options: tuple[Mapping[str, Any], Mapping[str, Any]],
    on_event: OnEvent,
) -> None:
    """Have both engines write their passes to the folder: transformers first, its inputs are what vLLM is given."""
    is_low = low != FLOAT32
    first = "train-low" if is_low else "train-float32"
    again = [{"name": "train-float32", "dtype": FLOAT32, "given": first}] if is_low else []
    free = {"name": "infer-free", "dtype": low, "given": first, "optional": False, "is_free": True}
    lower = [{**free, "name": "infer-low", "is_free": False}] if is_low else []
    exact = {**free, "name": "infer-float32", "dtype": FLOAT32, "optional": is_low, "is_free": False}
    length = max(len(one.token_ids) for one in chosen)
    train_options, infer_options = ({name: one[name] for name in one if name != "dtype"} for one in options)
    infer_options["max_model_len"] = max(int(infer_options.get("max_model_len") or 0), length)
    jobs = (
        (
            "transformers",
            "hf",
            [{"name": first, "dtype": low, "given": None}, *again],
            train_options,
            TRAIN_ENVIRONMENT,
        ),
        (
            "vLLM",
            "vllm",
            [*lower, free, exact],
            infer_options,
            infer_environment(),
        ),
    )
    for (words, room, passes, own, environment), checkpoint in zip(jobs, checkpoints, strict=True):
        job_options = {
            "folder": str(checkpoint.path),
            "options": own,
            "passes": passes,
            "sequences": [(one.token_ids, one.head_rows) for one in chosen],
            "output": str(folder),
        }
        task, log = f"moediag.engines.{room}.modules:record_modules", run.path / "logs" / f"modules-{room}.log"
        engines.do(Job(words, task, str(run.path), asdict(WHOLE), job_options, str(log)), environment, on_event)
