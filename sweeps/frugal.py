"""The sampler `frugal`, which asks for the finished run that is worth the most for its new tokens.

Expected improvement chooses a recipe. Of the runs that tell something about this recipe, the sampler asks for
the one that removes the most uncertainty per new token: the recipe itself or its stand-in, at any horizon, or
as a late change of the base (late_change.py).
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
from sweeps.late_change import DECAY_FIELDS, ROUNDING
from sweeps.sampling import SamplerSettings, trial_seed
from sweeps.surrogate import Drift, Runs, Surrogate, fit

SPREAD = 0.22  # the deviation of recipes near the base
NEAR = (0.2, 0.1, 0.05, 0.02)  # the deviations of recipes near a good one
CHANGED = 0.4  # the chance that a coordinate of a good recipe is changed
UNIFORM, AROUND_BASE, BELIEFS, AROUND_BELIEF = 120, 80, 8, 16
DECAY_VALUES = 8  # the largest number of values of a field of the decay that are tried
LEAST_SHARE = 0.05  # a run costs at least this share of a whole run
# The movement of the best value of a field per doubling of the tokens, in nats or in the unit of the field.
DRIFT = {"lr": -0.22, "lr_aux": -0.15, "batch_size": 0.31}
DROPOUT_DRIFT = 0.025  # only where the whole run has more than one epoch
OTHER_DRIFT = 0.05  # the deviation of other drifts, as a share of the range
DOUBLINGS = 3  # p = log2(horizon) / DOUBLINGS


Kind = tuple[float, float]  # runs with the same horizon and the same `late` have comparable scores
WHOLE: Kind = (1.0, 0.0)


@dataclass(frozen=True)
class Asked:
    """A run that was asked for: a recipe and a horizon, or a late change to a recipe."""

    values: Values
    horizon: float
    late: float = 0.0  # the share of the tokens after which the base changes to the recipe, or 0

    @property
    def key(self) -> str:
        late = f" late {self.late!r}" if self.late else ""
        return f"{recipe_key(self.values)} {self.horizon!r}{late}"

    @property
    def kind(self) -> Kind:
        return self.horizon, self.late


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
    """Compresses large differences from the best score of a kind of runs."""

    best: dict[Kind, float]
    spread: float

    def apply(self, score: float, kind: Kind) -> float:
        best = self.best[kind]
        return best + self.spread * math.log1p(max(score - best, 0.0) / self.spread)

    def invert(self, bent: float, kind: Kind) -> float:
        best = self.best.get(kind, bent)
        if bent <= best:
            return bent
        return best + self.spread * math.expm1(min((bent - best) / self.spread, 50.0))


@dataclass(frozen=True)
class Scale:
    """The scale of standardized scores."""

    bend: Bend
    mean: float
    deviation: float

    def score(self, y: float) -> float:
        """Return the score of a whole run that has a standardized score."""
        return self.bend.invert(self.mean + self.deviation * y, WHOLE)


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
        done = {recipe_key(run.values) for run in earlier if run.kind == WHOLE}
        keys = list(candidates)
        asked = {run.key for run in earlier}
        belief = scale.score(float(mean[lowest]))
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
        target = self._whole([values])
        options = []
        for run in self._runs_about(values):
            tokens = None if run.key in asked else new_tokens(run)
            if tokens is None:
                continue
            runs = self._runs([run])
            covariance = float(model.covariance(target, runs)[0, 0])
            variance = float(model.variance(runs)[0]) + model.noise_variance
            cost = max(tokens, LEAST_SHARE * self.whole_tokens)
            stands_in = recipe_key(run.values) != recipe_key(values)
            options.append(Option(run, tokens, covariance**2 / variance / cost, stands_in))
        return options

    def _runs_about(self, values: Values) -> list[Asked]:
        """Return the runs of a recipe and of its stand-ins, the longest first."""
        assert self.theta is not None
        size = self.coordinates.size
        drift = self.theta[size : 2 * size]
        z = self.coordinates.encode(values)
        runs = []
        for horizon in sorted(self.horizons, reverse=True):
            stand_in = self.coordinates.decode(z + math.log2(horizon) / DOUBLINGS * drift)
            runs.append(Asked(values, horizon))
            if recipe_key(stand_in) != recipe_key(values):
                runs.append(Asked(stand_in, horizon))
        if self.settings.late:
            runs.append(Asked(self._with_late_decay(values), 1.0, self.settings.late))
        return runs

    def _with_late_decay(self, values: Values) -> Values:
        """Return the recipe, or its stand-in whose decay begins after the late change."""
        longest = self._longest_late_decay
        if values.get("decay_frac", 0.0) <= longest:
            return values
        allowed = [value for value in self.coordinates.by_name["decay_frac"].lattice if value <= longest]
        return {**values, "decay_frac": allowed[-1]}

    @property
    def _longest_late_decay(self) -> float:
        return 1 - (self.settings.late or 0.0) + ROUNDING

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
            add(self._decay_variants(recipes[index]))
        return candidates

    def _decay_variants(self, values: Values) -> list[Values]:
        variants = []
        full = self._full(values)
        for name in DECAY_FIELDS:
            if name not in full:
                continue
            lattice = self.coordinates.by_name[name].lattice
            for index in np.unique(np.linspace(0, len(lattice) - 1, DECAY_VALUES).round().astype(int)):
                variants.append({**full, name: lattice[index]})
        return variants

    # -- scores

    def _fit(self, runs: Runs, y: np.ndarray) -> Surrogate:
        """Return the surrogate of some scores.

        The last one is kept, because `beliefs` and the next `ask` often know the same scores.
        """
        start = b"" if self.theta is None else self.theta.tobytes()
        late = b"" if runs.late is None else runs.late.tobytes()
        key = runs.z.tobytes() + runs.p.tobytes() + late + y.tobytes() + start
        if self._last_fit is None or self._last_fit[0] != key:
            self._last_fit = key, fit(runs, y, self.drift(), self.theta)
        return self._last_fit[1]

    def _scores(self, finished: Sequence[Finished]) -> tuple[Scale, Runs, np.ndarray] | None:
        """Return the standardized scores of all finished runs, or None if no run has a score."""
        first = finished[: len(self.first_design())]
        finished = [*finished, *self._base_as_late_change(finished)]
        by_kind: dict[Kind, list[float]] = {}
        for run in finished:
            if run.score is not None:
                by_kind.setdefault(run.asked.kind, []).append(run.score)
        if not by_kind:
            return None
        best = {kind: min(scores) for kind, scores in by_kind.items()}
        above = [r.score - best[r.asked.kind] for r in first if r.score is not None]
        bend = Bend(best, max(float(np.median(above)) if above else 0.0, 1e-6))
        used = []
        bent = []
        for run in finished:
            scores = by_kind.get(run.asked.kind)
            if scores is None:  # all runs of this kind diverged
                continue
            # a run that diverged counts as worse than the worst run of its kind
            score = run.score if run.score is not None else 1.5 * max(scores) - 0.5 * min(scores)
            used.append(run.asked)
            bent.append(bend.apply(score, run.asked.kind))
        scale = Scale(bend, float(np.mean(bent)), float(np.std(bent)) or 1.0)
        y = (np.array(bent) - scale.mean) / scale.deviation
        return scale, self._runs(used), y

    def _base_as_late_change(self, finished: Sequence[Finished]) -> list[Finished]:
        """Return the base's whole run as a late change to the base, so the bias is known to be 0 there.

        A base whose learning rate decays before the change has no late change.
        """
        if not self.settings.late or self._full({}).get("decay_frac", 0.0) > self._longest_late_decay:
            return []
        whole = Asked({}, 1.0)
        late = Asked({}, 1.0, self.settings.late)
        return [Finished(late, run.score) for run in finished if run.asked == whole]

    def beliefs(self, finished: Sequence[Finished]) -> list[tuple[float, Values]]:
        """Return the predicted scores of the recipes that were trained to the end, the lowest first."""
        scores = self._scores(finished)
        whole = [r.asked.values for r in finished if r.asked.kind == WHOLE and r.score is not None]
        if scores is None or not whole:
            return []
        scale, known, y = scores
        mean = self._fit(known, y).mean(self._whole(whole))
        order = mean.argsort(kind="stable")
        return [(scale.score(float(mean[index])), whole[index]) for index in order]

    # -- coordinates of runs

    def _runs(self, asked: Sequence[Asked]) -> Runs:
        z = np.array([self.coordinates.encode(run.values) for run in asked]).reshape(
            -1, self.coordinates.size
        )
        late = np.array([float(run.late > 0) for run in asked]) if self.settings.late else None
        return Runs(z, np.array([math.log2(run.horizon) / DOUBLINGS for run in asked]), late)

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
