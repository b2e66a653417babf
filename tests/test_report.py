"""Tests reports of tiny real runs: inputs, errors, claims, and the numbers on the pages."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from evidence import make_data, make_recipe, make_routed_run, make_run, make_study, make_trial, write_run
from reporting import edit, export, fail_guard, make, rescore, reseed
from typer.testing import CliRunner, Result

from mainrun import stats
from mainrun.cli import app
from mainrun.errors import RunError
from reports import cli
from reports.evidence import findings, load, studies, tables
from reports.evidence.figures import forward_flops, grad_norms, horizons, registry, routing, schedules, style

T3 = 4.302653  # the 97.5% quantile of Student's t with 2 degrees of freedom, from a printed table


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import TINY

    from mainrun.config import from_dict

    out = tmp_path_factory.mktemp("made")
    make(out, lambda **changes: from_dict(TINY | {"num_titles": 200} | changes))
    return out


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the runs that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "runs", ignore=shutil.ignore_patterns(".store")))


def of(runs: Path, preset: str) -> dict[int, Path]:
    """Map each seed of a preset to the directory of its run."""
    folders = {
        json.loads((p / "config.json").read_text())["config"]["seed"]: p for p in runs.glob(f"{preset}-*")
    }
    return dict(sorted(folders.items()))


def score(runs: Path, **fulls: list[float]) -> None:
    for preset, values in fulls.items():
        for run, full in zip(of(runs, preset).values(), values, strict=True):
            rescore(run, full)


def invoke(*args: Any) -> Result:
    """Run `mainrun report` in this process."""
    return CliRunner().invoke(app, ["report", *map(str, args)], catch_exceptions=False)


def report(*args: Any, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mainrun", "report", *map(str, args)]
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": root} | env,
        timeout=120,
    )


# -- inputs


def test_runs_are_grouped_into_recipes_and_seeds(runs: Path) -> None:
    e = load.gather([], runs)
    assert {r.name: sorted(r.scores) for r in e.recipes} == {
        "baseline": [1, 2, 3],
        "optimized": [1, 2, 3],
        "grown": [1],
    }
    assert (
        e.baseline is not None
        and e.baseline.name == "baseline"
        and e.optimised is not None
        and e.optimised.name == "optimized"
    )
    for run in e.runs:
        assert run.full == json.loads((run.path / "summary.json").read_text())["last"]["full"]


def test_ids_folders_and_studies_can_be_mixed(runs: Path, tmp_path: Path) -> None:
    study = export(tmp_path / "studies" / "lr")
    some = [of(runs, "baseline")[1].name, str(of(runs, "optimized")[2])]
    e = load.gather([*some, str(study.parent)], runs)
    assert sorted(run.path.name for run in e.runs) == sorted(Path(place).name for place in some)
    assert [s.name for s in e.studies] == ["lr"]
    twice = load.gather([*some, *some, str(study), str(study.parent)], runs)
    assert len(twice.runs) == 2 and len(twice.studies) == 1


def test_the_trials_of_a_study_are_not_runs_of_the_report(runs: Path) -> None:
    study = export(runs / "lr")
    shutil.copytree(of(runs, "baseline")[1], study / "trials" / "0")
    assert len(load.gather([], runs).runs) == 7


def test_recipes_of_one_preset_are_named_by_the_fields_that_differ(runs: Path) -> None:
    reseed(of(runs, "optimized")[1], runs, lr=0.02)
    names = {r.name for r in load.gather([], runs).recipes}
    assert names == {"baseline", "grown", "optimized lr=0.005", "optimized lr=0.02"}


def test_the_optimised_recipe_is_the_one_with_most_seeds(runs: Path) -> None:
    reseed(of(runs, "optimized")[1], runs, lr=0.02)
    e = load.gather([], runs)
    assert e.optimised is not None and e.optimised.name == "optimized lr=0.005"


def test_without_a_name_the_lowest_mean_is_selected_and_the_selection_is_recorded(runs: Path) -> None:
    for run in of(runs, "optimized").values():
        shutil.rmtree(run)
    rescore(of(runs, "grown")[1], 1.0)
    other = reseed(of(runs, "grown")[1], runs, preset="other", lr=0.001)
    rescore(other, 1.1)
    e = load.gather([], runs)
    assert e.optimised is not None and e.optimised.name == "grown"
    assert e.selection == "the lowest mean full score of 2 recipes"


# -- errors


def test_all_problems_are_reported_together(runs: Path, tmp_path: Path) -> None:
    base, opt = of(runs, "baseline"), of(runs, "optimized")
    (base[1] / "summary.json").unlink()
    edit(base[1] / "status.json", lambda status: status.update(state="interrupted"))
    (base[2] / "env.json").unlink()
    edit(opt[1] / "summary.json", lambda summary: summary["last"].update(full=0.5))
    study = export(tmp_path / "half")
    (study / "study.json").unlink()
    done = invoke(runs, study, "no-such-run", "--runs", runs, "--out", tmp_path / "r.pdf")
    assert done.exit_code == 2 and done.stdout == "" and not (tmp_path / "r.pdf").exists()
    assert done.stderr.startswith("error: 5 problems prevent the report:\n")
    for message in (
        f"run {base[1].name} is not finished (interrupted)",
        f"{base[2]} lacks env.json",
        f"{opt[1]}/summary.json says 0.5 for full of the last score",
        f"the study {study} lacks study.json",
        "no run 'no-such-run'",
    ):
        assert message in done.stderr, message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprints": {"val": "f" * 64}}, "the inputs differ in their val fingerprint: "),
        ({"fingerprints": {"corpus": "f" * 64}}, "the inputs differ in their corpus fingerprint: "),
        ({"geometry": [4, 16]}, "the inputs differ in their evaluation geometry: "),
    ],
)
def test_runs_with_different_data_or_spans_are_refused(
    runs: Path, change: dict[str, Any], message: str
) -> None:
    odd = of(runs, "optimized")[2]

    def spoil(summary: dict[str, Any]) -> None:
        for k, v in change.items():
            summary[k] = summary[k] | v if isinstance(v, dict) else v

    edit(odd / "summary.json", spoil)
    with pytest.raises(RunError) as e:
        load.gather([], runs)
    assert (
        message in str(e.value)
        and odd.name in str(e.value)
        and "ffffffffffff" in str(e.value) + "ffffffffffff" * ("geometry" in change)
    )


def test_a_study_with_different_data_is_refused(runs: Path) -> None:
    export(runs / "lr", fingerprints={"val": "0" * 64, "corpus": "0" * 64})
    with pytest.raises(
        RunError, match=r"the inputs differ in their val fingerprint: .*000000000000: study lr"
    ):
        load.gather([], runs)


def test_a_seed_counts_once(runs: Path) -> None:
    other = reseed(of(runs, "baseline")[1], runs, log_every=7)
    rescore(other, 1.0)
    with pytest.raises(RunError, match="seed 1 of baseline has two runs with different results"):
        load.gather([], runs)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="contains no run and no exported study"):
        load.gather([str(tmp_path)], tmp_path)


def test_the_export_in_the_folder_of_a_study_is_read(tmp_path: Path) -> None:
    folder = export(tmp_path / "lr" / "export").parent
    # The driver of a study writes this file, which is not part of an export.
    (folder / "study.json").write_text("{}")
    (s,) = load.gather([], tmp_path).studies
    assert s.path == folder / "export" and len(s.trials) == 40
    shutil.rmtree(folder / "export")
    with pytest.raises(
        RunError, match=r"lr lacks trials.parquet, which `mainrun sweep` writes at the end of a study; resume"
    ):
        load.gather([], tmp_path)


@pytest.mark.parametrize("text", ["not parquet", ""])
def test_a_damaged_export_is_refused(tmp_path: Path, text: str) -> None:
    study = export(tmp_path / "lr")
    (study / "trials.parquet").write_text(text)
    with pytest.raises(RunError, match="cannot be read"):
        load.gather([str(study)], tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "."], "got --out ., which is a folder"),
        # Writing a report to this path would replace the pipe with a file.
        (["--out", "pipe"], "got --out pipe, which is a device or a pipe, not a file"),
        (
            ["--out", "notes.md"],
            "got --out notes.md, which is a file of another kind and would be overwritten",
        ),
        (["--log", "none.md"], "--log none.md is not a file"),
        (["--log", "/proc/self/mem"], "--log /proc/self/mem"),  # reading this file raises an error
        (["--title", "a\nb"], "cannot be printed"),
        (["--samples", "-1"], "--samples"),
    ],
)
def test_invalid_options_are_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    done = invoke(runs, *args)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


# -- claims


def test_a_clear_gain_is_claimed_with_its_numbers(runs: Path) -> None:
    score(runs, baseline=[2.00, 2.01, 2.02], optimized=[1.80, 1.82, 1.81])
    claim = findings.claim(load.gather([], runs))
    apart = [-0.20, -0.19, -0.21]
    half = T3 * statistics.stdev(apart) / 3**0.5
    assert claim.kind == "better"
    assert claim.text.startswith(
        "optimized is better than baseline: full falls by 0.2000 "
        f"(95% interval −{0.2 + half:.4f} to −{0.2 - half:.4f}, 3 paired seeds)"
    )


def test_a_worse_result_is_reported_as_worse(runs: Path) -> None:
    score(runs, baseline=[1.80, 1.82, 1.81], optimized=[2.00, 2.01, 2.02])
    claim = findings.claim(load.gather([], runs))
    assert claim.kind == "worse" and claim.text.startswith(
        "optimized is worse than baseline: full rises by 0.2000"
    )


def test_a_difference_below_the_noise_floor_is_not_claimed(runs: Path) -> None:
    # The optimized recipe is better with every seed, but by only a tenth of the noise between seeds.
    score(runs, baseline=[2.00, 2.10, 2.20], optimized=[1.99, 2.088, 2.189])
    claim = findings.claim(load.gather([], runs))
    assert (
        claim.difference is not None
        and claim.difference.interval is not None
        and claim.difference.interval[1] < 0
    )
    assert (
        claim.kind == "within noise"
        and "is no better than baseline, within the noise" in claim.text
        and "is under the noise floor" in claim.text
    )


def test_an_interval_that_contains_zero_is_not_claimed(runs: Path) -> None:
    score(
        runs, baseline=[2.00, 2.10, 2.20], optimized=[1.80, 1.70, 1.60]
    )  # The mean difference of -0.4 exceeds the noise floor, but the differences vary from -0.2 to -0.6.
    claim = findings.claim(load.gather([], runs))
    assert claim.kind == "not sure" and "its interval contains zero" in claim.text


def test_a_busy_machine_is_mentioned_with_the_time(runs: Path) -> None:
    for run in of(runs, "baseline").values():
        edit(run / "summary.json", lambda s: s.update(seconds=10.0))
    for run, seconds in zip(of(runs, "optimized").values(), (12.0, 12.5, 12.5), strict=True):
        edit(run / "summary.json", lambda s, seconds=seconds: s.update(seconds=seconds))
    assert "busy" not in findings.cost(load.gather([], runs))
    edit(of(runs, "optimized")[2] / "summary.json", lambda s: s.update(seconds=24.0))
    assert "took up to 2.0 times as long in another run" in findings.cost(load.gather([], runs))


@pytest.mark.parametrize("preset", ["baseline", "optimized"])
def test_with_one_seed_nothing_is_claimed(runs: Path, preset: str) -> None:
    for seed in (2, 3):
        shutil.rmtree(of(runs, preset)[seed])
    claim = findings.claim(load.gather([], runs))
    assert (
        claim.kind == "no claim"
        and f"{preset}{' was run' if preset == 'baseline' else ''} with one seed" in claim.text
        and "better than" not in claim.text
    )


def test_a_run_that_failed_a_guard_is_excluded_from_the_headline(runs: Path) -> None:
    score(runs, baseline=[2.00, 2.01, 2.02], optimized=[1.80, 0.10, 1.81])
    fail_guard(of(runs, "optimized")[2])
    e = load.gather([], runs)
    claim = findings.claim(e)
    assert (
        claim.difference is not None
        and claim.difference.seeds == (1, 3)
        and claim.difference.b == pytest.approx(1.805)
    )
    assert e.noise is not None and e.noise.df == 3
    shown = tables.runs(e)
    assert {shown.rows[i][0] for i in shown.red} == {of(runs, "optimized")[2].name}
    assert all(0.1 not in row for row in tables.recipes(e).rows)
    failures = tables.failures(e)
    assert failures is not None and [row[2] for row in failures.rows] == [
        "causality: logits change with the future at position 3"
    ]


def test_a_recipe_whose_runs_all_failed_has_no_figure(runs: Path) -> None:
    for run in of(runs, "optimized").values():
        fail_guard(run)
    e = load.gather([], runs)
    assert (
        findings.claim(e).text
        == "No claim: every run of optimized failed a guard (causality), so it has no figure."
    )
    assert findings.findings(e)[1].startswith("Cost: not compared")


def test_the_cost_says_why_time_is_not_compared(runs: Path) -> None:
    e = load.gather([], runs)
    assert "the time (" in findings.cost(e)
    edit(
        of(runs, "optimized")[1] / "summary.json",
        lambda s: s["machine_class"].update(device="another processor"),
    )
    assert "time is not compared, since the runs were on different machines" in findings.cost(
        load.gather([], runs)
    )
    edit(of(runs, "baseline")[1] / "summary.json", lambda s: s["ledger"].update(reused=5))
    assert "time is not compared, since baseline took steps from the store" in findings.cost(
        load.gather([], runs)
    )


def test_low_coverage_is_a_finding(runs: Path) -> None:
    for run in of(runs, "grown").values():
        shutil.rmtree(run)
    low = of(runs, "baseline")[1]
    rows = [json.loads(line) for line in (low / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["event"] == "eval":
            row["coverage"] = 0.65
    (low / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rescore(low, 2.5)
    assert (
        f"The official score of {low.name} covers 65.0% of val, under 97%"
        in findings.findings(load.gather([], runs))[2]
    )


def test_the_ablation_is_in_the_order_of_its_preset(runs: Path) -> None:
    start = of(runs, "baseline")
    for step, lr, fulls in (
        ("baseline", 0.01, (3.0, 3.01)),
        ("muon", 0.011, (2.0, 2.01)),
        ("adamw", 0.012, (2.5, 2.51)),
    ):
        for seed, full in zip((1, 2), fulls, strict=True):
            rescore(reseed(start[seed], runs, preset=f"ablation:{step}", lr=lr), full)
    e = load.gather([], runs)
    assert [r.cfg.preset for r in e.ladder] == ["ablation:baseline", "ablation:adamw", "ablation:muon"]
    table = tables.ablation(e)
    assert table is not None
    assert [row[0] for row in table.rows] == ["baseline", "adamw", "muon"]
    assert [row[3] for row in table.rows[1:]] == pytest.approx([-0.5, -0.5])
    assert findings.findings(e)[2].startswith("Of the 2 steps from baseline to muon, ")


def test_one_recipe_under_two_names_counts_once_in_the_noise(runs: Path) -> None:
    before = load.gather([], runs).noise
    for seed, run in of(runs, "baseline").items():
        reseed(run, runs, preset="same", seed=seed)
    e = load.gather([], runs)
    assert e.noise == before and "same" in {r.name for r in e.recipes}


# -- studies


def test_trials_steps_and_rungs_of_a_study(tmp_path: Path) -> None:
    e = load.gather([str(export(tmp_path / "lr"))], tmp_path)
    (s,) = e.studies
    failed = [t for t in range(40) if t % 13 == 12]
    whole = [t for t in range(40) if t % 2 == 0 and t not in failed]
    assert len(s.trials) == 40 and [t["trial"] for t in s.trials if load.is_failed(t)] == failed
    assert [t["trial"] for t in s.completed] == whole
    assert s.searched_fields == ["lr", "optimizer"]  # all trials have the same momentum
    n, pruned = len(whole), 40 - len(whole) - len(failed)
    assert studies.ledger(s) == {
        "asked": 30 * n + 10 * (pruned + len(failed)),
        "trained": 20 * n + 10 * (pruned + len(failed)),
        "reused": 10 * n,
        "wasted": 10 * (pruned + len(failed)),
    }
    all_of_it = {"asked": 9000, "trained": 8000, "reused": 1000, "wasted": 70}
    s.facts["ledger"] = all_of_it | {"flops": 1e12}
    assert studies.ledger(s) == all_of_it, "the steps of the confirmation count too"
    (rung,) = studies.rungs(s)
    assert rung.number == 0
    assert rung.values == [json.loads(t["scores"])["0"] for t in s.completed]
    assert rung.last == [t["value"] for t in s.completed]
    assert rung.correlation == stats.spearman(rung.values, rung.last)
    assert rung.correlation is not None and rung.correlation < 1
    assert findings.claim(e).kind == "no claim"
    failures = tables.failures(e)
    assert (
        failures is not None
        and [row[1] for row in failures.rows] == [*["diverged"] * len(failed), "pruned"]
        and "diverged at step 9" in failures.rows[0][2]
    )


def test_an_exported_importance_is_used_as_it_is(tmp_path: Path) -> None:
    exported = {"params.lr": 0.9, "momentum": 0.2, "beta": None}
    (s,) = load.gather([str(export(tmp_path / "lr", importance=exported))], tmp_path).studies
    assert studies.importance(s) == {"lr": 0.9, "momentum": 0.2}


def test_importance_is_that_of_ped_anova(tmp_path: Path) -> None:
    """The importances equal those of Optuna for a logarithmic `lr` and a categorical `optimizer`."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    (s,) = load.gather([str(export(tmp_path / "lr", trials=200))], tmp_path).studies
    rates = [t["params.lr"] for t in s.completed]
    distributions = {
        "lr": optuna.distributions.FloatDistribution(min(rates), max(rates), log=True),
        "optimizer": optuna.distributions.CategoricalDistribution(["adamw", "muon", "sgd"]),
    }
    study = optuna.create_study()
    for t in s.completed:
        params = {"lr": t["params.lr"], "optimizer": t["params.optimizer"]}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=t["value"])
        )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
    expected = get_param_importances(study, evaluator=evaluator, normalize=True)
    shares = studies.importance(s)
    assert shares == pytest.approx(expected)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["optimizer"] > shares["lr"] > 0
    assert studies.importance(s) == shares, "the same in every report"


def study_of(settings: Sequence[Mapping[str, Any]], values: Sequence[float]) -> load.Study:
    trials = []
    for number, (fields, value) in enumerate(zip(settings, values, strict=True)):
        params = {f"params.{name}": setting for name, setting in fields.items()}
        trials.append(make_trial(number, value, **params))
    return make_study(*trials)


def test_a_field_that_decides_the_value_has_all_the_importance() -> None:
    settings = [{"lr": t / 40, "flag": t % 2 == 0, "one": "x"} for t in range(40)]
    shares = studies.importance(study_of(settings, [setting["lr"] for setting in settings]))
    assert shares.keys() == {"lr", "flag"}, "a field with one value was not searched"
    assert shares["lr"] > 0.9


def test_a_field_may_be_active_in_some_trials_only() -> None:
    settings: list[dict[str, Any]] = [{"lr": t / 40} for t in range(40)]
    for setting in settings[:12]:
        setting["momentum"] = setting["lr"] ** 2
    for setting in settings[:9]:
        setting["beta"] = setting["lr"]
    study = study_of(settings, [setting["lr"] for setting in settings])
    study.trials[0].update({"params.momentum": 0.0, "params.beta": 0.0})
    assert studies.importance(study).keys() == {"lr", "momentum"}, "beta has 9 trials, one too few"


@pytest.mark.parametrize(
    ("count", "values"),
    [
        (9, lambda t: t),  # the importances are computed from at least ten trials
        (40, lambda t: 1.0),  # all trials are equally good
        (
            40,
            lambda t: -float(t == 0),
        ),  # All trials but the best one have equal values, so every trial counts as one of the best quarter.
    ],
)
@pytest.mark.filterwarnings("error")
def test_no_importance_where_it_cannot_be_computed(count: int, values: Callable[[int], float]) -> None:
    study = study_of([{"lr": t / 40} for t in range(count)], list(map(values, range(count))))
    shares = studies.importance(study)
    assert shares == {}
    assert registry.STUDY["importance"].draw(study) is None


@pytest.mark.parametrize(
    "lacking",
    [
        ("evidence", "objective", "preset", "name"),
        pytest.param(("study", "rung_correlation"), marks=pytest.mark.slow),
    ],
)
def test_optional_facts_of_an_export_can_be_missing(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    study = export(tmp_path / "lr")
    edit(study / "study.json", lambda facts: [facts.pop(k) for k in lacking])
    wrote = cli.write(load.gather([str(study)], tmp_path), tmp_path / "r.pdf", "A study alone")
    assert wrote["studies"] == 1 and (tmp_path / "r.pdf").stat().st_size > 10_000


def test_optional_columns_of_an_export_can_be_missing(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    study = export(tmp_path / "lr")
    thin = pq.read_table(study / "trials.parquet").select(["trial", "state", "value", "params.lr"])
    pq.write_table(thin, study / "trials.parquet")
    cli.write(load.gather([str(study)], tmp_path), tmp_path / "r.pdf", "A study alone")
    pq.write_table(thin.select(["trial"]), study / "trials.parquet")
    with pytest.raises(RunError, match=r"trials\.parquet must have the columns trial, state and value"):
        load.gather([str(study)], tmp_path)


def test_the_failures_of_a_log_are_quoted(tmp_path: Path) -> None:
    from reports.evidence.pages import failures_in_log

    log = tmp_path / "b.md"
    log.write_text("- [Deeper](deep.md) was **slower**.\n- Wider was better.\n- The run\n  diverged.\n")
    assert failures_in_log(log) == ["Deeper was slower.", "The run diverged."]
    assert failures_in_log(None) == []


# -- the pages


@pytest.fixture(scope="module")
def pages(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a report, its figures and tables, and all its inputs."""
    from reports.evidence.load import gather

    folder = tmp_path_factory.mktemp("pages")
    export(folder / "lr")
    runs = Path(shutil.copytree(made, folder / "runs", ignore=shutil.ignore_patterns(".store")))
    log = folder / "log.md"
    log.write_text("# Log\n\n- Wider was worse by far.\n- Deeper was better.\n")
    fail_guard(of(runs, "baseline")[3])
    e = gather([str(runs), str(folder / "lr")], runs)
    cli.write(e, folder / "report.pdf", "A title <of> & all", folder / "figures", folder / "tables", log)
    return folder


def words(pdf: Path) -> list[tuple[int, str, float, float, float]]:
    """Return the page, the text, the position (x, y) and the font size of every piece of text."""
    from pypdf import PdfReader

    pieces: list[tuple[int, str, float, float, float]] = []
    for n, page in enumerate(PdfReader(pdf).pages):

        def visit(text: str, cm: Any, tm: Any, font: Any, size: float, n: int = n) -> None:
            if text.strip():
                x, y = tm[4] * cm[0] + tm[5] * cm[2] + cm[4], tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
                scale = (
                    abs((tm[0] * tm[3] - tm[1] * tm[2]) * (cm[0] * cm[3] - cm[1] * cm[2])) ** 0.5
                )  # This formula is also correct for rotated text.
                pieces.append((n, text.strip(), x, y, size * scale))

        page.extract_text(visitor_text=visit)
    return pieces


def text_of(pdf: Path) -> str:
    from pypdf import PdfReader

    return "\n".join(page.extract_text() for page in PdfReader(pdf).pages)


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, (int, float)):
        return {float(value)}
    if isinstance(value, str):
        return {float(n) for n in re.findall(r"\d+\.\d+(?:e-?\d+)?|\d+", value.replace(",", ""))}
    parts = value.values() if isinstance(value, dict) else value
    return set().union(*map(numbers_in, parts)) if parts else set()


def known(folder: Path) -> set[float]:
    """Return all numbers in the inputs, and all numbers that can be computed from the inputs."""
    import pyarrow.parquet as pq

    numbers, scores = set(), {}
    for run in (folder / "runs").iterdir():
        files = {
            name: json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary", "env")
        }
        rows = [
            json.loads(line)
            for name in ("metrics", "growth")
            if (run / f"{name}.jsonl").is_file()
            for line in (run / f"{name}.jsonl").open()
        ]
        numbers |= numbers_in(files) | numbers_in(rows)
        numbers.add(100 * files["summary"]["last"]["coverage"])
        if not any(g["status"] == "fail" for g in files["summary"]["guards"]):
            last, cfg = files["summary"]["last"], files["config"]["config"]
            means = {"full": last["full"], "official": last["official"], "flops": files["summary"]["flops"]}
            scores.setdefault(cfg["preset"], {})[cfg["seed"]] = means | {
                k: files["summary"][k] for k in ("seconds", "params")
            }
    full = {preset: {seed: s["full"] for seed, s in mine.items()} for preset, mine in scores.items()}
    squares = sum(statistics.variance(v.values()) * (len(v) - 1) for v in full.values() if len(v) > 1)
    df = sum(len(v) - 1 for v in full.values())
    t = {1: 12.706205, 2: 4.302653, 3: 3.182446}
    sd = (squares / df) ** 0.5
    floor = t[df] * 2**0.5 * sd
    numbers |= {sd, floor}
    for mine in full.values():
        v = list(mine.values())
        if len(v) > 1:
            numbers |= {statistics.stdev(v), t[len(v) - 1] * statistics.stdev(v) / len(v) ** 0.5}
    for mine in scores.values():
        for some in (mine, {seed: s for seed, s in mine.items() if seed in full["baseline"]}):
            numbers |= (
                {statistics.fmean(s[k] for s in some.values()) for k in next(iter(mine.values()))}
                if some
                else set()
            )
    a, b = full["baseline"], full["optimized"]
    apart = [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]
    middle, half = statistics.fmean(apart), t[len(apart) - 1] * statistics.stdev(apart) / len(apart) ** 0.5
    numbers |= {middle, middle - half, middle + half, abs(middle) / floor}
    for k in ("flops", "seconds", "params"):
        x, y = (statistics.fmean(s[k] for s in scores[p].values()) for p in ("baseline", "optimized"))
        numbers.add(y / x)
    study = pq.read_table(folder / "lr" / "trials.parquet").to_pylist()
    numbers |= numbers_in(json.loads((folder / "lr" / "study.json").read_text())) | numbers_in(study)
    pairs = [list(json.loads(t["scores"]).values()) for t in study if t["state"] == "done"]
    numbers.add(stats.spearman(*zip(*pairs, strict=True)) or 0.0)
    (s,) = load.gather([str(folder / "lr")], folder).studies
    numbers.add(s.completed[0]["value"] - min(t["value"] for t in s.completed))
    numbers |= set(studies.importance(s).values())  # another test checks the importances
    every = [json.loads((run / "summary.json").read_text()) for run in (folder / "runs").iterdir()]
    return numbers | {sum(s["flops"] for s in every), sum(s["seconds"] for s in every) / 60}


def ticks(folder: Path) -> set[str]:
    """Return the tick labels of the figures."""
    from xml.etree import ElementTree

    trees = [ElementTree.parse(svg) for svg in (folder / "figures").glob("*.svg")]
    groups = [
        g
        for tree in trees
        for g in tree.iter("{http://www.w3.org/2000/svg}g")
        if re.match("[xy]tick_", g.get("id", ""))
    ]
    return {
        text.strip().replace("\N{MINUS SIGN}", "-") for g in groups for text in g.itertext() if text.strip()
    }


def unknown(folder: Path) -> list[str]:
    """Return all decimal numbers on the pages that are neither tick labels nor computed from the inputs."""
    allowed, at_axes = known(folder), ticks(folder)
    text = text_of(folder / "report.pdf").replace("\N{MINUS SIGN}", "-")
    wrong = []
    for token in re.findall(r"(?<![\w.])-?\d[\d,]*\.\d{3,}(?:e-?\d+)?(?![\w.])|(?<![\w.])\d\.\d+e\d+", text):
        number = float(token.replace(",", ""))
        decimals = len(token.split("e")[0].split(".")[1])
        slack = 0.5000001 * 10.0 ** (-decimals + (int(token.split("e")[1]) if "e" in token else 0))
        if token not in at_axes and not any(abs(abs(number) - abs(k)) <= slack for k in allowed):
            wrong.append(token)
    return wrong


def test_every_number_in_the_report_follows_from_the_inputs(pages: Path) -> None:
    assert unknown(pages) == []
    text = text_of(pages / "report.pdf")
    for run in (pages / "runs").iterdir():
        last = json.loads((run / "summary.json").read_text())["last"]
        for shown in (
            f"{last['full']:.4f}",
            f"{last['official']:.4f}",
            f"{last['bits_per_byte']:.4f}",
            run.name[:8],
        ):
            assert shown in text


def test_a_number_that_does_not_follow_from_the_inputs_is_detected(pages: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pages, tmp_path / "pages"))
    for run in of(folder / "runs", "optimized").values():
        rescore(run, 0.1234)
    assert unknown(folder)
    assert tables.fixed(4)(0.98765) not in text_of(pages / "report.pdf")


def test_pages_outline_and_properties(pages: Path) -> None:
    from pypdf import PdfReader

    pdf = PdfReader(pages / "report.pdf")
    n = len(pdf.pages)
    assert n > 5
    for i, page in enumerate(pdf.pages, 1):
        assert f"page {i} of {n}" in page.extract_text()
    titles = [entry.title for entry in pdf.outline if not isinstance(entry, list)]
    assert titles[0] == "Result" and titles[-1] == "Appendix"
    assert {
        "Loss against what it costs",
        "Recipes and runs",
        "How they trained",
        "Study lr",
        "What failed",
    } <= set(titles)
    properties = pdf.metadata
    assert (
        properties is not None
        and properties.title == "A title <of> & all"
        and of(pages / "runs", "optimized")[1].name in (properties.get("/Keywords") or "")
    )
    fonts = {
        str(font)
        for page in pdf.pages
        for font in re.findall(r"/[A-Z]{6}\+[\w-]+", str(page["/Resources"]["/Font"]))
    }
    base = {
        str(f.get_object()["/BaseFont"]) for page in pdf.pages for f in page["/Resources"]["/Font"].values()
    }
    assert {name.split("+")[-1] for name in base | fonts} <= {"DejaVuSans", "DejaVuSans-Bold", "/Helvetica"}


def test_no_text_is_small_or_leaves_the_page(pages: Path) -> None:
    from reportlab.pdfbase.pdfmetrics import stringWidth

    from reports.evidence.pdf import register_fonts

    register_fonts()
    pieces = words(pages / "report.pdf")
    assert len(pieces) > 300
    for page, text, x, y, size in pieces:
        assert size > 6.9, (page, text, size)
        assert 20 < y < 842 - 20 and x > 20, (page, text, x, y)
        assert x + max(stringWidth(line, style.FONT, size) for line in text.splitlines()) < 595 - 20, (
            page,
            text,
            x,
        )
    for svg in (pages / "figures").glob("*.svg"):
        sizes = [float(s) for s in re.findall(r"(?:font-size|font): ?([\d.]+)px", svg.read_text())]
        assert sizes and min(sizes) >= 7, svg.name


def test_a_head_of_two_lines_is_as_wide_as_its_longer_line() -> None:
    from reports.evidence import pdf

    pdf.register_fonts()
    assert pdf._longest(["forward\nFLOPs", "1"]) == pdf._longest(["forward", "1"])
    assert pdf._longest(["forward\nFLOPs", "1"]) > pdf._longest(["FLOPs", "1"])


def red(pdf: Path) -> list[str]:
    """Return all red text outside the figures."""
    from pypdf import PdfReader

    texts = []
    for page in PdfReader(pdf).pages:
        fill: list[float] = []

        def before(op: bytes, args: Any, *_: Any, fill: list[float] = fill) -> None:
            if op == b"rg":
                fill[:] = [round(float(v), 2) for v in args]

        def visit(text: str, *_: Any, fill: list[float] = fill) -> None:
            if fill == [0.69, 0.0, 0.13] and text.strip():
                texts.append(text.strip())

        page.extract_text(visitor_operand_before=before, visitor_text=visit)
    return texts


def test_a_failed_run_is_shown_in_red_with_its_guard(pages: Path, runs: Path, tmp_path: Path) -> None:
    shown = " ".join(red(pages / "report.pdf"))
    summary = json.loads((of(pages / "runs", "baseline")[3] / "summary.json").read_text())
    assert "FAIL: causality" in shown
    assert f"{summary['last']['full']:.4f}" in shown
    text = text_of(pages / "report.pdf")
    assert "logits change with the future at position 3" in text
    assert "Wider was worse by far." in text and "Deeper was better" not in text
    cli.write(load.gather([], runs), tmp_path / "r.pdf", "t")
    assert red(tmp_path / "r.pdf") == []


def test_figures_and_tables_are_written(pages: Path) -> None:
    drawn = sorted(p.name for p in (pages / "figures").iterdir())
    assert {
        "headline.svg",
        "headline.png",
        "curves.svg",
        "growth-1.svg",
        "study-1-parallel.svg",
        "schedules.svg",
    } <= set(drawn)
    rows = list(csv.DictReader(io.StringIO((pages / "tables" / "runs.csv").read_text())))
    assert len(rows) == 7
    for row in rows:
        last = json.loads((pages / "runs" / row["run"] / "summary.json").read_text())["last"]
        assert (
            float(row["full"]) == last["full"] and float(row["official"]) == last["official"]
        )  # The CSV file contains all digits of the scores.


def test_each_figure_is_on_a_page_with_its_caption(pages: Path) -> None:
    data = load.gather([str(pages / "runs"), str(pages / "lr")], pages / "runs")
    text = " ".join(text_of(pages / "report.pdf").split())
    captions = {name: row.caption(data) for name, row in registry.RUNS.items()}
    captions |= {f"study-1-{name}": row.caption for name, row in registry.STUDY.items()}
    for name, caption in captions.items():
        drawn = (pages / "figures" / f"{name}.svg").is_file()
        # the runs are no ablation and log no norms, and the trials do not differ in FLOPs or lengths
        absent = ("waterfall", "grad-norms", "study-1-forward-flops", "study-1-horizons")
        assert drawn == (name not in absent)
        assert (caption in text) == drawn, name


def points_of(axes: Any, label: str) -> list[tuple[float, float]]:
    """Return the points of all lines of a panel with a given label."""
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_scores_are_drawn_against_forward_flops_if_recipes_differ_in_them() -> None:
    mod = load.Recipe("mod", (make_routed_run(full=2.2), make_routed_run(seed=2, full=2.3)))
    large = make_recipe("optimized", {1: 2.0}, flops=3.0 * 512 * 5e4)
    bad = make_recipe("wide", {1: 2.6}, flops=3.0 * 512 * 4e4)
    figure = forward_flops.draw(make_data(mod, large, bad))
    assert figure is not None
    (axes,) = figure.get_axes()
    assert points_of(axes, "mod") == [(3e4, 2.2), (3e4, 2.3)]
    assert points_of(axes, "optimized") == [(5e4, 2.0)]
    best = points_of(axes, "no cheaper one is better")
    assert best == [(3e4, 2.25), (5e4, 2.0)], "wide costs more than mod, and scores worse"
    assert forward_flops.draw(make_data(mod)) is None
    assert forward_flops.draw(make_data()) is None


def test_trials_are_drawn_against_forward_flops_if_they_differ_in_them() -> None:
    trials = [make_trial(0, 2.0, forward_flops=100.0), make_trial(1, 1.5, forward_flops=200.0)]
    dearer = make_trial(2, 1.7, forward_flops=300.0)
    figure = forward_flops.draw_study(make_study(*trials, dearer, make_trial(3, 1.0)))
    assert figure is not None
    (axes,) = figure.get_axes()
    assert points_of(axes, "a trial") == [(100, 2.0), (200, 1.5), (300, 1.7)]
    assert points_of(axes, "no cheaper one is better") == [(100, 2.0), (200, 1.5)]
    assert forward_flops.draw_study(make_study(*trials[:1])) is None
    assert forward_flops.draw_study(make_study(make_trial(0, 2.0), make_trial(1, 1.5))) is None


def test_the_runs_of_several_lengths_are_drawn_for_each_searched_field() -> None:
    trials = [
        make_trial(i, 2.0 - i / 10, horizon=1.0 if i % 2 else 0.25, **{"params.lr": 0.01 * (i + 1)})
        for i in range(8)
    ]
    for trial in trials:
        trial["state"] = "done" if trial["horizon"] == 1 else "short"
    figure = horizons.draw(make_study(*trials))
    assert figure is not None
    (axes,) = figure.get_axes()
    marks = {float(line.get_xdata()[0]): line for line in axes.get_lines() if len(line.get_xdata())}
    assert sorted(marks) == list(range(8))
    assert marks[1].get_markersize() == 2 * marks[0].get_markersize(), "four times the area"
    filled = [number for number, line in marks.items() if line.get_markerfacecolor() != "none"]
    assert filled == [7], "the best of the four whole runs"
    assert horizons.draw(make_study(*trials[1::2])) is None, "all runs have the same length"


def test_the_figure_of_a_routed_run_shows_shares_accuracy_and_flops() -> None:
    run = make_routed_run()
    shares, accuracy, flops = routing.draw(run).get_axes()
    assert points_of(shares, "layer 1") == [(4, 0.26)]
    assert points_of(accuracy, "layer 1") == [(step, 0.75 + step / 64) for step in (1, 2, 3, 4)]
    assert [y for _, y in points_of(shares, "_child1")] == [0.25, 0.25], "the capacity"
    assert [y for _, y in points_of(accuracy, "_child1")] == [0.75, 0.75], "a constant is right for 75%"
    heights = [bar.get_height() for bar in flops.patches]
    assert heights == [1, tables.routing(run, 1).rows[1][5]]


def run_with_norms(preset: str, norms: list[dict[str, float]], **options: Any) -> load.Run:
    run = make_run(preset, **options)
    # only the first steps have norms
    for row, values in zip(run.steps, norms, strict=False):
        row["grad_norms"] = values
    return run


def test_gradient_norms_are_drawn_by_layer_with_their_median_over_the_steps() -> None:
    shallow = [
        {"embedding": 4.0, "block_0": 0.0, "head": 1.0},
        {"embedding": 2.0, "block_0": 0.0, "head": 0.5},
    ]
    deep = [{"embedding": 3.0, "block_0": 0.5, "block_1": 0.25, "head": 0.125}]
    recipes = [
        load.Recipe("normal", (make_run(), run_with_norms("baseline", shallow, seed=2))),
        load.Recipe("kaiming", (run_with_norms("optimized", deep),)),
        make_recipe("silent", {1: 2.0}),
    ]
    figure = grad_norms.draw(make_data(*recipes))
    assert figure is not None
    (axes,) = figure.get_axes()
    assert points_of(axes, "kaiming, 1 step") == [(-1, 3.0), (0, 0.5), (1, 0.25), (2, 0.125)]
    (first, frozen, last) = points_of(axes, "normal, 2 steps")
    assert (first, last) == ((-1, 3.0), (2, 0.75)), "the heads of both models are in one place"
    assert frozen[0] == 0 and frozen[1] != frozen[1], "a logarithmic axis cannot show a norm of 0"
    assert axes.get_yscale() == "log" and len(axes.get_lines()) == 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embedding", "0", "1", "head"]
    low, high = axes.get_ylim()
    assert low < 0.125 and high > 4, "the band of all steps fits"
    assert grad_norms.draw(make_data(make_recipe("silent", {1: 2.0}))) is None
    assert grad_norms.draw(make_data()) is None


@pytest.mark.parametrize(
    ("fields", "names"),
    [({}, ["lr", "weight_decay"]), ({"weight_decay_aux": 0.5}, ["lr", "weight_decay", "weight_decay_aux"])],
)
def test_the_auxiliary_weight_decay_is_drawn_if_a_recipe_sets_it(
    fields: dict[str, float], names: list[str]
) -> None:
    decay = {"optimizer": "adamw", "weight_decay": 0.1}
    recipes = [
        make_recipe("one", {1: 2.0}, fields=decay),
        make_recipe("two", {1: 2.0}, fields=decay | fields),
    ]
    figure = schedules.draw(make_data(*recipes))
    assert figure is not None
    panels = figure.get_axes()
    assert [axes.get_title().split()[0] for axes in panels] == names
    last = panels[-1]
    assert {y for _, y in points_of(last, "one")} == {0.1}, "unset: as weight_decay"
    assert {y for _, y in points_of(last, "two")} == {fields.get("weight_decay_aux", 0.1)}


def test_steps_after_a_growth_operation_and_damaged_norms_are_not_drawn() -> None:
    before = {"embedding": 2.0, "block_0": 0.5, "head": 1.0}
    after = {"embedding": 9.0, "block_0": 9.0, "block_1": 9.0, "head": 9.0}
    assert grad_norms.norms_of(load.Recipe("a", (run_with_norms("a", [before, after, {"x": 1.0}]),))) == {
        "embedding": [2.0], "block_0": [0.5], "head": [1.0]
    }  # fmt: skip
    for damaged in ({}, {"x": 1.0}, {"head": 1.0, "embedding": 1.0}):
        assert grad_norms.norms_of(load.Recipe("a", (run_with_norms("a", [damaged]),))) == {}


def test_many_statistics_of_a_router_are_averaged_over_windows() -> None:
    run = make_routed_run()
    steps = [row for row in run.rows if row["event"] == "step"]
    run.rows[:] = [steps[0] | {"step": step, "routers": [{"layer": 1, "student_accuracy": step / 800}]}
                   for step in range(1, 801)]  # fmt: skip
    points = points_of(routing.draw(run).get_axes()[1], "layer 1")
    assert len(points) == 40 and points[0] == pytest.approx((10.5, 10.5 / 800))


def test_the_capacity_that_an_op_sets_is_drawn_from_its_step_on() -> None:
    op = {"name": "set_capacity", "value": 0.5, "trigger": {"step": 2}}
    run = make_routed_run(fields={"growth": {"version": 2, "ops": [op]}})
    shares = routing.draw(run).get_axes()[0]
    assert points_of(shares, "_child1") == [(0, 0.25), (2, 0.5), (4, 0.5)]


def test_each_routed_recipe_gets_its_own_section(tmp_path: Path) -> None:
    for run in (make_run("optimized", flops=3.0 * 512 * 5e4), make_routed_run(), make_routed_run(seed=2)):
        write_run(tmp_path / "runs", run)
    stt = make_routed_run("stt", "DT")
    write_run(tmp_path / "runs", stt)
    cli.write(load.gather([], tmp_path / "runs"), tmp_path / "r.pdf", "t", tmp_path / "f")
    text = " ".join(text_of(tmp_path / "r.pdf").split())
    assert text.count(f"Routed blocks of {make_routed_run().id}") == 1
    assert f"Routed blocks of {make_routed_run(seed=2).id}" not in text, "one run stands for its recipe"
    assert f"Routed blocks of {stt.id}" in text and "T, temporal surprise" in text
    assert "which sees the future, the loss would be 3.9876" in text
    assert routing.CAPTION in text and forward_flops.caption(make_data()) in text
    drawn = {path.name for path in (tmp_path / "f").glob("*.svg")}
    assert {"routing-1.svg", "routing-2.svg", "forward-flops.svg"} <= drawn
    assert "routing (no run" not in text


def test_the_data_that_a_missing_figure_needs_is_named(tmp_path: Path) -> None:
    study = export(tmp_path / "lr", trials=9)
    cli.write(load.gather([str(study)], tmp_path), tmp_path / "r.pdf", "A study alone")
    text = " ".join(text_of(tmp_path / "r.pdf").split())
    assert "figures of the study lr: importance (needs an exported importance, or 10 trials" in text


def test_sections_without_data_are_listed(runs: Path, tmp_path: Path) -> None:
    shutil.rmtree(of(runs, "grown")[1])
    cli.write(load.gather([], runs), tmp_path / "r.pdf", "t")
    text = " ".join(text_of(tmp_path / "r.pdf").split())
    for left_out in (
        "ablation (needs",
        "studies (no export",
        "growth (no run has growth ops",
        "routing (no run has routed blocks",
        "samples (not requested",
    ):
        assert left_out in text
    assert "Ablation" not in text


def same(folder: Path, runs: Path, **env: str) -> bytes:
    folder.mkdir()
    done = report(
        runs, "--out", "r.pdf", "--samples", "0", "--figures", "f", "--tables", "t", cwd=folder, **env
    )
    assert done.returncode == 0, done.stderr
    kept = sorted((p for p in folder.rglob("*") if p.is_file()), key=str)
    return b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in kept)


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """A report's bytes do not depend on the folder, time, time zone, language or Python's hash seed."""
    copies = [
        Path(shutil.copytree(made, tmp_path / name, ignore=shutil.ignore_patterns(".store")))
        for name in ("a", "deep/er/b")
    ]
    for copy in copies:
        export(copy / "lr")
    one = same(tmp_path / "one", copies[0], PYTHONHASHSEED="1", TZ="Asia/Tokyo")
    two = same(
        tmp_path / "two",
        copies[1],
        PYTHONHASHSEED="2",
        TZ="America/Lima",
        LC_ALL="C",
        MPLCONFIGDIR=str(tmp_path / "mpl"),
    )
    assert one == two


@pytest.mark.slow
def test_the_command_writes_samples_and_prints_its_claim(made: Path, tmp_path: Path) -> None:
    done = report(made, "--out", tmp_path / "r.pdf", "--samples", "3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (
        result["runs"] == 7
        and result["kind"] in ("better", "worse", "within noise", "not sure")
        and len(result["findings"]) == 3
    )
    assert "Samples" in text_of(tmp_path / "r.pdf")


def test_every_pair_of_series_differs_in_grey() -> None:
    """Series whose colours look alike in greyscale differ in their dashes and markers."""
    assert (
        len(set(map(str, style.DASHES)))
        == len(style.DASHES)
        == len(style.COLOURS)
        == len(set(style.MARKERS))
        == style.MOST
    )
    grey = [
        sum(w * int(c[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5))) for c in style.COLOURS
    ]
    assert all(
        abs(x - y) > 2 or style.DASHES[i] != style.DASHES[j]
        for (i, x), (j, y) in combinations(enumerate(grey), 2)
    )
    assert max(grey) < 190  # all lines are dark enough for white paper
