"""Reports: the page says what the summary and the frames say, and user text stays text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from synthetic import make_block, make_pair
from synthetic_runs import make_run

from moediag.analysis.metrics import METRICS
from moediag.cli.table import show_table
from moediag.errors import MoediagError
from moediag.figures import draw_run_figures
from moediag.numbers import sig
from moediag.report import comparison_page, markdown_page, run_page
from moediag.report.blocks import table
from moediag.report.text import Markdown, code, plain
from moediag.results.pair_analysis import analyze_pair
from moediag.results.pair_summary import pair_summary

FIGURES = [
    Path("run/figures") / f"{name}.{kind}"
    for name in ("figure1", "agreement_by_depth", "margins", "position_drift")
    for kind in ("png", "svg")
]
HOSTILE = "x|<img src=x onerror=1>`*b*` [l](http://e.org) ![p](http://e.org/p.png)\n# h\n@user $m$"


def run_report(*arguments, **options):
    return markdown_page(run_page(*arguments, **options))


def comparison_report(*arguments, **options):
    return markdown_page(comparison_page(*arguments, **options))


@pytest.fixture(scope="module")
def moe():
    return make_run(n_tokens=2048)


@pytest.fixture(scope="module")
def dense():
    return make_run(n_tokens=2048, n_layers=0, seed=1)


@pytest.fixture(scope="module")
def page(moe):
    return run_report(moe.summary(), moe, FIGURES)


def html(text):
    return MarkdownIt("commonmark", {"html": False}).enable("table").render(text)


def rows(text, first):
    """Cells of the table rows that begin with ``first``."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]


def screen_of(text):
    """What stands before the first folded part."""
    return text.split("<details>")[0]


def section_of(text, title):
    """A folded section."""
    return text.split(f"<details><summary>{title}</summary>")[1].split("</details>")[0]


def test_first_screen_is_verdict_headlines_and_a_picture(page):
    screen = screen_of(page)
    assert screen.startswith("# Routing mismatch: tiny-moe\n\n**Verdict: cannot tell**: neither floor nor rounding")
    assert "**Over 2,048 response tokens of 64 prompts" in screen
    assert "No A/A floor was measured in this run" in screen
    numbers = [line for line in screen.splitlines() if line.startswith("| ")][1:]
    assert len(numbers) == sum(metric.is_headline for metric in METRICS.values()) == 7
    for line in numbers:
        name, value, interval, floor, rounding, unit, n, end = (cell.strip() for cell in line.split("|")[1:-1])
        assert re.search(r"\d", value), name
        assert " to " in interval
        assert {floor, rounding} == {"–" if name == "mismatch that flips explain" else "not measured"}
        assert unit
        assert re.match(r"[\d,]+ ", n)
        assert end == "lower is better"
    assert "](figures/figure1.png)" in screen


def test_every_metric_of_the_contract_is_shown_with_the_frames_value(page, moe):
    metrics = moe["logp_metrics"].set_index("metric")["value"]
    for words, metric in (
        ("abs logp diff, mean", "abs_logp_diff.mean"),
        ("abs logp diff, p99", "abs_logp_diff.p99"),
        ("KL(infer‖train), k3", "kl_infer_train_k3"),
        ("mean ratio train / infer", "mean_ratio"),
    ):
        shown = float(rows(page, words)[0][1].replace("−", "-"))
        assert shown == pytest.approx(metrics[metric], rel=0.01)
    assert "F(2)" in page
    assert "(no honest interval exists for a maximum)" in rows(page, "abs logp diff, max")[0][2]
    assert "logp_diff = logp_train − logp_infer" in page


def test_sections_of_a_moe_run(page, moe):
    for words in (
        "<summary>Expert agreement by layer<", "<summary>Near ties: margins and flips<", "<summary>The tail<",
        "<summary>Drift by position and by length<", "<summary>IcePop mask<",
        "<summary>Noise floors and rounding scale<",
        "<summary>What these numbers mean<", "## What these numbers cannot show",
        "<summary>Provenance, and how to make this page again<",
        "That training will be stable", "not thresholds", "moediag report RUN",
        *moe.summary()["provenance"]["captures"].values(), "arms.train.versions.scripted",
    ):  # fmt: skip
        assert words in page
    layers = section_of(page, "Expert agreement by layer").split("| layer (decoder) | same set")[1].split("\n\n")[0]
    assert len(re.findall(r"^\| \d+ \(\d+\) \|", layers, re.MULTILINE)) == 6
    tie = rows(page, "exactly 0 (tie)")[0]
    pooled = moe["margin_curve"].query("space == 'choice' and layer == -1 and bin_high == 0").iloc[0]
    assert tie[-2:] == [f"{pooled['n_flipped']:,}", f"{pooled['n_choices']:,}"]
    flipped, kept = moe["margin_quantiles"].query("space == 'choice'").set_index("group")["p50"][["flipped", "kept"]]
    assert (
        f"median margin of flipped choices is {sig(flipped)}, of kept ones {sig(kept)} ({kept / flipped:.0f}×)" in page
    )


def test_metrics_come_from_the_summary_when_the_frame_is_missing(moe):
    text = run_report(moe.summary(), {}, [])
    with_frame = rows(run_report(moe.summary(), moe, []), "abs logp diff, mean")[0]
    assert rows(text, "abs logp diff, mean")[0] == with_frame
    assert "![" not in text


def test_dense_run_says_so_and_has_no_routing_section(dense):
    text = run_report(dense.summary(path="models/tiny-dense"), dense, FIGURES)
    assert "The model is dense" in text
    assert "This run is **dense**" in text
    assert "Near ties" not in text
    assert "flip rate: expert set differs" not in text
    assert len([line for line in screen_of(text).splitlines() if line.startswith("| ")]) == 1 + 4


def test_self_comparison_is_bit_exact_and_gives_no_ratio():
    frames = make_run(n_tokens=512, scale=0)
    text = run_report(frames.summary(), frames, [])
    assert "**Bit-exact: over 512 response tokens" in text
    assert "No expert set differs in any layer." in text


def test_mean_ratio_off_one_puts_semantics_first(moe):
    summary = moe.summary()
    summary["pairs"]["infer~train"]["logp"] |= {"mean_ratio": 1.04, "mean_ratio_ci": [1.03, 1.05]}
    assert "check the semantics first" in run_report(summary, moe, [])


def test_slope_stands_under_the_drift_table_with_its_interval(moe):
    summary = moe.summary()
    summary["pairs"]["infer~train"]["position"] = {
        "slope_per_1k_tokens": -0.008, "slope_per_1k_tokens_ci": [-0.0173, 0.0011], "n_tokens": 2048, "n_sequences": 64
    }  # fmt: skip
    text = run_report(summary, moe, [])
    assert "−0.00800 nat per 1,000 tokens (95 %: −0.0173 to 0.00110; 2,048 tokens of 64 sequences). Late bins" in text


def test_real_analysis_of_a_pair_makes_a_whole_page(tmp_path):
    """The seam: what analyze_pair and pair_summary give is what figures and report read."""
    block = make_block(n_prompts=10, samples=2, length=12)
    analysis = analyze_pair(make_pair(block))
    summary = {**make_run(n_tokens=8, n_prompts=2).summary(), "pairs": {"infer~train": pair_summary(analysis)}}
    text = run_report(summary, analysis.frames(), draw_run_figures(analysis.frames(), tmp_path / "figures", "moe"))
    assert f"Over {analysis.n_tokens:,} response tokens of 10 prompts" in text
    assert "](figures/margins.png)" in text
    assert "`icepop_0.5_5.0`" in text


def test_truncated_sampling_is_said_beside_the_estimators(moe):
    summary = moe.summary()
    assert "not unbiased here" not in run_report(summary, moe, [])
    summary["sampling"]["top_p"] = 0.9
    assert "Sampled with top\\_p 0.9: k1 and k3 are not unbiased here" in run_report(summary, moe, [])


def test_the_good_end_is_the_frames():
    """The report kept a list of its own of which end is good, beside the frame's column."""
    analysis = analyze_pair(make_pair(make_block(n_prompts=4, samples=1, length=12)))
    summary = {**make_run(n_tokens=8, n_prompts=2).summary(), "pairs": {"infer~train": pair_summary(analysis)}}
    text = run_report(summary, analysis.frames(), [])
    for _, row in analysis.logp_metrics.iterrows():
        if METRICS[row["metric"]].section:
            shown = rows(text, plain(METRICS[row["metric"]].label))
            assert {cells[-1] for cells in shown} == {row["direction"]}, row["metric"]


def test_given_completions_are_forced_text_and_not_asked_for_a_ratio_of_one(moe):
    """Completions given by the user were judged like sampled ones: "check the semantics first", and k3 called a KL."""
    summary = moe.summary()
    summary["sampling"]["given_completions"] = True
    summary["pairs"]["infer~train"]["logp"] |= {"mean_ratio": 1.04, "mean_ratio_ci": [1.03, 1.05]}
    text = run_report(summary, moe, [])
    assert "check the semantics first" not in text
    assert "The mean ratio is 1.0400 (1.0300 to 1.0500); it need not be 1 here (forced text)." in text
    assert len(rows(text, "k3 statistic (forced text: no KL)")) == 2
    assert "KL(infer‖train), k3" not in text
    assert "The completions were given, not sampled by infer" in text


def test_a_mean_that_hangs_on_one_prompt_says_so_beside_its_interval(moe, capsys):
    """Bug: where one prompt of thirty carries k3, intervals held it in six samples of ten, and nothing said so."""
    summary = moe.summary()
    summary["pairs"]["infer~train"]["logp"]["kl_infer_train_k3_largest_prompt_share"] = 0.414
    text = run_report(summary, moe, [])
    assert all(row[2].endswith("(one prompt carries 41.40 %)") for row in rows(text, "KL(infer‖train), k3"))
    assert len(rows(text, "KL(infer‖train), k3")) == 2
    assert not any("carries" in row[2] for row in rows(text, "abs logp diff, mean"))
    show_table({"moe": moe.summary()}, [Path("moe")])
    assert "carries" not in capsys.readouterr().out
    show_table({"moe": summary}, [Path("moe")])
    assert "moe: KL(infer‖train), k3: one prompt carries 41.40 % of it" in capsys.readouterr().out


@pytest.mark.parametrize("bent", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}])
def test_bent_sampling_gives_no_kl_and_no_verdict_from_the_ratio(moe, bent):
    """Truncated sampling had its caution, and above it a verdict that requested a mean ratio of 1."""
    metrics = moe["logp_metrics"].copy()
    metrics.loc[metrics["metric"] == "mean_ratio", ["value", "ci_low", "ci_high"]] = [1.04, 1.03, 1.05]
    summary = moe.summary()
    summary["sampling"].update(bent)
    text = run_report(summary, {**moe, "logp_metrics": metrics}, [])
    assert "check the semantics first" not in text
    assert rows(text, "k3 statistic (sampling not neutral: no KL)")


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_off_is_neutral_in_both_spellings(moe, off):
    summary = moe.summary()
    summary["sampling"]["top_k"] = off
    assert "not neutral" not in run_report(summary, moe, [])


def replayed(moe, removed=0.41, layers=None, **replay):
    summary = moe.summary()
    plain_pair = summary["pairs"]["infer~train"]
    forced = make_run(n_tokens=2048, scale=0.5).summary()["pairs"]["infer~train"]
    forced["routing"] = {**plain_pair["routing"], "flip_rate": 0.0, "flip_rate_ci": [0.0, 0.056]}
    summary["pairs"]["infer~train-replay"] = forced
    summary["replay_pair"] = "infer~train-replay"
    summary["arms"]["train-replay"] = {"replay": {"source": "infer", **replay}}
    mean = {"share": removed, "share_ci": [removed - 0.05, removed + 0.05], "note": ""}
    p99 = {"share": 0.72, "share_ci": None, "note": "ratio of two quantiles"}
    summary["routing_replay"] = {"removed": {"abs_logp_diff.mean": mean, "abs_logp_diff.p99": p99}, "layers": layers,
                                 "is_broken": removed < -9, "n_tokens": 2048, "n_prompts": 64}  # fmt: skip
    return summary


def test_routing_replay_stands_beside_the_plain_pair(moe):
    """A captured replay arm was analysed and then shown nowhere."""
    summary = replayed(moe)
    text = section_of(run_report(summary, moe, []), "Routing replay and other changes")
    assert "| number | unit | infer\\~train | 95 % | infer\\~train-replay | 95 % | n |" in text
    for words in ("abs logp diff, mean", "abs logp diff, p99", "abs logp diff, max", "KL(infer‖train), k3",
                  "F(2): tokens whose ratio or its inverse is above 2", "flip rate: expert set differs"):  # fmt: skip
        assert len(rows(text, words)[0]) == 7
    mean = rows(text, "abs logp diff, mean")[0]
    for cell, pair in ((mean[2], "infer~train"), (mean[4], "infer~train-replay")):
        assert float(cell) == pytest.approx(summary["pairs"][pair]["logp"]["abs_logp_diff"]["mean"], rel=0.01)
    assert rows(text, "flip rate: expert set differs")[0][4] == "0 %"
    share = (
        "**Forcing infer's experts on train in all MoE layers removes 41 % of the mean abs logp diff, "
        "72 % of its p99.** (of the mean, 95 %: 36.00 % to 46.00 %; 2,048 tokens of 64 prompts"
    )
    assert share in text
    assert "This is no bound of routing's part" in text
    assert "Infer's experts were forced on train in all MoE layers." in text
    assert "<summary>Routing replay" not in run_report(moe.summary(), moe, [])


def test_replay_says_what_was_forced_and_when_it_makes_things_worse(moe):
    text = run_report(replayed(moe, removed=-0.2, layers=[2, 5], first_layer=2, weights=True), moe, [])
    assert "Infer's experts and gate weights were forced on train in MoE layers 2 to 5 only." in text
    assert "A negative share: with infer's experts the arms differ more." in text
    assert "The replay is broken" in run_report(replayed(moe, removed=-4.92e5, weights=True), moe, [])


def test_absent_values_are_a_dash_and_never_zero(moe):
    summary = moe.summary()
    pair = summary["pairs"]["infer~train"]
    pair["logp"] = {"abs_logp_diff": {"mean": None, "p99": None}}
    pair["routing"] = {"flip_rate": None, "flip_rate_ci": None, "any_layer_share": None, "by_layer": []}
    text = run_report(summary, {}, [])
    assert "No token was scored by both arms" in text
    assert rows(text, "abs logp diff, mean")[0][1] == "–"
    blank = moe["logp_metrics"].assign(value=np.nan, ci_low=np.nan, ci_high=np.nan, note="nothing scored")
    assert "– (nothing scored)" in run_report(summary, {"logp_metrics": blank}, [])


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_user_text_is_neutralised_everywhere(moe, dense, kind):
    """A model path, an engine's version, a correction's source and a run's label are data, not markup."""
    summary = moe.summary(path=HOSTILE, architecture=HOSTILE)
    summary["arms"]["infer"]["version"] = HOSTILE
    summary["provenance"][HOSTILE] = HOSTILE
    frames = {**moe, "corrections": moe["corrections"].assign(source=HOSTILE, method=HOSTILE)}
    if kind == "run":
        text = run_report(summary, frames, [])
    else:
        runs = {HOSTILE: summary, "dense": dense.summary()}
        text = comparison_report({"schema_version": 2, "runs": runs, "ratios": {HOSTILE: 1.0}}, {HOSTILE: frames}, [])
    rendered = html(text)
    for live in ("<img", 'href="http', "<em>b</em>", "<h1>h"):
        assert live not in rendered
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(len(re.split(r"(?<!\\)\|", line)), []).append(line)
    assert "onerror" in rendered, "the text itself is still there to be read"
    assert all("x\\|" in line or "x" not in line[:3] for lines in widths.values() for line in lines)


def test_what_the_diagnosis_says_is_not_cut(moe):
    """Bug: the likely cause ended in the middle of a word, and who is to blame after it was lost."""
    where = "; ".join(f"router of decoder layer {i} differs in 1,560 of 1,560 rows" for i in range(12)) + "; the end"
    summary = moe.summary()
    summary["verdict"] = {"word": "different function", "reason": where, "where": where, "evidence": [where]}
    assert run_report(summary, moe, []).count("; the end") >= 3


def test_plain_hides_direction_marks_and_line_breaks():
    assert plain("a\u202eb\nc") == "a b c"
    assert plain("x" * 1000).endswith("…")
    assert code("") == "–"
    assert code("a``b") == "```a``b```"


def test_table_keeps_its_columns_whatever_the_cells_hold():
    text = table(["a", "b"], [["x|y\nz", Markdown("**k**")]])
    assert str(text).splitlines()[-1] == "| x\\|y z | **k** |"
    assert html(str(text)).count("<td") == 2


def test_pictures_are_linked_from_where_the_report_stands(moe):
    assert "](figures/figure1.png)" in run_report(moe.summary(), moe, FIGURES)
    spaced = run_report(moe.summary(), moe, [Path("my run/figures here/figure1.png")])
    assert "](figures%20here/figure1.png)" in spaced


def test_another_schema_or_no_pair_is_a_clear_refusal(moe):
    with pytest.raises(MoediagError, match="schema_version 2, found 3"):
        run_report({**moe.summary(), "schema_version": 3}, moe, [])
    with pytest.raises(MoediagError, match="capture both arms"):
        run_report({**moe.summary(), "pairs": {}}, moe, [])
    with pytest.raises(MoediagError, match="at least one entry under runs"):
        comparison_report({"schema_version": 2, "runs": {}}, {}, [])


def test_comparison_has_runs_as_columns_and_their_ratio(moe, dense):
    summary = {
        "schema_version": 2,
        "runs": {"moe": moe.summary(), "dense": dense.summary(path="m/dense")},
        "ratios": {"abs_logp_diff": {"mean": 1.5}},
    }
    text = comparison_report(summary, {"moe": moe, "dense": dense}, FIGURES)
    assert "| number | unit | moe | dense | moe / dense |" in text
    mean = [f["logp_metrics"].set_index("metric")["value"]["abs_logp_diff.mean"] for f in (moe, dense)]
    cells = next(row for row in rows(text, "abs logp diff, mean") if len(row) == 5)
    assert cells[-1] == f"{mean[0] / mean[1]:.1f}×"
    assert float(cells[2]) == pytest.approx(mean[0], rel=0.01)
    flips = next(row for row in rows(text, "flip rate: expert set differs") if len(row) == 5)
    assert flips[3] == "– (dense)"
    assert "](figures/figure1.png)" in text
    assert "dense is a dense model: it has no routing to compare." in text
    assert "That training will be stable" in text


def test_a_comparison_says_on_the_page_what_makes_its_numbers_hard_to_compare(moe, dense):
    """Sampling cautions and other prompts were said on the terminal, if at all, and not in the comparison's page."""
    runs = {"moe": moe.summary(), "dense": dense.summary()}
    frames = {"moe": moe, "dense": dense}
    fine = comparison_report({"schema_version": 2, "same_prompts": True, "runs": runs}, frames, [])
    assert "Caution" not in fine
    assert "different prompts" not in fine
    runs["moe"]["sampling"]["temperature"] = 0.7
    text = comparison_report({"schema_version": 2, "same_prompts": False, "runs": runs}, frames, [])
    assert "**The runs were made from different prompts**" in text
    assert "**Caution, moe.** Sampled with temperature 0.7" in text
    assert "Caution, dense" not in text
    assert rows(text, "k3 statistic (sampling not neutral in some runs: no KL)")


def test_commands_stand_whole_and_cannot_leave_their_block(moe):
    """Commands were cut at 300 characters, re-spaced, and their backticks changed: not what had been run."""
    command = "moediag report '" + "a  b/" * 100 + "```\n# x'"
    text = run_report(moe.summary(), moe, [], regenerate=(command,))
    assert f"````sh\n{command.replace(chr(10), '?')}\n````" in text
    assert "<h1>x" not in html(text)


def test_the_same_input_gives_the_same_page(moe, page):
    assert run_report(moe.summary(), moe, FIGURES) == page
    assert "\n\n\n" not in page
