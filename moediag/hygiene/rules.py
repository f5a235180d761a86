"""The table of rules: what ``validate`` looks for, what it then names as cause, and what to check next.

Levels: *error* = a bug for certain (or data that cannot be analysed), *warning* = likely, *note* = information.
The D numbers are those of the project's diagnosis ladder; a name without one belongs to the files themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        symptom: what the program measures.
        cause: what most likely lies behind it.
        level: error, warning or note.
        next_check: what to look at next.
        companions: other rules that the same fault raises at error level, by its nature.
    """

    name: str
    symptom: str
    cause: str
    level: str
    next_check: str
    companions: tuple[str, ...] = ()


_TABLE = (
    Rule("damaged", "a file is missing, changed or of another format",
         "an interrupted copy, a full disk or an edit", ERROR,
         "do what the message says; else delete the file and make it again"),
    Rule("missing-shard", "a shard of an arm or of the token table is not there",
         "the capture was interrupted", ERROR, "run the same capture again: it resumes"),
    Rule("no-arm", "a run without any arm", "nothing was captured", ERROR, "moediag capture infer"),
    Rule("completeness", "token rows or (token, layer) without expert ids; arrays of another shape than the model's",
         "another code path bypassed the capture (graphs, caches, padding)", ERROR,
         "see which rows; capture eagerly, without prefix cache"),
    Rule("token-identity", "an arm scored other tokens than the token table holds",
         "arms of two runs were mixed", ERROR, "delete the arm and capture it again"),
    Rule("D01-token-lag", "the two logp streams correlate best at a token lag other than 0",
         "off by one in one side's log-probabilities", ERROR, "print 5 tokens with both streams, shifted",
         companions=("D31-zero-logp",)),
    Rule("D01-row-lag", "the two sides' expert sets agree best at a row offset other than 0",
         "off by one in one side's routing rows", ERROR, "print 5 rows of both sides; rows belong to consumed tokens"),
    Rule("D02-layer-lag", "the two sides' expert sets agree best at a layer offset other than 0, and barely at 0",
         "dense first layers counted on one side, or a pipeline stage's offset", ERROR,
         "shift one side's layers by the offset named; compare the layer maps"),
    Rule("D03-duplicate-ids", "an expert named twice in one row", "rows overwritten, ids packed or cast wrongly", ERROR,
         "look at those rows' block structure",
         companions=("D03-all-zero",)),
    Rule("D03-all-zero", "rows of nothing but expert 0", "a zero-filled buffer: the rows were never written", ERROR,
         "capture eagerly; compare which rows with the batch's padding"),
    Rule("D03-partial-row", "-1 beside real ids in one row", "a rank kept only its own experts, or a short TopK", ERROR,
         "gather over expert-parallel ranks before storing"),
    Rule("D03-id-range", "expert ids outside 0 .. E-1",
         "physical ids under expert load balancing, or a fused shared expert", ERROR,
         "capture logical ids; leave out the shared expert's slot"),
    Rule("D04-filler-rows", "rows equal to experts 0..K-1 (or the last K), or tied throughout, in all layers at once",
         "padding or zero logits reached TopK", ERROR, "drop padded rows; look at the hidden states of those tokens"),
    Rule("D05-stale-rows", "identical routing in all layers for different tokens of a sequence, at one distance",
         "a buffer that was not refreshed (CUDA graph replay, reused chunk)", ERROR, "capture eagerly",
         companions=("D01-row-lag",)),
    Rule("D06-last-row", "exactly the last token of every sequence has no routing row",
         "normal: a sampled last token is never consumed", NOTE, "nothing; the rows behind scored tokens are there"),
    Rule("D07-rank-local", "the rows present are 1/n of each sequence, strided or one block",
         "a rank stored only its own share of the tokens", ERROR, "gather over tensor- or sequence-parallel ranks",
         companions=("completeness",)),
    Rule("D08-cached-prefix", "rows are missing only at the beginning of sequences, at a shared prefix or in blocks",
         "prefix cache: cached tokens are not computed again", WARNING,
         "capture without prefix cache (enable_prefix_caching=False) or with prompt_logprobs",
         companions=("completeness",)),
    Rule("D14-other-rule", "an engine's routing rule is not the checkpoint's", "the engine ignores an option of the "
         "router", NOTE, "ratio of weight sums; another engine version"),
    Rule("D14-gate-factor", "same experts on both sides, gate weights off by a constant or not normalised on one side",
         "norm_topk_prob, routed_scaling_factor or a biased gate differ", WARNING, "compare weight sums by layer"),
    Rule("D16-exact-ties", "many exact ties at the TopK border", "router logits in bf16", NOTE,
         "count ties apart; try an fp32 gate"),
    Rule("D31-nan-logp", "response tokens without log-probability", "padding, truncation or a cache bug", ERROR,
         "count them by position; never average over them"),
    Rule("D31-impossible-logp", "log-probabilities of -inf or above 0", "masked vocabulary, processed logprobs or "
         "overflow", ERROR, "use raw logprobs; look at those tokens"),
    Rule("D31-zero-logp", "log-probabilities of exactly 0 that the row's entropy or the other side contradicts",
         "zero-filled padding or truncation", ERROR, "look at where in the response they stand"),
    Rule("D31-certain-tokens", "log-probabilities of exactly 0 that nothing contradicts",
         "near-certain tokens, rounded to 0", NOTE, "nothing; means over them are small by nature"),
    Rule("D31-entropy", "entropies missing beside scored tokens, or below 0", "truncated top-k entropies, or padding",
         WARNING, "recompute entropy from full logits"),
    Rule("D31-distribution", "whole next-token distributions that are of other tokens, do not sum to 1, or give "
         "their token another logp than the arm stored",
         "shards of two captures were mixed, or a truncated vocabulary", ERROR,
         "delete the shard and run the same capture again"),
    Rule("D32-token-ids", "token ids differ between the sides", "re-tokenisation, or another chat template", ERROR,
         "pass token ids, never text, between engines"),
    Rule("D34-flat-router", "a layer's router scores all experts the same in every row",
         "router weights zero (a quantisation ignore list)", ERROR, "lint the router weights of those layers",
         companions=("D04-filler-rows",)),
    Rule("gate-not-finite", "gate weights that are NaN, infinite or negative in routed rows", "overflow, or a buffer "
         "never written", ERROR, "look at those rows' router logits"),
    Rule("gate-sum", "gate weights that do not sum to a constant although the model renormalises",
         "renormalisation left out, or weights of another row", WARNING, "print the sums; compare norm_topk_prob"),
    Rule("margin-not-finite", "margins that are NaN, infinite or (choice score) negative in routed rows",
         "scores of another row, or computed after rounding", ERROR, "recompute from full router logits"),
    Rule("margin-logits", "logit margins that the stored router logits do not give",
         "ids, margins or logits of different rows or layers", ERROR, "print one row: logits, ids, margin"),
    Rule("logits-not-finite", "router logits that are NaN or infinite in routed rows", "overflow, or masked experts",
         ERROR, "look at those rows"),
    Rule("softmaxed-logits", "stored router logits are probabilities: none negative, rows sum to 1",
         "the engine returns softmax output under the name router_logits", ERROR,
         "hook the router before its softmax"),
)  # fmt: skip

RULES = {rule.name: rule for rule in _TABLE}
"""Every rule by name, in the order of the ladder."""
