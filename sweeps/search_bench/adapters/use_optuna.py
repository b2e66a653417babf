"""Search with Optuna: `tpe`, `tpe-hyperband`, `random-halving` or `gp`.

Parameters are integers, the positions of the ordered values. The base is enqueued, so it is the first trial.
Optuna prunes trials and resumes none, so a trial trains each of its points once.
"""

from __future__ import annotations

import sys
from typing import Any

import optuna
from bench import Bench
from optuna.pruners import HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import GPSampler, RandomSampler, TPESampler


def method(name: str, bench: Bench) -> tuple[Any, Any]:
    """Return the sampler and the pruner of a method."""
    if name == "tpe":
        return TPESampler(seed=bench.seed, multivariate=True), NopPruner()
    if name == "tpe-hyperband":
        return TPESampler(seed=bench.seed), HyperbandPruner(max_resource=bench.points)
    if name == "random-halving":
        return RandomSampler(seed=bench.seed), SuccessiveHalvingPruner()
    return GPSampler(seed=bench.seed), NopPruner()


def run_trial(trial: optuna.Trial, bench: Bench) -> float:
    values = bench.at({name: trial.suggest_int(name, 0, len(bench.space[name]) - 1) for name in bench.space})
    if isinstance(trial.study.pruner, NopPruner):
        return bench.train(values, bench.points)[-1]
    for point in range(1, bench.points):
        trial.report(bench.train(values, point)[-1], point)
        if trial.should_prune():
            raise optuna.TrialPruned
    return bench.train(values, bench.points)[-1]


def main() -> None:
    bench = Bench()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler, pruner = method(sys.argv[1], bench)
    # Hyperband chooses the bracket of a trial from the name of the study
    study = optuna.create_study(study_name=f"bench {bench.seed}", sampler=sampler, pruner=pruner)
    study.enqueue_trial(bench.indices(bench.base))
    study.optimize(lambda trial: run_trial(trial, bench))


if __name__ == "__main__":
    main()
