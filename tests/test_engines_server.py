"""The arm of a running server: vLLM's own server, started here; samples of SGLang's answers, and a stand-in
that speaks its protocol."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_here, write_jsonl

from moediag.engines.server import KEY, Query, open_server, sglang_answer
from moediag.errors import CaptureError, EngineError
from moediag.hygiene import check_run
from moediag.importers.responses import read_sglang
from moediag.importers.rollouts import Options
from moediag.run.reader import Run, open_run

DUMPS = Path(__file__).parent / "data" / "dumps" / "sglang"
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 8, "ignore_eos": False}
WORDS = ("for", "while", "assert", "import", "return")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, object]] = [{"prompt": f"The {word} statement is"} for word in WORDS]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def vllm_server(random_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server of the random checkpoint, in float32, with a key and a short longest sequence."""
    from moediag.engines.vllm.options import INFER_ENVIRONMENT

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", random_moe,
        "--served-model-name", "tiny",
        "--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
        "--api-key", "open sesame",
    ]  # fmt: skip
    environment = {**INFER_ENVIRONMENT, **os.environ}
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def logps(run: Run, arm: str) -> np.ndarray[Any, Any]:
    return np.concatenate([run.capture(arm, shard).logp_T[run.tokens(shard).is_response_T] for shard in run.shards])


@pytest.mark.engines
def test_a_running_server_samples_and_scores_as_vllm_and_transformers_do(
    vllm_server: str, random_moe: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the same tokens get the same log-probabilities from server, plain vLLM and transformers."""
    path, there = tmp_path / "run", ("--server", vllm_server)
    options = ("--max-tokens", 12, "--shard-size", 2, "-n", 2, "--temperature", 0.7, "--dtype", "float32")
    monkeypatch.setenv(KEY, "open sesame")
    done = run_here("profile", random_moe, *there, "--prompts", prompts, *options, "-o", path)
    assert done.returncode == 0, done.stderr
    monkeypatch.delenv(KEY)  # with it vLLM would be started in a process of another environment
    done = run_here("capture", "infer-redecode", random_moe, "--dtype", "float32", "-o", path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv(KEY, "open sesame")
    run = open_run(path)
    record = run.arm("infer")
    assert (record.role, record.engine, record.path, record.arrays) == ("infer", "server", "sampled", ("logp_T",))
    assert (record.score.processed, record.score.temperature) == (False, 1.0)
    assert record.captured is not None
    assert record.captured.versions["server"] == "vLLM " + open_server(vllm_server, None).facts["version"].split()[1]
    assert record.captured.facts["server"]["model"] == "tiny"
    assert "sesame" not in (path / "arms" / "infer" / "arm.json").read_text()
    assert run.arm("infer-server-rescore").change == "path"
    assert run.arm("infer-redecode").change == "engine"
    sampled = logps(run, "infer")
    assert len(sampled) > 60
    for arm in ("infer-server-rescore", "infer-redecode", "train"):
        np.testing.assert_allclose(logps(run, arm), sampled, atol=5e-5, err_msg=arm)
    page = (path / "report.md").read_text()
    assert "inference server (decode) against transformers (teacher-forced)" in page
    assert "infer kept no expert ids" in page
    assert check_run(run) == []

    again = tmp_path / "again"  # two workers, one after the other, the second by another name of the same server
    begin = ("--prompts", prompts, *options, "-o", again, "--shard-index", 0, "--num-shards", 2)
    assert run_here("capture", "infer-server", random_moe, *there, *begin).returncode == 0
    assert open_run(again).missing_shards("infer-server")
    other = vllm_server.replace("127.0.0.1", "localhost") + "/v1/"
    assert run_here("capture", "infer-server", random_moe, "--server", other, "-o", again).returncode == 0
    for shard in run.shards:
        assert np.array_equal(open_run(again).tokens(shard).token_id_T, run.tokens(shard).token_id_T)
    np.testing.assert_allclose(logps(open_run(again), "infer-server"), sampled, atol=5e-5)

    for arguments, words in (
        (("--server", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("--server", vllm_server, "--server-model", "other"), "serves no model other; it serves tiny"),
    ):
        run_path = tmp_path / "refused"
        done = run_here("capture", "infer-server", random_moe, *arguments, "--prompts", prompts, "-o", run_path)
        assert done.returncode == 1
        assert words in done.stderr
        assert not run_path.exists()
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "word " * 20}])
    done = run_here("capture", "infer-server", random_moe, *there, "--prompts", long, "-o", tmp_path / "long")
    assert done.returncode == 1
    assert "longest sequence has 64 tokens, this run needs" in done.stderr
    monkeypatch.delenv(KEY)
    with pytest.raises(EngineError, match=rf"refuses \(401\).*{KEY}"):
        open_server(vllm_server, None)


def test_sample_answers_of_sglang_give_their_log_probabilities_and_routes() -> None:
    """Against what the importer reads of the same files; other tokens than were sent are refused."""
    files = [DUMPS / f"requests_step{step}.jsonl" for step in (0, 1)]
    requests = {one["rid"]: one for file in files for one in map(json.loads, file.read_bytes().splitlines())}
    for width in ("int32", "uint8", "legacy"):
        answers = [DUMPS / f"responses_step{step}_{width}.jsonl" for step in (0, 1)]
        records = [one for file in answers for one in map(json.loads, file.read_bytes().splitlines())]
        assert len(records) > 20
        for record in records:
            ids = requests[record["meta_info"]["id"]]["input_ids"]
            query = Query("0", ids, None, NEUTRAL, 0)
            if not record["output_ids"]:
                continue
            answer = sglang_answer(record, query)
            assert answer.token_ids == record["output_ids"]
            assert answer.logps == [entry[0] for entry in record["meta_info"]["output_token_logprobs"]]
            if answer.routes_NLK is not None:
                assert answer.routes_NLK.shape == (len(ids) + len(answer.token_ids) - 1, 5 * 4)
                assert answer.routes_NLK[:, 4:].max() < 16
            with pytest.raises(CaptureError, match="counts"):
                sglang_answer(record, Query("0", [*ids, 1], None, NEUTRAL, 0))
    steps = read_sglang([*files, *(DUMPS / f"responses_step{step}_int32.jsonl" for step in (0, 1))], Options())
    rollout = next(one for step in steps for one in step.rollouts if one.turn_T is not None and one.turn_T.max() == 0)
    ids_T, n_prompt = rollout.token_id_T, int((~rollout.is_response_T).sum())
    [record] = [
        one
        for one in (json.loads(line) for step in (0, 1) for line in
                    (DUMPS / f"responses_step{step}_int32.jsonl").read_bytes().splitlines())
        if one["meta_info"]["id"] in requests
        and [*requests[one["meta_info"]["id"]]["input_ids"], *one["output_ids"]] == ids_T.tolist()
    ][:1]  # fmt: skip
    answer = sglang_answer(record, Query("0", ids_T[:n_prompt].tolist(), None, NEUTRAL, 0))
    assert answer.routes_NLK is not None
    theirs = rollout.expert_ids["infer"][: len(answer.routes_NLK)]
    assert np.array_equal(answer.routes_NLK.reshape(theirs.shape), theirs)


class _Sglang(BaseHTTPRequestHandler):
    """SGLang's protocol over a model that is a table: p(token) is proportional to exp(-token / 40) everywhere."""

    is_raw = False
    seen: list[dict[str, Any]]

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path != "/server_info":
            self.send_error(404)
            return
        self._answer({"model_path": "/models/table", "version": "0.5.9", "context_length": 100, "dtype": "bfloat16"})

    @staticmethod
    def logp(token: int, temperature: float) -> float:
        return -token / 40 / temperature - math.log(sum(math.exp(-one / 40 / temperature) for one in range(256)))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        sampling, ids = body["sampling_params"], body["input_ids"]
        temperature = 1.0 if self.is_raw else sampling["temperature"]
        drawn = [random.randrange(256) for _ in range(sampling["max_new_tokens"])]
        meta: dict[str, Any] = {
            "prompt_tokens": len(ids),
            "output_token_logprobs": [[self.logp(token, temperature), token, None] for token in drawn],
            "output_top_logprobs": [[[self.logp(0, temperature), 0, None]]],
        }
        start = body["logprob_start_len"]
        if start >= 0:
            scores = [None, *(self.logp(token, 1.0) for token in ids[start + 1 :])]
            meta["input_token_logprobs"] = [[s, token, None] for s, token in zip(scores, ids[start:], strict=True)]
        self._answer({"text": "", "output_ids": drawn, "meta_info": meta})


@pytest.fixture
def sglang_server() -> Iterator[str]:
    _Sglang.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sglang)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.engines
@pytest.mark.parametrize("is_raw", [True, False])
def test_whether_log_probabilities_are_before_or_after_temperature_is_measured(
    sglang_server: str, is_raw: bool, random_moe: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's are after temperature unless SGLANG_RETURN_ORIGINAL_LOGPROB is set; given tokens' are always before."""
    monkeypatch.setattr(_Sglang, "is_raw", is_raw)
    begin = ("--prompts", prompts, "--max-tokens", 5, "--temperature", 0.5, "--shard-size", 3, "-o", tmp_path / "run")
    for arguments in (("infer-server", *begin), ("infer-server-rescore", "-o", tmp_path / "run")):
        done = run_here("capture", arguments[0], random_moe, "--server", sglang_server, *arguments[1:])
        assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "run")
    score, rescored = run.arm("infer-server").score, run.arm("infer-server-rescore").score
    assert (score.processed, score.temperature) == ((False, 1.0) if is_raw else (True, 0.5))
    assert (rescored.processed, rescored.temperature) == (False, 1.0)
    ids = np.concatenate([run.tokens(shard).token_id_T[run.tokens(shard).is_response_T] for shard in run.shards])
    for arm, temperature in (("infer-server", 1.0 if is_raw else 0.5), ("infer-server-rescore", 1.0)):
        np.testing.assert_allclose(logps(run, arm), [_Sglang.logp(token, temperature) for token in ids], rtol=1e-5)
    sampled = [one["sampling_params"] for one in _Sglang.seen if one["sampling_params"]["max_new_tokens"] == 5]
    assert len(sampled) == len(WORDS)
    assert all(one["top_k"] == -1 and one["repetition_penalty"] == 1.0 and one["top_p"] == 1.0 for one in sampled)
