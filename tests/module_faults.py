"""Faults planted in the checkpoint that one engine loads, while the other loads the clean one: what must be named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moediag.audit.modules import DoesJobs, Rows, compare_modules
from moediag.demo.tokenizer import byte_tokenizer
from moediag.diagnosis.modules import ModuleChecks
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.run.reader import Run
from moediag.selftest.families import _COMMON, FAMILIES, MAX_LENGTH, make_checkpoint, randomise

DENSE = "qwen3"
"""A dense model type."""


@dataclass(frozen=True)
class Fault:
    """An edit of a checkpoint, and the module and decoder layer that are off (-1 = none).

    Args:
        tensors: pattern of the names of the stored tensors that ``change`` is made to.
        config: entries of config.json that are changed.
    """

    module: str
    layer: int
    tensors: str = ""
    change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def _scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor * factor


def _redrawn(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)).to(tensor) * tensor.std()


def _expert_3(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:3], _redrawn(tensor[3:4]), tensor[4:]])


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)).to(tensor)


def _theta(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {"rope_parameters": {**rope, "rope_theta": rope["rope_theta"] * 1.05}}


_EVERYWHERE = {
    "rope theta by 5 %": Fault("attention (self_attn)", 0, config=_theta),
    "embeddings": Fault("embeddings", -1, r"embed_tokens", _scaled(1.01)),
    "a norm's weight": Fault("post_attention_layernorm", 1, r"\.1\.post_attention_layernorm", _scaled(1.01)),
    "final norm": Fault("final norm (norm)", -1, r"model\.norm\.", _scaled(1.01)),
    "head": Fault("head", -1, r"lm_head", _scaled(1.01)),
}
_MOE = {
    **_EVERYWHERE,
    "router by 1 %": Fault("router", 2, r"\.2\.mlp\.(gate|router)\.(weight|bias)", _scaled(1.01)),
}
_NO_RENORM = Fault("routing rule", 0, config=lambda config: {"norm_topk_prob": False})
FAULTS: dict[str, dict[str, Fault]] = {
    "qwen3_moe": {
        **_MOE,
        "attention scale": Fault("attention (self_attn)", 1, r"\.1\.self_attn\.q_norm", _scaled(1.05)),
        "one expert": Fault("routed experts", 2, r"\.2\.mlp\.experts\.3\.", _redrawn),
        "dense MLP": Fault("mlp", 1, r"\.1\.mlp\.down_proj", _scaled(1.01)),
        "renormalisation off": _NO_RENORM,
    },
    "glm4_moe": {
        **_MOE,
        "attention scale": Fault("attention (self_attn)", 1, r"\.1\.self_attn\.q_norm", _scaled(1.05)),
        "one expert": Fault("routed experts", 2, r"\.2\.mlp\.experts\.3\.", _redrawn),
        "shared expert": Fault("shared experts", 1, r"\.1\.mlp\.shared_experts\.down_proj", _scaled(1.01)),
        "correction bias": Fault("routing rule", 2, r"\.2\.mlp\.gate\.e_score_correction_bias", _moved),
        "scaling factor": Fault("routing rule", 1, config=lambda config: {"routed_scaling_factor": 2.0}),
        "renormalisation off": Fault("routing rule", 1, config=lambda config: {"norm_topk_prob": False}),
    },
    "gpt_oss": {
        **_MOE,
        "attention scale": Fault("attention (self_attn)", 1, r"\.1\.self_attn\.q_proj", _scaled(1.05)),
        "one expert": Fault("routed experts", 2, r"\.2\.mlp\.experts\.down_proj$", _expert_3),
        "sliding window": Fault("attention (self_attn)", 0, config=lambda config: {"sliding_window": 12}),
        "attention sink": Fault("attention (self_attn)", 1, r"\.1\.self_attn\.sinks", _moved),
    },
    "granitemoe": {
        "residual multiplier": Fault(
            "residual stream into post_attention_layernorm", 0, config=lambda config: {"residual_multiplier": 0.23}
        ),
        "logits scaling": Fault("head", -1, config=lambda config: {"logits_scaling": 6.1}),
        "attention multiplier": Fault(
            "attention (self_attn)", 0, config=lambda config: {"attention_multiplier": 0.0165}
        ),
    },
    DENSE: {
        **_EVERYWHERE,
        "attention scale": Fault("attention (self_attn)", 1, r"\.1\.self_attn\.q_norm", _scaled(1.05)),
        "MLP": Fault("mlp", 2, r"\.2\.mlp\.down_proj", _scaled(1.01)),
    },
}  # fmt: skip
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


def plant(clean: Path, folder: Path, fault: Fault) -> Path:
    """A copy of a checkpoint with the fault."""
    shutil.copytree(clean, folder)
    if fault.tensors:
        tensors, pattern = load_file(clean / "model.safetensors"), re.compile(fault.tensors)
        hit = [name for name in tensors if pattern.search(name)]
        assert hit, f"no tensor is called {fault.tensors}: {sorted(tensors)}"
        changed = {
            name: fault.change(tensor.float()).to(tensor.dtype) for name, tensor in tensors.items() if name in hit
        }
        save_file({**tensors, **changed}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((clean / "config.json").read_text())
    new = fault.config(config)
    assert not new or any(config.get(name) != value for name, value in new.items()), "nothing changed"
    (folder / "config.json").write_text(json.dumps({**config, **new}))
    return folder


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
        fault = FAULTS[self.family][name]
        folder = self.folder / f"{name.replace(' ', '-').replace('%', '')}-{side}"
        checked = self.check(**{side: plant(self.clean, folder, fault)})
        return (*first_off(checked), checked)


def first_off(checked: ModuleChecks) -> tuple[str, int]:
    """Module and decoder layer of the first that is off; empty and -1 where none is."""
    off = checked.frame[checked.frame["verdict"] == "another function"]
    return ("", -1) if off.empty else (str(off.iloc[0]["module"]), int(off.iloc[0]["decoder_layer"]))


def as_record(fault: Fault) -> dict[str, Any]:
    """What is said of it in a table."""
    return {name: value for name, value in asdict(fault).items() if name in ("module", "layer")}
