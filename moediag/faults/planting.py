"""Faults planted: in a copy of a checkpoint, in a loaded model of either engine, in the arrays of an arm.

An arm with a fault is captured as any other, under the clean checkpoint's name.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from moediag.engines.arms import ArmRequest
from moediag.engines.checkpoint import Checkpoint
from moediag.engines.launch import ENGINES, Engines, Job, OnEvent, arm_options, fill_arm, proof_beside
from moediag.engines.process import Held, Reporter
from moediag.errors import CheckpointError
from moediag.faults.catalogue import FAULTS, Fault
from moediag.faults.edits import MOE, Tensors
from moediag.faults.loaded import Undo, both, matches
from moediag.run.capture import WHOLE, Capture
from moediag.run.recipes import ENGINE_WORDS, TRANSFORMERS
from moediag.run.writer import RunWriter

NO_MODULE: Final = "has no module for this"


def planted_checkpoint(
    clean: Checkpoint, fault: Fault, layer: int, folder: Path, dtypes: tuple[str, ...]
) -> Checkpoint:
    """An edited copy in ``folder``, which calls itself the clean checkpoint: same record, same routing, same proof.

    Args:
        layer: decoder layer that a fault of one layer is in.
        dtypes: that engines will load it in.

    Raises:
        CheckpointError: the checkpoint has nothing that the fault could change.
    """
    from safetensors.torch import load_file, save_file

    assert fault.edit is not None
    tensors: Tensors = {}
    for path in clean.weight_files:
        tensors |= load_file(path)
    config = json.loads(json.dumps(clean.config))
    if not fault.edit(tensors, config, layer if fault.of_layer else -1):
        raise CheckpointError(f"{clean.path} has nothing to change: {fault.words}; choose another layer or fault")
    shutil.copytree(clean.path, folder, dirs_exist_ok=True)
    for name in (*(path.name for path in clean.weight_files), "model.safetensors.index.json"):
        (folder / name).unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    planted = replace(clean, path=folder, config=config, weight_files=(folder / "model.safetensors",))
    routing, record = clean.routing, clean.record
    if routing is not None:
        for dtype in dtypes:
            clean.proof(dtype)
    vars(planted).update(record=record, routing=routing, digests=clean.digests, tensors=clean.tensors,
                         _proofs=clean._proofs)  # fmt: skip
    return planted


def plant(model: torch.nn.Module, name: str, moe_layers: tuple[int, ...]) -> Undo:
    """Set the fault's hooks in a loaded model of either engine; returns how to undo it.

    Args:
        name: of a fault of the loaded model.
        moe_layers: decoder layers that have routers.

    Raises:
        CheckpointError: the model has no such module.
    """
    fault = FAULTS[name]
    assert fault.hook is not None
    if fault.modules == "routers":
        from moediag.engines.vllm.worker import find_routers

        found: list[Any] = [router for _, _, router in find_routers(model)]
        if fault.with_bias:
            found = [router for router in found if getattr(router, "e_score_correction_bias", None) is not None]
    else:
        layers = moe_layers if fault.modules.startswith(MOE) else ()
        found = [module for path, module in model.named_modules() if matches(fault.modules, path, layers)]
    if not found:
        raise CheckpointError(f"{type(model).__name__} {NO_MODULE}: {fault.words}; choose another fault")
    return both(*[fault.hook(module) for module in found])


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
        checkpoint: of :func:`planted_checkpoint` where the fault has an edit of it, else the clean one.
        name: of the fault.

    Raises:
        MoediagError: what the engine process raised; a fault that capture itself refuses is refused here as well.
    """
    if FAULTS[name].hook is None:
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
    """Capture an arm on a loaded model in which a fault is planted, and take it out again."""
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


def spoil_arm(writer: RunWriter, arm: str, name: str) -> bool:
    """Write a captured arm again with a fault of the record in it; False where the arm has no array for it."""
    spoil, run = FAULTS[name].spoil, writer.run
    assert spoil is not None
    for shard in run.shards_of(arm):
        tokens, capture = run.tokens(shard), run.capture(arm, shard)
        arrays = {array: values.copy() for array, values in capture.arrays().items()}
        try:
            spoil(tokens, arrays)
        except KeyError:
            return False
        writer.write_capture(arm, shard, tokens, Capture(**arrays), {}, {}, run.load_vocab(arm, shard))
    return True
