"""What was compared and how it was made: engines side by side, model, sampling, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moediag.figures.numbers import NONE, count
from moediag.report.blocks import Block, Table, interval, number, table
from moediag.report.measures import Summary, lookup
from moediag.report.pairs import main_pair_name
from moediag.report.tables import facts_table
from moediag.report.text import Markdown, code, one_line, plain
from moediag.run.recipes import engine_words

_N_MARKDOWN: Final = 40

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
    """The last part of the model's path, else its architecture."""
    model = summary.get("model") or {}
    return one_line(Path(str(model.get("path") or model.get("architecture") or "model")).name) or "model"


def model_facts(summary: Summary) -> dict[str, Any]:
    """The few facts that tell models apart."""
    model = summary.get("model") or {}
    return {key: model.get(key) for key in ("path", "architecture", "n_moe_layers", "n_experts", "top_k")}


def engines_compared(summary: Summary) -> str:
    """The engines of the main pair and how each computed its scores, the infer arm's first."""
    arms: Mapping[str, Any] = summary.get("arms") or {}
    return " against ".join(_engine_words(arms.get(arm) or {}) for arm in main_pair_name(summary).split("~"))


def pairs_table(summary: Summary) -> Block:
    """Every pair of arms with its mismatch, the main pair first; empty where the run has that pair only."""
    pairs, arms = summary["pairs"], summary.get("arms") or {}
    if len(pairs) == 1:
        return Markdown("")
    rows: list[list[object]] = []
    for name in sorted(pairs, key=lambda name: name != main_pair_name(summary)):
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
    names = main_pair_name(summary).split("~")
    both = [arms.get(arm) or {} for arm in names]
    rows = [["engine", *map(_engine, both)]]
    rows += [[words, *(_fact(arm, keys) for arm in both)] for words, keys in _ARM_FACTS]
    rows = [row for row in rows if any(cell != NONE for cell in row[1:])]
    blocks: list[Block] = [table(["", *names], rows, caption="The two arms")]
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
    said = [
        f"Largest relative errors: {plain(worst)}." if worst else "",
        f"Not comparable: {plain(reasons)}." if reasons else "",
    ]
    return [words, table(header, rows, range(1, 8), caption), Markdown(" ".join(filter(None, said)))]


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
        f"{layers} MoE layers of {model.get('n_decoder_layers') or '?'}, top-{model.get('top_k')} of "
        f"{model.get('n_experts')} experts"
        if layers
        else "dense"
    )
    return Markdown(f"Model {code(model_name(summary))}: {plain(model.get('architecture') or '?')}; {plain(routing)}.")


def _sampling_words(summary: Summary) -> Markdown:
    sampling = summary.get("sampling") or {}
    said = ", ".join(f"{key} {sampling[key]}" for key in _SAMPLING if sampling.get(key) is not None)
    how = (
        "given completions, scored and not sampled"
        if sampling.get("given_completions")
        else f"sampled by {main_pair_name(summary).split('~')[0]}"
    )
    return Markdown(f"Responses: {how}; {plain(said or 'parameters not recorded')}.")


def provenance_table(summary: Summary) -> Table:
    """Engines, versions, dtypes, sampling, seeds, digests."""
    facts = {key: dict(summary.get(key) or {}) for key in ("model", "sampling", "provenance", "arms")}
    facts["provenance"].pop("frames", None)  # digests of derived files: for the reader of summary.json, not of a page
    return facts_table(facts, "Engines, versions, dtypes, sampling, seeds, digests", _N_MARKDOWN)
