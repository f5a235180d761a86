"""The run directory: round trips, atomicity, damage, versions, configuration, alignment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import HUNT, SEED
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from records import arm_of, checkpoint_of, made_otherwise, new_run

from moediag.errors import (
    AlignmentError,
    CorruptRunError,
    IncompleteRunError,
    RunConflictError,
    RunError,
    SchemaVersionError,
)
from moediag.hygiene import check_run
from moediag.run.capture import Capture, TokenRows, bytes_per_token, decode_capture, encode_capture, encode_prompts
from moediag.run.create import bring_back, drop_replaced, replaced
from moediag.run.files import (
    canonical_json,
    digest_of,
    process_tag,
    read_sealed,
    rows_prefix,
    write_sealed,
)
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

N_EXPERTS, TOP_K, LAYERS = 8, 2, (1, 3)
PROMPTS = encode_prompts([[1, 2, 3], [4], [5, 6]], None)
LENGTHS = [(3, 4), (1, 2), (2, 5)]  # (prompt, response) tokens of each sequence


def tokens_of(first: int, lengths: list[tuple[int, int]]) -> TokenRows:
    total = [p + r for p, r in lengths]
    seq_ids = np.arange(first, first + len(lengths))
    return TokenRows(
        seq_id_T=np.repeat(seq_ids, total).astype(np.int64),
        prompt_id_T=np.repeat(seq_ids, total).astype(np.int64),
        sample_index_T=np.zeros(sum(total), np.int32),
        position_T=np.concatenate([np.arange(n) for n in total]).astype(np.int32),
        token_id_T=np.arange(sum(total), dtype=np.int64) + 10 * first,
        is_response_T=np.concatenate([np.arange(p + r) >= p for p, r in lengths]),
    )


def capture_of(tokens: TokenRows, seed: int, last_row: bool) -> Capture:
    rng = np.random.default_rng(seed)
    n = len(tokens)
    ids = np.argsort(rng.random((n, len(LAYERS), N_EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.int16)
    margin = rng.random((n, len(LAYERS))).astype(np.float32)
    if not last_row:
        ends = [end - 1 for _, end in tokens.sequence_bounds()]
        ids[ends], margin[ends] = -1, np.nan
    logp = np.where(tokens.is_response_T, -rng.random(n), np.nan).astype(np.float32)
    return Capture(
        logp_T=logp,
        entropy_T=np.abs(logp),
        expert_ids_TLK=ids,
        gate_weights_TLK=np.full(ids.shape, 0.5, np.float32),
        margin_TL=margin,
        logit_margin_TL=margin,
    )


CHECKPOINT = checkpoint_of(LAYERS, N_EXPERTS, TOP_K)


def create(path: Path, force: bool = False, **changes: object) -> Run:
    asked = {"weights_sha256": CHECKPOINT.weights_sha256, "max_tokens": 5, **changes}
    return new_run(path, PROMPTS, 3, 2, CHECKPOINT, force, configuration=asked)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A complete run of two shards with both arms."""
    run = create(tmp_path / "run")
    writer = RunWriter(run)
    for arm in ("infer", "train"):
        writer.begin_arm(arm_of(run, arm))
    for shard in run.shards:
        tokens = tokens_of(shard.first_sequence, LENGTHS[shard.first_sequence :][: shard.n_sequences])
        for arm in ("infer", "train"):
            capture = capture_of(tokens, seed=shard.index, last_row=arm == "train")
            writer.write_capture(arm, shard, tokens, capture, {}, {"gate_weights_TLK": "bfloat16"})
        writer.write_tokens(shard, tokens)
    return open_run(run.path)


def test_a_capture_comes_back_bit_for_bit(run: Run) -> None:
    for shard in run.shards:
        tokens = run.tokens(shard)
        for arm in ("infer", "train"):
            wanted = capture_of(tokens, seed=shard.index, last_row=arm == "train").arrays()
            found = run.capture(arm, shard).arrays()
            assert wanted.keys() == found.keys()
            for name, array in wanted.items():
                np.testing.assert_array_equal(array, found[name])
                assert array.dtype == found[name].dtype


def test_a_healthy_run_has_no_findings(run: Run) -> None:
    assert check_run(run) == []


@given(
    array=hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.floats(width=16)),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_scores_round_trip_exactly_in_the_engines_dtype(array: np.ndarray, dtype: str) -> None:
    n = len(array)
    capture = Capture(np.zeros(n, np.float32), np.zeros(n, np.float32), gate_weights_TLK=array)
    back = decode_capture(encode_capture(capture, 0, {"gate_weights_TLK": dtype}), "here")
    np.testing.assert_array_equal(back.gate_weights_TLK, array)


def test_narrowing_that_would_lose_bits_is_refused() -> None:
    capture = Capture(np.zeros(1, np.float32), np.zeros(1, np.float32), gate_weights_TLK=np.full((1, 1, 1), 0.1, "f4"))
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match="not exact"):
            encode_capture(capture, 0, {"gate_weights_TLK": dtype})


@pytest.mark.parametrize(("n_experts", "width"), [(8, 1), (255, 1), (256, 2), (512, 2)])
def test_expert_ids_take_one_byte_up_to_255_experts(n_experts: int, width: int) -> None:
    ids = np.array([[[0, n_experts - 1]], [[-1, -1]]], np.int16)
    capture = Capture(np.zeros(2, np.float32), np.zeros(2, np.float32), expert_ids_TLK=ids)
    data = encode_capture(capture, n_experts, {})
    np.testing.assert_array_equal(decode_capture(data, "here").expert_ids_TLK, ids)
    assert bytes_per_token(1, 2, n_experts)["expert_ids_TLK"] == 2 * width


def test_bytes_per_token_of_qwen3_30b_a3b_are_those_of_the_design() -> None:
    sizes = bytes_per_token(n_layers=48, top_k=8, n_experts=128, weight_bytes=2, logits_bytes=2)
    assert sizes["expert_ids_TLK"] == 384
    assert sizes["margin_TL"] == 192
    assert sizes["gate_weights_TLK"] == 768
    assert sizes["router_logits_TLE"] == 12288


def test_a_flipped_byte_in_any_file_is_found(run: Run) -> None:
    """Damage anywhere in a run's files must be found: random positions of every file, one bit each."""
    rng, n_flips = np.random.default_rng(SEED), 10 * HUNT
    for path in sorted(p for p in run.path.rglob("*") if p.is_file()):
        original = path.read_bytes()
        positions = rng.choice(len(original), min(n_flips, len(original)), replace=False)
        for position in positions:
            damaged = bytearray(original)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            assert _is_found(run.path), f"{path.name} byte {position}"
        path.write_bytes(original)
    assert not _is_found(run.path)


def _is_found(path: Path) -> bool:
    try:
        return bool(check_run(open_run(path)))
    except RunError:
        return True


def test_a_run_of_a_newer_schema_is_refused_in_one_line(run: Run) -> None:
    content = {**read_sealed(run.path / "run.json"), "schema_version": 999}
    write_sealed(run.path / "run.json", content)
    with pytest.raises(SchemaVersionError, match="schema_version 999.*upgrade"):
        open_run(run.path)


def test_another_configuration_is_refused_and_changes_nothing(run: Run) -> None:
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(RunConflictError, match="max_tokens: 5 there, 6 given"):
        create(run.path, max_tokens=6)
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def test_the_same_configuration_opens_the_run_that_is_there(run: Run) -> None:
    assert create(run.path).is_complete("infer")


def test_force_starts_anew(run: Run) -> None:
    assert create(run.path, force=True, max_tokens=6).arms() == []


def test_a_replaced_run_comes_back_while_the_new_one_holds_no_shard(run: Run) -> None:
    """Bug: --force removed the finished run before the new one was known to start."""
    before = contents(run.path)
    new = create(run.path, force=True, max_tokens=6)
    assert new.arms() == []
    assert contents(replaced(run.path)) == before
    failed = bring_back(run.path)
    assert contents(run.path) == before
    assert failed is not None
    assert not replaced(run.path).exists()
    assert open_run(failed).record == new.record
    assert bring_back(run.path) is None


def test_a_replaced_run_is_kept_once_the_new_one_holds_a_shard(run: Run) -> None:
    before = contents(run.path)
    shard, tokens, capture = run.shards[0], run.tokens(run.shards[0]), run.capture("infer", run.shards[0])
    new = create(run.path, force=True, max_tokens=6)
    RunWriter(new).begin_arm(arm_of(new, "infer"))
    RunWriter(new).write_capture("infer", shard, tokens, capture, {}, {})
    assert bring_back(run.path) is None
    assert open_run(run.path).arms() == ["infer"]
    assert contents(replaced(run.path)) == before
    create(run.path, force=True, max_tokens=7)  # of two, the one that was finished is kept
    assert contents(replaced(run.path)) == before
    drop_replaced(run.path)
    assert open_run(run.path).record.configuration["max_tokens"] == 7
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_a_new_run_that_a_living_process_is_about_to_fill_stays(run: Run) -> None:
    new = create(run.path, force=True, max_tokens=6)
    with RunWriter(new).in_use():
        assert bring_back(run.path) is None
        assert open_run(run.path).record.configuration["max_tokens"] == 6


def test_the_next_command_undoes_a_force_that_was_killed_before_it_captured_anything(run: Run) -> None:
    """Killed between the two renames, or with the new run in place: the old one is opened, not a third one made."""
    before = contents(run.path)
    create(run.path, force=True, max_tokens=6)
    create(run.path)
    assert contents(run.path) == before
    run.path.rename(replaced(run.path))
    create(run.path)
    assert contents(run.path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(RunError, match="holds no run.json"):
            create(tmp_path, force=force)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_kill_while_a_run_is_made_leaves_nothing_that_stops_the_next_try(tmp_path: Path) -> None:
    """A run folder used to be filled in place: a kill before run.json made it a folder that is no run."""
    half_made = tmp_path / f".run.{process_tag(4194303)}.new"  # above the largest process id
    half_made.mkdir()
    (half_made / "prompts.parquet").write_bytes(b"half")
    assert create(tmp_path / "run").missing_shards("infer")
    assert not half_made.exists()


def test_another_arm_configuration_is_refused(run: Run) -> None:
    with pytest.raises(RunConflictError, match="dtype"):
        RunWriter(run).begin_arm(made_otherwise(arm_of(run, "train"), configuration={"dtype": "float32"}))


def test_a_shard_without_its_sidecar_is_missing(run: Run) -> None:
    (run.path / "arms/train/shard-00001.json").unlink()
    assert [shard.index for shard in run.missing_shards("train")] == [1]
    with pytest.raises(IncompleteRunError, match="lacks 1 of 2 shards"):
        run.pair("train", "infer")


def test_an_arm_of_other_tokens_is_not_paired(run: Run) -> None:
    shard = run.shards[0]
    tokens = run.tokens(shard)
    other = TokenRows(**{**vars(tokens), "token_id_T": tokens.token_id_T + 1})
    RunWriter(run).write_capture("train", shard, other, run.capture("train", shard), {}, {})
    with pytest.raises(AlignmentError, match="scored other tokens"):
        list(run.pair("train", "infer").blocks())
    assert "token-identity" in {finding.rule for finding in check_run(run)}


def test_alignment_takes_the_routing_row_before_each_response_token(run: Run) -> None:
    """Worked by hand: sequence 0 has 3 prompt and 4 response tokens, so routing rows 2..5 stand behind it."""
    block = next(run.pair("infer", "train").blocks())
    capture = run.capture("infer", run.shards[0])
    assert block.expert_ids_infer_TLK is not None
    np.testing.assert_array_equal(block.expert_ids_infer_TLK[:4], capture.expert_ids_TLK[2:6])
    np.testing.assert_array_equal(block.logp_infer_T[:4], capture.logp_T[3:7])
    np.testing.assert_array_equal(block.position_T, [0, 1, 2, 3, 0, 1])
    assert (block.expert_ids_infer_TLK >= 0).all()  # the sampled last token's missing row is never needed


def test_the_sign_does_not_depend_on_the_order_asked(run: Run) -> None:
    one, other = run.pair("train", "infer"), run.pair("infer", "train")
    assert one.name == other.name == "infer~train"
    assert (one.minuend, one.subtrahend) == (other.minuend, other.subtrahend) == ("train", "infer")


def test_only_dead_attempts_at_this_very_run_are_removed(tmp_path: Path) -> None:
    """Any folder called .run.*.new used to be removed, a user's own and a living process's included."""
    others = [".run.notes.new", ".run.b.123.new", f".run.{process_tag(os.getppid())}.new", ".run.other-1.new"]
    for name in (*others, f".run.{process_tag(4194303)}.new", f".run.{process_tag(4194303)}.old"):
        (tmp_path / name).mkdir()
    (tmp_path / f".run.{process_tag(7)}.new").write_text("a file")
    create(tmp_path / "run")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run", *others, f".run.{process_tag(7)}.new"}


def test_following_the_advice_for_a_damaged_shard_repairs_the_run(run: Run) -> None:
    """Deleting a damaged data file used to leave its sidecar, and the shard counted as captured."""
    path = run.path / "arms/train/shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptRunError, match="delete it and run the same capture again"):
        run.capture("train", run.shards[1])
    path.unlink()
    assert [shard.index for shard in run.missing_shards("train")] == [1]


def test_an_arm_is_not_filled_by_two_versions(run: Run) -> None:
    """Resuming with another engine version used to be accepted under the old version's name."""
    writer, record, shard = RunWriter(run), arm_of(run, "train-replay"), run.shards[0]
    writer.begin_arm(made_otherwise(record, versions={"torch": "2.13.0"}))
    writer.write_capture("train-replay", shard, run.tokens(shard), run.capture("train", shard), {}, {})
    with pytest.raises(RunConflictError, match="torch"):
        writer.begin_arm(made_otherwise(record, versions={"torch": "2.12.0"}))


def test_one_arms_writer_leaves_the_tokens_of_another_alone(run: Run) -> None:
    """A train writer used to clean up the temporary token table of a living infer writer."""
    mine, other = run.shards
    (run.path / "tokens" / ".shard-00000.parquet.1.tmp").write_bytes(b"being written")
    rows = [run.path / "arms" / "infer" / f"{rows_prefix(shard.stem)}abc" for shard in (mine, other)]
    for folder in rows:
        folder.mkdir()
    with RunWriter(run).claim("train", mine):
        assert (run.path / "tokens" / ".shard-00000.parquet.1.tmp").exists()
    with RunWriter(run).claim("infer", mine):
        assert not (run.path / "tokens" / ".shard-00000.parquet.1.tmp").exists()
        assert [folder.exists() for folder in rows] == [False, True]


def test_a_manifest_of_values_that_are_no_json_is_refused(run: Run) -> None:
    """NaN and lone surrogates in run.json used to escape as ValueError and UnicodeEncodeError."""
    for text in ('{"a": NaN}', '{"a": "\\ud800"}', '{"a": ' + "9" * 5000 + "}", "[" * 100_000):
        (run.path / "run.json").write_text(text)
        with pytest.raises(CorruptRunError):
            open_run(run.path)


def test_the_current_folder_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-o .` used to end in a traceback: the folder is replaced as a whole, which the current one cannot be."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="the current folder"):
        create(Path())


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (lambda c: _with(c, "logp_T", lambda a: np.where(a < -0.5, np.nan, a)), "D31-nan-logp"),
        (lambda c: _with(c, "logp_T", lambda a: np.where(a < -0.5, -np.inf, a)), "D31-impossible-logp"),
        (lambda c: _with(c, "expert_ids_TLK", lambda a: np.full_like(a, 3)), "D03-duplicate-ids"),
        (lambda c: _with(c, "expert_ids_TLK", lambda a: np.where(np.arange(len(a))[:, None, None] == 1, -1, a)),
         "completeness"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_by_its_rule(run: Run, fault: object, rule: str) -> None:
    shard = run.shards[0]
    capture = fault(run.capture("train", shard))  # type: ignore[operator]
    RunWriter(run).write_capture("train", shard, run.tokens(shard), capture, {}, {})
    assert rule in {finding.rule for finding in check_run(run)}


def _with(capture: Capture, name: str, change: object) -> Capture:
    return Capture(**{**capture.arrays(), name: change(capture.arrays()[name])})  # type: ignore[operator]


@settings(deadline=None)  # every example is flushed to disk
@given(st.dictionaries(st.text(max_size=5).filter(lambda k: k != "sha256"), st.integers() | st.text(max_size=5)))
def test_a_sealed_file_round_trips(content: dict[str, object]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        try:
            write_sealed(path, content)
        except UnicodeEncodeError:
            return  # a lone surrogate is no text and never reaches a run
        found = read_sealed(path)
        assert {k: v for k, v in found.items() if k != "sha256"} == content
        assert found["sha256"] == digest_of(content)
        assert path.read_text() == canonical_json(json.loads(path.read_text()))


def test_tokens_that_are_no_prompt_and_response_are_refused() -> None:
    tokens = tokens_of(0, [(2, 2)])
    for response in ([True, False, True, True], [False, True, False, True]):
        with pytest.raises(CorruptRunError, match="prompt followed by a response"):
            TokenRows(**{**vars(tokens), "is_response_T": np.array(response)}).check("here")
    with pytest.raises(CorruptRunError, match="prompt rows are marked as trained"):
        TokenRows(**{**vars(tokens), "is_trained_T": np.ones(4, bool)}).check("here")
