"""Which module of which decoder layer is off: both engines' modules on the same inputs, held against each other.

A module is fed what transformers' module really received, in both engines, so nothing that happened before it can reach
its output: an early fault is not amplified, and a flipped expert cannot pass for a fault of the experts (they are given
expert ids and gate weights, too).

Two questions, each with its own yardstick:
    - *function*: float32 against float32. Modules that compute the same function differ by the rounding of sums, a few
      1e-7; what is beyond :data:`FLOAT32_BOUND` is another function.
    - *rounding*: the distance of each engine's low-precision output to transformers' float32 output on the same input,
      and the ratio of the two.

A row of a module's output is apart by the norm of its difference over its own norm, or over the median norm of the
module's rows where that is larger: a row that happens to cancel is not held to more than the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import safe_open

from moediag.analysis.declarations import MODULE_CHECKS
from moediag.notation import INFER, TRAIN
from moediag.numbers import count, percent, sig
from moediag.run.derived import captures_digest
from moediag.run.files import make_folder, read_sealed, write_sealed
from moediag.run.reader import Run

DIAGNOSIS: Final = "diagnosis"
"""Folder of a run with what engines found for its diagnosis."""
_KEPT: Final = "modules.json"

FLOAT32_BOUND: Final = 1e-5
"""Relative error of a row beyond which two float32 modules compute different functions. No module of the healthy tiny
families (reports/modules.md) and of the trained demo model was apart by more than 2.1e-6; the smallest real difference
found, the epsilon of a norm (1e-5 against 1e-6), by 1.8e-5; a weight that is off by 1 % shows as 1e-2."""

PER_PRODUCT: Final = 40.0
"""The bound in units of the measured error of one float32 matrix product of 2,048 terms (2.5e-7 on a processor, 3e-4
where it is TF32): where products are coarser, so is the bound."""

PER_LOW: Final = 64.0
"""The bound in units of what a module's distance in the low precision (p99 over rows) comes to in float32, by the ratio
of the two roundings: a module that amplifies rounding (attention with large logits) does so in either. In the trained
demo model's attention the worst row comes to 27 times what the median distance does."""

COARSE: Final = 4.0
"""Ratio of the engines' distances to float32 beyond which one rounds abnormally. Healthy modules of those
families: 0.43 to 1.5; a router in bfloat16 beside one in float32: 6 and more."""

BEYOND: Final = 10.0
"""Where vLLM cannot run in float32: ratio of distances beyond which rounding no longer explains its output."""

UNLIKE: Final = 0.25
"""Median relative distance to float32 that no rounding makes: of the formats in use the coarsest, four bits of e2m1,
rounds a number by up to a quarter. Beyond it, and beyond :data:`COARSE`, an engine computes something else in its low
precision, or scales there what it scales back elsewhere (vLLM's DeepSeek in float16)."""

_EPSILON: Final = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Rounding of a number, relative."""

_TIE: Final = 1e-6
"""Relative difference of router logits that either engine may order either way."""

SAME, OTHER, FOLLOWS, COARSER = "same function", "another function", "follows", "rounds more"
BEYOND_ROUNDING, NOT_JUDGED = "beyond rounding", "not judged"
NO_ROUNDING = "no rounding"
"""The same function in float32, and in the low precision farther from it than any rounding."""
_JUDGED: Final = (SAME, COARSER, NO_ROUNDING)
"""Verdicts on modules that compute the same function in float32."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Module:
    """What is compared: its name in words, decoder layer (-1 = none), and the name its tensor is kept under.

    Args:
        is_stream: the residual stream before a norm: the sum of what the modules before it made.
        parts: keys of the parts that its output is the sum of.
    """

    words: str
    layer: int
    key: str
    is_stream: bool = False
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """With its decoder layer."""
        return self.words if self.layer < 0 else f"{self.words} of decoder layer {self.layer}"


class Passes:
    """Tensors of all passes over all sequences, one at a time, read from the folder that the engines wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, dict[str, Any]] = {
            path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))
        }
        self.reference: dict[str, Any] = self.facts["train-float32"]
        self._files: dict[str, list[Any]] = {}
        for name in self.facts:
            paths = sorted(folder.glob(f"{name}-*.safetensors"), key=lambda path: int(path.stem.rpartition("-")[2]))
            self._files[name] = [safe_open(path, framework="np") for path in paths]
        self._keys = {name: set(files[0].keys()) if files else set() for name, files in self._files.items()}

    def has(self, name: str, key: str) -> bool:
        """The pass has the tensor, or what it is the difference of."""
        if key.startswith("shared:"):
            return all(key in self._keys.get(name, set()) for key in self._minuend(key))
        return key in self._keys.get(name, set())

    def rows(self, name: str, key: str) -> Array | None:
        """All rows of a tensor in a pass; None where it has none.

        ``shared:<layer>.<name>`` is the MoE block's output without what the routed experts gave to it.
        """
        if not self.has(name, key):
            return None
        if key.startswith("shared:"):
            block, routed = (self.rows(name, one) for one in self._minuend(key))
            assert block is not None
            assert routed is not None
            return block - routed
        parts = [file.get_tensor(key) for file in self._files[name]]
        return np.concatenate(parts)  # type: ignore[no-any-return]

    def _minuend(self, key: str) -> tuple[str, str]:
        place = key.partition(":")[2]
        return f"out:{place}", f"routed:{place.partition('.')[0]}"

    def modules(self) -> Iterator[Module]:
        """What is compared, in the order of computation."""
        order = [(int(layer), str(name), str(kind)) for layer, name, kind in self.reference["order"]]
        n_layers, is_first = max(layer for layer, _, _ in order), True
        moe, shared = set(self.reference["decoder_layers"]), set(self.reference["shared"])
        for layer, name, kind in order:
            shown = layer if layer < n_layers else -1
            if kind == "norm":
                into = "embeddings" if is_first else f"residual stream into {name}"
                yield Module(into, -1 if is_first else shown, f"stream:{layer}.{name}", is_stream=not is_first)
                is_first = False
            is_experts = kind != "moe" and name == "experts"  # of a layer that is its own MoE block (gemma4)
            if layer in moe and (kind == "moe" or is_experts):
                moe.discard(layer)
                yield Module("router", layer, f"router:{layer}")
                yield Module("routing rule", layer, f"rule:{layer}")
                yield Module("routed experts", layer, f"routed:{layer}")
                if layer in shared and kind == "moe":
                    yield Module("shared experts", layer, f"shared:{layer}.{name}")
            if is_experts and layer in self.reference["decoder_layers"]:
                continue
            words = {"moe": f"MoE block ({name})", "attention": f"attention ({name})"}.get(kind, name)
            words = f"final norm ({name})" if kind == "norm" and shown < 0 else words
            parts = (f"routed:{layer}", f"shared:{layer}.{name}") if kind == "moe" else ()
            yield Module(words, shown, f"out:{layer}.{name}", parts=parts)
        yield Module("head", -1, "out:head")

    @property
    def cut_otherwise(self) -> set[int]:
        """Decoder layers in which an engine has modules without a counterpart: what one has in a module, the other may
        have beside it (axk1: a norm behind the experts)."""
        seen = self.facts.get("infer-low", self.facts.get("infer-float32", {}))
        return {int(str(name).partition(".")[0]) for name in (*seen.get("alone", ()), *seen.get("extra", ()))}

    def float32_bound(self) -> float:
        """Relative error beyond which float32 outputs are of different functions, on these devices."""
        return max(FLOAT32_BOUND, PER_PRODUCT * self._float32_error)

    @property
    def _float32_error(self) -> float:
        return max(float(facts.get("float32_error", 0.0)) for facts in self.facts.values())

    def remarks(self) -> list[str]:
        """What could not be compared, and why."""
        remarks = [f"vLLM does not run in float32 here ({self.refusal})"] if self.refusal else []
        seen = self.facts.get("infer-low", self.facts.get("infer-float32", {}))
        if seen.get("alone"):
            remarks.append(f"no module of vLLM stands for {', '.join(seen['alone'])} (decoder layer and name)")
        if seen.get("unseen_routers"):
            remarks.append(
                f"vLLM's routers of decoder layers {seen['unseen_routers']} are not on the path of its experts: there "
                "neither routers nor rules are compared, and each engine's experts take its own routes"
            )
        if self.float32_bound() > 10 * FLOAT32_BOUND:
            remarks.append(
                f"float32 is not real float32 here: a matrix product is off by {sig(self._float32_error, 2)}, so the "
                f"bound is {sig(self.float32_bound(), 2)}"
            )
        return [*remarks, *seen.get("problems", [])]

    @property
    def refusal(self) -> str:
        """Why vLLM did not run in float32; empty where it did."""
        return str(self.facts.get("infer-float32", {}).get("refused", ""))


def relative_error(found: Array, reference: Array) -> NDArray[np.float64]:
    """Of every row: norm of the difference over the larger of its own norm and the median norm; NaN stays NaN.

    Args:
        found, reference: (N, width).
    """
    difference = np.linalg.norm(found.astype(np.float64) - reference, axis=1)
    norm = np.linalg.norm(reference.astype(np.float64), axis=1)
    scale = np.maximum(norm, np.median(norm)) if len(norm) else norm
    return np.where(difference == 0, 0.0, difference / np.where(scale > 0, scale, np.finfo(np.float64).tiny))


def rule_error(found_NE: Array, reference_NE: Array, logits_NE: Array) -> NDArray[np.float64]:
    """As :func:`relative_error` of gate weights by expert; where experts of equal logits were exchanged, of the weights
    in order of size: either choice is right.

    Args:
        found_NE, reference_NE: gate weight of every expert, 0 where it is not chosen.
        logits_NE: the router logits that both were given.
    """
    error = relative_error(found_NE, reference_NE)
    for row in np.flatnonzero(((found_NE != 0) != (reference_NE != 0)).any(1)):
        one, other = (found_NE[row] != 0) & (reference_NE[row] == 0), (reference_NE[row] != 0) & (found_NE[row] == 0)
        mine, theirs = np.sort(logits_NE[row][one]), np.sort(logits_NE[row][other])
        if len(mine) == len(theirs) and np.allclose(mine, theirs, rtol=_TIE, atol=0):
            error[row] = relative_error(np.sort(found_NE[row])[None], np.sort(reference_NE[row])[None])[0]
    return error


def check_frame(folder: Path) -> pd.DataFrame:
    """The frame ``module_checks`` of what the engines wrote to a folder: one row per module, in order of computation.

    Float32 columns are NaN where vLLM refused float32 (then ``beyond rounding`` is judged by distances), the distances
    where the model's own dtype is float32.
    """
    passes = Passes(folder)
    bound = passes.float32_bound()
    measured_rows = [(module, row) for module in passes.modules() if (row := _measure(passes, module, bound))]
    broken: dict[str, str] = {}  # key -> name of what is off
    for i, (module, row) in enumerate(measured_rows):
        row["verdict"], row["note"] = _judge(row, module, passes, broken)
        if row["verdict"] == OTHER and not broken:
            stream = next((later for one, later in measured_rows[i + 1 :] if one.is_stream), None)
            if module.layer in passes.cut_otherwise and stream is not None and stream["n_beyond"] == 0:
                row["verdict"] = NOT_JUDGED
                row["note"] = "it ends elsewhere in vLLM; the residual stream that it adds to agrees"
        if row["verdict"] in (OTHER, BEYOND_ROUNDING):
            broken[module.key] = module.name
    rows = [row for _, row in measured_rows]
    return MODULE_CHECKS.validate(pd.DataFrame(rows, columns=MODULE_CHECKS.names))


def _measure(passes: Passes, module: Module, bound: float) -> dict[str, Any] | None:
    reference = passes.rows("train-float32", module.key)
    if reference is None:
        return None
    row: dict[str, Any] = {"module": module.words, "decoder_layer": module.layer, "n_rows": len(reference)}
    found = passes.rows("infer-float32", module.key)
    own = {side: passes.rows(f"{side}-low", module.key) for side in ("train", "infer")}
    distances = {side: _error(passes, module, rows, reference) for side, rows in own.items()}
    is_rule = module.key.startswith("rule:")
    if distances["train"] is not None and not is_rule:  # a rule is given logits: nothing is amplified
        epsilon = _EPSILON[passes.facts["train-low"]["dtype"]]
        bound = max(bound, PER_LOW * _EPSILON["float32"] / epsilon * _quantile(distances["train"], 0.99))
    error = _error(passes, module, found, reference)
    row |= {"float32_p50": _quantile(error, 0.5), "float32_max": _quantile(error, 1.0), "bound": bound}
    row["n_beyond"] = np.nan if error is None else float((~(error <= bound)).sum())  # NaN is beyond every bound
    is_rounded = not (module.is_stream or is_rule or module.key.startswith("shared:"))  # not of several modules
    for side, distance in distances.items():
        shown = distance if is_rounded else None
        row |= {f"{side}_p50": _quantile(shown, 0.5), f"{side}_p99": _quantile(shown, 0.99)}
    train, infer = row["train_p50"], row["infer_p50"]
    row["ratio"] = infer / train if train > 0 else np.nan
    free = passes.rows("infer-free", module.key)
    start = passes.rows("train-low" if "train-low" in passes.facts else "train-float32", module.key)
    row["free_p50"] = _quantile(None if free is None or start is None else relative_error(free, start), 0.5)
    mine, theirs = (own["train"], own["infer"]) if "train-low" in passes.facts else (reference, found)
    is_comparable = mine is not None and theirs is not None and mine.shape == theirs.shape
    row["n_bit_equal"] = float((mine == theirs).all(1).sum()) if is_comparable else np.nan  # type: ignore[union-attr]
    return row


def _error(passes: Passes, module: Module, found: Array | None, reference: Array) -> NDArray[np.float64] | None:
    if found is None or found.shape != reference.shape:
        return None
    if module.key.startswith("rule:"):
        first = "train-low" if "train-low" in passes.facts else "train-float32"
        logits = passes.rows(first, module.key.replace("rule:", "router:"))
        if logits is not None:
            return rule_error(found, reference, logits)
    return relative_error(found, reference)


def _quantile(values: NDArray[np.float64] | None, q: float) -> float:
    return np.nan if values is None or not len(values) else float(np.quantile(values, q))


def _judge(row: dict[str, Any], module: Module, passes: Passes, broken: dict[str, str]) -> tuple[str, str]:
    """Verdict and note of a module, after those before it."""
    is_seen = passes.has("infer-float32", module.key)
    if is_seen and np.isnan(row["n_beyond"]):
        return OTHER, "its output has another shape in vLLM"
    if row["n_beyond"] > 0:
        causes = [broken[part] for part in module.parts if part in broken]
        if module.is_stream and broken:
            causes = [next(iter(broken.values()))]
        return (FOLLOWS, f"from {causes[0]}") if causes else (OTHER, "")
    ratio, low = row["ratio"], passes.facts.get("train-low", {})
    if np.isnan(ratio) and not (row["infer_p50"] > 0 and row["train_p50"] == 0):
        if not is_seen:
            return NOT_JUDGED, passes.refusal or "vLLM has no module of this place"
        return SAME, ""
    if not is_seen and ratio > BEYOND:
        return BEYOND_ROUNDING, f"no float32 in vLLM: {passes.refusal}"
    return _rounding(row, str(low.get("dtype", "")), SAME if is_seen else NOT_JUDGED, passes.refusal)


def _rounding(row: dict[str, Any], dtype: str, otherwise: str, note: str) -> tuple[str, str]:
    distances = {"transformers": float(row["train_p50"]), "vLLM": float(row["infer_p50"])}
    least = _EPSILON.get(dtype, 0.0) / 16  # rounding once to the dtype gives 0.4 of it: less is not rounded at all
    near, far = sorted(distances, key=lambda engine: distances[engine])
    if max(distances[far], least) < COARSE * max(distances[near], least):
        return otherwise, note
    words = f"{sig(distances[far], 2)} from float32 in {far}, {sig(distances[near], 2)} in {near}"
    return NO_ROUNDING if distances[far] > UNLIKE else COARSER, f"{far}: relative distance {words}"


@dataclass(frozen=True)
class ModuleChecks:
    """What a check of modules found.

    Args:
        frame: ``module_checks``, one row per module in the order of computation.
        first: the first module beyond rounding in a sentence, or that there is none.
        further: every other one, and modules that round more in one engine than in the other, a sentence each.
        unequal: the first module that is not bit-equal; only of interest where the engines claim to be.
        remarks: what could not be compared, and why.
    """

    frame: pd.DataFrame
    first: str
    further: list[str]
    unequal: str
    remarks: list[str]

    @classmethod
    def of(cls, folder: Path) -> ModuleChecks:
        """What both engines left in a folder."""
        frame = check_frame(folder)
        return cls(
            frame, first_words(frame), further_words(frame), first_unequal_words(frame), Passes(folder).remarks()
        )

    @property
    def is_off(self) -> bool:
        """Whether a module computes another function, or is beyond rounding."""
        return bool(self.frame["verdict"].isin((OTHER, BEYOND_ROUNDING)).any())

    def keep(self, run: Run) -> None:
        """Write it into the run, for its analysis to show."""
        make_folder(run.path / DIAGNOSIS)
        rows = json.loads(self.frame.to_json(orient="records", double_precision=15))
        words = {"first": self.first, "further": self.further, "unequal": self.unequal, "remarks": self.remarks}
        write_sealed(run.path / DIAGNOSIS / _KEPT, {**words, "rows": rows, "captures": _captures(run)})


def kept_checks(run: Run) -> ModuleChecks | None:
    """The check of modules that was kept in the run; None where there is none, or it is of other captures.

    Raises:
        CorruptRunError: changed since it was written.
    """
    path = run.path / DIAGNOSIS / _KEPT
    if not path.exists():
        return None
    kept = read_sealed(path)
    if kept["captures"] != _captures(run):
        return None
    frame = MODULE_CHECKS.validate(pd.DataFrame(kept["rows"], columns=MODULE_CHECKS.names))
    return ModuleChecks(frame, kept["first"], kept["further"], kept["unequal"], kept["remarks"])


def _captures(run: Run) -> dict[str, str]:
    return captures_digest(run, [run.reference(TRAIN), run.reference(INFER)])


def first_words(frame: pd.DataFrame) -> str:
    """The first module beyond rounding in a sentence, or that there is none, with n and the bound."""
    off = frame[frame["verdict"].isin((OTHER, BEYOND_ROUNDING))]
    fine = frame[frame["verdict"].isin(_JUDGED) & (frame["n_beyond"] == 0)]
    healthy = float(fine["float32_max"].max()) if len(fine) else float("nan")
    if off.empty:
        judged = frame[frame["verdict"].isin(_JUDGED)]
        if judged.empty:
            return _without_float32(frame)
        return (
            f"every module computes the same function in both engines: {count(len(fine), 'comparison')} of outputs on "
            f"the same input, float32 against float32, differ by at most {sig(healthy, 2)} of a row's norm "
            f"(rounding up to {sig(float(frame['bound'].min()), 2)}), n = {count(int(fine['n_rows'].max()), 'row')}"
        )
    row = off.iloc[0]
    name = _name(row)
    if row["verdict"] == BEYOND_ROUNDING:
        return (
            f"{name} is beyond rounding: on the same input vLLM's output is {sig(row['ratio'], 2)} times as far from "
            f"float32 as transformers' (bound {sig(BEYOND, 2)} times), n = {count(row['n_rows'], 'row')}; whether it "
            f"computes another function cannot be decided ({row['note']})"
        )
    before = frame.iloc[: off.index[0]]
    agree = "its input and everything before it agree" if len(before) else "nothing comes before it"
    return (
        f"{name} computes another function: on the same input its output differs by {percent(row['float32_p50'])} in "
        f"the median row and {percent(row['float32_max'])} in the worst (float32 against float32; the other modules "
        f"of this model: at most {sig(healthy, 2)}; rounding up to {sig(row['bound'], 2)}), in "
        f"{count(row['n_beyond'])} of {count(row['n_rows'], 'row')}; {agree}"
    )


def _without_float32(frame: pd.DataFrame) -> str:
    reasons = "; ".join(dict.fromkeys(note for note in frame["note"] if note))
    ratio = float(frame["ratio"].max())
    if np.isnan(ratio):
        return f"no module could be judged: {reasons}"
    return (
        f"no module is beyond rounding: on the same input vLLM's outputs are at most {sig(ratio, 2)} times as far from "
        f"float32 as transformers' (limit {sig(BEYOND, 2)} times, medians of n = {count(int(frame['n_rows'].max()))} "
        f"rows); another function that differs by less cannot be excluded without float32 in vLLM ({reasons})"
    )


def further_words(frame: pd.DataFrame) -> list[str]:
    """Every other module that is off, and which round more than their counterpart, a line each."""
    off = frame[frame["verdict"].isin((OTHER, BEYOND_ROUNDING))].iloc[1:]
    lines = [
        f"{_name(row)} computes another function, too: {percent(row['float32_p50'])} in the median row, n = "
        f"{count(row['n_rows'], 'row')}"
        for _, row in off[off["verdict"] == OTHER].iterrows()
    ]
    return lines + unlike_words(frame) + _low_words(frame, COARSER, "rounds more")


def unlike_words(frame: pd.DataFrame) -> list[str]:
    """Which modules do in an engine's low precision what no rounding does, a line each."""
    lines = _low_words(frame, NO_ROUNDING, "differs by more than any rounding")
    return [f"{line}, where no format of four bits or more rounds by over {sig(UNLIKE)}" for line in lines]


def _low_words(frame: pd.DataFrame, verdict: str, what: str) -> list[str]:
    lines = []
    for module, rows in frame[frame["verdict"] == verdict].groupby("module", sort=False):
        layers = ", ".join(str(layer) for layer in rows["decoder_layer"] if layer >= 0)
        lines.append(
            f"{module}{f' of decoder layers {layers}' if layers else ''} {what} in {rows['note'].iloc[0]} "
            f"(median of n = {count(int(rows['n_rows'].iloc[0]), 'row')})"
        )
    return lines


def first_unequal_words(frame: pd.DataFrame) -> str:
    """The first module that is not bit-equal on the same input, where both engines claim to be."""
    seen = frame[frame["n_bit_equal"].notna()]
    unequal = seen[seen["n_bit_equal"] < seen["n_rows"]]
    if unequal.empty:
        return f"all {count(len(seen), 'comparison')} are bit-equal, n = {count(int(seen['n_rows'].max()), 'row')}"
    row = unequal.iloc[0]
    n_unequal = int(row["n_rows"] - row["n_bit_equal"])
    return f"{_name(row)} is the first that is not bit-equal, in {count(n_unequal)} of {count(row['n_rows'], 'row')}"


def _name(row: Any) -> str:
    return Module(str(row["module"]), int(row["decoder_layer"]), "").name
