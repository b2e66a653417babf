"""Score the mean of the probabilities of finished runs, as if the runs were one model.

The scores come from the log-probabilities in the run directories, so no weights are loaded. All runs have the
same weight in the mean, because weights that are fitted on held-out titles would make the score too good.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mainrun.config import MIN_COVERAGE
from mainrun.errors import RunError, UsageError
from mainrun.files.inputs import printable
from mainrun.run.progress import clock, percent, short
from mainrun.store import costs, rundir, token_scores
from mainrun.store.rundir import RunDir
from mainrun.store.token_scores import TokenScores
from mainrun.ui.compare import (
    MEMBERS,
    check_same_kind_of_start,
    compact,
    load_summary,
    machine_letters,
    scientific,
    show_table,
)

if TYPE_CHECKING:
    from rich.console import Console

SPLITS = ("val", "dev")
TOLERANCE = 1e-3  # relative difference of two scores of the same weights on different machines
COSTS = ("params", "members", "presentations_per_epoch", "flops", "forward_flops", "seconds")  # are added up
# A line break divides a long name into two lines.
HEAD = [
    "run", "seed", "full", "official", "params", MEMBERS, "seen/\nepoch", "training\nFLOPs",
    "forward\nFLOPs", "time", "machine",
]  # fmt: skip


class ScoredRun(NamedTuple):
    """A run of an ensemble."""

    run: RunDir
    seed: int
    summary: dict[str, Any]
    scores: TokenScores


# -- the formula


def mean_log_probs(log_probs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the log of the mean probability of each token, over the first 1, 2, ... arrays."""
    total: np.ndarray | None = None
    for count, array in enumerate(log_probs, 1):
        values = array.astype(np.float64)
        total = values if total is None else np.logaddexp(total, values)
        yield total - math.log(count)


def scores_of_means(log_probs: Iterable[np.ndarray], chars: int) -> list[float]:
    """Return the scores of the first 1, 2, ... arrays together, in nats per character."""
    return [-float(mean.sum()) / chars for mean in mean_log_probs(log_probs)]


def score_of(log_probs: np.ndarray, chars: int) -> float:
    """Return the score of one array, in nats per character."""
    return scores_of_means([log_probs], chars)[0]


# -- the runs


def load(names: Sequence[str], out: Path, split: str) -> list[ScoredRun]:
    """Find and read the runs of an ensemble. Raise UsageError if the runs cannot be combined."""
    if split not in SPLITS:
        raise UsageError(f"got --split {split!r}; use val or dev")
    if len(names) < 2:
        raise UsageError(f"got {len(names)} run, but an ensemble has at least two; give two or more runs")
    run_dirs = [rundir.find(name, out) for name in names]
    paths = Counter(run.path.resolve() for run in run_dirs)
    twice = [run for run in run_dirs if paths[run.path.resolve()] > 1]
    if twice:
        raise UsageError(f"run {twice[0].path.name} is given more than once; give each run once")
    runs = [_load_run(run, split) for run in run_dirs]
    for i, scored in enumerate(runs):
        for earlier in runs[:i]:
            _check_different_weights(earlier, scored)
    for scored in runs[1:]:
        _check_same_tokens(runs[0], scored, split)
        check_same_kind_of_start(runs[0].summary, scored.summary)
    return runs


def _load_run(run: RunDir, split: str) -> ScoredRun:
    summary = load_summary(run)
    by_split = token_scores.read(run)
    if split not in by_split:
        fix = "score the other split, or train all runs with dev_frac above 0"
        raise RunError(f"run {run.path.name} has no {split} titles; {fix}")
    scores = by_split[split]
    full = score_of(scores.full, scores.chars)
    last = summary.get("scores", {}).get(split, {}).get("last", {}).get("full", math.nan)
    if not math.isclose(full, last, rel_tol=TOLERANCE):
        raise RunError(
            f"{run.path / token_scores.FILE} gives the full score {full:.4f} on {split}, "
            f"but summary.json says {last:.4f}; {run.fix}"
        )
    return ScoredRun(run, run.config().seed, summary, scores)


def _check_different_weights(a: ScoredRun, b: ScoredRun) -> None:
    """Raise UsageError if two runs have the same weights, because one of them would add nothing."""
    weights = a.summary.get("weights")
    if weights and weights == b.summary.get("weights"):
        raise UsageError(
            f"{a.run.path} and {b.run.path} have the same weights; give only one of them, "
            "or train the runs with different seeds"
        )


def _check_same_tokens(first: ScoredRun, other: ScoredRun, split: str) -> None:
    """Raise RunError if two runs were scored on different tokens."""
    theirs = _data_of(other, split)
    differences = []
    for name, value in _data_of(first, split).items():
        if theirs[name] != value:
            differences.append(f"{name} {value} against {theirs[name]}")
    if differences:
        raise RunError(
            f"{first.run.path.name} and {other.run.path.name} were scored on different tokens: "
            f"{'; '.join(differences)}; combine runs of the same corpus, num_titles, shuffle, val_frac, "
            "dev_frac and tokenizer"
        )


def _data_of(scored: ScoredRun, split: str) -> dict[str, str]:
    """Return the values that identify the tokens of a run."""
    fingerprints = scored.summary["fingerprints"]
    return {
        "corpus fingerprint": fingerprints["corpus"][:12],
        f"{split} fingerprint": str(fingerprints.get(split))[:12],
        "tokenizer": str(scored.summary.get("tokenizer"))[:12],
        "token hash": scored.scores.tokens[:12],
        "number of characters": f"{scored.scores.chars:,}",
    }


# -- the result


def score(runs: list[ScoredRun], split: str) -> dict[str, Any]:
    """Return the scores and the costs of each run and of the ensemble."""
    chars = runs[0].scores.chars
    rows = [_row(scored) for scored in runs]
    curve = scores_of_means((scored.scores.full for scored in runs), chars)
    singles = [row["full"] for row in rows]
    mean = sum(singles) / len(singles)
    official = None
    coverage = None
    if len({tuple(scored.summary["geometry"]) for scored in runs}) == 1:
        official = scores_of_means((scored.scores.official for scored in runs), chars)[-1]
        coverage = rows[0]["coverage"]
    together: dict[str, Any] = {"full": curve[-1], "official": official, "coverage": coverage}
    for name in COSTS:
        values = [row[name] for row in rows]
        together[name] = None if None in values else sum(values)
    return {
        "split": split,
        "runs": rows,
        "ensemble": together,
        "mean_full": mean,
        "gain": mean - curve[-1],
        "curve": curve,
    }


def _row(scored: ScoredRun) -> dict[str, Any]:
    summary = scored.summary
    scores = scored.scores
    return {
        "run": summary["run"],
        "seed": scored.seed,
        "full": score_of(scores.full, scores.chars),
        "official": score_of(scores.official, scores.chars),
        "coverage": len(scores.official) / len(scores.full),
        "params": summary["params"],
        "members": costs.members(summary),
        "presentations_per_epoch": costs.presentations_per_epoch(summary),
        "flops": summary.get("flops"),
        "forward_flops": costs.forward_flops(summary),
        "seconds": summary["seconds"],
        "machine": costs.machine(summary),
        "steps": summary["steps"],
        "reused": summary.get("ledger", {}).get("reused", 0),
        "failed_guards": [guard["name"] for guard in summary["guards"] if guard["status"] == "fail"],
    }


# -- the table


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result of `score`."""
    rows = result["runs"]
    letters = machine_letters(row["machine"] for row in rows)
    cells = []
    for row in rows:
        name_and_seed = [row["run"], str(row["seed"])]
        cells.append([*name_and_seed, *_cells(row, star=bool(row["reused"])), letters[row["machine"]]])
    total = _cells(result["ensemble"], star=any(row["reused"] for row in rows))
    cells.append([f"all {len(rows)} runs", "", *total, ", ".join(letters.values())])
    show_table(HEAD, cells, console)
    for machine, letter in letters.items():
        console.print(f"machine {letter}: {printable(machine)}", soft_wrap=True, markup=False)
    for line in _lines(result):
        console.print(line, soft_wrap=True, markup=False)


def _cells(row: dict[str, Any], *, star: bool) -> list[str]:
    """Return the cells of the scores and the costs."""
    official = ""
    if row["official"] is not None:
        flag = "!" if row["coverage"] < MIN_COVERAGE else ""
        official = f"{row['official']:.4f} ({percent(row['coverage'])}{flag})"
    flops = scientific(row["flops"])
    forward = compact(row["forward_flops"])
    time = clock(row["seconds"])
    if star:
        time += "*"
    members = str(row["members"])
    presented = str(row["presentations_per_epoch"])
    return [f"{row['full']:.4f}", official, short(row["params"]), members, presented, flops, forward, time]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines below the table."""
    full = result["ensemble"]["full"]
    yield (
        f"full on {result['split']}: {full:.4f} for the mean of the probabilities, {result['mean_full']:.4f} "
        f"for the mean of the single scores; the gain is {result['gain']:.4f}"
    )
    if len(result["curve"]) > 2:
        steps = ", ".join(f"{count}: {value:.4f}" for count, value in enumerate(result["curve"], 1))
        yield f"full of the first runs: {steps}"
    if result["ensemble"]["official"] is None:
        yield (
            "The runs have different official geometries, so their official scores cover different targets, "
            "and the ensemble has no official score."
        )
    if any(row["coverage"] < MIN_COVERAGE for row in result["runs"]):
        yield (
            f"(!) This official score covers less than {MIN_COVERAGE:.0%} of {result['split']}, "
            "so it is not comparable."
        )
    for row in result["runs"]:
        if row["reused"]:
            yield (
                f"(*) {row['run']}: {row['reused']:,} of {row['steps']:,} steps were copied from the store; "
                "its time counts only the other steps"
            )
        if row["failed_guards"]:
            yield f"{row['run']}: failed guards: {', '.join(row['failed_guards'])}"
