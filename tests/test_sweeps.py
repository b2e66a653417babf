"""Studies: refused whole where they are wrong, and the same trials, scores and decisions whoever trains them and whoever is killed."""

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
from conftest import TINY
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
from sweeps.sampling import TrialSampler
from sweeps.study import Study, built_in_names, json_schema, read_study, set_arguments, validate_study
from sweeps.trial import Trial

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


def data(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "tiny",
        "preset": "baseline",
        "set": SET,
        "space": SPACE,
        "budget": {"trials": 12},
    }
    return found | {"sampler": {"startup": 3, "generation": 3}, "rungs": {"at": [0.4], "keep": 0.5}} | changes


def made(**changes: Any) -> Study:
    return validate_study(data(**changes), "tiny.toml")


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"seed": {"values": [1, 2]}}}, "space.seed: a seed is drawn, not chosen"),
        ({"space": {"epochs": {"values": [1, 2]}}}, "space.epochs: the epochs are the task's budget"),
        ({"space": {"num_titles": {"low": 10, "high": 100}}}, "space.num_titles: the data is the task's"),
        (
            {"space": {"official_geometry": {"values": ["1x8"]}}},
            "the geometry of the evaluation is the task's",
        ),
        ({"space": {"lrr": {"low": 1.0, "high": 2.0}}}, "space.lrr is no config field (did you mean"),
        ({"space": {"log_every": {"values": [1, 2]}}}, "space.log_every changes nothing that is trained"),
        ({"space": {"lr": {"low": 2.0, "high": 1.0}}}, "space.lr: low=2 > high=1"),
        ({"space": {"lr": {"low": 1.0, "high": 1.0}}}, "there is nothing to search"),
        ({"space": {"lr": {"low": 0.0, "high": 1.0, "log": True}}}, "log=true with low=0"),
        ({"space": {"lr": {"low": 0.1}}}, "space.lr is no parameter: write low and high"),
        ({"space": {"dropout": {"values": []}}}, "space.dropout.values is empty"),
        ({"space": {"dropout": {"values": [0.1, 7.0]}}}, "7.0 is no value of it"),
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
            "step=0.5 is wider than from low=0.1 to high=0.2",
        ),
        ({"space": {"lr": {"low": 0.1, "values": [0.1]}}}, "or values; got {'low': 0.1, 'values': [0.1]}"),
        ({"budget": {"trials": "8"}}, "budget.trials='8' is not allowed"),
        ({"budget": {"trials": True}}, "budget.trials=True is not allowed"),
        ({"budget": {"flops": float("inf")}}, "budget.flops=inf is not allowed"),
        ({"name": "a/b"}, "name='a/b' is not allowed; write letters, digits"),
        ({"about": "\x1b[31m"}, "is not allowed; write text on one line"),
        (
            {"space": SPACE | {"momentum": {"low": 0.1, "high": 0.9, "when": {"optimiser": ["sgd"]}}}},
            "optimiser is no config field",
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
            "schedule='cosine': only wsd has a trunk to branch from",
        ),
        (
            {"rungs": BRANCH, "set": WSD, "space": SPACE | {"schedule": {"values": ["wsd", "cosine"]}}},
            "keep schedule at wsd",
        ),
        (
            {"rungs": BRANCH, "set": WSD | {"wd_schedule": "linear"}},
            "wd_schedule='linear': weight decay that falls",
        ),
        (
            {"rungs": BRANCH, "set": WSD | {"growth": GROWS}},
            "with growth, which is laid out over the whole run",
        ),
        ({"space": {"max_steps": {"values": [10, 20]}}}, "the steps are the task's budget"),
        ({"preset": "demo", "set": {"dev_frac": 0.1}}, "preset 'demo' has 2 steps, a study begins with one"),
        ({"space": {"timescale": {"low": 0.0, "high": 2.0}}}, "space.timescale is a time"),
        ({"budget": {}}, "budget is empty"),
        ({"budgets": {}}, "unknown key budgets (did you mean 'budget'?)"),
        ({"set": SET | {"dev_frac": 0.0}}, "there is no dev split to search on"),
        ({"set": SET | {"n_head": 3}}, "preset 'baseline' with [set]"),
        ({"objective": "val/full"}, "objective='val/full' is not allowed"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        made(**changes)
    assert said in str(e.value)


def test_all_faults_are_named_at_once() -> None:
    wrong = {"seed": {"values": [1, 2]}, "lr": {"low": 2.0, "high": 1.0}, "nothing": {"values": [1]}}
    with pytest.raises(ConfigError) as e:
        made(space=wrong, budget={})
    assert len(str(e.value).splitlines()) == 5


@pytest.mark.parametrize("name", built_in_names())
def test_the_built_in_studies_are_sound(name: str) -> None:
    found = read_study(name)
    assert found.name == name and found.about and found.base().dev_frac


def test_an_unknown_study_is_named_with_its_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown study 'regularisation'.*did you mean 'regularization'"):
        read_study("regularisation")


def test_the_schema_knows_every_key() -> None:
    found = json_schema()
    assert set(found["properties"]) == set(Study.model_fields)
    assert CliRunner().invoke(app, ["sweep", "run", "demo", "--schema"]).exit_code == 0


# -- who is asked


class Pretended(Search):
    """Trials that are trained at once: the driver alone."""

    def _count_train_tokens(self) -> int:
        return 10_000

    def score(self, trial: Trial, step: int) -> float:
        return abs(trial.values.get("lr", 0.05) - 0.02) + 1 / step

    def cost_of(self, trial: Trial) -> Ledger:
        return Ledger()


class Written(Pretended):
    """Each run has ten steps in its folder."""

    cost_of, writing = Search.cost_of, threading.Lock()

    def run_dir(self, cfg: TrainConfig) -> Any:
        folder = self.runs_dir / cfg.run_id
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"event": "step", "step": step, "tokens": 8 * step, "seconds": 0.1} for step in range(1, 11)]
        with self.writing:
            if not (folder / "metrics.jsonl").exists():
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RunDir(folder)


class AtOnce:
    def __init__(self, workers: int, pause: float = 0.0, dies: int = -1) -> None:
        self.workers, self.pause, self.dies, self.done = workers, pause, dies, 0

    def train(self, task: Task) -> Outcome:
        self.done += 1
        if self.pause:
            time.sleep(self.pause * random.random())
        return (
            Outcome(False, diverged=True, reason="lr too high")
            if any(text.startswith("lr=0.09") for text in task.sets)
            else Outcome(True)
        )

    def close(self) -> None:
        pass


class Nobody(AtOnce):
    def __init__(self) -> None:
        super().__init__(1)

    def train(self, task: Task) -> Outcome:
        raise AssertionError(f"a worker was asked for {task}")


def searched(folder: Path, engine: Any, **changes: Any) -> Search:
    folder.mkdir(parents=True, exist_ok=True)
    found = Pretended(made(**changes), folder, engine, lambda text: None, lambda: None)
    found.run()
    return found


def told(search: Search) -> list[tuple[Any, ...]]:
    return [(t.number, t.values, t.state, t.scores, t.reason) for t in search.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_the_trials_do_not_depend_on_workers_or_their_speed(tmp_path: Path, sampler: str) -> None:
    how = {"sampler": {"name": sampler, "startup": 3, "generation": 3}, "budget": {"trials": 21}}
    one = searched(tmp_path / "1", AtOnce(1), **how)
    many = searched(tmp_path / "7", AtOnce(7, pause=0.02), **how)
    assert told(one) == told(many) and len(one.trials) == 21
    assert one.trials[0].values == {} and len({str(t.values) for t in one.trials}) == 21
    assert any(t.state == "pruned" for t in one.trials) and one.trials[0].state == "done"
    other = searched(tmp_path / "s", AtOnce(1), **how | {"sampler": how["sampler"] | {"seed": 1}})  # type: ignore[operator]
    assert told(other) != told(one)


def test_a_study_that_begins_again_goes_on(tmp_path: Path) -> None:
    """The database has each trial once, however often the driver begins."""
    import optuna

    found = [searched(tmp_path, AtOnce(2), budget={"trials": trials}) for trials in (6, 12, 12)]
    assert told(found[1]) == told(found[2]) and told(found[0]) == told(found[1])[:6]
    kept = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    assert [t.user_attrs["number"] for t in kept] == list(range(12))


def test_a_conditional_parameter_is_there_where_its_condition_holds(tmp_path: Path) -> None:
    for trial in searched(tmp_path, AtOnce(1), budget={"trials": 15}).trials[1:]:
        assert ("momentum" in trial.values) == (trial.values["optimizer"] == "sgd")


def test_a_trial_that_diverges_fails_with_its_reason_and_the_sampler_stays_away(tmp_path: Path) -> None:
    asker = TrialSampler(made(), made().base())
    asker.ask(0)
    values = [asker.ask(n) for n in (1, 2)]
    asker.tell(0, {0: 2.0}, True)
    asker.tell(1, {0: 1.0}, True)
    asker.tell(2, {}, False)
    assert len(values) == 2 and [t.value for t in asker.optuna_study.trials] == [1.0, 3.0]


def test_a_folder_keeps_its_study(tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path / "a", made()),
        pytest.raises(UsageError, match="is searched by process"),
        locked_folder(tmp_path / "a", made()),
    ):
        pass
    with locked_folder(tmp_path / "a", made(space={"lr": {"values": [0.1, 0.2]}})):
        pass  # nothing was begun
    write_study_json(tmp_path / "a", made(), "mainrun sweep x")
    wider = made(space=SPACE | {"lr": {"low": 1e-3, "high": 0.2, "log": True}}, workers=7)
    words = r"another study of that name: space.lr.high was 0.1, is 0.2\. Go on .*--as NAME"
    with pytest.raises(UsageError, match=words), locked_folder(tmp_path / "a", wider):
        pass
    with locked_folder(tmp_path / "a", made(budget={"trials": 50}, workers=3)):
        pass  # more of the same study


def test_sets_say_a_config_again() -> None:
    from mainrun.plan.recipes import load

    cfg = made().base().model_copy(update={"lr": 0.0123456789012345})
    assert load("baseline", set_arguments(made(), cfg))[0] == cfg


def test_a_study_may_begin_with_a_preset_of_ones_own(tmp_path: Path) -> None:
    """Such a preset's name is no longer the way to it."""
    from mainrun.plan.recipes import load

    file = tmp_path / "mine.toml"
    file.write_text('base = "baseline"\nlr = 0.02\n')
    own = made(preset=str(file))
    cfg = own.base().model_copy(update={"dropout": 0.2})
    assert cfg.lr == 0.02 and load(str(file), set_arguments(own, cfg))[0] == cfg


def test_values_that_come_again_cost_nothing_again(tmp_path: Path) -> None:
    few = {"space": {"optimizer": {"values": ["adamw", "sgd"]}}, "rungs": None, "budget": {"trials": 9}}
    search = Written(made(**few), tmp_path, AtOnce(1), lambda text: None, lambda: None)
    search.run()
    parts = [search.cost_of(t) for t in search.trials]
    runs = {t.run_id for t in search.trials if t.run_id}
    assert len(runs) == 2 and sum(part.trained for part in parts) == 20
    assert all(part.asked == part.trained + part.reused == 10 for part in parts)


def test_the_timescale_is_a_weight_decay() -> None:
    from sweeps.space import trial_config

    base = made().base()
    cfg = trial_config(base, {"lr": 0.01, "timescale": 2.0}, 10_000)
    assert cfg.weight_decay == pytest.approx(1 / (0.01 * 2.0 * Plan(base, 10_000).steps))


@pytest.mark.slow
def test_a_batch_is_the_same_however_memory_cuts_it(tmp_path: Path) -> None:
    """What `batch` searches is the effective batch: its pieces only divide the memory. To the rounding of float32, without dropout."""
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
    found = []
    for grad_accum in (1, 2, 8):
        cfg = with_values(batch.base(), {"batch_size": 8, "grad_accum": grad_accum})
        train(cfg, tmp_path)
        rows = RunDir(tmp_path / cfg.run_id).metrics()
        found.append(
            [row["loss"] for row in rows if row["event"] == "step"]
            + [row["full"] for row in rows if row["event"] == "eval"]
        )
    assert len(found[0]) > 10 and all(other == pytest.approx(found[0], abs=2e-5) for other in found[1:])


@pytest.mark.slow
def test_the_driver_stays_quick_and_small(tmp_path: Path) -> None:
    from sweeps.bench_driver import bench

    rows = list(bench(2000, "random", tmp_path))
    assert len(rows) == 10 and rows[-1][0] == 2000
    times = [cpu for _, cpu, _, _ in rows]  # of this process, not of whatever else the machine does
    assert sum(times) / 10 < 20 and sum(times[-3:]) < 2 * sum(times[1:4])
    assert rows[-1][3] - rows[0][3] < 6, "megabytes"


# -- real trials


def write(folder: Path, **changes: Any) -> Path:
    """A study file."""
    lines: list[str] = []
    found = data(**changes)
    for key, value in found.items():
        if not isinstance(value, dict):
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in found.items():
        if isinstance(value, dict) and key != "space":
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    for name, p in found["space"].items():
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
    found = json.loads((out / "tiny" / "export.json").read_text())
    same = ("trial", "state", "value", "params", "scores", "stops", "run", "rung", "reason", "steps")
    evidence = found["evidence"] | {
        "runs": [{k: r[k] for k in ("kind", "trial", "seed", "run")} for r in found["evidence"]["runs"]]
    }  # no clock
    return {
        "trials": [{k: t[k] for k in same} for t in found["trials"]],
        "evidence": evidence,
        "rungs": found["rung_correlation"],
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_study_replays_whoever_trains_it_and_whoever_is_killed(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        budget={"trials": 24},
        evidence={"noise_seeds": 2, "seeds": 2, "best": 1},
        sampler={"startup": 6, "generation": 6},
    )
    legs = {"1": command(file, tmp_path / "1", 1), "3": command(file, tmp_path / "3", 3)}
    if importlib.util.find_spec("ray"):
        legs["ray"] = [*command(file, tmp_path / "ray", 2), "--engine", "ray"]
    for line in legs.values():
        made = subprocess.run(line, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    chance, kills, restarts = random.Random(5), 10, 3
    out = tmp_path / "killed"
    process = subprocess.Popen(command(file, out, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(1 + 2 * chance.random())
        children = [
            child
            for task in Path(f"/proc/{process.pid}/task").glob("*/children")
            for child in task.read_text().split()
        ]
        if restarts and kills <= 7 and chance.random() < 0.3:
            process.kill()
            process.wait()
            restarts -= 1
            process = subprocess.Popen(
                command(file, out, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        elif (
            children and kills and (out / "tiny" / "tokens.json").is_file()
        ):  # that is trials, not the look at the data before them
            kills -= 1
            try:
                os.kill(int(chance.choice(children)), signal.SIGKILL)
            except ProcessLookupError:
                kills += 1
    assert process.returncode == 0 and kills == 0 and restarts == 0
    one = results(tmp_path / "1")
    assert all(results(tmp_path / leg) == one for leg in [*legs, "killed"])
    assert len(one["trials"]) == 24 and {t["state"] for t in one["trials"]} >= {"done", "pruned"}
    ledger_adds_up(out)


def ledger_adds_up(out: Path) -> None:
    found = json.loads((out / "tiny" / "export.json").read_text())
    ledger = found["ledger"]
    assert (
        ledger["asked"] == ledger["trained"] + ledger["reused"] and 0 <= ledger["wasted"] <= ledger["trained"]
    )
    parts = [*found["trials"], *found["evidence"]["runs"]]
    for key in ("asked", "trained", "reused", "wasted", "tokens"):
        assert ledger[key] == sum(t[key] for t in parts)
    assert all(t["tokens"] * ledger["trained"] == ledger["tokens"] * t["trained"] for t in parts), (
        "lost steps have tokens too"
    )
    runs = [RunDir(file.parent) for file in (out / "tiny" / "runs").glob("*/config.json")]
    whole = total(run_cost(run, run.config()) for run in runs)
    assert (whole.trained, whole.tokens) == (ledger["trained"], ledger["tokens"]), (
        "what the run directories say"
    )
    assert all(t["wasted"] == t["trained"] > 0 for t in found["trials"] if t["state"] == "pruned")


@pytest.mark.slow
def test_a_study_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promotion goes on from the checkpoint, the ledger adds up, the winner becomes a preset that trains."""
    file = write(tmp_path, budget={"trials": 6}, evidence={"noise_seeds": 2, "seeds": 2, "best": 1})
    made = subprocess.run(command(file, tmp_path / "out", 2), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    ledger_adds_up(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tiny" / "export.json").read_text())
    promoted = [t for t in found["trials"] if t["state"] == "done" and t["trial"]]
    assert promoted and all(t["asked"] == t["stops"][-1] and t["wasted"] == 0 for t in promoted), (
        "no step twice"
    )
    again = Search(read_study(str(file)), tmp_path / "out" / "tiny", Nobody(), str, lambda: None)
    again.run()
    assert confirm(again) == found["evidence"], "what is there already needs no worker"
    from mainrun.run.session import train

    run = RunDir(tmp_path / "out" / "tiny" / "runs" / promoted[0]["run"])
    alone = train(run.config(), tmp_path / "alone")
    summary = run.summary()
    assert summary is not None and alone["weights"] == summary["weights"], (
        "the bits of a run that was never stopped"
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
        "won.toml is there already"
        in runner.invoke(app, ["sweep", "best", "tiny", "--save", "won", *out]).stderr
    )
    from mainrun.plan.recipes import load

    number = json.loads(runner.invoke(app, ["sweep", "best", "tiny", "--json", *out]).output)["trial"]
    trial = next(t for t in found["trials"] if t["trial"] == number)
    assert load("won.toml")[0].digest == load("baseline", trial["sets"])[0].digest
    import pyarrow.parquet as pq

    assert runner.invoke(app, ["sweep", "export", "tiny", "data", *out]).exit_code == 0
    assert pq.read_table("data/trials.parquet").num_rows == 6


@pytest.mark.slow
def test_a_worker_that_finds_its_run_further_on_is_done(tmp_path: Path) -> None:
    """A driver may be killed while a promoted trial is on its way, which saves it where it stands; the next one asks for the rung again."""
    cfg = made().base()
    sets = tuple(set_arguments(made(), cfg))
    engine = Local(1, 1)
    for until in (20, 10):
        assert engine.train(Task("baseline", sets, tmp_path, tmp_path / ".store", until)) == Outcome(True)
    assert RunDir(tmp_path / cfg.run_id).metrics()[-1]["step"] == 20


def test_ctrl_c_ends_the_confirmation_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(AtOnce):
        closed = False

        def train(self, task: Task) -> Outcome:
            while not self.closed:
                time.sleep(0.01)
            return Outcome(False, reason="the driver stopped")

        def close(self) -> None:
            self.closed = True

    search = searched(tmp_path, AtOnce(1), rungs=None, budget={"trials": 3})
    search.engine = Slow(2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        confirm(search)


# -- decay branches


@pytest.mark.parametrize(
    "fields", [{}, {"warmup_iters": 3}, {"swa": 0.5, "ema": 0.0}, {"decay_frac": 0.8, "warmup_frac": 0.2}]
)
def test_a_branch_is_its_trial_with_an_earlier_end(fields: dict[str, Any]) -> None:
    """The trunk's steps up to the fall, which no key tells apart, then the trial's own fall, whole."""
    from mainrun.store import lineage

    cfg = made(set=WSD | {"min_lr_frac": 0.1} | fields, space={"lr": SPACE["lr"]}).base()
    plan = Plan(cfg, 10_000)
    for step in (20, 31, 60):
        short = Plan(branch.branch_config(cfg, plan, step, 0.25), 10_000)
        falls = min(step, plan.decay_start)
        common = min(falls, plan.swa_start)
        assert short.steps == step + round(0.25 * step) and short.decay_start == max(falls, plan.warmup_steps)
        assert lineage.chain("0" * 64, short)[: common + 1] == lineage.chain("0" * 64, plan)[: common + 1]
        rates = [short.at(i).lr for i in range(short.steps)]
        assert rates[short.decay_start] == cfg.lr > rates[short.decay_start + 1] > rates[-1] > 0.1 * cfg.lr
        assert rates[-1] - 0.1 * cfg.lr <= 0.9 * cfg.lr / (short.steps - short.decay_start) + 1e-12, (
            "the fall is whole"
        )
        assert short.swa_start >= falls or not cfg.swa


def test_branches_choose_who_goes_on_and_the_trunks_own_scores_are_kept(tmp_path: Path) -> None:
    class Turned(Pretended):
        def run_score(self, cfg: TrainConfig, step: int) -> float:
            return (-cfg.lr if cfg.max_steps else cfg.lr) + 1 / step

        score = Search.score

    raw, by_branch = (
        Turned(
            made(set=WSD, space={"lr": SPACE["lr"]}, rungs=BRANCH | {"score": score}),
            tmp_path / score,
            AtOnce(1),
            str,
            lambda: None,
        )
        for score in ("raw", "branch")
    )
    for search in (raw, by_branch):
        search.folder.mkdir()
        search.run()
    first = raw.trials[1:3], by_branch.trials[1:3]
    assert [t.values for t in first[0]] == [t.values for t in first[1]]
    assert [t.state for t in first[0]] == [t.state for t in first[1]][::-1] and {
        t.state for t in first[0]
    } == {"pruned", "done"}
    found = {t.number: by_branch.runs_of(t) for t in by_branch.trials if t.scores}
    assert found and all(
        t.raw_scores[0] == found[t.number].cfg.lr + 1 / t.stops[0] for t in by_branch.trials if t.scores
    )
    assert all(
        t.scores[0] == -m.cfg.lr + 1 / m.branches[0].max_steps
        for t, m in ((by_branch.trials[n], m) for n, m in found.items())
    )
    for search, each in ((raw, 1), (by_branch, 2)):  # tasks of each trial to its rung
        reached, ends = (
            sum(found)
            for found in zip(*((bool(t.scores), t.state == "done") for t in search.trials), strict=True)
        )
        assert search.engine.done == len(search.trials) + (each - 1) * reached + ends  # type: ignore[attr-defined]
    assert all([*t.raw_scores] == [0] for t in by_branch.trials if t.state == "done"), (
        "the end is scored where it is"
    )


def test_a_branch_that_diverges_ends_its_trial_and_is_paid_for(tmp_path: Path) -> None:
    class Bursts(AtOnce):
        def train(self, task: Task) -> Outcome:
            return (
                Outcome(False, diverged=True, reason="it burst")
                if any(text.startswith("max_steps=") for text in task.sets)
                else Outcome(True)
            )

    search = Written(
        made(set=WSD, space={"lr": SPACE["lr"]}, rungs=BRANCH, budget={"trials": 3}),
        tmp_path,
        Bursts(1),
        str,
        lambda: None,
    )
    search.run()
    parts = [search.cost_of(t) for t in search.trials]
    assert [t.state for t in search.trials] == ["diverged"] * 3 and all(not t.scores for t in search.trials)
    assert all((part.trained, part.branch, part.wasted) == (20, 10, 20) for part in parts), (
        "the trunk's ten and the branch's"
    )


def test_rungs_are_held_against_the_end_raw_and_on_branches() -> None:
    search = Search.__new__(Search)
    search.trials = [
        Trial(n, {}, "run", (5, 9), {0: on_branch, 1: end}, {0: own}, state="done")
        for n, (own, on_branch, end) in enumerate(
            [(3.0, 1.1, 1.0), (2.0, 2.1, 2.0), (1.0, 3.1, 3.0), (4.0, 4.1, 4.0)]
        )
    ]
    assert rung_correlations(search.trials) == {"0": pytest.approx(1.0)} and rung_correlations(
        search.trials, raw=True
    ) == {"0": pytest.approx(0.2)}


@pytest.mark.slow
def test_a_branch_trains_its_fall_alone_and_leaves_the_trunk_as_it_is(tmp_path: Path) -> None:
    """By the ledger and by the rows; a promoted trial has the bits of a run that nobody stopped or branched from."""
    from mainrun.run.session import train

    few = {
        "budget": {"trials": 3},
        "sampler": {"generation": 3, "startup": 3},
        "rungs": BRANCH | {"branch": 0.25},
    }
    # the second and third differ in their fall alone, and one begins to fall before the rung
    space = {"decay_frac": {"values": [0.2, 0.8]}}
    (tmp_path / "s").mkdir()
    search = Search(made(set=WSD, space=space, **few), tmp_path / "s", Local(1, 1), print, lambda: None)
    with locked_folder(search.folder, search.study):
        search.run()
    parts, ends = [search.cost_of(t) for t in search.trials], {t.state for t in search.trials}
    assert ends == {"done", "pruned"}
    sums = total(parts)
    assert sums.asked == sums.trained + sums.reused and sums.branch <= sums.trained
    fresh = set()
    for trial in search.trials:
        step, trunk, cfg = trial.stops[0], search.runs_of(trial).cfg, search.runs_of(trial).branches[0]
        falls = min(step, Plan(trunk, search.train_tokens).decay_start)
        mine = run_cost(search.run_dir(cfg), cfg)
        # the trunk keeps a node where its rate first differs: one step behind the beginning of the fall
        assert mine.asked == cfg.max_steps and (
            mine.trained == cfg.max_steps - falls - (falls < step) or cfg.run_id in fresh
        )
        fresh.add(cfg.run_id)
        if trial.state == "done":
            summary = search.run_dir(trunk).summary()
            assert (
                summary is not None
                and train(trunk, tmp_path / f"alone{trial.number}")["weights"] == summary["weights"]
            )
            assert run_cost(search.run_dir(trunk), trunk).asked == trial.stops[-1], (
                "it trained on from its rung"
            )
        else:
            assert search.cost_of(trial).wasted == search.cost_of(trial).trained
    runs = {
        cfg.run_id: run_cost(search.run_dir(cfg), cfg).trained
        for t in search.trials
        for cfg in search.runs_of(t).branches.values()
    }
    assert sums.branch == sum(runs.values()) > 0, "each branch once, whoever shares it"


# -- what may be claimed


def claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, noise: float, seed: int
) -> dict[str, Any]:
    evidence = {"seeds": 5, "noise_seeds": 5, "best": 2}
    search = searched(tmp_path, AtOnce(1), rungs=None, budget={"trials": 6}, evidence=evidence)
    base = search.base
    chance = random.Random(seed)

    def trained(_: Any, jobs: Any) -> dict[Any, float]:
        better = {job: cfg.model_copy(update={"seed": base.seed}) != base for job, cfg in jobs.items()}
        return {job: 2.0 + chance.gauss(0, noise) - gain * better[job] for job in jobs}

    monkeypatch.setattr("sweeps.confirm._trained", trained)
    monkeypatch.setattr("sweeps.confirm._val", lambda *_: {"full": 1.0})
    return confirm(search)


def test_a_real_gain_is_claimed_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = claimed(tmp_path / "a", monkeypatch, gain=0.1, noise=0.002, seed=1)
    assert (
        clear["winner"] is not None
        and "is better than the base by 0." in clear["claim"]
        and clear["val"] == {"full": 1.0}
    )
    small = claimed(tmp_path / "b", monkeypatch, gain=0.001, noise=0.01, seed=1)
    assert (
        small["winner"] is None
        and small["claim"] == "not better than the base within noise"
        and "val" not in small
    )
    assert all(row["why"] for row in small["rows"])


@pytest.mark.slow
def test_trials_that_differ_in_their_seed_alone_claim_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real scores of the base, each of a seed of its own, in the place of every run that a confirmation asks for."""
    from mainrun.run.session import train

    evidence = {"seeds": 3, "noise_seeds": 3, "best": 2}
    search = searched(
        tmp_path, AtOnce(1), set=SET | {"epochs": 1}, rungs=None, budget={"trials": 6}, evidence=evidence
    )
    base = search.base
    seeds = (base.model_copy(update={"seed": 5000 + i}) for i in range(20 * 12))
    scores = [train(cfg, tmp_path / "null")["scores"]["dev"]["last"]["full"] for cfg in seeds]
    assert len({*scores}) > 230, "a seed moves the score"
    monkeypatch.setattr("sweeps.confirm._val", lambda *_: {"full": 1.0})

    def claims(given: list[float]) -> bool:
        monkeypatch.setattr("sweeps.confirm._trained", lambda _, jobs: dict(zip(jobs, given, strict=True)))
        return confirm(search)["winner"] is not None

    repeats = sum(claims(scores[12 * i : 12 * i + 12]) for i in range(20))
    chance = random.Random(0)
    drawn = sum(claims(chance.sample(scores, 12)) for _ in range(500))
    print(f"claims where nothing is: {repeats} of 20 repeats, {drawn} of 500 that draw from the same runs")
    assert repeats <= 1 and drawn <= 25, "5% were stated"
