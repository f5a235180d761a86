"""Small GRPO runs under a watched mismatch: reports/rl.md.

Run from the repository root, in one process or several of different seeds, then for the page::

    python benchmarks/rl.py FOLDER --seeds 0 2
    python benchmarks/rl.py FOLDER --seeds 1 3
    python benchmarks/rl_page.py FOLDER

The demo's MoE learns to write whole words. Rollouts by vLLM, log-probabilities included, gradients in transformers
(bfloat16 pass, float32 master weights), GRPO without KL, one update per batch, weights pushed after every update. A
run per correction and rollout engine; they advance a block of steps each in turn, so that whenever the command is
stopped all have as many steps, to a block. The same command goes on where it stopped: samples are seeded by run and
step.

Files: FOLDER/<engine>-<correction>-<seed>/ with the watch's steps.jsonl, train.jsonl (a row per step: reward, what the
correction masked, seconds by stage) and state.pt (weights and optimiser, after every block).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":  # before torch: vLLM's and torch's threads are made once
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from two_checkpoints import eight_bits

from moediag import Watch
from moediag.cli.demo import cache_folder
from moediag.corrections import weights
from moediag.demo.corpus import demo_prompts, training_text
from moediag.demo.pair import build_pair
from moediag.demo.tokenizer import END_OF_TEXT_ID, byte_tokenizer
from moediag.demo.train import MAX_LENGTH
from moediag.engines.vllm.options import infer_environment
from moediag.run.files import write_atomic

ENGINES: Final = ("bf16", "8-bit")
CORRECTIONS: Final = {"none": None, "tis": "tis", "icepop": "ring-1t"}
"""Name of a run -> preset that weighs its tokens."""
WATCHED: Final = ("ring-1t", "glm-5")
"""IcePop's band as its authors report it, 0.5 to 5, and the narrower one, 0.5 to 2."""

N_PROMPTS, N_SAMPLES = 16, 4
"""Of a step."""
PROMPT_BYTES, MAX_TOKENS = 40, 40
LEARNING_RATE = 3e-4
N_STEPS, BLOCK = 200, 10
SHORTEST_WORD: Final = 4


@dataclass
class Batch:
    """B = prompts x samples sequences of a step; T = longest of prompt and response.

    Args:
        ids_BT: token ids, padded on the right.
        logp_infer_BT: of each token as vLLM sampled it [nat]; NaN where none was sampled.
        reward_B: 0 to 1.
    """

    ids_BT: torch.Tensor
    logp_infer_BT: torch.Tensor
    reward_B: np.ndarray

    @property
    def mask(self) -> torch.Tensor:
        """(B, T), true where a token was sampled."""
        return self.logp_infer_BT.isfinite()


class Rollouts:
    """One vLLM engine, and what its responses earn; its weights are whatever was pushed last."""

    def __init__(self, checkpoint: Path, reward: Callable[[bytes], float]) -> None:
        self.reward = reward
        for name, value in infer_environment().items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self.llm = LLM(
            str(checkpoint), dtype="bfloat16", max_model_len=PROMPT_BYTES + MAX_TOKENS + 1, max_num_seqs=64,
            enforce_eager=True, enable_prefix_caching=False, generation_config="vllm", seed=0,
        )  # fmt: skip

    def push(self, state: dict[str, torch.Tensor]) -> None:
        """Give the engine the weights of the checkpoint's model, by transformers' names.

        vLLM's CPU build packs experts when it loads them; its ``reload_weights`` copies unpacked ones over them and
        packs nothing, which left the engine 1.7 nat off. With the second line it is what a fresh load is, bit for bit.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})
        self.llm.apply_model(_pack_experts)

    def sample(self, prompts: list[list[int]], seed: int) -> Batch:
        """N_SAMPLES responses to each prompt at temperature 1; the same seed gives the same ones."""
        from vllm import SamplingParams

        prompts = [ids for ids in prompts for _ in range(N_SAMPLES)]
        params = [
            SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, logprobs=0, seed=seed * len(prompts) + i)
            for i in range(len(prompts))
        ]
        found = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        length = max(len(ids) + len(one.outputs[0].token_ids) for ids, one in zip(prompts, found, strict=True))
        ids_BT = torch.full((len(prompts), length), END_OF_TEXT_ID)
        logp_BT = torch.full(ids_BT.shape, torch.nan)
        reward_B = np.zeros(len(prompts))
        for b, (ids, one) in enumerate(zip(prompts, found, strict=True)):
            response = list(one.outputs[0].token_ids)
            end = len(ids) + len(response)
            ids_BT[b, :end] = torch.tensor([*ids, *response])
            each = zip(response, one.outputs[0].logprobs, strict=True)
            logp_BT[b, len(ids) : end] = torch.tensor([of[token].logprob for token, of in each])
            reward_B[b] = self.reward(bytes(token for token in response if token < END_OF_TEXT_ID))
        return Batch(ids_BT, logp_BT, reward_B)


def _pack_experts(model: torch.nn.Module) -> None:
    for module in model.modules():
        if kernel := getattr(getattr(module, "quant_method", None), "moe_kernel", None):
            kernel.fused_experts.process_weights_after_loading(module)


@cache
def _words() -> frozenset[bytes]:
    return frozenset(re.findall(rb"[a-z]+", training_text().lower().encode()))


def known_words(response: bytes) -> float:
    """Share of a response's bytes that are in words of four letters or more that the corpus knows, each counted once.

    Example:
        >>> known_words(b"the value xqzt value")
        0.25
    """
    found = {one.lower() for one in re.findall(rb"[A-Za-z]+", response) if len(one) >= SHORTEST_WORD}
    return sum(map(len, found & _words())) / max(1, len(response))


class Policy:
    """The model that learns: a bfloat16 copy computes, float32 master weights take the updates."""

    def __init__(self, checkpoint: Path, learning_rate: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        self.masters = [p.detach().float().requires_grad_() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def logp(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every token of ``ids_BT`` and entropy where it was sampled, both (B, T) [nat]; 0 first."""
        logits = self.model(batch.ids_BT).logits[:, :-1].float()  # padding is behind what counts, so no mask
        logp_BTV = logits.log_softmax(-1)
        picked = logp_BTV.gather(-1, batch.ids_BT[:, 1:, None]).squeeze(-1)
        entropy = -(logp_BTV.detach().exp() * logp_BTV.detach()).sum(-1)
        first = torch.zeros(len(picked), 1)
        return torch.cat([first, picked], 1), torch.cat([first, entropy], 1)

    def update(self, loss: torch.Tensor) -> float:
        """One step of the optimiser; returns the norm of the gradient before it is clipped at 1."""
        loss.backward()
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.copy()
        return float(norm)

    def copy(self) -> None:
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)


@dataclass
class Run:
    """One training: a correction on a rollout engine with a seed."""

    folder: Path
    engine: str
    correction: str
    seed: int
    checkpoint: Path
    learning_rate: float = LEARNING_RATE
    step: int = 0
    policy: Policy = field(init=False)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder / f"{self.engine}-{self.correction}-{self.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.policy = Policy(self.checkpoint, self.learning_rate)
        self.watch = Watch(self.folder, corrections=WATCHED)
        if (path := self.folder / "state.pt").exists():
            known = torch.load(path)
            self.step = known["step"]
            self.policy.optimizer.load_state_dict(known["optimizer"])
            with torch.no_grad():
                for master, value in zip(self.policy.masters, known["masters"], strict=True):
                    master.copy_(value)
            self.policy.copy()
        rows = [row for row in rows_of(self.folder / "train.jsonl") if row["step"] < self.step]
        write_atomic(self.folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def save(self) -> None:
        known = {"step": self.step, "masters": self.policy.masters, "optimizer": self.policy.optimizer.state_dict()}
        partial = self.folder / "state.partial"
        torch.save(known, partial)
        partial.replace(self.folder / "state.pt")

    def weights(self) -> dict[str, torch.Tensor]:
        state = self.policy.model.state_dict()
        return state if self.engine == "bf16" else {name: eight_bits(name, weight) for name, weight in state.items()}

    def advance(self, rollouts: Rollouts) -> dict[str, Any]:
        """One step: push, sample, score, watch, update; its row of train.jsonl."""
        clock = Clock()
        rollouts.push(self.weights())
        clock.stage("push")
        draw = np.random.default_rng([self.seed, self.step])
        chosen = draw.choice(len(prompts()), N_PROMPTS, replace=False)
        # the same samples of a step for all corrections, as long as their weights are the same
        batch = rollouts.sample([prompts()[i] for i in chosen], seed=int(draw.integers(2**40)))
        clock.stage("rollout")
        logp_BT, entropy_BT = self.policy.logp(batch)
        clock.stage("forward")
        mask_BT = batch.mask
        given = batch.reward_B.reshape(N_PROMPTS, N_SAMPLES)
        advantage_B = ((given - given.mean(1, keepdims=True)) / (given.std(1, keepdims=True) + 1e-4)).reshape(-1)
        seen = self.watch.step(
            self.step, logp_BT, batch.logp_infer_BT, mask_BT, prompt_ids=np.repeat(chosen, N_SAMPLES),
            advantages=advantage_B, entropy=entropy_BT,
        )  # fmt: skip
        clock.stage("watch")
        weight_BT = mask_BT.float()
        if preset := CORRECTIONS[self.correction]:
            weight_BT = weights(preset, logp_BT.detach(), batch.logp_infer_BT, mask=mask_BT)
        gain_BT = weight_BT * torch.tensor(advantage_B, dtype=torch.float32)[:, None] * logp_BT
        loss = -gain_BT.masked_fill(~mask_BT, 0).sum() / mask_BT.sum()
        norm = self.policy.update(loss)
        clock.stage("update")
        row = {
            "step": self.step, "reward": float(batch.reward_B.mean()), "n_responses": len(batch.reward_B),
            "length": float(mask_BT.sum() / len(mask_BT)), "entropy": float(entropy_BT[mask_BT].mean()),
            "masked_share": float((weight_BT == 0)[mask_BT].float().mean()), "gradient_norm": norm,
            "findings": [one.rule for one in seen.findings],
            **{f"{name} [s]": value for name, value in clock.seconds.items()},
        }  # fmt: skip
        with (self.folder / "train.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.step += 1
        return row


@dataclass
class Clock:
    """Seconds by stage; a stage ends when it is named."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


@cache
def prompts() -> list[list[int]]:
    """Ends of the demo's held-out openings, from a word's start, as token ids."""
    ends = [text[-PROMPT_BYTES:].partition(" ")[2] + " " for text in demo_prompts(64)]
    return [byte_tokenizer(MAX_LENGTH)(text)["input_ids"] for text in ends]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a table of steps; [] where there is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    """Advance the runs of some seeds in turn, a block of steps each, to the last step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--checkpoint", type=Path, help="a Qwen3-MoE checkpoint; the demo's unless given")
    parser.add_argument("--only", default="", help="a run's name, such as bf16-none")
    args = parser.parse_args()
    checkpoint = args.checkpoint or build_pair(cache_folder())[0]
    rollouts = Rollouts(checkpoint, known_words)
    runs = [
        Run(args.folder, engine, correction, seed, checkpoint, args.learning_rate)
        for seed in args.seeds
        for engine in ENGINES
        for correction in CORRECTIONS
        if args.only in f"{engine}-{correction}"
    ]
    for end in range(BLOCK, args.steps + BLOCK, BLOCK):
        for run in runs:
            while run.step < min(end, args.steps):
                row = run.advance(rollouts)
                print(f"{run.folder.name} step {run.step}: reward {row['reward']:.3f}", flush=True)
                if run.step % BLOCK == 0 or run.step == args.steps:
                    run.save()


if __name__ == "__main__":
    main()
