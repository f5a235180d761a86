"""Dumps of tensors as runs: slime, miles, SkyRL, verl and Megatron's traces, against what was put into them."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SEED
from dumps import DUMPS, check_routes, check_tokens, imported, matched, tokens_of, truth

from moediag.errors import DumpError, RunError
from moediag.importers.miles import held_by
from moediag.importers.pickles import read_pickle
from moediag.importers.registry import IMPORTERS, expand
from moediag.importers.rollouts import Options
from moediag.run.reader import Run

SLIME = ("logp_infer", "logp_train", "entropy_train", "advantage", "reward")
SKYRL = ("logp_infer", "logp_train", "advantage")
VERL = ("logp_infer", "reward")
WITHOUT_ROUTES: tuple[str, ...] = ()
V0 = "verl/rollout_skip_v0"
V1 = "verl/rollout_skip_v1"
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "slime": ("slime", ("slime",), SLIME, ("rollout",)),
    "slime, the trainer's half": ("slime", ("slime/train_data",), SLIME, WITHOUT_ROUTES),
    "slime, the sampler's half": ("slime", ("slime/rollout_data",), ("logp_infer", "reward"), ("rollout",)),
    "miles": ("miles", ("miles",), SLIME, ("rollout", "trainer")),
    "miles, the trainer's half": ("miles", ("miles/train_data",), SLIME[:-1], WITHOUT_ROUTES),
    "miles, the sampler's half": ("miles", ("miles/rollout_data",), ("logp_infer", "reward"), ("rollout",)),
    "miles, dashboard": ("miles", ("miles/dashboard_columns",), ("logp_infer",), WITHOUT_ROUTES),
    "miles, dashboard and trainer": (
        "miles", ("miles/dashboard_columns", "miles/train_data"), SLIME[:-1], WITHOUT_ROUTES),
    "skyrl": ("skyrl", ("skyrl",), SKYRL, ("rollout",)),
    "verl, V0": ("verl", (V0,), VERL, ("rollout",)),
    "verl, V1": ("verl", (V1,), VERL, ("rollout",)),
}  # fmt: skip
"""Case -> format, paths, what it holds of the truth, the arms that have routes."""
CROSSING = {8, 15}
"""Sequences that cross an update of the weights."""
VERSIONED = {"slime", "slime, the sampler's half", "miles", "miles, the sampler's half", "miles, the trainer's half",
             "miles, dashboard and trainer", "verl, V0", "verl, V1"}  # fmt: skip


def case(name: str, output: Path) -> list[Run]:
    form, paths, _, _ = CASES[name]
    return imported(form, [DUMPS / path for path in paths], output, trust_pickle=form in ("skyrl", "verl"))


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_a_dump_is_at_its_place(tmp_path: Path, name: str) -> None:
    _, _, has, routed = CASES[name]
    runs = case(name, tmp_path / "series")
    assert len(runs) == 2
    for step, run in enumerate(runs):
        found = tokens_of(run)
        true = matched(found, truth(step))
        versions = found.pop("weight_version") if "weight_version" in found else None
        check_tokens(found, true, has)
        check_versions(versions, true, name in VERSIONED)
        if "logp_train" in has:  # tool tokens, too
            response = true["is_response"]
            np.testing.assert_array_equal(found["logp_train"][response], true["logp_train"][response])
            assert found["logp_train"][~response].isna().all()
        for arm in run.arms():
            if arm in routed:
                check_routes(run, arm, found, true)
            else:
                assert run.arm(arm).routers == ()


def check_versions(versions: pd.Series | None, true: pd.DataFrame, is_there: bool) -> None:
    """Every token's version, of sequences of one version; those that cross an update have none."""
    versions = pd.Series(None, true.index, dtype=object) if versions is None else versions
    expected = [
        None if not is_there or seq in CROSSING or pd.isna(version) else str(int(version))
        for seq, version in zip(true["seq_id"], true["weight_version"], strict=True)
    ]
    assert [None if pd.isna(version) else version for version in versions] == expected


def test_the_same_scenario_gives_the_same_numbers_through_every_importer(tmp_path: Path) -> None:
    """As far as each format holds them, to the last bit."""
    tables = {}
    for i, name in enumerate(CASES):
        run = case(name, tmp_path / str(i))[1]
        found = tokens_of(run)
        found["key"] = matched(found, truth(1))["seq_id"]
        tables[name] = found.set_index(["key", "position"]).sort_index()
    for one, other in itertools.combinations(tables.values(), 2):
        for name in {"logp_infer", "logp_train", "entropy_train", "reward"} & {*one.columns} & {*other.columns}:
            pd.testing.assert_series_equal(one[name], other[name])


def token_table(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table) -> Path:
    """The table that a trace is joined to; the sample's packing.json says who is where."""
    packed = json.loads((DUMPS / "megatron" / "packing.json").read_text())["sequences"]
    place = {
        seq: (int(rank[4:]), batch)
        for ranks in packed.values()
        for rank, batches in ranks.items()
        for batch, seqs in enumerate(batches)
        for seq in seqs
    }
    table = pd.read_parquet(DUMPS / "truth.parquet").drop(columns=["entropy", "weight_version"])
    table["rank"] = [place[seq][0] for seq in table["seq_id"]]
    table["micro_batch"] = [place[seq][1] for seq in table["seq_id"]]
    change(table).to_parquet(path)
    return path


@pytest.mark.parametrize("folder", ["megatron", "megatron/train", "megatron/inference"])
def test_router_traces_are_joined_to_a_token_table(tmp_path: Path, folder: str) -> None:
    tokens = token_table(tmp_path / "tokens.parquet")
    runs = imported("megatron", [DUMPS / folder], tmp_path / "series", tokens=tokens)
    n_other = 0
    for step, run in enumerate(runs):
        found = tokens_of(run)
        true = matched(found, truth(step))
        check_tokens(found, true, ("logp_infer", "logp_train_prompt", "advantage", "reward"))
        if folder != "megatron/train":
            check_routes(run, "rollout", found, true)
        if folder == "megatron/inference":
            continue
        check_routes(run, "trainer", found, true, is_sorted=True)
        record = run.arm("trainer")
        assert "router_logits_TLE" in record.arrays
        for shard in run.shards:
            capture = run.capture("trainer", shard)
            best = np.sort(np.argsort(-capture.router_logits_TLE, axis=2, kind="stable")[:, :, :4], axis=2)
            n_other += int((best != np.sort(capture.expert_ids_TLK, axis=2)).any(axis=2).sum())
    if folder != "megatron/inference":
        assert n_other == 16  # near ties that bfloat16 decides otherwise: ids are the recorded ones


def test_another_token_table_is_another_import(tmp_path: Path) -> None:
    """Bug: the table was known by its name alone, so that an import with other tokens was taken for the one there."""
    tokens = token_table(tmp_path / "tokens.parquet")
    folder = DUMPS / "megatron" / "train"
    imported("megatron", [folder], tmp_path / "series", tokens=tokens)
    imported("megatron", [folder], tmp_path / "series", tokens=tokens)
    token_table(tokens, lambda table: table.assign(token_id=table["token_id"] + 1))
    with pytest.raises(RunError, match="was imported with other contents or options"):
        imported("megatron", [folder], tmp_path / "series", tokens=tokens)
    with pytest.raises(DumpError, match="--tokens .*none.parquet is missing"):
        imported("megatron", [folder], tmp_path / "other", tokens=tmp_path / "none.parquet")


def test_pipeline_stages_are_put_together(tmp_path: Path) -> None:
    """Stage 0 has decoder layers 0 to 2, stage 1 has 3 and 4 and counts them from 0; ranks 2, 3 are 0, 1 of stage 1."""
    tokens = token_table(tmp_path / "tokens.parquet")
    folder = tmp_path / "train"
    folder.mkdir()
    for rank in (0, 1):
        whole = (DUMPS / "megatron" / "train" / f"router_trace_rank{rank}.jsonl").read_text().splitlines()
        parts: dict[int, list[str]] = {rank: [], rank + 2: []}
        for line in whole:
            record = json.loads(line)
            stage, layer = (0, record["layer"]) if record["layer"] < 3 else (1, record["layer"] - 3)
            parts[rank + 2 * stage].append(json.dumps({**record, "layer": layer, "rank": rank + 2 * stage}) + "\n")
        for name, found in parts.items():
            (folder / f"router_trace_rank{name}.jsonl").write_text("".join(found))
            shutil.copy(DUMPS / "megatron" / "train" / f"logits_rank{rank}.bin", folder / f"logits_rank{name}.bin")
    runs = imported("megatron", [folder], tmp_path / "series", tokens=tokens, pipeline_layers=(3, 2))
    plain = imported("megatron", [DUMPS / "megatron" / "train"], tmp_path / "plain", tokens=tokens)
    for step, (run, other) in enumerate(zip(runs, plain, strict=True)):
        found = tokens_of(run)
        check_routes(run, "trainer", found, matched(found, truth(step)), is_sorted=True)
        for shard in run.shards:
            logits = [one.capture("trainer", shard).router_logits_TLE for one in (run, other)]
            np.testing.assert_array_equal(*logits)
    for stages, message in (
        ((), r"ranks hold other layers \(rank 0: \[1, 2\], .*rank 2: \[0, 1\].*--pipeline-layers"),
        ((2, 3), "rank 0 has layer 2; its pipeline stage has 2 layers"),
        ((2, 2, 1), "has 4 ranks, which are no 3 pipeline stages"),
    ):
        with pytest.raises(DumpError, match=message):
            imported("megatron", [folder], tmp_path / "out", tokens=tokens, pipeline_layers=stages)
    path = folder / "router_trace_rank3.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(DumpError, match="rank 3 has 1 micro-batches of step 1, the stages before it 2"):
        imported("megatron", [folder], tmp_path / "out", tokens=tokens, pipeline_layers=(3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="token_id"), "lacks token_id"),
        (lambda t: t.drop(columns="micro_batch"), "2 micro-batches of step 0, rank 0; .* has micro_batch 0"),
        (lambda t: t.drop(columns=["rank", "micro_batch"]), "2 micro-batches of step 0, rank 0; .* has micro_batch 0"),
        (lambda t: t.assign(step=t["step"] + 1), "has a trace of step 0, rank 0; .* has no such rows"),
        (lambda t: t[t["seq_id"] != 4], "micro-batch 0 of step 0, rank 0 has 66 rows; its sequences have 41 tokens"),
        (lambda t: t.drop(index=t.index[5]), r"seq_id 0: expected its rows together, positions 0..6 in order"),
        (lambda t: t.sort_values(["position", "seq_id"]), "expected its rows together"),
        (lambda t: t.assign(rank=t["rank"] + (t["position"] > 2)), "rank changes within the sequence"),
    ],
)
def test_a_token_table_of_other_tokens_is_refused(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    tokens = token_table(tmp_path / "tokens.parquet", change)
    with pytest.raises(DumpError, match=message):
        imported("megatron", [DUMPS / "megatron" / "train"], tmp_path / "out", tokens=tokens)


def test_a_trace_without_its_tokens_or_with_a_damaged_part_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(DUMPS / "megatron" / "train", folder)
    tokens = token_table(tmp_path / "tokens.parquet")

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(DumpError, match=message) as caught:
            imported("megatron", [folder], tmp_path / "out", **options)
        assert "\n" not in str(caught.value)

    refused("has neither token ids nor boundaries of sequences; .* --tokens TABLE")
    path, logits = folder / "router_trace_rank0.jsonl", folder / "logits_rank0.bin"
    lines, content = path.read_text().splitlines(keepends=True), logits.read_bytes()
    logits.write_bytes(content[:-10])
    refused(r"logits_rank0.bin ends at byte 32,630", tokens=tokens)
    logits.write_bytes(content)
    path.write_text("".join(lines)[:-200])
    refused(r"line 16: no JSON .*it was cut short", tokens=tokens)
    path.write_text("".join(lines[:-1]))
    refused(r"micro-batch 1 of step 1, rank 0 has layers \[1, 2, 3\], the trace has \[1, 2, 3, 4\]", tokens=tokens)
    path.write_text("".join([*lines, *lines[-4:]]))
    refused("3 micro-batches of step 1, rank 0", tokens=tokens)
    path.unlink()
    refused("lacks router_trace_rank0", tokens=tokens)
    path.write_text("".join(lines))
    (folder / "router_trace_rank1.jsonl").unlink()
    refused("has no row of .*seq_id 1; is a rank's file missing", tokens=tokens)


def saved(path: Path, change: Callable[[Any], Any]) -> None:
    """A torch file changed: what it holds, as ``torch.load`` gives it, through a function and back."""
    content = torch.load(path, weights_only=False)
    torch.save(change(content) or content, path)


def in_sample(number: int, /, **values: Any) -> Callable[[Any], Any]:
    def change(content: Any) -> None:
        content["samples"][number].update(
            {name: value(content["samples"][number][name]) for name, value in values.items()}
        )

    return change


def in_columns(number: int, /, **values: Any) -> Callable[[Any], Any]:
    def change(content: Any) -> None:
        columns = content["rollout_data"]
        for name, value in values.items():
            columns[name][number] = value(columns[name][number])

    return change


DAMAGE: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "a route's row less": ("slime", "rollout_data/0.pt", in_sample(2, rollout_routed_experts=lambda rows: rows[:-1]),
                           "rollout_routed_experts has 45 rows for 47 tokens; expected 46"),
    "segments joined twice": (
        "slime", "rollout_data/0.pt", in_sample(5, rollout_routed_experts=lambda rows: torch.cat([rows[:30], rows])),
        "has 79 rows for 50 tokens; rows 30..59 repeat rows 0..29: segments of a generation that was interrupted"),
    "routes in bytes": ("slime", "rollout_data/0.pt",
                        in_sample(2, rollout_routed_experts=lambda rows: rows.view(torch.uint8)),
                        r"routes have \(L, K\) = \(5, 16\), the first ones \(5, 4\)"),
    "ids read too wide": (
        "slime", "rollout_data/0.pt",
        in_sample(2, rollout_routed_experts=lambda rows: (rows.to(torch.uint8).repeat(1, 1, 4).view(torch.int32))),
        "which is no expert id"),
    "a log-probability less": ("slime", "rollout_data/0.pt", in_sample(0, rollout_log_probs=lambda logps: logps[1:]),
                               "rollout_log_probs should hold 5 numbers, one per token, found 4"),
    "probabilities": ("slime", "rollout_data/0.pt", in_sample(0, rollout_log_probs=lambda logps: [0.5] * 5),
                      "is 0.5, above 0; are these logits or probabilities"),
    "other tokens": ("slime", "train_data/0.pt", in_sample(3, tokens=lambda tokens: tokens.flip(0)),
                     "should be of the same tokens and are not; are the steps mixed up"),
    "a sample twice": ("slime", "train_data/0.pt", in_sample(3, rollout_position=lambda position: 2),
                       "are of the same sample of .*0.pt, 2"),
    "a position beyond": ("slime", "train_data/0.pt", in_sample(3, rollout_position=lambda position: 12),
                          "rollout_position is 12, .* has 12 samples"),
    "a sample less": ("slime", "train_data/0.pt", lambda content: content["samples"].pop() and None,
                      "holds 11 samples, its data-parallel ranks had 12; it is not whole"),
    "another format": ("slime", "train_data/0.pt", lambda content: {**content, "format_version": 3},
                       "format_version 3 of train_data, known is 2"),
    "another step": ("slime", "train_data/0.pt", lambda content: {**content, "rollout_id": 1},
                     "is of step 0 by its name and of rollout_id 1 by what it holds; steps are mixed up"),
    "a slice less": ("miles", "train_data/0_1.pt", in_columns(1, log_probs=lambda logps: logps[1:]),
                     "log_probs holds 23 numbers; context-parallel rank 1 of 2 has 24 of the response's 40 tokens"),
    "slices of other ranks": ("miles", "train_data/0_1.pt", lambda content: {**content, "cp_rank": 0},
                              "hold the same samples with other numbers"),
    "a split that is not known": ("miles", "train_data/0_1.pt", lambda content: {**content, "qkv_format": "sbhd"},
                                  "qkv_format 'sbhd' is split in a way that is not known; known are thd, and bshd"),
    "a padded split without its lengths": (
        "miles", "train_data/0_1.pt", lambda content: {**content, "qkv_format": "bshd"},
        r"qkv_format 'bshd' is split in a way that is not known; .*\(max_seq_lens\)"),
    "no number of ranks": ("miles", "train_data/0_1.pt", lambda content: {**content, "cp_size": 2**70},
                           "context-parallel rank 1 of 1180591620717411303424 is no rank"),
    "two samples of one index": ("miles", "rollout_data/0.pt", in_sample(4, index=lambda index: 3),
                                 "two samples have the same index"),
    "a sample of another step": ("miles", "rollout_data/0.pt", in_sample(4, index=lambda index: 40),
                                 "is no sample of step 0's rollout_data; are the steps mixed up"),
    "routes of fewer tokens": ("miles", "routing_replay_step0/rank0_routing_replay.pt",
                               lambda calls: [layer[:-1] for layer in calls],
                               "holds routes of 181 tokens, step 0 has 267"),
    "routes in another order": ("miles", "routing_replay_step0/rank0_routing_replay.pt",
                                lambda calls: [layer[::-1] for layer in calls],
                                "Its sequences are packed in another order than rollout_data has them"),
}  # fmt: skip
"""What is wrong -> format, file, how the file is changed, what is said."""


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_dump_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    form, file, change, message = DAMAGE[what]
    folder = tmp_path / "dump"
    shutil.copytree(DUMPS / form, folder)
    saved(folder / file, change)
    with pytest.raises(DumpError, match=message) as caught:
        imported(form, [folder], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dump"], "nothing half-written is left"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("0_1.pt",), "lacks context-parallel rank 1 of 2 beside 0_0.pt"),
        (("0_0.pt",), "lacks context-parallel rank 0 of 2 beside 0_1.pt"),
        (("0_2.pt", "0_3.pt"), "hold 6 of 12 samples; the file of a data-parallel rank is missing"),
    ],
)
def test_a_missing_rank_is_refused(tmp_path: Path, files: Collection[str], message: str) -> None:
    shutil.copytree(DUMPS / "miles", tmp_path / "miles")
    for name in files:
        (tmp_path / "miles" / "train_data" / name).unlink()
    with pytest.raises(DumpError, match=message):
        imported("miles", [tmp_path / "miles"], tmp_path / "out")


def test_tensor_parallel_ranks_that_repeat_a_slice_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "miles"
    shutil.copytree(DUMPS / "miles", folder)
    for rank in range(4):
        shutil.copy(folder / "train_data" / f"0_{rank}.pt", folder / "train_data" / f"0_{rank + 4}.pt")
    run = imported("miles", [folder], tmp_path / "series")[0]
    found = tokens_of(run).drop(columns="weight_version")
    check_tokens(found, matched(found, truth(0)), SLIME)
    assert any("4 files repeat another one's samples" in note for note in run.arm("trainer").origin.notes)


def test_padded_context_parallel_slices_are_put_together(tmp_path: Path) -> None:
    """``bshd``: sequences are padded to one length before they are cut, so that a rank holds other tokens of each."""
    folder = tmp_path / "miles"
    shutil.copytree(DUMPS / "miles", folder)
    n_moved = 0
    for step, group in itertools.product((0, 1), (0, 1)):
        paths = [folder / "train_data" / f"{step}_{rank}.pt" for rank in (2 * group, 2 * group + 1)]
        contents = [torch.load(path, weights_only=False) for path in paths]
        first = contents[0]["rollout_data"]
        lengths = [len(tokens) for tokens in first["tokens"]]
        for name in ("rollout_log_probs", "log_probs", "entropy", "advantages", "ref_log_probs", "returns"):
            for i, (n, n_response) in enumerate(zip(lengths, first["response_lengths"], strict=True)):
                whole = torch.zeros(n_response)
                for content in contents:
                    whole[torch.from_numpy(held_by(content["cp_rank"], 2, n, n_response))] = torch.as_tensor(
                        content["rollout_data"][name][i]
                    )
                for content in contents:  # token t is with the logits before it, of chunks of a quarter of 64
                    rank, at = content["cp_rank"], torch.arange(n - n_response, n) - 1
                    mine = torch.isin(at // 16, torch.tensor([rank, 3 - rank]))
                    n_moved += int(mine.sum()) != len(content["rollout_data"][name][i])
                    content["rollout_data"][name][i] = whole[mine]
        for path, content in zip(paths, contents, strict=True):
            content["qkv_format"], content["rollout_data"]["max_seq_lens"] = "bshd", [64] * len(lengths)
            torch.save(content, path)
    assert n_moved > 20
    for step, run in enumerate(imported("miles", [folder], tmp_path / "series")):
        found = tokens_of(run).drop(columns="weight_version")
        check_tokens(found, matched(found, truth(step)), SLIME)
    saved(folder / "train_data" / "0_0.pt", lambda content: content["rollout_data"].update(max_seq_lens=[5] * 6))
    with pytest.raises(DumpError, match="sample 0: max_seq_lens is 5 for 8 tokens"):
        imported("miles", [folder], tmp_path / "out")


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_context_parallel_slices_hold_every_response_token_once(cp_size: int) -> None:
    """Against a plain loop over tokens: token t is with the logits at t - 1, which are cut into 2 cp_size chunks."""
    for n, n_response in [(2, 1), (8, 5), (47, 40), (9, 1), (16, 15), (33, 7)]:
        chunk = -(-n // (2 * cp_size))
        for rank in range(cp_size):
            if cp_size == 1:
                expected = list(range(n_response))
            else:
                mine = [p for part in (rank, 2 * cp_size - 1 - rank) for p in range(part * chunk, (part + 1) * chunk)]
                expected = [p + 1 - (n - n_response) for p in mine if n - n_response <= p + 1 < n]
            assert held_by(rank, cp_size, n, n_response).tolist() == expected
        held = np.concatenate([held_by(rank, cp_size, n, n_response) for rank in range(cp_size)])
        assert sorted(held.tolist()) == list(range(n_response))


def test_routes_of_no_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="holds routes without tokens or boundaries; give the rollout_data"):
        imported("miles", [DUMPS / "miles" / "routing_replay_step0"], tmp_path / "out")


@pytest.mark.parametrize(("form", "folder"), [("skyrl", "skyrl"), ("verl", V0), ("verl", V1)])
def test_pickles_are_opened_only_if_asked_to(tmp_path: Path, form: str, folder: str) -> None:
    with pytest.raises(DumpError, match="only if you say --trust-pickle"):
        imported(form, [DUMPS / folder], tmp_path / "out")


def skyrl_pickle(state: dict[str, Any]) -> bytes:
    """The pickle that SkyRL writes of a batch with this state."""
    module = "skyrl.backends.skyrl_train.training_batch"
    names = f"c{module}\n_rebuild_tensor_batch\n(c{module}\nTrainingInputBatch\n".encode()
    return b"\x80\x03" + names + pickle.dumps(state, 3)[2:-1] + b"tR."


def skyrl_tensor(value: Any) -> Any:
    """A tensor as SkyRL writes it: as numpy's bytes, or as torch's own file where numpy has no such type."""
    if isinstance(value, torch.Tensor):
        file = io.BytesIO()
        torch.save(value, file)
        return {"format": "torch", "data": file.getvalue()}
    if isinstance(value, np.ndarray):
        return {"format": "numpy", "data": value.tobytes(), "shape": value.shape, "dtype": str(value.dtype)}
    return value


SKYRL_FILE = DUMPS / "skyrl" / "dumped_data" / "global_step_1_training_input.pkl"


def skyrl_with(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = read_pickle(SKYRL_FILE)
    content["batch_dict"] = {k: v.copy() if hasattr(v, "copy") else v for k, v in content["batch_dict"].items()}
    change(content)
    content["batch_dict"] = {name: skyrl_tensor(value) for name, value in content["batch_dict"].items()}
    (path / SKYRL_FILE.name).write_bytes(skyrl_pickle(content))
    return path / SKYRL_FILE.name


def test_what_is_written_as_skyrl_does_is_read_the_same(tmp_path: Path) -> None:
    path = skyrl_with(tmp_path, lambda content: None)
    run = imported("skyrl", [path], tmp_path / "run", trust_pickle=True)[0]
    found = tokens_of(run)
    check_tokens(found, matched(found, truth(0)), SKYRL)


def test_skyrls_bfloat16_sentinels_and_copies(tmp_path: Path) -> None:
    """-9999.0 is no log-probability; copies that fill up the batch are no sequences; bfloat16 is read."""

    def change(content: dict[str, Any]) -> None:
        batch = content["batch_dict"]
        batch["rollout_logprobs"][1, -3] = -9999.0
        for name, array in batch.items():
            if isinstance(array, np.ndarray):
                batch[name] = np.concatenate([array, array[:4]])
        content["metadata"]["pad_size"] = 4
        batch["action_log_probs"] = torch.from_numpy(batch["action_log_probs"]).to(torch.bfloat16)

    run = imported("skyrl", [skyrl_with(tmp_path, change)], tmp_path / "run", trust_pickle=True)[0]
    found = tokens_of(run)
    true = matched(found, truth(0))
    lost = found.index[(found["seq_id"] == 1)][-3]
    assert np.isnan(found["logp_infer"][lost])
    assert not np.isnan(true["logp_infer"][lost])
    true.loc[lost, "logp_infer"] = np.nan
    expected = torch.tensor(true["logp_train"].to_numpy()).to(torch.bfloat16).float().numpy()
    response = true["is_response"].to_numpy()
    np.testing.assert_array_equal(found["logp_train"][response], expected[response])
    true["logp_train"] = expected
    check_tokens(found, true, SKYRL)
    notes = " ".join(run.arm("rollout").origin.notes)
    assert "4 sequences fill up the batch (pad_size)" in notes
    assert "not scored: 1 token with the log-probability -9999" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.update(attention_mask=np.roll(batch["attention_mask"], -1, axis=1)),
         "expected padding on the left"),
        (lambda batch: batch.update(response_mask=np.ascontiguousarray(batch["response_mask"][:, ::-1])),
         "expected padding on the left"),
        (lambda batch: batch.update(rollout_logprobs=batch["rollout_logprobs"][:-1]),
         "rollout_logprobs should have a row for each of 12 sequences"),
        (lambda batch: batch.pop("sequences") is None, "sequences should have a row for each"),
    ],
)  # fmt: skip
def test_a_batch_padded_otherwise_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = skyrl_with(tmp_path, lambda content: change(content["batch_dict"]))
    with pytest.raises(DumpError, match=message):
        imported("skyrl", [path], tmp_path / "out", trust_pickle=True)


NONSENSE: dict[str, Any] = {
    "nothing": None, "text": "x", "number": 3, "negative": -1, "nan": float("nan"), "empty": [], "list": [1, 2],
    "ragged": [[1], [2, 3]], "dict": {"a": 1}, "huge": 2**70, "nothings": [None] * 12, "texts": ["a"] * 12,
    "scalar": torch.zeros(()), "tensor": torch.zeros(3), "matrix": torch.zeros(3, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("slime/rollout_data/0.pt", lambda content: content["samples"][0]),
        ("slime/train_data/0.pt", lambda content: content["samples"][0]),
        ("miles/train_data/0_0.pt", lambda content: content["rollout_data"]),
        ("miles/train_data/0_0.pt", lambda content: content),
        ("skyrl/dumped_data/global_step_1_training_input.pkl", lambda content: content["batch_dict"]),
        ("skyrl/dumped_data/global_step_1_training_input.pkl", lambda content: content["metadata"]),
    ],
)
def test_nonsense_in_a_dump_is_one_line_or_makes_no_difference(
    tmp_path: Path, file: str, place: Callable[[Any], dict[str, Any]]
) -> None:
    """A value of another kind at a random place: refused as a DumpError, or read where nothing depends on it.

    Bug: a column that was a number, or missing, ended in a TypeError or KeyError and a traceback.
    """
    form, rng = file.split("/")[0], np.random.default_rng(SEED)
    shutil.copytree(DUMPS / form, tmp_path / form)
    files = [path for path in expand([tmp_path / form]) if IMPORTERS[form].is_one(path)]
    n_refused = 0
    for _ in range(20):
        content = read_pickle(DUMPS / file) if form == "skyrl" else torch.load(DUMPS / file, weights_only=False)
        what, name = rng.choice(list(NONSENSE)), rng.choice(list(place(content)))
        value = NONSENSE[what]
        place(content)[name] = value.numpy() if form == "skyrl" and isinstance(value, torch.Tensor) else value
        if form == "skyrl":
            content["batch_dict"] = {key: skyrl_tensor(item) for key, item in content["batch_dict"].items()}
            (tmp_path / file).write_bytes(skyrl_pickle(content))
        else:
            torch.save(content, tmp_path / file)
        try:
            for step in IMPORTERS[form].read(files, Options(trust_pickle=True))[:1]:
                list(step.rollouts)
        except DumpError:
            n_refused += 1
    assert n_refused > 0
