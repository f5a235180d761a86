"""Whole files of nonsense: the seal and the digest are right, what they vouch for makes no sense."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_engine import create_scripted_run, make_scripted_run

from moediag.errors import AlignmentError, CorruptRunError, DiskFullError, IncompleteRunError, RunError
from moediag.hygiene import check_run
from moediag.run.capture import TOKEN_COLUMNS, Capture, decode_capture, decode_tokens, encode_capture
from moediag.run.files import read_sealed, sha256_bytes, write_sealed
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_scripted_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("expert_ids_TLK", lambda a: a + 7),
        ("expert_ids_TLK", lambda a: a[:, :1]),
        ("gate_weights_TLK", lambda a: a[:, :, :1]),
        ("margin_TL", lambda a: a[:, :1]),
        ("logit_margin_TL", lambda a: np.concatenate([a, a], axis=1)),
    ],
)
def test_arrays_of_other_layers_or_experts_are_never_paired(run: Run, name: str, change: object) -> None:
    """`analyze --force` on whole files of the wrong shape used to end in an IndexError or a failed broadcast."""
    shard = run.shards[0]
    arrays = run.capture("train", shard).arrays()
    capture = Capture(**{**arrays, name: change(arrays[name])})  # type: ignore[operator]
    path = run.path / "arms/train/shard-00000.safetensors"
    data = encode_capture(capture, 255, {})
    path.write_bytes(data)
    sidecar = path.with_suffix(".json")
    write_sealed(sidecar, {**read_sealed(sidecar), "data_sha256": sha256_bytes(data)})
    with pytest.raises(AlignmentError, match="capture it again"):
        next(open_run(run.path).pair("infer", "train").blocks())


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("prompts",), 5, "prompts should be an object, found 5"),
        (("prompts",), {}, "lacks 'prompts.n'"),
        (("shards", 1, "first_sequence"), 9, "unusable shard table at entry 1"),
        (("shards", 1, "n_sequences"), 10**18, "unusable shard table at entry 1"),
        (("shards", 1, "n_sequences"), "2", "shards.1.n_sequences should be a valid integer, found '2'"),
        (("shards",), [], "shards should be a list of shards, found none"),
        (("sampling",), {"temperature": "hot"}, "sampling.temperature should be a valid number"),
        (("tokens", "arm"), None, "an arm is named where they are sampled"),
        (("full_vocab",), -1, "full_vocab should be greater than or equal to 0"),
        (("main_pair",), ["train"], "main_pair.1"),
        (("written_by",), "x", "has 'written_by', which this version does not know"),
        (("schema_version",), True, "schema_version True"),
    ],
)
def test_a_sealed_manifest_that_makes_no_sense_is_refused(
    run: Run, keys: tuple[str | int, ...], value: object, complaint: str
) -> None:
    """A seal says that a file is whole, not that it makes sense: nonsense used to surface anywhere, as a traceback."""
    write_sealed(run.path / "run.json", changed(read_sealed(run.path / "run.json"), keys, value))
    with pytest.raises(RunError) as error:
        open_run(run.path)
    assert complaint in str(error.value)


def changed(content: dict[str, object], keys: tuple[str | int, ...], value: object) -> dict[str, object]:
    """The content with one value, however deep, replaced."""
    node: object = content
    for key in keys[:-1]:
        node = node[key]  # type: ignore[index]
    node[keys[-1]] = value  # type: ignore[index]
    return content


def test_a_sealed_sidecar_or_arm_record_that_makes_no_sense_is_refused(run: Run) -> None:
    """Missing keys and other types in sidecars and arm.json used to be KeyErrors and TypeErrors."""
    sidecar, record = run.path / "arms/train/shard-00000.json", run.path / "arms/train/arm.json"
    write_sealed(sidecar, {**read_sealed(sidecar), "tokens_sha256": None})
    with pytest.raises(CorruptRunError, match="tokens_sha256 should be a valid string"):
        run.capture("train", run.shards[0])
    write_sealed(record, {**read_sealed(run.path / "arms/infer/arm.json")})
    with pytest.raises(CorruptRunError, match="is of arm 'infer', wanted 'train'"):
        run.arm("train")


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        (("disagreements",), 5, "disagreements should be a valid"),
        (("role",), "trainer", "role should be 'infer', 'train' or 'reference'"),
        (("variant_of",), "infer", "variant_of and change belong together"),
        (("arrays",), ["entropy_T"], "arrays lack logp_T"),
        (("routers",), [], "arrays have expert ids, and there are no routers"),
        (("routers", 0, "top_k"), "2", "routers.0.top_k should be a valid integer"),
        (("routers", 0, "top_k"), 99, "top_k = 99 of n_experts = 8 is no routing"),
        (("routers", 0, "decoder_layer"), 3, "decoder layers should rise"),
        (("checkpoint",), None, "checkpoint is null without a reason"),
        (("origin", "kind"), "guessed", "origin"),
    ],
)
def test_a_sealed_arm_record_that_makes_no_sense_is_refused(
    run: Run, keys: tuple[str | int, ...], value: object, complaint: str
) -> None:
    path = run.path / "arms/train/arm.json"
    content = changed(read_sealed(path), keys, value)
    write_sealed(path, content)
    with pytest.raises(CorruptRunError) as error:
        run.arm("train")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoints_record_that_makes_no_sense_is_refused_and_found(run: Run) -> None:
    path = run.path / "checkpoints" / f"{run.record.checkpoint}.json"
    write_sealed(path, {**read_sealed(path), "n_vocabulary": "many"})
    with pytest.raises(CorruptRunError, match="n_vocabulary should be a valid integer"):
        run.checkpoint_of("train")
    assert "damaged" in {finding.rule for finding in check_run(run)}
    write_sealed(path, {**read_sealed(path), "n_vocabulary": 5, "weights_sha256": "another"})
    assert "is of another checkpoint" in " ".join(finding.message for finding in check_run(run))


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [("seq_id", ["0", "1"], "seq_id should be int64, found"), ("token_id", [1.5, 2.0], "found double"),
     ("is_response", [None, True], "1 nulls"), ("position", None, "found absent")],
)  # fmt: skip
def test_a_token_table_of_other_columns_is_refused(name: str, values: list[object] | None, complaint: str) -> None:
    """Columns of other types used to be cast without a word: 1.5 became token 1, text became numbers."""
    columns = {"seq_id": [0, 0], "prompt_id": [0, 0], "sample_index": [0, 0], "position": [0, 1], "token_id": [1, 2],
               "is_response": [False, True]}  # fmt: skip
    arrays = {key: pa.array(column, TOKEN_COLUMNS[key]) for key, column in columns.items()}
    del arrays[name]
    sink = io.BytesIO()
    pq.write_table(pa.table({**arrays, **({} if values is None else {name: pa.array(values)})}), sink)
    with pytest.raises(CorruptRunError, match=complaint):
        decode_tokens(sink.getvalue(), "here")


@pytest.mark.parametrize(("name", "dtype"), [("expert_ids_TLK", "F32"), ("logp_T", "U8"), ("margin_TL", "F64")])
def test_arrays_of_other_dtypes_are_refused(name: str, dtype: str) -> None:
    """Expert ids stored as floats used to end in a ValueError of numpy's iinfo."""
    import safetensors.numpy

    arrays = {"logp_T": np.zeros(2, "f4"), "entropy_T": np.zeros(2, "f4"), "margin_TL": np.zeros((2, 1), "f4"),
              "expert_ids_TLK": np.zeros((2, 1, 1), "u1")}  # fmt: skip
    arrays[name] = arrays[name].astype({"F32": "f4", "U8": "u1", "F64": "f8"}[dtype])
    with pytest.raises(CorruptRunError, match=f"array {name} has dtype {dtype}"):
        decode_capture(safetensors.numpy.save(arrays), "here")


def test_an_arm_whose_record_is_lost_says_what_to_do(run: Run) -> None:
    """Seal of who made a shard needs arm.json; without it, capturing on used to begin the arm under a new name."""
    (run.path / "arms/train/arm.json").unlink()
    with pytest.raises(IncompleteRunError, match="no arm train"):
        RunWriter(run).write_capture(
            "train", run.shards[0], run.tokens(run.shards[0]), run.capture("train", run.shards[0]), {}, {}
        )


def test_a_disk_too_full_to_begin_a_run_is_told_as_such(tmp_path: Path) -> None:
    """Running out of space while a run is made must not be told as a folder that cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(DiskFullError, match="no space to write"):
            create_scripted_run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
