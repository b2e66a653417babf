"""Lay out page 1: the claim, the numbers, the difference, two figures, the cost, and the findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from reports.evidence import findings, tables
from reports.evidence.compared import Comparison, comparison
from reports.evidence.figures import front
from reports.evidence.figures.series import short_names
from reports.evidence.load import CHOSEN, Recipe, ReportData
from reports.evidence.pdf import big_numbers, heading, heights, paragraph, side_by_side, table
from reports.evidence.tables import Column, Row, Table, fixed, integer, mean_of, text, with_ratio

if TYPE_CHECKING:
    from reportlab.graphics.shapes import Drawing
    from reportlab.platypus import Flowable

ROOM = 752.0  # the height of the text of a page, in points
INTERVAL = 72.0  # the height of the figure of the difference, in points
SLACK = 16.0  # the captions may need one more line than estimated
LOWEST, HIGHEST = 2.2, 5.6  # the height of the two figures, in inches


def first_page(
    data: ReportData, title: str, costs: Table | None, drawings: Mapping[str, Drawing]
) -> Iterator[Flowable]:
    compared = comparison(data)
    yield paragraph(title, "title")
    yield paragraph(subtitle(data), "small")
    yield heading("Result", 0)
    yield paragraph(sentence(data), "claim")
    if compared is None:
        yield paragraph("No headline figure", "big")
    else:
        yield from numbers(compared)
    if "interval" in drawings:
        yield drawings["interval"]
    captions = front.captions(data)
    shown = [(drawings[name], caption) for name, caption in captions.items() if name in drawings]
    yield from side_by_side(shown)
    yield from table(costs)
    yield heading("Findings", 1)
    for number, finding in enumerate(three_findings(data), 1):
        yield paragraph(f"{number}. {finding}", "finding")


def figure_height(data: ReportData, title: str) -> float:
    """Return the height of the two figures in inches, so that they fill what the text leaves of page 1."""
    used = heights(first_page(data, title, headline(data), {}))
    if comparison(data) is not None:
        used += INTERVAL
    captions = [heights([paragraph(each, "caption")], 0.48) for each in front.captions(data).values()]
    used += max(captions, default=0.0)
    return min(HIGHEST, max(LOWEST, (ROOM - used - SLACK) / 72))


def sentence(data: ReportData) -> str:
    """Return the claim of page 1 in one sentence, and how its recipe was selected."""
    if not data.runs and data.studies:
        study = data.studies[0]
        claimed = study.fact("claim")
        if claimed:
            return f"Study {study.name}: {claimed}{evidence_of(comparison(data))}."
        return f"Study {study.name} has confirmed no trial with new seeds, so it makes no claim."
    said = findings.claim(data).text
    if data.selection.startswith("the lowest") and data.optimised is not None:
        said += f" {data.optimised.name} was selected on val itself, as {data.selection}."
        said += " Part of its lead comes from this selection."
    if len(data.recipes) > 2 and data.selection == CHOSEN.format(len(data.recipes)):
        said += f" The author chose these two of {len(data.recipes)} recipes."
    return shorter(data, said)


def evidence_of(compared: Comparison | None) -> str:
    """Return the difference, its interval and the noise floor, as the second half of a sentence."""
    if compared is None or compared.mean is None:
        return ""
    signed = fixed(4, sign=True)
    words = f"; {compared.names[1]} changes {compared.score} by {signed(compared.mean)}"
    if compared.interval:
        words += f" (95% interval {signed(compared.interval[0])} to {signed(compared.interval[1])})"
    if compared.floor is not None:
        words += f", and the noise floor is {fixed(4)(compared.floor)}"
    return words


def shorter(data: ReportData, words: str) -> str:
    """Replace the names of the two main recipes by their short names."""
    pair = [recipe for recipe in (data.baseline, data.optimised) if recipe is not None]
    if len(pair) == 2:
        names = short_names(data, pair)
        for name in sorted(names, key=len, reverse=True):
            words = words.replace(name, names[name])
    return words


def numbers(compared: Comparison) -> list[Flowable]:
    """Return both scores and their difference in large type, with the seeds and the interval below."""
    signed = fixed(4, sign=True)
    below = "no interval: one seed"
    if compared.interval:
        low, high = compared.interval
        below = f"95% interval {signed(low)} to {signed(high)}"
    cells = [
        (name, fixed(4)(score), seeds)
        for name, score, seeds in zip(compared.names, compared.scores, compared.seeds, strict=True)
    ]
    share = ""
    if compared.scores[0]:
        share = f", {signed_percent(100 * compared.mean_or_zero / compared.scores[0])}"
    cells.append((f"difference{share}", signed(compared.mean), below))
    return big_numbers(cells, f"{compared.score}, nats per character, lower is better")


def signed_percent(number: float) -> str:
    return f"{fixed(1, sign=True)(number)}%"


def three_findings(data: ReportData) -> list[str]:
    """Return three sentences beyond the claim: the cost, and what else the inputs show."""
    others = [*findings.ablation_sentences(data), *map(findings.study_sentence, data.studies)]
    if data.runs:
        others = [
            shorter(data, findings.cost(data)),
            *others,
            findings.guard_sentence(data),
            findings.coverage_sentence(data),
        ]
    else:
        for study in data.studies:
            others += findings.study_details(study)
    return others[:3]


def subtitle(data: ReportData) -> str:
    """Return one line of text that describes the inputs of the report."""
    parts = []
    if data.runs:
        first = data.runs[0]
        corpus = first.cfg.corpus.split("/")[-1]
        val = first.summary["fingerprints"]["val"][:12]
        rows, tokens = first.summary["geometry"]
        parts.append(f"{count(len(data.runs), 'run')} of {count(len(data.recipes), 'recipe')}")
        parts.append(f"{corpus}, {first.cfg.num_titles:,} titles, val {val}")
        parts.append(f"spans of the official score {rows}x{tokens}")
    for study in data.studies:
        parts.append(f"study {study.name}, {len(study.trials)} trials")
    return "; ".join(parts)


def count(number: int, noun: str) -> str:
    """Return a number and a noun as text, such as "1 run" or "2 runs"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


# -- the cost


def headline(data: ReportData) -> Table | None:
    """Make the table on page 1, which compares the cost of the baseline and the optimized recipe.

    If the two recipes are compared by paired seeds, the table includes only these seeds.
    """
    pair = [recipe for recipe in (data.baseline, data.optimised) if recipe is not None]
    if not pair:
        return None
    change = findings.claim(data).difference
    seeds = change.seeds if change is not None and change.paired else None
    names = short_names(data, pair)
    rows = [recipe_row(recipe, names[recipe.name], seeds) for recipe in pair]
    red = {i for i, recipe in enumerate(pair) if not recipe.valid_runs}
    columns = [
        Column("recipe", text, 0.28),
        Column("seeds", text, 0.1),
        Column("full", fixed(4)),
        Column("official", fixed(4)),
        Column("covers\n%", fixed(1)),
        Column("parameters", integer),
        tables.MEMBERS,
        tables.TRAINING_FLOPS,
        tables.FORWARD_FLOPS,
        Column("tokens", integer),
        Column("seconds", fixed(1)),
    ]
    note = (
        "Means over the listed seeds, at the last step. The full score counts every token of val once and "
        "ranks the recipes; the official score is the task's own. FLOPs are those of the whole training."
    )
    if any(names[recipe.name] != recipe.name for recipe in pair):
        note += " The names leave out what both recipes share; the table of recipes has the full names."
    made = Table("headline", "Score and cost", columns, rows, note, red)
    made = tables.with_members(tables.with_forward_flops(made))
    if len(pair) == 2 and not red:
        obstacle = findings.time_obstacle(*pair)
        costly = {"parameters", "members", "training\nFLOPs", "forward\nFLOPs", "tokens"}
        if not obstacle:
            costly.add("seconds")
        made = with_ratio(made, costly)
        if obstacle:
            made.note += f" Seconds are not compared, since {obstacle}."
    return made


def recipe_row(recipe: Recipe, name: str, seeds: tuple[int, ...] | None) -> Row:
    runs = [run for run in recipe.valid_runs if seeds is None or run.cfg.seed in seeds]
    if not recipe.valid_runs:
        name += " (failed a guard)"
    return [
        name,
        ", ".join(str(run.cfg.seed) for run in runs),
        mean_of(runs, tables.get_full),
        mean_of(runs, tables.get_official),
        mean_of(runs, tables.get_coverage),
        recipe.runs[0].summary["params"],
        tables.get_members(recipe.runs[0]),
        mean_of(runs, tables.get_flops),
        mean_of(recipe.runs, tables.get_forward_flops),
        mean_of(runs, tables.get_tokens),
        mean_of(list(filter(tables.is_fresh, runs)), tables.get_seconds),
    ]
