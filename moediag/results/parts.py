"""The parts of an analysis: each is made by itself, whole or in pieces (:mod:`moediag.run.pieces`), in any process, and
kept while what it was made of is unchanged.

    RUN/analysis/PAIR/<frame>.parquet   the frames of the parts of a pair
    RUN/analysis/kept.json              sealed: of every part its summary, the sha256 of its frames, and the digest of
                                        what it was made of; and the same of the whole analysis

Invariants:
    - what a part is made of is decided by records and sidecars, whose digests say what the arrays hold: no array is
      read to find out that nothing changed (``validate`` reads every byte), but every kept frame is held against its
      digest before it is used again;
    - the code of this package, and the versions of the libraries that count, are part of what a part is made of;
    - a part is the same file, byte for byte, whichever process made it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy

import moediag
from moediag.analysis.flips.explained import explained_flips_of, forecast_flips_of, noise_arms
from moediag.analysis.tokens import TokenParts, TokenSource
from moediag.errors import RunError
from moediag.folder import SUMMARY, write_frames
from moediag.hygiene.check import Check, checks_of, join_check, read_check
from moediag.hygiene.findings import Finding
from moediag.notation import INFER, TRAIN
from moediag.results.pair_analysis import PairPiece, join_pieces, read_piece
from moediag.results.pair_summary import pair_summary
from moediag.run.capture import Shard
from moediag.run.derived import ANALYSIS, KEPT
from moediag.run.files import digest_of, make_folder, read_sealed, sha256_bytes, sha256_file, write_sealed
from moediag.run.pieces import Pool, Work, in_pieces
from moediag.run.reader import Run
from moediag.run.records import MANIFEST

Frames = Mapping[str, pd.DataFrame | Iterable[pd.DataFrame]]
"""Frames by declared name; a large one as rows that follow each other."""
Content = tuple[dict[str, Any], Frames]
"""A part's summary, ready for strict JSON, and its frames."""

_DERIVED: Final = (ANALYSIS, "figures", "logs")
"""Folders of a run that no analysis reads."""


@dataclass(frozen=True)
class Part:
    """One part of an analysis.

    Args:
        name: unique in the run.
        pair: whose folder its frames are in.
        arms: whose captures it reads.
        join: makes it of its pieces, in order; a module's function, as in :class:`~moediag.run.pieces.Work`.
        read: makes a piece of it; None = it has no pieces.
    """

    name: str
    pair: str
    arms: tuple[str, ...]
    join: Callable[[Run, Iterator[Any]], Content]
    read: Callable[[Run, tuple[Shard, ...], Path], Any] | None = None


@dataclass(frozen=True)
class Made:
    """A part that lies on disk.

    Args:
        summary: its own.
        frames: frame -> sha256 of its file.
        made_of: digest of what it was made of.
    """

    summary: dict[str, Any]
    frames: dict[str, str]
    made_of: str


def pair_part(run: Run, arm_a: str, arm_b: str) -> Part:
    """Every analysis of a pair of arms.

    Raises:
        IncompleteRunError: an arm is missing or has missing shards.
    """
    pair = run.pair(arm_a, arm_b)
    arms = (pair.minuend, pair.subtrahend, run.routes_of(pair.minuend, pair.subtrahend))
    return Part(
        pair.name,
        pair.name,
        tuple(dict.fromkeys(arms)),
        partial(_analyzed, arm_a=arm_a, arm_b=arm_b),
        partial(_read_pair, arm_a=arm_a, arm_b=arm_b),
    )


def flip_parts(run: Run, pair: str) -> list[Part]:
    """Flips of infer~train explained, and forecast; their frames lie beside those of ``pair``."""
    both = run.reference(INFER), run.reference(TRAIN)
    if not all(arm in run.arms() and run.is_complete(arm) for arm in both):
        return []
    sources = dict.fromkeys([*both, *(arm for arms in noise_arms(run) for arm in arms)])
    return [
        Part(f"{pair} explained flips", pair, both, partial(_frames_only, make=explained_flips_of)),
        Part(f"{pair} forecast flips", pair, tuple(sources), partial(_frames_only, make=forecast_flips_of)),
    ]


def check_parts(run: Run, arms: Sequence[str], folder: str) -> list[Part]:
    """The rules of ``validate`` on every arm alone, and on every further arm beside infer."""
    return [
        Part(check.name, folder, check.arms, partial(_checked, check=check), partial(read_check, check=check))
        for check in checks_of(run, arms)
    ]


def findings_of(checks: Iterable[Made]) -> list[Finding]:
    """What :func:`check_parts` found."""
    return [Finding.of(record) for made in checks for record in made.summary["findings"]]


def _checked(run: Run, pieces: Iterator[Any], check: Check) -> Content:
    return {"findings": [found.record() for found in join_check(run, pieces, check).findings]}, {}


def _read_pair(run: Run, shards: tuple[Shard, ...], folder: Path, arm_a: str, arm_b: str) -> PairPiece:
    return read_piece(run.pair(arm_a, arm_b, shards=shards), folder / "tokens.feather")


def _analyzed(run: Run, pieces: Iterator[PairPiece], arm_a: str, arm_b: str) -> Content:
    analysis = join_pieces(run.pair(arm_a, arm_b), pieces)
    tokens = (part.frame for part in analysis.tokens.parts())
    return pair_summary(analysis), {"tokens": tokens, **analysis.frames()}


def _frames_only(run: Run, pieces: Iterator[Any], make: Callable[[Run], dict[str, pd.DataFrame]]) -> Content:
    return {}, make(run)


class Kept:
    """What the last analysis of a run left, and whether it still holds.

    Args:
        run: the run; everything that an analysis may read of it is looked at once, here.
        no_text: whether token ids are to be left out of the frames.
    """

    def __init__(self, run: Run, no_text: bool) -> None:
        self.run = run
        self._setting = {"code": code_digest(), "no_text": no_text, "run": _digest(run.path / MANIFEST)}
        self._files = dict(_looked_at(run.path))
        self.made_of = digest_of({**self._setting, "files": self._files})
        try:
            self._content = read_sealed(run.path / ANALYSIS / KEPT)
        except RunError:  # none, or damaged: everything is made again
            self._content = {"parts": {}}

    def summary(self) -> dict[str, Any] | None:
        """The whole analysis, where nothing has changed since it was made and its files are what was written."""
        if self._content.get("made_of") != self.made_of:
            return None
        try:
            summary = read_sealed(self.run.path / SUMMARY)
            if summary["sha256"] != self._content["summary"]:
                return None
            for pair, frames in summary["provenance"]["frames"].items():
                for name, digest in frames.items():
                    self._check(pair, name, digest)
        except RunError:
            return None
        return summary

    def made_of_part(self, part: Part) -> str:
        """Digest of what a part is made of."""
        folders = {"tokens", *(f"arms/{arm}" for arm in part.arms)}
        records = {
            name: digest
            for name, digest in self._files.items()
            if name.endswith(".json") and name.rpartition("/")[0] in folders
        }
        return digest_of({**self._setting, "part": part.name, "records": records})

    def take(self, part: Part, folder: Path) -> Made | None:
        """The part as it was made before, its files in ``folder``, too; None where it has to be made again."""
        found = self._content["parts"].get(part.name)
        if found is None or found["made_of"] != self.made_of_part(part):
            return None
        try:
            for name, digest in found["frames"].items():
                make_folder(folder)
                self._check(part.pair, name, digest)
                _link(self._file(part.pair, name), folder / f"{name}.parquet")
        except RunError:
            return None
        return Made(found["summary"], found["frames"], found["made_of"])

    def write(self, folder: Path, made: Mapping[str, Made], summary_sha256: str) -> None:
        """Keep what was made, in a new folder of analysis."""
        parts = {name: vars(one) for name, one in made.items()}
        write_sealed(folder / KEPT, {"made_of": self.made_of, "summary": summary_sha256, "parts": parts})

    def _check(self, pair: str, frame: str, digest: str) -> None:
        path = self._file(pair, frame)
        if not path.is_file() or sha256_file(path) != digest:
            raise RunError(f"{path} is not the file that was written")

    def _file(self, pair: str, frame: str) -> Path:
        return self.run.path / ANALYSIS / pair / f"{frame}.parquet"


def make_parts(
    kept: Kept,
    parts: Sequence[Part],
    folder: Path,
    no_text: bool,
    workers: int | Pool,
    on_event: Callable[[dict[str, Any]], None],
) -> Generator[tuple[str, Made]]:
    """Every part of an analysis, taken from the last one or made; close it, and what is not done yet is not done.

    Args:
        parts: those that decide whether the others are wanted come first.
        folder: of the new analysis: a folder per pair is made in it; pieces lie beside it.
        no_text: let token ids be -1 in the frames.
        workers: as :func:`~moediag.run.pieces.in_pieces` has it.
        on_event: as :func:`~moediag.results.analyze.analyze_run` has it.

    Yields:
        Parts by name: first those taken, then those made, as they are done.
    """
    made = {part.name: kept.take(part, folder / part.pair) for part in parts}
    missing = [part for part in parts if made[part.name] is None]
    write = partial(_written, folder=folder, no_text=no_text)
    works = [Work(part.read, partial(write, part=part)) for part in missing]

    def on_done(done: int, total: int) -> None:
        n_kept = len(parts) - len(missing)
        on_event({"done": n_kept + done, "total": n_kept + total, "unit": "steps"})

    yield from ((name, one) for name, one in made.items() if one is not None)
    for at, (summary, frames) in in_pieces(kept.run, works, workers, folder.parent, on_done):
        yield missing[at].name, Made(summary, frames, kept.made_of_part(missing[at]))


def _written(
    run: Run, pieces: Iterator[Any], part: Part, folder: Path, no_text: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    summary, frames = part.join(run, pieces)
    return summary, write_frames(folder / part.pair, shared(frames, no_text))


class WrittenTokens(Mapping[str, TokenSource]):
    """The tokens of every pair as they were written; what is asked for is read part by part.

    Args:
        folder: of the analysis; pairs: whose tokens lie there.
    """

    def __init__(self, folder: Path, pairs: Iterable[str]) -> None:
        self._folder, self._pairs = folder, tuple(pairs)

    def __getitem__(self, pair: str) -> TokenSource:
        if pair not in self._pairs:
            raise KeyError(pair)

        def read() -> Iterator[pd.DataFrame]:  # a row group is a part
            with pq.ParquetFile(self._folder / pair / "tokens.parquet") as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group).to_pandas()

        return TokenParts(read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


def shared(frames: Frames, no_text: bool) -> Frames:
    """The frames as they may be passed on: without text every token id is -1."""

    def bare(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(token_id=-1) if "token_id" in frame else frame

    return (
        frames
        if not no_text
        else {
            name: bare(frame) if isinstance(frame, pd.DataFrame) else map(bare, frame) for name, frame in frames.items()
        }
    )


@cache
def code_digest() -> str:
    """Digest of this package's code and of the libraries that count: another analysis may come out with another."""
    root = Path(moediag.__file__).parent
    code = {path.relative_to(root).as_posix(): _digest(path) for path in sorted(root.rglob("*.py"))}
    return digest_of({**code, **{one.__name__: one.__version__ for one in (np, pa, pd, scipy)}})


def _looked_at(root: Path) -> Iterator[tuple[str, str | int]]:
    """Every file of a run that its analysis may look at: records by what they hold, arrays by their size."""
    for folder, folders, files in os.walk(root):
        where = Path(folder)
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or name in _DERIVED))
        for name in sorted(files):
            path = where / name
            if not name.startswith(".") and not (where == root and name not in (MANIFEST, "prompts.parquet")):
                is_record = path.suffix == ".json"
                yield path.relative_to(root).as_posix(), _digest(path) if is_record else path.stat().st_size


def _digest(path: Path) -> str:
    return sha256_bytes(path.read_bytes())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
