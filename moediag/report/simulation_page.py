"""The page of a simulation, as blocks: what each correction would do to the same tokens, and what that cannot show.

Invariant: every sentence is made from the frames it stands beside; the page, the table on the terminal and the JSON
hold the same numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moediag.corrections.presets import PRESETS
from moediag.numbers import NONE, count, is_number, percent
from moediag.report.audit_section import audit_section, audit_words
from moediag.report.blocks import Block, Bullets, Page, Paste, Picture, Shell, Table, interval, number, section, table
from moediag.report.definitions import SIGN_WORDS
from moediag.report.tables import View, frame_table, records
from moediag.report.text import Markdown, code, plain

Frames = Mapping[str, pd.DataFrame]
Row = Mapping[str, Any]

STABILITY: Final = "No offline number shows that training will be stable."
ADVANTAGE_USERS: Final = "dppo, the objective and the strata of advantages"
_FRONTIER_ROWS: Final = 20
_STRATA_ROWS: Final = 24

HEADER: Final = (
    "correction", "masked", "95 %", "sequences", "below", "above", "ESS token", "ESS seq", "mean w", "95 %",
    "k3 left [nat]",
)  # fmt: skip
"""Columns of the short table, on the page and on the terminal."""

_LIMITS: Final = (
    f"**That training will be stable.** {STABILITY} These are weights on tokens logged at one moment, before an "
    "update.",
    "**Which correction is best.** Masking less, leaving less k3 and keeping more weight pull against each other; none "
    "of these numbers is an outcome of training.",
    "**Another stack.** Bands and bounds are not portable: another model, engine pair, precision or training step "
    "needs its own log and its own sweep.",
    "**A framework, bit for bit.** Presets are the corrections in one notation; what a framework does differently "
    "(normalised weights, loss masks, clamps) stands in the table of presets.",
)


def simulation_page(
    summary: Mapping[str, Any], frames: Frames, figures: Sequence[Path], regenerate: Sequence[str] = ()
) -> Page:
    """The page of one simulation.

    Args:
        summary: :meth:`moediag.results.simulation.Simulation.summary`.
        frames: frame name -> frame.
        figures: files drawn for it; the page stands beside their folder.
        regenerate: the commands that make this page again.
    """
    pictures = {path.stem: Picture(path) for path in figures if path.suffix == ".png"}

    def show(name: str) -> Picture | None:
        return pictures.get(name)

    statistics = frames["correction_statistics"]
    n, key = count(len(statistics), "correction"), "band_frontier" if "band_frontier" in pictures else "masked_shares"
    found = sentences_of(statistics, frames)
    sections = [
        section("numbers", "Every correction on the same tokens", short_table(statistics), _left_out(summary),
                show("masked_shares") if key != "masked_shares" else None,
                finding=found["masked"]),
        section("entropy", "Do masks take uncertain tokens?", show("masked_entropy"), entropy_table(statistics),
                finding=entropy_words(statistics)),
        section("flips", "Do masks catch routing flips?", _bullets(flip_words(statistics)), flip_table(statistics),
                finding=found["flips"]),
        section("ratios", "Ratios and bands", show("ratio_bands"), finding=found["ratios"]),
        section("sweep", "Which band?", *_sweep_blocks(frames), finding=found["sweep"]),
        section("overlap", "Do corrections mask the same tokens?", show("mask_overlap"), _bullets(same_words(frames)),
                finding=found["same"]),
        section("strata", "What kind of tokens is masked", *_strata_blocks(frames),
                finding="shares by position, probability, entropy and flips"),
        audit_section(frames, pictures),
        section("all", "All statistics", *_all_blocks(statistics), finding=n),
        section("presets", "Who uses what, and what is different there", preset_table(summary),
                finding=f"{count(len(PRESETS), 'preset')} of frameworks and papers"),
        section("read", "What was read", _bullets(source_words(summary)), finding=_base_words(summary)),
        section("limits", "What these numbers cannot show", Bullets(tuple(map(Markdown, _LIMITS))), finding=STABILITY),
        section("regenerate", "How to make this page again", Shell(tuple(regenerate)) if regenerate else None,
                finding="the command"),
    ]  # fmt: skip
    words = _bullets([*finding_words(summary), *sentences(summary, frames)])
    return Page(
        f"Corrections simulated: {summary['label']}",
        (),
        show(key),
        tuple(block for block in (words, SIGN_WORDS) if block),
        tuple(part for part in sections if part is not None),
        tuple(block for block in lead_blocks(summary, frames) if block),
        "What was found, in words",
        plain(_base_words(summary)),
    )


def lead_blocks(summary: Mapping[str, Any], frames: Frames) -> list[Block | None]:
    """What is wrong with the tokens, the band with its reason, and what to paste for it into each framework."""
    lines = [*finding_words(summary), *band_words(frames.get("recommended_band"))]
    if not lines:
        least = mask_words(frames["correction_statistics"])
        return [_whole(f"{least} No band was swept: add --sweep for one to start from.")]
    first, *rest = lines
    paste = paste_blocks(frames.get("recommended_band"))
    intro = Markdown("**Paste the band into** (the names are the framework's own):") if paste else None
    return [Markdown(f"**{_whole(first)}**"), _bullets(rest), intro, *paste]


def paste_blocks(recommended: pd.DataFrame | None) -> list[Paste]:
    """The recommended band in the words of every framework that takes one."""
    if recommended is None or recommended.empty or not is_number(recommended["alpha"].iloc[0]):
        return []
    low, high = float(recommended["alpha"].iloc[0]), float(recommended["beta"].iloc[0])
    return [
        Paste(one.framework, one.where, one.language, one.lines(low, high), one.source)
        for preset in PRESETS.values()
        for one in preset.settings
    ]


def sentences_of(statistics: pd.DataFrame, frames: Frames) -> dict[str, str]:
    """The lines of sections whose words are lists: the first of each."""
    recommended = band_words(frames.get("recommended_band"))
    same = same_words(frames)
    more = f" (and {len(same) - 1} more such groups)" if len(same) > 1 else ""
    k3 = statistics.set_index("correction")["kept_k3"].get("none")
    return {
        "masked": mask_words(statistics),
        "flips": flip_words(statistics)[-1],
        "ratios": f"k3 of all tokens: {number(k3)} nat" if is_number(k3) else "",
        "sweep": recommended[0] if recommended else "",
        "same": f"{same[0].removesuffix('.')}{more}" if same else "no two mask the same tokens",
    }


def entropy_words(statistics: pd.DataFrame) -> str:
    """Entropy of masked and kept tokens of the correction that masks most."""
    some = statistics[(statistics["n_entropy_masked"] > 0) & (statistics["n_entropy_kept"] > 0)]
    if some.empty:
        return ""
    row = records(some.sort_values("n_entropy_masked", kind="stable"))[-1]
    return (
        f"{row['correction']}: masked tokens {number(row['entropy_masked'])} nat, kept ones "
        f"{number(row['entropy_kept'])} nat (n = {row['n_entropy_masked']:,} masked)"
    )


def finding_words(summary: Mapping[str, Any]) -> list[str]:
    """The worst that the rules of ``validate`` found in the tokens, which stands before every number."""
    return ["; ".join(line.strip() for line in summary["finding_words"])] if summary["finding_words"] else []


def sentences(summary: Mapping[str, Any], frames: Frames) -> list[str]:
    """What was found, in words."""
    statistics = frames["correction_statistics"]
    lines = [_base_words(summary), mask_words(statistics), *same_words(frames), *flip_words(statistics)]
    lines += band_words(frames.get("recommended_band"))
    lines += audit_words(frames)
    lines += [f"Advantages (looked at by {ADVANTAGE_USERS} only): {summary['reward']}."]
    lines += [f"Left out: {', '.join(summary['left_out'])} (no advantages are known)."] if summary["left_out"] else []
    return [*filter(None, lines), STABILITY]


def _base_words(summary: Mapping[str, Any]) -> str:
    wholes = f"{count(summary['n_scored_sequences'], 'sequence')}, {count(summary['n_scored_prompts'], 'prompt')}"
    return f"{count(summary['n_scored_tokens'], 'scored token')} of {wholes}."


def mask_words(statistics: pd.DataFrame) -> str:
    """How many corrections mask, from least to most."""
    some = statistics[statistics["masked_share"] > 0].sort_values("masked_share", kind="stable")
    n_all = count(len(statistics), "correction")
    if some.empty:
        return f"None of {n_all} masks a token here; what differs is the weights."
    if len(some) == 1:
        row = some.iloc[0]
        return f"1 of {n_all} masks tokens (weight 0): {row['correction']}, {_share_words(row)}."
    least, most = (f"{_share_words(row)} for {row['correction']}" for _, row in some.iloc[[0, -1]].iterrows())
    return f"{len(some)} of {n_all} mask tokens (weight 0): from {least} to {most}."


def _share_words(row: pd.Series) -> str:
    return f"{percent(row['masked_share'])}{_bounds(row, 'masked_share')}"


def same_words(frames: Frames) -> list[str]:
    """Which corrections mask exactly the same tokens."""
    overlap = frames["overlap"]
    same = overlap[(overlap["jaccard"] == 1) & (overlap["n_masked"] > 0)]
    groups = {tuple(sorted(part["other"])) for _, part in same.groupby("correction")}
    n_masked = dict(zip(overlap["correction"], overlap["n_masked"], strict=True))
    return [
        f"Exactly the same {count(n_masked[group[0]], 'token')} masked here by: {', '.join(group)}."
        for group in sorted(groups)
        if len(group) > 1
    ]


def flip_words(statistics: pd.DataFrame) -> list[str]:
    """Whether masked tokens are flipped tokens, and how many of the flipped ones are masked."""
    known = statistics[statistics["flipped_share"].notna()]
    if known.empty:
        return ["Routing is not known for these tokens, so nothing can be said about flips."]
    base = known.iloc[0]
    share = f"{percent(base['flipped_share'])} of {count(base['n_routed'], 'token')}"
    lines = [f"Routing flipped behind {share}{_bounds(base, 'flipped_share')}."]
    some = known[known["n_masked_routed"] > 0]
    if some.empty:
        return [*lines, "No correction masks a token whose routing is known."]
    best = some.sort_values(["precision", "n_masked_routed"]).iloc[-1]
    most = some.sort_values("recall").iloc[-1]
    words = (
        f"Do masks catch flips? Highest precision: {best['correction']}, {percent(best['precision'])} of its "
        f"{count(best['n_masked_routed'], 'masked token')} are flipped{_bounds(best, 'precision')}, yet it catches "
        f"{percent(best['recall'])} of the flipped tokens."
    )
    if most["correction"] != best["correction"]:
        highest = f"{most['correction']}, {percent(most['recall'])}"
        words += f" Highest recall: {highest}, at a precision of {percent(most['precision'])}."
    lines.append(words)
    return [*lines, _clear_words(some, float(base["flipped_share"]))]


def _clear_words(some: pd.DataFrame, base: float) -> str:
    found = some.loc[some["precision_ci_low"] > base, "correction"]
    n_bare = int(some["precision_ci_low"].isna().sum())
    bare = f" ({n_bare} more have too few prompts for an interval)" if n_bare else ""
    return (
        f"Of {count(len(some), 'mask')}, those whose whole interval of precision lies above the base rate: "
        f"{', '.join(found) or 'none'}{bare}."
    )


def band_words(recommended: pd.DataFrame | None) -> list[str]:
    """The recommended band with its reason and caveat, or why there is none."""
    if recommended is None or recommended.empty:
        return []
    row = recommended.iloc[0]
    if not is_number(row["alpha"]):
        return [f"No band is recommended. {row['reason']}"]
    band = f"Band to start from: [{row['alpha']:g}, {row['beta']:g}], masking {percent(row['masked_share'])} of tokens"
    caveat = str(row["caveat"]).removesuffix(STABILITY).strip()
    return [f"{band}{_bounds(row, 'masked_share')}.", f"Why: {row['reason']}", f"Caution: {caveat}"]


def _bounds(row: Row | pd.Series, name: str) -> str:
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f" (95 %: {percent(low)} to {percent(high)})" if is_number(low) and is_number(high) else ""


def source_words(summary: Mapping[str, Any]) -> list[str]:
    """What was read, and how."""
    return [
        f"{summary['label']}: {count(summary['n_rows'], 'row')}, {count(summary['n_tokens'], 'response token')}.",
        *(f"{note}." for note in summary["notes"]),
        f"Advantages (looked at by {ADVANTAGE_USERS} only): {summary['reward']}.",
        f"PPO clip for the clip share and the objective: {summary['eps_clip']:g}.",
    ]


def short_rows(statistics: pd.DataFrame) -> list[list[Markdown | str]]:
    """The rows of the short table, cell by cell under :data:`HEADER`."""
    return [
        [
            row["correction"],
            number(row["masked_share"], "share"),
            interval(row["masked_share_ci_low"], row["masked_share_ci_high"], "share"),
            *(number(row[name], "share") for name in ("masked_sequence_share", "below_share", "above_share")),
            *(number(row[name], "share") for name in ("ess_token", "ess_sequence")),
            number(row["weight_mean"], "1"),
            interval(row["weight_mean_ci_low"], row["weight_mean_ci_high"], "1"),
            number(row["kept_k3"]),
        ]
        for row in records(statistics)
    ]


def short_table(statistics: pd.DataFrame) -> Table:
    """One row per correction: what it masks, and what that leaves."""
    n = count(int(statistics["n_tokens"].max()) if len(statistics) else 0, "scored token")
    caption = (
        f"Corrections on the same {n}: share of tokens and of whole sequences with weight 0 (lower loses less), on "
        "which side; effective sample size (1 is best); mean weight; k3 of kept tokens (lower is better)"
    )
    return table(HEADER, short_rows(statistics), range(1, len(HEADER)), caption)


def entropy_table(statistics: pd.DataFrame) -> Table | None:
    """Entropy of masked and of kept tokens, of the corrections that mask."""
    some = statistics[statistics["n_entropy_masked"] > 0]
    rows = [
        [
            row["correction"],
            *_measured(row, "entropy_masked"),
            count(row["n_entropy_masked"]),
            *_measured(row, "entropy_kept"),
            count(row["n_entropy_kept"]),
        ]
        for row in records(some)
    ]
    header = ["correction", "masked [nat]", "95 %", "n", "kept [nat]", "95 %", "n"]
    return table(header, rows, range(1, 7), "Mean infer-side entropy of masked and kept tokens") if rows else None


def flip_table(statistics: pd.DataFrame) -> Table | None:
    """Precision and recall of every mask against flipped tokens."""
    some = statistics[(statistics["n_masked_routed"] > 0) & statistics["precision"].notna()]
    rows = [
        [row["correction"], count(row["n_masked_routed"])]
        + [cell for name in ("precision", "recall", "flipped_share") for cell in _measured(row, name, "share")]
        for row in records(some)
    ]
    header = ["correction", "n masked", "precision", "95 %", "recall", "95 %", "base rate", "95 %"]
    caption = "Masks against tokens with at least one flipped layer behind them; at chance, precision is the base rate"
    return table(header, rows, range(1, 8), caption) if rows else None


def _measured(row: Row, name: str, unit: str = "nat") -> list[Markdown]:
    return [number(row[name], unit), interval(row[f"{name}_ci_low"], row[f"{name}_ci_high"], unit)]


def preset_table(summary: Mapping[str, Any]) -> Table:
    """Every correction in words, the presets that are it, and what differs in their sources."""
    rows = [
        [name, code(one["words"]), ", ".join(one["presets"]) or NONE, _whole("; ".join(one["notes"])) or NONE]
        for name, one in summary["corrections"].items()
    ]
    return table(["correction", "in words", "presets", "what their sources do differently"], rows, caption="Presets")


def _left_out(summary: Mapping[str, Any]) -> Markdown | None:
    if not summary["left_out"]:
        return None
    names = ", ".join(summary["left_out"])
    return Markdown(f"Left out: {plain(names)}: {_whole(next(iter(summary['left_out'].values())))}.")


def _sweep_blocks(frames: Frames) -> list[Block | None]:
    sweep = frames.get("sweep_by_band")
    if sweep is None or sweep.empty:
        return []
    front = sweep[sweep["is_on_k3_frontier"]].sort_values("masked_share", kind="stable")
    front = front.drop_duplicates(["masked_share", "kept_k3"])
    rows = [
        [
            f"{row['alpha']:g} to {row['beta']:g}",
            *_measured(row, "masked_share", "share"),
            *_measured(row, "kept_k3"),
            number(row["weight_variance"], "1"),
            number(row["ess_token"], "share"),
        ]
        for row in records(front.iloc[_even(len(front), _FRONTIER_ROWS)])
    ]
    header = ["band", "masked", "95 %", "k3 left [nat]", "95 %", "variance of w", "ESS"]
    caption = f"Bands on the frontier, {len(rows)} of {len(front)} different ones; {count(len(sweep), 'band')} swept"
    words = band_words(frames.get("recommended_band"))
    return [_bullets(words), table(header, rows, range(1, 7), caption)]


def _bullets(lines: Sequence[str]) -> Bullets | None:
    return Bullets(tuple(map(_whole, lines))) if lines else None


def _whole(text: str) -> Markdown:
    """Our own sentences neutralised piece by piece: as one text they would be cut."""
    return Markdown(" ".join(map(plain, textwrap.wrap(text, 200, break_on_hyphens=False))))


def _even(n: int, most: int) -> list[int]:
    """At most so many of n places, both ends among them."""
    return sorted({round(i * (n - 1) / max(min(n, most) - 1, 1)) for i in range(min(n, most))})


def _strata_blocks(frames: Frames) -> list[Block]:
    strata = frames["masked_by_stratum"]
    statistics = frames["correction_statistics"]
    masking = statistics.loc[statistics["masked_share"] > 0, "correction"]
    rows = strata[strata["correction"].isin(masking)]
    if rows.empty:
        return []
    return [frame_table("masked_by_stratum", rows, View(n_markdown=_STRATA_ROWS, is_list=len(rows) > _STRATA_ROWS))]


def _all_blocks(statistics: pd.DataFrame) -> list[Block]:
    notes = [note for note in dict.fromkeys(statistics["note"]) if note]
    lines: list[Block] = [Markdown(f"Not computed: {_whole('; '.join(notes))}.")] if notes else []
    shown = statistics.drop(columns=["words", "note"]).dropna(axis=1, how="all")
    return [*lines, frame_table("correction_statistics", shown)]
