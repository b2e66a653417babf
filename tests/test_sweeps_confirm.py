"""Tests that a claim needs new paired seeds, a gain above the noise floor, and Holm's correction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from searching import Trainer, make_search, make_study

from mainrun import stats
from mainrun.config import TrainConfig
from mainrun.errors import ConfigError, MainrunError, RunError, UsageError
from sweeps.cli import _show_evidence
from sweeps.confirm import confirm
from sweeps.engine.protocol import Outcome
from sweeps.ledger import Ledger
from sweeps.sampling import TrialSampler
from sweeps.trial import TrialState

SEED = 1337  # the seed of the base config, which the search uses
NOT_BETTER = "no better than the base, within the noise"
QUIET = (2.0, 2.001, 1.999)  # the scores of the base config with the noise seeds
Z = 2.7764451051977934  # the 97.5% quantile of Student's t with 4 degrees of freedom


class Confirmation:
    """A finished search and its confirmation, with given scores."""

    def __init__(
        self,
        folder: Path,
        fresh: Mapping[int, Sequence[float]],
        noise: Sequence[float] = QUIET,
        searched: Mapping[int, float] | None = None,
        fields: Mapping[str, Any] | None = None,
        **evidence: Any,
    ) -> None:
        """Create a finished search with the given scores.

        `fresh` has the scores of each trial on the new seeds, and `searched` has the trial's score in the
        search. By default, a trial with a higher number has a worse score in the search.
        """
        self.fresh = fresh
        self.noise = noise
        settings = {
            "seeds": len(fresh[0]),
            "noise_seeds": len(noise),
            "best": max(1, len(fresh) - 1),
            "sequential": False,
        } | evidence
        self.study = make_study(fields, evidence=settings, budget={"trials": 50})
        self.trainer = Trainer(self.score)
        self.search = make_search(folder, self.study, self.trainer)
        self.base = self.search.base
        searched = searched or {number: 3.0 - 0.1 * bool(number) + 0.01 * number for number in fresh}
        self.finish(searched)

    def finish(self, searched: Mapping[int, float]) -> None:
        """Add the trials, finish those that have a score, and let the others fail."""
        while len(self.search.trials) <= max(searched):
            assert self.search.ask()
            for trial in self.search.trials:
                trial.state = TrialState.FAILED
        for number, score in searched.items():
            trial = self.search.trials[number]
            trial.scores = {0: score}
            trial.state = TrialState.DONE

    def score(self, cfg: TrainConfig, step: int) -> float:
        number = self.search.owners[cfg.model_copy(update={"seed": SEED}).run_id]
        if SEED + 1 <= cfg.seed <= SEED + 100:
            assert number == 0, "the noise floor is measured with the base"
            return self.noise[cfg.seed - SEED - 1]
        return self.fresh[number][cfg.seed - SEED - 101]

    def seeds(self) -> list[int]:
        return [cfg.seed for cfg in self.trainer.trained]


def rows_of(evidence: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {row["trial"]: row for row in evidence["rows"]}


# -- the conditions of a claim


BEYOND_P = 1 - stats.LEVEL
BELOW_P = math.nextafter(BEYOND_P, 0)
BARELY_NEGATIVE = -5e-324
CONTAINS_ZERO = "its interval contains zero"
NO_GAIN = "it is not better"
NO_INTERVAL = "a run diverged, so there is no interval"
IN_FLOOR = "the difference is within the noise floor 0.2500"
BY_HOLM = "p=0.050 after Holm's correction"


@pytest.mark.parametrize(
    ("difference", "interval", "p", "why"),
    [
        pytest.param(-0.5, (-0.75, -0.25), 0.001, "", id="all three pass"),
        pytest.param(
            math.nextafter(-0.25, -1), (-1.0, BARELY_NEGATIVE), BELOW_P, "", id="all three just pass"
        ),
        pytest.param(-0.5, (-1.0, 0.0), 0.001, CONTAINS_ZERO, id="the interval touches zero"),
        pytest.param(-0.5, (-1.5, 0.5), 0.001, CONTAINS_ZERO, id="the interval contains zero"),
        pytest.param(-0.5, None, 0.001, NO_INTERVAL, id="no interval"),
        pytest.param(-0.25, (-0.3, -0.2), 0.001, IN_FLOOR, id="the difference equals the floor"),
        pytest.param(-0.1, (-0.2, -0.05), 0.001, IN_FLOOR, id="the difference is below the floor"),
        pytest.param(-0.5, (-0.75, -0.25), BEYOND_P, BY_HOLM, id="p is at the level"),
        pytest.param(-0.5, (-0.75, -0.25), 0.7, "p=0.700 after Holm's correction", id="p is above the level"),
        pytest.param(0.0, (-0.1, 0.1), 0.001, NO_GAIN, id="no difference"),
        pytest.param(0.0, (0.0, 0.0), 1.0, NO_GAIN, id="no difference and no spread"),
        pytest.param(0.5, (0.25, 0.75), 0.001, NO_GAIN, id="clearly worse"),
        pytest.param(-0.1, (-0.3, 0.1), 0.7, CONTAINS_ZERO, id="nothing passes: the interval is named first"),
        pytest.param(-0.1, (-0.3, -0.05), 0.7, IN_FLOOR, id="floor and p fail: the floor is named first"),
    ],
)
def test_a_claim_needs_interval_floor_and_p_value(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    difference: float,
    interval: tuple[float, float] | None,
    p: float,
    why: str,
) -> None:
    """With four seeds, the noise floor is 0.25. Each condition is tested alone, at its limit."""
    result_of_stats = SimpleNamespace(a=2.0, b=2.0 + difference, mean=difference, interval=interval, p=0.02)
    monkeypatch.setattr(stats, "difference", lambda a, b: result_of_stats)
    monkeypatch.setattr(stats, "noise", lambda groups: SimpleNamespace(sd=0.1, floor=0.5))
    corrected: list[list[float]] = []

    def holm(ps: list[float]) -> list[float]:
        corrected.append(ps)
        return [p for _ in ps]

    monkeypatch.setattr(stats, "holm", holm)
    result = confirm(Confirmation(tmp_path, {0: (2.0,) * 4, 1: (2.0,) * 4}).search)
    (row,) = result["rows"]
    assert row["why"] == why
    assert row["claim"] is (why == "")
    assert row["interval"] == (list(interval) if interval else [-math.inf, math.inf])
    assert (row["difference"], row["mean"], row["p_holm"]) == (difference, 2.0 + difference, p)
    assert corrected == [[0.02]]
    assert result["noise"]["floor"] == 0.25
    assert result["winner"] == (None if why else 1)
    if why:
        assert result["claim"] == NOT_BETTER
    else:
        assert result["claim"].startswith("trial 1 is better than the base by ")
    assert ("val" in result) == (not why)


def test_a_missing_p_value_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an interval there is no p-value."""
    unsure = SimpleNamespace(a=2.0, b=1.0, mean=-1.0, interval=None, p=None)
    certain = SimpleNamespace(a=2.0, b=1.0, mean=-1.0, interval=(-1.1, -0.9), p=0.0)
    differences = iter([unsure, certain])
    monkeypatch.setattr(stats, "difference", lambda a, b: next(differences))
    result = confirm(Confirmation(tmp_path, {0: (2.0, 2.0), 1: (1.0, 1.0), 2: (1.0, 1.0)}).search)
    assert [row["p_holm"] for row in result["rows"]] == [1.0, 0.0]
    assert [row["claim"] for row in result["rows"]] == [False, True]


# -- claims from scores


BASE = (2.0, 2.1, 2.2, 2.3)
GAINS = (0.099, 0.101, 0.1, 0.1)


def lower(gains: Sequence[float]) -> tuple[float, ...]:
    """Return the scores of the base config, each reduced by its gain."""
    return tuple(score - gain for score, gain in zip(BASE, gains, strict=True))


def test_a_gain_on_paired_seeds_is_claimed_with_its_interval(tmp_path: Path) -> None:
    """Scores differ by 0.3 between seeds and by 0.1 between configs, so only paired seeds show the gain."""
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    result = confirm(setup.search)
    row = rows_of(result)[1]
    half = stats.t_quantile(0.975, 3) * math.sqrt(2e-6 / 3) / 2
    assert row["difference"] == pytest.approx(-0.1)
    assert row["interval"] == pytest.approx([-0.1 - half, -0.1 + half])
    assert row["mean"] == pytest.approx(2.05)
    assert row["params"] == setup.search.trials[1].values != {}
    assert result["base"] == list(BASE)
    assert result["seeds"] == [SEED + 101, SEED + 102, SEED + 103, SEED + 104]
    assert result["winner"] == 1
    assert result["claim"] == "trial 1 is better than the base by 0.1000 [0.0987, 0.1013], 4 paired seeds"
    assert result["objective"] == "dev/full"


def test_scores_are_paired_by_their_seeds(tmp_path: Path) -> None:
    """If the same scores are paired in another order, the gain is not significant."""
    result = confirm(Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)[::-1]}).search)
    assert result["rows"][0]["difference"] == pytest.approx(-0.1)
    assert result["rows"][0]["why"] == CONTAINS_ZERO
    assert result["winner"] is None and result["claim"] == NOT_BETTER


def test_the_noise_floor_is_for_a_mean_over_the_new_seeds(tmp_path: Path) -> None:
    """The floor is t (4 degrees of freedom) * sqrt(2) * sigma / sqrt(number of new seeds)."""
    noise = (2.0, 2.1, 1.9, 2.05, 1.95)
    sigma = math.sqrt(0.00625)
    floor = Z * math.sqrt(2) * sigma / math.sqrt(4)
    assert 0.1 < floor < 0.2
    result = confirm(
        Confirmation(tmp_path, {0: BASE, 1: lower(GAINS), 2: lower((0.2, 0.2, 0.2, 0.2))}, noise=noise).search
    )
    assert result["noise"] == {
        "seeds": [SEED + 1, SEED + 2, SEED + 3, SEED + 4, SEED + 5],
        "values": list(noise),
        "sigma": pytest.approx(sigma),
        "floor": pytest.approx(floor),
    }
    assert rows_of(result)[1]["why"] == f"the difference is within the noise floor {floor:.4f}"
    assert rows_of(result)[2]["claim"] and result["winner"] == 2


def paired(p: float, size: float = 0.1) -> tuple[float, ...]:
    """Return two scores near 2.0 - `size` whose paired difference from 2.0 has the p-value `p`."""
    t = math.tan(math.pi / 2 * (1 - p))
    return 2.0 - size - size / t, 2.0 - size + size / t


@pytest.mark.parametrize(
    ("ps", "adjusted", "claims"),
    [
        pytest.param([0.049], [0.049], [True], id="one trial without correction"),
        pytest.param([0.024, 0.049], [0.048, 0.049], [True, True], id="the smaller p is doubled"),
        pytest.param(
            [0.026, 0.049], [0.052, 0.052], [False, False], id="the smaller p fails, and so does the other"
        ),
        pytest.param([0.049, 0.001], [0.049, 0.002], [True, True], id="in the order of the p-values"),
        pytest.param([0.03, 0.02, 0.001], [0.04, 0.04, 0.003], [True, True, True], id="three trials"),
        pytest.param(
            [0.03, 0.026, 0.001],
            [0.052, 0.052, 0.003],
            [False, False, True],
            id="three trials, two of them fail",
        ),
    ],
)
def test_holms_correction_counts_the_trials_that_are_confirmed(
    tmp_path: Path, ps: list[float], adjusted: list[float], claims: list[bool]
) -> None:
    """Each of these trials would be claimed if it were the only confirmed trial."""
    fresh = {0: (2.0, 2.0)} | {number: paired(p) for number, p in enumerate(ps, 1)}
    result = confirm(Confirmation(tmp_path, fresh).search)
    assert [row["trial"] for row in result["rows"]] == list(range(1, 1 + len(ps)))
    assert [row["p_holm"] for row in result["rows"]] == pytest.approx(adjusted)
    assert [row["claim"] for row in result["rows"]] == claims
    whys = [
        f"p={p:.3f} after Holm's correction" for p, claim in zip(adjusted, claims, strict=True) if not claim
    ]
    assert [row["why"] for row in result["rows"] if not row["claim"]] == whys


@pytest.mark.parametrize(
    ("gains", "winner"), [((0.1, 0.3, 0.2), 2), ((0.3, 0.1, 0.2), 1), ((0.1, 0.2, 0.3), 3)]
)
def test_the_winner_has_the_largest_gain_on_new_seeds(
    tmp_path: Path, gains: tuple[float, ...], winner: int
) -> None:
    """The winner does not depend on the scores in the search."""
    result = confirm(
        Confirmation(tmp_path, {0: BASE} | {n: lower((gain,) * 4) for n, gain in enumerate(gains, 1)}).search
    )
    assert all(row["claim"] for row in result["rows"])
    assert result["winner"] == winner
    assert result["claim"].startswith(
        f"trial {winner} is better than the base by 0.3000 [0.3000, 0.3000], 4 paired seeds"
    )


@pytest.mark.parametrize(
    ("pattern", "expected"), [("DM", "seeds, with 0.83 times the forward FLOPs"), ("D", " paired seeds")]
)
def test_a_claim_states_different_forward_flops(tmp_path: Path, pattern: str, expected: str) -> None:
    study = Confirmation(
        tmp_path, {0: [2.0, 2.001, 1.999, 2.0], 1: [1.9, 1.901, 1.899, 1.9]}, fields={"n_layer": 2}
    )
    runs = study.search.runs_of(study.search.trials[1])
    cfg = runs.cfg.model_copy(update={"block_pattern": pattern})
    study.search._runs[1] = replace(runs, cfg=cfg)
    study.search.owners[cfg.run_id] = 1
    study.search.trials[1].run_id = cfg.run_id
    claim = confirm(study.search)["claim"]
    assert claim.startswith("trial 1 is better than the base by 0.1000") and claim.endswith(expected)


def test_a_larger_gain_does_not_win_without_a_claim(tmp_path: Path) -> None:
    result = confirm(
        Confirmation(tmp_path, {0: BASE, 1: lower((0.9, 0.0, 0.9, 0.0)), 2: lower((0.1,) * 4)}).search
    )
    assert rows_of(result)[1]["difference"] < rows_of(result)[2]["difference"]
    assert result["winner"] == 2


# -- the runs of a confirmation


def test_the_scores_of_the_search_do_not_count(tmp_path: Path) -> None:
    """The best trial of the search is no better on new seeds. The seed of the search is not used again."""
    setup = Confirmation(tmp_path, {0: BASE, 1: BASE}, searched={0: 3.0, 1: 0.5})
    result = confirm(setup.search)
    assert result["claim"] == NOT_BETTER and rows_of(result)[1]["why"] == NO_GAIN
    assert SEED not in setup.seeds()
    assert sorted(setup.seeds()) == [
        SEED + 1,
        SEED + 2,
        SEED + 3,
        *sorted([SEED + 101 + i for i in range(4)] * 2),
    ]


def test_noise_floor_and_confirmation_use_different_seeds(tmp_path: Path) -> None:
    """The test uses the maximum number of noise seeds."""
    setup = Confirmation(tmp_path, {0: (2.0, 2.0)}, noise=[2.0 + 0.001 * i for i in range(100)])
    result = confirm(setup.search)
    assert result["noise"]["seeds"] == list(range(SEED + 1, SEED + 101))
    assert result["seeds"] == [SEED + 101, SEED + 102]
    assert result["rows"] == [] and result["claim"] == NOT_BETTER


def test_every_run_has_the_config_of_its_trial_with_another_seed(tmp_path: Path) -> None:
    setup = Confirmation(tmp_path, {0: (2.0, 2.0), 1: (1.0, 1.0)})
    confirm(setup.search)
    base, trial = setup.base, setup.search.runs_of(setup.search.trials[1]).cfg
    expected = [(base, SEED + 1), (base, SEED + 2), (base, SEED + 3)]
    expected += [(cfg, SEED + 101 + i) for cfg in (base, trial) for i in range(2)]
    assert setup.trainer.trained == [cfg.model_copy(update={"seed": seed}) for cfg, seed in expected]
    assert all(task.until == 0 for task in setup.trainer.tasks)


@pytest.mark.parametrize(
    ("searched", "best", "chosen"),
    [
        pytest.param({0: 3.0, 1: 2.0, 2: 1.0}, 1, [2], id="the best trial"),
        pytest.param({0: 3.0, 1: 2.0, 2: 1.0}, 2, [2, 1], id="best first"),
        pytest.param({0: 1.5, 1: 2.0, 2: 1.0}, 2, [2, 1], id="the base does not count"),
        pytest.param({0: 1.0, 1: 2.0, 2: 3.0}, 1, [1], id="the base is the best"),
        pytest.param({0: 3.0, 1: 2.0, 2: 1.0}, 5, [2, 1], id="fewer trials than requested"),
        pytest.param({0: 1.0}, 2, [], id="only the base"),
        pytest.param({0: 3.0, 1: 1.0, 2: 1.0}, 1, [1], id="a tie goes to the lower number"),
        pytest.param({0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, 3, [4, 3, 2], id="three of four"),
    ],
)
def test_the_best_trials_are_confirmed_without_the_base(
    tmp_path: Path, searched: dict[int, float], best: int, chosen: list[int]
) -> None:
    fresh = dict.fromkeys(searched, (2.0, 2.0))
    setup = Confirmation(tmp_path, fresh, searched=searched, best=best)
    result = confirm(setup.search)
    assert [row["trial"] for row in result["rows"]] == chosen
    assert len(setup.trainer.trained) == 3 + 2 * (1 + len(chosen))


def test_repeated_values_are_confirmed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler may repeat the values of a trial or of the base."""
    values = [{}, {"lr": 0.01}, {"lr": 0.01}, {"lr": 0.02}]
    monkeypatch.setattr(TrialSampler, "ask", lambda self, number: values[min(number, 3)])
    searched = {0: 5.0, 1: 1.0, 2: 1.0, 3: 2.0}
    setup = Confirmation(tmp_path, dict.fromkeys(searched, (2.0, 2.0)), searched=searched, best=2)
    assert [row["trial"] for row in confirm(setup.search)["rows"]] == [1, 3]


@pytest.mark.parametrize("objective", ["dev/full", "dev/official"])
def test_the_objective_is_compared(tmp_path: Path, objective: str) -> None:
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    setup.search.study = setup.study.model_copy(update={"objective": objective})
    more = 10 if objective == "dev/official" else 0
    result = confirm(setup.search)
    assert result["base"] == [score + more for score in BASE]
    assert result["noise"]["values"] == [score + more for score in QUIET]
    assert result["objective"] == objective


# -- val is read once, at the end


def test_val_is_read_for_the_winner_alone(tmp_path: Path) -> None:
    """The val scores come from the winner's first new seed. The claim is still about dev scores."""
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS), 2: lower((0.2,) * 4)})
    setup.trainer.val = lambda cfg, step: cfg.seed + cfg.lr
    result = confirm(setup.search)
    cfg = setup.search.runs_of(setup.search.trials[2]).cfg.model_copy(update={"seed": SEED + 101})
    full = cfg.seed + cfg.lr
    assert result["winner"] == 2
    assert result["val"] == {"run": cfg.run_id, "full": full, "official": full + 10}


def test_val_is_read_nowhere_else(tmp_path: Path) -> None:
    """The evidence does not change if val scores are removed from all runs except the one that is shown."""

    def evidence(folder: Path, keep_val: bool) -> dict[str, Any]:
        setup = Confirmation(folder, {0: BASE, 1: lower(GAINS), 2: lower((0.01,) * 4)})
        winner = setup.search.runs_of(setup.search.trials[1]).cfg
        shown = winner.model_copy(update={"seed": SEED + 101})
        trainer = setup.trainer
        train = trainer.train

        def without_val(task: Any) -> Any:
            outcome = train(task)
            run = trainer.trained[-1].run_id
            summary, metrics = (task.out / run / name for name in ("summary.json", "metrics.jsonl"))
            if not keep_val and run != shown.run_id:
                scores = json.loads(summary.read_text())["scores"]
                summary.write_text(json.dumps({"scores": {"dev": scores["dev"]}}))
                metrics.write_text(
                    "".join(line for line in metrics.read_text().splitlines(True) if '"val"' not in line)
                )
            return outcome

        trainer.train = without_val
        return confirm(setup.search)

    assert evidence(tmp_path / "without", False) == evidence(tmp_path / "with", True)


def test_val_is_not_shown_without_a_claim(tmp_path: Path) -> None:
    result = confirm(Confirmation(tmp_path, {0: BASE, 1: BASE}).search)
    assert "val" not in result and result["winner"] is None


# -- failures and costs


def test_the_costs_list_every_run_with_its_purpose(tmp_path: Path) -> None:
    setup = Confirmation(tmp_path, {0: (2.0, 2.0), 1: (1.0, 1.0)}, noise=(2.0, 2.1))
    setup.trainer.reused = 4
    result = confirm(setup.search)
    trial = setup.search.runs_of(setup.search.trials[1]).cfg
    expected = [
        ("noise", 0, SEED + 1),
        ("noise", 0, SEED + 2),
        ("confirmation", 0, SEED + 101),
        ("confirmation", 0, SEED + 102),
    ]
    expected += [("confirmation", 1, SEED + 101), ("confirmation", 1, SEED + 102)]
    assert [(row["kind"], row["trial"], row["seed"]) for row in result["runs"]] == expected
    configs = [
        (trial if number else setup.base).model_copy(update={"seed": seed}) for _, number, seed in expected
    ]
    assert [row["run"] for row in result["runs"]] == [cfg.run_id for cfg in configs]
    assert {*Ledger.__dataclass_fields__, "kind", "trial", "seed", "run"} == set(result["runs"][0])
    for row in result["runs"]:
        assert (row["asked"], row["trained"], row["reused"], row["wasted"], row["tokens"]) == (
            10,
            6,
            4,
            0,
            6 * 128,
        )
    assert all("wasted" in row and row["seconds"] == 3.0 for row in result["runs"])


def test_a_run_that_diverges_scores_infinity_and_is_wasted(tmp_path: Path) -> None:
    """A trial can still be claimed if a run of another trial diverges."""
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS), 2: lower(GAINS)})
    bad = setup.search.runs_of(setup.search.trials[1]).cfg.model_copy(update={"seed": SEED + 103})
    setup.trainer.diverging = lambda cfg: cfg == bad
    result = confirm(setup.search)
    row = rows_of(result)[1]
    assert row["mean"] == row["difference"] == math.inf
    assert row["interval"] == [-math.inf, math.inf] and row["p_holm"] == 1.0 and not row["claim"]
    assert row["why"] == NO_GAIN
    assert result["winner"] == 2
    wasted = {row["run"]: row["wasted"] for row in result["runs"] if row["wasted"]}
    assert wasted == {bad.run_id: 10}


@pytest.mark.parametrize("seeds", [[SEED + 2], [SEED + 1, SEED + 2, SEED + 3]], ids=["one", "all"])
def test_without_a_noise_floor_nothing_is_claimed(tmp_path: Path, seeds: list[int]) -> None:
    """The base diverges on a seed of the noise floor."""
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    setup.trainer.diverging = lambda cfg: cfg.seed in seeds
    result = confirm(setup.search)
    assert result["noise"]["sigma"] == result["noise"]["floor"] == math.inf
    assert result["winner"] is None and "floor inf" in rows_of(result)[1]["why"]


@pytest.mark.parametrize("both", [False, True], ids=["only the base", "base and trial"])
def test_nothing_is_claimed_against_a_base_that_diverges(tmp_path: Path, both: bool) -> None:
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    setup.trainer.diverging = lambda cfg: cfg.seed == SEED + 102 and (both or cfg.lr == setup.base.lr)
    result = confirm(setup.search)
    assert result["winner"] is None and not result["rows"][0]["claim"]
    assert result["rows"][0]["why"] == NO_INTERVAL


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Outcome(False, reason="no such corpus"), MainrunError),
        (Outcome(False, refused=True, reason="error: no such corpus"), UsageError),
    ],
    ids=["a crash", "invalid input"],
)
def test_a_failed_run_ends_the_confirmation_and_its_workers(
    tmp_path: Path, failure: Outcome, kind: type[MainrunError]
) -> None:
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    setup.trainer.failing = lambda cfg: cfg.seed == SEED + 102
    run = setup.base.model_copy(update={"seed": SEED + 102}).run_id
    setup.trainer.failure = failure
    with pytest.raises(MainrunError, match=f"^the run {run} cannot be trained: no such corpus$") as error:
        confirm(setup.search)
    assert type(error.value) is kind
    assert setup.trainer.closed


@pytest.mark.parametrize(
    "summary", [None, {"scores": {}}, {}], ids=["no summary", "no scores of dev", "no scores"]
)
def test_a_run_without_its_score_is_damage(tmp_path: Path, summary: Any) -> None:
    setup = Confirmation(tmp_path, {0: BASE, 1: BASE})
    train = setup.trainer.train

    def damage(task: Any) -> Any:
        outcome = train(task)
        file = task.out / setup.trainer.trained[-1].run_id / "summary.json"
        file.unlink() if summary is None else file.write_text(json.dumps(summary))
        return outcome

    setup.trainer.train = damage
    with pytest.raises(
        RunError, match=r"summary\.json is damaged: it has no score for dev; restore it, or remove "
    ):
        confirm(setup.search)


def test_workers_are_not_closed_after_a_confirmation(tmp_path: Path) -> None:
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    confirm(setup.search)
    assert not setup.trainer.closed


def test_tick_is_called_after_every_run(tmp_path: Path) -> None:
    setup = Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)})
    ticks: list[int] = []
    setup.search.tick = lambda: ticks.append(1)
    confirm(setup.search)
    assert len(ticks) == 3 + 4 + 4


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    def evidence(folder: Path, workers: int) -> dict[str, Any]:
        setup = Confirmation(folder, {0: BASE, 1: lower(GAINS), 2: lower((0.2,) * 4)})
        setup.trainer.workers = workers
        return confirm(setup.search)

    assert evidence(tmp_path / "one", 1) == evidence(tmp_path / "four", 4)


# -- pair by pair


LONG = (2.0, 2.1, 2.2, 2.3, 2.05, 2.15, 2.25, 2.35)
CLEAR = tuple(score - gain for score, gain in zip(LONG, (0.9, 0.91, 0.89) + (0.9,) * 5, strict=True))
SLOW = tuple(score - gain for score, gain in zip(LONG, (0.2, 0.21, 0.19) + (0.2,) * 5, strict=True))


def test_pairs_are_trained_until_every_trial_is_decided(tmp_path: Path) -> None:
    """Trial 1 is claimed after three pairs, and trial 2 is worse, so that it gets only two."""
    worse = tuple(score + 0.1 for score in LONG)
    setup = Confirmation(tmp_path, {0: LONG, 1: CLEAR, 2: worse}, sequential=True)
    result = confirm(setup.search)
    assert sorted(setup.seeds()) == sorted([SEED + 101, SEED + 102] * 3 + [SEED + 103] * 2)
    assert result["seeds"] == [SEED + 101, SEED + 102, SEED + 103]
    assert result["base"] == list(LONG[:3])
    assert result["sequential"] == {
        "pairs": 3,
        "maximum": 8,
        "level": stats.LEVEL,
        "nominal_p": pytest.approx(0.0143, abs=1e-4),
    }
    rows = rows_of(result)
    assert (rows[1]["pairs"], rows[1]["stopped"], rows[1]["claim"]) == (3, "it is claimed", True)
    assert (rows[2]["pairs"], rows[2]["stopped"]) == (2, "a claim after the last pair is unlikely")
    assert rows[2]["why"] == NO_GAIN
    noise = stats.noise([LONG[:3], CLEAR[:3], worse[:2]])
    assert noise is not None
    assert result["noise"] == {
        "seeds": [],
        "values": [],
        "sigma": pytest.approx(noise.sd),
        "floor": pytest.approx(noise.floor / math.sqrt(3)),
        "df": 5,
    }
    assert result["claim"].startswith("trial 1 is better than the base by 0.9000 [")
    assert result["claim"].endswith("], 3 of at most 8 paired seeds")
    assert [row["kind"] for row in result["runs"]] == ["confirmation"] * 8
    assert "val" in result


def test_two_pairs_need_a_noise_floor_of_their_own(tmp_path: Path) -> None:
    """The noise floor is trained after the pairs, and only if a claim depends on it."""
    fresh = {0: (2.0, 2.001), 1: (1.0, 1.001001)}
    setup = Confirmation(tmp_path / "a", fresh, sequential=True)
    result = confirm(setup.search)
    assert setup.seeds() == [SEED + 101, SEED + 102] * 2 + [SEED + 1, SEED + 2, SEED + 3]
    assert result["winner"] == 1 and result["noise"]["values"] == list(QUIET)
    assert [row["kind"] for row in result["runs"]].count("noise") == 3
    setup = Confirmation(tmp_path / "b", {0: (2.0, 2.001), 1: (2.5, 2.6)}, sequential=True)
    assert confirm(setup.search)["noise"]["values"] == [] and len(setup.seeds()) == 4


def test_without_a_trial_to_confirm_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = Confirmation(tmp_path, {0: LONG}, sequential=True)
    result = confirm(setup.search)
    assert setup.seeds() == [] and result["claim"] == NOT_BETTER
    _show_evidence(result, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("confirmation: 0 of at most 8 pairs") and lines[1:] == [NOT_BETTER]


@pytest.mark.parametrize("who", [0, 1], ids=["base", "trial"])
def test_a_trial_gets_no_further_pairs_after_a_run_diverged(tmp_path: Path, who: int) -> None:
    setup = Confirmation(tmp_path, {0: LONG, 1: CLEAR}, sequential=True)
    cfg = setup.search.runs_of(setup.search.trials[who]).cfg
    bad = cfg.model_copy(update={"seed": SEED + 102})
    setup.trainer.diverging = lambda cfg: cfg == bad
    result = confirm(setup.search)
    (row,) = result["rows"]
    assert (row["pairs"], row["stopped"], row["claim"]) == (2, "a run diverged", False)
    assert len(setup.seeds()) == 4


def test_a_kill_at_any_run_changes_nothing(tmp_path: Path) -> None:
    """The driver is killed before each run in turn, and a new one decides the same from the same runs."""
    fresh = {0: LONG, 1: SLOW, 2: tuple(score - 0.19 for score in LONG)}

    def start(folder: Path, kill_before: int = 99) -> tuple[dict[str, Any], list[str]]:
        setup = Confirmation(folder, fresh, sequential=True)
        train = setup.trainer.train

        def killed(task: Any) -> Any:
            if len(setup.trainer.trained) == kill_before:
                raise KeyboardInterrupt
            return train(task)

        setup.trainer.train = killed
        try:
            evidence = confirm(setup.search)
        except KeyboardInterrupt:
            evidence = {}
        return evidence, [cfg.run_id for cfg in setup.trainer.trained]

    whole, runs = start(tmp_path / "whole")
    assert whole["sequential"]["pairs"] > 3 and len(runs) > 9
    for number in range(len(runs)):
        folder = tmp_path / str(number)
        stopped, before = start(folder, kill_before=number)
        resumed, after = start(folder)
        assert not stopped and resumed == whole
        assert before + after == runs, "no run is trained twice"


def test_the_driver_confirms_what_it_searched(tmp_path: Path) -> None:
    """The driver searches and confirms with one worker and with three."""
    study = make_study(budget={"trials": 6}, evidence={"best": 2})

    def score(cfg: TrainConfig, step: int) -> float:
        return 2 + 0.1 * abs(math.log(cfg.lr / 0.012)) + 1e-4 * (cfg.seed * 7919 % 101) / 101

    def evidence(folder: Path, workers: int) -> dict[str, Any]:
        search = make_search(folder, study, Trainer(score, workers))
        search.run()
        return confirm(search)

    one = evidence(tmp_path / "one", 1)
    assert one == evidence(tmp_path / "three", 3)
    assert one["winner"] is not None and one["sequential"]["maximum"] == 8
    assert one["sequential"]["pairs"] == 3


def test_sweep_show_states_pairs_maximum_reason_and_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = tuple(score + 0.1 for score in LONG)
    result = confirm(Confirmation(tmp_path, {0: LONG, 1: CLEAR, 2: worse}, sequential=True).search)
    _show_evidence(json.loads(json.dumps(result)), [])
    text = capsys.readouterr().out
    assert "3 of at most 8 pairs; the confidence level of 95% holds over all numbers of pairs" in text
    assert "over 5 degrees of freedom; differences below" in text
    assert ": claimed, after 3 pairs: it is claimed" in text
    assert "it is not better, after 2 pairs: a claim after the last pair is unlikely" in text


def test_without_sequential_all_seeds_are_trained_as_before(tmp_path: Path) -> None:
    settings = make_study(evidence={"sequential": False}).evidence
    assert (settings.seeds, settings.noise_seeds, settings.best) == (5, 5, 2)
    settings = make_study().evidence
    assert settings.sequential and settings.seeds == 8
    result = confirm(Confirmation(tmp_path, {0: BASE, 1: lower(GAINS)}).search)
    assert set(result) == {"objective", "seeds", "base", "rows", "noise", "runs", "winner", "claim", "val"}
    assert set(result["noise"]) == {"seeds", "values", "sigma", "floor"}
    assert not {"pairs", "floor", "stopped"} & set(result["rows"][0])


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        ({"sequential": "perhaps"}, "evidence.sequential='perhaps' is not allowed"),
        ({"sequential": True, "seeds": 1}, "evidence.seeds=1 is not allowed"),
        ({"sequential": False, "seeds": 101}, "evidence.seeds=101 is not allowed"),
        ({"pairs": 4}, "unknown key evidence.pairs"),
        (3, "evidence=3 is not allowed"),
    ],
)
def test_invalid_settings_of_the_confirmation_are_refused(evidence: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study(evidence=evidence)
