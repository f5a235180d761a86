"""The options that profile and capture share, and what ``--full-vocab`` makes of a plan."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import write_jsonl

from moediag.cli import capture, profile
from moediag.cli import options as o
from moediag.cli.main import main
from moediag.cli.settings import Settings, with_settings
from moediag.engines import plan as plans
from moediag.engines.arms import arm_request
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.plan import Plan, SamplingOptions, make_plan
from moediag.errors import EngineError

CHECKPOINT = Path(__file__).parent / "fixtures" / "ring-tiny"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt_token_ids": list(range(1, 2 + i))} for i in range(5)])


def planned(prompts: Path, full_vocab: int | None, n: int = 2) -> Plan:
    sampling = SamplingOptions(max_tokens=7, n=n)
    return make_plan(open_checkpoint(str(CHECKPOINT)), prompts, sampling, max_model_len=10, full_vocab=full_vocab)


def test_both_commands_have_every_shared_option_with_the_same_default() -> None:
    for command in (profile.command, capture.command):
        parameters = inspect.signature(command).parameters
        assert "settings" not in parameters
        for field in fields(Settings):
            assert parameters[field.name].default == field.default


def test_a_command_gets_the_shared_options_as_one_object() -> None:
    seen = {}

    def command(ckpt: str, settings: Settings, force: bool = False) -> None:
        seen.update(ckpt=ckpt, settings=settings, force=force)

    wrapped = with_settings(command)
    assert list(inspect.signature(wrapped).parameters) == ["ckpt", *(field.name for field in fields(Settings)), "force"]
    defaults = {field.name: field.default for field in fields(Settings)}
    wrapped(ckpt="c", force=True, **{**defaults, "seed": 7})
    assert seen == {"ckpt": "c", "settings": replace(Settings(), seed=7), "force": True}


def test_distributions_are_kept_unasked_exactly_where_they_are_small(
    prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(prompts, 0)
    assert plan.full_vocab == 0
    assert "full_vocab" not in plan.configuration()
    # prompts of 1..5 tokens, 10 at most in all, 7 at most to come, two samples each
    assert plan.vocabulary_bytes(10) == 4 * plan.n_vocabulary * 2 * (7 + 7 + 7 + 6 + 5)
    monkeypatch.setattr(plans, "VOCABULARY_BYTES_BY_DEFAULT", plan.vocabulary_bytes(10))
    assert planned(prompts, None).configuration()["full_vocab"] == 10
    monkeypatch.setattr(plans, "VOCABULARY_BYTES_BY_DEFAULT", plan.vocabulary_bytes(10) - 1)
    assert planned(prompts, None).full_vocab == 0
    assert planned(prompts, 2**31).full_vocab == 10


def test_the_estimate_counts_distributions_of_the_main_pair_only(prompts: Path) -> None:
    without, some = planned(prompts, 0), planned(prompts, 5, n=2)
    chosen = 4 * some.n_vocabulary * (7 + 7 + 7 + 6 + 5)  # every other of ten sequences: each prompt once
    assert some.vocabulary_bytes(5) == chosen
    for arms, n_keeping in ((["infer"], 1), (["infer", "train"], 2), (["infer", "train", "train-repeat"], 2)):
        requests = [arm_request(arm, {}, given=False) for arm in arms]
        assert some.max_bytes(requests, "auto") - without.max_bytes(requests, "auto") == n_keeping * chosen


def test_routers_that_score_in_float32_are_counted_so_whatever_their_family(prompts: Path) -> None:
    """The family's name granitemoe decided about the bytes of router logits."""
    plan = replace(planned(prompts, 0), router_logits="full")
    routing = plan.checkpoint.routing
    assert routing is not None
    requests = [arm_request("infer", {}, given=False)]
    sizes = []
    for found in (False, True):
        checkpoint = replace(plan.checkpoint)
        checkpoint.__dict__["routing"] = replace(routing, family="other", scores_in_float32=found)
        sizes.append(replace(plan, checkpoint=checkpoint).max_bytes(requests, "bfloat16"))
    assert sizes[1] - sizes[0] == 2 * routing.n_layers * routing.n_experts * plan.max_token_rows


def test_whole_distributions_need_hooks(capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path) -> None:
    assert o.parse_full_vocab(None, o.Observer.hooks) is None
    assert o.parse_full_vocab("0", o.Observer.native) == 0
    for text, observer, words in (
        ("all", o.Observer.native, "needs --observer hooks"),
        ("some", o.Observer.hooks, "expected a number of sequences, or all"),
        ("-1", o.Observer.hooks, "expected a number of sequences, or all"),
    ):
        with pytest.raises(EngineError, match=words):
            o.parse_full_vocab(text, observer)
    arguments = [
        "profile",
        str(CHECKPOINT),
        "--prompts",
        str(prompts),
        "-o",
        str(tmp_path / "run"),
        "--full-vocab",
        "x",
    ]
    assert main(arguments) == 1
    assert "--full-vocab x: expected a number of sequences, or all" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
