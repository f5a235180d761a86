"""What is told of a process, and what must never be: secrets and home folders; `moediag env`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_moediag
from hypothesis import assume, example, given
from hypothesis import strategies as st

from moediag.engines import provenance
from moediag.engines.checkpoint import open_checkpoint
from moediag.engines.provenance import plain
from moediag.engines.redaction import REDACTED, redact, redact_text
from moediag.engines.versions import NUMERIC_PACKAGES, numeric_versions
from moediag.run.files import canonical_json

ALPHABET = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
SECRETS = st.text(ALPHABET, min_size=12, max_size=40).filter(lambda text: any(c.isdigit() for c in text))
SECRET_NAMES = st.sampled_from(
    ["HF_TOKEN", "VLLM_API_KEY", "hf_token", "apiKey", "client-secret", "PASSWORD", "AWS_SECRET_ACCESS_KEY",
     "basicAuth", "GOOGLE_CREDENTIALS", "token", "proxy_passwd", "SESSION_COOKIE"]
)  # fmt: skip
FORMS = st.sampled_from(
    ["{0}", "hf_{0}", "sk-{0}", "https://me:{0}@host:80/x", "https://{0}@host/x", "http://h/?token={0}&x=1",
     "--api-key {0}", "Authorization: Bearer {0}", '{{"password": "{0}"}}', "VLLM_TOKEN={0} LEVEL=3", "ghp_{0}"]
)  # fmt: skip


@given(SECRET_NAMES, SECRETS)
def test_under_a_name_of_secrets_nothing_is_left(name: str, secret: str) -> None:
    nested = {"options": [{name: {"user": secret, "more": [secret, (secret,)]}}], name: secret}
    assert secret not in canonical_json(redact(nested))
    assert redact(secret, name) == REDACTED


@given(FORMS, SECRETS)
def test_a_value_that_looks_like_a_secret_is_hidden_under_any_name(form: str, secret: str) -> None:
    assume(form != "{0}")  # a bare word under a harmless name is nobody's secret
    assert secret not in canonical_json(redact({"download_dir": form.format(secret), "x": [form.format(secret)]}))


NAMES = st.text("abcxyz019._-", min_size=1, max_size=12).filter(lambda name: name.strip("."))


@given(NAMES, st.sampled_from(["{0}", "{0}/models/x", "/opt/a.so:{0}/b.so {0}/c", "file://{0}/x", "['{0}/a', '{0}']"]))
@example("planted", "x={0}/y")
def test_no_home_folder_is_left(user: str, form: str) -> None:
    for home in (f"/home/{user}", f"/Users/{user}", f"/data/home/{user}"):
        told = redact_text(form.format(home))
        assert "/home/" not in told
        assert "/Users/" not in told
        assert "~" in told


def test_the_home_of_this_process_is_hidden_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "people" / "planted"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert redact_text(f"{home}/lib/a.so:{home}:/usr/lib/b.so") == "~/lib/a.so:~:/usr/lib/b.so"
    assert redact_text(f"{home}x/lib") == f"{home}x/lib"  # another folder that only begins alike
    link = tmp_path / "link"
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    assert redact_text(f"{home}/a {link}/b") == "~/a ~/b"


def test_a_home_at_the_root_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers HOME may be / or empty: every path would have become ~."""
    for home in ("/", ""):
        monkeypatch.setenv("HOME", home)
        assert redact_text("/opt/models/x") == "/opt/models/x"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_batched_tokens", 2048), ("VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "16384"), ("eos_token_id", 3),
        ("num_key_value_heads", 2), ("TOKENIZERS_PARALLELISM", "false"), ("tokenizer_mode", "auto"),
        ("hf_token", None), ("hf_token", True), ("stop_token_ids", [1, 2]), ("tokenizer_sha256", "ab12"),
        ("architecture", "Qwen3MoeForCausalLM"), ("module", "hf_transfer"), ("path", "teacher-forced, one sequence"),
    ],
)  # fmt: skip
def test_harmless_facts_stay(name: str, value: object) -> None:
    assert redact(value, name) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just("\udcff/home/x"),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.sets(st.integers()),
        max_leaves=8,
    )
)
def test_redacting_never_fails_gives_json_and_twice_is_once(value: object) -> None:
    """An arm's configuration is compared with one redacted before: it must not change again."""
    once = redact(value)
    canonical_json(once).encode()
    assert redact(once) == once


@given(FORMS, SECRETS)
def test_redacting_a_secret_twice_is_once(form: str, secret: str) -> None:
    once = redact_text(form.format(secret))
    assert redact_text(once) == once


def test_the_environment_holds_what_changes_numbers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "VLLM_ATTENTION_BACKEND": "FLASH_ATTN", "NVIDIA_TF32_OVERRIDE": "0", "LD_PRELOAD": "/home/planted/x.so",
        "VLLM_API_KEY": "planted", "EDITOR": "vi", "TORCHINDUCTOR_CACHE_DIR": "/tmp/x", "VLLM_DIST_IDENT": "1f",
        "OMP_NUM_THREADS": "3", "HF_TOKEN": "planted",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    told = provenance.environment()
    assert told["VLLM_ATTENTION_BACKEND"] == "FLASH_ATTN"
    assert told["NVIDIA_TF32_OVERRIDE"] == "0"
    assert told["OMP_NUM_THREADS"] == "3"
    assert told["LD_PRELOAD"] == "~/x.so"
    assert told["VLLM_API_KEY"] == REDACTED
    assert not {"EDITOR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_DIST_IDENT", "HF_TOKEN"} & told.keys()


def test_the_place_of_the_virtual_environment_is_no_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM puts the environment's own libgomp into LD_PRELOAD: two machines' would never be the same."""
    monkeypatch.setattr(sys, "prefix", "/srv/venv-of-ada")
    monkeypatch.setenv("LD_PRELOAD", "/srv/venv-of-ada/lib/libgomp.so.1")
    assert provenance.environment()["LD_PRELOAD"] == "{sys.prefix}/lib/libgomp.so.1"


def test_the_switches_told_are_those_that_are_set() -> None:
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        told = provenance.determinism()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.use_deterministic_algorithms(False)
    assert (told["float32_matmul_precision"], told["cudnn_benchmark"]) == ("high", True)
    assert (told["deterministic_algorithms"], told["deterministic_warn_only"]) == (True, True)


def test_process_facts_are_plain_and_full() -> None:
    import torch

    facts = provenance.process_facts()
    assert json.loads(canonical_json(facts)) == facts
    assert facts["threads"]["intra_op"] == torch.get_num_threads()
    assert facts["threads"]["openmp"]
    assert facts["hardware"]["cpu_model"]
    assert facts["hardware"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(facts["software"]["moediag_source_sha256"]) == 64


def test_what_was_loaded_is_told_with_what_computed_it() -> None:
    """A resumed arm is held against `loaded`: another instruction set or GPU must not fill it up unseen."""
    hardware = {"cpu_capability": "AVX2", "accelerator": None, "n_cores": 4}
    sections = provenance.arm_sections({"device": "cpu", "kernels": {"moe": []}, "process": {"hardware": hardware}})
    assert sections["loaded"] == {"device": "cpu", "cpu_capability": "AVX2", "accelerator": None}
    assert sections["kernels"] == {"moe": []}
    assert sections["hardware"] == hardware
    assert "process" not in sections


def test_versions_are_of_installed_packages_only() -> None:
    found = numeric_versions()
    assert {"moediag", "torch", "numpy"} <= found.keys() <= {"moediag", *NUMERIC_PACKAGES}
    assert all(found.values())
    assert len(set(NUMERIC_PACKAGES)) == len(NUMERIC_PACKAGES)


def test_plain_names_dtypes_and_enums() -> None:
    import enum

    import torch

    class Mode(enum.IntEnum):
        NONE = 0

    told = plain({"a": torch.bfloat16, 1: (Mode.NONE, {"y", "x"}, object)})
    assert told["a"] == "bfloat16"
    assert told["1"][:2] == ["NONE", ["x", "y"]]


def test_the_checkpoints_record_hides_where_the_checkpoint_lies(
    random_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json used to hold the checkpoint's path as typed, the user's name with it."""
    monkeypatch.setenv("HOME", str(random_moe.parent))
    assert open_checkpoint(str(random_moe)).record.source == f"~/{random_moe.name}"


def test_env_prints_the_sections_without_loading_an_engine_and_without_secrets() -> None:
    planted = {"VLLM_API_KEY": "planted-secret", "LD_PRELOAD": "", "TORCH_X": "/home/planted/x", "OMP_NUM_THREADS": "1"}
    done = run_moediag("env", "--json", **planted)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"engines", "versions", "hardware", "threads", "determinism", "environment", "software"} == told.keys()
    assert told["threads"]["intra_op"] == 1
    assert told["environment"]["TORCH_X"] == "~/x"
    text = run_moediag("env", **planted).stdout
    assert "float32_matmul_precision" in text
    assert "planted" not in done.stdout + text


def test_env_imports_no_engine() -> None:
    """It is what one runs when an engine does not start."""
    code = (
        "import sys; from moediag.cli.main import main; main(['env', '--json']); "
        "print([m for m in ('transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert done.stderr == ""
