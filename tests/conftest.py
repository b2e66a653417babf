"""Fixtures for all tests: a separate cache, one thread, and a config that trains in about a second."""

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from doors import Driver

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without this variable, the tokenizer's threads would slow down the tests on a busy machine. The tokens do
# not depend on it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Hypothesis examples take longer on a busy machine, so a slow example is not an error.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
settings.register_profile("fast", settings.get_profile("house"), max_examples=25)

REAL_TITLES = Path(__file__).parents[2] / "shared" / "data" / "hn_titles.txt"

TINY = {
    "num_titles": 400,
    "vocab_size": 400,
    "block_size": 16,
    "batch_size": 8,
    "epochs": 1,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 32,
    "threads": 1,
    "device": "cpu",
    "eval_per_epoch": 2,
}


def pytest_configure(config: pytest.Config) -> None:
    """Try a quarter of the random examples if the slow tests are left out. CI runs all tests."""
    if config.option.markexpr == "not slow":
        settings.load_profile("fast")


def examples(count: int) -> int:
    """Return `count`, or a quarter of it if the slow tests are left out."""
    return count * settings.default.max_examples // 100


def slow_unless(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters of a test. The fast suite runs only the cases in `fast`."""
    fast = list(fast)
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a separate cache in this process and its subprocesses, so that no test touches the user's cache."""
    os.environ["MAINRUN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _fewer_seconds() -> Iterator[None]:
    """Generate the synthetic titles of each size once, and do not wait for the disk.

    Each run reads its titles twice, which takes a sixth of its time. No test cuts the power, so a test that
    checks what is written to the disk records the calls of `os.fsync` instead.
    """
    from mainrun.data import synthetic

    titles = functools.cache(synthetic.titles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "titles", lambda n: list(titles(n)))
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def real_titles() -> Path:
    if not REAL_TITLES.is_file():
        pytest.skip(f"needs a file of real titles, one per line, at {REAL_TITLES}")
    return REAL_TITLES


@pytest.fixture(scope="session")
def driver() -> Iterator["Driver"]:
    """Return a process that runs commands in forked children, which saves the seconds of the imports."""
    from doors import ROOT, Driver

    with Driver(Path(os.environ.get("DOORS_TREE", ROOT))) as started:  # another source tree to test
        yield started


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread, so that sums are added in the same order on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """Return a function that applies changes to a tiny config, which trains in about a second."""
    from mainrun.config import from_dict

    return lambda **changes: from_dict(TINY | changes)


def tiny_sets(**changes: object) -> list[str]:
    """Return `--set key=value` arguments that give the tiny config with these changes."""
    arguments = []
    for key, value in (TINY | changes).items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        arguments += ["--set", f"{key}={text}"]
    return arguments
