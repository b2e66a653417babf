"""Open the web page and the board in a real browser. Skipped where there is no Chromium."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import pytest
import reporting
from evidence import make_data, make_recipe, make_run, score, write_run
from test_sweeps import command, study_data, write_study_file
from test_web_board import begin, serving
from test_web_page import HOSTILE

from reports.evidence.load import gather
from reports.web import page
from reports.web.live import database_trials
from reports.web.views import View, view_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed"),
]
AXE = pytest.mark.skipif(browser.axe_file() is None, reason="needs pip install axe-core-python")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_errors(tab: browser.Page) -> Iterator[None]:
    """Check that the page of a test shows no error in the console."""
    tab.errors.clear()
    tab.requests.clear()
    tab.size(1280)
    yield
    tab.run("0")  # take note of the last events
    assert tab.errors == []


def log_of(steps: int, full: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 3 + full + math.exp(-step / 5)
        step_row = {"event": "step", "step": step, "tokens": 100 * step, "seconds": 2.0, "loss": loss}
        rows.append({**step_row, "lr": 0.1, "grad_norm": 1.0})
        if step % 5 == 0:
            row = score(step=step, full=full + math.exp(-step / 5))
            rows.append({"event": "eval", "seconds": 1.0, **row})
    return rows


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> View:
    study = reporting.export(tmp_path_factory.mktemp("exports") / "lr", 30)
    recipes = []
    for name, full in (("baseline", 2.0), ("optimized", 1.7), ("third", 1.9)):
        fulls = {seed: full + seed / 100 for seed in (1, 2, 3)}
        recipes.append(make_recipe(name, fulls, rows=log_of(40, full), tokens=4000))
    return view_of(make_data(*recipes, studies=gather([str(study)]).studies), "What helped")


@pytest.fixture(scope="module")
def file(example: View, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(path, example)
    return path.as_uri()


def column(tab: browser.Page, table: str, place: int) -> list[str]:
    """Return the texts of a column, in the order and with the rows that the page shows."""
    rows = f"[...document.querySelectorAll('#{table} tbody tr')].filter((row) => row.offsetParent)"
    return list(tab.run(f"{rows}.map((row) => row.cells[{place}].textContent)"))


def lines(tab: browser.Page) -> int:
    return int(tab.run("document.querySelectorAll('#curves-figure path').length"))


def axis(tab: browser.Page) -> str:
    """Return the name of the horizontal axis of the curves."""
    return str(tab.run("[...document.querySelectorAll('#curves-figure text')].at(-1).textContent"))


def test_it_opens_and_requests_nothing(tab: browser.Page, file: str) -> None:
    tab.send(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
    )
    tab.open(file)
    assert tab.run("document.title") == "What helped"
    assert tab.run("document.querySelector('h1').textContent") == "What helped"
    assert [url for url in tab.requests if url not in (file, "data:,")] == []
    assert lines(tab) == 9
    tab.send(
        "Network.emulateNetworkConditions",
        offline=False,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )


def test_a_request_of_a_script_would_be_refused(tab: browser.Page, file: str) -> None:
    tab.open(file)
    assert tab.run("fetch('https://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in error for error in tab.errors)
    tab.errors.clear()


def test_a_column_sorts_upwards_and_downwards(tab: browser.Page, file: str) -> None:
    tab.open(file)
    before = column(tab, "runs-table", 5)
    head = "#runs-table th:nth-child(6) button"
    tab.click(head)
    assert column(tab, "runs-table", 5) == sorted(before) != before
    assert tab.run("document.querySelectorAll('#runs-table th')[5].ariaSort") == "ascending"
    tab.click(head)
    assert column(tab, "runs-table", 5) == sorted(before, reverse=True)
    assert tab.run("document.querySelectorAll('#runs-table th')[5].ariaSort") == "descending"
    tab.click("#trials-0-table th:nth-child(3) button")
    values = column(tab, "trials-0-table", 2)
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers) and values[len(numbers) :] == [""] * (30 - len(numbers))


def test_the_filter_selects_rows_and_curves(tab: browser.Page, file: str) -> None:
    tab.open(file)
    tab.click("#runs-filter")
    tab.type("OPTIM")
    assert {name[:9] for name in column(tab, "runs-table", 0)} == {"optimized"}
    assert lines(tab) == 3
    assert tab.run("document.querySelector('#runs-table-count').textContent") == "3 of 9"
    tab.type(" no-such-word")
    assert column(tab, "runs-table", 0) == [] and lines(tab) == 0
    tab.click("#trials-0-filter")
    tab.type("muon done")
    assert {*column(tab, "trials-0-table", 1)} == {"done"} and {*column(tab, "trials-0-table", 3)} == {"muon"}


def test_the_curves_are_toggled(tab: browser.Page, file: str) -> None:
    tab.open(file)
    assert axis(tab) == "tokens"
    paths = set()
    for value, name in (("steps", "step"), ("time", "seconds"), ("flops", "FLOPs"), ("tokens", "tokens")):
        tab.click(f"input[value={value}] + span")
        assert axis(tab) == name
    for value in ("loss", "full"):
        tab.click(f"input[value={value}] + span")
        paths.add(tab.run("document.querySelector('#curves-figure path').getAttribute('d')"))
    assert len(paths) == 2
    tab.click(".key button")
    assert lines(tab) == 6 and tab.run("document.querySelector('.key button').ariaPressed") == "false"
    tab.click(".key button")
    assert lines(tab) == 9


def test_a_point_shows_its_values(tab: browser.Page, file: str) -> None:
    tab.open(file)
    tip = "document.querySelector('#curves-figure .tip').textContent"
    x, y = tab.middle("#curves-figure circle.dot:last-of-type")
    assert tab.run(tip) == ""
    tab.mouse("mouseMoved", x, y)
    shown = tab.run(tip)
    assert "full " in shown and "step " in shown and "tokens" in shown and "FLOPs" in shown
    inside = (
        "(() => {const a = document.querySelector('#curves-figure .tip').getBoundingClientRect();"
        "const b = document.querySelector('#curves-figure').getBoundingClientRect();"
        "return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1"
        " && a.bottom <= b.bottom;})()"
    )
    assert tab.run(inside)
    tab.mouse("mouseMoved", 2, 2)
    assert tab.run(tip) == ""
    tab.run("document.querySelector('#curves-figure svg').focus()")
    tab.key("ArrowRight")
    first = tab.run(tip)
    tab.key("ArrowRight")
    assert first and tab.run(tip) not in ("", first)


def test_a_link_opens_the_config_of_a_run(tab: browser.Page, file: str) -> None:
    tab.open(file)
    tab.click("#runs-table tbody a")
    tab.wait("document.querySelectorAll('details[open]').length === 1")
    text = tab.run("document.querySelector('details[open]').innerText")
    assert "mainrun train --preset baseline" in text and "seed = 1" in text


def test_it_prints(tab: browser.Page, file: str) -> None:
    import pypdf

    tab.open(file)
    reader = pypdf.PdfReader(io.BytesIO(tab.pdf()))
    text = "\n".join(sheet.extract_text() for sheet in reader.pages)
    assert "What helped" in text and "optimized is better than baseline" in text
    assert text.count("baseline-") >= 3 and 2 <= len(reader.pages) < 12


@AXE
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_it_is_accessible(tab: browser.Page, file: str, width: int, dark: bool) -> None:
    tab.size(width, dark=dark)
    tab.open(file)
    tab.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.accessibility_faults(tab) == []
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"


@AXE
def test_a_fault_of_accessibility_is_found(tab: browser.Page, file: str) -> None:
    tab.open(file)
    tab.run("document.querySelector('label[for=runs-filter]').remove()")
    assert any("label" in fault for fault in browser.accessibility_faults(tab))


def test_hostile_names_do_nothing(tab: browser.Page, example: View, tmp_path: Path) -> None:
    runs = [
        replace(run, id=name, recipe=name, note=name)
        for run, name in zip(example.runs[: len(HOSTILE)], HOSTILE, strict=True)
    ]
    study = replace(example.studies[0], name=HOSTILE[1], claim=HOSTILE[0], about=HOSTILE[2])
    study = replace(study, trials=[{**trial, "run": HOSTILE[1]} for trial in study.trials])
    hostile = replace(example, title=HOSTILE[2], subtitle=HOSTILE[1], runs=runs, studies=[study])
    path = tmp_path / "hostile.html"
    page.write(path, hostile)
    tab.open(path.as_uri())
    assert tab.run("document.title") == HOSTILE[2] and tab.run("document.images.length") == 0
    assert tab.run("document.scripts.length") == 2
    assert column(tab, "runs-table", 0)[:3] == list(HOSTILE[:3])
    tab.mouse("mouseMoved", *tab.middle("#curves-figure circle.dot:last-of-type"))
    assert "full" in tab.run("document.querySelector('#curves-figure .tip').textContent")
    assert tab.run("document.querySelectorAll('.tip *').length") == 0


# -- the board


def test_the_board_follows_a_run_and_keeps_the_filter(tab: browser.Page, tmp_path: Path) -> None:
    write_run(tmp_path, make_run("baseline", 1, 2.5))
    run = begin(tmp_path)
    with serving(tmp_path) as server:
        tab.open(server.url)
        assert "4 of 10 steps" in tab.run("document.querySelector('#now').innerText")
        tab.click("#runs-filter")
        tab.type("demo")
        tab.click("input[value=steps] + span")
        tab.run("document.querySelector('#runs-filter').focus()")
        row = {**make_run().rows[0], "step": 5, "tokens": 640}
        with (run / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")
        tab.wait("document.querySelector('#now').innerText.includes('5 of 10 steps')", 3)
        assert tab.run("document.querySelector('#runs-filter').value") == "demo"
        assert tab.run("document.activeElement.id") == "runs-filter"
        tab.type("-")
        assert len(column(tab, "runs-table", 0)) == 1 and axis(tab) == "step"
        assert "Last change" in tab.run("document.querySelector('#live').textContent")
        assert tab.run("fetch('/version', {method: 'POST'}).then((answer) => answer.status)") == 405
        tab.errors.clear()  # Chromium logs the refused request
    tab.wait("document.querySelector('#live').className === 'lost'")
    assert column(tab, "runs-table", 0) != []
    tab.errors.clear()  # and that the board does not answer


def test_the_board_follows_a_study_and_survives_a_killed_driver(tab: browser.Page, tmp_path: Path) -> None:
    fields = {"max_steps": 100}  # trials that take long enough to be seen
    study = write_study_file(tmp_path, set=study_data()["set"] | fields)
    out = tmp_path / "studies"
    out.mkdir()
    with serving(tmp_path) as server:
        tab.open(server.url)
        driver = subprocess.Popen(
            command(study, out, 1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            tab.wait("Boolean(document.querySelector('#study-0 .state.good'))", 240)
            assert driver.poll() is None, "the study ended before it could be killed"
            assert "running" in tab.run("document.querySelector('#study-0').innerText")
            database = out / "tiny" / "study.db"
            before = len(database_trials(database))
            while len(database_trials(database)) == before:
                assert driver.poll() is None, "the study ended before it could be followed"
                time.sleep(0.05)
            tiles = "document.querySelectorAll('#study-0 .tile b')"
            tab.wait(f"parseInt({tiles}[1].textContent) > {before}", 3)
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            start = time.monotonic()
            tab.wait("document.querySelector('#study-0 .tile b').textContent === 'stopped'", 5)
            assert time.monotonic() - start < 5
            assert tab.run("document.querySelector('#live').className") == ""
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
    tab.open("about:blank")
