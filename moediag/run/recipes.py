"""The arms that ``capture`` knows how to make, in one table: what each is, and what is asked of its engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from moediag.errors import RunError

if TYPE_CHECKING:  # pydantic is not worth its time to a command that only shows help
    from moediag.run.records import Change, Role

VLLM, TRANSFORMERS = "vllm", "transformers"
ENGINE_WORDS: Final = {VLLM: "vLLM", TRANSFORMERS: "transformers"}


@dataclass(frozen=True)
class Recipe:
    """An arm that can be captured.

    Args:
        words: what it is, for help and reports.
        change: what it changes of the reference arm of its role; None = it is that arm.
        path: how vLLM gets its scores where that does not follow from who sampled.
        options: engine options that it fixes.
        batching, perturbation: see :class:`~moediag.engines.arms.ArmRequest`.
        is_observed: routing is recorded.
    """

    role: Role
    engine: str
    words: str
    change: Change | None = None
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batching: dict[str, Any] | None = None
    perturbation: str = ""
    reversed_order: bool = False
    is_observed: bool = True


RECIPES: Final = {
    "infer": Recipe("infer", VLLM, "vLLM: samples the responses, or scores given ones"),
    "train": Recipe("train", TRANSFORMERS, "transformers: scores the same tokens, teacher-forced"),
    "train-replay": Recipe("train", TRANSFORMERS, "transformers with vLLM's experts forced", "replay"),
    "infer-production": Recipe(
        "infer", VLLM, "vLLM as rollouts run it (graphs, prefix cache, own options); log-probabilities only",
        "observation", is_observed=False,
    ),
    "infer-repeat": Recipe(
        "infer", VLLM, "vLLM again, by the path of the infer arm, in other batches", "repeat", reversed_order=True
    ),
    "infer-redecode": Recipe(
        "infer", VLLM, "vLLM again, decode path with the same tokens forced, same batches", "path", "decode"
    ),
    "infer-rescore": Recipe("infer", VLLM, "vLLM again, prefill of the same tokens", "path", "prefill"),
    "train-repeat": Recipe(
        "train", TRANSFORMERS, "transformers again, in padded batches of 4", "repeat",
        batching={"batch_size": 4, "layout": "padded"},
    ),
    "train-perturbed": Recipe(
        "train", TRANSFORMERS,
        "transformers with router inputs (dense: every layer's) moved by one unit in the last place",
        "perturbation", perturbation="ulp",
    ),
    "train-fp32": Recipe("train", TRANSFORMERS, "transformers in float32", "dtype", options={"dtype": "float32"}),
    "train-router-fp32": Recipe(
        "train", TRANSFORMERS, "transformers with the routers' matmul in float32", "router-dtype",
        perturbation="router-fp32",
    ),
    "train-router-fp8": Recipe(
        "train", TRANSFORMERS, "transformers with the routers' weights and inputs rounded to float8", "router-dtype",
        perturbation="router-fp8",
    ),
}  # fmt: skip
"""Recipes by name; of several arms that could make a floor, or a noise scale, the first listed does."""

PATH_WORDS: Final = {
    "sampled": "decode (sampled)",
    "decode": "decode (given tokens, forced one by one)",
    "prefill": "prefill (given tokens)",
    "teacher-forced": "teacher-forced",
    "unknown": "unknown",
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        RunError: there is none; names those there are.
    """
    found = RECIPES.get(name)
    if found is None:
        raise RunError(f"{name} is no arm that can be captured; wanted one of {', '.join(RECIPES)} (--name names it)")
    return found


def is_decoded(path: str) -> bool:
    """Token by token, as a rollout is, whether sampled or forced."""
    return path in ("sampled", "decode")


def change_of(name: str, path: str, reference_path: str | None) -> Change | None:
    """What an arm of a recipe changes of the reference arm: the same path once more is a repetition.

    Args:
        path: how the arm gets its scores.
        reference_path: how the reference arm got them; None where it is not known.
    """
    change = recipe(name).change
    if change == "path" and reference_path is not None and is_decoded(path) == is_decoded(reference_path):
        return "repeat"
    return change
