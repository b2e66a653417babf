"""Create the growth controller of a run. The growth operators are imported only if the run grows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from mainrun.config import TrainConfig
from mainrun.core.device import Device
from mainrun.growth.state import Controller, NoGrowth, Row
from mainrun.plan.plan import Plan
from mainrun.store.rundir import RowLog
from mainrun.train import State


def make_controller(
    cfg: TrainConfig,
    plan: Plan,
    device: Device,
    state: State,
    journal: RowLog | None = None,
    on_event: Callable[[Row], None] = lambda row: None,
    clock: Callable[[str], Any] = nullcontext,
) -> Controller:
    """Return the growth controller of a run.

    journal: the log to which the controller writes growth events.
    on_event: a function that is called with each event.
    clock: a function that returns a context manager, which measures the time of a named activity.
    """
    if not cfg.growth.ops:
        return NoGrowth(plan, state)
    from mainrun.growth.controller import Growth

    return Growth(cfg, plan, device, state, journal, on_event, clock)
