"""What a person sees while a run trains: one bar on a terminal, one plain line an evaluation elsewhere.

All of it goes to stderr. Nothing in here touches the training: rows come in, text goes out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from mainrun.config import TrainConfig

REFRESH_SECONDS = 0.2  # between two drawings of the bar ...
REFRESH_SHARE = 0.01  # ... or longer, so that drawing takes at most this share of the time


def make_progress(quiet: bool = False) -> Progress:
    """The right one for where stderr goes."""
    if quiet:
        return QUIET
    if sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown"):
        from rich.console import Console

        return Bar(Console(stderr=True, highlight=False))
    return Lines()


class Progress:
    """The five calls that a run makes. This one shows nothing."""

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()) -> None:
        """A run begins or goes on; table is the plan's resolved table, earlier the rows of metrics.jsonl so far."""

    def step(self, row: dict[str, Any]) -> None:
        """One "step" row of metrics.jsonl."""

    def eval(self, row: dict[str, Any]) -> None:
        """One "eval" row of metrics.jsonl."""

    def note(self, text: str) -> None:
        """A sentence worth reading: resumed from where, a damaged checkpoint skipped."""

    def close(self) -> None:
        """The run ended, well or not. May be called twice."""


QUIET = Progress()


class Lines(Progress):
    """One plain line an evaluation, for logs."""

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()) -> None:
        self.run_id, self.steps = cfg.run_id, int(table["steps"])
        self.tokens_per_step = int(table["tokens_per_step"])
        self.ranked = "dev" if cfg.dev_frac else "val"  # the split whose best is shown: a search looks at dev
        self.best: float | None = min(
            (row["full"] for row in earlier if row.get("split") == self.ranked), default=None
        )
        self.first: tuple[int, float] | None = None
        self.rate = 0.0  # steps a second since this process trains, evaluations included
        self.at, self.loss = max((row["step"] for row in earlier), default=0), ""
        self.note(f"{cfg.run_id}: {self.steps:,} steps of {self.tokens_per_step:,} tokens")

    def step(self, row: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.at, self.loss = row["step"], f"loss {row['loss']:.4f}"
        if self.first is None:
            self.first = (row["step"], now)
        elif now > self.first[1]:
            self.rate = (row["step"] - self.first[0]) / (now - self.first[1])

    def eval(self, row: dict[str, Any]) -> None:
        self.at = row["step"]
        if row["split"] == self.ranked and (self.best is None or row["full"] < self.best):
            self.best = row["full"]
        self.show_eval(row)

    def show_eval(self, row: dict[str, Any]) -> None:
        official = f"official {row['official']:.4f} ({percent(row['coverage'])} covered)"
        parts = [
            f"step {row['step']}/{self.steps}",
            f"{row['split']} full {row['full']:.4f}",
            official,
            self.show_best(),
            *self.speed(),
        ]
        self.note("  ".join(p for p in parts if p))

    def show_best(self) -> str:
        return "" if self.best is None else f"best {self.best:.4f}"

    def speed(self) -> list[str]:
        if not self.rate:
            return []
        left = (self.steps - self.at) / self.rate
        return [f"ETA {clock(left)}", f"{short(self.rate * self.tokens_per_step)} tok/s"]

    def note(self, text: str) -> None:
        with suppress(OSError):  # whoever read it has left; the training goes on
            print(text, file=sys.stderr, flush=True)


class Bar(Lines):
    """One bar. It is drawn from the training's own thread, and seldom: the bits and the speed stay as they are."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self.console, self.live = (
            console,
            Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False),
        )
        self.next_draw = 0.0

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()) -> None:
        super().start(cfg, table, earlier)
        with suppress(OSError):
            self.live.start()
        self.draw()
        self.next_draw = (
            0.0  # the first drawing imports what it needs: its cost says nothing about the others
        )

    def step(self, row: dict[str, Any]) -> None:
        super().step(row)
        if time.perf_counter() >= self.next_draw or row["step"] == self.steps:
            self.draw()

    def show_eval(self, row: dict[str, Any]) -> None:
        self.draw()

    def draw(self) -> None:
        begin = time.thread_time()  # the work of drawing; a wait for a busy machine is none
        with suppress(OSError):  # the terminal is gone
            self.live.update(self.line(), refresh=True)
        cost = time.thread_time() - begin
        self.next_draw = time.perf_counter() + max(REFRESH_SECONDS, cost / REFRESH_SHARE)

    def line(self) -> RenderableType:
        """As many of the parts as the terminal is wide, the dearest first; the bar takes what is left."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        width = self.console.width
        parts = [p for p in (f"step {self.at}/{self.steps}", self.loss, self.show_best(), *self.speed()) if p]
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        text = "  ".join(parts)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True, overflow="crop")
        room = min(40, width - len(text) - 3)
        if room < 8:
            line.add_row(text)
        else:
            line.add_row(text, ProgressBar(total=self.steps, completed=self.at, width=room))
        return line

    def note(self, text: str) -> None:
        with suppress(OSError):
            self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.live.is_started:
            self.draw()  # what stays on the screen is where the run ended
            with suppress(OSError):
                self.live.stop()


def clock(seconds: float) -> str:
    """1:05, 2:03:00, 3d 04:00:00."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def percent(share: float) -> str:
    """Rounded down: 96.98% must not look like the 97% that a rule asks for."""
    return f"{int(100 * share + 1e-9)}%"


def short(number: float) -> str:
    """950, 12.3k, 27.2M: for people; JSON carries the whole figure."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
