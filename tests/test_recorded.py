"""Recorded rollouts against our own engines' scores of the same tokens: each thing that can be wrong is told apart.

vLLM itself makes the numbers wherever it can: temperature, top-p and top-k by its processed log-probabilities, other
weights by a checkpoint whose weights were moved. What a dump does to numbers (shift, rounding) is done to the numbers.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KeptEngines, run_here, write_jsonl
from recorded_rollouts import TESTS, in_bfloat16, in_decimals, in_float16, record, rewritten, shifted
from safetensors.torch import load_file, save_file

from moediag.demo.corpus import demo_prompts
from moediag.demo.pair import build_pair
from moediag.diagnosis.recorded import (
    CANNOT_TELL,
    GRIDS,
    HEALTHY,
    OTHER_TOKENS,
    OTHER_WEIGHTS,
    ROUNDED,
    SHIFTED,
    TEMPERATURE,
    TRUNCATED,
    Explanation,
    RecordedTokens,
    explain,
    recorded_tokens,
)
from moediag.errors import RunError
from moediag.run.files import cache_folder
from moediag.run.reader import open_run
from moediag.selftest.families import make_checkpoint

SETTINGS = {
    "seed 0": {},
    "seed 1": {"seed": 1},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.2": {"temperature": 1.2},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 20": {"top_k": 20},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
}
DUMPED = {"shift": shifted, "bfloat16": in_bfloat16, "float16": in_float16, "decimals": in_decimals}
WRONG = {
    "temperature 0.7": TEMPERATURE,
    "temperature 1.2": TEMPERATURE,
    "top-p 0.9": TRUNCATED,
    "top-k 20": TRUNCATED,
    "temperature 0.7, top-p 0.9": f"{TEMPERATURE} and {TRUNCATED}",
    "other weights": OTHER_WEIGHTS,
    "shift": SHIFTED,
    "bfloat16": ROUNDED,
    "float16": ROUNDED,
    "decimals": ROUNDED,
    "seed 0": HEALTHY,
    "seed 1": HEALTHY,
    "float32": HEALTHY,
}
MODELS = ("trained", "glm4_moe")
OF_TRAINED = ("other weights", "float32")
"""Each takes a load of its own in vLLM: for one of the models only."""
CELLS = [(model, name) for model in MODELS for name in WRONG if model == "trained" or name not in OF_TRAINED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported runs by model and setting, scored by both engines; one vLLM process records and scores all of them."""
    folder, engines = tmp_path_factory.mktemp("recorded"), KeptEngines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        try:
            for model in MODELS:
                _record_all(folder / model, model, engines)
            for recipe in ("infer", "train"):
                for model in MODELS:
                    _score_all(folder / model, recipe, engines)
        finally:
            engines.close()
    return folder


def _record_all(folder: Path, model: str, engines: KeptEngines) -> None:
    folder.mkdir()
    ckpt = folder / "checkpoint"
    if model == "trained":
        shutil.copytree(build_pair(cache_folder("demo"))[0], ckpt)
    else:
        make_checkpoint(model, ckpt)
    texts = demo_prompts(24) if model == "trained" else [text[:24] for text in demo_prompts(24)]
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    _done(engines, "capture", "infer", ckpt, "--prompts", prompts, "--max-tokens", 1, "-o", folder / "prompts")
    run, dumps = open_run(folder / "prompts"), folder / "dumps"
    settings = {name: {"max_tokens": 64, "ignore_eos": True, **setting} for name, setting in SETTINGS.items()}
    record(engines, run, ckpt, "bfloat16", settings, dumps)
    if model == "trained":
        record(engines, run, _moved(ckpt, folder / "other"), "bfloat16", {"other weights": settings["seed 0"]}, dumps)
        record(engines, run, ckpt, "float32", {"float32": settings["seed 0"]}, dumps)
    for name, change in DUMPED.items():
        rewritten(dumps / "seed 0.jsonl", dumps / f"{name}.jsonl", change)
    for dump in sorted(dumps.glob("*.jsonl")):
        _done(engines, "import", "sequences", dump, "-o", folder / dump.stem)


def _score_all(folder: Path, recipe: str, engines: KeptEngines) -> None:
    for model, name in CELLS:
        if name in DUMPED or model != folder.name:
            continue
        how = ("--name", f"own-{recipe}", "--dtype", "bfloat16", "-o", folder / name)
        _done(engines, "capture", recipe, folder / "checkpoint", *how)
    if recipe == "infer" and (folder / "other").exists():
        how = ("--other-checkpoint", "--name", "older", "--dtype", "bfloat16", "-o", folder / "other weights")
        _done(engines, "capture", "infer", folder / "other", *how)


def _done(engines: KeptEngines, *words: object) -> None:
    done = run_here(*words, engines=engines)
    assert done.returncode == 0, done.stderr[-2000:]


def _moved(source: Path, folder: Path) -> Path:
    """The checkpoint with every matrix moved by 3 % of its spread: a step of training that much later."""
    shutil.copytree(source, folder)
    tensors, noise = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() >= 2:
            moved = tensor.float() + 0.03 * tensor.float().std() * torch.randn(tensor.shape, generator=noise)
            tensors[name] = moved.to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokens(runs: Path, model: str, name: str) -> RecordedTokens:
    """The tokens of a setting; of a dump that was rewritten with the scores of the clean one's, whose tokens it has."""
    if name not in DUMPED:
        return recorded_tokens(open_run(runs / model / name), "rollout")
    run, own = open_run(runs / model / name), _tokens(runs, model, "seed 0")
    shards = [(run.tokens(shard).is_scored_T, run.capture("rollout", shard).logp_T) for shard in run.shards]
    return replace(own, recorded_T=np.concatenate([logp_T[scored_T] for scored_T, logp_T in shards]).astype(np.float64))


def _explained(runs: Path, model: str, name: str) -> Explanation:
    return explain(_tokens(runs, model, name))


@pytest.mark.parametrize(("model", "name"), CELLS)
def test_what_is_wrong_with_recorded_rollouts_is_named(runs: Path, model: str, name: str) -> None:
    tokens = _tokens(runs, model, name)
    tokens = replace(tokens, others={})  # no candidate at hand
    found = explain(tokens)
    assert found.name == WRONG[name], "\n".join(found.evidence)
    assert bool(found.faults) == (found.name != HEALTHY)
    assert all(check.n > 0 for check in found.checks)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["temperature 0.7", "temperature 1.2"])
def test_the_temperature_is_named(runs: Path, model: str, name: str) -> None:
    check = next(check for check in _explained(runs, model, name).checks if check.name == TEMPERATURE)
    assert 1 / check.value == pytest.approx(float(name.split()[1]), rel=0.05)
    assert check.low <= check.value <= check.high


@pytest.mark.parametrize("model", MODELS)
def test_the_kept_mass_is_named(runs: Path, model: str) -> None:
    """Against the truth: what vLLM kept is at least p, and as a rule not much more."""
    check = next(check for check in _explained(runs, model, "top-p 0.9").checks if check.name == TRUNCATED)
    assert 0.9 < check.low < check.value < check.high < 0.97


def test_a_checkpoint_that_fits_is_named(runs: Path) -> None:
    found = _explained(runs, "trained", "other weights")
    assert found.name == OTHER_WEIGHTS
    assert "they fit the weights of arm older" in found.words
    clean = _tokens(runs, "trained", "seed 0")
    own_T, noise = clean.own["own-train"], np.random.default_rng(0).normal(0, 0.1, len(clean))
    assert explain(replace(clean, others={"older": own_T + noise})).name == HEALTHY


@pytest.mark.parametrize("model", MODELS[:1])
def test_two_faults_at_once_are_both_named(runs: Path, model: str) -> None:
    """A shift does not hide what else is wrong, nor does rounding."""
    for name in ("temperature 0.7", "top-p 0.9", "other weights"):
        tokens = replace(_tokens(runs, model, name), others={})
        rounded = replace(tokens, recorded_T=in_bfloat16(tokens.recorded_T))
        assert explain(rounded).name == f"{ROUNDED} and {WRONG[name]}"
        late = explain(replace(tokens, recorded_T=_late(tokens, 1)))
        assert late.name == f"{SHIFTED} and {WRONG[name]}"
    tokens = _tokens(runs, model, "seed 0")
    both = explain(replace(tokens, recorded_T=in_bfloat16(_late(tokens, 1))))
    assert both.name == f"{SHIFTED} and {ROUNDED}"


def _late(tokens: RecordedTokens, lag: int) -> np.ndarray:
    """Every sequence's recorded values, ``lag`` tokens late (early where negative); NaN where there is none."""
    values_T = np.full(len(tokens), np.nan)
    for seq in np.unique(tokens.seq_id_T):
        here = np.flatnonzero(tokens.seq_id_T == seq)
        for i, row in enumerate(here):
            if 0 <= i - lag < len(here):
                values_T[row] = tokens.recorded_T[here[i - lag]]
    return values_T


@pytest.mark.parametrize("lag", [-3, -2, -1, 1, 2, 3])
def test_the_shift_is_named_with_its_direction(runs: Path, lag: int) -> None:
    tokens = _tokens(runs, "trained", "seed 1")
    found = explain(replace(tokens, recorded_T=_late(tokens, lag)))
    assert found.name == SHIFTED
    assert found.words == (
        f"recorded log-probabilities are those of the token {abs(lag)} {'before' if lag > 0 else 'after'}"
    )


def test_another_order_of_sequences_is_named(runs: Path) -> None:
    tokens = _tokens(runs, "trained", "seed 0")
    swapped_T = np.roll(tokens.recorded_T, 64 * 5)  # every sequence is 64 tokens long
    assert explain(replace(tokens, recorded_T=swapped_T)).name == OTHER_TOKENS


def test_without_a_yardstick_nothing_is_called_healthy(runs: Path) -> None:
    """One own arm cannot say what rounding does; float32 arms cannot excuse a rollout engine of a coarser dtype."""
    tokens = _tokens(runs, "trained", "seed 0")
    alone = explain(replace(tokens, own={"own-train": tokens.own["own-train"]}))
    assert alone.name == CANNOT_TELL
    assert alone.next_check.startswith("moediag capture train")
    assert explain(replace(tokens, own={"own-infer": tokens.own["own-infer"]})).name == HEALTHY  # bit for bit
    near = {"a": tokens.own["own-train"], "b": tokens.own["own-train"] + 1e-6}
    exact = explain(replace(tokens, own=near, dtypes=dict.fromkeys(near, "float32")))
    assert exact.name == CANNOT_TELL
    assert "dtype" in exact.next_check
    assert explain(replace(tokens, own=near, dtypes=dict.fromkeys(near, "bfloat16"))).name == OTHER_WEIGHTS


def test_few_tokens_are_not_judged(runs: Path) -> None:
    tokens = _tokens(runs, "trained", "seed 0")
    some = tokens.take(np.arange(10), tokens.recorded_T[:10])
    assert explain(some).name == CANNOT_TELL


def test_a_run_without_own_scores_is_refused_with_the_command(runs: Path) -> None:
    with pytest.raises(RunError, match="moediag capture infer CKPT --name own-infer"):
        recorded_tokens(open_run(runs / "trained" / "shift"), "rollout")


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.kind}-{grid.size:g}")
def test_no_value_is_farther_from_what_was_rounded_than_the_grid_says(grid) -> None:  # type: ignore[no-untyped-def]
    """Against torch's and numpy's own rounding, over ten decades; a float32 value lies on no grid."""
    values_N = -np.exp(np.random.default_rng(0).uniform(math.log(1e-6), math.log(60), 4000))
    rounded_N = (
        {
            "bfloat16": in_bfloat16,
            "float16": in_float16,
            "decimals": lambda values: np.round(values, int(grid.size)),
            "step": lambda values: np.rint(values / grid.size) * grid.size,
        }[grid.kind](values_N)
        .astype(np.float32)
        .astype(np.float64)
    )
    kept_N = rounded_N != 0
    assert grid.holds(rounded_N[kept_N])
    assert not grid.holds(values_N)
    off_N = np.abs(rounded_N - values_N)
    assert (off_N <= grid.slack(rounded_N) * (1 + 1e-6) + np.spacing(np.float32(60)) / 2)[kept_N].all()


def test_the_spread_among_tokens_of_like_entropy_is_that_of_a_plain_loop(runs: Path) -> None:
    tokens = _tokens(runs, "trained", "temperature 0.7")
    assert tokens.entropy_T is not None
    check = next(check for check in explain(tokens).checks if check.name == TEMPERATURE)
    own_T = min(tokens.own.values(), key=lambda own_T: np.abs(tokens.recorded_T - own_T).mean())
    order = np.argsort(tokens.entropy_T, kind="stable")
    totals = np.zeros(2)
    bins: dict[int, list[int]] = {}
    for rank, row in enumerate(order):
        bins.setdefault(rank * 24 // len(order), []).append(row)
    for rows in bins.values():
        for i, values_T in enumerate((own_T, tokens.recorded_T)):
            totals[i] += sum((value - np.mean(values_T[rows])) ** 2 for value in values_T[rows])
    assert check.value == pytest.approx(math.sqrt(totals[1] / totals[0]), rel=1e-9)
