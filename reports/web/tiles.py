"""The parts of the page that show a few numbers large: the result, what is running, a study in short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mainrun.run.progress import clock, short
from mainrun.ui.compare import scientific
from reports.evidence.findings import Claim, describe_seeds
from reports.evidence.tables import fixed
from reports.web.html import Cell, Html, Row, join, table, tag
from reports.web.views import RunView, StudyView, View, best_run, is_failed

WIDTH = 420  # of the drawing of an interval
STYLES = {"running": "running"}  # of states
STYLES |= dict.fromkeys(("done", "complete", "completed", "finished"), "good")
STYLES |= dict.fromkeys(("failed", "fail", "error", "diverged", "damaged", "killed", "stopped"), "bad")
STYLES["failed a guard"] = "bad"


def state(word: str) -> Html:
    """Return the name of a state in its colour."""
    return tag("span", word, class_=f"state {STYLES.get(word, '')}".strip())


def bullets(texts: Iterable[str]) -> Html:
    return tag("ul", join(tag("li", text) for text in texts))


def tile(value: str, name: str) -> Html:
    return tag("div", join([tag("b", value), tag("span", name)]), class_="tile")


def tiles(values: Iterable[tuple[str, str]]) -> Html:
    return tag("div", join(tile(value, name) for value, name in values), class_="tiles")


# -- the result


def result(view: View, claim: Claim) -> Html:
    parts = []
    change = claim.difference
    first, second = view.pair
    if change is not None:
        gain = [tag("span", fixed(4, sign=True)(change.mean), class_="big")]
        if change.interval:
            low, high = map(fixed(4, sign=True), change.interval)
            gain.append(
                tag("span", f"95% interval {low} to {high}, {describe_seeds(change)}", class_="label")
            )
        else:
            gain.append(tag("span", "no interval, because there are too few seeds", class_="label"))
        if change.interval and view.floor is not None:
            gain.append(interval(change.mean, change.interval, view.floor))
        duel = [_score(first, change.a), _score(second, change.b), tag("div", join(gain), class_="gain")]
        parts.append(tag("div", join(duel), class_="duel"))
    parts.append(tag("p", claim.text, class_=f"claim {claim.kind}"))
    others = [sentence for sentence in view.findings if sentence != claim.text]
    parts.append(bullets([*others, *view.notes]))
    parts.append(tiles(_totals(view)))
    return join(parts)


def interval(mean: float, bounds: tuple[float, float], floor: float) -> Html:
    """Draw a difference with its interval. The grey band is the noise floor around zero."""
    low = min(bounds[0], -floor)
    high = max(bounds[1], floor)
    margin = 0.04 * (high - low)

    def place(value: float) -> str:
        return f"{WIDTH * (value - low + margin) / (high - low + 2 * margin):.1f}"

    left, right, zero = place(-floor), place(floor), place(0)
    ends = [place(bound) for bound in bounds]
    shapes = [
        f'<rect x="{left}" y="2" width="{float(right) - float(left):.1f}" height="26" class="band"></rect>',
        f'<line x1="{zero}" x2="{zero}" y1="0" y2="30" class="axis"></line>',
        f'<line x1="{ends[0]}" x2="{ends[1]}" y1="15" y2="15" class="span"></line>',
        f'<circle cx="{place(mean)}" cy="15" r="6" class="dot"></circle>',
        f'<text x="{zero}" y="44">0, and the noise floor</text>',
    ]
    label = f"The difference {mean:+.4f} with its interval, beside zero and the noise floor {floor:.4f}"
    drawn = tag("svg", Html("".join(shapes)), viewBox=f"0 0 {WIDTH} 48", role="img", aria_label=label)
    return tag("div", drawn, class_="interval c0")


def _score(recipe: str, score: float) -> Html:
    return tag("div", join([tag("span", fixed(4)(score), class_="big"), tag("span", recipe, class_="label")]))


def _totals(view: View) -> list[tuple[str, str]]:
    recipes = {run.recipe for run in view.runs}
    flops = sum(run.flops or 0 for run in view.runs)
    seconds = sum(run.seconds or 0 for run in view.runs)
    tokens = sum(run.tokens or 0 for run in view.runs)
    return [
        (f"{len(view.runs)}", "runs"),
        (f"{len(recipes)}", "recipes"),
        (short(tokens), "tokens trained"),
        (scientific(flops), "FLOPs"),
        (clock(seconds), "time of all runs"),
    ]


# -- what is running


def now(view: View) -> Html | None:
    """Return the runs and studies that are running, or None if the page shows finished ones only."""
    running = [run for run in view.runs if run.state == "running"]
    studies = [study for study in view.studies if study.state == "running"]
    if view.claim is not None or not (view.runs or view.studies):
        return None
    best = best_run(view.runs)
    bad = sum(run.is_bad for run in view.runs)
    facts = [
        (f"{len(running)}", "runs in progress"),
        (f"{len(studies)}", "studies in progress"),
        (f"{sum(run.state == 'done' for run in view.runs)}", "runs are done"),
        (f"{bad}", "runs failed"),
    ]
    if best is not None:
        facts.append((fixed(4)(best.full), f"current best: {best.id}"))
    parts = [tiles(facts)]
    if running or studies:
        rows = [*map(_study_row, studies), *map(_run_row, running)]
        parts += [tag("h3", "Progress"), table("now-table", "Progress", PROGRESS, rows, (2, 3, 4))]
    return join(parts)


PROGRESS = ("what", "progress", "done", "left", "best so far")


def _bar(label: str, done: float, total: float | None) -> Html:
    if not total:
        return Html()
    return tag("progress", max=f"{total:g}", value=f"{min(done, total):g}", aria_label=f"Progress of {label}")


def _run_row(run: RunView) -> Row:
    done = run.step or 0
    total = run.steps
    shown = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    return _progress_row(run.id, done, total, shown, run.eta, run.best)


def _study_row(study: StudyView) -> Row:
    shown = f"{study.finished} of {study.total} trials" if study.total else f"{study.finished} trials"
    value = None if study.best is None else float(study.best["value"])
    return _progress_row(f"study {study.name}", study.finished, study.total, shown, study.eta, value)


def _progress_row(
    name: str, done: int, total: int | None, shown: str, eta: float | None, best: float | None
) -> Row:
    share = done / total if total else None
    return Row(
        [
            Cell(name, style="wide"),
            Cell(_bar(name, done, total), share),
            Cell(shown, share),
            Cell("" if eta is None else clock(eta), eta),
            Cell(fixed(4)(best), best),
        ]
    )


# -- studies


def study_tiles(study: StudyView) -> Html:
    """Return a study in short."""
    failed = sum(map(is_failed, study.trials))
    done = f"{study.finished} of {study.total}" if study.total else f"{study.finished}"
    facts = [(study.state, "state"), (done, "trials finished")]
    best = study.best
    if best is not None:
        facts.append((fixed(4)(best["value"]), f"best {study.objective}, trial {best['trial']}"))
    if failed:
        facts.append((f"{failed}", "trials failed"))
    if study.eta is not None:
        facts.append((clock(study.eta), "left, about"))
    parts = [tiles(facts)]
    if study.workers:
        parts.append(tag("h3", f"Workers: {len(study.workers)}"))
        parts.append(bullets(study.workers))
    return join(parts)


def bars(shares: Mapping[str, float]) -> Html:
    """Return the importance of each field as a bar with its number."""
    parts = []
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        bar = tag(
            "progress", max="1", value=f"{min(max(share, 0), 1):.3f}", aria_label=f"Importance of {name}"
        )
        parts += [tag("span", name), bar, tag("span", f"{share:.0%}")]
    return tag("div", join(parts), class_="bars")
