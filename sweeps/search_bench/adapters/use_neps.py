"""Search with NePS: `priorband` or `async-hyperband`.

Parameters are integers, the positions of the ordered values. The base is their prior and the first trial:
PriorBand trains it to the end, and asynchronous Hyperband to the first rung, as their options allow.
NePS names the earlier trial of a promoted run, so the run continues from its checkpoint.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import neps
import numpy as np
import torch
from bench import Bench

FIDELITY = "point of the run"  # the name of no parameter


def space(bench: Bench) -> Any:
    base = bench.indices(bench.base)
    parameters: dict[str, Any] = {FIDELITY: neps.IntegerFidelity(lower=1, upper=bench.points)}
    for name, values in bench.space.items():
        prior = {"prior": base[name], "prior_confidence": "medium"}
        parameters[name] = neps.Integer(lower=0, upper=len(values) - 1, **prior)
    return type("Space", (neps.PipelineSpace,), parameters)()


def method(name: str, bench: Bench) -> Any:
    if name == "priorband":
        return neps.algorithms.priorband(space(bench), sample_prior_first="highest_fidelity")
    return neps.algorithms.async_hb(space(bench), sample_prior_first=True)


def main() -> None:
    bench = Bench()
    logging.disable(logging.INFO)
    np.random.seed(bench.seed)  # NePS draws from the global generators
    torch.manual_seed(bench.seed)
    search = neps.AskAndTell(method(sys.argv[1], bench))
    while True:
        trial = search.ask()
        indices = dict(trial.config)
        point = int(indices.pop(FIDELITY))
        search.tell(trial, bench.train(bench.at(indices), point)[-1])


if __name__ == "__main__":
    main()
