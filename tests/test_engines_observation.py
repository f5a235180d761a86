"""Looking does not change what is seen, and what is seen is the engines' own: on the trained demo pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENGINES, write_jsonl
from probes import run_probe

from moediag.analysis.vocabulary import exact_divergences
from moediag.engines.arms import ArmRequest
from moediag.engines.assemble import FULL, MARGINS
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.errors import CaptureError
from moediag.hygiene import check_run
from moediag.results.pair_analysis import analyze_pair
from moediag.results.pair_summary import pair_summary
from moediag.run.reader import Run, open_run
from moediag.run.recipes import PREFILL

pytestmark = pytest.mark.engines
N_PREFILLED = 4


@pytest.fixture(scope="module")
def moe(demo: Path) -> Run:
    return open_run(demo / "moe")


@pytest.fixture(scope="module")
def prefilled(demo: Path, moe: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, np.ndarray]]:
    """A run whose given completions are the demo's own responses, prefilled; and what probes.py saw beside it."""
    folder = tmp_path_factory.mktemp("probe")
    tokens = moe.tokens(moe.shards[0])
    bounds = tokens.sequence_bounds()[:N_PREFILLED]
    records = [
        {"prompt_token_ids": ids[~is_response].tolist(), "completion_token_ids": ids[is_response].tolist()}
        for ids, is_response in ((tokens.token_id_T[a:b], tokens.is_response_T[a:b]) for a, b in bounds)
    ]
    prompts = write_jsonl(folder / "given.jsonl", records)
    checkpoint = demo / "checkpoints" / "moe"
    plan = make_plan(open_checkpoint(str(checkpoint)), prompts, SamplingOptions(), full_vocab=N_PREFILLED)
    run = plan.create(folder / "run", force=False)
    request = ArmRequest("infer", "infer", {"dtype": "bfloat16", "max_model_len": 512}, path=PREFILL)
    run_probe(ENGINES, "probe_observation", run, open_checkpoint(str(checkpoint)), request, folder / "probe.npz")
    with np.load(folder / "probe.npz") as arrays:
        return run, dict(arrays)


@pytest.fixture(scope="module")
def model(demo: Path) -> Any:
    from moediag.engines.hf.engine import load_model

    return load_model(str(demo / "checkpoints" / "moe"), {"dtype": "bfloat16"})


def sequences(run: Run) -> Iterator[tuple[Any, Any]]:
    import torch

    for shard in run.shards:
        tokens = run.tokens(shard)
        for start, end in tokens.sequence_bounds():
            yield (
                torch.from_numpy(tokens.token_id_T[start:end].copy()),
                torch.from_numpy(tokens.is_response_T[start:end].copy()),
            )


def test_vllm_gives_the_same_tokens_and_logprobs_with_and_without_capture(
    prefilled: tuple[Run, dict[str, np.ndarray]],
) -> None:
    """One engine, temperature 0: before the taps, with them, with distributions kept, and after all came off."""
    _, seen = prefilled
    for name in ("tapped", "vocabulary", "after"):
        np.testing.assert_array_equal(seen["plain_ids"], seen[f"{name}_ids"])
        np.testing.assert_array_equal(seen["plain_logps"], seen[f"{name}_logps"])
    # each of the 48 tokens and of the prompt rows that end a step is sampled from a row of its own
    assert seen["n_kept"] >= seen["after_ids"].size


def test_prefilled_and_decoded_tokens_have_the_same_distributions(
    moe: Run, prefilled: tuple[Run, dict[str, np.ndarray]]
) -> None:
    """On this CPU vLLM's prefill gives what its decode gave, bit for bit; so do the distributions of both."""
    run, _ = prefilled
    given, sampled = run.load_vocab("infer", run.shards[0]), moe.load_vocab("infer", moe.shards[0])
    assert given is not None
    assert sampled is not None
    np.testing.assert_array_equal(given.row_N, sampled.row_N[: len(given)])
    np.testing.assert_array_equal(given.logps_NV, sampled.logps_NV[: len(given)])
    assert check_run(run, arms=["infer"]) == []


def test_a_distribution_is_the_one_that_the_tokens_logp_comes_from(moe: Run) -> None:
    """Bit for bit, in both engines: every response token of the demo."""
    for shard in moe.shards:
        tokens = moe.tokens(shard)
        for arm in ("infer", "train"):
            vocab, capture = moe.load_vocab(arm, shard), moe.capture(arm, shard)
            assert vocab is not None
            assert vocab.logps_NV.shape == (tokens.is_response_T.sum(), 257)
            own = vocab.logps_NV[np.arange(len(vocab)), tokens.token_id_T[vocab.row_N]]
            np.testing.assert_array_equal(own, capture.logp_T[vocab.row_N])


def test_trains_distributions_are_those_of_the_model_without_hooks(moe: Run, model: Any) -> None:
    """Not only at the token: the whole row, against a forward that moediag has no part in."""
    import torch

    shard = moe.shards[0]
    vocab, first = moe.load_vocab("train", shard), 0
    assert vocab is not None
    for ids, is_response in list(sequences(moe))[:3]:
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        row = torch.nonzero(is_response).flatten()
        expected = torch.log_softmax(logits[row - 1].double(), dim=-1).numpy()
        np.testing.assert_allclose(vocab.logps_NV[first : first + len(row)], expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(np.exp(vocab.logps_NV[first : first + len(row)]).sum(1), 1.0, atol=1e-5)
        first += len(row)


def test_hooked_and_unhooked_logits_of_transformers_are_bit_equal(moe: Run, model: Any) -> None:
    import torch

    from moediag.engines.hf.taps import RoutingTaps
    from moediag.engines.routers import ModelRouting

    spec = ModelRouting.of_routers(moe.arm("infer").routers)
    ids, _ = next(sequences(moe))
    with torch.inference_mode():
        plain = model(input_ids=ids[None], use_cache=False).logits
        with RoutingTaps(model, spec, FULL) as taps:
            hooked = model(input_ids=ids[None], use_cache=False).logits
            rows = taps.take(torch.arange(len(ids)))
        after = model(input_ids=ids[None], use_cache=False).logits
    assert torch.equal(plain, hooked)
    assert torch.equal(plain, after)
    assert rows["router_logits_TLE"].shape == (len(ids), spec.n_layers, spec.n_experts)


def test_hooks_come_off_when_the_body_raises_and_a_silent_layer_is_an_error(moe: Run, model: Any) -> None:
    import torch

    from moediag.engines.hf.taps import RoutingTaps
    from moediag.engines.routers import ModelRouting

    spec = ModelRouting.of_routers(moe.arm("infer").routers)
    with pytest.raises(CaptureError, match="MoE layer 0 never fired"), RoutingTaps(model, spec, MARGINS) as taps:
        taps.take(torch.arange(5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_replay_forces_what_it_is_asked_to_force(moe: Run, model: Any) -> None:
    """Sets only (the gate is the model's own, as in R3), sets and weights, and a range of layers."""
    import torch

    from moediag.engines.hf.engine import Replay
    from moediag.engines.hf.taps import RoutingTaps
    from moediag.engines.routers import ModelRouting

    spec = ModelRouting.of_routers(moe.arm("infer").routers)
    shard = moe.shards[0]
    start, end = moe.tokens(shard).sequence_bounds()[0]
    infer = moe.capture("infer", shard)
    ids = torch.from_numpy(moe.tokens(shard).token_id_T[start:end].copy())
    recorded = torch.from_numpy(infer.expert_ids_TLK[start : end - 1].astype(np.int64))  # type: ignore[index]
    weights = torch.from_numpy(infer.gate_weights_TLK[start : end - 1].copy())  # type: ignore[index]

    def run(replay: Replay) -> dict[str, Any]:
        with torch.inference_mode(), RoutingTaps(model, spec, MARGINS, replay.routes(infer, start, end)) as taps:
            model(input_ids=ids[None], use_cache=False)
            return taps.take(torch.arange(len(ids)))

    sets = run(Replay("infer"))
    assert torch.equal(sets["expert_ids_TLK"][:-1], recorded)
    assert (sets["expert_ids_TLK"][-1] >= 0).all()  # the last token has no recorded route: the model's own choice
    assert not torch.equal(sets["gate_weights_TLK"][:-1].float(), weights)
    both = run(Replay("infer", weights=True))
    assert torch.equal(both["expert_ids_TLK"][:-1], recorded)
    assert torch.equal(both["gate_weights_TLK"][:-1], weights.to(both["gate_weights_TLK"].dtype))
    some = run(Replay("infer", first_layer=2, last_layer=3))
    own = run(Replay("infer", first_layer=6))
    same = (some["expert_ids_TLK"][:-1] == recorded).all(dim=2).all(dim=0)
    assert same[2:4].all()
    assert not same.all()
    assert torch.equal(some["expert_ids_TLK"][:, :2], own["expert_ids_TLK"][:, :2])  # layers before are untouched


def test_forced_routes_that_are_not_used_are_an_error(moe: Run, model: Any) -> None:
    import dataclasses

    import torch

    from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
    from moediag.engines.routers import ModelRouting

    spec = dataclasses.replace(ModelRouting.of_routers(moe.arm("infer").routers), top_k=3)  # no TopK of 3 happens
    ids = torch.arange(5)
    forced = ForcedRoutes(torch.zeros(5, spec.n_layers, 3, dtype=torch.long), None, range(spec.n_layers))
    with (
        torch.inference_mode(),
        RoutingTaps(model, spec, MARGINS, forced),
        pytest.raises(CaptureError, match="MoE layer 0: the forced routes were used 0 times"),
    ):
        model(input_ids=ids[None], use_cache=False)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_recorded_ids_are_what_transformers_own_rule_gives_on_vllms_logits(moe: Run, model: Any) -> None:
    """transformers' router code runs with its matmul replaced by the logits that vLLM recorded: every set agrees."""
    import torch

    from moediag.engines.hf.taps import find_blocks
    from moediag.engines.routers import ModelRouting, apply_rule

    spec = ModelRouting.of_routers(moe.arm("infer").routers)
    gates = [block.gate for block in find_blocks(model)]
    n_rows = 0
    for shard in moe.shards:
        capture = moe.capture("infer", shard)
        assert capture.router_logits_TLE is not None
        assert capture.expert_ids_TLK is not None
        routed = capture.expert_ids_TLK[:, 0, 0] >= 0
        for layer, gate in enumerate(gates):
            logits = torch.from_numpy(capture.router_logits_TLE[routed, layer])
            recorded = np.sort(capture.expert_ids_TLK[routed, layer], axis=1)
            for ids in (_run_router(gate, logits), apply_rule(logits, spec)):
                np.testing.assert_array_equal(np.sort(ids.numpy(), axis=1), recorded)
            n_rows += len(recorded)
    assert n_rows > 64 * len(gates)


def _run_router(gate: Any, logits: Any) -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class RecordedLogits(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return logits if func is torch.nn.functional.linear else func(*args, **(kwargs or {}))

    with torch.inference_mode(), RecordedLogits():
        return gate(torch.zeros(len(logits), gate.weight.shape[1], dtype=gate.weight.dtype))[2]


def test_k1_and_k3_agree_with_the_exact_kl_over_the_same_prefixes(moe: Run) -> None:
    """The demo's vocabulary is small, so KL(infer || train) is computed and not only estimated.

    On other arithmetic than CI's the sample is another one, and a 95 % interval may miss: see how far before worrying.
    """
    exact = exact_divergences(moe)
    assert exact is not None
    measures = exact.measures.set_index("measure")
    kl = float(measures.loc["kl_infer_train_exact", "value"])  # type: ignore[arg-type]
    assert (measures["n_tokens"] == sum(len(block) for block in moe.pair("train", "infer").blocks())).all()
    for name in ("kl_infer_train_k1", "kl_infer_train_k3"):
        value, low, high = measures.loc[name, ["value", "ci_low", "ci_high"]]
        print(f"exact KL {kl:.3e}; {name} {value:.3e} [{low:.3e}, {high:.3e}]")
        assert low <= kl <= high
    width = {name: measures.loc[name, "ci_high"] - measures.loc[name, "ci_low"] for name in measures.index}
    assert width["kl_infer_train_exact"] < width["kl_infer_train_k3"] < width["kl_infer_train_k1"]


def test_an_arm_against_itself_is_exactly_0_and_exactly_1(moe: Run) -> None:
    for arm in ("infer", "train"):
        summary = pair_summary(analyze_pair(moe.pair(arm, arm)))
        logp, routing = summary["logp"], summary["routing"]
        assert all(logp["abs_logp_diff"][key] == 0.0 for key in ("mean", "p50", "p90", "p99", "max"))
        assert [logp[f"kl_infer_train_k{i}"] for i in (1, 2, 3)] == [0.0, 0.0, 0.0]
        assert logp["mean_ratio"] == 1.0
        assert (routing["flip_rate"], routing["any_layer_share"]) == (0.0, 0.0)
        assert all(layer["same_set_rate"] == layer["overlap"] == 1.0 for layer in routing["by_layer"])


def test_every_request_position_and_layer_is_there(demo: Path) -> None:
    """Completeness, counted independently of the code that asserts it while capturing."""
    for name in ("moe", "dense"):
        run = open_run(demo / name)
        assert check_run(run) == []
        for shard in run.shards:
            tokens = run.tokens(shard)
            ends = {end - 1 for _, end in tokens.sequence_bounds()}
            assert len(tokens.sequence_bounds()) == shard.n_sequences
            for arm in ("infer", "train"):
                capture = run.capture(arm, shard)
                assert not np.isnan(capture.logp_T[tokens.is_response_T]).any()
                assert not np.isnan(capture.entropy_T[tokens.is_response_T]).any()
                if capture.expert_ids_TLK is None:
                    assert name == "dense"
                    continue
                missing = set(np.flatnonzero((capture.expert_ids_TLK < 0).any(axis=(1, 2))).tolist())
                assert missing == (ends if arm == "infer" else set())
