"""What reviewers ask for: the items of the ACL responsible-NLP checklist that runs can answer, and a model card."""

from __future__ import annotations

from collections.abc import Iterator

from mainrun.config import TASK
from reports.evidence import findings
from reports.evidence.load import Evidence
from reports.evidence.tables import Column, Table, fixed, power, text, whole


def checklist(e: Evidence) -> Table:
    rows = [list(row) for row in _items(e)]
    columns = [Column("item", text, 0.07), Column("asked", text, 0.28), Column("answer", text, 0.65)]
    note = "Items of the ACL responsible NLP research checklist that can be read from runs; the others are the author's to answer."
    return Table("checklist", "ACL checklist", columns, rows, note)


def _items(e: Evidence) -> Iterator[tuple[str, str, str]]:
    runs, studies = e.runs, e.studies
    if runs:
        origins = sorted({f"{run.cfg.corpus} ({run.cfg.num_titles:,} titles)" for run in runs})
        yield "B1", "Creators of the data", "; ".join(origins) + "; fingerprints below Data fingerprints"
        one = runs[0]
        split = f"val_frac {one.cfg.val_frac:g}, dev_frac {one.cfg.dev_frac:g}"
        tokens = f"{one.summary['presentations']['train_tokens_per_epoch']:,} train and {one.summary['last']['tokens']:,} val tokens"
        yield "B6", "Statistics and splits", f"{split}; {tokens} with the tokenizer of {one.id}"
        sizes = [run.summary["params"] for run in runs]
        flops, seconds = (
            sum(run.summary["flops"] for run in runs),
            sum(run.summary["seconds"] for run in runs),
        )
        asked = sum(run.summary.get("ledger", {}).get("asked", run.summary["steps"]) for run in runs)
        wasted = sum(run.summary.get("ledger", {}).get("wasted", 0) for run in runs)
        devices = sorted({str(run.summary["machine_class"].get("device", "unknown")) for run in runs})
        budget = (
            f"{whole(min(sizes))} to {whole(max(sizes))} parameters; {power(flops)} FLOPs and {fixed(1)(seconds / 60)} minutes in all "
            f"runs here, {whole(asked)} steps asked for, {whole(wasted)} wasted; on {', '.join(devices)}"
        )
        if searching := sum(float((s.facts.get("ledger") or {}).get("flops") or 0) for s in studies):
            budget += f"; the studies trained {power(searching)} FLOPs besides"
        yield "C1", "Parameters, budget, infrastructure", budget
    space = "; ".join(
        f"{s.name}: {len(s.trials)} trials over {', '.join(s.fact('space') or s.searched)}" for s in studies
    )
    trials = sum(len(s.trials) for s in studies)
    searched = (
        f"{trials} trials ({space}); bounds and best values on the studies' pages"
        if studies
        else "no study was given"
    )
    chosen = f"optimised is {e.optimised.name}: {e.chosen}" if e.optimised else e.chosen
    split = "the last step of val, looked at for every recipe here; a search should look at dev"
    yield "C2", "Search, bounds, selection", f"{searched}; selection criterion: {chosen}; judged by {split}"
    noise = e.noise
    backing = (
        f"{noise.df} degrees of freedom between seeds"
        if noise
        else "no repeats: no recipe was run with two seeds"
    )
    yield (
        "C3",
        "Error bars, single run or mean",
        f"means over seeds, 95% intervals by Student's t, Holm over ablation steps; {backing}",
    )
    if runs:
        packages = sorted(
            {f"{k} {v}" for run in runs for k, v in run.summary.get("versions", {}).items() if k != "mainrun"}
        )
        yield "C4", "Packages and settings", ", ".join(packages) + "; each run's command is above"


def card(e: Evidence) -> Iterator[str]:
    """Of the optimised recipe, or of the one there is."""
    recipe = e.optimised or e.baseline
    if recipe is None:
        return
    run = (recipe.good or recipe.runs)[0]
    cfg, s = run.cfg, run.summary
    shape = f"{cfg.n_layer} layers, width {cfg.d_model}, {cfg.n_head} heads, vocabulary {cfg.vocab_size:,} ({cfg.tokenizer})"
    yield f"Model: {recipe.name}, a decoder-only transformer with {whole(s['params'])} parameters ({shape}), trained from random weights."
    fits = all(getattr(cfg, k) == v for k, v in TASK.items() if k != "seed")
    epochs = f"{cfg.epochs} epoch{'s' * (cfg.epochs != 1)}"
    yield (
        f"Data: {cfg.num_titles:,} titles of {cfg.corpus}, {epochs}, {whole(s['tokens'])} tokens in {whole(s['steps'])} steps. "
        + (
            "Sizes are the task's own."
            if fits
            else "Sizes are not the task's own: its figures are not comparable with these."
        )
    )
    scores = (
        ", ".join(f"{fixed(4)(v)} (seed {seed})" for seed, v in recipe.scores.items()) or "none that counts"
    )
    yield f"Score: full {scores}, in nats per character of held-out titles. {findings.covered(e)}"
    yield (
        "Use: to study training recipes on short titles. It writes text in the manner of its titles, without knowledge or safety; "
        "it is not meant for any product, and what it writes is not fact."
    )
    yield "Limits: one corpus, one language, one size of data; what was found here need not hold at another scale."
