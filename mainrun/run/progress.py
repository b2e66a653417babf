"""Show the progress of a run on stderr. A terminal shows a bar. Other outputs get one line per evaluation.

The progress display reads log rows and does not affect the training.
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

Row = dict[str, Any]  # a row of metrics.jsonl

REFRESH_SECONDS = 0.2  # the minimum time between two updates of the progress bar
REFRESH_SHARE = 0.01  # the maximum share of the run time that is spent on drawing the bar
BAR_WIDTH = 40  # the maximum width of the bar in columns
MIN_BAR_WIDTH = 8


class Progress:
    """The interface of a progress display. This base class shows nothing."""

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[Row] = ()) -> None:
        """Show that a run starts or resumes.

        table: the result of `Plan.table`.

        earlier: the rows that earlier sessions wrote to metrics.jsonl.
        """

    def step(self, row: Row) -> None:
        """Show the progress after a training step, which a "step" row of metrics.jsonl describes."""

    def eval(self, row: Row) -> None:
        """Show the scores of an evaluation, which an "eval" row of metrics.jsonl contains."""

    def copied(self, rows: Sequence[Row]) -> None:
        """Take note of rows of metrics.jsonl that were copied from the store during the run."""

    def saved(self, step: int) -> None:
        """Take note that the run has saved a step, which therefore gets no more rows."""

    def note(self, text: str) -> None:
        """Show a message, for example that a damaged checkpoint was skipped."""

    def close(self) -> None:
        """Close the display after the run has succeeded or failed. This method may be called twice."""


QUIET = Progress()


class LineProgress(Progress):
    """Print one line per evaluation."""

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[Row] = ()) -> None:
        self.total_steps = int(table["steps"])
        self.tokens_per_step = int(table["tokens_per_step"])
        self.split = "dev" if cfg.dev_frac else "val"  # the split whose best score is shown
        scores = [row["full"] for row in earlier if row.get("split") == self.split]
        self.best: float | None = min(scores, default=None)
        self.current_step = max((row["step"] for row in earlier), default=0)
        self.loss = ""
        self.first_step: tuple[int, float] | None = None  # the first step of this process, and its time
        self.rate = 0.0  # steps per second since the first step, including evaluations
        self.note(f"{cfg.run_id}: {self.total_steps:,} steps of {self.tokens_per_step:,} tokens")

    def step(self, row: Row) -> None:
        now = time.perf_counter()
        self.current_step = row["step"]
        self.loss = f"loss {row['loss']:.4f}"
        if self.first_step is None:
            self.first_step = (row["step"], now)
            return
        first, start = self.first_step
        if now > start:
            self.rate = (row["step"] - first) / (now - start)

    def eval(self, row: Row) -> None:
        self.current_step = row["step"]
        if row["split"] == self.split and (self.best is None or row["full"] < self.best):
            self.best = row["full"]
        self.show_eval(row)

    def show_eval(self, row: Row) -> None:
        parts = [
            f"step {row['step']}/{self.total_steps}",
            f"{row['split']} full {row['full']:.4f}",
            f"official {row['official']:.4f} ({percent(row['coverage'])} covered)",
            *self.alone(row),
            *self.best_and_speed(),
        ]
        self.note("  ".join(parts))

    def alone(self, row: Row) -> list[str]:
        """Return the full score of the model without the n-gram model, if there is one."""
        return [f"without n-gram model {row['alone']:.4f}"] if "alone" in row else []

    def best_and_speed(self) -> list[str]:
        """Return the best score, the ETA and the speed. Unknown values are left out."""
        parts = []
        if self.best is not None:
            parts.append(f"best {self.best:.4f}")
        if self.rate:
            seconds_left = (self.total_steps - self.current_step) / self.rate
            parts.append(f"ETA {clock(seconds_left)}")
            parts.append(f"{short(self.rate * self.tokens_per_step)} tok/s")
        return parts

    def note(self, text: str) -> None:
        with suppress(OSError):  # training continues even if stderr was closed
            print(text, file=sys.stderr, flush=True)


class BarProgress(LineProgress):
    """Draw a progress bar.

    The training thread draws the bar, but only rarely, so that drawing does not slow down the training.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self.console = console
        self.live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.next_draw = 0.0

    def start(self, cfg: TrainConfig, table: dict[str, Any], earlier: Sequence[Row] = ()) -> None:
        super().start(cfg, table, earlier)
        with suppress(OSError):
            self.live.start()
        self.draw()
        self.next_draw = 0.0  # ignore the cost of the first drawing, which imports modules

    def step(self, row: Row) -> None:
        super().step(row)
        if time.perf_counter() >= self.next_draw or row["step"] == self.total_steps:
            self.draw()

    def show_eval(self, row: Row) -> None:
        self.draw()

    def draw(self) -> None:
        start = time.thread_time()  # other processes do not affect the CPU time of this thread
        with suppress(OSError):  # drawing fails if the terminal was closed
            self.live.update(self.line(), refresh=True)
        cost = time.thread_time() - start
        self.next_draw = time.perf_counter() + max(REFRESH_SECONDS, cost / REFRESH_SHARE)

    def line(self) -> RenderableType:
        """Return a line of text that fits into the terminal, and a bar that fills the remaining width."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        width = self.console.width
        parts = [f"step {self.current_step}/{self.total_steps}"]
        if self.loss:
            parts.append(self.loss)
        parts += self.best_and_speed()
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        text = "  ".join(parts)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True, overflow="crop")
        bar_width = min(BAR_WIDTH, width - len(text) - 3)
        if bar_width < MIN_BAR_WIDTH:
            line.add_row(text)
        else:
            bar = ProgressBar(total=self.total_steps, completed=self.current_step, width=bar_width)
            line.add_row(text, bar)
        return line

    def note(self, text: str) -> None:
        with suppress(OSError):
            self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.live.is_started:
            self.draw()  # draw the final state, which stays on the screen
            with suppress(OSError):
                self.live.stop()


def make_progress(quiet: bool = False) -> Progress:
    """Return a progress bar if stderr is a terminal. Otherwise return a display that prints lines."""
    if quiet:
        return QUIET
    if sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb", "unknown"):
        from rich.console import Console

        return BarProgress(Console(stderr=True, highlight=False))
    return LineProgress()


def clock(seconds: float) -> str:
    """Format a duration, for example as 1:05, 2:03:00 or 3d 04:00:00."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    if hours:
        return f"{h}:{m:02}:{s:02}"
    return f"{m}:{s:02}"


def percent(share: float) -> str:
    """Format a fraction as a percentage, rounded down. For example, 0.9698 becomes 96%, not 97%."""
    return f"{int(100 * share + 1e-9)}%"


def short(number: float) -> str:
    """Format a number in a short form, for example as 950, 12.3k or 27.2M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
