"""The table of rules: what ``validate`` looks for, what it then names as cause, and what to check next.

Levels: *error* = a bug for certain (or data that cannot be analysed), *warning* = likely, *note* = information.
A rule's number groups rules of one kind of fault and is never shown without its name; rules without a number are about
files and single values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"

FILES = "files of a run"
LOGPS, BOTH_LOGPS = "log-probabilities", "log-probabilities of both sides"
ENTROPIES, DISTRIBUTIONS = "entropies", "whole distributions"
IDS, BOTH_IDS = "expert ids", "expert ids of both sides"
N_EXPERTS = "number of experts"
GATES, BOTH_GATES = "gate weights", "gate weights of both sides"
MARGINS, LOGITS = "margins", "router logits"
BOTH_TOKENS = "token ids of both sides"
FOREIGN = "data of another tool"
TEMPERATURES = "sampling temperatures"
"""What a rule may need, in words that follow "no"."""
DIAGNOSIS = "diagnosis"
"""What a rule needs that the diagnosis of a run's main pair applies, and no look at single files."""


FAR_WORDS = "2, as the scale is of one change and engines round in every module"
LAYERS_WORDS = (
    "difference of router margins or log-probabilities in float32, in root mean squares of what one unit in the last "
    "place makes there; 100 in two sequences, or a median above 10: healthy families stay below 30"
)


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        symptom: what the program measures.
        cause: what most likely lies behind it.
        level: error, warning or note.
        next_check: what to look at next.
        needs: what must be there for the rule to be applied at all.
        companions: other rules that the same fault raises at error level, by its nature.
        threshold: the statistic, its limit, and where the limit comes from.
    """

    name: str
    symptom: str
    cause: str
    level: str
    next_check: str
    needs: str
    companions: tuple[str, ...] = ()
    threshold: str = ""


_TABLE = (
    Rule("damaged", "a file is missing, changed or of another format",
         "an interrupted copy, a full disk or an edit", ERROR,
         "do what the message says; else delete the file and make it again", FILES),
    Rule("missing-shard", "a shard of an arm or of the token table is not there",
         "the capture was interrupted", ERROR, "run the same capture again: it resumes", FILES),
    Rule("no-arm", "a run without any arm", "nothing was captured", ERROR, "moediag capture infer", FILES),
    Rule("completeness", "token rows or (token, layer) without expert ids; arrays of another shape than the model's",
         "another code path bypassed the capture (graphs, caches, padding)", ERROR,
         "see which rows; capture eagerly, without prefix cache", IDS),
    Rule("token-identity", "an arm scored other tokens than the token table holds",
         "arms of two runs were mixed", ERROR, "delete the arm and capture it again", FILES),
    Rule("D01-token-lag", "the two logp streams correlate best at a token lag other than 0",
         "off by one in one side's log-probabilities", ERROR, "print 5 tokens with both streams, shifted", BOTH_LOGPS,
         companions=("D31-zero-logp",)),
    Rule("D01-other-sequence", "sequences whose two logp streams are unrelated, though they differ by far",
         "one side's log-probabilities are another sequence's (batch order, a wrong join), or another model's", ERROR,
         "join by sequence id, not by order; print 5 tokens of such a sequence with both streams", BOTH_LOGPS,
         companions=("D31-zero-logp",)),
    Rule("D01-row-lag", "the two sides' expert sets agree best at a row offset other than 0",
         "off by one in one side's routing rows", ERROR, "print 5 rows of both sides; rows belong to consumed tokens",
         BOTH_IDS),
    Rule("D02-layer-lag", "the two sides' expert sets agree best at a layer offset other than 0, and barely at 0",
         "dense first layers counted on one side, or a pipeline stage's offset", ERROR,
         "shift one side's layers by the offset named; compare the layer maps", BOTH_IDS),
    Rule("D02-layer-at-chance", "layers in which the two sides agree no more than by chance, while most layers agree",
         "the record is another router's (a draft or MTP head, two layers of one number); if no later layer agrees "
         "again, hidden states differ from there on", ERROR,
         "compare the layer maps; capture without speculative decoding", BOTH_IDS,
         companions=("D02-twin-layers",)),
    Rule("D02-twin-layers", "two layers of one side with the same expert sets in every row",
         "two layers wrote to one slot (a draft or MTP head, a layer number given twice)", ERROR,
         "compare the layer maps; capture without speculative decoding", IDS,
         companions=("D02-layer-at-chance",)),
    Rule("D03-duplicate-ids", "an expert named twice in one row", "rows overwritten, ids packed or cast wrongly", ERROR,
         "look at those rows' block structure", IDS,
         companions=("D03-all-zero",)),
    Rule("D03-all-zero", "rows of nothing but expert 0", "a zero-filled buffer: the rows were never written", ERROR,
         "capture eagerly; compare which rows with the batch's padding", IDS),
    Rule("D03-never-bound", "every row of every layer is expert 0",
         "the capture was never bound to the model's routers: nothing was recorded at all", ERROR,
         "look for a warning of the engine at its start; do all MoE layers have a number?", IDS),
    Rule("D03-zero-layer", "layers that are expert 0 in every row, and no dense layers' slots",
         "another pipeline rank's layers, or layers that the capture was not bound to", ERROR,
         "gather over pipeline ranks; compare the layer maps", IDS),
    Rule("D03-dense-slot", "a few layers of a dump are expert 0 in every row",
         "normal: slots of dense layers, which have no router", NOTE,
         "nothing; if these layers do have experts, they were never captured", FOREIGN),
    Rule("D03-partial-row", "-1 beside real ids in one row", "a rank kept only its own experts, or a short TopK", ERROR,
         "gather over expert-parallel ranks before storing", IDS),
    Rule("D03-sentinel", "rows that hold 255 more than once", "-1 (not routed) stored as an unsigned byte", ERROR,
         "read 255 as -1, or store ids in a signed or wider type", IDS),
    Rule("D03-id-range", "expert ids outside 0 .. E-1",
         "zero experts (LongCat, zero_expert_num: ids from E on are no bug), physical ids under expert load "
         "balancing, or a fused shared expert", ERROR,
         "zero experts: give --num-experts with them; else capture logical ids, leave out the shared expert's slot",
         N_EXPERTS),
    Rule("D04-filler-rows", "rows equal to experts 0..K-1 (or the last K), of ids that count on from slot to slot, or "
         "tied throughout, in all layers at once",
         "a trainer's own filler for tokens that no engine routed (0..K-1: NeMo-RL, SkyRL; counting on: slime), or "
         "padding or zero logits reached TopK", ERROR,
         "drop these rows; look at which tokens they are (tool output, padding)", IDS),
    Rule("D05-stale-rows", "identical routing in all layers for different tokens of a sequence, at one distance",
         "a buffer that was not refreshed (CUDA graph replay, reused chunk)", ERROR, "capture eagerly", IDS,
         companions=("D01-row-lag",)),
    Rule("D06-last-row", "exactly the last token of every sequence has no routing row",
         "normal: a sampled last token is never consumed", NOTE, "nothing; the rows behind scored tokens are there",
         IDS),
    Rule("D07-rank-local", "the rows present are 1/n of each sequence, strided or one block",
         "a rank stored only its own share of the tokens", ERROR, "gather over tensor- or sequence-parallel ranks",
         IDS, companions=("completeness",)),
    Rule("D08-cached-prefix", "rows are missing only at the beginning of sequences, at a shared prefix or in blocks",
         "prefix cache: cached tokens are not computed again", WARNING,
         "capture without prefix cache (enable_prefix_caching=False) or with prompt_logprobs", IDS,
         companions=("completeness",)),
    Rule("D09-mean-ratio", "the mean of exp(logp_train - logp_infer) is not 1",
         "infer sampled from another distribution than it scores (top-p, top-k, temperature, processed logprobs on one "
         "side), or the text is forced", WARNING,
         "sample with neutral parameters; compare the logprobs mode of both sides", FOREIGN),
    Rule("D10-temperature", "one side's logps are spread wider than the other's, beyond what noise between them gives",
         "a temperature on one side only", ERROR,
         "sweep a temperature on that side for the least difference; raw or processed logprobs?", BOTH_LOGPS),
    Rule("D10-sampling-temperature", "tokens that were sampled at a temperature other than 1",
         "normal where it was requested; but log-probabilities may be taken before the temperature on one side (raw) "
         "and after it on the other (processed)", WARNING,
         "take both sides' log-probabilities after the temperature; raw on both sides, k1 and k3 are no KL",
         TEMPERATURES),
    Rule("D14-other-rule", "an engine's routing rule is not the checkpoint's", "the engine ignores an option of the "
         "router", NOTE, "ratio of weight sums; another engine version", FILES),
    Rule("D14-gate-factor", "same experts on both sides, gate weights off by a constant or not normalised on one side",
         "norm_topk_prob, routed_scaling_factor or a biased gate differ", WARNING, "compare weight sums by layer",
         BOTH_GATES),
    Rule("D16-exact-ties", "many exact ties at the TopK border", "router logits in bf16", NOTE,
         "count ties apart; try an fp32 gate", MARGINS),
    Rule("D28-same-bits", "every log-probability is the same on both sides, bit for bit",
         "a copy: one side was never computed; engines that agree bit for bit exist, but are built for it", WARNING,
         "recompute a few sequences on the train side", FOREIGN),
    Rule("D31-nan-logp", "response tokens without log-probability", "padding, truncation or a cache bug", ERROR,
         "count them by position; never average over them", LOGPS),
    Rule("D31-impossible-logp", "log-probabilities of -inf or above 0", "masked vocabulary, processed logprobs or "
         "overflow", ERROR, "use raw logprobs; look at those tokens", LOGPS),
    Rule("D31-rounded-logp", "log-probabilities above 0 by no more than rounding", "logit - logsumexp, rounded up",
         NOTE, "nothing; they count as 0", LOGPS),
    Rule("D31-zero-logp", "log-probabilities of exactly 0 that the row's entropy or the other side contradicts",
         "zero-filled padding or truncation", ERROR, "look at where in the response they are; drop them", LOGPS),
    Rule("D31-certain-tokens", "log-probabilities of exactly 0 that no entropy contradicts",
         "near-certain tokens, rounded to 0", NOTE, "nothing; means over them are small by nature", LOGPS),
    Rule("D31-entropy", "entropies missing beside scored tokens, or below 0", "truncated top-k entropies, or padding",
         WARNING, "recompute entropy from full logits", ENTROPIES),
    Rule("D31-distribution", "whole next-token distributions that are of other tokens, do not sum to 1, or give "
         "their token another logp than the arm stored",
         "shards of two captures were mixed, or a truncated vocabulary", ERROR,
         "delete the shard and run the same capture again", DISTRIBUTIONS),
    Rule("D32-token-ids", "token ids differ between the sides", "re-tokenisation, or another chat template", ERROR,
         "pass token ids, never text, between engines", BOTH_TOKENS),
    Rule("D34-flat-router", "a layer's router scores all experts the same in every row",
         "router weights zero (a quantisation ignore list)", ERROR, "lint the router weights of those layers", IDS,
         companions=("D04-filler-rows", "D02-layer-at-chance")),
    Rule("gate-not-finite", "gate weights that are NaN, infinite or negative in routed rows", "overflow, or a buffer "
         "never written", ERROR, "look at those rows' router logits", GATES),
    Rule("gate-sum", "gate weights that do not sum to a constant although the model renormalises",
         "renormalisation left out, or weights of another row", WARNING, "print the sums; compare norm_topk_prob",
         GATES),
    Rule("margin-not-finite", "margins that are NaN, infinite or (choice score) negative in routed rows",
         "scores of another row, or computed after rounding", ERROR, "recompute from full router logits", MARGINS),
    Rule("margin-logits", "logit margins that the stored router logits do not give",
         "ids, margins or logits of different rows or layers", ERROR, "print one row: logits, ids, margin", LOGITS),
    Rule("logits-not-finite", "router logits that are NaN or infinite in routed rows", "overflow, or masked experts",
         ERROR, "look at those rows", LOGITS),
    Rule("softmaxed-logits", "stored router logits are probabilities: none negative, rows sum to 1",
         "the engine returns softmax output under the name router_logits", ERROR,
         "hook the router before its softmax", LOGITS),
    # The main pair of a run, by its arms: what moediag diagnose says
    Rule("not-repeating", "an engine scores the same tokens far from its own first pass",
         "kernels that depend on the batch, state of a cache, memory", ERROR,
         "other batches, eager execution, no cache: until it repeats itself nothing else is worth comparing", DIAGNOSIS,
         threshold=f"low end of the floor's interval over the rounding scale's high end; {FAR_WORDS}"),
    Rule("gate-formula", "in float32 the same experts are chosen by the same logits, and their gate weights differ",
         "norm_topk_prob, routed_scaling_factor, weights taken from biased scores, or softmax before TopK on one side",
         ERROR, "print one row of both sides: ratio of the weights' sums, then of the weights", DIAGNOSIS,
         threshold=LAYERS_WORDS),
    Rule("expert-weights", "in float32 rows agree until certain experts are chosen, and differ since",
         "those experts' weights, or the order in which experts were loaded (slots permuted)", ERROR,
         "compare those experts' tensors; moediag diagnose CKPT -o RUN --modules", DIAGNOSIS, threshold=LAYERS_WORDS),
    Rule("D17-attention-scale", "in float32 the first row of a sequence agrees, all others differ alike",
         "attention: its softmax scale, a norm of queries or keys, its mask", ERROR,
         "attention scale and query norms of both sides; moediag diagnose CKPT -o RUN --modules", DIAGNOSIS,
         threshold=f"{LAYERS_WORDS}; slope of log(difference) on log(position) below 0.3"),
    Rule("D18-grows-with-position", "in float32 the first row of a sequence agrees, and the difference grows with "
         "position", "rope: theta, scaling, the part of the head that is rotated, or its dtype", ERROR,
         "rope parameters of both sides; moediag diagnose CKPT -o RUN --modules", DIAGNOSIS,
         threshold=f"{LAYERS_WORDS}; slope of log(difference) on log(position) of 0.3 and more"),
    Rule("D19-change-point", "in float32 rows agree up to a position and differ from there on",
         "a sliding window, a prefill chunk, a cache block, or rope that changes with length", ERROR,
         "which window, chunk or block has that size? moediag diagnose CKPT -o RUN --modules", DIAGNOSIS,
         threshold=LAYERS_WORDS),
    Rule("D12-router", "in float32 the logits of one router differ in every row, and those of the routers before do "
         "not", "that router's weights, bias or dtype, the norm before it, or what was added since the router before: "
         "experts, shared expert, attention's output; in the first router, weights of another step altogether", ERROR,
         "moediag diagnose CKPT -o RUN --modules", DIAGNOSIS, threshold=LAYERS_WORDS),
    Rule("D29-head", "all routers agree and log-probabilities do not",
         "head or final norm (weights, bias, dtype, logit scale), or the last layer's experts", ERROR,
         "head and final norm of both sides; moediag diagnose CKPT -o RUN --modules", DIAGNOSIS,
         threshold=LAYERS_WORDS),
    Rule("other-function", "the engines differ in float32, and no router says where", "weights, rope, norm, head or "
         "formula", ERROR, "moediag diagnose CKPT -o RUN --modules", DIAGNOSIS,
         threshold="mean abs(logp_diff) of a sequence in float32 over the float32 rounding scale; 10: healthy pairs "
         "were measured at 0.3 to 3"),
    Rule("rounds-worse", "one engine is farther from the common function than the other",
         "fewer bits there: router, experts' activations, KV cache, accumulation", WARNING,
         "compare the dtypes of both sides; moediag diagnose CKPT -o RUN --modules", DIAGNOSIS,
         threshold="ratio of the engines' distances from their own float32, whole interval; 1.5: healthy pairs were "
         "measured at 0.8 to 1.25"),
    Rule("rollout-settings", "both engines are near the function, and the rollouts are farther from train than the two "
         "distances allow", "what rollouts alone run with: sampling, prefix cache, graphs, kernels", WARNING,
         "turn the rollouts' settings off one by one: moediag diagnose CKPT -o RUN --turn OPTION=VALUE", DIAGNOSIS,
         threshold=f"mean abs(logp_diff) over the sum of both distances, low end of its interval; {FAR_WORDS}"),
    Rule("D21-few-sequences", "a few sequences differ by far more than the others do",
         "a fault that depends on the prompt: a wrong token, state left behind, a length or a template", WARNING,
         "the worst sequences alone, in either engine", DIAGNOSIS,
         threshold="mean abs(logp_diff) of a sequence over the median sequence's; 30, and no more than 5 % of "
         "sequences: of healthy pairs none was beyond 12"),
    Rule("D28-other-weights", "the two arms loaded other weights", "two checkpoints, steps or quantisations", WARNING,
         "one checkpoint in both engines tells the engines' part", DIAGNOSIS,
         threshold="digests of the tensors that the arms loaded; any that differs"),
    Rule("rounded-logp", "every recorded log-probability lies on a coarse grid", "cast to 16 bits, or printed with few "
         "decimals, before it was kept", WARNING, "keep log-probabilities in float32", DIAGNOSIS,
         threshold="values off the grid of a dtype or of so many decimals; none (by chance one in 65,536 lies on it)"),
    Rule("D35-replay-without-effect", "forcing infer's experts makes the mismatch larger",
         "the forced experts are of other rows or layers", WARNING, "compare rows and layers of the forced experts",
         DIAGNOSIS, threshold="mean abs(logp_diff) with replay over without; 10: over 13 families it was at most 1.1"),
    Rule("D13-near-ties", "expert sets differ at near ties", "rounding, amplified by TopK: normal for a MoE", NOTE,
         "how much is it worth? moediag capture train-replay CKPT -o RUN", DIAGNOSIS,
         threshold="any flip, while both engines compute the same function"),
    Rule("D23-routing", "forcing infer's experts removes more than half of the mismatch", "routing carries it", NOTE,
         "routing replay (R3), routers in float32", DIAGNOSIS,
         threshold="share of the mean that replay removes, low end of its interval; 0.5"),
    Rule("D24-not-routing", "forcing infer's experts removes less than a fifth of the mismatch",
         "kernels of experts and attention, head, order of sums", NOTE, "sweep backends: moediag diagnose --turn",
         DIAGNOSIS, threshold="share of the mean that replay removes, high end of its interval; 0.2"),
    Rule("D30-floor", "the engines differ by no more than each from itself", "nothing to mend", NOTE,
         "moediag simulate RUN", DIAGNOSIS, threshold="high end of the mean's interval over the sum of both floors; 1"),
)  # fmt: skip

RULES = {rule.name: rule for rule in _TABLE}
"""Every rule by name, in the order of the ladder."""


def left_out(has: Iterable[str]) -> dict[str, list[str]]:
    """What is not there -> the rules that could not be applied without it; those of the diagnosis apart.

    Example:
        >>> left_out({rule.needs for rule in RULES.values()} - {DISTRIBUTIONS})
        {'whole distributions': ['D31-distribution']}
    """
    missing: dict[str, list[str]] = {}
    for rule in _TABLE:
        if rule.needs not in {DIAGNOSIS, *has}:
            missing.setdefault(rule.needs, []).append(rule.name)
    return missing
