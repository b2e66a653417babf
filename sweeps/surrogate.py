"""A Gaussian process that predicts the final score of a recipe from short and whole runs.

A run is described by the coordinates z of its recipe and by p = log2(horizon) / 3, so p = 0 is a whole
run and p = -1 is an eighth of a run. The kernel has two parts. One part is shared by all recipes and
follows the scores from one horizon to the next. The other part depends on the recipe, and drifts with the
horizon: the best recipe of a horizon is at z + p * drift if z is the best recipe of whole runs.

A late change (late_change.py) observes the whole run of its recipe plus a bias. The bias is a Gaussian
process with the same length scales and a variance of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

# Log-normal priors: the median, and the standard deviation of the logarithm.
LENGTH = (0.7, 0.7)  # the distance in coordinates over which scores stay similar
SIGNAL = (1.0, 0.7)  # the differences between recipes that all horizons have in common
HORIZON_SIGNAL = (0.3, 0.7)  # the differences between recipes that depend on the horizon
NOISE = (0.05, 0.7)
BIAS = (0.3, 0.7)  # the differences between the late change and the whole run of a recipe
LENGTH_BOUNDS = (0.08, 6.0)
NOISE_BOUNDS = (0.004, 1.0)
SIGNAL_BOUNDS = (0.01, 100.0)
FIRST_ITERATIONS = 30
LATER_ITERATIONS = 8


@dataclass(frozen=True)
class Drift:
    """The prior of the drift: a mean and a standard deviation for each coordinate.

    fixed: whether the drift stays at its mean.
    """

    mean: np.ndarray
    deviation: np.ndarray
    fixed: bool = False


@dataclass(frozen=True)
class Runs:
    """The runs that a surrogate knows: their coordinates (n, D) and their values of p (n).

    late: 1 for late changes and 0 for other runs (n), or None if the study has no late changes.
    """

    z: np.ndarray
    p: np.ndarray
    late: np.ndarray | None = None

    def __add__(self, other: Runs) -> Runs:
        late = None
        if self.late is not None and other.late is not None:
            late = np.concatenate([self.late, other.late])
        return Runs(np.concatenate([self.z, other.z]), np.concatenate([self.p, other.p]), late)


class Surrogate:
    """The posterior of the scores, given the standardized scores y of finished runs."""

    def __init__(self, runs: Runs, y: np.ndarray, theta: np.ndarray) -> None:
        """theta: the parameters of the kernel, see `prior`."""
        self.runs = runs
        self.y = y
        self.theta = theta
        self.noise_variance = float(np.exp(2 * theta[2 * runs.z.shape[1] + 2]))
        noise = self.noise_variance * np.eye(len(y))
        self._factor = cho_factor(kernel(runs, runs, theta) + noise, lower=True)
        self._weights = cho_solve(self._factor, y)

    def mean(self, runs: Runs) -> np.ndarray:
        return kernel(runs, self.runs, self.theta) @ self._weights

    def covariance(self, a: Runs, b: Runs) -> np.ndarray:
        """Return the posterior covariance of the scores without noise."""
        known = kernel(self.runs, b, self.theta)
        return kernel(a, b, self.theta) - kernel(a, self.runs, self.theta) @ cho_solve(self._factor, known)

    def variance(self, runs: Runs) -> np.ndarray:
        return self._variance(runs, kernel(self.runs, runs, self.theta))

    def predict(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the variance."""
        known = kernel(runs, self.runs, self.theta)
        # the order in memory decides in which order `_variance` adds
        return known @ self._weights, self._variance(runs, np.ascontiguousarray(known.T))

    def _variance(self, runs: Runs, known: np.ndarray) -> np.ndarray:
        prior = kernel_diagonal(runs, self.theta)
        return np.maximum(prior - (known * cho_solve(self._factor, known)).sum(0), 1e-12)

    def with_pending(self, pending: Runs) -> Surrogate:
        """Return a surrogate that also has the pending runs, with their own means as scores."""
        if not len(pending.p):
            return self
        return Surrogate(self.runs + pending, np.concatenate([self.y, self.mean(pending)]), self.theta)


def prior(drift: Drift, late: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the deviation of the kernel's parameters.

    The parameters are the logarithms of the length scales (D), the drift (D), and the logarithms of the two
    signals and of the noise. With late changes, the last parameter is the logarithm of their bias.
    """
    size = len(drift.mean)
    scalars = np.array([SIGNAL, HORIZON_SIGNAL, NOISE] + [BIAS] * late)
    mean = np.concatenate([np.full(size, np.log(LENGTH[0])), drift.mean, np.log(scalars[:, 0])])
    deviation = np.concatenate([np.full(size, LENGTH[1]), drift.deviation, scalars[:, 1]])
    return mean, deviation


@dataclass(frozen=True)
class Problem:
    """What a fit needs that does not depend on the parameters of the kernel."""

    runs: Runs
    y: np.ndarray
    mean: np.ndarray  # of the prior
    deviation: np.ndarray

    @cached_property
    def products(self) -> np.ndarray:
        return np.outer(self.runs.p, self.runs.p)

    @cached_property
    def shared(self) -> np.ndarray:
        return _shared(self.products)

    @cached_property
    def both_late(self) -> np.ndarray | None:
        """Where both runs are late changes: 1, or None if the study has no late changes."""
        late = self.runs.late
        return None if late is None else np.outer(late, late)

    @cached_property
    def apart(self) -> np.ndarray:
        return self.runs.p[:, None] - self.runs.p[None, :]

    @cached_property
    def identity(self) -> np.ndarray:
        return np.eye(len(self.y))


def _distances(a: Runs, b: Runs, theta: np.ndarray) -> np.ndarray:
    """Return the differences of the drifting coordinates, in units of the length scales: (D, n, m)."""
    size = a.z.shape[1]
    length = np.exp(theta[:size])
    drift = theta[size : 2 * size]
    x = (a.z - np.outer(a.p, drift)) / length
    y = (b.z - np.outer(b.p, drift)) / length
    return x.T[:, :, None] - y.T[:, None, :]


def _variances(runs: Runs, theta: np.ndarray) -> np.ndarray:
    """Return the squares of the signals and of the noise, and that of the bias if there is one."""
    return np.asarray(np.exp(2 * theta[2 * runs.z.shape[1] :]))


def _signals(a: Runs, b: Runs, theta: np.ndarray) -> np.ndarray:
    variances = _variances(a, theta)
    signals = variances[0] + variances[1] * np.outer(a.p, b.p)
    if a.late is not None and b.late is not None:
        signals += variances[3] * np.outer(a.late, b.late)
    return signals


def _shared(product: np.ndarray) -> np.ndarray:
    """Return the part of the kernel that all recipes share, for products p p'."""
    return 4 + 9 * product + 4 * product**2


def kernel(a: Runs, b: Runs, theta: np.ndarray) -> np.ndarray:
    """Return the prior covariance of the scores without noise."""
    similarity = np.exp(-0.5 * (_distances(a, b, theta) ** 2).sum(0))
    return _signals(a, b, theta) * similarity + _shared(np.outer(a.p, b.p))


def kernel_diagonal(runs: Runs, theta: np.ndarray) -> np.ndarray:
    variances = _variances(runs, theta)
    diagonal = variances[0] + variances[1] * runs.p**2 + _shared(runs.p**2)
    return diagonal if runs.late is None else diagonal + variances[3] * runs.late


def objective(theta: np.ndarray, runs: Runs, y: np.ndarray, drift: Drift) -> tuple[float, np.ndarray]:
    """Return the negative logarithm of the posterior density of the parameters, and its gradient."""
    return _objective(theta, Problem(runs, y, *prior(drift, runs.late is not None)))


def _objective(theta: np.ndarray, problem: Problem) -> tuple[float, np.ndarray]:
    y = problem.y
    size = problem.runs.z.shape[1]
    distances = _distances(problem.runs, problem.runs, theta)
    squares = distances**2
    similarity = np.exp(-0.5 * squares.sum(0))
    variances = _variances(problem.runs, theta)
    noise = variances[2]
    signals = variances[0] + variances[1] * problem.products
    if problem.both_late is not None:
        signals += variances[3] * problem.both_late
    recipes = signals * similarity
    kernel = recipes + problem.shared + noise * problem.identity
    factor = cho_factor(kernel, lower=True, check_finite=False)
    weights = cho_solve(factor, y, check_finite=False)
    value = 0.5 * y @ weights + np.log(np.diag(factor[0])).sum()
    # the derivative of the value with respect to the kernel matrix
    inverse = cho_solve(factor, problem.identity, check_finite=False)
    slope = 0.5 * (inverse - np.outer(weights, weights))
    gradient = np.empty_like(theta)
    weighted = slope * recipes
    gradient[:size] = (weighted * squares).sum((1, 2))
    gradient[size : 2 * size] = (weighted * distances * problem.apart).sum((1, 2)) / np.exp(theta[:size])
    gradient[2 * size] = 2 * variances[0] * (slope * similarity).sum()
    gradient[2 * size + 1] = 2 * variances[1] * (slope * similarity * problem.products).sum()
    gradient[2 * size + 2] = 2 * noise * np.trace(slope)
    if problem.both_late is not None:
        gradient[2 * size + 3] = 2 * variances[3] * (slope * similarity * problem.both_late).sum()
    scaled = (theta - problem.mean) / problem.deviation
    return float(value + 0.5 * scaled @ scaled), gradient + scaled / problem.deviation


def fit(runs: Runs, y: np.ndarray, drift: Drift, start: np.ndarray | None = None) -> Surrogate:
    """Return the surrogate with the most probable parameters. `start` is the result of an earlier fit."""
    problem = Problem(runs, y, *prior(drift, runs.late is not None))
    size = runs.z.shape[1]
    bounds = [tuple(np.log(LENGTH_BOUNDS))] * size
    bounds += [(m, m) for m in drift.mean] if drift.fixed else [(None, None)] * size
    bounds += [tuple(np.log(SIGNAL_BOUNDS))] * 2 + [tuple(np.log(NOISE_BOUNDS))]
    bounds += [tuple(np.log(SIGNAL_BOUNDS))] * (runs.late is not None)
    iterations = FIRST_ITERATIONS if start is None else LATER_ITERATIONS
    result = minimize(
        _objective,
        problem.mean if start is None else start,
        args=(problem,),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": iterations},
    )
    return Surrogate(runs, y, result.x)
