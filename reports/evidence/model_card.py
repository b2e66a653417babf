"""Write a model card, and answer items of the ACL Responsible NLP checklist from the data of the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from mainrun.config import TASK
from mainrun.ui.compare import scientific
from reports.evidence import findings
from reports.evidence.load import ReportData, Run, Study
from reports.evidence.tables import Column, Table, fixed, get_flops, get_seconds, integer, text

Answer = tuple[str, str, str]  # (item of the checklist, question, answer)


def checklist(data: ReportData) -> Table:
    """Make the table with the checklist items and the answers."""
    answers = chain(_data_answers(data.runs), _budget_answers(data), _method_answers(data))
    rows = list(map(list, answers))
    columns = [Column("item", text, 0.07), Column("asked", text, 0.28), Column("answer", text, 0.65)]
    note = (
        "Items of the ACL responsible NLP research checklist that can be answered from runs. "
        "The author must answer the others."
    )
    return Table("checklist", "ACL checklist", columns, rows, note)


def _data_answers(runs: Sequence[Run]) -> Iterator[Answer]:
    if not runs:
        return
    origins = sorted({f"{run.cfg.corpus} ({run.cfg.num_titles:,} titles)" for run in runs})
    yield "B1", "Creators of the data", f"{'; '.join(origins)}; fingerprints below Data fingerprints"
    first = runs[0]
    train_tokens = first.summary["presentations"]["train_tokens_per_epoch"]
    yield (
        "B6",
        "Statistics and splits",
        f"val_frac {first.cfg.val_frac:g}, dev_frac {first.cfg.dev_frac:g}; {train_tokens:,} train and "
        f"{first.summary['last']['tokens']:,} val tokens with the tokenizer of {first.id}",
    )


def _budget_answers(data: ReportData) -> Iterator[Answer]:
    runs = data.runs
    if not runs:
        return
    sizes = set()
    devices = set()
    asked = 0
    wasted = 0
    for run in runs:
        sizes.add(run.summary["params"])
        devices.add(str(run.summary["machine_class"].get("device", "unknown")))
        ledger = run.summary.get("ledger", {})
        asked += ledger.get("asked", run.summary["steps"])
        wasted += ledger.get("wasted", 0)
    budget = (
        f"{integer(min(sizes))} to {integer(max(sizes))} parameters; "
        f"{scientific(sum(map(get_flops, runs)))} FLOPs and {fixed(1)(sum(map(get_seconds, runs)) / 60)} "
        f"minutes in all runs of this report, {integer(asked)} steps requested, {integer(wasted)} wasted; "
        f"on {', '.join(sorted(devices))}"
    )
    study_flops = 0.0
    for study in data.studies:
        ledger = study.facts.get("ledger") or {}
        study_flops += float(ledger.get("flops") or 0)
    if study_flops:
        budget += f"; the studies trained {scientific(study_flops)} additional FLOPs"
    yield "C1", "Parameters, budget, infrastructure", budget


def _method_answers(data: ReportData) -> Iterator[Answer]:
    selection = data.selection
    if data.optimised:
        selection = f"the optimized recipe is {data.optimised.name}: {selection}"
    yield (
        "C2",
        "Search, bounds, selection",
        f"{_search(data.studies)}; selection criterion: {selection}; judged by the last step of val, "
        "which was evaluated for every recipe of this report; a search should use dev",
    )
    backing = "no repeats: no recipe was run with two seeds"
    if data.noise:
        backing = f"{data.noise.df} degrees of freedom between seeds"
    yield (
        "C3",
        "Error bars, single run or mean",
        f"means over seeds, 95% intervals by Student's t, Holm over ablation steps; {backing}",
    )
    if data.runs:
        packages = set()
        for run in data.runs:
            for name, version in run.summary.get("versions", {}).items():
                if name != "mainrun":
                    packages.add(f"{name} {version}")
        yield "C4", "Packages and settings", f"{', '.join(sorted(packages))}; each run's command is above"


def _search(studies: Sequence[Study]) -> str:
    if not studies:
        return "no study was given"
    total = 0
    spaces = []
    for study in studies:
        total += len(study.trials)
        fields = ", ".join(study.fact("space") or study.searched_fields)
        spaces.append(f"{study.name}: {len(study.trials)} trials over {fields}")
    return f"{total} trials ({'; '.join(spaces)}); bounds and best values on the studies' pages"


def card(data: ReportData) -> Iterator[str]:
    """Yield the paragraphs of the model card.

    The model card describes the optimized recipe, or the baseline if there is no optimized recipe.
    """
    recipe = data.optimised or data.baseline
    if recipe is None:
        return
    run = (recipe.valid_runs or recipe.runs)[0]
    cfg = run.cfg
    summary = run.summary
    model = "a decoder-only transformer"
    if cfg.members > 1:
        model = f"an ensemble of {cfg.members} decoder-only transformers"
    if cfg.ngram:
        model += f", scored in a mixture with a {cfg.ngram}-gram model of train,"
    yield (
        f"Model: {recipe.name}, {model} with {integer(summary['params'])} parameters "
        f"({cfg.n_layer} layers, width {cfg.d_model}, {cfg.n_head} heads, vocabulary {cfg.vocab_size:,} "
        f"({cfg.tokenizer})), trained from random weights."
    )
    sizes = "Sizes are those of the task."
    if any(getattr(cfg, name) != value for name, value in TASK.items() if name != "seed"):
        sizes = "Sizes are not those of the task: these figures cannot be compared with the task's figures."
    epochs = "1 epoch" if cfg.epochs == 1 else f"{cfg.epochs} epochs"
    yield (
        f"Data: {cfg.num_titles:,} titles of {cfg.corpus}, {epochs}, {integer(summary['tokens'])} tokens in "
        f"{integer(summary['steps'])} steps. {sizes}"
    )
    scores = ", ".join(f"{fixed(4)(score)} (seed {seed})" for seed, score in recipe.scores.items())
    yield (
        f"Score: full {scores or 'none that counts'}, in nats per character of held-out titles. "
        f"{findings.coverage_sentence(data)}"
    )
    yield (
        "Use: to study training recipes on short titles. The model imitates the style of its titles, without "
        "knowledge or safety training. It is not meant for any product, and its output is not fact."
    )
    yield "Limits: one corpus, one language, one size of data. The findings may not hold at another scale."
