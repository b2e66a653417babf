"""`mainrun demo`: the whole way at a scale of seconds, by the commands that one would type. `way` is all of it.

Each command finds by itself what an earlier start of it has done: so the same demo goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.config import TASK
from mainrun.errors import Interrupted, MainrunError
from mainrun.plan.recipes import load
from mainrun.run.progress import clock
from mainrun.store.rundir import disk_errors

SEEDS = (int(TASK["seed"]), int(TASK["seed"]) + 1)
STUDY = "demo"


class Step(NamedTuple):
    name: str
    about: str
    command: list[str]  # of mainrun


def way(out: Path, sets: Sequence[str]) -> list[Step]:
    """Train, grow, search, report, hand in, check."""
    more = [part for text in sets for part in ("--set", text)]
    (run,) = (cfg.run_id for cfg in load("demo:optimized", sets))
    report, bundle = str(out / "report.pdf"), str(out / "submission.zip")
    return [
        *(
            Step("train", f"the baseline and the optimised recipe, seed {seed}",
                 ["train", "--preset", "demo", "--set", f"seed={seed}", *more, "--out", str(out)])
            for seed in SEEDS
        ),
        Step("grow", "twice the layers from half of the tokens on; the steps before are there already",
             ["train", "--preset", "demo-grown", *more, "--out", str(out)]),
        Step("sweep", "12 trials, then the best of them against the base on fresh seeds",
             ["sweep", STUDY, *more, "--out", str(out / "studies")]),
        Step("report", "one PDF of all that", ["report", str(out), "--out", report, "--title", "Mainrun demo"]),
        Step("submit", "all guards; the run, its code and the report in one zip; nothing is sent",
             ["submit", "--run", run, "--runs", str(out), "--report", report, "--out", bundle]),
        Step("verify", "the zip's own code trains the first steps again; every bit is compared", ["verify", bundle]),
    ]  # fmt: skip


def demo(out: Path, sets: Sequence[str], unfit: Callable[[], str]) -> None:
    """`unfit` says why no submission can be made of the code at hand; empty: it can."""
    steps, began, why = way(out, sets), time.monotonic(), ""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for i, step in enumerate(steps):
        print(f"[{i + 1}/{len(steps)}] {step.name}: {step.about}", flush=True)
        print(f"      mainrun {shlex.join(step.command)}", flush=True)
        if step.name in ("submit", "verify") and (why := why or unfit()):
            print(f"      left out: {why if step.name == 'submit' else 'there is no zip'}", flush=True)
            continue
        start = time.monotonic()
        said = _run(step, out / "demo.log")
        for line in (*_told(step, out, said), clock(time.monotonic() - start)):
            print(f"      {line}", flush=True)
    print(
        f"\nthe whole way: {clock(time.monotonic() - began)}. What there is now, and what to try next (after `. {_activate()}`):\n"
    )
    for place, following in _there(steps, bool(why)):
        print(f"  {place}\n      {shlex.join(['mainrun', *following])}")
    print(f"\nrm -r {shlex.quote(str(out))} takes all of it away.")


def _told(step: Step, out: Path, said: str) -> list[str]:
    """What of a step's words is worth a line: its results stand in the report."""
    lines = said.strip().splitlines()
    if step.name == "sweep":
        found = json.loads((out / "studies" / STUDY / "export.json").read_text(encoding="utf-8"))
        return [found["evidence"]["claim"]] if found.get("evidence") else []
    return {"train": [], "grow": [], "submit": lines[-2:]}.get(step.name, lines)


def _there(steps: list[Step], unfit: bool) -> Iterator[tuple[str, list[str]]]:
    train, *_, sweep, report, submit, verify = (step.command for step in steps)
    out, run, studies, pdf, bundle = train[-1], submit[2], sweep[-1], report[3], verify[1]
    ids = [path.parent.name for path in sorted(Path(out).glob("*/summary.json"))]
    yield f"{len(ids)} runs: {out}/demo-*", ["compare", "--out", out, *ids]
    yield (
        f"the optimised model: {out}/{run}",
        ["sample", run, "--out", out, "--prompt", "Show HN:", "-n", "5"],
    )
    yield f"the study: {studies}/{STUDY}", ["sweep", "show", STUDY, "--out", studies]
    yield (
        f"the report: {pdf}",
        ["report", out, "--out", "mine.pdf", "--figures", "figures", "--tables", "tables"],
    )
    if unfit:
        yield "no submission, for the reason above", submit
    else:
        steps_of_run = json.loads((Path(out) / run / "summary.json").read_text(encoding="utf-8"))["steps"]
        yield f"the submission: {bundle}", ["verify", bundle, "--steps", str(steps_of_run)]


def _run(step: Step, log: Path) -> str:
    """A step's stdout. What it shows on the way (stderr) is for whoever watches; where nobody does, it goes to a file."""
    watched = sys.stderr.isatty()
    command = [sys.executable, "-m", "mainrun", *step.command]
    with (
        disk_errors(log),
        log.open("w", encoding="utf-8") as f,
        _started(command, None if watched else f) as process,
    ):
        said, _ = process.communicate()
    if process.returncode == 0:
        return said
    if not watched:
        sys.stderr.write("".join(line + "\n" for line in log.read_text(encoding="utf-8").splitlines()[-5:]))
    if process.returncode in (Interrupted.exit_code, 128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM):
        raise Interrupted("the demo was stopped; the same command goes on from there")
    fault = MainrunError(
        f"step {step.name} of the demo ended with {process.returncode}, above is why; the same command goes on from there"
    )
    fault.exit_code = process.returncode if process.returncode > 0 else 1
    raise fault


@contextmanager
def _started(command: list[str], stderr: Any) -> Iterator[subprocess.Popen[str]]:
    """In a group of its own: what stops this is handed on, once, whether a terminal sent it to all or a `kill` to one."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, process_group=0
    )
    handed_on = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
    before = {
        s: signal.signal(s, lambda signum, _: process.send_signal(handed_on[signal.Signals(signum)]))
        for s in handed_on
    }
    try:
        yield process
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _activate() -> str:
    return shlex.quote(os.path.relpath(Path(sys.prefix) / "bin" / "activate"))
