"""Which pages a report has, and in which order. What the inputs have no data for is left out, and said in the appendix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from reports.evidence import findings, model_card, tables
from reports.evidence.figures import growth as growth_figure
from reports.evidence.figures import registry
from reports.evidence.load import Evidence, Run
from reports.evidence.pdf import figure, heading, section, table, words
from reports.evidence.tables import Column, Table, fixed, power, text, whole

if TYPE_CHECKING:
    from reportlab.graphics.shapes import Drawing
    from reportlab.platypus import Flowable

Part = Callable[["Report", Mapping[str, "Drawing"]], Iterator["Flowable"]]
LOST = re.compile(r"\b(worse|slower|fail(s|ed)?|diverge[sd]?|did not help|lost)\b")


@dataclass
class Report:
    """All that goes on the pages, computed once: the PDF and the CSV files show the same tables."""

    e: Evidence
    title: str
    log: Path | None = None
    samples: Sequence[tuple[str, Sequence[str]]] = ()
    tables: dict[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        e = self.e
        found = [tables.runs(e), tables.recipes(e)] if e.runs else []
        found += [
            t
            for t in (
                headline(e),
                tables.ablation(e),
                tables.differences(e),
                tables.others(e),
                tables.failures(e),
            )
            if t
        ]
        found += [
            make(e)
            for make in (tables.commands, tables.guards, tables.fingerprints, tables.hashes, tables.machines)
            if e.runs
        ]
        found += [tables.growth(run, i) for i, run in enumerate(growth_figure.grown_runs(e), 1)]
        found += [t for i, s in enumerate(e.studies, 1) for t in tables.study(s, i)]
        found += [model_card.checklist(e)]
        self.tables = {t.name: t for t in found}

    def told(self) -> dict[str, str]:
        """For whoever looks at the file's properties: what it claims, and of which runs."""
        return {"subject": findings.claim(self.e).text, "keywords": ", ".join(run.id for run in self.e.runs)}

    def story(self, drawn: Mapping[str, Drawing]) -> list[Flowable]:
        parts = (
            first,
            curves,
            recipes,
            ablation,
            training,
            *studies(self),
            growth,
            failed,
            written,
            appendix,
        )
        return [flowable for part in parts for flowable in part(self, drawn)]

    def table(self, name: str) -> list[Flowable]:
        return table(self.tables.get(name))


def headline(e: Evidence) -> Table | None:
    """Both recipes of page 1, over the same seeds as their difference."""
    pair = [r for r in (e.baseline, e.optimised) if r is not None]
    if not pair:
        return None
    d = findings.claim(e).difference
    rows, red = [], set()
    for i, recipe in enumerate(pair):
        runs = [run for run in recipe.good if d is None or not d.paired or run.cfg.seed in d.seeds]
        means = [tables.mean_of(runs, get) for get in (full, official, coverage, flops)]
        means.append(
            tables.mean_of([run for run in runs if not run.summary.get("ledger", {}).get("reused")], seconds)
        )
        params = recipe.runs[0].summary["params"]
        name = recipe.name if recipe.good else f"{recipe.name} (failed a guard)"
        rows.append([name, ", ".join(str(run.cfg.seed) for run in runs), *means[:3], params, *means[3:]])
        if not recipe.good:
            red.add(i)
    columns = [
        Column("recipe", text, 0.28), Column("seeds", text, 0.1), Column("full", fixed(4)), Column("official", fixed(4)),
        Column("covers %", fixed(1)), Column("parameters", whole), Column("FLOPs", power), Column("seconds", fixed(1)),
    ]  # fmt: skip
    note = "Means over the seeds named, of the last step, in nats per character of val. full scores every token once and is what ranks."
    return Table("headline", "Both in figures", columns, rows, note, red)


def full(run: Run) -> float:
    return run.full


def official(run: Run) -> float:
    return float(run.summary["last"]["official"])


def coverage(run: Run) -> float:
    return 100 * float(run.summary["last"]["coverage"])


def flops(run: Run) -> float:
    return float(run.summary["flops"])


def seconds(run: Run) -> float:
    return float(run.summary["seconds"])


# -- the pages


def first(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    e, claim = r.e, findings.claim(r.e)
    yield words(r.title, "title")
    yield words(subtitle(e), "small")
    yield heading(registry.RESULT, 0)
    if claim.difference is not None and e.baseline and e.optimised:
        d = claim.difference
        yield words(f"{fixed(4)(d.a)} → {fixed(4)(d.b)}", "big")
        if d.interval:
            low, high = (fixed(4, sign=True)(v) for v in d.interval)
            by = f"{fixed(4, sign=True)(d.mean)}, 95% interval {low} to {high}, {findings.how(d)}"
        else:
            by = f"{fixed(4, sign=True)(d.mean)}, {findings.seeds(d.n_a)} and {findings.seeds(d.n_b)}: no interval"
        yield words(
            f"{e.baseline.name} → {e.optimised.name}, full score of val in nats per character, lower is better: {by}."
        )
        if e.chosen.startswith("the lowest"):
            yield words(
                f"{e.optimised.name} was chosen on val itself, as {e.chosen}: part of its lead is that choice."
            )
    else:
        yield words("No headline figure", "big")
    yield from r.table("headline")
    yield heading("Findings", 1)
    for n, sentence in enumerate(findings.findings(e), 1):
        yield words(f"{n}. {sentence}", "finding")
    yield from figures_of(registry.RESULT, r, drawn)


def figures_of(section: str, r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    """Yield the figures of a section with their captions."""
    for name, row in registry.RUNS.items():
        if row.section == section:
            yield from figure(drawn, name, row.caption(r.e), row.title)


def subtitle(e: Evidence) -> str:
    parts = [f"{counted(len(e.runs), 'run')} of {counted(len(e.recipes), 'recipe')}"] if e.runs else []
    if e.runs:
        one = e.runs[0]
        parts.append(
            f"{one.cfg.corpus.split('/')[-1]}, {one.cfg.num_titles:,} titles, val {one.summary['fingerprints']['val'][:12]}"
        )
        parts.append("spans of the official score {}x{}".format(*one.summary["geometry"]))
    parts += [f"study {s.name}, {len(s.trials)} trials" for s in e.studies]
    return "; ".join(parts)


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def curves(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if "curves" in drawn:
        yield section()
        yield heading(registry.COST, 0)
        yield from figures_of(registry.COST, r, drawn)


def recipes(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if r.e.runs:
        yield section()
        yield heading("Recipes and runs", 0)
        noise = r.e.noise
        if noise:
            yield words(
                f"Noise floor: {fixed(4)(noise.floor)} nats per character. A seed alone moves full by {fixed(4)(noise.sd)} (standard "
                f"deviation inside recipes, {noise.df} degrees of freedom); two single runs of one recipe are closer than the floor in "
                "95 of 100 cases, so no smaller difference is called one."
            )
        else:
            yield words(
                "Noise floor: not known, no recipe was run with two seeds. No difference in this report is backed."
            )
        yield from r.table("recipes")
        yield from r.table("runs")


def ablation(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if "waterfall" in drawn:
        yield section()
        yield heading(registry.ABLATION, 0)
        yield from figures_of(registry.ABLATION, r, drawn)
        yield from r.table("ablation")


def training(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if "gap" in drawn:
        yield section()
        yield heading(registry.TRAINING, 0)
        yield from figures_of(registry.TRAINING, r, drawn)


def studies(r: Report) -> Iterator[Part]:
    for i, study in enumerate(r.e.studies, 1):

        def pages(
            r: Report, drawn: Mapping[str, Drawing], i: int = i, name: str = study.name
        ) -> Iterator[Flowable]:
            yield section()
            yield heading(f"Study {name}", 0)
            for part in ("", "_confirmation", "_space"):
                yield from r.table(f"study_{i}{part}")
            for figure_name, row in registry.STUDY.items():
                yield from figure(drawn, f"study-{i}-{figure_name}", row.caption)

        yield pages


def growth(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    for i, run in enumerate(growth_figure.grown_runs(r.e), 1):
        yield section()
        yield heading(f"Growth of {run.id}", 0)
        yield from figure(
            drawn,
            f"growth-{i}",
            growth_figure.CAPTION,
        )
        yield from r.table(f"growth_{i}")


def failed(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    found, told = r.table("failures"), from_log(r.log)
    if found or told:
        yield section()
        yield heading("What failed", 0)
        yield from found
    if told and r.log:
        yield heading("From the log", 1)
        digest = sha256(log_text(r.log)).hexdigest()[:12]
        yield words(
            f"What {r.log.name} (sha256 {digest}) says went worse, slower or wrong; it holds every experiment.",
            "small",
        )
        for sentence in told:
            yield words(f"• {sentence}", "finding")


def from_log(log: Path | None, most: int = 16) -> list[str]:
    """The points of the log that tell of something that did not work, cut to their beginning."""
    if log is None:
        return []
    points = re.findall(r"(?m)^- (.+(?:\n  .+)*)", log_text(log).decode())
    unlinked = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", point) for point in points]
    clean = [" ".join(point.split()).replace("**", "").replace("`", "") for point in unlinked]
    return [p if len(p) < 240 else p[: p.rfind(" ", 0, 238)] + " …" for p in clean if LOST.search(p)][:most]


def log_text(log: Path) -> bytes:
    """Return the text of the log: a file, or the pages of a folder in the order of their names."""
    pages = sorted(log.glob("*.md")) if log.is_dir() else [log]
    return b"\n".join(page.read_bytes() for page in pages)


def written(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    if r.samples:
        yield section()
        yield heading("Samples", 0)
        for name, titles in r.samples:
            yield heading(name, 1)
            for title in titles:
                yield words(title if title.strip() else "(an empty title)", "finding")


def appendix(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[Flowable]:
    yield section()
    yield heading("Appendix", 0)
    yield words(
        f"Left out: {'; '.join(missing(r, drawn)) or 'nothing, the inputs have data for every page'}."
    )
    for name in (
        "config",
        "other_configs",
        "commands",
        "guards",
        "fingerprints",
        "hashes",
        "machines",
        "checklist",
    ):
        yield from r.table(name)
    if r.e.runs:
        yield heading("Model card", 1)
        for line in model_card.card(r.e):
            yield words(line)


def missing(r: Report, drawn: Mapping[str, Drawing]) -> Iterator[str]:
    """What the inputs had no data for."""
    if not r.e.runs:
        yield "everything about runs (none was given)"
    if not r.e.ladder:
        yield "ablation (needs three steps of a ladder, like `mainrun train --preset ablation`)"
    if not r.e.studies:
        yield "studies (no export was given)"
    for i, s in enumerate(r.e.studies, 1):
        lacks = [name for name in registry.STUDY if f"study-{i}-{name}" not in drawn]
        if lacks:
            yield f"of the study {s.name} {', '.join(lacks)} (not in its export, or too few trials)"
    if not growth_figure.grown_runs(r.e):
        yield "growth (no run changed on its way)"
    if not r.samples:
        yield "samples (not asked for, or no checkpoint to write them)"
    if r.log is None:
        yield "the log (no folder docs/log next to the code)"
