"""What is derived from a run: where it lies in the run, and whether it is whole; and files that do not belong there.

    RUN/analysis/, RUN/summary.json               what ``analyze`` wrote: a folder per pair, and what it was made of
    RUN/figures/, RUN/report.md, RUN/report.html  what ``report`` drew from it
    RUN/simulate/*/, RUN/gradients/               simulations and the gradient audit: result folders of their own

Sealed are the numbers: a summary.json holds the digest of its frames and its own, so a changed byte is found. Figures
and pages are drawn again from them at any time, and are not checked.

Invariant: a *stale* analysis (arms changed since) is not damage; ``analyze`` and ``report`` find that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from moediag.errors import RunError
from moediag.folder import SUMMARY, settle
from moediag.notation import SCHEMA_VERSION
from moediag.run.files import digest_of, read_checked, read_sealed, write_error
from moediag.run.reader import BIAS, Run, open_run
from moediag.run.records import (
    MANIFEST,
    PROMPTS,
    CheckpointRecord,
    WeightsComparison,
    check_schema_version,
    read_record,
)

ANALYSIS: Final = "analysis"
KEPT: Final = "kept.json"
"""In the analysis: of every part of it, what it was made of."""
FIGURES: Final = "figures"
SIMULATIONS: Final = "simulate"
"""Folder of a run's simulations, one folder per pair and request in it."""
GRADIENTS: Final = "gradients"
"""Folder of a run's gradient audit: frames and summary.json, and the inner products that they are made of."""
GRAMS: Final = "grams.safetensors"
Damage = tuple[str, str]
"""(where, message): a path relative to the run, and what is wrong with it."""


def settle_derived(run_path: Path) -> None:
    """Complete what a killed ``analyze``, ``report`` or audit left to move into its place.

    Raises:
        RunError: it cannot be moved.
    """
    for name in (ANALYSIS, FIGURES, GRADIENTS):
        try:
            settle(run_path, name)
        except OSError as error:
            raise write_error(error, run_path / name) from error


def captures_digest(run: Run, arms: Iterable[str] | None = None) -> dict[str, str]:
    """Digest of the captures of arms, by arm: equal while a result is of the arms as they are now.

    Args:
        arms: None = every complete arm.
    """
    return {
        arm: digest_of([run.capture_sidecar(arm, shard).data_sha256 for shard in run.shards_of(arm)])
        for arm in (filter(run.is_complete, run.arms()) if arms is None else arms)
    }


def derived_damage(run_path: Path) -> list[Damage]:
    """Everything wrong in files that no arm's reader looks at.

    Returns:
        One (where, message) for the prompts table; per frame or summary that is damaged, missing, of another version
        or not named; per file among the shards that is no shard of this run; and per shard that was made by another
        configuration or version than its arm.json says. Empty = nothing is wrong.

    Raises:
        RunError: ``run_path`` is not a run that can be opened.
    """
    run = open_run(run_path)
    settle_derived(run.path)
    return [
        *_prompts(run), *_checkpoints(run), *_foreign_files(run), *_other_makers(run),
        *_analysis(run), *_simulations(run), *_gradient_audit(run),
    ]  # fmt: skip


def _prompts(run: Run) -> Iterator[Damage]:
    """Prompts that are whole, but not those that run.json names."""
    record = run.record.prompts
    if record is None:
        return
    try:
        prompts, completions = run.prompt_tokens()
    except RunError as error:
        yield PROMPTS, str(error)
        return
    if (len(prompts), completions is not None) != (record.n, run.record.tokens.origin == "given"):
        yield PROMPTS, f"does not hold the prompts and completions that {MANIFEST} names; restore it"


def _checkpoints(run: Run) -> Iterator[Damage]:
    """Records of checkpoints, and of how two differ."""
    for path in sorted(run.path.glob("checkpoints/*.json")):
        try:
            if "~" in path.name:
                read_record(path, WeightsComparison)
            elif read_record(path, CheckpointRecord).digest != path.stem:
                yield _where(run, path), "is of another checkpoint than its name says; restore it"
        except RunError as error:
            yield _where(run, path), str(error)


def _foreign_files(run: Run) -> Iterator[Damage]:
    """Files in the places of shards that are none: outside the shard table, or of no arm."""
    arms = [run.path / "arms" / arm for arm in run.arms()]
    data_suffix = {run.path / "tokens": "parquet", **dict.fromkeys(arms, "safetensors")}
    known = {
        folder / f"{shard.stem}.{suffix}"
        for folder, data in data_suffix.items()
        for shard in run.shards
        for suffix in ("json", data)
    }
    known |= {
        run.path / "arms" / arm / f"{shard.stem}.vocab.{suffix}"
        for arm in run.arms()
        for shard in run.shards
        for suffix in ("json", "safetensors")
        if run.keeps_vocab(arm, shard)
    }
    known |= {arm / BIAS for arm in arms}
    there = {*run.path.glob("tokens/*"), *run.path.glob("arms/*/*")} - {*run.path.glob("arms/*/probes")}
    there |= {path for path in run.path.glob("arms/*") if not path.is_dir()}
    for path in sorted(there - known - {arm / "arm.json" for arm in arms}):
        if not path.name.startswith("."):
            yield _where(run, path), "does not belong to this run (no such shard or arm); move it elsewhere"


def _other_makers(run: Run) -> Iterator[Damage]:
    """Shards merged into an arm of another configuration or version: a plain copy keeps one arm.json."""
    for arm in run.arms():
        for shard in run.shards:
            try:
                if not run.has_capture(arm, shard):
                    continue
                if run.capture_sidecar(arm, shard).made_as in (None, run.arm(arm).made_as()):
                    continue
            except RunError:  # found by whoever reads the arm
                continue
            yield (
                f"arms/{arm}/{shard.stem}",
                "was captured with another configuration or version than arm.json says; "
                "delete the shard and run the same capture again",
            )


def _analysis(run: Run) -> Iterator[Damage]:
    there = run.path.glob(f"{ANALYSIS}/**/*.parquet")
    again = f"run: moediag analyze {run.path}"
    yield from _against_summary(run, run.path, _analysed, there, again)
    kept = run.path / ANALYSIS / KEPT
    if kept.exists() and not _is_sealed(kept):
        yield _where(run, kept), f"is damaged or edited; {again}"


def _is_sealed(path: Path) -> bool:
    try:
        return bool(read_sealed(path))
    except RunError:
        return False


def _analysed(summary: dict[str, Any]) -> dict[str, Any]:
    frames = summary["provenance"]["frames"]
    return {f"{ANALYSIS}/{pair}/{name}.parquet": sha for pair, shas in frames.items() for name, sha in shas.items()}


def _simulations(run: Run) -> Iterator[Damage]:
    files = [path for name in ("*.parquet", SUMMARY) for path in run.path.glob(f"{SIMULATIONS}/*/**/{name}")]
    files = [path for path in files if "/." not in _where(run, path)]  # one that a living process makes
    for folder in sorted({path.parent for path in files}):
        if not (folder / SUMMARY).exists():
            why = "nothing says that they are whole (an interrupted copy, or of an earlier moediag)"
            yield _where(run, folder), f"holds frames and no {SUMMARY}, so {why}; delete the folder"
            continue
        own = [path for path in files if path.parent == folder and path.name != SUMMARY]
        again = f"run the same moediag simulate {run.path} again, with --force"
        yield from _against_summary(run, folder, _named, own, again)


def _gradient_audit(run: Run) -> Iterator[Damage]:
    folder = run.path / GRADIENTS
    there = [path for pattern in ("*.parquet", GRAMS) for path in folder.glob(pattern)]
    again = f"run: moediag simulate {run.path} --gradient-audit"
    yield from _against_summary(run, folder, _audited, there, again)


def _audited(summary: dict[str, Any]) -> dict[str, Any]:
    return {**_named(summary), GRAMS: summary["grams_sha256"]}


def _named(summary: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.parquet": sha for name, sha in summary["frames"].items()}


def _against_summary(
    run: Run, folder: Path, named_by: Callable[[dict[str, Any]], dict[str, Any]], there: Iterable[Path], again: str
) -> Iterator[Damage]:
    """The files of a result against its summary.json; one that is not there names none.

    Args:
        named_by: its content -> file, from ``folder``, -> sha256.
        there: files that it has to name.
        again: the command that makes them again.
    """
    named, where = {}, _where(run, folder / SUMMARY)
    if (folder / SUMMARY).exists():
        try:
            content = read_sealed(folder / SUMMARY)
            check_schema_version(content, folder / SUMMARY, (1, SCHEMA_VERSION))  # an earlier one is stale, not damaged
            named = {folder / name: str(sha) for name, sha in named_by(content).items()}
        except RunError:
            yield where, f"is damaged, edited, or of another version; {again}"
            return
        except (KeyError, TypeError, AttributeError):
            yield where, f"does not name its files; {again}"
            return
    for path, sha in sorted(named.items()):
        try:
            read_checked(path, sha)
        except RunError:
            yield _where(run, path), f"is missing or not what {SUMMARY} says was written; {again}"
    for path in sorted({*there} - {*named}):
        yield _where(run, path), f"is not named by {SUMMARY}, so nothing says that it is whole; delete it, or {again}"


def _where(run: Run, path: Path) -> str:
    return path.relative_to(run.path).as_posix()
