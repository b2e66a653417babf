"""Choose the values of each trial with Optuna's samplers.

The values depend on the study and on the scores reported so far, in their order; never on workers or clocks.
Optuna's study is kept in memory. It gets the scores only before a new generation, and every trial has a new
sampler, seeded with the trial's number.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mainrun.config import TrainConfig
from sweeps.space import Parameter, Range, active_parameters
from sweeps.study import Study

if TYPE_CHECKING:
    import optuna


def trial_seed(study: Study, number: int) -> int:
    """Return the seed of a trial's sampler."""
    digest = hashlib.sha256(repr((study.sampler.seed, number)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


class TrialSampler:
    """Suggests the values of trials, with the ask-and-tell interface of Optuna."""

    def __init__(self, study: Study, base: TrainConfig) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.study = study
        self.base = base
        self.optuna_study = optuna.create_study(direction="minimize")
        self.distributions = {name: distribution(p) for name, p in study.space.items()}
        self.open_trials: dict[int, optuna.Trial] = {}
        self.worst: float | None = None  # of the scores so far

    def ask(self, number: int) -> dict[str, Any]:
        """Return the values of a trial. Trial 0 is the base and has none."""
        import optuna

        if number == 0:
            return {}
        # Random values do not depend on earlier trials, so none are kept.
        is_random = self.study.sampler.name == "random"
        optuna_study = optuna.create_study() if is_random else self.optuna_study
        optuna_study.sampler = self._sampler(number)
        trial = optuna_study.ask()
        values: dict[str, Any] = {}
        for name, parameter in self.study.space.items():
            if not parameter.when:
                values[name] = trial._suggest(name, self.distributions[name])
        for name, parameter in active_parameters(self.study.space, values, self.base).items():
            if parameter.when:
                values[name] = trial._suggest(name, self.distributions[name])
        if not is_random:
            self.open_trials[number] = trial
        return values

    def tell(self, number: int, scores: Mapping[int, float], completed: bool) -> None:
        """Report the scores of a finished trial by rung.

        A trial without scores diverged or failed. It gets a value worse than all others, so that the sampler
        avoids it.
        """
        from optuna import trial as optuna_trial

        if scores:
            self.worst = max(self.worst or float("-inf"), *scores.values())
        trial = self.open_trials.pop(number, None)
        if trial is None:
            return
        for rung, score in scores.items():
            trial.report(score, rung)
        if not scores:
            bad_score = (self.worst or 100.0) * 1.5
            self.optuna_study.tell(trial, bad_score, optuna_trial.TrialState.COMPLETE)
        elif completed:
            self.optuna_study.tell(trial, scores[max(scores)], optuna_trial.TrialState.COMPLETE)
        else:
            self.optuna_study.tell(trial, None, optuna_trial.TrialState.PRUNED)

    def _sampler(self, number: int) -> Any:
        from optuna import samplers

        settings = self.study.sampler
        seed = trial_seed(self.study, number)
        if settings.name == "tpe":
            has_conditions = any(p.when for p in self.study.space.values())
            return samplers.TPESampler(
                multivariate=True, group=has_conditions, seed=seed, n_startup_trials=settings.startup
            )
        if settings.name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=settings.startup)
        if settings.name == "cmaes":
            return samplers.CmaEsSampler(seed=seed, n_startup_trials=settings.startup)
        if settings.name == "qmc":  # all trials are points of one sequence, so they share its seed
            return samplers.QMCSampler(seed=settings.seed, scramble=True, warn_asynchronous_seeding=False)
        if settings.name == "grid":
            grid = {name: grid_values(p) for name, p in self.study.space.items()}
            return samplers.GridSampler(grid, seed=settings.seed)
        return samplers.RandomSampler(seed=seed)


def distribution(parameter: Parameter) -> Any:
    """Return Optuna's distribution of a parameter."""
    from optuna import distributions

    if not isinstance(parameter, Range):
        return distributions.CategoricalDistribution(parameter.values)
    low = parameter.low
    high = parameter.high
    step = parameter.step
    if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
        return distributions.IntDistribution(low, high, log=parameter.log, step=step or 1)
    return distributions.FloatDistribution(float(low), float(high), log=parameter.log, step=step)


def grid_values(parameter: Parameter) -> list[Any]:
    """Return the values of a parameter on a grid."""
    if not isinstance(parameter, Range):
        return list(parameter.values)
    assert parameter.step is not None
    count = int((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
    highest = distribution(parameter).high  # 0 + 3 * 0.1 is slightly above 0.3, which Optuna would refuse
    return [min(parameter.low + i * parameter.step, highest) for i in range(count)]


def grid_size(space: Mapping[str, Parameter]) -> int:
    """Return the number of cells of a grid."""
    cells = 1
    for parameter in space.values():
        cells *= len(grid_values(parameter))
    return cells
