"""Write to TensorBoard, Weights & Biases and trackio.

Each class writes one run to one tracker. A writer that opens a tracker returns the last step that the tracker
already has, so that `mainrun.run.tracking` sends only later steps. Each writer reads this step from the
tracker itself, because a killed process may have sent steps that it could not record in trackers.json.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from mainrun.errors import MainrunError

WANDB_MODES = ("online", "offline", "disabled", "shared")
PROJECT = "mainrun"  # the project of runs whose option --track names no project
LOGIN_SECONDS = 15.0  # the maximum time that a run waits for the W&B server when it starts
UPLOAD_SECONDS = 60.0  # the maximum time that a run waits for uploads to W&B when it ends

EVENT_FILES = "events.out.tfevents.{}.mainrun"  # TensorBoard reads the files of a folder in order of name
RECORD_HEADER = struct.Struct("<QI")  # the size of a record, and the checksum of the size
RECORD_FOOTER = 4  # the size of the checksum after a record, in bytes


class Point(NamedTuple):
    """All values of one step."""

    step: int
    values: dict[str, float]


class Target(NamedTuple):
    """The run that a writer sends."""

    path: Path  # the run directory
    name: str  # the id of the run
    tracker_id: str  # a unique id: runs in two folders can have the same name
    project: str
    config: dict[str, Any]
    memory: dict[str, Any]  # the tracker's entry in trackers.json, which the writer may extend


class Writer(Protocol):
    def open(self, last: int) -> int:
        """Open the tracker, and return the last step that it contains.

        last: the last step in metrics.jsonl. A tracker may contain later steps of a killed process.
        """

    def last_step(self, last: int) -> int:
        """Return the last step that the tracker contains, without opening the tracker.

        last: as in `open`.
        """

    def send(self, points: Sequence[Point]) -> None:
        """Send the values of steps in ascending order."""

    def close(self) -> None:
        """Wait until everything is written, and close the tracker, which may not have been opened."""

    def abandon(self) -> None:
        """Release all resources after a failure, without waiting."""


class Unusable(MainrunError):
    """A tracker cannot be used."""


# -- TensorBoard


class TensorBoard:
    """Write event files to the folder `tensorboard` of the run.

    Each session writes one file. The classes of torch and TensorBoard that write event files start a thread
    and may import TensorFlow, so this class writes the records itself.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.folder = target.path / "tensorboard"
        self.file: IO[bytes] | None = None

    def open(self, last: int) -> int:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(exist_ok=True)
        sent = self.last_step(last)
        self.file = self._path(len(self._files()) + 1).open("xb")
        self.records = RecordWriter(self.file)
        self._write(Event(file_version="brain.Event:2"))
        # A TensorBoard that is running has already read the events that were cut. This event removes them.
        self._write(Event(step=sent + 1, session_log=SessionLog(status=SessionLog.START)))
        config = {name: flat(value) for name, value in self.target.config.items()}
        self._write(Event(summary=hparams_pb(config, trial_id=self.target.tracker_id)))
        self.file.flush()
        return sent

    def last_step(self, last: int) -> int:
        sent = 0
        for path in self._files():
            sent = max(sent, cut_events(path, last))
        return sent

    def _files(self) -> list[Path]:
        """Return the event files of earlier sessions."""
        return sorted(self.folder.glob(EVENT_FILES.format("*")))

    def _path(self, session: int) -> Path:
        return self.folder / EVENT_FILES.format(f"{session:06}")

    def send(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self.file is not None
        for point in points:
            summary = Summary()
            for name, value in point.values.items():
                summary.value.add(tag=name, simple_value=value)
            self._write(Event(step=point.step, summary=summary))
        self.file.flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        if self.file:
            self.file.close()

    def abandon(self) -> None:
        self.close()


def cut_events(path: Path, last: int) -> int:
    """Remove the events after a step from an event file, and return the last step that remains.

    A record that a killed process has not completed is removed too.
    """
    sent = 0
    with path.open("r+b") as file:
        while True:
            start = file.tell()
            event = read_event(file)
            if event is None or event.step > last:
                file.truncate(start)
                return sent
            if event.HasField("summary"):
                sent = event.step


def read_event(file: IO[bytes]) -> Any:
    """Read one event of an event file. Return None at the end of the file or of its complete part."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    header = file.read(RECORD_HEADER.size)
    if len(header) < RECORD_HEADER.size:
        return None
    size, checksum = RECORD_HEADER.unpack(header)
    if masked_crc32c(header[:8]) != checksum:
        return None
    body = file.read(size)
    footer = file.read(RECORD_FOOTER)
    if len(body) < size or len(footer) < RECORD_FOOTER:
        return None
    try:
        return Event.FromString(body)
    except DecodeError:
        return None


def flat(value: Any) -> bool | float | str:
    """Return a value that TensorBoard can show. Lists, tables and missing values become text."""
    if isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value)


# -- Weights & Biases


class Wandb:
    """Write to Weights & Biases, online or offline (WANDB_MODE=offline).

    Online, the server knows the last step. Offline, each session writes one folder below `wandb`. Another
    process writes the folder and loses its last values if it is killed, so only the folders of sessions that
    ended properly are kept. trackers.json lists these folders, and the last step that was uploaded.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.run: Any = None
        self.sent = 0

    def open(self, last: int) -> int:
        import wandb

        self._set_up()
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            symlink=False,
            init_timeout=LOGIN_SECONDS,
            finish_timeout=UPLOAD_SECONDS,
            finish_timeout_raises=True,
            # collect nothing about this machine
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self.run = wandb.init(
            project=self.target.project,
            name=self.target.name,
            id=self.target.tracker_id,
            resume="allow",
            dir=str(self.target.path),
            config=self.target.config,
            settings=settings,
        )
        if self.run.disabled:
            raise Unusable("WANDB_MODE is 'disabled'; set it to online or offline, or leave out --track")
        if self.run.offline:
            folders = self.target.memory.setdefault("folders", {})
            self._remove_unfinished(folders)
            self.sent = max(folders.values(), default=0)
        else:
            self.sent = max(self.run.starting_step - 1, 0)
        return self.sent

    def last_step(self, last: int) -> int:
        mode = self._set_up().settings.mode
        if mode == "offline":
            return max(self.target.memory.get("folders", {}).values(), default=0)
        if mode == "disabled":
            return 0
        return int(self.target.memory.get("uploaded", 0))

    def _set_up(self) -> Any:
        """Load the settings of wandb, and start the process that uploads the metrics."""
        import wandb

        # without `silent`, wandb would ask for a key on a terminal, and print to stderr
        quiet = wandb.Settings(silent=True)
        return wandb.setup(settings=quiet)

    def _remove_unfinished(self, finished: dict[str, int]) -> None:
        """Remove the folders of killed sessions. Their steps are sent again."""
        current = Path(self.run.settings.sync_dir)
        # wandb adds a number to the name if two sessions start in the same second
        for folder in current.parent.glob(f"offline-run-*-{self.target.tracker_id}*"):
            if folder.name in finished or folder.name == current.name:
                continue
            for file in folder.glob("*.wandb"):
                file.unlink()
            # the process that wrote the folder may still be writing its own logs
            shutil.rmtree(folder, ignore_errors=True)

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log(point.values, step=point.step, commit=True)
            self.sent = point.step

    def close(self) -> None:
        import wandb

        if self.run:
            self.run.finish()
            self._remember_sent()
        wandb.teardown()

    def _remember_sent(self) -> None:
        """Record in trackers.json what a session has sent that ended properly."""
        memory = self.target.memory
        if not self.run.offline:
            memory["uploaded"] = self.sent
            return
        folder = Path(self.run.settings.sync_dir).name
        memory["folders"][folder] = self.sent

    def abandon(self) -> None:
        import wandb

        wandb.teardown(exit_code=1)


# -- trackio


class Trackio:
    """Write to the local database of trackio, which `trackio show` displays.

    `trackio.init` would ask the Hugging Face Hub for the user's name, start a thread, and hide errors. This
    class therefore writes to trackio's database directly, as `trackio.import_csv` does.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.config: dict[str, Any] | None = target.config  # None: the database contains the config

    def open(self, last: int) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.init_db(self.target.project)
        return self.last_step(last)

    def last_step(self, last: int) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        target = self.target
        sent = SQLiteStorage.get_max_step_for_run(target.project, target.name, run_id=target.tracker_id)
        return sent or 0

    def send(self, points: Sequence[Point]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        target = self.target
        SQLiteStorage.bulk_log(
            project=target.project,
            run=target.name,
            run_id=target.tracker_id,
            metrics_list=[point.values for point in points],
            steps=[point.step for point in points],
            log_ids=[f"{target.tracker_id}-{point.step}" for point in points],  # the database refuses doubles
            config=self.config,
        )
        self.config = None

    def close(self) -> None: ...

    def abandon(self) -> None: ...


WRITERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def default_project(tracker: str) -> str:
    """Return the project of runs whose option --track names no project."""
    if tracker == "wandb":
        return os.environ.get("WANDB_PROJECT") or PROJECT
    return PROJECT


def without_secrets(text: str) -> str:
    """Replace the values of environment variables that contain a key or a token."""
    for name, value in os.environ.items():
        if len(value) >= 8 and name.endswith(("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")):
            text = text.replace(value, f"[{name}]")
    return text


def message(error: Exception) -> str:
    """Return the first line of an error, without secrets."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    with suppress(UnicodeError):
        text = without_secrets(text)
    return text
