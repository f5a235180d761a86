"""The gate: its language, what it holds against a run, and what a CI job is given."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import make_scripted_run

from moediag.analysis.metrics import METRICS
from moediag.cli.main import main
from moediag.diagnosis.conditions import Comparison, NoFindings, evaluate, nameable, parse
from moediag.diagnosis.gate import Gate, Subject, judge, parse_conditions, worse_by
from moediag.errors import ConditionError, MoediagError, RunError
from moediag.hygiene.findings import finding
from moediag.report.gate_pages import gate_junit, gate_markdown
from moediag.results import analyze_run
from moediag.run.files import read_sealed, write_sealed
from moediag.statistics.intervals import mean_interval


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two analysed runs of 24 prompts that differ by their seed alone, before and after; the tests copy them."""
    folder = tmp_path_factory.mktemp("gate")
    for seed, name in enumerate(("before", "after")):
        analyze_run(make_scripted_run(folder / name, n_prompts=24, shard_size=12, seed=seed))
    return folder


def summary_of(runs: Path, name: str = "after") -> dict[str, Any]:
    return copy.deepcopy(read_sealed(runs / name / "summary.json"))


def held(run: dict[str, Any], *conditions: str, baseline: dict[str, Any] | None = None, **options: Any) -> Gate:
    """The gate of a summary; ``findings``, ``allowed`` and ``max_skipped`` may be given."""
    findings, allowed = options.pop("findings", ()), options.pop("allowed", ())
    parsed = parse_conditions(conditions, allowed, has_baseline=baseline is not None)
    other = None if baseline is None else Subject("before", baseline)
    return judge(Subject("after", run, findings), parsed, other, allowed=allowed, **options)


def main_pair(summary: dict[str, Any]) -> dict[str, Any]:
    pair: dict[str, Any] = summary["pairs"][summary["main_pair"]]
    return pair


@pytest.mark.parametrize(
    ("text", "at", "complaint"),
    [
        ("logp.kl_infer_train_k3 < ", 25, "expected a number, a name or '('"),
        ("logp.kl_infer_train_k3 <<< 3", 24, "expected a number, a name or '('"),
        ("logp.kl_infer_train_k3", 22, "expected < <= > >= == !="),
        ("logp.kl_infer_train_k3 < 1e-3 and no findings", 30, "expected the end"),
        ("logp.kl_infer_train_k3 < 1 $ 2", 27, "expected a number, a name, a word in quotes"),
        ("(logp.mean_ratio - 1 < 3", 21, "expected ')'"),
        ("kl_infer_train_k3 < 3", 0, "nearest: logp.kl_infer_train_k3"),
        ("baseline.logp.men_ratio < 3", 0, "nearest: logp.mean_ratio"),
        ("logp.mean_ratio.floor < 3", 0, "expected low or high"),
        ("logp.mean_ratio < 1e999", 18, "expected a finite number"),
        ("logp.mean_ratio < 3e", 18, "expected a number"),
        ("1 < 2", 0, "expected a name of the run"),
        ("no luck", 3, "expected 'findings' or 'errors' or 'warnings'"),
        ("verdict is fine", 8, "expected 'in' or 'not'"),
        ("verdict in ('same function')", 12, "one of: 'bit-exact', 'same function, rounding only'"),
        ("verdict in 'bit-exact'", 11, "expected '('"),
        ("routing.reorder_rate not significantly worse", 0, "expected a metric with a good end"),
        ("2 * logp.mean_ratio not significantly worse", 0, "expected one metric"),
        ("", 0, "expected a number"),
        ("(" * 400, 50, "levels of parentheses"),
    ],
)
def test_a_malformed_condition_gets_its_position_and_what_was_expected(text: str, at: int, complaint: str) -> None:
    with pytest.raises(ConditionError, match=r"at character \d+, found ") as caught:
        parse(text)
    assert complaint in str(caught.value)
    assert caught.value.at == at
    assert f"character {at + 1}," in str(caught.value)


_WORDS = st.sampled_from(
    ["logp.mean_ratio", "baseline.", "low", "no", "not", "in", "verdict", "findings", "significantly", "worse", "abs",
     "(", ")", "<", "<=", "==", "-", "+", "*", "/", "'bit-exact'", "1e-3", ".5", "rounding_scale", " ", "\n", ",", "1e"]
)  # fmt: skip


@given(st.one_of(st.text(max_size=40), st.lists(_WORDS, max_size=25).map(" ".join), st.lists(_WORDS).map("".join)))
def test_whatever_is_typed_is_a_condition_or_a_moediag_error(text: str) -> None:
    with contextlib.suppress(MoediagError):
        parse(text)


_NUMBERS = st.floats(min_value=1e-3, max_value=1e3).map(lambda x: f"{x:.4g}")
_SUMS = st.recursive(
    st.one_of(_NUMBERS, st.just("rounding_scale")),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(" ".join),
        inner.map("-{}".format),
        inner.map("({})".format),
        inner.map("abs({})".format),
    ),
    max_leaves=12,
)


@given(_SUMS)
def test_arithmetic_is_that_of_python(text: str) -> None:
    """Precedence, association and signs, against Python's own evaluation of the same text."""
    condition = parse(f"rounding_scale < {text}")
    assert isinstance(condition, Comparison)
    try:
        expected = eval(text, {"rounding_scale": 0.25, "abs": abs})  # the oracle; only of texts made above
    except ZeroDivisionError:
        expected = math.nan
    found = evaluate(condition.limit, lambda _: 0.25)
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_every_declared_metric_can_be_named_and_has_a_meaning(runs: Path) -> None:
    """No second list: what conditions may name follows from the declarations."""
    for metric in METRICS.values():
        name = ".".join(metric.path)
        assert isinstance(parse(f"{name}.low <= {name}"), Comparison), name
        assert nameable()[name].value(summary_of(runs)) == metric.value(main_pair(summary_of(runs)))
    assert all(one.unit and one.meaning for one in nameable().values())


def test_numbers_stand_beside_n_interval_limit_and_where_it_comes_from(runs: Path) -> None:
    summary = summary_of(runs)
    mean = main_pair(summary)["logp"]["abs_logp_diff"]["mean"]
    fails, passes = held(
        summary, f"logp.abs_logp_diff.mean < {mean / 2}", f"logp.abs_logp_diff.mean < {mean * 2}"
    ).outcomes[2:]
    assert (fails.is_met, passes.is_met) == (False, True)
    assert fails.line.startswith("FAIL: ")
    for outcome in (fails, passes):
        assert f"{mean:.3g} nat [" in outcome.value
        assert outcome.n == f"n = {main_pair(summary)['n_tokens']:,} tokens of 24 prompts"
        assert outcome.limit.endswith("nat (given)")


def test_the_interval_s_end_decides_where_it_is_named(runs: Path) -> None:
    summary = summary_of(runs)
    low, high = main_pair(summary)["logp"]["abs_logp_diff"]["mean_ci"]
    middle = (low + high) / 2
    point, end = held(
        summary, f"logp.abs_logp_diff.mean < {high * 0.999}", f"logp.abs_logp_diff.mean.high < {middle}"
    ).outcomes[2:]
    assert point.is_met
    assert point.note == "the interval contains the limit"
    assert not end.is_met


def test_a_number_that_was_not_measured_never_passes(runs: Path) -> None:
    """Whatever the comparison: null is no number."""
    summary = summary_of(runs)
    assert summary["floors"] is None
    names = (
        "rounding_scale",
        "logp.abs_logp_diff.mean.floor",
        "logp.abs_logp_diff.max.low",
        "logp.kl_infer_train_exact",
    )
    signs = ("<", "<=", ">", ">=", "==", "!=")
    outcomes = held(summary, *(f"{name} {sign} 1" for name in names for sign in signs)).outcomes[2:]
    assert len(outcomes) == len(names) * len(signs)
    assert not any(outcome.is_met for outcome in outcomes)
    assert all("not measured" in outcome.note or "not known" in outcome.note for outcome in outcomes)
    (divided,) = held(summary, "logp.mean_ratio / (n_tokens - n_tokens) > 0").outcomes[2:]
    assert not divided.is_met
    assert "division by zero" in divided.note


def test_error_findings_fail_every_gate_unless_the_rule_is_allowed(runs: Path) -> None:
    summary = summary_of(runs)
    error = finding("D31-nan-logp", "train", "3 of 10 tokens")
    warning, note = finding("D14-gate-factor", "train", "off"), finding("D06-last-row", "infer", "no row")
    assert held(summary, "no findings", findings=[note]).is_passed
    assert [one.condition for one in held(summary, findings=[error]).failed] == ["no errors"]
    assert held(summary, "no errors", findings=[error]).failed[0].value.count("D31-nan-logp") == 1
    assert held(summary, findings=[error], allowed=["D31-nan-logp"]).is_passed
    assert held(summary, findings=[warning]).is_passed
    assert [one.condition for one in held(summary, "no findings", findings=[warning]).failed] == ["no findings"]
    assert [one.condition for one in held(summary, "no warnings", findings=[warning]).failed] == ["no warnings"]
    with pytest.raises(RunError, match="--allow D31-nan: expected the name of a rule .*nearest: D31-nan-logp"):
        held(summary, allowed=["D31-nan"])


def test_tokens_that_were_not_scored_fail_every_gate_unless_their_share_is_allowed(runs: Path) -> None:
    summary = summary_of(runs)
    pair = main_pair(summary)
    pair["n_unscored"] = pair["n_tokens"]  # half of all
    assert held(summary).failed[0].value == f"50.00 % ({pair['n_unscored']} tokens without a log-probability)"
    assert held(summary, max_skipped=0.5).is_passed
    assert not held(summary, max_skipped=0.49).is_passed
    pair["n_tokens"] = pair["n_unscored"] = 0
    assert not held(summary, max_skipped=1.0).is_passed


def test_the_verdict_s_word_is_one_of_some_or_none_of_them(runs: Path) -> None:
    summary = summary_of(runs)
    word = summary["verdict"]["word"]
    assert held(summary, f"verdict in ('bit-exact', '{word}')", "verdict not in ('different function')").is_passed
    assert len(held(summary, "verdict in ('bit-exact')", f"verdict not in ('{word}')").failed) == 2


def test_a_baseline_is_needed_only_where_it_is_named(runs: Path) -> None:
    summary = summary_of(runs)
    for text in ("not significantly worse", "logp.mean_ratio < 2 * baseline.logp.mean_ratio"):
        with pytest.raises(RunError, match="needs a baseline, found none; give --baseline RUN"):
            held(summary, text)
        assert held(summary, text, baseline=summary).is_passed


def worsened(summary: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same run with a mean that is that many times as large, its interval too."""
    group = main_pair(summary)["logp"]["abs_logp_diff"]
    group["mean"] *= factor
    group["mean_ci"] = [factor * end for end in group["mean_ci"]]
    return summary


def test_significantly_worse_goes_by_the_intervals_not_by_the_bare_difference(runs: Path) -> None:
    before, after = summary_of(runs, "before"), summary_of(runs)
    text, every = "logp.abs_logp_diff.mean not significantly worse", "not significantly worse"
    low, high = main_pair(before)["logp"]["abs_logp_diff"]["mean_ci"]
    a_little = 1 + 0.1 * (high - low) / high  # a difference, far inside the intervals
    assert held(worsened(summary_of(runs, "before"), a_little), text, every, baseline=before).is_passed
    assert held(after, text, every, baseline=before).is_passed  # another seed of the same process
    assert held(worsened(after, 3.0), text, every, baseline=before).failed[0].condition == text
    assert len(held(after, text, every, baseline=before).failed) == 2
    assert "significantly worse" in held(after, text, baseline=before).failed[0].value
    assert held(before, text, every, baseline=after).is_passed  # better is not worse


def test_a_metric_without_an_interval_is_not_called_no_worse(runs: Path) -> None:
    before, after = summary_of(runs, "before"), summary_of(runs)
    main_pair(after)["logp"]["abs_logp_diff"]["mean_ci"] = None
    for text in ("logp.abs_logp_diff.mean not significantly worse", "not significantly worse"):
        (found,) = held(after, text, baseline=before).failed
        assert "cannot be decided" in found.value
    main_pair(before)["logp"]["abs_logp_diff"]["mean_ci"] = None
    (outcome,) = held(after, "not significantly worse", baseline=before).outcomes[2:]
    assert "the baseline has no interval: logp.abs_logp_diff.mean" in outcome.note


def test_two_samples_of_one_process_are_rarely_called_worse_and_a_real_change_is_seen() -> None:
    """400 pairs of means over 24 prompts: false alarms at 2.5 % nominal, and the shift of 4 standard errors found."""
    rng = np.random.default_rng(0)
    prompt_T = np.repeat(np.arange(24), 20)

    def mean(shift: float) -> tuple[float, float, float]:
        level_C = rng.gamma(8.0, 1 / 8, 24) + shift
        found = mean_interval(np.repeat(level_C, 20) * rng.exponential(0.01, 480), prompt_T, "positive")
        return found.value, found.low, found.high

    se = 0.01 * math.sqrt((1 / 8 + 2 / 20) / 24 * 2)
    false = np.mean([worse_by(mean(0), mean(0)) > 0 for _ in range(400)])
    seen = np.mean([worse_by(mean(4 * se / 0.01), mean(0)) > 0 for _ in range(400)])
    assert false <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 400)
    assert seen > 0.85


def test_metrics_that_share_the_level_need_more_than_one_alone() -> None:
    alone = [worse_by((0.3, 0.27, 0.33), (0.25, 0.22, 0.28), n_metrics=n) for n in (1, 2, 6, 40)]
    assert alone == sorted(alone, reverse=True)


def written(gate: Gate, path: Path) -> ElementTree.Element:
    path.write_bytes(gate_junit(gate))
    return ElementTree.parse(path).getroot()


def test_junit_has_a_case_per_condition_whatever_its_text(runs: Path, tmp_path: Path) -> None:
    found = finding("D31-nan-logp", "train", 'a <b> & "c" \x00 \x1b \ufffe')
    gate = held(summary_of(runs), "logp.mean_ratio < -1", "no findings", findings=[found])
    root = written(gate, tmp_path / "gate.xml")
    (suite,) = root
    cases = list(suite)
    assert suite.attrib == {"name": "moediag gate after", "tests": "4", "failures": "3", "errors": "0", "skipped": "0"}
    assert [case.get("name") for case in cases] == [one.condition for one in gate.outcomes]
    assert {case.get("classname") for case in cases} == {"gate.after"}
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    assert failed == ["no errors", "logp.mean_ratio < -1", "no findings"]
    assert 'a <b> & "c" ? ? ?' in str(cases[1].find("failure").get("message"))  # type: ignore[union-attr]


def test_the_summary_for_a_ci_job_is_a_table_then_the_verdict(runs: Path) -> None:
    gate = held(summary_of(runs), "logp.mean_ratio < -1", findings=[finding("D31-nan-logp", "train", "a | b <i>")])
    head, _, *table, _, verdict = gate_markdown(gate).strip().split("\n")
    assert head == "## moediag gate: after: 2 of 3 conditions not met"
    assert len(table) == 2 + len(gate.outcomes)
    assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
    assert "<i>" not in gate_markdown(gate)
    assert verdict.startswith(f"**Verdict: {gate.verdict['word']}**")


def gate_command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main(["gate", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_exit_codes_and_files_of_the_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    files = ("--markdown", tmp_path / "gate.md", "--junit", tmp_path / "gate.xml")
    fine = ("--require", "logp.abs_logp_diff.mean < 10", "--require", "not significantly worse", "--baseline", "before")
    status, out, err = gate_command(capsys, "after", *fine, *files)
    assert (status, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["pass"] * 4 + ["after"]
    status, out, _ = gate_command(capsys, "after", *fine, "--require", "logp.abs_logp_diff.mean < 0", *files)
    assert status == 3
    assert sum(line.startswith("FAIL: ") for line in out.splitlines()) == 1
    assert "**FAIL**" in (tmp_path / "gate.md").read_text()
    assert len(ElementTree.parse(tmp_path / "gate.xml").findall(".//failure")) == 1
    status, out, _ = gate_command(capsys, "after", "--require", "logp.abs_logp_diff.mean < 0", "--json")
    assert status == 3
    assert [one["is_met"] for one in json.loads(out)["conditions"]] == [True, True, False]
    assert gate_command(capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("after", "--require", "logp.mean_ratio <"), "expected a number"),
        (("after", "--require", "not significantly worse"), "needs a baseline"),
        (("after", "--max-skipped", "2"), "--max-skipped 2: expected a share in [0, 1]"),
        (("after", "--allow", "D99"), "expected the name of a rule"),
        (("absent",), "absent does not exist"),
        (("unanalysed",), "has not been analysed; run: moediag analyze"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], complaint: str,
) -> None:  # fmt: skip
    shutil.copytree(runs / "after", tmp_path / "after")
    shutil.copytree(runs / "after", tmp_path / "unanalysed")
    (tmp_path / "unanalysed" / "summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    status, out, err = gate_command(capsys, *words, "--junit", "gate.xml")
    assert (status, out) == (1, "")
    assert complaint in err.splitlines()[-1]
    assert not (tmp_path / "gate.xml").exists()


def test_the_caret_stands_under_what_is_wrong(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    text, caret, line = gate_command(capsys, "after", "--require", "logp.mean_ratio < < 3")[2].splitlines()
    assert text[caret.index("^") :] == "< 3"
    assert line.startswith("moediag: ")


def test_a_damaged_capture_fails_the_gate_though_its_numbers_stand(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Findings are those of the files as they are now, not as they were when the run was analysed."""
    run = tmp_path / "after"
    shutil.copytree(runs / "after", run)
    shard = sorted((run / "arms" / "train").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    status, out, _ = gate_command(capsys, run, "--require", "logp.abs_logp_diff.mean < 10")
    assert status == 3
    assert "FAIL: no errors: 1 finding: error: damaged: train" in out
    assert gate_command(capsys, run, "--allow", "damaged")[0] == 0


def test_the_list_names_every_name_with_unit_and_this_run_s_values(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = gate_command(capsys, "--list")
    assert status == 0
    for name, one in nameable().items():
        assert f"{name} " in out
        assert one.meaning in out
    status, out, _ = gate_command(capsys, "--list", runs / "after", "--json")
    names = {one["name"]: one["value"] for one in json.loads(out)["names"]}
    assert names["logp.abs_logp_diff.mean"] == main_pair(summary_of(runs))["logp"]["abs_logp_diff"]["mean"]


def test_no_findings_is_about_levels() -> None:
    assert parse("no findings") == NoFindings("no findings", ("error", "warning"))


def test_an_older_summary_is_refused_with_what_to_do(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "after"
    shutil.copytree(runs / "after", run)
    content = summary_of(runs) | {"schema_version": 1}
    content.pop("sha256", None)
    write_sealed(run / "summary.json", content)
    status, _, err = gate_command(capsys, run)
    assert status == 1
    assert "run: moediag analyze" in err
