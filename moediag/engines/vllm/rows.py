"""What the taps inside vLLM's workers have seen since the shard began: whose rows, which tokens, what was routed.

Invariants:
    - rows stay in device buffers over many steps; nothing waits for the device until they are drained;
    - in every step every MoE layer fires exactly once, or the flush says which did not;
    - the positions and token ids of a row are those the model really received in that step;
    - a gate weight is kept as the coefficient with which the expert's output enters the block's: what the router gave,
      times what vLLM multiplies the experts' sum by;
    - a distribution is kept as vLLM's own log-softmax gives it: the same operation on the same logits, so that the
      token's log-probability is one of its numbers, bit for bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moediag.engines.assemble import ROUTING, kept_by, routing_arrays
from moediag.engines.routers import ModelRouting
from moediag.errors import CaptureError

_REQUEST_SUFFIX = re.compile(r"-[0-9a-f]{8}$")  # vLLM's worker knows a request as <external id>-<8 hex>
_NEVER = 1 << 62  # no sequence has such a position
_CAPACITY = 1024  # rows held on the device; a longer step makes room for itself


def stage_file(path: Path, stage: int) -> Path:
    """What a pipeline stage writes where the engine gives a file: the first one the file itself."""
    return path if stage == 0 else path.with_name(f"{path.name}.{stage}")


class RowBuffers:
    """Device buffers for the rows of many steps: each step costs one copy per layer and nothing waits for it."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.n_rows = 0
        self.capacity = _CAPACITY
        self._buffers: dict[str, torch.Tensor] = {}
        self._layers: dict[str, list[torch.Tensor]] = {}

    def has_room(self, n_rows: int) -> bool:
        """True when a step of so many rows fits beside what is held."""
        return self.n_rows + n_rows <= self.capacity

    def make_room(self, n_rows: int) -> None:
        """Forget what is held and make sure that a step of so many rows fits."""
        self.n_rows = 0
        if n_rows > self.capacity:
            self.capacity = 1 << (n_rows - 1).bit_length()
            self._buffers, self._layers = {}, {}

    def store(self, name: str, layer: int, rows: torch.Tensor, n_rows: int) -> None:
        """Copy one layer's first ``n_rows`` rows of the step that is under way into place."""
        layers = self._layers.get(name)
        if layers is None or layers[0].dtype != rows.dtype:
            layers = self._fit(name, rows)
        layers[layer].narrow(0, self.n_rows, n_rows).copy_(rows if len(rows) == n_rows else rows[:n_rows])

    def held(self) -> dict[str, torch.Tensor]:
        """Views of what is held, (L, N, width), layers first."""
        return {name: buffer[:, : self.n_rows] for name, buffer in self._buffers.items()}

    def dtypes(self) -> dict[str, str]:
        """Dtypes in which the router was given its logits and gave its gate weights."""
        names = {"matmul": "logits", "gate": "weights"}
        return {
            stage: str(self._buffers[name].dtype).removeprefix("torch.")
            for stage, name in names.items()
            if name in self._buffers
        }

    def _fit(self, name: str, rows: torch.Tensor) -> list[torch.Tensor]:
        """A buffer that holds these rows exactly: where layers differ in dtype, the wider one."""
        there = self._buffers.get(name)
        dtype = rows.dtype if there is None else torch.promote_types(there.dtype, rows.dtype)
        if there is None:
            there = torch.empty((self.n_layers, self.capacity, *rows.shape[1:]), dtype=dtype, device=rows.device)
        self._buffers[name] = there.to(dtype)
        self._layers[name] = list(self._buffers[name].unbind(0))
        return self._layers[name]


class StepRecorder:
    """Rows of every step since :meth:`begin`."""

    def __init__(
        self,
        spec: ModelRouting | None,
        level: str,
        bias_LE: torch.Tensor | None = None,
        scale_L: Sequence[float] = (),
    ) -> None:
        """Record at a level of :mod:`moediag.engines.assemble`.

        Args:
            bias_LE: correction bias; needed where the family has one.
            scale_L: factor of the experts' sum, by MoE layer; empty = 1 everywhere.
        """
        self.spec = spec
        self.level = level
        self.bias_LE = bias_LE
        self.scale_L = torch.tensor(scale_L)
        self.kept = kept_by(level)
        self.routing = RowBuffers(spec.n_layers) if spec else None
        self.inputs = RowBuffers(1)
        self.begin()

    def begin(self) -> None:
        """Forget all rows."""
        self.fired: list[int] = []
        self.n_step_rows = 0
        self.n_rows = 0
        self.sampled_rows: list[int] = []
        self.requests: dict[str, int] = {}
        self.request_T: list[torch.Tensor] = []
        self.parts: dict[str, list[torch.Tensor]] = {}
        self.entropies: list[tuple[list[int], torch.Tensor]] = []
        self.first_kept: dict[str, int] = {}
        self.vocab: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.step_position_T: torch.Tensor | None = None
        self.step_first_row = 0
        self.problems: list[str] = []
        for buffers in (self.routing, self.inputs):
            if buffers is not None:
                buffers.n_rows = 0

    def keep_distributions(self, first_kept: dict[str, int]) -> None:
        """Keep whole next-token distributions until the next :meth:`begin`.

        Args:
            first_kept: request, as it was submitted: first position whose distribution is kept.
        """
        self.first_kept = dict(first_kept)

    def on_forward(
        self, names: Sequence[str], counts: Sequence[int], positions: torch.Tensor, input_ids: torch.Tensor | None
    ) -> None:
        """Before the model runs: note whose rows come, in the runner's own order.

        Args:
            names: the requests of the step, as vLLM's worker calls them.
            counts: rows of each.
            positions, input_ids: what the model receives, (rows or more); the V2 runner gives later pipeline stages no
                ids.
        """
        if positions.dim() != 1:
            raise ValueError(f"positions of {positions.dim()} dimensions (multimodal rope) are not supported")
        n_rows = sum(counts)
        if not self.inputs.has_room(n_rows):
            self.drain()
            for buffers in (self.routing, self.inputs):
                if buffers is not None:
                    buffers.make_room(n_rows)
        self.n_step_rows, self.fired = n_rows, []
        request_of = [self.requests.setdefault(_REQUEST_SUFFIX.sub("", name), len(self.requests)) for name in names]
        self.request_T.append(torch.repeat_interleave(torch.tensor(request_of), torch.tensor(counts)))
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.sampled_rows = [self.n_rows + end - 1 for end in ends]
        self.inputs.store("position_T", 0, positions, n_rows)
        if input_ids is not None:
            self.inputs.store("token_id_T", 0, input_ids, n_rows)
        # the runner's own buffer is overwritten by the next step; waiting for it is little beside whole distributions
        self.step_position_T = positions[:n_rows].to("cpu", torch.int64, copy=True) if self.first_kept else None
        self.step_first_row = self.n_rows

    def on_route(self, layer: int, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """After a router chose: copy its rows, unless the step is vLLM's own dummy run."""
        if not self.n_step_rows:
            return
        assert self.routing is not None
        assert self.spec is not None
        self.fired.append(layer)
        if ids.shape[0] < self.n_step_rows or logits.shape[-1] != self.spec.n_experts:
            shapes = f"ids {tuple(ids.shape)}, logits {tuple(logits.shape)} for {self.n_step_rows} scheduled tokens"
            self.problems.append(f"MoE layer {layer} gave {shapes}")
            return
        given = {"ids": ids, "weights": weights, "logits": logits}
        for name in self.kept:
            self.routing.store(name, layer, given[name], self.n_step_rows)

    def on_sample(self, logits: torch.Tensor) -> None:
        """Before sampling: entropy of each next-token distribution, raw logits at temperature 1."""
        if len(logits) != len(self.sampled_rows):
            self.problems.append(f"sampler got {len(logits)} rows for {len(self.sampled_rows)} requests")
            return
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        self.entropies.append((self.sampled_rows, torch.special.entr(probabilities).sum(dim=-1)))
        self._keep_distributions(torch.tensor(self.sampled_rows, dtype=torch.int64) - self.step_first_row, logits)

    def on_prompt(self, first: int, logits: torch.Tensor) -> None:
        """Prompt log-probabilities: logits of consecutive rows of the step, from row ``first`` of it."""
        self._keep_distributions(torch.arange(first, first + len(logits)), logits)

    def _keep_distributions(self, row_M: torch.Tensor, logits_MV: torch.Tensor) -> None:
        """Keep the chosen rows as they are: vLLM's own ``logprobs=-1`` makes Python numbers of them.

        At V = 152k that is 19 MB per token, flat (34 MB as dicts), held until the request ends; here it is 0.6 MB.
        """
        if self.step_position_T is None or not len(row_M):
            return
        request_M, position_M = self.request_T[-1][row_M], self.step_position_T[row_M]
        first = torch.tensor([self.first_kept.get(name, _NEVER) for name in self.requests])
        is_kept_M = position_M >= first[request_M]
        if is_kept_M.any():
            logps_MV = logits_MV.log_softmax(dim=-1, dtype=torch.float32)  # as vLLM's Sampler.compute_logprobs
            kept_NV = logps_MV[is_kept_M.to(logps_MV.device)].to("cpu", copy=True)
            self.vocab.append((request_M[is_kept_M], position_M[is_kept_M], kept_NV))

    def end_step(self) -> None:
        """After the model ran: the step's rows are complete, or the step is reported as a problem."""
        if not self.n_step_rows:
            return
        if self.spec is not None and sorted(self.fired) != list(range(self.spec.n_layers)):
            self.problems.append(_misfire(self.fired, self.spec))
        self.n_rows += self.n_step_rows
        for buffers in (self.routing, self.inputs):
            if buffers is not None:
                buffers.n_rows += self.n_step_rows
        self.n_step_rows = 0

    def drain(self) -> None:
        """Take what the device buffers hold to the host."""
        if not self.inputs.n_rows:
            return
        for name, rows in self.inputs.held().items():
            self._append(name, rows[0].to("cpu", torch.int64, copy=True))
        # A layer that never fired has no rows to give; the problem is reported and nothing of the shard is stored.
        if self.routing is not None and self.spec is not None and not self.problems:
            kept = self.routing.held()
            if "weights" in kept and (self.scale_L != 1).any():
                kept["weights"] = kept["weights"].float() * self.scale_L[:, None, None].to(kept["weights"].device)
            for name, rows in routing_arrays(kept, self.spec, self.bias_LE, self.level).items():
                self._append(name, rows)

    def flush(self, path: Path | None) -> dict[str, Any]:
        """Write all rows to ``path`` (None: only describe them) and forget them.

        Returns:
            ``requests`` in the order of their numbers, ``problems``, ``router_dtypes``, and ``rows_sha256``, a digest
            of whose rows were routed where: equal on every rank that saw the same.
        """
        self.drain()
        tensors = {name: torch.cat(parts) for name, parts in self.parts.items()}
        if tensors:
            tensors["request_T"] = torch.cat(self.request_T)
        facts = {
            "requests": list(self.requests),
            "problems": self.problems[:5],
            "n_problems": len(self.problems),
            "router_dtypes": self.routing.dtypes() if self.routing else None,
            "rows_sha256": _digest(tensors),
        }
        if path is not None:
            save_file({**tensors, "entropy": self._entropy_table(tensors), **self._distributions()}, path)
        self.begin()
        return facts

    def _entropy_table(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """(request, position, entropy) of every sampled row."""
        if not self.entropies:
            return torch.zeros((0, 3), dtype=torch.float64)
        row = torch.tensor([row for rows, _ in self.entropies for row in rows])
        entropy = torch.cat([part for _, part in self.entropies]).to("cpu", torch.float64)
        return torch.stack([tensors["request_T"][row].double(), tensors["position_T"][row].double(), entropy], dim=1)

    def _distributions(self) -> dict[str, torch.Tensor]:
        """Request, position and log-probabilities of every kept row; empty where none is kept."""
        if not self.vocab:
            return {}
        names = ("vocab_request_N", "vocab_position_N", "vocab_logps_NV")
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*self.vocab, strict=True), strict=True)}

    def _append(self, name: str, part: torch.Tensor) -> None:
        self.parts.setdefault(name, []).append(part)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("request_T", "position_T", "token_id_T", "expert_ids_TLK"):
        if name in tensors:
            digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _misfire(fired: list[int], spec: ModelRouting) -> str:
    silent = sorted(set(range(spec.n_layers)) - set(fired))
    twice = sorted({layer for layer in fired if fired.count(layer) > 1})
    return f"in one step MoE layers {silent} never fired and {twice} fired more than once"


def rows_of_all_stages(stages: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and rows of a model from those of its pipeline stages: each routes its own layers, the last one samples.

    Raises:
        CaptureError: a stage saw other rows than the first.
    """
    first, first_rows = stages[0]
    if len(stages) == 1:
        return first, first_rows
    inputs = {name: first_rows[name] for name in ("request_T", "position_T", "token_id_T")}
    facts, rows = dict(stages[-1][0]), {**stages[-1][1], **inputs}
    for stage, (seen, seen_rows) in enumerate(stages):
        is_same = seen["requests"] == first["requests"] and all(
            torch.equal(seen_rows.get(name, given), given) for name, given in inputs.items()
        )
        if not is_same:
            raise CaptureError(f"pipeline stage {stage} saw other rows than stage 0; nothing was stored")
    for name in ROUTING:
        parts = [seen_rows[name] for _, seen_rows in stages if name in seen_rows]
        if parts:
            rows[name] = torch.cat(parts, dim=1)
    facts["router_dtypes"] = next((seen["router_dtypes"] for seen, _ in stages if seen["router_dtypes"]), None)
    return facts, rows
