"""Write the results of a finished study.

The commands `mainrun sweep show` and `mainrun sweep best` read export.json. Reports and other tools read
trials.parquet and study.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mainrun import stats
from mainrun.errors import RunError
from mainrun.plan.cost import forward_cost
from mainrun.store.rundir import check_regular_file, disk_errors, write_text
from sweeps.driver import Search
from sweeps.ledger import Ledger, total
from sweeps.optuna_trial import STATES, local_time, optuna_value
from sweeps.study import set_arguments
from sweeps.trial import Trial, TrialState


def write_export(search: Search, evidence: dict[str, Any] | None) -> None:
    """Write export.json and the subfolder `export` to the folder of a study."""
    study = search.study
    costs = [search.cost_of(trial) for trial in search.trials]
    for run in (evidence or {}).get("runs", []):
        costs.append(Ledger(**{name: run[name] for name in Ledger.__dataclass_fields__}))
    document = {
        "name": study.name,
        "preset": study.preset,
        "objective": study.objective,
        "digest": study.digest,
        "study": study.model_dump(mode="json"),
        "trials": [_trial_row(search, trial) for trial in search.trials],
        "ledger": asdict(total(costs)),
        "rung_correlation": rung_correlations(search.trials),
        "raw_rung_correlation": rung_correlations(search.trials, raw=True),
        "evidence": evidence,
        **search.summary(),
    }
    write_text(search.folder / "export.json", json.dumps(document, indent=1))
    write_tables(document, search.folder / "export")


def _trial_row(search: Search, trial: Trial) -> dict[str, Any]:
    seed = None
    flops = None
    settings: list[str] = []
    if trial.run_id:
        cfg = search.runs_of(trial).cfg
        seed = cfg.seed
        flops = forward_cost(cfg.segment_configs[-1]).scored
        settings = set_arguments(search.study, cfg)
    return {
        **search.row(trial),
        "seed": seed,
        "forward_flops": flops,
        "horizon": trial.horizon,
        **search.facts(trial),
        "rung": trial.rung,
        "raw_scores": {str(rung): score for rung, score in (trial.scores | trial.raw_scores).items()},
        "stops": trial.stops,
        "sets": settings,
        "steps": trial.stops[trial.rung] if trial.scores else 0,
    }


def rung_correlations(trials: list[Trial], raw: bool = False) -> dict[str, float | None]:
    """Compute how well the scores at each rung predict the final scores of the completed trials.

    The result maps each rung to a rank correlation, or to None if fewer than three trials have a score at the
    rung. If `raw` is true, use the trials' own scores instead of the scores of their branches.
    """
    done = [t for t in trials if t.state is TrialState.DONE and len(t.scores) > 1]
    last_rung = max((t.rung for t in done), default=0)
    correlations: dict[str, float | None] = {}
    for rung in range(last_rung):
        scores = []
        final_scores = []
        for trial in done:
            rung_scores = trial.scores | trial.raw_scores if raw else trial.scores
            if rung in rung_scores and rung < trial.rung:  # trials with few steps may have fewer rungs
                scores.append(rung_scores[rung])
                final_scores.append(trial.scores[trial.rung])
        correlations[str(rung)] = stats.spearman(scores, final_scores) if len(scores) > 2 else None
    return correlations


# The columns of trials.parquet that `optuna.Study.trials_dataframe` also has come first, and then our own.
COLUMNS = (
    "seed", "rung", "steps", "asked", "trained", "reused", "wasted", "branch", "tokens", "flops", "seconds",
    "reason", "run",
)  # fmt: skip


def write_tables(export: dict[str, Any], folder: Path) -> None:
    """Write the files trials.parquet and study.json of an export.

    trials.parquet has one row per trial, and Optuna's names of columns. study.json contains all other data.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with disk_errors(folder, "DIR"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        table = pa.table(_columns(export["trials"]))
    except (pa.ArrowException, ArithmeticError, TypeError, ValueError, KeyError) as e:
        raise RunError(
            f"the trials of the study {export.get('name')} cannot be written to trials.parquet ({e!r:.200}); "
            "restore the study's export.json"
        ) from None
    for name in ("trials.parquet", "study.json"):
        check_regular_file(folder / name, "move it away, or give another folder")
    with disk_errors(folder, "DIR"):
        pq.write_table(table, folder / "trials.parquet")
    facts = {key: value for key, value in export.items() if key != "trials"}
    write_text(folder / "study.json", json.dumps(facts, indent=1))


def _columns(trials: list[dict[str, Any]]) -> dict[str, Any]:
    import pyarrow as pa

    starts = [_time(trial.get("started")) for trial in trials]
    ends = [_time(trial.get("ended")) for trial in trials]
    durations = [_difference(start, end) for start, end in zip(starts, ends, strict=True)]
    columns: dict[str, Any] = {
        "number": [trial["trial"] for trial in trials],
        "value": pa.array([optuna_value(trial) for trial in trials], pa.float64()),
        "datetime_start": pa.array(starts, pa.timestamp("us")),
        "datetime_complete": pa.array(ends, pa.timestamp("us")),
        "duration": pa.array(durations, pa.duration("us")),
    }
    parameters: set[str] = set()
    for trial in trials:
        parameters.update(trial["params"])
    for name in sorted(parameters):
        columns[f"params_{name}"] = _parameter_column([trial["params"].get(name) for trial in trials])
    columns["state"] = [STATES[TrialState(trial["state"])] for trial in trials]
    columns["outcome"] = [trial["state"] for trial in trials]
    columns["score"] = pa.array([trial["value"] for trial in trials], pa.float64())
    columns |= {name: [trial[name] for trial in trials] for name in COLUMNS}
    # studies that older versions of mainrun exported have none of these columns, and only frugal plans tokens
    for name in ("forward_flops", "horizon", "planned"):
        columns[name] = [trial.get(name) for trial in trials]
    for name in ("scores", "raw_scores"):  # each cell is a JSON object with one entry per rung
        columns[name] = [json.dumps(trial[name]) for trial in trials]
    return columns


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else local_time(seconds)


def _difference(start: datetime | None, end: datetime | None) -> timedelta | None:
    return None if start is None or end is None else end - start


def _parameter_column(values: list[Any]) -> list[Any]:
    """Return the values of a parameter as a column of trials.parquet.

    If the values have different types, all values are converted to strings. However, a mixture of integers
    and floats is not converted.
    """
    known = [value for value in values if value is not None]
    has_one_type = len({type(value) for value in known}) <= 1
    if has_one_type or all(isinstance(value, int | float) for value in known):
        return values
    return [None if value is None else str(value) for value in values]
