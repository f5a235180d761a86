"""The infer arm of a running server: token ids in, log-probabilities out, over HTTP.

vLLM's completions and SGLang's generate, for whoever cannot load the engine a second time. Prompts go as token ids;
responses are sampled, or recorded ones are prefilled as part of the prompt. A server returns no router logits, gate
weights or entropies, so the arm keeps log-probabilities, and expert ids where the server was started to return them.

Invariants:
    - every sampling parameter is given with each request: the server's and the checkpoint's defaults enter nothing;
    - the ids that come back must be those that were sent, and every response token has its log-probability;
    - whether log-probabilities are taken before or after temperature is not reported by servers: it is measured, by one
      prompt at two temperatures, and recorded; what is no log-probability (logits) is refused.

Read from source: vLLM 0.32 (entrypoints/openai/completion), whose server was also run, without routes; SGLang a6463a1
(managers/tokenizer_manager.py), of which no server was run: samples of its answers were read, with JSON made by hand
around payloads of its own encoder.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moediag.engines.arms import ArmRequest
from moediag.engines.assemble import IDS, capture_of, order_rows, token_rows
from moediag.engines.plan import known_sampling, load_prompt_tokens
from moediag.engines.process import Held, OnDone, Reporter, fill_missing_shards, seed_of
from moediag.engines.routers import ModelRouting
from moediag.errors import CaptureError, EngineError, IncompleteRunError
from moediag.run.capture import Shard, arrays_of
from moediag.run.recipes import PREFILL, SAMPLED
from moediag.run.records import ArmRecord, Score
from moediag.run.writer import RunWriter

KEY = "MOEDIAG_SERVER_KEY"
"""Environment variable with the key that the server wants, sent as a bearer token; written down nowhere."""

TIMEOUT_S, ATTEMPTS, IN_FLIGHT = 600.0, 5, 16
_TRY_AGAIN = (429, 502, 503, 504)
_RAW_WITHIN = 0.02
"""Log-probabilities [nat] of the likeliest token at temperatures 1 and 2 that differ by less are raw: rounding and
batches move them less, temperature moves any but a flat or certain distribution more."""


class Http:
    """JSON over HTTP, tried again where the server was busy or away for a moment."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineError(f"--server {url}: expected a URL, e.g. --server http://localhost:8000")
        host = parts.netloc.rpartition("@")[2]
        self.base = f"{parts.scheme}://{host}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            self._headers["Authorization"] = f"Bearer {os.environ[KEY]}"

    def get(self, path: str) -> dict[str, Any] | None:
        """An answer; None where the server knows no such path.

        Raises:
            EngineError: no server, or it refuses.
        """
        try:
            return self._send(path, None, attempts=1)
        except _RefusedError as refused:
            if refused.status in (404, 405):
                return None
            raise

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """An answer.

        Raises:
            EngineError: no server, or it refuses the request, with its own words.
        """
        return self._send(path, json.dumps(body).encode(), ATTEMPTS)

    def _send(self, path: str, data: bytes | None, attempts: int) -> dict[str, Any]:
        request = urllib.request.Request(self.base + path, data, self._headers)
        for attempt in range(1, attempts + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    answer = json.load(response)
                    return answer if isinstance(answer, dict) else {"answer": answer}
            except urllib.error.HTTPError as error:
                if error.code not in _TRY_AGAIN or attempt == attempts:
                    raise _RefusedError(error.code, self.base + path, _words(error.read())) from error
            except ValueError as error:
                raise EngineError(
                    f"{self.base}{path} answers with something else than JSON; is it the server?"
                ) from error
            except OSError as error:  # URLError, a reset connection, a timeout
                if attempt == attempts:
                    reason = getattr(error, "reason", error)
                    raise EngineError(
                        f"no server answers at {self.base} ({reason}); start it, or correct --server"
                    ) from error
            time.sleep(2.0 ** (attempt - 1))
        raise AssertionError("unreachable")


class _RefusedError(EngineError):
    def __init__(self, status: int, where: str, words: str) -> None:
        self.status = status
        hint = f"; give the server's key in {KEY}" if status in (401, 403) else ""
        super().__init__(f"{where} refuses ({status}): {words}{hint}")


def _words(body: bytes) -> str:
    """The server's own words of an error, on one line."""
    try:
        found = json.loads(body)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except ValueError:
        text = body.decode(errors="replace")
    return " ".join(text.split())[:400] or "without a word"


@dataclass(frozen=True)
class Answer:
    """What a server gave for one sequence.

    Args:
        token_ids: of the response, ``logps`` [nat] of each.
        routes_NLK: experts of each consumed token in every decoder layer, dense ones included; None = not returned.
        top_logp: of the first sampled token's position, the likeliest token's; None where it was not requested.
    """

    token_ids: list[int]
    logps: list[float]
    routes_NLK: NDArray[Any] | None
    top_logp: float | None


@dataclass(frozen=True)
class Query:
    """One sequence to sample (``response`` is None) or to score.

    Args:
        sampling: the run's sampling parameters by vLLM's names, without ``n`` and ``seed``.
        wants_top: the likeliest token's log-probability, too.
    """

    name: str
    prompt: list[int]
    response: list[int] | None
    sampling: dict[str, Any]
    seed: int
    wants_top: bool = False

    @property
    def submitted(self) -> list[int]:
        """The prompt that the server is given."""
        return [*self.prompt, *(self.response or [])]

    @property
    def neutral(self) -> dict[str, Any]:
        """Temperature and truncations to give: nothing is sampled where a response is scored."""
        names = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return names if self.response is not None else {name: self.sampling[name] for name in names}


class VllmServer:
    """vLLM's ``/v1/completions``."""

    def __init__(self, http: Http, version: str, model: str | None) -> None:
        self.http = http
        listed = [one for one in (http.get("/v1/models") or {}).get("data", []) if isinstance(one, dict)]
        names = [str(one.get("id")) for one in listed]
        bases = [str(one.get("id")) for one in listed if not one.get("parent")]
        if model is None and len(bases) != 1:
            raise EngineError(f"{http.base} serves {', '.join(names) or 'no model'}; choose one with --server-model")
        self.model = model or bases[0]
        if self.model not in names:
            raise EngineError(f"{http.base} serves no model {self.model}; it serves {', '.join(names)}")
        served = listed[names.index(self.model)]
        self.max_length: int | None = served.get("max_model_len")
        self.versions: dict[str, str | None] = {"server": f"vLLM {version}"}
        self.facts = {"url": http.base, "model": self.model, "root": served.get("root"), "version": f"vLLM {version}"}

    def ask(self, query: Query) -> Answer:
        """Sample or score one sequence."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": query.submitted,
            "n": 1,
            "max_tokens": 1 if query.response is not None else query.sampling["max_tokens"],
            **query.neutral,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": query.seed,
            "logprobs": int(query.wants_top),
            "return_token_ids": True,
        }
        if query.response is not None:
            body["prompt_logprobs"] = 0
        else:
            body |= {"ignore_eos": query.sampling["ignore_eos"]}
            body |= {"stop_token_ids": list(query.sampling.get("stop_token_ids") or ())}
        choice = self.http.post("/v1/completions", body)["choices"][0]
        if choice.get("prompt_token_ids") != query.submitted:
            raise CaptureError(
                f"sequence {query.name}: the server did not return the prompt's token ids as they were sent; "
                "return_token_ids needs vLLM 0.10.2 or newer"
            )
        routes = _npy(choice["routed_experts"]) if choice.get("routed_experts") else None
        listed = choice.get("logprobs") or {}
        tops = listed.get("top_logprobs") or []
        top = max(tops[0].values()) if query.wants_top and tops and tops[0] else None
        if query.response is None:
            return Answer(choice["token_ids"], listed.get("token_logprobs") or [], routes, top)
        rows = (choice.get("prompt_logprobs") or [])[len(query.prompt) :]
        found = [(row or {}).get(str(token)) for row, token in zip(rows, query.response, strict=False)]
        return Answer(query.response, [one["logprob"] for one in found if one], routes, top)


class SglangServer:
    """SGLang's ``/generate``."""

    def __init__(self, http: Http, info: dict[str, Any], model: str | None) -> None:
        self.http = http
        self.model = str(info.get("served_model_name") or info.get("model_path"))
        if model not in (None, self.model, info.get("model_path")):
            raise EngineError(f"{http.base} serves no model {model}; it serves {self.model}")
        self.max_length: int | None = info.get("context_length") or info.get("max_req_input_len")
        self.returns_routes = bool(info.get("enable_return_routed_experts"))
        version = str(info.get("version"))
        self.versions: dict[str, str | None] = {"server": f"SGLang {version}"}
        self.facts = {
            "url": http.base,
            "model": self.model,
            "root": info.get("model_path"),
            "version": f"SGLang {version}",
            "server_args": {name: info[name] for name in _SGLANG_FACTS if name in info},
        }

    def ask(self, query: Query) -> Answer:
        """Sample or score one sequence."""
        n_prompt, is_scored = len(query.prompt), query.response is not None
        sampling: dict[str, Any] = {
            **query.neutral,
            "max_new_tokens": 1 if is_scored else query.sampling["max_tokens"],
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        sampling["top_k"] = sampling["top_k"] if sampling["top_k"] > 0 else -1
        if not is_scored:
            sampling["ignore_eos"] = query.sampling["ignore_eos"]
            sampling["stop_token_ids"] = list(query.sampling.get("stop_token_ids") or ())
        body = {
            "input_ids": query.submitted,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": n_prompt - 1 if is_scored else -1,
            "top_logprobs_num": int(query.wants_top),
            "return_routed_experts": self.returns_routes,
        }
        return sglang_answer(self.http.post("/generate", body), query)


_SGLANG_FACTS = (
    "dtype", "quantization", "kv_cache_dtype", "tp_size", "dp_size", "ep_size", "attention_backend",
    "moe_runner_backend", "disable_cuda_graph", "disable_radix_cache", "enable_deterministic_inference", "random_seed",
)  # fmt: skip


def sglang_answer(record: dict[str, Any], query: Query) -> Answer:
    """An answer of SGLang's ``/generate``.

    Raises:
        CaptureError: it is of other tokens than were sent, or lacks log-probabilities.
    """
    meta = record.get("meta_info") or {}
    sampled = meta.get("output_token_logprobs") or []
    if meta.get("prompt_tokens") != len(query.submitted):
        raise CaptureError(
            f"sequence {query.name}: SGLang counts {meta.get('prompt_tokens')} prompt tokens of {len(query.submitted)}"
        )
    tops = meta.get("output_top_logprobs") or []
    top = max(entry[0] for entry in tops[0]) if query.wants_top and tops and tops[0] else None
    listed, ids = sampled, record.get("output_ids") or [entry[1] for entry in sampled]
    if query.response is not None:  # the first entry has no predecessor, hence no score
        listed, ids = (meta.get("input_token_logprobs") or [])[-len(query.response) :], query.response
    if [entry[1] for entry in listed] != ids or any(entry[0] is None for entry in listed):
        raise CaptureError(f"sequence {query.name}: SGLang's log-probabilities are of other tokens than were sent")
    routes = None
    if meta.get("routed_experts"):
        n_rows = len(query.submitted) + len(sampled) - 1
        width = {"int32": "<i4", "uint16": "<u2", "uint8": "u1"}[str(meta.get("routed_experts_dtype", "int32"))]
        routes = np.frombuffer(base64.b64decode(meta["routed_experts"]), width).reshape(n_rows, -1)
    return Answer(list(ids), [entry[0] for entry in listed], routes, top)


def _npy(text: str) -> NDArray[Any]:
    routes: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return routes


def open_server(url: str, model: str | None) -> VllmServer | SglangServer:
    """The server at a URL, known by what it answers.

    Raises:
        EngineError: there is none, it is of another kind, or serves no such model.
    """
    http = Http(url)
    version = (http.get("/version") or {}).get("version")
    if version is not None:
        return VllmServer(http, str(version), model)
    info = http.get("/server_info") or http.get("/get_server_info")
    if info is None or "model_path" not in info:
        raise EngineError(
            f"{http.base} is neither vLLM's server nor SGLang's: it knows neither /version nor /server_info"
        )
    return SglangServer(http, info, model)


def capture_server(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Fill the missing shards of an arm that a running server samples or scores.

    Args:
        options: as for :func:`moediag.engines.vllm.engine.capture_infer`.

    Raises:
        EngineError: no server, another model, or an answer that is no log-probability.
        CaptureError: an answer is of other tokens, or incomplete; nothing of that shard is stored.
        IncompleteRunError: the tokens to score are not there yet.
    """
    run, request = writer.run, ArmRequest(**options["request"])
    missing = writer.own_missing_shards(request.arm)
    waiting = [shard for shard in missing if request.path != SAMPLED and not run.has_tokens(shard)]
    if waiting:
        raise IncompleteRunError(
            f"{run.path} has no tokens yet for {len(waiting)} of its shards, first {waiting[0].stem}; "
            f"run first: moediag capture {run.sampler} CKPT -o {run.path}"
        )
    if missing:
        reporter.stage("asking the server")
        arm = ServerArm(writer, open_server(request.server, request.options.get("model")), request, options["routing"])
        record = arm.record(options["checkpoint"], options["configuration"])
        reporter.note(f"Server   {arm.server.facts['version']} serves {arm.server.model}: {arm.words}")
        writer.begin_arm(record, None)
        fill_missing_shards(writer, request.arm, reporter, arm.capture_shard)


class ServerArm:
    """One arm on a server.

    Raises:
        EngineError: the server has no room for the run's sequences, or gives no log-probabilities.
    """

    def __init__(
        self,
        writer: RunWriter,
        server: VllmServer | SglangServer,
        request: ArmRequest,
        routing: dict[str, Any] | None,
    ) -> None:
        self.writer, self.run, self.server, self.request = writer, writer.run, server, request
        self.routing = ModelRouting.from_record(routing) if routing else None
        self.prompts = load_prompt_tokens(self.run)
        known = known_sampling(self.run)
        self.seed = int(known["seed"])
        self.sampling = {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "ignore_eos": False,
            **{name: value for name, value in known.items() if name not in ("n", "seed")},
        }  # fmt: skip
        self._refuse_long()
        self.is_processed, self.returns_routes = self._probe()

    def _refuse_long(self) -> None:
        """A token more than a sequence has: servers do not prefill without sampling."""
        if not self.server.max_length:
            return
        longest = max(len(prompt) for _, _, prompt, _ in self.prompts) + 1
        if self.request.path == PREFILL:
            bounds = [b - a for shard in self.run.shards for a, b in self.run.tokens(shard).sequence_bounds()]
            longest = max(bounds) + 1
        if longest > self.server.max_length:
            raise EngineError(
                f"the server's longest sequence has {self.server.max_length} tokens, this run needs {longest}; start "
                f"it with --max-model-len {longest} (SGLang: --context-length)"
            )

    def _probe(self) -> tuple[bool, bool]:
        """Whether log-probabilities are taken after temperature, and whether routes come back."""
        prompt, tops = self.prompts[0][2], []
        for temperature in (1.0, 2.0):
            sampling = {**self.sampling, "temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            query = Query("0 (probe)", prompt, None, {**sampling, "max_tokens": 1}, self.seed, wants_top=True)
            answer = self.server.ask(query)
            if answer.top_logp is None or len(answer.logps) != len(answer.token_ids):
                raise EngineError(
                    f"{self.server.facts['url']} returns no log-probabilities; start the server with them"
                )
            tops.append(answer.top_logp)
        if max(tops) > 1e-3:
            raise EngineError(
                f"the server's log-probabilities are logits ({max(tops):.3g} for one token); start it with "
                "--logprobs-mode raw_logprobs"
            )
        is_processed = abs(tops[0] - tops[1]) > _RAW_WITHIN
        if is_processed and self.request.path == SAMPLED and not self.sampling["temperature"]:
            raise EngineError(
                "the server's log-probabilities are taken after temperature, and at temperature 0 they say nothing; "
                "start it with --logprobs-mode raw_logprobs (SGLang: SGLANG_RETURN_ORIGINAL_LOGPROB=1)"
            )
        return is_processed, answer.routes_NLK is not None and self.routing is not None

    @property
    def words(self) -> str:
        """What the server gives, in words."""
        when = "after temperature" if self.is_processed else "before temperature (raw)"
        routes = "no experts"
        if self.returns_routes:
            routes = "experts"
        elif self.routing is not None:
            routes = "no experts (it was started without --enable-return-routed-experts)"
        return f"log-probabilities {when}, {routes}; no router logits, margins and entropies: servers return none"

    def record(self, checkpoint: str, configuration: dict[str, Any]) -> ArmRecord:
        """What arm.json says of this arm."""
        parameters = Query(
            "0", self.prompts[0][2], [] if self.request.path == PREFILL else None, self.sampling, 0
        ).neutral
        facts = {
            "max_model_len": self.server.max_length,
            "server": self.server.facts,
            "sampling": {**self.sampling, **parameters},
            "observer": self.words,
            "seeding": "per request",
        }
        made = self.request.record(
            checkpoint,
            configuration,
            facts,
            self.server.versions,
            arrays=arrays_of(IDS, is_routed=self.returns_routes, has_entropy=False),
            routers=self.routing.routers() if self.routing else (),
        )
        is_processed = self.is_processed and self.request.path == SAMPLED  # prompts' are raw in both servers
        score = Score(temperature=1.0, processed=False)
        if is_processed:
            cuts = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
            in_force = [f"{name}={self.sampling[name]}" for name, off in cuts.items() if self.sampling[name] != off]
            score = Score(temperature=self.sampling["temperature"], processed=True, truncation=tuple(in_force))
        return made.model_copy(update={"score": score})

    def capture_shard(self, shard: Shard, on_done: OnDone) -> None:
        """Sample or score one shard's sequences and commit the arrays, and the tokens where they were sampled."""
        started = time.monotonic()
        is_sampled = self.request.path == SAMPLED
        given = None if is_sampled else self.run.tokens(shard)
        queries = []
        for i, seq_id in enumerate(shard.seq_ids):
            prompt, response, seed = self.prompts[seq_id][2], None, seed_of(f"{self.seed}:sequence:{seq_id}")
            sampling = self.sampling
            if given is not None:
                start, end = given.sequence_bounds()[i]
                ids, is_response_T = given.token_id_T[start:end], given.is_response_T[start:end]
                prompt, response = ids[~is_response_T].tolist(), ids[is_response_T].tolist()
            elif self.server.max_length:
                room = self.server.max_length - len(prompt)
                sampling = {**sampling, "max_tokens": min(sampling["max_tokens"], room)}
            queries.append(Query(str(seq_id), prompt, response, sampling, seed))
        answers = self._ask_all(queries, on_done)
        samples = [(*self.prompts[i][:3], one.token_ids) for i, one in zip(shard.seq_ids, answers, strict=True)]
        tokens = token_rows(shard.seq_ids, samples) if given is None else given
        logp_T = np.full(len(tokens), np.nan, dtype=np.float32)
        logp_T[tokens.is_response_T] = [logp for one in answers for logp in one.logps]
        capture = capture_of(logp_T, None, self._routes(shard, tokens, queries, answers))
        facts = {"seconds": round(time.monotonic() - started, 3)}
        self.writer.write_capture(self.request.arm, shard, tokens, capture, facts, {}, None)
        if is_sampled:  # tokens last: other arms take a shard up once its tokens are committed
            self.writer.write_tokens(shard, tokens)

    def _ask_all(self, queries: list[Query], on_done: OnDone) -> list[Answer]:
        answers: dict[str, Answer] = {}
        executor = ThreadPoolExecutor(int(self.request.options.get("max_num_seqs") or IN_FLIGHT))
        try:
            futures = {executor.submit(self._ask, query): query.name for query in queries}
            for future in as_completed(futures):
                answers[futures[future]] = future.result()
                on_done(len(answers))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        return [answers[query.name] for query in queries]

    def _ask(self, query: Query) -> Answer:
        answer = self.server.ask(query)
        if not answer.token_ids or len(answer.logps) != len(answer.token_ids):
            raise CaptureError(
                f"sequence {query.name}: the server returned {len(answer.logps)} log-probabilities for "
                f"{len(answer.token_ids)} response tokens; nothing was stored"
            )
        return answer

    def _routes(
        self, shard: Shard, tokens: Any, queries: list[Query], answers: list[Answer]
    ) -> dict[str, NDArray[Any]]:
        """Expert ids in the order of the token table, of MoE layers alone."""
        if not self.returns_routes or self.routing is None:
            return {}
        rows: list[NDArray[Any]] = []
        for query, answer in zip(queries, answers, strict=True):
            if answer.routes_NLK is None:
                raise CaptureError(f"sequence {query.name}: the server returned no experts; nothing was stored")
            routes = answer.routes_NLK.reshape(len(answer.routes_NLK), -1, self.routing.top_k)
            rows.append(routes[:, list(self.routing.decoder_layers)].astype(np.int16))
        consumed = [[*query.prompt, *answer.token_ids] for query, answer in zip(queries, answers, strict=True)]
        for query, ids, routes in zip(queries, consumed, rows, strict=True):
            if len(routes) > len(ids):
                raise CaptureError(f"sequence {query.name}: {len(routes)} rows of experts for {len(ids)} tokens")
        arrays = {
            "request_T": np.repeat(np.arange(len(rows)), [len(one) for one in rows]),
            "position_T": np.concatenate([np.arange(len(one)) for one in rows]),
            "token_id_T": np.concatenate([ids[: len(one)] for ids, one in zip(consumed, rows, strict=True)]),
            "expert_ids_TLK": np.concatenate(rows),
        }
        return order_rows(tokens, arrays, list(shard.seq_ids), needs_last_row=self.request.path == PREFILL)
