"""What is wrong with log-probabilities that another framework recorded, told from our own engines' of the same tokens.

Rung L8 of the ladder. ``d`` = recorded - own, of trained response tokens. Each explanation leaves a mark of its own:

    - **Shifted**: the two streams correlate at another lag than 0 (rule D01). What follows is then asked of the streams
      after the shift is undone, so that a second fault shows, too.
    - **Rounded in storage**: every recorded value lies on a grid (bfloat16, float16, so many decimals, multiples of a
      power of two); a float32 value does so by chance once in 65,536. What the grid explains is taken off ``d``.
    - **Temperature**: a recorded logp is ``l / T - log sum exp(l / T)``. The second term is nearly the same for tokens
      of one entropy, so that *within bins of entropy* recorded values are spread 1 / T times as wide as own ones (D10).
    - **Truncated and renormalised** (top-p, top-k, min-p): E[own probability / recorded probability] is the kept mass,
      where a temperature or other weights leave it at 1 (D09), and hardly a token loses.
    - **Other weights**: none of these, and farther from own than our engines are from each other. Certain only where
      other checkpoints have scored the tokens as well, and one of them fits (D28).

Temperature and truncation change most tokens by more than other weights do: beside them weights are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moediag.errors import RunError
from moediag.hygiene.chance import ALPHA, group_of, mean_is_positive
from moediag.hygiene.logps import LEAST_OFFSET, LEAST_SCALE, MeanRatio, OtherSequence, TokenLag, spread
from moediag.hygiene.rows import MIN_ROWS, TOKEN_LAGS, Rows, Shape
from moediag.numbers import count, sig
from moediag.run.capture import Capture, TokenRows
from moediag.run.reader import Run
from moediag.statistics.intervals import cluster_sums, ratio_mean_interval

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

SHIFTED, OTHER_TOKENS, ROUNDED = "token shift", "other tokens", "rounded storage"
TEMPERATURE, TRUNCATED, OTHER_WEIGHTS = "temperature", "truncation", "other weights"
HEALTHY, CANNOT_TELL = "no fault", "cannot tell"

CAUSES: Final = {
    SHIFTED: ("log-probabilities and tokens are joined off by one (labels shifted twice or not at all)",
              "print five tokens with both streams, shifted by the lag named; mend the dump's join"),
    OTHER_TOKENS: ("another sequence's log-probabilities (batch order, a wrong join), or another model's",
                   "join by sequence id, not by order; score a few sequences by hand"),
    ROUNDED: ("the rollout's log-probabilities were cast or printed before they were kept",
              "keep them in float32; ratios of few 1e-3 are made of rounding"),
    TEMPERATURE: ("recorded after the sampling temperature was applied; ours are of temperature 1",
                  "record raw log-probabilities (vLLM: logprobs_mode=raw_logprobs), or divide the trainer's logits by "
                  "the same temperature"),
    TRUNCATED: ("recorded after top-p, top-k or min-p had cut the distribution and renormalised it",
                "sample with neutral parameters, or record raw log-probabilities"),
    OTHER_WEIGHTS: ("another step's weights, a quantised copy, or an engine that computes something else",
                    "score the tokens with the checkpoints of earlier steps: moediag capture infer OLDER_CKPT "
                    "--other-checkpoint --name infer-older -o RUN; which fits best?"),
}  # fmt: skip
"""Explanation -> likely cause and next check."""

LIMIT: Final = 1.5
"""Times that recorded log-probabilities are farther from the nearest of our engines than our engines are from each
other, from which on rounding does not explain them. Engines that round alike are as far from each other as from a third
one: 1 is expected. Measured: 0 to 0.9 for the demo's checkpoint sampled by vLLM in bfloat16, float16 and float32, with
both engines in bfloat16; 3.5 for four steps of AdamW at a learning rate of 1e-4."""

FEW: Final = 200
"""Tokens below which the spread within bins of entropy is not judged: 10 bins of :data:`MIN_ROWS`."""

N_BINS: Final = 24
"""Bins of entropy at most: 12, 24 or 48 gave temperatures within 0.005 of each other on the demo's tokens."""

GAINING: Final = 0.75
"""Share of the tokens that differ at all that must gain before a truncation is named: noise and other weights give
half, truncation all but noise."""

UNCERTAIN: Final = -0.01
"""Own logp [nat] below which a recorded logp of exactly 0 is no rounding of float32 (1 - p < 6e-8): the token was alone
in what was kept."""

FLOAT32: Final = 1e-6
"""Rounding of a float32 log-softmax [nat]: one ulp of a log-sum-exp of 8 to 16. No yardstick is smaller."""


@dataclass(frozen=True)
class RecordedTokens:
    """Scored response tokens, sequence by sequence in order, that a framework recorded and our own engines scored.

    Args:
        recorded_T: recorded log-probabilities [nat], as they were read; NaN = none.
        own: arm -> log-probabilities of the same tokens under the checkpoint that should have sampled them.
        seq_id_T, prompt_id_T, sample_index_T, position_T: whose they are; position in the sequence.
        entropy_T: entropy of an own arm's next-token distribution [nat], NaN = none; None = no own arm has it.
        dtypes: of own arms, where known.
        others: arm -> log-probabilities under another checkpoint.
    """

    recorded_T: Float64
    own: Mapping[str, Float64]
    seq_id_T: NDArray[np.int64]
    prompt_id_T: NDArray[np.int64]
    sample_index_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    entropy_T: Float64 | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Float64] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.recorded_T)

    def take(self, rows_N: NDArray[Any], recorded_N: Float64) -> RecordedTokens:
        """Some of the tokens, with the recorded log-probabilities that belong to them."""
        return replace(
            self,
            recorded_T=recorded_N,
            own={arm: values_T[rows_N] for arm, values_T in self.own.items()},
            others={arm: values_T[rows_N] for arm, values_T in self.others.items()},
            entropy_T=None if self.entropy_T is None else self.entropy_T[rows_N],
            **{f"{name}_T": getattr(self, f"{name}_T")[rows_N]
               for name in ("seq_id", "prompt_id", "sample_index", "position")},
        )  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was asked of the recorded log-probabilities.

    Args:
        name: the explanation that it is for.
        words: what was measured, with its direction.
        value, low, high: the statistic and its 95 % interval over prompts; NaN where there is none.
        n: tokens.
        limit: what it is held against, in words, and why that.
        is_found: whether it shows the explanation.
    """

    name: str
    words: str
    value: float
    low: float
    high: float
    n: int
    limit: str
    is_found: bool

    @property
    def line(self) -> str:
        """The check as one line."""
        bounds = f" [{sig(self.low)}, {sig(self.high)}]" if math.isfinite(self.low) else ""
        return f"{self.words}: {sig(self.value)}{bounds}, {count(self.n, 'token')}; {self.limit}"


@dataclass(frozen=True)
class Fault:
    """One explanation that was found."""

    name: str
    words: str
    cause: str
    next_check: str


@dataclass(frozen=True)
class Explanation:
    """What is wrong with recorded log-probabilities.

    Args:
        faults: in the order in which they were found; two where one does not explain all.
        name: the faults' names, :data:`HEALTHY`, or :data:`CANNOT_TELL`.
        words: one sentence.
        checks: all that was asked, found or not.
        next_check: what to do next.
    """

    name: str
    words: str
    faults: tuple[Fault, ...]
    checks: tuple[Check, ...]
    next_check: str

    def content(self) -> dict[str, Any]:
        """As summary.json holds it."""
        faults = [asdict(fault) for fault in self.faults]
        words = {"name": self.name, "words": self.words, "next_check": self.next_check}
        return {**words, "faults": faults, "evidence": list(self.evidence)}

    @property
    def evidence(self) -> tuple[str, ...]:
        """A line of every check, those that found something first."""
        return tuple(check.line for check in sorted(self.checks, key=lambda check: not check.is_found))


def explain_recorded(run: Run, arms: Sequence[str]) -> Explanation | None:
    """What is wrong with the rollouts that the run was imported with; None where they are not, or nothing is beside.

    Args:
        arms: complete arms of the run.
    """
    records = [run.arm(arm) for arm in arms]
    recorded = next((one.name for one in records if one.captured is None and one.role == "infer"), None)
    if recorded is None or all(one.captured is None for one in records):
        return None
    try:
        return explain(recorded_tokens(run, recorded))
    except RunError:  # no arm of our own engines covers the run
        return None


def recorded_tokens(run: Run, recorded: str) -> RecordedTokens:
    """The tokens of a run that an imported arm and arms of our own engines scored.

    The checkpoint is the one that the own train arm loaded, else the first own arm; arms of others are candidates.

    Raises:
        RunError: no arm of our own engines is there.
    """
    whole = [arm for arm in run.arms() if run.shards_of(arm) == run.shards and run.is_complete(arm)]
    own = [run.arm(arm) for arm in whole if arm != recorded]
    own = [arm for arm in own if arm.captured and arm.change not in ("replay", "perturbation", "router-dtype")]
    if not own:
        raise RunError(
            f"{run.path} has nothing to hold arm {recorded} against; score its tokens first: moediag capture infer "
            f"CKPT --name own-infer -o {run.path}, then capture train"
        )
    digest = next((arm.checkpoint for arm in own if arm.role == "train"), own[0].checkpoint)
    parts: dict[str, list[Any]] = {}

    def add(name: str, values_T: NDArray[Any]) -> None:
        parts.setdefault(name, []).append(values_T)

    with_entropy = max((_n_entropies(run, arm.name), arm.name) for arm in own if arm.checkpoint == digest)[1]
    for shard in run.shards:
        tokens = run.tokens(shard)
        scored_T = tokens.is_scored_T
        for name in ("seq_id", "prompt_id", "sample_index", "position"):
            add(name, getattr(tokens, f"{name}_T")[scored_T])
        add("recorded", run.capture(recorded, shard).logp_T[scored_T].astype(np.float64))
        for arm in own:
            capture = run.capture(arm.name, shard)
            add(f"own {arm.name}", capture.logp_T[scored_T].astype(np.float64))
            if arm.name == with_entropy and capture.entropy_T is not None:
                add("entropy", capture.entropy_T[scored_T].astype(np.float64))
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return RecordedTokens(
        joined["recorded"],
        {arm.name: joined[f"own {arm.name}"] for arm in own if arm.checkpoint == digest},
        joined["seq_id"], joined["prompt_id"], joined["sample_index"], joined["position"],
        joined.get("entropy"),
        {arm.name: arm.dtype for arm in own if arm.dtype},
        {arm.name: joined[f"own {arm.name}"] for arm in own if arm.checkpoint != digest},
    )  # fmt: skip


def _n_entropies(run: Run, arm: str) -> int:
    """Entropies of an arm: vLLM's prefill has those of the tokens that it samples, one a sequence at most."""
    entropies = (run.capture(arm, shard).entropy_T for shard in run.shards)
    return sum(int(np.isfinite(values_T).sum()) for values_T in entropies if values_T is not None)


def explain(tokens: RecordedTokens) -> Explanation:
    """What is wrong with the recorded log-probabilities, or that nothing is."""
    checks: list[Check] = []
    faults: list[Fault] = []

    def found(check: Check | None, words: str = "") -> bool:
        if check is None:
            return False
        checks.append(check)
        if check.is_found:
            cause, next_check = CAUSES[check.name]
            faults.append(Fault(check.name, words or check.words, cause, next_check))
        return check.is_found

    lag, check = _lag(tokens)
    if found(check, f"recorded log-probabilities are those of the token {abs(lag)} {'after' if lag > 0 else 'before'}"):
        tokens = _undone(tokens, lag)
    tokens = _finite(tokens)
    if len(tokens) < MIN_ROWS:
        words = f"only {count(len(tokens), 'token')} are scored on both sides; {MIN_ROWS} are needed"
        return Explanation(CANNOT_TELL, words, tuple(faults), tuple(checks), "score more sequences")
    own = _nearest(tokens)
    own_T = tokens.own[own]
    if found(_unrelated(tokens, own_T)):
        return _explanation(faults, checks)
    grid = _grid(tokens.recorded_T)
    slack_T = np.zeros(len(tokens)) if grid is None else grid.slack(tokens.recorded_T)
    found(_on_grid(tokens, own_T, grid, slack_T), grid.words if grid else "")
    scale, scale_words = _scale(tokens)
    check, temperature = _temperature(tokens, own_T)
    is_scaled = found(check, f"recorded after a temperature of {temperature:.2f}")
    is_cut = found(*_truncation(tokens, own_T, max(scale, FLOAT32), slack_T, is_scaled))
    if is_scaled or is_cut:
        return _explanation(faults, checks)
    return _weights(tokens, own, scale, scale_words, slack_T, faults, checks)


def _explanation(faults: list[Fault], checks: list[Check]) -> Explanation:
    name = " and ".join(fault.name for fault in faults)
    words = "; and ".join(fault.words for fault in faults)
    return Explanation(name, words, tuple(faults), tuple(checks), "; ".join(fault.next_check for fault in faults))


# Which token


def _rows(tokens: RecordedTokens, logp_T: Float64) -> Rows:
    """The tokens as the rules of hygiene take them: rows that follow each other in a sequence are neighbours."""
    n = len(tokens)
    rows = TokenRows(tokens.seq_id_T, tokens.prompt_id_T, tokens.sample_index_T, tokens.position_T,
                     np.full(n, -1, np.int64), np.ones(n, np.bool_))  # fmt: skip
    return Rows(rows, Capture(logp_T.astype(np.float32)), Shape(0, 0, 0))


def _lag(tokens: RecordedTokens) -> tuple[int, Check | None]:
    own_T = next(iter(tokens.own.values()))
    rule = TokenLag()
    rule.add(_rows(tokens, own_T), _rows(tokens, tokens.recorded_T))
    best = rule.best()
    if best is None:
        return 0, None
    lag, r, r_0, n, is_larger = best
    words = f"correlation with own log-probabilities {lag:+d} tokens away less that at the same token (r = {r_0:.3f})"
    limit = f"above 0 by more than chance (1 in {1 / ALPHA:,.0f}, {len(TOKEN_LAGS)} lags) means shifted"
    return lag, Check(SHIFTED, words, r - r_0, math.nan, math.nan, n, limit, is_larger)


def _undone(tokens: RecordedTokens, lag: int) -> RecordedTokens:
    """Each token with the recorded value that is its own: recorded[t] was that of token t + lag."""
    source_T = np.arange(len(tokens)) - lag
    is_there_T = (source_T >= 0) & (source_T < len(tokens))
    source_T = np.clip(source_T, 0, len(tokens) - 1)
    is_there_T &= tokens.seq_id_T[source_T] == tokens.seq_id_T
    rows_N = np.flatnonzero(is_there_T)
    return tokens.take(rows_N, tokens.recorded_T[source_T[rows_N]])


def _finite(tokens: RecordedTokens) -> RecordedTokens:
    every = np.stack([tokens.recorded_T, *tokens.own.values(), *tokens.others.values()])
    rows_N = np.flatnonzero(np.isfinite(every).all(axis=0))
    return tokens.take(rows_N, tokens.recorded_T[rows_N])


def _unrelated(tokens: RecordedTokens, own_T: Float64) -> Check | None:
    rule = OtherSequence()
    rule.add(_rows(tokens, own_T), _rows(tokens, tokens.recorded_T))
    findings = rule.findings("")
    if not findings:
        return None
    found = findings[0]
    share = (found.n or 0) / (found.n_of or 1)
    return Check(OTHER_TOKENS, f"share of sequences whose two streams have nothing in common ({found.message})", share,
                 math.nan, math.nan, len(tokens), "rule D01-other-sequence", True)  # fmt: skip


# On which grid


@dataclass(frozen=True)
class Grid:
    """Values that storage can hold: ``kind`` is bfloat16, float16, decimals or step; ``size`` the last two's."""

    kind: str
    size: float = 0.0

    @property
    def words(self) -> str:
        """What was done to the values."""
        if self.kind == "decimals":
            return f"printed with {self.size:.0f} decimals"
        if self.kind == "step":
            return f"computed in steps of {self.size:g} nat: logit and log-sum-exp in half precision"
        return f"rounded to {self.kind}"

    def slack(self, values_T: Float64) -> Float64:
        """How far [nat] the value before rounding may be: half a step; a whole one where two terms were rounded."""
        if self.kind == "decimals":
            return np.full(len(values_T), 0.5 * 10.0**-self.size)
        if self.kind == "step":
            return np.full(len(values_T), self.size)
        n_bits, least = (8, -133) if self.kind == "bfloat16" else (11, -24)
        exponent_T = np.frexp(values_T)[1] - n_bits
        return np.asarray(0.5 * np.exp2(np.maximum(exponent_T, least).astype(np.float64)))

    def chance(self, values_N: Float64) -> Float64:
        """Chance that a float32 value near each of these lies on the grid."""
        spacing_N = np.spacing(np.abs(values_N).astype(np.float32)).astype(np.float64)
        if self.kind == "decimals":
            return np.asarray(np.minimum(1.0, 2 * spacing_N * 10.0**self.size))
        if self.kind == "step":
            return np.asarray(np.minimum(1.0, spacing_N / self.size))
        return np.asarray(np.minimum(1.0, spacing_N / (2 * self.slack(values_N))))

    def holds(self, values_N: Float64) -> bool:
        """Whether every value lies on the grid."""
        single_N = values_N.astype(np.float32)
        if self.kind == "decimals":
            scaled_N = values_N * 10.0**self.size
            off_N = np.abs(scaled_N - np.rint(scaled_N))
            return bool((off_N <= np.spacing(np.abs(single_N)).astype(np.float64) * 10.0**self.size).all())
        if self.kind == "step":
            return bool((np.mod(single_N.astype(np.float64), self.size) == 0).all())
        if self.kind == "bfloat16":
            return not np.any(single_N.view(np.uint32) & 0xFFFF)
        with np.errstate(over="ignore"):
            return bool((single_N.astype(np.float16).astype(np.float32) == single_N).all())


GRIDS: Final = (
    *(Grid("step", 2.0**-bits) for bits in range(2, 9)),
    *(Grid("decimals", digits) for digits in range(1, 6)),
    Grid("bfloat16"),
    Grid("float16"),
)
"""Coarsest first. Steps: half a unit of bfloat16 logits of 1 to 64; five decimals are the last that float32 shows."""


def _grid(recorded_T: Float64) -> Grid | None:
    """The grid that every value lies on, where chance would put them there less than once in a million such dumps."""
    values_N = np.unique(recorded_T[recorded_T != 0])
    if len(values_N) < MIN_ROWS:
        return None
    for grid in GRIDS:
        if grid.holds(values_N) and float(np.log(grid.chance(values_N)).sum()) < math.log(ALPHA / len(GRIDS)):
            return grid
    return None


def _on_grid(tokens: RecordedTokens, own_T: Float64, grid: Grid | None, slack_T: Float64) -> Check:
    limit = "all on one of them means rounded; a float32 value lies on bfloat16's by chance once in 65,536"
    if grid is None:
        words = "recorded values are on no common grid (bfloat16, float16, 1 to 5 decimals, steps): share on bfloat16's"
        bits_T = tokens.recorded_T.astype(np.float32).view(np.uint32)
        share = float((bits_T[tokens.recorded_T != 0] & 0xFFFF == 0).mean()) if tokens.recorded_T.any() else math.nan
        return Check(ROUNDED, words, share, math.nan, math.nan, len(tokens), limit, False)
    within = float((np.abs(tokens.recorded_T - own_T) <= slack_T + FLOAT32).mean())
    words = f"share of tokens that are as near to own ones as the grid allows ({grid.words}, all values on the grid)"
    return Check(ROUNDED, words, within, math.nan, math.nan, len(tokens), limit, True)


# Scaled, cut


def _temperature(tokens: RecordedTokens, own_T: Float64) -> tuple[Check | None, float]:
    used_T = (tokens.recorded_T != 0) & (own_T != 0)
    has_entropy = tokens.entropy_T is not None and np.isfinite(tokens.entropy_T[used_T]).mean() > 0.5
    if tokens.entropy_T is not None and has_entropy:
        used_T &= np.isfinite(tokens.entropy_T)
    if used_T.sum() < FEW:
        return None, math.nan
    x, y = own_T[used_T], tokens.recorded_T[used_T]
    where = "over all tokens, for want of entropies"
    if tokens.entropy_T is not None and has_entropy:
        n_bins = min(N_BINS, len(x) // MIN_ROWS)
        rank = np.argsort(np.argsort(tokens.entropy_T[used_T], kind="stable"), kind="stable")
        bin_N = rank * n_bins // len(x)
        size_B = np.bincount(bin_N, minlength=n_bins)
        x, y = (values - (np.bincount(bin_N, values, minlength=n_bins) / size_B)[bin_N] for values in (x, y))
        where = f"among tokens of like entropy ({n_bins} bins)"
    columns = (np.ones_like(x), x, y, x * x, y * y, x * y)
    group = np.unique(group_of(tokens.prompt_id_T[used_T], tokens.position_T[used_T]), return_inverse=True)[1]
    log_ratio, r, is_scaled = spread(np.stack([np.bincount(group, values) for values in columns], axis=1))
    prompt = np.unique(tokens.prompt_id_T[used_T], return_inverse=True)[1]
    low, high = _jackknife(np.stack([np.bincount(prompt, values) for values in columns], axis=1))
    value = math.exp(log_ratio) if math.isfinite(log_ratio) else math.nan
    words = f"spread of recorded over own log-probabilities {where} (r = {r:.4f}); 1 / T of a temperature T"
    limit = (
        f"farther from 1 than noise of either side can make it (twice -log r) and by {math.exp(LEAST_SCALE) - 1:.0%} "
        "means scaled (rule D10-temperature)"
    )
    return Check(TEMPERATURE, words, value, low, high, int(used_T.sum()), limit, is_scaled), 1 / value


def _jackknife(sums_CS: Float64) -> tuple[float, float]:
    """95 % interval of the ratio of spreads, leaving out one prompt after the other, on the log scale."""
    n = len(sums_CS)
    if n < MIN_CLUSTERS:
        return math.nan, math.nan
    left_CS = sums_CS.sum(axis=0) - sums_CS
    with np.errstate(invalid="ignore", divide="ignore"):
        _, x, y, xx, yy, _ = left_CS.T / left_CS[:, 0]
        log_C = 0.5 * np.log((yy - y**2) / (xx - x**2))
    centre = float(log_C.mean())
    error = math.sqrt((n - 1) / n * float(((log_C - centre) ** 2).sum()))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return math.exp(centre - half), math.exp(centre + half)


MIN_CLUSTERS: Final = 8
"""Prompts below which there is no interval, as everywhere."""


def _truncation(
    tokens: RecordedTokens, own_T: Float64, scale: float, slack_T: Float64, is_scaled: bool
) -> tuple[Check, str]:
    """Kept mass: mean of own over recorded probability; and whether tokens gain as truncation makes them.

    Beside a temperature gains say nothing, and ratios are heavy-tailed, so that a mean of few tokens is too small:
    there it takes tokens that were alone in what was kept.
    """
    rule = MeanRatio()
    rule.add(_rows(tokens, own_T), _rows(tokens, tokens.recorded_T))
    offset, interval, n, is_away = rule.measured()
    low, high = (math.nan, math.nan) if interval is None else (1 + interval.low, 1 + interval.high)
    diff_T = tokens.recorded_T - own_T
    differs_T = np.abs(diff_T) > scale + slack_T
    gaining = float((diff_T[differs_T] > 0).mean()) if differs_T.any() else math.nan
    alone = int(((tokens.recorded_T == 0) & (own_T < UNCERTAIN - 2 * slack_T - scale)).sum())
    is_cut = is_away and offset < 0 and (alone >= MIN_ROWS if is_scaled else gaining > GAINING)
    most = float(np.quantile(diff_T, 0.995)) if len(diff_T) else math.nan
    n_differ = int(differs_T.sum())
    gains = (
        f"{gaining:.0%} of {n_differ:,} tokens that differ by more than rounding gain" if n_differ else "none differ"
    )
    words = (
        f"mean of own over recorded probability, which is the mass kept by truncation ({gains}; {alone:,} are exactly "
        "0 where own ones are uncertain)"
    )
    limit = (
        f"below 1 by more than chance and {LEAST_OFFSET:g}, with "
        f"{f'{MIN_ROWS} such zeros beside a temperature' if is_scaled else f'{GAINING:.0%} gaining'}, means truncated "
        "(rule D09-mean-ratio); it supposes that the tokens were drawn from what is recorded"
    )
    halves = _halves(tokens, own_T)
    kept = (
        f"renormalised over a part of the vocabulary that keeps {1 + offset:.1%} of its mass on average "
        f"({halves}), at least {math.exp(-max(most, 0.0)):.1%} for 995 of 1,000 tokens"
    )
    return Check(TRUNCATED, words, 1 + offset, low, high, n, limit, is_cut), kept


def _halves(tokens: RecordedTokens, own_T: Float64) -> str:
    """Kept mass in early and late positions: a truncation is the same in both."""
    ratio_T = np.exp(np.minimum(own_T - tokens.recorded_T, 20.0))
    is_late_T = tokens.position_T > np.median(tokens.position_T)
    early, late = (float(ratio_T[part].mean()) if part.any() else math.nan for part in (~is_late_T, is_late_T))
    return f"{early:.1%} in earlier positions, {late:.1%} in later ones"


# Whose weights


def _nearest(tokens: RecordedTokens) -> str:
    return min(tokens.own, key=lambda arm: float(np.abs(tokens.recorded_T - tokens.own[arm]).mean()))


def _scale(tokens: RecordedTokens) -> tuple[float, str]:
    """Mean abs difference of the two own arms that are farthest apart [nat]; 0 where there is one only."""
    pairs = {
        f"{a} and {b}": float(np.abs(tokens.own[a] - tokens.own[b]).mean()) for a, b in combinations(tokens.own, 2)
    }
    if not pairs:
        return 0.0, ""
    words = max(pairs, key=lambda name: pairs[name])
    return max(pairs[words], FLOAT32), words


def _weights(
    tokens: RecordedTokens, own: str, scale: float, scale_words: str, slack_T: Float64,
    faults: list[Fault], checks: list[Check],
) -> Explanation:  # fmt: skip
    """What is left: rounding of the engine, or other weights."""
    distance_T = np.maximum(np.abs(tokens.recorded_T - tokens.own[own]) - slack_T, 0.0)
    n, mean = len(tokens), float(distance_T.mean())
    fitting = _fitting(tokens, own, scale, slack_T)
    if fitting is not None:
        checks.append(fitting)
        cause, next_check = CAUSES[OTHER_WEIGHTS]
        next_check = "find out why the rollouts ran on these weights (sync skipped, late, or of the wrong step)"
        faults.append(Fault(OTHER_WEIGHTS, fitting.words, cause, next_check))
        return _explanation(faults, checks)
    if not scale_words and mean > FLOAT32:
        words = f"{mean:.3g} nat from {own} on average, and no second engine's arm says what rounding makes of that"
        found = _explanation(faults, checks)
        return replace(found, name=found.name or CANNOT_TELL, words=f"{found.words}; {words}" if faults else words,
                       next_check="moediag capture train CKPT -o RUN")  # fmt: skip
    yard_T = _yardstick(tokens, scale_words)
    sums = cluster_sums(np.stack([distance_T, yard_T], axis=1), tokens.prompt_id_T)
    ratio, low, high = _ratio(sums)
    ratio, low, high = (value if yard_T.any() else mean / FLOAT32 for value in (ratio, low, high))
    is_far = (low if math.isfinite(low) else ratio) > LIMIT
    exact = float((distance_T == 0).mean())
    words = (
        f"distance of recorded log-probabilities from {own} ({mean:.3g} nat) in units of that between "
        f"{scale_words or 'float32 values'} ({max(scale, FLOAT32):.3g} nat); {exact:.0%} of tokens are the same"
    )
    limit = f"more than {LIMIT:g} means other weights, or another function (engines that round alike: 1)"
    is_float32 = bool(tokens.dtypes) and {tokens.dtypes.get(arm) for arm in tokens.own} == {"float32"}
    check = Check(OTHER_WEIGHTS, words, ratio, low, high, n, limit, is_far and not is_float32)
    checks.append(check)
    if is_far and is_float32:
        words = f"{mean:.3g} nat from {own} on average, but all own arms are float32: a coarser dtype does that, too"
        return Explanation(CANNOT_TELL, words, tuple(faults), tuple(checks),
                           "score the tokens in the rollout engine's dtype: moediag capture train CKPT --dtype "
                           "bfloat16 --name train-bf16 -o RUN")  # fmt: skip
    if is_far:
        cause, next_check = CAUSES[OTHER_WEIGHTS]
        words = f"{ratio:.2g} times as far from our own engines as these are from each other, by nothing named above"
        faults.append(Fault(OTHER_WEIGHTS, words, cause, next_check))
    if faults:
        return _explanation(faults, checks)
    words = (
        "equal to our own, bit for bit" if mean == 0 else
        f"no farther from {own} ({mean:.3g} nat) than rounding explains; a fault below that cannot be seen"
    )  # fmt: skip
    return Explanation(HEALTHY, words, (), tuple(checks), "nothing to do")


def _yardstick(tokens: RecordedTokens, scale_words: str) -> Float64:
    if not scale_words:
        return np.zeros(len(tokens))
    a, b = scale_words.split(" and ")
    return np.abs(tokens.own[a] - tokens.own[b])


def _ratio(sums_CM: Any) -> tuple[float, float, float]:
    """Ratio of two sums over prompts, with its interval."""
    interval = ratio_mean_interval(sums_CM[:, 0], sums_CM[:, 1], kind="positive").one()
    return interval.value, interval.low, interval.high


def _fitting(tokens: RecordedTokens, own: str, scale: float, slack_T: Float64) -> Check | None:
    """The other checkpoint that fits better, by more than chance, token by token (D28)."""
    group_T = np.unique(group_of(tokens.prompt_id_T, tokens.position_T), return_inverse=True)[1]
    n_copies = int(tokens.sample_index_T.max(initial=0)) + 1
    own_T = np.abs(tokens.recorded_T - tokens.own[own])
    best: Check | None = None
    for arm, other_T in tokens.others.items():
        gain_T = own_T - np.abs(tokens.recorded_T - other_T)
        if not mean_is_positive(np.bincount(group_T), np.bincount(group_T, gain_T), float((gain_T**2).sum()), n_copies,
                                len(tokens.others)):  # fmt: skip
            continue
        distance = float((own_T - gain_T).mean())
        words = (
            f"they fit the weights of arm {arm} ({distance:.3g} nat from it on average) better than those of "
            f"{own} ({float(own_T.mean()):.3g} nat)"
        )
        check = Check(OTHER_WEIGHTS, words, float(gain_T.mean()), math.nan, math.nan, len(tokens),
                      f"a gain above 0 by more than chance (1 in {1 / ALPHA:,.0f}) means that checkpoint",
                      True)  # fmt: skip
        best = check if best is None or check.value > best.value else best
    return best
