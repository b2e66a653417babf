"""Record when the runs of a study were trained.

The file times.jsonl in the folder of the study has one row when a run starts and one when it ends. The times
are for people and dashboards. No decision of a study depends on them, and the file may be deleted.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

FILE = "times.jsonl"


class Span(NamedTuple):
    """The start and the end of a trial, in seconds since 1970."""

    start: float
    end: float


class RunTimes:
    """The times of all runs of a study. Several threads may use an object together."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._lock = threading.Lock()
        self._spans: dict[str, Span] = {}
        for row in self._read():
            self._add(row)

    def _read(self) -> list[dict[str, Any]]:
        """Return the rows of the file without the damaged ones, which a killed driver may leave."""
        rows = []
        with suppress(OSError):
            for line in self.file.read_bytes().splitlines() if self.file.is_file() else ():
                with suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if _is_row(row):
                        rows.append(row)
        return rows

    def started(self, run_id: str) -> None:
        self._append({"run": run_id, "start": time.time()})

    def ended(self, run_id: str) -> None:
        self._append({"run": run_id, "end": time.time()})

    def _append(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._add(row)
            with suppress(OSError), self.file.open("ab") as f:  # without the file, only the times are lost
                f.write(json.dumps(row).encode() + b"\n")

    def _add(self, row: dict[str, Any]) -> None:
        now = row.get("start") or row["end"]
        known = self._spans.get(row["run"], Span(now, now))
        self._spans[row["run"]] = Span(min(known.start, now), max(known.end, now))

    def span(self, run_ids: list[str]) -> Span | None:
        """Return the time from the first start to the last end of some runs, or None if none is known."""
        with self._lock:
            known = [self._spans[run_id] for run_id in run_ids if run_id in self._spans]
        if not known:
            return None
        return Span(min(span.start for span in known), max(span.end for span in known))


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("run"), str):
        return False
    seconds = row.get("start") or row.get("end")
    return isinstance(seconds, int | float) and 0 < seconds < 1e11


def file_span(summary: Path) -> Span | None:
    """Return the span of a run without recorded times: it ends when its summary was written."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        end = summary.stat().st_mtime
        return Span(end - float(json.loads(summary.read_bytes())["seconds"]), end)
    return None
