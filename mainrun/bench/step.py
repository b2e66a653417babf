"""`mainrun bench step`: compare the training step of mainrun with rival implementations.

Each rival runs in its own process. The rivals take turns, and each turn is one training step.

This module does not import torch, so that the parent process does not disturb the measurements.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, NamedTuple

from mainrun.config import TrainConfig
from mainrun.errors import MainrunError, UsageError

WORKER = [sys.executable, "-m", "mainrun.bench.worker"]
BF16_TOLERANCE = 1e-3  # the allowed difference between the losses in bfloat16 and in float32

Answer = dict[str, Any]  # an answer of a worker, as defined in bench/worker.py
Report = dict[str, Any]  # the report that --json prints


class RivalSpec(NamedTuple):
    worker: str  # a key of RIVALS in bench/worker.py
    tuned: bool  # whether the memory allocator is tuned
    options: dict[str, bool] = {}  # noqa: RUF012


OURS = "mainrun"
FLOOR = "GEMM floor"
RIVALS = {
    "plain, default allocator": RivalSpec("plain", False),
    "plain, tuned allocator": RivalSpec("plain", True),
    "mainrun, default allocator": RivalSpec("ours", False),
}
ALWAYS = {
    OURS: RivalSpec("ours", True, {"evaluate": True, "profile": True}),
    FLOOR: RivalSpec("floor", True),
}


class Worker:
    """The parent process's connection to the worker process of one rival."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.name = name
        self.process = process
        self.log = log

    def ask(self, word: str) -> Answer:
        """Send a command word to the worker and return the answer of the worker."""
        assert self.process.stdin is not None
        with suppress(OSError):  # if the worker has ended, listen() reports the reason
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.listen()

    def listen(self) -> Answer:
        """Return the next answer of the worker."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise MainrunError(self._cause_of_death())
        answer: Answer = json.loads(line)
        if "error" not in answer:
            return answer
        if answer["exit_code"] == UsageError.exit_code:
            raise UsageError(answer["error"])
        raise MainrunError(answer["error"])

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return (
                f"the worker of {self.name!r} was killed, most likely because the memory was full; "
                "free some memory, or lower batch_size"
            )
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        last = lines[-1] if lines else "it printed nothing"
        return f"the worker of {self.name!r} ended with exit code {code}: {last}"


@contextmanager
def start(name: str, rival: str, tuned: bool, cfg: TrainConfig, **options: Any) -> Iterator[Worker]:
    """Start a worker, and kill the worker at the end of the `with` block."""
    request = json.dumps({"rival": rival, "config": cfg.model_dump(), **options})
    env = dict(os.environ)
    env.pop("MAINRUN_ALLOCATOR", None)
    if not tuned:
        env["MAINRUN_ALLOCATOR"] = "default"
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [*WORKER, request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
            # In a separate session, the worker receives no Ctrl-C and can be killed together with its
            # compiler processes.
            start_new_session=True,
        )
        try:
            yield Worker(name, process, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):  # a worker that has ended cannot receive a buffered command
                    pipe.close()


def measure(
    cfg: TrainConfig, *, rivals: bool, repeats: int, note: Callable[[str], None] = lambda _: None
) -> Report:
    """Measure `repeats` steps of each rival, and profile the step of mainrun."""
    specs = RIVALS | ALWAYS if rivals else ALWAYS
    ready: dict[str, Answer] = {}
    steps: dict[str, list[Answer]] = {name: [] for name in specs}
    with ExitStack() as stack:
        workers = []
        for name, spec in specs.items():  # warm up one worker at a time, because workers slow each other down
            note(f"{name}: warming up")
            worker = stack.enter_context(start(name, spec.worker, spec.tuned, cfg, **spec.options))
            ready[name] = worker.listen()
            workers.append(worker)
        for i in range(repeats):
            note(f"round {i + 1} of {repeats}")
            first = i % len(workers)  # rotate the order, so that no rival always runs after the same rival
            for worker in workers[first:] + workers[:first]:
                steps[worker.name].append(worker.ask("step"))
        note("peak memory, evaluation and profile")
        ends = {worker.name: worker.ask("end") for worker in workers}
    return make_report(cfg, steps, ready, ends)


def make_report(
    cfg: TrainConfig, steps: dict[str, list[Answer]], ready: dict[str, Answer], ends: dict[str, Answer]
) -> Report:
    """Compute the figures of the report from the answers of the workers."""
    tokens = cfg.batch_size * cfg.block_size
    floor = {}
    for part in ("seconds", "layers", "head"):
        floor[part] = statistics.median(answer[part] for answer in steps[FLOOR])
    rows = {}
    for name, answers in steps.items():
        peak = None if name == FLOOR else ends[name]["peak"]
        rows[name] = _row(name, [answer["seconds"] for answer in answers], tokens, peak, ready[name])
    ours = rows[OURS]
    for row in rows.values():
        row["floor_share"] = floor["seconds"] / row["seconds"]
        row["ours_is"] = row["seconds"] / ours["seconds"]  # mainrun is this many times as fast as the rival
    floor["flops"] = ready[FLOOR]["flops"]
    floor["flops_per_s"] = ready[FLOOR]["flops"] / floor["seconds"]
    estimate = ready[OURS]["memory_estimate"]
    return {
        "preset": cfg.preset,
        "dtype": cfg.dtype,
        "optimizer": cfg.optimizer,
        "params": ready[OURS]["params"],
        "tokens_per_step": tokens,
        "repeats": len(steps[OURS]),
        "rivals": list(rows.values()),
        "floor": floor,
        "step_flops_per_s": ready[OURS]["flops"] / ours["seconds"],
        "profile": ends[OURS]["profile"],
        "memory": {"peak": ours["peak"], "estimate": estimate, "ratio": ours["peak"] / estimate},
        "evaluation": _evaluation(ends[OURS]["evaluation"], ours["tokens_per_s"] * cfg.passes),
        "machine_class": ready[OURS]["machine_class"],
    }


def _row(name: str, times: list[float], tokens: int, peak: int | None, ready: Answer) -> dict[str, Any]:
    """Return the measured figures of one rival."""
    median = statistics.median(times)
    row = {
        "rival": name,
        "tokens_per_s": tokens / median,
        "seconds": median,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "peak": peak,
        "warmup_seconds": ready["warmup_seconds"],
    }
    for key in ("allocator", "attention", "dtype", "compile"):
        if key in ready:
            row[key] = ready[key]
    return row


def _evaluation(measured: Answer, processed_per_s: float) -> dict[str, Any]:
    """Compare the speed of an evaluation with a forward pass, and the bfloat16 loss with the float32 loss.

    processed_per_s: the number of tokens that training steps process per second.
    """
    evaluation = dict(measured)
    # A forward pass takes about a third of the time of a training step.
    evaluation["of_forward_share"] = 3 * processed_per_s / evaluation["tokens_per_s"]
    if "loss_float32" in evaluation:
        evaluation["bf16_error"] = abs(evaluation["loss"] - evaluation["loss_float32"])
        evaluation["bf16_close"] = evaluation["bf16_error"] <= BF16_TOLERANCE
    return evaluation


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of rivals."""
    head = ["", "tokens/s", "s/step", "min-max", "mainrun is", "GEMM floor", "peak", "warm-up"]
    lines = []
    for row in report["rivals"]:
        compiled = ", compiled" if row.get("compile") else ""
        lines.append(
            [
                row["rival"],
                f"{row['tokens_per_s']:,.0f}",
                seconds(row["seconds"]),
                f"{seconds(row['seconds_min'])}-{seconds(row['seconds_max'])}",
                f"x{row['ours_is']:.2f}",
                f"{row['floor_share']:.0%}",
                "" if row["peak"] is None else gigabytes(row["peak"]),
                f"{row['warmup_seconds']:.0f} s{compiled}",
            ]
        )
    return head, lines


def lines(report: Report) -> Iterator[str]:
    """Yield the text lines that are printed below the table."""
    floor = report["floor"]
    memory = report["memory"]
    evaluation = report["evaluation"]
    yield (
        f"{report['preset']}: {report['params'] / 1e6:.1f}M parameters, "
        f"{report['tokens_per_step']:,} tokens per step, {report['dtype']}, {report['optimizer']}; "
        f"medians of {report['repeats']} steps"
    )
    yield (
        f"floor: layers {floor['layers']:.3f} s, head {floor['head']:.3f} s, "
        f"{floor['flops_per_s'] / 1e12:.2f} TFLOP/s; "
        f"whole step: {report['step_flops_per_s'] / 1e12:.2f} TFLOP/s"
    )
    yield "time: " + ", ".join(f"{part} {share:.1%}" for part, share in report["profile"].items())
    yield (
        f"memory: peak {gigabytes(memory['peak'])}, estimated by --dry-run {gigabytes(memory['estimate'])}: "
        f"x{memory['ratio']:.2f}"
    )
    yield (
        f"evaluation: {evaluation['tokens_per_s']:,.0f} tokens/s, "
        f"x{evaluation['of_forward_share']:.2f} the time of a training step's forward pass "
        "(a third of the step)"
    )
    if "bf16_error" in evaluation:
        verdict = "within" if evaluation["bf16_close"] else "NOT within"
        yield (
            f"bfloat16: the loss differs by {evaluation['bf16_error']:.1e} from float32 on the same weights, "
            f"{verdict} {BF16_TOLERANCE:g}"
        )


def seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.5f}"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
