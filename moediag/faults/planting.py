"""Arms of engines with a fault: captured as any other, under the clean checkpoint's name."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.launch import ENGINES, Engines, Job, OnEvent, arm_options, fill_arm, proof_beside
from moediag.engines.process import Held, Reporter
from moediag.faults.catalogue import FAULTS, ROUNDING, plant
from moediag.run.capture import WHOLE
from moediag.run.recipes import ENGINE_WORDS, TRANSFORMERS
from moediag.run.writer import RunWriter


def fill_planted_arm(
    engines: Engines,
    writer: RunWriter,
    checkpoint: Checkpoint,
    request: ArmRequest,
    name: str,
    on_event: OnEvent,
) -> None:
    """Fill an arm whose engine has the fault.

    Args:
        checkpoint: of :func:`~moediag.faults.catalogue.planted_checkpoint` for a fault of the function, else the clean
            one.
        name: of the fault.

    Raises:
        MoediagError: what the engine process raised; a fault that capture itself refuses is refused here as well.
    """
    if FAULTS[name].kind != ROUNDING:
        fill_arm(engines, writer, checkpoint, request, on_event)
        return
    engine, run = ENGINES[request.engine], writer.run
    engine.require()
    writer.add_checkpoint(checkpoint.record)
    layers = list(checkpoint.routing.decoder_layers) if checkpoint.routing else []
    options = {**arm_options(checkpoint, request), "planted": name, "moe_layers": layers}
    log = str(run.path / "logs" / f"{request.arm}.log")
    task = "moediag.faults.planting:capture_planted"
    job = Job(ENGINE_WORDS[request.engine], task, str(run.path), asdict(WHOLE), options, log)
    with proof_beside(job, checkpoint, request) as proven:
        engines.do(proven, engine.environment(request.observer), on_event)


def capture_planted(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Capture an arm on a loaded model in which a fault of rounding is planted, and take it out again."""
    request = ArmRequest(**options["request"])
    planting = partial(plant, name=options["planted"], moe_layers=tuple(options["moe_layers"]))
    if request.engine == TRANSFORMERS:
        from moediag.engines.hf.engine import capture_train, held_model

        undo, capture = planting(held_model(held, options["folder"], request.options, reporter)), capture_train
    else:
        from moediag.engines.vllm.engine import capture_infer, held_llm

        llm = held_llm(held, options["folder"], request, reporter)
        undo, capture = llm.apply_model(planting)[0], capture_infer  # in this process: nothing is pickled
    try:
        capture(writer, options, reporter, held)
    finally:
        undo()
