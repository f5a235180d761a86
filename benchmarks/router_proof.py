"""What the proof of a router's rule costs: tiny checkpoints, and routers of a real model's size.

    python benchmarks/router_proof.py [--layers 48] [--experts 128] [--hidden 2048]

The large checkpoint is a Qwen3-MoE whose stored tensors are its routers and nothing else: nothing else is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.hf.routing import router_skeleton, show_routers
from moediag.engines.proof import Probes, fit, hints_of
from moediag.engines.routers import text_config
from moediag.selftest.families import FAMILIES, make_checkpoint


def make_routers(folder: Path, n_layers: int, n_experts: int, n_hidden: int) -> Path:
    """A checkpoint folder with the routers of a model of that size, bfloat16."""
    config = Qwen3MoeConfig(
        hidden_size=n_hidden, num_hidden_layers=n_layers, num_experts=n_experts, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.mlp.gate.weight": torch.randn(n_experts, n_hidden, generator=generator).bfloat16()
        for layer in range(n_layers)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def timed(folder: Path) -> str:
    """Seconds of each step, in words."""
    checkpoint = open_checkpoint(str(folder))
    text = text_config(json.loads((folder / "config.json").read_text()))
    start = time.perf_counter()
    model = router_skeleton(checkpoint.path, checkpoint.weight_files, getattr(torch, checkpoint.stored_dtype))
    built = time.perf_counter()
    hints = hints_of(text, has_shared=False)
    shown = show_routers(model, Probes(checkpoint.stored_dtype, tuple(n for n, _ in hints.groups)))
    run = time.perf_counter()
    fitted = fit(shown, hints)
    end = time.perf_counter()
    assert fitted.rule is not None
    steps = f"build {built - start:.2f}, run {run - built:.2f}, fit {end - run:.2f}"
    return f"{end - start:.2f} s ({steps}); {len(shown)} layers, {fitted.n_rows} rows, {fitted.n_apart} near ties apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in FAMILIES:
            print(f"{name}: {timed(make_checkpoint(name, Path(temporary) / name))}")
        large = make_routers(Path(temporary) / "large", given.layers, given.experts, given.hidden)
        print(f"{given.layers} layers, E = {given.experts}, H = {given.hidden}: {timed(large)}")


if __name__ == "__main__":
    main()
