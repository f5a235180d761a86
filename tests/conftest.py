"""Fixtures that many tests share; engines, checkpoints and the demo run are made once per session."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from moediag.engines.launch import Engines, Job, OnEvent
from moediag.engines.vllm.options import INFER_ENVIRONMENT

# Fixed, so that the suite fails for what was changed and not for its luck; ``make hunt`` draws others, and more cases:
# - flipped bytes of a run's files (test_run_directory): 10 a file here, 100 there;
# - config classes of transformers (test_routers): those of experts and every twelfth here, all there;
# - odd runs drawn (test_figures_sets): each at one of two widths here, at both there;
# - random healthy pairs (test_hygiene_clean): 100 here, 500 there; their orders and shards: 20 here, 60 HUNT there;
# - spoilt runs and prompts files (test_run_fuzz): 100 and 400 here, 250 HUNT and 1000 HUNT there;
# - flipped bits of derived files (test_run_derived): 200 here, 500 HUNT there;
# - examples of a property that names no number of its own: 50 here, 100 HUNT there.
# ``make tables`` captures every router family and every way of running vLLM; here there is one of each kind. It trains
# and profiles the whole demo, too, for test_demo; here the demo is the quick one of a third of the steps and prompts.
SEED = int(os.environ.get("MOEDIAG_SEED", "0"))
HUNT = int(os.environ.get("MOEDIAG_HUNT", "1"))
N_PROMPTS, N_STEPS = (64, 300) if "MOEDIAG_WHOLE_DEMO" in os.environ else (24, 100)
# A machine that is busy makes an example slow, not wrong.
settings.register_profile("moediag", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("hunt", deadline=None, max_examples=100 * HUNT, print_blob=True)
settings.load_profile("moediag" if HUNT == 1 else "hunt")

REPOSITORY = Path(__file__).parent.parent
MOEDIAG = Path(sys.executable).with_name("moediag")
ENGINE_PATH = (REPOSITORY / "tests", REPOSITORY / "tests" / "torchvision_stand_in")


_ENGINE_VARIABLES = {name: os.environ.get(name) for name in INFER_ENVIRONMENT}


@pytest.fixture(autouse=True, scope="module")
def engine_variables_left_alone() -> Iterator[None]:
    """Bug: the helper scripts set vLLM's variables when imported, and an option of pytest imported them all.

    The commands of other tests then ran with other threads than the runs they were compared with.
    """
    yield
    assert {name: os.environ.get(name) for name in INFER_ENVIRONMENT} == _ENGINE_VARIABLES


LONGEST_FIRST = ("demo", "pages_browser", "engines_resume", "engines_ray", "store", "engines_families", "engines_serve",
                 "engines_checkpoints", "engines_server", "selftest", "provenance_engines", "figures_shapes",
                 "figures_sets", "engines_execution", "readme", "engines_gradients", "simulate", "engines_generate",
                 "folder", "hygiene_faults", "run_schema1", "notebooks", "hygiene_logged", "hygiene_clean",
                 "engines_observation", "run_derived", "gradients_statistics")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many seconds first, so that two processes end together; while one makes the demo, the other does what
    needs none."""
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def run_moediag(*arguments: object, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, as a user runs it."""
    return subprocess.run(
        [str(MOEDIAG), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )


class KeptEngines(Engines):
    """Engine processes that outlive the commands that use them: one per environment, as ``Engines`` has for one
    command. Starting vLLM takes 25 seconds of processor time; loading another tiny model into it takes six.

    They can import the tasks and the stand-in of the tests, and run under the environment of the suite.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[str, str], ...], Engines] = {}

    def do(self, job: Job, env: dict[str, str], on_event: OnEvent) -> None:
        """As :meth:`Engines.do`; after an error the next job of that environment gets a new process."""
        path = os.pathsep.join([*map(str, ENGINE_PATH), *filter(None, [os.environ.get("PYTHONPATH")])])
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYTEST_CURRENT_TEST", raising=False)
            patch.setenv("PYTHONPATH", path)
            self._kept.setdefault(tuple(env.items()), Engines()).do(job, env, on_event)

    def __exit__(self, *_: object) -> None:
        """The end of a command, after which they are kept."""

    def close(self) -> None:
        """End the processes."""
        while self._kept:
            self._kept.popitem()[1].close()


ENGINES = KeptEngines()
"""What the tests of this process share."""


def pytest_sessionfinish() -> None:
    ENGINES.close()


def run_here(*arguments: object, engines: KeptEngines = ENGINES, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, word for word, on engine processes that are kept.

    For tests of what a command computes, writes and prints; those of a process's own life call :func:`run_moediag`.
    """
    from moediag.cli.main import main

    words, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with keeping(engines, **env), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def keeping(engines: KeptEngines = ENGINES, **env: str) -> Iterator[None]:
    """Commands and audits take the kept engines."""
    import moediag.audit.gradients as audit
    from moediag.cli import jobs
    from moediag.engines import launch

    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        for module in (jobs, audit, launch):  # the self-test imports it when it runs
            patch.setattr(module, "Engines", lambda: engines)
        yield


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process to ask makes, for all of them (pytest-xdist runs several)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"shared-{name}"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / ".made"
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the real `moediag demo` leaves: trained pair, both runs, comparison."""
    size = ("--limit", N_PROMPTS, "--steps", N_STEPS)

    def make(folder: Path) -> None:
        done = run_moediag("demo", "-o", folder / "out", *size, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "out" / "stdout.txt").write_text(done.stdout)

    return made_once(tmp_path_factory, "demo", make) / "out"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket of an S3 server in this process; commands and nodes that are started find it, too."""
    import logging

    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()  # which know another server
        with contextlib.suppress(FileExistsError):  # what servers of this process hold outlives them
            S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture(scope="session")
def random_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE checkpoint with the demo's byte tokenizer; the second of its three layers is dense."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moediag.demo.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=256,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("random-moe")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)
    return folder
