"""Send the rows of metrics.jsonl to experiment trackers: `mainrun train --track tensorboard`.

Tracking changes no bit of a run. A tracker that fails is reported once, and the run continues. The next start
sends the rows that the tracker missed.
"""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, UsageError, nearest
from mainrun.files.inputs import shown
from mainrun.run.progress import QUIET, Progress, Row
from mainrun.run.trackers import WANDB_MODES, WRITERS, Point, Target, Writer, default_project, message
from mainrun.store import records
from mainrun.store.rundir import write_json

FILE = "trackers.json"
SEND_SECONDS = 2.0  # the minimum time between two deliveries to the trackers
PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,127}")
NOT_MEASURED = ("step", "steps")  # numbers in a row that are not measured values
ENTRIES = records.table_of(
    {
        "id": records.text,
        "step": records.step,
        "folders?": records.table_of(records.step),
        "uploaded?": records.step,
    }
)


# -- the option --track


class Tracker(NamedTuple):
    """A value of the option --track."""

    name: str
    project: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.project}" if self.project else self.name


def parse_trackers(texts: Iterable[str]) -> list[Tracker]:
    """Parse the values of --track. Raise UsageError if a tracker is unknown or not installed."""
    trackers: list[Tracker] = []
    for text in texts:
        tracker = parse_tracker(text)
        if tracker.name in [other.name for other in trackers]:
            raise UsageError(f"got --track {tracker.name} twice; give each tracker once")
        trackers.append(tracker)
    return trackers


def parse_tracker(text: str) -> Tracker:
    name, colon, project = text.partition(":")
    got = f"got --track {shown(text, 80)}"
    if name not in WRITERS:
        allowed = "tensorboard, wandb[:PROJECT] or trackio[:PROJECT]"
        raise UsageError(f"{got}{nearest(name, WRITERS)}; allowed: {allowed}")
    if colon and name == "tensorboard":
        raise UsageError(f"{got}, but tensorboard has no projects; use --track tensorboard")
    if colon:
        check_project(project, got, "leave out the colon and the project")
    if find_spec(name) is None:
        fix = "install it with pip install 'mainrun[trackers]', or leave out --track"
        raise UsageError(f"{got}, but the package {name} is not installed; {fix}")
    if name == "wandb":
        check_wandb_mode()
    if name == "tensorboard":
        return Tracker(name)
    if not colon:
        project = default_project(name)
        check_project(project, f"got WANDB_PROJECT={shown(project, 80)}", "use --track wandb:PROJECT")
    return Tracker(name, project)


def check_project(project: str, got: str, other_fix: str) -> None:
    """Raise UsageError if the name of a project is invalid."""
    if PROJECT_NAME.fullmatch(project):
        return
    allowed = "at most 128 letters, digits, blanks and the characters . _ -, and start with no blank or sign"
    raise UsageError(f"{got}; a project must have {allowed}, or {other_fix}")


def check_wandb_mode() -> None:
    """Raise UsageError if WANDB_MODE is set to an unknown mode."""
    mode = os.environ.get("WANDB_MODE")
    if mode is not None and mode not in WANDB_MODES:
        allowed = ", ".join(WANDB_MODES)
        raise UsageError(
            f"got WANDB_MODE={shown(mode, 80)}; allowed: {allowed}; set one of them, or unset WANDB_MODE"
        )


# -- names


def values_of(row: Row) -> dict[str, float]:
    """Return the values of a row of metrics.jsonl under the names that trackers show."""
    group = row.get("split", "train")
    values = numbers(group, row)
    values |= numbers("aux", row.get("aux", {}))
    values |= numbers("grad_norm", row.get("grad_norms", {}))
    for router in row.get("routers", []):
        layer = f"layer_{router['layer']}"
        path = f"router/{layer}" if group == "train" else f"{group}/router/{layer}"
        statistics = {name: value for name, value in router.items() if name != "layer"}
        values |= numbers(path, statistics)
    return values


def numbers(group: str, row: Row) -> dict[str, float]:
    values = {}
    for name, value in row.items():
        if type(value) in (int, float) and name not in NOT_MEASURED:
            values[f"{group}/{name}"] = float(value)
    return values


def points_of(rows: Iterable[Row]) -> list[Point]:
    """Combine the rows of each step."""
    points: list[Point] = []
    for row in rows:
        if not points or points[-1].step != row["step"]:
            points.append(Point(row["step"], {}))
        points[-1].values.update(values_of(row))
    return points


# -- tracking


class OpenTracker(NamedTuple):
    """An open tracker."""

    tracker: Tracker
    writer: Writer
    memory: dict[str, Any]  # the entry in trackers.json


class Tracking(Progress):
    """A progress display that also sends all rows to trackers. Only the leader process uses this class.

    A step is sent after all of its rows have arrived, because most trackers cannot add values to a step
    later. A step is complete when a row of a later step arrives, or when the run has saved the step.
    """

    def __init__(
        self, display: Progress, trackers: Sequence[Tracker], path: Path, fresh: bool = False
    ) -> None:
        """path: the run directory.

        fresh: whether the run starts over, so that the trackers start new runs.
        """
        self.display = display
        self.trackers = list(trackers)
        self.path = path
        self.open_trackers: list[OpenTracker] = []
        self.memory = {} if fresh else load_memory(path)
        self.complete: list[Point] = []  # steps that are ready to be sent
        self.pending: Point | None = None  # a step that may get more rows
        self.last_delivery = 0.0
        self.unwritable = False  # whether a failure to write trackers.json has been reported
        self.ended = False  # whether the run trains no more steps in this process

    # -- the methods of a progress display

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[Row] = ()) -> None:
        self.display.start(cfg, table, earlier)
        self.open(cfg, earlier)

    def open(self, cfg: TrainConfig, earlier: Sequence[Row]) -> None:
        """Open all trackers, and send the earlier rows that the trackers do not have.

        If the run has ended, a tracker that has all rows is not opened.
        """
        points = points_of(earlier)
        for tracker in self.trackers:
            self._open(tracker, cfg, points)
        self._remember()
        self.last_delivery = time.perf_counter()

    def send_finished(self, cfg: TrainConfig, rows: Sequence[Row]) -> None:
        """Send the rows of a finished run that the trackers do not have."""
        self.ended = True
        self.open(cfg, rows)
        self.close()

    def step(self, row: Row) -> None:
        self._add(row)
        self.display.step(row)

    def eval(self, row: Row) -> None:
        self._add(row)
        self.display.eval(row)

    def copied(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._add(row)
        self.display.copied(rows)

    def saved(self, step: int) -> None:
        if self.pending and self.pending.step <= step:
            self.complete.append(self.pending)
            self.pending = None
        self._deliver()
        self.display.saved(step)

    def note(self, text: str) -> None:
        self.display.note(text)

    def close(self) -> None:
        self.display.close()
        self.ended = True
        self._deliver()
        for open_tracker in self.open_trackers:
            self._attempt(open_tracker, open_tracker.writer.close)
        if self.open_trackers:
            self._remember()
        self.open_trackers = []

    # -- sending

    def _open(self, tracker: Tracker, cfg: TrainConfig, points: Sequence[Point]) -> None:
        """Open a tracker, and send the earlier steps that it does not have."""
        name = cfg.run_id
        entry = self.memory.setdefault(str(tracker), {"id": f"{name}-{uuid.uuid4().hex[:8]}", "step": 0})
        self._remember()
        target = Target(self.path, name, entry["id"], tracker.project, cfg.model_dump(mode="json"), entry)
        open_tracker = OpenTracker(tracker, WRITERS[tracker.name](target), entry)
        self.open_trackers.append(open_tracker)
        last = points[-1].step if points else 0

        def send_missing() -> None:
            if self.ended and open_tracker.writer.last_step(last) >= last:
                entry["step"] = last
                return
            entry["step"] = open_tracker.writer.open(last)
            missing = [point for point in points if point.step > entry["step"]]
            send(open_tracker, missing)

        self._attempt(open_tracker, send_missing)

    def _add(self, row: Row) -> None:
        if self.pending and self.pending.step != row["step"]:
            self.complete.append(self.pending)
            self.pending = None
        if self.pending is None:
            self.pending = Point(row["step"], {})
        self.pending.values.update(values_of(row))
        if time.perf_counter() >= self.last_delivery + SEND_SECONDS:
            self._deliver()

    def _deliver(self) -> None:
        """Send all complete steps."""
        points = self.complete
        self.complete = []
        if points and self.open_trackers:
            for open_tracker in list(self.open_trackers):
                # a tracker may already have steps that are trained again after a kill
                missing = [point for point in points if point.step > open_tracker.memory["step"]]
                self._attempt(open_tracker, partial(send, open_tracker, missing))
            self._remember()
        self.last_delivery = time.perf_counter()

    def _attempt(self, open_tracker: OpenTracker, action: Callable[[], None]) -> None:
        """Run an action of a tracker. If the action fails, report the failure and stop using the tracker."""
        try:
            action()
        except Exception as e:
            self.open_trackers = [other for other in self.open_trackers if other is not open_tracker]
            with suppress(Exception):
                open_tracker.writer.abandon()
            missed = "the run continues, and the next start sends the steps that are missing"
            if self.ended:
                missed = (
                    "the run is not affected; repeat the command without --fresh to send the missing steps"
                )
            self._report(f"the tracker {open_tracker.tracker} failed: {message(e)}; {missed}")

    def _remember(self) -> None:
        """Write trackers.json."""
        try:
            write_json(self.path / FILE, self.memory)
        except MainrunError as e:
            if not self.unwritable:
                effect = "the run is not affected" if self.ended else "the run continues"
                self._report(f"{e}; {effect}")
            self.unwritable = True

    def _report(self, text: str) -> None:
        """Show a failure, even if the display is quiet."""
        if self.display is not QUIET:
            self.note(text)
            return
        with suppress(OSError):  # training continues even if stderr was closed
            print(text, file=sys.stderr, flush=True)


def send(open_tracker: OpenTracker, points: Sequence[Point]) -> None:
    if points:
        open_tracker.writer.send(points)
        open_tracker.memory["step"] = points[-1].step


def load_memory(path: Path) -> dict[str, dict[str, Any]]:
    """Return the content of trackers.json. Raise RunError if the file is damaged."""
    fix = "remove it, and the trackers start new runs"
    return dict(records.load(path / FILE, ENTRIES, fix) or {})
