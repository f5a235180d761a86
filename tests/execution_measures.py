"""What each awkward way of running vLLM gives against the plain one; ``python tests/execution_measures.py CKPT``
prints the table of reports/execution.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from execution_settings import SETTINGS

from moediag.hygiene import check_run
from moediag.run.capture import Capture, TokenRows
from moediag.run.reader import Run, open_run

TEXT = "The quick brown fox jumps over the lazy dog and the cat sits on the mat while it rains and rains"
LENGTHS = (1, 1, 2, 5, 20, 40, 60, 96)
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class ExecutionMeasures:
    """One setting against its reference, over the rows whose whole prefix is the same.

    Args:
        n_errors: error-level findings of validate.
        n_rows: routed (token, layer) rows compared; 0 without a reference.
        n_flips: of these, rows whose set differs; ``max_flip_margin`` is the largest logit margin among them.
        n_recomputed: rows that vLLM computed more than once (preemption).
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


def write_prompts(folder: Path) -> None:
    records = [{"prompt": TEXT[:length]} for length in LENGTHS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(checkpoint: Path, folder: Path) -> dict[str, ExecutionMeasures]:
    """Capture under every setting and compare."""
    write_prompts(folder)
    groups = {setting.group for setting in SETTINGS.values()}
    for group in sorted(groups):
        _capture(checkpoint, folder, group, [name for name, s in SETTINGS.items() if s.group == group])
    return {name: _measure(folder, name) for name in SETTINGS}


def _capture(checkpoint: Path, folder: Path, group: str, names: list[str]) -> None:
    environment = dict(os.environ)
    if group == "v2":
        path = [str(TESTS / "triton_on_cpu"), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    if group == "mp":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    command = [sys.executable, str(TESTS / "execution_probe.py"), str(checkpoint), str(folder), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=500, start_new_session=True
    )
    told = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    failed = {record["name"]: record["error"] for record in told if "error" in record}
    assert len(told) == len(names), done.stderr[-3000:]
    assert not failed, f"{failed}\n{done.stderr[-3000:]}"


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
        sum(int(sidecar.get("n_rows_recomputed", 0)) for sidecar in sidecars),
        *compared,
    )


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


def table(measures: dict[str, ExecutionMeasures]) -> str:
    """The measures as a markdown table."""
    header = ["setting", "against", "sequences", "tokens", "rows computed again", "validate errors", "same tokens",
              "(token, layer) compared", "flips", "largest logit margin of a flip",
              "max abs logp diff [nat]"]  # fmt: skip
    rows = ["| " + " | ".join(header) + " |", "|" + ":--|" * len(header)]
    for name, m in measures.items():
        setting = SETTINGS[name]
        cells: list[object] = [setting.title, setting.reference or "-", m.n_sequences, m.n_tokens, m.n_recomputed,
                               m.n_errors]  # fmt: skip
        if setting.reference:
            cells += ["yes" if m.is_same_tokens else "no", m.n_rows, m.n_flips, f"{m.max_flip_margin:.2g}" if m.n_flips
                      else "-", f"{m.max_abs_logp_diff:.2g}"]  # fmt: skip
        else:
            cells += ["-"] * 5
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(table(measure(Path(sys.argv[1]), Path(name))))
