"""Tests the report of the search benchmark: what is run again, claims, the held-out table, and the figure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from search_tables import SYNTHETIC, synthetic_table
from typer.testing import CliRunner

from mainrun.cli import app
from mainrun.errors import RunError, UsageError
from reports.evidence.figures import search_bench as figure
from sweeps.search_bench import ours, report, rivals, searches
from sweeps.search_bench.metrics import Trace
from sweeps.search_bench.ours import ABLATIONS, OURS
from sweeps.search_bench.tables import Table

RIVALS = "random, top-1-of-16"


@cache
def table(name: str = "A") -> Table:
    return synthetic_table(replace(SYNTHETIC, name=name))


@pytest.fixture
def place(tmp_path: Path) -> str:
    path = tmp_path / "table.parquet"
    table().write(path)
    return str(path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[searches.Job]:
    """Run short searches in this process, and return the list of those that are run."""
    jobs: list[searches.Job] = []

    def one_by_one(
        missing: Sequence[searches.Job], run: Callable[[searches.Job], str], workers: int
    ) -> Iterator[str]:
        for job in missing:
            jobs.append(job)
            yield run(job)

    searches._runner.cache_clear()
    monkeypatch.setattr(searches, "_in_parallel", one_by_one)
    monkeypatch.setattr(ours, "CAP", 4.0)
    monkeypatch.setattr(rivals, "BUDGET", 4.0)
    return jobs


def quiet(text: str) -> None: ...


def run(place: str, out: Path, names: str = RIVALS, with_ablations: bool = False) -> dict[str, Any]:
    return report.run(place, names, with_ablations, 2, out, 1, quiet)[1]


def test_a_benchmark_runs_each_search_once(place: str, tmp_path: Path, started: list[searches.Job]) -> None:
    first = run(place, tmp_path)
    methods = [OURS, "random", "top-1-of-16"]
    assert [row["method"] for row in first["methods"]] == methods
    assert sorted(started) == sorted(
        (m, search, train) for m in methods for search in (0, 1) for train in (1, 2)
    )
    assert [row["rival"] for row in first["comparisons"]] == methods[1:]
    assert run(place, tmp_path) == first and len(started) == 12
    folder = next(tmp_path.glob("A-*"))
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(first))
    assert "| frugal | 4 |" in (folder / "report.md").read_text()


def test_a_changed_method_is_run_again(
    place: str, tmp_path: Path, started: list[searches.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, tmp_path, "random")
    searches.version_of.cache_clear()
    monkeypatch.setattr(searches, "sampler_hash", lambda: "changed".ljust(64, "0"))
    before = len(started)
    run(place, tmp_path, "random")
    searches.version_of.cache_clear()
    assert {job[0] for job in started[before:]} == {OURS}


def test_a_damaged_trace_says_what_to_remove(place: str, tmp_path: Path, started: list[searches.Job]) -> None:
    run(place, tmp_path, "random")
    path = next(tmp_path.glob("A-*/random-*/000-1.json"))
    path.write_text("{")
    with pytest.raises(RunError, match=r"000-1\.json is damaged; remove it and run the same command again"):
        run(place, tmp_path, "random")


def test_unknown_rivals_are_named() -> None:
    with pytest.raises(UsageError, match=r"unknown rival 'randon' \(did you mean 'random'\?\)"):
        searches.chosen_methods("randon", False)
    everything = searches.chosen_methods("all", True)
    assert everything[0] == OURS and set(rivals.RIVALS) | set(ABLATIONS) < set(everything)


def test_the_hash_covers_every_file_that_the_sampler_imports() -> None:
    """A file of the sampler that is missing in the list could change without a new hash."""
    listed = {path.stem for path in searches.SAMPLER_FILES}
    for path in searches.SAMPLER_FILES:
        text = path.read_text()
        for name in ("coordinates", "frugal", "lanes", "late_change", "short_run", "surrogate"):
            if f"sweeps.{name} import" in text:
                assert name in listed


# -- claims


def traces(method: str, tokens: float) -> list[Trace]:
    good = next(iter(table().good))
    return [
        Trace(method, "A", search, train, [(tokens + search % 3, good)], 1.0)
        for search in range(20)
        for train in (1, 2)
    ]


def made(name: str = "A") -> dict[str, Any]:
    rows = {OURS: traces(OURS, 6), "slow": traces("slow", 30), "same": traces("same", 6)}
    return report.make(table(name), {**rows, "no-drift": traces("no-drift", 9)})


def test_only_what_is_shown_is_claimed() -> None:
    result = made()
    assert report.claims(result) == ["frugal needs at most a third of the tokens of slow"]
    assert [row["rival"] for row in result["ablations"]] == ["no-drift"]
    assert result["status"] == "for development"
    text = report.markdown(result)
    assert "| slow | 40 | 100% |" in text and "frugal needs at most a third" in text


# -- the held-out table


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "sampler.sha256"
    monkeypatch.setattr(report, "COMMITTED", path)
    return path


def test_the_held_out_table_needs_a_settled_sampler(committed: Path) -> None:
    with pytest.raises(UsageError, match=f"write the hash {searches.sampler_hash()}"):
        report.check_recording("B")
    committed.write_text(searches.sampler_hash() + "\n")
    report.check_recording("B")
    report.check_recording("A")
    assert report.status_of("B") == "held out"
    committed.write_text("0" * 64)
    assert report.status_of("B") == "no longer held out"


def test_each_opening_is_listed_once(committed: Path, tmp_path: Path) -> None:
    openings = tmp_path / "docs/search-openings.md"
    with pytest.raises(UsageError, match="run the command from a checkout of the repository"):
        report.check_opening("B", openings)
    openings.parent.mkdir()
    report.check_opening("B", openings)
    report.record_opening(made(), openings)
    assert not openings.exists()
    committed.write_text(searches.sampler_hash())
    result = made("B")
    report.record_opening(result, openings)
    report.record_opening(result, openings)
    committed.write_text("0" * 64)
    report.record_opening(made("B"), openings)
    rows = [line for line in openings.read_text().splitlines() if "frugal" in line]
    assert [line.split(" | ")[2] for line in rows] == ["held out", "no longer held out"]
    assert "slow: 0.2" in rows[0] and "same: 1.000 [1.000, 1.000], not told apart" in rows[0]


# -- the figure


def test_the_figure_has_the_same_bytes_again() -> None:
    result = made()
    svg = figure.to_svg(result)
    assert svg == figure.to_svg(json.loads(json.dumps(result)))
    text = svg.decode()
    assert all(f">{name}<" in text for name in ("frugal", "slow", "same")) and "no-drift" not in text
    assert b"<svg" in figure.to_svg({**result, "comparisons": [], "methods": result["methods"][:1]})


# -- the command


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "search", *arguments])
    return result.exit_code, result.output


def test_the_command_writes_its_results(place: str, tmp_path: Path, started: list[searches.Job]) -> None:
    arguments = ["--table", place, "--searches", "2", "--rivals", "random", "--out", str(tmp_path / "out")]
    code, text = invoke(*arguments)
    assert code == 0 and "frugal against" in text
    assert {path.suffix for path in (tmp_path / "out").glob("A-*/report.*")} == {".json", ".md", ".svg"}
    code, text = invoke(*arguments, "--json")
    assert code == 0 and json.loads(text[text.index("{") :])["table"] == "A"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of them"),
        (["--table", "A", "--record", "A"], "give one of them"),
        (["--record", "A", "--ablations"], "remove them"),
        (["--record", "C"], "the tables are A, B"),
        (["--table", "no.parquet"], "no.parquet does not exist"),
    ],
)
def test_unusable_options_are_refused(arguments: list[str], message: str) -> None:
    code, text = invoke(*arguments)
    assert code == 2 and message in text


@pytest.mark.slow
def test_processes_give_the_traces_of_one_process(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The searches of a pool are those of this process, and the environment is as before."""
    before = dict(os.environ)
    report.run(place, "", False, 2, tmp_path / "pool", 2, quiet)
    assert dict(os.environ) == before
    monkeypatch.setattr(searches, "_in_parallel", lambda jobs, run, workers: map(run, jobs))
    report.run(place, "", False, 2, tmp_path / "alone", 1, quiet)
    both = [
        [
            {**json.loads(path.read_text()), "cpu_seconds": 0}
            for path in sorted(tmp_path.glob(f"{name}/*/*/*"))
        ]
        for name in ("pool", "alone")
    ]
    assert both[0] == both[1] and len(both[0]) == 4
