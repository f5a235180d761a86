"""Numbers of runs that schema 1 could not hold, from the writer to the summary, held against plain loops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moediag.cli.main import main
from moediag.corrections.sources import run_source
from moediag.errors import DumpError
from moediag.hygiene import check_run
from moediag.results import analyze_run, load_frames, report_run
from moediag.run.capture import Capture, TokenRows, split_into_shards
from moediag.run.create import create_run
from moediag.run.reader import Run, open_run
from moediag.run.records import ArmRecord, Imported, Router, RunRecord, TokensFrom
from moediag.run.writer import RunWriter

N_PROMPTS = 12
"""Enough for intervals."""
Layer = tuple[int, int, int]
"""(decoder layer, E, K)."""
LAYERS: tuple[Layer, ...] = ((1, 8, 2), (3, 8, 2))


def token_rows(prompt: int = 2, response: int = 8, **columns: Any) -> TokenRows:
    """Sequences of equal lengths, one per prompt; further columns by name."""
    n = prompt + response
    seq_id_T = np.repeat(np.arange(N_PROMPTS), n)
    position_T = np.tile(np.arange(n), N_PROMPTS)
    rows: dict[str, Any] = {
        "seq_id_T": seq_id_T.astype(np.int64),
        "prompt_id_T": seq_id_T.astype(np.int64),
        "sample_index_T": np.zeros(len(seq_id_T), np.int32),
        "position_T": position_T.astype(np.int32),
        "token_id_T": np.random.default_rng(1).integers(0, 500, len(seq_id_T)),
        "is_response_T": position_T >= prompt,
    }
    return TokenRows(**{**rows, **columns})


def captured(tokens: TokenRows, layers: Sequence[Layer] = (), seed: int = 0) -> Capture:
    """Log-probabilities that other seeds move by some 0.02 nat, and experts of which other seeds move some."""
    shared, own = np.random.default_rng(0), np.random.default_rng([1, seed])
    n = len(tokens)
    logp_T = -0.1 - shared.exponential(1.0, n) + 0.02 * own.normal(size=n).clip(-2, 2)
    entropy_T = shared.random(n) + 0.5
    arrays = {
        name: np.where(tokens.is_response_T, array, np.nan).astype(np.float32)
        for name, array in (("logp_T", logp_T), ("entropy_T", entropy_T))
    }
    if not layers:
        return Capture(**arrays)
    width = max(top_k for _, _, top_k in layers)
    ids_TLK = np.full((n, len(layers), width), -1, np.int16)
    for i, (_, n_experts, top_k) in enumerate(layers):
        scores_TE = shared.normal(size=(n, 8))[:, :n_experts] + 0.2 * own.normal(size=(n, n_experts))
        ids_TLK[:, i, :top_k] = np.argsort(-scores_TE, axis=1)[:, :top_k]
    return Capture(**arrays, expert_ids_TLK=ids_TLK)


def arm(name: str, role: str, capture: Capture, layers: Sequence[Layer] = (), **changes: Any) -> ArmRecord:
    """An arm that was imported, without a checkpoint."""
    record: dict[str, Any] = {
        "name": name,
        "role": role,
        "engine": "dump",
        "no_checkpoint": "the dump names none",
        "origin": Imported(format="dump", files={"tokens.parquet": "0"}),
        "arrays": tuple(capture.arrays()),
        "routers": tuple(Router(decoder_layer=at, n_experts=e, top_k=k) for at, e, k in layers),
    }
    return ArmRecord(**{**record, **changes})


def write(path: Path, tokens: TokenRows, *arms: tuple[ArmRecord, Capture], **changes: Any) -> Run:
    """An imported run: no prompts, no sampling, no tokenizer, no checkpoint; in three shards."""
    record: dict[str, Any] = {
        "moediag_version": "0",
        "tokens": TokensFrom(origin="imported"),
        "shards": tuple(split_into_shards(N_PROMPTS, 5)),
    }
    run = create_run(path, RunRecord(**{**record, **changes}), None, None)
    writer = RunWriter(run)
    for shard in run.shards:
        writer.write_tokens(shard, rows_of(tokens, np.isin(tokens.seq_id_T, list(shard.seq_ids))))
    for one, capture in arms:
        writer.begin_arm(one)
        for shard in run.shards:
            keep_T = np.isin(tokens.seq_id_T, list(shard.seq_ids))
            part = Capture(**{name: array[keep_T] for name, array in capture.arrays().items()})
            writer.write_capture(one.name, shard, rows_of(tokens, keep_T), part, {}, {})
    return open_run(path)


def rows_of(tokens: TokenRows, keep_T: np.ndarray) -> TokenRows:
    return TokenRows(**{name: None if column is None else column[keep_T] for name, column in vars(tokens).items()})


def pair_of(path: Path, tokens: TokenRows, train: Capture, infer: Capture, layers: Sequence[Layer] = ()) -> Run:
    """A run of two arms that have the same routers."""
    return write(
        path,
        tokens,
        (arm("infer", "infer", infer, layers if infer.is_routed else ()), infer),
        (arm("train", "train", train, layers if train.is_routed else ()), train),
    )


def whole(run: Run) -> dict[str, np.ndarray]:
    """The main pair's blocks as one."""
    blocks = [vars(block) for block in run.pair(*run.main_arms).blocks()]
    return {
        name: np.concatenate([block[name] for block in blocks])
        for name, value in blocks[0].items()
        if value is not None
    }


def differences(tokens: TokenRows, train: Capture, infer: Capture) -> Iterator[tuple[int, float]]:
    """(sequence, logp_diff) of every row that counts, by a plain loop."""
    for row in range(len(tokens)):
        is_trained = tokens.is_response_T[row] if tokens.is_trained_T is None else tokens.is_trained_T[row]
        if is_trained:
            yield int(tokens.seq_id_T[row]), float(train.logp_T[row]) - float(infer.logp_T[row])


def assert_logps(run: Run, summary: dict[str, Any], tokens: TokenRows, train: Capture, infer: Capture) -> None:
    """The main pair's log-probability metrics are those of a plain loop over the rows that count."""
    found = summary["pairs"][summary["main_pair"]]
    by_sequence: dict[int, list[float]] = {}
    for sequence, diff in differences(tokens, train, infer):
        by_sequence.setdefault(sequence, []).append(diff)
    every = [diff for diffs in by_sequence.values() for diff in diffs]
    assert found["n_tokens"] == len(every)
    assert found["n_unscored"] == 0
    assert found["n_sequences"] == len(by_sequence)
    assert found["logp"]["abs_logp_diff"]["mean"] == pytest.approx(sum(map(abs, every)) / len(every), rel=1e-5)
    assert found["logp"]["abs_logp_diff"]["max"] == pytest.approx(max(map(abs, every)), rel=1e-5)
    lengths = [abs(sum(diffs)) for diffs in by_sequence.values()]
    assert found["length"]["abs_log_ratio_mean"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-4)


def flip_rate(tokens: TokenRows, train: Capture, infer: Capture, places: Sequence[tuple[int, int, int]]) -> float:
    """Share of choices with another set, by a plain loop.

    Args:
        places: (index of the layer in train, in infer, K) of every layer compared.
    """
    assert train.expert_ids_TLK is not None
    assert infer.expert_ids_TLK is not None
    is_flip = [
        {*train.expert_ids_TLK[row - 1, a, :k].tolist()} != {*infer.expert_ids_TLK[row - 1, b, :k].tolist()}
        for row in np.flatnonzero(tokens.is_scored_T)
        if tokens.position_T[row] > 0
        for a, b, k in places
    ]
    assert 0 < sum(is_flip) < len(is_flip)
    return sum(is_flip) / len(is_flip)


def errors(run: Run) -> list[str]:
    return [found.line() for found in check_run(run) if found.level == "error"]


def tool_turns() -> TokenRows:
    """Response tokens 3 and 4 of 8 are a tool's, between two turns."""
    tokens = token_rows()
    response_T = tokens.position_T - 2
    is_tool_T = np.isin(response_T, (3, 4))
    return replace(
        tokens,
        is_trained_T=tokens.is_response_T & ~is_tool_T,
        turn_T=np.where(response_T < 0, -1, np.where(response_T < 5, 0, 1)).astype(np.int32),
        weight_version_T=np.array(
            [
                None if not one else f"step-{seq % 3}"
                for one, seq in zip(tokens.is_response_T, tokens.seq_id_T, strict=True)
            ],
            dtype=object,
        ),
        advantage_T=np.where(tokens.is_response_T & ~is_tool_T, tokens.seq_id_T / 7 - 0.5, np.nan),
        reward_T=np.where(tokens.is_response_T, tokens.seq_id_T % 2, np.nan).astype(np.float64),
    )


@pytest.mark.parametrize("junk", [np.nan, 3.0, -np.inf, 0.0])
def test_tokens_of_a_tool_count_nowhere(tmp_path: Path, junk: float) -> None:
    """A loss mask could not be kept: what a tool wrote, which no engine sampled, stood in every metric."""
    tokens = tool_turns()
    assert tokens.is_trained_T is not None
    is_tool_T = tokens.is_response_T & ~tokens.is_trained_T
    train, infer = captured(tokens, LAYERS, 1), captured(tokens, LAYERS)
    spoilt = [
        replace(side, logp_T=np.where(is_tool_T, junk, side.logp_T).astype(np.float32)) for side in (train, infer)
    ]
    run = pair_of(tmp_path / "run", tokens, *spoilt, LAYERS)
    assert errors(run) == []
    summary = analyze_run(run)
    assert_logps(run, summary, tokens, train, infer)
    routing = summary["pairs"]["infer~train"]["routing"]
    assert routing["flip_rate"] == pytest.approx(flip_rate(tokens, train, infer, [(0, 0, 2), (1, 1, 2)]))
    block = whole(run)
    assert block["position_T"].tolist() == [0, 1, 2, 5, 6, 7] * N_PROMPTS
    np.testing.assert_array_equal(block["token_id_T"], tokens.token_id_T[tokens.is_trained_T])
    source = run_source(run, ("infer", "train"))
    assert len(source.tokens) == tokens.is_trained_T.sum()
    np.testing.assert_array_equal(source.tokens.logp_train_T, train.logp_T[tokens.is_trained_T])
    assert load_frames(run)["tokens"]["position"].tolist() == block["position_T"].tolist()


def test_a_token_that_is_trained_and_no_response_is_refused() -> None:
    tokens = token_rows()
    with pytest.raises(Exception, match="prompt rows are marked as trained"):
        replace(tokens, is_trained_T=np.ones(len(tokens), bool)).check("here")


def test_tokens_without_ids(tmp_path: Path) -> None:
    """A dump may hold log-probabilities alone: ids are null on disk, and no reward is made up of them."""
    tokens = token_rows()
    tokens = replace(tokens, token_id_T=np.full(len(tokens), -1))
    train, infer = captured(tokens, LAYERS, 1), captured(tokens, LAYERS)
    run = pair_of(tmp_path / "run", tokens, train, infer, LAYERS)
    for shard in run.shards:
        column = pq.read_table(run.path / "tokens" / f"{shard.stem}.parquet")["token_id"]
        assert column.null_count == len(column) == len(run.tokens(shard))
        assert (run.tokens(shard).token_id_T == -1).all()
    assert check_run(run) == []
    assert_logps(run, analyze_run(run), tokens, train, infer)
    assert (load_frames(run)["tokens"]["token_id"] == -1).all()
    source = run_source(run, ("infer", "train"))
    assert "advantage" not in source.tokens.frame
    assert "no reward and no advantage" in source.reward
    with pytest.raises(DumpError, match="token ids"):
        run_source(run, ("infer", "train"), "hash")


@pytest.mark.parametrize(
    ("ours", "theirs", "common", "words"),
    [
        (((1, 8, 3), (3, 8, 3)), LAYERS, (), "2 of 2 MoE layers"),
        (((1, 8, 2), (3, 8, 2), (5, 8, 2)), LAYERS, (1, 3), "1 of 3 MoE layers .*first: decoder layer 5"),
        (((3, 8, 2), (5, 8, 2)), LAYERS, (3,), "2 of 3 MoE layers .*first: decoder layer 1"),
        (((1, 4, 2), (3, 8, 2)), LAYERS, (3,), "1 of 2 MoE layers .*first: decoder layer 1"),
    ],
)
def test_only_layers_with_the_same_choice_are_compared(
    tmp_path: Path, ours: tuple[Layer, ...], theirs: tuple[Layer, ...], common: tuple[int, ...], words: str
) -> None:
    """Layers were paired by their index, whatever stood there; another K made every choice a flip."""
    tokens = token_rows()
    train, infer = captured(tokens, ours, 1), captured(tokens, theirs)
    run = write(
        tmp_path / "run",
        tokens,
        (arm("infer", "infer", infer, theirs), infer),
        (arm("train", "train", train, ours), train),
    )
    pair = run.pair("train", "infer")
    assert pair.decoder_layer_L == common
    assert pair.top_k == (2 if common else 0)
    assert re.search(words, pair.left_out["routing"])
    assert errors(run) == []
    summary = analyze_run(run)
    assert_logps(run, summary, tokens, train, infer)
    found = summary["pairs"]["infer~train"]
    assert found["left_out"] == pair.left_out
    if not common:
        assert found["routing"] is None
        return
    places = [([at for at, _, _ in ours].index(layer), [at for at, _, _ in theirs].index(layer), 2) for layer in common]
    assert found["routing"]["flip_rate"] == pytest.approx(flip_rate(tokens, train, infer, places))
    assert sorted(set(load_frames(run)["agreement_by_layer"]["decoder_layer"]) - {-1}) == list(common)


def test_a_run_of_which_little_is_known_with_arms_of_free_names(tmp_path: Path) -> None:
    """A run had one checkpoint, prompts and sampling, and what an arm was stood in its name."""
    tokens = token_rows()
    trainer, rollout, other = (captured(tokens, LAYERS, seed) for seed in (1, 0, 2))
    run = write(
        tmp_path / "run",
        tokens,
        (arm("old policy", "train", trainer, LAYERS), trainer),
        (arm("aaa-rollout", "infer", rollout, LAYERS), rollout),
        (arm("zzz", "reference", other, LAYERS), other),
        main_pair=("old policy", "aaa-rollout"),
    )
    assert run.arms() == ["aaa-rollout", "old policy", "zzz"]
    assert run.main_arms == ("old policy", "aaa-rollout")
    assert (run.reference("train"), run.reference("infer")) == ("old policy", "aaa-rollout")
    assert run.pair_name("aaa-rollout", "zzz") == "aaa-rollout~zzz"
    assert run.checkpoint_of("old policy") is None
    assert run.arm("old policy").no_checkpoint == "the dump names none"
    assert (run.record.prompts, run.record.sampling, run.record.tokenizer) == (None, None, None)
    assert check_run(run) == []
    summary = analyze_run(run)
    assert_logps(run, summary, tokens, trainer, rollout)
    assert summary["main_pair"] == summary["observed_pair"] == "aaa-rollout~old policy"
    assert (
        summary["arms"]["old policy"] | {"origin": "imported", "checkpoint": None, "versions": None}
        == (summary["arms"]["old policy"])
    )
    assert summary["n_prompts"] == N_PROMPTS
    page = report_run(open_run(run.path)).read_text()
    assert "aaa-rollout~old policy" in page
    assert check_run(run) == []


def test_arms_without_entropies(tmp_path: Path) -> None:
    tokens = token_rows()
    with_entropy, infer = captured(tokens, LAYERS, 1), captured(tokens, LAYERS)
    for name, train in (("none", replace(with_entropy, entropy_T=None)), ("one", with_entropy)):
        bare = replace(infer, entropy_T=None)
        run = pair_of(tmp_path / name, tokens, train, bare, LAYERS)
        assert run.capture("infer", run.shards[0]).entropy_T is None
        assert "entropy_T" not in run.arm("infer").arrays
        assert check_run(run) == []
        assert_logps(run, analyze_run(run), tokens, train, bare)
        block = whole(run)
        assert np.isnan(block["entropy_infer_T"]).all()
        assert np.isnan(block["entropy_train_T"]).all() == (name == "none")


def test_sequences_that_begin_with_their_response(tmp_path: Path) -> None:
    """Prompts may be missing from a dump: the first token is scored, and nothing routed it that is known of."""
    tokens = token_rows(prompt=0)
    train, infer = captured(tokens, LAYERS, 1), captured(tokens, LAYERS)
    run = pair_of(tmp_path / "run", tokens, train, infer, LAYERS)
    assert errors(run) == []
    block = whole(run)
    is_first_T = tokens.position_T == 0
    assert block["position_T"].tolist() == list(range(8)) * N_PROMPTS
    assert (block["expert_ids_train_TLK"][is_first_T] == -1).all()
    assert train.expert_ids_TLK is not None
    np.testing.assert_array_equal(
        block["expert_ids_train_TLK"][~is_first_T], train.expert_ids_TLK[np.flatnonzero(~is_first_T) - 1]
    )
    summary = analyze_run(run)
    assert_logps(run, summary, tokens, train, infer)
    routing = summary["pairs"]["infer~train"]["routing"]
    assert routing["flip_rate"] == pytest.approx(flip_rate(tokens, train, infer, [(0, 0, 2), (1, 1, 2)]))


@pytest.mark.parametrize(
    ("layers", "compared"),
    [
        (((1, 8, 2), (3, 4, 2), (5, 8, 2)), (1, 3, 5)),
        (((1, 8, 2), (3, 8, 3), (5, 4, 2)), (1, 5)),
        (((1, 4, 1), (3, 8, 2), (5, 8, 2)), (3, 5)),
    ],
)
def test_layers_that_differ_in_e_and_k_within_an_arm(
    tmp_path: Path, layers: tuple[Layer, ...], compared: tuple[int, ...]
) -> None:
    """A run had one E and one K; here a layer with fewer is padded with -1, which is no absent choice."""
    tokens = token_rows()
    train, infer = captured(tokens, layers, 1), captured(tokens, layers)
    run = pair_of(tmp_path / "run", tokens, train, infer, layers)
    for shard in run.shards:
        keep_T = np.isin(tokens.seq_id_T, list(shard.seq_ids))
        assert train.expert_ids_TLK is not None
        np.testing.assert_array_equal(run.capture("train", shard).expert_ids_TLK, train.expert_ids_TLK[keep_T])
    assert errors(run) == []
    pair = run.pair("train", "infer")
    assert (pair.decoder_layer_L, pair.top_k) == (compared, 2)
    assert ("routing" in pair.left_out) == (len(compared) < len(layers))
    summary = analyze_run(run)
    assert_logps(run, summary, tokens, train, infer)
    indices = [[at for at, _, _ in layers].index(layer) for layer in compared]
    found = summary["pairs"]["infer~train"]["routing"]
    assert found["flip_rate"] == pytest.approx(flip_rate(tokens, train, infer, [(i, i, 2) for i in indices]))


def test_commands_take_a_run_whose_arms_are_called_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diff-env of one run requested arms infer and train, by these names, and for a capture of them."""
    tokens = tool_turns()
    train, infer = captured(tokens, LAYERS, 1), captured(tokens, LAYERS)
    run = write(
        tmp_path / "run",
        tokens,
        (arm("rollout", "infer", infer, LAYERS), infer),
        (arm("old policy", "train", train, LAYERS), train),
    )
    for command in (["validate"], ["diff-env"], ["diff-env", str(run.path)], ["simulate", "--method", "icepop"]):
        assert main([command[0], str(run.path), *command[1:]]) == 0, capsys.readouterr().err
    assert "rollout against old policy" in capsys.readouterr().out
    assert check_run(run) == []
