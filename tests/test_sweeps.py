"""Tests which studies are refused, and that workers, engines and kills do not change the results."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, slow_unless
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.config import TrainConfig
from mainrun.errors import ConfigError, UsageError
from mainrun.plan.plan import Plan
from mainrun.store.rundir import RunDir
from sweeps import branch
from sweeps.confirm import confirm
from sweeps.driver import Search
from sweeps.engine.local import Local
from sweeps.engine.protocol import Outcome, Task
from sweeps.export import rung_correlations
from sweeps.folder import locked_folder, write_study_json
from sweeps.ledger import Ledger, run_cost, total
from sweeps.sampling import SamplerSettings, TrialSampler
from sweeps.space import with_values
from sweeps.study import Study, built_in_names, json_schema, read_study, set_arguments, validate_study
from sweeps.trial import Trial, TrialState

SET: dict[str, Any] = {k: v for k, v in TINY.items() if k != "threads"} | {
    "num_titles": 300,
    "n_layer": 1,
    "optimizer": "adamw",
    "dev_frac": 0.1,
}
WSD = SET | {"schedule": "wsd", "warmup_frac": 0.1, "decay_frac": 0.3}
BRANCH = {"at": [0.4], "score": "branch"}
GROWS = {"ops": [{"name": "set_lr", "value": 0.01, "trigger": {"budget_frac": 0.5}}]}
SPACE: dict[str, Any] = {
    "lr": {"low": 1e-3, "high": 0.1, "log": True},
    "optimizer": {"values": ["adamw", "sgd"]},
    "momentum": {"low": 0.5, "high": 0.95, "when": {"optimizer": ["sgd"]}},
}


def study_data(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": "tiny",
        "preset": "baseline",
        "set": SET,
        "space": SPACE,
        "budget": {"trials": 12},
    }
    data |= {"sampler": {"startup": 3, "generation": 3}, "rungs": {"at": [0.4], "keep": 0.5}}
    return data | changes


def tiny_study(**changes: Any) -> Study:
    return validate_study(study_data(**changes), "tiny.toml")


# -- studies that are refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"seed": {"values": [1, 2]}}}, "space.seed: the seed is not a hyperparameter"),
        (
            {"space": {"epochs": {"values": [1, 2]}}},
            "space.epochs: the number of epochs is fixed by the task",
        ),
        (
            {"space": {"num_titles": {"low": 10, "high": 100}}},
            "space.num_titles: the data is fixed by the task",
        ),
        (
            {"space": {"official_geometry": {"values": ["1x8"]}}},
            "the geometry of the evaluation is fixed by the task",
        ),
        ({"space": {"lrr": {"low": 1.0, "high": 2.0}}}, "space.lrr is not a config field (did you mean"),
        ({"space": {"log_every": {"values": [1, 2]}}}, "space.log_every has no effect on the training"),
        ({"space": {"lr": {"low": 2.0, "high": 1.0}}}, "space.lr: low=2 > high=1"),
        ({"space": {"lr": {"low": 1.0, "high": 1.0}}}, "there is nothing to search"),
        ({"space": {"lr": {"low": 0.0, "high": 1.0, "log": True}}}, "log=true with low=0"),
        ({"space": {"lr": {"low": 0.1}}}, "space.lr is not a parameter: write low and high"),
        ({"space": {"dropout": {"values": []}}}, "space.dropout.values is empty"),
        ({"space": {"dropout": {"values": [0.1, 7.0]}}}, "7.0 is not allowed"),
        (
            {"space": SPACE | {"momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer": ["muon"]}}}},
            "optimizer is never 'muon'",
        ),
        ({"space": SPACE | {"momentum": {"low": 0.1, "high": 0.9, "when": {"lr": [0.1]}}}}, "lr is a range"),
        (
            {"space": {"momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer": ["sgd"]}}}},
            "optimizer is 'adamw' in every trial",
        ),
        (
            {"space": {"lr": {"low": 0.1, "high": 0.2, "step": 0.5}}},
            "step=0.5 is larger than the range from low=0.1 to high=0.2",
        ),
        ({"space": {"lr": {"low": 0.1, "values": [0.1]}}}, "or values; got {'low': 0.1, 'values': [0.1]}"),
        ({"budget": {"trials": "8"}}, "budget.trials='8' is not allowed"),
        ({"budget": {"trials": True}}, "budget.trials=True is not allowed"),
        ({"budget": {"flops": float("inf")}}, "budget.flops=inf is not allowed"),
        ({"name": "a/b"}, "name='a/b' is not allowed; write at most 60 letters, digits"),
        ({"about": "\x1b[31m"}, "is not allowed; write text on one line"),
        (
            {"space": SPACE | {"momentum": {"low": 0.1, "high": 0.9, "when": {"optimiser": ["sgd"]}}}},
            "optimiser is not a config field",
        ),
        (
            {
                "space": SPACE
                | {"timescale": {"low": 1.0, "high": 2.0}, "weight_decay": {"low": 0.1, "high": 1.0}}
            },
            "keep one of them",
        ),
        ({"space": {"growth.ops.0.value": {"values": [1]}}}, "the preset's schedule has no '0' in ops"),
        ({"space": {}}, "space is empty"),
        ({"sampler": {"name": "tpx"}}, "sampler.name='tpx' is not allowed"),
        ({"sampler": {"name": "grid"}}, "sampler.name='grid' needs values"),
        ({"rungs": {"at": [0.5, 0.2]}}, "is not ascending"),
        ({"rungs": {"at": [0.5], "scored": "branch"}}, "unknown key rungs.scored (did you mean 'score'?)"),
        (
            {"rungs": {"at": [0.5], "score": "branch"}},
            "schedule='cosine': only wsd has a constant phase to branch from",
        ),
        (
            {"rungs": BRANCH, "set": WSD, "space": SPACE | {"schedule": {"values": ["wsd", "cosine"]}}},
            "keep schedule at wsd",
        ),
        (
            {"rungs": BRANCH, "set": WSD | {"wd_schedule": "linear"}},
            "wd_schedule='linear': if weight decay falls",
        ),
        (
            {"rungs": BRANCH, "set": WSD | {"growth": GROWS}},
            "with growth, which is scheduled over the whole run",
        ),
        ({"space": {"max_steps": {"values": [10, 20]}}}, "the number of steps is fixed by the task"),
        (
            {"preset": "demo", "set": {"dev_frac": 0.1}},
            "preset 'demo' has 2 steps, but a study starts from one config",
        ),
        ({"space": {"timescale": {"low": 0.0, "high": 2.0}}}, "space.timescale is a time"),
        ({"budget": {}}, "budget is empty"),
        ({"budgets": {}}, "unknown key budgets (did you mean 'budget'?)"),
        ({"set": SET | {"dev_frac": 0.0}}, "dev_frac=0 leaves no dev split for the search"),
        ({"set": SET | {"n_head": 3}}, "preset 'baseline' with [set]"),
        ({"objective": "val/full"}, "objective='val/full' is not allowed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_invalid_study_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        tiny_study(**changes)
    assert message in str(e.value)


def test_all_faults_are_named_at_once() -> None:
    wrong = {"seed": {"values": [1, 2]}, "lr": {"low": 2.0, "high": 1.0}, "nothing": {"values": [1]}}
    with pytest.raises(ConfigError) as e:
        tiny_study(space=wrong, budget={})
    assert len(str(e.value).splitlines()) == 5


@pytest.mark.parametrize("name", built_in_names())
def test_the_built_in_studies_are_valid(name: str) -> None:
    study = read_study(name)
    base = study.base()
    assert study.name == name and study.about and base.dev_frac
    sampler = TrialSampler(SamplerSettings(name="random"), study.space, base)
    for number in range(40):
        with_values(base, sampler.ask(number))  # raises an error if values do not go together


def test_an_unknown_study_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown study 'regularisation'.*did you mean 'regularization'"):
        read_study("regularisation")


def test_the_schema_contains_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Study.model_fields)
    assert CliRunner().invoke(app, ["sweep", "run", "demo", "--schema"]).exit_code == 0


@pytest.mark.parametrize("name", built_in_names())
def test_the_plan_of_every_built_in_study_can_be_shown(name: str) -> None:
    result = CliRunner().invoke(app, ["sweep", "run", name, "--plan"])
    assert result.exit_code == 0, result.output
    assert "nothing was trained" in result.output


def test_a_plan_names_the_limits_and_the_lengths_of_a_frugal_study(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        'preset = "baseline"\n[set]\ndev_frac = 0.1\n[space.lr]\nlow = 1e-3\nhigh = 0.1\n'
        '[budget]\ntokens = 5e6\nuntil = "settled"\n'
        '[sampler]\nname = "frugal"\nlanes = 3\nhorizons = [0.5, 1.0]\n'
    )
    result = CliRunner().invoke(app, ["sweep", "run", str(file), "--plan"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "5e+06 tokens or until the search has settled; 3 lanes of runs over 0.5, 1 of the steps" in text


# -- the trials of a search


class FormulaSearch(Search):
    """A search that computes scores with a formula, so that nothing is trained."""

    def _count_train_tokens(self) -> int:
        return 10_000

    def trial_score(self, trial: Trial, step: int) -> float:
        return abs(trial.values.get("lr", 0.05) - 0.02) + 1 / step

    def cost_of(self, trial: Trial) -> Ledger:
        return Ledger()


class TenStepSearch(FormulaSearch):
    """A search in which the directory of every run contains ten steps."""

    cost_of = Search.cost_of
    lock = threading.Lock()

    def run_dir(self, cfg: TrainConfig) -> Any:
        folder = self.runs_dir / cfg.run_id
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"event": "step", "step": step, "tokens": 8 * step, "seconds": 0.1} for step in range(1, 11)]
        with self.lock:
            if not (folder / "metrics.jsonl").exists():
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RunDir(folder)


class InstantEngine:
    """An engine that trains nothing, but reports that trials with lr=0.09... have diverged."""

    def __init__(self, workers: int, pause: float = 0.0) -> None:
        self.workers = workers
        self.pause = pause
        self.tasks_done = 0

    def train(self, task: Task) -> Outcome:
        self.tasks_done += 1
        if self.pause:
            time.sleep(self.pause * random.random())
        if any(text.startswith("lr=0.09") for text in task.sets):
            return Outcome(False, diverged=True, reason="lr too high")
        return Outcome(True)

    def close(self) -> None:
        pass


class IdleEngine(InstantEngine):
    """An engine that must not get a task."""

    def __init__(self) -> None:
        super().__init__(1)

    def train(self, task: Task) -> Outcome:
        raise AssertionError(f"a worker got {task}")


def run_search(folder: Path, engine: Any, **changes: Any) -> Search:
    folder.mkdir(parents=True, exist_ok=True)
    search = FormulaSearch(tiny_study(**changes), folder, engine, lambda text: None, lambda: None)
    search.run()
    return search


def facts(search: Search) -> list[tuple[Any, ...]]:
    return [(t.number, t.values, t.state, t.scores, t.reason) for t in search.trials]


@pytest.mark.parametrize("sampler", slow_unless(["tpe"], ["tpe", "random", "qmc"]))
def test_the_trials_do_not_depend_on_workers_or_their_speed(tmp_path: Path, sampler: str) -> None:
    settings: dict[str, Any] = {"name": sampler, "startup": 3, "generation": 3}
    budget = {"trials": 12}
    one = run_search(tmp_path / "1", InstantEngine(1), sampler=settings, budget=budget)
    many = run_search(tmp_path / "7", InstantEngine(7, pause=0.02), sampler=settings, budget=budget)
    assert facts(one) == facts(many) and len(one.trials) == 12
    assert one.trials[0].values == {} and len({str(t.values) for t in one.trials}) == 12
    assert any(t.state == "pruned" for t in one.trials) and one.trials[0].state == "done"
    study = tiny_study(sampler=settings | {"seed": 1})
    other = TrialSampler(study.sampler, study.space, study.base())
    assert other.ask(0) == {} and other.ask(1) != one.trials[1].values


def test_a_study_can_be_resumed(tmp_path: Path) -> None:
    """The database has each trial once, however often the driver is started."""
    import optuna

    runs = [run_search(tmp_path, InstantEngine(2), budget={"trials": trials}) for trials in (6, 12, 12)]
    assert facts(runs[1]) == facts(runs[2]) and facts(runs[0]) == facts(runs[1])[:6]
    written = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    assert [t.user_attrs["number"] for t in written] == list(range(12))


def test_a_conditional_parameter_is_used_when_its_condition_is_true(tmp_path: Path) -> None:
    for trial in run_search(tmp_path, InstantEngine(1), budget={"trials": 15}).trials[1:]:
        assert ("momentum" in trial.values) == (trial.values["optimizer"] == "sgd")


def test_the_sampler_avoids_a_trial_that_diverged(tmp_path: Path) -> None:
    study = tiny_study()
    sampler = TrialSampler(study.sampler, study.space, study.base())
    for number in range(3):
        sampler.ask(number)
    sampler.tell(0, {0: 2.0}, True)
    sampler.tell(1, {0: 1.0}, True)
    sampler.tell(2, {}, False)
    assert [t.value for t in sampler.optuna_study.trials] == [1.0, 3.0]


def test_a_folder_belongs_to_one_study(tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path / "a", tiny_study()),
        pytest.raises(UsageError, match="is in use by process"),
        locked_folder(tmp_path / "a", tiny_study()),
    ):
        pass
    with locked_folder(tmp_path / "a", tiny_study(space={"lr": {"values": [0.1, 0.2]}})):
        pass  # a folder without study.json belongs to no study
    write_study_json(tmp_path / "a", tiny_study(), "mainrun sweep x")
    wider = tiny_study(space=SPACE | {"lr": {"low": 1e-3, "high": 0.2, "log": True}}, workers=7)
    message = r"another study with this name: space.lr.high was 0.1, is 0.2\. Resume .*--as NAME"
    with pytest.raises(UsageError, match=message), locked_folder(tmp_path / "a", wider):
        pass
    with locked_folder(tmp_path / "a", tiny_study(budget={"trials": 50}, workers=3)):
        pass  # this is the same study with a larger budget


def test_set_arguments_give_the_same_config() -> None:
    from mainrun.plan.recipes import load

    cfg = tiny_study().base().model_copy(update={"lr": 0.0123456789012345})
    assert load("baseline", set_arguments(tiny_study(), cfg))[0] == cfg


def test_a_study_may_start_from_a_preset_file(tmp_path: Path) -> None:
    """A preset file is loaded by its path, not by its name."""
    from mainrun.plan.recipes import load

    file = tmp_path / "mine.toml"
    file.write_text('base = "baseline"\nlr = 0.02\n')
    study = tiny_study(preset=str(file))
    cfg = study.base().model_copy(update={"dropout": 0.2})
    assert cfg.lr == 0.02 and load(str(file), set_arguments(study, cfg))[0] == cfg


def test_repeated_values_cost_nothing_again(tmp_path: Path) -> None:
    few = {"space": {"optimizer": {"values": ["adamw", "sgd"]}}, "rungs": None, "budget": {"trials": 9}}
    search = TenStepSearch(tiny_study(**few), tmp_path, InstantEngine(1), lambda text: None, lambda: None)
    search.run()
    parts = [search.cost_of(t) for t in search.trials]
    runs = {t.run_id for t in search.trials if t.run_id}
    assert len(runs) == 2 and sum(part.trained for part in parts) == 20
    assert all(part.asked == part.trained + part.reused == 10 for part in parts)


def test_the_timescale_sets_the_weight_decay() -> None:
    from sweeps.space import trial_config

    base = tiny_study().base()
    cfg = trial_config(base, {"lr": 0.01, "timescale": 2.0}, 10_000)
    assert cfg.weight_decay == pytest.approx(1 / (0.01 * 2.0 * Plan(base, 10_000).steps))


@pytest.mark.slow
def test_gradient_accumulation_does_not_change_the_result(tmp_path: Path) -> None:
    """The study `batch` searches the effective batch size, so results must agree up to float32 rounding."""
    from mainrun.run.session import train
    from sweeps.space import with_values

    small = TINY | {
        "num_titles": 200,
        "block_size": 32,
        "epochs": 2,
        "dev_frac": 0.1,
        "dtype": "float32",
        "dropout": 0.0,
        "optimizer": "adamw",
    }
    batch = read_study(
        "batch", {k: v for k, v in small.items() if k != "threads"} | {"lr": 3e-3, "lr_aux": 0.0}
    )
    losses = []
    for grad_accum in (1, 2, 8):
        cfg = with_values(batch.base(), {"batch_size": 8, "grad_accum": grad_accum})
        train(cfg, tmp_path)
        rows = RunDir(tmp_path / cfg.run_id).metrics()
        losses.append(
            [row["loss"] for row in rows if row["event"] == "step"]
            + [row["full"] for row in rows if row["event"] == "eval"]
        )
    assert len(losses[0]) > 10
    assert all(other == pytest.approx(losses[0], abs=2e-5) for other in losses[1:])


@pytest.mark.slow
def test_the_driver_stays_fast_and_small(tmp_path: Path) -> None:
    from sweeps.bench_driver import bench

    rows = list(bench(2000, "random", tmp_path))
    assert len(rows) == 10 and rows[-1].trials == 2000
    times = [row.cpu_ms for row in rows]  # CPU time does not depend on other processes
    assert sum(times) / 10 < 20 and sum(times[-3:]) < 2 * sum(times[1:4])
    assert rows[-1].peak_mb - rows[0].peak_mb < 6


# -- real trials


def write_study_file(folder: Path, **changes: Any) -> Path:
    lines: list[str] = []
    data = study_data(**changes)
    for key, value in data.items():
        if not isinstance(value, dict):
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in data.items():
        if isinstance(value, dict) and key != "space":
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    for name, p in data["space"].items():
        lines.append(f'[space."{name}"]')
        lines += [f"{k} = {json.dumps(v) if not isinstance(v, dict) else _inline(v)}" for k, v in p.items()]
    file = folder / "tiny.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def _inline(table: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) + " }"


def command(file: Path, out: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "mainrun", "sweep", str(file), "--out", str(out), "--workers", str(workers)]


def results(out: Path) -> dict[str, Any]:
    """Return the parts of export.json that do not depend on time."""
    export = json.loads((out / "tiny" / "export.json").read_text())
    columns = ("trial", "state", "value", "params", "scores", "stops", "run", "rung", "reason", "steps")
    runs = [{k: run[k] for k in ("kind", "trial", "seed", "run")} for run in export["evidence"]["runs"]]
    return {
        "trials": [{k: t[k] for k in columns} for t in export["trials"]],
        "evidence": export["evidence"] | {"runs": runs},
        "rungs": export["rung_correlation"],
    }


def child_processes(pid: int) -> list[str]:
    """Return the ids of a process's children (only on Linux)."""
    children: list[str] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        children += file.read_text().split()
    return children


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_workers_engines_and_kills_do_not_change_the_results(tmp_path: Path) -> None:
    file = write_study_file(
        tmp_path,
        budget={"trials": 24},
        evidence={"noise_seeds": 2, "seeds": 2, "best": 1},
        sampler={"startup": 6, "generation": 6},
    )
    commands = {"1": command(file, tmp_path / "1", 1), "3": command(file, tmp_path / "3", 3)}
    if importlib.util.find_spec("ray"):
        commands["ray"] = [*command(file, tmp_path / "ray", 2), "--engine", "ray"]
    for line in commands.values():
        process = subprocess.run(line, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    chance, kills, restarts = random.Random(5), 10, 3
    out = tmp_path / "killed"
    process = subprocess.Popen(command(file, out, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(1 + 2 * chance.random())
        children = child_processes(process.pid)
        in_search = (out / "tiny" / "tokens.json").is_file()  # the dry run of the search creates this file
        if restarts and kills <= 7 and chance.random() < 0.3:
            process.kill()
            process.wait()
            restarts -= 1
            process = subprocess.Popen(
                command(file, out, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        elif children and kills and in_search:
            kills -= 1
            try:
                os.kill(int(chance.choice(children)), signal.SIGKILL)
            except ProcessLookupError:
                kills += 1
    assert process.returncode == 0 and kills == 0 and restarts == 0
    one = results(tmp_path / "1")
    assert all(results(tmp_path / name) == one for name in [*commands, "killed"])
    assert len(one["trials"]) == 24 and {t["state"] for t in one["trials"]} >= {"done", "pruned"}
    check_ledger(out)


def check_ledger(out: Path) -> None:
    """Check that the costs in export.json are the sums over its rows and over the run directories."""
    export = json.loads((out / "tiny" / "export.json").read_text())
    ledger = export["ledger"]
    assert (
        ledger["asked"] == ledger["trained"] + ledger["reused"] and 0 <= ledger["wasted"] <= ledger["trained"]
    )
    parts = [*export["trials"], *export["evidence"]["runs"]]
    for key in ("asked", "trained", "reused", "wasted", "tokens"):
        assert ledger[key] == sum(t[key] for t in parts)
    assert all(t["tokens"] * ledger["trained"] == ledger["tokens"] * t["trained"] for t in parts), (
        "lost steps have tokens too"
    )
    runs = [RunDir(file.parent) for file in (out / "tiny" / "runs").glob("*/config.json")]
    sums = total(run_cost(run, run.config()) for run in runs)
    assert (sums.trained, sums.tokens) == (ledger["trained"], ledger["tokens"]), (
        "the costs of the run directories"
    )
    assert all(t["wasted"] == t["trained"] > 0 for t in export["trials"] if t["state"] == "pruned")


@pytest.mark.slow
def test_a_study_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promoted trials resume from their checkpoints, costs add up, and the winner becomes a preset."""
    file = write_study_file(
        tmp_path, budget={"trials": 6}, evidence={"noise_seeds": 2, "seeds": 2, "best": 1}
    )
    process = subprocess.run(command(file, tmp_path / "out", 2), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    check_ledger(tmp_path / "out")
    export = json.loads((tmp_path / "out" / "tiny" / "export.json").read_text())
    promoted = [t for t in export["trials"] if t["state"] == "done" and t["trial"]]
    assert promoted and all(t["asked"] == t["stops"][-1] and t["wasted"] == 0 for t in promoted), (
        "no step is trained twice"
    )
    again = Search(read_study(str(file)), tmp_path / "out" / "tiny", IdleEngine(), str, lambda: None)
    again.run()
    assert confirm(again) == export["evidence"], "finished runs are read from disk"
    from mainrun.run.session import train

    run = RunDir(tmp_path / "out" / "tiny" / "runs" / promoted[0]["run"])
    alone = train(run.config(), tmp_path / "alone")
    summary = run.summary()
    assert summary is not None and alone["weights"] == summary["weights"], (
        "the same bits as a run that was never stopped"
    )
    assert total([run_cost(run, run.config())]).asked == summary["steps"]
    runner = CliRunner()
    out = ["--out", str(tmp_path / "out")]
    assert runner.invoke(app, ["sweep", "show", "tiny", *out]).exit_code == 0
    assert "finished" in runner.invoke(app, ["sweep", "ls", *out]).output
    monkeypatch.chdir(tmp_path)
    best = runner.invoke(app, ["sweep", "best", "tiny", "--save", "won", *out])
    assert best.exit_code == 0 and "--preset won.toml" in best.output
    assert (
        "won.toml already exists"
        in runner.invoke(app, ["sweep", "best", "tiny", "--save", "won", *out]).stderr
    )
    from mainrun.plan.recipes import load

    number = json.loads(runner.invoke(app, ["sweep", "best", "tiny", "--json", *out]).output)["trial"]
    trial = next(t for t in export["trials"] if t["trial"] == number)
    assert load("won.toml")[0].digest == load("baseline", trial["sets"])[0].digest
    import pyarrow.parquet as pq

    assert runner.invoke(app, ["sweep", "export", "tiny", "data", *out]).exit_code == 0
    assert pq.read_table("data/trials.parquet").num_rows == 6


@pytest.mark.slow
def test_a_run_beyond_the_step_of_its_task_is_done(tmp_path: Path) -> None:
    """If a driver is killed while it trains a promoted trial, the next driver asks for an earlier rung."""
    cfg = tiny_study().base()
    sets = tuple(set_arguments(tiny_study(), cfg))
    engine = Local(1, 1)
    for until in (20, 10):
        assert engine.train(Task("baseline", sets, tmp_path, tmp_path / ".store", until)) == Outcome(True)
    assert RunDir(tmp_path / cfg.run_id).metrics()[-1]["step"] == 20


def test_ctrl_c_stops_the_confirmation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowEngine(InstantEngine):
        closed = False

        def train(self, task: Task) -> Outcome:
            while not self.closed:
                time.sleep(0.01)
            return Outcome(False, reason="the driver stopped")

        def close(self) -> None:
            self.closed = True

    search = run_search(tmp_path, InstantEngine(1), rungs=None, budget={"trials": 3})
    search.engine = SlowEngine(2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        confirm(search)


# -- decay branches


@pytest.mark.parametrize(
    "fields", [{}, {"warmup_iters": 3}, {"swa": 0.5, "ema": 0.0}, {"decay_frac": 0.8, "warmup_frac": 0.2}]
)
def test_a_branch_is_its_trial_with_an_earlier_end(fields: dict[str, Any]) -> None:
    """A branch shares its first steps with its trial. Then its learning rate decays as in the trial."""
    from mainrun.store import lineage

    cfg = tiny_study(set=WSD | {"min_lr_frac": 0.1} | fields, space={"lr": SPACE["lr"]}).base()
    plan = Plan(cfg, 10_000)
    for step in (20, 31, 60):
        branch_plan = Plan(branch.branch_config(cfg, plan, step, 0.25), 10_000)
        decay_start = min(step, plan.decay_start)
        common = min(decay_start, plan.swa_start)
        assert branch_plan.steps == step + round(0.25 * step)
        assert branch_plan.decay_start == max(decay_start, plan.warmup_steps)
        keys, branch_keys = lineage.chain("0" * 64, plan), lineage.chain("0" * 64, branch_plan)
        assert branch_keys[: common + 1] == keys[: common + 1]
        rates = [branch_plan.at(i).lr for i in range(branch_plan.steps)]
        first = branch_plan.decay_start
        assert rates[first] == cfg.lr > rates[first + 1] > rates[-1] > 0.1 * cfg.lr
        last_step = 0.9 * cfg.lr / (branch_plan.steps - first)
        assert rates[-1] - 0.1 * cfg.lr <= last_step + 1e-12, "the decay is complete"
        assert branch_plan.swa_start >= decay_start or not cfg.swa


class ReversedByBranches(FormulaSearch):
    """A search in which the branches rank in the opposite order of their trials."""

    trial_score = Search.trial_score

    def run_score(self, cfg: TrainConfig, step: int) -> float:
        is_branch = cfg.max_steps > 0
        return (-cfg.lr if is_branch else cfg.lr) + 1 / step


def test_branch_scores_decide_and_raw_scores_are_kept(tmp_path: Path) -> None:
    searches = {}
    for score in ("raw", "branch"):
        study = tiny_study(set=WSD, space={"lr": SPACE["lr"]}, rungs=BRANCH | {"score": score})
        (tmp_path / score).mkdir()
        searches[score] = ReversedByBranches(study, tmp_path / score, InstantEngine(1), str, lambda: None)
        searches[score].run()
    raw, by_branch = searches["raw"].trials, searches["branch"].trials
    assert [trial.values for trial in raw[1:3]] == [trial.values for trial in by_branch[1:3]]
    states = [trial.state for trial in raw[1:3]]
    assert sorted(states) == ["done", "pruned"]
    assert [trial.state for trial in by_branch[1:3]] == states[::-1]
    scored = [trial for trial in by_branch if trial.scores]
    assert scored
    for trial in scored:
        runs = searches["branch"].runs_of(trial)
        assert trial.raw_scores[0] == runs.cfg.lr + 1 / trial.stops[0]
        assert trial.scores[0] == -runs.cfg.lr + 1 / runs.branches[0].max_steps
    for name, branches in (("raw", 0), ("branch", 1)):
        trials = searches[name].trials
        reached_rung = sum(bool(trial.scores) for trial in trials)
        done = sum(trial.state is TrialState.DONE for trial in trials)
        assert searches[name].engine.tasks_done == len(trials) + branches * reached_rung + done
    for trial in by_branch:
        if trial.state is TrialState.DONE:
            assert list(trial.raw_scores) == [0], "the end has no branch"


def test_a_branch_that_diverges_ends_its_trial_and_is_counted(tmp_path: Path) -> None:
    class DivergingBranches(InstantEngine):
        def train(self, task: Task) -> Outcome:
            if any(text.startswith("max_steps=") for text in task.sets):
                return Outcome(False, diverged=True, reason="the loss is inf")
            return Outcome(True)

    search = TenStepSearch(
        tiny_study(set=WSD, space={"lr": SPACE["lr"]}, rungs=BRANCH, budget={"trials": 3}),
        tmp_path,
        DivergingBranches(1),
        str,
        lambda: None,
    )
    search.run()
    parts = [search.cost_of(t) for t in search.trials]
    assert [t.state for t in search.trials] == ["diverged"] * 3 and all(not t.scores for t in search.trials)
    assert all((part.trained, part.branch, part.wasted) == (20, 10, 20) for part in parts), (
        "ten steps of the trial and ten of the branch"
    )


def test_rung_scores_are_correlated_with_final_scores() -> None:
    rows = [(3.0, 1.1, 1.0), (2.0, 2.1, 2.0), (1.0, 3.1, 3.0), (4.0, 4.1, 4.0)]
    trials = []
    for number, (raw, branch_score, final) in enumerate(rows):
        scores = {0: branch_score, 1: final}
        trials.append(Trial(number, {}, "run", (5, 9), scores, {0: raw}, TrialState.DONE))
    assert rung_correlations(trials) == {"0": pytest.approx(1.0)}
    assert rung_correlations(trials, raw=True) == {"0": pytest.approx(0.2)}


@pytest.mark.slow
def test_a_branch_trains_only_its_decay_and_does_not_change_the_trial(tmp_path: Path) -> None:
    """A promoted trial with branches has the same bits as an uninterrupted run without branches."""
    from mainrun.run.session import train

    few = {
        "budget": {"trials": 3},
        "sampler": {"generation": 3, "startup": 3},
        "rungs": BRANCH | {"branch": 0.25},
    }
    # The second and third trials differ only in the start of their decay. One of the decays starts before the
    # rung.
    space = {"decay_frac": {"values": [0.2, 0.8]}}
    (tmp_path / "s").mkdir()
    search = Search(tiny_study(set=WSD, space=space, **few), tmp_path / "s", Local(1, 1), print, lambda: None)
    with locked_folder(search.folder, search.study):
        search.run()
    parts, ends = [search.cost_of(t) for t in search.trials], {t.state for t in search.trials}
    assert ends == {"done", "pruned"}
    sums = total(parts)
    assert sums.asked == sums.trained + sums.reused and sums.branch <= sums.trained
    seen = set()
    for trial in search.trials:
        step = trial.stops[0]
        cfg = search.runs_of(trial).cfg
        branch_cfg = search.runs_of(trial).branches[0]
        decay_start = min(step, Plan(cfg, search.train_tokens).decay_start)
        cost = run_cost(search.run_dir(branch_cfg), branch_cfg)
        # If the decay starts before the rung, the branch also reuses the first step of the decay, because
        # this step still has the peak learning rate.
        assert cost.asked == branch_cfg.max_steps
        if branch_cfg.run_id not in seen:
            assert cost.trained == branch_cfg.max_steps - decay_start - (decay_start < step)
        seen.add(branch_cfg.run_id)
        if trial.state == "done":
            summary = search.run_dir(cfg).summary()
            assert summary is not None
            assert train(cfg, tmp_path / f"alone{trial.number}")["weights"] == summary["weights"]
            assert run_cost(search.run_dir(cfg), cfg).asked == trial.stops[-1], "it resumed from its rung"
        else:
            assert search.cost_of(trial).wasted == search.cost_of(trial).trained
    runs = {
        cfg.run_id: run_cost(search.run_dir(cfg), cfg).trained
        for t in search.trials
        for cfg in search.runs_of(t).branches.values()
    }
    assert sums.branch == sum(runs.values()) > 0, "a branch of two trials is counted once"


# -- claims


def confirm_with_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, noise: float, seed: int
) -> dict[str, Any]:
    evidence = {"seeds": 5, "noise_seeds": 5, "best": 2}
    search = run_search(tmp_path, InstantEngine(1), rungs=None, budget={"trials": 6}, evidence=evidence)
    base = search.base
    chance = random.Random(seed)

    def train_jobs(_: Any, jobs: Any) -> dict[Any, float]:
        better = {job: cfg.model_copy(update={"seed": base.seed}) != base for job, cfg in jobs.items()}
        return {job: 2.0 + chance.gauss(0, noise) - gain * better[job] for job in jobs}

    monkeypatch.setattr("sweeps.confirm._train_jobs", train_jobs)
    monkeypatch.setattr("sweeps.confirm._val_scores", lambda *_: {"full": 1.0})
    return confirm(search)


def test_a_real_gain_is_claimed_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = confirm_with_gain(tmp_path / "a", monkeypatch, gain=0.1, noise=0.002, seed=1)
    assert (
        clear["winner"] is not None
        and "is better than the base by 0." in clear["claim"]
        and clear["val"] == {"full": 1.0}
    )
    small = confirm_with_gain(tmp_path / "b", monkeypatch, gain=0.001, noise=0.01, seed=1)
    assert (
        small["winner"] is None
        and small["claim"] == "no better than the base, within the noise"
        and "val" not in small
    )
    assert all(row["why"] for row in small["rows"])


@pytest.mark.slow
def test_trials_that_differ_in_their_seed_alone_claim_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every confirmation run gets a real score of the base with another seed, so any claim is wrong."""
    from mainrun.run.session import train

    evidence = {"seeds": 3, "noise_seeds": 3, "best": 2, "sequential": False}
    search = run_search(
        tmp_path,
        InstantEngine(1),
        set=SET | {"epochs": 1},
        rungs=None,
        budget={"trials": 6},
        evidence=evidence,
    )
    base = search.base
    seeds = (base.model_copy(update={"seed": 5000 + i}) for i in range(20 * 12))
    scores = [train(cfg, tmp_path / "null")["scores"]["dev"]["last"]["full"] for cfg in seeds]
    assert len({*scores}) > 230, "the seed changes the score"
    monkeypatch.setattr("sweeps.confirm._val_scores", lambda *_: {"full": 1.0})

    def claims(given: list[float]) -> bool:
        monkeypatch.setattr("sweeps.confirm._train_jobs", lambda _, jobs: dict(zip(jobs, given, strict=True)))
        return confirm(search)["winner"] is not None

    repeats = sum(claims(scores[12 * i : 12 * i + 12]) for i in range(20))
    chance = random.Random(0)
    drawn = sum(claims(chance.sample(scores, 12)) for _ in range(500))
    print(f"wrong claims: {repeats} of 20 repeats, {drawn} of 500 that draw from the same runs")
    assert repeats <= 1 and drawn <= 25, "the level is 5%"


def test_a_trial_with_fewer_rungs_does_not_count_for_the_others() -> None:
    """Rungs of a short trial may fall on the same evaluation and then count as one rung."""
    rows = [(1.0, 1.5, 1.0), (2.0, 2.5, 2.0), (3.0, 3.5, 3.0)]
    trials = []
    for number, scores in enumerate(rows):
        trials.append(Trial(number, {}, "run", (5, 7, 9), dict(enumerate(scores)), {}, TrialState.DONE))
    short = Trial(3, {}, "run", (5, 9), {0: 9.0, 1: 0.5}, {}, TrialState.DONE)
    assert rung_correlations([*trials, short]) == {"0": pytest.approx(-0.2), "1": pytest.approx(1.0)}
