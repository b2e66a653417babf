"""Define the sections of a report and the order of the sections.

A section without data is left out of the report, and the appendix lists the sections that were left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from reports.evidence import findings, front_page, model_card, study_page, tables
from reports.evidence.figures import front, registry
from reports.evidence.figures import growth as growth_figure
from reports.evidence.figures import routing as routing_figure
from reports.evidence.load import ReportData, Study
from reports.evidence.pdf import figure, heading, new_page, page_break, paragraph, table
from reports.evidence.samples import side_by_side
from reports.evidence.tables import Table, fixed

if TYPE_CHECKING:
    from reportlab.graphics.shapes import Drawing
    from reportlab.platypus import Flowable

LOST = re.compile(r"\b(worse|slower|fail(s|ed)?|diverge[sd]?|did not help|lost)\b")
LONGEST_POINT = 240  # the maximum length of a bullet point that is quoted from the log


@dataclass
class Report:
    """The content of a report. Each table is computed only once, and is used for the PDF and a CSV file."""

    data: ReportData
    title: str
    log: Path | None = None
    samples: Sequence[tuple[str, Sequence[str]]] = ()  # pairs of a run id and generated titles
    tables: dict[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for made in make_tables(self.data):
            self.tables[made.name] = made

    def properties(self) -> dict[str, str]:
        """Return the properties of the PDF file, which are the report's claim and the ids of the runs."""
        ids = ", ".join(run.id for run in self.data.runs)
        return {"subject": findings.claim(self.data).text, "keywords": ids}

    def story(self, drawings: Mapping[str, Drawing]) -> list[Flowable]:
        """Return the content of all pages of the PDF, in the order of the pages."""
        flowables: list[Flowable] = []
        for section in SECTIONS:
            flowables += section(self, drawings)
        return flowables

    def table(self, name: str) -> list[Flowable]:
        return table(self.tables.get(name))


def make_tables(data: ReportData) -> Iterator[Table]:
    """Yield every table for which the inputs of the report have data."""
    if data.runs:
        yield tables.runs(data)
        yield tables.run_costs(data)
        yield tables.recipes(data)
    for make_optional in (
        front_page.headline,
        tables.ablation,
        tables.differences,
        tables.other_configs,
        tables.failures,
    ):
        optional = make_optional(data)
        if optional is not None:
            yield optional
    if data.runs:
        yield tables.commands(data)
        yield tables.guards(data)
        yield tables.fingerprints(data)
        yield tables.hashes(data)
        yield tables.machines(data)
    for number, run in enumerate(growth_figure.grown_runs(data), 1):
        yield tables.growth(run, number)
    for number, run in enumerate(routing_figure.routed_runs(data), 1):
        yield tables.routing(run, number)
    for number, study in enumerate(data.studies, 1):
        yield from tables.study(study, number)
    yield model_card.checklist(data)


# -- the sections


def first_page(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    costs = report.tables.get("headline")
    yield from front_page.first_page(report.data, report.title, costs, drawings)


def run_figures(section: str, report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    """Yield a section with figures of runs. If the section has no figure, yield nothing."""
    on_page_one = front.captions(report.data)
    heading_of_section = section
    for name, row in registry.RUNS.items():
        if row.section == section and name not in on_page_one and name in drawings:
            yield from figure(drawings, name, row.caption(report.data), row.title, heading_of_section)
            heading_of_section = ""


def curves(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    yield new_page()  # the pages before are full
    yield from run_figures(registry.COST, report, drawings)


def recipes(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if not report.data.runs:
        return
    yield page_break()
    yield heading("Recipes and runs", 0)
    noise = report.data.noise
    if noise:
        yield paragraph(
            f"Noise floor: {fixed(4)(noise.floor)} nats per character. The seed alone changes full by "
            f"{fixed(4)(noise.sd)} (standard deviation within recipes, {noise.df} degrees of freedom). In "
            "95 of 100 cases, two single runs of one recipe differ by less than the floor, so smaller "
            "differences are not counted as differences."
        )
    else:
        yield paragraph(
            "Noise floor: unknown, because no recipe was run with two seeds. "
            "No difference in this report is backed."
        )
    yield from report.table("recipes")
    yield from report.table("runs")
    yield from report.table("costs")


def ablation(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if "ablation" in report.tables:
        yield page_break()
        yield heading(registry.ABLATION, 0)
        yield from report.table("ablation")


def training(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    yield from run_figures(registry.TRAINING, report, drawings)


def studies(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    """Yield one page for each study."""
    for number, study in enumerate(report.data.studies, 1):
        yield from study_page.page(study, number, report.tables, drawings)


def growth(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    for number, run in enumerate(growth_figure.grown_runs(report.data), 1):
        section = f"Growth of {run.id}"
        yield from figure(drawings, f"growth-{number}", growth_figure.CAPTION, section=section)
        yield from report.table(f"growth_{number}")


def routing(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    for number, run in enumerate(routing_figure.routed_runs(report.data), 1):
        section = f"Routed blocks of {run.id}"
        yield from figure(drawings, f"routing-{number}", routing_figure.CAPTION, section=section)
        yield from report.table(f"routing_{number}")


def failures(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    failed = report.table("failures")
    points = failures_in_log(report.log)
    if failed or points:
        yield page_break()
        yield heading("What failed", 0)
        yield from failed
    if points and report.log:
        digest = sha256(report.log.read_bytes()).hexdigest()[:12]
        yield heading(f"From {report.log.name}", 1)
        yield paragraph(
            f"Points of {report.log.name} (sha256 {digest}) about results that were worse, slower or wrong.",
            "small",
        )
        for point in points:
            yield paragraph(f"• {point}", "finding")


def failures_in_log(log: Path | None, limit: int = 16) -> list[str]:
    """Return the bullet points of the log that describe a failure. Long bullet points are shortened."""
    if log is None:
        return []
    points = []
    for point in re.findall(r"(?m)^- (.+(?:\n  .+)*)", log.read_text(encoding="utf-8", errors="replace")):
        without_links = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", point)
        plain = " ".join(without_links.split()).replace("**", "").replace("`", "")
        if not LOST.search(plain):
            continue
        if len(plain) >= LONGEST_POINT:
            plain = plain[: plain.rfind(" ", 0, LONGEST_POINT - 2)] + " …"
        points.append(plain)
    return points[:limit]


def samples(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    shown = side_by_side(report.samples)
    if shown is not None:
        yield page_break()
        yield heading("Samples", 0)
        yield from table(shown)


APPENDIX = (
    "config", "other_configs", "commands", "guards", "fingerprints", "hashes", "machines", "checklist",
)  # fmt: skip


def appendix(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[Flowable]:
    missing = "; ".join(missing_sections(report, drawings))
    yield page_break(90)
    yield heading("Appendix", 0)
    yield paragraph(f"Left out: {missing or 'nothing, the inputs have data for every page'}.")
    for number in range(1, len(report.data.studies) + 1):
        space = report.tables.get(f"study_{number}_space")
        if space is not None and study_page.is_large(space):
            yield from table(space)
            yield from report.table(f"study_{number}_confirmation")
    for name in APPENDIX:
        yield from report.table(name)
    if report.data.runs:
        yield heading("Model card", 1)
        for line in model_card.card(report.data):
            yield paragraph(line)


def missing_sections(report: Report, drawings: Mapping[str, Drawing]) -> Iterator[str]:
    """Yield the name of each part that the report leaves out because the inputs lack the necessary data."""
    if not report.data.runs:
        yield "everything about runs (none was given)"
    if not report.data.ladder:
        yield "ablation (needs three steps of a ladder, for example `mainrun train --preset ablation`)"
    if not report.data.studies:
        yield "studies (no export was given)"
    for number, study in enumerate(report.data.studies, 1):
        yield from _missing_figures(study, number, drawings)
    if not growth_figure.grown_runs(report.data):
        yield "growth (no run has growth ops)"
    if not routing_figure.routed_runs(report.data):
        yield "routing (no run has routed blocks)"
    if not report.samples:
        yield "samples (not requested, or no run has a checkpoint)"
    if report.log is None:
        yield "a log (give a file with --log)"


def _missing_figures(study: Study, number: int, drawings: Mapping[str, Drawing]) -> Iterator[str]:
    missing = []
    for name, row in registry.STUDY.items():
        if f"study-{number}-{name}" not in drawings:
            missing.append(f"{name} (needs {row.needs})")
    if missing:
        yield f"figures of the study {study.name}: {', '.join(missing)}"


Section = Callable[[Report, Mapping[str, "Drawing"]], Iterator["Flowable"]]
SECTIONS: tuple[Section, ...] = (
    first_page,
    studies,
    curves,
    recipes,
    ablation,
    training,
    growth,
    routing,
    failures,
    samples,
    appendix,
)
