"""What a person works with in Python: runs, comparisons, series and simulations that show themselves and draw.

Everything here wraps what the command line calls: the same numbers, the same figures. Only ``write``,
``analyze`` and ``report`` write.

Example::

    import moediag

    run = moediag.open_run("runs/moe")
    run.summary["verdict"], run.metrics, run.frames["agreement_by_layer"], run.headlines
    run.plot("figure1")
    moediag.compare(run, "runs/dense").plot("figure1")
    moediag.simulate(run, "icepop", "tis_token").weights

Invariants:
    - results are read anew from disk and held against their digests at every access, so an open run never
      shows an analysis of arms that have changed since;
    - showing a run never fails: what is damaged or missing is shown as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from moediag.errors import FrameError, IncompleteRunError, MoediagError
from moediag.run import reader, series
from moediag.shown import Headlines, Shown, counted, described_arms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moediag.results.simulation import Grid
    from moediag.results.trend import Trend

HEADLINE_METRICS: Final = ("abs_logp_diff.p50", "abs_logp_diff.mean", "abs_logp_diff.p99", "extreme_share_2")
"""Body, mean and tail of the difference, and the share of extreme tokens: what :attr:`Comparison.metrics` shows."""
_YARDSTICKS: Final = ("floor", "ratio", "rounding")


class UnknownNameError(FrameError, KeyError):
    """No frame or figure of that name, or none in this run; the message lists those that there are."""

    __str__ = Exception.__str__  # a KeyError would show the message in quotes


class Run(Shown, reader.Run):
    """A run directory: its records, arms and pairs, and what an analysis of it found; :func:`open_run` gives one."""

    @property
    def name(self) -> str:
        """What pages and figures call the run: its folder's name."""
        return self.path.resolve().name

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json, as ``moediag analyze`` wrote it.

        Raises:
            IncompleteRunError: never analysed, or its arms have changed since; the message names the command.
            CorruptRunError: not what ``analyze`` wrote.
        """
        from moediag.results import load_summary

        return load_summary(self)

    @property
    def frames(self) -> Frames:
        """Frames of the main pair by name, each read at its first access; raises like :attr:`summary`."""
        return Frames(self, self.summary["main_pair"])

    def frames_of(self, arm_a: str, arm_b: str) -> Frames:
        """Frames of another pair that was analysed; raises like :attr:`summary`."""
        return Frames(self, self.pair_name(arm_a, arm_b))

    @property
    def metrics(self) -> pd.DataFrame:
        """Metrics of the main pair by name: value, 95 % interval, n, unit and good end, floor, ratio to it, rounding.

        ``floor`` is what the engines show against themselves and ``rounding`` what one unit in the last place does,
        both in the metric's unit; NaN = not measured or not defined.
        """
        summary = self.summary
        table = Frames(self, summary["main_pair"])["logp_metrics"].set_index("metric")
        measured = (summary["floors"] or {}).get("metrics", {})
        for column in _YARDSTICKS:
            values = [(measured.get(metric) or {}).get(column) for metric in table.index]
            table[column] = pd.array(values, dtype="Float64").to_numpy(float, na_value=float("nan"))
        return table

    @property
    def headlines(self) -> Headlines:
        """What was found, in sentences by topic; raises like :attr:`summary`."""
        from moediag.headlines import run_headlines

        summary = self.summary
        return run_headlines(summary, Frames(self, summary["main_pair"]))

    @property
    def figures(self) -> list[str]:
        """Names of the figures that this run fills; :meth:`plot` says why of another."""
        return _figures_of({self.name: self.frames})

    def plot(self, figure: str, **options: Any) -> Figure:
        """Draw a figure of the run's main pair, e.g. ``figure1``; its title is the finding.

        Args:
            figure: its name, one of :attr:`figures`.
            options: of the figure's own function, e.g. ``width`` [inch].

        Raises:
            UnknownNameError: no such figure, or the run does not fill it; the message gives the reason.
            IncompleteRunError: not analysed.
        """
        return _draw(figure, {self.name: self}, options)

    def worst_tokens(self, tokenizer: str | Path | None = None) -> pd.DataFrame:
        """The tokens that differ most, with their text; by id without a tokenizer, empty where text was withheld.

        Args:
            tokenizer: ``tokenizer.json`` or its folder; None = the checkpoint's own, if it is still there.
        """
        from moediag.report import token_texts

        summary = self.summary
        worst = Frames(self, summary["main_pair"])["worst_tokens"]
        is_withheld = bool(summary["provenance"].get("no_text"))
        texts = token_texts(self, worst, None if tokenizer is None else Path(tokenizer), is_withheld)
        places = zip(worst["seq_id"].tolist(), worst["position"].tolist(), strict=True)
        found = [texts.of(*place) for place in places]
        return worst.assign(text=pd.Series([one and one.token for one in found], dtype=object))

    def analyze(self, force: bool = False, no_text: bool = False, workers: int = 1) -> dict[str, Any]:
        """Analyse the run as ``moediag analyze`` does; writes analysis/ and summary.json, returns the summary.

        Args:
            force: analyse in spite of validation errors.
            no_text: keep token ids out of the frames, and text out of pages made from them.
            workers: processes; the results do not depend on it. With more than one a script needs its
                ``if __name__ == "__main__"``.
        """
        from moediag.results import analyze_run

        return analyze_run(self, force, no_text, workers)

    def report(self, **options: Any) -> Path:
        """Write figures, report.md and report.html as ``moediag report`` does; returns the path of report.md."""
        from moediag.results import report_run

        return report_run(self, **options)

    def _shown(self) -> tuple[str, list[tuple[str, str]], pd.DataFrame | None]:
        try:
            checkpoint = self.checkpoint_of(self.main_arms[0])
            model = checkpoint.source if checkpoint else "not known: no checkpoint was recorded"
            routers = self.routers
            n_experts, top_k = (max((getattr(router, name) for router in routers), default=0)
                                for name in ("n_experts", "top_k"))  # fmt: skip
            routing = f"{len(routers)} MoE layers, {top_k} of {n_experts} experts" if routers else "dense"
            model += f" ({routing})"
        except (MoediagError, OSError) as error:
            model = f"cannot be read: {error}"
        there = [shard for shard in self.shards if self.has_tokens(shard)]
        tokens = f"{counted(self.n_sequences, 'sequence')} in {len(self.shards)} shards, {len(there)} of them captured"
        try:
            summary = self.summary
            pair = summary["pairs"][summary["main_pair"]]
            n = f"{counted(pair['n_tokens'], 'response token')} of {counted(pair['n_prompts'], 'prompt')}"
            analysed = f"{', '.join(summary['pairs'])}: {n} in {summary['main_pair']}"
            verdict = [("verdict", f"{summary['verdict']['word']}: {summary['verdict']['reason']}")]
        except (MoediagError, OSError, KeyError, TypeError) as error:
            analysed, verdict = f"no: {error}", []
        try:
            main = "~".join(reversed(self.main_arms))
        except (MoediagError, OSError) as error:
            main = f"cannot be read: {error}"
        rows = [("model", model), ("tokens", tokens), ("main pair", main), ("analysed", analysed), *verdict]
        return f"moediag run {self.path}", rows, described_arms(self)


class Frames(Mapping[str, pd.DataFrame]):
    """Frames of one pair of a run: a mapping whose frames are read, and checked, at their first access."""

    def __init__(self, run: Run, pair: str) -> None:
        self._run, self.pair = run, pair
        self._summary = run.summary
        analysed = self._summary["provenance"]["frames"]
        if pair not in analysed:
            raise IncompleteRunError(
                f"{run.path}: pair {pair} has not been analysed (analysed: {', '.join(analysed)}); capture its arms, "
                f"then run: moediag analyze {run.path}"
            )
        self._names = sorted(analysed[pair])
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        """A frame; a copy that may be changed.

        Raises:
            UnknownNameError: the pair has no such frame.
            CorruptRunError: not the frame that the analysis wrote.
        """
        from moediag.folder import read_frames
        from moediag.results.load import analyze_again
        from moediag.run.derived import ANALYSIS

        if name not in self._names:
            raise UnknownNameError(
                f"{self._run.path} has no frame {name} of {self.pair}; it has {', '.join(self._names)} "
                f"(after a new capture or moediag: moediag analyze {self._run.path})"
            )
        if name not in self._read:
            digest = self._summary["provenance"]["frames"][self.pair][name]
            folder = self._run.path / ANALYSIS / self.pair
            self._read |= read_frames(folder, {name: digest}, analyze_again(self._run))
        return self._read[name].copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _ipython_key_completions_(self) -> list[str]:
        return self._names

    def __repr__(self) -> str:
        return f"<{len(self)} frames of {self._run.path} {self.pair}: {', '.join(self)}>"


class Comparison(Shown):
    """Analysed runs side by side; :func:`compare` gives one.

    Args:
        runs: label -> run.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self.runs = dict(runs)

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """summary.json of every run, by label."""
        return {label: run.summary for label, run in self.runs.items()}

    @property
    def frames(self) -> dict[str, Frames]:
        """Frames of every run's main pair, by label."""
        return {label: run.frames for label, run in self.runs.items()}

    @property
    def metrics(self) -> pd.DataFrame:
        """:data:`HEADLINE_METRICS` of every run side by side: columns (run, :attr:`Run.metrics`' columns)."""
        columns = ["value", "ci_low", "ci_high", "n_tokens", "n_prompts", *_YARDSTICKS]
        found = {label: run.metrics.loc[list(HEADLINE_METRICS), columns] for label, run in self.runs.items()}
        return pd.concat(found, axis=1, names=["run", ""])

    @property
    def headlines(self) -> Headlines:
        """How the runs differ, in sentences by topic."""
        from moediag.headlines import comparison_headlines

        return comparison_headlines(self.summary, self.frames)

    @property
    def figures(self) -> list[str]:
        """Names of the figures that some of the runs fill."""
        return _figures_of(self.frames)

    def plot(self, figure: str, **options: Any) -> Figure:
        """Draw a figure of the runs side by side; as :meth:`Run.plot`."""
        return _draw(figure, self.runs, options)

    def write(self, output: str | Path, training_window: int | None = None, force: bool = False) -> Path:
        """Write the comparison as ``moediag compare`` does; returns the path of its report.md."""
        from moediag.results.compare import compare_runs, run_labels

        paths, labels = [run.path for run in self.runs.values()], list(self.runs)
        as_usual = labels == run_labels(paths)  # the page then shows the command without them
        compare_runs(paths, Path(output), training_window, force, labels=[] if as_usual else labels)
        return Path(output) / "report.md"

    def _shown(self) -> tuple[str, list[tuple[str, str]], pd.DataFrame | None]:
        title = f"moediag comparison of {', '.join(self.runs)}"
        try:
            return title, list(self.headlines.items()), self.metrics.T
        except (MoediagError, OSError) as error:
            return title, [("cannot be read", str(error))], None


class Simulation(Shown):
    """Corrections on the same logged tokens, side by side; :func:`simulate` gives one.

    Args:
        result: the simulation as ``moediag simulate`` makes it.
    """

    def __init__(self, result: Any) -> None:
        self.result = result

    @property
    def summary(self) -> dict[str, Any]:
        """What was simulated, on how many tokens, and what was left out."""
        found: dict[str, Any] = self.result.summary()
        return found

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """Frames by name: ``correction_statistics`` and the others."""
        found: dict[str, pd.DataFrame] = self.result.frames
        return found

    @property
    def statistics(self) -> pd.DataFrame:
        """One row per correction: frame ``correction_statistics`` by name of the correction."""
        return self.frames["correction_statistics"].set_index("correction")

    @property
    def weights(self) -> pd.DataFrame:
        """Weight of every row under every correction, in the order of the rows; 0 = no update.

        Beside the weights are the columns that identify a row: ``seq_id``, ``position`` and others of the source.
        """
        source = self.result.source
        keys = {name: column[0 : source.n_rows] for name, column in source.keys.items()}
        return pd.DataFrame({**keys, **{label: source.weights(one) for label, one in self.result.chosen.items()}})

    @property
    def headlines(self) -> Headlines:
        """What was found, in sentences by topic."""
        from moediag.headlines import simulation_headlines

        return simulation_headlines(self.summary, self.frames)

    @property
    def figures(self) -> list[str]:
        """Names of the figures that this simulation fills."""
        from moediag.figures.registry import simulation_figures_of

        return simulation_figures_of(self.frames)

    def plot(self, figure: str, **options: Any) -> Figure:
        """Draw a figure, e.g. ``masked_shares``.

        Raises:
            UnknownNameError: no such figure, or the simulation does not fill it.
        """
        from moediag.figures.registry import draw_simulation_figure

        if figure not in self.figures:
            raise UnknownNameError(f"no figure {figure} of this simulation; it fills {', '.join(self.figures)}")
        return draw_simulation_figure(figure, self.frames, self.result.label, **options)

    def write(self, output: str | Path, force: bool = False) -> Path:
        """Write frames, figures and both pages as ``moediag simulate -o`` does; returns the path of report.md."""
        from moediag.results.simulation import write_simulation

        corrections = {label: str(one) for label, one in self.result.chosen.items()}
        source, eps_clip = self.result.source, self.result.eps_clip
        request = {"of": self.result.label, "n_rows": source.n_rows, "reward": source.reward, "eps_clip": eps_clip}
        request["corrections"] = corrections
        write_simulation(self.result, Path(output), [], request, force)
        return Path(output) / "report.md"

    def _shown(self) -> tuple[str, list[tuple[str, str]], pd.DataFrame | None]:
        columns = ["masked_share", "ess_token", "kept_k3"]
        return f"moediag simulation of {self.result.label}", list(self.headlines.items()), self.statistics[columns]


class Series(Shown, series.Series):
    """A folder of runs, one per training step; :func:`open_series` gives one."""

    def runs(self) -> Iterator[Run]:
        """The runs by step; raises CorruptRunError for a run of another step than its folder says."""
        return (Run(run.path, run.record, run.schema_version) for run in super().runs())

    def trend(self, metric: str | None = None) -> Trend:
        """The metrics by step, and the recurrence fitted or refused, as ``moediag trend`` gives them."""
        from moediag.results.trend import measure_trend

        return measure_trend([self.run_path(step) for step in self.steps], self.steps, metric)

    def _shown(self) -> tuple[str, list[tuple[str, str]], pd.DataFrame | None]:
        rows = [("source", self.record.source), ("steps", ", ".join(map(str, self.steps)) or "no run")]
        rows += [("step table", series.STEPS)] if self.record.steps_sha256 else []
        return f"moediag series {self.path}", rows, None


def open_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        RunError: not a run directory.
        CorruptRunError: its manifest was changed, or makes no sense.
        SchemaVersionError: written by a newer schema version.
    """
    found = reader.open_run(path)
    return Run(found.path, found.record, found.schema_version)


def open_series(path: str | Path) -> Series:
    """Open a series; raises RunError for any other folder."""
    found = series.open_series(Path(path))
    return Series(found.path, found.record)


def compare(*runs: reader.Run | str | Path, labels: Sequence[str] = ()) -> Comparison:
    """Put analysed runs side by side; nothing is written.

    Args:
        runs: two or more, open or by path, each analysed.
        labels: what they are called, one for each; empty = by their folders' names, or by what differs in the paths of
            folders of one name.

    Raises:
        RunError: fewer than two runs, one of them twice, or labels that are not one for each.
        IncompleteRunError: one has not been analysed.
    """
    from moediag.results.compare import run_labels

    opened = [open_run(run.path if isinstance(run, reader.Run) else run) for run in runs]
    comparison = Comparison(dict(zip(run_labels([run.path for run in opened], labels), opened, strict=True)))
    _ = comparison.summary  # an analysis that is missing is an error now, not at the first figure
    return comparison


def simulate(
    tokens: pd.DataFrame | reader.Run | str | Path,
    *methods: str,
    presets: Sequence[str] = (),
    pair: tuple[str, str] | None = None,
    reward: str | None = None,
    mask: str | None = None,
    eps_clip: float = 0.2,
    sweep: bool | Grid = True,
) -> Simulation:
    """Simulate off-policy corrections on logged tokens; needs no engine and writes nothing.

    Args:
        tokens: a run, a table (parquet, CSV, JSON lines) by path, or a frame with ``seq_id``, ``position``,
            ``logp_train`` and ``logp_infer`` [nat], one row per token.
        methods: corrections in words, e.g. ``icepop`` or ``icepop:alpha=0.5,beta=2``.
        presets: presets, or frameworks for all of theirs. Without any of both everything known is compared.
        pair: two arms of a run; None = its main pair.
        reward: ``none``, ``hash`` or a table's column; None = the table's own, else a synthetic one.
        mask: a table's column with the loss mask; None = the one known by its name.
        eps_clip: PPO's clip.
        sweep: sweep IcePop's band and recommend one to start from; a grid sweeps its own bands.

    Raises:
        MoediagError: an unknown correction or preset.
        DumpError: the table lacks a column, or holds what no log has.
        IncompleteRunError: an arm of the pair is missing.
    """
    from moediag.corrections import choose
    from moediag.results.simulation import add_sweep, read_tokens
    from moediag.results.simulation import simulate as simulated

    chosen = choose(methods, presets)
    if not isinstance(tokens, pd.DataFrame | reader.Run):
        tokens = open_run(tokens) if Path(tokens).is_dir() else Path(tokens)
    source, label, floor_k3 = read_tokens(tokens, pair, reward, mask)
    result = simulated(source, chosen, label, eps_clip=eps_clip)
    if sweep:
        add_sweep(result, None if isinstance(sweep, bool) else sweep, floor_k3)
    return Simulation(result)


def _figures_of(frames: Mapping[str, Frames]) -> list[str]:
    from moediag.figures import FIGURES, figures_left_out

    left_out = figures_left_out(frames)
    return [name for name in sorted(FIGURES) if name not in left_out]


def _draw(name: str, runs: Mapping[str, Run], options: Mapping[str, Any]) -> Figure:
    from moediag.figures import FIGURES, draw_figure, figures_left_out, summary_floors

    if name not in FIGURES:
        raise UnknownNameError(f"no figure {name}; there are {', '.join(sorted(FIGURES))}")
    frames = {label: run.frames for label, run in runs.items()}
    floors = {label: summary_floors(run.summary["floors"]) for label, run in runs.items()}
    figure = draw_figure(name, frames, floors, **options)
    if figure is None:
        raise UnknownNameError(f"figure {name} cannot be drawn of {', '.join(runs)}: {figures_left_out(frames)[name]}")
    return figure
