"""Tests the sentences of a report with made-up numbers, including numbers just past each limit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from evidence import STEPS, failing, make_data, make_recipe, make_run, make_study, make_trial, score

from mainrun import stats
from reports.evidence import findings, tables
from reports.evidence.load import Recipe, ReportData

MINUS = "\N{MINUS SIGN}"
BASE = {1: 2.00, 2: 2.01, 3: 2.02}
GAIN = {1: 1.80, 2: 1.82, 3: 1.81}
OTHER = {"lr": 0.02}
# A printed table gives these 97.5% quantiles of Student's t with 2 and 4 degrees of freedom.
T2, T4 = 4.302653, 2.776445


def claim(base: dict[int, float], other: dict[int, float]) -> findings.Claim:
    return findings.claim(make_data(make_recipe("baseline", base), make_recipe("optimized", other, OTHER)))


# -- the claim


@pytest.mark.parametrize(
    ("base", "other", "kind"),
    [
        (BASE, GAIN, "better"),
        (GAIN, BASE, "worse"),
        ({1: 2.0, 2: 2.1, 3: 2.2}, {1: 1.99, 2: 2.088, 3: 2.189}, "within noise"),
        ({1: 2.0, 2: 2.1, 3: 2.2}, {1: 1.8, 2: 1.7, 3: 1.6}, "not sure"),
        ({1: 2.0, 2: 2.1, 3: 2.2}, {1: 2.6, 2: 2.5, 3: 2.4}, "not sure"),
        ({1: 2.0}, {1: 1.0}, "no claim"),
        ({1: 2.0, 2: 2.01}, {1: 1.0}, "no claim"),
        ({1: 2.0}, {1: 1.0, 2: 1.01}, "no claim"),
        ({1: 2.0, 2: 2.0}, {1: 2.0, 2: 2.0}, "within noise"),
        ({1: 2.0, 2: 2.0}, {1: 1.5, 2: 1.5}, "better"),
        ({1: 2.0, 2: 2.0}, {1: 2.5, 2: 2.5}, "worse"),
    ],
)
def test_the_kind_of_a_claim(base: dict[int, float], other: dict[int, float], kind: str) -> None:
    result = claim(base, other)
    assert result.kind == kind
    assert ("is better than" in result.text) == (kind == "better")
    assert ("is worse than" in result.text) == (kind == "worse")
    assert result.text.startswith("No claim") == (kind in ("no claim", "not sure"))


@pytest.mark.parametrize(
    ("mean", "interval", "floor", "kind", "verdict"),
    [
        (-0.1, (-0.2, -0.05), 0.05, "better", "better"),
        (0.1, (0.05, 0.2), 0.05, "worse", "worse"),
        (-0.1, (-0.2, -0.05), 0.1, "within noise", "within noise"),  # a mean at the floor counts as noise
        (0.1, (0.05, 0.2), 0.1, "within noise", "within noise"),
        (-0.1, (-0.2, -0.05), 0.0999, "better", "better"),
        (-0.1, (-0.2, 0.0), 0.05, "not sure", "not sure"),  # an interval that ends at zero contains zero
        (0.1, (0.0, 0.2), 0.05, "not sure", "not sure"),
        (-0.1, (-0.2, -1e-12), 0.05, "better", "better"),
        (0.1, (1e-12, 0.2), 0.05, "worse", "worse"),
        (-0.1, (-0.3, 0.1), 0.05, "not sure", "not sure"),
        (-0.1, (-0.3, 0.1), 0.2, "within noise", "within noise"),
        (0.0, (0.0, 0.0), 0.0, "within noise", "within noise"),
        (-0.1, None, 0.05, "no claim", "no claim: one seed"),
        (-0.1, (-0.2, -0.05), None, "no claim", "no claim: one seed"),
    ],
)
def test_the_kind_of_a_claim_at_its_limits(
    mean: float, interval: Any, floor: float | None, kind: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    d: Any = SimpleNamespace(mean=mean, interval=interval, seeds=(1, 2), paired=True, n_a=2, n_b=2)
    noise: Any = None if floor is None else SimpleNamespace(floor=floor)
    monkeypatch.setattr(stats, "difference", lambda a, b: d)
    e = make_data(make_recipe("baseline", {1: 2.0}), make_recipe("optimized", {1: 1.9}))
    e.__dict__["noise"] = noise
    result = findings.claim(e)
    assert result.kind == kind and result.difference is d
    assert tables.verdict(d, noise) == verdict


def test_a_better_claim_gives_its_numbers() -> None:
    half = T2 * 0.01 / math.sqrt(3)
    floor = T4 * math.sqrt(2) * 0.01
    text = claim(BASE, GAIN).text
    assert text.startswith("optimized is better than baseline")
    for part in (
        "falls by 0.2000 (",
        f"{MINUS}{0.2 + half:.4f} to {MINUS}{0.2 - half:.4f}",
        "3 paired seeds",
        f"{0.2 / floor:.1f} times",
        f"floor of {floor:.4f}",
    ):
        assert part in text
    assert "with no noise between seeds" in claim({1: 2.0, 2: 2.0}, {1: 1.5, 2: 1.5}).text


def test_a_worse_claim_gives_its_numbers() -> None:
    half = T2 * 0.01 / math.sqrt(3)
    text = claim(GAIN, BASE).text
    assert text.startswith("optimized is worse than baseline") and "rises by 0.2000 (" in text
    assert f"+{0.2 - half:.4f} to +{0.2 + half:.4f}" in text and "times the noise floor" in text


def test_a_claim_within_noise_gives_its_numbers() -> None:
    result = claim({1: 2.0, 2: 2.1, 3: 2.2}, {1: 1.99, 2: 2.088, 3: 2.189})
    floor = T4 * math.sqrt(2) * math.sqrt((0.01 + 0.009901) / 2)
    assert "optimized is no better than baseline" in result.text
    assert f"{MINUS}0.0110 nats" in result.text and f"floor of {floor:.4f}" in result.text
    assert "3 paired seeds" in result.text and result.difference is not None


def test_an_unsure_claim_gives_its_numbers() -> None:
    result = claim({1: 2.0, 2: 2.1, 3: 2.2}, {1: 1.8, 2: 1.7, 3: 1.6})
    half = T2 * 0.2 / math.sqrt(3)
    assert (
        f"{MINUS}0.4000" in result.text
        and f"{MINUS}{0.4 + half:.4f} to +{half - 0.4:.4f}" in result.text
        and "zero" in result.text
    )
    assert result.difference is not None


@pytest.mark.parametrize(
    ("base", "other", "sentence"),
    [
        (
            {1: 2.0},
            {1: 1.9},
            ("baseline was run with one seed", "optimized with one seed", f"{MINUS}0.1000 nats"),
        ),
        ({1: 2.0, 2: 2.2}, {3: 2.2}, ("baseline was run with 2 seeds", "optimized with one seed", "+0.1000")),
    ],
)
def test_no_claim_gives_the_number_of_seeds(
    base: dict[int, float], other: dict[int, float], sentence: tuple[str, ...]
) -> None:
    result = claim(base, other)
    assert result.difference is not None and all(part in result.text for part in sentence)


def test_no_claim_without_two_recipes() -> None:
    none = findings.claim(make_data())
    assert (none.kind, none.difference) == ("no claim", None) and "no run" in none.text
    one = findings.claim(make_data(make_recipe("baseline", BASE)))
    assert (one.kind, one.difference) == ("no claim", None) and "baseline is the only recipe" in one.text


@pytest.mark.parametrize("which", ["baseline", "optimized"])
def test_no_claim_for_a_recipe_that_failed(which: str) -> None:
    guards = {name: failing() if name == which else [] for name in ("baseline", "optimized")}
    recipes = [make_recipe(name, BASE, guards=guards[name]) for name in guards]
    bad = recipes[list(guards).index(which)]
    bad.runs[1].summary["guards"] = failing(name="targets_unseen")
    result = findings.claim(make_data(*recipes))
    assert (result.kind, result.difference) == ("no claim", None)
    assert (
        result.text
        == f"No claim: every run of {which} failed a guard (causality, targets_unseen), so it has no figure."
    )


def test_how_seeds_are_counted() -> None:
    assert (
        findings.count_seeds(1) == "one seed"
        and findings.count_seeds(2) == "2 seeds"
        and findings.count_seeds(0) == "0 seeds"
    )
    assert (
        findings.describe_seeds(stats.difference({1: 1.0, 2: 1.1, 5: 1.2}, {1: 1.0, 2: 1.2, 6: 1.0}))
        == "2 paired seeds"
    )
    assert (
        findings.describe_seeds(stats.difference({1: 1.0, 2: 1.1}, {3: 1.0, 4: 1.2, 5: 1.1}))
        == "2 and 3 seeds, not paired"
    )


# -- the cost


def pair(base: dict[str, Any] | None = None, other: dict[str, Any] | None = None) -> tuple[Recipe, Recipe]:
    return make_recipe("baseline", {1: 2.0, 2: 2.0}, **(base or {})), make_recipe(
        "optimized", {1: 1.9, 2: 1.9}, OTHER, **(other or {})
    )


def test_the_cost_is_given_as_ratios_of_means() -> None:
    a, b = pair(
        {"flops": 2e12, "params": 1000, "seconds": 10.0}, {"flops": 3e12, "params": 2500, "seconds": 12.0}
    )
    b.runs[1].summary.update(flops=5e12, seconds=13.0, params=9)
    sentence = findings.cost(make_data(a, b))
    assert sentence == (
        "optimized takes 2.00 times the FLOPs (4e12 against 2e12), "
        "2.50 times the parameters (2,500 against 1,000) "
        "and 1.25 times the time (12.5 s against 10.0 s) of baseline."
    )


def test_a_run_that_failed_a_guard_is_excluded_from_the_cost() -> None:
    a, b = pair(other={"flops": 4e9})
    b.runs[0].summary.update(flops=1e15, seconds=1e6, guards=failing())
    sentence = findings.cost(make_data(a, b))
    assert "2.00 times the FLOPs" in sentence and "1.00 times the time" in sentence


@pytest.mark.parametrize("missing", ["both", "other", "base", "failed", "base failed"])
def test_no_cost_without_two_recipes(missing: str) -> None:
    a, b = pair(
        {"guards": failing()} if missing == "base failed" else None,
        {"guards": failing()} if missing == "failed" else None,
    )
    others = {"both": make_data(), "other": make_data(a), "base": ReportData((b,), (), None, b)}
    e = others.get(missing, make_data(a, b))
    assert findings.cost(e).startswith("Cost: not compared")


@pytest.mark.parametrize(
    ("seconds", "ratio"),
    [
        ((10.0, 12.5), None),
        ((10.0, 12.6), "1.3"),
        ((30.0, 10.0), "3.0"),
        ((10.0, 10.0), None),
        ((10.0, 12.50001), "1.3"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_busy_machine_is_detected(which: int, seconds: tuple[float, float], ratio: str | None) -> None:
    recipes = pair()
    for run, took in zip(recipes[which].runs, seconds, strict=True):
        run.summary["seconds"] = took
    sentence = findings.cost(make_data(*recipes))
    assert ("busy" in sentence) == (ratio is not None) and "the time (" in sentence
    if ratio:
        assert f"up to {ratio} times as long" in sentence


@pytest.mark.parametrize(
    ("key", "value", "compared"),
    [
        ("device", "cuda", False),
        ("instructions", "AVX512", False),
        ("processes", 2, False),
        ("dtype", "bfloat16", True),
        ("threads", 8, True),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_time_is_compared_on_one_machine(which: int, key: str, value: Any, compared: bool) -> None:
    recipes = pair()
    run = recipes[which].runs[1]
    run.summary["machine_class"] = run.summary["machine_class"] | {key: value}
    sentence = findings.cost(make_data(*recipes))
    assert ("the time (" in sentence) == compared
    assert ("on different machines" in sentence) == (not compared)


def test_a_run_that_failed_on_another_machine_does_not_count() -> None:
    recipes = pair()
    recipes[1].runs[1].summary.update(machine_class={"device": "cuda"}, guards=failing())
    assert "the time (" in findings.cost(make_data(*recipes))


@pytest.mark.parametrize(
    ("reused", "named"),
    [((0, 0), ""), ((3, 0), "baseline"), ((0, 1), "optimized"), ((1, 1), "baseline and optimized")],
)
def test_time_is_not_compared_over_steps_from_the_store(reused: tuple[int, int], named: str) -> None:
    recipes = pair()
    for recipe, n in zip(recipes, reused, strict=True):
        recipe.runs[1].summary["ledger"] = {"reused": n}
        del recipe.runs[0].summary["ledger"]
        recipe.runs[0].summary["machine_class"] = {"device": recipe.name}
    sentence = findings.cost(make_data(*recipes))
    assert ("the time (" in sentence) is False and ("machines" in sentence) == (not named)
    if named:
        assert f"since {named} took steps from the store" in sentence


# -- the ablation

LADDER = ("ablation:baseline", "ablation:size", "ablation:bfloat16", "ablation:adamw")


def ladder(*scores: dict[int, float]) -> Any:
    return make_data(
        *(
            make_recipe(name, fulls, {"lr": 0.001 * (i + 1)})
            for i, (name, fulls) in enumerate(zip(LADDER, scores, strict=False))
        )
    )


def test_the_best_step_is_named_with_its_evidence() -> None:
    e = ladder({1: 3.0, 2: 3.01}, {1: 2.5, 2: 2.51}, {1: 2.5, 2: 2.512}, {1: 2.6, 2: 2.61})
    (sentence,) = findings.ablation_sentences(e)
    assert sentence.startswith(
        f"Of the 3 steps from baseline to adamw, size lowers full most ({MINUS}0.5000, better); "
    )
    backed = [row[7] for row in tables.ablation(e).rows[1:]]
    assert f"{sum(v in ('better', 'worse') for v in backed)} of 3 changes are backed" in sentence
    assert "1 is within noise" in sentence


def test_the_best_step_has_the_largest_decrease_not_the_lowest_score() -> None:
    (sentence,) = findings.ablation_sentences(ladder({1: 3.0, 2: 3.01}, {1: 2.5, 2: 2.51}, {1: 2.3, 2: 2.31}))
    assert f"size lowers full most ({MINUS}0.5000" in sentence


def test_no_step_lowers_full() -> None:
    (sentence,) = findings.ablation_sentences(ladder({1: 2.0, 2: 2.01}, {1: 2.0, 2: 2.01}, {1: 2.5, 2: 2.51}))
    assert (
        sentence.startswith("None of the 2 steps from baseline to bfloat16 lowers full; ")
        and "1 of 2 changes" in sentence
    )


def test_several_steps_within_noise() -> None:
    (sentence,) = findings.ablation_sentences(ladder({1: 2.0, 2: 2.1}, {1: 2.0, 2: 2.11}, {1: 2.01, 2: 2.1}))
    assert "0 of 2 changes are backed" in sentence and "2 are within noise" in sentence


def test_with_one_seed_per_step_no_change_is_backed() -> None:
    (sentence,) = findings.ablation_sentences(ladder({1: 2.0}, {1: 1.9}, {1: 1.7}))
    assert (
        f"bfloat16 lowers full most ({MINUS}0.2000, no claim: one seed)" in sentence
        and "none of the changes is backed" in sentence
    )


def test_without_a_ladder_there_is_no_sentence() -> None:
    assert list(findings.ablation_sentences(make_data(make_recipe("baseline", BASE)))) == []


# -- a study


def test_the_sentence_of_a_study() -> None:
    bare = make_study(make_trial(0), make_trial(1))
    assert findings.study_sentence(bare) == "The study lr has 2 trials."
    lost = make_study(make_trial(0), make_trial(1, None, "diverged"), make_trial(2, 1.0, "failed"))
    assert findings.study_sentence(lost) == "The study lr has 3 trials, 2 of them without a value."
    full = make_study(make_trial(0), claim="trial 0 wins", importance={"lr": 0.25, "beta": 0.7512, "wd": 0.3})
    full.facts["ledger"] = {"asked": 4000, "trained": 3000}
    assert findings.study_sentence(full) == (
        "The study lr has 1 trials: trial 0 wins; beta matters most (importance 0.751); "
        "of 4,000 steps requested, 3,000 were trained."
    )


@pytest.mark.parametrize("ledger", [{"asked": 0, "trained": 0}, {"asked": 10}, {"trained": 10}])
def test_steps_are_given_only_if_both_counts_are_known(ledger: dict[str, float]) -> None:
    assert "steps" not in findings.study_sentence(make_study(make_trial(0), ledger=ledger))


# -- the coverage of the official score


@pytest.mark.parametrize(
    ("coverages", "kind"),
    [
        ((0.98, 0.99), "all"),
        ((0.97, 1.0), "all"),
        ((0.9699, 1.0), "low"),
        ((1.0, 0.65), "low"),
        ((1.0, 1.0), "all"),
    ],
)
def test_the_lowest_coverage_decides_the_sentence(coverages: tuple[float, float], kind: str) -> None:
    runs = [make_run(seed=seed, last=score(coverage=share)) for seed, share in enumerate(coverages, 1)]
    sentence = findings.coverage_sentence(make_data(Recipe("baseline", tuple(runs))))
    worst = min(range(2), key=lambda i: coverages[i])
    assert f"{100 * coverages[worst]:.1f}%" in sentence
    assert (runs[worst].id in sentence and "under 97%" in sentence and "not compared" in sentence) == (
        kind == "low"
    )
    assert ("in every run" in sentence) == (kind == "all")


@pytest.mark.parametrize("early", [0, 1, 2])
def test_runs_that_scored_lower_before_their_end(early: int) -> None:
    runs = [make_run(seed=seed, best=score(step=STEPS - 1 if seed <= early else STEPS)) for seed in (1, 2)]
    sentence = findings.coverage_sentence(make_data(Recipe("baseline", tuple(runs))))
    assert (f"{early} of 2 runs scored lower before their end" in sentence) == (early > 0)
    assert ("no step was chosen" in sentence) == (early == 0)


def test_without_runs_no_score_is_reported() -> None:
    assert findings.coverage_sentence(make_data()) == "No run was given, so no score is reported."


# -- all three findings


def test_the_third_finding_is_the_first_that_the_data_supports() -> None:
    study = make_study(make_trial(0))
    steps = ladder({1: 2.0}, {1: 1.9}, {1: 1.7}).recipes
    runs = (make_recipe("baseline", BASE), make_recipe("optimized", GAIN))
    for e, sentence in (
        (make_data(*runs), findings.coverage_sentence(make_data(*runs))),
        (make_data(*runs, studies=(study,)), findings.study_sentence(study)),
        (make_data(*runs, *steps, studies=(study,)), "Of the 2 steps from baseline to bfloat16, "),
    ):
        first, second, third = findings.findings(e)
        assert first == findings.claim(e).text and second == findings.cost(e) and third.startswith(sentence)
