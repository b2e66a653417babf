"""`mainrun demo`: run the whole workflow at a small scale.

The demo runs each step as a separate mainrun command. Each command skips the work that an earlier call of the
same command has finished. An interrupted demo can therefore be resumed.
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
from typing import IO, Any, NamedTuple

from mainrun.config import TASK
from mainrun.errors import Interrupted, MainrunError
from mainrun.plan.recipes import load
from mainrun.run.progress import clock
from mainrun.store.rundir import disk_errors

SEED = int(TASK["seed"])
STUDY = "demo"
# The exit codes of a demo step that was stopped by a signal.
STOPPED = (Interrupted.exit_code, 128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM)
# Maps each signal that the demo receives to the signal that it sends to the running command. A command that
# is training saves its state when it receives SIGINT or SIGTERM.
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


class DemoStep(NamedTuple):
    name: str
    about: str
    command: list[str]  # the arguments of the `mainrun` command


class StepFailed(MainrunError):
    """The error for a failed step of the demo. The exit code of the demo is the exit code of this step."""

    def __init__(self, step: DemoStep, code: int) -> None:
        super().__init__(
            f"the demo's {step.name} step failed with exit code {code} (see the error above); "
            "run the same command again to resume"
        )
        self.exit_code = max(code, 1)


class Files:
    """The paths of the files and folders that the demo writes."""

    def __init__(self, out: Path, sets: Sequence[str]) -> None:
        (cfg,) = load("demo:optimized", sets)
        self.out = str(out)
        self.run_id = cfg.run_id  # the ID of the run that the demo submits
        self.studies = str(out / "studies")
        self.report = str(out / "report.pdf")
        self.bundle = str(out / "submission.zip")

    def submit_command(self) -> list[str]:
        options = ["--runs", self.out, "--report", self.report, "--out", self.bundle]
        return ["submit", "--run", self.run_id, *options]


def demo_steps(files: Files, sets: Sequence[str]) -> list[DemoStep]:
    """Return the steps of the demo, in order."""
    options: list[str] = []
    for text in sets:
        options += ["--set", text]
    steps = []
    for seed in (SEED, SEED + 1):
        train = ["train", "--preset", "demo", "--set", f"seed={seed}", *options, "--out", files.out]
        steps.append(DemoStep("train", f"the baseline and the optimized recipe, seed {seed}", train))
    grow = ["train", "--preset", "demo-grown", *options, "--out", files.out]
    steps.append(
        DemoStep("grow", "double the layers after half of the tokens; the first half is reused", grow)
    )
    sweep = ["sweep", STUDY, *options, "--out", files.studies]
    steps.append(DemoStep("sweep", "12 trials, then the best trial against the base on fresh seeds", sweep))
    report = ["report", files.out, "--out", files.report, "--title", "Mainrun demo"]
    steps.append(DemoStep("report", "one PDF about these runs and this study", report))
    steps.append(
        DemoStep(
            "submit",
            "run all guards, and put the run, its code and the report into a zip; nothing is sent",
            files.submit_command(),
        )
    )
    verify = ["verify", files.bundle]
    steps.append(
        DemoStep("verify", "train the first steps again with the code in the zip; compare every bit", verify)
    )
    return steps


def run_demo(out: Path, sets: Sequence[str], why_not_submittable: Callable[[], str]) -> None:
    """Run the steps of the demo and print their results.

    why_not_submittable: a function that returns the reason why the current code cannot be submitted, or an
    empty string.
    """
    files = Files(out, sets)
    steps = demo_steps(files, sets)
    start = time.monotonic()
    obstacle = ""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.name}: {step.about}", flush=True)
        print(f"      mainrun {shlex.join(step.command)}", flush=True)
        if step.name == "submit":
            obstacle = why_not_submittable()
            if obstacle:
                print(f"      skipped: {obstacle}", flush=True)
                continue
        if step.name == "verify" and obstacle:
            print("      skipped: there is no zip", flush=True)
            continue
        step_start = time.monotonic()
        output = _run(step, out / "demo.log")
        for line in _highlights(step, out, output):
            print(f"      {line}", flush=True)
        print(f"      {clock(time.monotonic() - step_start)}", flush=True)
    print(f"\nThe whole demo took {clock(time.monotonic() - start)}.")
    print(f"Its results, each with a command to try next (after `. {_activate_script()}`):\n")
    for result, command in _next_commands(files, submitted=not obstacle):
        print(f"  {result}\n      {shlex.join(['mainrun', *command])}")
    print(f"\nTo delete everything: rm -r {shlex.quote(files.out)}")


def _highlights(step: DemoStep, out: Path, output: str) -> list[str]:
    """Return the lines of a step's output that the demo shows. No lines are shown for a training step."""
    if step.name in ("train", "grow"):
        return []
    if step.name == "sweep":
        export = json.loads((out / "studies" / STUDY / "export.json").read_text(encoding="utf-8"))
        return [export["evidence"]["claim"]] if export.get("evidence") else []
    lines = output.strip().splitlines()
    if step.name == "submit":
        return lines[-2:]
    return lines


def _next_commands(files: Files, submitted: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield each result of the demo, together with a command that uses this result."""
    out = Path(files.out)
    ids = [path.parent.name for path in sorted(out.glob("*/summary.json"))]
    yield f"{len(ids)} runs: {out}/demo-*", ["compare", "--out", files.out, *ids]
    yield (
        f"the optimized model: {out}/{files.run_id}",
        ["sample", files.run_id, "--out", files.out, "--prompt", "Show HN:", "-n", "5"],
    )
    yield f"the study: {files.studies}/{STUDY}", ["sweep", "show", STUDY, "--out", files.studies]
    yield (
        f"the report: {files.report}",
        ["report", files.out, "--out", "mine.pdf", "--figures", "figures", "--tables", "tables"],
    )
    if submitted:
        summary = json.loads((out / files.run_id / "summary.json").read_text(encoding="utf-8"))
        yield f"the submission: {files.bundle}", ["verify", files.bundle, "--steps", str(summary["steps"])]
    else:
        yield "no submission (see the reason above)", files.submit_command()


def _run(step: DemoStep, log: Path) -> str:
    """Run a step and return its stdout.

    The progress of the step is shown in the terminal. If stderr is not a terminal, the progress is written to
    the file `log`.
    """
    on_terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "mainrun", *step.command]
    with (
        disk_errors(log),
        log.open("w", encoding="utf-8") as file,
        _process(command, None if on_terminal else file) as process,
    ):
        output, _ = process.communicate()
    if process.returncode == 0:
        return output
    if not on_terminal:
        for line in log.read_text(encoding="utf-8").splitlines()[-5:]:
            print(line, file=sys.stderr)
    if process.returncode in STOPPED:
        raise Interrupted("the demo was stopped; run the same command again to resume")
    raise StepFailed(step, process.returncode)


@contextmanager
def _process(command: list[str], stderr: IO[str] | None) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a separate process group, and forward signals to the command.

    In a shared process group, the command would receive each Ctrl-C from a terminal twice.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, process_group=0
    )

    def pass_on(signum: int, frame: Any) -> None:
        process.send_signal(PASSED_ON[signal.Signals(signum)])

    before = {signum: signal.signal(signum, pass_on) for signum in PASSED_ON}
    try:
        yield process
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _activate_script() -> str:
    """Return the path of the script that activates the current virtual environment."""
    return shlex.quote(os.path.relpath(Path(sys.prefix) / "bin" / "activate"))
