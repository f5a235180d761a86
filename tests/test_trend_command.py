"""`moediag trend`: what it prints, writes and refuses, and that the figure draws the frame."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from scipy import special
from scripted_engine import make_scripted_run

from moediag.analysis.series import metric_rows
from moediag.cli.main import main
from moediag.figures import TREND_FIGURES
from moediag.figures.series import plot_trend, plot_trends, title_of
from moediag.hygiene.findings import finding
from moediag.results.trend_sources import read_trend
from moediag.run.files import read_sealed, sha256_bytes
from moediag.statistics.intervals import Interval
from moediag.statistics.recurrence import Recurrence

FILES = ["figures/trend.png", "figures/trend.svg", "report.html", "report.md", "summary.json", "trend_by_step.parquet"]


@pytest.fixture
def table(tmp_path):
    """A series of k3 that grows from 1e-3 with a boundary of 1e-3, errors of 3 %."""
    rng = np.random.default_rng(4)
    delta, rows = 1e-3, []
    for step in range(0, 60, 5):
        se = 0.03 * delta
        k3 = delta + se * rng.standard_normal()
        rows.append({"step": step, "k3": k3, "k3_se": se, "mean_abs_logp_diff": 0.02 + step / 2000})
        for _ in range(5):
            delta = 1.04 * delta - 0.04 * 5e-4
    path = tmp_path / "steps.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.fixture
def short(tmp_path):
    """Too few steps for a fit, so that nothing takes time."""
    path = tmp_path / "short.csv"
    pd.DataFrame({"step": [0, 50, 100], "k3": [1e-3, 2e-3, 1e-3], "k3_se": 1e-4}).to_csv(path, index=False)
    return path


def run(capsys, *arguments):
    status = main(["trend", *map(str, arguments)])
    return status, capsys.readouterr()


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


@pytest.mark.filterwarnings("error")
def test_a_growing_series_is_told_and_written_whole(capsys, table, tmp_path):
    out = tmp_path / "out"
    status, captured = run(capsys, table, "-o", out, "--json")
    assert status == 0
    summary = json.loads(captured.out)
    found = summary["recurrence"]
    assert (found["outcome"], found["metric"]) == ("grows", "kl_infer_train_k3")
    assert found["growth"]["ci"][0] < 0.04 < found["growth"]["ci"][1]
    assert found["boundary"]["ci"][0] < 1e-3 < found["boundary"]["ci"][1]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == FILES
    sealed = read_sealed(out / "summary.json")
    assert sealed["recurrence"] == found
    assert sealed["frames"]["trend_by_step"] == sha256_bytes((out / "trend_by_step.parquet").read_bytes())
    page = (out / "report.md").read_text()
    assert "is one explanation" in page
    assert "…" not in page, "a sentence was cut"
    for sentence in ("inequality", "No offline number shows that training will be stable", "k3 of forced text"):
        assert sentence in page
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "something half-written is left"


def test_a_refused_series_is_a_result(capsys, short):
    status, captured = run(capsys, short)
    assert status == 0
    assert "cannot tell (KL(infer‖train), k3): 3 steps with a known standard error" in captured.out
    assert "No offline number" in captured.out


def test_a_trend_is_replaced_by_that_of_the_same_request_or_with_force_and_anything_else_never(capsys, short, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, short, "-o", out)[0] == 0
    before = (out / "summary.json").read_bytes()
    assert run(capsys, short, "-o", out)[0] == 0
    assert (out / "summary.json").read_bytes() == before, "the same table gave another result"
    pd.read_csv(short).assign(k3=0.1).to_csv(longer := tmp_path / "longer.csv", index=False)
    status, captured = run(capsys, longer, "-o", out)
    assert status == 1
    assert captured.err == (
        f"moediag: {out} holds a moediag trend of another request (short.csv); give -o another folder, or --force to "
        "replace it\n"
    )
    assert run(capsys, longer, "-o", out, "--force")[0] == 0
    assert (out / "summary.json").read_bytes() != before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    status, captured = run(capsys, short, "-o", other, "--force")
    assert status == 1
    assert "expected a new folder or a moediag trend, found notes.txt" in captured.err
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_the_trend_that_was_there_and_nothing_else(capsys, short, tmp_path):
    """No file may grow beyond 30 kB: the table fits, the picture does not."""
    out = tmp_path / "out"
    assert run(capsys, short, "-o", out)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code = (
        "import resource, sys; from moediag.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "trend", str(short), "-o", str(out), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "no space to write" in done.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "short.csv"]


def test_runs_make_a_series(capsys, tmp_path):
    for step in (0, 50):
        make_scripted_run(tmp_path / f"step-{step}", n_prompts=8, seed=step)
    status, captured = run(capsys, tmp_path / "step-0", tmp_path / "step-50", "--json")
    assert status == 0
    summary = json.loads(captured.out)
    assert summary["step_origin"] == "the trailing number of the folder names"
    assert [row["step"] for row in summary["metrics"]["kl_infer_train_k3"]] == [0, 50]
    assert summary["recurrence"]["outcome"] == "cannot tell"


@pytest.mark.parametrize(
    ("name", "content", "options", "complaint"),
    [
        ("t.csv", None, [], "t.csv"),
        ("t.txt", "step,k3\n0,1\n", [], "no table by its name"),
        ("t.csv", "step,k3\n0,1\n", ["--steps", "0"], "--steps is for runs"),
        ("t.csv", "step,k3\n0,1\n", ["--fit", "kl"], "no metric kl in the series"),
        ("t.csv", "step,k3\n", [], "t.csv"),
        ("t.jsonl", "{", [], "t.jsonl"),
        ("t.parquet", "not parquet", [], "t.parquet"),
        ("no-run", None, [], "no-run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(capsys, tmp_path, name, content, options, complaint):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    status, captured = run(capsys, path, *options, "-o", tmp_path / "out")
    assert status == 1
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("moediag: ")
    assert complaint in lines[-1]
    assert not (tmp_path / "out").exists()


def test_steps_that_are_no_numbers_are_a_usage_error(capsys, short):
    status, captured = run(capsys, short, "--steps", "a,b")
    assert status == 2
    assert "0,50,100" in captured.err


@pytest.mark.filterwarnings("error")
def test_the_figure_draws_the_frame_the_marks_and_the_boundary(table):
    trend = read_trend([table], None, lambda *done: None).trend
    bounds = (0.03, 0.05), (1e-5, 3e-5), (0.5e-3, 1.4e-3)
    growth, drain, boundary = (
        Interval(value, *ends, 12) for value, ends in zip((0.04, 2e-5, 1e-3), bounds, strict=True)
    )
    found = Recurrence("grows", "told", 12, 0.0, 55.0, growth, drain, boundary, 1e-3, 0.0)
    figure = plot_trend(trend, found, "kl_infer_train_k3")
    ax = figure.axes[0]
    rows = trend[trend["metric"] == "kl_infer_train_k3"]
    lines = [line.get_ydata() for line in ax.get_lines()]
    assert any(np.array_equal(line, rows["value"]) for line in lines)
    assert any(np.allclose(line, 1e-3) for line in lines), "delta_c is not drawn"
    assert any(np.allclose(line, 1.535e-3) for line in lines), "R3's number is not drawn"
    said = words(figure)
    for sentence in ("delta_c 0.0010", "R3: Qwen3-30B-A3B", "no thresholds",
                     "0.05 IcePop post", "An equality model"):  # fmt: skip
        assert sentence in said
    assert ax.get_yscale() == "log"


@pytest.mark.filterwarnings("error")
def test_a_refused_series_has_neither_fit_nor_boundary_in_its_figure(short):
    trend = read_trend([short], None, lambda *done: None).trend
    found = Recurrence("cannot tell", "3 steps", 3, 0.0, 100.0)
    said = words(plot_trend(trend, found, "kl_infer_train_k3"))
    assert "these steps cannot tell" in said
    assert "delta_c" not in said
    forced = words(plot_trend(trend, found, "kl_infer_train_k3", is_kl=False))
    assert "k3 statistic (no KL)" in forced


@pytest.mark.filterwarnings("error")
def test_a_published_range_is_drawn_as_a_band_and_labelled_so(tmp_path):
    """Bug: "1 to 2 per mille" was a line at 0.0015."""
    path = tmp_path / "t.csv"
    pd.DataFrame({"step": [0, 1, 2], "icepop_masked_share": [1e-3, 2e-3, 3e-3]}).to_csv(path, index=False)
    figure = plot_trend(read_trend([path], None, lambda *done: None).trend)
    bands = [(p.get_y(), p.get_y() + p.get_height()) for p in figure.axes[0].patches if hasattr(p, "get_height")]
    assert any(np.allclose(band, (0.001, 0.002)) for band in bands)
    said = words(figure)
    assert "IcePop post, start 0.001 to 0.002" in said
    assert "0.0015" not in said


@pytest.mark.filterwarnings("error")
def test_bounds_of_an_error_are_those_of_a_gaussian(short):
    """Bug: the half width was worked out backwards from an interval, and was the last digit off."""
    trend = read_trend([short], None, lambda *done: None).trend
    half = special.ndtri(0.975) * trend["se"]
    assert (trend["value_ci_low"] == trend["value"] - half).all()
    assert (trend["value_ci_high"] == trend["value"] + half).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", [3.4, 7.0])
def test_titles_of_panels_stay_in_the_figure_and_every_axis_has_a_scale(tmp_path, width):
    """Bugs: the title of F(2) ran out at the right; an axis from 1.6 to 2.7 had one label, which is no scale."""
    path = tmp_path / "t.csv"
    columns = {"extreme_share_2": [0.04, 0.05], "abs_logp_diff.p99": [2.31, 2.16], "k3": [0.04, 0.039]}
    pd.DataFrame({"step": [0, 1], **columns}).to_csv(path, index=False)
    figure = plot_trend(read_trend([path], None, lambda *done: None).trend, width=width)
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x1 < width + 0.02
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2


@pytest.mark.filterwarnings("error")
def test_every_known_interval_is_drawn_also_of_a_step_without_such_a_token(tmp_path):
    """Bug: a share's intervals were left out beside steps at 0, as a band needs two neighbours that both have one."""
    path = tmp_path / "t.csv"
    shares = pd.DataFrame({"step": range(5), "extreme_share_2": [0, 0.002, 0, 0, 0.004]})
    bounds = {"extreme_share_2_ci_low": 0.0, "extreme_share_2_ci_high": [0.01, 0.012, 0.01, np.nan, 0.02]}
    shares.assign(**bounds).to_csv(path, index=False)
    ax = plot_trend(read_trend([path], None, lambda *done: None).trend).axes[0]
    (bars,) = (found for found in ax.collections if isinstance(found, LineCollection))
    assert [(bar[0, 0], bar[1, 1]) for bar in bars.get_segments()] == [(0, 0.01), (1, 0.012), (2, 0.01), (4, 0.02)]
    assert ax.get_ylim()[1] > 0.02


@pytest.mark.filterwarnings("error")
def test_a_metric_that_never_changes_is_named_with_its_value_and_not_drawn(tmp_path):
    """Bug: half of the panels were flat lines."""
    path = tmp_path / "t.csv"
    pd.DataFrame({"step": range(5), "k3": [0.1, 0.2, 0.3, 0.4, 0.5], "temperature": 0.7}).to_csv(path, index=False)
    figure = plot_trend(read_trend([path], None, lambda *done: None).trend)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [title_of("kl_infer_train_k3")]
    assert "The same at every step, not drawn: temperature (0.700)." in words(figure)


@pytest.fixture
def trainings(tmp_path):
    """Three tables of steps; one has a metric that the others have not."""
    rng = np.random.default_rng(5)
    for name, growth in (("none", 1.1), ("tis", 1.05), ("icepop", 1.0)):
        rows = [
            {"step": step, "k3": 1e-3 * growth**step * rng.uniform(0.9, 1.1), "k3_se": 1e-4,
             "masked_share.ring-1t": 1e-3 * growth**step, "masked_entropy.ring-1t": 2.0 + step / 10,
             **({"reward": step / 20} if name == "icepop" else {})}
            for step in range(12)
        ]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_trainings_stand_side_by_side(capsys, trainings, monkeypatch):
    monkeypatch.chdir(trainings)
    status, captured = run(capsys, "no correction=none", "TIS=tis/steps.jsonl", "IcePop=icepop", "-o", "out")
    assert status == 0, captured.err
    verdicts = captured.out.splitlines()[:3]
    for label, line in zip(("no correction", "TIS", "IcePop"), verdicts, strict=True):
        assert line.startswith(f"{label}: KL(infer‖train), k3: 0.00")
        assert "at step 0" in line
        assert "at step 11" in line
    out = trainings / "out"
    frame = pd.read_parquet(out / "trend_by_step.parquet")
    assert dict(frame.groupby("source")["step"].nunique()) == {"IcePop": 12, "TIS": 12, "no correction": 12}
    alone = read_trend([trainings / "tis"], None, lambda *done: None).trend
    both = frame[frame["source"] == "TIS"].reset_index(drop=True)
    pd.testing.assert_frame_equal(both.drop(columns="source"), alone.drop(columns="source"))
    metrics = ["kl-infer-train-k3", "masked-share-ring-1t", "masked-entropy-ring-1t", "reward"]
    assert sorted(path.name for path in (out / "figures").glob("*.png")) == [
        f"{nth}-{name}.png" for nth, name in enumerate(metrics, 1)
    ]
    summary = read_sealed(out / "summary.json")
    assert set(summary["runs"]) == {"no correction", "TIS", "IcePop"}
    page = (out / "report.md").read_text()
    places = [page.index(f"**{label}**: KL(infer‖train), k3") for label in ("no correction", "TIS", "IcePop")]
    assert places == sorted(places)
    assert places[-1] < page.index("| run | step |") < page.index("1-kl-infer-train-k3.png")
    assert "masked by ring-1t" in page
    assert "'no correction=none'" in page, "the command to make it again"
    before = (out / "summary.json").read_bytes()
    assert run(capsys, "no correction=none", "TIS=tis/steps.jsonl", "IcePop=icepop", "-o", "out")[0] == 0
    assert (out / "summary.json").read_bytes() == before
    assert run(capsys, "none", "tis", "-o", "out")[0] == 1  # of other trainings


@pytest.mark.filterwarnings("error")
def test_a_figure_of_trainings_has_a_line_marker_and_colour_for_each(trainings):
    names = ("none", "tis", "icepop")
    trends = {name: read_trend([trainings / name], None, lambda *done: None).trend for name in names}
    ax = plot_trends(trends, "kl_infer_train_k3").axes[0]
    lines = {tuple(line.get_ydata()): line for line in ax.get_lines()}
    drawn = [lines[tuple(metric_rows(trend, "kl_infer_train_k3")["value"])] for trend in trends.values()]
    for how in ("get_color", "get_marker"):
        assert len({getattr(line, how)() for line in drawn}) == 3, how
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(names)
    assert any(np.allclose(line, 1.535e-3) for line in map(np.asarray, lines)), "R3's number is not drawn"
    figure = plot_trends(trends, "reward")
    assert "Without this metric: none, tis." in words(figure)
    assert figure.axes[0].get_ylabel() == "as given"
    assert plot_trends(trends, "masked_entropy.ring-1t").axes[0].get_ylabel() == "[nat]"


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (["a=none", "tis"], "expected NAME=PATH for every training, each name once"),
        (["a=none", "a=tis"], "expected NAME=PATH for every training, each name once"),
        (["a=none", "b=missing"], "missing does not exist"),
        (["none", "tis", "--steps", "1,2"], "--steps numbers the runs of one series"),
    ],
)
def test_trainings_that_cannot_stand_side_by_side_are_one_line(capsys, trainings, monkeypatch, targets, complaint):
    monkeypatch.chdir(trainings)
    status, captured = run(capsys, *targets)
    assert status == 1
    assert captured.err.startswith("moediag: ")
    assert complaint in captured.err


def test_the_figure_of_a_series_is_declared_as_the_others_are():
    assert TREND_FIGURES["trend"].plot is plot_trend
    assert TREND_FIGURES["trend"].frames == ("trend_by_step",)


def test_an_infinite_step_is_drawn_and_said(capsys, tmp_path):
    """Bug: the step at which a metric is infinite was left out of the picture without a word."""
    path = tmp_path / "t.csv"
    pd.DataFrame({"step": range(10), "k3": [0.1] * 9 + [np.inf], "k3_se": 0.01}).to_csv(path, index=False)
    trend = read_trend([path], None, lambda *done: None).trend
    figure = plot_trend(trend, findings=(finding("infinite-metric", "k3", "infinite at 1 of 10 steps"),))
    markers = [line for line in figure.axes[0].get_lines() if line.get_marker() == "^"]
    assert [list(line.get_xdata()) for line in markers] == [[9]]
    assert "Triangles at the top: infinite there" in words(figure)
    assert "Warning: k3: infinite at 1 of 10 steps" in words(figure)
    status, captured = run(capsys, path, "-o", tmp_path / "out")
    assert status == 0
    assert captured.out.startswith("warning: infinite-metric: kl_infer_train_k3: infinite at 1 of 10 steps")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["findings"]
    assert "infinite at 1 of 10 steps" in (tmp_path / "out" / "report.md").read_text()
