"""Awkward ways of running vLLM against the plain one: what is measured of each, and what must hold of it.

``python benchmarks/execution.py CKPT`` measures and checks every setting and writes the table of reports/execution.md;
test_engines_execution.py does the same for one setting per kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from execution_settings import MAX_MODEL_LEN, SETTINGS, Setting
from probes import TESTS, engines_under

from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import Engines, fill_arm
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.vllm.options import infer_options
from moediag.errors import MoediagError
from moediag.hygiene import check_run
from moediag.run.capture import Capture, TokenRows
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

TEXT = "The quick brown fox jumps over the lazy dog and the cat sits on the mat while it rains and rains"
LENGTHS = (1, 1, 2, 5, 20, 40, 60, 96)


@dataclass(frozen=True)
class ExecutionMeasures:
    """One setting against its reference, over the rows whose whole prefix is the same.

    Args:
        n_errors: error-level findings of validate.
        n_rows: routed (token, layer) rows compared; 0 without a reference.
        n_flips: of these, rows whose set differs; ``max_flip_margin`` is the largest logit margin among them.
        n_recomputed: rows that vLLM computed more than once (preemption).
        is_same_capture: every array of every shard is the reference's, bit for bit.
    """

    n_sequences: int
    n_tokens: int
    n_errors: int
    n_recomputed: int
    is_same_tokens: bool
    n_rows: int
    n_flips: int
    max_flip_margin: float
    max_abs_logp_diff: float
    is_same_capture: bool


def write_prompts(folder: Path) -> None:
    records = [{"prompt": TEXT[:length]} for length in LENGTHS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(
    checkpoint: Path, folder: Path, names: Collection[str], kept: Engines | None = None
) -> dict[str, ExecutionMeasures]:
    """Capture under the settings and compare; with the kept engines where a setting needs no environment of its own."""
    write_prompts(folder)
    failed: dict[str, MoediagError] = {}
    for group in sorted({SETTINGS[name].group for name in names}):
        with nullcontext(kept) if kept and group == "v1" else _engines_of(group) as engines:
            for name in sorted((name for name in names if SETTINGS[name].group == group), key=_load):
                try:
                    _capture(engines, SETTINGS[name], open_checkpoint(str(checkpoint)), folder, folder / name)
                except MoediagError as error:  # the next setting is to be tried all the same
                    failed[name] = error
    assert not failed, failed
    return {name: _measure(folder, name) for name in names}


def _engines_of(group: str) -> AbstractContextManager[Engines]:
    """One process for the settings of a group."""
    if group == "v2":  # one environment for both observers
        v2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "TORCHDYNAMO_DISABLE": "1"}
        return engines_under(TESTS / "triton_on_cpu", **v2)
    if group == "ep":
        return engines_under(TESTS / "experts_on_cpu")
    return engines_under(**({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if group == "mp" else {}))


def _load(name: str) -> str:
    """Settings that are the same to vLLM's load come one after the other."""
    setting = SETTINGS[name]
    return str((setting.dtype, sorted(setting.vllm.items()), setting.observer))


def _capture(engines: Engines, setting: Setting, checkpoint: Checkpoint, folder: Path, path: Path) -> None:
    sampling = SamplingOptions(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **setting.sampling})
    plan = make_plan(checkpoint, folder / "prompts.jsonl", sampling, shard_size=6, ids_only=setting.ids_only)
    engine = infer_options(setting.vllm, setting.observer, dtype=setting.dtype, max_model_len=MAX_MODEL_LEN)
    request = ArmRequest("infer", "infer", engine, observer=setting.observer)
    fill_arm(engines, RunWriter(plan.create(path, force=False)), checkpoint, request, lambda event: None)


def _measure(folder: Path, name: str) -> ExecutionMeasures:
    run = open_run(folder / name)
    reference = SETTINGS[name].reference
    n_errors = sum(finding.level == "error" for finding in check_run(run))
    compared = _compare(run, open_run(folder / reference)) if reference else (False, 0, 0, float("nan"), float("nan"))
    sidecars = [run.capture_sidecar("infer", shard) for shard in run.shards]
    return ExecutionMeasures(
        len(_sequences(run)),
        sum(len(tokens) for tokens, _ in map(_shard(run), run.shards)),
        n_errors,
        sum(sidecar.n_rows_recomputed or 0 for sidecar in sidecars),
        *compared,
        bool(reference) and _arrays(run) == _arrays(open_run(folder / reference)),
    )


def _arrays(run: Run) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.arm_folder("infer").glob("*.safetensors"))]


def _shard(run: Run):
    return lambda shard: (run.tokens(shard), run.capture("infer", shard))


def _sequences(run: Run) -> dict[int, tuple[TokenRows, Capture, int, int]]:
    found = {}
    for tokens, capture in map(_shard(run), run.shards):
        for start, end in tokens.sequence_bounds():
            found[int(tokens.seq_id_T[start])] = (tokens, capture, start, end)
    return found


def _compare(run: Run, reference: Run) -> tuple[bool, int, int, float, float]:
    """Over the positions before the first token that differs: such rows saw the same prefix."""
    ours, theirs = _sequences(run), _sequences(reference)
    same, n_rows, flips, diffs = True, 0, [], [0.0]
    for seq_id, (tokens, capture, start, end) in ours.items():
        other_tokens, other, first, last = theirs[seq_id]
        n = min(end - start, last - first)
        equal = tokens.token_id_T[start : start + n] == other_tokens.token_id_T[first : first + n]
        n_same = n if equal.all() else int(np.argmin(equal))
        same &= bool(equal.all())
        assert capture.expert_ids_TLK is not None
        assert other.expert_ids_TLK is not None
        assert other.logit_margin_TL is not None
        ids, ids_there = (a.expert_ids_TLK[s : s + n_same] for a, s in ((capture, start), (other, first)))
        routed = (ids >= 0).all(axis=(1, 2)) & (ids_there >= 0).all(axis=(1, 2))
        flip = (np.sort(ids, 2) != np.sort(ids_there, 2)).any(2)[routed]
        n_rows += flip.size
        flips += other.logit_margin_TL[first : first + n_same][routed][flip].tolist()
        scored = np.isfinite(capture.logp_T[start : start + n_same]) & np.isfinite(other.logp_T[first : first + n_same])
        diff = np.abs(capture.logp_T[start : start + n_same] - other.logp_T[first : first + n_same])[scored]
        diffs += diff.tolist()
    return same, n_rows, len(flips), max(flips, default=0.0), max(diffs)


def _compared(cell: Callable[[ExecutionMeasures], object]) -> Column:
    return lambda name, m: cell(m) if SETTINGS[name].reference else "-"


Column = Callable[[str, ExecutionMeasures], object]
COLUMNS: dict[str, Column] = {
    "setting": lambda name, m: SETTINGS[name].title,
    "against": lambda name, m: SETTINGS[name].reference or "-",
    "sequences": lambda name, m: m.n_sequences,
    "tokens": lambda name, m: m.n_tokens,
    "rows computed again": lambda name, m: m.n_recomputed,
    "validate errors": lambda name, m: m.n_errors,
    "same tokens": _compared(lambda m: "yes" if m.is_same_tokens else "no"),
    "(token, layer) compared": _compared(lambda m: m.n_rows),
    "flips": _compared(lambda m: m.n_flips),
    "largest logit margin of a flip": _compared(lambda m: f"{m.max_flip_margin:.2g}" if m.n_flips else "-"),
    "max abs logp diff [nat]": _compared(lambda m: f"{m.max_abs_logp_diff:.2g}"),
}
"""The table of reports/execution.md: column to cell."""


def broken_claims(name: str, found: ExecutionMeasures, plain: ExecutionMeasures) -> list[str]:
    """What does not hold of a setting and must, in words."""
    setting = SETTINGS[name]
    claims = {
        "validate finds no error": found.n_errors == 0,
        "every sequence is there": found.n_sequences == 8 * setting.sampling.get("n", 1),
        "the requests of a small cache are preempted and computed again, and no others": (found.n_recomputed > 0)
        == (name == "preempted"),
        "stop tokens end some early": (found.n_tokens < plain.n_tokens) == (name == "stopped"),
    }
    is_in_float32 = bool(setting.reference) and {setting.dtype, SETTINGS[setting.reference].dtype} == {"float32"}
    if setting.is_same_arithmetic or is_in_float32:
        claims |= {
            "tokens are the same": found.is_same_tokens,
            "experts are the same": found.n_rows > 1000 and found.n_flips == 0,
            # the V2 runner takes its log-softmax another way, two ranks sum in another order
            "logps are the same": found.max_abs_logp_diff < (1e-6 if setting.is_same_arithmetic else 1e-5),
        }
    elif setting.reference:
        claims |= {
            "other arithmetic flips few choices": 0 < found.n_flips < 0.05 * found.n_rows,
            "and only where they were close": found.max_flip_margin < 0.2,
        }
    if "pipeline_parallel_size" in setting.vllm:
        claims["every array is the one of a single stage"] = found.is_same_capture
    return [f"{name}: not so: {claim}; {found}" for claim, holds in claims.items() if not holds]
