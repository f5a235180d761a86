"""Text around single tokens, from the run's token table and a ``tokenizer.json``; needs no engine.

Invariants:
    - only shards that hold a token requested are read;
    - a tokenizer that nobody named is used only if it is the run's by digest: text of another vocabulary would be
      made up. Without one there are token ids;
    - ``no_text`` reads nothing: what was withheld cannot leak from a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from moediag.errors import DependencyError, RunError
from moediag.run.capture import TokenRows
from moediag.run.files import tokenizer_digest
from moediag.run.reader import Run

N_BEFORE: Final = 48
"""Tokens of context shown before a token."""

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class TokenText:
    """A token and what stands before it."""

    before: str
    token: str


@dataclass(frozen=True)
class TokenTexts:
    """Text of the tokens that a page lists.

    Args:
        texts: (sequence, position in the response) -> text.
        note: where the text is from, or why there is none.
        is_withheld: no text may be shown: not even token ids are shown.
    """

    texts: Mapping[tuple[int, int], TokenText] = field(default_factory=dict)
    note: str = "No tokenizer was read: tokens are shown by id."
    is_withheld: bool = False

    def of(self, seq_id: int, position: int) -> TokenText | None:
        """The text of one token; None where there is none."""
        return self.texts.get((seq_id, position))


WITHHELD: Final = TokenTexts(note="Tokens and the text before them were left out (--no-text).", is_withheld=True)


def token_texts(
    run: Run, worst: pd.DataFrame | None, tokenizer: Path | None = None, no_text: bool = False
) -> TokenTexts:
    """Text, or else ids, of tokens and of the tokens before them.

    Args:
        worst: columns seq_id and position; further ones are not looked at.
        tokenizer: ``tokenizer.json`` or its folder; None = the run's checkpoint, if it is still at its place.
        no_text: give nothing.

    Raises:
        RunError: the tokenizer that was named cannot be read.
        DependencyError: it was named and the package ``tokenizers`` is missing.
    """
    if no_text:
        return WITHHELD
    if worst is None or worst.empty:
        return TokenTexts()
    decode, note = _decoder(run, tokenizer)
    positions_of: dict[int, list[int]] = {}
    for seq_id, position in zip(worst["seq_id"].tolist(), worst["position"].tolist(), strict=True):
        positions_of.setdefault(int(seq_id), []).append(int(position))
    texts: dict[tuple[int, int], TokenText] = {}
    for shard in run.shards:
        here = {seq_id: positions_of[seq_id] for seq_id in shard.seq_ids if seq_id in positions_of}
        if here:
            texts |= _texts_of(run.tokens(shard), here, decode)
    return TokenTexts(texts, note)


def _texts_of(
    rows: TokenRows, positions_of: Mapping[int, list[int]], decode: Decode
) -> dict[tuple[int, int], TokenText]:
    texts = {}
    for seq_id, positions in positions_of.items():
        is_here_T = rows.seq_id_T == seq_id
        ids = rows.token_id_T[is_here_T].tolist()
        response = np.flatnonzero(rows.is_response_T[is_here_T])
        for position in positions:
            at = int(response[0]) + position if len(response) else len(ids)
            if at < len(ids):
                texts[seq_id, position] = _text_at(ids, at, decode)
    return texts


def _text_at(ids: Sequence[int], at: int, decode: Decode) -> TokenText:
    """Decode the context with and without the token: a token alone may lose its space or half a character."""
    before_ids = list(ids[max(0, at - N_BEFORE) : at])
    if decode is _ids:
        return TokenText(_ids(before_ids), f"id {ids[at]}")
    before, whole = decode(before_ids), decode([*before_ids, ids[at]])
    is_appended = whole.startswith(before) and len(whole) > len(before) and not before.endswith("\ufffd")
    return TokenText(before, whole[len(before) :] if is_appended else decode([ids[at]]))


def _decoder(run: Run, tokenizer: Path | None) -> tuple[Decode, str]:
    if tokenizer is not None:
        path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        is_runs = _is_the_runs(run, path.parent)
        doubt = "" if is_runs else " It is not the run's tokenizer (digest differs): the text may be wrong."
        return _reader(path), f"Text decoded with the tokenizer given with --tokenizer.{doubt}"
    checkpoint = run.checkpoint_of(run.main_arms[0])
    folder = Path(checkpoint.source if checkpoint else "").expanduser()
    if not (folder / "tokenizer.json").is_file():
        return _ids, "No tokenizer.json is at hand (give --tokenizer PATH): tokens are shown by id."
    if not _is_the_runs(run, folder):
        return _ids, "The checkpoint's tokenizer is not the run's any more: tokens are shown by id."
    try:
        return _reader(folder / "tokenizer.json"), "Text decoded with the checkpoint's tokenizer."
    except (RunError, DependencyError):
        return _ids, "The checkpoint's tokenizer.json could not be read: tokens are shown by id."


def _is_the_runs(run: Run, folder: Path) -> bool:
    try:
        return run.record.tokenizer is not None and tokenizer_digest(folder) == run.record.tokenizer.files_sha256
    except OSError:
        return False


def _reader(path: Path) -> Decode:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DependencyError("--tokenizer needs the package tokenizers; run: pip install tokenizers") from None
    try:
        core: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise RunError(f"{path} is not a tokenizer.json that tokenizers reads ({error}); give another") from None
    # a token whose id is not known (-1) has no text
    return lambda ids: str(core.decode([one for one in ids if one >= 0], skip_special_tokens=False))


def _ids(ids: list[int]) -> str:
    """Ids, where there is no vocabulary."""
    return " ".join(map(str, ids))
