"""Create short runs, which train a recipe for a share of its tokens with a learning rate decay of their own.

A short run is an ordinary run that ends early. It has the trial's config, the same warm-up in steps and the
same `decay_frac`, so its score is that of a finished run. Short runs of different recipes can therefore be
compared, although their learning rates differ. With the `wsd` schedule, the steps before the decay equal
those of the whole run, and are read from the store.
"""

from __future__ import annotations

import math

from mainrun.config import TrainConfig
from mainrun.plan.plan import Plan
from sweeps.space import with_values


def short_run(cfg: TrainConfig, plan: Plan, horizon: float) -> TrainConfig:
    """Return the config of the short run that trains for the share `horizon` of the steps of a recipe.

    `plan` is the plan of the whole run. A horizon of 1 is the whole run itself.
    """
    if horizon == 1:
        return cfg
    changes = {
        "max_steps": math.ceil(horizon * plan.steps),
        "warmup_iters": plan.warmup_steps,
        "warmup_frac": 0.0,
        # if weight averaging started before the decay, the short run could not share the steps of the trunk
        "swa": min(cfg.swa, cfg.decay_frac),
    }
    return with_values(cfg, changes)
