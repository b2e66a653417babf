"""Mutation testing: plant one small bug at a time in a source file and see whether the tests notice.

    ./task mutate -- sweeps/confirm.py --sample 40 --seed 1
    ./task mutate -- mainrun/store --sample 0          # a folder; 0 means all mutants

First, the test files of the source file run once without a bug. This run records which test executes which
line, and how long each test takes. Then each mutant is tested by the test files that execute its lines, and
by the tests that start other processes. The tests that are most likely to fail run first. Tests marked slow
never run. By default, one worker runs per core. A worker imports the libraries once and forks a process for
each mutant, so a mutant has no start-up time.

Cosmic Ray makes the mutants (tests/mutants.py). We use our own runner because Cosmic Ray starts a new Python
interpreter for each mutant, which takes four seconds. We do not use mutmut for two reasons. First, mutmut
changes only function bodies, but our tolerances, bounds and leak patterns are tables at the top of a module.
Second, mutmut rewrites every function, so the guards that hash the source would fail.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from queue import Queue
from typing import Any

HERE = Path(__file__).resolve().parent
EQUIVALENT = HERE / "equivalent_mutants.toml"
DEADLINE = ".deadline"  # suffix of the file that contains the current test's deadline
LEFT_OUT = (
    "[.]git",
    ".venv*",
    "runs",
    "*_cache",
    "__pycache__",
    ".hypothesis",
    ".task",
    "*.egg-info",
    "docs",
)

# The tests of a source file are tests/test_STEM.py and tests/test_PACKAGE_STEM.py, their variants that end in
# _rows, and the tests in this table.
MIRRORS = {
    "mainrun/api": "test_api test_api_studies",
    "mainrun/bench": "test_bench",
    "mainrun/checks/guards.py": "test_guards test_guards_rows",
    "mainrun/checks/repeat.py": "test_growth_repeat test_growth_controller",
    "mainrun/core/attention.py": "test_model test_train_rows test_routing test_shortcuts",
    "mainrun/core/average.py": "test_model test_layers_rows",
    "mainrun/core/cuda_graph.py": "test_estimate test_train_rows",
    "mainrun/core/dropout.py": "test_model test_kernels test_train_rows test_routed_steps",
    "mainrun/core/frozen_torch.py": "test_plain_run test_train",
    "mainrun/core/gradient_norms.py": "test_gradient_norms",
    "mainrun/core/hardware.py": "test_device test_kernels",
    "mainrun/core/initial.py": "test_train_rows test_growth_operators_rows",
    "mainrun/core/layers.py": "test_model test_train_rows test_routing",
    "mainrun/core/shortcuts.py": "test_shortcuts test_model test_routing",
    "mainrun/core/lora.py": "test_layers test_layers_rows test_lora",
    "mainrun/core/sharding.py": "test_shard",
    "mainrun/core/machine_class.py": "test_device test_lineage",
    "mainrun/core/members.py": "test_members",
    "mainrun/data/ngram.py": "test_ngram",
    "mainrun/core/moe.py": "test_layers test_layers_rows",
    "mainrun/core/native/cpu.py": "test_kernels",
    "mainrun/core/optimizers.py": "test_model test_kernels test_train_rows test_routed_steps",
    "mainrun/core/parameters.py": "test_lora",
    "mainrun/core/pending_losses.py": "test_train test_train_rows",
    "mainrun/core/process_group.py": "test_device test_train_rows",
    "mainrun/core/routing.py": "test_routing test_routed_steps",
    "mainrun/data/batches.py": "test_tokens test_tokens_rows",
    "mainrun/data/foreign.py": "test_foreign_tokenizer",
    "mainrun/data/hub.py": "test_hub",
    "mainrun/data/hub_dataset.py": "test_hub_dataset",
    "mainrun/data/hub_files.py": "test_hub test_hub_dataset",
    "mainrun/data/mix.py": "test_corpus",
    "mainrun/data/lengths.py": "test_lengths test_fit",
    "mainrun/data/scoring.py": "test_scoring test_guards",
    "mainrun/data/sources.py": "test_corpus test_hub test_documents",
    "mainrun/data/title_files.py": "test_corpus test_documents",
    "mainrun/data/titles.py": "test_corpus test_documents",
    "mainrun/data/token_cache.py": "test_tokens test_tokens_rows test_foreign_tokenizer",
    "mainrun/data/tokenizer.py": "test_tokens test_tokens_rows test_foreign_tokenizer",
    "mainrun/errors.py": "test_cli test_doors",
    "mainrun/files/hashing.py": "test_checkpoint test_store_checkpoint",
    "mainrun/files/locks.py": "test_rundir test_store_rundir",
    "mainrun/growth/make.py": "test_growth_controller test_growth_controller_rows",
    "mainrun/growth/state.py": "test_growth_controller test_growth_controller_rows",
    "mainrun/plan/cost.py": "test_growth_simulate test_growth_plan test_layers test_routed_steps",
    "mainrun/plan/op_files.py": "test_growth_schedule test_growth_schedule_rows",
    "mainrun/plan/op_values.py": "test_growth_schedule test_growth_schedule_rows",
    "mainrun/plan/ops.py": "test_growth_schedule test_growth_schedule_rows",
    "mainrun/plan/optimizers.py": "test_growth_simulate test_growth_moments test_config_rows",
    "mainrun/plan/plan.py": "test_config test_config_rows test_train_rows",
    "mainrun/plan/preset_schema.py": "test_schemas",
    "mainrun/plan/recipes.py": "test_config test_config_rows test_presets",
    "mainrun/plan/routing.py": "test_routing test_routed_steps test_config_rows",
    "mainrun/plan/seeds.py": "test_model test_train_rows",
    "mainrun/plan/simulate.py": "test_growth_simulate test_growth_plan",
    "mainrun/plan/triggers.py": "test_growth_schedule test_growth_schedule_rows",
    "mainrun/interop/adapter.py": "test_interop_export",
    "mainrun/interop/bases.py": "test_interop_export",
    "mainrun/interop/card.py": "test_interop_export",
    "mainrun/interop/choice_files.py": "test_eval",
    "mainrun/interop/cli.py": "test_interop_hub test_interop_import",
    "mainrun/interop/eval.py": "test_eval",
    "mainrun/interop/eval_cli.py": "test_eval",
    "mainrun/interop/export.py": "test_interop_export",
    "mainrun/interop/export_cli.py": "test_interop_export test_interop_push",
    "mainrun/interop/hub.py": "test_interop_hub test_interop_import",
    "mainrun/interop/lm_eval_model.py": "test_eval",
    "mainrun/interop/names.py": "test_interop_import test_interop_export",
    "mainrun/interop/push.py": "test_interop_push",
    "mainrun/interop/qwen2.py": "test_interop_import",
    "mainrun/interop/qwen2_export.py": "test_interop_export",
    "mainrun/interop/routing_files.py": "test_interop_export",
    "mainrun/interop/source.py": "test_interop_export test_interop_push",
    "mainrun/interop/start.py": "test_interop_start",
    "mainrun/interop/tokenizer_files.py": "test_interop_export",
    "mainrun/run/trackers.py": "test_tracking",
    "mainrun/run/accounts.py": "test_session_rows test_sharing",
    "mainrun/run/batch.py": "test_sharing test_audit",
    "mainrun/run/log.py": "test_session_rows test_train",
    "mainrun/run/resume.py": "test_session_rows test_checkpoint",
    "mainrun/run/session.py": "test_train test_checkpoint test_sharing test_forgery",
    "mainrun/run/stop.py": "test_train test_session_rows",
    "mainrun/run/token_scores.py": "test_ensemble",
    "mainrun/run/summary.py": "test_session_rows test_train",
    "mainrun/store/costs.py": "test_store_costs test_cli",
    "mainrun/store/files.py": "test_store test_leases",
    "mainrun/store/nodes.py": "test_store",
    "mainrun/store/records.py": "test_damaged",
    "mainrun/store/token_scores.py": "test_ensemble",
    "mainrun/train.py": "test_train test_model test_routing test_routed_steps",
    "mainrun/ui/compare.py": "test_cli test_damaged",
    "mainrun/ui/completion.py": "test_completion",
    "mainrun/ui/console.py": "test_cli test_doors",
    "mainrun/ui/demo.py": "test_cli",
    "mainrun/ui/doctor.py": "test_cli",
    "mainrun/ui/grouping.py": "test_reports_load test_paired",
    "mainrun/ui/growth_cli.py": "test_growth_plan",
    "mainrun/ui/ls_cli.py": "test_ls",
    "mainrun/ui/paired.py": "test_paired",
    "mainrun/ui/presets_cli.py": "test_cli",
    "mainrun/ui/sample.py": "test_cli test_doors",
    "mainrun/ui/store_cli.py": "test_store test_audit",
    "mainrun/ui/train_cli.py": "test_cli test_sharing",
    "reports": "test_report test_report_pages",
    "reports/evidence/figures/labels.py": "test_training_flops",
    "reports/evidence/figures/search_bench.py": "test_search_bench_report",
    "reports/evidence/figures/training_flops.py": "test_training_flops",
    "reports/evidence/findings.py": "test_report test_report_pages test_reports_findings",
    "reports/evidence/load.py": "test_report test_reports_load",
    "reports/evidence/tables.py": "test_report test_reports_tables",
    "reports/submission/bundle.py": "test_bundle test_submission",
    "reports/submission/commit.py": "test_leaks test_bundle",
    "reports/submission/replay_process.py": "test_submission",
    "reports/submission/finished_run.py": "test_submission_prepare test_submission_verification",
    "reports/submission/prepare.py": "test_submission",
    "reports/submission/upload.py": "test_upload",
    "reports/submission/verification.py": "test_submission",
    "reports/web": "test_web_page test_web_board",
    "sweeps": "test_sweeps test_sweeps_trouble",
    "sweeps/search_bench": "test_search_bench_tables test_search_bench_ours",
    "sweeps/search_bench/metrics.py": "test_search_bench_metrics",
    "sweeps/search_bench/record.py": "test_search_bench_record",
    "sweeps/search_bench/report.py": "test_search_bench_report",
    "sweeps/search_bench/rivals.py": "test_search_bench_rivals",
    "sweeps/search_bench/searches.py": "test_search_bench_report",
    "sweeps/search_bench/adapters": "test_search_bench_rivals",
    "sweeps/verdict.py": "test_sweeps_confirm test_sweeps_sequential",
}


def mirrored_tests(file: str, root: Path) -> list[str]:
    stem, package = Path(file).stem, Path(file).parent.name
    names = {f"test_{stem}", f"test_{stem}_rows", f"test_{package}_{stem}", f"test_{package}_{stem}_rows"}
    for place in (file, *map(str, Path(file).parents)):
        if place in MIRRORS:
            names |= set(MIRRORS[place].split())
            break
    return sorted(f"tests/{name}.py" for name in names if (root / "tests" / f"{name}.py").is_file())


# -- the worker


def serve() -> None:
    """Read one request per line and answer each with a line of JSON. Only these answers go to stdout."""
    # Ctrl-C reaches the whole process group. Ignore it here, because the parent process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        for name in request.pop("imports", ()):
            import_if_possible(name)
        print(json.dumps(run_in_fork(**request)), file=answers, flush=True)


def import_if_possible(name: str) -> None:
    try:
        __import__(name)
    except Exception as error:  # the tests will report a library that cannot be imported
        print(f"{name} cannot be imported in advance: {error}", file=sys.stderr)


def run_in_fork(kind: str, limit: float, result: str, **arguments: Any) -> dict[str, Any]:
    """Run the tests in a child with its own process group, and kill the whole group at the end."""
    for leftover in (Path(result), Path(result + DEADLINE)):
        leftover.unlink(missing_ok=True)
    began, parent = time.monotonic(), os.getppid()
    child = os.fork()
    if child == 0:
        os.setsid()
        # Background jobs ignore SIGINT, but some tests send it to themselves, so restore the default handler.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, 0)
        code = 70
        try:
            code = run_tests(kind=kind, result=Path(result), **arguments)
        finally:
            os._exit(code)
    code: int | None = None
    try:
        while (
            code is None
            and time.monotonic() < min(began + limit, deadline_of(result))
            and os.getppid() == parent
        ):
            pid, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0 if pid else 0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return {"code": code, "seconds": time.monotonic() - began}


def deadline_of(result: str) -> float:
    """Return the monotonic time at which the current test exceeds its time limit."""
    try:
        return float(Path(result + DEADLINE).read_text())
    except (OSError, ValueError):  # no test has started yet, or the file is being written
        return math.inf


def run_tests(
    kind: str, tests: list[str], selected: dict[str, float], result: Path, temporary: str, sources: list[str]
) -> int:
    import pytest

    recorder: Recorder = (
        Measure(sources) if kind == "measure" else Stop(selected, Path(f"{result}{DEADLINE}"))
    )
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={temporary}"]
    if kind != "measure":
        options.append("-x")
    code = int(pytest.main([*options, *tests], plugins=[recorder]))
    result.write_text(json.dumps(recorder.result()))
    return code


class Recorder:
    def result(self) -> dict[str, Any]:
        return {}


class Stop(Recorder):
    """Run the selected tests file by file, in the given order, and record the first failure.

    `selected` maps each test to its time limit in seconds. This class writes the deadline of the current test
    to a file, which the worker reads.
    """

    def __init__(self, selected: dict[str, float], deadline: Path) -> None:
        self.selected, self.deadline = selected, deadline
        self.place = {test: i for i, test in enumerate(selected)}
        self.failed = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.deadline.write_text(str(time.monotonic() + self.selected[nodeid]))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        first: dict[str, int] = {}
        for item in items:
            rank = self.place.get(item.nodeid, len(self.place))
            first[item.fspath] = min(rank, first.get(item.fspath, rank))
        kept = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(kept, key=lambda item: (first[item.fspath], self.place[item.nodeid]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def result(self) -> dict[str, Any]:
        return {"failed": self.failed}


class Measure(Recorder):
    """Record the executed lines, duration and result of each test, and which tests start processes."""

    def __init__(self, sources: list[str]) -> None:
        import coverage

        os.environ["COVERAGE_CORE"] = "ctrace"  # only this coverage core supports contexts
        self.sources = sources
        self.coverage = coverage.Coverage(data_file=None, include=sources, config_file=False, messages=False)
        self.seconds: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.starters: set[str] = set()
        self.current = ""
        sys.addaudithook(self.audit)
        self.coverage.start()

    def audit(self, event: str, _arguments: Any) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec"):
            self.starters.add(self.current)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current = nodeid
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def result(self) -> dict[str, Any]:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            file: {str(k): v for k, v in data.contexts_by_lineno(file).items()}
            for file in data.measured_files()
        }
        site = ("site-packages", "dist-packages")
        imports = [
            name
            for name, module in sys.modules.items()
            if any(s in (getattr(module, "__file__", "") or "") for s in site)
        ]
        return {
            "lines": lines, "seconds": self.seconds, "failed": sorted(self.failed),
            "starters": sorted(self.starters),
            "imports": [name for name in imports if "coverage" not in name],
        }  # fmt: skip


# -- the parent process


class Worker:
    """A copy of the source tree and a process that runs tests in it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree, self.result = folder / "tree", folder / "result.json"
        self.temporary = folder / "tmp"
        self.log = folder / "log"
        self.changes = 0
        shutil.copytree(root, self.tree, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        env = os.environ | {
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, str(HERE / "mutate.py"), "--serve"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.tree,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def write(self, file: str, source: str) -> None:
        """Write a source file with a new modification time.

        Python reuses a .pyc file if the source has the same size and the same modification time in seconds.
        """
        path = self.tree / file
        path.write_text(source, encoding="utf-8")
        self.changes += 1
        os.utime(path, (1_000_000_000 + self.changes, 1_000_000_000 + self.changes))

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        request |= {"result": str(self.result), "temporary": str(self.temporary)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"mutate: a worker process exited unexpectedly:\n{self.last_output()}")
        shutil.rmtree(self.temporary, ignore_errors=True)
        result = json.loads(self.result.read_text()) if self.result.is_file() else {}
        return json.loads(answer) | result

    def last_output(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def close(self) -> None:
        """Stop the worker process and the tests that it runs."""
        self.process.terminate()
        self.process.wait()


@dataclass
class Baseline:
    """The results of the tests on the unchanged source."""

    tests: list[str]
    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]
    starters: set[str]
    failed: list[str]
    imports: list[str]
    kills: Counter[str] = field(default_factory=Counter)

    def tests_of(self, file: str, lines: range) -> list[str]:
        """Return the tests for a mutant: first those most likely to fail, then the quickest.

        All tests of a file are selected together, because the lines of a shared fixture are recorded only for
        the first test that uses it.
        """
        contexts = {context for line in lines for context in self.lines.get(file, {}).get(line, ())}
        on_import = "" in contexts or not contexts
        passing = set(self.seconds) - set(self.failed)
        reached = {file_of(test) for test in contexts}
        selected = {
            test for test in passing if on_import or file_of(test) in reached or test in self.starters
        }
        return sorted(
            selected, key=lambda test: (-self.kills[test], test not in contexts, self.seconds[test])
        )

    def allowed(self, test: str) -> float:
        """Return the time limit of a test in seconds.

        The limit depends on the slowest test of the file, because the first test of a file also runs the
        shared fixtures.
        """
        return 20 + 5 * self.slowest[file_of(test)]

    @cached_property
    def slowest(self) -> dict[str, float]:
        """Map each test file to the duration of its slowest test in seconds."""
        slowest: dict[str, float] = {}
        for test, seconds in self.seconds.items():
            slowest[file_of(test)] = max(seconds, slowest.get(file_of(test), 0.0))
        return slowest


def file_of(test: str) -> str:
    return test.partition("::")[0]


def measure(worker: Worker, files: list[str], tests: list[str]) -> Baseline:
    paths = [str(worker.tree / file) for file in files]
    answer = worker.ask(kind="measure", limit=1800, tests=tests, selected={}, sources=paths)
    if "lines" not in answer or not answer["seconds"]:
        raise SystemExit(f"mutate: the tests cannot be run without a mutant:\n{worker.last_output()}")
    lines = {
        str(Path(file).relative_to(worker.tree)): {int(line): contexts for line, contexts in by_line.items()}
        for file, by_line in answer["lines"].items()
    }
    return Baseline(
        tests, lines, answer["seconds"], set(answer["starters"]), answer["failed"], answer["imports"]
    )


@dataclass
class Verdict:
    mutant: Any
    outcome: str  # killed | timeout | survived | equivalent
    by: str = ""
    reason: str = ""
    seconds: float = 0.0


def try_mutant(worker: Worker, baseline: Baseline, mutant: Any, source: str) -> Verdict:
    from mutants import apply

    selected = baseline.tests_of(mutant.file, mutant.lines)
    allowed = {test: baseline.allowed(test) for test in selected}
    limit = 30 + 5 * sum(baseline.seconds[test] for test in selected)
    needed = {file_of(test) for test in selected}
    files = [file for file in baseline.tests if file in needed]
    worker.write(mutant.file, apply(mutant, source))
    try:
        answer = worker.ask(
            kind="stop", limit=limit, tests=files, selected=allowed, sources=[], imports=baseline.imports
        )
    finally:
        worker.write(mutant.file, source)
    if answer["code"] is None:
        return Verdict(mutant, "timeout", seconds=answer["seconds"])
    if answer["code"] in (0, 5):
        return Verdict(mutant, "survived", seconds=answer["seconds"])
    by = answer.get("failed", "")
    baseline.kills[by] += 1
    return Verdict(mutant, "killed", by=by, seconds=answer["seconds"])


Reasons = dict[tuple[str, str, str], str]  # maps (file, line, changed line) to why the change has no effect


def read_equivalents(paths: list[Path]) -> Reasons:
    reasons = {}
    for path in paths:
        for file, rows in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for row in rows:
                reasons[file, without_spaces(row["line"]), without_spaces(row["mutant"])] = row["reason"]
    return reasons


def without_spaces(text: str) -> str:
    return "".join(text.split())


def draw_mutants(sources: dict[str, str], args: argparse.Namespace) -> list[Any]:
    from mutants import draw

    chance = random.Random(args.seed)
    mutants = [
        mutant for file, source in sources.items() for mutant in draw(file, source, args.sample, chance)
    ]
    if args.sample:
        return chance.sample(mutants, min(args.sample, len(mutants)))
    return mutants


def try_mutants(
    mutants: list[Any], sources: dict[str, str], tests: list[str], args: argparse.Namespace, folder: Path
) -> Iterator[Verdict]:
    """Test the mutants in parallel and yield their verdicts in the original order."""
    workers = [Worker(args.root, folder / str(i)) for i in range(args.jobs)]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        baseline = measure(workers[0], list(sources), tests)
        for test in baseline.failed:
            print(f"skipped, because it fails without a mutant: {test}", flush=True)
        free: Queue[Worker] = Queue()
        for worker in workers:
            free.put(worker)

        def work(mutant: Any) -> Verdict:
            worker = free.get()
            try:
                return try_mutant(worker, baseline, mutant, sources[mutant.file])
            finally:
                free.put(worker)

        yield from pool.map(work, mutants)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


# -- output


def show(verdict: Verdict) -> None:
    mutant = verdict.mutant
    if verdict.outcome not in ("survived", "equivalent"):
        return
    print(f"{verdict.outcome}: {mutant.file}:{mutant.line} ({mutant.operator})")
    print(f"    - {mutant.before}\n    + {mutant.after}")
    if verdict.reason:
        print(f"    {verdict.reason}")
    sys.stdout.flush()


def show_progress(done: int, total: int) -> None:
    """Show a counter on a terminal. The next line of output overwrites the counter."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total}\r", end="", file=sys.stderr, flush=True)


def summary(name: str, results: list[Verdict], seed: int, seconds: float) -> str:
    count = Counter(verdict.outcome for verdict in results)
    killed = count["killed"] + count["timeout"]
    mutants = "1 mutant" if len(results) == 1 else f"{len(results)} mutants"
    return (
        f"{name}: {mutants} (seed {seed}): {killed} killed ({count['timeout']} by the time limit), "
        f"{count['survived']} survived, {count['equivalent']} equivalent: "
        f"{score(results):.1f}% of {killed + count['survived']}; {seconds:.0f} s"
    )


def score(results: list[Verdict]) -> float:
    """Return the percentage of mutants that were killed, not counting equivalent mutants."""
    count = Counter(verdict.outcome for verdict in results)
    killed = count["killed"] + count["timeout"]
    return 100 * killed / max(1, killed + count["survived"])


def write_json(path: Path, name: str, results: list[Verdict], args: argparse.Namespace) -> None:
    rows = [
        asdict(v) | {"mutant": asdict(v.mutant) | {"lines": [v.mutant.lines.start, v.mutant.lines.stop]}}
        for v in results
    ]
    path.write_text(
        json.dumps({"name": name, "seed": args.seed, "sample": args.sample, "mutants": rows}, indent=1)
    )


# -- the command line


class UsageError(Exception):
    """The arguments of the command are invalid."""


def whole_number(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number of {low} or more")
        return int(text)

    return convert


def percentage(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number from 0 to 100")
    return number


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./task mutate",
        usage="./task mutate -- FILE [FILE ...] [OPTIONS]",
        description="Plant small bugs in source files and list those that no test detects. "
        "Tests that are marked slow do not run.",
        epilog="Exit codes: 0: done. 1: fewer mutants are killed than --at-least requires. "
        "2: invalid arguments. 130: interrupted.",
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="FILE",
        help="a source file or a folder, relative to the root of the tree",
    )
    parser.add_argument(
        "--sample",
        type=whole_number(0),
        default=40,
        metavar="N",
        help="how many mutants to draw at random; 0 means all (default: 40)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="S", help="the seed of the random draw (default: 1)"
    )
    parser.add_argument(
        "--jobs",
        type=whole_number(1),
        default=os.cpu_count(),
        metavar="J",
        help="the number of worker processes (default: one per core)",
    )
    parser.add_argument(
        "--tests", metavar="A,B", help="run these test files instead of those of the source file"
    )
    parser.add_argument(
        "--at-least",
        type=percentage,
        default=0.0,
        metavar="PERCENT",
        help="exit with code 1 if less than PERCENT of the mutants are killed (default: 0)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every mutant and its outcome to this file"
    )
    parser.add_argument("--equivalent", type=Path, metavar="FILE", help="a file with more equivalent mutants")
    parser.add_argument(
        "--root",
        type=Path,
        default=HERE.parent,
        metavar="DIR",
        help="the root of the source tree to test (default: this tree)",
    )
    return parser.parse_args(arguments)


def find_sources(args: argparse.Namespace) -> list[str]:
    from mutants import sources

    example = "give a path such as sweeps/confirm.py"
    outside = [
        target for target in args.targets if not (args.root / target).resolve().is_relative_to(args.root)
    ]
    if outside:
        raise UsageError(f"{', '.join(outside)}: outside of {args.root}; {example}")
    missing = [target for target in args.targets if not (args.root / target).exists()]
    if missing:
        raise UsageError(f"no such file in {args.root}: {', '.join(missing)}; {example}")
    files = sources(args.root, args.targets)
    if not files:
        raise UsageError(f"no Python file in {', '.join(args.targets)}; {example}")
    return files


def find_tests(files: list[str], args: argparse.Namespace) -> list[str]:
    mirrored = {test for file in files for test in mirrored_tests(file, args.root)}
    tests = args.tests.split(",") if args.tests else sorted(mirrored)
    missing = [test for test in tests if not (args.root / test).is_file()]
    if missing:
        raise UsageError(
            f"no such test file in {args.root}: {', '.join(missing)}; give a path such as tests/test_stats.py"
        )
    if not tests:
        raise UsageError(
            f"no test mirrors {', '.join(files)}; name some with --tests, or add a row to MIRRORS"
        )
    return tests


def find_reasons(extra: Path | None) -> Reasons:
    reasons = read_equivalents([EQUIVALENT])
    if extra is None:
        return reasons
    try:
        return reasons | read_equivalents([extra])
    except OSError as error:
        raise UsageError(
            f"--equivalent {extra}: cannot be read ({error.strerror}); give an existing file"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--equivalent {extra}: not a list like {EQUIVALENT.name} ({error}); correct the file"
        ) from error


def check_output(path: Path | None) -> None:
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: its folder does not exist; create it or give another path")
    if path.is_dir():
        raise UsageError(f"--json {path}: is a folder; give the path of a file")


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    args.root = args.root.resolve()
    try:
        files = find_sources(args)
        tests = find_tests(files, args)
        reasons = find_reasons(args.equivalent)
        check_output(args.json)
    except UsageError as error:
        print(f"mutate: {error}", file=sys.stderr)
        return 2
    print(f"tests: {', '.join(tests)}", flush=True)
    start = time.monotonic()
    results: list[Verdict] = []
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        collect(results, files, tests, reasons, args)
    except KeyboardInterrupt:
        interrupted = True
    name = " ".join(args.targets)
    print(summary(name, results, args.seed, time.monotonic() - start))
    if interrupted:
        print("mutate: interrupted; the figures are those of the mutants tried so far", file=sys.stderr)
        return 130
    if args.json:
        write_json(args.json, name, results, args)
    if score(results) < args.at_least:
        print(f"mutate: {score(results):.1f}% is below --at-least {args.at_least:g}", file=sys.stderr)
        return 1
    return 0


def collect(
    results: list[Verdict], files: list[str], tests: list[str], reasons: Reasons, args: argparse.Namespace
) -> None:
    """Append the verdict of each mutant to the results.

    If the user interrupts the command, the results contain the verdicts so far.
    """
    sources = {file: (args.root / file).read_text(encoding="utf-8") for file in files}
    mutants = draw_mutants(sources, args)
    remaining = []
    for mutant in mutants:
        reason = reasons.get((mutant.file, without_spaces(mutant.before), without_spaces(mutant.after)))
        if reason is None:
            remaining.append(mutant)
            continue
        results.append(Verdict(mutant, "equivalent", reason=reason))
        show(results[-1])
    with (
        tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder,
        closing(try_mutants(remaining, sources, tests, args, Path(folder))) as verdicts,
    ):
        for verdict in verdicts:
            results.append(verdict)
            show(verdict)
            show_progress(len(results), len(mutants))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
