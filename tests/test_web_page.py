"""Test the text of the web page. test_web_browser.py opens the page in a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evidence import failing, make_data, make_recipe, make_run, make_study, make_trial, score
from typer.testing import CliRunner

from mainrun import cli
from reports.evidence.load import Recipe
from reports.web import html, page
from reports.web.views import RunView, StudyView, View, curves, thin, view_of

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "' onmouseover='alert(1)",
    "a&b\x00\x1b[31m\u2028\ud800",
)
ALLOWED = set(
    re.findall(
        r"\w+",
        "a b body button details div figure footer h1 h2 h3 head header html i input label legend fieldset "
        "li link main meta nav output p pre progress script section span style summary svg table tbody td th "
        "thead title tr ul rect line circle text",
    )
)


class Tags(HTMLParser):
    """Collects the elements of a page, and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def data_of(text: str) -> dict[str, Any]:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return dict(json.loads(block))


def two_recipes() -> tuple[Recipe, Recipe]:
    fulls = {1: 2.0, 2: 2.01, 3: 2.02}
    return make_recipe("baseline", fulls), make_recipe("optimized", {k: v - 0.3 for k, v in fulls.items()})


def example() -> View:
    trials = [make_trial(n, 1 + n / 8, **{"params.lr": 0.01 * (n + 1)}) for n in range(3)]
    return view_of(make_data(*two_recipes(), studies=(make_study(*trials, claim="none"),)), "Title")


def test_the_page_is_one_valid_document_that_loads_nothing() -> None:
    text = page.render(example())
    tags = Tags(text)
    assert {tag for tag, _ in tags.found} <= ALLOWED
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags.found:
        assert not {"style", "src", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        target = attributes.get("href") or "#"
        assert target == "data:," or target == "#" or target.removeprefix("#") in ids
    assert re.findall(r"(?:https?:)?//[a-z0-9.]+", text.replace("http://www.w3.org/2000/svg", "")) == []


def test_the_policy_allows_only_the_script_and_the_style_of_the_page() -> None:
    text = page.render(example())
    assert f"<script>{html.script()}</script>" in text and f"<style>{html.style()}</style>" in text
    policy = html.policy(live=False)
    assert (
        policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "connect-src" not in policy
    )
    assert html.source_hash(html.script()) in policy and html.source_hash(html.style()) in policy
    assert "connect-src 'self'" in html.policy(live=True)
    assert html.text(policy) in text or policy in text


def test_the_script_is_small() -> None:
    assert len(html.script().encode()) < 10_000
    assert "  " not in html.script() and '"no data yet"' in html.script()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_only_text(name: str) -> None:
    run = RunView(
        name, name, "done", {"preset": name, "corpus": name, "seed": 1}, ["mainrun", name], name,
        full=1.0, machine=name, scores=[[1, 2, 3.0, None, 1.0]],
    )  # fmt: skip
    trial = {"trial": 0, "state": name, "value": 1.0, "params": {name: name}, "run": name, "reason": name}
    study = StudyView(name, name, name, [trial], name, name, name, workers=[name], importance={name: 1.0})
    view = View(name, name, [run], [study], findings=[name], problems=[name])
    text = page.render(view, version="1", shown=name)
    tags = Tags(text)
    assert {tag for tag, _ in tags.found} <= ALLOWED
    assert [tag for tag, _ in tags.found].count("script") == 2
    for _, attributes in tags.found:
        assert not [key for key in attributes if key.startswith("on")]
    assert html.printable(name) in tags.texts
    assert data_of(text)["runs"][0]["id"] == html.printable(name)


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert page.render(example()) == page.render(example())


def test_the_result_is_that_of_the_report() -> None:
    view = example()
    texts = " ".join(Tags(page.render(view)).texts)
    assert view.claim is not None and view.claim.kind == "better" and view.claim.text in texts
    assert "2.0100" in texts and "1.7100" in texts and "−0.3000" in texts
    assert all(sentence in texts for sentence in view.findings)
    assert "95% interval" in texts and view.floor is not None


def test_each_run_shows_its_config_and_its_command() -> None:
    text = page.render(example())
    assert "mainrun train --preset optimized" in text and "preset = optimized\n" in text
    tags = Tags(text)
    folded = {attributes["id"] for tag, attributes in tags.found if tag == "details"}
    links = {attributes["href"] for tag, attributes in tags.found if tag == "a"}
    assert len(folded) == 6 and {f"#{name}" for name in folded} <= links


def test_a_run_that_failed_a_guard_is_marked_and_never_the_best() -> None:
    base, other = two_recipes()
    bad = make_run("optimized", 9, 0.5, guards=failing())
    view = view_of(make_data(base, Recipe(other.name, (*other.runs, bad))), "Title")
    (shown,) = [run for run in view.runs if run.id == bad.id]
    assert shown.is_bad and shown.note == "failed causality"
    rows = re.findall(
        r'<tr class="(best|bad)" data-key="[^"]*"><td class="id"><a[^>]*>([^<]*)', page.render(view)
    )
    assert ("bad", bad.id) in rows and ("best", bad.id) not in rows and len(rows) == 2


def test_unfinished_values_are_left_empty() -> None:
    text = page.render(View("Title", runs=[RunView("a", "a", "running", {}, step=3, steps=10)]), version="x")
    assert "3 of 10" in text and "None" not in re.sub(r"<script>.*?</script>", "", text)
    assert "There is no run here yet." in page.render(View("Title"), version="x")


def test_fifty_runs_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(long_log(3000))
    fulls = {seed: 2.0 + seed / 100 for seed in range(1, 26)}
    recipes = [make_recipe(name, fulls, rows=rows) for name in ("baseline", "optimized")]
    text = page.render(view_of(make_data(*recipes), "Title"))
    assert len(data_of(text)["runs"]) == 50 and len(text.encode()) < 2_000_000


def long_log(steps: int) -> Iterator[dict[str, Any]]:
    for i in range(1, steps + 1):
        yield {"event": "step", "step": i, "tokens": 128 * i, "seconds": 0.5123, "loss": 5 + math.sin(i) / 7}
        if i % 30 == 0:
            yield {"event": "eval", "seconds": 0.25, **score(step=i, full=2 + 1 / i)}


def test_curves_have_steps_tokens_time_and_flops() -> None:
    scores, losses = curves(long_log(60), 10.0)
    assert scores == [[30, 3840, 15.619, 38400, 2.03333], [60, 7680, 31.238, 76800, 2.01667]]
    assert losses[0] == [1, 128, 0.5123, 1280, 5.12021] and len(losses) == 60
    assert curves(long_log(60), None)[0][0] == [30, 3840, 15.619, None, 2.03333]
    dev = [{**row, "split": "dev"} if row["event"] == "eval" else row for row in long_log(60)]
    assert curves(dev, 10.0)[0] == scores
    assert len(curves([*dev, *long_log(30)], 10.0)[0]) == 1


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [(100, ["seconds", 1]), (181, ["minutes", 60]), (10_000, ["minutes", 60]), (10_801, ["hours", 3600])],
)
def test_the_unit_of_time_fits_the_longest_run(seconds: float, unit: list[Any]) -> None:
    runs = [
        RunView(f"{end}", "a", "done", {}, losses=[[1, 1, end, None, 2.0]]) for end in (1.0, seconds, 2.0)
    ]
    assert data_of(page.render(View("Title", runs=runs)))["time"] == unit
    assert data_of(page.render(View("Title")))["time"] == ["seconds", 1]


def test_thinned_curves_keep_means_and_the_last_point() -> None:
    points: list[list[float | None]] = [[i, i, i, i, float(i)] for i in range(1, 1001)]
    thinned = thin(points)
    assert len(thinned) == 143 and thinned[0] == [7, 7, 7, 7, 4] and thinned[-1][0] == 1000
    assert thin([]) == []
    assert thin([[1, 1, 1, 1, math.nan], [2, 2, 2, math.inf, 3.0]]) == [
        [1, 1, 1, 1, None],
        [2, 2, 2, None, 3],
    ]


def test_a_study_shows_its_trials_fields_and_best() -> None:
    trials = [
        make_trial(0, 2.0, **{"params.lr": 1e-4, "params.optimizer": "sgd"}),
        make_trial(1, 1.0, **{"params.lr": 1e-1, "params.optimizer": "muon"}),
        make_trial(2, 0.5, "pruned", **{"params.lr": 1e-2, "params.optimizer": None}),
        make_trial(3, None, "diverged", reason="at step 9", **{"params.lr": 1.0}),
    ]
    text = page.render(view_of(make_data(studies=(make_study(*trials, claim="it helps"),)), "Title"))
    (study,) = data_of(text)["studies"]
    assert study["best"] == 1 and [trial["complete"] for trial in study["trials"]] == [
        True,
        True,
        False,
        False,
    ]
    assert study["fields"] == [
        {"name": "lr", "log": True, "names": None},
        {"name": "optimizer", "log": False, "names": ["muon", "sgd"]},
    ]
    texts = Tags(text).texts
    space = {"lr": {"low": 0.1, "high": 0.2, "log": True}}
    narrow = make_study(*(make_trial(n, 1.0, **{"params.lr": 0.1 + n / 20}) for n in range(3)), space=space)
    (shown,) = data_of(page.render(view_of(make_data(studies=(narrow,)), "Title")))["studies"]
    assert shown["fields"] == [{"name": "lr", "log": True, "names": None}]
    no_trial = {"trial": None, "state": "done", "value": 0.1, "params": {}, "run": "seed 2", "reason": ""}
    trial = {**no_trial, "trial": 0, "value": 1.0}
    assert StudyView("lr", "running", "value", [no_trial, trial]).best is trial
    assert "it helps" in texts and "at step 9" in texts and "diverged" in texts
    assert 'data-field="lr"' in text and 'data-v="0.1"' in text


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reports import cli as reports

    monkeypatch.setattr("reports.evidence.load.gather", lambda *_: make_data(*two_recipes()))
    monkeypatch.setattr(reports, "write", lambda *_: {"claim": "a claim", "pages": 1, "bytes": 2})
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["report", "--html", "new/page.html", "--title", "My <b>title</b>"])
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "new/page.html").read_text()
    assert done.stdout.splitlines()[-1] == f"new/page.html: {len(text.encode()):,} bytes"
    assert "<h1>My &lt;b&gt;title&lt;/b&gt;</h1>" in text
    (tmp_path / "notes.md").write_text("mine")
    done = CliRunner().invoke(cli.app, ["report", "--html", "notes.md"])
    assert done.exit_code == 2 and "notes.md" in done.stderr
