"""All importers by name, and what a path is: the one way from foreign files to steps of rollouts.

Adding a format is a module that declares an :class:`~moediag.importers.rollouts.Importer`, and its line here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Final

from moediag.errors import DumpError
from moediag.importers import batches, megatron, miles, plain, responses, slime, text, trainers
from moediag.importers.rollouts import Importer
from moediag.run.records import MANIFEST
from moediag.run.series import SERIES

PLAIN: Final = (plain.SEQUENCES.name, plain.TABLE.name, text.TEXT.name)
IMPORTERS: Final = {
    one.name: one
    for one in (
        slime.SLIME,
        miles.MILES,
        trainers.NEMO_RL,
        trainers.PRIME_RL,
        text.TRL,
        batches.SKYRL,
        batches.VERL,
        megatron.MEGATRON,
        responses.SGLANG,
        responses.VLLM,
        plain.SEQUENCES,
        plain.TABLE,
        text.TEXT,
    )
}


def importer_of(name: str) -> Importer:
    """The importer of a format.

    Raises:
        DumpError: there is none; names those there are.
    """
    if name not in IMPORTERS:
        raise DumpError(f"{name} is no format that can be imported; expected one of {', '.join(IMPORTERS)}")
    return IMPORTERS[name]


def expand(paths: Sequence[Path | str]) -> list[Path]:
    """The files that paths, folders and patterns name, numbers in names in their order.

    Raises:
        DumpError: nothing is there.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        is_pattern = has_magic(str(path)) and not path.exists()
        matches = [Path(name) for name in glob(str(path), recursive=True)] if is_pattern else [path]  # noqa: PTH207
        files = [file for match in matches for file in ([match] if match.is_file() else sorted(match.rglob("*")))]
        files = [file for file in files if file.is_file()]
        if not files:
            what = "is missing" if not matches or not matches[0].exists() else "holds no file"
            raise DumpError(f"{path} {what}; give files, folders or patterns of a dump")
        found += files
    return sorted(dict.fromkeys(found), key=_natural)


def files_of(importer: Importer, paths: Sequence[Path | str]) -> list[Path]:
    """The files of a format among paths; a file that is named by itself must be one.

    Raises:
        DumpError: there is none, a file that was named is of something else, or one that is called as the others are
            is of nothing that is known: a step that was cut would be missing without a word.
    """
    found = expand(paths)
    ours = [path for path in found if importer.is_one(path)]
    named = [path for path in map(Path, paths) if path.is_file() and path not in ours]
    if not ours or named:
        wrong = named[0] if named else Path(paths[0])
        other = sorted({name for path in [wrong] if path.is_file() for name in detect(path)})
        looks = f"; it looks like {' or '.join(other)}" if other else ""
        raise DumpError(
            f"{wrong} holds nothing of {importer.name} ({importer.words}){looks}; moediag import --detect tells"
        )
    names = {re.sub(r"\d+", "0", path.name) for path in ours}
    for path in found:
        if re.sub(r"\d+", "0", path.name) in names and path not in ours and not detect(path):
            raise DumpError(
                f"{path} is called as the other files of {importer.name} and cannot be read as one; empty, or cut? "
                "Copy it again, or name the files to import"
            )
    return ours


def detect(path: Path) -> list[str]:
    """Formats that a file is of, by name; plain tables only where it is of no framework's."""
    found = [one.name for one in IMPORTERS.values() if one.is_one(path)]
    return [name for name in found if name not in PLAIN] or found[:1]


def foreign_format(paths: Sequence[Path | str]) -> str | None:
    """The framework whose dump paths are; None where they are runs, series, plain tables, or nothing that is known.

    Raises:
        DumpError: they are of two formats.
    """
    some = [Path(path) for path in paths]
    if any((path / MANIFEST).exists() or (path / SERIES).exists() for path in some):
        return None
    try:
        every = detect_all(some)
    except DumpError:  # nothing is there: whoever opens it names what it wanted
        return None
    tables = (plain.SEQUENCES.name, plain.TABLE.name)
    found = {name: files[0] for name, files in every.items() if name not in ("", *tables)}
    if len(found) > 1:
        (a, one), (b, other) = list(found.items())[:2]
        raise DumpError(f"{one} is of {a}, {other} of {b}; take one format at a time (moediag import)")
    return next(iter(found), None)


def detect_all(paths: Sequence[Path | str]) -> dict[str, list[Path]]:
    """Format -> its files among paths; ``""`` = of none."""
    found: dict[str, list[Path]] = {}
    for path in expand(paths):
        for name in detect(path) or [""]:
            found.setdefault(name, []).append(path)
    return found


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """step_10 comes after step_9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]
