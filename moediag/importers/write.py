"""From the steps of a dump to a run of schema 2, or to a series of them; no run is seen until all of it is there.

    rollout    the arm of the sampler's side (role infer): what the engine logged while it sampled
    trainer    the arm of the trainer's side (role train)

A step is read once. Its shards are kept in a folder beside the run that is being made, for the largest expert id, the
slots of dense layers and whether a side has anything at all are known only at the end.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moediag import __version__
from moediag.errors import DumpError, RunError
from moediag.folder import made_whole, refuse_current_folder
from moediag.importers.registry import files_of, foreign_format, importer_of
from moediag.importers.rollouts import SIDES, Importer, Options, Rollout, Step
from moediag.importers.sequences import dense_layers, no_id, total_experts, zero_layers
from moediag.notation import INFER, NO_TOKEN, NOT_ROUTED, TRAIN
from moediag.run.capture import LARGEST_ROUNDED_LOGP, Capture, Shard, TokenRows
from moediag.run.create import create_run
from moediag.run.files import digest_of, make_folder, sha256_file
from moediag.run.reader import Run, open_run
from moediag.run.records import (
    MANIFEST,
    ArmRecord,
    Imported,
    Router,
    RunRecord,
    Sampling,
    Score,
    Sidecar,
    TokensFrom,
    read_record,
)
from moediag.run.series import create_series, is_series, open_series
from moediag.run.writer import CLAIMS, RunWriter

ARMS: Final = {INFER: "rollout", TRAIN: "trainer"}
"""Side -> name of its arm; recipes of ``capture`` have other names, so that our own engines' arms fit beside them."""

_TOKENS_AT_ONCE: Final = 1 << 15
"""Tokens of a shard; it ends with the sequence that reaches them."""
_LARGEST_ID: Final = 32_766


@dataclass
class _Side:
    """What a side of a step turned out to have."""

    has_anything: bool = False
    has_entropy: bool = False
    n_scored: int = 0
    n_experts: int | None = None
    largest_id: int = NOT_ROUTED
    shape: tuple[int, int] | None = None
    is_zero_L: NDArray[np.bool_] | None = None


def import_dump(
    importer: Importer,
    files: Sequence[Path],
    output: Path,
    options: Options,
    force: bool = False,
    as_series: bool = False,
) -> list[Run]:
    """Import a dump: a run where it holds one step, else a series with a run per step.

    Steps are added to a series that is there; the same step again changes nothing. A dump that is refused leaves
    everything as it was; where an import was interrupted, the steps that are whole stay and the next one goes on.

    Args:
        force: replace the run or series that is there.
        as_series: make a series even of one step.

    Returns:
        The runs of the dump's steps.

    Raises:
        DumpError: the dump cannot be used.
        RunError: the folder holds something else, or a step with other contents.
    """
    refuse_current_folder(output)
    is_new = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_new and not ((output / MANIFEST).exists() or is_series(output)):
        raise RunError(f"{output} is neither new nor a run or series; give -o a new folder")
    requested = {"format": importer.name, **options.content()}
    steps = importer.read(files, options)
    numbers = [step.number for step in steps]
    as_series |= len(steps) > 1 or (is_series(output) and not force)
    if as_series and None in numbers:
        raise DumpError(f"{steps[0].files[0]} does not say of which step it is, as a series needs; import it as a run")

    def make(step: Step, path: Path) -> None:
        _fill(path, importer, step, options, {**requested, "files": _digests(step, files)})

    if not as_series:
        if is_new or force:
            with made_whole(output) as made:
                make(steps[0], made)
        else:
            _refuse_other(open_run(output), {**requested, "files": _digests(steps[0], files)}, steps[0], make)
        return [open_run(output)]
    source = f"{importer.name} dump"
    if force and not is_new:
        with made_whole(output) as made:
            series = create_series(made, __version__, source)
            for step in steps:
                make(step, series.run_path(int(step.number or 0)))
    else:
        if not is_new and not (is_series(output) and open_series(output).record.source == source):
            more = " (a run becomes no series; --series makes one of the first step)" if not is_series(output) else ""
            raise RunError(f"{_HOLDS_ANOTHER.format(output)}{more}")
        added: list[Path] = []
        try:
            series = create_series(output, __version__, source)
            for step in steps:
                path = series.run_path(int(step.number or 0))
                if (path / MANIFEST).exists():
                    _refuse_other(open_run(path), {**requested, "files": _digests(step, files)}, step, make)
                    continue
                with made_whole(path) as made:
                    make(step, made)
                added.append(path)
        except Exception:  # not where a person or the system stops it: then what is whole is kept
            for path in [output] if is_new else added:
                shutil.rmtree(path, ignore_errors=True)
            raise
    return [open_run(open_series(output).run_path(int(number or 0))) for number in numbers]


_HOLDS_ANOTHER: Final = "{} holds another run or series; give -o a new folder, or --force to replace it"


def _refuse_other(run: Run, configuration: dict[str, Any], step: Step, make: Callable[[Step, Path], None]) -> None:
    """Refuse what is not what the run was made of: the same files, or others that say the same of the step.

    Raises:
        RunError: the run is another one, or of other contents.
    """
    there = run.record.configuration
    if there == configuration:
        return
    if (there.get("format"), run.record.step) != (configuration["format"], step.number):
        raise RunError(_HOLDS_ANOTHER.format(run.path))
    with TemporaryDirectory(prefix="moediag-") as folder:
        make(step, Path(folder) / "run")
        if _contents(open_run(Path(folder) / "run")) <= _contents(run):
            return
    raise RunError(
        f"{run.path} was imported with other contents or options; give -o a new folder, or --force to replace it"
    )


def _contents(run: Run) -> set[str]:
    """What an import puts in a run, as digests: records, token tables, captures; not files' names, nor notes, which may
    count what a file holds of other steps."""
    tokens = run.record.tokens.model_copy(update={"notes": ()})
    record = run.record.model_copy(update={"configuration": {}, "moediag_version": "", "tokens": tokens})
    found = {digest_of(record.content()), *(sidecar.data_sha256 for sidecar in _sidecars(run, "tokens"))}
    for arm in run.arms():
        about = run.arm(arm)
        if isinstance(about.origin, Imported):
            about = about.model_copy(update={"origin": Imported(format=about.origin.format)})
            found |= {digest_of(about.content()), *(one.data_sha256 for one in _sidecars(run, f"arms/{arm}"))}
    return found


def _sidecars(run: Run, folder: str) -> Iterator[Sidecar]:
    return (read_record(run.sidecar_path(folder, shard), Sidecar) for shard in run.shards)


@contextmanager
def imported_for_now(paths: Sequence[Path], options: Options) -> Iterator[list[Run]]:
    """The runs of a framework's dump as long as the body runs; they are called after the dump.

    Raises:
        DumpError: the dump cannot be used.
    """
    name = foreign_format(paths)
    assert name is not None
    importer = importer_of(name)
    with TemporaryDirectory(prefix="moediag-") as folder:
        yield import_dump(importer, files_of(importer, paths), Path(folder) / (paths[0].name or name), options)


def runs_of(path: Path) -> list[Run]:
    """The runs that an import made."""
    return list(open_series(path).runs()) if is_series(path) else [open_run(path)]


def _digests(step: Step, files: Sequence[Path]) -> dict[str, str]:
    """Digests of a step's files, by their paths below the folder that they share."""
    own = {path.resolve(): path for path in files if path in {*step.files}}
    folder = os.path.commonpath([path.parent for path in own])
    return {whole.relative_to(folder).as_posix(): sha256_file(path) for whole, path in own.items()}


def _fill(path: Path, importer: Importer, step: Step, options: Options, configuration: dict[str, Any]) -> None:
    """Make the run of a step at a path where nothing is, or an empty folder."""
    kept = path.with_name(f"{path.name}.read")
    make_folder(kept)
    sides = {side: _Side() for side in SIDES}
    try:
        shards = _read(step, sides, kept, options)
        present = [side for side in SIDES if sides[side].has_anything]
        if not present and step.tokenizer is None:
            raise DumpError(
                f"{step.files[0]}: neither side has a log-probability or a route; there is nothing to import"
            )
        temperature = options.temperature
        run = create_run(
            path,
            RunRecord(
                moediag_version=__version__,
                configuration=configuration,
                tokenizer=step.tokenizer,
                tokens=TokensFrom(origin="imported", notes=() if present else tuple(step.notes)),
                sampling=None if temperature is None else Sampling(temperature=float(temperature)),
                shards=shards,
                main_pair=(ARMS[TRAIN], ARMS[INFER]) if len(present) == len(SIDES) else None,
                step=step.number,
            ),
            None,
            None,
        )
        routers = _routers(step, sides, options)
        is_dense = _dense(step, sides)
        writer = RunWriter(run)
        origin = Imported(format=importer.name, files=configuration["files"], notes=tuple(step.notes))
        for side in present:
            writer.begin_arm(_arm(importer, step, side, sides[side], routers.get(side, ()), origin, options))
        for shard in shards:
            tokens, captures = pickle.loads((kept / shard.stem).read_bytes())  # written by this very call
            writer.write_tokens(shard, tokens)
            for side in present:
                capture = captures[side]
                if side in is_dense:
                    ids_TLK = capture.expert_ids_TLK
                    if ids_TLK is None:  # the first rows that have routes came later
                        ids_TLK = np.full((len(tokens), *(sides[side].shape or ())), NOT_ROUTED, np.int16)
                    capture = replace(capture, expert_ids_TLK=ids_TLK[:, ~is_dense[side]])
                else:
                    capture = replace(capture, expert_ids_TLK=None)
                if not sides[side].has_entropy:
                    capture = replace(capture, entropy_T=None)
                writer.write_capture(ARMS[side], shard, tokens, capture, {}, _narrow(capture))
        shutil.rmtree(path / CLAIMS, ignore_errors=True)
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def _read(step: Step, sides: dict[str, _Side], kept: Path, options: Options) -> tuple[Shard, ...]:
    """Keep the step's rollouts as shards, and learn what the sides have."""
    shards: list[Shard] = []
    prompts = _Prompts()
    first = 0
    for index, part in enumerate(_parts(step)):
        tokens = _token_rows(part, first, prompts).check(
            f"{step.files[0]} and others" if step.files[1:] else str(step.files[0])
        )
        shard = Shard(index, first, len(part))
        captures = {side: _capture(part, side, sides[side], len(tokens), step) for side in SIDES}
        (kept / shard.stem).write_bytes(pickle.dumps((tokens, captures), pickle.HIGHEST_PROTOCOL))
        shards.append(shard)
        first += len(part)
    if not shards:
        raise DumpError(f"{step.files[0]} holds no sequence; nothing was imported")
    return tuple(shards)


def _narrow(capture: Capture) -> dict[str, str]:
    """Router logits are stored as bfloat16 where that holds all of them."""
    logits_TLE = capture.router_logits_TLE
    is_exact = logits_TLE is not None and not (logits_TLE.view(np.uint32) & 0xFFFF).any()
    return {"router_logits_TLE": "bfloat16"} if is_exact else {}


def _parts(step: Step) -> Iterator[list[Rollout]]:
    part: list[Rollout] = []
    n_tokens = 0
    for rollout in step.rollouts:
        _check(rollout)
        part.append(rollout)
        n_tokens += len(rollout)
        if n_tokens >= _TOKENS_AT_ONCE:
            yield part
            part, n_tokens = [], 0
    if part:
        yield part


def _check(rollout: Rollout) -> None:
    """Refuse what an importer may hand through from a damaged dump.

    Raises:
        DumpError: arrays of other lengths, prompt tokens in the response, or log-probabilities above 0.
    """
    n = len(rollout)
    arrays = {
        **{name: getattr(rollout, name) for name in ("token_id_T", "is_trained_T", "turn_T", "weight_version_T")},
        "advantage_T": rollout.advantage_T,
        **{f"logp of {side}": array for side, array in rollout.logp.items()},
        **{f"entropy of {side}": array for side, array in rollout.entropy.items()},
        **{f"expert ids of {side}": array for side, array in rollout.expert_ids.items()},
        **{f"router logits of {side}": array for side, array in rollout.router_logits.items()},
    }
    for name, array in arrays.items():
        if array is not None and len(array) != n:
            raise DumpError(f"{rollout.where}: {name} has {len(array)} entries for {n} tokens")
    if not n:
        raise DumpError(f"{rollout.where}: a sequence without a token")
    if (rollout.is_response_T[:-1] & ~rollout.is_response_T[1:]).any():
        raise DumpError(f"{rollout.where}: prompt tokens stand behind response tokens; expected the prompt first")
    if rollout.is_trained_T is not None and (rollout.is_trained_T & ~rollout.is_response_T).any():
        raise DumpError(f"{rollout.where}: the loss mask marks tokens of the prompt")
    for side, logp_T in rollout.logp.items():
        is_above_T = logp_T > LARGEST_ROUNDED_LOGP
        if is_above_T.any():
            t = int(np.argmax(is_above_T))
            raise DumpError(
                f"{rollout.where}: {side}'s log-probability of token {t} is {logp_T[t]:g}, above 0; are these logits "
                "or probabilities?"
            )
    for side, ids_TLK in rollout.expert_ids.items():
        if ids_TLK.size and not (ids_TLK.min() >= NOT_ROUTED and ids_TLK.max() <= _LARGEST_ID):
            wrong = ids_TLK[(ids_TLK < NOT_ROUTED) | (ids_TLK > _LARGEST_ID)][0]
            raise DumpError(f"{rollout.where}: {side}'s routes hold {no_id(int(wrong))}")


class _Prompts:
    """Numbers prompts in the order of their first sample."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._samples: Counter[int] = Counter()

    def of(self, rollout: Rollout) -> tuple[int, int]:
        """Number of the prompt, and which sample of it the rollout is."""
        key: Hashable = rollout.prompt
        if key is None:
            ids_T = rollout.token_id_T
            prompt = None if ids_T is None else ids_T[~rollout.is_response_T]
            is_known = prompt is not None and len(prompt) and (prompt != NO_TOKEN).all()
            key = prompt.tobytes() if is_known and prompt is not None else (len(self._numbers),)
        number = self._numbers.setdefault(key, len(self._numbers))
        self._samples[number] += 1
        return number, self._samples[number] - 1


def _token_rows(part: Sequence[Rollout], first: int, prompts: _Prompts) -> TokenRows:
    """The token table of a shard's rollouts."""
    length_S = [len(one) for one in part]
    prompt_S, sample_S = zip(*map(prompts.of, part), strict=True)

    def joined(name: str, absent: Any, dtype: Any) -> Any:
        arrays = [getattr(one, name) for one in part]
        if all(array is None for array in arrays):
            return None
        whole = (np.full(n, absent, dtype) if a is None else np.asarray(a, dtype)
                 for a, n in zip(arrays, length_S, strict=True))  # fmt: skip
        return np.concatenate(list(whole))

    token_id_T = joined("token_id_T", NO_TOKEN, np.int64)
    is_response_T = np.concatenate([one.is_response_T for one in part])
    trained = [one.is_response_T if one.is_trained_T is None else one.is_trained_T for one in part]
    reward_T = np.repeat(np.array([one.reward for one in part], np.float64), length_S)
    return TokenRows(
        seq_id_T=np.repeat(np.arange(first, first + len(part)), length_S).astype(np.int64),
        prompt_id_T=np.repeat(np.array(prompt_S), length_S).astype(np.int64),
        sample_index_T=np.repeat(np.array(sample_S), length_S).astype(np.int32),
        position_T=np.concatenate([np.arange(n) for n in length_S]).astype(np.int32),
        token_id_T=np.full(sum(length_S), NO_TOKEN, np.int64) if token_id_T is None else token_id_T,
        is_response_T=is_response_T,
        is_trained_T=np.concatenate(trained),
        turn_T=joined("turn_T", -1, np.int32),
        weight_version_T=joined("weight_version_T", None, object),
        advantage_T=joined("advantage_T", np.nan, np.float64),
        reward_T=None if np.isnan(reward_T).all() else reward_T,
    )


def _capture(part: Sequence[Rollout], side: str, known: _Side, n_tokens: int, step: Step) -> Capture:
    """One side's arrays of a shard; ``known`` learns from them."""
    logp_T, entropy_T = (np.full(n_tokens, np.nan, np.float32) for _ in range(2))
    routed = [(one, one.expert_ids[side]) for one in part if side in one.expert_ids]
    for one, ids_TLK in routed:
        known.shape = known.shape or ids_TLK.shape[1:]
        if ids_TLK.shape[1:] != known.shape:
            raise DumpError(
                f"{one.where}: {side}'s routes have (L, K) = {ids_TLK.shape[1:]}, the first ones {known.shape}"
            )
    all_TLK = None if known.shape is None else np.full((n_tokens, *known.shape), NOT_ROUTED, np.int16)
    start = 0
    for one in part:
        here = slice(start, start := start + len(one))
        for array_T, given in ((logp_T, one.logp), (entropy_T, one.entropy)):
            if side in given:
                array_T[here] = given[side]
        if all_TLK is not None and side in one.expert_ids:
            all_TLK[here] = one.expert_ids[side]
    known.n_scored += int((~np.isnan(logp_T)).sum())
    known.has_entropy |= bool(np.isfinite(entropy_T).any())
    known.has_anything |= bool(known.n_scored or known.has_entropy or all_TLK is not None)
    if all_TLK is not None:
        known.largest_id = max(known.largest_id, int(all_TLK.max(initial=NOT_ROUTED)))
        if (all_TLK != NOT_ROUTED).any():
            is_zero_L = zero_layers(all_TLK)
            known.is_zero_L = is_zero_L if known.is_zero_L is None else known.is_zero_L & is_zero_L
    return Capture(logp_T, entropy_T, all_TLK, router_logits_TLE=_logits(part, side, known))


def _logits(part: Sequence[Rollout], side: str, known: _Side) -> NDArray[np.float32] | None:
    """Router logits of a shard; a dump has them of every sequence, or is taken to have none.

    Raises:
        DumpError: some sequences have them and others do not.
    """
    given = [one.router_logits.get(side) for one in part]
    widths = {None if logits_TLE is None else logits_TLE.shape[2] for logits_TLE in given}
    if len(widths) > 1 or (known.n_experts and {known.n_experts} != widths):
        raise DumpError(f"{part[0].where} and others: {side}'s router logits are there of some sequences only")
    known.n_experts = next(iter(widths))
    return None if known.n_experts is None else np.concatenate(given)  # type: ignore[arg-type]


def _dense(step: Step, sides: Mapping[str, _Side]) -> dict[str, NDArray[np.bool_]]:
    """Side -> which layers of its routes are slots of dense layers."""
    zeros = {side: known.is_zero_L for side, known in sides.items() if known.is_zero_L is not None}
    with_slots = {side: zero_L for side, zero_L in zeros.items() if step.has_dense_layers.get(side, True)}
    none = {side: np.zeros_like(zero_L) for side, zero_L in zeros.items()}
    return none | dense_layers(with_slots)


def _routers(step: Step, sides: Mapping[str, _Side], options: Options) -> dict[str, tuple[Router, ...]]:
    """Side -> its routers: E of both sides together, decoder layers as far as the routes tell them."""
    is_dense = _dense(step, sides)
    if not is_dense:
        return {}
    largest = max(known.largest_id for known in sides.values())
    widest = max(known.shape[1] for known in sides.values() if known.shape)
    n_experts = max(largest + 1, widest)
    scored = max((known.n_experts or 0 for known in sides.values()), default=0)
    given = total_experts(options.n_experts, options.n_zero_experts)
    if scored and given in (None, scored) and n_experts <= scored:
        n_experts = scored
    elif given is None:
        step.notes.append(f"E is taken as the largest expert id + 1, {n_experts}; --num-experts tells it")
    elif largest >= given:
        zero = f" and --zero-experts {options.n_zero_experts}" if options.n_zero_experts else ""
        raise DumpError(
            f"{step.files[0]}: the largest expert id is {largest}, with --num-experts {options.n_experts}{zero}; is "
            "the width of the ids another one?"
        )
    else:
        n_experts = given
    layers = {side: np.flatnonzero(~dense_L) for side, dense_L in is_dense.items()}
    for side, dense_L in is_dense.items():
        if dense_L.any():
            step.notes.append(
                f"{ARMS[side]}: layers {np.flatnonzero(dense_L).tolist()} of {len(dense_L)} are expert 0 in every row: "
                "slots of dense layers, left out"
            )
    for side in layers:
        if side in step.decoder_layers:
            layers[side] = np.array(step.decoder_layers[side])
        elif not step.has_dense_layers.get(side, True):
            other = next((layers[one] for one in layers if step.has_dense_layers.get(one, True)), None)
            if other is not None and len(other) == len(layers[side]):
                layers[side] = other
            else:
                step.notes.append(f"{ARMS[side]}: which decoder layers are MoE is not known; layers count from 0")
    return {
        side: tuple(
            Router(
                decoder_layer=int(layer),
                n_experts=n_experts,
                top_k=int(sides[side].shape[1]),  # type: ignore[index]
                n_zero_experts=options.n_zero_experts,
            )
            for layer in found_L
        )
        for side, found_L in layers.items()
    }


def _arm(
    importer: Importer, step: Step, side: str, known: _Side, routers: tuple[Router, ...], origin: Imported,
    options: Options,
) -> ArmRecord:  # fmt: skip
    score = step.scores.get(side, Score())
    if score.temperature is None and options.temperature is not None:
        score = score.model_copy(update={"temperature": float(options.temperature)})
    arrays = ("logp_T", *(["entropy_T"] if known.has_entropy else []), *(["expert_ids_TLK"] if routers else []))
    arrays += ("router_logits_TLE",) if known.n_experts else ()
    return ArmRecord(
        name=ARMS[side],
        role="infer" if side == INFER else "train",
        engine=importer.name,
        path=step.paths.get(side, "sampled" if side == INFER else "teacher-forced"),
        no_checkpoint="the dump names none",
        origin=origin,
        score=score,
        arrays=arrays,
        routers=routers,
    )
