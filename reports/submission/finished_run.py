"""Check that a run is complete and that a report quotes the scores of the run.

Both `mainrun submit` and `mainrun verify` use these checks.
"""

from __future__ import annotations

import io
import logging
import re
from typing import Any

from mainrun.errors import RunError, UsageError
from mainrun.store.rundir import RunDir
from mainrun.ui import compare

RUN_FILES = ("config.json", "env.json", "status.json", "metrics.jsonl", "summary.json", "tokenizer.json")
FIGURES = ("last", "best", "steps", "params", "weights")
REQUIRED_KEYS = (*FIGURES, "scores", "tokenizer", "machine_class", "versions", "all_versions")

RESTORE = "restore it, or train the run again with --fresh"


def complete_summary(run: RunDir) -> dict[str, Any]:
    """Check that a run is finished, and return the summary of the run.

    Raise RunError if a file of the run is missing, or if the summary contradicts the log.
    """
    summary = compare.load_summary(run)
    missing = [name for name in RUN_FILES if not (run.path / name).is_file()]
    if missing:
        raise RunError(f"{run.path} has no {', '.join(missing)}; {RESTORE}")
    for key in REQUIRED_KEYS:
        if key not in summary:
            raise RunError(f"{run.path}/summary.json has no {key!r}; {RESTORE}")
    _check_scores(run, summary)
    _check_run_id(run, summary)
    _check_last_rows(run, summary)
    return summary


def _check_scores(run: RunDir, summary: dict[str, Any]) -> None:
    if summary["scores"].get("val") != {"last": summary["last"], "best": summary["best"]}:
        raise RunError(f"{run.path}/summary.json contains contradictory scores of val; {RESTORE}")


def _check_run_id(run: RunDir, summary: dict[str, Any]) -> None:
    run_id = run.config().run_id
    if summary["run"] == run_id:
        return
    if summary["run"] == run.path.name:
        raise RunError(
            f"the run {run.path} was trained by different code: the current code gives its config the id "
            f"{run_id}; check out the commit that trained the run, or train the run again"
        )
    raise RunError(f"{run.path}/summary.json belongs to another run, {summary['run']}; {RESTORE}")


def _check_last_rows(run: RunDir, summary: dict[str, Any]) -> None:
    """Check that the log ends with a row for the last step and a score on `val` at the last step."""
    last_steps = {}
    for row in run.rows():
        if row["event"] == "step" or row.get("split") == "val":
            last_steps[row["event"]] = row["step"]
    steps = summary["steps"]
    if last_steps != {"step": steps, "eval": steps}:
        raise RunError(
            f"{run.path}/metrics.jsonl does not end with a row and a val score of the last step, {steps}; "
            f"{RESTORE}"
        )


def pdf_text(data: bytes, name: str) -> str:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # hides the warnings that pypdf logs
    try:
        return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(data)).pages)
    except Exception as e:  # pypdf raises errors of many types if a file is damaged
        raise UsageError(
            f"{name} is not a readable PDF ({type(e).__name__}: {e}); create it again with mainrun report"
        ) from None


def missing_quotes(text: str, summary: dict[str, Any]) -> list[str]:
    """Return the parts of a run's result that a report does not quote.

    A report must quote the id of the run. A report must also quote the last `official` score and the last
    `full` score with at least four decimals.
    """
    missing = []
    if summary["run"] not in re.sub(r"\s", "", text):  # a line break in the PDF may split the id of the run
        missing.append(f"run {summary['run']}")
    numbers = re.findall(r"\d+\.\d{4,}", text)
    for name in ("official", "full"):
        value = summary["last"][name]
        if not any(_is_rounded(number, value) for number in numbers):
            missing.append(f"{name} {value:.4f}")
    return missing


def _is_rounded(number: str, value: float) -> bool:
    """Return whether `number` equals `value`, rounded to as many decimals as `number` has."""
    digits = len(number.partition(".")[2])
    return number == f"{value:.{digits}f}"
