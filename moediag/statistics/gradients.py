"""Norms, cosines and biases of gradients known by their inner products only, with intervals clustered by prompt.

Invariants:
    - the gradients themselves are never needed: any resampling of prompts is a quadratic form of the C x C inner
      products between prompts, exactly;
    - what says *expected* is free of the noise that a batch adds to its own norm: products of different prompts only.
      A squared norm of a mean of C noisy gradients is too large by trace / C, and two estimates made of the same
      tokens share their noise, so that a plain cosine between them is too near to 1;
    - where two gradients share tokens and carry no signal at all, their batch cosine is still near 1: what noise alone
      gives (``noise_cosine``) stands beside it, and only the noise-removed change says which of two is nearer;
    - the same input gives the same interval, bit for bit.

Intervals are BCa (Efron 1987) over 2,000 draws of prompts, the acceleration by the jackknife, its levels those of
Student's t with the spread that C draws of C prompts lose given back (Hesterberg 2015). A prompt drawn twice counts
twice but never as a pair with itself. Measured coverage of the nominal 0.95 (signal to noise 20, relative bias 0.3, 250
sets, standard error 0.014; Gaussian gradients / Student-t with 3 degrees of freedom):

    ================ ============= =============
    statistic        16 prompts    64 prompts
    ================ ============= =============
    gain             .93 / .92     .97 / .95
    relative bias    .95 / .93     .95 / .96
    norm             .94 / .91     .94 / .94
    variance ratio   .96 / .94     .97 / .90
    ================ ============= =============

At no bias at all the interval of the relative bias is too wide (0.99): squared norms have no linear part there.

Cosines and their change get the outer of BCa and the jackknife's Student-t bounds: BCa alone calls truncated weights
farther than no correction in nine sets of ten where the weights tell nothing, the jackknife alone covers 0.80 with 16
prompts. ``benchmarks/gradient_coverage.py`` (200 sets, standard error 0.015 at 0.95, log-normal sequence weights with
sigma 1; 16 / 64 prompts; nominal of a wrong "nearer": 0.025):

    ============================== =========== =============== =============== =========== =============
    truth, signal to noise         interval    covers: cosine  covers: change  nearer      batch nearer
    ============================== =========== =============== =============== =========== =============
    weights tell nothing, 0          0 /   0    -- /  --        -- /  --       0   / 0     1.0 / .995
    weights tell nothing, 1        .25 / .03   1.0 / 1.0       1.0 / 1.0       0   / 0     1.0 / .995
    weights tell nothing, 4        .93 / .86   1.0 / 1.0       1.0 / 1.0       0   / 0     1.0 / .995
    weights tell nothing, 20, 100  1.0 / 1.0   1.0 / 1.0       1.0 / 1.0       0   / 0     1.0 / .995
    they turn it by 45 degrees, 1  .24 / .12   .67 / .91       .96 / .96       .04 / .02   1.0 / 1.0
    they turn it by 45 degrees, 4  .89 / .98   .63 / .75       .91 / .96       .18 / .89   1.0 / 1.0
    they turn it by 45 degrees, 20 .96 / 1.0   .65 / .63       .89 / .96       .32 / .95   1.0 / 1.0
    one-token, a difference        1.0 / 1.0   1.0 / 1.0       1.0 / 1.0       .54 / 1.0   1.0 / 1.0
    one-token, no difference       1.0 / 1.0   1.0 / 1.0       1.0 / 1.0       0   / 0     1.0 / 1.0
    ============================== =========== =============== =============== =========== =============

A cosine to a sequence-weighted reference is not covered: every miss is too near 1, for rare large weights that a batch
does not hold are in neither gradient. Whoever shows such a cosine shows it without an interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from moediag.statistics.intervals import MIN_CLUSTERS, Interval, effective_freedom, student_t, too_few
from moediag.statistics.resampling import N_DRAWS, SEED, TAIL

Float64 = NDArray[np.float64]

_IN_NOISE: Final = "an expected gradient is not above its own noise; audit more sequences"
_ONE_PROMPT: Final = "1 prompt: its gradients cannot be told from their noise"
NO_VARIATION: Final = "no variation between prompts"
_ONE_SIDED: Final = "noise decides: its draws lie on one side of the value; see bias_floor"
_MAX_UNDEFINED: Final = 0.005
"""Share of draws that may have no value (a norm of 0 within its noise) before no interval is given."""


@dataclass(frozen=True)
class PromptGradients:
    """Gradients of M methods by prompt, as combinations of B vectors known by their inner products.

    Args:
        gram_BB: inner products of the vectors.
        coefficient_MB: how every method combines them.
        prompt_B: 0 .. C-1, the prompt of every vector.
        n_sequences: N; the gradient of a batch is the sum over prompts divided by N.
        names: of the methods.
    """

    gram_BB: Float64
    coefficient_MB: Float64
    prompt_B: NDArray[np.int64]
    n_sequences: int
    names: tuple[str, ...]

    @property
    def n_prompts(self) -> int:
        """C."""
        return int(self.prompt_B.max(initial=-1)) + 1

    def of(self, name: str) -> Float64:
        """Coefficients of one method."""
        row_B: Float64 = self.coefficient_MB[self.names.index(name)]
        return row_B

    def products(self, left_B: Float64, right_B: Float64) -> Float64:
        """(C, C) inner products of two combinations' gradients by prompt, scaled so that their mean is the batch's."""
        member_BC = np.zeros((len(self.prompt_B), self.n_prompts))
        member_BC[np.arange(len(self.prompt_B)), self.prompt_B] = self.n_prompts / self.n_sequences
        left_CB = (member_BC * left_B[:, None]).T
        return np.asarray(left_CB @ self.gram_BB @ (member_BC * right_B[:, None]))


COSINES: Final = ("cosine", "cosine_change")
STATISTICS: Final = (*COSINES, "norm", "gain", "relative_bias", "variance", "variance_ratio")
"""What is said of expected gradients, each with an interval over prompts."""


@dataclass(frozen=True)
class Comparison:
    """What one method's gradient is beside a reference.

    Args:
        expected: :data:`STATISTICS`.
        batch_cosine, batch_relative_bias: of this very batch, noise and all. They have no interval: draws of prompts
            scatter about a value that is too high, and covered the batch's own mean in 0.67 to 0.91 of simulated sets
            and the cosine of the expected gradients in 0 to 0.09.
        noise_cosine: the batch cosine that noise alone gives.
        bias_floor: 95 % of what ``batch_relative_bias`` would be if the difference had no bias at all.
    """

    expected: dict[str, Interval]
    batch_cosine: float
    noise_cosine: float
    batch_relative_bias: float
    bias_floor: float


def compare(gradients: PromptGradients, method: str, reference: str, baseline: str = "none") -> Comparison:
    """One method's gradient against a reference's.

    Returns:
        ``norm``: of the expected gradient. ``cosine``: between both expected gradients. ``cosine_change``: that minus
        the baseline's, paired. ``gain``: length along the reference over the reference's (1 = the right step).
        ``relative_bias``: norm of the expected difference over the reference's norm. ``variance``: trace of the
        covariance of prompts' gradients, and ``variance_ratio`` that over the reference's.

    Source: unbiased products as in a U-statistic (Hoeffding 1948); BCa, Efron (1987); the cosines' remaining bias of
        1 / C by the jackknife (Quenouille 1956); the floor by random signs of prompts' differences, Fisher's
        randomisation test; the noise's cosine: ours, trace of the covariance of both gradients between prompts over
        the root of the product of both variances, to which the batch cosine tends as signals vanish.
    """
    method_B, reference_B, baseline_B = (gradients.of(name) for name in (method, reference, baseline))
    # The difference is combined before its norm is taken: m.m - 2 m.r + r.r would cancel.
    pairs = {
        "mm": (method_B, method_B),
        "mr": (method_B, reference_B),
        "rr": (reference_B, reference_B),
        "dd": (method_B - reference_B, method_B - reference_B),
        "nn": (baseline_B, baseline_B),
        "nr": (baseline_B, reference_B),
    }
    n_prompts, weights_DC = gradients.n_prompts, _resamplings(gradients.n_prompts)
    products = {name: gradients.products(*pair) for name, pair in pairs.items()}
    with np.errstate(invalid="ignore", divide="ignore"):
        forms = {name: _forms(product_CC, weights_DC) for name, product_CC in products.items()}
        values = _statistics(forms)
        own = {name: (form.plain_D[0], form.covariance_D[0]) for name, form in forms.items()}
        (plain_mm, noise_mm), (plain_mr, noise_mr), (plain_rr, noise_rr) = own["mm"], own["mr"], own["rr"]
        batch_cosine = plain_mr / np.sqrt(plain_mm * plain_rr) if n_prompts > 1 else np.nan
        noise_cosine = noise_mr / np.sqrt(noise_mm * noise_rr)
        batch_bias = np.sqrt(max(own["dd"][0], 0.0) / plain_rr)
    return Comparison(
        {name: _interval(name, values[name], n_prompts) for name in STATISTICS},
        float(np.clip(batch_cosine, -1, 1)),
        float(np.clip(noise_cosine, -1, 1)),
        float(batch_bias),
        bias_floor(products["dd"], products["rr"]),
    )


def norm_interval(gradients: PromptGradients, name: str) -> tuple[Interval, float]:
    """Norm of one expected gradient, and its squared norm over what noise alone adds to a batch's (signal to noise)."""
    product_CC = gradients.products(gradients.of(name), gradients.of(name))
    weights_DC = _resamplings(gradients.n_prompts)
    with np.errstate(invalid="ignore", divide="ignore"):
        forms = _forms(product_CC, weights_DC)
        norm = _interval("norm", np.sqrt(forms.crossed_D), gradients.n_prompts)
        signal = forms.crossed_D[0] / (forms.covariance_D[0] / gradients.n_prompts)
    return norm, float(signal)


def _statistics(forms: dict[str, _Forms]) -> dict[str, Float64]:
    x = {name: form.crossed_D for name, form in forms.items()}
    norm_D, norm_r_D, norm_n_D = (np.sqrt(x[name]) for name in ("mm", "rr", "nn"))  # NaN where not above its noise
    variance_D, variance_r_D = (np.maximum(forms[name].covariance_D, 0) for name in ("mm", "rr"))
    cosine_D = x["mr"] / (norm_D * norm_r_D)
    return {
        "norm": norm_D,
        "cosine": cosine_D,
        "cosine_change": cosine_D - x["nr"] / (norm_n_D * norm_r_D),
        "gain": x["mr"] / np.square(norm_r_D),
        "relative_bias": np.sqrt(np.maximum(x["dd"], 0)) / norm_r_D,
        "variance": variance_D,
        "variance_ratio": variance_D / variance_r_D,
    }


@lru_cache(maxsize=2)
def _resamplings(n_prompts: int) -> Float64:
    """How often each prompt counts: as it is, then the draws, then every prompt left out once."""
    ones_C = np.ones((1, n_prompts))
    if n_prompts < MIN_CLUSTERS:
        return ones_C
    draws = np.random.default_rng(SEED).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_DRAWS)
    weights_DC: Float64 = np.concatenate([ones_C, draws.astype(np.float64), 1 - np.eye(n_prompts)])
    weights_DC.flags.writeable = False
    return weights_DC


@dataclass(frozen=True)
class _Forms:
    """Inner products of the means of two gradients, for D ways to weight the prompts.

    Args:
        crossed_D: by products of different prompts only: unbiased.
        plain_D: of the means as they are, noise and all.
        covariance_D: trace of the covariance between prompts; of a gradient with itself its variance.
    """

    crossed_D: Float64
    plain_D: Float64
    covariance_D: Float64


def _forms(product_CC: Float64, weights_DC: Float64) -> _Forms:
    own_C, square_DC, size_D = np.diagonal(product_CC), np.square(weights_DC), weights_DC.sum(axis=1)
    total_D = ((weights_DC @ product_CC) * weights_DC).sum(axis=1)
    plain_D = total_D / np.square(size_D)
    crossed_D = (total_D - square_DC @ own_C) / (np.square(size_D) - square_DC.sum(axis=1))
    covariance_D = (weights_DC @ own_C / size_D - plain_D) * size_D / (size_D - 1)
    return _Forms(crossed_D, plain_D, covariance_D)


def bias_floor(difference_CC: Float64, reference_CC: Float64) -> float:
    """95 % quantile of the batch's relative bias, had every prompt's difference been as likely the other way round.

    Args:
        difference_CC: inner products of prompts' differences from the reference; reference_CC: of the reference.

    Returns:
        In the unit of ``batch_relative_bias``; NaN with fewer than 8 prompts.
    """
    n_prompts = len(difference_CC)
    norm = float(reference_CC.sum())
    if n_prompts < MIN_CLUSTERS or norm <= 0:
        return float("nan")
    signs_DC = np.random.default_rng(SEED).choice([-1.0, 1.0], size=(N_DRAWS, n_prompts))
    squared_D = ((signs_DC @ difference_CC) * signs_DC).sum(axis=1)
    return float(np.sqrt(max(float(np.quantile(squared_D, 1 - 2 * TAIL)), 0.0) / norm))


def _interval(name: str, values_D: Float64, n_prompts: int) -> Interval:
    """Interval from a value, its draws and its values with every prompt left out once."""
    value, none, is_cosine = float(values_D[0]), float("nan"), name in COSINES
    if not np.isfinite(value):
        return Interval(none, none, none, n_prompts, _ONE_PROMPT if n_prompts == 1 else _IN_NOISE)
    if n_prompts < MIN_CLUSTERS:
        return Interval(_at_most_1(name, value), none, none, n_prompts, too_few(n_prompts))
    draws_D, left_out_C = values_D[1 : 1 + N_DRAWS], values_D[1 + N_DRAWS :]
    is_known_D = np.isfinite(draws_D)
    if 1 - is_known_D.mean() > _MAX_UNDEFINED or not np.isfinite(left_out_C).all():
        return Interval(none, none, none, n_prompts, _IN_NOISE)
    if np.ptp(left_out_C) <= 1e-12 * max(1.0 if is_cosine else 1e-300, abs(value)):
        return Interval(_at_most_1(name, value), none, none, n_prompts, NO_VARIATION)
    draws_D = draws_D[is_known_D]
    # Norms of differences that are all noise grow when prompts are drawn: no level of such draws bounds anything.
    if not is_cosine and min(np.mean(draws_D <= value), np.mean(draws_D >= value)) < TAIL:
        return Interval(value, none, none, n_prompts, _ONE_SIDED)
    low, high = np.quantile(draws_D, _levels(value, draws_D, left_out_C)).tolist()
    if is_cosine:
        value, bounds = _jackknife(value, left_out_C)
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return Interval(_at_most_1(name, value), _at_most_1(name, low), _at_most_1(name, high), n_prompts)


def _at_most_1(name: str, value: float) -> float:
    """A noise-removed cosine may come out above 1; what is meant lies in [-1, 1]. Changes stay as they are."""
    return float(np.clip(value, -1, 1)) if name == "cosine" else value


def _jackknife(value: float, left_out_C: Float64) -> tuple[float, tuple[float, float]]:
    """A cosine without its bias of 1 / C, and Student-t bounds about it.

    Noise along the gradients themselves does not turn them, yet removing it lifts the cosine above 1: shuffled weights
    then read as "farther than no correction" in nine sets of ten.
    """
    n_prompts, influence_C = len(left_out_C), left_out_C - left_out_C.mean()
    centre = n_prompts * value - (n_prompts - 1) * float(left_out_C.mean())
    half = student_t(effective_freedom(influence_C[:, None])[0]) * np.sqrt(
        (n_prompts - 1) / n_prompts * np.square(influence_C).sum()
    )
    return centre, (float(centre - half), float(centre + half))


def _levels(value: float, draws_D: Float64, left_out_C: Float64) -> Float64:
    """Quantiles of the draws that bound the interval, corrected for bias and acceleration."""
    below = (np.sum(draws_D < value) + 0.5 * np.sum(draws_D == value)) / len(draws_D)
    bias = special.ndtri(np.clip(below, 1 / len(draws_D), 1 - 1 / len(draws_D)))
    influence_C = left_out_C.mean() - left_out_C
    spread = np.square(influence_C).sum()
    acceleration = (influence_C**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    n_prompts = len(left_out_C)
    far = float(special.stdtrit(n_prompts - 1.0, 1 - TAIL)) * np.sqrt(n_prompts / (n_prompts - 1))
    z = bias + np.array([-far, far])
    return np.asarray(special.ndtr(bias + z / (1 - acceleration * z)))
