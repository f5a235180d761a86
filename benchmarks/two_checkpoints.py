"""What another checkpoint on vLLM's side looks like beside rounding and real faults: reports/two_checkpoints.md.

Run from the repository root: ``python benchmarks/two_checkpoints.py FOLDER > reports/two_checkpoints.md``. The demo's
MoE is trained once more and saved before its end as well; transformers always scores the last step, in bfloat16.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moediag.demo.corpus import demo_prompts, training_text
from moediag.demo.tokenizer import byte_tokenizer
from moediag.demo.train import MAX_LENGTH, MOE, _backward, _batch, _fresh_model, _optimizer, _schedule

OLDER = (297, 285)
N_PROMPTS = 32
OPTIONS = ("--max-tokens", "128", "--router-logits", "full")


def main(folder: Path) -> None:
    """Make the checkpoints, profile each against the last, print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last"
    if not last.exists():
        _train(folder)
        _rounded_to_8_bits(last, folder / "8 bits")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in demo_prompts(N_PROMPTS)))
    others = {"the same": None, "rounded to 8 bits": folder / "8 bits"}
    others |= {f"step {step} of {MOE.n_steps}": folder / f"step {step}" for step in OLDER}
    rows = [_row(name, _profile(last, other, prompts, folder / f"run {name}")) for name, other in others.items()]
    print(__doc__.splitlines()[0].replace(": reports/two_checkpoints.md.", "."), "\n")
    print(
        f"The demo's MoE ({MOE.n_experts} experts, top-{MOE.n_active_experts}), {N_PROMPTS} prompts; transformers "
        "loads the last step in bfloat16, vLLM what the first column says. 95 % intervals clustered by prompt; lower "
        "is better.\n"
    )
    header = ["vLLM loads", "weights", "mean abs logp diff [nat]", "over the rounding scale", "p99 [nat]", "k3 [nat]",
              "tokens with any flip", "n tokens", "verdict"]  # fmt: skip
    print("| " + " | ".join(header) + " |\n|" + ":--|" * len(header))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


def _train(folder: Path) -> None:
    """As the demo does, and on the way."""
    torch.set_num_threads(1)
    model = _fresh_model(MOE)
    ids_N = torch.tensor(byte_tokenizer(MAX_LENGTH)(training_text(), verbose=False)["input_ids"])
    step_with, windows = _optimizer(model, MOE), torch.Generator().manual_seed(MOE.seed)
    for step in range(MOE.n_steps):
        _backward(model, MOE, _batch(ids_N, MOE, windows))
        step_with(_schedule(step, MOE))
        model.zero_grad()
        if step + 1 in OLDER:
            _save(model, folder / f"step {step + 1}")
    _save(model, folder / "last")


def _save(model: Any, folder: Path) -> None:
    import copy

    copy.deepcopy(model).eval().to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)


def _rounded_to_8_bits(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        rounded = {name: eight_bits(name, weight).contiguous() for name, weight in load_file(file).items()}
        save_file(rounded, file, metadata={"format": "pt"})


def eight_bits(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A matrix of attention or experts as float8 e4m3 with one scale per row, in its own dtype again; others as is."""
    if weight.ndim < 2 or "embed" in name or ".gate.weight" in name or "lm_head" in name:
        return weight
    scale = weight.float().abs().amax(-1, keepdim=True) / 448
    return ((weight.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def _profile(trained: Path, other: Path | None, prompts: Path, run: Path) -> dict[str, Any]:
    moediag = Path(sys.executable).with_name("moediag")
    more = [] if other is None else ["--infer-checkpoint", str(other)]
    command = [str(moediag), "profile", str(trained), *more, "--prompts", str(prompts), "-o", str(run), *OPTIONS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def _row(name: str, summary: dict[str, Any]) -> list[str]:
    pair, rounding = summary["pairs"][summary["main_pair"]], summary["floors"]["rounding"]
    logp, routing, weights = pair["logp"], pair["routing"], summary["weights"]
    mean = logp["abs_logp_diff"]["mean"]
    return [
        name,
        "equal" if weights is None else weights["comparison"]["summary"],
        _with_bounds(mean, logp["abs_logp_diff"]["mean_ci"]),
        f"{mean / rounding['mean']:.3g}x",
        f"{logp['abs_logp_diff']['p99']:.3g}",
        _with_bounds(logp["kl_infer_train_k3"], logp["kl_infer_train_k3_ci"]),
        f"{100 * routing['any_layer_share']:.3g} %",
        f"{pair['n_tokens']:,}",
        summary["verdict"]["word"],
    ]


def _with_bounds(value: float, bounds: list[float] | None) -> str:
    return f"{value:.3g}" + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
