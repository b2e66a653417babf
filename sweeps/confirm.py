"""Confirm the best trials of a study.

The configs of the best trials and the base config are trained with new seeds. Each gain over the base is then
compared with the noise between seeds. With [evidence] sequential, the seeds are added one by one, until each
trial is claimed or given up (sequential.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mainrun import stats
from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.plan.cost import forward_cost
from mainrun.store.rundir import RunDir
from sweeps.driver import Search
from sweeps.ledger import run_cost
from sweeps.space import with_values
from sweeps.trial import Trial
from sweeps.verdict import NO_INTERVAL, Interval, is_better, paired_difference, why_not

if TYPE_CHECKING:
    from sweeps.sequential import SequentialTest

FIRST_NOISE_SEED = 1  # the first noise seed is the seed of the base config plus this number
FIRST_CONFIRMATION_SEED = 101  # the first confirmation seed is the seed of the base config plus this number

Job = tuple[str, int]  # the first item is "noise" or a trial number, and the second item is a seed


def confirm(search: Search) -> dict[str, Any]:
    """Train the noise runs and the confirmation runs, and return the evidence of a study.

    The evidence contains the noise floor, the comparison of each trial with the base, and the claim.
    """
    settings = search.study.evidence
    candidates = [trial for trial in search.best(settings.best + 1) if trial.number != 0][: settings.best]
    if settings.sequential:
        return _confirm_in_pairs(search, candidates)
    seeds = _confirmation_seeds(search)
    jobs = _noise_jobs(search)
    noise_seeds = [seed for _, seed in jobs]
    for trial in [search.trials[0], *candidates]:
        jobs |= _trial_jobs(search, trial, seeds)
    scores = _train_jobs(search, jobs)

    noise_scores = [scores["noise", seed] for seed in noise_seeds]
    sigma, single_floor = _noise(noise_scores)
    floor = single_floor / math.sqrt(len(seeds))  # the noise floor of the difference between two means
    base_scores = {seed: scores["0", seed] for seed in seeds}
    evidence: dict[str, Any] = {
        "objective": search.study.objective,
        "seeds": seeds,
        "base": list(base_scores.values()),
        "rows": _compare(candidates, base_scores, scores, floor),
        "noise": {"seeds": noise_seeds, "values": noise_scores, "sigma": sigma, "floor": floor},
        "runs": [_cost_row(search, job, cfg, scores[job]) for job, cfg in jobs.items()],
    }
    return evidence | _conclude(search, evidence["rows"], seeds)


def _confirm_in_pairs(search: Search, candidates: list[Trial]) -> dict[str, Any]:
    """Train the base and the trials with one new seed after the other, and return the evidence.

    Which runs are trained next depends only on the scores of the runs before. A study that was stopped
    therefore trains the same runs, and finds those that are finished on disk.
    """
    from sweeps.sequential import SequentialTest  # scipy takes a second to import

    seeds = _confirmation_seeds(search)
    test = SequentialTest([trial.number for trial in candidates], maximum=len(seeds))
    jobs: dict[Job, TrainConfig] = {}
    scores: dict[Job, float] = {}
    while test.open:
        new_seeds = [seeds[pair] for pair in test.next_pairs]
        numbers = [0, *(candidate.trial for candidate in test.open)]
        step: dict[Job, TrainConfig] = {}
        if test.needs_floor:
            step = _noise_jobs(search)
        for number in numbers:
            step |= _trial_jobs(search, search.trials[number], new_seeds)
        jobs |= step
        scores |= _train_jobs(search, step)
        if test.needs_floor:
            test.add_noise([scores[job] for job in step])
        else:
            by_trial = {n: {seed: scores[str(n), seed] for seed in new_seeds} for n in numbers}
            test.add_pairs(by_trial[0], by_trial)
        search.note(f"confirmation: {test.describe()}")
    noise = test.noise()
    rows = _sequential_rows(candidates, test)
    evidence: dict[str, Any] = {
        "objective": search.study.objective,
        "seeds": list(test.base),
        "base": list(test.base.values()),
        "rows": rows,
        "noise": {
            "seeds": [seed for name, seed in jobs if name == "noise"],
            "values": test.noise_scores,
            "sigma": noise.sd,
            "floor": noise.floor / math.sqrt(max(1, len(test.base))),
            "df": noise.df,
        },
        "sequential": test.summary(),
        "runs": [_cost_row(search, job, cfg, scores[job]) for job, cfg in jobs.items()],
    }
    return evidence | _conclude(search, rows, seeds)


def _conclude(search: Search, rows: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Return the winner, the claim of the study, and the val scores of the winner with the first seed."""
    claims = sorted((row for row in rows if row["claim"]), key=lambda row: row["difference"])
    if not claims:
        return {"winner": None, "claim": "no better than the base, within the noise"}
    winner = claims[0]
    winner_cfg = search.runs_of(search.trials[winner["trial"]]).cfg
    val = _val_scores(search, with_seed(winner_cfg, seeds[0]))
    claim = _claim_text(winner, len(seeds)) + _cost_text(search.base, winner_cfg)
    return {"winner": winner["trial"], "claim": claim, "val": val}


def _noise_jobs(search: Search) -> dict[Job, TrainConfig]:
    """Return the runs of the base that measure the noise floor."""
    first = search.base.seed + FIRST_NOISE_SEED
    seeds = range(first, first + search.study.evidence.noise_seeds)
    return {("noise", seed): with_seed(search.base, seed) for seed in seeds}


def _confirmation_seeds(search: Search) -> list[int]:
    first = search.base.seed + FIRST_CONFIRMATION_SEED
    return list(range(first, first + search.study.evidence.seeds))


def _trial_jobs(search: Search, trial: Trial, seeds: list[int]) -> dict[Job, TrainConfig]:
    cfg = search.runs_of(trial).cfg
    return {(str(trial.number), seed): with_seed(cfg, seed) for seed in seeds}


def with_seed(cfg: TrainConfig, seed: int) -> TrainConfig:
    return with_values(cfg, {"seed": seed})


# -- training


def _train_jobs(search: Search, jobs: dict[Job, TrainConfig]) -> dict[Job, float]:
    """Train the run of each job, and return the scores. The score of a diverged run is infinity."""
    split, name = search.study.objective.split("/")

    def train(cfg: TrainConfig) -> float:
        outcome = search.train(cfg)
        search.tick()
        if outcome.diverged:
            return math.inf
        if not outcome.ok:
            error = UsageError if outcome.refused else MainrunError
            raise error(f"the run {cfg.run_id} cannot be trained: {outcome.reason.removeprefix('error: ')}")
        return float(_final_scores(search.run_dir(cfg), split)[name])

    with ThreadPoolExecutor(search.engine.workers) as pool:
        try:
            return dict(zip(jobs, pool.map(train, jobs.values()), strict=True))
        except BaseException:  # stop all workers, so that Ctrl-C takes effect immediately
            search.engine.close()
            raise


def _final_scores(run: RunDir, split: str) -> dict[str, Any]:
    scores = (run.summary() or {}).get("scores", {})
    if split not in scores:
        raise RunError(f"{run.path}/summary.json is damaged: it has no score for {split}; {run.fix}")
    last: dict[str, Any] = scores[split]["last"]
    return last


def _val_scores(search: Search, cfg: TrainConfig) -> dict[str, Any]:
    """Return the winner's scores on the val split, which no other part of a study uses."""
    scores = _final_scores(search.run_dir(cfg), "val")
    return {"run": cfg.run_id, "full": scores["full"], "official": scores["official"]}


def _cost_row(search: Search, job: Job, cfg: TrainConfig, score: float) -> dict[str, Any]:
    """Return the row that records the cost of a noise run or a confirmation run."""
    name, seed = job
    cost = run_cost(search.run_dir(cfg), cfg)
    if math.isinf(score):
        cost = replace(cost, wasted=cost.trained)
    kind = "confirmation"
    trial = 0
    if name == "noise":
        kind = "noise"
    else:
        trial = int(name)
    return {"kind": kind, "trial": trial, "seed": seed, "run": cfg.run_id, **asdict(cost)}


# -- comparing


def _noise(scores: list[float]) -> tuple[float, float]:
    """Return the standard deviation and the noise floor of scores from runs with different seeds.

    If a run diverged, both values are infinite, so the study claims no gain.
    """
    if not all(map(math.isfinite, scores)):
        return math.inf, math.inf
    noise = stats.noise([scores])
    assert noise is not None
    return noise.sd, noise.floor


def _compare(
    candidates: list[Trial], base_scores: dict[int, float], scores: Mapping[Job, float], floor: float
) -> list[dict[str, Any]]:
    """Compare each candidate trial with the base. The p-values are adjusted by Holm's method."""
    differences = []
    for trial in candidates:
        trial_scores = {seed: scores[str(trial.number), seed] for seed in base_scores}
        differences.append(paired_difference(base_scores, trial_scores))
    p_values = [1.0 if difference.p is None else difference.p for difference in differences]
    rows = []
    for trial, difference, p in zip(candidates, differences, stats.holm(p_values), strict=True):
        rows.append(_evidence_row(trial, difference, difference.interval, p, floor))
    return rows


def _evidence_row(
    trial: Trial, difference: stats.Difference, interval: Interval | None, p: float, floor: float
) -> dict[str, Any]:
    """Return the row that compares a trial with the base."""
    claim = is_better(difference.mean, interval, p, floor)
    return {
        "trial": trial.number,
        "mean": difference.b,
        "difference": difference.mean,
        "interval": list(interval or (-math.inf, math.inf)),
        "p_holm": p,
        "claim": claim,
        "params": trial.values,
        "why": "" if claim else why_not(difference.mean, interval, p, floor),
    }


def _sequential_rows(candidates: list[Trial], test: SequentialTest) -> list[dict[str, Any]]:
    """Return the rows of a sequential confirmation, which also say why a trial got no further pairs."""
    rows = []
    for trial, candidate, p in zip(candidates, test.candidates, test.p_values(), strict=True):
        assert candidate.difference is not None
        row = _evidence_row(trial, candidate.difference, candidate.interval, p, candidate.floor)
        if row["why"] == NO_INTERVAL and candidate.difference.error is not None:
            row["why"] = f"{candidate.pairs} pairs are too few for an interval"
        facts = {"pairs": candidate.pairs, "floor": candidate.floor, "stopped": candidate.stopped}
        rows.append(row | facts)
    return rows


def _claim_text(row: dict[str, Any], seeds: int) -> str:
    low, high = row["interval"]
    gain = f"{-row['difference']:.4f} [{-high:.4f}, {-low:.4f}]"
    pairs = f"{row['pairs']} of at most {seeds}" if "pairs" in row else f"{seeds}"
    return f"trial {row['trial']} is better than the base by {gain}, {pairs} paired seeds"


def _cost_text(base: TrainConfig, winner: TrainConfig) -> str:
    """Return a text that compares the forward FLOPs of two configs, or "" if they are about equal."""
    base_flops, winner_flops = (forward_cost(cfg.segment_configs[-1]).scored for cfg in (base, winner))
    ratio = f"{winner_flops / base_flops:.2f}"
    return "" if ratio == "1.00" else f", with {ratio} times the forward FLOPs"
