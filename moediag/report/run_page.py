"""The page of one run, as blocks: what was found first, then everything an engineer asks next.

A section shows what is declared for it: the metrics, the frames and the figures that name its anchor; :data:`SECTIONS`
has the order, the titles, and what is said in words.

Invariant: the same summary, frames and figures give the same page; there is no date in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moediag.analysis.metrics import METRICS
from moediag.errors import MoediagError
from moediag.figures import FIGURES, KEY_FIGURE
from moediag.frames import frames_of
from moediag.notation import SCHEMA_VERSION
from moediag.numbers import NONE, count, is_number, sig, times
from moediag.report import definitions, sections
from moediag.report.blocks import Block, Page, Picture, Section, Shell, Table, interval, number, section, table
from moediag.report.decode import TokenTexts
from moediag.report.headline import cause_blocks, length_words, margin_words, sampling_words, slope_words, verdict_of
from moediag.report.measures import (
    Frames,
    Summary,
    headlines,
    measure,
    measured_table,
    section_measures,
    text_origin,
)
from moediag.report.section_words import SECTION_WORDS
from moediag.report.tables import VIEWS, frame_table, worst_token_view
from moediag.report.text import Markdown, code, plain
from moediag.report.token_view import TokenView, view_words

REGENERATE: Final = ("moediag analyze RUN", "moediag report RUN")
_EXCESS_WORDS: Final = (
    "It is an association and no cost of a flip: difficulty that these do not show is not controlled, and it makes "
    "hard tokens flip more and differ more at once. Only forcing the routes (replay) shows a cause."
)
_LATE_WORDS: Final = (
    "Late bins hold only the sequences that got that far: a change along the table may be a change of sequences. Of "
    "many bins an even choice is shown."
)
_MASK_WORDS: Final = Markdown(
    "Share of tokens whose ratio leaves the closed band; they would get no update (weight 0). Presets are not portable "
    "between stacks."
)
_TIE_WORDS: Final = (
    "A choice can flip only where the margin (gap between the K-th and the next choice score) is smaller than the "
    "perturbation."
)
_MODEL_WORDS: Final = Markdown(
    "*Explained*: the noise comes from this very pair, cross-fitted by prompt. *Forecast*: what infer~train would flip "
    "if it had the noise of another pair (one engine repeated or perturbed). What routers in another precision do is "
    "not forecast: capture the arms `train-router-fp32` and `train-router-fp8` to measure it."
)
_UNOBSERVED_WORDS: Final = (
    "Its log-probabilities are those of the rollouts as they ran; which experts ran is known from decoding the same "
    "tokens again under observation (arm infer). "
)
_DENSE_WORDS: Final = Markdown(
    "This run is **dense**: it has no expert routing, so there is no agreement by layer and there are no margins."
)


@dataclass(frozen=True)
class Context:
    """What a section is made from.

    Args:
        pictures: figures by name; what a section shows is taken out, so that none is shown twice.
    """

    summary: Summary
    pair: Summary
    frames: Frames
    pictures: dict[str, Picture]
    texts: TokenTexts
    regenerate: Sequence[str] = ()
    tokens: TokenView | None = None

    @property
    def is_routed(self) -> bool:
        """Whether there is routing to show."""
        return bool(self.pair.get("routing"))

    def take(self, names: Sequence[str]) -> list[Block]:
        """The pictures of that name that are left."""
        return [self.pictures.pop(name) for name in names if name in self.pictures]


Words = Callable[[Context], Sequence[Block | None]]


@dataclass(frozen=True)
class Place:
    """A section: anchor, title, and the words before and after what is declared for it.

    Args:
        is_routing: left out where there is no routing.
        is_for_frames: left out where none of its frames, figures and metrics is there.
        caption: of the table of its metrics.
    """

    anchor: str
    title: str
    before: Words = lambda _: ()
    after: Words = lambda _: ()
    is_routing: bool = False
    is_for_frames: bool = False
    caption: str = ""

    def section(self, context: Context) -> Section | None:
        """The section of a run; None where there is nothing to show."""
        if self.is_routing and not context.is_routed:
            return None
        before, shown, after = self.before(context), self._declared(context), self.after(context)
        if self.is_for_frames and not shown:
            return None
        words = SECTION_WORDS[self.anchor]
        finding = words(context.summary, context.pair, context.frames)
        return section(self.anchor, self.title, *before, *shown, *after, finding=finding)

    @property
    def figures(self) -> list[str]:
        """The figures that are declared for it."""
        return [kind.name for kind in FIGURES.values() if kind.section == self.anchor]

    def _declared(self, context: Context) -> list[Block]:
        """The metrics, frames and figures that are declared for it; a figure stands before the frame it draws."""
        summary, pair, frames = context.summary, context.pair, context.frames
        rows = section_measures(self.anchor, summary, pair, frames, text_origin(summary))
        blocks: list[Block] = [measured_table(rows, self.caption or self.title)] if rows else []
        for spec in frames_of(self.anchor):
            blocks += context.take([name for name in self.figures if spec.name in FIGURES[name].frames])
            if (frame := frames.get(spec.name)) is not None and len(frame):
                view = worst_token_view(context.texts) if spec.name == "worst_tokens" else VIEWS.get(spec.name)
                blocks.append(frame_table(spec.name, frame, view))
        return blocks + context.take(self.figures)


SECTIONS: Final = (
    Place("ladder", "Where it comes from: the ladder", lambda c: cause_blocks(c.summary)),
    Place("compared", "What was compared", lambda c: sections.compared_blocks(c.summary)),
    Place("numbers", "Log-probability mismatch", caption="Mismatch of infer and train, every number"),
    Place("further", "Numbers that other frameworks print"),
    Place("floors", "Noise floors and rounding scale", lambda c: sections.floor_blocks(c.summary)),
    Place("tail", "The tail"),
    Place(
        "depth", "Expert agreement by layer",
        lambda c: [_left_out_words(c), definitions.REORDER_WORDS if c.is_routed else None],
        caption="Flips over all layers",
    ),
    Place(
        "margins", "Near ties: margins and flips",
        lambda c: [Markdown(f"{_TIE_WORDS} {margin_words(c.frames)}".strip()), *_prediction_words(c)],
        lambda c: [sections.router_table(c.summary)],
        is_routing=True,
    ),
    Place("excess", "How much more flipped tokens differ", lambda c: [_excess_words(c.pair)], is_routing=True),
    Place(
        "replay", "Routing replay and other changes",
        lambda c: sections.replay_blocks(c.summary, text_origin(c.summary)),
    ),
    Place(
        "drift", "Drift by position and by length",
        lambda c: [Markdown(f"{slope_words(c.pair)} {_LATE_WORDS}".strip()), Markdown(length_words(c.pair))],
        is_for_frames=True,
    ),
    Place("kinds", "By kind of token"),
    Place("tokens", "Token by token", lambda c: [*view_words(c.tokens), c.tokens] if c.tokens else []),
    Place("worst-tokens", "Worst tokens", after=lambda c: [plain(c.texts.note)], is_for_frames=True),
    Place("worst-sequences", "Worst responses", after=lambda c: [_token_links(c)]),
    Place("corrections", "IcePop mask", lambda _: [_MASK_WORDS], is_for_frames=True),
    Place("further-figures", "Further figures", lambda c: c.take(list(c.pictures))),
    Place(
        "definitions", "What these numbers mean", lambda _: [definitions.definition_table(), definitions.DASH_WORDS]
    ),
    Place(
        "limits", "What these numbers cannot show", lambda c: [definitions.limits(sections.has_floor(c.summary))]
    ),
    Place(
        "published", "Published elsewhere; other stacks; not thresholds",
        lambda c: [published_table(c.summary, c.pair, c.frames), definitions.reference_table()],
    ),
    Place(
        "provenance", "Provenance, and how to make this page again",
        lambda c: [sections.provenance_table(c.summary), Shell(tuple(c.regenerate))],
    ),
)  # fmt: skip
"""The sections of a run's page, in order."""


def run_page(
    summary: Summary,
    frames: Frames,
    figures: Sequence[Path],
    *,
    regenerate: Sequence[str] = REGENERATE,
    texts: TokenTexts | None = None,
    run: str = "RUN",
    tokens: TokenView | None = None,
) -> Page:
    """The page of one run.

    Args:
        summary: the run's summary.json, read.
        frames: frame name -> frame; a missing frame leaves its table out.
        figures: what ``draw_run_figures`` returned; the page stands beside their folder.
        regenerate: the commands that make this page again.
        texts: the text of the worst tokens; None = ids only.
        run: the run's folder, for the commands.
        tokens: a few responses token by token.

    Raises:
        MoediagError: the summary has another schema version or no pair.
    """
    pair = main_pair(summary)
    pictures = {path.stem: Picture(path) for path in figures if path.suffix == ".png"}
    key = pictures.pop(KEY_FIGURE, None)
    context = Context(summary, pair, frames, pictures, texts or TokenTexts(), regenerate, tokens)
    verdict = verdict_of(summary, pair, frames, run=run)
    return Page(
        f"Routing mismatch: {sections.model_name(summary)}",
        (verdict,),
        key,
        _first_blocks(context),
        tuple(part for place in SECTIONS if (part := place.section(context)) is not None),
        (published_table(summary, pair, frames),),
        first_finding=next(iter(verdict.evidence), Markdown("")),
    )


_FIVE: Final = ("abs_logp_diff.mean", "kl_infer_train_k3", "extreme_share_2", "flip_rate", "any_layer_share")
_FIVE_DENSE: Final = ("abs_logp_diff.mean", "abs_logp_diff.p99", "kl_infer_train_k3", "extreme_share_2", "mean_ratio")


def published_table(summary: Summary, pair: Summary, frames: Frames) -> Table:
    """Five numbers beside what is published for models of that kind."""
    is_moe = bool(pair.get("routing"))
    rows, counts = [], dict[str, None]()
    for name in _FIVE if is_moe else _FIVE_DENSE:
        one = measure(METRICS[name], pair, frames=frames)
        published = definitions.published_for(name, is_moe)
        _, value, bounds, *_ = one.cells()
        rows.append([definitions.SHORT_NAMES[name], value, bounds, plain(published.words) if published else NONE])
        counts.setdefault(one.n)
    kind, good = ("MoE", "lower is better") if is_moe else ("dense", "lower is better, of the mean ratio 1")
    caption = (
        f"Five numbers ({good}) beside {kind} models elsewhere: other stacks, not thresholds. Here: "
        f"{', '.join(filter(None, counts))} of {count(pair.get('n_prompts'), 'prompt')}. {definitions.R3}"
    )
    return table(["number", "here", "95 %", "published"], rows, (1, 2), caption)


def check_version(summary: Summary) -> None:
    """Refuse a summary of another schema.

    Raises:
        MoediagError: it is one.
    """
    found = summary.get("schema_version")
    if found != SCHEMA_VERSION:
        raise MoediagError(
            f"the report needs a summary of schema_version {SCHEMA_VERSION}, found {found!r}: run analyze again"
        )


def main_pair(summary: Summary) -> Summary:
    """The main pair of a summary.

    Raises:
        MoediagError: another schema version, or no such pair.
    """
    check_version(summary)
    pairs: Mapping[str, Summary] = summary.get("pairs") or {}
    name = summary["main_pair"]
    if name not in pairs:
        raise MoediagError(
            f"the report needs a summary with the pair {name}, found {', '.join(pairs) or 'none'}: "
            "capture both arms, then analyze"
        )
    return pairs[name]


def _first_blocks(context: Context) -> tuple[Block, ...]:
    summary, pair = context.summary, context.pair
    origin = text_origin(summary)
    rows = [measure(one, pair, origin=origin, floors=summary, frames=context.frames) for one in headlines(pair)]
    blocks: list[Block] = [
        measured_table(rows, "The numbers to look at first"),
        sections.floor_words(summary),
        _pair_words(summary, pair),
        sampling_words(summary),
    ]
    return tuple(block for block in blocks if block)


def _pair_words(summary: Summary, pair: Summary) -> Markdown:
    name, engines = summary["main_pair"], plain(sections.engines_compared(summary))
    counts = [count(pair.get("n_tokens"), "token"), count(pair.get("n_unscored"), "token")]
    wholes = [count(pair.get("n_sequences"), "sequence"), count(pair.get("n_prompts"), "prompt")]
    impossible = f" ({count(pair['n_impossible'])} with a logp of -inf: a defect)" if pair.get("n_impossible") else ""
    return Markdown(
        f"Pair {code(name)}, {engines}: {counts[0]} of {', '.join(wholes)} scored by both arms, {counts[1]} not scored"
        f"{impossible}. {'' if name == summary.get('observed_pair') else _UNOBSERVED_WORDS}{definitions.SIGN_WORDS}"
    )


def _token_links(context: Context) -> Markdown | None:
    """Where responses stand token by token."""
    if context.tokens is None:
        return None
    links = ", ".join(f"[{one.seq_id}](#seq-{one.seq_id})" for one in context.tokens.responses)
    return Markdown(f"Token by token: {links}.")


def _left_out_words(context: Context) -> Markdown | None:
    reason = (context.pair.get("left_out") or {}).get("routing")
    if reason:
        return Markdown(f"**Left out:** {plain(reason)}.")
    return None if context.is_routed else _DENSE_WORDS


def _prediction_words(context: Context) -> list[Markdown]:
    """How flips are explained and forecast, where they are."""
    predicted = ("explained_flips", "forecast_flips", "score_noise")
    if not any(name in context.frames for name in predicted) and not sections.router_table(context.summary):
        return []
    return [_MODEL_WORDS, sections.prediction_words(context.summary)]


def _excess_words(pair: Summary) -> Markdown:
    found = pair.get("flip_excess") or {}
    if not is_number(found.get("excess")):
        return Markdown("")
    low, high = found.get("excess_ci") or (None, None)
    return Markdown(
        f"A token with a flip differs by {number(found.get('flipped_mean'))} nat on average, an unflipped token like "
        f"it (same {plain(found.get('matched_on'))}) by {number(found.get('unflipped_mean'))} nat: "
        f"**{number(found['excess'])} nat more** (95 %: {interval(low, high)}; "
        f"{times(found.get('flipped_mean'), found.get('unflipped_mean'))}{_ratio_words(found.get('ratio_ci'))}; "
        f"{count(found.get('n_tokens'), 'flipped token')}, {count(found.get('n_unmatched'))} without a like, left "
        f"out). {_EXCESS_WORDS}"
    )


def _ratio_words(bounds: Sequence[float] | None) -> str:
    return f", 95 %: {sig(bounds[0], 2)}× to {sig(bounds[1], 2)}×" if bounds else ""
