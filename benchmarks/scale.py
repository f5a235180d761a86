"""Time and memory of ``analyze`` on captures at the shape of Qwen3-30B-A3B: 48 MoE layers, 8 of 128 experts.

``make`` writes a run of two arms whose shards are as an engine's would be: 64 responses of 512 tokens, bf16 scores, ids
of one byte, 1.55 kB a token and arm. Shards beyond ``--distinct`` tokens are hard links to the arms' files of earlier
ones, each with a token table and sealed sidecars of its own: nothing that reads them is loosened, the same bytes are
read, and 100 million tokens lie where there is room for one. Routing is drawn as in :mod:`analysis_speed`.

``measure`` times, each in a process of its own: one plain pass over the arms' files; ``moediag analyze``, nothing kept
from before, with one and with two processes; ``analyze`` again, unchanged; and numpy's and verl's plain way (both arms'
log-probabilities in memory, their differences, their quantiles; ids sorted and compared) on as many shards as 2 GiB
hold.

Usage: python benchmarks/scale.py make FOLDER --tokens N [--distinct N] | measure FOLDER [--workers 1 2]
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from analysis_speed import LENGTH, N_EXPERTS, N_LAYERS, POOL, SAMPLES, TOP_K, make_pool

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from records import arm_of, checkpoint_of, new_run

from moediag.run.capture import Capture, Shard, TokenRows
from moediag.run.files import write_sealed
from moediag.run.reader import Run, open_run, tokens_sha256
from moediag.run.records import Sampling
from moediag.run.writer import RunWriter

N_PROMPT = 1
SEQUENCES_PER_SHARD = 64
ARMS = ("infer", "train")
DTYPES = dict.fromkeys(("gate_weights_TLK", "margin_TL", "logit_margin_TL"), "bfloat16")
PLAIN_GIB = 2.0


def tokens_of(shard: Shard) -> TokenRows:
    """Token table of a shard: prompts of one token, responses of LENGTH."""
    rng = np.random.default_rng(shard.index)
    seq_T = np.repeat(np.arange(shard.first_sequence, shard.first_sequence + shard.n_sequences), N_PROMPT + LENGTH)
    position_T = np.tile(np.arange(N_PROMPT + LENGTH), shard.n_sequences)
    return TokenRows(
        seq_id_T=seq_T,
        prompt_id_T=seq_T // SAMPLES,
        sample_index_T=(seq_T % SAMPLES).astype(np.int32),
        position_T=position_T.astype(np.int32),
        token_id_T=rng.integers(0, 150_000, len(seq_T)),
        is_response_T=position_T >= N_PROMPT,
    )


def capture_of(pool: dict[str, np.ndarray], shard: Shard, tokens: TokenRows, arm: str) -> Capture:
    """An arm's arrays for a shard; train's log-probabilities differ by 3 %, with the tails of t(5)."""
    rng = np.random.default_rng(shard.index)
    drawn_T = np.resize(rng.permutation(POOL), len(tokens))  # no row beside itself: that is a stale buffer's mark
    logp_T = -rng.exponential(0.5, len(tokens)).astype(np.float32)
    entropy_T = rng.exponential(0.5, len(tokens)).astype(np.float32)
    if arm == "train":
        logp_T *= np.exp(0.03 * rng.standard_t(5, len(tokens))).astype(np.float32)
    for array in (logp_T, entropy_T):
        array[~tokens.is_response_T] = np.nan
    legends = {"expert_ids": "TLK", "gate_weights": "TLK", "margin": "TL", "logit_margin": "TL"}
    routing = {f"{name}_{legend}": pool[f"{name}_{arm}_{legend}"][drawn_T] for name, legend in legends.items()}
    return Capture(logp_T=logp_T, entropy_T=entropy_T, **routing)


def bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 values cut to what bfloat16 holds; whole numbers as they are."""
    if array.dtype != np.float32:
        return array
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


def make(path: Path, n_tokens: int, n_distinct: int) -> None:
    """A run of two arms."""
    n_sequences = -(-n_tokens // LENGTH)
    sink = io.BytesIO()
    pd.DataFrame({"prompt_token_ids": [[1]] * n_sequences}).to_parquet(sink)
    checkpoint = checkpoint_of(tuple(range(N_LAYERS)), N_EXPERTS, TOP_K)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    run = new_run(path, sink.getvalue(), n_sequences, SEQUENCES_PER_SHARD, checkpoint, sampling=sampling,
                  configuration={"max_tokens": LENGTH})  # fmt: skip
    writer, pool = RunWriter(run), {name: bfloat16(array) for name, array in make_pool(0.01).items()}
    for arm in ARMS:
        writer.begin_arm(arm_of(run, arm))
    n_written = max(1, n_distinct // (LENGTH * SEQUENCES_PER_SHARD))
    for shard in run.shards:
        if not all(run.has_capture(arm, shard) for arm in ARMS):
            tokens = tokens_of(shard)
            writer.write_tokens(shard, tokens)
            for arm in ARMS:
                if shard.index < n_written or shard.n_sequences < SEQUENCES_PER_SHARD:
                    writer.write_capture(arm, shard, tokens, capture_of(pool, shard, tokens, arm), {}, dict(DTYPES))
                else:
                    link(run, arm, shard, tokens, run.shards[shard.index % n_written])
        if shard.index % 64 == 63:
            print(f"{shard.index + 1}/{len(run.shards)} shards", file=sys.stderr)


def link(run: Run, arm: str, shard: Shard, tokens: TokenRows, to: Shard) -> None:
    """The arm's file of another shard under this one's name, with a sidecar of its own."""
    ours, theirs = (run.sidecar_path(f"arms/{arm}", one) for one in (shard, to))
    os.link(theirs.with_suffix(".safetensors"), ours.with_suffix(".safetensors"))
    sidecar = run.capture_sidecar(arm, to).model_copy(update={"tokens_sha256": tokens_sha256(tokens)})
    write_sealed(ours, sidecar.content())


def one_pass(run: Run) -> None:
    """Read every byte of both arms once, file by file."""
    buffer = memoryview(bytearray(1 << 24))
    for path in (path for arm in ARMS for path in sorted(run.arm_folder(arm).glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def plain(run: Run, n_shards: int) -> float:
    """numpy's and verl's way: everything in memory, differences and quantiles of all, ids sorted and compared."""
    read = {arm: [run.capture(arm, shard) for shard in run.shards[:n_shards]] for arm in ARMS}
    logp = {arm: np.concatenate([one.logp_T for one in read[arm]]) for arm in ARMS}
    diff = logp["train"] - logp["infer"]
    diff = diff[~np.isnan(diff)]
    ids = {arm: np.sort(np.concatenate([one.expert_ids_TLK for one in read[arm]]), axis=-1) for arm in ARMS}
    flips = (ids["train"] != ids["infer"]).any(axis=-1).mean()
    return float(np.abs(diff).mean() + np.quantile(np.abs(diff), [0.5, 0.9, 0.99]).sum() + flips)


def timed(*command: object) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak memory [GiB]) of a command and of every process that it starts.

    Memory is the largest sum of what is resident in its processes, a page that several share counted once; looked at
    four times a second. Processor time of a process is what it had used when it was last seen.
    """
    tick = os.sysconf("SC_CLK_TCK")
    seconds: dict[str, float] = {}
    peak, start = 0, time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None:
            resident = 0
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = stat.read_text().rpartition(")")[2].split()
                    if int(fields[3]) == process.pid:
                        seconds[stat.parent.name] = (int(fields[11]) + int(fields[12])) / tick
                        pages = (stat.parent / "smaps_rollup").read_text()
                        resident += 1024 * int(pages.partition("\nPss:")[2].split()[0])
                except (OSError, IndexError):  # it has just ended
                    continue
            peak = max(peak, resident)
            time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return time.perf_counter() - start, sum(seconds.values()), peak / 2**30


def measure(path: Path, workers: list[int]) -> None:
    """Print a table."""
    run = open_run(path)
    n_tokens = run.n_sequences * LENGTH
    n_bytes = sum(run.capture_sidecar(arm, shard).n_bytes for arm in ARMS for shard in run.shards)
    n_plain = max(1, int(PLAIN_GIB * 2**30 / (3 * n_bytes / len(run.shards))))
    print(f"{n_tokens:,} tokens, {n_bytes / 1e9:.1f} GB of two arms; L {N_LAYERS}, K {TOP_K}, E {N_EXPERTS}")
    once = 0.0

    def show(name: str, found: tuple[float, float, float], share: float = 1.0) -> None:
        wall, cpu, peak = found
        times = f"{wall / share / once:6.2f}" if once else "  1.00"
        print(f"{name:<44}{wall:9.1f} s{cpu:9.1f} s of processor{n_bytes * share / wall / 1e6:9.0f} MB/s"
              f"{peak:7.2f} GiB{times} x one pass", flush=True)  # fmt: skip

    found = timed(sys.executable, __file__, "pass", path)
    once = found[0]
    show("one pass over the files", found)
    share = min(1.0, n_plain / len(run.shards))
    show(f"numpy's plain way, {min(n_plain, len(run.shards))} shards", timed(sys.executable, __file__, "plain", path,
         "--shards", n_plain), share)  # fmt: skip
    moediag = Path(sys.executable).with_name("moediag")
    for n in workers:
        shutil.rmtree(path / "analysis", ignore_errors=True)
        show(f"analyze --workers {n}", timed(moediag, "analyze", path, "--workers", n))
    show("analyze again, unchanged", timed(moediag, "analyze", path))


def main() -> int:
    """Make or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure", "pass", "plain"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--distinct", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.tokens, args.distinct)
    elif args.what == "measure":
        measure(args.folder, args.workers)
    elif args.what == "pass":
        one_pass(open_run(args.folder))
    else:
        plain(open_run(args.folder), args.shards)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
