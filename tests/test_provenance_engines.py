"""arm.json of the real engines: every section filled, nothing secret, and diff-env names exactly what was changed."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import KeptEngines, run_here, write_jsonl

from moediag.run.reader import open_run
from moediag.run.records import ArmRecord

pytestmark = pytest.mark.engines

USER, SECRET = "planted-user", "planted-Secret-7"
SECTIONS = ("versions", "loaded", "kernels", "dtypes", "threads", "determinism", "environment", "hardware", "software")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a user's name in it, that holds the runs."""
    folder = tmp_path_factory.mktemp("people") / "home" / USER
    folder.mkdir(parents=True)
    return folder


def capture(home: Path, arm: str, path: Path, *options: object, **environment: str) -> None:
    """An arm, captured by engines of the environment's own."""
    with closing(KeptEngines()) as engines:
        done = run_here("capture", arm, home / "ckpt", "-o", path, *options, engines=engines, **environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(random_moe: Path, home: Path) -> Path:
    """Both arms of a tiny run, captured by somebody with secrets in environment and options."""
    (home / "ckpt").symlink_to(random_moe)
    prompts = write_jsonl(home / f"{USER}.jsonl", [{"prompt": "The for statement"}, {"prompt": "An import"}])
    planted = {
        "HOME": str(home),
        "VLLM_API_KEY": SECRET,
        "HF_TOKEN": f"hf_{SECRET}",
        "TORCH_NOTE": f"https://me:{SECRET}@host {home}/x:/home/{USER}/y",
        "OMP_NUM_THREADS": "1",
    }
    options = ("--max-tokens", "4", "--vllm-option", f"hf_token={SECRET}", "--vllm-option", f"download_dir={home}/m")
    path = home / "run"
    for arm, more in (("infer", ("--prompts", prompts, *options)), ("train", ())):
        capture(home, arm, path, *more, **planted)
    return path


@pytest.fixture(scope="module")
def other(random_moe: Path, home: Path, run: Path) -> Path:
    """The same run with another block size in vLLM and another number of threads in transformers."""
    path = home / "other"
    options = ("--max-tokens", "4", "--vllm-option", "block_size=32")
    prompts = ("--prompts", home / f"{USER}.jsonl")
    for arm, more, n_threads in (("infer", (*prompts, *options), "1"), ("train", (), "2")):
        environment = {"HOME": str(home), "OMP_NUM_THREADS": n_threads}
        capture(home, arm, path, *more, **environment)
    return path


def test_no_secret_and_no_home_folder_is_written(run: Path) -> None:
    for path in (run / "run.json", *run.glob("checkpoints/*"), *run.glob("arms/*/*.json"), *run.glob("tokens/*.json")):
        content = path.read_text()
        assert SECRET not in content, path
        assert f"/{USER}/" not in content, path
    infer = open_run(run).arm("infer")
    assert open_run(run).checkpoint_of("infer").source == "~/ckpt"  # type: ignore[union-attr]
    assert infer.captured is not None
    configuration = infer.captured.configuration
    assert (configuration["hf_token"], configuration["download_dir"]) == ("[redacted]", "~/m")
    assert infer.captured.environment["VLLM_API_KEY"] == "[redacted]"


def test_every_section_of_both_arms_is_filled(run: Path) -> None:
    infer, train = (_sections(open_run(run).arm(arm)) for arm in ("infer", "train"))
    for record in (infer, train):
        for section in (*SECTIONS, "engine_config"):
            assert record[section], section
        assert record["threads"]["intra_op"] == 1
        assert record["environment"]["OMP_NUM_THREADS"] == "1"
        assert record["dtypes"]["model"] == record["dtypes"]["lm_head"] == record["dtypes"]["logits"] == "bfloat16"
        assert record["dtypes"]["logprobs"] == "float32"
        assert record["loaded"]["cpu_capability"] == record["hardware"]["cpu_capability"] != ""
        assert record["versions"]["torch"]
    _check_infer(infer)
    assert train["kernels"]["attn_implementation"] in ("sdpa", "eager")
    assert train["kernels"]["module_classes"]["Qwen3MoeExperts"] == 2


def _sections(arm: ArmRecord) -> dict[str, Any]:
    assert arm.captured is not None
    return {**arm.facts, "versions": arm.captured.versions, "environment": arm.captured.environment}


def _check_infer(record: dict[str, Any]) -> None:
    kernels = record["kernels"]
    assert [group["n_layers"] for group in kernels["attention"]] == [3]
    assert kernels["attention"][0]["backend"] == record["loaded"]["attention_backends"][0]
    assert [group["n_layers"] for group in kernels["moe"]] == [2]
    assert kernels["moe"][0]["activation"] == "SILU"
    assert kernels["moe"][0]["experts"]
    assert kernels["linear"]["QKVParallelLinear"].endswith("x3")
    assert record["dtypes"]["kv_cache"] == "bfloat16"
    config = record["engine_config"]
    assert (config["compilation_mode"], config["enable_prefix_caching"]) == ("NONE", False)
    assert config["tensor_parallel_size"] == config["expert_parallel_size"] == 1
    assert config["block_size"] > 0
    sampling = record["sampling"]
    assert (sampling["temperature"], sampling["top_p"], sampling["max_tokens"]) == (1.0, 1.0, 4)
    assert sampling["eos_token_id"] == 256  # only vLLM's own processing of a request fills it in


def test_the_same_command_again_finds_the_arms_complete(random_moe: Path, home: Path, run: Path) -> None:
    """The configuration is compared with one that was redacted before it was written."""
    options = ("--vllm-option", f"hf_token={SECRET}", "--vllm-option", f"download_dir={home}/m", "--max-tokens", "4")
    prompts = ("--prompts", home / f"{USER}.jsonl")
    done = run_here("capture", "infer", home / "ckpt", "-o", run, *prompts, *options, HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert "complete, nothing to capture" in done.stderr


def test_diff_env_names_exactly_what_was_changed(run: Path, other: Path) -> None:
    told = json.loads(run_here("diff-env", run, other, "--json").stdout)
    assert {name: told["content"][name] for name in ("weights", "tokenizer", "config", "prompts")} == dict.fromkeys(
        ("weights", "tokenizer", "config", "prompts"), "identical"
    )
    asked, infer, train = told["comparisons"]
    assert not asked["differences"]
    # the digest of moediag's source is left out: somebody may be editing it while these runs are made
    names = {f"{d['section']}.{d['name']}" for d in infer["differences"]} - {"software.moediag_source_sha256"}
    assert "engine_config.block_size" in names
    assert "kernels.attention.0.block_size" in names
    planted = {"environment.VLLM_API_KEY", "environment.TORCH_NOTE", "configuration.hf_token"}
    allowed = {"configuration.block_size", "configuration.download_dir", "kernels.attention.0.isa"}
    assert names <= {"engine_config.block_size", "kernels.attention.0.block_size"} | planted | allowed
    values = {f"{d['section']}.{d['name']}": (d["a"], d["b"]) for d in train["differences"]}
    assert values["environment.OMP_NUM_THREADS"] == ("1", "2")
    assert values["threads.intra_op"] == ("1", "2")
    threads = {"threads.intra_op", "threads.omp_max_threads", "threads.mkl_max_threads", "environment.OMP_NUM_THREADS"}
    told_too = {"environment.VLLM_API_KEY", "environment.TORCH_NOTE", "software.moediag_source_sha256"}
    assert values.keys() <= threads | told_too


def test_diff_env_of_the_two_engines_of_one_run(run: Path) -> None:
    done = run_here("diff-env", run)
    assert done.returncode == 0
    assert "arm infer against train" in done.stdout
    assert "VLLM_CPU_OMP_THREADS_BIND" in done.stdout
    assert "intra_op" not in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
