"""Tests that a single warning reports steps that wait for busy cores."""

from __future__ import annotations

import pytest

from mainrun.run import slow_steps
from mainrun.run.slow_steps import SlowSteps


class Clocks:
    """A wall clock and a CPU clock that only the test advances."""

    def __init__(self) -> None:
        self.wall = 100.0
        self.processor = 10.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(slow_steps, "time", clocks)
    return clocks


def run(steps: SlowSteps, clocks: Clocks, count: int, wall: float, processor: float) -> list[str]:
    """Run some steps and return the warnings."""
    warnings = []
    for _ in range(count):
        steps.start()
        clocks.wall += wall
        clocks.processor += processor
        warnings.append(steps.check(1))
    return [warning for warning in warnings if warning]


@pytest.mark.parametrize(
    ("processor", "warned"), [(0.5, True), (1.0, True), (1.09, True), (1.11, False), (2.0, False)]
)
def test_steps_that_use_about_one_core_are_slow(clocks: Clocks, processor: float, warned: bool) -> None:
    assert bool(run(SlowSteps(2, "cpu"), clocks, 6, 1.0, processor)) is warned


def test_the_warning_names_the_times_and_the_way_out_once(clocks: Clocks) -> None:
    (warning,) = run(SlowSteps(2, "cpu"), clocks, 40, 0.5, 0.25)
    assert "a step takes 0.5 s, but its 2 threads compute for only 0.25 s in total, " in warning
    assert "because they wait for busy cores" in warning
    assert "--set threads=1" in warning


def test_a_few_seconds_prove_nothing(clocks: Clocks) -> None:
    steps = SlowSteps(2, "cpu")
    assert run(steps, clocks, 9, 0.5, 0.1) == []
    assert len(run(steps, clocks, 1, 0.5, 0.1)) == 1


def test_windows_are_looked_at_one_by_one(clocks: Clocks) -> None:
    steps = SlowSteps(2, "cpu")
    assert run(steps, clocks, 100, 0.5, 1.0) == []
    assert len(run(steps, clocks, 10, 0.5, 0.1)) == 1, "a fast past does not hide slow steps"


@pytest.mark.parametrize(("threads", "device"), [(1, "cpu"), (2, "cuda")])
def test_one_thread_and_a_gpu_are_never_slow(clocks: Clocks, threads: int, device: str) -> None:
    assert run(SlowSteps(threads, device), clocks, 20, 1.0, 0.1) == []
