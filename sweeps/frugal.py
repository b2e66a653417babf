"""The sampler `frugal`, which asks for the finished run that is worth the most for its new tokens.

Expected improvement chooses a recipe. Of the runs that tell something about this recipe, the sampler asks for
the one that removes the most uncertainty per new token: the recipe itself or its stand-in, at any horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import ndtr

from mainrun.files.hashing import sha256_json
from sweeps.coordinates import Coordinates, Values
from sweeps.sampling import SamplerSettings, trial_seed
from sweeps.surrogate import Drift, Runs, Surrogate, fit

SPREAD = 0.22  # the deviation of recipes near the base
NEAR = (0.2, 0.1, 0.05, 0.02)  # the deviations of recipes near a good one
CHANGED = 0.4  # the chance that a coordinate of a good recipe is changed
UNIFORM, AROUND_BASE, BELIEFS, AROUND_BELIEF = 120, 80, 8, 16
LATE_FIELDS = ("decay_frac", "decay_shape", "min_lr_frac")  # they act only from the decay on
LATE_VALUES = 8  # the largest number of values of a late field that are tried
LEAST_SHARE = 0.05  # a run costs at least this share of a whole run
# The movement of the best value of a field per doubling of the tokens, in nats or in the unit of the field.
DRIFT = {"lr": -0.22, "lr_aux": -0.15, "batch_size": 0.31}
DROPOUT_DRIFT = 0.025  # only where the whole run has more than one epoch
OTHER_DRIFT = 0.05  # the deviation of other drifts, as a share of the range
DOUBLINGS = 3  # p = log2(horizon) / DOUBLINGS


@dataclass(frozen=True)
class Asked:
    """A run that was asked for: a recipe and a horizon."""

    values: Values
    horizon: float

    @property
    def key(self) -> str:
        return f"{recipe_key(self.values)} {self.horizon!r}"


@dataclass(frozen=True)
class Finished:
    """A run whose result is known. The score of a run that diverged or failed is None."""

    asked: Asked
    score: float | None


@dataclass(frozen=True)
class Option:
    """A run that could be asked for, and what it is worth."""

    asked: Asked
    new_tokens: int
    value: float  # the information about the chosen recipe per new token
    stands_in: bool  # whether the run has a stand-in for the chosen recipe


@dataclass(frozen=True)
class Reason:
    """Why a run was asked for."""

    phase: str
    improvement: float = math.nan  # the expected improvement of the recipe, in the unit of the scores
    belief: float = math.nan  # the predicted score of the best recipe
    deviation: float = math.nan  # the standard deviation of this prediction
    noise: float = math.nan  # the standard deviation of the scores of one recipe
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Proposal:
    asked: Asked
    reason: Reason


NewTokens = Callable[[Asked], int | None]  # None if a run cannot be asked for


def recipe_key(values: Values) -> str:
    return _recipe_key(tuple(values.items()), tuple(map(type, values.values())))


@lru_cache(16_384)
def _recipe_key(items: tuple[tuple[str, Any], ...], kinds: tuple[type, ...]) -> str:
    """`kinds` are the types of the values, because 1, 1.0 and True are equal but have other keys."""
    return sha256_json(dict(items))[:16]


@dataclass(frozen=True)
class Bend:
    """Compresses large differences from the best score of a horizon."""

    best: dict[float, float]
    spread: float

    def apply(self, score: float, horizon: float) -> float:
        best = self.best[horizon]
        return best + self.spread * math.log1p(max(score - best, 0.0) / self.spread)

    def invert(self, bent: float, horizon: float) -> float:
        best = self.best.get(horizon, bent)
        if bent <= best:
            return bent
        return best + self.spread * math.expm1(min((bent - best) / self.spread, 50.0))


@dataclass(frozen=True)
class Scale:
    """The scale of standardized scores."""

    bend: Bend
    mean: float
    deviation: float

    def score(self, y: float, horizon: float) -> float:
        """Return the score that has a standardized score."""
        return self.bend.invert(self.mean + self.deviation * y, horizon)


@dataclass
class Frugal:
    """Choose runs. The choices depend only on the arguments of `ask` and on the earlier fits.

    drifting, near_base: False turns a part of the sampler off, to measure what it gains.
    """

    settings: SamplerSettings
    coordinates: Coordinates
    horizons: tuple[float, ...]
    whole_tokens: int  # the tokens of a whole run of the base
    epochs: float
    drifting: bool = True
    near_base: bool = True
    theta: np.ndarray | None = field(default=None, init=False)  # the kernel parameters of the last fit
    _last_fit: tuple[bytes, Surrogate] | None = field(default=None, init=False)  # and what it depends on

    def first_design(self) -> list[Asked]:
        """Return the runs that do not depend on scores. The first one is the base."""
        shortest = self.horizons[0]
        design = [Asked({}, horizon) for horizon in reversed(self.horizons)]
        rng = np.random.default_rng(trial_seed(self.settings.seed, 0))
        near = (self.settings.startup + 1) // 2 if self.near_base else 0
        seen = {recipe_key(self._full({}))}
        recipes = self._near_base(rng, near, seen)
        recipes += self._sobol(self.settings.startup - near, seen)
        return design + [Asked(values, shortest) for values in recipes]

    def _near_base(self, rng: np.random.Generator, count: int, seen: set[str]) -> list[Values]:
        recipes: list[Values] = []
        for _ in range(100 * count):
            if len(recipes) == count:
                break
            self._add(recipes, self.coordinates.decode(rng.normal(0, SPREAD, self.coordinates.size)), seen)
        return recipes

    def _sobol(self, count: int, seen: set[str]) -> list[Values]:
        from scipy.stats import qmc

        recipes: list[Values] = []
        if not count:
            return recipes
        seed = np.random.default_rng(trial_seed(self.settings.seed, 1))
        points = qmc.Sobol(len(self.coordinates.axes), scramble=True, rng=seed)
        for point in points.random_base2(math.ceil(math.log2(4 * count))):
            if len(recipes) < count:
                self._add(recipes, self.coordinates.at(point), seen)
        return recipes

    @staticmethod
    def _add(recipes: list[Values], values: Values, seen: set[str]) -> None:
        if recipe_key(values) not in seen:
            seen.add(recipe_key(values))
            recipes.append(values)

    def _full(self, values: Values) -> Values:
        return self.coordinates.decode(self.coordinates.encode(values))

    # -- asking

    def ask(
        self, number: int, finished: Sequence[Finished], pending: Sequence[Asked], new_tokens: NewTokens
    ) -> Proposal | None:
        """Return the run to train next, or None if there is nothing left to ask.

        number: the number of runs that were asked for before.
        finished, pending: these runs, in the order in which they were asked for.
        """
        asked = {run.asked.key for run in finished} | {run.key for run in pending}
        for run in self.first_design()[number:]:
            if run.key not in asked and new_tokens(run) is not None:
                return Proposal(run, Reason("first design"))
        scores = self._scores(finished)
        if not scores:
            return None
        scale, known, y = scores
        fitted = self._fit(known, y)
        self.theta = fitted.theta
        model = fitted.with_pending(self._runs(pending))
        rng = np.random.default_rng(trial_seed(self.settings.seed, number))
        earlier = [run.asked for run in finished] + list(pending)
        return self._best_option(model, scale, rng, earlier, new_tokens)

    def _best_option(
        self,
        model: Surrogate,
        scale: Scale,
        rng: np.random.Generator,
        earlier: Sequence[Asked],
        new_tokens: NewTokens,
    ) -> Proposal | None:
        recipes = {recipe_key(run.values): run.values for run in earlier}
        candidates = self._candidates(model, rng, recipes)
        runs = self._whole(list(candidates.values()))
        mean, variance = model.predict(runs)
        deviation = np.sqrt(variance)
        lowest = int(mean.argmin())
        improvement = expected_improvement(mean, deviation, mean[lowest])
        done = {recipe_key(run.values) for run in earlier if run.horizon == 1}
        keys = list(candidates)
        asked = {run.key for run in earlier}
        belief = scale.score(float(mean[lowest]), 1.0)
        for index in np.argsort(-improvement, kind="stable"):
            if keys[index] in done:
                continue
            options = self._options(model, candidates[keys[index]], asked, new_tokens)
            if not options:
                continue
            best = max(options, key=lambda option: (option.value, option.asked.horizon))
            reason = Reason(
                "search",
                float(improvement[index]) * scale.deviation,
                belief,
                float(deviation[lowest]) * scale.deviation,
                math.sqrt(model.noise_variance) * scale.deviation,
                tuple(options),
            )
            return Proposal(best.asked, reason)
        return None

    def _options(
        self, model: Surrogate, values: Values, asked: set[str], new_tokens: NewTokens
    ) -> list[Option]:
        """Return the runs that tell something about a recipe, the longest first."""
        z = self.coordinates.encode(values)
        target = Runs(z[None], np.zeros(1))
        size = self.coordinates.size
        assert self.theta is not None
        drift = self.theta[size : 2 * size]
        options = []
        for horizon in sorted(self.horizons, reverse=True):
            p = math.log2(horizon) / DOUBLINGS
            stand_in = self.coordinates.decode(z + p * drift)
            for stands_in, recipe in ((False, values), (True, stand_in)):
                run = Asked(recipe, horizon)
                if run.key in asked or (stands_in and recipe_key(recipe) == recipe_key(values)):
                    continue
                tokens = new_tokens(run)
                if tokens is None:
                    continue
                runs = self._runs([run])
                covariance = float(model.covariance(target, runs)[0, 0])
                variance = float(model.variance(runs)[0]) + model.noise_variance
                cost = max(tokens, LEAST_SHARE * self.whole_tokens)
                options.append(Option(run, tokens, covariance**2 / variance / cost, stands_in))
        return options

    def _candidates(
        self, model: Surrogate, rng: np.random.Generator, asked: dict[str, Values]
    ) -> dict[str, Values]:
        """Return the recipes from which the next one is chosen, by key. The asked recipes come first."""
        size = self.coordinates.size
        candidates = dict(asked)

        def add(recipes: Sequence[Values]) -> None:
            for values in recipes:
                candidates.setdefault(recipe_key(values), values)

        around_base = AROUND_BASE if self.near_base else 0
        uniform = UNIFORM + AROUND_BASE - around_base
        add([self.coordinates.at(point) for point in rng.random((uniform, len(self.coordinates.axes)))])
        add([self.coordinates.decode(z) for z in rng.normal(0, SPREAD, (around_base, size))])
        recipes = list(candidates.values())
        order = model.mean(self._whole(recipes)).argsort(kind="stable")
        for index in order[:BELIEFS]:
            z = self.coordinates.encode(recipes[index])
            deviations = np.resize(NEAR, AROUND_BELIEF)[:, None]
            changed = rng.random((AROUND_BELIEF, size)) < CHANGED
            moved = z + changed * deviations * rng.normal(size=(AROUND_BELIEF, size))
            add([self.coordinates.decode(row) for row in moved])
            add(self._late_variants(recipes[index]))
        return candidates

    def _late_variants(self, values: Values) -> list[Values]:
        variants = []
        full = self._full(values)
        for name in LATE_FIELDS:
            if name not in full:
                continue
            lattice = self.coordinates.by_name[name].lattice
            for index in np.unique(np.linspace(0, len(lattice) - 1, LATE_VALUES).round().astype(int)):
                variants.append({**full, name: lattice[index]})
        return variants

    # -- scores

    def _fit(self, runs: Runs, y: np.ndarray) -> Surrogate:
        """Return the surrogate of some scores.

        The last one is kept, because `beliefs` and the next `ask` often know the same scores.
        """
        start = b"" if self.theta is None else self.theta.tobytes()
        key = runs.z.tobytes() + runs.p.tobytes() + y.tobytes() + start
        if self._last_fit is None or self._last_fit[0] != key:
            self._last_fit = key, fit(runs, y, self.drift(), self.theta)
        return self._last_fit[1]

    def _scores(self, finished: Sequence[Finished]) -> tuple[Scale, Runs, np.ndarray] | None:
        """Return the standardized scores of all finished runs, or None if no run has a score."""
        by_horizon: dict[float, list[float]] = {}
        for run in finished:
            if run.score is not None:
                by_horizon.setdefault(run.asked.horizon, []).append(run.score)
        if not by_horizon:
            return None
        best = {horizon: min(scores) for horizon, scores in by_horizon.items()}
        first = finished[: len(self.first_design())]
        above = [r.score - best[r.asked.horizon] for r in first if r.score is not None]
        bend = Bend(best, max(float(np.median(above)) if above else 0.0, 1e-6))
        used = []
        bent = []
        for run in finished:
            horizon = run.asked.horizon
            scores = by_horizon.get(horizon)
            if scores is None:  # all runs of this horizon diverged
                continue
            # a run that diverged counts as worse than the worst run of its horizon
            score = run.score if run.score is not None else 1.5 * max(scores) - 0.5 * min(scores)
            used.append(run.asked)
            bent.append(bend.apply(score, horizon))
        scale = Scale(bend, float(np.mean(bent)), float(np.std(bent)) or 1.0)
        y = (np.array(bent) - scale.mean) / scale.deviation
        return scale, self._runs(used), y

    def beliefs(self, finished: Sequence[Finished]) -> list[tuple[float, Values]]:
        """Return the predicted scores of the recipes that were trained to the end, the lowest first."""
        scores = self._scores(finished)
        whole = [r.asked.values for r in finished if r.asked.horizon == 1 and r.score is not None]
        if scores is None or not whole:
            return []
        scale, known, y = scores
        mean = self._fit(known, y).mean(self._whole(whole))
        order = mean.argsort(kind="stable")
        return [(scale.score(float(mean[index]), 1.0), whole[index]) for index in order]

    # -- coordinates of runs

    def _runs(self, asked: Sequence[Asked]) -> Runs:
        z = np.array([self.coordinates.encode(run.values) for run in asked]).reshape(
            -1, self.coordinates.size
        )
        return Runs(z, np.array([math.log2(run.horizon) / DOUBLINGS for run in asked]))

    def _whole(self, recipes: Sequence[Values]) -> Runs:
        return self._runs([Asked(values, 1.0) for values in recipes])

    def fitted_drift(self) -> dict[str, float]:
        """Return how far the best value of each number moves per doubling, on the scale of its axis."""
        if self.theta is None:
            return {}
        drift = self.theta[self.coordinates.size : 2 * self.coordinates.size]
        moved = {}
        for axis in self.coordinates.axes:
            if not axis.texts:
                moved[axis.name] = float(drift[self.coordinates.slices[axis.name]][0] * axis.span / DOUBLINGS)
        return moved

    def drift(self) -> Drift:
        """Return the prior of the drift, in coordinates per unit of p."""
        mean = np.zeros(self.coordinates.size)
        deviation = np.full(self.coordinates.size, OTHER_DRIFT)
        if not self.drifting:
            return Drift(mean, deviation, fixed=True)
        for axis in self.coordinates.axes:
            per_doubling = DRIFT.get(axis.name, 0.0)
            if axis.name in DRIFT and axis.scale != "log":
                per_doubling = 0.0
            if axis.name == "dropout" and self.epochs > 1:
                per_doubling = DROPOUT_DRIFT
            if per_doubling:
                moved = DOUBLINGS * per_doubling / axis.span
                mean[self.coordinates.slices[axis.name]] = moved
                deviation[self.coordinates.slices[axis.name]] = abs(moved)
        return Drift(mean, deviation)


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, lowest: float) -> np.ndarray:
    """Return how much a recipe is expected to be better than the lowest belief."""
    gap = lowest - mean
    z = gap / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return gap * ndtr(z) + deviation * density
