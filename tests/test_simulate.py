"""`moediag simulate` as a user calls it: table, run, what is refused, what stands on disk and on the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import run_here
from test_simulate_sources import logged, write

from moediag.cli.main import main
from moediag.corrections import METHODS, PRESETS, choose, weights
from moediag.corrections.presets import presets_of
from moediag.corrections.sources import table_source
from moediag.figures import SIMULATION_FIGURES
from moediag.frames import declared_frames
from moediag.report.simulation_page import STABILITY
from moediag.results.simulation import add_sweep, as_json, simulate, write_simulation
from moediag.run.files import read_sealed, sha256_bytes

BASE = {"seq_id", "position", "prompt_id"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(logged(40), tmp_path / "t.parquet")


def test_a_table_is_only_printed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(table)]) == 0
    out = capsys.readouterr().out
    for words in (
        STABILITY,
        "icepop:alpha=0.5,beta=5",
        "No band is recommended",
        "masked [95 %]",
        "rewards as the table has",
    ):
        assert words in out
    assert [path.name for path in table.parent.iterdir()] == ["t.parquet"]


def test_presets_whose_source_gives_nan_say_so_only_where_a_token_has_such_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """exp(1000) times a mask of 0 is NaN (OpenRLHF pull request 1314, prime-rl pull request 2085); moediag gives the
    token weight 0, and a reader of the framework's loss was not told."""
    frame = logged(40)
    path = write(frame, tmp_path / "t.parquet")
    presets = ["--preset", "openrlhf-icepop", "--preset", "prime-rl-ipo"]
    assert main(["simulate", str(path), *presets]) == 0
    assert "NaN" not in capsys.readouterr().out
    at = np.flatnonzero(frame["is_response"])[3]
    for logp_infer, n in ((-88.0, 0), (-1000.0, 1)):
        far = frame.copy()
        far.loc[at, ["logp_train", "logp_infer"]] = -0.001, logp_infer
        write(far, path)
        assert main(["simulate", str(path), *presets]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("1 token with a ratio beyond float32 (log-ratio above 88.7)" in out) == bool(n)
        assert ("openrlhf-icepop: NaN before its pull request 1314" in out) == bool(n)
        assert ("prime-rl-ipo: NaN where the mask is a factor" in out) == bool(n)
    assert main(["simulate", str(path), "--preset", "tis"]) == 0
    assert "NaN" not in capsys.readouterr().out, "TIS cuts, and does not multiply by a mask"
    found = weights("icepop", [-0.001, -0.001], [-1000.0, -0.001], [0, 0])
    assert np.asarray(found).tolist() == [0.0, 1.0]


def test_every_preset_and_every_method_stands_side_by_side_once() -> None:
    chosen = choose()
    words = list(map(str, chosen.values()))
    assert len(words) == len(set(words))
    assert {preset.name for one in chosen.values() for preset in presets_of(one)} == PRESETS.keys()
    methods = {step.method for one in chosen.values() for step in one.steps}
    assert methods == METHODS.keys()
    assert list(choose(["icepop:beta=2"], ["glm-5", "verl"])) == [
        "none", "icepop:alpha=0.5,beta=2", *(name for name, one in PRESETS.items() if one.group == "verl"),
    ]  # fmt: skip


def test_the_json_says_what_the_python_call_computes(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(table), "--method", "icepop:alpha=0.4,beta=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["correction"]: row for row in found["frames"]["correction_statistics"]}
    assert list(rows) == ["none", "icepop:alpha=0.4,beta=3"]
    frame = logged(40)
    scored = frame[frame["is_response"] & np.isfinite(frame["logp_train"])]
    weight_T = weights("icepop", scored["logp_train"], scored["logp_infer"], scored["seq_id"], alpha=0.4, beta=3.0)
    row = rows["icepop:alpha=0.4,beta=3"]
    assert row["masked_share"] == pytest.approx((weight_T == 0).mean())
    assert row["weight_mean"] == pytest.approx(weight_T.mean())
    assert "sweep_by_band" not in found["frames"]


def test_weights_out_has_a_column_per_correction_asked_for(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = table.with_name("w.parquet")
    arguments = [
        "simulate",
        str(table),
        "--method",
        "tis_token",
        "--preset",
        "slime-seq-mis",
        "--weights-out",
        str(out),
    ]
    assert main(arguments) == 0
    written = pd.read_parquet(out)
    assert set(written.columns) == BASE | {"tis_token:cap=2", "slime-seq-mis"}
    assert f"Wrote {out}" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_without_rewards_dppo_is_left_out_with_a_sentence(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write(logged(40).drop(columns=["reward", "token_id"]), table.with_name("bare.csv"))
    assert main(["simulate", str(bare), "--preset", "dppo", "--method", "icepop"]) == 0
    out = capsys.readouterr().out
    assert "Left out: dppo-tv, dppo-kl" in out
    assert not re.search(r"^dppo", out, re.MULTILINE)


def test_the_synthetic_reward_is_said(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(logged(40).drop(columns="reward"), table.with_name("ids.csv"))
    assert main(["simulate", str(path), "--preset", "dppo"]) == 0
    assert "synthetic: share of response tokens" in " ".join(capsys.readouterr().out.split())


def test_bounds_of_the_sweep_are_taken(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(table), "--method", "none", "--alphas", "0,0.5", "--betas", "2,inf", "--json"]
    assert main(arguments) == 0
    sweep = json.loads(capsys.readouterr().out)["frames"]["sweep_by_band"]
    assert [(row["alpha"], row["beta"]) for row in sweep] == [(0.0, 2.0), (0.0, "inf"), (0.5, 2.0), (0.5, "inf")]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "icepop:gamma=1"], 1, "icepop has alpha, beta"),
        (["--method", "ices"], 1, "no correction is named 'ices'"),
        (["--method", "tis_token+icepop"], 1, "both carry the ratio"),
        (["--preset", "gpt"], 1, "no preset is named 'gpt'"),
        (["--reward", "score"], 1, "no column score"),
        (["--alphas", "x"], 2, "needs numbers with commas"),
        (["--alphas", "3", "--betas", "2"], 1, "alpha <= beta"),
        (["--pair", "infer~train"], 2, "is no run directory"),
        (["--gradient-audit"], 2, "is no run directory"),
        (["--weights-out", "w.txt"], 1, "weights are written as"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    table: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["simulate", str(table), *arguments]) == code
    err = capsys.readouterr().err
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def test_a_folder_of_something_else_is_left_alone(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table.parent / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    assert main(["simulate", str(table), "--method", "icepop", "-o", str(folder)]) == 1
    assert "expected a new folder or a moediag simulation, found thesis.tex;" in capsys.readouterr().err
    assert main(["simulate", str(table), "--method", "icepop", "-o", str(folder), "--force"]) == 1
    assert [path.read_text() for path in folder.iterdir()] == ["x"]


def test_the_page_names_the_command_that_was_given(table: Path) -> None:
    """Bug: it named what the process was started as, so that a page made by `moediag demo` named the demo."""
    words = ["simulate", str(table), "--method", "icepop:alpha=0.5,beta=5", "-o", str(table.parent / "out put")]
    assert main(words) == 0
    again = f"moediag {shlex.join(words)}"
    assert again in (table.parent / "out put" / "report.md").read_text()


def test_another_request_does_not_replace_a_simulation(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a second simulation into the same folder replaced the first one's page without a word."""
    folder = table.parent / "out"
    first = ["simulate", str(table), "--method", "icepop", "-o", str(folder)]
    assert main(first) == 0
    page = (folder / "report.md").read_text()
    others = (["--method", "tis_token"], ["--method", "icepop", "--sweep"], ["--method", "icepop", "--reward", "none"])
    other_table = write(logged(20), table.with_name("other.parquet"))
    for arguments in (*([str(table), *more] for more in others), [str(other_table), "--method", "icepop"]):
        capsys.readouterr()
        assert main(["simulate", *arguments, "-o", str(folder)]) == 1
        err = " ".join(capsys.readouterr().err.split())
        assert "holds a moediag simulation of another request (t.parquet with icepop:alpha=0.5,beta=5);" in err
        assert "--force" in err
        assert (folder / "report.md").read_text() == page
    assert main(first) == 0  # the same may be made again
    assert main(["simulate", str(table), "--method", "tis_token", "-o", str(folder), "--force"]) == 0
    assert "tis_token:cap=2" in (folder / "report.md").read_text()


def test_sequences_and_prompts_without_a_score_are_not_counted_as_scored(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: 1,200 scored tokens of 60 sequences were said to be of all 100."""
    frame = logged(40).assign(logp_train=lambda f: f["logp_infer"].where(f["prompt_id"] >= 5))
    path = write(frame, table.with_name("some.parquet"))
    assert main(["simulate", str(path), "--method", "icepop"]) == 0
    scored = frame[frame["is_response"] & frame["logp_train"].notna()]
    assert scored["seq_id"].nunique() == 30
    assert f"{len(scored)} scored tokens of 30 sequences, 15 prompts." in capsys.readouterr().out


def test_no_interval_of_a_mean_weight_goes_beyond_what_weights_can_be() -> None:
    """Bug: one token with a ratio of 7,000 gave mean weights of 24 [-25, 7.5e9], and 1.003 [0.997, 812,224] of at
    most 2."""
    frame = logged(60).assign(logp_train=lambda f: f["logp_infer"], prompt_id=lambda f: f["seq_id"])
    frame.loc[frame["is_response"].idxmax(), ["logp_train", "logp_infer"]] = [-0.1, -9.0]
    found = simulate(table_source(frame), choose(["mis_token:cap=inf", "tis_token"]), "t").frames[
        "correction_statistics"
    ]
    known = found[found["weight_mean_ci_low"].notna()]
    assert (known["weight_mean_ci_low"] == 0).any()
    assert (known["weight_mean_ci_low"] >= 0).all()
    assert known.set_index("correction").loc["tis_token:cap=2", "weight_mean_ci_high"] <= 2
    assert (known["weight_mean"] <= known["weight_mean_ci_high"]).all()


def test_everything_on_disk_is_declared_named_and_made_anew(tmp_path: Path) -> None:
    simulation = simulate(table_source(logged(40)), choose(), "t")
    add_sweep(simulation)
    folder = tmp_path / "out"
    write_simulation(simulation, folder, ["moediag simulate t"])
    frames = read_sealed(folder / "summary.json")["frames"]
    assert frames == {path.stem: sha256_bytes(path.read_bytes()) for path in folder.glob("*.parquet")}
    assert {path.name for path in folder.iterdir() if path.suffix != ".parquet"} == {
        "summary.json", "report.md", "report.html", "figures",
    }  # fmt: skip
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg"}
    specs = {spec.name: spec for spec in declared_frames()}
    for name, frame in simulation.frames.items():
        pd.testing.assert_frame_equal(specs[name].validate(pd.read_parquet(folder / f"{name}.parquet")), frame)
    figures = {"masked_shares", "masked_entropy", "ratio_bands", "band_frontier", "mask_overlap"}
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    small = simulate(table_source(logged(40)), choose(["none"]), "t")
    write_simulation(small, folder, [])  # what the first one left does not stay
    assert not (folder / "sweep_by_band.parquet").exists()
    assert not (folder / "figures" / "band_frontier.png").exists()


def test_corrections_that_mask_nothing_share_a_row_of_the_figure() -> None:
    """Bug: 25 of 44 rows said "masks none"."""
    rows = simulate(table_source(logged(40)), choose(), "t").frames["correction_statistics"]
    is_none = rows["masked_share"] == 0
    ax = SIMULATION_FIGURES["masked_shares"].plot(rows).axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert 1 < is_none.sum() < len(rows)
    assert labels[0] == f"{is_none.sum()} others"
    assert len(labels) == (~is_none).sum() + 1
    assert sum("mask none" in text.get_text() for text in ax.texts) == 1


def test_both_pages_hold_the_sentences_and_the_limits(tmp_path: Path) -> None:
    frame = logged(40).assign(seq_id=lambda f: [f"<script>{i}" for i in f["seq_id"]])
    simulation = simulate(table_source(frame), choose(), "<b>mine</b>")
    add_sweep(simulation)
    write_simulation(simulation, tmp_path / "out", ["moediag simulate t"])
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        for words in (STABILITY, "No band is recommended. The tokens cannot tell", "moediag simulate t"):
            assert words in text, (name, words)
        assert "<b>mine" not in text
    assert "…" not in (tmp_path / "out" / "report.md").read_text()  # no sentence is cut


def test_json_holds_no_nan() -> None:
    content = as_json(simulate(table_source(logged(3)), choose(), "t"))
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("n_sequences", [1, 2])
def test_few_and_equal_tokens_make_a_page(tmp_path: Path, n_sequences: int) -> None:
    frame = logged(n_sequences).assign(logp_train=lambda f: f["logp_infer"])
    simulation = simulate(table_source(frame), choose(), "t")
    add_sweep(simulation)
    write_simulation(simulation, tmp_path / "out", [])
    row: Any = simulation.frames["correction_statistics"].set_index("correction").loc["icepop:alpha=0.5,beta=5"]
    assert row["masked_share"] == 0
    assert np.isnan(row["entropy_masked"])


@pytest.mark.engines
def test_a_run_and_its_own_token_table_agree_and_the_run_stays_valid(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "moe"
    shutil.copytree(demo / "moe", run)  # other tests read the demo, too
    done = run_here("simulate", run, "-o", tmp_path / "run", "--weights-out", tmp_path / "run.csv", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = run / "analysis" / "infer~train" / "tokens.parquet"
    other = run_here("simulate", tokens, "--weights-out", tmp_path / "table.csv", "--json")
    assert other.returncode == 0, other.stderr[-2000:]
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "table.csv").read_bytes()
    of_run, of_table = (json.loads(text)["frames"] for text in (done.stdout, other.stdout))
    for name in ("correction_statistics", "overlap", "sweep_by_band"):
        assert of_run[name] == of_table[name]
    assert of_run["recommended_band"][0]["floor_k3"] is not None
    assert of_table["recommended_band"][0]["floor_k3"] is None
    # every request has its own folder in the run: none replaces another
    for arguments in ([], ["--method", "icepop"], ["--method", "tis_token"], ["--method", "icepop"]):
        assert run_here("simulate", run, *arguments).returncode == 0
    pages = sorted(path.parent.name for path in (run / "simulate").glob("*/report.html"))
    assert len(pages) == 3
    assert pages[0] == "infer~train"
    assert all(name.startswith("infer~train-") for name in pages[1:])
    validated = run_here("validate", run)
    assert validated.returncode == 0, validated.stdout
