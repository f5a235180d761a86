"""What ran differently: the facts that arm.json and run.json hold of two arms, compared one by one.

A pair of arms differs in thousands of log-probabilities for one reason: another torch, another kernel, another
thread count. This names what differed, numerics first; whether it mattered is for the floors to say.

Invariants:
    - facts that only one side holds are shown as such, never dropped, unless two engines are compared: those share
      some facts, and a fact of one alone is no difference;
    - reads records only: no engine, no arrays; a record of an older moediag has fewer facts, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moediag.notation import INFER
from moediag.run.reader import Run
from moediag.run.records import CheckpointRecord

NOT_RECORDED = "not recorded"
NOT_SET = "not set"
NOT_INSTALLED = "not installed"

SAME, DIFFERENT, UNKNOWN = "identical", "different", "not comparable"

# What changes numbers first.
SECTIONS = (
    "versions", "kernels", "dtypes", "threads", "determinism", "environment", "hardware", "engine_config",
    "sampling", "loaded", "configuration", "observation", "run", "software",
)  # fmt: skip
_OBSERVATION = ("engine", "path", "role", "gate_weights", "disagreements", "no_checkpoint")
"""Fields of an arm's record that are compared as they are."""
# Said once more, with more detail, by other sections of a full record.
_REPEATED = (
    "n_threads", "parameter_dtypes", "attention_backends", "experts_kernel", "attn_implementation",
    "experts_implementation", "tf32", "cpu_capability", "accelerator", "max_model_len",
)  # fmt: skip
Facts = dict[tuple[str, str], str]
"""(section, name): value as text."""


@dataclass(frozen=True)
class Difference:
    """One fact that is not the same on both sides."""

    section: str
    name: str
    a: str
    b: str


@dataclass(frozen=True)
class ArmComparison:
    """Two arms' facts compared.

    Args:
        arm: what was compared, e.g. ``infer`` of both runs, or ``infer against train``.
        n_facts: facts compared.
        missing_in: ``A`` or ``B`` where that run has no such arm; nothing was compared then.
        n_one_sided: facts that only one of two engines has; left out.
    """

    arm: str
    n_facts: int
    differences: tuple[Difference, ...]
    missing_in: str | None = None
    n_one_sided: int = 0


def compare_runs(run_a: Run, run_b: Run) -> list[ArmComparison]:
    """What was requested of two runs, then their arms, paired by name; infer first.

    Raises:
        CorruptRunError: a record was changed after it was written.
    """
    requested = _compare("run", _run_facts(run_a), _run_facts(run_b))
    names = {name: None for run in (run_a, run_b) for name in run.arms()}
    first = run_a.reference(INFER)
    ordered = sorted(names, key=lambda name: (name != first, name))
    return [requested, *(_compare_arm(run_a, run_b, name) for name in ordered)]


def compare_arms(run: Run, arm_a: str, arm_b: str) -> ArmComparison:
    """Two arms of one run; of two engines only the facts that both can have.

    Raises:
        IncompleteRunError: the run has no such arm.
    """
    facts_a, facts_b = arm_facts(run, arm_a), arm_facts(run, arm_b)
    label = f"{arm_a} against {arm_b}"
    if run.arm(arm_a).engine == run.arm(arm_b).engine:
        return _compare(label, facts_a, facts_b)
    left_out = {key for key in facts_a.keys() ^ facts_b.keys() if not _is_settable(key)}
    left_out |= {key for key in facts_a if key[0] == "observation"}  # what engine it is, and how that is observed
    shared_a, shared_b = ({k: v for k, v in facts.items() if k not in left_out} for facts in (facts_a, facts_b))
    return _compare(label, shared_a, shared_b, n_one_sided=len(left_out))


def compare_content(run_a: Run, run_b: Run) -> dict[str, str]:
    """Whether weights, tokenizer, config, prompts and tokens are the same: identical, different, not comparable."""
    sides = [_digests(run) for run in (run_a, run_b)]
    verdicts = {name: _verdict(sides[0][name], sides[1][name]) for name in sides[0]}
    if verdicts["weights"] == DIFFERENT and _has_full_record(run_a) != _has_full_record(run_b):
        verdicts["weights"] = UNKNOWN  # before full records the digest was one of files, which may be split otherwise
    has_all = all(run.has_tokens(shard) for run in (run_a, run_b) for shard in run.shards)
    if run_a.shards != run_b.shards or not has_all:
        return {**verdicts, "tokens": UNKNOWN}
    is_same = all(run_a.tokens_digest(shard) == run_b.tokens_digest(shard) for shard in run_a.shards)
    return {**verdicts, "tokens": SAME if is_same else DIFFERENT}


def arm_facts(run: Run, arm: str) -> Facts:
    """Every fact that the run holds of how an arm was made, flat.

    Raises:
        IncompleteRunError: the arm was never begun.
    """
    record = run.arm(arm)
    whole: dict[str, Any] = {name: getattr(record, name) for name in _OBSERVATION}
    whole |= {
        "dtype": record.dtype,
        "is_routed": record.is_routed,
        "correction_bias_sha256": record.correction_bias_sha256,
    }
    checkpoint = run.checkpoint_of(arm)
    if checkpoint is not None:
        whole["checkpoint"] = {"weights_sha256": checkpoint.weights_sha256, "config_sha256": checkpoint.config_sha256}
    if record.captured is not None:
        captured = record.captured
        whole |= {
            "configuration": captured.configuration,
            "versions": captured.versions,
            "environment": captured.environment,
        }
        whole |= {**captured.facts, "router_dtypes": run.router_dtypes(arm)}
    facts: Facts = {}
    for key, value in whole.items():
        if value is None or value == ():
            continue
        section, prefix = _place(key)
        facts |= {
            (section, name): text for name, text in _flat(prefix, list(value) if isinstance(value, tuple) else value)
        }
    # older records listed a few variables, with nothing for those that were not set
    return {key: value for key, value in facts.items() if not (key[0] == "environment" and value == "")}


def shown(value: Any) -> str:
    """A fact's value as text; what is text already stays so."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _place(key: str) -> tuple[str, str]:
    """Section and name prefix of a top-level entry of arm.json."""
    if key in SECTIONS:
        return key, ""
    places = {"router_dtypes": ("dtypes", "router"), "dtype": ("dtypes", "model")}
    return places.get(key, ("observation", key))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Names with dots and their values; lists of plain values stay one value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _flat(f"{prefix}.{i}", item)
    else:
        yield prefix, "none" if value is None else shown(value)


def _run_facts(run: Run) -> Facts:
    """What was requested: run.json without digests, which are distinguished, and without names of folders."""
    record = run.record
    configuration = {key: value for key, value in record.configuration.items() if not key.endswith("_sha256")}
    checkpoint = _checkpoint(run)
    model = checkpoint.content() if checkpoint else {}
    routers = model.pop("routers", ())
    kept = ("revision", "architecture", "model_type", "n_decoder_layers", "stored_dtype", "quantization")
    whole = {
        **configuration,
        **{f"model.{key}": model.get(key) for key in kept},
        "moediag_version": record.moediag_version,
    }
    if routers:
        whole["model.routers"] = {str(router["decoder_layer"]): router["spec"] or {} for router in routers}
        whole["model.n_experts"] = [router["n_experts"] for router in routers]
        whole["model.top_k"] = [router["top_k"] for router in routers]
    return {("run", name): text for key, value in whole.items() for name, text in _flat(key, value)}


def _checkpoint(run: Run) -> CheckpointRecord | None:
    return None if run.record.checkpoint is None else run.checkpoint(run.record.checkpoint)


def _digests(run: Run) -> dict[str, str | None]:
    """What makes two runs comparable: weights, tokenizer, config and prompts."""
    checkpoint = _checkpoint(run)
    return {
        "weights": checkpoint.weights_sha256 if checkpoint else None,
        "tokenizer": run.record.tokenizer.files_sha256 if run.record.tokenizer else None,
        "config": checkpoint.config_sha256 if checkpoint else None,
        "prompts": run.record.configuration.get("prompts_sha256"),
    }


def _compare_arm(run_a: Run, run_b: Run, arm: str) -> ArmComparison:
    for label, run in (("A", run_a), ("B", run_b)):
        if arm not in run.arms():
            return ArmComparison(arm, 0, (), missing_in=label)
    return _compare(arm, arm_facts(run_a, arm), arm_facts(run_b, arm))


def _compare(label: str, facts_a: Facts, facts_b: Facts, n_one_sided: int = 0) -> ArmComparison:
    keys = facts_a.keys() | facts_b.keys()
    if _is_full(facts_a) and _is_full(facts_b):
        keys = {key for key in keys if key[0] not in ("loaded", "observation") or key[1] not in _REPEATED}
    differences: list[Difference] = []
    for section in SECTIONS:
        names = sorted(name for place, name in keys if place == section)
        differences += _section_differences(section, names, facts_a, facts_b)
    return ArmComparison(label, len(keys), tuple(differences), n_one_sided=n_one_sided)


def _section_differences(section: str, names: list[str], facts_a: Facts, facts_b: Facts) -> list[Difference]:
    pairs = [(name, *(_value(section, name, facts) for facts in (facts_a, facts_b))) for name in names]
    found = [Difference(section, name, a, b) for name, a, b in pairs if a != b]
    for side in ("a", "b"):  # an older record lacks whole sections: said once, not fact by fact
        if len(names) > 1 and all(getattr(d, side) == NOT_RECORDED for d in found) and len(found) == len(names):
            values = {"a": "recorded", "b": "recorded", side: NOT_RECORDED}
            return [Difference(section, f"all {len(names)} facts", **values)]
    return found


def _value(section: str, name: str, facts: Facts) -> str:
    """A fact, or what it means that it is absent: a full record lists all that is set and installed."""
    found = facts.get((section, name))
    if found is not None:
        return found
    if section in ("configuration", "run") or (section == "environment" and _is_full(facts)):
        return NOT_SET  # what was requested has always been recorded whole
    return NOT_INSTALLED if section == "versions" and _is_full(facts) else NOT_RECORDED


def _is_settable(key: tuple[str, str]) -> bool:
    """Environment variables and packages: one side having it is a difference, whichever the engines."""
    return key[0] == "environment" or (key[0] == "versions" and key[1] not in ("vllm", "transformers"))


def _is_full(facts: Facts) -> bool:
    """Records hold the hardware since they are full; older ones hold a handful of facts."""
    return ("hardware", "machine") in facts


def _has_full_record(run: Run) -> bool:
    return any("hardware" in run.arm(arm).facts for arm in run.arms())


def _verdict(a: Any, b: Any) -> str:
    if a is None or b is None:
        return UNKNOWN
    return SAME if a == b else DIFFERENT
