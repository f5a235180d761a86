"""The small RL runs of reports/rl.md: real steps of both engines, what a stop leaves, and the page's arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import rl
import rl_page
from two_checkpoints import eight_bits


@pytest.fixture(scope="module")
def trained(random_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The folder of a run, stopped after three steps and begun again at its third, and what was printed of a push."""
    folder = tmp_path_factory.mktemp("rl")
    command = [sys.executable, str(REPOSITORY / "tests" / "rl_steps.py"), str(random_moe), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "8-bit-icepop-0", json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engines
def test_pushed_weights_are_those_of_an_engine_that_loaded_them(trained: tuple[Path, dict[str, object]]) -> None:
    """Bug: vLLM's reload_weights copies experts over the packed ones of its CPU build, which left it 1.75 nat off."""
    _, push = trained
    assert push["same tokens"]
    assert push["same logp"]
    assert int(str(push["n tokens"])) > 100


@pytest.mark.engines
def test_a_stopped_run_goes_on_as_if_it_had_not(trained: tuple[Path, dict[str, object]]) -> None:
    """Steps behind the last saved state are made again: the same rows, but for times and what a watch says only of the
    first step that it sees."""
    folder, _ = trained
    first = ("restart", "findings", "n_findings")

    def rows(path: Path, name: str) -> list[dict[str, object]]:
        return [
            {key: value for key, value in row.items() if key not in first and not key.endswith("[s]")}
            for row in rl.rows_of(path / name)
        ]

    for name in ("steps.jsonl", "train.jsonl"):
        assert rows(folder, name) == rows(folder / "once", name)
        assert [row["step"] for row in rows(folder, name)] == [0, 1, 2]
    assert [row["restart"] for row in rl.rows_of(folder / "steps.jsonl")] == [0, 0, 1]


@pytest.mark.engines
def test_a_step_trains_and_watches(trained: tuple[Path, dict[str, object]]) -> None:
    steps, training = (pd.DataFrame(rl.rows_of(trained[0] / name)) for name in ("steps.jsonl", "train.jsonl"))
    assert (steps["n_prompts"] == rl.N_PROMPTS).all()
    assert (training["gradient_norm"] > 0).all()
    assert (training["entropy"] > 0).all()
    # what the loss left out is what the watch counts under the same preset
    np.testing.assert_allclose(training["masked_share"], steps["masked_share.ring-1t"], atol=1e-12)
    assert 0 < steps["abs_logp_diff.mean"].iloc[0] < 1


def test_eight_bits_keeps_routers_and_moves_matrices_by_float8s_step() -> None:
    import torch

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    for kept in ("model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "lm_head.weight"):
        assert torch.equal(eight_bits(kept, weight), weight)
    moved = eight_bits("model.layers.0.self_attn.q_proj.weight", weight)
    apart = ((moved - weight).float().abs() / weight.float().abs()).max()
    assert moved.dtype == weight.dtype
    assert 0.02 < apart < 0.12  # half a step of e4m3 is 1 / 16, more below its smallest normal number


@pytest.mark.parametrize(
    ("response", "share"),
    [(b"", 0.0), (b"xqzt", 0.0), (b"the a of", 0.0), (b"value", 1.0), (b"value value", 5 / 11), (b"Value.", 5 / 6)],
)
def test_reward_counts_the_bytes_of_known_words_once(response: bytes, share: float) -> None:
    assert rl.known_words(response) == pytest.approx(share)


def write_runs(folder: Path, n_seeds: int, n_steps: dict[str, int]) -> None:
    """Tables of all runs with numbers that are known: the share masked is 1 of 1,000, its entropy twice that of all."""
    for engine in rl_page.ENGINES:
        for correction in rl_page.CORRECTIONS:
            for seed in range(n_seeds):
                name = f"{engine}-{correction}-{seed}"
                run = folder / name
                run.mkdir(parents=True)
                for table, columns in {
                    "steps.jsonl": {
                        "n_tokens": 1000, "abs_logp_diff.mean": 0.02 * (1 + seed), "kl_infer_train_k3": 1e-3,
                        "abs_prob_diff.max": 0.1, rl_page.MASKED: 1e-3, rl_page.MASKED_ENTROPY: 2.0,
                        "masked_share.glm-5": 2e-3,
                    },
                    "train.jsonl": {
                        "reward": 0.25 + (0.1 + 0.01 * seed) * (correction == "icepop"), "entropy": 1.0,
                        "masked_share": 0.0, **{f"{stage} [s]": 1.0 for stage in rl_page.STAGES},
                    },
                }.items():  # fmt: skip
                    rows = [{"step": step, **columns} for step in range(n_steps.get(name, 30))]
                    (run / table).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_counts_steps_that_every_run_has(tmp_path: Path) -> None:
    write_runs(tmp_path, 3, {"8-bit-tis-1": 27})
    steps = rl_page.read(tmp_path)
    assert steps.groupby(["engine", "correction", "seed"]).size().eq(20).all()
    assert len(steps) == 20 * 2 * 3 * 3


def test_the_page_pairs_seeds_and_pools_what_is_masked(tmp_path: Path) -> None:
    write_runs(tmp_path, 3, {})
    steps = rl_page.read(tmp_path)
    # 0.1, 0.11, 0.12: mean 0.11, standard error 0.01 / sqrt(3), t(2) = 4.303
    assert "| bf16 | IcePop minus none | 0.110 [0.0852, 0.135] |" in rl_page.against_none(steps)
    assert "| bf16 | TIS minus none | 0 [0, 0] |" in rl_page.against_none(steps)
    one, two = "1.00 [1.00, 1.00]", "2.00 [2.00, 2.00]"
    assert f"| 8-bit | last | {one} | {two} | {one} | {two} | {two} | 90 of 90,000 |" in rl_page.masked(steps)
    assert "| `watch.step` | 1.00 | 1.00 | 20 % |" in rl_page.seconds(steps)


def test_two_seeds_are_shown_each_without_an_interval(tmp_path: Path) -> None:
    write_runs(tmp_path, 2, {})
    assert "| bf16 | last 10 | no correction | 0.250, 0.250 | 1.00, 1.00 | 20.0, 40.0 | 20.0, 40.0 |" in rl_page.levels(
        rl_page.read(tmp_path)
    )
