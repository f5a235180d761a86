"""Scripted runs and a scripted engine: run directories made without vLLM or transformers, through the real store.

The arrays are a function of (seed, side, sequence) alone, as those of a seeded engine are: whoever captures a
shard, however often it was interrupted, writes the same bytes.

:func:`fill_scripted_run` is a whole worker: what an engine process does, in the same order, by the same code.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from records import arm_of, checkpoint_of, new_run

from moediag.engines.process import Reporter, fill_missing_shards
from moediag.run.capture import WHOLE, Capture, Shard, Slice, TokenRows, encode_prompts
from moediag.run.files import rows_prefix
from moediag.run.reader import Run, open_run
from moediag.run.records import Sampling
from moediag.run.writer import RunWriter

VOCABULARY = 200
SCORE_DTYPES = {"gate_weights_TLK": "bfloat16"}
CONFIGURATION = {"dtype": "bfloat16"}


def make_scripted_run(
    path: Path,
    *,
    n_prompts: int = 6,
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    shard_size: int = 2,
    seed: int = 0,
    dense: bool = False,
) -> Run:
    """A complete, healthy run with the arms infer and train: routing at random, some flips, small logp differences.

    The last sampled token of every sequence has no routing row in infer, as in a sampled vLLM arm.
    """
    run = create_scripted_run(
        path, n_prompts=n_prompts, n_layers=n_layers, n_experts=n_experts, top_k=top_k, shard_size=shard_size,
        seed=seed, dense=dense,
    )  # fmt: skip
    writer = RunWriter(run)
    for arm in ("infer", "train"):
        writer.begin_arm(arm_of(run, arm))
        for shard in run.shards:
            write_scripted_shard(writer, arm, shard)
    return open_run(path)


def create_scripted_run(
    path: Path,
    *,
    n_prompts: int = 6,
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    shard_size: int = 2,
    seed: int = 0,
    dense: bool = False,
    force: bool = False,
    full_vocab: int = 0,
) -> Run:
    """The run directory alone, no arm captured; the same arguments open the one that is there."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=6, n=1, seed=seed, ignore_eos=False)
    checkpoint = checkpoint_of(
        () if dense else range(1, n_layers + 1),
        n_experts,
        top_k,
        source="models/scripted",
        architecture="ScriptedForCausalLM",
        model_type="scripted",
        n_decoder_layers=n_layers + 1,
        stored_dtype="bfloat16",
    )
    prompts = encode_prompts([_prompt(seed, i) for i in range(n_prompts)], None)
    asked = {**sampling.content(), "weights_sha256": checkpoint.weights_sha256, "n_prompts": n_prompts}
    asked |= {"full_vocab": full_vocab} if full_vocab else {}
    return new_run(
        path, prompts, n_prompts, shard_size, checkpoint, force, configuration=asked, sampling=sampling,
        full_vocab=full_vocab,
    )  # fmt: skip


def write_scripted_shard(writer: RunWriter, arm: str, shard: Shard) -> None:
    """Commit one shard of an arm; the infer arm brings the tokens, after its arrays, as vLLM's does."""
    run = writer.run
    tokens = scripted_tokens(run, shard) if arm == "infer" else run.tokens(shard)
    capture = scripted_capture(run, arm, tokens)
    writer.write_capture(arm, shard, tokens, capture, {"seconds": 0.1}, SCORE_DTYPES if run.arm(arm).routers else {})
    if arm == "infer":
        writer.write_tokens(shard, tokens)


def scripted_tokens(run: Run, shard: Shard) -> TokenRows:
    """Prompts of the run, each followed by 3 to 6 sampled tokens."""
    seed = _seed(run)
    prompts = [_prompt(seed, seq_id) for seq_id in shard.seq_ids]
    responses = []
    for seq_id in shard.seq_ids:
        rng = _rng(seed, "response", seq_id)
        responses.append(rng.integers(0, VOCABULARY, rng.integers(3, 7)).tolist())
    rows = [
        (seq_id, position, token, position >= len(prompt))
        for seq_id, prompt, response in zip(shard.seq_ids, prompts, responses, strict=True)
        for position, token in enumerate([*prompt, *response])
    ]
    seq_id, position, token_id, is_response = (np.array(column) for column in zip(*rows, strict=True))
    return TokenRows(
        seq_id_T=seq_id.astype(np.int64),
        prompt_id_T=seq_id.astype(np.int64),
        sample_index_T=np.zeros(len(rows), np.int32),
        position_T=position.astype(np.int32),
        token_id_T=token_id.astype(np.int64),
        is_response_T=is_response,
    )


def scripted_capture(run: Run, arm: str, tokens: TokenRows) -> Capture:
    """Top-K of random logits; an arm other than infer sees them slightly perturbed, so that near ties flip."""
    parts = [_sequence(run, arm, tokens, start, end) for start, end in tokens.sequence_bounds()]
    return Capture(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _sequence(run: Run, arm: str, tokens: TokenRows, start: int, end: int) -> dict[str, Any]:
    seed, seq_id = _seed(run), int(tokens.seq_id_T[start])
    shared, own = _rng(seed, "shared", seq_id), _rng(seed, arm, seq_id)
    n, is_response_T = end - start, tokens.is_response_T[start:end]
    wobble = 0.0 if arm == "infer" else 0.02
    logp_T = -shared.exponential(1.0, n) - 0.05 + wobble * np.clip(own.normal(size=n), -2, 2)
    arrays = {
        "logp_T": np.where(is_response_T, logp_T, np.nan).astype(np.float32),
        "entropy_T": np.where(is_response_T, shared.random(n) + 0.5, np.nan).astype(np.float32),
    }
    if not run.routers:
        return arrays
    record = run.arm(arm)
    logits_TLE = shared.normal(size=(n, len(record.routers), record.n_experts))
    arrays |= _routing(logits_TLE + 5 * wobble * own.normal(size=logits_TLE.shape), record.top_k)
    if arm == "infer":  # the last sampled token is never consumed
        for name in ("expert_ids_TLK", "gate_weights_TLK", "margin_TL", "logit_margin_TL"):
            arrays[name][-1] = -1 if name == "expert_ids_TLK" else np.nan
    return arrays


def _routing(logits_TLE: np.ndarray, top_k: int) -> dict[str, Any]:
    """Softmax routing without renormalisation; gate weights exact in bfloat16."""
    order_TLE = np.argsort(-logits_TLE, axis=2)
    scores_TLE = np.exp(logits_TLE) / np.exp(logits_TLE).sum(axis=2, keepdims=True)
    ranked_TLE, ranked_logits_TLE = (np.take_along_axis(a, order_TLE, axis=2) for a in (scores_TLE, logits_TLE))
    weights_TLK = ranked_TLE[:, :, :top_k].astype(np.float32)
    has_next = top_k < logits_TLE.shape[2]
    margins = {
        name: (a[:, :, top_k - 1] - (a[:, :, top_k] if has_next else 0.0)).astype(np.float32)
        for name, a in (("margin_TL", ranked_TLE), ("logit_margin_TL", ranked_logits_TLE))
    }
    return {
        "expert_ids_TLK": order_TLE[:, :, :top_k].astype(np.int16),
        "gate_weights_TLK": (weights_TLK.view(np.uint32) & 0xFFFF0000).view(np.float32),
        **margins,
    }


def _seed(run: Run) -> int:
    assert run.record.sampling is not None
    return int(run.record.sampling.seed or 0)


def _prompt(seed: int, prompt_id: int) -> list[int]:
    rng = _rng(seed, "prompt", prompt_id)
    return [int(token) for token in rng.integers(0, VOCABULARY, rng.integers(2, 6))]


def _rng(seed: int, what: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, *what.encode()])


@dataclass(frozen=True)
class Death:
    """How a scripted worker dies; all of them are as sudden as kill -9.

    Args:
        at_event: SIGKILL itself before the so-many-th operation on a file of the run (open, rename, remove, ...).
        at_byte: the kernel kills it when a file would grow beyond so many bytes: in the middle of a write.
    """

    at_event: int | None = None
    at_byte: int | None = None

    def prepare(self, run_path: Path) -> None:
        """Arrange it for this process."""
        if self.at_byte is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at_byte, self.at_byte))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would raise EFBIG instead
        if self.at_event is not None:
            left = self.at_event

            def count(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal left
                if any(str(run_path.parent) in os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes))):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)


def fill_scripted_run(
    path: Path,
    layout: dict[str, Any],
    worker: Slice = WHOLE,
    arms: tuple[str, ...] = ("infer", "train"),
    pause: float = 0.0,
    death: Death | None = None,
    journal: Path | None = None,
) -> None:
    """Make or join the run and fill a slice of its arms, as an engine process does.

    Args:
        pause: mean time that a shard takes beyond writing it [s].
        journal: file that gets a line when a shard is begun and when it is done.
    """
    os.environ["MOEDIAG_CHANNEL_FD"] = str(os.open(os.devnull, os.O_WRONLY))
    if death:
        death.prepare(path)
    run = create_scripted_run(path, **layout)
    writer = RunWriter(run, worker)
    rng, reporter = random.Random(), Reporter()
    with writer.in_use():
        for arm in arms:
            missing = writer.own_missing_shards(arm)
            if not missing or (arm != "infer" and not all(map(run.has_tokens, missing))):
                continue  # a real train engine refuses in words
            writer.begin_arm(arm_of(run, arm))

            def capture_shard(shard: Shard, on_done: Any, arm: str = arm) -> None:
                _note(journal, f"begun {arm} {shard.stem}")
                with tempfile.TemporaryDirectory(prefix=rows_prefix(shard.stem), dir=run.path / "arms" / arm) as rows:
                    (Path(rows) / "rows.bin").write_bytes(b"rows")
                    time.sleep(rng.uniform(0, 2 * pause))
                write_scripted_shard(writer, arm, shard)
                _note(journal, f"done {arm} {shard.stem}")

            fill_missing_shards(writer, arm, reporter, capture_shard)


def _note(journal: Path | None, line: str) -> None:
    if journal:
        with journal.open("a") as file:
            file.write(f"{line} {os.getpid()}\n")


def start_worker(*arguments: Any, **options: Any) -> Any:
    """:func:`fill_scripted_run` in a process of its own, forked in milliseconds from a server that has it imported."""
    context = multiprocessing.get_context("forkserver")
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # for the server, which starts once
        os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        context.set_forkserver_preload(["scripted_engine"])
    process = context.Process(target=fill_scripted_run, args=arguments, kwargs=options)
    process.start()
    return process
