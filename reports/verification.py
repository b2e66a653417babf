"""Whether a bundle's figures come from its code: its first steps trained again, its last weights scored again, all compared."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mainrun.errors import MainrunError, UsageError
from mainrun.store.rundir import RunDir
from reports import bundle
from reports.bundle import CODE, REPORT, RUN, BundleError
from reports.replaying import replay
from reports.submission import FIGURES, ROOT, RUN_FILES, pdf_text, quotes, whole

# On another machine class the first steps may round otherwise, which grows from step to step; scores of given weights only round.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
CLOCKS = {"seconds", "reused"}


@dataclass
class Verdict:
    run: str
    differences: list[str]
    done: list[str] = field(default_factory=list)  # what was looked at
    same_class: bool = True
    apart: list[str] = field(default_factory=list)  # where this machine is another
    tolerance: float = 0.0
    steps: int = 0
    of: int = 0
    other_code: list[str] = field(
        default_factory=list
    )  # files of the trainer that are not those installed here

    @property
    def verified(self) -> bool:
        return not self.differences


def verify(path: Path, steps: int, note: Callable[[str], None]) -> Verdict:
    """Nothing of a bundle whose files are not those of its manifest is executed."""
    files = bundle.read(path)
    try:
        manifest = bundle.manifest(files)
    except BundleError as e:
        raise BundleError(f"{path} is refused: {e}{'' if ';' in str(e) else bundle.AGAIN}") from None
    verdict = Verdict(bundle.show(str(manifest.get("run"))), bundle.differences(files, manifest["files"]))
    missing = [
        name
        for name in (*(RUN + name for name in RUN_FILES), REPORT, CODE + "mainrun/replay.py")
        if name not in files
    ]
    verdict.differences += [f"there is no {name}" for name in missing]
    verdict.done.append(f"{len(files):,} files against their sha256 in the manifest")
    if verdict.differences:
        return verdict
    with tempfile.TemporaryDirectory(prefix="mainrun-verify-") as folder:
        place = Path(folder)
        bundle.write(files, place)
        run = RunDir(place / RUN)
        try:
            summary, rows, dtype = whole(run), run.rows(), run.config().dtype
            verdict.differences += _on_paper(manifest, summary, run, files)
        except MainrunError as e:
            verdict.differences.append(f"the run: {e}".replace(f"{place}/", ""))
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as e:
            verdict.differences.append(f"the run cannot be read ({type(e).__name__}: {e})")
        verdict.done.append("the summary, the log, the manifest and the report against each other")
        if verdict.differences:
            return verdict
        verdict.other_code = _other_code(files)
        note(
            f"this executes the bundle's own code (commit {str(manifest.get('commit'))[:12]}) to train its first steps, {steps} at most"
        )
        try:
            found = replay(place / CODE, "steps", run.path, str(steps))
            _compare(verdict, found, summary, rows, run.env(), dtype)
        except MainrunError as e:
            verdict.differences.append(f"the replay failed: {e}".replace(f"{place}/", ""))
        except (LookupError, TypeError, AttributeError, ValueError) as e:
            verdict.differences.append(f"the replay's findings cannot be read ({type(e).__name__}: {e})")
    return verdict


def _on_paper(
    manifest: dict[str, Any], summary: dict[str, Any], run: RunDir, files: dict[str, bytes]
) -> list[str]:
    """What can be seen without running anything."""
    cfg = run.config()
    figures = manifest["figures"]
    told = {"run": cfg.run_id, "preset": cfg.preset} | {
        k: summary[k] for k in ("fingerprints", "tokenizer", "geometry", "machine_class", "versions")
    }
    found = [
        f"{k} is {manifest.get(k)!r} in the manifest, {value!r} in the run"
        for k, value in told.items()
        if manifest.get(k) != value
    ]
    for k in FIGURES:
        if figures.get(k) != summary[k]:
            found.append(
                f"{k} of the figures is {figures.get(k)!r} in the manifest, {summary[k]!r} in the summary"
            )
    if (state := run.status().get("state")) != "done":
        found.append(f"status.json says {state!r}, and only a run that is done can be handed in")
    found += [
        f"guard {guard['name']} failed: {guard['detail']}"
        for guard in manifest["guards"]
        if guard["status"] == "fail"
    ]
    try:
        if missing := quotes(pdf_text(files[REPORT], REPORT), summary):
            found.append(f"{REPORT} does not quote this run: it has no {', no '.join(missing)}")
    except UsageError as e:
        found.append(str(e))
    return found


def _other_code(files: dict[str, bytes]) -> list[str]:
    theirs = {
        name.removeprefix(CODE): data
        for name, data in files.items()
        if name.startswith(f"{CODE}mainrun/") and name.endswith(".py")
    }
    ours = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "mainrun").rglob("*.py")}
    return sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))


def _compare(
    verdict: Verdict,
    found: dict[str, Any],
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    env: dict[str, Any],
    dtype: str,
) -> None:
    first, versions = env["machine_classes"][0], env["all_versions"][0]
    here = found["machine_class"] | {
        f"version of {k}": v for k, v in found["versions"].items() if k != "mainrun"
    }
    there = first | {f"version of {k}": v for k, v in versions.items() if k != "mainrun"}
    verdict.apart = [
        f"{k}: {there.get(k)} there, {here.get(k)} here"
        for k in sorted({*here, *there})
        if here.get(k) != there.get(k)
    ]
    if len(env["machine_classes"]) + len(env["all_versions"]) > 2:
        verdict.apart.append(
            "the run was stopped, and went on on another machine class or with other versions"
        )
    verdict.same_class = not verdict.apart
    verdict.tolerance = 0.0 if verdict.same_class else TOLERANCE[dtype]
    verdict.steps, verdict.of = found["steps"], summary["steps"]
    if found.get("of", verdict.of) != verdict.of:
        verdict.differences.append(f"its config makes {found['of']} steps, the summary says {verdict.of}")
    sources = {entry["mainrun"] for entry in summary["all_versions"]}
    if sources != {found["versions"]["mainrun"]}:
        named = ", ".join(sorted(source[:12] for source in sources))
        verdict.differences.append(
            f"the run was trained by source {named}, the code is source {found['versions']['mainrun'][:12]}"
        )
    verdict.differences += [
        f"{k} is {summary[k]!r} in the run, {found[k]!r} by its code and config"
        for k in ("fingerprints", "tokenizer", "params", "tokens", "flops")
        if found.get(k, summary[k]) != summary[k]
    ]
    _rows(verdict, {_key(row): row for row in rows}, found["rows"], verdict.tolerance)
    scored = sorted({row["step"] for row in found["rows"] if row["event"] == "eval"})
    verdict.done.append(
        f"{verdict.steps} of {verdict.of} steps trained again, scored after {', '.join(map(str, scored)) or 'none'}"
    )
    if "last" in found:  # given weights: nothing has grown
        _rows(verdict, {_key(row): row for row in rows}, found["last"], min(verdict.tolerance, 1e-3))
        verdict.done.append("the last weights scored again")
    elif "unusable" in found:
        verdict.differences.append(
            f"the last weights are in the bundle and cannot be used: {found['unusable']}"
        )
    # a checkpoint's are the run's on every machine; those trained anew on this class alone
    for name, what, due in (
        ("weights", "the checkpoint's", True),
        ("trained_weights", "the replay's", verdict.same_class),
    ):
        if due and name in found and found[name] != summary["weights"]:
            verdict.differences.append(
                f"{what} weights are {found[name][:12]}, the summary says {str(summary['weights'])[:12]}"
            )


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["event"], row["step"], row.get("split")


def _rows(
    verdict: Verdict,
    kept: dict[tuple[Any, ...], dict[str, Any]],
    again: list[dict[str, Any]],
    tolerance: float,
) -> None:
    for row in again:
        there = kept.get(_key(row))
        what = f"step {row['step']}" + (f", {row['split']}" if row["event"] == "eval" else "")
        if there is None:
            if row["event"] == "eval":
                verdict.differences.append(f"{what}: the log has no score")
            continue  # log_every leaves steps out
        for name in sorted({*row, *there} - CLOCKS):
            if not _same(there.get(name), row.get(name), tolerance * (10 if name == "grad_norm" else 1)):
                verdict.differences.append(
                    f"{what}: {name} is {there.get(name)!r} in the log, {row.get(name)!r} now"
                )


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if a == b and type(a) is type(b):
        return True
    return (
        bool(tolerance)
        and isinstance(a, float)
        and isinstance(b, float)
        and math.isclose(a, b, rel_tol=tolerance)
    )
