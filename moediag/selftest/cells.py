"""The cells of a self-test: a checkpoint in a dtype, captured by both engines, and what must hold of its captures.

Every check is of what lies on disk, by other code than what wrote it. Finished arms and probes are not done again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moediag.engines.arms import BOTH, HOOKS, NATIVE, ROUTER_RULES, ArmRequest, Reference, arm_request
from moediag.engines.checkpoint import Checkpoint, open_checkpoint
from moediag.engines.launch import ENGINES, Job, OnEvent, arm_options, fill_arm
from moediag.engines.plan import Plan, SamplingOptions, make_plan
from moediag.engines.vllm.options import infer_options
from moediag.errors import CaptureError, MoediagError
from moediag.hygiene import check_run
from moediag.notation import INFER, TRAIN
from moediag.run.capture import WHOLE, Capture, TokenRows
from moediag.run.files import make_folder, write_atomic
from moediag.run.reader import Run, open_run
from moediag.run.recipes import ENGINE_WORDS, TRANSFORMERS, VLLM, recipe
from moediag.run.writer import RunWriter
from moediag.selftest.probe import MAX_TOKENS

PASSED, FAILED, MEASURED, NOT_RUN = "pass", "FAIL", "measured", "not run"

TEXT = "The quick brown fox jumps over the lazy dog and the cat sits on the mat while it rains"
LENGTHS = (3, 7, 13, 20, 30, 44, 60, 86)
"""Characters of TEXT in each prompt: requests of different length end in different steps."""
MAX_RATIO = 3.0
"""Engines that mean the same model differ by at most so many times what one ulp does (reports/families.md)."""
MIN_SAME_SETS = 0.999
"""Of (token, layer) in float32: fewer, and the rows are not of the same tokens and layers."""
MIN_SAME_SETS_ROUNDED = 0.5
"""In coarser dtypes, where near ties flip: random experts of another layer agree by chance only."""
MIN_SAME_SETS_OF_ONE_ENGINE = 0.9
"""vLLM against itself in another runner or in graphs: two engines differ in 2.6 % of the demo's sets in bfloat16."""

NATIVE_ARM, BOTH_ARM = "infer-native", "infer-both"
_OBSERVERS = {NATIVE_ARM: NATIVE, BOTH_ARM: BOTH}


class DoesJobs(Protocol):
    """What runs a job in an engine process, see :class:`moediag.engines.launch.Engines`."""

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        """Have a job done."""


@dataclass(frozen=True)
class Row:
    """One property of one cell.

    Args:
        measured: what was found, with n and unit.
        verdict: ``pass``, ``FAIL``, ``measured`` (a number that nothing forbids) or ``not run``.
        reason: where it fails, or why it was not run.
    """

    checkpoint: str
    dtype: str
    property: str
    measured: str
    verdict: str
    reason: str = ""


@dataclass
class Cell:
    """A checkpoint in a dtype.

    Args:
        is_whole: every property; else what float32 agreement needs only.
        vllm: options of vLLM.
        failed: by arm or probe, why there is none; those in ``is_wrong`` count as failures: what was
            seen is wrong, or vLLM's own record did not work where it is to be had.
    """

    name: str
    path: Path
    folder: Path
    dtype: str
    is_whole: bool = True
    vllm: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    is_wrong: set[str] = field(default_factory=set)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What both engines load."""
        return open_checkpoint(str(self.path))

    @cached_property
    def plan(self) -> Plan:
        """The run."""
        prompts = self.folder.parent / "prompts.txt"
        write_atomic(prompts, "\n".join(TEXT[:length] for length in LENGTHS).encode())
        sampling = SamplingOptions(max_tokens=MAX_TOKENS, ignore_eos=True)
        return make_plan(self.checkpoint, prompts, sampling, router_logits="full")

    @property
    def arms(self) -> list[str]:
        """Recipes, those of vLLM first."""
        if not self.is_whole:
            return [INFER, TRAIN]
        replay = ["train-replay"] if self.is_routed else []
        return [INFER, "infer-repeat", "infer-rescore", TRAIN, "train-repeat", *replay]

    @property
    def is_routed(self) -> bool:
        """False for a dense model."""
        return self.checkpoint.routing is not None

    def request(self, name: str, observer: str = HOOKS, arm: str | None = None) -> ArmRequest:
        """The request of a recipe's arm."""
        made = recipe(name)
        if made.engine == VLLM:
            extra = dict(self.vllm)
            named = {"dtype": self.dtype, "max_model_len": self.plan.max_model_len, "seed": 0}
            options = infer_options(extra, observer, **named)
        else:
            options = {"dtype": self.dtype}
        reference = Reference(made.role, None if name == made.role else self._path_of(made.role))
        return arm_request(
            name, options, given=False, arm=arm, reference=reference, routes=TRAIN, observer=observer,
            accept=ROUTER_RULES,
        )  # fmt: skip

    def _path_of(self, role: str) -> str:
        return self.request(role).path

    def seen_otherwise(self, arm: str) -> ArmRequest:
        """The same tokens decoded again under another observer of vLLM, in its V2 runner."""
        return self.request("infer-redecode", _OBSERVERS[arm], arm)

    def probed(self, name: str) -> dict[str, Any]:
        """What a probe found."""
        found: dict[str, Any] = json.loads(self.folder.with_suffix(f".{name}.json").read_text())
        return found

    @property
    def run(self) -> Run:
        """The run as it is on disk."""
        return open_run(self.folder)


def capture(cells: Sequence[Cell], engines: DoesJobs, on_event: OnEvent, say: Callable[[str], None]) -> None:
    """Capture every cell: all of vLLM first, then vLLM's other runner where there is one, then transformers.

    What fails is kept in :attr:`Cell.failed`, and the next is tried all the same.
    """
    for engine in (VLLM, TRANSFORMERS):
        for cell in cells:
            for name in cell.arms:
                if recipe(name).engine == engine:
                    _one(cell, name, say, partial(_fill, cell, cell.request, name, engines, on_event))
            if cell.is_whole or engine == TRANSFORMERS:
                probe, of = f"probe_{'vllm' if engine == VLLM else TRAIN}", INFER if engine == VLLM else TRAIN
                _one(cell, probe, say, partial(_probe, cell, probe, of, engines, on_event))
        if engine == VLLM:
            for cell in [cell for cell in cells if cell.is_whole and cell.is_routed][:1]:
                absent = "" if "probe_vllm" in cell.failed else cell.probed("probe_vllm")["no_v2"]
                for arm in (BOTH_ARM, NATIVE_ARM):
                    if absent:
                        cell.failed[arm] = absent
                        continue
                    _one(cell, arm, say, partial(_fill, cell, cell.seen_otherwise, arm, engines, on_event))


def _one(cell: Cell, name: str, say: Callable[[str], None], do: Callable[[], None]) -> None:
    needed = {"probe_vllm": INFER, "probe_train": TRAIN, "train-replay": TRAIN}.get(
        name, "" if name == INFER else INFER
    )
    if needed in cell.failed:
        cell.failed[name] = f"arm {needed} was not captured"
        return
    try:
        do()
    except MoediagError as error:
        cell.failed[name] = str(error)
        if isinstance(error, CaptureError) or name in _OBSERVERS:  # those are tried only where they are to be had
            cell.is_wrong.add(name)
        say(f"{cell.name} {cell.dtype}: {name}: {error}")


def _fill(cell: Cell, request_of: Callable[[str], ArmRequest], name: str, engines: DoesJobs, on_event: OnEvent) -> None:
    request = request_of(name)
    run = cell.run if (cell.folder / "run.json").exists() else cell.plan.create(cell.folder, force=False)
    writer = RunWriter(run)
    if writer.own_missing_shards(request.arm):
        fill_arm(engines, writer, cell.checkpoint, request, on_event)  # type: ignore[arg-type]


def _probe(cell: Cell, name: str, arm: str, engines: DoesJobs, on_event: OnEvent) -> None:
    output = cell.folder.with_suffix(f".{name}.json")
    if output.exists():
        return
    request = cell.request(arm)
    log = cell.folder / "logs" / f"{name}.log"
    make_folder(log.parent)
    options = {**arm_options(cell.checkpoint, request), "output": str(output)}
    words, task = ENGINE_WORDS[request.engine], f"moediag.selftest.probe:{name}"
    job = Job(words, task, str(cell.folder), asdict(WHOLE), options, str(log))
    engines.do(job, ENGINES[request.engine].environment(request.observer), on_event)


def rows_of(cell: Cell) -> Iterator[Row]:
    """Every property of a captured cell."""

    def row(name: str, arms: Sequence[str], check: Callable[[], tuple[str, bool | None, str]]) -> Row:
        missing = next((arm for arm in arms if arm in cell.failed), None)
        if missing is not None:
            verdict = FAILED if missing in cell.is_wrong else NOT_RUN
            return Row(cell.name, cell.dtype, name, "", verdict, cell.failed[missing])
        measured, holds, reason = check()
        verdict = MEASURED if holds is None else PASSED if holds else FAILED
        return Row(cell.name, cell.dtype, name, measured, verdict, "" if holds else reason)

    yield _captured(cell)
    if INFER in cell.failed:
        return
    seen = Seen(cell)
    if cell.is_whole:
        yield row("every token x layer has a row", [], seen.completeness)
        yield row("validate finds nothing", [], seen.validated)
        yield row("vLLM is the same without taps", ["probe_vllm"], seen.same_without_taps)
    if cell.is_whole and cell.is_routed:
        yield row("router rule in transformers", [TRAIN], partial(seen.proof, TRAIN))
        yield row("router rule in vLLM", [INFER], partial(seen.proof, INFER))
        yield row("recorded ids are the rule's", [INFER], seen.ids_by_rule)
        yield row("transformers is the same without hooks", ["probe_train"], seen.same_without_hooks)
        yield row("transformers' own routes forced on it", [TRAIN, "train-replay"], seen.self_replay)
    if cell.dtype == "float32":
        yield row("both engines agree in float32", [INFER, TRAIN, "probe_train"], seen.agreement)
    if cell.is_routed:
        yield row("both engines choose the same experts", [INFER, TRAIN], seen.same_experts)
    if cell.is_whole:
        for name, arm, of in (
            ("floor of vLLM: other batches", "infer-repeat", INFER),
            ("floor of transformers: padded batches", "train-repeat", TRAIN),
            ("vLLM's prefill against its decode", "infer-rescore", INFER),
        ):
            yield row(name, [arm, of], partial(seen.difference, arm, of))
        yield row("bytes per token of infer", [INFER], seen.n_bytes)
        yield row("time with taps over time without", ["probe_vllm"], seen.overhead)
        for name, arm in (
            ("hooks against vLLM's own record", BOTH_ARM),
            ("vLLM's own record, in graphs", NATIVE_ARM),
        ):
            if arm in cell.failed or arm in seen.run.arms():
                yield row(name, [arm], partial(seen.other_observer, arm))


def _captured(cell: Cell) -> Row:
    failed = {arm: why for arm, why in cell.failed.items() if arm not in _OBSERVERS}
    n = len(cell.arms)
    n_failed = sum(arm in failed for arm in cell.arms)
    reason = "; ".join(f"{arm}: {why}" for arm, why in failed.items())
    return Row(cell.name, cell.dtype, "captured", f"{n - n_failed} of {n} arms", FAILED if failed else PASSED, reason)


class Seen:
    """What lies on disk of a cell's run, and what must hold of it: (measured, holds or None, reason)."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.run = cell, cell.run
        self.shards = self.run.shards
        self.tokens: list[TokenRows] = [self.run.tokens(shard) for shard in self.shards]

    def captures(self, arm: str) -> list[Capture]:
        """Shard by shard."""
        return [self.run.capture(arm, shard) for shard in self.shards]

    def logps(self, arm: str) -> NDArray[np.float64]:
        """Of response tokens."""
        pairs = zip(self.captures(arm), self.tokens, strict=True)
        return np.concatenate([one.logp_T[tokens.is_response_T].astype(np.float64) for one, tokens in pairs])

    def ids(self, arm: str) -> NDArray[Any]:
        """Expert ids (T, L, K), sorted within a row."""
        return np.concatenate([np.sort(one.expert_ids_TLK, axis=2) for one in self.captures(arm)])  # type: ignore[arg-type]

    def proof(self, role: str) -> tuple[str, bool | None, str]:
        """The rule is shown on the loaded router."""
        arm = self.run.arm(role)
        has_rule = arm.routers[0].spec is not None
        words = str(arm.routers[0].proof)
        if role == INFER and arm.disagreements:
            return words, False, "; ".join(arm.disagreements)
        return words, True if has_rule else None, "no rule is shown: ids are captured, margins are not"

    def completeness(self) -> tuple[str, bool | None, str]:
        """Every token but the last of a sequence in vLLM, every token in transformers."""
        n_rows, where = 0, []
        for arm in self.run.arms():
            is_vllm = self.run.arm(arm).engine == VLLM
            for tokens, capture in zip(self.tokens, self.captures(arm), strict=True):
                if capture.expert_ids_TLK is None:
                    continue
                is_needed_T = np.ones(len(tokens), dtype=bool)
                if is_vllm and self.run.arm(arm).path != "prefill":
                    is_needed_T[[end - 1 for _, end in tokens.sequence_bounds()]] = False
                lacking_TL = np.asarray((capture.expert_ids_TLK < 0).any(axis=2))[is_needed_T]
                n_rows += lacking_TL.size
                where += [f"{arm}: MoE layer {layer}" for layer in np.flatnonzero(lacking_TL.any(axis=0))]
                if np.isnan(capture.logp_T[tokens.is_response_T]).any():
                    where.append(f"{arm}: log-probabilities")
        return f"n = {n_rows:,} (token, layer)", not where, f"rows lack in {', '.join(where)}"

    def validated(self) -> tuple[str, bool | None, str]:
        """No finding of error or warning grade."""
        found = [one for one in check_run(self.run) if one.level != "note"]
        words = "; ".join(f"{one.rule} in {one.where}: {one.message}" for one in found)
        return f"{len(found)} findings", not found, words

    def ids_by_rule(self) -> tuple[str, bool | None, str]:
        """The rule, applied to recorded logits, gives the recorded sets; rows whose border is an exact tie apart."""
        import torch

        from moediag.engines.routers import ModelRouting, apply_rule

        routers = self.run.arm(INFER).routers
        if routers[0].spec is None:
            return "", None, "no rule is shown"
        rule, bias_LE = ModelRouting.of_routers(routers), self.run.correction_bias(INFER)
        n_rows, n_other_L = 0, np.zeros(len(routers), dtype=np.int64)
        for capture in self.captures(INFER):
            assert capture.expert_ids_TLK is not None
            assert capture.router_logits_TLE is not None
            assert capture.margin_TL is not None
            for layer in range(len(routers)):
                is_clear_T = (capture.expert_ids_TLK[:, layer, 0] >= 0) & (capture.margin_TL[:, layer] != 0)
                logits = torch.from_numpy(capture.router_logits_TLE[is_clear_T, layer].astype(np.float32))
                bias = None if bias_LE is None else torch.from_numpy(np.array(bias_LE[layer]))
                chosen = np.sort(apply_rule(logits, rule, bias).numpy(), axis=1)
                used = np.sort(capture.expert_ids_TLK[is_clear_T, layer], axis=1)
                n_other_L[layer] += int((chosen != used).any(axis=1).sum())
                n_rows += len(used)
        where = ", ".join(f"MoE layer {layer}: {n} rows" for layer, n in enumerate(n_other_L) if n)
        return f"{1 - n_other_L.sum() / n_rows:.4f} of n = {n_rows:,}", not where, f"other experts in {where}"

    def same_without_taps(self) -> tuple[str, bool | None, str]:
        """Greedy tokens and log-probabilities, bit for bit, or as nearly so as without taps twice."""
        found = self.cell.probed("probe_vllm")
        apart, floor = found["with_taps"], found["without"]
        words = f"max abs logp diff {apart:.2g} nat ({floor:.2g} without taps twice), n = {found['n_tokens']}"
        return words, apart <= floor < math.inf, "further apart than without taps twice, or other tokens"

    def same_without_hooks(self) -> tuple[str, bool | None, str]:
        """Logits, bit for bit."""
        return "logits of one sequence", bool(self.cell.probed("probe_train")["is_equal"]), "logits are not bit-equal"

    def self_replay(self) -> tuple[str, bool | None, str]:
        """Its own routes change nothing."""
        diff_T = np.abs(self.logps("train-replay") - self.logps(TRAIN))
        is_same = not diff_T.max() and bool((self.ids("train-replay") == self.ids(TRAIN)).all())
        return f"max abs logp diff {diff_T.max():.2g} nat, n = {diff_T.size}", is_same, "not bit-equal"

    def agreement(self) -> tuple[str, bool | None, str]:
        """No further apart than a few times what one unit in the last place does."""
        diff_T, ulp = np.abs(self.logps(INFER) - self.logps(TRAIN)), float(self.cell.probed("probe_train")["one_ulp"])
        ratio = diff_T.mean() / ulp if ulp else math.inf
        words = f"mean abs logp diff {diff_T.mean():.2g} nat, n = {diff_T.size}; one ulp: {ulp:.2g}; ratio {ratio:.2g}"
        holds, where = ratio <= MAX_RATIO, self._where_ids_differ(INFER, TRAIN)
        return words, holds, f"ratio above {MAX_RATIO:g}{where}"

    def same_experts(self) -> tuple[str, bool | None, str]:
        """All but near ties."""
        share, n = self._same_sets(INFER, TRAIN)
        least = MIN_SAME_SETS if self.cell.dtype == "float32" else MIN_SAME_SETS_ROUNDED
        words = f"{share:.4f} of n = {n:,} (token, layer)"
        return words, share >= least, f"below {least}{self._where_ids_differ(INFER, TRAIN)}"

    def _rates(self, a: str, b: str) -> NDArray[np.float64]:
        one, other = self.ids(a), self.ids(b)
        routed_T = (one[:, 0, 0] >= 0) & (other[:, 0, 0] >= 0)
        is_same_TL = np.asarray(np.all(one[routed_T] == other[routed_T], axis=2))
        return np.asarray(is_same_TL.mean(axis=0))

    def _same_sets(self, a: str, b: str) -> tuple[float, int]:
        rates_L, one = self._rates(a, b), self.ids(a)
        return float(rates_L.mean()), int((one[:, 0, 0] >= 0).sum()) * len(rates_L)

    def _where_ids_differ(self, a: str, b: str) -> str:
        if not self.run.arm(a).routers:
            return ""
        rates_L = self._rates(a, b)
        return f"; same experts by MoE layer: {', '.join(f'{rate:.3f}' for rate in rates_L)}"

    def difference(self, arm: str, of: str) -> tuple[str, bool | None, str]:
        """An engine against itself."""
        diff_T = np.abs(self.logps(arm) - self.logps(of))
        sets = f"; same experts {self._same_sets(arm, of)[0]:.4f}" if self.run.arm(arm).routers else ""
        return f"mean abs logp diff {diff_T.mean():.2g} nat, max {diff_T.max():.2g}, n = {diff_T.size}{sets}", None, ""

    def n_bytes(self) -> tuple[str, bool | None, str]:
        """On disk, against what was announced."""
        files = self.run.arm_folder(INFER).glob("shard-*.safetensors")
        n_tokens = sum(map(len, self.tokens))
        found = sum(path.stat().st_size for path in files) / n_tokens
        plan = self.cell.plan
        bound = plan.max_bytes([self.cell.request(INFER)], self.cell.dtype) / plan.max_token_rows
        header = 4096 / n_tokens  # names and offsets of a shard's arrays
        return (
            f"{found:.0f} B, n = {n_tokens}; announced at most {bound:.0f}",
            found <= bound + header * len(self.shards),
            "more than announced",
        )

    def overhead(self) -> tuple[str, bool | None, str]:
        """Greedy decoding, best of three each."""
        found = self.cell.probed("probe_vllm")
        return f"{found['overhead']:.2f} (without: {found['seconds_without']:.2g} s for {found['n_tokens']})", None, ""

    def other_observer(self, arm: str) -> tuple[str, bool | None, str]:
        """The same tokens, seen another way, have the experts that hooks saw, near ties apart."""
        share, n = self._same_sets(arm, INFER)
        diff_T = np.abs(self.logps(arm) - self.logps(INFER))
        words = f"same experts {share:.4f} of n = {n:,}; mean abs logp diff {diff_T.mean():.2g} nat"
        where = self._where_ids_differ(arm, INFER)
        return words, share > MIN_SAME_SETS_OF_ONE_ENGINE, f"other experts than the hooks saw{where}"
