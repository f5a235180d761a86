"""Runs with engine-like numbers made from a seed, written by the real writer and analysed by the real analysis.

What figure and report tests draw is therefore what an analysis really gives, floors and verdict included.
"""

from __future__ import annotations

import copy
import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from hygiene_captures import Healthy, capture_of
from records import arm_of, checkpoint_of, new_run

from moediag.analysis.declarations import MODULE_CHECKS
from moediag.diagnosis import LAYERS_APART
from moediag.frames import declared_frames
from moediag.results import analyze_run, load_frames
from moediag.run.capture import TokenRows
from moediag.run.reader import open_run
from moediag.run.records import RouterSpec
from moediag.run.writer import RunWriter

N_PROMPT_TOKENS = 2
SOFTMAX = RouterSpec(
    family="tiny", score_function="softmax", has_correction_bias=False, n_group=1, topk_group=1, gate="scores",
    renormalize=True, scaling_factor=1.0, n_shared_experts=0,
)  # fmt: skip


class AnalysedRun(dict[str, pd.DataFrame]):
    """The frames of a run's main pair, by name, with the run's summary."""

    def __init__(self, frames: dict[str, pd.DataFrame], summary: dict[str, Any]) -> None:
        super().__init__(frames)
        self._summary = summary

    def summary(self, **model: Any) -> dict[str, Any]:
        """A copy of summary.json, with what is given changed in its model."""
        summary = copy.deepcopy(self._summary)
        summary["model"].update(model)
        return summary


@cache
def make_run(
    n_tokens: int = 4096,
    n_layers: int = 6,
    scale: float = 1.0,
    seed: int = 0,
    n_prompts: int = 64,
    n_experts: int = 16,
    first_decoder_layer: int = 1,
    has_variants: bool = False,
    is_scored: bool = True,
    has_scores: bool = True,
    has_flips: bool = True,
) -> AnalysedRun:
    """A run of infer and train, of response tokens shared evenly by the prompts.

    Args:
        n_layers: MoE layers; 0 = dense.
        scale: of what differs between the engines; 0 = nothing differs.
        has_variants: also infer-repeat, bit-equal to infer, and train-perturbed, as noisy as train.
        is_scored: whether train has a log-probability of any token.
        has_scores: whether more than expert ids was captured of the routers.
        has_flips: whether routers' scores differ, too, where log-probabilities do.
    """
    rng = np.random.default_rng(seed)
    tokens = _tokens(rng, n_tokens, n_prompts)
    is_small = n_tokens * n_layers * n_experts < 2e6
    h = Healthy(shape=(n_experts, 4, n_layers), has_scores=has_scores, has_logits=is_small)
    logp_T = np.where(tokens.is_response_T, -rng.exponential(0.7, len(tokens)), np.nan)
    logits_TLE = rng.normal(size=(len(tokens), n_layers, n_experts))
    # Some tokens are noisier than others in all layers at once, as in engines: flips come together.
    loudness_T = np.minimum(rng.lognormal(-0.5, 1.0, len(tokens)), 10.0)
    arms = {"infer": (logp_T, logits_TLE)}
    for arm in ("train", *(("infer-repeat", "train-perturbed") if has_variants else ())):
        size = 0.0 if arm == "infer-repeat" else scale
        of_logp, of_logits = arms["train" if arm == "train-perturbed" else "infer"]
        arms[arm] = (
            _moved(rng, of_logp, size * loudness_T, is_moe=n_layers > 0),
            of_logits + 0.01 * size * has_flips * loudness_T[:, None, None] * rng.normal(size=of_logits.shape),
        )
    if not is_scored:
        arms["train"] = (np.full_like(logp_T, np.nan), arms["train"][1])
    with TemporaryDirectory() as folder:
        run_path = Path(folder) / "run"
        sink = io.BytesIO()
        pd.DataFrame({"prompt_token_ids": [[1, 2]] * n_prompts, "completion_token_ids": None}).to_parquet(sink)
        layers = range(first_decoder_layer, first_decoder_layer + n_layers)
        checkpoint = checkpoint_of(layers, n_experts, 4, SOFTMAX, source="models/tiny-moe")
        run = new_run(run_path, sink.getvalue(), n_prompts, n_prompts, checkpoint)
        writer, (shard,) = RunWriter(run), run.shards
        for arm, (logp, logits) in arms.items():
            capture = capture_of(h, tokens, logits, logp, is_sampler=arm.startswith("infer"))
            writer.begin_arm(arm_of(run, arm, arrays=tuple(capture.arrays())))
            writer.write_capture(arm, shard, tokens, capture, {}, {})
            if arm == "infer":
                writer.write_tokens(shard, tokens)
        run = open_run(run_path)
        summary = analyze_run(run, force=not is_scored)
        frames = {
            **load_frames(run),
            "layers_apart": layers_apart_of(rng, n_layers, scale),
            "module_checks": module_checks(rng, max(n_layers, 1), scale),
        }
        return AnalysedRun(frames, summary)


def layers_apart_of(rng: np.random.Generator, n_layers: int, scale: float) -> pd.DataFrame:
    """A frame of engines that agree in float32; a row per MoE layer and one of the log-probability."""
    n = n_layers + 1
    times_Q = scale * rng.uniform(0.5, 1.5, n)
    row = {"layer": np.arange(n), "decoder_layer": [*range(n_layers), -1], "n_rows": 512, "scale": 1e-7,
           "what": ["margin of router logits"] * n_layers + ["log-probability"], "times_p50": times_Q,
           "times_p99": 4 * times_Q, "times_max": 8 * times_Q, "beyond_share": 0.0}  # fmt: skip
    return LAYERS_APART.validate(pd.DataFrame(row).reindex(columns=LAYERS_APART.names))


def module_checks(rng: np.random.Generator, n_layers: int, scale: float) -> pd.DataFrame:
    """A frame of healthy modules: attention and a block a layer, whose streams drift apart by ``scale``."""
    places = [("embeddings", -1, True)]
    for layer in range(n_layers):
        places += [("residual stream into input_layernorm", layer, True)] if layer else []
        places += [("attention (self_attn)", layer, False)]
        places += [("residual stream into post_attention_layernorm", layer, True), ("mlp", layer, False)]
    places += [("residual stream into norm", -1, True), ("head", -1, False)]
    rows = []
    for nth, (module, layer, is_stream) in enumerate(places):
        own = np.nan if is_stream else 0.002 * scale * rng.uniform(0.8, 1.2)
        apart = 0.001 * scale * nth * rng.uniform(0.8, 1.2) if is_stream else np.nan
        row = dict.fromkeys(MODULE_CHECKS.names, np.nan) | {"train_p50": own, "infer_p50": own, "free_p50": apart}
        rows.append(row | {"module": module, "decoder_layer": layer, "n_rows": 512, "verdict": "same function",
                           "note": ""})  # fmt: skip
    return MODULE_CHECKS.validate(pd.DataFrame(rows))


def empty_frame(spec: Any) -> pd.DataFrame:
    return spec.validate(pd.DataFrame({c.name: pd.Series(dtype=c.dtype) for c in spec.columns}))


def empty_frames() -> dict[str, pd.DataFrame]:
    return {spec.name: empty_frame(spec) for spec in declared_frames()}


def _tokens(rng: np.random.Generator, n_tokens: int, n_prompts: int) -> TokenRows:
    length = N_PROMPT_TOKENS + np.bincount(np.arange(n_tokens) * n_prompts // n_tokens, minlength=n_prompts)
    seq_id_T = np.repeat(np.arange(n_prompts), length)
    position_T = np.concatenate([np.arange(n) for n in length])
    return TokenRows(
        seq_id_T=seq_id_T.astype(np.int64),
        prompt_id_T=seq_id_T.astype(np.int64),
        sample_index_T=np.zeros(len(seq_id_T), np.int32),
        position_T=position_T.astype(np.int32),
        token_id_T=np.where(position_T < N_PROMPT_TOKENS, position_T + 1, rng.integers(0, 1000, len(seq_id_T))),
        is_response_T=position_T >= N_PROMPT_TOKENS,
    )


def _moved(rng: np.random.Generator, logp_T: np.ndarray, scale_T: np.ndarray, is_moe: bool) -> np.ndarray:
    """Log-probabilities of another engine: many equal bit for bit, and a tail (wider with experts)."""
    size = rng.lognormal(np.log(0.004), 1.3 if is_moe else 1.0, len(logp_T)) * scale_T
    size[rng.random(len(logp_T)) < 0.12] = 0.0
    diff = size * rng.choice([-1.0, 1.0], len(logp_T))
    return np.where(logp_T + diff > 0, logp_T - diff, logp_T + diff)
