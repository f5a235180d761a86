"""Logged tokens of a table against the rules of ``validate``: faults named before the numbers, healthy logs quiet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moediag.cli.main import main
from moediag.hygiene.findings import Finding
from moediag.hygiene.logged import check_steps, check_tokens
from moediag.hygiene.logps import FAR, OtherSequence
from moediag.hygiene.rows import Rows, Shape
from moediag.run.capture import Capture, TokenRows

Streams = tuple[np.ndarray, np.ndarray]
"""(S, N) log-probabilities of (train, infer)."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sampled(
    seed: int, shape: tuple[int, int] = (32, 60), noise: float = 0.05, temperature: float = 1.0, top_p: float = 1.0
) -> Streams:
    """Tokens that infer samples from what it scores, and train's view of them.

    Args:
        noise: of train's logits [nat]; temperature: of train's; top_p: infer samples and scores its nucleus.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, 100)) * rng.gamma(2, 2, (*shape, 1))
    infer = log_softmax(logits)
    train = log_softmax((logits + noise * rng.normal(size=logits.shape)) / temperature)
    if top_p < 1:
        ranked = -np.sort(-np.exp(infer), axis=-1)
        n_kept = (ranked.cumsum(axis=-1) - ranked < top_p).sum(axis=-1, keepdims=True)
        rank = np.argsort(np.argsort(-infer, axis=-1), axis=-1)
        infer = log_softmax(np.where(rank < n_kept, infer, -np.inf))
    token = (infer + rng.gumbel(size=infer.shape)).argmax(axis=-1)[..., None]
    train_SN, infer_SN = (np.take_along_axis(side, token, axis=-1)[..., 0] for side in (train, infer))
    return train_SN, infer_SN


def shifted(train: np.ndarray, infer: np.ndarray) -> Streams:
    return np.concatenate([train[:, :1], train[:, :-1]], axis=1), infer


def other_sequences(train: np.ndarray, infer: np.ndarray) -> Streams:
    return np.roll(train, 1, axis=0), infer


def one_other_sequence(train: np.ndarray, infer: np.ndarray) -> Streams:
    changed = train.copy()
    changed[3] = train[7]
    return changed, infer


def scaled(train: np.ndarray, infer: np.ndarray) -> Streams:
    return train / 0.7, infer


def zero_tail(train: np.ndarray, infer: np.ndarray) -> Streams:
    changed = infer.copy()
    changed[:, -infer.shape[1] // 12 :] = 0.0
    return train, changed


def copied(train: np.ndarray, infer: np.ndarray) -> Streams:
    return infer, infer


def impossible(train: np.ndarray, infer: np.ndarray) -> Streams:
    changed = infer.copy()
    changed[2, 5] = -np.inf
    return train, changed


FAULTS = {
    "D01-token-lag": shifted,
    "D01-other-sequence": other_sequences,
    "D01-other-sequence one": one_other_sequence,
    "D10-temperature": scaled,
    "D31-zero-logp": zero_tail,
    "D31-impossible-logp": impossible,
    "D28-same-bits": copied,
}


def table(train: np.ndarray, infer: np.ndarray) -> pd.DataFrame:
    seq_id, position = np.indices(train.shape)
    columns = {"seq_id": seq_id, "position": position, "logp_train": train, "logp_infer": infer}
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def findings_of(frame: pd.DataFrame, **facts: Any) -> list[Finding]:
    names = ("logp_train", "logp_infer", "seq_id", "position")
    return check_tokens(*(frame[name].to_numpy() for name in names), **facts)


def serious(found: list[Finding]) -> list[str]:
    return [item.rule for item in found if item.level != "note"]


@pytest.mark.parametrize("fault", FAULTS)
def test_simulate_names_what_is_wrong_with_a_table_above_its_numbers(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: log-probabilities off by one, or 8 % exact zeros, gave shares and means with intervals, without a word."""
    path, rule = tmp_path / "log.parquet", fault.split()[0]
    table(*FAULTS[fault](*sampled(0))).to_parquet(path)
    arguments = ["simulate", str(path), "--method", "icepop:alpha=0.5,beta=5"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    level = "warning" if rule == "D28-same-bits" else "error"
    assert out.startswith(
        f"{level}: {rule}: infer~train: " if rule != "D31-impossible-logp" else f"error: {rule}: infer: "
    )
    assert out.index("likely: ") < out.index("correction")
    page = (tmp_path / "out" / "report.md").read_text()
    assert 0 < page.index(rule) < page.index("Every correction on the same tokens")
    sealed = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [item["rule"] for item in sealed["findings"] if item["level"] != "note"] == [rule]
    assert main([*arguments, "--strict"]) == (3 if level == "error" else 0)


def test_a_mean_ratio_that_is_not_1_is_a_warning() -> None:
    """Bug: a mean ratio whose interval excludes 1, the cheapest check of semantics, was not said of a table."""
    found = findings_of(table(*sampled(1, top_p=0.95)))
    assert serious(found) == ["D09-mean-ratio"]
    assert found[0].level == "warning"
    train, infer = sampled(1, top_p=0.95)
    assert f"is {np.exp(train - infer).mean():.4f} ([" in found[0].message


@pytest.mark.parametrize("most", [1, 4, 20])
@pytest.mark.parametrize("seed", range(2))
def test_columns_that_begin_elsewhere_are_named_by_the_lag_of_each_sequence(seed: int, most: int) -> None:
    """Rollout columns begin at the first completion token, the teacher's at the batch's common prompt (TRL pull request
    6191): right where prompts are equally long, and "another sequence's", or a mean ratio of 12, elsewhere."""
    train, infer = sampled(seed)
    prompt, _ = sampled(seed + 100)
    extra = np.random.default_rng(seed).integers(0, most + 1, len(train))
    extra[:4] = 0
    paired = [np.concatenate([p[:k], t[: len(t) - k]]) for t, p, k in zip(train, prompt, extra, strict=True)]
    found = findings_of(table(np.array(paired), infer))
    assert serious(found)[0] == "D01-sequence-lag"
    assert (found[0].n, found[0].n_of) == ((extra > 0).sum(), 32)
    assert [place.seq_id for place in found[0].places] == np.flatnonzero(extra)[:5].tolist()
    lags = np.unique(extra[extra > 0])
    assert found[0].message.endswith(
        "lag +1" if most == 1 else f"{len(lags)} different lags, {lags[0]:+d} to {lags[-1]:+d}"
    )


def test_an_outlier_on_either_side_is_no_lag() -> None:
    """One unlikely token each, three apart, correlates perfectly by values."""
    infer = np.full((8, 60), -1e-3) * np.linspace(1, 1.01, 60)
    train = infer.copy()[:, ::-1].copy()
    infer[:, 20], train[:, 23] = -8.0, -8.0
    assert "D01-sequence-lag" not in serious(findings_of(table(train, infer)))


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.3])
def test_a_softmax_temperature_on_one_side_is_named(temperature: float) -> None:
    assert serious(findings_of(table(*sampled(2, (64, 100), temperature=temperature)))) == ["D10-temperature"]


def test_what_moediag_recomputed_bit_for_bit_is_no_copy() -> None:
    train, infer = sampled(0)
    assert serious(findings_of(table(infer, infer), is_foreign=False)) == []
    assert serious(findings_of(table(infer, infer))) == ["D28-same-bits"]
    nearly = infer.copy()
    nearly[0, 0] = np.nextafter(np.float32(nearly[0, 0]), np.float32(-1))
    assert serious(findings_of(table(nearly, infer))) == []
    assert not np.array_equal(train, infer)


def test_a_logp_above_0_by_rounding_is_neither_an_error_nor_a_zero_of_padding() -> None:
    """Bug: +2e-7 ended the job; set to 0, it must not count with the exact zeros of padding either."""
    train, infer = sampled(0)
    infer[:, -5:], train[:, -5:] = 2e-7, -1.5  # rounding on every row that would be padding if it were 0
    found = findings_of(table(train, infer))
    assert "D31-zero-logp" not in serious(found)
    assert "D31-impossible-logp" not in serious(found)
    (note,) = [item for item in found if item.rule == "D31-rounded-logp"]
    assert (note.level, note.n) == ("note", 5 * len(infer))
    infer[:, -5:] = 2e-4
    assert "D31-impossible-logp" in serious(findings_of(table(train, infer)))


@pytest.mark.parametrize("part", range(4))
def test_honest_logs_are_quiet(part: int) -> None:
    """Sequences few and many, short and long, engines near and far, down to ten short sequences."""
    for seed in range(part * 25, part * 25 + 25):
        rng = np.random.default_rng([seed, 1])
        shape = int(rng.choice([3, 10, 40])), int(rng.choice([4, 24, 60]))
        frame = table(*sampled(seed, shape, noise=float(rng.choice([0.001, 0.02, 0.1, 0.5]))))
        frame["prompt"] = frame["seq_id"] // int(rng.choice([1, 2, 8]))
        found = findings_of(frame, prompt_T=frame["prompt"].to_numpy())
        assert [item.line() for item in found if item.level != "note"] == []


@settings(max_examples=25, deadline=None)
@given(fault=st.sampled_from(sorted(FAULTS)), seed=st.integers(0, 50))
def test_findings_depend_neither_on_the_order_of_rows_nor_on_names(fault: str, seed: int) -> None:
    frame = table(*FAULTS[fault](*sampled(0)))
    whole = findings_of(frame)
    shuffled = frame.sample(frac=1, random_state=seed)
    assert findings_of(shuffled) == whole
    names = np.array([f"s{i:02}" for i in range(32)])
    named = findings_of(shuffled, sequence_names_S=names)
    assert [item.rule for item in named] == [item.rule for item in whole]
    for item, other in zip(named, whole, strict=True):
        assert [place.seq_id for place in item.places] == [names[int(place.seq_id)] for place in other.places]


def test_places_are_those_of_the_table_also_behind_gaps() -> None:
    frame = table(*impossible(*sampled(0)))
    frame.loc[(frame["seq_id"] == 2) & (frame["position"] == 1), "logp_train"] = np.nan  # not scored
    frame["position"] = 10 + 3 * frame["position"]
    (found,) = [item for item in findings_of(frame) if item.level == "error"]
    assert found.places[0][:2] == (2, 10 + 3 * 5)


def test_streams_within_sequences_are_counted_as_a_plain_loop_counts_them() -> None:
    train, infer = one_other_sequence(*sampled(4, (8, 30)))
    infer[1, 3] = np.nan
    n_sequences, length = infer.shape
    tokens = TokenRows(
        *(np.repeat(np.arange(n_sequences), length) for _ in range(2)),
        np.zeros(infer.size, np.int32),
        np.tile(np.arange(length), n_sequences).astype(np.int32),
        np.arange(infer.size),
        np.ones(infer.size, bool),
    )
    sides = [
        Capture(side.ravel().astype(np.float32), np.full(side.size, np.nan, np.float32)) for side in (train, infer)
    ]
    rule = OtherSequence()
    rule.add(*(Rows(tokens, side, Shape(0, 0, 0)) for side in sides))
    for seq, part in enumerate(np.concatenate(rule._parts)):
        pairs = [
            (float(np.float32(x)), float(np.float32(y)))
            for x, y in zip(infer[seq], train[seq], strict=True)
            if x == x and y == y
        ]
        mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        wanted = [
            seq,
            len(pairs),
            sum(abs(y - x) > FAR for x, y in pairs),
            sum((x - mean_x) ** 2 for x, _ in pairs),
            sum((y - mean_y) ** 2 for _, y in pairs),
            sum((x - mean_x) * (y - mean_y) for x, y in pairs),
        ]
        np.testing.assert_allclose(part, wanted, rtol=1e-9)


def by_step(bad: dict[int, str]) -> pd.DataFrame:
    frames = []
    for step in range(6):
        fault = FAULTS[bad[step]] if step in bad else lambda train, infer: (train, infer)
        frames.append(table(*fault(*sampled(step, (16, 60)))).assign(step=step))
    return pd.concat(frames, ignore_index=True)


def test_trend_names_what_is_wrong_with_one_step_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a table of tokens over steps had no check at all: one shifted step read as a jump of the mismatch."""
    path = tmp_path / "steps.parquet"
    by_step({4: "D01-token-lag"}).to_parquet(path)
    assert main(["trend", str(path)]) == 0
    assert capsys.readouterr().out.startswith("error: D01-")
    assert main(["trend", str(path), "--strict", "-o", str(tmp_path / "out")]) == 3
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.index("D01") < page.index("Steps:")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["findings"]
    assert any(item["where"].startswith("step 4 ") and item["rule"] == "D01-token-lag" for item in found)
    assert not any(item["where"].startswith("step 3 ") for item in found)


def test_healthy_steps_are_quiet() -> None:
    frame = by_step({})
    names = ("step", "logp_train", "logp_infer", "seq_id", "position")
    assert serious(check_steps(*(frame[name].to_numpy() for name in names))) == []
