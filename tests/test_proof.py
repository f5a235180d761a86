"""The proof of a router's rule: fitting against plain loops, rules that no list names, verdicts that fail alone."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routers import spec_of

from moediag.engines.arms import ROUTER_RULES, ArmRequest
from moediag.engines.assemble import MARGINS
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.engine import TrainEngine, load_model
from moediag.engines.hf.routing import prove_model
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.proof import Hints, Probes, Proof, Rows, Shown, agreement, fit, read_proof, write_proof
from moediag.engines.routers import ModelRouting
from moediag.errors import CaptureError
from moediag.run.writer import RunWriter
from moediag.selftest.families import FAMILIES, make_checkpoint

N_EXPERTS, TOP_K = 8, 3
SCORES = {
    "softmax": lambda row: [math.exp(z - max(row)) / sum(math.exp(x - max(row)) for x in row) for z in row],
    "sigmoid": lambda row: [1 / (1 + math.exp(-z)) if z > -700 else 0.0 for z in row],
    "sqrtsoftplus": lambda row: [math.sqrt(math.log1p(math.exp(z)) if z < 30 else z) for z in row],
    "logit": lambda row: list(row),
}


def plain_choice(row: list[float], rule: ModelRouting, bias: list[float] | None) -> list[int]:
    """Experts by the rule, one number after the other, in double precision."""
    scores = SCORES[rule.score_function](row)
    compared = [s + b for s, b in zip(scores, bias or [0.0] * len(row), strict=True)]
    size = len(row) // rule.n_group
    groups = [sorted(compared[g * size : (g + 1) * size], reverse=True) for g in range(rule.n_group)]
    worth = [group[0] if rule.group_score == "best" else sum(group[:2]) for group in groups]
    kept = sorted(range(rule.n_group), key=lambda g: -worth[g])[: rule.topk_group]
    inside = [c if e // size in kept else float(rule.masked_value) for e, c in enumerate(compared)]
    return sorted(range(len(row)), key=lambda e: -inside[e])[: rule.top_k]


def plain_gates(row: list[float], ids: list[int], rule: ModelRouting) -> list[float]:
    """Gate weights by the rule, one number after the other."""
    if rule.gate == "scores":
        scores = SCORES[rule.score_function](row)
        gates = [scores[e] for e in ids]
    elif rule.gate == "sigmoid":
        gates = [1 / (1 + math.exp(-row[e])) for e in ids]
    else:
        gates = SCORES["softmax"]([row[e] for e in ids])
    total = sum(gates) + rule.epsilon
    return [rule.scaling_factor * (gate / total if rule.renormalize else gate) for gate in gates]


def plain_rows(rule: ModelRouting, bias: list[float] | None) -> Rows:
    logits = Probes(n_groups=(4,)).logits(N_EXPERTS)
    ids = [plain_choice(row, rule, bias) for row in logits.double().tolist()]
    gates = [plain_gates(row, chosen, rule) for row, chosen in zip(logits.double().tolist(), ids, strict=True)]
    vectors = {} if bias is None else {"router.e_score_correction_bias": torch.tensor(bias)}
    return Rows(logits_NE=logits, ids_NK=torch.tensor(ids), gates_NK=torch.tensor(gates), vectors=vectors)


HINTS = Hints("made up", groups=((4, 2),), factors=(2.5,))
_GATES = {"softmax": ["scores"], "sigmoid": ["scores"], "sqrtsoftplus": ["scores"],
          "logit": ["softmax_of_chosen", "sigmoid"]}  # fmt: skip


@st.composite
def rules(draw: Any) -> ModelRouting:
    score = draw(st.sampled_from(sorted(_GATES)))
    gate = draw(st.sampled_from(_GATES[score]))
    grouped = draw(st.sampled_from([{}, {"n_group": 4, "topk_group": 2, "group_score": draw(
        st.sampled_from(["best", "two_best"])), "masked_value": draw(st.sampled_from(["-inf", "0"]))}]))  # fmt: skip
    return spec_of(
        score, TOP_K, N_EXPERTS, has_correction_bias=draw(st.booleans()), gate=gate,
        bias_name="router.e_score_correction_bias", renormalize=gate != "softmax_of_chosen" and draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])), **grouped,
    )  # fmt: skip


@settings(max_examples=40)
@given(rule=rules(), seed=st.integers(0, 1000))
def test_the_rule_that_is_fitted_does_what_a_plain_loop_did(rule: ModelRouting, seed: int) -> None:
    """Whatever of two equal functions it is called, its choices and gates are those of the loop on logits unseen."""
    g = torch.Generator().manual_seed(seed)
    bias = (torch.rand(N_EXPERTS, generator=g) - 0.6).tolist() if rule.has_correction_bias else None
    found = fit([Shown(0, N_EXPERTS, plain_rows(rule, bias))], HINTS).rule
    assert found is not None
    assert found.gate != "unknown"
    fresh = torch.randn(20, N_EXPERTS, generator=g).double().tolist()
    kept = bias if found.has_correction_bias else None
    for row in fresh:
        chosen = plain_choice(row, found, kept)
        assert set(chosen) == set(plain_choice(row, rule, bias))
        assert plain_gates(row, chosen, found) == pytest.approx(plain_gates(row, chosen, rule), rel=1e-5)


@pytest.mark.parametrize(
    "planted",
    [
        {"renormalize": False},
        {"has_correction_bias": False},
        {"masked_value": "0"},
        {"top_k": 2},
        {"scaling_factor": 1.0},
        {"score_function": "softmax"},
        {"group_score": "best"},
    ],
    ids=str,
)
def test_another_rule_in_the_other_engine_is_named_with_both(planted: dict[str, Any]) -> None:
    bias = [-1.4, -1.2, -1.0, -0.9, -1.3, -1.1, -1.2, -1.0]  # below every sigmoid: 0 for losers would win
    rule = spec_of(
        "sigmoid", TOP_K, N_EXPERTS, has_correction_bias=True, bias_name="router.e_score_correction_bias",
        n_group=4, topk_group=2, scaling_factor=2.5,
    )  # fmt: skip
    shown = [Shown(0, N_EXPERTS, plain_rows(rule, bias))]
    own = fit(shown, HINTS)
    assert own.rule is not None
    proof = Proof(own, shown, Probes(n_groups=(4,)), HINTS, own.rule)
    wrong = replace(rule, **planted)
    other = plain_rows(wrong, bias if wrong.has_correction_bias else None)
    other.vectors = shown[0].rows.vectors
    found = agreement(proof, [Shown(0, N_EXPERTS, other)])
    assert found.differences
    assert "transformers: top-3 of 8 by sigmoid of the logits + bias within the 2 of 4 groups" in found.differences[0]
    assert "vLLM: " in found.differences[0]
    same = agreement(proof, [Shown(0, N_EXPERTS, plain_rows(rule, bias))])
    assert same.differences == ()
    assert "choice and gate proven on 1 MoE layers in transformers and vLLM" in same.line


def test_what_no_logits_reach_is_no_difference() -> None:
    """0 for losing groups where every choice score is positive, and groups that are all kept, change nothing."""
    bias = [0.1, 0.2, 0.05, 0.3, 0.15, 0.0, 0.25, 0.1]
    rule = spec_of(
        "sigmoid", TOP_K, N_EXPERTS, has_correction_bias=True, bias_name="router.e_score_correction_bias",
        n_group=4, topk_group=2,
    )  # fmt: skip
    for planted in ({"masked_value": "0"}, {"topk_group": 4, "n_group": 4, "group_score": "best"}):
        base = replace(rule, topk_group=planted.get("topk_group", 2))
        shown = [Shown(0, N_EXPERTS, plain_rows(base, bias))]
        own = fit(shown, HINTS)
        assert own.rule is not None
        proof = Proof(own, shown, Probes(n_groups=(4,)), HINTS, own.rule)
        other = [Shown(0, N_EXPERTS, plain_rows(replace(base, **planted), bias))]
        assert agreement(proof, other).differences == ()


# What config.json of a family names, read by hand: score, bias, groups, gate, renormalised, factor, decoder layers
DECLARED = {
    "qwen2_moe": ("softmax", False, False, "scores", False, (0, 1, 2)),
    "qwen3_moe": ("softmax", False, False, "scores", True, (0, 2)),
    "olmoe": ("softmax", False, False, "scores", False, (0, 1, 2)),
    "mixtral": ("softmax", False, False, "scores", True, (0, 1, 2)),
    "glm4_moe": ("sigmoid", True, True, "scores", True, (1, 2)),
    "deepseek_v3": ("sigmoid", True, True, "scores", True, (1, 2)),
    "dots1": ("sigmoid", True, False, "scores", True, (1, 2)),
    "gpt_oss": ("logit", False, False, "softmax_of_chosen", False, (0, 1, 2)),
    "granitemoe": ("logit", False, False, "softmax_of_chosen", False, (0, 1, 2)),
    "llama4": ("logit", False, False, "sigmoid", False, (1, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECLARED)
def test_the_rule_shown_is_the_one_that_config_json_names(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No family is listed anywhere: transformers' routers, loaded alone, show it in seconds."""
    assert name in FAMILIES
    routing = open_checkpoint(str(make_checkpoint(name, tmp_path / name, dtype))).routing
    assert routing is not None
    found = (routing.score_function, routing.has_correction_bias, routing.n_group > 1, routing.gate,
             routing.renormalize, routing.decoder_layers)  # fmt: skip
    assert found == DECLARED[name]
    assert routing.proof.startswith("choice, gate, replay shown on the loaded router")
    assert routing.scales_input == (name == "llama4")


@pytest.mark.parametrize("name", sorted(DECLARED.keys() - {"llama4"}))  # whose scores are not shown in float16
def test_small_gate_weights_of_float16_are_the_rules_own(name: str, tmp_path: Path) -> None:
    """Below 6e-5 float16 has fewer digits: gates were called unexplained, and no model could be captured in it."""
    routing = open_checkpoint(str(make_checkpoint(name, tmp_path / name, torch.float16))).routing
    assert routing is not None
    assert (routing.score_function, routing.gate, routing.renormalize) == tuple(DECLARED[name][i] for i in (0, 3, 4))


def test_a_proof_survives_the_way_to_another_process(tmp_path: Path) -> None:
    proof = open_checkpoint(str(make_checkpoint("glm4_moe", tmp_path / "glm"))).proof("bfloat16")
    write_proof(tmp_path / "proof.pt", proof)
    again = read_proof(tmp_path / "proof.pt")
    assert (again.routing, again.fit, again.hints, again.probes) == (
        proof.routing, proof.fit, proof.hints, proof.probes,
    )  # fmt: skip
    assert torch.equal(again.shown[0].rows.gates_NK, proof.shown[0].rows.gates_NK)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"routed_scaling_factor": 1.0}, "other gate weights in decoder layer 1"),
        ({"topk_group": 1}, "other experts in decoder layer 1"),
        ({"num_experts_per_tok": 2}, "experts a token against"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_arm_captured_elsewhere_is_held_against_the_rule_it_had(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A train arm made on another machine than the infer arm was never held against the infer arm's rule."""
    checkpoint = make_checkpoint("glm4_moe", tmp_path / "glm")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **changed}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The for statement")
    run = make_plan(open_checkpoint(str(checkpoint)), prompts, SamplingOptions(max_tokens=2)).create(
        tmp_path / "run", False
    )
    writer = RunWriter(run)

    def engine(path: Path, arm: str, accept: str = "") -> TrainEngine:
        opened = open_checkpoint(str(path))
        writer.add_checkpoint(opened.record)
        request = ArmRequest(arm, arm, {"dtype": "float32"}, accept=accept)
        made = TrainEngine(writer, load_model(str(path), request.options), request, opened.routing.record())
        record = made.arm_record(opened.record.digest, {})
        writer.begin_arm(record, made.correction_bias())
        return made

    engine(checkpoint, "infer-generate")
    with pytest.raises(CaptureError, match=words) as refused:
        engine(other, "train")
    assert "--accept router-rules" in str(refused.value)
    assert run.arms() == ["infer-generate"]
    assert engine(checkpoint, "train")
    assert engine(other, "train", ROUTER_RULES)


# Model classes of no list


class _OddRouter(torch.nn.Module):
    """A combination of no family: sqrt(softplus), bias, groups by their best, losers at 0, a factor per expert.

    It gives weights before ids and no logits at all.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.kind = kind
        self.proj = torch.nn.Linear(24, 8, bias=False)
        self.lift = torch.nn.Buffer(torch.rand(8, generator=g) - 0.5)
        self.loudness = torch.nn.Parameter(1 + torch.rand(8, generator=g))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.proj(hidden.reshape(-1, 24))
        scores = torch.nn.functional.softplus(logits).sqrt()
        if self.kind == "outside":
            ids = torch.topk(torch.sin(3 * logits), 3, dim=-1).indices
            return scores.gather(1, ids), ids
        compared = scores + self.lift
        kept = torch.topk(compared.view(-1, 4, 2).amax(-1), 2, dim=-1).indices
        is_kept = torch.zeros(len(logits), 4, dtype=torch.bool).scatter(1, kept, True).repeat_interleave(2, dim=1)
        ids = torch.topk(compared.masked_fill(~is_kept, 0.0), 3, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * 1.7 * self.loudness[ids]
        if self.kind == "odd gate":
            weights = weights.square() + 0.1 * logits.amax(-1, keepdim=True)
        return weights, ids


class _OddExperts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(8, 24, 24, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: torch.Tensor, *, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nk,nki->ni", weights, torch.einsum("ni,nkij->nkj", hidden, self.w[ids]))


class _OddBlock(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.chooser, self.experts = _OddRouter(kind), _OddExperts()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = self.chooser(hidden)
        return self.experts(hidden.reshape(-1, 24), weights=weights, ids=ids).view(hidden.shape)


class _OddModel(torch.nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_OddBlock(kind) for _ in range(2))
        generator = torch.Generator().manual_seed(3)
        for block in self.layers:
            block.chooser.proj.weight.data.normal_(generator=generator)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            hidden = hidden + block(hidden)
        return hidden


ODD_CONFIG = {"model_type": "odd", "n_group": 4, "topk_group": 2, "route_scale": 1.7}


def _captured(model: torch.nn.Module, proof: Proof) -> dict[str, torch.Tensor]:
    hidden = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode(), RoutingTaps(model, proof.routing, MARGINS) as taps:
        model(hidden)
        return taps.take(torch.arange(40))


def test_a_model_of_no_list_with_an_unseen_combination_is_captured_right() -> None:
    model = _OddModel()
    proof = prove_model(model, ODD_CONFIG, "float32", "here")
    routing = proof.routing
    assert (routing.score_function, routing.bias_name, routing.expert_scale_name) == (
        "sqrtsoftplus", "router.lift", "router.loudness",
    )  # fmt: skip
    assert (routing.group_score, routing.masked_value, routing.scaling_factor) == ("best", "0", 1.7)
    assert routing.logits_output is None
    assert routing.proof.startswith("choice, gate, replay shown on the loaded router (896 rows")
    rows = _captured(model, proof)
    hidden = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(4))[0]
    logits = torch.nn.functional.linear(hidden, model.layers[0].chooser.proj.weight)
    bias = model.layers[0].chooser.lift.tolist()
    for t in range(40):
        chosen = plain_choice(logits[t].tolist(), routing, bias)
        assert set(chosen) == set(rows["expert_ids_TLK"][t, 0].tolist())
    assert (rows["margin_TL"] >= 0).all()


def test_a_choice_outside_the_space_is_captured_without_margins() -> None:
    """Its ids, gate weights and logits are kept; what they mean is not claimed."""
    model = _OddModel("outside")
    proof = prove_model(model, ODD_CONFIG, "float32", "here")
    assert not proof.routing.has_rule
    assert "explains its choices" in proof.routing.proof
    rows = _captured(model, proof)
    assert set(rows) == {"expert_ids_TLK", "gate_weights_TLK", "router_logits_TLE"}
    assert proof.routing.routers()[0].spec is None


def test_a_gate_outside_the_space_costs_the_gate_alone() -> None:
    model = _OddModel("odd gate")
    proof = prove_model(model, ODD_CONFIG, "float32", "here")
    assert (proof.routing.score_function, proof.routing.gate) == ("sqrtsoftplus", "unknown")
    assert proof.fit.choice == ""
    assert proof.fit.gate == "no gate formula explains its weights"
    assert "margin_TL" in _captured(model, proof)


def test_forced_routes_reach_experts_that_take_them_by_name() -> None:
    model = _OddModel()
    proof = prove_model(model, ODD_CONFIG, "float32", "here")
    own = _captured(model, proof)
    ids = own["expert_ids_TLK"].long()
    hidden = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(4))
    forced = ForcedRoutes(ids, 2 * own["gate_weights_TLK"], range(2))
    with torch.inference_mode(), RoutingTaps(model, proof.routing, MARGINS, forced) as taps:
        model(hidden)
        rows = taps.take(torch.arange(40))
    assert torch.equal(rows["expert_ids_TLK"].long(), ids)
    assert torch.equal(rows["gate_weights_TLK"], 2 * own["gate_weights_TLK"])
    assert "forward" not in model.layers[0].chooser.__dict__
