"""Tests the surrogate: its gradient, its posterior, and the drift of the best recipe with the horizon."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sweeps.surrogate import Drift, Runs, Surrogate, fit, kernel, objective, prior

SIZE = 3


def random_runs(
    rng: np.random.Generator,
    count: int,
    horizons: tuple[float, ...] = (0.25, 0.5, 1.0),
    late: bool = False,
) -> Runs:
    p = np.log2(rng.choice(horizons, count)) / 3
    z = rng.normal(0, 0.4, (count, SIZE))
    if not late:
        return Runs(z, p)
    changes = (rng.random(count) < 0.4).astype(float)
    return Runs(z, p * (1 - changes), changes)


def some_drift() -> Drift:
    return Drift(np.array([0.2, 0.0, -0.1]), np.array([0.2, 0.05, 0.1]))


@pytest.mark.parametrize("late", [False, True])
def test_the_gradient_equals_differences(late: bool) -> None:
    rng = np.random.default_rng(0)
    runs = random_runs(rng, 25, late=late)
    y = rng.normal(size=25)
    mean, deviation = prior(some_drift(), late)
    assert len(mean) == 2 * SIZE + 3 + late
    for _ in range(3):
        theta = mean + 0.5 * deviation * rng.normal(size=len(mean))
        _, gradient = objective(theta, runs, y, some_drift())
        numeric = []
        for step in 1e-6 * np.eye(len(theta)):
            up = objective(theta + step, runs, y, some_drift())[0]
            down = objective(theta - step, runs, y, some_drift())[0]
            numeric.append((up - down) / 2e-6)
        assert gradient == pytest.approx(np.array(numeric), abs=1e-4, rel=1e-5)


def test_without_noise_the_mean_passes_through_the_scores() -> None:
    rng = np.random.default_rng(1)
    runs = random_runs(rng, 20)
    y = rng.normal(size=20)
    theta = prior(some_drift())[0]
    theta[-1] = math.log(1e-4)
    model = Surrogate(runs, y, theta)
    assert model.mean(runs) == pytest.approx(y, abs=1e-3)
    assert model.variance(runs).max() < 1e-5


@pytest.mark.parametrize("late", [False, True])
def test_the_posterior_equals_that_of_the_joint_distribution(late: bool) -> None:
    rng = np.random.default_rng(2)
    runs = random_runs(rng, 15, late=late)
    new = random_runs(rng, 6, late=late)
    y = rng.normal(size=15)
    theta = prior(some_drift(), late)[0]
    model = Surrogate(runs, y, theta)
    both = runs + new
    joint = kernel(both, both, theta)
    joint[:15, :15] += math.exp(2 * theta[2 * SIZE + 2]) * np.eye(15)
    inverse = np.linalg.inv(joint[:15, :15])
    covariance = joint[15:, 15:] - joint[15:, :15] @ inverse @ joint[:15, 15:]
    assert model.mean(new) == pytest.approx(joint[15:, :15] @ inverse @ y)
    assert model.covariance(new, new) == pytest.approx(covariance)
    assert model.variance(new) == pytest.approx(np.diag(covariance))


def test_pending_runs_reduce_the_variance_and_keep_the_mean() -> None:
    rng = np.random.default_rng(3)
    runs = random_runs(rng, 15)
    pending = random_runs(rng, 2)
    new = random_runs(rng, 5)
    model = Surrogate(runs, rng.normal(size=15), prior(some_drift())[0])
    later = model.with_pending(pending)
    assert later.mean(new) == pytest.approx(model.mean(new))
    assert (later.variance(new) < model.variance(new)).all()


def test_the_drift_of_a_shifted_quadratic_is_recovered() -> None:
    """The best recipe moves from 0.2 at an eighth of the run to -0.2 in whole runs."""
    rng = np.random.default_rng(4)
    runs = Runs(rng.uniform(-0.7, 0.7, (40, 1)), rng.choice([-1, -2 / 3, -1 / 3, 0], 40))
    best = -0.2 - 0.4 * runs.p
    y = 4 * (runs.z[:, 0] - best) ** 2 + 0.02 * rng.normal(size=40)
    drift = Drift(np.zeros(1), np.full(1, 0.5))
    theta = None
    for _ in range(4):
        model = fit(runs, (y - y.mean()) / y.std(), drift, theta)
        theta = model.theta
    assert model.theta[1] == pytest.approx(-0.4, abs=0.05)


def test_the_parameters_stay_within_their_bounds() -> None:
    """Equal scores and scores of pure noise would otherwise have extreme parameters."""
    rng = np.random.default_rng(5)
    runs = random_runs(rng, 30)
    for y in (np.zeros(30), rng.normal(size=30)):
        model = fit(runs, y, some_drift())
        for _ in range(5):
            model = fit(runs, y, some_drift(), model.theta)
        length, noise = np.exp(model.theta[:SIZE]), math.exp(model.theta[-1])
        assert (length >= 0.08).all() and (length <= 6).all() and 0.004 <= noise <= 1


def test_a_late_change_observes_the_whole_run_with_a_bias() -> None:
    z = np.random.default_rng(6).normal(0, 0.4, (4, SIZE))
    theta = prior(some_drift(), late=True)[0]
    whole, late = (Runs(z, np.zeros(4), np.full(4, kind)) for kind in (0.0, 1.0))
    expected = kernel(Runs(z, np.zeros(4)), Runs(z, np.zeros(4)), theta)
    assert kernel(whole, whole, theta) == pytest.approx(expected)
    assert kernel(whole, late, theta) == pytest.approx(expected)
    bias = kernel(late, late, theta) - expected
    similarity = (expected - 4) / math.exp(2 * theta[2 * SIZE])
    assert bias == pytest.approx(math.exp(2 * theta[-1]) * similarity)


@pytest.mark.parametrize("scatter", [0.02, 1.0])
def test_the_bias_of_late_changes_is_learned(scatter: float) -> None:
    """Late changes that repeat the whole runs have a small bias, and unrelated ones a large bias."""
    rng = np.random.default_rng(7)
    z = rng.uniform(-0.5, 0.5, (24, 1))
    y = np.sin(4 * z[:, 0])
    late = y + scatter * np.cos(5 * z[:, 0])
    runs = Runs(np.concatenate([z, z]), np.zeros(48), np.repeat([0.0, 1.0], 24))
    drift = Drift(np.zeros(1), np.full(1, 0.05))
    scores = np.concatenate([y, late]) + 0.01 * rng.normal(size=48)
    model = fit(runs, scores, drift)
    for _ in range(3):
        model = fit(runs, scores, drift, model.theta)
    bias = math.exp(model.theta[-1])
    assert (bias > 0.4) == (scatter == 1) and (bias < 0.2) == (scatter == 0.02)
