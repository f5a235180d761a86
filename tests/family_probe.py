"""Captures the infer arm of several runs in one vLLM process: `python family_probe.py RUN=CKPT ...`.

For each run it also asks, in the same engine: are greedy tokens and log-probabilities bit-equal with the taps, without
them and after they were taken off? A JSON line per run says so, or says what stopped it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from families import ENGINE_OPTIONS
from vllm_probe import Silent, greedy

from moediag.engines.arms import ArmRequest
from moediag.engines.fill import fill_missing_shards
from moediag.engines.launch import INFER_ENVIRONMENT
from moediag.run.reader import Run, open_run


def capture(run: Run, checkpoint: str) -> dict[str, Any]:
    from moediag.engines.vllm_engine import InferEngine

    options = ENGINE_OPTIONS.get(Path(checkpoint).name, {})
    request = ArmRequest("infer", {"dtype": run.model["stored_dtype"], "max_model_len": 256, **options})
    engine = InferEngine(run, checkpoint, request)
    run.begin_arm("infer", engine.arm_record(request.configuration()), engine.correction_bias())
    fill_missing_shards(run, "infer", Silent(), engine.capture_shard)  # type: ignore[arg-type]
    prompts = [prompt for _, _, prompt, _ in engine.prompts[:4]]
    results = [greedy(engine.llm, prompts)]
    engine.llm.collective_rpc("moediag_remove")
    results.append(greedy(engine.llm, prompts))
    engine.llm.collective_rpc("moediag_install", args=(run.model["routing"], "margins"))
    results.append(greedy(engine.llm, prompts))
    ids_equal = all((ids == results[0][0]).all() for ids, _ in results)
    logps_equal = all((logps == results[0][1]).all() for _, logps in results)
    return {"ids_equal": bool(ids_equal), "logps_equal": bool(logps_equal)}


def main(jobs: list[str]) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for job in jobs:
        path, checkpoint = job.split("=", 1)
        try:
            told = capture(open_run(path), checkpoint)
        except Exception as error:  # the next family is to be tried all the same
            import traceback

            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps({"run": path, **told}), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ.update({name: value for name, value in INFER_ENVIRONMENT.items() if name not in os.environ})
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
