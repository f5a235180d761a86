"""report.md: a page as markdown, short enough to be pasted into an issue.

Invariant: what is not folded stays under 60 lines, however much was measured: details stand in ``<details>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from markupsafe import escape

from moediag.report.blocks import Block, Page, Paste, Section, Table, Verdict
from moediag.report.text import Markdown, plain

_MOST_RUNS: Final = 8
_MOST_ROWS: Final = 24  # of the first table: more is folded
_OPEN: Final = ("limits",)
_LINK: Final = re.compile(r"(?<!\\)\[((?:\\.|[^\]\\])+)\]\(#[\w-]+\)")


def markdown_page(page: Page) -> str:
    """The page as markdown; figures are linked from the folder it stands beside."""
    lead = [] if page.is_of_one else _lead(page.lead)
    first = [_first(block, is_folded=bool(lead)) for block in page.first]
    parts = [f"# {plain(page.title)}", *lead, *_verdicts(page.verdicts), *first]
    parts += [str(page.picture)] if page.picture else []
    parts += _sections(page.sections)
    return "\n\n".join(parts) + "\n"


def _verdicts(verdicts: tuple[Verdict, ...]) -> list[str]:
    if not verdicts:
        return []
    if len(verdicts) == 1 and not verdicts[0].label:
        verdict = verdicts[0]
        evidence = "\n".join(f"- {line}" for line in (*verdict.directions, *verdict.evidence))
        return [part for part in (_headed(verdict), evidence, verdict.seen) if part]
    lines = [f"- {plain(verdict.label)}: {_headed(verdict)} {verdict.seen}" for verdict in verdicts]
    return ["\n".join(lines)] if len(lines) <= _MOST_RUNS else [_folded("Verdicts", ["\n".join(lines)])]


def _headed(verdict: Verdict) -> str:
    reason = f": {verdict.reason}" if verdict.reason else ""
    return f"**Verdict: {plain(verdict.word)}**{reason}{'' if reason.endswith('.') else '.'}"


def _lead(blocks: Sequence[Block]) -> list[str]:
    """What a page leads with; what is to be pasted is folded, line by line."""
    parts = [_first(block) for block in blocks if not isinstance(block, Paste)]
    pastes = [
        _folded(escape(f"{block.name}: {block.where}"), [str(block)]) for block in blocks if isinstance(block, Paste)
    ]
    return [*parts, "\n".join(pastes)] if pastes else parts


def _first(block: Block, is_folded: bool = False) -> str:
    """A block of the first screen; a long table is folded, and every one where the page leads with a shorter one."""
    text = _text(block)
    is_short = text.count("\n") <= _MOST_ROWS and not (is_folded and isinstance(block, Table))
    return text if is_short else _folded("Headline numbers", [text])


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
