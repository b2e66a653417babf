"""Confirm the best trials of a study.

The configs of the best trials and the base config are trained with new seeds. Each gain over the base is then
compared with the noise between seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from mainrun import stats
from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.plan.cost import forward_cost
from mainrun.store.rundir import RunDir
from sweeps.driver import Search
from sweeps.ledger import run_cost
from sweeps.space import with_values
from sweeps.trial import Trial

FIRST_NOISE_SEED = 1  # the first noise seed is the seed of the base config plus this number
FIRST_CONFIRMATION_SEED = 101  # the first confirmation seed is the seed of the base config plus this number

Job = tuple[str, int]  # the first item is "noise" or a trial number, and the second item is a seed


def confirm(search: Search) -> dict[str, Any]:
    """Train the noise runs and the confirmation runs, and return the evidence of a study.

    The evidence contains the noise floor, the comparison of each trial with the base, and the claim.
    """
    base = search.base
    settings = search.study.evidence
    candidates = [trial for trial in search.best(settings.best + 1) if trial.number != 0][: settings.best]
    noise_seeds = [base.seed + FIRST_NOISE_SEED + i for i in range(settings.noise_seeds)]
    seeds = [base.seed + FIRST_CONFIRMATION_SEED + i for i in range(settings.seeds)]
    jobs: dict[Job, TrainConfig] = {}
    for seed in noise_seeds:
        jobs["noise", seed] = with_seed(base, seed)
    for trial in [search.trials[0], *candidates]:
        cfg = search.runs_of(trial).cfg
        for seed in seeds:
            jobs[str(trial.number), seed] = with_seed(cfg, seed)
    scores = _train_jobs(search, jobs)

    noise_scores = [scores["noise", seed] for seed in noise_seeds]
    sigma, single_floor = _noise(noise_scores)
    floor = single_floor / math.sqrt(len(seeds))  # the noise floor of the difference between two means
    base_scores = {seed: scores["0", seed] for seed in seeds}
    rows = _compare(candidates, base_scores, scores, floor)
    evidence: dict[str, Any] = {
        "objective": search.study.objective,
        "seeds": seeds,
        "base": list(base_scores.values()),
        "rows": rows,
        "noise": {"seeds": noise_seeds, "values": noise_scores, "sigma": sigma, "floor": floor},
        "runs": [_cost_row(search, job, cfg, scores[job]) for job, cfg in jobs.items()],
    }
    claims = sorted((row for row in rows if row["claim"]), key=lambda row: row["difference"])
    if not claims:
        return evidence | {"winner": None, "claim": "no better than the base, within the noise"}
    winner = claims[0]
    winner_cfg = search.runs_of(search.trials[winner["trial"]]).cfg
    val = _val_scores(search, with_seed(winner_cfg, seeds[0]))
    claim = _claim_text(winner, len(seeds)) + _cost_text(search.base, winner_cfg)
    return evidence | {"winner": winner["trial"], "claim": claim, "val": val}


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
        differences.append(_difference(base_scores, trial_scores))
    p_values = [1.0 if difference.p is None else difference.p for difference in differences]
    rows = []
    for trial, difference, p in zip(candidates, differences, stats.holm(p_values), strict=True):
        rows.append(_evidence_row(trial, difference, p, floor))
    return rows


def _difference(base: dict[int, float], trial: dict[int, float]) -> stats.Difference:
    """Compare the scores of the base with the scores of a trial, paired by seed.

    The score of a diverged run is infinity. A difference with an infinite score has no confidence interval
    and no p-value.
    """
    if all(map(math.isfinite, (*base.values(), *trial.values()))):
        return stats.difference(base, trial)
    return stats.Difference(fmean(base.values()), fmean(trial.values()), len(base), len(trial), (), None, 0)


def _evidence_row(trial: Trial, difference: stats.Difference, p: float, floor: float) -> dict[str, Any]:
    """Return the row that compares a trial with the base.

    A claim that the trial is better must pass three tests. The confidence interval of the difference must be
    below zero, the gain must exceed the noise floor, and the p-value must be significant.
    """
    interval = difference.interval or (-math.inf, math.inf)
    claim = interval[1] < 0 and -difference.mean > floor and p < 1 - stats.LEVEL
    return {
        "trial": trial.number,
        "mean": difference.b,
        "difference": difference.mean,
        "interval": list(interval),
        "p_holm": p,
        "claim": claim,
        "params": trial.values,
        "why": "" if claim else _why_not(difference, floor, p),
    }


def _why_not(difference: stats.Difference, floor: float, p: float) -> str:
    """Return the reason why the study does not claim that a trial is better than the base."""
    if difference.mean >= 0:
        return "it is not better"
    if difference.interval is None:
        return "a run diverged, so there is no interval"
    if difference.interval[1] >= 0:
        return "its interval contains zero"
    if -difference.mean <= floor:
        return f"the difference is within the noise floor {floor:.4f}"
    return f"p={p:.3f} after Holm's correction"


def _claim_text(row: dict[str, Any], seeds: int) -> str:
    low, high = row["interval"]
    gain = f"{-row['difference']:.4f} [{-high:.4f}, {-low:.4f}]"
    return f"trial {row['trial']} is better than the base by {gain}, {seeds} paired seeds"


def _cost_text(base: TrainConfig, winner: TrainConfig) -> str:
    """Return a text that compares the forward FLOPs of two configs, or "" if they are about equal."""
    base_flops, winner_flops = (forward_cost(cfg.segment_configs[-1]).scored for cfg in (base, winner))
    ratio = f"{winner_flops / base_flops:.2f}"
    return "" if ratio == "1.00" else f", with {ratio} times the forward FLOPs"
