"""Router families in both engines: what is measured of each, and what must hold of it.

``python benchmarks/router_families.py`` measures and checks every family in both dtypes and writes the tables of
reports/families.md; test_engines_families.py does the same for one family per kind of router.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import ENGINE_OPTIONS, FAMILIES, make_checkpoint
from probes import TESTS, engines_under, run_probe
from rule_agreement import rule_agreement_by_layer

from moediag.analysis.flips.explained import predict_flips
from moediag.analysis.vocabulary import exact_divergences
from moediag.engines.arms import ROUTER_RULES, ArmRequest, arm_request
from moediag.engines.assemble import FULL
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.batching import alone
from moediag.engines.hf.engine import Replay, TrainEngine, load_model
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.routers import ModelRouting
from moediag.errors import MoediagError
from moediag.hygiene import check_run
from moediag.notation import POOLED
from moediag.run.capture import Capture, TokenRows
from moediag.run.files import read_sealed, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

RING = Path(__file__).parent / "fixtures" / "ring-tiny"
NAMES = (*FAMILIES, "bailing_moe")
N_PROMPTS, MAX_TOKENS = 8, 24


@dataclass(frozen=True)
class FamilyMeasures:
    """What one family showed; rates are shares of (token, layer) rows or the lowest rate of any layer."""

    family: str
    dtype: str
    rule: str
    n_tokens: int
    is_complete: bool
    is_bit_equal_under_observation: bool
    same_set_rate: float
    n_exact_ties: int
    train_rule_rate: float
    spec_rule_rate: float
    plain_topk_rate: float
    is_self_replay_bit_identical: bool
    is_replayed: bool
    mean_abs_logp_diff: float
    mean_abs_logp_diff_replayed: float
    mean_abs_logp_diff_replayed_with_weights: float
    findings: tuple[str, ...]
    gate_weights: dict[str, Any]
    gate_weight_sums: dict[str, float]
    disagreements: tuple[str, ...]
    biases: dict[str, list[list[float]] | None]
    explained: dict[str, float]
    explained_without_bias: dict[str, float]
    kl_exact: float


Measures = dict[torch.dtype, dict[str, FamilyMeasures]]


def measure(wanted: dict[torch.dtype, tuple[str, ...]], folder: Path) -> Measures:
    """Make the checkpoints, capture all in one vLLM process, then score, replay and compare in transformers."""
    prompts = folder / "prompts.txt"
    text = "The quick brown fox jumps over the lazy dog and the cat"
    prompts.write_text("\n".join(text[: 1 + 6 * i] for i in range(N_PROMPTS)))
    asked = [(dtype, name) for dtype, names in wanted.items() for name in names]
    runs = {(dtype, name): _make_run(name, dtype, prompts, folder / str(dtype)) for dtype, name in asked}
    told = _capture_in_vllm(runs)
    return {
        dtype: {name: _measure(*runs[dtype, name], told[dtype, name]) for name in wanted[dtype]} for dtype in wanted
    }


def _make_run(name: str, dtype: torch.dtype, prompts: Path, folder: Path) -> tuple[Run, Path]:
    checkpoint = RING if name == "bailing_moe" else make_checkpoint(name, folder / name, dtype)
    if name == "bailing_moe" and dtype != torch.float32:
        checkpoint = _converted(RING, folder / name, dtype)
    sampling = SamplingOptions(max_tokens=MAX_TOKENS, ignore_eos=True)
    plan = make_plan(open_checkpoint(str(checkpoint)), prompts, sampling, router_logits="full", full_vocab=None)
    return plan.create(folder / f"run-{name}", force=False), checkpoint


def _converted(source: Path, target: Path, dtype: torch.dtype) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moediag.engines.hf import bailing

    bailing.register()
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def _capture_in_vllm(runs: dict[Any, tuple[Run, Path]]) -> dict[Any, dict[str, Any]]:
    told, failed = {}, {}
    with engines_under(TESTS) as engines:
        for key, (run, checkpoint) in runs.items():
            options = ENGINE_OPTIONS.get(checkpoint.name, {})
            engine = {"dtype": open_checkpoint(str(checkpoint)).stored_dtype, "max_model_len": 256, **options}
            output = run.path.with_suffix(".json")
            try:
                accept = ROUTER_RULES if checkpoint.name == ONE_SIDED else ""
                request = ArmRequest("infer", "infer", engine, accept=accept)
                run_probe(engines, "probe_family", run, checkpoint, request, output)
            except MoediagError as error:  # the next family is to be tried all the same
                failed[key] = error
            else:
                told[key] = json.loads(output.read_text())
    assert not failed, failed
    return told


def _measure(run: Run, checkpoint: Path, told: dict[str, Any]) -> FamilyMeasures:
    run = open_run(run.path)
    opened, writer = open_checkpoint(str(checkpoint)), RunWriter(run)
    request = arm_request("train", {"dtype": opened.stored_dtype}, given=False)
    routing = opened.routing.record() if opened.routing else None
    engine = TrainEngine(writer, load_model(str(checkpoint), request.options), request, routing)
    assert engine.spec is not None
    shard = run.shards[0]
    tokens, infer = run.tokens(shard), run.capture("infer", shard)
    train, again, replayed, weighted = _score_four_ways(engine, tokens, infer)
    rules = rule_agreement_by_layer(run, engine.model)
    writer.begin_arm(engine.arm_record(opened.record.digest, {}), engine.correction_bias())
    engine.capture_shard(shard, lambda n_done: None)
    exact = exact_divergences(run)
    assert exact is not None
    routed_T = infer.expert_ids_TLK[:, 0, 0] >= 0  # type: ignore[index]
    logp = {name: torch.cat([part["logp_T"] for part in parts]).numpy() for name, parts in
            (("train", train), ("replayed", replayed), ("weighted", weighted))}  # fmt: skip
    findings = check_run(run)

    def mean_abs_diff(name: str) -> float:
        difference = logp[name].astype(np.float64) - infer.logp_T
        return float(np.abs(difference[tokens.is_response_T]).mean())

    return FamilyMeasures(
        family=str(opened.described()["model_type"]),
        dtype=opened.stored_dtype,
        rule=_rule(engine.spec),
        n_tokens=int(tokens.is_response_T.sum()),
        is_complete=not any(finding.level == "error" for finding in findings)
        and len(tokens.sequence_bounds()) == N_PROMPTS,
        is_bit_equal_under_observation=told["ids_equal"]
        and told["logps_equal"]
        and _hooks_change_nothing(engine, tokens),
        same_set_rate=_same_sets(train, infer, routed_T),
        n_exact_ties=sum(rule.n_exact_ties for rule in rules),
        train_rule_rate=min(rule.train_rule_rate for rule in rules),
        spec_rule_rate=min(rule.spec_rule_rate for rule in rules),
        plain_topk_rate=min(rule.plain_topk_rate for rule in rules),
        is_self_replay_bit_identical=_is_identical(train, again),
        is_replayed=_same_sets(replayed, infer, routed_T) == 1.0,
        mean_abs_logp_diff=mean_abs_diff("train"),
        mean_abs_logp_diff_replayed=mean_abs_diff("replayed"),
        mean_abs_logp_diff_replayed_with_weights=mean_abs_diff("weighted"),
        findings=tuple(finding.rule for finding in findings if finding.level != "note"),
        gate_weights={arm: run.arm(arm).gate_weights for arm in ("infer", "train")},
        gate_weight_sums={arm: _gate_weight_sum(run.capture(arm, shard), routed_T) for arm in ("infer", "train")},
        disagreements=run.arm("infer").disagreements,
        biases={arm: _listed(run.correction_bias(arm)) for arm in ("infer", "train")},
        explained=_explained(run),
        explained_without_bias=_explained(_forgetting_bias(run)),
        kl_exact=float(exact.measures["value"].iloc[0]),
    )


def _gate_weight_sum(capture: Capture, routed_T: np.ndarray) -> float:
    """Mean over (token, layer) of what a token's gate weights add up to."""
    assert capture.gate_weights_TLK is not None
    return float(capture.gate_weights_TLK[routed_T].sum(axis=2, dtype=np.float64).mean())


def _listed(bias_LE: np.ndarray | None) -> list[list[float]] | None:
    return None if bias_LE is None else bias_LE.tolist()


def _explained(run: Run) -> dict[str, float]:
    """Explained flip rate of all layers, by method."""
    frame = predict_flips(run)["explained_flips"]
    return dict(frame[frame["layer"] == POOLED].set_index("method")["explained"])


def _forgetting_bias(run: Run) -> Run:
    """The run as one from before biases were kept."""
    old = Path(f"{run.path}-old")
    shutil.copytree(run.path, old)
    for arm in ("infer", "train"):
        record = read_sealed(old / "arms" / arm / "arm.json")
        record["correction_bias_sha256"] = None
        write_sealed(old / "arms" / arm / "arm.json", record)
    return open_run(old)


def _hooks_change_nothing(engine: TrainEngine, tokens: TokenRows) -> bool:
    """Logits of transformers before, with and after the hooks, bit for bit."""
    assert engine.spec is not None
    start, end = tokens.sequence_bounds()[-1]
    ids = torch.from_numpy(tokens.token_id_T[start:end].copy())[None]
    with torch.inference_mode():
        plain = engine.model(input_ids=ids, use_cache=False).logits
        with RoutingTaps(engine.model, engine.spec, FULL):
            hooked = engine.model(input_ids=ids, use_cache=False).logits
        after = engine.model(input_ids=ids, use_cache=False).logits
    return torch.equal(plain, hooked) and torch.equal(plain, after)


Parts = list[dict[str, torch.Tensor]]


def _score_four_ways(engine: TrainEngine, tokens: TokenRows, infer: Capture) -> tuple[Parts, Parts, Parts, Parts]:
    """Plainly; with the model's own routes forced on it; with vLLM's sets; with vLLM's sets and gate weights."""
    assert engine.spec is not None
    train, again, replayed, weighted = [], [], [], []
    for start, end in tokens.sequence_bounds():
        plain = engine.score(tokens, alone(start, end))
        own = ForcedRoutes(plain["expert_ids_TLK"].long(), None, range(engine.spec.n_layers))
        train.append(plain)
        again.append(engine.score(tokens, alone(start, end), own))
        for parts, with_weights in ((replayed, False), (weighted, True)):
            forced = Replay("infer", weights=with_weights).routes(infer, start, end)
            parts.append(engine.score(tokens, alone(start, end), forced))
    return train, again, replayed, weighted


def _is_identical(one: Parts, other: Parts) -> bool:
    return all(
        torch.equal(torch.nan_to_num(a[name].float()), torch.nan_to_num(b[name].float()))
        for a, b in zip(one, other, strict=True)
        for name in ("logp_T", "entropy_T", "expert_ids_TLK", "gate_weights_TLK")
    )


def _same_sets(parts: Parts, infer: Capture, routed_T: np.ndarray) -> float:
    ids_TLK = torch.cat([part["expert_ids_TLK"] for part in parts]).numpy()[routed_T]
    return float((np.sort(ids_TLK, 2) == np.sort(infer.expert_ids_TLK[routed_T], 2)).all(2).mean())  # type: ignore[index]


def _rule(routing: ModelRouting) -> str:
    words = [routing.score_function]
    words += ["bias"] if routing.has_correction_bias else []
    words += [f"{routing.topk_group} of {routing.n_group} groups"] if routing.n_group > 1 else []
    return f"top-{routing.top_k} of {routing.n_experts}, " + " + ".join(words)


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _rates(by_method: dict[str, float]) -> str:
    return ", ".join(f"{method} {rate:.2g}" for method, rate in by_method.items()) or "-"


Column = Callable[[FamilyMeasures], object]
AGREEMENT: dict[str, Column] = {
    "rule": lambda m: m.rule,
    "n": lambda m: m.n_tokens,
    "complete": lambda m: _yes(m.is_complete),
    "ids, logits bit-equal with and without taps": lambda m: _yes(m.is_bit_equal_under_observation),
    "same sets": lambda m: f"{m.same_set_rate:.3f}",
    "HF's rule on vLLM's logits": lambda m: f"{m.train_rule_rate:.3f}",
    "moediag's rule": lambda m: f"{m.spec_rule_rate:.3f}",
    "plain TopK": lambda m: f"{m.plain_topk_rate:.3f}",
    "exact ties": lambda m: m.n_exact_ties,
    "self-replay bit-identical": lambda m: _yes(m.is_self_replay_bit_identical),
    "mean abs logp diff [nat]": lambda m: f"{m.mean_abs_logp_diff:.2g}",
    "with replay": lambda m: f"{m.mean_abs_logp_diff_replayed:.2g}",
    "with replay of gate weights too": lambda m: f"{m.mean_abs_logp_diff_replayed_with_weights:.2g}",
    "warnings": lambda m: ", ".join(sorted(set(m.findings))) or "none",
}
KEPT: dict[str, Column] = {
    "gate weights": lambda m: " / ".join(dict.fromkeys(map(str, m.gate_weights.values()))),
    "their sum in infer": lambda m: f"{m.gate_weight_sums['infer']:.5f}",
    "in train": lambda m: f"{m.gate_weight_sums['train']:.5f}",
    "one bias in both": lambda m: "-" if m.biases["infer"] is None else _yes(m.biases["infer"] == m.biases["train"]),
    "explained flips": lambda m: _rates(m.explained),
    "without the bias": lambda m: _rates(m.explained_without_bias),
    "exact KL [nat]": lambda m: f"{m.kl_exact:.2g}",
}
"""The tables of reports/families.md: column to cell."""

# A rule that looks at a bias or at groups: TopK of the raw logits must miss it. All of them, as made here, scale
# renormalised gate weights by routed_scaling_factor = 2.5.
BIASED = ("glm4_moe", "deepseek_v3", "moonlight", "dots1", "bailing_moe")
ONE_SIDED = "olmoe_renormalized"  # vLLM 0.32's OLMoE ignores norm_topk_prob: the engines differ, and not by rounding


def broken_claims(name: str, found: FamilyMeasures) -> list[str]:
    """What does not hold of a family and must, in words; bounds of rounding depend on the dtype."""
    exact, biased, agrees = found.dtype == "float32", name in BIASED, name != ONE_SIDED
    sums = found.gate_weight_sums
    words = "effective, on the expert's input" if name == "llama4" else "effective"
    by_logits = [rate for method, rate in found.explained.items() if method != "margin_change"]
    bias = found.biases["infer"]
    claims = {
        "every position, layer and request has a row": found.is_complete,
        "taps change nothing": found.is_bit_equal_under_observation,
        "a model's own routes forced on it change nothing": found.is_self_replay_bit_identical,
        "forced sets are vLLM's": found.is_replayed,
        "transformers' rule on vLLM's logits gives vLLM's sets": found.train_rule_rate == 1.0,
        "moediag's rule gives vLLM's sets": found.spec_rule_rate == 1.0,
        "TopK of the raw logits misses a rule with bias or groups, and no other": (found.plain_topk_rate < 0.9)
        == biased,
        "gate weights are coefficients in both arms": found.gate_weights == {"infer": words, "train": words},
        "both engines have the same bias": bias == found.biases["train"],
        "a bias is kept where the rule has one, and it is no buffer of zeros": (
            np.unique(bias).size > 1 if biased else bias is None
        ),
        "flips are predicted from logits": bool({"all_pairs", "simulated"} & found.explained.keys()),
        "what logits predict is a rate, and small": all(0 <= rate < 0.2 for rate in by_logits),
        "without its bias a rule that has one is not predicted from logits": (
            found.explained_without_bias.keys() <= {"margin_change"}
            if biased
            else found.explained_without_bias.keys() == found.explained.keys()
        ),
    }
    if agrees:
        claims |= {
            "both engines follow the same rule": not found.disagreements,
            "validate finds nothing": not found.findings,
            "gate weights of a token add up to the same in both engines": np.isclose(*sums.values(), rtol=1e-5)
            or not exact,
            "scaled gate weights add up to the factor": not (exact and biased)
            or np.isclose(sums["infer"], 2.5, rtol=1e-5),
            "expert sets are the same but for rounding": found.same_set_rate > (0.9999 if exact else 0.9),
            "logps are the same but for rounding": found.mean_abs_logp_diff < (2e-6 if exact else 0.05),
            "with vLLM's gate weights too": found.mean_abs_logp_diff_replayed_with_weights < (2e-6 if exact else 0.05),
            "replay brings logps no farther apart": exact
            or max(found.mean_abs_logp_diff_replayed, found.mean_abs_logp_diff_replayed_with_weights)
            <= found.mean_abs_logp_diff,
            "the exact KL is that of rounding": abs(found.kl_exact) < 1e-6 if exact else 0 < found.kl_exact < 0.05,
        }
    else:
        claims |= {
            "the rule that one engine does not follow is named": len(found.disagreements) == 1
            and found.disagreements[0].startswith("the engines give the same experts other gate weights")
            and found.disagreements[0].endswith("gate weights: their scores"),
            "validate warns of the gate weights": set(found.findings) == {"D14-gate-factor"},
            "logps differ by more than rounding": found.mean_abs_logp_diff > 0.03,
            "with vLLM's gate weights they differ by rounding": found.mean_abs_logp_diff_replayed_with_weights
            < (2e-6 if exact else 0.05),
            "the exact KL is not that of rounding": 0 < found.kl_exact < 0.05,
        }
    return [f"{name} in {found.dtype}: not so: {claim}; {found}" for claim, holds in claims.items() if not holds]
