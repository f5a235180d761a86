"""The steps of a training, or the one of a run, as scalars that TensorBoard and Weights & Biases show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from moediag.errors import RunError
from moediag.importers.tables import OnProgress, silent
from moediag.results.trend_sources import read_trend
from moediag.run.files import make_folder

PREFIX: Final = "mismatch/"
"""In front of every name, as the snippets for trainers have it: both loggers make a group of it."""


def read_scalars(target: Path, on_progress: OnProgress = silent) -> list[tuple[int, dict[str, float]]]:
    """(step, name -> value) of a run, a series, a folder of :class:`moediag.Watch`, or a table of steps.

    Values are those of ``moediag trend``, each with ``<name>_ci_low`` and ``<name>_ci_high`` where it has an interval,
    and ``n_tokens``; what is not finite is left out: neither logger draws it.

    Raises:
        DumpError, RunError: as :func:`~moediag.results.trend_sources.read_trend`.
    """
    trend = read_trend([target], None, on_progress).trend
    return [(int(str(step)), dict(_scalars(rows))) for step, rows in trend.groupby("step", sort=True)]


def _scalars(rows: pd.DataFrame) -> Iterator[tuple[str, float]]:
    for row in rows.to_dict("records"):
        ends = {"": row["value"], "_ci_low": row["value_ci_low"], "_ci_high": row["value_ci_high"]}
        yield from ((f"{PREFIX}{row['metric']}{end}", float(x)) for end, x in ends.items() if np.isfinite(x))
    if len(known := rows["n_tokens"].dropna()):
        yield f"{PREFIX}n_tokens", float(known.max())


def refuse_used(folder: Path, force: bool) -> None:
    """Both loggers add files to a folder, and a second one with the same steps would double every curve.

    Raises:
        RunError: something is there, and not ``force``.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise RunError(f"{folder} exists; give -o a new folder, or --force to add to it")


def write_tensorboard(scalars: list[tuple[int, dict[str, float]]], folder: Path) -> Path:
    """Write an event file with tensorboard's own writer; returns the folder for ``tensorboard --logdir``.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    from tensorboard.summary import Writer

    make_folder(folder)
    writer = Writer(str(folder))
    for step, values in scalars:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()
    return folder


def write_wandb(scalars: list[tuple[int, dict[str, float]]], folder: Path, name: str) -> Path:
    """Write a run of Weights & Biases in its offline mode; returns the folder that ``wandb sync`` uploads.

    Nothing is sent, whatever WANDB_MODE says.

    Args:
        name: of the run.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """
    import wandb

    make_folder(folder)
    quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
    with wandb.init(project="moediag", name=name, dir=str(folder), mode="offline", settings=quiet) as run:
        for step, values in scalars:
            run.log(values, step=step)
        written = Path(run.dir).parent
    wandb.teardown()  # its own process writes the file, and finish() does not wait for that
    return written
