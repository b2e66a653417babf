"""Implement `mainrun verify`, which checks whether the scores of a bundle come from its code.

The code in the bundle trains the first steps again and scores the final weights again. `mainrun verify`
compares the new results with the results in the bundle.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mainrun.errors import MainrunError, UsageError
from mainrun.store.rundir import RunDir
from reports.submission import bundle
from reports.submission.bundle import CODE, REPORT, RUN, BundleError
from reports.submission.commit import ROOT
from reports.submission.finished_run import FIGURES, RUN_FILES, complete_summary, missing_quotes, pdf_text
from reports.submission.replay_process import run_replay

Row = dict[str, Any]  # the type of a row in metrics.jsonl

# Other machine classes round differently, and the differences grow with each training step.
TRAINING_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
SCORING_TOLERANCE = 1e-3  # the tolerance for scores of the final weights, which are not trained again
GRAD_NORM_FACTOR = 10  # the tolerance for gradient norms, as a multiple of the tolerance for losses
NOT_COMPARED = {"seconds", "reused"}

# The names of the facts that both the manifest and the summary of a run contain.
MANIFEST_FACTS = ("fingerprints", "tokenizer", "geometry", "machine_class", "versions")
# The names of the facts that follow from the code and the config of a run.
REPLAYED_FACTS = ("fingerprints", "tokenizer", "params", "tokens", "flops")


@dataclass
class Verdict:
    """The result of verifying a bundle."""

    run: str
    differences: list[str]
    checked: list[str] = field(default_factory=list)  # one line for each comparison that was made
    same_class: bool = True  # whether this machine has the same class and versions as the run's machine
    machine_differences: list[str] = field(default_factory=list)
    tolerance: float = 0.0
    steps: int = 0  # the number of steps that were trained again
    total_steps: int = 0
    changed_code: list[str] = field(default_factory=list)  # trainer files that differ from the installation

    @property
    def verified(self) -> bool:
        return not self.differences


def verify(path: Path, steps: int, note: Callable[[str], None]) -> Verdict:
    """Verify a bundle.

    The code in the bundle is executed only if the files, the manifest and the report are consistent.
    """
    files = bundle.read(path)
    try:
        manifest = bundle.read_manifest(files)
    except BundleError as e:
        raise bundle.refusal(path, e) from None
    verdict = Verdict(
        run=bundle.escape(str(manifest.get("run"))),
        differences=bundle.differences(files, manifest["files"]),
    )
    for name in (*(RUN + name for name in RUN_FILES), REPORT, CODE + "mainrun/replay.py"):
        if name not in files:
            verdict.differences.append(f"the bundle has no {name}")
    verdict.checked.append(f"{len(files):,} files against their sha256 in the manifest")
    if verdict.verified:
        with tempfile.TemporaryDirectory(prefix="mainrun-verify-") as folder:
            _verify_run(verdict, Path(folder), files, manifest, steps, note)
    return verdict


def _verify_run(
    verdict: Verdict,
    folder: Path,
    files: dict[str, bytes],
    manifest: dict[str, Any],
    steps: int,
    note: Callable[[str], None],
) -> None:
    """Unpack a bundle into a folder, and check the run in the bundle.

    If this check finds no differences, replay the run.
    """
    bundle.write(files, folder)
    run = RunDir(folder / RUN)
    try:
        summary = complete_summary(run)
        rows = run.rows()
        dtype = run.config().dtype
        verdict.differences += _documents(manifest, summary, run, files)
    except MainrunError as e:
        verdict.differences.append(f"the run: {e}".replace(f"{folder}/", ""))
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as e:
        verdict.differences.append(f"the run cannot be read ({type(e).__name__}: {e})")
    verdict.checked.append("the summary, the log, the manifest and the report against each other")
    if not verdict.verified:
        return
    verdict.changed_code = _changed_code(files)
    commit = str(manifest.get("commit"))[:12]
    note(f"this executes the bundle's own code (commit {commit}), which trains at most {steps} steps")
    try:
        result = run_replay(folder / CODE, "steps", run.path, str(steps))
        _compare_machines(verdict, result, run.env(), dtype)
        _compare_facts(verdict, result, summary)
        _compare_scores(verdict, result, rows)
        _compare_weights(verdict, result, summary)
    except MainrunError as e:
        verdict.differences.append(f"the replay failed: {e}".replace(f"{folder}/", ""))
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        verdict.differences.append(f"the result of the replay cannot be read ({type(e).__name__}: {e})")


def _documents(
    manifest: dict[str, Any], summary: dict[str, Any], run: RunDir, files: dict[str, bytes]
) -> list[str]:
    """Compare the manifest, the run and the report without executing code from the bundle."""
    problems = []
    cfg = run.config()
    facts = {"run": cfg.run_id, "preset": cfg.preset}
    facts |= {name: summary[name] for name in MANIFEST_FACTS}
    for name, value in facts.items():
        if manifest.get(name) != value:
            problems.append(f"{name} is {manifest.get(name)!r} in the manifest, {value!r} in the run")
    figures = manifest["figures"]
    for name in FIGURES:
        if figures.get(name) != summary[name]:
            problems.append(
                f"the figure {name} is {figures.get(name)!r} in the manifest, "
                f"{summary[name]!r} in the summary"
            )
    state = run.status().get("state")
    if state != "done":
        problems.append(f"status.json says {state!r}, but only a finished run can be submitted")
    for guard in manifest["guards"]:
        if guard["status"] == "fail":
            problems.append(f"guard {guard['name']} failed: {guard['detail']}")
    try:
        missing = missing_quotes(pdf_text(files[REPORT], REPORT), summary)
    except UsageError as e:
        problems.append(str(e))
    else:
        if missing:
            problems.append(f"{REPORT} does not quote this run: it lacks {', '.join(missing)}")
    return problems


def _changed_code(files: dict[str, bytes]) -> list[str]:
    """Return the names of the trainer files that differ between the bundle and the installation."""
    bundled = {}
    for name, data in files.items():
        if name.startswith(f"{CODE}mainrun/") and name.endswith(".py"):
            bundled[name.removeprefix(CODE)] = data
    installed = {}
    for path in (ROOT / "mainrun").rglob("*.py"):
        installed[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    names = bundled.keys() | installed.keys()
    return sorted(name for name in names if bundled.get(name) != installed.get(name))


def _compare_machines(verdict: Verdict, result: dict[str, Any], env: dict[str, Any], dtype: str) -> None:
    """Choose the tolerance for comparing numbers.

    The tolerance is zero if this machine has the same class and versions as the run's machine.
    """
    of_run = _machine(env["machine_classes"][0], env["all_versions"][0])
    current = _machine(result["machine_class"], result["versions"])
    for name in sorted(of_run.keys() | current.keys()):
        if of_run.get(name) != current.get(name):
            verdict.machine_differences.append(
                f"{name}: the run had {of_run.get(name)}, this machine has {current.get(name)}"
            )
    if len(env["machine_classes"]) + len(env["all_versions"]) > 2:
        verdict.machine_differences.append(
            "the run was resumed on another machine class or with other versions"
        )
    verdict.same_class = not verdict.machine_differences
    if not verdict.same_class:
        verdict.tolerance = TRAINING_TOLERANCE[dtype]


def _machine(machine_class: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    """Return all facts that affect rounding, except the version of mainrun, which is compared separately."""
    facts = dict(machine_class)
    for name, version in versions.items():
        if name != "mainrun":
            facts[f"version of {name}"] = version
    return facts


def _compare_facts(verdict: Verdict, result: dict[str, Any], summary: dict[str, Any]) -> None:
    verdict.steps = result["steps"]
    verdict.total_steps = summary["steps"]
    planned = result.get("of", verdict.total_steps)
    if planned != verdict.total_steps:
        verdict.differences.append(
            f"the config of the run implies {planned} steps, but the summary says {verdict.total_steps}"
        )
    source = result["versions"]["mainrun"]
    trained_by = {versions["mainrun"] for versions in summary["all_versions"]}
    if trained_by != {source}:
        named = ", ".join(sorted(other[:12] for other in trained_by))
        verdict.differences.append(
            f"the run was trained by source {named}, but the code is source {source[:12]}"
        )
    for name in REPLAYED_FACTS:
        value = result.get(name, summary[name])
        if value != summary[name]:
            verdict.differences.append(
                f"{name} is {summary[name]!r} in the run, {value!r} according to its code and config"
            )


def _compare_scores(verdict: Verdict, result: dict[str, Any], rows: list[Row]) -> None:
    logged = {_key(row): row for row in rows}
    _compare_rows(verdict, logged, result["rows"], verdict.tolerance)
    scored = sorted({row["step"] for row in result["rows"] if row["event"] == "eval"})
    scored_after = ", ".join(map(str, scored)) or "none"
    verdict.checked.append(
        f"{verdict.steps} of {verdict.total_steps} steps trained again, scored after {scored_after}"
    )
    if "last" in result:
        _compare_rows(verdict, logged, result["last"], min(verdict.tolerance, SCORING_TOLERANCE))
        verdict.checked.append("the last weights scored again")
    elif "unusable" in result:
        verdict.differences.append(
            f"the last weights are in the bundle, but cannot be used: {result['unusable']}"
        )


def _compare_weights(verdict: Verdict, result: dict[str, Any], summary: dict[str, Any]) -> None:
    expected = summary["weights"]
    computed = {"the checkpoint's": result.get("weights", expected)}
    if verdict.same_class:  # training on another machine class gives slightly different weights
        computed["the replay's"] = result.get("trained_weights", expected)
    for owner, weights in computed.items():
        if weights != expected:
            verdict.differences.append(
                f"{owner} weights are {weights[:12]}, the summary says {str(expected)[:12]}"
            )


def _key(row: Row) -> tuple[str, int, str | None]:
    return row["event"], row["step"], row.get("split")


def _compare_rows(
    verdict: Verdict,
    logged: dict[tuple[str, int, str | None], Row],
    replayed: list[Row],
    tolerance: float,
) -> None:
    for row in replayed:
        is_score = row["event"] == "eval"
        place = f"step {row['step']}"
        if is_score:
            place += f", {row['split']}"
        logged_row = logged.get(_key(row))
        if logged_row is None:
            if is_score:  # the log may omit rows of steps, but must contain all scores
                verdict.differences.append(f"{place}: the log has no score")
            continue
        for name in sorted((row.keys() | logged_row.keys()) - NOT_COMPARED):
            allowed = tolerance * GRAD_NORM_FACTOR if name.startswith("grad_norm") else tolerance
            expected = logged_row.get(name)
            value = row.get(name)
            if not _same(expected, value, allowed):
                verdict.differences.append(
                    f"{place}: {name} is {expected!r} in the log, {value!r} in the replay"
                )


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if a == b and type(a) is type(b):
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name], tolerance) for name in a)
    if not tolerance or not isinstance(a, float) or not isinstance(b, float):
        return False
    return math.isclose(a, b, rel_tol=tolerance)
