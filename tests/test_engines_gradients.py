"""The gradient audit on real models: closed form and autograd against each other, and the whole way on the demo."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import keeping

from moediag.analysis.gradients import ROUNDING, VERDICTS, audit_frames
from moediag.audit.batch import SequenceBasis, audit_tokens
from moediag.audit.gradients import GradientRequest, load_audit, load_record, run_gradient_audit
from moediag.engines.checkpoint import open_checkpoint
from moediag.errors import CheckpointError, CorruptRunError, EngineError, IncompleteRunError, MoediagError
from moediag.folder import SUMMARY
from moediag.run.derived import GRADIENTS, derived_damage
from moediag.run.reader import Run, open_run

pytestmark = pytest.mark.engines

N_SEQUENCES = 8  # the fewest prompts that have an interval
BOUNDS = ((0, 12), (12, 20))
METHODS = ("none", "icepop:alpha=0.5,beta=5", "tis_sequence:cap=2", "mis_sequence:cap=2")


@pytest.fixture(scope="module")
def model(random_moe: Path) -> Any:
    from moediag.engines.hf.engine import load_model

    return load_model(str(random_moe), {"dtype": "float32", "experts_implementation": "eager"}).requires_grad_(False)


def sequences() -> tuple[list[Any], list[SequenceBasis]]:
    import torch

    rng = np.random.default_rng(0)
    ids = [torch.from_numpy(rng.integers(0, 256, 1 + end - start)) for start, end in BOUNDS]
    bases = [
        SequenceBasis(rng.normal(size=(3, rank)), rng.normal(size=(rank, end - start)))
        for rank, (start, end) in zip((2, 1), BOUNDS, strict=True)
    ]
    return ids, bases


def logp_of(model: Any, ids: list[Any]) -> Callable[[int], Any]:
    import torch

    def logp(sequence: int) -> torch.Tensor:
        logits = model(input_ids=ids[sequence][None], use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[sequence][1:, None])[:, 0]

    return logp


def test_the_closed_form_of_the_head_equals_autograd_on_a_model(model: Any) -> None:
    """The head is untied first: with tied embeddings autograd adds what comes through them."""
    import torch

    from moediag.audit.groups import autograd_grams
    from moediag.audit.head import Head, is_plain, sampled_gram

    ids, bases = sequences()
    tied = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(tied.detach().clone(), requires_grad=False)
    kept: list[Any] = []
    try:
        own = {"head": [model.lm_head.weight]}
        wanted = autograd_grams(logp_of(model, ids), bases, own, 1 << 30, lambda: None)["head"]
        with torch.no_grad(), model.lm_head.register_forward_pre_hook(lambda _, args: kept.append(args[0][0])):
            logits = [model(input_ids=one[None], use_cache=False).logits[0] for one in ids]
        assert is_plain(model, kept[0], logits[0])
        assert not is_plain(model, kept[0], 1.1 * logits[0])
        hidden = torch.cat([one[:-1] for one in kept])
        norm = torch.logsumexp(torch.cat([one[:-1] for one in logits]), dim=-1)
        head = Head(model.lm_head.weight, None, hidden, norm)
        found = sampled_gram(head, torch.cat([one[1:] for one in ids]), BOUNDS, bases, 1 << 20, lambda *_: None)
    finally:
        model.lm_head.weight = tied
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * wanted.max())


def test_combined_directions_are_the_gradients_of_the_methods(model: Any) -> None:
    """Against one plain backward per method over the whole objective; in one piece and in several."""
    import torch

    from moediag.audit.groups import AUTOGRAD_GROUPS, affordable, autograd_grams, parameters_of, pieces

    ids, bases = sequences()
    parameters = {group: parameters_of(model, group) for group in AUTOGRAD_GROUPS}
    assert {group: len(found) for group, found in parameters.items()} == {"routers": 2, "experts": 4, "attention": 18}
    everything = [parameter for found in parameters.values() for parameter in found]
    for parameter in everything:
        parameter.requires_grad_(True)
    plain = []
    for method in range(3):
        losses = [
            (logp_of(model, ids)(s) * torch.from_numpy(basis.coefficient_MR[method] @ basis.basis_RT)).sum()
            for s, basis in enumerate(bases)
        ]
        plain.append(torch.autograd.grad(sum(losses), everything))
    for parameter in everything:
        parameter.requires_grad_(False)
    combined = np.concatenate([basis.coefficient_MR for basis in bases], axis=1)
    assert [len(pieces(parameters, 3, max_bytes)) for max_bytes in (1 << 19, 1 << 30)] == [5, 1]
    taken, left_out = affordable(parameters, 3, 1 << 19, 2)
    assert list(taken) == ["routers", "attention"]
    assert "5 passes" in left_out["experts"]
    for max_bytes in (1 << 19, 1 << 30):
        grams = autograd_grams(logp_of(model, ids), bases, parameters, max_bytes, lambda: None)
        for group, found in parameters.items():
            places = [i for i, parameter in enumerate(everything) if any(parameter is own for own in found)]
            vectors = torch.stack([torch.cat([one[i].flatten() for i in places]) for one in plain]).double()
            product = (vectors @ vectors.T).numpy()
            found_product = combined @ grams[group] @ combined.T
            np.testing.assert_allclose(found_product, product, rtol=1e-3, atol=1e-4 * product.max())


@pytest.fixture(scope="module")
def audited(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, GradientRequest, list[dict[str, Any]]]:
    """An audit of the first sequences of the demo's MoE run."""
    folder = tmp_path_factory.mktemp("audit") / "moe"
    shutil.copytree(demo / "moe", folder)
    run, events = open_run(folder), []
    request = GradientRequest(methods=METHODS, groups=("lm_head", "routers"), n_sequences=N_SEQUENCES)
    with keeping():
        run_gradient_audit(run, open_checkpoint(str(demo / "checkpoints" / "moe")), request, events.append)
    return run, request, events


def test_an_audit_of_the_demo(audited: Any) -> None:
    run, _, events = audited
    frames, record = load_audit(run), load_record(run)
    audit, references = frames["gradient_audit"], frames["gradient_references"]
    # the forward is the train arm's, bit for bit or nearly: the gradients are those of what was measured
    assert record["facts"]["logp_gap"] < 1e-4
    assert set(audit["group"]) == {"lm_head", "routers"}
    assert set(audit.loc[audit["reference"] != "exact", "method"]) == set(METHODS)
    assert (audit["n_sequences"] <= N_SEQUENCES).all()
    sampled = audit[audit["reference"] == "sequence_is"]
    assert sampled["batch_cosine"].between(-1, 1).all()
    assert sampled["noise_cosine"].between(-1, 1).all()
    assert (sampled.loc[sampled["method"] == "none", "verdict"] == "").all()
    assert set(sampled.loc[sampled["method"] != "none", "verdict"]) <= set(VERDICTS)
    weight = audit_tokens(run, ("train", "infer"), METHODS, N_SEQUENCES).weights_MT[-1]
    starts = np.cumsum(
        [0, *[end - start for start, end in audit_tokens(run, ("train", "infer"), METHODS, N_SEQUENCES).bounds_S]]
    )
    own = weight[starts[:-1]]
    ess = references.loc[references["reference"] == "sequence_is", "ess"].to_numpy()
    np.testing.assert_allclose(ess, own.sum() ** 2 / np.square(own).sum())
    # all product ratios at or below 2: truncation and masking are the reference itself, and else they are not
    same = sampled.loc[sampled["method"] == "tis_sequence:cap=2", "batch_relative_bias"].to_numpy()
    assert (same < 1e-6).all() == bool((own <= 2).all())
    assert {"done": N_SEQUENCES, "total": N_SEQUENCES, "unit": "sequence (routers)"} in events


def test_other_directions_of_the_same_gradients_move_cosines_by_less_than_the_rounding_named(demo: Path) -> None:
    """Directions turned within a sequence are the same gradients: what changes is the rounding of the backward."""
    import torch

    from moediag.audit.groups import autograd_grams, parameters_of
    from moediag.engines.hf.engine import load_model

    run, ids = open_run(demo / "moe"), []
    tokens = audit_tokens(run, ("train", "infer"), METHODS, 32)  # gradients of the first 8 nearly cancel
    for start, end in tokens.bounds_S:
        ids.append(torch.from_numpy(tokens.token_id_T[[start, *range(start, end)]]))
    plain = [tokens.basis(s) for s in range(len(ids))]
    turned = [turn(basis, seed) for seed, basis in enumerate(plain)]
    model = load_model(str(demo / "checkpoints" / "moe"), {"dtype": "bfloat16"}).requires_grad_(False)
    parameters = {group: parameters_of(model, group) for group in ("routers", "attention")}
    changes = []
    for bases in (plain, turned):
        grams = autograd_grams(logp_of(model, ids), bases, parameters, 1 << 30, lambda: None)
        record = {"methods": list(tokens.names), "n_tokens": len(tokens.token_id_T), "token_methods": []}
        arrays = {
            **{f"gram_{group}_BB": gram_BB for group, gram_BB in grams.items()},
            "coefficient_MB": np.concatenate([basis.coefficient_MR for basis in bases], axis=1),
            "prompt_B": np.repeat(np.arange(len(ids)), [len(basis.basis_RT) for basis in bases]),
            "sequence_weight_S": tokens.sequence_weight_S,
            "kept_MS": np.ones((len(tokens.names), len(ids))),
            "n_tokens_S": np.ones(len(ids)),
        }
        frame = audit_frames(record, arrays)["gradient_audit"].query("reference == 'sequence_is'")
        none = frame["group"].map(frame[frame["method"] == "none"].set_index("group")["batch_cosine"])
        changes.append((frame["batch_cosine"] - none).to_numpy())
    assert 0 < np.abs(changes[0] - changes[1]).max() < ROUNDING


def turn(basis: SequenceBasis, seed: int) -> SequenceBasis:
    """The same gradients from orthonormal directions of another choice."""
    rank = len(basis.basis_RT)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(rank, rank)))
    return SequenceBasis(basis.coefficient_MR @ rotation.T, rotation @ basis.basis_RT)


def test_the_exact_reference_is_there_when_full_distributions_are(audited: Any) -> None:
    run, _, _ = audited
    frames, record = load_audit(run), load_record(run)
    exact = frames["gradient_audit"].query("reference == 'exact'")
    if run.load_vocab("infer", run.shards[0]) is None:
        assert "full" in record["left_out"]["exact"]
        assert exact.empty
        return
    assert exact["method"].tolist() == ["none", "icepop:alpha=0.5,beta=5"]
    bias = exact.set_index("method")["batch_relative_bias"]
    assert bias["icepop:alpha=0.5,beta=5"] < bias["none"]


def test_the_same_audit_again_starts_no_engine_and_validation_stays_clean(audited: Any, demo: Path) -> None:
    run, request, _ = audited
    before = (run.path / GRADIENTS / SUMMARY).read_bytes()
    events: list[dict[str, Any]] = []
    run_gradient_audit(run, open_checkpoint(str(demo / "checkpoints" / "moe")), request, events.append)
    assert events == [{"stage": "the audit of these arms is there already"}]
    assert (run.path / GRADIENTS / SUMMARY).read_bytes() == before
    assert derived_damage(run.path) == []


def test_what_cannot_be_audited_is_refused(audited: Any, demo: Path, tmp_path: Path) -> None:
    run, request, _ = audited
    checkpoint = open_checkpoint(str(demo / "checkpoints" / "moe"))
    with pytest.raises(CheckpointError, match="other weights"):
        run_gradient_audit(run, open_checkpoint(str(demo / "checkpoints" / "dense")), request, print)
    with pytest.raises(EngineError, match="lm_head"):
        run_gradient_audit(run, checkpoint, replace(request, groups=("heads",)), print)
    with pytest.raises(MoediagError, match="ice_pop"):
        run_gradient_audit(run, checkpoint, replace(request, methods=("ice_pop",)), print)
    with pytest.raises(IncompleteRunError, match="train-x"):
        run_gradient_audit(run, checkpoint, replace(request, train="train-x"), print)
    with pytest.raises(IncompleteRunError, match="--gradient-audit"):
        load_audit(open_run(demo / "dense"))
    copy = tmp_path / "moe"
    shutil.copytree(run.path, copy)
    path = copy / GRADIENTS / "gradient_audit.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"?" + data[101:])
    with pytest.raises(CorruptRunError):
        load_audit(open_run(copy))
