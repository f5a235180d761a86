"""Faults planted in real engines, and healthy ones: what the diagnosis says of each, beside what it should say.

``python tests/diagnosis_measures.py --folder KEPT`` makes a clean run of every model, plants every fault of
:mod:`moediag.faults` in either engine in turn, has the arms of that engine captured again, and writes the tables of
reports/diagnosis.md. What is in the folder already is not measured again, so a run that was cut off can go on.

In a cell the tokens and the other engine's arms are the clean run's, file by file; faults of rounding are planted in
the arms of the dtype in use, and not in those in float32, where arithmetic is not coarse.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from committed_tables import commit_table, markdown
from conftest import KeptEngines

from moediag.cli.demo import cache_folder
from moediag.cli.jobs import requests_of
from moediag.demo.corpus import demo_prompts
from moediag.demo.pair import build_pair
from moediag.diagnosis.verdict import BIT_EXACT, OTHER_FUNCTION, ROUNDS_WORSE, SAME_FUNCTION
from moediag.engines.arms import ROUTER_RULES, ArmRequest, arm_request
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import fill_arm
from moediag.engines.plan import SamplingOptions, load_prompt_tokens, make_plan
from moediag.errors import CheckpointError, MoediagError
from moediag.faults import FAULTS, FUNCTION, fill_planted_arm, planted_checkpoint
from moediag.faults.catalogue import NO_MODULE
from moediag.numbers import sig
from moediag.results import analyze_run
from moediag.run.reader import Run, open_run
from moediag.run.recipes import ENGINE_WORDS, RECIPES, TRANSFORMERS, VLLM
from moediag.run.writer import RunWriter
from moediag.selftest.families import FAMILIES, make_checkpoint

N_PROMPTS, MAX_TOKENS = 16, 48
ARMS = ("infer", "train", "train-perturbed", "infer-fp32", "train-fp32", "train-fp32-perturbed")
TRAINED = ("demo-moe", "demo-dense")
FAULTY = ("demo-moe", "qwen3_moe", "glm4_moe", "gpt_oss")
"""Models in which faults are planted: trained; random with renormalised softmax and a dense layer; with groups, bias
and shared expert; with biases, sinks and fused experts."""
HEALTHY = (*TRAINED, "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "glm4_moe", "deepseek_v3", "dots1", "gpt_oss",
           "granitemoe", "bailing_moe", "hy_v3", "exaone_moe", "mimo_v2_flash", "lfm2_moe")  # fmt: skip
"""Models of families whose engines mean the same by them (reports/families.md); a second seed is other prompts."""
CLEAN = "clean"


@dataclass(frozen=True)
class Cell:
    """One thing that was done to a model, and what was said of it.

    Args:
        side: engine that the fault is in; empty for a healthy control.
        layer: decoder layer that the fault is in, -1 = the whole model.
        word, where, reason: the verdict's.
        named_layer: decoder layer that the verdict names; -1 = none.
        times: float32 against float32, in units of the float32 rounding scale.
        ratio: infer's distance from the function over train's, of a typical token.
        refused: what capture said where it refused the arm before it was captured.
        no_effect: the faulty engine gave bit for bit what the clean one does: nothing was planted.
        absent: the model has no such part.
    """

    model: str
    dtype: str
    seed: int
    fault: str
    side: str
    layer: int = -1
    n_tokens: int = 0
    mean_abs_logp_diff: float = math.nan
    word: str = ""
    where: str = ""
    reason: str = ""
    named_layer: int = -1
    times: float = math.nan
    ratio: float = math.nan
    refused: str = ""
    no_effect: bool = False
    absent: str = ""

    @property
    def expected(self) -> tuple[str, ...]:
        """The verdict's words that are right."""
        if self.fault == CLEAN:
            return SAME_FUNCTION, BIT_EXACT
        return (OTHER_FUNCTION,) if FAULTS[self.fault].kind == FUNCTION else (ROUNDS_WORSE,)

    @property
    def is_right(self) -> bool:
        """The verdict is the expected one, and blames the engine where it should."""
        if self.refused:
            return self.fault != CLEAN
        is_blamed = self.word != ROUNDS_WORSE or ENGINE_WORDS[self.side] in self.where.partition(":")[0]
        return self.word in self.expected and is_blamed

    @property
    def counts(self) -> bool:
        """There was something to be said."""
        return not self.no_effect and not self.absent


def verdict_of(run: Run) -> dict[str, Any]:
    """What the diagnosis says of a run: ``word``, ``where``, ``reason``, ``named_layer``; the one place to read it."""
    summary = analyze_run(run)
    found, function = summary["verdict"], summary["function"] or {}
    layer, times = function.get("first_decoder_layer"), function.get("times")
    ratio = ((summary["distances"] or {}).get("ratio") or {}).get("value")
    pair = summary["pairs"][summary["main_pair"]]
    return {
        "word": found["word"], "where": found["where"], "reason": found["reason"],
        "named_layer": -1 if layer is None or found["word"] != OTHER_FUNCTION else int(layer),
        "times": math.nan if times is None else times, "ratio": math.nan if ratio is None else ratio,
        "n_tokens": int(pair["n_tokens"]), "mean_abs_logp_diff": float(pair["logp"]["abs_logp_diff"]["mean"]),
    }  # fmt: skip


def cells() -> list[tuple[str, str, int, str, str]]:
    """(model, dtype, seed, fault, side) of everything that is measured, healthy controls first."""
    seeds = {model: (0, 1) if model in FAULTY else (0,) for model in HEALTHY}
    found = [(model, "bfloat16", seed, CLEAN, "") for model in HEALTHY for seed in seeds[model]]
    found += [(model, "float16", 0, CLEAN, "") for model in TRAINED]
    sides = (TRANSFORMERS, VLLM)
    found += [(model, "bfloat16", 0, fault, side) for side in sides for model in FAULTY for fault in FAULTS]
    return found


def measure(folder: Path, engines: KeptEngines, chosen: Iterable[str], is_there_only: bool = False) -> list[Cell]:
    """Every cell, from the folder where it is there already; one process of each engine serves all of them.

    Args:
        chosen: parts of names of cells; empty = all.
        is_there_only: nothing is measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = []
    for model, dtype, seed, fault, side in cells():
        name = "~".join((model, dtype, str(seed), fault, side))
        if chosen and not any(one in name for one in chosen):
            continue
        result = folder / f"{name}.json"
        if is_there_only and not result.exists():
            continue
        if not result.exists():
            cell = Cell(model, dtype, seed, fault, side)
            found = _measure(folder, engines, cell)
            result.write_text(json.dumps(asdict(found)))
            said = found.refused or found.absent or ("no effect" if found.no_effect else f"{found.word}; {found.where}")
            print(f"{'ok  ' if found.is_right else '    '} {name}: {said[:150]}", flush=True)
        measured.append(Cell(**json.loads(result.read_text())))
    return measured


def _measure(folder: Path, engines: KeptEngines, cell: Cell) -> Cell:
    clean, checkpoint = _clean(folder, engines, cell)
    if cell.fault == CLEAN:
        return replace(cell, **verdict_of(clean))
    fault = FAULTS[cell.fault]
    routing = checkpoint.routing
    layers = routing.decoder_layers if routing else ()
    layer = layers[-1] if layers and fault.of_layer else -1
    copy, work = checkpoint, folder / "work" / f"{cell.model}-{cell.fault}-{cell.side}"
    shutil.rmtree(work, ignore_errors=True)
    if fault.kind == FUNCTION:
        try:
            # a folder of its own: engines know a loaded model by its folder
            edited = folder / "edited" / f"{cell.model}-{cell.fault}-{cell.side}"
            shutil.rmtree(edited, ignore_errors=True)
            copy = planted_checkpoint(checkpoint, fault, layer, edited, (cell.dtype, "float32"))
        except CheckpointError as error:
            return replace(cell, absent=str(error).partition(" has ")[2])
    work.mkdir(parents=True)
    run_path = work / "run"
    shutil.copytree(clean.path, run_path, ignore=shutil.ignore_patterns("partials", "analysis", "figures", "report*",
                                                                       "summary.json", "logs"))  # fmt: skip
    names = [arm for arm in ARMS if RECIPES[arm].engine == cell.side]
    for arm in names:
        if fault.kind == FUNCTION or "fp32" not in arm:
            shutil.rmtree(run_path / "arms" / arm)
    run = open_run(run_path)
    requests = [request for request in _requests(cell, run, checkpoint) if request.arm in names]
    refused = ""
    for request in requests:
        if run.is_complete(request.arm):
            continue
        fill = partial(fill_planted_arm, engines, RunWriter(run), copy, name=cell.fault, on_event=_ignore)
        try:
            fill(request=request)
        except MoediagError as error:
            if NO_MODULE in str(error):
                return replace(cell, layer=layer, absent=str(error))
            # the proof of routers found it: what would be said were it accepted is asked of the verdict
            refused = refused or str(error).partition(". Nothing was sampled")[0]
            shutil.rmtree(run_path / "arms" / request.arm, ignore_errors=True)
            try:
                fill(request=replace(request, accept=ROUTER_RULES))
            except MoediagError:
                return replace(cell, layer=layer, refused=refused)
        run = open_run(run_path)
    if _same(clean, run, "train" if cell.side == TRANSFORMERS else "infer"):
        return replace(cell, layer=layer, no_effect=True)
    found = replace(cell, layer=layer, refused=refused, **verdict_of(open_run(run_path)))
    shutil.rmtree(work)
    return found


def _ignore(event: dict[str, Any]) -> None:
    """Progress is of no interest here."""


def _same(clean: Run, faulty: Run, arm: str) -> bool:
    pairs = [(clean.capture(arm, shard).logp_T, faulty.capture(arm, shard).logp_T) for shard in clean.shards]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _clean(folder: Path, engines: KeptEngines, cell: Cell) -> tuple[Run, Checkpoint]:
    """The clean run of a model, dtype and seed: tokens that vLLM sampled once, given to every arm."""
    dtype = getattr(torch, cell.dtype)
    path = folder / "checkpoints" / f"{cell.model}-{cell.dtype}"
    if not (path / "config.json").exists():
        if cell.model in TRAINED:
            shutil.copytree(build_pair(cache_folder())[TRAINED.index(cell.model)], path)
        else:
            make_checkpoint(cell.model, path, dtype)
    checkpoint = open_checkpoint(str(path))
    name = f"{cell.model}-{cell.dtype}-{cell.seed}"
    run_path = folder / "runs" / name
    if not run_path.exists():
        given = _given(folder, engines, cell, checkpoint)
        make_plan(checkpoint, given, SamplingOptions(max_tokens=MAX_TOKENS)).create(run_path, force=False)
    run = open_run(run_path)
    for request in _requests(cell, run, checkpoint):
        if not run.is_complete(request.arm):
            fill_arm(engines, RunWriter(run), checkpoint, request, _ignore)
            run = open_run(run_path)
    return run, checkpoint


def _given(folder: Path, engines: KeptEngines, cell: Cell, checkpoint: Checkpoint) -> Path:
    """Prompts with the completions that vLLM sampled."""
    name = f"{cell.model}-{cell.dtype}-{cell.seed}"
    given = folder / "given" / f"{name}.jsonl"
    if given.exists():
        return given
    given.parent.mkdir(exist_ok=True)
    texts = demo_prompts(N_PROMPTS * (cell.seed + 1))[N_PROMPTS * cell.seed :]
    texts = texts if cell.model in TRAINED else [text[: 12 + 5 * i] for i, text in enumerate(texts)]
    prompts = given.with_suffix(".prompts")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    plan = make_plan(checkpoint, prompts, SamplingOptions(max_tokens=MAX_TOKENS, ignore_eos=True, seed=cell.seed))
    sampled = folder / "given" / name
    shutil.rmtree(sampled, ignore_errors=True)
    run = plan.create(sampled, force=False)
    request = arm_request("infer", _options(cell, VLLM, checkpoint), given=False)
    fill_arm(engines, RunWriter(run), checkpoint, request, _ignore)
    tokens = open_run(sampled).tokens(run.shards[0])
    rows = []
    for (start, end), (_, _, prompt, _) in zip(tokens.sequence_bounds(), load_prompt_tokens(run), strict=True):
        ids = tokens.token_id_T[start:end].tolist()
        rows.append({"prompt_token_ids": prompt, "completion_token_ids": ids[len(prompt) :]})
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return given


def _options(cell: Cell, engine: str, checkpoint: Checkpoint) -> dict[str, Any]:
    if engine == TRANSFORMERS:
        return {"dtype": cell.dtype}
    own: Mapping[str, Any] = {} if cell.model in TRAINED else FAMILIES[cell.model].engine
    return {"dtype": cell.dtype, "max_model_len": min(256, checkpoint.max_length or 256), "enforce_eager": True, **own}


def _requests(cell: Cell, run: Run, checkpoint: Checkpoint) -> list[ArmRequest]:
    class Given:
        """What ``requests_of`` asks of a plan."""

        completion_ids, sampled_by = True, "infer"

    def request_of(name: str, given: bool, **more: Any) -> ArmRequest:
        return arm_request(name, _options(cell, RECIPES[name].engine, checkpoint), given, **more)

    return requests_of(ARMS, Given(), request_of)  # type: ignore[arg-type]


# Tables


def wilson(n: int, n_of: int) -> str:
    """A share with its 95 % interval (Wilson's)."""
    if not n_of:
        return "-"
    z, p = 1.96, n / n_of
    centre, half = (p + z * z / (2 * n_of)), z * math.sqrt(p * (1 - p) / n_of + z * z / (4 * n_of * n_of))
    low, high = ((centre - half) / (1 + z * z / n_of), (centre + half) / (1 + z * z / n_of))
    return f"{n} of {n_of} ({100 * p:.0f} %, 95 %: {100 * low:.0f} to {100 * high:.0f})"


def tables(measured: list[Cell]) -> dict[str, str]:
    """Every table of reports/diagnosis.md by its name."""
    kinds: dict[str, Callable[[Cell], bool]] = {
        "healthy: called the same function": lambda cell: cell.fault == CLEAN,
        "another function in transformers": lambda cell: _kind(cell) == FUNCTION and cell.side == TRANSFORMERS,
        "another function in vLLM": lambda cell: _kind(cell) == FUNCTION and cell.side == VLLM,
        "rounding in transformers": lambda cell: _kind(cell) == "rounding" and cell.side == TRANSFORMERS,
        "rounding in vLLM": lambda cell: _kind(cell) == "rounding" and cell.side == VLLM,
    }
    counted = [cell for cell in measured if cell.counts]
    summary = []
    for words, is_of in kinds.items():
        some = [cell for cell in counted if is_of(cell)]
        summary.append((words, wilson(sum(cell.is_right for cell in some), len(some))))
    by_fault = []
    for name, fault in FAULTS.items():
        row: list[object] = [name, fault.words, fault.kind]
        for side in (TRANSFORMERS, VLLM):
            some = [cell for cell in counted if cell.fault == name and cell.side == side]
            n_refused = sum(bool(cell.refused) for cell in some)
            row.append(f"{sum(cell.is_right for cell in some)} of {len(some)}"
                       f"{f' ({n_refused} refused at capture)' if n_refused else ''}")  # fmt: skip
        by_fault.append(row)
    healthy = [(cell.model, cell.dtype, cell.seed, f"{cell.n_tokens:,}", f"{cell.mean_abs_logp_diff:.3g}",
                sig(cell.times, 2), sig(cell.ratio, 2), cell.word)
               for cell in counted if cell.fault == CLEAN]  # fmt: skip
    misses = [(cell.model, cell.dtype, cell.fault, ENGINE_WORDS.get(cell.side, "-"), " or ".join(cell.expected),
               cell.word, cell.where or "-") for cell in counted if not cell.is_right]  # fmt: skip
    left_out = [(cell.model, cell.fault, ENGINE_WORDS[cell.side], cell.absent or "bit-equal to the clean engine")
                for cell in measured if not cell.counts]  # fmt: skip
    return {
        "shares": markdown(["cells", "right"], summary),
        "faults": markdown(["fault", "what", "kind", "named, in transformers", "named, in vLLM"], by_fault),
        "healthy": markdown(
            [
                "model",
                "dtype",
                "seed",
                "tokens",
                "mean abs logp diff [nat]",
                "in float32, in rounding scales",
                "infer's distance over train's",
                "said",
            ],
            healthy,
        ),
        "misses": markdown(["model", "dtype", "fault", "in", "expected", "said", "where"], misses),
        "left out": markdown(["model", "fault", "in", "why"], left_out),
    }


def _kind(cell: Cell) -> str:
    return "" if cell.fault == CLEAN else FAULTS[cell.fault].kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where checkpoints, runs and results are kept; default: nowhere")
    parser.add_argument("names", nargs="*", help="parts of names of cells (model~dtype~seed~fault~side); then no table "
                        "is written")  # fmt: skip
    parser.add_argument("--tables", action="store_true", help="write the tables of what the folder holds; none is made")
    given = parser.parse_args()
    engines = KeptEngines()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as passing:
        try:
            measured = measure(given.folder or Path(passing), engines, given.names, given.tables)
        finally:
            engines.close()
    for title, table in tables(measured).items():
        if given.names:
            print(f"\n{title}\n{table}")
        else:
            commit_table("diagnosis.md", title, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
