"""The mismatch inside a trainer: one call a step, under the names its users know, in a table for ``moediag trend``.

::

    watch = moediag.Watch("runs/grpo-7/mismatch")
    ...
    seen = watch.step(step, old_logp, rollout_logp, response_mask, advantages=advantages, entropy=entropy)
    wandb.log(seen.scalars("mismatch/"), step=step)        # or seen.scalars("", names="verl")
    if seen.findings:
        print(seen)

What several ranks hold is put together first: every rank makes ``watch.part(...)`` of its own batch, one gathers the
parts (``torch.distributed.gather_object``) and calls ``watch.step_of(step, parts)``.

Files, in the folder given::

    steps.jsonl              a row per step, for ``moediag trend``: metrics, intervals, shares of corrections, n
    tokens-<step>.parquet    every token of every n-th step, on request, for ``moediag simulate`` and ``validate``

Invariants:
    - numbers, intervals and findings are those of ``analyze``, ``simulate`` and ``validate`` on the same tokens;
    - nothing flows back into the trainer: tensors are detached, and copied from their device together;
    - arguments that do not fit are errors, and show at the first step; *values* never end a training: a step of which
      nothing can be measured says why, and has no row;
    - steps ascend; batches given at one step, in as many calls as it takes, are one step, whose row is written anew;
    - what an earlier attempt wrote of this step and later ones, and a row that it did not end, is dropped when a
      trainer resumes, and the row that follows is marked as a restart.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moediag.analysis.expert_sets import NOT_COMPARED, compare_experts
from moediag.analysis.logprobs import logp_metrics
from moediag.analysis.metrics import METRICS
from moediag.analysis.series import MASKED, icepop_masked, step_metrics
from moediag.corrections.arrays import flat_arrays, named_correction
from moediag.corrections.correction import Correction
from moediag.corrections.terms import Terms
from moediag.errors import DumpError, MoediagError
from moediag.hygiene.findings import Finding, by_level, headline
from moediag.hygiene.logged import check_logged
from moediag.hygiene.series import check_series
from moediag.importers.columns import KNOWN
from moediag.importers.tables import frame_column
from moediag.importers.tokens import LoggedTokens
from moediag.numbers import count
from moediag.run.files import make_folder, write_atomic
from moediag.statistics.intervals import mean_interval

STEPS: Final = "steps.jsonl"
_COLUMNS: Final = ("prompt_id", "logp_train", "logp_infer", "advantage", "entropy")
CORRECTIONS: Final = ("ring-1t", "verl-token-tis", "verl-seq-mis")
"""What a step would lose to corrections, unless others are named: IcePop's band, truncation, a mask of sequences."""


@dataclass(frozen=True)
class Batch:
    """The tokens of one rank's batch that count, as :meth:`Watch.part` made them; plain arrays, so that it can be sent.

    Args:
        columns: name -> (T,) values; ``seq_id`` is of this part alone, ``prompt_id`` of all.
        n_layers: L of the routes; 0 = none were given.
    """

    columns: dict[str, NDArray[Any]]
    n_layers: int = 0


@dataclass(frozen=True)
class Seen:
    """What a step showed.

    Args:
        step: training step.
        metrics: name -> value; NaN = nothing can be said. A share of a correction is called ``masked_share.<name>``,
            the mean entropy [nat] of the tokens it masks ``masked_entropy.<name>``, a number over its floor
            ``<metric>.times_floor``.
        bounds: name -> its 95 % interval, clustered by prompt, where there is one.
        findings: what the rules of ``validate`` found, errors first.
        n_tokens, n_prompts: behind them.
        problem: why nothing could be measured; empty as a rule.
    """

    step: int
    metrics: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    findings: list[Finding]
    n_tokens: int
    n_prompts: int
    problem: str = ""

    def scalars(self, prefix: str = "", names: str | None = None) -> dict[str, float]:
        """The numbers for a logger: finite ones only.

        Args:
            prefix: in front of every name.
            names: a framework whose own names to use (``verl``, ``slime``, ``prime-rl``, ``NeMo-RL``); what it does not
                log is left out. None = moediag's.

        Raises:
            MoediagError: no metric has a name of that framework.
        """
        known = self.metrics
        if names is not None:
            known = {theirs: known[ours] for theirs, ours in aliases(names) if ours in known}
        counts = {"n_tokens": self.n_tokens, "n_findings": len(self.findings)} if names is None else {}
        return {f"{prefix}{name}": value for name, value in {**known, **counts}.items() if math.isfinite(value)}

    def __str__(self) -> str:
        if self.problem:
            return f"step {self.step}: nothing was measured: {self.problem}"
        mean, high = self.metrics["abs_logp_diff.mean"], self.metrics["abs_logp_diff.p99"]
        first = (
            f"step {self.step}: abs logp diff mean {mean:.3g}, p99 {high:.3g} nat; k3 "
            f"{self.metrics['kl_infer_train_k3']:.3g} nat; n = {count(self.n_tokens, 'token')} of "
            f"{count(self.n_prompts, 'prompt')}"
        )
        return "\n".join([first, *headline(self.findings)])


def aliases(framework: str) -> list[tuple[str, str]]:
    """(name that a framework logs, moediag's name) of every metric that both have.

    Raises:
        MoediagError: none.
    """
    every = [(alias, metric.name) for metric in METRICS.values() for alias in metric.elsewhere if alias.is_metric_name]
    found = [(alias.name, ours) for alias, ours in every if alias.framework == framework]
    if not found:
        there = ", ".join(dict.fromkeys(alias.framework for alias, _ in every))
        raise MoediagError(f"no metric has a name of {framework!r}; there are names of {there}")
    return found


@dataclass
class Watch:
    """Watches a training.

    Args:
        folder: where the table of steps goes; None = nothing is written.
        corrections: whose shares to count: methods, presets or compositions, as :func:`moediag.corrections.weights`
            takes them.
        floors: metric -> its floor, such as an analysis of a run has them; adds ``<metric>.times_floor``.
        tokens_every: write every token of each step that this divides; 0 = never.

    Raises:
        MoediagError: a correction that there is not.

    Example:
        >>> import numpy as np
        >>> train, infer = np.log([[0.5, 0.4], [0.9, 0.2]]), np.log([[0.5, 0.5], [0.9, 0.1]])
        >>> seen = Watch().step(0, train, infer, np.ones((2, 2)))
        >>> round(seen.metrics["abs_logp_diff.mean"], 3), seen.n_tokens
        (0.229, 4)
    """

    folder: str | Path | None = None
    corrections: Sequence[str | Correction] = CORRECTIONS
    floors: Mapping[str, float] = field(default_factory=dict)
    tokens_every: int = 0
    _first: int | None = field(default=None, init=False, repr=False)
    _last: int | None = field(default=None, init=False, repr=False)
    _held: list[Batch] = field(default_factory=list, init=False, repr=False)
    _is_restart: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._named = {str(one): named_correction(one) for one in self.corrections}

    def step(
        self,
        step: int,
        logp_train: ArrayLike,
        logp_infer: ArrayLike,
        mask: ArrayLike | None = None,
        seq_ids: ArrayLike | None = None,
        **more: Any,
    ) -> Seen:
        """Look at the tokens of a step; see :meth:`part` for the arguments.

        Called again at the same step (several generations before one update) it looks at all that was given at it;
        sequences of two calls are different ones.

        Raises:
            MoediagError: arrays that do not fit, or a step before the last.
        """
        return self.step_of(step, [self.part(logp_train, logp_infer, mask, seq_ids, **more)])

    def part(
        self,
        logp_train: ArrayLike,
        logp_infer: ArrayLike,
        mask: ArrayLike | None = None,
        seq_ids: ArrayLike | None = None,
        *,
        prompt_ids: ArrayLike | Sequence[str] | None = None,
        advantages: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        routes: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> Batch:
        """The tokens of one batch: lists, numpy arrays or tensors of any device.

        Args:
            logp_train, logp_infer: (B, T) or (T,) log-probabilities of the same tokens [nat], by the trainer before its
                update and as the rollout engine sampled them; or B arrays of any lengths, one per sequence, as a list
                or as a nested tensor: everything of their shape is then given so.
            mask: of their shape, true where a token counts; needed for (B, T).
            seq_ids: (T,) sequence of every token, needed for (T,); of (B, T) a row is a sequence.
            prompt_ids: of their shape or (B,): which prompt, the same number or word on every rank; intervals are
                clustered by it. None = every sequence has its own, which makes intervals of several samples a prompt
                too narrow.
            advantages: of their shape or (B,) [1]; corrections that look at its sign need it.
            entropy: of their shape: of the next-token distribution [nat].
            routes: expert ids of train and of infer, each of their shape and (L, K) more; -1 = not routed.

        Raises:
            MoediagError: arrays that do not fit each other.
        """
        given: dict[str, Any] = {"logp_train": logp_train, "logp_infer": logp_infer, "seq_id": seq_ids, "mask": mask}
        given |= {"prompt_id": prompt_ids, "advantage": advantages, "entropy": entropy}
        if (rows := _rows(logp_train)) is not None:
            n_B = [len(row) for row in rows]
            given = {name: _end_to_end(name, value, n_B) for name, value in given.items() if value is not None}
            given["seq_id"] = np.repeat(np.arange(len(n_B)), n_B)
            routes = routes and (_end_to_end("routes", routes[0], n_B), _end_to_end("routes", routes[1], n_B))
        flat = flat_arrays(**given)
        row_T, _ = pd.factorize(flat["seq_id"])
        here_T = np.flatnonzero(flat["mask"] == 1) if mask is not None else np.arange(len(row_T))
        columns: dict[str, NDArray[Any]] = {"seq_id": row_T, "position": _positions(row_T)}
        columns |= {name: flat[name] for name in _COLUMNS if name in flat}
        columns = {name: array[here_T] for name, array in columns.items()}
        n_layers = 0
        if routes is not None:
            ids = [np.asarray(one).reshape(len(row_T), *np.shape(one)[-2:])[here_T].astype(np.int16) for one in routes]
            seen = compare_experts(*ids)
            columns["n_flipped_layers"] = np.where(seen.is_complete_T, seen.n_flipped_T, NOT_COMPARED).astype(np.int64)
            n_layers = int(seen.shape[1])
        return Batch(columns, n_layers)

    def step_of(self, step: int, parts: Iterable[Batch]) -> Seen:
        """Look at the tokens of a step that several ranks hold parts of; again, and raises, like :meth:`step`."""
        step = int(step)
        some = [*(self._held if step == self._last else ()), *parts]
        if len({(*part.columns, part.n_layers) for part in some}) != 1:
            raise MoediagError(f"the parts of step {step} hold different columns; give every rank the same arguments")
        if self._last is not None and step < self._last:
            raise MoediagError(f"step {step} comes after step {self._last}; give steps in their order, or a new Watch")
        try:
            tokens = _joined(some, f"step {step}")
        except DumpError as error:  # no token under the mask, or log-probabilities that no model gives
            return Seen(step, {}, {}, [], 0, 0, str(error))
        frame = tokens.frame
        if (advantage_T := tokens.get("advantage")) is not None:
            frame["advantage"] = advantage_T
        seen = self._seen(step, Terms(frame), tokens, some[0].n_layers)
        if self.folder is not None:
            self._write(seen, frame)
        self._first = step if self._first is None else self._first
        self._last, self._held = step, some
        return seen

    def _seen(self, step: int, terms: Terms, tokens: LoggedTokens, n_layers: int) -> Seen:
        metrics: dict[str, float] = {}
        bounds: dict[str, tuple[float, float]] = {}

        def add(name: str, value: float, low: float = math.nan, high: float = math.nan) -> None:
            metrics[name] = float(value)
            if math.isfinite(low) and math.isfinite(high):
                bounds[name] = (float(low), float(high))

        for row in logp_metrics(terms).to_dict("records"):
            add(str(row["metric"]), row["value"], row["ci_low"], row["ci_high"])
        masked = icepop_masked(terms)
        add(MASKED, masked.value, masked.low, masked.high)
        entropy_T = terms.get("entropy_infer")
        for name, correction in self._named.items():
            is_masked_T = correction.of_terms(terms) == 0
            share = mean_interval(is_masked_T, terms.prompt_row_T, "rate")
            add(f"masked_share.{name}", share.value, share.low, share.high)
            if entropy_T is not None:
                known = entropy_T[is_masked_T & np.isfinite(entropy_T)]
                add(f"masked_entropy.{name}", known.mean() if len(known) else math.nan)
        n_flipped_T = terms.get("n_flipped_layers")
        if n_flipped_T is not None:
            known_T = n_flipped_T >= 0
            for name, values_T in (("flip_rate", n_flipped_T / n_layers), ("any_layer_share", n_flipped_T > 0)):
                rate = mean_interval(values_T[known_T], terms.prompt_row_T[known_T], "rate")
                add(name, rate.value, rate.low, rate.high)
        for name, floor in self.floors.items():
            if name in metrics and floor > 0:
                add(f"{name}.times_floor", metrics[name] / floor)
        found = check_logged(tokens)
        if self._first in (None, step):  # later steps are a drift, which is trend's to tell from noise
            found = by_level([*found, *check_series(step_metrics(step, "", terms))])
        return Seen(step, metrics, bounds, found, len(terms), terms.n_prompts)

    @cached_property
    def _table(self) -> Path:
        folder = Path(str(self.folder))
        make_folder(folder)
        return folder / STEPS

    def _write(self, seen: Seen, frame: pd.DataFrame) -> None:
        if self._last is None or seen.step == self._last:
            was_there = self._drop_from(seen.step)
            self._is_restart = was_there if self._last is None else self._is_restart
        else:
            self._is_restart = False
        if self.tokens_every and seen.step % self.tokens_every == 0:
            path = self._table.with_name(f"tokens-{seen.step:06d}.parquet")
            write_atomic(path, frame.rename(columns={"entropy_infer": "entropy"}).to_parquet(index=False))
        row: dict[str, float] = {"step": seen.step, "n_tokens": seen.n_tokens, "n_prompts": seen.n_prompts}
        for name, value in seen.metrics.items():
            low, high = seen.bounds.get(name, (math.nan, math.nan))
            row |= {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}
        row |= {"n_findings": len(seen.findings), "restart": int(self._is_restart)}
        known = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self._table.open("a") as file:
            file.write(json.dumps(known) + "\n")

    def _drop_from(self, step: int) -> bool:
        """Drop what was written of this step and later ones; whether there was a table with rows."""
        if not self._table.exists():
            return False
        for path in self._table.parent.glob("tokens-*.parquet"):
            number = path.stem.removeprefix("tokens-")
            if number.isdigit() and int(number) >= step:
                path.unlink()
        lines = self._table.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        if kept != lines:
            write_atomic(self._table, "".join(kept).encode())
        return bool(lines)


def _rows(value: Any) -> list[Any] | None:
    """The arrays of sequences, where a value holds one per sequence; else None."""
    if getattr(value, "is_nested", False):
        return list(value.unbind())
    is_rows = isinstance(value, list | tuple) and len(value) > 0 and all(np.ndim(one) > 0 for one in value)
    return list(value) if is_rows else None


def _end_to_end(name: str, value: Any, n_B: list[int]) -> Any:
    """Arrays of sequences as one, values of sequences at each of their tokens; tensors stay on their device."""
    rows = _rows(value)
    if len(value if rows is None else rows) != len(n_B) or (rows is not None and [*map(len, rows)] != n_B):
        raise MoediagError(
            f"{name} does not fit logp_train, which has {len(n_B)} sequences of {min(n_B)} to {max(n_B)} tokens; give "
            "an array per sequence, of the same lengths"
        )
    torch = sys.modules.get("torch")
    if rows is not None:
        return torch.cat(rows) if torch and isinstance(rows[0], torch.Tensor) else np.concatenate(rows)
    sequence_T = np.repeat(np.arange(len(n_B)), n_B)
    return value[sequence_T] if hasattr(value, "shape") else np.asarray(value)[sequence_T]


def _positions(row_T: NDArray[np.intp]) -> NDArray[np.int64]:
    """Place of every token among those of its sequence, in the order given."""
    order_T = np.argsort(row_T, kind="stable")
    start_T = np.r_[True, np.diff(row_T[order_T]) != 0][: len(row_T)]
    here_T = np.arange(len(row_T))
    position_T = np.empty(len(row_T), np.int64)
    position_T[order_T] = here_T - np.maximum.accumulate(np.where(start_T, here_T, 0))
    return position_T


def _joined(parts: Sequence[Batch], where: str) -> LoggedTokens:
    """All parts as one table; sequences of different parts are different ones."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    sizes = [int(part.columns["seq_id"].max(initial=-1)) + 1 for part in parts]
    columns["seq_id"] += np.repeat(np.cumsum([0, *sizes[:-1]]), [len(part.columns["seq_id"]) for part in parts])
    frame = pd.DataFrame(columns)
    known = {name: frame_column(frame, name, KNOWN[name].kind) for name in columns}
    return LoggedTokens.of(known, where, np.ones(len(frame), np.bool_))
