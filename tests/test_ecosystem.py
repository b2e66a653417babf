"""Tests the files that other programs read: the workflow, CITATION.cff, the changelog and the templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mainrun

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_all_files_name_the_same_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == released[0] == PROJECT["version"] == mainrun.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_workflow_runs_the_tasks_of_the_repository() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    tasks = yaml.safe_load((ROOT / "Taskfile.yml").read_text())["tasks"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run"
    for command in commands[:-1]:
        program, task = command.split()
        assert program == "./task" and task in tasks
    for command in [*commands[:1], ".ci/run"]:
        assert (ROOT / command.split()[0]).stat().st_mode & 0o111, f"{command} is not executable"


def test_the_workflow_covers_the_supported_pythons() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    pythons = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert pythons[0] == lowest
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert pythons == named == [f"3.{minor}" for minor in range(11, 15)]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "README.md"])
def test_the_links_between_the_pages_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), f"{name} links to {target}"
