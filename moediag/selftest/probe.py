"""What the self-test asks of a loaded model beside its captures, inside the engine's process.

Do taps and hooks change anything, what do they cost, and how far does one unit in the last place carry?
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moediag.engines.arms import ArmRequest
from moediag.engines.assemble import FULL, MARGINS
from moediag.engines.hf.batching import alone
from moediag.engines.hf.engine import TrainEngine, decoder_layers, held_model
from moediag.engines.hf.perturbation import ULP, Perturbed
from moediag.engines.hf.taps import ForcedRoutes, RoutingTaps
from moediag.engines.process import Held, Reporter
from moediag.errors import EngineError
from moediag.run.capture import TokenRows
from moediag.run.files import write_atomic
from moediag.run.writer import RunWriter

MAX_TOKENS, N_COINS, N_TIMED = 24, 3, 3

Greedy = tuple[NDArray[Any], NDArray[Any]]
"""Token ids and their log-probabilities, (S, tokens)."""

Parts = list[dict[str, torch.Tensor]]
"""What a model gave for one sequence after the other."""


def probe_vllm(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Greedy tokens and log-probabilities with the taps, without them and with them again; what the taps cost; and why
    vLLM's own record of experts is not to be had here, if so."""
    from moediag.engines.vllm.engine import held_llm, require_native_observer

    llm = held_llm(held, options["folder"], ArmRequest(**options["request"]), reporter)
    prompts = writer.run.prompt_tokens()[0]
    tap = (options["routing"], MARGINS)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    results = []
    for is_tapped in (True, False) * N_TIMED:
        llm.collective_rpc("moediag_install", args=tap) if is_tapped else llm.collective_rpc("moediag_remove")
        if is_tapped:
            llm.collective_rpc("moediag_begin", args=(None,))
        started = time.perf_counter()
        results.append(greedy(llm, prompts, MAX_TOKENS))
        seconds[is_tapped].append(time.perf_counter() - started)
    try:
        require_native_observer()
        absent = ""
    except EngineError as error:
        absent = str(error)
    plain = results[1::2]
    found = {
        "n_tokens": int(plain[0][0].size),
        "with_taps": max(_apart(one, other) for one in results[::2] for other in plain),
        "without": max(_apart(plain[0], other) for other in plain),
        "overhead": min(seconds[True]) / min(seconds[False]),
        "seconds_without": min(seconds[False]),
        "no_v2": absent,
    }
    write_atomic(Path(options["output"]), json.dumps(found).encode())


def _apart(one: Greedy, other: Greedy) -> float:
    """Largest difference of log-probabilities [nat]; infinite where tokens differ."""
    return float(np.abs(one[1] - other[1]).max()) if (one[0] == other[0]).all() else math.inf


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int = 48) -> Greedy:
    """Greedy tokens of every prompt and their log-probabilities, (S, max_tokens)."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    logps = [
        [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        for output, tokens in zip(outputs, ids, strict=True)
    ]
    return np.array(ids), np.array(logps)


def probe_train(writer: RunWriter, options: dict[str, Any], reporter: Reporter, held: Held) -> None:
    """Logits with and without hooks, and what one unit in the last place does."""
    request = ArmRequest(**options["request"])
    model = held_model(held, options["folder"], request.options, reporter)
    engine = TrainEngine(writer, model, request, options["routing"])
    tokens = writer.run.tokens(writer.run.shards[0])
    found = {
        "is_equal": engine.spec is None or hooks_change_nothing(engine, tokens),
        "one_ulp": one_ulp(engine, tokens, scored(engine, tokens)),
    }
    write_atomic(Path(options["output"]), json.dumps(found).encode())


def hooks_change_nothing(engine: TrainEngine, tokens: TokenRows) -> bool:
    """Logits of transformers before, with and after the hooks, bit for bit."""
    assert engine.spec is not None
    start, end = tokens.sequence_bounds()[-1]
    ids = torch.from_numpy(tokens.token_id_T[start:end].copy())[None].to(engine.model.device)
    with torch.inference_mode():
        plain = engine.model(input_ids=ids, use_cache=False).logits
        with RoutingTaps(engine.model, engine.spec, FULL):
            hooked = engine.model(input_ids=ids, use_cache=False).logits
        after = engine.model(input_ids=ids, use_cache=False).logits
    return torch.equal(plain, hooked) and torch.equal(plain, after)


def one_ulp(engine: TrainEngine, tokens: TokenRows, plain: Parts) -> float:
    """Mean abs logp diff of transformers to itself when the input of every decoder layer is moved to its neighbour in
    the dtype, up or down by a coin; mean of three draws [nat]."""
    moved = []
    for seed in range(N_COINS):
        with Perturbed(decoder_layers(engine.model), ULP, seed):
            moved.append(joined(scored(engine, tokens), "logp_T"))
    return float(np.mean([mean_abs_diff(logp_T, joined(plain, "logp_T"), tokens) for logp_T in moved]))


def scored(engine: TrainEngine, tokens: TokenRows, forced: Callable[..., ForcedRoutes] | None = None) -> Parts:
    """Every sequence on its own, with the routes that ``forced`` gives for its bounds."""
    return [
        engine.score(tokens, alone(start, end), None if forced is None else forced(start, end))
        for start, end in tokens.sequence_bounds()
    ]


def joined(parts: Parts, name: str) -> NDArray[np.float64]:
    """One array of all sequences."""
    array: NDArray[np.float64] = torch.cat([part[name] for part in parts]).double().numpy()
    return array


def mean_abs_diff(a_T: NDArray[Any], b_T: NDArray[Any], tokens: TokenRows) -> float:
    """Over response tokens [nat]."""
    return float(np.abs(a_T - b_T.astype(np.float64))[tokens.is_response_T].mean())
