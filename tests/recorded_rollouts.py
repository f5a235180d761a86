"""Rollouts as another framework records them: vLLM's own processed log-probabilities, and what writing a dump does.

A task of an engine process samples with vLLM's ``logprobs_mode="processed_logprobs"``; every setting becomes a dump of
one row per sequence, which the importer of plain sequences reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.engines.launch import Job
from moediag.engines.process import Held, Reporter
from moediag.engines.vllm.options import INFER_ENVIRONMENT
from moediag.run.capture import WHOLE
from moediag.run.reader import Run
from moediag.run.writer import RunWriter

TESTS = Path(__file__).parent


def sample(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Sample the run's prompts in vLLM under every setting, and write what it gives as processed log-probabilities.

    Args:
        options: ``folder`` of the checkpoint, ``dtype``; ``settings``: name -> vLLM's sampling parameters; ``output``.
    """
    from vllm import SamplingParams

    from moediag.engines.vllm.engine import _let_go

    def load() -> Any:
        from vllm import LLM

        return LLM(model=options["folder"], dtype=options["dtype"], max_model_len=options["max_model_len"],
                   enforce_eager=True, enable_prefix_caching=False, async_scheduling=False, generation_config="vllm",
                   logprobs_mode="processed_logprobs")  # fmt: skip

    llm = held.get(("processed", options["folder"], options["dtype"]), load, _let_go)
    prompts = [{"prompt_token_ids": ids} for ids in writer.run.prompt_tokens()[0]]
    for name, setting in options["settings"].items():
        import torch

        torch.manual_seed(int(setting.get("seed", 0)))  # of the process: the CPU runner takes no seed of a request
        kind = {key: value for key, value in setting.items() if key != "seed"}
        outputs = llm.generate(prompts, SamplingParams(logprobs=0, detokenize=False, **kind), use_tqdm=False)
        records = [
            {
                "prompt_id": i,
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(one.token_ids),
                "logprobs": [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)],
            }
            for i, output in enumerate(outputs)
            for one in output.outputs
        ]
        write_dump(Path(options["output"]) / f"{name}.jsonl", records)


def record(engines: Any, run: Run, folder: Path, dtype: str, settings: dict[str, dict[str, Any]], output: Path) -> None:
    """Have :func:`sample` done by an engine process that can import this file: a dump per setting in ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    options = {"folder": str(folder), "dtype": dtype, "settings": settings, "output": str(output), "max_model_len": 512}
    job = Job("vLLM", "recorded_rollouts:sample", str(run.path), asdict(WHOLE), options, str(output / "sample.log"))
    engines.do(job, INFER_ENVIRONMENT, lambda event: None)


def read_dump(path: Path) -> list[dict[str, Any]]:
    """The rows of a dump."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_dump(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Rows as a dump."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def rewritten(source: Path, target: Path, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Path:
    """The dump as a framework writes it that does something to every sequence's log-probabilities."""
    records = read_dump(source)
    changed = [{**one, "logprobs": change(np.array(one["logprobs"], np.float64)).tolist()} for one in records]
    return write_dump(target, changed)


def shifted(logps_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each token gets its predecessor's log-probability, the first one 0: labels that were not shifted."""
    return np.r_[0.0, logps_T[:-1]]


def in_bfloat16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to bfloat16, nearest even, as a tensor of that dtype holds it."""
    import torch

    return torch.from_numpy(values).to(torch.float32).bfloat16().double().numpy()


def in_float16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to float16."""
    return values.astype(np.float16).astype(np.float64)


def in_decimals(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """As a text log prints them: four decimals."""
    return np.round(values, 4)
