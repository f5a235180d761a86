"""What capture costs: generation and scoring time with capture over without, and bytes against the arithmetic.

    python benchmarks/capture_overhead.py [CKPT]

Every ratio is of two halves of one run, taken in turn (without, with, without, with, ...), so that a machine that
is busy is busy for both. The default checkpoint is the demo's MoE: so small that every tap weighs much more
than on a real model, hence an upper end. Needs the engines; each runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moediag.cli.demo import cache_folder
from moediag.demo.corpus import demo_prompts
from moediag.demo.pair import build_pair
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import Sampling, make_plan
from moediag.engines.routers import ModelRouting
from moediag.engines.vllm.options import FORCED, INFER_ENVIRONMENT
from moediag.run.capture import bytes_per_token
from moediag.run.reader import Run, open_run

N_PROMPTS, MAX_TOKENS, N_ROUNDS = 32, 128, 7
LEVELS = {"ids": "ids only", "margins": "ids, gate weights, margins", "full": "with full router logits"}


def paired_ratio(without: Callable[[], None], with_capture: Callable[[], None]) -> str:
    """Median and range of the time ratio over rounds that alternate."""
    ratios, seconds = [], []
    for _ in range(N_ROUNDS + 1):
        times = []
        for job in (without, with_capture):
            started = time.perf_counter()
            job()
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
        seconds.append(times[0])
    ratios, seconds = ratios[1:], seconds[1:]  # the first round warms up
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] (n = {N_ROUNDS} pairs, {np.median(seconds):.2f} s without)"


def infer(checkpoint: str, run: Run, folder: Path) -> None:
    """Generation in one vLLM engine, taps on and off."""
    os.environ.update({name: value for name, value in INFER_ENVIRONMENT.items() if name not in os.environ})
    from vllm import LLM, SamplingParams

    from moediag.engines.plan import load_prompt_tokens

    worker = "moediag.engines.vllm.worker.MoediagWorkerExtension"
    llm = LLM(model=checkpoint, dtype="bfloat16", max_model_len=512, worker_extension_cls=worker, **FORCED)
    prompts = [{"prompt_token_ids": prompt} for _, _, prompt, _ in load_prompt_tokens(run)]
    parameters = SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, logprobs=0, ignore_eos=True)

    def generate() -> None:
        llm.collective_rpc("moediag_remove")
        llm.generate(prompts, parameters, use_tqdm=False)

    for level, words in LEVELS.items():

        def generate_captured(level: str = level) -> None:
            llm.collective_rpc("moediag_install", args=(ModelRouting.of_routers(run.routers).record(), level))
            llm.generate(prompts, parameters, use_tqdm=False)
            llm.collective_rpc("moediag_flush", args=(str(folder / "rows.safetensors"),))

        say(f"generation time, vLLM, {words}: {paired_ratio(generate, generate_captured)}")


def train(checkpoint: str, run: Run, folder: Path) -> None:
    """Scoring in one transformers model, hooks on and off."""
    import torch

    from moediag.engines.hf.engine import load_model, score_sequence
    from moediag.engines.hf.taps import RoutingTaps
    from moediag.engines.plan import load_prompt_tokens

    model: Any = load_model(checkpoint, {"dtype": "bfloat16"})
    spec = ModelRouting.of_routers(run.routers)
    prompts = [torch.tensor((prompt * 4)[:320]) for _, _, prompt, _ in load_prompt_tokens(run)]

    def score(level: str | None) -> None:
        with torch.inference_mode():
            for ids in prompts:
                is_response = torch.arange(len(ids)) >= len(ids) // 2
                if level is None:
                    score_sequence(model, ids, is_response)
                    continue
                with RoutingTaps(model, spec, level) as taps:
                    score_sequence(model, ids, is_response)
                    taps.take(torch.arange(len(ids)))

    for level, words in LEVELS.items():
        ratio = paired_ratio(lambda: score(None), lambda level=level: score(level))
        say(f"scoring time, transformers, {words}: {ratio}")


def bytes_written(checkpoint: str, folder: Path) -> None:
    """Size of a captured run against the arithmetic of its arrays."""
    for level, option in (("ids", ["--ids-only"]), ("margins", []), ("full", ["--router-logits", "full"])):
        run = folder / f"run-{level}"
        command = ["profile", checkpoint, "--prompts", folder / "prompts.txt", "-o", run, "--max-tokens", MAX_TOKENS]
        command += ["--no-floors"]
        script = Path(sys.executable).with_name("moediag")
        subprocess.run([script, *map(str, command), *option], check=True, capture_output=True)
        opened = open_run(run)
        n_rows = sum(len(opened.tokens(shard)) for shard in opened.shards)
        for arm, weight_bytes in (("infer", 4), ("train", 2)):
            arrays, distributions = (size / n_rows for size in written(opened, arm))
            arithmetic = _bytes_by_arithmetic(opened, level, weight_bytes)
            say(
                f"bytes per token, {arm}, {LEVELS[level]}: {arrays:.1f} written, {arithmetic} by arithmetic, "
                f"ratio {arrays / arithmetic:.3f} (n = {n_rows} tokens); whole distributions, which small vocabularies "
                f"keep unasked: {distributions:.1f} beside it"
            )


def written(run: Run, arm: str) -> tuple[int, int]:
    """Bytes on disk of an arm's arrays, and of the whole next-token distributions beside them, sidecars included."""
    sizes = [0, 0]
    for path in (run.path / "arms" / arm).glob("shard-*"):
        sizes[".vocab." in path.name] += path.stat().st_size
    return sizes[0], sizes[1]


def _bytes_by_arithmetic(run: Run, level: str, weight_bytes: int) -> int:
    record = run.arm("infer")
    sizes = bytes_per_token(
        len(record.routers),
        record.top_k,
        record.n_experts,
        weight_bytes=weight_bytes,
        logits_bytes=2 if level == "full" else 0,
    )
    kept = ("logp_T", "entropy_T", "expert_ids_TLK") if level == "ids" else tuple(sizes)
    return sum(sizes[name] for name in kept)


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("infer", "train"):
        task, checkpoint, folder = arguments
        {"infer": infer, "train": train}[task](checkpoint, open_run(Path(folder) / "run"), Path(folder))
        sys.stdout.flush()
        os._exit(0)  # engines leave threads behind
    checkpoint = arguments[0] if arguments else str(build_pair(cache_folder())[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(" ".join(text.split()) for text in demo_prompts(N_PROMPTS)))
        plan = make_plan(open_checkpoint(checkpoint), prompts, Sampling(max_tokens=MAX_TOKENS))
        plan.create(folder / "run", force=False)
        say(f"checkpoint: {asdict(plan.checkpoint.routing) if plan.checkpoint.routing else 'dense'}")
        for task in ("infer", "train"):
            command = [sys.executable, __file__, task, checkpoint, name]
            env = {**INFER_ENVIRONMENT, **os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=env)
        bytes_written(checkpoint, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
