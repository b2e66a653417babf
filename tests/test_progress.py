"""What a person sees of a run: on stderr, one line wide, cheap, and nothing at all when quiet."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mainrun.config import TrainConfig
from mainrun.run import progress
from mainrun.run.progress import Bar, Lines, Progress, clock, make_progress, percent, short

TABLE = {"steps": 200, "tokens_per_step": 8192}


def step(n: int, loss: float = 5.0) -> dict[str, Any]:
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


def scored(n: int, full: float = 1.5, split: str = "val") -> dict[str, Any]:
    row = {"event": "eval", "step": n, "split": split, "loss": 5.0, "official": full - 0.1, "full": full}
    return row | {"bits_per_byte": 2.0, "coverage": 0.78, "seconds": 0.1, "steps": 200}


def bar(width: int = 100) -> tuple[Bar, io.StringIO]:
    screen = io.StringIO()
    return Bar(
        Console(
            file=screen, force_terminal=True, width=width, height=20, color_system=None, legacy_windows=False
        )
    ), screen


def drawn(it: Bar) -> list[str]:
    """The bar as it would be drawn now, as plain lines."""
    out = io.StringIO()
    Console(file=out, width=it.console.width, color_system=None).print(it.line(), end="")
    return out.getvalue().splitlines()


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_lines_elsewhere_nothing_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Tty())
    assert type(make_progress()) is Bar
    assert type(make_progress(quiet=True)) is Progress
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_progress()) is Lines
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert type(make_progress()) is Lines


def test_one_plain_line_an_evaluation_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    it = Lines()
    it.start(TrainConfig(), TABLE)
    for n in range(1, 21):
        it.step(step(n))
    it.eval(scored(20, 1.5))
    it.eval(scored(40, 1.6))
    it.close()
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


def test_the_best_is_of_dev_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    it = Lines()
    it.start(TrainConfig(dev_frac=0.05), TABLE)
    it.eval(scored(20, 1.4, "val"))
    it.eval(scored(20, 1.7, "dev"))
    assert it.best == 1.7


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    drive(make_progress(quiet=True))
    assert capsys.readouterr() == ("", "")


def drive(it: Progress) -> None:
    it.note("before the start")
    it.start(TrainConfig(), TABLE)
    it.eval(scored(1, 3.0))  # log_every may put an evaluation before the first step row
    for n in range(1, 201):
        it.step(step(n, 6 - n / 100))
        if n % 50 == 0:
            it.eval(scored(n, 2 - n / 1000))
    it.note("in the middle [not markup] {or format}")
    it.close()
    it.close()


def test_the_bar_shows_step_loss_best_rate_eta() -> None:
    it, screen = bar()
    drive(it)
    last = screen.getvalue().splitlines()[-2]  # below it is only the cursor, shown again
    assert all(word in last for word in ("step 200/200", "loss 4.0000", "best 1.8000", "tok/s", "ETA 0:00"))
    assert "in the middle [not markup] {or format}" in screen.getvalue()


@given(st.integers(1, 250), st.integers(1, 10**9), st.floats(0, 1e6))
@settings(max_examples=60)
def test_the_bar_is_one_line_on_any_terminal(width: int, steps: int, loss: float) -> None:
    it, _ = bar(width)
    Lines.start(it, TrainConfig(), {"steps": steps, "tokens_per_step": 8192})
    it.step(step(steps, loss))
    it.eval(scored(steps))
    it.rate = 0.001
    lines = drawn(it)
    assert len(lines) == 1
    assert len(lines[0]) <= width
    if width > 30 and steps < 10**6:
        assert f"step {steps}/{steps}" in lines[0]


def test_a_wide_terminal_gets_everything_and_a_narrow_one_the_dearest() -> None:
    it, _ = bar(120)
    Lines.start(it, TrainConfig(), TABLE)
    it.step(step(100))
    it.eval(scored(100))
    it.rate = 1.0
    assert "tok/s" in drawn(it)[0]
    assert "━" in drawn(it)[0]
    it.console.width = 30
    (line,) = drawn(it)
    assert "step 100/200" in line
    assert "loss" in line
    assert "tok/s" not in line
    assert "━" not in line


def test_drawing_is_rare_and_takes_at_most_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """However dear one drawing is, the next one waits for 100 times that."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    it, _ = bar()
    drawings: list[float] = []

    def draw_slowly() -> str:
        drawings.append(now[0])
        now[0] += 0.01
        return ""

    it.line = draw_slowly  # type: ignore[method-assign, assignment]
    it.start(TrainConfig(), TABLE)
    for n in range(1, 200):
        now[0] += 0.05
        it.step(step(n))
    it.close()
    assert len(drawings) <= 2 + now[0]  # 10 ms a drawing: one a second
    assert len(drawings) * 0.01 <= 0.011 * now[0] + 0.02
    assert len(drawings) > 5


@pytest.mark.parametrize("make", [Lines, lambda: bar()[0]])
def test_a_step_costs_next_to_nothing(make: Callable[[], Lines], capsys: pytest.CaptureFixture[str]) -> None:
    """A step of the smallest real preset takes 100 ms or more; its row may cost 1% of that at the very most."""
    it = make()
    it.start(TrainConfig(), {"steps": 10**6, "tokens_per_step": 8192})
    row = step(1)
    begin = time.perf_counter()
    for n in range(1, 2001):
        it.step(row | {"step": n})
    cost = (time.perf_counter() - begin) / 2000
    it.close()
    assert cost < 0.001


SHOW = """
import json, sys
from mainrun import progress
from mainrun.config import TrainConfig
it = progress.Bar(__import__("rich.console").console.Console(stderr=True, force_terminal=True, width=100))
it.start(TrainConfig(), {"steps": 3, "tokens_per_step": 8})
it.step(json.loads(sys.argv[1]))
it.eval(json.loads(sys.argv[2]))
it.close()
"""


@pytest.mark.parametrize("no_color", ["1", ""])
def test_no_color_is_honoured(no_color: str) -> None:
    env = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(step(3)), json.dumps(scored(3))],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0
    assert done.stdout == ""
    colours = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])(?:;\d+)*m", done.stderr)
    assert bool(colours) is (no_color == "")


def test_importing_it_is_light() -> None:
    code = "import sys, mainrun.run.progress; print(sorted({'rich', 'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
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


def test_the_base_has_every_call_that_the_trainer_makes() -> None:
    assert {"start", "step", "eval", "note", "close"} <= {
        n for n in vars(progress.Progress) if not n.startswith("_")
    }


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.57, "57%"), (0.97, "97%"), (0.96999, "96%"), (1.0, "100%")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_after_a_resume_it_stands_where_the_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    it, screen = bar()
    it.start(TrainConfig(), TABLE, [step(1), step(120), scored(120)])
    assert "step 120/200" in screen.getvalue()
    it.next_draw = float("inf")  # no drawing falls due any more
    it.step(step(131))
    it.close()
    assert "step 131/200" in screen.getvalue(), "what stays on the screen is the last step"


class Gone(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_reader_who_left_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone(BrokenPipeError()))
    drive(Lines())
    drive(Bar(Console(file=Gone(OSError(errno.EIO, "terminal gone")), force_terminal=True, width=100)))
