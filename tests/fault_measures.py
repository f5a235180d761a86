"""Cells of planted faults and of healthy pairs: made with the engines once, read without them as often as one likes.

``python benchmarks/faults.py`` makes and reads all of them, and writes the tables of reports/diagnosis.md. A cell is a
run directory with the arms that ``moediag profile`` makes. A fault on the side of transformers leaves tokens and infer
arms as they are in the clean run. A fault in vLLM samples tokens of its own. A fault of the record spoils every arm of
its side.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from committed_tables import markdown
from conftest import ENGINES, KeptEngines
from over_cluster import show
from scipy.stats import binomtest

from moediag.cli import jobs
from moediag.demo.corpus import demo_prompts
from moediag.demo.pair import build_pair
from moediag.engines.arms import ROUTER_RULES, ArmRequest, arm_request
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import fill_arm
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.errors import CheckpointError, MoediagError
from moediag.faults import FAULTS, FUNCTION, RECORD, ROUNDING, fill_planted_arm, planted_checkpoint, spoil_arm
from moediag.faults.planting import NO_MODULE
from moediag.folder import SUMMARY
from moediag.hygiene.rules import NOTE
from moediag.numbers import sig
from moediag.results import analyze_run
from moediag.run.files import cache_folder, read_sealed, write_atomic
from moediag.run.pieces import Pool, each
from moediag.run.reader import Run, open_run
from moediag.run.recipes import ENGINE_WORDS, RECIPES, TRANSFORMERS, VLLM
from moediag.run.writer import RunWriter
from moediag.selftest.families import FAMILIES, make_checkpoint

N_PROMPTS, MAX_TOKENS = 16, 48
TRAINED = ("demo-moe", "demo-dense")
TUNING, QUOTED = {"qwen3_moe": 0, "glm4_moe": 0}, {"bailing_moe": 100, "qwen2_moe": 100}
"""Seed by model of the half on which rules are tuned, and of the half that is quoted: seeds of 100 and above."""
IN_VLLM = ("attention-scale", "expert-redrawn", "head-perturbed", "router-weight", "stale-weights", "kv-fp8",
           "activations-fp8", "temperature", "top-p", "gates-biased")  # fmt: skip
"""Faults that are planted in vLLM as well, or in it alone."""
IN_BOTH_RECORDS = ("logps-lag", "logps-bf16", "rows-lag")
CLEAN, REFUSED = "clean", "refused at capture"
_DERIVED = shutil.ignore_patterns("partials", "analysis", "figures", "report*", "summary.json", "logs", "diagnosis")


@dataclass(frozen=True)
class Cell:
    """One thing that was done to a model.

    Args:
        seed: which prompts, and of their sampling.
        side: engine that the fault is in; empty for a healthy pair.
        threads: of the arithmetic.
        layer: decoder layer that the fault is in, -1 = the whole model.
        refused: what capture said where it refused an arm, which was then captured with the finding accepted.
        absent: why there is no run: the model has no such part, or capture refused the arm for good.
        no_effect: the faulty engine gave bit for bit what the clean one does.
    """

    model: str
    dtype: str
    seed: int
    fault: str = CLEAN
    side: str = ""
    threads: int = 1
    layer: int = -1
    refused: str = ""
    absent: str = ""
    no_effect: bool = False

    @property
    def name(self) -> str:
        """Of its run's folder."""
        parts = [self.model, self.dtype, str(self.seed), self.fault, self.side, f"t{self.threads}" * (self.threads > 1)]
        return "~".join(part for part in parts if part)

    @property
    def counts(self) -> bool:
        """There was something to be named: by the diagnosis, or by a capture that refused it."""
        return not self.no_effect and (not self.absent or self.is_refused)

    @property
    def is_refused(self) -> bool:
        """The fault was named before anything was captured, and is no finding that can be accepted."""
        return self.absent.startswith(REFUSED)

    @property
    def is_quoted(self) -> bool:
        """It is of the half on which no rule was tuned."""
        return self.seed >= 100


def healthy() -> list[Cell]:
    """The healthy pairs: clean runs of the faulty models first."""
    found = [Cell(model, dtype, seed) for half in (TUNING, QUOTED) for model, seed in half.items()
             for dtype in ("bfloat16", "float32")]  # fmt: skip
    found += [Cell(model, "bfloat16", first + n) for model, first in (TUNING | QUOTED).items() for n in (1, 2)]
    found += [Cell("demo-moe", "bfloat16", seed) for seed in (0, 1, 100, 101)]
    found += [Cell("demo-dense", "bfloat16", seed) for seed in (0, 100)]
    found += [Cell(model, "float16", seed) for model in TRAINED for seed in (0, 100)]
    found += [Cell(model, "float32", 100) for model in TRAINED]
    found += [Cell(model, "bfloat16", seed) for seed in (100, 101)
              for model in ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "hy_v3",
                            "exaone_moe")]  # fmt: skip
    found += [Cell(model, "bfloat16", 102, threads=2) for model in ("demo-moe", "demo-dense")]
    return found


def faulty() -> Iterator[Cell]:
    """Every fault in the models of both halves: records, then transformers, then vLLM."""
    for half in (TUNING, QUOTED):
        for side, is_record in ((VLLM, True), (TRANSFORMERS, True), (TRANSFORMERS, False), (VLLM, False)):
            for model, seed in half.items():
                for name, fault in FAULTS.items():
                    is_wanted = {
                        (VLLM, True): True,
                        (TRANSFORMERS, True): name in IN_BOTH_RECORDS,
                        (TRANSFORMERS, False): True,
                        (VLLM, False): name in IN_VLLM,
                    }[side, is_record]
                    if (fault.kind == RECORD) == is_record and is_wanted and side in fault.sides:
                        yield Cell(model, fault.dtype or "bfloat16", seed, name, side)


class Maker:
    """Makes cells under a folder, on engine processes that are kept."""

    def __init__(self, folder: Path, engines: KeptEngines) -> None:
        self.folder, self.engines = folder, engines
        self.said: list[str] = []
        """A line of every cell made."""
        self._checkpoints: dict[tuple[str, str], Checkpoint] = {}
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def run_path(self, cell: Cell) -> Path:
        """Of the cell's run."""
        return self.folder / "runs" / cell.name

    def is_made(self, cell: Cell) -> bool:
        """What was done is written down, last of all."""
        return self.run_path(cell).with_suffix(".json").exists()

    def _done(self, cell: Cell, started: float) -> None:
        write_atomic(self.run_path(cell).with_suffix(".json"), json.dumps(asdict(cell)).encode())
        said = cell.absent or ("no effect" if cell.no_effect else cell.refused)
        self.said.append(f"{time.monotonic() - started:6.1f} s  {cell.name}  {said[:100]}")

    def checkpoint(self, model: str, dtype: str) -> Checkpoint:
        """The clean checkpoint of a model."""
        if (model, dtype) not in self._checkpoints:
            path = self.folder / "checkpoints" / f"{model}-{dtype}"
            if not (path / "config.json").exists():
                if model in TRAINED:
                    shutil.copytree(build_pair(cache_folder("demo"))[TRAINED.index(model)], path)
                else:
                    make_checkpoint(model, path, getattr(torch, dtype))
            self._checkpoints[model, dtype] = open_checkpoint(str(path))
        return self._checkpoints[model, dtype]

    def requests(self, cell: Cell) -> list[ArmRequest]:
        """The arms that ``moediag profile`` makes."""
        recipes = jobs.profile_recipes(replay=False, floors=True)
        recipes += [] if cell.dtype == "float32" else list(jobs.FLOAT32)
        sampled: Any = SimpleNamespace(completion_ids=None, sampled_by="infer")
        return jobs.requests_of(recipes, sampled, lambda name, given, **more: arm_request(
            name, self._options(cell, RECIPES[name].engine), given, **more))  # fmt: skip

    def _options(self, cell: Cell, engine: str) -> dict[str, Any]:
        if engine == TRANSFORMERS:
            return {"dtype": cell.dtype}
        own: Mapping[str, Any] = {} if cell.model in TRAINED else FAMILIES[cell.model].engine
        length = min(256, self.checkpoint(cell.model, cell.dtype).max_length or 256)
        return {"dtype": cell.dtype, "max_model_len": length, "enforce_eager": True, **own}

    def begin(self, cell: Cell) -> Run:
        """The cell's run, of its prompts and without arms; as it is where it was begun."""
        path = self.run_path(cell)
        if path.exists():
            return open_run(path)
        texts = demo_prompts(N_PROMPTS * (cell.seed % 100 + 1))[N_PROMPTS * (cell.seed % 100) :]
        if cell.model not in TRAINED:
            texts = [text[: 12 + 5 * i] for i, text in enumerate(texts)]
        prompts = self.folder / "prompts" / f"{cell.name}.jsonl"
        prompts.parent.mkdir(exist_ok=True)
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        sampling = SamplingOptions(max_tokens=MAX_TOKENS, ignore_eos=True, seed=cell.seed)
        return make_plan(self.checkpoint(cell.model, cell.dtype), prompts, sampling).create(path, force=False)

    def make_clean(self, cells: Sequence[Cell]) -> None:
        """Healthy pairs of one model, dtype and number of threads, arm by arm: a model is loaded once for all."""
        missing = [cell for cell in cells if not self.is_made(cell)]
        started, failed = time.monotonic(), {}
        for nth in range(len(self.requests(missing[0])) if missing else 0):
            for cell in missing:
                if cell in failed:
                    continue
                request = self.requests(cell)[nth]
                try:
                    run = self.begin(cell)
                    if not run.is_complete(request.arm):
                        self._fill(cell, run, self.checkpoint(cell.model, cell.dtype), request)
                except MoediagError as error:
                    failed[cell] = str(error)
        for cell in missing:
            self._done(replace(cell, absent=failed.get(cell, "")), started)

    def _fill(self, cell: Cell, run: Run, checkpoint: Checkpoint, request: ArmRequest, fault: str = CLEAN) -> None:
        os.environ["OMP_NUM_THREADS"] = str(cell.threads)
        fill = partial(fill_arm, self.engines, RunWriter(run), checkpoint, request, _ignore)
        if fault != CLEAN:
            fill = partial(fill_planted_arm, self.engines, RunWriter(run), checkpoint, request, fault, _ignore)
        fill()

    def make(self, cell: Cell) -> None:
        """A faulty cell; what a run that was cut off left of it is made again."""
        if self.is_made(cell):
            return
        started, clean = time.monotonic(), replace(cell, fault=CLEAN, side="")
        self.make_clean([clean])
        shutil.rmtree(self.run_path(cell), ignore_errors=True)
        make = self._spoil if FAULTS[cell.fault].kind == RECORD else self._plant
        made = make(cell, open_run(self.run_path(clean)))
        if made.absent:
            shutil.rmtree(self.run_path(cell), ignore_errors=True)
        else:
            equal = _same(open_run(self.run_path(clean)), open_run(self.run_path(cell)))
            made = replace(made, no_effect=equal)
        self._done(made, started)

    def _copy(self, cell: Cell, clean: Run) -> Run:
        path = self.run_path(cell)
        # files are never changed in place: what stays the clean run's needs no second copy
        shutil.copytree(clean.path, path, ignore=_DERIVED, copy_function=os.link)
        return open_run(path)

    def _spoil(self, cell: Cell, clean: Run) -> Cell:
        run = self._copy(cell, clean)
        arms = [arm for arm in run.arms() if run.arm(arm).engine == cell.side]
        if not all(spoil_arm(RunWriter(run), arm, cell.fault) for arm in arms):
            return replace(cell, absent="the arms have no such array")
        return cell

    def _plant(self, cell: Cell, clean: Run) -> Cell:
        fault, checkpoint = FAULTS[cell.fault], self.checkpoint(cell.model, cell.dtype)
        layers = checkpoint.routing.decoder_layers if checkpoint.routing else ()
        cell = replace(cell, layer=layers[len(layers) // 2] if layers and fault.of_layer else -1)
        planted = checkpoint
        if fault.edit is not None:
            # a folder of its own: engines know a loaded model by its folder
            edited = self.folder / "edited" / f"{cell.model}-{cell.dtype}-{cell.fault}-{cell.side}"
            shutil.rmtree(edited, ignore_errors=True)
            try:
                planted = planted_checkpoint(checkpoint, fault, cell.layer, edited, (cell.dtype, "float32"))
            except CheckpointError as error:
                return replace(cell, absent=f"the model has {str(error).partition(' has ')[2]}")
        if cell.side == TRANSFORMERS:
            run = self._copy(cell, clean)
            for arm in run.arms():
                is_clean = "fp32" in arm and not fault.in_float32
                if run.arm(arm).engine == TRANSFORMERS and not is_clean:
                    shutil.rmtree(run.path / "arms" / arm)
        else:
            run = self.begin(cell)
        for request in self.requests(cell):
            if run.is_complete(request.arm):
                continue
            is_planted = request.engine == cell.side and (fault.in_float32 or "fp32" not in request.arm)
            source, name = (planted, cell.fault) if is_planted else (checkpoint, CLEAN)
            try:
                self._fill(cell, run, source, request, name)
            except MoediagError as error:
                if NO_MODULE in str(error):
                    return replace(cell, absent=str(error))
                # before anything is captured the proof of routers may find it: what the diagnosis says is of interest
                line = str(error).removeprefix(f"{run.path}: ").partition(". Nothing was sampled")[0]
                cell = replace(cell, refused=cell.refused or line)
                shutil.rmtree(run.path / "arms" / request.arm, ignore_errors=True)
                try:
                    self._fill(cell, run, source, replace(request, accept=ROUTER_RULES), name)
                except MoediagError as second:
                    return replace(cell, absent=f"{REFUSED}: {second}")
            run = open_run(run.path)
        return cell


def _ignore(event: dict[str, Any]) -> None:
    """Progress is of no interest here."""


def _same(clean: Run, faulty: Run) -> bool:
    """All arrays of all arms are the same, bit for bit."""
    for arm in clean.arms():
        for shard in clean.shards_of(arm):
            if not np.array_equal(clean.tokens(shard).token_id_T, faulty.tokens(shard).token_id_T):
                return False
            ours, theirs = (run.capture(arm, shard).arrays() for run in (clean, faulty))
            if not all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in ours):
                return False
    return True


def make(folder: Path, names: Sequence[str], pool: Pool) -> None:
    """Every cell with one of the names in its own, no name = all of them.

    First the healthy pairs and the clean runs of the faulty ones, those of one checkpoint together: it is made, and
    loaded, once. Then every fault by itself.
    """
    maker = Maker(folder, ENGINES)

    def missing(cells: Iterable[Cell]) -> list[Cell]:
        chosen = (cell for cell in cells if not names or any(name in cell.name for name in names))
        return [cell for cell in chosen if not maker.is_made(cell)]

    faults = missing(faulty())
    clean = [replace(cell, fault=CLEAN, side="") for cell in faults]
    by_checkpoint: dict[tuple[str, str], tuple[Cell, ...]] = {}
    for cell in dict.fromkeys([*missing(healthy()), *(cell for cell in clean if not maker.is_made(cell))]):
        key = cell.model, cell.dtype
        by_checkpoint[key] = (*by_checkpoint.get(key, ()), cell)
        if cell.model in TRAINED:  # both are trained at once, here: no two machines train the same bits
            maker.checkpoint(*key)
    for cases in ([*by_checkpoint.values()], [(cell,) for cell in faults]):
        for _, said in each(cases, partial(_made, folder), pool, show):
            print(*said, sep="\n", flush=True)


def _made(folder: Path, cells: Sequence[Cell]) -> list[str]:
    """Make cells of one checkpoint; a line of each."""
    maker = Maker(folder, ENGINES)
    by_threads: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.fault == CLEAN:
            by_threads.setdefault(cell.threads, []).append(cell)
        else:
            maker.make(cell)
    for some in by_threads.values():
        maker.make_clean(some)
    return maker.said


# Reading: what the diagnosis names of each run


@dataclass(frozen=True)
class Reading:
    """What was named of a cell's run.

    Args:
        causes: rules that fired, likeliest first; ``serious`` those of error or warning level.
        word, tone: the verdict's.
        mean: of abs(logp_diff) [nat] over ``n_tokens`` tokens.
        failed: why the run could not be analysed.
    """

    cell: Cell
    causes: tuple[str, ...] = ()
    serious: tuple[str, ...] = ()
    word: str = ""
    tone: str = ""
    mean: float | None = None
    n_tokens: int = 0
    failed: str = ""

    def is_right(self, n_first: int) -> bool:
        """A right answer is among the first so many causes; of a healthy pair: nothing is called wrong."""
        if self.cell.fault == CLEAN:
            return not self.serious and self.tone in ("good", "calm")
        return self.cell.is_refused or bool(set(self.causes[:n_first]) & set(FAULTS[self.cell.fault].causes))


def read_cell(folder: Path, is_kept: bool, cell: Cell) -> Reading:
    """The diagnosis of a run that is there; no engine is needed.

    Args:
        is_kept: what an earlier analysis said, where there was one.
    """
    run = open_run(folder / "runs" / cell.name)
    try:
        kept = run.path / SUMMARY
        summary = read_sealed(kept) if is_kept and kept.exists() else analyze_run(run, force=True)
    except MoediagError as error:
        return Reading(cell, failed=str(error))
    found = summary["verdict"]
    logp = summary["pairs"][summary["main_pair"]]["logp"]["abs_logp_diff"]
    return Reading(
        cell,
        causes=tuple(dict.fromkeys(cause["rule"] for cause in found["causes"])),
        serious=tuple(dict.fromkeys(cause["rule"] for cause in found["causes"] if cause["level"] != NOTE)),
        word=found["word"],
        tone=found["tone"],
        mean=logp["mean"],
        n_tokens=summary["pairs"][summary["main_pair"]]["n_tokens"],
    )


def read(folder: Path, names: Sequence[str], pool: Pool, is_kept: bool = False) -> list[Reading]:
    """What is named of every cell that there is; a line each."""
    cells = [Cell(**json.loads(path.read_text())) for path in sorted((folder / "runs").glob("*.json"))]
    chosen = [cell for cell in cells if not names or any(name in cell.name for name in names)]
    kept = [cell for cell in chosen if not cell.absent and not cell.no_effect]
    readings = {}
    for cell, one in each(kept, partial(read_cell, folder, is_kept), pool):
        mark = "ok " if one.is_right(1) else "3  " if one.is_right(3) else "   "
        print(f"{mark} {cell.name}: {', '.join(one.causes) or '-'}; {one.word}{one.failed}", flush=True)
        readings[cell] = one
    return [*(readings[cell] for cell in kept), *(Reading(cell) for cell in chosen if cell not in kept)]


def wilson(n: int, n_of: int) -> str:
    """A share with its 95 % interval (Wilson's)."""
    if not n_of:
        return "-"
    low, high = binomtest(n, n_of).proportion_ci(method="wilson")
    return f"{n} of {n_of} ({100 * n / n_of:.0f} %, 95 %: {100 * low:.0f} to {100 * high:.0f})"


def tables(readings: Sequence[Reading]) -> dict[str, str]:
    """Every table of reports/diagnosis.md by its name."""
    read_ones = [one for one in readings if one.cell.counts]
    halves = {"tuning": [one for one in read_ones if not one.cell.is_quoted],
              "quoted": [one for one in read_ones if one.cell.is_quoted]}  # fmt: skip
    shares = []
    for words, kind in (("a fault of the function", FUNCTION), ("a fault of rounding", ROUNDING),
                        ("a fault of the record", RECORD), ("any fault", ""), ("a healthy pair", CLEAN)):  # fmt: skip
        row: list[object] = [words]
        for half in halves.values():
            some = [one for one in half if kind == CLEAN == one.cell.fault
                    or (one.cell.fault != CLEAN and kind in ("", FAULTS[one.cell.fault].kind))]  # fmt: skip
            row += [
                wilson(sum(one.is_right(n) for one in some), len(some)) for n in ((1,) if kind == CLEAN else (1, 3))
            ]
            row += ["-"] * (kind == CLEAN)
        shares.append(row)
    columns = [(model, side) for half in (TUNING, QUOTED) for model in half for side in (TRANSFORMERS, VLLM)]
    by_place = {(one.cell.fault, one.cell.model, one.cell.side): one for one in readings}
    matrix = [[name, fault.words, " or ".join(fault.causes),
               *(_named(by_place.get((name, model, side))) for model, side in columns)]
              for name, fault in FAULTS.items()]  # fmt: skip
    return {
        "shares": markdown(["what was done", "tuning: right cause first", "among the first three",
                            "quoted: right cause first", "among the first three"], shares),
        "matrix": markdown(["fault", "what", "right", *(f"{model}, {ENGINE_WORDS[side]}" for model, side in columns)],
                           matrix),
        "healthy": markdown(
            ["model", "dtype", "seed", "threads", "tokens", "mean abs logp diff [nat]", "said", "causes"],
            [(one.cell.model, one.cell.dtype, one.cell.seed, one.cell.threads, f"{one.n_tokens:,}",
              sig(one.mean), one.word, ", ".join(one.causes) or "-")
             for one in read_ones if one.cell.fault == CLEAN]),
        "misses": markdown(
            ["model", "dtype", "seed", "fault", "in", "right", "causes named", "said"],
            [(one.cell.model, one.cell.dtype, one.cell.seed, one.cell.fault, ENGINE_WORDS.get(one.cell.side, "-"),
              "nothing" if one.cell.fault == CLEAN else " or ".join(FAULTS[one.cell.fault].causes),
              ", ".join(one.causes) or "-", one.failed or one.word) for one in read_ones if not one.is_right(1)]),
        "refused": markdown(
            ["model", "fault", "in", "said before anything was captured"],
            [(one.cell.model, one.cell.fault, ENGINE_WORDS[one.cell.side], one.cell.refused)
             for one in readings if one.cell.refused]),
        "left out": markdown(
            ["why", "cells"],
            [(why, ", ".join(names)) for why, names in _left_out(readings).items()]),
    }  # fmt: skip


def _named(one: Reading | None) -> str:
    """A cell of the matrix: the first cause; in bold where it is right; where it is only among three, its place."""
    if one is None:
        return ""
    if one.cell.absent:
        return f"**{REFUSED}**" if one.cell.is_refused else "absent"
    if one.cell.no_effect:
        return "no effect"
    first = one.causes[0] if one.causes else "nothing"
    if one.is_right(1):
        return f"**{first}**"
    place = next((nth for nth, cause in enumerate(one.causes[:3], 1) if cause in FAULTS[one.cell.fault].causes), 0)
    return f"{first}; right at {place}" if place else first


def _left_out(readings: Sequence[Reading]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in readings:
        if not one.cell.counts:
            why = one.cell.absent or "bit for bit what the clean engine gives"
            found.setdefault(why, []).append(one.cell.name)
    return found
