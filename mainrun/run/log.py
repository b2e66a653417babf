"""Write the log of a run: the rows of metrics.jsonl, and messages for the user."""

from __future__ import annotations

from typing import Any

from mainrun.run.progress import Progress
from mainrun.store.rundir import RowLog, RunDir

Row = dict[str, Any]


class RunLog:
    """The log of a run. Only the leader process uses this class."""

    def __init__(self, run: RunDir, progress: Progress) -> None:
        self.metrics: RowLog | None = run.log("metrics.jsonl")
        self.progress = progress
        self._run = run

    def step(self, row: Row, steps: int) -> None:
        """Log a training step of a run that has `steps` steps in total."""
        assert self.metrics is not None
        self.metrics.append(row)
        self.progress.step(row | {"steps": steps})

    def eval(self, row: Row, steps: int) -> None:
        """Log the scores of one split."""
        assert self.metrics is not None
        self.metrics.append(row)
        self.progress.eval(row | {"steps": steps})

    def note(self, text: str) -> None:
        self.progress.note(text)

    def rows(self) -> list[Row]:
        """Return all rows that metrics.jsonl contains so far."""
        return self._run.metrics()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()


class NullLog:
    """A log that discards everything. All processes except the leader use this class."""

    metrics: RowLog | None = None

    def step(self, row: Row, steps: int) -> None: ...

    def eval(self, row: Row, steps: int) -> None: ...

    def note(self, text: str) -> None: ...

    def rows(self) -> list[Row]:
        return []

    def close(self) -> None: ...
