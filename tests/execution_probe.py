"""Captures the infer arm under the settings named, each in a run directory of its own, in one process.

`python execution_probe.py CKPT FOLDER NAME ...` (see :mod:`execution_measures`); a JSON line per setting.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from execution_settings import MAX_MODEL_LEN, SETTINGS, Setting

from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.launch import infer_environment, infer_options
from moediag.engines.plan import Sampling, make_plan


class Silent:
    def progress(self, done: float, total: int, unit: str) -> None:
        pass

    def stage(self, text: str) -> None:
        pass


def capture(setting: Setting, checkpoint: str, folder: Path, path: Path) -> None:
    from moediag.engines.vllm_engine import capture_infer

    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **setting.sampling})
    plan = make_plan(
        open_checkpoint(checkpoint), folder / "prompts.jsonl", sampling, shard_size=6, ids_only=setting.ids_only
    )
    run = plan.create(path, force=False)
    engine = infer_options(setting.vllm, setting.observer, dtype=setting.dtype, max_model_len=MAX_MODEL_LEN)
    request = ArmRequest("infer", engine, observer=setting.observer)
    options = {"checkpoint": checkpoint, "request": asdict(request), "configuration": request.configuration()}
    capture_infer(run, options, Silent())  # type: ignore[arg-type]


def main(checkpoint: str, folder: str, names: list[str]) -> None:
    for name, value in infer_environment(SETTINGS[names[0]].observer).items():
        os.environ.setdefault(name, value)
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for name in names:
        path = Path(folder) / name
        try:
            capture(SETTINGS[name], checkpoint, Path(folder), path)
            told = {"name": name}
        except Exception as error:  # the next setting is to be tried all the same
            import traceback

            traceback.print_exc()
            told = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps(told), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)  # vLLM's workers and engine core outlive the process that started them
