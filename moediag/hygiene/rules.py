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
VERSIONS = "weight versions"
BOTH_VERSIONS = "weight versions beside log-probabilities of both sides"
"""What a rule may need, in words that follow "no"."""
DIAGNOSIS = "diagnosis"
SERIES = "series over training steps (moediag trend)"
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
        threshold: the statistic, its limit, and where the limit comes from; (1e-6) is the chance that the rule fires on
            a healthy capture (:data:`~moediag.hygiene.chance.ALPHA`).
        companions: other rules that the same fault raises at error level, by its nature.
    """

    name: str
    symptom: str
    cause: str
    level: str
    next_check: str
    needs: str
    threshold: str
    companions: tuple[str, ...] = ()


_TABLE = (
    Rule("damaged", "a file is missing, changed or of another format",
         "an interrupted copy, a full disk or an edit", ERROR,
         "do what the message says; else delete the file and make it again", FILES,
         threshold="bytes against the file's digest, and its format; any difference"),
    Rule("missing-shard", "a shard of an arm or of the token table is not there",
         "the capture was interrupted", ERROR, "run the same capture again: it resumes", FILES,
         threshold="shards that are not there; any: a part of an arm is not analysed"),
    Rule("no-arm", "a run without any arm", "nothing was captured", ERROR, "moediag capture infer", FILES,
         threshold="arms of the run; none"),
    Rule("completeness", "token rows or (token, layer) without expert ids; arrays of another shape than the model's",
         "another code path bypassed the capture (graphs, caches, padding)", ERROR,
         "see which rows; capture eagerly, without prefix cache", IDS,
         threshold="(token, layer) without ids, the last row of a sampled sequence apart; any: the tokens behind it "
         "would be counted without their routing"),
    Rule("token-identity", "an arm scored other tokens than the token table holds",
         "arms of two runs were mixed", ERROR, "delete the arm and capture it again", FILES,
         threshold="digest of the tokens that an arm scored; any difference from the token table's"),
    Rule("D01-token-lag", "the two logp streams correlate best at a token lag other than 0",
         "off by one in one side's log-probabilities", ERROR, "print 5 tokens with both streams, shifted", BOTH_LOGPS,
         companions=("D31-zero-logp",),
         threshold="correlation at lags -3 to 3; above that at 0 by more than its jackknife error explains (1e-6 "
         "per capture)"),
    Rule("D01-sequence-lag", "sequences whose two logp streams go together at a lag of their own, not at 0",
         "columns of one side begin behind each sequence's prompt, those of the other at one column of the batch (its "
         "padding, its longest or common prompt)", ERROR,
         "align by the token's position in its sequence; compare the shift with the prompt's length", BOTH_LOGPS,
         companions=("D01-other-sequence", "D31-zero-logp"),
         threshold="rank correlation within a sequence at lags up to 64 of at least 20 different values, where that at "
         "0 is below 0.5; 0.8 (0.99 is healthy), beyond chance over all lags and sequences (1e-6)"),
    Rule("D01-other-sequence", "sequences whose two logp streams are unrelated, though they differ by far",
         "one side's log-probabilities are another sequence's (batch order, a wrong join), or another model's", ERROR,
         "join by sequence id, not by order; print 5 tokens of such a sequence with both streams", BOTH_LOGPS,
         companions=("D31-zero-logp",),
         threshold="correlation r within sequences, and share of tokens beyond 0.2 nat (ten times the mean of "
         "published pairs); over all r below 0.4 (0.99 is healthy) beyond chance (1e-6) and the share above 0.1; or "
         "in one of at least 20 tokens r below 3 standard errors and the share above 0.1 and three times the lower "
         "quartile of sequences, beyond chance (1e-6)"),
    Rule("D01-row-lag", "the two sides' expert sets agree best at a row offset other than 0",
         "off by one in one side's routing rows", ERROR, "print 5 rows of both sides; rows belong to consumed tokens",
         BOTH_IDS,
         threshold="share of experts in common at row offsets -3 to 3; above that at 0 beyond chance (1e-6), each "
         "row its own control"),
    Rule("D02-layer-lag", "the two sides' expert sets agree best at a layer offset other than 0, and barely at 0",
         "dense first layers counted on one side, or a pipeline stage's offset", ERROR,
         "shift one side's layers by the offset named; compare the layer maps", BOTH_IDS,
         threshold="share of experts in common at layer offsets up to 8, less what popularity gives; at least twice "
         "that at 0, beyond chance (1e-6)"),
    Rule("D02-layer-at-chance", "layers in which the two sides agree no more than by chance, while most layers agree",
         "the record is another router's (a draft or MTP head, two layers of one number); if no later layer agrees "
         "again, hidden states differ from there on", ERROR,
         "compare the layer maps; capture without speculative decoding", BOTH_IDS,
         companions=("D02-twin-layers",),
         threshold="share of experts in common, beyond popularity; below a quarter of the median layer's (of two "
         "layers: the first, where the second has more than half), beyond chance (1e-6)"),
    Rule("D02-twin-layers", "two layers of one side with the same expert sets in every row",
         "two layers wrote to one slot (a draft or MTP head, a layer number given twice)", ERROR,
         "compare the layer maps; capture without speculative decoding", IDS,
         companions=("D02-layer-at-chance",),
         threshold="rows in which two layers' sets differ; none of so many that popularity would leave none less "
         "than once in 1e6 (by it, layers differ half as often as neighbouring rows)"),
    Rule("D03-duplicate-ids", "an expert named twice in one row", "rows overwritten, ids packed or cast wrongly", ERROR,
         "look at those rows' block structure; zero experts written as expert 0: give --zero-experts", IDS,
         companions=("D03-all-zero",),
         threshold="rows with an expert twice; any: no TopK gives one (expert 0 where the model has zero experts "
         "apart)"),
    Rule("D03-all-zero", "rows of nothing but expert 0", "a zero-filled buffer: the rows were never written", ERROR,
         "capture eagerly; compare which rows with the batch's padding", IDS,
         threshold="rows of expert 0 alone in all layers, K > 1; any: no TopK gives one"),
    Rule("D03-never-bound", "every row of every layer is expert 0",
         "the capture was never bound to the model's routers: nothing was recorded at all", ERROR,
         "look for a warning of the engine at its start; do all MoE layers have a number?", IDS,
         threshold="share of (token, layer) of expert 0 alone, K > 1; 1"),
    Rule("D03-zero-layer", "layers that are expert 0 in every row, and no dense layers' slots",
         "another pipeline rank's layers, or layers that the capture was not bound to", ERROR,
         "gather over pipeline ranks; compare the layer maps", IDS,
         threshold="share of a layer's rows of expert 0 alone, K > 1; 1 in some layers, not in all"),
    Rule("D03-dense-slot", "a few layers of a dump are expert 0 in every row",
         "normal: slots of dense layers, which have no router", NOTE,
         "nothing; if these layers do have experts, they were never captured", FOREIGN,
         threshold="share of a layer's rows of expert 0 alone, K > 1; 1 in up to 4 layers side by side, on both "
         "sides of equal depth: published models have no more"),
    Rule("D03-partial-row", "-1 beside real ids in one row", "a rank kept only its own experts, or a short TopK", ERROR,
         "gather over expert-parallel ranks before storing", IDS,
         threshold="rows with -1 beside ids; any: TopK gives K ids, or the row is not there"),
    Rule("D03-sentinel", "rows that hold 255 more than once", "-1 (not routed) stored as an unsigned byte", ERROR,
         "read 255 as -1, or store ids in a signed or wider type", IDS,
         threshold="rows with 255 in two slots (K = 1: one, outside 0 .. E-1); any: no TopK gives one"),
    Rule("D03-id-range", "expert ids outside 0 .. E-1",
         "zero experts (LongCat, zero_expert_num: ids from E on are no bug), physical ids under expert load "
         "balancing, or a fused shared expert", ERROR,
         "zero experts: give --num-experts and --zero-experts; else capture logical ids, leave out the shared "
         "expert's slot",
         N_EXPERTS,
         threshold="ids outside 0 .. E-1; any"),
    Rule("D04-filler-rows", "rows equal to experts 0..K-1 (or the last K), of ids that count on from slot to slot, or "
         "tied throughout, in all layers at once",
         "a trainer's own filler for tokens that no engine routed (0..K-1: NeMo-RL, SkyRL; counting on: slime), or "
         "padding or zero logits reached TopK", ERROR,
         "drop these rows; look at which tokens they are (tool output, padding)", IDS,
         threshold="rows of the pattern in all layers; more than the geometric mean of its rates by layer to the "
         "power min(L / 2, 3) explains, or with scores the product of the rates of ties (1e-6)"),
    Rule("D05-stale-rows", "identical routing in all layers for different tokens of a sequence, at one distance",
         "a buffer that was not refreshed (CUDA graph replay, reused chunk)", ERROR, "capture eagerly", IDS,
         companions=("D01-row-lag",),
         threshold="rows like another token's at one distance up to 64; with scores more than other distances "
         "explain, ten times the odds allowed, else more than the rates of neighbours by layer (1e-6)"),
    Rule("D06-last-row", "exactly the last token of every sequence has no routing row",
         "normal: a sampled last token is never consumed", NOTE, "nothing; the rows behind scored tokens are there",
         IDS,
         threshold="last rows without ids, in an arm that did not sample; all of them, and no other row"),
    Rule("D07-rank-local", "the rows present are 1/n of each sequence, strided or one block",
         "a rank stored only its own share of the tokens", ERROR, "gather over tensor- or sequence-parallel ranks",
         IDS, companions=("completeness",),
         threshold="share of rows that fit one rank's stride, or of sequences that fit its block, of 2 to 16 ranks; "
         "0.95: a batch's end may cut the rest"),
    Rule("D08-cached-prefix", "rows are missing only at the beginning of sequences, at a shared prefix or in blocks",
         "prefix cache: cached tokens are not computed again", WARNING,
         "capture without prefix cache (enable_prefix_caching=False) or with prompt_logprobs", IDS,
         companions=("completeness",),
         threshold="share of missing rows at beginnings of sequences, and of those prefixes that another sequence "
         "has (else lengths that a block of 8 or more divides); 0.95: a batch's end may cut the rest"),
    Rule("D09-mean-ratio", "the mean of exp(logp_train - logp_infer) is not 1",
         "infer sampled from another distribution than it scores (top-p, top-k, temperature, processed logprobs on one "
         "side), or the text is forced", WARNING,
         "sample with neutral parameters; compare the logprobs mode of both sides", FOREIGN,
         threshold="mean of exp(logp_train - logp_infer); away from 1, its expectation, beyond chance (1e-6) and by "
         "1e-3: logps rounded to bfloat16 bias it by less"),
    Rule("D10-temperature", "one side's logps are spread wider than the other's, beyond what noise between them gives",
         "a temperature on one side only", ERROR,
         "sweep a temperature on that side for the least difference; raw or processed logprobs?", BOTH_LOGPS,
         threshold="ratio of standard deviations times r^2, twice what noise on one side gives in logs; above 1.03 "
         "beyond chance (1e-6): a temperature of 0.9 gives 1.04, a healthy pair gave 1.0007"),
    Rule("D10-sampling-temperature", "tokens that were sampled at a temperature other than 1",
         "normal where it was requested; but log-probabilities may be taken before the temperature on one side (raw) "
         "and after it on the other (processed)", WARNING,
         "take both sides' log-probabilities after the temperature; raw on both sides, k1 and k3 are no KL",
         TEMPERATURES,
         threshold="sampling temperature of each token; any but 1"),
    Rule("D11-sampling-parameters", "an engine sampled with other parameters than were requested",
         "the checkpoint's generation_config.json, or a default of the engine", ERROR,
         'generation_config="vllm", or request every parameter by name', FILES,
         threshold="sampling parameters that the engine's scheduler got, against those requested (neutral where none "
         "was); any difference"),
    Rule("D14-other-rule", "an engine's routing rule is not the checkpoint's", "the engine ignores an option of the "
         "router", NOTE, "ratio of weight sums; another engine version", FILES,
         threshold="the engine's routing rule, as proved when it was loaded, against the checkpoint's config; any "
         "difference"),
    Rule("D14-gate-factor", "same experts on both sides, gate weights off by a constant or not normalised on one side",
         "norm_topk_prob, routed_scaling_factor or a biased gate differ", WARNING, "compare weight sums by layer",
         BOTH_GATES,
         threshold="log ratio of weight sums, same experts; beyond 2^-6 (four roundings to bfloat16) with a spread "
         "below a quarter of it, or with sums constant within 2^-8 on one side and spread beyond 2^-5 on the other"),
    Rule("D16-exact-ties", "many exact ties at the TopK border", "router logits in bf16", NOTE,
         "count ties apart; try an fp32 gate", MARGINS,
         threshold="share of rows with margin 0; 0.02: routers that compute in bfloat16 gave up to 0.01, logits "
         "stored in it 0.059"),
    Rule("D28-same-bits", "every log-probability is the same on both sides, bit for bit",
         "a copy: one side was never computed; engines that agree bit for bit exist, but are built for it", WARNING,
         "recompute a few sequences on the train side", FOREIGN,
         threshold="share of logps, zeros apart, equal bit for bit; 1, of at least 20"),
    Rule("D31-nan-logp", "response tokens without log-probability", "padding, truncation or a cache bug", ERROR,
         "count them by position; never average over them", LOGPS,
         threshold="response tokens without a number; any"),
    Rule("D31-impossible-logp", "log-probabilities of -inf or above 0", "masked vocabulary, processed logprobs or "
         "overflow", ERROR, "use raw logprobs; look at those tokens", LOGPS,
         threshold="logps of -inf, or above 0 by more than rounding of a float32 logit (1e-4 nat); any"),
    Rule("D31-rounded-logp", "log-probabilities above 0 by no more than rounding", "logit - logsumexp, rounded up",
         NOTE, "nothing; they count as 0", LOGPS,
         threshold="logps above 0 by up to 1e-4 nat: a float32 logit below 2,048 is off by 6.1e-5; any"),
    Rule("D31-zero-logp", "log-probabilities of exactly 0 that the row's entropy or the other side contradicts",
         "zero-filled padding or truncation", ERROR, "look at where in the response they are; drop them", LOGPS,
         threshold="zeros beside more than 1.02 nat of entropy (the most that rounding to 0 leaves in bfloat16), "
         "any; or beside less than -1 nat on the other side, more than 0.04 (R3's collapse mark) and twice what "
         "near-certain tokens show, beyond chance (1e-6); or in blocks on both sides at the ends of sequences, "
         "longer than certain tokens make"),
    Rule("rounded-logp", "every log-probability lies on a coarse grid", "cast to 16 bits, or printed with few "
         "decimals, before it was kept", WARNING, "keep log-probabilities in float32: ratios of few 1e-3 are made of "
         "rounding", LOGPS, companions=("D29-head", "other-function", "rounds-worse"),
         threshold="distinct values off the grid of bfloat16 or float16 (rollouts: of so many decimals, too); none of "
         "at least 20, each of which lies on it by chance once in 65,536 or 8,192"),
    Rule("D31-certain-tokens", "log-probabilities of exactly 0 that no entropy contradicts",
         "near-certain tokens, rounded to 0", NOTE, "nothing; means over them are small by nature", LOGPS,
         threshold="logps of exactly 0 that no entropy contradicts; any"),
    Rule("D31-entropy", "entropies missing beside scored tokens, or below 0", "truncated top-k entropies, or padding",
         WARNING, "recompute entropy from full logits", ENTROPIES,
         threshold="entropies that are not finite, beside some that are, or below -1e-3 nat (half precision rounds "
         "sum of p log p by that); any"),
    Rule("D31-distribution", "whole next-token distributions that are of other tokens, do not sum to 1, or give "
         "their token another logp than the arm stored",
         "shards of two captures were mixed, or a truncated vocabulary", ERROR,
         "delete the shard and run the same capture again", DISTRIBUTIONS,
         threshold="tokens that stored distributions are of, log of their sum, and their token's logp less the "
         "arm's; other tokens, or more than 1e-4 nat: a float32 log-softmax over 2^18 tokens rounds by 2e-5"),
    Rule("D32-token-ids", "token ids differ between the sides", "re-tokenisation, or another chat template", ERROR,
         "pass token ids, never text, between engines", BOTH_TOKENS,
         threshold="token ids at one position; any difference"),
    Rule("D34-flat-router", "a layer's router scores all experts the same in every row",
         "router weights zero (a quantisation ignore list)", ERROR, "lint the router weights of those layers", IDS,
         companions=("D04-filler-rows", "D02-layer-at-chance"),
         threshold="rows of a layer whose router logits are within 1e-3 (entropy then is log E to 1e-7), whose "
         "weights all tie, or that are experts 0..K-1 where few such layers arise by chance (1e-6); all of at least "
         "20"),
    Rule("gate-not-finite", "gate weights that are NaN, infinite or negative in routed rows", "overflow, or a buffer "
         "never written", ERROR, "look at those rows' router logits", GATES,
         threshold="gate weights that are not finite, or negative; any"),
    Rule("gate-sum", "gate weights that do not sum to a constant although the model renormalises",
         "renormalisation left out, or weights of another row", WARNING, "print the sums; compare norm_topk_prob",
         GATES,
         threshold="sums of weights, in steps of K + 1 roundings to bfloat16; any beyond the step beside the usual "
         "one"),
    Rule("margin-not-finite", "margins that are NaN, infinite or (choice score) negative in routed rows",
         "scores of another row, or computed after rounding", ERROR, "recompute from full router logits", MARGINS,
         threshold="margins that are not finite, or negative; any"),
    Rule("margin-logits", "logit margins that the stored router logits do not give",
         "ids, margins or logits of different rows or layers", ERROR, "print one row: logits, ids, margin", LOGITS,
         threshold="margin stored less that of the stored logits; two roundings to bfloat16 of the row's largest "
         "logit"),
    Rule("logits-not-finite", "router logits that are NaN or infinite in routed rows", "overflow, or masked experts",
         ERROR, "look at those rows", LOGITS,
         threshold="router logits that are not finite; any"),
    Rule("softmaxed-logits", "stored router logits are probabilities: none negative, rows sum to 1",
         "the engine returns softmax output under the name router_logits", ERROR,
         "hook the router before its softmax", LOGITS,
         threshold="rows of router logits that are none negative and sum to 1 within 2^-7, twice what bfloat16 "
         "rounds; all of a layer, at least 20"),
    # A series over training steps: what moediag trend says
    Rule("D25-first-update", "fine at the first step, and after an update a level or a rise that is no rounding",
         "the weight sync: transfer dtype, sharding, tensors left out or renamed", WARNING,
         "compare fingerprints of both sides' weights before and after the weight sync (transfer dtype, sharding), and "
         "repeat the steps with lr = 0: if it comes back, the sync or the engine's state is at fault, not the learning",
         SERIES, threshold="a metric in nat, or its rise per step; 1 nat (20 times the mean past which IcePop's run "
         "failed), or 10 times per step with intervals apart and above the published start (published mismatches "
         "double within 20 steps)"),
    Rule("D27-lr-zero", "the mismatch grows or jumps with a learning rate of 0",
         "not the learning: the weight sync destroys weights, or the engine keeps a state (caches)", ERROR,
         "compare fingerprints of the rollout engine's weights at both steps; restart the engine: does it reset?",
         SERIES, threshold="D25-first-update at learning rate 0, or Kendall's rank correlation with the step; 1 in "
         "1,000 by chance (ours: a training has some tens of steps)"),
    Rule("D26-grows-resets", "the mismatch grows over the steps and falls back when the rollout engine is restarted",
         "state of the engine: a KV or prefix cache of older weights, or memory that is not reset", ERROR,
         "reset the prefix cache at every weight update; compare tokens with and without cached prefix", SERIES,
         threshold="changes at restarts against all others (Mann-Whitney, exact); 1 in 1,000 by chance, and half of "
         "the growth lost (ours)"),
    Rule("beyond-rounding", "beyond rounding from the first step on",
         "no drift: other weights, other tokens, or another sampling than what is scored", WARNING,
         "check that both sides hold the same weights (fingerprints; unsharded against sharded), score the same tokens "
         "(rules D32-token-ids and D01-token-lag) and sample from what they score (rule D10-temperature)", SERIES,
         threshold="a metric in nat; 1 (35 times the highest mean abs logp diff of a healthy stack)"),
    Rule("start-level", "the first step is far above where healthy training is published to start",
         "no drift of training: sampling parameters, precision, or tokens of the two sides", WARNING,
         "compare the two sides at that step first: tokens, sampling parameters, precision", SERIES,
         threshold="the first value over the highest published start (named with its source); 3, as healthy stacks are "
         "a factor of 2.5 apart, and its interval above it"),
    Rule("infinite-metric", "a metric is infinite", "a ratio beyond float64, or a token that one side calls impossible",
         WARNING, "find those tokens before anything else", SERIES, threshold="a value; infinite"),
    # Tokens of a table or of a pair: estimates and levels
    Rule("constant-offset", "one side's log-probabilities are offset by about the same in every token",
         "normalised over another vocabulary (masked, truncated or padded logits), or a constant left in the "
         "log-sum-exp of one side", ERROR,
         "sum the probabilities of one whole distribution on each side: which is not 1?", BOTH_LOGPS,
         threshold="mean of logp_train - logp_infer over its standard deviation; 3, by more than its error (1 in a "
         "million): under honest sampling the mean is minus half the variance, so 3 would need a deviation of 6 nat"),
    Rule("regime-change", "inside sequences the level of abs(logp_diff) changes sharply at one place",
         "weights updated in mid-rollout (segments of two versions), or a cache, chunk or window that ends there",
         WARNING, "which weight version, chunk or cached prefix begins there? compare the places over sequences",
         FOREIGN,
         threshold="largest partial sum of which side of its median abs(logp_diff) / (1 - p_infer) is on; "
         "1 in a million over all sequences (Kolmogorov), and as rarely a step between lines through both sides, so "
         "that no slow rise counts; a level 3 times as high beside it (ours), and above 0.028 nat, the highest mean "
         "of a healthy stack (GLM-4.5-Air). False alarms in 8,000 healthy tables of 64 x 400 tokens (noise of normal "
         "and heavy tails, rising up to fivefold, in clusters, of unlike sequences) and 346 captured pairs: none "
         "[0, 5e-4]"),
    Rule("mixed-versions", "sequences whose tokens were sampled by more than one weight version",
         "normal for interrupted (partial) rollouts: a generation was resumed after a weight update", NOTE,
         "score each segment, and replay its routing rows, with its own version's weights or leave the earlier "
         "segments out; rows of the prefix that were computed again at the resume are the new version's", VERSIONS,
         threshold="response tokens of another weight version than their sequence's last; any"),
    Rule("stale-segments", "tokens of earlier weight versions differ more than those of their sequences' last, or less",
         "one side's log-probabilities are of one version throughout, the other's change with the weights", WARNING,
         "which weights scored the train side? score each segment with the version that sampled it, or correct for it",
         BOTH_VERSIONS, companions=("regime-change",),
         threshold="mean abs(logp_diff) / (1 - p_infer) before a sequence's last version over that in it, by "
         "sequences with both; 1.5 either way, beyond chance (1e-6) (ours: halves of 295 healthy captured "
         "pairs were 1.1 apart in the median, none by more than this)"),
    Rule("no-sequences", "a table that does not say which sequence its tokens belong to",
         "two columns of log-probabilities and nothing else", NOTE,
         "add seq_id and position: shifts, mixed sequences and intervals need them", FOREIGN,
         threshold="columns seq_id and position; both missing"),
    Rule("not-estimable", "chi2 below 0: an estimate that its own sample cannot carry",
         "a mean of ratios whose large ones are not among these sequences: products over long responses", NOTE,
         "a token-level or geometric estimate, or more and shorter sequences; no bound on the mismatch", FOREIGN,
         threshold="chi2 of ratios, high end of its interval where there is one; 0, as the mean of squares of a "
         "variable of mean 1 is at least 1"),
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
         threshold="ratio of the engines' distances from their own float32, of a typical token or a router's typical "
         "margin, whole interval; 1.5: healthy pairs were measured at 0.8 to 1.25"),
    Rule("rollout-settings", "both engines are near the function, and the rollouts are farther from train than the two "
         "distances allow", "what rollouts alone run with: sampling, prefix cache, graphs, kernels", WARNING,
         "turn the rollouts' settings off one by one: moediag diagnose CKPT -o RUN --turn OPTION=VALUE", DIAGNOSIS,
         threshold=f"mean abs(logp_diff) over the sum of both distances, low end of its interval; {FAR_WORDS}"),
    Rule("D21-few-sequences", "a few sequences differ by far more than the others do",
         "a fault that depends on the prompt: a wrong token, another sequence's rows, state left behind, a length",
         WARNING,
         "the worst sequences alone, in either engine", DIAGNOSIS,
         threshold="in float32, sequences with rows that differ (as the other rules of float32 count them): fewer than "
         "half, and none in the others; else mean abs(logp_diff) of a sequence over the median sequence's; 30, and no "
         "more than 5 % of sequences: of healthy pairs none was beyond 12"),
    Rule("D28-other-weights", "the two arms loaded other weights", "two checkpoints, steps or quantisations", WARNING,
         "one checkpoint in both engines tells the engines' part", DIAGNOSIS,
         threshold="digests of the tensors that the arms loaded; any that differs"),
    Rule("D35-replay-without-effect", "forcing infer's experts makes the mismatch larger",
         "the forced experts are of other rows or layers", WARNING, "compare rows and layers of the forced experts",
         DIAGNOSIS, threshold="mean abs(logp_diff) with replay over without; 10: over 13 families it was at most 1.1"),
    Rule("D13-near-ties", "expert sets differ at near ties", "rounding, amplified by TopK: normal for a MoE", NOTE,
         "how much is it worth? moediag capture train-replay CKPT -o RUN", DIAGNOSIS,
         threshold="(token, layer) with other expert sets, while both engines compute the same function; any"),
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
