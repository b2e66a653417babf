"""`mainrun eval`: evaluate the model of a run on multiple-choice questions and on tasks of lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mainrun.errors import UsageError
from mainrun.ui.console import Debug, Json, Out, RunName, emit, show_table, stoppable, validate_paths

if TYPE_CHECKING:
    from mainrun.interop.choice_files import Question
    from mainrun.interop.eval import ScoredRun
    from mainrun.interop.lm_eval_model import Tasks
    from mainrun.store.rundir import RunDir

Result = dict[str, Any]

ROUTES = ("own", "student")


def eval_run(
    run: RunName,
    choices: Annotated[
        Path | None,
        typer.Option(
            "--choices",
            metavar="FILE.jsonl",
            callback=validate_paths,
            help='Questions, one {"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX} per line.',
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B", help="Names of tasks of lm-eval, separated by commas."),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(
            "--include", metavar="DIR", callback=validate_paths, help="A folder with task files for --tasks."
        ),
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(
            "--route",
            metavar="own|student",
            help="What selects the tokens of routed blocks. By default, as in the run's own scores.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, max=10**9, metavar="N", help="Use only the first N questions."),
    ] = None,
    out: Out = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a run on multiple-choice questions or tasks.

    The tasks are those of lm-eval or your own task files. The model has the weights and the
    routing that the run was scored with. The results are printed and written to RUN/eval. Tasks need the
    package lm-eval.
    """
    with stoppable():
        names = _check_request(choices, tasks, include, route)
        run_dir = _find_run(run, out, route)
        questions = _read_questions(choices)
        task_list = _find_tasks(names, include)
        scored = _load(run_dir, route)
        results = []
        if choices is not None:
            results.append(_evaluate_choices(run_dir, scored, choices, questions, limit))
        if task_list is not None:
            results += _evaluate_tasks(run_dir, scored, task_list, limit)
    _show(results, as_json)


# -- the request


def _check_request(
    choices: Path | None, tasks: str | None, include: Path | None, route: str | None
) -> list[str]:
    """Check the options that need no file, and return the names of the tasks."""
    if choices is None and tasks is None:
        raise UsageError("nothing to evaluate; give --choices FILE.jsonl, --tasks A,B, or both")
    if include is not None and tasks is None:
        raise UsageError(
            f"got --include {include} without --tasks; name the tasks of the folder with --tasks"
        )
    if route is not None and route not in ROUTES:
        raise UsageError(f"got --route {route!r}; use own or student, or omit the option")
    if tasks is None:
        return []
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UsageError(
            f"got --tasks {tasks!r}, which contains an empty name; write, for example, --tasks A,B"
        )
    if include is not None and not include.is_dir():
        raise UsageError(f"got --include {include}, which is not a folder; give a folder with task files")
    return names


def _find_run(name: str, out: Path, route: str | None) -> RunDir:
    """Find the run. Raise an error for a wrong run or route now, before the slow import of torch."""
    from mainrun.store import rundir

    run = rundir.find(name, out)
    cfg = run.config()
    if route is not None and not cfg.routed_layers:
        raise UsageError(
            f"got --route {route}, but {run.path} is dense: it has no routers that could choose; omit --route"
        )
    rundir.check_writable(run.path / "eval")
    return run


def _read_questions(path: Path | None) -> list[Question]:
    if path is None:
        return []
    from mainrun.interop.choice_files import read_questions

    return read_questions(path)


def _find_tasks(names: list[str], include: Path | None) -> Tasks | None:
    if not names:
        return None
    try:
        from mainrun.interop.lm_eval_model import Tasks
    except ImportError as e:
        raise UsageError(
            f"--tasks needs the package lm-eval ({e}); install it with: pip install 'mainrun[eval]'"
        ) from e
    return Tasks(names, include)


def _load(run: RunDir, route: str | None) -> ScoredRun:
    from mainrun.interop.eval import load

    scored = load(run, route)
    if not scored.finished:
        step = scored.run_info["step"]
        text = f"note: {run.path} is not finished; its newest checkpoint, of step {step:,}, is evaluated"
        print(text, file=sys.stderr, flush=True)
    return scored


# -- evaluations


def _evaluate_choices(
    run: RunDir, scored: ScoredRun, path: Path, questions: list[Question], limit: int | None
) -> Result:
    from mainrun.files.hashing import sha256_file
    from mainrun.interop.eval import evaluate_questions, write_result

    sha256 = sha256_file(path)
    selected = questions[:limit]
    metrics, items = evaluate_questions(scored.scorer, selected, str(path))
    result: Result = {
        "kind": "choices",
        "source": {"file": path.name, "sha256": sha256, "questions": len(questions)},
        "limit": limit,
        **scored.run_info,
        "results": {path.stem: {"questions": len(selected), "metrics": metrics}},
    }
    identity = {"sha256": sha256, "limit": limit}
    written = write_result(run, "choices", path.stem, result | {"items": items}, identity)
    return {"path": str(written), **result}


def _evaluate_tasks(run: RunDir, scored: ScoredRun, tasks: Tasks, limit: int | None) -> Iterator[Result]:
    from mainrun.interop.eval import write_result
    from mainrun.interop.lm_eval_model import MainrunLM, versions

    lm = MainrunLM(scored.scorer)
    for name in tasks.names:
        evaluation = tasks.run(name, lm, limit)
        run_info = scored.run_info | {"versions": scored.run_info["versions"] | versions()}
        result: Result = {
            "kind": "task",
            "source": evaluation.source,
            "limit": limit,
            **run_info,
            "results": evaluation.results,
        }
        identity = {"source": evaluation.source, "limit": limit}
        written = write_result(run, "task", name, result, identity)
        yield {"path": str(written), **result}


# -- output


def _show(results: list[Result], as_json: bool) -> None:
    if as_json:
        emit({"evaluations": results})
        return
    first = results[0]
    text = f"{first['run']}, step {first['step']:,}, weights {first['weights']['sha256'][:12]}"
    if first["route"]:
        layers = ", ".join(f"layer {layer} {name}" for layer, name in first["route"].items())
        text += f", route: {layers}"
    print(text)
    lines = []
    for result in results:
        for name, values in result["results"].items():
            for metric, numbers in values["metrics"].items():
                lines.append([name, metric, *_cells(numbers), _number(values["questions"])])
    show_table(["task", "metric", "value", "stderr", "questions"], lines)
    for result in results:
        print(f"wrote {result['path']}")


def _cells(numbers: dict[str, Any]) -> list[str]:
    return [_number(numbers["value"]), _number(numbers["stderr"])]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value)
