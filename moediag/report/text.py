"""Text that is safe by construction: user text is neutralised before it reaches a page, in markdown and in HTML.

Invariants:
    - only :class:`Markdown` is trusted as markup. Any other text, whatever its origin (a model path, a token, an
      engine's version string), goes through :func:`plain` or :func:`code` first;
    - HTML is made from that same markdown, piece by piece, and every piece is escaped: what the converter does not
      know stays text, so a page in HTML can hold no element but the few named in :func:`to_html`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from markupsafe import Markup, escape

from moediag.numbers import NONE

MAX_TEXT: Final = 300
"""User text longer than this is cut: a report is no place for a pasted prompt."""
_LONGEST_WORDS: Final = 2000
"""The diagnosis's own words are longer, and hold names of the user's, which may be of any length."""

_UNSEEN: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that can make a page lie, or cannot be written: control, direction, half characters."""

_ACTIVE: Final = re.compile(r"([\\`*_\[\]#|~$!@{}])")
_NAMED: Final = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

_INLINE: Final = re.compile(
    r"\\(?P<escaped>[!-/:-@\[-`{-~])"
    r"|&(?P<entity>amp|lt|gt);"
    r"|(?<!`)(?P<fence>`+)(?!`)(?P<code>.+?)(?<!`)(?P=fence)(?!`)"
    r"|\*\*(?P<strong>(?:\\.|[^*\\]|\*(?!\*))+)\*\*"
    r"|\*(?P<em>(?:\\.|[^*\\])+)\*"
    r"|\[(?P<label>(?:\\.|[^\]\\])+)\]\((?P<target>#[\w-]+)\)",
    re.DOTALL,
)

_PERCENT: Final = re.compile(r"(?<=\d) (?=%)")


class Markdown(str):
    """Text that is markup on purpose; whoever makes one vouches for what went into it."""

    __slots__ = ()


def one_line(text: object, longest: int = MAX_TEXT) -> str:
    """Text as one line without control and direction characters (they can make a page lie), cut if longer."""
    kept = (" " if unicodedata.category(c) in _UNSEEN else c for c in str(text))
    line = " ".join("".join(kept).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def visible(text: str, longest: int = MAX_TEXT, keep_end: bool = False) -> str:
    r"""Text of a model as one line in which nothing hides: escapes for what cannot be seen, marks for end spaces.

    Args:
        longest: more characters are cut away [character].
        keep_end: cut at the beginning, not at the end.

    Example:
        >>> visible(" a\n\u202eb"), visible("x" * 9, 5), visible("abcdefghi", 5, keep_end=True)
        ('␣a\\n\\u202eb', 'xxxx…', '…fghi')
    """
    if len(text) > longest:  # before escaping: a cut escape would be another text
        text = "…" + text[1 - longest :] if keep_end else text[: longest - 1] + "…"
    shown = "".join(map(escaped, text))
    body = shown.strip(" ")
    if not body:
        return "␣" * len(shown)
    n_before = len(shown) - len(shown.lstrip(" "))
    return "␣" * n_before + body + "␣" * (len(shown) - n_before - len(body))


def escaped(character: str) -> str:
    """A character as it can be seen: an escape for what cannot."""
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _UNSEEN:
        number = ord(character)
        return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    return " " if character.isspace() else character


def own_words(text: object) -> Markdown:
    """What the diagnosis says, with names of the user's in it, as literal text."""
    return plain(text, _LONGEST_WORDS)


def plain(text: object, longest: int = MAX_TEXT) -> Markdown:
    r"""User text as literal text: no markup, no HTML, no automatic link.

    Example:
        >>> plain("<b>*x*</b> | [a](https://e.org)")
        '&lt;b&gt;\\*x\\*&lt;/b&gt; \\| \\[a\\](https\\://e.org)'
    """
    line = one_line(text, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _ACTIVE.sub(r"\\\1", line)
    return Markdown(line.replace("://", r"\://").replace("www.", r"www\."))


def code(text: object) -> Markdown:
    r"""User text as a code span, whatever backticks and pipes it holds.

    Example:
        >>> code("a`b|c")
        '``a`b\\|c``'
    """
    line = one_line(text)
    if not line:
        return Markdown(NONE)
    fence = fence_for(line)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    # A pipe ends a table cell even inside a code span; GitHub takes the backslash off again.
    return Markdown(f"{fence}{pad}{line}{pad}{fence}".replace("|", r"\|"))


def whole_line(text: str) -> str:
    """A command to copy, whole: one that is cut or re-spaced would be another command."""
    return "".join("?" if unicodedata.category(c) in _UNSEEN else c for c in text)


def fence_for(text: str, least: int = 1) -> str:
    """Backticks that no run of them in ``text`` can close."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def to_html(text: str) -> Markup:
    r"""Our inline markdown as HTML: strong, em, code and links inside the page; all else is escaped text.

    Example:
        >>> to_html("**a\\*** `<b>` <i>")
        Markup('<strong>a*</strong> <code>&lt;b&gt;</code> &lt;i&gt;')
    """
    pieces, end = [], 0
    for match in _INLINE.finditer(text):
        pieces += [_literal(text[end : match.start()]), _piece(match)]
        end = match.end()
    return Markup("").join([*pieces, _literal(text[end:])])


def _literal(text: str) -> Markup:
    """Text as it is; a number and its per cent sign stay on one line."""
    return escape(_PERCENT.sub("\u00a0", text))


def _piece(match: re.Match[str]) -> Markup:
    found = match.groupdict()
    if found["escaped"]:
        return escape(found["escaped"])
    if found["entity"]:
        return Markup(f"&{found['entity']};")  # one of three that are spelt out in the pattern
    if found["code"]:
        body = found["code"].replace(r"\|", "|")
        is_padded = body.startswith(" `") or body.endswith("` ")
        return Markup("<code>{}</code>").format(body[1:-1] if is_padded else body)
    if found["strong"]:
        return Markup("<strong>{}</strong>").format(to_html(found["strong"]))
    if found["em"]:
        return Markup("<em>{}</em>").format(to_html(found["em"]))
    return Markup('<a href="{}">{}</a>').format(found["target"], to_html(found["label"]))
