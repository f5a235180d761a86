"""report.md: a page as markdown, short enough to be pasted into an issue.

Invariant: what is not folded stays under 60 lines, however much was measured: details stand in ``<details>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from moediag.report.blocks import Block, Page, Section, Verdict
from moediag.report.text import Markdown, plain

_MOST_RUNS: Final = 8
_MOST_ROWS: Final = 24  # of the first table: more is folded
_OPEN: Final = ("limits",)
_LINK: Final = re.compile(r"(?<!\\)\[((?:\\.|[^\]\\])+)\]\(#[\w-]+\)")


def markdown_page(page: Page) -> str:
    """The page as markdown; figures are linked from the folder it stands beside."""
    lead = () if page.is_of_one else map(_first, page.lead)
    parts = [f"# {plain(page.title)}", *lead, *_verdicts(page.verdicts), *map(_first, page.first)]
    parts += [str(page.picture)] if page.picture else []
    parts += _sections(page.sections)
    return "\n\n".join(parts) + "\n"


def _verdicts(verdicts: tuple[Verdict, ...]) -> list[str]:
    if len(verdicts) == 1 and not verdicts[0].label:
        verdict = verdicts[0]
        evidence = "\n".join(f"- {line}" for line in (*verdict.directions, *verdict.evidence))
        return [part for part in (_headed(verdict), evidence, verdict.seen) if part]
    lines = [f"- {plain(verdict.label)}: {_headed(verdict)} {verdict.seen}" for verdict in verdicts]
    return ["\n".join(lines)] if len(lines) <= _MOST_RUNS else [_folded("Verdicts", ["\n".join(lines)])]


def _headed(verdict: Verdict) -> str:
    reason = f": {verdict.reason}" if verdict.reason else ""
    return f"**Verdict: {plain(verdict.word)}**{reason}{'' if reason.endswith('.') else '.'}"


def _first(block: Block) -> str:
    text = _text(block)
    return text if text.count("\n") <= _MOST_ROWS else _folded("Headline numbers", [text])


def _sections(sections: tuple[Section, ...]) -> Iterable[str]:
    """Folded sections stand line by line: an empty line between them would count, and say nothing."""
    folds: list[str] = []
    for part in sections:
        body = [_text(block) for block in part.blocks]
        if part.anchor not in _OPEN:
            folds.append(_folded(str(plain(part.title)), body))
            continue
        if folds:
            yield "\n".join(folds)
        folds = []
        yield f"## {plain(part.title)}\n\n" + "\n\n".join(body)
    if folds:
        yield "\n".join(folds)


def _folded(title: str, body: list[str]) -> str:
    inside = "\n\n".join(body)
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>"


def _text(block: Block) -> str:
    text = str(block)
    # Anchors are the HTML page's: a code host knows none inside a folded part.
    return _LINK.sub(r"*\1*", text) if isinstance(block, Markdown) else text
