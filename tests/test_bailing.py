"""Our BailingMoeV2 against what the publisher's own code gave for a tiny random checkpoint, and against vLLM's model.

Run as a script this file is the vLLM side of the last test, in a process of its own: `test_bailing.py OUT.safetensors`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"
MOE_LAYERS = range(2)  # the first of the three decoder layers is dense


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(CHECKPOINT / "expected" / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> Any:
    return load(CHECKPOINT)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from moediag.engines.hf import bailing

    bailing.register()
    options = {"dtype": "float32", "attn_implementation": "eager", "experts_implementation": "eager", **options}
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def edited(folder: Path, **entries: Any) -> Path:
    """A copy of the checkpoint with other entries in config.json; None takes one out."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def forward(model: Any, ids: Any, **options: Any) -> tuple[Any, list[Any], list[Any]]:
    """Output, and per MoE layer what the gate returned and what the experts were given."""
    import torch

    gates, experts = [], []
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    handles = [block.gate.register_forward_hook(lambda _, __, output: gates.append(output)) for block in blocks]
    handles += [block.experts.register_forward_pre_hook(lambda _, given: experts.append(given)) for block in blocks]
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=False, **options)
    for handle in handles:
        handle.remove()
    return output, gates, experts


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_logits_and_routing_equal_the_publishers(expected: dict[str, Any], attention: str, kernel: str) -> None:
    import torch

    model = load(CHECKPOINT, attn_implementation=attention, experts_implementation=kernel)
    output, _, experts = forward(model, expected["input_ids"])
    torch.testing.assert_close(output.logits, expected["logits"], rtol=0, atol=1e-5)
    for layer in MOE_LAYERS:
        _, ids, weights = experts[layer]
        assert torch.equal(ids, expected[f"topk_ids_{layer}"])
        torch.testing.assert_close(weights, expected[f"topk_w_{layer}"], rtol=0, atol=1e-6)


def test_gate_follows_the_rule_written_out_row_by_row(model: Any) -> None:
    """Against a plain loop: groups by their two best biased scores, experts by biased, weights by unbiased score."""
    import torch

    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(200, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, weights, ids = gate(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ gate.weight.T)
    for row in range(len(hidden)):
        scores = logits[row].sigmoid()
        biased = (scores + gate.expert_bias).tolist()
        groups = [biased[i : i + 2] for i in range(0, 8, 2)]
        best = sorted(range(4), key=lambda g: sum(groups[g]), reverse=True)[:2]
        allowed = [e for e in range(8) if e // 2 in best]
        chosen = sorted(allowed, key=lambda e: biased[e], reverse=True)[:2]
        assert set(ids[row].tolist()) == set(chosen)
        torch.testing.assert_close(weights[row], 2.5 * scores[ids[row]] / scores[ids[row]].sum())


def test_recorded_router_logits_are_the_gates(model: Any, expected: dict[str, Any]) -> None:
    import torch

    output, gates, experts = forward(model, expected["input_ids"], output_router_logits=True)
    assert len(output.router_logits) == len(gates) == len(MOE_LAYERS)
    for recorded, (logits, weights, ids), given in zip(output.router_logits, gates, experts, strict=True):
        assert torch.equal(recorded, logits)
        assert torch.equal(ids, given[1])
        assert torch.equal(weights, given[2])


def test_the_last_topk_of_a_router_runs_over_all_experts(model: Any, expected: dict[str, Any]) -> None:
    """What routing replay intercepts: exactly one torch.topk of shape (T, E) per layer."""
    import torch
    from torch.overrides import TorchFunctionMode

    shapes = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.topk:
                shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with Spy():
        forward(model, expected["input_ids"])
    assert shapes.count((48, 8)) == len(MOE_LAYERS)
    assert shapes[-1] == (48, 8)


def test_logits_to_keep_are_rows_of_all_logits(model: Any, expected: dict[str, Any]) -> None:
    import torch

    ids = expected["input_ids"]
    everything = forward(model, ids)[0].logits
    for keep, rows in ((3, slice(-3, None)), (0, slice(None)), (torch.tensor([5, 0, 40]), [5, 0, 40])):
        kept = forward(model, ids, logits_to_keep=keep)[0].logits
        torch.testing.assert_close(kept, everything[:, rows], rtol=0, atol=1e-6)


def test_padded_and_cached_generation_continue_like_the_plain_forward(model: Any, expected: dict[str, Any]) -> None:
    import torch

    prompt = expected["input_ids"][:, :20]
    sequence = prompt
    for _ in range(6):
        following = forward(model, sequence)[0].logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, following], dim=1)
    padded = torch.nn.functional.pad(prompt, (4, 0), value=model.config.pad_token_id)
    mask = (torch.arange(24) >= 4).long()[None]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert model.generate(prompt, **options).tolist() == sequence.tolist()
    assert model.generate(padded, attention_mask=mask, **options)[:, 4:].tolist() == sequence.tolist()


def test_saved_and_loaded_again_it_is_bit_equal(model: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    """Also under the checkpoint's own names and shapes: vLLM loads what transformers saved."""
    import torch
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    original, saved = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in original)
    again = load(tmp_path)
    assert torch.equal(forward(model, expected["input_ids"])[0].logits, forward(again, expected["input_ids"])[0].logits)


def test_in_bfloat16_the_router_stays_in_float32(expected: dict[str, Any]) -> None:
    import torch

    model = load(CHECKPOINT, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype == gate.expert_bias.dtype == torch.float32
    _, gates, _ = forward(model, expected["input_ids"])
    assert {logits.dtype for logits, _, _ in gates} == {torch.float32}


def test_remote_code_pointers_lead_to_our_class(expected: dict[str, Any], tmp_path: Path) -> None:
    """The published config.json points to code in the checkpoint; here the pointers lead nowhere, ours is used."""
    from moediag.engines.hf.bailing import BailingMoeV2ForCausalLM

    pointers = {
        "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
        "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
    }
    folder = edited(tmp_path / "ring", auto_map=pointers)
    for options in ({"trust_remote_code": False}, {}):
        assert type(load(folder, **options)) is BailingMoeV2ForCausalLM


def test_what_config_leaves_out_is_filled_for_the_second_generation_only(tmp_path: Path) -> None:
    from moediag.engines.bailing_config import BailingMoeV2Config

    silent = ("score_function", "use_rmsnorm", "use_qk_norm", "router_dtype", "moe_router_enable_expert_bias")
    left_out = dict.fromkeys((*silent, "moe_shared_expert_intermediate_size", "rotary_dim"))
    config = BailingMoeV2Config.from_pretrained(edited(tmp_path / "v2", **left_out))
    assert [getattr(config, name) for name in silent] == ["sigmoid", True, True, "fp32", True]
    assert config.moe_shared_expert_intermediate_size == config.moe_intermediate_size
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    first = edited(tmp_path / "v1", **left_out, architectures=["BailingMoeForCausalLM"])
    assert {getattr(BailingMoeV2Config.from_pretrained(first), name) for name in silent} == {None}


def test_rotary_dim_alone_is_enough_and_may_not_contradict(tmp_path: Path) -> None:
    from moediag.engines.bailing_config import BailingMoeV2Config

    alone = edited(tmp_path / "alone", partial_rotary_factor=None)
    assert BailingMoeV2Config.from_pretrained(alone).rope_parameters["partial_rotary_factor"] == 0.5
    with pytest.raises(ValueError, match="rotary_dim = 8 and partial_rotary_factor = 0.5 of head_dim = 32 disagree"):
        BailingMoeV2Config.from_pretrained(edited(tmp_path / "both", rotary_dim=8))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"score_function": "softmax"}, "score_function = 'softmax' (expected 'sigmoid')"),
        ({"norm_head": True}, "norm_head = True (expected False)"),
        ({"router_dtype": "fp16"}, "router_dtype = 'fp16'"),
        ({"architectures": ["BailingMoeForCausalLM"], "score_function": None}, "score_function = None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    ],
)
def test_other_members_of_the_family_are_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a BailingMoeV2") as refusal:
        load(edited(tmp_path / "other", **entries))
    assert message in str(refusal.value)


def test_the_configuration_is_registered_without_loading_torch_models() -> None:
    """vLLM loads it in each of its processes."""
    code = (
        "import sys; from moediag.engines.bailing_config import register; register(); register(); "
        "from transformers import AutoConfig; "
        f"print(type(AutoConfig.from_pretrained({str(CHECKPOINT)!r})).__name__, "
        "'vllm' in sys.modules, 'transformers.modeling_utils' in sys.modules, "
        "'moediag.engines.hf.bailing' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["BailingMoeV2Config", "False", "False", "False"], done.stderr[-2000:]


@pytest.mark.engines
def test_vllms_own_model_gives_the_same_logprobs_and_experts(expected: dict[str, Any], tmp_path: Path) -> None:
    """vLLM finds the configuration through the entry point alone: the script below registers nothing."""
    import torch
    from safetensors.torch import load_file

    output = tmp_path / "vllm.safetensors"
    command = [sys.executable, __file__, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = load_file(output)
    log_probs = torch.log_softmax(expected["logits"][0], dim=-1)[:-1]
    logps = log_probs.gather(1, expected["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(found["logps"], logps, rtol=0, atol=1e-5)
    assert torch.equal(found["position_T"], torch.arange(48))
    for layer in MOE_LAYERS:
        ids, order = found["expert_ids_TLK"][:, layer].long().sort(dim=-1)
        wanted, wanted_order = expected[f"topk_ids_{layer}"].sort(dim=-1)
        assert torch.equal(ids, wanted)
        weights = found["gate_weights_TLK"][:, layer].gather(1, order)
        wanted_weights = expected[f"topk_w_{layer}"].gather(1, wanted_order)
        torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=1e-5)


def run_vllm(output: str) -> None:
    """Score the expected input with vLLM's model, taps on, and save log-probabilities and routing."""
    from moediag.engines.checkpoint import open_checkpoint
    from moediag.engines.vllm.options import FORCED, INFER_ENVIRONMENT

    os.environ.update({name: value for name, value in INFER_ENVIRONMENT.items() if name not in os.environ})
    import torch
    from safetensors.torch import load_file, save_file
    from vllm import LLM, SamplingParams

    ids = load_file(CHECKPOINT / "expected" / "expected.safetensors")["input_ids"][0].tolist()
    extension = "moediag.engines.vllm.worker.MoediagWorkerExtension"
    llm = LLM(str(CHECKPOINT), dtype="float32", max_model_len=64, worker_extension_cls=extension, **FORCED)
    spec = open_checkpoint(str(CHECKPOINT)).routing
    assert spec is not None
    llm.collective_rpc("moediag_install", args=(spec.record(), "full"))
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    entries = llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)[0].prompt_logprobs
    told = llm.collective_rpc("moediag_flush", args=(output,))[0]
    assert told["n_problems"] == 0, told
    logps = [entry[token].logprob for entry, token in zip(entries[1:], ids[1:], strict=True)]
    save_file({**load_file(output), "logps": torch.tensor(logps)}, output)


if __name__ == "__main__":
    run_vllm(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
