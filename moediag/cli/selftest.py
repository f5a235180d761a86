"""``moediag selftest``: are captures right on this machine, with these engines?"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moediag.cli import options as o
from moediag.errors import EngineError

NAME = "selftest"


class Precision(StrEnum):
    """Dtypes that a self-test runs in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Config = Annotated[
    str | None,
    typer.Argument(
        metavar="CKPT",
        callback=o.checkpoint_there,
        help="Folder or hub id whose config.json is tested: widths, experts, K and groups kept, 2 to 4 layers, random "
        "weights; default: tiny checkpoints.",
    ),
]
Family = Annotated[
    list[str] | None, typer.Option("--family", metavar="NAME", help="Tiny checkpoint to test; may be repeated.")
]
Dtype = Annotated[
    Precision | None,
    typer.Option("--dtype", help="Of both engines; default: float32, with CKPT bfloat16 and float32 agreement."),
]
Parallel = Annotated[int, typer.Option("--tensor-parallel-size", min=1, help="vLLM's.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        callback=o.local,
        help="Folder that keeps finished arms, to go on with; default: none is kept.",
    ),
]


def command(
    ckpt: Config = None,
    family: Family = None,
    dtype: Dtype = None,
    tensor_parallel_size: Parallel = 1,
    vllm_option: o.VllmOption = None,
    output: Output = None,
    ray: o.RayTasks = False,
    ray_address: o.RayAddress = None,
    num_workers: o.NumEngines = None,
    gpus_per_worker: o.GpusPerWorker = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Capture small checkpoints with both engines and check what must hold of captures; exit code 3 on a failure.

    Run it first on a new machine, with a new vLLM or transformers, or for a model of your own: a few minutes.
    """
    from moediag.cli import jobs
    from moediag.cli.console import bar, doing, note, say, say_json
    from moediag.engines.launch import Engines
    from moediag.notation import INFER, TRAIN
    from moediag.selftest.cells import FAILED
    from moediag.selftest.check import DEFAULT, Request, estimate, prepare, run_cells, run_everywhere

    if ckpt is not None and family:
        raise typer.BadParameter("give CKPT or --family", param_hint="--family")
    given = {"address": ray_address, "num_workers": num_workers, "gpus_per_worker": gpus_per_worker}
    cluster = o.cluster_options(ray, tensor_parallel_size, **given)
    if cluster is not None and output is None:
        raise EngineError("--ray without -o: give -o a folder that all nodes of the cluster see")
    jobs.require(INFER, TRAIN)
    chosen = dtype.value if dtype else "float32" if ckpt is None else "bfloat16"
    request = Request(ckpt, tuple(family or DEFAULT), chosen, tensor_parallel_size, o.parse_vllm_options(vllm_option))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() if output is None or dry_run else nullcontext(str(output)) as folder:
        with doing("making the checkpoints"):
            cells, remarks = prepare(request, Path(folder).resolve())
        for remark in remarks:
            note(f"Model    {remark}")
        note(f"Test     {', '.join(f'{cell.name} in {cell.dtype}' for cell in cells)}")
        note(f"Takes    {estimate(cells)}")
        if dry_run:
            jobs.end_dry("would capture and check these checkpoints")
        with bar("self-test") as progress:
            if cluster is not None:
                with o.tasks(Path(folder), cluster) as tasks:
                    rows = run_everywhere(cells, tasks, lambda done, n: progress.show(done, n, "checkpoints"), note)
            else:
                with Engines() as engines:
                    rows = run_cells(
                        cells, engines, lambda event: None if "note" in event else progress.on_event(event), note
                    )
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    if as_json:
        say_json(
            {"seconds": round(time.monotonic() - started), "counts": counts, "rows": [asdict(row) for row in rows]}
        )
    else:
        for cell in cells:
            _show(
                f"{cell.name} in {cell.dtype}", [r for r in rows if (r.checkpoint, r.dtype) == (cell.name, cell.dtype)]
            )
        words = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        say(f"{len(rows)} properties: {words}; {time.monotonic() - started:.0f} s")
    if FAILED in counts:
        raise typer.Exit(o.NOT_SO)


def _show(title: str, rows: list[object]) -> None:
    from moediag.cli.console import say, say_table
    from moediag.cli.table import table_text

    say(title)
    cells = [(row.property, row.verdict, row.measured) for row in rows]  # type: ignore[attr-defined]
    say_table(table_text(("property", "", "measured"), cells, width=150))
    for row in rows:
        if row.reason:  # type: ignore[attr-defined]
            say(f"{row.verdict}: {row.property}: {row.reason}")  # type: ignore[attr-defined]
    say()
