"""Lay out the page of a study: its facts as sentences, two tables, and its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reports.evidence.compared import list_seeds
from reports.evidence.figures import registry, study_page
from reports.evidence.figures.style import WIDTH
from reports.evidence.front_page import ROOM, count
from reports.evidence.load import ReportData, Study
from reports.evidence.pdf import heading, heights, new_page, paragraph, side_by_side, table
from reports.evidence.studies import ledger, objective
from reports.evidence.tables import Table, describe, fixed, integer
from reports.evidence.tables import study as study_tables

if TYPE_CHECKING:
    from reportlab.graphics.shapes import Drawing
    from reportlab.platypus import Flowable

SLACK = 10.0  # the layout may round the heights up
MOST_FIELDS = 8  # a larger space is in the appendix, and the page shows its first fields
FIRST_FIELDS = 4
LONGEST = 90  # the number of letters of a setting in a shortened table
OF_FRUGAL = ("lanes", "horizons", "late", "until")  # the options of the sampler frugal alone
LEAST = 3.0  # the height of all figures together, in inches


def page(
    study: Study, number: int, tables: Mapping[str, Table], drawings: Mapping[str, Drawing]
) -> Iterator[Flowable]:
    yield new_page()
    yield from words(study, number, tables)
    for row in study_page.arrange([name for name in registry.STUDY if f"study-{number}-{name}" in drawings]):
        shown = [(drawings[f"study-{number}-{name}"], registry.STUDY[name].caption) for name in row.names]
        yield from side_by_side(shown)


def words(study: Study, number: int, tables: Mapping[str, Table]) -> Iterator[Flowable]:
    """Yield the heading, the sentences and the tables of the page."""
    yield heading(f"Study {study.name}", 0)
    yield paragraph(" ".join(sentences(study)), "facts")
    confirmed = tables.get(f"study_{number}_confirmation")
    space = tables.get(f"study_{number}_space")
    if space is not None and is_large(space):
        if confirmed is not None:
            confirmed = replace(confirmed, rows=[list(map(_shorten, row)) for row in confirmed.rows])
        note = f"{len(space.rows) - FIRST_FIELDS} more fields are in the appendix."
        space = replace(space, rows=space.rows[:FIRST_FIELDS], note=note)
    yield from table(confirmed)
    yield from table(space)


def figure_room(study: Study, number: int, tables: Mapping[str, Table]) -> float:
    """Return the height in inches that the words leave for the figures of a study."""
    used = heights(words(study, number, tables))
    for row in study_page.ROWS:
        captions = [(registry.STUDY[name].caption, width) for name, width in row.names.items()]
        used += max(heights([paragraph(text, "caption")], width / WIDTH - 0.02) for text, width in captions)
    return max(LEAST, (ROOM - used - SLACK) / 72)


def figure_rooms(data: ReportData) -> dict[int, float]:
    """Return the room for the figures of each study, by the number of the study."""
    rooms = {}
    for number, study in enumerate(data.studies, 1):
        tables = {table.name: table for table in study_tables(study, number)}
        rooms[number] = figure_room(study, number, tables)
    return rooms


def is_large(space: Table) -> bool:
    """Return whether a search space has too many fields for the page of its study."""
    return len(space.rows) > MOST_FIELDS


def _shorten(cell: Any) -> Any:
    if isinstance(cell, str) and len(cell) > LONGEST:
        return f"{cell[:LONGEST]}…"
    return cell


# -- the facts


def sentences(study: Study) -> Iterator[str]:
    """Yield the facts of a study as sentences."""
    fields = count(len(study.fact("space") or study.searched_fields), "field")
    preset = study.fact("preset")
    base = f" of {preset}" if preset else ""
    yield f"The study searched {fields}{base} for the lowest {objective(study)}."
    states = Counter(str(trial.get("state")) for trial in study.trials)
    counts = [f"{number} {state}" for state, number in sorted(states.items())]
    yield f"Its {count(len(study.trials), 'trial')} ended as follows: {', '.join(counts)}."
    if study.completed:
        best = min(study.completed, key=lambda trial: float(trial["value"]))
        yield f"Trial {best['trial']} has the lowest value, {fixed(4)(float(best['value']))}."
    yield from _search(study)
    yield from _noise(study)
    yield from _confirmation(study)
    yield from _steps(study)


def _search(study: Study) -> Iterator[str]:
    sampler = study.fact("sampler")
    if isinstance(sampler, dict):
        hidden = ("name",) if sampler.get("name") == "frugal" else ("name", *OF_FRUGAL)
        options = describe({name: value for name, value in sampler.items() if name not in hidden})
        with_options = f" ({options})" if options else ""
        yield f"The sampler {sampler.get('name', 'of the study')} chose the settings{with_options}."
    elif sampler:
        yield f"The sampler {describe(sampler)} chose the settings."
    budget = study.fact("budget")
    if budget:
        yield f"The budget was {describe(budget)}."
    rungs = study.fact("rungs")
    if rungs:
        yield f"Trials could be stopped early at rungs: {describe(rungs)}."
    fixed_settings = study.fact("set")
    if fixed_settings:
        yield f"All trials set {describe(fixed_settings)}."


def _noise(study: Study) -> Iterator[str]:
    noise = study.fact("noise")
    if not isinstance(noise, dict) or not _is_number(noise.get("floor")):
        return
    scores = noise.get("values")
    if isinstance(scores, list) and scores and all(map(_is_number, scores)):
        listed = _joined([fixed(4)(score) for score in scores])
        seeds = noise.get("seeds")
        named = f" with {list_seeds(seeds)}" if isinstance(seeds, list) and seeds else ""
        yield f"The base scored {listed}{named}, so the noise floor is {fixed(4)(noise['floor'])}."
    else:
        yield f"The noise floor is {fixed(4)(noise['floor'])}."


def _confirmation(study: Study) -> Iterator[str]:
    seeds = study.fact("seeds")
    scores = study.fact("base")
    if isinstance(seeds, list) and seeds:
        text = f"The best trials and the base were trained again with {list_seeds(seeds)}"
        if isinstance(scores, list) and scores and all(map(_is_number, scores)):
            text += f"; the base scored {_joined([fixed(4)(score) for score in scores])}"
        yield f"{text}."
    claimed = study.fact("claim")
    if claimed:
        yield f"The claim of the study: {describe(claimed)}."


def _steps(study: Study) -> Iterator[str]:
    steps = ledger(study)
    if steps.get("asked"):
        parts = [f"{integer(number)} were {name}" for name, number in steps.items() if name != "asked"]
        yield f"Of {integer(steps['asked'])} requested steps, {_joined(parts)}."
    for rung, rho in (study.fact("rung_correlation") or {}).items():
        if rho is not None:
            yield f"The rank correlation of rung {rung} with the last rung is {rho:.2f}."


def _joined(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
