"""Runs vLLM in a process of its own for test_engines_observation.py: `python vllm_probe.py RUN CKPT OUT.npz`.

One engine start answers two questions: are greedy tokens and log-probabilities the same before the taps, with them,
with whole distributions kept, and after all was taken off; and does the prefill of given tokens keep the same
distributions as their decoding did? RUN is a run of given completions, made with ``--full-vocab``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from moediag.engines.arms import PREFILL, ArmRequest
from moediag.engines.fill import fill_missing_shards
from moediag.engines.launch import INFER_ENVIRONMENT
from moediag.run.reader import open_run


class Silent:
    def progress(self, done: float, total: int, unit: str) -> None:
        pass


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


def main(run_path: str, checkpoint: str, output: str) -> None:
    from moediag.engines.vllm_engine import InferEngine

    class Watched(InferEngine):
        """Also says what vLLM gave before its taps were set."""

        def _install(self) -> list[dict[str, Any]]:
            self.plain = greedy(self.llm, prompts)
            return super()._install()

    run = open_run(run_path)
    prompts = run.prompt_tokens()[0]
    request = ArmRequest("infer", {"dtype": "bfloat16", "max_model_len": 512}, path=PREFILL)
    engine = Watched(run, checkpoint, request)
    run.begin_arm("infer", engine.arm_record(request.configuration()), engine.correction_bias())
    fill_missing_shards(run, "infer", Silent(), engine.capture_shard)  # type: ignore[arg-type]
    seen = {"plain": engine.plain, "tapped": greedy(engine.llm, prompts)}
    # vLLM counts its own requests; whichever numbers it has reached, all of them keep whole distributions
    everyone = {str(request_id): 0 for request_id in range(1000)}
    engine.llm.collective_rpc("moediag_begin", args=(None, everyone))
    seen["vocabulary"] = greedy(engine.llm, prompts)
    n_kept = engine._rows(run.shards[0])[1]["vocab_logps_NV"].shape[0]
    engine.llm.collective_rpc("moediag_remove")
    seen["after"] = greedy(engine.llm, prompts)
    arrays = {f"{name}_{what}": array for name, pair in seen.items()
              for what, array in zip(("ids", "logps"), pair, strict=True)}  # fmt: skip
    np.savez(output, n_kept=n_kept, **arrays)


if __name__ == "__main__":
    os.environ.update({name: value for name, value in INFER_ENVIRONMENT.items() if name not in os.environ})
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
