"""Where a process's time goes."""

from __future__ import annotations

import time

import pytest

from moediag.run.stages import stage, taken


def test_a_stage_inside_another_counts_for_itself_alone() -> None:
    taken()
    with stage("outer"):
        time.sleep(0.02)
        with stage("inner"):
            time.sleep(0.05)
            between = taken()  # in the middle: what is open is counted so far
        time.sleep(0.02)
    with stage("outer"), pytest.raises(ValueError, match="fails"), stage("inner"):
        raise ValueError("fails")
    after = taken()
    assert set(between) == set(after) == {"outer", "inner"}
    assert between["outer"] >= 0.02
    assert between["inner"] >= 0.05
    assert after["outer"] >= 0.02
    assert after["inner"] < between["inner"]
    assert taken() == {}
