"""Dumps of other frameworks as runs: every number at its place, damage refused, everything downstream works on them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_here
from dumps import DUMPS, check_routes, check_tokens, imported, matched, tokens_of, truth

from moediag.analysis.tokens import token_frame
from moediag.cli.main import main
from moediag.corrections.sources import run_source, table_source
from moediag.errors import DumpError
from moediag.importers.registry import importer_of
from moediag.importers.rollouts import Options
from moediag.results.analyze import analyze_run
from moediag.results.report import report_run
from moediag.run.series import open_series

TEXT = {
    "nemo-rl": ("logp_infer", "logp_train_prompt", "advantage", "reward"),
    "prime-rl": ("logp_infer", "logp_train_prompt", "entropy_train", "advantage"),
}
"""Format -> what it holds of the truth."""


@pytest.mark.parametrize("name", TEXT)
def test_every_number_of_a_dump_is_at_its_place(tmp_path: Path, name: str) -> None:
    runs = imported(name, [DUMPS / name], tmp_path / "series")
    assert len(runs) == 2
    for step, run in enumerate(runs):
        found, true = tokens_of(run), truth(step)
        check_tokens(found, matched(found, true), TEXT[name])


@pytest.mark.parametrize(
    ("name", "patterns", "has"),
    [
        ("sglang", ["responses_step?_int32.jsonl", "requests_step?.jsonl"], ["weight_version"]),
        ("sglang", ["responses_step?_uint8.jsonl", "requests_step?.jsonl"], ["weight_version"]),
        ("sglang", ["responses_step?_legacy.jsonl", "requests_step?.jsonl"], []),
        ("sglang", ["r*_step?_int32_startlen.jsonl"], ["weight_version"]),
        ("vllm", ["completions_step?.jsonl"], []),
        ("vllm", ["generate_step?.jsonl"], ["weight_version"]),
    ],
)
def test_responses_of_servers_join_their_turns_and_give_tokens_and_routes(
    tmp_path: Path, name: str, patterns: list[str], has: list[str]
) -> None:
    runs = imported(name, [DUMPS / name / pattern for pattern in patterns], tmp_path / "series", n_experts=16)
    assert [run.record.step for run in runs] == [0, 1]
    for step, run in enumerate(runs):
        assert run.arms() == ["rollout"]
        found, true = tokens_of(run), truth(step)
        true = matched(found, true)
        if "legacy" in patterns[0]:  # one version for the whole answer: that of its end
            assert set(found["weight_version"][found["is_trained"]]) == {str(step), str(step + 1)}
            found = found.drop(columns="weight_version")
        check_tokens(found, true, ["logp_infer", *has])
        check_routes(run, "rollout", found, true)
        assert set(found.loc[found["is_trained"], "turn"]) == {0, 1, 2} if step == 0 else {0, 1}


def test_trl_is_read_where_lists_were_logged_and_refused_where_there_is_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = imported("trl", [DUMPS / "trl" / "with_log_extra"], tmp_path / "series")
    for step, run in enumerate(runs):
        found, true = tokens_of(run), truth(step)
        check_tokens(found, matched(found, true), ("logp_infer", "logp_train", "advantage", "reward"))
    assert main(["import", "trl", str(DUMPS / "trl" / "completions"), "-o", str(tmp_path / "text")]) == 1
    error = capsys.readouterr().err
    assert "holds text and no token ids: moediag import trl PATH --tokenizer CKPT -o RUN" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("change", ["cut", "width", "id", "twice", "tokens", "no requests"])
def test_damaged_responses_are_refused_by_line_and_cause(tmp_path: Path, change: str) -> None:
    answers = lines(DUMPS / "sglang" / "responses_step0_int32_startlen.jsonl")
    requests = lines(DUMPS / "sglang" / "requests_step0_int32_startlen.jsonl")
    meta = answers[4]["meta_info"]
    data = base64.b64decode(meta["routed_experts"])
    message = {
        "cut": "which are not .* rows of 20 ids",
        "width": "which are not .* rows of 20 ids",
        "id": "no expert id",
        "twice": "stands at .* already",
        "tokens": "of other tokens than output_ids",
        "no requests": "which are not",
    }[change]
    if change == "cut":
        meta["routed_experts"] = base64.b64encode(data[:-80]).decode()
    elif change == "width":
        meta["routed_experts_dtype"] = "uint8"
    elif change == "id":
        meta["routed_experts"] = base64.b64encode(b"\x7f\x7f\x7f\x7f" + data[4:]).decode()
    elif change == "twice":
        answers.append(answers[0])
    elif change == "tokens":
        answers[4]["output_ids"][0] += 1
    paths = [tmp_path / "responses.jsonl", tmp_path / "requests.jsonl"]
    write_lines(paths[0], answers)
    write_lines(paths[1], requests)
    with pytest.raises(DumpError, match=message) as caught:
        imported("sglang", paths[:1] if change == "no requests" else paths, tmp_path / "out", n_experts=16)
    assert "responses.jsonl line" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_prompts_that_were_not_kept_are_tokens_without_ids(tmp_path: Path) -> None:
    """The rows of routes still belong to their tokens, and no two prompts are taken for one."""
    path = DUMPS / "sglang" / "responses_step0_int32.jsonl"
    run = imported("sglang", [path], tmp_path / "run", n_experts=16)[0]
    found = tokens_of(run)
    assert (found.loc[~found["is_response"], "token_id"] == -1).all()
    assert found["prompt_id"].nunique() == found["seq_id"].nunique() == len(lines(path))
    routes = np.load(DUMPS / "truth_routes.npz")["infer_0"]
    ids_TLK = run.capture("rollout", run.shards[0]).expert_ids_TLK
    np.testing.assert_array_equal(ids_TLK[: len(routes)], routes)
    assert (ids_TLK[len(routes)] == -1).all()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", TEXT)
def test_a_damaged_dump_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """A line cut, left out or written twice; a column of another width; nothing half-written is left."""
    folder = tmp_path / "dump"
    shutil.copytree(DUMPS / name, folder)
    path = sorted(folder.rglob("*.jsonl"))[0]
    whole = lines(path)
    text = path.read_text()

    def refused(message: str) -> None:
        with pytest.raises(DumpError, match=message) as caught:
            imported(name, [folder], tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["dump"]

    path.write_text(text[: len(text) // 2])
    refused("no JSON")
    write_lines(path, [*whole[:1], *whole[2:]])
    refused("a line is missing or written twice")
    write_lines(path, [whole[0], *whole])
    refused("a line is missing or written twice")
    key = "prev_logprobs" if name == "nemo-rl" else "trainer_logprobs"
    values = whole[0][key][0] if name == "nemo-rl" else whole[0][key]
    short = values[:-1]
    write_lines(path, [{**whole[0], key: [short] if name == "nemo-rl" else short}, *whole[1:]])
    refused(f"{key} should hold {len(values)} numbers, one per token, found {len(values) - 1}")
    probabilities = [2.0 for _ in values]
    write_lines(path, [{**whole[0], key: [probabilities] if name == "nemo-rl" else probabilities}, *whole[1:]])
    refused("is 2, above 0; are these logits or probabilities")


def test_a_missing_rank_and_a_mixed_step_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "token_exports"
    shutil.copytree(DUMPS / "prime-rl" / "token_exports", folder)
    (folder / "step_0" / "rank_0.jsonl").rename(tmp_path / "kept")
    with pytest.raises(DumpError, match="lacks rank_0.jsonl"):
        imported("prime-rl", [folder], tmp_path / "out")
    shutil.copy(folder / "step_1" / "rank_0.jsonl", folder / "step_0" / "rank_0.jsonl")
    with pytest.raises(DumpError, match="step 1 in a folder of step 0"):
        imported("prime-rl", [folder], tmp_path / "out")


def test_an_import_appears_whole_or_not_and_the_same_again_changes_nothing(tmp_path: Path, capsys) -> None:
    folder, output = str(DUMPS / "nemo-rl"), str(tmp_path / "out")
    assert main(["import", "nemo-rl", folder, "-o", output]) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(["import", "nemo-rl", f"{folder}/*.jsonl", "-o", output]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == made
    capsys.readouterr()
    assert main(["import", "prime-rl", str(DUMPS / "prime-rl"), "-o", output]) == 1
    assert "holds another run or series; give -o a new folder, or --force" in capsys.readouterr().err
    assert main(["import", "prime-rl", str(DUMPS / "prime-rl"), "-o", output, "--force"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["series.json", "step-000000", "step-000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert main(["import", "nemo-rl", folder, "-o", str(tmp_path / "other"), "--force"]) == 1
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_what_a_path_is_can_be_told_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--detect", str(DUMPS / "nemo-rl"), str(DUMPS / "prime-rl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: len(paths) for name, paths in found.items() if name != "unknown"} == {"nemo-rl": 2, "prime-rl": 4}
    assert main(["import", "nemo-rl", str(DUMPS / "prime-rl/token_exports/step_0/rank_0.jsonl"), "-o", "x"]) == 1
    assert "it looks like prime-rl" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prime-rl"])
def test_everything_downstream_works_on_an_imported_run(tmp_path: Path, name: str) -> None:
    assert main(["import", name, str(DUMPS / name), "-o", str(tmp_path / "series")]) == 0
    first, second = sorted(map(str, (tmp_path / "series").glob("step-*")))
    for words in (
        ["validate", first], ["analyze", first], ["analyze", second], ["report", first], ["simulate", first],
        ["compare", first, second, "-o", str(tmp_path / "compare")],
        ["trend", str(tmp_path / "series"), "-o", str(tmp_path / "trend")],
    ):  # fmt: skip
        assert main(words) == 0, words


@pytest.mark.parametrize("name", TEXT)
def test_simulate_uses_the_advantages_and_rewards_of_a_dump(tmp_path: Path, name: str) -> None:
    """Bug: a run's advantages were a hash of its token ids, whatever its tokens held."""
    run = imported(name, [DUMPS / name], tmp_path / "series")[0]
    source = run_source(run, run.main_arms)
    assert source.reward == "advantages as the run has them"
    true = matched(tokens_of(run), truth(0))
    expected = true.loc[true["is_trained"], "advantage"].to_numpy(np.float64)
    np.testing.assert_array_equal(source.tokens.advantage_T, expected)
    if name == "nemo-rl":
        rewarded = run_source(run, run.main_arms, "reward")
        assert rewarded.reward.startswith("rewards as the run has them")
        np.testing.assert_allclose(rewarded.tokens.advantage_T, expected, rtol=1e-5)  # GRPO's, but for its 1e-6
    else:
        with pytest.raises(DumpError, match="--reward takes none or hash or advantage for a run"):
            run_source(run, run.main_arms, "reward")


def findings(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[tuple[str, str]]]:
    """Exit code of validate, and (rule, message) of its findings."""
    code = main(["validate", *words, "--json"])
    return code, [(one["rule"], one["message"]) for one in json.loads(capsys.readouterr().out)["findings"]]


def shifted(folder: Path) -> Path:
    """A NeMo-RL dump whose trainer's log-probabilities are those of the token before."""
    shutil.copytree(DUMPS / "nemo-rl", folder)
    rng = np.random.default_rng(0)
    for path in folder.glob("*.jsonl"):
        records = lines(path)
        for record in records:
            n = record["input_lengths"][0]
            mask = np.array(record["token_loss_mask"][0])
            logp = -rng.exponential(1.0, len(mask))
            record["generation_logprobs"] = [np.where(mask, logp, 0.0).tolist()]
            record["prev_logprobs"] = [
                [*np.roll(logp + 0.001 * rng.normal(size=len(mask)) - 0.01, 1)[:n], *np.zeros(len(mask) - n)]
            ]
        write_lines(path, records)
    return folder


def test_validate_simulate_and_trend_read_a_dump_as_import_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, a pattern, its files, and the series that import makes: the same findings and the same numbers."""
    folder = shifted(tmp_path / "dump")
    assert main(["import", "nemo-rl", str(folder), "-o", str(tmp_path / "series")]) == 0
    capsys.readouterr()
    files = sorted(map(str, folder.glob("*.jsonl")))
    code, found = findings([str(folder)], capsys)
    assert code == 3
    assert {rule for rule, _ in found} == {"D01-token-lag"}
    assert "lag +1" in found[0][1]
    for words in ([str(tmp_path / "series")], files, [f"{folder}/*.jsonl"]):
        assert findings(words, capsys) == (code, found)
    trends = []
    for target in (folder, tmp_path / "series"):
        assert main(["trend", str(target), "--json"]) == 0
        trends.append(json.loads(capsys.readouterr().out))
    assert trends[0] == trends[1]
    assert [row["step"] for row in trends[0]["metrics"]["kl_infer_train_k3"]] == [1, 2]
    simulations = []
    for target in (files[0], str(tmp_path / "series" / "step-000001")):
        assert main(["simulate", target, "--method", "icepop", "--json"]) == 0
        simulations.append(json.loads(capsys.readouterr().out)["frames"]["correction_statistics"])
    assert simulations[0] == simulations[1]
    assert main(["simulate", str(folder)]) == 1
    assert "holds steps 1, 2; give the files of one" in capsys.readouterr().err


def test_the_same_scenario_gives_the_same_numbers_through_every_importer_that_has_both_sides(tmp_path: Path) -> None:
    """Log-probabilities of trained tokens, and what IcePop makes of them; and through validate's own options."""
    pairs: dict[str, list[tuple[float, ...]]] = {}
    for name in ("slime", "miles", "nemo-rl", "prime-rl", "skyrl"):
        paths = [DUMPS / name / kind for kind in ("rollout_data", "train_data")] if name == "miles" else [DUMPS / name]
        run = imported(name, paths, tmp_path / name, trust_pickle=name == "skyrl")[0]
        frame = token_frame(run.pair(*run.main_arms))
        columns = ("token_id", "position", "logp_train", "logp_infer")
        pairs[name] = sorted(zip(*(frame[column].tolist() for column in columns), strict=True))
    assert len(pairs["slime"]) == 147
    for name, found in pairs.items():
        assert found == pairs["slime"], name
    assert main(["validate", str(DUMPS / "skyrl")]) == 1
    assert main(["validate", str(DUMPS / "skyrl"), "--trust-pickle"]) == 0
    assert main(["trend", str(DUMPS / "skyrl"), "--trust-pickle"]) == 0


def test_a_dump_without_routes_is_not_called_dense(tmp_path: Path) -> None:
    """Bug: where no side kept expert ids, an imported model was said to be dense, and routing no cause."""
    run = imported("nemo-rl", [DUMPS / "nemo-rl" / "train_data_step1.jsonl"], tmp_path / "run")[0]
    summary = analyze_run(run)
    assert summary["pairs"]["rollout~trainer"]["left_out"] == {"routing": "neither trainer nor rollout kept expert ids"}
    page = report_run(run).read_text()
    assert page.startswith(f"# Routing mismatch: {run.arm('trainer').engine} dump, step {run.record.step}\n")
    assert "The dump does not name its model." in page
    assert "is **dense**" not in page
    assert "dense model: routing is no cause" not in page


@pytest.mark.parametrize("name", TEXT)
def test_a_run_that_is_exported_and_imported_has_the_same_numbers_bit_for_bit(tmp_path: Path, name: str) -> None:
    series = tmp_path / "series"
    before = [tokens_of(run) for run in imported(name, [DUMPS / name], series)]
    table = tmp_path / "table.parquet"
    assert main(["export", str(series), "-o", str(table)]) == 0
    assert main(["export", str(series), "-o", str(table)]) == 1  # never over a file in silence
    again = imported("table", [table], tmp_path / "again")
    assert [run.record.step for run in again] == [run.record.step for run in open_series(series).runs()]
    for expected, run in zip(before, again, strict=True):
        pd.testing.assert_frame_equal(tokens_of(run), expected, check_exact=True)
    one = tmp_path / "one.parquet"
    first = next(open_series(series).runs())
    assert main(["export", str(first.path), "-o", str(one)]) == 0
    frames = [source.tokens.frame for source in (run_source(first, first.main_arms), table_source(one))]
    for column in ("logp_train", "logp_infer", "advantage", "seq_id", "prompt_id"):
        np.testing.assert_array_equal(*(frame[column] for frame in frames))


@pytest.mark.engines
def test_our_own_engines_score_the_tokens_of_a_dump_beside_its_numbers(tmp_path: Path, random_moe: Path) -> None:
    """Bugs: no arm could join an imported run, whose run.json names neither prompts nor sampling; vLLM's stopped with a
    KeyError at the longest response, which such a run does not name."""
    import torch
    from transformers import AutoModelForCausalLM

    dump = [DUMPS / "slime" / kind / "0.pt" for kind in ("rollout_data", "train_data")]
    run = imported("slime", dump, tmp_path / "run")[0]
    before = tokens_of(run)
    for arm in ("train", "infer"):
        done = run_here("capture", arm, random_moe, "-o", run.path)
        assert done.returncode == 0, done.stderr
    record = run.arm("train")
    assert (record.variant_of, record.change) == ("trainer", "engine")
    assert run.checkpoint(record.checkpoint).source == str(random_moe)
    np.testing.assert_array_equal(tokens_of(run)["logp_infer"], before["logp_infer"])
    summary = analyze_run(run)
    assert {"rollout~trainer", "rollout~train", "infer~trainer", "infer~train"} <= {*summary["pairs"]}
    assert summary["main_pair"] == "rollout~trainer"
    assert report_run(run).exists()
    ids_T = before.loc[before["seq_id"] == 2, "token_id"].to_numpy()
    model = AutoModelForCausalLM.from_pretrained(random_moe, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits_TV = model(torch.tensor(ids_T)[None]).logits[0].float()
    expected_T = torch.log_softmax(logits_TV, -1)[:-1].gather(1, torch.tensor(ids_T[1:, None]))[:, 0].numpy()
    found_T = run.capture("train", run.shards[0]).logp_T[(before["seq_id"] == 2).to_numpy()][1:]
    is_response_T = before.loc[before["seq_id"] == 2, "is_response"].to_numpy()[1:]
    np.testing.assert_allclose(found_T[is_response_T], expected_T[is_response_T], atol=0.02)
    assert np.isnan(found_T[~is_response_T]).all()
    of_vllm_T, of_hf_T = (run.capture(arm, run.shards[0]).logp_T for arm in ("infer", "train"))
    assert (np.isfinite(of_vllm_T) == np.isfinite(of_hf_T)).all()
    assert np.nanmean(np.abs(of_vllm_T - of_hf_T)) < 0.3


JUNK = (None, "x", 5, [], {}, [1], -1, True, [None], [[1.0]], "AAAA", {"a": 1}, float("nan"), 2**70)


def leaves(value: object, at: tuple = ()) -> list[tuple]:
    """Places in a record: every key, and the first two entries of every list."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [*([at] if at else []), *(place for key, part in inside for place in leaves(part, (*at, key)))]


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("nemo-rl", "nemo-rl/train_data_step1.jsonl"),
        ("prime-rl", "prime-rl/token_exports/step_0/rank_0.jsonl"),
        ("sglang", "sglang/responses_step0_int32.jsonl"),
        ("vllm", "vllm/generate_step0.jsonl"),
    ],
)
def test_no_edited_record_ends_in_a_traceback(tmp_path: Path, name: str, sample: str) -> None:
    """Bug: an entry of another kind than the format has (a number for a list, null for a choice) was a traceback."""
    rng = np.random.default_rng(0)
    whole = lines(DUMPS / sample)[:3]
    path = tmp_path / "step_0" / Path(sample).name
    path.parent.mkdir()
    places, refused = leaves(whole[1]), []
    for i in rng.permutation(len(places) * len(JUNK))[:80]:
        *inside, key = places[i // len(JUNK)]
        records = json.loads(json.dumps(whole))
        holder = records[1]
        for part in inside:
            holder = holder[part]
        holder[key] = JUNK[i % len(JUNK)]
        write_lines(path, records)
        try:
            for step in importer_of(name).read([path], Options()):
                list(step.rollouts)
        except DumpError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(path.name in message and "\n" not in message for message in refused)


@pytest.mark.parametrize("kind", ["lists", "bytes"])
def test_the_split_layout_of_vllm_0_21_is_put_together(tmp_path: Path, kind: str) -> None:
    """The prompt's rows at the response or at the choice, those behind it at the choice, MoE layers alone, int16."""

    def encoded(rows: np.ndarray) -> object:
        if kind == "lists":
            return rows.tolist()
        data = base64.b64encode(rows.astype(np.int16).tobytes()).decode()
        return {"encoding": "base64", "dtype": "int16", "shape": rows.shape, "data": data}

    for step in (0, 1):
        records = lines(DUMPS / "vllm" / f"completions_step{step}.jsonl")
        for i, record in enumerate(records):
            (choice,) = record["choices"]
            n_prompt = len(choice["prompt_token_ids"])
            ids = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))[:, 1:]
            (record if i % 2 else choice)["prompt_routed_experts"] = encoded(ids[:n_prompt])
            choice["routed_experts"] = encoded(ids[n_prompt:]) if len(ids) > n_prompt else None
        write_lines(tmp_path / f"completions_step{step}.jsonl", records)
    runs = imported("vllm", [tmp_path], tmp_path / "series", n_experts=16)
    for step, run in enumerate(runs):
        found = tokens_of(run)
        true = matched(found, truth(step))
        check_tokens(found, true, ["logp_infer"])
        check_routes(run, "rollout", found, true, first_layer=0)
        assert any("which decoder layers are MoE is not known; layers count from 0" in note for note in run.notes)
    whole = lines(tmp_path / "completions_step0.jsonl")
    del whole[1]["prompt_routed_experts"]
    write_lines(tmp_path / "completions_step0.jsonl", whole)
    with pytest.raises(DumpError, match=r"line 2: routed_experts have \d+ rows, expected \d+"):
        imported("vllm", [tmp_path / "completions_step0.jsonl"], tmp_path / "out")


def test_turns_of_many_conversations_are_joined(tmp_path: Path) -> None:
    """A later turn's prompt is everything before and a tool's answer; conversations begin alike, in 800 lengths."""
    rng = np.random.default_rng(0)
    records, expected = [], []
    for i in range(400):
        ids = [*range(100), *rng.integers(0, 50, 300 + 5 * i).tolist()]
        for turn in range(2):
            output = rng.integers(0, 50, 5).tolist()
            choice = {"token_ids": output, "prompt_token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * 5}}
            records.append({"id": f"{i}-{turn}", "choices": [choice]})
            ids = [*ids, *output, *(rng.integers(0, 50, 3).tolist() if turn == 0 else [])]
        expected.append(ids)
    path = tmp_path / "step_0.jsonl"
    write_lines(path, records)
    (step,) = importer_of("vllm").read([path], Options())
    found = [rollout.token_id_T.tolist() for rollout in step.rollouts]
    assert found == expected
