"""What a page is made of: sections of text, tables, pictures and commands, said once and written twice.

Invariant: markdown and HTML are two renderings of the same blocks, so that no number can differ between them; a
table that markdown shows in part says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from moediag.figures import FIGURES, SIMULATION_FIGURES, TREND_FIGURES
from moediag.numbers import NONE, in_unit, is_number
from moediag.report.text import Markdown, code, fence_for, plain, whole_line
from moediag.report.token_view import TokenView

_FIGURES: Final = FIGURES | SIMULATION_FIGURES | TREND_FIGURES


_NOTHING: Final = Markdown("")


@dataclass(frozen=True)
class Table:
    """A table whose cells are already neutralised; :func:`table` makes one.

    Args:
        header, rows: cells as inline markdown.
        right: columns that are right-aligned (numbers).
        caption: what it shows; HTML needs one for readers who do not see the page.
        is_list: a long list that readers sort and filter.
        n_markdown: rows shown in markdown; None = all of them.
    """

    header: tuple[Markdown, ...]
    rows: tuple[tuple[Markdown, ...], ...]
    right: frozenset[int]
    caption: Markdown
    is_list: bool = False
    n_markdown: int | None = None

    def __str__(self) -> str:
        rule = "|".join("--:" if i in self.right else ":--" for i in range(len(self.header)))
        lines = [_line(self.header), f"|{rule}|", *map(_line, self.rows[: self.n_markdown])]
        left_out = len(self.rows) - len(self.rows[: self.n_markdown])
        if left_out:
            lines += ["", f"The first {self.n_markdown} of {len(self.rows)} rows; all of them stand in report.html."]
        return "\n".join(lines)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Iterable[int] = (),
    caption: str = "",
    *,
    is_list: bool = False,
    n_markdown: int | None = None,
) -> Table:
    """A table; whatever is not :class:`Markdown` is neutralised on its way in.

    Example:
        >>> print(table(["what", "n"], [["a|b", "3"]], right=[1]))
        | what | n |
        |:--|--:|
        | a\\|b | 3 |
    """
    cells = tuple(tuple(map(_cell, row)) for row in rows)
    return Table(tuple(map(_cell, header)), cells, frozenset(right), _cell(caption), is_list, n_markdown)


def _cell(value: object) -> Markdown:
    return value if isinstance(value, Markdown) else plain(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Picture:
    """A figure file that stands in a folder beside the page.

    Args:
        title: what it shows, the alternative text; by default as the figure declares it.
        caption: how to read it; by default as the figure declares it.
    """

    path: Path
    title: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        kind = _FIGURES.get(self.name)
        object.__setattr__(self, "title", self.title or (kind.title if kind else self.name))
        object.__setattr__(self, "caption", self.caption or (kind.caption if kind else ""))

    @property
    def name(self) -> str:
        """Name of the figure."""
        return self.path.stem

    def __str__(self) -> str:
        target = self.path.relative_to(self.path.parent.parent)
        return f"![{plain(self.title)}]({quote(target.as_posix())})"


@dataclass(frozen=True)
class Shell:
    """Commands to copy."""

    commands: tuple[str, ...]

    @property
    def body(self) -> str:
        """The commands, one a line."""
        return "\n".join(map(whole_line, self.commands))

    def __str__(self) -> str:
        fence = fence_for(self.body, 3)
        return f"{fence}sh\n{self.body}\n{fence}"


@dataclass(frozen=True)
class Bullets:
    """A list of inline markdown."""

    items: tuple[Markdown, ...]

    def __str__(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)


@dataclass(frozen=True)
class Paste:
    """What to put into a file or command line of another tool.

    Args:
        name: the tool's.
        where: which file or command takes it.
        language: what it is written in, as code hosts call it.
        body: the lines.
        source: where the tool reads them: repository, commit, file and line.
    """

    name: str
    where: str
    language: str
    body: str
    source: str

    def __str__(self) -> str:
        fence = fence_for(self.body, 3)
        return f"Read there by {plain(self.source)}.\n\n{fence}{self.language}\n{self.body}\n{fence}"


Block = Markdown | Table | Picture | Shell | Bullets | Paste | TokenView


@dataclass(frozen=True)
class Section:
    """One question of the reader's, folded.

    Args:
        finding: what it found, in one line; empty where there is nothing to say of it.
    """

    anchor: str
    title: str
    blocks: tuple[Block, ...]
    finding: Markdown = _NOTHING


ANSWERS: Final = {
    "good": "No",
    "warn": "Something to look at",
    "bad": "Yes",
    "calm": "Not known yet",
}
"""Tone of a verdict -> whether something is wrong."""


@dataclass(frozen=True)
class Verdict:
    """The verdict of one run.

    Args:
        label: the run's name in a comparison; empty on a run's own page.
        word, tone: one of the verdict's words in :mod:`moediag.diagnosis.verdict`, and what it means: ``good``,
            ``calm``, ``warn`` or ``bad``.
        reason: why that word.
        where: where the cause is, as far as known; may be empty.
        then: what to do next; ``commands`` to do it with.
        evidence: lines that carry it.
        seen: what was measured, in sentences.
    """

    label: str
    word: str
    tone: str
    reason: Markdown
    where: Markdown
    then: Markdown
    commands: tuple[str, ...]
    evidence: tuple[Markdown, ...]
    seen: Markdown

    @property
    def answer(self) -> str:
        """Whether something is wrong, in a word or two."""
        return ANSWERS.get(self.tone, ANSWERS["calm"])

    @property
    def directions(self) -> list[Markdown]:
        """Where the cause is and what to do next, a line each; what is not known is left out."""
        commands = ", ".join(map(code, self.commands))
        then = f"{self.then}{': ' if self.then and commands else ''}{commands}"
        lines = [("Where", self.where), ("Next", then)]
        return [Markdown(f"**{name}**: {words}{'' if words.endswith('.') else '.'}") for name, words in lines if words]


@dataclass(frozen=True)
class Page:
    """A whole page: first screen (verdicts, what it leads with, key picture), then what carries it, then sections.

    Args:
        lead: what stands beside the picture; before the verdicts where these are of several runs. Of one run it stands
            in a section, too, and there only in markdown.
        first: the first of the sections, with its title and finding; markdown does not fold it.
    """

    title: str
    verdicts: tuple[Verdict, ...]
    picture: Picture | None
    first: tuple[Block, ...]
    sections: tuple[Section, ...]
    lead: tuple[Block, ...] = ()
    first_title: str = "Evidence and headline numbers"
    first_finding: Markdown = _NOTHING

    @property
    def is_of_one(self) -> bool:
        """Whether the page is of one run, whose verdict comes before everything."""
        return len(self.verdicts) == 1 and not self.verdicts[0].label


def section(anchor: str, title: str, *blocks: Block | None, finding: str = "") -> Section | None:
    """A section of the blocks that are there; None when there are none."""
    present = tuple(block for block in blocks if block)
    return Section(anchor, title, present, _cell(finding)) if present else None


def number(value: Any, unit: str = "nat") -> Markdown:
    """A value in its unit's habit: shares as per cent, else three significant digits, more for a ratio near 1."""
    return Markdown(in_unit(value, unit))


def interval(low: Any, high: Any, unit: str = "nat", note: str = "") -> Markdown:
    """``low to high``, or the en dash with the reason."""
    if is_number(low) and is_number(high):
        return Markdown(f"{number(low, unit)} to {number(high, unit)}")
    return Markdown(f"{NONE} ({plain(note)})" if note else NONE)
