"""The trials of a study as a pandas table: the columns of Optuna's `trials_dataframe`, and our own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from mainrun.errors import RunError
from sweeps.ledger import Ledger
from sweeps.optuna_trial import frozen_trial
from sweeps.space import Choice, Range

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from pandas import DataFrame

# Our own columns. `outcome` is our name of the state, and `score` is the last score, of failed trials too.
OURS = {
    "outcome": "state", "score": "value", "seed": "seed", "horizon": "horizon", "rung": "rung",
    "steps": "steps",
    **{name: name for name in Ledger.__dataclass_fields__},
    "forward_flops": "forward_flops", "run": "run", "reason": "reason",
}  # fmt: skip


def finished_frame(export: dict[str, Any]) -> DataFrame:
    """Return the trials of a finished study from its export."""
    import optuna

    storage = optuna.storages.InMemoryStorage()
    study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "trials")
    space = _read_space(export)
    for row in export["trials"]:
        storage.create_new_trial(study_id, template_trial=frozen_trial(row, space))
    frame = optuna.load_study(study_name="trials", storage=storage).trials_dataframe()
    return _with_ours(frame, export["trials"])


def running_frame(study: OptunaStudy) -> DataFrame:
    """Return the trials that a study has finished so far, from its database."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        facts = trial.user_attrs
        row = {"value": trial.value, "run": facts.get("run"), "reason": facts.get("why")}
        row["state"] = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name)
        rows.append(row | facts.get("ledger", {}))
    return _with_ours(study.trials_dataframe(), rows)


def _with_ours(frame: DataFrame, rows: list[dict[str, Any]]) -> DataFrame:
    for name, key in OURS.items():
        frame[name] = [row.get(key) for row in rows]
    return frame


def _read_space(export: dict[str, Any]) -> dict[str, Range | Choice]:
    text = json.dumps(export["study"].get("space", {}))
    try:
        return TypeAdapter(dict[str, Range | Choice]).validate_json(text, strict=True)
    except ValidationError as e:
        raise RunError(f"the search space of the study {export.get('name')} cannot be read: {e}") from None
