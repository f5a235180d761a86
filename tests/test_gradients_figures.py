"""The audit's frames and figures from inner products made by hand; what is drawn is what the frame says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from moediag.analysis.gradients import HEADLINE, audit_frames
from moediag.figures import COLUMN_WIDTH, FULL_WIDTH
from moediag.figures.gradients import (
    bias_finding,
    cosine_finding,
    plot_gradient_bias_variance,
    plot_gradient_cosines,
    short_method,
)

METHODS = ("none", "icepop:alpha=0.5,beta=5", "tis_sequence:cap=2")
N_PROMPTS, N_NUMBERS = 16, 5


def inner_products(n_groups: int = 1, exact: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Gradients of 32 sequences in two directions each: no correction, and what the reference adds to it."""
    rng = np.random.default_rng(2)
    n = 2 * N_PROMPTS
    plain, extra = np.full(N_NUMBERS, 2.0) + rng.normal(size=(n, N_NUMBERS)), 0.3 * rng.normal(size=(n, N_NUMBERS))
    extra[:, 0] += 1
    vectors = np.stack([plain, extra], axis=1).reshape(2 * n, N_NUMBERS)
    coefficient_MB = np.tile([[1.0, 0.0], [1.0, 0.9], [1.0, 0.2], [1.0, 1.0]], n)
    prompt_S = np.repeat(np.arange(N_PROMPTS), 2)
    groups = ("lm_head", "routers", "attention")[:n_groups]
    arrays = {
        **{f"gram_{group}_BB": vectors @ vectors.T for group in groups},
        "coefficient_MB": coefficient_MB,
        "prompt_B": np.repeat(prompt_S, 2),
        "n_tokens_S": np.full(n, 10),
        "sequence_weight_S": np.r_[np.ones(n - 1), 3.0],
        "kept_MS": np.full((4, n), 5),
    }
    record: dict[str, Any] = {"methods": [*METHODS, "sequence_is"], "n_tokens": 10 * n, "token_methods": METHODS[:2]}
    if exact:
        update = np.concatenate([plain[:N_PROMPTS, None], (plain + 0.9 * extra)[:N_PROMPTS, None],
                                 (plain + extra)[:N_PROMPTS, None]], axis=1).reshape(-1, N_NUMBERS)  # fmt: skip
        arrays["gram_exact"] = update @ update.T
        record["facts"] = {"n_prefixes": 160, "n_prefix_sequences": N_PROMPTS}
    return record, arrays


def audit(n_groups: int = 1, exact: bool = False) -> pd.DataFrame:
    return audit_frames(*inner_products(n_groups, exact))["gradient_audit"]


def test_frames_hold_every_group_reference_and_method() -> None:
    frames = audit_frames(*inner_products(2, exact=True))
    found, references = frames["gradient_audit"], frames["gradient_references"]
    assert len(found) == 2 * 2 * len(METHODS) + 2
    assert set(found["reference"]) == {"sequence_is", "sequence_is_normalised", "exact"}
    assert found.loc[found["reference"] == "exact", "method"].tolist() == list(METHODS[:2])
    assert (found.loc[found["reference"] != "exact", "kept_share"] == 0.5).all()
    ess = references.loc[references["reference"] == "sequence_is", "ess"]
    assert ess.to_numpy() == pytest.approx((31 + 3) ** 2 / (31 + 9))
    assert references.loc[references["reference"] == "exact", "ess"].isna().all()
    assert set(HEADLINE) <= set(found.columns)


def test_dividing_by_the_mean_weight_changes_lengths_and_no_direction() -> None:
    found = audit().set_index(["reference", "method"])
    mean = 34 / 32
    for method in METHODS:
        raw, normalised = found.loc[("sequence_is", method)], found.loc[("sequence_is_normalised", method)]
        assert normalised["verdict"] == raw["verdict"]
        assert normalised["batch_cosine"] == pytest.approx(raw["batch_cosine"])
        assert normalised["cosine"] == pytest.approx(raw["cosine"])
        assert normalised["gain"] == pytest.approx(raw["gain"] * mean)


def test_the_nearer_correction_is_told_and_drawn_as_nearer() -> None:
    frame = audit(exact=True)
    words = cosine_finding(frame)
    assert "Direction, lm_head against sequence IS: icepop 0.5/5, tis_sequence 2 nearer" in words
    assert "lm_head against one-token, exact: icepop 0.5/5 nearer" in words
    figure = plot_gradient_cosines(frame)
    rows = frame[frame["reference"] == "sequence_is"]
    drawn = figure.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(drawn.get_xdata(orig=False), rows["cosine"])
    noise, batch = figure.axes[0].lines[:2]
    np.testing.assert_allclose(noise.get_xdata(orig=False), rows["noise_cosine"])
    np.testing.assert_allclose(batch.get_xdata(orig=False), rows["batch_cosine"])
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [short_method(m) for m in METHODS]
    assert "one-token, exact: 16 prompts, 16 sequences, 160 prefixes" in words_below(figure)


def test_what_cannot_be_told_is_told_as_such() -> None:
    record, arrays = inner_products()
    rng = np.random.default_rng(4)
    arrays["coefficient_MB"][1] = arrays["coefficient_MB"][0] + 1e-3 * rng.normal(size=arrays["prompt_B"].shape)
    arrays["coefficient_MB"][2] = 0.7 * arrays["coefficient_MB"][0]
    found = audit_frames(record, arrays)["gradient_audit"]
    assert found["verdict"].tolist() == 2 * ["", "cannot tell", "same direction"]
    assert "cannot tell: 1 of 2; same direction: 1 of 2" in cosine_finding(found)


def test_changes_of_the_size_of_rounding_are_called_rounding_where_autograd_made_them() -> None:
    """Changes of 1e-4 in routers, experts and attention were told as changes; the head is not so coarse."""
    record, arrays = inner_products(2)
    n_vectors = len(arrays["prompt_B"])
    arrays["coefficient_MB"][1] = np.tile([1.0, 1e-3], n_vectors // 2)
    found = audit_frames(record, arrays)["gradient_audit"].set_index(["group", "reference", "method"])
    head, routers = (found.loc[(group, "sequence_is", METHODS[1])] for group in ("lm_head", "routers"))
    assert 0 < head["cosine_change"] < 2e-4
    assert (head["verdict"], routers["verdict"]) == ("nearer", "rounding")


def test_without_enough_prompts_there_is_no_interval_and_no_verdict() -> None:
    """A change without an interval was counted among those "not distinguished"."""
    record, arrays = inner_products()
    few = arrays["prompt_B"] < 6
    arrays["gram_lm_head_BB"] = arrays["gram_lm_head_BB"][np.ix_(few, few)]
    arrays["coefficient_MB"], arrays["prompt_B"] = arrays["coefficient_MB"][:, few], arrays["prompt_B"][few]
    arrays["sequence_weight_S"] = arrays["sequence_weight_S"][:12]
    found = audit_frames(record, arrays)["gradient_audit"]
    assert found["verdict"].tolist() == 2 * ["", "no interval", "no interval"]
    assert "no interval: 2 of 2" in cosine_finding(found)


def test_bias_is_held_against_its_floor() -> None:
    frame = audit(3)
    rows = frame[frame["reference"] == "sequence_is"]
    above = rows["batch_relative_bias"] > rows["bias_floor"]
    assert above.any()
    assert bias_finding(frame) == (
        "Difference, lm_head, routers, attention against sequence IS: 0.20 of its length without correction; least "
        "0.020 (icepop 0.5/5); more than chance: none, icepop 0.5/5, tis_sequence 2"
    )
    frame["bias_floor"] = 9.0
    assert bias_finding(frame).endswith("none more than chance")
    figure = plot_gradient_bias_variance(frame)
    assert len(figure.axes) == 6
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == [9.0] * len(METHODS)


def test_a_sequence_weight_that_cuts_nothing_is_called_the_reference_and_not_the_nearest_correction() -> None:
    """Bug: a cap that no sequence reached was praised as nearest, its cosine of 1 and bias of 0 being its own."""
    record, arrays = inner_products()
    arrays["coefficient_MB"][2] = arrays["coefficient_MB"][3]
    frame = audit_frames(record, arrays)["gradient_audit"]
    assert cosine_finding(frame).endswith("sequence IS: icepop 0.5/5 nearer than no correction")
    assert "least 0.020 (icepop 0.5/5); more than chance: none, icepop 0.5/5" in bias_finding(frame)
    for plot in (plot_gradient_cosines, plot_gradient_bias_variance):
        assert "is the reference itself and no finding: tis_sequence 2." in words_below(plot(frame))


def test_the_title_of_the_difference_does_not_gainsay_that_of_the_direction() -> None:
    """Bug: one figure called a correction nearer than none, the other only that its bias was above chance."""
    nearer = cosine_finding(audit())
    left = bias_finding(audit())
    assert "icepop 0.5/5, tis_sequence 2 nearer than no correction" in nearer
    assert "0.20 of its length without correction; least 0.020 (icepop 0.5/5)" in left


def words_below(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("width", [COLUMN_WIDTH, FULL_WIDTH])
def test_figures_are_drawn_at_both_widths_and_of_nothing(width: float) -> None:
    for plot in (plot_gradient_cosines, plot_gradient_bias_variance):
        plot(audit(2), width=width).draw_without_rendering()
        empty = plot(audit(1).iloc[:0], width=width)
        assert empty.get_suptitle() == "No gradient was audited"
