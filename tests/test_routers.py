"""Routing rules: margins worked by hand for each kind of router, the margin bound, `moediag inspect`."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HUNT, REPOSITORY, SEED
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rule_agreement import plain_topk

from moediag.cli.main import main
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.taps import RoutingTaps
from moediag.engines.routers import (
    ModelRouting,
    apply_rule,
    choice_scores,
    group_scores,
    has_experts,
    margins,
    refuse_ambiguous_rule,
)
from moediag.errors import CheckpointError

RING = REPOSITORY / "tests" / "fixtures" / "ring-tiny"


def spec_of(score_function: str = "softmax", top_k: int = 2, n_experts: int = 4, **changes: Any) -> ModelRouting:
    plain = {
        "family": "made up",
        "n_experts": n_experts,
        "top_k": top_k,
        "score_function": score_function,
        "has_correction_bias": False,
        "n_group": 1,
        "topk_group": 1,
        "gate": "scores",
        "renormalize": True,
        "scaling_factor": 1.0,
        "n_shared_experts": 0,
        "decoder_layers": (0,),
    }
    return ModelRouting(**{**plain, **changes})


LOG = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()


class _Gate(torch.nn.Module):
    """A router that hands its experts ids and sigmoid weights, whatever its family."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden, self.weight)
        best = logits.topk(2, dim=-1)
        return logits, best.values.sigmoid(), best.indices


class _Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 8, 8))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden * weights.sum(-1, keepdim=True)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = _Gate(), _Experts()

    def forward(self, hidden: torch.Tensor) -> Any:
        _, weights, ids = self.gate(hidden)
        return self.experts(hidden, ids, weights)


def test_a_sigmoid_gate_is_not_taken_for_llama4() -> None:
    """``gate == "sigmoid"`` stood for the family whose gate weight scales the experts' inputs: another family with
    such a gate would have had its weights read off the logits."""
    model = torch.nn.Sequential(_Block())
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), RoutingTaps(model, spec_of("logit", gate="sigmoid"), "margins") as taps:
        model(hidden)
        rows = taps.take(torch.arange(5))
        _, weights, ids = model[0].gate(hidden)
    assert torch.equal(rows["gate_weights_TLK"][:, 0], weights)
    assert torch.equal(rows["expert_ids_TLK"][:, 0].long(), ids)


def test_softmax_router_by_hand() -> None:
    """logits = log(4, 3, 2, 1): softmax .4 .3 .2 .1, top-2 margin .3 - .2, logit margin log 3 - log 2."""
    spec = spec_of()
    ids = apply_rule(LOG, spec)
    margin, logit_margin = margins(LOG, ids, spec)
    assert ids.tolist() == [[0, 1]]
    assert margin.item() == pytest.approx(0.1)
    assert logit_margin.item() == pytest.approx(0.405465)


def test_logit_router_by_hand() -> None:
    """gpt-oss, Granite and Llama 4 compare raw logits: both margins are the same."""
    for top_k, gap in ((1, 0.287682), (2, 0.405465)):
        spec = spec_of("logit", top_k)
        margin, logit_margin = margins(LOG, apply_rule(LOG, spec), spec)
        assert margin.item() == pytest.approx(gap)
        assert logit_margin.item() == pytest.approx(gap)


def test_sigmoid_router_with_bias_by_hand() -> None:
    """sigmoid(log x) = x / (1 + x): .8 .75 .667 .5. The bias lifts the last expert over all others.

    Choice scores .8 .75 .667 1.0: experts 3 and 0, margin .8 - .75; the logits would have chosen 0 and 1, hence a
    logit margin of log 1 - log 3 < 0.
    """
    spec, bias = spec_of("sigmoid", has_correction_bias=True), torch.tensor([0.0, 0.0, 0.0, 0.5])
    ids = apply_rule(LOG, spec, bias)
    margin, logit_margin = margins(LOG, ids, spec, bias)
    assert ids.tolist() == [[3, 0]]
    assert plain_topk(LOG, spec).tolist() == [[0, 1]]
    assert margin.item() == pytest.approx(0.05)
    assert logit_margin.item() == pytest.approx(-1.098612)


def test_group_limited_router_with_bias_by_hand() -> None:
    """Six experts in three groups of two, one group kept, top-1; sigmoid scores
    .9 .1 | .6 .5 | .45 .35, a bias of .1 on the last.

    Group scores 1.0, 1.1, .9: group 1 wins, so the best single expert (.9) loses with its group. Within group 1 the
    margin is .6 - .5; the largest logit not used is that of .9. Groups compared by their best expert: group 0 wins.
    """
    spec = spec_of("sigmoid", 1, 6, has_correction_bias=True, n_group=3, topk_group=1)
    logits = torch.logit(torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.45, 0.35]]))
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.1])
    assert group_scores(logits.sigmoid() + bias, spec).tolist()[0] == pytest.approx([1.0, 1.1, 0.9])
    ids = apply_rule(logits, spec, bias)
    margin, logit_margin = margins(logits, ids, spec, bias)
    assert ids.tolist() == [[2]]
    assert margin.item() == pytest.approx(0.1)
    assert logit_margin.item() == pytest.approx(math.log(0.6 / 0.4) - math.log(0.9 / 0.1))
    assert apply_rule(logits, dataclasses.replace(spec, group_score="best"), bias).tolist() == [[0]]
    lifted = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0, 0.0])  # enters the choice: .7 against .6 in group 1
    assert apply_rule(logits, spec, lifted).tolist() == [[3]]
    assert margins(logits, torch.tensor([[3]]), spec, lifted)[0].item() == pytest.approx(0.1)


def test_exact_ties_have_a_margin_of_exactly_0_and_k_of_e_an_infinite_one() -> None:
    tied = torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    assert margins(tied, apply_rule(tied, spec_of()), spec_of())[0].item() == 0.0
    every = spec_of(top_k=4)
    assert margins(tied, apply_rule(tied, every), every)[0].item() == float("inf")


@settings(max_examples=200, deadline=None)
@given(
    score_function=st.sampled_from(["softmax", "sigmoid", "logit"]),
    has_bias=st.booleans(),
    groups=st.sampled_from([(1, 1), (4, 2)]),
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([1e-3, 1e-2, 1e-1]),
)
def test_a_margin_above_twice_the_change_of_scores_rules_a_flip_out(
    score_function: str, has_bias: bool, groups: tuple[int, int], seed: int, noise: float
) -> None:
    """Where groups compete, their gap must also exceed what their two best can change: four times the change."""
    torch.manual_seed(seed)
    spec = spec_of(
        score_function, 3, 16, has_correction_bias=has_bias, n_group=groups[0], topk_group=groups[1]
    )  # fmt: skip
    bias = torch.randn(16) * 0.3 if has_bias else None
    logits = torch.randn(64, 16)
    moved = logits + noise * torch.randn(64, 16)
    ungrouped = spec_of(score_function, 3, 16, has_correction_bias=has_bias)
    before, after = choice_scores(logits, ungrouped, bias), choice_scores(moved, ungrouped, bias)
    change = (after - before).abs().amax(dim=1)
    ids = apply_rule(logits, spec, bias)
    safe = margins(logits, ids, spec, bias)[0] > 2 * change + 1e-6
    if groups[0] > 1:
        best = group_scores(before, spec).sort(dim=1, descending=True).values
        safe &= best[:, groups[1] - 1] - best[:, groups[1]] > 4 * change + 1e-6
    assume(bool(safe.any()))
    same = ids.sort(dim=1).values == apply_rule(moved, spec, bias).sort(dim=1).values
    assert bool(same.all(dim=1)[safe].all())


def _counts_of_experts(config: Any) -> set[int]:
    """Every integer above 1 under a name that holds the word, however deep: what a dense model has none of."""
    if isinstance(config, list):
        return set().union(*map(_counts_of_experts, config)) if config else set()
    if not isinstance(config, dict):
        return set()
    own = {value for key, value in config.items() if "expert" in key and type(value) is int and value > 1}
    return own.union(*map(_counts_of_experts, config.values()))


OF_EXPERTS = {"deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "llama4", "mixtral", "olmoe", "qwen2_moe",
              "qwen3_moe", "dbrx", "qwen3_omni_moe", "jamba"}  # fmt: skip
DENSE = {"gemma4", "llama"}


def test_every_config_class_of_transformers_is_dense_only_without_experts_anywhere() -> None:
    """Bug: dbrx (E under ffn_config) and qwen3_omni_moe (thinker_config.text_config) were taken for dense models."""
    from transformers import CONFIG_MAPPING

    names = set(CONFIG_MAPPING)
    if HUNT == 1:  # all of them take a minute or two
        of_experts = {name for name in names if re.search("moe|mixtral|deepseek|oss|ling|maverick|llama4", name)}
        names = {*random.Random(SEED).sample(sorted(names), len(names) // 12), *of_experts, *OF_EXPERTS, *DENSE}
    found: dict[str, bool] = {}
    for name in sorted(names):
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # needs parts, packages or the hub: nothing to read
            continue
        as_saved = json.loads(config.to_json_string())
        found[name] = has_experts(as_saved)
        if not found[name]:
            assert not _counts_of_experts(as_saved), name
    counts = Counter(found.values())
    # a rule that sees experts everywhere would pass the rest
    assert counts[False] > (30 if HUNT == 1 else 500)
    assert counts[True] > (30 if HUNT == 1 else 60)
    assert {name for name, verdict in found.items() if verdict} >= OF_EXPERTS
    assert not {name for name, verdict in found.items() if verdict} & DENSE


def test_experts_counted_by_layer_are_experts() -> None:
    """A list of counts used to be told as a config.json that is no language model's."""
    assert has_experts({"model_type": "hunyuan", "num_experts": [1, 8, 8]})
    assert not has_experts({"model_type": "hunyuan", "num_experts": [1, 1], "num_experts_per_tok": 4})


def test_a_spec_survives_its_record() -> None:
    spec = spec_of(decoder_layers=(1, 3))
    assert ModelRouting.from_record(json.loads(json.dumps(spec.record()))) == spec


def test_impossible_groups_are_refused(tmp_path: Path) -> None:
    from moediag.selftest.families import make_checkpoint

    checkpoint = make_checkpoint("deepseek_v3", tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "n_group": 5, "num_experts_per_tok": None}))
    with pytest.raises(CheckpointError, match="cannot be captured"):
        assert open_checkpoint(str(checkpoint)).routing


def test_a_deepseek_config_that_vllm_would_misread_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without topk_method vLLM used to die of a bare KeyError while loading; transformers 5 does not write it."""
    from moediag.selftest.families import make_checkpoint

    checkpoint = make_checkpoint("deepseek_v3", tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["topk_method"], config["scoring_func"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (tmp_path / "p.txt").write_text("The for statement")
    arguments = ["profile", checkpoint, "--prompts", tmp_path / "p.txt", "-o", tmp_path / "run"]
    assert main([str(argument) for argument in arguments]) == 1
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lacks topk_method: 'noaux_tc', scoring_func: 'sigmoid'" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["afmoe", "hy_v3", "mimo_v2_flash"])
def test_entries_that_vllm_wants_and_transformers_does_not_write_are_named(name: str) -> None:
    """Bug: without them vLLM died of a bare AttributeError while it built the model."""
    from moediag.selftest.families import FAMILIES

    family = FAMILIES[name]
    written = {"model_type": family.model_type, **family.extra}
    refuse_ambiguous_rule(written, "here")
    for entry in family.extra:
        if entry in ("scoring_func", "topk_method"):  # mimo_v2_flash has them when published, vLLM does not look
            continue
        with pytest.raises(CheckpointError, match=entry):
            refuse_ambiguous_rule({key: value for key, value in written.items() if key != entry}, "here")


def test_inspect_shows_rule_layers_dtypes_and_biases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(RING), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["routing"]["score_function"] == "sigmoid"
    assert facts["routing"]["decoder_layers"] == [1, 2]
    assert facts["router_dtypes"] == dict.fromkeys(("weight", "matmul", "score", "gate"), "float32")
    biases = [entry for entry in facts["router_tensors"] if entry["tensor"] == "expert_bias"]
    assert [entry["n_unique_values"] for entry in biases] == [8, 8]
    assert main(["inspect", str(RING)]) == 0
    shown = capsys.readouterr().out
    assert "topk_group" in shown
    assert not re.search(r"^    \w+ *$", shown, re.MULTILINE)
    assert "None" not in shown.split()  # bug: what a checkpoint does not say was shown as Python says it


def test_inspect_names_a_router_that_is_all_zero(
    random_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    spoiled = Path(shutil.copytree(random_moe, tmp_path / "spoiled"))
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"].zero_()
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    (spoiled / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95}))
    assert main(["inspect", str(spoiled), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert any("layers.2.mlp.gate.weight is all zero" in warning for warning in facts["warnings"])
    assert any("generation_config.json changes sampling" in warning for warning in facts["warnings"])
    assert facts["generation_config"] == {"temperature": 0.6, "top_p": 0.95}
