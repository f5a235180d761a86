"""Faults of the catalogue, and smaller ones, planted in what one engine loads: the module that must be named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moediag.audit.modules import DoesJobs, Rows, compare_modules
from moediag.demo.tokenizer import byte_tokenizer
from moediag.diagnosis.modules import ModuleChecks
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.faults import FAULTS as CATALOGUE
from moediag.faults import FUNCTION, Fault, planted_checkpoint
from moediag.faults.edits import (
    BIAS,
    EMBEDDINGS,
    FINAL_NORM,
    MOE,
    Edit,
    entry,
    head,
    layers_tensors,
    models_tensors,
    noisy,
    scaled,
)
from moediag.run.reader import Run
from moediag.selftest.families import _COMMON, FAMILIES, MAX_LENGTH, make_checkpoint, randomise

DENSE = "qwen3"
"""A dense model type."""


@dataclass(frozen=True)
class Planted:
    """A fault, and the module and decoder layer that are off (-1 = none)."""

    module: str
    layer: int
    fault: Fault


def _known(module: str, layer: int, name: str) -> Planted:
    return Planted(module, layer, CATALOGUE[name])


def _small(module: str, layer: int, edit: Edit) -> Planted:
    """Too small for the log-probabilities of a run to tell: modules on the same inputs do."""
    return Planted(
        module, layer, Fault("as small as a module check can tell", FUNCTION, (), of_layer=layer >= 0, edit=edit)
    )


_1_PC = scaled(1.01)
_EVERYWHERE = {
    "rope theta by 5 %": _known("attention (self_attn)", 0, "rope-theta"),
    "embeddings": _small("embeddings", -1, models_tensors(_1_PC, EMBEDDINGS)),
    "a norm's weight": _small(
        "post_attention_layernorm", 1, layers_tensors(_1_PC, r"post_attention_layernorm\.weight")
    ),
    "final norm": _small("final norm (norm)", -1, models_tensors(_1_PC, FINAL_NORM)),
    "head": _small("head", -1, head(_1_PC)),
}
_MOE = {
    **_EVERYWHERE,
    "router by 1 %": _small("router", 2, layers_tensors(_1_PC, rf"{MOE}\.(?:gate|router)\.(?:weight|bias)")),
}
FAULTS: dict[str, dict[str, Planted]] = {
    "qwen3_moe": {
        **_MOE,
        "attention scale": _known("attention (self_attn)", 1, "attention-scale"),
        "one expert": _known("routed experts", 2, "expert-redrawn"),
        "dense MLP": _small("mlp", 1, layers_tensors(_1_PC, rf"{MOE}\.down_proj\.weight")),
        "renormalisation off": _known("routing rule", 0, "renormalisation"),
    },
    "glm4_moe": {
        **_MOE,
        "attention scale": _known("attention (self_attn)", 1, "attention-scale"),
        "one expert": _known("routed experts", 2, "expert-redrawn"),
        "shared expert": _small(
            "shared experts", 1, layers_tensors(_1_PC, rf"{MOE}\.shared_experts\.down_proj\.weight")
        ),
        "correction bias": _small("routing rule", 2, layers_tensors(noisy(1.0), BIAS)),
        "scaling factor": _known("routing rule", 1, "scaling-factor"),
        "renormalisation off": _known("routing rule", 1, "renormalisation"),
    },
    "gpt_oss": {
        **_MOE,
        "attention scale": _known("attention (self_attn)", 1, "attention-scale"),
        "one expert": _known("routed experts", 2, "expert-redrawn"),
        "sliding window": _known("attention (self_attn)", 0, "sliding-window"),
        "attention sink": _known("attention (self_attn)", 1, "attention-sink"),
    },
    "granitemoe": {
        "residual multiplier": _known("residual stream into post_attention_layernorm", 0, "residual-multiplier"),
        "logits scaling": _small("head", -1, entry("logits_scaling", lambda factor: factor + 0.1, float)),
        "attention multiplier": _known("attention (self_attn)", 0, "attention-multiplier"),
    },
    DENSE: {
        **_EVERYWHERE,
        "attention scale": _known("attention (self_attn)", 1, "attention-scale"),
        "MLP": _small("mlp", 2, layers_tensors(_1_PC, rf"{MOE}\.down_proj\.weight")),
    },
}
"""By family, fault by fault."""


def checkpoint_of(family: str, folder: Path, dtype: torch.dtype) -> Path:
    """A tiny checkpoint of a family, or of the dense model type."""
    if family in FAMILIES:
        return make_checkpoint(family, folder, dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_COMMON)).eval()
    randomise(model, 1)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)
    return folder


def plant(clean: Path, folder: Path, planted: Planted) -> Path:
    """A copy of a checkpoint with the fault."""
    return planted_checkpoint(open_checkpoint(str(clean)), planted.fault, planted.layer, folder, ()).path


class ModuleBench:
    """A clean checkpoint of a family, a run to work in, and token rows that do not depend on it."""

    def __init__(self, engines: DoesJobs, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.engines, self.family, self.folder = engines, family, folder
        self.dtype = str(dtype).removeprefix("torch.")
        self.clean = checkpoint_of(family, folder / "clean", dtype)
        prompts = folder / "p.txt"
        prompts.write_text("The for statement")
        plan = make_plan(open_checkpoint(str(self.clean)), prompts, SamplingOptions(max_tokens=2))
        self.run: Run = plan.create(folder / "run", False)
        generator = torch.Generator().manual_seed(1)
        lengths = (70, 40)
        self.rows = [
            Rows(i, torch.randint(0, 256, (n,), generator=generator).tolist(), list(range(n // 2, n - 1)))
            for i, n in enumerate(lengths)
        ]

    def check(self, train: Path | None = None, infer: Path | None = None) -> ModuleChecks:
        """The modules of both engines, of the clean checkpoint where no other is given."""
        options = {**(FAMILIES[self.family].engine if self.family in FAMILIES else {}), "max_model_len": 128}
        return compare_modules(
            self.engines,
            self.run,
            (open_checkpoint(str(train or self.clean)), open_checkpoint(str(infer or self.clean))),
            self.rows,
            self.dtype,
            ({}, options),
            lambda event: None,
        )

    def named(self, name: str, side: str) -> tuple[str, int, ModuleChecks]:
        """The first module that is off, and its decoder layer, with a fault planted in what one engine loads."""
        fault, stem = FAULTS[self.family][name], name.replace(" ", "-").replace("%", "")
        folder = self.folder / f"{stem}-{side}"
        checked = self.check(**{side: plant(self.clean, folder, fault)})
        return (*first_off(checked), checked)


def first_off(checked: ModuleChecks) -> tuple[str, int]:
    """Module and decoder layer of the first that is off; empty and -1 where none is."""
    off = checked.frame[checked.frame["verdict"] == "another function"]
    return ("", -1) if off.empty else (str(off.iloc[0]["module"]), int(off.iloc[0]["decoder_layer"]))
