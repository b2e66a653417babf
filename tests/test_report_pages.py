"""Tests the layout of a report: what is on page 1, how full the pages are, and how figures look."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from evidence import make_data, make_recipe, make_run, make_study, make_trial, write_run

from mainrun.errors import RunError
from reports import cli
from reports.evidence import compared, front_page, load, samples, studies, tables
from reports.evidence.figures import axes as ticks
from reports.evidence.figures import (
    front,
    importance,
    interval,
    parallel,
    registry,
    series,
    shades,
    slices,
    study_page,
)
from reports.evidence.load import ReportData, Study

BOTTOM, TOP = 46.0, 798.0  # the frame of the text on a page, in points
SCORES = {1: 2.00, 2: 2.01, 3: 2.02}
LOWER = {1: 1.80, 2: 1.82, 3: 1.81}


def two_recipes(**changes: Any) -> ReportData:
    return make_data(make_recipe("baseline", SCORES), make_recipe("optimized", LOWER, **changes))


def searched(count: int = 24, **facts: Any) -> Study:
    """Return a study of three fields, of which `lr` decides the value. Every fourth trial was pruned."""
    trials = []
    for number in range(count):
        lr = 10 ** (-3 + 2 * (number * 0.618 % 1))
        value = 2.0 + abs(number * 0.618 % 1 - 0.4) + 0.01 * (number % 3)
        fields = {"params.lr": lr, "params.dropout": 0.1 * (number % 3), "params.swa": number % 2 == 0}
        state, scores = "done", f'{{"0": {value + 0.5}, "1": {value}}}'
        if number % 4 == 3:
            state, value, scores = "pruned", value + 0.5, f'{{"0": {value + 0.5}}}'
        trials.append(make_trial(number, value, state, rung=int(state == "done"), scores=scores, **fields))
    return make_study(*trials, **(CONFIRMED | facts))


CONFIRMED: dict[str, Any] = {
    "objective": "dev/full",
    "claim": "trial 6 is better than the base",
    "study": {
        "preset": "optimized",
        "space": {
            "lr": {"low": 1e-3, "high": 0.1, "log": True},
            "dropout": {"values": [0.0, 0.1, 0.2]},
            "swa": {"values": [True, False]},
        },
        "sampler": {"name": "tpe", "seed": 3},
        "budget": {"trials": 24},
    },
    "ledger": {"asked": 900, "trained": 700, "reused": 200, "wasted": 70},
    "rung_correlation": {"0": 0.875},
    "evidence": {
        "seeds": [11, 12],
        "base": [2.31, 2.33],
        "noise": {"seeds": [21, 22], "values": [2.30, 2.32], "sigma": 0.0141, "floor": 0.0254},
        "winner": 6,
        "rows": [
            {"trial": 6, "mean": 2.11, "difference": -0.21, "interval": [-0.25, -0.17], "claim": True},
            {"trial": 9, "mean": 2.30, "difference": -0.02, "interval": [-0.06, 0.02], "why": "noise"},
        ],
    },
}


def page_words(pdf: Path) -> list[list[tuple[float, float, str]]]:
    """Return the font size, the height above the bottom and the text of every word, for each page."""
    from pypdf import PdfReader

    pages = []
    for page in PdfReader(pdf).pages:
        words: list[tuple[float, float, str]] = []

        def visit(text: str, cm: Any, tm: Any, _: Any, size: float, words: list[Any] = words) -> None:
            if text.strip():
                scale = abs((tm[0] * tm[3] - tm[1] * tm[2]) * (cm[0] * cm[3] - cm[1] * cm[2])) ** 0.5
                y = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
                words.append((round(size * scale, 1), y, text.strip()))

        page.extract_text(visitor_text=visit)
        pages.append(words)
    return pages


def fills(pdf: Path) -> list[float]:
    """Return which share of the frame of each page is used, from its top to its lowest word."""
    lowest = [min(y for _, y, _ in words if y > BOTTOM) for words in page_words(pdf)]
    return [(TOP - y) / (TOP - BOTTOM) for y in lowest]


def text_of(pdf: Path, page: int | None = None) -> str:
    from pypdf import PdfReader

    pages = PdfReader(pdf).pages
    return " ".join(
        " ".join(each.extract_text() for each in (pages if page is None else [pages[page]])).split()
    )


# -- page 1


@pytest.mark.parametrize(
    "data",
    [
        two_recipes(),
        make_data(make_recipe("baseline", SCORES), make_recipe("optimized", LOWER), studies=(searched(),)),
        make_data(studies=(searched(),)),
        pytest.param(
            make_data(make_recipe("baseline n_layer=8 n_head=6 d_model=384 weight_decay=1 rdrop=2", SCORES),
                      make_recipe("baseline n_layer=4 n_head=4 d_model=256 weight_decay=1 rdrop=2", LOWER)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["runs", "runs and a study", "a study", "long names"],
)  # fmt: skip
def test_page_1_is_full_and_ends_with_three_findings(data: ReportData, tmp_path: Path) -> None:
    cli.write(data, tmp_path / "r.pdf", "A title")
    assert 0.88 < fills(tmp_path / "r.pdf")[0] <= 1
    text = text_of(tmp_path / "r.pdf", 0)
    after = text.split("Findings ")[1]
    assert after.startswith("1. ") and " 2. " in after and " 3. " in after and " 4. " not in after
    sizes = [size for size, _, _ in page_words(tmp_path / "r.pdf")[0]]
    assert sizes.count(24.0) == 3, "both scores and the difference are in large type"


def test_page_1_says_the_claim_the_seeds_the_interval_and_the_cost(tmp_path: Path) -> None:
    cli.write(two_recipes(params=2000), tmp_path / "r.pdf", "A title")
    text = text_of(tmp_path / "r.pdf", 0)
    assert text.count("optimized is better than baseline: full falls by 0.2000") == 1
    for shown in ("2.0100", "1.8100", "−0.2000", "−10.0%", "3 seeds: 1, 2, 3", "2.00×"):
        assert shown in text, shown
    assert "95% interval −0.2248 to −0.1752" in text


def test_a_ratio_is_shown_only_where_it_can_be_computed() -> None:
    table = front_page.headline(two_recipes(params=2000))
    assert table is not None
    heads = [column.head for column in table.columns]
    ratios = dict(zip(heads, table.rows[2], strict=True))
    assert ratios["parameters"] == 2 and ratios["seconds"] == 1 and ratios["full"] is None
    reused = front_page.headline(two_recipes(ledger={"reused": 4}))
    assert reused is not None and "Seconds are not compared, since optimized took steps" in reused.note
    assert reused.rows[2][heads.index("seconds")] is None
    alone = front_page.headline(make_data(make_recipe("baseline", SCORES)))
    assert alone is not None and len(alone.rows) == 1


def test_a_study_alone_compares_its_winner_with_the_base() -> None:
    found = compared.comparison(make_data(studies=(searched(),)))
    assert found is not None
    assert found.names == ("base of the study lr", "trial 6") and found.mean == -0.21
    assert list(found.scores) == pytest.approx([2.32, 2.11]) and found.interval == (-0.25, -0.17)
    assert found.seeds[0] == "2 seeds: 11, 12" and (found.floor, found.score) == (0.0254, "dev/full")
    said = front_page.sentence(make_data(studies=(searched(),)))
    assert said.startswith(
        "Study lr: trial 6 is better than the base; trial 6 changes dev/full by −0.2100 (95%"
    )
    assert compared.comparison(make_data(studies=(make_study(make_trial(0)),))) is None


def test_the_difference_is_drawn_with_its_interval_and_the_noise_floor() -> None:
    data = two_recipes()
    figure = interval.draw(compared.comparison(data))
    assert figure is not None and data.noise is not None
    (axes,) = figure.get_axes()
    patches: Any = axes.patches
    floor, bar = patches
    assert (floor.get_x(), floor.get_width()) == pytest.approx((-data.noise.floor, 2 * data.noise.floor))
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((-0.2248, -0.1752), abs=1e-4)
    low, high = axes.get_xlim()
    assert low < -0.2248 and high > data.noise.floor, "zero and the whole interval are in the frame"
    one = make_data(make_recipe("baseline", {1: 2.0}), make_recipe("optimized", {1: 2.1}))
    without = interval.draw(compared.comparison(one))
    assert without is not None and not without.get_axes()[0].patches
    assert interval.draw(None) is None


def test_the_right_figure_is_the_waterfall_else_the_study_else_all_runs() -> None:
    steps = [make_recipe(f"ablation:{name}", SCORES) for name in ("baseline", "adamw", "muon")]
    assert front.right(make_data(*steps, studies=(searched(),))) == "waterfall"
    assert front.right(make_data(make_recipe("baseline", SCORES), studies=(searched(),))) == front.RIGHT
    assert front.right(two_recipes()) == "seeds"


def test_names_lose_what_all_recipes_share_and_long_names_become_numbers() -> None:
    names: Mapping[str, float] = {"a x=1 y=2": 2.0, "a x=3 y=2": 1.0, f"a x={'9' * 50} y=2": 3.0}
    recipes = [make_recipe(name, {1: full}) for name, full in names.items()]
    data = make_data(*recipes)
    assert list(series.short_names(data, recipes).values()) == ["a x=1", "a x=3", "a #3"]
    assert list(series.short_names(data, recipes[:1]).values()) == ["a x=1 y=2"], "alone, nothing is left out"


# -- ticks


def test_the_ticks_of_logarithmic_axes_are_decades_or_round_numbers() -> None:
    assert ticks.log_ticks(1e-4, 1e-1) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert ticks.log_ticks(0.002, 0.04) == pytest.approx([0.002, 0.005, 0.01, 0.02])
    assert len(ticks.log_ticks(1e-9, 1e3)) <= 4


# -- the other pages


def test_a_study_takes_one_full_page_with_all_its_figures(tmp_path: Path) -> None:
    data = make_data(make_recipe("baseline", SCORES), make_recipe("optimized", LOWER), studies=(searched(),))
    cli.write(data, tmp_path / "r.pdf", "t", tmp_path / "f")
    text = text_of(tmp_path / "r.pdf", 1)
    assert text.startswith("t page 2 of 6 Study lr ") and "Study lr" not in text_of(tmp_path / "r.pdf", 2)
    for name in ("history", "importance", "slices", "parallel", "rungs", "ledger"):
        assert registry.STUDY[name].caption in text, name
        assert (tmp_path / "f" / f"study-1-{name}.svg").is_file()
    assert "Its 24 trials ended as follows: 18 done, 6 pruned." in text
    assert "The base scored 2.3000 and 2.3200 with 2 seeds: 21, 22, so the noise floor is 0.0254." in text
    assert "Of 900 requested steps, 700 were trained, 200 were reused and 70 were wasted." in text
    assert 0.85 < fills(tmp_path / "r.pdf")[1] <= 1


@pytest.mark.slow
def test_only_the_last_page_may_be_less_than_two_thirds_full(tmp_path: Path) -> None:
    grown = make_recipe("grown", {1: 1.7}, flops=4e9, params=3000)
    others = [
        make_recipe(f"other{i}", {1: 1.9 + i / 10}, {"lr": 0.01 + i / 100}, flops=2e9 + i * 1e8)
        for i in range(30)
    ]
    pair = (make_recipe("baseline", SCORES), make_recipe("optimized", LOWER))
    data = make_data(*pair, grown, *others, studies=(searched(), searched(200)))
    cli.write(data, tmp_path / "r.pdf", "t")
    filled = fills(tmp_path / "r.pdf")
    assert len(filled) > 6 and min(filled[:-1]) > 2 / 3, filled


def test_a_large_space_is_shortened_on_the_page_and_whole_in_the_appendix(tmp_path: Path) -> None:
    space = {f"field_{i}": {"low": 0, "high": i + 1} for i in range(12)}
    study = searched(study=CONFIRMED["study"] | {"space": space})
    cli.write(make_data(studies=(study,)), tmp_path / "r.pdf", "t")
    text = text_of(tmp_path / "r.pdf", 1)
    assert "8 more fields are in the appendix." in text and "field_11" not in text
    assert "field_11" in text_of(tmp_path / "r.pdf")


# -- the figures of trials


def lines(axes: Any, marker: str = "o") -> list[Any]:
    return [line for line in axes.get_lines() if line.get_marker() == marker and len(line.get_xdata())]


def test_trials_are_colored_by_value_and_the_best_is_labelled() -> None:
    study = searched()
    figure = slices.draw(study)
    assert figure is not None
    axes = figure.get_axes()[0]
    marks = [line for line in lines(axes) if line.get_markersize() == 3.5]
    shade_of = {float(line.get_ydata()[0]): line.get_color() for line in marks}
    assert len(shade_of) > 10
    assert shade_of[min(shade_of)] == shades.STOPS[0] and shade_of[max(shade_of)] == shades.STOPS[2]
    best = min(study.completed, key=lambda trial: float(trial["value"]))
    assert f"trial {best['trial']}" in [text.get_text() for text in axes.texts]
    drawn = parallel.draw(study)
    assert drawn is not None
    (axes,) = drawn.get_axes()
    labels = [line.get_label() for line in axes.get_lines()]
    assert f"best: {best['trial']}" in labels
    assert len({line.get_color() for line in axes.get_lines()}) > 10


def test_shades_get_lighter_with_the_value_also_in_gray() -> None:
    colors = shades.shades([i / 20 for i in range(21)])
    grays = [sum(w * int(c[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5))) for c in colors]
    assert grays == sorted(grays) and grays[-1] - grays[0] > 120
    assert shades.shades([1.0, 1.0]) == [shades.STOPS[0]] * 2


def test_a_field_searched_on_a_logarithm_has_a_logarithmic_axis() -> None:
    narrow = [0.01, 0.02]
    study = make_study(space={"lr": {"low": 0.01, "high": 0.1, "log": True}, "x": {"low": 1e-4, "high": 1.0}})
    assert studies.Scale.of_field(study, "lr", narrow).log, "whatever the span of the trials"
    assert not studies.Scale.of_field(study, "x", [1e-4, 1.0]).log, "the space says that it is linear"
    assert studies.Scale.of_field(study, "unknown", [1e-4, 1.0]).log, "a wide span is logarithmic"
    assert studies.Scale.of_field(study, "lr", ["a", "b"]).names == ["a", "b"]


def test_importance_uses_a_lower_rung_if_few_trials_were_trained_to_the_end() -> None:
    study = searched(12)
    assert len(study.completed) < studies.FEWEST
    trials, rung = studies.comparable(study)
    assert (len(trials), rung) == (12, 0)
    shares = studies.importance(study)
    assert max(shares, key=shares.__getitem__) == "lr"
    figure = importance.draw(study)
    assert figure is not None and "by the scores of 12 trials at rung 0" in title_of(figure)
    assert studies.comparable(searched(24))[1] is None


def title_of(figure: Any) -> str:
    return " ".join(figure.get_suptitle().split())


def test_every_figure_of_a_study_has_a_title_that_says_what_it_shows() -> None:
    study = searched()
    titles = {name: title_of(figure) for name, figure in study_page.draw(study, 6.0).items()}
    best = min(study.completed, key=lambda trial: float(trial["value"]))
    assert titles["history"].startswith(f"Trial {best['trial']} of 24 reached {best['value']:.4f}")
    assert titles["ledger"] == "78% of the requested steps were trained"
    assert titles["rungs"] == "Early scores rank the trials well"
    assert titles["importance"].startswith("lr decides most") and all(titles.values())


# -- what failed, and samples


def test_a_run_that_diverged_is_listed_with_its_reason_if_no_argument_names_it(tmp_path: Path) -> None:
    write_run(tmp_path, make_run())
    lost = write_run(tmp_path, make_run(seed=2), status="diverged")
    (lost / "summary.json").unlink()
    (lost / "status.json").write_text('{"state": "diverged", "step": 9, "why": "the loss is nan"}')
    data = load.gather([], tmp_path)
    assert [run.cfg.seed for run in data.runs] == [1]
    table = tables.failures(data)
    assert table is not None and table.rows == [[lost.name, "diverged, step 9", "the loss is nan"]]
    with pytest.raises(RunError, match=r"is not finished \(diverged\)"):
        load.gather([str(lost)], tmp_path)
    shutil.rmtree(tmp_path / make_run().cfg.run_id)
    with pytest.raises(RunError, match="contains no run and no exported study"):
        load.gather([], tmp_path)


def test_pruned_trials_are_listed_by_reason() -> None:
    trials = [make_trial(i, 2.0, "pruned", reason="place 4 of 4") for i in range(3)]
    study = make_study(
        make_trial(9, None, "failed", reason="no memory"), *trials, make_trial(4, 2.0, "pruned")
    )
    table = tables.failures(make_data(studies=(study,)))
    assert table is not None and table.rows == [
        ["lr, trial 9", "failed", "no memory"],
        ["lr, trials 0, 1, 2", "pruned", "place 4 of 4"],
        ["lr, trial 4", "pruned", "stopped at a rung"],
    ]


def test_only_the_log_of_the_user_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "mine.md"
    log.write_text("- Wider was worse.\n- Deeper was better.\n")
    cli.write(two_recipes(), tmp_path / "a.pdf", "t")
    assert "worse" not in text_of(tmp_path / "a.pdf") and "a log (give a file with --log)" in text_of(
        tmp_path / "a.pdf"
    )
    cli.write(two_recipes(), tmp_path / "b.pdf", "t", log=log)
    text = text_of(tmp_path / "b.pdf")
    assert "From mine.md" in text and "• Wider was worse." in text and "Deeper" not in text


def test_samples_are_side_by_side_and_control_characters_are_visible() -> None:
    table = samples.side_by_side(
        [("a-1", ["one\x07two", "", "b\ufffdd"]), ("b-2", ["plain", "\u2028\u4e2d"])]
    )
    assert table is not None
    assert [column.head for column in table.columns] == ["#", "a-1", "b-2"]
    assert table.rows == [
        [1, "one␇two", "plain"],
        [2, "(an empty title)", "⟨2028⟩⟨4E2D⟩"],
        [3, "b\ufffdd", ""],
    ]
    assert "(1 times)" in table.note and "Control characters" in table.note
    assert samples.side_by_side([]) is None
    clean = samples.side_by_side([("a-1", ["plain"])])
    assert clean is not None and "Control" not in clean.note and "stands for" not in clean.note


@pytest.mark.slow
def test_a_report_on_50_runs_and_200_trials_takes_less_than_10_seconds(tmp_path: Path) -> None:
    recipes = [make_recipe(f"other{i}", {s: 2.0 + i / 50 + s / 999 for s in range(5)}) for i in range(8)]
    pair = (make_recipe("baseline", dict.fromkeys(range(5), 2.5)), make_recipe("optimized", LOWER))
    data = make_data(*pair, *recipes, studies=(searched(200),))
    start = time.process_time()
    cli.write(data, tmp_path / "a.pdf", "t")
    assert time.process_time() - start < 10
    cli.write(data, tmp_path / "b.pdf", "t")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_the_study_page_names_only_the_options_of_its_sampler() -> None:
    from reports.evidence.study_page import _search

    options = {"seed": 3, "startup": 8, "lanes": 2, "horizons": [0.5, 1.0]}
    assert list(_search(make_study(study={"sampler": options | {"name": "tpe"}}))) == [
        "The sampler tpe chose the settings (seed 3, startup 8)."
    ]
    (text,) = _search(make_study(study={"sampler": options | {"name": "frugal"}}))
    assert "lanes 2" in text and "horizons 0.5 1" in text
