"""Which module is named: of planted faults, and of healthy pairs of many families. The tables of reports/modules.md.

Ends with exit code 1 where a fault is not named right, or a family without a known difference is not found healthy.

Usage: python benchmarks/modules.py [faults | families]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from committed_tables import commit_table, markdown
from conftest import ENGINES
from module_faults import DENSE, FAULTS, ModuleBench, first_off

from moediag.diagnosis.modules import COARSER, OTHER, SAME, ModuleChecks
from moediag.errors import MoediagError
from moediag.numbers import sig, times
from moediag.selftest.families import FAMILIES

DIFFERENT = {
    "olmoe_renormalized": ("routing rule", 0),
    "cohere2_moe": ("attention (self_attn)", 0),
    "ernie4_5_moe": ("routing rule", 1),
    "phimoe": ("head", -1),
    "glm4_moe_lite": ("attention (self_attn)", 0),
}
"""Families whose engines are known to differ, and where."""
CANNOT = {
    "mimo_v2_flash": "vLLM's CPU build dies of it in bfloat16",
    "jetmoe": "no router is found by its structure",
    "deepseek_v4": "vLLM does not load what transformers writes",
}


def faults(folder: Path) -> Iterator[tuple[list[str], str]]:
    """A row per family and fault, and what is wrong with it."""
    for family, planted in FAULTS.items():
        (folder / family).mkdir()
        bench = ModuleBench(ENGINES, family, folder / family, torch.float32)
        for name, fault in planted.items():
            row, problem = [family, name, _place(fault.module, fault.layer)], ""
            for side in ("train", "infer"):
                module, layer, _ = bench.named(name, side)
                is_right = (module, layer) == (fault.module, fault.layer)
                row.append("right" if is_right else _place(module, layer))
                problem = problem if is_right else f"{family}, {name}, {side}: {_place(module, layer)}"
            yield row, problem


def families(folder: Path) -> Iterator[tuple[list[str], str]]:
    """A row per family, and what is wrong with it."""
    for family in (*(name for name in FAMILIES if FAMILIES[name].dtypes != (torch.bfloat16,)), DENSE):
        if family in CANNOT:
            continue
        (folder / family).mkdir()
        try:
            checked = ModuleBench(ENGINES, family, folder / family, torch.bfloat16).check()
        except MoediagError as error:
            ENGINES.close()
            yield [family, "", "", "", "", str(error).split("; see")[0]], f"{family}: {error}"
            continue
        expected = DIFFERENT.get(family, ("", -1))
        problem = "" if first_off(checked) == expected else f"{family}: {checked.first}"
        yield family_row(family, checked), problem


def family_row(family: str, checked: ModuleChecks) -> list[str]:
    """Cells of a family's row."""
    frame = checked.frame
    same = frame[frame["verdict"].isin((SAME, COARSER)) & frame["float32_max"].notna()]
    ratio = frame[frame["verdict"] == SAME]["ratio"]
    off = frame[frame["verdict"] == OTHER]
    named = ", ".join(dict.fromkeys(_place(row.module, row.decoder_layer) for row in off.itertuples()))
    coarse = "; ".join(dict.fromkeys(checked.further[len(off) - bool(len(off)) :]))
    return [
        family,
        str(len(same)),
        sig(same["float32_max"].max(), 2),
        times((same["float32_max"] / same["bound"]).max(), 1.0),
        f"{times(ratio.min(), 1.0)} to {times(ratio.max(), 1.0)}{'; ' if coarse else ''}{coarse}",
        named or "none",
    ]


def _place(module: str, layer: int) -> str:
    return (f"{module}, layer {layer}" if layer >= 0 else module) or "none"


TABLES = {
    "faults": (faults, ["family", "fault", "planted in", "in transformers", "in vLLM"]),
    "families": (
        families,
        ["family", "n modules", "worst in float32", "share of the bound", "vLLM / transformers", "other function"],
    ),
}


def main(names: list[str]) -> int:
    problems = []
    for name in names or list(TABLES):
        measure, header = TABLES[name]
        with tempfile.TemporaryDirectory() as folder:
            rows = []
            for row, problem in measure(Path(folder)):
                print(*row, problem, sep=" | ", flush=True)
                rows.append(row)
                problems += [problem] if problem else []
        commit_table("modules.md", name, markdown(header, rows))
    ENGINES.close()
    print("\n".join(problems) or "every claim holds")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
