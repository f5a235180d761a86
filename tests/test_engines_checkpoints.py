"""A run of two checkpoints: what was trained, and what vLLM really loaded; the first screen says that they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here, write_jsonl
from safetensors.torch import load_file, save_file

from moediag.hygiene import check_run
from moediag.run.reader import Run, open_run

pytestmark = pytest.mark.engines
OPTIONS = ("--max-tokens", "12", "--shard-size", "5", "--limit", "10")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, object]] = [{"prompt": f"{n} experts want the token, says the router"} for n in range(10)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def rounded(random_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with the experts rounded to float8, one scale per row, and written in bfloat16 again."""
    folder = tmp_path_factory.mktemp("checkpoints") / "8-bit"
    shutil.copytree(random_moe, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if ".experts." in name:
            scale = weight.float().abs().amax(-1, keepdim=True) / 448
            tensors[name] = ((weight.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def two(random_moe: Path, rounded: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run profiled with the 8-bit weights in vLLM and the bf16 ones in transformers, and what was printed."""
    path = tmp_path_factory.mktemp("two") / "run"
    command = ("profile", random_moe, "--infer-checkpoint", rounded, "--prompts", prompts, "-o", path, *OPTIONS)
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    return open_run(path), done.stdout


def summary_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "summary.json").read_text())
    return found


def test_the_first_screen_of_every_page_says_that_the_weights_differ_and_how(two: tuple[Run, str]) -> None:
    run, printed = two
    said = "tensors differ, relative error"
    summary = summary_of(run)
    assert said in printed.splitlines()[0]
    assert said in summary["verdict"]["weights"]
    assert said in (run.path / "report.md").read_text().split("|", 1)[0]  # before the first table
    groups = {group["group"]: group for group in summary["weights"]["comparison"]["groups"]}
    assert groups["router"]["n_tensors"] == {"equal": 2}
    assert groups["routed experts"]["n_tensors"] == {"differs": 48}
    assert 0.01 < groups["routed experts"]["relative_error"] < 0.05  # e4m3 has 3 bits of mantissa
    assert summary["pairs"]["infer~train"]["logp"]["abs_logp_diff"]["mean"] > 2 * summary["floors"]["rounding"]["mean"]


def test_each_arm_says_what_it_loaded_and_all_is_clean(two: tuple[Run, str], random_moe: Path, rounded: Path) -> None:
    run, _ = two
    sources = {arm: run.checkpoint_of(arm).source for arm in run.arms()}  # type: ignore[union-attr]
    assert {Path(source).name for arm, source in sources.items() if arm.startswith("infer")} == {rounded.name}
    assert {Path(source).name for arm, source in sources.items() if arm.startswith("train")} == {random_moe.name}
    assert check_run(run) == []
    simulated = run_here("simulate", run.path, "--preset", "icepop")
    assert "Note: infer loaded other weights" in simulated.stdout


def test_another_checkpoint_joins_a_run_only_if_it_is_called_another(two: tuple[Run, str], rounded: Path) -> None:
    """Its arm is a variant of the run's own; a conflict names the models and not only digests."""
    run, _ = two
    refused = run_here("capture", "train", rounded, "-o", run.path, "--name", "train-8bit")
    assert refused.returncode == 1
    assert f"{rounded.name} (weights " in refused.stderr
    assert "--other-checkpoint" in refused.stderr
    same_name = run_here("capture", "train", rounded, "-o", run.path, "--other-checkpoint")
    assert same_name.returncode == 1
    assert "a name of its own with --name" in same_name.stderr
    joined = run_here("capture", "train", rounded, "-o", run.path, "--other-checkpoint", "--name", "train-8bit")
    assert joined.returncode == 0, joined.stderr
    record = run.arm("train-8bit")
    assert (record.role, record.variant_of, record.change) == ("train", "train", "checkpoint")
    assert run_here("analyze", run.path).returncode == 0
    means = {name: pair["logp"]["abs_logp_diff"]["mean"] for name, pair in summary_of(run)["pairs"].items()}
    assert means["infer~train-8bit"] < means["infer~train"] / 2  # the same weights again: what is left are the engines
    assert means["train-8bit~train"] > means["infer~train"] / 2


def test_a_tokenizer_that_gives_tokens_other_ids_is_refused(
    two: tuple[Run, str], random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    run, _ = two
    folder = tmp_path / "other-tokenizer"
    shutil.copytree(random_moe, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ("profile", random_moe, "--infer-checkpoint", folder, "--prompts", prompts, "-o", tmp_path / "run")
    for done in (
        run_here(*command, *OPTIONS),
        run_here("capture", "infer", folder, "-o", run.path, "--other-checkpoint", "--name", "other"),
    ):
        assert done.returncode == 1
        assert "maps tokens to other ids" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def int8(random_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """compressed-tensors W8A8: int8 attention and dense MLP, a scale per row; experts and routers as they were."""
    folder = tmp_path_factory.mktemp("checkpoints") / "int8"
    shutil.copytree(random_moe, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and ".experts." not in name]:
        weight = tensors[name].float()
        scale = weight.abs().amax(-1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
        "format": "int-quantized",
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*experts.*"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantised_folder_is_the_same_model_and_the_pages_say_how_it_is_quantised(
    int8: Path, random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    """Its tensors are compared after dequantising; vLLM computes with int8 activations, and its routes are recorded."""
    path = tmp_path / "run"
    options = ("--no-floors", "--prompts", prompts, "-o", path, *OPTIONS)
    done = run_here("profile", random_moe, "--infer-checkpoint", int8, *options)
    assert done.returncode == 0, done.stderr
    run, summary = open_run(path), summary_of(open_run(path))
    words = "quantised by compressed-tensors: weights int8 per channel, activations int8 per token"
    assert words in summary["verdict"]["weights"]
    assert words in (path / "report.md").read_text().split("|", 1)[0]
    groups = {group["group"]: group for group in summary["weights"]["comparison"]["groups"]}
    assert set(groups["attention"]["n_tensors"]) == {"dequantised"}
    assert 0 < groups["attention"]["relative_error"] < 0.02
    assert set(groups["routed experts"]["n_tensors"]) == set(groups["router"]["n_tensors"]) == {"equal"}
    assert not summary["weights"]["comparison"]["not_comparable"]
    assert run.arm("infer").is_routed
    assert summary["pairs"]["infer~train"]["routing"]["flip_rate"] > 0
    assert check_run(run) == []
