"""The list of reports/rules.md: every rule, and what it says of a planted fault and of the same capture without it.

Usage: python tests/rule_tables.py
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from committed_tables import commit_table
from hygiene_captures import (
    FAULTS,
    Healthy,
    all_findings,
    bf16,
    make,
    plant,
    records_of,
    write_dump,
    write_run,
)
from records import made_otherwise
from test_hygiene_logged import sampled
from test_run_vocabulary import make_run as make_vocabulary_run
from test_run_vocabulary import write_shard

from moediag.hygiene import Finding, check_pair, check_run
from moediag.hygiene.foreign import check_file
from moediag.hygiene.rules import DIAGNOSIS, RULES
from moediag.results.trend import measure_trend
from moediag.run.capture import Capture, TokenRows
from moediag.run.reader import Run, open_run
from moediag.run.records import write_record
from moediag.run.writer import RunWriter

HEALTHY = Healthy(shape=(16, 4, 6), certain_share=0.05, has_logits=True)
Pair = tuple[TokenRows, Capture, Capture]
Change = Callable[[TokenRows, dict[str, np.ndarray], dict[str, np.ndarray]], None]
"""Of (tokens, train's arrays, infer's arrays), in place."""


def _changed(change: Change, h: Healthy = HEALTHY) -> Pair:
    tokens, train, infer = make(h)
    arrays = [{name: array.copy() for name, array in side.arrays().items()} for side in (train, infer)]
    change(tokens, *arrays)
    return tokens, Capture(**arrays[0]), Capture(**arrays[1])


def _ends(tokens: TokenRows) -> np.ndarray:
    return np.array([end - 1 for _, end in tokens.sequence_bounds()])


def _response(tokens: TokenRows, every: int) -> np.ndarray:
    return np.flatnonzero(tokens.is_response_T)[::every]


def _last_row(tokens: TokenRows, train: Any, infer: Any) -> None:
    for name, array in train.items():
        if array.ndim > 1:
            array[_ends(tokens)] = -1 if name == "expert_ids_TLK" else np.nan


def _in(side: int, name: str, value: Any, where: Callable[[TokenRows], Any]) -> Change:
    def change(tokens: TokenRows, *sides: dict[str, np.ndarray]) -> None:
        sides[side][name][where(tokens)] = value

    return change


def _scaled(tokens: TokenRows, train: Any, infer: Any) -> None:
    train["gate_weights_TLK"] = bf16(train["gate_weights_TLK"] * 2.5)


def _not_renormalised(tokens: TokenRows, train: Any, infer: Any) -> None:
    _, bare, _ = make(replace(HEALTHY, renormalize=False))
    train["gate_weights_TLK"] = bare.arrays()["gate_weights_TLK"].copy()


def _ties(tokens: TokenRows, train: Any, infer: Any) -> None:
    del infer["router_logits_TLE"]
    for name in ("margin_TL", "logit_margin_TL"):
        infer[name][np.random.default_rng(0).random(infer[name].shape) < 0.06] = 0


def _moved_margins(tokens: TokenRows, train: Any, infer: Any) -> None:
    infer["logit_margin_TL"] = np.roll(infer["logit_margin_TL"], 1, axis=1)


TRAIN, INFER = 0, 1
ROW = lambda tokens: (3, 2)  # noqa: E731
OF_CAPTURES: dict[str, Change] = {
    "completeness": _in(INFER, "expert_ids_TLK", -1, lambda tokens: np.s_[:, 3:]),
    "D06-last-row": _last_row,
    "D14-gate-factor": _scaled,
    "D16-exact-ties": _ties,
    "D31-rounded-logp": _in(INFER, "logp_T", 5e-5, lambda tokens: _response(tokens, 40)),
    "D31-entropy": _in(INFER, "entropy_T", np.nan, lambda tokens: _response(tokens, 40)),
    "gate-not-finite": _in(INFER, "gate_weights_TLK", np.nan, ROW),
    "gate-sum": _not_renormalised,
    "margin-not-finite": _in(INFER, "margin_TL", -1.0, ROW),
    "margin-logits": _moved_margins,
    "logits-not-finite": _in(INFER, "router_logits_TLE", np.inf, ROW),
}


def _copied(tokens: TokenRows, train: Any, infer: Any) -> None:
    train["logp_T"] = infer["logp_T"].copy()


def _offset(tokens: TokenRows, train: Any, infer: Any) -> None:
    train["logp_T"] = infer["logp_T"] - np.float32(0.1)


def _mass_lost(tokens: TokenRows, train: Any, infer: Any) -> None:
    lost_T = np.random.default_rng(0).exponential(0.1, len(tokens))
    train["logp_T"] = (infer["logp_T"] - lost_T).astype(np.float32)


OF_FOREIGN: dict[str, Change] = {
    "D09-mean-ratio": _mass_lost,
    "D28-same-bits": _copied,
    "constant-offset": _offset,
}


def _damage(run: Run) -> None:
    path = run.arm_folder("train") / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def _lose(run: Run) -> None:
    for path in run.arm_folder("train").glob("shard-00000*"):
        path.unlink()


def _lose_arms(run: Run) -> None:
    for path in sorted((run.path / "arms").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _other_tokens(run: Run) -> None:
    shard = run.shards[0]
    tokens = run.tokens(shard)
    other = replace(tokens, token_id_T=tokens.token_id_T + 1)
    RunWriter(run).write_capture("train", shard, other, run.capture("train", shard), {}, {})


def _resampled(run: Run) -> None:
    record = run.arm("infer")
    facts = {**record.facts, "sampling": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}}
    write_record(run.arm_folder("infer") / "arm.json", made_otherwise(record, facts=facts))


OF_RUNS: dict[str, Callable[[Run], None]] = {
    "D11-sampling-parameters": _resampled, "damaged": _damage, "missing-shard": _lose, "no-arm": _lose_arms,
    "token-identity": _other_tokens,
}  # fmt: skip


def _dense(record: dict[str, Any]) -> None:
    for name in ("routed_experts", "train_routed_experts"):
        ids = np.array(record[name])
        record[name] = np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1).tolist()


def _retokenised(record: dict[str, Any]) -> None:
    record["train_token_ids"] = [*record["token_ids"][:-1], record["token_ids"][-1] + 1]


OF_DUMPS: dict[str, Callable[[dict[str, Any]], None]] = {"D03-dense-slot": _dense, "D32-token-ids": _retokenised}


def rule_examples(folder: Path) -> dict[str, tuple[list[Finding], list[Finding]]]:
    """Rule -> what every rule says of a fault of its kind, and of the same capture without it.

    Args:
        folder: empty; runs and dumps are written there.
    """
    clean, found = all_findings(HEALTHY, *make(HEALTHY)), {}
    for fault in FAULTS:
        name = fault.split()[0]
        h = replace(HEALTHY, samples=2, prompt_length=40) if name == "D08-cached-prefix" else HEALTHY
        if name not in found:
            found[name] = all_findings(h, *plant(fault, h, *make(h))), all_findings(h, *make(h))
    for name, change in OF_CAPTURES.items():
        found[name] = all_findings(HEALTHY, *_changed(change)), clean
    none_certain = replace(HEALTHY, certain_share=0)
    found["D31-certain-tokens"] = clean, all_findings(none_certain, *make(none_certain))
    for name, change in OF_FOREIGN.items():
        faulty, healthy = _changed(change), make(HEALTHY)
        found[name] = (
            check_pair(*faulty, n_experts=16, is_foreign=True),
            check_pair(*healthy, n_experts=16, is_foreign=True),
        )
    for name, spoil in OF_RUNS.items():
        run = write_run(folder / name, HEALTHY, *make(HEALTHY))
        healthy_run = check_run(run)
        spoil(run)
        found[name] = check_run(open_run(run.path)), healthy_run
    records = [records_of(*make(HEALTHY)) for _ in range(1 + len(OF_DUMPS))]
    healthy_dump = check_file(write_dump(folder / "dump.jsonl", records[0]), 16).findings
    for (name, edit), some in zip(OF_DUMPS.items(), records[1:], strict=True):
        for record in some:
            edit(record)
        found[name] = check_file(write_dump(folder / f"{name}.jsonl", some), 16).findings, healthy_dump
    found["D10-sampling-temperature"] = _of_table(folder, 0.7), _of_table(folder, 1.0)
    for name, change in OF_LONG_TABLES.items():
        found[name] = _of_long_table(folder, change), _of_long_table(folder)
    for name, columns in OF_SERIES.items():
        found[name] = _of_series(folder, columns), _of_series(folder, {**columns, **HEALTHY_SERIES})
    found["D31-distribution"] = _of_distributions(folder)
    return found


def _of_table(folder: Path, temperature: float) -> list[Finding]:
    tokens, train, infer = make(HEALTHY)
    rows = np.flatnonzero(tokens.is_response_T)
    columns = {"seq_id": tokens.seq_id_T, "position": tokens.position_T, "logp_train": train.logp_T,
               "logp_infer": infer.logp_T}  # fmt: skip
    frame = pd.DataFrame({name: values[rows] for name, values in columns.items()}).assign(temperature=temperature)
    frame.to_parquet(path := folder / f"tokens-{temperature}.parquet")
    return check_file(path).findings


def _of_long_table(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame) -> list[Finding]:
    """Of 24 sequences of 320 tokens, sampled from what infer scores."""
    train, infer = sampled(0, (24, 320), 0.02)
    seq_id, position = np.indices(train.shape)
    columns = {"seq_id": seq_id, "position": position, "logp_train": train, "logp_infer": infer}
    change(pd.DataFrame({name: values.ravel() for name, values in columns.items()})).to_parquet(
        path := folder / "long.parquet"
    )
    return check_file(path).findings


def _far(frame: pd.DataFrame, is_far: Any) -> pd.DataFrame:
    """Noise of the logits eight times as large in some tokens."""
    wild, _ = sampled(0, (24, 320), 0.16)
    return frame.assign(logp_train=np.where(is_far, wild.ravel(), frame["logp_train"]))


def _versions(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(weight_version=np.where(frame["position"] < 120, "4", "5"))


def _begun_elsewhere(frame: pd.DataFrame) -> pd.DataFrame:
    """Every sequence's train column begins as many tokens early as its prompt is longer than the shortest."""
    train_SN = frame["logp_train"].to_numpy().reshape(24, 320)
    return frame.assign(logp_train=np.concatenate([np.roll(row, i % 8) for i, row in enumerate(train_SN)]))


OF_LONG_TABLES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "D01-sequence-lag": _begun_elsewhere,
    "mixed-versions": _versions,
    "stale-segments": lambda frame: _far(_versions(frame), frame["position"] < 120),
    "regime-change": lambda frame: _far(frame, frame["position"] >= 120),
    "no-sequences": lambda frame: frame[["logp_train", "logp_infer"]],
    "not-estimable": lambda frame: frame.assign(
        # a healthy run as published (verl issue 7242)
        logp_train=np.minimum(frame["logp_infer"] - 0.0045 + 0.1 * np.random.default_rng(0).normal(size=len(frame)), 0)
    ),
}


def _of_series(folder: Path, columns: dict[str, Any]) -> list[Finding]:
    pd.DataFrame(columns).to_csv(path := folder / "steps.csv", index=False)
    return list(measure_trend([path], None, None).findings)


_CACHE = np.arange(24) % 6
HEALTHY_SERIES = {"mean_abs_logp_diff": 0.016}
"""At every step."""
OF_SERIES: dict[str, dict[str, Any]] = {
    # unsharded 0.017 nat, sharded in two a collapse after two steps (MarinFold issue 236)
    "D25-first-update": {"step": range(3), "mean_abs_logp_diff": [0.0175, 0.0175, 66.5]},
    "D27-lr-zero": {"step": range(3), "mean_abs_logp_diff": [0.0175, 0.0175, 66.5], "lr": [0.0] * 3},
    "D26-grows-resets": {"step": range(24), "mean_abs_logp_diff": 0.015 * 1.05**_CACHE,
                         "restart": ((_CACHE == 0) & (np.arange(24) > 0)).astype(int)},
    # sharded in eight (the same)
    "beyond-rounding": {"step": range(2), "mean_abs_logp_diff": [1.33, 60.0]},
    "start-level": {"step": range(2), "mean_abs_logp_diff": [0.11, 0.1]},
    "infinite-metric": {"step": range(3), "mean_abs_logp_diff": [0.0175, 0.0175, math.inf]},
}  # fmt: skip
"""Series over training steps, some as reported in public."""


def _of_distributions(folder: Path) -> tuple[list[Finding], list[Finding]]:
    run = make_vocabulary_run(folder / "distributions")
    shard = run.shards[0]
    healthy, vocab = check_run(run), run.load_vocab("train", shard)
    assert vocab is not None
    write_shard(run, "train", shard, replace(vocab, logps_NV=np.roll(vocab.logps_NV, 1, axis=1)))
    return check_run(run), healthy


def rules_text(folder: Path) -> str:
    """A section per rule.

    Args:
        folder: empty; no message keeps its name.
    """
    examples = rule_examples(folder)
    sections, nameless = [], []
    for rule in RULES.values():
        lines = [
            f"### {rule.name}",
            f"{rule.symptom[0].upper()}{rule.symptom[1:]} ({rule.level}).",
            f"- measured; limit: {rule.threshold}\n- likely: {rule.cause}\n- next: {rule.next_check}",
        ]
        if rule.name in examples:
            of_fault, of_clean = (
                [one for one in findings if one.rule == rule.name] for findings in examples[rule.name]
            )
            assert of_fault, f"{rule.name} does not name its own fault"
            lines[2] += f"\n- planted: `{of_fault[0].line()}`\n- without it: {_quiet(of_clean)}"
        elif rule.needs == DIAGNOSIS:
            lines[2] += "\n- planted and without it: on engines, fault by fault, in [diagnosis.md](diagnosis.md)"
        else:
            nameless.append(rule.name)
            lines[2] += "\n- planted: no example yet"
        sections += lines
    last = f"No example yet: {', '.join(nameless) or 'none'}."
    return "\n\n".join([*sections, last]).replace(f"{folder}/", "")


def _quiet(findings: list[Finding]) -> str:
    return f"`{findings[0].line()}`" if findings else "nothing"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        commit_table("rules.md", "rules", rules_text(Path(name)))
