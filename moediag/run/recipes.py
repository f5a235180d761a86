"""The arms that ``capture`` knows how to make, in one table: what each is, and what is requested of its engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from moediag.errors import RunError

if TYPE_CHECKING:  # pydantic is not worth its time to a command that only shows help
    from moediag.run.records import Change, Role

VLLM, TRANSFORMERS, SERVER = "vllm", "transformers", "server"
ENGINE_WORDS: Final = {VLLM: "vLLM", TRANSFORMERS: "transformers", SERVER: "inference server"}

SAMPLED, PREFILL, DECODE, TEACHER_FORCED = "sampled", "prefill", "decode", "teacher-forced"


@dataclass(frozen=True)
class Recipe:
    """An arm that can be captured.

    Args:
        words: what it is, for help and reports.
        change: what it changes of the reference arm of its role; None = it is that arm, or one of another engine.
        path: how its scores come about; None = as the run's tokens have it: sampled by this arm, or decoded again.
        samples: it can sample the run's tokens.
        options: engine options that it fixes.
        batching, perturbation: see :class:`~moediag.engines.arms.ArmRequest`.
        is_observed: routing is recorded.
        of: the recipe whose arm it changes; empty = the reference arm of its role.
        first_shards: ``profile`` captures it of so many shards of the run only; None = of all.
    """

    role: Role
    engine: str
    words: str
    change: Change | None = None
    path: str | None = None
    samples: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    batching: dict[str, Any] | None = None
    perturbation: str = ""
    reversed_order: bool = False
    is_observed: bool = True
    of: str = ""
    first_shards: int | None = None


RECIPES: Final = {
    "infer": Recipe("infer", VLLM, "vLLM: samples the responses, or scores given ones", samples=True),
    "infer-generate": Recipe(
        "infer", TRANSFORMERS, "transformers' generate: samples the responses with a KV cache, or decodes given ones",
        samples=True,
    ),
    "infer-server": Recipe(
        "infer", SERVER, "a running vLLM or SGLang server (--server): samples the responses, or prefills given ones",
        samples=True,
    ),
    "train": Recipe(
        "train", TRANSFORMERS, "transformers: scores the same tokens, teacher-forced", path=TEACHER_FORCED
    ),
    "train-replay": Recipe(
        "train", TRANSFORMERS, "transformers with the infer arm's experts forced", "replay", TEACHER_FORCED
    ),
    "infer-production": Recipe(
        "infer", VLLM, "vLLM as rollouts run it (graphs, prefix cache, own options); log-probabilities only",
        "observation", samples=True, is_observed=False,
    ),
    "infer-repeat": Recipe(
        "infer", VLLM, "vLLM again, by the path of the infer arm, in other batches", "repeat", reversed_order=True
    ),
    "infer-redecode": Recipe(
        "infer", VLLM, "vLLM again, decode path with the same tokens forced, same batches", "path", DECODE
    ),
    "infer-rescore": Recipe("infer", VLLM, "vLLM again, prefill of the same tokens", "path", PREFILL),
    "infer-server-rescore": Recipe(
        "infer", SERVER, "the running server again, prefill of the same tokens", "path", PREFILL
    ),
    "infer-fp32": Recipe(
        "infer", VLLM, "vLLM in float32, prefill of the same tokens", "dtype", PREFILL, options={"dtype": "float32"},
        first_shards=1,
    ),
    "train-repeat": Recipe(
        "train", TRANSFORMERS, "transformers again, in padded batches of 4", "repeat", TEACHER_FORCED,
        batching={"batch_size": 4, "layout": "padded"},
    ),
    "train-perturbed": Recipe(
        "train", TRANSFORMERS,
        "transformers with router inputs (dense: every layer's) moved by one unit in the last place",
        "perturbation", TEACHER_FORCED, perturbation="ulp",
    ),
    "train-fp32": Recipe(
        "train", TRANSFORMERS, "transformers in float32", "dtype", TEACHER_FORCED, options={"dtype": "float32"},
        first_shards=1,
    ),
    "train-fp32-perturbed": Recipe(
        "train", TRANSFORMERS,
        "transformers in float32 with router inputs (dense: every layer's) moved by one unit in the last place",
        "perturbation", TEACHER_FORCED, options={"dtype": "float32"}, perturbation="ulp", of="train-fp32",
        first_shards=1,
    ),
    "reference": Recipe(
        "reference", TRANSFORMERS,
        "the same weights in float32 by another implementation, as the publisher's modelling code beside them "
        "(--trust-remote-code); log-probabilities only",
        path=TEACHER_FORCED, options={"dtype": "float32"}, is_observed=False, first_shards=1,
    ),
    "train-router-fp32": Recipe(
        "train", TRANSFORMERS, "transformers with the routers' matmul in float32", "router-dtype", TEACHER_FORCED,
        perturbation="router-fp32",
    ),
    "train-router-fp8": Recipe(
        "train", TRANSFORMERS, "transformers with the routers' weights and inputs rounded to float8", "router-dtype",
        TEACHER_FORCED, perturbation="router-fp8",
    ),
}  # fmt: skip
"""Recipes by name; of several arms that could make a floor, or a noise scale, the first listed does."""

PATH_WORDS: Final = {
    SAMPLED: "decode (sampled)",
    DECODE: "decode (given tokens, forced one by one)",
    PREFILL: "prefill (given tokens)",
    TEACHER_FORCED: "teacher-forced",
    "unknown": "unknown",
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        RunError: there is none; names those there are.
    """
    found = RECIPES.get(name)
    if found is None:
        raise RunError(f"{name} is no arm that can be captured; expected one of {', '.join(RECIPES)} (--name names it)")
    return found


def is_decoded(path: str) -> bool:
    """Token by token, as a rollout is, whether sampled or forced."""
    return path in (SAMPLED, DECODE)


def engine_words(engine: str, path: str) -> str:
    """An arm's engine and how it computed the scores; a format that was imported is called by its name.

    Example:
        >>> engine_words("transformers", "sampled"), engine_words("vllm", "sampled")
        ('transformers (generate)', 'vLLM (decode)')
    """
    how = path
    if is_decoded(path):
        how = "generate" if engine == TRANSFORMERS else DECODE
    name = ENGINE_WORDS.get(engine, engine)
    return f"{name} ({how})" if how in (DECODE, PREFILL, TEACHER_FORCED, "generate") else name


def change_of(name: str, path: str, reference_path: str | None, reference_engine: str | None = None) -> Change | None:
    """What an arm of a recipe changes of the reference arm: the same path once more is a repetition, in one engine.

    Args:
        path: how the arm gets its scores.
        reference_path, reference_engine: how the reference arm got them; None where it is not known.
    """
    made = recipe(name)
    if made.change in (None, "repeat", "path") and reference_engine not in (None, made.engine):
        return "engine"
    if made.change == "path" and reference_path is not None and is_decoded(path) == is_decoded(reference_path):
        return "repeat"
    return made.change
