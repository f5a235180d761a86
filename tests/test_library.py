"""``import moediag``: what a person meets in Python shows itself, draws, and says in one line what is missing."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_results import make_run

import moediag
from moediag.corrections import weights
from moediag.errors import CorruptRunError, IncompleteRunError, MoediagError, RunError
from moediag.headlines import body_and_tail_words, plain_text
from moediag.library import Frames, UnknownNameError
from moediag.report.text import Markdown
from moediag.results import load_frames, load_summary
from moediag.run.reader import Run as PlainRun
from moediag.run.series import create_series


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs moe and dense, analysed; tests that change them take a copy."""
    folder = tmp_path_factory.mktemp("library")
    for name in ("moe", "dense"):
        make_run(folder / name, is_moe=name == "moe")
        moediag.open_run(folder / name).analyze()
    return folder


@pytest.fixture
def moe(analysed: Path) -> moediag.Run:
    return moediag.open_run(analysed / "moe")


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_finds_names_and_rooms() -> None:
    """Bug: tab completion showed ``_HOME`` but not ``open_run``, and ``moediag.analysis`` was no attribute."""
    printed = in_a_fresh_process(
        "import sys, moediag\n"
        "heavy = {'torch', 'vllm', 'transformers', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "names = dir(moediag)\n"
        "moediag.corrections.weights, moediag.notation.TRAIN\n"
        "print(sorted(heavy), *names)"
    )
    heavy, *names = printed.split()
    assert heavy == "[]"
    assert {"open_run", "compare", "simulate", "Run", "analysis", "corrections", "figures"} <= set(names)
    assert not {"Any", "TYPE_CHECKING", "_HOME"} & set(names)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moediag.nonsense


def test_a_package_that_a_room_lacks_is_not_a_name_that_moediag_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "moediag.cli", raising=False)
    monkeypatch.delitem(sys.modules, "moediag.cli.main", raising=False)
    with pytest.raises(ImportError, match="typer"):
        from moediag.cli import main  # noqa: F401


def test_a_run_shows_itself(moe: moediag.Run) -> None:
    """Bug: a notebook showed ``<Run object at 0x...>``."""
    text, page = repr(moe), moe._repr_html_()
    for words in (str(moe.path), "MoE layers", "main pair", "infer~train", "12 sequences", "teacher-forced", "2 of 2"):
        assert words in text
        assert words in page
    assert moe.summary["verdict"]["word"] in text
    assert max(map(len, text.splitlines())) < 140


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = moediag.open_run(make_run(tmp_path / "<b>bold").path)
    assert "<b>bold" in repr(run)
    assert "<b>bold" not in run._repr_html_()
    assert "&lt;b&gt;bold" in run._repr_html_()


def test_a_run_without_analysis_says_what_to_run(tmp_path: Path) -> None:
    run = moediag.open_run(make_run(tmp_path / "run").path)
    assert "has not been analysed" in " ".join(repr(run).split())
    for show in (lambda: run.summary, lambda: run.frames, lambda: run.metrics, lambda: run.plot("figure1")):
        with pytest.raises(IncompleteRunError, match=f"run: moediag analyze {run.path}"):
            show()


def test_showing_a_damaged_run_does_not_fail(analysed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(analysed / "moe", tmp_path / "run"))
    (path / "arms" / "train" / "arm.json").write_text("{}")
    (path / "summary.json").write_text("{}")
    run = moediag.open_run(path)
    assert "cannot be read" in repr(run)
    assert "cannot be read" in run._repr_html_()


def test_a_summary_of_an_older_moediag_asks_for_an_analysis_not_a_capture(analysed: Path, tmp_path: Path) -> None:
    """Bug: results of an older schema asked to capture the run again, though its captures are read."""
    from moediag.run.files import read_sealed, write_sealed

    path = Path(shutil.copytree(analysed / "moe", tmp_path / "run"))
    summary = read_sealed(path / "summary.json")
    summary.pop("sha256", None)
    write_sealed(path / "summary.json", {**summary, "schema_version": 1})
    with pytest.raises(IncompleteRunError, match="older moediag.*run: moediag analyze"):
        _ = moediag.open_run(path).summary


def test_summary_and_frames_are_those_that_the_analysis_wrote(moe: moediag.Run) -> None:
    assert moe.summary == load_summary(moe)
    whole = load_frames(moe)
    assert list(moe.frames) == sorted(whole)
    for name, frame in moe.frames.items():
        pd.testing.assert_frame_equal(frame, whole[name])
    assert moe.frames._ipython_key_completions_() == sorted(whole)
    assert "agreement_by_layer" in repr(moe.frames)


def test_frames_are_read_one_by_one_and_only_whole(analysed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(analysed / "moe", tmp_path / "run"))
    damaged = path / "analysis" / "infer~train" / "sequences.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    frames = moediag.open_run(path).frames
    assert len(frames["agreement_by_layer"])
    with pytest.raises(CorruptRunError, match=r"sequences\.parquet"):
        _ = frames["sequences"]


def test_a_frame_may_be_changed_without_changing_the_next(moe: moediag.Run) -> None:
    frames = moe.frames
    changed = frames["logp_metrics"]
    changed["value"] = 0.0
    assert frames["logp_metrics"]["value"].any()


def test_what_is_not_there_is_one_line_that_lists_what_is(moe: moediag.Run, analysed: Path) -> None:
    dense = moediag.open_run(analysed / "dense")
    cases = (
        (lambda: moe.frames["logp_metric"], "has no frame logp_metric of infer~train; it has agreement_by_layer"),
        (lambda: moe.frames_of("infer", "train-fp32"), "has no arm train-fp32"),
        (lambda: moe.plot("figure_1"), "no figure figure_1; there are agreement_by_depth, expert_swaps"),
        (lambda: dense.plot("margins"), "figure margins cannot be drawn of dense: there is no routing to compare"),
    )
    for show, words in cases:
        with pytest.raises(MoediagError) as found:
            show()
        assert words in str(found.value)
        assert "\n" not in str(found.value)
    with pytest.raises(KeyError):
        _ = moe.frames["logp_metric"]
    assert moe.frames.get("logp_metric") is None
    with pytest.raises(IncompleteRunError, match="pair other~train has not been analysed"):
        Frames(moe, "other~train")


def test_ipython_shows_the_one_line_of_an_error(analysed: Path) -> None:
    """Bug: in a notebook an error of one line came with a page of traceback."""
    from IPython.core.interactiveshell import InteractiveShell

    shell, printed = InteractiveShell(), io.StringIO()
    with redirect_stdout(printed):
        shell.run_cell(f"import moediag\nmoediag.open_run({str(analysed)!r})")
    lines = [line for line in printed.getvalue().splitlines() if line.strip()]
    assert lines == [
        f"RunError: {analysed} is not a moediag run directory (no run.json); make one with: moediag profile"
    ]


def test_metrics_hold_values_intervals_and_both_yardsticks(moe: moediag.Run) -> None:
    metrics = moe.metrics
    mean = metrics.loc["abs_logp_diff.mean"]
    assert mean["value"] == moe.summary["pairs"]["infer~train"]["logp"]["abs_logp_diff"]["mean"]
    assert mean["ci_low"] < mean["value"] < mean["ci_high"]
    assert np.isnan(metrics[["floor", "ratio", "rounding"]].to_numpy(float)).all()  # none was measured


def test_figures_are_drawn_of_one_run_and_of_several(moe: moediag.Run, analysed: Path) -> None:
    both = moediag.compare(moe, analysed / "dense")
    for what in (moe, both):
        figure = what.plot("figure1")
        assert isinstance(figure, Figure)
        assert "moe: mean" in " ".join(text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text")))
    assert "agreement_by_depth" in both.figures
    assert "agreement_by_depth" not in both.runs["dense"].figures


def test_a_comparison_shows_both_runs_side_by_side(moe: moediag.Run, analysed: Path) -> None:
    both = moediag.compare(moe, analysed / "dense")
    assert list(both.runs) == list(both.summary) == list(both.frames) == ["moe", "dense"]
    assert both.metrics.loc["abs_logp_diff.mean", ("moe", "value")] == moe.metrics.loc["abs_logp_diff.mean", "value"]
    assert "body and tail" in both.headlines
    assert both.headlines["body and tail"] in " ".join(repr(both).split())
    assert "<table" in both._repr_html_()
    n_tokens = moe.summary["pairs"]["infer~train"]["n_tokens"]
    assert f"{n_tokens:,}" in both._repr_html_()  # bug: counts were shown as 1.94e+04
    with pytest.raises(RunError, match="two or more runs, each once"):
        moediag.compare(moe, moe)


def test_a_comparison_is_written_as_the_command_writes_it(
    analysed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moediag.results import compare

    monkeypatch.setattr(compare, "draw_comparison_figures", lambda *_, **__: [])
    page = moediag.compare(analysed / "moe", analysed / "dense").write(tmp_path / "both")
    assert page.read_text().startswith("# ")


def metrics_frame(p50: float, p99: float, half_width: float) -> pd.DataFrame:
    names = ["abs_logp_diff.p50", "abs_logp_diff.mean", "abs_logp_diff.p99"]
    values = np.array([p50, (p50 + p99) / 2, p99])
    return pd.DataFrame(
        {"metric": names, "value": values, "ci_low": values - half_width, "ci_high": values + half_width,
         "n_tokens": 1000, "n_prompts": 16}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("p50", "p99", "words"),
    [
        (0.01, 0.1, "Neither the bodies nor the tails"),
        (0.02, 0.3, "Body and tail are both wider"),
        (0.01, 0.3, "The tail is wider"),
        (0.02, 0.1, "The body is wider"),
    ],
)
def test_a_quantile_is_wider_only_where_intervals_do_not_touch(p50: float, p99: float, words: str) -> None:
    moe, dense = metrics_frame(p50, p99, 0.004), metrics_frame(0.01, 0.1, 0.004)
    assert body_and_tail_words(moe, dense).startswith(words)


def test_headlines_are_plain_sentences(moe: moediag.Run) -> None:
    headlines = moe.headlines
    assert {"verdict", "mismatch", "layers", "worst tokens"} <= set(headlines)
    for words in headlines.values():
        assert "**" not in words
        assert "\\" not in words
        assert not words.endswith(" ")
    for topic in headlines:
        assert topic in repr(headlines)
        assert topic in headlines._repr_html_()


def test_plain_text_takes_only_what_is_markup() -> None:
    assert plain_text(Markdown(r"**2 \* 3** `a_b` \<x\> &amp; 5 %")) == "2 * 3 a_b <x> & 5 %"
    assert plain_text("**kept** as it is") == "**kept** as it is"


def test_worst_tokens_come_with_text_where_a_tokenizer_is_at_hand(moe: moediag.Run) -> None:
    worst = moe.worst_tokens()
    assert len(worst) == len(moe.frames["worst_tokens"])
    ids = [f"id {token_id}" for token_id in worst["token_id"]]  # the checkpoint of this run is not on disk
    assert worst["text"].tolist() == ids


def test_a_simulation_takes_a_run_a_path_and_a_frame_alike(moe: moediag.Run, tmp_path: Path) -> None:
    tokens = moe.frames["tokens"]
    path = tmp_path / "tokens.parquet"
    tokens.to_parquet(path)
    wanted = weights("icepop", tokens["logp_train"], tokens["logp_infer"], tokens["seq_id"], alpha=0.99, beta=1.02)
    for source in (moe, moe.path, str(moe.path), PlainRun(moe.path, moe.record, 2), path, tokens):
        simulation = moediag.simulate(source, "icepop:alpha=0.99,beta=1.02", sweep=False)
        found = simulation.weights
        assert found["icepop:alpha=0.99,beta=1.02"].to_numpy().tobytes() == np.asarray(wanted).tobytes()
        assert (found["none"] == 1).all()
        assert found["position"].tolist() == tokens["position"].tolist()
    assert 0 < simulation.statistics.loc["icepop:alpha=0.99,beta=1.02", "masked_share"] < 1


def test_a_simulation_shows_itself_and_draws(moe: moediag.Run) -> None:
    simulation = moediag.simulate(moe, "icepop:alpha=0.99,beta=1.02", presets=["glm-5"])
    assert simulation.summary["n_tokens"] == len(moe.frames["tokens"])
    assert {"correction_statistics", "sweep_by_band", "recommended_band"} <= set(simulation.frames)
    assert "moediag simulation of moe" in repr(simulation)
    assert "masked_share" in simulation._repr_html_()
    assert isinstance(simulation.plot("ratio_bands"), Figure)
    with pytest.raises(UnknownNameError, match="no figure nonsense of this simulation; it fills masked_shares"):
        simulation.plot("nonsense")
    with pytest.raises(MoediagError):
        moediag.simulate(moe, "no_such_method")


def test_a_simulation_of_a_pair_takes_its_arms(moe: moediag.Run) -> None:
    there, back = (moediag.simulate(moe, "tis_token", pair=pair, sweep=False).weights
                   for pair in (("train", "infer"), ("infer", "train")))  # fmt: skip
    pd.testing.assert_frame_equal(there, back)


def test_a_series_shows_its_steps_and_opens_its_runs(tmp_path: Path) -> None:
    made = create_series(tmp_path / "series", "0.1.0", "a test")
    series = moediag.open_series(made.path)
    assert "no run" in repr(series)
    assert list(series.runs()) == []
