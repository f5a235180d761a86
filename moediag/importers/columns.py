"""The known columns of flat tables, one row per token: their names, what others call them, what they hold.

Invariants:
    - a column is declared here and nowhere else; every reader of tables takes it from here, under all of its names;
    - a mask that a known framework wrote is used, or the table is refused: it is never passed over;
    - a token mask says which tokens count; factors (a mask of whole sequences, of tool results) multiply it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from moediag.errors import DumpError

Bool = NDArray[np.bool_]

Kind = Literal["id", "whole", "number", "flag", "text"]
"""id: whole numbers or words; whole: whole numbers; number: float64, empty = NaN; flag: true/false or 1/0 (1.0/0.0);
text: words, empty = not known."""


@dataclass(frozen=True)
class KnownColumn:
    """A column that moediag knows.

    Args:
        meaning: what it holds, with the unit.
        aliases: other names that mean the same thing whoever writes them.
    """

    name: str
    kind: Kind
    meaning: str
    aliases: tuple[str, ...] = ()


_COLUMNS: Final = (
    KnownColumn("step", "whole", "training step that the tokens were sampled at"),
    KnownColumn("seq_id", "id", "sequence of the token"),
    KnownColumn("position", "whole", "place of the token in its sequence, ascending; gaps are allowed [token]"),
    KnownColumn("prompt_id", "id", "prompt of the sequence; samples of one prompt share it"),
    KnownColumn("sample_index", "whole", "which sample of its prompt the sequence is"),
    KnownColumn("token_id", "whole", "the token"),
    KnownColumn("logp_train", "number", "log-probability on the train side at theta_old [nat]; empty = not scored"),
    KnownColumn("logp_infer", "number", "log-probability on the infer side [nat]; empty = not scored"),
    KnownColumn("logp_train_new", "number", "log-probability under the policy being trained, theta [nat]"),
    KnownColumn("entropy", "number", "next-token entropy on the infer side [nat]", ("entropy_infer",)),
    KnownColumn("entropy_train", "number", "next-token entropy on the train side [nat]"),
    KnownColumn("temperature", "number", "that the token was sampled at [1]; empty = not known", ("temperatures",)),
    KnownColumn("n_flipped_layers", "whole", "MoE layers whose expert set differs behind the token; -1 = not known"),
    KnownColumn("turn", "number", "turn of a conversation; empty = not known"),
    KnownColumn("weight_version", "text", "version of the weights that sampled the token; empty = not known"),
    KnownColumn("advantage", "number", "advantage of the token [1]", ("advantages",)),
    KnownColumn("reward", "number", "reward of the sequence [1]", ("rewards",)),
)
KNOWN: Final = {column.name: column for column in _COLUMNS}
REQUIRED: Final = ("seq_id", "position", "logp_train", "logp_infer")
PLACE: Final = REQUIRED[:2]
"""What says where a token stands; a table without both is one cluster of tokens in no order."""
KEYS: Final = ("seq_id", "position", "prompt_id", "sample_index")
"""What names a row in a table of weights, as far as the table has it."""

LOGP_PAIRS: Final = {
    "verl": ("old_log_probs", "rollout_log_probs"),
    "TRL": ("old_per_token_logps", "sampling_per_token_logps"),
    "NeMo-RL": ("prev_logprobs", "generation_logprobs"),
    "prime-rl": ("trainer_logprobs", "inference_logprobs"),
}
"""Framework -> its names of (logp_train, logp_infer): taken only when both are there, for one of them alone may be
either side elsewhere (AReaL calls the rollout's ``old_logp``)."""

TOKEN_MASKS: Final = {
    "is_response": "moediag",
    "is_trained": "moediag",
    "response_mask": "verl, SkyRL",
    "completion_mask": "TRL",
    "loss_mask": "prime-rl, slime, miles, SkyRL, AReaL, verl",
    "loss_masks": "slime, miles",
    "token_mask": "NeMo-RL",
    "token_loss_mask": "NeMo-RL",
    "action_mask": "OpenRLHF",
}
"""Column -> who calls the mask of trained response tokens so."""

FACTORS: Final = {
    "sample_mask": "NeMo-RL",
    "sample_loss_mask": "NeMo-RL",
    "tool_mask": "TRL",
    "env_mask": "TRL",
}
"""Column -> who multiplies the token mask by it: NeMo-RL's masks of whole sequences (token_mask * sample_mask), and
TRL's of tool results (completion_mask * tool_mask; env_mask is its name in rollout functions)."""


def is_token_table(names: Collection[str]) -> bool:
    """Whether columns are those of a table of one row per token: they have log-probabilities under a known name."""
    has_pair = any(all(name in names for name in pair) for pair in LOGP_PAIRS.values())
    return "logp_train" in names or "logp_infer" in names or (has_pair and "position" in names)


def known_names(there: Collection[str], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The known columns among a table's columns.

    Args:
        there: the table's columns.
        where: the table, for messages.

    Returns:
        Known name -> the table's name of it, and notes on the names that are others'.

    Raises:
        DumpError: a required column is missing (both of :data:`PLACE` may be), or two frameworks' log-probabilities
            are there.
    """
    taken = {
        column.name: next(alias for alias in column.aliases if alias in there)
        for column in _COLUMNS
        if column.name not in there and any(alias in there for alias in column.aliases)
    }
    if "logp_train" not in there and "logp_infer" not in there:
        found = {framework: pair for framework, pair in LOGP_PAIRS.items() if all(name in there for name in pair)}
        if len(found) > 1:
            raise DumpError(f"{where} has the log-probabilities of {' and '.join(found)}; rename one pair")
        taken |= {ours: theirs for pair in found.values() for ours, theirs in zip(REQUIRED[2:], pair, strict=True)}
    name_of = {name: name for name in KNOWN if name in there} | taken
    missing = [name for name in REQUIRED if name not in name_of]
    if missing and tuple(missing) != PLACE:
        pairs = "; ".join(f"{framework}: {' and '.join(names)}" for framework, names in LOGP_PAIRS.items())
        raise DumpError(
            f"{where} lacks {', '.join(missing)}; found {', '.join(map(str, there)) or 'no column'} "
            f"(log-probabilities are also taken as {pairs})"
        )
    return name_of, tuple(f"column {theirs} taken as {ours}" for ours, theirs in taken.items())


@dataclass(frozen=True)
class LossMasks:
    """The mask columns of a table.

    Args:
        token: masks of tokens, of which one counts.
        factors: masks that multiply it.
        where: the table, for messages.
        advice: what to do where token masks differ.
    """

    token: tuple[str, ...]
    factors: tuple[str, ...]
    where: str
    advice: str

    @classmethod
    def among(
        cls, names: Collection[str], where: str, chosen: str | None = None, advice: str = "keep one of them"
    ) -> LossMasks:
        """The masks among a table's columns.

        Args:
            chosen: the token mask to use; None = the known one.

        Raises:
            DumpError: there is no column ``chosen``.
        """
        if chosen is not None and chosen not in names:
            raise DumpError(f"{where} has no column {chosen} to mask with; found {', '.join(names)}")
        token = (chosen,) if chosen is not None else tuple(name for name in TOKEN_MASKS if name in names)
        if "is_trained" in token:  # moediag's own two masks: what is trained is response
            token = tuple(name for name in token if name != "is_response")
        return cls(token, tuple(name for name in FACTORS if name in names and name != chosen), where, advice)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read, as flags."""
        return (*self.token, *self.factors)

    def response(self, flags: dict[str, Bool]) -> tuple[Bool | None, tuple[str, ...]]:
        """Which rows are trained response tokens, and which columns say so; None = the table does not say.

        Raises:
            DumpError: two token masks that differ.
        """
        if not self.columns:
            return None, ()
        for other in self.token[1:]:
            is_other_T = flags[other] != flags[self.token[0]]
            if is_other_T.any():
                raise DumpError(
                    f"{self.where}: the loss masks {self.token[0]} and {other} differ in {int(is_other_T.sum()):,} "
                    f"rows, first row {int(np.argmax(is_other_T))}; {self.advice}"
                )
        same = f" ({' and '.join(self.token)} are equal)" if len(self.token) > 1 else ""
        product = " * ".join([*self.token[:1], *self.factors])
        note = () if self.columns == ("is_response",) else (f"loss mask: {product}{same}",)
        return np.logical_and.reduce([flags[name] for name in self.columns]), note
