"""Analyze an exported study: count its steps, compare its rungs, and compute the importance of its fields."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mainrun import stats
from reports.evidence.load import Study

if TYPE_CHECKING:
    import optuna

LEDGER = ("asked", "trained", "reused", "wasted")
FEWEST = 10  # the minimum number of completed trials for computing the importance of a field
TOP = 0.25  # the fraction of completed trials that are considered the best trials

Trials = Sequence[dict[str, Any]]


def objective(study: Study) -> str:
    """Return the name of the objective, which is the value that a study minimizes."""
    return str(study.fact("objective") or "value")


def values(trials: Trials) -> list[float]:
    return [float(trial["value"]) for trial in trials]


def setting(trial: Mapping[str, Any], field: str) -> Any:
    """Return the value of a config field in a trial, or None if the field was not active in the trial."""
    return trial.get(f"params.{field}")


def settings(trials: Trials, field: str) -> list[Any]:
    return [setting(trial, field) for trial in trials]


def with_field(trials: Trials, field: str) -> list[dict[str, Any]]:
    """Return the trials in which a config field was active."""
    return [trial for trial in trials if setting(trial, field) is not None]


# -- steps


def ledger(study: Study) -> dict[str, float]:
    """Return how many steps a study and its confirmation requested, trained, reused and wasted.

    If the export has no total, sum the steps of all trials.
    """
    rows = study.trials
    if study.facts.get("ledger"):
        rows = [study.facts["ledger"]]
    steps = {}
    for name in LEDGER:
        counts = [float(row[name]) for row in rows if row.get(name) is not None]
        if counts:
            steps[name] = sum(counts)
    return steps


# -- rungs


@dataclass(frozen=True)
class RungValues:
    """The values of trials at a rung and at the last rung.

    Each list contains only the trials that have a value at both rungs.
    """

    number: int
    values: list[float]  # the value of each trial at this rung
    last: list[float]  # the value of each trial at the last rung

    @property
    def correlation(self) -> float | None:
        """The rank correlation between the values at this rung and the values at the last rung."""
        return stats.spearman(self.values, self.last)


def rungs(study: Study) -> list[RungValues]:
    """Return all rungs below the last rung for which at least three trials can be compared."""
    scores: list[dict[int, float]] = []
    top = 0
    for trial in study.completed:
        if trial.get("scores"):
            by_rung = {int(rung): float(score) for rung, score in json.loads(trial["scores"]).items()}
            scores.append(by_rung)
            top = max(top, *by_rung, 0)
    rows = []
    for number in range(top):
        row = RungValues(number, [], [])
        for by_rung in scores:
            if number in by_rung and top in by_rung:
                row.values.append(by_rung[number])
                row.last.append(by_rung[top])
        if len(row.values) > 2:
            rows.append(row)
    return rows


# -- importance


@dataclass(frozen=True)
class Scale:
    """The positions on an axis at which the values of a config field are drawn.

    The position of a number is the number itself. The position of any other value is the value's index in
    `names`.
    """

    places: list[float]
    names: list[str]  # sorted names of the values, or an empty list if the values are numbers
    log: bool

    @classmethod
    def of(cls, values: Sequence[Any]) -> Scale:
        """Create a scale from values.

        The scale is logarithmic if the values are positive numbers that span more than a factor of 20.
        """
        if all(map(is_number, values)):
            places = list(map(float, values))
            return cls(places, [], min(places) > 0 and max(places) / min(places) > 20)
        texts = list(map(str, values))
        names = sorted(set(texts))
        return cls([float(names.index(text)) for text in texts], names, False)

    @classmethod
    def of_field(cls, study: Study, field: str, values: Sequence[Any]) -> Scale:
        """Create a scale for values of a searched field, which is logarithmic if the search was."""
        scale = cls.of(values)
        space = study.fact("space")
        bounds = space.get(field) if isinstance(space, dict) else None
        if not isinstance(bounds, dict) or bounds.get("low") is None or scale.names:
            return scale
        return cls(scale.places, [], bool(bounds.get("log")) and min(scale.places) > 0)

    def unit(self) -> np.ndarray:
        """Return all positions, scaled to the range from 0 to 1."""
        places = np.array(self.places)
        if self.log:
            places = np.log10(places)
        low = places.min()
        high = places.max()
        if low == high:
            return np.full(len(places), 0.5)
        return (places - low) / (high - low)

    def distribution(self) -> optuna.distributions.BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        if self.names:
            return CategoricalDistribution(self.names)
        return FloatDistribution(min(self.places), max(self.places), log=self.log)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def by_importance(fields: Iterable[str], shares: Mapping[str, float]) -> list[str]:
    """Return the fields, sorted from the most important to the least important."""
    return sorted(fields, key=lambda field: -shares.get(field, 0.0))


def importance(study: Study) -> dict[str, float]:
    """Return the importance of each searched field of a study.

    If the export does not contain the importance of fields, PED-ANOVA computes the importance. If the
    importance cannot be computed, the result is empty.
    """
    exported = study.fact("importance")
    if not isinstance(exported, dict):
        return ped_anova(study)
    shares = {}
    for name, share in exported.items():
        if isinstance(share, (int, float)):
            shares[str(name).removeprefix("params.")] = float(share)
    return shares


def comparable(study: Study) -> tuple[Trials, int | None]:
    """Return the trials from which the importance is computed, and the rung of their values.

    These are the trials that were trained to the end. If there are too few of them, these are the trials
    with a score at the highest rung that enough trials have reached, with this score as their value.
    """
    if len(study.completed) >= FEWEST:
        return study.completed, None
    by_rung: dict[int, list[dict[str, Any]]] = {}
    for trial in study.scored:
        for rung, score in json.loads(trial.get("scores") or "{}").items():
            by_rung.setdefault(int(rung), []).append(trial | {"value": float(score)})
    enough = [rung for rung, trials in by_rung.items() if len(trials) >= FEWEST]
    if not enough:
        return study.completed, None
    return by_rung[max(enough)], max(enough)


def ped_anova(study: Study) -> dict[str, float]:
    """Compute the importance of each field by comparing the best trials with all completed trials.

    The importance values sum to 1. The result is empty if there are too few trials, or if the values of the
    best trials do not differ from the values of the other trials.
    """
    scales: dict[str, Scale] = {}
    trials, _ = comparable(study)
    for field in study.searched_fields:
        active = with_field(trials, field)
        if len(active) >= FEWEST:
            scales[field] = Scale.of(settings(active, field))
    if not scales or len(set(values(trials))) < 2:
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rebuilt = optuna.create_study(direction="minimize")
    rebuilt.add_trials(optuna_trials(trials, scales))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignore Optuna's warnings about trials that lack a field
        shares = get_param_importances(
            rebuilt,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP),
            params=list(scales),
            normalize=False,
        )
    total = sum(shares.values())
    if not total > 0:
        return {}
    return {field: shares[field] / total for field in scales}


def optuna_trials(completed: Trials, scales: Mapping[str, Scale]) -> list[optuna.trial.FrozenTrial]:
    """Convert the completed trials of a study to trials of Optuna."""
    import optuna

    distributions = {field: scale.distribution() for field, scale in scales.items()}
    trials = []
    for trial in completed:
        params = {}
        for field, scale in scales.items():
            value = setting(trial, field)
            if value is not None and scale.names:
                params[field] = str(value)
            elif value is not None:
                params[field] = value
        active = {field: distributions[field] for field in params}
        value = float(trial["value"])
        trials.append(optuna.trial.create_trial(params=params, distributions=active, value=value))
    return trials
