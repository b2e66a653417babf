"""Search with SMAC: `multi-fidelity` or `black-box`.

Parameters are integers, the positions of the ordered values. The base is the default configuration, and the
initial design begins with it. SMAC leaves it to the caller to continue a promoted run from its checkpoint.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import numpy as np
from bench import Bench
from ConfigSpace import Configuration, ConfigurationSpace, Integer
from smac import BlackBoxFacade, MultiFidelityFacade, Scenario
from smac.initial_design import RandomInitialDesign, SobolInitialDesign
from smac.runhistory.dataclasses import TrialValue

TRIALS_A_RUN = 5  # of Hyperband, for the tokens of a whole run; SMAC limits its initial design by the trials


class DefaultFirst:
    """Moves the default configuration to the start of an initial design."""

    def select_configurations(self: Any) -> list[Configuration]:
        default = self._configspace.get_default_configuration()
        return [default, *(found for found in super().select_configurations() if found != default)]


class RandomDesign(DefaultFirst, RandomInitialDesign): ...


class SobolDesign(DefaultFirst, SobolInitialDesign): ...


def facade(name: str, bench: Bench) -> Any:
    base = bench.indices(bench.base)
    space = ConfigurationSpace(seed=bench.seed)
    space.add(*(Integer(key, (0, len(bench.space[key]) - 1), default=base[key]) for key in bench.space))
    options = {"deterministic": True, "use_default_config": True, "seed": bench.seed}
    if name == "black-box":
        scenario = Scenario(space, n_trials=int(bench.budget), **options)
        design: Any = SobolDesign(scenario, n_configs_per_hyperparameter=8)
        return BlackBoxFacade(scenario, initial_design=design, logging_level=False)
    trials = TRIALS_A_RUN * int(bench.budget)
    scenario = Scenario(space, n_trials=trials, min_budget=1, max_budget=bench.points, **options)
    design = RandomDesign(scenario, n_configs_per_hyperparameter=10)
    return MultiFidelityFacade(scenario, initial_design=design, logging_level=False)


if __name__ == "__main__":
    bench = Bench()
    np.random.seed(bench.seed)
    search = facade(sys.argv[1], bench)
    with suppress(StopIteration):  # it finds no configuration that it has not tried
        while True:
            trial = search.ask()
            loss = bench.train(bench.at(dict(trial.config)), int(trial.budget or bench.points))[-1]
            search.tell(trial, TrialValue(cost=loss), save=False)
