"""The catalogue of faults: what each changes, how it is planted, and which causes are the right answer.

A fault of the **function** is planted in an edited copy of the checkpoint, which one engine loads while the run's
record still names the clean one, or in the loaded model: to the run it looks as if the engine computed something else.
A fault of **rounding** is planted in the loaded model: numbers that pass a module are kept in other bits, on one side
only. A fault of the **record** is planted in the arrays of one side's arms, as a capture or a pipeline spoils them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from moediag.faults import edits, loaded, recorded
from moediag.faults.edits import ATTENTION, BIAS, EMBEDDINGS, FINAL_NORM, MOE, ROUTER, Edit
from moediag.faults.recorded import Spoil
from moediag.run.recipes import TRANSFORMERS, VLLM

FUNCTION, ROUNDING, RECORD = "function", "rounding", "record"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        words: what it changes, by how much.
        kind: :data:`FUNCTION`, :data:`ROUNDING` or :data:`RECORD`.
        causes: rules of which each is a right answer, by name.
        module: where it is, as a diagnosis should name it; empty: in no module.
        of_layer: it is in one decoder layer; else in the whole model.
        edit: of the checkpoint.
        modules: of the loaded model, by what follows their layer's number, or by name; ``hook`` is set on each.
        spoil: of the arrays of one side's arms.
        sides: engines that it can be planted in.
        dtype: the model must be loaded in for there to be a fault; empty = any.
        in_float32: it is in the arms in float32 as well; else it is arithmetic of the dtype in use.
        with_bias: only models whose routers have a correction bias can have it.
    """

    words: str
    kind: str
    causes: tuple[str, ...]
    module: str = ""
    of_layer: bool = True
    edit: Edit | None = None
    modules: str = ""
    hook: Callable[[Any], Callable[[], None]] | None = None
    spoil: Spoil | None = None
    sides: tuple[str, ...] = (TRANSFORMERS, VLLM)
    dtype: str = ""
    in_float32: bool = True
    with_bias: bool = False


_function = partial(Fault, kind=FUNCTION)
_rounding = partial(Fault, kind=ROUNDING, of_layer=False, in_float32=False)
_record = partial(Fault, kind=RECORD, of_layer=False)

_GATES = ("gate-formula", "D14-gate-factor", "gate-sum")
_EXPERTS = ("expert-weights", "D29-head")  # the last layer's experts move log-probabilities alone
_AFTER_A_ROUTER = ("D12-router", "D29-head")  # in every row: at the next router, or behind the last
_QUERIES = (rf"{ATTENTION}\.(?:q_norm|query_layernorm)\.weight", rf"{ATTENTION}\.q_b_proj\.weight",
            rf"{ATTENTION}\.q_proj\.(?:weight|bias)")  # fmt: skip
_NORM = (r"(?:post_attention_layernorm|pre_mlp_layernorm|ffn_norm)\.weight",)
_DOWN = "(?:down_proj|w2)"
_SHARED = rf"{MOE}\.shared_experts?\.down_proj\.weight"
_SCORED = "lm_head|logits_processor"

FAULTS: Final[Mapping[str, Fault]] = {
    # attention and positions
    "attention-scale": _function(
        "queries of one layer 5 % longer: the softmax scale of its attention", causes=("D17-attention-scale",),
        module="attention", edit=edits.layers_tensors(edits.scaled(1.05), *_QUERIES)),
    "rope-theta": _function(
        "rope theta 5 % larger", causes=("D18-grows-with-position",), module="attention", of_layer=False,
        edit=edits.rope(1.05)),
    "rope-theta-1pc": _function(
        "rope theta 1 % larger", causes=("D18-grows-with-position",), module="attention", of_layer=False,
        edit=edits.rope(1.01)),
    "sliding-window": _function(
        "the sliding window 4 tokens narrower", causes=("D19-change-point", "D18-grows-with-position"),
        module="attention", of_layer=False, edit=edits.entry("sliding_window", lambda window: window - 4, int)),
    "attention-sink": _function(
        "one layer's attention sinks off by a fifth of their spread", causes=("D17-attention-scale",),
        module="attention", edit=edits.layers_tensors(edits.noisy(0.2), rf"{ATTENTION}\.sinks")),
    "attention-multiplier": _function(
        "config.json's attention multiplier 5 % larger", causes=("D17-attention-scale",), module="attention",
        of_layer=False, edit=edits.entry("attention_multiplier", lambda factor: factor * 1.05, float)),
    # experts
    "expert-redrawn": _function(
        "one expert of one layer drawn anew", causes=_EXPERTS, module="routed experts",
        edit=edits.experts(edits.redrawn, expert=0)),
    "expert-perturbed": _function(
        "one expert of one layer off by 5 % of its spread", causes=_EXPERTS, module="routed experts",
        edit=edits.experts(edits.noisy(0.05), expert=0)),
    "experts-redrawn": _function(
        "all experts of all layers drawn anew", causes=(*_EXPERTS, "D12-router"), module="routed experts",
        of_layer=False,
        edit=edits.experts(edits.redrawn)),
    "experts-permuted": _function(
        "every expert of one layer in its neighbour's slot", causes=(*_EXPERTS, "D12-router"),
        module="routed experts", edit=edits.permuted_experts),
    "experts-transposed": _function(
        "square matrices of one layer's experts in the other layout", causes=(*_EXPERTS, "D12-router"),
        module="routed experts", edit=edits.transposed_experts),
    "shared-expert": _function(
        "one layer's shared expert 5 % larger", causes=_AFTER_A_ROUTER, module="shared expert",
        edit=edits.layers_tensors(edits.scaled(1.05), _SHARED)),
    "shared-expert-dropped": _function(
        "one layer's shared expert gives nothing", causes=_AFTER_A_ROUTER, module="shared expert",
        edit=edits.layers_tensors(edits.zeroed, _SHARED)),
    "below-rounding": _function(
        "one expert of one layer off by 0.1 % of its spread: less than bfloat16 keeps",
        causes=(*_EXPERTS, "D30-floor", "D13-near-ties"), module="routed experts",
        edit=edits.experts(edits.noisy(0.001), expert=0)),
    # norms, embeddings, head
    "norm-weight": _function(
        "weights of the norm before one layer's experts 5 % larger", causes=("D12-router",), module="norm",
        edit=edits.layers_tensors(edits.scaled(1.05), *_NORM)),
    "embeddings": _function(
        "embeddings off by 5 % of their spread", causes=("D12-router",), module="embeddings",
        of_layer=False, edit=edits.models_tensors(edits.noisy(0.05), EMBEDDINGS)),
    "residual-multiplier": _function(
        "config.json's residual multiplier 5 % larger", causes=("D12-router",),
        module="residual stream", of_layer=False,
        edit=edits.entry("residual_multiplier", lambda factor: factor * 1.05, float)),
    "dense-mlp": _function(
        "the MLP of the layers without experts 5 % larger", causes=("D12-router",), module="mlp",
        of_layer=False, edit=edits.layers_tensors(edits.scaled(1.05), rf"{MOE}\.down_proj\.weight")),
    "final-norm": _function(
        "the final norm's weights off by 5 %", causes=("D29-head",), module="final norm", of_layer=False,
        edit=edits.models_tensors(edits.noisy(0.05), FINAL_NORM)),
    "head": _function(
        "head 2 % larger (tied: the final norm)", causes=("D29-head", "D10-temperature"), module="head",
        of_layer=False, edit=edits.head(edits.scaled(1.02))),
    "head-perturbed": _function(
        "head off by 5 % of its spread (tied: the final norm)", causes=("D29-head",), module="head", of_layer=False,
        edit=edits.head(edits.noisy(0.05))),
    "head-fp32": _rounding(
        "the head computed in float32, its logits kept in it", causes=("D29-head", "rounds-worse"), module="head",
        modules="lm_head", hook=loaded.in_float32, sides=(TRANSFORMERS,), dtype="bfloat16"),
    "head-bf16": _rounding(
        "the head's input and logits in bfloat16, the model in float32", causes=("D29-head", "rounds-worse"),
        module="head", modules=_SCORED, dtype="float32", in_float32=True,
        hook=lambda module: loaded.both(loaded.with_input(module, loaded.in_bfloat16),
                                        loaded.with_output(module, loaded.in_bfloat16))),
    "head-fp8": _rounding(
        "the head's input in float8", causes=("D29-head", "rounds-worse"), module="head", modules=_SCORED,
        hook=lambda module: loaded.with_input(module, loaded.in_float8)),
    # routers
    "router-weight": _function(
        "one router's weights off by 1 % of their spread", causes=("D12-router",), module="router",
        edit=edits.layers_tensors(edits.noisy(0.01), ROUTER)),
    "router-permuted": _function(
        "one router's rows each in its neighbour's place", causes=("D12-router",), module="router",
        edit=edits.layers_tensors(edits.permuted, ROUTER)),
    "router-zeroed": _function(
        "one router's weights 0", causes=("D34-flat-router",), module="router",
        edit=edits.layers_tensors(edits.zeroed, ROUTER)),
    "router-bias-bf16": _function(
        "one router's correction bias near 7 and kept in bfloat16", causes=("D12-router",), module="routing rule",
        with_bias=True, edit=edits.layers_tensors(edits.near_seven_in_bfloat16, BIAS)),
    "router-bias-dropped": _function(
        "one router's correction bias 0", causes=("D12-router",), module="routing rule", with_bias=True,
        edit=edits.layers_tensors(edits.zeroed, BIAS)),
    "router-bf16": _rounding(
        "every router's weights and input in bfloat16, the model in float32", causes=("D12-router", "rounds-worse"),
        module="router", modules=rf"{MOE}\.(?:gate|router)", dtype="float32", in_float32=True,
        hook=lambda module: loaded.both(loaded.with_weights(module, loaded.in_bfloat16),
                                 loaded.with_input(module, loaded.in_bfloat16))),
    "router-fp8": _rounding(
        "every router's input in float8", causes=("D12-router", "rounds-worse"), module="router",
        modules=rf"{MOE}\.(?:gate|router)", hook=lambda module: loaded.with_input(module, loaded.in_float8)),
    "renormalisation": _function(
        "norm_topk_prob flipped", causes=_GATES, module="routing rule", of_layer=False,
        edit=edits.entry("norm_topk_prob", lambda is_on: not is_on, bool)),
    "scaling-factor": _function(
        "routed_scaling_factor 20 % smaller", causes=_GATES, module="routing rule", of_layer=False,
        edit=edits.entry("routed_scaling_factor", lambda factor: factor * 0.8, float)),
    "gates-biased": _function(
        "experts weighed by the biased scores that chose them", causes=_GATES, module="routing rule", of_layer=False,
        modules="routers", hook=loaded.with_biased_gates, sides=(VLLM,), with_bias=True),
    # weights and numbers everywhere
    "stale-weights": _function(
        "every tensor off by 2 % of its spread: the weights of another step",
        causes=("D28-other-weights", "D12-router"), of_layer=False, edit=edits.all_tensors(edits.noisy(0.02))),
    "other-weights": _function(
        "every tensor drawn anew: another checkpoint", causes=("D28-other-weights", "D12-router", "D01-other-sequence"),
        of_layer=False, edit=edits.all_tensors(edits.redrawn)),
    "activations-fp8": _rounding(
        "every MoE block's input in float8", causes=("rounds-worse",), module="routed experts", modules=MOE,
        hook=lambda module: loaded.with_input(module, loaded.in_float8)),
    "kv-fp8": _rounding(
        "keys and values in float8", causes=("rounds-worse", "D18-grows-with-position"), module="attention",
        modules=rf"{ATTENTION}\.(?:k_proj|v_proj|qkv_proj|query_key_value|kv_b_proj)",
        hook=lambda module: loaded.with_output(module, loaded.in_float8)),
    # two at once
    "scale-and-router": _function(
        "attention-scale and router-weight at once", causes=("D17-attention-scale", "D12-router"), module="attention",
        edit=edits.both(edits.layers_tensors(edits.scaled(1.05), *_QUERIES),
                        edits.layers_tensors(edits.noisy(0.01), ROUTER))),
    "rope-and-head": _function(
        "rope-theta and head-perturbed at once", causes=("D18-grows-with-position", "D29-head"), module="attention",
        of_layer=False, edit=edits.both(edits.rope(1.05), edits.head(edits.noisy(0.05)))),
    # semantics and tokens
    "temperature": _function(
        "logits divided by 0.7", causes=("D10-temperature",), of_layer=False,
        edit=edits.head(edits.scaled(1 / 0.7))),
    "top-p": _function(
        f"logits outside the likeliest {loaded.TOP_P} of the probability are -inf",
        causes=("D09-mean-ratio", "D31-impossible-logp"),  # in an arm that scores the same tokens again, one is outside
        of_layer=False, modules="logits_processor", sides=(VLLM,),
        hook=lambda module: loaded.with_output(module, loaded.of_the_nucleus)),
    "wrong-token": _function(
        "one token of a fifth of the sequences embedded as its neighbour",
        causes=("D21-few-sequences", "D32-token-ids"), of_layer=False,
        modules="embed_tokens|word_embeddings", hook=loaded.with_a_wrong_token, sides=(TRANSFORMERS,)),
    # the record of log-probabilities
    "logps-lag": _record("log-probabilities one token late", causes=("D01-token-lag",), spoil=recorded.logps_lag),
    "logps-of-other-sequences": _record(
        "every sequence has its neighbour's log-probabilities", causes=("D01-other-sequence",),
        spoil=recorded.other_sequences_logps),
    "logps-nan": _record(
        "a tenth of the log-probabilities NaN", causes=("D31-nan-logp",), spoil=recorded.nan_rows),
    "logps-zero-tail": _record(
        "log-probabilities 0 in the last eighth of every response", causes=("D31-zero-logp",),
        spoil=recorded.zero_tail),
    "logps-bf16": _record(
        "log-probabilities kept in bfloat16", causes=("rounded-logp",),
        spoil=recorded.bfloat16_logps),
    # the record of routing
    "rows-lag": _record("routing rows one row late", causes=("D01-row-lag",), spoil=recorded.rows_lag),
    "layers-lag": _record(
        "the record of every layer one layer late", causes=("D02-layer-lag",), spoil=recorded.layers_lag),
    "layer-of-another-router": _record(
        "the first layer holds another router's record", causes=("D02-layer-at-chance",),
        spoil=recorded.other_routers_layer),
    "twin-layers": _record(
        "the last layer holds the first one's record", causes=("D02-twin-layers", "D02-layer-at-chance"),
        spoil=recorded.twin_layers),
    "never-bound": _record("every row names expert 0", causes=("D03-never-bound",), spoil=recorded.never_bound),
    "zero-layer": _record("one layer names expert 0 in every row", causes=("D03-zero-layer",),
                          spoil=recorded.zero_layer),
    "zero-rows": _record(
        "a tenth of the rows names expert 0 alone", causes=("D03-all-zero", "D03-duplicate-ids"),
        spoil=recorded.zero_rows),
    "twice-named": _record(
        "a tenth of the rows names one expert twice", causes=("D03-duplicate-ids",), spoil=recorded.twice_named),
    "partial-rows": _record(
        "a tenth of the rows lacks an expert", causes=("D03-partial-row",), spoil=recorded.partial_rows),
    "filler-rows": _record(
        "a sixth of the rows names experts 0 to K-1", causes=("D04-filler-rows",), spoil=recorded.filler_rows),
    "stale-rows": _record(
        "two of three rows hold the row before", causes=("D05-stale-rows",), spoil=recorded.stale_rows),
    "stale-block": _record(
        "one row in place of the twenty after it, in every other sequence", causes=("D05-stale-rows",),
        spoil=recorded.stale_block),
    "doubled-rows": _record(
        "a block of rows stands twice in every sequence", causes=("D05-stale-rows",), spoil=recorded.doubled_rows),
    "rows-of-other-sequences": _record(
        "two sequences have each other's routing rows", causes=("D21-few-sequences",),
        spoil=recorded.other_sequences_rows),
    "rank-local": _record(
        "one rank of four kept its own rows", causes=("D07-rank-local",), spoil=recorded.rank_local),
    "cached-prefix": _record(
        "the first 16 rows of all sequences but one are missing", causes=("D08-cached-prefix",),
        spoil=recorded.cached_prefix),
    "lost-rows": _record("one row of a hundred is missing", causes=("completeness",), spoil=recorded.lost_rows),
    "gates-nan": _record(
        "a hundredth of the rows has gate weights of NaN", causes=("gate-not-finite",), spoil=recorded.nan_gates),
}  # fmt: skip
"""Faults by name."""
