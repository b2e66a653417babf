"""Tests the progress display: it writes one line to stderr, costs little time, and is silent if quiet."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mainrun.config import TrainConfig
from mainrun.run import progress
from mainrun.run.progress import BarProgress, LineProgress, Progress, clock, make_progress, percent, short

TABLE = {"steps": 200, "tokens_per_step": 8192}


def step_row(n: int, loss: float = 5.0) -> dict[str, Any]:
    return {
        "event": "step",
        "step": n,
        "tokens": n * 8192,
        "loss": loss,
        "lr": 0.1,
        "grad_norm": 1.0,
        "seconds": 0.1,
        "steps": 200,
    }


def eval_row(n: int, full: float = 1.5, split: str = "val") -> dict[str, Any]:
    row = {"event": "eval", "step": n, "split": split, "loss": 5.0, "official": full - 0.1, "full": full}
    return row | {"bits_per_byte": 2.0, "coverage": 0.78, "seconds": 0.1, "steps": 200}


def bar(width: int = 100) -> tuple[BarProgress, io.StringIO]:
    screen = io.StringIO()
    return BarProgress(
        Console(
            file=screen, force_terminal=True, width=width, height=20, color_system=None, legacy_windows=False
        )
    ), screen


def drawn_lines(display: BarProgress) -> list[str]:
    """Return the progress bar as lines without colours."""
    out = io.StringIO()
    Console(file=out, width=display.console.width, color_system=None).print(display.line(), end="")
    return out.getvalue().splitlines()


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_other_streams_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Tty())
    assert type(make_progress()) is BarProgress
    assert type(make_progress(quiet=True)) is Progress
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_progress()) is LineProgress
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(make_progress()) is LineProgress


def test_each_evaluation_prints_one_plain_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineProgress()
    display.start(TrainConfig(), TABLE)
    for n in range(1, 21):
        display.step(step_row(n))
    display.eval(eval_row(20, 1.5))
    display.eval(eval_row(40, 1.6))
    display.close()
    out, err = capsys.readouterr()
    assert out == ""
    head, first, second = err.splitlines()
    assert "200 steps" in head
    assert TrainConfig().run_id in head
    assert "step 20/200" in first
    assert "full 1.5000" in first
    assert "official 1.4000 (78% covered)" in first
    assert "ETA" in first
    assert "tok/s" in first
    assert "full 1.6000" in second
    assert "best 1.5000" in second
    assert "\x1b" not in err


def test_the_best_score_is_that_of_dev_if_there_is_a_dev_split(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineProgress()
    display.start(TrainConfig(dev_frac=0.05), TABLE)
    display.eval(eval_row(20, 1.4, "val"))
    display.eval(eval_row(20, 1.7, "dev"))
    assert display.best == 1.7


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    drive(make_progress(quiet=True))
    assert capsys.readouterr() == ("", "")


def drive(display: Progress) -> None:
    display.note("before the start")
    display.start(TrainConfig(), TABLE)
    # If log_every > 1, the first evaluation may come before the first step row.
    display.eval(eval_row(1, 3.0))
    for n in range(1, 201):
        display.step(step_row(n, 6 - n / 100))
        if n % 50 == 0:
            display.eval(eval_row(n, 2 - n / 1000))
    display.note("in the middle [not markup] {or format}")
    display.close()
    display.close()


def test_the_bar_shows_step_loss_best_score_eta_and_speed() -> None:
    display, screen = bar()
    drive(display)
    # The last line only contains the code that shows the cursor again.
    last = screen.getvalue().splitlines()[-2]
    assert all(word in last for word in ("step 200/200", "loss 4.0000", "best 1.8000", "tok/s", "ETA 0:00"))
    assert "in the middle [not markup] {or format}" in screen.getvalue()


@given(st.integers(1, 250), st.integers(1, 10**9), st.floats(0, 1e6))
@settings(max_examples=examples(60))
def test_the_bar_is_one_line_on_any_terminal(width: int, steps: int, loss: float) -> None:
    display, _ = bar(width)
    LineProgress.start(display, TrainConfig(), {"steps": steps, "tokens_per_step": 8192})
    display.step(step_row(steps, loss))
    display.eval(eval_row(steps))
    display.rate = 0.001
    lines = drawn_lines(display)
    assert len(lines) == 1
    assert len(lines[0]) <= width
    if width > 30 and steps < 10**6:
        assert f"step {steps}/{steps}" in lines[0]


def test_a_narrow_terminal_gets_only_the_most_important_parts() -> None:
    display, _ = bar(120)
    LineProgress.start(display, TrainConfig(), TABLE)
    display.step(step_row(100))
    display.eval(eval_row(100))
    display.rate = 1.0
    assert "tok/s" in drawn_lines(display)[0]
    assert "━" in drawn_lines(display)[0]
    display.console.width = 30
    (line,) = drawn_lines(display)
    assert "step 100/200" in line
    assert "loss" in line
    assert "tok/s" not in line
    assert "━" not in line


def test_drawing_takes_at_most_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After drawing the bar, the display waits 100 times as long as the drawing took."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    display, _ = bar()
    drawings: list[float] = []

    def draw_slowly() -> str:
        drawings.append(now[0])
        now[0] += 0.01
        return ""

    display.line = draw_slowly  # type: ignore[method-assign, assignment]
    display.start(TrainConfig(), TABLE)
    for n in range(1, 200):
        now[0] += 0.05
        display.step(step_row(n))
    display.close()
    assert len(drawings) <= 2 + now[0]  # after a drawing of 10 ms, the display waits for one second
    assert len(drawings) * 0.01 <= 0.011 * now[0] + 0.02
    assert len(drawings) > 5


@pytest.mark.parametrize("make", [LineProgress, lambda: bar()[0]])
def test_a_step_costs_less_than_a_millisecond(
    make: Callable[[], LineProgress], capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of the smallest preset takes at least 100 ms. Its display may cost at most 1% of that time."""
    display = make()
    display.start(TrainConfig(), {"steps": 10**6, "tokens_per_step": 8192})
    row = step_row(1)
    begin = time.perf_counter()
    for n in range(1, 2001):
        display.step(row | {"step": n})
    cost = (time.perf_counter() - begin) / 2000
    display.close()
    assert cost < 0.001


SHOW = """
import json, sys
from mainrun.run import progress
from mainrun.config import TrainConfig
from rich.console import Console
display = progress.BarProgress(Console(stderr=True, force_terminal=True, width=100))
display.start(TrainConfig(), {"steps": 3, "tokens_per_step": 8})
display.step(json.loads(sys.argv[1]))
display.eval(json.loads(sys.argv[2]))
display.close()
"""


@pytest.mark.parametrize("no_color", ["1", ""])
def test_no_color_removes_the_colours(no_color: str) -> None:
    env = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(step_row(3)), json.dumps(eval_row(3))],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0
    assert done.stdout == ""
    colours = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])(?:;\d+)*m", done.stderr)
    assert bool(colours) is (no_color == "")


def test_the_module_imports_no_slow_library() -> None:
    slow = "{'rich', 'torch', 'numpy', 'pydantic'}"
    code = f"import sys, mainrun.run.progress; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (7380, "2:03:00"), (3 * 86400 + 4 * 3600, "3d 04:00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (12_345, "12.3k"), (27_172_864, "27.2M"), (3e9, "3.0G"), (2e15, "2000.0T")],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


def test_the_base_class_has_every_method_that_a_run_calls() -> None:
    assert {"start", "step", "eval", "note", "close"} <= {
        n for n in vars(progress.Progress) if not n.startswith("_")
    }


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.57, "57%"), (0.97, "97%"), (0.96999, "96%"), (1.0, "100%")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_after_a_resume_the_bar_starts_at_the_step_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    display, screen = bar()
    display.start(TrainConfig(), TABLE, [step_row(1), step_row(120), eval_row(120)])
    assert "step 120/200" in screen.getvalue()
    display.next_draw = float("inf")  # prevent any drawing before close()
    display.step(step_row(131))
    display.close()
    assert "step 131/200" in screen.getvalue(), "close() draws the last step"


class ClosedStream(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_closed_stream_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ClosedStream(BrokenPipeError()))
    drive(LineProgress())
    drive(
        BarProgress(
            Console(file=ClosedStream(OSError(errno.EIO, "terminal gone")), force_terminal=True, width=100)
        )
    )
