"""The figures: matplotlib, one palette, one type family, lines that differ in grey too. Each function gives a Figure, or None without data.

Text stays text in the SVG (so that it can be searched, and is set in the report's own font), and nothing in a figure depends on the day.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mainrun import stats
from reports.evidence.load import Evidence, Recipe, Run, Study, ladder_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.7  # inches: the column of the page
FONT = "DejaVu Sans"
# Okabe and Ito's, without the yellow: told apart by the colour-blind, and by dash and marker in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
)
MARKERS = "osD^vP"
GREY = "#8A8A8A"
MOST = 6  # recipes that a figure tells apart; the others are grey
POINTS = 400  # of one line: more cannot be seen

STYLE: dict[Any, Any] = {
    "font.family": FONT, "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.titlelocation": "left", "lines.linewidth": 1.2, "lines.markersize": 3.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.unicode_minus": True,
    "svg.fonttype": "none", "svg.hashsalt": "mainrun", "figure.dpi": 200,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """What every figure of a report is drawn in; whoever reads it may have other defaults."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def figures(e: Evidence) -> dict[str, Figure]:
    """Name -> figure, of all that the inputs have data for. Inside `style`."""
    found: dict[str, Figure | None] = {
        "headline": headline(e),
        "curves": curves(e),
        "seeds": seeds(e),
        "gap": gap(e),
        "schedules": schedules(e),
        "waterfall": waterfall(e),
    }
    for i, run in enumerate(grown(e)):
        found[f"growth-{i + 1}"] = growth(run)
    for i, study in enumerate(e.studies):
        for name, draw in STUDY.items():
            found[f"study-{i + 1}-{name}"] = draw(study)
    return {name: figure for name, figure in found.items() if figure is not None}


def grown(e: Evidence) -> list[Run]:
    """One run of each recipe that changed on its way."""
    return [recipe.good[0] for recipe in e.recipes if recipe.good and recipe.good[0].ops]


# -- shared


def new(height: float, rows: int = 1, columns: int = 1, **kw: Any) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure as New

    figure = New(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kw)
    return figure, axes.ravel()


def amount(value: float, _: Any = None) -> str:
    """1,500,000 -> 1.5M: numbers of an axis without an exponent, whose small digits nobody could read."""
    if value == 0 or not math.isfinite(value):
        return "0"
    if abs(value) >= 1e3:
        power = min(int(math.log10(abs(value)) / 3 + 1e-9), 6)
        return f"{value / 1000**power:.4g}{' KMGTPE'[power].strip()}"
    if abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"


def plain(axis: Any, most: int = 5) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(amount))
    axis.set_minor_formatter(NullFormatter())


def thin(values: Sequence[Any]) -> list[Any]:
    """At most POINTS of them, the last one always."""
    every = -(-len(values) // POINTS)
    return [*values[:-1:every], *values[-1:]]


def shown(e: Evidence, most: int = MOST) -> list[tuple[Recipe, int | None]]:
    """Recipes to draw and the place of their colour; the two of the headline come first, and who has none is grey."""
    first = [r for r in (e.baseline, e.optimised) if r is not None and r.good]
    others = [r for r in e.recipes if r.good and r not in first]
    if len(first) + len(others) > most:
        return [*((r, None) for r in others), *((r, i) for i, r in enumerate(first))]
    return [(r, i) for i, r in enumerate([*first, *others])]


def look(place: int | None) -> dict[str, Any]:
    if place is None:
        return {"color": GREY, "linewidth": 0.6, "zorder": 1}
    return {"color": COLOURS[place], "linestyle": DASHES[place], "zorder": 3}


def beside(axes: Axes, x: float, y: float, text: str) -> None:
    """What a bar is worth, right of its end. (Blanks would not do: SVG drops them.)"""
    axes.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)


def keyed(figure: Figure, axes: Axes) -> None:
    """One key for the whole figure, below it: no line runs under it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        columns = max(1, min(len(labels), 108 // (longest + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


def spans(run: Run) -> list[tuple[int, float, float]]:
    """(step, seconds so far, FLOPs so far) at each evaluation: seconds are those of the rows, in steps and in evaluations."""
    total, tokens = float(run.summary["flops"]), run.summary["tokens"]
    seconds, found = 0.0, []
    trained = {row["step"]: row["tokens"] for row in run.steps}
    last = 0
    for row in run.rows:
        seconds += float(row.get("seconds") or 0.0)
        if row["event"] == "step":
            last = row["tokens"]
        elif row["split"] == "val":
            flops = row.get("flops")
            found.append(
                (
                    row["step"],
                    seconds,
                    float(flops) if flops else total * trained.get(row["step"], last) / tokens,
                )
            )
    return found


def band(
    axes: Axes,
    recipe: Recipe,
    x: Callable[[Run], Sequence[float]],
    y: Callable[[Run], Sequence[float]],
    place: int | None,
) -> None:
    """The mean of the seeds, and between the lowest and the highest of them a band. Seeds whose evaluations differ are drawn one by one."""
    label = recipe.name if place is not None else None
    xs, ys = [list(x(run)) for run in recipe.good], [list(y(run)) for run in recipe.good]
    if len({tuple(run["step"] for run in r.evals) for r in recipe.good}) > 1:
        for i, (one, other) in enumerate(zip(xs, ys, strict=True)):
            axes.plot(one, other, label=None if i else label, **look(place))
        return
    middle = np.mean(xs, axis=0)
    axes.plot(middle, np.mean(ys, axis=0), label=label, **look(place))
    if place is not None and len(ys) > 1:
        axes.fill_between(
            middle, np.min(ys, axis=0), np.max(ys, axis=0), color=COLOURS[place], alpha=0.25, linewidth=0
        )


def full(run: Run) -> list[float]:
    return [row["full"] for row in run.evals]


def tokens(run: Run) -> list[float]:
    at = {row["step"]: row["tokens"] for row in run.steps}
    return [at.get(row["step"], run.resolved.tokens(row["step"])) for row in run.evals]


def window(axes: Axes, values: Sequence[float]) -> None:
    """The first evaluations are those of an untrained model, and would press all others together."""
    if values:
        low, high = min(values), max(values)
        late = sorted(values)[: max(2, int(0.85 * len(values)))][-1]
        axes.set_ylim(low - 0.06 * (late - low), min(high, late + 0.35 * (late - low)) + 0.02 * (high - low))


# -- runs


def headline(e: Evidence) -> Figure | None:
    """The two of page 1, on the axis that all runs share."""
    pair = [r for r in (e.baseline, e.optimised) if r is not None and r.good]
    if not pair:
        return None
    figure, (axes,) = new(3.1)
    for i, recipe in enumerate(pair):
        band(axes, recipe, tokens, full, i)
    window(axes, [v for recipe in pair for run in recipe.good for v in full(run)])
    axes.set(xlabel="tokens trained", ylabel="full, nats per character")
    plain(axes.xaxis, 8)
    plain(axes.yaxis)
    keyed(figure, axes)
    return figure


def curves(e: Evidence) -> Figure | None:
    drawn = shown(e)
    if not drawn:
        return None
    figure, axes = new(4.9, 2, 2, sharey=True)
    ways: dict[str, Callable[[Run], list[float]]] = {
        "step": lambda run: [row["step"] for row in run.evals],
        "tokens trained": tokens,
        "seconds in steps and evaluations": lambda run: [row[1] for row in spans(run)],
        "FLOPs": lambda run: [row[2] for row in spans(run)],
    }
    for ax, (name, way) in zip(axes, ways.items(), strict=True):
        for recipe, place in drawn:
            band(ax, recipe, way, full, place)
        ax.set_xlabel(name)
        plain(ax.xaxis)
    window(axes[0], [v for recipe, _ in drawn for run in recipe.good for v in full(run)])
    for ax in axes[::2]:
        ax.set_ylabel("full, nats per character")
        plain(ax.yaxis)
    keyed(figure, axes[0])
    return figure


def seeds(e: Evidence, most: int = 24) -> Figure | None:
    """Every run's last score, and each recipe's mean with its interval."""
    ranked = sorted(
        (r for r in e.recipes if r.good), key=lambda r: stats.Mean(tuple(r.scores.values())).mean
    )[:most]
    if not ranked:
        return None
    figure, (axes,) = new(0.9 + 0.24 * len(ranked))
    for y, recipe in enumerate(ranked):
        found = stats.Mean(tuple(recipe.scores.values()))
        axes.plot(
            list(recipe.scores.values()),
            [y] * len(recipe.scores),
            "o",
            color=COLOURS[0],
            markerfacecolor="none",
            label="a run",
        )
        if found.half is not None:
            line = axes.errorbar(
                found.mean,
                y + 0.28,
                xerr=found.half,
                fmt="|",
                color="black",
                markersize=6,
                capsize=2,
                linewidth=1,
            )
            line.set_label("mean and 95% interval")
    axes.set_yticks(
        range(len(ranked)), [r.name if len(r.name) < 40 else f"{r.name[:16]}…{r.name[-22:]}" for r in ranked]
    )
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    every = [v for r in ranked for v in r.scores.values()]
    room = 0.15 * (max(every) - min(every)) or 0.01
    axes.set_xlim(
        min(every) - room, max(every) + room
    )  # the interval of two seeds may be wider than all that was measured
    axes.set_xlabel("full score of val at the last step, nats per character")
    plain(axes.xaxis, 8)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


def gap(e: Evidence) -> Figure | None:
    """Train against validation, a panel a recipe: a token is another thing to another tokenizer."""
    pair = [r for r in (e.baseline, e.optimised) if r is not None and r.good]
    if not pair:
        return None
    figure, axes = new(2.5, 1, len(pair))
    for i, (ax, recipe) in enumerate(zip(axes, pair, strict=True)):
        values: list[float] = []
        for j, run in enumerate(recipe.good):
            steps, train = trained(run)
            val = [row["loss"] for row in run.evals if row["step"] in set(steps)]
            ax.plot(
                steps,
                train,
                color=COLOURS[i],
                linestyle=DASHES[1],
                label=None if j else "train, mean since the last evaluation",
            )
            ax.plot(steps, val, color=COLOURS[i], linestyle="-", label=None if j else "validation")
            values += train + val
        window(ax, values)
        ax.set(title=recipe.name, xlabel="step")
        plain(ax.xaxis)
        plain(ax.yaxis)
    axes[0].set_ylabel("nats per token")
    keyed(figure, axes[0])
    for handle in figure.legends[0].get_lines():
        handle.set_color("black")
    return figure


def trained(run: Run) -> tuple[list[int], list[float]]:
    """At each evaluation the mean of the training losses since the one before it."""
    steps, means, since = [], [], []
    for row in run.rows:
        if row["event"] == "step":
            since.append(row["loss"])
        elif row["split"] == "val" and since:
            steps.append(row["step"])
            means.append(float(np.mean(since)))
            since = []
    return steps, means


def schedules(e: Evidence) -> Figure | None:
    """What enters each step, by the plan that the run followed; what changes on the way is marked."""
    drawn = [(recipe, place) for recipe, place in shown(e) if place is not None]
    if not drawn:
        return None
    figure, axes = new(2.5, 1, 2)
    for recipe, place in drawn:
        run = recipe.good[0]
        plan = run.resolved
        steps = thin(range(plan.steps))
        for ax, name in zip(axes, ("lr", "weight_decay"), strict=True):
            values = [getattr(plan.at(step), name) for step in steps]
            ax.plot([step + 1 for step in steps], values, label=recipe.name, **look(place))
            for op in run.ops:
                at = min(op["step"], plan.steps - 1)
                ax.plot(
                    at,
                    getattr(plan.at(at), name),
                    MARKERS[place],
                    color=look(place)["color"],
                    markersize=5,
                    zorder=4,
                )
    for ax, name in zip(axes, ("lr", "weight_decay"), strict=True):
        ax.set(title=name + (" (of the matrices)" if name == "lr" else ""), xlabel="step")
        ax.set_ylim(bottom=0)
        plain(ax.xaxis)
        plain(ax.yaxis)
    axes[0].set_ylabel("rate")
    axes[1].set_ylabel("decay, in units of 1 / rate")
    keyed(figure, axes[0])
    return figure


def waterfall(e: Evidence) -> Figure | None:
    """Each step of the ablation from where the one before it stood; a change inside the noise is grey."""
    ladder = e.ladder
    if not ladder:
        return None
    means = [stats.Mean(tuple(scores.values())).mean for scores in ladder_scores(ladder)]
    floor = e.noise
    figure, (axes,) = new(0.8 + 0.25 * len(ladder))
    span = max(means) - min(means)
    for y, mean in enumerate(means):
        before = means[y - 1] if y else mean
        change = mean - before
        quiet = floor is not None and abs(change) <= floor.floor
        colour = GREY if quiet or not y else COLOURS[0] if change < 0 else COLOURS[1]
        axes.barh(y, change, left=before, height=0.62, color=colour, linewidth=0)
        axes.plot(
            [mean, mean],
            [y - 0.31, y + (1.31 if y + 1 < len(ladder) else 0.31)],
            color="black",
            linewidth=0.7,
        )
        if floor is not None and y:
            axes.errorbar(before, y, xerr=floor.floor, fmt="none", ecolor="black", capsize=2, linewidth=0.8)
        text = (
            f"{mean:.4f}"
            if not y
            else f"{change:+.4f}".replace("-", "\N{MINUS SIGN}") + (" (noise)" if quiet else "")
        )
        beside(axes, max(mean, before + (floor.floor if floor is not None and y else 0)), y, text)
    axes.set_yticks(range(len(ladder)), [r.cfg.preset.split(":")[-1] for r in ladder])
    axes.set_ylim(len(ladder) - 0.4, -0.6)
    reach = floor.floor if floor is not None else 0.0
    axes.set_xlim(min(means) - reach - 0.03 * span, max(means) + reach + 0.24 * (span + reach))
    note = (
        "; whiskers: the noise floor around the step before"
        if floor is not None
        else "; one seed each: no noise floor"
    )
    axes.set_xlabel("full score of val at the last step, nats per character" + note)
    axes.grid(axis="y", visible=False)
    plain(axes.xaxis, 8)
    return figure


def growth(run: Run, around: int = 40) -> Figure:
    """When it changed, what the model cost from there on, and the training loss on both sides of each op."""
    sized = [op for op in run.ops if "params" in op]
    figure, axes = new(2.4 + 0.13 * max(2, min(len(run.ops), MOST)), 1, 3 if sized else 2)
    left, right = axes[0], axes[-1]
    left.plot([row["step"] for row in run.evals], full(run), color=COLOURS[0])
    window(left, full(run))
    left.set(title="full score of val", xlabel="step", ylabel="nats per character")
    for i, op in enumerate(run.ops):
        left.axvline(op["step"], color="black", linewidth=0.7, linestyle=(0, (2, 2)))
        at = {"xytext": (3, -1), "textcoords": "offset points", "va": "top", "fontsize": 7}
        left.annotate(str(i + 1), (op["step"], 1.0), xycoords=left.get_xaxis_transform(), **at)
    if sized:
        starts = [row for row in run.journal if str(row["event"]).endswith("START")]
        steps = [0, *(op["step"] for op in sized), run.summary["steps"]]
        for name, place in (("params", 0), ("flops_per_token", 1)):
            values = [starts[0][name], *(op[name] for op in sized)]
            label = name.replace("_", " ").replace("flops", "FLOPs")
            axes[1].step(steps, [*values, values[-1]], where="post", label=label, **look(place))
        axes[1].set(title="size and cost", xlabel="step")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=1)
    losses = {row["step"]: row["loss"] for row in run.steps}
    for i, op in enumerate(run.ops[:MOST]):
        near = [step for step in range(op["step"] - around, op["step"] + around + 1) if step in losses]
        right.plot(
            [step - op["step"] for step in near],
            [losses[step] for step in near],
            label=f"{i + 1} {op['name']}",
            **look(i),
        )
    right.axvline(0, color="black", linewidth=0.7, linestyle=(0, (2, 2)))
    right.set(title="training loss around each op", xlabel="steps since the op", ylabel="nats per token")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=1)
    for ax in axes:
        plain(ax.xaxis)
        plain(ax.yaxis)
    return figure


# -- studies


def numbers(values: Sequence[Any]) -> list[float] | None:
    """As they are where all are numbers; None: they are names."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return [float(v) for v in values]
    return None


def places(values: Sequence[Any]) -> tuple[list[float], list[str], bool]:
    """Where values stand on an axis: numbers by themselves (logarithmic where they span much), names in a row. (places, names, log)"""
    found = numbers(values)
    if found is None:
        names = sorted({str(v) for v in values})
        return [float(names.index(str(v))) for v in values], names, False
    return found, [], min(found) > 0 and max(found) / min(found) > 20


def history(study: Study) -> Figure | None:
    if not study.done:
        return None
    figure, (axes,) = new(2.2)
    kinds = (
        (GREY, "x", "stopped at a lower rung", study.stopped),
        (COLOURS[0], "o", "trained to the end", study.whole),
    )
    for colour, marker, label, mine in kinds:
        if mine:
            points = zip(*((t["trial"], t["value"]) for t in mine), strict=True)
            axes.plot(*points, marker, color=colour, markerfacecolor="none", label=label)
    trials, values = [t["trial"] for t in study.whole], [float(t["value"]) for t in study.whole]
    axes.step(
        trials,
        np.minimum.accumulate(values),
        where="post",
        color=COLOURS[1],
        label="the lowest of these so far",
    )
    window(axes, [float(t["value"]) for t in study.done])
    axes.set(xlabel="trial", ylabel=objective(study))
    plain(axes.xaxis, 8)
    plain(axes.yaxis)
    keyed(figure, axes)
    return figure


def objective(study: Study) -> str:
    return str(study.fact("objective") or "value")


def importance(study: Study) -> Figure | None:
    found = shares(study)
    if not found:
        return None
    ranked = sorted(found.items(), key=lambda item: -item[1])[:16]
    figure, (axes,) = new(0.7 + 0.2 * len(ranked))
    for y, (_, share) in enumerate(ranked):
        axes.barh(y, share, color=COLOURS[0], height=0.6)
        beside(axes, share, y, f"{share:.3f}")
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(share for _, share in ranked) or 1)
    axes.set_xlabel("importance, share of the variance of the value")
    axes.grid(axis="y", visible=False)
    plain(axes.xaxis, 8)
    return figure


def shares(study: Study) -> dict[str, float]:
    """As exported; else what each field alone explains of the values of the trials that were trained to the end."""
    found = study.fact("importance")
    if isinstance(found, dict):
        return {
            str(k).removeprefix("params."): float(v) for k, v in found.items() if isinstance(v, (int, float))
        }
    return {name: share for name in study.searched if (share := explained(study, name)) is not None}


def explained(study: Study, name: str, least: int = 10) -> float | None:
    """The share of the variance between the groups of a field (its values, or the quarters of a number), less what chance would give."""
    mine = [t for t in study.whole if t.get(f"params.{name}") is not None]
    values, (x, _, _) = (
        np.array([float(t["value"]) for t in mine]),
        places([t[f"params.{name}"] for t in mine]) if mine else ([], [], False),
    )
    if len(mine) < least or not values.var():
        return None
    groups = np.array(x) if len(set(x)) <= 4 else np.searchsorted(np.quantile(x, (0.25, 0.5, 0.75)), x)
    n, k = len(mine), len(set(groups.tolist()))
    within = sum(
        ((values[groups == g] - values[groups == g].mean()) ** 2).sum() for g in set(groups.tolist())
    )
    share = within / ((values - values.mean()) ** 2).sum()
    return float(max(0.0, 1 - share * (n - 1) / (n - k))) if n > k else None


def slices(study: Study, most: int = 9) -> Figure | None:
    """The value over each searched field, the others as they came."""
    told = [f for f in study.searched if any(t.get(f"params.{f}") is not None for t in study.done)]
    fields = sorted(told, key=lambda f: -shares(study).get(f, 0.0))[:most]
    if not fields or len(study.done) < 2:
        return None
    columns = min(3, len(fields))
    rows = -(-len(fields) // columns)
    figure, axes = new(0.3 + 1.75 * rows, rows, columns, sharey=True)
    for ax, name in zip(axes, fields, strict=False):  # a last row may have panels left
        mine = [t for t in (*study.stopped, *study.whole) if t.get(f"params.{name}") is not None]
        x, names, log = places([t[f"params.{name}"] for t in mine])
        if log:
            ax.set_xscale("log")
        cut = sum(t.get(f"params.{name}") is not None for t in study.stopped)
        values = [float(t["value"]) for t in mine]
        ax.plot(x[:cut], values[:cut], "x", color=GREY, markersize=2.5)
        ax.plot(x[cut:], values[cut:], "o", color=COLOURS[0], markerfacecolor="none", markersize=3)
        ax.set_xlabel(name)
        if names:
            ax.set_xticks(range(len(names)), [n if len(n) < 12 else n[:11] + "…" for n in names])
        else:
            decades(ax.xaxis, x)
    window(axes[0], [float(t["value"]) for t in study.done])
    for ax in axes[len(fields) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel(objective(study))
        plain(ax.yaxis)
    return figure


def decades(axis: Any, values: Sequence[float]) -> None:
    """Ticks of an axis, at most four of them: labels stand beside each other in a narrow panel."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    if axis.get_scale() == "log":
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        every = max(1, -(-(high - low) // 3))
        axis.set_major_locator(FixedLocator([10.0**i for i in range(low, high + 1, every)]))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    plain(axis, 3)


def parallel(study: Study, most: int = 8) -> Figure | None:
    """One line a trial through all fields, the best tenth on top of the others."""
    fields = sorted(study.searched, key=lambda f: -shares(study).get(f, 0.0))[:most]
    trials = [t for t in study.whole if all(t.get(f"params.{f}") is not None for f in fields)]
    if len(fields) < 2 or len(trials) < 3:
        return None
    figure, (axes,) = new(3.0)
    unit = []
    for i, name in enumerate(fields):
        values = [t[f"params.{name}"] for t in trials]
        x, names, log = places(values)
        x = [math.log10(v) for v in x] if log else x
        low, high = min(x), max(x)
        unit.append([(v - low) / (high - low) if high > low else 0.5 for v in x])
        ends = (names[0], names[-1]) if names else (f"{min(values):.3g}", f"{max(values):.3g}")
        for y, text, va in ((-0.03, ends[0], "top"), (1.03, ends[1], "bottom")):
            axes.text(i, y, text if len(text) < 14 else text[:13] + "…", ha="center", va=va, fontsize=7)
        axes.plot([i, i], [0, 1], color="black", linewidth=0.6)
    cut = sorted(float(t["value"]) for t in trials)[max(0, len(trials) // 10 - 1)]
    for best in (False, True):
        lines = [
            [column[j] for column in unit] for j, t in enumerate(trials) if (float(t["value"]) <= cut) == best
        ]
        for j, line in enumerate(lines):
            label = None if j else ("the best tenth" if best else "the others")
            kw: dict[str, Any] = (
                {"color": COLOURS[1], "linewidth": 1.3, "zorder": 3}
                if best
                else {"color": GREY, "linewidth": 0.4}
            )
            axes.plot(range(len(fields)), line, label=label, **kw)
    axes.set_xticks(range(len(fields)), [f if len(f) < 16 else "…" + f[-15:] for f in fields])
    axes.tick_params(axis="x", length=0, pad=12)
    axes.set_yticks([])
    axes.set_ylim(-0.04, 1.06)
    axes.set_xlim(-0.4, len(fields) - 0.6)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    keyed(figure, axes)
    return figure


def rungs(study: Study) -> list[tuple[int, int, float | None, list[tuple[float, float]]]]:
    """(rung, trials, rank correlation with the last score, pairs) of each rung, over the trials that were trained to the end."""
    scores = [
        {int(k): float(v) for k, v in json.loads(t["scores"]).items()} for t in study.whole if t.get("scores")
    ]
    top = max((rung for mine in scores for rung in mine), default=0)
    found = []
    for rung in range(top):
        pairs = [(mine[rung], mine[top]) for mine in scores if rung in mine and top in mine]
        if len(pairs) > 2:
            a, b = zip(*pairs, strict=True)
            found.append((rung, len(pairs), stats.spearman(a, b), pairs))
    return found


def correlation(study: Study) -> Figure | None:
    found = rungs(study)[-3:]
    if not found:
        return None
    figure, axes = new(2.3, 1, len(found), sharey=True)
    for ax, (rung, n, rho, pairs) in zip(axes, found, strict=True):
        ax.plot(*zip(*pairs, strict=True), "o", color=COLOURS[0], markerfacecolor="none")
        ax.set(
            title=f"{n} trials" + (f", rank correlation {rho:.2f}" if rho is not None else ""),
            xlabel=f"value at rung {rung}",
        )
        plain(ax.xaxis, 4)
        plain(ax.yaxis)
    axes[0].set_ylabel("value at the last rung")
    return figure


LEDGER = ("asked", "trained", "reused", "wasted")


def ledger(study: Study) -> dict[str, float]:
    """Of all that a study trained, its evidence too; where an export does not say, sums over the trials."""
    if whole := study.facts.get("ledger"):
        return {k: float(whole[k]) for k in LEDGER if whole.get(k) is not None}
    given = {k: [float(t[k]) for t in study.trials if t.get(k) is not None] for k in LEDGER}
    return {k: sum(found) for k, found in given.items() if found}


def spent(study: Study) -> Figure | None:
    found = ledger(study)
    if not found.get("asked"):
        return None
    figure, (axes,) = new(1.35)
    for y, (name, value) in enumerate(found.items()):
        axes.barh(
            y,
            value,
            color=GREY if name == "asked" else COLOURS[1] if name == "wasted" else COLOURS[0],
            height=0.6,
        )
        beside(axes, value, y, f"{value:,.0f}")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(found.values()))
    axes.set_xlabel("steps")
    axes.grid(axis="y", visible=False)
    plain(axes.xaxis, 8)
    return figure


STUDY: dict[str, Callable[[Study], Figure | None]] = {
    "history": history, "importance": importance, "slices": slices, "parallel": parallel, "rungs": correlation, "ledger": spent,
}  # fmt: skip
