"""The content of summary.json: what was analysed, what was found, and what it is worth against the floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from moediag.analysis.floors import floors, verdict
from moediag.analysis.intervals import cluster_sums, ratio_mean_interval
from moediag.analysis.pair_analysis import PairAnalysis
from moediag.analysis.summary import pair_summary
from moediag.analysis.tokens import logp_diff
from moediag.notation import INFER, PREFILLED, SCHEMA_VERSION
from moediag.report import MAIN_PAIR, REPLAY_PAIR
from moediag.run.directory import Run
from moediag.run.files import digest_of

BROKEN_REPLAY: Final = -9.0
"""Share removed below which it is the replay that is broken: the mean is more than ten times as large as without.

Ours: infer's routes can only bring train closer to infer, up to rounding and what flips amplify; on 13 router families
in bfloat16 and float32 the mean with replay was at most 1.1 times the one without, with gate weights forced too.
"""


def summarize(run: Run, analyses: Sequence[PairAnalysis], provenance: dict[str, Any]) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        provenance: what the analysis adds: digests of its frames, number of validation errors overridden.
    """
    model, routing = run.model, run.model["routing"] or {}
    pairs = {analysis.pair_name: pair_summary(analysis) for analysis in analyses}
    floor = floors(pairs, is_prefilled=run.arm(INFER).get("path") == PREFILLED)
    replay = _replay_summary(analyses)
    analysed = {arm for analysis in analyses for arm in (analysis.minuend, analysis.subtrahend)}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "path": model["name"],
            **{key: model[key] for key in ("revision", "architecture", "model_type", "n_decoder_layers")},
            "n_moe_layers": len(run.decoder_layers),
            "n_experts": run.n_experts,
            "top_k": int(routing.get("top_k", 0)),
            "decoder_layers": list(run.decoder_layers),
        },
        "n_prompts": run.manifest["prompts"]["n"],
        "sampling": {**run.manifest["sampling"], "given_completions": run.manifest["completions"]},
        "arms": {arm: _arm_facts(run, arm) for arm in run.arms() if arm in analysed},
        "provenance": {
            "moediag_version": run.manifest["moediag_version"],
            "configuration": run.configuration,
            "prompts": run.manifest["prompts"],
            "captures": captures_digest(run),
            **provenance,
        },
        "verdict": verdict(pairs[MAIN_PAIR], floor, provenance["validation_errors"], replay),
        "pairs": pairs,
        "floors": floor,
        "routing_replay": replay,
    }


def captures_digest(run: Run) -> dict[str, str]:
    """Digest of the captures of every complete arm, by arm: tells whether an analysis is of the arms as they are."""
    return {
        arm: digest_of([run.capture_sidecar(arm, shard)["data_sha256"] for shard in run.shards])
        for arm in run.arms()
        if run.is_complete(arm)
    }


def _arm_facts(run: Run, arm: str) -> dict[str, Any]:
    record = run.arm(arm)
    keys = ("engine", "versions", "path", "dtype", "loaded", "seeding", "environment", "replay")
    # vLLM's router dtypes are known only once a step has run: they stand beside the first shard
    dtypes = record.get("router_dtypes") or run.capture_sidecar(arm, run.shards[0]).get("router_dtypes")
    return {**{key: record.get(key) for key in keys}, "router_dtypes": dtypes}


def _replay_summary(analyses: Sequence[PairAnalysis]) -> dict[str, Any] | None:
    """Share of the mean abs logp diff that forcing infer's experts removes (R9); None without a replay arm.

    The two means are of the same tokens, so their ratio is resampled as one statistic, by prompt. Tokens that
    one of the pairs did not score are left out of both means.
    """
    tokens = {analysis.pair_name: analysis.tokens for analysis in analyses}
    if REPLAY_PAIR not in tokens:
        return None
    diff_T, replay_diff_T = (np.abs(logp_diff(tokens[pair])) for pair in (MAIN_PAIR, REPLAY_PAIR))
    is_scored_T = np.isfinite(diff_T) & np.isfinite(replay_diff_T)
    prompt_T = tokens[MAIN_PAIR]["prompt_id"].to_numpy()[is_scored_T]
    with_C, without_C = (cluster_sums(values_T[is_scored_T], prompt_T) for values_T in (replay_diff_T, diff_T))
    kept = ratio_mean_interval(with_C, without_C, kind="positive").one()
    bounds = [1 - kept.high, 1 - kept.low]
    removed = 1 - kept.value if math.isfinite(kept.value) else None
    is_broken = removed is not None and removed < BROKEN_REPLAY
    return {
        "removed_share": removed,
        "is_broken": is_broken,
        "broken_reason": f"with infer's routes forced the mean abs logp diff is {kept.value:.3g} times as large: "
        "what was forced is not what infer used (gate weights of another scale, or routes of other rows)"
        if is_broken
        else None,
        "removed_share_ci": bounds if all(map(math.isfinite, bounds)) else None,
        "n_tokens": int(is_scored_T.sum()),
        "n_prompts": len(np.unique(prompt_T)),
        "note": kept.note,
    }
