"""Tasks for real engine processes that look at the engine itself, and the process to run them in.

Both ask vLLM for greedy tokens and log-probabilities with the taps, without them and after they were taken off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.launch import Engines, Job, arm_options, proof_beside
from moediag.engines.process import Held, Reporter, fill_missing_shards
from moediag.engines.vllm.options import INFER_ENVIRONMENT
from moediag.run.capture import WHOLE
from moediag.run.reader import Run
from moediag.run.writer import RunWriter
from moediag.selftest.probe import greedy

TESTS = Path(__file__).parent


@contextmanager
def engines_under(*folders: Path, **variables: str) -> Iterator[Engines]:
    """An engine process that can import from the folders, with environment variables as a user sets them."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        with Engines() as engines:
            yield engines


def run_probe(engines: Engines, task: str, run: Run, checkpoint: Checkpoint, request: ArmRequest, output: Path) -> None:
    """Have a task of this file done; what it saw is in ``output``."""
    RunWriter(run).add_checkpoint(checkpoint.record)
    told = {**arm_options(checkpoint, request), "output": str(output)}
    log = str(run.path / "logs" / "probe.log")
    job = Job("vLLM", f"probes:{task}", str(run.path), asdict(WHOLE), told, log)
    with proof_beside(job, checkpoint, request) as proven:
        engines.do(proven, INFER_ENVIRONMENT, lambda event: None)


def probe_family(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Captures the run's infer arm; is greedy decoding bit-equal with the taps, without and with them again?"""
    from moediag.engines.vllm.engine import capture_infer, held_llm

    capture_infer(writer, options, reporter, held)
    llm = held_llm(held, options["folder"], ArmRequest(**options["request"]), reporter)
    prompts = writer.run.prompt_tokens()[0][:4]
    results = [greedy(llm, prompts)]
    llm.collective_rpc("moediag_remove")
    results.append(greedy(llm, prompts))
    llm.collective_rpc("moediag_install", args=(options["routing"], "margins"))
    results.append(greedy(llm, prompts))
    ids_equal = all((ids == results[0][0]).all() for ids, _ in results)
    logps_equal = all((logps == results[0][1]).all() for _, logps in results)
    told = {"ids_equal": bool(ids_equal), "logps_equal": bool(logps_equal), **_model_of(llm)}
    Path(options["output"]).write_text(json.dumps(told))


def probe_unobserved(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Captures the run's infer arm without its routing."""
    from moediag.engines.vllm.engine import capture_infer, held_llm

    capture_infer(writer, options, reporter, held)
    llm = held_llm(held, options["folder"], ArmRequest(**options["request"]), reporter)
    Path(options["output"]).write_text(json.dumps(_model_of(llm)))


def probe_rope(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """How far vLLM's rope kernel is from its own PyTorch rope: of query and key, in the layout of ordinary attention
    and in that of latent attention."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        parameters = {"rope_theta": 10000.0, "rope_type": "default"}
        rope = get_rope(64, 256, rope_parameters=parameters, is_neox_style=False, dtype=torch.float32)
        torch.manual_seed(0)
        q, fused, position = torch.randn(5, 2, 96)[..., 32:], torch.randn(5, 608), torch.arange(5)
        k = fused[:, -64:].unsqueeze(1)
        plain = rope.forward_native(position, q.clone(), k.clone())
        flat = rope.forward_cpu(position, q.flatten(1).contiguous(), k.flatten(1).contiguous())
        sliced = rope.forward_cpu(position, q, k)
    off = [[float((a[i].reshape(plain[i].shape) - plain[i]).abs().max()) for a in (flat, sliced)] for i in (0, 1)]
    Path(options["output"]).write_text(json.dumps(off))


def _model_of(llm: Any) -> dict[str, str]:
    """The class of vLLM's model, and whose code routes: vLLM's backend for transformers' models has two ways."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    modules = {type(module).__name__ for module in model.modules()}
    return {
        "vllm_class": type(model).__name__,
        "routing_code": "transformers" if "TransformersMoERunner" in modules or "MoERunner" not in modules else "vLLM",
    }


def probe_observation(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """One engine start answers two questions, of a run of given completions made with ``--full-vocab``.

    Are greedy tokens and log-probabilities the same before the taps, with them, with whole distributions kept, and
    after all was taken off; and does the prefill of given tokens keep the same distributions as their decoding did?
    """
    from moediag.engines.vllm.engine import InferEngine, held_llm

    request = ArmRequest(**options["request"])
    run, llm = writer.run, held_llm(held, options["folder"], request, reporter)
    prompts = run.prompt_tokens()[0]
    seen = {"plain": greedy(llm, prompts)}
    engine = InferEngine(writer, llm, request, options["routing"])
    writer.begin_arm(engine.arm_record(options["checkpoint"], options["configuration"]), engine.correction_bias())
    fill_missing_shards(writer, "infer", reporter, engine.capture_shard)
    seen["tapped"] = greedy(llm, prompts)
    # vLLM counts its own requests; whichever numbers it has reached, all of them keep whole distributions
    everyone = {str(request_id): 0 for request_id in range(1000)}
    llm.collective_rpc("moediag_begin", args=(None, everyone))
    seen["vocabulary"] = greedy(llm, prompts)
    n_kept = engine._rows(run.shards[0])[1]["vocab_logps_NV"].shape[0]
    llm.collective_rpc("moediag_remove")
    seen["after"] = greedy(llm, prompts)
    arrays = {f"{name}_{what}": array for name, pair in seen.items()
              for what, array in zip(("ids", "logps"), pair, strict=True)}  # fmt: skip
    np.savez(options["output"], n_kept=n_kept, **arrays)
