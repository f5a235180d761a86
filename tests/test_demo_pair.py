"""The demo pair: tokenizer, prompts, cache. Full training is not run here; a recipe of three steps is."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from moediag.demo.corpus import END_OF_TEXT, PROMPT_BYTES, demo_prompts, training_text
from moediag.demo.muon import orthogonalized
from moediag.demo.pair import build_pair, pair_digest
from moediag.demo.tokenizer import END_OF_TEXT_ID, byte_tokenizer
from moediag.demo.train import DENSE, MOE, Recipe, train

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_size": 16,
    "mlp_size": 16,
}
QUICK: dict[str, Any] = {"window": 32, "batch": 2, "n_steps": 3, "n_warmup": 1}
TINY_MOE = replace(MOE, n_experts=4, n_active_experts=2, **TINY, **QUICK)
TINY_DENSE = replace(DENSE, **TINY, **QUICK)
TOKENIZER = byte_tokenizer(2048)


class BrokenOffError(Exception):
    """What the caller's progress callback raises."""


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_pair(tmp_path_factory.mktemp("cache"), moe=TINY_MOE, dense=TINY_DENSE)


@given(st.text())
def test_ids_are_the_utf8_bytes_and_come_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    if END_OF_TEXT not in text:
        assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_end_of_text_is_one_token() -> None:
    assert TOKENIZER(f"a{END_OF_TEXT}b")["input_ids"] == [97, END_OF_TEXT_ID, 98]
    assert TOKENIZER.eos_token_id == END_OF_TEXT_ID


def test_saved_tokenizer_is_loaded_without_our_code(tiny_pair: tuple[Path, Path]) -> None:
    text = "héllo , world  !\n\t世界 🙂"
    for folder in tiny_pair:
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded.is_fast
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_messages_become_paragraphs(tiny_pair: tuple[Path, Path]) -> None:
    messages = [{"role": "system", "content": "One."}, {"role": "user", "content": "Two?"}]
    loaded = transformers.AutoTokenizer.from_pretrained(tiny_pair[0])
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "One.\n\nTwo?\n"


def test_prompts_are_distinct_and_of_the_promised_size() -> None:
    prompts = demo_prompts(64)
    assert len(set(prompts)) == 64
    fewest, most = PROMPT_BYTES
    assert all(fewest <= len(prompt.encode()) <= most for prompt in prompts)
    assert demo_prompts(10) == prompts[:10]


def test_prompts_are_the_same_in_another_process() -> None:
    code = "import json; from moediag.demo.corpus import demo_prompts; print(json.dumps(demo_prompts(64)))"
    done = run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == demo_prompts(64)


def test_prompts_are_held_out_in_any_wrapping() -> None:
    trained_on = " ".join(training_text().split())
    assert not [prompt for prompt in demo_prompts(64) if " ".join(prompt.split()) in trained_on]


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to"):
        demo_prompts(100_000)


def test_corpus_module_loads_no_torch() -> None:
    code = "import sys, moediag.demo.pair; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    done = run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_window_covers_a_prompt_and_384_new_tokens() -> None:
    for recipe in (MOE, DENSE):
        assert recipe.window >= PROMPT_BYTES[1] + 384


def test_both_models_have_one_schedule() -> None:
    """The comparison is honest only if nothing but the MLP and its routing differs."""
    assert replace(DENSE, name="moe", n_experts=16, n_active_experts=4, mlp_size=MOE.mlp_size) == MOE
    assert DENSE.mlp_size == MOE.mlp_size * MOE.n_active_experts


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_steps": 4}, {"muon_lr": 0.5}, {"name": "other"}])
def test_digest_follows_the_recipe(change: dict[str, Any]) -> None:
    before = pair_digest((TINY_MOE, TINY_DENSE), "text")
    assert pair_digest((replace(TINY_MOE, **change), TINY_DENSE), "text") != before
    assert pair_digest((TINY_MOE, replace(TINY_DENSE, **change)), "text") != before


def test_digest_follows_the_corpus_and_nothing_else() -> None:
    assert pair_digest((TINY_MOE,), "text") != pair_digest((TINY_MOE,), "text.")
    assert pair_digest((TINY_MOE,), "text") == pair_digest((replace(TINY_MOE),), "text")


def test_checkpoints_load_in_bfloat16(tiny_pair: tuple[Path, Path]) -> None:
    for folder, kind in zip(tiny_pair, ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM"), strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == kind
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.generation_config.eos_token_id == END_OF_TEXT_ID


def test_second_call_finds_the_pair(tiny_pair: tuple[Path, Path]) -> None:
    def untouched(name: str, step: int, n_steps: int, loss: float) -> None:
        raise AssertionError("trained again")

    cache = tiny_pair[0].parent.parent
    assert build_pair(cache, untouched, moe=TINY_MOE, dense=TINY_DENSE) == tiny_pair
    assert len(list(cache.iterdir())) == 1


def test_broken_off_build_leaves_nothing(tmp_path: Path) -> None:
    def break_off(name: str, step: int, n_steps: int, loss: float) -> None:
        if name == "moe" and step == 2:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        build_pair(tmp_path, break_off, moe=TINY_MOE, dense=TINY_DENSE)
    assert list(tmp_path.iterdir()) == []


def test_killed_build_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from moediag.demo.pair import build_pair\n"
        "from tests.test_demo_pair import TINY_MOE, TINY_DENSE\n"
        "def die(name, step, n_steps, loss): step == n_steps and os._exit(9)\n"
        "build_pair(Path(sys.argv[1]), die, moe=TINY_MOE, dense=TINY_DENSE)\n"
    )
    root = Path(__file__).parent.parent
    assert run([sys.executable, "-c", code, str(tmp_path)], cwd=root).returncode == 9
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    moe, dense = build_pair(tmp_path, moe=TINY_MOE, dense=TINY_DENSE)
    assert (moe / "config.json").exists()
    assert (dense / "config.json").exists()


def test_progress_reports_every_step_of_both(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_pair(tmp_path, lambda name, step, n, loss: seen.append((name, step, n)), moe=TINY_MOE, dense=TINY_DENSE)
    assert sorted(seen) == [(name, step, 3) for name in ("dense", "moe") for step in (1, 2, 3)]


def test_pair_needs_two_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different folder names"):
        build_pair(tmp_path, moe=TINY_MOE, dense=TINY_MOE)


@pytest.mark.parametrize("recipe", [TINY_MOE, TINY_DENSE], ids=lambda recipe: recipe.name)
def test_training_is_deterministic_and_learns(recipe: Recipe) -> None:
    longer = replace(recipe, n_steps=30)
    losses: list[float] = []
    first = train(longer, training_text(), lambda step, n, loss: losses.append(loss))
    torch.rand(3)
    again = train(longer, training_text(), lambda step, n, loss: None)
    assert losses[-1] < losses[0] - 0.5
    weights = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_training_leaves_the_callers_random_state_and_threads(tmp_path: Path) -> None:
    state, n_threads = torch.random.get_rng_state(), torch.get_num_threads()
    build_pair(tmp_path, moe=TINY_MOE, dense=TINY_DENSE)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads


@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**31))
def test_orthogonalized_keeps_vectors_and_flattens_values(n: int, rows: int, columns: int, seed: int) -> None:
    """Against a plain SVD: U and V stay, singular values become about 1."""
    stack = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (out,) = orthogonalized([stack])
    for before, after in zip(stack, out, strict=True):
        u, values, vh = torch.linalg.svd(before, full_matrices=False)
        core = u.T @ after @ vh.T
        assert torch.allclose(core, torch.diag(core.diag()), atol=1e-6)
        # Five iterations lift only values that were not tiny beside the largest.
        lifted = core.diag()[values > 0.05 * values.norm()]
        assert ((lifted > 0.5) & (lifted < 1.3)).all()
