"""Speed and memory of the routing analyses at the shape of Qwen3-30B-A3B: 48 MoE layers, 8 of 128 experts.

Shards are made in memory one by one, both arms, and dropped after use. Routing is drawn from a pool of tokens whose
router logits are Gaussian, the train arm's with noise added (``--noise``; 0.01 flips about 8 % of choices, R3's
figure). CPU times of every stage are summed over all shards; a stage is compared with *one pass* over the same bytes in
memory (the sum of the arrays as 64-bit words), and agreement also with a plain numpy and a plain pandas way, timed on
the first shards and scaled.

Usage: python benchmarks/analysis_speed.py [--tokens N] [--noise S]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from moediag.analysis.expert_sets import compare_block
from moediag.results.pair_analysis import RoutingPass, analyze_pair
from moediag.run.align import Pair, PairBlock

N_LAYERS, N_EXPERTS, TOP_K = 48, 128, 8
POOL, LENGTH, SEQUENCES_PER_SHARD, SAMPLES = 1024, 512, 64, 4
PLAIN_TOKENS = {"numpy": 16_384, "pandas": 2048}


def make_pool(noise: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Routing of both arms for POOL tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(POOL, N_LAYERS, N_EXPERTS)).astype(np.float32)
    pool: dict[str, np.ndarray] = {}
    for side in ("infer", "train"):
        scores = logits if side == "infer" else logits + noise * rng.normal(size=logits.shape).astype(np.float32)
        order = np.argsort(-scores, axis=2)
        ranked = np.take_along_axis(scores, order, axis=2)
        weights = np.exp(ranked[:, :, :TOP_K])
        pool[f"expert_ids_{side}_TLK"] = order[:, :, :TOP_K].astype(np.int16)
        pool[f"gate_weights_{side}_TLK"] = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)
        probability = np.exp(ranked) / np.exp(ranked).sum(axis=2, keepdims=True)
        pool[f"margin_{side}_TL"] = probability[:, :, TOP_K - 1] - probability[:, :, TOP_K]
        pool[f"logit_margin_{side}_TL"] = ranked[:, :, TOP_K - 1] - ranked[:, :, TOP_K]
    return pool


def shards(pool: dict[str, np.ndarray], n_tokens: int) -> Iterator[PairBlock]:
    """Aligned blocks of whole sequences; the same whenever they are made."""
    n_sequences = -(-n_tokens // LENGTH)
    for first in range(0, n_sequences, SEQUENCES_PER_SHARD):
        rng = np.random.default_rng(first)
        seq_S = np.arange(first, min(first + SEQUENCES_PER_SHARD, n_sequences))
        seq_T = np.repeat(seq_S, LENGTH)
        drawn = rng.integers(0, POOL, len(seq_T))
        infer_T = -rng.exponential(0.5, len(seq_T)).astype(np.float32)
        yield PairBlock(
            seq_id_T=seq_T,
            prompt_id_T=seq_T // SAMPLES,
            sample_index_T=(seq_T % SAMPLES).astype(np.int32),
            position_T=np.tile(np.arange(LENGTH, dtype=np.int32), len(seq_S)),
            token_id_T=rng.integers(0, 150_000, len(seq_T)),
            logp_train_T=infer_T + (0.02 * rng.standard_t(3, len(seq_T))).astype(np.float32),
            logp_infer_T=infer_T,
            entropy_train_T=np.full(len(seq_T), np.nan, np.float32),
            entropy_infer_T=rng.exponential(0.5, len(seq_T)).astype(np.float32),
            **{name: array[drawn] for name, array in pool.items()},
        )


def one_pass(arrays: list[np.ndarray]) -> None:
    """Read every byte once."""
    for array in arrays:
        array.reshape(-1).view(np.uint64).sum()


def plain_numpy(block: PairBlock) -> float:
    """Sort both sides and compare."""
    train, infer = (np.sort(ids, axis=-1) for ids in (block.expert_ids_train_TLK, block.expert_ids_infer_TLK))
    return float((train != infer).any(axis=-1).mean())


def plain_pandas(block: PairBlock) -> float:
    """Join the long tables of both sides on (token, layer, expert) and count what they share."""
    frames = []
    for ids in (block.expert_ids_train_TLK, block.expert_ids_infer_TLK):
        token, layer, _ = (index.ravel() for index in np.indices(ids.shape))
        frames.append(pd.DataFrame({"token": token, "layer": layer, "expert": ids.ravel()}))
    common = frames[0].merge(frames[1]).groupby(["token", "layer"]).size()
    same = int((common == TOP_K).sum())
    return 1 - same / (len(block) * N_LAYERS)


def _routing_arrays(block: PairBlock, used_only: bool) -> list[np.ndarray]:
    ids = [block.expert_ids_train_TLK, block.expert_ids_infer_TLK]
    rest = [block.gate_weights_train_TLK, block.margin_infer_TL, block.logit_margin_infer_TL]
    return [array for array in (ids if used_only else ids + rest) if array is not None]


def _first(block: PairBlock, n_tokens: int) -> PairBlock:
    return PairBlock(**{k: None if v is None else v[:n_tokens] for k, v in vars(block).items()})


def measure(pool: dict[str, np.ndarray], n_tokens: int) -> tuple[dict[str, float], dict[str, int], float]:
    """(seconds, tokens) by stage, and the flip rate."""
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)

    def timed(stage: str, run: Callable[[], Any], n: int) -> Any:
        start = time.process_time()
        result = run()
        seconds[stage] += time.process_time() - start  # CPU time: others may share the machine
        tokens[stage] += n
        return result

    routing = RoutingPass(N_LAYERS, N_EXPERTS, TOP_K)
    for block in shards(pool, n_tokens):
        ids, used = _routing_arrays(block, True), _routing_arrays(block, False)
        timed("pass over the ids", lambda ids=ids: one_pass(ids), len(block))
        timed("agreement", lambda block=block: compare_block(block), len(block))
        timed("pass over all arrays used", lambda used=used: one_pass(used), len(block))
        timed("all routing analyses", lambda block=block: routing.add(block), len(block))
        for stage, plain in (("numpy", plain_numpy), ("pandas", plain_pandas)):
            if tokens[f"plain {stage}"] < PLAIN_TOKENS[stage]:
                part = _first(block, PLAIN_TOKENS[stage])
                timed(f"plain {stage}", lambda plain=plain, part=part: plain(part), len(part))
    totals = routing.totals
    return dict(seconds), dict(tokens), 1 - totals.n_same_CL.sum() / totals.n_compared_CL.sum()


def main() -> int:
    """Print the time of every stage, its ratios, and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--noise", type=float, default=0.01)
    args = parser.parse_args()
    pool = make_pool(args.noise)
    seconds, tokens, flip_rate = measure(pool, args.tokens)
    per_token = {stage: seconds[stage] / tokens[stage] for stage in seconds}
    print(f"{tokens['agreement']} tokens, L {N_LAYERS}, K {TOP_K}, E {N_EXPERTS}; flip rate {flip_rate:.3f}")
    for stage, each in per_token.items():
        print(f"{stage:<28}{1e6 * each:10.2f} us per token{each * tokens['agreement']:10.2f} s for all")
    agreement = per_token["agreement"]
    print(f"agreement / pass over the ids            {agreement / per_token['pass over the ids']:8.1f}  (aim 3)")
    everything = per_token["all routing analyses"] / per_token["pass over all arrays used"]
    print(f"all routing / pass over all arrays used  {everything:8.1f}  (aim 10)")
    for stage in PLAIN_TOKENS:
        print(f"plain {stage:<7}/ agreement                {per_token[f'plain {stage}'] / agreement:8.1f}  (aim 5)")
    start = time.perf_counter()
    pair = Pair("infer~train", "train", "infer", tuple(range(N_LAYERS)), N_EXPERTS, TOP_K,
                lambda: shards(pool, args.tokens))  # fmt: skip
    analyze_pair(pair)
    print(f"analyze_pair, shards made on the way: {time.perf_counter() - start:.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (aim 1.5)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
