"""What a study may claim: the best trials and the base once more, on seeds that the search never saw, against what a seed alone does."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from mainrun import stats
from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, RunError, UsageError
from mainrun.store.rundir import RunDir
from sweeps.driver import Search, Trial
from sweeps.ledger import spent
from sweeps.space import changed

NOISE, FRESH = 1, 101  # where their seeds begin, counted from the base's


def confirm(search: Search) -> dict[str, Any]:
    """Noise floor, paired differences with their intervals, and the sentence that they allow."""
    study, base = search.study, search.base
    asks = study.evidence
    chosen = [trial for trial in search.best(asks.best + 1) if trial.number][: asks.best]
    noise_seeds = [base.seed + NOISE + i for i in range(asks.noise_seeds)]
    fresh = [base.seed + FRESH + i for i in range(asks.seeds)]
    jobs = {("noise", seed): seeded(base, seed) for seed in noise_seeds}
    for trial in [search.trials[0], *chosen]:
        cfg = search.made(trial).cfg
        jobs |= {(str(trial.number), seed): seeded(cfg, seed) for seed in fresh}
    scores = _trained(search, jobs)
    sigma, single_floor = _noise([scores["noise", seed] for seed in noise_seeds])
    floor = single_floor / math.sqrt(len(fresh))  # of a difference of means over so many seeds
    mine = {seed: scores["0", seed] for seed in fresh}
    found = [_difference(mine, {seed: scores[str(t.number), seed] for seed in fresh}) for t in chosen]
    adjusted = stats.holm([1.0 if d.p is None else d.p for d in found])
    rows = [_row(t, d, p, floor) for t, d, p in zip(chosen, found, adjusted, strict=True)]
    claimed = sorted((row for row in rows if row["claim"]), key=lambda row: row["difference"])
    result: dict[str, Any] = {
        "objective": study.objective, "seeds": fresh, "base": [mine[seed] for seed in fresh], "rows": rows,
        "noise": {"seeds": noise_seeds, "values": [scores["noise", s] for s in noise_seeds], "sigma": sigma, "floor": floor},
        "runs": [_cost(search, job, cfg, scores[job]) for job, cfg in jobs.items()],
    }  # fmt: skip
    if not claimed:
        return result | {"winner": None, "claim": "not better than the base within noise"}
    winner = claimed[0]
    low, high = winner["interval"]
    by = f"{-winner['difference']:.4f} [{-high:.4f}, {-low:.4f}]"
    text = f"trial {winner['trial']} is better than the base by {by}, {len(fresh)} paired seeds"
    cfg = search.made(search.trials[winner["trial"]]).cfg
    return result | {"winner": winner["trial"], "claim": text, "val": _val(search, seeded(cfg, fresh[0]))}


def _cost(search: Search, job: tuple[str, int], cfg: TrainConfig, score: float) -> dict[str, Any]:
    """A run's row of the ledger: it belongs to what the study cost as the trials do."""
    found = spent(search.run_dir(cfg), cfg)
    found = replace(found, wasted=found.trained) if math.isinf(score) else found
    kind, trial = ("noise", 0) if job[0] == "noise" else ("confirmation", int(job[0]))
    return {"kind": kind, "trial": trial, "seed": job[1], "run": cfg.run_id, **asdict(found)}


def seeded(cfg: TrainConfig, seed: int) -> TrainConfig:
    return changed(cfg, {"seed": seed})


def _noise(values: list[float]) -> tuple[float, float]:
    """Sigma and floor of what a seed alone does. Both are infinite if the base diverged on a seed, so that nothing is claimed."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf
    noise = stats.noise([values])
    assert noise is not None
    return noise.sd, noise.floor


def _difference(base: dict[int, float], trial: dict[int, float]) -> stats.Difference:
    """Paired by seed. A run that diverged scores infinity, which has no spread, so there is no interval and no p-value."""
    if all(map(math.isfinite, (*base.values(), *trial.values()))):
        return stats.difference(base, trial)
    return stats.Difference(fmean(base.values()), fmean(trial.values()), len(base), len(trial), (), None, 0)


def _row(trial: Trial, d: stats.Difference, p: float, floor: float) -> dict[str, Any]:
    interval = d.interval or (-math.inf, math.inf)
    claim = interval[1] < 0 and -d.mean > floor and p < 1 - stats.LEVEL
    return {
        "trial": trial.number, "mean": d.b, "difference": d.mean, "interval": list(interval), "p_holm": p, "claim": claim,
        "params": trial.values, "why": "" if claim else _why(d, interval, floor, p),
    }  # fmt: skip


def _why(d: stats.Difference, interval: tuple[float, float], floor: float, p: float) -> str:
    if d.mean >= 0:
        return "it is not better"
    if d.interval is None:
        return "a run diverged, so there is no interval"
    if interval[1] >= 0:
        return "its interval holds zero"
    return (
        f"the difference is within the noise floor {floor:.4f}"
        if -d.mean <= floor
        else f"p={p:.3f} after Holm's correction"
    )


def _trained(search: Search, jobs: dict[tuple[str, int], TrainConfig]) -> dict[tuple[str, int], float]:
    split, name = search.study.objective.split("/")

    def work(cfg: TrainConfig) -> float:
        outcome = search.train(cfg)
        search.tick()
        if outcome.diverged:
            return math.inf
        if not outcome.ok:
            kind = UsageError if outcome.refused else MainrunError
            raise kind(f"{cfg.run_id} cannot be trained: {outcome.why.removeprefix('error: ')}")
        return float(_scores(search.run_dir(cfg), split)[name])

    with ThreadPoolExecutor(search.engine.workers) as pool:
        try:
            return dict(zip(jobs, pool.map(work, jobs.values()), strict=True))
        except BaseException:  # a Ctrl-C would wait for all of them
            search.engine.close()
            raise


def _scores(run: RunDir, split: str) -> dict[str, Any]:
    scores = (run.summary() or {}).get("scores", {})
    if split not in scores:
        raise RunError(f"{run.path}/summary.json is damaged: it has no score of {split}; {run.fix}")
    found: dict[str, Any] = scores[split]["last"]
    return found


def _val(search: Search, cfg: TrainConfig) -> dict[str, Any]:
    """Read here, and nowhere else in a study."""
    last = _scores(search.run_dir(cfg), "val")
    return {"run": cfg.run_id, "full": last["full"], "official": last["official"]}
