"""What the ladder over every family showed of the tool: replay that cannot be, small weights, engines that die."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
import torch

from moediag.cli.jobs import why_no_replay
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.launch import Child, Job
from moediag.errors import EngineError
from moediag.selftest.families import make_checkpoint


def test_replay_is_left_out_where_the_routers_showed_that_it_cannot_be(tmp_path: Path) -> None:
    """Bug: ``diagnose`` of a healthy PhiMoE ended in an error, since it made an arm that the proof had ruled out."""
    phi = open_checkpoint(str(make_checkpoint("phimoe_without_head_bias", tmp_path / "phi")))
    assert why_no_replay(phi, "auto") == "its router does not take its experts from one TopK over all of them"
    assert why_no_replay(open_checkpoint(str(make_checkpoint("mixtral", tmp_path / "mixtral"))), "auto") == ""


def test_a_router_whose_weights_fall_to_zero_in_float16_is_shown(tmp_path: Path) -> None:
    """Bug: Llama 4's router could not be shown in float16, nor its arms captured: the sigmoid of a chosen logit below
    -17 is 0 there, and ids were read off the weights that are not."""
    fitted = open_checkpoint(str(make_checkpoint("llama4", tmp_path / "llama", torch.float16))).proof("float16")
    assert (fitted.fit.choice, fitted.fit.gate, fitted.fit.replay) == ("", "", "")
    rows = fitted.shown[0].rows
    assert rows.gates_NK is not None
    assert (rows.gates_NK == 0).any()  # else nothing was put to the test
    assert fitted.routing.scales_input


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGSEGV, "killed by SIGSEGV"), (signal.SIGKILL, "out of memory")]
)
def test_an_engine_that_a_signal_ends_is_said_to(tmp_path: Path, number: signal.Signals, words: str) -> None:
    """Bug: of a segmentation fault in vLLM's native code it was said "exit status -11"."""
    with (tmp_path / "log").open("wb") as output:
        assert isinstance(output, io.BufferedWriter)
        child = Child(dict(os.environ), output)
        try:
            os.kill(child._process.pid, number)
            job = Job("vLLM", "no:task", str(tmp_path), {}, {}, str(tmp_path / "log"))
            with pytest.raises(EngineError, match=f"the vLLM engine died \\(.*{words}.*its output is in"):
                child.do(job, print)
        finally:
            child.close()
