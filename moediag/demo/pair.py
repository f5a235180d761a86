"""The demo pair: a MoE and a dense checkpoint, cached by everything that decides them.

Invariants: what lies under CACHE/<digest>/ is complete (built under another name, then renamed);
another recipe, corpus, training code, torch or transformers means another digest.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from moediag.demo.corpus import training_text
from moediag.demo.tokenizer import byte_tokenizer
from moediag.demo.train import DENSE, MAX_LENGTH, MOE, Recipe, train

Progress = Callable[[str, int, int, float], None]

_LIBRARIES = ("torch", "transformers", "tokenizers")


def build_pair(
    cache_dir: Path,
    on_progress: Progress | None = None,
    *,
    moe: Recipe = MOE,
    dense: Recipe = DENSE,
) -> tuple[Path, Path]:
    """Train the demo pair, or find it in the cache.

    Both models train at the same time, one thread each, on the same text with the same tokenizer,
    window and schedule, so that what differs between their mismatches is the routing.

    Args:
        cache_dir: folder for finished pairs; made if missing.
        on_progress: called with (model name, steps done, steps in all, cross-entropy in nats per
            byte) after each step, one call at a time but from the training threads; never called
            when the pair is in the cache.
        moe: recipe of the MoE model.
        dense: recipe of the dense model.

    Returns:
        Checkpoint folders (MoE, dense) that transformers and vLLM load.

    Raises:
        ValueError: both recipes have one name.
    """
    if moe.name == dense.name:
        raise ValueError(f"recipe names: expected two different folder names, found {moe.name!r} twice")
    corpus = training_text()
    final = cache_dir / pair_digest((moe, dense), corpus)
    if not final.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".building-", dir=cache_dir) as scratch:
            unfinished = Path(scratch) / "pair"
            _build((moe, dense), corpus, unfinished, on_progress or _ignore)
            _publish(unfinished, final)
    return final / moe.name, final / dense.name


def pair_digest(recipes: tuple[Recipe, ...], corpus: str) -> str:
    """Name of a pair by its recipes, corpus, the demo's own source text and the library versions.

    Returns:
        16 hexadecimal digits.
    """
    sources = {path.name: path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
    parts = [[asdict(r) for r in recipes], corpus, sources, {name: version(name) for name in _LIBRARIES}]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _ignore(name: str, step: int, n_steps: int, loss: float) -> None:
    pass


def _publish(unfinished: Path, final: Path) -> None:
    try:
        unfinished.rename(final)
    except OSError:
        # Another process may have published the same pair meanwhile: then that one serves.
        if not final.exists():
            raise


def _build(recipes: tuple[Recipe, ...], corpus: str, folder: Path, on_progress: Progress) -> None:
    stop = threading.Event()
    with _one_thread_each(), ThreadPoolExecutor(len(recipes)) as pool:
        report = _one_at_a_time(on_progress, stop)
        jobs = [pool.submit(_build_one, recipe, corpus, folder / recipe.name, report) for recipe in recipes]
        try:
            _finish(jobs)
        except BaseException:
            # Ctrl-C here, or a failure in one thread, must not wait minutes for the other model.
            stop.set()
            raise


def _finish(jobs: list[Future[None]]) -> None:
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    for job in done:
        job.result()


def _build_one(recipe: Recipe, corpus: str, folder: Path, report: Progress) -> None:
    from transformers.utils.logging import disable_progress_bar

    model = train(recipe, corpus, lambda step, n_steps, loss: report(recipe.name, step, n_steps, loss))
    disable_progress_bar()  # transformers draws one for saving, across ours
    model.save_pretrained(folder)
    byte_tokenizer(MAX_LENGTH).save_pretrained(folder)


def _one_at_a_time(on_progress: Progress, stop: threading.Event) -> Progress:
    lock = threading.Lock()

    def report(name: str, step: int, n_steps: int, loss: float) -> None:
        if stop.is_set():
            raise InterruptedError(f"training of {name} stopped at step {step} of {n_steps}")
        with lock:
            on_progress(name, step, n_steps, loss)

    return report


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One torch thread, so that sums keep their order on any machine; the caller's number afterwards."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
