"""The page of one run, as blocks: what was found first, then everything an engineer asks next.

Invariant: the same summary, frames and figures give the same page; there is no date in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pandas as pd

from moediag.errors import MoediagError
from moediag.figures.numbers import count, is_number, sig, times
from moediag.notation import SCHEMA_VERSION
from moediag.report import definitions, tables, token_tables
from moediag.report import prediction_tables as predictions
from moediag.report.blocks import Block, Page, Picture, Section, Shell, interval, number, section
from moediag.report.decode import TokenTexts
from moediag.report.facts import compared_blocks, engines_compared, model_name, provenance_table
from moediag.report.floors import floor_blocks, floor_words, has_floor
from moediag.report.headline import length_words, margin_words, sampling_words, slope_words, verdict_of
from moediag.report.measures import (
    Frames,
    Summary,
    further_measures,
    headline,
    logp_measures,
    measured_table,
    routing_measures,
    text_origin,
)
from moediag.report.pairs import main_pair_name, observed_pair_name
from moediag.report.replay import replay_blocks
from moediag.report.text import Markdown, code, plain

REGENERATE: Final = ("moediag analyze RUN", "moediag report RUN")
KEY_FIGURE: Final = "figure1"
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


def run_page(
    summary: Summary,
    frames: Frames,
    figures: Sequence[Path],
    *,
    regenerate: Sequence[str] = REGENERATE,
    texts: TokenTexts | None = None,
) -> Page:
    """The page of one run.

    Args:
        summary: the run's summary.json, read.
        frames: frame name -> frame; a missing frame leaves its table out.
        figures: what ``draw_run_figures`` returned; the page stands beside their folder.
        regenerate: the commands that make this page again.
        texts: the text of the worst tokens; None = ids only.

    Raises:
        MoediagError: the summary has another schema version or no pair.
    """
    pair = main_pair(summary)
    pictures = {path.stem: Picture(path) for path in figures if path.suffix == ".png"}
    key = pictures.pop(KEY_FIGURE, None)
    show = _Pictures(pictures)
    sections = [
        section("compared", "What was compared", *compared_blocks(summary)),
        *_mismatch_sections(summary, pair, frames, show),
        *_routing_sections(summary, pair, frames, show),
        *_token_sections(pair, frames, show, texts or TokenTexts()),
        *_closing_sections(summary, show, regenerate),
    ]
    return Page(
        f"Routing mismatch: {model_name(summary)}",
        (verdict_of(summary, pair, frames),),
        key,
        _first_blocks(summary, pair, frames),
        tuple(part for part in sections if part is not None),
    )


def check_version(summary: Summary) -> None:
    """Refuse a summary of another schema.

    Raises:
        MoediagError: it is one.
    """
    found = summary.get("schema_version")
    if found != SCHEMA_VERSION:
        raise MoediagError(
            f"the report wants a summary of schema_version {SCHEMA_VERSION}, found {found!r}: run analyze again"
        )


def main_pair(summary: Summary) -> Summary:
    """The main pair of a summary.

    Raises:
        MoediagError: another schema version, or no such pair.
    """
    check_version(summary)
    pairs: Mapping[str, Summary] = summary.get("pairs") or {}
    name = main_pair_name(summary)
    if name not in pairs:
        raise MoediagError(
            f"the report wants a summary with the pair {name}, found {', '.join(pairs) or 'none'}: "
            "capture both arms, then analyze"
        )
    return pairs[name]


class _Pictures:
    """Hands out every picture once; what no section asked for is shown at the end."""

    def __init__(self, pictures: Mapping[str, Picture]) -> None:
        self._left = dict(pictures)

    def __call__(self, *names: str) -> list[Block]:
        return [self._left.pop(name) for name in names if name in self._left]

    def rest(self) -> list[Block]:
        """The pictures that are left."""
        return [self._left.pop(name) for name in list(self._left)]


def made(frames: Frames, name: str, make: Callable[[pd.DataFrame], Block]) -> Block:
    """A frame's table; empty text where the frame is missing or has no rows."""
    frame = frames.get(name)
    return make(frame) if frame is not None and len(frame) else Markdown("")


def _first_blocks(summary: Summary, pair: Summary, frames: Frames) -> tuple[Block, ...]:
    measures = headline(summary, pair, frames, text_origin(summary))
    blocks: list[Block] = [
        measured_table(measures, "The five numbers to look at first"),
        floor_words(summary),
        _pair_words(summary, pair),
        sampling_words(summary),
    ]
    return tuple(block for block in blocks if block)


def _closing_sections(summary: Summary, show: _Pictures, regenerate: Sequence[str]) -> list[Section | None]:
    return [
        section("further-figures", "Further figures", *show.rest()),
        section("definitions", "What these numbers mean", definitions.definition_table(), definitions.DASH_WORDS),
        section("limits", "What these numbers cannot show", definitions.limits(has_floor(summary))),
        section("published", "Published elsewhere; other stacks; not thresholds", definitions.reference_table()),
        section("provenance", "Provenance", provenance_table(summary)),
        section("regenerate", "How to make this page again", Shell(tuple(regenerate))),
    ]


def _pair_words(summary: Summary, pair: Summary) -> Markdown:
    name, engines = main_pair_name(summary), plain(engines_compared(summary))
    counts = [count(pair.get("n_tokens"), "token"), count(pair.get("n_unscored"), "token")]
    wholes = [count(pair.get("n_sequences"), "sequence"), count(pair.get("n_prompts"), "prompt")]
    impossible = f" ({count(pair['n_impossible'])} with a logp of -inf: a defect)" if pair.get("n_impossible") else ""
    return Markdown(
        f"Pair {code(name)}, {engines}: {counts[0]} of {', '.join(wholes)} scored by both arms, {counts[1]} not scored"
        f"{impossible}. {'' if name == observed_pair_name(summary) else _UNOBSERVED_WORDS}{definitions.SIGN_WORDS}"
    )


def _mismatch_sections(summary: Summary, pair: Summary, frames: Frames, show: _Pictures) -> list[Section | None]:
    origin = text_origin(summary)
    further = further_measures(summary, pair, frames)
    return [
        section(
            "numbers",
            "Log-probability mismatch",
            measured_table(logp_measures(summary, pair, frames, origin), "Mismatch of infer and train, every number"),
            made(frames, "exact_divergences", tables.exact_table),
            measured_table(further, "Numbers that other frameworks print") if further else None,
        ),
        section("floors", "Noise floors and rounding scale", *floor_blocks(summary)),
        section(
            "tail",
            "The tail",
            *show("tail_curve"),
            made(frames, "tail_curve", tables.tail_table),
            *show("ratio_histogram", "logp_diff_by_p_infer"),
            made(frames, "ratio_quantiles", tables.quantile_table),
        ),
    ]


def _routing_sections(summary: Summary, pair: Summary, frames: Frames, show: _Pictures) -> list[Section | None]:
    reason = (pair.get("left_out") or {}).get("routing")
    left_out = Markdown(f"**Left out:** {plain(reason)}.") if reason else None
    if not pair.get("routing"):
        return [section("depth", "Expert agreement by layer", left_out or _DENSE_WORDS)]
    flips = measured_table(routing_measures(summary, pair, frames), "Flips over all layers")
    return [
        section(
            "depth",
            "Expert agreement by layer",
            left_out,
            flips,
            *show("agreement_by_depth"),
            made(frames, "agreement_by_layer", tables.agreement_table),
            definitions.REORDER_WORDS,
            *show("flips_per_token"),
            made(frames, "flips_per_token", tables.flips_per_token_table),
            *show("flip_map", "expert_swaps"),
            made(frames, "expert_swaps", tables.swap_table),
        ),
        section(
            "margins",
            "Near ties: margins and flips",
            Markdown(f"{_TIE_WORDS} {margin_words(frames)}".strip()),
            *show("margins"),
            made(frames, "margin_quantiles", tables.margin_quantile_table),
            made(frames, "margin_curve", tables.flip_bin_table),
            *show("margins_by_layer"),
            made(frames, "margin_noise", tables.noise_table),
            *_prediction_blocks(summary, frames, show),
        ),
        section(
            "excess",
            "How much more flipped tokens differ",
            _excess_words(pair),
            *show("flip_excess"),
            made(frames, "flip_excess", token_tables.excess_table),
        ),
        section("replay", "Routing replay", *replay_blocks(summary, text_origin(summary))),
    ]


def _prediction_blocks(summary: Summary, frames: Frames, show: _Pictures) -> list[Block]:
    """Flips explained from the pair's own noise, forecast from noise taken elsewhere, and that noise."""
    tables_made = [
        *show("explained_flips"),
        made(frames, "explained_flips", predictions.explained_table),
        made(frames, "flip_calibration", predictions.calibration_table),
        made(frames, "forecast_flips", predictions.forecast_table),
        predictions.router_table(summary),
        made(frames, "score_noise", partial(tables.declared_table, "score_noise")),
    ]
    return [_MODEL_WORDS, predictions.prediction_words(summary), *tables_made] if any(tables_made) else []


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


def _token_sections(pair: Summary, frames: Frames, show: _Pictures, texts: TokenTexts) -> list[Section | None]:
    corrections = made(frames, "corrections", tables.correction_table)
    return [
        section(
            "drift",
            "Drift by position and by length",
            *show("position_drift"),
            made(frames, "drift_by_position", token_tables.drift_table),
            Markdown(f"{slope_words(pair)} {_LATE_WORDS}".strip()),
            *show("sequence_drift"),
            made(frames, "drift_by_length", token_tables.length_table),
            Markdown(length_words(pair)),
        ),
        section("kinds", "By kind of token", made(frames, "metrics_by_stratum", token_tables.strata_table)),
        section(
            "worst-tokens",
            "Worst tokens",
            *_noted(made(frames, "worst_tokens", lambda frame: token_tables.worst_token_table(frame, texts)), texts),
        ),
        section("worst-sequences", "Worst responses", made(frames, "sequences", token_tables.worst_sequence_table)),
        section(
            "corrections",
            "IcePop mask",
            *([_MASK_WORDS, corrections] if corrections else []),
            made(frames, "entropy_quantiles", tables.entropy_table),
        ),
    ]


def _noted(body: Block, texts: TokenTexts) -> list[Block]:
    return [body, plain(texts.note)] if body else []
