"""The demo's text: the help topics that ship inside CPython, split into training text and prompts.

Invariants: no prompt's paragraph occurs in the training text, in any wrapping or indentation (the
topics quote each other, so the split is by content, not by place); both are pure functions of the
interpreter's ``pydoc_data.topics``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pydoc_data.topics import topics

END_OF_TEXT = "<|endoftext|>"
"""Separates topics in the training text, so that the model learns to end a response."""

PROMPT_BYTES = (100, 128)
"""Fewest and most UTF-8 bytes of a prompt."""

_MIN_PARAGRAPH_BYTES = 160
_HELD_OUT_ONE_IN = 5


def training_text() -> str:
    """All topics but the held-out paragraphs, ``END_OF_TEXT`` after each topic.

    Returns:
        About 0.4 MB of prose, grammar and code.
    """
    kept = ("\n\n".join(p for p in topics[name].split("\n\n") if not _is_held_out(p)) for name in sorted(topics))
    return "".join(topic.strip() + END_OF_TEXT for topic in kept)


def demo_prompts(n: int) -> list[str]:
    """Openings of held-out paragraphs, as prompts that the pair was not trained on.

    Args:
        n: number of prompts; at least 64 are there.

    Returns:
        n distinct prompts of 100 to 128 UTF-8 bytes, the same ones in the same order every time,
        and the first m of n are what ``demo_prompts(m)`` returns.

    Raises:
        ValueError: the topics hold fewer than n such openings.

    Example:
        >>> demo_prompts(8) == demo_prompts(64)[:8]
        True
    """
    prompts = _all_prompts()
    if not 0 <= n <= len(prompts):
        raise ValueError(f"n: expected 0 to {len(prompts)} prompts (all that the help topics hold out), found {n}")
    return list(prompts[:n])


@cache
def _all_prompts() -> tuple[str, ...]:
    held_out = {_content(p): p for p in _paragraphs() if _is_held_out(p)}
    # By digest: consecutive prompts come from all over the topics, so a short list is varied too.
    openings = (_opening(held_out[content]) for content in sorted(held_out, key=_digest))
    # A paragraph that is kept may begin like one that is held out (repeated code examples do).
    trained_on = _content(training_text())
    return tuple(dict.fromkeys(p for p in openings if p is not None and _content(p) not in trained_on))


def _paragraphs() -> Iterator[str]:
    for name in sorted(topics):
        yield from topics[name].split("\n\n")


def _content(paragraph: str) -> str:
    """The words alone: the topics repeat each other's paragraphs re-wrapped and re-indented."""
    return " ".join(paragraph.split())


def _digest(content: str) -> int:
    return int.from_bytes(sha256(content.encode()).digest()[:8], "big")


def _is_held_out(paragraph: str) -> bool:
    content = _content(paragraph)
    return len(content.encode()) >= _MIN_PARAGRAPH_BYTES and _digest(content) % _HELD_OUT_ONE_IN == 0


def _opening(paragraph: str) -> str | None:
    """The longest run of whole words that fits in a prompt; None where words are too long for one."""
    text = paragraph.strip()
    shortest, longest = PROMPT_BYTES
    cuts = [i for i, char in enumerate(text) if char.isspace() and len(text[:i].encode()) <= longest]
    opening = text[: cuts[-1]].rstrip() if cuts else ""
    return opening if len(opening.encode()) >= shortest else None
