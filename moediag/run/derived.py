"""Damage outside what the arms' readers see: derived files, logs, and files that do not belong to the run.

What is derived (frames, summary.json, figures, report.md) can be deleted and made again, but a changed byte in a
page or a figure is a wrong number shown, so it has to be found as well. Every derived file is named with its
sha256 by a sealed file written after it: frames by summary.json, figures and report.md by report.json, what a
simulation writes by its simulation.json, and the gradient audit by audit.json.

Invariant: a *stale* analysis (arms changed since) is not damage; ``analyze`` and ``report`` tell that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from moediag.errors import RunError
from moediag.notation import SCHEMA_VERSION
from moediag.run.files import read_checked, read_sealed, sha256_bytes, write_error, write_sealed
from moediag.run.logs import log_damage
from moediag.run.reader import BIAS, Run, open_run
from moediag.run.records import (
    MANIFEST,
    PROMPTS,
    CheckpointRecord,
    WeightsComparison,
    check_schema_version,
    read_record,
)

SUMMARY = "summary.json"
REPORT_SEAL = "report.json"
SIMULATIONS: Final = "simulate"
"""Folder of a run's simulations, one folder per pair in it."""
SIMULATION_SEAL: Final = "simulation.json"
GRADIENTS: Final = "gradients"
"""Folder of a run's gradient audit: what its engine left (grams, record), frames, and the seal over them."""
GRAMS: Final = "grams.safetensors"
AUDIT_RECORD: Final = "record.json"
AUDIT_SEAL: Final = "audit.json"
_VERSIONED: Final = (SUMMARY, SIMULATION_SEAL)
Damage = tuple[str, str]
"""(where, message): a path relative to the run, and what is wrong with it."""


def begin_report(folder: Path) -> None:
    """Take the seal of an earlier report away: it must not vouch for files that are about to change.

    Raises:
        RunError: it cannot be removed.
    """
    try:
        (folder / REPORT_SEAL).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, folder / REPORT_SEAL) from error


def seal_report(folder: Path, files: Iterable[Path]) -> None:
    """Write report.json, which names every file of the report with its digest; last, when all of them are there."""
    digests = {path.relative_to(folder).as_posix(): sha256_bytes(path.read_bytes()) for path in files}
    write_sealed(folder / REPORT_SEAL, {"kind": "moediag report", "files": digests})


def derived_damage(run_path: Path) -> list[Damage]:
    """Everything wrong in files that no arm's reader looks at.

    Logs are checked as far as they are sealed: to the end of the last engine process that was not killed.

    Returns:
        One (where, message) for the prompts table; per derived file that is damaged, missing, of another version
        or unknown to its seal; per damaged log; per file among the shards that is no shard of this run; and per
        shard that was made by another configuration or version than its arm.json says. Empty = nothing to say.

    Raises:
        RunError: ``run_path`` is not a run that can be opened.
    """
    run = open_run(run_path)
    shown = [*_frames(run), *_report(run), *_simulations(run), *_gradient_audit(run)]
    return [*_prompts(run), *_checkpoints(run), *_foreign_files(run), *_other_makers(run), *shown, *_logs(run)]


def _prompts(run: Run) -> Iterator[Damage]:
    """Prompts that are whole, but not those that run.json tells of."""
    told = run.record.prompts
    if told is None:
        return
    try:
        prompts, completions = run.prompt_tokens()
    except RunError as error:
        yield PROMPTS, str(error)
        return
    if (len(prompts), completions is not None) != (told.n, run.record.tokens.origin == "given"):
        yield PROMPTS, f"does not hold the prompts and completions that {MANIFEST} tells of; restore it"


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


def _frames(run: Run) -> Iterator[Damage]:
    """Frames against summary.json."""
    there, advice = _files(run.path / "analysis"), f"run: moediag analyze {run.path}"
    yield from _held_against_seal(run, run.path / SUMMARY, _named_frames, there, advice)


def _named_frames(summary: dict[str, Any]) -> dict[str, Any]:
    frames = summary["provenance"]["frames"]
    return {f"analysis/{pair}/{name}.parquet": sha for pair, digests in frames.items() for name, sha in digests.items()}


def _report(run: Run) -> Iterator[Damage]:
    """Figures and report against report.json."""
    seal, advice = run.path / REPORT_SEAL, f"run: moediag report {run.path}"
    there = [*_files(run.path / "figures"), *(path for path in run.path.glob("report.*") if path != seal)]
    yield from _held_against_seal(run, seal, _named_files, there, advice)


def _simulations(run: Run) -> Iterator[Damage]:
    """Every simulation in RUN/simulate against its own simulation.json, that of the nearest folder above a file."""
    advice = f"run the same moediag simulate {run.path} again, with --force"
    there: dict[Path, list[Path]] = {seal: [] for seal in (run.path / SIMULATIONS).rglob(SIMULATION_SEAL)}
    for path in _files(run.path / SIMULATIONS):
        if path not in there:
            above = (folder / SIMULATION_SEAL for folder in path.parents)
            seal = next((seal for seal in above if seal in there), path.with_name(SIMULATION_SEAL))
            there.setdefault(seal, []).append(path)
    for seal, files in sorted(there.items()):
        yield from _held_against_seal(run, seal, _named_files, files, advice)


def _gradient_audit(run: Run) -> Iterator[Damage]:
    """The gradient audit against audit.json."""
    seal, advice = run.path / GRADIENTS / AUDIT_SEAL, f"run: moediag simulate {run.path} --gradient-audit"
    there = [path for path in _files(seal.parent) if path != seal]
    yield from _held_against_seal(run, seal, _named_by_audit, there, advice)


def _named_by_audit(audit: dict[str, Any]) -> dict[str, Any]:
    frames = {f"{name}.parquet": sha for name, sha in audit["frames"].items()}
    return {**frames, GRAMS: audit["grams_sha256"], AUDIT_RECORD: audit["record_sha256"]}


def _named_files(seal: dict[str, Any]) -> dict[str, Any]:
    return {**seal["files"]}


def _held_against_seal(
    run: Run, seal: Path, named_by: Callable[[dict[str, Any]], dict[str, Any]], there: Iterable[Path], advice: str
) -> Iterator[Damage]:
    """Files in a seal's folder against it; a seal that is not there names none.

    Args:
        named_by: its content -> file, from the seal's folder, -> sha256; KeyError, TypeError or AttributeError = it
            names none, as where a kill left the seal of something begun.
        there: files that it has to name.
        advice: what makes them again.
    """
    folder, named = _where(run, seal.parent), {}
    if seal.exists():
        try:
            content = read_sealed(seal)
            if seal.name in _VERSIONED:  # an analysis by an earlier version is stale, not damaged
                check_schema_version(content, seal, (1, SCHEMA_VERSION))
            named = {(Path(folder) / name).as_posix(): digest for name, digest in named_by(content).items()}
        except RunError:
            yield _where(run, seal), f"is damaged, edited, or of another version; {advice}"
            return
        except (KeyError, TypeError, AttributeError):
            yield _where(run, seal), f"does not name its files; {advice}"
            return
    yield from _held_against(run, named, there, seal.name, advice)


def _held_against(run: Run, named: dict[str, Any], there: Iterable[Path], seal: str, advice: str) -> Iterator[Damage]:
    for where, digest in sorted(named.items()):
        try:
            read_checked(run.path / where, str(digest))
        except RunError:
            yield where, f"is missing or not what {seal} says was written; {advice}"
    for where in sorted({_where(run, path) for path in there} - {*named}):
        yield where, f"is not named by {seal}, so nothing says that it is whole; delete it, or {advice}"


def _logs(run: Run) -> Iterator[Damage]:
    for log in sorted((run.path / "logs").glob("*.log")):
        damage = log_damage(log)
        if damage:
            yield _where(run, log), damage


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _where(run: Run, path: Path) -> str:
    return path.relative_to(run.path).as_posix()
