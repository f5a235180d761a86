"""``moediag simulate``: off-policy corrections on logged tokens, side by side, offline."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moediag.cli import options as o
from moediag.errors import RunError
from moediag.notation import INFER, TRAIN

if TYPE_CHECKING:
    from moediag.corrections.chosen import Chosen
    from moediag.corrections.correction import Correction
    from moediag.corrections.sources import Source
    from moediag.importers.tables import OnProgress
    from moediag.results.simulation import Grid, Simulation
    from moediag.run.reader import Run

NAME = "simulate"
_N_NAMED: Final = 4
"""Corrections named in a message."""

Target = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|TABLE",
        help="Run directory, or a .parquet, .csv or .jsonl with a row per token: seq_id, position, logp_train, "
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
    str | None, typer.Option("--checkpoint", metavar="CKPT", help="For --gradient-audit; default: the run's own.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
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
) -> None:
    """Simulate IcePop and its rivals on the same logged tokens: what each masks, weighs and leaves; needs no engine.

    No offline number shows that training will be stable.
    """
    from moediag.cli.console import say_json, wrote
    from moediag.corrections.chosen import choose
    from moediag.corrections.weight_files import refuse_weights_path
    from moediag.results.load import shell_command
    from moediag.results.simulation import as_json as content_of

    everything = everything or not (method or preset)
    chosen = choose(method or [], preset or [], everything)
    if weights_out is not None:
        refuse_weights_path(weights_out, force)
    grid = _grid(sweep or everything, alphas, betas)
    asked = Asked(target, chosen, grid, pair, reward, eps_clip, mask, gradient_audit, checkpoint)
    run = asked.open()
    if run is not None:
        asked = asked.of(run)
    folder = asked.folder(run, output, force)
    columns = {name: one.correction for name, one in chosen.items() if name != "none" or everything}
    simulation = asked.simulate(run, weights_out, columns)
    if run is not None and gradient_audit:
        _audit(simulation, run, asked.arms, checkpoint, is_named=not everything)
    pages = [] if folder is None else asked.write(simulation, folder, shell_command(*context.obj), force, pdf)
    if as_json:
        say_json(content_of(simulation))
    else:
        from moediag.cli.table import show_simulation

        show_simulation(simulation)
        for path in [*([weights_out] if weights_out else []), *pages]:
            wrote(path)
    if strict:
        o.refuse_errors(simulation.source.findings)


@dataclass(frozen=True)
class Asked:
    """What is asked of a simulation, by the command line or the demo."""

    target: Path
    chosen: dict[str, Chosen]
    grid: Grid | None
    pair: str | None = None
    reward: str | None = None
    eps_clip: float = 0.2
    mask: str | None = None
    gradient_audit: bool = False
    checkpoint: str | None = None

    def of(self, run: Run) -> Asked:
        """The same of a run's pair, named as the run names it; by default the main pair: train and what sampled."""
        if self.pair is None:
            return replace(self, pair=run.pair_name(*run.main_arms))
        first, mark, second = self.pair.partition("~")
        if not (first and mark and second):
            raise typer.BadParameter(f"wants two arms as A~B, found {self.pair}", param_hint="--pair")
        return replace(self, pair=run.pair_name(first, second))

    @property
    def pair_name(self) -> str:
        """The pair as the run names it; a table's two sides are called by their roles."""
        return self.pair or f"{INFER}~{TRAIN}"

    @property
    def arms(self) -> tuple[str, str]:
        """Minuend and subtrahend of the pair."""
        subtrahend, _, minuend = self.pair_name.partition("~")
        return minuend, subtrahend

    def open(self) -> Run | None:
        """The run, or None for a table."""
        from moediag.run.reader import open_run

        if self.checkpoint and not self.gradient_audit:
            raise typer.BadParameter("goes with --gradient-audit", param_hint="--checkpoint")
        if self.target.is_dir():
            if self.mask:
                raise typer.BadParameter(
                    f"{self.target} is a run, which knows its response tokens", param_hint="--mask"
                )
            return open_run(self.target)
        for name, is_given in (
            ("--pair", self.pair),
            ("--gradient-audit", self.gradient_audit),
            ("--checkpoint", self.checkpoint),
        ):
            if is_given:
                raise typer.BadParameter(f"{self.target} is no run directory", param_hint=name)
        return None

    @property
    def words(self) -> dict[str, Any]:
        """What is asked of the tokens, in plain types."""
        bands = None if self.grid is None else [[str(bound) for bound in side] for side in vars(self.grid).values()]
        named = {name: getattr(self, name) for name in ("reward", "eps_clip", "mask", "gradient_audit", "checkpoint")}
        corrections = {label: str(one.correction) for label, one in self.chosen.items()}
        return {"pair": self.pair_name, "corrections": corrections, "bands": bands, **named}

    def request(self, folder: Path) -> dict[str, Any]:
        """What a simulation in the folder answers, and must have answered to be replaced by this one."""
        names = [name for name in self.chosen if name != "none"]
        more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
        target = self.target.resolve()
        return {
            "of": f"{target.name} with {', '.join(names[:_N_NAMED]) or 'no correction'}{more}",
            "target": os.path.relpath(target, folder.resolve()),
            **self.words,
        }

    def folder(self, run: Run | None, output: Path | None, force: bool) -> Path | None:
        """Where the simulation goes, refused before anything is computed: in a run every request has its own folder."""
        from moediag.corrections.chosen import choose
        from moediag.folder import refuse_other
        from moediag.results.simulation import SIMULATION, Grid
        from moediag.run.derived import SIMULATIONS
        from moediag.run.files import digest_of

        folder = output
        if folder is None and run is not None:
            is_usual = self.words == Asked(self.target, choose(), Grid(), self.pair).words
            name = str(self.words["pair"]) if is_usual else f"{self.words['pair']}-{digest_of(self.words)[:8]}"
            folder = run.path / SIMULATIONS / name
        if folder is not None:
            refuse_other(folder, SIMULATION, self.request(folder), force)
        return folder

    def simulate(
        self, run: Run | None, weights_out: Path | None = None, columns: dict[str, Correction] | None = None
    ) -> Simulation:
        """Read the tokens, simulate, and write the weights of ``columns`` where a file for them is given."""
        from moediag.cli.console import bar
        from moediag.corrections.weight_files import write_weights
        from moediag.results.simulation import add_sweep, run_floor_k3, simulate

        with bar("reading") as progress:
            source = self._source(run, progress.show)
        with bar("simulating") as progress:
            simulation = simulate(
                source, self.chosen, self._label(run), eps_clip=self.eps_clip, on_progress=progress.show
            )
        if self.grid is not None:
            floor_k3 = None if run is None else run_floor_k3(run, self.pair_name)
            with bar("sweeping") as progress:
                add_sweep(simulation, self.grid, floor_k3, progress.show)
        if weights_out is not None:
            some = {name: one for name, one in (columns or {}).items() if name in simulation.chosen}
            with bar("writing weights") as progress:
                write_weights(source, some, weights_out, progress.show)
        return simulation

    def _source(self, run: Run | None, on_progress: OnProgress) -> Source:
        from moediag.corrections.sources import run_source, table_source

        if run is None:
            return table_source(self.target, self.reward, on_progress, self.mask)
        return run_source(run, self.arms, self.reward)

    def _label(self, run: Run | None) -> str:
        if run is None:
            return self.target.name
        usual = f"{run.reference(INFER)}~{run.reference(TRAIN)}"
        return run.path.resolve().name + (f" {self.pair_name}" if self.pair_name != usual else "")

    def write(
        self, simulation: Simulation, folder: Path, command: str, force: bool = False, pdf: bool = False
    ) -> list[Path]:
        """Write the simulation; the page names the command that makes it again."""
        from moediag.results.simulation import write_simulation

        return write_simulation(simulation, folder, [command], self.request(folder), force, pdf)


def _grid(is_wanted: bool, alphas: str | None, betas: str | None) -> Grid | None:
    """The bands to sweep; None = no sweep."""
    from moediag.results.simulation import Grid

    if not (is_wanted or alphas or betas):
        return None
    given = {name: _bounds(text, f"--{name}") for name, text in (("alphas", alphas), ("betas", betas)) if text}
    return Grid(**given)


def _bounds(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"wants numbers with commas between them, found {text}", param_hint=option) from None


def _audit(simulation: Simulation, run: Run, arms: tuple[str, str], checkpoint: str | None, *, is_named: bool) -> None:
    """Run the gradient audit, or take the one that is there: of the corrections named, else of one per family."""
    from moediag.audit.gradients import METHODS, GradientRequest, load_audit, run_gradient_audit
    from moediag.cli.console import bar
    from moediag.engines.checkpoint import open_checkpoint

    train, infer = arms
    words = tuple(str(one.correction) for one in simulation.chosen.values())
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
