"""Which values a trial gets. A function of the study and of the results told so far, in their order; never of workers or clocks.

Optuna's samplers run on a study of their own in memory. It is told results only when a generation is asked for, and each trial's sampler
is made anew, with a seed from the trial's number.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mainrun.config import TrainConfig
from sweeps.space import Parameter, Range, active
from sweeps.study import Study

if TYPE_CHECKING:
    import optuna


def seed_of(study: Study, number: int) -> int:
    return int.from_bytes(hashlib.sha256(repr((study.sampler.seed, number)).encode()).digest()[:4], "little")


class Asker:
    def __init__(self, study: Study, base: TrainConfig) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.study, self.base = study, base
        self.mirror = optuna.create_study(direction="minimize")
        self.domains = {name: distribution(p) for name, p in study.space.items()}
        self.asked: dict[int, optuna.Trial] = {}
        self.worst: float | None = None

    def ask(self, number: int) -> dict[str, Any]:
        """Trial 0 is the base itself: it has no values of its own."""
        import optuna

        if number == 0:
            return {}
        forgets = self.study.sampler.name == "random"  # it looks at nothing that was before
        mirror = optuna.create_study() if forgets else self.mirror
        mirror.sampler = self._sampler(number)
        trial = mirror.ask()
        space, values = self.study.space, dict[str, Any]()
        for name, parameter in space.items():
            if not parameter.when:
                values[name] = trial._suggest(name, self.domains[name])
        for name, parameter in active(space, values, self.base).items():
            if parameter.when:
                values[name] = trial._suggest(name, self.domains[name])
        if not forgets:
            self.asked[number] = trial
        return values

    def tell(self, number: int, values: Mapping[int, float], finished: bool) -> None:
        """values: by rung. A trial that diverged has none: it counts as worse than the worst, so that the sampler stays away."""
        from optuna.trial import TrialState

        if values:
            self.worst = max(self.worst or float("-inf"), *values.values())
        trial = self.asked.pop(number, None)
        if trial is None:
            return
        for rung, value in values.items():
            trial.report(value, rung)
        last = values[max(values)] if values else (self.worst or 100.0) * 1.5
        self.mirror.tell(
            trial,
            None if values and not finished else last,
            TrialState.PRUNED if values and not finished else TrialState.COMPLETE,
        )

    def _sampler(self, number: int) -> Any:
        from optuna import samplers

        how, seed = self.study.sampler, seed_of(self.study, number)
        conditional = any(p.when for p in self.study.space.values())
        if how.name == "tpe":
            return samplers.TPESampler(
                multivariate=True, group=conditional, seed=seed, n_startup_trials=how.startup
            )
        if how.name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=how.startup)
        if how.name == "cmaes":
            return samplers.CmaEsSampler(seed=seed, n_startup_trials=how.startup)
        if how.name == "qmc":  # one sequence, so one seed: the number says where in it
            return samplers.QMCSampler(seed=how.seed, scramble=True, warn_asynchronous_seeding=False)
        if how.name == "grid":
            return samplers.GridSampler(
                {name: _grid(p) for name, p in self.study.space.items()}, seed=how.seed
            )
        return samplers.RandomSampler(seed=seed)


def distribution(p: Parameter) -> Any:
    from optuna import distributions as d

    if not isinstance(p, Range):
        return d.CategoricalDistribution(p.values)
    if all(isinstance(x, int) for x in (p.low, p.high)) and (p.step is None or isinstance(p.step, int)):
        return d.IntDistribution(int(p.low), int(p.high), log=p.log, step=int(p.step or 1))
    return d.FloatDistribution(float(p.low), float(p.high), log=p.log, step=p.step)


def _grid(p: Parameter) -> list[Any]:
    if not isinstance(p, Range):
        return list(p.values)
    assert p.step is not None
    count = int((p.high - p.low) / p.step + 1e-9) + 1
    highest = distribution(p).high  # 0 + 3 * 0.1 is a little above 0.3, and Optuna refuses such a value
    return [min(p.low + i * p.step, highest) for i in range(count)]
