"""Hand-made runs, recipes and studies for testing reports, in memory or on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import TINY

from mainrun.config import digest_of, from_dict
from mainrun.plan.routing import STATS
from reports.evidence.load import Recipe, ReportData, Run, Study

STEPS = 4
TRAIN_TOKENS = STEPS * TINY["batch_size"] * TINY["block_size"] + 1
MACHINE = {"device": "cpu", "instructions": "AVX2", "processes": 1, "dtype": "float32"}
VERSIONS = {"mainrun": "5" * 64, "torch": "2.0"}


def score(step: int = STEPS, full: float = 2.0, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "split": "val",
        "full": full,
        "official": 3.0,
        "loss": 4.0,
        "bits_per_byte": 1.5,
        "coverage": 0.98,
    }
    return row | {"tokens": 1000} | changes


def guard(name: str, status: str = "pass", detail: str = "fine") -> dict[str, str]:
    return {"name": name, "status": status, "detail": detail}


def make_summary(run_id: str, preset: str, full: float = 2.0, **changes: Any) -> dict[str, Any]:
    last, best = score(full=full), score(full=full)
    summary = {
        "run": run_id,
        "preset": preset,
        "steps": STEPS,
        "last": last,
        "best": best,
        "scores": {"val": {"last": last, "best": best}},
        "params": 1000,
        "tokens": 512,
        "flops": 2e9,
        "seconds": 10.0,
        "tokens_per_s": 51.2,
        "geometry": [8, 16],
        "ledger": {"asked": 4, "trained": 4, "reused": 0, "wasted": 0},
        "presentations": {"presentations_per_token": 1.0, "train_tokens_per_epoch": 512},
        "fingerprints": {"corpus": "c" * 64, "train": "a" * 64, "dev": "d" * 64, "val": "b" * 64},
        "origin": {"sha256": "0f" * 32},
        "tokenizer": "7" * 64,
        "weights": "3" * 64,
        "machine_class": MACHINE,
        "machine_classes": [MACHINE],
        "versions": VERSIONS,
        "all_versions": [VERSIONS],
        "guards": [guard("coverage"), guard("causality")],
    }
    return summary | changes


def make_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per training step and one row for each evaluation in the summary."""
    rows: list[dict[str, Any]] = [
        {
            "event": "step",
            "step": i,
            "tokens": 128 * i,
            "seconds": 0.5,
            "loss": 5.0,
            "lr": 0.1,
            "grad_norm": 1.0,
        }
        for i in range(1, summary["steps"] + 1)
    ]
    scores = [summary["last"]]
    if summary["best"] != summary["last"]:
        scores.insert(0, summary["best"])
    return rows + [{"event": "eval", "seconds": 0.25, **row} for row in scores]


def make_run(
    preset: str = "baseline",
    seed: int = 1,
    full: float = 2.0,
    *,
    fields: Mapping[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    journal: list[dict[str, Any]] | None = None,
    env: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """Make a run. `fields` override its config and `changes` override its summary."""
    cfg = from_dict(TINY | {"preset": preset, "seed": seed} | dict(fields or {}))
    summary = make_summary(cfg.run_id, preset, full, **changes)
    if changes.get("last") and "scores" not in changes:
        summary["best"] = changes.get("best", summary["last"])
        summary["scores"] = {"val": {name: summary[name] for name in ("last", "best")}}
    environment = {"command": ["mainrun", "train", "--preset", preset], "evaluate_hash": "e" * 64} | dict(
        env or {}
    )
    return Run(
        Path("runs") / cfg.run_id,
        cfg,
        {"train_tokens": TRAIN_TOKENS},
        environment,
        summary,
        rows or make_rows(summary),
        journal or [],
    )


def make_routed_run(
    preset: str = "mod",
    pattern: str = "DM",
    seed: int = 1,
    fields: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """Make a run whose second layer has a router.

    The layer selects a quarter of the tokens when the model is scored.
    """
    routed = {"block_pattern": pattern, "capacity": 0.25} | dict(fields or {})
    run = make_run(preset, seed, fields=routed, **changes)
    run.summary["routing"] = {
        "letters": run.cfg.letters,
        "capacity": 0.25,
        "selected": [0.26],
        "student_accuracy": [0.8125],
        "topk_loss": 3.9876,
        "forward_flops": 3e4,
        "forward_flops_dense": 5e4,
    }
    for row in run.rows:
        if row["event"] == "eval":
            row["routers"] = [{"layer": 1, "selected": 0.26}]
        else:
            statistics = dict.fromkeys(STATS, 0.5) | {"student_accuracy": 0.75 + row["step"] / 64}
            row |= {"aux": {"student": 0.7}, "routers": [{"layer": 1, **statistics}]}
    return run


def make_recipe(
    name: str, fulls: Mapping[int, float], fields: Mapping[str, Any] | None = None, **changes: Any
) -> Recipe:
    """Make a recipe with one run per seed. `fulls` maps each seed to the full score of its run."""
    return Recipe(
        name, tuple(make_run(name, seed, full, fields=fields, **changes) for seed, full in fulls.items())
    )


def failing(detail: str = "it sees the future", name: str = "causality") -> list[dict[str, str]]:
    return [guard("coverage"), guard(name, "fail", detail)]


def make_data(*recipes: Recipe, studies: tuple[Study, ...] = ()) -> ReportData:
    """Make report data. The first recipe is the baseline, and the second is the optimised recipe."""
    base, optimised = (*recipes, None, None)[:2]
    return ReportData(recipes, studies, base, optimised, "by hand")


def make_trial(number: int, value: float | None = 1.0, state: str = "done", **changes: Any) -> dict[str, Any]:
    return {"trial": number, "state": state, "value": value} | changes


def make_study(*trials: dict[str, Any], **facts: Any) -> Study:
    return Study(Path("studies/lr"), {"name": "lr"} | facts, list(trials))


def write_run(out: Path, run: Run, status: str = "done") -> Path:
    """Write a run directory named after the run's id, and return its path."""
    folder = out / run.cfg.run_id
    (folder / "checkpoints").mkdir(parents=True)
    config = run.cfg.model_dump(mode="json")
    for name, value in (
        ("config.json", {"config": config, "digest": digest_of(config), "plan": run.plan}),
        (
            "env.json",
            {
                "machine_class": MACHINE,
                "machine_classes": [MACHINE],
                "all_versions": [VERSIONS],
                "versions": VERSIONS,
                **run.env,
            },
        ),
        ("status.json", {"state": status, "step": run.summary["steps"]}),
        ("summary.json", run.summary),
        ("tokenizer.json", {}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    write_log(folder / "metrics.jsonl", run.rows)
    if run.journal:
        write_log(folder / "growth.jsonl", run.journal)
    return folder


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Apply a function to the content of a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_rows(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Apply a function to the rows of a log."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    change(rows)
    write_log(path, rows)
