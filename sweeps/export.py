"""A finished study as data: what `show` and `best` read, and what a report reads elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mainrun import stats
from mainrun.errors import RunError
from mainrun.store.rundir import check_regular_file, disk_errors, write_text
from sweeps.driver import Search, sets_of
from sweeps.ledger import Ledger, total


def export(search: Search, evidence: dict[str, Any] | None) -> None:
    """export.json, and the two files of `write`, in the study's folder."""
    trials = []
    for trial in search.trials:
        cfg = search.made(trial).cfg if trial.run else None
        trials.append({
            "trial": trial.number, "state": trial.state, "value": trial.scores.get(trial.rung),
            "seed": cfg.seed if cfg else None,
            "params": trial.values, "rung": trial.rung, "scores": {str(k): v for k, v in trial.scores.items()},
            "raw_scores": {str(k): v for k, v in (trial.scores | trial.raw).items()}, "stops": trial.stops,
            "run": trial.run, "reason": trial.why,
            "sets": sets_of(search.study, cfg) if cfg else [],
            "steps": trial.stops[trial.rung] if trial.scores else 0, **asdict(search.spent(trial)),
        })  # fmt: skip
    confirming = [
        Ledger(**{k: row[k] for k in Ledger.__dataclass_fields__}) for row in (evidence or {}).get("runs", [])
    ]
    whole = total([*(search.spent(t) for t in search.trials), *confirming])
    found = {
        "name": search.study.name, "preset": search.study.preset, "objective": search.study.objective, "digest": search.study.digest,
        "study": search.study.model_dump(mode="json"), "trials": trials, "ledger": asdict(whole),
        "rung_correlation": correlations(search), "raw_rung_correlation": correlations(search, raw=True), "evidence": evidence,
    }  # fmt: skip
    write_text(search.folder / "export.json", json.dumps(found, indent=1))
    write(found, search.folder / "export")


def correlations(search: Search, raw: bool = False) -> dict[str, float | None]:
    """Of each rung's scores with the final ones, over the trials that have both: what a short rung is worth. raw: of the trials' own."""
    done = [t for t in search.trials if t.state == "done" and len(t.scores) > 1]
    last = max((t.rung for t in done), default=0)
    found: dict[str, float | None] = {}
    for rung in range(last):
        here = [(t.scores | t.raw if raw else t.scores)[rung] for t in done]
        found[str(rung)] = stats.spearman(here, [t.scores[t.rung] for t in done]) if len(done) > 2 else None
    return found


PLAIN = (
    "trial", "state", "value", "seed", "rung", "steps", "asked", "trained", "reused", "wasted", "branch", "tokens", "flops", "seconds",
    "reason", "run",
)  # fmt: skip


def write(found: dict[str, Any], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with disk_errors(folder, "DIR"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        table = pa.table(_columns(found["trials"]))
    except (pa.ArrowException, ArithmeticError, TypeError, ValueError, KeyError) as e:
        raise RunError(
            f"the trials of {found.get('name')} do not make a table ({e!r:.200}); restore export.json of the study"
        ) from None
    for name in ("trials.parquet", "study.json"):
        check_regular_file(folder / name, "move it away, or give another folder")
    with disk_errors(folder, "DIR"):
        pq.write_table(table, folder / "trials.parquet")
    write_text(folder / "study.json", json.dumps({k: v for k, v in found.items() if k != "trials"}, indent=1))


def _columns(trials: list[dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for t in trials for name in t["params"]})
    columns: dict[str, Any] = {key: [t[key] for t in trials] for key in PLAIN}
    columns["scores"] = [json.dumps(t["scores"]) for t in trials]  # of each rung that it reached
    columns["raw_scores"] = [json.dumps(t["raw_scores"]) for t in trials]
    for name in names:
        values = [t["params"].get(name) for t in trials]
        mixed = len({type(v) for v in values if v is not None}) > 1 and not all(
            isinstance(v, int | float) for v in values if v is not None
        )
        columns[f"params.{name}"] = [None if v is None else str(v) for v in values] if mixed else values
    return columns
