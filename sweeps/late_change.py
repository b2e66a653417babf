"""Create late changes, which train the base at first, and a recipe for the rest of the tokens.

A late change is an ordinary run. It has the config of the base, and ops set the values of the recipe after
a share of the tokens. Its learning rate decays over as many steps as that of the recipe's whole run. All
late changes share the steps before the change, which are read from the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mainrun.config import TrainConfig
from mainrun.errors import ConfigError
from mainrun.plan.plan import Plan
from sweeps.space import DERIVED, Choice, Space, with_values

OP_FIELDS = ("lr", "weight_decay", "dropout", "batch_size")  # an op sets them within a run
DECAY_FIELDS = ("decay_frac", "decay_shape", "min_lr_frac")  # they act only from the decay on
ROUNDING = 1e-9


def late_change(base: Plan, recipe: Plan, share: float) -> TrainConfig:
    """Return the config of the base that changes to a recipe after a share of the tokens.

    base, recipe: the plans of their whole runs. Raises ConfigError if the recipe has no late change.
    """
    if recipe.cfg.decay_frac > 1 - share + ROUNDING:
        raise ConfigError(f"decay_frac={recipe.cfg.decay_frac:g} begins to decay before the change")
    ops = []
    for name in OP_FIELDS:
        value = getattr(recipe.cfg, name)
        if value != getattr(base.cfg, name):
            ops.append({"name": f"set_{name}", "value": value, "trigger": {"budget_frac": share}})
    if not ops:
        raise ConfigError("the recipe differs from the base only from the decay on, so nothing changes early")
    changes: dict[str, Any] = {name: getattr(recipe.cfg, name) for name in DECAY_FIELDS}
    changes |= {"growth": {"version": 2, "ops": ops}}
    # a batch that changes also changes the number of steps, but not the steps before the change
    changes |= {"warmup_iters": base.warmup_steps, "warmup_frac": 0.0}
    plan = Plan(with_values(base.cfg, changes), base.train_tokens)
    first = plan.segments[-1].first
    if base.warmup_steps >= first:
        raise ConfigError(f"the warm-up of {base.warmup_steps} steps reaches the change after {first} steps")
    decay_frac = min(recipe.steps - recipe.decay_start, plan.steps - first) / plan.steps
    return with_values(plan.cfg, {"decay_frac": decay_frac, "swa": min(base.cfg.swa, decay_frac)})


def faults(space: Space, base: TrainConfig, share: float) -> Iterator[str]:
    """Yield one sentence for each reason why a study cannot use late changes."""
    got = f"sampler.late={share:g}"
    for name in space:
        if name not in (*OP_FIELDS, *DECAY_FIELDS, *DERIVED):
            allowed = ", ".join((*OP_FIELDS, *DERIVED, *DECAY_FIELDS))
            yield (
                f"{got} with space.{name}: a run cannot change {name} halfway; "
                f"remove sampler.late, or search only over {allowed}."
            )
    if base.growth.ops:
        yield f"{got} with growth in the base: remove sampler.late, or remove growth."
    if base.max_steps:
        yield f"{got} with max_steps: remove sampler.late, or set epochs instead of max_steps."
    if base.schedule != "wsd":
        yield (
            f"{got} with schedule={base.schedule!r}: only wsd has a constant phase that late changes share; "
            "remove sampler.late, or set schedule = 'wsd'."
        )
    if base.warmup_frac >= share and not base.warmup_iters:
        yield f"{got} with warmup_frac={base.warmup_frac:g}: write a larger share, or a shorter warm-up."
    shortest = _shortest_decay(space, base)
    if shortest > 1 - share + ROUNDING:
        yield (
            f"{got} with decay_frac={shortest:g}: the learning rate of every recipe would decay before the "
            f"change; write a share of at most {1 - shortest:g}, or a shorter decay."
        )


def _shortest_decay(space: Space, base: TrainConfig) -> float:
    parameter = space.get("decay_frac")
    if parameter is None:
        return base.decay_frac
    return float(min(parameter.values) if isinstance(parameter, Choice) else parameter.low)
