"""Time and memory of `moediag import` against reading the same file with pandas, json, pickle or torch alone.

Every format gets a file of random numbers in its own layout (N tokens, sequences of 1,000, a fifth of them prompt;
4 layers, 4 of 16 experts). A file is read alone, and imported into a run, each in a process of its own: CPU seconds of
the body and the growth of the process's largest resident size. Memory is measured at a quarter of the tokens, too. A
file of text is read and tokenised alone by the same tokenizer, a token per byte.

Usage: python benchmarks/import_dumps.py [--tokens N] [--formats NAME...]
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

LENGTH, PROMPT = 1000, 200
LAYERS, TOP_K, EXPERTS = 4, 4, 16


def sequences(n_tokens: int) -> Iterator[dict[str, Any]]:
    """Random sequences; the same whenever they are made."""
    rng = np.random.default_rng(0)
    for index in range(n_tokens // LENGTH):
        infer_T = -rng.exponential(0.5, LENGTH - PROMPT).astype(np.float32)
        train_T = np.minimum(infer_T + 0.01 * rng.normal(size=len(infer_T)).astype(np.float32), 0)
        yield {
            "index": index,
            "tokens": rng.integers(0, 150_000, LENGTH),
            "infer": infer_T,
            "train": train_T,
            "routes": rng.random((LENGTH - 1, LAYERS, EXPERTS), np.float32)
            .argsort(axis=2)[:, :, :TOP_K]
            .astype(np.uint8),
        }


def wide(values: np.ndarray) -> list[float]:
    """A response's values for the whole sequence."""
    return [0.0] * PROMPT + values.tolist()


def lines(path: Path, records: Iterator[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for record in records:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    return path


def nemo_rl(folder: Path, n_tokens: int) -> Path:
    mask = [0] * PROMPT + [1] * (LENGTH - PROMPT)
    records = (
        {
            "content": [["", ""]], "rewards": [1.0], "input_lengths": [LENGTH], "token_ids": [one["tokens"].tolist()],
            "token_loss_mask": [mask], "sample_loss_mask": [1.0], "advantages": [[0.5] * LENGTH],
            "generation_logprobs": [wide(one["infer"])], "prev_logprobs": [wide(one["train"])], "idx": one["index"],
        }
        for one in sequences(n_tokens)
    )  # fmt: skip
    return lines(folder / "train_data_step1.jsonl", records)


def prime_rl(folder: Path, n_tokens: int) -> Path:
    mask = [False] * PROMPT + [True] * (LENGTH - PROMPT)
    records = (
        {
            "schema_version": 1, "step": 0, "rank": 0, "export_sequence_idx": one["index"],
            "token_ids": one["tokens"].tolist(), "position_ids": list(range(LENGTH)), "loss_mask": mask,
            "advantages": [0.5] * LENGTH, "inference_logprobs": wide(one["infer"]),
            "trainer_logprobs": wide(one["train"]), "entropy": [1.25] * LENGTH,
        }
        for one in sequences(n_tokens)
    )  # fmt: skip
    path = lines(folder / "step_0" / "rank_0.jsonl", records)
    (path.parent / "STABLE").touch()
    return path


def sglang(folder: Path, n_tokens: int) -> Path:
    def response(one: dict[str, Any]) -> dict[str, Any]:
        output, logps = one["tokens"][PROMPT:].tolist(), one["infer"].tolist()
        about = {
            "id": str(one["index"]), "prompt_tokens": PROMPT, "completion_tokens": len(output),
            "output_token_logprobs": [[logp, token, None] for logp, token in zip(logps, output, strict=True)],
            "routed_experts": base64.b64encode(one["routes"].tobytes()).decode(), "routed_experts_dtype": "uint8",
        }  # fmt: skip
        return {"text": "", "output_ids": output, "meta_info": about}

    lines(
        folder / "requests_step0.jsonl",
        ({"rid": str(one["index"]), "input_ids": one["tokens"][:PROMPT].tolist()} for one in sequences(n_tokens)),
    )
    return lines(folder / "responses_step0.jsonl", map(response, sequences(n_tokens)))


def vllm(folder: Path, n_tokens: int) -> Path:
    def response(one: dict[str, Any]) -> dict[str, Any]:
        output, routes = one["tokens"][PROMPT:].tolist(), io.BytesIO()
        np.save(routes, one["routes"])
        content = [
            {"token_id": token, "logprob": logp} for logp, token in zip(one["infer"].tolist(), output, strict=True)
        ]
        choice = {
            "index": 0, "finish_reason": "stop", "token_ids": output, "logprobs": {"content": content},
            "routed_experts": base64.b64encode(routes.getvalue()).decode(),
        }  # fmt: skip
        prompt = one["tokens"][:PROMPT].tolist()
        return {
            "request_id": str(one["index"]),
            "prompt_token_ids": prompt,
            "output_mode": "tokens",
            "choices": [choice],
        }

    return lines(folder / "generate_step0.jsonl", map(response, sequences(n_tokens)))


def slime(folder: Path, n_tokens: int) -> Path:
    """Both halves; the path is the folder."""
    ones = list(sequences(n_tokens))
    n = LENGTH - PROMPT
    samples = [
        {
            "group_index": one["index"] // 8, "index": one["index"], "tokens": one["tokens"].tolist(),
            "response_length": n, "reward": 1.0, "loss_mask": [1] * n, "weight_versions": ["0"],
            "rollout_log_probs": one["infer"].tolist(),
            "rollout_routed_experts": torch.from_numpy(one["routes"].astype(np.int32)),
        }
        for one in ones
    ]  # fmt: skip
    trained = [
        {
            "sample_index": one["index"], "rollout_position": one["index"], "tokens": torch.from_numpy(one["tokens"]),
            "response_lengths": n, "loss_masks": torch.ones(n, dtype=torch.int32),
            "rollout_log_probs": torch.from_numpy(one["infer"]), "log_probs": torch.from_numpy(one["train"]),
            "advantages": torch.full((n,), 0.5), "entropy": torch.full((n,), 1.25),
        }
        for one in ones
    ]  # fmt: skip
    for name in ("rollout_data", "train_data"):
        (folder / name).mkdir(parents=True)
    torch.save({"rollout_id": 0, "samples": samples}, folder / "rollout_data" / "0.pt")
    torch.save(
        {"format_version": 2, "rollout_id": 0, "samples": trained, "dp_shards": []}, folder / "train_data" / "0.pt"
    )
    return folder


def skyrl(folder: Path, n_tokens: int) -> Path:
    ones = list(sequences(n_tokens))
    response = np.ones((len(ones), LENGTH - PROMPT), np.int64)
    routes = np.stack([np.concatenate([one["routes"], one["routes"][:1]]) for one in ones])
    padding = np.zeros((len(ones), LENGTH), bool)
    padding[:, -1] = True
    arrays = {
        "sequences": np.stack([one["tokens"] for one in ones]),
        "attention_mask": np.ones((len(ones), LENGTH), np.int64), "response_mask": response,
        "loss_mask": response.astype(np.float32),
        "rollout_logprobs": np.stack([one["infer"] for one in ones]), "rollout_expert_indices": routes,
        "router_padding_mask": padding, "action_log_probs": np.stack([one["train"] for one in ones]),
        "advantages": np.full(response.shape, 0.5, np.float32),
    }  # fmt: skip
    tensors = {
        name: {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}
        for name, array in arrays.items()
    }
    module = "skyrl.backends.skyrl_train.training_batch"
    state = {"batch_dict": tensors, "batch_size": len(ones), "metadata": {"pad_size": 0}}
    names = f"c{module}\n_rebuild_tensor_batch\n(c{module}\nTrainingInputBatch\n".encode()
    path = folder / "global_step_1_training_input.pkl"
    path.write_bytes(b"\x80\x03" + names + pickle.dumps(state, 3)[2:-1] + b"tR.")
    return path


def table(folder: Path, n_tokens: int, kind: str) -> Path:
    parts = [
        pd.DataFrame({
            "seq_id": one["index"], "position": np.arange(LENGTH - PROMPT), "token_id": one["tokens"][PROMPT:],
            "logp_infer": one["infer"], "logp_train": one["train"], "loss_mask": 1, "prompt_id": one["index"] // 8,
            "advantage": 0.5, "reward": 1.0,
        })
        for one in sequences(n_tokens)
    ]  # fmt: skip
    frame, path = pd.concat(parts, ignore_index=True), folder / f"tokens.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


def trl(folder: Path, n_tokens: int) -> Path:
    """Text of one token per character."""
    from moediag.demo.tokenizer import byte_tokenizer

    byte_tokenizer(LENGTH).save_pretrained(folder / "tokenizer")
    texts = ["".join(map(chr, 32 + one["tokens"] % 90)) for one in sequences(n_tokens)]
    frame = pd.DataFrame({
        "step": 1, "prompt": [text[:PROMPT] for text in texts], "completion": [text[PROMPT:] for text in texts],
        "reward": 1.0, "advantage": 0.5,
    })  # fmt: skip
    frame.to_parquet(folder / "completions_00001.parquet")
    return folder / "completions_00001.parquet"


def tokenise(path: Path) -> None:
    from transformers import AutoTokenizer

    frame, tokenizer = pd.read_parquet(path), AutoTokenizer.from_pretrained(path.parent / "tokenizer")
    for name in ("prompt", "completion"):
        tokenizer(frame[name].tolist())


def parse_lines(path: Path) -> None:
    with path.open() as file:
        for line in file:
            json.loads(line)


def torch_load(path: Path) -> None:
    for file in sorted(path.rglob("*.pt")):
        torch.load(file, weights_only=True)


class Plain(pickle.Unpickler):
    """Reads the dicts of bytes of a batch of SkyRL."""

    def find_class(self, module: str, name: str) -> Any:
        return lambda *arguments: arguments


def unpickle(path: Path) -> None:
    """As SkyRL does: with an array of its own of every tensor's bytes."""
    with path.open("rb") as file:
        _, state = Plain(file).load()
    for one in state["batch_dict"].values():
        np.frombuffer(one["data"], one["dtype"]).reshape(one["shape"]).copy()


FORMATS: dict[str, tuple[str, Callable[[Path, int], Path], Callable[[Path], Any], str]] = {
    "nemo-rl": ("nemo-rl", nemo_rl, parse_lines, "json"),
    "prime-rl": ("prime-rl", prime_rl, parse_lines, "json"),
    "sglang": ("sglang", sglang, parse_lines, "json"),
    "vllm": ("vllm", vllm, parse_lines, "json"),
    "table, parquet": ("table", lambda folder, n: table(folder, n, "parquet"), pd.read_parquet, "pandas"),
    "table, csv": ("table", lambda folder, n: table(folder, n, "csv"), pd.read_csv, "pandas"),
    "table, jsonl": (
        "table", lambda folder, n: table(folder, n, "jsonl"), lambda path: pd.read_json(path, lines=True), "pandas"),
    "slime": ("slime", slime, torch_load, "torch.load"),
    "skyrl": ("skyrl", skyrl, unpickle, "pickle"),
    "trl, text": ("trl", trl, tokenise, "tokenizer"),
}  # fmt: skip
"""Name -> importer, how its file is made, the plain way to read it, what that is."""


def import_file(name: str, path: Path, output: Path) -> None:
    from moediag.importers.registry import files_of, importer_of
    from moediag.importers.rollouts import Options
    from moediag.importers.write import import_dump

    importer = importer_of(FORMATS[name][0])
    paths = [path.parent] if name == "sglang" else [path]
    tokenizer = path.parent / "tokenizer" if name == "trl, text" else None
    import_dump(importer, files_of(importer, paths), output, Options(trust_pickle=True, tokenizer=tokenizer))


def measured(name: str, path: Path, what: str, output: Path) -> dict[str, float]:
    """CPU seconds and MiB of one way to read a file, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(path), what, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(name: str, path: Path, what: str, output: Path) -> None:
    """What the process of :func:`measured` does."""
    import moediag.importers.registry
    import moediag.importers.write  # noqa: F401 - imported before the clock starts, as pandas and torch are

    before = peak()
    start = time.process_time()
    if what == "import":
        import_file(name, path, output)
    else:
        FORMATS[name][2](path)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "mib": peak() - before}))


def peak() -> float:
    """Largest resident size of this process so far [MiB]; ``getrusage`` counts what the process before ``exec`` had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def size_of(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, path, what, output = arguments.one
        one(name, Path(path), what, Path(output))
        return
    print("| format | file | alone | import | times | memory alone | of the import | times | of a quarter's import |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in arguments.formats:
        _, make, _, plain = FORMATS[name]
        with tempfile.TemporaryDirectory() as folder:
            path, part = (
                make((Path(folder) / kind), n)
                for kind, n in (("whole", arguments.tokens), ("part", arguments.tokens // 4))
                if (Path(folder) / kind).mkdir() is None
            )
            alone = measured(name, path, "alone", Path(folder) / "none")
            ours = measured(name, path, "import", Path(folder) / "out")
            quarter = measured(name, part, "import", Path(folder) / "quarter")
            more = f"{ours['mib'] / alone['mib']:.1f}" if alone["mib"] >= 1 else ""
            print(
                f"| {name} | {size_of(path):.0f} MiB | {alone['seconds']:.2f} s ({plain}) | {ours['seconds']:.2f} s "
                f"| {ours['seconds'] / alone['seconds']:.1f} | {alone['mib']:.0f} MiB | {ours['mib']:.0f} MiB "
                f"| {more} | {quarter['mib']:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
