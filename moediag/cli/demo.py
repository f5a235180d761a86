"""``moediag demo``: a MoE and a dense checkpoint made on the spot, profiled by both engines, compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moediag.cli import options as o
from moediag.demo.train import DENSE, MOE
from moediag.run.files import cache_folder

if TYPE_CHECKING:
    from moediag.cli.jobs import Arms

NAME = "demo"
N_PROMPTS = 64
MAX_TOKENS = 320  # prompt (about 120 bytes) + response stay inside the training window of 512


_SIZE = "about 200 MB for 64 prompts, most of it whole distributions and router logits"


def command(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for everything.", callback=o.local)
    ] = Path("moediag-demo"),
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=N_PROMPTS, help="Prompts sampled; fewer for a quick look.")
    ] = N_PROMPTS,
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOE.n_steps, help="Training steps; fewer for a quick look.")
    ] = MOE.n_steps,
    no_text: o.NoText = False,
    dry_run: o.DryRun = False,
    force: o.Force = False,
) -> None:
    """Train a tiny MoE and a dense model, profile both in both engines, compare: no download, no GPU."""
    from moediag.cli import jobs
    from moediag.cli.console import note, wrote
    from moediag.cli.table import show_table
    from moediag.demo.corpus import demo_prompts
    from moediag.notation import INFER, TRAIN
    from moediag.results import compare_runs
    from moediag.run.files import make_folder, write_atomic, write_error

    jobs.require(INFER, TRAIN)
    if dry_run:
        recipes = jobs.profile_recipes(replay=True, floors=True) + list(jobs.FLOAT32)
        note(f"Trains   two tiny models of {steps} steps, or takes those kept in {cache_folder('demo')}")
        note(f"Samples  {limit} prompts, up to {MAX_TOKENS} tokens each, for both")
        note(f"Arms     {', '.join(recipes)}; the dense model all but train-replay")
        note(f"Writes   checkpoints, two runs, a simulation, a comparison under {output}; {_SIZE}")
        jobs.end_dry("would train, capture, analyse, simulate and compare")
    make_folder(output)
    try:
        checkpoints = _checkpoints(output, steps)
    except OSError as error:
        raise write_error(error, Path(error.filename or output)) from error
    prompts = output / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}) + "\n" for text in demo_prompts(limit)]
    write_atomic(prompts, "".join(lines).encode())
    note(f"\n== {' and '.join(checkpoints)}: sampled by vLLM, scored by transformers ==")
    captures = [_begin(checkpoint, prompts, output / name, force) for name, checkpoint in checkpoints.items()]
    jobs.capture(*captures)
    for one in captures:
        note(f"\n== {one.writer.run.path.name}: what the engines disagree about ==")
        jobs.finish(one.writer.run, MOE.window, no_text)
    note("\n== moe: what IcePop and its rivals would mask ==")
    _simulate(output / "moe", force)
    note("\n== moe against dense ==")
    runs = [output / name for name in checkpoints]
    summary = compare_runs(runs, output / "compare", MOE.window, force)
    show_table(summary["runs"], runs)
    wrote(output / "compare" / "figures" / "figure1.png")
    wrote(output / "compare" / "report.html")
    wrote(output / "compare" / "report.md")


def _simulate(path: Path, force: bool) -> None:
    from moediag.cli.console import bar, wrote
    from moediag.cli.table import show_sentences
    from moediag.corrections import choose
    from moediag.results.load import shell_command
    from moediag.results.simulation import Request, write_simulation
    from moediag.run.reader import open_run

    run, request = open_run(path), Request(path, choose())
    with bar("simulating") as progress:
        simulation = request.simulate(run, progress.show)
    folder, again = request.folder(run), [shell_command("simulate", path)]
    pages = write_simulation(simulation, folder, again, request.content(folder), force)
    show_sentences(simulation)
    for page in pages:
        wrote(page)


def _checkpoints(output: Path, n_steps: int) -> dict[str, Path]:
    from moediag.cli.console import bar
    from moediag.demo.pair import build_pair

    with bar("training the demo pair") as progress:
        steps: dict[str, int] = {}

        def on_step(name: str, step: int, n_steps: int, loss: float) -> None:
            steps[name] = step
            progress.show(sum(steps.values()) / 2, n_steps, f"steps, {name} at {loss:.2f} nat per byte")

        moe, dense = (replace(recipe, n_steps=n_steps) for recipe in (MOE, DENSE))
        trained = build_pair(cache_folder("demo"), on_step, moe=moe, dense=dense)
    folders = {}
    for name, folder in zip(("moe", "dense"), trained, strict=True):
        folders[name] = output / "checkpoints" / name
        shutil.copytree(folder, folders[name], dirs_exist_ok=True)
    return folders


def _begin(checkpoint: Path, prompts: Path, output: Path, force: bool) -> Arms:
    from moediag.cli import jobs
    from moediag.cli.settings import Settings
    from moediag.notation import INFER, TRAIN
    from moediag.run.writer import RunWriter

    settings = Settings(
        dtype=o.ModelDtype.bfloat16, max_tokens=MAX_TOKENS, router_logits=o.RouterLogits.full, full_vocab=None
    )
    plan = settings.plan(str(checkpoint), prompts, INFER)
    # The replay arm says how much of the mismatch is routing.
    recipes = jobs.profile_recipes(replay=plan.checkpoint.routing is not None, floors=True)
    recipes += jobs.float32_recipes(plan, settings)
    request = partial(settings.request, max_model_len=plan.max_model_len, seed=settings.seed)
    requests = jobs.requests_of(recipes, plan, request)
    jobs.announce(plan, output, requests, settings.dtype.value, is_anew=force)
    return jobs.Arms(RunWriter(plan.create(output, force)), requests, dict.fromkeys((INFER, TRAIN), plan.checkpoint))
