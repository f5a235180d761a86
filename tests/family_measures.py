"""Every supported family in both engines: what is measured, and the table of it (`python tests/family_measures.py`).

The table in reports/families.md is this script's output; test_engines_families.py asserts the same measures.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import ENGINE_OPTIONS, FAMILIES, make_checkpoint
from probes import TESTS, engines_under, run_probe
from rule_agreement import rule_agreement_by_layer

from moediag.analysis.calibration import POOLED
from moediag.analysis.prediction import predict_flips
from moediag.analysis.vocabulary import exact_divergences
from moediag.engines.arms import ArmRequest, arm_request
from moediag.engines.assemble import FULL
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.batching import alone
from moediag.engines.hf.engine import Replay, TrainEngine, load_model
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.routers import ModelRouting
from moediag.errors import MoediagError
from moediag.hygiene import check_run
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
                run_probe(engines, "probe_family", run, checkpoint, ArmRequest("infer", "infer", engine), output)
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


def table(measures: dict[str, FamilyMeasures]) -> str:
    """The measures as a markdown table."""
    header = ["checkpoint", "rule", "n", "complete", "ids, logits bit-equal with and without taps", "same sets",
              "HF's rule on vLLM's logits", "moediag's rule", "plain TopK", "exact ties", "self-replay bit-identical",
              "mean abs logp diff [nat]", "with replay", "with replay of gate weights too", "warnings"]  # fmt: skip
    rows = ["| " + " | ".join(header) + " |", "|" + ":--|" * len(header)]
    for name, m in measures.items():
        cells = [name, m.rule, m.n_tokens, _yes(m.is_complete), _yes(m.is_bit_equal_under_observation),
                 f"{m.same_set_rate:.3f}", f"{m.train_rule_rate:.3f}", f"{m.spec_rule_rate:.3f}",
                 f"{m.plain_topk_rate:.3f}", m.n_exact_ties, _yes(m.is_self_replay_bit_identical),
                 f"{m.mean_abs_logp_diff:.2g}", f"{m.mean_abs_logp_diff_replayed:.2g}",
                 f"{m.mean_abs_logp_diff_replayed_with_weights:.2g}",
                 ", ".join(sorted(set(m.findings))) or "none"]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure({torch.bfloat16: NAMES, torch.float32: NAMES}, Path(folder))
    for dtype, measures in found.items():
        print(f"### {str(dtype).removeprefix('torch.')}\n\n{table(measures)}\n", flush=True)
        print(json.dumps({name: asdict(m) for name, m in measures.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
