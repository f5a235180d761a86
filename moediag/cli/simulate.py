"""``moediag simulate``: off-policy corrections on logged tokens, side by side, offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moediag.cli import options as o
from moediag.errors import RunError

if TYPE_CHECKING:
    from moediag.results.simulation import Grid, Simulation
    from moediag.run.reader import Run

NAME = "simulate"

Target = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|TABLE|DUMP",
        callback=o.there,
        help="Run directory, a file or folder of a framework's dump of one step, or "
        "a .parquet, .csv or .jsonl with a row per token: seq_id, position, logp_train, "
        "logp_infer; optionally prompt_id, is_response (or a framework's loss mask), reward or advantage, entropy, "
        "logp_train_new, token_id.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", metavar="SPEC", help="method[:name=value,...][+method...]; may be repeated."),
]
Presets = Annotated[
    list[str] | None, typer.Option("--preset", metavar="NAME", help="Preset, framework or paper; may be repeated.")
]


def _list(is_given: bool) -> None:
    """Print every method and preset, and end."""
    if not is_given:
        return
    from moediag.cli.console import say
    from moediag.corrections import METHODS, PRESETS

    say("Methods (--method NAME:name=value,...+NAME):")
    for name, method in METHODS.items():
        defaults = ",".join(f"{key}={value:g}" for key, value in method.parameters.items())
        say(f"  {name}{':' if defaults else ''}{defaults}")
    say("Presets (--preset NAME, or the framework or paper in brackets):")
    for name, preset in PRESETS.items():
        say(f"  {name} [{preset.group}]: {preset.words}")
        say(f"      {preset.source}", hanging=0)
    raise typer.Exit


Listing = Annotated[
    bool, typer.Option("--list", callback=_list, is_eager=True, help="Print every method and preset, and exit.")
]
Everything = Annotated[
    bool, typer.Option("--all", help="Every preset and every method, with a sweep; the default when nothing is named.")
]
Sweep = Annotated[bool, typer.Option("--sweep", help="Sweep IcePop's band and recommend one to start from.")]
Bounds = Annotated[
    str | None, typer.Option(metavar="A,B,...", help="Bounds to sweep instead of the default grid; 0 or inf = open.")
]
WeightsOut = Annotated[
    Path | None,
    typer.Option("--weights-out", metavar="FILE", help="Write each row's keys and its weight under each correction."),
]
PairOption = Annotated[
    str | None, typer.Option("--pair", metavar="A~B", help="RUN: two arms; default: train and the arm that sampled.")
]
Reward = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="none|hash|COLUMN",
        help="Where advantages come from; default: the table's advantage or reward, else a synthetic reward of the "
        "token ids, used only where advantages are needed.",
    ),
]
Mask = Annotated[
    str | None,
    typer.Option(
        "--mask", metavar="COLUMN", help="TABLE: the loss mask; default: the one known by its name in a framework."
    ),
]
EpsClip = Annotated[float, typer.Option("--eps-clip", min=0.0, help="PPO's clip, for clip share and objective.")]
Audit = Annotated[
    bool, typer.Option("--gradient-audit", help="RUN: also compare the gradients of corrections (needs transformers).")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="CKPT",
        callback=o.checkpoint_there,
        help="For --gradient-audit; default: the run's own.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        callback=o.local,
        help="Frames, figures and report; default: RUN/simulate/PAIR, or PAIR-xxxxxxxx where options ask for something "
        "else than --all.",
    ),
]


def command(
    context: typer.Context,
    target: Target,
    method: Methods = None,
    preset: Presets = None,
    everything: Everything = False,
    sweep: Sweep = False,
    alphas: Bounds = None,
    betas: Bounds = None,
    weights_out: WeightsOut = None,
    pair: PairOption = None,
    reward: Reward = None,
    mask: Mask = None,
    tokens: o.TokensTable = None,
    trust_pickle: o.TrustPickle = False,
    eps_clip: EpsClip = 0.2,
    gradient_audit: Audit = False,
    checkpoint: Checkpoint = None,
    output: Folder = None,
    pdf: o.Pdf = False,
    strict: o.Strict = False,
    as_json: o.Json = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file, or replace the simulation of another request.")
    ] = False,
    listing: Listing = False,
) -> None:
    """Simulate IcePop and its rivals on the same logged tokens: what each masks, weighs and leaves; needs no engine.

    No offline number shows that training will be stable.
    """
    from moediag.cli.console import bar, say_json, wrote
    from moediag.corrections import choose
    from moediag.corrections.weight_files import refuse_weights_path, write_weights
    from moediag.folder import refuse_other
    from moediag.importers.registry import foreign_format
    from moediag.results.load import shell_command
    from moediag.results.simulation import SIMULATION, Request, write_simulation
    from moediag.results.simulation import as_json as content_of

    everything = everything or not (method or preset)
    chosen = choose(method or [], preset or [], everything)
    if weights_out is not None:
        refuse_weights_path(weights_out, force)
    if checkpoint and not gradient_audit:
        raise typer.BadParameter("goes with --gradient-audit", param_hint="--checkpoint")
    of_run_only = {"--pair": pair, "--gradient-audit": gradient_audit, "--checkpoint": checkpoint}
    is_dump = foreign_format([target]) is not None
    dump = _imported(target, mask, tokens=tokens, trust_pickle=trust_pickle) if is_dump else None
    with dump or nullcontext(_open(target, mask, of_run_only)) as run:
        pairs = {} if run is None else {"pair": _pair_of(run, pair)}
        grid = _grid(sweep or everything, alphas, betas)
        request = Request(
            target, chosen, grid, reward=reward, eps_clip=eps_clip, mask=mask,
            gradient_audit=gradient_audit, checkpoint=checkpoint, **pairs,
        )  # fmt: skip
        folder = request.folder(run) if output is None and run is not None and not is_dump else output
        if folder is not None:
            refuse_other(folder, SIMULATION, request.content(folder), force)
        with bar("simulating") as progress:
            simulation = request.simulate(run, progress.show)
        if weights_out is not None:
            named = {name: one for name, one in simulation.chosen.items() if name != "none" or everything}
            with bar("writing weights") as progress:
                write_weights(simulation.source, named, weights_out, progress.show)
        if run is not None and gradient_audit:
            _audit(simulation, run, request.arms, checkpoint, is_named=not everything)
        pages = []
        if folder is not None:
            again = [shell_command(*context.obj)]
            pages = write_simulation(simulation, folder, again, request.content(folder), force, pdf)
    if as_json:
        say_json(content_of(simulation))
    else:
        from moediag.cli.table import show_simulation

        show_simulation(simulation)
        for path in [*([weights_out] if weights_out else []), *pages]:
            wrote(path)
    if strict:
        o.refuse_errors(simulation.source.findings)


@contextmanager
def _imported(target: Path, mask: str | None, **of_dump: Any) -> Iterator[Run]:
    """The one run of a framework's dump."""
    from moediag.importers.rollouts import Options
    from moediag.importers.write import imported_for_now

    if mask:
        raise typer.BadParameter(f"{target} is a dump, which knows its response tokens", param_hint="--mask")
    with imported_for_now([target], Options(**of_dump)) as runs:
        if len(runs) > 1:
            steps = ", ".join(str(run.record.step) for run in runs)
            raise RunError(f"{target} holds steps {steps}; give the files of one, or import it and simulate one run")
        yield runs[0]


def _open(target: Path, mask: str | None, of_run_only: dict[str, Any]) -> Run | None:
    """The run, or None for a table; refuses options that the other takes."""
    from moediag.run.reader import open_run

    if target.is_dir():
        if mask:
            raise typer.BadParameter(f"{target} is a run, which knows its response tokens", param_hint="--mask")
        return open_run(target)
    for name, is_given in of_run_only.items():
        if is_given:
            raise typer.BadParameter(f"{target} is no run directory", param_hint=name)
    return None


def _pair_of(run: Run, text: str | None) -> str:
    """The pair as the run names it; by default the main pair: train and the arm that sampled."""
    if text is None:
        return run.pair_name(*run.main_arms)
    first, mark, second = text.partition("~")
    if not (first and mark and second):
        raise typer.BadParameter(f"takes two arms as A~B, found {text}", param_hint="--pair")
    return run.pair_name(first, second)


def _grid(is_on: bool, alphas: str | None, betas: str | None) -> Grid | None:
    """The bands to sweep; None = no sweep."""
    from moediag.results.simulation import Grid

    if not (is_on or alphas or betas):
        return None
    given = {name: _bounds(text, f"--{name}") for name, text in (("alphas", alphas), ("betas", betas)) if text}
    return Grid(**given)


def _bounds(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"needs numbers with commas between them, found {text}", param_hint=option) from None


def _audit(simulation: Simulation, run: Run, arms: tuple[str, str], checkpoint: str | None, *, is_named: bool) -> None:
    """Run the gradient audit, or take the one that is there: of the corrections named, else of one per family."""
    from moediag.audit.gradients import METHODS, GradientRequest, load_audit, run_gradient_audit
    from moediag.cli.console import bar
    from moediag.engines.checkpoint import open_checkpoint

    train, infer = arms
    words = tuple(map(str, simulation.chosen.values()))
    request = GradientRequest(methods=words if is_named else METHODS, train=train, infer=infer)
    with bar("gradient audit") as progress:
        run_gradient_audit(run, open_checkpoint(checkpoint or _source(run, train)), request, progress.on_event)
    simulation.frames.update(load_audit(run))


def _source(run: Run, arm: str) -> str:
    """What the user called the checkpoint that an arm scored with."""
    record = run.checkpoint_of(arm)
    if record is None:
        raise RunError(f"{run.path}: arm {arm} has no checkpoint; give one with --checkpoint")
    return record.source
