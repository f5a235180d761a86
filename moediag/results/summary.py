"""The content of summary.json: what was analysed, what was found, and what it is worth against the floors."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.floors import Variant, floors
from moediag.analysis.measures import abs_diff, abs_diff_other, k3, k3_other
from moediag.analysis.tokens import TokenSource, beside
from moediag.diagnosis import Distances, FirstLayers, FunctionTest, Seen, Whose, distances, verdict
from moediag.diagnosis.layers import LayersApart
from moediag.diagnosis.modules import ModuleChecks
from moediag.diagnosis.recorded import Explanation
from moediag.hygiene import Finding
from moediag.notation import INFER, SCHEMA_VERSION, TRAIN
from moediag.run.derived import captures_digest
from moediag.run.reader import Run
from moediag.run.recipes import ENGINE_WORDS
from moediag.statistics.intervals import ratio_mean_interval

BROKEN_REPLAY: Final = -9.0
"""Share of the mean removed below which it is the replay that is broken: more than ten times as large as without.

Ours: infer's routes can only bring train closer to infer, up to rounding and what flips amplify; on 13 router families
in bfloat16 and float32 the mean with replay was at most 1.1 times the one without, with gate weights forced too.
"""
_LEAST_BROKEN: Final = 1e-5
"""A mean below this is float32 rounding with replay or without [nat]: over those families at most 1e-6."""


@dataclass(frozen=True)
class Found:
    """What the diagnosis found before the verdict.

    Args:
        function: whether both engines compute the same function; None without float32 arms.
        modules: what a check of both engines' modules found; None without one.
        recorded: what is wrong with imported rollouts; None where the run was not imported.
        layers: since which layer they do not; None without float32 arms.
        findings: of the rules on the capture; errors among them were overridden.
        whose: what a third party says of a difference of functions; None without one.
        first_layers: float32 of the first layers; None where the whole was run, or nothing.
    """

    function: FunctionTest | None
    modules: ModuleChecks | None
    recorded: Explanation | None
    layers: LayersApart | None
    findings: Sequence[Finding]
    whose: Whose | None = None
    first_layers: FirstLayers | None = None


def summarize(
    run: Run,
    main: str,
    pairs: Mapping[str, dict[str, Any]],
    tokens: Mapping[str, TokenSource],
    sequences: pd.DataFrame,
    own: Sequence[Variant],
    found: Found,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        main: name of the main pair.
        pairs: :func:`~moediag.results.pair_summary.pair_summary` of every pair.
        tokens: of every pair.
        sequences: frame ``sequences`` of the main pair.
        own: arms compared with the arm of their own side.
        provenance: what the analysis adds.
    """
    record = run.record
    observed = run.pair_name(run.reference(TRAIN), run.reference(INFER))
    floor = floors(pairs, main, own)
    replay = _replay_summary(run, tokens, observed)
    function, recorded = found.function, found.recorded
    apart = None if function is None else _distances(run, function, tokens)
    weights = _weights(run, *run.main_arms)
    differ = (weights or {}).get("words", "")
    analysed = {arm for pair in pairs for arm in pair.split("~")}
    analysed |= {found.whose.arm} if found.whose is not None and found.whose.arm else set()
    return {
        "schema_version": SCHEMA_VERSION,
        "step": record.step,
        "model": _model(run),
        "n_prompts": record.prompts.n if record.prompts else pairs[main]["n_prompts"],
        "sampling": {
            **(record.sampling.content() if record.sampling else {}),
            "given_completions": not run.is_sampled,
        },
        **({"notes": run.notes} if run.notes else {}),
        "arms": {arm: _arm_facts(run, arm) for arm in run.arms() if arm in analysed},
        "provenance": {
            "moediag_version": record.moediag_version,
            "run_schema": run.schema_version,
            "configuration": record.configuration,
            "prompts": record.prompts.content() if record.prompts else None,
            "captures": captures_digest(run),
            **provenance,
        },
        "weights": weights,
        "main_pair": main,
        "observed_pair": observed if observed in pairs else None,
        "replay_pair": next(iter(_replay_pairs(run, pairs)), None),
        "verdict": verdict(
            Seen(
                pairs[main],
                floor,
                replay,
                differ,
                found.findings,
                function,
                apart,
                found.layers,
                found.modules,
                recorded,
                sequences,
                **_sides(run),
                whose=found.whose,
                first_layers=found.first_layers,
            )
        ),
        "recorded": None if recorded is None else recorded.content(),
        "function": None if function is None else function.content(),
        "layers_apart": None if found.layers is None else found.layers.content(),
        "distances": None if apart is None else apart.content(),
        "first_layers": None if found.first_layers is None else found.first_layers.content(),
        "whose": None if found.whose is None else found.whose.content(),
        "pairs": dict(pairs),
        "floors": floor,
        "routing_replay": replay,
    }


def _distances(run: Run, function: FunctionTest, tokens: Mapping[str, TokenSource]) -> Distances | None:
    """Each engine's distance to its own float32; None where one of them runs in float32 as it is."""
    infer, train = function.pair.split("~")
    own = [run.pair_name(run.reference(role), arm) for arm, role in ((infer, INFER), (train, TRAIN))]
    return distances(tokens[own[0]], tokens[own[1]]) if set(own) <= {*tokens} else None


def _sides(run: Run) -> dict[str, Any]:
    """What a verdict says of the engines of the main pair."""
    arms = {TRAIN: run.arm(run.main_arms[0]), INFER: run.arm(run.main_arms[1])}
    accelerators = (arm.captured.environment.get("accelerator") for arm in arms.values() if arm.captured)
    return {
        "engines": {role: ENGINE_WORDS.get(arm.engine, arm.engine) for role, arm in arms.items()},
        "is_on_accelerator": any(one not in (None, "None") for one in accelerators),
    }


def _weights(run: Run, minuend: str, subtrahend: str) -> dict[str, Any] | None:
    """How the weights that two arms loaded differ, in words and as measured; None where both loaded the same."""
    words = run.other_weights(minuend, subtrahend)
    if not words:
        return None
    comparison = run.weights_comparison(minuend, subtrahend)
    advice = (
        "the mismatch is of weights and engines together (one checkpoint profiled in both engines tells the engines' "
        "part)"
    )
    return {
        "words": f"{words}; {advice}",
        "is_equal": None if comparison is None else comparison.is_equal,
        "comparison": None if comparison is None else comparison.content(),
    }


def _model(run: Run) -> dict[str, Any]:
    """What was trained: the checkpoint of the main pair's minuend, or what little is known without one."""
    checkpoint, routers = run.checkpoint_of(run.main_arms[0]), run.routers
    keys = ("revision", "architecture", "model_type", "n_decoder_layers")
    return {
        "path": checkpoint.source if checkpoint else None,
        **{key: getattr(checkpoint, key, None) for key in keys},
        "n_moe_layers": len(routers),
        "n_experts": max((router.n_experts for router in routers), default=0),
        "top_k": max((router.top_k for router in routers), default=0),
        "decoder_layers": [router.decoder_layer for router in routers],
    }


def _arm_facts(run: Run, arm: str) -> dict[str, Any]:
    record, facts = run.arm(arm), run.arm(arm).facts
    checkpoint = run.checkpoint_of(arm)
    return {
        **{key: getattr(record, key) for key in ("role", "engine", "path", "variant_of", "change", "dtype")},
        "checkpoint": {"digest": checkpoint.digest, "source": checkpoint.source} if checkpoint else None,
        "origin": record.origin.kind,
        "recipe": record.captured.recipe if record.captured else None,
        "versions": record.captured.versions if record.captured else None,
        "environment": record.captured.environment if record.captured else None,
        **{key: facts.get(key) for key in ("loaded", "seeding", "replay", "batching")},
        "router_dtypes": run.router_dtypes(arm),
    }


def _replay_pairs(run: Run, pairs: Container[str]) -> Iterator[str]:
    """Pairs of the reference infer arm with a train arm that infer's experts were forced on."""
    for arm in run.arms():
        if run.arm(arm).change == "replay" and (name := run.pair_name(arm, run.reference(INFER))) in pairs:
            yield name


def _replay_summary(run: Run, tokens: Mapping[str, TokenSource], observed: str) -> dict[str, Any] | None:
    """What forcing infer's experts on train removes of the mismatch; None without a replay arm.

    Both pairs are of the same tokens, so a ratio of two means is resampled as one statistic, by prompt. Tokens that
    one of the pairs did not score are left out of both. No interval is known to cover for a ratio of two quantiles.
    """
    replayed = next(_replay_pairs(run, tokens), None)
    if replayed is None or observed not in tokens:
        return None
    x = beside(tokens[observed], tokens[replayed])
    n = len(x)

    size_C, forced_C, k3_C, forced_k3_C = x.sums(abs_diff, abs_diff_other, k3, k3_other)

    def of_means(with_C: NDArray[Any], without_C: NDArray[Any]) -> dict[str, Any]:
        kept = ratio_mean_interval(with_C, without_C, kind="positive").one()
        bounds = [1 - kept.high, 1 - kept.low]
        is_known = all(map(math.isfinite, bounds))
        share = 1 - kept.value if math.isfinite(kept.value) else None
        return {"share": share, "share_ci": bounds if is_known else None, "note": kept.note}

    forced_p99, p99 = (x.quantile(of, 0.99) for of in (abs_diff_other, abs_diff))
    of_p99 = 1 - forced_p99 / p99 if p99 > 0 else None
    removed = {
        "abs_logp_diff.mean": of_means(forced_C, size_C),
        "abs_logp_diff.p99": {"share": of_p99, "share_ci": None, "note": "ratio of two quantiles"},
        "kl_infer_train_k3": of_means(forced_k3_C, k3_C),
    }
    share, forced = removed["abs_logp_diff.mean"]["share"], forced_C.sum() / n if n else 0.0
    return {
        "layers": _forced_layers(run, replayed.partition("~")[2]),
        "removed": removed,
        "n_tokens": n,
        "n_prompts": x.n_prompts,
        "is_broken": share is not None and share < BROKEN_REPLAY and bool(forced > _LEAST_BROKEN),
    }


def _forced_layers(run: Run, arm: str) -> list[int] | None:
    """First and last MoE layer whose experts were forced; None where all were."""
    forced, n_layers = run.arm(arm).facts.get("replay") or {}, len(run.arm(arm).routers)
    first, last = forced.get("first_layer") or 0, forced.get("last_layer")
    last = n_layers - 1 if last is None else min(int(last), n_layers - 1)
    return None if (first, last) == (0, n_layers - 1) else [int(first), last]
