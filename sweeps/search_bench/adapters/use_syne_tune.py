"""Search with Syne Tune: `asha`, `bohb`, `asha-cqr` or `cqr`.

The loop is the one of Syne Tune's tuner with one worker. Parameters are ordinal choices, and the base is the
only point to evaluate first. ASHA stops trials and resumes none, so a trial trains each of its points once.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import sys
from typing import Any

import numpy as np
from bench import Bench
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import ordinal
from syne_tune.optimizer.baselines import ASHA, ASHACQR, BOHB, CQR
from syne_tune.optimizer.scheduler import SchedulerDecision

MULTI_FIDELITY = {"asha": ASHA, "bohb": BOHB, "asha-cqr": ASHACQR}


def scheduler(name: str, bench: Bench) -> Any:
    space = {name: ordinal(values, kind="equal") for name, values in bench.space.items()}
    options: dict[str, Any] = {"random_seed": bench.seed, "points_to_evaluate": [bench.base]}
    if name == "cqr":
        return CQR(space, metric="loss", **options)
    return MULTI_FIDELITY[name](space, metric="loss", time_attr="point", max_t=bench.points, **options)


def run_trial(search: Any, trial: Trial, bench: Bench) -> None:
    for point in range(1, bench.points + 1):
        result = {"loss": bench.train(trial.config, point)[-1], "point": point}
        if search.on_trial_result(trial, result) == SchedulerDecision.STOP:
            search.on_trial_remove(trial)
            return
    search.on_trial_complete(trial, result)


def main() -> None:
    bench = Bench()
    logging.disable(logging.INFO)
    np.random.seed(bench.seed)  # several searchers also draw from the global generator
    search = scheduler(sys.argv[1], bench)
    for number in itertools.count():
        trial = Trial(number, search.suggest().config, datetime.datetime.now())
        search.on_trial_add(trial)
        run_trial(search, trial, bench)


if __name__ == "__main__":
    main()
