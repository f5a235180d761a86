"""report.md: the page a run or a comparison leaves behind, readable on a code host.

Invariant: the same summary, frames and figure paths give the same text; there is no date in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from moediag.errors import MoediagError
from moediag.figures.numbers import NONE, count, times
from moediag.figures.style import NO_FLOOR, first_of_each_kind
from moediag.notation import SCHEMA_VERSION
from moediag.report import tables
from moediag.report.headline import (
    Frames,
    Measured,
    Summary,
    headline,
    logp_measures,
    logp_rows,
    margin_words,
    measured_table,
    routing_measures,
    sampling_words,
    slope_words,
    text_origin,
    verdict,
)
from moediag.report.pairs import MAIN_PAIR
from moediag.report.replay import replay_section
from moediag.report.tables import Markdown, code, folded, plain

REGENERATE: Final = ("moediag analyze RUN", "moediag report RUN")

DENSE: Final = "dense"
"""Why a run has no routing numbers."""

REORDER_WORDS: Final = Markdown(
    "*Reordered* is the same set in another order: harmless, since gate weights go with their ids. A rate near 100 % "
    "only says that one engine does not sort its experts by score (vLLM's CPU router does not)."
)

_MANY_LAYERS: Final = 16  # a longer table is folded: the picture above says the same

FIGURE_WORDS: Final = {
    "figure1": "abs(logp_diff): body and tail, Figure-1-style",
    "agreement_by_depth": "agreement of expert sets by depth",
    "margins": "router margins of flipped and kept choices",
    "position_drift": "mismatch by position in the response",
}


def run_report(
    summary: Summary,
    frames: Frames,
    figures: Sequence[Path],
    *,
    regenerate: Sequence[str] = REGENERATE,
) -> str:
    """The report of one run as markdown.

    Args:
        summary: the run's summary.json, read.
        frames: frame name -> frame; a missing frame leaves its section with a statement.
        figures: what ``draw_run_figures`` returned; the report stands beside their folder.
        regenerate: the commands that make this page again.

    Raises:
        MoediagError: the summary has another schema version or no pair.
    """
    pair, origin = _main_pair(summary), text_origin(summary)
    context = {
        "title": _model_name(summary),
        "summary": summary,
        "pair_name": MAIN_PAIR,
        "pair": pair,
        "verdict": verdict(pair, frames, origin),
        "headline": measured_table(headline(pair, frames, origin)),
        "logp": measured_table(logp_measures(pair, frames, origin)),
        "replay": replay_section(summary, origin),
        "sections": _sections(pair, frames),
        "sampling": sampling_words(summary),
        "margin_words": margin_words(frames),
        "slope_words": slope_words(pair),
        "is_moe": bool(pair.get("routing")),
        **_shared(figures, regenerate),
        "provenance": _provenance(summary),
    }
    return _environment().get_template("run.md.j2").render(context)


def comparison_report(
    summary: Summary,
    frames: Mapping[str, Frames],
    figures: Sequence[Path],
    *,
    regenerate: Sequence[str] = ("moediag compare RUN RUN ... -o DIR",),
) -> str:
    """The report of several runs side by side as markdown.

    Args:
        summary: ``{"schema_version", "runs": {label: run summary}, "ratios": {...}}``.
        frames: label -> (frame name -> frame).
        figures: what ``draw_comparison_figures`` returned; the report stands beside their folder.
        regenerate: the commands that make this page again.

    Raises:
        MoediagError: a summary has another schema version, or no run or pair.
    """
    _check_version(summary)
    runs: Mapping[str, Summary] = summary.get("runs") or {}
    if not runs:
        raise MoediagError("a comparison wants a summary with at least one entry under runs, found none")
    pairs = {label: _main_pair(run) for label, run in runs.items()}
    origins = {label: text_origin(run) for label, run in runs.items()}
    joint = _joint_origin(origins.values())
    measures = {label: _measures(pair, frames.get(label, {}), joint) for label, pair in pairs.items()}
    context = {
        "labels": list(runs),
        "verdicts": [(label, verdict(pair, frames.get(label, {}), origins[label])) for label, pair in pairs.items()],
        "cautions": [(label, sampling_words(run)) for label, run in runs.items() if origins[label]],
        "same_prompts": summary.get("same_prompts") is not False,
        "headline": _side_by_side(pairs, measures),
        "intervals": _interval_table(measures),
        "agreement": {
            label: _agreement(frames[label]) for label, pair in pairs.items() if pair.get("routing") and label in frames
        },
        "dense": [label for label, pair in pairs.items() if not pair.get("routing")],
        "models": tables.facts_table({label: _model_facts(run) for label, run in runs.items()}),
        **_shared(figures, regenerate),
        "provenance": "\n\n".join(f"### {plain(label)}\n\n{_provenance(run)}" for label, run in runs.items()),
    }
    context["provenance"] = Markdown(context["provenance"])
    return _environment().get_template("comparison.md.j2").render(context)


@cache
def _environment() -> Environment:
    """Any text that is not Markdown is neutralised on its way out, so a template cannot forget to."""
    environment = Environment(
        loader=PackageLoader("moediag", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markdown) else plain(NONE if value is None else value),
        autoescape=False,  # the page is markdown: finalize does what HTML escaping cannot
    )
    environment.filters["code"] = code
    environment.filters["count"] = count
    return environment


def _check_version(summary: Summary) -> None:
    found = summary.get("schema_version")
    if found != SCHEMA_VERSION:
        raise MoediagError(
            f"the report wants a summary of schema_version {SCHEMA_VERSION}, found {found!r}: run analyze again"
        )


def _main_pair(summary: Summary) -> Summary:
    _check_version(summary)
    pairs: Mapping[str, Summary] = summary.get("pairs") or {}
    if MAIN_PAIR not in pairs:
        raise MoediagError(
            f"the report wants a summary with the pair {MAIN_PAIR}, found {', '.join(pairs) or 'none'}: "
            "capture both arms, then analyze"
        )
    return pairs[MAIN_PAIR]


def _model_name(summary: Summary) -> str:
    model = summary.get("model") or {}
    return Path(str(model.get("path") or model.get("architecture") or "model")).name or "model"


def _model_facts(summary: Summary) -> dict[str, Any]:
    model = summary.get("model") or {}
    return {key: model.get(key) for key in ("path", "architecture", "n_moe_layers", "n_experts", "top_k")}


def _shared(figures: Sequence[Path], regenerate: Sequence[str]) -> dict[str, Any]:
    return {
        "figures": {path.stem: _picture(path) for path in figures if path.suffix == ".png"},
        "floor": NO_FLOOR[:1].upper() + NO_FLOOR[1:],
        "regenerate": tables.shell_block(regenerate),
        "reference": _reference_table(),
        "reorder_words": REORDER_WORDS,
    }


def _picture(path: Path) -> Markdown:
    target = path.relative_to(path.parent.parent)
    words = FIGURE_WORDS.get(path.stem, path.stem)
    return Markdown(f"![{plain(words)}]({quote(target.as_posix())})")


def _sections(pair: Summary, frames: Frames) -> dict[str, Markdown | str]:
    """Tables of the run report; empty text where the frame is missing or has no rows."""

    def made(name: str, make: Any) -> Markdown | str:
        frame = frames.get(name)
        return make(frame) if frame is not None and len(frame) else ""

    return {
        "routing": measured_table(routing_measures(pair, frames)) if pair.get("routing") else "",
        "agreement": _agreement(frames),
        "margins": made("margin_quantiles", tables.margin_quantile_table),
        "flip_bins": made("margin_curve", tables.flip_bin_table),
        "drift": made("drift_by_position", tables.drift_table),
        "corrections": made("corrections", tables.correction_table),
    }


def _agreement(frames: Frames) -> Markdown | str:
    frame = frames.get("agreement_by_layer")
    if frame is None or frame.empty:
        return ""
    body = tables.agreement_table(frame)
    return body if len(frame) <= _MANY_LAYERS else folded(f"{len(frame)} layers", body)


def _provenance(summary: Summary) -> Markdown:
    facts = {key: dict(summary.get(key) or {}) for key in ("model", "sampling", "arms", "provenance")}
    facts["provenance"].pop("frames", None)  # digests of derived files: for the reader of summary.json, not of a page
    return folded("Engines, versions, dtypes, sampling, seeds, digests", tables.facts_table(facts))


def _measures(pair: Summary, frames: Frames, origin: str) -> list[Measured]:
    routing = routing_measures(pair, frames)
    missing = [
        Measured(words, None, None, None, "", "share", note=DENSE)
        for words in ("flip rate: expert set differs", "tokens with a flip in any layer")
    ]
    return logp_measures(pair, frames, origin) + (routing[:2] or missing)


def _joint_origin(origins: Iterable[str]) -> str:
    """One origin for rows that several runs share."""
    found = set(origins)
    named = " or ".join(sorted(found - {""}))
    return f"{named} in some runs" if named and len(found) > 1 else named


def _side_by_side(pairs: Mapping[str, Summary], measures: Mapping[str, list[Measured]]) -> Markdown:
    """Metrics as rows, runs as columns, and the first MoE run over the first dense one."""
    moe, dense = first_of_each_kind({label: bool(pair.get("routing")) for label, pair in pairs.items()})
    header = ["number", "unit", *pairs, *([f"{moe} / {dense}"] if moe and dense else [])]
    # A ratio says nothing of a signed number, nor of one that should be 1.
    skip = [nth for nth, (metric, _, _) in enumerate(logp_rows()) if metric in ("kl_infer_train_k1", "mean_ratio")]
    rows: list[list[object]] = []
    for nth, row in enumerate(zip(*measures.values(), strict=True)):
        cells: list[object] = [row[0].name, "share" if row[0].unit == "share" else row[0].unit]
        cells += [Markdown(f"{NONE} ({DENSE})") if m.note == DENSE else m.cells()[1] for m in row]
        if moe and dense:
            by_label = dict(zip(measures, row, strict=True))
            above, below = by_label[moe].value, by_label[dense].value
            cells.append(Markdown(NONE if nth in skip else times(above, below)))
        rows.append(cells)
    rows.append(["tokens scored by both arms", "token", *[count(pair.get("n_tokens")) for pair in pairs.values()]])
    rows.append(["prompts (unit of resampling)", "prompt", *[count(pair.get("n_prompts")) for pair in pairs.values()]])
    rows = [row + [NONE] * (len(header) - len(row)) for row in rows]
    return tables.table(header, rows, right=range(2, len(header)))


def _interval_table(measures: Mapping[str, list[Measured]]) -> Markdown:
    rows = [[row[0].name, *[m.cells()[2] for m in row]] for row in zip(*measures.values(), strict=True)]
    return tables.table(["95 % interval", *measures], rows, right=range(1, len(measures) + 1))


def _reference_table() -> Markdown:
    rows = [
        ("k3 [nat]", "1.535e-3", "Qwen3-30B-A3B, SGLang against Megatron", "R3, arXiv 2510.11370"),
        ("k3 [nat]", "6.4e-4", "Qwen3-8B (dense), same stack", "R3"),
        ("k3 [nat]", "8.4e-4", "Qwen3-30B-A3B, two Megatron forwards of the same text", "R3"),
        ("k3 [nat]", "7.5e-4", "Qwen3-30B-A3B, infer's routing replayed", "R3"),
        ("flip rate", "about 10 %", "Qwen3-30B-A3B; 94 % of tokens differ somewhere", "R3"),
        ("F(2)", "2.54e-4", "Qwen3-30B-A3B; 5.83e-6 with replay", "R3"),
        ("mean abs logp diff [nat]", "0.019", "Qwen3-30B-A3B; 0.013 with replay", "vime"),
        ("mean abs logp diff [nat]", "0.018", "Qwen3-30B-A3B", "vLLM, GB200"),
    ]
    return tables.table(["number", "published", "model and stack", "source"], rows, right=[1])
