"""Tests that mainrun works as a wheel, without its repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mainrun.errors import UsageError
from reports.submission.commit import check_tree

ROOT = Path(__file__).parents[2]
PACKAGES = ("mainrun", "sweeps", "reports")


def test_a_submission_needs_the_repository(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"installed without its repository.*git clone"):
        check_tree(tmp_path / "lib/python3.13/site-packages")


def run(*command: object, **options: object) -> str:
    """Run a command and return its output."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked() -> list[str]:
    """Return the files of the repository that the wheel must contain."""
    names = run("git", "ls-files", "-co", "--exclude-standard", "--", *PACKAGES, cwd=ROOT).splitlines()
    return sorted(name for name in names if (ROOT / name).is_file())


@pytest.mark.slow
def test_a_wheel_contains_every_file_of_the_packages_and_works_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ["pyproject.toml", "README.md", "LICENSE", *tracked()]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("mainrun-*-py3-none-any.whl")
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
        archive.extractall(site)
    assert names == tracked()
    metadata = next(site.glob("*.dist-info"))
    assert (metadata / "entry_points.txt").read_text() == "[console_scripts]\nmainrun = mainrun.cli:main\n"
    assert (metadata / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()

    # The wheel is used in an empty folder, with the packages that it needs and without the repository.
    env = os.environ | {"PYTHONPATH": str(site), "MAINRUN_CACHE": str(tmp_path / "cache")}
    away = tmp_path / "away"
    away.mkdir()
    code = "import mainrun, sweeps, reports; print(mainrun.__file__, sweeps.__file__, reports.__file__)"
    places = run(sys.executable, "-P", "-c", code, cwd=away, env=env).split()
    assert places == [str(site / package / "__init__.py") for package in PACKAGES]
    mainrun = (sys.executable, "-P", "-m", "mainrun")
    sets = ("num_titles=200", "vocab_size=300", "max_steps=2", "eval_per_epoch=0", "device=cpu")
    words = [word for text in sets for word in ("--set", text)]
    run(*mainrun, "train", "--preset", "demo:baseline", *words, cwd=away, env=env)
    assert "demo-baseline" in run(*mainrun, "ls", cwd=away, env=env)
    assert "lr" in run(*mainrun, "sweep", "run", "lr", "--plan", cwd=away, env=env)
    run(*mainrun, "report", "--samples", "0", cwd=away, env=env)
    done = subprocess.run(
        [*mainrun, "submit"], cwd=away, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "installed without its repository" in done.stderr
