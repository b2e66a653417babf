"""Test how rivals are run: the protocol with their adapters, both bills, the budget, crashes and hangs.

The tests use small adapters of their own, and no library.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mainrun.errors import RunError, UsageError
from sweeps.frugal import recipe_key
from sweeps.search_bench import rivals
from sweeps.search_bench.metrics import Trace
from sweeps.search_bench.rivals import Rival, search

CHOICES: dict[str, list[Any]] = {
    "lr": [0.001, 0.002, 0.004, 0.008, 0.016, 0.032],
    "weight_decay": [0.02, 0.1, 0.5],
    "dropout": [0.0, 0.1, 0.25],
    "batch_size": [4, 8, 16],
    "decay_frac": [0.2, 0.4, 0.6, 0.8],
}
BASE = {"lr": 0.008, "weight_decay": 0.1, "dropout": 0.1, "batch_size": 8, "decay_frac": 0.4}
BEST = {"lr": 3, "weight_decay": 1, "dropout": 0, "batch_size": 1, "decay_frac": 2}  # positions
POINTS = 28
WHOLE = 2800


@dataclass(frozen=True)
class Definition:
    name: str = "tiny"
    points: int = POINTS


class TinyTable:
    """Stands in for a recorded table: smooth scores with noise. The highest lr with a batch of 4 diverges."""

    definition = Definition()
    choices = CHOICES
    base = BASE
    whole = WHOLE
    train_tokens = WHOLE // 7

    def curve(self, values: dict[str, Any], seed: int) -> list[float | None]:
        position = {name: CHOICES[name].index(value) for name, value in values.items()}
        far = sum((position[name] - BEST[name]) ** 2 / len(CHOICES[name]) for name in CHOICES)
        noise = random.Random(f"{seed} {json.dumps(values, sort_keys=True)}")
        curve: list[float | None] = []
        for point in range(1, POINTS + 1):
            score = 1.5 + 4 / point + 0.5 * far * point / POINTS
            curve.append(score + noise.gauss(0, 0.02) / point**0.5)
        if position["lr"] == 5 and values["batch_size"] == 4:
            curve[10:] = [None] * (POINTS - 10)
        return curve

    def point_tokens(self, values: dict[str, Any]) -> list[int]:
        return [WHOLE * point // POINTS for point in range(1, POINTS + 1)]

    def decay_tokens(self, values: dict[str, Any]) -> int:
        return round(WHOLE * (1 - values["decay_frac"]))

    def trunk_key(self, values: dict[str, Any]) -> str:
        return json.dumps([values[name] for name in CHOICES if name != "decay_frac"])


TABLE: Any = TinyTable()
VERSIONS = {
    "neps": "neural-pipeline-search==0.17.0",
    "optuna": "optuna==5.0.0",
    "smac": "smac==2.4.1",
    "syne-tune": "syne-tune==0.16.0",
}


def scripted(folder: Path, *lines: str) -> Rival:
    """Return a rival whose adapter runs these lines, with the functions `train` and `recipe`."""
    script = folder / "adapter.py"
    script.write_text("\n".join([PREAMBLE, *lines]), encoding="utf-8")
    return Rival(script)


PREAMBLE = """
import itertools, json, os, sys, time
start = json.loads(sys.stdin.readline())

def send(line):
    print(line, flush=True)
    answer = json.loads(sys.stdin.readline())
    if "stop" in answer:
        sys.exit()
    return answer

def recipe(**positions):
    return start["base"] | {name: start["space"][name][at] for name, at in positions.items()}

def train(to, restart=False, **positions):
    return send(json.dumps({"train": recipe(**positions), "to": to, "restart": restart}))["scores"]
"""


def run(chosen: Rival, seed: int = 0, **options: Any) -> Trace:
    return search("tiny", chosen, TABLE, seed, 0, **options)


def requests_of(
    chosen: Rival, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Run a search and return what its adapter asked for."""
    asked: list[dict[str, Any]] = []
    answer = rivals.Service.answer

    def note(service: rivals.Service, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return answer(service, request)

    monkeypatch.setattr(rivals.Service, "answer", note)
    run(chosen, seed, **options)
    monkeypatch.undo()
    return asked


# -- the protocol


def test_an_adapter_learns_what_is_searched_and_gets_the_scores_of_the_seed(tmp_path: Path) -> None:
    checks = [
        "scores = train(9)",
        f"assert scores == {TABLE.curve(BASE, 0)[:9]}, scores",
        f"assert start['space'] == {CHOICES} and start['base'] == {BASE}",
        f"assert (start['seed'], start['points'], start['epoch'], start['budget']) == (5, {POINTS}, 4, 60.0)",
    ]
    run(scripted(tmp_path, *checks), seed=5)


def test_points_after_a_divergence_have_no_score_and_cost_nothing(tmp_path: Path) -> None:
    checks = ["scores = train(28, lr=5, batch_size=0)", "assert scores[10:] == [None] * 18", "train(3)"]
    trace = run(scripted(tmp_path, *checks, "assert None not in scores[:10]"))
    assert trace.steps == [((1100 + 300) / WHOLE, None)]


def test_the_recommendation_is_the_lowest_score_among_whole_runs(tmp_path: Path) -> None:
    lines = ["train(28)", "train(27, **best)", "train(28, lr=0, dropout=2)", "train(28, **best)"]
    trace = run(scripted(tmp_path, f"best = {BEST}", *lines))
    best = {name: CHOICES[name][at] for name, at in BEST.items()}
    keys = [recipe_key(BASE), recipe_key(best), recipe_key(best)]
    assert [key for _, key in trace.steps] == keys
    assert [tokens for tokens, _ in trace.steps] == [1.0, 3.0, 3.0]


def test_the_trace_names_the_search(tmp_path: Path) -> None:
    trace = search("mine", scripted(tmp_path, "sum(range(10**6))"), TABLE, 3, 1)
    assert (trace.method, trace.table, trace.search_seed, trace.train_seed) == ("mine", "tiny", 3, 1)
    assert trace.steps == [(0.0, None)]
    assert 0 < trace.cpu_seconds < 10


# -- bills


def bills(*requests: tuple[dict[str, int], int, bool]) -> tuple[int, int]:
    """Return both bills, in tokens. A recipe is given by positions of values unlike the base."""
    counted = rivals.Bills(TABLE)
    for positions, to, restart in requests:
        values = BASE | {name: CHOICES[name][at] for name, at in positions.items()}
        counted.charge(values, to, restart)
    return counted.own, counted.shared


def test_points_are_paid_once() -> None:
    assert bills(({}, 10, False)) == (1000, 1000)
    assert bills(({}, 10, False), ({}, 20, False), ({}, 28, False)) == (2800, 2800)
    assert bills(({}, 28, False), ({}, 10, True), ({}, 28, True)) == (2800, 2800)


def test_a_library_that_restarts_pays_again_but_our_store_does_not() -> None:
    assert bills(({}, 10, False), ({}, 28, True)) == (3800, 2800)


def test_our_store_shares_the_trunk() -> None:
    # the base decays from the token 1680 on, and its neighbours from 2240 and 1120 on
    assert bills(({}, 28, False), ({"decay_frac": 0}, 28, False)) == (5600, 2800 + 560 + 560)
    assert bills(({}, 28, False), ({"decay_frac": 2}, 28, False)) == (5600, 2800 + 1680)
    assert bills(({}, 10, False), ({"decay_frac": 2}, 14, False)) == (2400, 1000 + 120 + 280)
    assert bills(({}, 28, False), ({"lr": 0}, 28, False)) == (5600, 5600)


def test_a_search_ends_when_the_lower_bill_reaches_the_budget(tmp_path: Path) -> None:
    lines = ["for at in range(4): train(28, decay_frac=at)", "1 / 0"]
    trace = run(scripted(tmp_path, *lines), budget=2.5)
    # the four runs share the longest trunk, and each has its own decay
    assert trace.steps[-1][0] == pytest.approx(2240 / WHOLE + 0.2 + 0.4 + 0.6 + 0.8)


def test_a_search_ends_after_100_known_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["for turn in itertools.count():", "    for to in (1, 9, 28): train(to, lr=turn % 2)"]
    asked = requests_of(scripted(tmp_path, *lines), monkeypatch)
    assert len(asked) == 3 * (2 + 99) + 1


# -- mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sys.exit('no such sampler')", "ended with exit code 1; the end of its stderr: no such sampler"),
        ("os.kill(os.getpid(), 9)", "ended with exit code -9"),
        ("send('hello')", "has sent b'hello' instead of a JSON object"),
        ("send('[1]')", "has sent b'\\[1\\]' instead of a JSON object"),
        ("train(0)", "asked for the point 0; a run has the points 1 to 28"),
        ("train(29)", "asked for the point 29"),
        ("send(json.dumps({'train': recipe() | {'lr': 7}, 'to': 1}))", "asked for lr = 7; allowed are"),
        ("send(json.dumps({'train': {'lr': 0.001}, 'to': 1}))", "it must give lr, weight_decay"),
        ("send('{}')", "asked for the recipe None"),
    ],
)
def test_mistakes_of_an_adapter_are_reported(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        run(scripted(tmp_path, line))


def test_a_method_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(RunError, match=r"rival tiny: the adapter has sent no request for 0\.2 seconds"):
        run(scripted(tmp_path, "time.sleep(60)"), patience=0.2)
    assert [process.returncode for process in started] == [-signal.SIGKILL]
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_an_unknown_rival_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no rival 'optuna-tpee' \(did you mean 'optuna-tpe'"):
        rivals.rival("optuna-tpee")


# -- environments


def test_an_environment_is_created_once_for_each_state_of_its_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(rivals, "_run", lambda command, library: commands.append(command))
    monkeypatch.setattr(rivals, "FOLDER", tmp_path)
    pins = tmp_path / "environments" / "optuna.txt"
    pins.parent.mkdir()
    pins.write_text("optuna==5.0.0\n")

    def make() -> Path:
        python = rivals.environment("optuna", tmp_path / "cache")
        python.parents[1].mkdir(parents=True, exist_ok=True)
        return python

    monkeypatch.setattr(Path, "touch", lambda path: path.parent.mkdir(parents=True) or path.write_text(""))
    first = make()
    assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert make() == first
    assert len(commands) == 2
    pins.write_text("optuna==5.0.1\n")
    assert make() != first
    assert rivals.environment("") == Path(sys.executable)


def test_an_environment_that_cannot_be_created_is_reported() -> None:
    command = [sys.executable, "-c", "print('no index'); raise SystemExit(3)"]
    with pytest.raises(UsageError, match=r"of optuna cannot be created: .* exit code 3 \(no index\); check"):
        rivals._run(command, "optuna")


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_each_rival_has_a_short_adapter_and_pinned_libraries(name: str) -> None:
    chosen = rivals.RIVALS[name]
    assert len(chosen.script.read_text(encoding="utf-8").splitlines()) <= 60
    if chosen.library:
        pins = (rivals.FOLDER / "environments" / f"{chosen.library}.txt").read_text().splitlines()
        assert all(line.count("==") == 1 for line in pins)
        assert VERSIONS[chosen.library] in pins


# -- our own adapters, which need no library


def test_random_search_repeats_and_begins_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = rivals.RIVALS["random"]
    first = requests_of(chosen, monkeypatch, seed=3, budget=12)
    assert first == requests_of(chosen, monkeypatch, seed=3, budget=12)
    assert first != requests_of(chosen, monkeypatch, seed=4, budget=12)
    assert first[0] == {"train": BASE, "to": POINTS}
    assert len({recipe_key(request["train"]) for request in first}) == len(first)


def test_top_k_trains_the_best_of_an_epoch_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests_of(rivals.RIVALS["top-3-of-16"], monkeypatch, budget=10)
    assert [request["to"] for request in asked[:19]] == [4] * 16 + [POINTS] * 3
    assert asked[0]["train"] == BASE
    ranked = sorted(asked[:16], key=lambda request: TABLE.curve(request["train"], 0)[3])
    assert [request["train"] for request in asked[16:19]] == [request["train"] for request in ranked[:3]]


def test_adapters_get_the_worst_score_of_a_point_after_a_divergence(tmp_path: Path) -> None:
    script = tmp_path / "adapter.py"
    script.write_text(
        f"""import sys
sys.path.insert(0, {str(rivals.FOLDER / "adapters")!r})
from bench import Bench
bench = Bench()
print("what a library prints is no request")
poor = bench.train(bench.at(dict.fromkeys(bench.space, 0)), 20)
bad = bench.train(bench.base | {{"lr": 0.032, "batch_size": 4}}, 20)
assert bad[10:] == [max(poor[point], bad[9]) for point in range(10, 20)], bad
assert bench.at(bench.indices(bench.base)) == bench.base
""",
        encoding="utf-8",
    )
    run(Rival(script))
