"""How many sequences share a forward of the train arm, and how they lie in it.

One unpadded sequence per forward is the reference. Batches are faster, and change the arithmetic (other matrix
shapes, other kernels): the arm's record says which layout was used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moediag.errors import EngineError

PADDED, PACKED = "padded", "packed"


@dataclass(frozen=True)
class Batching:
    """Sequences per forward and their layout.

    Args:
        batch_size: sequences per forward; 1 = each on its own, unpadded.
        layout: ``padded``: one line each, filled up on the right and masked; ``packed``: one line, one after the
            other, kept apart by their positions.
    """

    batch_size: int = 1
    layout: str = PADDED

    @property
    def words(self) -> str:
        """For arm.json and the report."""
        if self.batch_size == 1:
            return "one unpadded sequence per forward"
        return f"{self.batch_size} sequences per forward, {self.layout}"

    def check(self) -> Batching:
        """Return self when the layout is known.

        Raises:
            EngineError: it is not.
        """
        if self.layout not in (PADDED, PACKED) or self.batch_size < 1:
            raise EngineError(f"batching {self.batch_size} x {self.layout!r}: expected padded or packed, 1 or more")
        return self

    def split(self, bounds: list[tuple[int, int]]) -> list[Batch]:
        """Batches of whole sequences, in order.

        Args:
            bounds: [start, end) of every sequence in the token table.
        """
        parts = [bounds[i : i + self.batch_size] for i in range(0, len(bounds), self.batch_size)]
        return [Batch(tuple(part), self.layout) for part in parts]


@dataclass(frozen=True)
class Batch:
    """The sequences of one forward; T counts their token rows, one sequence after the other."""

    bounds: tuple[tuple[int, int], ...]
    layout: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - start for start, end in self.bounds]

    @property
    def is_alone(self) -> bool:
        """True for a single sequence: no padding, no mask, no positions given."""
        return len(self.bounds) == 1

    @property
    def width(self) -> int:
        """Columns of the forward."""
        return max(self.lengths) if self.layout == PADDED else sum(self.lengths)

    @property
    def n_rows(self) -> int:
        """Rows of the forward, padding included."""
        return self.width * (len(self.bounds) if self.layout == PADDED else 1)

    @property
    def row_of_token(self) -> torch.Tensor:
        """Row of the forward, lines one after the other, that holds each token."""
        if self.layout == PACKED:
            return torch.arange(self.n_rows)
        return torch.cat([line * self.width + torch.arange(length) for line, length in enumerate(self.lengths)])

    def places(self, token_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(line, column) of token rows."""
        row_N = self.row_of_token[token_N]
        return row_N // self.width, row_N % self.width

    def inputs(self, token_id_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is called with; a single sequence gets its token ids and nothing else."""
        if self.is_alone:
            return {"input_ids": token_id_T[None]}
        position_T = torch.cat([torch.arange(length) for length in self.lengths])
        if self.layout == PACKED:  # transformers keeps apart what starts again at position 0
            return {"input_ids": token_id_T[None], "position_ids": position_T[None]}
        shape = (len(self.bounds), self.width)
        ids, mask, positions = (torch.zeros(self.n_rows, dtype=torch.long) for _ in range(3))
        row_T = self.row_of_token
        ids[row_T], mask[row_T], positions[row_T] = token_id_T, torch.ones_like(token_id_T), position_T
        return {
            "input_ids": ids.reshape(shape),
            "attention_mask": mask.reshape(shape),
            "position_ids": positions.reshape(shape),
        }


def alone(start: int, end: int) -> Batch:
    """One unpadded sequence, rows [start, end) of the token table: the reference."""
    return Batch(((start, end),), PADDED)


def refuse_leak(model: Any, token_id_N: torch.Tensor) -> None:
    """Refuse a model in which packed sequences see each other (transformers 5.19: gpt_oss).

    Some architectures do not hand the positions to their attention mask. A short piece of text is scored behind
    another one, packed and padded, and alone: packing may move its logits by no more than 100 times what rounding does,
    which is what padding moves them by, or one unit in the last place of the largest.

    Args:
        token_id_N: some token ids of the run, two or more.

    Raises:
        EngineError: the sequences are not kept apart.
    """
    half = max(1, min(len(token_id_N) // 2, 16))
    ids = torch.cat([token_id_N[:half], token_id_N[-half:]])
    bounds = ((0, half), (half, 2 * half))

    def second(batch: Batch, given: torch.Tensor) -> torch.Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs(given).items()}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits.float().flatten(0, 1)[batch.row_of_token.to(logits.device)][-half:]

    with torch.inference_mode():
        own = second(alone(0, half), ids[half:])
        padded, packed = (second(Batch(bounds, layout), ids) for layout in (PADDED, PACKED))
    rounding = max(float((padded - own).abs().max()), torch.finfo(model.dtype).eps * float(own.abs().max()))
    moved = float((packed - own).abs().max())
    if moved > 100 * rounding:
        raise EngineError(
            f"{type(model).__name__} does not keep packed sequences apart: a text's logits move by {moved:.2g} behind "
            f"another one, rounding moves them by {rounding:.2g}; use --batching padded"
        )
