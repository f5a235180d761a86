"""Results of a run: what is written can be trusted when it is read, and pages are made only from whole analyses."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import MOEDIAG
from records import arm_of, checkpoint_of, made_otherwise, new_run
from test_run_directory import LAYERS, N_EXPERTS, TOP_K, capture_of, tokens_of

import moediag
from moediag.cli.main import main
from moediag.errors import CorruptRunError, DiskFullError, IncompleteRunError, MoediagError, RunError
from moediag.results import analyze_run, compare, compare_runs, load_frames, load_summary, report, report_run
from moediag.run.capture import Capture
from moediag.run.files import canonical_json, process_tag, sha256_bytes, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.records import Sampling
from moediag.run.writer import RunWriter

LENGTHS = [(2, 6)] * 12  # (prompt, response) tokens; 12 prompts are enough for intervals


def make_run(
    path: Path,
    arms: tuple[str, ...] = ("infer", "train"),
    is_moe: bool = True,
    completions: bool = False,
    sampler: str = "infer",
) -> Run:
    """A complete run in two shards."""
    sink = io.BytesIO()
    pd.DataFrame({"prompt_token_ids": [[1, 2]] * len(LENGTHS)}).to_parquet(sink)
    checkpoint = checkpoint_of(LAYERS if is_moe else (), N_EXPERTS, TOP_K)
    run = new_run(
        path, sink.getvalue(), len(LENGTHS), 8, checkpoint,
        configuration={"max_tokens": 6},
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0),
        sampler=None if completions else sampler,
    )  # fmt: skip
    for shard in run.shards:
        RunWriter(run).write_tokens(shard, tokens_of(shard.first_sequence, LENGTHS[: shard.n_sequences]))
    for arm in arms:
        begin(run, arm)
        for shard in run.shards:
            write(run, arm, shard, is_moe)
    return open_run(path)


def begin(run: Run, arm: str) -> None:
    record = arm_of(run, arm)
    facts = {"loaded": {"device": "none"}, **({"replay": {"source": "infer"}} if "replay" in arm else {})}
    RunWriter(run).begin_arm(made_otherwise(record, facts=facts))


def write(run: Run, arm: str, shard: object, is_moe: bool = True) -> None:
    """infer's capture; train differs by 0.02 nat, train-replay by 0.005 nat and has infer's experts."""
    tokens = run.tokens(shard)
    base = capture_of(tokens, seed=shard.index, last_row=arm != "infer")
    routed = base if arm != "train" else capture_of(tokens, seed=100 + shard.index, last_row=True)
    size = {"infer": 0.0, "infer-production": 0.01, "train": 0.02, "train-replay": 0.005}[arm]
    sign = np.where(np.arange(len(tokens)) % 3 == 0, 1.0, -1.0)
    wobble = 1 + 0.5 * np.sin(tokens.prompt_id_T)
    logp = (base.logp_T - 1 + size * sign * wobble).astype(np.float32)
    is_routed = is_moe and arm != "infer-production"
    entropy = {} if arm == "infer-production" else {"entropy_T": base.entropy_T}
    arrays = {**routed.arrays(), "logp_T": logp} if is_routed else {"logp_T": logp, **entropy}
    RunWriter(run).write_capture(
        arm, shard, tokens, Capture(**arrays), {}, {"gate_weights_TLK": "float32"} if is_routed else {}
    )


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs moe and dense, analysed; tests copy them."""
    folder = tmp_path_factory.mktemp("analysed")
    for name in ("moe", "dense"):
        analyze_run(make_run(folder / name, is_moe=name == "moe"))
    return folder


@pytest.fixture
def folder(analysed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a copy of both runs."""
    shutil.copytree(analysed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds; tests of what is said leave them out."""
    monkeypatch.setattr(report, "draw_run_figures", lambda *_, **__: [])
    monkeypatch.setattr(compare, "draw_comparison_figures", lambda *_, **__: [])


def load(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert "Wrote" not in captured.out
    lines = [line for line in captured.err.splitlines() if not line.endswith(" ...")]  # what a slow machine is doing
    assert len(lines) == 1
    return f"{lines[0]}\n"


def test_analyze_prints_and_returns_exactly_the_sealed_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "moe", "--json"]) == 0
    text = (folder / "moe" / "summary.json").read_text()
    assert capsys.readouterr().out == text
    assert canonical_json(analyze_run(open_run("moe"))) == text
    assert json.loads(text)["sha256"]


def test_the_summary_names_every_frame_by_its_digest(folder: Path) -> None:
    frames = load_summary(open_run("moe"))["provenance"]["frames"]
    files = {path.stem: sha256_bytes(path.read_bytes()) for path in Path("moe/analysis/infer~train").iterdir()}
    assert frames == {"infer~train": files}
    assert load_frames(open_run("moe")).keys() == files.keys()


@pytest.mark.usefixtures("no_figures")
def test_an_edited_mean_is_refused_by_report_and_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """compare took whatever stood in summary.json, so that a changed mean went into a comparison."""
    path = folder / "moe" / "summary.json"
    summary = json.loads(path.read_text())
    summary["pairs"]["infer~train"]["logp"]["abs_logp_diff"]["mean"] *= 2
    path.write_text(canonical_json(summary))
    assert "run: moediag analyze moe" in refused(capsys, "compare", "moe", "dense", "-o", "c")
    assert "run: moediag analyze moe" in refused(capsys, "report", "moe")
    assert not (folder / "c").exists()
    assert main(["analyze", "moe"]) == 0
    assert main(["report", "moe"]) == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"pairs": None},
        {"pairs": {"infer~train": {}}, "provenance": None},
        {"pairs": []},
        {"provenance": {"captures": 3, "frames": {"infer~train": 5}}},
    ],
)
def test_a_summary_of_another_shape_is_refused_with_what_to_do(folder: Path, damage: dict[str, object]) -> None:
    """summary.json without pairs, or with other types inside, ended in a traceback; a seal does not change that."""
    path = folder / "moe" / "summary.json"
    content = {**json.loads(path.read_text()), **damage}
    write_sealed(path, {key: value for key, value in content.items() if value is not None})
    with pytest.raises(CorruptRunError, match="run: moediag analyze moe"):
        report_run(open_run("moe"))


def test_text_that_is_no_summary_is_refused(folder: Path) -> None:
    for text in ("", "[]", "{", '{"schema_version": 1}\n'):
        (folder / "moe" / "summary.json").write_text(text)
        with pytest.raises(CorruptRunError, match="run: moediag analyze moe"):
            load_summary(open_run("moe"))


def test_a_summary_of_a_newer_schema_is_refused_as_such(folder: Path) -> None:
    path = folder / "moe" / "summary.json"
    write_sealed(path, {**json.loads(path.read_text()), "schema_version": 3})
    with pytest.raises(RunError, match="schema_version 3"):
        load_summary(open_run("moe"))


def test_a_missing_frame_is_an_incomplete_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without tokens.parquet the figures raised KeyError; without analysis/ report wrote an empty page."""
    (folder / "moe" / "analysis" / "infer~train" / "tokens.parquet").unlink()
    with pytest.raises(IncompleteRunError, match=r"tokens.parquet is missing; run: moediag analyze moe"):
        report_run(open_run("moe"))
    shutil.rmtree(folder / "moe" / "analysis")
    assert "run: moediag analyze moe" in refused(capsys, "report", "moe")
    assert "run: moediag analyze moe" in refused(capsys, "compare", "moe", "dense", "-o", "c")
    assert not (folder / "moe" / "report.md").exists()


def test_a_changed_frame_is_refused(folder: Path) -> None:
    """A frame could be replaced by any other table of the same columns."""
    path = folder / "moe" / "analysis" / "infer~train" / "logp_metrics.parquet"
    frame = pd.read_parquet(path)
    frame.assign(value=frame["value"] * 2).to_parquet(path, index=False)
    with pytest.raises(CorruptRunError, match=r"logp_metrics.parquet is not the frame .* run: moediag analyze moe"):
        report_run(open_run("moe"))


def test_a_file_in_the_way_of_figures_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUN/figures being a file ended in a traceback."""
    (folder / "moe" / "figures").write_text("mine")
    assert "cannot write" in refused(capsys, "report", "moe")
    assert (folder / "moe" / "figures").read_text() == "mine"


def test_a_file_in_the_way_of_the_comparison_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """compare -o f/x with f a file ended in a traceback."""
    (folder / "f").write_text("mine")
    assert "cannot write" in refused(capsys, "compare", "moe", "dense", "-o", "f/x")
    assert "expected a new folder or a moediag comparison, found a file" in refused(
        capsys, "compare", "moe", "dense", "-o", "f"
    )


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_comparison_is_made_whole_by_the_same_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures came first and the mark of a comparison last, so an interrupted compare was refused ever after."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = ["compare", "moe", "dense", "-o", "c"]
    for step in ("draw_comparison_figures", "comparison_page"):
        with monkeypatch.context() as patch:
            patch.setattr(compare, step, interrupt)
            assert main(command) == 130
        assert not (folder / "c" / "report.md").exists()
    assert main(command) == 0
    assert (folder / "c" / "report.md").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_kill_during_the_very_first_write_does_not_block_the_comparison(folder: Path) -> None:
    half_made = folder / f".c.{process_tag(4194303)}.new"  # above the largest process id
    half_made.mkdir()
    (half_made / ".summary.json.123.tmp").write_text("{")
    assert main(["compare", "moe", "dense", "-o", "c"]) == 0
    assert not half_made.exists()


@pytest.mark.usefixtures("no_figures")
def test_runs_of_one_name_are_called_by_what_differs_in_their_paths_or_as_given(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: compare a/moe b/moe was refused, and nothing but renaming a folder helped."""
    for place in ("a", "b"):
        shutil.copytree("moe", Path(place) / "moe")
    assert main(["compare", "a/moe", "b/moe", "-o", "c"]) == 0
    assert list(load(folder / "c")["runs"]) == ["a", "b"]
    words = ["compare", "a/moe", "b/moe", "--label", "before", "--label", "after: 1", "-o", "d"]
    assert main(words) == 0
    assert set(load(folder / "d")["runs"]) == {"before", "after: 1"}
    page = (folder / "d" / "report.md").read_text()
    assert "moediag compare a/moe b/moe -o d --label before --label 'after: 1'" in page
    assert moediag.compare("a/moe", "b/moe", labels=["x", "y"]).write("e").read_text().count("--label x --label y")
    assert "--label" not in moediag.compare("a/moe", "b/moe").write("f").read_text()
    capsys.readouterr()
    for labels in (["x"], ["x", "x"], ["x", " "], ["x", "y", "z"]):
        given = [word for label in labels for word in ("--label", label)]
        assert "a different name for each of the 2 runs" in refused(
            capsys, "compare", "a/moe", "b/moe", "-o", "g", *given
        )
    assert "two or more runs, each once" in refused(capsys, "compare", "a/moe", "a/../a/moe", "-o", "g")


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["x/moe", "x/dense"], ["moe", "dense"]),
        (["a/moe", "b/moe", "c/dense"], ["a/moe", "b/moe", "c/dense"]),
        (["lr/1/out/moe", "lr/2/out/moe"], ["1", "2"]),
        (["x/moe", "x/moe/moe"], None),  # one inside the other: nothing shorter than their whole paths tells them apart
    ],
)
def test_labels_are_short_and_distinct(paths: list[str], labels: list[str] | None) -> None:
    assert compare.run_labels([Path(path) for path in paths]) == (
        labels or [str(Path(path).resolve()) for path in paths]
    )


def run_without_privileges(*words: object) -> subprocess.CompletedProcess[str]:
    """The command of a user who may not write where permissions say so, which root may."""

    def drop() -> None:
        if os.getuid() == 0:
            PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)

    command = [str(MOEDIAG), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=drop)


@pytest.mark.parametrize("command", ["analyze", "report", "diagnose", "simulate"])
def test_a_read_only_run_is_refused_at_once_with_what_works(folder: Path, command: str) -> None:
    """Bug: analyze computed for a minute and then said to choose another folder, which it has no option for."""
    for path in [*Path("moe").rglob("*"), Path("moe")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        options = {"simulate": ["--method", "icepop"], "analyze": ["--no-text"]}  # what is there already is no work
        done = run_without_privileges(command, "moe", *options.get(command, []))
        elsewhere = run_without_privileges("simulate", "moe", "--method", "icepop", "-o", "elsewhere")
    finally:
        for path in [Path("moe"), *Path("moe").rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    assert done.returncode == 1, done.stderr
    assert "-o" in done.stderr
    assert "analysis: " not in done.stderr.replace("analysis: figures and report", "")
    assert (
        "give -o a folder elsewhere" if command == "simulate" else "cp -r --no-preserve=mode moe COPY"
    ) in done.stderr
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert Path("elsewhere/report.md").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_comparison_of_other_runs_is_replaced_only_with_force_and_only_by_a_whole_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: compare wrote over a comparison of other runs without a word, and before its own pages were made."""

    def fail(*_: object, **__: object) -> None:
        raise DiskFullError("no space")

    shutil.copytree("dense", "other")
    assert main(["compare", "moe", "dense", "-o", "c"]) == 0
    capsys.readouterr()
    before = contents(folder / "c")
    assert "comparison of another request (dense, moe)" in refused(capsys, "compare", "moe", "other", "-o", "c")
    with monkeypatch.context() as patch:
        patch.setattr(compare, "comparison_page", fail)
        assert "no space" in refused(capsys, "compare", "moe", "other", "-o", "c", "--force")
    assert contents(folder / "c") == before
    assert main(["compare", "moe", "dense", "-o", "c"]) == 0  # the same runs: nothing is lost
    assert main(["compare", "moe", "other", "-o", "c", "--force"]) == 0
    assert list(json.loads((folder / "c" / "summary.json").read_text())["runs"]) == ["moe", "other"]
    assert sorted(path.name for path in folder.iterdir()) == ["c", "dense", "moe", "other"]


@pytest.mark.usefixtures("no_figures")
def test_a_comparison_that_cannot_be_read_is_replaced_only_with_force(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c").mkdir()
    write_sealed(folder / "c" / "summary.json", {"kind": compare.COMPARISON})
    before = contents(folder / "c")
    assert "another request (which cannot be read)" in refused(capsys, "compare", "moe", "dense", "-o", "c")
    assert contents(folder / "c") == before
    assert main(["compare", "moe", "dense", "-o", "c", "--force"]) == 0


@pytest.mark.usefixtures("no_figures")
def test_the_current_folder_is_not_replaced_under_the_shell(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c").mkdir()
    monkeypatch.chdir(folder / "c")
    assert "is the current folder" in refused(capsys, "compare", "../moe", "../dense", "-o", ".")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_foreign_content_is_never_touched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c" / "figures").mkdir(parents=True)
    (folder / "c" / "figures" / "figure1.png").write_bytes(b"mine")
    assert "found figures; give -o another folder" in refused(capsys, "compare", "moe", "dense", "-o", "c", "--force")
    assert "found a moediag run; give -o" in refused(capsys, "compare", "moe", "dense", "-o", "moe", "--force")
    assert [p.name for p in (folder / "c").rglob("*")] == ["figures", "figure1.png"]


@pytest.mark.usefixtures("no_figures")
def test_the_comparison_is_sealed_and_printed_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "moe", "dense", "-o", "c", "--json"]) == 0
    text = (folder / "c" / "summary.json").read_text()
    assert capsys.readouterr().out == text
    summary = json.loads(text)
    assert summary["sha256"]
    assert summary["ratios"]["of"] == "moe over dense"
    assert list(compare_runs([Path("moe"), Path("dense")], Path("c"))["runs"]) == ["moe", "dense"]


@pytest.mark.usefixtures("no_figures")
def test_the_commands_on_a_page_make_that_page_again(folder: Path) -> None:
    """The page named folders only, wherever they were, and left --training-window out."""
    (folder / "sub dir").mkdir()
    shutil.move(folder / "moe", folder / "sub dir" / "moe")
    moe = Path("sub dir/moe")
    report_run(open_run(moe), training_window=64)
    compare_runs([moe, Path("dense")], Path("sub dir/c"), training_window=64)
    for page, wanted in (
        (moe / "report.md", ["moediag analyze 'sub dir/moe'", "moediag report 'sub dir/moe' --training-window 64"]),
        (
            Path("sub dir/c/report.md"),
            ["moediag compare 'sub dir/moe' dense -o 'sub dir/c' --training-window 64"],
        ),
    ):
        before = page.read_bytes()
        commands = page.read_text().split("```sh\n")[1].split("\n```")[0].splitlines()
        assert commands == wanted
        assert str(folder) not in page.read_text(), "a relative path stays relative"
        page.unlink()
        for command in commands:
            assert main(shlex.split(command)[1:]) == 0
        assert page.read_bytes() == before


@pytest.mark.usefixtures("no_figures")
def test_a_page_of_a_forced_analysis_says_force(folder: Path) -> None:
    run = open_run("moe")
    shard = run.shards[0]
    capture = run.capture("train", shard)
    logp_T = np.where(np.arange(len(capture.logp_T)) == 3, np.nan, capture.logp_T).astype(np.float32)
    spoilt = Capture(**{**capture.arrays(), "logp_T": logp_T})
    RunWriter(run).write_capture("train", shard, run.tokens(shard), spoilt, {}, {"gate_weights_TLK": "float32"})
    with pytest.raises(RunError, match="1 validation errors"):
        analyze_run(run)
    assert analyze_run(run, force=True)["provenance"]["validation_errors"] == 1
    assert "moediag analyze moe --force\n" in report_run(run).read_text()


@pytest.mark.usefixtures("no_figures")
def test_a_half_captured_further_arm_does_not_block_the_main_pair(folder: Path) -> None:
    """One shard of train-replay made analyze refuse infer~train; once whole, it calls for a new analysis."""
    run = open_run("moe")
    begin(run, "train-replay")
    write(run, "train-replay", run.shards[0])
    summary = analyze_run(run)
    assert list(summary["pairs"]) == ["infer~train"]
    assert "train-replay" not in summary["arms"]
    assert summary["routing_replay"] is None
    assert "## Routing replay" not in report_run(run).read_text()
    write(run, "train-replay", run.shards[1])
    with pytest.raises(IncompleteRunError, match="arms have changed"):
        report_run(run)


@pytest.mark.usefixtures("no_figures")
def test_the_pair_that_counts_is_train_and_the_arm_that_sampled(tmp_path: Path) -> None:
    """Tokens came from the unobserved rollouts, but the headline took infer's log-probabilities for them, k3 of infer's
    forced tokens was called a KL, and rollouts against train were not analysed at all."""
    arms = ("infer-production", "infer", "train", "train-replay")
    run = make_run(tmp_path / "run", arms=arms, sampler="infer-production")
    summary = analyze_run(run)
    pairs = summary["pairs"]
    assert summary["main_pair"] == "infer-production~train"
    means = {name: pair["logp"]["abs_logp_diff"]["mean"] for name, pair in pairs.items()}
    assert means["infer-production~train"] == pytest.approx(means["infer~train"] / 2, rel=0.01)
    assert pairs["infer-production~train"]["routing"] == pairs["infer~train"]["routing"] != None  # noqa: E711
    assert pairs["infer-production~infer"]["routing"] is None, "routes taken from infer say nothing against infer"
    frames = load_frames(run)
    assert frames["tokens"]["n_flipped_layers"].max() > 0
    page = report_run(run).read_text()
    assert "Pair `infer-production~train`" in page
    assert "k3 statistic (forced text: no KL)" in page.split("Routing replay")[1]
    assert "k3 statistic" not in page.split("Routing replay")[0]
    assert "settings that capture forces" in page


@pytest.mark.usefixtures("no_figures")
def test_the_share_that_replay_removes_is_that_of_the_two_means(tmp_path: Path) -> None:
    """Replay was captured and analysed and shown nowhere; the share is one statistic over the same tokens."""
    run = make_run(tmp_path / "run", arms=("infer", "train", "train-replay"))
    summary = analyze_run(run)
    plain, forced = (summary["pairs"][pair]["logp"]["abs_logp_diff"]["mean"] for pair in sorted(summary["pairs"]))
    replay = summary["routing_replay"]
    mean = replay["removed"]["abs_logp_diff.mean"]
    assert mean["share"] == pytest.approx(1 - forced / plain) == pytest.approx(0.75, abs=0.001)
    low, high = mean["share_ci"] or (0.0, 1.0)
    assert low <= mean["share"] <= high
    assert replay["removed"]["abs_logp_diff.p99"]["share"] == pytest.approx(0.75, abs=0.01)
    assert replay["removed"]["kl_infer_train_k3"]["share"] == pytest.approx(1 - 0.25**2, abs=0.01)
    assert (replay["layers"], replay["is_broken"]) == (None, False)
    assert (replay["n_tokens"], replay["n_prompts"]) == (72, 12)
    page = report_run(run).read_text()
    assert (
        "**Forcing infer's experts on train in all MoE layers removes 75 % of the mean abs logp diff, 75 % of" in page
    )
    assert "Infer's experts were forced on train in all MoE layers." in page


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("factor", "is_broken"), [(1.5, False), (9.0, False), (11.0, True)])
def test_a_replay_that_makes_things_ten_times_worse_is_called_broken(
    tmp_path: Path, factor: float, is_broken: bool
) -> None:
    """Bug: "replay removes -4.92e+07 %" was told as a finding about routing."""
    run = make_run(tmp_path / "run", arms=("infer", "train", "train-replay"))
    for shard in run.shards:
        infer, train = (run.capture(arm, shard) for arm in ("infer", "train"))
        logp_T = infer.logp_T + np.float32(factor) * (train.logp_T - infer.logp_T)
        spoilt = Capture(**{**run.capture("train-replay", shard).arrays(), "logp_T": logp_T})
        RunWriter(run).write_capture(
            "train-replay", shard, run.tokens(shard), spoilt, {}, {"gate_weights_TLK": "float32"}
        )
    summary = analyze_run(run)
    replay = summary["routing_replay"]
    assert replay["removed"]["abs_logp_diff.mean"]["share"] == pytest.approx(1 - factor, abs=0.01)
    assert replay["is_broken"] is is_broken
    words = " ".join(summary["verdict"]["evidence"])
    assert ("the replay is broken: with infer's experts forced the mean is 11 times as large" in words) is is_broken


@pytest.mark.usefixtures("no_figures")
def test_replay_of_bit_exact_arms_names_no_share(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", arms=("infer", "train", "train-replay"))
    for shard in run.shards:
        for arm in ("train", "train-replay"):
            same = Capture(**{**run.capture(arm, shard).arrays(), "logp_T": run.capture("infer", shard).logp_T})
            RunWriter(run).write_capture(arm, shard, run.tokens(shard), same, {}, {"gate_weights_TLK": "float32"})
    assert analyze_run(run)["routing_replay"]["removed"]["abs_logp_diff.mean"]["share"] is None
    assert "There is no mismatch whose part could be named." in report_run(run).read_text()


@pytest.mark.usefixtures("no_figures")
def test_given_completions_are_called_forced_text_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """k3 of completions that the user gave was called a KL, on the terminal and on the page."""
    run = make_run(tmp_path / "run", completions=True)
    assert main(["analyze", str(run.path)]) == 0
    assert "k3 statistic (forced text: no KL)" in capsys.readouterr().out
    assert "k3 statistic (forced text: no KL)" in report_run(run).read_text()


@pytest.mark.usefixtures("no_figures")
def test_prompts_cut_to_two_lengths_are_not_the_same_prompts(folder: Path) -> None:
    """One prompts file read with two --limit values passed for the same prompts."""
    manifest = json.loads((folder / "dense" / "run.json").read_text())
    assert compare_runs([Path("moe"), Path("dense")], Path("c"))["same_prompts"]
    write_sealed(folder / "dense" / "run.json", {**manifest, "prompts": {**manifest["prompts"], "n": 5}})
    assert not compare_runs([Path("moe"), Path("dense")], Path("c"))["same_prompts"]
    assert "**The runs were made from different prompts**" in Path("c/report.md").read_text()


def test_compare_wants_two_names(folder: Path) -> None:
    with pytest.raises(MoediagError, match="two or more runs"):
        compare_runs([Path("moe")], Path("c"))
