"""The bounds of `region_bounds` where a matrix of pixels by pixels does not fit.

The matrix A (I for attackers without bias, E[I] + I_prior for any) is only ever multiplied by a
vector, `gradients.gradient_information` and `GaussianPrior.multiply_information`. Traces are
estimated with normal probes (Hutchinson 1990). Every step that is not exact errs downward:

- A trace of k probes is the trace times a mean of k weighted chi-squared variables. By convexity of
  exp, Chernoff's bound is worst for one eigenvalue, a chi-squared of k degrees of freedom: the
  estimate is below q times the trace with probability at most (q e^(1 - q))^(k/2), q < 1, and above
  it with as much for q > 1 (compare Roosta-Khorasani and Ascher 2015). Solved for q, this corrects
  the estimate for the confidence that is asked for, at any k and for any spectrum.
- Instead of b^T A^-1 b the value (b^T x)^2 / x^T A x is taken, for an x that conjugate gradients
  find. By Cauchy-Schwarz it is below for every x, so stopping early lowers the bound and cannot
  break it. A truncated eigendecomposition of I would err upward instead, which is why none is used.

What remains is the rounding of the products, float32 for a float32 model.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import special
from scipy.sparse import linalg

from tff_shadow.privacy.region_bounds import checked_weights

Multiply = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ProbedBound:
  """A lower bound of the region's mean squared error, from random probes.

  Attributes:
    value: Below the bound of the whole matrix with probability `confidence` or more, over the
      probes. This is what may be stated.
    estimate: The same without the correction for confidence: as likely above as below.
    confidence: In (0, 1).
    probes: How many were drawn.
  """

  value: float
  estimate: float
  confidence: float
  probes: int


def probed_trace_bound(
  multiply: Multiply, weights: np.ndarray, *, probes: int, seed: int, confidence: float = 0.95
) -> ProbedBound:
  """`trace_bound` from `probes` products: sum w / tr(M A M), M = diag(sqrt(w)).

  At 95 % confidence the correction costs 6.7 dB with 8 probes, 2.0 dB with 64, 1.0 dB with 256.

  Args:
    multiply: v -> A v for float64 [d]; A not negative.
    weights: [d], see `region_bounds`.
    probes: At least 1.
    seed: Of the probes.
    confidence: See `ProbedBound`.

  Raises:
    ValueError: If a number is out of range.
  """
  weights = checked_weights(weights)
  forms = [_form(multiply, b) for b in _region_probes(weights, probes, seed, confidence)]
  estimate = _ratio(float(weights.sum()), float(np.mean(forms)))
  return ProbedBound(
    estimate * _trace_quantile(probes, confidence, upper=False), estimate, confidence, probes
  )


def solved_bound(
  multiply: Multiply,
  weights: np.ndarray,
  *,
  probes: int,
  iterations: int,
  seed: int,
  confidence: float = 0.95,
  precondition: Multiply | None = None,
) -> ProbedBound:
  """Cramer-Rao or van Trees by probes and conjugate gradients: tr(M A^-1 M) / sum w from below.

  At 95 % confidence the correction costs 4.4 dB with 8 probes, 1.8 dB with 64, 0.9 dB with 256.
  Where A is singular on the region the value stays finite: a lower bound of infinity.

  Args:
    multiply: v -> A v for float64 [d]; A not negative.
    weights: [d], see `region_bounds`.
    probes: At least 1.
    iterations: Most steps of conjugate gradients per probe; more bring the value nearer.
    seed: Of the probes.
    confidence: See `ProbedBound`.
    precondition: v -> about A^-1 v, positive definite; the prior's covariance for van Trees, which
      leaves as many steps as I has directions that tell more than the prior.

  Raises:
    ValueError: If a number is out of range.
  """
  weights = checked_weights(weights)
  if iterations < 1:
    raise ValueError(f'iterations must be at least 1, found {iterations}')
  shape = (len(weights),) * 2
  matrix = linalg.LinearOperator(shape, multiply, dtype=np.float64)
  inverse = None
  if precondition is not None:
    inverse = linalg.LinearOperator(shape, precondition, dtype=np.float64)
  forms = []
  for b in _region_probes(weights, probes, seed, confidence):
    x, _ = linalg.cg(matrix, b, maxiter=iterations, tol=1e-6, atol=0.0, M=inverse)
    # It breaks down where A b is 0 within rounding; every x is valid.
    x = x if np.isfinite(x).all() else b
    forms.append(_ratio(float(b @ x) ** 2, _form(multiply, x)))
  estimate = float(np.mean(forms) / weights.sum())
  return ProbedBound(
    estimate / _trace_quantile(probes, confidence, upper=True), estimate, confidence, probes
  )


def _region_probes(weights, probes, seed, confidence):
  """M g with g standard normal."""
  if probes < 1:
    raise ValueError(f'probes must be at least 1, found {probes}')
  if not 0 < confidence < 1:
    raise ValueError(f'confidence must be in (0, 1), found {confidence}')
  return np.sqrt(weights) * np.random.default_rng(seed).standard_normal((probes, len(weights)))


def _form(multiply: Multiply, vector: np.ndarray) -> float:
  form = float(vector @ multiply(vector))
  if not math.isfinite(form):
    raise ValueError(f'multiply must give finite values, found {form} for v^T A v')
  return form


def _trace_quantile(probes: int, confidence: float, *, upper: bool) -> float:
  """The q with (q e^(1 - q))^(probes / 2) = 1 - confidence, above or below 1."""
  level = math.exp(2.0 * math.log(1.0 - confidence) / probes - 1.0)
  return float(-special.lambertw(-level, -1 if upper else 0).real)


def _ratio(numerator: float, denominator: float) -> float:
  if denominator > 0:
    return numerator / denominator
  return math.inf if numerator > 0 else 0.0
