"""A model too large for float32 is tested in its first layers, and no more is said of it than that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.first_layers import cut_to_first, n_first_layers, n_parameters_of_first
from moediag.run.reader import open_run
from moediag.selftest.families import FAMILIES, make_checkpoint

# GiB between what the first layers of these checkpoints take in float32 and what the whole takes
MEMORY = {"qwen3_moe": 0.0045, "phimoe": 0.0075}
N_LAYERS, N_PROMPTS = 6, 16


def deep(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Path:
    """A checkpoint of the family with six decoder layers."""
    known = FAMILIES[family]
    more = {**known.settings, "num_hidden_layers": N_LAYERS, **settings}
    monkeypatch.setitem(FAMILIES, family, replace(known, settings=more))
    return make_checkpoint(family, folder)


@pytest.mark.parametrize(
    ("family", "settings", "n_layers"),
    [
        ("qwen3_moe", {}, 3),  # a dense layer is the second
        ("glm4_moe", {"first_k_dense_replace": 3}, 5),
        ("gpt_oss", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 3}, 5),
        ("phimoe", {}, 2),
    ],
)
def test_every_kind_of_layer_is_kept_and_one_more(
    family: str, settings: dict[str, object], n_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(deep(family, tmp_path / "all", monkeypatch, **settings)))
    assert n_first_layers(checkpoint) == n_layers
    cut = cut_to_first(checkpoint, n_layers, tmp_path / "cut")
    assert cut.record.source.endswith(f"(first {n_layers} of {N_LAYERS} decoder layers)")
    assert cut.record.n_decoder_layers == n_layers
    before, after = load_file(checkpoint.weight_files[0]), load_file(cut.weight_files[0])
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert sum(tensor.numel() for tensor in after.values()) == n_parameters_of_first(checkpoint, n_layers)
    left = {name for name in before if name not in after}
    assert {int(name.split(".")[2]) for name in left} == set(range(n_layers, N_LAYERS))


def test_the_cut_model_is_the_first_layers_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hidden states are those of the whole behind the same layer, bit for bit."""
    checkpoint = open_checkpoint(str(deep("qwen3_moe", tmp_path / "all", monkeypatch)))
    cut = cut_to_first(checkpoint, 3, tmp_path / "cut")
    models = [AutoModelForCausalLM.from_pretrained(one.path).eval() for one in (checkpoint, cut)]
    seen: list[torch.Tensor] = []
    for model in models:
        model.model.layers[2].register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.inference_mode():
            model(torch.arange(3, 40)[None])
    assert torch.equal(*(one[0] if isinstance(one, tuple) else one for one in seen))


@pytest.mark.parametrize(
    ("family", "n_kept", "word"), [("qwen3_moe", 3, "no larger than rounding"), ("phimoe", 2, "different function")]
)
def test_a_model_too_large_for_float32_is_tested_in_its_first_layers(
    family: str, n_kept: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM never adds the bias of Phi-MoE's head: the cut model has that head, too."""
    checkpoint = deep(family, tmp_path / "all", monkeypatch)
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"The {nth}. statement of all\n" for nth in range(N_PROMPTS)))
    run_path = tmp_path / "run"
    said = run_here("diagnose", checkpoint, "--prompts", prompts, "-o", run_path, "--max-tokens", 16,
                    "--float32-memory", MEMORY[family], "--no-modules")  # fmt: skip
    assert said.returncode == 0, said.stderr
    summary = json.loads((run_path / "summary.json").read_text())
    first, verdict = summary["first_layers"], summary["verdict"]
    assert (first["n_layers"], first["n_all"], first["n_sequences"]) == (n_kept, N_LAYERS, N_PROMPTS)
    assert verdict["word"] == word
    part = f"the first {n_kept} of 6 decoder layers"
    assert part in verdict["reason"]
    assert any(line.startswith(part) for line in verdict["evidence"])
    assert summary["function"] is None
    cut = open_run(run_path / "first-layers")
    assert cut.arm("infer").dtype == cut.arm("train").dtype == "float32"
    assert cut.checkpoint(str(cut.record.checkpoint)).source.endswith(f"(first {n_kept} of 6 decoder layers)")
    assert not list(run_path.glob("cut-*"))
    again = run_here("diagnose", run_path)
    assert again.returncode == 0, again.stderr
    assert part in " ".join(again.stdout.split())
