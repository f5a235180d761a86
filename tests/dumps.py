"""The sample dumps of tests/data/dumps, their truth, and what a run imported from one of them says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moediag.importers.registry import files_of, importer_of
from moediag.importers.rollouts import Options
from moediag.importers.write import import_dump
from moediag.notation import NO_TOKEN
from moediag.run.reader import Run

DUMPS = Path(__file__).parent / "data" / "dumps"
LOGPS = {"rollout": "logp_infer", "trainer": "logp_train"}
N_LAYERS = 4


def imported(name: str, paths: Collection[Path], output: Path, **options: Any) -> list[Run]:
    """The runs of a dump, by step."""
    importer = importer_of(name)
    return import_dump(importer, files_of(importer, list(paths)), output, Options(**options))


def truth(step: int) -> pd.DataFrame:
    """A row per token of a step (0, 1)."""
    frame = pd.read_parquet(DUMPS / "truth.parquet")
    return frame[frame["step"] == step].reset_index(drop=True)


def tokens_of(run: Run) -> pd.DataFrame:
    """A row per token of a run: its token table and both arms' log-probabilities and entropies."""
    parts = []
    for shard in run.shards:
        tokens = run.tokens(shard)
        names = (
            "seq_id", "prompt_id", "sample_index", "position", "token_id", "is_response", "turn", "weight_version",
            "advantage", "reward",
        )  # fmt: skip
        part = {name: getattr(tokens, f"{name}_T") for name in names if getattr(tokens, f"{name}_T") is not None}
        part["is_trained"] = tokens.is_scored_T
        for arm, name in LOGPS.items():
            if arm in run.arms():
                capture = run.capture(arm, shard)
                part[name] = capture.logp_T
                if capture.entropy_T is not None:
                    part[f"entropy_{name[5:]}"] = capture.entropy_T
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def matched(found: pd.DataFrame, true: pd.DataFrame, keys: Collection[str] = ("token_id",)) -> pd.DataFrame:
    """The truth's rows in the order of ``found``: sequences are known by their tokens (every one is unique)."""
    name = {tuple(part["token_id"]): seq for seq, part in true.groupby("seq_id")}
    assert len(name) == true["seq_id"].nunique()
    order = [name[tuple(part["token_id"])] for _, part in found.groupby("seq_id", sort=False)]
    assert sorted(order) == sorted(name.values())
    by_seq = dict(iter(true.groupby("seq_id")))
    return pd.concat([by_seq[seq] for seq in order], ignore_index=True)


def same(found: Any, expected: Any) -> None:
    """The same float32, bit for bit; NaN is NaN."""
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def check_tokens(found: pd.DataFrame, true: pd.DataFrame, has: Collection[str]) -> None:
    """Hold what a run has against the truth.

    Args:
        has: of logp_infer, logp_train, logp_train_prompt (on prompt and tool tokens, too), entropy_train, advantage,
            reward, weight_version.
    """
    for name in ("position", "token_id", "is_response", "is_trained"):
        np.testing.assert_array_equal(found[name], true[name], err_msg=name)
    groups = found.groupby("prompt_id")["seq_id"].unique().map(tuple)
    wanted = pd.Series(true["prompt_id"].to_numpy(), found.index)
    assert all(wanted[found["seq_id"].isin(seqs)].nunique() == 1 for seqs in groups)
    assert found["prompt_id"].nunique() == true["prompt_id"].nunique()
    trained = true["is_trained"].to_numpy()
    if "logp_infer" in has:
        same(found["logp_infer"], true["logp_infer"])
    if "logp_train_prompt" in has:
        same(found["logp_train"], true["logp_train"])
    elif "logp_train" in has:
        same(found["logp_train"][trained], true["logp_train"][trained])
    if "entropy_train" in has:
        same(found["entropy_train"][trained], true["entropy"][trained])
    if "advantage" in has:
        same(found["advantage"][trained], true["advantage"][trained])
        assert found["advantage"][~true["is_response"]].isna().all()
    if "reward" in has:
        same(found["reward"], true["reward"])
    if "weight_version" in has:
        versions = [None if pd.isna(version) else str(int(version)) for version in true["weight_version"]]
        assert [version for version, is_here in zip(found["weight_version"], trained, strict=True) if is_here] == [
            version for version, is_here in zip(versions, trained, strict=True) if is_here
        ]
    lacking = {"logp_infer", "logp_train", "entropy_train", "advantage", "reward", "weight_version"} - {*has}
    lacking -= {"logp_train"} if "logp_train_prompt" in has else set()
    assert not lacking & {*found.columns}, "what a dump lacks is absent"
    assert (found["token_id"] != NO_TOKEN).all()


def check_routes(
    run: Run, arm: str, found: pd.DataFrame, true: pd.DataFrame, *, is_sorted: bool = False, first_layer: int = 1
) -> None:
    """Hold an arm's expert ids against the truth; the sampler has none of the last token.

    Args:
        is_sorted: the format orders ids by number.
        first_layer: decoder layer of the first router: the truth's, or 0 where the format has MoE layers alone.
    """
    routes = np.load(DUMPS / "truth_routes.npz")
    side = "infer" if arm == "rollout" else "train"
    record = run.arm(arm)
    assert [router.decoder_layer for router in record.routers] == list(range(first_layer, first_layer + 4))
    assert (record.n_experts, record.top_k) == (16, 4)
    ids_TLK = np.concatenate([run.capture(arm, shard).expert_ids_TLK for shard in run.shards])
    seq_T, true_T = found["seq_id"].to_numpy(), true["seq_id"].to_numpy()
    for seq in np.unique(seq_T):
        here = seq_T == seq
        name = true_T[here][0]
        expected = routes[f"{side}_{name}"].astype(np.int16)
        got = ids_TLK[here]
        if is_sorted:
            expected = np.sort(expected, axis=2)
        np.testing.assert_array_equal(got[: len(expected)], expected)
        last = got[-1]
        if (last != -1).any():
            assert side == "train", "no engine consumes the last sampled token"
            np.testing.assert_array_equal(np.sort(last), np.sort(routes[f"train_last_{name}"].astype(np.int16)))
