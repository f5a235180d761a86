"""The arm that transformers' own generate decodes: role infer, engine transformers; real models, real processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MOEDIAG, run_here, write_jsonl
from test_engines_arms import Silent
from test_engines_resume import captured, kill_when, wait_until_engines_are_gone

from moediag.cli.main import main
from moediag.engines.arms import arm_request
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.launch import arm_options
from moediag.engines.plan import SamplingOptions, make_plan
from moediag.engines.process import Held
from moediag.hygiene import check_run
from moediag.run.reader import Run, open_run
from moediag.run.writer import RunWriter

pytestmark = pytest.mark.engines

WORDS = ("for", "while", "assert", "import", "return")
OPTIONS = ("--max-tokens", 12, "--shard-size", 1, "--dtype", "float32", "--router-logits", "full")
RING = Path(__file__).parent / "fixtures" / "ring-tiny"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, object]] = [
        {"prompt": f"The {word} statement is" + " so" * i} for i, word in enumerate(WORDS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def run(random_moe: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sampled by generate and scored teacher-forced, both in float32."""
    path = tmp_path_factory.mktemp("generated") / "run"
    for arguments in (("infer-generate", random_moe, "--prompts", prompts, *OPTIONS), ("train", random_moe)):
        done = run_here("capture", *arguments, "-o", path, *(() if "--dtype" in arguments else OPTIONS[4:6]))
        assert done.returncode == 0, done.stderr
    return open_run(path)


def test_in_float32_decoding_with_a_cache_gives_what_teacher_forcing_gives(run: Run) -> None:
    record = run.arm("infer-generate")
    assert (record.role, record.engine, record.path, record.variant_of) == ("infer", "transformers", "sampled", None)
    assert (run.sampler, run.main_arms) == ("infer-generate", ("train", "infer-generate"))
    for shard in run.shards:
        tokens = run.tokens(shard)
        last_T = np.r_[np.diff(tokens.seq_id_T) != 0, True]  # sampled and never consumed
        infer, train = (run.capture(arm, shard) for arm in ("infer-generate", "train"))
        assert np.array_equal(np.isnan(infer.logp_T), ~tokens.is_response_T)
        for name, ours in infer.arrays().items():
            theirs = train.arrays()[name]
            if ours.ndim == 1:
                np.testing.assert_allclose(ours, theirs, atol=2e-5)
            elif name == "expert_ids_TLK":
                assert (ours[last_T] == -1).all()
                assert np.array_equal(np.sort(ours[~last_T], axis=2), np.sort(theirs[~last_T], axis=2))
            else:
                assert np.isnan(ours[last_T]).all()
                np.testing.assert_allclose(np.sort(ours[~last_T]), np.sort(theirs[~last_T]), atol=5e-5)
        vocab = run.load_vocab("infer-generate", shard)
        assert vocab is not None
        assert vocab.flaw(tokens, infer.logp_T, np.array(shard.seq_ids)) == ""


def test_the_run_is_analysed_and_its_pages_name_the_engine(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(run.path)]) == 0
    assert main(["report", str(run.path)]) == 0
    summary = json.loads((run.path / "summary.json").read_text())
    arm = summary["arms"]["infer-generate"]
    assert (arm["role"], arm["engine"], arm["path"]) == ("infer", "transformers", "sampled")
    pair = summary["pairs"]["infer-generate~train"]
    assert pair["logp"]["abs_logp_diff"]["max"] < 2e-5
    assert pair["routing"]["flip_rate"] == 0
    assert pair["logp"]["kl_infer_train_exact"] < 1e-6
    page = (run.path / "report.md").read_text()
    words = "transformers (generate) against transformers (teacher-forced)"
    assert f"Pair `infer-generate~train`, {words}" in page
    assert f"run: {words}" in capsys.readouterr().out
    own = page.split("Published elsewhere")[0].replace("vLLM's CPU router", "")
    assert "vLLM" not in own
    assert check_run(run) == []


def test_killed_it_resumes_to_the_same_arrays(random_moe: Path, prompts: Path, run: Run, tmp_path: Path) -> None:
    again = tmp_path / "run"
    arguments = ["capture", "infer-generate", random_moe, "--prompts", prompts, "-o", again, *OPTIONS]
    command = list(map(str, [MOEDIAG, *arguments]))
    status, _ = kill_when(command, lambda: list(again.glob("arms/*/shard-?????.json")), signal.SIGKILL)
    assert status == -signal.SIGKILL
    wait_until_engines_are_gone(again)
    assert open_run(again).missing_shards("infer-generate")
    done = run_here("capture", "infer-generate", random_moe, "-o", again, *OPTIONS[4:6])
    assert done.returncode == 0, done.stderr
    wanted = {name: data for name, data in captured(run.path).items() if not name.startswith("arms/train")}
    assert captured(again) == wanted


def decoded(path: Path, checkpoint: Path, prompts: Path, sampling: SamplingOptions, held: Held, **options: Any) -> Run:
    """A run that the arm fills in this process."""
    from moediag.engines.hf.generate import capture_generate

    opened = open_checkpoint(str(checkpoint))
    arguments = {"sampled_by": "infer-generate", "shard_size": 2, **options}
    new = make_plan(opened, prompts, sampling, **arguments).create(path, force=False)
    given = new.record.tokens.origin == "given"
    request = arm_request("infer-generate", {"dtype": "float32"}, given, sampler="infer-generate")
    capture_generate(RunWriter(new), arm_options(opened, request), Silent(), held)
    return new


def responses(run: Run) -> list[list[int]]:
    found = []
    for shard in run.shards:
        tokens = run.tokens(shard)
        bounds = tokens.sequence_bounds()
        found += [tokens.token_id_T[a:b][tokens.is_response_T[a:b]].tolist() for a, b in bounds]
    return found


def test_given_tokens_are_decoded_bit_for_bit_as_they_were_sampled(
    random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    """Another shard size, too: no sequence enters another's arithmetic or draws."""
    held, sampling = Held(), SamplingOptions(max_tokens=9, n=2, temperature=0.8, top_p=0.95, seed=3)
    sampled = decoded(tmp_path / "sampled", random_moe, prompts, sampling, held)
    ids, _ = sampled.prompt_tokens()
    found = responses(sampled)
    records: list[dict[str, object]] = [
        {"prompt_token_ids": ids[i // 2], "completion_token_ids": response} for i, response in enumerate(found)
    ]
    given = write_jsonl(tmp_path / "given.jsonl", records)
    again = decoded(tmp_path / "again", random_moe, given, SamplingOptions(), held, shard_size=3)
    assert again.arm("infer-generate").path == "decode"
    assert again.record.tokens.arm is None
    for name in ("logp_T", "entropy_T", "expert_ids_TLK", "gate_weights_TLK", "margin_TL"):
        ours, theirs = (
            np.concatenate([run.capture("infer-generate", shard).arrays()[name] for shard in run.shards])
            for run in (sampled, again)
        )
        assert ours.tobytes() == theirs.tobytes(), name
    assert len({tuple(response) for response in found}) > len(ids), "samples of a prompt differ"


def test_sampling_is_what_was_asked_for_and_not_what_the_checkpoint_says(
    random_moe: Path, prompts: Path, tmp_path: Path
) -> None:
    """Greedy tokens are the likeliest; a stop token ends a response and is its last; the length limit holds."""
    held = Held()
    greedy = decoded(
        tmp_path / "greedy", random_moe, prompts, SamplingOptions(max_tokens=200, temperature=0), held, full_vocab=9
    )
    for shard in greedy.shards:
        tokens, vocab = greedy.tokens(shard), greedy.load_vocab("infer-generate", shard)
        assert vocab is not None
        assert np.array_equal(vocab.logps_NV.argmax(axis=1), tokens.token_id_T[vocab.row_N])
        assert tokens.position_T.max() < 128  # what the model was made for
    first = [response[0] for response in responses(greedy)]
    stopped = decoded(
        tmp_path / "stopped", random_moe, prompts,
        SamplingOptions(max_tokens=50, temperature=0, ignore_eos=True, stop_token_ids=tuple(first)), held,
    )  # fmt: skip
    assert responses(stopped) == [[token] for token in first]


def test_a_grouped_router_of_our_own_model_decodes_as_it_scores(tmp_path: Path, prompts: Path) -> None:
    """Ring/Ling: sigmoid scores, a bias, groups, and a model class that is ours."""
    from moediag.engines.hf.engine import capture_train

    held = Held()
    ring = decoded(tmp_path / "ring", RING, prompts, SamplingOptions(max_tokens=8), held, limit=3)
    request = arm_request("train", {"dtype": "float32"}, given=False, sampler="infer-generate")
    capture_train(RunWriter(ring), arm_options(open_checkpoint(str(RING)), request), Silent(), held)
    for shard in ring.shards:
        infer, train = (ring.capture(arm, shard) for arm in ("infer-generate", "train"))
        np.testing.assert_allclose(infer.logp_T, train.logp_T, atol=5e-5)
