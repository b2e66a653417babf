"""Convert the trials of a study to trials of Optuna, for its database and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sweeps.ledger import Ledger
from sweeps.space import Choice, Range
from sweeps.trial import TrialState

# The name of the state that Optuna gives to a trial with one of our states.
STATES = {
    TrialState.DONE: "COMPLETE",
    TrialState.SHORT: "PRUNED",
    TrialState.PRUNED: "PRUNED",
    TrialState.DIVERGED: "FAIL",
    TrialState.FAILED: "FAIL",
}


def optuna_value(row: Mapping[str, Any]) -> float | None:
    """Return the value that Optuna records for a trial. As in Optuna, a failed trial has none.

    The value of a pruned trial is its last score.
    """
    return None if STATES[TrialState(row["state"])] == "FAIL" else row["value"]


def local_time(seconds: float) -> datetime:
    """Return a time in the time zone of this machine, without the zone, as Optuna does."""
    return datetime.fromtimestamp(seconds)


def frozen_trial(row: Mapping[str, Any], space: Mapping[str, Range | Choice]) -> Any:
    """Return the trial of Optuna for the row of a finished trial, which `Search.row` describes."""
    from optuna.trial import TrialState as OptunaState
    from optuna.trial import create_trial

    from sweeps.sampling import distribution

    trial = create_trial(
        state=OptunaState[STATES[TrialState(row["state"])]],
        value=optuna_value(row),
        params=row["params"],
        distributions={name: distribution(space[name]) for name in row["params"]},
        intermediate_values={int(rung): score for rung, score in row["scores"].items()},
        user_attrs={
            "number": row["trial"],
            "why": row["reason"],
            "run": row["run"],
            "ledger": {name: row[name] for name in Ledger.__dataclass_fields__ if name in row},
        },
    )
    if row.get("started") is not None:  # studies that older versions exported have no times
        trial.datetime_start = local_time(row["started"])
        trial.datetime_complete = local_time(row["ended"])
    return trial
