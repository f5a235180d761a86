"""reports/corrections.md says what the code does."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from correction_tables import correction_tables

from moediag.corrections import METHODS, PRESETS, parse_correction, weights
from moediag.corrections.presets import Setting

TEXT = (REPOSITORY / "reports" / "corrections.md").read_text()


def test_tables_are_those_of_the_code() -> None:
    """Written anew by ``python tests/correction_tables.py``."""
    for name, table in correction_tables().items():
        assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end of table -->" in TEXT
    assert all(f"| `{name}`" in TEXT for name in (*METHODS, *PRESETS))


def test_corrections_named_in_the_text_can_be_read() -> None:
    words = set(re.findall(r"`([a-z_0-9]+:[a-z_]+=[^`]+)`", TEXT))
    assert len(words) > 20
    for each in words:
        assert parse_correction(each)


def test_every_framework_of_the_presets_has_a_source() -> None:
    groups = {preset.group for preset in PRESETS.values()}
    assert {"verl", "trl", "openrlhf", "slime", "nemo-rl", "prime-rl", "areal", "skyrl"} <= groups
    assert {"ring-1t", "glm-5", "intellect-3", "tis", "mis", "dppo", "kpop", "trm"} <= groups
    assert all(preset.source for preset in PRESETS.values())


SETTINGS = [setting for preset in PRESETS.values() for setting in preset.settings]


@pytest.mark.parametrize(("low", "high"), [(0.7, 1.75), (0.0, 5.0), (0.5, float("inf"))])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: f"{one.framework}-{one.language}")
def test_what_to_paste_is_of_its_language_and_holds_the_band(setting: Setting, low: float, high: float) -> None:
    """What the frameworks' own code makes of it was tried by hand; where it is read stands in the source."""
    text = setting.lines(low, high)
    assert not {"{low}", "{high}"} & {*re.findall(r"{\w+}", text)}
    assert re.search(r" at [0-9a-f]{7} \(20\d\d-\d\d\), [\w/.-]+\.py:\d+", setting.source)
    if setting.language == "yaml":
        assert yaml.safe_load(text)
    elif setting.language == "toml":
        assert tomllib.loads(text)["trainer"]["loss"]["kwargs"] == {"low": low, "high": high}
    elif setting.language == "python":
        assert ast.parse(text)
    else:
        assert all(word.startswith("--") or not word.startswith("-") for word in shlex.split(text.replace("\\\n", " ")))
    if setting.framework == "TRL":
        assert (f"={low}," in text) == (low > 0)
    elif setting.language != "python" and low > 0 and high < 9:
        assert f"{low}" in text
        assert f"{high}" in text


def test_six_frameworks_can_be_given_a_band() -> None:
    assert {one.framework for one in SETTINGS} == {"verl", "slime", "prime-rl", "TRL", "OpenRLHF", "AReaL"}
    icepop = {step.method for one in PRESETS.values() if one.settings for step in one.correction.steps}
    assert icepop == {"icepop"}, "the lines are those of a band that weighs what it keeps"


def test_the_loss_to_paste_into_prime_rl_is_icepop() -> None:
    """Its gradient with respect to logp_train is minus weight times advantage, token by token."""
    import torch

    (loss,) = (one for one in SETTINGS if one.framework == "prime-rl" and one.language == "python")
    body = "\n".join(line for line in loss.body.splitlines() if "prime_rl" not in line)
    names: dict[str, Any] = {"LossInputs": object, "LossOutputs": dict}
    exec(body, names)
    train_T = torch.log(torch.tensor([0.4, 0.5, 1.0, 0.1])).requires_grad_()
    infer_T, advantage_T = torch.log(torch.tensor([1.0, 1.0, 1.0, 0.025])), torch.tensor([1.0, 2.0, -1.0, 0.5])
    inputs = SimpleNamespace(
        trainer_logprobs=train_T, inference_logprobs=infer_T, advantages=advantage_T,
        loss_mask=torch.ones(4, dtype=torch.bool), loss_weights=None,
    )  # fmt: skip
    found = names["icepop"](inputs, low=0.45, high=5.0)
    found["loss"].backward()
    weight_T = weights("icepop", train_T.detach(), infer_T, [0, 0, 1, 1], alpha=0.45, beta=5.0)
    np.testing.assert_allclose(-train_T.grad / advantage_T, weight_T, rtol=1e-6)
    assert float(found["metrics"]["is_masked"]) == 0.25
