"""Runs vLLM in a process of its own for test_engines_observation.py: `python vllm_probe.py RUN OUT.npz`.

One engine start answers two questions: are greedy tokens and log-probabilities the same with the taps, without
them and after they were taken off; and what is the full next-token distribution behind every response token?
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moediag.engines.launch import FORCED, INFER_ENVIRONMENT
from moediag.engines.plan import load_prompt_tokens
from moediag.run.directory import Run, open_run


def greedy(llm: Any, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=48, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    logps = [
        [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        for output, tokens in zip(outputs, ids, strict=True)
    ]
    return np.array(ids), np.array(logps)


def distributions(llm: Any, run: Run, n_vocabulary: int) -> np.ndarray:
    """Full log-probabilities (response tokens, V) of every response token, in the order of the token table."""
    from vllm import SamplingParams

    # flat and not decoded: a dict of 257 objects per position would take minutes to build
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=n_vocabulary, flat_logprobs=True, detokenize=False)
    rows = []
    for shard in run.shards:
        tokens = run.tokens(shard)
        for start, end in tokens.sequence_bounds():
            ids = tokens.token_id_T[start:end].tolist()
            flat = llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)[0].prompt_logprobs
            first = int(np.argmax(tokens.is_response_T[start:end]))
            row = np.full((len(ids), n_vocabulary), np.nan, np.float32)
            counts = np.array(flat.end_indices) - np.array(flat.start_indices)
            row[np.repeat(np.arange(len(ids)), counts), flat.token_ids] = flat.logprobs
            rows.append(row[first:])
    return np.concatenate(rows)


def main(run_path: str, checkpoint: str, output: str) -> None:
    from vllm import LLM

    run = open_run(run_path)
    llm = LLM(
        model=checkpoint,
        dtype="bfloat16",
        max_model_len=1024,
        max_logprobs=257,
        worker_extension_cls="moediag.engines.vllm_worker.MoediagWorkerExtension",
        **FORCED,
    )
    prompts = [prompt for _, _, prompt, _ in load_prompt_tokens(run)[:8]]
    plain = greedy(llm, prompts)
    llm.collective_rpc("moediag_install", args=(run.model["routing"], "full"))
    tapped = greedy(llm, prompts)
    rows = Path(output).with_suffix(".safetensors")
    llm.collective_rpc("moediag_flush", args=(str(rows),))
    llm.collective_rpc("moediag_remove")
    after = greedy(llm, prompts)
    np.savez(
        output,
        **{f"{name}_{what}": array for name, pair in (("plain", plain), ("tapped", tapped), ("after", after))
           for what, array in zip(("ids", "logps"), pair, strict=True)},
        log_probs=distributions(llm, run, 257),
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.update({name: value for name, value in INFER_ENVIRONMENT.items() if name not in os.environ})
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
