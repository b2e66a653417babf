"""Show the progress of a search, as a live table on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from sweeps.trial import TrialState

if TYPE_CHECKING:
    from sweeps.driver import Search

REFRESH_SECONDS = 0.25


class Display:
    """Shows the progress of a search on stderr. If `quiet` is true, nothing is shown."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.search: Search | None = None
        self.live: Any = None  # the live table from Rich, or None if plain lines are printed
        self.start_time = time.monotonic()
        self.last_refresh = 0.0
        self.last_line = ""

    def __enter__(self) -> Display:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def watch(self, search: Search) -> None:
        """Set the search whose progress is shown."""
        self.search = search

    def note(self, text: str) -> None:
        """Print a message above the live table."""
        if self.quiet:
            return
        if self.live:
            self.live.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def refresh(self, force: bool = False) -> None:
        """Show the current state of the search.

        Unless `force` is true, the display is updated at most four times a second.
        """
        if self.quiet or self.search is None:
            return
        now = time.monotonic()
        if not force and now - self.last_refresh < REFRESH_SECONDS:
            return
        self.last_refresh = now
        if self.live:
            self.live.update(self._table(self.search))
            return
        line = status_line(self.search)
        if line != self.last_line:
            self.last_line = line
            print(line, file=sys.stderr, flush=True)

    def _table(self, search: Search) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in ("trial", "state", "rung", "score", "values"):
            table.add_column(heading, no_wrap=True, overflow="ellipsis")
        active = [t for t in search.trials if t.state in (TrialState.RUNNING, TrialState.PAUSED)]
        for trial in [*search.best(3), *active][:12]:
            score = f"{trial.scores[trial.rung]:.4f}" if trial.scores else ""
            rung = f"{trial.rung + 1}/{len(trial.stops)}"
            table.add_row(str(trial.number), trial.state.value, rung, score, describe_values(trial.values))
        return Group(table, status_line(search), self._speed_line(search))

    def _speed_line(self, search: Search) -> str:
        from mainrun.run.progress import clock
        from sweeps.ledger import total

        seconds = time.monotonic() - self.start_time
        tokens = total(search.cost_of(trial) for trial in search.trials).tokens
        remaining = search.remaining_trials()
        speed = tokens / max(seconds, 1e-9)
        text = f"{speed:,.0f} tokens/s, {clock(seconds)} so far, {remaining} trials not started"
        finished = sum(trial.is_finished for trial in search.trials)
        if finished:
            unfinished = remaining + len(search.trials) - finished
            text += f", about {clock(seconds / finished * unfinished)} left"
        return text


def describe_values(values: dict[str, Any]) -> str:
    """Format the values of a trial as text, such as "lr=0.01, optimizer=sgd"."""
    texts = []
    for name, value in values.items():
        texts.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    return ", ".join(texts) or "the base"


def status_line(search: Search) -> str:
    """Return a line of text with the number of trials in each state and the best trial so far."""
    counts = Counter(trial.state for trial in search.trials)
    queued = counts[TrialState.RUNNING] - search.engine.workers
    if queued > 0:  # some trials wait for a free worker
        counts[TrialState.RUNNING] = search.engine.workers
        counts[TrialState.WAITING] = queued
    order = (
        TrialState.RUNNING,
        TrialState.WAITING,
        TrialState.PAUSED,
        TrialState.DONE,
        TrialState.SHORT,
        TrialState.PRUNED,
        TrialState.DIVERGED,
        TrialState.FAILED,
    )
    states = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    text = f"{len(search.trials)} trials: {states}"
    for trial in search.best():
        text += f"; best {trial.scores[trial.rung]:.4f}, trial {trial.number}"
    return text + search.progress_text()
