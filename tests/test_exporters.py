"""The exporters of reports/reference.md, run on batches as trainers hold them: the table that they write is a run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from dumps import DUMPS, check_tokens, imported, matched, tokens_of, truth

from moediag.importers.pickles import read_pickle

REFERENCE = Path(__file__).parents[1] / "reports" / "reference.md"
BOTH_SIDES = ("logp_infer", "logp_train", "advantage", "reward")


def exporter(name: str) -> Any:
    """A function of the page, as its reader pastes it."""
    blocks = re.findall(r"```python\n(.*?)```", REFERENCE.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(next(block for block in blocks if f"def {name}(" in block), scope)
    return scope[name]


def of_response(true: pd.DataFrame, ids: np.ndarray, is_there: np.ndarray, shape: tuple[int, int], name: str) -> Any:
    """A column of the truth as the trainer's tensor beside the sampler's.

    Args:
        ids: (S, tokens) as the batch has them, ``is_there`` without padding.
        shape: of the tensor, response tokens where the batch has them.
    """
    by_tokens = {tuple(part["token_id"]): part for _, part in true.groupby("seq_id")}
    whole = np.zeros(ids.shape, np.float32)
    for row, ids_T in enumerate(ids):
        part = by_tokens[tuple(ids_T[is_there[row]])]
        whole[row, is_there[row]] = np.where(part["is_response"], part[name].fillna(0), 0)
    return torch.from_numpy(whole[:, ids.shape[1] - shape[1] :].copy())


def check(path: Path, output: Path) -> None:
    run = imported("table", [path], output)[0]
    found = tokens_of(run)
    check_tokens(found, matched(found, truth(0)), BOTH_SIDES)


def test_verls_batch_becomes_a_table(tmp_path: Path) -> None:
    content = read_pickle(DUMPS / "verl/rollout_skip_v0/tiny_moe/GBS6_N2_in20_out40/1/gen_batch.dp")
    data, true = content["batch"], truth(0)
    ids, is_there = data["input_ids"], data["attention_mask"] == 1
    tensors = {name: torch.from_numpy(array.copy()) for name, array in data.items()}
    for ours, name in (("logp_train", "old_log_probs"), ("advantage", "advantages")):
        tensors[name] = of_response(true, ids, is_there, data["responses"].shape, ours)
    tensors["token_level_scores"] = tensors["rm_scores"]
    batch = SimpleNamespace(batch=tensors, non_tensor_batch={"uid": content["non_tensor_batch"]["uid"]})
    exporter("export_verl")(batch, 0, tmp_path / "table.parquet")
    check(tmp_path / "table.parquet", tmp_path / "run")


class SkyrlBatch(dict[str, Any]):
    """Tensors by name with metadata beside, as SkyRL's TrainingInputBatch."""

    metadata: dict[str, Any]


def test_skyrls_batch_becomes_a_table(tmp_path: Path) -> None:
    """Copies that fill up the batch are left out, and so are log-probabilities that the engine did not give."""
    content = read_pickle(DUMPS / "skyrl/dumped_data/global_step_1_training_input.pkl")
    data, true = content["batch_dict"], truth(0)
    ids, is_there = data["sequences"], data["attention_mask"] == 1
    tensors = {name: None if a is None else torch.from_numpy(a.copy()) for name, a in data.items()}
    reward = {tuple(part["token_id"]): part["reward"].iloc[0] for _, part in true.groupby("seq_id")}
    tensors["rewards"] = torch.zeros(data["loss_mask"].shape)
    tensors["rewards"][:, -1] = torch.tensor(
        [reward[tuple(ids_T[here])] for ids_T, here in zip(ids, is_there, strict=True)]
    )
    tensors = {name: value if value is None else torch.cat([value, value[:2]]) for name, value in tensors.items()}
    batch = SkyrlBatch(tensors)
    batch.metadata = {"uids": [str(i // 2) for i in range(12)] + ["pad0", "pad1"], "pad_size": 2}
    exporter("export_skyrl")(batch, 0, tmp_path / "table.parquet")
    check(tmp_path / "table.parquet", tmp_path / "run")
    batch["rollout_logprobs"][0, -1] = -9999.0
    exporter("export_skyrl")(batch, 0, tmp_path / "other.parquet")
    found = tokens_of(imported("table", [tmp_path / "other.parquet"], tmp_path / "other")[0])
    assert found[found["seq_id"] == 0]["logp_infer"].isna().iloc[-1]
