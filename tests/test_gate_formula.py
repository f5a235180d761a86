"""The formula of gate weights is named where it explains them, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moediag.diagnosis.gate_formula import bases_of, formula_words, formulas_of, weights_of
from moediag.run.capture import Capture
from moediag.run.records import RouterSpec

N, E, K = 200, 16, 4
ROUNDING = 1e-5
SPEC = RouterSpec(
    family="tiny", score_function="sigmoid", has_correction_bias=True, n_group=1, topk_group=1, gate="scores",
    renormalize=True, scaling_factor=1.0, n_shared_experts=0,
)  # fmt: skip


def made(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """(logits, bias in [0.1, 0.5], ids chosen by biased scores, scores of the chosen)."""
    rng = np.random.default_rng(seed)
    logits_NE, bias_E = rng.normal(size=(N, E)), rng.uniform(0.1, 0.5, E)
    scores_NE = 1 / (1 + np.exp(-logits_NE))
    ids_NK = np.argsort(-(scores_NE + bias_E), axis=1)[:, :K]
    return logits_NE, bias_E, ids_NK, np.take_along_axis(scores_NE, ids_NK, axis=1)


def capture(ids_NK: Any, weights_NK: Any, logits_NE: Any = None) -> Capture:
    return Capture(
        np.zeros(len(ids_NK), np.float32),
        expert_ids_TLK=ids_NK[:, None].astype(np.int16),
        gate_weights_TLK=weights_NK[:, None].astype(np.float32),
        router_logits_TLE=None if logits_NE is None else logits_NE[:, None].astype(np.float32),
    )


def words_of(train: Capture, infer: Capture, bias_E: Any) -> str:
    sides = {}
    for name, own, other, of in (("infer", infer, train, "train"), ("train", train, infer, "infer")):
        bases = bases_of(own, other, SPEC, bias_E[None], 0, of)
        sides[name] = formulas_of(weights_of(own, 0), bases, ROUNDING)
    return formula_words(sides, ROUNDING)


def normal(values_NK: Any) -> Any:
    return values_NK / values_NK.sum(axis=1, keepdims=True)


FORMULAS = {
    "s": lambda s, b: s,
    "s / sum(s)": lambda s, b: normal(s),
    "s + b": lambda s, b: s + b,
    "(s + b) / sum(s + b)": lambda s, b: normal(s + b),
    "2.5 * s / sum(s)": lambda s, b: 2.5 * normal(s),
    "2.5 * (s + b)": lambda s, b: 2.5 * (s + b),
    "2.5 * (s + b) / sum(s + b)": lambda s, b: 2.5 * normal(s + b),
}


@pytest.mark.parametrize("name", list(FORMULAS))
def test_every_formula_is_named_from_router_logits(name: str) -> None:
    """Weights taken from biased scores (transformers issue 39581) are (s + b) / sum(s + b), and are called that."""
    logits_NE, bias_E, ids_NK, scores_NK = made()
    weights_NK = FORMULAS[name](scores_NK, bias_E[ids_NK])
    train = capture(ids_NK[:, ::-1], weights_NK[:, ::-1], logits_NE)  # slots in any order
    infer = capture(ids_NK, normal(scores_NK), logits_NE)
    words = words_of(train, infer, bias_E)
    assert f"train's = {name} (99 % of rows to " in words
    assert "infer's = s / sum(s) (99 % of rows to " in words


def test_the_plain_residuals_are_what_a_loop_says() -> None:
    _, bias_E, ids_NK, scores_NK = made(1)
    weights_NK = normal(scores_NK + bias_E[ids_NK])
    found = formulas_of(weights_NK, {"s": scores_NK}, ROUNDING)
    factor = np.median([sum(w) / sum(s) for w, s in zip(weights_NK, scores_NK, strict=True)])
    apart = [max(abs(w - factor * s)) / max(w) for w, s in zip(weights_NK, scores_NK, strict=True)]
    residuals = {one.words: one.residual for one in found}
    assert residuals[f"{factor:.4g} * s"] == pytest.approx(np.quantile(apart, 0.99, method="higher"))
    assert "s / sum(s)" in residuals


def test_without_logits_the_other_side_is_the_reference() -> None:
    _, bias_E, ids_NK, scores_NK = made()
    infer = capture(ids_NK, normal(scores_NK))
    assert "infer's = w_train / sum(w_train) (" in words_of(capture(ids_NK, scores_NK), infer, bias_E)
    assert "train's = 2.5 * w_infer (" in words_of(capture(ids_NK, 2.5 * normal(scores_NK)), infer, bias_E)


def test_biased_weights_are_named_without_logits() -> None:
    """The kept bias is enough for K = 4; swapping the sides names the other one."""
    _, bias_E, ids_NK, scores_NK = made()
    biased = capture(ids_NK, 2.5 * normal(scores_NK + bias_E[ids_NK]))
    plain = capture(ids_NK, 2.5 * normal(scores_NK))
    formula = "2.5 * (a w_{} + b) / sum(a w_{} + b) (99 % of rows to "
    words = words_of(biased, plain, bias_E)
    assert f"train's = {formula.format('infer', 'infer')}" in words
    assert "infer's = " not in words
    words = words_of(plain, biased, bias_E)
    assert f"infer's = {formula.format('train', 'train')}" in words
    assert "train's = " not in words


@pytest.mark.parametrize("k", [2, K])
def test_what_no_formula_explains_is_not_named(k: int) -> None:
    """Weights of other rows follow none; of two weights with a given sum any bias could be fitted, so none is."""
    _, bias_E, ids_NK, scores_NK = made()
    other = capture(ids_NK[:, :k], normal(np.roll(scores_NK, 1, axis=0)[:, :k]))
    words = words_of(other, capture(ids_NK[:, :k], normal(scores_NK[:, :k])), bias_E)
    assert f"none of {2 if k == 2 else 4} formulas explains infer's (nearest: " in words
    assert "'s = " not in words.partition("; s = ")[0]
