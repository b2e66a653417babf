"""What every test stands on: a cache of its own, one thread, and a run that takes a second."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # its threads wait for each other on a busy machine; the tokens are the same

# no machine is too slow: how long an example takes says how busy it is
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or fills the user's cache; subprocesses inherit it."""
    os.environ["MAINRUN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_titles() -> Path:
    if not REAL_TITLES.is_file():
        pytest.skip(
            f"needs real titles, one a line, at {REAL_TITLES}; the synthetic corpus carries the suite"
        )
    return REAL_TITLES


@pytest.fixture
def tiny():
    """tiny(**changes): a config whose whole run takes about a second."""
    from mainrun.config import from_dict

    return lambda **changes: from_dict(TINY | changes)


def tiny_sets(**changes: object) -> list[str]:
    """The same as `--set key=value ...` arguments for the command line."""
    return [
        arg
        for k, v in (TINY | changes).items()
        for arg in ("--set", f"{k}={str(v).lower() if isinstance(v, bool) else v}")
    ]
