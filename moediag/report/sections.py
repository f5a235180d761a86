"""The sections of a page that are no table of a frame: what was compared, both yardsticks, replay, predictions.

Invariants:
    - a side that was not measured is said; a floor of exactly 0 is called bit-exact;
    - what forcing routes removes is named for what it is, and for the layers that were forced. It is neither routing's
      part of the mismatch nor a bound of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moediag.analysis.flips.explained import METHOD_WORDS
from moediag.analysis.floors import replay_words
from moediag.analysis.metrics import METRICS
from moediag.figures.style import NO_FLOOR
from moediag.numbers import NONE, count, is_number, percent
from moediag.report.blocks import Block, Bullets, Table, interval, number, table
from moediag.report.measures import BIT_EXACT, FORCED, NOT_MEASURED, Summary, lookup, measure
from moediag.report.tables import facts_table
from moediag.report.text import Markdown, code, one_line, plain
from moediag.run.recipes import RECIPES, engine_words

_ARM_FACTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("dtype", ("dtype",)),
    ("how it scored", ("path",)),
    ("batches", ("batching",)),
    ("checkpoint", ("checkpoint.source",)),
    ("device", ("loaded.device",)),
    ("accelerator", ("loaded.accelerator",)),
    ("torch", ("versions.torch",)),
    ("attention", ("loaded.attention_backends", "loaded.attn_implementation")),
    ("experts", ("loaded.experts_kernel", "loaded.experts_implementation")),
    ("router: weight", ("router_dtypes.weight",)),
    ("router: matmul", ("router_dtypes.matmul",)),
    ("router: score", ("router_dtypes.score",)),
    ("router: gate", ("router_dtypes.gate",)),
    ("threads", ("loaded.n_threads",)),
)
"""Words and the names, by engine, under which arm.json keeps the fact."""

_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "ignore_eos")


def model_name(summary: Summary) -> str:
    """The last part of the model's path, else its architecture; of an imported run what it was imported from."""
    model, arms = summary.get("model") or {}, summary.get("arms") or {}
    engines = [arm["engine"] for arm in arms.values() if arm.get("origin") == "imported"]
    step = "" if summary.get("step") is None else f", step {summary['step']}"
    known = model.get("path") or model.get("architecture") or (f"{engines[0]} dump" if engines else "model")
    return one_line(Path(str(known)).name + step) or "model"


def model_facts(summary: Summary) -> dict[str, Any]:
    """The few facts that tell models apart."""
    model = summary.get("model") or {}
    return {key: model.get(key) for key in ("path", "architecture", "n_moe_layers", "n_experts", "top_k")}


def engines_compared(summary: Summary) -> str:
    """The engines of the main pair and how each computed its scores, the infer arm's first."""
    arms: Mapping[str, Any] = summary.get("arms") or {}
    return " against ".join(_engine_words(arms.get(arm) or {}) for arm in summary["main_pair"].split("~"))


def pairs_table(summary: Summary) -> Block:
    """Every pair of arms with its mismatch, the main pair first; empty where the run has that pair only."""
    pairs, arms = summary["pairs"], summary.get("arms") or {}
    if len(pairs) == 1:
        return Markdown("")
    rows: list[list[object]] = []
    for name in sorted(pairs, key=lambda name: name != summary["main_pair"]):
        pair, both = pairs[name], [arms.get(arm) or {} for arm in name.split("~")]
        changes = [f", {arm['change']}" if arm.get("change") and arm["change"] != "engine" else "" for arm in both]
        distance, routing = (pair.get("logp") or {}).get("abs_logp_diff") or {}, pair.get("routing") or {}
        rows.append(
            [
                code(name),
                " against ".join(_engine_words(arm) + change for arm, change in zip(both, changes, strict=True)),
                count(pair.get("n_tokens")),
                number(distance.get("mean")),
                interval(*(distance.get("mean_ci") or (None, None))),
                number(distance.get("p99")),
                number(routing.get("flip_rate"), "share"),
            ]
        )
    header = ["pair", "engines", "tokens", "mean abs logp diff [nat]", "95 %", "p99 [nat]", "flip rate"]
    return table(header, rows, range(2, 7), "Every pair of arms; after a comma what an arm changes of its reference")


def _engine_words(arm: Mapping[str, Any]) -> str:
    return engine_words(str(arm.get("engine") or "engine not recorded"), str(arm.get("path") or ""))


def compared_blocks(summary: Summary) -> list[Block]:
    """Both arms side by side, then model and sampling, then every other pair."""
    arms: Mapping[str, Any] = summary.get("arms") or {}
    names = summary["main_pair"].split("~")
    both = [arms.get(arm) or {} for arm in names]
    rows = [["engine", *map(_engine, both)]]
    rows += [[words, *(_fact(arm, keys) for arm in both)] for words, keys in _ARM_FACTS]
    rows = [row for row in rows if any(cell != NONE for cell in row[1:])]
    blocks: list[Block] = [table(["", *names], rows, caption="The two arms")]
    if summary.get("notes"):
        blocks += [Markdown("What the import noted:"), Bullets(tuple(map(plain, summary["notes"])))]
    return [*blocks, _model_words(summary), *weights_blocks(summary), _sampling_words(summary), pairs_table(summary)]


def weights_blocks(summary: Summary) -> list[Block]:
    """How the weights of two checkpoints differ, by kind of tensor; nothing where both arms loaded the same."""
    weights = summary.get("weights")
    if not weights:
        return []
    words = Markdown(f"**Other weights.** {plain(weights['words'])}.")
    comparison = weights.get("comparison")
    if not comparison:
        return [words]
    rows = [_weights_row(group) for group in (*comparison["groups"], comparison["overall"])]
    header = ["tensors", "equal", "equal after rounding", "differ", "not comparable", "relative error",
              "largest difference", "elements that differ"]  # fmt: skip
    caption = (
        "Weights of the two checkpoints; relative error: norm of the difference over the norm of what train loaded"
    )
    reasons = "; ".join(
        f"{one['n_tensors']:,} {one['reason']} (e.g. {one['example']})" for one in comparison["not_comparable"]
    )
    worst = "; ".join(f"{one['name']} {number(one['relative_error'])}" for one in comparison["worst"][:3])
    lines = [
        f"Largest relative errors: {plain(worst)}." if worst else "",
        f"Not comparable: {plain(reasons)}." if reasons else "",
    ]
    return [words, table(header, rows, range(1, 8), caption), Markdown(" ".join(filter(None, lines)))]


def _weights_row(group: Mapping[str, Any]) -> list[object]:
    n = group["n_tensors"]
    differ = n.get("differs", 0) + n.get("dequantised", 0) + n.get("not_measured", 0)
    counts = (n.get("equal", 0), n.get("equal_after_rounding", 0), differ, n.get("not_comparable", 0))
    return [
        group["group"],
        *(f"{count:,}" for count in counts),
        number(group["relative_error"]),
        number(group["largest"]),
        number(group["share_differing"], "share"),
    ]


def _engine(arm: Mapping[str, Any]) -> Markdown:
    name = str(arm.get("engine") or "")
    version = (arm.get("versions") or {}).get(name) or arm.get("version") or ""
    return code(f"{name} {version}".strip())


def _fact(arm: Mapping[str, Any], names: tuple[str, ...]) -> Markdown:
    found = next((value for name in names if (value := lookup(arm, name)) is not None), None)
    return code(", ".join(map(str, found)) if isinstance(found, list) else "" if found is None else found)


def _model_words(summary: Summary) -> Markdown:
    model = summary.get("model") or {}
    layers = model.get("n_moe_layers")
    routing = (
        f"{layers} MoE layers{f' of {n}' if (n := model.get('n_decoder_layers')) else ''}, top-{model.get('top_k')} of "
        f"{model.get('n_experts')} experts"
        if layers
        else "dense"
    )
    if not (model.get("path") or model.get("architecture")):  # imported
        return Markdown(f"The dump does not name its model{f': {plain(routing)}' if layers else ''}.")
    return Markdown(f"Model {code(model_name(summary))}: {plain(model.get('architecture') or '?')}; {plain(routing)}.")


def _sampling_words(summary: Summary) -> Markdown:
    sampling = summary.get("sampling") or {}
    lines = ", ".join(f"{key} {sampling[key]}" for key in _SAMPLING if sampling.get(key) is not None)
    how = (
        "given completions, scored and not sampled"
        if sampling.get("given_completions")
        else f"sampled by {summary['main_pair'].split('~')[0]}"
    )
    return Markdown(f"Responses: {how}; {plain(lines or 'parameters not recorded')}.")


def provenance_table(summary: Summary) -> Table:
    """Engines, versions, dtypes, sampling, seeds, digests."""
    facts = {key: dict(summary.get(key) or {}) for key in ("model", "sampling", "provenance", "arms")}
    facts["provenance"].pop("frames", None)  # digests of derived files: for the reader of summary.json, not of a page
    return facts_table(facts, "Engines, versions, dtypes, sampling, seeds, digests", n_markdown=36)


NO_FLOOR_WORDS: Final = Markdown(
    f"{NO_FLOOR[:1].upper()}{NO_FLOOR[1:]} in this run: how much of this each engine would show against itself is "
    "not known, see [What these numbers cannot show](#limits)."
)

RULE_WORDS: Final = Markdown(
    "Floor of a mean or of a rate: train's plus infer's (triangle bound); of a tail or a divergence, which obey no "
    "such bound: the larger of the two. A multiple is given only of a floor whose engine differs from itself on most "
    "tokens: else it counts how often two batches happen to be bit-equal. The rounding scale is the same number for "
    "the smallest change of arithmetic there is, one unit in the last place: it says what is ordinary for this model."
)

_SIDES: Final = ("train", "infer")


def has_floor(summary: Summary) -> bool:
    """Whether at least one engine was compared with itself."""
    floors = summary.get("floors") or {}
    return any(floors.get(side) for side in _SIDES)


def floor_words(summary: Summary) -> Markdown:
    """One paragraph for the first screen: what each engine was compared with."""
    if not has_floor(summary):
        return NO_FLOOR_WORDS
    floors: Mapping[str, Any] = summary["floors"]
    rounding = floors.get("rounding")
    scale = f"mean {number(rounding.get('mean'))} nat" if rounding else NOT_MEASURED
    return Markdown(
        f"Floors: {'; '.join(_side_words(side, floors.get(side)) for side in _SIDES)}. Rounding scale: {scale}."
    )


def _side_words(side: str, line: Mapping[str, Any] | None) -> str:
    if not line:
        return f"{side}'s was not measured"
    share = line.get("bit_exact_share")
    exact = f", bit-exact on {number(share, 'share')} of tokens" if is_number(share) else ""
    size = BIT_EXACT if line.get("is_bit_exact") else f"mean {number(line.get('mean'))} nat{exact}"
    return f"{side}'s from {code(line.get('pair'))} ({plain(line.get('what') or '')}): {size}"


def floor_blocks(summary: Summary) -> list[Block]:
    """Every A/A pair in a line, then the rule; a statement where there is none."""
    floors: Mapping[str, Any] = summary.get("floors") or {}
    rows = [_floor_row(f"floor of {side}", floors.get(side)) for side in _SIDES]
    further = (("decode against prefill", "decode_vs_prefill"), ("settings that capture forces", "forced_settings"))
    rows += [_floor_row(what, line) for what, name in further if (line := floors.get(name))]
    rounded = (floors.get("rounding") or {}).get("arm")
    rows += [
        _floor_row("rounding scale" if line.get("arm") == rounded else "noise scale", line)
        for line in floors.get("noise") or ()
    ]
    if not rows[2:] and not any(floors.get(side) for side in _SIDES):
        return [NO_FLOOR_WORDS]
    words = (
        "Each pair compares one engine with itself. Noise scales perturb one engine on purpose: they say how far "
        "harmless arithmetic moves the numbers, and are no floor."
    )
    return [_floor_table(rows), RULE_WORDS, Markdown(words)]


def _floor_table(rows: Sequence[Sequence[object]]) -> Table:
    header = ["what", "pair", "what changes", "mean [nat]", "p99 [nat]", "max [nat]", "bit-exact tokens", "flip rate",
              "n tokens"]  # fmt: skip
    return table(header, rows, range(3, 9), "Each engine against itself: abs(logp_diff) and flips; lower is better")


def _floor_row(what: str, line: Mapping[str, Any] | None) -> list[object]:
    if not line:
        return [what, Markdown(NOT_MEASURED), *[number(None)] * 7]
    values = [number(line.get(name)) for name in ("mean", "p99", "max")]
    if line.get("is_bit_exact"):
        values[0] = Markdown(f"0 ({BIT_EXACT})")
    n = line.get("n_tokens")
    return [
        what,
        code(line.get("pair")),
        line.get("what") or "",
        *values,
        number(line.get("bit_exact_share"), "share"),
        number(line.get("flip_rate"), "share"),
        count(n if is_number(n) else None),
    ]


NO_PART_WORDS: Final = Markdown(
    "This is no bound of routing's part: forcing also removes what flips set off later, and of two independent causes "
    "of equal size the mean loses 29 % with one of them, the variance 50 %."
)

LIMIT_WORDS: Final = Markdown(
    "Forcing fixes which experts run, not how anything is computed: what is left (kernels, attention, head) is not "
    "routing. A flip rate above 0 with all layers forced would say that the replay was not obeyed."
)


def replay_blocks(summary: Summary, origin: str) -> list[Block]:
    """Table and words of the pair infer~train-replay beside infer~train; nothing without that pair.

    Args:
        origin: as :func:`moediag.report.measures.text_origin` gives it.
    """
    pairs: Mapping[str, Summary] = summary.get("pairs") or {}
    observed, replayed = summary.get("observed_pair"), summary.get("replay_pair")
    if observed is None or replayed is None or not {observed, replayed} <= {*pairs}:
        return []
    if summary["main_pair"] != observed:  # infer was given the tokens that another arm sampled
        origin = FORCED
    rows: list[list[object]] = []
    shown = (m for m in METRICS.values() if (m.is_headline or m.name == "abs_logp_diff.max") and m.section != "excess")
    for metric in shown:
        without, with_routes = (measure(metric, pairs[name], origin=origin) for name in (observed, replayed))
        unit, n = without.cells()[5:7]
        rows.append([without.name, unit, *without.cells()[1:3], *with_routes.cells()[1:3], n])
    header = ["number", "unit", observed, "95 %", replayed, "95 %", "n"]
    words = " ".join(filter(None, [_forced_words(summary), _removed_words(summary.get("routing_replay") or {})]))
    return [
        table(
            header, rows, range(2, 7), "The pair as it is, and with infer's experts forced on train; lower is better"
        ),
        Markdown(f"No honest interval exists for a maximum. {words}"),
        LIMIT_WORDS,
    ]


def _forced_words(summary: Summary) -> str:
    """What was forced."""
    arm = (summary.get("replay_pair") or "").partition("~")[2]
    replay: Mapping[str, Any] = ((summary.get("arms") or {}).get(arm) or {}).get("replay") or {}
    if not replay:
        return "The arm's record does not say which layers were forced."
    ends = (summary.get("routing_replay") or {}).get("layers")
    layers = "all MoE layers" if ends is None else f"MoE layers {ends[0]} to {ends[1]} only"
    what = "experts and gate weights" if replay.get("weights") else "experts"
    return f"Infer's {plain(what)} were forced on train in {plain(layers)}."


def _removed_words(replay: Summary) -> str:
    """What forcing removes, and what that does not say."""
    lines = [f"**{plain(words[:1].upper() + words[1:])}.**" for words in replay_words(replay)]
    mean = (replay.get("removed") or {}).get("abs_logp_diff.mean") or {}
    if not lines:
        return "There is no mismatch whose part could be named."
    if replay.get("is_broken"):
        return lines[0]
    low, high = mean.get("share_ci") or (None, None)
    known = f"of the mean, 95 %: {interval(low, high, 'share', str(mean.get('note') or ''))}"
    n = f"{count(replay.get('n_tokens'), 'token')} of {count(replay.get('n_prompts'), 'prompt')}"
    worse = " A negative share: with infer's experts the arms differ more." if mean["share"] < 0 else ""
    return f"{lines[0]} ({known}; {n}; the same tokens with and without.){worse} {NO_PART_WORDS}"


def prediction_words(summary: Summary) -> Markdown:
    """How much of the flips near ties explain, in a sentence; empty where nothing could be predicted."""
    explained = (summary.get("predicted_flips") or {}).get("explained")
    if not explained or not is_number(explained.get("explained")):
        return Markdown("")
    low, high = explained.get("gap_ci") or (None, None)
    error, chance = (percent(explained.get(name)) for name in ("calibration_error", "calibration_error_expected"))
    return Markdown(
        f"Near ties under the pair's own noise explain **{percent(explained['explained'])}** of choices flipping, "
        f"{percent(explained.get('observed'))} did (gap {number(explained.get('gap'), 'share')}, 95 %: "
        f"{interval(low, high, 'share')}); choice by choice the prediction is off by {error}, by chance alone {chance} "
        f"(from {plain(METHOD_WORDS.get(str(explained.get('method')), explained.get('method')))}, "
        f"{count(explained.get('n_choices'), 'choice')}).{plain(_sentence(explained.get('note')))}"
    )


def _sentence(note: object) -> str:
    """What the method leaves out, as a sentence of its own beside the gap."""
    return f" {str(note)[:1].upper()}{str(note)[1:]}." if note else ""


def router_table(summary: Summary) -> Block:
    """Flip rates of infer against train with another router arithmetic, measured; empty without such an arm."""
    pairs: Mapping[str, Any] = summary["pairs"]
    rows = []
    infer = (summary.get("observed_pair") or "").partition("~")[0]
    for arm, facts in (summary.get("arms") or {}).items():
        if facts.get("change") != "router-dtype":
            continue
        words = RECIPES[facts["recipe"]].words if facts.get("recipe") in RECIPES else facts["change"]
        for name in (f"{infer}~{arm}", f"{arm}~{facts.get('variant_of')}"):
            found = (pairs.get(name) or {}).get("routing") or {}
            if is_number(found.get("flip_rate")):
                low, high = found.get("flip_rate_ci") or (None, None)
                cells = number(found["flip_rate"], "share"), interval(low, high, "share"), count(found.get("n_choices"))
                rows.append([code(name), words, *cells])
    if not rows:
        return Markdown("")
    caption = "Flip rate with another router arithmetic on the train side, measured [share of n]; lower is better"
    return table(["pair", "what differs", "flip rate", "95 %", "n choices"], rows, range(2, 5), caption)
