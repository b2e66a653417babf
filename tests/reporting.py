"""Real runs and exports for testing reports, and functions that edit them consistently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mainrun.config import digest_of, from_dict

RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {"optimizer": "sgd", "lr": 0.01, "schedule": "cosine"},
    "optimized": {"optimizer": "adamw", "lr": 0.005, "schedule": "wsd", "weight_decay": 0.1},
}


def make(out: Path, tiny: Any, seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    from mainrun.run.session import train

    for preset, fields in RECIPES.items():
        for seed in seeds:
            train(tiny(preset=preset, seed=seed, **fields), out)
    ops = [
        {"name": "set_dropout", "value": 0.0, "trigger": {"step": 8}},
        {"name": "stack_layers", "value": [0, 0, 1, 1], "init": "identity", "trigger": {"step": 14}},
    ]
    train(
        tiny(preset="grown", seed=1, dropout=0.1, growth={"version": 2, "ops": ops}, **RECIPES["optimized"]),
        out,
    )


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def rescore(run: Path, full: float) -> None:
    """Shift the full scores of a run so that the last one is `full`, in both the rows and the summary."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = [row for row in rows if row["event"] == "eval"]
    shift = full - evals[-1]["full"]
    for row in evals:
        row["full"] += shift
    evals[-1]["full"] = full
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    best = min(evals, key=lambda row: row["full"])

    def change(summary: dict[str, Any]) -> None:
        for scores in (summary, summary["scores"]["val"]):
            for name, row in (("last", evals[-1]), ("best", best)):
                scores[name] = {k: row[k] for k in scores[name]}

    edit(run / "summary.json", change)


def reseed(run: Path, out: Path, **fields: Any) -> Path:
    """Copy a run with changed config fields, such as another seed, into the folder of its new run id."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["config"] |= fields
    config["digest"] = digest_of(config["config"])
    run_id = from_dict(config["config"]).run_id
    shutil.copytree(
        run, out / run_id, ignore=shutil.ignore_patterns("checkpoints", ".lock"), dirs_exist_ok=True
    )
    (out / run_id / "config.json").write_text(json.dumps(config), encoding="utf-8")
    edit(
        out / run_id / "summary.json",
        lambda summary: summary.update(run=run_id, preset=config["config"]["preset"]),
    )
    return out / run_id


def fail_guard(run: Path, name: str = "causality") -> None:
    def change(summary: dict[str, Any]) -> None:
        (guard,) = (g for g in summary["guards"] if g["name"] == name)
        guard.update(status="fail", detail="logits change with the future at position 3")

    edit(run / "summary.json", change)


def export(folder: Path, trials: int = 40, **facts: Any) -> Path:
    """Write an exported study.

    Rung 0 ranks the trials in the same order as the last rung, except for every ninth trial.
    """
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    for t in range(trials):
        lr, optimizer = 10 ** (-4 + 3 * ((t * 0.618034) % 1)), ("adamw", "muon", "sgd")[t % 3]
        base = {
            "trial": t,
            "seed": 7,
            "params.lr": lr,
            "params.optimizer": optimizer,
            "params.momentum": 0.9 if t % 3 else None,
        }
        value = 1.5 + 0.1 * abs(t * 0.618034 % 1 - 0.5) + 0.05 * (t % 3)
        early = value + 0.3 + 0.2 * (t % 9 == 0)
        if t % 13 == 12:
            ended = {
                "state": "diverged",
                "value": None,
                "rung": 0,
                "steps": 0,
                "asked": 10,
                "trained": 10,
                "reused": 0,
                "wasted": 10,
            }
            ended |= {"reason": f"diverged at step 9 (lr {lr:.4f})", "scores": "{}"}
        elif t % 2:
            ended = {
                "state": "pruned",
                "value": early,
                "rung": 0,
                "steps": 10,
                "asked": 10,
                "trained": 10,
                "reused": 0,
                "wasted": 10,
            }
            ended |= {"reason": "", "scores": json.dumps({"0": early})}
        else:
            ended = {
                "state": "done",
                "value": value,
                "rung": 1,
                "steps": 30,
                "asked": 30,
                "trained": 20,
                "reused": 10,
                "wasted": 0,
            }
            ended |= {"reason": "", "scores": json.dumps({"0": early, "1": value})}
        rows.append(base | ended)
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "trials.parquet")
    space = {
        "lr": {"low": 1e-4, "high": 0.1, "log": True, "values": [], "when": {}},
        "optimizer": {"values": ["adamw", "muon", "sgd"], "low": None, "high": None},
    }
    row = {
        "trial": 6,
        "mean": 1.51,
        "difference": -0.021,
        "interval": [-0.03, -0.012],
        "p_holm": 0.004,
        "claim": True,
        "params": {"lr": 0.005},
    }
    study: dict[str, Any] = {
        "name": folder.name,
        "preset": "optimized",
        "objective": "dev/full",
        "rung_correlation": {"0": 0.875},
        "study": {
            "sampler": {"name": "tpe", "seed": 3},
            "budget": {"trials": trials, "tokens": None},
            "space": space,
        },
        "evidence": {
            "noise": {"sigma": 0.0031, "floor": 0.0098},
            "rows": [row],
            "winner": 6,
            "claim": "trial 6 is better than the base",
        },
    }
    (folder / "study.json").write_text(json.dumps(study | facts), encoding="utf-8")
    return folder
