"""The page of several runs side by side, as blocks.

Invariant: every run stands with its own interval and its own floor; a ratio of two runs is given only for numbers that
have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from moediag.analysis.metrics import METRICS, Metric
from moediag.errors import MoediagError
from moediag.figures import KEY_FIGURE
from moediag.figures.style import first_of_each_kind
from moediag.numbers import NONE, count, in_unit, is_number, times
from moediag.report import definitions
from moediag.report.blocks import (
    Block,
    Bullets,
    Page,
    Picture,
    Section,
    Shell,
    Table,
    Verdict,
    interval,
    section,
    table,
)
from moediag.report.headline import sampling_words, verdict_of
from moediag.report.measures import MEASURED_HEADER, Frames, Measured, Summary, label_of, measure, text_origin
from moediag.report.run_page import SECTIONS, check_version, main_pair
from moediag.report.section_words import SECTION_WORDS
from moediag.report.sections import RULE_WORDS, floor_words, has_floor, model_facts, provenance_table
from moediag.report.tables import facts_table, frame_table
from moediag.report.text import Markdown, code, one_line, plain
from moediag.run.environment import ArmComparison

Measures = Sequence[tuple[Metric, Mapping[str, Measured]]]
"""Metrics with their numbers by run."""

DENSE: Final = "dense"
"""Why a run has no routing numbers."""

Environments = Mapping[str, Sequence[ArmComparison]]
"""``A against B`` -> what :func:`moediag.run.environment.compare_runs` found."""

_N_IN_LINE: Final = 6
_NO_BREAK: Final = "\u00a0"
_N_DIFFERENCES: Final = 300
_N_MARKDOWN: Final = 30


def comparison_page(
    summary: Summary,
    frames: Mapping[str, Frames],
    figures: Sequence[Path],
    *,
    regenerate: Sequence[str] = ("moediag compare RUN RUN ... -o DIR",),
    environments: Environments | None = None,
    folders: Mapping[str, str] | None = None,
) -> Page:
    """The page of several runs.

    Args:
        summary: ``{"schema_version", "runs": {label: run summary}, "ratios": {...}}``.
        frames: label -> (frame name -> frame).
        figures: what ``draw_comparison_figures`` returned; the page stands beside their folder.
        regenerate: the commands that make this page again.
        environments: what ran differently, for pairs of runs.
        folders: label -> the run's folder, for the commands.

    Raises:
        MoediagError: a summary has another schema version, or no run or pair.
    """
    check_version(summary)
    runs: Mapping[str, Summary] = summary.get("runs") or {}
    if not runs:
        raise MoediagError("a comparison needs a summary with at least one entry under runs, found none")
    pairs = {label: main_pair(run) for label, run in runs.items()}
    origin = _joint_origin(text_origin(run) for run in runs.values())
    measures = [
        (
            metric,
            {
                label: _measure(metric, runs[label], pair, frames.get(label, {}), origin)
                for label, pair in pairs.items()
            },
        )
        for metric in METRICS.values()
        if metric.section not in ("", "further") and any(map(metric.is_measured, pairs.values()))
    ]
    headlines = [(metric, row) for metric, row in measures if metric.is_headline]
    pictures = {path.stem: Picture(path) for path in figures if path.suffix == ".png"}
    verdicts = tuple(
        verdict_of(run, pairs[label], frames.get(label, {}), label, (folders or {}).get(label, "RUN"))
        for label, run in runs.items()
    )
    lead = [*_cautions(summary, runs), _ratio_words(pairs, headlines), _lead_table(pairs, headlines)]
    first = [
        _long_table(headlines, f"Headline numbers of {len(pairs)} runs, each with its interval and floor"),
        _floor_words(runs),
    ]
    sections = [
        section(
            "numbers",
            "All numbers side by side",
            _side_by_side(pairs, measures),
            _long_table(measures, "Every number of every run, with interval and floor"),
            finding=f"{count(len(measures), 'number')} of {count(len(pairs), 'run')}",
        ),
        *_picture_sections(pairs, frames, pictures),
        *_closing_sections(runs, environments or {}, regenerate),
    ]
    return Page(
        one_line(f"Routing mismatch compared: {', '.join(runs)}"),
        verdicts,
        pictures.get(KEY_FIGURE),
        (*(block for block in first if block), definitions.SIGN_WORDS),
        tuple(part for part in sections if part is not None),
        tuple(block for block in lead if block),
        first_finding=_words_each(verdicts),
    )


def _words_each(verdicts: Sequence[Verdict]) -> Markdown:
    """The words of the first few verdicts."""
    words = "; ".join(f"{plain(one.label)}: {plain(one.word)}" for one in verdicts[:_N_IN_LINE])
    return Markdown(f"{words} …" if len(verdicts) > _N_IN_LINE else words)


def _closing_sections(
    runs: Mapping[str, Summary], environments: Environments, regenerate: Sequence[str]
) -> list[Section | None]:
    models = facts_table({label: model_facts(run) for label, run in runs.items()}, "Models")
    n_apart = sum(len(arm.differences) for found in environments.values() for arm in found)
    apart = f"{count(n_apart, 'fact')} of versions, options and machine differ" if environments else ""
    lines = {
        anchor: words({}, {}, {}) for anchor, words in SECTION_WORDS.items() if anchor in ("definitions", "limits")
    }
    return [
        section("environments", "What ran differently", *_environment_blocks(environments), finding=apart),
        section("definitions", "What these numbers mean", definitions.definition_table(), definitions.DASH_WORDS,
                finding=lines["definitions"]),
        section("limits", "What this comparison cannot show", definitions.comparison_limits(), finding=lines["limits"]),
        section("published", "Published elsewhere; other stacks; not thresholds", definitions.reference_table(),
                finding=count(len(definitions.PUBLISHED), "number")),
        section("models", "Models", models, finding=", ".join(runs)),
        section("provenance", "Provenance", *_provenance(runs), finding="versions, dtypes, digests"),
        section("regenerate", "How to make this page again", Shell(tuple(regenerate)), finding="the command"),
    ]  # fmt: skip


def _cautions(summary: Summary, runs: Mapping[str, Summary]) -> list[Block]:
    """What makes these runs hard to compare."""
    lines = [
        Markdown(f"**Caution, {plain(label)}.** {words}")
        for label, run in runs.items()
        if (words := sampling_words(run))
    ]
    if summary.get("same_prompts") is False:
        other = "**The runs were made from different prompts**: their numbers differ for that reason too."
        lines.insert(0, Markdown(other))
    return [Bullets(tuple(lines))] if lines else []


def _measure(metric: Metric, summary: Summary, pair: Summary, frames: Frames, origin: str) -> Measured:
    """A number of one run; without one where it is of routing and the run has none."""
    if not (metric.is_measured(pair) or pair.get("routing")):
        name = label_of(metric, origin)
        return Measured(name, None, None, None, "", metric.shown_unit, metric.direction, DENSE)
    return measure(metric, pair, origin=origin, floors=summary, frames=frames)


def _joint_origin(origins: Iterable[str]) -> str:
    """One origin for rows that several runs share."""
    found = set(origins)
    named = " or ".join(sorted(found - {""}))
    return f"{named} in some runs" if named and len(found) > 1 else named


def _long_table(measures: Measures, caption: str) -> Table:
    """One row per number and run."""
    rows = []
    for _, row in measures:
        for label, one in row.items():
            if one.note != DENSE:
                name, *cells = one.cells()
                rows.append([name, plain(label), *cells])
    header = [MEASURED_HEADER[0], "run", *MEASURED_HEADER[1:]]
    return table(header, rows, (2, 3, 4, 5, 7), caption, is_list=len(rows) > 12)


def _kinds(pairs: Mapping[str, Summary]) -> tuple[str | None, str | None]:
    return first_of_each_kind({label: bool(pair.get("routing")) for label, pair in pairs.items()})


def _ratio_words(pairs: Mapping[str, Summary], measures: Measures) -> Markdown:
    """The first MoE run over the first dense one, in a sentence."""
    moe, dense = _kinds(pairs)
    if moe is None or dense is None:
        return Markdown("")
    ratios = ((row[moe].name, _ratio(metric, row[moe], row[dense])) for metric, row in measures)
    lines = [f"{plain(name)} {ratio}" for name, ratio in ratios if ratio != NONE]
    if not lines:
        return Markdown("")
    words = "a ratio of two pairs of engines on their own tokens, without an interval"
    return Markdown(f"**{plain(moe)} over {plain(dense)}**: {'; '.join(lines)} ({words}).")


def _ratio(metric: Metric, above: Measured, below: Measured) -> str:
    return times(above.value, below.value) if metric.is_scale else NONE


def _floor_words(runs: Mapping[str, Summary]) -> Block:
    if not any(map(has_floor, runs.values())):
        words = "No A/A floor was measured in these runs: what is noise of one engine alone is not known."
        return Markdown(words)
    return Bullets((*(Markdown(f"{plain(label)}: {floor_words(run)}") for label, run in runs.items()), RULE_WORDS))


def _lead_table(pairs: Mapping[str, Summary], headlines: Measures) -> Table:
    """The headline numbers, a column per run, each with its interval."""
    moe, dense = _kinds(pairs)
    rows: list[list[object]] = []
    for metric, row in headlines:
        first = next(iter(row.values()))
        cells: list[object] = [first.name if metric.is_share else Markdown(f"{plain(first.name)} \\[{first.unit}\\]")]
        for one in row.values():
            bounds = interval(one.low, one.high, one.unit)
            known = one.shown if bounds == NONE else Markdown(f"{one.shown} ({bounds.replace(' ', _NO_BREAK)})")
            cells.append(Markdown(f"{NONE} ({DENSE})") if one.note == DENSE else known)
        rows.append([*cells, Markdown(_ratio(metric, row[moe], row[dense]))] if moe and dense else cells)
    header = ["number (95 %)", *pairs, *([f"{moe} / {dense}"] if moe and dense else [])]
    n = ", ".join(f"{label} {count(pair.get('n_tokens'), 'token')}" for label, pair in list(pairs.items())[:8])
    return table(header, rows, range(1, len(header)), f"Headline numbers side by side, lower is better; {n}")


def _side_by_side(pairs: Mapping[str, Summary], measures: Measures) -> Table:
    """Metrics as rows, runs as columns, and the first MoE run over the first dense one."""
    moe, dense = _kinds(pairs)
    header = ["number", "unit", *pairs, *([f"{moe} / {dense}"] if moe and dense else [])]
    rows: list[list[object]] = []
    for metric, row in measures:
        first = next(iter(row.values()))
        cells: list[object] = [first.name, metric.unit_words]
        cells += [Markdown(f"{NONE} ({DENSE})") if one.note == DENSE else one.shown for one in row.values()]
        if moe and dense:
            cells.append(Markdown(_ratio(metric, row[moe], row[dense])))
        rows.append(cells)
    rows.append(["tokens scored by both arms", "token", *[count(pair.get("n_tokens")) for pair in pairs.values()]])
    rows.append(["prompts (unit of resampling)", "prompt", *[count(pair.get("n_prompts")) for pair in pairs.values()]])
    rows = [row + [NONE] * (len(header) - len(row)) for row in rows]
    return table(header, rows, range(2, len(header)), "Values side by side; intervals and floors stand below")


def _picture_sections(
    pairs: Mapping[str, Summary], frames: Mapping[str, Frames], pictures: Mapping[str, Picture]
) -> list[Section | None]:
    shown: list[Section | None] = []
    left = {name: picture for name, picture in pictures.items() if name != KEY_FIGURE}
    for place in SECTIONS:
        blocks: list[Block] = [left.pop(name) for name in place.figures if name in left]
        blocks = [*_agreement_blocks(pairs, frames), *blocks] if place.anchor == "depth" else blocks
        if blocks:
            shown.append(section(place.anchor, place.title, *blocks, finding=_each(place.anchor, pairs, frames)))
    return [*shown, section("further-figures", "Further figures", *left.values())]


_OF_SECTION: Final = {
    "ladder": "abs_logp_diff.mean",
    "compared": "abs_logp_diff.mean",
    "numbers": "abs_logp_diff.mean",
    "floors": "abs_logp_diff.mean",
    "tail": "extreme_share_2",
    "depth": "flip_rate",
    "margins": "any_layer_share",
    "excess": "flip_explained_share",
}
"""Section -> the metric that stands in its line, of every run."""


def _each(anchor: str, pairs: Mapping[str, Summary], frames: Mapping[str, Frames]) -> str:
    """What a section found of the first few runs: its metric, or its line of each run's own page."""
    some = list(pairs.items())[:_N_IN_LINE]
    if anchor not in _OF_SECTION:
        lines = ((label, SECTION_WORDS[anchor]({}, pair, frames.get(label, {}))) for label, pair in some)
        return "; ".join(f"{label} {line}" for label, line in lines if line)
    metric = METRICS[_OF_SECTION[anchor]]
    values = [
        f"{label} {in_unit(metric.value(pair), metric.shown_unit)}"
        for label, pair in some
        if is_number(metric.value(pair))
    ]
    unit = "" if metric.is_share else f" [{metric.unit}]"
    return f"{metric.label}{unit}: {', '.join(values)}" if values else ""


def _agreement_blocks(pairs: Mapping[str, Summary], frames: Mapping[str, Frames]) -> list[Block]:
    blocks: list[Block] = []
    for label, pair in pairs.items():
        frame = frames.get(label, {}).get("agreement_by_layer")
        if not pair.get("routing"):
            blocks.append(Markdown(f"{plain(label)} is a dense model: it has no routing to compare."))
        elif frame is not None and len(frame):
            blocks += [Markdown(f"**{plain(label)}**"), frame_table("agreement_by_layer", frame)]
    is_any_moe = any(pair.get("routing") for pair in pairs.values())
    return [*blocks, definitions.REORDER_WORDS] if is_any_moe else blocks


def _environment_blocks(environments: Environments) -> list[Block]:
    """One table per pair of runs: which facts differ, arm by arm; whether it matters is for the floors to say."""
    blocks: list[Block] = []
    for what, comparisons in environments.items():
        found = [(arm.arm, difference) for arm in comparisons for difference in arm.differences]
        missing = [f"arm {plain(arm.arm)}: {arm.missing_in} has none" for arm in comparisons if arm.missing_in]
        n_facts = sum(arm.n_facts for arm in comparisons)
        words = [f"**{plain(what)}**: {count(len(found))} of {count(n_facts, 'fact')} differ", *missing]
        blocks.append(Markdown("; ".join(words) + "."))
        if found:
            rows = [[arm, d.section, code(d.name), code(d.a), code(d.b)] for arm, d in found[:_N_DIFFERENCES]]
            header = ["arm", "section", "fact", "A", "B"]
            cut = f", the first {_N_DIFFERENCES}" if len(found) > _N_DIFFERENCES else ""
            blocks.append(
                table(header, rows, caption=f"{what}: what differs{cut}", is_list=True, n_markdown=_N_MARKDOWN)
            )
    return blocks


def _provenance(runs: Mapping[str, Summary]) -> list[Block]:
    return [block for label, run in runs.items() for block in (Markdown(f"**{plain(label)}**"), provenance_table(run))]
