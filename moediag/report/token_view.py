"""Single tokens of a few responses: what both engines gave, where experts flipped, what corrections would do.

Invariants:
    - a page stays bounded: at most :data:`N_RESPONSES` responses of at most :data:`LONGEST` tokens each, a longer one
      around its worst token. That is 3 MB of HTML with 48 layers of which a tenth flips, and 10 MB at the very worst,
      94 layers of which half flip behind every token;
    - weights are those of :mod:`moediag.corrections` on the whole response, never of the part that is shown;
    - where text is withheld no token's id or text is in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.expert_sets import compare_block
from moediag.corrections.correction import correction_weights
from moediag.corrections.presets import PRESETS
from moediag.errors import MoediagError
from moediag.numbers import NONE, count, percent, sig
from moediag.report.decode import TokenTexts
from moediag.report.text import Markdown, escaped, plain
from moediag.run.align import PairBlock
from moediag.run.capture import is_scored
from moediag.run.reader import Run

N_RESPONSES: Final = 8
LONGEST: Final = 1000
"""Tokens shown of a response."""
_LONGEST_TOKEN: Final = 60
"""Characters shown of a token."""

BINS: Final = (0.03, 0.1, 0.3, 1.0)
"""abs(logp_diff) from which on a token has the next stronger colour [nat]."""

CORRECTIONS: Final = {
    "IcePop 0.5 to 5 (Ring-1T)": "ring-1t",
    "IcePop 0.5 to 2 (GLM-5)": "glm-5",
    "IcePop hard mask 0.5 to 5": "online-icepop",
    "truncated at 2 (TIS)": "tis",
    "token mask at 2 (MIS)": "token-mis",
    "sequence truncated at 2 (verl)": "verl-seq-tis",
    "sequence mask at 3 (TRL)": "trl-seq-mis",
    "geometric band 0.999 to 1.001 (verl)": "verl-geo-rs",
    "KPop 0.1 (prime-rl)": "prime-rl-kpop",
    "IPO 0.1 (prime-rl)": "prime-rl-ipo",
    "TRM, maximum 0.05": "trm-max",
    "TIS with veto (slime)": "slime-tis",
}
"""What a reader sees -> the preset; one or two of each family, none that looks at advantages."""


@dataclass(frozen=True)
class ViewedToken:
    """A token as it is shown.

    Args:
        text: printable; empty where text is withheld.
        ends_line: whether a line of the text ends with it.
        tone: name of its colour.
        flips: MoE layers whose expert set differs behind it.
        facts: position, p_train, p_infer, logp_diff, ratio, margin and flipped layers in words, then what every
            correction makes of it: ``0`` masked, ``r`` the ratio, else the weight.
    """

    text: str
    ends_line: bool
    tone: str
    flips: tuple[int, ...]
    facts: tuple[str, ...]

    @property
    def ticks(self) -> str:
        """The flipped layers as a path, a unit high each from the first layer down."""
        return "".join(f"M0 {layer}h1v1h-1z" for layer in self.flips)

    @property
    def packed(self) -> str:
        """The facts as one attribute."""
        return "|".join(self.facts)


@dataclass(frozen=True)
class Response:
    """A response, or the part of it around its worst token.

    Args:
        words: which it is, and how far apart the engines are over the whole of it.
        before: the end of its prompt; empty where text is withheld or not known.
        left_out: what of it is not shown, in words; empty = nothing.
    """

    seq_id: int
    words: str
    before: str
    tokens: tuple[ViewedToken, ...]
    left_out: str


@dataclass(frozen=True)
class TokenView:
    """Responses token by token; markdown says that they stand in report.html."""

    responses: tuple[Response, ...]
    n_layers: int
    note: str

    @property
    def corrections(self) -> str:
        """The names of the corrections, in the order of the facts."""
        return "|".join(CORRECTIONS)

    @property
    def scale(self) -> list[tuple[str, str]]:
        """(colour, what it stands for), from the most negative difference to the most positive."""
        ends = [*BINS, None]
        size = [
            f"{low:g} to {high:g}" if high else f"{low:g} and more" for low, high in zip(BINS, ends[1:], strict=True)
        ]
        below = [(f"n{n}", f"−({words})") for n, words in enumerate(size, 1)]
        return [*reversed(below), ("z", f"within {BINS[0]:g}"), *((f"p{n}", words) for n, words in enumerate(size, 1))]

    def __str__(self) -> str:
        shown = ", ".join(str(one.seq_id) for one in self.responses)
        return f"Responses {shown} stand token by token in report.html."


def choose_responses(sequences: pd.DataFrame | None, requested: Sequence[int] = ()) -> list[int]:
    """The responses requested, then the worst by mean abs(logp_diff), :data:`N_RESPONSES` at most.

    Args:
        sequences: frame ``sequences``; None = not analysed.

    Raises:
        MoediagError: too many, or one that the run does not have.
    """
    if len(requested) > N_RESPONSES:
        raise MoediagError(f"a page shows {N_RESPONSES} responses at most, found {len(requested)} of --sequence")
    if sequences is None or sequences.empty:
        return []
    known = sequences["seq_id"]
    for seq_id in requested:
        if seq_id not in set(known):
            raise MoediagError(
                f"there is no sequence {seq_id} with a response: expected one of {len(known):,} between {known.min()} "
                f"and {known.max()} (column seq_id of frame sequences)"
            )
    scored = sequences[sequences["n_tokens"] > 0]
    worst = scored.sort_values(["abs_logp_diff_mean", "seq_id"], ascending=[False, True], kind="stable")["seq_id"]
    return list(dict.fromkeys([*requested, *map(int, worst)]))[:N_RESPONSES]


@dataclass(frozen=True)
class ReadResponse:
    """The arrays of a response whose tokens are to be shown; T counts its response tokens."""

    block: PairBlock
    is_flip_TL: NDArray[np.bool_]
    weights_CT: NDArray[np.float64]
    first: int
    last: int

    @classmethod
    def of(cls, block: PairBlock, is_flip_TL: NDArray[np.bool_]) -> Self:
        """A response with what every correction makes of it, and which of its rows are shown.

        Args:
            block: all of its response tokens, and nothing else.
            is_flip_TL: where the expert sets differ.
        """
        return cls(block, is_flip_TL, _weights(block), *_window(block))


def read_responses(run: Run, seq_ids: Sequence[int]) -> list[ReadResponse]:
    """Read responses of the run's main pair, in the order requested; only their shards are read."""
    pair = run.pair(*run.main_arms, seq_ids=seq_ids)
    found: dict[int, ReadResponse] = {}
    for block in pair.blocks():
        seen = compare_block(block)
        for seq_id in set(seq_ids) & set(block.seq_id_T.tolist()):
            rows = np.flatnonzero(block.seq_id_T == seq_id)
            flips_TL = np.zeros((len(block), 0), bool) if seen is None else seen.is_flip_TL
            found[seq_id] = ReadResponse.of(_rows_of(block, rows), flips_TL[rows])
    return [found[seq_id] for seq_id in seq_ids if seq_id in found]


def _rows_of(block: PairBlock, rows: NDArray[np.intp]) -> PairBlock:
    arrays = {name: value[rows] for name, value in vars(block).items() if value is not None}
    return replace(block, **arrays)


def _weights(part: PairBlock) -> NDArray[np.float64]:
    """(C, T) what every correction multiplies the tokens with; unscored tokens get 0."""
    train, infer = part.logp_train_T, part.logp_infer_T
    return np.stack(
        [correction_weights(PRESETS[name].correction, train, infer, part.seq_id_T) for name in CORRECTIONS.values()]
    )


def _window(part: PairBlock) -> tuple[int, int]:
    """Rows shown: all, or those around the worst token."""
    if len(part) <= LONGEST:
        return 0, len(part)
    distance_T = np.abs(part.logp_train_T.astype(np.float64) - part.logp_infer_T)
    worst = int(np.argmax(np.where(np.isfinite(distance_T), distance_T, -1.0)))
    first = min(max(worst - LONGEST // 2, 0), len(part) - LONGEST)
    return first, first + LONGEST


def shown_positions(read: Sequence[ReadResponse]) -> pd.DataFrame:
    """(seq_id, position) of every token that is shown, for :func:`~moediag.report.decode.token_texts`."""
    parts = [(one.block.seq_id_T[one.first : one.last], one.block.position_T[one.first : one.last]) for one in read]
    return pd.DataFrame(
        {
            name: np.concatenate([part[nth] for part in parts]) if parts else np.zeros(0, np.int64)
            for nth, name in enumerate(("seq_id", "position"))
        }
    )


def token_view(read: Sequence[ReadResponse], layers: Sequence[int], texts: TokenTexts) -> TokenView | None:
    """The view of the responses; None where there are none.

    Args:
        layers: decoder layer of every MoE layer; empty = nothing was routed.
        texts: of the tokens of :func:`shown_positions`.
    """
    if not read:
        return None
    return TokenView(tuple(_response(one, layers, texts) for one in read), len(layers), texts.note)


def _response(one: ReadResponse, layers: Sequence[int], texts: TokenTexts) -> Response:
    block = one.block
    seq_id, n = int(block.seq_id_T[0]), len(block)
    diff_T = block.logp_train_T.astype(np.float64) - block.logp_infer_T
    is_scored_T = is_scored(block.logp_train_T, block.logp_infer_T)
    distance_T = np.abs(diff_T[is_scored_T])
    mean = f"mean abs(logp_diff) {sig(float(distance_T.mean()))} nat" if len(distance_T) else "not scored by both arms"
    words = (
        f"Response {seq_id} (prompt {block.prompt_id_T[0]}, sample {block.sample_index_T[0]}): {mean}, "
        f"{count(len(distance_T), 'token')}"
    )
    hidden = one.first or one.last < n
    left_out = f"Shown: tokens {one.first:,} to {one.last - 1:,} of {n:,}, around the worst." if hidden else ""
    tokens = []
    for t in range(one.first, one.last):
        flips = tuple(np.flatnonzero(one.is_flip_TL[t]).tolist())
        position = int(block.position_T[t])
        found = texts.of(seq_id, position)
        text = "" if found is None or texts.is_withheld else found.token
        facts = (
            *_numbers(block, t, bool(is_scored_T[t])),
            _margin(block, t, layers),
            ", ".join(_layer(layer, layers) for layer in flips) or ("none" if layers else "no experts"),
            *_weight_words(one.weights_CT[:, t], float(diff_T[t])),
        )
        tone = _tone(float(diff_T[t])) if is_scored_T[t] else "u"
        tokens.append(ViewedToken(_printable(text), "\n" in text, tone, flips, facts))
    start = texts.of(seq_id, int(block.position_T[one.first]))
    before = "" if start is None or texts.is_withheld else start.before
    return Response(seq_id, words, "".join(map(escaped, before)), tuple(tokens), left_out)


def _numbers(block: PairBlock, t: int, is_known: bool) -> tuple[str, ...]:
    """Position, p_train, p_infer, logp_diff and ratio."""
    train, infer = float(block.logp_train_T[t]), float(block.logp_infer_T[t])
    probabilities = (percent(float(np.exp(value))) if np.isfinite(value) else NONE for value in (train, infer))
    ratio = sig(float(np.exp(np.clip(train - infer, -700, 700))), 4) if is_known else NONE
    return f"{block.position_T[t]}", *probabilities, sig(train - infer) if is_known else NONE, ratio


def _margin(block: PairBlock, t: int, layers: Sequence[int]) -> str:
    """The smallest margin behind a token, and in which layer."""
    margins_TL = block.margin_infer_TL if block.margin_infer_TL is not None else block.margin_train_TL
    if margins_TL is None or not np.isfinite(margins_TL[t]).any():
        return NONE
    layer = int(np.nanargmin(margins_TL[t]))
    return f"{sig(float(margins_TL[t, layer]))} in {_layer(layer, layers)}"


def _layer(layer: int, layers: Sequence[int]) -> str:
    return f"{layer} ({layers[layer]})"


def _weight_words(weights_C: NDArray[np.float64], log_ratio: float) -> list[str]:
    if not np.isfinite(log_ratio):
        return [NONE] * len(weights_C)
    ratio = float(np.exp(np.clip(log_ratio, -700, 700)))
    return ["0" if w == 0 else "r" if abs(w - ratio) <= 1e-6 * ratio else f"{w:.4g}" for w in weights_C.tolist()]


def _tone(diff: float) -> str:
    n = sum(abs(diff) >= bound for bound in BINS)
    return "z" if n == 0 else f"{'p' if diff > 0 else 'n'}{n}"


def _printable(text: str) -> str:
    shown = "".join(map(escaped, text[:_LONGEST_TOKEN]))
    return shown if shown.strip() else "␣" * len(shown)


def view_words(view: TokenView) -> list[Markdown]:
    """How to read it."""
    ticks = f"Ticks under a token: which of {view.n_layers} MoE layers chose other experts behind it, the first on top."
    use = "Point at a token, tap it, or move with the arrow keys: its numbers, and what corrections would do to it."
    return [
        plain(view.note),
        Markdown(f"Colour: logp_diff = logp_train − logp_infer. {ticks if view.n_layers else ''} {use}"),
        Markdown("Another response: `moediag report RUN --sequence SEQ_ID`."),
    ]
