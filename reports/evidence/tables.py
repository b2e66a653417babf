"""Make the tables of a report, and format the numbers in the tables.

The PDF shows rounded numbers. The CSV files contain all digits of each number.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mainrun import stats
from mainrun.config import MIN_COVERAGE
from mainrun.plan.cost import layer_flops
from mainrun.plan.routing import LETTERS
from mainrun.store import costs
from mainrun.ui.compare import COST_NOTE, compact, machine_letters, one_line, scientific
from reports.evidence.load import (
    Recipe,
    ReportData,
    Run,
    Study,
    base_indices,
    config_differences,
    is_failed,
    ladder_scores,
    shorten,
    step_name,
    trial_state,
)
from reports.evidence.studies import ledger

Format = Callable[[Any], str]
Row = list[Any]
PRUNED = "pruned"  # the state of a trial that was stopped at a rung
LONGEST_NAME = 20  # a figure may show the number of a recipe whose name is longer


# -- number formats


def fixed(decimals: int, sign: bool = False) -> Format:
    """Return a function that formats a number with a fixed number of decimal places.

    If `sign` is true, positive numbers are formatted with a plus sign.
    """
    spec = f".{decimals}f"
    if sign:
        spec = f"+{spec}"

    def write(number: Any) -> str:
        if number is None:
            return ""
        return format(number, spec).replace("-", "\N{MINUS SIGN}")

    return write


def integer(number: Any) -> str:
    """Format a number as an integer with commas, such as 1,234."""
    if number is None:
        return ""
    return f"{number:,.0f}"


def identifier(number: Any) -> str:
    """Format a number that identifies something, such as a seed, without commas."""
    return f"{number}"


def p_value(p: Any) -> str:
    if p is not None and p < 0.001:
        return "<0.001"
    return fixed(3)(p)


def text(words: Any) -> str:
    if words is None:
        return ""
    return str(words)


def setting(value: Any) -> str:
    """Format the value of a config field in the syntax of the option `--set`."""
    if value is None:
        return "none"
    if isinstance(value, (dict, list, tuple, bool)):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def describe(settings: Any) -> str:
    """Format a nested dictionary of settings as one line of text. Empty values are left out."""
    if isinstance(settings, dict):
        return ", ".join(f"{k} {describe(v)}" for k, v in settings.items() if v not in (None, "", {}, []))
    if isinstance(settings, (list, tuple)):
        return " ".join(map(describe, settings))
    return setting(settings)


def describe_bounds(bounds: Any) -> str:
    """Format the search space of a field as text, such as "0.001 to 0.1, logarithmic"."""
    if not isinstance(bounds, dict):
        return setting(bounds)
    if bounds.get("values"):
        words = "one of " + ", ".join(map(setting, bounds["values"]))
    else:
        words = f"{setting(bounds.get('low'))} to {setting(bounds.get('high'))}"
        if bounds.get("log"):
            words += ", logarithmic"
    if bounds.get("when"):
        words += f", when {describe(bounds['when'])}"
    return words


# -- tables


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    head: str  # a line break divides a long head into two lines of the PDF
    format: Format = text
    share: float = 0.0  # the width relative to other columns, or 0 to fit the width to the cells

    @property
    def right(self) -> bool:
        """Whether the cells of the column are aligned to the right, as numbers are."""
        return self.format not in (text, setting)


@dataclass
class Table:
    """A table that is shown in the PDF and written to a CSV file."""

    name: str  # the name of the CSV file, without the suffix
    title: str
    columns: Sequence[Column]
    rows: list[Row]
    note: str = ""
    red: set[int] = field(default_factory=set)  # indices of the rows that are printed in red

    @property
    def heads(self) -> list[str]:
        return [column.head for column in self.columns]

    def cells(self) -> Iterator[list[str]]:
        """Yield the formatted cells of each row of the table."""
        for row in self.rows:
            yield [column.format(value) for column, value in zip(self.columns, row, strict=True)]

    def write(self, folder: Path) -> Path:
        """Write the table to a CSV file in a folder, and return the path of the file."""
        path = folder / f"{self.name}.csv"
        with path.open("w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(map(one_line, self.heads))
            for row in self.rows:
                writer.writerow(map(_csv_value, row))
        return path


def _csv_value(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return value


def mean_of(runs: Sequence[Run], get: Callable[[Run], float]) -> float | None:
    """Return the mean of `get(run)` over all runs, or None if there are no runs."""
    if not runs:
        return None
    return sum(map(get, runs)) / len(runs)


def is_fresh(run: Run) -> bool:
    """Return whether a run trained all of its steps instead of reading some of the steps from the store.

    If any steps were read from the store, the time of the run does not show how long the training takes.
    """
    return not run.summary.get("ledger", {}).get("reused")


def get_full(run: Run) -> float:
    return run.full


def get_official(run: Run) -> float:
    return float(run.summary["last"]["official"])


def get_coverage(run: Run) -> float:
    """Return the percentage of the val split that the official score covers."""
    return 100 * float(run.summary["last"]["coverage"])


def get_flops(run: Run) -> float:
    return float(run.summary["flops"])


def get_seconds(run: Run) -> float:
    return float(run.summary["seconds"])


def get_forward_flops(run: Run) -> float:
    """Return the number of FLOPs per token in a forward pass of the scored model."""
    flops = costs.forward_flops(run.summary)
    assert flops is not None, "a report refuses a run without FLOPs"
    return flops


def get_members(run: Run) -> int:
    return costs.members(run.summary)


def get_tokens(run: Run) -> float:
    return float(run.summary["tokens"])


class Ratio(float):
    """A number that is divided by the number of another row, such as the cost of the baseline."""


def or_ratio(form: Format) -> Format:
    """Return a function that formats a ratio as text, such as 1.16×, and every other value with `form`."""

    def write(value: Any) -> str:
        if isinstance(value, Ratio):
            return f"{value:.2f}×"
        return form(value)

    return write


def with_ratio(table: Table, costly: set[str]) -> Table:
    """Add a row with the second row of a table divided by the first one, for the columns in `costly`."""
    first, second = table.rows
    row: Row = ["ratio"]
    columns = [table.columns[0]]
    for column, base, other in zip(table.columns[1:], first[1:], second[1:], strict=True):
        ratio = None
        if column.head in costly:
            column = Column(column.head, or_ratio(column.format), column.share)
            if base and other is not None:
                ratio = Ratio(other / base)
        columns.append(column)
        row.append(ratio)
    table.columns = columns
    table.rows.append(row)
    return table


TRAINING_FLOPS = Column("training\nFLOPs", scientific)
FORWARD_FLOPS = Column("forward\nFLOPs", compact)
NUMBER = Column("#", integer)
PAIRS = Column("pairs", integer)
MEMBERS = Column("members", integer)


def with_forward_flops(table: Table) -> Table:
    """Explain the column of the forward FLOPs, or remove it if all rows show the same number."""
    place = table.columns.index(FORWARD_FLOPS)
    if len({compact(row[place]) for row in table.rows}) > 1:
        table.note += " forward FLOPs is the cost per token of a forward pass of the scored model."
        return table
    return _without(table, FORWARD_FLOPS)


def with_members(table: Table) -> Table:
    """Explain the column of the members, or remove it if no row has several members."""
    place = table.columns.index(MEMBERS)
    if any(row[place] > 1 for row in table.rows):
        table.note += " members is the number of models whose mean of probabilities is scored."
        return table
    return _without(table, MEMBERS)


def _without(table: Table, removed: Column) -> Table:
    place = table.columns.index(removed)
    table.columns = [column for column in table.columns if column is not removed]
    for row in table.rows:
        del row[place]
    return table


# -- recipes and runs


def recipes(data: ReportData) -> Table:
    """Make the table of recipes, sorted from the best mean score to the worst."""
    rows: list[Row] = []
    red = set()
    for i, recipe in enumerate(data.ranked):
        rows.append([data.numbers[recipe.name], *_recipe_row(recipe)])
        if not recipe.valid_runs:
            red.add(i)
    columns = [
        NUMBER,
        Column("recipe", text, 0.25),
        Column("seeds", integer),
        Column("full", fixed(4)),
        Column("sd", fixed(4)),
        Column("±95%", fixed(4)),
        FORWARD_FLOPS,
        Column("official", fixed(4)),
        Column("covers %", fixed(1)),
        Column("params", integer),
        MEMBERS,
        Column("FLOPs", scientific),
        Column("seconds", fixed(1)),
    ]
    note = (
        "Means over the seeds that passed every guard, at the last step, in nats per character. sd is the "
        "standard deviation between seeds; ±95% is the interval of the mean by Student's t. Official "
        f"scores that cover less than {MIN_COVERAGE:.0%} of val are not compared. Seconds exclude runs "
        "that reused steps from the store."
    )
    table = Table("recipes", "Recipes", columns, rows, note, red)
    if all(len(recipe.name) <= LONGEST_NAME for recipe in data.recipes):
        table = _without(table, NUMBER)  # the figures show the names
    else:
        table.note += " The figures show the number # instead of a long name."
    return with_members(with_forward_flops(table))


def _recipe_row(recipe: Recipe) -> Row:
    valid = recipe.valid_runs
    shown = valid or recipe.runs
    mean: list[float | None] = [None, None, None]
    if valid:
        scores = stats.Mean(tuple(recipe.scores.values()))
        mean = [scores.mean, scores.sd, scores.half_width]
    return [
        recipe.name,
        len(valid),
        *mean,
        mean_of(shown, get_forward_flops),
        mean_of(valid, get_official),
        mean_of(shown, get_coverage),
        shown[0].summary["params"],
        get_members(shown[0]),
        mean_of(shown, get_flops),
        mean_of(list(filter(is_fresh, shown)), get_seconds),
    ]


def runs(data: ReportData) -> Table:
    """Make the table that lists every run of the report."""
    rows: list[Row] = []
    red = set()
    for i, run in enumerate(data.runs):
        rows.append(_run_row(run))
        if run.failed_guards:
            red.add(i)
    columns = [
        Column("run", text),
        Column("seed", identifier),
        Column("full", fixed(4)),
        Column("best", fixed(4)),
        FORWARD_FLOPS,
        Column("official", fixed(4)),
        Column("covers\n%", fixed(1)),
        Column("bits/\nbyte", fixed(4)),
        Column("steps", integer),
        Column("reused", integer),
        Column("tokens/\ns", integer),
        Column("guards", text, 0.14),
    ]
    note = (
        "full and official are scores of the last step. best is the lowest full score of any evaluation. "
        "It is shown for transparency, but nothing is computed from it."
    )
    if red:
        note += " Red: a run that failed a guard. It is excluded from all means, differences and figures."
    note = " ".join([note, *data.repeats])
    return with_forward_flops(Table("runs", "Runs", columns, rows, note, red))


def _run_row(run: Run) -> Row:
    last = run.summary["last"]
    return [
        run.id,
        run.cfg.seed,
        last["full"],
        run.summary["best"]["full"],
        get_forward_flops(run),
        last["official"],
        get_coverage(run),
        last["bits_per_byte"],
        run.summary["steps"],
        run.summary.get("ledger", {}).get("reused", 0),
        run.summary["tokens_per_s"],
        _guard_result(run),
    ]


def _guard_result(run: Run) -> str:
    if run.failed_guards:
        return f"FAIL: {', '.join(run.failed_guards)}"
    flags = _count_statuses(run.summary["guards"])["flag"]
    if flags:
        return f"ok, {flags} flag"
    return "ok"


def run_costs(data: ReportData) -> Table:
    """Make the table that lists the cost of every run beside its scores."""
    letters = machine_letters(costs.machine(run.summary) for run in data.runs)
    rows: list[Row] = []
    red = set()
    for i, run in enumerate(data.runs):
        rows.append(_cost_row(run))
        if run.failed_guards:
            red.add(i)
    columns = [
        Column("run", text, 0.3),
        Column("full", fixed(4)),
        Column("official", fixed(4)),
        Column("covers\n%", fixed(1)),
        Column("params", integer),
        MEMBERS,
        Column("seen/\nepoch", integer),
        Column("training\nFLOPs", scientific),
        FORWARD_FLOPS,
        Column("seconds", fixed(1)),
        Column("machine", lambda name: letters[name]),
    ]
    machines = "; ".join(f"{letter}: {name}" for name, letter in letters.items())
    note = f"{COST_NOTE} Seconds exclude steps that were reused from the store. Machine {machines}."
    return Table("costs", "What the runs cost", columns, rows, note, red)


def _cost_row(run: Run) -> Row:
    return [
        run.id,
        run.full,
        get_official(run),
        get_coverage(run),
        run.summary["params"],
        get_members(run),
        costs.presentations_per_epoch(run.summary),
        get_flops(run),
        get_forward_flops(run),
        get_seconds(run),
        costs.machine(run.summary),
    ]


# -- ablation


def ablation(data: ReportData) -> Table | None:
    """Make the table of an ablation, which shows the change of the score at each step and a verdict on it."""
    if not data.ladder:
        return None
    scores = ladder_scores(data.ladder)
    bases = base_indices(data.ladder)
    changes = [stats.difference(scores[base], scores[i]) for i, base in enumerate(bases, 1)]
    adjusted = iter(stats.holm([change.p for change in changes if change.p is not None]))
    means = [stats.Mean(tuple(of_step.values())).mean for of_step in scores]
    first = data.ladder[0]
    rows: list[Row] = [[step_name(first.cfg), len(scores[0]), means[0], None, None, None, None, "", ""]]
    for i, change in enumerate(changes, 1):
        before = data.ladder[bases[i - 1]].cfg
        cfg = data.ladder[i].cfg
        low, high = change.interval or (None, None)
        p = None
        if change.p is not None:
            p = next(adjusted)
        result = verdict(change, data.noise, p)
        sets = _settings(config_differences(before, cfg), without=("seed",))
        rows.append([step_name(cfg), len(scores[i]), means[i], change.mean, low, high, p, result, sets])
    columns = [
        Column("step", text, 0.11),
        Column("seeds", integer),
        Column("full", fixed(4)),
        Column("delta", fixed(4, sign=True)),
        Column("low", fixed(4, sign=True)),
        Column("high", fixed(4, sign=True)),
        Column("p", p_value),
        Column("verdict", text, 0.12),
        Column("what it sets", text, 0.27),
    ]
    note = (
        f"{_kept_steps(data.ladder, bases)} low and high are the 95% interval of delta. "
        "p is adjusted over all steps by Holm's method."
    )
    noise = data.noise
    if noise:
        spread = f"sd {noise.sd:.4f} between seeds, {noise.df} degrees of freedom"
        note += f" Noise floor {noise.floor:.4f} ({spread})."
    return Table("ablation", "From step to step", columns, rows, note)


def _kept_steps(ladder: Sequence[Recipe], bases: Sequence[int]) -> str:
    """Say which changes a step keeps, and name each step that does not change the step before it."""
    exceptions = []
    for i, base in enumerate(bases, 1):
        if base != i - 1:
            exceptions.append(f"{step_name(ladder[i].cfg)} starts from {step_name(ladder[base].cfg)} again")
    text = "Each step keeps the changes of the steps before it"
    if not exceptions:
        return f"{text}."
    what = "this exception" if len(exceptions) == 1 else "these exceptions"
    return f"{text}, with {what}: {'; '.join(exceptions)}."


def _settings(differences: Iterable[tuple[str, Any, Any]], without: Sequence[str]) -> str:
    """Format the new values of the fields that differ, in the syntax of the option `--set`."""
    return ", ".join(f"{name}={setting(new)}" for name, _, new in differences if name not in without)


def verdict(change: stats.Difference, noise: stats.Noise | None, p: float | None = None) -> str:
    """Judge whether a difference between two recipes is larger than the noise.

    The verdict is "better" or "worse" only if all evidence agrees. The difference must exceed the noise
    floor, the confidence interval must exclude zero, and the p-value, if given, must be significant.
    """
    if change.interval is None or noise is None:
        return "no claim: one seed"
    if abs(change.mean) <= noise.floor:
        return "within noise"
    low, high = change.interval
    if low <= 0 <= high:
        return "not sure"
    if p is not None and p > 1 - stats.LEVEL:
        return "not sure"
    if change.mean < 0:
        return "better"
    return "worse"


# -- configs


def differences(data: ReportData) -> Table | None:
    """Make the table of the config fields that differ between the baseline and the optimized recipe."""
    if data.baseline is None or data.optimised is None:
        return None
    rows: list[Row] = []
    for name, old, new in config_differences(data.baseline.cfg, data.optimised.cfg):
        if name not in ("seed", "growth"):
            rows.append([name, setting(old), setting(new)])
    for op in data.optimised.cfg.growth.ops:
        rows.append(["growth", "", f"{op} at {op.trigger}"])
    columns = [
        Column("field", text, 0.2),
        Column(data.baseline.name, text, 0.35),
        Column(data.optimised.name, text, 0.45),
    ]
    title = f"Config of {data.optimised.name} against {data.baseline.name}"
    return Table("config", title, columns, rows, "Fields that are not listed are equal.")


def other_configs(data: ReportData) -> Table | None:
    """Make the table of the config fields that differ between the baseline and each other recipe."""
    shown = (data.baseline, data.optimised, *data.ladder)
    others = [recipe for recipe in data.recipes if recipe not in shown]
    if data.baseline is None or not others:
        return None
    rows: list[Row] = []
    for recipe in others:
        changes = config_differences(data.baseline.cfg, recipe.cfg)
        rows.append([recipe.name, _settings(changes, without=("seed", "growth"))])
    columns = [Column("recipe", text, 0.25), Column("sets", text, 0.75)]
    return Table("other_configs", f"Other recipes against {data.baseline.name}", columns, rows)


# -- guards and growth


def guards(data: ReportData) -> Table:
    """Make the table of guards, which shows the number of passes and the worst result of each guard."""
    results: dict[str, list[dict[str, Any]]] = {}
    for run in data.runs:
        for guard in run.summary["guards"]:
            results.setdefault(guard["name"], []).append(guard)
    rows: list[Row] = []
    red = set()
    for i, (name, of_guard) in enumerate(results.items()):
        counts = _count_statuses(of_guard)
        rows.append([name, counts["pass"], counts["flag"], counts["fail"], _worst_result(of_guard)])
        if counts["fail"]:
            red.add(i)
    columns = [
        Column("guard", text, 0.17),
        Column("pass", integer, 0.06),
        Column("flag", integer, 0.06),
        Column("fail", integer, 0.06),
        Column("worst result", text, 0.65),
    ]
    note = (
        "flag: the score is valid, but it cannot be compared with the task's own score. "
        "fail: the score is not valid."
    )
    return Table("guards", "Guards", columns, rows, note, red)


def _count_statuses(results: Sequence[Mapping[str, Any]]) -> Counter[str]:
    return Counter(guard["status"] for guard in results)


def _worst_result(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst status of a guard over all runs, with the most frequent detail of this status."""
    counts = _count_statuses(results)
    worst = "pass"
    for status in ("flag", "fail"):
        if counts[status]:
            worst = status
    details = Counter(guard["detail"] for guard in results if guard["status"] == worst)
    detail = min(details, key=lambda detail: (-details[detail], detail))
    if len(details) > 1:
        return f"{worst}: {detail} (and {len(details) - 1} more like it)"
    return f"{worst}: {detail}"


def growth(run: Run, number: int) -> Table:
    """Make the table of the growth ops of a run, with the score before and after each op."""
    rows: list[Row] = []
    for op in run.ops:
        rows.append(_op_row(len(rows) + 1, op, run))
    columns = [
        Column("#", integer),
        Column("op", text, 0.2),
        Column("value", text, 0.13),
        Column("step", integer),
        Column("tokens", integer),
        Column("full before", fixed(4)),
        Column("after", fixed(4)),
        Column("params", integer),
        Column("FLOPs/token", integer),
        Column("Δ logits", text),
    ]
    note = (
        "full is scored at the last evaluation before the op and at the first evaluation after it. "
        "Δ logits is the largest change of a logit by the op itself."
    )
    return Table(f"growth_{number}", "The ops", columns, rows, note)


def _op_row(number: int, op: Mapping[str, Any], run: Run) -> Row:
    before = None
    after = None
    for evaluation in run.evals:
        if evaluation["step"] <= op["step"]:
            before = evaluation["full"]
        elif after is None:
            after = evaluation["full"]
    change = None
    if op.get("delta_logits") is not None:
        change = scientific(op["delta_logits"])
    elif _was_rolled_back(op):
        change = "failed: rolled back"
    return [
        number,
        op["name"],
        setting(op["value"]),
        op["step"],
        op["tokens"],
        before,
        after,
        op.get("params"),
        op.get("flops_per_token"),
        change,
    ]


def _was_rolled_back(op: Mapping[str, Any]) -> bool:
    return str(op.get("event", "")).endswith("ERROR")


# -- routed blocks


def routing(run: Run, number: int) -> Table:
    """Make the table of the layers of a run with routed blocks."""
    facts = run.summary["routing"]
    cfg = run.resolved.segments[-1].cfg
    dense = layer_flops(cfg.model_copy(update={"block_pattern": "D"}))[0]
    results = zip(facts["selected"], facts["student_accuracy"], strict=True)
    rows: list[Row] = []
    for layer, (letter, flops) in enumerate(
        zip(cfg.letters, layer_flops(cfg, facts["selected"]), strict=True)
    ):
        selected, accuracy = (None, None) if letter == "D" else (100 * share for share in next(results))
        rows.append([layer, f"{letter}, {LETTERS[letter]}", selected, accuracy, flops, flops / dense])
    columns = [
        Column("layer", integer),
        Column("kind", text, 0.4),
        Column("selected %", fixed(1)),
        Column("student\naccuracy %", fixed(1)),
        Column("forward FLOPs\nper token", integer),
        Column("relative\nto D", fixed(3)),
    ]
    return Table(f"routing_{number}", "The layers", columns, rows, _routing_note(run))


def _routing_note(run: Run) -> str:
    facts = run.summary["routing"]
    flops = get_forward_flops(run)
    ratio = flops / facts["forward_flops_dense"]
    return (
        f"A forward pass of the scored model takes {compact(flops)} FLOPs per token, which is {ratio:.3f} "
        "of the dense model. selected is the share of tokens in the first 64 rows of val. student accuracy "
        "is the share of tokens for which the student predicts whether training would select them. The loss "
        f"on val is {run.summary['last']['loss']:.4f} nats per token. With the selection of training, which "
        f"sees the future, the loss would be {facts['topk_loss']:.4f}. This second loss is not a score, and "
        "nothing is ranked by it."
    )


# -- appendix


def commands(data: ReportData) -> Table:
    """Make the table of the commands that trained the runs."""
    ids: dict[str, list[str]] = {}
    for run in data.runs:
        arguments = run.env.get("command", ["", "(not recorded)"])[1:]
        ids.setdefault(shlex.join(["mainrun", *arguments]), []).append(run.id)
    rows: list[Row] = []
    for command, names in ids.items():
        rows.append([command, shorten(names, 8)])
    columns = [Column("command", text, 0.6), Column("runs", text, 0.4)]
    note = (
        "Each command is from the last session of a run, and is recorded in its env.json. "
        "The command of a ladder trains all steps of the ladder."
    )
    return Table("commands", "Commands", columns, rows, note)


def hashes(data: ReportData) -> Table:
    """Make the table that lists the hashes of each run."""
    rows: list[Row] = []
    for run in data.runs:
        digests = (
            run.cfg.digest,
            run.summary.get("weights", ""),
            run.env.get("evaluate_hash", ""),
            run.summary.get("versions", {}).get("mainrun", ""),
            run.summary.get("tokenizer", ""),
        )
        rows.append([run.id, *(digest[:12] for digest in digests)])
    columns = [Column("run")]
    for head in ("config", "weights", "evaluate", "source", "tokenizer"):
        columns.append(Column(head, text, 0.15))
    note = (
        "The table shows the first 12 digits of each sha256. evaluate is the code that computed the scores; "
        "source is the code that trained."
    )
    return Table("hashes", "Hashes", columns, rows, note)


def fingerprints(data: ReportData) -> Table:
    """Make the table of data fingerprints, which shows how many runs have each fingerprint."""
    counts: Counter[tuple[str, ...]] = Counter()
    for run in data.runs:
        digests = run.summary["fingerprints"]
        parts = [digests.get(part, "")[:12] for part in ("corpus", "train", "dev", "val")]
        titles = f"{run.cfg.corpus}, {run.cfg.num_titles:,} titles"
        file = str(run.summary.get("origin", {}).get("sha256", ""))[:12]
        counts[*parts, titles, file] += 1
    rows: list[Row] = []
    for key, count in counts.items():
        rows.append([*key, count])
    columns = []
    for head in ("corpus", "train", "dev", "val", "which titles", "file"):
        columns.append(Column(head, text, 0.15))
    columns.append(Column("runs", integer))
    return Table("fingerprints", "Data fingerprints", columns, rows)


def machines(data: ReportData) -> Table:
    """Make the table of the machine classes and software versions of all sessions of all runs."""
    counts: Counter[tuple[str, str]] = Counter()
    for run in data.runs:
        for machine in run.summary.get("machine_classes", []):
            counts["machine class", _describe_flat(machine)] += 1
        for versions in run.summary.get("all_versions", []):
            shown = dict(versions)
            if "mainrun" in shown:
                shown["mainrun"] = shown["mainrun"][:12]
            counts["versions", _describe_flat(shown)] += 1
    rows: list[Row] = []
    for (kind, what), count in sorted(counts.items()):
        rows.append([kind, what, count])
    columns = [Column("kind", text, 0.15), Column("what", text, 0.77), Column("runs", integer, 0.08)]
    return Table("machines", "Machines and versions", columns, rows)


def _describe_flat(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {setting(value)}" for name, value in facts.items())


# -- studies

STUDY_FACTS = (
    "preset", "objective", "set", "sampler", "budget", "rungs",
    "engine", "sequential", "noise", "seeds", "base", "claim", "val",
)  # fmt: skip


def study(export: Study, number: int) -> list[Table]:
    """Make the tables of a study, which show its facts, its search space and its confirmation."""
    best = None
    if export.completed:
        best = min(export.completed, key=lambda trial: float(trial["value"]))
    columns = [Column("fact", text, 0.15), Column("value", text, 0.85)]
    tables = [Table(f"study_{number}", "In short", columns, list(_study_facts(export, best)))]
    space = export.fact("space")
    if isinstance(space, dict):
        tables.append(_space(space, best, number))
    confirmed = [row for row in export.fact("rows") or [] if isinstance(row, dict)]
    if confirmed:
        costs = {trial["trial"]: trial.get("forward_flops") for trial in export.trials}
        tables.append(_confirmation(confirmed, costs, number))
    return tables


def _study_facts(export: Study, best: Mapping[str, Any] | None) -> Iterator[Row]:
    states = Counter(str(trial.get("state")) for trial in export.trials)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    yield ["trials", f"{len(export.trials):,}: {counts}"]
    if best:
        yield ["best trial", f"{best['trial']}, value {float(best['value']):.4f}"]
    for name in STUDY_FACTS:
        fact = export.fact(name)
        if fact is not None:
            yield [name, describe(fact)]
    steps = ", ".join(f"{name} {count:,.0f}" for name, count in ledger(export).items())
    yield ["steps", steps or "not exported"]
    for rung, rho in (export.fact("rung_correlation") or {}).items():
        shown = "none"
        if rho is not None:
            shown = f"{rho:.2f}"
        yield [f"rung {rung}", f"rank correlation with the last rung {shown}"]


def _space(space: Mapping[str, Any], best: Mapping[str, Any] | None, number: int) -> Table:
    rows: list[Row] = []
    for name, bounds in space.items():
        chosen = ""
        if best:
            chosen = setting(best.get(f"params.{name}"))
        rows.append([name, describe_bounds(bounds), chosen])
    columns = [Column("field", text, 0.3), Column("searched", text, 0.5), Column("best trial", text, 0.2)]
    return Table(f"study_{number}_space", "Bounds", columns, rows)


def _confirmation(
    confirmed: Sequence[Mapping[str, Any]], costs: Mapping[Any, float | None], number: int
) -> Table:
    """Make the table of the confirmed trials. `costs` has the forward FLOPs of all trials."""
    rows: list[Row] = []
    for trial in confirmed:
        low, high = trial.get("interval") or (None, None)
        result = trial.get("why")
        if trial.get("stopped"):
            result = f"{result}; {trial['stopped']}"
        if trial.get("claim"):
            result = "claimed"
        sets = describe(trial.get("params"))
        numbers = [
            trial.get("trial"),
            trial.get("mean"),
            costs.get(trial.get("trial")),
            trial.get("difference"),
            low,
            high,
            trial.get("p_holm"),
            trial.get("pairs"),
        ]
        rows.append([*numbers, result, sets])
    columns = [
        Column("trial", integer),
        Column("mean", fixed(4)),
        FORWARD_FLOPS,
        Column("difference", fixed(4, sign=True)),
        Column("low", fixed(4, sign=True)),
        Column("high", fixed(4, sign=True)),
        Column("p", p_value),
        PAIRS,
        Column("verdict", text, 0.25),
        Column("what it sets", text, 0.35),
    ]
    note = (
        "Trials are compared with the base on new paired seeds. The study recorded the intervals and "
        "verdicts. p is adjusted by Holm's method."
    )
    if all(trial.get("pairs") is None for trial in confirmed):
        _drop(PAIRS, columns, rows)
    else:
        note += (
            " Pairs were added one at a time. The intervals and p hold for all numbers of pairs up to the "
            "maximum together."
        )
    base = compact(costs.get(0))
    if {compact(row[columns.index(FORWARD_FLOPS)]) for row in rows} == {base}:
        _drop(FORWARD_FLOPS, columns, rows)
    else:
        note += f" The base takes {base} forward FLOPs per token."
    return Table(f"study_{number}_confirmation", "Confirmation", columns, rows, note)


def _drop(column: Column, columns: list[Column], rows: Sequence[list[Any]]) -> None:
    """Remove a column and its cells from a table."""
    place = columns.index(column)
    del columns[place]
    for row in rows:
        del row[place]


def failures(data: ReportData, limit: int = 30) -> Table | None:
    """Make the table of everything that failed: runs, guards, ops and trials, with the reasons."""
    rows: list[Row] = []
    for ended in data.ended:
        where = f"{ended.state}, step {ended.step}"
        rows.append([ended.path.name, where, one_line(ended.why) or "no reason given"])
    for run in data.runs:
        for guard in run.summary["guards"]:
            if guard["status"] == "fail":
                rows.append([run.id, "guard", f"{guard['name']}: {guard['detail']}"])
    for run in data.runs:
        for op in run.journal:
            if _was_rolled_back(op):
                reason = f"{op['name']} was rolled back: {setting(op.get('checks'))}"
                rows.append([run.id, f"step {op['step']}", reason])
    for export in data.studies:
        failed = [trial for trial in export.trials if is_failed(trial)]
        for trial in failed[:limit]:
            reason = str(trial.get("reason") or "no reason given")
            rows.append([f"{export.name}, trial {trial['trial']}", str(trial["state"]), reason])
        if len(failed) > limit:
            more = f"and {len(failed) - limit} more failed trials, in trials.parquet"
            rows.append([export.name, "", more])
        rows += _pruned(export, limit)
    if not rows:
        return None
    columns = [Column("what", text, 0.25), Column("where", text, 0.15), Column("why", text, 0.6)]
    return Table("failures", "Runs, trials and ops", columns, rows)


def _pruned(export: Study, limit: int) -> Iterator[Row]:
    """Yield a row for each reason why trials were stopped early, with the numbers of these trials."""
    by_reason: dict[str, list[str]] = {}
    for trial in export.trials:
        if trial_state(trial) == PRUNED:
            reason = str(trial.get("reason") or "stopped at a rung")
            by_reason.setdefault(reason, []).append(str(trial["trial"]))
    for reason, numbers in list(by_reason.items())[:limit]:
        noun = "trial" if len(numbers) == 1 else "trials"
        yield [f"{export.name}, {noun} {shorten(numbers, 8)}", PRUNED, reason]
    if len(by_reason) > limit:
        yield [export.name, PRUNED, f"and {len(by_reason) - limit} more reasons, in trials.parquet"]
