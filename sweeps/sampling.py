"""Choose the values of each trial with Optuna's samplers.

The values depend only on the study file and on the scores that were reported so far. The scores are reported
in the order of the trial numbers. The values therefore do not depend on the number of workers or on timing.

The Optuna study is kept in memory. The scores of finished trials are added to the Optuna study only before
a new generation is sampled. Every trial gets a new sampler, whose seed depends on the trial's number.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mainrun.config import TrainConfig
from sweeps.space import Parameter, Range, Space, active_parameters

if TYPE_CHECKING:
    import optuna


# -- samplers

# Each function below creates an Optuna sampler from the sampler settings, the search space and a seed.


def tpe(settings: SamplerSettings, space: Space, seed: int) -> Any:
    from optuna.samplers import TPESampler

    has_conditions = any(parameter.when for parameter in space.values())
    return TPESampler(multivariate=True, group=has_conditions, seed=seed, n_startup_trials=settings.startup)


def gp(settings: SamplerSettings, space: Space, seed: int) -> Any:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed, n_startup_trials=settings.startup)


def cmaes(settings: SamplerSettings, space: Space, seed: int) -> Any:
    from optuna.samplers import CmaEsSampler

    return CmaEsSampler(seed=seed, n_startup_trials=settings.startup)


def random(settings: SamplerSettings, space: Space, seed: int) -> Any:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def grid(settings: SamplerSettings, space: Space, seed: int) -> Any:
    """Create a sampler that visits the cells of a grid.

    The order of the cells depends on the seed, so every trial of a study uses the same seed.
    """
    from optuna.samplers import GridSampler

    cells = {name: grid_values(parameter) for name, parameter in space.items()}
    return GridSampler(cells, seed=settings.seed)


def qmc(settings: SamplerSettings, space: Space, seed: int) -> Any:
    """Create a sampler that follows a quasi-random sequence.

    The quasi-random sequence depends on the seed, so every trial of a study uses the same seed.
    """
    from optuna.samplers import QMCSampler

    return QMCSampler(seed=settings.seed, scramble=True, warn_asynchronous_seeding=False)


SAMPLERS: dict[str, Callable[[SamplerSettings, Space, int], Any]] = {
    "tpe": tpe,
    "gp": gp,
    "cmaes": cmaes,
    "random": random,
    "grid": grid,
    "qmc": qmc,
}

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[(*SAMPLERS, "frugal")]


class SamplerSettings(BaseModel):
    """The [sampler] table of a study file, which defines how the values of trials are chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: SamplerName = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    startup: Annotated[
        int, Field(ge=1, le=10_000, description="number of random trials before the sampler uses scores")
    ] = 8
    generation: Annotated[
        int,
        Field(
            ge=1,
            le=1000,
            description="number of trials in a generation, which are sampled together "
            "and without the scores of the previous generation",
        ),
    ] = 4
    lanes: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="number of runs that the sampler frugal has under way at the same time; "
            "part of what the trials are",
        ),
    ] = 2
    horizons: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(
            min_length=1,
            strict=False,
            description="lengths of the runs of the sampler frugal, as shares of a whole run; the last is 1",
        ),
    ] = (0.25, 0.5, 1.0)
    late: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="share of the tokens after which the sampler frugal may change the base to a recipe; "
            "if absent, it never does",
        ),
    ] = None


def trial_seed(sampler_seed: int, number: int) -> int:
    """Compute the seed of a trial's sampler from the study's sampler seed and the trial number."""
    digest = hashlib.sha256(repr((sampler_seed, number)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


# -- trials


class TrialSampler:
    """Suggest the values of trials with Optuna's ask-and-tell interface."""

    def __init__(self, settings: SamplerSettings, space: Space, base: TrainConfig) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.settings = settings
        self.space = space
        self.base = base
        self.optuna_study = optuna.create_study(direction="minimize")
        self.distributions = {name: distribution(parameter) for name, parameter in space.items()}
        self.open_trials: dict[int, optuna.Trial] = {}
        self.worst: float | None = None  # the highest (worst) score of any trial so far

    def ask(self, number: int) -> dict[str, Any]:
        """Return the values of a trial. The dictionary is empty for trial 0, which trains the base config."""
        import optuna

        if number == 0:
            return {}
        # The random sampler ignores earlier trials, so these trials are not kept in the Optuna study.
        is_random = self.settings.name == "random"
        optuna_study = optuna.create_study() if is_random else self.optuna_study
        optuna_study.sampler = self._sampler(number)
        trial = optuna_study.ask()
        values: dict[str, Any] = {}
        for name, parameter in self.space.items():
            if not parameter.when:
                values[name] = trial._suggest(name, self.distributions[name])
        for name, parameter in active_parameters(self.space, values, self.base).items():
            if parameter.when:
                values[name] = trial._suggest(name, self.distributions[name])
        if not is_random:
            self.open_trials[number] = trial
        return values

    def tell(self, number: int, scores: Mapping[int, float], completed: bool) -> None:
        """Report the scores of a finished trial to the sampler.

        `scores` maps the index of a rung to the score at this rung. A trial that diverged or failed may have
        no scores. The sampler then receives a very bad score for the trial, to avoid similar settings.
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
        create = SAMPLERS[self.settings.name]
        return create(self.settings, self.space, trial_seed(self.settings.seed, number))


# -- parameters


def distribution(parameter: Parameter) -> Any:
    """Convert a parameter to an Optuna distribution."""
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
    """Return all values that the grid sampler tries for a parameter."""
    if not isinstance(parameter, Range):
        return list(parameter.values)
    assert parameter.step is not None
    count = int((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
    # Clip rounding errors, such as 3 * 0.1 > 0.3, because Optuna rejects values above the maximum.
    highest = distribution(parameter).high
    return [min(parameter.low + i * parameter.step, highest) for i in range(count)]


def grid_size(space: Mapping[str, Parameter]) -> int:
    """Return the number of cells in the grid of a search space."""
    cells = 1
    for parameter in space.values():
        cells *= len(grid_values(parameter))
    return cells
